//! Layers as they are found: changed by others, of several kinds.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::harness::{Case, Check, Failure, Mount, World, errno, errno_of, holds, same};
use crate::limits::Stopped;
use crate::semantics::no_leftovers;

pub(crate) const CASES: &[Case] = &[
    Case { name: "changes_of_a_live_layer_show", outside: live_layer, inside: change_layer },
    Case { name: "marks_of_a_plain_branch_hide_nothing", outside: branches, inside: look_at_branches },
    Case { name: "a_dead_mount_below_holds_up_nobody_else", outside: dead_mount, inside: beside_dead },
    Case { name: "what_nobody_touches_costs_nothing", outside: large_layer, inside: crate::harness::nothing },
    Case { name: "a_remote_mount_below_is_shown", outside: remote_mount, inside: use_remote },
    Case { name: "no_seek_waits_for_a_silent_remote_mount", outside: silent_mount, inside: seek_in_silent },
];

fn live_layer(world: &mut World) -> Check {
    let lower = world.lower();
    for dir in ["dir/sub", "replaced", "kind", "merged", "emptied"] {
        fs::create_dir_all(lower.join(dir))?;
    }
    for file in ["file", "grows", "gone", "dir/sub/deep", "replaced/old", "merged/old", "upper", "emptied/x"]
    {
        fs::write(lower.join(file), format!("old {file}"))?;
    }
    symlink("old", lower.join("link"))?;
    world.mount().with("--live", "100").arg(lower.display().to_string()).run()?;
    no_leftovers(world)
}

/// Waits until something is so.
fn becomes<T: PartialEq + std::fmt::Debug>(what: &str, wanted: T, look: impl Fn() -> T) -> Check {
    let start = Instant::now();
    loop {
        let found = look();
        if found == wanted {
            return Ok(());
        }
        if start.elapsed() > Duration::from_secs(30) {
            return Err(Failure::Wrong(format!("{what}: still {found:?}, not {wanted:?}")));
        }
        std::thread::yield_now();
    }
}

fn names(dir: &str) -> Option<Vec<String>> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .ok()?
        .map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .collect::<Option<_>>()?;
    names.sort();
    Some(names)
}

fn change_layer(args: &[String]) -> Check {
    let [lower] = args else { return Err("the layer is wanted".into()) };
    let lower = Path::new(lower);
    let text = |path: &str| fs::read_to_string(path).ok();
    let is = |path: &'static str, wanted: &str| becomes(path, Some(wanted.to_owned()), || text(path));

    // All of it known before.
    for path in ["file", "grows", "gone", "dir/sub/deep", "replaced/old", "merged/old", "upper", "emptied/x"]
    {
        same!(text(path), Some(format!("old {path}")));
    }
    same!(fs::read_link("link")?, Path::new("old"));
    same!((text("new"), text("merged/new"), names("kind")), (None, None, Some(vec![])));
    same!(names("merged"), Some(vec!["old".to_owned()]));
    fs::write("upper", "ours")?;
    fs::write("merged/ours", "ours")?;
    fs::create_dir("later")?;
    fs::write("later/ours", "ours")?;
    let open = File::open("grows")?;
    same!(open.metadata()?.len(), 9);

    // In place, also seen by those who have it open.
    fs::write(lower.join("file"), "changed, and longer")?;
    is("file", "changed, and longer")?;
    fs::write(lower.join("file"), "short")?;
    is("file", "short")?;
    OpenOptions::new().append(true).open(lower.join("grows"))?.write_all(b" and more")?;
    becomes("size", 18, || open.metadata().map_or(0, |meta| meta.len()))?;
    same!(std::io::read_to_string(&open)?, "old grows and more");
    fs::set_permissions(lower.join("grows"), fs::Permissions::from_mode(0o600))?;
    becomes("mode of an open file", 0o600, || open.metadata().map_or(0, |meta| meta.mode() & 0o777))?;

    // Replaced, gone, new.
    fs::write(lower.join("temp"), "another file")?;
    fs::rename(lower.join("temp"), lower.join("file"))?;
    is("file", "another file")?;
    fs::remove_file(lower.join("link"))?;
    symlink("changed", lower.join("link"))?;
    becomes("link", Some("changed".into()), || fs::read_link("link").ok())?;
    fs::remove_file(lower.join("gone"))?;
    becomes("gone", false, || Path::new("gone").exists())?;
    fs::write(lower.join("new"), "new")?;
    is("new", "new")?;
    fs::remove_dir(lower.join("kind"))?;
    fs::write(lower.join("kind"), "a file now")?;
    is("kind", "a file now")?;

    // Directories: deep in one, instead of one, and below one of the upper.
    fs::write(lower.join("dir/sub/added"), "added")?;
    becomes("dir/sub", Some(vec!["added".to_owned(), "deep".to_owned()]), || names("dir/sub"))?;
    fs::set_permissions(lower.join("dir"), fs::Permissions::from_mode(0o711))?;
    becomes("mode", 0o711, || fs::metadata("dir").map_or(0, |meta| meta.mode() & 0o777))?;
    fs::remove_dir_all(lower.join("replaced"))?;
    fs::create_dir(lower.join("replaced"))?;
    fs::write(lower.join("replaced/new"), "new")?;
    becomes("replaced", Some(vec!["new".to_owned()]), || names("replaced"))?;
    is("replaced/new", "new")?;
    errno!(fs::read("replaced/old"), NOENT);
    fs::rename(lower.join("merged"), lower.join("merged.old"))?;
    fs::create_dir(lower.join("merged"))?;
    fs::rename(lower.join("merged.old/old"), lower.join("merged/old"))?;
    fs::write(lower.join("merged/new"), "new")?;
    becomes("merged", Some(vec!["new".into(), "old".into(), "ours".into()]), || names("merged"))?;
    is("merged/new", "new")?;
    fs::write("merged/old", "changed")?;
    same!((text("merged/old"), text("merged/ours")), (Some("changed".into()), Some("ours".into())));
    fs::create_dir(lower.join("later"))?;
    fs::write(lower.join("later/theirs"), "theirs")?;
    becomes("later", Some(vec!["ours".to_owned(), "theirs".to_owned()]), || names("later"))?;
    fs::remove_file(lower.join("emptied/x"))?;
    becomes("rmdir", true, || fs::remove_dir("emptied").is_ok())?;

    // What is ours stays ours.
    fs::write(lower.join("upper"), "theirs")?;
    is("new", "new")?;
    same!(text("upper"), Some("ours".to_owned()));
    holds!(names("merged").is_some_and(|names| names.contains(&"ours".to_owned())));
    Ok(())
}

fn large_layer(world: &mut World) -> Check {
    for i in 0..2000 {
        let dir = world.lower().join(format!("dir{i}"));
        fs::create_dir(&dir)?;
        fs::write(dir.join("file"), "")?;
    }
    let calls = world.path("calls");
    let path = calls.display().to_string();
    if std::process::Command::new("strace").arg("-V").stdout(std::process::Stdio::null()).status().is_err() {
        return Err(Failure::Skip("there is no strace".to_owned()));
    }
    let strace = ["strace", "-f", "-qq", "-y", "-s", "512", "-e", "trace=%file,%desc", "-o", &path];
    let output = world.mount().command_under(&strace)?.output()?;
    holds!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lower = world.lower().display().to_string();
    let calls = fs::read_to_string(calls)?;
    let on_layer: Vec<&str> =
        calls.lines().filter(|line| line.contains(&lower) && !line.contains("execve")).collect();
    holds!(!on_layer.is_empty() && on_layer.len() < 20, "{on_layer:#?}");
    holds!(!on_layer.iter().any(|line| line.contains("getdents")), "{on_layer:#?}");
    Ok(())
}

fn branches(world: &mut World) -> Check {
    for dir in ["opaque", "moved", "merged"] {
        fs::create_dir(world.lower().join(dir))?;
        fs::write(world.lower().join(dir).join("below"), "below")?;
    }
    fs::write(world.lower().join("gone"), "below")?;
    let top = world.path("lower2");
    // An upper becomes a layer.
    let upper = world.bare().with("--lower", world.lower()).with("--upper", &top);
    upper.with("--work", world.path("work")).arg("make").run()?;
    for (option, shown) in [("--lower", "hidden"), ("--plain-lower", "shown")] {
        world.bare().with("--lower", world.lower()).with(option, &top).arg(shown).run()?;
        // The same below an upper, whose own marks count in any case.
        let mount = world.bare().with("--lower", world.lower()).with(option, &top).upper(world);
        mount.arg(shown).arg("change").run()?;
        world.empty_upper()?;
    }
    Ok(())
}

fn look_at_branches(args: &[String]) -> Check {
    if args == ["make"] {
        fs::remove_file("gone")?;
        fs::remove_dir_all("opaque")?;
        fs::create_dir("opaque")?;
        fs::write("opaque/above", "above")?;
        fs::rename("moved", "to")?;
        fs::write("merged/above", "above")?;
        return Ok(());
    }
    let shown = args.first().is_some_and(|arg| arg == "shown");
    let all = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
    same!(names("merged"), all(&["above", "below"]));
    same!(Path::new("gone").exists(), shown);
    same!(fs::read("opaque/below").is_ok(), shown);
    if shown {
        same!(names("."), all(&["gone", "merged", "moved", "opaque", "to"]));
        same!(names("opaque"), all(&["above", "below"]));
        same!((names("moved"), names("to")), (all(&["below"]), all(&[])));
    } else {
        same!(names("."), all(&["merged", "opaque", "to"]));
        same!(names("opaque"), all(&["above"]));
        same!(names("to"), all(&["below"]));
    }
    if args.len() > 1 {
        fs::remove_dir_all("opaque")?;
        fs::remove_file("merged/above")?;
        same!((names("merged"), names("opaque")), (all(&["below"]), None));
        fs::create_dir("opaque")?;
        same!(names("opaque"), all(&[]));
    }
    Ok(())
}

/// The program and its arguments under a command that first makes mounts, in namespaces of its own.
fn below_mounts(world: &World) -> Result<Mount, Failure> {
    let me = std::env::current_exe()?.display().to_string();
    let dir = world.dir.display().to_string();
    let wrapper = ["unshare", "-Urm", &me, "--inside", world.name, "wrap", &dir];
    Ok(world.mount().with("--patience", "2000").under(&wrapper))
}

fn dead_mount(world: &mut World) -> Check {
    for dir in ["dead", "proc", "dir"] {
        fs::create_dir(world.lower().join(dir))?;
    }
    fs::write(world.lower().join("dir/file"), "content")?;
    fs::write(world.lower().join("dead/covered"), "not to be seen")?;
    below_mounts(world)?.run()?;
    no_leftovers(world)
}

/// Mounts a FUSE file system whose server does not even say hello, and what the kernel makes up.
fn mount_dead(dir: &Path, rest: &[String]) -> Check {
    let fuse = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
    // Goes on to the server of the overlay, who knows nothing of it.
    rustix::io::fcntl_setfd(&fuse, rustix::io::FdFlags::empty())?;
    let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", fuse.as_raw_fd());
    let none = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("dead"), &dir.join("lower/dead"), Some("fuse"), none, Some(data.as_str()))?;
    let bind = nix::mount::MsFlags::MS_BIND | nix::mount::MsFlags::MS_REC;
    nix::mount::mount(Some("/proc"), &dir.join("lower/proc"), None::<&str>, bind, None::<&str>)?;
    go_on(rest)
}

fn go_on(rest: &[String]) -> Check {
    let (program, args) = rest.split_first().ok_or("no program")?;
    Err(std::process::Command::new(program).args(args).exec().into())
}

fn beside_dead(args: &[String]) -> Check {
    if let [wrap, dir, rest @ ..] = args
        && wrap == "wrap"
    {
        return mount_dead(Path::new(dir), rest);
    }
    // More than there are workers, and threads for it.
    let dead = |i: usize| -> std::io::Result<()> {
        match i % 5 {
            0 => fs::metadata("dead").map(drop),
            1 => fs::metadata("dead/file").map(drop),
            2 => fs::read_dir("dead")?.next().transpose().map(drop),
            3 => fs::write("dead/new", "new"),
            _ => fs::create_dir("dead/newer"),
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..40).map(|i| scope.spawn(move || dead(i))).collect();
        // Where the mount is, and elsewhere: nobody would ever answer a worker that asked it, too.
        for i in 0..50 {
            same!(names("."), Some(vec!["dead".to_owned(), "dir".into(), "proc".into()]));
            same!(fs::read("dir/file")?, b"content");
            fs::write("made", "made")?;
            fs::rename("made", "dir/made")?;
            fs::rename("dir", format!("dir{i}"))?;
            fs::rename(format!("dir{i}"), "dir")?;
            fs::remove_file("dir/made")?;
        }
        for thread in threads {
            match thread.join().map_err(|_| "a thread panicked")? {
                // An entry that cannot be read is one, too.
                Ok(()) => {}
                Err(err) => same!(errno_of(&err), Some(rustix::io::Errno::IO)),
            }
        }
        Ok::<_, Failure>(())
    })?;
    errno!(fs::metadata("dead/file"), IO);
    errno!(fs::remove_dir("dead"), BUSY);
    errno!(fs::rename("dead", "alive"), BUSY);
    same!(names("proc"), Some(vec![]));
    // A signal ends who waits for it.
    let mut waiting = std::process::Command::new("cat").arg("dead/x").spawn()?;
    waiting.kill()?;
    waiting.wait()?;
    Ok(())
}

fn remote_mount(world: &mut World) -> Check {
    let far = world.path("lower2");
    fs::create_dir_all(far.join("dir/sub"))?;
    for file in ["file", "changed", "gone", "dir/deep"] {
        fs::write(far.join(file), format!("content of {file}"))?;
    }
    symlink("file", far.join("link"))?;
    fs::create_dir(world.lower().join("far"))?;
    for part in ["upper", "work"] {
        fs::create_dir(world.path("other").join(part))?;
    }
    below_mounts(world)?.run()?;
    same!(fs::read(world.upper().join("far/changed"))?, b"Content of changed");
    Ok(())
}

/// Mounts one of ours below, with its root where the layer has an empty directory, and has the inner half of the case
/// go on in it.
fn mount_remote(case: &str, dir: &Path, rest: &[String]) -> Check {
    let status = crate::harness::mount_program()?
        .arg("--lower")
        .arg(dir.join("lower2"))
        .arg("--at")
        .arg(dir.join("lower/far"))
        .arg("--")
        .arg(std::env::current_exe()?)
        .args(["--inside", case, "go on"])
        .args(rest)
        .stdin(std::process::Stdio::null())
        .status()?;
    holds!(status.success());
    Ok(())
}

fn silent_mount(world: &mut World) -> Check {
    for file in ["read", "written"] {
        fs::write(world.path("lower2").join(file), "content")?;
    }
    fs::create_dir(world.lower().join("far"))?;
    below_mounts(world)?.run()?;
    no_leftovers(world)
}

/// Seeks while the server of the mount below stands still.
fn seek_in_silent(args: &[String]) -> Check {
    let server = match args {
        [wrap, dir, rest @ ..] if wrap == "wrap" => {
            return mount_remote("no_seek_waits_for_a_silent_remote_mount", Path::new(dir), rest);
        }
        // It has started this; the overlay's inner half is told.
        [go, rest @ ..] if go == "go on" => {
            return go_on(&[rest, &[nix::unistd::getppid().to_string()]].concat());
        }
        [server] => nix::unistd::Pid::from_raw(server.parse()?),
        _ => return Err("the server is wanted".into()),
    };
    let read = File::open("far/read")?;
    let written = OpenOptions::new().read(true).write(true).open("far/written")?;
    // Stays in the kernel until the seek, which then waits for the copy-up.
    std::os::unix::fs::FileExt::write_all_at(&written, b"C", 0)?;
    let data = |file: &File| rustix::fs::seek(file, rustix::fs::SeekFrom::Data(0));
    let stopped = Stopped::new(server)?;
    for file in [&read, &written, &read, &written] {
        errno!(data(file), IO);
        // Elsewhere it goes on.
        fs::write("near", "near")?;
        fs::remove_file("near")?;
    }
    drop(stopped);
    for file in [&read, &written] {
        becomes("a seek", Some(0), || data(file).ok())?;
    }
    same!(fs::read_to_string("far/written")?, "Content");
    Ok(())
}

fn use_remote(args: &[String]) -> Check {
    match args {
        [wrap, dir, rest @ ..] if wrap == "wrap" => {
            return mount_remote("a_remote_mount_below_is_shown", Path::new(dir), rest);
        }
        [go, rest @ ..] if go == "go on" => return go_on(rest),
        _ => {}
    }
    let text = |path: &str| fs::read_to_string(path).ok();
    same!(fs::metadata("far")?.mode() & 0o777, 0o755);
    same!(names("far").map(|names| names.len()), Some(5));
    same!(text("far/file"), Some("content of file".to_owned()));
    same!(text("far/link"), Some("content of file".to_owned()));
    same!(text("far/dir/deep"), Some("content of dir/deep".to_owned()));
    errno!(fs::metadata("far/missing"), NOENT);
    let file = OpenOptions::new().write(true).open("far/changed")?;
    std::os::unix::fs::FileExt::write_all_at(&file, b"C", 0)?;
    file.sync_all()?;
    same!(text("far/changed"), Some("Content of changed".to_owned()));
    fs::remove_file("far/gone")?;
    fs::write("far/dir/new", "new")?;
    fs::create_dir("far/dir/newer")?;
    fs::rename("far/dir/deep", "deep")?;
    same!(names("far/dir"), Some(vec!["new".to_owned(), "newer".into(), "sub".into()]));
    same!((text("deep"), text("far/gone")), (Some("content of dir/deep".to_owned()), None));
    fs::rename("far/dir/sub", "sub")?;
    fs::set_permissions("far/file", fs::Permissions::from_mode(0o600))?;
    same!(fs::metadata("far/file")?.mode() & 0o777, 0o600);
    errno!(fs::rename("far", "near"), BUSY);
    errno!(fs::remove_dir("far"), BUSY);
    Ok(())
}
