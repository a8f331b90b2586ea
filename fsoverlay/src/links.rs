//! Files of a layer with several names, which stay one file.
//!
//! Copied up, such a file gets the names that are known then, and each further one when that is looked up.
//! What leads from those to the copy, in this run and later ones, is an entry in the directory `links` of
//! the work directory (what the kernel's overlayfs calls its index):
//!
//! | entry | is |
//! |---|---|
//! | `ORIGIN@BIRTH` | one more name of the copy of this object |
//! | `ORIGIN@BIRTH-COUNT` | an empty file: the object is not copied up, COUNT of its names are covered |
//!
//! `ORIGIN` is the object's number as [`crate::numbers`] writes it down, which the copy goes on with. `BIRTH`
//! is when the object was made, seconds and nanoseconds in hexadecimal: if the layer's object that has
//! the number now was made at another time it is another one, which got the number after somebody
//! changed the layer, and the entry goes. Entries without a birth time are of file systems that have
//! none, and of earlier versions; then the number alone counts. How many names in the layer are still to
//! lead to the copy is noted with it ([`LINKS`]; of a symbolic link in [`crate::sidecar`]): `st_nlink`
//! counts them. When there is none any more the entry goes, and the number is written down as with any
//! copy. Until then a copy that has lost all its names in the upper lives on in its entry.
//!
//! A count is lowered after the name is made or covered: stopped in between, the server leaves one that is too
//! high, an entry that stays longer than it is needed, never one that is missing.
//!
//! The entries are read once, at the start. Nothing is asked for objects with one name, and nothing at
//! all while there is no entry. The lock is held over small I/O; it comes after the directories' locks.
//!
//! The names of a copy are counted by looking at the disk and adding what that does not know. Whoever
//! changes both holds a [`Changing`]; who counted meanwhile waits for the end of it and counts again. While one is
//! held no layer is asked for anything, since a far mount may never answer, and no room is reserved.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Mode, OFlags, XattrFlags};

use crate::attr::{Stat, Time};
use crate::copyup::{Temp, make_placeholder};
use crate::engine::Engine;
use crate::errno::{Errno, Res, missing_ok};
use crate::handle::Fd;
use crate::inode::{Inner, Node, Parked, Place};
use crate::layer::{RealDir, UPPER, stat_at, stat_fd};
use crate::lookup::{Probe, Seen};
use crate::numbers::{InodeNumbers, Origin};
use crate::readdir::for_each_entry;
use crate::sidecar::is_needed;
use crate::sys::{self, At};
use crate::upper::Upper;
use crate::xattr::{LINKS, ORIGIN};

const NAME: &str = "links";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// The copy's inode number in the upper.
    Copy(u64),
    Covered(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    what: What,
    /// When the layer's object was made, if that is known.
    birth: Option<Time>,
}

impl Entry {
    /// Whether it is about this object of a layer, which has the right number.
    fn is_of(&self, object: &Stat) -> bool {
        self.birth.zip(birth(object)).is_none_or(|(noted, now)| noted == now)
    }

    fn name(&self, origin: &str) -> String {
        let name = entry_name(origin, self.birth);
        match self.what {
            What::Copy(_) => name,
            What::Covered(count) => format!("{name}-{count}"),
        }
    }

    /// The origin, and an entry without the copy's number.
    fn parse(name: &[u8]) -> Option<(Origin, Self)> {
        let text = std::str::from_utf8(name).ok()?;
        let (name, what) = match text.split_once('-') {
            Some((name, count)) => (name, What::Covered(count.parse().ok().filter(|&count| count > 0)?)),
            None => (text, What::Copy(0)),
        };
        let (origin, birth) = match name.split_once('@') {
            Some((origin, birth)) => {
                let (sec, nsec) = birth.split_once('.')?;
                let sec = u64::from_str_radix(sec, 16).ok()?.cast_signed();
                (origin, Some(Time { sec, nsec: u32::from_str_radix(nsec, 16).ok()? }))
            }
            None => (name, None),
        };
        Some((Origin::parse(origin.as_bytes())?, Self { what, birth }))
    }
}

fn entry_name(origin: &str, birth: Option<Time>) -> String {
    match birth {
        Some(Time { sec, nsec }) => format!("{origin}@{:x}.{nsec:x}", sec.cast_unsigned()),
        None => origin.to_owned(),
    }
}

/// When an object was made, if its file system says.
fn birth(object: &Stat) -> Option<Time> {
    (object.btime != Time::default()).then_some(object.btime)
}

#[derive(Debug, Default)]
struct Entries {
    by_number: HashMap<u64, Entry>,
    /// Numbers by the copy's inode number in the upper.
    by_copy: HashMap<u64, u64>,
    dir: Option<Arc<RealDir>>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Links {
    entries: crate::sync::RwLock<Entries>,
    /// There is an entry, or was one.
    any: AtomicBool,
    /// How many entries have gone.
    gone: AtomicU64,
}

/// What is known of the names of an object in the upper.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Known {
    pub(crate) number: u64,
    /// Names in the layer that are still to lead to it.
    pub(crate) left: u32,
}

/// How often the names of a node were changed, and by how many they are being changed.
#[derive(Debug, Default)]
pub(crate) struct Changes(AtomicU32);

const CHANGED: u32 = 1 << 8;

/// How often who waits for a change looks before he sleeps: most are over at once.
const LOOKS: u32 = 100;
/// How long he sleeps at most: a change is a few steps in the upper, whose disk may hang all the same.
const MAX_WAIT: Duration = Duration::from_secs(5);

/// Those who sleep until a change is over, of all nodes: it is rare enough.
static SLEEPERS: AtomicUsize = AtomicUsize::new(0);
static ASLEEP: Mutex<()> = Mutex::new(());
static AWAKE: Condvar = Condvar::new();

impl Changes {
    /// What must be the same before and after names are counted; `None` while it is of no use.
    pub(crate) fn settled(&self) -> Option<u32> {
        Some(self.0.load(Ordering::SeqCst)).filter(|changes| changes % CHANGED == 0)
    }

    /// The same when nobody changes the names any more; `None` if that takes more than [`MAX_WAIT`]. Whoever calls
    /// it must not hold a lock that is taken while names are changed.
    pub(crate) fn wait_settled(&self) -> Option<u32> {
        self.settled_within(MAX_WAIT)
    }

    fn settled_within(&self, longest: Duration) -> Option<u32> {
        for _ in 0..LOOKS {
            if let Some(changes) = self.settled() {
                return Some(changes);
            }
            std::thread::yield_now();
        }
        let end = Instant::now() + longest;
        let mut guard = ASLEEP.lock().unwrap_or_else(PoisonError::into_inner);
        // Before the look: whoever ends the change after it sees a sleeper.
        SLEEPERS.fetch_add(1, Ordering::SeqCst);
        let changes = loop {
            let left = end.saturating_duration_since(Instant::now());
            let changes = self.settled();
            if changes.is_some() || left.is_zero() {
                break changes;
            }
            guard = AWAKE.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
        };
        SLEEPERS.fetch_sub(1, Ordering::SeqCst);
        changes
    }

    pub(crate) fn begin(&self) -> Changing<'_> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Changing(self)
    }
}

/// Names of a node are being changed.
#[derive(Debug)]
pub(crate) struct Changing<'a>(&'a Changes);

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_add(CHANGED - 1, Ordering::SeqCst);
        if SLEEPERS.load(Ordering::SeqCst) > 0 {
            // Not between a look and the sleep after it.
            drop(ASLEEP.lock().unwrap_or_else(PoisonError::into_inner));
            AWAKE.notify_all();
        }
    }
}

/// An entry that goes again unless it is kept.
pub(crate) struct NewEntry {
    dir: Fd,
    name: Option<String>,
}

impl NewEntry {
    pub(crate) fn keep(mut self) {
        self.name = None;
    }
}

impl Drop for NewEntry {
    fn drop(&mut self) {
        if let Some(name) = &self.name
            && let Err(err) = rustix::fs::unlinkat(&self.dir, name, AtFlags::empty())
        {
            tracing::debug!(?err, "cannot remove an entry of hard links");
        }
    }
}

fn open_links(upper: &Upper) -> Res<Arc<RealDir>> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(&upper.work, NAME, flags, Mode::empty())?;
    let key = stat_fd(fd.as_fd())?.key;
    Ok(RealDir::root(UPPER, Arc::new(fd), key, None))
}

impl Links {
    /// Reads the entries of a work directory.
    pub(crate) fn load(&self, upper: &Upper, numbers: &InodeNumbers) -> Res<()> {
        let Some(dir) = missing_ok(open_links(upper))? else { return Ok(()) };
        let Some(fd) = dir.slot.get(false) else { return Ok(()) };
        let mut entries = self.entries.write();
        for_each_entry(&crate::layer::open_for_reading(fd.as_fd())?, |name, _, ino| {
            if let Some((origin, entry)) = Entry::parse(name) {
                let number = numbers.of(origin);
                match entry.what {
                    What::Covered(_) => {
                        entries.by_number.entry(number).or_insert(entry);
                    }
                    What::Copy(_) => {
                        entries.by_number.insert(number, Entry { what: What::Copy(ino), ..entry });
                        entries.by_copy.insert(ino, number);
                    }
                }
            }
            true
        })?;
        self.any.store(!entries.by_number.is_empty(), Ordering::Release);
        entries.dir = Some(dir);
        Ok(())
    }

    fn get(&self, number: u64) -> Option<(Entry, Arc<RealDir>)> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        let entries = self.entries.read();
        Some((*entries.by_number.get(&number)?, entries.dir.clone()?))
    }

    pub(crate) fn is_empty(&self) -> bool {
        !self.any.load(Ordering::Acquire)
    }

    /// The number of an object of the upper that has an entry.
    pub(crate) fn number(&self, copy: &Stat) -> Option<u64> {
        if copy.nlink <= 1 || !self.any.load(Ordering::Acquire) {
            return None;
        }
        self.entries.read().by_copy.get(&copy.key.ino).copied()
    }

    /// How many names of a layer's object are covered.
    pub(crate) fn covered(&self, number: u64) -> u32 {
        match self.get(number) {
            Some((Entry { what: What::Covered(count), .. }, _)) => count,
            _ => 0,
        }
    }

    /// From here on the copy of this number, which is one of `from`, is found. Nobody sees that before `change`
    /// is done.
    pub(crate) fn insert<T>(&self, number: u64, copy: u64, from: &Stat, change: impl FnOnce() -> T) -> T {
        let mut entries = self.entries.write();
        // Looked at without the lock.
        self.any.store(true, Ordering::Release);
        entries.by_number.insert(number, Entry { what: What::Copy(copy), birth: birth(from) });
        entries.by_copy.insert(copy, number);
        change()
    }
}

impl Entries {
    /// The directory of entries, made when there is the first.
    fn dir(&mut self, upper: &Upper) -> Res<Fd> {
        if self.dir.is_none() {
            match rustix::fs::mkdirat(&upper.work, NAME, Mode::from_raw_mode(0o700)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(err) => return Err(err),
            }
            self.dir = Some(open_links(upper)?);
        }
        self.dir.as_ref().and_then(|dir| dir.slot.get(false)).ok_or(Errno::STALE)
    }
}

impl Engine {
    /// What changes when a copy loses its entry; see [`Links::number`].
    pub(crate) fn entries_gone(&self) -> u64 {
        self.upper.as_ref().map_or(0, |upper| upper.links.gone.load(Ordering::Acquire))
    }

    /// The copy of a layer's object with several names that has this number. `again` looks at the object
    /// another time.
    pub(crate) fn copy_of(
        &self,
        number: u64,
        object: &Stat,
        again: impl FnOnce() -> Res<Stat>,
    ) -> Res<Option<(Box<Seen>, Parked)>> {
        let Some(upper) = &self.upper else { return Ok(None) };
        let Some((entry, _)) = upper.links.get(number) else { return Ok(None) };
        if !entry.is_of(object) {
            // The entry may be of what came to have the number after `object` was seen. What is seen now is not
            // older than the entry.
            let now = again()?;
            if now.key != object.key {
                return Err(Errno::STALE);
            }
            if !entry.is_of(&now) {
                self.remove_entry_of_another(upper, number, entry)?;
                return Ok(None);
            }
        }
        self.copy_at_entry(upper, number)
    }

    fn copy_at_entry(&self, upper: &Upper, number: u64) -> Res<Option<(Box<Seen>, Parked)>> {
        let Some((entry @ Entry { what: What::Copy(ino), .. }, dir)) = upper.links.get(number) else {
            return Ok(None);
        };
        let name = entry.name(&self.numbers.describe(number));
        match self.probe(&dir, name.as_bytes(), false)? {
            Probe::Found(seen) if seen.stat.key.ino == ino => {
                let fd = dir.slot.get(false).ok_or(Errno::STALE)?;
                Ok(Some((
                    seen,
                    Parked { work: fd, name: name.into_bytes().into(), temporary: false, quota: None },
                )))
            }
            // Somebody removed it.
            _ => Ok(None),
        }
    }

    /// The number has come to another object of the layer: nothing leads to the copy any more but its names
    /// in the upper, and whoever has it open.
    fn remove_entry_of_another(&self, upper: &Upper, number: u64, entry: Entry) -> Res<()> {
        let node = self.table.get(number);
        let mut entries = upper.links.entries.write();
        if entries.by_number.get(&number) != Some(&entry) {
            return Ok(());
        }
        let fd = entries.dir(upper)?;
        let name = entry.name(&self.numbers.describe(number));
        let _changing = node.as_ref().map(|node| node.names.begin());
        // With the lock nobody else takes the entry from a node.
        let parked = node.as_ref().is_some_and(|node| match &node.inner.lock().place {
            Place::Parked(parked) => !parked.temporary && *parked.name == *name.as_bytes(),
            _ => false,
        });
        let alone = if parked {
            let moved = |temp: &[u8]| rustix::fs::renameat(&fd, &*name, &upper.work, temp);
            let moved = missing_ok(upper.make_temp(moved))?;
            moved.map(|((), temp)| Place::Parked(Arc::new(self.parked(upper, temp))))
        } else {
            missing_ok(rustix::fs::unlinkat(&fd, &*name, AtFlags::empty()))?;
            None
        };
        upper.links.gone.fetch_add(1, Ordering::AcqRel);
        entries.by_number.remove(&number);
        if let What::Copy(ino) = entry.what {
            entries.by_copy.remove(&ino);
        }
        let Some(node) = &node else { return Ok(()) };
        let mut inner = node.inner.lock();
        // It keeps the number in this run, but is not what the number says.
        if inner.entry {
            (inner.entry, inner.extra_links, inner.origin) = (false, 0, None);
        }
        let before = alone.map(|alone| std::mem::replace(&mut inner.place, alone));
        drop(inner);
        drop(before);
        Ok(())
    }

    /// What is known of the names of an object of the upper, if it has an entry.
    pub(crate) fn links_of(&self, seen: &Seen) -> Res<Option<Known>> {
        let Some(upper) = &self.upper else { return Ok(None) };
        let Some(number) = upper.links.number(&seen.stat) else { return Ok(None) };
        let left = if is_needed(&seen.stat) { upper.sidecar.links(&seen.stat)? } else { seen.marks.links };
        Ok(Some(Known { number, left: left.unwrap_or(0) }))
    }

    /// Makes the entry of a copy that has no name yet, and notes how many names are to lead to it.
    pub(crate) fn add_entry(&self, node: &Node, from: &Stat, temp: &Temp<'_>, left: u32) -> Res<NewEntry> {
        let upper = self.upper()?;
        let name = entry_name(&self.numbers.describe(node.ino), birth(from));
        match &temp.fd {
            Some(fd) => set_left(At::Fd(fd.as_fd()), left)?,
            None => upper.sidecar.set_links(&temp.stat()?, left)?,
        }
        let fd = upper.links.entries.write().dir(upper)?;
        match temp.link(fd.as_fd(), name.as_bytes()) {
            // Nobody knows it: it is left over.
            Err(Errno::EXIST) => {
                rustix::fs::unlinkat(&fd, &*name, AtFlags::empty())?;
                temp.link(fd.as_fd(), name.as_bytes())?;
            }
            other => other?,
        }
        Ok(NewEntry { dir: fd, name: Some(name) })
    }

    /// The place of a copy that has no name but its entry.
    pub(crate) fn entry_place(&self, node: &Node) -> Res<Parked> {
        let (entry, _) = self.upper()?.links.get(node.ino).ok_or(Errno::STALE)?;
        self.place_at_entry(entry.name(&self.numbers.describe(node.ino)))
    }

    /// The same of a copy of `from` whose entry was made just now.
    pub(crate) fn new_entry_place(&self, node: &Node, from: &Stat) -> Res<Parked> {
        self.place_at_entry(entry_name(&self.numbers.describe(node.ino), birth(from)))
    }

    fn place_at_entry(&self, name: String) -> Res<Parked> {
        let upper = self.upper()?;
        let work = upper.links.entries.write().dir(upper)?;
        Ok(Parked { work, name: name.into_bytes().into(), temporary: false, quota: None })
    }

    /// Writes down how many names are left after a change of them. What fails leaves a count too high.
    pub(crate) fn note_links(&self, node: &Arc<Node>) {
        let concerned = {
            let inner = node.inner.lock();
            inner.entry || inner.below > 1 && matches!(inner.place, Place::Lower { .. })
        };
        if concerned && let Err(err) = self.write_links(node) {
            tracing::debug!(?err, "cannot write down how many names a file has");
        }
    }

    fn write_links(&self, node: &Arc<Node>) -> Res<()> {
        let upper = self.upper()?;
        let origin = self.numbers.describe(node.ino);
        // Before the lock, which workers take, too: a far mount may never answer.
        let born = self.birth_below(node)?;
        let mut entries = upper.links.entries.write();
        // Looked at with the lock: of two who write, the later one has seen more.
        let (entry, left, covered, place) = {
            let inner = node.inner.lock();
            let covered = (!inner.entry).then(|| inner.extra_links.min(0).unsigned_abs());
            (inner.entry, inner.left(), covered, inner.place.clone())
        };
        let fd = entries.dir(upper)?;
        if let Some(covered) = covered {
            if !matches!(place, Place::Lower { .. }) {
                return Ok(());
            }
            let covered = u32::try_from(covered).unwrap_or(u32::MAX);
            return self.write_covered(node, &mut entries, &fd, &origin, covered, born);
        }
        if !entry {
            return Ok(());
        }
        let name = entries.by_number.get(&node.ino).ok_or(Errno::STALE)?.name(&origin);
        let at = At::Name(fd.as_fd(), name.as_bytes());
        let stat = stat_at(fd.as_fd(), name.as_bytes())?;
        if left > 0 {
            return if is_needed(&stat) { upper.sidecar.set_links(&stat, left) } else { set_left(at, left) };
        }
        // Nobody else has the number any more.
        if is_needed(&stat) {
            upper.sidecar.set_number(&stat, &origin)?;
        } else {
            // Without the count it is 0. Both together might need a block more.
            match sys::remove_xattr(at, LINKS) {
                Ok(()) | Err(Errno::NODATA) => {}
                Err(err) => return Err(err),
            }
            sys::set_xattr(at, ORIGIN, origin.as_bytes(), XattrFlags::empty())?;
        }
        let _changing = node.names.begin();
        let alone = if let Place::Parked(parked) = &place
            && !parked.temporary
        {
            // For those who have it open.
            let moved = |temp: &[u8]| rustix::fs::renameat(&fd, &*name, &upper.work, temp);
            let ((), temp) = upper.make_temp(moved)?;
            Some(Place::Parked(Arc::new(self.parked(upper, temp))))
        } else {
            rustix::fs::unlinkat(&fd, &*name, AtFlags::empty())?;
            None
        };
        upper.links.gone.fetch_add(1, Ordering::AcqRel);
        if let Some(Entry { what: What::Copy(ino), .. }) = entries.by_number.remove(&node.ino) {
            entries.by_copy.remove(&ino);
        }
        let mut inner = node.inner.lock();
        inner.entry = false;
        inner.extra_links = 0;
        let before = alone.map(|alone| std::mem::replace(&mut inner.place, alone));
        drop(inner);
        drop(before);
        Ok(())
    }

    /// When the object of a layer was made, as far as that is known.
    fn birth_below(&self, node: &Node) -> Res<Option<Time>> {
        let place = node.inner.lock().place.clone();
        let Place::Lower { dir, name } = place else { return Ok(None) };
        match self.upper()?.links.get(node.ino) {
            Some((entry, _)) => Ok(entry.birth),
            None => Ok(birth(&stat_at(self.fd(&dir)?.as_fd(), &name)?)),
        }
    }

    /// `born` is of the layer's object.
    fn write_covered(
        &self,
        node: &Node,
        entries: &mut Entries,
        fd: &Fd,
        origin: &str,
        count: u32,
        born: Option<Time>,
    ) -> Res<()> {
        let old = entries.by_number.get(&node.ino).copied();
        if let Some(Entry { what: What::Copy(_), .. }) = old {
            return Ok(());
        }
        let below = node.inner.lock().below;
        if count == 0 || count >= below {
            // All are covered: nobody can ask for it again.
            if let Some(old) = old {
                entries.by_number.remove(&node.ino);
                rustix::fs::unlinkat(fd, old.name(origin), AtFlags::empty())?;
            }
            return Ok(());
        }
        let new = Entry { what: What::Covered(count), birth: old.map_or(born, |old| old.birth) };
        match old {
            Some(old) => rustix::fs::renameat(fd, old.name(origin), fd, new.name(origin))?,
            None => match make_placeholder(fd.as_fd(), new.name(origin).as_bytes()) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(err) => return Err(err),
            },
        }
        entries.by_number.insert(node.ino, new);
        self.upper()?.links.any.store(true, Ordering::Release);
        Ok(())
    }

    /// Covered names of an object are not counted any more: it is copied up.
    pub(crate) fn forget_covered(&self, node: &Node) {
        let Ok(upper) = self.upper() else { return };
        if upper.links.covered(node.ino) == 0 {
            return;
        }
        let mut entries = upper.links.entries.write();
        let Some(entry @ Entry { what: What::Covered(_), .. }) = entries.by_number.get(&node.ino).copied()
        else {
            return;
        };
        entries.by_number.remove(&node.ino);
        let name = entry.name(&self.numbers.describe(node.ino));
        let removed = entries.dir(upper).and_then(|fd| rustix::fs::unlinkat(fd, name, AtFlags::empty()));
        if let Err(err) = removed {
            tracing::debug!(?err, "cannot remove a count of covered names");
        }
    }

    /// Removes entries of copies that no name leads to any more, which a killed server may leave.
    pub(crate) fn sweep_links(&self) {
        if let Err(err) = self.remove_unused_links() {
            // They take room, and nobody asks for them.
            tracing::debug!(?err, "entries of hard links were left");
        }
    }

    fn remove_unused_links(&self) -> Res<()> {
        let Some(upper) = self.upper.as_ref().filter(|upper| !upper.links.is_empty()) else { return Ok(()) };
        let copies: Vec<u64> = {
            let entries = upper.links.entries.read();
            entries.by_copy.values().copied().collect()
        };
        for number in copies {
            let Some((seen, place)) = self.copy_at_entry(upper, number)? else { continue };
            let left = self.links_of(&Seen { stat: Stat { nlink: 2, ..seen.stat }, ..*seen })?;
            if seen.stat.nlink <= 1 && left.is_some_and(|known| known.left == 0) {
                let mut entries = upper.links.entries.write();
                entries.by_number.remove(&number);
                entries.by_copy.remove(&seen.stat.key.ino);
                rustix::fs::unlinkat(&place.work, &*place.name, AtFlags::empty())?;
            }
        }
        Ok(())
    }
}

impl Inner {
    /// How many names in a layer are still to lead to a copy.
    pub(crate) fn left(&self) -> u32 {
        u32::try_from(self.extra_links + i64::from(self.entry)).unwrap_or(0)
    }
}

fn set_left(at: At<'_>, left: u32) -> Res<()> {
    sys::set_xattr(at, LINKS, left.to_string().as_bytes(), XattrFlags::empty())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::engine::tests::Scratch;

    /// However long that takes.
    #[test]
    fn names_are_counted_when_a_change_of_them_is_over() {
        let scratch = Scratch::new("slow-change");
        let (engine, file) = (&scratch.engine, scratch.make(b"file", crate::attr::Kind::File));
        // In the middle of it: a name more than there are.
        let changing = file.names.begin();
        file.inner.lock().extra_links += 1;
        std::thread::scope(|scope| {
            let counted = scope.spawn(|| engine.attr(&file).map(|attr| attr.stat.nlink));
            crate::sync::tests::in_time(|| {
                (SLEEPERS.load(Ordering::SeqCst) > 0 || counted.is_finished()).then_some(())
            });
            file.inner.lock().extra_links -= 1;
            drop(changing);
            assert_eq!(counted.join().expect("no panic"), Ok(1));
        });
    }

    #[test]
    fn a_change_of_names_that_is_never_over_holds_up_nobody_for_ever() {
        let scratch = Scratch::new("endless-change");
        let engine = Engine::open(&scratch.spec()).expect("an overlay");
        std::fs::write(scratch.dir.join("lower/file"), "").expect("written");
        let file = engine.lookup(engine.root(), b"file").expect("found");
        let _changing = file.names.begin();
        // (Not a scoped thread: where it waits for ever, nobody waits for it.)
        let asked = file.clone();
        let asks = std::thread::spawn(move || engine.attr(&asked).map(|attr| attr.stat.nlink));
        crate::sync::tests::in_time(|| asks.is_finished().then_some(()));
        assert_eq!(asks.join().expect("no panic"), Ok(1));
        assert_eq!(file.names.settled(), None);
    }

    #[test]
    fn who_waits_for_a_change_of_names_is_woken_by_its_end() {
        let changes = std::sync::Arc::<Changes>::default();
        let changing = changes.begin();
        // More than wait elsewhere at the same time: some of these sleep.
        let waits: Vec<_> = (0..8)
            .map(|_| {
                let changes = changes.clone();
                std::thread::spawn(move || changes.settled_within(Duration::from_secs(36_000)))
            })
            .collect();
        crate::sync::tests::in_time(|| (SLEEPERS.load(Ordering::SeqCst) >= waits.len()).then_some(()));
        drop(changing);
        crate::sync::tests::in_time(|| waits.iter().all(|waits| waits.is_finished()).then_some(()));
        for waits in waits {
            assert_eq!(waits.join().expect("no panic"), Some(CHANGED));
        }
    }

    #[test]
    fn entries_are_read_as_they_were_written() {
        let origin = "fs=i12:ab";
        let birth = Some(Time { sec: -3, nsec: 999_999_999 });
        for entry in [
            Entry { what: What::Copy(0), birth },
            Entry { what: What::Copy(0), birth: None },
            Entry { what: What::Covered(7), birth },
            Entry { what: What::Covered(1), birth: None },
        ] {
            let (parsed, read) = Entry::parse(entry.name(origin).as_bytes()).expect("an entry");
            assert_eq!(
                (Some(parsed), read.what, read.birth),
                (Origin::parse(b"fs=i12:ab"), entry.what, entry.birth)
            );
        }
        for wrong in [
            "",
            "x",
            "fs=i12:ab-",
            "fs=i12:ab-0",
            "fs=i12:ab@",
            "fs=i12:ab@1",
            "fs=i12:ab@x.1",
            "fs=i12:ab@1.1-x",
        ] {
            assert!(Entry::parse(wrong.as_bytes()).is_none(), "{wrong}");
        }
    }

    /// Two files with two names each in the layer, `a` and `b`; the upper has a copy of `a`, or a name of it is
    /// covered, and the entry says so of what has the number of `b`.
    fn renumbered(name: &str, covered: bool, with_birth: bool) -> Scratch {
        let scratch = Scratch::new(name);
        let lower = scratch.dir.join("lower");
        let born = |file: &str| {
            let stat = std::fs::metadata(lower.join(file)).expect("there");
            stat.created().expect("ext4, tmpfs, xfs and btrfs note when a file was made")
        };
        std::fs::write(lower.join("a"), "a").expect("written");
        loop {
            std::fs::write(lower.join("b"), "b").expect("written");
            // The clock of a file system ticks a few hundred times in a second.
            if born("a") != born("b") {
                break;
            }
            std::fs::remove_file(lower.join("b")).expect("removed");
        }
        for file in ["a", "b"] {
            std::fs::hard_link(lower.join(file), lower.join(format!("{file}2"))).expect("linked");
        }
        let engine = &scratch.engine;
        if covered {
            assert_eq!(engine.unlink(engine.root(), b"a"), Ok(()));
        } else {
            let file = engine.lookup(engine.root(), b"a").expect("there");
            assert_eq!(engine.write(&file, 0, b"A", false), Ok(1));
        }
        let links = scratch.dir.join("work/links");
        let names: Vec<_> = std::fs::read_dir(&links).expect("there").flatten().collect();
        assert_eq!(names.len(), 1);
        let old = names[0].file_name().into_string().expect("text");
        let ino = |name: &str| std::fs::metadata(lower.join(name)).expect("there").ino();
        let (left, right) = (format!(":{:x}", ino("a")), format!(":{:x}", ino("b")));
        let mut new = old.replace(&left, &right);
        assert_ne!(new, old);
        if !with_birth {
            let (origin, rest) = new.split_once('@').expect("a birth time");
            let count = rest.split_once('-').map_or(String::new(), |(_, count)| format!("-{count}"));
            new = format!("{origin}{count}");
        }
        std::fs::rename(links.join(old), links.join(new)).expect("renamed");
        scratch
    }

    /// The number, the first byte and the count of names of each in a later run, looked up in this order.
    fn seen(scratch: &Scratch, names: &[&str]) -> Vec<(u64, u8, u32)> {
        let engine = Engine::open(&scratch.spec()).expect("an overlay");
        let nodes: Vec<_> =
            names.iter().map(|name| engine.lookup(engine.root(), name.as_bytes()).expect("there")).collect();
        let look = |node: &Arc<Node>| {
            let mut byte = [0];
            assert_eq!(engine.read(node, 0, &mut byte), Ok(1));
            (node.ino, byte[0], engine.attr(node).map_or(0, |attr| attr.stat.nlink))
        };
        nodes.iter().map(look).collect()
    }

    #[test]
    fn a_number_that_was_used_again_does_not_lead_to_the_copy() {
        let scratch = renumbered("again", false, true);
        // Whichever is asked for first, they are two.
        let found = seen(&scratch, &["a", "b", "b2"]);
        assert_eq!((found[0].1, found[1].1, found[2].1), (b'A', b'b', b'b'));
        assert_eq!((found[0].2, found[1].2), (1, 2));
        assert!(found[0].0 != found[1].0 && found[1].0 == found[2].0);
        assert_eq!(std::fs::read_dir(scratch.dir.join("work/links")).map_or(9, Iterator::count), 0);
        drop(scratch);
        let scratch = renumbered("again", false, true);
        let found = seen(&scratch, &["b2", "a", "b"]);
        assert_eq!((found[0].1, found[1].1, found[2].1), (b'b', b'A', b'b'));
        assert!(found[0].0 != found[1].0 && found[0].0 == found[2].0);
    }

    /// A copy whose name in the upper is gone; one of a layer's is left.
    fn at_its_entry(name: &str) -> (Scratch, Arc<Node>, Stat) {
        let scratch = Scratch::new(name);
        let lower = scratch.dir.join("lower");
        std::fs::write(lower.join("a"), "a").expect("written");
        std::fs::hard_link(lower.join("a"), lower.join("a2")).expect("linked");
        let engine = &scratch.engine;
        let object = stat_at(rustix::fs::CWD, lower.join("a").as_os_str().as_encoded_bytes()).expect("there");
        let node = engine.lookup(engine.root(), b"a").expect("there");
        assert_eq!(engine.write(&node, 0, b"A", false), Ok(1));
        assert_eq!(engine.unlink(engine.root(), b"a"), Ok(()));
        (scratch, node, object)
    }

    #[test]
    fn an_entry_goes_only_if_the_object_is_another_one_still() {
        let (scratch, node, object) = at_its_entry("seen-before");
        let other = Stat { btime: Time { sec: 1, nsec: 1 }, ..object };
        // It was seen before it made room for the one that was copied up.
        let found = scratch.engine.copy_of(node.ino, &other, || Ok(object));
        assert!(found.is_ok_and(|found| found.is_some()));
        assert_eq!(std::fs::read_dir(scratch.dir.join("work/links")).map_or(0, Iterator::count), 1);
        let elsewhere = Stat { key: crate::attr::Key { ino: object.key.ino + 1, ..object.key }, ..other };
        let found = scratch.engine.copy_of(node.ino, &other, || Ok(elsewhere));
        assert_eq!(found.map(|found| found.is_some()), Err(Errno::STALE));
    }

    #[test]
    fn what_is_open_outlives_its_entry() {
        let (scratch, node, object) = at_its_entry("outlives");
        let engine = &scratch.engine;
        assert!(matches!(&node.inner.lock().place, Place::Parked(parked) if !parked.temporary));
        let other = Stat { btime: Time { sec: 1, nsec: 1 }, ..object };
        let found = engine.copy_of(node.ino, &other, || Ok(other));
        assert_eq!(found.map(|found| found.is_some()), Ok(false));
        assert_eq!(std::fs::read_dir(scratch.dir.join("work/links")).map_or(9, Iterator::count), 0);
        // The descriptor is not what keeps it.
        drop(node.file.take());
        let mut byte = [0];
        assert_eq!((engine.read(&node, 0, &mut byte), byte), (Ok(1), *b"A"));
        assert_eq!(engine.attr(&node).map(|attr| attr.stat.nlink), Ok(0));
        let left = || {
            let work = std::fs::read_dir(scratch.dir.join("work")).expect("there").flatten();
            work.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"#")).count()
        };
        assert_eq!(left(), 1);
        drop(node);
        assert_eq!(left(), 0);
    }

    #[test]
    fn entries_without_a_birth_time_count() {
        let scratch = renumbered("old", false, false);
        let found = seen(&scratch, &["b", "a"]);
        assert_eq!((found[0].1, found[1].1), (b'A', b'A'));
        assert_eq!(found[0].0, found[1].0);
    }

    #[test]
    fn covered_names_of_another_object_are_not_counted() {
        for (with_birth, count) in [(true, 2), (false, 1)] {
            let scratch = renumbered("covered", true, with_birth);
            assert_eq!(seen(&scratch, &["b"])[0].2, count);
        }
    }
}
