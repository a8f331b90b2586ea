//! The writable layer: its directory and its work directory, opened and checked.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::fs::AtFlags;

use crate::config::UpperSpec;
use crate::engine::{Engine, open_error};
use crate::errno::{Errno, Res};
use crate::handle::Fd;
use crate::inode::Node;
use crate::layer::{RealDir, UPPER, open_root, stat_fd};
use crate::links::Links;
use crate::ownership::Ownership;
use crate::sidecar::Sidecar;
use crate::whiteout::WhiteoutForm;
use crate::xattr::{Marks, OWNERS};
use crate::{Error, sys};

/// The writable layer, open.
#[derive(Debug)]
pub(crate) struct Upper {
    pub(crate) root: Arc<RealDir>,
    /// The work directory: temporary names live here until they are complete.
    pub(crate) work: Fd,
    counter: AtomicU64,
    pub(crate) whiteout_form: WhiteoutForm,
    pub(crate) sidecar: Sidecar,
    /// How it says that it keeps owners.
    mark: Option<String>,
    pub(crate) links: Links,
    /// Something was changed through this overlay.
    touched: AtomicBool,
    /// The upper held something before the first change; set with `touched`.
    held_something: AtomicBool,
    /// Owner, mode, times or xattrs of a directory were changed: the only lasting
    /// change that a walk of the upper does not show.
    pub(crate) dir_meta_changed: AtomicBool,
    /// Nothing is synced.
    pub(crate) volatile: bool,
    /// Open while it holds the upper's lock.
    pub(crate) locked: OnceLock<OwnedFd>,
}

impl Upper {
    pub(crate) fn open(spec: &UpperSpec, owners: &Ownership) -> Result<Self, Error> {
        let dir = open_root(&spec.dir).map_err(|err| open_error(&spec.dir, err))?;
        let stat = stat_fd(dir.as_fd()).map_err(|err| open_error(&spec.dir, err))?;
        rustix::fs::accessat(
            &dir,
            c".",
            rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK,
            AtFlags::EACCESS,
        )
        .map_err(|err| open_error(&spec.dir, err))?;
        let work = open_root(&spec.work).map_err(|err| open_error(&spec.work, err))?;
        let work_stat = stat_fd(work.as_fd()).map_err(|err| open_error(&spec.work, err))?;
        if work_stat.key.dev != stat.key.dev {
            return Err(Error::WorkElsewhere { upper: spec.dir.clone(), work: spec.work.clone() });
        }
        // What the merged directory has is found by its bytes.
        if crate::layer::open_for_reading(dir.as_fd()).is_ok_and(|dir| crate::readdir::says_folds_case(&dir))
        {
            return Err(Error::FoldsCase { path: spec.dir.clone() });
        }
        let root = sys::At::Name(dir.as_fd(), b".");
        match sys::get_xattr(root, OWNERS, &mut []) {
            Ok(_) | Err(Errno::NODATA | Errno::RANGE) => {}
            Err(Errno::OPNOTSUPP) => return Err(Error::NoXattrs { path: spec.dir.clone() }),
            Err(err) => return Err(open_error(&spec.dir, err)),
        }
        let marks = Marks::read(root).map_err(|err| open_error(&spec.dir, err))?;
        if (marks.owners.is_some() || marks.record.is_some())
            && !owners.can_read(marks.owners.as_deref(), &stat)
        {
            let found = marks.owners.unwrap_or_else(|| "recorded".to_owned());
            return Err(Error::OwnersKept { path: spec.dir.clone(), found });
        }
        let work = Arc::new(work);
        Ok(Self {
            root: RealDir::root(UPPER, Arc::new(dir), stat.key, None),
            sidecar: Sidecar::open(work.clone(), spec.volatile)
                .map_err(|err| open_error(&spec.work.join("owners"), err))?,
            links: Links::default(),
            work,
            counter: AtomicU64::new(u64::from(std::process::id()) << 32),
            whiteout_form: WhiteoutForm::default(),
            mark: marks.owners,
            touched: AtomicBool::new(false),
            held_something: AtomicBool::new(false),
            dir_meta_changed: AtomicBool::new(false),
            volatile: spec.volatile,
            locked: OnceLock::new(),
        })
    }

    /// A name for the work directory that was not used before by this process; if a
    /// left-over of another one has it, the caller gets `EEXIST` and asks again.
    pub(crate) fn temp_name(&self) -> Box<[u8]> {
        format!("#{:x}", self.counter.fetch_add(1, Ordering::Relaxed)).into_bytes().into()
    }

    /// Removes what a killed server left in the work directory: files on their way into the upper or out of
    /// it, and directories with whiteouts at most.
    pub(crate) fn remove_leftovers(&self) -> Res<()> {
        let work = self.work.as_fd();
        let mut names: Vec<Box<[u8]>> = Vec::new();
        crate::readdir::for_each_entry(&crate::layer::open_for_reading(work)?, |name, _, _| {
            if is_temp_name(name) {
                names.push(name.into());
            }
            true
        })?;
        for name in names {
            let removed = match rustix::fs::unlinkat(work, &*name, AtFlags::empty()) {
                Err(Errno::ISDIR) => crate::whiteout::remove_flat_dir(work, &name),
                other => other,
            };
            if let Err(err) = removed {
                tracing::debug!(?err, "a left-over stays in the work directory");
            }
        }
        Ok(())
    }

    fn is_empty(&self) -> Res<bool> {
        let root = self.root.slot.get(false).ok_or(Errno::STALE)?;
        let fd = crate::layer::open_for_reading(root.as_fd())?;
        let mut empty = true;
        crate::readdir::for_each_entry(&fd, |_, _, _| {
            empty = false;
            false
        })?;
        Ok(empty)
    }

    pub(crate) fn was_touched(&self) -> bool {
        self.touched.load(Ordering::Acquire)
    }

    pub(crate) fn held_something(&self) -> bool {
        self.held_something.load(Ordering::Acquire)
    }
}

/// Whether [`Upper::temp_name`] can have made this name.
fn is_temp_name(name: &[u8]) -> bool {
    name.split_first().is_some_and(|(first, rest)| *first == b'#' && rest.iter().all(u8::is_ascii_hexdigit))
}

impl Engine {
    /// The upper, or `EROFS`.
    pub(crate) fn upper(&self) -> Res<&Upper> {
        self.upper.as_ref().ok_or(Errno::ROFS)
    }

    /// Descriptor of a directory in the upper, which must have been copied up.
    pub(crate) fn upper_fd(&self, dir: &Node) -> Res<Fd> {
        self.fd(dir.upper_dir()?)
    }

    /// Notes that the upper is about to change.
    pub(crate) fn touch(&self) -> Res<&Upper> {
        let upper = self.upper()?;
        if !upper.touched.load(Ordering::Acquire) {
            let held = !upper.is_empty()?;
            self.mark_owners(upper, held)?;
            upper.held_something.fetch_or(held, Ordering::AcqRel);
            upper.touched.store(true, Ordering::Release);
        }
        Ok(upper)
    }

    /// Says on the upper how it keeps owners, before the first change. An upper of another form that can be
    /// read is of this form from now on.
    fn mark_owners(&self, upper: &Upper, held: bool) -> Res<()> {
        let was_recorded = upper.mark.as_deref().is_some_and(|mark| mark != "native");
        if upper.mark.is_none() || self.owners.native && was_recorded {
            let root = upper.root.slot.get(false).ok_or(Errno::STALE)?;
            let mark = self.owners.mark(!held);
            let empty = rustix::fs::XattrFlags::empty();
            sys::set_xattr(sys::At::Name(root.as_fd(), b"."), OWNERS, mark.as_bytes(), empty)?;
        }
        Ok(())
    }
}
