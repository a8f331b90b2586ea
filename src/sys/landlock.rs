//! landlock(7): only its scopes.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

/// `struct landlock_ruleset_attr` as of ABI 6 (Linux 6.12).
#[repr(C)]
struct RulesetAttr {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

const SCOPE_ABSTRACT_UNIX_SOCKET: u64 = 1 << 0;

/// `LANDLOCK_CREATE_RULESET_VERSION`.
const VERSION: u32 = 1 << 0;
/// The first ABI with scopes.
const SCOPES_ABI: i64 = 6;

/// Whether the kernel can scope abstract sockets.
#[must_use]
pub(crate) fn has_scopes() -> bool {
    // SAFETY: with this flag the attributes must be null and their size zero.
    let abi = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<RulesetAttr>(), 0, VERSION)
    };
    abi >= SCOPES_ABI
}

/// Keeps this process and its children from connecting to abstract unix sockets made
/// outside. Needs no_new_privs.
///
/// # Errors
/// `ENOSYS` or `EOPNOTSUPP` without Landlock, `E2BIG` or `EINVAL` before Linux 6.12.
pub(crate) fn scope_abstract_sockets() -> Result<(), Errno> {
    let attr =
        RulesetAttr { handled_access_fs: 0, handled_access_net: 0, scoped: SCOPE_ABSTRACT_UNIX_SOCKET };
    // SAFETY: `attr` outlives the call and its size is passed.
    let fd = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, &raw const attr, size_of::<RulesetAttr>(), 0)
    };
    let fd = RawFd::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel just made this descriptor for us.
    let ruleset = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: takes integers only.
    let done = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) };
    Errno::result(done).map(drop)
}
