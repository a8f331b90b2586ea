//! Listing a merged directory.
//!
//! The position of an entry is a hash of its name (keyed per mount), and entries come in
//! that order. So a listing can be thrown away and built again at any time, and a reader
//! that goes on from a position meets every entry that was there all the time exactly
//! once, whatever was created and removed meanwhile; no state is kept per open
//! directory. The kernel caches what it has read (`FOPEN_CACHE_DIR`).
//!
//! A listing is kept with its directory while memory for [`MAX_KEPT`] entries lasts and
//! follows creations and removals.
//!
//! The number in an entry is the `st_ino` that a lookup would give. Where the entry alone
//! does not tell (in a directory marked impure, and for directories that are merged),
//! the name is looked up.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use rustix::fs::RawDir;

use crate::attr::{Key, Kind};
use crate::engine::{Engine, gone_below};
use crate::errno::{Errno, Res};
use crate::hooks::AccessKind;
use crate::inode::{DirState, Node, ROOT};
use crate::layer::{RealDir, UPPER, open_for_reading, stat_at};
use crate::sync::Mutex;

/// Entries kept in all listings together.
const MAX_KEPT: usize = 400_000;

/// Positions below this one are `.` and `..`.
const FIRST: u64 = 16;

/// One entry.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) name: Box<[u8]>,
    pub(crate) ino: u64,
    pub(crate) kind: Kind,
}

/// The entries of a directory by position.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    entries: BTreeMap<u64, Entry>,
}

fn position(hasher: &RandomState, name: &[u8]) -> u64 {
    // A positive i64 with room for neighbours, since that is what d_off is.
    (hasher.hash_one(name) >> 2).max(FIRST)
}

impl Listing {
    fn find(&self, hasher: &RandomState, name: &[u8]) -> (u64, bool) {
        let mut at = position(hasher, name);
        loop {
            match self.entries.get(&at) {
                None => return (at, false),
                Some(entry) if *entry.name == *name => return (at, true),
                // Two names with one hash: next to each other.
                Some(_) => at += 1,
            }
        }
    }

    pub(crate) fn insert(&mut self, hasher: &RandomState, name: &[u8], ino: u64, kind: Kind) {
        let (at, _) = self.find(hasher, name);
        self.entries.insert(at, Entry { name: name.into(), ino, kind });
    }

    pub(crate) fn remove(&mut self, hasher: &RandomState, name: &[u8]) {
        let (at, found) = self.find(hasher, name);
        if found {
            self.entries.remove(&at);
        }
    }

    /// Up to `count` entries after a position.
    pub(crate) fn after(&self, offset: u64, count: usize) -> Vec<(u64, Entry)> {
        let range = (std::ops::Bound::Excluded(offset.max(FIRST - 1)), std::ops::Bound::Unbounded);
        self.entries.range(range).take(count).map(|(&at, entry)| (at, entry.clone())).collect()
    }

    fn len(&self) -> usize {
        self.entries.len()
    }
}

#[derive(Debug, Default)]
struct Order {
    /// Directories with the number of their entries.
    dirs: VecDeque<(Weak<Node>, usize)>,
    total: usize,
}

/// Which directories have listings, the oldest first.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    queue: Mutex<Order>,
}

impl Kept {
    /// Notes a new listing; gives directories whose listings must go.
    fn note(&self, node: &Arc<Node>, entries: usize) -> Vec<Arc<Node>> {
        let mut queue = self.queue.lock();
        queue.dirs.push_back((Arc::downgrade(node), entries));
        queue.total += entries;
        let mut surplus = Vec::new();
        while queue.total > MAX_KEPT || queue.dirs.len() > 4096 {
            let Some((weak, entries)) = queue.dirs.pop_front() else { break };
            queue.total -= entries;
            surplus.extend(weak.upgrade().filter(|old| old.ino != node.ino));
        }
        surplus
    }
}

/// Calls `f(name, type, inode number)` for each entry but `.` and `..` until it gives
/// false. `dir` must be open for reading.
pub(crate) fn for_each_entry(dir: &OwnedFd, mut f: impl FnMut(&[u8], Option<Kind>, u64) -> bool) -> Res<()> {
    let mut buf = Vec::with_capacity(32 << 10);
    let mut entries = RawDir::new(dir, buf.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        let entry = match entry {
            Ok(entry) => entry,
            // Removed while it is read.
            Err(Errno::NOENT) => break,
            Err(err) => return Err(err),
        };
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." && !f(name, Kind::from_dirent(entry.file_type()), entry.ino()) {
            break;
        }
    }
    Ok(())
}

/// An entry of one real directory.
struct RawEntry {
    name: Box<[u8]>,
    kind: Option<Kind>,
    ino: u64,
}

/// A listing on its way, from the topmost layer down.
struct Merge<'a> {
    hasher: &'a RandomState,
    listing: Listing,
    /// What a layer above has decided about a name; `None`: it is gone. Not kept where
    /// there is one layer only.
    decided: Option<HashMap<Box<[u8]>, Option<Kind>>>,
    /// Names whose entries do not tell their number (or type).
    look_up: Vec<Box<[u8]>>,
}

impl Merge<'_> {
    fn add(&mut self, name: Box<[u8]>, kind: Option<Kind>, ino: u64, exact: bool) {
        if let Some(decided) = &mut self.decided {
            if let Some(above) = decided.get(&name) {
                // Directories merge; the number of the merged one is not the upper's.
                if *above == Some(Kind::Dir) && kind == Some(Kind::Dir) {
                    self.look_up.push(name);
                }
                return;
            }
            decided.insert(name.clone(), kind);
        }
        let Some(kind) = kind else { return };
        self.listing.insert(self.hasher, &name, ino, kind);
        if !exact {
            self.look_up.push(name);
        }
    }
}

impl Engine {
    /// The raw entries of a directory of one layer; a directory that the caller may not
    /// read appears empty.
    fn raw_entries(&self, dir: &Arc<RealDir>) -> Res<Vec<RawEntry>> {
        let opened = self.fd(dir).and_then(|fd| {
            if dir.layer != UPPER {
                // Names without the right to look them up would be entries that do not
                // exist: empty as well.
                rustix::fs::accessat(&fd, c".", rustix::fs::Access::EXEC_OK, rustix::fs::AtFlags::EACCESS)?;
            }
            open_for_reading(fd.as_fd())
        });
        let fd = match opened {
            Ok(fd) => fd,
            Err(Errno::ACCESS | Errno::PERM) if dir.layer != UPPER => return Ok(Vec::new()),
            Err(err) if dir.layer != UPPER && gone_below(err) => return Ok(Vec::new()),
            Err(err) => return Err(err),
        };
        self.trace(dir, None, AccessKind::Listed);
        let mut entries = Vec::new();
        for_each_entry(&fd, |name, kind, ino| {
            entries.push(RawEntry { name: name.into(), kind, ino });
            true
        })?;
        Ok(entries)
    }

    /// Whether an entry is a whiteout, and its type where the directory did not tell.
    fn check_entry(&self, dir: &Arc<RealDir>, entry: &RawEntry) -> Res<Option<Kind>> {
        let suspicious = match entry.kind {
            None | Some(Kind::Char) => true,
            Some(Kind::File) => dir.xattr_whiteouts.load(Ordering::Relaxed),
            Some(_) => false,
        };
        if !suspicious {
            return Ok(entry.kind);
        }
        if self.is_whiteout(dir, &entry.name)? {
            return Ok(None);
        }
        match entry.kind {
            Some(kind) => Ok(Some(kind)),
            None => Ok(stat_at(self.fd(dir)?.as_fd(), &entry.name)?.kind()),
        }
    }

    /// Merges the layers' entries. The caller holds the directory's lock.
    fn build_listing(&self, node: &Node, state: &DirState) -> Res<Listing> {
        if state.removed {
            return Ok(Listing::default());
        }
        let upper = node.dir()?.upper.get();
        let sources: Vec<&Arc<RealDir>> = upper.into_iter().chain(&state.lowers).collect();
        let mut merge = Merge {
            hasher: &self.hasher,
            listing: Listing::default(),
            decided: (sources.len() > 1 || state.generated.is_some()).then(HashMap::new),
            look_up: Vec::new(),
        };
        if let Some(dir) = upper {
            self.add_real(&mut merge, node, dir)?;
        }
        for (name, index) in state.generated.into_iter().flat_map(|dir| self.generated.children(dir)) {
            let (kind, number) = (self.generated.node(index).kind(), self.generated.node(index).number);
            // A directory may merge with one of a layer, whose number it has then.
            merge.add(name.into(), Some(kind), number, kind != Kind::Dir);
        }
        for dir in &state.lowers {
            self.add_real(&mut merge, node, dir)?;
        }
        let Merge { mut listing, look_up, .. } = merge;
        for name in look_up {
            let (at, _) = listing.find(&self.hasher, &name);
            match self.resolve(node, state, &name)? {
                Some(found) => {
                    if let Some(entry) = listing.entries.get_mut(&at) {
                        entry.ino = found.ino;
                        entry.kind = found.meta.kind;
                    }
                }
                None => {
                    listing.entries.remove(&at);
                }
            }
        }
        Ok(listing)
    }

    fn add_real(&self, merge: &mut Merge<'_>, node: &Node, dir: &Arc<RealDir>) -> Res<()> {
        let impure = dir.impure.load(Ordering::Relaxed);
        for entry in self.raw_entries(dir)? {
            if dir.hides(&entry.name) {
                continue;
            }
            let kind = match dir.far_at(&entry.name).map(|far| far.root().0.kind()) {
                Some(kind) => Ok(kind),
                None => self.check_entry(dir, &entry),
            };
            let kind = match kind {
                Ok(kind) => kind,
                Err(Errno::NOENT) => continue,
                Err(err) => return Err(err),
            };
            let key = Key { dev: dir.key.dev, ino: entry.ino };
            let ino = self.alias(key).unwrap_or_else(|| self.numbers.number(key));
            merge.add(entry.name, kind, ino, !impure);
        }
        for name in dir.hidden.iter().flat_map(|h| h.names()) {
            merge.add(name.into(), Some(Kind::Dir), self.synthetic_number(node, name), true);
        }
        Ok(())
    }

    /// Whether a merged directory has no entry. The caller holds its lock.
    pub(crate) fn is_empty(&self, node: &Node, state: &DirState) -> Res<bool> {
        match &state.listing {
            Some(listing) if self.live.is_none() => Ok(listing.len() == 0),
            _ => Ok(self.build_listing(node, state)?.len() == 0),
        }
    }

    /// Up to `count` entries after a position, `.` and `..` included.
    pub(crate) fn read_dir(&self, node: &Arc<Node>, offset: u64, count: usize) -> Res<Vec<(u64, Entry)>> {
        let part = node.dir()?;
        let mut batch = Vec::with_capacity(count.min(64));
        if offset < 1 {
            batch.push((1, Entry { name: b"."[..].into(), ino: node.ino, kind: Kind::Dir }));
        }
        if offset < 2 {
            let parent = node.first_link().map_or(ROOT, |l| l.parent.ino);
            batch.push((2, Entry { name: b".."[..].into(), ino: parent, kind: Kind::Dir }));
        }
        if offset < 1 && self.lasting_names(node).is_some() {
            let old = part.state.write().listing.take();
            drop(old);
        }
        if let Some(listing) = &part.state.read().listing {
            batch.append(&mut listing.after(offset, count));
            return Ok(batch);
        }
        let surplus = {
            let mut state = part.state.write();
            if state.listing.is_none() {
                let listing = Box::new(self.build_listing(node, &state)?);
                batch.append(&mut listing.after(offset, count));
                let entries = listing.len();
                state.listing = Some(listing);
                self.listings.note(node, entries + 1)
            } else {
                batch.extend(state.listing.iter().flat_map(|l| l.after(offset, count)));
                Vec::new()
            }
        };
        for old in surplus {
            // Whose lock somebody holds is listed just now, or far and waits.
            let listing = old.dir()?.state.try_write().and_then(|mut state| state.listing.take());
            drop(listing);
        }
        Ok(batch)
    }

    /// All names in a directory.
    pub(crate) fn entry_names(&self, node: &Arc<Node>) -> Res<Vec<Box<[u8]>>> {
        let state = node.dir()?.state.read();
        let listing = self.build_listing(node, &state)?;
        Ok(listing.entries.into_values().map(|entry| entry.name).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_survive_removals_and_a_rebuild() {
        let hasher = RandomState::new();
        let mut listing = Listing::default();
        for i in 0..1000 {
            listing.insert(&hasher, format!("f{i}").as_bytes(), i, Kind::File);
        }
        let first = listing.after(0, 500);
        let resume = first.last().expect("not empty").0;
        for (_, entry) in &first {
            listing.remove(&hasher, &entry.name);
        }
        let rest = listing.after(resume, 1000);
        assert_eq!(first.len() + rest.len(), 1000);
        assert!(first.iter().all(|(_, a)| rest.iter().all(|(_, b)| a.name != b.name)));
    }

    #[test]
    fn inserting_a_name_again_replaces_it() {
        let hasher = RandomState::new();
        let mut listing = Listing::default();
        listing.insert(&hasher, b"a", 1, Kind::File);
        listing.insert(&hasher, b"a", 2, Kind::Dir);
        assert_eq!(listing.after(0, 9).iter().map(|(_, e)| e.ino).collect::<Vec<_>>(), [2]);
    }
}
