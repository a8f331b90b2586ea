//! rename(2), with `RENAME_NOREPLACE` and `RENAME_EXCHANGE`.
//!
//! What moves is in the upper completely before it moves: a file is copied up, a
//! directory with everything in it (the cost of renaming a directory of a layer is that
//! of copying it, once). The directory becomes opaque, so that nothing of a layer can
//! show through at its new place, and all directories in it are cut from their layers.
//! Then one `renameat2` moves the object; where a layer has the old name,
//! `RENAME_WHITEOUT` covers it in the same step.
//!
//! A directory can replace neither a whiteout nor a directory that holds whiteouts. Both
//! are exchanged with it instead, and what then stands at the old name is removed or
//! left as the whiteout that is needed there. The directories' locks are held
//! throughout, so nobody sees the steps.

use std::os::fd::AsFd;
use std::sync::{Arc, RwLockWriteGuard};

use rustix::fs::{AtFlags, RenameFlags, XattrFlags};

use crate::attr::{Kind, Stat};
use crate::create::{Held, check_name};
use crate::engine::Engine;
use crate::errno::{Errno, Res, missing_ok};
use crate::handle::Fd;
use crate::inode::{DirState, Link, Node, Parked, ROOT};
use crate::layer::{RealDir, stat_at};
use crate::sys::{self, At};
use crate::xattr::OPAQUE;

/// What kind of rename is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    Replace,
    NoReplace,
    Exchange,
}

/// The locks of several directories, taken by rising number.
pub(crate) struct DirGuards<'a>(Vec<(u64, RwLockWriteGuard<'a, DirState>)>);

/// Locks directories for writing; one given twice is locked once, other objects not at
/// all.
pub(crate) fn lock_dirs<'a>(nodes: &[&'a Arc<Node>]) -> Res<DirGuards<'a>> {
    let mut dirs: Vec<&'a Arc<Node>> = nodes.iter().copied().filter(|n| n.kind == Kind::Dir).collect();
    dirs.sort_by_key(|n| n.ino);
    dirs.dedup_by_key(|n| n.ino);
    let mut guards = Vec::with_capacity(dirs.len());
    for node in dirs {
        guards.push((node.ino, node.dir()?.state.write()));
    }
    Ok(DirGuards(guards))
}

impl DirGuards<'_> {
    pub(crate) fn get(&mut self, node: &Node) -> Res<&mut DirState> {
        self.0.iter_mut().find(|(ino, _)| *ino == node.ino).map(|(_, guard)| &mut **guard).ok_or(Errno::STALE)
    }

    /// Two different ones at once.
    pub(crate) fn two(&mut self, a: &Node, b: &Node) -> Res<(&mut DirState, &mut DirState)> {
        let (mut first, mut second) = (None, None);
        for (ino, guard) in &mut self.0 {
            if *ino == a.ino {
                first = Some(&mut **guard);
            } else if *ino == b.ino {
                second = Some(&mut **guard);
            }
        }
        first.zip(second).ok_or(Errno::STALE)
    }
}

/// Cuts a directory from everything below the upper.
pub(crate) fn cut(state: &mut DirState) {
    state.lowers.clear();
    state.generated = None;
}

/// One end of a rename: a name in a directory of the upper.
struct End<'a> {
    parent: &'a Arc<Node>,
    name: &'a [u8],
    dir: &'a Arc<RealDir>,
    fd: Fd,
    /// Something below the upper has this name.
    covers: bool,
}

impl Engine {
    pub(crate) fn rename(
        &self,
        parent: &Arc<Node>,
        name: &[u8],
        new_parent: &Arc<Node>,
        new_name: &[u8],
        how: How,
    ) -> Res<()> {
        check_name(name)?;
        check_name(new_name)?;
        self.touch()?;
        let source = self.lookup(parent, name)?;
        let target = missing_ok(self.lookup(new_parent, new_name))?;
        match (&target, how) {
            (Some(_), How::NoReplace) => return Err(Errno::EXIST),
            (None, How::Exchange) => return Err(Errno::NOENT),
            // Two names of one file: POSIX wants nothing done.
            (Some(target), _) if target.ino == source.ino => return Ok(()),
            _ => {}
        }
        if source.ino == ROOT || target.as_ref().is_some_and(|t| t.ino == ROOT) {
            return Err(Errno::BUSY);
        }
        let mut cut_off = self.prepare(&source, parent, name)?;
        if let (How::Exchange, Some(target)) = (how, &target) {
            cut_off.append(&mut self.prepare(target, new_parent, new_name)?);
        }
        self.copy_up(parent)?;
        self.copy_up(new_parent)?;
        let held = match &target {
            Some(target) if how != How::Exchange => self.hold(target),
            _ => Held::NotNeeded,
        };

        let mut nodes = vec![parent, new_parent, &source];
        nodes.extend(target.as_ref());
        // Below the renamed too, all at once: one after another could meet a request that holds one
        // of them and wants one of ours.
        nodes.extend(&cut_off);
        let mut guards = lock_dirs(&nodes)?;
        let still = |node: &Node, parent: &Node, name: &[u8]| {
            if node.has_link(parent, name) { Ok(()) } else { Err(Errno::NOENT) }
        };
        still(&source, parent, name)?;
        if let Some(target) = &target {
            still(target, new_parent, new_name)?;
            if how != How::Exchange && target.kind == Kind::Dir {
                if source.kind != Kind::Dir {
                    return Err(Errno::ISDIR);
                }
                let state = guards.get(target)?;
                if !self.is_empty(target, state)? {
                    return Err(Errno::NOTEMPTY);
                }
            } else if how != How::Exchange && source.kind == Kind::Dir {
                return Err(Errno::NOTDIR);
            }
        }
        let end = |guards: &mut DirGuards<'_>, parent: &'_ Arc<Node>, name: &[u8]| -> Res<(Fd, bool)> {
            let state = guards.get(parent)?;
            if state.removed {
                return Err(Errno::NOENT);
            }
            let covers = state.has_lower() && self.covers_lower(state, name)?;
            Ok((self.upper_fd(parent)?, covers))
        };
        let (fd, covers) = end(&mut guards, parent, name)?;
        let from = End { parent, name, dir: parent.upper_dir()?, fd, covers };
        let (fd, covers) = end(&mut guards, new_parent, new_name)?;
        let to = End { parent: new_parent, name: new_name, dir: new_parent.upper_dir()?, fd, covers };

        self.make_opaque(&source, guards.get(&source).ok(), to.covers)?;
        self.note_arrival(&source, to.dir)?;
        if let (How::Exchange, Some(target)) = (how, &target) {
            self.make_opaque(target, guards.get(target).ok(), from.covers)?;
            self.note_arrival(target, from.dir)?;
        }
        // The tops are opaque now: what lies in them has nothing below any more.
        for node in &cut_off {
            cut(guards.get(node)?);
        }
        // The kernel shows whiteouts in a directory that merges with nothing.
        for node in &cut_off {
            self.sweep_whiteouts(node.upper_dir()?);
        }

        if let (How::Exchange, Some(target)) = (how, &target) {
            self.exchange(&source, &from, target, &to)?;
            self.moved(&mut guards, &source, &from, &to)?;
            self.moved(&mut guards, target, &to, &from)?;
            for (end, node) in [(&from, target), (&to, &source)] {
                if let Some(listing) = &mut guards.get(end.parent)?.listing {
                    listing.insert(&self.hasher, end.name, node.ino, node.kind);
                }
            }
            return Ok(());
        }

        let in_upper = missing_ok(stat_at(to.fd.as_fd(), to.name))?;
        let gone_stat = match &target {
            Some(target) if target.kind == Kind::Dir => Some(self.stat_of_removed(target)),
            _ => None,
        };
        let parked = self.park(target.as_ref(), &to, in_upper.as_ref(), &held)?;
        if source.kind == Kind::Dir {
            self.rename_dir(&source, &from, &to, in_upper.as_ref())?;
        } else {
            self.rename_file(&from, &to)?;
        }
        if let Some(target) = &target {
            match gone_stat {
                Some(stat) => self.dir_gone(target, guards.get(target)?, stat),
                None => self.name_gone(target, new_parent, new_name, in_upper.as_ref(), held, parked),
            }
        }
        self.moved(&mut guards, &source, &from, &to)?;
        if let Some(listing) = &mut guards.get(parent)?.listing {
            listing.remove(&self.hasher, name);
        }
        if let Some(listing) = &mut guards.get(new_parent)?.listing {
            listing.insert(&self.hasher, new_name, source.ino, source.kind);
        }
        Ok(())
    }

    /// Brings what is to move into the upper; gives the directories to cut.
    fn prepare(&self, node: &Arc<Node>, parent: &Arc<Node>, name: &[u8]) -> Res<Vec<Arc<Node>>> {
        if node.kind == Kind::Dir {
            return if node.dir()?.state.read().has_lower() || !node.is_upper() {
                self.copy_up_tree(node)
            } else {
                Ok(Vec::new())
            };
        }
        self.copy_up(node)?;
        // A further name of a hard link may not be in the upper yet.
        self.materialise(node, parent, name)?;
        Ok(Vec::new())
    }

    /// Nothing of a layer may show in a directory at its new place.
    fn make_opaque(&self, node: &Arc<Node>, state: Option<&mut DirState>, covers: bool) -> Res<()> {
        let Some(state) = state else { return Ok(()) };
        if node.kind != Kind::Dir || !(covers || state.has_lower()) {
            return Ok(());
        }
        let fd = self.upper_fd(node)?;
        sys::set_xattr(At::Name(fd.as_fd(), b"."), OPAQUE, b"y", XattrFlags::empty())
    }

    /// The directory gets an entry whose number or type the disk does not tell.
    fn note_arrival(&self, node: &Node, dir: &Arc<RealDir>) -> Res<()> {
        let special = node.kind.is_special() || node.inner.lock().origin.is_some();
        if special { self.mark_impure(dir) } else { Ok(()) }
    }

    /// What will be replaced must stay readable for those who have it open; without a
    /// descriptor to spare it gets a name in the work directory.
    fn park(
        &self,
        target: Option<&Arc<Node>>,
        to: &End<'_>,
        in_upper: Option<&Stat>,
        held: &Held,
    ) -> Res<Option<Arc<Parked>>> {
        let (Some(target), Some(stat)) = (target, in_upper) else { return Ok(None) };
        if target.kind != Kind::File || stat.nlink != 1 || !matches!(held, Held::Nothing) {
            return Ok(None);
        }
        let upper = self.upper()?;
        let ((), temp) = upper
            .make_temp(|temp| rustix::fs::linkat(&to.fd, to.name, &upper.work, temp, AtFlags::empty()))?;
        Ok(Some(Arc::new(Parked { work: upper.work.clone(), name: temp })))
    }

    /// Moves something that is not a directory over a file, a whiteout or nothing.
    fn rename_file(&self, from: &End<'_>, to: &End<'_>) -> Res<()> {
        if !from.covers {
            return rustix::fs::renameat_with(&from.fd, from.name, &to.fd, to.name, RenameFlags::empty());
        }
        self.rename_leaving_whiteout(from, to)
    }

    fn rename_leaving_whiteout(&self, from: &End<'_>, to: &End<'_>) -> Res<()> {
        if !self.upper()?.whiteout_form.is_xattr() {
            match rustix::fs::renameat_with(&from.fd, from.name, &to.fd, to.name, RenameFlags::WHITEOUT) {
                // Not every file system can, nor may every process.
                Err(Errno::INVAL | Errno::PERM | Errno::NOSYS) => {}
                other => return other,
            }
        }
        rustix::fs::renameat_with(&from.fd, from.name, &to.fd, to.name, RenameFlags::empty())?;
        self.put_whiteout(from.dir, from.name, false)
    }

    /// Moves a directory, whose place in the tree of real directories moves with it.
    fn rename_dir(&self, node: &Arc<Node>, from: &End<'_>, to: &End<'_>, in_upper: Option<&Stat>) -> Res<()> {
        let upper = self.upper()?;
        let real = node.upper_dir()?;
        let mut leftover = None;
        {
            let _topology = self.tree.topology.write();
            match in_upper.map(Stat::kind) {
                None if from.covers => self.rename_leaving_whiteout_locked(from, to)?,
                None => {
                    rustix::fs::renameat_with(&from.fd, from.name, &to.fd, to.name, RenameFlags::empty())?
                }
                Some(kind) => {
                    rustix::fs::renameat_with(&from.fd, from.name, &to.fd, to.name, RenameFlags::EXCHANGE)?;
                    leftover = Some(kind == Some(Kind::Dir));
                }
            }
            real.set_position(to.dir.clone(), to.name);
        }
        let cleaned = match leftover {
            // The exchanged whiteout is just what the old name needs.
            Some(false) if from.covers => Ok(()),
            Some(false) => rustix::fs::unlinkat(&from.fd, from.name, AtFlags::empty()),
            Some(true) => self
                .move_away(upper, from.dir, &from.fd, from.name, from.covers)
                .map(|temp| self.discard_temp_dir(&temp)),
            None => Ok(()),
        };
        if let Err(err) = cleaned {
            let _topology = self.tree.topology.write();
            rustix::fs::renameat_with(&from.fd, from.name, &to.fd, to.name, RenameFlags::EXCHANGE)?;
            real.set_position(from.dir.clone(), from.name);
            return Err(err);
        }
        Ok(())
    }

    /// As [`Engine::rename_leaving_whiteout`], with the topology lock held: nothing in
    /// here may open a chain of directories.
    fn rename_leaving_whiteout_locked(&self, from: &End<'_>, to: &End<'_>) -> Res<()> {
        let upper = self.upper()?;
        if !upper.whiteout_form.is_xattr() {
            match rustix::fs::renameat_with(&from.fd, from.name, &to.fd, to.name, RenameFlags::WHITEOUT) {
                Err(Errno::INVAL | Errno::PERM | Errno::NOSYS) => {}
                other => return other,
            }
        }
        // A whiteout at the new name first; then one step swaps the two.
        let mark = from.fd.as_fd();
        if upper.whiteout_form.is_xattr()
            && sys::get_xattr_vec(At::Name(mark, b"."), OPAQUE)?.as_deref() != Some(b"y")
        {
            sys::set_xattr(At::Name(mark, b"."), OPAQUE, b"x", XattrFlags::empty())?;
            from.dir.xattr_whiteouts.store(true, std::sync::atomic::Ordering::Relaxed);
        }
        let temp = upper.temp_whiteout()?;
        let placed = rustix::fs::renameat_with(&upper.work, &*temp, &to.fd, to.name, RenameFlags::NOREPLACE);
        if placed.is_err() {
            upper.remove_temp(&temp);
            return placed;
        }
        let moved = rustix::fs::renameat_with(&from.fd, from.name, &to.fd, to.name, RenameFlags::EXCHANGE);
        if moved.is_err() && !to.covers {
            let _ = rustix::fs::unlinkat(&to.fd, to.name, AtFlags::empty());
        }
        moved
    }

    fn exchange(&self, a: &Arc<Node>, from: &End<'_>, b: &Arc<Node>, to: &End<'_>) -> Res<()> {
        let swap = || rustix::fs::renameat_with(&from.fd, from.name, &to.fd, to.name, RenameFlags::EXCHANGE);
        if a.kind != Kind::Dir && b.kind != Kind::Dir {
            return swap();
        }
        let _topology = self.tree.topology.write();
        swap()?;
        if a.kind == Kind::Dir {
            a.upper_dir()?.set_position(to.dir.clone(), to.name);
        }
        if b.kind == Kind::Dir {
            b.upper_dir()?.set_position(from.dir.clone(), from.name);
        }
        Ok(())
    }

    /// The node has another name from here on.
    fn moved(&self, _locked: &mut DirGuards<'_>, node: &Arc<Node>, from: &End<'_>, to: &End<'_>) -> Res<()> {
        let link = Link { parent: to.parent.clone(), name: to.name.into() };
        let old = {
            let mut inner = node.inner.lock();
            match inner.links.iter().position(|l| l.is(from.parent, from.name)) {
                Some(at) => Some(std::mem::replace(&mut inner.links[at], link)),
                None => {
                    inner.links.push(link);
                    None
                }
            }
        };
        drop(old);
        Ok(())
    }
}
