//! FUSE passthrough. Who may not have it is refused; that is all that these cases look at then.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::{Uid, setfsuid};

use crate::harness::{Case, Check, Failure, World, errno, holds, same};

pub(crate) const CASES: &[Case] = &[
    Case { name: "what_is_passed_through_costs_no_request", outside: counted, inside: read_and_write },
    Case { name: "a_layers_file_that_is_open_stays_one_file", outside: layered, inside: copy_up_while_open },
    Case { name: "a_thousand_files_are_passed_through", outside: thousand, inside: open_thousand },
    Case { name: "a_listing_does_not_say_that_times_are_known", outside: listed, inside: list_while_mapped },
    Case { name: "privileges_go_with_writes_that_pass_us", outside: owned, inside: write_as_others },
];

const SIZE: usize = 3 << 20;

/// Whether this process has CAP_SYS_ADMIN in the initial user namespace.
fn is_allowed() -> Result<bool, Failure> {
    let map = fs::read_to_string("/proc/self/uid_map")?;
    let status = fs::read_to_string("/proc/self/status")?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap_or("0").trim();
    let has_admin = u64::from_str_radix(effective, 16)? >> 21 & 1 == 1;
    Ok(has_admin && map.split_whitespace().eq(["0", "0", "4294967295"]))
}

/// Runs the inner half on a mount that passes through; gives what was counted. `None`: it was refused, rightly.
fn run(world: &World, options: &[&str]) -> Result<Option<String>, Failure> {
    let mut mount = world.mount().flag("--passthrough");
    if rustix::fs::statfs(world.upper())?.f_type == libc::TMPFS_MAGIC {
        mount = mount.arg("tmpfs");
    }
    for option in options {
        mount = mount.flag(option);
    }
    let output = mount.output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    if text.contains("does not offer it") {
        return Err(Failure::Skip("this kernel has no FUSE passthrough".to_owned()));
    }
    if !is_allowed()? {
        holds!(!output.status.success());
        if text.contains("no subordinate ids") {
            return Ok(None);
        }
        holds!(text.contains("Passthrough") && text.contains("PermissionDenied"), "{text}");
        return Ok(None);
    }
    holds!(output.status.success(), "{text}");
    Ok(Some(text))
}

fn counted(world: &mut World) -> Check {
    fs::write(world.lower().join("log"), "from below\n")?;
    let Some(counts) = run(world, &[])? else { return Ok(()) };
    holds!(counts.contains(" reads: 0,") && counts.contains(" writes: 0,"), "{counts}");
    same!(fs::read_to_string(world.upper().join("log"))?, "from below\nappended\n");
    same!(fs::read_to_string(world.lower().join("log"))?, "from below\n");
    let stored = fs::read(world.upper().join("moved"))?;
    same!((stored.len(), stored[0], stored[SIZE - 1]), (SIZE, b'm', 7));
    holds!(!world.upper().join("gone").exists());
    Ok(())
}

/// Looks at a file through a mapping, and puts a byte at its start if there is one; `before` that it does what
/// makes the kernel ask for the attributes.
fn map_after<T>(
    file: &File,
    put: Option<u8>,
    before: impl FnOnce() -> Check,
    look: impl FnOnce(&[u8]) -> T,
) -> Result<T, Failure> {
    let length = usize::try_from(file.metadata()?.len())?;
    let writing = if put.is_some() { ProtFlags::PROT_WRITE } else { ProtFlags::empty() };
    let flags = ProtFlags::PROT_READ | writing;
    #[expect(unsafe_code, reason = "mappings are what is tested")]
    // SAFETY: nobody else has the mapping, which is looked at within the file's length, and not after it is gone;
    // it is written to only before the slice is made.
    unsafe {
        let at = mmap(None, length.try_into()?, flags, MapFlags::MAP_SHARED, file, 0)?;
        if let Some(byte) = put {
            before()?;
            *at.as_ptr().cast::<u8>() = byte;
        }
        let seen = look(std::slice::from_raw_parts(at.as_ptr().cast(), length));
        munmap(at, length)?;
        Ok(seen)
    }
}

/// The same where mapping it makes the kernel ask for the attributes. What comes after that nobody sees.
fn map<T>(file: &File, put: Option<u8>, look: impl FnOnce(&[u8]) -> T) -> Result<T, Failure> {
    map_after(file, put, || Ok(file.metadata().map(drop)?), look)
}

fn read_and_write(args: &[String]) -> Check {
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).open("new")?;
    file.write_all(&vec![7; SIZE])?;
    same!(file.metadata()?.len(), SIZE as u64);
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    holds!(bytes == vec![7; SIZE]);
    // What is written through a mapping changes the time, too (not on tmpfs), though nobody tells the server.
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
    file.set_modified(long_ago)?;
    same!(file.metadata()?.modified()?, long_ago);
    same!(map(&file, Some(b'm'), |bytes| (bytes[0], bytes[1]))?, (b'm', 7));
    holds!(!args.is_empty() || file.metadata()?.modified()? > long_ago);
    drop(file);
    // Renamed while it is open, by another descriptor.
    let file = File::open("new")?;
    let inode = file.metadata()?.ino();
    fs::rename("new", "moved")?;
    same!((File::open("moved")?.metadata()?.ino(), fs::metadata("moved")?.len()), (inode, SIZE as u64));
    same!(map(&file, None, |bytes| bytes.iter().filter(|&&byte| byte == 7).count())?, SIZE - 1);
    // Removed while it is open.
    let mut gone = OpenOptions::new().read(true).write(true).create_new(true).open("gone")?;
    gone.write_all(b"one")?;
    fs::remove_file("gone")?;
    gone.write_all(b"two")?;
    let mut bytes = [0; 6];
    gone.read_exact_at(&mut bytes, 0)?;
    same!((bytes, gone.metadata()?.len(), gone.metadata()?.nlink()), (*b"onetwo", 6, 0));
    // Of a layer: copied up when it is opened.
    OpenOptions::new().append(true).open("log")?.write_all(b"appended\n")?;
    same!(fs::read_to_string("log")?, "from below\nappended\n");
    let log = OpenOptions::new().write(true).open("log")?;
    log.set_len(4)?;
    same!(fs::read_to_string("log")?, "from");
    log.set_len(0)?;
    log.write_all_at(b"from below\nappended\n", 0)?;
    log.sync_all()?;
    Ok(())
}

fn layered(world: &mut World) -> Check {
    fs::write(world.lower().join("file"), "from below")?;
    if run(world, &[])?.is_none() {
        return Ok(());
    }
    same!(fs::read_to_string(world.upper().join("file"))?, "From Below again");
    same!(fs::read_to_string(world.lower().join("file"))?, "from below");
    Ok(())
}

fn copy_up_while_open(_: &[String]) -> Check {
    let reader = File::open("file")?;
    let text = |file: &File| -> Result<String, Failure> {
        let mut bytes = vec![0; usize::try_from(file.metadata()?.len())?];
        file.read_exact_at(&mut bytes, 0)?;
        Ok(String::from_utf8(bytes)?)
    };
    same!(text(&reader)?, "from below");
    let writer = OpenOptions::new().write(true).read(true).open("file")?;
    writer.write_all_at(b"From B", 0)?;
    same!((text(&reader)?, text(&writer)?), ("From Below".to_owned(), "From Below".to_owned()));
    same!(map(&reader, None, <[u8]>::to_vec)?, b"From Below");
    let late = File::open("file")?;
    same!(text(&late)?, "From Below");
    drop((writer, reader));
    // As long as one of them is left it is not passed through, and then it is.
    let mut writer = OpenOptions::new().append(true).open("file")?;
    writer.write_all(b" ag")?;
    same!(text(&late)?, "From Below ag");
    drop((writer, late));
    let mut writer = OpenOptions::new().append(true).open("file")?;
    writer.write_all(b"ain")?;
    same!(text(&File::open("file")?)?, "From Below again");
    Ok(())
}

fn thousand(world: &mut World) -> Check {
    for i in 0..500 {
        fs::write(world.lower().join(format!("below{i}")), "0")?;
    }
    // The files are the kernel's: the server needs no descriptor for each.
    run(world, &["--nofile", "100"]).map(drop)
}

fn open_thousand(_: &[String]) -> Check {
    let mut files = Vec::new();
    for i in 0..1000 {
        let name = if i % 2 == 0 { format!("below{}", i / 2) } else { format!("new{i}") };
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(name)?;
        file.write_all_at(i.to_string().as_bytes(), 0)?;
        files.push(file);
    }
    for (i, file) in files.iter().enumerate() {
        let mut bytes = vec![0; i.to_string().len()];
        file.read_exact_at(&mut bytes, 0)?;
        same!(String::from_utf8(bytes)?, i.to_string());
    }
    Ok(())
}

fn listed(world: &mut World) -> Check {
    run(world, &[]).map(drop)
}

fn list_while_mapped(args: &[String]) -> Check {
    if !args.is_empty() {
        // Writing through a mapping leaves the times on a tmpfs.
        return Ok(());
    }
    fs::create_dir("dir")?;
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).open("dir/file")?;
    file.write_all(b"bytes")?;
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
    file.set_modified(long_ago)?;
    // The first listing of a directory is one with attributes.
    let list = || {
        same!(fs::read_dir("dir")?.count(), 1);
        Ok(())
    };
    same!(map_after(&file, Some(b'B'), list, <[u8]>::to_vec)?, b"Bytes");
    holds!(fs::metadata("dir/file")?.modified()? > long_ago);
    Ok(())
}

fn owned(world: &mut World) -> Check {
    run(world, &["--range"]).map(drop)
}

/// As another user of files; afterwards as root again.
fn as_other<T>(work: impl FnOnce() -> T) -> T {
    setfsuid(Uid::from_raw(1000));
    let done = work();
    setfsuid(Uid::from_raw(0));
    done
}

fn write_as_others(_: &[String]) -> Check {
    let mode = |name: &str| fs::metadata(name).map(|found| found.mode() & 0o7777);
    let set = |name: &str, mode| fs::set_permissions(name, PermissionsExt::from_mode(mode));
    fs::set_permissions(".", PermissionsExt::from_mode(0o777))?;
    let make =
        |name: &Path| OpenOptions::new().read(true).write(true).create_new(true).mode(0o666).open(name);
    // Their own.
    let mine = as_other(|| make("mine".as_ref()))?;
    fs::set_permissions("mine", PermissionsExt::from_mode(0o4777))?;
    as_other(|| mine.write_all_at(b"x", 0))?;
    same!(mode("mine")?, 0o777);
    // One that has the bit when it is opened.
    set("mine", 0o4777)?;
    drop(mine);
    let mine = as_other(|| OpenOptions::new().write(true).open("mine"))?;
    as_other(|| mine.write_all_at(b"y", 0))?;
    same!(mode("mine")?, 0o777);
    // Root's keep it.
    let file = make("roots".as_ref())?;
    set("roots", 0o4777)?;
    file.write_all_at(b"x", 0)?;
    same!(mode("roots")?, 0o4777);
    drop(file);
    // Passed through for root, and so for them: the bit must wait until they are done.
    let file = make("both".as_ref())?;
    set("both", 0o666)?;
    let theirs = as_other(|| OpenOptions::new().write(true).open("both"))?;
    errno!(set("both", 0o4777), TXTBSY);
    as_other(|| theirs.write_all_at(b"x", 0))?;
    drop(theirs);
    drop(file);
    // The other way round: it has the bit, and somebody reads it, before they open it.
    set("both", 0o4777)?;
    let reader = File::open("both")?;
    let theirs = as_other(|| OpenOptions::new().write(true).open("both"))?;
    as_other(|| theirs.write_all_at(b"x", 0))?;
    same!(mode("both")?, 0o777);
    drop((theirs, reader));
    // It is passed through when it is given the bit: they must wait until the others are done.
    let reader = as_other(|| File::open("both"))?;
    set("both", 0o4777)?;
    errno!(as_other(|| OpenOptions::new().write(true).open("both")), TXTBSY);
    same!(mode("both")?, 0o4777);
    OpenOptions::new().write(true).open("both")?.write_all_at(b"y", 0)?;
    same!(mode("both")?, 0o4777);
    drop(reader);
    let theirs = as_other(|| OpenOptions::new().write(true).open("both"))?;
    as_other(|| theirs.write_all_at(b"z", 0))?;
    same!((mode("both")?, fs::read_to_string("both")?), (0o777, "z".to_owned()));
    Ok(())
}
