//! Boxes: their directories below the state root, their locks and their end.
//!
//! ```text
//! $XDG_STATE_HOME/rootlet/          0700, the caller's
//!   boxes/NAME/                     0700; flock(2)ed by the supervisor as long as it lives
//!     box.json                      written by rename
//!     upper/  work/                 what the overlay writes
//! ```
//! The lock tells running from not running: the kernel drops it however the supervisor ends.
//! Who finds a box unlocked may lock it and then remove it; a box that loses its directory
//! between being made and being locked is made again. Nothing here is synced to disk: a box
//! need not outlive a crash of the machine, and start-up time counts.

mod names;
mod record;
mod tree;

pub use record::{BoxRecord, BoxState, ProcessId};

use std::fs::{DirBuilder, File, Permissions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::config::{self, NoStateHome};
use crate::plan::UpperPlan;
use crate::spec::{SpecError, check_box_name};

/// Why a box or the place of all boxes cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// No place is known.
    #[error(transparent)]
    NoHome(#[from] NoStateHome),
    /// The state directory must not be trusted.
    #[error("cannot use the state directory {path}: {reason}")]
    Unsafe {
        /// The directory.
        path: PathBuf,
        /// Why not.
        reason: &'static str,
        /// What would help.
        mend: String,
    },
    /// A call failed.
    #[error("cannot {action} {path}")]
    Io {
        /// What was done.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// The name belongs to another box.
    #[error("cannot make the box {name}: there is one of this name")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// The name is none.
    #[error(transparent)]
    Name(#[from] SpecError),
    /// There is no such box.
    #[error("there is no box {name}")]
    NoSuchBox {
        /// The name.
        name: String,
    },
    /// `last`, and no box at all.
    #[error("there is no box")]
    NoBox,
    /// The box is in use.
    #[error("the box {name} is running")]
    Running {
        /// The name.
        name: String,
    },
    /// It does not go away.
    #[error("the box {name} is still running after its supervisor was killed")]
    DoesNotEnd {
        /// The name.
        name: String,
    },
    /// The upper directory cannot be used.
    #[error("cannot use the upper directory {path}: {doing}")]
    Upper {
        /// The directory.
        path: PathBuf,
        /// What failed.
        doing: &'static str,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// Another run uses the upper directory.
    #[error("cannot use the upper directory {path}: another run uses it now")]
    UpperBusy {
        /// The directory.
        path: PathBuf,
    },
    /// box.json is not what it should be.
    #[error("cannot read {path}: it is damaged or of a later version")]
    Damaged {
        /// The file.
        path: PathBuf,
    },
}

impl StateError {
    /// What can be done about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoHome(_) => Some("set HOME, or XDG_STATE_HOME to a directory of yours".into()),
            Self::Unsafe { mend, .. } => Some(mend.clone()),
            Self::NameTaken { name } => Some(format!("choose another --name, or drop it: rootlet rm {name}")),
            Self::NoSuchBox { .. } => Some("`rootlet ls` shows the boxes there are".into()),
            Self::Running { name } => Some(format!("wait for its end, or: rootlet rm --force {name}")),
            Self::Upper { .. } => Some(
                "it, and a work directory beside it, are made by you: choose a place you may write in".into(),
            ),
            Self::UpperBusy { .. } => Some("wait for its end, or choose another directory".into()),
            Self::Io { .. }
            | Self::Name(_)
            | Self::NoBox
            | Self::DoesNotEnd { .. }
            | Self::Damaged { .. } => None,
        }
    }
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, StateError>;

fn failed<E: Into<std::io::Error>>(action: &'static str, path: &Path) -> impl FnOnce(E) -> StateError {
    move |error| StateError::Io { action, path: path.to_owned(), source: error.into() }
}

fn upper_failed<E: Into<std::io::Error>>(doing: &'static str, path: &Path) -> impl FnOnce(E) -> StateError {
    move |error| StateError::Upper { path: path.to_owned(), doing, source: error.into() }
}

/// The place of all boxes.
#[derive(Debug)]
pub struct StateRoot {
    path: PathBuf,
}

impl StateRoot {
    /// Finds the state directory, makes it if need be, and checks that nobody else can write
    /// in it.
    ///
    /// # Errors
    /// When it cannot be made or trusted.
    pub fn open() -> Result<Self> {
        let path = config::state_root(|name| std::env::var_os(name))?;
        Self::open_at(&path)
    }

    /// As [`Self::open`], but a state directory that is missing stays so: for a plan.
    ///
    /// # Errors
    /// When it cannot be trusted.
    pub fn locate() -> Result<Self> {
        let path = config::state_root(|name| std::env::var_os(name))?;
        Self::locate_at(&path)
    }

    fn locate_at(path: &Path) -> Result<Self> {
        match std::fs::symlink_metadata(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let path = canonical_missing(path).map_err(failed("look at the state directory", path))?;
                Ok(Self { path })
            }
            _ => Self::open_at(path),
        }
    }

    fn open_at(path: &Path) -> Result<Self> {
        let meta = match std::fs::symlink_metadata(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                // XDG: directories that are missing are made with mode 0700.
                DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(path)
                    .map_err(failed("make the state directory", path))?;
                std::fs::symlink_metadata(path)
            }
            other => other,
        }
        .map_err(failed("look at the state directory", path))?;
        let refuse = |reason, mend: String| {
            Err(StateError::Unsafe {
                path: path.to_owned(),
                reason,
                mend: format!("{mend}, or choose another with XDG_STATE_HOME=DIR"),
            })
        };
        if meta.is_symlink() {
            return refuse("it is a symbolic link", "move the directory it leads to in its place".into());
        }
        if !meta.is_dir() {
            return refuse("it is not a directory", "move it away".into());
        }
        if meta.uid() != rustix::process::geteuid().as_raw() {
            return refuse("it belongs to another user", "move it away".into());
        }
        if meta.mode() & 0o022 != 0 {
            let mend = format!("chmod go-w {}", crate::log::escape_os(path.as_os_str()));
            return refuse("others may write in it", mend);
        }
        let path = std::fs::canonicalize(path).map_err(failed("look at the state directory", path))?;
        Ok(Self { path })
    }

    /// The directory itself, without links.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn boxes(&self) -> PathBuf {
        self.path.join("boxes")
    }

    /// Where a box of this name is.
    #[must_use]
    pub fn dir_of(&self, name: &str) -> PathBuf {
        self.boxes().join(name)
    }

    /// A name that is free at this moment; nothing is made.
    #[must_use]
    pub fn free_name(&self) -> String {
        (0..)
            .map(names::make_up)
            .find(|name| std::fs::symlink_metadata(self.dir_of(name)).is_err())
            .unwrap_or_default()
    }

    /// Makes a box, locked, with an empty upper and work directory.
    ///
    /// # Errors
    /// When the name is taken or the directory cannot be made.
    pub fn make_box(&self, name: Option<&str>) -> Result<LockedBox> {
        let boxes = self.boxes();
        let mut attempt = 0;
        loop {
            let candidate = name.map_or_else(|| names::make_up(attempt), str::to_owned);
            check_box_name(&candidate)?;
            let dir = boxes.join(&candidate);
            match DirBuilder::new().mode(0o700).create(&dir) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::NotFound && attempt < 100 => {
                    attempt += 1;
                    DirBuilder::new()
                        .recursive(true)
                        .mode(0o700)
                        .create(&boxes)
                        .map_err(failed("make the directory", &boxes))?;
                    continue;
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    attempt += 1;
                    if name.is_some() || attempt > 100 {
                        return Err(StateError::NameTaken { name: candidate });
                    }
                    continue;
                }
                Err(error) => return Err(failed("make the directory", &dir)(error)),
            }
            // Between here and the lock a `prune` may take it for a leftover and remove it, and who
            // looks whether it is running has it locked for an instant: the directory is ours, so
            // that is waited for.
            let lock = match File::open(&dir) {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                other => other.map_err(failed("open", &dir))?,
            };
            if let Err(errno) = rustix::io::retry_on_intr(|| flock(&lock, FlockOperation::LockExclusive)) {
                std::fs::remove_dir(&dir).ok();
                return Err(failed("lock", &dir)(errno));
            }
            if lock.metadata().is_ok_and(|meta| meta.nlink() == 0) {
                continue;
            }
            let made = LockedBox { name: candidate, dir, lock };
            for (part, mode) in [("upper", 0o755), ("work", 0o700)] {
                let path = made.dir.join(part);
                if let Err(error) = make_dir(&path, mode) {
                    made.remove().ok();
                    return Err(failed("make the directory", &path)(error));
                }
            }
            return Ok(made);
        }
    }

    /// Every box, by name; `None` where box.json is missing or damaged.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn list(&self) -> Result<Vec<FoundBox>> {
        let boxes = self.boxes();
        let entries = match std::fs::read_dir(&boxes) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(failed("list", &boxes))?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed("list", &boxes))?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if check_box_name(&name).is_ok() && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.push(FoundBox::look(name, entry.path()));
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// The box of this name; `last` is the latest.
    ///
    /// # Errors
    /// When there is none.
    pub fn find(&self, name: &str) -> Result<FoundBox> {
        if name == "last" {
            let created = |found: &FoundBox| found.record.as_ref().map(|record| record.created_ms);
            return self.list()?.into_iter().max_by_key(created).ok_or(StateError::NoBox);
        }
        check_box_name(name)?;
        let dir = self.dir_of(name);
        if !std::fs::symlink_metadata(&dir).is_ok_and(|meta| meta.is_dir()) {
            return Err(StateError::NoSuchBox { name: name.to_owned() });
        }
        Ok(FoundBox::look(name.to_owned(), dir))
    }
}

/// The path without links, as it will be when its missing part is made.
fn canonical_missing(path: &Path) -> std::io::Result<PathBuf> {
    match (std::fs::canonicalize(path), path.parent(), path.file_name()) {
        (Err(error), Some(parent), Some(name)) if error.kind() == ErrorKind::NotFound => {
            Ok(canonical_missing(parent)?.join(name))
        }
        (result, ..) => result,
    }
}

/// Makes a directory of exactly this mode: the upper's is that of `/` inside, whatever the
/// caller's umask.
fn make_dir(path: &Path, mode: u32) -> std::io::Result<()> {
    DirBuilder::new().mode(mode).create(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Where changes go when `--upper` is given: the directory, and a work directory beside it
/// (it must be on the same file system and must not show in the upper).
///
/// # Errors
/// When the path does not lead to a place for a directory.
pub fn external_upper(upper: &Path) -> Result<UpperPlan> {
    let dir =
        crate::host::layers::canonical_new(upper).map_err(upper_failed("looking at it failed", upper))?;
    let mut work = std::ffi::OsString::from(".");
    work.push(dir.file_name().unwrap_or_default());
    work.push(".rootlet-work");
    Ok(UpperPlan { work: dir.with_file_name(work), dir })
}

/// An external upper in use by this process.
#[derive(Debug)]
pub struct ExternalUpper {
    plan: UpperPlan,
    made: bool,
    _lock: File,
}

impl ExternalUpper {
    /// Makes what is missing of it and locks it.
    ///
    /// # Errors
    /// When another run uses it or it cannot be made.
    pub fn lock(plan: &UpperPlan) -> Result<Self> {
        let make = |doing: &'static str, path: &Path, mode: u32| match make_dir(path, mode) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(upper_failed(doing, &plan.dir)(error)),
            Ok(()) => Ok(true),
        };
        make("making the work directory beside it failed", &plan.work, 0o700)?;
        let lock = File::open(&plan.work)
            .map_err(upper_failed("opening the work directory beside it failed", &plan.dir))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Err(StateError::UpperBusy { path: plan.dir.clone() }),
            other => other.map_err(upper_failed("locking the work directory beside it failed", &plan.dir))?,
        }
        let made = make("making it failed", &plan.dir, 0o755).inspect_err(|_| {
            tree::remove_tree(&plan.work).ok();
        })?;
        Ok(Self { plan: plan.clone(), made, _lock: lock })
    }

    /// Removes the work directory, unless it holds the owners of links, which links cannot hold
    /// themselves. The upper stays, unless this run made it and nothing is in it.
    ///
    /// # Errors
    /// When the work directory cannot be removed.
    pub fn release(self) -> Result<()> {
        let work = &self.plan.work;
        let owners = work.join("owners");
        if std::fs::symlink_metadata(&owners).is_ok_and(|meta| meta.len() > 0) {
            for entry in std::fs::read_dir(work).map_err(failed("list", work))? {
                let path = entry.map_err(failed("list", work))?.path();
                if path != owners {
                    tree::remove_tree(&path).map_err(failed("remove", &path))?;
                }
            }
        } else {
            tree::remove_tree(work).map_err(failed("remove", work))?;
        }
        if self.made {
            // Not empty: that is what it is for.
            std::fs::remove_dir(&self.plan.dir).ok();
        }
        Ok(())
    }
}

/// A box that is locked by this process.
#[derive(Debug)]
pub struct LockedBox {
    name: String,
    dir: PathBuf,
    lock: File,
}

impl LockedBox {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its own upper and work directory.
    #[must_use]
    pub fn upper(&self) -> UpperPlan {
        UpperPlan { dir: self.dir.join("upper"), work: self.dir.join("work") }
    }

    /// Writes box.json, whole or not at all.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_record(&self, record: &BoxRecord) -> Result<()> {
        let path = self.dir.join("box.json");
        let temporary = self.dir.join(".box.json");
        let bytes = serde_json::to_vec(record).expect("a record has no map with keys that are not text");
        let write = || {
            let mut file =
                File::options().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            file.write_all(&bytes)?;
            std::fs::rename(&temporary, &path)
        };
        write().map_err(failed("write", &path))
    }

    /// Removes the box with everything in it.
    ///
    /// # Errors
    /// When something of it cannot be removed.
    pub fn remove(self) -> Result<()> {
        tree::remove_tree(&self.dir).map_err(failed("remove", &self.dir))?;
        drop(self.lock);
        Ok(())
    }
}

/// A box as it was found.
#[derive(Debug)]
pub struct FoundBox {
    /// Its name.
    pub name: String,
    /// Its directory.
    pub dir: PathBuf,
    /// box.json, if it can be read.
    pub record: Option<BoxRecord>,
    /// Its supervisor holds the lock.
    pub running: bool,
}

impl FoundBox {
    fn look(name: String, dir: PathBuf) -> Self {
        // First the lock, then the record: a run that ends in between shows as running, not as
        // a box that died.
        let running = File::open(&dir)
            .is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK));
        let record = std::fs::read(dir.join("box.json"))
            .ok()
            .and_then(|bytes| serde_json::from_slice::<BoxRecord>(&bytes).ok())
            .filter(|record| record.format == record::FORMAT);
        Self { name, dir, record, running }
    }

    /// Its record.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn record(&self) -> Result<&BoxRecord> {
        self.record.as_ref().ok_or_else(|| StateError::Damaged { path: self.dir.join("box.json") })
    }

    /// Whether nothing is lost with it: no upper of its own, or an empty one.
    #[must_use]
    pub fn is_unchanged(&self) -> bool {
        let upper = match &self.record {
            Some(record) if record.own_upper().is_none() => return true,
            _ => self.dir.join("upper"),
        };
        match std::fs::read_dir(&upper) {
            Ok(mut entries) => entries.next().is_none(),
            Err(error) => error.kind() == ErrorKind::NotFound,
        }
    }

    /// Removes the box, and the work directory that a killed run left beside its `--upper`.
    ///
    /// # Errors
    /// When something of it cannot be removed.
    pub fn remove(&self, locked: LockedBox) -> Result<()> {
        let external = self.record.as_ref().filter(|record| record.upper_is_external);
        if let Some(upper) = external.and_then(BoxRecord::upper)
            && upper.work.exists()
        {
            match ExternalUpper::lock(upper) {
                Ok(left) => left.release()?,
                // Another run uses it by now.
                Err(StateError::UpperBusy { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        locked.remove()
    }

    /// Takes the lock.
    ///
    /// # Errors
    /// When it is running.
    pub fn lock(&self) -> Result<LockedBox> {
        let lock = File::open(&self.dir).map_err(|error| match error.kind() {
            ErrorKind::NotFound => StateError::NoSuchBox { name: self.name.clone() },
            _ => failed("open", &self.dir)(error),
        })?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Err(StateError::Running { name: self.name.clone() }),
            other => other.map_err(failed("lock", &self.dir))?,
        }
        Ok(LockedBox { name: self.name.clone(), dir: self.dir.clone(), lock })
    }

    /// Ends a running box and takes its lock.
    ///
    /// # Errors
    /// When the supervisor cannot be killed or the box does not end.
    pub fn end_and_lock(&self) -> Result<LockedBox> {
        const PATIENCE: Duration = Duration::from_secs(10);
        let deadline = Instant::now() + PATIENCE;
        let mut killed = false;
        loop {
            match self.lock() {
                Err(StateError::Running { .. }) if Instant::now() < deadline => {}
                Err(StateError::Running { name }) => return Err(StateError::DoesNotEnd { name }),
                other => return other,
            }
            if !killed {
                self.kill_supervisor()?;
                killed = true;
            }
            // flock(2) has no time limit, and a signal for one would need a handler.
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn kill_supervisor(&self) -> Result<()> {
        // The pidfd first, then the check: from then on the id cannot be reused unnoticed.
        let supervisor = self.record()?.supervisor;
        let Some(pid) = rustix::process::Pid::from_raw(supervisor.pid) else { return Ok(()) };
        let Ok(pidfd) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) else {
            return Ok(());
        };
        if !supervisor.is_alive() {
            return Ok(());
        }
        match rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(errno) => Err(failed("end the supervisor of", &self.dir)(errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("rootlet-state-{}-{name}", std::process::id()));
            std::fs::remove_dir_all(&path).ok();
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn root(&self) -> StateRoot {
            StateRoot::open_at(&self.0.join("a/b/rootlet")).unwrap()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.0).ok();
        }
    }

    #[test]
    fn a_state_directory_that_others_can_touch_is_refused() {
        let scratch = Scratch::new("unsafe");
        let refused = |path: &Path| match StateRoot::open_at(path) {
            Err(StateError::Unsafe { reason, .. }) => reason,
            other => panic!("{other:?}"),
        };
        let open = scratch.0.join("open");
        std::fs::create_dir(&open).unwrap();
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(refused(&open), "others may write in it");
        let link = scratch.0.join("link");
        std::os::unix::fs::symlink("/tmp", &link).unwrap();
        assert_eq!(refused(&link), "it is a symbolic link");
        let file = scratch.0.join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(refused(&file), "it is not a directory");
    }

    #[test]
    fn a_new_state_directory_is_private() {
        let scratch = Scratch::new("private");
        let root = scratch.root();
        for path in [scratch.0.join("a"), scratch.0.join("a/b"), root.path().to_owned()] {
            assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o700, "{path:?}");
        }
    }

    #[test]
    fn a_state_directory_can_be_located_without_being_made() {
        let scratch = Scratch::new("locate");
        std::os::unix::fs::symlink(&scratch.0, scratch.0.join("link")).unwrap();
        let wanted = scratch.0.join("link/a/b/rootlet");
        let located = StateRoot::locate_at(&wanted).unwrap();
        assert!(!scratch.0.join("a").exists());
        assert_eq!(located.path(), StateRoot::open_at(&wanted).unwrap().path());
        assert_eq!(located.path(), StateRoot::locate_at(&wanted).unwrap().path());
    }

    #[test]
    fn a_box_is_running_as_long_as_it_is_locked() {
        let scratch = Scratch::new("lock");
        let root = scratch.root();
        let made = root.make_box(Some("one")).unwrap();
        assert!(root.find("one").unwrap().running);
        assert!(matches!(root.find("one").unwrap().lock(), Err(StateError::Running { .. })));
        assert!(matches!(root.make_box(Some("one")), Err(StateError::NameTaken { .. })));
        drop(made);
        let found = root.find("one").unwrap();
        assert!(!found.running && found.is_unchanged() && found.record.is_none());
        found.lock().unwrap().remove().unwrap();
        assert!(matches!(root.find("one"), Err(StateError::NoSuchBox { .. })));
        assert!(matches!(root.find("last"), Err(StateError::NoBox)));
    }

    #[test]
    fn a_box_can_be_made_while_others_look() {
        let scratch = Scratch::new("look");
        let root = scratch.root();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    FoundBox::look("one".into(), root.dir_of("one"));
                }
            });
            let made = (0..100).try_for_each(|_| root.make_box(Some("one"))?.remove());
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            made.unwrap();
        });
    }

    #[test]
    fn made_up_names_avoid_each_other() {
        let scratch = Scratch::new("names");
        let root = scratch.root();
        let made: Vec<_> = (0..8).map(|_| root.make_box(None).unwrap()).collect();
        assert_eq!(root.list().unwrap().len(), made.len());
        assert!(!root.free_name().is_empty());
    }

    #[test]
    fn names_do_not_lead_elsewhere() {
        let scratch = Scratch::new("escape");
        let root = scratch.root();
        for bad in ["..", "../x", "/", "a/b", ""] {
            assert!(matches!(root.find(bad), Err(StateError::Name(_))), "{bad}");
            assert!(matches!(root.make_box(Some(bad)), Err(StateError::Name(_))), "{bad}");
        }
    }

    #[test]
    fn an_external_upper_serves_one_run_at_a_time() {
        let scratch = Scratch::new("external");
        let plan = external_upper(&scratch.0.join("changes")).unwrap();
        assert!(plan.work.ends_with(".changes.rootlet-work"));
        let first = ExternalUpper::lock(&plan).unwrap();
        assert!(matches!(ExternalUpper::lock(&plan), Err(StateError::UpperBusy { .. })));
        first.release().unwrap();
        assert!(!plan.work.exists() && !plan.dir.exists());
        let second = ExternalUpper::lock(&plan).unwrap();
        std::fs::write(plan.dir.join("file"), "").unwrap();
        second.release().unwrap();
        assert!(plan.dir.join("file").exists());
    }
}
