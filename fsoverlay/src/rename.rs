//! rename(2), with `RENAME_NOREPLACE` and `RENAME_EXCHANGE`.
//!
//! What moves is in the upper before it moves. A file is copied up; of a directory only itself is, with
//! a redirect that leads to what the layers have in it ([`crate::redirect`]). A directory that has
//! nothing below becomes opaque where a layer has its new name. Then one `renameat2` moves the object;
//! where a layer has the old name, `RENAME_WHITEOUT` covers it in the same step.
//!
//! Where a redirect cannot be written, everything in the directory is copied up, once; it becomes
//! opaque, and all directories in it are cut from their layers.
//!
//! A directory can replace neither a whiteout nor a directory that holds whiteouts. The
//! first is exchanged with it; the second is emptied before.
//!
//! Where several steps are needed, what stands on disk between any two of them shows nothing
//! of a layer again and has lost nothing, since a crash may leave it so; and a step that fails
//! is undone together with those before it. The directories' locks are held throughout,
//! so nobody inside sees the steps.

use std::os::fd::AsFd;
use std::sync::{Arc, RwLockWriteGuard};

use rustix::fs::{AtFlags, RenameFlags};

use crate::attr::{Kind, Stat};
use crate::create::{Held, check_name, gives_much_back};
use crate::engine::Engine;
use crate::errno::{Errno, Res, may_take_long_unless, missing_ok};
use crate::handle::Fd;
use crate::inode::{DirState, Link, Node, ROOT};
use crate::layer::{RealDir, stat_at};
use crate::upper::Upper;

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
    state.redirect = None;
}

/// A file under a temporary name in the work directory, removed unless it was used.
struct Temp<'a> {
    upper: &'a Upper,
    name: Box<[u8]>,
}

impl Temp<'_> {
    /// The name is not ours to remove any more.
    fn used(mut self) -> Box<[u8]> {
        std::mem::take(&mut self.name)
    }
}

impl Drop for Temp<'_> {
    fn drop(&mut self) {
        if !self.name.is_empty() {
            self.upper.remove_temp(&self.name);
        }
    }
}

/// Both a step and the way back failed: what is on disk is one of the states of a crash.
fn cannot_undo(undone: Res<()>) {
    if let Err(err) = undone {
        tracing::warn!(?err, "a rename that failed half-way could not be undone");
    }
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
        let target = missing_ok(self.lookup_stat(new_parent, new_name))?;
        let (target, replaced) = target.map_or((None, None), |(target, stat)| (Some(target), stat));
        match (&target, how) {
            (Some(_), How::NoReplace) => return Err(Errno::EXIST),
            (None, How::Exchange) => return Err(Errno::NOENT),
            // Two names of one file: POSIX wants nothing done.
            (Some(target), _) if target.ino == source.ino => return Ok(()),
            _ => {}
        }
        // What a directory has in the upper may have to be moved or removed name by name, with locks held.
        let dirs = source.kind == Kind::Dir || target.as_ref().is_some_and(|target| target.kind == Kind::Dir);
        let much = || {
            how != How::Exchange && target.as_ref().is_some_and(|target| gives_much_back(target, replaced))
        };
        may_take_long_unless(|| !dirs && !much())?;
        let is_mount = source.is_far_root() || target.as_ref().is_some_and(|target| target.is_far_root());
        if is_mount || source.ino == ROOT || target.as_ref().is_some_and(|t| t.ino == ROOT) {
            return Err(Errno::BUSY);
        }
        let mut cut_off = self.prepare(&source, parent, name, new_parent)?;
        if let (How::Exchange, Some(target)) = (how, &target) {
            cut_off.append(&mut self.prepare(target, new_parent, new_name, parent)?);
        }
        self.copy_up(parent)?;
        self.copy_up(new_parent)?;
        for dir in [parent, new_parent] {
            self.note_entry(dir);
        }
        self.note_moved(&source);
        if let (How::Exchange, Some(target)) = (how, &target) {
            self.note_moved(target);
        }
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

        let cut_node = |node: &Node| cut_off.iter().any(|cut| cut.ino == node.ino);
        self.hide_below(&source, guards.get(&source).ok(), to.covers, cut_node(&source))?;
        self.note_arrival(&source, to.dir)?;
        if let (How::Exchange, Some(target)) = (how, &target) {
            self.hide_below(target, guards.get(target).ok(), from.covers, cut_node(target))?;
            self.note_arrival(target, from.dir)?;
        }
        for node in &cut_off {
            self.cut_off(node, guards.get(node)?)?;
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
        let changing = target.as_ref().map(|target| target.names.begin());
        let parked = match &target {
            Some(target) => self.park(target, new_parent, new_name, in_upper.as_ref(), &held)?,
            None => None,
        };
        if source.kind == Kind::Dir {
            if let Some(target) = &target {
                self.clear(target, guards.get(target)?)?;
            }
            self.rename_dir(&source, &from, target.as_ref(), &to, in_upper.as_ref())?;
        } else {
            self.rename_file(&from, &to, in_upper.is_some())?;
        }
        if let Some(target) = &target {
            match gone_stat {
                Some(stat) => self.dir_gone(target, guards.get(target)?, stat),
                None => self.name_gone(target, new_parent, new_name, in_upper.as_ref(), held, parked),
            }
        }
        drop(changing);
        if let Some(target) = target.as_ref().filter(|target| target.kind != Kind::Dir) {
            self.note_links(target);
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

    /// Brings what is to move into the upper. A directory finds what it has below from its new place, or,
    /// where that cannot be, everything in it comes along: then these are the directories to cut.
    fn prepare(
        &self,
        node: &Arc<Node>,
        parent: &Arc<Node>,
        name: &[u8],
        new_parent: &Node,
    ) -> Res<Vec<Arc<Node>>> {
        self.copy_up(node)?;
        if node.kind == Kind::Dir {
            let merged = node.dir()?.state.read().has_lower();
            let redirect = || match self.no_redirects {
                true => Ok(false),
                false => self.set_redirect(node, parent, name, parent.ino == new_parent.ino),
            };
            return if merged && !redirect()? { self.copy_up_tree(node) } else { Ok(Vec::new()) };
        }
        // A further name of a hard link may not be in the upper yet.
        if node.inner.lock().left() > 0 {
            self.materialise(node, parent, name)?;
        }
        Ok(Vec::new())
    }

    /// Cuts a directory from everything below, all of which is in the upper. Its lock is held.
    pub(crate) fn cut_off(&self, node: &Node, state: &mut DirState) -> Res<()> {
        if state.redirect.is_some() {
            // It would lead there even from an opaque directory.
            self.set_opaque(node.upper_dir()?)?;
            self.drop_redirect(node.upper_dir()?);
        }
        cut(state);
        Ok(())
    }

    /// Nothing of a layer may show in a directory at its new place, but what it brings along.
    fn hide_below(&self, node: &Node, state: Option<&mut DirState>, covers: bool, cut: bool) -> Res<()> {
        let Some(state) = state else { return Ok(()) };
        let redirected = state.redirect.is_some() && state.has_lower() && !cut;
        if node.kind != Kind::Dir || redirected || !(covers || state.has_lower()) {
            return Ok(());
        }
        self.set_opaque(node.upper_dir()?)
    }

    /// The directory gets an entry whose number or type the disk does not tell.
    fn note_arrival(&self, node: &Node, dir: &Arc<RealDir>) -> Res<()> {
        let special =
            node.kind.is_special() && self.owners.has_placeholders() || node.inner.lock().origin.is_some();
        if special { self.mark_impure(dir) } else { Ok(()) }
    }

    /// Moves something that is not a directory over a file, a whiteout or nothing.
    fn rename_file(&self, from: &End<'_>, to: &End<'_>, occupied: bool) -> Res<()> {
        let go = |flags| rustix::fs::renameat_with(&from.fd, from.name, &to.fd, to.name, flags);
        if !from.covers {
            return go(RenameFlags::empty());
        }
        match self.leaving_whiteout(go) {
            Some(done) => done,
            None => self.rename_file_in_steps(from, to, occupied),
        }
    }

    /// Runs a rename with `RENAME_WHITEOUT`, the one step that does everything; `None` if it is not to
    /// be had, which not every file system offers, nor to every process.
    fn leaving_whiteout(&self, go: impl FnOnce(RenameFlags) -> Res<()>) -> Option<Res<()>> {
        if self.upper.as_ref().is_some_and(|upper| upper.whiteout_form.is_xattr()) {
            return None;
        }
        match go(RenameFlags::WHITEOUT) {
            Err(Errno::INVAL | Errno::PERM | Errno::NOSYS) => None,
            done => Some(done),
        }
    }

    /// Moves a file without `RENAME_WHITEOUT`. For a moment it has both names: a crash then leaves it
    /// with both, never a name that shows what a layer has there. What needs space comes first, and
    /// the replaced file stays until all is done, so that a failure leaves everything as it was.
    fn rename_file_in_steps(&self, from: &End<'_>, to: &End<'_>, occupied: bool) -> Res<()> {
        let upper = self.upper()?;
        let link = |end: &End<'_>| {
            let link =
                |temp: &[u8]| rustix::fs::linkat(&end.fd, end.name, &upper.work, temp, AtFlags::empty());
            upper.make_temp(link).map(|((), temp)| Temp { upper, name: temp })
        };
        let put = |temp: &Temp<'_>, end: &End<'_>| {
            rustix::fs::renameat_with(&upper.work, &*temp.name, &end.fd, end.name, RenameFlags::empty())
        };
        let whiteout = Temp { upper, name: self.temp_whiteout_for(from.dir)? };
        let replaced = if occupied { Some(link(to)?) } else { None };
        let second = link(from)?;
        put(&second, to)?;
        second.used();
        if let Err(err) = put(&whiteout, from) {
            let undone = match replaced {
                Some(replaced) => put(&replaced, to).map(|()| drop(replaced.used())),
                None => rustix::fs::unlinkat(&to.fd, to.name, AtFlags::empty()),
            };
            cannot_undo(undone);
            return Err(err);
        }
        whiteout.used();
        Ok(())
    }

    /// Moves a directory, whose place in the tree of real directories moves with it, over an empty
    /// directory (empty on disk, too), a whiteout or nothing.
    fn rename_dir(
        &self,
        node: &Arc<Node>,
        from: &End<'_>,
        target: Option<&Arc<Node>>,
        to: &End<'_>,
        in_upper: Option<&Stat>,
    ) -> Res<()> {
        let real = node.upper_dir()?;
        // Nothing in here may open a chain of directories: the topology is locked.
        let go = |flags| {
            let _topology = self.tree.topology.write();
            rustix::fs::renameat_with(&from.fd, from.name, &to.fd, to.name, flags)?;
            real.set_position(to.dir.clone(), to.name);
            Ok(())
        };
        let back = || {
            let _topology = self.tree.topology.write();
            let flags = RenameFlags::EXCHANGE;
            let undone = rustix::fs::renameat_with(&from.fd, from.name, &to.fd, to.name, flags);
            if undone.is_ok() {
                real.set_position(from.dir.clone(), from.name);
            }
            cannot_undo(undone);
        };
        let kind = in_upper.map(Stat::kind);
        if kind.is_some_and(|kind| kind != Some(Kind::Dir)) {
            // A directory cannot replace a whiteout, but change places with it; and there it is just
            // what the old name needs, or not needed at all.
            go(RenameFlags::EXCHANGE)?;
            if from.covers {
                return Ok(());
            }
            return rustix::fs::unlinkat(&from.fd, from.name, AtFlags::empty()).inspect_err(|_| back());
        }
        if !from.covers {
            return go(RenameFlags::empty());
        }
        match self.leaving_whiteout(go) {
            Some(done) => done,
            None => self.rename_dir_in_steps(from, target, to, kind.is_some(), go, back),
        }
    }

    /// Moves a directory without `RENAME_WHITEOUT`: it changes places with what stands at the new name,
    /// an empty directory or a whiteout that is put there for it. A crash in between leaves an empty
    /// directory at the old name at most, which is opaque: nothing of a layer shows in it.
    fn rename_dir_in_steps(
        &self,
        from: &End<'_>,
        target: Option<&Arc<Node>>,
        to: &End<'_>,
        occupied: bool,
        go: impl Fn(RenameFlags) -> Res<()>,
        back: impl Fn(),
    ) -> Res<()> {
        let upper = self.upper()?;
        let whiteout = Temp { upper, name: self.temp_whiteout_for(from.dir)? };
        let put = |temp: &[u8]| {
            rustix::fs::renameat_with(&upper.work, temp, &to.fd, to.name, RenameFlags::NOREPLACE)
        };
        let Some(target) = target else {
            self.allow_xattr_whiteouts(to.dir)?;
            put(&whiteout.name)?;
            whiteout.used();
            return go(RenameFlags::EXCHANGE)
                .inspect_err(|_| cannot_undo(rustix::fs::unlinkat(&to.fd, to.name, AtFlags::empty())));
        };
        if !occupied {
            let meta = target.inner.lock().meta;
            let temp = self.temp_opaque_dir(&meta)?;
            put(&temp).inspect_err(|_| self.discard_temp_dir(&temp))?;
        }
        let moved = go(RenameFlags::EXCHANGE).and_then(|()| {
            let flags = RenameFlags::EXCHANGE;
            rustix::fs::renameat_with(&upper.work, &*whiteout.name, &from.fd, from.name, flags)
                .inspect_err(|_| back())
        });
        if moved.is_err() {
            if !occupied {
                cannot_undo(rustix::fs::unlinkat(&to.fd, to.name, AtFlags::REMOVEDIR));
            }
            return moved;
        }
        // The replaced directory has the name that the whiteout had.
        self.discard_temp_dir(&whiteout.used());
        Ok(())
    }

    /// Makes an upper directory in which nothing shows empty on disk as well, so that a rename can
    /// replace it. It becomes opaque first: its whiteouts are not needed then. Its lock is held.
    fn clear(&self, node: &Node, state: &mut DirState) -> Res<()> {
        let Some(dir) = node.dir()?.upper.get() else { return Ok(()) };
        if state.has_lower() {
            self.set_opaque(dir)?;
            cut(state);
        }
        self.remove_whiteouts(dir)
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
