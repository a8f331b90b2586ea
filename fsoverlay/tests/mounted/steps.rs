//! Operations that are stopped half-way: each step that changes the disk fails, or is the server's last.
//!
//! strace makes it so: an injected errno or SIGKILL at each such call that the
//! operation makes. Where the file system below knows `RENAME_WHITEOUT` a rename is one step; the
//! kernel's overlayfs, which does not, gives the other way.
//!
//! An operation that failed has left nothing behind, and one that succeeded is complete. That shows after a
//! remount only: the kernel goes on with the names that it knows.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use crate::harness::{Case, Check, Failure, Mount, SKIPPED, World, errno_of, holds, remove, same};

pub(crate) const CASES: &[Case] = &[
    Case { name: "a_failed_step_is_undone", outside: every_failure, inside: step },
    Case { name: "what_is_killed_half_way_loses_nothing", outside: every_kill, inside: step },
];

/// What is done, and what stands at the name `b` before. A `file` or `dir` that has something below, or a
/// `new` directory that has not, is renamed from `a`; the first becomes `linked` there, too, or it or the
/// second is `removed`; or something is made at `b` whose mode or type has to be recorded.
const SHAPES: [&str; 16] = [
    "file-nothing",
    "file-file",
    "dir-nothing",
    "dir-lowerdir",
    "dir-upperdir",
    "dir-whiteout",
    "new-nothing",
    "new-whiteout",
    "linked-nothing",
    "linked-whiteout",
    "removed-nothing",
    "removed_dir-nothing",
    "made-nothing",
    "made-whiteout",
    "made_dir-whiteout",
    "made_fifo-nothing",
];

/// The calls by which the server changes names and marks.
const CALLS: &str = "renameat2,linkat,unlinkat,mknodat,mkdirat,symlinkat,setxattr,lsetxattr,fsetxattr";

fn lower(world: &World, shape: &str) -> Check {
    remove(&world.lower())?;
    fs::create_dir(world.lower())?;
    let lower = world.lower();
    let (source, target) = shape.split_once('-').ok_or("no such shape")?;
    match source {
        "file" | "linked" | "removed" => fs::write(lower.join("a"), "lower a")?,
        "dir" | "removed_dir" => {
            fs::create_dir(lower.join("a"))?;
            fs::write(lower.join("a/f"), "lower f")?;
            fs::write(lower.join("a/g"), "lower g")?;
        }
        _ => {}
    }
    match target {
        "nothing" => {}
        "file" | "whiteout" => fs::write(lower.join("b"), "lower b")?,
        _ => {
            fs::create_dir(lower.join("b"))?;
            if target == "upperdir" {
                fs::write(lower.join("b/old"), "old")?;
            }
        }
    }
    Ok(())
}

/// A mount whose upper is in a mount of the kernel's overlay, if `stacked`.
fn mount(world: &World, stacked: bool, first: &[&str]) -> Mount {
    let mut words: Vec<&str> = Vec::new();
    let other = world.path("other").display().to_string();
    let script = format!(
        "cd {other} && mount -t overlay -o userxattr,lowerdir=low,upperdir=up,workdir=wk overlay merged \
         || exit {SKIPPED}; cd /; exec \"$@\""
    );
    if stacked {
        words.extend(["unshare", "-Urm", "sh", "-c", &script, "sh"]);
    }
    words.extend(first);
    let place = if stacked { world.path("other/merged") } else { world.dir.clone() };
    world
        .bare()
        .with("--workers", "1")
        .with("--lower", world.lower())
        .with("--upper", place.join("upper"))
        .with("--work", place.join("work"))
        .under(&words)
}

/// Calls `check` with every shape, for every step, after the operation was stopped there.
fn each_step(world: &mut World, fault: &str, check: fn(&World, &str, bool) -> Check) -> Check {
    if std::process::Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_err() {
        return Err(Failure::Skip("there is no strace".to_owned()));
    }
    for stacked in [false, true] {
        for shape in SHAPES {
            // Without a fault first: which calls there are that change something. strace counts each
            // kind by itself.
            let made = stopped_under(world, shape, stacked, None)?.1;
            let mut counts = BTreeMap::new();
            for line in made.lines() {
                let call = line.split_whitespace().nth(1).and_then(|word| word.split_once('('));
                let Some((call, _)) = call.filter(|(name, _)| CALLS.split(',').any(|c| c == *name)) else {
                    continue;
                };
                let at = counts.entry(call.to_owned()).or_insert(0);
                *at += 1;
                if line.contains(" = -1 ") {
                    continue;
                }
                let inject = format!("inject={call}:{fault}:when={at}");
                let (text, calls) = stopped_under(world, shape, stacked, Some(&inject))?;
                check(world, shape, stacked).map_err(|failure| {
                    let Failure::Wrong(why) = failure else { return failure };
                    Failure::Wrong(format!("{shape}, {inject}, stacked {stacked}: {why}\n{text}\n{calls}"))
                })?;
            }
            holds!(!counts.is_empty(), "{shape}: {made}");
        }
    }
    Ok(())
}

/// Does the operation in fresh directories; gives what was said, and the calls of the server.
fn stopped_under(
    world: &World,
    shape: &str,
    stacked: bool,
    inject: Option<&str>,
) -> Result<(String, String), Failure> {
    world.empty_upper()?;
    let other = world.path("other");
    // The kernel leaves a directory without rights in its work directory.
    let _ = fs::set_permissions(other.join("wk/work"), PermissionsExt::from_mode(0o700));
    remove(&other)?;
    for dir in ["low", "up/upper", "up/work", "wk", "merged"] {
        fs::create_dir_all(other.join(dir))?;
    }
    lower(world, shape)?;
    mount(world, stacked, &[]).arg("prepare").arg(shape).run()?;
    let trace = format!("trace={CALLS}");
    let log = world.path("log").display().to_string();
    // The command in the mount, which is executed, is not the server.
    let mut strace = vec!["strace", "-f", "-b", "execve", "-qq", "-o", &log, "-e", &trace];
    strace.extend(inject.into_iter().flat_map(|inject| ["-e", inject]));
    let output = mount(world, stacked, &strace).arg("do").arg(shape).output()?;
    // It shows calls that it does not know whatever was asked for.
    let calls = fs::read_to_string(&log)?;
    let calls = calls.split_inclusive('\n').filter(|l| !l.contains("syscall_0x")).collect::<String>();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let killed = inject.is_some_and(|inject| inject.contains("signal"));
    holds!(killed || output.status.success(), "{shape}, {inject:?}, stacked {stacked}: {text}\n{calls}");
    holds!(inject.is_none() || calls.contains("INJECTED") || calls.contains("killed by"), "{calls}");
    Ok((text, calls))
}

fn every_failure(world: &mut World) -> Check {
    each_step(world, "error=EIO", |world, shape, stacked| {
        mount(world, stacked, &[]).arg("whole").arg(shape).run().map(drop)
    })
}

fn every_kill(world: &mut World) -> Check {
    each_step(world, "signal=KILL", |world, shape, stacked| {
        mount(world, stacked, &[]).arg("sane").arg(shape).run().map(drop)
    })
}

/// What stands at a name: its content, or the entries of a directory.
fn seen(name: &str) -> Result<String, Failure> {
    match fs::symlink_metadata(name) {
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => Ok("nothing".to_owned()),
        Err(err) => Err(err.into()),
        Ok(meta) if meta.is_dir() => {
            let mut names = Vec::new();
            for entry in fs::read_dir(name)? {
                let path = entry?.path();
                names.push(format!("{}={}", path.display(), fs::read_to_string(&path)?));
            }
            names.sort();
            // A lookup must agree with the listing.
            for gone in ["f", "g", "old"] {
                let path = Path::new(name).join(gone);
                same!(path.exists(), names.iter().any(|n| n.contains(&format!("/{gone}="))), "{path:?}");
            }
            Ok(format!("[{}]", names.join(" ")))
        }
        Ok(meta) if meta.is_file() => Ok(fs::read_to_string(name)?),
        Ok(_) => Ok("special".to_owned()),
    }
}

/// Does what a shape is about.
fn operate(source: &str) -> std::io::Result<()> {
    use rustix::fs::{CWD, FileType, Mode};
    // Not even for the owner, whom the server is.
    let mode = Mode::from_raw_mode(0o007);
    match source {
        "linked" => fs::hard_link("a", "b"),
        "removed" => fs::remove_file("a"),
        "removed_dir" => fs::remove_dir("a"),
        "made" => Ok(rustix::fs::mknodat(CWD, "b", FileType::RegularFile, mode, 0)?),
        "made_dir" => Ok(rustix::fs::mkdirat(CWD, "b", mode)?),
        "made_fifo" => Ok(rustix::fs::mknodat(CWD, "b", FileType::Fifo, mode, 0)?),
        _ => fs::rename("a", "b"),
    }
}

fn step(args: &[String]) -> Check {
    let [step, shape] = args else { return Err("two arguments are wanted".into()) };
    let (source, target) = shape.split_once('-').ok_or("no such shape")?;
    let moved = if matches!(source, "dir" | "new") { ("[a/f=new]", "[b/f=new]") } else { ("new", "new") };
    let at_b = match target {
        "file" => "changed",
        "lowerdir" | "upperdir" => "[]",
        _ => "nothing",
    };
    let (before, after) = match source {
        "linked" => (("new", at_b), ("new", "new")),
        "removed" => (("new", at_b), ("nothing", at_b)),
        "removed_dir" => (("[]", at_b), ("nothing", at_b)),
        "made" => (("nothing", at_b), ("nothing", "")),
        "made_dir" => (("nothing", at_b), ("nothing", "[]")),
        "made_fifo" => (("nothing", at_b), ("nothing", "special")),
        _ => ((moved.0, at_b), ("nothing", moved.1)),
    };
    let now = || -> Result<(String, String), Failure> { Ok((seen("a")?, seen("b")?)) };
    match step.as_str() {
        "prepare" => {
            match source {
                "dir" => {
                    fs::write("a/f", "new")?;
                    fs::remove_file("a/g")?;
                }
                "removed_dir" => {
                    fs::remove_file("a/f")?;
                    fs::remove_file("a/g")?;
                }
                "new" => {
                    fs::create_dir("a")?;
                    fs::write("a/f", "new")?;
                }
                "file" | "linked" | "removed" => fs::write("a", "new")?,
                _ => {}
            }
            match target {
                "file" => fs::write("b", "changed")?,
                "upperdir" => fs::remove_file("b/old")?,
                "whiteout" => fs::remove_file("b")?,
                _ => {}
            }
        }
        "do" => {
            let (a, b) = now()?;
            same!((a.as_str(), b.as_str()), before);
            // Looked at from here on: the kernel knows both.
            let (outcome, wanted) = match operate(source) {
                Ok(()) => ("done", after),
                Err(err) => {
                    same!(errno_of(&err), Some(rustix::io::Errno::IO));
                    ("failed", before)
                }
            };
            fs::write("../outcome", outcome)?;
            let (a, b) = now()?;
            same!((a.as_str(), b.as_str()), wanted);
        }
        "whole" => {
            let (a, b) = now()?;
            let done = fs::read_to_string("../outcome")? == "done";
            same!((a.as_str(), b.as_str()), if done { after } else { before });
        }
        "sane" => {
            let (a, b) = now()?;
            // In between, an object may have both names; a replaced directory may be empty at the old
            // one. Nothing of a layer shows again and nothing is gone.
            let dir = before.0.starts_with('[');
            holds!(a == before.0 || a == after.0 || dir && a == "[]", "a is {a}, b is {b}");
            holds!(b == before.1 || b == after.1, "a is {a}, b is {b}");
            holds!(a == before.0 || b == after.1, "a is {a}, b is {b}");
        }
        other => return Err(format!("unknown step {other}").into()),
    }
    Ok(())
}
