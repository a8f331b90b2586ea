//! What happened.

mod network;

pub use network::{NetworkLog, NetworkRecords, RecordError, finish_capture};

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
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

/// Opens a file of the caller's that something is written to; if it is made, the caller alone may read it: it has names and
/// addresses that a payload has dealt with. A link there may be what an earlier payload has left in a
/// directory that it could write, so it is not followed (ELOOP), but for the kernel's own to open files (`/dev/stderr`).
/// `flags` are for open(2).
pub(crate) fn open_unlinked(options: &mut OpenOptions, flags: i32, path: &Path) -> std::io::Result<File> {
    let links = if names_an_open_file(path) { 0 } else { libc::O_NOFOLLOW };
    options.mode(0o600).custom_flags(flags | libc::O_NOCTTY | links).open(path)
}

/// A path whose link at the end nobody else can have made. Elsewhere below `/dev` and `/proc` others can write: in
/// `/dev/shm`, or behind `/proc/PID/cwd`.
fn names_an_open_file(path: &Path) -> bool {
    let parts: Option<Vec<&str>> = path.components().map(|part| part.as_os_str().to_str()).collect();
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match parts.as_deref() {
        Some(["/", "dev", "stdin" | "stdout" | "stderr"]) => true,
        Some(["/", "dev", "fd", fd]) => is_number(fd),
        Some(["/", "proc", process, "fd", fd]) => {
            is_number(fd) && (matches!(*process, "self" | "thread-self") || is_number(process))
        }
        _ => false,
    }
}

/// A file that was made for something that is about to start. If it does not, and nothing has been written, the file is
/// removed when this is dropped.
#[derive(Debug)]
pub struct MadeFile {
    /// Where it is, whatever the working directory and the root are by then.
    dir: File,
    name: OsString,
    dev: u64,
    inode: u64,
}

impl MadeFile {
    /// `file` has just been made at `path`. `None` if that cannot be looked at: then it stays.
    fn new(file: &File, path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_owned();
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let dir =
            OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(dir).ok()?;
        let there = file.metadata().ok()?;
        Some(Self { dir, name, dev: there.dev(), inode: there.ino() })
    }

    /// It stays.
    pub fn keep(mut self) {
        self.name.clear();
    }
}

impl Drop for MadeFile {
    fn drop(&mut self) {
        use rustix::fs::{AtFlags, statat, unlinkat};
        if self.name.is_empty() {
            return;
        }
        // Somebody may have put another file there, or written to this one.
        let is_ours = statat(&self.dir, &self.name, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|there| (there.st_dev, there.st_ino, there.st_size) == (self.dev, self.inode, 0));
        if is_ours {
            unlinkat(&self.dir, &self.name, AtFlags::empty()).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_kernels_links_to_open_files_are_followed() {
        for path in ["/dev/stdin", "/dev/stdout", "//dev/./stderr", "/dev/fd/63", "/proc/self/fd/3"] {
            assert!(names_an_open_file(Path::new(path)), "{path}");
        }
        for path in ["/proc/thread-self/fd/0", "/proc/4711/fd/12"] {
            assert!(names_an_open_file(Path::new(path)), "{path}");
        }
        for path in [
            "/dev/shm/link",
            "/dev/mqueue/link",
            "/dev/../home/link",
            "/dev/fd/../link",
            "/dev/fd/x",
            "/dev/shm/fd/3",
            "/proc/self/cwd/link",
            "/proc/self/root/home/link",
            "/proc/self/cwd/fd/3",
            "/proc/x/fd/3",
            "dev/stdout",
            "/",
            "",
        ] {
            assert!(!names_an_open_file(Path::new(path)), "{path}");
        }
    }
}
