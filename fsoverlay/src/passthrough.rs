//! FUSE passthrough: the kernel reads and writes files of the upper itself ([`crate::OverlaySpec::passthrough`]).
//!
//! What a kernel does with an open file is decided when it is opened, by the answer to OPEN (or CREATE), and is
//! the same for all descriptors of an inode at a time: an open that is answered otherwise fails with `EIO`. So
//! the first one decides, and those that come while it is open follow it:
//!
//! | opened first | is |
//! |---|---|
//! | a file of the upper | *passed through* to it |
//! | a file of a layer, to be written | copied up, then passed through |
//! | a file of a layer, to be read | *cached*: read through us, into the kernel's pages, which all descriptors share. One that writes does it through us as well, and the copy-up at its first write is seen by those that read |
//! | a file that a write could take set*id bits or capabilities from, to be written | cached: we take them |
//!
//! A layer's file is never passed through, not even to be read: a descriptor that writes would then have to be
//! answered with the same file, and the kernel would open the layer's for writing.
//!
//! Writes that are passed through are done with our credentials, which keep set*id bits. So only descriptors of
//! uid 0, who keeps them anyway, are passed through to be written to when they come first; and such bits are not
//! given to a file that somebody else writes to, nor capabilities to one that anybody does (`ETXTBSY`).
//!
//! The kernel does not tell us of a mapping that is written to. While a file is passed through to be written, and
//! once more when that ends, the kernel has to ask for its attributes.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fuser::{BackingId, FileHandle, FopenFlags};

use crate::attr::Kind;
use crate::copyup::Temp;
use crate::engine::{Content, Engine};
use crate::errno::{Errno, Res};
use crate::inode::Node;
use crate::sync::Mutex;
use crate::sys;

/// Capabilities of a program.
pub(crate) const CAPABILITY: &[u8] = b"security.capability";

/// A descriptor that may write.
const WRITER: u64 = 1;
/// One of somebody else than uid 0.
const FOREIGN: u64 = 2;

/// The files that are open.
#[derive(Debug, Default)]
pub(crate) struct Passthrough {
    /// By number.
    open: Mutex<HashMap<u64, Open>>,
    /// The kernel has said that it can.
    pub(crate) offered: AtomicBool,
}

/// What is open of one file.
#[derive(Debug)]
struct Open {
    descriptors: usize,
    foreign_writers: usize,
    /// `None`: cached.
    through: Option<Arc<BackingId>>,
    writers: usize,
}

/// The answer to an open.
pub(crate) struct Opened {
    pub(crate) handle: FileHandle,
    pub(crate) flags: FopenFlags,
    pub(crate) through: Option<Arc<BackingId>>,
}

/// Who opens what for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) write: bool,
    pub(crate) uid: u32,
}

impl Wanted {
    fn handle(self) -> u64 {
        match (self.write, self.uid) {
            (false, _) => 0,
            (true, 0) => WRITER,
            (true, _) => WRITER | FOREIGN,
        }
    }
}

impl Passthrough {
    /// Tries whether this process may have files passed through on a served connection.
    pub(crate) fn try_on(&self, engine: &Engine, fuse: &OwnedFd) -> std::io::Result<()> {
        if !self.offered.load(Ordering::Acquire) {
            return Err(std::io::Error::other("this kernel does not offer it"));
        }
        let upper = engine.upper().map_err(|_| std::io::Error::other("there is no upper directory"))?;
        let file = Temp::file(upper)?.fd.clone().ok_or(Errno::IO)?;
        let why = |err: std::io::Error| match Errno::from_io_error(&err) {
            Some(Errno::PERM) => std::io::Error::new(
                err.kind(),
                "the kernel lets only CAP_SYS_ADMIN of the initial user namespace register files",
            ),
            Some(Errno::LOOP) => std::io::Error::other("the upper directory's file system is a stacked one"),
            _ => err,
        };
        let id = BackingId::create_raw(fuse, &*file).map_err(why)?;
        Ok(sys::close_backing(fuse.as_fd(), id)?)
    }

    /// Makes ready what a file that is opened for writing needs. It may take long.
    pub(crate) fn prepare(&self, engine: &Engine, node: &Arc<Node>, wanted: Wanted) -> Res<()> {
        if !wanted.write || engine.upper.is_none() {
            return Ok(());
        }
        let is_open = self.open.lock().contains_key(&node.ino);
        if !is_open && node.kind == Kind::File {
            engine.copy_up(node)?;
        }
        engine.touch()?;
        engine.note_object(node)
    }

    /// Opens a file. `register` makes the kernel know a descriptor.
    pub(crate) fn open(
        &self,
        engine: &Engine,
        node: &Arc<Node>,
        wanted: Wanted,
        register: impl FnOnce(&OwnedFd) -> std::io::Result<BackingId>,
    ) -> Opened {
        let mut files = self.open.lock();
        let file = files.entry(node.ino).or_insert_with(|| Open {
            descriptors: 0,
            foreign_writers: 0,
            through: decide(engine, node, wanted, register),
            writers: 0,
        });
        file.descriptors += 1;
        file.writers += usize::from(wanted.write);
        file.foreign_writers += usize::from(wanted.handle() & FOREIGN != 0);
        let through = file.through.clone();
        drop(files);
        // Pages of an earlier time: of a file of the upper they may be older than what went past them.
        let keep = through.is_none() && !node.is_upper();
        let flags = if keep { FopenFlags::FOPEN_KEEP_CACHE } else { FopenFlags::empty() };
        Opened { handle: FileHandle(wanted.handle()), flags, through }
    }

    /// A descriptor is closed. True if what the kernel knows of the file's attributes may be old.
    pub(crate) fn release(&self, ino: u64, handle: FileHandle) -> bool {
        let mut files = self.open.lock();
        let Some(file) = files.get_mut(&ino) else { return false };
        file.descriptors -= 1;
        let writer = handle.0 & WRITER != 0;
        file.writers -= usize::from(writer);
        file.foreign_writers -= usize::from(handle.0 & FOREIGN != 0);
        let through = file.through.is_some();
        let gone = if file.descriptors == 0 { files.remove(&ino) } else { None };
        drop(files);
        // The kernel is told outside of the lock.
        drop(gone);
        through && writer
    }

    /// Whether the kernel must ask for a file's attributes each time.
    pub(crate) fn changes_unseen(&self, ino: u64) -> bool {
        self.unseen_writers(ino).0 > 0
    }

    /// How many descriptors may write to a file past us, and how many of them are not of uid 0.
    fn unseen_writers(&self, ino: u64) -> (usize, usize) {
        let files = self.open.lock();
        files
            .get(&ino)
            .filter(|file| file.through.is_some())
            .map_or((0, 0), |f| (f.writers, f.foreign_writers))
    }
}

impl Engine {
    /// Refuses set*id bits (or capabilities, which go with everybody's writes) for a file that is written to
    /// past us.
    pub(crate) fn check_unwritten(&self, node: &Node, capabilities: bool) -> Res<()> {
        let Some(files) = &self.passthrough else { return Ok(()) };
        let (writers, foreign) = files.unseen_writers(node.ino);
        let count = if capabilities { writers } else { foreign };
        if count > 0 { Err(Errno::TXTBSY) } else { Ok(()) }
    }
}

/// Whether a file that nobody has open is passed through.
fn decide(
    engine: &Engine,
    node: &Arc<Node>,
    wanted: Wanted,
    register: impl FnOnce(&OwnedFd) -> std::io::Result<BackingId>,
) -> Option<Arc<BackingId>> {
    if node.kind != Kind::File || !node.is_upper() {
        return None;
    }
    if wanted.write {
        let (perm, no_capability) = {
            let inner = node.inner.lock();
            (inner.meta.perm, inner.no_capability)
        };
        if wanted.uid != 0
            || perm & 0o6000 != 0
            || !no_capability && engine.get_xattr(node, CAPABILITY).is_ok()
        {
            return None;
        }
    }
    let Ok(Content::File(fd)) = engine.open_file(node, false) else { return None };
    match register(&fd) {
        Ok(id) => Some(Arc::new(id)),
        Err(err) => {
            tracing::debug!(%err, ino = node.ino, "a file is not passed through");
            None
        }
    }
}
