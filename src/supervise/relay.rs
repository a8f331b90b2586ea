//! Copying bytes between two descriptors in a thread of its own.
//!
//! One thread each way, because either side may block for ever without holding up the other. The
//! main thread waits for the end of one together with signals: a reader that never reads must not
//! make us deaf.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread::Builder;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};

/// A running copy. Dropping it leaves the thread to itself.
#[derive(Debug)]
pub(super) struct Relay {
    /// Hangs up when the thread ends.
    done: OwnedFd,
}

impl Relay {
    /// Copies until the end of `from` or an error on either side, then drops both.
    ///
    /// # Errors
    /// As pipe2(2) and `Builder::spawn`.
    pub(super) fn start<F, T>(name: &str, from: F, to: T, at_end: fn(&T)) -> Result<Self, Errno>
    where
        F: AsFd + Send + 'static,
        T: AsFd + Send + 'static,
    {
        let (done, running) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(errno)?;
        let body = move || {
            // Read from or written to in the background, our terminal stops us as it would any job.
            let mut stops = SigSet::empty();
            stops.add(Signal::SIGTTIN);
            stops.add(Signal::SIGTTOU);
            pthread_sigmask(SigmaskHow::SIG_UNBLOCK, Some(&stops), None).ok();
            copy(&from, &to);
            at_end(&to);
            drop((from, to, running));
        };
        match Builder::new().name(name.into()).spawn(body) {
            Ok(_) => Ok(Self { done }),
            Err(error) => Err(spawn_errno(&error)),
        }
    }

    /// Readable (hung up) when the copy is over.
    pub(super) fn done(&self) -> BorrowedFd<'_> {
        self.done.as_fd()
    }
}

fn spawn_errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EAGAIN))
}

fn copy(from: &impl AsFd, to: &impl AsFd) {
    let mut buffer = [0; 16 * 1024];
    loop {
        // A terminal's master reads EIO when no process holds the terminal.
        let got = match rustix::io::retry_on_intr(|| rustix::io::read(from, &mut buffer)) {
            Ok(0) | Err(_) => return,
            Ok(got) => got,
        };
        if write_all(to, buffer.get(..got).unwrap_or_default()).is_err() {
            return;
        }
    }
}

/// Writes all of `bytes`.
///
/// # Errors
/// As write(2).
pub(super) fn write_all(to: &impl AsFd, mut bytes: &[u8]) -> Result<(), rustix::io::Errno> {
    while !bytes.is_empty() {
        let written = rustix::io::retry_on_intr(|| rustix::io::write(to, bytes))?;
        bytes = bytes.get(written..).unwrap_or_default();
    }
    Ok(())
}

pub(super) fn errno(errno: rustix::io::Errno) -> Errno {
    Errno::from_raw(errno.raw_os_error())
}
