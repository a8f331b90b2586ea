//! Copy-up: bringing an object of a layer into the upper before it changes.
//!
//! Nothing half copied is ever visible. The copy is made without a name in the work
//! directory (`O_TMPFILE`, else under a temporary name), gets its bytes, attributes,
//! record and times there, and only then its name. Until that last step a failure
//! (`ENOSPC`, …) leaves the merged tree as it was and the copy goes away.
//!
//! One copy-up of an object runs at a time ([`Node::copying`]); it holds no directory's
//! lock while bytes are copied, so lookups go on. The lock of the directory is taken for
//! the last step, together with a check that the name still belongs to the object.
//!
//! While much is copied, other requests must be answered: in a hurry ([`crate::errno::hurried`]) an
//! operation ends with `LONG` instead, and is begun anew where it has time.
//!
//! Directories above are copied up first, from the top. The times of a directory that
//! gets a copy are put back: copying up must not show.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, Timespec, Timestamps, XattrFlags};

use crate::attr::{Kind, Stat, Time};
use crate::engine::Engine;
use crate::errno::{Errno, LONG, Res, is_hurried, is_much, may_take_long_unless};
use crate::handle::{Fd, Holder};
use crate::hooks::{blocks, most_of_copy};
use crate::inode::{Link, Node, Place, ROOT};
use crate::layer::{RealDir, stat_at, stat_fd};
use crate::object::Content;
use crate::sys::{self, At};
use crate::upper::Upper;
use crate::xattr::{IMPURE, ORIGIN};

/// How often an object is looked for that loses its names meanwhile.
const MAX_LOOKS: u32 = 100;

/// A complete object that has no name in the upper yet.
#[derive(Debug)]
pub(crate) struct Temp<'a> {
    upper: &'a Upper,
    /// Of a file.
    pub(crate) fd: Option<Fd>,
    /// Its name in the work directory; without `O_TMPFILE` there must be one.
    name: Option<Box<[u8]>>,
}

impl<'a> Temp<'a> {
    pub(crate) fn file(upper: &'a Upper) -> Res<Self> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o600);
        match rustix::fs::openat(&upper.work, c".", flags | OFlags::TMPFILE, mode) {
            Ok(fd) => return Ok(Self { upper, fd: Some(Arc::new(fd)), name: None }),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL) => {}
            Err(err) => return Err(err),
        }
        let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let (fd, name) = upper.make_temp(|name| rustix::fs::openat(&upper.work, name, flags, mode))?;
        Ok(Self { upper, fd: Some(Arc::new(fd)), name: Some(name) })
    }

    /// Something that has a name from the start: a symbolic link, a real fifo.
    fn named(upper: &'a Upper, make: impl FnMut(&[u8]) -> Res<()>) -> Res<Self> {
        let ((), name) = upper.make_temp(make)?;
        Ok(Self { upper, fd: None, name: Some(name) })
    }

    pub(crate) fn stat(&self) -> Res<Stat> {
        match (&self.fd, &self.name) {
            (Some(fd), _) => stat_fd(fd.as_fd()),
            (None, Some(name)) => stat_at(self.upper.work.as_fd(), name),
            (None, None) => Err(Errno::STALE),
        }
    }

    /// Gives the file a name; `EEXIST` if something has it.
    pub(crate) fn link(&self, dir: BorrowedFd<'_>, name: &[u8]) -> Res<()> {
        match &self.name {
            Some(temp) => rustix::fs::linkat(&self.upper.work, &**temp, dir, name, AtFlags::empty()),
            None => link_fd(self.fd.as_ref().ok_or(Errno::STALE)?.as_fd(), dir, name),
        }
    }
}

impl Drop for Temp<'_> {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            self.upper.remove_temp(name);
        }
    }
}

/// Gives an open object a name, whether it has one or not; `O_PATH` is enough. Without CAP_DAC_READ_SEARCH the
/// direct way is open since Linux 6.10; before, the descriptor's name in procfs is the way.
pub(crate) fn link_fd(fd: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: &[u8]) -> Res<()> {
    match rustix::fs::linkat(fd, c"", dir, name, AtFlags::EMPTY_PATH) {
        Err(Errno::NOENT | Errno::PERM) => {
            let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
            rustix::fs::linkat(rustix::fs::CWD, path, dir, name, AtFlags::SYMLINK_FOLLOW)
        }
        other => other,
    }
}

/// How many directories that are not in the upper, and names that are given to a file, do not take long yet.
const FEW: usize = 8;

/// Whether a copy-up of an object brings few directories with it, and gives it few names.
fn is_short_copy(node: &Arc<Node>) -> bool {
    let links = node.inner.lock().links.clone();
    links.len() <= FEW && links.iter().map(|link| missing_dirs(&link.parent)).sum::<usize>() <= FEW
}

/// Whether there are few directories to be copied up with this one.
pub(crate) fn is_short_way_up(dir: &Arc<Node>) -> bool {
    missing_dirs(dir) <= FEW
}

/// How many directories a copy-up of this one makes; of very many, some.
fn missing_dirs(dir: &Arc<Node>) -> usize {
    let above = std::iter::successors(Some(dir.clone()), |dir| dir.first_link().map(|link| link.parent));
    above.take_while(|dir| !dir.is_upper()).take(FEW + 1).count()
}

fn timespec(time: Time) -> Timespec {
    Timespec { tv_sec: time.sec, tv_nsec: i64::from(time.nsec) }
}

pub(crate) fn timestamps(stat: &Stat) -> Timestamps {
    Timestamps { last_access: timespec(stat.atime), last_modification: timespec(stat.mtime) }
}

impl Engine {
    /// Brings an object into the upper, if it is not there.
    pub(crate) fn copy_up(&self, node: &Arc<Node>) -> Res<()> {
        self.copy_up_limited(node, u64::MAX)
    }

    /// The same; of a file only the first `limit` bytes, because it is about to be
    /// truncated to them.
    pub(crate) fn copy_up_limited(&self, node: &Arc<Node>, limit: u64) -> Res<()> {
        self.upper()?;
        if node.is_upper() {
            return Ok(());
        }
        if node.kind == Kind::Dir {
            may_take_long_unless(|| is_short_way_up(node))?;
            return self.copy_up_dir(node);
        }
        may_take_long_unless(|| is_short_copy(node))?;
        let upper = self.touch()?;
        let _one_at_a_time = match node.copying.try_lock() {
            Some(guard) => guard,
            None if is_hurried() => return Err(LONG),
            None => node.copying.lock(),
        };
        if node.is_upper() {
            return Ok(());
        }
        let stat = self.stat(node)?;
        if is_hurried() && node.kind == Kind::File && is_much(stat.size.min(limit)) {
            return Err(LONG);
        }
        let meta = node.inner.lock().meta;
        let most = if node.kind == Kind::File { most_of_copy(&stat, limit) } else { 0 };
        let room = self.reserve(most, 1)?;
        if node.kind == Kind::Symlink || node.kind.is_special() && !self.owners.has_placeholders() {
            let temp = match node.kind {
                Kind::Symlink => {
                    let target = self.read_link(node)?;
                    Temp::named(upper, |name| rustix::fs::symlinkat(&*target, &upper.work, name))?
                }
                _ => Temp::named(upper, |name| self.make_special(&upper.work, name, &meta))?,
            };
            let name = temp.name.as_deref().ok_or(Errno::STALE)?;
            rustix::fs::utimensat(&upper.work, name, &timestamps(&stat), AtFlags::SYMLINK_NOFOLLOW)?;
            let has_record = self.settle_new(At::Name(upper.work.as_fd(), name), &meta, &temp.stat()?)?;
            self.place_copy(node, &stat, has_record, &temp)?;
            room.used(0, 1);
            self.counts.copied_up(0);
            return Ok(());
        }
        let temp = Temp::file(upper)?;
        let copy = temp.fd.clone().ok_or(Errno::STALE)?;
        self.give_copy(At::Fd(copy.as_fd()), &meta)?;
        if node.kind == Kind::File {
            match self.open_file(node, false) {
                // The caller may not read it, but nothing of it is wanted: locks of package managers
                // are empty, and a file about to be truncated might as well be.
                Err(Errno::ACCESS) if limit.min(stat.size) == 0 => {}
                Err(err) => return Err(err),
                Ok(Content::File(source)) => {
                    copy_data(source.as_fd(), copy.as_fd(), limit)?;
                    self.copy_xattrs(At::Fd(source.as_fd()), At::Fd(copy.as_fd()))?;
                }
                Ok(Content::Memory(bytes)) => {
                    let wanted = usize::try_from(limit).unwrap_or(usize::MAX).min(bytes.len());
                    write_all(copy.as_fd(), &bytes[..wanted], 0)?;
                }
            }
        }
        let has_record = self.settle_copy(At::Fd(copy.as_fd()), &meta)?;
        rustix::fs::futimens(&copy, &timestamps(&stat))?;
        self.place_copy(node, &stat, has_record, &temp)?;
        let copied = blocks(&temp.stat()?);
        room.used(copied, 1);
        self.counts.copied_up(copied);
        Ok(())
    }

    /// The last steps of copying up: the object's names.
    fn place_copy(&self, node: &Arc<Node>, from: &Stat, has_record: bool, temp: &Temp<'_>) -> Res<()> {
        self.copy_up_parents(node)?;
        let links = self.place_known_links(node, from, has_record, temp)?;
        self.place_late_links(node, &links);
        Ok(())
    }

    /// Brings the directories of all its names into the upper, or of one at least. Nobody may have to wait for that
    /// who only wants to know how many names there are.
    fn copy_up_parents(&self, node: &Arc<Node>) -> Res<()> {
        let links = node.inner.lock().links.clone();
        let mut one = false;
        for link in &links {
            match self.copy_up(&link.parent) {
                Ok(()) => one = true,
                // Removed since, and then the directory that it was in.
                Err(Errno::NOENT) if !node.has_link(&link.parent, &link.name) => {}
                Err(err) if one => tracing::debug!(?err, "a hard link was left behind by a copy-up"),
                Err(err) => return Err(err),
            }
        }
        Ok(())
    }

    /// Gives the copy those names whose directories are in the upper, and makes the node the copy.
    fn place_known_links(
        &self,
        node: &Arc<Node>,
        from: &Stat,
        has_record: bool,
        temp: &Temp<'_>,
    ) -> Res<Vec<Link>> {
        let _changing = node.names.begin();
        let (links, left) = {
            let inner = node.inner.lock();
            let links: Vec<_> = inner.links.iter().filter(|link| link.parent.is_upper()).cloned().collect();
            (links, u32::try_from(i64::from(from.nlink) + inner.extra_links).unwrap_or(0))
        };
        // Names that nobody knows yet will have to lead here.
        let entry = if from.nlink > 1 && (left > 1 || left > 0 && links.is_empty()) {
            Some(self.add_entry(node, from, temp, left)?)
        } else {
            let number = self.numbers.describe(node.ino);
            match &temp.fd {
                Some(fd) => self.write_origin(At::Fd(fd.as_fd()), node)?,
                None => self.upper()?.sidecar.set_number(&temp.stat()?, &number)?,
            }
            None
        };
        let mut placed = false;
        for link in &links {
            let last = || -> Res<()> {
                let state = link.parent.dir()?.state.write();
                if state.removed || !node.has_link(&link.parent, &link.name) {
                    return Ok(());
                }
                let dir = link.parent.upper_dir()?;
                let fd = self.fd(dir)?;
                self.mark_impure(dir)?;
                let before = stat_fd(fd.as_fd())?;
                // Not by the name that it has by now, which may be moved meanwhile.
                temp.link(fd.as_fd(), &link.name).map_err(|err| match err {
                    // Somebody replaced the layer's file, and what replaced it was copied up before.
                    Errno::EXIST if !placed => Errno::STALE,
                    err => err,
                })?;
                self.restore_times(fd.as_fd(), &before);
                if placed {
                    node.inner.lock().extra_links -= 1;
                } else {
                    placed = true;
                    self.become_upper(node, Some(link), from, has_record, temp, entry.is_some())?;
                }
                drop(state);
                Ok(())
            }();
            match last {
                Ok(()) => {}
                // Removed since, and then the directory that it was in.
                Err(Errno::NOENT) if !node.has_link(&link.parent, &link.name) => {}
                // The object is in the upper under one name at least; the others are
                // linked when they are looked up next.
                Err(err) if placed => {
                    tracing::debug!(?err, "a hard link was left behind by a copy-up");
                }
                Err(err) => return Err(err),
            }
        }
        if !placed {
            // Unlinked: open descriptors know it, and names of the layer that nobody asked for yet.
            self.become_upper(node, None, from, has_record, temp, entry.is_some())?;
        }
        if let Some(entry) = entry {
            entry.keep();
        }
        self.note_links(node);
        Ok(links)
    }

    /// Names that were looked up while the copy was made: whoever did so met the layer's
    /// file, and nobody will look them up again.
    fn place_late_links(&self, node: &Arc<Node>, placed: &[Link]) {
        let links = node.inner.lock().links.clone();
        for link in links {
            if placed.iter().any(|l| l.is(&link.parent, &link.name)) {
                continue;
            }
            if let Err(err) = self.materialise(node, &link.parent, &link.name) {
                tracing::debug!(?err, "a hard link was left behind by a copy-up");
            }
        }
    }

    /// From here on the node is the copy, which has this name in the upper (the lock of its directory is
    /// held), or none.
    fn become_upper(
        &self,
        node: &Arc<Node>,
        first: Option<&Link>,
        from: &Stat,
        has_record: bool,
        temp: &Temp<'_>,
        entry: bool,
    ) -> Res<()> {
        let key = temp.stat()?.key;
        let place = match first {
            Some(_) => Place::Upper,
            None => self.place_of_unlinked(node, from, temp, entry)?,
        };
        self.forget_covered(node);
        let change = || {
            let mut inner = node.inner.lock();
            inner.origin = Some(node.ino);
            inner.key = key;
            inner.place = place;
            inner.has_record = has_record;
            inner.entry = entry;
            // Of the names in the layer this one is in the upper, where the entry counts, too.
            inner.extra_links += i64::from(from.nlink) - i64::from(first.is_some()) - i64::from(entry);
            if let Some(first) = first
                && let Some(at) = inner.links.iter().position(|l| l.is(&first.parent, &first.name))
            {
                inner.links.swap(0, at);
            }
            // The descriptor of the layer's file must not be found any more.
            let old = node.file.take();
            let copy = temp.fd.clone().filter(|_| first.is_some() && node.kind == Kind::File);
            (old, copy.is_some_and(|copy| node.file.put(copy, true)))
        };
        // Whoever finds a further name of the copy must find the node by the entry, and the copy in the node.
        let (old, queue) = match entry {
            true => self.upper()?.links.insert(node.ino, key.ino, from, change),
            false => change(),
        };
        drop(old);
        if queue {
            self.tree.ring.push(Holder::File(Arc::downgrade(node)));
        }
        Ok(())
    }

    fn place_of_unlinked(&self, node: &Node, from: &Stat, temp: &Temp<'_>, entry: bool) -> Res<Place> {
        let upper = self.upper()?;
        let left = node.inner.lock().extra_links + i64::from(from.nlink);
        if entry && left > 0 {
            return Ok(Place::Parked(Arc::new(self.new_entry_place(node, from)?)));
        }
        let Some(fd) = &temp.fd else { return Ok(Place::Gone(Arc::new(Stat { nlink: 0, ..*from }))) };
        if let Ok(pinned) = self.pins.pin(fd.clone()) {
            pinned.is_last();
            return Ok(Place::Unlinked(Arc::new(pinned)));
        }
        let ((), name) = upper.make_temp(|name| temp.link(upper.work.as_fd(), name))?;
        Ok(Place::Parked(Arc::new(self.parked(upper, name))))
    }

    /// Notes the number that a copy goes on with.
    fn write_origin(&self, at: At<'_>, node: &Node) -> Res<()> {
        sys::set_xattr(at, ORIGIN, self.numbers.describe(node.ino).as_bytes(), XattrFlags::empty())
    }

    /// Brings a directory, and the directories above it, into the upper. Its entries
    /// stay where they are.
    fn copy_up_dir(&self, node: &Arc<Node>) -> Res<()> {
        self.touch()?;
        // From the nearest directory above that is in the upper, downwards; a loop,
        // because trees may be deep.
        let mut missing = vec![node.clone()];
        loop {
            let link = missing[missing.len() - 1].first_link().ok_or(Errno::NOENT)?;
            if link.parent.is_upper() {
                break;
            }
            missing.push(link.parent);
        }
        while let Some(dir) = missing.pop() {
            self.copy_up_one_dir(&dir)?;
        }
        Ok(())
    }

    fn copy_up_one_dir(&self, node: &Arc<Node>) -> Res<()> {
        let upper = self.upper()?;
        let _one_at_a_time = node.copying.lock();
        if node.is_upper() {
            return Ok(());
        }
        let stat = self.stat(node)?;
        let (meta, link) = {
            let inner = node.inner.lock();
            (inner.meta, inner.links.first().cloned().ok_or(Errno::NOENT)?)
        };
        let (source, _) = self.target(node)?;
        let room = self.reserve(0, 1)?;
        let ((), temp) = upper.make_temp(|name| {
            rustix::fs::mkdirat(&upper.work, name, self.owners.first_mode(&meta) | Mode::RWXU)
        })?;
        let done = || -> Res<()> {
            let fd = open_temp_dir(upper, &temp)?;
            let at = At::Fd(fd.as_fd());
            let made = stat_fd(fd.as_fd())?;
            if let Some(from) = source.at() {
                self.copy_xattrs(from, at)?;
            }
            self.give_copy(at, &meta)?;
            let has_record = self.settle_copy(at, &meta)?;
            self.write_origin(at, node)?;
            rustix::fs::futimens(&fd, &timestamps(&stat))?;

            let state = link.parent.dir()?.state.write();
            if state.removed || !node.has_link(&link.parent, &link.name) {
                return Err(Errno::NOENT);
            }
            let parent = link.parent.upper_dir()?;
            let parent_fd = self.fd(parent)?;
            self.mark_impure(parent)?;
            let before = stat_fd(parent_fd.as_fd())?;
            rustix::fs::renameat_with(&upper.work, &*temp, &parent_fd, &*link.name, RenameFlags::NOREPLACE)?;
            self.restore_times(parent_fd.as_fd(), &before);
            {
                let mut inner = node.inner.lock();
                inner.has_record = has_record;
                inner.key = made.key;
                inner.origin = Some(node.ino);
            }
            let _ = node.dir()?.upper.set(RealDir::child(parent, &link.name, made.key));
            drop(state);
            Ok(())
        }();
        if done.is_err() {
            let _ = rustix::fs::unlinkat(&upper.work, &*temp, AtFlags::REMOVEDIR);
            return done;
        }
        room.used(0, 1);
        self.counts.copied_up(0);
        Ok(())
    }

    /// Marks an upper directory as one whose entries have numbers that are not the
    /// disk's (the kernel's mark for the same thing), or types that are not.
    pub(crate) fn mark_impure(&self, dir: &Arc<RealDir>) -> Res<()> {
        if dir.impure.load(Ordering::Relaxed) {
            return Ok(());
        }
        let fd = self.fd(dir)?;
        sys::set_xattr(At::Name(fd.as_fd(), b"."), IMPURE, b"y", XattrFlags::empty())?;
        dir.impure.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Puts back the times of a directory that was changed for our own ends.
    pub(crate) fn restore_times(&self, dir: BorrowedFd<'_>, before: &Stat) {
        if let Err(err) = rustix::fs::utimensat(dir, c".", &timestamps(before), AtFlags::SYMLINK_NOFOLLOW) {
            tracing::debug!(?err, "cannot put a directory's times back");
        }
    }

    /// Gives a copied-up file a further name that it has below.
    pub(crate) fn materialise(&self, node: &Arc<Node>, parent: &Arc<Node>, name: &[u8]) -> Res<()> {
        self.copy_up(parent)?;
        for _ in 0..MAX_LOOKS {
            // Any name that is known now may lead to something else by the time it is used, since the
            // directory that it is in is not locked.
            let Some(object) = self.object(node)? else { return Ok(()) };
            match self.materialise_object(node, object.as_fd(), parent, name) {
                // It has lost all names that it had then; there may be others.
                Err(Errno::NOENT) => {}
                done => return done,
            }
        }
        // The kernel looks the name up again.
        Err(Errno::STALE)
    }

    fn materialise_object(
        &self,
        node: &Arc<Node>,
        object: BorrowedFd<'_>,
        parent: &Arc<Node>,
        name: &[u8],
    ) -> Res<()> {
        let state = parent.dir()?.state.write();
        if state.removed || !node.has_link(parent, name) {
            return Ok(());
        }
        let dir = parent.upper_dir()?;
        let fd = self.fd(dir)?;
        let before = stat_fd(fd.as_fd())?;
        self.mark_impure(dir)?;
        self.note_entry(parent);
        let changing = node.names.begin();
        match link_fd(object, fd.as_fd(), name) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Ok(()),
            Err(err) => return Err(err),
        }
        self.restore_times(fd.as_fd(), &before);
        let parked = {
            let mut inner = node.inner.lock();
            inner.extra_links = (inner.extra_links - 1).max(-i64::from(inner.entry));
            matches!(inner.place, Place::Parked(_)).then(|| {
                if let Some(at) = inner.links.iter().position(|l| l.is(parent, name)) {
                    inner.links.swap(0, at);
                }
                std::mem::replace(&mut inner.place, Place::Upper)
            })
        };
        // The last of these takes the name in the work directory with it.
        drop((parked, changing));
        drop(state);
        self.note_links(node);
        Ok(())
    }

    /// Brings a directory and everything in it into the upper, so that it can be renamed.
    /// Each object is copied where it is, which changes nothing that can be seen; a
    /// failure half-way therefore leaves the tree as it was. Gives the directories, which
    /// [`Engine::rename`] cuts from their layers once the top is opaque.
    pub(crate) fn copy_up_tree(&self, top: &Arc<Node>) -> Res<Vec<Arc<Node>>> {
        if is_hurried() {
            return Err(LONG);
        }
        let mut dirs = vec![top.clone()];
        let mut next = 0;
        while next < dirs.len() {
            let dir = dirs[next].clone();
            next += 1;
            match self.copy_up(&dir) {
                // Removed since it was listed. (The top itself is the rename's to judge.)
                Err(Errno::NOENT) if next > 1 => continue,
                other => other?,
            }
            if !dir.dir()?.state.read().has_lower() {
                continue;
            }
            for name in self.entry_names(&dir)? {
                match self.lookup(&dir, &name) {
                    Ok(child) if child.kind == Kind::Dir => dirs.push(child),
                    Ok(child) => {
                        // A hard link may be there under another name only.
                        let copied =
                            self.copy_up(&child).and_then(|()| self.materialise(&child, &dir, &name));
                        match copied {
                            Err(Errno::NOENT) => {}
                            other => other?,
                        }
                    }
                    Err(Errno::NOENT) => {}
                    Err(err) => return Err(err),
                }
            }
        }
        Ok(dirs)
    }

    /// A root that was never copied up: nothing to do, it is the upper's directory.
    pub(crate) fn is_root(node: &Node) -> bool {
        node.ino == ROOT
    }
}

fn open_temp_dir(upper: &Upper, name: &[u8]) -> Res<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(&upper.work, name, flags, Mode::empty())
}

/// Writes all of `bytes` at an offset.
pub(crate) fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8], mut offset: u64) -> Res<()> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(fd, bytes, offset) {
            Ok(0) => return Err(Errno::IO),
            Ok(n) => {
                bytes = &bytes[n..];
                offset += n as u64;
            }
            Err(Errno::INTR) => {}
            Err(err) => return Err(err),
        }
    }
    Ok(())
}

/// Copies the content of a file, sharing blocks where the file system can and leaving
/// holes holes.
fn copy_data(from: BorrowedFd<'_>, to: BorrowedFd<'_>, limit: u64) -> Res<()> {
    let stat = stat_fd(from)?;
    let length = stat.size.min(limit);
    if length == 0 {
        return Ok(());
    }
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return if length < stat.size { rustix::fs::ftruncate(to, length) } else { Ok(()) };
    }
    rustix::fs::ftruncate(to, length)?;
    let mut at = 0;
    while at < length {
        let data = match rustix::fs::seek(from, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => data,
            // No more data: the rest is a hole.
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(err) => return Err(err),
        };
        if data >= length {
            break;
        }
        let hole = rustix::fs::seek(from, rustix::fs::SeekFrom::Hole(data)).unwrap_or(length).min(length);
        copy_range(from, to, data, hole)?;
        at = hole.max(data + 1);
    }
    Ok(())
}

/// Copies one extent.
fn copy_range(from: BorrowedFd<'_>, to: BorrowedFd<'_>, start: u64, end: u64) -> Res<()> {
    let (mut source, mut target) = (start, start);
    while source < end {
        let wanted = usize::try_from(end - source).unwrap_or(usize::MAX).min(1 << 30);
        match rustix::fs::copy_file_range(from, Some(&mut source), to, Some(&mut target), wanted) {
            // The file became shorter while we looked.
            Ok(0) => return Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS | Errno::PERM) => break,
            Err(err) => return Err(err),
        }
    }
    let mut buf = Vec::new();
    while source < end {
        buf.resize(usize::try_from(end - source).unwrap_or(usize::MAX).min(256 << 10), 0);
        match rustix::io::pread(from, &mut buf, source) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                write_all(to, &buf[..n], source)?;
                source += n as u64;
            }
            Err(Errno::INTR) => {}
            Err(err) => return Err(err),
        }
    }
    Ok(())
}

/// An empty regular file that stands for a fifo, a socket or a device.
pub(crate) fn make_placeholder(dir: BorrowedFd<'_>, name: &[u8]) -> Res<()> {
    rustix::fs::mknodat(dir, name, FileType::RegularFile, Mode::from_raw_mode(0o600), 0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::sync::Barrier;

    use super::*;
    use crate::engine::tests::Scratch;
    use crate::rename::How;

    /// Hard links of one file in each of three layers, and another file among them in the upper: `from/file`
    /// and `from/other`, and the file again as `to/0`, `to/1`, ….
    fn linked(name: &str, count: usize) -> Scratch {
        let scratch = Scratch::with_layers(name, 3);
        let layer = |n: usize| match n % 3 {
            0 => scratch.dir.join("lower"),
            n => scratch.dir.join(format!("lower{n}")),
        };
        for n in 0..3 {
            for dir in ["from", "to"] {
                std::fs::create_dir(layer(n).join(dir)).expect("made");
            }
        }
        let first = layer(1).join("from/file");
        std::fs::write(&first, "file").expect("written");
        for n in 0..count {
            std::fs::hard_link(&first, layer(n).join(format!("to/{n}"))).expect("linked");
        }
        std::fs::create_dir(scratch.dir.join("upper/from")).expect("made");
        std::fs::write(scratch.dir.join("upper/from/other"), "other").expect("written");
        scratch
    }

    /// What a later server with the same directories finds: each name leads to its own file.
    fn assert_apart(scratch: &Scratch, count: usize, moved: bool) {
        let engine = Engine::open(&scratch.spec()).expect("an overlay");
        let look = |dir: &str, name: &str| {
            let dir = engine.lookup(engine.root(), dir.as_bytes()).expect("there");
            engine.lookup(&dir, name.as_bytes()).expect("there")
        };
        let read = |node: &Arc<Node>| {
            let mut bytes = [0; 8];
            let n = engine.read(node, 0, &mut bytes).expect("read");
            String::from_utf8_lossy(&bytes[..n]).into_owned()
        };
        let (file, other) = if moved { ("other", "file") } else { ("file", "other") };
        let (file, other) = (look("from", file), look("from", other));
        assert_eq!((read(&file), read(&other)), ("File".to_owned(), "other".to_owned()));
        let names: Vec<_> = (0..count).map(|n| look("to", &n.to_string()).ino).collect();
        assert!(names.iter().all(|&ino| ino == file.ino), "{:?}", (file.ino, other.ino, names));
        let nlink = |node| engine.attr(node).map(|attr| attr.stat.nlink);
        assert_eq!((nlink(&file), nlink(&other)), (u32::try_from(count + 1).map_err(|_| Errno::IO), Ok(1)));
        let on_disk = std::fs::metadata(scratch.dir.join("upper/from/file")).expect("there").nlink();
        assert_eq!(on_disk, if moved { 1 } else { count as u64 + 1 });
    }

    #[test]
    fn a_further_name_leads_to_its_file_whatever_moves_meanwhile() {
        const COUNT: usize = 2000;
        let scratch = linked("further", COUNT);
        let engine = &scratch.engine;
        let dir = |name: &[u8]| engine.lookup(engine.root(), name).expect("there");
        let (from, to) = (dir(b"from"), dir(b"to"));
        let file = engine.lookup(&from, b"file").expect("there");
        assert_eq!(engine.write(&file, 0, b"F", false), Ok(1));
        let mut moved = false;
        std::thread::scope(|scope| {
            let looking = scope.spawn(|| {
                for n in 0..COUNT {
                    // As if there were too few descriptors to keep it.
                    drop(file.file.take());
                    let node = engine.lookup(&to, n.to_string().as_bytes());
                    assert_eq!(node.map(|node| node.ino), Ok(file.ino));
                }
            });
            while !looking.is_finished() {
                // One after another: the kernel lets nobody rename and link one object at once.
                assert_eq!(engine.rename(&from, b"file", &from, b"other", How::Exchange), Ok(()));
                moved ^= true;
                assert_eq!(engine.link(&file, &from, b"more"), Ok(()));
                assert_eq!(engine.unlink(&from, b"more"), Ok(()));
            }
        });
        assert_apart(&scratch, COUNT, moved);
    }

    #[test]
    fn all_names_are_copied_up_whatever_moves_meanwhile() {
        const COUNT: usize = 30;
        for _ in 0..30 {
            let scratch = linked("all", COUNT);
            let engine = &scratch.engine;
            let dir = |name: &[u8]| engine.lookup(engine.root(), name).expect("there");
            let (from, to) = (dir(b"from"), dir(b"to"));
            let file = engine.lookup(&from, b"file").expect("there");
            for n in 0..COUNT {
                assert!(engine.lookup(&to, n.to_string().as_bytes()).is_ok_and(|node| node.ino == file.ino));
            }
            let begin = Barrier::new(3);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    begin.wait();
                    assert_eq!(engine.write(&file, 0, b"F", false), Ok(1));
                });
                // One that is renamed before its turn comes.
                scope.spawn(|| {
                    begin.wait();
                    for (old, new) in [("29", "temp"), ("28", "29"), ("temp", "28")] {
                        let done = engine.rename(&to, old.as_bytes(), &from, new.as_bytes(), How::Replace);
                        assert_eq!(done, Ok(()), "{old}");
                        let done = engine.rename(&from, new.as_bytes(), &to, new.as_bytes(), How::Replace);
                        assert_eq!(done, Ok(()), "{new}");
                    }
                });
                begin.wait();
                assert_eq!(engine.rename(&from, b"file", &from, b"other", How::Exchange), Ok(()));
            });
            assert_apart(&scratch, COUNT, true);
        }
    }
}
