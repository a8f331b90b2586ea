//! The supervisor's event loop, from the clone to the payload's end.
//!
//! One thread waits for setup's messages, for signals, for the time limit and for init's end.
//! The overlay's server, the network stack and the terminal run in threads of their own,
//! started here, after the clone.
//!
//! Signals: those that ask a program to do something go to the payload. SIGTSTP stops the payload
//! and then us, so that the caller's shell gets its prompt back; SIGCONT undoes it. Before the
//! payload runs, an ending signal ends the launch.

mod terminal;

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use self::terminal::Terminal;
use crate::launch::handshake::{FromSetup, SetupFailure, Step, ToSetup};
use crate::launch::{LaunchError, Sandbox, Services};
use crate::plan::Plan;
use crate::report::Outcome;

/// How long the payload has after SIGTERM when its time is up.
const TERM_GRACE: Duration = Duration::from_secs(5);

/// Signals that are the payload's business.
const FORWARDED: [Signal; 8] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGTSTP,
    Signal::SIGCONT,
];

/// Runs until the payload has ended.
///
/// # Errors
/// When the launch fails or the sandbox is lost. The caller kills and reaps it then.
pub(crate) fn run(
    plan: &Plan,
    sandbox: &mut Sandbox,
    services: &mut Services,
) -> Result<Outcome, LaunchError> {
    let mut watched = SigSet::empty();
    for signal in FORWARDED.into_iter().chain([Signal::SIGWINCH]) {
        watched.add(signal);
    }
    let signals = SignalFd::with_flags(&watched, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(during("signalfd"))?;
    let mut events =
        Loop { sandbox, services, signals, timer: None, terminal: None, started: false, payload_ended: false, timed_out: false };
    let outcome = events.run(plan.process.timeout);
    let terminal = events.terminal.take();
    // After the payload's end init ends by itself, once everything inside is gone and written.
    if events.payload_ended {
        events.sandbox.reap();
    } else {
        events.sandbox.kill_and_reap();
    }
    // What the payload wrote last arrives before the terminal is the caller's again.
    if let Some(terminal) = terminal {
        terminal.finish();
    }
    outcome
}

struct Loop<'a> {
    sandbox: &'a mut Sandbox,
    services: &'a mut Services,
    signals: SignalFd,
    timer: Option<TimerFd>,
    terminal: Option<Terminal>,
    started: bool,
    payload_ended: bool,
    timed_out: bool,
}

impl Loop<'_> {
    fn run(&mut self, timeout: Option<Duration>) -> Result<Outcome, LaunchError> {
        loop {
            let [message, signal, time_up] = self.wait()?;
            if message {
                if let Some(outcome) = self.take_message(timeout)? {
                    return Ok(if self.timed_out { Outcome::TimedOut } else { outcome });
                }
            }
            if signal {
                if let Some(outcome) = self.take_signals()? {
                    return Ok(outcome);
                }
            }
            if time_up {
                self.take_timeout()?;
            }
        }
    }

    fn wait(&self) -> Result<[bool; 3], LaunchError> {
        let mut fds = vec![
            PollFd::new(self.sandbox.channel.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(self.timer.iter().map(|timer| PollFd::new(timer.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => return Ok([false; 3]),
            other => other.map_err(during("poll"))?,
        };
        let ready = |i: usize| fds.get(i).is_some_and(|fd| fd.any().unwrap_or(true));
        Ok([ready(0), ready(1), ready(2)])
    }

    fn take_message(&mut self, timeout: Option<Duration>) -> Result<Option<Outcome>, LaunchError> {
        let received = self.sandbox.channel.receive::<FromSetup>();
        let lost = |what: &str| SetupFailure::new(Step::Handshake, what, Errno::EPIPE);
        let Some((message, fd)) = received.map_err(|errno| SetupFailure::new(Step::Handshake, "", errno))?
        else {
            // Init was killed from outside: so was everything inside.
            return if self.started {
                Ok(Some(Outcome::Signaled(libc::SIGKILL)))
            } else {
                Err(lost("it was killed").into())
            };
        };
        let with_fd = |fd: Option<OwnedFd>| fd.ok_or_else(|| lost("a descriptor is missing"));
        match message {
            FromSetup::Fuse => {
                let served = self.services.serve_overlay(with_fd(fd)?);
                served.map_err(|error| self.blame_setup(error))?;
                tracing::info!("the overlay is served");
            }
            FromSetup::Tap => {
                let started = self.services.start_network(with_fd(fd)?);
                started.map_err(|error| self.blame_setup(error))?;
                tracing::info!("the network stack runs");
            }
            FromSetup::Terminal => {
                self.terminal = Some(Terminal::start(with_fd(fd)?).map_err(during("terminal"))?);
                tracing::debug!("the payload has a terminal");
            }
            FromSetup::Started => {
                self.started = true;
                tracing::info!("the payload runs");
                if let Some(timeout) = timeout {
                    self.arm(timeout)?;
                }
            }
            FromSetup::Failed(failure) | FromSetup::ExecFailed(failure) => return Err(failure.into()),
            FromSetup::Exited(outcome) => {
                tracing::info!(?outcome, "the payload ended");
                self.payload_ended = true;
                return Ok(Some(outcome));
            }
        }
        Ok(None)
    }

    /// A service whose other end setup took away fails too: then setup's own failure, which it
    /// reported before it ended, is the cause.
    fn blame_setup(&mut self, error: LaunchError) -> LaunchError {
        self.sandbox.kill_and_reap();
        while let Ok(Some((message, _))) = self.sandbox.channel.receive::<FromSetup>() {
            if let FromSetup::Failed(failure) = message {
                return failure.into();
            }
        }
        error
    }

    fn take_signals(&mut self) -> Result<Option<Outcome>, LaunchError> {
        while let Some(info) = self.signals.read_signal().map_err(during("signalfd"))? {
            let number = info.ssi_signo.cast_signed();
            match Signal::try_from(number) {
                Ok(Signal::SIGWINCH) => {
                    if let Some(terminal) = &self.terminal {
                        terminal.copy_size();
                    }
                }
                Ok(Signal::SIGTSTP | Signal::SIGCONT) if !self.started => {}
                Ok(_) if !self.started => return Ok(Some(Outcome::Signaled(number))),
                Ok(signal) => {
                    tracing::debug!(%signal, "to the payload");
                    // EPIPE: init is ending; its end is the next message.
                    self.sandbox.channel.send(&ToSetup::Signal(number), None).ok();
                    if signal == Signal::SIGTSTP {
                        // As SIGTSTP would have, had we not blocked it. The SIGCONT that wakes us is
                        // pending afterwards and goes the same way as any other.
                        nix::sys::signal::raise(Signal::SIGSTOP).map_err(during("stopping"))?;
                    }
                }
                Err(_) => {}
            }
        }
        Ok(None)
    }

    fn take_timeout(&mut self) -> Result<(), LaunchError> {
        if self.timed_out {
            rustix::process::pidfd_send_signal(&self.sandbox.pidfd, rustix::process::Signal::KILL).ok();
            self.timer = None;
            return Ok(());
        }
        self.timed_out = true;
        self.sandbox.channel.send(&ToSetup::Signal(libc::SIGTERM), None).ok();
        self.arm(TERM_GRACE)
    }

    fn arm(&mut self, after: Duration) -> Result<(), LaunchError> {
        let timer =
            TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC).map_err(during("timerfd"))?;
        // A zero would disarm it.
        let after = TimeSpec::from_duration(after.max(Duration::from_nanos(1)));
        timer.set(Expiration::OneShot(after), TimerSetTimeFlags::empty()).map_err(during("timerfd"))?;
        self.timer = Some(timer);
        Ok(())
    }
}

fn during(doing: &'static str) -> impl Fn(Errno) -> LaunchError {
    move |errno| LaunchError::Supervise { doing, errno }
}
