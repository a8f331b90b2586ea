//! Layers that others change while they are mounted ([`crate::OverlaySpec::live`]).
//!
//! The kernel is told to ask again after a while for whatever a layer has a say in: names, missing names,
//! attributes, listings; what is in the upper alone it goes on keeping for ever. Asked again, a name is
//! resolved anew; this module brings the [`Node`] that it still is up to date. What stands at a name
//! instead of it is another node.
//!
//! Two things that make the overlay fast are off then. The writeback cache, because with it the kernel
//! takes no size and no time of a file from us: a file that grew would never be read to its end. Without it
//! the kernel drops the pages of a file whose size or modification time changed. And listings that need no
//! OPENDIR, because the kernel would go on showing the one it has.
//!
//! Descriptors stay with the object that they were opened on, as anywhere.

use std::sync::Arc;
use std::time::Duration;

use crate::attr::{Attr, Key, Kind, Meta};
use crate::engine::Engine;
use crate::errno::Res;
use crate::inode::{Node, Place};
use crate::layer::RealDir;
use crate::lookup::Probe;

/// A name in a directory of a layer.
type Name = (Arc<RealDir>, Arc<[u8]>);

/// What a lookup found of an object, for the node that it is already.
#[derive(Debug)]
pub(crate) struct Fresh {
    pub(crate) meta: Meta,
    pub(crate) key: Key,
    pub(crate) place: Place,
    pub(crate) lowers: Vec<Arc<RealDir>>,
    pub(crate) in_upper: bool,
}

impl Engine {
    /// How long what is known of an object stays true; `None`: for ever.
    pub(crate) fn lasting(&self, node: &Node) -> Option<Duration> {
        self.live.filter(|_| match &node.dir {
            None => !node.is_upper() && !matches!(node.inner.lock().place, Place::Generated(_)),
            Some(part) => {
                // One of the same name can come to merge with it.
                let parent = node.first_link().map(|link| link.parent);
                part.state.read().has_lower() || parent.is_some_and(|p| self.lasting_names(&p).is_some())
            }
        })
    }

    /// The same for names that are missing in a directory.
    pub(crate) fn lasting_names(&self, dir: &Node) -> Option<Duration> {
        self.live.filter(|_| dir.dir.as_ref().is_some_and(|part| !part.state.read().lowers.is_empty()))
    }

    /// Brings a node up to date with what was found under its name. The lock of its parent is held, so
    /// that no change of ours can be on its way; nobody is waited for, since the locks of two
    /// directories are taken in another order elsewhere. Who holds it has looked just now, or the next
    /// lookup will.
    pub(crate) fn renew(&self, node: &Node, fresh: Fresh) {
        if let Some(part) = &node.dir {
            let Some(mut state) = part.state.try_write() else { return };
            let keys = |dirs: &[Arc<RealDir>]| dirs.iter().map(|dir| dir.key).collect::<Vec<_>>();
            if keys(&state.lowers) != keys(&fresh.lowers) {
                state.lowers = fresh.lowers;
            }
            if fresh.in_upper || part.upper.get().is_some() {
                return;
            }
            let mut inner = node.inner.lock();
            (inner.meta, inner.key) = (fresh.meta, fresh.key);
            return;
        }
        let mut inner = node.inner.lock();
        if matches!((&inner.place, &fresh.place), (Place::Lower { .. }, Place::Lower { .. }))
            && inner.key == fresh.key
        {
            inner.meta = fresh.meta;
            let before = std::mem::replace(&mut inner.place, fresh.place);
            drop(inner);
            drop(before);
        }
    }

    /// The attributes of an object as they are now, owner and mode included.
    pub(crate) fn attr_now(&self, node: &Arc<Node>) -> Res<Attr> {
        if let Some((far, _)) = node.far.get() {
            if node.names.settled().is_none() {
                // Who changes its names does so afar.
                far.check()?;
            }
            self.see_far_root(node)?;
        }
        if self.live.is_some()
            && let Some((dir, name)) = self.lower_name(node)
            && let Probe::Found(seen) = self.probe(&dir, &name, true)?
        {
            let mut inner = node.inner.lock();
            if inner.key == seen.stat.key && !matches!(inner.place, Place::Upper if node.kind != Kind::Dir) {
                inner.meta = seen.meta;
            }
        }
        self.attr(node)
    }

    /// The name in a layer that decides the attributes, if a layer does.
    fn lower_name(&self, node: &Node) -> Option<Name> {
        let Some(part) = &node.dir else {
            return match &node.inner.lock().place {
                Place::Lower { dir, name } => Some((dir.clone(), name.clone())),
                _ => None,
            };
        };
        let state = part.state.read();
        let explicit = state.generated.is_some_and(|g| self.generated.node(g).explicit);
        let lower = state.lowers.first().filter(|_| part.upper.get().is_none() && !explicit);
        lower.and_then(|dir| dir.position())
    }
}
