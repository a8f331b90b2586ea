//! seccomp(2): installing a filter, and answering the notifications of one.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

/// One instruction of a filter program.
pub(crate) use libc::sock_filter as Instruction;

/// A system call that waits for its answer (seccomp_unotify(2)).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Notification {
    /// Cookie of this notification.
    pub(crate) id: u64,
    /// Thread that made the call, as seen from the listener's pid namespace.
    pub(crate) pid: u32,
    /// Number of the system call.
    pub(crate) number: i32,
    /// Its arguments.
    pub(crate) args: [u64; 6],
}

/// `SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV`: a call that is being answered is not interrupted by
/// signals, so none is begun again that was carried out.
const WAIT_KILLABLE: libc::c_ulong = 1 << 5;

/// Installs `program` for this process. With `listen`, gives the descriptor on which
/// `SECCOMP_RET_USER_NOTIF` calls arrive. Needs no_new_privs.
///
/// # Errors
/// `EBUSY` when an outer filter already has a listener; `EINVAL` for a bad program.
pub(crate) fn install(program: &[Instruction], listen: bool) -> Result<Option<OwnedFd>, Errno> {
    let length = u16::try_from(program.len()).map_err(|_| Errno::E2BIG)?;
    let filter = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
    let set = |flags: libc::c_ulong| {
        // SAFETY: `filter` and the program it points to outlive the call; the kernel copies and does
        // not write through the pointer.
        Errno::result(unsafe {
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const filter)
        })
    };
    if !listen {
        return set(0).map(|_| None);
    }
    let fd = match set(libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | WAIT_KILLABLE) {
        // Before Linux 5.19.
        Err(Errno::EINVAL) => set(libc::SECCOMP_FILTER_FLAG_NEW_LISTENER)?,
        other => other?,
    };
    let fd = RawFd::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Waits for the next notification.
///
/// # Errors
/// `ENOENT` when the caller was killed in between, `EINTR`.
pub(crate) fn receive(listener: BorrowedFd<'_>) -> Result<Notification, Errno> {
    // SAFETY: seccomp_notif is plain integers; the kernel requires it zeroed.
    let mut notif: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: `notif` has the type that this request writes.
    Errno::result(unsafe {
        libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV as _, &raw mut notif)
    })?;
    Ok(Notification { id: notif.id, pid: notif.pid, number: notif.data.nr, args: notif.data.args })
}

/// Whether the call with this cookie still waits: what was read from the caller by its
/// pid before this was its own.
#[must_use]
pub(crate) fn still_waits(listener: BorrowedFd<'_>, id: u64) -> bool {
    // SAFETY: the request reads a u64.
    unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ID_VALID as _, &raw const id) == 0 }
}

/// Ends the waiting call with 0, or with `error`.
///
/// # Errors
/// `ENOENT` when the caller is gone.
pub(crate) fn answer(listener: BorrowedFd<'_>, id: u64, result: Result<(), Errno>) -> Result<(), Errno> {
    let error = result.err().map_or(0, |errno| -(errno as i32));
    let mut resp = libc::seccomp_notif_resp { id, val: 0, error, flags: 0 };
    // SAFETY: `resp` has the type that this request reads.
    Errno::result(unsafe {
        libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND as _, &raw mut resp)
    })
    .map(drop)
}
