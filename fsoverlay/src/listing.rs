//! The entries of a merged directory, in little memory.
//!
//! The position of an entry is a hash of its name (keyed per mount), and entries come in that order: so
//! a listing can be thrown away and built again at any time, and a reader who goes on from a position
//! meets every entry that was there all the time exactly once.
//!
//! A listing is a sorted table with all names in one piece of memory; what changes afterwards stands in
//! a small map beside it, and is worked in when it grows. Two names with one hash (of 62 bits) are next
//! to each other.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::ops::Bound;

use crate::attr::Kind;
use crate::errno::{Errno, Res, gives_way};

/// Positions below this one are `.` and `..`.
pub(crate) const FIRST: u64 = 16;

/// One entry.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) name: Box<[u8]>,
    pub(crate) ino: u64,
    pub(crate) kind: Kind,
}

/// An entry in the table, 24 bytes.
#[derive(Debug, Clone, Copy)]
struct Slot {
    at: u64,
    ino: u64,
    name: u32,
    length: u8,
    kind: Kind,
}

/// The entries of a directory by position.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    slots: Vec<Slot>,
    names: Vec<u8>,
    /// What stands at a position instead of what the table says; `None`: nothing any more.
    changes: BTreeMap<u64, Option<Entry>>,
    length: usize,
    /// A layer's directory could not be read: names that are not here may exist.
    pub(crate) partial: bool,
}

fn position(hasher: &RandomState, name: &[u8]) -> u64 {
    // A positive i64 with room for neighbours, since that is what d_off is.
    (hasher.hash_one(name) >> 2).max(FIRST)
}

/// What stands at a position.
enum Stands<'a> {
    Nothing,
    /// An entry that was removed; others of the same hash may follow.
    Removed,
    Entry(&'a [u8]),
}

impl Listing {
    fn name(&self, slot: &Slot) -> &[u8] {
        let start = slot.name as usize;
        &self.names[start..start + usize::from(slot.length)]
    }

    fn stands(&self, at: u64) -> Stands<'_> {
        match self.changes.get(&at) {
            Some(Some(entry)) => return Stands::Entry(&entry.name),
            Some(None) => return Stands::Removed,
            None => {}
        }
        match self.slots.binary_search_by_key(&at, |slot| slot.at) {
            Ok(index) => Stands::Entry(self.name(&self.slots[index])),
            Err(_) => Stands::Nothing,
        }
    }

    /// The position of a name, or the first that is free for it.
    fn find(&self, hasher: &RandomState, name: &[u8]) -> Result<u64, u64> {
        let mut at = position(hasher, name);
        let mut free = None;
        loop {
            match self.stands(at) {
                Stands::Entry(found) if found == name => return Ok(at),
                Stands::Entry(_) => {}
                Stands::Removed => free = free.or(Some(at)),
                Stands::Nothing => return Err(free.unwrap_or(at)),
            }
            at += 1;
        }
    }

    /// Where a name stands.
    pub(crate) fn position(&self, hasher: &RandomState, name: &[u8]) -> Option<u64> {
        self.find(hasher, name).ok()
    }

    pub(crate) fn contains(&self, hasher: &RandomState, name: &[u8]) -> bool {
        self.find(hasher, name).is_ok()
    }

    /// Adds an entry, or replaces the one of this name.
    pub(crate) fn insert(&mut self, hasher: &RandomState, name: &[u8], ino: u64, kind: Kind) {
        let at = self.find(hasher, name);
        self.length += usize::from(at.is_err());
        let (Ok(at) | Err(at)) = at;
        self.changes.insert(at, Some(Entry { name: name.into(), ino, kind }));
        self.settle();
    }

    pub(crate) fn remove(&mut self, hasher: &RandomState, name: &[u8]) {
        if let Ok(at) = self.find(hasher, name) {
            self.length -= 1;
            self.changes.insert(at, None);
            self.settle();
        }
    }

    /// Works the changes into the table when there are many for its size.
    fn settle(&mut self) {
        let many = 64 + self.slots.len() / 4;
        // Of a large one it takes milliseconds: who gives way leaves it to the next one, unless that is very long in coming.
        let large = self.slots.len() > 4096;
        if self.changes.len() <= if large && gives_way() { 4 * many } else { many } {
            return;
        }
        let mut settled = Self { partial: self.partial, ..Self::default() };
        settled.slots.reserve(self.length);
        self.visit(0, |at, name, ino, kind| {
            // What the names took before was within the limit, and changes are few for it.
            settled.push(at, name, ino, kind).is_ok()
        });
        if settled.slots.len() == self.length {
            settled.length = self.length;
            *self = settled;
        }
    }

    fn push(&mut self, at: u64, name: &[u8], ino: u64, kind: Kind) -> Res<()> {
        let start = u32::try_from(self.names.len()).map_err(|_| Errno::NOMEM)?;
        let length = u8::try_from(name.len()).map_err(|_| Errno::NAMETOOLONG)?;
        self.names.extend_from_slice(name);
        self.slots.push(Slot { at, ino, name: start, length, kind });
        Ok(())
    }

    /// Calls `f(position, name, number, type)` for the entries after a position until it gives false.
    pub(crate) fn visit(&self, offset: u64, mut f: impl FnMut(u64, &[u8], u64, Kind) -> bool) {
        let mut changes = self.changes.range((Bound::Excluded(offset), Bound::Unbounded)).peekable();
        let mut slots = self.slots[self.slots.partition_point(|slot| slot.at <= offset)..].iter().peekable();
        loop {
            let slot_at = slots.peek().map(|slot| slot.at);
            let change = changes.next_if(|(at, _)| slot_at.is_none_or(|slot_at| **at <= slot_at));
            if change.is_none_or(|(at, _)| Some(*at) == slot_at) {
                let Some(slot) = slots.next() else { return };
                if change.is_none() && !f(slot.at, self.name(slot), slot.ino, slot.kind) {
                    return;
                }
            }
            if let Some((at, Some(entry))) = change
                && !f(*at, &entry.name, entry.ino, entry.kind)
            {
                return;
            }
        }
    }

    /// Up to `count` entries after a position.
    pub(crate) fn after(&self, offset: u64, count: usize) -> Vec<(u64, Entry)> {
        let mut found = Vec::with_capacity(count.min(self.length));
        if count > 0 {
            self.visit(offset, |at, name, ino, kind| {
                found.push((at, Entry { name: name.into(), ino, kind }));
                found.len() < count
            });
        }
        found
    }

    pub(crate) fn len(&self) -> usize {
        self.length
    }
}

/// One thing that a layer says about a name.
#[derive(Debug)]
struct Said {
    slot: Slot,
    /// The name is gone, and `slot.kind` means nothing.
    gone: bool,
    /// The entry tells number and type.
    exact: bool,
}

/// A listing on its way, from the topmost layer down.
#[derive(Debug)]
pub(crate) struct Builder<'a> {
    hasher: &'a RandomState,
    said: Vec<Said>,
    names: Vec<u8>,
    pub(crate) partial: bool,
}

impl<'a> Builder<'a> {
    pub(crate) fn new(hasher: &'a RandomState) -> Self {
        Self { hasher, said: Vec::new(), names: Vec::new(), partial: false }
    }

    /// What the layer at hand says about a name; `kind` `None`: it is gone. Unless `exact`, number and
    /// type are for a lookup to tell.
    pub(crate) fn add(&mut self, name: &[u8], kind: Option<Kind>, ino: u64, exact: bool) -> Res<()> {
        let start = u32::try_from(self.names.len()).map_err(|_| Errno::NOMEM)?;
        let Ok(length) = u8::try_from(name.len()) else {
            // FAT and NTFS have longer ones than can be asked for here.
            self.partial = true;
            return Ok(());
        };
        self.names.extend_from_slice(name);
        let at = position(self.hasher, name);
        let slot = Slot { at, ino, name: start, length, kind: kind.unwrap_or(Kind::File) };
        self.said.push(Said { slot, gone: kind.is_none(), exact });
        Ok(())
    }

    /// The listing, and the names of which the entries do not tell number and type.
    pub(crate) fn finish(self) -> (Listing, Vec<Box<[u8]>>) {
        let Self { mut said, names, partial, .. } = self;
        // Stable: of one position, what is said by the layers above comes first.
        said.sort_by_key(|said| said.slot.at);
        let mut listing = Listing { names, partial, ..Listing::default() };
        listing.slots.reserve(said.len());
        let mut look_up = Vec::new();
        let mut next = FIRST;
        for same_place in said.chunk_by(|a, b| a.slot.at == b.slot.at) {
            for (index, one) in same_place.iter().enumerate() {
                let name = listing.name(&one.slot);
                let above = same_place[..index].iter().find(|above| listing.name(&above.slot) == name);
                let is_dir = |said: &Said| !said.gone && said.slot.kind == Kind::Dir;
                match above {
                    // Directories merge; the number of the merged one is not the upper's.
                    Some(above) if is_dir(above) && is_dir(one) => look_up.push(name.into()),
                    Some(_) => {}
                    None if one.gone => {}
                    None => {
                        if !one.exact {
                            look_up.push(name.into());
                        }
                        let at = one.slot.at.max(next);
                        next = at + 1;
                        listing.slots.push(Slot { at, ..one.slot });
                    }
                }
            }
        }
        listing.length = listing.slots.len();
        (listing, look_up)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn built(names: &[(&str, Option<Kind>)]) -> (Listing, RandomState) {
        let hasher = RandomState::new();
        let mut builder = Builder::new(&hasher);
        for (ino, (name, kind)) in names.iter().enumerate() {
            builder.add(name.as_bytes(), *kind, ino as u64, true).expect("short");
        }
        (builder.finish().0, hasher)
    }

    fn names(listing: &Listing) -> Vec<String> {
        let all = listing.after(0, usize::MAX);
        let mut names: Vec<_> =
            all.into_iter().map(|(_, entry)| String::from_utf8_lossy(&entry.name).into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn positions_survive_removals_and_a_rebuild() {
        let (mut listing, hasher) = built(&[]);
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
        assert_eq!(listing.len(), 500);
        assert!(first.iter().all(|(_, a)| rest.iter().all(|(_, b)| a.name != b.name)));
        assert!(first.iter().all(|(_, a)| !listing.contains(&hasher, &a.name)));
        assert!(rest.iter().all(|(_, b)| listing.contains(&hasher, &b.name)));
    }

    #[test]
    fn who_gives_way_rebuilds_a_large_one_late() {
        let changes = |gives_way: bool| {
            let changes = std::thread::spawn(move || {
                if gives_way {
                    crate::errno::set_gives_way();
                }
                let (mut listing, hasher) = built(&[]);
                let most = (0..20_000).map(|i| {
                    listing.insert(&hasher, format!("f{i}").as_bytes(), i, Kind::File);
                    listing.changes.len()
                });
                let most = most.max();
                assert_eq!(names(&listing).len(), 20_000);
                most.unwrap_or(0)
            });
            changes.join().expect("no panic")
        };
        let (soon, late) = (changes(false), changes(true));
        assert!((2 * soon..=5 * soon).contains(&late), "{soon} {late}");
    }

    #[test]
    fn inserting_a_name_again_replaces_it() {
        let (mut listing, hasher) = built(&[("a", Some(Kind::File))]);
        listing.insert(&hasher, b"a", 2, Kind::Dir);
        let entries = listing.after(0, 9);
        assert_eq!(entries.iter().map(|(_, e)| (e.ino, e.kind)).collect::<Vec<_>>(), [(2, Kind::Dir)]);
        listing.remove(&hasher, b"a");
        listing.remove(&hasher, b"a");
        assert_eq!((listing.len(), names(&listing).len()), (0, 0));
        listing.insert(&hasher, b"a", 3, Kind::File);
        assert_eq!((listing.len(), names(&listing)), (1, vec!["a".to_owned()]));
    }

    #[test]
    fn the_topmost_decides_and_directories_merge() {
        let hasher = RandomState::new();
        let mut builder = Builder::new(&hasher);
        let (file, dir) = (Some(Kind::File), Some(Kind::Dir));
        let said =
            [("gone", None), ("d", dir), ("f", file), ("gone", file), ("d", dir), ("f", dir), ("b", file)];
        for (ino, (name, kind)) in said.iter().enumerate() {
            builder.add(name.as_bytes(), *kind, ino as u64, true).expect("short");
        }
        let (listing, look_up) = builder.finish();
        assert_eq!(names(&listing), ["b", "d", "f"]);
        assert_eq!(look_up, [b"d"[..].into()]);
        let f = listing.after(0, 9).into_iter().find(|(_, entry)| *entry.name == *b"f").expect("is there");
        assert_eq!((f.1.ino, f.1.kind), (2, Kind::File));
    }

    #[test]
    fn a_name_that_is_too_long_is_left_out() {
        let hasher = RandomState::new();
        let mut builder = Builder::new(&hasher);
        for name in [&[b'x'; 300][..], b"short"] {
            assert_eq!(builder.add(name, Some(Kind::File), 1, true), Ok(()));
        }
        let (listing, _) = builder.finish();
        assert_eq!((names(&listing), listing.partial), (vec!["short".to_owned()], true));
    }

    #[test]
    fn names_of_one_hash_stand_beside_each_other() {
        let hasher = RandomState::new();
        let mut builder = Builder::new(&hasher);
        for name in [b"x", b"y", b"z", b"x"] {
            builder.add(name, Some(Kind::File), u64::from(name[0]), true).expect("short");
        }
        for said in &mut builder.said {
            said.slot.at = 1000;
        }
        let (listing, _) = builder.finish();
        assert_eq!(
            listing.slots.iter().map(|slot| (slot.at, slot.ino)).collect::<Vec<_>>(),
            [(1000, u64::from(b'x')), (1001, u64::from(b'y')), (1002, u64::from(b'z'))]
        );
    }
}
