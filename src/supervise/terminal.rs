//! The payload's terminal (`-t`): bytes both ways between ours and the master of its pty.
//!
//! Our terminal is raw meanwhile, so Ctrl-C and Ctrl-Z are the payload's; it is put back when we
//! stop, when the payload has ended, and when this value goes.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use rustix::termios::{
    OptionalActions, SpecialCodeIndex, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize,
};

use super::relay::{Relay, errno, write_all};

/// A relayed terminal.
#[derive(Debug)]
pub(super) struct Terminal {
    master: Arc<OwnedFd>,
    saved: Option<Termios>,
    output: Relay,
}

impl Terminal {
    /// Makes our terminal raw, if we have one, and starts relaying.
    pub(super) fn start(master: OwnedFd) -> Result<Self, Errno> {
        let master = Arc::new(master);
        // In the background this stops us until we are in the foreground, before a key is read.
        let saved = if isatty(rustix::stdio::stdin()) {
            let settings = tcgetattr(rustix::stdio::stdin()).map_err(errno)?;
            set_settings(&raw(&settings))?;
            Some(settings)
        } else {
            None
        };
        // Waits for a key for ever, and ends with the process.
        Relay::start("terminal-input", rustix::stdio::stdin(), Arc::clone(&master), end_input)?;
        let output = Relay::start("terminal-output", Arc::clone(&master), rustix::stdio::stdout(), |_| {})?;
        let terminal = Self { master, saved, output };
        terminal.copy_size();
        Ok(terminal)
    }

    /// Gives the payload's terminal the size of ours.
    pub(super) fn copy_size(&self) {
        let ours = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
        if let Some(size) = ours.into_iter().find_map(|fd| tcgetwinsize(fd).ok()) {
            tcsetwinsize(&*self.master, size).ok();
        }
    }

    /// Puts our terminal back.
    pub(super) fn restore(&self) {
        if let Some(saved) = &self.saved {
            tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, saved).ok();
        }
    }

    /// Makes it raw again after [`Terminal::restore`]; its size may have changed meanwhile.
    pub(super) fn resume(&self) {
        if let Some(saved) = &self.saved {
            set_settings(&raw(saved)).ok();
        }
        self.copy_size();
    }

    /// What the payload still wrote.
    pub(super) fn output(&self) -> &Relay {
        &self.output
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.restore();
    }
}

fn raw(settings: &Termios) -> Termios {
    let mut raw = settings.clone();
    raw.make_raw();
    raw
}

/// Changes our terminal as a job may: from the background, the terminal stops us first.
fn set_settings(settings: &Termios) -> Result<(), Errno> {
    let mut stop = SigSet::empty();
    stop.add(Signal::SIGTTOU);
    pthread_sigmask(SigmaskHow::SIG_UNBLOCK, Some(&stop), None)?;
    let set = rustix::io::retry_on_intr(|| tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, settings));
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&stop), None)?;
    set.map_err(errno)
}

/// Our input is at its end: so is the payload's, which a terminal says with a character.
fn end_input(master: &Arc<OwnedFd>) {
    if let Ok(settings) = tcgetattr(&**master) {
        write_all(&**master, &[settings.special_codes[SpecialCodeIndex::VEOF]]).ok();
    }
}
