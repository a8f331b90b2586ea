//! Where an object is on disk: its stat(2) and its descriptors, whatever happens to its names meanwhile.
//!
//! The object's [`Place`] says where it was; what is found there must be the object (its [`Key`]), or else it is
//! looked for again.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};

use crate::attr::{Key, Kind, Meta, Stat};
use crate::engine::Engine;
use crate::errno::{Errno, Res, missing_ok};
use crate::handle::{Fd, Holder};
use crate::hooks::AccessKind;
use crate::inode::{Link, Node, Place};
use crate::layer::{stat_at, stat_fd};

impl Engine {
    /// stat of the object wherever it is now. For directories that are merged from
    /// several, `nlink` is 1, which means "not counted" (as the kernel's overlayfs does).
    pub(crate) fn stat(&self, node: &Arc<Node>) -> Res<Stat> {
        if let Some(part) = &node.dir {
            return self.stat_dir(node, part);
        }
        loop {
            let cached = node.file.get(false).map(|fd| stat_fd(fd.as_fd())).transpose()?;
            let (place, key) = {
                let inner = node.inner.lock();
                (inner.place.clone(), inner.key)
            };
            match (place, cached) {
                // The name in the work directory is not the object's.
                (Place::Parked(parked), cached) => {
                    let stat = cached.map_or_else(|| stat_at(parked.work.as_fd(), &parked.name), Ok)?;
                    // (Of an entry `extra_links` knows.)
                    return Ok(Stat { nlink: stat.nlink.saturating_sub(parked.temporary.into()), ..stat });
                }
                (_, Some(stat)) => return Ok(stat),
                (Place::Upper, None) => {
                    let look = |dir: BorrowedFd<'_>, name: &[u8]| {
                        Ok(Some(stat_at(dir, name)?).filter(|stat| stat.key == key))
                    };
                    if let Some(stat) = self.by_name(node, look)? {
                        return Ok(stat);
                    }
                }
                (Place::Lower { dir, name }, None) => {
                    let found = changed_below(stat_at(self.fd(&dir)?.as_fd(), &name));
                    return found.and_then(|stat| if stat.key == key { Ok(stat) } else { Err(Errno::STALE) });
                }
                (Place::Generated(index), None) => return Ok(self.generated_stat(index)),
                (Place::Unlinked(pinned), None) => return stat_fd(pinned.fd.as_fd()),
                (Place::Gone(stat), None) => return Ok(*stat),
            }
        }
    }

    /// Looks at an object of the upper under its first name. A rename may take the name away between
    /// reading it and using it: if `look` finds nothing, or something else (`None`), it looks again
    /// with the directory locked. `None`: the object has lost the name meanwhile, and the caller
    /// begins anew.
    pub(crate) fn by_name<T>(
        &self,
        node: &Node,
        look: impl Fn(BorrowedFd<'_>, &[u8]) -> Res<Option<T>>,
    ) -> Res<Option<T>> {
        if let Some(link) = node.first_link()
            && link.parent.is_upper()
            && let Some(found) = missing_ok(look(self.upper_fd(&link.parent)?.as_fd(), &link.name))?.flatten()
        {
            return Ok(Some(found));
        }
        self.by_locked_name(node, look)
    }

    /// The same, for looks that cannot tell what they met. A name that a layer has of the object, and
    /// that was looked up just now, is not in the upper yet; another one is.
    pub(crate) fn by_locked_name<T>(
        &self,
        node: &Node,
        look: impl Fn(BorrowedFd<'_>, &[u8]) -> Res<Option<T>>,
    ) -> Res<Option<T>> {
        let (links, entry) = {
            let inner = node.inner.lock();
            (inner.links.clone(), inner.entry)
        };
        for link in &links {
            let _still = link.parent.dir()?.state.read();
            if !node.has_link(&link.parent, &link.name) {
                return Ok(None);
            }
            if link.parent.is_upper()
                && let Some(found) =
                    missing_ok(look(self.upper_fd(&link.parent)?.as_fd(), &link.name))?.flatten()
            {
                return Ok(Some(found));
            }
        }
        if entry
            && let Ok(entry) = self.entry_place(node)
            && let Some(found) = missing_ok(look(entry.work.as_fd(), &entry.name))?.flatten()
        {
            return Ok(Some(found));
        }
        let unchanged = {
            let inner = node.inner.lock();
            let same = |(a, b): (&Link, &Link)| a.is(&b.parent, &b.name);
            matches!(inner.place, Place::Upper)
                && inner.entry == entry
                && inner.links.len() == links.len()
                && inner.links.iter().zip(&links).all(same)
        };
        // Only somebody else can have taken it away: nobody may change an upper but its server.
        if unchanged { Err(Errno::STALE) } else { Ok(None) }
    }

    /// A descriptor (good for linking at least) of an object that has a name in the upper or the work
    /// directory; `None` if it has none.
    pub(crate) fn object(&self, node: &Node) -> Res<Option<Fd>> {
        loop {
            let (place, key) = {
                let inner = node.inner.lock();
                (inner.place.clone(), inner.key)
            };
            let look = |dir: BorrowedFd<'_>, name: &[u8]| {
                let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let object = rustix::fs::openat(dir, name, flags, Mode::empty())?;
                Ok((stat_fd(object.as_fd())?.key == key).then_some(object))
            };
            let found = match &place {
                Place::Upper => match node.file.get(false) {
                    // As long as the place is the upper it is nothing else.
                    Some(fd) => return Ok(Some(fd)),
                    None => self.by_name(node, look)?,
                },
                Place::Parked(parked) => missing_ok(look(parked.work.as_fd(), &parked.name))?.flatten(),
                _ => return Ok(None),
            };
            if let Some(object) = found {
                return Ok(Some(Arc::new(object)));
            }
            let inner = node.inner.lock();
            let same = match (&inner.place, &place) {
                (Place::Parked(now), Place::Parked(then)) => Arc::ptr_eq(now, then),
                _ => false,
            };
            if same && inner.key == key {
                return Err(Errno::STALE);
            }
        }
    }

    fn stat_dir(&self, node: &Node, part: &crate::inode::DirPart) -> Res<Stat> {
        let (first, generated, sources, removed) = {
            let state = part.state.read();
            let sources = state.lowers.len() + usize::from(state.generated.is_some());
            (state.lowers.first().cloned(), state.generated, sources, state.removed)
        };
        if removed && let Place::Gone(stat) = &node.inner.lock().place {
            return Ok(**stat);
        }
        let upper = part.upper.get();
        let explicit = generated.filter(|&g| self.generated.node(g).explicit);
        let mut stat = match (upper, explicit, &first) {
            (Some(dir), ..) => stat_fd(self.fd(dir)?.as_fd())?,
            (None, Some(index), _) => self.generated_stat(index),
            (None, None, Some(dir)) => stat_fd(changed_below(self.fd(dir))?.as_fd())?,
            (None, None, None) => self.synthetic_stat(),
        };
        if sources + usize::from(upper.is_some()) != 1 {
            stat.nlink = 1;
        }
        Ok(stat)
    }

    /// An empty directory that is nowhere on disk.
    pub(crate) fn synthetic_stat(&self) -> Stat {
        Stat {
            mode: 0o040_755,
            nlink: 2,
            blksize: 4096,
            atime: self.opened,
            mtime: self.opened,
            ctime: self.opened,
            btime: self.opened,
            ..Stat::default()
        }
    }

    pub(crate) fn generated_stat(&self, index: u32) -> Stat {
        let node = self.generated.node(index);
        let size = node.bytes().len() as u64;
        let (mode, nlink) = match node.kind() {
            Kind::Dir => (0o040_000, 2),
            Kind::Symlink => (0o120_000, 1),
            _ => (0o100_000, 1),
        };
        Stat { mode: mode | node.perm, nlink, size, blocks: size.div_ceil(512), ..self.synthetic_stat() }
    }

    /// The owner and mode of a generated object.
    pub(crate) fn generated_meta(&self, index: u32) -> Meta {
        let node = self.generated.node(index);
        let (uid, gid) = self.owners.default;
        let perm = if node.kind() == Kind::Symlink { 0o777 } else { node.perm };
        Meta { kind: node.kind(), perm, uid, gid, rdev: (0, 0) }
    }

    /// The descriptor of a regular file's content; `None` for content in memory. With
    /// `writable` the file must be in the upper.
    pub(crate) fn open_file(&self, node: &Arc<Node>, writable: bool) -> Res<Content> {
        if node.kind != Kind::File {
            return Err(Errno::INVAL);
        }
        loop {
            if let Some(fd) = node.file.get(writable) {
                return Ok(Content::File(fd));
            }
            let (place, key) = {
                let inner = node.inner.lock();
                (inner.place.clone(), inner.key)
            };
            // The descriptor, if it is the object's, and whether it can be written to.
            let checked = |(fd, can_write): (std::os::fd::OwnedFd, bool)| {
                let stat = stat_fd(fd.as_fd())?;
                Ok((stat.key == key && stat.kind() == Some(Kind::File)).then_some((fd, can_write)))
            };
            let (fd, can_write) = match place {
                Place::Upper => {
                    let look = |dir: BorrowedFd<'_>, name: &[u8]| match open_content(dir, name, writable) {
                        Err(Errno::ACCESS) if self.owners.native => self.open_in_spite(dir, name, key),
                        // O_NOFOLLOW met a link, or something else stands there now.
                        Err(Errno::LOOP | Errno::NXIO | Errno::NOTDIR) => Ok(None),
                        opened => checked(opened?),
                    };
                    let Some(found) = self.by_name(node, look)? else { continue };
                    found
                }
                Place::Parked(parked) => {
                    let opened = match open_content(&*parked.work, &parked.name, writable) {
                        Err(Errno::ACCESS) if self.owners.native => {
                            self.open_in_spite(parked.work.as_fd(), &parked.name, key)?
                        }
                        opened => checked(opened?)?,
                    };
                    opened.ok_or(Errno::STALE)?
                }
                Place::Lower { .. } if writable => return Err(Errno::ROFS),
                Place::Lower { dir, name } => {
                    let opened = changed_below(open_lower(&*self.fd(&dir)?, &name))?;
                    self.trace(&dir, Some(&name), AccessKind::Opened);
                    checked((opened, false))?.ok_or(Errno::STALE)?
                }
                Place::Generated(index) => return Ok(Content::Memory(self.generated.node(index).bytes())),
                Place::Unlinked(pinned) => return Ok(Content::File(pinned.fd.clone())),
                Place::Gone(_) => return Err(Errno::STALE),
            };
            let fd = Arc::new(fd);
            // Kept under the lock that guards the place: after a copy-up the old
            // descriptor must not come back into the slot.
            let (current, queue) = {
                let inner = node.inner.lock();
                let current = inner.key == key;
                // Whoever closes the last descriptor of a far file waits.
                let keep = can_write || node.far.get().is_none();
                (current, current && keep && node.file.put(fd.clone(), can_write))
            };
            if queue {
                self.tree.ring.push(Holder::File(Arc::downgrade(node)));
            }
            if current {
                return Ok(Content::File(fd));
            }
        }
    }
}

impl Engine {
    /// Opens a file of the upper whose real mode forbids it to its owner, who is the server and has no
    /// capability that would help. The kernel has decided who may, and may still hold what was written before
    /// the mode was set. `None` if something else has the name by now.
    fn open_in_spite(&self, dir: BorrowedFd<'_>, name: &[u8], key: Key) -> Res<Option<(OwnedFd, bool)>> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let object = rustix::fs::openat(dir, name, flags, Mode::empty())?;
        let _nobody_else = self.modes.lock();
        let stat = stat_fd(object.as_fd())?;
        if stat.key != key || stat.kind() != Some(Kind::File) {
            return Ok(None);
        }
        // The file, whatever has its name now.
        let path = format!("/proc/self/fd/{}", object.as_raw_fd());
        let perm = stat.mode & 0o7777;
        rustix::fs::chmod(&path, Mode::from_raw_mode(perm | 0o600))?;
        let opened = rustix::fs::open(&path, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty());
        rustix::fs::chmod(&path, Mode::from_raw_mode(perm))?;
        Ok(Some((opened?, true)))
    }
}

/// What was found in a layer is not there any more, or something of another type is: somebody changed
/// the layer. `ESTALE` makes the kernel (or, on a descriptor, whoever asks) look the name up again.
pub(crate) fn changed_below<T>(found: Res<T>) -> Res<T> {
    found.map_err(|err| if gone_below(err) { Errno::STALE } else { err })
}

/// Whether an error of a name in a layer says that somebody took it away.
pub(crate) fn gone_below(err: Errno) -> bool {
    matches!(err, Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NXIO | Errno::INVAL)
}

/// Where the bytes of a file are.
#[derive(Debug)]
pub(crate) enum Content {
    File(Fd),
    Memory(Arc<[u8]>),
}

/// Opens a file of the upper: for writing if that is possible, since one descriptor
/// serves readers and writers alike. Never blocks and follows nothing, because the
/// payload decides what stands in the upper.
fn open_content(dir: impl AsFd, name: &[u8], writable: bool) -> Res<(std::os::fd::OwnedFd, bool)> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    match rustix::fs::openat(&dir, name, OFlags::RDWR | flags, Mode::empty()) {
        Err(Errno::ACCESS | Errno::PERM | Errno::ROFS | Errno::TXTBSY) if !writable => {
            Ok((rustix::fs::openat(&dir, name, OFlags::RDONLY | flags, Mode::empty())?, false))
        }
        other => Ok((other?, true)),
    }
}

/// Opens a file of a layer; its access time stays what it is where that is allowed.
fn open_lower(dir: impl AsFd, name: &[u8]) -> Res<std::os::fd::OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    match rustix::fs::openat(&dir, name, flags | OFlags::NOATIME, Mode::empty()) {
        Err(Errno::PERM) => rustix::fs::openat(&dir, name, flags, Mode::empty()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::config::OverlaySpec;
    use crate::create::NewObject;
    use crate::engine::tests::Scratch;
    use crate::rename::How;
    use crate::setattr::SetAttr;

    #[test]
    fn an_object_is_found_while_its_name_changes() {
        let scratch = Scratch::new("storm");
        let engine = &scratch.engine;
        let (link, file) = (scratch.make(b"link0", Kind::Symlink), scratch.make(b"file0", Kind::File));
        let other = scratch.make(b"other", Kind::Symlink);
        let over = AtomicBool::new(false);
        let rename = |from: &str, to: &str, how: How| {
            let root = engine.root();
            assert_eq!(engine.rename(root, from.as_bytes(), root, to.as_bytes(), how), Ok(()));
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for i in 0..20_000 {
                    rename(&format!("file{}", i % 3), &format!("file{}", (i + 1) % 3), How::Replace);
                }
                over.store(true, Ordering::Release);
            });
            scope.spawn(|| {
                let mut i = 0;
                while !over.load(Ordering::Acquire) {
                    rename(&format!("link{}", i % 3), &format!("link{}", (i + 1) % 3), How::Replace);
                    i += 1;
                    rename(&format!("link{}", i % 3), "other", How::Exchange);
                    rename(&format!("link{}", i % 3), "other", How::Exchange);
                }
            });
            for _ in 0..4 {
                scope.spawn(|| {
                    while !over.load(Ordering::Acquire) {
                        assert_eq!(engine.read_link(&link), Ok(b"link0".to_vec()));
                        assert_eq!(engine.read_link(&other), Ok(b"other".to_vec()));
                        assert!(engine.stat(&link).is_ok_and(|stat| stat.nlink == 1));
                        // As if there were too few descriptors to keep it.
                        drop(file.file.take());
                        assert!(engine.stat(&file).is_ok_and(|stat| stat.nlink == 1));
                        assert!(engine.open_file(&file, true).is_ok());
                    }
                });
            }
        });
    }

    /// Root is kept from nothing: for it this shows nothing.
    #[test]
    fn a_file_that_its_mode_closes_is_opened_and_stays_closed() {
        use std::os::unix::fs::PermissionsExt;
        let scratch = Scratch::new("closed");
        let spec =
            OverlaySpec { owner_form: crate::config::OwnerForm::Native, squash: None, ..scratch.spec() };
        let engine = &Engine::open(&spec).expect("an overlay");
        let owner = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        let make = |name: &[u8]| {
            let new = NewObject { kind: Kind::File, perm: 0, umask: 0, rdev: (0, 0), target: b"", owner };
            engine.create(engine.root(), name, &new).expect("made")
        };
        let (file, other) = (make(b"file"), make(b"other"));
        let chmod = |node: &Arc<Node>, perm| {
            let set = SetAttr { perm: Some(perm), ..SetAttr::default() };
            engine.set_attr(node, set).map(|attr| attr.meta.perm)
        };
        assert_eq!(chmod(&other, 0o140), Ok(0o140));
        /// Ends the others in any case.
        struct End<'a>(&'a AtomicBool);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Release);
            }
        }
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _end = End(&over);
                for i in 0..2000 {
                    let perm = if i % 2 == 0 { 0o040 } else { 0 };
                    assert_eq!(chmod(&file, perm), Ok(perm));
                    let root = engine.root();
                    assert_eq!(engine.rename(root, b"file", root, b"other", How::Exchange), Ok(()));
                }
            });
            for _ in 0..2 {
                scope.spawn(|| {
                    while !over.load(Ordering::Acquire) {
                        // As if there were too few descriptors to keep it.
                        drop(file.file.take());
                        assert!(engine.open_file(&file, true).is_ok());
                    }
                });
            }
        });
        let mode = |name: &str| {
            let stat = std::fs::metadata(scratch.dir.join("upper").join(name)).expect("there");
            stat.permissions().mode() & 0o7777
        };
        assert_eq!((mode("file"), mode("other")), (0, 0o140));
    }
}
