//! Hard links of a layer: one file, whichever of its names was used before, and after every remount.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode, RenameFlags, mknodat, renameat_with};

use crate::harness::{Case, Check, Failure, World, errno, holds, same};
use crate::semantics::drop_caches;

pub(crate) const CASES: &[Case] = &[
    Case { name: "names_of_a_changed_file_move_together_later", outside: stepwise, inside: step },
    Case { name: "entries_of_hard_links_are_swept", outside: swept, inside: sweep_step },
    Case { name: "exported_uppers_have_all_names", outside: exported, inside: sweep_step },
    Case { name: "many_names_changed_by_threads", outside: by_threads, inside: change_by_threads },
];

/// Each is a mount of its own: what one run did, the next one sees. `a*` are one file, and so on.
const STEPS: [fn() -> Check; 9] = [
    || {
        // One name of four is known.
        fs::write("a1", "new")?;
        same!(fs::metadata("a1")?.nlink(), 4);
        // Changed under a name that goes, open or not.
        fs::write("b1", "newer")?;
        let open = OpenOptions::new().read(true).write(true).open("b1")?;
        fs::remove_file("b1")?;
        same!(open.metadata()?.nlink(), 2);
        open.write_all_at(b"NEWER", 0)?;
        // Names that go, of a file that stays what it is.
        same!(fs::metadata("d/c1")?.nlink(), 3);
        fs::remove_file("d/c1")?;
        same!(fs::metadata("c2")?.nlink(), 2);
        // Links and fifos.
        let time = rustix::fs::Timespec { tv_sec: 7, tv_nsec: 8 };
        let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, "l1", &times, AtFlags::SYMLINK_NOFOLLOW)?;
        fs::set_permissions("p1", fs::Permissions::from_mode(0o640))?;
        fs::write("x", "x")?;
        // Over one of two, as package managers do it.
        fs::rename("x", "e1")?;
        Ok(())
    },
    || {
        // Another name, never looked up, after a remount.
        same!(fs::metadata("a2")?.nlink(), 4);
        same!(fs::read_to_string("a2")?, "new");
        same!(fs::read_to_string("b2")?, "NEWER");
        same!(fs::metadata("b2")?.nlink(), 2);
        same!(fs::metadata("c2")?.nlink(), 2);
        same!(fs::read_to_string("c2")?, "c");
        same!(fs::symlink_metadata("l2")?.mtime(), 7);
        same!(fs::symlink_metadata("l2")?.nlink(), 3);
        same!(fs::read_link("l2")?, Path::new("target"));
        same!(fs::symlink_metadata("p2")?.mode() & 0o777, 0o640);
        holds!(fs::symlink_metadata("p2")?.file_type().is_fifo());
        same!((fs::read_to_string("e1")?, fs::metadata("e1")?.nlink()), ("x".to_owned(), 1));
        same!((fs::read_to_string("e2")?, fs::metadata("e2")?.nlink()), ("e".to_owned(), 1));
        fs::remove_file("l1")?;
        fs::remove_file("l2")?;
        Ok(())
    },
    || {
        same!(fs::symlink_metadata("l3")?.mtime(), 7);
        same!(fs::symlink_metadata("l3")?.nlink(), 1);
        // Through a third name; all see it.
        fs::write("d/a3", "by three")?;
        same!(fs::read_to_string("a1")?, "by three");
        same!(fs::metadata("d/a3")?.ino(), fs::metadata("a1")?.ino());
        fs::remove_file("c2")?;
        Ok(())
    },
    || {
        same!(fs::metadata("c3")?.nlink(), 1);
        fs::write("c3", "C")?;
        // A new name of a file, some of whose names are unknown.
        fs::hard_link("a1", "a5")?;
        same!(fs::metadata("a5")?.nlink(), 5);
        // A name that was not looked up is moved, exchanged, replaced.
        fs::rename("a4", "d/a4")?;
        renameat_with(CWD, "b3", CWD, "e2", RenameFlags::EXCHANGE)?;
        same!(fs::read_to_string("e2")?, "NEWER");
        same!(fs::metadata("d/a4")?.nlink(), 5);
        Ok(())
    },
    || {
        same!(fs::read_to_string("c3")?, "C");
        same!(fs::read_to_string("d/a4")?, "by three");
        same!(fs::metadata("d/a4")?.nlink(), 5);
        same!(fs::read_to_string("e2")?, "NEWER");
        same!(fs::read_to_string("b3")?, "e");
        same!(fs::metadata("b2")?.ino(), fs::metadata("e2")?.ino());
        same!(fs::metadata("b2")?.nlink(), 2);
        for name in ["a1", "a2", "d/a3", "a5"] {
            fs::remove_file(name)?;
        }
        Ok(())
    },
    || {
        same!((fs::read_to_string("d/a4")?, fs::metadata("d/a4")?.nlink()), ("by three".to_owned(), 1));
        errno!(fs::metadata("a1"), NOENT);
        // All names of a changed file go while only one was ever used.
        fs::write("f1", "changed")?;
        fs::remove_file("f1")?;
        let open = fs::File::open("f2")?;
        fs::remove_file("f2")?;
        same!(open.metadata()?.nlink(), 0);
        let mut text = [0; 7];
        open.read_exact_at(&mut text, 0)?;
        same!(&text, b"changed");
        fs::write("f1", "other")?;
        Ok(())
    },
    || {
        same!((fs::read_to_string("f1")?, fs::metadata("f1")?.nlink()), ("other".to_owned(), 1));
        errno!(fs::metadata("f2"), NOENT);
        // In a directory that is renamed with names in it.
        fs::write("g1", "moved")?;
        fs::rename("d", "D")?;
        Ok(())
    },
    || {
        same!(fs::read_to_string("D/g2")?, "moved");
        same!((fs::metadata("D/g2")?.ino(), fs::metadata("D/g2")?.nlink()), (fs::metadata("g1")?.ino(), 2));
        fs::write("D/g2", "again")?;
        Ok(())
    },
    || {
        same!(fs::read_to_string("g1")?, "again");
        Ok(())
    },
];

fn make_links(dir: &Path) -> Check {
    fs::create_dir(dir.join("d"))?;
    for names in [
        &["a1", "a2", "d/a3", "a4"][..],
        &["b1", "b2", "b3"],
        &["d/c1", "c2", "c3"],
        &["e1", "e2"],
        &["f1", "f2"],
        &["g1", "d/g2"],
        &["l1", "l2", "l3"],
        &["p1", "p2"],
    ] {
        let first = dir.join(names[0]);
        match names[0] {
            "l1" => symlink("target", &first)?,
            "p1" => mknodat(CWD, &first, FileType::Fifo, Mode::from_raw_mode(0o600), 0)?,
            name => fs::write(&first, &name.trim_start_matches("d/")[..1])?,
        }
        for name in &names[1..] {
            rustix::fs::linkat(CWD, &first, CWD, dir.join(name), AtFlags::empty())?;
        }
    }
    Ok(())
}

fn stepwise(world: &mut World) -> Check {
    make_links(&world.lower())?;
    let numbers = world.path("other/numbers").display().to_string();
    for i in 0..STEPS.len() {
        world.mount().arg(i.to_string()).arg(&numbers).run()?;
    }
    // All the names are known by now, and nothing waits for one.
    same!(fs::read_dir(world.path("work/links"))?.count(), 0);
    for (name, text) in [("a1", "a"), ("b1", "b"), ("d/c1", "c"), ("f2", "f"), ("g1", "g")] {
        same!(fs::read_to_string(world.lower().join(name))?, text);
    }
    Ok(())
}

fn step(args: &[String]) -> Check {
    let [step, numbers] = args else { return Err("two arguments are wanted".into()) };
    // One number each, whatever happens to it.
    let number = |name: &str| fs::symlink_metadata(name).map(|meta| meta.ino()).ok();
    let (files, last) = (["c3", "p2", "l3", "b2"], step == "8");
    let before = fs::read_to_string(numbers).unwrap_or_default();
    STEPS.get(step.parse::<usize>()?).ok_or("no such step")?()?;
    drop_caches();
    let mut now = String::new();
    // In the first runs the others are left alone: looking at them would bring them up.
    for name in if step.parse::<usize>()? < 3 { &files[..0] } else { &files[..] } {
        now.push_str(&format!("{name} {:?}\n", number(name)));
    }
    holds!(before.is_empty() || now.is_empty() || now == before, "{before}{now}");
    fs::write(numbers, now)?;
    if last {
        // As a listing tells them.
        let mut all = std::collections::BTreeMap::new();
        crate::semantics::walk(Path::new("."), &mut all)?;
    }
    Ok(())
}

fn swept(world: &mut World) -> Check {
    make_links(&world.lower())?;
    world.mount().arg("change").run()?;
    let links = world.path("work/links");
    let entries = || -> Result<Vec<std::path::PathBuf>, Failure> {
        let mut all = fs::read_dir(&links)?.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>()?;
        all.sort();
        Ok(all)
    };
    same!(entries()?.len(), 1);
    // As a server leaves it that is killed at the end: no name any more, and none to come.
    let entry = entries()?.remove(0);
    rustix::fs::setxattr(&entry, "user.fsoverlay.links", b"0", rustix::fs::XattrFlags::empty())?;
    fs::remove_file(world.upper().join("e1"))?;
    // Whoever only lists changes leaves it alone.
    fsoverlay::changes_of(&crate::disk::spec(world))?;
    same!(entries()?.len(), 1);
    world.mount().arg("look").run()?;
    same!(entries()?.len(), 0);
    // Strange entries, and those of somebody else, mislead nobody.
    fs::write(links.join("fs=i1:2"), "a trap")?;
    fs::write(links.join("nonsense"), "")?;
    fs::write(links.join("fs=i1:3-x"), "")?;
    symlink("/etc/passwd", links.join("fs=i1:4"))?;
    fs::write(&entry, "not a copy")?;
    world.mount().arg("trap").run()?;
    Ok(())
}

fn exported(world: &mut World) -> Check {
    make_links(&world.lower())?;
    world.mount().arg("change").run()?;
    holds!(!world.upper().join("e2").exists());
    same!(fsoverlay::export(&crate::disk::spec(world))?, 0);
    same!(fs::metadata(world.upper().join("e2"))?.ino(), fs::metadata(world.upper().join("e1"))?.ino());
    same!(fs::metadata(world.upper().join("e2"))?.nlink(), 2);
    // What was not changed stays where it was.
    holds!(!world.upper().join("a1").exists());
    Ok(())
}

fn sweep_step(args: &[String]) -> Check {
    match args.first().map(String::as_str) {
        Some("change") => fs::write("e1", "changed")?,
        Some("look") => same!(fs::read_to_string("a1")?, "a"),
        _ => {
            for name in ["a1", "a2", "b1", "e2", "c2"] {
                fs::set_permissions(name, fs::Permissions::from_mode(0o600))?;
            }
            fs::write("e2", "fresh")?;
        }
    }
    Ok(())
}

const NAMES: usize = 200;

fn by_threads(world: &mut World) -> Check {
    fs::create_dir(world.lower().join("t"))?;
    for file in 0..4 {
        let first = world.lower().join(format!("t/f{file}-0"));
        fs::write(&first, "old")?;
        for i in 1..NAMES {
            fs::hard_link(&first, world.lower().join(format!("t/f{file}-{i}")))?;
        }
    }
    world.mount().arg("change").run()?;
    world.mount().arg("look").run()?;
    Ok(())
}

fn change_by_threads(args: &[String]) -> Check {
    let name = |file: usize, i: usize| format!("t/f{file}-{i}");
    // Three of four names are used at once: looked at, written to, removed; the others later.
    if args.first().map(String::as_str) == Some("change") {
        let failures = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..3)
                .map(|kind| {
                    scope.spawn(move || -> std::io::Result<()> {
                        for i in (kind..NAMES).step_by(4) {
                            for file in 0..4 {
                                match kind {
                                    0 => fs::metadata(name(file, i)).map(|_| ())?,
                                    1 => OpenOptions::new()
                                        .write(true)
                                        .open(name(file, i))?
                                        .write_all_at(b"new", 0)?,
                                    _ => fs::remove_file(name(file, i))?,
                                }
                            }
                        }
                        Ok(())
                    })
                })
                .collect();
            threads
                .into_iter()
                .filter_map(|thread| {
                    thread.join().map_or(Some(std::io::Error::other("a panic")), Result::err)
                })
                .collect::<Vec<_>>()
        });
        holds!(failures.is_empty(), "{failures:?}");
    }
    for file in 0..4 {
        let mut numbers = std::collections::BTreeSet::new();
        for i in (0..NAMES).filter(|i| i % 4 != 2 && (i % 4 != 3 || !args.iter().any(|arg| arg == "change")))
        {
            same!(fs::read_to_string(name(file, i))?, "new", "{file} {i}");
            let meta = fs::metadata(name(file, i))?;
            same!(meta.nlink(), NAMES as u64 * 3 / 4, "{file} {i}");
            numbers.insert(meta.ino());
        }
        same!(numbers.len(), 1);
        errno!(fs::metadata(name(file, 2)), NOENT);
    }
    Ok(())
}
