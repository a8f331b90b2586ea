//! Owners of symbolic links, which cannot hold `user.*` xattrs. (Nor can real fifos and
//! sockets; ours are files with a record, but an upper may hold such of another maker.)
//!
//! A link whose owner is not the default one gets a line in the file `owners` of the
//! work directory: `INO BTIME UID GID`, the inode number and the time of birth of the
//! link in the upper, in hexadecimal and decimal. Later lines win; an owner of `-`
//! takes a line back. One that was copied up, whose number is not the disk's, gets a line
//! `INO BTIME = ORIGIN` ([`crate::numbers`]), and one of several names `INO BTIME + COUNT`
//! ([`crate::links`]). A number that the file system used again for another link is
//! told apart by the time of birth. The upper itself stays as the kernel's overlayfs
//! wants it; without the file (the work directory was emptied, the upper copied
//! elsewhere) links belong to the default owner again.
//!
//! The file is read when the first link of the upper is looked up, and only appended
//! to while mounted: one `write` per line, so that a killed server leaves whole lines.

use std::collections::HashMap;
use std::io::{Read, Write as _};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Mode, OFlags};

use crate::attr::{Kind, Stat};
use crate::errno::{Errno, Res};
use crate::handle::Fd;
use crate::numbers::Origin;
use crate::sync::Mutex;

const NAME: &str = "owners";
/// A file larger than this is not read: it cannot be ours.
const MAX_SIZE: u64 = 256 << 20;

/// The identity of a link on disk.
type LinkId = (u64, i64, u32);

fn id(stat: &Stat) -> LinkId {
    (stat.key.ino, stat.btime.sec, stat.btime.nsec)
}

/// Whether something in the upper cannot hold attributes.
pub(crate) fn is_needed(stat: &Stat) -> bool {
    !matches!(stat.kind(), Some(Kind::File | Kind::Dir))
}

/// What lines say of a link.
#[derive(Debug, Default, Clone, Copy)]
struct Said {
    owner: Option<(u32, u32)>,
    number: Option<Origin>,
    links: Option<u32>,
}

/// What one line says.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    Owner(Option<(u32, u32)>),
    Number(Origin),
    Links(u32),
}

impl Said {
    fn learn(&mut self, line: Line) {
        match line {
            Line::Owner(owner) => self.owner = owner,
            Line::Number(origin) => self.number = Some(origin),
            Line::Links(count) => self.links = Some(count),
        }
    }
}

/// The index; see the module.
#[derive(Debug)]
pub(crate) struct Sidecar {
    work: Fd,
    loaded: Mutex<Option<HashMap<LinkId, Said>>>,
    /// Lines were written since the last sync.
    unsynced: AtomicBool,
}

impl Sidecar {
    pub(crate) fn new(work: Fd) -> Self {
        Self { work, loaded: Mutex::new(None), unsynced: AtomicBool::new(false) }
    }

    fn load(&self) -> Res<HashMap<LinkId, Said>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = match rustix::fs::openat(&self.work, NAME, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(HashMap::new()),
            Err(err) => return Err(err),
        };
        let mut text = String::new();
        let mut file = std::fs::File::from(fd).take(MAX_SIZE);
        file.read_to_string(&mut text).map_err(|_| Errno::IO)?;
        let mut said: HashMap<LinkId, Said> = HashMap::new();
        for line in text.lines() {
            if let Some((id, line)) = parse(line) {
                said.entry(id).or_default().learn(line);
            }
        }
        Ok(said)
    }

    fn said(&self, link: &Stat) -> Res<Said> {
        let mut loaded = self.loaded.lock();
        if loaded.is_none() {
            *loaded = Some(self.load()?);
        }
        Ok(loaded.as_ref().and_then(|said| said.get(&id(link))).copied().unwrap_or_default())
    }

    /// The recorded owner of a link of the upper.
    pub(crate) fn owner(&self, link: &Stat) -> Res<Option<(u32, u32)>> {
        Ok(self.said(link)?.owner)
    }

    /// The recorded number of a link of the upper.
    pub(crate) fn number(&self, link: &Stat) -> Res<Option<Origin>> {
        Ok(self.said(link)?.number)
    }

    /// Brings what was written to the disk.
    pub(crate) fn sync(&self) -> Res<()> {
        if !self.unsynced.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let synced = rustix::fs::openat(&self.work, NAME, flags, Mode::empty()).and_then(rustix::fs::fsync);
        synced.inspect_err(|_| self.unsynced.store(true, Ordering::Release))
    }

    /// Records an owner, or takes the record back.
    pub(crate) fn set_owner(&self, link: &Stat, owner: Option<(u32, u32)>) -> Res<()> {
        if self.said(link)?.owner == owner {
            return Ok(());
        }
        let text = match owner {
            Some((uid, gid)) => format!("{uid} {gid}"),
            None => "- -".to_owned(),
        };
        self.add(link, &text)
    }

    /// Records a number as [`crate::numbers::InodeNumbers::describe`] writes it.
    pub(crate) fn set_number(&self, link: &Stat, origin: &str) -> Res<()> {
        self.add(link, &format!("= {origin}"))
    }

    /// How many names in a layer are still to lead to a link.
    pub(crate) fn links(&self, link: &Stat) -> Res<Option<u32>> {
        Ok(self.said(link)?.links)
    }

    pub(crate) fn set_links(&self, link: &Stat, count: u32) -> Res<()> {
        self.add(link, &format!("+ {count}"))
    }

    /// Appends a line about a link.
    fn add(&self, link: &Stat, text: &str) -> Res<()> {
        let mut loaded = self.loaded.lock();
        if loaded.is_none() {
            *loaded = Some(self.load()?);
        }
        let Some(said) = loaded.as_mut() else { return Err(Errno::IO) };
        let line = format!("{:x} {}.{} {text}\n", link.key.ino, link.btime.sec, link.btime.nsec);
        let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(self.work.as_fd(), NAME, flags, Mode::from_raw_mode(0o600))?;
        self.unsynced.store(true, Ordering::Release);
        std::fs::File::from(fd)
            .write_all(line.as_bytes())
            .map_err(|err| Errno::from_io_error(&err).unwrap_or(Errno::IO))?;
        if let Some((id, line)) = parse(line.trim_end()) {
            said.entry(id).or_default().learn(line);
        }
        Ok(())
    }
}

fn parse(line: &str) -> Option<(LinkId, Line)> {
    let mut fields = line.split(' ');
    let ino = u64::from_str_radix(fields.next()?, 16).ok()?;
    let (sec, nsec) = fields.next()?.split_once('.')?;
    let id = (ino, sec.parse().ok()?, nsec.parse().ok()?);
    let (uid, gid) = (fields.next()?, fields.next()?);
    Some((
        id,
        match uid {
            "-" => Line::Owner(None),
            "=" => Line::Number(Origin::parse(gid.as_bytes())?),
            "+" => Line::Links(gid.parse().ok()?),
            _ => Line::Owner(Some((uid.parse().ok()?, gid.parse().ok()?))),
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn torn_and_strange_lines_are_ignored() {
        assert_eq!(parse("ff 12.34 5 6"), Some(((255, 12, 34), Line::Owner(Some((5, 6))))));
        assert_eq!(parse("ff 12.34 - -"), Some(((255, 12, 34), Line::Owner(None))));
        let origin = Origin::parse(b"no=2000000000000005").expect("an origin");
        assert_eq!(parse("ff 12.34 = no=2000000000000005"), Some(((255, 12, 34), Line::Number(origin))));
        for line in ["", "ff", "ff 12", "ff 12.3 5", "xyz 1.2 3 4", "ff 1.2 -1 4", "ff 1.2 = 4"] {
            assert_eq!(parse(line), None, "{line}");
        }
    }
}
