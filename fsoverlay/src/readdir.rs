//! Listing a merged directory.
//!
//! The order is [`crate::listing`]'s; no state is kept per open directory. The kernel caches what it has
//! read (`FOPEN_CACHE_DIR`). A listing is kept with its directory while memory for [`MAX_KEPT`] entries
//! lasts, follows creations and removals, and answers for names that do not exist.
//!
//! The number in an entry is the `st_ino` that a lookup would give. Where the entry alone
//! does not tell (in a directory marked impure, and for directories that are merged),
//! the name is looked up.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use rustix::fs::{IFlags, RawDir};

use crate::attr::{Key, Kind};
use crate::engine::Engine;
use crate::errno::{Errno, Res, may_take_long};
use crate::hooks::AccessKind;
use crate::inode::{DirState, Node, ROOT};
use crate::layer::{RealDir, UPPER, open_for_reading, stat_at};
use crate::listing::{Builder, Entry, Listing};
use crate::numbers::InodeNumbers;
use crate::object::gone_below;
use crate::oci::{Said, said};
use crate::sync::Mutex;

/// Entries kept in all listings together.
const MAX_KEPT: usize = 400_000;

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

/// Whether all names of a directory are in its listing: in others (NFS and ZFS have snapshots, autofs
/// has mounts to come, procfs has threads) a name that is not listed may still be found. So it may, in another
/// case, where names are looked for without regard to it; some file systems have that for single directories.
fn lists_all(dir: &OwnedFd) -> bool {
    const EXT: i64 = 0xef53;
    const XFS: i64 = 0x5846_5342;
    const BTRFS: i64 = 0x9123_683e;
    const F2FS: i64 = 0xf2f5_2010;
    const TMPFS: i64 = 0x0102_1994;
    const OVERLAYFS: i64 = 0x794c_7630;
    const SQUASHFS: i64 = 0x7371_7368;
    const EROFS: i64 = 0xe0f5_e1e2;
    match rustix::fs::fstatfs(dir).map(|stat| stat.f_type) {
        Ok(XFS | BTRFS | SQUASHFS | EROFS) => true,
        Ok(EXT | F2FS | TMPFS | OVERLAYFS) => !folds_case(rustix::fs::ioctl_getflags(dir)),
        _ => false,
    }
}

/// `FS_CASEFOLD_FL`.
const CASEFOLD: IFlags = IFlags::from_bits_retain(0x4000_0000);

/// Whether the flags of a directory say that names are the same in another case.
pub(crate) fn says_folds_case(dir: &OwnedFd) -> bool {
    rustix::fs::ioctl_getflags(dir).is_ok_and(|flags| flags.intersects(CASEFOLD))
}

/// Whether they say so or do not rule it out.
fn folds_case(flags: Res<IFlags>) -> bool {
    match flags {
        Ok(flags) => flags.intersects(CASEFOLD),
        // A file system without flags.
        Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => false,
        Err(_) => true,
    }
}

/// Takes their listings from directories. The caller holds no lock of a directory.
pub(crate) fn drop_listings(dirs: Vec<Arc<Node>>) {
    for dir in dirs {
        let Some(part) = &dir.dir else { continue };
        // Whose lock somebody holds is listed just now, or far and waits.
        let listing = part.state.try_write().and_then(|mut state| state.listing.take());
        drop(listing);
    }
}

impl Engine {
    /// Opens a directory of one layer for reading its entries; `None` if it appears empty, because the
    /// caller may not read it or somebody took it away.
    fn open_entries(&self, dir: &Arc<RealDir>, builder: &mut Builder<'_>) -> Res<Option<OwnedFd>> {
        let opened = self.fd(dir).and_then(|fd| {
            if dir.layer != UPPER {
                // Names without the right to look them up would be entries that do not
                // exist: empty as well.
                rustix::fs::accessat(&fd, c".", rustix::fs::Access::EXEC_OK, rustix::fs::AtFlags::EACCESS)?;
            }
            open_for_reading(fd.as_fd())
        });
        match opened {
            Ok(fd) => {
                builder.partial |= dir.layer != UPPER && !lists_all(&fd);
                Ok(Some(fd))
            }
            Err(Errno::ACCESS | Errno::PERM) if dir.layer != UPPER => {
                // What may be searched but not read answers when asked by name.
                builder.partial = true;
                Ok(None)
            }
            Err(err) if dir.layer != UPPER && gone_below(err) => Ok(None),
            Err(err) => Err(err),
        }
    }

    /// Whether an entry is a whiteout, and its type where the directory did not tell.
    fn check_entry(&self, dir: &Arc<RealDir>, name: &[u8], kind: Option<Kind>) -> Res<Option<Kind>> {
        let suspicious = match kind {
            None | Some(Kind::Char) => true,
            Some(Kind::File) => dir.xattr_whiteouts.load(Ordering::Relaxed),
            Some(_) => false,
        };
        if !suspicious {
            return Ok(kind);
        }
        if self.is_whiteout(dir, name)? {
            return Ok(None);
        }
        match kind {
            Some(kind) => Ok(Some(kind)),
            None => Ok(stat_at(self.fd(dir)?.as_fd(), name)?.kind()),
        }
    }

    /// Merges the layers' entries. The caller holds the directory's lock.
    fn build_listing(&self, node: &Node, state: &DirState) -> Res<Listing> {
        may_take_long()?;
        if state.removed {
            return Ok(Listing::default());
        }
        let mut builder = Builder::new(&self.hasher);
        if let Some(dir) = node.dir()?.upper.get() {
            self.add_real(&mut builder, node, dir)?;
        }
        for (name, index) in state.generated.into_iter().flat_map(|dir| self.generated.children(dir)) {
            let (kind, number) = (self.generated.node(index).kind(), self.generated.node(index).number);
            // A directory may merge with one of a layer, whose number it has then.
            builder.add(name, Some(kind), number, kind != Kind::Dir)?;
        }
        for dir in &state.lowers {
            self.add_real(&mut builder, node, dir)?;
        }
        let (mut listing, look_up) = builder.finish();
        for name in look_up {
            match self.resolve(node, state, &name)? {
                Some(found) => listing.insert(&self.hasher, &name, found.ino, found.meta.kind),
                None => listing.remove(&self.hasher, &name),
            }
        }
        Ok(listing)
    }

    fn add_real(&self, builder: &mut Builder<'_>, node: &Node, dir: &Arc<RealDir>) -> Res<()> {
        // Where numbers are those of places, those of files with several names are not.
        let unclear =
            dir.impure.load(Ordering::Relaxed) || dir.layer != UPPER && InodeNumbers::is_clashed(node.ino);
        let mut failed = None;
        let named = self.has_named_whiteouts(dir);
        let mut gone: Vec<Box<[u8]>> = Vec::new();
        if let Some(fd) = self.open_entries(dir, builder)? {
            self.trace(dir, None, AccessKind::Listed);
            for_each_entry(&fd, |name, kind, ino| {
                if dir.hides(name) {
                    return true;
                }
                match if named { said(name, kind) } else { Said::Nothing } {
                    Said::Nothing => {}
                    Said::Gone(name) => {
                        gone.push(name.into());
                        return true;
                    }
                    Said::Other => return true,
                }
                let far = dir.far_at(name).map(|far| far.root().0.kind());
                let kind = match far.map_or_else(|| self.check_entry(dir, name, kind), Ok) {
                    Ok(kind) => kind,
                    Err(Errno::NOENT) => return true,
                    Err(err) => {
                        failed = Some(err);
                        return false;
                    }
                };
                // What says nothing about those below.
                if kind.is_none() && !self.whiteouts(dir) {
                    return true;
                }
                let key = Key { dev: dir.key.dev, ino };
                let ino = self.alias(key).unwrap_or_else(|| {
                    let number = self.numbers.number(key);
                    if dir.layer == UPPER { number } else { self.number_at(node, name, number, false) }
                });
                failed = builder.add(name, kind, ino, !unclear).err();
                failed.is_none()
            })?;
        }
        if let Some(err) = failed {
            return Err(err);
        }
        // What stands beside its own whiteout is there.
        for name in gone {
            builder.add(&name, None, 0, true)?;
        }
        for name in dir.hidden.iter().flat_map(|h| h.names()) {
            builder.add(name, Some(Kind::Dir), self.synthetic_number(node, name), true)?;
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
            let surplus = self.make_listing(node, &mut state)?;
            batch.extend(state.listing.iter().flat_map(|listing| listing.after(offset, count)));
            surplus
        };
        drop_listings(surplus);
        Ok(batch)
    }

    /// Makes the listing of a directory, unless there is one, and keeps it with it; gives directories whose listings
    /// must go.
    pub(crate) fn make_listing(&self, node: &Arc<Node>, state: &mut DirState) -> Res<Vec<Arc<Node>>> {
        if state.listing.is_some() {
            return Ok(Vec::new());
        }
        let listing = Box::new(self.build_listing(node, state)?);
        let entries = listing.len();
        state.listing = Some(listing);
        Ok(self.listings.note(node, entries + 1))
    }

    /// All names in a directory.
    pub(crate) fn entry_names(&self, node: &Arc<Node>) -> Res<Vec<Box<[u8]>>> {
        let state = node.dir()?.state.read();
        let listing = self.build_listing(node, &state)?;
        let mut names = Vec::with_capacity(listing.len());
        listing.visit(0, |_, name, _, _| {
            names.push(name.into());
            true
        });
        Ok(names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::Scratch;

    #[test]
    fn only_a_directory_that_may_fold_case_is_told_by_its_flags() {
        assert!(folds_case(Ok(IFlags::from_bits_retain(0x4000_0000 | 0x0008_0000))));
        assert!(!folds_case(Ok(IFlags::from_bits_retain(0x0008_0000))));
        assert!(!folds_case(Err(Errno::NOTTY)));
        assert!(folds_case(Err(Errno::IO)));
    }

    #[test]
    fn a_listing_answers_unless_case_is_folded() {
        let scratch = Scratch::new("case");
        let (engine, lower) = (&scratch.engine, scratch.dir.join("lower/dir"));
        std::fs::create_dir(&lower).expect("made");
        let plain = std::fs::File::open(&lower).expect("opened");
        // Where flags can be read, this one has none that matters; few file systems let it have that one.
        let flags = rustix::fs::ioctl_getflags(&plain);
        assert!(!folds_case(flags));
        let folded = IFlags::from_bits_retain(0x4000_0000);
        let folds = flags.and_then(|old| rustix::fs::ioctl_setflags(&plain, old | folded)).is_ok();
        let spec = crate::OverlaySpec {
            upper: Some(crate::UpperSpec {
                dir: lower.clone(),
                work: scratch.dir.join("work"),
                ..crate::UpperSpec::default()
            }),
            ..crate::OverlaySpec::default()
        };
        let refused = matches!(Engine::open(&spec), Err(crate::Error::FoldsCase { .. }));
        assert_eq!(refused, folds);
        std::fs::write(lower.join("Name"), "").expect("written");
        assert_eq!(folds, lower.join("name").exists());
        let dir = engine.lookup(engine.root(), b"dir").expect("found");
        engine.read_dir(&dir, 0, 9).expect("listed");
        let partial = dir.dir().expect("a directory").state.read().listing.as_ref().map(|list| list.partial);
        // On file systems that are not known nothing is answered anyway.
        let known = lists_all(&plain.into());
        assert_eq!(partial, Some(!known));
        assert!(!(folds && known));
        assert_eq!(engine.lookup(&dir, b"name").is_ok(), lower.join("name").exists());
    }
}
