//! What is written about the network while the sandbox runs: the log of flows (what the sandbox reached, was refused, and
//! was reached by; one JSON object a line), and the capture of packets.
//!
//! Nobody who reads the log holds the network up, and no payload fills the disk with it: a line for which there is no room,
//! in the fifo, on the disk, or below [`LOG_LIMIT`], is lost and counted. There is never half a line: what was written of
//! one is taken back.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use netstack::{Capture, FlowEvent, FlowEventKind, FlowLog};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde::Serialize;

use super::{MadeFile, open_unlinked};

/// No log is made longer than this, whatever was in it before: some four million lines.
const LOG_LIMIT: u64 = 1 << 30;
/// Of that, what is left for the line that says so.
const LAST_LINE: u64 = 128;

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

/// A line about the log itself.
#[derive(Debug, Serialize)]
struct Remark {
    time: f64,
    event: &'static str,
    #[serde(skip_serializing_if = "is_zero")]
    lost: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// The files.
#[derive(Debug, Default)]
pub struct NetworkRecords {
    /// Lines about flows.
    pub log: Option<NetworkLog>,
    /// Packets, as pcapng.
    pub capture: Option<File>,
    /// That of the capture, if it was not there before: to be kept once the network has started. A log stays: several runs
    /// may share it, and another may have opened it since it was made.
    pub made: Option<MadeFile>,
}

/// A file that cannot be one of them.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the {what} {}", path.display())]
pub struct RecordError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl NetworkRecords {
    /// Opens or makes the files. What is in them stays; it is for [`Capture::replace`] to empty that of the capture.
    ///
    /// # Errors
    ///
    /// As open(2); ENXIO for a fifo that nobody reads, ELOOP for a link; a log without room for a line; a terminal for a
    /// capture.
    pub fn open(log: Option<&Path>, capture: Option<&Path>) -> Result<Self, RecordError> {
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| RecordError { what, path, source }
        };
        let mut records = Self::default();
        if let Some(path) = log {
            records.log = Some(NetworkLog::open(path).map_err(failed("network log", path))?);
        }
        if let Some(path) = capture {
            let (capture, made) = open_capture(path).map_err(failed("network capture", path))?;
            records.capture = Some(capture);
            records.made = made;
        }
        Ok(records)
    }
}

fn open_capture(path: &Path) -> io::Result<(File, Option<MadeFile>)> {
    // A fifo without a reader must not hold the run up; with one, it is the capture's own thread that waits.
    let (file, made) = open_or_make(OpenOptions::new().write(true), path)?;
    if rustix::termios::isatty(&file) {
        return Err(io::Error::other("it is a terminal, and packets are not text"));
    }
    let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?) - OFlag::O_NONBLOCK;
    fcntl(&file, FcntlArg::F_SETFL(flags))?;
    Ok((file, made))
}

/// Ends a capture whose stack has ended, and says what is missing in it.
pub fn finish_capture(capture: &Capture) {
    let captured = capture.finish();
    tracing::info!(seen = captured.seen, dropped = captured.dropped, "the capture of the network is over");
    if captured.dropped > 0 {
        tracing::warn!(dropped = captured.dropped, "packets are missing in the capture of the network");
    }
}

/// Opens or makes a file of the caller's, and says if it was made. Nothing is waited for.
fn open_or_make(options: &mut OpenOptions, path: &Path) -> io::Result<(File, Option<MadeFile>)> {
    // It may be there, or be what is not made like this.
    match open_unlinked(options.create_new(true), libc::O_NONBLOCK, path) {
        Ok(file) => {
            let made = MadeFile::new(&file, path);
            Ok((file, made))
        }
        Err(_) => {
            let options = options.create_new(false).create(true);
            Ok((open_unlinked(options, libc::O_NONBLOCK, path)?, None))
        }
    }
}

/// Where lines go.
#[derive(Debug)]
struct Sink {
    file: File,
    /// An ordinary file, with a size.
    is_file: bool,
    /// Lines that were not written since the last that was.
    lost: u64,
    /// That there is no room has been written.
    full: bool,
    /// What is left of a line of which the other end took a part: it goes before the next one.
    rest: Vec<u8>,
    /// Half a line could not be taken back, as somebody else has written behind it.
    broken: bool,
}

/// The end of a file that may be a fifo. Whoever reads it must not hold the network up: what it has no room for is lost,
/// and counted.
#[derive(Debug)]
pub struct NetworkLog(Sink);

impl NetworkLog {
    fn open(path: &Path) -> io::Result<Self> {
        let file = open_unlinked(OpenOptions::new().append(true).create(true), libc::O_NONBLOCK, path)?;
        let there = file.metadata()?;
        if there.is_file() && there.len() + LAST_LINE >= LOG_LIMIT {
            return Err(io::Error::other("it has reached 1 GiB, which is the most: move it away"));
        }
        let is_file = there.is_file();
        Ok(Self(Sink { file, is_file, lost: 0, full: false, rest: Vec::new(), broken: false }))
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
        match self.put(&line(event, now(), self.lost), LAST_LINE) {
            Ok(()) => (self.lost, self.full) = (0, false),
            Err(error) => {
                if self.lost == 0 {
                    tracing::warn!(%error, "a line of the network log is lost");
                }
                self.lost += 1;
            }
        }
    }

    /// Writes a whole line or nothing, and leaves `room` below the limit.
    fn put(&mut self, line: &impl Serialize, room: u64) -> io::Result<()> {
        let mut bytes = if self.broken { vec![b'\n'] } else { Vec::new() };
        serde_json::to_writer(&mut bytes, line)?;
        bytes.push(b'\n');
        if !self.is_file {
            return self.put_stream(&bytes);
        }
        let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        // Others may write to it, or cut it.
        if self.file.metadata()?.len() + len + room > LOG_LIMIT {
            if room > 0 && !self.full {
                // If that fails it is said with the next line, or at the end.
                self.put(&Remark { time: now(), event: "full", lost: self.lost }, 0)?;
                self.full = true;
            }
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        // One call, so that lines of several runs do not mix. Another one only says why the first wrote a part.
        let mut written = 0;
        while let Some(left) = bytes.get(written..).filter(|left| !left.is_empty()) {
            match self.file.write(left) {
                Ok(n) => written += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.take_back(written);
                    return Err(error);
                }
            }
        }
        self.broken = false;
        Ok(())
    }

    /// Cuts off what was written of a line, unless somebody else has written behind it.
    fn take_back(&mut self, written: usize) {
        if written == 0 {
            return;
        }
        let mut cut = || {
            // Behind what we appended last.
            let end = self.file.stream_position()?;
            let start = end.checked_sub(u64::try_from(written).unwrap_or(u64::MAX));
            match start.filter(|_| self.file.metadata().is_ok_and(|file| file.len() == end)) {
                Some(start) => self.file.set_len(start),
                None => Err(io::ErrorKind::ResourceBusy.into()),
            }
        };
        self.broken = cut().is_err();
    }

    /// A fifo takes all of a line or nothing, as none is longer than PIPE_BUF (pipe(7)); others may take a part.
    fn put_stream(&mut self, line: &[u8]) -> io::Result<()> {
        while !self.rest.is_empty() {
            let n = self.file.write(&self.rest)?;
            self.rest.drain(..n);
        }
        let n = self.file.write(line)?;
        self.rest.extend(line.get(n..).unwrap_or_default());
        Ok(())
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        // There is no next line to say it. A full file has said so.
        if self.lost > 0 && !self.full {
            let _ = self.put(&Remark { time: now(), event: "lost", lost: self.lost }, 0);
        }
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use std::os::fd::OwnedFd;
    use std::path::PathBuf;

    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Self {
            Self(std::env::temp_dir().join(format!("rootlet-log-{}-{name}", std::process::id())))
        }

        fn read(&self) -> String {
            std::fs::read_to_string(&self.0).unwrap()
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    #[test]
    fn links_are_followed_only_where_no_payload_can_have_made_them() {
        let (link, target) = (Place::new("link"), Place::new("target"));
        std::fs::write(&target.0, "kept").unwrap();
        std::os::unix::fs::symlink(&target.0, &link.0).unwrap();
        let is_loop = |error: io::Error| error.raw_os_error() == Some(libc::ELOOP);
        assert!(is_loop(open_capture(&link.0).unwrap_err()));
        assert!(is_loop(NetworkLog::open(&link.0).unwrap_err()));
        let around = Path::new("/dev/..").join(link.0.strip_prefix("/").unwrap());
        assert!(is_loop(NetworkLog::open(&around).unwrap_err()));
        // Everybody's directory, as /tmp is.
        let shared = Place(Path::new("/dev/shm").join(format!("rootlet-link-{}", std::process::id())));
        std::os::unix::fs::symlink(&target.0, &shared.0).unwrap();
        assert!(is_loop(open_capture(&shared.0).unwrap_err()));
        assert_eq!(target.read(), "kept");
        let null = File::open("/dev/null").unwrap();
        let path = format!("/dev/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&null));
        NetworkLog::open(Path::new(&path)).unwrap();
    }

    #[test]
    fn a_capture_that_was_made_and_not_used_is_removed_again() {
        let capture = Place::new("made-capture");
        let open = || NetworkRecords::open(None, Some(&capture.0)).unwrap();
        let records = open();
        assert!(capture.0.exists());
        drop(records);
        assert!(!capture.0.exists());
        open().made.unwrap().keep();
        assert!(capture.0.exists());
        assert!(open().made.is_none(), "it was there");
        assert!(capture.0.exists());
        // What has been written, or put there by somebody else, is not ours to remove.
        std::fs::remove_file(&capture.0).unwrap();
        let records = open();
        std::fs::write(&capture.0, "x").unwrap();
        drop(records);
        assert_eq!(capture.read(), "x");
        std::fs::remove_file(&capture.0).unwrap();
        let records = open();
        std::fs::remove_file(&capture.0).unwrap();
        // Its inode stays taken, as the file is open.
        File::create(&capture.0).unwrap();
        drop(records);
        assert!(capture.0.exists());
        assert!(NetworkRecords::open(None, Some(Path::new("/dev/null"))).unwrap().made.is_none());
    }

    #[test]
    fn a_log_stays_for_those_who_have_opened_it_meanwhile() {
        let place = Place::new("shared-log");
        let open = || NetworkRecords::open(Some(&place.0), None).unwrap();
        let failing = open();
        let NetworkLog(mut sink) = open().log.unwrap();
        drop(failing);
        sink.put(&"line", LAST_LINE).unwrap();
        assert_eq!(place.read(), "\"line\"\n");
    }

    #[test]
    fn a_capture_is_nothing_for_a_terminal() {
        let pty =
            rustix::pty::openpt(rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY).unwrap();
        rustix::pty::grantpt(&pty).unwrap();
        rustix::pty::unlockpt(&pty).unwrap();
        let name = rustix::pty::ptsname(&pty, Vec::new()).unwrap().into_string().unwrap();
        assert!(open_capture(Path::new(&name)).unwrap_err().to_string().contains("terminal"));
        NetworkLog::open(Path::new(&name)).unwrap();
    }

    #[test]
    fn a_log_has_an_end_and_says_so() {
        let place = Place::new("full");
        let other = File::create(&place.0).unwrap();
        let NetworkLog(mut sink) = NetworkLog::open(&place.0).unwrap();
        let line = "x".repeat(100);
        other.set_len(LOG_LIMIT - LAST_LINE - 103).unwrap();
        sink.put(&line, LAST_LINE).unwrap();
        for _ in 0..3 {
            assert_eq!(sink.put(&line, LAST_LINE).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        }
        sink.lost = 3;
        let mut tail = String::new();
        let mut file = File::open(&place.0).unwrap();
        file.seek(io::SeekFrom::Start(LOG_LIMIT - LAST_LINE - 103)).unwrap();
        file.read_to_string(&mut tail).unwrap();
        let lines: Vec<&str> = tail.lines().collect();
        assert!(lines.len() == 2 && lines[0].contains("xxx"), "{lines:?}");
        let last: serde_json::Value = serde_json::from_str(lines[1]).unwrap();
        assert!(last["event"] == "full" && last["time"].is_f64(), "{last}");
        let len = file.metadata().unwrap().len();
        assert!(len <= LOG_LIMIT && NetworkLog::open(&place.0).unwrap_err().to_string().contains("1 GiB"));
        // The end of a log that has said so needs no more words; one that somebody has cut goes on.
        other.set_len(0).unwrap();
        sink.put(&line, LAST_LINE).unwrap();
        drop(sink);
        assert_eq!(place.read(), format!("\"{line}\"\n"));
    }

    #[test]
    fn that_a_log_is_full_is_said_again_if_it_could_not_be_written() {
        let place = Place::new("unsaid");
        File::create(&place.0).unwrap().set_len(LOG_LIMIT - LAST_LINE).unwrap();
        // Nothing can be written.
        let file = File::open(&place.0).unwrap();
        let mut sink = Sink { file, is_file: true, lost: 0, full: false, rest: Vec::new(), broken: false };
        assert_eq!(sink.put(&"line", LAST_LINE).unwrap_err().raw_os_error(), Some(libc::EBADF));
        sink.file = OpenOptions::new().append(true).open(&place.0).unwrap();
        assert_eq!(sink.put(&"line", LAST_LINE).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        let mut tail = String::new();
        let mut file = File::open(&place.0).unwrap();
        file.seek(io::SeekFrom::Start(LOG_LIMIT - LAST_LINE)).unwrap();
        file.read_to_string(&mut tail).unwrap();
        assert!(tail.contains("\"full\"") && sink.full, "{tail:?}");
    }

    #[test]
    fn half_a_line_is_taken_back() {
        let place = Place::new("half");
        let NetworkLog(mut sink) = NetworkLog::open(&place.0).unwrap();
        sink.put(&1, 0).unwrap();
        sink.file.write_all(b"ha").unwrap();
        sink.take_back(2);
        assert_eq!((place.read().as_str(), sink.broken), ("1\n", false));
        // Unless another run has written behind it.
        sink.file.write_all(b"ha").unwrap();
        let NetworkLog(mut other) = NetworkLog::open(&place.0).unwrap();
        other.put(&2, 0).unwrap();
        sink.take_back(2);
        sink.put(&3, 0).unwrap();
        assert_eq!(place.read(), "1\nha2\n\n3\n");
        sink.lost = 7;
        drop(sink);
        assert!(place.read().ends_with("\"event\":\"lost\",\"lost\":7}\n"));
    }

    #[test]
    fn who_takes_half_a_line_gets_the_other_half_first() {
        let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let file = File::from(OwnedFd::from(ours));
        let mut sink = Sink { file, is_file: false, lost: 0, full: false, rest: Vec::new(), broken: false };
        let long = "x".repeat(300_000);
        let mut written = 0;
        while sink.put(&long, 0).is_ok() {
            written += 1;
        }
        assert!(!sink.rest.is_empty(), "a socket takes a part");
        let mut got = Vec::new();
        while sink.put(&"end", 0).is_err() {
            let _ = theirs.read_to_end(&mut got);
        }
        drop(sink);
        let _ = theirs.read_to_end(&mut got);
        let text = String::from_utf8(got).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!((lines.len(), lines.last()), (written + 1, Some(&"\"end\"")));
        assert!(lines[..written].iter().all(|line| line.len() == long.len() + 2));
    }
}
