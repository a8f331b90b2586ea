//! Mounting, for a program that mounts and serves in one process.
//!
//! Whoever has CAP_SYS_ADMIN in the user namespace of the mount namespace calls mount(2). Anybody
//! else needs `fusermount3`, which is set-user-ID root: it opens `/dev/fuse`, mounts, and passes the
//! descriptor over a socket whose number is in the environment.
//!
//! The directory may belong to somebody whom root must not trust, and who can put a link in its place at any
//! time: the path is resolved once, without links, and what comes then is done with that descriptor.
//! (The helper takes a path; it is the user's own then, and it looks after itself.)

use std::ffi::{CString, OsStr, OsString};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::errno::{Errno, Res};
use crate::{Error, Overlay, Server};

const HELPER: &str = "fusermount3";
/// `MS_NOSYMFOLLOW` of linux/mount.h.
const NOSYMFOLLOW: MountFlags = MountFlags::from_bits_retain(1 << 8);

/// How [`Overlay::mount`] mounts.
#[derive(Debug, Clone)]
pub struct MountSpec {
    /// What the table of mounts shows as the source.
    pub source: OsString,
    /// What it shows after `fuse.` as the type.
    pub subtype: Option<String>,
    /// Refuse changes.
    pub read_only: bool,
    /// Honour set-user-ID and set-group-ID bits and file capabilities.
    pub suid: bool,
    /// Open device nodes (the kernel allows it in the initial user namespace only).
    pub dev: bool,
    /// Execute programs.
    pub exec: bool,
    /// Follow symbolic links. The kernel has known the opposite since Linux 5.10; `fusermount3` may not.
    pub follow: bool,
    /// Write each change through at once.
    pub sync: bool,
    /// Let others than the mounting user in. `fusermount3` allows it to root, and to others where
    /// /etc/fuse.conf says so.
    pub allow_other: bool,
    /// Further words of mount(2)'s data string, such as `context=…`.
    pub data: Vec<String>,
}

/// Where an overlay was mounted by [`Overlay::mount`].
#[derive(Debug, Clone)]
pub struct Mounted {
    at: PathBuf,
    /// The directory below the mount.
    below: Arc<OwnedFd>,
    id: u64,
    by_helper: bool,
}

impl Mounted {
    /// Writes back what the kernel holds of the mount's files and detaches it: no new path leads in.
    /// Not on a thread that the server needs. Does nothing if the mount is not there any more.
    ///
    /// # Errors
    /// As umount2(2).
    pub fn detach(&self) -> Result<(), Error> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = match open_mounted(&self.below, flags) {
            Ok(root) if mount_id(&root).is_ok_and(|id| id == self.id) => root,
            _ => return Ok(()),
        };
        // What others hold open stays open when the mount goes, and what they wrote must not go with us.
        if let Err(err) = rustix::fs::syncfs(&root) {
            tracing::warn!(%err, "cannot write back before unmounting");
        }
        if self.by_helper {
            drop(root);
            return unmount_by_helper(&self.at);
        }
        unmount(&root, &self.at)
    }

    /// Takes away a mount that is not served, unless it is gone already.
    fn undo(&self) -> Result<(), Error> {
        let root = match open_mounted(&self.below, OFlags::PATH | OFlags::CLOEXEC) {
            Ok(root) if mount_id(&root).is_ok_and(|id| id == self.id) => root,
            _ => return Ok(()),
        };
        if self.by_helper {
            drop(root);
            return unmount_by_helper(&self.at);
        }
        unmount(&root, &self.at)
    }
}

impl Overlay {
    /// Mounts at a directory and serves. The kernel has the answer to its first request when
    /// this returns: the mount can be used. `at` should be absolute, since it is needed again, and
    /// must lead through no symbolic link ([`std::fs::canonicalize`]).
    ///
    /// # Errors
    /// If the mount is refused, or not served; it is not there then.
    pub fn mount(self, at: &Path, spec: &MountSpec) -> Result<(Server, Mounted), Error> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let below = rustix::fs::openat2(CWD, at, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)
            .map_err(|err| Error::Mount { path: at.to_owned(), source: err.into() })?;
        let (fuse, by_helper) = match mount_self(at, &below, spec) {
            Err(Error::Mount { source, .. })
                if source.kind() == std::io::ErrorKind::PermissionDenied
                    && !rustix::process::geteuid().is_root() =>
            {
                (mount_by_helper(at, spec)?, true)
            }
            other => (other?, false),
        };
        // At once: what has the name when this is undone may be somebody else's.
        let id = open_mounted(&below, OFlags::PATH | OFlags::CLOEXEC)
            .and_then(mount_id)
            .map_err(|err| Error::Serve { source: err.into() })?;
        let mounted = Mounted { at: at.to_owned(), below: Arc::new(below), id, by_helper };
        // It was mounted in our process-ID namespace, by whomever.
        let overlay = match rustix::fs::open("/proc", flags, Mode::empty()) {
            Ok(proc) if knows_us(&proc) => self.with_proc(proc),
            Ok(_) | Err(_) => self,
        };
        match overlay.serve_with(fuse, true) {
            Ok(server) => Ok((server, mounted)),
            Err(err) => {
                if let Err(err) = mounted.undo() {
                    tracing::debug!(%err, "a mount that is not served was left");
                }
                Err(err)
            }
        }
    }
}

fn proc_path(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

/// Whether a procfs is of our process-ID namespace.
fn knows_us(proc: &OwnedFd) -> bool {
    let id = rustix::process::getpid().as_raw_nonzero().to_string();
    rustix::fs::readlinkat(proc, "self", Vec::new()).is_ok_and(|own| own.as_bytes() == id.as_bytes())
}

/// Opens the root of what is mounted on a directory (or the directory itself). From the one above and
/// with the name that it has now, since only a name leads into a mount.
fn open_mounted(below: &OwnedFd, flags: OFlags) -> Res<OwnedFd> {
    let path = rustix::fs::readlink(proc_path(below), Vec::new())?;
    let path = Path::new(OsStr::from_bytes(path.as_bytes()));
    let above = rustix::fs::openat(below, c"..", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    // (The root of all has no name, and nothing that is mounted on it is ever seen.)
    let name = path.file_name().unwrap_or(OsStr::new("."));
    rustix::fs::openat(above, name, flags | OFlags::NOFOLLOW, Mode::empty())
}

/// Which mount an object is in. The mount is not asked, which nobody may serve yet.
fn mount_id(object: impl AsFd) -> Res<u64> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    rustix::fs::statx(object, c"", flags, StatxFlags::MNT_ID).map(|stat| stat.stx_mnt_id)
}

/// Detaches the mount with this root.
fn unmount(root: &OwnedFd, at: &Path) -> Result<(), Error> {
    rustix::mount::unmount(proc_path(root), UnmountFlags::DETACH)
        .map_err(|err| Error::Unmount { path: at.to_owned(), source: err.into() })
}

fn unmount_by_helper(at: &Path) -> Result<(), Error> {
    run_helper(&mut Command::new(HELPER), |c| c.args(["-u", "-z", "-q", "--"]).arg(at))
}

fn c_string(text: &OsStr) -> Result<CString, std::io::Error> {
    CString::new(text.as_bytes()).map_err(|_| Errno::INVAL.into())
}

/// mount(2) by this process, on the open directory.
fn mount_self(at: &Path, below: &OwnedFd, spec: &MountSpec) -> Result<OwnedFd, Error> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let fuse = rustix::fs::open("/dev/fuse", flags, Mode::empty())
        .map_err(|err| Error::Open { path: "/dev/fuse".into(), source: err.into() })?;
    let error = |source| Error::Mount { path: at.to_owned(), source };
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let mut data =
        format!("fd={},rootmode=40000,user_id={uid},group_id={gid},default_permissions", fuse.as_raw_fd());
    if spec.allow_other {
        data.push_str(",allow_other");
    }
    for word in &spec.data {
        data.push(',');
        data.push_str(word);
    }
    let mut flags = MountFlags::NOATIME;
    flags.set(MountFlags::RDONLY, spec.read_only);
    flags.set(MountFlags::NOSUID, !spec.suid);
    flags.set(MountFlags::NODEV, !spec.dev);
    flags.set(MountFlags::NOEXEC, !spec.exec);
    flags.set(MountFlags::SYNCHRONOUS, spec.sync);
    flags.set(NOSYMFOLLOW, !spec.follow);
    let fstype = spec.subtype.as_ref().map_or_else(|| "fuse".to_owned(), |subtype| format!("fuse.{subtype}"));
    let source = c_string(&spec.source).map_err(error)?;
    let data = CString::new(data).map_err(|_| error(Errno::INVAL.into()))?;
    rustix::mount::mount(source.as_c_str(), proc_path(below), &*fstype, flags, data.as_c_str())
        .map_err(|err| error(err.into()))?;
    Ok(fuse)
}

/// Backslashes before what separates the helper's options.
fn escaped(value: &OsStr) -> OsString {
    let mut bytes = Vec::new();
    for &byte in value.as_bytes() {
        if matches!(byte, b',' | b'\\') {
            bytes.push(b'\\');
        }
        bytes.push(byte);
    }
    std::os::unix::ffi::OsStringExt::from_vec(bytes)
}

/// `fusermount3`, for those who may not mount.
fn mount_by_helper(at: &Path, spec: &MountSpec) -> Result<OwnedFd, Error> {
    let mut options = OsString::from("default_permissions,noatime,fsname=");
    options.push(escaped(&spec.source));
    let words = [
        (spec.read_only, "ro"),
        (spec.allow_other, "allow_other"),
        (!spec.exec, "noexec"),
        (spec.sync, "sync"),
        (!spec.follow, "nosymfollow"),
    ];
    for (_, word) in words.iter().filter(|(wanted, _)| *wanted) {
        options.push(",");
        options.push(word);
    }
    if let Some(subtype) = &spec.subtype {
        options.push(",subtype=");
        options.push(escaped(OsStr::new(subtype)));
    }
    for word in &spec.data {
        options.push(",");
        options.push(word);
    }
    let error = |source| Error::Helper { source };
    let (ours, theirs) = UnixStream::pair().map_err(error)?;
    run_helper(&mut Command::new(HELPER), |command| {
        command.stdin(Stdio::from(OwnedFd::from(theirs))).env("_FUSE_COMMFD", "0");
        command.arg("-o").arg(options).arg("--").arg(at)
    })?;
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(&ours, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)
    })
    .map_err(|err| error(err.into()))?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = message
            && let Some(fuse) = fds.next()
        {
            return Ok(fuse);
        }
    }
    Err(error(Errno::BADMSG.into()))
}

/// Runs the helper; what it says about a failure is part of the error.
fn run_helper(
    command: &mut Command,
    arguments: impl FnOnce(&mut Command) -> &mut Command,
) -> Result<(), Error> {
    let error = |source| Error::Helper { source };
    let output = arguments(command).stdout(Stdio::null()).stderr(Stdio::piped()).output().map_err(error)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(error(std::io::Error::other(said.trim().to_owned())))
}
