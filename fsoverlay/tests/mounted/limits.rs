//! Few descriptors, many threads.

use std::fs::{self, File, OpenOptions};
use std::io::IsTerminal;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::{Case, Check, Failure, World, count_in, errno_of, holds, mount_above, same};
use crate::semantics::{make_tree, no_leftovers};

pub(crate) const CASES: &[Case] = &[
    Case { name: "few_descriptors_suffice", outside: few_descriptors, inside: many_objects },
    Case { name: "the_table_of_descriptors_does_not_grow", outside: many_files, inside: open_many },
    Case {
        name: "a_removed_name_leaves_the_file_its_others",
        outside: linked_twice,
        inside: remove_one_name,
    },
    Case { name: "large_copy_ups_hold_up_nobody_else", outside: large_files, inside: stop_below },
    Case { name: "a_seek_holds_up_no_other", outside: sparse_files, inside: seek_above },
    Case { name: "syncs_hold_up_nobody_else", outside: files_to_sync, inside: sync_above },
    Case { name: "a_limit_on_rates_holds_up_nobody_else", outside: held_files, inside: read_held },
    Case { name: "what_is_asked_is_counted", outside: counted, inside: ask },
    Case { name: "concurrent_copy_ups_are_one", outside: shared_file, inside: race },
    Case { name: "threads_in_one_tree", outside: storm_over, inside: storm },
];

fn few_descriptors(world: &mut World) -> Check {
    for i in 0..400 {
        let dir = world.lower().join(format!("d{i}"));
        fs::create_dir(&dir)?;
        fs::write(dir.join("f"), i.to_string())?;
    }
    world.mount().with("--nofile", "100").run()?;
    no_leftovers(world)
}

fn many_objects(_: &[String]) -> Check {
    let mut open = Vec::new();
    for i in 0..400 {
        let name = format!("d{i}/f");
        same!(fs::read_to_string(&name)?, i.to_string());
        let file = OpenOptions::new().read(true).write(true).open(&name)?;
        file.write_all_at(b"+", 0)?;
        file.sync_all()?;
        open.push(file);
    }
    // All of them unlinked and still open.
    for i in 0..400 {
        fs::remove_file(format!("d{i}/f"))?;
    }
    for (i, file) in open.iter().enumerate() {
        let mut buf = vec![0; i.to_string().len()];
        file.read_exact_at(&mut buf, 0)?;
        same!(buf[0], b'+');
        let text = i.to_string();
        same!(buf[1..], text.as_bytes()[1..]);
    }
    drop(open);
    for i in 0..400 {
        fs::rename(format!("d{i}"), format!("e{i}"))?;
        fs::write(format!("e{i}/new"), "")?;
    }
    Ok(())
}

fn many_files(world: &mut World) -> Check {
    for i in 0..600 {
        fs::write(world.lower().join(format!("f{i}")), "")?;
    }
    world.mount().run()?;
    no_leftovers(world)
}

/// How many descriptors the server has room for (`FDSize` of proc_pid_status(5)).
fn room() -> Result<usize, Failure> {
    let status = fs::read_to_string(format!("/proc/{}/status", nix::unistd::getppid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("FDSize:"));
    Ok(line.ok_or("FDSize is missing")?.trim().parse()?)
}

fn open_many(_: &[String]) -> Check {
    let before = room()?;
    let mut buf = [0; 1];
    for i in 0..600 {
        File::open(format!("f{i}"))?.read_at(&mut buf, 0)?;
        // (A file's content is read by a descriptor of its own only where it has some.)
        OpenOptions::new().write(true).open(format!("f{i}"))?.write_all_at(b"x", 0)?;
    }
    let server = nix::unistd::getppid();
    let open = fs::read_dir(format!("/proc/{server}/fd"))?.count();
    holds!(open > 200, "{open} are open");
    same!(room()?, before, "while {open} were opened");
    Ok(())
}

fn linked_twice(world: &mut World) -> Check {
    world.mount().arg("make").run()?;
    world.mount().with("--nofile", "100").run()?;
    no_leftovers(world)
}

fn remove_one_name(args: &[String]) -> Check {
    if !args.is_empty() {
        for (one, other) in [("a", "b"), ("c", "d")] {
            fs::write(one, "content")?;
            fs::hard_link(one, other)?;
        }
        return Ok(());
    }
    // More open files without a name than descriptors may be kept for.
    let mut open = Vec::new();
    for i in 0..40 {
        let name = format!("f{i}");
        open.push(File::create(&name)?);
        fs::remove_file(name)?;
    }
    // Of each only one name was asked for yet.
    let removed = OpenOptions::new().read(true).write(true).open("a")?;
    fs::remove_file("a")?;
    let replaced = OpenOptions::new().read(true).write(true).open("c")?;
    fs::write("new", "")?;
    fs::rename("new", "c")?;
    for (file, other) in [(removed, "b"), (replaced, "d")] {
        same!(fs::metadata(other)?.nlink(), 1, "{other}");
        same!(file.metadata()?.nlink(), 1, "{other}");
        file.write_all_at(b"C", 0)?;
        file.sync_all()?;
        same!(fs::read(other)?, b"Content", "{other}");
        same!(fs::metadata(other)?.ino(), file.metadata()?.ino(), "{other}");
        same!(file.metadata()?.nlink(), 1, "{other}");
        let mut read = [0; 7];
        file.read_exact_at(&mut read, 0)?;
        same!(&read, b"Content", "{other}");
    }
    Ok(())
}

/// More of them than the overlay has workers.
const LARGE: usize = 5;

fn large_files(world: &mut World) -> Check {
    for i in 0..LARGE {
        File::create(world.lower().join(format!("large{i}")))?.set_len(64 << 20)?;
    }
    for dir in ["upper", "work", "mnt"] {
        fs::create_dir(world.path("other").join(dir))?;
    }
    world.mount().arg(world.dir.display().to_string()).run()?;
    no_leftovers(world)
}

/// A process that does not run while this exists.
pub(crate) struct Stopped(Pid);

impl Stopped {
    pub(crate) fn new(pid: Pid) -> Result<Self, Failure> {
        kill(pid, Signal::SIGSTOP)?;
        let stopped = Self(pid);
        // One that still runs could take a request along.
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let stat = task?.path().join("stat");
            while !fs::read_to_string(&stat)?.contains(") T ") {
                std::thread::yield_now();
            }
        }
        Ok(stopped)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

/// In the first mount: a second one above it, whose layer stands still when the server of the first
/// does. Copying from it then takes as long as one likes.
fn stop_below(args: &[String]) -> Check {
    match args {
        [dir] => {
            let dir = Path::new(dir);
            run_above("large_copy_ups_hold_up_nobody_else", dir, &[dir.join("mnt")], &dir.join("other"))
        }
        [_, server] => copy_slowly(Pid::from_raw(server.parse()?)),
        _ => Err("one or two arguments are wanted".into()),
    }
}

/// Mounts layers above a mount, and runs the inner half of a case in it, with the server of the mount below
/// as its argument.
fn run_above(case: &'static str, dir: &Path, lowers: &[PathBuf], home: &Path) -> Check {
    let mut mount = mount_above(case, dir, home);
    for lower in lowers {
        mount.option("--lower", lower);
    }
    mount.arg(nix::unistd::getppid().to_string()).run().map(drop)
}

/// Stops the server of the mount below, does `long` [`LARGE`] times at once, which must have to wait for
/// it, and `short`, which must not.
fn beside_long<T: Send>(
    server: Pid,
    long: impl Fn(usize) -> std::io::Result<()> + Sync,
    short: impl FnOnce() -> std::io::Result<T> + Send,
) -> Result<T, Failure> {
    let stopped = Stopped::new(server)?;
    let asking: Vec<AtomicU32> = (0..LARGE).map(|_| AtomicU32::new(0)).collect();
    let (asking, long) = (&asking, &long);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..LARGE)
            .map(|i| {
                scope.spawn(move || {
                    asking[i].store(nix::unistd::gettid().as_raw().cast_unsigned(), Ordering::Release);
                    long(i)
                })
            })
            .collect();
        let all_wait = || -> Result<bool, Failure> {
            for tid in asking {
                let tid = tid.load(Ordering::Acquire);
                let stat = fs::read_to_string(format!("/proc/self/task/{tid}/stat")).unwrap_or_default();
                if tid == 0 || !stat.contains(") S ") && !stat.contains(") D ") {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        while !all_wait()? {
            std::thread::yield_now();
        }
        // All of them have asked; this is asked after them.
        let (done, answer) = std::sync::mpsc::channel();
        scope.spawn(move || done.send(short()));
        let answer = answer.recv_timeout(std::time::Duration::from_secs(30));
        holds!(threads.iter().all(|thread| !thread.is_finished()));
        drop(stopped);
        for thread in threads {
            thread.join().map_err(|_| "a thread panicked")??;
        }
        Ok(answer.map_err(|_| "nothing was served beside what takes long")??)
    })
}

fn copy_slowly(server: Pid) -> Check {
    for i in 0..LARGE {
        fs::metadata(format!("large{i}"))?;
    }
    // The layer below is not asked for it again.
    holds!(!Path::new("made").exists());
    let change = |i| fs::set_permissions(format!("large{i}"), fs::Permissions::from_mode(0o600));
    beside_long(server, change, || fs::create_dir("made"))?;
    for i in 0..LARGE {
        let meta = fs::metadata(format!("large{i}"))?;
        same!((meta.mode() & 0o777, meta.len()), (0o600, 64 << 20));
    }
    Ok(())
}

fn sparse_files(world: &mut World) -> Check {
    fs::write(world.path("lower2").join("small"), "small")?;
    large_files(world)
}

/// Seeks in files whose first write copies them up, from a layer that stands still.
fn seek_above(args: &[String]) -> Check {
    let server = match args {
        [dir] => {
            let dir = Path::new(dir);
            let lowers = [dir.join("lower2"), dir.join("mnt")];
            return run_above("a_seek_holds_up_no_other", dir, &lowers, &dir.join("other"));
        }
        [_, server] => Pid::from_raw(server.parse()?),
        _ => return Err("one or two arguments are wanted".into()),
    };
    let small = File::open("small")?;
    let mut large = Vec::new();
    for i in 0..LARGE {
        let file = OpenOptions::new().read(true).write(true).open(format!("large{i}"))?;
        // Stays in the kernel until the seek.
        file.write_all_at(&[b'x'; 4096], 4096)?;
        large.push(file);
    }
    let data = |file: &File| Ok(rustix::fs::seek(file, rustix::fs::SeekFrom::Data(0))?);
    let seek = |i: usize| match data(&large[i]) {
        // The whole block of the file system counts.
        Ok(0..=4096) => Ok(()),
        Ok(at) => Err(std::io::Error::other(format!("data at {at}"))),
        Err(err) => Err(err),
    };
    same!(beside_long(server, seek, || data(&small))?, 0);
    Ok(())
}

fn files_to_sync(world: &mut World) -> Check {
    fs::write(world.path("lower2").join("small"), "small")?;
    fs::create_dir(world.path("other").join("mnt"))?;
    world.mount().arg(world.dir.display().to_string()).run()?;
    no_leftovers(world)
}

/// Syncs files of an upper that stands still.
fn sync_above(args: &[String]) -> Check {
    let server = match args {
        [dir] => {
            let dir = Path::new(dir);
            for part in ["upper", "work"] {
                fs::create_dir(part)?;
            }
            return run_above("syncs_hold_up_nobody_else", dir, &[dir.join("lower2")], &dir.join("mnt"));
        }
        [_, server] => Pid::from_raw(server.parse()?),
        _ => return Err("one or two arguments are wanted".into()),
    };
    let small = File::open("small")?;
    let mut files = Vec::new();
    for i in 0..LARGE {
        let file = File::create(format!("file{i}"))?;
        file.write_all_at(b"content", 0)?;
        file.sync_all()?;
        files.push(file);
    }
    let mut read = [0; 5];
    beside_long(server, |i| files[i].sync_all(), || small.read_exact_at(&mut read, 0))?;
    same!(&read, b"small");
    Ok(())
}

/// As many files as reads are held, which is more than there are workers.
fn held_files(world: &mut World) -> Check {
    for i in 0..LARGE {
        fs::write(world.lower().join(format!("file{i}")), format!("content{i}"))?;
    }
    world.mount().with("--hold-reads", format!("{LARGE}:5")).run()?;
    no_leftovers(world)
}

fn read_held(_: &[String]) -> Check {
    let files = (0..LARGE).map(|i| File::open(format!("file{i}"))).collect::<Result<Vec<_>, _>>()?;
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            files.iter().map(|file| scope.spawn(move || std::io::read_to_string(file))).collect();
        // Each asks the server, which begins with what was asked first.
        for i in 0..3 {
            fs::create_dir(format!("made{i}"))?;
        }
        holds!(threads.iter().all(|thread| !thread.is_finished()));
        for (i, thread) in threads.into_iter().enumerate() {
            let text = thread.join().map_err(|_| "a thread panicked")??;
            same!(text, format!("content{i}"));
        }
        Ok(())
    })
}

fn counted(world: &mut World) -> Check {
    fs::write(world.lower().join("read"), vec![b'r'; 1 << 20])?;
    fs::write(world.lower().join("changed"), vec![b'c'; 64 << 10])?;
    let output = world.mount().output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    holds!(output.status.success(), "{text}");
    let count = |name: &str| count_in(&text, name);
    same!(count("read_bytes")?, 1 << 20);
    same!(count("written_bytes")?, 12288);
    same!((count("copied_up")?, count("copied_bytes")?), (1, 64 << 10));
    // Three names made or removed, and a mode; and the kernel's own setting of times.
    holds!(
        count("changes")? >= 4 && count("lookups")? >= 4 && count("reads")? >= 1 && count("listings")? >= 1,
        "{text}"
    );
    holds!(count("writes")? >= 2 && count("writes")? <= 4, "{text}");
    // Whether it is a terminal.
    holds!(count("others")? >= 500, "{text}");
    same!(count("panics")?, 0);
    Ok(())
}

fn ask(_: &[String]) -> Check {
    same!(fs::read("read")?.len(), 1 << 20);
    // From the kernel's cache.
    same!(fs::read("read")?.len(), 1 << 20);
    let file = OpenOptions::new().write(true).open("changed")?;
    file.write_all_at(&[b'x'; 4096], 0)?;
    file.sync_all()?;
    drop(file);
    fs::create_dir("dir")?;
    let new = File::create("dir/new")?;
    new.write_all_at(&[b'x'; 8192], 0)?;
    new.sync_all()?;
    for _ in 0..500 {
        holds!(!new.is_terminal());
    }
    new.set_permissions(fs::Permissions::from_mode(0o600))?;
    fs::read_dir("dir")?.count();
    fs::remove_file("dir/new")?;
    Ok(())
}

const THREADS: u64 = 8;

fn shared_file(world: &mut World) -> Check {
    fs::write(world.lower().join("shared"), vec![b'.'; 8 << 20])?;
    fs::hard_link(world.lower().join("shared"), world.lower().join("link"))?;
    fs::create_dir(world.lower().join("dir"))?;
    fs::write(world.lower().join("dir/x"), "x")?;
    world.mount().with("--workers", "4").run()?;
    same!(fs::metadata(world.upper().join("shared"))?.ino(), fs::metadata(world.upper().join("link"))?.ino());
    no_leftovers(world)
}

fn race(_: &[String]) -> Check {
    holds!(fs::metadata("link")?.nlink() == 2);
    let results: Vec<Result<(), std::io::Error>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|i| {
                scope.spawn(move || {
                    let name = if i % 2 == 0 { "shared" } else { "link" };
                    let file = OpenOptions::new().write(true).open(name)?;
                    file.write_all_at(format!("{i}").as_bytes(), i * 65536)?;
                    file.sync_all()?;
                    // Directories above are copied up by several at once, too.
                    fs::write(format!("dir/made{i}"), "")
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|_| Err(std::io::Error::other("a thread panicked"))))
            .collect()
    });
    for result in results {
        result?;
    }
    let data = fs::read("shared")?;
    for i in 0..THREADS {
        same!(data[usize::try_from(i)? * 65536], b'0' + u8::try_from(i)?);
    }
    same!(data.iter().filter(|&&b| b == b'.').count(), (8 << 20) - 8);
    same!(fs::read_dir("dir")?.count(), 9);
    Ok(())
}

fn storm_over(world: &mut World) -> Check {
    for i in 0..6 {
        let dir = world.lower().join(format!("t{i}"));
        fs::create_dir(&dir)?;
        make_tree(&dir)?;
    }
    world.mount().with("--workers", "4").run()?;
    no_leftovers(world)
}

/// Errors that are right when others change the same names.
fn expected(err: &std::io::Error) -> bool {
    use rustix::io::Errno as E;
    matches!(
        errno_of(err),
        Some(
            E::NOENT | E::EXIST | E::NOTEMPTY | E::ISDIR | E::NOTDIR | E::INVAL | E::BUSY | E::LOOP | E::PERM
        )
    )
}

fn storm(_: &[String]) -> Check {
    let results: Vec<Result<(), Failure>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (1..=6u64).map(|seed| scope.spawn(move || storm_thread(seed))).collect();
        threads
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|_| Err(Failure::Wrong("a thread panicked".to_owned()))))
            .collect()
    });
    for result in results {
        result?;
    }
    // What is left is whole: it can be walked, and removed.
    fn walk(dir: &Path) -> Check {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let meta = path.symlink_metadata()?;
            if meta.is_dir() {
                walk(&path)?;
            } else if meta.is_file() {
                fs::read(&path)?;
            }
        }
        Ok(())
    }
    walk(Path::new("."))?;
    for entry in fs::read_dir(".")? {
        let path = entry?.path();
        if path.symlink_metadata()?.is_dir() { fs::remove_dir_all(&path)? } else { fs::remove_file(&path)? }
    }
    same!(fs::read_dir(".")?.count(), 0);
    Ok(())
}

fn storm_thread(seed: u64) -> Check {
    let mut random = crate::operation::Random::new(seed);
    let names =
        ["dir", "dir/sub", "dir/sub/deep", "dir/a", "dir/b", "file", "dir/sub/c", "empty", "new", "dir/new"];
    for _ in 0..400 {
        let path = |random: &mut crate::operation::Random| {
            format!("t{}/{}", random.below(6), names[random.below(names.len())])
        };
        let (a, b) = (path(&mut random), path(&mut random));
        let result = match random.below(9) {
            0 => fs::write(&a, "storm"),
            1 => fs::remove_file(&a),
            2 => fs::rename(&a, &b),
            3 => fs::create_dir(&a),
            4 => fs::remove_dir(&a),
            5 => fs::hard_link(&a, &b),
            6 => fs::set_permissions(&a, fs::Permissions::from_mode(0o755)),
            7 => fs::read_dir(&a).map(|dir| dir.count()).map(drop),
            _ => File::open(&a).and_then(|f| f.read_at(&mut [0; 16], 0)).map(drop),
        };
        if let Err(err) = result {
            holds!(expected(&err), "{a} {b}: {err}");
        }
    }
    Ok(())
}
