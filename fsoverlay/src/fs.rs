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

use crate::ahead::Begun;
use crate::attr::{Attr, Kind, Time};
use crate::create::NewObject;
use crate::data::bytes_of;
use crate::dispatch::{Seek, Shared, asked_by};
use crate::engine::Engine;
use crate::errno::{Errno, FAR, LONG, Res, hurried};
use crate::hooks::{Direction, Opcode, add};
use crate::inode::Node;
use crate::listing::Entry;
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

fn file_type(kind: Kind) -> FileType {
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

fn file_attr(Attr { ino, meta, stat }: &Attr) -> FileAttr {
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
fn no_entry() -> FileAttr {
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
    fn attr_ttl(&self, node: &Node) -> Duration {
        let unseen =
            || self.engine().passthrough.as_ref().is_some_and(|files| files.changes_unseen(node.ino));
        if node.is_far_root() || unseen() {
            return Duration::ZERO;
        }
        self.ttl(node)
    }

    /// How long the kernel may keep what it is told of a node.
    fn ttl(&self, node: &Node) -> Duration {
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
        self.run(Opcode::Forget, ino, || self.engine().table.forget(ino.0, nlookup));
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
        self.run_listing(Opcode::ReadDir, ino, reply, move |fs, mut reply| {
            if fs.is_far(ino) {
                let list = move |fs: &Self| fs.engine().read_dir(&fs.engine().node(ino.0)?, offset, 256);
                let send = |batch: Res<Vec<_>>, mut reply: ReplyDirectory| match batch {
                    Ok(batch) => {
                        for (next, entry) in batch {
                            let entry: Entry = entry;
                            let name: &OsStr = std::os::unix::ffi::OsStrExt::from_bytes(&entry.name);
                            if reply.add(INodeNo(entry.ino), next, file_type(entry.kind), name) {
                                break;
                            }
                        }
                        reply.ok();
                    }
                    Err(err) => reply.error(errno(err)),
                };
                return fs.afar(Opcode::ReadDir, ino, Some(fs.engine().patience), reply, send, list);
            }
            let mut at = offset;
            loop {
                let batch = match fs.engine().node(ino.0).and_then(|n| fs.engine().read_dir(&n, at, 256)) {
                    Ok(batch) => batch,
                    Err(err) => return reply.error(errno(err)),
                };
                if batch.is_empty() {
                    return reply.ok();
                }
                for (next, entry) in batch {
                    let name = std::os::unix::ffi::OsStrExt::from_bytes(&entry.name);
                    let name: &OsStr = name;
                    if reply.add(INodeNo(entry.ino), next, file_type(entry.kind), name) {
                        return reply.ok();
                    }
                    at = next;
                }
            }
        });
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
        self.run_listing(Opcode::ReadDirPlus, ino, reply, move |fs, mut reply| {
            if fs.is_far(ino) {
                let send = |batch: Res<Batch>, mut reply: ReplyDirectoryPlus| match batch {
                    Ok(batch) => {
                        batch.add_to(&mut reply);
                        reply.ok();
                    }
                    Err(err) => reply.error(errno(err)),
                };
                let list = move |fs: &Self| fs.list_plus(ino, offset);
                return fs.afar(Opcode::ReadDirPlus, ino, Some(fs.engine().patience), reply, send, list);
            }
            let dir = match fs.engine().node(ino.0) {
                Ok(dir) => dir,
                Err(err) => return reply.error(errno(err)),
            };
            let mut begun = fs.engine().begin_listing(&dir);
            if let Err(err) = fs.fill_plus(&dir, offset, &mut begun, &mut reply) {
                return reply.error(errno(err));
            }
            fs.engine().pause_listing(&dir, &mut begun);
            reply.ok();
            if offset == 0 {
                fs.engine().look_ahead(&dir, &begun);
            }
        });
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

impl FuseFs {
    /// Answers with a piece of a directory, which may first have to be read as a whole, and which looks ahead.
    fn run_listing<R: Send + 'static>(
        &self,
        what: Opcode,
        ino: INodeNo,
        reply: R,
        list: impl FnOnce(&Self, R) + Send + 'static,
    ) {
        self.run(what, ino, || {
            if self.leaves(what, 0) {
                return self.aside(what, ino, move |fs| list(fs, reply));
            }
            list(self, reply);
        });
    }

    /// A few entries with their attributes.
    fn list_plus(&self, ino: INodeNo, offset: u64) -> Res<Batch> {
        let dir = self.engine().node(ino.0)?;
        let entries = self.engine().read_dir(&dir, offset, 32)?.into_iter().map(|(next, entry)| {
            let found = (next > 2).then(|| self.engine().lookup_attr(&dir, &entry.name));
            (next, entry, found)
        });
        Ok(Batch { fs: self.clone(), entries: entries.collect() })
    }

    /// Adds entries with their attributes, as many as there is room for.
    fn fill_plus(
        &self,
        dir: &Arc<Node>,
        mut offset: u64,
        begun: &mut Begun,
        reply: &mut ReplyDirectoryPlus,
    ) -> Res<()> {
        loop {
            let batch = self.engine().read_dir(dir, offset, 32)?;
            if batch.is_empty() {
                return Ok(());
            }
            for (next, entry) in batch {
                if self.add_plus(dir, next, &entry, begun, reply) {
                    begun.full = true;
                    return Ok(());
                }
                begun.told += usize::from(next > 2);
                offset = next;
            }
        }
    }

    /// Adds one entry with its attributes; true if there was no room for it.
    fn add_plus(
        &self,
        dir: &Arc<Node>,
        next: u64,
        entry: &Entry,
        begun: &mut Begun,
        reply: &mut ReplyDirectoryPlus,
    ) -> bool {
        if next <= 2 {
            return self.add_found(next, entry, None, reply);
        }
        let found = match self.engine().lookup_ready(dir, next, begun) {
            Some(attr) => Ok((None, attr)),
            None => self.engine().lookup_known(dir, &entry.name),
        };
        self.add_known(next, entry, found, reply)
    }

    fn add_known(
        &self,
        next: u64,
        entry: &Entry,
        found: Res<(Option<Arc<Node>>, Attr)>,
        reply: &mut ReplyDirectoryPlus,
    ) -> bool {
        let name: &OsStr = std::os::unix::ffi::OsStrExt::from_bytes(&entry.name);
        match found {
            Ok((node, attr)) => {
                let (ttl, attr_ttl) = node.map_or((TTL, TTL), |node| (self.ttl(&node), self.attr_ttl(&node)));
                // An entry has one time for its name and its attributes.
                let ttl = ttl.min(attr_ttl);
                let full = reply.add(INodeNo(attr.ino), next, name, &ttl, &file_attr(&attr), GENERATION);
                if full {
                    self.engine().table.forget(attr.ino, 1);
                }
                full
            }
            // Removed since, or unreachable: asking for it by name will say why.
            Err(err) => {
                tracing::debug!(?err, "an entry was left out of a listing");
                false
            }
        }
    }

    fn add_found(&self, next: u64, entry: &Entry, found: Looked, reply: &mut ReplyDirectoryPlus) -> bool {
        let name: &OsStr = std::os::unix::ffi::OsStrExt::from_bytes(&entry.name);
        let Some(found) = found else {
            // The kernel does not count these two as lookups.
            let attr = FileAttr { ino: INodeNo(entry.ino), kind: FileType::Directory, ..no_entry() };
            return reply.add(INodeNo(entry.ino), next, name, &TTL, &attr, GENERATION);
        };
        let found = found.map(|(node, attr)| {
            self.engine().table.remember(&node);
            (Some(node), attr)
        });
        self.add_known(next, entry, found, reply)
    }
}

/// What a lookup gave; `None` where none is needed.
type Looked = Option<Res<(Arc<Node>, Attr)>>;

/// Entries of a directory, looked up.
struct Batch {
    fs: FuseFs,
    entries: Vec<(u64, Entry, Looked)>,
}

impl Batch {
    fn add_to(self, reply: &mut ReplyDirectoryPlus) {
        for (next, entry, found) in self.entries {
            if self.fs.add_found(next, &entry, found, reply) {
                return;
            }
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
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Instant;

    use super::*;
    use crate::config::{LayerSpec, OverlaySpec};
    use crate::dispatch::MAX_ASIDE;
    use crate::engine::tests::Scratch;
    use crate::errno::set_gives_way;
    use crate::far::{Far, MAX_THREADS, MountTable};
    use crate::hooks::{Access, Hooks, RateLimit, Trace};
    use crate::passthrough::Wanted;
    use crate::sync::Mutex;
    use crate::sync::tests::{in_time, without_threads};

    const HOUR: Duration = Duration::from_secs(3600);

    /// Says when something below the far mount is found, and waits until it may be.
    #[derive(Debug)]
    struct Slow {
        found: Sender<()>,
        go_on: Mutex<Receiver<()>>,
    }

    impl Trace for Slow {
        fn accessed(&self, access: Access) {
            if access.path == Path::new("far/file") {
                let _ = self.found.send(());
                let _ = self.go_on.lock().recv();
            }
        }
    }

    /// A layer with a mount that may never answer, which is only a directory.
    struct BesideFar {
        fs: FuseFs,
        far: Arc<Far>,
        dir: Arc<Node>,
        found: Receiver<()>,
        go_on: Sender<()>,
        _scratch: Scratch,
    }

    impl BesideFar {
        fn new(name: &str) -> Self {
            Self::with(name, None)
        }

        fn with(name: &str, rate: Option<Arc<dyn RateLimit>>) -> Self {
            let scratch = Scratch::new(name);
            let lower = scratch.dir.canonicalize().expect("there").join("lower");
            std::fs::create_dir(lower.join("far")).expect("made");
            std::fs::write(lower.join("far/file"), "").expect("written");
            let table = format!("25 22 0:45 / {}/far rw - fuse.sshfs me@phone: rw", lower.display());
            let layer = LayerSpec { dir: lower, ..LayerSpec::default() };
            let spec = OverlaySpec {
                layers: vec![layer],
                passthrough: true,
                patience: Some(HOUR),
                ..OverlaySpec::default()
            };
            let mut engine =
                Engine::open_among(&MountTable::parse(table.as_bytes()), &spec).expect("an overlay");
            let ((tell, found), (go_on, wait)) = (channel(), channel());
            let slow = Slow { found: tell, go_on: Mutex::new(wait) };
            engine.set_hooks(Hooks { trace: Some(Arc::new(slow)), rate, ..Hooks::default() });
            let dir = engine.lookup(engine.root(), b"far").expect("found");
            let far = engine.far.first().expect("a far mount").clone();
            Self { fs: FuseFs { shared: Shared::new(engine) }, far, dir, found, go_on, _scratch: scratch }
        }

        /// Looks the file up; whether a reply of it was to be counted.
        fn look(&self) -> Receiver<Res<bool>> {
            let (reply, replied) = channel();
            let send = |told: Res<Told>, reply: Sender<_>| {
                let _ = reply.send(told.map(|told| told.uncounted.is_some()));
            };
            self.fs.look(INodeNo(self.dir.ino), OsStr::new("file"), reply, send);
            replied
        }
    }

    impl Drop for BesideFar {
        fn drop(&mut self) {
            self.fs.shared.stop();
        }
    }

    #[test]
    fn what_is_found_after_it_was_given_up_is_not_known_to_the_kernel() {
        let beside = BesideFar::new("given-up");
        let replied = beside.look();
        assert_eq!(beside.found.recv(), Ok(()));
        beside.far.give_up_late(Instant::now() + 2 * HOUR);
        assert_eq!(replied.recv(), Ok(Err(Errno::IO)));
        let _ = beside.go_on.send(());
        // The request's own reference goes last; the other one looks after those that may be given up.
        in_time(|| (Arc::strong_count(&beside.fs.shared) <= 2).then_some(()));
        let _ = beside.go_on.send(());
        let engine = beside.fs.engine();
        let ino = engine.lookup(&beside.dir, b"file").expect("found").ino;
        assert!(engine.table.get(ino).is_none(), "nobody would ever forget it");
    }

    #[test]
    fn who_gives_way_leaves_what_takes_long_to_others() {
        let scratch = Scratch::new("gives-way");
        let lower = scratch.dir.join("lower");
        for (name, size) in [("small", 1 << 10), ("large", 200 << 10)] {
            std::fs::write(lower.join(name), vec![1; size]).expect("written");
        }
        let deep: std::path::PathBuf = (0..9).map(|i| i.to_string()).collect();
        std::fs::create_dir_all(lower.join(&deep)).expect("made");
        for dir in ["0/1/2/3/4/5/6/7", "0/1/2/3/4/5/6/7/8"] {
            std::fs::write(lower.join(dir).join("small"), "").expect("written");
        }
        std::fs::write(lower.join("link"), "").expect("written");
        for i in 0..9 {
            std::fs::hard_link(lower.join("link"), lower.join(format!("link{i}"))).expect("linked");
        }
        let engine = Engine::open(&scratch.spec()).expect("an overlay");
        let fs = FuseFs { shared: Shared::new(engine) };
        let worker = std::thread::spawn(move || {
            set_gives_way();
            let me = std::thread::current().id();
            let (engine, root) = (fs.engine(), fs.engine().root());
            assert_eq!(hurried(|| engine.read_dir(root, 0, 9)).map(drop), Err(LONG));
            assert!(engine.read_dir(root, 0, 9).is_ok(), "it has time");
            let file = |name: &[u8]| engine.lookup(root, name).expect("found");
            assert_eq!(hurried(|| engine.copy_up(&file(b"small"))), Ok(()));
            assert_eq!(hurried(|| engine.copy_up(&file(b"large"))), Err(LONG));
            // Directories above, and names.
            let mut dir = root.clone();
            let new = |perm| NewObject {
                kind: Kind::File,
                perm,
                umask: 0,
                rdev: (0, 0),
                target: b"",
                owner: (0, 0),
            };
            let dirs: Vec<_> = (0..9)
                .map(|i: u8| {
                    dir = engine.lookup(&dir, i.to_string().as_bytes()).expect("found");
                    dir.clone()
                })
                .collect();
            let small = |dir| engine.lookup(dir, b"small").expect("found");
            assert_eq!(hurried(|| engine.copy_up(&small(&dirs[8]))), Err(LONG));
            assert_eq!(hurried(|| engine.create(&dirs[8], b"new", &new(0o600)).map(drop)), Err(LONG));
            assert_eq!(hurried(|| engine.unlink(&dirs[8], b"small")), Err(LONG));
            assert!(!dirs[0].is_upper(), "nothing has been done");
            assert_eq!(hurried(|| engine.copy_up(&small(&dirs[7]))), Ok(()));
            assert_eq!(hurried(|| engine.create(&dirs[8], b"new", &new(0o600)).map(drop)), Ok(()));
            let linked: Vec<_> = (0..9).map(|i| file(format!("link{i}").as_bytes())).collect();
            assert_eq!(hurried(|| engine.copy_up(&linked[0])), Err(LONG));
            // What a file loses.
            let grown = engine.create(root, b"grown", &new(0o600)).expect("made");
            let sized = |size| crate::setattr::SetAttr { size: Some(size), ..Default::default() };
            let resize = |size| hurried(|| engine.set_attr(&grown, sized(size)).map(|attr| attr.stat.size));
            assert_eq!([1 << 20, 1000 << 10, 0].map(resize), [Ok(1 << 20), Ok(1000 << 10), Err(LONG)]);
            assert!(engine.set_attr(&grown, sized(0)).is_ok(), "it has time");
            let (done, by) = channel();
            let answered = || by.recv_timeout(HOUR).expect("an answer");
            fs.run_listing(Opcode::ReadDir, INodeNo(root.ino), done.clone(), |_, done| {
                let _ = done.send(std::thread::current().id());
            });
            assert_ne!(answered(), me, "a listing");
            let ino = INodeNo(file(b"large").ino);
            let send =
                |_: Res<&[u8]>, done: Sender<_>| done.send(std::thread::current().id()).expect("asked");
            let read =
                |size: u64| fs.serve_read(ino, 0, u32::try_from(size).expect("small"), done.clone(), send);
            // (What is_much says of a thread that gives way.)
            let most = 128 << 10;
            read(most);
            assert_eq!(answered(), me);
            read(most + 1);
            assert_ne!(answered(), me, "much to read");
            let send =
                |_: Res<usize>, done: Sender<_>| done.send(std::thread::current().id()).expect("asked");
            let data = vec![0; usize::try_from(most).expect("small") + 1];
            let write = |data: &[u8]| fs.serve_write(ino, data, done.clone(), send, |_, data| Ok(data.len()));
            write(&data[1..]);
            assert_eq!(answered(), me);
            write(&data);
            assert_ne!(answered(), me, "much to write");
            fs.shared.stop();
        });
        worker.join().expect("no panic");
    }

    #[test]
    fn a_reader_of_a_far_file_is_not_kept_waiting() {
        let beside = BesideFar::new("open-far");
        let _ = beside.go_on.send(());
        let file = beside.fs.engine().lookup(&beside.dir, b"file").expect("found");
        let (release, gate) = channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        for _ in 0..MAX_THREADS {
            let gate = gate.clone();
            assert!(beside.far.run(move || {
                let _ = gate.lock().recv();
            }));
        }
        let (reply, replied) = channel();
        let send = |ready: Res<Arc<Node>>, reply: Sender<_>| {
            let _ = reply.send(ready.map(drop));
        };
        beside.fs.get_ready(INodeNo(file.ino), Wanted { write: false, uid: 0 }, reply, send);
        assert!(replied.try_recv().is_err(), "it does not wait for the far mount");
        beside.far.give_up_late(Instant::now() + 2 * HOUR);
        assert_eq!(replied.try_recv(), Ok(Err(Errno::IO)));
        drop(release);
    }

    #[test]
    fn where_too_much_waits_a_request_is_refused() {
        let beside = BesideFar::new("refused-far");
        let (release, gate) = channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        let (began, begun) = channel();
        let wait = || {
            let (began, gate) = (began.clone(), gate.clone());
            move || {
                let _ = began.send(());
                let _ = gate.lock().recv();
            }
        };
        // First one for each thread: none of them takes another from the queue then.
        for _ in 0..MAX_THREADS {
            assert!(beside.far.run(wait()));
        }
        for _ in 0..MAX_THREADS {
            assert_eq!(begun.recv(), Ok(()));
        }
        assert!((0..100_000).any(|_| !beside.far.run(wait())), "it is never full");
        assert_eq!(beside.look().recv(), Ok(Err(Errno::IO)));
        drop(release);
        let _ = beside.go_on.send(());
        // Those before it go, and there is room again.
        in_time(|| beside.far.run(|| {}).then_some(()));
        assert_eq!(beside.look().recv(), Ok(Ok(true)));
    }

    #[test]
    fn a_request_that_nobody_would_give_up_is_not_begun() {
        let beside = BesideFar::new("unwatched-far");
        // The mount's thread would take it in the end.
        let ((release, gate), (began, begun)) = (channel::<()>(), channel());
        assert!(beside.far.run(move || {
            let _ = began.send(());
            let _ = gate.recv();
        }));
        assert_eq!(begun.recv(), Ok(()));
        let replied = without_threads(|| beside.look());
        assert_eq!(in_time(|| replied.try_recv().ok()), Err(Errno::IO));
        // The next one has its threads.
        drop(release);
        let _ = beside.go_on.send(());
        assert_eq!(beside.look().recv(), Ok(Ok(true)));
        // So has one that the thread is there for, but not the mount's own.
        let other = BesideFar::new("threadless-far");
        other.fs.shared.prepare();
        let replied = without_threads(|| other.look());
        assert_eq!(in_time(|| replied.try_recv().ok()), Err(Errno::IO));
    }

    /// Holds back everything for a moment.
    #[derive(Debug)]
    struct Moment;

    impl RateLimit for Moment {
        fn delay(&self, _direction: Direction, _bytes: u64) -> Duration {
            Duration::from_nanos(1)
        }
    }

    #[test]
    fn a_read_that_was_held_back_can_be_given_up() {
        let beside = BesideFar::with("held-back-far", Some(Arc::new(Moment)));
        // One for the lookup, the other for a read that would not wait for the mount.
        let _ = (beside.go_on.send(()), beside.go_on.send(()));
        let engine = beside.fs.engine();
        let node = engine.lookup(&beside.dir, b"file").expect("found");
        let ((release, gate), (began, begun)) = (channel::<()>(), channel());
        let gate = Arc::new(Mutex::new(gate));
        for _ in 0..MAX_THREADS {
            let (began, gate) = (began.clone(), gate.clone());
            assert!(beside.far.run(move || {
                let _ = began.send(());
                let _ = gate.lock().recv();
            }));
        }
        for _ in 0..MAX_THREADS {
            assert_eq!(begun.recv(), Ok(()));
        }
        let (reply, replied) = channel();
        let send = |data: Res<&[u8]>, reply: Sender<_>| {
            let _ = reply.send(data.map(<[u8]>::len));
        };
        beside.fs.serve_read(INodeNo(node.ino), 0, 16, reply, send);
        let answer = in_time(|| {
            beside.far.give_up_late(Instant::now() + 2 * HOUR);
            replied.try_recv().ok()
        });
        assert_eq!(answer, Err(Errno::IO));
        drop(release);
    }

    /// Waits before it lets anything but the first into the upper.
    #[derive(Debug)]
    struct SlowQuota {
        first: std::sync::atomic::AtomicBool,
        asked: Sender<()>,
        go_on: Mutex<Receiver<()>>,
    }

    impl crate::hooks::Quota for SlowQuota {
        fn reserve(&self, _most: crate::hooks::Usage) -> Result<(), crate::hooks::Refusal> {
            if !self.first.swap(false, Ordering::AcqRel) {
                let _ = self.asked.send(());
                let _ = self.go_on.lock().recv();
            }
            Ok(())
        }

        fn settle(&self, _reserved: crate::hooks::Usage, _growth: crate::hooks::Growth) {}
    }

    #[test]
    fn nobody_waits_for_the_directories_of_a_far_file_that_is_copied_up() {
        let scratch = Scratch::new("far-parents");
        let lower = scratch.dir.canonicalize().expect("there").join("lower");
        std::fs::create_dir_all(lower.join("far/sub")).expect("made");
        std::fs::write(lower.join("far/sub/file"), "x").expect("written");
        let table = format!("25 22 0:45 / {}/far rw - fuse.sshfs me@phone: rw", lower.display());
        let spec = OverlaySpec {
            layers: vec![LayerSpec { dir: lower, ..LayerSpec::default() }],
            patience: Some(HOUR),
            ..scratch.spec()
        };
        let mut engine = Engine::open_among(&MountTable::parse(table.as_bytes()), &spec).expect("an overlay");
        let ((asked, is_asked), (go_on, wait)) = (channel(), channel());
        let quota = Arc::new(SlowQuota { first: true.into(), asked, go_on: Mutex::new(wait) });
        engine.set_hooks(Hooks { quota: Some(quota), ..Hooks::default() });
        let mut file = engine.root().clone();
        for name in ["far", "sub", "file"] {
            file = engine.lookup(&file, name.as_bytes()).expect("found");
        }
        let set = crate::setattr::SetAttr { perm: Some(0o600), ..Default::default() };
        let settled = std::thread::scope(|scope| {
            let changed = scope.spawn(|| engine.set_attr(&file, set).map(|attr| attr.meta.perm));
            let settled = ["far", "sub"].map(|_| {
                assert_eq!(is_asked.recv(), Ok(()));
                let settled = file.names.settled().is_some();
                let _ = go_on.send(());
                settled
            });
            drop(go_on);
            assert_eq!(changed.join().expect("no panic"), Ok(0o600));
            settled
        });
        assert_eq!(settled, [true; 2], "its names are not being changed yet");
        let nlink = || hurried(|| engine.attr_now(&file)).map(|attr| attr.stat.nlink);
        assert_eq!(nlink(), Ok(1));
        // While they are changed, by whoever may wait for the mount, no worker waits for that.
        let changing = file.names.begin();
        assert_eq!(nlink(), Err(FAR));
        drop(changing);
        assert_eq!(nlink(), Ok(1));
    }

    #[test]
    fn a_write_that_was_held_back_has_the_bytes_that_came() {
        let scratch = Scratch::new("held-back-write");
        std::fs::write(scratch.dir.join("lower/file"), "lower").expect("written");
        let mut engine = Engine::open(&scratch.spec()).expect("an overlay");
        engine.set_hooks(Hooks { rate: Some(Arc::new(Moment)), ..Hooks::default() });
        let fs = FuseFs { shared: Shared::new(engine) };
        let file = fs.engine().lookup(fs.engine().root(), b"file").expect("found");
        let ino = INodeNo(file.ino);
        let (reply, replied) = channel();
        let send = |written: Res<usize>, reply: Sender<_>| {
            let _ = reply.send(written);
        };
        let write = move |offset| {
            move |fs: &FuseFs, data: &[u8]| {
                fs.change_content(ino, true, |node| fs.engine().write(node, offset, data, true))
            }
        };
        // The worker's buffer takes the next request as soon as this one is taken.
        let mut buffer = *b"upper";
        fs.serve_write(ino, &buffer, reply.clone(), send, write(0));
        buffer = *b"other";
        fs.serve_write(ino, &buffer[..2], reply, send, write(5));
        let mut done = [(); 2].map(|()| replied.recv().expect("an answer").expect("written"));
        done.sort();
        assert_eq!(done, [2, 5]);
        let upper = std::fs::read(scratch.dir.join("upper/file")).expect("copied up");
        assert_eq!(String::from_utf8_lossy(&upper), "upperot");
        fs.shared.stop();
    }

    #[test]
    fn what_was_held_back_waits_for_a_thread_of_its_own() {
        let beside = BesideFar::new("no-thread-aside");
        let ((release, gate), (began, begun)) = (channel::<()>(), channel());
        let (gate, ino) = (Arc::new(Mutex::new(gate)), INodeNo(beside.dir.ino));
        for _ in 0..MAX_ASIDE {
            let (began, gate) = (began.clone(), gate.clone());
            beside.fs.aside(Opcode::Read, ino, move |_| {
                let _ = began.send(());
                let _ = gate.lock().recv();
            });
        }
        for _ in 0..MAX_ASIDE {
            assert_eq!(begun.recv(), Ok(()));
        }
        let (sender, receiver) = channel();
        let say = |sender: Sender<_>| {
            move || {
                let _ = sender.send(std::thread::current().name().map(str::to_owned));
            }
        };
        let handler = say(sender.clone());
        beside.fs.delayed(Opcode::Read, ino, Duration::ZERO, move |_| handler());
        // The thread that waits for all comes to what is due after it.
        assert!(beside.fs.shared.later.at(Instant::now() + Duration::from_nanos(1), say(sender)));
        assert_eq!(receiver.recv(), Ok(Some("fsoverlay-later".to_owned())));
        drop(release);
        assert_eq!(receiver.recv(), Ok(Some("fsoverlay-long".to_owned())));
    }

    #[test]
    fn device_numbers_round_trip() {
        for dev in [(0, 0), (1, 3), (8, 300), (4095, 0xf_ffff)] {
            assert_eq!(decode_dev(encode_dev(dev)), dev);
        }
    }
}
