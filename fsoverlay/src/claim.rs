//! What an upper goes through when a server takes it: left-overs go, unless they are another server's, and
//! it is seen whether its content can be relied on.
//!
//! An upper that is served *volatile* is never synced. Until the machine stops that makes no difference:
//! what was written is in the memory of the kernel, whoever wrote it. After a power failure any part of
//! it can be missing. So the kernel's overlayfs makes the directory `work/incompat/volatile` in the
//! work directory, and never again mounts an upper whose work directory has it; and so does this
//! server, with a difference: it notes in there which run of the machine it was, and takes the upper again
//! in the same one. Then, without `volatile`, it brings everything to the disk first, and the mark is
//! removed.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};

use crate::Error;
use crate::attr::Kind;
use crate::config::UpperSpec;
use crate::engine::open_error;
use crate::errno::{Errno, Res, missing_ok};
use crate::layer::stat_at;
use crate::upper::Upper;

/// The way to the mark, in the work directory.
const MARK: [&str; 3] = ["work", "incompat", "volatile"];
/// In the mark: the `boot_id` of the kernel that had the changes in memory.
const BOOT: &str = "boot_id";

fn boot_id() -> Res<Vec<u8>> {
    std::fs::read("/proc/sys/kernel/random/boot_id")
        .map_err(|err| Errno::from_io_error(&err).unwrap_or(Errno::IO))
}

fn open_dir(at: impl AsFd, name: &str) -> Res<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(at, name, flags, Mode::empty())
}

impl Upper {
    /// Makes the upper this server's own.
    pub(crate) fn claim(&self, spec: &UpperSpec) -> Result<(), Error> {
        let failed = |err| open_error(&spec.work, err);
        if self.lock().map_err(|err| open_error(&spec.dir, err))? {
            if let Err(err) = self.remove_leftovers() {
                // They take room, and nothing looks at them.
                tracing::debug!(?err, "the work directory cannot be cleaned");
            }
        } else {
            // As with the kernel's overlayfs. One that is about to end must not keep the next from starting.
            tracing::warn!(
                upper = %spec.dir.display(),
                "another server has this upper: what it shows and keeps if both change it is not defined"
            );
        }
        let mark = missing_ok(self.mark(false)).map_err(failed)?;
        if let Some(mark) = &mark {
            let boot = missing_ok(read(mark)).map_err(failed)?;
            if boot.is_none_or(|boot| boot_id() != Ok(boot)) {
                return Err(Error::Volatile {
                    mark: MARK.iter().fold(spec.work.clone(), |path, name| path.join(name)),
                });
            }
        }
        match (spec.volatile, mark) {
            (true, None) => self.write_mark().map_err(failed),
            (false, Some(mark)) => self.remove_mark(&mark).map_err(failed),
            _ => Ok(()),
        }
    }

    /// Takes the upper's lock, for as long as it is open; false if another server has it.
    fn lock(&self) -> Res<bool> {
        let root = self.root.slot.get(false).ok_or(Errno::STALE)?;
        let fd = open_dir(&root, ".")?;
        match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                let _ = self.locked.set(fd);
                Ok(true)
            }
            Err(Errno::WOULDBLOCK) => Ok(false),
            // A file system without locks.
            Err(_) => Ok(true),
        }
    }

    /// The directory that is the mark.
    fn mark(&self, make: bool) -> Res<OwnedFd> {
        let mut at = open_dir(&self.work, ".")?;
        for name in MARK {
            if make {
                match rustix::fs::mkdirat(&at, name, Mode::from_raw_mode(0o700)) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(err) => return Err(err),
                }
            }
            at = match open_dir(&at, name) {
                // The kernel's overlayfs takes all rights from its directory, which root needs none of.
                Err(Errno::ACCESS) if stat_at(at.as_fd(), name.as_bytes())?.kind() == Some(Kind::Dir) => {
                    rustix::fs::chmodat(&at, name, Mode::from_raw_mode(0o700), AtFlags::empty())?;
                    open_dir(&at, name)?
                }
                other => other?,
            };
        }
        Ok(at)
    }

    fn write_mark(&self) -> Res<()> {
        let mark = self.mark(true)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&mark, BOOT, flags, Mode::from_raw_mode(0o600))?;
        crate::copyup::write_all(fd.as_fd(), &boot_id()?, 0)?;
        // The only thing of this run that must outlive a power failure, with all names that lead to it, whoever
        // made them. A journal has written the directories with the file.
        rustix::fs::fsync(&fd)?;
        let mut at = open_dir(&self.work, ".")?;
        for name in MARK {
            sync_dir(&at)?;
            at = open_dir(&at, name)?;
        }
        sync_dir(&mark)
    }

    fn remove_mark(&self, mark: &OwnedFd) -> Res<()> {
        rustix::fs::syncfs(mark)?;
        rustix::fs::unlinkat(mark, BOOT, AtFlags::empty())?;
        let work = open_dir(&self.work, MARK[0])?;
        rustix::fs::unlinkat(open_dir(&work, MARK[1])?, MARK[2], AtFlags::REMOVEDIR)?;
        rustix::fs::unlinkat(&work, MARK[1], AtFlags::REMOVEDIR)
    }
}

/// Brings the names in a directory to the disk, as far as its file system has a way for that.
fn sync_dir(dir: &OwnedFd) -> Res<()> {
    match rustix::fs::fsync(dir) {
        // It syncs files only.
        Err(Errno::INVAL | Errno::ROFS) => Ok(()),
        synced => synced,
    }
}

fn read(mark: &OwnedFd) -> Res<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(mark, BOOT, flags, Mode::empty())?;
    let mut text = vec![0; 64];
    let n = rustix::io::read(&fd, &mut text)?;
    text.truncate(n);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_that_cannot_be_synced_are_none_to_fail_for() {
        // As there.
        let proc = open_dir(rustix::fs::CWD, "/proc").expect("a directory");
        assert_eq!(rustix::fs::fsync(&proc), Err(Errno::INVAL));
        assert_eq!(sync_dir(&proc), Ok(()));
        let file =
            rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::PATH, Mode::empty()).expect("opened");
        assert_eq!(sync_dir(&file), Err(Errno::BADF));
    }
}
