//! Inode numbers: those of one file system, the same over copy-up and remount.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, mknodat};

use crate::harness::{Case, Check, Failure, World, holds, same};
use crate::semantics::{drop_caches, make_tree, no_leftovers, walk};

pub(crate) const CASES: &[Case] = &[
    Case { name: "numbers_stay_over_remounts", outside: remounts, inside: numbers },
    Case { name: "numbers_of_several_file_systems_stay", outside: several, inside: numbers },
    Case { name: "a_directory_at_two_places_has_two_numbers", outside: twice, inside: places },
];

type Numbers = BTreeMap<PathBuf, (u64, u64)>;

/// Numbers of all objects, the same from listings and stat, on one device.
fn seen() -> Result<Numbers, Failure> {
    let mut all = Numbers::new();
    walk(Path::new("."), &mut all)?;
    let dev = fs::metadata(".")?.dev();
    holds!(all.values().all(|number| number.0 == dev));
    Ok(all)
}

/// What is kept of them from mount to mount: paths and numbers.
fn save(numbers: &Numbers, file: &str) -> Check {
    let lines = numbers.iter().map(|(path, number)| format!("{} {}\n", number.1, path.display()));
    Ok(fs::write(file, lines.collect::<String>())?)
}

fn compare(numbers: &Numbers, file: &str) -> Check {
    for line in fs::read_to_string(file)?.lines() {
        let (number, path) = line.split_once(' ').ok_or("no number")?;
        let now = numbers.get(Path::new(path)).map(|number| number.1);
        same!(now, Some(number.parse()?), "{path}");
    }
    Ok(())
}

fn make_objects(dir: &Path) -> Check {
    make_tree(dir)?;
    // Files with several names have numbers of their own until the names move together.
    fs::remove_file(dir.join("dir/a2"))?;
    fs::create_dir(dir.join("merged"))?;
    mknodat(CWD, dir.join("pipe"), FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
    Ok(())
}

/// All kinds of objects, copied up and not, in all places.
fn remounts(world: &mut World) -> Check {
    make_objects(&world.lower())?;
    let high = world.path("lower2");
    make_objects(&high.join("high"))?;
    fs::create_dir_all(high.join("merged/in"))?;
    fs::create_dir_all(world.lower().join("hidden/in"))?;
    let file = world.path("other/numbers").display().to_string();
    for step in ["look", "change", "move", "make", "look"] {
        let mut mount = world.bare().with("--lower", world.lower()).with("--lower", &high).upper(world);
        mount = mount.with("--hide", "hidden").with("--hide", "merged/none");
        // The same objects, asked for in another order.
        let generated = [
            ("--file", "etc/hosts=x"),
            ("--link", "etc/mtab=y"),
            ("--dir", "made/deep"),
            ("--file", "merged/f=z"),
        ];
        let mut generated = generated.to_vec();
        if step != "look" {
            generated.reverse();
        }
        for (option, value) in generated {
            mount.option(option, value);
        }
        mount.arg(step).arg(&file).run()?;
        no_leftovers(world)?;
    }
    Ok(())
}

fn several(world: &mut World) -> Check {
    make_objects(&world.lower())?;
    fs::create_dir(world.lower().join("a"))?;
    fs::create_dir(world.lower().join("b"))?;
    let lower = world.lower().display().to_string();
    let file = world.path("other/numbers").display().to_string();
    // Two more file systems below, of which now the one and now the other is met first.
    let mut steps = String::new();
    for (step, first) in [("look", "a"), ("change", "b"), ("move", "a"), ("make", "b"), ("look", "a")] {
        steps.push_str(&format!(" && \"$@\" {step} {file} {first}"));
    }
    let script = format!(
        "cd {lower} && for d in a b; do mount -t tmpfs tmpfs $d && mkdir $d/sub && touch $d/f $d/sub/g && ln -s x $d/l \
         && mkfifo $d/p || exit 1; done; cd / {steps}"
    );
    world.mount().under(&["unshare", "-Urm", "sh", "-c", &script, "sh"]).run()?;
    no_leftovers(world)
}

/// A directory, a file and a file system below the layer that are also mounted elsewhere in it.
fn twice(world: &mut World) -> Check {
    let lower = world.lower();
    fs::create_dir_all(lower.join("a/sub"))?;
    for dir in ["b", "disk", "disk2"] {
        fs::create_dir(lower.join(dir))?;
    }
    for file in ["a/f", "a/sub/g", "a/h1", "once"] {
        fs::write(lower.join(file), "lower")?;
    }
    fs::hard_link(lower.join("a/h1"), lower.join("a/h2"))?;
    symlink("x", lower.join("a/l"))?;
    fs::write(lower.join("again"), "")?;
    let file = world.path("other/numbers").display().to_string();
    let script = format!(
        "cd {} && mount -t tmpfs tmpfs disk && mkdir disk/sub && echo lower > disk/f && touch disk/sub/g && ln -s x disk/l \
         && mount --bind a b && mount --bind disk disk2 && mount --bind once again && cd / \
         && \"$@\" {file} a && \"$@\" {file} b && \"$@\" {file} change && \"$@\" {file} b",
        lower.display()
    );
    world.mount().under(&["unshare", "-Urm", "sh", "-c", &script, "sh"]).run()?;
    no_leftovers(world)
}

fn places(args: &[String]) -> Check {
    let [file, step] = args else { return Err("two arguments are wanted".into()) };
    let mut paths = vec!["once".to_owned(), "again".to_owned()];
    for dir in ["a", "b", "disk", "disk2"] {
        paths.extend(["f", "sub/g", "sub", "l", ""].map(|name| format!("./{dir}/{name}")));
    }
    if step == "b" {
        paths.reverse();
    }
    let look = || -> Result<Numbers, Failure> {
        let mut all = Numbers::new();
        for path in &paths {
            let meta = fs::symlink_metadata(path)?;
            all.insert(path.into(), (meta.dev(), meta.ino()));
            drop_caches();
        }
        Ok(all)
    };
    let before = look()?;
    let distinct = before.values().map(|number| number.1).collect::<std::collections::BTreeSet<_>>().len();
    same!(distinct, before.len(), "{before:?}");
    if Path::new(file).exists() {
        compare(&before, file)?;
    }
    if step == "change" {
        for (changed, other) in
            [("b/f", "a/f"), ("a/sub/g", "b/sub/g"), ("disk2/f", "disk/f"), ("again", "once")]
        {
            let old = fs::read(other)?;
            fs::write(changed, "upper")?;
            same!(fs::read(other)?, old, "{other}");
        }
        // Names of one file, wherever they are.
        fs::write("b/h1", "upper")?;
        for name in ["a/h1", "a/h2", "b/h2"] {
            same!(fs::read_to_string(name)?, "upper", "{name}");
        }
    }
    same!(look()?, before);
    for dir in ["a", "b", "disk", "disk2"] {
        walk(Path::new(dir), &mut Numbers::new())?;
    }
    same!(look()?, before);
    save(&before, file)
}

fn numbers(args: &[String]) -> Check {
    let (step, file) = (args.first().ok_or("no step")?.as_str(), args.get(1).ok_or("no file")?);
    if let Some(first) = args.get(2) {
        fs::metadata(format!("{first}/sub"))?;
    }
    let mut before = seen_within_mounts(args.len() > 2)?;
    if Path::new(file).exists() {
        compare(&before, file)?;
    }
    let distinct = before.values().map(|number| number.1).collect::<std::collections::BTreeSet<_>>().len();
    same!(distinct, before.len());
    match step {
        "change" => {
            // All is copied up: by a change of mode, links by their times.
            for path in before.keys() {
                if path.symlink_metadata()?.is_symlink() {
                    let time = rustix::fs::Timespec { tv_sec: 1, tv_nsec: 2 };
                    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
                    rustix::fs::utimensat(CWD, path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?;
                } else {
                    fs::set_permissions(path, fs::Permissions::from_mode(0o711))?;
                }
            }
        }
        "move" => {
            // To a directory that has nothing else whose number is not the disk's.
            fs::create_dir("target")?;
            for (i, path) in before.keys().cloned().collect::<Vec<_>>().iter().rev().enumerate() {
                let meta = path.symlink_metadata()?;
                if meta.is_dir() || path.starts_with("./a") || path.starts_with("./b") {
                    continue;
                }
                let new = PathBuf::from(format!("./target/{i}"));
                fs::rename(path, &new)?;
                let number = before.remove(path).ok_or("gone")?;
                before.insert(new, number);
            }
        }
        "make" => {
            fs::create_dir("new")?;
            fs::create_dir("new/dir")?;
            fs::write("new/file", "")?;
            symlink("x", "new/link")?;
            mknodat(CWD, "new/pipe", FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
            holds!(fs::symlink_metadata("new/pipe")?.file_type().is_fifo());
            // The disk may give their numbers again while the kernel knows the old objects.
            let mut held = Vec::new();
            for i in 0..50 {
                let (dir, link) = (format!("new/d{i}"), format!("new/l{i}"));
                fs::create_dir(&dir)?;
                symlink("x", &link)?;
                let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::NOFOLLOW;
                held.push(rustix::fs::openat(CWD, &dir, flags, Mode::empty())?);
                held.push(rustix::fs::openat(CWD, &link, flags, Mode::empty())?);
                fs::remove_dir(&dir)?;
                fs::remove_file(&link)?;
            }
            for i in 0..50 {
                fs::create_dir(format!("new/again{i}"))?;
                symlink("y", format!("new/link{i}"))?;
                fs::write(format!("new/file{i}"), "")?;
            }
            let made = seen_within_mounts(args.len() > 2)?;
            for fd in &held {
                let number = rustix::fs::fstat(fd)?.st_ino;
                holds!(made.values().all(|other| other.1 != number));
            }
            before = made;
        }
        _ => {}
    }
    drop_caches();
    let after = seen_within_mounts(args.len() > 2)?;
    for (path, number) in &before {
        same!(after.get(path), Some(number), "{}", path.display());
    }
    save(&after, file)
}

/// [`seen`], but that a listing tells the number of what a mount covers.
fn seen_within_mounts(mounts: bool) -> Result<Numbers, Failure> {
    if !mounts {
        return seen();
    }
    let mut all = Numbers::new();
    for entry in fs::read_dir(".")? {
        let path = Path::new(".").join(entry?.file_name());
        let meta = path.symlink_metadata()?;
        if meta.is_dir() {
            walk(&path, &mut all)?;
        }
        all.insert(path, (meta.dev(), meta.ino()));
    }
    Ok(all)
}
