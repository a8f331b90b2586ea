//! What happened.

mod network;

pub use network::{NetworkLog, NetworkRecords, finish_capture, open_capture};

use std::net::SocketAddr;
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
