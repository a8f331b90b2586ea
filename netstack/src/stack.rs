//! A running stack: the engine in a thread of its own, and what its owner holds.

use std::io::PipeReader;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::errno::Errno;
use smoltcp::time::Instant;

use crate::config::{Error, LAST_DATA_MOST, LAST_DATA_QUIET, StackSpec};
use crate::control::Control;
use crate::device::Segmentation;
use crate::engine::{Engine, live};
use crate::forward::Published;
use crate::host;
use crate::stats::Stats;
use crate::sys;

/// How long the end of the thread is waited for. It has nothing to wait for itself but the host's file systems, when it
/// reads the list of resolvers.
const STOP_PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);

/// A running stack: one thread.
#[derive(Debug)]
pub struct Stack {
    thread: Option<JoinHandle<()>>,
    control: Control,
    /// Ends when the thread does.
    ended: PipeReader,
    /// It has ended, and not because it should.
    failed: Arc<AtomicBool>,
}

/// The monotonic clock, with an arbitrary beginning.
///
/// It stands still while the host is suspended, as do the clocks that the guest's kernel and epoll count by. That is
/// right for everything that is timed here: a guest that slept owes us no acknowledgement from that time, and no flow
/// was idle because nobody was awake. What grows old in the world meanwhile is asked for anew in any case (the list of
/// resolvers and the host's addresses are never older than some seconds of this clock), or looks at another clock, too
/// ([`Suspension`](crate::suspend::Suspension): answers of resolvers).
fn clock() -> impl FnMut() -> Instant {
    let start = std::time::Instant::now();
    move || {
        let micros = i64::try_from(start.elapsed().as_micros()).unwrap_or(i64::MAX);
        // Not from zero: smoltcp takes zero for "long ago".
        Instant::from_micros(micros.saturating_add(1_000_000))
    }
}

impl Stack {
    /// Starts the stack's thread on `tap`, which came from [`open_tap`](crate::open_tap), in whatever network
    /// namespace. The flows' other ends are sockets of the calling thread's network namespace.
    ///
    /// Nothing is read, resolved or connected before the guest's first frame asks for it.
    ///
    /// # Errors
    ///
    /// If the MTU is too small, `tap` is none, a descriptor or the thread cannot be made, or what is in the file of a capture
    /// cannot be taken out of it.
    pub fn start(tap: OwnedFd, spec: &StackSpec, published: Published) -> Result<Self, Error> {
        if spec.mtu < spec.least_mtu() {
            return Err(Error::SmallMtu { mtu: spec.mtu, least: spec.least_mtu() });
        }
        if !sys::is_vnet_tap(tap.as_fd()) {
            return Err(Error::NotATap);
        }
        let failed = |what| move |errno: Errno| Error::Start { what, source: errno.into() };
        sys::set_vnet_header_len(tap.as_fd()).map_err(failed("virtio header"))?;
        let segmentation = sys::set_offload(tap.as_fd())
            .inspect_err(
                |errno| tracing::warn!(%errno, "the TAP takes no super-segments: the network will be slower"),
            )
            .unwrap_or(Segmentation::None);
        // Before there is another thread.
        host::Budget::from_rlimit().make_room(tap.as_fd());
        host::nonblocking(tap.as_fd()).map_err(failed("non-blocking TAP"))?;
        let mut clock = clock();
        let (engine, control) =
            Engine::new(tap, spec, published, segmentation, clock()).map_err(failed("event loop"))?;
        let (ended, alive) =
            std::io::pipe().map_err(|source| Error::Start { what: "pipe of its end", source })?;
        let failed_late = Arc::<AtomicBool>::default();
        let of_thread = Arc::clone(&failed_late);
        let body = move || {
            let _alive = alive;
            // Signals are the business of the process's main thread.
            let _ = nix::sys::signal::SigSet::all().thread_block();
            if !live(engine, clock) {
                of_thread.store(true, Ordering::Relaxed);
            }
        };
        let thread = std::thread::Builder::new()
            .name("netstack".into())
            .spawn(body)
            .map_err(|source| Error::Start { what: "thread", source })?;
        let stack = Self { thread: Some(thread), control, ended, failed: failed_late };
        if let Some(capture) = &spec.capture {
            let what = "emptying the file of the capture";
            capture.begin().map_err(|source| Error::Start { what, source })?;
        }
        Ok(stack)
    }

    /// What the stack has done so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.control.stats()
    }

    /// For commands while it runs.
    #[must_use]
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// A descriptor that hangs up (poll(2), POLLHUP) when the stack's thread has ended.
    #[must_use]
    pub fn end_event(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    /// Whether the stack's thread still runs. It ends by itself when the TAP's network namespace is gone.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Whether the stack has ended for another reason than that: a defect, or the kernel let it wait for nothing any more.
    /// The log has the reason.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// Waits until what the guest has sent has been passed on, datagrams and connections with their ends, as the guest's
    /// kernel sends it when the last program is gone. Not longer than data goes, and a second; ten seconds in all; and not
    /// longer than until `interrupt` can be read. Where some is left then, the connection ends with a reset.
    pub fn drain(&self, interrupt: Option<BorrowedFd<'_>>) {
        let until = std::time::Instant::now() + LAST_DATA_MOST;
        let progress = || self.control.ask_within(LAST_DATA_QUIET, |engine| engine.progress());
        let begin = || {
            // Nothing is sent: the other end goes, with the engine if it must be.
            let (drained, waiter) = std::io::pipe().ok()?;
            self.control.tell(move |engine| engine.drain(waiter)).ok()?;
            Some((drained, progress()?))
        };
        let Some((drained, mut seen)) = begin() else { return };
        while !ready_within(drained.as_fd(), interrupt, LAST_DATA_QUIET) {
            match progress() {
                Some(now) if now != seen && std::time::Instant::now() < until => seen = now,
                _ => return,
            }
        }
    }

    /// Has every connection whose end the guest has not sent, or the stack not passed on, end with a reset when the stack
    /// does: the guest's programs were ended in the midst of what they did.
    pub fn cut(&self) {
        // It cannot be told only if it has ended.
        let _ = self.control.tell(|engine| engine.cut = true);
    }

    /// Ends the thread and closes every flow. Dropping the stack does the same. A thread that a system call holds up for
    /// seconds is left to end by itself.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        self.control.stop();
        let Some(thread) = self.thread.take() else { return };
        if end_within(&self.ended, STOP_PATIENCE) {
            let _ = thread.join();
        } else {
            tracing::error!("the network stack does not end: its thread is left behind");
        }
    }
}

/// Whether the thread that holds the other end is gone within `patience`.
fn end_within(ended: &PipeReader, patience: std::time::Duration) -> bool {
    ready_within(ended.as_fd(), None, patience)
}

/// Whether something is to be had from one of them within `patience`.
fn ready_within(fd: BorrowedFd<'_>, other: Option<BorrowedFd<'_>>, patience: std::time::Duration) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let until = std::time::Instant::now() + patience;
    let mut fds: Vec<PollFd<'_>> =
        std::iter::once(fd).chain(other).map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    loop {
        let left = until.saturating_duration_since(std::time::Instant::now());
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, left) {
            Err(Errno::EINTR) => {}
            ready => return ready != Ok(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control;

    #[test]
    fn a_link_that_is_too_small_is_refused() {
        for (ipv6, mtu) in [(true, 1279), (false, 575)] {
            let spec = StackSpec { ipv6, mtu, ..crate::config::tests::spec() };
            let (_, no_tap) = std::io::pipe().expect("pipe");
            let started = Stack::start(no_tap.into(), &spec, Published::default());
            assert!(
                matches!(started, Err(Error::SmallMtu { mtu: of, least }) if of == mtu && least == mtu + 1)
            );
        }
    }

    #[test]
    fn a_thread_that_does_not_end_is_not_waited_for_without_end() {
        let (ended, alive) = std::io::pipe().expect("pipe");
        assert!(!end_within(&ended, std::time::Duration::ZERO));
        drop(alive);
        assert!(end_within(&ended, STOP_PATIENCE));
    }

    #[test]
    fn last_data_is_not_waited_for_when_the_thread_does_not_answer() {
        let (ended, _alive) = std::io::pipe().expect("pipe");
        let (control, _unread) = control::commands(Arc::default()).expect("queue");
        let stack = Stack { thread: None, control, ended, failed: Arc::default() };
        let (over, waited) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            stack.drain(None);
            over.send(())
        });
        assert_eq!(waited.recv_timeout(LAST_DATA_MOST), Ok(()));
    }
}
