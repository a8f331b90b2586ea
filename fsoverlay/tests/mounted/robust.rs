//! Many of something, faults of others, and ends that come early.
//!
//! The sizes are small enough for every run; with `FSOVERLAY_FULL` they are those that are promised.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nix::mount::{MntFlags, umount2};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, SigSet, Signal, kill};
use nix::unistd::Pid;
use rustix::io::Errno;

use crate::harness::{Case, Check, Failure, Mount, World, errno, errno_of, holds, same};
use crate::limits::Stopped;
use crate::operation::{CHANGES, Operation, Random, Rules, Site, TOPS};
use crate::random::{same_trees, tree};
use crate::semantics::{make_tree, no_leftovers};

pub(crate) const CASES: &[Case] = &[
    Case { name: "many_opens_cost_the_server_nothing", outside: few_files, inside: open_often },
    Case { name: "fifty_mounts_side_by_side", outside: fifty, inside: one_of_fifty },
    Case { name: "many_files_are_open_with_few_descriptors", outside: many_files, inside: open_many },
    Case { name: "what_is_forgotten_takes_no_memory", outside: forgotten, inside: come_and_go },
    Case { name: "signals_disturb_nothing", outside: beside_plain, inside: signals },
    Case { name: "processes_may_be_killed_at_any_time", outside: busy_tree, inside: killed_processes },
    Case { name: "unmounted_under_load", outside: unmounted, inside: unmount },
    Case { name: "failures_below_change_nothing", outside: failing, inside: ops_that_fail },
    Case { name: "a_full_upper_changes_nothing", outside: full_upper, inside: ops_that_fail },
    Case { name: "unreadable_disks_are_told_of", outside: unreadable, inside: read_failing },
    Case { name: "an_upper_that_becomes_read_only", outside: frozen, inside: freeze },
];

fn size(usual: usize, full: usize) -> usize {
    if std::env::var_os("FSOVERLAY_FULL").is_some() { full } else { usual }
}

/// Memory of the server that is its own, in KiB; it is the parent of the inner half.
fn memory(server: Pid) -> Result<usize, Failure> {
    let status = fs::read_to_string(format!("/proc/{server}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).ok_or("no RssAnon")?;
    Ok(line.split_whitespace().next().unwrap_or_default().parse()?)
}

fn few_files(world: &mut World) -> Check {
    fs::create_dir(world.lower().join("dir"))?;
    for i in 0..100 {
        fs::write(world.lower().join(format!("dir/{i}")), "content")?;
    }
    let output = world.mount().output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    holds!(output.status.success(), "{text}");
    // Nothing of it came here: the kernel opens by itself.
    for name in ["lookups", "reads", "listings"] {
        let (_, rest) = text.split_once(&format!(" {name}: ")).ok_or(format!("no {name} in {text}"))?;
        let count: usize = rest.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default().parse()?;
        holds!(count <= 200, "{count} {name}");
    }
    Ok(())
}

fn open_often(_: &[String]) -> Check {
    let pass = || -> Check {
        for i in 0..100 {
            same!(File::open(format!("dir/{i}"))?.metadata()?.len(), 7);
        }
        same!(fs::read_dir("dir")?.count(), 100);
        Ok(())
    };
    pass()?;
    let before = memory(nix::unistd::getppid())?;
    for _ in 0..size(50_000, 1_000_000) / 100 {
        pass()?;
    }
    let after = memory(nix::unistd::getppid())?;
    holds!(after < before + 1024, "{before} KiB, then {after}");
    Ok(())
}

const MOUNTS: usize = 50;

fn fifty(world: &mut World) -> Check {
    make_tree(&world.lower())?;
    let other = world.path("other");
    let (up, go) = (other.join("up"), other.join("go"));
    for fifo in [&up, &go] {
        nix::unistd::mkfifo(fifo, nix::sys::stat::Mode::S_IRWXU)?;
    }
    // Open at both ends, so that nobody waits for the other one to be opened.
    let mut up = OpenOptions::new().read(true).write(true).open(&up)?;
    let mut go = OpenOptions::new().read(true).write(true).open(&go)?;
    let place = |i: usize| other.join(format!("mount{i}"));
    let mount = |i: usize| {
        let place = place(i);
        world
            .bare()
            .with("--lower", world.lower())
            .with("--upper", place.join("upper"))
            .with("--work", place.join("work"))
            .with("--at", place.join("mnt"))
            .arg(other.display().to_string())
            .arg(i.to_string())
    };
    let mut mounts: Vec<Child> = Vec::new();
    let started = (|| -> Check {
        for i in 0..MOUNTS {
            for dir in ["upper", "work", "mnt"] {
                fs::create_dir_all(place(i).join(dir))?;
            }
            mounts.push(mount(i).command()?.stderr(Stdio::piped()).spawn()?);
        }
        let mut all = [0; MOUNTS];
        up.read_exact(&mut all)?;
        // Each of them said so when it was mounted; now there are that many.
        same!(all, [b'u'; MOUNTS]);
        Ok(())
    })();
    go.write_all(&[b'g'; MOUNTS])?;
    for mount in mounts {
        let output = mount.wait_with_output()?;
        holds!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    started?;
    for i in 0..MOUNTS {
        same!(fs::read_to_string(place(i).join("upper/file"))?, format!("lower\nby {i}"));
        same!(fs::read_dir(place(i).join("work"))?.count(), 0);
    }
    Ok(())
}

fn one_of_fifty(args: &[String]) -> Check {
    let [other, number] = args else { return Err("two arguments are wanted".into()) };
    OpenOptions::new().append(true).open("file")?.write_all(format!("by {number}").as_bytes())?;
    fs::rename("dir", "dir2")?;
    OpenOptions::new().write(true).open(Path::new(other).join("up"))?.write_all(b"u")?;
    let mut byte = [0];
    OpenOptions::new().read(true).write(true).open(Path::new(other).join("go"))?.read_exact(&mut byte)?;
    same!(fs::read_to_string("file")?, format!("lower\nby {number}"));
    same!(fs::read_to_string("dir2/sub/c")?, "c");
    Ok(())
}

fn many_files(world: &mut World) -> Check {
    let count = size(1_000, 10_000);
    for i in 0..count {
        let dir = world.lower().join(format!("d{}", i % 100));
        fs::create_dir_all(&dir)?;
        fs::write(dir.join(i.to_string()), i.to_string())?;
    }
    for limit in ["64", "1024"] {
        world.empty_upper()?;
        world.mount().with("--nofile", limit).arg(count.to_string()).run()?;
        no_leftovers(world)?;
    }
    Ok(())
}

fn open_many(args: &[String]) -> Check {
    let count: usize = args.first().ok_or("an argument is wanted")?.parse()?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let count = count.min(usize::try_from(hard)?.saturating_sub(100));
    let mut open = Vec::new();
    for i in 0..count {
        let mut file = OpenOptions::new().read(true).append(true).open(format!("d{}/{i}", i % 100))?;
        file.write_all(b"+")?;
        open.push(file);
    }
    let check = |open: &[File]| -> Check {
        for (i, file) in open.iter().enumerate() {
            let wanted = format!("{i}+");
            let mut data = vec![0; wanted.len()];
            file.read_exact_at(&mut data, 0)?;
            same!(data, wanted.as_bytes());
        }
        Ok(())
    };
    check(&open)?;
    let mut walked = 0;
    for dir in fs::read_dir(".")? {
        for entry in fs::read_dir(dir?.path())? {
            walked += usize::from(entry?.metadata()?.is_file());
        }
    }
    holds!(walked >= count);
    // All of them without a name: first written back, then asked for again.
    for i in 0..count {
        fs::remove_file(format!("d{}/{i}", i % 100))?;
    }
    for (i, file) in open.iter().enumerate() {
        same!(file.metadata()?.nlink(), 0, "{i}");
        rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed)?;
    }
    check(&open)
}

fn forgotten(world: &mut World) -> Check {
    make_tree(&world.lower())?;
    let (rounds, files) = (size(8, 200), size(1_000, 10_000));
    for round in 0..rounds {
        for i in 0..files / 20 {
            let dir = world.lower().join(format!("lower{round}"));
            fs::create_dir_all(&dir)?;
            fs::write(dir.join(i.to_string()), "")?;
        }
    }
    world.mount().arg(rounds.to_string()).arg(files.to_string()).run()?;
    no_leftovers(world)
}

/// Removing a name is what makes the kernel forget it without a right to more.
fn come_and_go(args: &[String]) -> Check {
    let [rounds, files] = args else { return Err("two arguments are wanted".into()) };
    let (rounds, files): (usize, usize) = (rounds.parse()?, files.parse()?);
    let mut settled = 0;
    // Many at once: what they took goes back to the machine.
    let before = memory(nix::unistd::getppid())?;
    let many = size(80_000, 500_000);
    fs::create_dir("many")?;
    for i in 0..many {
        symlink("x", format!("many/{i}"))?;
    }
    let most = memory(nix::unistd::getppid())? - before;
    holds!(most > many * 200 / 1024, "{most} KiB for {many}");
    fs::remove_dir_all("many")?;
    // The kernel forgets them when it comes to it.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while memory(nix::unistd::getppid())? - before > most * 2 / 3 && std::time::Instant::now() < deadline {
        // Not by looking all the time: whoever has some of them in hand may be one who gives way.
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let left = memory(nix::unistd::getppid())? - before;
    holds!(left <= most * 2 / 3, "{left} KiB of {most} KiB are left");
    for round in 0..rounds {
        fs::create_dir("made")?;
        for i in 0..files {
            File::create(format!("made/{i}"))?;
        }
        same!(
            fs::read_dir("made")?.filter(|e| e.as_ref().is_ok_and(|e| e.metadata().is_ok())).count(),
            files
        );
        fs::remove_dir_all("made")?;
        fs::remove_dir_all(format!("lower{round}"))?;
        let now = memory(nix::unistd::getppid())?;
        // Tables have the size then that one round needs.
        if round == 3 {
            settled = now;
        }
        holds!(
            round <= 3 || now < settled + size(1024, 8 * 1024),
            "round {round}: {settled} KiB, then {now}"
        );
    }
    Ok(())
}

/// A plain copy of the layer for [`Operation`]s.
fn plain_and_lower(world: &World) -> Check {
    for dir in [world.lower(), world.path("other/plain")] {
        crate::harness::remove(&dir)?;
        for name in TOPS {
            make_tree(&dir.join(name))?;
            fs::remove_file(dir.join(name).join("dir/a2"))?;
        }
    }
    Ok(())
}

const RULES: Rules = Rules { keep_readers: true, ..Rules::NARROW };

fn beside_plain(world: &mut World) -> Check {
    plain_and_lower(world)?;
    world.mount().run()?;
    no_leftovers(world)
}

fn nothing_to_do(_: i32) {}

extern "C" fn on_signal(number: i32) {
    nothing_to_do(number);
}

fn signals(_: &[String]) -> Check {
    let action = nix::sys::signal::SigAction::new(
        SigHandler::Handler(on_signal),
        nix::sys::signal::SaFlags::empty(),
        SigSet::empty(),
    );
    #[expect(unsafe_code, reason = "a handler, so that the signal interrupts and does not kill")]
    // SAFETY: the handler does nothing.
    unsafe {
        nix::sys::signal::sigaction(Signal::SIGUSR1, &action)?;
    }
    let plain = std::env::current_dir()?.join("../other/plain");
    let over = AtomicBool::new(false);
    let compared = std::thread::scope(|scope| -> Check {
        scope.spawn(|| {
            let mut mine = SigSet::empty();
            mine.add(Signal::SIGUSR1);
            if mine.thread_block().is_err() {
                return;
            }
            // To the process, and so to the other thread.
            while !over.load(Ordering::Acquire) {
                let _ = kill(Pid::this(), Signal::SIGUSR1);
                std::thread::yield_now();
            }
        });
        let done = (|| {
            let (mut here, mut there) = (Site::new(".", RULES), Site::new(&plain, RULES));
            let mut random = Random::new(7);
            for i in 0..size(500, 5_000) {
                let operation = Operation::random(&mut random);
                let show = |result: std::io::Result<String>| result.map_err(|err| errno_of(&err));
                let (got, wanted) = (show(operation.run(&mut here)), show(operation.run(&mut there)));
                // Outside others own it.
                let same_owner = |result: Result<String, _>| result.map(|text| text.replace("0:0", ""));
                same!(same_owner(got), same_owner(wanted), "operation {i}: {operation:?}");
            }
            Ok(())
        })();
        over.store(true, Ordering::Release);
        done
    });
    compared?;
    same_trees(&tree(Path::new("."))?, &tree(&plain)?)
}

fn busy_tree(world: &mut World) -> Check {
    make_tree(&world.lower())?;
    world.mount().run()?;
    no_leftovers(world)
}

/// Changes things until it is killed; one line for each round.
fn be_busy(name: &str) -> Check {
    for round in 0.. {
        let (one, other) = (format!("{name}.{}", round % 3), format!("{name}.{}", (round + 1) % 3));
        fs::write(&one, vec![b'b'; 100_000])?;
        fs::rename(&one, &other)?;
        fs::set_permissions("dir/b", fs::Permissions::from_mode(0o600 + round % 8))?;
        File::open(&other)?.sync_data()?;
        fs::create_dir(&one)?;
        fs::remove_dir(&one)?;
        writeln!(std::io::stdout(), "{round}")?;
    }
    Ok(())
}

fn other_process(words: &[&str]) -> Result<(Child, BufReader<std::process::ChildStdout>), Failure> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["--inside", "processes_may_be_killed_at_any_time"])
        .args(words)
        .stdout(Stdio::piped())
        .spawn()?;
    let output = BufReader::new(child.stdout.take().ok_or("no output")?);
    Ok((child, output))
}

fn killed_processes(args: &[String]) -> Check {
    match args {
        [] => {}
        [step, name] if step == "busy" => return be_busy(name),
        [step, name] if step == "ask" => {
            writeln!(std::io::stdout(), "now")?;
            fs::metadata(name)?;
            return Ok(());
        }
        _ => return Err("unknown step".into()),
    }
    let mut random = Random::new(3);
    for i in 0..size(10, 200) {
        let (mut child, output) = other_process(&["busy", &format!("busy{i}")])?;
        let lines = 1 + random.below(6);
        same!(output.lines().take(lines).count(), lines);
        child.kill()?;
        child.wait()?;
    }
    for entry in fs::read_dir(".")? {
        let path = entry?.path();
        if path.display().to_string().contains("busy") {
            if path.is_dir() { fs::remove_dir(path)? } else { fs::remove_file(path)? }
        }
    }
    // One that waits for an answer goes without it.
    let server = nix::unistd::getppid();
    let stopped = Stopped::new(server)?;
    let (mut child, mut output) = other_process(&["ask", "dir/sub/deep/d"])?;
    let mut line = String::new();
    output.read_line(&mut line)?;
    same!(line, "now\n");
    let stat = format!("/proc/{}/stat", child.id());
    loop {
        let state = fs::read_to_string(&stat)?;
        if state.contains(") S ") || state.contains(") D ") {
            break;
        }
        std::thread::yield_now();
    }
    child.kill()?;
    child.wait()?;
    drop(stopped);
    same!(fs::read_to_string("dir/sub/deep/d")?, "d");
    Ok(())
}

fn unmounted(world: &mut World) -> Check {
    for how in ["detached", "forced", "killed"] {
        world.empty_upper()?;
        crate::harness::remove(&world.lower())?;
        fs::create_dir(world.lower())?;
        for i in 0..THREADS {
            make_tree(&world.lower().join(i.to_string()))?;
        }
        let mount = world.mount().arg(how);
        if how == "killed" {
            // The end of all its processes is the end of the mount.
            let mut server =
                mount.command_under(&[])?.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
            let mut output = BufReader::new(server.stdout.take().ok_or("no output")?);
            let mut pid = String::new();
            output.read_line(&mut pid)?;
            kill(Pid::from_raw(pid.trim().parse()?), Signal::SIGKILL)?;
            same!(server.wait()?.code(), Some(137));
        } else {
            mount.run()?;
        }
        if how == "detached" {
            for i in 0..THREADS {
                same!(fs::read_dir(world.upper().join(i.to_string()))?.count(), 1 + ROUNDS);
            }
        }
        world.mount().arg("look").run()?;
        no_leftovers(world)?;
    }
    Ok(())
}

const THREADS: usize = 4;
const ROUNDS: usize = 60;

fn unmount(args: &[String]) -> Check {
    let how = args.first().map_or("", String::as_str);
    if how == "look" {
        for i in 0..THREADS {
            // Each file is there under one of its names.
            same!(
                fs::metadata(format!("{i}/file")).is_ok() || fs::metadata(format!("{i}/moved")).is_ok(),
                true
            );
        }
        return tree(Path::new(".")).map(drop);
    }
    let at = std::env::var("OVERLAY").map_err(|_| "no OVERLAY")?;
    let rounds = AtomicUsize::new(0);
    let work = |i: usize| -> Check {
        for round in 0.. {
            if how == "detached" && round == ROUNDS {
                break;
            }
            let dir = i.to_string();
            fs::write(format!("{dir}/made{round}"), vec![b'm'; 10_000])?;
            fs::rename(format!("{dir}/file"), format!("{dir}/moved"))?;
            fs::rename(format!("{dir}/moved"), format!("{dir}/file"))?;
            fs::read_dir(format!("{dir}/dir"))?.count();
            rounds.fetch_add(1, Ordering::AcqRel);
        }
        Ok(())
    };
    let results: Vec<Check> = std::thread::scope(|scope| -> Result<_, Failure> {
        let work = &work;
        let threads: Vec<_> = (0..THREADS).map(|i| scope.spawn(move || work(i))).collect();
        while rounds.load(Ordering::Acquire) < 2 * THREADS {
            std::thread::yield_now();
        }
        match how {
            "detached" => umount2(at.as_str(), MntFlags::MNT_DETACH)?,
            // It is busy; nobody is to be waited for all the same.
            "forced" => drop(umount2(at.as_str(), MntFlags::MNT_FORCE)),
            _ => writeln!(std::io::stdout(), "{}", std::process::id())?,
        }
        let join = |thread: std::thread::ScopedJoinHandle<'_, Check>| {
            thread.join().unwrap_or_else(|_| Err(Failure::Wrong("a thread panicked".to_owned())))
        };
        Ok(threads.into_iter().map(join).collect())
    })?;
    for result in results {
        match (how, result) {
            ("detached", Ok(())) => {}
            // All of them were told.
            ("forced", Err(Failure::Wrong(why))) => {
                holds!(["os error 103", "os error 107"].iter().any(|one| why.contains(one)), "{why}");
            }
            (_, other) => holds!(false, "{other:?}"),
        }
    }
    Ok(())
}

fn need_strace() -> Check {
    if Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_err() {
        return Err(Failure::Skip("there is no strace".to_owned()));
    }
    Ok(())
}

/// A mount whose server has system calls fail.
fn mount_failing(world: &World, inject: &str) -> Mount {
    // The command in the mount, which is executed, is not the server.
    let strace = ["strace", "-f", "-b", "execve", "-qq", "-o", "/dev/null", "-e", inject];
    world.bare().with("--workers", "1").with("--lower", world.lower()).upper(world).under(&strace)
}

fn failing(world: &mut World) -> Check {
    need_strace()?;
    let errors = ["ENOSPC", "EDQUOT", "EIO", "EROFS"];
    // What failed once comes first.
    for seed in [20, 28].into_iter().chain(1..=size(10, 100)) {
        let mut random = Random::new(seed as u64);
        world.empty_upper()?;
        plain_and_lower(world)?;
        let error = errors[random.below(errors.len())];
        let call = CHANGES[seed % CHANGES.len()];
        // Files are opened before it is mounted, too.
        let from = random.below(4) + if call == "openat" { 15 } else { 1 };
        let step = 2 + random.below(6);
        let inject = format!("inject={call}:error={error}:when={from}+{step}");
        let in_words = |failure: Failure| match failure {
            Failure::Wrong(text) => Failure::Wrong(format!("seed {seed}, {inject}: {text}")),
            skip @ Failure::Skip(_) => skip,
        };
        mount_failing(world, &inject).arg(error).arg(seed.to_string()).run().map_err(in_words)?;
        world.mount().run().map_err(in_words)?;
        no_leftovers(world)?;
    }
    Ok(())
}

/// Uppers that have room for some of the operations only.
fn full_upper(world: &mut World) -> Check {
    let small = world.path("other/small");
    for seed in 1..=size(6, 60) {
        plain_and_lower(world)?;
        for dir in [world.lower(), world.path("other/plain")] {
            for file in TOPS
                .iter()
                .flat_map(|top| ["file", "dir/a", "dir/b", "dir/sub/c"].map(|file| dir.join(top).join(file)))
            {
                fs::write(file, vec![b'x'; 12 << 10])?;
            }
        }
        fs::create_dir_all(&small)?;
        // Of objects, or of pages, each more or less.
        let (objects, pages) = if seed % 2 == 0 { (10 + seed % 10, 1000) } else { (1000, 1 + seed / 2 % 2) };
        let script = format!(
            "mount -t tmpfs -o size={pages}k,nr_inodes={objects} tmpfs {small} && mkdir {small}/up {small}/wk \
             || exit; exec \"$@\"",
            pages = pages * 4,
            small = small.display()
        );
        let mount = world
            .bare()
            .with("--lower", world.lower())
            .with("--upper", small.join("up"))
            .with("--work", small.join("wk"))
            .arg("ENOSPC")
            .arg(seed.to_string())
            .arg(if seed <= 6 { "too much" } else { "perhaps too much" })
            .under(&["unshare", "-Urm", "sh", "-c", &script, "sh"]);
        match mount.run() {
            Err(Failure::Wrong(text)) if text.contains("extended attributes for users") => {
                return Err(Failure::Skip("tmpfs has no user xattrs here".to_owned()));
            }
            Err(Failure::Wrong(text)) => return Err(Failure::Wrong(format!("seed {seed}: {text}"))),
            other => drop(other?),
        }
    }
    Ok(())
}

/// Operations of which some fail: those were not done.
fn ops_that_fail(args: &[String]) -> Check {
    let plain = std::env::current_dir()?.join("../other/plain");
    if let [error, seed, rest @ ..] = args {
        // New objects have modes that the server's own mask takes from it.
        nix::sys::stat::umask(nix::sys::stat::Mode::empty());
        let error = match error.as_str() {
            "ENOSPC" => Errno::NOSPC,
            "EDQUOT" => Errno::DQUOT,
            "EROFS" => Errno::ROFS,
            _ => Errno::IO,
        };
        // Modes that have to be recorded: what is made takes several steps then.
        let rules = Rules { any_mode: true, ..RULES };
        let (mut here, mut there) = (Site::new(".", rules), Site::new(&plain, rules));
        let (mut random, mut failed) = (Random::new(seed.parse()?), 0);
        for i in 0..600 {
            let operation = Operation::random(&mut random);
            // What is written stays in the kernel's cache, whatever becomes of it below.
            if operation.keeps() || operation.writes() {
                continue;
            }
            let show = |result: std::io::Result<String>| result.map(timeless).map_err(|err| errno_of(&err));
            let got = show(operation.run(&mut here));
            if got == Err(Some(error)) {
                failed += 1;
            } else {
                same!(got, show(operation.run(&mut there)), "operation {i}: {operation:?}");
            }
        }
        // Where calls are made to fail, looking would fail as well.
        if rest.is_empty() {
            return Ok(());
        }
        holds!(failed > 0 || rest[0] != "too much", "there was room for all of it");
    }
    let seen = |dir: &Path| -> Result<_, Failure> {
        Ok(tree(dir)?.into_iter().map(|(path, what)| (path, timeless(what))).collect())
    };
    same_trees(&seen(Path::new("."))?, &seen(&plain)?)
}

/// A directory without its time, which also changes when something in it is made and undone.
fn timeless(what: String) -> String {
    match what.strip_prefix("dir ").and_then(|rest| rest.split_once(", of ")) {
        Some((before, after)) => {
            let after = after.split_once(' ').map_or("", |(_, after)| after);
            format!("dir {before} {after}").trim_end().to_owned()
        }
        None => what.trim_end().to_owned(),
    }
}

fn unreadable(world: &mut World) -> Check {
    need_strace()?;
    make_tree(&world.lower())?;
    for calls in ["pread64", "readlinkat", "copy_file_range,pread64", "getdents64"] {
        world.empty_upper()?;
        let inject = format!("inject={calls}:error=EIO");
        mount_failing(world, &inject).arg(calls).run()?;
        if calls.contains("copy") {
            same!(tree(&world.upper())?.into_keys().collect::<Vec<_>>(), [Path::new("made")]);
        }
        no_leftovers(world)?;
    }
    Ok(())
}

fn read_failing(args: &[String]) -> Check {
    match args.first().map(String::as_str) {
        Some("pread64") => {
            errno!(fs::read("file"), IO);
            errno!(fs::read("dir/sub/c"), IO);
        }
        Some("readlinkat") => errno!(fs::read_link("link"), IO),
        Some("getdents64") => {
            errno!(fs::read_dir("dir")?.next().transpose(), IO);
            // Not taken for an empty one.
            errno!(fs::remove_dir("dir"), IO);
        }
        _ => {
            errno!(fs::set_permissions("file", fs::Permissions::from_mode(0o600)), IO);
            errno!(fs::rename("file", "other"), IO);
            errno!(fs::hard_link("file", "other"), IO);
            errno!(fs::metadata("other"), NOENT);
            same!(fs::metadata("file")?.mode() & 0o777, 0o644);
            fs::write("made", "")?;
        }
    }
    same!(fs::metadata("dir/sub/deep/d")?.len(), 1);
    Ok(())
}

fn frozen(world: &mut World) -> Check {
    make_tree(&world.lower())?;
    let other = world.path("other");
    let small = other.join("small");
    fs::create_dir(&small)?;
    for fifo in ["freeze", "frozen"] {
        nix::unistd::mkfifo(&other.join(fifo), nix::sys::stat::Mode::S_IRWXU)?;
    }
    // Whoever made the file system is asked through a fifo to make it read-only.
    let script = format!(
        "cd {other} && mount -t tmpfs -o size=4m tmpfs small && mkdir small/up small/wk || exit 1
         \"$@\" & read line <freeze; {{ mount --options-mode=ignore -o remount,ro small && echo done; }} >frozen; wait $!",
        other = other.display()
    );
    let mount = world
        .bare()
        .with("--lower", world.lower())
        .with("--upper", small.join("up"))
        .with("--work", small.join("wk"))
        .arg(other.display().to_string())
        .under(&["unshare", "-Urm", "sh", "-c", &script, "sh"]);
    match mount.run() {
        Err(Failure::Wrong(text)) if text.contains("extended attributes for users") => {
            Err(Failure::Skip("tmpfs has no user xattrs here".to_owned()))
        }
        other => other.map(drop),
    }
}

fn freeze(args: &[String]) -> Check {
    let other = Path::new(args.first().ok_or("an argument is wanted")?);
    // Nothing is open for writing then, which would keep it writable.
    fs::create_dir("made")?;
    std::os::unix::fs::symlink("target", "made/a")?;
    fs::remove_file("dir/b")?;
    let before = tree(Path::new("."))?;
    OpenOptions::new().write(true).open(other.join("freeze"))?.write_all(b"now\n")?;
    same!(fs::read_to_string(other.join("frozen"))?, "done\n");
    errno!(File::create("new"), ROFS);
    errno!(fs::create_dir("new"), ROFS);
    errno!(fs::remove_file("file"), ROFS);
    errno!(fs::remove_file("made/a"), ROFS);
    errno!(fs::remove_dir("empty"), ROFS);
    errno!(fs::rename("file", "other"), ROFS);
    errno!(fs::rename("dir", "other"), ROFS);
    errno!(fs::hard_link("file", "other"), ROFS);
    errno!(fs::set_permissions("file", fs::Permissions::from_mode(0o600)), ROFS);
    errno!(fs::set_permissions("made", fs::Permissions::from_mode(0o700)), ROFS);
    errno!(rustix::fs::setxattr("file", "user.x", b"x", rustix::fs::XattrFlags::empty()), ROFS);
    errno!(OpenOptions::new().write(true).open("file").and_then(|file| file.set_len(1)), ROFS);
    same_trees(&tree(Path::new("."))?, &before)?;
    // The page is the writer's; what becomes of it he is told.
    let file = OpenOptions::new().write(true).open("dir/sub/c")?;
    errno!(file.write_all_at(b"x", 0).and_then(|()| file.sync_all()), ROFS);
    Ok(())
}
