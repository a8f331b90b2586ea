//! The overlay as the deciding modules see it: layers, upper, table and caches.
//!
//! Each operation is a method of [`Engine`] in the module that decides it:
//! `lookup`, `readdir`, `copyup`, `whiteout`, `rename`, `create`, `setattr`, `xattr`,
//! `data`. They speak of [`Node`]s and errno; FUSE is known to [`crate::fs`] only.

use std::collections::HashMap;
use std::hash::RandomState;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::SystemTime;

use rustix::fs::{AtFlags, Mode, OFlags};

use crate::attr::{Attr, Key, Kind, Meta, Stat, Time};
use crate::config::{OverlaySpec, Owners};
use crate::errno::{Errno, Res};
use crate::generated::{GENERATED_ROOT, GenTree};
use crate::handle::{Fd, FdRing, Holder, Pins};
use crate::inode::{DirState, Inner, NewNode, Node, Place, ROOT, Table};
use crate::layer::{
    Hidden, InodeNumbers, Layer, LayerIdx, RealDir, Tree, UPPER, open_root, stat_at, stat_fd,
};
use crate::sidecar::Sidecar;
use crate::sync::Mutex;
use crate::whiteout::WhiteoutForm;
use crate::xattr::Marks;
use crate::{Error, sys};

/// The writable layer, open.
#[derive(Debug)]
pub(crate) struct Upper {
    pub(crate) root: Arc<RealDir>,
    /// The work directory: temporary names live here until they are complete.
    pub(crate) work: Fd,
    counter: AtomicU64,
    pub(crate) whiteout_form: WhiteoutForm,
    pub(crate) sidecar: Sidecar,
    /// Something was changed through this overlay.
    touched: AtomicBool,
    /// The upper held something before the first change; set with `touched`.
    held_something: AtomicBool,
    /// Owner, mode, times or xattrs of a directory were changed: the only lasting
    /// change that a walk of the upper does not show.
    pub(crate) dir_meta_changed: AtomicBool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Engine {
    /// The lowest first, as in the spec.
    pub(crate) layers: Vec<Layer>,
    pub(crate) generated: GenTree,
    pub(crate) upper: Option<Upper>,
    pub(crate) tree: Tree,
    pub(crate) table: Arc<Table>,
    pub(crate) numbers: InodeNumbers,
    pub(crate) pins: Arc<Pins>,
    pub(crate) squash: Option<(u32, u32)>,
    /// The owner of an object of the upper that has no record.
    pub(crate) default_owner: (u32, u32),
    /// Inode numbers of upper objects that the disk cannot tell: of copied-up symbolic
    /// links, hard links and generated objects.
    pub(crate) aliases: Mutex<HashMap<Key, u64>>,
    /// Nodes that must outlive the kernel's interest: copied-up files that have further
    /// names in a lower layer, which would show the old content otherwise.
    pub(crate) kept: Mutex<HashMap<u64, Arc<Node>>>,
    pub(crate) listings: crate::readdir::Kept,
    /// Keys the positions of directory entries.
    pub(crate) hasher: RandomState,
    pub(crate) opened: Time,
    root: Arc<Node>,
}

fn open_error(path: &std::path::Path, source: Errno) -> Error {
    Error::Open { path: path.to_owned(), source: source.into() }
}

impl Engine {
    /// Opens what the spec names. No directory is read and no thread started.
    pub(crate) fn open(spec: &OverlaySpec) -> Result<Self, Error> {
        let mut layers = Vec::with_capacity(spec.layers.len());
        for (index, layer) in spec.layers.iter().enumerate() {
            let opened = open_root(&layer.dir).and_then(|fd| {
                let stat = stat_fd(fd.as_fd())?;
                Ok((Arc::new(fd), stat))
            });
            let (fd, stat) = opened.map_err(|err| open_error(&layer.dir, err))?;
            let index = LayerIdx::try_from(index).map_err(|_| open_error(&layer.dir, Errno::TOOBIG))?;
            let hidden = Hidden::new(layer.hidden.iter().map(AsRef::as_ref));
            layers.push(Layer {
                root: RealDir::root(index, fd, stat.key, hidden),
                owners: layer.owners.clone(),
                records: layer.owners != Owners::Numeric || layer.dir != std::path::Path::new("/"),
            });
        }
        let upper = spec.upper.as_ref().map(Upper::open).transpose()?;
        if upper.is_none() && layers.is_empty() {
            return Err(Error::Nothing);
        }
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(4096);
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let table = Table::new();
        let default_owner = spec.squash.unwrap_or((0, 0));
        let generated = GenTree::new(&spec.generated);
        let opened = Time::from_system(SystemTime::now());
        let root = make_root(&table, &layers, upper.as_ref(), &generated, default_owner)?;
        Ok(Self {
            layers,
            generated,
            upper,
            tree: Tree { ring: FdRing::new((limit / 4).clamp(32, 4096)), topology: Default::default() },
            table,
            numbers: InodeNumbers::default(),
            pins: Pins::new((limit / 8).clamp(16, 2048)),
            squash: spec.squash,
            default_owner,
            aliases: Mutex::default(),
            kept: Mutex::default(),
            listings: Default::default(),
            hasher: RandomState::new(),
            opened,
            root,
        })
    }

    pub(crate) fn root(&self) -> &Arc<Node> {
        &self.root
    }

    /// The node of a number that the kernel gave.
    pub(crate) fn node(&self, ino: u64) -> Res<Arc<Node>> {
        if ino == ROOT {
            return Ok(self.root.clone());
        }
        self.table.get(ino).ok_or(Errno::STALE)
    }

    /// The upper, or `EROFS`.
    pub(crate) fn upper(&self) -> Res<&Upper> {
        self.upper.as_ref().ok_or(Errno::ROFS)
    }

    /// Descriptor of a directory of a layer.
    pub(crate) fn fd(&self, dir: &Arc<RealDir>) -> Res<Fd> {
        self.tree.fd(dir)
    }

    /// Descriptor of a directory in the upper, which must have been copied up.
    pub(crate) fn upper_fd(&self, dir: &Node) -> Res<Fd> {
        self.fd(dir.upper_dir()?)
    }

    /// Notes that the upper is about to change.
    pub(crate) fn touch(&self) -> Res<&Upper> {
        let upper = self.upper()?;
        if !upper.touched.load(Ordering::Acquire) {
            let held = !upper.is_empty()?;
            upper.held_something.fetch_or(held, Ordering::AcqRel);
            upper.touched.store(true, Ordering::Release);
        }
        Ok(upper)
    }

    /// The attributes of an object, as they are to be reported.
    pub(crate) fn attr(&self, node: &Arc<Node>) -> Res<Attr> {
        let stat = self.stat(node)?;
        let (meta, extra) = {
            let inner = node.inner.lock();
            (inner.meta, inner.extra_links)
        };
        let nlink = u32::try_from(i64::from(stat.nlink) + extra).unwrap_or(0);
        Ok(self.report(node.ino, &stat, &meta, nlink))
    }

    /// Puts what the disk says and what is recorded together.
    pub(crate) fn report(&self, ino: u64, stat: &Stat, meta: &Meta, nlink: u32) -> Attr {
        let (uid, gid) = self.squash.unwrap_or((meta.uid, meta.gid));
        let special = meta.kind.is_special();
        Attr {
            ino,
            kind: meta.kind,
            perm: meta.perm,
            nlink,
            uid,
            gid,
            rdev: meta.rdev,
            size: if special { 0 } else { stat.size },
            blocks: if special { 0 } else { stat.blocks },
            blksize: if stat.blksize == 0 { 4096 } else { stat.blksize },
            atime: stat.atime,
            mtime: stat.mtime,
            ctime: stat.ctime,
        }
    }

    /// stat of the object wherever it is now. For directories that are merged from
    /// several, `nlink` is 1, which means "not counted" (as the kernel's overlayfs does).
    pub(crate) fn stat(&self, node: &Arc<Node>) -> Res<Stat> {
        if let Some(part) = &node.dir {
            return self.stat_dir(node, part);
        }
        // A rename may move the name away between reading it and using it.
        for _ in 0..64 {
            if let Some(fd) = node.file.get(false) {
                return stat_fd(fd.as_fd());
            }
            let (place, link, key) = {
                let inner = node.inner.lock();
                (inner.place.clone(), inner.links.first().cloned(), inner.key)
            };
            let found = match place {
                Place::Upper => {
                    let Some(link) = link else { continue };
                    stat_at(self.upper_fd(&link.parent)?.as_fd(), &link.name)
                }
                Place::Lower { dir, name } => return stat_at(self.fd(&dir)?.as_fd(), &name),
                Place::Generated(index) => return Ok(self.generated_stat(index)),
                Place::Unlinked(pinned) => return stat_fd(pinned.fd.as_fd()),
                Place::Parked(parked) => {
                    let mut stat = stat_at(parked.work.as_fd(), &parked.name)?;
                    stat.nlink = stat.nlink.saturating_sub(1);
                    return Ok(stat);
                }
                Place::Gone(stat) => return Ok(*stat),
            };
            match found {
                Ok(stat) if stat.key == key => return Ok(stat),
                Ok(_) | Err(Errno::NOENT) => std::thread::yield_now(),
                Err(err) => return Err(err),
            }
        }
        Err(Errno::STALE)
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
            (None, None, Some(dir)) => stat_fd(self.fd(dir)?.as_fd())?,
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
        let (uid, gid) = self.default_owner;
        let perm = if node.kind() == Kind::Symlink { 0o777 } else { node.perm };
        Meta { kind: node.kind(), perm, uid, gid, rdev: (0, 0) }
    }

    /// The descriptor of a regular file's content; `None` for content in memory. With
    /// `writable` the file must be in the upper.
    pub(crate) fn open_file(&self, node: &Arc<Node>, writable: bool) -> Res<Content> {
        if node.kind != Kind::File {
            return Err(Errno::INVAL);
        }
        for _ in 0..64 {
            if let Some(fd) = node.file.get(writable) {
                return Ok(Content::File(fd));
            }
            let (place, link, key) = {
                let inner = node.inner.lock();
                (inner.place.clone(), inner.links.first().cloned(), inner.key)
            };
            let (opened, can_write) = match place {
                Place::Upper => {
                    let Some(link) = link else { continue };
                    open_content(&*self.upper_fd(&link.parent)?, &link.name, writable)
                }
                Place::Parked(parked) => open_content(&*parked.work, &parked.name, writable),
                Place::Lower { .. } if writable => return Err(Errno::ROFS),
                Place::Lower { dir, name } => (open_lower(&*self.fd(&dir)?, &name), false),
                Place::Generated(index) => return Ok(Content::Memory(self.generated.node(index).bytes())),
                Place::Unlinked(pinned) => return Ok(Content::File(pinned.fd.clone())),
                Place::Gone(_) => return Err(Errno::STALE),
            };
            let fd = match opened {
                Ok(fd) => Arc::new(fd),
                Err(Errno::NOENT) => {
                    std::thread::yield_now();
                    continue;
                }
                // O_NOFOLLOW met a link, or something else stands there now.
                Err(Errno::LOOP | Errno::NXIO | Errno::NOTDIR) => return Err(Errno::STALE),
                Err(err) => return Err(err),
            };
            let stat = stat_fd(fd.as_fd())?;
            if stat.key != key || stat.kind() != Some(Kind::File) {
                std::thread::yield_now();
                continue;
            }
            // Kept under the lock that guards the place: after a copy-up the old
            // descriptor must not come back into the slot.
            let queue = {
                let inner = node.inner.lock();
                inner.key == key && node.file.put(fd.clone(), can_write)
            };
            if queue {
                self.tree.ring.push(Holder::File(Arc::downgrade(node)));
            }
            return Ok(Content::File(fd));
        }
        Err(Errno::STALE)
    }
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
fn open_content(dir: impl AsFd, name: &[u8], writable: bool) -> (Res<std::os::fd::OwnedFd>, bool) {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    match rustix::fs::openat(&dir, name, OFlags::RDWR | flags, Mode::empty()) {
        Err(Errno::ACCESS | Errno::PERM | Errno::ROFS | Errno::TXTBSY) if !writable => {
            (rustix::fs::openat(&dir, name, OFlags::RDONLY | flags, Mode::empty()), false)
        }
        other => (other, true),
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

impl Upper {
    fn open(spec: &crate::config::UpperSpec) -> Result<Self, Error> {
        let dir = open_root(&spec.dir).map_err(|err| open_error(&spec.dir, err))?;
        let stat = stat_fd(dir.as_fd()).map_err(|err| open_error(&spec.dir, err))?;
        rustix::fs::accessat(
            &dir,
            c".",
            rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK,
            AtFlags::EACCESS,
        )
        .map_err(|err| open_error(&spec.dir, err))?;
        let work = open_root(&spec.work).map_err(|err| open_error(&spec.work, err))?;
        let work_stat = stat_fd(work.as_fd()).map_err(|err| open_error(&spec.work, err))?;
        if work_stat.key.dev != stat.key.dev {
            return Err(Error::WorkElsewhere { upper: spec.dir.clone(), work: spec.work.clone() });
        }
        match sys::get_xattr(sys::At::Name(dir.as_fd(), b"."), "user.fsoverlay.probe", &mut []) {
            Ok(_) | Err(Errno::NODATA | Errno::RANGE) => {}
            Err(Errno::OPNOTSUPP) => return Err(Error::NoXattrs { path: spec.dir.clone() }),
            Err(err) => return Err(open_error(&spec.dir, err)),
        }
        let work = Arc::new(work);
        Ok(Self {
            root: RealDir::root(UPPER, Arc::new(dir), stat.key, None),
            sidecar: Sidecar::new(work.clone()),
            work,
            counter: AtomicU64::new(u64::from(std::process::id()) << 32),
            whiteout_form: WhiteoutForm::default(),
            touched: AtomicBool::new(false),
            held_something: AtomicBool::new(false),
            dir_meta_changed: AtomicBool::new(false),
        })
    }

    /// A name for the work directory that was not used before by this process; if a
    /// left-over of another one has it, the caller gets `EEXIST` and asks again.
    pub(crate) fn temp_name(&self) -> Box<[u8]> {
        format!("#{:x}", self.counter.fetch_add(1, Ordering::Relaxed)).into_bytes().into()
    }

    fn is_empty(&self) -> Res<bool> {
        let root = self.root.slot.get(false).ok_or(Errno::STALE)?;
        let fd = crate::layer::open_for_reading(root.as_fd())?;
        let mut empty = true;
        crate::readdir::for_each_entry(&fd, |_, _, _| {
            empty = false;
            false
        })?;
        Ok(empty)
    }

    pub(crate) fn was_touched(&self) -> bool {
        self.touched.load(Ordering::Acquire)
    }

    pub(crate) fn held_something(&self) -> bool {
        self.held_something.load(Ordering::Acquire)
    }
}

/// The root directory. Its owner and mode are those of the topmost layer until they are
/// changed in the mount: the upper's own directory belongs to whoever stores boxes.
fn make_root(
    table: &Arc<Table>,
    layers: &[Layer],
    upper: Option<&Upper>,
    generated: &GenTree,
    default_owner: (u32, u32),
) -> Result<Arc<Node>, Error> {
    let root_error = |err| open_error(std::path::Path::new("/"), err);
    let marks_of = |dir: &Arc<RealDir>| -> Result<Marks, Error> {
        let fd = dir.slot.get(false).ok_or_else(|| root_error(Errno::STALE))?;
        Marks::read(sys::At::Name(fd.as_fd(), b".")).map_err(root_error)
    };
    let mut state =
        DirState { generated: (!generated.is_empty()).then_some(GENERATED_ROOT), ..DirState::default() };
    let mut meta = None;
    let mut opaque = false;
    let mut inner_marks = Marks::default();
    if let Some(upper) = upper {
        inner_marks = marks_of(&upper.root)?;
        opaque = inner_marks.opaque;
        inner_marks.note(&upper.root);
        meta = inner_marks.record.as_deref().and_then(|r| Meta::from_record(r, Kind::Dir));
    }
    let root_gen = generated.node(GENERATED_ROOT);
    let plain =
        |perm| Meta { kind: Kind::Dir, perm, uid: default_owner.0, gid: default_owner.1, rdev: (0, 0) };
    if meta.is_none() && root_gen.explicit {
        meta = Some(plain(root_gen.perm));
    }
    if opaque {
        state.generated = None;
    }
    for layer in layers.iter().rev() {
        if opaque {
            break;
        }
        let fd = layer.root.slot.get(false).ok_or_else(|| root_error(Errno::STALE))?;
        let marks = if layer.records { marks_of(&layer.root)? } else { Marks::default() };
        marks.note(&layer.root);
        if meta.is_none() {
            let stat = stat_fd(fd.as_fd()).map_err(root_error)?;
            meta = marks
                .record
                .as_deref()
                .and_then(|r| Meta::from_record(r, Kind::Dir))
                .or_else(|| layer.meta(&stat));
        }
        state.lowers.push(layer.root.clone());
        opaque = marks.opaque;
    }
    let key = upper.map_or_else(|| layers.last().map(|l| l.root.key).unwrap_or_default(), |u| u.root.key);
    let new = NewNode {
        kind: Kind::Dir,
        inner: Inner {
            meta: meta.unwrap_or_else(|| plain(0o755)),
            key,
            origin: None,
            place: Place::Upper,
            links: Vec::new(),
            extra_links: 0,
            has_record: inner_marks.record.is_some(),
            has_acl: inner_marks.acl,
            no_capability: true,
        },
        upper: upper.map(|u| u.root.clone()),
        state,
    };
    Ok(table.intern(ROOT, |_| true, || new))
}
