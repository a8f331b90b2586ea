//! Walks whose next directory is read ahead, by the server's own counts.
//!
//! How much is read ahead depends on time: a few milliseconds of it, and what is older than a second is not used. So
//! what must not be read or used is counted exactly, and of what may be it is seen that there is some.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::harness::{Case, Check, Failure, Mount, World, count_in, holds, mount_above, same};

pub(crate) const CASES: &[Case] = &[
    Case { name: "a_walk_is_read_ahead", outside: many_dirs, inside: walk_alone },
    Case {
        name: "what_changed_after_it_was_read_ahead_shows",
        outside: changed_dirs,
        inside: change_and_list,
    },
    Case { name: "a_large_directory_is_not_read_ahead", outside: large_dirs, inside: walk_alone },
    Case { name: "nothing_is_read_ahead_beside_far_mounts", outside: far_below, inside: walk_beside_far },
];

const DIRS: usize = 40;
const FILES: usize = 20;

fn fill(top: &Path, dirs: usize, files: usize, name: impl Fn(usize) -> String) -> Check {
    for dir in 0..dirs {
        let dir = top.join(format!("dir{dir}"));
        fs::create_dir(&dir)?;
        for file in 0..files {
            fs::write(dir.join(name(file)), "content")?;
        }
    }
    Ok(())
}

fn short(file: usize) -> String {
    format!("file{file}")
}

/// How many entries were looked up ahead, and how many of them were of use.
fn counts(mount: &Mount) -> Result<(u64, u64), Failure> {
    let output = mount.output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    holds!(output.status.success(), "{text}");
    Ok((count_in(&text, "looked_ahead")?, count_in(&text, "told_ahead")?))
}

/// Nothing is read ahead in layers on such file systems.
fn need_answers(world: &World) -> Check {
    const FUSE: i64 = 0x6573_5546;
    const NFS: i64 = 0x6969;
    let kind = rustix::fs::statfs(&world.dir)?.f_type;
    if [FUSE, NFS].contains(&kind) {
        return Err(Failure::Skip("the directory for temporary files is on a remote file system".to_owned()));
    }
    Ok(())
}

/// Waits until the server has nothing to do: it reads ahead after its reply.
fn wait_idle() -> Check {
    let tasks = format!("/proc/{}/task", nix::unistd::getppid());
    loop {
        let mut idle = true;
        for task in fs::read_dir(&tasks)? {
            // (One that has ended meanwhile has nothing to do either.)
            let stat = fs::read_to_string(task?.path().join("stat")).unwrap_or_default();
            idle &= stat.is_empty() || stat.contains(") S ");
        }
        if idle {
            return Ok(());
        }
        std::thread::yield_now();
    }
}

/// The directories in the root, in its order: that in which a walk meets them.
fn dirs() -> Result<Vec<PathBuf>, Failure> {
    let mut dirs = Vec::new();
    for entry in fs::read_dir(".")? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(b"dir") {
            dirs.push(entry.path());
        }
    }
    wait_idle()?;
    Ok(dirs)
}

type Files = BTreeMap<String, (u64, u32)>;

/// Names, sizes and permissions.
fn list(dir: &Path) -> Result<Files, Failure> {
    let mut files = Files::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        let name = entry.file_name().to_string_lossy().into_owned();
        same!(files.insert(name, (meta.len(), meta.mode() & 0o7777)), None);
    }
    Ok(files)
}

fn walk() -> Check {
    for dir in dirs()? {
        let files = list(&dir)?;
        holds!(files.len() >= FILES && files.values().all(|(size, _)| *size == 7), "{files:?}");
        wait_idle()?;
    }
    Ok(())
}

fn walk_alone(_: &[String]) -> Check {
    walk()
}

fn many_dirs(world: &mut World) -> Check {
    need_answers(world)?;
    fill(&world.lower(), DIRS, FILES, short)?;
    let (looked, told) = counts(&world.mount())?;
    // The first guess shows whether it is a walk: nothing is read for it, nor of the directory that comes first.
    let most = (DIRS - 1) * FILES;
    holds!(looked <= most as u64 && told <= looked, "{told} of {looked} of {most}");
    // One of each at least, but for what a busy machine lets grow old.
    holds!(told >= DIRS as u64, "{told} of {looked} of {most}");
    // A single worker would let others wait.
    world.empty_upper()?;
    same!(counts(&world.mount().with("--workers", "1"))?, (0, 0));
    Ok(())
}

fn changed_dirs(world: &mut World) -> Check {
    need_answers(world)?;
    fill(&world.lower(), DIRS, FILES, short)?;
    for dir in 0..DIRS {
        fs::write(world.lower().join(format!("dir{dir}/other")), "more than the content")?;
    }
    let (looked, told) = counts(&world.mount())?;
    holds!(looked >= DIRS as u64 / 2);
    // What was ready of the directory that changed is of no use.
    same!(told, 0);
    Ok(())
}

/// Changes each directory when it has been read ahead, before it is listed.
fn change_and_list(_: &[String]) -> Check {
    let dirs = dirs()?;
    let mask = fs::metadata(dirs[0].join("file0"))?.mode() & 0o7777;
    list(&dirs[0])?;
    wait_idle()?;
    for (i, dir) in dirs.iter().enumerate().skip(1) {
        let mut files: Files = (0..FILES).map(|file| (short(file), (7, mask))).collect();
        files.insert("other".to_owned(), (21, mask));
        let name = short(i % FILES);
        let path = dir.join(&name);
        match i % 6 {
            0 => {
                fs::remove_file(path)?;
                files.remove(&name);
            }
            1 => {
                fs::rename(dir.join("other"), path)?;
                files.remove("other");
                files.insert(name, (21, mask));
            }
            2 => {
                fs::rename(path, format!("moved{i}"))?;
                files.remove(&name);
            }
            3 => {
                OpenOptions::new().write(true).open(path)?.write_all_at(b"and some more", 7)?;
                files.insert(name, (20, mask));
            }
            4 => {
                fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
                files.insert(name, (7, 0o600));
            }
            _ => {
                fs::write(dir.join("new"), "new")?;
                files.insert("new".to_owned(), (3, mask));
            }
        }
        wait_idle()?;
        same!(list(dir)?, files, "{i}");
        wait_idle()?;
    }
    Ok(())
}

fn large_dirs(world: &mut World) -> Check {
    fill(&world.lower(), 3, 3400, |file| format!("{file:060}"))?;
    // Some file systems count entries rather than bytes.
    if fs::metadata(world.lower().join("dir0"))?.len() <= 64 << 10 {
        return Err(Failure::Skip("this file system's directories are not large".to_owned()));
    }
    same!(counts(&world.mount())?, (0, 0));
    Ok(())
}

fn far_below(world: &mut World) -> Check {
    fill(&world.lower(), DIRS, FILES, short)?;
    fill(&world.path("lower2"), DIRS, FILES, short)?;
    let far = world.path("lower2").join("far");
    for dir in [far.clone(), world.path("other").join("mnt")] {
        fs::create_dir(dir)?;
    }
    world.mount().with("--at", far).arg(world.dir.display().to_string()).run().map(drop)
}

/// In the mount that the others are to think far: mounts one that has it below its layer, and one of which it is
/// the layer.
fn walk_beside_far(args: &[String]) -> Check {
    let dir = match args {
        [dir] if dir != "above" => Path::new(dir),
        _ => return walk(),
    };
    let home = dir.join("other");
    for lower in [dir.join("lower2"), dir.join("lower2/far")] {
        for part in ["upper", "work"] {
            let _ = fs::remove_dir_all(home.join(part));
            fs::create_dir(home.join(part))?;
        }
        let mount = mount_above("nothing_is_read_ahead_beside_far_mounts", dir, &home).with("--lower", lower);
        same!(counts(&mount)?, (0, 0));
    }
    Ok(())
}
