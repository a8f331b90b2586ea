//! Programs with a deadline.

use std::ffi::{OsStr, OsString};
use std::io::{Read, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

/// Nothing here takes this long on a machine that is ten times slower than a laptop.
const DEADLINE: Duration = Duration::from_secs(60);

/// Multiplies deadlines on slow machines (emulation): `ROOTLET_TEST_SLOW=10`.
fn slow() -> u32 {
    std::env::var("ROOTLET_TEST_SLOW").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

enum Input {
    Bytes(Vec<u8>),
    From(Stdio),
    /// A pipe that the test writes to and closes itself.
    Open,
}

/// A program to be run.
pub(crate) struct Cmd {
    command: Command,
    input: Input,
    output: Option<Stdio>,
    deadline: Duration,
    groups: Option<Arc<Mutex<Vec<i32>>>>,
}

impl Cmd {
    pub(crate) fn new(program: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(program);
        // A group of its own, so that a deadline ends what it started too.
        command.process_group(0);
        Self { command, input: Input::Bytes(Vec::new()), output: None, deadline: DEADLINE, groups: None }
    }

    /// Notes the process group of what is started.
    pub(crate) fn recorded_in(mut self, groups: Arc<Mutex<Vec<i32>>>) -> Self {
        self.groups = Some(groups);
        self
    }

    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    pub(crate) fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.command.args(args);
        self
    }

    pub(crate) fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    pub(crate) fn env_remove(mut self, name: &str) -> Self {
        self.command.env_remove(name);
        self
    }

    pub(crate) fn clear_env(mut self) -> Self {
        self.command.env_clear();
        self
    }

    pub(crate) fn cwd(mut self, dir: impl AsRef<Path>) -> Self {
        self.command.current_dir(dir);
        self
    }

    pub(crate) fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Input::Bytes(bytes.into());
        self
    }

    pub(crate) fn stdin_from(mut self, source: impl Into<Stdio>) -> Self {
        self.input = Input::From(source.into());
        self
    }

    /// Keeps standard input open until [`Running::close_stdin`].
    pub(crate) fn stdin_open(mut self) -> Self {
        self.input = Input::Open;
        self
    }

    /// Standard output goes there rather than to [`Out::out`].
    pub(crate) fn stdout_to(mut self, target: impl Into<Stdio>) -> Self {
        self.output = Some(target.into());
        self
    }

    /// For what is known to take long: a hundred thousand files, a whole package installation.
    pub(crate) fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Starts it.
    pub(crate) fn start(mut self) -> Running {
        let shown = shown(&self.command);
        let (stdin, bytes) = match self.input {
            Input::Bytes(bytes) if bytes.is_empty() => (Stdio::null(), None),
            Input::Bytes(bytes) => (Stdio::piped(), Some(bytes)),
            Input::From(source) => (source, None),
            Input::Open => (Stdio::piped(), None),
        };
        self.command.stdin(stdin).stdout(self.output.unwrap_or_else(Stdio::piped)).stderr(Stdio::piped());
        let mut child = self.command.spawn().unwrap_or_else(|e| panic!("cannot start {shown}: {e}"));
        if let Some(groups) = &self.groups {
            groups.lock().unwrap().push(child.id().cast_signed());
        }
        let mut stdin = child.stdin.take();
        if let Some(bytes) = bytes {
            let mut pipe = stdin.take().unwrap();
            // EPIPE: a program need not read what it is given.
            std::thread::spawn(move || pipe.write_all(&bytes).ok());
        }
        let out = child.stdout.take().map(Collector::start);
        let err = child.stderr.take().map(Collector::start);
        Running {
            child,
            stdin,
            out,
            err,
            shown,
            until: Instant::now() + self.deadline * slow(),
            status: None,
        }
    }

    /// Runs it to its end.
    pub(crate) fn run(self) -> Out {
        self.start().finish()
    }
}

fn shown(command: &Command) -> String {
    let words: Vec<OsString> =
        std::iter::once(command.get_program()).chain(command.get_args()).map(OsString::from).collect();
    let mut text = words.iter().map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ");
    if text.len() > 2000 {
        text.truncate(text.floor_char_boundary(2000));
        text.push('…');
    }
    text
}

/// Reads a stream to its end in the background.
struct Collector {
    shared: Arc<(Mutex<Collected>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Collected {
    bytes: Vec<u8>,
    ended: bool,
}

impl Collector {
    fn start(mut stream: impl Read + Send + 'static) -> Self {
        let shared = Arc::<(Mutex<Collected>, Condvar)>::default();
        let theirs = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let mut buffer = vec![0; 64 * 1024];
            loop {
                let got = stream.read(&mut buffer).unwrap_or(0);
                let mut collected = theirs.0.lock().unwrap();
                collected.bytes.extend_from_slice(&buffer[..got]);
                collected.ended = got == 0;
                theirs.1.notify_all();
                if got == 0 {
                    return;
                }
            }
        });
        Self { shared, thread: Some(thread) }
    }

    /// Waits until the condition holds of what was read so far; `None` at the deadline.
    fn wait<T>(&self, until: Instant, mut condition: impl FnMut(&Collected) -> Option<T>) -> Option<T> {
        let mut collected = self.shared.0.lock().unwrap();
        loop {
            if let Some(value) = condition(&collected) {
                return Some(value);
            }
            let left = until.checked_duration_since(Instant::now())?;
            collected = self.shared.1.wait_timeout(collected, left).unwrap().0;
        }
    }

    fn so_far(&self) -> Vec<u8> {
        self.shared.0.lock().unwrap().bytes.clone()
    }
}

/// A program that runs.
pub(crate) struct Running {
    child: Child,
    stdin: Option<std::process::ChildStdin>,
    out: Option<Collector>,
    err: Option<Collector>,
    shown: String,
    until: Instant,
    status: Option<ExitStatus>,
}

impl Running {
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Sends a signal to the program alone.
    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Sends a signal to the program and what it started in its process group, as a terminal does.
    pub(crate) fn signal_group(&self, signal: Signal) {
        killpg(self.pid(), signal).unwrap();
    }

    /// Waits until standard output holds this text, and returns what there is.
    pub(crate) fn until_out(&self, text: &str) -> String {
        let found = self.out.as_ref().unwrap().wait(self.until, |collected| {
            let now = String::from_utf8_lossy(&collected.bytes);
            if now.contains(text) { Some(Ok(now.into_owned())) } else { collected.ended.then_some(Err(())) }
        });
        match found {
            Some(Ok(now)) => now,
            _ => panic!("{text:?} did not come out of {}\n{}", self.shown, self.streams()),
        }
    }

    /// Writes to a standard input that was kept open.
    pub(crate) fn write(&mut self, bytes: impl AsRef<[u8]>) {
        self.stdin.as_mut().unwrap().write_all(bytes.as_ref()).unwrap();
    }

    pub(crate) fn close_stdin(&mut self) {
        self.stdin = None;
    }

    fn streams(&self) -> String {
        let text = |stream: &Option<Collector>| {
            stream.as_ref().map(|c| String::from_utf8_lossy(&c.so_far()).into_owned()).unwrap_or_default()
        };
        format!("stdout: {}\nstderr: {}", text(&self.out), text(&self.err))
    }

    /// Waits for its end and for the end of its output.
    pub(crate) fn finish(mut self) -> Out {
        self.stdin = None;
        if !ended_until(self.pid().as_raw(), self.until) {
            let streams = self.streams();
            let stacks = stacks_of_group(self.pid());
            killpg(self.pid(), Signal::SIGKILL).ok();
            panic!("this hung and was killed: {}\n{streams}\n{stacks}", self.shown);
        }
        let status = self.child.wait().unwrap();
        self.status = Some(status);
        let take = |stream: Option<Collector>| {
            let Some(mut stream) = stream else { return Vec::new() };
            let ended = stream.wait(self.until, |collected| collected.ended.then_some(()));
            assert!(ended.is_some(), "something outlived this and holds its output: {}", self.shown);
            stream.thread.take().map(JoinHandle::join);
            stream.so_far()
        };
        let (out, err) = (take(self.out.take()), take(self.err.take()));
        Out { status, out, err, shown: std::mem::take(&mut self.shown) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.status.is_none() {
            killpg(self.pid(), Signal::SIGKILL).ok();
            self.child.wait().ok();
        }
    }
}

/// What the processes of a group wait in, to make a hang readable.
fn stacks_of_group(group: Pid) -> String {
    super::home::processes()
        .into_iter()
        .filter(|p| p.group == group.as_raw())
        .map(|p| {
            let wait = std::fs::read_to_string(format!("/proc/{}/wchan", p.pid)).unwrap_or_default();
            format!("pid {} {} state {} waits in {wait}\n", p.pid, p.name, p.state)
        })
        .collect()
}

/// Waits for the end of processes, whosever they are; false at the deadline.
pub(super) fn all_ended(processes: &[super::home::Process], until: Instant) -> bool {
    processes.iter().all(|process| ended_until(process.pid, until))
}

fn ended_until(pid: i32, until: Instant) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd as _;
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    let fd: OwnedFd = match rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) {
        Ok(fd) => fd,
        Err(rustix::io::Errno::SRCH) => return true,
        Err(errno) => panic!("pidfd_open: {errno}"),
    };
    loop {
        let Some(left) = until.checked_duration_since(Instant::now()) else { return false };
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], left) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            other => return other.unwrap() > 0,
        }
    }
}

/// How a program ended.
pub(crate) struct Out {
    pub(crate) status: ExitStatus,
    pub(crate) out: Vec<u8>,
    pub(crate) err: Vec<u8>,
    shown: String,
}

impl std::fmt::Display for Out {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (out, err) = (String::from_utf8_lossy(&self.out), String::from_utf8_lossy(&self.err));
        write!(f, "{}\nended with {}\nstdout: {out}\nstderr: {err}", self.shown, self.status)
    }
}

impl Out {
    /// Exit status as a shell shows it.
    pub(crate) fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Checks the exit status.
    #[track_caller]
    pub(crate) fn exits(self, code: i32) -> Self {
        assert_eq!(self.code(), code, "{self}");
        self
    }

    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        self.exits(0)
    }

    /// Standard output as text, without the last line end.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.out).trim_end_matches('\n').to_owned()
    }

    /// Standard error as text.
    pub(crate) fn errors(&self) -> String {
        String::from_utf8_lossy(&self.err).into_owned()
    }

    #[track_caller]
    pub(crate) fn says(self, text: &str) -> Self {
        assert!(self.errors().contains(text), "standard error lacks {text:?}\n{self}");
        self
    }

    #[track_caller]
    pub(crate) fn prints(self, text: &str) -> Self {
        assert_eq!(self.text(), text, "{self}");
        self
    }

    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.out).unwrap_or_else(|e| panic!("no JSON: {e}\n{self}"))
    }
}
