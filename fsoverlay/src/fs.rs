//! The FUSE side: decodes a request, calls the engine, replies. Nothing is decided here.
//!
//! What the kernel is told to do by itself, because each request costs as much as a dozen
//! system calls (all of it needs one fact: nobody but this mount changes the upper, and
//! layers do not change; where they do, see [`crate::live`]):
//!
//! - names, missing names and attributes are valid for ever;
//! - OPEN, OPENDIR, CREATE, FLUSH are answered `ENOSYS` once and never come again: a file
//!   is made by MKNOD, and every descriptor of a file, made before or after a copy-up,
//!   reads and writes the same pages. So descriptors and shared mappings from before a
//!   copy-up see later writes. (Never together with `ATOMIC_O_TRUNC`.) [`crate::passthrough`] wants
//!   OPEN and CREATE instead, and no writeback cache;
//! - written pages stay in the kernel until they are flushed (writeback cache): the
//!   kernel knows size and modification time best, and appends by itself;
//! - directory contents and link targets are cached; lookups run in parallel.
//!
//! The kernel checks permissions (`default_permissions`) and ACLs, keeps locks by itself
//! (there is one mount), and leaves to us the umask (because of default ACLs) and taking
//! away set*id bits (see [`takes_set_ids`]).
//!
//! When and on which thread a request is served is [`crate::dispatch`]'s.

use std::borrow::Cow;
use std::cell::RefCell;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use rustix::fs::XattrFlags;

use crate::attr::{Attr, Kind, Time};
use crate::create::NewObject;
use crate::data::bytes_of;
use crate::dispatch::{Seek, Shared, asked_by};
use crate::engine::Engine;
use crate::errno::{Errno, FAR, LONG, Res, hurried};
use crate::hooks::{Direction, Opcode, add};
use crate::inode::Node;
use crate::open::wanted;
use crate::passthrough::{CAPABILITY, Privilege};
use crate::rename::How;
use crate::setattr::{SetAttr, SetTime};

/// "For ever" in a form that no kernel arithmetic overflows.
pub(crate) const TTL: Duration = Duration::from_secs(1 << 30);

/// The largest read and write.
const MAX_IO: u32 = 1 << 20;

pub(crate) const GENERATION: Generation = Generation(0);

thread_local! {
    /// The bytes of a READ on their way out.
    static READ_BUF: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// The file system that fuser drives.
#[derive(Debug, Clone)]
pub(crate) struct FuseFs {
    pub(crate) shared: Arc<Shared>,
}

/// What the kernel is told.
pub(crate) fn errno(err: Errno) -> fuser::Errno {
    // Our own word for it is not for the payload.
    let err = if err == FAR { Errno::IO } else { err };
    fuser::Errno::from_i32(err.raw_os_error())
}

pub(crate) fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::File => FileType::RegularFile,
        Kind::Dir => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::Char => FileType::CharDevice,
        Kind::Block => FileType::BlockDevice,
    }
}

/// The kernel's `new_encode_dev`.
fn encode_dev((major, minor): (u32, u32)) -> u32 {
    minor & 0xff | (major & 0xfff) << 8 | (minor & 0xf_ff00) << 12
}

fn decode_dev(dev: u32) -> (u32, u32) {
    ((dev & 0xf_ff00) >> 8, dev & 0xff | dev >> 12 & 0xf_ff00)
}

pub(crate) fn file_attr(Attr { ino, meta, stat }: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(*ino),
        size: stat.size,
        blocks: stat.blocks,
        atime: stat.atime.to_system(),
        mtime: stat.mtime.to_system(),
        ctime: stat.ctime.to_system(),
        crtime: SystemTime::UNIX_EPOCH,
        kind: file_type(meta.kind),
        perm: u16::try_from(meta.perm & 0o7777).unwrap_or(0),
        nlink: stat.nlink,
        uid: meta.uid,
        gid: meta.gid,
        rdev: encode_dev(meta.rdev),
        blksize: stat.blksize,
        flags: 0,
    }
}

/// The answer "there is no such name, and there will be none": number 0 with a TTL.
pub(crate) fn no_entry() -> FileAttr {
    FileAttr {
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
        blksize: 0,
        flags: 0,
    }
}

impl FuseFs {
    pub(crate) fn engine(&self) -> &Engine {
        &self.shared.engine
    }

    /// Answers a lookup.
    fn look<R: Send + 'static>(
        &self,
        parent: INodeNo,
        name: &OsStr,
        reply: R,
        send: impl Fn(Res<Told>, R) + Copy + Send + Sync + 'static,
    ) {
        let now = |fs: &Self| {
            let found =
                fs.engine().node(parent.0).and_then(|dir| fs.engine().lookup_known(&dir, bytes_of(name)));
            match found {
                Ok((node, attr)) => {
                    let ttls = node.map(|node| (fs.attr_ttl(&node), fs.ttl(&node)));
                    let (attr_ttl, ttl) = ttls.unwrap_or((TTL, TTL));
                    Ok(Told { attr: file_attr(&attr), attr_ttl, ttl, uncounted: None })
                }
                Err(err) => fs.missing(parent, err),
            }
        };
        // Nobody may want the answer any more when it is there.
        let again = || {
            let name = name.to_owned();
            move |fs: &Self| {
                let found =
                    fs.engine().node(parent.0).and_then(|dir| fs.engine().lookup_attr(&dir, bytes_of(&name)));
                match found {
                    Ok((node, attr)) => Ok(fs.found(node, &attr)),
                    Err(err) => fs.missing(parent, err),
                }
            }
        };
        self.serve(Opcode::Lookup, parent, reply, send, now, again);
    }

    /// What a lookup that failed tells the kernel.
    fn missing(&self, parent: INodeNo, err: Errno) -> Res<Told> {
        if err != Errno::NOENT {
            return Err(err);
        }
        let ttl = self.ttl_of_missing(parent);
        Ok(Told { attr: no_entry(), attr_ttl: ttl, ttl, uncounted: None })
    }

    /// What tells the kernel of a node.
    fn found(&self, node: Arc<Node>, attr: &Attr) -> Told {
        let (attr_ttl, ttl) = (self.attr_ttl(&node), self.ttl(&node));
        Told { attr: file_attr(attr), attr_ttl, ttl, uncounted: Some(node) }
    }

    /// How long the kernel may keep the attributes of a node. Those of a far mount's root may be made up.
    pub(crate) fn attr_ttl(&self, node: &Node) -> Duration {
        let unseen =
            || self.engine().passthrough.as_ref().is_some_and(|files| files.changes_unseen(node.ino));
        if node.is_far_root() || unseen() {
            return Duration::ZERO;
        }
        self.ttl(node)
    }

    /// How long the kernel may keep what it is told of a node.
    pub(crate) fn ttl(&self, node: &Node) -> Duration {
        self.engine().lasting(node).unwrap_or(TTL)
    }

    /// How long it may keep that a name is missing in a directory.
    fn ttl_of_missing(&self, dir: INodeNo) -> Duration {
        let lasting = || self.engine().lasting_names(&*self.engine().node(dir.0).ok()?);
        self.engine().live.and_then(|_| lasting()).unwrap_or(TTL)
    }

    pub(crate) fn make(&self, parent: INodeNo, name: &OsStr, new: &NewObject<'_>) -> Res<Told> {
        let parent = self.engine().node(parent.0)?;
        let (node, attr) = self.engine().create_attr(&parent, bytes_of(name), new)?;
        Ok(self.found(node, &attr))
    }

    /// Runs a change of a file's content. Its reply holds no attributes: if the mode changed with it,
    /// the kernel must not go on with the one it knows.
    fn change_content<T>(
        &self,
        ino: INodeNo,
        kill: bool,
        change: impl FnOnce(&Arc<Node>) -> Res<T>,
    ) -> Res<T> {
        self.on(ino, |node| {
            let perm = || node.inner.lock().meta.perm;
            let before = kill.then(perm);
            let done = change(node);
            if before.is_some_and(|before| before != perm()) {
                self.forget_attributes(ino);
            }
            done
        })
    }

    /// Makes the kernel ask for the attributes of a node when they are needed next.
    pub(crate) fn forget_attributes(&self, ino: INodeNo) {
        if let Some(notifier) = self.shared.notifier.get() {
            // A negative offset means the attributes alone, for which the kernel waits for nobody.
            let _ = notifier.inval_inode(ino, -1, 0);
        }
    }

    /// Answers a read, when a limit on rates lets it.
    fn serve_read<R: Send + 'static>(
        &self,
        ino: INodeNo,
        offset: u64,
        size: u32,
        reply: R,
        send: impl Fn(Res<&[u8]>, R) + Copy + Send + Sync + 'static,
    ) {
        self.run(Opcode::Read, ino, || match self.delay(Direction::Read, |_| size.into()) {
            None if self.leaves(Opcode::Read, size as usize) => {
                self.aside(Opcode::Read, ino, move |fs| fs.read_now(ino, offset, size, reply, send));
            }
            None => self.read_now(ino, offset, size, reply, send),
            Some(delay) => {
                let read = move |fs: &Self| fs.read_now(ino, offset, size, reply, send);
                self.delayed(Opcode::Read, ino, delay, read);
            }
        });
    }

    fn read_now<R: Send + 'static>(
        &self,
        ino: INodeNo,
        offset: u64,
        size: u32,
        reply: R,
        send: impl Fn(Res<&[u8]>, R) + Copy + Send + Sync + 'static,
    ) {
        if self.is_far(ino) {
            let read = move |fs: &Self| {
                let mut buf = Vec::new();
                let n = fs.read_into(&mut buf, ino, offset, size)?;
                buf.truncate(n);
                Ok(buf)
            };
            let send = move |data: Res<Vec<u8>>, reply| match data {
                Ok(data) => send(Ok(&data), reply),
                Err(err) => send(Err(err), reply),
            };
            return self.afar(Opcode::Read, ino, Some(self.engine().patience), reply, send, read);
        }
        READ_BUF.with_borrow_mut(|buf| {
            let read = self.read_into(buf, ino, offset, size);
            send(read.map(|n| &buf[..n]), reply);
        });
    }

    /// Answers a write, of bytes that are the worker's, when a limit on rates lets it.
    fn serve_write<R: Send + 'static>(
        &self,
        ino: INodeNo,
        data: &[u8],
        reply: R,
        send: impl Fn(Res<usize>, R) + Copy + Send + Sync + 'static,
        write: impl Fn(&Self, &[u8]) -> Res<usize> + Send + 'static,
    ) {
        self.run(Opcode::Write, ino, || {
            let delay = self.delay(Direction::Write, |_| data.len() as u64);
            if delay.is_none() && !self.leaves(Opcode::Write, data.len()) {
                return self.write_now(ino, data.into(), reply, send, write);
            }
            let data = data.to_vec();
            let write = move |fs: &Self| fs.write_now(ino, data.into(), reply, send, write);
            match delay {
                Some(delay) => self.delayed(Opcode::Write, ino, delay, write),
                None => self.aside(Opcode::Write, ino, write),
            }
        });
    }

    fn write_now<R: Send + 'static>(
        &self,
        ino: INodeNo,
        data: Cow<'_, [u8]>,
        reply: R,
        send: impl Fn(Res<usize>, R) + Copy + Send + Sync + 'static,
        write: impl Fn(&Self, &[u8]) -> Res<usize> + Send + 'static,
    ) {
        match hurried(|| write(self, &data)) {
            Err(LONG) => {
                let data = data.into_owned();
                self.aside(Opcode::Write, ino, move |fs| send(write(fs, &data), reply));
            }
            Err(FAR) => {
                let data = data.into_owned();
                self.afar(Opcode::Write, ino, None, reply, send, move |fs| write(fs, &data));
            }
            written => send(written, reply),
        }
    }

    /// Reads into a buffer that grows as it must; gives how much it holds.
    fn read_into(&self, buf: &mut Vec<u8>, ino: INodeNo, offset: u64, size: u32) -> Res<usize> {
        let size = size.min(MAX_IO) as usize;
        if buf.len() < size {
            buf.resize(size, 0);
        }
        let read = self.on(ino, |n| self.engine().read(n, offset, &mut buf[..size]))?;
        add(&self.engine().counts.read_bytes, read as u64);
        Ok(read)
    }

    /// Runs an operation on an object; see [`Shared::forget_names`].
    pub(crate) fn on<T>(&self, ino: INodeNo, operation: impl FnOnce(&Arc<Node>) -> Res<T>) -> Res<T> {
        let node = self.engine().node(ino.0)?;
        let done = operation(&node);
        if matches!(done, Err(Errno::STALE)) {
            self.shared.forget_names(&node);
        }
        done
    }
}

fn done(result: Res<()>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(err) => reply.error(errno(err)),
    }
}

/// Whether a change of a file's content by this requester takes its set*id bits away, as it does for
/// all but CAP_FSETID. The kernel's own flags for that (`FUSE_WRITE_KILL_SUIDGID` and its relatives)
/// ask for the capability in the initial namespace, where root of a sandbox has none; so they are
/// always set, and the number says who it is: ids are those of the mount's user namespace.
fn takes_set_ids(req: &Request) -> bool {
    req.uid() != 0
}

fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(time) => SetTime::At(Time::from_system(time)),
    }
}

impl Filesystem for FuseFs {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let wanted = [
            InitFlags::FUSE_ASYNC_READ,
            InitFlags::FUSE_BIG_WRITES,
            InitFlags::FUSE_DONT_MASK,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_NO_OPEN_SUPPORT,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_MAX_PAGES,
            InitFlags::FUSE_NO_OPENDIR_SUPPORT,
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
        ];
        // See `live`.
        let more: &[_] = match self.engine().live {
            None if self.engine().passthrough.is_some() => {
                &[InitFlags::FUSE_PASSTHROUGH, InitFlags::FUSE_CACHE_SYMLINKS]
            }
            None => &[InitFlags::FUSE_WRITEBACK_CACHE, InitFlags::FUSE_CACHE_SYMLINKS],
            Some(_) => &[InitFlags::FUSE_AUTO_INVAL_DATA],
        };
        let acl: &[_] = if self.engine().no_acl { &[] } else { &[InitFlags::FUSE_POSIX_ACL] };
        for flag in wanted.into_iter().chain(more.iter().copied()).chain(acl.iter().copied()) {
            if config.add_capabilities(flag).is_err() {
                tracing::debug!(?flag, "not offered by the kernel");
            }
        }
        if let Some(passthrough) = &self.engine().passthrough {
            let offered = config.capabilities().contains(InitFlags::FUSE_PASSTHROUGH);
            passthrough.offered.store(offered, Ordering::Release);
            // What files are passed to must not be stacked on something itself; this mount can be.
            let _ = config.set_max_stack_depth(1);
        }
        // The errors give the nearest value that is possible.
        if let Err(possible) = config.set_max_write(MAX_IO) {
            let _ = config.set_max_write(possible);
        }
        if let Err(possible) = config.set_max_readahead(MAX_IO) {
            let _ = config.set_max_readahead(possible);
        }
        let _ = config.set_max_background(64);
        let _ = config.set_congestion_threshold(48);
        Ok(())
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        asked_by(req);
        self.look(parent, name, reply, reply_found);
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.run(Opcode::Forget, ino, || self.shared.forget(ino, nlookup));
    }

    fn getattr(&self, req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        asked_by(req);
        let ask = move |fs: &Self| {
            fs.on(ino, |node| Ok((file_attr(&fs.engine().attr_now(node)?), fs.attr_ttl(node))))
        };
        let send = |got: Res<(FileAttr, Duration)>, reply: ReplyAttr| match got {
            Ok((attr, ttl)) => reply.attr(&ttl, &attr),
            Err(err) => reply.error(errno(err)),
        };
        self.serve(Opcode::GetAttr, ino, reply, send, ask, || ask);
    }

    fn setattr(
        &self,
        req: &Request,
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
        asked_by(req);
        let set = SetAttr {
            perm: mode,
            uid,
            gid,
            size,
            kill: takes_set_ids(req),
            atime: atime.map(set_time),
            mtime: mtime.map(set_time),
        };
        let send = |done: Res<(Attr, Duration)>, reply: ReplyAttr| match done {
            Ok((attr, ttl)) => reply.attr(&ttl, &file_attr(&attr)),
            Err(err) => reply.error(errno(err)),
        };
        self.answer(Opcode::SetAttr, ino, reply, send, move |fs| {
            fs.on(ino, |node| {
                // Until it is done.
                let _grant = match mode {
                    Some(mode) if mode & 0o6000 != 0 => fs.engine().grant(node, Privilege::SetIds)?,
                    _ => None,
                };
                let attr = fs.engine().set_attr(node, set)?;
                Ok((attr, fs.attr_ttl(node)))
            })
        });
    }

    fn readlink(&self, req: &Request, ino: INodeNo, reply: ReplyData) {
        asked_by(req);
        let read = move |fs: &Self| fs.on(ino, |n| fs.engine().read_link(n));
        self.serve(Opcode::ReadLink, ino, reply, reply_data, read, || read);
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        asked_by(req);
        let owner = (req.uid(), req.gid());
        let make = move |fs: &Self, name: &OsStr| {
            let kind =
                Kind::from_mode(mode).filter(|k| *k == Kind::File || k.is_special()).ok_or(Errno::INVAL)?;
            let rdev = if matches!(kind, Kind::Char | Kind::Block) { decode_dev(rdev) } else { (0, 0) };
            fs.make(parent, name, &NewObject { kind, perm: mode, umask, rdev, target: b"", owner })
        };
        self.serve_named(Opcode::MkNod, parent, name, reply, reply_found, make);
    }

    fn mkdir(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        asked_by(req);
        let owner = (req.uid(), req.gid());
        let make = move |fs: &Self, name: &OsStr| {
            let new = NewObject { kind: Kind::Dir, perm: mode, umask, rdev: (0, 0), target: b"", owner };
            fs.make(parent, name, &new)
        };
        self.serve_named(Opcode::MkDir, parent, name, reply, reply_found, make);
    }

    fn unlink(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        asked_by(req);
        let unlink = move |fs: &Self, name: &OsStr| {
            fs.engine().node(parent.0).and_then(|p| fs.engine().unlink(&p, bytes_of(name)))
        };
        self.serve_named(Opcode::Unlink, parent, name, reply, done, unlink);
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        asked_by(req);
        let rmdir = move |fs: &Self, name: &OsStr| {
            fs.engine().node(parent.0).and_then(|p| fs.engine().rmdir(&p, bytes_of(name)))
        };
        self.serve_named(Opcode::RmDir, parent, name, reply, done, rmdir);
    }

    fn symlink(&self, req: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        asked_by(req);
        let owner = (req.uid(), req.gid());
        let make = move |fs: &Self, name: &OsStr, target: &Path| {
            let target = bytes_of(target.as_os_str());
            let new = NewObject { kind: Kind::Symlink, perm: 0o777, umask: 0, rdev: (0, 0), target, owner };
            fs.make(parent, name, &new)
        };
        let again = || {
            let (name, target) = (name.to_owned(), target.to_owned());
            move |fs: &Self| make(fs, &name, &target)
        };
        self.serve(Opcode::Symlink, parent, reply, reply_found, |fs| make(fs, name, target), again);
    }

    fn rename(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        asked_by(req);
        let how = if flags == RenameFlags::empty() {
            How::Replace
        } else if flags == RenameFlags::RENAME_NOREPLACE {
            How::NoReplace
        } else if flags == RenameFlags::RENAME_EXCHANGE {
            How::Exchange
        } else {
            return self.run(Opcode::Rename, parent, || reply.error(fuser::Errno::EINVAL));
        };
        let (name, newname) = (name.to_owned(), newname.to_owned());
        self.answer(Opcode::Rename, parent, reply, done, move |fs| {
            let (from, to) = (fs.engine().node(parent.0)?, fs.engine().node(newparent.0)?);
            fs.engine().rename(&from, bytes_of(&name), &to, bytes_of(&newname), how)
        });
    }

    fn link(&self, req: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        asked_by(req);
        let newname = newname.to_owned();
        self.answer(Opcode::Link, ino, reply, reply_found, move |fs| {
            fs.on(ino, |node| {
                let parent = fs.engine().node(newparent.0)?;
                fs.engine().link(node, &parent, bytes_of(&newname))?;
                let attr = fs.engine().attr(node)?;
                Ok(fs.found(node.clone(), &attr))
            })
        });
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        asked_by(req);
        self.serve_open(ino, wanted(req, flags.0), reply);
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        asked_by(req);
        let new = NewObject {
            kind: Kind::File,
            perm: mode,
            umask,
            rdev: (0, 0),
            target: b"",
            owner: (req.uid(), req.gid()),
        };
        self.serve_create(parent, name, new, wanted(req, flags), reply);
    }

    fn release(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        asked_by(req);
        self.serve_release(ino, fh, reply);
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn opendir(&self, req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        asked_by(req);
        if self.engine().live.is_none() {
            return reply.error(fuser::Errno::ENOSYS);
        }
        self.run(Opcode::OpenDir, ino, || match self.engine().node(ino.0) {
            Ok(node) if self.engine().lasting_names(&node).is_some() => {
                reply.opened(FileHandle(0), FopenFlags::empty());
            }
            Ok(_) => {
                reply.opened(FileHandle(0), FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE);
            }
            Err(err) => reply.error(errno(err)),
        });
    }

    fn read(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        asked_by(req);
        self.serve_read(ino, offset, size, reply, reply_read);
    }

    fn write(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        asked_by(req);
        // Pages that are written back come without the flag and in nobody's name.
        let kill = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID) && takes_set_ids(req);
        let write = move |fs: &Self, data: &[u8]| {
            fs.change_content(ino, kill, |n| fs.engine().write(n, offset, data, kill))
        };
        self.serve_write(ino, data, reply, reply_written, write);
    }

    fn fsync(&self, req: &Request, ino: INodeNo, _fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        asked_by(req);
        if self.engine().is_volatile() {
            // Once said, it is for ever.
            return reply.error(fuser::Errno::ENOSYS);
        }
        self.answer(Opcode::Fsync, ino, reply, done, move |fs| fs.on(ino, |n| fs.engine().sync(n, datasync)));
    }

    fn fsyncdir(&self, req: &Request, ino: INodeNo, _fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        asked_by(req);
        if self.engine().is_volatile() {
            return reply.error(fuser::Errno::ENOSYS);
        }
        self.answer(Opcode::FsyncDir, ino, reply, done, move |fs| {
            fs.on(ino, |n| fs.engine().sync(n, datasync))
        });
    }

    fn readdir(&self, req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, reply: ReplyDirectory) {
        asked_by(req);
        self.serve_listing(ino, offset, reply);
    }

    fn readdirplus(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        asked_by(req);
        self.serve_listing_plus(ino, offset, reply);
    }

    fn statfs(&self, req: &Request, ino: INodeNo, reply: ReplyStatfs) {
        asked_by(req);
        self.run(Opcode::StatFs, ino, || match self.engine().stat_fs() {
            Ok(st) => {
                let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
                reply.statfs(
                    st.f_blocks,
                    st.f_bfree,
                    st.f_bavail,
                    st.f_files,
                    st.f_ffree,
                    small(st.f_bsize),
                    small(st.f_namemax.min(255)),
                    small(st.f_frsize),
                );
            }
            Err(err) => reply.error(errno(err)),
        });
    }

    fn setxattr(
        &self,
        req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        asked_by(req);
        let flags = XattrFlags::from_bits_truncate(flags.cast_unsigned());
        let caller = (req.uid(), req.gid());
        let (name, value) = (name.to_owned(), value.to_vec());
        self.answer(Opcode::SetXattr, ino, reply, done, move |fs| {
            fs.on(ino, |n| {
                let _grant = match bytes_of(&name) {
                    CAPABILITY => fs.engine().grant(n, Privilege::Capabilities)?,
                    _ => None,
                };
                fs.engine().set_xattr(n, bytes_of(&name), &value, flags, caller)
            })
        });
    }

    fn getxattr(&self, req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        asked_by(req);
        let get = move |fs: &Self, name: &OsStr| {
            fs.on(ino, |n| Ok((fs.engine().get_xattr(n, bytes_of(name))?, size)))
        };
        self.serve_named(Opcode::GetXattr, ino, name, reply, reply_xattr, get);
    }

    fn listxattr(&self, req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        asked_by(req);
        let list = move |fs: &Self| fs.on(ino, |n| Ok((fs.engine().list_xattr(n)?, size)));
        self.serve(Opcode::ListXattr, ino, reply, reply_xattr, list, || list);
    }

    fn removexattr(&self, req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        asked_by(req);
        let name = name.to_owned();
        self.answer(Opcode::RemoveXattr, ino, reply, done, move |fs| {
            fs.on(ino, |n| fs.engine().remove_xattr(n, bytes_of(&name)))
        });
    }

    fn fallocate(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        asked_by(req);
        let (mode, kill) = (mode.cast_unsigned(), takes_set_ids(req));
        self.answer(Opcode::Fallocate, ino, reply, done, move |fs| {
            fs.change_content(ino, kill, |n| fs.engine().fallocate(n, mode, offset, length, kill))
        });
    }

    fn lseek(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        asked_by(req);
        self.run(Opcode::Lseek, ino, || {
            let hole = match whence {
                libc::SEEK_DATA => false,
                libc::SEEK_HOLE => true,
                _ => return reply.error(fuser::Errno::EINVAL),
            };
            let Ok(offset) = u64::try_from(offset) else { return reply.error(fuser::Errno::ENXIO) };
            if self.is_far(ino) {
                return self.seek_far(ino, offset, hole, reply, reply_offset);
            }
            match self.engine().node(ino.0) {
                Ok(node) => self.seek_after_flush(Seek { node, offset, hole, reply }),
                Err(err) => reply.error(errno(err)),
            }
        });
    }

    fn ioctl(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        asked_by(req);
        // As of any file that has none: programs ask all files whether they are terminals.
        self.run(Opcode::Ioctl, ino, || reply.error(fuser::Errno::ENOTTY));
    }

    fn copy_file_range(
        &self,
        req: &Request,
        ino_in: INodeNo,
        _fh_in: FileHandle,
        offset_in: u64,
        ino_out: INodeNo,
        _fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        asked_by(req);
        let kill = takes_set_ids(req);
        let copy = move |fs: &Self| {
            fs.on(ino_in, |from| {
                fs.change_content(ino_out, kill, |to| {
                    fs.engine().copy_range((from, offset_in), (to, offset_out), len, kill)
                })
            })
        };
        // Many ask for as much as there is.
        let bytes = |fs: &Self| {
            let size = fs.on(ino_in, |from| fs.engine().stat(from)).map_or(0, |stat| stat.size);
            len.min(size.saturating_sub(offset_in))
        };
        match self.delay(Direction::Write, bytes) {
            None => self.answer(Opcode::CopyFileRange, ino_out, reply, reply_written, copy),
            Some(delay) => self.run(Opcode::CopyFileRange, ino_out, || {
                self.delayed(Opcode::CopyFileRange, ino_out, delay, move |fs| reply_written(copy(fs), reply));
            }),
        }
    }
}

/// What the kernel is told of a name: attributes (of nothing, if there is nothing), and how long they and the
/// name are valid.
pub(crate) struct Told {
    pub(crate) attr: FileAttr,
    attr_ttl: Duration,
    pub(crate) ttl: Duration,
    /// A node that the kernel learns of by this. It is counted when this is sent and not before, since the
    /// kernel forgets only what it was told.
    pub(crate) uncounted: Option<Arc<Node>>,
}

fn reply_found(told: Res<Told>, reply: ReplyEntry) {
    match told {
        Ok(told) => {
            if let Some(node) = &told.uncounted {
                node.remember();
            }
            reply.entry_with_ttls(&told.attr_ttl, &told.ttl, &told.attr, GENERATION);
        }
        Err(err) => reply.error(errno(err)),
    }
}

fn reply_data(data: Res<impl AsRef<[u8]>>, reply: ReplyData) {
    match data {
        Ok(data) => reply.data(data.as_ref()),
        Err(err) => reply.error(errno(err)),
    }
}

/// For bytes however long they live.
fn reply_read(data: Res<&[u8]>, reply: ReplyData) {
    reply_data(data, reply);
}

pub(crate) fn reply_offset(offset: Res<u64>, reply: ReplyLseek) {
    match offset {
        Ok(offset) => reply.offset(i64::try_from(offset).unwrap_or(i64::MAX)),
        Err(err) => reply.error(errno(err)),
    }
}

fn reply_written(written: Res<usize>, reply: ReplyWrite) {
    match written {
        Ok(n) => reply.written(u32::try_from(n).unwrap_or(u32::MAX)),
        Err(err) => reply.error(errno(err)),
    }
}

/// A value, and how much of one is wanted.
fn reply_xattr(value: Res<(Vec<u8>, u32)>, reply: ReplyXattr) {
    match value {
        Ok((value, 0)) => reply.size(u32::try_from(value.len()).unwrap_or(u32::MAX)),
        Ok((value, size)) if value.len() <= size as usize => reply.data(&value),
        Ok(_) => reply.error(fuser::Errno::ERANGE),
        Err(err) => reply.error(errno(err)),
    }
}

#[cfg(test)]
mod tests;
