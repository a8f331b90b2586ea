//! The supervisor's event loop, from the clone to the payload's end.
//!
//! One thread waits for setup's messages, for signals, for the time limit and for init's end.
//! The overlay's server, the network stack and the terminal run in threads of their own,
//! started here, after the clone.
//!
//! Signals: those that ask a program to do something go to the payload. SIGTSTP stops the payload
//! and then us, so that the caller's shell gets its prompt back; SIGCONT undoes it. An ending signal
//! that comes before the payload runs is kept for it; a second one, or a start that takes too long
//! after it (`START_GRACE`), ends the launch.

mod relay;
pub(crate) mod streams;
mod terminal;

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use self::relay::Relay;
use self::streams::Outside;
use self::terminal::Terminal;
use crate::launch::handshake::{FromSetup, SetupFailure, Step, ToSetup};
use crate::launch::{LaunchError, Sandbox, Services};
use crate::plan::Plan;
use crate::report::Outcome;

/// How long a start that a signal came into may still take.
const START_GRACE: Duration = Duration::from_millis(500);

/// How long the payload has after SIGTERM when its time is up.
const TERM_GRACE: Duration = Duration::from_secs(5);

/// How long a sandbox that was killed has to be gone.
const END_GRACE: Duration = Duration::from_secs(10);

/// How long our terminal stays raw for output that nobody takes.
const OUTPUT_GRACE: Duration = Duration::from_secs(2);

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

/// Those that end a program which does nothing about them.
const ENDING: [Signal; 4] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM];

/// Runs until the payload has ended and everything inside is gone.
///
/// # Errors
/// When the launch fails or the sandbox is lost. The caller kills and reaps it then, unless it was
/// abandoned.
pub(crate) fn run(
    plan: &Plan,
    sandbox: &mut Sandbox,
    services: &mut Services,
    streams: Outside,
) -> Result<Outcome, LaunchError> {
    let mut watched = SigSet::empty();
    for signal in FORWARDED.into_iter().chain([Signal::SIGWINCH]) {
        watched.add(signal);
    }
    let signals = SignalFd::with_flags(&watched, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(during("signalfd"))?;
    let outputs = streams.start().map_err(during("relaying the standard streams"))?;
    let mut events = Loop {
        sandbox,
        services,
        signals,
        timer: None,
        terminal: None,
        started: false,
        early: None,
        payload_ended: false,
        timed_out: false,
    };
    let outcome = events.run(plan.process.timeout);
    let is_over = events.end(&outputs)?;
    if is_over && matches!(&outcome, Ok(outcome) if ends_by_itself(outcome)) {
        events.drain();
    } else {
        events.services.cut_network();
    }
    outcome
}

/// Whether the payload ended when it was through, or failed: not because somebody had it end. What it wrote before is
/// waited for, then.
fn ends_by_itself(outcome: &Outcome) -> bool {
    match *outcome {
        Outcome::Exited(_) => true,
        Outcome::Signaled(number) => {
            !ENDING.into_iter().chain([Signal::SIGKILL]).any(|signal| number == signal as i32)
        }
        Outcome::TimedOut => false,
    }
}

struct Loop<'a> {
    sandbox: &'a mut Sandbox,
    services: &'a mut Services,
    signals: SignalFd,
    timer: Option<TimerFd>,
    terminal: Option<Terminal>,
    started: bool,
    /// A signal that came before the payload was known to run, and when.
    early: Option<(i32, Instant)>,
    payload_ended: bool,
    timed_out: bool,
}

impl Loop<'_> {
    fn run(&mut self, timeout: Option<Duration>) -> Result<Outcome, LaunchError> {
        // From the start: a command on a dead network file system may never be executed.
        if let Some(timeout) = timeout {
            self.arm(timeout)?;
        }
        loop {
            let [message, signal, time_up] = self.wait()?;
            if message && let Some(outcome) = self.take_message()? {
                return Ok(if self.timed_out { Outcome::TimedOut } else { outcome });
            }
            if signal && let Some(outcome) = self.take_signals()? {
                return Ok(outcome);
            }
            if time_up {
                self.take_timeout()?;
            }
            if let Some((number, since)) = self.early
                && since.elapsed() >= START_GRACE
            {
                return Ok(Outcome::Signaled(number));
            }
        }
    }

    fn wait(&self) -> Result<[bool; 3], LaunchError> {
        let mut fds = vec![
            PollFd::new(self.sandbox.channel.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(self.timer.iter().map(|timer| PollFd::new(timer.as_fd(), PollFlags::POLLIN)));
        let limit = if self.early.is_some() { START_GRACE } else { Duration::MAX };
        match poll(&mut fds, PollTimeout::try_from(limit).unwrap_or(PollTimeout::NONE)) {
            Err(Errno::EINTR) => return Ok([false; 3]),
            other => other.map_err(during("poll"))?,
        };
        let ready = |i: usize| fds.get(i).is_some_and(|fd| fd.any().unwrap_or(true));
        Ok([ready(0), ready(1), ready(2)])
    }

    fn take_message(&mut self) -> Result<Option<Outcome>, LaunchError> {
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
            FromSetup::Proc => {
                self.services.know_askers(with_fd(fd)?);
            }
            FromSetup::Fuse => {
                let served = self.services.serve_overlay(with_fd(fd)?);
                served.map_err(|error| self.sandbox.blame_setup(error))?;
                tracing::info!("the overlay is served");
            }
            FromSetup::Tap => {
                let started = self.services.start_network(with_fd(fd)?);
                started.map_err(|error| self.sandbox.blame_setup(error))?;
                tracing::info!("the network stack runs");
            }
            FromSetup::Terminal => {
                self.terminal = Some(Terminal::start(with_fd(fd)?).map_err(during("terminal"))?);
                tracing::debug!("the payload has a terminal");
            }
            FromSetup::Started => {
                self.started = true;
                tracing::info!("the payload runs");
                if let Some((number, _)) = self.early.take() {
                    self.sandbox.channel.send(&ToSetup::Signal(number), None).ok();
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
                // The payload may run already: that it does is a message on its way. If none comes soon,
                // or a second signal does, the start is given up.
                Ok(_) if !self.started && self.early.is_none() => self.early = Some((number, Instant::now())),
                Ok(_) if !self.started => return Ok(Some(Outcome::Signaled(number))),
                Ok(signal) => {
                    tracing::debug!(%signal, "to the payload");
                    // EPIPE: init is ending; its end is the next message.
                    self.sandbox.channel.send(&ToSetup::Signal(number), None).ok();
                    if signal == Signal::SIGTSTP {
                        // As SIGTSTP would have, had we not blocked it. The SIGCONT that wakes us is
                        // pending afterwards and goes the same way as any other.
                        if let Some(terminal) = &self.terminal {
                            terminal.restore();
                        }
                        nix::sys::signal::raise(Signal::SIGSTOP).map_err(during("stopping"))?;
                        if let Some(terminal) = &self.terminal {
                            terminal.resume();
                        }
                    }
                }
                Err(_) => {}
            }
        }
        Ok(None)
    }

    fn take_timeout(&mut self) -> Result<(), LaunchError> {
        if self.timed_out || !self.started {
            self.timed_out = true;
            self.kill();
            self.timer = None;
            return Ok(());
        }
        self.timed_out = true;
        self.sandbox.channel.send(&ToSetup::Signal(libc::SIGTERM), None).ok();
        self.arm(TERM_GRACE)
    }

    /// Waits until nothing of the sandbox is left and its last output is out, without becoming deaf
    /// to signals: what serves the sandbox may be stuck on a dead file system below it, and who reads
    /// our output may never read on. False if a signal ended the wait.
    fn end(&mut self, outputs: &[Relay]) -> Result<bool, LaunchError> {
        // After the payload's end init ends by itself, once everything is gone and written.
        let mut patience = None;
        let mut is_over = true;
        if !self.payload_ended {
            self.kill();
            patience = Some(END_GRACE);
        }
        loop {
            match self.wait_until(self.sandbox.pidfd.as_fd(), patience)? {
                Waited::Ready => break self.sandbox.reap(),
                Waited::Signal => {
                    is_over = false;
                    self.kill();
                    patience = Some(END_GRACE);
                }
                Waited::TimeUp => {
                    self.sandbox.abandon();
                    return Err(LaunchError::Stuck);
                }
            }
        }
        // Our terminal stays raw while the payload's last output goes through it, but not for a reader
        // that does not read: the keys would be nobody's.
        let terminal = self.terminal.take();
        for output in outputs.iter().chain(terminal.as_ref().map(Terminal::output)) {
            let mut waited = self.wait_until(output.done(), Some(OUTPUT_GRACE))?;
            if let Waited::TimeUp = waited {
                if let Some(terminal) = &terminal {
                    terminal.restore();
                }
                waited = self.wait_until(output.done(), None)?;
            }
            if let Waited::Signal = waited {
                is_over = false;
                break;
            }
        }
        Ok(is_over)
    }

    /// Waits for the last data on its way through the network, or for a signal that ends programs.
    fn drain(&mut self) {
        let ending: SigSet = ENDING.into_iter().collect();
        let signals = SignalFd::with_flags(&ending, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK);
        match signals {
            Ok(signals) => self.services.drain_network(Some(signals.as_fd())),
            // Nobody could end the wait.
            Err(errno) => tracing::warn!(%errno, "the network's last data is not waited for"),
        }
    }

    fn kill(&self) {
        rustix::process::pidfd_send_signal(&self.sandbox.pidfd, rustix::process::Signal::KILL).ok();
    }

    /// Waits for `fd`, for a signal that ends programs, or for the time.
    fn wait_until(&self, fd: BorrowedFd<'_>, limit: Option<Duration>) -> Result<Waited, LaunchError> {
        let limit = limit.and_then(|limit| PollTimeout::try_from(limit).ok()).unwrap_or(PollTimeout::NONE);
        loop {
            let mut fds =
                [PollFd::new(fd, PollFlags::POLLIN), PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, limit) {
                Err(Errno::EINTR) => continue,
                Ok(0) => return Ok(Waited::TimeUp),
                other => other.map_err(during("poll"))?,
            };
            let [ready, _] = fds.map(|fd| fd.any().unwrap_or(true));
            if ready {
                return Ok(Waited::Ready);
            }
            while let Some(info) = self.signals.read_signal().map_err(during("signalfd"))? {
                if ENDING.into_iter().any(|signal| info.ssi_signo.cast_signed() == signal as i32) {
                    return Ok(Waited::Signal);
                }
            }
        }
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

/// What a wait ended with.
enum Waited {
    Ready,
    Signal,
    TimeUp,
}

fn during(doing: &'static str) -> impl Fn(Errno) -> LaunchError {
    move |errno| LaunchError::Supervise { doing, errno }
}
