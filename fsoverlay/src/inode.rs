//! The table of objects that the kernel or a request knows.
//!
//! A [`Node`] is one object of the merged tree, whatever names it has. The kernel's
//! number of it (`nodeid`) is also its `st_ino`. The table keeps a node while the kernel
//! holds lookups on it, or while anything else does (a child that knows its parent, a
//! request at work): a second node of the same object must never exist, since locks and
//! "is it in the upper yet" live in it.
//!
//! What guards what, in the order in which locks are taken:
//!
//! | lock | guards |
//! |---|---|
//! | `Node::copying` | one copy-up at a time of this object; held over its I/O |
//! | `DirPart::state` of directories, by rising inode number | the names in the directory: read while a name is resolved, written while one changes |
//! | the entries of `links` | which names of a layer lead to a copy |
//! | `Node::inner` | owner, mode, names, place; never held over I/O |
//! | a shard of the table | counts of lookups |
//! | `Engine::modes` | the mode of files on disk, where ownership is native; held over small I/O |

use std::collections::{HashMap, HashSet, hash_map};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use rustix::fs::AtFlags;

use crate::attr::{Key, Kind, Meta, Stat};
use crate::errno::{Errno, Res};
use crate::far::Far;
use crate::handle::{Fd, FdSlot, Pinned};
use crate::hooks::Quota;
use crate::layer::{RealDir, stat_at};
use crate::links::Changes;
use crate::listing::Listing;
use crate::numbers::InodeNumbers;
use crate::sync::{Mutex, RwLock};

/// The root's number in every FUSE mount.
pub(crate) const ROOT: u64 = 1;

/// Where the content of an object that is not a directory is.
#[derive(Debug, Clone)]
pub(crate) enum Place {
    /// In the upper under the node's first name.
    Upper,
    /// In a layer.
    Lower { dir: Arc<RealDir>, name: Arc<[u8]> },
    /// In memory.
    Generated(u32),
    /// In the upper, without a name any more.
    Unlinked(Arc<Pinned>),
    /// In the work directory: there were too many descriptors to keep one, or a layer has further names
    /// of it that will have to lead to it ([`crate::links`]).
    Parked(Arc<Parked>),
    /// Unlinked and without content that could still be asked for.
    Gone(Arc<Stat>),
}

/// A file without a name in the upper's tree, under a name in the work directory.
#[derive(Debug)]
pub(crate) struct Parked {
    pub(crate) work: Fd,
    pub(crate) name: Box<[u8]>,
    /// To be removed when nobody knows the file any more.
    pub(crate) temporary: bool,
    /// Is told if the file is gone with this name.
    pub(crate) quota: Option<Arc<dyn Quota>>,
}

impl Drop for Parked {
    fn drop(&mut self) {
        if !self.temporary {
            return;
        }
        if let Some(quota) = &self.quota
            && let Ok(stat) = stat_at(self.work.as_fd(), &self.name)
            && stat.nlink <= 1
        {
            crate::hooks::released(&**quota, Kind::File, &stat);
        }
        if let Err(err) = rustix::fs::unlinkat(&self.work, &*self.name, AtFlags::empty()) {
            tracing::debug!(?err, "cannot remove a parked file");
        }
    }
}

/// One name of an object.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    pub(crate) parent: Arc<Node>,
    pub(crate) name: Box<[u8]>,
}

impl Link {
    pub(crate) fn is(&self, parent: &Node, name: &[u8]) -> bool {
        self.parent.ino == parent.ino && *self.name == *name
    }
}

/// The part of a node that changes.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) meta: Meta,
    /// What the object is on disk now.
    pub(crate) key: Key,
    /// The number, if it is not that of the object on disk: of what was copied up.
    pub(crate) origin: Option<u64>,
    pub(crate) place: Place,
    /// Known names; a directory has one, the root none.
    pub(crate) links: Vec<Link>,
    /// Names that the disk does not count (or counts though they are gone, or are none).
    pub(crate) extra_links: i64,
    /// How many names a layer's object has, if it has several.
    pub(crate) below: u32,
    /// A copy has an entry among [`crate::links`].
    pub(crate) entry: bool,
    /// There is a record on disk that must be kept true or removed.
    pub(crate) has_record: bool,
    /// An access ACL is stored; chmod must change it.
    pub(crate) has_acl: bool,
    /// It is known that no `security.capability` is stored.
    pub(crate) no_capability: bool,
}

/// The part of a node that only directories have.
#[derive(Debug)]
pub(crate) struct DirPart {
    /// The directory in the upper, once there is one; it never changes again.
    pub(crate) upper: OnceLock<Arc<RealDir>>,
    pub(crate) state: RwLock<DirState>,
}

/// What a directory is merged from, below the upper.
#[derive(Debug, Default)]
pub(crate) struct DirState {
    /// Directories of layers, the topmost first.
    pub(crate) lowers: Vec<Arc<RealDir>>,
    /// The directory of the generated layer.
    pub(crate) generated: Option<u32>,
    /// The upper's redirect: what the layers call it if not by its name. Set before the name changes.
    pub(crate) redirect: Option<Arc<[u8]>>,
    /// rmdir has removed it.
    pub(crate) removed: bool,
    /// Its entries, if they were asked for lately.
    pub(crate) listing: Option<Box<Listing>>,
    /// The default ACL, if it is known: new objects in here inherit it.
    pub(crate) default_acl: Option<Option<Arc<[u8]>>>,
}

impl DirState {
    /// Whether a name of this directory may exist below the upper.
    pub(crate) fn has_lower(&self) -> bool {
        !self.lowers.is_empty() || self.generated.is_some()
    }
}

/// One object of the merged tree.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) ino: u64,
    pub(crate) kind: Kind,
    pub(crate) inner: Mutex<Inner>,
    pub(crate) copying: Mutex<()>,
    pub(crate) names: Changes,
    pub(crate) file: FdSlot,
    pub(crate) dir: Option<Box<DirPart>>,
    /// A layer has it in a file system that may never answer; whether it is the root of that.
    pub(crate) far: OnceLock<(Arc<Far>, bool)>,
    table: Weak<Table>,
}

impl Node {
    /// The directory part, or `ENOTDIR`.
    pub(crate) fn dir(&self) -> Res<&DirPart> {
        self.dir.as_deref().ok_or(Errno::NOTDIR)
    }

    /// Whether the object has its place in the upper (or had it when it was unlinked).
    pub(crate) fn is_upper(&self) -> bool {
        match &self.dir {
            Some(dir) => dir.upper.get().is_some(),
            None => {
                matches!(
                    self.inner.lock().place,
                    Place::Upper | Place::Unlinked(_) | Place::Parked(_) | Place::Gone(_)
                )
            }
        }
    }

    /// The directory in the upper; only after it was copied up.
    pub(crate) fn upper_dir(&self) -> Res<&Arc<RealDir>> {
        self.dir()?.upper.get().ok_or(Errno::STALE)
    }

    /// The first known name.
    pub(crate) fn first_link(&self) -> Option<Link> {
        self.inner.lock().links.first().cloned()
    }

    pub(crate) fn has_link(&self, parent: &Node, name: &[u8]) -> bool {
        self.inner.lock().links.iter().any(|l| l.is(parent, name))
    }

    /// See [`Table::remember`].
    pub(crate) fn remember(self: &Arc<Self>) {
        if let Some(table) = self.table.upgrade() {
            table.remember(self);
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let inner = self.inner.get_mut();
        if let Some(table) = self.table.upgrade() {
            table.remove_dead(self.ino, inner.key);
        }
        // A chain of directories may be thousands deep: unlinked in a loop.
        let mut links = std::mem::take(&mut inner.links);
        while let Some(link) = links.pop() {
            if let Some(mut parent) = Arc::into_inner(link.parent) {
                links.append(&mut parent.inner.get_mut().links);
            }
        }
    }
}

/// What is needed to make a node.
#[derive(Debug)]
pub(crate) struct NewNode {
    pub(crate) kind: Kind,
    pub(crate) inner: Inner,
    pub(crate) upper: Option<Arc<RealDir>>,
    pub(crate) state: DirState,
}

#[derive(Debug)]
struct Entry {
    what: Known,
    /// How often the kernel has learnt of it.
    lookups: u64,
}

/// What stands behind a number.
#[derive(Debug)]
enum Known {
    Node {
        node: Weak<Node>,
        /// Keeps the node alive for the kernel.
        kernel: Option<Arc<Node>>,
    },
    /// A file of a layer that the kernel has learnt of and nobody has used yet. It takes a third of the
    /// memory of a node, which it becomes when it is asked for.
    Name(Box<Named>),
}

/// What a node of a layer's file with a single name begins with. There are many, so it is as small as it can be: the
/// fields of a [`Meta`] leave no gaps here.
#[derive(Debug)]
pub(crate) struct Named {
    pub(crate) parent: Arc<Node>,
    /// Where it is in the layer, by the same name.
    pub(crate) dir: Arc<RealDir>,
    pub(crate) name: Arc<[u8]>,
    pub(crate) key: Key,
    pub(crate) kind: Kind,
    pub(crate) perm: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) rdev: (u32, u32),
    pub(crate) has_record: bool,
    pub(crate) has_acl: bool,
    pub(crate) no_capability: bool,
}

// One byte more would be 16 of the allocator's.
const _: () = assert!(size_of::<Named>() <= 72 || size_of::<usize>() != 8);

impl Named {
    pub(crate) fn meta(&self) -> Meta {
        let Self { kind, perm, uid, gid, rdev, .. } = *self;
        Meta { kind, perm, uid, gid, rdev }
    }

    fn node(&self) -> NewNode {
        let link = Link { parent: self.parent.clone(), name: (*self.name).into() };
        NewNode {
            kind: self.kind,
            inner: Inner {
                meta: self.meta(),
                key: self.key,
                origin: None,
                place: Place::Lower { dir: self.dir.clone(), name: self.name.clone() },
                links: vec![link],
                extra_links: 0,
                below: 0,
                entry: false,
                has_record: self.has_record,
                has_acl: self.has_acl,
                no_capability: self.no_capability,
            },
            upper: None,
            state: DirState::default(),
        }
    }
}

/// What a FORGET leaves to be dropped.
enum Gone {
    Node(#[expect(dead_code, reason = "only held until it is dropped")] Arc<Node>),
    Name(#[expect(dead_code, reason = "only held until it is dropped")] Entry),
}

/// Inode numbers that the disk does not tell: of objects whose own number is in use.
///
/// While an object is known its alias must be: without it a second node would be made. So that the
/// number stays the same when the kernel asks again later, aliases outlive their objects, up to a
/// number of them.
#[derive(Debug)]
pub(crate) struct Aliases {
    by_key: Mutex<HashMap<Key, u64>>,
    /// There never was one: nobody needs to look.
    none: AtomicBool,
    /// Numbers of places ([`InodeNumbers::of_place`]) that are in use, since another place has the object's
    /// own. What is there under one name does not tell which of its places a lookup met.
    places: Mutex<HashSet<u64>>,
    no_places: AtomicBool,
    capacity: usize,
}

impl Aliases {
    pub(crate) fn get(&self, key: Key) -> Option<u64> {
        if self.none.load(Ordering::Acquire) {
            return None;
        }
        self.by_key.lock().get(&key).copied()
    }

    pub(crate) fn insert(&self, key: Key, ino: u64) {
        self.none.store(false, Ordering::Release);
        self.by_key.lock().insert(key, ino);
    }

    pub(crate) fn remove(&self, key: Key) {
        self.by_key.lock().remove(&key);
    }

    /// The number that a place has rather than that of the object there, if it has it.
    pub(crate) fn place(&self, ino: impl FnOnce() -> u64) -> Option<u64> {
        if self.no_places.load(Ordering::Acquire) {
            return None;
        }
        Some(ino()).filter(|ino| self.places.lock().contains(ino))
    }

    pub(crate) fn insert_place(&self, ino: u64) {
        self.no_places.store(false, Ordering::Release);
        self.places.lock().insert(ino);
    }

    /// A name of a layer's file is not known any more.
    fn release_place(&self, ino: u64) {
        if self.no_places.load(Ordering::Acquire) {
            return;
        }
        let mut places = self.places.lock();
        if places.len() > self.capacity {
            places.remove(&ino);
        }
    }

    /// The object is not known any more.
    fn release(&self, key: Key, ino: u64) {
        self.release_place(ino);
        let mut by_key = self.by_key.lock();
        if by_key.len() > self.capacity && by_key.get(&key) == Some(&ino) {
            by_key.remove(&key);
        }
    }
}

const SHARDS: usize = 64;

/// A shard that had room for fewer is left as it is.
const SMALL: usize = 64;

/// All nodes, by number.
#[derive(Debug)]
pub(crate) struct Table {
    shards: Vec<Mutex<HashMap<u64, Entry>>>,
    /// A shard became much smaller.
    shrunk: AtomicBool,
    pub(crate) aliases: Aliases,
}

impl Table {
    /// A table that keeps up to `aliases` numbers of objects that nobody knows any more.
    pub(crate) fn new(aliases: usize) -> Arc<Self> {
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Arc::new(Self {
            shards,
            shrunk: AtomicBool::new(false),
            aliases: Aliases {
                by_key: Mutex::default(),
                none: true.into(),
                places: Mutex::default(),
                no_places: true.into(),
                capacity: aliases,
            },
        })
    }

    fn shard(&self, ino: u64) -> &Mutex<HashMap<u64, Entry>> {
        &self.shards[usize::try_from(crate::layer::mix(ino) % SHARDS as u64).unwrap_or(0)]
    }

    /// The node of this number.
    pub(crate) fn get(self: &Arc<Self>, ino: u64) -> Option<Arc<Node>> {
        self.get_in(&mut self.shard(ino).lock(), ino)
    }

    /// The same, in a shard that is locked. The node may be the last reference by the time it is dropped,
    /// and its Drop takes this shard, which must be let go first.
    fn get_in(self: &Arc<Self>, shard: &mut HashMap<u64, Entry>, ino: u64) -> Option<Arc<Node>> {
        let entry = shard.get_mut(&ino)?;
        match &entry.what {
            Known::Node { node, .. } => node.upgrade(),
            Known::Name(named) => {
                let node = self.node(ino, named.node());
                // What this drops refers to nothing that the node does not.
                entry.what = Known::Node { node: Arc::downgrade(&node), kernel: Some(node.clone()) };
                Some(node)
            }
        }
    }

    fn node(self: &Arc<Self>, ino: u64, new: NewNode) -> Arc<Node> {
        let dir = (new.kind == Kind::Dir).then(|| {
            let upper = OnceLock::new();
            if let Some(dir) = new.upper {
                let _ = upper.set(dir);
            }
            Box::new(DirPart { upper, state: RwLock::new(new.state) })
        });
        Arc::new(Node {
            ino,
            kind: new.kind,
            inner: Mutex::new(new.inner),
            copying: Mutex::new(()),
            names: Changes::default(),
            file: FdSlot::default(),
            dir,
            far: OnceLock::new(),
            table: Arc::downgrade(self),
        })
    }

    /// The node of an object with the number `ino`, found or made. `same` tells whether
    /// a node that has the number is that object; if it is another one, the object gets
    /// another number, which `seed` chooses.
    pub(crate) fn intern(
        self: &Arc<Self>,
        ino: u64,
        seed: impl Fn() -> u64,
        same: impl Fn(&Node) -> bool,
        make: impl FnOnce() -> NewNode,
    ) -> Arc<Node> {
        let mut number = ino;
        let mut attempt = 0;
        loop {
            let mut shard = self.shard(number).lock();
            if let Some(node) = self.get_in(&mut shard, number) {
                drop(shard);
                if same(&node) {
                    return node;
                }
                number = InodeNumbers::clashed(ino, seed().wrapping_add(attempt));
                attempt += 1;
                continue;
            }
            let node = self.node(number, make());
            let what = Known::Node { node: Arc::downgrade(&node), kernel: None };
            shard.insert(number, Entry { what, lookups: 0 });
            return node;
        }
    }

    /// The kernel is about to learn of a file of a layer that needs no node yet. False, and nothing is
    /// done, if there is one, or its number stands for something else.
    pub(crate) fn remember_name(&self, ino: u64, new: Box<Named>) -> bool {
        match self.shard(ino).lock().entry(ino) {
            hash_map::Entry::Vacant(vacant) => {
                vacant.insert(Entry { what: Known::Name(new), lookups: 1 });
                true
            }
            hash_map::Entry::Occupied(mut known) => {
                let Entry { what: Known::Name(named), lookups } = known.get_mut() else { return false };
                let same = named.parent.ino == new.parent.ino && *named.name == *new.name;
                if same {
                    // The layer may say something else by now.
                    *named = new;
                    *lookups += 1;
                }
                same
            }
        }
    }

    /// The kernel is about to learn of the node. Counted before the reply is sent,
    /// because a FORGET may overtake it.
    pub(crate) fn remember(&self, node: &Arc<Node>) {
        let mut shard = self.shard(node.ino).lock();
        let entry = shard.entry(node.ino).or_insert_with(|| Entry {
            what: Known::Node { node: Arc::downgrade(node), kernel: None },
            lookups: 0,
        });
        entry.lookups += 1;
        if let Known::Node { kernel, .. } = &mut entry.what {
            kernel.get_or_insert_with(|| node.clone());
        }
    }

    /// The kernel forgets `count` lookups of the number.
    pub(crate) fn forget(&self, ino: u64, count: u64) {
        let gone = {
            let mut shard = self.shard(ino).lock();
            let Some(entry) = shard.get_mut(&ino) else { return };
            entry.lookups = entry.lookups.saturating_sub(count);
            match &mut entry.what {
                _ if entry.lookups > 0 => None,
                Known::Node { kernel, .. } => kernel.take().map(Gone::Node),
                Known::Name(_) => {
                    self.aliases.release_place(ino);
                    let entry = shard.remove(&ino);
                    self.shrink(&mut shard);
                    entry.map(Gone::Name)
                }
            }
        };
        // Dropped without the shard's lock: the node's Drop takes it.
        drop(gone);
    }

    /// After something was removed from a shard: what many objects took is not kept for few.
    fn shrink(&self, shard: &mut HashMap<u64, Entry>) {
        if shard.capacity() > SMALL && shard.len() < shard.capacity() / 8 {
            shard.shrink_to(shard.len() * 2);
            self.shrunk.store(true, Ordering::Relaxed);
        }
    }

    /// Whether much of what was known is gone since this was asked. Its memory is to be given back once that is over
    /// ([`crate::sys::give_memory_back`]): the allocator would keep what is free between the few objects that are left.
    pub(crate) fn has_shrunk(&self) -> bool {
        self.shrunk.load(Ordering::Relaxed) && self.shrunk.swap(false, Ordering::Relaxed)
    }

    /// Somebody is to ask again.
    pub(crate) fn set_shrunk(&self) {
        self.shrunk.store(true, Ordering::Relaxed);
    }

    fn remove_dead(&self, ino: u64, key: Key) {
        let mut shard = self.shard(ino).lock();
        // The number may have been taken over by a node made since, of the same object or another.
        let dead = |what: &Known| matches!(what, Known::Node { node, .. } if node.strong_count() == 0);
        if shard.get(&ino).is_some_and(|entry| dead(&entry.what)) {
            shard.remove(&ino);
            self.shrink(&mut shard);
            self.aliases.release(key, ino);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(key: Key) -> NewNode {
        NewNode {
            kind: Kind::Symlink,
            inner: Inner {
                meta: Meta { kind: Kind::Symlink, perm: 0o777, uid: 0, gid: 0, rdev: (0, 0) },
                key,
                origin: None,
                place: Place::Upper,
                links: Vec::new(),
                extra_links: 0,
                below: 0,
                entry: false,
                has_record: false,
                has_acl: false,
                no_capability: true,
            },
            upper: None,
            state: DirState::default(),
        }
    }

    #[test]
    fn what_is_forgotten_leaves_no_room_behind() {
        let table = Table::new(10);
        let room = || table.shards.iter().map(|shard| shard.lock().capacity()).sum::<usize>();
        for ino in 2..200_000 {
            let node = table.intern(ino, || 1, |_| false, || object(Key { dev: 1, ino }));
            table.remember(&node);
        }
        assert!(room() >= 200_000 - 2);
        for ino in 2..199_000 {
            table.forget(ino, 1);
        }
        assert!(room() <= SHARDS * 2 * SMALL && table.get(199_999).is_some(), "{}", room());
    }

    #[test]
    fn aliases_of_known_objects_stay_and_of_others_a_number() {
        let table = Table::new(10);
        let key = |ino| Key { dev: 1, ino };
        let make = |ino| {
            let node = table.intern(1000 + ino, || 1, |_| false, || object(key(ino)));
            table.aliases.insert(key(ino), node.ino);
            node
        };
        let known: Vec<_> = (0..100).map(make).collect();
        assert!((0..100).all(|ino| table.aliases.get(key(ino)) == Some(1000 + ino)));
        drop(known);
        let left = |from, to| (from..to).filter(|&ino| table.aliases.get(key(ino)).is_some()).count();
        assert_eq!(left(0, 100), 10);
        // One that is known stays, however many come and go.
        let known = make(500);
        for ino in 600..700 {
            drop(make(ino));
        }
        assert_eq!(table.aliases.get(key(500)), Some(known.ino));
        assert!(left(0, 700) <= 11);
    }
}
