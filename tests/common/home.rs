//! A home of its own for each test, and the check that nothing is left of what ran in it.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::Cmd;

pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Environment variable by which processes that a test started are known.
const MARK: &str = "ROOTLET_TEST_MARK";

/// The binary under test: the one `./test` built and copied, else the one cargo built.
pub(crate) fn rootlet_binary() -> PathBuf {
    std::env::var_os("ROOTLET_BIN").map_or_else(|| env!("CARGO_BIN_EXE_rootlet").into(), PathBuf::from)
}

/// A directory that is HOME, state, cache and TMPDIR of everything one test runs. Dropped, it
/// fails the test if anything is left: a process, a mount, a device, a cgroup, a box that
/// [`Home::keeps`] did not announce, or a file that the user cannot remove.
pub(crate) struct Home {
    dir: PathBuf,
    mark: String,
    kept: RefCell<BTreeSet<String>>,
    groups: Arc<Mutex<Vec<i32>>>,
}

impl Home {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = super::test_name().replace("::", ".");
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let mark = format!("{}-{number}", std::process::id());
        let dir = std::env::temp_dir().join(format!("{name}-{mark}"));
        for sub in ["home", "state", "tmp", "work"] {
            std::fs::create_dir_all(dir.join(sub)).unwrap();
        }
        Self { dir, mark, kept: RefCell::default(), groups: Arc::default() }
    }

    /// A path below it.
    pub(crate) fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.dir.join(relative)
    }

    /// The same as text, for scripts.
    pub(crate) fn text(&self, relative: impl AsRef<Path>) -> String {
        self.path(relative).to_str().unwrap().to_owned()
    }

    /// Makes a file below it, with its directories.
    pub(crate) fn file(&self, relative: impl AsRef<Path>, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(relative);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path
    }

    /// Makes an executable file below it.
    pub(crate) fn script(&self, relative: impl AsRef<Path>, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.file(relative, content);
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        path
    }

    /// Makes a directory below it.
    pub(crate) fn dir(&self, relative: impl AsRef<Path>) -> PathBuf {
        let path = self.path(relative);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    /// Any program in this home's environment, started in its `work` directory.
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Cmd {
        Cmd::new(program)
            .recorded_in(Arc::clone(&self.groups))
            .clear_env()
            .env("PATH", PATH)
            .env("HOME", self.path("home"))
            .env("XDG_STATE_HOME", self.path("state"))
            .env("TMPDIR", self.path("tmp"))
            .env("LANG", "C.UTF-8")
            .env("TERM", "xterm")
            .env(MARK, &self.mark)
            .cwd(self.path("work"))
    }

    /// rootlet with these arguments.
    pub(crate) fn rootlet<A: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Cmd {
        self.command(rootlet_binary()).args(args)
    }

    /// `rootlet run --rm OPTIONS -- COMMAND`
    pub(crate) fn run<A: AsRef<std::ffi::OsStr>, B: AsRef<std::ffi::OsStr>>(
        &self,
        options: impl IntoIterator<Item = A>,
        command: impl IntoIterator<Item = B>,
    ) -> Cmd {
        self.rootlet(["run", "--rm"]).args(options).arg("--").args(command)
    }

    /// `rootlet run --rm OPTIONS -- sh -c SCRIPT`
    pub(crate) fn sh<A: AsRef<std::ffi::OsStr>>(
        &self,
        options: impl IntoIterator<Item = A>,
        script: &str,
    ) -> Cmd {
        self.run(options, ["sh", "-c", script])
    }

    /// `rootlet run --rm OPTIONS -- python3 -c SCRIPT`
    pub(crate) fn python<A: AsRef<std::ffi::OsStr>>(
        &self,
        options: impl IntoIterator<Item = A>,
        script: &str,
    ) -> Cmd {
        self.run(options, ["python3", "-c", script])
    }

    /// Where boxes are.
    pub(crate) fn boxes_dir(&self) -> PathBuf {
        self.path("state/rootlet/boxes")
    }

    /// Names of the boxes there are.
    pub(crate) fn boxes(&self) -> BTreeSet<String> {
        names_in(&self.boxes_dir())
    }

    /// The test leaves this box on purpose.
    pub(crate) fn keeps(&self, name: &str) {
        self.kept.borrow_mut().insert(name.to_owned());
    }

    /// Fails if something is left of what ran here.
    #[track_caller]
    pub(crate) fn check_nothing_left(&self) {
        // A process that was killed may need a moment to be gone: the kernel ends the rest of a
        // pid namespace after its init, and reaping is somebody else's.
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            let left = self.left_processes();
            if left.is_empty() {
                break;
            }
            assert!(super::process::all_ended(&left, until), "processes are left: {left:#?}");
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let ours = self.dir.to_str().unwrap();
        // What is mounted in another test's home is that one's to check.
        let homes = std::env::temp_dir();
        let is_left = |line: &&str| {
            let point = Path::new(line.split(' ').nth(4).unwrap_or_default());
            line.contains("rootlet")
                && (line.contains(ours) || line.contains("fuse") && !point.starts_with(&homes))
        };
        let mounts: Vec<&str> = mounts.lines().filter(is_left).collect();
        assert!(mounts.is_empty(), "mounts are left: {mounts:#?}");
        let devices: Vec<String> = names_in(Path::new("/sys/class/net"))
            .into_iter()
            .filter(|name| name.starts_with("tap"))
            .collect();
        assert!(devices.is_empty(), "network devices are left: {devices:?}");
        let cgroups = cgroups_with("rootlet");
        assert!(cgroups.is_empty(), "cgroups are left: {cgroups:?}");
        let kept = self.kept.borrow();
        let boxes: Vec<String> = self.boxes().into_iter().filter(|name| !kept.contains(name)).collect();
        assert!(boxes.is_empty(), "boxes are left: {boxes:?}");
        let temporary = names_in(&self.path("tmp"));
        assert!(temporary.is_empty(), "temporary files are left: {temporary:?}");
        let others: Vec<String> = names_in(&self.path("state/rootlet"))
            .into_iter()
            .filter(|name| name != "boxes" && !name.contains("lock"))
            .collect();
        assert!(others.is_empty(), "unknown state is left: {others:?}");
    }

    /// Processes that carry this home's mark, or are in the group of one that was started here: the
    /// environment of a sandbox's init cannot be read.
    fn left_processes(&self) -> Vec<Process> {
        let mark = format!("{MARK}={}", self.mark);
        let groups = self.groups.lock().unwrap();
        processes()
            .into_iter()
            .filter(|p| p.state != 'Z')
            .filter(|p| {
                if groups.contains(&p.group) {
                    return true;
                }
                let environ = std::fs::read(format!("/proc/{}/environ", p.pid)).unwrap_or_default();
                environ.split(|b| *b == 0).any(|word| word == mark.as_bytes())
            })
            .collect()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.check_nothing_left();
        }
        // What a test leaves in its home must be removable by the user with plain rm -rf.
        let removed = std::process::Command::new("rm").arg("-rf").arg("--").arg(&self.dir).output().unwrap();
        if !std::thread::panicking() {
            assert!(removed.status.success(), "rm -rf: {}", String::from_utf8_lossy(&removed.stderr));
        }
    }
}

fn names_in(dir: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten();
    entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

fn cgroups_with(word: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if entry.file_name().to_string_lossy().contains(word) {
                    found.push(entry.path());
                }
                todo.push(entry.path());
            }
        }
    }
    found
}

/// A line of /proc.
#[derive(Debug, Clone)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    pub(crate) name: String,
    pub(crate) state: char,
    pub(crate) group: i32,
}

/// Every process there is.
pub(crate) fn processes() -> Vec<Process> {
    let pids = std::fs::read_dir("/proc").unwrap().flatten();
    pids.filter_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        // pid (name) state ppid pgrp …: the name may hold anything, a parenthesis too.
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (start, end) = (stat.find('(')?, stat.rfind(')')?);
        let mut fields = stat[end + 1..].split_ascii_whitespace();
        Some(Process {
            pid,
            name: stat[start + 1..end].to_owned(),
            state: fields.next()?.chars().next()?,
            group: fields.nth(1)?.parse().ok()?,
        })
    })
    .collect()
}
