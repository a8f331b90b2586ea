//! chmod, chown, truncate and utimens.
//!
//! Where owner and mode are kept is [`crate::ownership`]'s; size and times are the disk's. The
//! kernel has already decided whether the caller may do it (`default_permissions`).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{AtFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};

use crate::attr::{Attr, Kind, Time};
use crate::engine::Engine;
use crate::errno::{Errno, Res, is_much, may_take_long_unless};
use crate::inode::Node;
use crate::object::Content;
use crate::xattr::Target;

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
        // The kernel writes back the times of a file that has lost a name, or has another one now. Of these only that of the
        // last modification can be set, and it is there already. A file of a layer would be copied for it: in vain, once it
        // has no name. (With one it has to be, since the layer counts the name that is covered now.)
        if nothing && let (Kind::File, None, Some(SetTime::At(time))) = (node.kind, atime, mtime) {
            let attr = self.attr(node)?;
            if attr.stat.mtime == time && (attr.stat.nlink == 0 || node.is_upper()) {
                return Ok(attr);
            }
        }
        if let Some(size) = size.filter(|_| node.is_upper()) {
            // What the file had is given back, block by block.
            let goes = || self.stat(node).map_or(0, |stat| stat.size.saturating_sub(size));
            may_take_long_unless(|| !is_much(goes()))?;
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
            self.changing_content(node, kill, || match self.open_file(node, true)? {
                Content::File(fd) => rustix::fs::ftruncate(&fd, size),
                Content::Memory(_) => Err(Errno::IO),
            })?;
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
                self.chmod_acl(node, perm, || self.store_meta(node, meta))?;
            } else {
                self.store_meta(node, meta)?;
            }
        }
        if atime.is_some() || mtime.is_some() {
            let times = Timestamps { last_access: spec(atime), last_modification: spec(mtime) };
            let (target, _) = self.target(node)?;
            match target {
                Target::File(fd) => rustix::fs::futimens(&fd, &times)?,
                Target::Name(dir, name) => {
                    rustix::fs::utimensat(&dir, &*name, &times, AtFlags::SYMLINK_NOFOLLOW)?;
                }
                Target::Object(object) => {
                    rustix::fs::utimensat(&object, c"", &times, AtFlags::EMPTY_PATH)?;
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

    /// Runs a change of a file's content, with what it takes away.
    pub(crate) fn changing_content<T>(
        &self,
        node: &Arc<Node>,
        kill: bool,
        change: impl FnOnce() -> Res<T>,
    ) -> Res<T> {
        self.drop_privileges(node, kill)?;
        let done = change()?;
        // From the file on disk the kernel takes the set*id bits in any case, unless the server is root of
        // the host.
        if self.owners.native {
            let meta = node.inner.lock().meta;
            if meta.perm & 0o6000 != 0 {
                self.store_meta(node, meta)?;
            }
        }
        Ok(done)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::Scratch;

    #[test]
    fn a_file_without_a_name_is_not_copied_for_a_time_that_is_there_already() {
        let scratch = Scratch::new("same-time");
        for name in ["one", "two", "three"] {
            std::fs::write(scratch.dir.join("lower").join(name), "below").expect("written");
        }
        std::fs::hard_link(scratch.dir.join("lower/one"), scratch.dir.join("lower/other")).expect("linked");
        let engine = &scratch.engine;
        let time_of = |node| engine.attr(node).expect("its attributes").stat.mtime;
        let set = |node, perm, time| {
            let set = SetAttr { perm, mtime: Some(SetTime::At(time)), ..SetAttr::default() };
            engine.set_attr(node, set).expect("set")
        };
        let [one, two, three] = [&b"one"[..], b"two", b"three"].map(|name| {
            let node = engine.lookup(engine.root(), name).expect("there");
            engine.unlink(engine.root(), name).expect("removed");
            node
        });
        assert_eq!(set(&two, None, time_of(&two)).stat.mtime, time_of(&two));
        assert!(!two.is_upper());
        let before = time_of(&two);
        let earlier = Time { sec: before.sec - 1, ..before };
        assert_eq!(set(&two, None, earlier).stat.mtime, earlier);
        assert!(two.is_upper(), "another time is a change");
        assert_eq!(
            set(&three, Some(0o640), time_of(&three)).meta.perm,
            0o640,
            "and so is the same with more"
        );
        // The layer counts two names of it.
        assert_eq!(set(&one, None, time_of(&one)).stat.nlink, 1);
        assert!(one.is_upper());
        let other = engine.lookup(engine.root(), b"other").expect("there");
        assert_eq!((other.ino, other.is_upper()), (one.ino, true));
    }
}
