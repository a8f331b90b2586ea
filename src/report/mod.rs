//! What happened.

mod network;

pub use network::{NetworkLog, NetworkRecords, finish_capture, open_capture};

use std::fs::{File, OpenOptions};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Component, Path};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::plan::Note;

/// The end of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunReport {
    /// How it ended.
    pub outcome: Outcome,
    /// From the start of the launch to the end of the payload.
    pub wall: Duration,
    /// Something differs in the upper.
    pub changed: bool,
    /// Ports on the host as they were bound, with the port inside.
    pub published: Vec<PublishedPort>,
    /// What was weaker or other than asked, from the plan.
    pub notes: Vec<Note>,
}

/// A published port as it was bound.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedPort {
    /// Address and port on the host.
    pub host: SocketAddr,
    /// Port inside.
    pub inside_port: u16,
    /// UDP instead of TCP.
    pub udp: bool,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The payload exited with this status.
    Exited(i32),
    /// A signal ended the payload.
    Signaled(i32),
    /// Our time limit ended it.
    TimedOut,
}

impl Outcome {
    /// The exit status of `rootlet run` for this end.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Exited(code) => u8::try_from(*code & 0xff).unwrap_or(u8::MAX),
            Self::Signaled(signal) => u8::try_from((128 + signal) & 0xff).unwrap_or(u8::MAX),
            Self::TimedOut => 124,
        }
    }
}

/// Opens a file of the caller's that something is written to. A link there may be what an earlier payload has left in a
/// directory that it could write, so it is not followed (ELOOP); those in /dev and /proc (`/dev/stderr`) are the host's own.
/// `flags` are for open(2).
pub(crate) fn open_unlinked(options: &mut OpenOptions, flags: i32, path: &Path) -> std::io::Result<File> {
    let is_hosts = ["/dev", "/proc"].iter().any(|dir| path.starts_with(dir))
        && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    let links = if is_hosts { 0 } else { libc::O_NOFOLLOW };
    options.custom_flags(flags | libc::O_NOCTTY | links).open(path)
}
