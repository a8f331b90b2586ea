//! Answers the filter's notifications: owners that the user namespace does not map, and device
//! nodes, are recorded in the overlay.
//!
//! A thread of init, with init's capabilities. It acts for the payload, so it must do no more
//! than the payload may: the caller must hold CAP_CHOWN or CAP_MKNOD, the path is resolved from
//! the caller's own root and working directory, and only objects of the overlay are touched.
//! What it does there (two control attributes, see [`fsoverlay::CHOWN_XATTR`]) records and
//! nothing else, on a tree that is the payload's anyway: that the caller's memory may change
//! between our reading and the answer gains it nothing.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{IoSliceMut, Read as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, ResolveFlags, XattrFlags};

use crate::sys::seccomp::{Notification, answer, receive, still_waits};

const CAP_CHOWN: u32 = 0;
const CAP_MKNOD: u32 = 27;

/// Starts the thread. It ends with the last process that has the filter.
///
/// # Errors
/// As `Builder::spawn`, fstat(2).
pub(super) fn start(listener: OwnedFd, proc: File) -> std::io::Result<()> {
    let overlay = rustix::fs::stat("/")?.st_dev;
    let notifier = Notifier { listener, proc, overlay };
    std::thread::Builder::new().name("notifier".into()).spawn(move || notifier.run())?;
    Ok(())
}

struct Notifier {
    listener: OwnedFd,
    /// /proc of the sandbox, reached by descriptor because this thread changes its root.
    proc: File,
    /// Device number of the overlay.
    overlay: u64,
}

/// What a call wants recorded.
enum Wanted {
    Owner { uid: u32, gid: u32 },
    Node { mode: u32, device: u64 },
}

/// How a call names its object.
struct Named {
    /// A descriptor number of the caller, or `AT_FDCWD`.
    base: i32,
    /// `None`: the object is `base` itself.
    path: Option<CString>,
    follow: bool,
}

impl Notifier {
    fn run(self) {
        // A root and working directory of this thread's own: init keeps its.
        if nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).is_err() {
            return;
        }
        loop {
            match receive(self.listener.as_fd()) {
                Ok(call) => {
                    let result = self.handle(&call);
                    // ENOENT: the caller was killed meanwhile.
                    answer(self.listener.as_fd(), call.id, result).ok();
                }
                // ENOENT: the caller was killed meanwhile, or none is left that could call.
                Err(Errno::ENOENT) if !hung_up(&self.listener) => {}
                Err(Errno::EINTR) => {}
                Err(_) => return,
            }
        }
    }

    fn handle(&self, call: &Notification) -> Result<(), Errno> {
        let (named, wanted) = decode(call)?;
        let status = self.status(call.pid)?;
        let needed = if matches!(wanted, Wanted::Owner { .. }) { CAP_CHOWN } else { CAP_MKNOD };
        if status.effective & (1 << needed) == 0 {
            return Err(Errno::EPERM);
        }
        match wanted {
            Wanted::Owner { uid, gid } => {
                let object = self.open(call, &status, &named)?;
                let keep = |id: u32| if id == u32::MAX { "-1".to_owned() } else { id.to_string() };
                self.set(&object, fsoverlay::CHOWN_XATTR, &format!("{}:{}", keep(uid), keep(gid)))
            }
            Wanted::Node { mode, device } => {
                self.make_node(call, named, mode & !status.umask, device, &status)
            }
        }
    }

    /// Opens the object as the caller would, as `O_PATH`, and checks that it is the overlay's.
    fn open(&self, call: &Notification, status: &Status, named: &Named) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let below_proc =
            |name: String| rustix::fs::openat(&self.proc, name, flags, Mode::empty()).map_err(errno);
        let base = || match named.base {
            libc::AT_FDCWD => below_proc(format!("{}/cwd", call.pid)),
            // A number that is no open descriptor.
            fd => below_proc(format!("{}/fd/{fd}", call.pid))
                .map_err(|e| if e == Errno::ENOENT { Errno::EBADF } else { e }),
        };
        let object = match &named.path {
            None => base()?,
            Some(path) => {
                let root = below_proc(format!("{}/root", call.pid))?;
                rustix::process::fchdir(&root).map_err(errno)?;
                rustix::process::chroot(".").map_err(errno)?;
                if !path.as_bytes().starts_with(b"/") {
                    rustix::process::fchdir(&base()?).map_err(errno)?;
                }
                let follow = if named.follow { OFlags::empty() } else { OFlags::NOFOLLOW };
                match of_caller(path.to_bytes(), status, call.pid) {
                    // The caller's own part of /proc, by the number it has here.
                    Some(own) => {
                        rustix::fs::openat(&self.proc, own, flags | follow, Mode::empty()).map_err(errno)?
                    }
                    // Other magic links would be followed as this process's, not as the caller's.
                    None => {
                        let resolve = ResolveFlags::NO_MAGICLINKS;
                        rustix::fs::openat2(CWD, path.as_c_str(), flags | follow, Mode::empty(), resolve)
                            .map_err(errno)?
                    }
                }
            }
        };
        let stat = rustix::fs::statat(&object, "", AtFlags::EMPTY_PATH).map_err(errno)?;
        if stat.st_dev != self.overlay {
            // What the kernel says of an id that is not mapped.
            return Err(Errno::EINVAL);
        }
        if !still_waits(self.listener.as_fd(), call.id) {
            return Err(Errno::ESRCH);
        }
        Ok(object)
    }

    /// Sets a control attribute on an `O_PATH` descriptor, which only a path can name.
    fn set(&self, object: &OwnedFd, name: &str, value: &str) -> Result<(), Errno> {
        rustix::process::fchdir(&self.proc).map_err(errno)?;
        let path = format!("thread-self/fd/{}", object.as_raw_fd());
        rustix::fs::setxattr(path, name, value.as_bytes(), XattrFlags::empty()).map_err(errno)
    }

    /// Makes the node under a name that nobody has asked for, because the kernel may remember
    /// that the wanted name is missing, then renames it.
    fn make_node(
        &self,
        call: &Notification,
        named: Named,
        mode: u32,
        device: u64,
        status: &Status,
    ) -> Result<(), Errno> {
        let path = named.path.ok_or(Errno::EINVAL)?;
        let bytes = path.to_bytes();
        let split = bytes.iter().rposition(|b| *b == b'/');
        let (dir, name) = match split {
            Some(at) => (bytes.get(..=at).unwrap_or_default(), bytes.get(at + 1..).unwrap_or_default()),
            None => (&b"."[..], bytes),
        };
        if name.is_empty() {
            return Err(Errno::EEXIST);
        }
        let dir = CString::new(dir).map_err(|_| Errno::EINVAL)?;
        let parent = self.open(call, status, &Named { base: named.base, path: Some(dir), follow: true })?;
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let made = format!(".rootlet-node-{}-{}", call.id, COUNTER.fetch_add(1, Ordering::Relaxed));
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let value = format!("{mode:o}:{major}:{minor}:{}:{}:{made}", status.uid, status.gid);
        self.set(&parent, fsoverlay::MKNOD_XATTR, &value)?;
        rustix::fs::renameat_with(&parent, &made, &parent, name, RenameFlags::NOREPLACE).map_err(|refused| {
            // Taken meanwhile, or always was.
            rustix::fs::unlinkat(&parent, &made, AtFlags::empty()).ok();
            errno(refused)
        })
    }

    fn status(&self, pid: u32) -> Result<Status, Errno> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file =
            rustix::fs::openat(&self.proc, format!("{pid}/status"), flags, Mode::empty()).map_err(errno)?;
        let mut text = String::new();
        File::from(file).read_to_string(&mut text).map_err(|_| Errno::EIO)?;
        Status::parse(&text).ok_or(Errno::EIO)
    }
}

/// A path below the caller's own part of /proc, relative to /proc, if `path` names one by a link
/// that means whoever looks: `/proc/self`, `/proc/thread-self` and their short forms in /dev.
fn of_caller(path: &[u8], status: &Status, thread: u32) -> Option<std::ffi::OsString> {
    use std::os::unix::ffi::OsStringExt as _;
    let process = status.process;
    let own = [
        (&b"/proc/self/"[..], format!("{process}/")),
        (b"/proc/thread-self/", format!("{process}/task/{thread}/")),
        (b"/dev/fd/", format!("{process}/fd/")),
        (b"/dev/stdin", format!("{process}/fd/0")),
        (b"/dev/stdout", format!("{process}/fd/1")),
        (b"/dev/stderr", format!("{process}/fd/2")),
    ];
    own.into_iter().find_map(|(prefix, own)| {
        let rest = path.strip_prefix(prefix)?;
        Some(std::ffi::OsString::from_vec([own.as_bytes(), rest].concat()))
    })
}

/// Whether no process has the filter any more.
fn hung_up(listener: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).is_ok()
        && fds.iter().any(|fd| fd.revents().is_some_and(|events| events.contains(PollFlags::POLLHUP)))
}

/// What /proc/PID/status says of the caller.
#[derive(Debug, PartialEq, Eq)]
struct Status {
    process: u32,
    uid: u32,
    gid: u32,
    umask: u32,
    effective: u64,
}

impl Status {
    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        // Real, effective, saved and file system id.
        let filesystem_id = |name: &str| field(name)?.split_whitespace().nth(3)?.parse().ok();
        Some(Self {
            process: field("Tgid:")?.parse().ok()?,
            uid: filesystem_id("Uid:")?,
            gid: filesystem_id("Gid:")?,
            umask: u32::from_str_radix(field("Umask:")?, 8).ok()?,
            effective: u64::from_str_radix(field("CapEff:")?, 16).ok()?,
        })
    }
}

/// The low 32 bits of an argument, as the kernel takes an int or an id.
#[expect(clippy::cast_possible_truncation, reason = "the kernel truncates the same way")]
fn low(arg: u64) -> u32 {
    arg as u32
}

fn decode(call: &Notification) -> Result<(Named, Wanted), Errno> {
    let args = call.args;
    let path = |at: u64| read_path(call.pid, at).map(Some);
    let fd = |arg: u64| low(arg).cast_signed();
    let owner = |first: usize| {
        let id = |i: usize| args.get(i).copied().map_or(u32::MAX, low);
        Wanted::Owner { uid: id(first), gid: id(first + 1) }
    };
    let node = |first: usize| {
        let arg = |i: usize| args.get(i).copied().unwrap_or_default();
        // The kernel takes a 32-bit device number (new_decode_dev).
        Wanted::Node { mode: low(arg(first)), device: u64::from(low(arg(first + 1))) }
    };
    let [first, second, ..] = args;
    Ok(match i64::from(call.number) {
        #[cfg(target_arch = "x86_64")]
        libc::SYS_chown => (Named { base: libc::AT_FDCWD, path: path(first)?, follow: true }, owner(1)),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_lchown => (Named { base: libc::AT_FDCWD, path: path(first)?, follow: false }, owner(1)),
        libc::SYS_fchown => (Named { base: fd(first), path: None, follow: true }, owner(1)),
        libc::SYS_fchownat => {
            let flags = low(args[4]).cast_signed();
            let path = path(second)?.filter(|p| !(p.is_empty() && flags & libc::AT_EMPTY_PATH != 0));
            (Named { base: fd(first), path, follow: flags & libc::AT_SYMLINK_NOFOLLOW == 0 }, owner(2))
        }
        #[cfg(target_arch = "x86_64")]
        libc::SYS_mknod => (Named { base: libc::AT_FDCWD, path: path(first)?, follow: false }, node(1)),
        libc::SYS_mknodat => (Named { base: fd(first), path: path(second)?, follow: false }, node(2)),
        _ => return Err(Errno::ENOSYS),
    })
}

/// Reads a path from the caller's memory, page by page: the next page may not exist.
fn read_path(pid: u32, start: u64) -> Result<CString, Errno> {
    const PAGE: usize = 4096;
    let pid = Pid::from_raw(i32::try_from(pid).map_err(|_| Errno::ESRCH)?);
    let mut base = usize::try_from(start).map_err(|_| Errno::EFAULT)?;
    let mut path = Vec::new();
    while path.len() < libc::PATH_MAX as usize {
        let mut page = [0; PAGE];
        let len = PAGE - base % PAGE;
        let buffer = page.get_mut(..len).unwrap_or_default();
        let got = process_vm_readv(pid, &mut [IoSliceMut::new(buffer)], &[RemoteIoVec { base, len }])?;
        let got = page.get(..got).unwrap_or_default();
        if let Ok(end) = CStr::from_bytes_until_nul(got) {
            path.extend(end.to_bytes());
            return CString::new(path).map_err(|_| Errno::EINVAL);
        }
        path.extend(got);
        base = base.checked_add(len).ok_or(Errno::EFAULT)?;
    }
    Err(Errno::ENAMETOOLONG)
}

fn errno(errno: rustix::io::Errno) -> Errno {
    Errno::from_raw(errno.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_read_over_a_page_boundary() {
        let long = CString::new(vec![b'x'; 4000]).expect("no NUL");
        let path = read_path(std::process::id(), long.as_ptr() as u64).expect("own memory");
        assert_eq!(path, long);
    }

    #[test]
    fn a_path_that_never_ends_is_too_long() {
        let bytes = vec![b'x'; 3 * 4096];
        assert_eq!(read_path(std::process::id(), bytes.as_ptr() as u64), Err(Errno::ENAMETOOLONG));
    }

    #[test]
    fn the_callers_own_proc_is_the_callers() {
        let status = Status { process: 9, uid: 0, gid: 0, umask: 0, effective: 0 };
        let own = |path: &str| of_caller(path.as_bytes(), &status, 11).and_then(|p| p.into_string().ok());
        assert_eq!(own("/proc/self/fd/3").as_deref(), Some("9/fd/3"));
        assert_eq!(own("/proc/thread-self/cwd/f").as_deref(), Some("9/task/11/cwd/f"));
        assert_eq!(own("/dev/fd/3").as_deref(), Some("9/fd/3"));
        assert_eq!(own("/proc/7/fd/3"), None);
        assert_eq!(own("/etc/passwd"), None);
    }

    #[test]
    fn the_callers_rights_are_read_from_its_status() {
        let text = "Name:\tx\nTgid:\t9\nUmask:\t0022\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nCapEff:\t00000000a80425fb\n";
        let expected = Status { process: 9, uid: 4, gid: 8, umask: 0o22, effective: 0xa804_25fb };
        assert_eq!(Status::parse(text), Some(expected));
        assert_eq!(Status::parse("Uid:\tx\n"), None);
    }
}
