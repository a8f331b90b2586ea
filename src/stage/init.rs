//! Init: pid 1 of the sandbox once the root is complete.
//!
//! Starts the payload, reaps whatever dies, forwards signals, answers the filter's
//! notifications, makes sockets for the network stack, and when the payload has ended ends everything else and then itself. It holds
//! every capability of the sandbox's user namespace but is not dumpable, so nothing inside can
//! trace it or read its memory, and as pid 1 it gets no signal from inside that it does not
//! handle.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::Pid;
use rustix::process::{WaitOptions, WaitStatus};

use super::command;
use super::payload::{self, Handover, PayloadMessage};
use super::setup::{self, Ready};
use super::users::{self, Identity};
use super::{Inherited, notify};
use crate::launch::handshake::{Channel, FromSetup, SetupFailure, Step, ToSetup};
use crate::plan::Plan;
use crate::report::Outcome;
use crate::sys::exec_stage;
use crate::sys::process::{exit_now, fork};

/// Starts the payload and stays until it has ended.
pub(super) fn run(plan: &Plan, inherited: &Inherited, ready: &Ready) {
    let channel = &inherited.channel;
    let message = match supervise_payload(plan, inherited, ready) {
        Ok(outcome) => FromSetup::Exited(outcome),
        Err(failure) if failure.step == Step::Exec => FromSetup::ExecFailed(failure),
        Err(failure) => FromSetup::Failed(failure),
    };
    end_everything();
    // If the supervisor is gone there is nobody left to tell.
    channel.send(&message, None).ok();
}

fn supervise_payload(plan: &Plan, inherited: &Inherited, ready: &Ready) -> Result<Outcome, SetupFailure> {
    let spawn = |what: &'static str| move |errno: Errno| SetupFailure::new(Step::Spawn, what, errno);
    let identity = match &plan.process.user {
        Some(user) => users::resolve(user)?,
        None => default_identity(plan),
    };
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    // The supervisor blocked every signal before the clone; the signalfd takes this one.
    let signals = SignalFd::with_flags(&children, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(spawn("signalfd"))?;
    let (ours, theirs) =
        Channel::pair().map_err(|errno| SetupFailure::new(Step::Spawn, "report channel", errno))?;

    let Some(payload) = fork().map_err(spawn("fork"))? else {
        let handover = Handover {
            plan,
            identity: &identity,
            program: &ready.program,
            terminal: ready.terminal.as_ref(),
            streams: &inherited.streams,
            limits: &inherited.limits,
        };
        let failure = payload::run(&handover, &theirs);
        theirs.send(&PayloadMessage::Failed(failure), None).ok();
        exit_now(125);
    };
    drop(theirs);
    let listener = await_exec(plan, &ours)?;
    drop(ours);
    inherited
        .channel
        .send(&FromSetup::Started, None)
        .map_err(|errno| SetupFailure::new(Step::Handshake, "", errno))?;
    if let Some(listener) = listener {
        let proc = setup::open_proc().map_err(|e| SetupFailure::new(Step::Spawn, "/proc", e))?;
        notify::start(listener, proc).map_err(|e| SetupFailure::new(Step::Spawn, "notifier", e))?;
    }
    wait_for(payload, &signals, inherited).map_err(spawn("waiting"))
}

/// Without `--user`: the id that setup already has.
fn default_identity(plan: &Plan) -> Identity {
    let first = |map: &[crate::spec::IdExtent]| map.iter().map(|e| e.inside).min().unwrap_or(0);
    let gid = first(&plan.ids.gids);
    Identity { uid: first(&plan.ids.uids), gid, groups: vec![gid] }
}

/// Waits until the payload's process has executed the command: its end of the channel closes then.
fn await_exec(plan: &Plan, report: &Channel) -> Result<Option<OwnedFd>, SetupFailure> {
    let broken = |errno| SetupFailure::new(Step::Spawn, "report channel", errno);
    let mut listener = None;
    let mut base = plan.process.workdir.as_path();
    while let Some((message, fd)) = report.receive_bytes().map_err(broken)? {
        if let Some(tried) = exec_stage::tried(&message) {
            return Err(command::failure(&plan.process, base, tried));
        }
        match serde_json::from_slice(&message).map_err(|_| broken(rustix::io::Errno::BADMSG))? {
            PayloadMessage::Listener => listener = fd,
            PayloadMessage::WithoutWorkdir => base = Path::new("/"),
            PayloadMessage::Failed(failure) => return Err(failure),
        }
    }
    Ok(listener)
}

fn wait_for(payload: Pid, signals: &SignalFd, inherited: &Inherited) -> Result<Outcome, Errno> {
    let channel = &inherited.channel;
    let mut maker = inherited.maker.as_ref();
    loop {
        if let Some(outcome) = reap(payload)? {
            return Ok(outcome);
        }
        let mut fds = vec![
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(channel.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(maker.map(|maker| PollFd::new(maker.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            other => other?,
        };
        let ready = |i: usize| fds.get(i).is_some_and(|fd| fd.any().unwrap_or(true));
        let [child_ended, message, sockets] = [ready(0), ready(1), ready(2)];
        if sockets {
            // Without the stack nobody asks any more.
            maker = maker.filter(|maker| maker.answer());
        }
        if child_ended {
            while matches!(signals.read_signal(), Ok(Some(_))) {}
        }
        if message {
            match channel.receive::<ToSetup>() {
                Ok(Some((ToSetup::Signal(number), _))) => forward(payload, number),
                Ok(Some((ToSetup::MapsWritten, _))) => {}
                // The supervisor is gone: everything goes.
                Ok(None) | Err(_) => return Ok(Outcome::Signaled(libc::SIGKILL)),
            }
        }
    }
}

/// Reaps every process that ended, adopted orphans too; the payload's end, if it is among them.
/// Raw statuses, because a real-time signal may have ended it.
fn reap(payload: Pid) -> Result<Option<Outcome>, Errno> {
    let mut outcome = None;
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) if pid.as_raw_nonzero().get() == payload.as_raw() => {
                outcome = outcome_of(status)
            }
            Ok(Some(_)) => {}
            Ok(None) => return Ok(outcome),
            // No child at all: the payload's end was seen just now, or is lost.
            Err(rustix::io::Errno::CHILD) => return Ok(outcome.or(Some(Outcome::Signaled(libc::SIGKILL)))),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(Errno::from_raw(errno.raw_os_error())),
        }
    }
}

fn outcome_of(status: WaitStatus) -> Option<Outcome> {
    let exited = status.exit_status().map(Outcome::Exited);
    exited.or_else(|| status.terminating_signal().map(Outcome::Signaled))
}

/// Signals that a terminal sends go to the payload's whole process group, as from a terminal;
/// the others to the payload alone.
fn forward(payload: Pid, number: i32) {
    let from_terminal = [libc::SIGINT, libc::SIGQUIT, libc::SIGTSTP, libc::SIGCONT, libc::SIGHUP];
    let target = if from_terminal.contains(&number) { Pid::from_raw(-payload.as_raw()) } else { payload };
    if let Ok(signal) = Signal::try_from(number) {
        // ESRCH: it ended in between, which the next wait reports.
        nix::sys::signal::kill(target, signal).ok();
        if signal == Signal::SIGTSTP {
            // Its session has no shell, so its process group counts as orphaned and the default action
            // of SIGTSTP is to go on (POSIX). It was told; now it stops.
            nix::sys::signal::kill(target, Signal::SIGSTOP).ok();
        }
    }
}

/// Ends and reaps every other process, then has the overlay's dirty pages written, so that nothing
/// the payload wrote is lost when the mount goes.
fn end_everything() {
    if nix::sys::signal::kill(Pid::from_raw(-1), Signal::SIGKILL).is_ok() {
        while let Ok(_) | Err(rustix::io::Errno::INTR) = rustix::process::wait(WaitOptions::empty()) {}
    }
    if let Ok(root) = std::fs::File::open("/") {
        rustix::fs::syncfs(&root).ok();
    }
}
