//! New objects, further names, and removal of names.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, OFlags, RenameFlags, XattrFlags};

use crate::acl::Acl;
use crate::attr::{Attr, Kind, Meta, Stat};
use crate::copyup::{is_short_way_up, link_fd};
use crate::engine::Engine;
use crate::errno::{Errno, Res, is_much, may_take_long_unless, missing_ok};
use crate::handle::{Fd, Holder};
use crate::hooks::{blocks, released};
use crate::inode::{DirState, Inner, Link, NewNode, Node, Parked, Place};
use crate::layer::{RealDir, stat_at, stat_fd};
use crate::object::Content;
use crate::sys::{self, At};
use crate::xattr::{NUMBER, OPAQUE};

/// An object to be made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewObject<'a> {
    pub(crate) kind: Kind,
    pub(crate) perm: u32,
    pub(crate) umask: u32,
    pub(crate) rdev: (u32, u32),
    /// The target of a symbolic link.
    pub(crate) target: &'a [u8],
    pub(crate) owner: (u32, u32),
}

/// What goes with the object besides its record.
#[derive(Debug, Default)]
struct Extras {
    access: Option<Acl>,
    default: Option<Acl>,
    opaque: bool,
}

/// Only what could be one component of a path; the kernel sends nothing else.
pub(crate) fn check_name(name: &[u8]) -> Res<()> {
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0) {
        return Err(Errno::INVAL);
    }
    if name.len() > 255 { Err(Errno::NAMETOOLONG) } else { Ok(()) }
}

/// Whether the disk may have much to do when this is removed: what a large file had is given back block by block.
pub(crate) fn gives_much_back(node: &Node, stat: Option<Stat>) -> bool {
    node.kind == Kind::File && node.is_upper() && stat.is_some_and(|stat| is_much(stat.size))
}

impl Engine {
    /// mknod, mkdir, symlink, and open with `O_CREAT`.
    pub(crate) fn create(&self, parent: &Arc<Node>, name: &[u8], new: &NewObject<'_>) -> Res<Arc<Node>> {
        self.create_stat(parent, name, new).map(|(node, _)| node)
    }

    /// The same with its attributes. The object is there by then: that they cannot be read must not
    /// make it a failure.
    pub(crate) fn create_attr(
        &self,
        parent: &Arc<Node>,
        name: &[u8],
        new: &NewObject<'_>,
    ) -> Res<(Arc<Node>, Attr)> {
        let (node, stat) = self.create_stat(parent, name, new)?;
        let attr = self.attr(&node).unwrap_or_else(|_| self.report(&node, stat));
        Ok((node, attr))
    }

    /// The stat is of the moment when it was made.
    fn create_stat(&self, parent: &Arc<Node>, name: &[u8], new: &NewObject<'_>) -> Res<(Arc<Node>, Stat)> {
        check_name(name)?;
        may_take_long_unless(|| is_short_way_up(parent))?;
        let upper = self.touch()?;
        self.copy_up(parent)?;
        let parent_meta = parent.inner.lock().meta;
        let mut meta = Meta {
            kind: new.kind,
            perm: new.perm & 0o7777,
            uid: new.owner.0,
            gid: new.owner.1,
            rdev: new.rdev,
        };
        let mut extras = Extras::default();
        if new.kind == Kind::Symlink {
            meta.perm = 0o777;
        } else if let Some(default) = self.default_acl(parent)? {
            let (access, perm) = default.inherit(meta.perm);
            meta.perm = perm;
            extras.access = (!access.is_minimal()).then_some(access);
            extras.default = (new.kind == Kind::Dir).then_some(default);
        } else {
            meta.perm &= !new.umask;
        }
        if parent_meta.perm & 0o2000 != 0 {
            meta.gid = parent_meta.gid;
            if new.kind == Kind::Dir {
                meta.perm |= 0o2000;
            }
        }
        if new.kind.is_special() && self.owners.has_placeholders() {
            // Its type on disk is not its type: readdir must look.
            self.mark_impure(parent.upper_dir()?)?;
        }

        let room = self.reserve(0, 1)?;
        self.note_entry(parent);
        let mut state = parent.dir()?.state.write();
        if state.removed {
            return Err(Errno::NOENT);
        }
        let dir = parent.upper_dir()?;
        let fd = self.fd(dir)?;
        let made = self.make_object(fd.as_fd(), name, &meta, new.target, &extras);
        let (stat, file, has_record) = match made {
            Err(Errno::EXIST) => {
                extras.opaque = new.kind == Kind::Dir;
                self.over_whiteout(dir, name, extras.opaque, |temp| {
                    self.make_object(upper.work.as_fd(), temp, &meta, new.target, &extras)
                })?
            }
            other => other?,
        };
        // The record came after the stat.
        let bytes = match (&file, self.quota()) {
            (Some(fd), Some(_)) => blocks(&stat_fd(fd.as_fd())?),
            _ => 0,
        };
        room.used(bytes, 1);
        let node = self.adopt(parent, name, meta, &stat, dir, has_record, &extras);
        if node.inner.lock().origin.is_some() {
            self.note_number(&node, dir, fd.as_fd(), name, &stat);
        }
        if node.kind == Kind::Dir {
            // It may hide what a layer has, which shows when its entries are compared.
            self.note_entry(&node);
        }
        if let Some(listing) = &mut state.listing {
            listing.insert(&self.hasher, name, node.ino, node.kind);
        }
        drop(state);
        if let Some(file) = file
            && node.file.put(Arc::new(file), true)
        {
            self.tree.ring.push(Holder::File(Arc::downgrade(&node)));
        }
        Ok((node, stat))
    }

    /// Puts something at a name that has a whiteout, `EEXIST` if it is not one: made complete under a
    /// temporary name, then moved, so that what the whiteout hides never shows.
    fn over_whiteout<T>(
        &self,
        dir: &Arc<RealDir>,
        name: &[u8],
        is_dir: bool,
        make: impl FnMut(&[u8]) -> Res<T>,
    ) -> Res<T> {
        if !self.is_whiteout(dir, name)? {
            return Err(Errno::EXIST);
        }
        let (upper, fd) = (self.upper()?, self.fd(dir)?);
        let (made, temp) = upper.make_temp(make)?;
        // A directory cannot replace a whiteout, but change places with it.
        let flags = if is_dir { RenameFlags::EXCHANGE } else { RenameFlags::empty() };
        let moved = rustix::fs::renameat_with(&upper.work, &*temp, &fd, name, flags);
        match (&moved, is_dir) {
            (Ok(()), false) => {}
            (Err(_), true) => self.discard_temp_dir(&temp),
            _ => upper.remove_temp(&temp),
        }
        moved.map(|()| made)
    }

    /// The node of an object that has just been made.
    #[expect(clippy::too_many_arguments, reason = "one caller; the parts are all there is to a new node")]
    fn adopt(
        &self,
        parent: &Arc<Node>,
        name: &[u8],
        meta: Meta,
        stat: &Stat,
        dir: &Arc<RealDir>,
        has_record: bool,
        extras: &Extras,
    ) -> Arc<Node> {
        // A number that the disk used again is not the object it was.
        self.table.aliases.remove(stat.key);
        let default_acl = extras.default.as_ref().map(|acl| Arc::from(acl.to_bytes()));
        let number = self.numbers.number(stat.key);
        let node = self.table.intern(
            number,
            || 1,
            |_| false,
            || NewNode {
                kind: meta.kind,
                inner: Inner {
                    meta,
                    key: stat.key,
                    origin: None,
                    place: Place::Upper,
                    links: vec![Link { parent: parent.clone(), name: name.into() }],
                    extra_links: 0,
                    below: 0,
                    entry: false,
                    has_record,
                    has_acl: extras.access.is_some(),
                    no_capability: true,
                },
                upper: (meta.kind == Kind::Dir).then(|| RealDir::child(dir, name, stat.key)),
                state: DirState { default_acl: Some(default_acl), ..DirState::default() },
            },
        );
        if node.ino != number {
            // The kernel has not yet forgotten what had this number before; the new
            // object keeps the one that it was given instead.
            self.table.aliases.insert(stat.key, node.ino);
            node.inner.lock().origin = Some(node.ino);
        }
        node
    }

    /// Writes down the number of a new object that is not the disk's.
    fn note_number(&self, node: &Node, dir: &Arc<RealDir>, fd: BorrowedFd<'_>, name: &[u8], stat: &Stat) {
        let number = self.numbers.describe(node.ino);
        let noted = self.mark_impure(dir).and_then(|()| {
            if crate::sidecar::is_needed(stat) {
                return self.upper()?.sidecar.set_number(stat, &number);
            }
            sys::set_xattr(At::Name(fd, name), NUMBER, number.as_bytes(), XattrFlags::empty())
        });
        if let Err(err) = noted {
            tracing::debug!(?err, "an object will have another number after a remount");
        }
    }

    /// Makes an object with its record at a name of the upper or the work directory;
    /// complete or not at all.
    fn make_object(
        &self,
        dir: BorrowedFd<'_>,
        name: &[u8],
        meta: &Meta,
        target: &[u8],
        extras: &Extras,
    ) -> Res<(Stat, Option<std::os::fd::OwnedFd>, bool)> {
        let mode = self.owners.first_mode(meta);
        let mut file = None;
        match meta.kind {
            Kind::Dir => rustix::fs::mkdirat(dir, name, mode)?,
            Kind::Symlink => rustix::fs::symlinkat(target, dir, name)?,
            Kind::File => {
                let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                file = Some(rustix::fs::openat(dir, name, flags, mode)?);
            }
            _ => self.make_special(dir, name, meta)?,
        }
        let finish = || -> Res<(Stat, bool)> {
            let at = match &file {
                Some(fd) => At::Fd(fd.as_fd()),
                None => At::Name(dir, name),
            };
            let stat = match &file {
                Some(fd) => stat_fd(fd.as_fd())?,
                None => stat_at(dir, name)?,
            };
            let has_record = self.settle_new(at, meta, &stat)?;
            if meta.kind == Kind::Symlink {
                return Ok((stat, has_record));
            }
            self.store_inherited(at, extras.access.as_ref(), extras.default.as_ref())?;
            if extras.opaque {
                sys::set_xattr(at, OPAQUE, b"y", XattrFlags::empty())?;
            }
            Ok((stat, has_record))
        };
        match finish() {
            Ok((stat, has_record)) => Ok((stat, file, has_record)),
            Err(err) => {
                let flags = if meta.kind == Kind::Dir { AtFlags::REMOVEDIR } else { AtFlags::empty() };
                if let Err(err) = rustix::fs::unlinkat(dir, name, flags) {
                    tracing::debug!(?err, "cannot remove an object that could not be completed");
                }
                Err(err)
            }
        }
    }

    /// An empty directory in the work directory that hides what is below wherever it is put.
    pub(crate) fn temp_opaque_dir(&self, meta: &Meta) -> Res<Box<[u8]>> {
        let upper = self.upper()?;
        let extras = Extras { opaque: true, ..Extras::default() };
        let make = |temp: &[u8]| self.make_object(upper.work.as_fd(), temp, meta, b"", &extras);
        upper.make_temp(make).map(|(_, temp)| temp)
    }

    /// link(2).
    pub(crate) fn link(&self, node: &Arc<Node>, parent: &Arc<Node>, name: &[u8]) -> Res<()> {
        check_name(name)?;
        if node.kind == Kind::Dir {
            return Err(Errno::PERM);
        }
        let upper = self.touch()?;
        self.copy_up(node)?;
        self.copy_up(parent)?;
        let special = node.kind.is_special() && self.owners.has_placeholders();
        let impure = special || node.inner.lock().origin.is_some();
        if impure {
            self.mark_impure(parent.upper_dir()?)?;
        }
        self.note_entry(parent);
        // Without a name it cannot get one again (as anywhere). Which names it has may change until it is used.
        let object = self.object(node)?.ok_or(Errno::NOENT)?;
        let mut state = parent.dir()?.state.write();
        if state.removed {
            return Err(Errno::NOENT);
        }
        let dir = parent.upper_dir()?;
        let fd = self.fd(dir)?;
        let changing = node.names.begin();
        match link_fd(object.as_fd(), fd.as_fd(), name) {
            Err(Errno::EXIST) => self
                .over_whiteout(dir, name, false, |temp| link_fd(object.as_fd(), upper.work.as_fd(), temp))?,
            other => other?,
        }
        let before = {
            let mut inner = node.inner.lock();
            // The one that is in the upper for sure comes first.
            inner.links.insert(0, Link { parent: parent.clone(), name: name.into() });
            matches!(inner.place, Place::Parked(_)).then(|| std::mem::replace(&mut inner.place, Place::Upper))
        };
        drop((before, changing));
        if let Some(listing) = &mut state.listing {
            listing.insert(&self.hasher, name, node.ino, node.kind);
        }
        Ok(())
    }

    /// unlink(2).
    pub(crate) fn unlink(&self, parent: &Arc<Node>, name: &[u8]) -> Res<()> {
        check_name(name)?;
        self.touch()?;
        let (node, stat) = self.lookup_stat(parent, name)?;
        if node.kind == Kind::Dir {
            return Err(Errno::ISDIR);
        }
        if node.is_far_root() {
            return Err(Errno::BUSY);
        }
        may_take_long_unless(|| is_short_way_up(parent) && !gives_much_back(&node, stat))?;
        self.copy_up(parent)?;
        self.note_entry(parent);
        // Taken before the name goes: an open file must go on working.
        let held = self.hold(&node);
        let mut state = parent.dir()?.state.write();
        if !node.has_link(parent, name) {
            return Err(Errno::NOENT);
        }
        let dir = parent.upper_dir()?;
        let fd = self.fd(dir)?;
        let covers = state.has_lower() && self.covers_lower(&state, name)?;
        let in_upper = match stat_at(fd.as_fd(), name) {
            Ok(stat) => Some(stat),
            Err(Errno::NOENT) => None,
            Err(err) => return Err(err),
        };
        let changing = node.names.begin();
        let parked = self.park(&node, parent, name, in_upper.as_ref(), &held)?;
        match in_upper {
            Some(_) if covers => self.put_whiteout(dir, name, true)?,
            Some(_) => rustix::fs::unlinkat(&fd, name, AtFlags::empty())?,
            None if covers => self.put_whiteout(dir, name, false)?,
            None => return Err(Errno::NOENT),
        }
        self.name_gone(&node, parent, name, in_upper.as_ref(), held, parked);
        drop(changing);
        self.note_links(&node);
        if let Some(listing) = &mut state.listing {
            listing.remove(&self.hasher, name);
        }
        Ok(())
    }

    /// What keeps a file's content reachable when its last name goes.
    pub(crate) fn hold(&self, node: &Arc<Node>) -> Held {
        if node.kind != Kind::File {
            return Held::NotNeeded;
        }
        if !node.is_upper() {
            return Held::NotNeeded;
        }
        match self.open_file(node, false) {
            Ok(Content::File(fd)) => match self.pins.pin(fd) {
                Ok(pinned) => Held::Pinned(Arc::new(pinned)),
                Err(_) => Held::Nothing,
            },
            _ => Held::Nothing,
        }
    }

    /// What is about to lose a name must stay reachable for those who have it open: without a
    /// descriptor to spare it gets a name in the work directory, unless another one is known. So does
    /// what is about to lose its last name in the upper and has more in a layer.
    /// `in_upper` is what stands at the name in the upper.
    pub(crate) fn park(
        &self,
        node: &Node,
        parent: &Node,
        name: &[u8],
        in_upper: Option<&Stat>,
        held: &Held,
    ) -> Res<Option<Arc<Parked>>> {
        let Some(stat) = in_upper else { return Ok(None) };
        let (known_elsewhere, entry, left) = {
            let inner = node.inner.lock();
            (inner.links.iter().any(|l| !l.is(parent, name)), inner.entry, inner.left())
        };
        // A layer has further names of it, which must lead to what it is now.
        if entry && stat.nlink <= 2 && left > 0 {
            return Ok(Some(Arc::new(self.entry_place(node)?)));
        }
        // It may have been copied up since it was held, when nothing was needed yet.
        let reachable = known_elsewhere && stat.nlink > 1 || matches!(held, Held::Pinned(_));
        if node.kind != Kind::File || reachable {
            return Ok(None);
        }
        let upper = self.upper()?;
        let fd = self.upper_fd(parent)?;
        let link = |temp: &[u8]| rustix::fs::linkat(&fd, name, &upper.work, temp, AtFlags::empty());
        let ((), temp) = upper.make_temp(link)?;
        Ok(Some(Arc::new(self.parked(upper, temp))))
    }

    /// A file that has (also) this name in the work directory.
    pub(crate) fn parked(&self, upper: &crate::upper::Upper, name: Box<[u8]>) -> Parked {
        Parked { work: upper.work.clone(), name, temporary: true, quota: self.hooks.quota.clone() }
    }

    /// Notes that a name of an object is gone. `in_upper` is what stood at the name in
    /// the upper, if anything did. The parent's lock is held. [`Engine::note_links`] must follow, once nobody has to
    /// wait any more who counts names.
    pub(crate) fn name_gone(
        &self,
        node: &Arc<Node>,
        parent: &Node,
        name: &[u8],
        in_upper: Option<&Stat>,
        held: Held,
        parked: Option<Arc<Parked>>,
    ) {
        let mut inner = node.inner.lock();
        let at = inner.links.iter().position(|l| l.is(parent, name));
        let old = at.map(|at| inner.links.remove(at));
        let Some(stat) = in_upper else {
            // A name of a layer was covered; the layer still counts it.
            inner.extra_links -= 1;
            drop(inner);
            drop(old);
            return;
        };
        let last = stat.nlink <= 1 + u32::from(inner.entry);
        let no_name = inner.links.is_empty();
        let (mut ended, mut freed) = (false, false);
        if matches!(inner.place, Place::Upper) && (last || no_name) {
            inner.place = match (&held, parked) {
                (_, Some(parked)) => Place::Parked(parked),
                (Held::Pinned(pinned), _) => {
                    if last {
                        pinned.is_last();
                    }
                    Place::Unlinked(pinned.clone())
                }
                _ => {
                    freed = last;
                    Place::Gone(Arc::new(Stat { nlink: stat.nlink.saturating_sub(1), ..*stat }))
                }
            };
            if last {
                if !inner.entry {
                    inner.extra_links = inner.extra_links.max(0);
                }
                ended = true;
            }
        }
        let key = inner.key;
        drop(inner);
        drop(old);
        if let (true, Some(quota)) = (freed, self.quota()) {
            released(quota, node.kind, stat);
        }
        if stat.nlink <= 1
            && let Ok(upper) = self.upper()
        {
            upper.sidecar.forget(stat);
        }
        if ended {
            self.table.aliases.remove(key);
            let slot = node.file.take();
            drop(slot);
        }
    }

    /// rmdir(2).
    pub(crate) fn rmdir(&self, parent: &Arc<Node>, name: &[u8]) -> Res<()> {
        check_name(name)?;
        let upper = self.touch()?;
        let node = self.lookup(parent, name)?;
        if node.kind != Kind::Dir {
            return Err(Errno::NOTDIR);
        }
        if node.is_far_root() {
            return Err(Errno::BUSY);
        }
        self.copy_up(parent)?;
        self.note_entry(parent);
        let mut guards = crate::rename::lock_dirs(&[parent, &node])?;
        let (state, child) = guards.two(parent, &node)?;
        if state.removed || child.removed || !node.has_link(parent, name) {
            return Err(Errno::NOENT);
        }
        if !self.is_empty(&node, child)? {
            return Err(Errno::NOTEMPTY);
        }
        let stat = self.stat_of_removed(&node);
        let dir = parent.upper_dir()?;
        let fd = self.fd(dir)?;
        let covers = state.has_lower() && self.covers_lower(state, name)?;
        match node.dir()?.upper.get() {
            None => self.put_whiteout(dir, name, false)?,
            Some(_) => self.remove_upper_dir(upper, dir, &fd, name, covers)?,
        }
        if let Some(listing) = &mut state.listing {
            listing.remove(&self.hasher, name);
        }
        self.dir_gone(&node, child, stat);
        Ok(())
    }

    /// Removes an upper directory that holds whiteouts at most.
    fn remove_upper_dir(
        &self,
        upper: &crate::upper::Upper,
        dir: &Arc<RealDir>,
        fd: &Fd,
        name: &[u8],
        covers: bool,
    ) -> Res<()> {
        if !covers {
            match rustix::fs::unlinkat(fd, name, AtFlags::REMOVEDIR) {
                Err(Errno::NOTEMPTY | Errno::EXIST) => {}
                other => return other,
            }
        }
        let temp = self.move_away(upper, dir, fd, name, covers)?;
        self.discard_temp_dir(&temp);
        Ok(())
    }

    /// Moves what stands at a name of the upper into the work directory and leaves a
    /// whiteout, if one is needed, in the same step.
    pub(crate) fn move_away(
        &self,
        upper: &crate::upper::Upper,
        dir: &Arc<RealDir>,
        fd: &Fd,
        name: &[u8],
        whiteout: bool,
    ) -> Res<Box<[u8]>> {
        if !whiteout {
            let ((), temp) = upper.make_temp(|temp| {
                rustix::fs::renameat_with(fd, name, &upper.work, temp, RenameFlags::NOREPLACE)
            })?;
            return Ok(temp);
        }
        let temp = self.temp_whiteout_for(dir)?;
        let moved = rustix::fs::renameat_with(&upper.work, &*temp, fd, name, RenameFlags::EXCHANGE);
        if moved.is_err() {
            upper.remove_temp(&temp);
        }
        moved.map(|()| temp)
    }

    /// The attributes that a removed directory goes on showing.
    pub(crate) fn stat_of_removed(&self, node: &Arc<Node>) -> Stat {
        // The caller holds the directory's lock, which `stat` would take.
        let upper = node.dir.as_ref().and_then(|d| d.upper.get());
        let stat = upper.and_then(|dir| stat_fd(self.fd(dir).ok()?.as_fd()).ok());
        Stat { nlink: 0, ..stat.unwrap_or_else(|| self.synthetic_stat()) }
    }

    /// Notes that a directory is gone. Its lock and its parent's are held.
    pub(crate) fn dir_gone(&self, node: &Arc<Node>, state: &mut DirState, stat: Stat) {
        state.removed = true;
        crate::rename::cut(state);
        if let (true, Some(quota)) = (node.is_upper(), self.quota()) {
            released(quota, Kind::Dir, &stat);
        }
        state.listing = None;
        let old = {
            let mut inner = node.inner.lock();
            inner.place = Place::Gone(Arc::new(stat));
            self.table.aliases.remove(inner.key);
            std::mem::take(&mut inner.links)
        };
        drop(old);
    }

    /// [`crate::MKNOD_XATTR`]: `MODE:MAJOR:MINOR:UID:GID:NAME`.
    pub(crate) fn mknod_by_xattr(&self, dir: &Arc<Node>, value: &[u8]) -> Res<()> {
        let mut fields = value.splitn(6, |&b| b == b':');
        let mut number = |radix| -> Res<u32> {
            let text = std::str::from_utf8(fields.next().ok_or(Errno::INVAL)?).map_err(|_| Errno::INVAL)?;
            u32::from_str_radix(text, radix).map_err(|_| Errno::INVAL)
        };
        let (mode, major, minor) = (number(8)?, number(10)?, number(10)?);
        let owner = (number(10)?, number(10)?);
        let name = fields.next().ok_or(Errno::INVAL)?;
        let kind =
            Kind::from_mode(mode).filter(|k| k.is_special() || *k == Kind::File).ok_or(Errno::INVAL)?;
        let new = NewObject { kind, perm: mode & 0o7777, umask: 0, rdev: (major, minor), target: b"", owner };
        // The kernel has not looked the name up, as it does before mknod(2): what a layer has there
        // would be hidden.
        check_name(name)?;
        if missing_ok(self.lookup(dir, name))?.is_some() {
            return Err(Errno::EXIST);
        }
        self.create(dir, name, &new).map(drop)
    }
}

/// See [`Engine::hold`].
#[derive(Debug)]
pub(crate) enum Held {
    /// The content stays reachable by itself (in a layer), or there is none.
    NotNeeded,
    Pinned(Arc<crate::handle::Pinned>),
    /// No descriptor could be had.
    Nothing,
}
