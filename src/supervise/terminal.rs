//! The payload's terminal (`-t`): bytes both ways between ours and the master of its pty.
//!
//! Two threads, one for each way, because either side may block for ever without holding up the
//! other. Our terminal is raw meanwhile, so Ctrl-C and Ctrl-Z are the payload's; it is put back
//! when this value goes, however that happens.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use nix::errno::Errno;
use rustix::termios::{
    OptionalActions, SpecialCodeIndex, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize,
};

/// A relayed terminal.
#[derive(Debug)]
pub(super) struct Terminal {
    master: Arc<OwnedFd>,
    saved: Option<Termios>,
    output: Option<JoinHandle<()>>,
}

impl Terminal {
    /// Makes our terminal raw, if we have one, and starts relaying.
    pub(super) fn start(master: OwnedFd) -> Result<Self, Errno> {
        let master = Arc::new(master);
        let mut terminal = Self { master: Arc::clone(&master), saved: None, output: None };
        terminal.copy_size();
        if isatty(rustix::stdio::stdin()) {
            let saved = tcgetattr(rustix::stdio::stdin()).map_err(errno)?;
            let mut raw = saved.clone();
            raw.make_raw();
            tcsetattr(rustix::stdio::stdin(), OptionalActions::Drain, &raw).map_err(errno)?;
            terminal.saved = Some(saved);
        }
        let input = Arc::clone(&master);
        // Never joined: it may wait for a key for ever, and ends with the process.
        spawn("terminal-input", move || relay_input(&input))?;
        terminal.output = Some(spawn("terminal-output", move || relay_output(&master))?);
        Ok(terminal)
    }

    /// Gives the payload's terminal the size of ours.
    pub(super) fn copy_size(&self) {
        let ours = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
        if let Some(size) = ours.into_iter().find_map(|fd| tcgetwinsize(fd).ok()) {
            tcsetwinsize(&*self.master, size).ok();
        }
    }

    /// Waits until everything the payload wrote is out. Nobody may hold its terminal any more.
    pub(super) fn finish(mut self) {
        if let Some(output) = self.output.take() {
            output.join().ok();
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(saved) = &self.saved {
            tcsetattr(rustix::stdio::stdin(), OptionalActions::Drain, saved).ok();
        }
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, Errno> {
    let spawned = Builder::new().name(name.into()).spawn(body);
    spawned.map_err(|e: io::Error| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EAGAIN)))
}

fn relay_input(master: &OwnedFd) {
    relay(rustix::stdio::stdin(), master);
    // Our input is at its end: so is the payload's, which a terminal says with a character.
    if let Ok(settings) = tcgetattr(master) {
        write_all(master, &[settings.special_codes[SpecialCodeIndex::VEOF]]).ok();
    }
}

fn relay_output(master: &OwnedFd) {
    relay(master, rustix::stdio::stdout());
}

/// Copies until the end or an error. The master reads EIO when no process holds the terminal.
fn relay(from: impl AsFd, to: impl AsFd) {
    let mut buffer = [0; 16 * 1024];
    loop {
        let got = match rustix::io::retry_on_intr(|| rustix::io::read(&from, &mut buffer)) {
            Ok(0) | Err(_) => return,
            Ok(got) => got,
        };
        if write_all(&to, buffer.get(..got).unwrap_or_default()).is_err() {
            return;
        }
    }
}

fn write_all(to: impl AsFd, mut bytes: &[u8]) -> Result<(), rustix::io::Errno> {
    while !bytes.is_empty() {
        let written = rustix::io::retry_on_intr(|| rustix::io::write(&to, bytes))?;
        bytes = bytes.get(written..).unwrap_or_default();
    }
    Ok(())
}

fn errno(errno: rustix::io::Errno) -> Errno {
    Errno::from_raw(errno.raw_os_error())
}
