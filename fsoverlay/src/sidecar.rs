//! Owners of symbolic links, which cannot hold `user.*` xattrs. (Nor can real fifos and
//! sockets; ours are files with a record, but an upper may hold such of another maker.)
//!
//! A link whose owner is not the default one gets a line in the file `owners` of the
//! work directory: `INO BTIME UID GID`, the inode number and the time of birth of the
//! link in the upper, in hexadecimal and decimal. Later lines win; an owner of `-`
//! takes a line back. One that was copied up, whose number is not the disk's, gets a line
//! `INO BTIME = ORIGIN` ([`crate::numbers`]), and one of several names `INO BTIME + COUNT`
//! ([`crate::links`]). A number that the file system used again for another link is
//! told apart by the time of birth, and what was said of the one before is forgotten. The upper itself
//! stays as the kernel's overlayfs
//! wants it; without the file (the work directory was emptied, the upper copied
//! elsewhere) links belong to the default owner again.
//!
//! The file is read when the first link of the upper is looked up, and appended
//! to: one `write` per line, so that a killed server leaves whole lines. What is not a line (any bytes) says nothing.
//! Nor does a last one without its end: it may be torn, and look like another one. It is cut off before a line is
//! appended, so that it does not get its end from that.
//!
//! # How large it gets
//!
//! A link that is removed takes its lines back with a last one, `INO BTIME x x`. When most of the file says
//! nothing any more it is written anew beside itself, synced, and renamed into its place: at any moment one of
//! the two is there, whole. Whoever writes the line with which that begins waits for it, and so does whoever asks
//! for a link meanwhile; but between two such times, even if the first was in vain, there are at least a fortieth as
//! many changes as the second of them writes lines. So the file and the memory that it takes are bounded by how many links there
//! are; by [`MAX_SIZE`] and [`MAX_LINKS`] besides, beyond which a new link gets no record (`ENOSPC`), and an upper
//! with such a file is refused. Its blocks count for a [`Quota`].

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::fs::{AtFlags, Mode, OFlags};

use crate::attr::{Kind, Stat};
use crate::copyup::write_all;
use crate::errno::{Errno, Res, gives_way, missing_ok};
use crate::handle::Fd;
use crate::hooks::{Growth, Quota, Refusal, Usage};
use crate::layer::{stat_at, stat_fd};
use crate::numbers::Origin;
use crate::sync::Mutex;

const NAME: &str = "owners";
/// The file while it is written anew. No other temporary name has so small a number
/// ([`crate::upper::Upper::temp_name`]).
const NEW_NAME: &str = "#0";
/// A file larger than this is not used.
const MAX_SIZE: u64 = 128 << 20;
/// Nor is one that knows more links. Each takes up to 150 bytes of memory.
const MAX_LINKS: usize = 1 << 20;
/// A file of this size may know more than [`MAX_LINKS`]: no line of ours is shorter.
const MANY: u64 = MAX_LINKS as u64 * SHORTEST;
const SHORTEST: u64 = 10;
/// What is read of a smaller file takes no milliseconds.
const LONG_TO_READ: u64 = 64 << 10;
/// Longer than any line of ours.
const LONGEST: usize = 128;
/// How many lines that say nothing a file may have in any case.
const SLACK: u64 = 1024;
/// What files grow by.
const BLOCK: u64 = 4096;

/// The identity of a link on disk, beside its number: when it was born.
type Birth = (i64, u32);

/// Whether something in the upper cannot hold attributes.
pub(crate) fn is_needed(stat: &Stat) -> bool {
    !matches!(stat.kind(), Some(Kind::File | Kind::Dir))
}

/// What lines say of a link.
#[derive(Debug, Default, Clone, Copy)]
struct Said {
    birth: Birth,
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
    Gone,
}

impl Said {
    fn learn(&mut self, line: Line) {
        match line {
            Line::Owner(owner) => self.owner = owner,
            Line::Number(origin) => self.number = Some(origin),
            Line::Links(count) => self.links = Some(count),
            Line::Gone => *self = Self { birth: self.birth, ..Self::default() },
        }
    }

    /// How many lines say the same.
    fn lines(&self) -> u64 {
        u64::from(self.owner.is_some()) + u64::from(self.number.is_some()) + u64::from(self.links.is_some())
    }

    fn write(&self, ino: u64, out: &mut Vec<u8>) {
        let (sec, nsec) = self.birth;
        let mut line =
            |text: String| out.extend_from_slice(format!("{ino:x} {sec}.{nsec} {text}\n").as_bytes());
        if let Some((uid, gid)) = self.owner {
            line(format!("{uid} {gid}"));
        }
        if let Some(origin) = self.number {
            line(format!("= {origin}"));
        }
        if let Some(count) = self.links {
            line(format!("+ {count}"));
        }
    }
}

/// The file, open.
#[derive(Debug)]
struct File {
    fd: Fd,
    length: u64,
    /// The last line is not a whole one.
    torn: bool,
}

/// All that the file says, and the file, once there is one.
#[derive(Debug, Default)]
struct Index {
    said: HashMap<u64, Said>,
    /// How many lines are needed to say it.
    lines: u64,
    /// How many the file has; what is not lines counts as some.
    written: u64,
    /// It could not be written anew when so many of them said nothing.
    stuck_at: u64,
    /// Links of which the file still tells, since there was no room for the line that they are gone.
    unwritten: usize,
    file: Option<File>,
}

impl Index {
    fn get(&self, link: &Stat) -> Said {
        let birth = (link.btime.sec, link.btime.nsec);
        self.said.get(&link.key.ino).filter(|said| said.birth == birth).copied().unwrap_or_default()
    }

    fn learn(&mut self, ino: u64, birth: Birth, line: Line) {
        let said = self.said.entry(ino).or_default();
        self.lines -= said.lines();
        if said.birth != birth {
            *said = Said { birth, ..Said::default() };
        }
        said.learn(line);
        let lines = said.lines();
        self.lines += lines;
        if lines == 0 {
            self.said.remove(&ino);
            // What many links took is not kept for few.
            if self.said.capacity() > 1024 && self.said.len() < self.said.capacity() / 8 {
                self.said.shrink_to(self.said.len() * 2);
            }
        }
    }

    /// How many lines of the file say nothing.
    fn waste(&self) -> u64 {
        self.written.saturating_sub(self.lines)
    }
}

/// The index; see the module.
#[derive(Debug)]
pub(crate) struct Sidecar {
    work: Fd,
    loaded: Mutex<Option<Index>>,
    /// Lines were written since the last sync.
    unsynced: AtomicBool,
    /// Held while they are synced: nobody takes for done what another one has only begun.
    syncing: Mutex<()>,
    /// There is something to forget.
    any: AtomicBool,
    volatile: bool,
    /// [`MAX_SIZE`].
    most: u64,
    /// [`MAX_LINKS`].
    most_links: usize,
    /// Is told how much the file takes.
    pub(crate) quota: OnceLock<Arc<dyn Quota>>,
}

impl Sidecar {
    /// Refuses a file that cannot be ours (`EFBIG` if it is too large). It is read later, unless it takes reading
    /// to know.
    pub(crate) fn open(work: Fd, volatile: bool) -> Res<Self> {
        let found = missing_ok(stat_at(work.as_fd(), NAME.as_bytes()))?;
        let sidecar = Self {
            work,
            loaded: Mutex::new(None),
            unsynced: AtomicBool::new(false),
            syncing: Mutex::new(()),
            any: AtomicBool::new(found.is_some()),
            volatile,
            most: MAX_SIZE,
            most_links: MAX_LINKS,
            quota: OnceLock::new(),
        };
        match found {
            None => {}
            Some(stat) if stat.kind() != Some(Kind::File) => return Err(Errno::INVAL),
            Some(stat) if stat.size > MAX_SIZE => return Err(Errno::FBIG),
            Some(stat) if stat.size > MANY => *sidecar.loaded.lock() = Some(sidecar.load()?),
            Some(_) => {}
        }
        Ok(sidecar)
    }

    fn load(&self) -> Res<Index> {
        let mut index = Index::default();
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let Some(fd) = missing_ok(rustix::fs::openat(&self.work, NAME, flags, Mode::empty()))? else {
            return Ok(index);
        };
        index.written = read_lines(fd.as_fd(), |ino, birth, line| {
            index.learn(ino, birth, line);
            if index.said.len() > self.most_links { Err(Errno::FBIG) } else { Ok(()) }
        })?;
        Ok(index)
    }

    /// Whether the file has not been read yet, and is so large that this takes some milliseconds.
    pub(crate) fn is_long_to_read(&self) -> bool {
        let read = self.loaded.try_lock().is_none_or(|loaded| loaded.is_some());
        !read && stat_at(self.work.as_fd(), NAME.as_bytes()).is_ok_and(|stat| stat.size > LONG_TO_READ)
    }

    /// Reads the file, if nobody has.
    pub(crate) fn read(&self) -> Res<()> {
        self.with(|_| Ok(()))
    }

    /// Does something with the index, which is read first if it is not known.
    fn with<T>(&self, f: impl FnOnce(&mut Index) -> Res<T>) -> Res<T> {
        let mut loaded = self.loaded.lock();
        let index = match &mut *loaded {
            Some(index) => index,
            none => none.insert(self.load()?),
        };
        f(index)
    }

    fn said(&self, link: &Stat) -> Res<Said> {
        if !self.any.load(Ordering::Acquire) {
            return Ok(Said::default());
        }
        self.with(|index| Ok(index.get(link)))
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
        let _nobody_else = self.syncing.lock();
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

    /// The link is gone. What fails leaves a line that says nothing to anybody.
    pub(crate) fn forget(&self, link: &Stat) {
        if !is_needed(link) || !self.any.load(Ordering::Acquire) {
            return;
        }
        let forgotten = self.with(|index| {
            if index.get(link).lines() == 0 {
                return Ok(());
            }
            let done = self.append(index, link, "x x");
            if done.is_err() {
                // It is not written anew at least; until then the file tells of it.
                index.learn(link.key.ino, (link.btime.sec, link.btime.nsec), Line::Gone);
                index.unwritten += 1;
            }
            self.tidy(index);
            done
        });
        if let Err(err) = forgotten {
            tracing::debug!(?err, "a line about a link that is gone stays");
        }
    }

    /// Whether nothing was ever said of a link.
    pub(crate) fn is_empty(&self) -> bool {
        !self.any.load(Ordering::Acquire)
    }

    /// Appends a line about a link.
    fn add(&self, link: &Stat, text: &str) -> Res<()> {
        self.any.store(true, Ordering::Release);
        self.with(|index| {
            let known = index.said.len() + index.unwritten;
            if known >= self.most_links && !index.said.contains_key(&link.key.ino) {
                return Err(Errno::NOSPC);
            }
            self.append(index, link, text)
        })
    }

    fn append(&self, index: &mut Index, link: &Stat, text: &str) -> Res<()> {
        let birth = (link.btime.sec, link.btime.nsec);
        let mut line = format!("{:x} {}.{} {text}\n", link.key.ino, birth.0, birth.1);
        if index.file.is_none() {
            index.file = Some(self.open_file()?);
        }
        if index.file.as_ref().is_some_and(|file| file.length + line.len() as u64 >= self.most) {
            // No line would be refused for what only those who give way have left.
            self.tidy_beyond(index, 1);
        }
        let Some(file) = &mut index.file else { return Err(Errno::IO) };
        if file.torn {
            line.insert(0, '\n');
        }
        let length = file.length + line.len() as u64;
        if length > self.most {
            return Err(Errno::NOSPC);
        }
        let frees = text == "x x";
        let room = self.reserve(file, length, frees)?;
        let written = write_all(file.fd.as_fd(), line.as_bytes(), file.length);
        // Afterwards: who syncs takes it back before what was written until then goes to the disk.
        self.unsynced.store(true, Ordering::Release);
        if let Err(err) = written {
            // What came of it is written over, or cut off.
            file.torn = rustix::fs::ftruncate(&file.fd, file.length).is_err();
            return Err(err);
        }
        (file.length, file.torn) = (length, false);
        index.written += 1;
        room.used();
        if let Some((ino, birth, line)) = parse(line.trim().as_bytes()) {
            index.learn(ino, birth, line);
        }
        self.tidy(index);
        Ok(())
    }

    fn open_file(&self) -> Res<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.work, NAME, flags, Mode::from_raw_mode(0o600))?;
        let length = stat_fd(fd.as_fd())?.size;
        // The end of the one before, and as much as a line may have.
        let mut last = [0; LONGEST + 1];
        let at = length.saturating_sub(last.len() as u64);
        let mut read = 0;
        while at + (read as u64) < length {
            match rustix::io::pread(&fd, &mut last[read..], at + read as u64) {
                Ok(0) => break,
                Ok(more) => read += more,
                Err(Errno::INTR) => {}
                Err(err) => return Err(err),
            }
        }
        let whole = match last[..read].iter().rposition(|&b| b == b'\n') {
            Some(end) => at + end as u64 + 1,
            None if at == 0 => 0,
            // Too long for a line, which it does not become by an end.
            None => return Ok(File { fd: Arc::new(fd), length, torn: true }),
        };
        if whole < length {
            rustix::fs::ftruncate(&fd, whole)?;
            self.settle(length, whole);
        }
        Ok(File { fd: Arc::new(fd), length: whole, torn: false })
    }

    /// Writes the file anew if most of it says nothing any more.
    fn tidy(&self, index: &mut Index) {
        // It is synced, which takes long: who gives way leaves it to the next one, unless that is very long in coming.
        self.tidy_beyond(index, if gives_way() { 8 } else { 1 });
    }

    /// The same if so many times more of it says nothing than it may have anyway.
    fn tidy_beyond(&self, index: &mut Index, times: u64) {
        let Some(file) = &index.file else { return };
        let (waste, before) = (index.waste(), file.length);
        // Where there is hardly room for more, less of it is worth the while.
        let allowed = SLACK + if before > self.most / 8 * 7 { index.lines / 8 } else { index.lines };
        if waste <= times * allowed || waste <= index.stuck_at {
            return;
        }
        match self.write_anew(&index.said) {
            Ok(new) => {
                self.settle(before, new.length);
                (index.file, index.written, index.stuck_at) = (Some(new), index.lines, 0);
                index.unwritten = 0;
            }
            Err(err) => {
                tracing::debug!(?err, "the owners of links cannot be written anew");
                let _ = rustix::fs::unlinkat(&self.work, NEW_NAME, AtFlags::empty());
                // What was written in vain is as much as if it had not been.
                index.stuck_at = waste + allowed;
            }
        }
    }

    /// Whoever loses power finds the old file or the new one, with all that was synced.
    fn write_anew(&self, said: &HashMap<u64, Said>) -> Res<File> {
        missing_ok(rustix::fs::unlinkat(&self.work, NEW_NAME, AtFlags::empty()))?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd: OwnedFd = rustix::fs::openat(&self.work, NEW_NAME, flags, Mode::from_raw_mode(0o600))?;
        let (mut text, mut length) = (Vec::new(), 0);
        for (ino, said) in said {
            said.write(*ino, &mut text);
            if text.len() >= 1 << 20 {
                write_all(fd.as_fd(), &text, length)?;
                length += text.len() as u64;
                text.clear();
            }
        }
        write_all(fd.as_fd(), &text, length)?;
        length += text.len() as u64;
        if !self.volatile {
            rustix::fs::fsync(&fd)?;
        }
        rustix::fs::renameat(&self.work, NEW_NAME, &self.work, NAME)?;
        Ok(File { fd: Arc::new(fd), length, torn: false })
    }

    /// The quota learns of another length for which nothing was reserved.
    fn settle(&self, before: u64, length: u64) {
        if let Some(quota) = self.quota.get() {
            let bytes = signed(blocks_to(length)) - signed(blocks_to(before));
            quota.settle(Usage::default(), Growth { bytes, objects: 0 });
        }
    }

    fn reserve(&self, file: &File, length: u64, frees: bool) -> Res<Room<'_>> {
        let bytes = blocks_to(length) - blocks_to(file.length);
        let Some(quota) = self.quota.get().filter(|_| bytes > 0) else { return Ok(Room { quota: None }) };
        // Nobody is kept from removing links.
        let most = Usage { bytes: if frees { 0 } else { bytes }, objects: 0 };
        if !frees {
            quota.reserve(most).map_err(|refusal| match refusal {
                Refusal::NoSpace => Errno::NOSPC,
                Refusal::OverQuota => Errno::DQUOT,
            })?;
        }
        Ok(Room { quota: Some((&**quota, most, bytes)) })
    }
}

/// Room for a line, given back unless it is used: the quota, what is reserved, and what is needed.
struct Room<'a> {
    quota: Option<(&'a dyn Quota, Usage, u64)>,
}

impl Room<'_> {
    fn used(mut self) {
        if let Some((quota, most, bytes)) = self.quota.take() {
            quota.settle(most, Growth { bytes: signed(bytes), objects: 0 });
        }
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        if let Some((quota, most, _)) = self.quota {
            quota.settle(most, Growth::default());
        }
    }
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn blocks_to(length: u64) -> u64 {
    length.next_multiple_of(BLOCK)
}

/// Calls `f` for each line, whatever else is in the file, and gives how many there are; it takes memory for one.
/// What is too long for a line counts as several.
fn read_lines(fd: BorrowedFd<'_>, mut f: impl FnMut(u64, Birth, Line) -> Res<()>) -> Res<u64> {
    let mut count = 0;
    let mut buf = vec![0; 64 << 10];
    let (mut kept, mut at) = (0, 0);
    // The rest of a line that is longer than any of ours.
    let mut skipping = false;
    loop {
        let read = match rustix::io::pread(fd, &mut buf[kept..], at) {
            Ok(0) => return Ok(count + at / LONGEST as u64),
            Ok(read) => read,
            Err(Errno::INTR) => continue,
            Err(err) => return Err(err),
        };
        at += read as u64;
        if at > MAX_SIZE {
            return Err(Errno::FBIG);
        }
        let end = kept + read;
        let mut start = 0;
        while let Some(length) = buf[start..end].iter().position(|&b| b == b'\n') {
            if let (false, Some((ino, birth, line))) = (skipping, parse(&buf[start..start + length])) {
                f(ino, birth, line)?;
            }
            skipping = false;
            count += 1;
            start += length + 1;
        }
        if end - start > LONGEST {
            (skipping, start) = (true, end);
        }
        buf.copy_within(start..end, 0);
        kept = end - start;
    }
}

fn parse(line: &[u8]) -> Option<(u64, Birth, Line)> {
    if line.len() > LONGEST {
        return None;
    }
    let mut fields = std::str::from_utf8(line).ok()?.split(' ');
    let ino = u64::from_str_radix(fields.next()?, 16).ok()?;
    let (sec, nsec) = fields.next()?.split_once('.')?;
    let birth = (sec.parse().ok()?, nsec.parse().ok()?);
    let (uid, gid) = (fields.next()?, fields.next()?);
    let line = match uid {
        "-" => Line::Owner(None),
        "=" => Line::Number(Origin::parse(gid.as_bytes())?),
        "+" => Line::Links(gid.parse().ok()?),
        "x" => Line::Gone,
        _ => Line::Owner(Some((uid.parse().ok()?, gid.parse().ok()?))),
    };
    Some((ino, birth, line))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attr::{Key, Time};
    use crate::engine::tests::Scratch;
    use crate::hooks::Hooks;
    use crate::setattr::SetAttr;

    /// A work directory of its own, removed with it.
    struct Work(std::path::PathBuf);

    impl Work {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("fsoverlay-sidecar-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&dir).expect("a temporary directory");
            Self(dir)
        }

        fn file(&self) -> std::path::PathBuf {
            self.0.join(NAME)
        }

        fn open(&self) -> Res<Sidecar> {
            Sidecar::open(Arc::new(crate::layer::open_root(&self.0)?), true)
        }

        fn length(&self) -> u64 {
            std::fs::metadata(self.file()).expect("the file").len()
        }
    }

    impl Drop for Work {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn link(ino: u64, born: i64) -> Stat {
        let key = Key { dev: 1, ino };
        Stat { key, mode: 0o120_777, btime: Time { sec: born, nsec: 7 }, ..Stat::default() }
    }

    /// Counts bytes, and lets in so many.
    #[derive(Debug)]
    struct Limit {
        used: Mutex<i64>,
        most: i64,
    }

    impl Quota for Limit {
        fn reserve(&self, most: Usage) -> Result<(), Refusal> {
            let mut used = self.used.lock();
            if *used + signed(most.bytes) > self.most {
                return Err(Refusal::OverQuota);
            }
            *used += signed(most.bytes);
            Ok(())
        }

        fn settle(&self, reserved: Usage, growth: Growth) {
            *self.used.lock() += growth.bytes - signed(reserved.bytes);
        }
    }

    #[test]
    fn torn_and_strange_lines_are_ignored() {
        assert_eq!(parse(b"ff 12.34 5 6"), Some((255, (12, 34), Line::Owner(Some((5, 6))))));
        assert_eq!(parse(b"ff 12.34 - -"), Some((255, (12, 34), Line::Owner(None))));
        assert_eq!(parse(b"ff 12.34 x x"), Some((255, (12, 34), Line::Gone)));
        let origin = Origin::parse(b"no=2000000000000005").expect("an origin");
        assert_eq!(parse(b"ff 12.34 = no=2000000000000005"), Some((255, (12, 34), Line::Number(origin))));
        for line in ["", "ff", "ff 12", "ff 12.3 5", "xyz 1.2 3 4", "ff 1.2 -1 4", "ff 1.2 = 4"] {
            assert_eq!(parse(line.as_bytes()), None, "{line}");
        }
    }

    #[test]
    fn any_bytes_leave_the_lines_between_them_readable() {
        let work = Work::new("bytes");
        let mut text = b"1 1.7 10 20\n\xff\xfe\0 3 4\n".to_vec();
        text.extend_from_slice(&[b'a'; 200_000]);
        text.extend_from_slice(b"\n2 1.7 11 21\n3 1.7 12 22 \xc3\n");
        text.extend_from_slice(&[0; 70_000]);
        text.extend_from_slice(b"\n4 1.7 13 23\n5 1.7 1");
        std::fs::write(work.file(), text).expect("written");
        let sidecar = work.open().expect("opened");
        let owner = |ino| sidecar.owner(&link(ino, 1));
        assert_eq!(owner(1), Ok(Some((10, 20))));
        assert_eq!(owner(2), Ok(Some((11, 21))));
        assert_eq!(owner(4), Ok(Some((13, 23))));
        assert_eq!(owner(5), Ok(None));
        // The last line was torn: what comes next is not glued to it.
        assert_eq!(sidecar.set_owner(&link(6, 1), Some((14, 24))), Ok(()));
        let again = work.open().expect("opened");
        assert_eq!(again.owner(&link(6, 1)), Ok(Some((14, 24))));
    }

    #[test]
    fn a_torn_line_never_becomes_another_one() {
        let work = Work::new("torn");
        for (text, other) in [("2 1.7 5 6\n1 1.7 1000 10", Some((5, 6))), ("1 1.7 1000 10", None)] {
            std::fs::write(work.file(), text).expect("written");
            // Each as it is opened, then with one more line.
            for more in 3..6 {
                let sidecar = work.open().expect("opened");
                let owners = [1, 2].map(|ino| sidecar.owner(&link(ino, 1)));
                assert_eq!(owners, [Ok(None), Ok(other)], "{text:?}, {more}");
                assert_eq!(sidecar.set_owner(&link(more, 1), Some((7, 8))), Ok(()));
            }
            let again = work.open().expect("opened");
            let added = [3, 4, 5].map(|ino| again.owner(&link(ino, 1)));
            assert_eq!(added, [Ok(Some((7, 8))); 3]);
        }
    }

    #[test]
    fn a_file_beyond_all_limits_is_refused() {
        let work = Work::new("large");
        let file = std::fs::File::create(work.file()).expect("made");
        file.set_len(MAX_SIZE + 1).expect("a sparse file");
        assert_eq!(work.open().map(drop), Err(Errno::FBIG));
        std::fs::remove_file(work.file()).expect("removed");
        rustix::fs::mkdirat(rustix::fs::CWD, work.file(), Mode::RWXU).expect("made");
        assert_eq!(work.open().map(drop), Err(Errno::INVAL));
        std::fs::remove_dir(work.file()).expect("removed");
        assert!(work.open().is_ok());
    }

    #[test]
    fn who_gives_way_writes_it_anew_late() {
        let most_lines = |gives_way: bool| {
            let thread = std::thread::spawn(move || {
                if gives_way {
                    crate::errno::set_gives_way();
                }
                let work = Work::new(if gives_way { "late" } else { "soon" });
                let sidecar = work.open().expect("opened");
                let most = (0..20_000).map(|i| {
                    assert_eq!(sidecar.set_owner(&link(1, 1), Some((i, i))), Ok(()));
                    sidecar.with(|index| Ok(index.written)).expect("read")
                });
                most.max()
            });
            thread.join().expect("no panic")
        };
        // One line says all that is known.
        assert_eq!([false, true].map(most_lines), [1, 8].map(|more| Some(more * (SLACK + 1) + 1)));
    }

    #[test]
    fn the_size_is_that_of_the_links_there_are() {
        let work = Work::new("size");
        let sidecar = work.open().expect("opened");
        let limit = Arc::new(Limit { used: Mutex::default(), most: 1 << 20 });
        let _ = sidecar.quota.set(limit.clone());
        for living in 1..=100 {
            assert_eq!(sidecar.set_owner(&link(living, 1), Some((5, 6))), Ok(()));
            assert_eq!(sidecar.set_number(&link(living, 1), "no=2000000000000005"), Ok(()));
            assert_eq!(sidecar.set_links(&link(living, 1), 3), Ok(()));
        }
        let most = (SLACK + 301 * 2 + 1) * 64;
        for i in 0..20_000_u32 {
            // One changes, and others come and go, with numbers that are new and such as were used before.
            assert_eq!(sidecar.set_owner(&link(1, 1), Some((i, i))), Ok(()));
            let passing = link(1000 + u64::from(i), 1);
            assert_eq!(sidecar.set_owner(&passing, Some((1, 1))), Ok(()));
            sidecar.forget(&passing);
            assert_eq!(sidecar.owner(&passing), Ok(None));
            assert_eq!(sidecar.set_owner(&link(500, i.into()), Some((2, 2))), Ok(()));
            assert!(work.length() < most, "{} bytes", work.length());
        }
        let known = sidecar.with(|index| Ok((index.said.len(), index.said.capacity(), index.lines)));
        assert!(
            known.is_ok_and(|(links, room, lines)| links == 101 && room < 2048 && lines == 301),
            "{known:?}"
        );
        assert_eq!(*limit.used.lock(), signed(blocks_to(work.length())));
        let again = work.open().expect("opened");
        for sidecar in [sidecar, again] {
            assert_eq!(sidecar.owner(&link(1, 1)), Ok(Some((19_999, 19_999))));
            assert_eq!(sidecar.owner(&link(100, 1)), Ok(Some((5, 6))));
            assert_eq!(sidecar.number(&link(100, 1)), Ok(Origin::parse(b"no=2000000000000005")));
            assert_eq!(sidecar.links(&link(100, 1)), Ok(Some(3)));
            assert_eq!(sidecar.owner(&link(500, 5)), Ok(None));
        }
    }

    #[test]
    fn a_quota_that_is_full_refuses_records_and_no_removal() {
        let work = Work::new("full");
        let sidecar = work.open().expect("opened");
        let _ = sidecar.quota.set(Arc::new(Limit { used: Mutex::default(), most: 4096 }));
        let mut made = 0;
        let refused = loop {
            match sidecar.set_owner(&link(made, 1), Some((5, 6))) {
                Ok(()) => made += 1,
                Err(err) => break err,
            }
        };
        assert_eq!((refused, work.length() <= 4096), (Errno::DQUOT, true));
        assert_eq!(sidecar.owner(&link(made, 1)), Ok(None));
        for ino in 0..made {
            sidecar.forget(&link(ino, 1));
            assert_eq!(work.open().and_then(|read| read.owner(&link(ino, 1))), Ok(None));
        }
    }

    #[test]
    fn what_goes_makes_room_where_there_is_hardly_any() {
        let work = Work::new("room");
        let mut sidecar = work.open().expect("opened");
        sidecar.most = 200_000;
        let made = |sidecar: &Sidecar, from| {
            (from..).take_while(|&ino| sidecar.set_owner(&link(ino, 1), Some((5, 6))).is_ok()).count() as u64
        };
        let first = made(&sidecar, 0);
        assert!(first > 10_000 && work.length() <= 200_000);
        // There is no room for what says so, either; some thousand give their room back nevertheless.
        (0..first / 2).for_each(|ino| sidecar.forget(&link(ino, 1)));
        let second = made(&sidecar, first);
        assert!(second > first / 3, "{first}, then {second}");
        let again = work.open().expect("opened");
        assert_eq!(again.owner(&link(first / 2, 1)), Ok(Some((5, 6))));
        assert_eq!(again.owner(&link(first + second - 1, 1)), Ok(Some((5, 6))));
        assert_eq!(again.owner(&link(0, 1)), Ok(None));
    }

    /// Counts how many lines are written anew, and how often.
    #[derive(Default)]
    struct Rewritten {
        lines: u64,
        times: u32,
        last: Option<(u64, u64)>,
    }

    impl Rewritten {
        /// To be called after each change. What was in vain counts as well.
        fn look(&mut self, sidecar: &Sidecar) {
            let now = sidecar.with(|index| {
                let file = stat_fd(index.file.as_ref().expect("open").fd.as_fd())?;
                Ok(((file.key.ino, index.stuck_at), index.lines))
            });
            let (now, lines) = now.expect("read");
            if self.last.replace(now).is_some_and(|last| last != now) {
                (self.lines, self.times) = (self.lines + lines, self.times + 1);
            }
        }
    }

    #[test]
    fn however_little_room_is_left_few_lines_are_written_anew_for_a_change() {
        let work = Work::new("little-room");
        let mut sidecar = work.open().expect("opened");
        sidecar.most = 1 << 20;
        let make = |sidecar: &Sidecar, ino| {
            let link = link(ino, 1);
            sidecar.set_owner(&link, Some((5, 6))).is_ok()
                && sidecar.set_number(&link, "no=2000000000000005").is_ok()
                && sidecar.set_links(&link, 3).is_ok()
        };
        let made = (1..).take_while(|&ino| make(&sidecar, ino)).count() as u64;
        // There is just no more room than that for some changes.
        let (room, mut rewritten, mut changes) = (SLACK, Rewritten::default(), 0);
        (1..=room).for_each(|ino| sidecar.forget(&link(ino, 1)));
        for ino in room + 1..=made {
            // What says most about a link that goes, and what says least about one that comes.
            sidecar.forget(&link(ino, 1));
            rewritten.look(&sidecar);
            let _ = sidecar.set_owner(&link(made + ino, 1), Some((5, 6)));
            rewritten.look(&sidecar);
            changes += 2;
            assert!(work.length() <= 1 << 20);
        }
        assert!(rewritten.times > 1, "there is something to count");
        assert!(rewritten.lines < changes * 40, "{} lines for {changes} changes", rewritten.lines);
    }

    #[test]
    fn what_cannot_be_written_anew_is_not_tried_all_the_time() {
        let work = Work::new("in-vain");
        let sidecar = work.open().expect("opened");
        let links = 20_000;
        (1..=links).for_each(|ino| assert_eq!(sidecar.set_owner(&link(ino, 1), Some((5, 6))), Ok(())));
        // It cannot be made where something stands that is not a file.
        let new = work.0.join(NEW_NAME);
        rustix::fs::mkdirat(rustix::fs::CWD, &new, Mode::RWXU).expect("made");
        let mut rewritten = Rewritten::default();
        let change = |i: u32| assert_eq!(sidecar.set_owner(&link(1, 1), Some((i, i))), Ok(()));
        for i in 0..80_000 {
            change(i);
            rewritten.look(&sidecar);
        }
        assert_eq!(rewritten.times, 3, "each time as many lines later as there are links");
        let before = work.length();
        std::fs::remove_dir(&new).expect("removed");
        (80_000..105_000).for_each(change);
        assert!(work.length() < before / 2, "{before}, then {}", work.length());
    }

    #[test]
    fn nothing_is_refused_because_who_gives_way_writes_it_anew_late() {
        let thread = std::thread::spawn(|| {
            let work = Work::new("late-room");
            let mut sidecar = work.open().expect("opened");
            sidecar.most = 200_000;
            let mut links = 0;
            while links == 0 || work.length() < 120_000 {
                links += 1;
                assert_eq!(sidecar.set_owner(&link(links, 1), Some((5, 6))), Ok(()));
            }
            crate::errno::set_gives_way();
            for i in 0..20_000 {
                assert_eq!(sidecar.set_owner(&link(1, 1), Some((i, i))), Ok(()), "change {i}");
                assert!(work.length() <= 200_000);
            }
        });
        thread.join().expect("no panic");
    }

    #[test]
    fn removals_that_are_not_written_count_for_the_limit() {
        let work = Work::new("unwritten");
        let open = || {
            let mut sidecar = work.open().expect("opened");
            sidecar.most_links = 10;
            sidecar
        };
        let mut sidecar = open();
        let make = |sidecar: &Sidecar, ino| sidecar.set_owner(&link(ino, 1), Some((5, 6)));
        (0..10).for_each(|ino| assert_eq!(make(&sidecar, ino), Ok(())));
        sidecar.forget(&link(0, 1));
        assert_eq!((make(&sidecar, 10), make(&sidecar, 11)), (Ok(()), Err(Errno::NOSPC)));
        // No room for what says that these are gone.
        sidecar.most = work.length();
        (1..6).for_each(|ino| sidecar.forget(&link(ino, 1)));
        sidecar.most = MAX_SIZE;
        let refused: Vec<_> = (20..25).map(|ino| make(&sidecar, ino)).collect();
        // However many were let in, the next run takes the file.
        assert_eq!(open().owner(&link(6, 1)), Ok(Some((5, 6))));
        assert_eq!(refused, [Err(Errno::NOSPC); 5]);
    }

    #[test]
    fn nobody_takes_for_synced_what_another_one_has_begun_to_sync() {
        let work = Work::new("sync");
        let sidecar = work.open().expect("opened");
        assert_eq!(sidecar.set_owner(&link(1, 1), Some((5, 6))), Ok(()));
        // One that nobody can sync, and that can be opened only when somebody opens it for writing.
        std::fs::remove_file(work.file()).expect("removed");
        rustix::fs::mkfifoat(rustix::fs::CWD, work.file(), Mode::RWXU).expect("a fifo");
        let asks = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let first = scope.spawn(|| sidecar.sync());
            while sidecar.unsynced.load(Ordering::Acquire) && !first.is_finished() {
                std::thread::yield_now();
            }
            let second = scope.spawn(|| {
                asks.store(true, Ordering::Release);
                sidecar.sync()
            });
            // So many that it has its answer, if it does not wait for the first.
            for _ in 0..10_000 {
                std::thread::yield_now();
            }
            while !asks.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            // (Opened for both, it waits for nobody.)
            let writer = std::fs::File::options().read(true).write(true).open(work.file()).expect("opened");
            assert_eq!(first.join().expect("no panic"), Err(Errno::INVAL));
            assert_eq!(second.join().expect("no panic"), Err(Errno::INVAL));
            assert_eq!(sidecar.sync(), Err(Errno::INVAL));
            drop(writer);
        });
    }

    #[test]
    fn junk_goes_when_something_is_written() {
        let work = Work::new("junk");
        std::fs::write(work.file(), [b"1 1.7 10 20\n".to_vec(), vec![b'x'; 1 << 20]].concat())
            .expect("written");
        let sidecar = work.open().expect("opened");
        assert_eq!(sidecar.set_owner(&link(2, 1), Some((5, 6))), Ok(()));
        assert!(work.length() < 100);
        assert_eq!(work.open().and_then(|again| again.owner(&link(1, 1))), Ok(Some((10, 20))));
    }

    #[test]
    fn what_is_removed_is_forgotten() {
        let mut scratch = Scratch::new("forgotten-links");
        std::os::unix::fs::symlink("x", scratch.dir.join("lower/below")).expect("linked");
        let limit = Arc::new(Limit { used: Mutex::default(), most: 1 << 30 });
        scratch.engine.set_hooks(Hooks { quota: Some(limit.clone()), ..Hooks::default() });
        let engine = &scratch.engine;
        let root = engine.root();
        let known = || {
            let upper = engine.upper().expect("an upper");
            upper.sidecar.with(|index| Ok(index.said.len())).expect("read")
        };
        let owner = SetAttr { uid: Some(7), gid: Some(8), ..SetAttr::default() };
        for name in [&b"made"[..], b"other", b"linked"] {
            let made = scratch.make(name, Kind::Symlink);
            engine.set_attr(&made, owner).expect("changed");
        }
        let below = engine.lookup(root, b"below").expect("found");
        engine.set_attr(&below, owner).expect("changed");
        assert_eq!((known(), *limit.used.lock()), (4, 4096));
        // One name of two, and a file that is replaced.
        let linked = engine.lookup(root, b"linked").expect("found");
        assert_eq!(engine.link(&linked, root, b"second"), Ok(()));
        assert_eq!((engine.unlink(root, b"linked"), known()), (Ok(()), 4));
        assert_eq!(engine.rename(root, b"second", root, b"other", crate::rename::How::Replace), Ok(()));
        assert_eq!(known(), 3);
        for name in [&b"made"[..], b"below", b"other"] {
            assert_eq!(engine.unlink(root, name), Ok(()));
        }
        assert_eq!(known(), 0);
    }
}
