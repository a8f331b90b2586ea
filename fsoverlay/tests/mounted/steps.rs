//! Renames that are stopped half-way: each step that changes the disk fails, or is the server's last.
//!
//! strace makes it so: an injected errno or SIGKILL at each such call that the
//! rename makes. Where the file system below knows `RENAME_WHITEOUT` a rename is one step; the
//! kernel's overlayfs, which does not, gives the other way.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use crate::harness::{Case, Check, Failure, Mount, SKIPPED, World, errno_of, holds, remove, same};

pub(crate) const CASES: &[Case] = &[
    Case { name: "a_failed_step_of_a_rename_is_undone", outside: every_failure, inside: step },
    Case { name: "a_rename_killed_half_way_loses_nothing", outside: every_kill, inside: step },
];

/// What is renamed over what. All sources have something below; `a` becomes `b`.
const SHAPES: [&str; 6] =
    ["file-nothing", "file-file", "dir-nothing", "dir-lowerdir", "dir-upperdir", "dir-whiteout"];

/// The calls by which the server changes names.
const CALLS: &str = "renameat2,linkat,unlinkat,mknodat,mkdirat,symlinkat";

fn lower(world: &World, shape: &str) -> Check {
    remove(&world.lower())?;
    fs::create_dir(world.lower())?;
    let lower = world.lower();
    let (source, target) = shape.split_once('-').ok_or("no such shape")?;
    if source == "file" {
        fs::write(lower.join("a"), "lower a")?;
    } else {
        fs::create_dir(lower.join("a"))?;
        fs::write(lower.join("a/f"), "lower f")?;
        fs::write(lower.join("a/g"), "lower g")?;
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

/// Calls `check` with every shape, for every step, after the rename was stopped there.
fn each_step(world: &mut World, fault: &str, check: fn(&World, &str, bool) -> Check) -> Check {
    if std::process::Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_err() {
        return Err(Failure::Skip("there is no strace".to_owned()));
    }
    for stacked in [false, true] {
        for shape in SHAPES {
            // Without a fault first: which calls there are that change something. strace counts each
            // kind by itself.
            let made = rename_under(world, shape, stacked, None)?.1;
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
                let (text, calls) = rename_under(world, shape, stacked, Some(&inject))?;
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

/// Renames in fresh directories; gives what was said, and the calls of the server.
fn rename_under(
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
    let mut strace = vec!["strace", "-f", "-qq", "-o", &log, "-e", &trace];
    strace.extend(inject.into_iter().flat_map(|inject| ["-e", inject]));
    let output = mount(world, stacked, &strace).arg("rename").arg(shape).output()?;
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
        Ok(_) => Ok(fs::read_to_string(name)?),
    }
}

fn step(args: &[String]) -> Check {
    let [step, shape] = args else { return Err("two arguments are wanted".into()) };
    let (source, target) = shape.split_once('-').ok_or("no such shape")?;
    let dir = source == "dir";
    let before = (
        if dir { "[a/f=new]" } else { "new" },
        match target {
            "file" => "changed",
            "lowerdir" | "upperdir" => "[]",
            _ => "nothing",
        },
    );
    let after = ("nothing", if dir { "[b/f=new]" } else { "new" });
    let now = || -> Result<(String, String), Failure> { Ok((seen("a")?, seen("b")?)) };
    match step.as_str() {
        "prepare" => {
            fs::write(if dir { "a/f" } else { "a" }, "new")?;
            if dir {
                fs::remove_file("a/g")?;
            }
            match target {
                "file" => fs::write("b", "changed")?,
                "upperdir" => fs::remove_file("b/old")?,
                "whiteout" => fs::remove_file("b")?,
                _ => {}
            }
        }
        "rename" => {
            let (a, b) = now()?;
            same!((a.as_str(), b.as_str()), before);
            // Looked at from here on: the kernel knows both.
            let wanted = match fs::rename("a", "b") {
                Ok(()) => after,
                Err(err) => {
                    same!(errno_of(&err), Some(rustix::io::Errno::IO));
                    before
                }
            };
            let (a, b) = now()?;
            same!((a.as_str(), b.as_str()), wanted);
        }
        "whole" => {
            let (a, b) = now()?;
            let now = (a.as_str(), b.as_str());
            holds!(now == before || now == after, "{now:?}");
        }
        "sane" => {
            let (a, b) = now()?;
            // In between, an object may have both names; a replaced directory may be empty at the old
            // one. Nothing of a layer shows again and nothing is gone.
            holds!(a == before.0 || a == after.0 || dir && a == "[]", "a is {a}, b is {b}");
            holds!(b == before.1 || b == after.1, "a is {a}, b is {b}");
            holds!(a == before.0 || b == after.1, "a is {a}, b is {b}");
        }
        other => return Err(format!("unknown step {other}").into()),
    }
    Ok(())
}
