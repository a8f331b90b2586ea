//! The least that any FUSE server does, as a contender: one thread that answers from memory, with no layer and no upper
//! below it. What it does not reach of the kernel's overlay is the price of the protocol and of waking a process, and
//! nobody's to win. The whole tree is read before the mount is there, and nothing is written back; what the kernel
//! forgets stays.
//!
//! It asks the kernel for what ours asks for (`src/fs.rs`): names, missing names and attributes are valid for ever, OPEN,
//! OPENDIR, CREATE and FLUSH never come, written pages stay in the kernel, directories are cached, and attributes
//! come with the listing. It does only what the works need: regular files and directories with one name each.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, ReplyXattr, Request, SessionACL,
    TimeOrNow, WriteFlags,
};
use nix::sched::{CpuSet, sched_getcpu, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

/// "For ever", and the largest read and write, as ours says them.
const TTL: Duration = Duration::from_secs(1 << 30);
const MAX_IO: u32 = 1 << 20;

const GENERATION: Generation = Generation(0);

/// The number 0 of it says that there is no such name.
const NOTHING: FileAttr = FileAttr {
    ino: INodeNo(0),
    size: 0,
    blocks: 0,
    atime: SystemTime::UNIX_EPOCH,
    mtime: SystemTime::UNIX_EPOCH,
    ctime: SystemTime::UNIX_EPOCH,
    crtime: SystemTime::UNIX_EPOCH,
    kind: FileType::RegularFile,
    perm: 0,
    nlink: 0,
    uid: 0,
    gid: 0,
    rdev: 0,
    blksize: 4096,
    flags: 0,
};

/// The time as the kernel stamps files with it. A later one than its own it would take for a change, and the next write
/// for another, of which it tells by one more SETATTR.
fn now() -> SystemTime {
    let now = clock_gettime(ClockId::CLOCK_REALTIME_COARSE).unwrap();
    SystemTime::UNIX_EPOCH + Duration::from(now)
}

/// Binds this process, and what it starts from now on, to the processor that it is on: asker and server wake each
/// other nowhere at less cost (docs/decisions/0009).
pub(crate) fn stay_here() {
    let mut here = CpuSet::new();
    here.set(sched_getcpu().unwrap()).unwrap();
    sched_setaffinity(Pid::from_raw(0), &here).unwrap();
}

/// A tree in memory.
pub(crate) struct Tree {
    /// That of number 1, the root, is the first.
    nodes: Vec<Node>,
}

struct Node {
    attr: FileAttr,
    /// Of a file.
    data: Vec<u8>,
    /// Of a directory.
    entries: Entries,
}

#[derive(Default)]
struct Entries {
    parent: u64,
    places: HashMap<OsString, usize>,
    /// A place is used once: a listing goes on where it was.
    list: Vec<Option<(OsString, u64)>>,
}

impl Tree {
    /// Reads what is below a directory. On a thread that ends with it, so that its time is not taken for the server's.
    pub(crate) fn read(dir: &Path) -> Self {
        let load = || {
            let mut tree = Self { nodes: Vec::new() };
            tree.nodes.push(Node::new(attr_of(1, &dir.metadata().unwrap()), 1));
            tree.read_below(dir, 1);
            tree
        };
        std::thread::scope(|scope| scope.spawn(load).join().unwrap())
    }

    fn read_below(&mut self, dir: &Path, ino: u64) {
        for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let (path, meta) = (entry.path(), entry.metadata().unwrap());
            let child = self.add(ino, &entry.file_name(), |child| attr_of(child, &meta));
            if meta.is_dir() {
                self.read_below(&path, child);
            } else {
                assert!(meta.is_file(), "{} is neither file nor directory", path.display());
                self.node(child).data = std::fs::read(&path).unwrap();
            }
        }
    }

    fn node(&mut self, ino: u64) -> &mut Node {
        &mut self.nodes[usize::try_from(ino).unwrap() - 1]
    }

    fn find(&mut self, parent: u64, name: &OsStr) -> Option<u64> {
        let entries = &self.node(parent).entries;
        let place = *entries.places.get(name)?;
        entries.list[place].as_ref().map(|(_, ino)| *ino)
    }

    /// A new node with a name.
    fn add(&mut self, parent: u64, name: &OsStr, attr: impl FnOnce(u64) -> FileAttr) -> u64 {
        let ino = self.nodes.len() as u64 + 1;
        self.nodes.push(Node::new(attr(ino), parent));
        self.link(parent, name, ino);
        ino
    }

    fn link(&mut self, parent: u64, name: &OsStr, ino: u64) {
        let entries = &mut self.node(parent).entries;
        entries.places.insert(name.to_owned(), entries.list.len());
        entries.list.push(Some((name.to_owned(), ino)));
    }

    fn unlink(&mut self, parent: u64, name: &OsStr) -> Option<u64> {
        let entries = &mut self.node(parent).entries;
        let place = entries.places.remove(name)?;
        entries.list[place].take().map(|(_, ino)| ino)
    }

    /// As link counts and times are when a name has come or gone.
    fn touch(&mut self, parent: u64, kind: FileType, more: bool) {
        let at = now();
        let attr = &mut self.node(parent).attr;
        (attr.mtime, attr.ctime) = (at, at);
        match (kind, more) {
            (FileType::Directory, true) => attr.nlink += 1,
            (FileType::Directory, false) => attr.nlink -= 1,
            _ => {}
        }
    }

    fn make(&mut self, parent: u64, name: &OsStr, kind: FileType, perm: u32, req: &Request) -> FileAttr {
        let at = now();
        let ino = self.add(parent, name, |ino| FileAttr {
            ino: INodeNo(ino),
            atime: at,
            mtime: at,
            ctime: at,
            kind,
            perm: u16::try_from(perm & 0o7777).unwrap(),
            nlink: if kind == FileType::Directory { 2 } else { 1 },
            uid: req.uid(),
            gid: req.gid(),
            ..NOTHING
        });
        self.touch(parent, kind, true);
        self.node(ino).attr
    }

    fn remove(&mut self, parent: u64, name: &OsStr, kind: FileType) -> Result<(), Errno> {
        let ino = self.find(parent, name).ok_or(Errno::ENOENT)?;
        if !self.node(ino).entries.places.is_empty() {
            return Err(Errno::ENOTEMPTY);
        }
        self.unlink(parent, name);
        self.touch(parent, kind, false);
        self.node(ino).attr.nlink = 0;
        Ok(())
    }

    fn rename(&mut self, (from, name): (u64, &OsStr), (to, new_name): (u64, &OsStr)) -> Result<(), Errno> {
        let ino = self.unlink(from, name).ok_or(Errno::ENOENT)?;
        let kind = self.node(ino).attr.kind;
        self.touch(from, kind, false);
        if let Some(old) = self.unlink(to, new_name) {
            self.touch(to, kind, false);
            self.node(old).attr.nlink = 0;
        }
        self.link(to, new_name, ino);
        self.touch(to, kind, true);
        let moved = self.node(ino);
        (moved.attr.ctime, moved.entries.parent) = (now(), to);
        Ok(())
    }

    /// Gives entries with the position behind each, until there is no room for one.
    fn list(&mut self, ino: u64, offset: u64, mut add: impl FnMut(u64, &OsStr, &FileAttr) -> bool) {
        let parent = self.node(ino).entries.parent;
        for (next, name, ino) in [(1, ".", ino), (2, "..", parent)] {
            if next > offset && add(next, name.as_ref(), &self.node(ino).attr) {
                return;
            }
        }
        let first = usize::try_from(offset.saturating_sub(2)).unwrap();
        let entries = &self.nodes[usize::try_from(ino).unwrap() - 1].entries;
        for (place, entry) in entries.list.iter().enumerate().skip(first) {
            let Some((name, ino)) = entry else { continue };
            let attr = &self.nodes[usize::try_from(*ino).unwrap() - 1].attr;
            if add(place as u64 + 3, name, attr) {
                return;
            }
        }
    }
}

impl Node {
    fn new(attr: FileAttr, parent: u64) -> Self {
        Self { attr, data: Vec::new(), entries: Entries { parent, ..Entries::default() } }
    }

    fn resize(&mut self, size: usize) {
        self.data.resize(size, 0);
        (self.attr.size, self.attr.blocks) = (size as u64, size.div_ceil(512) as u64);
    }
}

fn attr_of(ino: u64, meta: &std::fs::Metadata) -> FileAttr {
    FileAttr {
        ino: INodeNo(ino),
        size: meta.size(),
        blocks: meta.blocks(),
        atime: meta.accessed().unwrap(),
        mtime: meta.modified().unwrap(),
        ctime: SystemTime::UNIX_EPOCH + Duration::new(meta.ctime().try_into().unwrap(), 0),
        kind: if meta.is_dir() { FileType::Directory } else { FileType::RegularFile },
        perm: u16::try_from(meta.mode() & 0o7777).unwrap(),
        nlink: meta.nlink().try_into().unwrap(),
        uid: meta.uid(),
        gid: meta.gid(),
        ..NOTHING
    }
}

/// The file system that fuser drives.
struct Least(Mutex<Tree>);

/// Serves a tree until the mount is gone. It can be used from `ready` on.
pub(crate) fn serve(tree: Tree, fuse: OwnedFd, ready: impl FnOnce()) {
    let mut config = fuser::Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(1);
    let session = fuser::Session::from_fd(Least(Mutex::new(tree)), fuse, SessionACL::All, config).unwrap();
    ready();
    session.run().unwrap();
}

impl Least {
    fn tree(&self) -> MutexGuard<'_, Tree> {
        self.0.lock().unwrap()
    }
}

fn entry(reply: ReplyEntry, attr: &FileAttr) {
    reply.entry(&TTL, attr, GENERATION);
}

fn done(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(err) => reply.error(err),
    }
}

fn time_of(time: TimeOrNow) -> SystemTime {
    match time {
        TimeOrNow::Now => now(),
        TimeOrNow::SpecificTime(time) => time,
    }
}

impl Filesystem for Least {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let wanted = InitFlags::FUSE_ASYNC_READ
            | InitFlags::FUSE_BIG_WRITES
            | InitFlags::FUSE_DONT_MASK
            | InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_READDIRPLUS_AUTO
            | InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_NO_OPEN_SUPPORT
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_MAX_PAGES
            | InitFlags::FUSE_NO_OPENDIR_SUPPORT
            | InitFlags::FUSE_HANDLE_KILLPRIV_V2
            | InitFlags::FUSE_WRITEBACK_CACHE
            | InitFlags::FUSE_CACHE_SYMLINKS
            | InitFlags::FUSE_POSIX_ACL;
        config.add_capabilities(wanted).expect("a kernel that offers what ours uses");
        config.set_max_write(MAX_IO).unwrap();
        // The error gives the most that there is.
        if let Err(possible) = config.set_max_readahead(MAX_IO) {
            config.set_max_readahead(possible).unwrap();
        }
        config.set_max_background(64).unwrap();
        config.set_congestion_threshold(48).unwrap();
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let mut tree = self.tree();
        match tree.find(parent.0, name) {
            Some(ino) => entry(reply, &tree.node(ino).attr),
            None => entry(reply, &NOTHING),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.tree().node(ino.0).attr);
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut tree = self.tree();
        let node = tree.node(ino.0);
        if let Some(size) = size {
            node.resize(usize::try_from(size).unwrap());
        }
        let attr = &mut node.attr;
        attr.perm = mode.map_or(attr.perm, |mode| u16::try_from(mode & 0o7777).unwrap());
        attr.uid = uid.unwrap_or(attr.uid);
        attr.gid = gid.unwrap_or(attr.gid);
        attr.atime = atime.map_or(attr.atime, time_of);
        attr.mtime = mtime.map_or(attr.mtime, time_of);
        attr.ctime = now();
        reply.attr(&TTL, attr);
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        entry(reply, &self.tree().make(parent.0, name, FileType::RegularFile, mode & !umask, req));
    }

    fn mkdir(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        entry(reply, &self.tree().make(parent.0, name, FileType::Directory, mode & !umask, req));
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        done(reply, self.tree().remove(parent.0, name, FileType::RegularFile));
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        done(reply, self.tree().remove(parent.0, name, FileType::Directory));
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if flags != RenameFlags::empty() {
            return reply.error(Errno::EINVAL);
        }
        done(reply, self.tree().rename((parent.0, name), (newparent.0, newname)));
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.error(Errno::ENOSYS);
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.error(Errno::ENOSYS);
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut tree = self.tree();
        let data = &tree.node(ino.0).data;
        let start = usize::try_from(offset).unwrap().min(data.len());
        let end = data.len().min(start + size as usize);
        reply.data(&data[start..end]);
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut tree = self.tree();
        let node = tree.node(ino.0);
        let start = usize::try_from(offset).unwrap();
        let end = start + data.len();
        if end > node.data.len() {
            node.resize(end);
        }
        node.data[start..end].copy_from_slice(data);
        reply.written(data.len().try_into().unwrap());
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        self.tree().list(ino.0, offset, |next, name, attr| reply.add(attr.ino, next, attr.kind, name));
        reply.ok();
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        self.tree()
            .list(ino.0, offset, |next, name, attr| reply.add(attr.ino, next, name, &TTL, attr, GENERATION));
        reply.ok();
    }

    /// Never `ENOSYS`, after which the kernel would not ask again: an overlay has extended attributes.
    fn getxattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENODATA);
    }

    fn listxattr(&self, _req: &Request, _ino: INodeNo, size: u32, reply: ReplyXattr) {
        if size == 0 { reply.size(0) } else { reply.data(&[]) }
    }
}
