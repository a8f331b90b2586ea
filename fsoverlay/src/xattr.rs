//! Extended attributes: what the disk holds, what the payload sees.
//!
//! | through the mount | on disk (upper, layers) |
//! |---|---|
//! | `user.overlay.X` | `user.overlay.overlay.X` (the kernel's own escape) |
//! | `user.containers.override_stat`, `user.fsoverlay.X` | `user.fsoverlay.esc.` and what follows `user.` |
//! | other `user.*` | the same |
//! | `security.*`, `system.posix_acl_*` | `user.fsoverlay.` and the whole name |
//! | `trusted.*` | never |
//!
//! The names on the disk's side that have no counterpart are the overlay's own marks
//! ([`Marks`]); no request can name them. `security.*` of a layer is shown as it is on
//! disk if there is no record of it. The ACLs of a layer are not shown: their ids are
//! those of the host, and what the caller may do there is decided by the host.
//!
//! A copied-up object keeps its attributes; only the overlay's marks are made anew.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{Mode, OFlags, XattrFlags};

use crate::acl::Acl;
use crate::attr::{Key, Kind};
use crate::engine::Engine;
use crate::errno::{Errno, Res};
use crate::handle::Fd;
use crate::inode::{Node, Place};
use crate::layer::{LayerIdx, RealDir, UPPER, stat_at, stat_fd};
use crate::numbers::Origin;
use crate::object::Content;
use crate::ownership::{chmod, stat_of};
use crate::sys::{self, At};

pub(crate) const OPAQUE: &str = "user.overlay.opaque";
pub(crate) const WHITEOUT: &str = "user.overlay.whiteout";
/// On an opaque directory, which the kernel's mark `opaque=x` cannot be put on: it may hold whiteouts
/// in the form of an xattr all the same, until they are swept.
pub(crate) const WHITEOUTS: &str = "user.fsoverlay.whiteouts";
pub(crate) const IMPURE: &str = "user.overlay.impure";
/// See [`crate::redirect`].
pub(crate) const REDIRECT: &str = "user.overlay.redirect";
pub(crate) const RECORD: &str = "user.containers.override_stat";
/// fuse-overlayfs's record that only root of the host can write.
pub(crate) const RECORD_PRIVILEGED: &str = "security.fuseoverlayfs.override_stat";
/// How an upper keeps owners; see [`crate::ownership`].
pub(crate) const OWNERS: &str = "user.fsoverlay.owners";
/// The number of an object that was copied up; see [`crate::numbers`].
pub(crate) const ORIGIN: &str = "user.fsoverlay.origin";
/// The number of one that was made here, where it is not the disk's.
pub(crate) const NUMBER: &str = "user.fsoverlay.number";
/// How many names in a layer are still to lead to a copy; see [`crate::links`].
pub(crate) const LINKS: &str = "user.fsoverlay.links";

const OVERLAY: &str = "user.overlay.";
const OVERLAY_ESCAPED: &str = "user.overlay.overlay.";
const OURS: &str = "user.fsoverlay.";
const OURS_ESCAPED: &str = "user.fsoverlay.esc.";
/// Marks of fuse-overlayfs.
const FUSE_OVERLAYFS: &str = "user.fuseoverlayfs.";
/// Its record before version 1.
const RECORD_OLD: &str = "user.fuseoverlayfs.override_stat";
/// Its mark of an opaque directory, and the kernel's where root mounted it.
const OPAQUE_OTHERS: [&str; 2] = ["user.fuseoverlayfs.opaque", "trusted.overlay.opaque"];
const CAPABILITY: &str = "user.fsoverlay.security.capability";
const REAL_CAPABILITY: &str = "security.capability";
const ACL_ACCESS: &str = "system.posix_acl_access";
const ACL_DEFAULT: &str = "system.posix_acl_default";
/// XATTR_NAME_MAX.
const NAME_MAX: usize = 255;

/// The overlay's own attributes of one object.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    pub(crate) was_read: bool,
    pub(crate) opaque: bool,
    xattr_whiteouts: bool,
    impure: bool,
    pub(crate) redirect: Option<Vec<u8>>,
    pub(crate) record: Option<Vec<u8>>,
    pub(crate) owners: Option<String>,
    pub(crate) origin: Option<Origin>,
    pub(crate) number: Option<Origin>,
    pub(crate) links: Option<u32>,
    pub(crate) whiteout: bool,
    pub(crate) acl: bool,
    pub(crate) default_acl: bool,
    /// A default ACL of the disk's own.
    real_default_acl: bool,
    pub(crate) capability: bool,
}

impl Marks {
    /// Reads the marks of an object; one system call if it has none.
    pub(crate) fn read(at: At<'_>) -> Res<Self> {
        let mut marks = Self { was_read: true, ..Self::default() };
        let mut small = [0; 1024];
        let long;
        let names = match sys::list_xattr(at, &mut small) {
            Ok(n) => &small[..n],
            Err(Errno::RANGE) => {
                long = sys::list_xattr_vec(at)?;
                &long[..]
            }
            Err(Errno::OPNOTSUPP) => return Ok(marks),
            Err(err) => return Err(err),
        };
        for name in names.split(|&b| b == 0).filter_map(|n| std::str::from_utf8(n).ok()) {
            match name {
                OPAQUE => {
                    let value = sys::get_xattr_vec(at, OPAQUE)?;
                    marks.opaque |= value.as_deref() == Some(b"y");
                    marks.xattr_whiteouts |= value.as_deref() == Some(b"x");
                }
                WHITEOUTS => marks.xattr_whiteouts = true,
                RECORD => marks.record = sys::get_xattr_vec(at, RECORD)?,
                RECORD_PRIVILEGED | RECORD_OLD if marks.record.is_none() => {
                    marks.record = sys::get_xattr_vec(at, name)?;
                }
                OWNERS => {
                    let value = sys::get_xattr_vec(at, OWNERS)?;
                    marks.owners = value.map(|value| String::from_utf8_lossy(&value).into_owned());
                }
                _ if OPAQUE_OTHERS.contains(&name) => {
                    marks.opaque |= sys::get_xattr_vec(at, name)?.as_deref() == Some(b"y");
                }
                REAL_CAPABILITY => marks.capability = true,
                ACL_DEFAULT => marks.real_default_acl = true,
                ORIGIN => marks.origin = sys::get_xattr_vec(at, ORIGIN)?.as_deref().and_then(Origin::parse),
                NUMBER => marks.number = sys::get_xattr_vec(at, NUMBER)?.as_deref().and_then(Origin::parse),
                LINKS => {
                    let value = sys::get_xattr_vec(at, LINKS)?;
                    marks.links = value.and_then(|text| std::str::from_utf8(&text).ok()?.parse().ok());
                }
                IMPURE => marks.impure = true,
                REDIRECT => marks.redirect = sys::get_xattr_vec(at, REDIRECT)?,
                WHITEOUT => marks.whiteout = true,
                CAPABILITY => marks.capability = true,
                _ => match name.strip_prefix(OURS) {
                    Some(ACL_ACCESS) => marks.acl = true,
                    Some(ACL_DEFAULT) => marks.default_acl = true,
                    _ => {}
                },
            }
        }
        Ok(marks)
    }

    /// Without what hides or moves something of the layers below.
    pub(crate) fn harmless(self) -> Self {
        Self { opaque: false, xattr_whiteouts: false, whiteout: false, redirect: None, ..self }
    }

    /// The same for a layer, where an unreadable object simply has none.
    pub(crate) fn read_of_layer(at: At<'_>, layer: LayerIdx) -> Res<Self> {
        match Self::read(at) {
            Err(Errno::ACCESS | Errno::PERM) if layer != UPPER => Ok(Self::default()),
            other => other,
        }
    }

    /// Notes at a directory what its marks say about its entries.
    pub(crate) fn note(&self, dir: &RealDir) {
        if self.xattr_whiteouts {
            dir.xattr_whiteouts.store(true, Ordering::Relaxed);
        }
        if self.impure {
            dir.impure.store(true, Ordering::Relaxed);
        }
    }
}

/// The disk's name of an attribute that the payload names; `None` if it may have none.
fn to_disk(name: &str) -> Res<Option<String>> {
    let disk = if let Some(rest) = name.strip_prefix(OVERLAY) {
        format!("{OVERLAY_ESCAPED}{rest}")
    } else if name == RECORD || name.starts_with(OURS) || name.starts_with(FUSE_OVERLAYFS) {
        format!("{OURS_ESCAPED}{}", &name["user.".len()..])
    } else if name.starts_with("user.") {
        name.to_owned()
    } else if name.starts_with("security.") || name == ACL_ACCESS || name == ACL_DEFAULT {
        format!("{OURS}{name}")
    } else {
        return Ok(None);
    };
    if disk.len() > NAME_MAX { Err(Errno::RANGE) } else { Ok(Some(disk)) }
}

/// The payload's name of an attribute on disk; `None` if it is not for the payload.
/// The inverse of [`to_disk`], and for layers real `security.*` shows too.
fn from_disk(name: &str, of_layer: bool) -> Option<String> {
    if let Some(rest) = name.strip_prefix(OVERLAY_ESCAPED) {
        return Some(format!("{OVERLAY}{rest}"));
    }
    if let Some(rest) = name.strip_prefix(OURS_ESCAPED) {
        return Some(format!("user.{rest}"));
    }
    if let Some(rest) = name.strip_prefix(OURS) {
        let recorded = rest.starts_with("security.") || rest == ACL_ACCESS || rest == ACL_DEFAULT;
        return recorded.then(|| rest.to_owned());
    }
    if name.starts_with(OVERLAY) || name == RECORD || name.starts_with(FUSE_OVERLAYFS) {
        return None;
    }
    (name.starts_with("user.") || of_layer && name == "security.capability").then(|| name.to_owned())
}

/// Attributes that a copy-up takes along as they are on disk.
pub(crate) fn copied_up(name: &str) -> bool {
    let ours = name.starts_with(OVERLAY) && !name.starts_with(OVERLAY_ESCAPED)
        || name.starts_with(OURS) && from_disk(name, false).is_none()
        || name == RECORD
        || name.starts_with(FUSE_OVERLAYFS);
    name.starts_with("user.") && !ours
}

/// All attributes that the payload sees, with their values, in order.
pub(crate) fn shown(at: At<'_>, of_layer: bool) -> Res<Vec<(String, Vec<u8>)>> {
    // What the caller may not read of a layer has no attributes that the payload could see.
    let hidden = |err: &Errno| of_layer && matches!(*err, Errno::ACCESS | Errno::PERM);
    let names = match sys::list_xattr_vec(at) {
        Err(err) if hidden(&err) => Vec::new(),
        other => other?,
    };
    let mut shown = Vec::new();
    for name in names.split(|&b| b == 0).filter_map(|n| std::str::from_utf8(n).ok()) {
        let Some(seen) = from_disk(name, of_layer) else { continue };
        let value = match sys::get_xattr_vec(at, name) {
            Err(err) if hidden(&err) => None,
            other => other?,
        };
        if let Some(value) = value {
            shown.push((seen, value));
        }
    }
    shown.sort();
    shown.dedup_by(|a, b| a.0 == b.0);
    Ok(shown)
}

/// Gives an attribute a value, or takes it away.
fn put_xattr(at: At<'_>, name: &str, value: Option<&[u8]>) -> Res<()> {
    match value {
        Some(value) => sys::set_xattr(at, name, value, XattrFlags::empty()),
        None => match sys::remove_xattr(at, name) {
            Ok(()) | Err(Errno::NODATA) => Ok(()),
            Err(err) => Err(err),
        },
    }
}

/// Gives an attribute the value that it had before a change that failed.
fn put_back(at: At<'_>, name: &str, old: Option<&[u8]>) {
    if let Err(err) = put_xattr(at, name, old) {
        tracing::warn!(?err, name, "an attribute is ahead of a change that failed");
    }
}

fn is_acl(name: &str) -> bool {
    name == ACL_ACCESS || name == ACL_DEFAULT
}

/// Attributes that native ownership keeps under their own names.
fn is_real(name: &str) -> bool {
    name.starts_with("security.") && name != RECORD_PRIVILEGED || is_acl(name)
}

/// An object that can be asked for attributes.
#[derive(Debug)]
pub(crate) enum Target {
    Name(Fd, Arc<[u8]>),
    File(Fd),
    /// What is not opened by anybody, such as a link (`O_PATH`).
    Object(Fd),
    /// Nothing on disk: no attributes.
    None,
}

impl Target {
    pub(crate) fn at(&self) -> Option<At<'_>> {
        match self {
            Self::Name(dir, name) => Some(At::Name(dir.as_fd(), name)),
            Self::File(fd) => Some(At::Fd(fd.as_fd())),
            Self::Object(fd) => Some(At::Object(fd.as_fd())),
            Self::None => None,
        }
    }
}

/// Opens what is no file of the tree, if it is this object.
fn open_object(dir: BorrowedFd<'_>, name: &[u8], kind: Kind, key: Key) -> Res<Option<Target>> {
    let open = |flags| {
        let fd = rustix::fs::openat(dir, name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        Ok::<_, Errno>(Some(fd).filter(|fd| stat_fd(fd.as_fd()).is_ok_and(|stat| stat.key == key)))
    };
    if kind.is_special() {
        let stat = stat_at(dir, name)?;
        if stat.key != key {
            return Ok(None);
        }
        // A file that stands for it has attributes without procfs.
        if stat.kind() == Some(Kind::File)
            && let Ok(found) = open(OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)
        {
            return Ok(found.map(|fd| Target::File(Arc::new(fd))));
        }
    }
    Ok(open(OFlags::PATH)?.map(|fd| Target::Object(Arc::new(fd))))
}

impl Engine {
    /// Where an object's attributes are, and whether that is a layer.
    pub(crate) fn target(&self, node: &Arc<Node>) -> Res<(Target, bool)> {
        if let Some(part) = &node.dir {
            let (lower, explicit) = {
                let state = part.state.read();
                if state.removed {
                    return Ok((Target::None, false));
                }
                (
                    state.lowers.first().cloned(),
                    state.generated.is_some_and(|g| self.generated.node(g).explicit),
                )
            };
            let (dir, of_layer) = match (part.upper.get(), lower) {
                (Some(upper), _) => (upper.clone(), false),
                (None, Some(lower)) if !explicit => (lower, true),
                _ => return Ok((Target::None, false)),
            };
            return Ok((Target::Name(self.fd(&dir)?, Arc::from(&b"."[..])), of_layer));
        }
        let place = node.inner.lock().place.clone();
        Ok(match place {
            Place::Upper if node.kind == Kind::File => match self.open_file(node, false)? {
                Content::File(fd) => (Target::File(fd), false),
                Content::Memory(_) => (Target::None, false),
            },
            Place::Upper => return Ok((self.target_by_name(node)?, false)),
            Place::Lower { dir, name } => (Target::Name(self.fd(&dir)?, name), true),
            Place::Unlinked(pinned) => (Target::File(pinned.fd.clone()), false),
            Place::Parked(parked) => (Target::Name(parked.work.clone(), parked.name.clone().into()), false),
            Place::Generated(_) | Place::Gone(_) => (Target::None, false),
        })
    }

    /// The same of a link, or of what stands for a fifo, socket or device: held, since a name may lead to something
    /// else by the time that it is used.
    fn target_by_name(&self, node: &Arc<Node>) -> Res<Target> {
        loop {
            let key = node.inner.lock().key;
            let look = |dir: BorrowedFd<'_>, name: &[u8]| open_object(dir, name, node.kind, key);
            if let Some(target) = self.by_name(node, look)? {
                return Ok(target);
            }
            if !matches!(node.inner.lock().place, Place::Upper) {
                return self.target(node).map(|(target, _)| target);
            }
        }
    }

    /// Whether an attribute is the disk's own.
    fn keeps_real(&self, name: &str) -> bool {
        self.owners.native && is_real(name)
    }

    /// The disk's name of an attribute that the payload names; `None` if it may have none.
    fn disk_name(&self, name: &str) -> Res<Option<String>> {
        if self.no_acl && is_acl(name) {
            return Err(Errno::OPNOTSUPP);
        }
        if self.keeps_real(name) { Ok(Some(name.to_owned())) } else { to_disk(name) }
    }

    /// Where it is, too, if the object is from a time of recorded ownership.
    fn recorded_name(&self, name: &str) -> Option<String> {
        self.keeps_real(name).then(|| format!("{OURS}{name}"))
    }

    /// The payload's name of an attribute on disk; `None` if it is not for the payload.
    fn shown_name(&self, name: &str, of_layer: bool) -> Option<String> {
        let shown = if self.keeps_real(name) { Some(name.to_owned()) } else { from_disk(name, of_layer) };
        shown.filter(|name| !(self.no_acl && is_acl(name)))
    }

    /// What the marks say about a directory's default ACL.
    pub(crate) fn known_default_acl(&self, marks: &Marks) -> Option<Option<Arc<[u8]>>> {
        let none = if self.owners.native {
            marks.was_read && !marks.real_default_acl && !marks.default_acl
        } else {
            !marks.default_acl
        };
        none.then_some(None)
    }

    /// Removes an attribute that may not be there.
    fn clear_xattr(at: At<'_>, name: &str) -> Res<()> {
        match sys::remove_xattr(at, name) {
            Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
            Err(err) => Err(err),
        }
    }

    /// The same for one that a record is kept in, which a real fifo, socket or device cannot hold.
    fn clear_recorded(node: &Node, at: At<'_>, name: &str) -> Res<()> {
        match Self::clear_xattr(at, name) {
            Err(Errno::PERM) if node.kind.is_special() => Ok(()),
            done => done,
        }
    }

    /// getxattr.
    pub(crate) fn get_xattr(&self, node: &Arc<Node>, name: &[u8]) -> Res<Vec<u8>> {
        let name = std::str::from_utf8(name).map_err(|_| Errno::NODATA)?;
        if name == crate::CHOWN_XATTR || name == crate::MKNOD_XATTR {
            return Err(Errno::NODATA);
        }
        let Some(disk) = self.disk_name(name)? else { return Err(Errno::NODATA) };
        let (target, of_layer) = self.target(node)?;
        let Some(at) = target.at() else { return Err(Errno::NODATA) };
        // The kernel asks for ACLs on its own; the host's are not for it.
        let found = match sys::get_xattr_vec(at, &disk) {
            // What the caller may not read has no attributes that he could see.
            Err(Errno::ACCESS | Errno::PERM) if of_layer => None,
            other => other?,
        };
        if found.is_none() && of_layer && name == REAL_CAPABILITY {
            return sys::get_xattr_vec(at, name).ok().flatten().ok_or(Errno::NODATA);
        }
        if found.is_none()
            && let Some(recorded) = self.recorded_name(name)
        {
            return sys::get_xattr_vec(at, &recorded).ok().flatten().ok_or(Errno::NODATA);
        }
        found.ok_or(Errno::NODATA)
    }

    /// listxattr: names, each ended by NUL.
    pub(crate) fn list_xattr(&self, node: &Arc<Node>) -> Res<Vec<u8>> {
        let (target, of_layer) = self.target(node)?;
        let Some(at) = target.at() else { return Ok(Vec::new()) };
        let names = match sys::list_xattr_vec(at) {
            Err(Errno::ACCESS | Errno::PERM) if of_layer => Vec::new(),
            other => other?,
        };
        let mut seen = Vec::new();
        for name in names.split(|&b| b == 0) {
            let shown = std::str::from_utf8(name).ok().and_then(|n| self.shown_name(n, of_layer));
            if let Some(shown) = shown
                && !seen.contains(&shown)
            {
                seen.push(shown);
            }
        }
        let mut list = Vec::new();
        for name in seen {
            list.extend_from_slice(name.as_bytes());
            list.push(0);
        }
        Ok(list)
    }

    /// setxattr. `caller` is the requester's (uid, gid).
    pub(crate) fn set_xattr(
        &self,
        node: &Arc<Node>,
        name: &[u8],
        value: &[u8],
        flags: XattrFlags,
        caller: (u32, u32),
    ) -> Res<()> {
        let name = std::str::from_utf8(name).map_err(|_| Errno::OPNOTSUPP)?;
        match name {
            crate::CHOWN_XATTR => return self.chown_by_xattr(node, value),
            crate::MKNOD_XATTR => return self.mknod_by_xattr(node, value),
            ACL_ACCESS | ACL_DEFAULT => return self.set_acl(node, name, Some(value), caller),
            _ => {}
        }
        let disk = self.disk_name(name)?.ok_or(Errno::OPNOTSUPP)?;
        self.upper()?;
        if flags.contains(XattrFlags::REPLACE) && !node.is_upper() {
            // Asked before the copy-up: a layer's real attribute counts as there.
            self.get_xattr(node, name.as_bytes())?;
        }
        self.copy_up(node)?;
        self.touch_meta(node)?;
        if name == REAL_CAPABILITY {
            node.inner.lock().no_capability = false;
        }
        let (target, _) = self.target(node)?;
        let at = target.at().ok_or(Errno::OPNOTSUPP)?;
        match self.settled(node, || sys::set_xattr(at, &disk, value, flags)) {
            // A symbolic link cannot hold a record.
            Err(Errno::PERM) if node.kind == Kind::Symlink => Err(Errno::OPNOTSUPP),
            other => other,
        }
    }

    /// removexattr.
    pub(crate) fn remove_xattr(&self, node: &Arc<Node>, name: &[u8]) -> Res<()> {
        let text = std::str::from_utf8(name).map_err(|_| Errno::NODATA)?;
        if text == ACL_ACCESS || text == ACL_DEFAULT {
            return self.set_acl(node, text, None, (0, 0));
        }
        let disk = self.disk_name(text)?.ok_or(Errno::NODATA)?;
        self.upper()?;
        self.get_xattr(node, name)?;
        self.copy_up(node)?;
        self.touch_meta(node)?;
        let (target, _) = self.target(node)?;
        let at = target.at().ok_or(Errno::NODATA)?;
        self.settled(node, || match self.recorded_name(text) {
            // It is there (asked above), under one of the names.
            Some(recorded) => {
                Self::clear_recorded(node, at, &recorded)?;
                Self::clear_xattr(at, &disk)
            }
            None => sys::remove_xattr(at, &disk),
        })
    }

    /// Stores or removes an ACL and makes the mode agree with it.
    fn set_acl(&self, node: &Arc<Node>, name: &str, value: Option<&[u8]>, caller: (u32, u32)) -> Res<()> {
        let access = name == ACL_ACCESS;
        if node.kind == Kind::Symlink || self.no_acl {
            return Err(Errno::OPNOTSUPP);
        }
        let acl = match value {
            Some(bytes) => Some(Acl::parse(bytes).ok_or(Errno::INVAL)?).filter(|acl| !acl.is_empty()),
            None => None,
        };
        if !access && node.kind != Kind::Dir {
            return if acl.is_some() { Err(Errno::ACCESS) } else { Ok(()) };
        }
        self.upper()?;
        self.copy_up(node)?;
        self.touch_meta(node)?;
        self.settled(node, || self.apply_acl(node, name, acl.as_ref(), caller))
    }

    /// The same for an object of the upper, with an ACL that is one.
    fn apply_acl(&self, node: &Arc<Node>, name: &str, acl: Option<&Acl>, caller: (u32, u32)) -> Res<()> {
        let access = name == ACL_ACCESS;
        let disk = self.acl_name(name);
        let (target, _) = self.target(node)?;
        let at = target.at().ok_or(Errno::OPNOTSUPP)?;
        // An access ACL that says no more than a mode is only a mode.
        let stored = acl.filter(|acl| !access || !acl.is_minimal());
        let old = sys::get_xattr_vec(at, &disk)?;
        let before = node.inner.lock().meta;
        // A real one changes the mode.
        let mode = match self.owners.native && access {
            true => {
                let _settled = self.modes.lock();
                Some(stat_of(at)?.mode & 0o7777)
            }
            false => None,
        };
        let bytes = stored.map(Acl::to_bytes);
        put_xattr(at, &disk, bytes.as_deref())?;
        let goes_on = || -> Res<()> {
            if let Some(acl) = acl.filter(|_| access) {
                let mut meta = node.inner.lock().meta;
                meta.perm = meta.perm & 0o7000 | acl.mode();
                if caller.0 != 0 && caller.1 != meta.gid {
                    meta.perm &= !0o2000;
                }
                self.store_meta(node, meta)?;
            }
            // Last: nobody could bring it back.
            self.recorded_name(name).map_or(Ok(()), |recorded| Self::clear_recorded(node, at, &recorded))
        };
        goes_on().inspect_err(|_| {
            put_back(at, &disk, old.as_deref());
            let stored = node.inner.lock().meta != before;
            let undone = match mode {
                _ if stored => self.store_meta(node, before),
                Some(mode) => chmod(at, mode),
                None => Ok(()),
            };
            if let Err(err) = undone {
                tracing::warn!(?err, "a mode is ahead of a change that failed");
            }
        })?;
        if access {
            // The kernel keeps a real one and the mode in step by itself.
            node.inner.lock().has_acl = stored.is_some() && !self.owners.native;
        } else {
            node.dir()?.state.write().default_acl = Some(bytes.map(Arc::from));
        }
        Ok(())
    }

    /// chmod, by `store`, of an object that may have an access ACL: its owner, mask (or group) and other
    /// entries follow the mode, unless that cannot be stored.
    pub(crate) fn chmod_acl(&self, node: &Arc<Node>, perm: u32, store: impl FnOnce() -> Res<()>) -> Res<()> {
        if !node.inner.lock().has_acl {
            return store();
        }
        let disk = format!("{OURS}{ACL_ACCESS}");
        let (target, _) = self.target(node)?;
        let Some(at) = target.at() else { return store() };
        let old = sys::get_xattr_vec(at, &disk)?;
        let Some(mut acl) = old.as_deref().and_then(Acl::parse) else { return store() };
        acl.set_mode(perm);
        put_xattr(at, &disk, Some(&acl.to_bytes()))?;
        store().inspect_err(|_| put_back(at, &disk, old.as_deref()))
    }

    fn acl_name(&self, name: &str) -> String {
        if self.owners.native { name.to_owned() } else { format!("{OURS}{name}") }
    }

    /// The default ACL of a directory, from memory after the first time.
    pub(crate) fn default_acl(&self, dir: &Arc<Node>) -> Res<Option<Acl>> {
        if self.no_acl {
            return Ok(None);
        }
        let known = dir.dir()?.state.read().default_acl.clone();
        let bytes = match known {
            Some(bytes) => bytes,
            None => {
                let (target, _) = self.target(dir)?;
                let bytes = match target.at() {
                    Some(at) => {
                        let mut found = sys::get_xattr_vec(at, &self.acl_name(ACL_DEFAULT))?;
                        if let (None, Some(recorded)) = (&found, self.recorded_name(ACL_DEFAULT)) {
                            found = sys::get_xattr_vec(at, &recorded)?;
                        }
                        found.map(Arc::from)
                    }
                    None => None,
                };
                dir.dir()?.state.write().default_acl = Some(bytes.clone());
                bytes
            }
        };
        Ok(bytes.as_deref().and_then(Acl::parse))
    }

    /// Gives a new object what it inherits from its directory's default ACL.
    pub(crate) fn store_inherited(&self, at: At<'_>, access: Option<&Acl>, default: Option<&Acl>) -> Res<()> {
        for (name, acl) in [(ACL_ACCESS, access), (ACL_DEFAULT, default)] {
            if let Some(acl) = acl {
                sys::set_xattr(at, &self.acl_name(name), &acl.to_bytes(), XattrFlags::empty())?;
            }
        }
        Ok(())
    }

    /// A write or a chown takes away what would give power to whoever runs the file.
    pub(crate) fn drop_capability(&self, node: &Arc<Node>) -> Res<()> {
        if node.kind != Kind::File || node.inner.lock().no_capability {
            return Ok(());
        }
        let (target, of_layer) = self.target(node)?;
        if !of_layer && let Some(at) = target.at() {
            Self::clear_xattr(at, CAPABILITY)?;
            if self.owners.native {
                match Self::clear_xattr(at, REAL_CAPABILITY) {
                    // Without the right to take it away, the write itself does.
                    Err(Errno::PERM | Errno::ACCESS) => {}
                    other => other?,
                }
            }
        }
        node.inner.lock().no_capability = true;
        Ok(())
    }

    /// Copies what a copy-up keeps. `security.capability` of a layer becomes a record.
    pub(crate) fn copy_xattrs(&self, from: At<'_>, to: At<'_>) -> Res<()> {
        let names = match sys::list_xattr_vec(from) {
            Ok(names) => names,
            Err(Errno::ACCESS | Errno::PERM) => return Ok(()),
            Err(err) => return Err(err),
        };
        for name in names.split(|&b| b == 0).filter_map(|n| std::str::from_utf8(n).ok()) {
            let native = self.owners.native;
            let target = match name {
                REAL_CAPABILITY if !native => CAPABILITY,
                REAL_CAPABILITY => name,
                _ if native && is_acl(name) && !self.no_acl => name,
                _ if copied_up(name) => name,
                _ => continue,
            };
            let value = match sys::get_xattr_vec(from, name) {
                Ok(Some(value)) => value,
                // The last: capabilities of a user namespace that is not ours.
                Ok(None) | Err(Errno::ACCESS | Errno::PERM | Errno::OVERFLOW) => continue,
                Err(err) => return Err(err),
            };
            match sys::set_xattr(to, target, &value, XattrFlags::empty()) {
                // Who may not give capabilities notes them.
                Err(Errno::PERM) if target == REAL_CAPABILITY => {
                    sys::set_xattr(to, CAPABILITY, &value, XattrFlags::empty())?;
                }
                other => other?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_marks_cannot_be_named() {
        for name in [
            "user.x",
            "user.overlay.opaque",
            "user.overlay.overlay.opaque",
            "user.containers.override_stat",
            "user.fsoverlay.origin",
            "user.fsoverlay.esc.containers.override_stat",
            "user.fsoverlay.security.capability",
            "security.capability",
            "system.posix_acl_access",
        ] {
            let disk = to_disk(name).expect("short").expect("storable");
            assert_eq!(from_disk(&disk, false).as_deref(), Some(name), "{disk}");
            for mark in [OPAQUE, WHITEOUT, WHITEOUTS, IMPURE, REDIRECT, RECORD, ORIGIN, NUMBER, LINKS] {
                assert_ne!(disk, mark);
                assert_eq!(from_disk(mark, false), None);
            }
        }
        assert_eq!(to_disk("trusted.overlay.opaque"), Ok(None));
        assert_eq!(to_disk(&format!("security.{}", "x".repeat(246))), Err(Errno::RANGE));
    }

    #[test]
    fn what_stands_at_a_links_name_by_now_is_not_changed_instead() {
        use crate::attr::Time;
        use crate::engine::tests::Scratch;
        use crate::setattr::{SetAttr, SetTime};

        let scratch = Scratch::new("another-name");
        let (engine, upper) = (&scratch.engine, scratch.dir.join("upper"));
        let node = scratch.make(b"a", Kind::Symlink);
        assert_eq!(engine.link(&node, engine.root(), b"b"), Ok(()));
        let first = node.first_link().expect("a name").name;
        let (first, second) = if *first == *b"a" { ("a", "b") } else { ("b", "a") };
        let touch = |sec| {
            let mtime = Some(SetTime::At(Time { sec, nsec: 0 }));
            engine.set_attr(&node, SetAttr { mtime, ..SetAttr::default() }).map(|_| ())
        };
        let seen = |name: &str| {
            let path = upper.join(name);
            stat_at(rustix::fs::CWD, path.as_os_str().as_encoded_bytes()).map(|stat| stat.mtime.sec)
        };
        assert_eq!((touch(5), seen(first), seen(second)), (Ok(()), Ok(5), Ok(5)));
        // Somebody else does it.
        std::fs::remove_file(upper.join(first)).expect("removed");
        assert_eq!((touch(6), seen(second)), (Ok(()), Ok(6)));
        std::os::unix::fs::symlink("other", upper.join(first)).expect("made");
        let before = seen(first);
        assert_eq!((touch(7), seen(second), seen(first)), (Ok(()), Ok(7), before));
        std::fs::remove_file(upper.join(second)).expect("removed");
        assert_eq!((touch(8), seen(first)), (Err(Errno::STALE), before));
    }

    #[test]
    fn what_is_renamed_before_it_is_changed_is_changed_all_the_same() {
        use crate::engine::tests::Scratch;
        use crate::rename::How;

        let scratch = Scratch::new("renamed-target");
        let (engine, root) = (&scratch.engine, scratch.engine.root());
        for (name, kind) in [(b"link", Kind::Symlink), (b"fifo", Kind::Fifo)] {
            let node = scratch.make(name, kind);
            let (target, _) = engine.target(&node).expect("found");
            scratch.make(b"file", Kind::File);
            assert_eq!(engine.rename(root, b"file", root, name, How::Exchange), Ok(()));
            let at = target.at().expect("on disk");
            let set = sys::set_xattr(at, "user.x", b"y", XattrFlags::empty());
            // Links have none.
            assert_eq!(set, if kind == Kind::Symlink { Err(Errno::PERM) } else { Ok(()) });
            let file = engine.lookup(root, name).expect("found");
            assert_eq!(engine.get_xattr(&file, b"user.x"), Err(Errno::NODATA));
            assert_eq!(engine.unlink(root, b"file"), Ok(()));
        }
    }

    #[test]
    fn an_acl_does_not_change_where_the_mode_cannot() {
        use crate::config::{IdExtent, IdMapping};
        use crate::engine::tests::Scratch;
        use crate::ownership::Ownership;
        use crate::setattr::SetAttr;

        let acl = |user_obj: u8, user: u8| {
            let entry = |tag: u8, perm: u8, id: u32| [&[tag, 0, perm, 0], &id.to_le_bytes()[..]].concat();
            let none = u32::MAX;
            let mut list = vec![2, 0, 0, 0];
            for (tag, perm, id) in
                [(1, user_obj, none), (2, user, 5), (4, 4, none), (16, 7, none), (32, 4, none)]
            {
                list.extend(entry(tag, perm, id));
            }
            list
        };
        let mut scratch = Scratch::new("acl-undone");
        let file = scratch.make(b"file", Kind::File);
        let set = |engine: &Engine, name: &str, value: &[u8]| {
            engine.set_xattr(&file, name.as_bytes(), value, XattrFlags::empty(), (0, 0))
        };
        let get = |engine: &Engine| engine.get_xattr(&file, ACL_ACCESS.as_bytes());
        let chmod = |engine: &Engine, perm| {
            engine
                .set_attr(&file, SetAttr { perm: Some(perm), ..SetAttr::default() })
                .map(|attr| attr.meta.perm)
        };
        assert_eq!(set(&scratch.engine, ACL_ACCESS, &acl(6, 7)), Ok(()));
        assert_eq!((get(&scratch.engine), chmod(&scratch.engine, 0o674)), (Ok(acl(6, 7)), Ok(0o674)));
        // No record can be written with an owner that the disk does not have.
        let ids = IdMapping {
            uids: vec![IdExtent { inside: 1000, outside: 1000, count: 1 }],
            ..IdMapping::default()
        };
        // The upper may be of a time of recorded ownership, too: there the disk's own mode stays as well.
        let spec = crate::config::OverlaySpec { ids, ..scratch.spec() };
        let native = crate::config::OwnerForm::Native;
        let recorded = Ownership::new(&spec);
        let real = Ownership::new(&crate::config::OverlaySpec { owner_form: native, squash: None, ..spec });
        let on_disk = || {
            let file = std::fs::File::open(scratch.dir.join("upper/file")).expect("opened");
            let real = sys::get_xattr_vec(At::Fd(file.as_fd()), ACL_ACCESS);
            (stat_fd(file.as_fd()).map(|stat| stat.mode), real)
        };
        let before = on_disk();
        let owners = std::mem::replace(&mut scratch.engine.owners, real);
        assert_eq!(set(&scratch.engine, ACL_ACCESS, &acl(4, 3)), Err(Errno::INVAL));
        assert_eq!((get(&scratch.engine), on_disk()), (Ok(acl(6, 7)), before));
        scratch.engine.owners = recorded;
        assert_eq!(chmod(&scratch.engine, 0o474), Err(Errno::INVAL));
        assert_eq!(get(&scratch.engine), Ok(acl(6, 7)));
        assert_eq!(set(&scratch.engine, ACL_ACCESS, &acl(4, 3)), Err(Errno::INVAL));
        assert_eq!(get(&scratch.engine), Ok(acl(6, 7)));
        scratch.engine.owners = owners;
        // It still follows.
        assert_eq!((chmod(&scratch.engine, 0o474), get(&scratch.engine)), (Ok(0o474), Ok(acl(4, 7))));
    }

    #[test]
    fn copy_up_leaves_marks_behind() {
        let of_the_kernel = [REDIRECT, "user.overlay.origin"];
        for mark in [OPAQUE, WHITEOUT, WHITEOUTS, IMPURE, RECORD, ORIGIN, NUMBER, LINKS]
            .into_iter()
            .chain(of_the_kernel)
        {
            assert!(!copied_up(mark), "{mark}");
        }
        for kept in ["user.x", "user.overlay.overlay.opaque", "user.fsoverlay.security.capability"] {
            assert!(copied_up(kept), "{kept}");
        }
        assert!(!copied_up("security.selinux"));
    }
}
