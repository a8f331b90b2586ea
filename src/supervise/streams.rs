//! The payload's standard streams where ours are a terminal and it has none of its own.
//!
//! A terminal is more than a stream: who holds it can read what is typed for others and change its
//! settings, whichever way it was opened. So without `-t` the payload gets pipes in the place of our
//! terminal, and we copy. Everything that is no terminal it gets as it is.

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::termios::isatty;

use super::relay::{Relay, errno};
use crate::plan::ProcessPlan;

/// What takes the place of standard input, output and error inside; `None`: ours.
pub(crate) type Inside = [Option<OwnedFd>; 3];

/// Our ends.
#[derive(Debug, Default)]
pub(crate) struct Outside {
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
    error: Option<OwnedFd>,
}

/// Makes the pipes.
///
/// # Errors
/// As pipe2(2), and open(2) of /dev/null.
pub(crate) fn prepare(process: &ProcessPlan) -> Result<(Inside, Outside), Errno> {
    let mut inside: Inside = [None, None, None];
    let mut outside = Outside::default();
    if process.terminal {
        return Ok((inside, outside));
    }
    if isatty(rustix::stdio::stdin()) {
        if process.interactive {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC).map_err(errno)?;
            inside[0] = Some(read);
            outside.input = Some(write);
        } else {
            let null = std::fs::File::open("/dev/null");
            inside[0] =
                Some(null.map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::ENOENT)))?.into());
        }
    }
    if isatty(rustix::stdio::stdout()) {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).map_err(errno)?;
        inside[1] = Some(write);
        outside.output = Some(read);
    }
    if isatty(rustix::stdio::stderr()) {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).map_err(errno)?;
        inside[2] = Some(write);
        outside.error = Some(read);
    }
    Ok((inside, outside))
}

impl Outside {
    /// Starts copying; gives what the payload's last words come through.
    ///
    /// # Errors
    /// As [`Relay::start`].
    pub(super) fn start(self) -> Result<Vec<Relay>, Errno> {
        let mut outputs = Vec::new();
        if let Some(input) = self.input {
            // Waits for a key for ever, and ends with the process.
            Relay::start("input", rustix::stdio::stdin(), input, |_| {})?;
        }
        if let Some(output) = self.output {
            outputs.push(Relay::start("output", output, rustix::stdio::stdout(), |_| {})?);
        }
        if let Some(error) = self.error {
            outputs.push(Relay::start("error", error, rustix::stdio::stderr(), |_| {})?);
        }
        Ok(outputs)
    }
}
