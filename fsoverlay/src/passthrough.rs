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
//! | a file that a write could take set*id bits or capabilities from, to be read as well | cached: we take them |
//! | a file that is being given such, or by somebody else than uid 0 to be written | cached |
//!
//! A layer's file is never passed through, not even to be read: a descriptor that writes would then have to be
//! answered with the same file, and the kernel would open the layer's for writing.
//!
//! Writes that are passed through are done with our credentials, which keep set*id bits. So no file has at a time
//! such bits and a descriptor past us that somebody else than uid 0, who keeps them anyway, opened for writing;
//! nor capabilities and one that anybody did. Whichever comes second is refused (`ETXTBSY`): to give the bits, or
//! to open for writing a file that was passed through before it was given them. Giving counts from the check
//! until it is done ([`Grant`]); the mode that an open looks at is the one under the lock it is counted under.
//!
//! The kernel does not tell us of a mapping that is written to. While a file is passed through to be written, and
//! once more when that ends, the kernel has to ask for its attributes.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fuser::{BackingId, FileHandle, FopenFlags};

use crate::attr::Kind;
use crate::copyup::Temp;
use crate::engine::Engine;
use crate::errno::{Errno, Res};
use crate::inode::Node;
use crate::object::Content;
use crate::sync::Mutex;
use crate::sys;

/// Capabilities of a program.
pub(crate) const CAPABILITY: &[u8] = b"security.capability";

/// A descriptor that may write.
const WRITER: u64 = 1;
/// One of somebody else than uid 0.
const FOREIGN: u64 = 2;

/// The files that are open. `B` is what the kernel knows a file by that it was told of.
#[derive(Debug)]
pub(crate) struct Passthrough<B = BackingId> {
    /// Before all other locks: the first open of a file finds it on disk under this one.
    files: Mutex<Files<B>>,
    /// The kernel has said that it can.
    pub(crate) offered: AtomicBool,
}

#[derive(Debug)]
struct Files<B> {
    /// By number.
    open: HashMap<u64, Open<B>>,
    /// How many are giving a file what.
    granting: HashMap<(u64, Privilege), usize>,
}

/// What is open of one file.
#[derive(Debug)]
struct Open<B> {
    descriptors: usize,
    foreign_writers: usize,
    /// `None`: cached.
    through: Option<Arc<B>>,
    writers: usize,
}

/// What a write takes away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Privilege {
    /// Set*id bits: by a write of others than uid 0.
    SetIds,
    /// By everybody's.
    Capabilities,
}

/// A file is being given a privilege as long as this is there.
#[derive(Debug)]
pub(crate) struct Grant<'a, B = BackingId> {
    passthrough: &'a Passthrough<B>,
    of: (u64, Privilege),
}

impl<B> Drop for Grant<'_, B> {
    fn drop(&mut self) {
        let mut files = self.passthrough.files.lock();
        if let Some(count) = files.granting.get_mut(&self.of) {
            *count -= 1;
            if *count == 0 {
                files.granting.remove(&self.of);
            }
        }
    }
}

/// The answer to an open.
#[derive(Debug)]
pub(crate) struct Opened<B = BackingId> {
    pub(crate) handle: FileHandle,
    pub(crate) flags: FopenFlags,
    pub(crate) through: Option<Arc<B>>,
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

    /// Whether its writes would take a privilege away.
    fn takes(self, privilege: Privilege) -> bool {
        self.write && (privilege == Privilege::Capabilities || self.uid != 0)
    }
}

impl<B> Default for Passthrough<B> {
    fn default() -> Self {
        let files = Files { open: HashMap::new(), granting: HashMap::new() };
        Self { files: Mutex::new(files), offered: AtomicBool::default() }
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
        let is_open = self.files.lock().open.contains_key(&node.ino);
        if !is_open && node.kind == Kind::File {
            engine.copy_up(node)?;
        }
        engine.touch()?;
        engine.note_object(node)
    }
}

impl<B> Passthrough<B> {
    /// Opens a file. `register` makes the kernel know a descriptor.
    pub(crate) fn open(
        &self,
        engine: &Engine,
        node: &Arc<Node>,
        wanted: Wanted,
        register: impl FnOnce(&OwnedFd) -> std::io::Result<B>,
    ) -> Res<Opened<B>> {
        let mut files = self.files.lock();
        let Files { open, granting } = &mut *files;
        // What the file has, or is about to have.
        let has = |privilege| granting.contains_key(&(node.ino, privilege)) || privilege.is_of(engine, node);
        let file = match open.entry(node.ino) {
            Entry::Occupied(file) => {
                let file = file.into_mut();
                let takes = |privilege| wanted.takes(privilege) && has(privilege);
                if file.through.is_some() && Privilege::ALL.into_iter().any(takes) {
                    return Err(Errno::TXTBSY);
                }
                file
            }
            Entry::Vacant(room) => {
                let foreign = wanted.takes(Privilege::SetIds);
                let cached = foreign || !node.is_upper() || Privilege::ALL.into_iter().any(has);
                let through = if cached { None } else { pass(engine, node, register) };
                room.insert(Open { descriptors: 0, foreign_writers: 0, through, writers: 0 })
            }
        };
        file.descriptors += 1;
        file.writers += usize::from(wanted.write);
        file.foreign_writers += usize::from(wanted.handle() & FOREIGN != 0);
        let through = file.through.clone();
        drop(files);
        // Pages of an earlier time: of a file of the upper they may be older than what went past them.
        let keep = through.is_none() && !node.is_upper();
        let flags = if keep { FopenFlags::FOPEN_KEEP_CACHE } else { FopenFlags::empty() };
        Ok(Opened { handle: FileHandle(wanted.handle()), flags, through })
    }

    /// Begins to give a file a privilege: refused while somebody may write to it past us whose writes would take
    /// it away, and nobody can begin to as long as the answer is there.
    pub(crate) fn grant(&self, ino: u64, privilege: Privilege) -> Res<Grant<'_, B>> {
        let mut files = self.files.lock();
        let writers = files.open.get(&ino).filter(|file| file.through.is_some()).map_or(0, |file| {
            if privilege == Privilege::SetIds { file.foreign_writers } else { file.writers }
        });
        if writers > 0 {
            return Err(Errno::TXTBSY);
        }
        *files.granting.entry((ino, privilege)).or_default() += 1;
        drop(files);
        Ok(Grant { passthrough: self, of: (ino, privilege) })
    }

    /// A descriptor is closed. True if what the kernel knows of the file's attributes may be old.
    pub(crate) fn release(&self, ino: u64, handle: FileHandle) -> bool {
        let mut files = self.files.lock();
        let Some(file) = files.open.get_mut(&ino) else { return false };
        file.descriptors -= 1;
        let writer = handle.0 & WRITER != 0;
        file.writers -= usize::from(writer);
        file.foreign_writers -= usize::from(handle.0 & FOREIGN != 0);
        let through = file.through.is_some();
        let gone = if file.descriptors == 0 { files.open.remove(&ino) } else { None };
        drop(files);
        // The kernel is told outside of the lock.
        drop(gone);
        through && writer
    }

    /// Whether the kernel must ask for a file's attributes each time.
    pub(crate) fn changes_unseen(&self, ino: u64) -> bool {
        let files = self.files.lock();
        files.open.get(&ino).is_some_and(|file| file.through.is_some() && file.writers > 0)
    }
}

impl Privilege {
    const ALL: [Self; 2] = [Self::SetIds, Self::Capabilities];

    /// Whether a file has it. What cannot be told counts as one.
    fn is_of(self, engine: &Engine, node: &Arc<Node>) -> bool {
        let (perm, no_capability) = {
            let inner = node.inner.lock();
            (inner.meta.perm, inner.no_capability)
        };
        match self {
            Self::SetIds => perm & 0o6000 != 0,
            Self::Capabilities => {
                let found = || engine.get_xattr(node, CAPABILITY);
                !no_capability && !matches!(found(), Err(Errno::NODATA | Errno::OPNOTSUPP))
            }
        }
    }
}

impl Engine {
    /// See [`Passthrough::grant`].
    pub(crate) fn grant(&self, node: &Node, privilege: Privilege) -> Res<Option<Grant<'_>>> {
        let files = self.passthrough.as_ref().filter(|_| node.kind == Kind::File);
        files.map(|files| files.grant(node.ino, privilege)).transpose()
    }
}

/// Makes the kernel know a file of the upper that nobody has open, if it can be.
fn pass<B>(
    engine: &Engine,
    node: &Arc<Node>,
    register: impl FnOnce(&OwnedFd) -> std::io::Result<B>,
) -> Option<Arc<B>> {
    let Ok(Content::File(fd)) = engine.open_file(node, false) else { return None };
    match register(&fd) {
        Ok(id) => Some(Arc::new(id)),
        Err(err) => {
            tracing::debug!(%err, ino = node.ino, "a file is not passed through");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::XattrFlags;

    use super::*;
    use crate::create::NewObject;
    use crate::engine::tests::Scratch;
    use crate::setattr::SetAttr;

    const READ: Wanted = Wanted { write: false, uid: 0 };
    const ROOT: Wanted = Wanted { write: true, uid: 0 };
    const OTHER: Wanted = Wanted { write: true, uid: 1000 };

    /// A file of an upper, and a kernel that takes whatever it is told of.
    struct World {
        scratch: Scratch,
        node: Arc<Node>,
        files: Passthrough<()>,
    }

    impl World {
        fn new(name: &str, perm: u32) -> Self {
            let scratch = Scratch::new(name);
            let new =
                NewObject { kind: Kind::File, perm, umask: 0, rdev: (0, 0), target: b"", owner: (0, 0) };
            let node = scratch.engine.create(scratch.engine.root(), b"file", &new).expect("made");
            Self { scratch, node, files: Passthrough::default() }
        }

        /// Opens it; whether it is passed through.
        fn open(&self, wanted: Wanted) -> Res<bool> {
            let opened = self.files.open(&self.scratch.engine, &self.node, wanted, |_| Ok(()));
            opened.map(|file| file.through.is_some())
        }

        fn close(&self, wanted: Wanted) {
            self.files.release(self.node.ino, FileHandle(wanted.handle()));
        }

        fn chmod(&self, perm: u32) {
            let set = SetAttr { perm: Some(perm), ..SetAttr::default() };
            self.scratch.engine.set_attr(&self.node, set).expect("set");
        }
    }

    #[test]
    fn a_file_with_set_ids_is_cached_for_its_readers_so_that_others_may_write() {
        let world = World::new("set-ids", 0o4775);
        assert_eq!(world.open(READ), Ok(false));
        assert_eq!(world.open(OTHER), Ok(false));
        world.close(OTHER);
        world.close(READ);
        world.chmod(0o775);
        assert_eq!(world.open(READ), Ok(true));
        assert_eq!(world.open(OTHER), Ok(true));
        assert!(world.files.grant(world.node.ino, Privilege::SetIds).is_err());
    }

    #[test]
    fn others_cannot_write_to_a_file_that_was_given_set_ids_while_it_is_passed_through() {
        let world = World::new("given-set-ids", 0o777);
        assert_eq!(world.open(READ), Ok(true));
        world.chmod(0o4777);
        assert_eq!(world.open(OTHER), Err(Errno::TXTBSY));
        assert_eq!(world.open(ROOT), Ok(true), "who keeps them may");
        world.close(ROOT);
        world.close(READ);
        assert_eq!(world.open(OTHER), Ok(false), "the one that was refused is not counted");
    }

    #[test]
    fn nobody_begins_to_write_while_a_privilege_is_given() {
        let world = World::new("grant", 0o777);
        let set_ids = world.files.grant(world.node.ino, Privilege::SetIds).expect("nobody writes");
        assert_eq!(world.open(READ), Ok(false), "it may have the bits when the next one writes");
        world.close(READ);
        drop(set_ids);
        assert_eq!(world.open(READ), Ok(true));
        let set_ids = world.files.grant(world.node.ino, Privilege::SetIds).expect("nobody writes");
        let again = world.files.grant(world.node.ino, Privilege::SetIds).expect("nobody writes");
        drop(again);
        assert_eq!(world.open(OTHER), Err(Errno::TXTBSY));
        assert_eq!(world.open(ROOT), Ok(true));
        assert!(world.files.grant(world.node.ino, Privilege::Capabilities).is_err(), "root writes");
        drop(set_ids);
        world.close(ROOT);
        let capabilities = world.files.grant(world.node.ino, Privilege::Capabilities).expect("nobody writes");
        assert_eq!(world.open(ROOT), Err(Errno::TXTBSY));
        drop(capabilities);
        assert_eq!(world.open(OTHER), Ok(true));
    }

    #[test]
    fn nobody_begins_to_write_past_us_to_a_file_with_capabilities() {
        let world = World::new("capabilities", 0o777);
        assert_eq!(world.open(READ), Ok(true));
        // One of version 2 that allows nothing, as the kernel asks for it.
        let value = [&[0, 0, 0, 2][..], &[0; 16]].concat();
        let set =
            world.scratch.engine.set_xattr(&world.node, CAPABILITY, &value, XattrFlags::empty(), (0, 0));
        assert_eq!(set, Ok(()));
        assert_eq!(world.open(ROOT), Err(Errno::TXTBSY));
        world.close(READ);
        assert_eq!(world.open(READ), Ok(false));
        assert_eq!(world.open(ROOT), Ok(false));
    }
}
