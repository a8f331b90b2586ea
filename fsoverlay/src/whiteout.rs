//! Whiteouts: what says in the upper that a name below is gone.
//!
//! The kernel's first form is a character device 0:0, which any user may make since
//! Linux 5.8. Where mknod is refused all the same, the second form is used, which the
//! kernel reads since 6.8: an empty file with the xattr `user.overlay.whiteout`, in a
//! directory marked `user.overlay.opaque=x`.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, XattrFlags};

use crate::attr::Kind;
use crate::engine::Engine;
use crate::errno::{Errno, Res};
use crate::layer::{RealDir, open_for_reading, stat_at, stat_fd};
use crate::sidecar::is_needed;
use crate::sys::{self, At};
use crate::upper::Upper;
use crate::xattr::{OPAQUE, WHITEOUT, WHITEOUTS};

/// Which form this upper takes.
#[derive(Debug, Default)]
pub(crate) struct WhiteoutForm {
    xattr: AtomicBool,
}

impl WhiteoutForm {
    pub(crate) fn is_xattr(&self) -> bool {
        self.xattr.load(Ordering::Relaxed)
    }
}

impl Upper {
    /// Runs `make` with fresh names of the work directory until one is free.
    pub(crate) fn make_temp<T>(&self, mut make: impl FnMut(&[u8]) -> Res<T>) -> Res<(T, Box<[u8]>)> {
        loop {
            let name = self.temp_name();
            match make(&name) {
                Err(Errno::EXIST) => {}
                Err(err) => return Err(err),
                Ok(made) => return Ok((made, name)),
            }
        }
    }

    /// Removes a file of the work directory; a failure leaves garbage only.
    pub(crate) fn remove_temp(&self, name: &[u8]) {
        // Something may have been said of a link on its way.
        let stat = if self.sidecar.is_empty() { None } else { stat_at(self.work.as_fd(), name).ok() };
        let link = stat.filter(|stat| is_needed(stat) && stat.nlink <= 1);
        match rustix::fs::unlinkat(&self.work, name, AtFlags::empty()) {
            Ok(()) => link.into_iter().for_each(|link| self.sidecar.forget(&link)),
            Err(err) => tracing::debug!(?err, "cannot remove a temporary file of the work directory"),
        }
    }

    /// Makes a whiteout in the work directory.
    pub(crate) fn temp_whiteout(&self) -> Res<Box<[u8]>> {
        if !self.whiteout_form.is_xattr() {
            let made = self.make_temp(|name| {
                rustix::fs::mknodat(&self.work, name, FileType::CharacterDevice, Mode::empty(), 0)
            });
            match made {
                Err(Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP) => {
                    self.whiteout_form.xattr.store(true, Ordering::Relaxed);
                }
                other => return other.map(|((), name)| name),
            }
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let (fd, name) =
            self.make_temp(|name| rustix::fs::openat(&self.work, name, flags, Mode::from_raw_mode(0o600)))?;
        match sys::set_xattr(At::Fd(fd.as_fd()), WHITEOUT, b"y", XattrFlags::empty()) {
            Ok(()) => Ok(name),
            Err(err) => {
                self.remove_temp(&name);
                Err(err)
            }
        }
    }
}

impl Engine {
    /// Puts a whiteout at `name` of an upper directory, over whatever file is there
    /// (never over a directory). Atomic: the name is never missing in between. The
    /// caller holds the directory's lock.
    pub(crate) fn put_whiteout(&self, dir: &Arc<RealDir>, name: &[u8], occupied: bool) -> Res<()> {
        let upper = self.upper()?;
        let fd = self.fd(dir)?;
        if !occupied && !upper.whiteout_form.is_xattr() {
            match rustix::fs::mknodat(&fd, name, FileType::CharacterDevice, Mode::empty(), 0) {
                Err(Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP | Errno::EXIST) => {}
                other => return other,
            }
        }
        let temp = self.temp_whiteout_for(dir)?;
        let moved = rustix::fs::renameat_with(&upper.work, &*temp, &fd, name, RenameFlags::empty());
        if moved.is_err() {
            upper.remove_temp(&temp);
        }
        moved
    }

    /// Makes a whiteout in the work directory that may be moved to `dir`.
    pub(crate) fn temp_whiteout_for(&self, dir: &Arc<RealDir>) -> Res<Box<[u8]>> {
        let upper = self.upper()?;
        let temp = upper.temp_whiteout()?;
        if let Err(err) = self.allow_xattr_whiteouts(dir) {
            upper.remove_temp(&temp);
            return Err(err);
        }
        Ok(temp)
    }

    /// Marks a directory as one that may hold whiteouts of the second form.
    pub(crate) fn allow_xattr_whiteouts(&self, dir: &Arc<RealDir>) -> Res<()> {
        if !self.upper()?.whiteout_form.is_xattr() || dir.xattr_whiteouts.load(Ordering::Relaxed) {
            return Ok(());
        }
        let fd = self.fd(dir)?;
        let at = At::Name(fd.as_fd(), b".");
        // An opaque directory needs no whiteouts for long, and its mark must not be weakened.
        let opaque = sys::get_xattr_vec(at, OPAQUE)?.as_deref() == Some(b"y");
        let (mark, value) = if opaque { (WHITEOUTS, b"y") } else { (OPAQUE, b"x") };
        sys::set_xattr(at, mark, value, XattrFlags::empty())?;
        dir.xattr_whiteouts.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Hides everything below a directory of the upper.
    pub(crate) fn set_opaque(&self, dir: &Arc<RealDir>) -> Res<()> {
        let fd = self.fd(dir)?;
        let at = At::Name(fd.as_fd(), b".");
        if dir.xattr_whiteouts.load(Ordering::Relaxed) {
            // The mark that makes them whiteouts is about to be replaced; they must not be files.
            sys::set_xattr(at, WHITEOUTS, b"y", XattrFlags::empty())?;
        }
        sys::set_xattr(at, OPAQUE, b"y", XattrFlags::empty())
    }

    /// Whether an upper (or lower) directory has a whiteout at `name`.
    pub(crate) fn is_whiteout(&self, dir: &Arc<RealDir>, name: &[u8]) -> Res<bool> {
        let fd = self.fd(dir)?;
        let stat = match stat_at(fd.as_fd(), name) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(false),
            Err(err) => return Err(err),
        };
        if stat.is_whiteout() {
            return Ok(true);
        }
        if dir.xattr_whiteouts.load(Ordering::Relaxed) && stat.kind() == Some(Kind::File) && stat.size == 0 {
            return Ok(sys::get_xattr_vec(At::Name(fd.as_fd(), name), WHITEOUT)?.is_some());
        }
        Ok(false)
    }

    /// Removes the whiteouts of a directory that has nothing below any more. A failure
    /// leaves what is not needed.
    pub(crate) fn sweep_whiteouts(&self, dir: &Arc<RealDir>) {
        if let Err(err) = self.remove_whiteouts(dir) {
            tracing::debug!(?err, "whiteouts were left in a directory that needs none");
        }
    }

    /// The same, as far as it goes.
    pub(crate) fn remove_whiteouts(&self, dir: &Arc<RealDir>) -> Res<()> {
        let fd = self.fd(dir)?;
        let mut suspects: Vec<Box<[u8]>> = Vec::new();
        let by_xattr = dir.xattr_whiteouts.load(Ordering::Relaxed);
        crate::readdir::for_each_entry(&open_for_reading(fd.as_fd())?, |name, kind, _| {
            match kind {
                Some(Kind::Char) | None => suspects.push(name.into()),
                Some(Kind::File) if by_xattr => suspects.push(name.into()),
                Some(_) => {}
            }
            true
        })?;
        if suspects.is_empty() {
            return Ok(());
        }
        // Nothing that shows has changed.
        let before = stat_fd(fd.as_fd())?;
        let removed = suspects.iter().try_for_each(|name| {
            if self.is_whiteout(dir, name)? {
                rustix::fs::unlinkat(&fd, &**name, AtFlags::empty())
            } else {
                Ok(())
            }
        });
        self.restore_times(fd.as_fd(), &before);
        removed
    }

    /// Removes a directory that holds nothing but whiteouts, after it was moved into the
    /// work directory. A failure leaves garbage there only.
    pub(crate) fn discard_temp_dir(&self, name: &[u8]) {
        let discard = || remove_flat_dir(self.upper()?.work.as_fd(), name);
        if let Err(err) = discard() {
            tracing::debug!(?err, "cannot remove a replaced directory from the work directory");
        }
    }
}

/// Removes a directory in which there is no other.
pub(crate) fn remove_flat_dir(parent: BorrowedFd<'_>, name: &[u8]) -> Res<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    let mut names: Vec<Box<[u8]>> = Vec::new();
    crate::readdir::for_each_entry(&fd, |name, _, _| {
        names.push(name.into());
        true
    })?;
    for entry in names {
        rustix::fs::unlinkat(&fd, &*entry, AtFlags::empty())?;
    }
    rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)
}
