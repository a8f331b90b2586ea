//! What is on disk: the kernel's format, both ways; diff; full disks; kill -9; hostile
//! uppers.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Stdio;

use fsoverlay::{ChangeKind, LayerSpec, OverlaySpec, Owners, UpperSpec};
use rustix::fs::{CWD, FileType, Mode, XattrFlags, mknodat};

use crate::harness::{Case, Check, Failure, World, errno, holds, no_kernel_overlay, nothing, same};
use crate::semantics::{make_tree, no_leftovers};

pub(crate) const CASES: &[Case] = &[
    Case { name: "the_kernel_reads_our_upper", outside: kernel_reads_ours, inside: change_and_dump },
    Case { name: "we_read_the_kernels_upper", outside: ours_reads_kernels, inside: change_and_dump },
    Case { name: "changes_are_listed", outside: list_changes, inside: make_changes },
    Case { name: "whether_anything_lasted", outside: anything_lasted, inside: touch_things },
    Case { name: "a_full_disk_loses_nothing", outside: full_disk, inside: fill },
    Case { name: "killed_servers_leave_whole_files", outside: kill_server, inside: keep_writing },
    Case { name: "hostile_uppers_are_harmless", outside: hostile_upper, inside: look_at_hostile },
    Case { name: "bad_directories_are_refused", outside: refused, inside: nothing },
];

/// Type and content of everything below a directory.
pub(crate) fn dump(dir: &Path, at: &Path, all: &mut BTreeMap<String, String>) -> Check {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let shown = at.join(path.file_name().ok_or("no name")?);
        let meta = path.symlink_metadata()?;
        let kind = if meta.is_dir() {
            dump(&path, &shown, all)?;
            "dir".to_owned()
        } else if meta.is_symlink() {
            format!("link {}", fs::read_link(&path)?.display())
        } else {
            format!("file {:?}", String::from_utf8_lossy(&fs::read(&path)?))
        };
        all.insert(shown.display().to_string(), kind);
    }
    Ok(())
}

fn change_and_dump(args: &[String]) -> Check {
    let [change, file] = args else { return Err("two arguments are wanted".into()) };
    if change == "change" {
        fs::write("file", "changed")?;
        fs::remove_file("dir/b")?;
        fs::remove_dir_all("dir/sub/deep")?;
        fs::create_dir("dir/sub/deep")?;
        fs::write("dir/sub/deep/only", "new")?;
        fs::remove_dir("empty")?;
        fs::write("empty", "a file")?;
        fs::remove_file("link")?;
        fs::create_dir("link")?;
        fs::write("added", "added")?;
        fs::create_dir("made")?;
        symlink("../file", "made/link")?;
        fs::rename("dir/a", "made/a")?;
    }
    if change == "change" && file.ends_with("ours") {
        // What the kernel cannot do here by itself.
        fs::rename("dir/sub", "made/sub")?;
        fs::create_dir("dir/sub")?;
        fs::write("dir/sub/x", "x")?;
    }
    let mut all = BTreeMap::new();
    dump(Path::new("."), Path::new("/"), &mut all)?;
    fs::write(file, format!("{all:#?}"))?;
    Ok(())
}

fn both_views(world: &World, first_kernel: bool) -> Check {
    make_tree(&world.lower())?;
    let ours = world.path("other/ours").display().to_string();
    let theirs = world.path("other/kernel").display().to_string();
    let kernel = |step: &str| world.mount().flag("--kernel").arg(step).arg(&theirs).run();
    let own = |step: &str| world.mount().arg(step).arg(&ours).run();
    let exported = || -> Result<bool, Failure> {
        own("change")?;
        // Some were renamed with what the layer has in them.
        holds!(fsoverlay::export(&spec(world))? == 1);
        kernel("look")
    };
    let could = if first_kernel { kernel("change") } else { exported() };
    match could {
        Err(failure) if no_kernel_overlay(&failure) => {
            return Err(Failure::Skip("the kernel does not mount an overlay here".to_owned()));
        }
        other => other.map(drop)?,
    }
    if first_kernel {
        own("look")?;
    }
    same!(fs::read_to_string(ours)?, fs::read_to_string(theirs)?);
    // The kernel leaves a directory without rights in the work directory.
    let _ = fs::set_permissions(world.path("work/work"), fs::Permissions::from_mode(0o700));
    Ok(())
}

fn kernel_reads_ours(world: &mut World) -> Check {
    both_views(world, false)
}

fn ours_reads_kernels(world: &mut World) -> Check {
    both_views(world, true)
}

fn make_changes(_: &[String]) -> Check {
    fs::write("file", "other")?;
    fs::set_permissions("dir/b", fs::Permissions::from_mode(0o600))?;
    // Opened for writing and left alone; written with what was there.
    drop(OpenOptions::new().write(true).open("dir/sub/c")?);
    let mtime = fs::metadata("dir/sub/c")?.modified()?;
    fs::write("dir/sub/c", "c")?;
    File::options().write(true).open("dir/sub/c")?.set_modified(mtime)?;
    fs::remove_file("link")?;
    fs::remove_dir_all("dir/sub/deep")?;
    fs::remove_dir("empty")?;
    fs::create_dir("empty")?;
    fs::write("empty/x", "")?;
    fs::create_dir("new")?;
    fs::write("new/y", "")?;
    fs::remove_file("dir/up")?;
    fs::write("dir/up", "a file now")?;
    fs::create_dir("opaque.new")?;
    fs::remove_dir_all("opaque")?;
    fs::rename("opaque.new", "opaque")?;
    fs::write("scratch", "")?;
    fs::remove_file("scratch")?;
    Ok(())
}

pub(crate) fn spec(world: &World) -> OverlaySpec {
    OverlaySpec {
        layers: vec![LayerSpec {
            dir: world.lower(),
            owners: Owners::Translated {
                uids: vec![fsoverlay::IdExtent {
                    inside: 0,
                    outside: nix::unistd::getuid().as_raw(),
                    count: 1,
                }],
                gids: vec![fsoverlay::IdExtent {
                    inside: 0,
                    outside: nix::unistd::getgid().as_raw(),
                    count: 1,
                }],
            },
            ..LayerSpec::default()
        }],
        upper: Some(UpperSpec { dir: world.upper(), work: world.path("work"), ..UpperSpec::default() }),
        squash: Some((0, 0)),
        ..OverlaySpec::default()
    }
}

fn list_changes(world: &mut World) -> Check {
    make_tree(&world.lower())?;
    fs::create_dir(world.lower().join("opaque"))?;
    fs::write(world.lower().join("opaque/old"), "")?;
    world.mount().run()?;
    use ChangeKind::{Added, Deleted, Metadata, Modified};
    let wanted = [
        ("/dir/b", Metadata),
        ("/dir/sub/deep", Deleted),
        ("/dir/up", Modified),
        ("/empty/x", Added),
        ("/file", Modified),
        ("/link", Deleted),
        ("/new", Added),
        ("/new/y", Added),
        ("/opaque/old", Deleted),
    ];
    let list = |changes: Vec<fsoverlay::Change>| -> Vec<(String, ChangeKind)> {
        changes.into_iter().map(|c| (c.path.display().to_string(), c.kind)).collect()
    };
    let wanted: Vec<_> = wanted.iter().map(|(path, kind)| ((*path).to_owned(), *kind)).collect();
    same!(list(fsoverlay::changes_of(&spec(world))?), wanted);
    same!(list(fsoverlay::changes(&world.upper(), &[world.lower()])?), wanted);
    Ok(())
}

fn touch_things(args: &[String]) -> Check {
    match args.first().map(String::as_str) {
        Some("read") => {
            fs::read("dir/sub/deep/d")?;
            errno!(fs::read("dir/none"), NOENT);
        }
        Some("temporary") => {
            fs::write("dir/sub/scratch", "x")?;
            fs::remove_file("dir/sub/scratch")?;
        }
        Some("mode") => fs::set_permissions("dir/sub", fs::Permissions::from_mode(0o711))?,
        Some("file") => fs::write("dir/sub/kept", "x")?,
        Some("delete") => fs::remove_file("file")?,
        Some("mkdir") => fs::create_dir("dir/made")?,
        other => return Err(format!("unknown step {other:?}").into()),
    }
    Ok(())
}

fn anything_lasted(world: &mut World) -> Check {
    make_tree(&world.lower())?;
    for (step, lasts) in [
        ("read", false),
        ("temporary", false),
        ("mode", true),
        ("file", true),
        ("delete", true),
        ("mkdir", true),
    ] {
        world.empty_upper()?;
        same!(world.mount().arg(step).run()?, lasts, "{step}");
    }
    Ok(())
}

fn full_disk(world: &mut World) -> Check {
    fs::write(world.lower().join("big"), vec![b'L'; 4 << 20])?;
    fs::create_dir_all(world.lower().join("d/sub"))?;
    fs::write(world.lower().join("d/sub/big"), vec![b'L'; 4 << 20])?;
    fs::write(world.lower().join("d/small"), "small")?;
    let small = world.path("other").display().to_string();
    // A small file system of one's own, in a namespace around both halves.
    let script = format!(
        "mount -t tmpfs -o size=1m,nr_inodes=500 tmpfs {small} && mkdir {small}/up {small}/wk && exec \"$@\""
    );
    let mount = world
        .bare()
        .with("--lower", world.lower())
        .with("--upper", format!("{small}/up"))
        .with("--work", format!("{small}/wk"))
        .under(&["unshare", "-Urm", "sh", "-c", &script, "sh"]);
    match mount.run() {
        Err(Failure::Wrong(text)) if text.contains("extended attributes for users") => {
            Err(Failure::Skip("tmpfs has no user xattrs here".to_owned()))
        }
        other => other.map(drop),
    }?;
    same!(fs::read(world.lower().join("big"))?, vec![b'L'; 4 << 20]);
    Ok(())
}

fn fill(_: &[String]) -> Check {
    let unchanged = || -> Check {
        holds!(fs::read("big")? == vec![b'L'; 4 << 20]);
        holds!(fs::read("d/sub/big")? == vec![b'L'; 4 << 20]);
        Ok(())
    };
    // A copy-up that does not fit. The page in the kernel's cache is the writer's; what
    // he is told is the error.
    errno!(fs::set_permissions("big", fs::Permissions::from_mode(0o600)), NOSPC);
    errno!(fs::rename("big", "moved"), NOSPC);
    errno!(fs::hard_link("big", "link"), NOSPC);
    // What nothing is copied for goes on.
    fs::rename("d", "moved")?;
    fs::rename("moved", "d")?;
    unchanged()?;
    same!(fs::read_to_string("d/small")?, "small");
    // A file that grows until it is full.
    let full = File::create("new")?;
    let mut failed = None;
    for i in 0..64 {
        let result = full.write_all_at(&[b'N'; 65536], i * 65536).and_then(|()| full.sync_all());
        if let Err(err) = result {
            failed = crate::harness::errno_of(&err);
            break;
        }
    }
    same!(failed, Some(rustix::io::Errno::NOSPC));
    // Deleting works on a full disk, and makes room.
    drop(full);
    fs::remove_file("new")?;
    fs::write("new", vec![b'n'; 300 << 10])?;
    same!(fs::read("new")?.len(), 300 << 10);
    fs::write("d/small", "changed")?;
    fs::remove_file("new")?;
    // No more inodes.
    let mut count = 0;
    let refused = loop {
        match mknodat(CWD, format!("d/n{count}"), FileType::RegularFile, Mode::from_raw_mode(0o600), 0) {
            Ok(()) => count += 1,
            Err(err) => break err,
        }
    };
    same!(refused, rustix::io::Errno::NOSPC);
    for i in 0..count {
        fs::remove_file(format!("d/n{i}"))?;
    }
    unchanged()?;
    fs::rename("d/small", "d/other")?;
    same!(fs::read_to_string("d/other")?, "changed");
    Ok(())
}

const FILES: usize = 40;

fn content(tag: char, i: usize) -> Vec<u8> {
    format!("{tag}{i};").into_bytes().repeat(20_000)
}

fn keep_writing(args: &[String]) -> Check {
    if args.first().map(String::as_str) == Some("check") {
        for i in 0..FILES {
            let data = fs::read(format!("d{}/f{i}", i % 4))?;
            // Whole: as it was below, or as it was renamed into place.
            holds!(data == content('L', i) || data == content('U', i), "file {i} has {} bytes", data.len());
            let meta = fs::metadata(format!("d{}/f{i}", i % 4))?;
            same!(meta.nlink(), 1);
        }
        for d in 0..4 {
            for entry in fs::read_dir(format!("d{d}"))? {
                let name = entry?.file_name().to_string_lossy().into_owned();
                holds!(name.starts_with('f') || name.starts_with("tmp"), "{name}");
            }
        }
        return Ok(());
    }
    let mut round = 0u32;
    loop {
        for i in 0..FILES {
            let name = format!("d{}/f{i}", i % 4);
            let temp = format!("d{}/tmp{i}", i % 4);
            if round.is_multiple_of(2) {
                // Copy-up without a change of content.
                fs::set_permissions(&name, fs::Permissions::from_mode(0o600 + round % 64))?;
            }
            fs::write(&temp, content('U', i))?;
            fs::rename(&temp, &name)?;
            writeln!(std::io::stdout(), "{i}")?;
        }
        round += 1;
    }
}

fn kill_server(world: &mut World) -> Check {
    for i in 0..FILES {
        let dir = world.lower().join(format!("d{}", i % 4));
        fs::create_dir_all(&dir)?;
        fs::write(dir.join(format!("f{i}")), content('L', i))?;
    }
    for lines in [1, 7, 23, 39, 55] {
        world.empty_upper()?;
        let mut server =
            world.mount().command_under(&[])?.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let progress = BufReader::new(server.stdout.take().ok_or("no output")?);
        let seen = progress.lines().take(lines).count();
        server.kill()?;
        server.wait()?;
        same!(seen, lines);
        world.mount().arg("check").run()?;
    }
    Ok(())
}

fn hostile_upper(world: &mut World) -> Check {
    let upper = world.upper();
    fs::write(world.lower().join("covered"), "lower")?;
    mknodat(CWD, upper.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o666), 0)?;
    mknodat(CWD, upper.join("covered"), FileType::Fifo, Mode::from_raw_mode(0o666), 0)?;
    symlink("/etc/passwd", upper.join("passwd"))?;
    symlink(world.path("other"), upper.join("out"))?;
    fs::write(world.path("other/canary"), "canary")?;
    fs::create_dir(upper.join("dir"))?;
    let mark = |path: &str, name: &str, value: &[u8]| {
        rustix::fs::setxattr(upper.join(path), name, value, XattrFlags::empty())
    };
    fs::write(upper.join("lies"), "content")?;
    mark("lies", "user.containers.override_stat", b"0:0:0755:dir")?;
    mark("lies", "user.fsoverlay.origin", b"fs=:1")?;
    mark("dir", "user.containers.override_stat", b"0:0:0755:char-1-3")?;
    mark("dir", "user.overlay.redirect", b"/../../../../../../etc")?;
    fs::write(upper.join("twin"), "one")?;
    fs::write(upper.join("twin2"), "two")?;
    mark("twin", "user.fsoverlay.origin", b"fs=i1:2a")?;
    mark("twin2", "user.fsoverlay.origin", b"fs=i1:2a")?;
    fs::write(upper.join("huge"), "x")?;
    mark("huge", "user.containers.override_stat", &[b'9'; 900])?;
    world.mount().run()?;
    same!(fs::read_to_string(world.path("other/canary"))?, "canary");
    Ok(())
}

fn look_at_hostile(_: &[String]) -> Check {
    let mode = |path: &str| fs::symlink_metadata(path).map(|m| m.mode() & 0o170_000);
    same!(mode("fifo")?, 0o010_000);
    same!(mode("covered")?, 0o010_000);
    same!(mode("lies")?, 0o100_000);
    same!(fs::read_to_string("lies")?, "content");
    same!(mode("dir")?, 0o040_000);
    same!(fs::read_dir("dir")?.count(), 0);
    // Two files that claim one number are two files.
    same!(fs::read_to_string("twin")?, "one");
    same!(fs::read_to_string("twin2")?, "two");
    holds!(fs::metadata("twin")?.ino() != fs::metadata("twin2")?.ino());
    same!(fs::read_to_string("huge")?, "x");
    // A link is resolved by the kernel, in the payload's own view, never by the server.
    same!(fs::read_link("passwd")?, Path::new("/etc/passwd"));
    rustix::fs::chownat(CWD, "passwd", None, None, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?;
    fs::rename("out", "out2")?;
    fs::remove_file("out2")?;
    fs::remove_file("fifo")?;
    fs::rename("covered", "uncovered")?;
    fs::set_permissions("uncovered", fs::Permissions::from_mode(0o600))?;
    fs::remove_dir("dir")?;
    Ok(())
}

fn refused(world: &mut World) -> Check {
    let open = |spec: &OverlaySpec| fsoverlay::Overlay::open(spec).map(drop).map_err(|err| err.to_string());
    let good = spec(world);
    same!(open(&good), Ok(()));
    let mut bad = good.clone();
    bad.layers[0].dir = world.path("missing");
    holds!(open(&bad).is_err_and(|text| text.contains("missing")));
    fs::write(world.path("other/file"), "")?;
    bad.layers[0].dir = world.path("other/file");
    holds!(open(&bad).is_err_and(|text| text.contains("other/file")));
    let mut bad = good.clone();
    bad.layers.clear();
    bad.upper = None;
    holds!(open(&bad).is_err());
    let mut bad = good.clone();
    if let Some(upper) = &mut bad.upper {
        upper.work = "/proc".into();
    }
    holds!(open(&bad).is_err_and(|text| text.contains("/proc")));
    no_leftovers(world)
}
