//! Trying one thing, in a process of its own that ends afterwards.
//!
//! The doctor starts our own program with the hidden words `internal-probe NAME` ([`WORD`]). What
//! the probe makes (namespaces, mounts, a TAP, a filter) dies with its process. The result
//! goes to standard output as JSON, one [`Outcome`].

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde::{Deserialize, Serialize};

/// How a probe ended: nothing failed, or this step did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// The failed step by its name in [`super::hints::diagnose`] and its errno.
    pub failed: Option<(String, i32)>,
}

/// The first argument that makes our program a probe.
pub const WORD: &str = "internal-probe";

/// No probe takes longer, unless something hangs.
pub const TIME_LIMIT: Duration = Duration::from_secs(5);

type Step<T = ()> = Result<T, (&'static str, Errno)>;

fn at(step: &'static str) -> impl Fn(Errno) -> (&'static str, Errno) {
    move |errno| (step, errno)
}

fn io_at(step: &'static str) -> impl Fn(std::io::Error) -> (&'static str, Errno) {
    move |error| (step, Errno::from_raw(error.raw_os_error().unwrap_or(0)))
}

/// Runs the probe `name` in this process; gives its exit status.
#[must_use]
pub fn run(name: &str, argument: Option<&OsStr>) -> u8 {
    let argument = argument.and_then(OsStr::to_str).unwrap_or_default();
    let result = match name {
        "userns" => enter_userns(),
        "wait" => wait_for_maps(),
        "namespace" => namespace(argument),
        "mount" => try_mount("tmpfs", "mount", None),
        "devpts" => try_mount("devpts", "mount", Some("newinstance,ptmxmode=0666,mode=0620")),
        "procfs" => procfs(),
        "procfs-inner" => mount_at_tmp("proc", "procfs", None),
        "fuse" => fuse(),
        "tap" => tap(),
        "seccomp" => seccomp(false),
        "notify" => seccomp(true),
        "landlock" => landlock(),
        _ => return 2,
    };
    let outcome = Outcome { failed: result.err().map(|(step, errno)| (step.to_owned(), errno as i32)) };
    let text = serde_json::to_string(&outcome).unwrap_or_default();
    std::io::stdout().write_all(text.as_bytes()).ok();
    u8::from(outcome.failed.is_some())
}

/// As the everyday case of `run`: one id, mapped by the process itself.
fn enter_userns() -> Step {
    let uid = rustix::process::geteuid().as_raw();
    let gid = rustix::process::getegid().as_raw();
    unshare(CloneFlags::CLONE_NEWUSER).map_err(at("clone"))?;
    let write = |path: &str, text: String| std::fs::write(path, text).map_err(io_at("uid_map"));
    write("/proc/self/setgroups", "deny".into())?;
    write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    write("/proc/self/gid_map", format!("0 {gid} 1"))
}

/// Waits in a user namespace without maps, for the helpers to write them.
fn wait_for_maps() -> Step {
    unshare(CloneFlags::CLONE_NEWUSER).map_err(at("clone"))?;
    std::io::stdout().write_all(b"ready\n").map_err(io_at("clone"))?;
    let mut nothing = Vec::new();
    std::io::stdin().read_to_end(&mut nothing).map_err(io_at("clone"))?;
    Ok(())
}

fn namespace(name: &str) -> Step {
    enter_userns()?;
    let flag = match name {
        "pid" => CloneFlags::CLONE_NEWPID,
        "mnt" => CloneFlags::CLONE_NEWNS,
        "uts" => CloneFlags::CLONE_NEWUTS,
        "ipc" => CloneFlags::CLONE_NEWIPC,
        "net" => CloneFlags::CLONE_NEWNET,
        "cgroup" => CloneFlags::CLONE_NEWCGROUP,
        // CLONE_NEWTIME, which nix does not name.
        "time" => CloneFlags::from_bits_retain(0x80),
        _ => return Err(("clone", Errno::EINVAL)),
    };
    unshare(flag).map_err(at("clone"))
}

fn enter_mount_namespace() -> Step {
    enter_userns()?;
    unshare(CloneFlags::CLONE_NEWNS).map_err(at("clone"))?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)
        .map_err(at("mount"))
}

fn mount_at_tmp(kind: &str, step: &'static str, data: Option<&str>) -> Step {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    // Any directory serves: the mount is seen by this process alone.
    mount(Some(kind), "/tmp", Some(kind), flags, data).map_err(at(step))
}

fn try_mount(kind: &str, step: &'static str, data: Option<&str>) -> Step {
    enter_mount_namespace()?;
    mount_at_tmp(kind, step, data)
}

/// A new /proc shows the pid namespace of who mounts it, so that must be its first process.
fn procfs() -> Step {
    enter_mount_namespace()?;
    unshare(CloneFlags::CLONE_NEWPID).map_err(at("clone"))?;
    let mut child = spawn("procfs-inner", None).map_err(io_at("clone"))?;
    match read_outcome(&mut child) {
        Some(Outcome { failed: None }) => Ok(()),
        Some(Outcome { failed: Some((_, errno)) }) => Err(("procfs", Errno::from_raw(errno))),
        None => Err(("procfs", Errno::ETIMEDOUT)),
    }
}

fn fuse() -> Step {
    enter_mount_namespace()?;
    let device = File::options().read(true).write(true).open("/dev/fuse").map_err(io_at("fuse_open"))?;
    let data = fsoverlay::mount_data(device.as_raw_fd(), 0, 0);
    mount_at_tmp("fuse", "fuse_mount", Some(&data))
}

fn tap() -> Step {
    enter_userns()?;
    unshare(CloneFlags::CLONE_NEWNET).map_err(at("clone"))?;
    netstack::open_tap("tap0").map(drop).map_err(io_at("tap_open"))
}

fn seccomp(listen: bool) -> Step {
    rustix::thread::set_no_new_privs(true)
        .map_err(|errno| ("confine", Errno::from_raw(errno.raw_os_error())))?;
    // BPF_RET | BPF_K with SECCOMP_RET_ALLOW.
    let allow = crate::sys::seccomp::Instruction { code: 0x06, jt: 0, jf: 0, k: 0x7fff_0000 };
    crate::sys::seccomp::install(&[allow], listen).map(drop).map_err(at("confine"))
}

fn landlock() -> Step {
    rustix::thread::set_no_new_privs(true)
        .map_err(|errno| ("landlock", Errno::from_raw(errno.raw_os_error())))?;
    crate::sys::landlock::scope_abstract_sockets().map_err(at("landlock"))
}

/// Starts a probe.
fn spawn(name: &str, argument: Option<&str>) -> std::io::Result<Child> {
    Command::new("/proc/self/exe")
        .args([WORD, name])
        .args(argument)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
}

/// Waits for a process, but not for ever.
pub(super) fn wait_at_most(child: &mut Child, limit: Duration) -> std::io::Result<std::process::ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn read_outcome(child: &mut Child) -> Option<Outcome> {
    drop(child.stdin.take());
    // The answer is shorter than a pipe's buffer: it is there when the process has ended.
    wait_at_most(child, TIME_LIMIT).ok()?;
    let mut text = String::new();
    child.stdout.take()?.read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

/// Tries the probe `name` in a child; `Err` names the failed step.
pub(super) fn attempt(name: &str, argument: Option<&str>) -> Result<(), (String, Errno)> {
    let mut child = spawn(name, argument)
        .map_err(|error| ("spawn".to_owned(), Errno::from_raw(error.raw_os_error().unwrap_or(0))))?;
    match read_outcome(&mut child) {
        Some(Outcome { failed: None }) => Ok(()),
        Some(Outcome { failed: Some((step, errno)) }) => Err((step, Errno::from_raw(errno))),
        None => Err((name.to_owned(), Errno::ETIMEDOUT)),
    }
}

/// Why the helpers did not write the maps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum HelperFailure {
    /// A process could not be started.
    Start(Errno),
    /// It did not end in time.
    Hangs,
    /// It refused.
    Said(String),
}

/// Lets newuidmap and newgidmap write the maps of a waiting process, as the launch does.
pub(super) fn attempt_helpers(helpers: [(&Path, u32, (u32, u32)); 2]) -> Result<(), HelperFailure> {
    let start =
        |error: std::io::Error| HelperFailure::Start(Errno::from_raw(error.raw_os_error().unwrap_or(0)));
    let mut waiting = spawn("wait", None).map_err(start)?;
    let result = (|| {
        let mut ready = [0; 6];
        if let Some(out) = waiting.stdout.as_mut() {
            out.read_exact(&mut ready).map_err(start)?;
        }
        for (helper, own, (first, count)) in helpers {
            let numbers = [waiting.id(), 0, own, 1, 1, first, count.min(65_535)].map(|n| n.to_string());
            let mut child = Command::new(helper)
                .args(numbers)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .map_err(start)?;
            let status = wait_at_most(&mut child, TIME_LIMIT).map_err(|_| HelperFailure::Hangs)?;
            if !status.success() {
                let mut said = String::new();
                if let Some(err) = child.stderr.as_mut() {
                    err.take(1000).read_to_string(&mut said).ok();
                }
                return Err(HelperFailure::Said(said.trim().to_owned()));
            }
        }
        Ok(())
    })();
    waiting.kill().ok();
    waiting.wait().ok();
    result
}
