//! Where owners and modes are kept: recorded, or on the disk itself.
//!
//! *Recorded* ([`crate::attr`], [`crate::sidecar`]): every object of the upper belongs to the server, and a
//! record says more where more is to be said. It needs no privilege. *Native*: the objects really have
//! the owner, the mode with its set*id bits, and the type; the server runs in a user namespace that has the
//! ids, and what the kernel refuses there is refused.
//!
//! In both forms a record that is there wins over the disk, so what was recorded is read natively, too, and
//! turned into the real thing when it changes next. What has no record is read as the form says, so the form of
//! an upper is marked on it (`user.fsoverlay.owners`), and an upper that would be misread is refused:
//!
//! | mark | what has no record belongs to | recorded | native |
//! |---|---|---|---|
//! | none (empty, or of another maker) | by the form used | yes | yes |
//! | `recorded:UID:GID` | these ids | if they are its own | if the upper's directory belongs to them |
//! | `recorded:disk` | whom the disk says | if it reads the disk | yes |
//! | `native` | whom the disk says | no | yes |
//!
//! Ids of the mount and ids of the disk may differ by a map. It applies to both forms, in both directions;
//! an id that is shown in place of all others is put over the result and never stored.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Gid, Mode, Uid, XattrFlags};

use crate::attr::{Kind, Meta, Stat};
use crate::config::{IdExtent, IdMapping, OverlaySpec, OwnerForm};
use crate::copyup::make_placeholder;
use crate::engine::Engine;
use crate::errno::{Errno, Res};
use crate::inode::Node;
use crate::layer::{stat_at, stat_fd};
use crate::sys::{self, At};
use crate::xattr::{RECORD, RECORD_PRIVILEGED, Target};

/// What the kernel calls an id that has no mapping.
const OVERFLOW: u32 = 65534;

/// See the module.
#[derive(Debug)]
pub(crate) struct Ownership {
    pub(crate) native: bool,
    /// The attribute that holds records.
    record: &'static str,
    /// The owner of an object of the upper that has no record, unless the disk says.
    pub(crate) default: (u32, u32),
    /// The disk says.
    pub(crate) by_disk: bool,
    squash: (Option<u32>, Option<u32>),
    ids: IdMapping,
}

impl Ownership {
    pub(crate) fn new(spec: &OverlaySpec) -> Self {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let ids = spec.ids.clone();
        let inside = (shown(&ids.uids, uid), shown(&ids.gids, gid));
        let native = spec.owner_form == OwnerForm::Native;
        let by_disk = spec.owner_form != OwnerForm::Recorded;
        let squash = match spec.squash {
            Some((uid, gid)) => (Some(uid), Some(gid)),
            None => (ids.uid, ids.gid),
        };
        let privileged = spec.owner_form == OwnerForm::RecordedByRoot;
        Self {
            native,
            record: if privileged { RECORD_PRIVILEGED } else { RECORD },
            default: if by_disk { inside } else { spec.squash.unwrap_or((0, 0)) },
            by_disk,
            squash,
            ids,
        }
    }

    /// Whether ids of the disk are others than those of the mount.
    pub(crate) fn maps_ids(&self) -> bool {
        !(self.ids.uids.is_empty() && self.ids.gids.is_empty())
    }

    /// The owner that is reported for an object's.
    pub(crate) fn reported(&self, uid: u32, gid: u32) -> (u32, u32) {
        (self.squash.0.unwrap_or(uid), self.squash.1.unwrap_or(gid))
    }

    /// With the ids of the mount in place of the disk's.
    pub(crate) fn shown(&self, mut meta: Meta) -> Meta {
        (meta.uid, meta.gid) = (shown(&self.ids.uids, meta.uid), shown(&self.ids.gids, meta.gid));
        meta
    }

    /// With the ids of the disk in place of the mount's; `EINVAL`, as for an id without a mapping, if there
    /// is none.
    pub(crate) fn stored(&self, mut meta: Meta) -> Res<Meta> {
        meta.uid = stored(&self.ids.uids, meta.uid).ok_or(Errno::INVAL)?;
        meta.gid = stored(&self.ids.gids, meta.gid).ok_or(Errno::INVAL)?;
        Ok(meta)
    }

    /// Reads a record.
    pub(crate) fn read_record(&self, text: &[u8], real: Kind) -> Option<Meta> {
        Meta::from_record(text, real).map(|meta| self.shown(meta))
    }

    /// An object of the upper without a record.
    pub(crate) fn unrecorded(&self, stat: &Stat, kind: Kind) -> Meta {
        let meta = Meta { kind, perm: stat.mode & 0o7777, uid: stat.uid, gid: stat.gid, rdev: stat.rdev };
        if self.by_disk {
            self.shown(meta)
        } else {
            Meta { uid: self.default.0, gid: self.default.1, ..meta }
        }
    }

    /// The permission bits that an object is made with. Set*id bits come when it has its owner.
    pub(crate) fn first_mode(&self, meta: &Meta) -> Mode {
        Mode::from_raw_mode(if self.native { meta.perm & 0o777 } else { meta.disk_perm() })
    }

    /// The text and name of the record.
    fn write_record(&self, at: At<'_>, meta: &Meta) -> Res<()> {
        let text = self.stored(*meta)?.to_record();
        sys::set_xattr(at, self.record, text.as_bytes(), XattrFlags::empty())
    }

    /// Whether a fifo, socket or device is an empty file with a record.
    pub(crate) fn has_placeholders(&self) -> bool {
        !self.native
    }

    /// What marks an upper as one of this form; `was_empty` when it was first changed.
    pub(crate) fn mark(&self, was_empty: bool) -> String {
        match (self.native, self.by_disk && !was_empty) {
            (true, _) => "native".to_owned(),
            (false, true) => "recorded:disk".to_owned(),
            (false, false) => format!("recorded:{}:{}", self.default.0, self.default.1),
        }
    }

    /// Whether an upper with this mark (`None`: none, but it has a record) whose directory is `root` is read
    /// rightly.
    pub(crate) fn can_read(&self, mark: Option<&str>, root: &Stat) -> bool {
        let owner = self.unrecorded(root, Kind::Dir);
        let recorded = |uid, gid| {
            if self.native { (owner.uid, owner.gid) == (uid, gid) } else { self.default == (uid, gid) }
        };
        match mark {
            None => !self.native || recorded(0, 0),
            Some("native") => self.native,
            Some("recorded:disk") => self.by_disk,
            Some(text) => {
                let ids = text.strip_prefix("recorded:").and_then(|ids| ids.split_once(':'));
                let ids = ids.and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)));
                ids.is_some_and(|(uid, gid)| recorded(uid, gid))
            }
        }
    }
}

/// The mount's id for one of the disk.
fn shown(extents: &[IdExtent], id: u32) -> u32 {
    if extents.is_empty() { id } else { mapped(extents, id, |e| (e.outside, e.inside)).unwrap_or(OVERFLOW) }
}

/// The disk's id for one of the mount.
fn stored(extents: &[IdExtent], id: u32) -> Option<u32> {
    if extents.is_empty() { Some(id) } else { mapped(extents, id, |e| (e.inside, e.outside)) }
}

fn mapped(extents: &[IdExtent], id: u32, sides: impl Fn(&IdExtent) -> (u32, u32)) -> Option<u32> {
    extents.iter().find_map(|extent| {
        let (from, to) = sides(extent);
        let offset = id.checked_sub(from).filter(|&offset| offset < extent.count)?;
        to.checked_add(offset)
    })
}

fn chown(at: At<'_>, uid: u32, gid: u32) -> Res<()> {
    let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    match at {
        At::Fd(fd) => rustix::fs::fchown(fd, uid, gid),
        At::Object(fd) => rustix::fs::chownat(fd, c"", uid, gid, AtFlags::EMPTY_PATH),
        At::Name(dir, name) => rustix::fs::chownat(dir, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW),
    }
}

pub(crate) fn chmod(at: At<'_>, perm: u32) -> Res<()> {
    let mode = Mode::from_raw_mode(perm);
    match at {
        At::Fd(fd) => rustix::fs::fchmod(fd, mode),
        At::Object(fd) => sys::chmod_object(fd, mode),
        At::Name(dir, b".") => rustix::fs::chmodat(dir, c".", mode, AtFlags::empty()),
        At::Name(dir, name) => sys::chmod_special(dir, name, mode),
    }
}

pub(crate) fn stat_of(at: At<'_>) -> Res<Stat> {
    match at {
        At::Fd(fd) | At::Object(fd) => stat_fd(fd),
        At::Name(dir, name) => stat_at(dir, name),
    }
}

impl Engine {
    /// Makes a fifo, socket or device.
    pub(crate) fn make_special(&self, dir: impl AsFd, name: &[u8], meta: &Meta) -> Res<()> {
        if self.owners.has_placeholders() {
            return make_placeholder(dir.as_fd(), name);
        }
        let kind = match meta.kind {
            Kind::Fifo => FileType::Fifo,
            Kind::Socket => FileType::Socket,
            // It would be a whiteout.
            Kind::Char if meta.rdev == (0, 0) => return Err(Errno::PERM),
            Kind::Char => FileType::CharacterDevice,
            Kind::Block => FileType::BlockDevice,
            _ => return Err(Errno::INVAL),
        };
        let device = rustix::fs::makedev(meta.rdev.0, meta.rdev.1);
        rustix::fs::mknodat(dir, name, kind, self.owners.first_mode(meta), device)
    }

    /// Gives an object that was just made, and looks like `made`, its owner and mode; true if by a record.
    pub(crate) fn settle_new(&self, at: At<'_>, meta: &Meta, made: &Stat) -> Res<bool> {
        let same_type = made.kind() == Some(meta.kind);
        if self.owners.native && same_type {
            let disk = self.owners.stored(*meta)?;
            let mut perm = made.mode & 0o7777;
            if (made.uid, made.gid) != (disk.uid, disk.gid) {
                chown(at, disk.uid, disk.gid)?;
                if meta.kind != Kind::Dir {
                    perm &= !0o6000;
                }
            }
            if meta.kind != Kind::Symlink && perm != meta.perm {
                chmod(at, meta.perm)?;
            }
            return Ok(false);
        }
        let needed = self.needs_record(meta, made);
        if meta.kind == Kind::Symlink {
            if needed {
                let disk = self.owners.stored(*meta)?;
                self.upper()?.sidecar.set_owner(made, Some((disk.uid, disk.gid)))?;
            }
            return Ok(false);
        }
        // The umask of the server's process may have taken bits away.
        if same_type && made.mode & 0o7777 != meta.disk_perm() {
            chmod(at, meta.disk_perm())?;
        }
        if needed {
            self.owners.write_record(at, meta)?;
        }
        Ok(needed)
    }

    /// The first half of the same for the copy of a file: before its bytes and attributes, since a change of
    /// the owner takes capabilities away.
    pub(crate) fn give_copy(&self, at: At<'_>, meta: &Meta) -> Res<()> {
        if !self.owners.native {
            return Ok(());
        }
        // As the kernel's overlayfs answers where the owner has no mapping.
        let unmapped = |err| if err == Errno::INVAL { Errno::OVERFLOW } else { err };
        let disk = self.owners.stored(*meta).map_err(unmapped)?;
        chown(at, disk.uid, disk.gid).map_err(unmapped)
    }

    /// The second half.
    pub(crate) fn settle_copy(&self, at: At<'_>, meta: &Meta) -> Res<bool> {
        if self.owners.native && !meta.kind.is_special() {
            chmod(at, meta.perm)?;
            return Ok(false);
        }
        chmod(at, meta.disk_perm())?;
        let needed = self.needs_record(meta, &stat_of(at)?);
        if needed {
            self.owners.write_record(at, meta)?;
        }
        Ok(needed)
    }

    fn needs_record(&self, meta: &Meta, disk: &Stat) -> bool {
        let without = self.owners.unrecorded(disk, meta.kind);
        meta.needs_record((without.uid, without.gid))
    }

    /// Stores the owner and mode of an object of the upper. The disk's change time
    /// moves in every case, as it must after chmod and chown.
    pub(crate) fn store_meta(&self, node: &Arc<Node>, meta: Meta) -> Res<()> {
        let (target, _) = self.target(node)?;
        let recorded = match target.at() {
            Some(at) if self.owners.native && !self.is_placeholder(node, at)? => {
                let _settled = self.modes.lock();
                self.store_real(node, at, meta)?
            }
            Some(_) => self.record_meta(node, &target, meta)?,
            None => false,
        };
        let mut inner = node.inner.lock();
        inner.meta = meta;
        inner.has_record = recorded;
        Ok(())
    }

    fn is_placeholder(&self, node: &Node, at: At<'_>) -> Res<bool> {
        Ok(node.kind.is_special() && stat_of(at)?.kind() != Some(node.kind))
    }

    /// On the disk itself; a record that was there goes.
    fn store_real(&self, node: &Arc<Node>, at: At<'_>, meta: Meta) -> Res<bool> {
        let (had_record, old) = {
            let inner = node.inner.lock();
            (inner.has_record, inner.meta)
        };
        let disk = self.owners.stored(meta)?;
        let sidecar = &self.upper()?.sidecar;
        let link = node.kind == Kind::Symlink || node.kind.is_special();
        // What is on the disk is not `old` if a record said it.
        let aside = link && sidecar.owner(&stat_of(at)?)?.is_some();
        let moves = had_record || aside || (old.uid, old.gid) != (meta.uid, meta.gid);
        if moves || node.kind == Kind::Symlink {
            chown(at, disk.uid, disk.gid)?;
        }
        // A chown has taken the set*id bits.
        let bits = had_record || old.perm != meta.perm || meta.perm & 0o6000 != 0;
        if node.kind != Kind::Symlink && (bits || !moves) {
            chmod(at, meta.perm)?;
        }
        if had_record {
            self.drop_records(at)?;
        }
        if aside {
            sidecar.set_owner(&stat_of(at)?, None)?;
        }
        Ok(false)
    }

    fn drop_records(&self, at: At<'_>) -> Res<()> {
        for name in [self.owners.record, RECORD] {
            match sys::remove_xattr(at, name) {
                Ok(()) | Err(Errno::NODATA) => {}
                Err(err) => return Err(err),
            }
        }
        Ok(())
    }

    /// As a record; whether there is one now.
    fn record_meta(&self, node: &Arc<Node>, target: &Target, meta: Meta) -> Res<bool> {
        let Some(at) = target.at() else { return Ok(false) };
        let (had_record, old) = {
            let inner = node.inner.lock();
            (inner.has_record, inner.meta)
        };
        let by_disk = self.owners.by_disk;
        let disk = if by_disk || node.kind == Kind::Symlink || node.kind.is_special() {
            Some(stat_of(at)?)
        } else {
            None
        };
        let needed = self.needs_record(&meta, &disk.unwrap_or_default()) || Self::is_root(node);
        // A link, and a fifo or socket that somebody else put into the upper, cannot hold
        // an xattr.
        if let Some(stat) = disk.filter(|stat| !matches!(stat.kind(), Some(Kind::File | Kind::Dir))) {
            let stored = self.owners.stored(meta)?;
            let owner = (stored.uid, stored.gid);
            let default = if by_disk { (stat.uid, stat.gid) } else { self.owners.default };
            self.upper()?.sidecar.set_owner(&stat, (owner != default).then_some(owner))?;
            if node.kind != Kind::Symlink {
                chmod(at, meta.perm & 0o777)?;
            }
            // Changes nothing but the change time.
            match target {
                Target::Name(dir, name) => {
                    rustix::fs::chownat(dir, &**name, None, None, AtFlags::SYMLINK_NOFOLLOW)?;
                }
                Target::Object(object) => {
                    rustix::fs::chownat(object, c"", None, None, AtFlags::EMPTY_PATH)?;
                }
                Target::File(_) | Target::None => {}
            }
            return Ok(false);
        }
        // Before the mode: a crash in between must not leave a mode that was never
        // asked for together with an old record.
        if needed {
            self.owners.write_record(at, &meta)?;
        }
        // The upper's own directory keeps the mode that its owner gave it.
        let is_file = node.kind == Kind::File && matches!(target, Target::File(_));
        if is_file || node.kind == Kind::Dir && !Self::is_root(node) {
            chmod(at, meta.disk_perm()).inspect_err(|_| {
                // What failed must not show after a remount.
                let undone = match (needed, had_record) {
                    (false, _) => Ok(()),
                    (true, true) => self.owners.write_record(at, &old),
                    (true, false) => self.drop_records(at),
                };
                if let Err(err) = undone {
                    tracing::warn!(?err, "a record is ahead of a change that failed");
                }
            })?;
        }
        if !needed && had_record {
            self.drop_records(at)?;
        }
        Ok(needed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owners(form: OwnerForm) -> Ownership {
        Ownership::new(&OverlaySpec { owner_form: form, ..OverlaySpec::default() })
    }

    fn dir(uid: u32, gid: u32) -> Stat {
        Stat { mode: 0o040_755, uid, gid, ..Stat::default() }
    }

    #[test]
    fn ids_are_mapped_both_ways() {
        let extent = |outside, inside, count| IdExtent { inside, outside, count };
        let map = [extent(0, 1000, 1), extent(1, 110_000, 65536)];
        assert_eq!([0, 1, 33].map(|id| shown(&map, id)), [1000, 110_000, 110_032]);
        assert_eq!(shown(&map, 70_000), OVERFLOW);
        assert_eq!([1000, 110_032, 0].map(|id| stored(&map, id)), [Some(0), Some(33), None]);
        assert_eq!((shown(&[], 7), stored(&[], 7)), (7, Some(7)));
    }

    #[test]
    fn an_upper_is_read_by_whom_it_tells_the_truth() {
        let (me, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let (recorded, native) = (owners(OwnerForm::Recorded), owners(OwnerForm::Native));
        let inside = owners(OwnerForm::RecordedByDisk);
        let reads = |o: &Ownership, mark: Option<&str>, root: Stat| o.can_read(mark, &root);
        assert!(!reads(&recorded, Some("native"), dir(0, 0)) && reads(&native, Some("native"), dir(5, 5)));
        assert!(!reads(&inside, Some("native"), dir(0, 0)));
        for (mark, root, yes) in [
            (Some("recorded:0:0"), dir(0, 0), true),
            (Some("recorded:0:0"), dir(1000, 0), false),
            (Some("recorded:7:8"), dir(7, 8), true),
            (Some("recorded:disk"), dir(1000, 0), true),
            (None, dir(0, 0), true),
            (None, dir(1000, 1000), false),
            (Some("something else"), dir(0, 0), false),
        ] {
            assert_eq!(reads(&native, mark, root), yes, "{mark:?} {root:?}");
        }
        assert!(reads(&recorded, Some("recorded:0:0"), dir(9, 9)) && reads(&recorded, None, dir(9, 9)));
        assert!(!reads(&recorded, Some("recorded:7:8"), dir(7, 8)));
        assert!(!reads(&recorded, Some("recorded:disk"), dir(0, 0)));
        assert!(reads(&inside, Some("recorded:disk"), dir(9, 9)));
        assert!(reads(&inside, Some(&format!("recorded:{me}:{group}")), dir(9, 9)));
        for form in [&recorded, &native, &inside] {
            assert!(reads(form, Some(&form.mark(true)), dir(me, group)), "{form:?}");
        }
    }
}
