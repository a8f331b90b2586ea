//! Ownership that is recorded: owners, modes, devices, attributes, ACLs.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use fsoverlay::{CHOWN_XATTR, MKNOD_XATTR};
use rustix::fs::{AtFlags, CWD, FileType, Mode, XattrFlags, mknodat};

use crate::harness::{Case, Check, Failure, World, errno, holds, need_range, same};

pub(crate) const CASES: &[Case] = &[
    Case { name: "recorded_with_a_single_id", outside: single, inside: record },
    Case { name: "recorded_with_a_range_of_ids", outside: ranged, inside: range },
    Case { name: "set_ids_stay_when_root_writes", outside: set_ids_single, inside: set_ids },
    Case { name: "set_ids_go_when_others_write", outside: set_ids_range, inside: set_ids },
    Case { name: "attributes_round_trip_and_marks_are_private", outside: attributes, inside: xattrs },
    Case { name: "acls_are_kept_enforced_and_inherited", outside: acl_range, inside: acls },
    Case { name: "records_in_layers_are_read", outside: recorded_layer, inside: read_records },
    Case { name: "owners_of_links_survive_a_kill", outside: killed, inside: change_owners },
];

fn disk_xattr(path: &Path, name: &str) -> Result<String, Failure> {
    let mut buf = vec![0; 1024];
    match rustix::fs::lgetxattr(path, name, buf.as_mut_slice()) {
        Ok(n) => Ok(String::from_utf8_lossy(&buf[..n]).into_owned()),
        Err(rustix::io::Errno::NODATA) => Ok(String::new()),
        Err(err) => Err(err.into()),
    }
}

const RECORD: &str = "user.containers.override_stat";

fn single(world: &mut World) -> Check {
    fs::write(world.lower().join("lower"), "x")?;
    symlink("x", world.lower().join("lowerlink"))?;
    world.mount().run()?;
    let upper = world.upper();
    same!(disk_xattr(&upper.join("f"), RECORD)?, "33:44:06755:file");
    same!(disk_xattr(&upper.join("plain"), RECORD)?, "");
    same!(disk_xattr(&upper.join("lower"), RECORD)?, "7:0:0644:file");
    same!(disk_xattr(&upper.join("null"), RECORD)?, "0:6:0666:char-1-3");
    same!(disk_xattr(&upper.join("disk"), RECORD)?, "5:6:0660:block-8-300");
    let me = nix::unistd::getuid().as_raw();
    for entry in fs::read_dir(&upper)? {
        let entry = entry?;
        let meta = entry.path().symlink_metadata()?;
        same!(meta.uid(), me);
        holds!(meta.mode() & 0o6000 == 0, "{:?} {:o}", entry.file_name(), meta.mode());
        holds!(!meta.file_type().is_block_device() && !meta.file_type().is_fifo());
    }
    world.mount().arg("again").run()?;
    crate::semantics::no_leftovers(world)
}

/// How many links have an owner of their own; that of the first one changes.
const LINKS: usize = 40;

/// The server is killed while it writes the owners anew, at each of its steps.
fn killed(world: &mut World) -> Check {
    if Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_err() {
        return Err(Failure::Skip("there is no strace".to_owned()));
    }
    let notes = world.path("other/notes");
    // Before and after each of these: what was there is removed, the new file is made, synced and put in place.
    for call in ["unlinkat", "openat", "pwrite64", "fsync", "renameat"] {
        world.empty_upper()?;
        fs::write(&notes, "")?;
        let path = world.path("work/#0").display().to_string();
        let inject = format!("inject={call}:signal=KILL:when=1+");
        // By the name in the work directory, or the descriptor.
        let only = ["-P", "#0", "-P", &path];
        let mut strace = vec!["strace", "-f", "-b", "execve", "-qq", "-o", "/dev/null", "-e", &inject];
        strace.extend(only);
        let mount = world.mount().arg(notes.display().to_string());
        let mut server = mount.command_under(&strace)?.stderr(Stdio::null()).spawn()?;
        holds!(!server.wait()?.success(), "{call} killed nobody");
        let done = fs::read_to_string(&notes)?.lines().count();
        world.mount().arg("after").run()?;
        crate::semantics::no_leftovers(world)?;
        // With a single id all are shown as that one. Of the lines about a link the last one counts.
        let text = fs::read_to_string(world.path("work/owners"))?;
        let mut owners = BTreeMap::new();
        for line in text.lines() {
            let (link, owner) = line
                .rsplit_once(' ')
                .and_then(|(rest, gid)| {
                    let (link, uid) = rest.rsplit_once(' ')?;
                    Some((link, (uid.parse::<usize>().ok()?, gid.parse::<usize>().ok()?)))
                })
                .ok_or_else(|| format!("{call}: {line}"))?;
            owners.insert(link, owner);
        }
        let mut owners: Vec<_> = owners.into_values().map(|(uid, gid)| (gid, uid)).collect();
        owners.sort_unstable();
        // The change under way is done or not. The one after the kill is.
        let (first, others) = owners.split_first().ok_or("no owners")?;
        holds!(done > LINKS && (first.1 == done || first.1 == done + 1), "{call}: {first:?} after {done}");
        same!(others, (1..LINKS).map(|i| (1000 + i, usize::from(i == 1))).collect::<Vec<_>>(), "{call}");
    }
    Ok(())
}

fn change_owners(args: &[String]) -> Check {
    let notes = args.first().ok_or("no notes")?;
    if notes == "after" {
        return Ok(set("1", CHOWN_XATTR, "1:-1")?);
    }
    let mut notes = OpenOptions::new().append(true).open(notes)?;
    for i in 0..LINKS {
        symlink("x", i.to_string())?;
        set(&i.to_string(), CHOWN_XATTR, &format!("0:{}", 1000 + i))?;
    }
    for i in 1..100_000 {
        set("0", CHOWN_XATTR, &format!("{i}:0"))?;
        notes.write_all(b"done\n")?;
    }
    Err("nobody was killed".into())
}

fn set(path: &str, name: &str, value: &str) -> rustix::io::Result<()> {
    rustix::fs::lsetxattr(path, name, value.as_bytes(), XattrFlags::empty())
}

fn mode(path: &str) -> Result<u32, Failure> {
    Ok(fs::symlink_metadata(path)?.mode())
}

fn record(args: &[String]) -> Check {
    if args.is_empty() {
        fs::write("plain", "")?;
        fs::write("f", "x")?;
        set("f", CHOWN_XATTR, "33:44")?;
        fs::set_permissions("f", PermissionsExt::from_mode(0o6755))?;
        set("lower", CHOWN_XATTR, "7:-1")?;
        fs::create_dir("tmp")?;
        fs::set_permissions("tmp", PermissionsExt::from_mode(0o1777))?;
        fs::write("none", "n")?;
        fs::set_permissions("none", PermissionsExt::from_mode(0o000))?;
        fs::create_dir("nodir")?;
        fs::set_permissions("nodir", PermissionsExt::from_mode(0o000))?;
        mknodat(CWD, "fifo", FileType::Fifo, Mode::from_raw_mode(0o640), 0)?;
        mknodat(CWD, "socket", FileType::Socket, Mode::from_raw_mode(0o600), 0)?;
        mknodat(CWD, "zero", FileType::CharacterDevice, Mode::from_raw_mode(0o600), 0)?;
        // Devices that mknod(2) refuses here: on the directory, under a name nobody asked for.
        set(".", MKNOD_XATTR, "20666:1:3:0:6:null.new")?;
        fs::rename("null.new", "null")?;
        set(".", MKNOD_XATTR, "60660:8:300:5:6:disk.new")?;
        fs::rename("disk.new", "disk")?;
        errno!(set(".", MKNOD_XATTR, "20666:1:3:0:0:a/b"), INVAL);
        errno!(set(".", MKNOD_XATTR, "40755:0:0:0:0:dir"), INVAL);
        errno!(set("plain", MKNOD_XATTR, "20666:1:3:0:0:x"), NOTDIR);
        // A name that exists, in the upper or below, is nobody's to take.
        for taken in ["plain", "lower", "lowerlink"] {
            errno!(set(".", MKNOD_XATTR, &format!("20666:1:3:0:0:{taken}")), EXIST);
        }
        same!(fs::read("lower")?, b"x");
        errno!(set("plain", CHOWN_XATTR, "nobody"), INVAL);
        symlink("target", "link")?;
        set("link", CHOWN_XATTR, "12:13")?;
        set("lowerlink", CHOWN_XATTR, "12:13")?;
        chown("plain", Some(0), Some(0))?;
    }
    same!(mode("f")?, 0o106_755);
    same!(mode("lower")?, 0o100_644);
    same!(mode("tmp")?, 0o041_777);
    same!(mode("none")?, 0o100_000);
    same!(mode("nodir")?, 0o040_000);
    same!(mode("fifo")?, 0o010_640);
    same!(mode("socket")?, 0o140_600);
    same!(mode("zero")?, 0o020_600);
    same!(mode("null")?, 0o020_666);
    same!(fs::metadata("null")?.rdev(), rustix::fs::makedev(1, 3));
    same!(mode("disk")?, 0o060_660);
    same!(fs::metadata("disk")?.rdev(), rustix::fs::makedev(8, 300));
    same!(fs::read_link("link")?, Path::new("target"));
    // With one id everything is shown as its own.
    for entry in fs::read_dir(".")? {
        let meta = entry?.path().symlink_metadata()?;
        same!((meta.uid(), meta.gid()), (0, 0));
    }
    // Types of entries are those of lookups.
    for entry in rustix::fs::Dir::read_from(File::open(".")?)? {
        let entry = entry?;
        let kind = FileType::from_raw_mode(rustix::fs::lstat(entry.file_name())?.st_mode);
        same!(entry.file_type(), kind, "{:?}", entry.file_name());
    }
    same!(fs::read_to_string("none")?, "n");
    fs::write(format!("nodir/{}", args.len()), "")?;
    // Control names are never kept or listed.
    let mut buf = [0; 64];
    errno!(rustix::fs::lgetxattr("f", CHOWN_XATTR, &mut buf[..]), NODATA);
    same!(rustix::fs::llistxattr("f", &mut buf[..])?, 0);
    Ok(())
}

fn ranged(world: &mut World) -> Check {
    need_range()?;
    fs::write(world.lower().join("lower"), "x")?;
    fs::set_permissions(world.lower().join("lower"), PermissionsExt::from_mode(0o4755))?;
    world.mount().flag("--range").run()?;
    world.mount().flag("--range").arg("again").run()?;
    same!(disk_xattr(&world.upper().join("f"), RECORD)?, "33:44:0640:file");
    crate::semantics::no_leftovers(world)
}

/// Runs this program's half again as another user.
fn as_user(uid: u32, gid: u32, name: &str, step: &str) -> Check {
    let status =
        Command::new(std::env::current_exe()?).args(["--inside", name, step]).uid(uid).gid(gid).status()?;
    holds!(status.success(), "as {uid}:{gid} in {step}");
    Ok(())
}

fn owner(path: &str) -> Result<(u32, u32, u32), Failure> {
    let meta = fs::symlink_metadata(path)?;
    Ok((meta.uid(), meta.gid(), meta.mode() & 0o7777))
}

fn range(args: &[String]) -> Check {
    let name = "recorded_with_a_range_of_ids";
    match args.first().map(String::as_str) {
        Some("again") => {
            same!(owner("f")?, (33, 44, 0o640));
            same!(owner("link")?, (12, 13, 0o777));
            same!(owner("shared/child")?.1, 50);
            same!(owner("of33")?.0, 33);
            return Ok(());
        }
        Some("as33") => {
            errno!(fs::write("f", "no"), ACCESS);
            errno!(fs::read_dir("private"), ACCESS);
            errno!(chown("f", Some(33), None), PERM);
            fs::write("shared/child", "x")?;
            fs::create_dir("shared/dir")?;
            errno!(fs::remove_file("sticky/root"), PERM);
            fs::write("sticky/mine", "x")?;
            fs::remove_file("sticky/mine")?;
            // A write by who is not root takes the set*id bits.
            fs::write("suid", "changed")?;
            same!(owner("suid")?.2, 0o777);
            return Ok(());
        }
        _ => {}
    }
    fs::write("f", "x")?;
    fs::create_dir("private")?;
    fs::set_permissions("private", PermissionsExt::from_mode(0o700))?;
    fs::create_dir("shared")?;
    chown("shared", Some(0), Some(50))?;
    fs::set_permissions("shared", PermissionsExt::from_mode(0o2777))?;
    fs::create_dir("sticky")?;
    fs::set_permissions("sticky", PermissionsExt::from_mode(0o1777))?;
    fs::write("sticky/root", "")?;
    fs::write("suid", "x")?;
    fs::set_permissions("suid", PermissionsExt::from_mode(0o6777))?;
    as_user(33, 44, name, "as33")?;
    same!(owner("shared/child")?, (33, 50, 0o644));
    same!(owner("shared/dir")?, (33, 50, 0o2755));
    chown("f", Some(33), Some(44))?;
    fs::set_permissions("f", PermissionsExt::from_mode(0o640))?;
    same!(owner("f")?, (33, 44, 0o640));
    symlink("x", "link")?;
    std::os::unix::fs::lchown("link", Some(12), Some(13))?;
    same!(owner("link")?, (12, 13, 0o777));
    // chown takes the set*id bits of a file, of a layer too.
    same!(owner("lower")?.2, 0o4755);
    chown("lower", Some(33), None)?;
    same!(owner("lower")?, (33, 0, 0o755));
    // The times say so.
    let before = fs::metadata("f")?;
    chown("f", Some(33), Some(44))?;
    let after = fs::metadata("f")?;
    holds!((after.ctime(), after.ctime_nsec()) > (before.ctime(), before.ctime_nsec()));
    fs::write("of33", "")?;
    chown("of33", Some(33), None)?;
    fs::rename("of33", "moved")?;
    fs::hard_link("moved", "of33")?;
    same!(owner("of33")?, owner("moved")?);
    Ok(())
}

fn set_ids_single(world: &mut World) -> Check {
    set_ids_layer(world)?;
    world.mount().run()?;
    crate::semantics::no_leftovers(world)
}

fn set_ids_range(world: &mut World) -> Check {
    need_range()?;
    set_ids_layer(world)?;
    world.mount().flag("--range").arg("range").run()?;
    crate::semantics::no_leftovers(world)
}

fn set_ids_layer(world: &World) -> Check {
    fs::write(world.lower().join("lower"), "lower")?;
    fs::set_permissions(world.lower().join("lower"), PermissionsExt::from_mode(0o6777))?;
    Ok(())
}

type Change = fn(&File) -> std::io::Result<()>;

/// Every way to change what a file holds.
fn content_changes() -> [(&'static str, Change); 5] {
    [
        ("write", |file| file.write_all_at(b"x", 0)),
        ("extend", |file| file.write_all_at(b"x", 1 << 16)),
        ("truncate", |file| file.set_len(2)),
        ("allocate", |file| {
            Ok(rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, 1 << 14)?)
        }),
        ("copy", |file| {
            let source = File::open("source")?;
            rustix::fs::copy_file_range(source, None, file, None, 4)?;
            Ok(())
        }),
    ]
}

fn set_ids(args: &[String]) -> Check {
    let change = |kept: u32| -> Check {
        for (way, change) in content_changes() {
            let file = OpenOptions::new().write(true).open(way)?;
            change(&file)?;
            // What execve(2) looks at, which asks for less than stat(2) does.
            let only_mode = rustix::fs::statx(CWD, way, AtFlags::empty(), rustix::fs::StatxFlags::MODE)?;
            same!(u32::from(only_mode.stx_mode), kept, "{way}");
            file.sync_all()?;
            same!(mode(way)?, kept, "{way}");
        }
        fs::write("lower", "changed")?;
        same!(mode("lower")?, kept);
        Ok(())
    };
    if args.first().is_some_and(|step| step == "other") {
        return change(0o100_777);
    }
    fs::write("source", "source")?;
    for (way, _) in content_changes() {
        fs::write(way, "content")?;
        fs::set_permissions(way, PermissionsExt::from_mode(0o6777))?;
    }
    if args.is_empty() {
        return change(0o106_777);
    }
    as_user(33, 44, "set_ids_go_when_others_write", "other")
}

fn attributes(world: &mut World) -> Check {
    fs::write(world.lower().join("lower"), "x")?;
    let lower = world.lower().join("lower");
    for (name, value) in [
        ("user.kept", "k"),
        ("user.overlay.opaque", "y"),
        ("user.overlay.overlay.inner", "i"),
        ("user.containers.override_stat", "0:0:0644:file"),
    ] {
        rustix::fs::setxattr(&lower, name, value.as_bytes(), XattrFlags::empty())?;
    }
    world.mount().run()?;
    let upper = world.upper();
    same!(disk_xattr(&upper.join("d"), "user.overlay.overlay.opaque")?, "y");
    same!(disk_xattr(&upper.join("d"), "user.overlay.opaque")?, "");
    same!(disk_xattr(&upper.join("f"), RECORD)?, "");
    same!(disk_xattr(&upper.join("f"), "user.fsoverlay.esc.containers.override_stat")?, "0:0:0600:file");
    world.mount().arg("again").run()?;
    Ok(())
}

fn listed(path: &str) -> Result<Vec<String>, Failure> {
    let mut buf = vec![0; 4096];
    let n = rustix::fs::llistxattr(path, buf.as_mut_slice())?;
    let mut names: Vec<String> = buf[..n]
        .split(|&b| b == 0)
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .collect();
    names.sort();
    Ok(names)
}

fn value(path: &str, name: &str) -> Result<Vec<u8>, rustix::io::Errno> {
    let mut buf = vec![0; 4096];
    let n = rustix::fs::lgetxattr(path, name, buf.as_mut_slice())?;
    buf.truncate(n);
    Ok(buf)
}

/// A `struct vfs_cap_data` of revision 2 with CAP_NET_RAW.
fn capability() -> Vec<u8> {
    [0x0200_0001u32, 1 << 13, 0, 0, 0].iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn xattrs(args: &[String]) -> Check {
    if args.is_empty() {
        same!(listed("lower")?, ["user.kept", "user.overlay.inner"]);
        same!(value("lower", "user.overlay.inner")?, b"i");
        fs::write("f", "x")?;
        errno!(rustix::fs::setxattr("f", "user.x", b"1", XattrFlags::REPLACE), NODATA);
        rustix::fs::setxattr("f", "user.x", b"1", XattrFlags::CREATE)?;
        errno!(rustix::fs::setxattr("f", "user.x", b"2", XattrFlags::CREATE), EXIST);
        rustix::fs::setxattr("f", "user.x", b"2", XattrFlags::REPLACE)?;
        same!(value("f", "user.x")?, b"2");
        errno!(value("f", "user.none"), NODATA);
        fs::write("long", "")?;
        set("long", "user.long", &"v".repeat(3000))?;
        same!(value("long", "user.long")?.len(), 3000);
        errno!(rustix::fs::lgetxattr("long", "user.long", &mut [0u8; 8][..]), RANGE);
        fs::create_dir("d")?;
        set("d", "user.overlay.opaque", "y")?;
        set("d", "user.fsoverlay.origin", "0:0")?;
        set("f", "user.containers.override_stat", "0:0:0600:file")?;
        set("lower", "user.added", "a")?;
        rustix::fs::removexattr("lower", "user.kept")?;
        errno!(rustix::fs::removexattr("lower", "user.kept"), NODATA);
        // trusted.* is refused by the kernel; nothing of it may be stored.
        holds!(set("f", "trusted.x", "1").is_err());
        rustix::fs::setxattr("f", "security.capability", &capability(), XattrFlags::empty())?;
    } else {
        errno!(value("f", "security.capability"), NODATA);
    }
    same!(listed("d")?, ["user.fsoverlay.origin", "user.overlay.opaque"]);
    same!(listed("lower")?, ["user.added", "user.overlay.inner"]);
    same!(mode("f")?, 0o100_644);
    if args.is_empty() {
        holds!(value("f", "security.capability").is_ok());
        // A write takes it away.
        let mut file = OpenOptions::new().append(true).open("f")?;
        file.write_all(b"y")?;
        file.sync_all()?;
        errno!(value("f", "security.capability"), NODATA);
    }
    same!(listed("f")?, ["user.containers.override_stat", "user.x"]);
    Ok(())
}

fn acl_range(world: &mut World) -> Check {
    need_range()?;
    world.mount().flag("--range").run()?;
    world.mount().flag("--range").arg("again").run()?;
    Ok(())
}

/// The kernel's form of an ACL: (tag, permissions, id).
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, perm, id) in entries {
        bytes.extend_from_slice(&tag.to_le_bytes());
        bytes.extend_from_slice(&perm.to_le_bytes());
        bytes.extend_from_slice(&id.to_le_bytes());
    }
    bytes
}

const NONE: u32 = u32::MAX;
const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

fn acls(args: &[String]) -> Check {
    let name = "acls_are_kept_enforced_and_inherited";
    match args.first().map(String::as_str) {
        Some("as33") => {
            same!(fs::read_to_string("secret")?, "s");
            errno!(fs::write("secret", "x"), ACCESS);
            return Ok(());
        }
        Some("as34") => {
            errno!(fs::read("secret"), ACCESS);
            return Ok(());
        }
        Some("again") => {
            as_user(33, 33, name, "as33")?;
            return as_user(34, 34, name, "as34");
        }
        _ => {}
    }
    fs::write("secret", "s")?;
    let list = acl(&[(1, 6, NONE), (2, 4, 33), (4, 0, NONE), (0x10, 4, NONE), (0x20, 0, NONE)]);
    rustix::fs::setxattr("secret", ACCESS, &list, XattrFlags::empty())?;
    same!(value("secret", ACCESS)?, list);
    same!(mode("secret")?, 0o100_640);
    as_user(33, 33, name, "as33")?;
    as_user(34, 34, name, "as34")?;
    // chmod changes the mask.
    fs::set_permissions("secret", PermissionsExt::from_mode(0o600))?;
    as_user(33, 33, name, "as34")?;
    fs::set_permissions("secret", PermissionsExt::from_mode(0o640))?;
    as_user(33, 33, name, "as33")?;
    // An ACL that a mode can say is a mode.
    fs::write("plain", "")?;
    let minimal = acl(&[(1, 7, NONE), (4, 5, NONE), (0x20, 1, NONE)]);
    rustix::fs::setxattr("plain", ACCESS, &minimal, XattrFlags::empty())?;
    same!(mode("plain")?, 0o100_751);
    errno!(value("plain", ACCESS), NODATA);
    // Inherited, whatever the umask.
    fs::create_dir("d")?;
    let default = acl(&[(1, 7, NONE), (2, 6, 33), (4, 5, NONE), (0x10, 7, NONE), (0x20, 4, NONE)]);
    rustix::fs::setxattr("d", DEFAULT, &default, XattrFlags::empty())?;
    rustix::process::umask(Mode::from_raw_mode(0o077));
    fs::write("d/f", "")?;
    fs::create_dir("d/sub")?;
    same!(mode("d/f")?, 0o100_664);
    same!(mode("d/sub")?, 0o040_774);
    same!(value("d/sub", DEFAULT)?, default);
    let inherited = acl(&[(1, 6, NONE), (2, 6, 33), (4, 5, NONE), (0x10, 6, NONE), (0x20, 4, NONE)]);
    same!(value("d/f", ACCESS)?, inherited);
    rustix::fs::removexattr("d", DEFAULT)?;
    fs::write("d/g", "")?;
    same!(mode("d/g")?, 0o100_600);
    Ok(())
}

fn recorded_layer(world: &mut World) -> Check {
    need_range()?;
    for (name, record) in [
        ("owned", "33:44:04750:file"),
        ("console", "0:5:0620:char-5-1"),
        ("pipe", "1:2:0600:pipe"),
        ("junk", "not a record"),
    ] {
        fs::write(world.lower().join(name), "")?;
        rustix::fs::setxattr(world.lower().join(name), RECORD, record.as_bytes(), XattrFlags::empty())?;
    }
    fs::create_dir(world.lower().join("dir"))?;
    rustix::fs::setxattr(world.lower().join("dir"), RECORD, b"9:9:1777:dir", XattrFlags::empty())?;
    world.mount().flag("--range").run()?;
    same!(disk_xattr(&world.upper().join("owned"), RECORD)?, "33:44:04750:file");
    Ok(())
}

fn read_records(_: &[String]) -> Check {
    same!(owner("owned")?, (33, 44, 0o4750));
    same!(owner("dir")?, (9, 9, 0o1777));
    same!(owner("console")?, (0, 5, 0o620));
    holds!(fs::metadata("console")?.file_type().is_char_device());
    holds!(fs::metadata("pipe")?.file_type().is_fifo());
    same!(owner("junk")?, (0, 0, 0o644));
    fs::write("owned", "x")?;
    same!(owner("owned")?, (33, 44, 0o4750));
    rustix::fs::utimensat(
        CWD,
        "console",
        &rustix::fs::Timestamps {
            last_access: rustix::fs::Timespec { tv_sec: 1, tv_nsec: 0 },
            last_modification: rustix::fs::Timespec { tv_sec: 1, tv_nsec: 0 },
        },
        AtFlags::empty(),
    )?;
    holds!(fs::metadata("console")?.file_type().is_char_device());
    Ok(())
}
