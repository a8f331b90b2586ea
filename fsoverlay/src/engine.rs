//! The overlay as the deciding modules see it: layers, upper, table and caches.
//!
//! Each operation is a method of [`Engine`] in the module that decides it:
//! `lookup`, `readdir`, `copyup`, `whiteout`, `rename`, `create`, `setattr`, `xattr`,
//! `data`. They speak of [`Node`]s and errno; FUSE is known to [`crate::fs`] only.

use std::hash::RandomState;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::ahead::Ahead;
use crate::attr::{Attr, Kind, Meta, Stat, Time};
use crate::config::{Branch, OverlaySpec, Owners, Records};
use crate::errno::{Errno, Res};
use crate::far::{Far, MountTable, mounts_below};
use crate::generated::{GENERATED_ROOT, GenTree};
use crate::handle::{Fd, FdRing, Pins};
use crate::hooks::{Counts, Hooks};
use crate::inode::{DirState, Inner, NewNode, Node, Place, ROOT, Table};
use crate::journal::Journal;
use crate::layer::{Hidden, Layer, LayerIdx, RealDir, Tree, open_root, stat_fd};
use crate::numbers::InodeNumbers;
use crate::ownership::Ownership;
use crate::passthrough::Passthrough;
use crate::sync::Mutex;
use crate::upper::Upper;
use crate::xattr::Marks;
use crate::{Error, sys};

/// See [`OverlaySpec::patience`].
const PATIENCE: Duration = Duration::from_secs(10);
/// How often the names of an object are counted while somebody changes them again and again.
const MAX_COUNTS: u32 = 10_000;

/// How many [`crate::inode::Aliases`] outlive their objects.
const MAX_ALIASES: usize = 1 << 16;

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
    pub(crate) owners: Ownership,
    static_nlink: bool,
    pub(crate) no_redirects: bool,
    pub(crate) no_acl: bool,
    /// Held by one sync at a time; nobody waits for it.
    pub(crate) syncing: Mutex<()>,
    pub(crate) listings: crate::readdir::Kept,
    /// `None`: nothing is looked up before it is asked for.
    pub(crate) ahead: Option<Ahead>,
    /// Keys the positions of directory entries.
    pub(crate) hasher: RandomState,
    pub(crate) opened: Time,
    /// See [`crate::live`].
    pub(crate) live: Option<Duration>,
    /// The far mounts below the layers, and how long they may take.
    pub(crate) far: Vec<Arc<Far>>,
    pub(crate) patience: Duration,
    /// See [`crate::passthrough`].
    pub(crate) passthrough: Option<Passthrough>,
    pub(crate) hooks: Hooks,
    pub(crate) counts: Counts,
    pub(crate) journal: Journal,
    /// Held while the mode of a file on disk changes, or is another one than it should be. The last of all
    /// locks, held over small I/O.
    pub(crate) modes: Mutex<()>,
    root: Arc<Node>,
}

pub(crate) fn open_error(path: &std::path::Path, source: Errno) -> Error {
    Error::Open { path: path.to_owned(), source: source.into() }
}

impl Engine {
    /// Opens what the spec names. No directory is read and no thread started.
    pub(crate) fn open(spec: &OverlaySpec) -> Result<Self, Error> {
        Self::open_among(&MountTable::read(), spec)
    }

    /// The same, given what is mounted.
    pub(crate) fn open_among(mounted: &MountTable, spec: &OverlaySpec) -> Result<Self, Error> {
        let mut layers = Vec::with_capacity(spec.layers.len());
        let mut far = Vec::new();
        // As they are called: a layer that is within another one by a symbolic link is met as such.
        let roots: Vec<_> =
            spec.layers.iter().map(|layer| std::path::absolute(&layer.dir).unwrap_or_default()).collect();
        for (position, layer) in spec.layers.iter().enumerate() {
            let opened = open_root(&layer.dir).and_then(|fd| {
                let stat = stat_fd(fd.as_fd())?;
                Ok((Arc::new(fd), stat))
            });
            let (fd, stat) = opened.map_err(|err| open_error(&layer.dir, err))?;
            let index = LayerIdx::try_from(position).map_err(|_| open_error(&layer.dir, Errno::TOOBIG))?;
            let own = roots[position].as_os_str().as_encoded_bytes();
            // Most are told by their bytes: there may be hundreds.
            let within = roots
                .iter()
                .filter(|other| other.as_os_str().as_encoded_bytes().starts_with(own))
                .filter_map(|other| Some(other.strip_prefix(&roots[position]).ok()?.to_owned()))
                .filter(|path| !path.as_os_str().is_empty());
            // What was asked for comes last, and so counts.
            let mounts = mounts_below(&fd, mounted);
            let hidden = Hidden::new(
                mounts
                    .special
                    .iter()
                    .map(|(path, far)| (&**path, far.clone()))
                    .chain(layer.hidden.iter().map(|path| (&**path, None))),
                mounts.repeated.into_iter().chain(within),
            );
            far.extend(mounts.special.iter().filter_map(|(_, far)| far.clone()));
            let marks = match (layer.records, layer.oci_whiteouts) {
                (Records::Everywhere, false) => Marks::default(),
                _ => Marks::read_of_layer(sys::At::Name(fd.as_fd(), b"."), index)
                    .map_err(|err| open_error(&layer.dir, err))?,
            };
            let records = match layer.records {
                Records::Everywhere => {
                    layer.owners != Owners::Numeric || layer.dir != std::path::Path::new("/")
                }
                Records::IfMarked => {
                    marks.record.is_some() || marks.owners.as_ref().is_some_and(|form| form != "native")
                }
            };
            let root = RealDir::root(index, fd, stat.key, hidden);
            let whiteouts = layer.branch == Branch::Whiteouts;
            let oci_whiteouts = whiteouts && layer.oci_whiteouts && marks.owners.is_none();
            let remote = mounted.is_remote(stat.key.dev);
            let owners = layer.owners.clone();
            layers.push(Layer { root, owners, records, whiteouts, oci_whiteouts, remote });
        }
        let owners = Ownership::new(spec);
        // The ids in real ACLs are not translated.
        let no_acl = spec.no_acl || owners.native && owners.maps_ids();
        let upper = spec.upper.as_ref().map(|upper| Upper::open(upper, &owners)).transpose()?;
        if upper.is_none() && layers.is_empty() {
            return Err(Error::Nothing);
        }
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(4096);
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let table = Table::new(MAX_ALIASES);
        let generated = GenTree::new(&spec.generated);
        let opened = Time::from_system(SystemTime::now());
        let root = make_root(&table, &layers, upper.as_ref(), &generated, &owners)?;
        let numbers = InodeNumbers::default();
        for dir in upper.iter().map(|upper| &upper.root).chain(layers.iter().map(|layer| &layer.root)) {
            if let Some(fd) = dir.slot.get(false) {
                numbers.meet(dir.key.dev, fd.as_fd());
            }
        }
        if let (Some(upper), Some(spec)) = (&upper, &spec.upper) {
            upper.links.load(upper, &numbers).map_err(|err| open_error(&spec.work, err))?;
        }
        Ok(Self {
            layers,
            generated,
            upper,
            tree: Tree { ring: FdRing::new((limit / 4).clamp(32, 4096)), topology: Default::default() },
            table,
            numbers,
            pins: Pins::new((limit / 8).clamp(16, 2048)),
            owners,
            static_nlink: spec.static_nlink,
            no_redirects: spec.no_redirects,
            no_acl,
            syncing: Mutex::default(),
            listings: Default::default(),
            ahead: (spec.workers > 1 && spec.live.is_none() && far.is_empty()).then(Ahead::default),
            hasher: RandomState::new(),
            opened,
            live: spec.live,
            far,
            patience: spec.patience.unwrap_or(PATIENCE),
            passthrough: spec.passthrough.then(Passthrough::default),
            hooks: Hooks::default(),
            counts: Counts::default(),
            journal: Journal::default(),
            modes: Mutex::default(),
            root,
        })
    }

    /// Before anything is served.
    pub(crate) fn set_hooks(&mut self, hooks: Hooks) {
        if let Some(quota) = &hooks.quota {
            let _ = self.pins.quota.set(quota.clone());
            if let Some(upper) = &self.upper {
                let _ = upper.sidecar.quota.set(quota.clone());
            }
        }
        if hooks.trace.is_some() {
            self.ahead = None;
        }
        self.journal = Journal::new(hooks.journal);
        self.hooks = hooks;
    }

    pub(crate) fn root(&self) -> &Arc<Node> {
        &self.root
    }

    /// The node of a number that the kernel gave.
    pub(crate) fn node(&self, ino: u64) -> Res<Arc<Node>> {
        if ino == ROOT {
            return Ok(self.root.clone());
        }
        let node = self.table.get(ino).ok_or(Errno::STALE)?;
        if let Some((far, _)) = node.far.get() {
            far.check()?;
        }
        Ok(node)
    }

    /// Descriptor of a directory of a layer.
    pub(crate) fn fd(&self, dir: &Arc<RealDir>) -> Res<Fd> {
        self.tree.fd(dir)
    }

    /// The attributes of an object, as they are to be reported.
    pub(crate) fn attr(&self, node: &Arc<Node>) -> Res<Attr> {
        let mut tries = 0;
        loop {
            let before = node.names.wait_settled();
            let attr = self.report(node, self.stat(node)?);
            if before.is_none() || node.names.settled() == before || tries == MAX_COUNTS {
                return Ok(attr);
            }
            // Somebody changed its names meanwhile, or is about to.
            tries += 1;
        }
    }

    /// Puts what the disk says and what is recorded together.
    pub(crate) fn report(&self, node: &Node, stat: Stat) -> Attr {
        let (meta, extra_links) = {
            let inner = node.inner.lock();
            (inner.meta, inner.extra_links)
        };
        self.report_as(node.ino, meta, stat, extra_links)
    }

    /// The same for an object that need not be a node.
    pub(crate) fn report_as(&self, ino: u64, mut meta: Meta, mut stat: Stat, extra_links: i64) -> Attr {
        (meta.uid, meta.gid) = self.owners.reported(meta.uid, meta.gid);
        stat.nlink = u32::try_from(i64::from(stat.nlink) + extra_links).unwrap_or(0);
        if self.static_nlink && meta.kind == Kind::Dir {
            stat.nlink = 1;
        }
        if meta.kind.is_special() {
            (stat.size, stat.blocks) = (0, 0);
        }
        if stat.blksize == 0 {
            stat.blksize = 4096;
        }
        Attr { ino, meta, stat }
    }
}

/// The root directory. Its owner and mode are those of the topmost layer until they are
/// changed in the mount: the upper's own directory belongs to whoever stores boxes.
fn make_root(
    table: &Arc<Table>,
    layers: &[Layer],
    upper: Option<&Upper>,
    generated: &GenTree,
    owners: &Ownership,
) -> Result<Arc<Node>, Error> {
    let root_error = |err| open_error(std::path::Path::new("/"), err);
    let marks_of = |dir: &Arc<RealDir>| -> Result<Marks, Error> {
        let fd = dir.slot.get(false).ok_or_else(|| root_error(Errno::STALE))?;
        // What the caller may not read of a layer has no marks.
        Marks::read_of_layer(sys::At::Name(fd.as_fd(), b"."), dir.layer).map_err(root_error)
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
        meta = inner_marks.record.as_deref().and_then(|r| owners.read_record(r, Kind::Dir));
        if meta.is_none() && owners.native {
            let fd = upper.root.slot.get(false).ok_or_else(|| root_error(Errno::STALE))?;
            let stat = stat_fd(fd.as_fd()).map_err(root_error)?;
            meta = Some(owners.unrecorded(&stat, Kind::Dir));
        }
    }
    let root_gen = generated.node(GENERATED_ROOT);
    let plain =
        |perm| Meta { kind: Kind::Dir, perm, uid: owners.default.0, gid: owners.default.1, rdev: (0, 0) };
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
        let marks = if layer.whiteouts { marks } else { marks.harmless() };
        marks.note(&layer.root);
        if meta.is_none() {
            let stat = stat_fd(fd.as_fd()).map_err(root_error)?;
            meta = marks
                .record
                .as_deref()
                .and_then(|r| owners.read_record(r, Kind::Dir))
                .or_else(|| layer.meta(&stat).map(|meta| owners.shown(meta)));
        }
        state.lowers.push(layer.root.clone());
        opaque = marks.opaque
            || layer.oci_whiteouts && crate::oci::is_opaque_by_name(fd.as_fd()).map_err(root_error)?;
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
            below: 0,
            entry: false,
            has_record: inner_marks.record.is_some(),
            has_acl: inner_marks.acl,
            no_capability: true,
        },
        upper: upper.map(|u| u.root.clone()),
        state,
    };
    Ok(table.intern(ROOT, || 1, |_| true, || new))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::config::{LayerSpec, UpperSpec};
    use crate::create::NewObject;
    use crate::layer::stat_at;
    use crate::rename::How;
    use crate::setattr::SetAttr;

    /// Numbers below the one that is asked for, the same for the same seed.
    pub(crate) fn dice(seed: u64) -> impl FnMut(usize) -> usize {
        let mut state = crate::layer::mix(seed);
        move |below| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            usize::try_from(crate::layer::mix(state) % below as u64).unwrap_or(0)
        }
    }

    /// An overlay without a mount in a directory of its own, removed with it.
    pub(crate) struct Scratch {
        pub(crate) dir: std::path::PathBuf,
        pub(crate) engine: Engine,
    }

    /// The overlay of all layers (`lower`, `lower1`, …; the lowest first) in a directory.
    fn spec_of(dir: &std::path::Path) -> OverlaySpec {
        let names = std::iter::once("lower".to_owned()).chain((1..).map(|n| format!("lower{n}")));
        let dirs = names.map(|name| dir.join(name)).take_while(|dir| dir.exists());
        OverlaySpec {
            layers: dirs.map(|dir| LayerSpec { dir, ..LayerSpec::default() }).collect(),
            upper: Some(UpperSpec { dir: dir.join("upper"), work: dir.join("work"), ..UpperSpec::default() }),
            squash: Some((0, 0)),
            ..OverlaySpec::default()
        }
    }

    impl Scratch {
        pub(crate) fn new(name: &str) -> Self {
            Self::with_layers(name, 1)
        }

        pub(crate) fn with_layers(name: &str, count: usize) -> Self {
            let dir = std::env::temp_dir().join(format!("fsoverlay-{name}-{}", std::process::id()));
            for part in ["lower", "upper", "work"] {
                std::fs::create_dir_all(dir.join(part)).expect("a temporary directory");
            }
            for n in 1..count {
                std::fs::create_dir(dir.join(format!("lower{n}"))).expect("made");
            }
            let engine = Engine::open(&spec_of(&dir)).expect("an overlay");
            Self { dir, engine }
        }

        /// The spec that the engine was opened with.
        pub(crate) fn spec(&self) -> OverlaySpec {
            spec_of(&self.dir)
        }

        /// Puts files, directories, links and hard links into the layer, four names in each of a few
        /// directories.
        pub(crate) fn fill_lower(&self) {
            let lower = self.dir.join("lower");
            for dir in ["", "a", "a/a", "b"] {
                let dir = lower.join(dir);
                std::fs::create_dir_all(&dir).expect("made");
                std::fs::write(dir.join("c"), [7; 8192]).expect("written");
                let _ = std::fs::remove_file(dir.join("d"));
                std::os::unix::fs::symlink("c", dir.join("d")).expect("linked");
            }
            std::fs::hard_link(lower.join("c"), lower.join("b/b")).expect("linked");
        }

        /// Some change of something that [`Scratch::fill_lower`] put there, or of what came of it. Whether
        /// it succeeds is up to chance.
        pub(crate) fn change_something(&self, random: &mut dyn FnMut(usize) -> usize) {
            const NAMES: [&[u8]; 4] = [b"a", b"b", b"c", b"d"];
            let engine = &self.engine;
            let mut pick = || {
                let mut dir = engine.root().clone();
                for _ in 0..random(3) {
                    match engine.lookup(&dir, NAMES[random(2)]) {
                        Ok(node) if node.kind == Kind::Dir => dir = node,
                        _ => {}
                    }
                }
                (dir, NAMES[random(4)])
            };
            let ((dir, name), (to, new_name)) = (pick(), pick());
            let node = engine.lookup(&dir, name);
            let make = |kind| {
                let new =
                    NewObject { kind, perm: 0o755, umask: 0, rdev: (0, 0), target: b"x", owner: (0, 0) };
                match engine.lookup(&dir, name) {
                    Err(Errno::NOENT) => engine.create(&dir, name, &new).map(drop),
                    other => other.map(drop),
                }
            };
            let below = |node: &Arc<Node>| {
                let mut at = Some(to.clone());
                while let Some(dir) = at {
                    if dir.ino == node.ino {
                        return true;
                    }
                    at = dir.first_link().map(|link| link.parent);
                }
                false
            };
            let done = match (random(12), node) {
                (0, _) => make(Kind::Dir),
                (1, _) => make(Kind::Symlink),
                (2, _) => make(Kind::File),
                (3, _) => engine.unlink(&dir, name),
                (4, _) => engine.rmdir(&dir, name),
                (5 | 6, Ok(node)) => {
                    let block = random(8) as u64 * 4096;
                    engine.write(&node, block, &[7; 4096], false).map(drop)
                }
                (7, Ok(node)) => {
                    let set = SetAttr { size: Some(random(8) as u64 * 4096), ..SetAttr::default() };
                    engine.set_attr(&node, set).map(drop)
                }
                (8, Ok(node)) => {
                    let set = SetAttr { perm: Some([0o600, 0o755, 0o4711][random(3)]), ..SetAttr::default() };
                    engine.set_attr(&node, set).map(drop)
                }
                (9, Ok(node)) => engine.link(&node, &to, new_name),
                (how, Ok(node)) if !below(&node) => {
                    let how = if how == 10 { How::Replace } else { How::Exchange };
                    match engine.lookup(&to, new_name) {
                        // The kernel asks for no such thing.
                        Ok(target) if target.kind == Kind::Dir && how == How::Exchange => Ok(()),
                        _ => engine.rename(&dir, name, &to, new_name, how),
                    }
                }
                _ => Ok(()),
            };
            // The kernel sees to it that no directory is moved into itself, names are checked, and so on:
            // here it is enough that nothing panics.
            let _ = done;
        }

        /// Makes an object at the top; the target of a link is its name.
        pub(crate) fn make(&self, name: &[u8], kind: Kind) -> Arc<Node> {
            let new = NewObject { kind, perm: 0o644, umask: 0, rdev: (0, 0), target: name, owner: (0, 0) };
            self.engine.create(self.engine.root(), name, &new).expect("made")
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }

    #[test]
    fn what_was_copied_up_since_it_was_held_stays_reachable() {
        let scratch = Scratch::new("held");
        std::fs::write(scratch.dir.join("lower/file"), "content").expect("written");
        let engine = &scratch.engine;
        let file = engine.lookup(engine.root(), b"file").expect("is there");
        let held = engine.hold(&file);
        assert_eq!(engine.copy_up(&file), Ok(()));
        let dir = engine.upper_fd(engine.root()).expect("the upper");
        let stat = stat_at(dir.as_fd(), b"file").expect("a copy");
        let parked = engine.park(&file, engine.root(), b"file", Some(&stat), &held);
        assert!(parked.is_ok_and(|parked| parked.is_some()));
    }

    #[test]
    fn an_upper_directory_outlives_the_one_below() {
        let scratch = Scratch::new("outlives");
        let engine = &scratch.engine;
        std::fs::create_dir(scratch.dir.join("lower/dir")).expect("made");
        let dir = engine.lookup(engine.root(), b"dir").expect("found");
        let new =
            NewObject { kind: Kind::Dir, perm: 0o755, umask: 0, rdev: (0, 0), target: b"", owner: (0, 0) };
        engine.create(&dir, b"sub", &new).expect("made");
        std::fs::remove_dir(scratch.dir.join("lower/dir")).expect("removed");
        for below in &dir.dir().expect("a directory").state.read().lowers {
            drop(below.slot.take());
        }
        assert!(engine.lookup(&dir, b"sub").is_ok());
        assert_eq!(engine.lookup(&dir, b"none").map(|node| node.ino), Err(Errno::NOENT));
        assert_eq!(engine.read_dir(&dir, 2, 9).map(|entries| entries.len()), Ok(1));
    }

    #[test]
    fn entries_last_while_a_name_of_theirs_is_not_in_the_upper() {
        let scratch = Scratch::new("entries");
        let (engine, lower) = (&scratch.engine, scratch.dir.join("lower"));
        let entries = || std::fs::read_dir(scratch.dir.join("work/links")).map_or(0, Iterator::count);
        let look = |name: &str| engine.lookup(engine.root(), name.as_bytes()).expect("found");
        let links = |node: &Arc<Node>| engine.attr(node).map(|attr| attr.stat.nlink);
        for file in ["changed", "partly", "gone", "removed"] {
            std::fs::write(lower.join(file), file).expect("written");
            std::fs::hard_link(lower.join(file), lower.join(format!("{file}2"))).expect("linked");
        }
        // Both names are known, and both are in the upper then.
        let file = look("changed");
        assert_eq!(look("changed2").ino, file.ino);
        assert_eq!(engine.copy_up(&file), Ok(()));
        assert_eq!((entries(), links(&file)), (0, Ok(2)));
        let number = file.ino;
        drop(file);
        assert_eq!([look("changed").ino, look("changed2").ino], [number; 2]);
        // One is known; the other must not lead to the layer's file later.
        assert_eq!(engine.copy_up(&look("partly")), Ok(()));
        assert_eq!((entries(), links(&look("partly"))), (1, Ok(2)));
        assert_eq!(look("partly2").ino, look("partly").ino);
        assert_eq!((entries(), links(&look("partly"))), (0, Ok(2)));
        // The one that was changed is gone; nobody knows the other yet.
        assert_eq!(engine.write(&look("gone"), 0, b"N", false), Ok(1));
        assert_eq!(engine.unlink(engine.root(), b"gone"), Ok(()));
        assert_eq!(entries(), 1);
        let other = look("gone2");
        let mut byte = [0];
        assert_eq!((engine.read(&other, 0, &mut byte), byte), (Ok(1), *b"N"));
        assert_eq!((entries(), links(&other)), (0, Ok(1)));
        // Names that are gone without a copy-up.
        let file = look("removed");
        assert_eq!(look("removed2").ino, file.ino);
        assert_eq!(engine.unlink(engine.root(), b"removed"), Ok(()));
        assert_eq!((entries(), links(&file)), (1, Ok(1)));
        assert_eq!(engine.unlink(engine.root(), b"removed2"), Ok(()));
        assert_eq!((entries(), links(&file)), (0, Ok(0)));
    }

    #[test]
    fn the_root_of_a_layer_that_the_caller_may_not_read_is_empty() {
        use std::os::unix::fs::PermissionsExt;
        let scratch = Scratch::new("unread");
        let lower = scratch.dir.join("lower");
        std::fs::write(lower.join("file"), "x").expect("written");
        let empty = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(&lower, "user.containers.override_stat", b"0:0:0700", empty).expect("set");
        let close = |perm| std::fs::set_permissions(&lower, PermissionsExt::from_mode(perm)).expect("set");
        close(0);
        let opened = Engine::open(&scratch.spec());
        let seen = opened.map(|engine| {
            let root = engine.root().clone();
            let found = engine.lookup(&root, b"file").map(drop);
            let new =
                NewObject { kind: Kind::File, perm: 0, umask: 0, rdev: (0, 0), target: b"", owner: (0, 0) };
            let made = engine.create(&root, b"new", &new).map(drop);
            (found, made, engine.read_dir(&root, 0, 9).map(|entries| entries.len()))
        });
        close(0o755);
        let (found, made, listed) = seen.expect("an overlay");
        assert_eq!(made, Ok(()));
        if rustix::process::geteuid().is_root() {
            assert_eq!((found, listed), (Ok(()), Ok(4)));
        } else {
            assert_eq!((found, listed), (Err(Errno::NOENT), Ok(3)));
        }
    }

    #[test]
    fn names_are_counted_right_while_they_change() {
        let scratch = Scratch::new("count");
        let (engine, lower) = (&scratch.engine, scratch.dir.join("lower"));
        std::fs::write(lower.join("a0"), "x").expect("written");
        for i in 1..400 {
            std::fs::hard_link(lower.join("a0"), lower.join(format!("a{i}"))).expect("linked");
        }
        let file = engine.lookup(engine.root(), b"a0").expect("found");
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(engine.write(&file, 0, b"y", false), Ok(1));
                // Each comes into the upper; the first goes away meanwhile, and back again.
                for i in 1..400 {
                    let name = format!("a{i}");
                    assert_eq!(engine.lookup(engine.root(), name.as_bytes()).map(|n| n.ino), Ok(file.ino));
                }
                over.store(true, Ordering::Release);
            });
            scope.spawn(|| {
                while !over.load(Ordering::Acquire) {
                    assert_eq!(engine.attr(&file).map(|attr| attr.stat.nlink), Ok(400));
                }
            });
        });
        assert_eq!(std::fs::read_dir(scratch.dir.join("work/links")).map_or(0, Iterator::count), 0);
    }
}
