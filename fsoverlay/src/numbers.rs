//! Inode numbers: objects of several file systems numbered as those of one, each the same after a
//! remount, on any day.
//!
//! | number | of |
//! |---|---|
//! | below 2^61 | an object on disk: 17 bits say which file system, 44 bits are its number there |
//! | [`MIXED`] | the same where its number there has more bits (a FUSE file system below, say), mixed |
//! | [`GENERATED`] | what is in memory only: a path, mixed |
//! | [`CLASHED`] | an object whose own number is in use, a hidden directory, and an object at a further place |
//!
//! Device numbers change from boot to boot; so a file system is known by what statfs(2) calls `f_fsid`,
//! and by its device number only where it has none. The one of the upper (without one, of the lowest
//! layer) is 0 and keeps its numbers; the bits of others are mixed from that.
//!
//! A copied-up object goes on with the number that it had. It is written down with the object
//! ([`crate::xattr::ORIGIN`], [`crate::xattr::NUMBER`]; for links in [`crate::sidecar`]) as text in
//! hexadecimal: `fs=FILESYSTEM:INO` with `i` or `d` before the file system's id or device, or `no=NUMBER`.
//!
//! A directory of a layer may stand at several places, by a bind mount, or because one layer is within
//! another. Each is an object of its own, and so is each of the files in it that have a single name. One place,
//! known from the start, has the numbers of the disk; at the others a number depends on the path as well
//! ([`InodeNumbers::of_place`], [`crate::far::Below`]), downwards from the directory where the
//! repetition begins. Where that cannot be known from the start, the place that is met second gets such a number.
//!
//! Uniqueness does not rest on this alone: the inode table compares what a number stands for and takes
//! another one if it is in use.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{Mode, OFlags};

use crate::attr::Key;
use crate::layer::mix;
use crate::sync::RwLock;

/// Bits 61 and 62 say who made a number that is not simply (file system, number).
const MIXED: u64 = 1 << 62;
/// How many file systems have a prefix. An upper may name any number that does not exist; those beyond have
/// mixed numbers.
const MAX_FILE_SYSTEMS: usize = 1024;
const GENERATED: u64 = 1 << 61;
const CLASHED: u64 = 3 << 61;

/// The largest number of one file system that is kept as it is.
const PLAIN: u64 = 1 << 44;
/// How many prefixes there are.
const PREFIXES: u64 = GENERATED / PLAIN;

/// What tells one file system from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FsId {
    /// `f_fsid` of statfs(2).
    Id(u64),
    Device(u64),
}

impl FsId {
    fn parse(text: &str) -> Option<Self> {
        let hex = |digits| u64::from_str_radix(digits, 16).ok();
        match text.split_at_checked(1)? {
            ("i", digits) => Some(Self::Id(hex(digits)?)),
            ("d", digits) => Some(Self::Device(hex(digits)?)),
            _ => None,
        }
    }

    fn hash(self) -> u64 {
        match self {
            Self::Id(id) => mix(id),
            Self::Device(dev) => mix(!dev),
        }
    }
}

impl std::fmt::Display for FsId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Id(id) => write!(f, "i{id:x}"),
            Self::Device(dev) => write!(f, "d{dev:x}"),
        }
    }
}

/// What an object's number is made from, as it is written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    Object { fs: FsId, ino: u64 },
    Number(u64),
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Object { fs, ino } => write!(f, "fs={fs}:{ino:x}"),
            Self::Number(number) => write!(f, "no={number:x}"),
        }
    }
}

impl Origin {
    pub(crate) fn parse(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?;
        let hex = |digits| u64::from_str_radix(digits, 16).ok();
        if let Some(number) = text.strip_prefix("no=") {
            // Only such as nobody has who is on disk.
            return hex(number).filter(|n| (GENERATED..1 << 63).contains(n)).map(Self::Number);
        }
        let (fs, ino) = text.strip_prefix("fs=")?.split_once(':')?;
        Some(Self::Object { fs: FsId::parse(fs)?, ino: hex(ino).filter(|&ino| ino < PLAIN)? })
    }
}

/// One that is known.
#[derive(Debug)]
struct FileSystem {
    id: FsId,
    /// Its device number, if it was met.
    dev: Option<u64>,
    prefix: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct InodeNumbers {
    known: RwLock<Vec<FileSystem>>,
}

/// `f_fsid` of the file system that an object is on; the descriptor may be `O_PATH`.
pub(crate) fn fsid(fd: BorrowedFd<'_>) -> Option<u64> {
    rustix::fs::fstatvfs(fd).ok().map(|stat| stat.f_fsid).filter(|&id| id != 0)
}

impl InodeNumbers {
    /// Meets the file system of an object that may be on one that was not met yet.
    pub(crate) fn meet(&self, dev: u64, object: BorrowedFd<'_>) {
        self.meet_with(dev, || fsid(object));
    }

    /// The same for a name that is a mount point.
    pub(crate) fn meet_name(&self, dev: u64, dir: BorrowedFd<'_>, name: &[u8]) {
        self.meet_with(dev, || {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            fsid(rustix::fs::openat(dir, name, flags, Mode::empty()).ok()?.as_fd())
        });
    }

    /// The same where the id is known.
    pub(crate) fn meet_as(&self, dev: u64, id: Option<u64>) {
        self.meet_with(dev, || id);
    }

    fn meet_with(&self, dev: u64, id: impl FnOnce() -> Option<u64>) {
        let met = |known: &[FileSystem]| known.iter().any(|fs| fs.dev == Some(dev));
        if met(&self.known.read()) {
            return;
        }
        let id = id();
        let mut known = self.known.write();
        if met(&known) {
            return;
        }
        // Copies of one file system have one id.
        let taken = |id| known.iter().any(|fs| fs.id == id && fs.dev.is_some());
        let id = id.map(FsId::Id).filter(|&id| !taken(id)).unwrap_or(FsId::Device(dev));
        find(&mut known, id).dev = Some(dev);
    }

    /// The number of an object on disk.
    pub(crate) fn number(&self, key: Key) -> u64 {
        let of = |fs: &FileSystem| compose(fs, key.ino);
        let known = self.known.read().iter().find(|fs| fs.dev == Some(key.dev)).map(of);
        known.unwrap_or_else(|| {
            let mut known = self.known.write();
            let fs = find(&mut known, FsId::Device(key.dev));
            fs.dev = Some(key.dev);
            of(fs)
        })
    }

    /// The number that was written down.
    pub(crate) fn of(&self, origin: Origin) -> u64 {
        match origin {
            Origin::Number(number) => number,
            Origin::Object { fs, ino } => {
                let known = self.known.read().iter().find(|known| known.id == fs).map(|fs| compose(fs, ino));
                known.unwrap_or_else(|| {
                    let mut known = self.known.write();
                    let room = known.len() < MAX_FILE_SYSTEMS || known.iter().any(|known| known.id == fs);
                    if room { compose(find(&mut known, fs), ino) } else { mixed(fs, ino) }
                })
            }
        }
    }

    /// How a number is written down.
    pub(crate) fn describe(&self, number: u64) -> String {
        match self.known.read().iter().find(|fs| number / PLAIN == fs.prefix) {
            Some(fs) => Origin::Object { fs: fs.id, ino: number % PLAIN },
            None => Origin::Number(number),
        }
        .to_string()
    }

    /// The number of an object at a place, which is told from other places where the same object stands.
    pub(crate) fn of_place(number: u64, parent: u64, name: &[u8]) -> u64 {
        Self::clashed(number, hash(parent, name))
    }

    /// Whether this is a number of [`InodeNumbers::clashed`].
    pub(crate) fn is_clashed(number: u64) -> bool {
        number & CLASHED == CLASHED
    }

    /// Another number for an object whose own is in use.
    pub(crate) fn clashed(number: u64, attempt: u64) -> u64 {
        CLASHED | mix(number.wrapping_add(mix(attempt))) >> 3
    }
}

/// The file system of this id, known from here on.
fn find(known: &mut Vec<FileSystem>, id: FsId) -> &mut FileSystem {
    let at = known.iter().position(|fs| fs.id == id).unwrap_or_else(|| {
        let mut prefix = if known.is_empty() { 0 } else { id.hash() % PREFIXES };
        while known.iter().any(|fs| fs.prefix == prefix) {
            prefix = (prefix + 1) % PREFIXES;
        }
        known.push(FileSystem { id, dev: None, prefix });
        known.len() - 1
    });
    &mut known[at]
}

fn compose(fs: &FileSystem, ino: u64) -> u64 {
    // 0 means "none" to FUSE and 1 the root of the mount.
    let plain = ino < PLAIN && !(fs.prefix == 0 && ino < 2);
    if plain { fs.prefix * PLAIN + ino } else { mixed(fs.id, ino) }
}

fn mixed(fs: FsId, ino: u64) -> u64 {
    MIXED | mix(ino ^ fs.hash()) >> 3
}

/// The number of `name` in a directory of the generated layer that has the number `parent`.
pub(crate) fn generated(parent: u64, name: &[u8]) -> u64 {
    GENERATED | hash(parent, name) >> 3
}

/// A number that depends on nothing but these.
pub(crate) fn hash(seed: u64, name: &[u8]) -> u64 {
    name.iter().fold(mix(seed ^ name.len() as u64), |hash, &byte| mix(hash ^ u64::from(byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_that_are_only_named_are_bounded() {
        let numbers = InodeNumbers::default();
        let here = numbers.number(Key { dev: 5, ino: 77 });
        let mut last = 0;
        for device in 0..200_000 {
            last = numbers.of(Origin::Object { fs: FsId::Device(1000 + device), ino: 9 });
        }
        assert!(numbers.known.read().len() <= MAX_FILE_SYSTEMS);
        assert_eq!(last, numbers.of(Origin::Object { fs: FsId::Device(200_999), ino: 9 }));
        assert_eq!(numbers.number(Key { dev: 5, ino: 77 }), here);
    }

    #[test]
    fn numbers_of_two_file_systems_differ() {
        let numbers = InodeNumbers::default();
        let a = numbers.number(Key { dev: 5, ino: 77 });
        let b = numbers.number(Key { dev: 6, ino: 77 });
        let c = numbers.number(Key { dev: 5, ino: 1 << 60 });
        let root = numbers.number(Key { dev: 5, ino: 1 });
        assert_eq!(a, 77);
        assert!(b != a && c != a && c != b && root != 1);
        assert_eq!(numbers.number(Key { dev: 6, ino: 77 }), b);
    }

    #[test]
    fn what_is_written_down_is_the_same_with_other_device_numbers() {
        let (first, second) = (InodeNumbers::default(), InodeNumbers::default());
        for (dev, id) in [(5, 50), (6, 60), (7, 70)] {
            first.meet_with(dev, || Some(id));
        }
        let mut objects: Vec<u64> = [(5, 9), (6, 9), (7, 9), (6, 1 << 50), (5, 1)]
            .map(|(dev, ino)| first.number(Key { dev, ino }))
            .to_vec();
        objects.push(generated(1, b"name"));
        objects.push(InodeNumbers::clashed(9, 1));
        // Another day they come with other device numbers, and are met in another order.
        second.meet_with(15, || Some(50));
        second.meet_with(5, || Some(70));
        for number in objects {
            let written = first.describe(number);
            assert_eq!(
                Origin::parse(written.as_bytes()).map(|origin| second.of(origin)),
                Some(number),
                "{written}"
            );
        }
        assert_eq!(second.number(Key { dev: 5, ino: 9 }), first.number(Key { dev: 7, ino: 9 }));
        assert_eq!(second.number(Key { dev: 15, ino: 9 }), 9);
    }

    #[test]
    fn copies_of_a_file_system_are_told_apart() {
        let numbers = InodeNumbers::default();
        numbers.meet_with(5, || Some(1));
        numbers.meet_with(6, || Some(1));
        numbers.meet_with(7, || None);
        let of = |dev| numbers.number(Key { dev, ino: 7 });
        assert!(of(5) != of(6) && of(6) != of(7) && of(5) != of(7));
    }

    #[test]
    fn no_other_text_is_an_origin() {
        for text in [
            "",
            "1:2",
            "fs=",
            "fs=i1",
            "fs=x1:2",
            "fs=i1:1000000000000",
            "no=5",
            "no=ffffffffffffffff",
            "no=",
            "\0\u{fb}!",
        ] {
            assert_eq!(Origin::parse(text.as_bytes()), None, "{text}");
        }
    }
}
