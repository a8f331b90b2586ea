//! What programs see: Linux semantics over an upper and lowers.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FallocateFlags, Mode, OFlags, RenameFlags, fallocate, renameat_with};
use rustix::io::Errno;

use crate::harness::{Case, Check, Failure, World, errno, errno_of, holds, same};

pub(crate) const CASES: &[Case] = &[
    Case { name: "files_are_made_written_and_read_back", outside: simple, inside: files },
    Case { name: "renames_of_every_kind", outside: with_tree, inside: renames },
    Case { name: "a_lower_directory_can_be_renamed", outside: renamed_dir_stays, inside: rename_lower_dir },
    Case {
        name: "old_descriptors_and_mappings_see_later_writes",
        outside: with_tree,
        inside: old_descriptors,
    },
    Case { name: "unlinked_open_files_go_on", outside: with_tree, inside: unlinked },
    Case { name: "inode_numbers_stay_and_agree", outside: with_tree, inside: numbers },
    Case { name: "numbers_used_again_stay", outside: simple, inside: reuse_numbers },
    Case { name: "copy_up_keeps_everything", outside: copy_up_source, inside: copy_up },
    Case { name: "hard_links_of_a_lower_move_together", outside: linked, inside: hard_links },
    Case { name: "other_names_of_a_changed_file_outlive_it", outside: pairs, inside: remove_changed },
    Case { name: "links_and_symlinks", outside: with_tree, inside: links },
    Case { name: "deleted_and_recreated_directories_are_empty", outside: recreated, inside: recreate },
    Case { name: "sparse_files_and_ranges", outside: simple, inside: sparse },
    Case { name: "locks_work_between_descriptors", outside: simple, inside: locks },
    Case { name: "times_are_set_to_the_nanosecond", outside: with_tree, inside: times },
    Case { name: "fifty_thousand_entries", outside: simple, inside: many_entries },
    Case { name: "listing_goes_on_while_entries_go", outside: crowded, inside: unlink_while_listing },
    Case { name: "names_of_255_bytes", outside: long_names, inside: use_long_names },
    Case { name: "without_an_upper_everything_is_read_only", outside: read_only, inside: refuse_changes },
    Case { name: "layers_merge_and_hide", outside: layered, inside: merged },
    Case { name: "hidden_generated_and_unreadable", outside: host_like, inside: host_view },
    Case { name: "what_is_replaced_in_a_layer_is_found_again", outside: replaced_below, inside: find_again },
    Case { name: "directories_thousands_deep", outside: simple, inside: deep },
];

pub(crate) fn simple(world: &mut World) -> Check {
    world.mount().run()?;
    no_leftovers(world)
}

/// The work directory holds nothing but the owners of links.
pub(crate) fn no_leftovers(world: &World) -> Check {
    for entry in fs::read_dir(world.path("work"))? {
        let name = entry?.file_name();
        holds!(name == "owners" || name == "links", "{name:?}");
    }
    Ok(())
}

/// A lower with a few of everything.
pub(crate) fn make_tree(lower: &Path) -> Check {
    fs::create_dir_all(lower.join("dir/sub/deep"))?;
    fs::create_dir(lower.join("empty"))?;
    fs::write(lower.join("file"), "lower\n")?;
    fs::write(lower.join("dir/a"), "a")?;
    fs::write(lower.join("dir/b"), "b")?;
    fs::write(lower.join("dir/sub/c"), "c")?;
    fs::write(lower.join("dir/sub/deep/d"), "d")?;
    symlink("file", lower.join("link"))?;
    symlink("../file", lower.join("dir/up"))?;
    fs::hard_link(lower.join("dir/a"), lower.join("dir/a2"))?;
    Ok(())
}

fn with_tree(world: &mut World) -> Check {
    make_tree(&world.lower())?;
    world.mount().run()?;
    same!(fs::read(world.lower().join("file"))?, b"lower\n");
    same!(fs::read(world.lower().join("dir/sub/deep/d"))?, b"d");
    no_leftovers(world)
}

fn files(_: &[String]) -> Check {
    fs::write("f", "hello")?;
    let mut file = OpenOptions::new().append(true).open("f")?;
    file.write_all(b" world")?;
    same!(fs::read_to_string("f")?, "hello world");
    // Two appenders never overwrite each other.
    let mut other = OpenOptions::new().append(true).open("f")?;
    for _ in 0..100 {
        file.write_all(b"1")?;
        other.write_all(b"2")?;
    }
    same!(fs::metadata("f")?.len(), 211);
    OpenOptions::new().write(true).open("f")?.set_len(5)?;
    same!(fs::read_to_string("f")?, "hello");
    File::create("f")?;
    same!(fs::metadata("f")?.len(), 0);
    errno!(OpenOptions::new().write(true).create_new(true).open("f"), EXIST);
    // The creator may write what nobody may write afterwards.
    let mut once = OpenOptions::new().write(true).create_new(true).mode(0o444).open("once")?;
    once.write_all(b"x")?;
    drop(once);
    same!(fs::metadata("once")?.mode() & 0o7777, 0o444);
    let big = vec![7; 3 << 20];
    fs::write("big", &big)?;
    File::open("big")?.sync_all()?;
    holds!(fs::read("big")? == big);
    errno!(fs::read("missing"), NOENT);
    errno!(fs::read_dir("f"), NOTDIR);
    errno!(fs::remove_dir("f"), NOTDIR);
    fs::create_dir("d")?;
    errno!(fs::create_dir("d"), EXIST);
    fs::write("d/x", "")?;
    errno!(fs::remove_dir("d"), NOTEMPTY);
    errno!(fs::remove_file("d"), ISDIR);
    fs::remove_file("d/x")?;
    fs::remove_dir("d")?;
    // Direct I/O takes the same way.
    match OpenOptions::new().read(true).custom_flags(OFlags::DIRECT.bits().cast_signed()).open("big") {
        Ok(file) => drop(file),
        Err(err) => return Err(err.into()),
    }
    // Callers fall back to a named file.
    errno!(
        rustix::fs::openat(CWD, ".", OFlags::TMPFILE | OFlags::RDWR, Mode::from_raw_mode(0o600)),
        OPNOTSUPP
    );
    let st = rustix::fs::statvfs(".")?;
    holds!(st.f_blocks > 0 && st.f_namemax == 255);
    File::open(".")?.sync_all()?;
    Ok(())
}

fn rename(from: &str, to: &str, flags: RenameFlags) -> rustix::io::Result<()> {
    renameat_with(CWD, from, CWD, to, flags)
}

fn renames(_: &[String]) -> Check {
    // Files.
    fs::rename("file", "moved")?;
    same!(fs::read_to_string("moved")?, "lower\n");
    errno!(fs::metadata("file"), NOENT);
    fs::write("file", "new")?;
    fs::rename("moved", "file")?;
    same!(fs::read_to_string("file")?, "lower\n");
    errno!(rename("file", "dir/b", RenameFlags::NOREPLACE), EXIST);
    rename("file", "fresh", RenameFlags::NOREPLACE)?;
    rename("fresh", "dir/b", RenameFlags::EXCHANGE)?;
    same!(fs::read_to_string("fresh")?, "b");
    same!(fs::read_to_string("dir/b")?, "lower\n");
    errno!(rename("fresh", "nothing", RenameFlags::EXCHANGE), NOENT);
    // Between lower objects that nobody touched before.
    fs::rename("dir/sub/c", "dir/a2")?;
    same!(fs::read_to_string("dir/a2")?, "c");
    same!(fs::read_to_string("dir/a")?, "a");
    // Directories: made here, over an empty one, into a subdirectory.
    fs::create_dir("made")?;
    fs::write("made/x", "x")?;
    fs::rename("made", "made2")?;
    fs::rename("made2", "empty")?;
    same!(fs::read_to_string("empty/x")?, "x");
    errno!(fs::rename("empty", "dir"), NOTEMPTY);
    errno!(fs::rename("empty", "fresh"), NOTDIR);
    errno!(fs::rename("fresh", "empty"), ISDIR);
    errno!(fs::rename("dir", "dir/sub/inside"), INVAL);
    // A directory and a file change places.
    rename("empty", "fresh", RenameFlags::EXCHANGE)?;
    same!(fs::read_to_string("fresh/x")?, "x");
    same!(fs::read_to_string("empty")?, "b");
    // A symbolic link is renamed itself.
    fs::rename("link", "dir/link2")?;
    same!(fs::read_link("dir/link2")?, Path::new("file"));
    // A directory emptied of lower entries is empty.
    fs::create_dir("source")?;
    fs::remove_file("dir/sub/deep/d")?;
    fs::rename("source", "dir/sub/deep")?;
    same!(fs::read_dir("dir/sub/deep")?.count(), 0);
    fs::write("dir/sub/deep/new", "")?;
    // Onto itself, and onto another name of itself.
    fs::hard_link("fresh/x", "fresh/y")?;
    fs::rename("fresh/x", "fresh/y")?;
    same!(fs::read_dir("fresh")?.count(), 2);
    Ok(())
}

fn rename_lower_dir(args: &[String]) -> Check {
    let check = |at: &str| -> Check {
        same!(fs::read_to_string(format!("{at}/sub/deep/d"))?, "d");
        same!(fs::read_to_string(format!("{at}/a2"))?, "a");
        same!(fs::read_link(format!("{at}/up"))?, Path::new("../file"));
        let mut names: Vec<_> =
            fs::read_dir(at)?.map(|e| e.map(|e| e.file_name())).collect::<Result<_, _>>()?;
        names.sort();
        same!(names, ["a", "a2", "b", "sub", "up"]);
        Ok(())
    };
    if args.first().map(String::as_str) == Some("again") {
        errno!(fs::metadata("dir"), NOENT);
        return check("empty/dir");
    }
    let number = fs::metadata("dir/sub")?.ino();
    let open = File::open("dir/sub/c")?;
    let before = fs::metadata("dir")?;
    fs::rename("dir", "moved")?;
    errno!(fs::metadata("dir"), NOENT);
    errno!(fs::metadata("dir/sub/deep/d"), NOENT);
    check("moved")?;
    let after = fs::metadata("moved")?;
    same!(
        (before.ino(), before.mtime(), before.mtime_nsec()),
        (after.ino(), after.mtime(), after.mtime_nsec())
    );
    same!(fs::metadata("moved/sub")?.ino(), number);
    let mut text = String::new();
    let mut open = open;
    open.read_to_string(&mut text)?;
    same!(text, "c");
    // What is made at the old place has nothing of the old content.
    fs::create_dir("dir")?;
    same!(fs::read_dir("dir")?.count(), 0);
    fs::rename("dir", "dir2")?;
    fs::remove_dir("dir2")?;
    // Into a directory that is only in the lower itself.
    fs::rename("moved", "empty/dir")?;
    check("empty/dir")
}

fn renamed_dir_stays(world: &mut World) -> Check {
    make_tree(&world.lower())?;
    world.mount().run()?;
    world.mount().arg("again").run()?;
    no_leftovers(world)
}

fn old_descriptors(_: &[String]) -> Check {
    let old = File::open("file")?;
    let map = Mapping::new(&old, 6)?;
    same!(map.bytes(), b"lower\n");
    let writer = OpenOptions::new().write(true).open("file")?;
    writer.write_all_at(b"UPPER", 0)?;
    let mut buf = [0; 5];
    old.read_exact_at(&mut buf, 0)?;
    same!(&buf, b"UPPER");
    same!(map.bytes(), b"UPPER\n");
    writer.sync_all()?;
    old.read_exact_at(&mut buf, 0)?;
    same!(&buf, b"UPPER");
    // Writing through a shared mapping of a lower file.
    let file = OpenOptions::new().read(true).write(true).open("dir/b")?;
    let mut map = Mapping::new_writable(&file, 1)?;
    map.bytes_mut()[0] = b'M';
    drop(map);
    file.sync_all()?;
    same!(fs::read("dir/b")?, b"M");
    Ok(())
}

fn unlinked(_: &[String]) -> Check {
    // Of a lower, written after the unlink.
    let file = OpenOptions::new().read(true).write(true).open("file")?;
    fs::remove_file("file")?;
    errno!(fs::metadata("file"), NOENT);
    file.write_all_at(b"L", 0)?;
    file.sync_all()?;
    let mut buf = [0; 6];
    file.read_exact_at(&mut buf, 0)?;
    same!(&buf, b"Lower\n");
    same!(file.metadata()?.nlink(), 0);
    file.set_len(2)?;
    same!(file.metadata()?.len(), 2);
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    // A new file of the name is another one.
    fs::write("file", "other")?;
    holds!(fs::metadata("file")?.ino() != file.metadata()?.ino());
    file.read_exact_at(&mut buf[..2], 0)?;
    same!(&buf[..2], b"Lo");
    // Of the upper, replaced by a rename.
    fs::write("x", "old")?;
    fs::write("y", "new")?;
    let old = OpenOptions::new().read(true).write(true).open("x")?;
    fs::rename("y", "x")?;
    old.write_all_at(b"OLD", 0)?;
    old.sync_all()?;
    same!(fs::read_to_string("x")?, "new");
    same!(old.metadata()?.nlink(), 0);
    // More of them than descriptors are kept for.
    let mut files = Vec::new();
    for i in 0..300u32 {
        let name = format!("n{i}");
        fs::write(&name, i.to_string())?;
        files.push(OpenOptions::new().read(true).write(true).open(&name)?);
        fs::remove_file(&name)?;
    }
    for (i, file) in files.iter_mut().enumerate() {
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        same!(text, i.to_string());
        file.write_all(b"!")?;
        file.sync_all()?;
    }
    // A directory that is gone but somebody's working directory.
    fs::create_dir("gone")?;
    let dir = File::open("gone")?;
    fs::remove_dir("gone")?;
    same!(dir.metadata()?.nlink(), 0);
    errno!(rustix::fs::openat(&dir, "x", OFlags::CREATE | OFlags::RDWR, Mode::from_raw_mode(0o600)), NOENT);
    fs::create_dir("gone")?;
    fs::write("gone/x", "")?;
    Ok(())
}

/// Numbers of all entries as listing tells them, and of all as stat does.
pub(crate) fn walk(dir: &Path, all: &mut BTreeMap<PathBuf, (u64, u64)>) -> Check {
    let mut raw = BTreeMap::new();
    let fd = rustix::fs::openat(CWD, dir, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?;
    for entry in rustix::fs::Dir::read_from(fd)? {
        let entry = entry?;
        raw.insert(entry.file_name().to_string_lossy().into_owned(), entry.ino());
    }
    same!(raw.get("."), Some(&fs::metadata(dir)?.ino()), "{}", dir.display());
    for (name, listed) in raw {
        if name == "." || name == ".." {
            continue;
        }
        let path = dir.join(name);
        let meta = fs::symlink_metadata(&path)?;
        same!(listed, meta.ino(), "{}", path.display());
        if meta.is_dir() {
            walk(&path, all)?;
        }
        all.insert(path, (meta.dev(), meta.ino()));
    }
    Ok(())
}

fn numbers(_: &[String]) -> Check {
    let mut before = BTreeMap::new();
    walk(Path::new("."), &mut before)?;
    let dev = fs::metadata(".")?.dev();
    holds!(before.values().all(|v| v.0 == dev));
    same!(before[Path::new("./dir/a")], before[Path::new("./dir/a2")]);
    let mut distinct: Vec<u64> = before.values().map(|v| v.1).collect();
    distinct.sort_unstable();
    distinct.dedup();
    same!(distinct.len(), before.len() - 1);
    // Everything is copied up: files by a write, links and directories by their times.
    for path in before.keys() {
        let now = rustix::fs::Timestamps {
            last_access: rustix::fs::Timespec { tv_sec: 1, tv_nsec: 2 },
            last_modification: rustix::fs::Timespec { tv_sec: 3, tv_nsec: 4 },
        };
        rustix::fs::utimensat(CWD, path, &now, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?;
    }
    let mut after = BTreeMap::new();
    walk(Path::new("."), &mut after)?;
    same!(after, before);
    // Also when the kernel has forgotten all of it.
    drop_caches();
    let mut after = BTreeMap::new();
    walk(Path::new("."), &mut after)?;
    same!(after, before);
    fs::rename("dir", "dir2")?;
    drop_caches();
    let mut after = BTreeMap::new();
    walk(Path::new("."), &mut after)?;
    let renamed: BTreeMap<PathBuf, (u64, u64)> = before
        .into_iter()
        .map(|(path, v)| {
            let path = match path.strip_prefix("./dir") {
                Ok(rest) if rest.as_os_str().is_empty() => PathBuf::from("./dir2"),
                Ok(rest) => Path::new("./dir2").join(rest),
                Err(_) => path,
            };
            (path, v)
        })
        .collect();
    same!(after, renamed);
    Ok(())
}

/// The file system below gives the number of what has just been removed to the next
/// object, often before the kernel has forgotten the old one.
fn reuse_numbers(_: &[String]) -> Check {
    for round in 0..200 {
        for name in ["a", "b"] {
            let _ = fs::remove_file(name);
            symlink(round.to_string(), name)?;
        }
        let _ = fs::remove_dir("d");
        fs::create_dir("d")?;
        let mut all = BTreeMap::new();
        walk(Path::new("."), &mut all)?;
        same!(all.len(), 3);
    }
    Ok(())
}

/// Asks the kernel to forget; only root may, and the test is weaker without.
pub(crate) fn drop_caches() {
    let _ = fs::write("/proc/sys/vm/drop_caches", "2");
}

fn copy_up_source(world: &mut World) -> Check {
    let lower = world.lower();
    fs::create_dir(lower.join("d"))?;
    let file = File::create(lower.join("d/sparse"))?;
    file.write_all_at(b"start", 0)?;
    file.write_all_at(b"end", 8 << 20)?;
    file.set_len(16 << 20)?;
    file.set_permissions(fs::Permissions::from_mode(0o640))?;
    xattr_set(&lower.join("d/sparse"), "user.kept", b"value")?;
    xattr_set(&lower.join("d"), "user.dir", b"too")?;
    let past = |sec| {
        let t = rustix::fs::Timespec { tv_sec: sec, tv_nsec: 123_456_789 };
        rustix::fs::Timestamps { last_access: t, last_modification: t }
    };
    rustix::fs::utimensat(CWD, lower.join("d/sparse"), &past(1_000_000), rustix::fs::AtFlags::empty())?;
    rustix::fs::utimensat(CWD, lower.join("d"), &past(2_000_000), rustix::fs::AtFlags::empty())?;
    world.mount().run()?;
    let copy = fs::metadata(world.upper().join("d/sparse"))?;
    holds!(copy.blocks() * 512 < 1 << 20, "{} blocks", copy.blocks());
    no_leftovers(world)
}

fn xattr_set(path: &Path, name: &str, value: &[u8]) -> Check {
    Ok(rustix::fs::setxattr(path, name, value, rustix::fs::XattrFlags::empty())?)
}

fn xattr_get(path: &str, name: &str) -> Result<Vec<u8>, Failure> {
    let mut buf = vec![0; 256];
    let n = rustix::fs::getxattr(path, name, buf.as_mut_slice())?;
    buf.truncate(n);
    Ok(buf)
}

fn copy_up(_: &[String]) -> Check {
    let file = fs::metadata("d/sparse")?;
    let dir = fs::metadata("d")?;
    fs::set_permissions("d/sparse", fs::Permissions::from_mode(0o640))?;
    let copy = fs::metadata("d/sparse")?;
    same!((copy.len(), copy.mode(), copy.ino()), (file.len(), file.mode(), file.ino()));
    same!((copy.mtime(), copy.mtime_nsec()), (1_000_000, 123_456_789));
    same!((copy.atime(), copy.atime_nsec()), (1_000_000, 123_456_789));
    same!(xattr_get("d/sparse", "user.kept")?, b"value");
    same!(xattr_get("d", "user.dir")?, b"too");
    let after = fs::metadata("d")?;
    same!((after.mtime(), after.mtime_nsec(), after.ino()), (dir.mtime(), dir.mtime_nsec(), dir.ino()));
    let mut text = [0; 3];
    File::open("d/sparse")?.read_exact_at(&mut text, 8 << 20)?;
    same!(&text, b"end");
    Ok(())
}

fn linked(world: &mut World) -> Check {
    fs::create_dir(world.lower().join("d"))?;
    fs::write(world.lower().join("one"), "content")?;
    for name in ["two", "d/three", "d/unseen"] {
        fs::hard_link(world.lower().join("one"), world.lower().join(name))?;
    }
    world.mount().run()?;
    let one = fs::metadata(world.upper().join("one"))?;
    for name in ["two", "d/three", "d/unseen"] {
        same!(fs::metadata(world.upper().join(name))?.ino(), one.ino());
    }
    Ok(())
}

fn pairs(world: &mut World) -> Check {
    for (one, other) in [("a", "b"), ("c", "d"), ("e", "f"), ("g", "h"), ("i", "j")] {
        fs::write(world.lower().join(one), "old")?;
        fs::hard_link(world.lower().join(one), world.lower().join(other))?;
    }
    world.mount().run()?;
    same!(fs::read(world.upper().join("b"))?, b"newer");
    same!(fs::read(world.upper().join("d"))?, b"new");
    holds!(!world.upper().join("h").exists());
    no_leftovers(world)
}

fn remove_changed(_: &[String]) -> Check {
    fs::write("x", "other")?;
    for name in ["a", "c", "e", "g"] {
        fs::write(name, "new")?;
    }
    let open = File::open("a")?;
    fs::remove_file("a")?;
    fs::rename("x", "c")?;
    fs::remove_file("e")?;
    fs::remove_file("g")?;
    same!(open.metadata()?.nlink(), 1);
    // Changed after its name was gone.
    let late = OpenOptions::new().read(true).write(true).open("i")?;
    fs::remove_file("i")?;
    late.write_all_at(b"new", 0)?;
    late.sync_all()?;
    same!(late.metadata()?.nlink(), 1);
    for name in ["b", "d", "f", "j"] {
        same!(fs::read(name)?, b"new", "{name}");
        same!(fs::metadata(name)?.nlink(), 1, "{name}");
    }
    same!(fs::metadata("b")?.ino(), open.metadata()?.ino());
    fs::write("b", "newer")?;
    same!(fs::read("b")?, b"newer");
    let mut read = [0; 5];
    open.read_exact_at(&mut read, 0)?;
    same!(&read, b"newer");
    fs::hard_link("b", "a")?;
    same!(open.metadata()?.nlink(), 2);
    fs::remove_file("a")?;
    fs::remove_file("f")?;
    holds!(!Path::new("f").exists());
    same!(fs::read("c")?, b"other");
    Ok(())
}

fn hard_links(_: &[String]) -> Check {
    let links = fs::metadata("one")?.nlink();
    same!(links, 4);
    same!(fs::metadata("two")?.ino(), fs::metadata("d/three")?.ino());
    fs::write("two", "CHANGED")?;
    for name in ["one", "two", "d/three", "d/unseen"] {
        same!(fs::read_to_string(name)?, "CHANGED", "{name}");
        same!(fs::metadata(name)?.nlink(), 4, "{name}");
    }
    fs::hard_link("one", "five")?;
    same!(fs::metadata("d/unseen")?.nlink(), 5);
    fs::remove_file("five")?;
    same!(fs::metadata("one")?.nlink(), 4);
    Ok(())
}

fn links(_: &[String]) -> Check {
    fs::hard_link("file", "hard")?;
    same!(fs::metadata("hard")?.nlink(), 2);
    same!(fs::metadata("hard")?.ino(), fs::metadata("file")?.ino());
    fs::write("hard", "both")?;
    same!(fs::read_to_string("file")?, "both");
    fs::remove_file("file")?;
    same!(fs::read_to_string("hard")?, "both");
    same!(fs::metadata("hard")?.nlink(), 1);
    // Over the whiteout of the old name.
    fs::hard_link("hard", "file")?;
    same!(fs::metadata("file")?.nlink(), 2);
    errno!(fs::hard_link("hard", "file"), EXIST);
    errno!(fs::hard_link("dir", "dir-link"), PERM);
    symlink("nowhere", "dangling")?;
    same!(fs::read_link("dangling")?, Path::new("nowhere"));
    same!(fs::symlink_metadata("dangling")?.len(), 7);
    errno!(fs::metadata("dangling"), NOENT);
    fs::remove_file("link")?;
    symlink("hard", "link")?;
    same!(fs::read_to_string("link")?, "both");
    // Linking a symbolic link links it, not its target.
    rustix::fs::linkat(CWD, "link", CWD, "link2", rustix::fs::AtFlags::empty())?;
    same!(fs::symlink_metadata("link2")?.nlink(), 2);
    symlink("loop", "loop")?;
    errno!(fs::metadata("loop"), LOOP);
    same!(fs::metadata("dir/sub")?.ino(), fs::metadata("dir/sub/deep/..")?.ino());
    Ok(())
}

fn recreated(world: &mut World) -> Check {
    make_tree(&world.lower())?;
    world.mount().run()?;
    world.mount().arg("again").run()?;
    no_leftovers(world)
}

fn recreate(args: &[String]) -> Check {
    if args.is_empty() {
        fs::remove_dir_all("dir")?;
        errno!(fs::metadata("dir"), NOENT);
        fs::create_dir("dir")?;
        same!(fs::read_dir("dir")?.count(), 0);
        errno!(fs::metadata("dir/a"), NOENT);
        fs::write("dir/new", "")?;
        fs::remove_file("file")?;
        fs::create_dir("file")?;
        fs::remove_dir("empty")?;
        fs::write("empty", "a file now")?;
    }
    same!(fs::read_dir("dir")?.count(), 1);
    errno!(fs::metadata("dir/sub"), NOENT);
    holds!(fs::metadata("file")?.is_dir());
    same!(fs::read_to_string("empty")?, "a file now");
    Ok(())
}

fn sparse(_: &[String]) -> Check {
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open("f")?;
    // Data that is still in the kernel's cache counts.
    file.write_all_at(b"x", 0)?;
    file.write_all_at(b"y", 1 << 20)?;
    let seek = |at: rustix::fs::SeekFrom| rustix::fs::seek(&file, at);
    same!(seek(rustix::fs::SeekFrom::Data(0))?, 0);
    let hole = seek(rustix::fs::SeekFrom::Hole(0))?;
    if hole != (1 << 20) + 1 {
        // The file system below knows holes.
        same!(seek(rustix::fs::SeekFrom::Data(hole))?, 1 << 20);
    }
    errno!(seek(rustix::fs::SeekFrom::Data(2 << 20)), NXIO);
    fallocate(&file, FallocateFlags::empty(), 0, 3 << 20)?;
    same!(file.metadata()?.len(), 3 << 20);
    fallocate(&file, FallocateFlags::KEEP_SIZE, 4 << 20, 4096)?;
    same!(file.metadata()?.len(), 3 << 20);
    file.write_all_at(&[1; 8192], 0)?;
    fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 4096, 4096)?;
    let mut buf = [9; 8192];
    file.read_exact_at(&mut buf, 0)?;
    holds!(buf[..4096] == [1; 4096] && buf[4096..] == [0; 4096]);
    // copy_file_range, also from dirty pages.
    fs::write("source", "0123456789")?;
    let source = OpenOptions::new().read(true).write(true).open("source")?;
    source.write_all_at(b"X", 3)?;
    let (mut from, mut to) = (2, 1);
    let target = File::create("target")?;
    same!(rustix::fs::copy_file_range(&source, Some(&mut from), &target, Some(&mut to), 5)?, 5);
    same!(fs::read("target")?, b"\x002X456");
    file.seek(SeekFrom::Start(0))?;
    Ok(())
}

fn locks(_: &[String]) -> Check {
    use rustix::fs::{FlockOperation, flock};
    let a = File::create("f")?;
    let b = File::open("f")?;
    flock(&a, FlockOperation::LockExclusive)?;
    errno!(flock(&b, FlockOperation::NonBlockingLockShared), WOULDBLOCK);
    flock(&a, FlockOperation::Unlock)?;
    flock(&b, FlockOperation::NonBlockingLockShared)?;
    flock(&b, FlockOperation::Unlock)?;
    rustix::fs::fcntl_lock(a.as_fd(), FlockOperation::NonBlockingLockExclusive)?;
    // Another process does not get it; the same one always does.
    let status = std::process::Command::new("python3")
        .args(["-c", "import fcntl,sys\ntry: fcntl.lockf(open('f','r+'), fcntl.LOCK_EX|fcntl.LOCK_NB)\nexcept OSError: sys.exit(3)"])
        .status();
    if let Ok(status) = status {
        same!(status.code(), Some(3));
    }
    Ok(())
}

fn times(_: &[String]) -> Check {
    use rustix::fs::{AtFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, utimensat};
    let at = |sec, nsec| Timespec { tv_sec: sec, tv_nsec: nsec };
    for name in ["file", "dir", "link", "dir/sub/c"] {
        let set = |a, m| {
            utimensat(
                CWD,
                name,
                &Timestamps { last_access: a, last_modification: m },
                AtFlags::SYMLINK_NOFOLLOW,
            )
        };
        set(at(11, 1), at(22, 999_999_999))?;
        let meta = fs::symlink_metadata(name)?;
        same!((meta.atime(), meta.atime_nsec()), (11, 1), "{name}");
        same!((meta.mtime(), meta.mtime_nsec()), (22, 999_999_999), "{name}");
        set(at(33, 3), at(0, UTIME_OMIT))?;
        let meta = fs::symlink_metadata(name)?;
        same!((meta.atime(), meta.mtime()), (33, 22), "{name}");
        set(at(0, UTIME_OMIT), at(0, UTIME_NOW))?;
        let meta = fs::symlink_metadata(name)?;
        holds!(meta.atime() == 33 && meta.mtime() > 1_000_000_000, "{name}");
    }
    // A write moves the times of the file, a new entry those of the directory.
    let ancient = Timestamps { last_access: at(5, 0), last_modification: at(5, 0) };
    utimensat(CWD, "file", &ancient, AtFlags::empty())?;
    fs::write("file", "x")?;
    holds!(fs::metadata("file")?.mtime() > 1_000_000_000);
    utimensat(CWD, "dir", &ancient, AtFlags::empty())?;
    fs::write("dir/entry", "")?;
    holds!(fs::metadata("dir")?.mtime() > 1_000_000_000);
    utimensat(CWD, "dir", &ancient, AtFlags::empty())?;
    fs::remove_file("dir/b")?;
    holds!(fs::metadata("dir")?.mtime() > 1_000_000_000);
    Ok(())
}

const MANY: u32 = 50_000;

fn many_entries(_: &[String]) -> Check {
    fs::create_dir("many")?;
    let dir = File::open("many")?;
    for i in 0..MANY {
        let name = format!("entry-{i}");
        rustix::fs::mknodat(&dir, name, rustix::fs::FileType::RegularFile, Mode::from_raw_mode(0o644), 0)?;
    }
    let mut names: Vec<String> = fs::read_dir("many")?
        .map(|e| e.map(|e| e.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_, _>>()?;
    same!(names.len(), MANY as usize);
    names.sort();
    names.dedup();
    same!(names.len(), MANY as usize);
    same!(fs::read_dir("many")?.count(), MANY as usize);
    fs::remove_dir_all("many")?;
    errno!(fs::metadata("many"), NOENT);
    Ok(())
}

fn crowded(world: &mut World) -> Check {
    fs::create_dir(world.lower().join("d"))?;
    for i in 0..3000 {
        fs::write(world.lower().join(format!("d/lower{i}")), "")?;
    }
    world.mount().run()?;
    Ok(())
}

fn unlink_while_listing(_: &[String]) -> Check {
    for i in 0..3000 {
        fs::write(format!("d/upper{i}"), "")?;
    }
    // Entries that stay are seen exactly once, whatever goes and comes meanwhile.
    let mut seen = BTreeMap::new();
    for (i, entry) in fs::read_dir("d")?.enumerate() {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.ends_with('7') {
            fs::remove_file(Path::new("d").join(&name))?;
        }
        if i % 100 == 0 {
            fs::write(format!("d/fresh{i}"), "")?;
        }
        *seen.entry(name).or_insert(0) += 1;
    }
    for prefix in ["upper", "lower"] {
        for i in 0..3000 {
            same!(seen.get(&format!("{prefix}{i}")), Some(&1), "{prefix}{i}");
        }
    }
    holds!(seen.values().all(|&n| n == 1));
    fs::remove_dir_all("d")?;
    errno!(fs::metadata("d"), NOENT);
    Ok(())
}

fn long_names(world: &mut World) -> Check {
    fs::write(world.lower().join("l".repeat(255)), "lower")?;
    fs::create_dir(world.lower().join("D".repeat(255)))?;
    fs::write(world.lower().join("D".repeat(255)).join("x".repeat(255)), "in")?;
    world.mount().run()?;
    no_leftovers(world)
}

fn use_long_names(_: &[String]) -> Check {
    let (lower, dir, new) = ("l".repeat(255), "D".repeat(255), "n".repeat(255));
    fs::write(&lower, "changed")?;
    fs::rename(&lower, &new)?;
    fs::remove_file(&new)?;
    fs::rename(&dir, &new)?;
    same!(fs::read_to_string(Path::new(&new).join("x".repeat(255)))?, "in");
    fs::create_dir(&dir)?;
    fs::remove_dir(&dir)?;
    errno!(fs::write("x".repeat(256), ""), NAMETOOLONG);
    errno!(fs::metadata("x".repeat(256)), NAMETOOLONG);
    Ok(())
}

fn read_only(world: &mut World) -> Check {
    make_tree(&world.lower())?;
    world.bare().with("--lower", world.lower()).run()?;
    Ok(())
}

fn refuse_changes(_: &[String]) -> Check {
    same!(fs::read_to_string("dir/sub/deep/d")?, "d");
    errno!(fs::create_dir("x"), ROFS);
    errno!(fs::remove_file("file"), ROFS);
    errno!(fs::rename("file", "x"), ROFS);
    errno!(fs::set_permissions("file", fs::Permissions::from_mode(0o600)), ROFS);
    errno!(OpenOptions::new().write(true).truncate(true).open("file"), ROFS);
    errno!(symlink("a", "b"), ROFS);
    same!(fs::read_dir("dir")?.count(), 5);
    Ok(())
}

fn layered(world: &mut World) -> Check {
    let (low, high) = (world.lower(), world.path("lower2"));
    for dir in
        [low.join("both"), high.join("both"), low.join("opaque"), high.join("opaque"), low.join("shape")]
    {
        fs::create_dir(dir)?;
    }
    fs::write(low.join("both/low"), "low")?;
    fs::write(low.join("both/same"), "low")?;
    fs::write(high.join("both/same"), "high")?;
    fs::write(high.join("both/high"), "high")?;
    fs::write(low.join("opaque/hidden"), "")?;
    fs::write(high.join("opaque/shown"), "")?;
    xattr_set(&high.join("opaque"), "user.overlay.opaque", b"y")?;
    fs::write(low.join("gone"), "")?;
    rustix::fs::mknodat(CWD, high.join("gone"), rustix::fs::FileType::CharacterDevice, Mode::empty(), 0)?;
    fs::write(high.join("shape"), "a file over a directory")?;
    fs::write(low.join("both/gone-too"), "")?;
    xattr_set(&high.join("both"), "user.overlay.opaque", b"x")?;
    fs::write(high.join("both/gone-too"), "")?;
    xattr_set(&high.join("both/gone-too"), "user.overlay.whiteout", b"y")?;
    let mount = world.bare().with("--lower", &low).with("--lower", &high).upper(world);
    mount.run()?;
    no_leftovers(world)
}

fn names(dir: &str) -> Result<Vec<String>, Failure> {
    let mut names: Vec<String> = fs::read_dir(dir)?
        .map(|e| e.map(|e| e.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_, _>>()?;
    names.sort();
    Ok(names)
}

fn merged(_: &[String]) -> Check {
    same!(names(".")?, ["both", "opaque", "shape"]);
    same!(names("both")?, ["high", "low", "same"]);
    same!(fs::read_to_string("both/same")?, "high");
    errno!(fs::metadata("both/gone-too"), NOENT);
    same!(names("opaque")?, ["shown"]);
    errno!(fs::metadata("opaque/hidden"), NOENT);
    errno!(fs::metadata("gone"), NOENT);
    holds!(fs::metadata("shape")?.is_file());
    fs::write("gone", "back")?;
    fs::remove_file("both/same")?;
    errno!(fs::metadata("both/same"), NOENT);
    fs::remove_file("shape")?;
    fs::create_dir("shape")?;
    same!(names("shape")?.len(), 0);
    fs::rename("both", "renamed")?;
    same!(names("renamed")?, ["high", "low"]);
    same!(names(".")?, ["gone", "opaque", "renamed", "shape"]);
    let mut all = BTreeMap::new();
    walk(Path::new("."), &mut all)
}

fn host_like(world: &mut World) -> Check {
    let lower = world.lower();
    fs::create_dir_all(lower.join("proc/secret"))?;
    fs::create_dir_all(lower.join("home/me/state/box"))?;
    fs::write(lower.join("home/me/plain"), "")?;
    fs::create_dir_all(lower.join("etc/conf.d"))?;
    fs::write(lower.join("etc/hosts"), "the host's")?;
    fs::write(lower.join("etc/conf.d/x"), "x")?;
    fs::create_dir(lower.join("locked"))?;
    fs::write(lower.join("locked/inside"), "")?;
    fs::write(lower.join("secret"), "s")?;
    symlink("/nowhere", lower.join("lib"))?;
    fs::set_permissions(lower.join("locked"), fs::Permissions::from_mode(0o000))?;
    fs::set_permissions(lower.join("secret"), fs::Permissions::from_mode(0o000))?;
    let root = nix::unistd::getuid().is_root();
    let mut mount = world.mount();
    for hidden in ["proc", "home/me/state", "sys"] {
        mount.option("--hide", hidden);
    }
    mount = mount
        .with("--file", "etc/hosts=generated")
        .with("--file", "etc/new/deep/file=text")
        .with("--link", "etc/mtab=/proc/mounts")
        .with("--dir", "work")
        .with("--file", "lib/here=yes");
    let changed = mount.arg(if root { "root" } else { "user" }).run()?;
    fs::set_permissions(lower.join("locked"), fs::Permissions::from_mode(0o700))?;
    holds!(changed);
    same!(fs::read_to_string(world.upper().join("etc/hosts"))?, "generated, then changed");
    no_leftovers(world)
}

fn host_view(args: &[String]) -> Check {
    same!(names("proc")?.len(), 0);
    errno!(fs::metadata("proc/secret"), NOENT);
    same!(names("home/me")?, ["plain", "state"]);
    same!(names("home/me/state")?.len(), 0);
    same!(names("sys")?.len(), 0);
    same!(fs::read_to_string("etc/hosts")?, "generated");
    same!(fs::read_link("etc/mtab")?, Path::new("/proc/mounts"));
    same!(fs::read_to_string("etc/new/deep/file")?, "text");
    same!(names("etc")?, ["conf.d", "hosts", "mtab", "new"]);
    same!(fs::read_to_string("etc/conf.d/x")?, "x");
    // A generated parent replaces what is no directory and is not followed.
    same!(fs::read_to_string("lib/here")?, "yes");
    holds!(fs::symlink_metadata("lib")?.is_dir());
    let mut all = BTreeMap::new();
    walk(Path::new("."), &mut all)?;
    let mut hosts = OpenOptions::new().append(true).open("etc/hosts")?;
    hosts.write_all(b", then changed")?;
    drop(hosts);
    same!(fs::read_to_string("etc/hosts")?, "generated, then changed");
    fs::rename("etc/new", "etc/newer")?;
    same!(fs::read_to_string("etc/newer/deep/file")?, "text");
    fs::remove_file("etc/mtab")?;
    errno!(fs::symlink_metadata("etc/mtab"), NOENT);
    // Hidden directories are real ones otherwise.
    fs::write("proc/x", "")?;
    same!(names("proc")?, ["x"]);
    if args.first().map(String::as_str) == Some("user") {
        same!(names("locked")?.len(), 0);
        errno!(fs::metadata("locked/inside"), NOENT);
        fs::write("locked/inside", "mine")?;
        same!(names("locked")?, ["inside"]);
        same!(fs::metadata("secret")?.len(), 1);
        errno!(fs::read("secret"), ACCESS);
    }
    Ok(())
}

/// Files of a layer that somebody replaces while it is mounted, as editors save them.
const REPLACED: [&str; 6] = ["read", "written", "truncated", "mode", "link", "gone"];

fn replaced_below(world: &mut World) -> Check {
    for name in REPLACED {
        fs::write(world.lower().join(name), "before")?;
    }
    fs::remove_file(world.lower().join("link"))?;
    symlink("before", world.lower().join("link"))?;
    let lower = world.lower().display().to_string();
    world.mount().arg(lower).run()?;
    same!(fs::read(world.upper().join("written"))?, b"After it");
    no_leftovers(world)
}

/// Tries again while the object is one that was replaced.
fn until_found<T>(mut operation: impl FnMut() -> std::io::Result<T>) -> std::io::Result<T> {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        match operation() {
            Err(err) if errno_of(&err) == Some(Errno::STALE) && std::time::Instant::now() < deadline => {}
            done => return done,
        }
    }
}

fn find_again(args: &[String]) -> Check {
    let below = Path::new(args.first().ok_or("the layer is wanted")?);
    for name in REPLACED {
        // The kernel knows it from now on, but nothing of its content.
        fs::symlink_metadata(name)?;
        let new = below.join("new");
        if name == "link" {
            symlink("after", &new)?;
        } else {
            fs::write(&new, "after it")?;
        }
        fs::rename(new, below.join(name))?;
    }
    fs::remove_file(below.join("gone"))?;
    // By path the kernel itself looks the name up again.
    fs::set_permissions("mode", fs::Permissions::from_mode(0o640))?;
    same!(fs::read("mode")?, b"after it");
    fs::write("truncated", "anew")?;
    same!(fs::read("truncated")?, b"anew");
    same!(fs::read_link("link")?, Path::new("after"));
    // An open descriptor is of what was replaced; the next one is of what is there.
    same!(until_found(|| fs::read("read"))?, b"after it");
    until_found(|| {
        let file = OpenOptions::new().write(true).open("written")?;
        file.write_all_at(b"A", 0)?;
        file.sync_all()
    })?;
    same!(fs::read("written")?, b"After it");
    errno!(until_found(|| fs::read("gone")), NOENT);
    Ok(())
}

fn deep(_: &[String]) -> Check {
    const DEPTH: usize = 5000;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut dir = rustix::fs::openat(CWD, ".", flags, Mode::empty())?;
    for _ in 0..DEPTH {
        rustix::fs::mkdirat(&dir, "d", Mode::from_raw_mode(0o755))?;
        dir = rustix::fs::openat(&dir, "d", flags, Mode::empty())?;
    }
    let file = rustix::fs::openat(&dir, "f", OFlags::CREATE | OFlags::RDWR, Mode::from_raw_mode(0o644))?;
    rustix::io::write(&file, b"deep")?;
    rustix::fs::fsync(&file)?;
    drop((file, dir));
    let status = std::process::Command::new("rm").args(["-rf", "d"]).status()?;
    holds!(status.success());
    errno!(fs::metadata("d"), NOENT);
    Ok(())
}

/// A shared mapping of the beginning of a file.
pub(crate) struct Mapping {
    address: *mut core::ffi::c_void,
    length: usize,
}

#[expect(unsafe_code, reason = "mappings are what is tested")]
impl Mapping {
    fn new(file: &File, length: usize) -> std::io::Result<Self> {
        Self::map(file, length, nix::sys::mman::ProtFlags::PROT_READ)
    }

    pub(crate) fn new_writable(file: &File, length: usize) -> std::io::Result<Self> {
        Self::map(file, length, nix::sys::mman::ProtFlags::PROT_READ | nix::sys::mman::ProtFlags::PROT_WRITE)
    }

    fn map(file: &File, length: usize, protection: nix::sys::mman::ProtFlags) -> std::io::Result<Self> {
        let size = std::num::NonZeroUsize::new(length).ok_or(std::io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping at an address of the kernel's choice; no Rust object is
        // there.
        let address = unsafe {
            nix::sys::mman::mmap(None, size, protection, nix::sys::mman::MapFlags::MAP_SHARED, file, 0)?
        };
        Ok(Self { address: address.as_ptr(), length })
    }

    fn bytes(&self) -> Vec<u8> {
        let start: *const u8 = self.address.cast();
        // SAFETY: the mapping is that long and readable; volatile, since the file changes
        // behind the compiler's back.
        (0..self.length).map(|i| unsafe { start.add(i).read_volatile() }).collect()
    }

    /// Waits until what was written is in the file (msync).
    pub(crate) fn sync(&self) -> std::io::Result<()> {
        let start = std::ptr::NonNull::new(self.address).ok_or(std::io::ErrorKind::InvalidInput)?;
        // SAFETY: the mapping is that long, and stays.
        unsafe { nix::sys::mman::msync(start, self.length, nix::sys::mman::MsFlags::MS_SYNC)? };
        Ok(())
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is that long, writable, and borrowed mutably for as long.
        unsafe { std::slice::from_raw_parts_mut(self.address.cast(), self.length) }
    }
}

#[expect(unsafe_code, reason = "mappings are what is tested")]
impl Drop for Mapping {
    fn drop(&mut self) {
        if let Some(address) = std::ptr::NonNull::new(self.address) {
            // SAFETY: made by `map` with this length, and not used any more.
            let _ = unsafe { nix::sys::mman::munmap(address, self.length) };
        }
    }
}
