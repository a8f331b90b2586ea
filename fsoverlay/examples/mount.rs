//! Mounts an overlay in a new user and mount namespace and runs a command in it.
//!
//! ```text
//! mount [--lower DIR]… [--upper DIR --work DIR] [--at DIR] [options] -- CMD…
//! ```
//!
//! Two processes, as in a sandbox: this one stays in its own namespaces and serves; its
//! child (the same program, started again) makes the namespaces, mounts, passes
//! `/dev/fuse` over the socket that is its standard input, and runs the command in the
//! mount. No process is forked while threads run.
//!
//! The tests of mounts have this program in theirs, under the word `--mount`.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use fsoverlay::{
    Access, Branch, Direction, Generated, GeneratedNode, Hooks, IdExtent, LayerSpec, Overlay, OverlaySpec,
    OwnerForm, Owners, RateLimit, Trace, UpperSpec,
};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// What the command line says.
#[derive(Default)]
struct Args {
    lowers: Vec<PathBuf>,
    /// Those whose marks are not looked for.
    plain: Vec<PathBuf>,
    upper: Option<PathBuf>,
    work: Option<PathBuf>,
    at: PathBuf,
    hidden: Vec<PathBuf>,
    generated: Vec<Generated>,
    range: bool,
    translated: bool,
    /// Owners on the disk itself.
    native: bool,
    nofile: Option<u64>,
    workers: usize,
    /// Run as these ids inside.
    user: Option<(u32, u32)>,
    /// Mount the kernel's overlayfs of the same directories instead.
    kernel: bool,
    /// Say whether the upper was changed, and what was asked.
    report: bool,
    /// Sync nothing.
    volatile: bool,
    /// The kernel is to read and write files of the upper itself; the mount is in the caller's user namespace.
    passthrough: bool,
    /// Panic where this name is looked up.
    panic_at: Option<String>,
    /// How long remote file systems may take.
    patience: Option<Duration>,
    /// How soon changes of the layers show.
    live: Option<Duration>,
    /// Let so many reads wait for so long.
    held: Option<(usize, Duration)>,
    command: Vec<String>,
}

fn parse(mut words: impl Iterator<Item = String>) -> Outcome<Args> {
    let mut args = Args { workers: 2, ..Args::default() };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "--plain-lower" => {
                let dir: PathBuf = value()?.into();
                args.plain.push(dir.clone());
                args.lowers.push(dir);
            }
            "--lower" => args.lowers.push(value()?.into()),
            "--upper" => args.upper = Some(value()?.into()),
            "--work" => args.work = Some(value()?.into()),
            "--at" => args.at = value()?.into(),
            "--hide" => args.hidden.push(value()?.into()),
            "--range" => args.range = true,
            "--translated" => args.translated = true,
            "--native" => args.native = true,
            "--nofile" => args.nofile = Some(value()?.parse()?),
            "--workers" => args.workers = value()?.parse()?,
            "--passthrough" => args.passthrough = true,
            "--volatile" => args.volatile = true,
            "--panic-at" => args.panic_at = Some(value()?),
            "--kernel" => args.kernel = true,
            "--report" => args.report = true,
            "--patience" => args.patience = Some(Duration::from_millis(value()?.parse()?)),
            "--live" => args.live = Some(Duration::from_millis(value()?.parse()?)),
            "--hold-reads" => {
                let text = value()?;
                let (count, seconds) = text.split_once(':').ok_or("--hold-reads wants COUNT:SECONDS")?;
                args.held = Some((count.parse()?, Duration::from_secs(seconds.parse()?)));
            }
            "--user" => {
                let text = value()?;
                let (uid, gid) = text.split_once(':').ok_or("--user wants UID:GID")?;
                args.user = Some((uid.parse()?, gid.parse()?));
            }
            "--file" | "--link" => {
                let text = value()?;
                let (path, content) = text.split_once('=').ok_or("PATH=CONTENT is wanted")?;
                let node = if word == "--file" {
                    GeneratedNode::File(content.into())
                } else {
                    GeneratedNode::Symlink(content.into())
                };
                args.generated.push(Generated { path: path.into(), mode: 0o644, node });
            }
            "--dir" => {
                let path = value()?.into();
                args.generated.push(Generated { path, mode: 0o755, node: GeneratedNode::Dir });
            }
            "--" => {
                args.command = words.collect();
                break;
            }
            other => return Err(format!("unknown option {other}").into()),
        }
    }
    Ok(args)
}

pub(crate) fn main() -> Outcome<ExitCode> {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let mut words = std::env::args().skip(1).collect::<Vec<_>>().into_iter().peekable();
    let me = words.next_if_eq("--mount");
    if words.next_if_eq("--inside").is_some() {
        return inside(&parse(words)?).map(|never| match never {});
    }
    let mut again = Command::new(std::env::current_exe()?);
    again.args(me).arg("--inside").args(words.clone());
    serve(&parse(words)?, again)
}

/// Parent: the host's side. `inside` starts the child.
fn serve(args: &Args, mut inside: Command) -> Outcome<ExitCode> {
    let (mut ours, theirs) = UnixStream::pair()?;
    let mut child = inside.stdin(Stdio::from(OwnedFd::from(theirs))).spawn()?;
    // It holds the other end of the socket.
    drop(inside);
    if let Some(limit) = args.nofile {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, limit, hard)?;
    }
    let mut byte = [0];
    ours.read_exact(&mut byte)?;
    let (uids, gids) = write_maps(child.id(), args.range)?;
    if args.kernel {
        ours.write_all(b"m")?;
        return Ok(exit_code(child.wait()?));
    }
    let owners = if args.translated { Owners::Translated { uids, gids } } else { Owners::Numeric };
    let layer = |dir: &PathBuf| LayerSpec {
        dir: dir.clone(),
        owners: owners.clone(),
        hidden: args.hidden.clone(),
        branch: if args.plain.contains(dir) { Branch::ReadOnly } else { Branch::Whiteouts },
        ..LayerSpec::default()
    };
    let upper = args.upper.clone().zip(args.work.clone()).map(|(dir, work)| UpperSpec {
        dir,
        work,
        volatile: args.volatile,
    });
    let overlay = Overlay::open(&OverlaySpec {
        layers: args.lowers.iter().map(layer).collect(),
        generated: args.generated.clone(),
        upper,
        squash: (!args.range).then_some((0, 0)),
        owner_form: if args.native { OwnerForm::Native } else { OwnerForm::Recorded },
        live: args.live,
        passthrough: args.passthrough,
        patience: args.patience,
        workers: args.workers,
        ..OverlaySpec::default()
    })?;
    let mut hooks = Hooks::default();
    if let Some((count, delay)) = args.held {
        hooks.rate = Some(Arc::new(Held { left: count.into(), delay }));
    }
    if let Some(name) = &args.panic_at {
        hooks.trace = Some(Arc::new(Bomb { name: name.into() }));
    }
    let overlay = overlay.with_hooks(hooks);
    ours.write_all(b"m")?;
    let fuse = receive_fd(&ours)?;
    let proc = std::fs::File::open("/proc")?;
    let server = overlay.with_proc(proc.into()).serve(fuse)?;
    ours.write_all(b"s")?;
    let status = child.wait()?;
    if args.report {
        let text = format!("changed={}\n{:?}\n", server.changed(), server.counters());
        std::io::stderr().write_all(text.as_bytes())?;
    }
    server.join();
    Ok(exit_code(status))
}

/// A bug where an object of a layer is looked up.
#[derive(Debug)]
struct Bomb {
    name: PathBuf,
}

impl Trace for Bomb {
    fn accessed(&self, access: Access) {
        assert!(access.path != self.name, "as was asked for");
    }
}

/// Lets the first reads wait.
#[derive(Debug)]
struct Held {
    left: AtomicUsize,
    delay: Duration,
}

impl RateLimit for Held {
    fn delay(&self, direction: Direction, _bytes: u64) -> Duration {
        let mine = direction == Direction::Read
            && self.left.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1)).is_ok();
        if mine { self.delay } else { Duration::ZERO }
    }
}

fn exit_code(status: std::process::ExitStatus) -> ExitCode {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    ExitCode::from(u8::try_from(code).unwrap_or(255))
}

/// Maps ids for the child: 0 to our own, and in a range 1… to the subordinate ids.
fn write_maps(pid: u32, range: bool) -> Outcome<(Vec<IdExtent>, Vec<IdExtent>)> {
    let (uid, gid) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
    let mut maps = (
        vec![IdExtent { inside: 0, outside: uid, count: 1 }],
        vec![IdExtent { inside: 0, outside: gid, count: 1 }],
    );
    if !range {
        std::fs::write(format!("/proc/{pid}/setgroups"), "deny")?;
        std::fs::write(format!("/proc/{pid}/uid_map"), format!("0 {uid} 1"))?;
        std::fs::write(format!("/proc/{pid}/gid_map"), format!("0 {gid} 1"))?;
        return Ok(maps);
    }
    if uid == 0 {
        let own = [IdExtent { inside: 0, outside: 0, count: 65536 }];
        // In two parts, as in a namespace that root made of his own id and a range.
        for map in ["uid_map", "gid_map"] {
            std::fs::write(format!("/proc/{pid}/{map}"), "0 0 1\n1 1 65535")?;
        }
        return Ok((own.to_vec(), own.to_vec()));
    }
    for (program, own, map) in [("newuidmap", uid, &mut maps.0), ("newgidmap", gid, &mut maps.1)] {
        let start = subordinate(if program == "newuidmap" { "/etc/subuid" } else { "/etc/subgid" })?;
        map.push(IdExtent { inside: 1, outside: start, count: 65535 });
        let status = Command::new(program)
            .args([pid.to_string(), "0".into(), own.to_string(), "1".into()])
            .args(["1".into(), start.to_string(), "65535".to_string()])
            .status()?;
        if !status.success() {
            return Err(format!("{program} failed").into());
        }
    }
    Ok(maps)
}

fn subordinate(file: &str) -> Outcome<u32> {
    let user = nix::unistd::User::from_uid(nix::unistd::getuid())?.ok_or("no such user")?.name;
    let text = std::fs::read_to_string(file)?;
    let line = text.lines().find(|l| l.split(':').next() == Some(&user)).ok_or("no subordinate ids")?;
    Ok(line.split(':').nth(1).ok_or("bad line")?.parse()?)
}

fn receive_fd(socket: &UnixStream) -> Outcome<OwnedFd> {
    let mut byte = [0];
    let mut iov = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!(std::os::fd::RawFd);
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            let number = *fds.first().ok_or("no descriptor was passed")?;
            return Ok(own(number));
        }
    }
    Err("no descriptor was passed".into())
}

/// Takes ownership of a descriptor that is known by number only.
fn own(number: i32) -> OwnedFd {
    #[expect(unsafe_code, reason = "the only way to own a received descriptor")]
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
    unsafe {
        <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(number)
    }
}

enum Never {}

/// Child: makes the namespaces and the mount, then becomes the command.
fn inside(args: &Args) -> Outcome<Never> {
    let stdin = std::io::stdin();
    let mut socket = UnixStream::from(stdin.as_fd().try_clone_to_owned()?);
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)?;
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
    socket.write_all(b"u")?;
    let mut byte = [0];
    socket.read_exact(&mut byte)?;
    nix::unistd::setresgid(0.into(), 0.into(), 0.into())?;
    nix::unistd::setresuid(0.into(), 0.into(), 0.into())?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    if args.kernel {
        mount_kernel_overlay(args)?;
        return become_command(args);
    }
    let fuse: OwnedFd = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse")?.into();
    let data = fsoverlay::mount_data(fuse.as_raw_fd(), 0, 0);
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("overlay"), &args.at, Some("fuse"), flags, Some(data.as_str()))?;
    let fds = [fuse.as_raw_fd()];
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(b"f")],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::empty(),
        None,
    )?;
    drop(fuse);
    socket.read_exact(&mut byte)?;
    drop(socket);
    become_command(args)
}

/// The same directories through the kernel's overlayfs.
fn mount_kernel_overlay(args: &Args) -> Outcome<()> {
    let text = |path: &PathBuf| path.to_string_lossy().into_owned();
    let lowers: Vec<String> = args.lowers.iter().rev().map(text).collect();
    let mut data = format!("userxattr,lowerdir={}", lowers.join(":"));
    if let (Some(upper), Some(work)) = (&args.upper, &args.work) {
        data.push_str(&format!(",upperdir={},workdir={}", text(upper), text(work)));
    }
    mount(Some("overlay"), &args.at, Some("overlay"), MsFlags::empty(), Some(data.as_str()))?;
    Ok(())
}

fn become_command(args: &Args) -> Outcome<Never> {
    let (program, rest) = args.command.split_first().ok_or("no command")?;
    let mut command = Command::new(program);
    command.args(rest).current_dir(&args.at).env("OVERLAY", &args.at).stdin(Stdio::null());
    if let Some((uid, gid)) = args.user {
        command.uid(uid).gid(gid);
    }
    Err(command.exec().into())
}
