//! Looking ahead: the directory that will be listed next.
//!
//! Who walks a tree lists directory after directory, and waits for a reply with the attributes of all entries,
//! each of which costs a stat(2) of a layer. While the kernel makes inodes of one reply, a worker makes the
//! next one ready: with two processors that hides a large part of it.
//!
//! After a listing the next one is guessed: the first directory in it, or else the next one beside it, or
//! beside one of those above (the order in which find(1), du(1) and tar(1) go). Only if this listing was
//! guessed rightly itself something is done: it has been read, so a wrong guess costs one directory. One
//! worker at a time does so, after its reply, so that others go on serving.
//!
//! What is found is what a lookup finds, of a layer's files with one name in directories that are not in the
//! upper. It says the same as long as nobody has had the directory's lock for writing, which every
//! change of a name and every copy-up takes; this is counted ([`crate::sync::RwLock::written`]). It is
//! not used after [`MAX_AGE`], since a read changes the access time of a layer's file.
//!
//! No more is made ready than the last full reply held: what is left would be looked up a second time, if its turn
//! comes too late. What one reply leaves all the same waits for the next.
//!
//! Nothing is done where somebody else than the kernel would notice or wait: with an access trace, far
//! mounts, layers that change, or a single worker; nor in a layer whose own file system may never answer, or in a
//! directory that is mounted in a layer, which may be far since. (A single file that is mounted in one is asked for
//! its attributes.)
//!
//! Nobody waits long for it. Who makes something ready does so on behalf of nobody yet, so it waits for no lock of
//! a directory: where one is locked there is no guess, or nothing is ready. It has such a lock itself for as long as
//! the reading of a directory of [`MAX_SIZE`] takes, and then, for reading, for [`MAX_TIME`] and one stat(2). Who asks
//! for what is being made ready goes on without it after [`MAX_WAIT`].

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, PoisonError};
use std::time::{Duration, Instant};

use crate::attr::{Attr, Kind};
use crate::engine::Engine;
use crate::errno::Res;
use crate::hooks::add;
use crate::inode::Node;
use crate::layer::{RealDir, stat_at};
use crate::listing::FIRST;
use crate::lookup::Plain;
use crate::readdir::drop_listings;
use crate::sync::Mutex;

/// How many guesses are kept: two for each walk, the next directory and the rest of this one.
const MAX_GUESSES: usize = 8;
/// How many entries are looked up for one reply, and for how long: what is not in memory is not waited for twice.
const MAX_ENTRIES: usize = 512;
/// The same before any reply has told more: what fits into a page, for which older kernels ask.
const LEAST_ENTRIES: usize = 24;
const MAX_TIME: Duration = Duration::from_millis(if cfg!(test) { 60_000 } else { 2 });
/// How long whoever asks for what is being made ready waits for it: what is longer under way hangs.
const MAX_WAIT: Duration = Duration::from_millis(5);
/// Directories of more bytes are not read ahead.
const MAX_SIZE: u64 = 64 << 10;
/// How far a guess looks around.
const MAX_STEPS: usize = 1000;
const MAX_AGE: Duration = Duration::from_secs(if cfg!(test) { 60 } else { 1 });

/// What will be asked for next.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    guesses: Mutex<VecDeque<Guess>>,
    /// Held by who makes something ready.
    busy: Mutex<()>,
    /// How many entries the last full reply held, or one since then that held more.
    room: AtomicUsize,
}

#[derive(Debug)]
struct Guess {
    ino: u64,
    ready: Option<Arc<Slot>>,
}

/// What one worker makes ready, and another may want.
#[derive(Debug, Default)]
struct Slot {
    state: Mutex<Making>,
    complete: Condvar,
}

#[derive(Debug, Default)]
enum Making {
    #[default]
    Going,
    /// Somebody waits for it.
    Awaited,
    Complete(Ready),
}

impl Slot {
    fn of(ready: Ready) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(Making::Complete(ready)), complete: Condvar::new() })
    }

    fn fill(&self, ready: Ready) {
        let before = std::mem::replace(&mut *self.state.lock(), Making::Complete(ready));
        // (Waking is a system call.)
        if matches!(before, Making::Awaited) {
            self.complete.notify_all();
        }
    }

    /// What is ready; `None` if that takes longer.
    fn wait(&self, longest: Duration) -> Option<Ready> {
        let mut state = self.state.lock();
        if matches!(*state, Making::Going) {
            *state = Making::Awaited;
        }
        let waits = |state: &mut Making| !matches!(state, Making::Complete(_));
        let (mut state, _) =
            self.complete.wait_timeout_while(state, longest, waits).unwrap_or_else(PoisonError::into_inner);
        match &mut *state {
            Making::Complete(ready) => Some(std::mem::take(ready)),
            _ => None,
        }
    }
}

/// What was found in a directory, by position.
#[derive(Debug, Default)]
pub(crate) struct Ready {
    found: VecDeque<(u64, Plain)>,
    /// How often the directory was locked for writing until then.
    written: u64,
    since: Option<Instant>,
}

impl Ready {
    /// What was found at this position, or after it.
    fn take(&mut self, position: u64) -> Option<Plain> {
        while let Some((at, _)) = self.found.front()
            && *at <= position
        {
            let (at, found) = self.found.pop_front()?;
            if at == position {
                return Some(found);
            }
        }
        None
    }
}

/// A listing that has begun.
#[derive(Debug, Default)]
pub(crate) struct Begun {
    guessed: bool,
    ready: Option<Ready>,
    /// How many entries the reply holds.
    pub(crate) told: usize,
    /// There was no room for more.
    pub(crate) full: bool,
    /// For how many of them the disk was not asked.
    used: u64,
}

impl Ahead {
    /// Keeps a guess in place of an older one, unless that has more to offer.
    fn guess(&self, ino: u64, ready: Option<Arc<Slot>>) {
        let mut guesses = self.guesses.lock();
        if let Some(at) = guesses.iter().position(|guess| guess.ino == ino) {
            if ready.is_none() && guesses[at].ready.is_some() {
                return;
            }
            guesses.remove(at);
        }
        if guesses.len() >= MAX_GUESSES {
            guesses.pop_front();
        }
        guesses.push_back(Guess { ino, ready });
    }
}

impl Engine {
    /// A listing begins, or goes on.
    pub(crate) fn begin_listing(&self, dir: &Node) -> Begun {
        let Some(ahead) = &self.ahead else { return Begun::default() };
        let guess = {
            let mut guesses = ahead.guesses.lock();
            let at = guesses.iter().position(|guess| guess.ino == dir.ino);
            at.and_then(|at| guesses.remove(at))
        };
        let Some(guess) = guess else { return Begun::default() };
        // Somebody may be at it.
        let ready = guess.ready.and_then(|slot| slot.wait(MAX_WAIT));
        let fresh = |ready: &Ready| ready.since.is_some_and(|since| since.elapsed() < MAX_AGE);
        Begun { guessed: true, ready: ready.filter(fresh), ..Begun::default() }
    }

    /// The reply is complete: notes how much it holds, and keeps what is ready beyond it for the next one. To be called
    /// before the kernel can ask for that.
    pub(crate) fn pause_listing(&self, dir: &Node, begun: &mut Begun) {
        let Some(ahead) = &self.ahead else { return };
        if begun.used > 0 {
            add(&self.counts.told_ahead, begun.used);
        }
        if !begun.full {
            ahead.room.fetch_max(begun.told, Ordering::Relaxed);
            return;
        }
        ahead.room.store(begun.told, Ordering::Relaxed);
        if let Some(rest) = begun.ready.take().filter(|ready| !ready.found.is_empty()) {
            ahead.guess(dir.ino, Some(Slot::of(rest)));
        }
    }

    /// Like [`Engine::lookup_known`], of what was found before.
    pub(crate) fn lookup_ready(&self, dir: &Node, position: u64, begun: &mut Begun) -> Option<Attr> {
        let ready = begun.ready.as_mut()?;
        let found = ready.take(position)?;
        let part = dir.dir().ok()?;
        let _unchanged = part.state.read();
        if part.state.written() != ready.written {
            begun.ready = None;
            return None;
        }
        let attr = self.remember_plain(found)?;
        begun.used += 1;
        Some(attr)
    }

    /// After the reply: guesses what comes next, and gets it ready if `begun` was guessed. Failures show when it
    /// is really asked for.
    pub(crate) fn look_ahead(&self, dir: &Arc<Node>, begun: &Begun) {
        let Some(ahead) = &self.ahead else { return };
        let Some(next) = self.next_listing(dir) else { return };
        let busy = if begun.guessed { ahead.busy.try_lock() } else { None };
        let slot = busy.is_some().then(Arc::<Slot>::default);
        // Whoever begins with it from here on waits for what is found.
        ahead.guess(next.ino, slot.clone());
        let Some(slot) = slot else { return };
        let most = ahead.room.load(Ordering::Relaxed).clamp(LEAST_ENTRIES, MAX_ENTRIES);
        let ready = self.get_ready(&next, most).unwrap_or_else(|err| {
            tracing::debug!(?err, "nothing is ready ahead of a listing");
            None
        });
        let ready = ready.unwrap_or_default();
        add(&self.counts.looked_ahead, ready.found.len() as u64);
        slot.fill(ready);
    }

    /// The directory after this one, where directories are listed before what is in them. There is no
    /// guess if that one is not known yet (the reply ended before it), nor if one on the way to it is locked.
    fn next_listing(&self, dir: &Arc<Node>) -> Option<Arc<Node>> {
        let mut steps = 0;
        let mut first_after = |dir: &Arc<Node>, position: u64| -> Option<Option<Arc<Node>>> {
            let Some(state) = dir.dir().ok()?.state.try_read() else { return Some(None) };
            let mut next = None;
            state.listing.as_ref()?.visit(position, |_, name, ino, kind| {
                steps += 1;
                if kind == Kind::Dir {
                    let node = self.table.get(ino);
                    next = Some(node.filter(|node| node.dir.is_some() && node.has_link(dir, name)));
                }
                kind != Kind::Dir && steps < MAX_STEPS
            });
            next
        };
        if let Some(child) = first_after(dir, FIRST - 1) {
            return child;
        }
        let mut last = dir.clone();
        for _ in 0..MAX_STEPS {
            let link = last.first_link()?;
            let position = {
                let state = link.parent.dir().ok()?.state.try_read()?;
                state.listing.as_ref()?.position(&self.hasher, &link.name)?
            };
            if let Some(next) = first_after(&link.parent, position) {
                return next;
            }
            last = link.parent;
        }
        None
    }

    /// `None`: nothing is made ready of this one, or somebody has it locked.
    fn get_ready(&self, dir: &Arc<Node>, most: usize) -> Res<Option<Ready>> {
        let begin = Instant::now();
        let part = dir.dir()?;
        if part.upper.get().is_some() {
            return Ok(None);
        }
        let listed = {
            let Some(state) = part.state.try_read() else { return Ok(None) };
            let may_hang = |lower: &Arc<RealDir>| {
                let layer = &self.layers[lower.layer as usize];
                layer.remote || lower.key.dev != layer.root.key.dev
            };
            if state.lowers.iter().any(may_hang) {
                return Ok(None);
            }
            let mut size = 0;
            for lower in &state.lowers {
                size += stat_at(self.fd(lower)?.as_fd(), b".")?.size;
            }
            if size > MAX_SIZE {
                return Ok(None);
            }
            state.listing.is_some()
        };
        if !listed {
            let Some(mut state) = part.state.try_write() else { return Ok(None) };
            let surplus = self.make_listing(dir, &mut state)?;
            drop(state);
            drop_listings(surplus);
        }
        let Some(state) = part.state.try_read() else { return Ok(None) };
        let Some(listing) = &state.listing else { return Ok(None) };
        // Nobody is writing.
        let mut ready = Ready { written: part.state.written(), since: Some(begin), ..Ready::default() };
        ready.found.reserve(listing.len().min(most));
        let mut left = most;
        listing.visit(FIRST - 1, |at, name, _, kind| {
            left -= 1;
            if kind != Kind::Dir
                && let Ok(found) = self.find(dir, &state, name)
                && let Some(found) = self.plain(dir, name, &found)
            {
                ready.found.push_back((at, found));
            }
            left > 0 && begin.elapsed() < MAX_TIME
        });
        Ok(Some(ready))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::Scratch;
    use crate::errno::Errno;
    use crate::far::MountTable;
    use crate::rename::How;
    use crate::setattr::SetAttr;
    use crate::sync::tests::in_time;

    /// Directories with two files, a file with two names and a directory with a file each.
    fn tree(name: &str) -> Scratch {
        let mut scratch = Scratch::new(name);
        scratch.engine.ahead = Some(Ahead::default());
        for dir in ["a", "b", "c", "d", "e"].map(|dir| scratch.dir.join("lower").join(dir)) {
            std::fs::create_dir_all(dir.join("sub")).expect("made");
            for file in ["f", "g", "h", "sub/x"] {
                std::fs::write(dir.join(file), file).expect("written");
            }
            std::fs::hard_link(dir.join("h"), dir.join("i")).expect("linked");
        }
        scratch
    }

    /// Lists a directory as the kernel asks for it; gives the directories in it, and how many of its entries were
    /// there before.
    fn list(engine: &Engine, dir: &Arc<Node>) -> (Vec<Arc<Node>>, usize) {
        let mut begun = engine.begin_listing(dir);
        let (mut dirs, mut ready) = (Vec::new(), 0);
        for (position, entry) in engine.read_dir(dir, FIRST - 1, 99).expect("listed") {
            if let Some(attr) = engine.lookup_ready(dir, position, &mut begun) {
                ready += 1;
                engine.table.forget(attr.ino, 1);
                let (node, asked) = engine.lookup_attr(dir, &entry.name).expect("found");
                assert_eq!(format!("{attr:?}"), format!("{asked:?}"));
                assert_eq!(node.ino, entry.ino);
            } else if entry.kind == Kind::Dir {
                dirs.push(engine.lookup(dir, &entry.name).expect("found"));
            }
        }
        engine.look_ahead(dir, &begun);
        (dirs, ready)
    }

    #[test]
    fn a_walk_meets_what_is_ready() {
        let scratch = tree("ahead");
        let engine = &scratch.engine;
        let mut ready = Vec::new();
        let (dirs, first) = list(engine, engine.root());
        ready.push(first);
        // Kept, as the kernel does.
        let mut known = Vec::new();
        for dir in &dirs {
            let (below, found) = list(engine, dir);
            ready.push(found);
            ready.extend(below.iter().map(|dir| list(engine, dir).1));
            known.extend(below);
        }
        // The first is right, and so the second is ready; of the hard links nothing is.
        assert_eq!(ready, [0, 0, 1, 2, 1, 2, 1, 2, 1, 2, 1]);
        // In another order nothing is read that nobody asks for.
        for dir in known.iter().chain(&dirs).rev() {
            assert_eq!(list(engine, dir).1, 0);
        }
    }

    /// Lists a directory by replies of so many entries; gives how many of them were ready.
    fn list_by(engine: &Engine, dir: &Arc<Node>, room: usize) -> usize {
        let (mut offset, mut used) = (FIRST - 1, 0);
        loop {
            let mut begun = engine.begin_listing(dir);
            let entries = engine.read_dir(dir, offset, room + 1).expect("listed");
            begun.full = entries.len() > room;
            let first = offset < FIRST;
            for (position, _) in entries.into_iter().take(room) {
                used += usize::from(engine.lookup_ready(dir, position, &mut begun).is_some());
                begun.told += 1;
                offset = position;
            }
            engine.pause_listing(dir, &mut begun);
            if first {
                engine.look_ahead(dir, &begun);
            }
            if !begun.full {
                return used;
            }
        }
    }

    #[test]
    fn what_is_ready_is_what_a_reply_holds_and_none_of_it_is_lost() {
        let mut scratch = Scratch::new("ahead-room");
        scratch.engine.ahead = Some(Ahead::default());
        for dir in ["a", "b", "c", "d"].map(|dir| scratch.dir.join("lower").join(dir)) {
            std::fs::create_dir(&dir).expect("made");
            for file in 0..100 {
                std::fs::write(dir.join(file.to_string()), "").expect("written");
            }
        }
        let (dirs, _) = list(&scratch.engine, scratch.engine.root());
        let used: Vec<_> = dirs
            .iter()
            .zip([10, 10, 50, 50])
            .map(|(dir, room)| list_by(&scratch.engine, dir, room))
            .collect();
        assert_eq!(used, [0, LEAST_ENTRIES, LEAST_ENTRIES, 50]);
    }

    #[test]
    fn a_guess_that_is_ready_stays() {
        let ahead = Ahead::default();
        ahead.guess(5, Some(Arc::default()));
        ahead.guess(5, None);
        assert!(ahead.guesses.lock().iter().all(|guess| guess.ready.is_some()));
    }

    #[test]
    fn there_is_no_guess_beyond_what_was_told() {
        let scratch = tree("ahead-beyond");
        let engine = &scratch.engine;
        let (dirs, _) = list(engine, engine.root());
        // The directory in it was in no reply.
        let _ = engine.begin_listing(&dirs[0]);
        engine.read_dir(&dirs[0], FIRST - 1, 1).expect("listed");
        assert!(engine.next_listing(&dirs[0]).is_none());
        let sub = engine.lookup(&dirs[0], b"sub").expect("found");
        assert_eq!(engine.next_listing(&dirs[0]).map(|node| node.ino), Some(sub.ino));
    }

    #[test]
    fn what_changed_since_is_not_what_is_told() {
        type Change = fn(&Engine, &Arc<Node>) -> Res<()>;
        let changes: [Change; 5] = [
            |engine, dir| engine.unlink(dir, b"f"),
            |engine, dir| engine.rename(dir, b"f", dir, b"g", How::Replace),
            |engine, dir| engine.rename(dir, b"f", engine.root(), b"f", How::Replace),
            |engine, dir| {
                engine.write(&engine.lookup(dir, b"f")?, 0, b"more than there was", false).map(drop)
            },
            |engine, dir| {
                let set = SetAttr { perm: Some(0o600), ..SetAttr::default() };
                engine.set_attr(&engine.lookup(dir, b"f")?, set).map(drop)
            },
        ];
        for (i, change) in changes.iter().enumerate() {
            let scratch = tree(&format!("ahead-changed-{i}"));
            let engine = &scratch.engine;
            let (dirs, _) = list(engine, engine.root());
            let (below, _) = list(engine, &dirs[0]);
            assert_eq!(list(engine, &below[0]).1, 1);
            // Now the second is ready.
            assert_eq!(change(engine, &dirs[1]), Ok(()));
            let mut begun = engine.begin_listing(&dirs[1]);
            assert!(begun.ready.as_ref().is_some_and(|ready| ready.found.len() == 2));
            for (position, _) in engine.read_dir(&dirs[1], FIRST - 1, 99).expect("listed") {
                assert!(engine.lookup_ready(&dirs[1], position, &mut begun).is_none(), "{i}");
            }
        }
    }

    #[test]
    fn nothing_is_ready_of_what_the_upper_has() {
        let scratch = tree("ahead-upper");
        let engine = &scratch.engine;
        let (dirs, _) = list(engine, engine.root());
        assert_eq!(engine.copy_up(&dirs[1]), Ok(()));
        let (below, _) = list(engine, &dirs[0]);
        list(engine, &below[0]);
        let begun = engine.begin_listing(&dirs[1]);
        assert!(begun.guessed && begun.ready.is_none());
        assert_eq!(engine.lookup(&dirs[1], b"none").map(|node| node.ino), Err(Errno::NOENT));
    }

    #[test]
    fn only_so_much_is_kept() {
        let mut scratch = Scratch::new("ahead-bounds");
        scratch.engine.ahead = Some(Ahead::default());
        for dir in ["a", "b", "c"].map(|dir| scratch.dir.join("lower").join(dir)) {
            std::fs::create_dir(&dir).expect("made");
            for file in 0..MAX_ENTRIES + 100 {
                std::fs::write(dir.join(file.to_string()), "").expect("written");
            }
        }
        let engine = &scratch.engine;
        let ahead = engine.ahead.as_ref().expect("just made");
        let (dirs, _) = list(engine, engine.root());
        ahead.room.store(10 * MAX_ENTRIES, Ordering::Relaxed);
        list(engine, &dirs[0]);
        let ready = engine.begin_listing(&dirs[1]).ready.expect("ready");
        assert_eq!(ready.found.len(), MAX_ENTRIES);
        // Nor is it for many directories.
        for ino in 0..100 {
            ahead.guess(ino, Some(Slot::of(Ready::default())));
        }
        let kept: Vec<u64> = ahead.guesses.lock().iter().map(|guess| guess.ino).collect();
        assert_eq!(kept, (100 - MAX_GUESSES as u64..100).collect::<Vec<_>>());
        // Nor for long: reading a file changes its access time.
        for (age, is_ready) in [(Duration::ZERO, true), (2 * MAX_AGE, false)] {
            let since = Instant::now().checked_sub(age);
            ahead.guess(dirs[2].ino, Some(Slot::of(Ready { since, ..Ready::default() })));
            assert_eq!(engine.begin_listing(&dirs[2]).ready.is_some(), is_ready);
        }
    }

    #[test]
    fn who_asks_does_not_wait_for_what_never_gets_ready() {
        let scratch = tree("ahead-never");
        let mut engine = Engine::open(&scratch.spec()).expect("an overlay");
        engine.ahead = Some(Ahead::default());
        let dir = engine.lookup(engine.root(), b"a").expect("found");
        if let Some(ahead) = &engine.ahead {
            ahead.guess(dir.ino, Some(Arc::default()));
        }
        // (Not a scoped thread: it is to be given up where it waits.)
        let listing = std::thread::spawn(move || {
            let begun = engine.begin_listing(&dir);
            let listed = engine.read_dir(&dir, 0, 99).map(|entries| entries.len());
            (begun.guessed, begun.ready.is_none(), listed)
        });
        in_time(|| listing.is_finished().then_some(()));
        assert_eq!(listing.join().expect("no panic"), (true, true, Ok(7)));
    }

    #[test]
    fn who_waits_has_what_comes() {
        let slot = Arc::<Slot>::default();
        let theirs = slot.clone();
        let waits = std::thread::spawn(move || theirs.wait(Duration::from_secs(36_000)));
        in_time(|| matches!(*slot.state.lock(), Making::Awaited).then_some(()));
        slot.fill(Ready { written: 7, ..Ready::default() });
        in_time(|| waits.is_finished().then_some(()));
        let ready = waits.join().expect("no panic");
        assert_eq!(ready.map(|ready| ready.written), Some(7));
    }

    /// How much is ready of the directory that comes next, where one of three (the root, the one that was listed, the
    /// next one) was locked all the while it was made so; `None` without a guess.
    fn ready_beside(name: &str, locked: Option<usize>, write: bool) -> Option<usize> {
        let scratch = tree(name);
        let engine = &scratch.engine;
        let (dirs, _) = list(engine, engine.root());
        let (below, _) = list(engine, &dirs[0]);
        let begun = engine.begin_listing(&below[0]);
        assert!(begun.guessed);
        engine.read_dir(&below[0], FIRST - 1, 99).expect("listed");
        let locked = locked.map(|which| [engine.root(), &below[0], &dirs[1]][which]);
        std::thread::scope(|scope| {
            // (Unlocked before the other one is waited for, also if it does not come.)
            let state = locked.map(|dir| &dir.dir().expect("a directory").state);
            let writing = state.filter(|_| write).map(|state| state.write());
            let reading = state.filter(|_| !write).map(|state| state.read());
            let looks = scope.spawn(|| engine.look_ahead(&below[0], &begun));
            in_time(|| looks.is_finished().then_some(()));
            drop((writing, reading));
        });
        let begun = engine.begin_listing(&dirs[1]);
        begun.guessed.then(|| begun.ready.map_or(0, |ready| ready.found.len()))
    }

    #[test]
    fn nobody_waits_for_a_lock_to_read_ahead() {
        assert_eq!(ready_beside("ahead-free", None, true), Some(2));
        assert_eq!(ready_beside("ahead-above", Some(0), true), None);
        assert_eq!(ready_beside("ahead-listed", Some(1), true), None);
        assert_eq!(ready_beside("ahead-locked", Some(2), true), Some(0));
        // Nor to list it for the first time.
        assert_eq!(ready_beside("ahead-read", Some(2), false), Some(0));
    }

    #[test]
    fn nothing_is_read_ahead_where_the_layer_itself_may_never_answer() {
        for (fstype, ready) in [("ext4", 1), ("fuse.sshfs", 0), ("nfs4", 0)] {
            let scratch = tree(&format!("ahead-{fstype}"));
            let dev =
                stat_at(rustix::fs::CWD, scratch.dir.as_os_str().as_encoded_bytes()).expect("there").key.dev;
            let (major, minor) = (dev >> 32, dev & u64::from(u32::MAX));
            let table = format!("25 22 {major}:{minor} / /far rw - {fstype} host:/ rw");
            let mut engine = Engine::open_among(&MountTable::parse(table.as_bytes()), &scratch.spec())
                .expect("an overlay");
            engine.ahead = Some(Ahead::default());
            let (dirs, _) = list(&engine, engine.root());
            let (below, _) = list(&engine, &dirs[0]);
            assert_eq!(list(&engine, &below[0]).1, ready, "{fstype}");
        }
    }
}
