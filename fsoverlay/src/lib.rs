//! A union file system over FUSE that an ordinary user can mount and serve.
//!
//! Read-only *layers*, a *generated* layer in memory and a writable *upper* are shown as
//! one tree. Changes go to the upper in the form that the kernel's overlayfs reads with
//! `userxattr`; owners, modes and devices that an ordinary user may not create are
//! recorded in xattrs, so that chown, chmod and mknod of anything succeed.
//!
//! ```text
//!   /dev/fuse ── fs ───────── decodes a request, calls, replies; knows FUSE, decides nothing
//!                │
//!             engine ──────── layers, upper, caches; one method per operation, in:
//!                │  lookup    a name → the object (what merges, what hides)
//!                │  readdir   a directory's entries, stable positions
//!                │  create    new objects, links, unlink, rmdir
//!                │  rename    all of rename(2)
//!                │  redirect  directories that the layers have under another name
//!                │  copyup    a layer's object → the upper, atomically
//!                │  setattr   chmod, chown, truncate, utimens
//!                │  xattr     names on disk ↔ names through the mount, ACLs
//!                │  data      read, write, seek, copy, sync
//!                │  whiteout  "gone" on disk
//!                │
//!             ownership ───── owners and modes: recorded, or on the disk itself
//!             inode, layer, handle, sidecar, attr, acl ── objects, real directories,
//!                │            descriptors, owners of links, records
//!                │  passthrough       files that the kernel reads and writes itself
//!                │  hooks, journal   counts, quota, rates, what was used and what changed
//!               sys           the only unsafe lines
//! ```
//!
//! The process that calls [`Overlay::open`] and [`Overlay::serve`] stays in its own
//! namespaces with its own credentials: it can do nothing that its user cannot, and every
//! file it makes belongs to that user. The mount is made elsewhere, by whoever is root in
//! the user namespace of the mount, who passes the open `/dev/fuse` over:
//!
//! ```no_run
//! # fn passed_by_the_mounting_process() -> std::os::fd::OwnedFd { std::io::pipe().unwrap().0.into() }
//! use fsoverlay::{LayerSpec, Overlay, OverlaySpec, UpperSpec};
//!
//! let overlay = Overlay::open(&OverlaySpec {
//!     layers: vec![LayerSpec { dir: "/".into(), hidden: vec!["proc".into()], ..LayerSpec::default() }],
//!     upper: Some(UpperSpec { dir: "/home/me/box/upper".into(), work: "/home/me/box/work".into(), volatile: false }),
//!     squash: Some((0, 0)),
//!     workers: 2,
//!     ..OverlaySpec::default()
//! })?;
//! let server = overlay.serve(passed_by_the_mounting_process())?;
//! server.join();
//! # Ok::<(), fsoverlay::Error>(())
//! ```
//!
//! Who is root in the user namespace of the mount, or has `fusermount3`, mounts and serves in one
//! process by [`Overlay::mount`].
//!
//! # What to know
//!
//! - A layer should not change while it is mounted, unless [`OverlaySpec::live`] says how soon that is
//!   to show. Otherwise when a change shows is not defined; where a
//!   replaced file is needed the answer is `ESTALE` until its name is looked up again, which
//!   the kernel is made to do. Nothing outside the layer is reached.
//! - One server per upper at a time.
//! - Renaming a directory of a layer copies nothing in it: the upper says where the layers have it.
//!   The kernel's overlayfs does not read that with `userxattr`; [`export`] replaces it.
//! - Fifos, sockets and devices are empty files with a record in the upper.
//! - A file of a layer that the caller may not read can be seen but neither read nor
//!   changed (`EACCES`); a directory he may not read appears empty and is writable.

mod acl;
mod ahead;
mod attr;
mod changes;
mod claim;
mod config;
mod copyup;
mod create;
mod data;
mod dispatch;
mod engine;
mod entries;
mod errno;
mod export;
mod far;
mod fs;
mod generated;
mod handle;
mod helper;
mod hooks;
mod inode;
mod journal;
mod later;
mod layer;
mod links;
mod listing;
mod live;
mod lookup;
mod mount;
mod near;
mod numbers;
mod object;
mod oci;
mod open;
mod ownership;
mod passthrough;
mod readdir;
mod redirect;
mod rename;
mod setattr;
mod sidecar;
mod sync;
mod sys;
mod upper;
mod whiteout;
mod xattr;

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

pub use changes::{Change, ChangeKind, changes, changes_in, changes_of};
pub use config::*;
pub use export::export;
pub use hooks::{
    Access, AccessKind, Counters, Direction, Growth, Hooks, Quota, RateLimit, Refusal, Space, Trace, Usage,
};
pub use journal::ChangedDir;
pub use mount::{MountSpec, Mounted};
pub use oci::convert_upper;

/// setxattr(2) of this name with the value `UID:GID` (decimal, `-1` keeps) on an
/// object of the mount records an owner that chown(2) cannot name because the
/// caller's user namespace does not map it. The kernel lets only CAP_SYS_ADMIN in the
/// mount's user namespace set `security.*` attributes.
pub const CHOWN_XATTR: &str = "security.fsoverlay.chown";

/// setxattr(2) of this name with the value `MODE:MAJOR:MINOR:UID:GID:NAME` on a
/// directory of the mount makes the (recorded) device node NAME in it, which mknod(2)
/// refuses outside the initial user namespace. MODE is octal and holds the type.
/// The kernel may remember that NAME is missing: make it under a name nobody asked
/// for and rename it.
pub const MKNOD_XATTR: &str = "security.fsoverlay.mknod";

/// Why an overlay cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A layer, the upper or the work directory cannot be used.
    #[error("cannot open {path}")]
    Open {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// There is neither a layer nor an upper.
    #[error("an overlay needs a layer or an upper directory")]
    Nothing,
    /// A file cannot be moved from the work directory to the upper.
    #[error("the work directory {work} is not on the file system of the upper directory {upper}")]
    WorkElsewhere {
        /// The upper directory.
        upper: PathBuf,
        /// The work directory.
        work: PathBuf,
    },
    /// The machine stopped while the upper was served without syncing it.
    #[error(
        "the upper directory was not synced (volatile) when the machine stopped, and may be incomplete; \
         it can be used once {mark} is removed"
    )]
    Volatile {
        /// What says so, in the work directory.
        mark: PathBuf,
    },
    /// Owners and whiteouts could not be stored.
    #[error("the file system of {path} has no extended attributes for users (user.*)")]
    NoXattrs {
        /// The upper directory.
        path: PathBuf,
    },
    /// A name would be found that does not exist.
    #[error("the upper directory {path} takes names that differ in case for the same")]
    FoldsCase {
        /// The upper directory.
        path: PathBuf,
    },
    /// The upper's owners are kept in another way, and would be misread.
    #[error(
        "the upper directory {path} keeps owners as {found}: read in another way, its files would change their owners"
    )]
    OwnersKept {
        /// The upper directory.
        path: PathBuf,
        /// Its mark.
        found: String,
    },
    /// mount(2) failed.
    #[error("cannot mount on {path}")]
    Mount {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// umount2(2) failed.
    #[error("cannot unmount {path}")]
    Unmount {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// This process may not mount, and the program that mounts for it did not.
    #[error("fusermount3 cannot mount")]
    Helper {
        /// What it said, or why it cannot be run.
        #[source]
        source: std::io::Error,
    },
    /// Files cannot be passed through as [`OverlaySpec::passthrough`] asks.
    #[error("FUSE passthrough cannot be had")]
    Passthrough {
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The kernel's first request did not come or could not be answered.
    #[error("cannot serve the mounted file system")]
    Serve {
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

/// An overlay whose layers are open; no thread runs yet.
#[derive(Debug)]
pub struct Overlay {
    engine: engine::Engine,
    workers: usize,
    proc: Option<OwnedFd>,
}

impl Overlay {
    /// Opens the layers and the upper and checks them, and removes what a killed server left in the work
    /// directory. Reads no other directory and starts no thread: it can run before or beside the mount.
    ///
    /// # Errors
    /// If a directory cannot be opened, the upper cannot hold xattrs, work and upper are on different
    /// file systems, or the upper may be incomplete ([`UpperSpec::volatile`]).
    pub fn open(spec: &OverlaySpec) -> Result<Self, Error> {
        let engine = engine::Engine::open(spec)?;
        if let (Some(upper), Some(spec)) = (&engine.upper, &spec.upper) {
            upper.claim(spec)?;
            engine.sweep_links();
        }
        Ok(Self { engine, workers: spec.workers.max(1), proc: None })
    }

    /// Lets the embedder look on and have a say.
    #[must_use]
    pub fn with_hooks(mut self, hooks: Hooks) -> Self {
        self.engine.set_hooks(hooks);
        self
    }

    /// With the root of a procfs of the process-ID namespace that the overlay is mounted in, a program that asks one
    /// thing after another can be served on the processor that it runs on, several times as fast where waking a
    /// processor takes long. One more worker is started for it, which gives way to all other threads
    /// (`SCHED_IDLE`). Nothing changes with one worker, on one processor, and before Linux 6.12. In another
    /// namespace's procfs the wrong threads would be found, and nothing gained.
    #[must_use]
    pub fn with_proc(mut self, proc: OwnedFd) -> Self {
        self.proc = Some(proc);
        self
    }

    /// Answers the kernel's INIT on `fuse`, which must be mounted, and starts the
    /// workers.
    ///
    /// # Errors
    /// If the mount is gone or speaks another protocol.
    pub fn serve(self, fuse: OwnedFd) -> Result<Server, Error> {
        // A clone of the descriptor would have to be opened in the mount's user
        // namespace, which this process is not in: the workers share one.
        self.serve_with(fuse, false)
    }

    /// The same; with `clone_fd` each worker has a descriptor of its own, where the kernel queues what
    /// it is to be interrupted about.
    fn serve_with(self, fuse: OwnedFd, clone_fd: bool) -> Result<Server, Error> {
        let refused = |why: &str| Error::Passthrough { source: std::io::Error::other(why.to_owned()) };
        let passthrough = self.engine.passthrough.is_some();
        if passthrough && self.engine.live.is_some() {
            return Err(refused("layers that change are asked for, too"));
        }
        if passthrough && (self.engine.quota().is_some() || self.engine.hooks.rate.is_some()) {
            return Err(refused("bytes are to be limited, and those that the kernel moves are not seen"));
        }
        // Before there are workers.
        handle::make_room(fuse.as_fd(), self.engine.tree.ring.capacity() + self.engine.pins.left());
        let shared = dispatch::Shared::new(self.engine);
        let mut config = fuser::Config::default();
        config.acl = fuser::SessionACL::All;
        config.clone_fd = clone_fd;
        let error = |source| Error::Serve { source };
        let near = match self.proc {
            Some(proc) => fuse.try_clone().ok().and_then(|fuse| near::Near::new(fuse, proc, self.workers)),
            None => None,
        };
        config.n_threads = Some(self.workers + near.as_ref().map_or(0, |_| near::Near::WORKERS));
        let file_system = fs::FuseFs { shared: shared.clone() };
        let connection = if passthrough { Some(fuse.try_clone().map_err(error)?) } else { None };
        let session =
            fuser::Session::from_fd(file_system, fuse, fuser::SessionACL::All, config).map_err(error)?;
        if let (Some(passthrough), Some(fuse)) = (&shared.engine.passthrough, connection) {
            let tried = passthrough.try_on(&shared.engine, &fuse);
            tried.map_err(|source| Error::Passthrough { source })?;
        }
        shared.set_notifier(session.notifier());
        if let Some(near) = near {
            shared.set_near(near);
            fs::FuseFs { shared: shared.clone() }.read_owners();
        }
        shared.prepare().inspect_err(|_| shared.stop()).map_err(error)?;
        shared.engine.look_far();
        let session = session.spawn().inspect_err(|_| shared.stop()).map_err(error)?;
        Ok(Server { shared, session })
    }
}

/// A served overlay. The mount itself lives and dies with its mount namespace; dropping
/// this does not unmount it.
#[derive(Debug)]
pub struct Server {
    shared: Arc<dispatch::Shared>,
    session: fuser::BackgroundSession,
}

impl Server {
    /// Whether the upper holds a lasting change that was made since it was opened. A file
    /// made and removed again is none. Reads only the directories of the upper.
    ///
    /// If the upper cannot be read, the answer is true: nothing may be thrown away.
    pub fn changed(&self) -> bool {
        self.shared.engine.changed().unwrap_or(true)
    }

    /// What was asked of the overlay so far.
    pub fn counters(&self) -> Counters {
        Counters { near: self.shared.served_near(), ..self.shared.engine.counts.read() }
    }

    /// The directories in which something changed since the overlay was opened, for [`changes_in`];
    /// `None` if they are not all known ([`Hooks::journal`] is too small, or a file was changed of which
    /// not all names are known): then [`changes_of`] must look at the whole upper.
    pub fn journal(&self) -> Option<Vec<ChangedDir>> {
        self.shared.engine.journal()
    }

    /// Waits until the mount is gone.
    pub fn join(self) {
        if let Err(err) = self.session.join() {
            tracing::debug!(%err, "the session ended with an error");
        }
        self.shared.stop();
    }
}

/// The data string for mount(2) of type `fuse` for an open `/dev/fuse` descriptor.
/// `uid` and `gid` are those of the mounting process in its user namespace.
pub fn mount_data(fuse: i32, uid: u32, gid: u32) -> String {
    format!("fd={fuse},rootmode=40000,user_id={uid},group_id={gid},default_permissions,allow_other")
}
