//! One operation of a random sequence, described by names and numbers so that it can be done in two places.

use std::collections::BTreeSet;
use std::fs::{self, File, Metadata};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, Gid, Mode, OFlags, RenameFlags, SeekFrom, Timespec, Timestamps,
    Uid, XattrFlags,
};

use crate::semantics::Mapping;

/// The system calls by which a server changes names and attributes on disk, for strace to have them fail.
/// Opening makes files.
pub(crate) const CHANGES: [&str; 10] = [
    "openat",
    "linkat",
    "renameat2",
    "unlinkat",
    "mknodat",
    "mkdirat",
    "symlinkat",
    "fsetxattr,lsetxattr,setxattr",
    "fchmod,fchmodat",
    "utimensat",
];

/// splitmix64.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap_or(0)
    }
}

/// What a place where operations are done allows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    /// Descriptors for reading alone are kept open. Those of the kernel's overlayfs go on showing the
    /// layer's file when it is copied up.
    pub(crate) keep_readers: bool,
    /// Any mode and, with a range of ids, any owner. Else the owner on disk, who is the user outside, has
    /// his rights.
    pub(crate) any_mode: bool,
    /// Owners other than 0 exist. Files may have set*id bits then, and are written by one of them with the
    /// rights of root: whether root's own writes leave the bits is asked in the initial user namespace by the
    /// kernel and in that of the mount by the overlay.
    pub(crate) owners: bool,
    /// Objects may have ACLs.
    pub(crate) acls: bool,
    /// Files are mapped. Where another thread may truncate one, that ends the process (SIGBUS) on any file system.
    pub(crate) maps: bool,
}

impl Rules {
    /// What can be done everywhere.
    pub(crate) const NARROW: Self =
        Self { keep_readers: false, any_mode: false, owners: false, acls: false, maps: true };
}

/// A directory with descriptors of files in it that are kept open, whatever happens to their names.
pub(crate) struct Site {
    base: PathBuf,
    rules: Rules,
    kept: [Option<File>; 5],
}

impl Site {
    pub(crate) fn new(base: impl Into<PathBuf>, rules: Rules) -> Self {
        Self { base: base.into(), rules, kept: Default::default() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Write,
    Append,
    Truncate,
    Open,
    Close,
    ReadKept,
    WriteKept,
    TruncateKept,
    Allocate,
    Seek,
    CopyRange,
    Map,
    StatKept,
    ChangeKept,
    Sync,
    MakeDir,
    RemoveDir,
    Unlink,
    Rename,
    RenameNoReplace,
    Exchange,
    Link,
    Symlink,
    MakeNode,
    Mode,
    Owner,
    Times,
    SetXattr,
    RemoveXattr,
    ListXattrs,
    List,
    Stat,
    Read,
    ReadLink,
}

/// How often each comes.
const OFTEN: [(What, usize); 34] = [
    (What::Write, 8),
    (What::Append, 3),
    (What::Truncate, 3),
    (What::Open, 12),
    (What::Close, 2),
    (What::ReadKept, 5),
    (What::WriteKept, 8),
    (What::TruncateKept, 3),
    (What::Allocate, 4),
    (What::Seek, 4),
    (What::CopyRange, 3),
    (What::Map, 3),
    (What::StatKept, 3),
    (What::ChangeKept, 4),
    (What::Sync, 2),
    (What::MakeDir, 8),
    (What::RemoveDir, 6),
    (What::Unlink, 8),
    (What::Rename, 12),
    (What::RenameNoReplace, 4),
    (What::Exchange, 4),
    (What::Link, 5),
    (What::Symlink, 4),
    (What::MakeNode, 3),
    (What::Mode, 4),
    (What::Owner, 3),
    (What::Times, 4),
    (What::SetXattr, 4),
    (What::RemoveXattr, 2),
    (What::ListXattrs, 2),
    (What::List, 4),
    (What::Stat, 3),
    (What::Read, 4),
    (What::ReadLink, 2),
];

const NAMES: [&str; 7] = ["dir", "sub", "file", "a", "b", "new", "empty"];
/// Directories of one shape, so that names meet.
pub(crate) const TOPS: [&str; 3] = [".", "p", "q"];
/// Those that need escaping on disk among them.
const ATTRIBUTES: [&str; 4] = ["user.test", "user.other", "user.overlay.opaque", "user.overlay.whiteout"];

#[derive(Debug)]
pub(crate) struct Operation {
    what: What,
    a: PathBuf,
    b: PathBuf,
    kept: [usize; 2],
    n: usize,
    m: usize,
}

fn path(random: &mut Random) -> PathBuf {
    let mut path = PathBuf::from(TOPS[random.below(TOPS.len())]);
    for _ in 0..=random.below(3) {
        path.push(NAMES[random.below(NAMES.len())]);
    }
    path
}

impl Operation {
    pub(crate) fn random(random: &mut Random) -> Self {
        let mut at = random.below(OFTEN.iter().map(|(_, often)| often).sum());
        let mut what = What::Stat;
        for (kind, often) in OFTEN {
            if at < often {
                what = kind;
                break;
            }
            at -= often;
        }
        let kept = [random.below(5), random.below(5)];
        Self {
            what,
            a: path(random),
            b: path(random),
            kept,
            n: random.below(20_000),
            m: random.below(1 << 20),
        }
    }

    /// Whether it gives a file another name.
    pub(crate) fn links(&self) -> bool {
        self.what == What::Link
    }

    /// Whether it is about a descriptor that is kept.
    pub(crate) fn keeps(&self) -> bool {
        use What::{
            Allocate, ChangeKept, Close, CopyRange, Map, Open, ReadKept, Seek, StatKept, Sync, TruncateKept,
            WriteKept,
        };
        matches!(
            self.what,
            Allocate
                | ChangeKept
                | Close
                | CopyRange
                | Map
                | Open
                | ReadKept
                | Seek
                | StatKept
                | Sync
                | TruncateKept
                | WriteKept
        )
    }

    /// Whether it writes to a file.
    pub(crate) fn writes(&self) -> bool {
        matches!(self.what, What::Write | What::Append | What::Truncate)
    }

    /// Whether it may change the content of a file.
    fn changes_content(&self) -> bool {
        use What::{Allocate, CopyRange, Open, TruncateKept, WriteKept};
        self.writes() || matches!(self.what, Allocate | CopyRange | Open | TruncateKept | WriteKept)
    }

    /// Whether it changes what names there are.
    pub(crate) fn counts_names(&self) -> bool {
        use What::{Exchange, Link, Rename, RenameNoReplace, Unlink};
        matches!(self.what, Exchange | Link | Rename | RenameNoReplace | Unlink)
    }

    /// The two names of a rename, if none of them is a way through a link.
    pub(crate) fn renames(&self) -> Option<(PathBuf, PathBuf)> {
        let plain = |path: &Path| path.components().filter(|c| *c != std::path::Component::CurDir).collect();
        matches!(self.what, What::Rename | What::RenameNoReplace).then(|| (plain(&self.a), plain(&self.b)))
    }

    /// Does it; the text is what it has shown.
    pub(crate) fn run(&self, site: &mut Site) -> std::io::Result<String> {
        let _writer = if site.rules.owners && self.changes_content() { Some(Writer::new()?) } else { None };
        let (a, b) = (site.base.join(&self.a), site.base.join(&self.b));
        let Self { n, m, .. } = *self;
        let text = format!("{n};").repeat(if m % 5 == 0 { m % 3000 } else { m % 40 });
        let done = |()| String::new();
        let rename = |flags| rustix::fs::renameat_with(CWD, &a, CWD, &b, flags).map(done);
        Ok(match self.what {
            What::Write => {
                let file = open(&a, OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC, 0o666)?;
                write(&file, text.as_bytes(), None)?
            }
            What::Append => write(&open(&a, OFlags::WRONLY | OFlags::APPEND, 0)?, text.as_bytes(), None)?,
            What::Truncate => {
                let file = open(&a, OFlags::WRONLY, 0)?;
                file.set_len(n as u64).map(done)?
            }
            What::Open => self.open(&a, site)?,
            What::MakeDir => {
                let mode = if site.rules.any_mode { m & 0o3777 } else { m & 0o077 | 0o700 };
                rustix::fs::mkdirat(CWD, &a, mode_of(mode)).map(done)?
            }
            What::RemoveDir => fs::remove_dir(&a).map(done)?,
            What::Unlink => fs::remove_file(&a).map(done)?,
            What::Rename => rename(RenameFlags::empty())?,
            What::RenameNoReplace => rename(RenameFlags::NOREPLACE)?,
            What::Exchange => rename(RenameFlags::EXCHANGE)?,
            What::Link => fs::hard_link(&a, &b).map(done)?,
            What::Symlink => {
                let mut target = PathBuf::from(if m % 8 == 0 { "." } else { NAMES[n % NAMES.len()] });
                if m % 2 == 0 {
                    target.push(NAMES[m / 2 % NAMES.len()]);
                }
                std::os::unix::fs::symlink(target, &a).map(done)?
            }
            What::MakeNode => {
                let kind = [FileType::Fifo, FileType::Socket, FileType::RegularFile][n % 3];
                let mode = if site.rules.any_mode { m & 0o777 } else { m & 0o177 | 0o600 };
                rustix::fs::mknodat(CWD, &a, kind, mode_of(mode), 0).map(done)?
            }
            What::Mode => {
                let meta = fs::metadata(&a)?;
                rustix::fs::chmodat(CWD, &a, some_mode(&meta, m, site.rules), AtFlags::empty()).map(done)?
            }
            What::Owner => {
                let id = |at: usize| if site.rules.owners { [0, 1, 33, 1000][at % 4] } else { 0 };
                let (uid, gid) = (Uid::from_raw(id(n)), Gid::from_raw(id(m)));
                rustix::fs::chownat(CWD, &a, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).map(done)?
            }
            What::Times => {
                let times = times(n, m);
                rustix::fs::utimensat(CWD, &a, &times, AtFlags::SYMLINK_NOFOLLOW).map(done)?
            }
            What::SetXattr if site.rules.acls && n % 3 == 0 => {
                let name = [ACCESS, DEFAULT][n / 3 % 2];
                let acl = some_acl(n, m, site.rules);
                rustix::fs::lsetxattr(&a, name, &acl, XattrFlags::empty()).map(done)?
            }
            What::RemoveXattr if site.rules.acls && n % 3 == 0 => {
                rustix::fs::lremovexattr(&a, [ACCESS, DEFAULT][n / 3 % 2]).map(done)?
            }
            What::SetXattr => {
                let flags = [XattrFlags::empty(), XattrFlags::CREATE, XattrFlags::REPLACE][m % 3];
                let value = &text.as_bytes()[..text.len().min(60)];
                rustix::fs::lsetxattr(&a, ATTRIBUTES[n % 4], value, flags).map(done)?
            }
            What::RemoveXattr => rustix::fs::lremovexattr(&a, ATTRIBUTES[n % 4]).map(done)?,
            What::ListXattrs => xattrs(&a)?,
            What::List => {
                let mut names = BTreeSet::new();
                for entry in fs::read_dir(&a)? {
                    let entry = entry?;
                    // As the entry says it.
                    names.insert(format!("{:?} {}", entry.file_name(), kind_of(entry.file_type()?)));
                }
                format!("{names:?}")
            }
            What::Stat => describe(&a.symlink_metadata()?),
            What::Read => {
                let mut data = Vec::new();
                open(&a, OFlags::RDONLY, 0)?.read_to_end(&mut data)?;
                shorten(&data)
            }
            What::ReadLink => fs::read_link(&a)?.display().to_string(),
            _ => self.run_kept(site)?,
        })
    }

    fn open(&self, path: &Path, site: &mut Site) -> std::io::Result<String> {
        let Self { n, m, .. } = *self;
        let mut flags = [OFlags::RDONLY, OFlags::WRONLY, OFlags::RDWR, OFlags::RDWR][n % 4];
        let sometimes = [
            (1, OFlags::CREATE),
            (2, OFlags::EXCL),
            (3, OFlags::TRUNC),
            (2, OFlags::APPEND),
            (3, OFlags::NOFOLLOW),
            (3, OFlags::DIRECTORY),
            (3, OFlags::DSYNC),
        ];
        let mut left = m;
        for (bits, flag) in sometimes {
            if left % (1 << bits) == 0 {
                flags |= flag;
            }
            left >>= bits;
        }
        let file = open(path, flags, if site.rules.any_mode { n & 0o777 } else { n & 0o077 | 0o600 })?;
        let meta = file.metadata()?;
        let text = describe(&meta);
        let reader = !flags.intersects(OFlags::WRONLY | OFlags::RDWR);
        if (meta.is_file() || meta.is_dir()) && (site.rules.keep_readers || !reader) {
            site.kept[self.kept[0]] = Some(file);
        }
        Ok(text)
    }

    /// What is done with a descriptor that was kept.
    fn run_kept(&self, site: &mut Site) -> std::io::Result<String> {
        let Self { n, m, kept: [first, second], .. } = *self;
        if self.what == What::Close {
            return Ok(site.kept[first].take().is_some().to_string());
        }
        let Some(file) = &site.kept[first] else { return Ok("none".to_owned()) };
        let meta = file.metadata()?;
        if meta.is_dir() && !matches!(self.what, What::StatKept | What::ChangeKept | What::Sync) {
            return Ok("a directory".to_owned());
        }
        let done = |()| String::new();
        Ok(match self.what {
            What::ReadKept => {
                let mut data = vec![0; m % 10_000];
                let read = file.read_at(&mut data, n as u64)?;
                format!("{read} {}", shorten(&data[..read]))
            }
            What::WriteKept => write(file, format!("{m},").repeat(n % 900).as_bytes(), Some(n as u64))?,
            What::TruncateKept => file.set_len(if m % 3 == 0 { 0 } else { n as u64 }).map(done)?,
            What::Allocate => {
                let mode = [
                    FallocateFlags::empty(),
                    FallocateFlags::KEEP_SIZE,
                    FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                    FallocateFlags::ZERO_RANGE,
                    FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
                ][m % 5];
                rustix::fs::fallocate(file, mode, n as u64, (m % 9000) as u64).map(done)?
            }
            What::Seek => {
                let hole = m % 2 == 0;
                let from = if hole { SeekFrom::Hole(n as u64) } else { SeekFrom::Data(n as u64) };
                let found = match rustix::fs::seek(file, from) {
                    // The rest is a hole, or there is no rest.
                    Err(rustix::io::Errno::NXIO) if !hole && meta.size() > n as u64 => meta.size(),
                    other => other?,
                };
                right_seek(file, hole, n, usize::try_from(found).unwrap_or(0))?
            }
            What::CopyRange => {
                let Some(other) =
                    site.kept[second].as_ref().filter(|o| o.metadata().is_ok_and(|m| m.is_file()))
                else {
                    return Ok("none".to_owned());
                };
                let (mut from, mut to) = (n as u64, (m % 15_000) as u64);
                let length = m % 8000;
                rustix::fs::copy_file_range(file, Some(&mut from), other, Some(&mut to), length)?.to_string()
            }
            What::Map => {
                let both = rustix::fs::fcntl_getfl(file)?.contains(OFlags::RDWR);
                let size = usize::try_from(meta.size()).unwrap_or(0);
                if !both || size == 0 || !site.rules.maps {
                    return Ok("not to be mapped".to_owned());
                }
                let mut map = Mapping::new_writable(file, size)?;
                let (from, to) = (n % size, (n % size + m % 5000).min(size));
                let before = shorten(&map.bytes_mut()[from..to]);
                map.bytes_mut()[from..to].fill(b'a' + u8::try_from(m % 26).unwrap_or(0));
                map.sync()?;
                before
            }
            What::StatKept => describe(&meta),
            What::ChangeKept => match n % 4 {
                0 => rustix::fs::fchmod(file, some_mode(&meta, m, site.rules)).map(done)?,
                1 => rustix::fs::futimens(file, &times(n, m)).map(done)?,
                2 => {
                    let value = m.to_string();
                    rustix::fs::fsetxattr(file, ATTRIBUTES[m % 4], value.as_bytes(), XattrFlags::empty())
                        .map(done)?
                }
                _ => rustix::fs::fremovexattr(file, ATTRIBUTES[m % 4]).map(done)?,
            },
            What::Sync if n % 2 == 0 => file.sync_all().map(done)?,
            What::Sync => file.sync_data().map(done)?,
            other => return Err(std::io::Error::other(format!("{other:?} is not of a descriptor"))),
        })
    }
}

/// Whether what a seek found can be true. Where exactly holes are is the file system's own matter: what was
/// allocated and not written counts as one thing or the other.
fn right_seek(file: &File, hole: bool, from: usize, found: usize) -> std::io::Result<String> {
    let mut data = vec![0; usize::try_from(file.metadata()?.size()).unwrap_or(0)];
    match file.read_exact_at(&mut data, 0) {
        // It is open for writing alone.
        Err(err) if err.raw_os_error() == Some(rustix::io::Errno::BADF.raw_os_error()) => {
            return Ok(String::new());
        }
        other => other?,
    }
    let skipped = if hole { found..(found | 4095) + 1 } else { from..found };
    let right = skipped.clone().all(|at| data.get(at).is_none_or(|&byte| byte == 0));
    Ok(if right { String::new() } else { format!("{skipped:?} is no hole") })
}

fn mode_of(mode: usize) -> Mode {
    Mode::from_raw_mode(u32::try_from(mode & 0o7777).unwrap_or(0))
}

/// Files have set*id bits only where [`Rules::owners`] says so.
fn some_mode(meta: &Metadata, m: usize, rules: Rules) -> Mode {
    mode_of(match (meta.is_dir(), rules.any_mode) {
        (true, true) => m & 0o3777,
        (true, false) => m & 0o077 | 0o700,
        (false, true) if rules.owners => m & 0o7777,
        (false, true) => m & 0o1777,
        (false, false) => m & 0o177 | 0o600,
    })
}

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

/// An ACL in the kernel's form, of three entries or with a user and a group that have names.
fn some_acl(n: usize, m: usize, rules: Rules) -> Vec<u8> {
    let perm = |shift: usize| u16::try_from(m >> shift & 7).unwrap_or(0);
    let id = |at: usize| if rules.owners { [0, 1, 33, 1000][at % 4] } else { 0 };
    let none = u32::MAX;
    let mut entries = vec![(1, perm(0), none), (4, perm(3), none), (0x20, perm(6), none)];
    if !n.is_multiple_of(5) {
        entries.extend([(2, perm(9), id(n)), (8, perm(12), id(m)), (0x10, perm(15), none)]);
        entries.sort_unstable();
    }
    let mut acl = 2_u32.to_le_bytes().to_vec();
    for (tag, perm, id) in entries {
        let tag: u16 = tag;
        acl.extend(tag.to_le_bytes().into_iter().chain(perm.to_le_bytes()).chain(u32::to_le_bytes(id)));
    }
    acl
}

/// While it exists, this process is somebody other than root to file systems, with root's rights.
struct Writer;

impl Writer {
    fn new() -> std::io::Result<Self> {
        use nix::unistd::{Uid, setresuid};
        setresuid(Uid::from_raw(0), Uid::from_raw(1000), Uid::from_raw(0))?;
        let writer = Self;
        let mut sets = rustix::thread::capabilities(None)?;
        sets.effective = sets.permitted;
        rustix::thread::set_capabilities(None, sets)?;
        Ok(writer)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let root = nix::unistd::Uid::from_raw(0);
        nix::unistd::setresuid(root, root, root).expect("root's saved id");
    }
}

/// Long ago, so that they can be told from times that the operations leave.
fn times(n: usize, m: usize) -> Timestamps {
    let time = |sec: usize, nsec: usize| Timespec {
        tv_sec: 1_000_000_000 + i64::try_from(sec).unwrap_or(0),
        tv_nsec: i64::try_from(nsec).unwrap_or(0),
    };
    Timestamps { last_access: time(m, n), last_modification: time(n, m) }
}

/// Never waits for the other end of a fifo.
fn open(path: &Path, flags: OFlags, mode: usize) -> std::io::Result<File> {
    let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, path, flags, mode_of(mode))?.into())
}

/// One write.
fn write(file: &File, data: &[u8], at: Option<u64>) -> std::io::Result<String> {
    let written = match at {
        Some(at) => rustix::io::pwrite(file, data, at)?,
        None => rustix::io::write(file.as_fd(), data)?,
    };
    Ok(written.to_string())
}

pub(crate) fn kind_of(kind: fs::FileType) -> &'static str {
    if kind.is_dir() {
        "dir"
    } else if kind.is_symlink() {
        "link"
    } else if kind.is_file() {
        "file"
    } else if kind.is_fifo() {
        "fifo"
    } else if kind.is_socket() {
        "socket"
    } else {
        "device"
    }
}

/// What stat says, as far as it is the same everywhere. A time that was not set is only said to be one.
pub(crate) fn describe(meta: &Metadata) -> String {
    let mut text =
        format!("{} {:o} {}:{}", kind_of(meta.file_type()), meta.mode() & 0o7777, meta.uid(), meta.gid());
    if !meta.is_dir() {
        text.push_str(&format!(" {} bytes, {} names", meta.size(), meta.nlink()));
    }
    if meta.mtime() < 1_500_000_000 {
        text.push_str(&format!(", of {}.{:09}", meta.mtime(), meta.mtime_nsec()));
    }
    text
}

/// Content in a few words: a hash and which bytes are not zero, with how each such piece begins.
pub(crate) fn shorten(data: &[u8]) -> String {
    let hash = data.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    let mut text = format!("{hash:016x}");
    let mut at = 0;
    while let Some(start) = data[at..].iter().position(|&byte| byte != 0).map(|skip| at + skip) {
        at = data[start..].iter().position(|&byte| byte == 0).map_or(data.len(), |length| start + length);
        let beginning = &data[start..at.min(start + 12)];
        text.push_str(&format!(" {start}..{at}: {:?}", String::from_utf8_lossy(beginning)));
    }
    text
}

/// All attributes that can be seen, with their values.
pub(crate) fn xattrs(path: &Path) -> std::io::Result<String> {
    let mut names = vec![0; 4096];
    let length = match rustix::fs::llistxattr(path, &mut names[..]) {
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        other => other?,
    };
    let mut all = BTreeSet::new();
    for name in names[..length].split(|&b| b == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 4096];
        let length = rustix::fs::lgetxattr(path, name, &mut value[..])?;
        let value = &value[..length];
        let value = match std::str::from_utf8(value) {
            Ok(text) if !text.contains(char::is_control) => text.to_owned(),
            _ => value.iter().map(|byte| format!("{byte:02x}")).collect(),
        };
        all.insert(format!("{}={value}", String::from_utf8_lossy(name)));
    }
    Ok(if all.is_empty() { String::new() } else { format!("{all:?}") })
}
