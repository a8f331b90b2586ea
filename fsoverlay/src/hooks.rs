//! Where the embedder looks on or has a say: counts, a quota, a limit on rates, a trace of what is used
//! of the layers. (What changes is noted by [`crate::journal`].)
//!
//! Each of them is one place in the code and costs a check for "nobody asked" otherwise. The counts are
//! always kept: an addition to a number that nobody waits for.
//!
//! # What a quota counts
//!
//! Objects of the upper (files, directories, links, fifos, …) and the blocks of its regular files, as
//! stat(2) gives them: holes cost nothing, shared blocks count, and so may attributes. Room is *reserved* before anything grows,
//! for the most that it can take, and *settled* afterwards with what it took; so a policy that adds both
//! up never lets more in than it allows, whoever else writes at the time. What is removed is given back
//! when its blocks are: a file that is unlinked and open counts until it is closed.
//!
//! So do the blocks of the file that knows the owners of links ([`crate::sidecar`]).
//!
//! Whiteouts do not count, since nobody may be kept from removing files; nor do the blocks of
//! directories. A file system that takes blocks in advance, or gives them back by
//! itself, is not seen doing so: a policy that wants to be exact walks the upper from time to time.
//!
//! Written pages stay in the kernel for a while, so a refusal can come when they are flushed, at fsync or
//! close. A full disk says so at the same moment.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::attr::{Kind, Stat};
use crate::engine::Engine;
use crate::errno::{Errno, LONG, Res, is_hurried};
use crate::inode::Node;
use crate::layer::{RealDir, UPPER, stat_fd};
use crate::object::Content;

/// What the embedder of an overlay takes part in; see [`crate::Overlay::with_hooks`].
#[derive(Debug, Clone, Default)]
pub struct Hooks {
    /// Asked before the upper grows.
    pub quota: Option<Arc<dyn Quota>>,
    /// Asked before bytes are read or written.
    pub rate: Option<Arc<dyn RateLimit>>,
    /// Told what is used of the layers.
    pub trace: Option<Arc<dyn Trace>>,
    /// How many changed directories [`crate::Server::journal`] knows; 0: none is noted.
    pub journal: usize,
}

/// An amount of what a [`Quota`] counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Blocks of regular files, in bytes.
    pub bytes: u64,
    /// Files, directories, links and so on.
    pub objects: u64,
}

/// What an operation did to the [`Usage`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Growth {
    /// Blocks of regular files, in bytes.
    pub bytes: i64,
    /// Files, directories, links and so on.
    pub objects: i64,
}

/// How a [`Quota`] says no.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// `ENOSPC`: there is no room.
    NoSpace,
    /// `EDQUOT`: there is, but not for this.
    OverQuota,
}

/// The size of a file system, as statfs(2) shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// All of it.
    pub total: Usage,
    /// What is left.
    pub free: Usage,
}

/// A limit on what the upper holds. The methods are called from several threads and must not block.
pub trait Quota: std::fmt::Debug + Send + Sync {
    /// Whether the upper may grow by this. `Ok` reserves it until it is settled.
    ///
    /// # Errors
    /// The answer that the payload gets.
    fn reserve(&self, most: Usage) -> Result<(), Refusal>;

    /// What was reserved (nothing, where something was removed) has become this. It can be more than was
    /// reserved, if the disk takes more than could be known.
    fn settle(&self, reserved: Usage, growth: Growth);

    /// What statfs(2) is to show, given what the disk says.
    fn space(&self, disk: Space) -> Space {
        disk
    }
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Out of a file. What the kernel has in its cache is not asked for again.
    Read,
    /// Into one.
    Write,
}

/// A limit on how fast bytes are read and written.
pub trait RateLimit: std::fmt::Debug + Send + Sync {
    /// How long a request is to wait before it is served. It waits without a thread, so the others go on.
    /// The call comes from several threads and must not block.
    fn delay(&self, direction: Direction, bytes: u64) -> Duration;
}

/// What was done with an object of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccessKind {
    /// Its name was looked up.
    LookedUp,
    /// Its entries were read.
    Listed,
    /// Its content was opened, to be read or copied up.
    Opened,
}

/// One use of an object of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// The layer, as an index of [`crate::OverlaySpec::layers`].
    pub layer: usize,
    /// Path below the layer's root, without a leading slash; empty for the root itself.
    pub path: PathBuf,
    /// What was done.
    pub kind: AccessKind,
}

/// Is told what is used of the layers. What the kernel has cached is not asked for again, and not told.
pub trait Trace: std::fmt::Debug + Send + Sync {
    /// The call comes from several threads, some of which hold locks of directories: it must not block,
    /// nor touch the mount.
    fn accessed(&self, access: Access);
}

/// How much was asked of an overlay since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Names looked up.
    pub lookups: u64,
    /// Pieces of directories read.
    pub listings: u64,
    /// Read requests. What the kernel has in its cache comes to nobody.
    pub reads: u64,
    /// Bytes that they gave.
    pub read_bytes: u64,
    /// Write requests, copy_file_range(2) included.
    pub writes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Requests that change a name or an attribute.
    pub changes: u64,
    /// Syncs of files and directories that went to the disk.
    pub syncs: u64,
    /// All other requests.
    pub others: u64,
    /// Files, directories and links copied up.
    pub copied_up: u64,
    /// Bytes of their content, without holes.
    pub copied_bytes: u64,
    /// Entries of layers that were looked up before anybody asked for them.
    pub looked_ahead: u64,
    /// Those of them that a listing had use for.
    pub told_ahead: u64,
    /// Internal errors, each answered with `EIO`.
    pub panics: u64,
    /// Requests of all these that were served on the processor of who asked ([`crate::Overlay::with_proc`]).
    pub near: u64,
}

/// What the kernel asks for, as the counts and the log tell requests apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Opcode {
    Lookup,
    Forget,
    GetAttr,
    SetAttr,
    ReadLink,
    MkNod,
    MkDir,
    Unlink,
    RmDir,
    Symlink,
    Rename,
    Link,
    Open,
    Create,
    Release,
    OpenDir,
    Read,
    Write,
    Fsync,
    FsyncDir,
    ReadDir,
    ReadDirPlus,
    StatFs,
    SetXattr,
    GetXattr,
    ListXattr,
    RemoveXattr,
    Fallocate,
    Lseek,
    CopyFileRange,
    Ioctl,
}

/// The numbers behind [`Counters`]. Relaxed throughout: nothing follows from one of them.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    lookups: AtomicU64,
    listings: AtomicU64,
    reads: AtomicU64,
    pub(crate) read_bytes: AtomicU64,
    writes: AtomicU64,
    pub(crate) written_bytes: AtomicU64,
    changes: AtomicU64,
    pub(crate) syncs: AtomicU64,
    others: AtomicU64,
    copied_up: AtomicU64,
    copied_bytes: AtomicU64,
    pub(crate) looked_ahead: AtomicU64,
    pub(crate) told_ahead: AtomicU64,
    pub(crate) panics: AtomicU64,
}

pub(crate) fn add(count: &AtomicU64, n: u64) {
    count.fetch_add(n, Ordering::Relaxed);
}

impl Counts {
    /// Counts a request.
    pub(crate) fn request(&self, what: Opcode) {
        use Opcode::{
            CopyFileRange, Create, Fallocate, Forget, Fsync, FsyncDir, GetAttr, GetXattr, Ioctl, Link,
            ListXattr, Lookup, Lseek, MkDir, MkNod, Open, OpenDir, Read, ReadDir, ReadDirPlus, ReadLink,
            Release, RemoveXattr, Rename, RmDir, SetAttr, SetXattr, StatFs, Symlink, Unlink, Write,
        };
        let count = match what {
            Lookup => &self.lookups,
            Read => &self.reads,
            Write | CopyFileRange => &self.writes,
            ReadDir | ReadDirPlus => &self.listings,
            MkNod | Create | MkDir | Symlink | Link | Unlink | RmDir | Rename | SetAttr | SetXattr
            | RemoveXattr | Fallocate => &self.changes,
            // Not asked for by anybody.
            Forget => return,
            GetAttr | ReadLink | Open | Release | OpenDir | Fsync | FsyncDir | StatFs | GetXattr
            | ListXattr | Lseek | Ioctl => &self.others,
        };
        add(count, 1);
    }

    pub(crate) fn copied_up(&self, bytes: u64) {
        add(&self.copied_up, 1);
        add(&self.copied_bytes, bytes);
    }

    pub(crate) fn read(&self) -> Counters {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Counters {
            lookups: get(&self.lookups),
            listings: get(&self.listings),
            reads: get(&self.reads),
            read_bytes: get(&self.read_bytes),
            writes: get(&self.writes),
            written_bytes: get(&self.written_bytes),
            changes: get(&self.changes),
            syncs: get(&self.syncs),
            others: get(&self.others),
            copied_up: get(&self.copied_up),
            copied_bytes: get(&self.copied_bytes),
            looked_ahead: get(&self.looked_ahead),
            told_ahead: get(&self.told_ahead),
            panics: get(&self.panics),
            // Counted elsewhere.
            near: 0,
        }
    }
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// The blocks of a file, in bytes.
pub(crate) fn blocks(stat: &Stat) -> u64 {
    stat.blocks.saturating_mul(512)
}

/// The most that a copy of the first `limit` bytes of a file takes. A sparse one stays so.
pub(crate) fn most_of_copy(stat: &Stat, limit: u64) -> u64 {
    let size = stat.size.min(limit);
    if blocks(stat) < stat.size { blocks(stat).min(size) } else { size }.next_multiple_of(BLOCK)
}

/// What a file grows by, on all but strange file systems.
const BLOCK: u64 = 4096;

/// The most that a file can take more once `length` bytes at `offset` are there.
pub(crate) fn most_of_write(stat: &Stat, offset: u64, length: u64) -> u64 {
    let end = blocks_to(offset.saturating_add(length));
    let touched = end.saturating_sub(offset / BLOCK * BLOCK);
    // Without holes only what lies beyond the end is new.
    if blocks(stat) >= stat.size { touched.min(end.saturating_sub(blocks_to(stat.size))) } else { touched }
}

fn blocks_to(end: u64) -> u64 {
    end.checked_next_multiple_of(BLOCK).unwrap_or(u64::MAX)
}

/// Room in the upper for something that is being made; given back unless it is used.
#[derive(Debug)]
pub(crate) struct Reserved<'a> {
    quota: Option<&'a dyn Quota>,
    most: Usage,
}

impl Reserved<'_> {
    pub(crate) fn used(mut self, bytes: u64, objects: i64) {
        if let Some(quota) = self.quota.take() {
            quota.settle(self.most, Growth { bytes: signed(bytes), objects });
        }
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if let Some(quota) = self.quota {
            quota.settle(self.most, Growth::default());
        }
    }
}

/// An object of the upper is gone, or what kept its content.
pub(crate) fn released(quota: &dyn Quota, kind: Kind, stat: &Stat) {
    let bytes = if kind == Kind::File { -signed(blocks(stat)) } else { 0 };
    quota.settle(Usage::default(), Growth { bytes, objects: -1 });
}

impl Engine {
    pub(crate) fn quota(&self) -> Option<&dyn Quota> {
        self.hooks.quota.as_deref()
    }

    /// Asks for room in the upper.
    pub(crate) fn reserve(&self, bytes: u64, objects: u64) -> Res<Reserved<'_>> {
        let (quota, most) = (self.quota(), Usage { bytes, objects });
        if let Some(quota) = quota {
            quota.reserve(most).map_err(|refusal| match refusal {
                Refusal::NoSpace => Errno::NOSPC,
                Refusal::OverQuota => Errno::DQUOT,
            })?;
        }
        Ok(Reserved { quota, most })
    }

    /// Changes the content of a file of the upper, which may take up to `most` bytes more. One change of
    /// a file at a time, where somebody counts.
    pub(crate) fn grow<T>(
        &self,
        node: &Node,
        file: impl AsFd,
        most: impl FnOnce(&Stat) -> u64,
        change: impl FnOnce() -> Res<T>,
    ) -> Res<T> {
        let Some(quota) = self.quota() else { return change() };
        let _one_at_a_time = match node.copying.try_lock() {
            Some(guard) => guard,
            None if is_hurried() => return Err(LONG),
            None => node.copying.lock(),
        };
        let before = stat_fd(file.as_fd())?;
        let mut reserved = self.reserve(most(&before), 0)?;
        let changed = change();
        // Also after a failure, which may have come half-way.
        let after = stat_fd(file.as_fd()).map_or(signed(blocks(&before)), |stat| signed(blocks(&stat)));
        reserved.quota = None;
        quota.settle(reserved.most, Growth { bytes: after - signed(blocks(&before)), objects: 0 });
        changed
    }

    /// Changes attributes of an object of the upper, which may take or free a few blocks of a file.
    pub(crate) fn settled<T>(&self, node: &Arc<Node>, change: impl FnOnce() -> Res<T>) -> Res<T> {
        if self.quota().is_none() || node.kind != Kind::File {
            return change();
        }
        match self.open_file(node, false)? {
            Content::File(fd) => self.grow(node, fd, |_| 0, change),
            Content::Memory(_) => change(),
        }
    }

    /// Tells whoever wants to know that an object of a layer was used.
    pub(crate) fn trace(&self, dir: &RealDir, name: Option<&[u8]>, kind: AccessKind) {
        let Some(trace) = &self.hooks.trace else { return };
        if dir.layer == UPPER {
            return;
        }
        let mut path = dir.path();
        if let Some(name) = name {
            path.push(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(name));
        }
        trace.accessed(Access { layer: dir.layer as usize, path, kind });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{IdExtent, Owners};
    use crate::engine::tests::{Scratch, dice};
    use crate::sync::Mutex;

    /// Counts, and lets in so much.
    #[derive(Debug)]
    struct Limit {
        used: Mutex<(i64, i64)>,
        most: (i64, i64),
    }

    impl Limit {
        fn new(bytes: i64, objects: i64) -> Arc<Self> {
            Arc::new(Self { used: Mutex::default(), most: (bytes, objects) })
        }

        fn add(&self, bytes: i64, objects: i64) -> (i64, i64) {
            let mut used = self.used.lock();
            *used = (used.0 + bytes, used.1 + objects);
            *used
        }
    }

    impl Quota for Limit {
        fn reserve(&self, most: Usage) -> Result<(), Refusal> {
            let (bytes, objects) = (signed(most.bytes), signed(most.objects));
            let used = self.add(bytes, objects);
            let refusal = if used.1 > self.most.1 {
                Refusal::OverQuota
            } else if used.0 > self.most.0 {
                Refusal::NoSpace
            } else {
                return Ok(());
            };
            self.add(-bytes, -objects);
            Err(refusal)
        }

        fn settle(&self, reserved: Usage, growth: Growth) {
            self.add(growth.bytes - signed(reserved.bytes), growth.objects - signed(reserved.objects));
        }

        fn space(&self, _disk: Space) -> Space {
            let used = *self.used.lock();
            let usage = |bytes: i64, objects: i64| Usage {
                bytes: bytes.cast_unsigned(),
                objects: objects.cast_unsigned(),
            };
            Space {
                total: usage(self.most.0, self.most.1),
                free: usage(self.most.0 - used.0, self.most.1 - used.1),
            }
        }
    }

    fn limited(name: &str, limit: &Arc<Limit>) -> Scratch {
        let mut scratch = Scratch::new(name);
        scratch.engine.set_hooks(Hooks { quota: Some(limit.clone()), ..Hooks::default() });
        scratch
    }

    /// Bytes and objects of the upper and the work directory; a file with several names once, whiteouts
    /// and what the overlay notes for itself not at all.
    fn on_disk(dir: &std::path::Path) -> (i64, i64) {
        use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
        let (mut sum, mut seen) = ((0, 0), std::collections::HashSet::new());
        if let Ok(meta) = dir.join("work/owners").metadata() {
            seen.insert(meta.ino());
            sum.0 += signed(meta.len().next_multiple_of(BLOCK));
        }
        let links = dir.join("work/links");
        let mut dirs = vec![dir.join("upper"), dir.join("work")];
        if links.exists() {
            seen.extend(links.metadata().map(|meta| meta.ino()));
            for entry in std::fs::read_dir(&links).expect("a directory") {
                let entry = entry.expect("an entry");
                // A count of covered names.
                if entry.file_name().to_string_lossy().contains('-') {
                    seen.insert(entry.metadata().expect("there").ino());
                }
            }
            dirs.push(links);
        }
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(dir).expect("a directory") {
                let path = entry.expect("an entry").path();
                let meta = path.symlink_metadata().expect("there");
                if meta.file_type().is_char_device() || !seen.insert(meta.ino()) {
                    continue;
                }
                sum.1 += 1;
                sum.0 += if meta.is_file() { signed(meta.blocks() * 512) } else { 0 };
                if meta.is_dir() {
                    dirs.push(path);
                }
            }
        }
        sum
    }

    #[test]
    fn a_quota_knows_what_the_upper_holds() {
        for seed in 0..20 {
            let limit = Limit::new(i64::MAX / 2, i64::MAX / 2);
            let scratch = limited(&format!("usage{seed}"), &limit);
            scratch.fill_lower();
            let mut random = dice(seed);
            for _ in 0..200 {
                scratch.change_something(&mut random);
            }
            // Files that a layer has further names of wait for these in the work directory.
            assert_eq!(*limit.used.lock(), on_disk(&scratch.dir), "seed {seed}");
        }
    }

    #[test]
    fn what_is_open_without_a_name_counts() {
        for pins in [true, false] {
            let limit = Limit::new(i64::MAX / 2, i64::MAX / 2);
            let mut scratch = limited(&format!("unlinked-{pins}"), &limit);
            if !pins {
                scratch.engine.pins = crate::handle::Pins::new(0);
            }
            let file = scratch.make(b"file", Kind::File);
            assert_eq!(scratch.engine.write(&file, 0, &[1; 8192], false), Ok(8192));
            assert_eq!(scratch.engine.unlink(scratch.engine.root(), b"file"), Ok(()));
            assert_eq!(scratch.engine.write(&file, 8192, &[1; 4096], false), Ok(4096));
            assert_eq!(*limit.used.lock(), (12288, 1));
            drop(file);
            assert_eq!(*limit.used.lock(), (0, 0), "{pins}");
        }
    }

    #[test]
    fn what_a_quota_refuses_leaves_no_trace() {
        let limit = Limit::new(8192, 2);
        let mut scratch = Scratch::new("refused");
        // The files of the layer belong to root, so that a copy needs no record: that may take a block.
        let mut spec = scratch.spec();
        let root = |outside| vec![IdExtent { inside: 0, outside, count: 1 }];
        spec.layers[0].owners = Owners::Translated {
            uids: root(rustix::process::geteuid().as_raw()),
            gids: root(rustix::process::getegid().as_raw()),
        };
        scratch.engine = Engine::open(&spec).expect("an overlay");
        scratch.engine.set_hooks(Hooks { quota: Some(limit.clone()), ..Hooks::default() });
        let (engine, root) = (&scratch.engine, scratch.engine.root());
        std::fs::write(scratch.dir.join("lower/large"), [1; 12288]).expect("written");
        std::fs::write(scratch.dir.join("lower/small"), [1; 4096]).expect("written");
        let file = scratch.make(b"file", Kind::File);
        assert_eq!(engine.write(&file, 0, &[1; 8192], false), Ok(8192));
        // In full: what is there can be changed, and holes cost nothing.
        assert_eq!(engine.write(&file, 4000, &[2; 4000], false), Ok(4000));
        let longer = crate::setattr::SetAttr { size: Some(1 << 30), ..Default::default() };
        assert_eq!(engine.set_attr(&file, longer).map(|attr| attr.stat.size), Ok(1 << 30));
        assert_eq!(engine.write(&file, 1 << 29, &[1], false), Err(Errno::NOSPC));
        assert_eq!(engine.fallocate(&file, 0, 0, 1 << 20, false), Err(Errno::NOSPC));
        let look = |name: &str| engine.lookup(root, name.as_bytes()).expect("found");
        for name in ["large", "small"] {
            assert_eq!(engine.write(&look(name), 0, b"x", false), Err(Errno::NOSPC));
        }
        assert_eq!(on_disk(&scratch.dir), (8192, 1));
        // Removing works, and makes room.
        assert_eq!(engine.unlink(root, b"large"), Ok(()));
        let shorter = crate::setattr::SetAttr { size: Some(4096), ..Default::default() };
        assert_eq!(engine.set_attr(&file, shorter).map(|attr| attr.stat.size), Ok(4096));
        assert_eq!(engine.write(&look("small"), 0, b"x", false), Ok(1));
        let new = |kind| crate::create::NewObject {
            kind,
            perm: 0o755,
            umask: 0,
            rdev: (0, 0),
            target: b"x",
            owner: (0, 0),
        };
        for kind in [Kind::File, Kind::Dir, Kind::Symlink, Kind::Fifo] {
            assert_eq!(engine.create(root, b"more", &new(kind)).map(drop), Err(Errno::DQUOT));
        }
        let shown = engine.stat_fs().expect("shown");
        let unit = shown.f_frsize;
        assert_eq!((shown.f_blocks * unit, shown.f_bavail, shown.f_files, shown.f_favail), (8192, 0, 2, 0));
        assert_eq!(*limit.used.lock(), on_disk(&scratch.dir));
    }

    #[derive(Debug, Default)]
    struct Seen(Mutex<Vec<Access>>);

    impl Trace for Seen {
        fn accessed(&self, access: Access) {
            self.0.lock().push(access);
        }
    }

    #[test]
    fn a_trace_tells_what_is_used_of_the_layers() {
        let mut scratch = Scratch::new("trace");
        let seen = Arc::new(Seen::default());
        scratch.engine.set_hooks(Hooks { trace: Some(seen.clone()), ..Hooks::default() });
        std::fs::create_dir(scratch.dir.join("lower/dir")).expect("made");
        for name in ["dir/file", "other"] {
            std::fs::write(scratch.dir.join("lower").join(name), "text").expect("written");
        }
        let (engine, root) = (&scratch.engine, scratch.engine.root());
        scratch.make(b"new", Kind::File);
        let dir = engine.lookup(root, b"dir").expect("found");
        assert!(engine.lookup(&dir, b"missing").is_err() && engine.lookup(root, b"new").is_ok());
        let file = engine.lookup(&dir, b"file").expect("found");
        let mut buf = [0; 4];
        for _ in 0..2 {
            assert_eq!(engine.read(&file, 0, &mut buf), Ok(4));
        }
        assert_eq!(engine.read_dir(root, 2, 9).map(|entries| entries.len()), Ok(3));
        let access = |path: &str, kind| Access { layer: 0, path: path.into(), kind };
        use AccessKind::{Listed, LookedUp, Opened};
        let wanted = [
            access("dir", LookedUp),
            access("dir/file", LookedUp),
            access("dir/file", Opened),
            access("", Listed),
        ];
        assert_eq!(*seen.0.lock(), wanted);
    }

    #[test]
    fn writes_take_what_is_new() {
        let file = |size, blocks| Stat { size, blocks, ..Stat::default() };
        // Dense: only what is beyond the end.
        assert_eq!(most_of_write(&file(8192, 16), 0, 8192), 0);
        assert_eq!(most_of_write(&file(5000, 16), 4096, 4096), 0);
        assert_eq!(most_of_write(&file(8192, 16), 4096, 8192), 4096);
        assert_eq!(most_of_write(&file(8192, 16), 1 << 20, 1), 4096);
        // With holes: all of it may be new.
        assert_eq!(most_of_write(&file(8192, 8), 4095, 2), 8192);
        assert_eq!(most_of_write(&file(1, 0), u64::MAX, 1), u64::MAX - (u64::MAX / 4096 * 4096));
    }
}
