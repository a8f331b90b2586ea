//! What an upper changes against the layers below it, from the disk alone.
//!
//! The upper is walked directly; for each entry the layers are asked through an engine
//! that has no upper. So only what was changed costs anything, however large the layers.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::attr::{Kind, Meta, Stat};
use crate::config::{LayerSpec, OverlaySpec, UpperSpec};
use crate::engine::Engine;
use crate::errno::{Errno, Res, missing_ok};
use crate::inode::Node;
use crate::journal::ChangedDir;
use crate::layer::{RealDir, open_for_reading};
use crate::lookup::{Probe, Seen};
use crate::readdir::for_each_entry;
use crate::{Error, sys};

/// One difference between the upper and the layers below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Path in the merged tree, absolute.
    pub path: PathBuf,
    /// What happened to it.
    pub kind: ChangeKind,
}

/// What happened to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// Not in the layers.
    Added,
    /// Content (or type) differs.
    Modified,
    /// In the layers, not in the merged tree.
    Deleted,
    /// Same content; mode, owner, times or xattrs differ.
    Metadata,
}

/// [`changes_of`] where only the directories are known: owners that differ as the
/// caller's own id and 0 do are taken for the same, and so are owners of links.
///
/// # Errors
/// If a layer or the upper cannot be read.
pub fn changes(upper: &Path, layers: &[PathBuf]) -> Result<Vec<Change>, Error> {
    let layer = |dir: &PathBuf| LayerSpec { dir: dir.clone(), ..LayerSpec::default() };
    let spec = OverlaySpec {
        layers: layers.iter().map(layer).collect(),
        upper: Some(UpperSpec { dir: upper.to_owned(), work: upper.to_owned(), ..UpperSpec::default() }),
        ..OverlaySpec::default()
    };
    compare(&spec, true, None)
}

/// Lists what the upper changes against the layers below, by path, parents first.
/// Works on the disk alone; nothing needs to be mounted. `spec` is the one that the
/// overlay was opened with (or will be).
///
/// A directory that is gone is listed itself, not what was in it. One that was renamed is gone at its old
/// path, and at the new one it is listed with all that is in it. Copies that are the
/// same as their originals are not listed. Times of directories are not compared: they
/// follow from changes inside, which are listed.
///
/// # Errors
/// If a layer or the upper cannot be read.
pub fn changes_of(spec: &OverlaySpec) -> Result<Vec<Change>, Error> {
    compare(spec, false, None)
}

/// The same, for the given directories only ([`crate::Server::journal`]). Where the upper was empty when the
/// overlay was opened, it gives what [`changes_of`] gives.
///
/// # Errors
/// If a layer or the upper cannot be read.
pub fn changes_in(spec: &OverlaySpec, dirs: &[ChangedDir]) -> Result<Vec<Change>, Error> {
    compare(spec, false, Some(dirs))
}

fn compare(spec: &OverlaySpec, lenient: bool, dirs: Option<&[ChangedDir]>) -> Result<Vec<Change>, Error> {
    let Some(upper) = &spec.upper else { return Ok(Vec::new()) };
    let failed = |err: Errno| Error::Open { path: upper.dir.clone(), source: err.into() };
    let top = Engine::open(&OverlaySpec { layers: Vec::new(), generated: Vec::new(), ..spec.clone() })?;
    let below =
        Engine::open(&OverlaySpec { upper: None, ..spec.clone() }).map(Some).or_else(|err| match err {
            Error::Nothing => Ok(None),
            other => Err(other),
        })?;
    let mut diff = Diff { top: &top, below: below.as_ref(), lenient, list: Vec::new() };
    let root = top.upper().map_err(failed)?.root.clone();
    let lower = below.as_ref().map(|engine| engine.root().clone());
    let root = diff.root(&root, lower.as_ref()).map_err(failed)?;
    match dirs {
        None => diff.dirs(vec![root], true).map_err(failed)?,
        Some(dirs) => {
            for ChangedDir { path, whole } in dirs {
                if let Some(dir) = diff.find(&root, path).map_err(failed)? {
                    diff.dirs(vec![dir], *whole).map_err(failed)?;
                }
            }
        }
    }
    diff.list.sort_by(|a, b| a.path.cmp(&b.path));
    // One that is in a directory that was moved is met twice.
    diff.list.dedup();
    Ok(diff.list)
}

/// A directory still to be compared.
#[derive(Clone)]
struct Todo {
    /// Its part in the upper.
    dir: Option<Arc<RealDir>>,
    /// The directory below that this merges with: usually the one of the same path, another one if it was
    /// renamed, none if it is opaque.
    merged: Option<Arc<Node>>,
    /// The directory that the layers have at this path.
    old: Option<Arc<Node>>,
    path: PathBuf,
}

/// An object of the merged tree.
enum New<'a> {
    Upper {
        dir: &'a Arc<RealDir>,
        name: &'a [u8],
        seen: Box<Seen>,
    },
    /// One that a renamed directory brought along.
    Below(Arc<Node>),
}

struct Diff<'a> {
    /// An engine that knows the upper only.
    top: &'a Engine,
    /// One that knows everything else.
    below: Option<&'a Engine>,
    /// Owners are not known for sure.
    lenient: bool,
    list: Vec<Change>,
}

fn same_node(a: Option<&Arc<Node>>, b: Option<&Arc<Node>>) -> bool {
    a.map(|node| node.ino) == b.map(|node| node.ino)
}

impl Diff<'_> {
    fn note(&mut self, path: &Path, kind: ChangeKind) {
        self.list.push(Change { path: path.to_owned(), kind });
    }

    fn root(&mut self, upper: &Arc<RealDir>, lower: Option<&Arc<Node>>) -> Res<Todo> {
        let fd = self.top.fd(upper)?;
        let marks = crate::xattr::Marks::read(sys::At::Name(fd.as_fd(), b"."))?;
        let recorded = marks.record.as_deref().and_then(|r| self.top.owners.read_record(r, Kind::Dir));
        if let (Some(meta), Some(lower)) = (recorded, lower)
            && !self.same_meta(lower, meta)
        {
            self.note(Path::new("/"), ChangeKind::Metadata);
        }
        marks.note(upper);
        Ok(Todo {
            dir: Some(upper.clone()),
            merged: lower.filter(|_| !marks.opaque).cloned(),
            old: lower.cloned(),
            path: PathBuf::from("/"),
        })
    }

    /// The directory of this path, if there is still one in the upper.
    fn find(&self, root: &Todo, path: &Path) -> Res<Option<Todo>> {
        let mut at = root.clone();
        for component in path.components() {
            let std::path::Component::Normal(name) = component else { continue };
            let name = name.as_bytes();
            let Some(dir) = &at.dir else { return Ok(None) };
            let Probe::Found(seen) = self.top.probe(dir, name, true)? else { return Ok(None) };
            let before = self.lower(at.old.as_ref(), name)?;
            let path = at.path.join(std::ffi::OsStr::from_bytes(name));
            match self.inside(New::Upper { dir, name, seen }, at.merged.as_ref(), before, path)? {
                Some(found) => at = found,
                None => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    /// Compares directories and, if the whole is wanted, those in them; a list of work, because trees
    /// are deep.
    fn dirs(&mut self, mut work: Vec<Todo>, whole: bool) -> Res<()> {
        while let Some(Todo { dir, merged, old, path }) = work.pop() {
            let path_of = |name: &[u8]| path.join(std::ffi::OsStr::from_bytes(name));
            // What the upper decides, and what is there in the merged tree.
            let (mut decided, mut present) = (BTreeSet::new(), BTreeSet::new());
            if let Some(dir) = &dir {
                let fd = open_for_reading(self.top.fd(dir)?.as_fd())?;
                for_each_entry(&fd, |name, _, _| {
                    decided.insert(Box::<[u8]>::from(name));
                    true
                })?;
                for name in &decided {
                    let before = self.lower(old.as_ref(), name)?;
                    match self.top.probe(dir, name, true)? {
                        Probe::Missing => {}
                        Probe::Whiteout => {
                            if before.is_some() {
                                self.note(&path_of(name), ChangeKind::Deleted);
                                present.insert(name.clone());
                            }
                        }
                        Probe::Found(seen) => {
                            let new = New::Upper { dir, name, seen };
                            let inside = self.entry(new, merged.as_ref(), before, path_of(name))?;
                            work.extend(inside.filter(|_| whole));
                            present.insert(name.clone());
                        }
                    }
                }
            }
            let Some(engine) = self.below.filter(|_| !same_node(merged.as_ref(), old.as_ref())) else {
                continue;
            };
            if let Some(merged) = &merged {
                for name in engine.entry_names(merged)? {
                    if decided.contains(&name) {
                        continue;
                    }
                    let Some(new) = self.lower(Some(merged), &name)? else { continue };
                    let before = self.lower(old.as_ref(), &name)?;
                    let inside = self.entry(New::Below(new), None, before, path_of(&name))?;
                    work.extend(inside.filter(|_| whole));
                    present.insert(name);
                }
            }
            if let Some(old) = &old {
                for name in engine.entry_names(old)? {
                    if !present.contains(&name) {
                        self.note(&path_of(&name), ChangeKind::Deleted);
                    }
                }
            }
        }
        Ok(())
    }

    fn same_meta(&self, old: &Node, new: Meta) -> bool {
        let old = old.inner.lock().meta;
        if old == new || !self.lenient {
            return old == new;
        }
        let me = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let mine = |id: u32, mine: u32| if id == mine { 0 } else { id };
        let known = Meta { uid: mine(old.uid, me.0), gid: mine(old.gid, me.1), ..old };
        let new = Meta { uid: mine(new.uid, me.0), gid: mine(new.gid, me.1), ..new };
        known == new || old.kind == Kind::Symlink
    }

    fn lower(&self, dir: Option<&Arc<Node>>, name: &[u8]) -> Res<Option<Arc<Node>>> {
        match (self.below, dir) {
            (Some(engine), Some(dir)) if dir.kind == Kind::Dir => missing_ok(engine.lookup(dir, name)),
            _ => Ok(None),
        }
    }

    /// Compares an object with what the layers have at its path. `merged` is what its directory merges with.
    fn entry(
        &mut self,
        new: New<'_>,
        merged: Option<&Arc<Node>>,
        old: Option<Arc<Node>>,
        path: PathBuf,
    ) -> Res<Option<Todo>> {
        if let (New::Below(new), Some(old)) = (&new, &old)
            && new.ino == old.ino
        {
            return Ok(None);
        }
        let meta = new.meta();
        let kind = match &old {
            None => Some(ChangeKind::Added),
            Some(old) if old.kind != meta.kind => Some(ChangeKind::Modified),
            Some(old) if old.kind == Kind::Dir => {
                let same = self.same_meta(old, meta) && self.same_xattrs(&new, old)?;
                (!same).then_some(ChangeKind::Metadata)
            }
            Some(old) => self.compare(&new, old)?,
        };
        if let Some(kind) = kind {
            self.note(&path, kind);
        }
        self.inside(new, merged, old, path)
    }

    /// What is to be compared in a directory; `None` for anything else.
    fn inside(
        &self,
        new: New<'_>,
        merged: Option<&Arc<Node>>,
        old: Option<Arc<Node>>,
        path: PathBuf,
    ) -> Res<Option<Todo>> {
        let old = old.filter(|old| old.kind == Kind::Dir);
        match new {
            New::Upper { dir, name, seen } if seen.stat.kind() == Some(Kind::Dir) => {
                let child = RealDir::child(dir, name, seen.stat.key);
                seen.marks.note(&child);
                let merged = match (self.below, &seen.marks.redirect) {
                    (None, _) => None,
                    _ if seen.marks.opaque => None,
                    (Some(engine), Some(redirect)) => engine.redirected(merged, redirect)?,
                    (Some(_), None) => self.lower(merged, name)?.filter(|node| node.kind == Kind::Dir),
                };
                Ok(Some(Todo { dir: Some(child), merged, old, path }))
            }
            New::Below(node) if node.kind == Kind::Dir => {
                Ok(Some(Todo { dir: None, merged: Some(node), old, path }))
            }
            _ => Ok(None),
        }
    }

    /// Compares two objects of one type that is not a directory.
    fn compare(&self, new: &New<'_>, old: &Arc<Node>) -> Res<Option<ChangeKind>> {
        let engine = self.below.ok_or(Errno::STALE)?;
        let (new_stat, old_stat) = (self.stat(new)?, engine.stat(old)?);
        let same_content = match old.kind {
            Kind::File => new_stat.size == old_stat.size && self.same_bytes(new, old)?,
            Kind::Symlink => {
                let target = match new {
                    New::Upper { dir, name, .. } => {
                        rustix::fs::readlinkat(&*self.top.fd(dir)?, *name, Vec::new())?.into_bytes()
                    }
                    New::Below(node) => engine.read_link(node)?,
                };
                target == engine.read_link(old)?
            }
            _ => new.meta().rdev == old.inner.lock().meta.rdev,
        };
        if !same_content {
            return Ok(Some(ChangeKind::Modified));
        }
        let same_meta = self.same_meta(old, new.meta())
            && new_stat.mtime == old_stat.mtime
            && self.same_xattrs(new, old)?;
        Ok((!same_meta).then_some(ChangeKind::Metadata))
    }

    fn stat(&self, new: &New<'_>) -> Res<Stat> {
        match new {
            New::Upper { seen, .. } => Ok(seen.stat),
            New::Below(node) => self.below.ok_or(Errno::STALE)?.stat(node),
        }
    }

    fn same_bytes(&self, new: &New<'_>, old: &Arc<Node>) -> Res<bool> {
        let engine = self.below.ok_or(Errno::STALE)?;
        let flags = rustix::fs::OFlags::RDONLY
            | rustix::fs::OFlags::NOFOLLOW
            | rustix::fs::OFlags::NONBLOCK
            | rustix::fs::OFlags::CLOEXEC;
        let fd = match new {
            New::Upper { dir, name, .. } => {
                let mode = rustix::fs::Mode::empty();
                Some(rustix::fs::openat(&*self.top.fd(dir)?, *name, flags, mode)?)
            }
            New::Below(_) => None,
        };
        let read = |buf: &mut [u8], offset| match (new, &fd) {
            (New::Below(node), _) => engine.read(node, offset, buf),
            (_, Some(fd)) => read_full(fd, buf, offset),
            _ => Err(Errno::BADF),
        };
        // What cannot be read any more cannot be called the same.
        let unreadable = |node| matches!(engine.open_file(node, false), Err(Errno::ACCESS));
        if unreadable(old) || matches!(new, New::Below(node) if unreadable(node)) {
            return Ok(false);
        }
        let (mut a, mut b) = (vec![0; 64 << 10], vec![0; 64 << 10]);
        let mut offset = 0;
        loop {
            let n = read(&mut a, offset)?;
            let m = engine.read(old, offset, &mut b)?;
            if n != m || a[..n] != b[..m] {
                return Ok(false);
            }
            if n == 0 {
                return Ok(true);
            }
            offset += n as u64;
        }
    }

    fn same_xattrs(&self, new: &New<'_>, old: &Arc<Node>) -> Res<bool> {
        let engine = self.below.ok_or(Errno::STALE)?;
        if old.kind == Kind::Symlink {
            return Ok(true);
        }
        let below = |node: &Arc<Node>| {
            let (target, of_layer) = engine.target(node)?;
            target.at().map_or(Ok(Vec::new()), |at| crate::xattr::shown(at, of_layer))
        };
        let new = match new {
            New::Upper { dir, name, .. } => {
                let fd = self.top.fd(dir)?;
                crate::xattr::shown(sys::At::Name(fd.as_fd(), name), false)?
            }
            New::Below(node) => below(node)?,
        };
        Ok(new == below(old)?)
    }
}

impl New<'_> {
    fn meta(&self) -> Meta {
        match self {
            Self::Upper { seen, .. } => seen.meta,
            Self::Below(node) => node.inner.lock().meta,
        }
    }
}

fn read_full(fd: impl AsFd, buf: &mut [u8], offset: u64) -> Res<usize> {
    let mut done = 0;
    while done < buf.len() {
        match rustix::io::pread(&fd, &mut buf[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(err) => return Err(err),
        }
    }
    Ok(done)
}

impl Engine {
    /// See [`crate::Server::changed`].
    pub(crate) fn changed(&self) -> Res<bool> {
        let Some(upper) = &self.upper else { return Ok(false) };
        if !upper.was_touched() {
            return Ok(false);
        }
        if upper.held_something() || upper.dir_meta_changed.load(std::sync::atomic::Ordering::Acquire) {
            return Ok(true);
        }
        // Nothing but copies of directories means that nothing lasted.
        let mut work = vec![upper.root.clone()];
        while let Some(dir) = work.pop() {
            let fd = open_for_reading(self.fd(&dir)?.as_fd())?;
            let mut names: Vec<Box<[u8]>> = Vec::new();
            let mut other = false;
            for_each_entry(&fd, |name, kind, _| {
                other |= !matches!(kind, Some(Kind::Dir) | None);
                names.push(name.into());
                !other
            })?;
            if other {
                return Ok(true);
            }
            for name in names {
                match self.probe(&dir, &name, true)? {
                    Probe::Missing => {}
                    Probe::Found(seen)
                        if seen.stat.kind() == Some(Kind::Dir)
                            && !seen.marks.opaque
                            && seen.marks.redirect.is_none()
                            && seen.marks.origin.is_some() =>
                    {
                        work.push(RealDir::child(&dir, &name, seen.stat.key));
                    }
                    _ => return Ok(true),
                }
            }
        }
        Ok(false)
    }
}
