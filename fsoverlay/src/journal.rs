//! Which directories of the upper changed since it was opened, so that what a run changed can be listed
//! without a walk of all that the upper holds.
//!
//! Noted are directories in which a name was made, removed or replaced, or an object's content or
//! attributes changed. A directory that was moved is noted with all that is in it. They are noted by what
//! they are, not by name, so a directory that moves later is found where it went.
//!
//! The journal is in memory, and holds a number of directories that is given; beyond, or where a file
//! was changed that has names nobody asked for, it knows nothing any more, and the walk
//! ([`crate::changes_of`]) is the way. So it is after a crash. What it knows is complete, then: it never
//! leaves out a change.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::attr::Kind;
use crate::engine::Engine;
use crate::errno::Res;
use crate::inode::{Node, Place};
use crate::sync::Mutex;

/// A directory in which something changed; see [`crate::Server::journal`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ChangedDir {
    /// Path in the merged tree, absolute.
    pub path: PathBuf,
    /// All below counts as changed, at any depth; otherwise the entries of this directory do.
    pub whole: bool,
}

/// A directory, and [`ChangedDir::whole`].
type Noted = (Arc<Node>, bool);

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    capacity: usize,
    /// By number; `None`: more than could be noted. A directory stays known
    /// while it is here, and so do those above it: else it might be met again as another one, and a
    /// rename of that would not be seen here.
    dirs: Mutex<Option<HashMap<u64, Noted>>>,
}

impl Journal {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { capacity, dirs: Mutex::new((capacity > 0).then(HashMap::new)) }
    }

    fn note(&self, dir: &Arc<Node>, whole: bool) {
        if self.capacity == 0 {
            return;
        }
        let mut dirs = self.dirs.lock();
        let Some(known) = &mut *dirs else { return };
        known.entry(dir.ino).or_insert_with(|| (dir.clone(), false)).1 |= whole;
        if known.len() > self.capacity {
            let gone = dirs.take();
            drop(dirs);
            drop(gone);
        }
    }

    /// From here on it knows nothing.
    fn give_up(&self) {
        let gone = self.dirs.lock().take();
        drop(gone);
    }
}

/// Where an object is, under its first name; `None` if it is gone.
pub(crate) fn path_of(node: &Arc<Node>) -> Option<PathBuf> {
    let mut names = Vec::new();
    let mut at = node.clone();
    while !Engine::is_root(&at) {
        let link = at.first_link()?;
        names.push(link.name);
        at = link.parent;
    }
    let names = names.iter().rev().map(|name| OsStr::from_bytes(name));
    Some(std::iter::once(OsStr::new("/")).chain(names).collect())
}

impl Engine {
    /// An entry of a directory changes.
    pub(crate) fn note_entry(&self, parent: &Arc<Node>) {
        self.journal.note(parent, false);
    }

    /// A directory gets another place.
    pub(crate) fn note_moved(&self, node: &Arc<Node>) {
        if node.kind == Kind::Dir {
            self.journal.note(node, true);
        }
    }

    /// Content or attributes of an object change, which is in the upper by now.
    pub(crate) fn note_object(&self, node: &Arc<Node>) -> Res<()> {
        if self.journal.capacity == 0 {
            return Ok(());
        }
        let (links, in_upper, entry) = {
            let inner = node.inner.lock();
            (inner.links.clone(), matches!(inner.place, Place::Upper), inner.entry)
        };
        if links.is_empty() && Self::is_root(node) {
            self.note_entry(node);
        }
        for link in &links {
            self.note_entry(&link.parent);
        }
        // Names that nobody asked for are in directories that nobody knows.
        let known = links.len() + usize::from(entry);
        if node.kind != Kind::Dir && in_upper && self.stat(node)?.nlink as usize > known {
            self.journal.give_up();
        }
        Ok(())
    }

    /// See [`crate::Server::journal`].
    pub(crate) fn journal(&self) -> Option<Vec<ChangedDir>> {
        let dirs: Vec<_> = self.journal.dirs.lock().as_ref()?.values().cloned().collect();
        let place =
            |(dir, whole): &(Arc<Node>, bool)| Some(ChangedDir { path: path_of(dir)?, whole: *whole });
        let mut dirs: Vec<_> = dirs.iter().filter_map(place).collect();
        dirs.sort();
        Some(dirs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::{Scratch, dice};
    use crate::hooks::Hooks;
    use crate::{changes_in, changes_of};

    fn noting(name: &str, capacity: usize) -> Scratch {
        let mut scratch = Scratch::new(name);
        scratch.engine.set_hooks(Hooks { journal: capacity, ..Hooks::default() });
        scratch.fill_lower();
        scratch
    }

    #[test]
    fn a_journal_leaves_out_no_change() {
        let mut complete = 0;
        for seed in 0..100 {
            let scratch = noting(&format!("journal{seed}"), 1000);
            let mut random = dice(seed);
            for _ in 0..10 + seed * 2 {
                scratch.change_something(&mut random);
            }
            let Some(dirs) = scratch.engine.journal() else { continue };
            complete += 1;
            let spec = scratch.spec();
            let all = changes_of(&spec).expect("read");
            assert_eq!(changes_in(&spec, &dirs).expect("read"), all, "seed {seed}: {dirs:?}");
        }
        assert!(complete > 20, "{complete}");
    }

    #[test]
    fn a_journal_names_what_changed_since_it_was_opened() {
        let mut scratch = noting("since", 2);
        assert_eq!(scratch.engine.unlink(scratch.engine.root(), b"c"), Ok(()));
        // Another run with the same upper.
        scratch.engine = Engine::open(&scratch.spec()).expect("opened");
        scratch.engine.set_hooks(Hooks { journal: 2, ..Hooks::default() });
        let (engine, root) = (&scratch.engine, scratch.engine.root());
        let dir = |path: &str, whole| ChangedDir { path: path.into(), whole };
        assert_eq!(engine.journal(), Some(vec![]));
        let b = engine.lookup(root, b"b").expect("found");
        assert_eq!(engine.unlink(&b, b"c"), Ok(()));
        assert_eq!(engine.journal(), Some(vec![dir("/b", false)]));
        let found = changes_in(&scratch.spec(), &engine.journal().expect("known")).expect("read");
        assert_eq!(found.iter().map(|change| change.path.to_str()).collect::<Vec<_>>(), [Some("/b/c")]);
        // It is known by another name from now on, with all in it; and that is one too many.
        assert_eq!(engine.rename(root, b"b", root, b"new", crate::rename::How::Replace), Ok(()));
        assert_eq!(engine.journal(), Some(vec![dir("/", false), dir("/new", true)]));
        let a = engine.lookup(root, b"a").expect("found");
        assert_eq!(engine.unlink(&a, b"c"), Ok(()));
        assert_eq!(engine.journal(), None);
    }
}
