//! From a plan to a running sandbox.
//!
//! Order, and why:
//! 1. What can fail without anything having been made: layers opened, ports bound.
//! 2. The clone, while this process still has one thread. Setup works from here on.
//! 3. Id maps, if setup may not write its own.
//! 4. The event loop (`crate::supervise`), which starts the overlay's server and the network
//!    stack as their descriptors arrive, beside setup's own work.
//!
//! Undoing is the kernel's: mounts, processes and the TAP die with their namespaces, which die
//! with setup. Whatever returns early drops the sandbox, which kills it.

pub mod handshake;
mod idmap;
mod services;

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};

use self::handshake::{Channel, FromSetup, SetupFailure, Step};
use crate::control::ControlError;
use crate::plan::Plan;
use crate::report::{NetworkRecords, PublishedPort, RunReport};
use crate::stage::{self, Inherited};
use crate::supervise;
use crate::sys::process::{Cloned, clone_with, default_signal};

pub(crate) use services::Services;

/// How long a setup process that may be ending has to say why.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Why a sandbox was not started, or was lost.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A step failed, here or in another process.
    #[error(transparent)]
    Setup(#[from] SetupFailure),
    /// The layers cannot be opened.
    #[error("cannot assemble the file system")]
    Overlay(#[source] fsoverlay::Error),
    /// A port cannot be published, or the stack cannot start.
    #[error("cannot set up the network")]
    Network(#[source] netstack::Error),
    /// There is no control socket.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// newuidmap or newgidmap refused or hung.
    #[error("{} failed: {said}", helper.display())]
    MapHelper {
        /// The helper.
        helper: PathBuf,
        /// What it said.
        said: String,
    },
    /// A standard stream that would lead out of the sandbox.
    #[error("standard {stream} is a directory: through it the payload could reach the host's files")]
    DirectoryStream {
        /// `input`, `output` or `error`.
        stream: &'static str,
    },
    /// It was killed, and something inside waits for the overlay, which waits for the disk.
    #[error("the sandbox was killed but does not end: a file system below its layers does not answer")]
    Stuck,
    /// A system call of the supervisor itself.
    #[error("cannot supervise the sandbox: {doing}")]
    Supervise {
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        #[source]
        errno: Errno,
    },
}

impl LaunchError {
    /// 126: the command was found but cannot be executed; 127: not found; 125: all else.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Setup(failure) if failure.step == Step::Exec => match failure.cause() {
                Errno::ENOENT => 127,
                _ => 126,
            },
            _ => 125,
        }
    }

    /// The failed step's stable name, by which the doctor's hints are found.
    #[must_use]
    pub fn step(&self) -> Option<(&'static str, Errno)> {
        match self {
            Self::Setup(failure) => Some((failure.step.name(), failure.cause())),
            Self::MapHelper { .. } => Some((Step::MapHelper.name(), Errno::EPERM)),
            _ => None,
        }
    }
}

/// The first process of a sandbox; dropped, it is killed, and with it everything inside.
#[derive(Debug)]
pub(crate) struct Sandbox {
    pub(crate) pidfd: OwnedFd,
    pub(crate) channel: Channel,
    reaped: bool,
    /// It was killed and is not gone: nothing may wait for it any more.
    pub(crate) abandoned: bool,
}

impl Sandbox {
    /// Ends everything inside and waits for it: afterwards no process of the sandbox exists.
    pub(crate) fn kill_and_reap(&mut self) {
        if self.reaped {
            return;
        }
        rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL).ok();
        self.reap();
    }

    /// Gives up waiting. The kernel goes on ending it when this process is gone.
    pub(crate) fn abandon(&mut self) {
        self.reaped = true;
        self.abandoned = true;
    }

    /// What setup works with fails here too when setup ends: then its own failure, which it is about
    /// to report if it has not yet, is the cause.
    pub(crate) fn blame_setup(&mut self, error: LaunchError) -> LaunchError {
        let mut cause = error;
        // Closed here, a descriptor would make setup fail in its turn, and that would be taken for the cause.
        let mut held = Vec::new();
        let says_something = |channel: &Channel| {
            let mut fds = [PollFd::new(channel.as_fd(), PollFlags::POLLIN)];
            let limit = PollTimeout::try_from(LAST_WORDS).unwrap_or(PollTimeout::ZERO);
            poll(&mut fds, limit).is_ok_and(|ready| ready > 0)
        };
        while says_something(&self.channel) {
            match self.channel.receive::<FromSetup>() {
                Ok(Some((FromSetup::Failed(failure), _))) => {
                    cause = failure.into();
                    break;
                }
                Ok(Some((_, fd))) => held.extend(fd),
                Ok(None) | Err(_) => break,
            }
        }
        drop(held);
        self.kill_and_reap();
        cause
    }

    /// Waits for init to end by itself.
    pub(crate) fn reap(&mut self) {
        let by_pidfd = rustix::process::WaitId::PidFd(self.pidfd.as_fd());
        while let Err(rustix::io::Errno::INTR) =
            rustix::process::waitid(by_pidfd.clone(), rustix::process::WaitIdOptions::EXITED)
        {}
        self.reaped = true;
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.kill_and_reap();
    }
}

/// A launch of which everything is ready that can fail without a sandbox.
pub struct Prepared<'a> {
    plan: &'a Plan,
    services: Services,
    /// The soft limits that the payload gets back.
    limits: Vec<SoftLimit>,
    began: Instant,
}

/// Checks the standard streams, opens the layers and binds the ports; makes no process.
///
/// The upper and work directories of the plan exist, in a state directory locked by the caller.
///
/// # Errors
/// The layer, port or stream that cannot be used.
pub fn prepare(plan: &Plan, records: NetworkRecords) -> Result<Prepared<'_>, LaunchError> {
    let began = Instant::now();
    check_streams()?;
    // Before the layers: the overlay sizes its cache of descriptors by the limit.
    let limits = OWN_LIMITS.map(raise_limit).into_iter().collect::<Result<Vec<_>, _>>()?;
    make_room()?;
    let services = Services::prepare(plan, records)?;
    tracing::info!(name = plan.name, layers = plan.root.layers.len(), "layers are open and ports bound");
    Ok(Prepared { plan, services, limits, began })
}

impl Prepared<'_> {
    /// Where the published ports are bound.
    #[must_use]
    pub fn published(&self) -> &[PublishedPort] {
        self.services.published()
    }

    /// Makes the sandbox, runs the payload, waits for its end.
    ///
    /// The process must have one thread. Every signal is blocked from here on; the event loop
    /// takes those that matter.
    ///
    /// # Errors
    /// Nothing is left of the sandbox when this returns, in either case.
    pub fn run(self) -> Result<RunReport, LaunchError> {
        let Self { plan, mut services, limits, began } = self;
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)
            .map_err(during("blocking signals"))?;
        // A caller may ignore it, which execve keeps: then the kernel reaps our children unseen.
        default_signal(Signal::SIGCHLD).map_err(during("SIGCHLD"))?;
        let (ours, theirs) =
            Channel::pair().map_err(|errno| SetupFailure::new(Step::Handshake, "socketpair", errno))?;
        let (streams, outside) = supervise::streams::prepare(&plan.process)
            .map_err(during("making pipes for the standard streams"))?;

        let maker = services.take_maker();

        // The others are setup's to make: it does so while its ids are being mapped.
        let mut sandbox = match clone_with(libc::CLONE_NEWUSER | libc::CLONE_NEWPID)
            .map_err(|errno| SetupFailure::new(Step::Clone, "", errno))?
        {
            Cloned::Child => {
                drop(ours);
                stage::enter(plan, &Inherited { channel: theirs, maker, limits, streams })
            }
            Cloned::Parent { pid, pidfd } => {
                drop((theirs, maker, streams));
                tracing::info!(%pid, "setup runs, in a user and a pid namespace");
                let mut sandbox = Sandbox { pidfd, channel: ours, reaped: false, abandoned: false };
                let written = idmap::write(&plan.ids, pid, &sandbox.channel);
                written.map_err(|error| sandbox.blame_setup(error))?;
                sandbox
            }
        };
        let outcome = supervise::run(plan, &mut sandbox, &mut services, outside);
        if sandbox.abandoned {
            services.abandon();
            return Err(LaunchError::Stuck);
        }
        sandbox.kill_and_reap();
        let changed = services.finish();
        let published = services.published().to_vec();
        Ok(RunReport {
            outcome: outcome?,
            wall: began.elapsed(),
            changed,
            published,
            notes: plan.notes.clone(),
        })
    }
}

/// The payload gets our standard streams as they are. From a directory's descriptor `..` leads
/// anywhere in the host's tree, whatever the payload's root is.
fn check_streams() -> Result<(), LaunchError> {
    let streams = [
        ("input", rustix::stdio::stdin()),
        ("output", rustix::stdio::stdout()),
        ("error", rustix::stdio::stderr()),
    ];
    for (stream, fd) in streams {
        let stat = rustix::fs::fstat(fd).map_err(|errno| Errno::from_raw(errno.raw_os_error()));
        let mode = stat.map_err(during("looking at the standard streams"))?.st_mode;
        if rustix::fs::FileType::from_raw_mode(mode) == rustix::fs::FileType::Directory {
            return Err(LaunchError::DirectoryStream { stream });
        }
    }
    Ok(())
}

fn during(doing: &'static str) -> impl Fn(Errno) -> LaunchError {
    move |errno| LaunchError::Supervise { doing, errno }
}

/// A soft limit as the caller had it (getrlimit(2)).
pub(crate) type SoftLimit = (Resource, u64);

/// Limits of our own that what the payload does would meet: every flow and open file inside costs us
/// a descriptor, and we write its files.
const OWN_LIMITS: [Resource; 2] = [Resource::RLIMIT_NOFILE, Resource::RLIMIT_FSIZE];

/// Has the kernel make room in our table for as many descriptors as we are likely to have (8 bytes each, of its memory).
/// While there is one thread that takes nothing; later whoever needs the next one when the table is full waits for
/// milliseconds (`expand_fdtable` of the kernel's fs/file.c), and all who wait for him.
fn make_room() -> Result<(), LaunchError> {
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).map_err(during("reading our limits"))?;
    let last = i32::try_from(soft.min(16_384).saturating_sub(1)).unwrap_or_default();
    // Where there is none, all goes on as it did.
    drop(rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), last));
    Ok(())
}

/// Raises one as far as we may; the payload gets the old one back.
fn raise_limit(limit: Resource) -> Result<SoftLimit, LaunchError> {
    let (soft, hard) = getrlimit(limit).map_err(during("reading our limits"))?;
    if soft < hard {
        setrlimit(limit, hard, hard).map_err(during("raising our limits"))?;
    }
    Ok((limit, soft))
}
