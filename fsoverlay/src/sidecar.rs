//! Owners of symbolic links, which cannot hold `user.*` xattrs. (Nor can real fifos and
//! sockets; ours are files with a record, but an upper may hold such of another maker.)
//!
//! A link whose owner is not the default one gets a line in the file `owners` of the
//! work directory: `INO BTIME UID GID`, the inode number and the time of birth of the
//! link in the upper, in hexadecimal and decimal. Later lines win; an owner of `-`
//! takes a line back. A number that the file system used again for another link is
//! told apart by the time of birth. The upper itself stays as the kernel's overlayfs
//! wants it; without the file (the work directory was emptied, the upper copied
//! elsewhere) links belong to the default owner again.
//!
//! The file is read when the first link of the upper is looked up, and only appended
//! to while mounted: one `write` per line, so that a killed server leaves whole lines.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::os::fd::AsFd;

use rustix::fs::{Mode, OFlags};

use crate::attr::Stat;
use crate::errno::{Errno, Res};
use crate::handle::Fd;
use crate::sync::Mutex;

const NAME: &str = "owners";
/// A file larger than this is not read: it cannot be ours.
const MAX_SIZE: u64 = 256 << 20;

/// The identity of a link on disk.
type LinkId = (u64, i64, u32);

fn id(stat: &Stat) -> LinkId {
    (stat.key.ino, stat.btime.sec, stat.btime.nsec)
}

/// The index; see the module.
#[derive(Debug)]
pub(crate) struct Sidecar {
    work: Fd,
    loaded: Mutex<Option<HashMap<LinkId, (u32, u32)>>>,
}

impl Sidecar {
    pub(crate) fn new(work: Fd) -> Self {
        Self { work, loaded: Mutex::new(None) }
    }

    fn load(&self) -> Res<HashMap<LinkId, (u32, u32)>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = match rustix::fs::openat(&self.work, NAME, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(HashMap::new()),
            Err(err) => return Err(err),
        };
        let mut text = String::new();
        let mut file = std::fs::File::from(fd).take(MAX_SIZE);
        file.read_to_string(&mut text).map_err(|_| Errno::IO)?;
        let mut owners = HashMap::new();
        for line in text.lines() {
            if let Some((id, owner)) = parse(line) {
                match owner {
                    Some(owner) => owners.insert(id, owner),
                    None => owners.remove(&id),
                };
            }
        }
        Ok(owners)
    }

    /// The recorded owner of a link of the upper.
    pub(crate) fn owner(&self, link: &Stat) -> Res<Option<(u32, u32)>> {
        let mut loaded = self.loaded.lock();
        if loaded.is_none() {
            *loaded = Some(self.load()?);
        }
        Ok(loaded.as_ref().and_then(|owners| owners.get(&id(link))).copied())
    }

    /// Records an owner, or takes the record back.
    pub(crate) fn set_owner(&self, link: &Stat, owner: Option<(u32, u32)>) -> Res<()> {
        let mut loaded = self.loaded.lock();
        if loaded.is_none() {
            *loaded = Some(self.load()?);
        }
        let Some(owners) = loaded.as_mut() else { return Err(Errno::IO) };
        if owners.get(&id(link)).copied() == owner {
            return Ok(());
        }
        let mut line = format!("{:x} {}.{}", link.key.ino, link.btime.sec, link.btime.nsec);
        let written = match owner {
            Some((uid, gid)) => writeln!(line, " {uid} {gid}"),
            None => writeln!(line, " - -"),
        };
        written.map_err(|_| Errno::IO)?;
        let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(self.work.as_fd(), NAME, flags, Mode::from_raw_mode(0o600))?;
        std::fs::File::from(fd)
            .write_all(line.as_bytes())
            .map_err(|err| Errno::from_io_error(&err).unwrap_or(Errno::IO))?;
        match owner {
            Some(owner) => owners.insert(id(link), owner),
            None => owners.remove(&id(link)),
        };
        Ok(())
    }
}

fn parse(line: &str) -> Option<(LinkId, Option<(u32, u32)>)> {
    let mut fields = line.split(' ');
    let ino = u64::from_str_radix(fields.next()?, 16).ok()?;
    let (sec, nsec) = fields.next()?.split_once('.')?;
    let id = (ino, sec.parse().ok()?, nsec.parse().ok()?);
    let (uid, gid) = (fields.next()?, fields.next()?);
    if uid == "-" {
        return Some((id, None));
    }
    Some((id, Some((uid.parse().ok()?, gid.parse().ok()?))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn torn_and_strange_lines_are_ignored() {
        assert_eq!(parse("ff 12.34 5 6"), Some(((255, 12, 34), Some((5, 6)))));
        assert_eq!(parse("ff 12.34 - -"), Some(((255, 12, 34), None)));
        for line in ["", "ff", "ff 12", "ff 12.3 5", "xyz 1.2 3 4", "ff 1.2 -1 4"] {
            assert_eq!(parse(line), None, "{line}");
        }
    }
}
