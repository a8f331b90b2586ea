//! The payload's last step before its command: our program's second start, without a C library.
//!
//! The kernel enters the program at `rootlet_start` (build.rs). A start under any other name goes
//! on to the C library's `_start` as if nothing had been in between. A start as [`NAME`] tries the
//! candidates it was given, as execvp(3) does, and needs nothing that a C library or Rust's runtime
//! sets up: their start is a tenth of a whole sandbox's where `cpuid` is trapped, as in virtual
//! machines.
//!
//! ```text
//! argv   NAME  REPORT  TRIED  candidate…  argument…
//! ```
//! REPORT is the number of a descriptor, which execve closes when it succeeds. TRIED is [`TRIED`]
//! and as many bytes as there are candidates; each is replaced by the errno of its execve, and
//! those that were are written to REPORT if none succeeded.
//!
//! The code here runs before the program has relocated anything (which is why build.rs refuses a
//! static program that does), the C library's functions by processor among it: it must call none
//! (`memcpy` and the like), and whatever the compiler would turn into such a call is read by
//! `read_volatile`. It runs confined as the payload; whoever calls our program by this name
//! gains nothing, and with privilege that the caller does not have (AT_SECURE) it is not entered.

use core::arch::{asm, global_asm};
use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd as _, BorrowedFd};

/// `argv[0]` of such a start.
const NAME: &CStr = c"rootlet-exec";

/// First byte of TRIED.
const TRIED: u8 = b'!';

const F_SETFD: usize = libc::F_SETFD as usize;
const FD_CLOEXEC: usize = libc::FD_CLOEXEC as usize;
const ENOENT: usize = libc::ENOENT as usize;
const ENOTDIR: usize = libc::ENOTDIR as usize;
const EACCES: usize = libc::EACCES as usize;
const ESTALE: usize = libc::ESTALE as usize;
const ENODEV: usize = libc::ENODEV as usize;
const ETIMEDOUT: usize = libc::ETIMEDOUT as usize;

/// Exit status if no candidate could be executed; init hears why on REPORT.
const FAILED: usize = 125;

#[cfg(target_arch = "x86_64")]
global_asm!(
    ".section .text.rootlet_start, \"ax\", @progbits",
    ".globl rootlet_start",
    ".type rootlet_start, @function",
    "rootlet_start:",
    // rdx is an argument of _start where a dynamic loader came first (System V ABI, AMD64).
    "mov rdi, rsp",
    "push rdx",
    "sub rsp, 8",
    "call {stage}",
    "add rsp, 8",
    "pop rdx",
    "jmp _start",
    ".size rootlet_start, . - rootlet_start",
    ".text",
    stage = sym exec_stage,
);

#[cfg(target_arch = "aarch64")]
global_asm!(
    ".section .text.rootlet_start, \"ax\", %progbits",
    ".globl rootlet_start",
    ".type rootlet_start, %function",
    "rootlet_start:",
    // x0 is an argument of _start where a dynamic loader came first (System V ABI, AArch64).
    "mov x19, x0",
    "mov x0, sp",
    "bl {stage}",
    "mov x0, x19",
    "b _start",
    ".size rootlet_start, . - rootlet_start",
    ".text",
    stage = sym exec_stage,
);

/// NAME, REPORT and TRIED: what stands before the candidates and the arguments.
pub(crate) fn start_of_arguments(report: BorrowedFd<'_>, candidates: usize) -> Vec<CString> {
    let text = |bytes: Vec<u8>| CString::new(bytes).unwrap_or_default();
    let report = text(report.as_raw_fd().to_string().into());
    let tried = text([vec![TRIED], vec![b' '; candidates]].concat());
    vec![NAME.into(), report, tried]
}

/// The errno of each candidate that was tried, if a message says that none could be executed.
pub(crate) fn tried(message: &[u8]) -> Option<&[u8]> {
    message.strip_prefix(&[TRIED])
}

/// Returns if this start is not one as [`NAME`], or its arguments are not as above.
///
/// # Safety
/// `stack` is what the kernel hands to a new program: argc, argv, a null, the environment, a null,
/// the auxiliary vector (execve(2), getauxval(3)).
unsafe extern "C" fn exec_stage(stack: *const usize) {
    // SAFETY: every pointer stays in what the kernel laid out: argc bounds argv, nulls end the
    // environment and each string, AT_NULL the auxiliary vector. The strings are this program's
    // own memory, so TRIED may be written.
    unsafe {
        let argc = stack.read_volatile();
        let argv = stack.add(1).cast::<*mut u8>();
        if argc < 5 || !is_name(argv.read_volatile()) {
            return;
        }
        let env = argv.add(argc + 1);
        if secure(env) {
            return;
        }
        let (report, tried) = (argv.add(1).read_volatile(), argv.add(2).read_volatile());
        let report = number(report);
        let count = length(tried).wrapping_sub(1);
        if tried.read_volatile() != TRIED || count == 0 || argc - 3 <= count {
            return;
        }
        let (candidates, args) = (argv.add(3), argv.add(3 + count));
        system_call(libc::SYS_fcntl, [report, F_SETFD, FD_CLOEXEC]);
        let mut done = 0;
        while done < count {
            let path = candidates.add(done).read_volatile();
            let result = system_call(libc::SYS_execve, [path as usize, args as usize, env as usize]);
            let errno = result.wrapping_neg();
            done += 1;
            tried.add(done).write_volatile(errno.to_le_bytes()[0]);
            // Not this one; a later one may be it.
            if !matches!(errno, ENOENT | ENOTDIR | EACCES | ESTALE | ENODEV | ETIMEDOUT) {
                break;
            }
        }
        system_call(libc::SYS_write, [report, tried as usize, 1 + done]);
        system_call(libc::SYS_exit_group, [FAILED, 0, 0]);
    }
}

/// Whether a string is [`NAME`].
unsafe fn is_name(string: *const u8) -> bool {
    let mut index = 0;
    while index < NAME.count_bytes() + 1 {
        // SAFETY: the string ends in a NUL, and the first difference ends the loop.
        let (theirs, ours) =
            unsafe { (string.add(index).read_volatile(), NAME.as_ptr().add(index).cast::<u8>().read()) };
        if theirs != ours {
            return false;
        }
        index += 1;
    }
    true
}

/// Whether the auxiliary vector, which follows the environment, holds AT_SECURE.
unsafe fn secure(env: *const *mut u8) -> bool {
    // SAFETY: a null ends the environment, AT_NULL the vector after it.
    unsafe {
        let mut end = env;
        while !end.read_volatile().is_null() {
            end = end.add(1);
        }
        let mut entry = end.add(1).cast::<[u64; 2]>();
        loop {
            match entry.read_volatile() {
                [libc::AT_NULL, _] => return false,
                [libc::AT_SECURE, value] => return value != 0,
                _ => entry = entry.add(1),
            }
        }
    }
}

/// The decimal number a string starts with.
unsafe fn number(string: *const u8) -> usize {
    let mut value = 0_usize;
    let mut at = string;
    loop {
        // SAFETY: the string ends in a NUL, which is no digit.
        let digit = unsafe { at.read_volatile() }.wrapping_sub(b'0');
        if digit > 9 {
            return value;
        }
        value = value.wrapping_mul(10).wrapping_add(digit as usize);
        // SAFETY: the byte before was not the NUL.
        at = unsafe { at.add(1) };
    }
}

/// Bytes before a string's NUL.
unsafe fn length(string: *const u8) -> usize {
    let mut length = 0;
    // SAFETY: the string ends in a NUL.
    while unsafe { string.add(length).read_volatile() } != 0 {
        length += 1;
    }
    length
}

/// A system call of at most three arguments; a failure is the negated errno (syscall(2)).
#[cfg(target_arch = "x86_64")]
unsafe fn system_call(number: libc::c_long, [a, b, c]: [usize; 3]) -> usize {
    let result;
    // SAFETY: the kernel changes rax, rcx and r11 only; what the call does is the caller's to answer for.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") a, in("rsi") b, in("rdx") c,
             lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

/// A system call of at most three arguments; a failure is the negated errno (syscall(2)).
#[cfg(target_arch = "aarch64")]
unsafe fn system_call(number: libc::c_long, [a, b, c]: [usize; 3]) -> usize {
    let result;
    // SAFETY: the kernel changes x0 only; what the call does is the caller's to answer for.
    unsafe {
        asm!("svc 0", in("x8") number, inlateout("x0") a => result, in("x1") b, in("x2") c, options(nostack));
    }
    result
}
