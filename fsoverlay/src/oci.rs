//! Whiteouts by name: `.wh.NAME` says that NAME is gone below, `.wh..wh..opq` that everything is.
//!
//! It is the form of layers in archives, and the one in which containers/storage unpacks them for a
//! mount program; fuse-overlayfs writes it where it may not make devices. Names of that kind are
//! nothing special otherwise: a file of anybody's may be called so. They count only in layers for which
//! that was asked ([`crate::LayerSpec::oci_whiteouts`]), and not even there in what was an upper of ours, which
//! says so. An upper of fuse-overlayfs is turned into the kernel's form once ([`convert_upper`]).
//!
//! An object that stands beside its own whiteout is there; a directory then hides what is below.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, XattrFlags};

use crate::Error;
use crate::attr::Kind;
use crate::engine::Engine;
use crate::errno::{Errno, Res, gives_way, missing_ok};
use crate::layer::{RealDir, UPPER, open_for_reading, open_root, stat_at, stat_fd};
use crate::object::gone_below;
use crate::readdir::for_each_entry;
use crate::sys::{self, At};
use crate::xattr::{OPAQUE, OWNERS};

const PREFIX: &[u8] = b".wh.";
const RESERVED: &[u8] = b".wh..wh.";
const OPAQUE_NAME: &[u8] = b".wh..wh..opq";

/// What a name says where whiteouts have names.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Said<'a> {
    /// Nothing: an ordinary name.
    Nothing,
    /// This name is gone below.
    Gone(&'a [u8]),
    /// Something about the directory, or nothing that is known.
    Other,
}

/// Reads an entry of a directory.
pub(crate) fn said(name: &[u8], kind: Option<Kind>) -> Said<'_> {
    match name.strip_prefix(PREFIX) {
        _ if name.starts_with(RESERVED) => Said::Other,
        Some(gone) if !gone.is_empty() && kind != Some(Kind::Dir) => Said::Gone(gone),
        _ => Said::Nothing,
    }
}

/// What one directory says is gone.
#[derive(Debug)]
pub(crate) enum Gone {
    Names(HashSet<Box<[u8]>>),
    /// Too much to keep, or to read for the sake of one name, or nothing that may be read: whoever wants to know looks for the whiteout.
    Many,
}

/// How many bytes of names are kept of one directory, and how many entries are read for them. A layer
/// is somebody else's, and what may have millions of entries must cost each of its names a system call at most.
const MAX_KEPT: usize = 32 << 10;
const MAX_READ: usize = 1 << 16;
/// A directory that says so much of its size is not read by who gives way ([`crate::near`]).
const LARGE: u64 = 32 << 10;
/// What a kept name takes beside its bytes.
const OVERHEAD: usize = 32;

impl Gone {
    /// Whether `name`, of this directory, is gone below.
    fn has(&self, dir: BorrowedFd<'_>, name: &[u8]) -> Res<bool> {
        match self {
            Self::Names(names) => Ok(names.contains(name)),
            Self::Many => is_gone_by_name(dir, name),
        }
    }
}

/// Whether a directory has the whiteout of a name.
fn is_gone_by_name(dir: BorrowedFd<'_>, name: &[u8]) -> Res<bool> {
    let mark = [PREFIX, name].concat();
    if said(&mark, None) != Said::Gone(name) {
        return Ok(false);
    }
    match stat_at(dir, &mark) {
        Ok(stat) => Ok(stat.kind() != Some(Kind::Dir)),
        // Longer than a name can be.
        Err(Errno::NOENT | Errno::NAMETOOLONG | Errno::ACCESS | Errno::PERM) => Ok(false),
        Err(err) => Err(err),
    }
}

fn read_gone(dir: BorrowedFd<'_>) -> Res<Option<Arc<Gone>>> {
    let fd = match open_for_reading(dir) {
        Ok(fd) => fd,
        // It may be one to search, where names say the same as in any other.
        Err(Errno::ACCESS | Errno::PERM) => return Ok(Some(Arc::new(Gone::Many))),
        Err(err) if gone_below(err) => return Ok(None),
        Err(err) => return Err(err),
    };
    let mut gone = HashSet::<Box<[u8]>>::new();
    let (mut kept, mut read) = (0, 0);
    for_each_entry(&fd, |name, kind, _| {
        read += 1;
        if let Said::Gone(name) = said(name, kind) {
            kept += name.len() + OVERHEAD;
            gone.insert(name.into());
        }
        kept <= MAX_KEPT && read < MAX_READ
    })?;
    if kept > MAX_KEPT || read >= MAX_READ {
        return Ok(Some(Arc::new(Gone::Many)));
    }
    Ok((!gone.is_empty()).then(|| Arc::new(Gone::Names(gone))))
}

impl Engine {
    /// Whether whiteouts have names in this directory.
    pub(crate) fn has_named_whiteouts(&self, dir: &RealDir) -> bool {
        dir.layer != UPPER && self.layers.get(dir.layer as usize).is_some_and(|layer| layer.oci_whiteouts)
    }

    /// Whether a directory with named whiteouts says that a name is gone below.
    pub(crate) fn is_gone(&self, dir: &Arc<RealDir>, name: &[u8]) -> Res<bool> {
        if self.live.is_some() {
            // Nothing is kept: one name is asked for rather than all.
            return is_gone_by_name(self.fd(dir)?.as_fd(), name);
        }
        // Reading a large one takes long.
        if gives_way() && dir.gone.get().is_none() {
            let fd = self.fd(dir)?;
            if stat_at(fd.as_fd(), b".")?.size > LARGE {
                return is_gone_by_name(fd.as_fd(), name);
            }
        }
        match self.gone_names(dir)? {
            Some(gone) => gone.has(self.fd(dir)?.as_fd(), name),
            None => Ok(false),
        }
    }

    /// What it says is gone, read once.
    fn gone_names(&self, dir: &Arc<RealDir>) -> Res<Option<Arc<Gone>>> {
        if let Some(known) = dir.gone.get() {
            return Ok(known.clone());
        }
        let gone = read_gone(self.fd(dir)?.as_fd())?;
        Ok(dir.gone.get_or_init(|| gone).clone())
    }
}

/// Whether a directory hides what is below by a name in it.
pub(crate) fn is_opaque_by_name(dir: BorrowedFd<'_>) -> Res<bool> {
    match missing_ok(stat_at(dir, OPAQUE_NAME)) {
        Err(Errno::ACCESS | Errno::PERM) => Ok(false),
        found => found.map(|found| found.is_some()),
    }
}

/// The same for the directory at a name.
pub(crate) fn is_opaque_below(dir: BorrowedFd<'_>, name: &[u8]) -> Res<bool> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(dir, name, flags, Mode::empty()) {
        Ok(fd) => is_opaque_by_name(fd.as_fd()),
        Err(Errno::ACCESS | Errno::PERM) => Ok(false),
        Err(err) if gone_below(err) => Ok(false),
        Err(err) => Err(err),
    }
}

/// Turns the whiteouts by name of an upper directory, as fuse-overlayfs leaves them, into those of the
/// kernel's overlayfs, which fuse-overlayfs reads as well. An upper of ours, where such names are
/// ordinary, says so and is left as it is. If it is interrupted, what was turned and what was not say the
/// same.
///
/// # Errors
/// If a directory cannot be read, or a whiteout cannot be made.
pub fn convert_upper(dir: &Path) -> Result<(), Error> {
    let convert = || -> Res<()> {
        let root = open_for_reading(open_root(dir)?.as_fd())?;
        let at = At::Fd(root.as_fd());
        if sys::get_xattr_vec(at, OWNERS)?.is_some() {
            return Ok(());
        }
        // One descriptor, down and up again: trees may be deep.
        let mut fd = root;
        let mut left = convert_dir(&fd)?;
        let mut above = Vec::new();
        loop {
            if let Some(name) = left.pop() {
                let key = stat_fd(fd.as_fd())?.key;
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let child = rustix::fs::openat(&fd, &*name, flags, Mode::empty())?;
                let names = convert_dir(&child)?;
                if names.is_empty() {
                    // Nothing is below it, and there may be no way up from it: it may be closed to a search.
                    continue;
                }
                above.push((key, std::mem::replace(&mut left, names)));
                fd = child;
            } else if let Some((key, names)) = above.pop() {
                fd = open_parent(&fd)?;
                if stat_fd(fd.as_fd())?.key != key {
                    // Somebody has moved what is converted.
                    return Err(Errno::STALE);
                }
                left = names;
            } else {
                break;
            }
        }
        Ok(())
    };
    convert().map_err(|err| Error::Open { path: dir.to_owned(), source: err.into() })
}

fn open_parent(dir: &OwnedFd) -> Res<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, c"..", flags, Mode::empty())
}

/// One directory; gives the names of those in it.
fn convert_dir(dir: &OwnedFd) -> Res<Vec<Box<[u8]>>> {
    let (mut dirs, mut marks) = (Vec::<Box<[u8]>>::new(), Vec::<Box<[u8]>>::new());
    for_each_entry(dir, |name, kind, _| {
        if said(name, kind) != Said::Nothing {
            marks.push(Box::from(name));
        } else if matches!(kind, Some(Kind::Dir) | None) {
            dirs.push(Box::from(name));
        }
        true
    })?;
    dirs.retain(|name| stat_at(dir.as_fd(), name).is_ok_and(|s| s.kind() == Some(Kind::Dir)));
    let hide = |at| sys::set_xattr(at, OPAQUE, b"y", XattrFlags::empty());
    for mark in &marks {
        match said(mark, None) {
            Said::Gone(name) => match missing_ok(stat_at(dir.as_fd(), name))? {
                Some(found) if found.kind() == Some(Kind::Dir) => hide(At::Name(dir.as_fd(), name))?,
                Some(_) => {}
                None => rustix::fs::mknodat(dir, name, FileType::CharacterDevice, Mode::empty(), 0)?,
            },
            _ if **mark == *OPAQUE_NAME => hide(At::Fd(dir.as_fd()))?,
            _ => continue,
        }
        // Only when what it says is said in the other way.
        rustix::fs::unlinkat(dir, &**mark, AtFlags::empty())?;
    }
    Ok(dirs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LayerSpec;
    use crate::engine::tests::Scratch;

    #[test]
    fn many_whiteouts_cost_no_memory_and_say_the_same() {
        let scratch = Scratch::new("many-gone");
        let lower = scratch.dir.join("lower");
        let high = scratch.dir.join("high");
        for dir in ["few", "many", "full"] {
            std::fs::create_dir_all(lower.join(dir)).expect("made");
            std::fs::create_dir_all(high.join(dir).join(".wh.dir")).expect("made");
            for name in ["gone", "there", "dir", ".wh.x"] {
                std::fs::write(lower.join(dir).join(name), "").expect("written");
            }
            for name in [".wh.gone", ".wh..wh.x"] {
                std::fs::write(high.join(dir).join(name), "").expect("written");
            }
        }
        for i in 0..2000 {
            std::fs::write(high.join(format!("many/.wh.{i:040}")), "").expect("written");
        }
        for i in 0..MAX_READ {
            std::fs::hard_link(high.join("full/.wh.gone"), high.join(format!("full/{i}")))
                .or_else(|_| {
                    // Only so many names of one file.
                    std::fs::write(high.join(format!("full/{i}")), "")
                })
                .expect("linked");
        }
        let mut spec = scratch.spec();
        spec.layers.push(LayerSpec { dir: high.clone(), oci_whiteouts: true, ..LayerSpec::default() });
        let engine = Engine::open(&spec).expect("an overlay");
        for dir in ["few", "many", "full"] {
            let node = engine.lookup(engine.root(), dir.as_bytes()).expect("found");
            let found = |name: &str| engine.lookup(&node, name.as_bytes()).is_ok();
            assert_eq!(["gone", "there", "dir"].map(found), [false, true, true], "{dir}");
            assert!(!found(".wh.gone") && !found(&"x".repeat(255)), "{dir}");
            let real = node.dir().expect("a directory").state.read().lowers[0].clone();
            let known = real.gone.get().and_then(|gone| gone.clone()).expect("some are gone");
            assert_eq!(matches!(&*known, Gone::Many), dir != "few", "{dir}");
        }
    }

    #[test]
    fn who_gives_way_reads_no_large_directory() {
        let scratch = Scratch::new("gives-way-gone");
        let (lower, high) = (scratch.dir.join("lower"), scratch.dir.join("high"));
        for dir in ["small", "large"] {
            std::fs::create_dir_all(high.join(dir)).expect("made");
            std::fs::create_dir_all(lower.join(dir)).expect("made");
            for name in ["gone", "there"] {
                std::fs::write(lower.join(dir).join(name), "").expect("written");
            }
            std::fs::write(high.join(dir).join(".wh.gone"), "").expect("written");
        }
        let large = std::fs::File::open(high.join("large")).expect("opened");
        let size = || stat_at(large.as_fd(), b".").expect("there").size;
        for i in 0.. {
            if size() > LARGE {
                break;
            }
            // Where its size says nothing there is nothing to see.
            if i == 10_000 {
                return;
            }
            std::fs::write(high.join(format!("large/{i:0200}")), "").expect("written");
        }
        let mut spec = scratch.spec();
        spec.layers.push(LayerSpec { dir: high.clone(), oci_whiteouts: true, ..LayerSpec::default() });
        let thread = std::thread::spawn(move || {
            crate::errno::set_gives_way();
            let engine = Engine::open(&spec).expect("an overlay");
            for dir in ["small", "large"] {
                let node = engine.lookup(engine.root(), dir.as_bytes()).expect("found");
                let found = |name: &str| engine.lookup(&node, name.as_bytes()).is_ok();
                assert_eq!(["gone", "there"].map(found), [false, true], "{dir}");
                let real = node.dir().expect("a directory").state.read().lowers[0].clone();
                assert_eq!(real.gone.get().is_some(), dir == "small", "{dir}");
            }
        });
        thread.join().expect("no panic");
    }

    #[test]
    fn an_upper_is_converted_to_its_depth_and_breadth() {
        use std::os::unix::fs::FileTypeExt;

        let scratch = Scratch::new("convert");
        let upper = scratch.dir.join("upper");
        let mut dirs = vec![upper.clone()];
        for depth in 0..200 {
            let dir = dirs[depth * 3].clone();
            dirs.extend(["a", "b", "c"].map(|name| dir.join(name)));
        }
        for dir in &dirs {
            std::fs::create_dir_all(dir.join(".wh.dir")).expect("made");
            for name in [".wh.gone", ".wh..wh..opq", "there", ".wh.there"] {
                std::fs::write(dir.join(name), "").expect("written");
            }
        }
        assert!(convert_upper(&upper).is_ok());
        for dir in &dirs {
            let mut names: Vec<_> = std::fs::read_dir(dir)
                .expect("listed")
                .map(|entry| entry.expect("an entry").file_name().into_string().expect("text"))
                .filter(|name| name.len() > 1)
                .collect();
            names.sort();
            assert_eq!(names, [".wh.dir", "gone", "there"], "{}", dir.display());
            assert!(dir.join("gone").symlink_metadata().expect("there").file_type().is_char_device());
            let fd = open_root(dir).expect("opened");
            let opaque = sys::get_xattr_vec(At::Name(fd.as_fd(), b"."), OPAQUE);
            assert_eq!(opaque, Ok(Some(b"y".to_vec())));
        }
    }

    /// Root searches it all the same: for it this shows nothing.
    #[test]
    fn an_upper_is_converted_beside_what_may_not_be_searched() {
        use std::os::unix::fs::PermissionsExt;

        let scratch = Scratch::new("convert-closed");
        let upper = scratch.dir.join("upper");
        let dirs = ["a", "b", "c"].map(|name| upper.join(name));
        let closed = dirs.each_ref().map(|dir| [dir.join("empty"), dir.join("full")]).concat();
        let allow = |perm| {
            for dir in &closed {
                std::fs::set_permissions(dir, PermissionsExt::from_mode(perm)).expect("allowed");
            }
        };
        for dir in &closed {
            std::fs::create_dir_all(dir).expect("made");
        }
        for dir in &dirs {
            std::fs::write(dir.join(".wh.gone"), "").expect("written");
            std::fs::create_dir(dir.join("full/dir")).expect("made");
        }
        allow(0o400);
        let converted = convert_upper(&upper);
        allow(0o755);
        assert!(converted.is_ok(), "{converted:?}");
        for dir in &dirs {
            assert!(
                dir.join("gone").symlink_metadata().is_ok()
                    && dir.join(".wh.gone").symlink_metadata().is_err()
            );
        }
    }

    #[test]
    fn whiteouts_in_a_directory_that_can_only_be_searched_count() {
        use std::os::unix::fs::PermissionsExt;

        let scratch = Scratch::new("searched");
        let (lower, high) = (scratch.dir.join("lower/dir"), scratch.dir.join("high"));
        std::fs::create_dir_all(&lower).expect("made");
        std::fs::create_dir_all(high.join("dir")).expect("made");
        for name in [lower.join("gone"), lower.join("there"), high.join("dir/.wh.gone")] {
            std::fs::write(name, "").expect("written");
        }
        let allow = |perm| std::fs::set_permissions(high.join("dir"), PermissionsExt::from_mode(perm));
        // (Root reads it all the same.)
        allow(0o311).expect("allowed");
        let mut spec = scratch.spec();
        spec.layers.push(LayerSpec { dir: high.clone(), oci_whiteouts: true, ..LayerSpec::default() });
        let engine = Engine::open(&spec).expect("an overlay");
        let dir = engine.lookup(engine.root(), b"dir").expect("found");
        let found = |name: &[u8]| engine.lookup(&dir, name).is_ok();
        assert_eq!([&b"gone"[..], b"there", b".wh.gone"].map(found), [false, true, false]);
        allow(0o755).expect("allowed");
    }

    #[test]
    fn names_say_what_is_gone() {
        assert_eq!(said(b".wh.name", Some(Kind::File)), Said::Gone(b"name"));
        assert_eq!(said(b".wh.name", None), Said::Gone(b"name"));
        assert_eq!(said(b".wh..hidden", Some(Kind::File)), Said::Gone(b".hidden"));
        for other in [OPAQUE_NAME, b".wh..wh.plnk"] {
            assert_eq!(said(other, Some(Kind::File)), Said::Other);
        }
        for plain in [&b".wh."[..], b".wh", b"x.wh.y", b".WH.x"] {
            assert_eq!(said(plain, Some(Kind::File)), Said::Nothing);
        }
        assert_eq!(said(b".wh.dir", Some(Kind::Dir)), Said::Nothing);
    }
}
