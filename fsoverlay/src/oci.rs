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
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, XattrFlags};

use crate::Error;
use crate::attr::Kind;
use crate::engine::{Engine, gone_below};
use crate::errno::{Errno, Res, missing_ok};
use crate::layer::{RealDir, UPPER, open_for_reading, open_root, stat_at};
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

/// The names that one directory says are gone.
pub(crate) type Gone = HashSet<Box<[u8]>>;

fn read_gone(dir: BorrowedFd<'_>) -> Res<Option<Arc<Gone>>> {
    let fd = match open_for_reading(dir) {
        Ok(fd) => fd,
        Err(Errno::ACCESS | Errno::PERM) => return Ok(None),
        Err(err) if gone_below(err) => return Ok(None),
        Err(err) => return Err(err),
    };
    let mut gone = Gone::new();
    for_each_entry(&fd, |name, kind, _| {
        if let Said::Gone(name) = said(name, kind) {
            gone.insert(name.into());
        }
        true
    })?;
    Ok((!gone.is_empty()).then(|| Arc::new(gone)))
}

impl Engine {
    /// Whether whiteouts have names in this directory.
    pub(crate) fn has_named_whiteouts(&self, dir: &RealDir) -> bool {
        dir.layer != UPPER && self.layers.get(dir.layer as usize).is_some_and(|layer| layer.oci_whiteouts)
    }

    /// What a directory with named whiteouts says is gone; read once, if layers do not change.
    pub(crate) fn gone_names(&self, dir: &Arc<RealDir>) -> Res<Option<Arc<Gone>>> {
        if self.live.is_some() {
            return read_gone(self.fd(dir)?.as_fd());
        }
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
        // Each with its directory: trees may be deep, and descriptors are few.
        let mut paths: Vec<Vec<Box<[u8]>>> = vec![Vec::new()];
        while let Some(path) = paths.pop() {
            let mut fd = rustix::io::fcntl_dupfd_cloexec(&root, 0)?;
            for name in &path {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                fd = rustix::fs::openat(&fd, &**name, flags, Mode::empty())?;
            }
            for name in convert_dir(&fd)? {
                paths.push(path.iter().cloned().chain([name]).collect());
            }
        }
        Ok(())
    };
    convert().map_err(|err| Error::Open { path: dir.to_owned(), source: err.into() })
}

/// One directory; gives the names of those in it.
fn convert_dir(dir: &std::os::fd::OwnedFd) -> Res<Vec<Box<[u8]>>> {
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
