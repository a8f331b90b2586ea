//! Commands for a running stack.
//!
//! ```text
//!  caller  ── command, place for its answer ──> queue, eventfd ──> engine: runs it between two packets
//!          <───────────────────────────────── answer ────────────
//! ```
//!
//! A command is a closure that gets the whole engine, so that a new one takes a method of [`Control`] here and one of the
//! module that obeys it. It runs on the stack's thread and must not wait: what takes long (binding sockets, asking the
//! host) is done by the caller before. The caller waits for the answer, so there are never more commands than callers.
//!
//! When the stack has ended, whatever the reason, every command is answered with [`Error::Stopped`].

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use smoltcp::time::Instant;

use crate::config::{Error, Publish};
use crate::engine::{Engine, Turn};
use crate::flowlog::FlowState;
use crate::forward::{self, PortId, Published, PublishedPort};
use crate::policy::PolicySpec;
use crate::rate::Rates;
use crate::stats::{Counters, Stats};

type Command = Box<dyn FnOnce(&mut Engine, Instant) -> Turn + Send>;

/// A way to talk to a running stack, for any thread. It does not keep the stack running.
#[derive(Debug, Clone)]
pub struct Control {
    queue: Sender<Command>,
    wake: Arc<EventFd>,
    stats: Arc<Counters>,
}

/// The engine's end.
pub(crate) struct Commands {
    queue: Receiver<Command>,
    wake: Arc<EventFd>,
}

impl std::fmt::Debug for Commands {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Commands").finish_non_exhaustive()
    }
}

/// Both ends.
pub(crate) fn commands(stats: Arc<Counters>) -> nix::Result<(Control, Commands)> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let wake = Arc::new(EventFd::from_flags(flags)?);
    let (sender, receiver) = channel();
    Ok((Control { queue: sender, wake: Arc::clone(&wake), stats }, Commands { queue: receiver, wake }))
}

impl Commands {
    /// Becomes readable when a command waits.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// The next command.
    pub(crate) fn next(&self) -> Option<Command> {
        // Cleared before the queue is looked at: a command that comes after that wakes again.
        let _ = self.wake.read();
        self.queue.try_recv().ok()
    }
}

impl Control {
    /// What the stack has done so far. It can be asked when it has ended, too.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.stats.snapshot()
    }

    /// Publishes a port. It is bound in the calling thread's network namespace.
    ///
    /// # Errors
    ///
    /// [`Error::Listen`] if it cannot be bound, or no descriptor is left for it; [`Error::Stopped`].
    pub fn publish(&self, port: &Publish) -> Result<PublishedPort, Error> {
        let bound = forward::bind_port(port)?;
        self.ask(|engine, _| engine.publish(bound))?
    }

    /// Publishes ports, all or none. They are bound in the calling thread's network namespace.
    ///
    /// # Errors
    ///
    /// [`Error::Listen`] for one that cannot be bound, or if there are not descriptors for all; [`Error::Stopped`].
    pub fn publish_all(&self, ports: &[Publish]) -> Result<Vec<PublishedPort>, Error> {
        let wanted = ports.to_vec();
        self.ask(move |engine, _| engine.check_room_for(&wanted))??;
        let bound = Published::bind(ports)?;
        self.ask(|engine, _| engine.publish_all(bound))?
    }

    /// Takes a published port back; what it was, if there was one of this name. Connections that came through it stay.
    ///
    /// # Errors
    ///
    /// [`Error::Stopped`].
    pub fn unpublish(&self, port: PortId) -> Result<Option<PublishedPort>, Error> {
        self.ask(move |engine, _| engine.unpublish(port))
    }

    /// The published ports, in the order in which they were.
    ///
    /// # Errors
    ///
    /// [`Error::Stopped`].
    pub fn published(&self) -> Result<Vec<PublishedPort>, Error> {
        self.ask(|engine, _| engine.published())
    }

    /// What the guest may reach.
    ///
    /// # Errors
    ///
    /// [`Error::Stopped`].
    pub fn policy(&self) -> Result<PolicySpec, Error> {
        self.ask(|engine, _| engine.policy())
    }

    /// Replaces what the guest may reach, all of it at once. Flows of the guest's that are not allowed any more end: TCP
    /// connections with a reset on both sides. Those of published ports stay. A flow keeps the name by which it was
    /// allowed, and what its TLS ClientHello asked for. Where rules begin to be about names, ClientHellos are looked for
    /// in connections on which the guest has not sent anything yet.
    ///
    /// # Errors
    ///
    /// [`Error::Stopped`].
    pub fn set_policy(&self, policy: PolicySpec) -> Result<(), Error> {
        self.ask(move |engine, _| engine.set_policy(policy))
    }

    /// The flows that there are, `most` of them at most, with what each has carried.
    ///
    /// # Errors
    ///
    /// [`Error::Stopped`].
    pub fn flows(&self, most: usize) -> Result<Vec<FlowState>, Error> {
        self.flows_after(0, most)
    }

    /// The same without the first `skip` of them, for who takes them in parts. Flows come and go meanwhile: one may be
    /// there in two parts, or in none.
    ///
    /// # Errors
    ///
    /// [`Error::Stopped`].
    pub fn flows_after(&self, skip: usize, most: usize) -> Result<Vec<FlowState>, Error> {
        self.ask(move |engine, _| engine.flows(skip, most))
    }

    /// How fast data may go.
    ///
    /// # Errors
    ///
    /// [`Error::Stopped`].
    pub fn rates(&self) -> Result<Rates, Error> {
        self.ask(|engine, _| engine.rates())
    }

    /// Replaces how fast data may go, from now on. A way whose rate becomes another one begins with a full burst.
    ///
    /// # Errors
    ///
    /// [`Error::Stopped`].
    pub fn set_rates(&self, rates: Rates) -> Result<(), Error> {
        self.ask(move |engine, now| engine.set_rates(now, rates))
    }

    /// Has the engine run `command`, and waits for what it gives.
    pub(crate) fn ask<R: Send + 'static>(
        &self,
        command: impl FnOnce(&mut Engine, Instant) -> R + Send + 'static,
    ) -> Result<R, Error> {
        let (answer, answered) = channel();
        self.send(Box::new(move |engine, now| {
            // The caller waits; if its thread was ended all the same, nobody minds.
            let _ = answer.send(command(engine, now));
            Turn::Goes
        }))?;
        answered.recv().map_err(|_| Error::Stopped)
    }

    /// The same, for whoever must not wait for a thread that the host's file systems hold up.
    pub(crate) fn ask_within<R: Send + 'static>(
        &self,
        patience: std::time::Duration,
        question: impl FnOnce(&Engine) -> R + Send + 'static,
    ) -> Option<R> {
        let (answer, answered) = channel();
        self.tell(move |engine| drop(answer.send(question(engine)))).ok()?;
        answered.recv_timeout(patience).ok()
    }

    /// Has the engine run `command`, and waits for nothing.
    pub(crate) fn tell(&self, command: impl FnOnce(&mut Engine) + Send + 'static) -> Result<(), Error> {
        self.send(Box::new(move |engine, _| {
            command(engine);
            Turn::Goes
        }))
    }

    /// Has the engine end.
    pub(crate) fn stop(&self) {
        // It cannot be told only if it has ended.
        let _ = self.send(Box::new(|_, _| Turn::Ends));
    }

    fn send(&self, command: Command) -> Result<(), Error> {
        self.queue.send(command).map_err(|_| Error::Stopped)?;
        match self.wake.write(1) {
            // EAGAIN: the counter is full, so the engine has been told.
            Ok(_) | Err(Errno::EAGAIN) => Ok(()),
            Err(_) => Err(Error::Stopped),
        }
    }
}
