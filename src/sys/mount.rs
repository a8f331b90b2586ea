//! What rustix lacks of the mount API.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

/// mount_setattr(2) on an open mount: sets `attributes` (`MOUNT_ATTR_*`), recursively if asked.
///
/// # Errors
/// `ENOSYS` before Linux 5.12; `EPERM` for attributes locked by a more privileged mount namespace.
pub(crate) fn set_attributes(mount: BorrowedFd<'_>, attributes: u64, recursive: bool) -> Result<(), Errno> {
    let attr = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty C string; `attr` outlives the call and its size is passed.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(done).map(drop)
}
