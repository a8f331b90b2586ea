//! Making processes and closing descriptors.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::unistd::Pid;

/// Which side of a [`clone_with`] this is.
#[derive(Debug)]
pub(crate) enum Cloned {
    /// The caller: the new process as its pid namespace's parent sees it.
    Parent {
        /// Process id.
        pid: Pid,
        /// Refers to the process whatever happens to its id (pidfd_open(2)).
        pidfd: OwnedFd,
    },
    /// The new process.
    Child,
}

/// clone3(2) with the memory copied, as fork(2), in new namespaces.
///
/// `namespaces` are `CLONE_NEW*` flags. The process must have one thread: the new one
/// inherits the locks of every other as they stand.
///
/// # Errors
/// As clone3(2): `ENOSPC` when user.max_user_namespaces or the nesting depth of 32 is
/// reached, `EPERM` when user namespaces are forbidden.
///
/// # Panics
/// When another thread exists.
pub(crate) fn clone_with(namespaces: libc::c_int) -> Result<Cloned, Errno> {
    assert!(single_threaded(), "clone_with needs a single-threaded process");
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain integers, for which zero is valid.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = u64::from((namespaces | libc::CLONE_PIDFD).cast_unsigned());
    args.pidfd = (&raw mut pidfd) as u64;
    args.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    // SAFETY: `args` outlives the call and its size is passed; no stack is given and memory is
    // copied, so the child goes on here on its own copy; no other thread exists (asserted above),
    // so the child inherits no lock held by someone else.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    match Errno::result(pid)? {
        0 => Ok(Cloned::Child),
        pid => {
            // SAFETY: the kernel stored a new descriptor there, which nobody else owns.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            let pid = i32::try_from(pid).map_err(|_| Errno::EOVERFLOW)?;
            Ok(Cloned::Parent { pid: Pid::from_raw(pid), pidfd })
        }
    }
}

/// Whether this process has one thread (the link count of /proc/self/task).
#[must_use]
fn single_threaded() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    // Without /proc there is nothing to ask; the callers start their threads later by design.
    std::fs::metadata("/proc/self/task").map_or(true, |m| m.nlink() == 3)
}

/// Whether this program was started with privilege that its caller does not have: set-user-ID,
/// set-group-ID or file capabilities (AT_SECURE in getauxval(3)).
#[must_use]
pub fn has_foreign_privilege() -> bool {
    // SAFETY: reads the auxiliary vector that the kernel gave this process.
    unsafe { libc::getauxval(libc::AT_SECURE) != 0 }
}

/// Closes every descriptor above 2 but those in `keep` (close_range(2)).
///
/// # Errors
/// `ENOSYS` before Linux 5.9.
pub(crate) fn close_all_but(keep: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    let mut keep: Vec<u32> = keep.iter().map(|fd| fd.as_raw_fd().cast_unsigned()).collect();
    keep.sort_unstable();
    let mut first = 3;
    for fd in keep.into_iter().filter(|fd| *fd >= 3) {
        if fd > first {
            close_range(first, fd - 1, 0)?;
        }
        first = fd + 1;
    }
    close_range(first, u32::MAX, 0)
}

/// Closes standard input, output and error, which this process uses no more. Their numbers go to what is opened next.
pub(crate) fn close_standard_streams() {
    for number in 0..=2 {
        // SAFETY: std holds these numbers and no object for them; what it would write there is lost (EBADF), or goes to
        // a descriptor of this process that is opened later, as is said above.
        unsafe { libc::close(number) };
    }
}

/// Marks every descriptor from `first` on to be closed by execve(2).
///
/// # Errors
/// `EINVAL` before Linux 5.11, which lacks `CLOSE_RANGE_CLOEXEC`.
pub(crate) fn cloexec_from(first: u32) -> Result<(), Errno> {
    close_range(first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC)
}

fn close_range(first: u32, last: u32, flags: u32) -> Result<(), Errno> {
    // SAFETY: called where the owner of every descriptor in the range is about to be replaced by
    // execve or belongs to the copy of another process's memory that this process never drops.
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
    Errno::result(done).map(drop)
}

/// fork(2).
///
/// # Errors
/// As fork(2).
///
/// # Panics
/// When another thread exists.
pub(crate) fn fork() -> Result<Option<Pid>, Errno> {
    assert!(single_threaded(), "fork needs a single-threaded process");
    // SAFETY: no other thread exists (asserted above), so the child may do everything.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Parent { child } => Ok(Some(child)),
        nix::unistd::ForkResult::Child => Ok(None),
    }
}

/// Ends this process at once: no destructor and no exit handler of the memory it shares
/// a past with runs.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no precondition.
    unsafe { libc::_exit(code) }
}

/// Sets a signal to its default action. Rust's runtime ignores SIGPIPE, and an ignored
/// signal stays ignored over execve(2).
pub(crate) fn default_signal(signal: nix::sys::signal::Signal) -> Result<(), Errno> {
    // SAFETY: SIG_DFL installs no handler.
    unsafe { nix::sys::signal::signal(signal, nix::sys::signal::SigHandler::SigDfl) }.map(drop)
}

/// Whether this process ignores a signal (sigaction(2)), as one that nohup(1) starts does SIGHUP.
pub(crate) fn is_ignored(signal: nix::sys::signal::Signal) -> bool {
    // SAFETY: sigaction is plain data, for which zero is valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: without a new action the call only stores the old one in `action`, which outlives it.
    let done = unsafe { libc::sigaction(signal as libc::c_int, std::ptr::null(), &raw mut action) };
    done == 0 && action.sa_sigaction == libc::SIG_IGN
}

/// execveat(2) of an open file.
///
/// # Errors
/// As execveat(2); it only returns on failure.
pub(crate) fn exec_fd(file: BorrowedFd<'_>, args: &[std::ffi::CString], env: &[std::ffi::CString]) -> Errno {
    let pointers = |list: &[std::ffi::CString]| -> Vec<*const libc::c_char> {
        list.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: both arrays end in null and point to strings that outlive the call; the path is an
    // empty C string, which AT_EMPTY_PATH makes mean the descriptor.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            file.as_raw_fd(),
            c"".as_ptr(),
            args.as_ptr(),
            env.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    Errno::last()
}

/// A descriptor that this process was started with, by its number.
///
/// # Errors
/// `EBADF` when there is none of this number.
pub(crate) fn inherited_fd(number: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: F_SETFD changes a flag of this process's table at most; it fails with EBADF where there is no descriptor.
    Errno::result(unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: it exists (asked above); its number came from the caller of the program, and nobody asks for it twice, so
    // nothing else here owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// The user namespace that owns a namespace (ioctl_ns(2), NS_GET_USERNS).
///
/// # Errors
/// `EPERM` when it is outside of the caller's; `ENOTTY` when `namespace` is none.
pub(crate) fn owner_of_namespace(namespace: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    /// `_IO(0xb7, 1)`
    const NS_GET_USERNS: libc::Ioctl = 0xb701;
    // SAFETY: the request takes no argument.
    let fd = Errno::result(unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_USERNS) })?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
