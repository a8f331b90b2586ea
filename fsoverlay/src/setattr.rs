//! chmod, chown, truncate and utimens.
//!
//! Owner and mode are recorded ([`crate::attr`]); size and times are the disk's. The
//! kernel has already decided whether the caller may do it (`default_permissions`).

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{AtFlags, Mode, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, XattrFlags};

use crate::attr::{Attr, Kind, Meta, Time};
use crate::engine::{Content, Engine};
use crate::errno::{Errno, Res};
use crate::inode::Node;
use crate::sys;
use crate::xattr::{RECORD, Target};

/// A time to set.
#[derive(Debug, Clone, Copy)]
pub(crate) enum SetTime {
    Now,
    At(Time),
}

/// What is to change.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct SetAttr {
    pub(crate) perm: Option<u32>,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
    pub(crate) size: Option<u64>,
    /// A change of size takes set*id bits away.
    pub(crate) kill: bool,
    pub(crate) atime: Option<SetTime>,
    pub(crate) mtime: Option<SetTime>,
}

fn spec(time: Option<SetTime>) -> Timespec {
    match time {
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        Some(SetTime::Now) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        Some(SetTime::At(time)) => Timespec { tv_sec: time.sec, tv_nsec: i64::from(time.nsec) },
    }
}

impl Engine {
    pub(crate) fn set_attr(&self, node: &Arc<Node>, set: SetAttr) -> Res<Attr> {
        let SetAttr { perm, uid, gid, size, atime, mtime, .. } = set;
        self.upper()?;
        if size.is_some() && node.kind != Kind::File {
            return Err(if node.kind == Kind::Dir { Errno::ISDIR } else { Errno::INVAL });
        }
        let nothing = perm.is_none() && uid.is_none() && gid.is_none() && size.is_none();
        if nothing && atime.is_none() && mtime.is_none() {
            return self.attr(node);
        }
        self.copy_up_limited(node, size.unwrap_or(u64::MAX))?;
        self.touch_meta(node)?;
        self.settled(node, || self.apply(node, set))?;
        self.attr(node)
    }

    /// The same for an object of the upper.
    fn apply(&self, node: &Arc<Node>, set: SetAttr) -> Res<()> {
        let SetAttr { perm, uid, gid, size, kill, atime, mtime } = set;
        if let Some(size) = size {
            match self.open_file(node, true)? {
                Content::File(fd) => rustix::fs::ftruncate(&fd, size)?,
                Content::Memory(_) => return Err(Errno::IO),
            }
            self.drop_privileges(node, kill)?;
        }
        if perm.is_some() || uid.is_some() || gid.is_some() {
            let mut meta = node.inner.lock().meta;
            if uid.is_some() || gid.is_some() {
                meta = meta.without_set_ids();
                self.drop_capability(node)?;
            }
            meta.uid = uid.unwrap_or(meta.uid);
            meta.gid = gid.unwrap_or(meta.gid);
            if let Some(perm) = perm {
                meta.perm = perm & 0o7777;
                self.chmod_acl(node, perm)?;
            }
            self.store_meta(node, meta)?;
        }
        if atime.is_some() || mtime.is_some() {
            let times = Timestamps { last_access: spec(atime), last_modification: spec(mtime) };
            let (target, _) = self.target(node)?;
            match target {
                Target::File(fd) => rustix::fs::futimens(&fd, &times)?,
                Target::Name(dir, name) => {
                    rustix::fs::utimensat(&dir, &*name, &times, AtFlags::SYMLINK_NOFOLLOW)?;
                }
                Target::None => {}
            }
        }
        Ok(())
    }

    /// Notes a change that is about to happen to an object's attributes.
    pub(crate) fn touch_meta(&self, node: &Arc<Node>) -> Res<()> {
        let upper = self.touch()?;
        if node.kind == Kind::Dir {
            upper.dir_meta_changed.store(true, Ordering::Release);
        }
        self.note_object(node)
    }

    /// What a change of content takes away: file capabilities always, set*id bits if `kill` says so.
    pub(crate) fn drop_privileges(&self, node: &Arc<Node>, kill: bool) -> Res<()> {
        self.drop_capability(node)?;
        if !kill {
            return Ok(());
        }
        let meta = node.inner.lock().meta;
        let without = meta.without_set_ids();
        if without != meta { self.store_meta(node, without) } else { Ok(()) }
    }

    /// Records the owner and mode of an object of the upper. The disk's change time
    /// moves in every case, as it must after chmod and chown.
    pub(crate) fn store_meta(&self, node: &Arc<Node>, meta: Meta) -> Res<()> {
        let had_record = node.inner.lock().has_record;
        let (target, _) = self.target(node)?;
        let needed = meta.needs_record(self.default_owner) || Self::is_root(node);
        // A link, and a fifo or socket that somebody else put into the upper, cannot hold
        // an xattr.
        let mut by_sidecar = node.kind == Kind::Symlink;
        if let (Target::Name(dir, name), true) = (&target, node.kind.is_special()) {
            by_sidecar = crate::layer::stat_at(dir.as_fd(), name)?.kind() != Some(Kind::File);
        }
        if by_sidecar {
            if let Target::Name(dir, name) = &target {
                let stat = crate::layer::stat_at(dir.as_fd(), name)?;
                let owner = (meta.uid, meta.gid);
                let sidecar = &self.upper()?.sidecar;
                sidecar.set_owner(&stat, (owner != self.default_owner).then_some(owner))?;
                if node.kind != Kind::Symlink {
                    let mode = Mode::from_raw_mode(meta.perm & 0o777);
                    sys::chmod_special(dir.as_fd(), name, mode)?;
                }
                // Changes nothing but the change time.
                rustix::fs::chownat(dir, &**name, None, None, AtFlags::SYMLINK_NOFOLLOW)?;
            }
        } else if let Some(at) = target.at() {
            // Before the mode: a crash in between must not leave a mode that was never
            // asked for together with an old record.
            if needed {
                sys::set_xattr(at, RECORD, meta.to_record().as_bytes(), XattrFlags::empty())?;
            }
            let mode = Mode::from_raw_mode(meta.disk_perm());
            match &target {
                Target::File(fd) => rustix::fs::fchmod(fd, mode)?,
                // The upper's own directory keeps the mode that its owner gave it.
                Target::Name(dir, _) if node.kind == Kind::Dir && !Self::is_root(node) => {
                    rustix::fs::chmodat(dir, c".", mode, AtFlags::empty())?;
                }
                _ => {}
            }
            if !needed && had_record {
                match sys::remove_xattr(at, RECORD) {
                    Ok(()) | Err(Errno::NODATA) => {}
                    Err(err) => return Err(err),
                }
            }
        }
        let mut inner = node.inner.lock();
        inner.meta = meta;
        inner.has_record = needed && !by_sidecar;
        Ok(())
    }

    /// [`crate::CHOWN_XATTR`]: `UID:GID`, `-1` keeps.
    pub(crate) fn chown_by_xattr(&self, node: &Arc<Node>, value: &[u8]) -> Res<()> {
        let text = std::str::from_utf8(value).map_err(|_| Errno::INVAL)?;
        let (uid, gid) = text.split_once(':').ok_or(Errno::INVAL)?;
        let id = |text: &str| -> Res<Option<u32>> {
            if text == "-1" { Ok(None) } else { text.parse().map(Some).map_err(|_| Errno::INVAL) }
        };
        let set = SetAttr { uid: id(uid)?, gid: id(gid)?, ..SetAttr::default() };
        self.set_attr(node, set).map(drop)
    }
}
