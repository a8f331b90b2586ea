//! The crate's only unsafe lines: extended attributes of a (directory, name) pair, and
//! what else neither library offers for such a pair.
//!
//! `getxattrat` and its relatives exist since Linux 6.13 and neither `rustix`, `nix`
//! nor `libc` wraps them. Before, the same is reached through `/proc/self/fd`, which
//! follows no link of the name itself because an `O_PATH` descriptor stands for it.
//! All of them give the kernel's errno; none is interrupted by signals.

#![expect(unsafe_code, reason = "no safe wrapper of these system calls exists")]

use std::ffi::CString;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Mode, OFlags, XattrFlags};

use crate::errno::{Errno, Res};

/// The object whose attributes are meant.
#[derive(Debug, Clone, Copy)]
pub(crate) enum At<'a> {
    /// The object `name` in a directory; never followed if it is a symbolic link.
    Name(BorrowedFd<'a>, &'a [u8]),
    /// An open file (not `O_PATH`).
    Fd(BorrowedFd<'a>),
    /// Whatever is opened with `O_PATH`. The kernel gives its attributes through procfs only.
    Object(BorrowedFd<'a>),
}

// The numbers are the same on every architecture that has them (asm-generic table).
const SYS_SETXATTRAT: libc::c_long = 463;
const SYS_GETXATTRAT: libc::c_long = 464;
const SYS_LISTXATTRAT: libc::c_long = 465;
const SYS_REMOVEXATTRAT: libc::c_long = 466;

/// `struct xattr_args` of linux/xattr.h.
#[repr(C, align(8))]
struct XattrArgs {
    value: u64,
    size: u32,
    flags: u32,
}

/// Cleared for good by the first `ENOSYS` (or a seccomp filter's `EPERM`).
static HAVE_XATTRAT: AtomicBool = AtomicBool::new(true);

fn cstring(bytes: &[u8]) -> Res<CString> {
    CString::new(bytes).map_err(|_| Errno::INVAL)
}

fn result(rc: libc::c_long) -> Res<usize> {
    usize::try_from(rc)
        .map_err(|_| Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}

/// The old way: a path that stands for the object itself, whatever it is.
fn with_proc_path<T>(dir: BorrowedFd<'_>, name: &[u8], f: impl FnOnce(&str) -> Res<T>) -> Res<T> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let object = rustix::fs::openat(dir, name, flags, Mode::empty())?;
    f(&format!("/proc/self/fd/{}", object.as_raw_fd()))
}

/// The same of an object that is open.
fn of_object<T>(object: BorrowedFd<'_>, f: impl FnOnce(&str) -> Res<T>) -> Res<T> {
    match f(&format!("/proc/self/fd/{}", object.as_raw_fd())) {
        // There is no procfs.
        Err(Errno::NOENT) => Err(Errno::OPNOTSUPP),
        done => done,
    }
}

/// Whether the new calls may be tried; remembers that they are missing.
fn have_xattrat<T>(result: Res<T>) -> Option<Res<T>> {
    if matches!(result, Err(Errno::NOSYS)) {
        HAVE_XATTRAT.store(false, Ordering::Relaxed);
        return None;
    }
    Some(result)
}

/// getxattr: the number of bytes put into `buf`, `ERANGE` if it is too small.
pub(crate) fn get_xattr(at: At<'_>, attr: &str, buf: &mut [u8]) -> Res<usize> {
    let (dir, name) = match at {
        At::Fd(fd) => return rustix::fs::fgetxattr(fd, attr, buf),
        At::Object(fd) => return of_object(fd, |path| rustix::fs::getxattr(path, attr, buf)),
        At::Name(dir, name) => (dir, name),
    };
    if HAVE_XATTRAT.load(Ordering::Relaxed) {
        let (path, key) = (cstring(name)?, cstring(attr.as_bytes())?);
        let mut args = XattrArgs {
            value: buf.as_mut_ptr() as u64,
            size: u32::try_from(buf.len()).unwrap_or(u32::MAX),
            flags: 0,
        };
        // SAFETY: both strings are NUL-terminated and outlive the call; `args` has the
        // kernel's layout and its size is passed; it points to `buf`, which is writable
        // for the length it gives and borrowed mutably by us.
        let rc = unsafe {
            libc::syscall(
                SYS_GETXATTRAT,
                dir.as_raw_fd(),
                path.as_ptr(),
                libc::AT_SYMLINK_NOFOLLOW,
                key.as_ptr(),
                &raw mut args,
                size_of::<XattrArgs>(),
            )
        };
        if let Some(done) = have_xattrat(result(rc)) {
            return done;
        }
    }
    with_proc_path(dir, name, |path| rustix::fs::getxattr(path, attr, buf))
}

/// listxattr: the number of bytes of NUL-terminated names put into `buf`.
pub(crate) fn list_xattr(at: At<'_>, buf: &mut [u8]) -> Res<usize> {
    let (dir, name) = match at {
        At::Fd(fd) => return rustix::fs::flistxattr(fd, buf),
        At::Object(fd) => return of_object(fd, |path| rustix::fs::listxattr(path, buf)),
        At::Name(dir, name) => (dir, name),
    };
    if HAVE_XATTRAT.load(Ordering::Relaxed) {
        let path = cstring(name)?;
        // SAFETY: the string is NUL-terminated and outlives the call; the buffer is
        // writable for the length that is passed.
        let rc = unsafe {
            libc::syscall(
                SYS_LISTXATTRAT,
                dir.as_raw_fd(),
                path.as_ptr(),
                libc::AT_SYMLINK_NOFOLLOW,
                buf.as_mut_ptr(),
                buf.len(),
            )
        };
        if let Some(done) = have_xattrat(result(rc)) {
            return done;
        }
    }
    with_proc_path(dir, name, |path| rustix::fs::listxattr(path, buf))
}

/// setxattr.
pub(crate) fn set_xattr(at: At<'_>, attr: &str, value: &[u8], flags: XattrFlags) -> Res<()> {
    let (dir, name) = match at {
        At::Fd(fd) => return rustix::fs::fsetxattr(fd, attr, value, flags),
        At::Object(fd) => return of_object(fd, |path| rustix::fs::setxattr(path, attr, value, flags)),
        At::Name(dir, name) => (dir, name),
    };
    if HAVE_XATTRAT.load(Ordering::Relaxed) {
        let (path, key) = (cstring(name)?, cstring(attr.as_bytes())?);
        let args = XattrArgs {
            value: value.as_ptr() as u64,
            size: u32::try_from(value.len()).map_err(|_| Errno::TOOBIG)?,
            flags: flags.bits(),
        };
        // SAFETY: both strings are NUL-terminated and outlive the call; `args` has the
        // kernel's layout and its size is passed; the kernel only reads the value.
        let rc = unsafe {
            libc::syscall(
                SYS_SETXATTRAT,
                dir.as_raw_fd(),
                path.as_ptr(),
                libc::AT_SYMLINK_NOFOLLOW,
                key.as_ptr(),
                &raw const args,
                size_of::<XattrArgs>(),
            )
        };
        if let Some(done) = have_xattrat(result(rc)) {
            return done.map(drop);
        }
    }
    with_proc_path(dir, name, |path| rustix::fs::setxattr(path, attr, value, flags))
}

/// removexattr.
pub(crate) fn remove_xattr(at: At<'_>, attr: &str) -> Res<()> {
    let (dir, name) = match at {
        At::Fd(fd) => return rustix::fs::fremovexattr(fd, attr),
        At::Object(fd) => return of_object(fd, |path| rustix::fs::removexattr(path, attr)),
        At::Name(dir, name) => (dir, name),
    };
    if HAVE_XATTRAT.load(Ordering::Relaxed) {
        let (path, key) = (cstring(name)?, cstring(attr.as_bytes())?);
        // SAFETY: both strings are NUL-terminated and outlive the call.
        let rc = unsafe {
            libc::syscall(
                SYS_REMOVEXATTRAT,
                dir.as_raw_fd(),
                path.as_ptr(),
                libc::AT_SYMLINK_NOFOLLOW,
                key.as_ptr(),
            )
        };
        if let Some(done) = have_xattrat(result(rc)) {
            return done.map(drop);
        }
    }
    with_proc_path(dir, name, |path| rustix::fs::removexattr(path, attr))
}

/// chmod of a name that is never followed. (fchmodat2 is newer than the kernels we want.)
pub(crate) fn chmod_special(dir: BorrowedFd<'_>, name: &[u8], mode: Mode) -> Res<()> {
    with_proc_path(dir, name, |path| rustix::fs::chmod(path, mode))
}

/// The same of an object that is open with `O_PATH`.
pub(crate) fn chmod_object(object: BorrowedFd<'_>, mode: Mode) -> Res<()> {
    of_object(object, |path| rustix::fs::chmod(path, mode))
}

/// getxattr into a vector of the right size; `None` if the attribute (or the file
/// system's support for it) is missing.
pub(crate) fn get_xattr_vec(at: At<'_>, attr: &str) -> Res<Option<Vec<u8>>> {
    let mut buf = vec![0; 512];
    loop {
        match get_xattr(at, attr, &mut buf) {
            Ok(n) => {
                buf.truncate(n);
                return Ok(Some(buf));
            }
            // 64 KiB is XATTR_SIZE_MAX: a larger value cannot exist.
            Err(Errno::RANGE) if buf.len() < 65536 => buf = vec![0; 65536],
            Err(Errno::NODATA | Errno::OPNOTSUPP) => return Ok(None),
            Err(err) => return Err(err),
        }
    }
}

/// listxattr into a vector of the right size, empty where there is no support.
pub(crate) fn list_xattr_vec(at: At<'_>) -> Res<Vec<u8>> {
    let mut buf = vec![0; 512];
    loop {
        match list_xattr(at, &mut buf) {
            Ok(n) => {
                buf.truncate(n);
                return Ok(buf);
            }
            Err(Errno::RANGE) if buf.len() < 65536 => buf = vec![0; 65536],
            Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
            Err(err) => return Err(err),
        }
    }
}

/// Gives pages of the heap that are free to the kernel, wherever they are. It takes milliseconds.
pub(crate) fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) may be called at any time by any thread; it touches free memory only.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// `FUSE_DEV_IOC_BACKING_CLOSE`: the kernel forgets a file that was registered on a FUSE connection.
pub(crate) fn close_backing(fuse: BorrowedFd<'_>, id: u32) -> Res<()> {
    const CLOSE: rustix::ioctl::Opcode = rustix::ioctl::opcode::write::<u32>(229, 2);
    // SAFETY: the kernel reads a `u32` where the argument points to, as this opcode says.
    unsafe { rustix::ioctl::ioctl(fuse, rustix::ioctl::Setter::<CLOSE, u32>::new(id)) }
}

fn scheduling() -> Res<libc::sched_attr> {
    let size = u32::try_from(size_of::<libc::sched_attr>()).map_err(|_| Errno::INVAL)?;
    // SAFETY: all fields are numbers, for which zero is a value.
    let mut attr: libc::sched_attr = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes at most `size` bytes to what the pointer leads to.
    result(unsafe { libc::syscall(libc::SYS_sched_getattr, 0, std::ptr::from_mut(&mut attr), size, 0) })?;
    attr.size = size;
    Ok(attr)
}

fn set_scheduling(attr: &libc::sched_attr) -> Res<()> {
    // SAFETY: the kernel reads as many bytes as `size`, which is in it, says.
    result(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, std::ptr::from_ref(attr), 0) }).map(drop)
}

/// How the calling thread is scheduled, if it is an ordinary one (`SCHED_OTHER`, sched(7)) and the kernel knows the
/// length of its turns: since Linux 6.12.
fn turns() -> Option<libc::sched_attr> {
    let ordinary = |attr: &libc::sched_attr| {
        attr.sched_policy == libc::SCHED_OTHER.cast_unsigned() && attr.sched_runtime != 0
    };
    scheduling().ok().filter(ordinary)
}

/// Whether the calling thread may have turns of a length of its own.
pub(crate) fn has_turns() -> bool {
    turns().is_some()
}

/// The calling thread gives way to every other one (`SCHED_IDLE`, sched(7)), for ever, with turns of the given length. It
/// has to be an ordinary one.
///
/// # Errors
/// `NOTSUP` where [`has_turns`] is false. The thread is as before then, and after any other error.
pub(crate) fn give_way(slice: std::time::Duration) -> Res<()> {
    let before = turns().ok_or(Errno::NOTSUP)?;
    let sched_runtime = u64::try_from(slice.as_nanos()).map_err(|_| Errno::INVAL)?;
    // Of one that gives way already the length stays as it is.
    set_scheduling(&libc::sched_attr { sched_runtime, ..before })?;
    let gives_way = libc::sched_attr { sched_policy: libc::SCHED_IDLE.cast_unsigned(), ..before };
    set_scheduling(&gives_way).inspect_err(|_| {
        let _ = set_scheduling(&before);
    })
}
