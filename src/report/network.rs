//! The log of flows: what the sandbox reached, was refused, and was reached by. One JSON object a line.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use netstack::{FlowEvent, FlowEventKind, FlowLog};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde::Serialize;

/// A line. Fields that say nothing are left out.
#[derive(Debug, Serialize)]
struct Line<'a> {
    /// Seconds since 1970.
    time: f64,
    event: &'static str,
    protocol: &'static str,
    direction: &'static str,
    inside: String,
    outside: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<&'a str>,
    #[serde(skip_serializing_if = "is_zero")]
    untold: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    sent_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sent_packets: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    received_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    received_packets: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seconds: Option<f64>,
    /// Lines before this one that could not be written.
    #[serde(skip_serializing_if = "is_zero")]
    lost: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// What is written about the network while the sandbox runs.
#[derive(Debug, Default)]
pub struct NetworkRecords {
    /// Lines about flows.
    pub log: Option<NetworkLog>,
    /// Packets, as pcapng.
    pub capture: Option<File>,
}

/// Opens the file of a capture; what was in it goes.
///
/// # Errors
///
/// As open(2); ENXIO for a fifo that nobody reads.
pub fn open_capture(path: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    // A fifo without a reader must not hold the run up; with one, it is the capture's own thread that waits.
    options.write(true).create(true).truncate(true).mode(0o600);
    let file = options.custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path)?;
    let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?) - OFlag::O_NONBLOCK;
    fcntl(&file, FcntlArg::F_SETFL(flags))?;
    Ok(file)
}

/// Where lines go, and how many did not since the last that did.
#[derive(Debug)]
struct Sink {
    file: File,
    lost: u64,
}

/// The end of a file that may be a fifo. Whoever reads it must not hold the network up: what it has no room for is lost,
/// and counted.
#[derive(Debug)]
pub struct NetworkLog(Sink);

impl NetworkLog {
    /// Opens or makes the file; what is in it stays.
    ///
    /// # Errors
    ///
    /// As open(2); ENXIO for a fifo that nobody reads.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        let mut options = OpenOptions::new();
        options.append(true).create(true).mode(0o600).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
        Ok(Self(Sink { file: options.open(path)?, lost: 0 }))
    }

    /// What the stack tells of flows, as lines.
    #[must_use]
    pub fn flow_log(self) -> FlowLog {
        // One thread only ever comes here.
        let sink = Mutex::new(self.0);
        FlowLog::new(move |event| {
            if let Ok(mut sink) = sink.lock() {
                sink.write(event);
            }
        })
    }
}

impl Sink {
    fn write(&mut self, event: &FlowEvent<'_>) {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let line = line(event, time, self.lost);
        // One call, so that lines of several runs do not mix; a fifo takes all of one or nothing (pipe(7)).
        let written = serde_json::to_vec(&line).map_err(std::io::Error::from).and_then(|mut line| {
            line.push(b'\n');
            self.file.write_all(&line)
        });
        match written {
            Ok(()) => self.lost = 0,
            Err(error) => {
                if self.lost == 0 {
                    tracing::warn!(%error, "a line of the network log is lost");
                }
                self.lost += 1;
            }
        }
    }
}

fn line<'a>(event: &FlowEvent<'a>, time: f64, lost: u64) -> Line<'a> {
    let mut line = Line {
        time,
        event: "opened",
        protocol: event.transport.name(),
        direction: if event.inbound { "in" } else { "out" },
        inside: event.guest.to_string(),
        outside: event.remote.to_string(),
        name: event.name,
        reason: None,
        rule: None,
        untold: 0,
        sent_bytes: None,
        sent_packets: None,
        received_bytes: None,
        received_packets: None,
        seconds: None,
        lost,
    };
    match event.kind {
        FlowEventKind::Refused { reason, rule, untold } => {
            line.event = "refused";
            line.reason = Some(reason);
            line.rule = rule;
            line.untold = untold;
        }
        FlowEventKind::Closed { reason, sent, received, lasted } => {
            line.event = "closed";
            line.reason = Some(reason);
            line.sent_bytes = Some(sent.bytes);
            line.sent_packets = Some(sent.packets);
            line.received_bytes = Some(received.bytes);
            line.received_packets = Some(received.packets);
            line.seconds = Some(lasted.as_secs_f64());
        }
        _ => {}
    }
    line
}
