//! Renamed directories of layers: nothing in them is copied, and the upper says where the layers have them.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;

use fsoverlay::ChangeKind::{self, Added, Deleted, Modified};
use rustix::fs::{CWD, FileType, Mode, RenameFlags, XattrFlags, mknodat, renameat_with};

use crate::disk::{dump, spec};
use crate::harness::{Case, Check, Failure, World, errno, holds, no_kernel_overlay, same};
use crate::semantics::{make_tree, no_leftovers};

pub(crate) const CASES: &[Case] = &[
    Case { name: "a_renamed_directory_is_not_copied", outside: not_copied, inside: rename_steps },
    Case { name: "what_is_in_a_renamed_directory_stays_itself", outside: with_tree, inside: stay },
    Case { name: "renamed_directories_as_layers", outside: as_layers, inside: look_through_layers },
    Case { name: "paths_too_long_to_note_are_copied", outside: too_long, inside: rename_deep },
    Case { name: "long_and_strange_names_outlive_remounts", outside: strange, inside: use_strange_names },
    Case { name: "hostile_redirects_lead_nowhere", outside: hostile, inside: look_at_hostile },
    Case { name: "renamed_directories_are_listed", outside: listed, inside: rename_for_list },
    Case { name: "exported_uppers_are_the_kernels", outside: exported, inside: rename_for_export },
];

fn xattr_set(path: &Path, name: &str, value: &[u8]) -> Check {
    Ok(rustix::fs::setxattr(path, name, value, XattrFlags::empty())?)
}

fn redirect_of(path: &Path) -> Result<String, Failure> {
    let mut buf = vec![0; 8192];
    match rustix::fs::lgetxattr(path, "user.overlay.redirect", buf.as_mut_slice()) {
        Ok(n) => Ok(String::from_utf8_lossy(&buf[..n]).into_owned()),
        Err(err) => Err(err.into()),
    }
}

/// How many objects a tree holds.
fn count(dir: &Path) -> Result<usize, Failure> {
    let mut total = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        total += 1;
        if entry.file_type()?.is_dir() {
            total += count(&entry.path())?;
        }
    }
    Ok(total)
}

fn shown() -> Result<BTreeMap<String, String>, Failure> {
    let mut all = BTreeMap::new();
    dump(Path::new("."), Path::new("/"), &mut all)?;
    Ok(all)
}

fn renameat(from: &str, to: &str, flags: RenameFlags) -> Check {
    Ok(renameat_with(CWD, from, CWD, to, flags)?)
}

/// Each step is a mount of its own, and so is the look at it from `plain`, where the same is done.
const STEPS: [fn() -> Check; 13] = [
    || Ok(fs::rename("dir", "moved")?),
    // To another directory: the name becomes a path.
    || Ok(fs::rename("moved", "other/again")?),
    || Ok(fs::rename("other/again/sub", "other/again/bus")?),
    || Ok(fs::write("other/again/bus/new", "new")?),
    || Ok(fs::remove_file("other/again/bus/c")?),
    || Ok(fs::rename("other/again/bus/deep", "deep")?),
    || renameat("deep", "other/again", RenameFlags::EXCHANGE),
    || renameat("two", "tree", RenameFlags::EXCHANGE),
    || renameat("tree/x", "file", RenameFlags::EXCHANGE),
    // What stood below at the new name does not show, nor what is made at the old one.
    || {
        fs::remove_dir_all("empty")?;
        fs::rename("two/in", "empty")?;
        Ok(fs::create_dir("two/in")?)
    },
    || {
        fs::rename("deep/bus", "empty/bus")?;
        Ok(fs::rename("other", "empty/bus/other")?)
    },
    // Over one that is empty now, and away again.
    || {
        fs::remove_file("empty/bus/other/again/d")?;
        Ok(fs::rename("empty/bus", "empty/bus2")?)
    },
    || {
        fs::create_dir("last")?;
        fs::rename("last", "empty/bus2/other/again")?;
        Ok(fs::remove_dir("empty/bus2/other/again")?)
    },
];

fn make_trees(dir: &Path) -> Check {
    make_tree(dir)?;
    fs::create_dir(dir.join("other"))?;
    for name in ["two", "tree"] {
        fs::create_dir_all(dir.join(name).join("in/it"))?;
        fs::create_dir(dir.join(name).join("x"))?;
        fs::write(dir.join(name).join("in/it/f"), name)?;
        fs::write(dir.join(name).join(format!("only-{name}")), "")?;
    }
    Ok(())
}

fn not_copied(world: &mut World) -> Check {
    let plain = world.path("other");
    make_trees(&world.lower())?;
    make_trees(&plain)?;
    for step in 0..STEPS.len() {
        for half in ["do", "look"] {
            world.mount().arg(half).arg(step.to_string()).arg(plain.display().to_string()).run()?;
        }
        no_leftovers(world)?;
        match step {
            0 => {
                same!(redirect_of(&world.upper().join("moved"))?, "dir");
                // The directory and the whiteout of its old name.
                same!(count(&world.upper())?, 2);
            }
            1 => same!(redirect_of(&world.upper().join("other/again"))?, "/dir"),
            2 => same!(redirect_of(&world.upper().join("other/again/bus"))?, "sub"),
            5 => same!(redirect_of(&world.upper().join("deep"))?, "/dir/sub/deep"),
            _ => {}
        }
    }
    same!(fs::read(world.lower().join("dir/sub/deep/d"))?, b"d");
    // Of all the files only those that were written or renamed themselves.
    for name in ["f", "a", "b", "d", "only-two"] {
        let found = std::process::Command::new("find")
            .arg(world.upper())
            .args(["-name", name, "-type", "f"])
            .output()?;
        same!(String::from_utf8_lossy(&found.stdout), "", "{name}");
    }
    Ok(())
}

fn rename_steps(args: &[String]) -> Check {
    let [half, step, plain] = args else { return Err("three arguments are wanted".into()) };
    let step = STEPS.get(step.parse::<usize>()?).ok_or("no such step")?;
    let mount = std::env::current_dir()?;
    if half == "do" {
        shown()?;
        step()?;
    }
    let ours = shown()?;
    std::env::set_current_dir(plain)?;
    if half == "do" {
        step()?;
    }
    same!(ours, shown()?);
    std::env::set_current_dir(mount)?;
    Ok(())
}

fn with_tree(world: &mut World) -> Check {
    make_trees(&world.lower())?;
    world.mount().arg("rename").run()?;
    world.mount().arg("look").run()?;
    no_leftovers(world)
}

fn stay(args: &[String]) -> Check {
    if args.first().map(String::as_str) == Some("look") {
        same!(fs::read_to_string("empty/moved/sub/c")?, "C");
        same!(fs::read_dir("empty/moved/sub")?.count(), 2);
        return Ok(());
    }
    let number = |path: &str| fs::symlink_metadata(path).map(|meta| meta.ino());
    let below = ["a", "up", "sub", "sub/c", "sub/deep"];
    let numbers =
        |at: &str| below.iter().map(|name| number(&format!("{at}/{name}"))).collect::<Result<Vec<_>, _>>();
    let before = numbers("dir")?;
    let open = OpenOptions::new().read(true).write(true).open("dir/sub/c")?;
    let dir = File::open("dir/sub")?;
    rustix::fs::flock(&open, rustix::fs::FlockOperation::LockExclusive)?;
    let old = std::env::current_dir()?;
    std::env::set_current_dir("dir/sub/deep")?;
    fs::rename(old.join("dir"), old.join("moved"))?;
    fs::rename(old.join("moved"), old.join("empty/moved"))?;
    same!(fs::read_to_string("d")?, "d");
    same!(std::env::current_dir()?, old.join("empty/moved/sub/deep"));
    std::env::set_current_dir(&old)?;
    same!(numbers("empty/moved")?, before);
    let other = File::open("empty/moved/sub/c")?;
    errno!(rustix::fs::flock(&other, rustix::fs::FlockOperation::NonBlockingLockExclusive), WOULDBLOCK);
    // A descriptor of before copies up to where the file is now.
    open.write_all_at(b"C", 0)?;
    open.sync_all()?;
    same!(fs::read_to_string("empty/moved/sub/c")?, "C");
    same!(dir.metadata()?.ino(), number("empty/moved/sub")?);
    same!(numbers("empty/moved")?, before);
    Ok(())
}

fn as_layers(world: &mut World) -> Check {
    let plain = world.path("other");
    make_trees(&world.lower())?;
    make_trees(&plain)?;
    // A pile of uppers, each with a rename of what the last one renamed.
    let mut layers = vec![world.lower()];
    for (i, name) in ["dir", "one", "empty/two", "three", "four"].windows(2).enumerate() {
        let (upper, work) = (world.path(&format!("upper{i}")), world.path(&format!("work{i}")));
        fs::create_dir(&upper)?;
        fs::create_dir(&work)?;
        let mut mount = world.bare();
        for layer in &layers {
            mount.option("--lower", layer);
        }
        mount = mount.with("--upper", &upper).with("--work", &work);
        mount.arg("rename").arg(name[0]).arg(name[1]).arg(i.to_string()).run()?;
        fs::rename(plain.join(name[0]), plain.join(name[1]))?;
        fs::write(plain.join(name[1]).join(format!("new{i}")), "")?;
        fs::rename(
            plain.join(name[1]).join(["a", "b", "a", "b"][i]),
            plain.join(name[1]).join(["b", "a"][i % 2]),
        )?;
        layers.push(upper);
        let mut mount = world.bare();
        for layer in &layers {
            mount.option("--lower", layer);
        }
        mount.arg("look").arg(plain.display().to_string()).run()?;
    }
    // With some layers left out: what a redirect leads to is not there, and nothing else shows.
    let mount = world.bare().with("--lower", world.lower()).with("--lower", &layers[3]);
    mount.arg("lost").run()?;
    Ok(())
}

fn look_through_layers(args: &[String]) -> Check {
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["rename", from, to, i] => {
            fs::rename(from, to)?;
            fs::write(format!("{to}/new{i}"), "")?;
            let i: usize = i.parse()?;
            fs::rename(format!("{to}/{}", ["a", "b", "a", "b"][i]), format!("{to}/{}", ["b", "a"][i % 2]))?;
            Ok(())
        }
        ["look", plain] => {
            let ours = shown()?;
            std::env::set_current_dir(plain)?;
            same!(ours, shown()?);
            Ok(())
        }
        ["lost"] => {
            // Its own files only.
            let mut names = fs::read_dir("three")?
                .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
                .collect::<Result<Vec<_>, _>>()?;
            names.sort();
            same!(names, ["b", "new2"]);
            Ok(())
        }
        _ => Err("unknown step".into()),
    }
}

/// Deep enough that the path of the last one cannot be noted.
const DEPTH: usize = 20;

fn long_name(i: usize) -> String {
    format!("{i:03}").repeat(80)
}

fn too_long(world: &mut World) -> Check {
    let mut dir: std::os::fd::OwnedFd = File::open(world.lower())?.into();
    for i in 0..DEPTH {
        rustix::fs::mkdirat(&dir, long_name(i), Mode::from_raw_mode(0o755))?;
        dir = open_dir(&dir, &long_name(i))?;
    }
    let file = rustix::fs::openat(
        &dir,
        "file",
        rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY,
        Mode::from_raw_mode(0o644),
    )?;
    rustix::io::write(&file, b"deep")?;
    world.mount().arg("rename").run()?;
    world.mount().arg("look").run()?;
    no_leftovers(world)
}

fn open_dir(dir: &impl std::os::fd::AsFd, name: &str) -> Result<std::os::fd::OwnedFd, Failure> {
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY;
    Ok(rustix::fs::openat(dir, name, flags, Mode::empty())?)
}

fn rename_deep(args: &[String]) -> Check {
    let top: std::os::fd::OwnedFd = File::open(".")?.into();
    let mut dir = open_dir(&top, ".")?;
    let moved = args.first().map(String::as_str) != Some("rename");
    for i in 0..DEPTH - 3 {
        dir = open_dir(&dir, &long_name(i))?;
    }
    let name = long_name(DEPTH - 3);
    if !moved {
        // First where it is, which is a name only, then to another directory, which would be a path.
        rustix::fs::renameat(&dir, &*name, &dir, "renamed")?;
        rustix::fs::renameat(&dir, "renamed", &top, "up")?;
    }
    errno!(open_dir(&dir, &name).map_err(|_| rustix::io::Errno::NOENT), NOENT);
    let mut up = open_dir(&top, "up")?;
    for i in DEPTH - 2..DEPTH {
        up = open_dir(&up, &long_name(i))?;
    }
    let mut text = [0; 4];
    let file = rustix::fs::openat(&up, "file", rustix::fs::OFlags::RDONLY, Mode::empty())?;
    same!(rustix::io::read(&file, &mut text)?, 4);
    same!(&text, b"deep");
    Ok(())
}

/// As long as a name can be.
fn name(letter: &str) -> String {
    letter.repeat(255)
}

/// What other formats take for marks; here they are names as any.
const MARKS: [&str; 4] = [".wh.gone", ".wh..wh..opq", ".wh.", "#1"];

fn strange(world: &mut World) -> Check {
    let dir = world.lower().join(name("d"));
    fs::create_dir_all(dir.join(name("s")))?;
    for file in ["f", "g", "h"] {
        fs::write(dir.join(name(file)), file)?;
    }
    fs::write(dir.join(name("s")).join(name("x")), "x")?;
    fs::write(world.lower().join("gone"), "there")?;
    fs::write(world.lower().join(MARKS[0]), "lower")?;
    for step in ["change", "look", "again", "last"] {
        world.mount().arg(step).run()?;
        no_leftovers(world)?;
    }
    Ok(())
}

fn use_strange_names(args: &[String]) -> Check {
    let (dir, moved) = (name("d"), name("m"));
    match args.first().map(String::as_str) {
        Some("change") => {
            same!(fs::read_to_string(MARKS[0])?, "lower");
            fs::write(format!("{dir}/{}", name("f")), "changed")?;
            fs::remove_file(format!("{dir}/{}", name("g")))?;
            fs::rename(format!("{dir}/{}", name("s")), &moved)?;
            fs::rename(&dir, format!("{moved}/{dir}"))?;
            for mark in MARKS {
                fs::write(mark, "mine")?;
                fs::write(format!("{moved}/{mark}"), "mine, too")?;
            }
        }
        Some("look") => {
            errno!(fs::metadata(&dir), NOENT);
            same!(fs::read_to_string(format!("{moved}/{}", name("x")))?, "x");
            same!(fs::read_to_string(format!("{moved}/{dir}/{}", name("f")))?, "changed");
            same!(fs::read_to_string(format!("{moved}/{dir}/{}", name("h")))?, "h");
            errno!(fs::metadata(format!("{moved}/{dir}/{}", name("g"))), NOENT);
            errno!(fs::metadata(format!("{moved}/{dir}/{}", name("s"))), NOENT);
            for mark in MARKS {
                same!(fs::read_to_string(mark)?, "mine");
                same!(fs::read_to_string(format!("{moved}/{mark}"))?, "mine, too");
            }
            same!(fs::read_to_string("gone")?, "there");
            same!(fs::read_dir(&moved)?.count(), 2 + MARKS.len());
        }
        Some("again") => {
            renameat(&format!("{moved}/{dir}"), MARKS[0], RenameFlags::EXCHANGE)?;
            fs::remove_file(MARKS[1])?;
            fs::rename(&moved, name("n"))?;
        }
        _ => {
            same!(fs::read_to_string(format!("{}/{}", MARKS[0], name("h")))?, "h");
            same!(fs::read_to_string(format!("{}/{dir}", name("n")))?, "mine");
            errno!(fs::metadata(MARKS[1]), NOENT);
            errno!(fs::metadata(&moved), NOENT);
            fs::remove_dir_all(name("n"))?;
            fs::remove_dir_all(MARKS[0])?;
        }
    }
    Ok(())
}

/// Redirects that lead nowhere; `up` and `down` are directories of the layer.
const HOSTILE: [&[u8]; 14] = [
    b"..",
    b".",
    b"",
    b"/",
    b"//",
    b"/..",
    b"/../canary",
    b"/down/../../canary",
    b"../canary",
    b"down/f",
    b"/missing/down",
    b"/link/canary",
    b"/file/x",
    b"/down\0/f",
];

fn hostile(world: &mut World) -> Check {
    let (low, high, upper) = (world.lower(), world.path("lower2"), world.upper());
    fs::create_dir(world.dir.join("canary"))?;
    fs::write(world.dir.join("canary/secret"), "secret")?;
    fs::create_dir_all(low.join("down/f"))?;
    fs::write(low.join("down/f/x"), "")?;
    fs::write(low.join("file"), "")?;
    symlink("..", low.join("link"))?;
    symlink(&world.dir, high.join("link"))?;
    for dir in [&high, &upper] {
        for (i, text) in HOSTILE.iter().enumerate() {
            let name = dir.join(format!("{}{i}", if *dir == high { "h" } else { "u" }));
            fs::create_dir(&name)?;
            xattr_set(&name, "user.overlay.redirect", text)?;
        }
    }
    let too_long = [b"/x".repeat(3000), vec![b'y'; 256], vec![b'/'; 5000]].concat();
    for (name, text) in [("long", &too_long[..]), ("noise", &[0xff; 300])] {
        fs::create_dir(upper.join(name))?;
        // Where the file system takes as much.
        let _ = xattr_set(&upper.join(name), "user.overlay.redirect", text);
    }
    // Each leads to the other, in one layer and over two; a path that grows with each layer.
    for (dir, name, to) in [
        (&high, "a", "/b"),
        (&high, "b", "/a"),
        (&upper, "c", "/c/c"),
        (&upper, "loop", "/loop2"),
        (&high, "loop2", "/loop"),
    ] {
        fs::create_dir(dir.join(name))?;
        xattr_set(&dir.join(name), "user.overlay.redirect", to.as_bytes())?;
    }
    // Whiteouts and opaque directories on the way count.
    for name in ["gone", "opaque"] {
        fs::create_dir_all(low.join(name).join("in"))?;
        fs::write(low.join(name).join("in/f"), "")?;
        fs::create_dir(upper.join(format!("to-{name}")))?;
        xattr_set(
            &upper.join(format!("to-{name}")),
            "user.overlay.redirect",
            format!("/{name}/in").as_bytes(),
        )?;
    }
    mknodat(CWD, high.join("gone"), FileType::CharacterDevice, Mode::empty(), 0)?;
    fs::create_dir(high.join("opaque"))?;
    xattr_set(&high.join("opaque"), "user.overlay.opaque", b"y")?;
    // One that leads somewhere, or the rest proves nothing.
    fs::create_dir(upper.join("good"))?;
    xattr_set(&upper.join("good"), "user.overlay.redirect", b"/down/f")?;
    let layers = || world.bare().with("--lower", &low).with("--lower", &high);
    layers().with("--lower", &upper).arg("only look").run()?;
    fsoverlay::changes(&upper, &[low.clone(), high.clone()])?;
    layers().upper(world).run()?;
    same!(fs::read_to_string(world.dir.join("canary/secret"))?, "secret");
    Ok(())
}

fn look_at_hostile(args: &[String]) -> Check {
    same!(fs::read_dir("good")?.count(), 1);
    let mut names = vec!["long".to_owned(), "noise".to_owned()];
    names.extend(["a", "b", "c", "loop", "loop2", "to-gone", "to-opaque"].map(str::to_owned));
    names.extend((0..HOSTILE.len()).flat_map(|i| [format!("h{i}"), format!("u{i}")]));
    for name in &names {
        same!(fs::read_dir(name)?.count(), 0, "{name}");
        for below in ["secret", "x", "f", "canary", "down"] {
            errno!(fs::symlink_metadata(format!("{name}/{below}")), NOENT);
        }
    }
    if args.is_empty() {
        for (i, name) in names.iter().enumerate() {
            match i % 3 {
                0 => fs::remove_dir(name)?,
                1 => fs::rename(name, format!("good/{name}"))?,
                _ => fs::write(format!("{name}/new"), "")?,
            }
        }
    }
    Ok(())
}

fn listed(world: &mut World) -> Check {
    make_trees(&world.lower())?;
    world.mount().run()?;
    let list = |changes: Vec<fsoverlay::Change>| -> Vec<(String, ChangeKind)> {
        changes.into_iter().map(|c| (c.path.display().to_string(), c.kind)).collect()
    };
    let wanted: Vec<(String, ChangeKind)> = [
        ("/dir", Deleted),
        ("/empty/moved", Added),
        ("/empty/moved/a", Added),
        ("/empty/moved/a2", Added),
        ("/empty/moved/b", Added),
        ("/empty/moved/new", Added),
        ("/empty/moved/sub", Added),
        ("/empty/moved/sub/deep", Added),
        ("/empty/moved/sub/deep/d", Added),
        ("/empty/moved/up", Added),
        // They changed places: what is the same in both is not listed.
        ("/tree/in/it/f", Modified),
        ("/tree/only-tree", Deleted),
        ("/tree/only-two", Added),
        ("/two/in/it/f", Modified),
        ("/two/only-tree", Added),
        ("/two/only-two", Deleted),
    ]
    .map(|(path, kind)| (path.to_owned(), kind))
    .to_vec();
    same!(list(fsoverlay::changes_of(&spec(world))?), wanted);
    same!(list(fsoverlay::changes(&world.upper(), &[world.lower()])?), wanted);
    // The same when it is all in the upper.
    holds!(fsoverlay::export(&spec(world))? == 3);
    same!(list(fsoverlay::changes_of(&spec(world))?), wanted);
    Ok(())
}

fn rename_for_list(_: &[String]) -> Check {
    fs::rename("dir", "empty/moved")?;
    fs::write("empty/moved/new", "")?;
    fs::remove_file("empty/moved/sub/c")?;
    renameat("two", "tree", RenameFlags::EXCHANGE)
}

fn exported(world: &mut World) -> Check {
    make_trees(&world.lower())?;
    let [before, after, theirs] =
        ["before", "after", "kernel"].map(|name| world.path("other").join(name).display().to_string());
    world.mount().arg("rename").arg(&before).run()?;
    holds!(fsoverlay::export(&spec(world))? > 3);
    same!(fsoverlay::export(&spec(world))?, 0);
    world.mount().arg("look").arg(&after).run()?;
    same!(fs::read_to_string(&after)?, fs::read_to_string(&before)?);
    match world.mount().flag("--kernel").arg("look").arg(&theirs).run() {
        Err(failure) if no_kernel_overlay(&failure) => {
            return Err(Failure::Skip("the kernel does not mount an overlay here".to_owned()));
        }
        other => other.map(drop)?,
    }
    let _ = fs::set_permissions(world.path("work/work"), std::os::unix::fs::PermissionsExt::from_mode(0o700));
    same!(fs::read_to_string(theirs)?, fs::read_to_string(before)?);
    Ok(())
}

fn rename_for_export(args: &[String]) -> Check {
    let [step, file] = args else { return Err("two arguments are wanted".into()) };
    if step == "rename" {
        fs::rename("dir/sub", "dir/bus")?;
        fs::rename("dir", "empty/moved")?;
        fs::rename("empty/moved/bus/deep", "deep")?;
        fs::create_dir("empty/moved/fresh")?;
        fs::rename("tree/in", "empty/moved/fresh/in")?;
        fs::write("empty/moved/fresh/in/new", "")?;
        fs::remove_file("empty/moved/b")?;
        // At the old places, and one that was renamed and is back.
        fs::create_dir("dir")?;
        fs::write("dir/a", "another")?;
        fs::rename("two", "three")?;
        fs::rename("three", "two")?;
    }
    fs::write(file, format!("{:#?}", shown()?))?;
    Ok(())
}
