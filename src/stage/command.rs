//! Which file the payload's command may be, and why none could be executed.
//!
//! The payload's process tries the candidates in order (`sys::exec_stage`, as execvp(3)); init says
//! afterwards what execve(2) does not tell by errno alone.

use std::ffi::OsStr;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat2};

use crate::launch::handshake::{SetupFailure, Step};
use crate::plan::ProcessPlan;

/// Most directories of PATH that are looked into: what says how each went is one message, and each
/// takes the space of an argument.
const MOST_CANDIDATES: usize = 4096;

/// Where the command may be: as it is if it has a slash, else in each directory of PATH.
pub(super) fn candidates(process: &ProcessPlan) -> Vec<PathBuf> {
    let Some(command) = process.args.first() else { return Vec::new() };
    if command.as_bytes().contains(&b'/') {
        return vec![command.into()];
    }
    let path = process.env.iter().find(|(name, _)| name == "PATH").map(|(_, value)| value.as_os_str());
    let path = path.unwrap_or(OsStr::new("/usr/local/bin:/usr/bin:/bin"));
    // An empty name would execute the directory.
    let directories = std::env::split_paths(path).filter(|_| !command.is_empty());
    directories.map(|directory| directory.join(command)).take(MOST_CANDIDATES).collect()
}

/// Why none of the candidates was executed; `tried` holds the errno of each that was tried, `base`
/// is the directory in which that was.
///
/// Runs in init, which sees the same root. It reads the first bytes of a file that the payload named,
/// so it follows no link of /proc/PID: there its own would be meant, not the payload's.
pub(super) fn failure(process: &ProcessPlan, base: &Path, tried: &[u8]) -> SetupFailure {
    let mut refused = None;
    for (candidate, errno) in candidates(process).iter().zip(tried) {
        let errno = Errno::from_raw(i32::from(*errno));
        let shown = candidate.to_string_lossy();
        match (errno, explain(&base.join(candidate), &shown, errno)) {
            (Errno::ENOENT | Errno::ENOTDIR, None) => {}
            (Errno::EACCES, explained) => {
                let object = explained.unwrap_or_else(|| shown.into_owned());
                refused.get_or_insert(SetupFailure::new(Step::Exec, object, errno));
            }
            (_, explained) => {
                let object = explained.unwrap_or_else(|| shown.into_owned());
                // What exists but cannot be executed is not ENOENT to the exit status.
                let errno = if errno == Errno::ENOENT { Errno::ENOEXEC } else { errno };
                return SetupFailure::new(Step::Exec, object, errno);
            }
        }
    }
    let command = process.args.first().map(|command| command.to_string_lossy()).unwrap_or_default();
    refused.unwrap_or_else(|| SetupFailure::new(Step::Exec, command, Errno::ENOENT))
}

/// What execve(2) does not say by errno alone.
fn explain(path: &Path, shown: &str, errno: Errno) -> Option<String> {
    let look = OFlags::PATH | OFlags::CLOEXEC;
    let file = openat2(CWD, path, look, Mode::empty(), ResolveFlags::NO_MAGICLINKS).ok()?;
    let kind = FileType::from_raw_mode(fstat(&file).ok()?.st_mode);
    match errno {
        Errno::EACCES if kind == FileType::Directory => Some(format!("{shown}, which is a directory")),
        Errno::ENOENT | Errno::ENOTDIR => Some(match interpreter(path) {
            Some(interpreter) => format!("{shown}, whose interpreter {interpreter} is not there"),
            None => format!("{shown}, whose dynamic loader is not there"),
        }),
        Errno::ENOEXEC => {
            Some(format!("{shown}, which is neither a program for this machine nor starts with #!"))
        }
        _ => None,
    }
}

/// The interpreter that a script's first line names.
fn interpreter(path: &Path) -> Option<String> {
    // Not to wait for the other end of a fifo.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let mut start = Vec::new();
    let file = openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS).ok()?;
    let file = std::fs::File::from(file);
    file.take(256).read_to_end(&mut start).ok()?;
    let line = start.strip_prefix(b"#!")?.split(|b| *b == b'\n').next()?;
    let name = line.split(|b| b.is_ascii_whitespace()).find(|word| !word.is_empty())?;
    Some(String::from_utf8_lossy(name).into_owned())
}
