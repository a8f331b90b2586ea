//! The overlay against others, as ratios of one run: `cargo bench -p fsoverlay --bench compare -- OPTIONS`.
//!
//! ```text
//! --mount NAME=COMMAND   another overlay; the command mounts and comes back. {lower}, {upper}, {work}
//!                        and {at} are filled in, e.g.
//!                        --mount 'fo2=fuse-overlayfs -o lowerdir={lower},upperdir={upper},workdir={work} {at}'
//! --work A,B             only these (the names in the first column)
//! --who ours,kernel      only these contenders. `least`, which is measured only where it is named: see below
//! --layers 1,10,100      numbers of layers (1)
//! --rounds N             5
//! --scale PERCENT        smaller trees, for a quick look (100)
//! --uppers disk|tmpfs    where uppers are: in $TMPDIR as the trees (disk), or in memory; see below
//! --real-root            no user namespace: for root, who may do more. `through` is ours with FUSE passthrough
//! --keep                 leaves the trees in $TMPDIR, and uses them again
//! ```
//!
//! Each measurement has a user and mount namespace, a fresh upper and a fresh mount of its own; the
//! contenders take turns, so that whatever else the machine does meets all of them alike. Afterwards it is
//! checked that the work was done; who has not done it has no figures, and the status is 1. `first` is the
//! first pass over a fresh mount, `again` the same once more. What is below has been read before.
//! `FSOVERLAY_RECORDED` keeps owners as `rootlet run` does rather than as `rootlet overlay` does;
//! `FSOVERLAY_WORKERS` is the number of threads.
//!
//! An ext4 without a journal (which some virtual machines have) does not give out again the numbers of files that
//! were deleted within the last one to five minutes, and looks at all of those before the first free one for each
//! new file: where many were deleted in earlier rounds, whoever comes next takes twenty times as long and more to
//! create or unpack files. So there, unless `--uppers` says otherwise, each measurement has its upper (and the bare
//! directory its files) on a tmpfs of its own, where nobody has deleted anything. The line above the table says
//! where it was.
//!
//! Medians are printed: ours in milliseconds, and ours ÷ each of the others. `bare` is the directory itself.
//!
//! `least` is the least that any FUSE server does (`least.rs`, docs/decisions/0011): one thread that answers from memory, on
//! the processor of the asker if that one waits for each answer. It takes part in works of one asker over one layer.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program of our own, for people to read"
)]

mod least;
mod place;
mod trees;
mod works;

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

use fsoverlay::{LayerSpec, Overlay, OverlaySpec, OwnerForm, Records, UpperSpec};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::works::{Asks, WORKS, Work};

/// Who is measured.
#[derive(Clone)]
enum How {
    /// No mount.
    Bare,
    /// The kernel's overlayfs with `userxattr`.
    Kernel,
    /// This crate, served by another process of ours.
    Ours,
    /// The same with FUSE passthrough.
    Passthrough,
    /// A tree in memory, served by another process of ours.
    Least,
    /// A command that mounts.
    Command(String),
}

impl How {
    fn takes_part(&self, work: &Work, layers: usize) -> bool {
        match self {
            Self::Bare => layers == 1,
            Self::Least => layers == 1 && work.asks != Asks::AtOnce,
            _ => true,
        }
    }
}

/// The directories of one mount.
struct Dirs {
    /// The topmost first, as in `lowerdir=`.
    lowers: Vec<PathBuf>,
    upper: PathBuf,
    work: PathBuf,
    at: PathBuf,
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    match args.first().map(String::as_str) {
        Some("inside") => {
            inside(&args[1..]);
            return ExitCode::SUCCESS;
        }
        Some("serve") => {
            serve(&args[1..]);
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let value = |name: &str| args.iter().skip_while(|arg| *arg != name).nth(1).cloned();
    let number = |name: &str, default| value(name).map_or(default, |text| text.parse().unwrap());
    let options = Options {
        scale: number("--scale", 100),
        rounds: number("--rounds", 5),
        real_root: args.iter().any(|arg| arg == "--real-root"),
        tmpfs: match value("--uppers").as_deref() {
            Some("disk") => false,
            Some("tmpfs") => true,
            Some(other) => panic!("--uppers is disk or tmpfs, not {other}"),
            None => place::avoids_deleted(&std::env::temp_dir()),
        },
    };
    let only: Option<Vec<String>> = value("--work").map(|l| l.split(',').map(str::to_owned).collect());
    let layers: Vec<usize> =
        value("--layers").map_or_else(|| vec![1], |l| l.split(',').map(|n| n.parse().unwrap()).collect());
    let mut contenders = vec![
        ("bare".to_owned(), How::Bare),
        ("kernel".to_owned(), How::Kernel),
        ("ours".to_owned(), How::Ours),
    ];
    let mut words = args.iter();
    while let Some(word) = words.next() {
        if word == "--mount" {
            let (name, command) = words.next().unwrap().split_once('=').expect("NAME=COMMAND");
            contenders.push((name.to_owned(), How::Command(command.to_owned())));
        }
    }
    if options.real_root {
        contenders.push(("through".to_owned(), How::Passthrough));
    }
    if let Some(only) = value("--who") {
        contenders.push(("least".to_owned(), How::Least));
        contenders.retain(|(name, _)| only.split(',').any(|one| one == name));
    }
    let keep = args.iter().any(|arg| arg == "--keep");
    let base =
        if keep { "fsoverlay-bench".to_owned() } else { format!("fsoverlay-bench-{}", std::process::id()) };
    let base = std::env::temp_dir().join(base);
    println!("{}", place::describe(&std::env::temp_dir(), options.tmpfs));
    let mut head = format!("{:<15} {:>6} {:<12} {:>9}", "work", "layers", "part", "ours ms");
    for (name, _) in contenders.iter().filter(|(name, _)| name != "ours") {
        head.push_str(&format!(" {:>10}", format!("÷{name}")));
    }
    println!("{head}");
    let mut all_done = true;
    for work in WORKS {
        if only.as_ref().is_some_and(|only| !only.iter().any(|name| name == work.name)) {
            continue;
        }
        for &layers in &layers {
            if layers > 1 && !work.layered {
                continue;
            }
            all_done &= compare(work, layers, &contenders, &options, &base);
        }
    }
    if !keep {
        std::fs::remove_dir_all(&base).unwrap();
    }
    if all_done { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What is the same for all measurements.
struct Options {
    scale: usize,
    rounds: usize,
    real_root: bool,
    /// Uppers are in memory.
    tmpfs: bool,
}

/// Measures one kind of work for all and prints its lines. False if somebody has not done it.
fn compare(work: &Work, layers: usize, contenders: &[(String, How)], options: &Options, base: &Path) -> bool {
    let tree = base.join(format!("{}-{layers}-{}", work.tree, options.scale));
    if !tree.exists() {
        let building = tree.with_extension("building");
        let _ = std::fs::remove_dir_all(&building);
        let lowers: Vec<PathBuf> = (0..layers).map(|i| building.join(i.to_string())).collect();
        for lower in &lowers {
            std::fs::create_dir_all(lower).unwrap();
        }
        trees::build(work.tree, &lowers, options.scale);
        std::fs::rename(&building, &tree).unwrap();
    }
    // part -> contender -> milliseconds
    let mut times: BTreeMap<(usize, String), BTreeMap<String, Vec<f64>>> = BTreeMap::new();
    let mut failed: Vec<String> = Vec::new();
    for round in 0..options.rounds + 1 {
        for (name, how) in contenders {
            if !how.takes_part(work, layers) || failed.contains(name) {
                continue;
            }
            let output = measure(work, how, (&tree, layers), options, base);
            // The first round warms what lies below.
            let Some(output) = output else {
                eprintln!("{}: {name} failed", work.name);
                failed.push(name.clone());
                continue;
            };
            if round == 0 {
                continue;
            }
            for (order, line) in output.lines().enumerate() {
                let (part, value) = line.split_once('\t').expect("a part and its value");
                let values =
                    times.entry((order, part.to_owned())).or_default().entry(name.clone()).or_default();
                values.push(value.parse().unwrap());
            }
        }
    }
    for ((_, part), by_name) in times {
        let median = |name: &str| {
            let mut values = by_name.get(name)?.clone();
            values.sort_by(f64::total_cmp);
            Some(values[values.len() / 2])
        };
        let first = if contenders.iter().any(|(name, _)| name == "ours") { "ours" } else { &contenders[0].0 };
        let ours = median(first).unwrap_or(f64::NAN);
        let mut line = format!("{:<15} {layers:>6} {part:<12} {ours:>9.2}", work.name);
        for (name, _) in contenders.iter().filter(|(name, _)| name != "ours") {
            match median(name) {
                Some(theirs) => line.push_str(&format!(" {:>10.2}", ours / theirs)),
                None => line.push_str(&format!(" {:>10}", "-")),
            }
        }
        println!("{line}");
    }
    failed.is_empty()
}

/// One measurement in namespaces of its own: lines of part and milliseconds.
fn measure(
    work: &Work,
    how: &How,
    (tree, layers): (&Path, usize),
    options: &Options,
    base: &Path,
) -> Option<String> {
    let run = base.join("run");
    let _ = std::fs::remove_dir_all(&run);
    std::fs::create_dir_all(&run).unwrap();
    let how = match how {
        How::Bare => "bare",
        How::Kernel => "kernel",
        How::Ours => "ours",
        How::Passthrough => "passthrough",
        How::Least => "least",
        How::Command(command) => command,
    };
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["inside", how, work.name, &layers.to_string(), &options.scale.to_string()])
        .arg(if options.real_root { "root" } else { "namespace" })
        .arg(if options.tmpfs { "tmpfs" } else { "disk" })
        .args([tree, &run])
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let _ = std::fs::remove_dir_all(&run);
    (output.status.success() && !text.is_empty()).then_some(text)
}

/// The child: makes the namespaces and the mount, then works and prints times.
fn inside(args: &[String]) {
    let [how, work, layers, scale, who, uppers, tree, run] = args else { panic!("eight arguments") };
    let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
    if who == "root" {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
    } else {
        unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS).unwrap();
        std::fs::write("/proc/self/setgroups", "deny").unwrap();
        std::fs::write("/proc/self/uid_map", format!("0 {uid} 1")).unwrap();
        std::fs::write("/proc/self/gid_map", format!("0 {gid} 1")).unwrap();
    }
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    let (tree, run) = (Path::new(tree), Path::new(run));
    // The last to go: all else is on it.
    let memory = (uppers == "tmpfs").then(|| {
        mount(Some("tmpfs"), run, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        Mounted(run)
    });
    for dir in ["upper", "work", "at"] {
        std::fs::create_dir_all(run.join(dir)).unwrap();
    }
    let layers: usize = layers.parse().unwrap();
    let dirs = Dirs {
        lowers: (0..layers).rev().map(|i| tree.join(i.to_string())).collect(),
        upper: run.join("upper"),
        work: run.join("work"),
        at: run.join("at"),
    };
    let work = WORKS.iter().find(|known| known.name == work).unwrap();
    let mut server = None;
    match how.as_str() {
        "bare" => {
            if work.writes {
                let copied =
                    Command::new("cp").arg("-a").arg(dirs.lowers[0].join(".")).arg(&dirs.at).status();
                assert!(copied.unwrap().success());
            } else {
                mount(Some(&dirs.lowers[0]), &dirs.at, none, MsFlags::MS_BIND, none).unwrap();
            }
        }
        "kernel" => {
            mount_kernel(&dirs);
        }
        "ours" => server = Some(start_server(&dirs, "plain")),
        "passthrough" => server = Some(start_server(&dirs, "passthrough")),
        "least" => {
            if work.asks == Asks::InTurns {
                // So is its server.
                least::stay_here();
            }
            server = Some(start_server(&dirs, "least"));
        }
        command => {
            let fill = |word: &str| {
                word.replace("{lower}", &joined(&dirs.lowers))
                    .replace("{upper}", dirs.upper.to_str().unwrap())
                    .replace("{work}", dirs.work.to_str().unwrap())
                    .replace("{at}", dirs.at.to_str().unwrap())
            };
            let words: Vec<String> = command.split_whitespace().map(fill).collect();
            // Its own end is not this one's: what it leaves running must not hold our output open.
            let null = || Stdio::null();
            let status = Command::new(&words[0]).args(&words[1..]).stdin(null()).stdout(null()).status();
            assert!(status.unwrap().success(), "{words:?} failed");
        }
    }
    let mounted = Mounted(&dirs.at);
    // A file's pages belong to what is below, which must not be what is measured.
    let mut out = String::new();
    for (part, value) in (work.run)(&dirs.at) {
        out.push_str(&format!("{part}\t{}\n", value.as_secs_f64() * 1e3));
    }
    if let Some((kib, cpu)) = server_use() {
        out.push_str(&format!("server CPU\t{}\n", cpu / 1e6));
        if work.memory {
            out.push_str(&format!("server MiB\t{}\n", kib / 1024.0));
        }
    }
    (work.check)(&dirs.at, scale.parse().unwrap());
    std::env::set_current_dir("/").unwrap();
    drop(mounted);
    drop(server);
    drop(memory);
    std::io::stdout().write_all(out.as_bytes()).unwrap();
}

fn joined(lowers: &[PathBuf]) -> String {
    lowers.iter().map(|dir| dir.to_str().unwrap()).collect::<Vec<_>>().join(":")
}

/// Layer by layer: mount(2) takes one page of options.
fn mount_kernel(dirs: &Dirs) {
    use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags};
    let fs = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    rustix::mount::fsconfig_set_flag(fs.as_fd(), "userxattr").unwrap();
    for lower in &dirs.lowers {
        rustix::mount::fsconfig_set_string(fs.as_fd(), "lowerdir+", lower).unwrap();
    }
    rustix::mount::fsconfig_set_string(fs.as_fd(), "upperdir", &dirs.upper).unwrap();
    rustix::mount::fsconfig_set_string(fs.as_fd(), "workdir", &dirs.work).unwrap();
    rustix::mount::fsconfig_create(fs.as_fd()).unwrap();
    let mounted =
        rustix::mount::fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap();
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(mounted.as_fd(), "", rustix::fs::CWD, &dirs.at, flags).unwrap();
}

/// What is unmounted in the end, also after a failure: a server lasts as long as its mount.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = umount2(self.0, MntFlags::MNT_DETACH);
    }
}

/// A process that serves; it ends with its mount.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.wait();
    }
}

fn start_server(dirs: &Dirs, mode: &str) -> Server {
    let mut command = Command::new(std::env::current_exe().unwrap());
    // Not busybox-like by name: the words before the directories are options of ours.
    command
        .arg0("fsoverlay-server")
        .args(["serve", mode])
        .args([&dirs.at, &dirs.upper, &dirs.work])
        .args(&dirs.lowers);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut byte = [0];
    child.stdout.take().unwrap().read_exact(&mut byte).expect("the server came up");
    Server(child)
}

/// Mounts and serves until the mount is gone; says so by one byte.
fn serve(args: &[String]) {
    let [mode, at, upper, work, lowers @ ..] = args else { panic!("directories") };
    if mode == "least" {
        let tree = least::Tree::read(Path::new(&lowers[0]));
        return least::serve(tree, mount_fuse(at), say_ready);
    }
    // As for `run`, or as the program mounts without further options.
    let recorded = std::env::var_os("FSOVERLAY_RECORDED").is_some();
    let records = if recorded { Records::Everywhere } else { Records::IfMarked };
    let layer = |dir: &String| LayerSpec { dir: dir.into(), records, ..LayerSpec::default() };
    let workers = std::env::var("FSOVERLAY_WORKERS").map_or(2, |text| text.parse().unwrap());
    let overlay = Overlay::open(&OverlaySpec {
        layers: lowers.iter().rev().map(layer).collect(),
        upper: Some(UpperSpec { dir: upper.into(), work: work.into(), ..UpperSpec::default() }),
        squash: recorded.then_some((0, 0)),
        owner_form: if recorded { OwnerForm::Recorded } else { OwnerForm::Native },
        workers,
        passthrough: mode == "passthrough",
        ..OverlaySpec::default()
    })
    .unwrap();
    let fuse = mount_fuse(at);
    let proc = std::fs::File::open("/proc").unwrap();
    let server = overlay.with_proc(proc.into()).serve(fuse).unwrap();
    say_ready();
    server.join();
}

fn mount_fuse(at: &str) -> OwnedFd {
    let fuse = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").unwrap();
    let data = fsoverlay::mount_data(fuse.as_raw_fd(), 0, 0);
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("overlay"), Path::new(at), Some("fuse"), flags, Some(&*data)).unwrap();
    fuse.into()
}

/// The bench reads one byte; what comes later has no reader.
fn say_ready() {
    let mut out = std::io::stdout();
    out.write_all(b"s").and_then(|()| out.flush()).unwrap();
}

/// Private memory in KiB and CPU time in nanoseconds of the process that serves in this mount namespace.
fn server_use() -> Option<(f64, f64)> {
    let ours = std::fs::read_link("/proc/self/ns/mnt").ok()?;
    let mut most: Option<(f64, f64)> = None;
    for process in std::fs::read_dir("/proc").ok()?.flatten() {
        let path = process.path();
        let Some(Ok(pid)) = process.file_name().to_str().map(str::parse::<u32>) else { continue };
        if std::fs::read_link(path.join("ns/mnt")).ok().as_ref() != Some(&ours) || pid == std::process::id() {
            continue;
        }
        let text = std::fs::read_to_string(path.join("smaps_rollup")).unwrap_or_default();
        let private: f64 = text
            .lines()
            .filter(|line| line.starts_with("Private_"))
            .filter_map(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok())
            .sum();
        let tasks = std::fs::read_dir(path.join("task")).into_iter().flatten().flatten();
        let cpu: f64 = tasks
            .filter_map(|task| std::fs::read_to_string(task.path().join("schedstat")).ok())
            .filter_map(|text| text.split_whitespace().next()?.parse::<f64>().ok())
            .sum();
        if most.is_none_or(|(_, known)| cpu > known) {
            most = Some((private, cpu));
        }
    }
    most
}
