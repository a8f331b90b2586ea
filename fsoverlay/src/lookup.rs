//! From a name in a merged directory to the object it stands for.
//!
//! Top down: the upper, the generated layer, the layers. The first thing that is not a
//! directory is the answer if nothing was found above it, and ends the search in any
//! case; a whiteout or an opaque directory ends it too. Directories are collected.
//! Only the layers in which the parent was found are asked.
//!
//! A layer's directory that the caller may not search answers "nothing here": it appears
//! empty, so that fake root can work in it.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, RwLockReadGuard};

use crate::attr::{Attr, Key, Kind, Meta, Stat};
use crate::engine::Engine;
use crate::errno::{Errno, Res};
use crate::far::Far;
use crate::generated::GenBody;
use crate::hooks::AccessKind;
use crate::inode::{DirState, Inner, Link, Named, NewNode, Node, Parked, Place};
use crate::layer::{RealDir, UPPER, stat_at};
use crate::live::Fresh;
use crate::numbers::InodeNumbers;
use crate::object::{changed_below, gone_below};
use crate::oci::{Said, is_opaque_below, said};
use crate::redirect::{Descent, InMemory, Step};
use crate::sys::At;
use crate::xattr::Marks;

/// One name in one real directory.
#[derive(Debug)]
pub(crate) enum Probe {
    Missing,
    Whiteout,
    Found(Box<Seen>),
}

/// What stands at a name.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) stat: Stat,
    pub(crate) meta: Meta,
    pub(crate) marks: Marks,
}

/// The answer of a lookup, not yet a node.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) ino: u64,
    pub(crate) meta: Meta,
    /// stat of what decides the attributes, with the right `nlink`.
    stat: Option<Stat>,
    key: Key,
    /// `ino` is an alias of `key`.
    aliased: bool,
    /// See [`Inner`].
    extra_links: i64,
    below: u32,
    entry: bool,
    origin: Option<u64>,
    place: Place,
    marks: Marks,
    upper: Option<Arc<RealDir>>,
    state: DirState,
}

/// What a lookup found of a file that is a name in a layer and nothing else.
#[derive(Debug)]
pub(crate) struct Plain {
    ino: u64,
    stat: Stat,
    named: Box<Named>,
}

/// What is far of the directories that one is merged from, and whether one is the root of that.
fn far_of(lowers: &[Arc<RealDir>]) -> Option<(Arc<Far>, bool)> {
    let far = lowers.iter().find_map(|dir| dir.far.clone())?;
    let is_root = |dir: &Arc<RealDir>| {
        dir.far.is_some() && dir.position().is_some_and(|(parent, name)| parent.far_at(&name).is_some())
    };
    Some((far, lowers.iter().any(is_root)))
}

impl Engine {
    /// Looks at one name of one real directory. `more_below` tells whether a directory
    /// found here can merge with others, which is when its marks matter.
    pub(crate) fn probe(&self, dir: &Arc<RealDir>, name: &[u8], more_below: bool) -> Res<Probe> {
        if let Some(far) = dir.far_at(name) {
            let (stat, id) = far.root();
            self.numbers.meet_as(stat.key.dev, id);
            let meta = self.owners.shown(self.layers[dir.layer as usize].meta(&stat).ok_or(Errno::IO)?);
            return Ok(Probe::Found(Box::new(Seen { stat, meta, marks: Marks::default() })));
        }
        let fd = match self.fd(dir) {
            // Somebody took the layer's directory away; those above and below it are still there.
            Err(err) if dir.layer != UPPER && gone_below(err) => return Ok(Probe::Missing),
            other => other?,
        };
        let named = self.has_named_whiteouts(dir);
        let is_gone = |name: &[u8]| -> Res<bool> { Ok(named && self.is_gone(dir, name)?) };
        if named
            && match said(name, None) {
                Said::Nothing => false,
                Said::Other => true,
                Said::Gone(gone) => is_gone(gone)?,
            }
        {
            return Ok(Probe::Missing);
        }
        let stat = match stat_at(fd.as_fd(), name) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => {
                return if is_gone(name)? { Ok(Probe::Whiteout) } else { Ok(Probe::Missing) };
            }
            // A directory of a layer that the caller may not search appears empty.
            Err(Errno::ACCESS | Errno::PERM) if dir.layer != UPPER => return Ok(Probe::Missing),
            Err(err) => return Err(err),
        };
        let whiteouts = self.whiteouts(dir);
        if stat.is_whiteout() {
            return Ok(if whiteouts { Probe::Whiteout } else { Probe::Missing });
        }
        if stat.key.dev != dir.key.dev {
            self.numbers.meet_name(stat.key.dev, fd.as_fd(), name);
        }
        let kind = stat.kind().ok_or(Errno::IO)?;
        let records = dir.layer == UPPER || self.layers[dir.layer as usize].records;
        let xattr_whiteout =
            kind == Kind::File && stat.size == 0 && dir.xattr_whiteouts.load(Ordering::Relaxed);
        let wanted = match kind {
            // A redirect can lead to any layer below.
            Kind::Dir => records || whiteouts && (more_below || dir.layer > 0),
            Kind::File => records || xattr_whiteout,
            _ => false,
        };
        let mut marks = if wanted {
            let marks = Marks::read_of_layer(At::Name(fd.as_fd(), name), dir.layer)?;
            if whiteouts { marks } else { marks.harmless() }
        } else {
            Marks::default()
        };
        if named && kind == Kind::Dir && wanted && !marks.opaque {
            marks.opaque = is_gone(name)? || is_opaque_below(fd.as_fd(), name)?;
        }
        if xattr_whiteout && marks.whiteout {
            return Ok(Probe::Whiteout);
        }
        let recorded =
            marks.record.as_deref().filter(|_| records).and_then(|r| self.owners.read_record(r, kind));
        let meta = match recorded {
            Some(meta) => meta,
            None if dir.layer == UPPER => self.unrecorded(&stat, kind)?,
            None => self.owners.shown(self.layers[dir.layer as usize].meta(&stat).ok_or(Errno::IO)?),
        };
        Ok(Probe::Found(Box::new(Seen { stat, meta, marks })))
    }

    /// Whether marks in a directory of a layer count.
    pub(crate) fn whiteouts(&self, dir: &RealDir) -> bool {
        dir.layer == UPPER || self.layers[dir.layer as usize].whiteouts
    }

    /// Owner and mode of an object of the upper without an xattr that says them.
    fn unrecorded(&self, stat: &Stat, kind: Kind) -> Res<Meta> {
        let mut meta = self.owners.unrecorded(stat, kind);
        if (kind == Kind::Symlink || kind.is_special())
            && let Some((uid, gid)) = self.upper()?.sidecar.owner(stat)?
        {
            meta = self.owners.shown(Meta { uid, gid, ..meta });
        }
        Ok(meta)
    }

    /// Looks for `name` in a directory; the caller holds (at least) its read lock.
    pub(crate) fn resolve(&self, parent: &Node, state: &DirState, name: &[u8]) -> Res<Option<Found>> {
        if state.removed {
            return Ok(None);
        }
        let part = parent.dir()?;
        let mut dirs = DirState::default();
        let mut descent = Descent::new(&state.lowers, name);
        let mut top: Option<(Meta, Marks, Stat)> = None;
        let mut upper_dir = None;
        let mut upper_seen = None;

        if let Some(upper) = part.upper.get() {
            let probed = loop {
                let gone = self.entries_gone();
                match self.probe(upper, name, state.has_lower())? {
                    Probe::Found(seen) if seen.stat.kind() != Some(Kind::Dir) => {
                        let found = self.found_in_upper(*seen)?;
                        // An entry says what the marks say when it has gone, which may be after they were read.
                        if found.origin.is_some() || self.entries_gone() == gone {
                            return Ok(Some(found));
                        }
                    }
                    other => break other,
                }
            };
            match probed {
                Probe::Missing => {}
                Probe::Whiteout => return Ok(None),
                Probe::Found(seen) => {
                    let Seen { stat, meta, marks } = *seen;
                    let dir = RealDir::child(upper, name, stat.key);
                    marks.note(&dir);
                    let opaque = marks.opaque;
                    if !opaque && let Some(redirect) = &marks.redirect {
                        descent.turn(redirect, self.layers.len());
                        dirs.redirect = Some(redirect[..].into());
                    }
                    upper_dir = Some(dir);
                    upper_seen = Some(stat.key);
                    top = Some((meta, marks, stat));
                    if opaque {
                        return Ok(Some(self.found_dir(parent, name, top, upper_dir, upper_seen, dirs)));
                    }
                }
            }
        }

        if let InMemory::Object(index) = descent.in_memory(&self.generated, state.generated) {
            let node = self.generated.node(index);
            if !matches!(node.body, GenBody::Dir(_)) {
                if top.is_some() {
                    return Ok(Some(self.found_dir(parent, name, top, upper_dir, upper_seen, dirs)));
                }
                return Ok(Some(Found {
                    ino: node.number,
                    meta: self.generated_meta(index),
                    stat: Some(self.generated_stat(index)),
                    key: Key { dev: u64::MAX, ino: u64::from(index) },
                    aliased: false,
                    extra_links: 0,
                    below: 0,
                    entry: false,
                    origin: None,
                    place: Place::Generated(index),
                    marks: Marks::default(),
                    upper: None,
                    state: dirs,
                }));
            }
            dirs.generated = Some(index);
            if top.is_none() && node.explicit {
                top = Some((self.generated_meta(index), Marks::default(), self.generated_stat(index)));
            }
        }

        let mut hidden = false;
        while let Some(step) = descent.step(self)? {
            let lower = match &step {
                Step::Beside(at) => &state.lowers[*at],
                Step::Along(dir) => dir,
            };
            let name = descent.name();
            if lower.hides(name) {
                hidden = true;
                continue;
            }
            let any_dir = top.is_some() || dirs.generated.is_some() || hidden || !dirs.lowers.is_empty();
            match self.probe(lower, name, descent.goes_on())? {
                Probe::Missing => {}
                Probe::Whiteout => break,
                Probe::Found(seen) if seen.stat.kind() != Some(Kind::Dir) => {
                    if any_dir {
                        break;
                    }
                    let Seen { stat, meta, .. } = *seen;
                    let number = self.numbers.number(stat.key);
                    let below = if stat.nlink > 1 { stat.nlink } else { 0 };
                    let ino = if below > 0 {
                        self.alias(stat.key).unwrap_or(number)
                    } else {
                        self.number_at(parent, name, number, lower.repeats(descent.name()))
                    };
                    if below > 0
                        && let Some((seen, place)) = self.copy_of(number, &stat, || {
                            changed_below(stat_at(self.fd(lower)?.as_fd(), name))
                        })?
                    {
                        return self.found_by_entry(*seen, place, number).map(Some);
                    }
                    let covered = match &self.upper {
                        Some(upper) if below > 0 => upper.links.covered(number),
                        _ => 0,
                    };
                    let place = Place::Lower { dir: lower.clone(), name: name.into() };
                    return Ok(Some(Found {
                        ino,
                        meta,
                        stat: Some(stat),
                        key: stat.key,
                        aliased: false,
                        extra_links: -i64::from(covered),
                        below,
                        entry: false,
                        origin: None,
                        place,
                        marks: Marks::default(),
                        upper: None,
                        state: dirs,
                    }));
                }
                Probe::Found(seen) => {
                    let Seen { stat, meta, marks } = *seen;
                    let dir = RealDir::child(lower, name, stat.key);
                    marks.note(&dir);
                    if marks.opaque {
                        descent.end();
                    } else if let Some(redirect) = &marks.redirect {
                        descent.turn(redirect, usize::try_from(lower.layer).unwrap_or(0));
                    }
                    dirs.lowers.push(dir);
                    // An implicit generated parent or a hidden directory says nothing
                    // about the owner if a layer does.
                    if top.is_none() {
                        top = Some((meta, marks, stat));
                    }
                }
            }
        }
        if top.is_none() && !hidden && dirs.generated.is_none() {
            return Ok(None);
        }
        Ok(Some(self.found_dir(parent, name, top, upper_dir, upper_seen, dirs)))
    }

    /// A name of a layer leads to a copy.
    fn found_by_entry(&self, seen: Seen, place: Parked, number: u64) -> Res<Found> {
        let found =
            self.found_in_upper(Seen { stat: Stat { nlink: seen.stat.nlink.max(2), ..seen.stat }, ..seen })?;
        // The attributes come later: the name will be in the upper by then.
        Ok(Found { ino: number, stat: None, place: Place::Parked(Arc::new(place)), ..found })
    }

    fn found_in_upper(&self, seen: Seen) -> Res<Found> {
        let links = self.links_of(&seen)?;
        let Seen { stat, meta, marks } = seen;
        let alias = self.alias(stat.key);
        let written = if crate::sidecar::is_needed(&stat) {
            self.upper()?.sidecar.number(&stat)?
        } else {
            marks.origin.or(marks.number)
        };
        let origin =
            links.map(|known| known.number).or_else(|| written.map(|origin| self.numbers.of(origin)));
        let ino = alias.or(origin).unwrap_or_else(|| self.numbers.number(stat.key));
        Ok(Found {
            ino,
            meta,
            stat: Some(stat),
            key: stat.key,
            aliased: alias.is_some(),
            extra_links: links.map_or(0, |known| i64::from(known.left) - 1),
            below: 0,
            entry: links.is_some(),
            origin,
            place: Place::Upper,
            marks,
            upper: None,
            state: DirState::default(),
        })
    }

    pub(crate) fn alias(&self, key: Key) -> Option<u64> {
        self.table.aliases.get(key)
    }

    fn found_dir(
        &self,
        parent: &Node,
        name: &[u8],
        top: Option<(Meta, Marks, Stat)>,
        upper: Option<Arc<RealDir>>,
        upper_key: Option<Key>,
        state: DirState,
    ) -> Found {
        let (uid, gid) = self.owners.default;
        let (meta, marks, mut stat) = top.unwrap_or_else(|| match state.generated {
            Some(index) => (self.generated_meta(index), Marks::default(), self.generated_stat(index)),
            None => {
                let meta = Meta { kind: Kind::Dir, perm: 0o755, uid, gid, rdev: (0, 0) };
                (meta, Marks::default(), self.synthetic_stat())
            }
        });
        let sources =
            usize::from(upper.is_some()) + state.lowers.len() + usize::from(state.generated.is_some());
        if sources != 1 {
            stat.nlink = 1;
        }
        // The number stays what it was before a copy-up: that of the topmost layer.
        let lower = state.lowers.first();
        let lower_key = lower.map(|dir| dir.key);
        let written = marks.origin.or(marks.number).filter(|_| upper.is_some());
        let number = |key| self.numbers.number(key);
        let below = |dir: &Arc<RealDir>| {
            let repeats = dir.hidden.as_ref().is_some_and(|hidden| hidden.repeated);
            self.number_at(parent, name, number(dir.key), repeats)
        };
        let origin = written.map(|origin| self.numbers.of(origin)).or_else(|| lower.map(below));
        let alias = upper_key.and_then(|key| self.alias(key));
        let ino = match (alias.or(origin), upper_key, state.generated) {
            (Some(ino), ..) => ino,
            (None, Some(key), _) => number(key),
            (None, None, Some(index)) => self.generated.node(index).number,
            (None, None, None) => self.synthetic_number(parent, name),
        };
        Found {
            ino,
            meta,
            stat: Some(stat),
            key: upper_key.or(lower_key).unwrap_or_default(),
            aliased: alias.is_some(),
            extra_links: 0,
            below: 0,
            entry: false,
            origin,
            place: Place::Upper,
            marks,
            upper,
            state,
        }
    }

    /// The number of a directory, or of a file with one name, that a layer has: its own, `number`, or that of
    /// its place.
    pub(crate) fn number_at(&self, parent: &Node, name: &[u8], number: u64, repeats: bool) -> u64 {
        let of_place = || InodeNumbers::of_place(number, parent.ino, name);
        if repeats || InodeNumbers::is_clashed(parent.ino) {
            return of_place();
        }
        self.table.aliases.place(of_place).unwrap_or(number)
    }

    /// The number of a hidden directory.
    pub(crate) fn synthetic_number(&self, parent: &Node, name: &[u8]) -> u64 {
        InodeNumbers::clashed(parent.ino, crate::numbers::hash(0, name))
    }

    /// The node of what a lookup found, made if it is not known, and the stat that was found if it
    /// still says everything. The caller holds (at least) the parent's read lock, so that nothing found
    /// can have changed since.
    fn intern(&self, parent: &Arc<Node>, name: &[u8], found: Found) -> (Arc<Node>, Option<Stat>) {
        let kind = found.meta.kind;
        let (key, number) = (found.key, found.ino);
        let generated = matches!(found.place, Place::Generated(_));
        let far = match &found.place {
            Place::Lower { dir, name } => match dir.far_at(name) {
                Some(far) => Some((far.clone(), true)),
                None => dir.far.clone().map(|far| (far, false)),
            },
            _ => far_of(&found.state.lowers),
        };
        // What a layer has under one name only cannot be a further name of what is known: its number
        // was used again, for a file that somebody put there since.
        let below = matches!(found.place, Place::Lower { .. });
        let single = below && found.stat.is_some_and(|s| s.nlink <= 1);
        let same = |node: &Node| {
            if node.kind != kind {
                return false;
            }
            let inner = node.inner.lock();
            if kind == Kind::Dir {
                // One directory can be mounted in two places of a layer: two nodes.
                return !matches!(inner.place, Place::Gone(_))
                    && inner.links.iter().any(|l| l.is(parent, name));
            }
            match inner.place {
                Place::Gone(_) => false,
                _ if single && !inner.links.iter().any(|l| l.is(parent, name)) => false,
                // Just copied up, and without a name in the upper; this is one that a layer has of it.
                Place::Parked(_) if inner.entry && below && inner.origin == Some(number) => true,
                // Held open without a known name: the same file if the disk says so.
                Place::Unlinked(_) | Place::Parked(_) => inner.key == key,
                Place::Generated(_) => generated,
                _ => inner.key == key || below && inner.origin == Some(number),
            }
        };
        let link = Link { parent: parent.clone(), name: name.into() };
        let (aliased, mut stat) = (found.aliased, found.stat);
        let in_upper = matches!(found.place, Place::Upper);
        // Of what has one name in a layer the key does not tell at which of several places it is.
        let at_place = if kind == Kind::Dir { found.upper.is_none() } else { single };
        let seed = || if at_place { crate::numbers::hash(parent.ino, name) } else { 1 };
        let node = self.table.intern(found.ino, seed, same, || NewNode {
            kind,
            inner: Inner {
                meta: found.meta,
                key,
                origin: found.origin,
                place: found.place,
                links: vec![link.clone()],
                extra_links: found.extra_links,
                below: found.below,
                entry: found.entry,
                has_record: found.marks.record.is_some(),
                has_acl: found.marks.acl,
                no_capability: found.marks.was_read && !found.marks.capability,
            },
            upper: found.upper,
            state: DirState { default_acl: self.known_default_acl(&found.marks), ..found.state },
        });
        if let Some(far) = far {
            let _ = node.far.set(far);
        }
        if at_place {
            if node.ino != number {
                self.table.aliases.insert_place(node.ino);
            }
        } else if aliased || node.ino != number {
            // It may have gone with the node that was known before; or the number is in use.
            self.table.aliases.insert(key, node.ino);
        }
        if kind != Kind::Dir {
            let mut inner = node.inner.lock();
            let mut before = None;
            if !inner.links.iter().any(|l| l.is(parent, name)) {
                // It had further names on disk after all.
                if in_upper && matches!(inner.place, Place::Unlinked(_) | Place::Parked(_)) {
                    before = Some(std::mem::replace(&mut inner.place, Place::Upper));
                    inner.links.insert(0, link);
                } else {
                    inner.links.push(link);
                }
            }
            // Where names are not all on disk they are counted anew.
            let plain = inner.extra_links == 0 && !inner.entry;
            stat = stat.filter(|_| plain && node.names.settled().is_some());
            drop(inner);
            // The name in the work directory counted, and goes with this.
            stat = stat.filter(|_| !matches!(before, Some(Place::Parked(_))));
            drop(before);
        }
        (node, stat)
    }

    /// The node that `name` stands for, or `ENOENT`.
    pub(crate) fn lookup(&self, parent: &Arc<Node>, name: &[u8]) -> Res<Arc<Node>> {
        self.lookup_stat(parent, name).map(|(node, _)| node)
    }

    /// The same with its attributes, without asking the disk twice.
    pub(crate) fn lookup_attr(&self, parent: &Arc<Node>, name: &[u8]) -> Res<(Arc<Node>, Attr)> {
        let (node, stat) = self.lookup_stat(parent, name)?;
        let attr = match stat {
            Some(stat) => self.report(&node, stat),
            None => self.attr(&node)?,
        };
        Ok((node, attr))
    }

    /// The attributes of what `name` stands for, of which the kernel is about to learn; with its node,
    /// unless it is nothing but a name so far. Must be followed by a reply, or by [`Table::forget`].
    ///
    /// [`Table::forget`]: crate::inode::Table::forget
    pub(crate) fn lookup_known(&self, parent: &Arc<Node>, name: &[u8]) -> Res<(Option<Arc<Node>>, Attr)> {
        let state = parent.dir()?.state.read();
        let found = self.find(parent, &state, name)?;
        let plain = self.plain(parent, name, &found);
        if let Some(attr) = plain.and_then(|plain| self.remember_plain(plain)) {
            return Ok((None, attr));
        }
        let (node, stat) = self.settle(parent, state, name, found);
        self.table.remember(&node);
        let attr = stat.map_or_else(|| self.attr(&node), |stat| Ok(self.report(&node, stat)));
        let attr = attr.inspect_err(|_| self.table.forget(node.ino, 1))?;
        Ok((Some(node), attr))
    }

    /// What the kernel can learn of without a node: of what was found, if it has one name, in a layer, and
    /// there is nothing to keep about it.
    pub(crate) fn plain(&self, parent: &Arc<Node>, name: &[u8], found: &Found) -> Option<Plain> {
        let stat = found.stat.filter(|stat| stat.nlink == 1 && self.live.is_none())?;
        let Place::Lower { dir, name: lower_name } = &found.place else { return None };
        let far = dir.far.is_some() || dir.far_at(lower_name).is_some();
        if found.meta.kind == Kind::Dir || far || **lower_name != *name {
            return None;
        }
        let named = Named {
            parent: parent.clone(),
            dir: dir.clone(),
            name: lower_name.clone(),
            key: found.key,
            kind: found.meta.kind,
            perm: found.meta.perm,
            uid: found.meta.uid,
            gid: found.meta.gid,
            rdev: found.meta.rdev,
            has_record: found.marks.record.is_some(),
            has_acl: found.marks.acl,
            no_capability: found.marks.was_read && !found.marks.capability,
        };
        Some(Plain { ino: found.ino, stat, named: Box::new(named) })
    }

    /// The attributes of that, if the kernel may learn of it now, as with [`Engine::lookup_known`]. The caller
    /// holds the parent's lock.
    pub(crate) fn remember_plain(&self, plain: Plain) -> Option<Attr> {
        let Plain { ino, stat, named } = plain;
        let meta = named.meta();
        self.table.remember_name(ino, named).then(|| self.report_as(ino, meta, stat, 0))
    }

    /// What a name in a directory stands for. The caller holds (at least) its read lock.
    pub(crate) fn find(&self, parent: &Node, state: &DirState, name: &[u8]) -> Res<Found> {
        if let Some(listing) = state.listing.as_ref().filter(|l| !l.partial && self.live.is_none())
            && !listing.contains(&self.hasher, name)
        {
            return Err(Errno::NOENT);
        }
        let found = self.resolve(parent, state, name)?.ok_or(Errno::NOENT)?;
        if self.hooks.trace.is_some() {
            self.trace_found(&found);
        }
        Ok(found)
    }

    /// The same, with its stat where that is known without asking the disk again.
    pub(crate) fn lookup_stat(&self, parent: &Arc<Node>, name: &[u8]) -> Res<(Arc<Node>, Option<Stat>)> {
        let state = parent.dir()?.state.read();
        let found = self.find(parent, &state, name)?;
        Ok(self.settle(parent, state, name, found))
    }

    /// The node of what was found, with its stat if that still says everything.
    fn settle(
        &self,
        parent: &Arc<Node>,
        state: RwLockReadGuard<'_, DirState>,
        name: &[u8],
        found: Found,
    ) -> (Arc<Node>, Option<Stat>) {
        let below = matches!(found.place, Place::Lower { .. } | Place::Generated(_) | Place::Parked(_));
        let fresh = self.live.map(|_| Fresh {
            meta: found.meta,
            key: found.key,
            place: found.place.clone(),
            lowers: found.state.lowers.clone(),
            in_upper: found.upper.is_some(),
        });
        let (node, stat) = self.intern(parent, name, found);
        if let Some(fresh) = fresh {
            self.renew(&node, fresh);
        }
        drop(state);
        if below && node.kind != Kind::Dir && node.is_upper() {
            // A further name of a file that was copied up under another one.
            if let Err(err) = self.materialise(&node, parent, name) {
                tracing::debug!(?err, "a hard link is not in the upper yet");
            }
            return (node, None);
        }
        (node, stat)
    }

    /// Of a directory the topmost layer counts, as for its attributes.
    fn trace_found(&self, found: &Found) {
        match (&found.place, found.state.lowers.first()) {
            (Place::Lower { dir, name }, _) => self.trace(dir, Some(name), AccessKind::LookedUp),
            (_, Some(dir)) if found.upper.is_none() => self.trace(dir, None, AccessKind::LookedUp),
            _ => {}
        }
    }

    /// Whether something of this name would show if the upper had nothing at it. The
    /// caller holds the parent's lock.
    pub(crate) fn covers_lower(&self, state: &DirState, name: &[u8]) -> Res<bool> {
        if state.generated.and_then(|dir| self.generated.child(dir, name)).is_some() {
            return Ok(true);
        }
        for (at, lower) in state.lowers.iter().enumerate() {
            if lower.hides(name) {
                return Ok(true);
            }
            match self.probe(lower, name, at + 1 < state.lowers.len())? {
                Probe::Missing => {}
                Probe::Whiteout => return Ok(false),
                Probe::Found(_) => return Ok(true),
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{LayerSpec, OverlaySpec};
    use crate::engine::tests::Scratch;
    use rustix::fs::XattrFlags;

    /// The number of a path as the kernel learns it, and forgets it again.
    fn number(engine: &Engine, path: &str) -> u64 {
        let mut at = engine.root().clone();
        let mut names = path.split('/').peekable();
        while let Some(name) = names.next() {
            if names.peek().is_some() {
                at = engine.lookup(&at, name.as_bytes()).expect("a directory");
                continue;
            }
            let (node, attr) = engine.lookup_known(&at, name.as_bytes()).expect("found");
            drop(node);
            let listed = engine.read_dir(&at, 2, 99).expect("listed");
            let entry = listed.iter().find(|(_, entry)| *entry.name == *name.as_bytes()).expect("an entry");
            assert_eq!(entry.1.ino, attr.ino, "{path}");
            engine.table.forget(attr.ino, 1);
            return attr.ino;
        }
        at.ino
    }

    /// Each path has one number, in whatever order they are looked up and forgotten.
    fn stay(engine: &Engine, paths: &[&str]) -> Vec<u64> {
        let numbers: Vec<u64> = paths.iter().map(|path| number(engine, path)).collect();
        for _ in 0..3 {
            for (path, first) in paths.iter().zip(&numbers).rev() {
                assert_eq!(number(engine, path), *first, "{path}");
            }
        }
        let mut distinct = numbers.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), numbers.len(), "{numbers:?}");
        numbers
    }

    /// `a/f`, `a/sub/g` and a link in the layer.
    fn fill(scratch: &Scratch) {
        let lower = scratch.dir.join("lower");
        std::fs::create_dir_all(lower.join("a/sub")).expect("made");
        std::fs::write(lower.join("a/f"), "lower").expect("written");
        std::fs::write(lower.join("a/sub/g"), "lower").expect("written");
        std::os::unix::fs::symlink("x", lower.join("a/l")).expect("linked");
    }

    #[test]
    fn a_layer_within_another_has_numbers_of_its_own() {
        let scratch = Scratch::new("within");
        fill(&scratch);
        let mut spec = scratch.spec();
        spec.layers.push(LayerSpec { dir: scratch.dir.join("lower/a"), ..LayerSpec::default() });
        let paths = ["f", "a/f", "l", "a/l", "sub", "a/sub", "sub/g", "a/sub/g"];
        let open = |spec: &OverlaySpec| Engine::open(spec).expect("an overlay");
        let mut engine = open(&spec);
        let numbers = stay(&engine, &paths);
        // The other order first, in another mount.
        engine = open(&spec);
        for (path, first) in paths.iter().zip(&numbers).rev() {
            assert_eq!(number(&engine, path), *first, "{path}");
        }
        // Of two places of a file one changes, and both keep their numbers.
        let dir = engine.lookup(engine.root(), b"a").expect("found");
        let file = engine.lookup(&dir, b"f").expect("found");
        let other = engine.lookup(engine.root(), b"f").expect("found");
        assert_eq!(engine.write(&file, 0, b"upper", false), Ok(5));
        let mut bytes = [0; 5];
        assert_eq!((engine.read(&other, 0, &mut bytes), &bytes), (Ok(5), b"lower"));
        drop((dir, file, other));
        assert_eq!(stay(&engine, &paths), numbers);
        engine = open(&spec);
        assert_eq!(stay(&engine, &paths), numbers);
    }

    #[test]
    fn places_that_nobody_told_of_keep_their_numbers() {
        let scratch = Scratch::new("places");
        fill(&scratch);
        for name in ["x", "y"] {
            let dir = scratch.dir.join("upper").join(name);
            std::fs::create_dir(&dir).expect("made");
            let fd = crate::layer::open_root(&dir).expect("opened");
            let at = At::Name(fd.as_fd(), b".");
            crate::sys::set_xattr(at, crate::xattr::REDIRECT, b"/a", XattrFlags::empty()).expect("set");
        }
        let engine = &scratch.engine;
        let look = |dir: &str, name: &str| {
            let dir = engine.lookup(engine.root(), dir.as_bytes()).expect("found");
            engine.lookup(&dir, name.as_bytes()).expect("found")
        };
        // All at once: who comes second has another number, and keeps it.
        let held = [look("a", "f"), look("x", "f"), look("y", "f"), look("a", "sub"), look("x", "sub")];
        let paths = ["a/f", "x/f", "y/f", "a/sub", "x/sub"];
        let numbers: Vec<u64> = held.iter().map(|node| node.ino).collect();
        let again: Vec<u64> = paths.iter().map(|path| number(engine, path)).collect();
        assert_eq!(again, numbers);
        drop(held);
        assert_eq!(stay(engine, &paths), numbers);
        stay(engine, &["x/f", "a/f", "y/f", "x/sub/g", "a/sub/g", "x/l", "y/l", "a/l"]);
    }

    #[test]
    fn an_unlinked_file_is_not_what_another_place_has() {
        let scratch = Scratch::new("unlinked");
        fill(&scratch);
        let dir = scratch.dir.join("upper/x");
        std::fs::create_dir(&dir).expect("made");
        let fd = crate::layer::open_root(&dir).expect("opened");
        let at = At::Name(fd.as_fd(), b".");
        crate::sys::set_xattr(at, crate::xattr::REDIRECT, b"/a", XattrFlags::empty()).expect("set");
        let engine = &scratch.engine;
        let a = engine.lookup(engine.root(), b"a").expect("found");
        let file = engine.lookup(&a, b"f").expect("found");
        assert_eq!(engine.unlink(&a, b"f"), Ok(()));
        let x = engine.lookup(engine.root(), b"x").expect("found");
        let other = engine.lookup(&x, b"f").expect("found");
        assert_ne!(other.ino, file.ino);
        assert_eq!(engine.attr(&file).map(|attr| attr.stat.nlink), Ok(0));
        assert_eq!(engine.attr(&other).map(|attr| attr.stat.nlink), Ok(1));
    }
}
