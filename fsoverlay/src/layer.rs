//! Real directories: the only way from a name to an object on disk.
//!
//! A [`RealDir`] is a directory of one layer (or of the upper), known as its parent and
//! one name. Its descriptor is opened on demand, from the nearest ancestor that has
//! one, by `openat` of single components with `O_NOFOLLOW`; nothing in this crate opens
//! a path of several components after [`open_root`], and no symbolic link found in a
//! layer or in the upper is ever followed. So whatever a payload or an image puts into
//! its tree, a lookup stays below the layer's root. What is mounted below
//! a layer goes by the rules of [`crate::far`].
//!
//! The names of a lower layer never change; those of the upper change when a directory
//! is renamed. [`Tree::topology`] is held for reading while a chain of names is opened
//! and for writing during that one rename.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags};

use crate::attr::{Key, Meta, Stat};
use crate::config::{IdExtent, Owners};
use crate::errno::{Errno, Res};
use crate::far::Far;
use crate::handle::{Fd, FdRing, FdSlot, Holder};
use crate::sync::{Mutex, RwLock};

/// Which layer a directory belongs to: an index, the lowest layer first, or [`UPPER`].
pub(crate) type LayerIdx = u32;

/// The upper as a [`LayerIdx`].
pub(crate) const UPPER: LayerIdx = u32::MAX;

/// Where a directory is: its parent and its name there.
type Position = (Arc<RealDir>, Box<[u8]>);

/// A directory of a layer or of the upper.
#[derive(Debug)]
pub(crate) struct RealDir {
    pub(crate) layer: LayerIdx,
    pub(crate) key: Key,
    /// `None` for the root, whose descriptor stays open.
    position: Mutex<Option<Position>>,
    pub(crate) slot: FdSlot,
    /// Paths below here of which there is something to say.
    pub(crate) hidden: Option<Arc<Hidden>>,
    /// It is in a file system that may never answer.
    pub(crate) far: Option<Arc<Far>>,
    /// The directory may hold whiteouts in the form of an xattr (`opaque=x`).
    pub(crate) xattr_whiteouts: std::sync::atomic::AtomicBool,
    /// See [`crate::oci`].
    pub(crate) gone: std::sync::OnceLock<Option<Arc<crate::oci::Gone>>>,
    /// `user.overlay.impure` is known to be set.
    pub(crate) impure: std::sync::atomic::AtomicBool,
}

impl RealDir {
    pub(crate) fn root(layer: LayerIdx, fd: Fd, key: Key, hidden: Option<Arc<Hidden>>) -> Arc<Self> {
        let dir = Self::new(layer, key, None, hidden, None);
        let _ = dir.slot.put(fd, false);
        dir
    }

    fn new(
        layer: LayerIdx,
        key: Key,
        position: Option<Position>,
        hidden: Option<Arc<Hidden>>,
        far: Option<Arc<Far>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            layer,
            key,
            position: Mutex::new(position),
            slot: FdSlot::default(),
            hidden,
            far,
            xattr_whiteouts: false.into(),
            gone: std::sync::OnceLock::new(),
            impure: false.into(),
        })
    }

    /// The directory `name` in `parent`, found to be `key`.
    pub(crate) fn child(parent: &Arc<Self>, name: &[u8], key: Key) -> Arc<Self> {
        let hidden = parent.hidden.as_ref().and_then(|h| h.children.get(name)).cloned();
        let far = hidden.as_ref().and_then(|h| h.far.clone()).or_else(|| parent.far.clone());
        Self::new(parent.layer, key, Some((parent.clone(), name.into())), hidden, far)
    }

    /// Moves the directory; the caller holds the topology lock for writing.
    pub(crate) fn set_position(&self, parent: Arc<Self>, name: &[u8]) {
        let old = self.position.lock().replace((parent, name.into()));
        drop(old);
    }

    /// The directory that it is in, and its name there; `None` for the root.
    pub(crate) fn position(&self) -> Option<(Arc<Self>, Arc<[u8]>)> {
        self.position.lock().as_ref().map(|(parent, name)| (parent.clone(), Arc::from(&**name)))
    }

    /// Path below the root of the layer.
    pub(crate) fn path(&self) -> std::path::PathBuf {
        let mut names = Vec::new();
        let mut next = self.position.lock().clone();
        while let Some((parent, name)) = next {
            names.push(name);
            next = parent.position.lock().clone();
        }
        names
            .iter()
            .rev()
            .map(|name| <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(name))
            .collect()
    }

    /// The far file system that is mounted on `name` in here.
    pub(crate) fn far_at(&self, name: &[u8]) -> Option<&Arc<Far>> {
        self.hidden.as_ref().and_then(|h| h.children.get(name)).and_then(|h| h.far.as_ref())
    }

    /// Whether what stands at `name` in here stands at another place of the layers, too.
    pub(crate) fn repeats(&self, name: &[u8]) -> bool {
        self.hidden.as_ref().and_then(|h| h.children.get(name)).is_some_and(|h| h.repeated)
    }

    /// Whether `name` in here is shown as an empty directory.
    pub(crate) fn hides(&self, name: &[u8]) -> bool {
        self.hidden.as_ref().and_then(|h| h.children.get(name)).is_some_and(|h| h.terminal)
    }
}

impl Drop for RealDir {
    // A chain may be thousands of names deep: dropped in a loop, not by recursion.
    fn drop(&mut self) {
        let mut next = self.position.get_mut().take();
        while let Some((parent, _)) = next {
            next = Arc::into_inner(parent).and_then(|mut dir| dir.position.get_mut().take());
        }
    }
}

/// Opens directories of layers; owns what that needs.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) ring: FdRing,
    pub(crate) topology: RwLock<()>,
}

impl Tree {
    /// An `O_PATH` descriptor of the directory.
    pub(crate) fn fd(&self, dir: &Arc<RealDir>) -> Res<Fd> {
        if let Some(fd) = dir.slot.get(false) {
            if let Some(far) = &dir.far {
                far.check()?;
            }
            return Ok(fd);
        }
        if let Some(far) = &dir.far {
            far.check()?;
        }
        // The names of a layer stay, and opening one may take for ever.
        let _still = (dir.layer == UPPER).then(|| self.topology.read());
        let mut missing = vec![dir.clone()];
        let mut fd = loop {
            let position = missing[missing.len() - 1].position.lock().clone();
            // A root's descriptor is never taken out of its slot.
            let (parent, _) = position.ok_or(Errno::STALE)?;
            if let Some(fd) = parent.slot.get(false) {
                break fd;
            }
            missing.push(parent);
        };
        while let Some(dir) = missing.pop() {
            let position = dir.position.lock().clone();
            let (_, name) = position.ok_or(Errno::STALE)?;
            fd = Arc::new(open_dir(fd.as_fd(), &name)?);
            if dir.slot.put(fd.clone(), false) {
                self.ring.push(Holder::Dir(Arc::downgrade(&dir)));
            }
        }
        Ok(fd)
    }
}

/// Opens one component as a directory, for use as a starting point only.
fn open_dir(parent: BorrowedFd<'_>, name: &[u8]) -> Res<std::os::fd::OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

/// Opens a directory that [`Tree::fd`] gave, for reading its entries or syncing it.
pub(crate) fn open_for_reading(dir: BorrowedFd<'_>) -> Res<std::os::fd::OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, c".", flags, Mode::empty())
}

/// Opens the root of a layer: the only place where a path with several components,
/// given by the caller of the library, is resolved. Links of procfs are refused.
pub(crate) fn open_root(path: &Path) -> Res<std::os::fd::OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat2(rustix::fs::CWD, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS)
}

/// stat of one name, following nothing and mounting nothing.
pub(crate) fn stat_at(dir: BorrowedFd<'_>, name: &[u8]) -> Res<Stat> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(dir, name, flags, StatxFlags::BASIC_STATS | StatxFlags::BTIME).map(Stat::from)
}

/// stat of an open object.
pub(crate) fn stat_fd(fd: BorrowedFd<'_>) -> Res<Stat> {
    rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS | StatxFlags::BTIME)
        .map(Stat::from)
}

/// A read-only layer, open.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) root: Arc<RealDir>,
    pub(crate) owners: Owners,
    /// Whether records of owners are looked for. The host's own tree shown with its own
    /// numbers has none, and not asking saves a system call per lookup.
    pub(crate) records: bool,
    /// Whether it may hide what is below it.
    pub(crate) whiteouts: bool,
    /// See [`crate::oci`].
    pub(crate) oci_whiteouts: bool,
    /// Its own file system may never answer: who asks for something in it waits, and nobody else does.
    pub(crate) remote: bool,
}

impl Layer {
    /// How an object of this layer is reported when it has no record.
    pub(crate) fn meta(&self, stat: &Stat) -> Option<Meta> {
        let (uid, gid) = match &self.owners {
            Owners::Numeric => (stat.uid, stat.gid),
            Owners::Translated { uids, gids } => (inside(uids, stat.uid), inside(gids, stat.gid)),
        };
        Some(Meta { kind: stat.kind()?, perm: stat.mode & 0o7777, uid, gid, rdev: stat.rdev })
    }
}

/// The inverse of an id map; an id outside of it stays what it is.
fn inside(extents: &[IdExtent], id: u32) -> u32 {
    extents
        .iter()
        .find_map(|e| {
            let offset = id.checked_sub(e.outside)?;
            (offset < e.count).then(|| e.inside.saturating_add(offset))
        })
        .unwrap_or(id)
}

/// The paths of a layer that are shown as empty directories, are far, or show what is elsewhere, too, by
/// component.
#[derive(Debug, Default)]
pub(crate) struct Hidden {
    children: BTreeMap<Box<[u8]>, Arc<Hidden>>,
    terminal: bool,
    far: Option<Arc<Far>>,
    pub(crate) repeated: bool,
}

impl Hidden {
    /// Builds the tree of names; `None` if there is nothing to say. `repeated` are the places of objects
    /// that have another one in the layers.
    pub(crate) fn new<'a>(
        paths: impl IntoIterator<Item = (&'a Path, Option<Arc<Far>>)>,
        repeated: impl IntoIterator<Item = PathBuf>,
    ) -> Option<Arc<Self>> {
        let mut root = HiddenBuilder::default();
        for (path, far) in paths {
            let at = root.at(path);
            at.terminal |= far.is_none();
            at.far = far;
        }
        for path in repeated {
            root.at(&path).repeated = true;
        }
        (!root.children.is_empty()).then(|| root.build())
    }

    /// The names in here that are hidden themselves.
    pub(crate) fn names(&self) -> impl Iterator<Item = &[u8]> {
        self.children.iter().filter(|(_, h)| h.terminal).map(|(name, _)| &**name)
    }
}

#[derive(Default)]
struct HiddenBuilder {
    children: BTreeMap<Box<[u8]>, HiddenBuilder>,
    terminal: bool,
    far: Option<Arc<Far>>,
    repeated: bool,
}

impl HiddenBuilder {
    fn at(&mut self, path: &Path) -> &mut Self {
        let mut at = self;
        for component in path.components() {
            if let Component::Normal(name) = component {
                at = at.children.entry(std::os::unix::ffi::OsStrExt::as_bytes(name).into()).or_default();
            }
        }
        at
    }

    fn build(self) -> Arc<Hidden> {
        let children = self.children.into_iter().map(|(name, child)| (name, child.build())).collect();
        Arc::new(Hidden { children, terminal: self.terminal, far: self.far, repeated: self.repeated })
    }
}

/// The finaliser of splitmix64: a bijection that spreads every bit.
pub(crate) fn mix(mut x: u64) -> u64 {
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_outside_the_map_are_reported_as_they_are() {
        let map = [
            IdExtent { inside: 0, outside: 1000, count: 1 },
            IdExtent { inside: 1, outside: 100_000, count: 65536 },
        ];
        assert_eq!(inside(&map, 1000), 0);
        assert_eq!(inside(&map, 100_032), 33);
        assert_eq!(inside(&map, 7), 7);
        assert_eq!(inside(&map, 165_536), 165_536);
    }

    #[test]
    fn hidden_paths_are_found_by_component() {
        let hidden =
            Hidden::new([Path::new("proc"), Path::new("/home/me/state")].map(|path| (path, None)), [])
                .expect("not empty");
        assert_eq!(hidden.names().collect::<Vec<_>>(), [b"proc"]);
        let home = &hidden.children[&b"home"[..]];
        assert!(!home.terminal && home.children[&b"me"[..]].children[&b"state"[..]].terminal);
        assert!(Hidden::new([], []).is_none());
    }
}
