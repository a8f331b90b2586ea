//! What the default filter refuses, and why.

use libc::c_long;
use nix::errno::Errno;

/// The newest system call this profile was reviewed for (`file_setattr`, Linux 6.17).
/// Later ones do not exist until somebody looked at them.
pub const MAX_KNOWN: u32 = 469;

/// One refused system call.
pub(super) struct Denied {
    pub(super) number: c_long,
    pub(super) errno: Errno,
    /// Allowed where another sandbox may be made inside.
    pub(super) nested: bool,
}

const fn never(number: c_long) -> Denied {
    Denied { number, errno: Errno::EPERM, nested: false }
}

const fn nesting(number: c_long) -> Denied {
    Denied { number, errno: Errno::EPERM, nested: true }
}

const fn absent(number: c_long) -> Denied {
    Denied { number, errno: Errno::ENOSYS, nested: false }
}

/// Calls refused whatever their arguments are.
pub(super) const DENIED: &[Denied] = &[
    // Mounts and namespaces: with them every file system driver and the whole of the
    // privileged half of the network stack is in reach of fake root.
    nesting(libc::SYS_mount),
    nesting(libc::SYS_umount2),
    nesting(libc::SYS_pivot_root),
    nesting(libc::SYS_open_tree),
    nesting(libc::SYS_move_mount),
    nesting(libc::SYS_fsopen),
    nesting(libc::SYS_fsconfig),
    nesting(libc::SYS_fsmount),
    nesting(libc::SYS_fspick),
    nesting(libc::SYS_mount_setattr),
    nesting(SYS_OPEN_TREE_ATTR),
    nesting(libc::SYS_setns),
    // Large kernel interfaces with a history of holes. Programs fall back on ENOSYS.
    absent(libc::SYS_io_uring_setup),
    absent(libc::SYS_io_uring_enter),
    absent(libc::SYS_io_uring_register),
    never(libc::SYS_bpf),
    never(libc::SYS_perf_event_open),
    never(libc::SYS_userfaultfd),
    never(libc::SYS_fanotify_init),
    // Keyrings are not per namespace: the caller's session keys would be in reach.
    never(libc::SYS_keyctl),
    never(libc::SYS_add_key),
    never(libc::SYS_request_key),
    // File handles reach files by number, past directory permissions (CVE-2014-3153's
    // neighbour "shocker").
    never(libc::SYS_open_by_handle_at),
    // The machine: modules, kexec, reboot, swap, clocks, accounting, quotas, the kernel log.
    never(libc::SYS_init_module),
    never(libc::SYS_finit_module),
    never(libc::SYS_delete_module),
    never(libc::SYS_kexec_load),
    #[cfg(target_arch = "x86_64")]
    never(libc::SYS_kexec_file_load),
    never(libc::SYS_reboot),
    never(libc::SYS_swapon),
    never(libc::SYS_swapoff),
    never(libc::SYS_settimeofday),
    never(libc::SYS_clock_settime),
    never(libc::SYS_acct),
    never(libc::SYS_quotactl),
    never(libc::SYS_quotactl_fd),
    never(libc::SYS_syslog),
    never(libc::SYS_vhangup),
    absent(libc::SYS_lookup_dcookie),
    absent(libc::SYS_nfsservctl),
    #[cfg(target_arch = "x86_64")]
    never(libc::SYS_iopl),
    #[cfg(target_arch = "x86_64")]
    never(libc::SYS_ioperm),
    #[cfg(target_arch = "x86_64")]
    absent(libc::SYS_uselib),
    #[cfg(target_arch = "x86_64")]
    absent(libc::SYS_ustat),
    #[cfg(target_arch = "x86_64")]
    absent(libc::SYS_sysfs),
    #[cfg(target_arch = "x86_64")]
    absent(libc::SYS__sysctl),
];

/// open_tree_attr(2), Linux 6.15.
const SYS_OPEN_TREE_ATTR: c_long = 467;

/// Terminal ioctls that type into, or read, a terminal that is not the payload's own
/// (CVE-2017-5226): TIOCSTI and TIOCLINUX; and TIOCSETD, which loads line disciplines.
pub(super) const IOCTLS: &[u32] = &[0x5412, 0x541c, 0x5423];

/// Socket families that programs use: AF_UNIX, AF_INET, AF_INET6, AF_NETLINK, AF_PACKET. Others
/// reach past the network namespace (AF_VSOCK: the hypervisor) or load rarely used kernel code.
pub(super) const SOCKET_FAMILIES: &[u32] = &[1, 2, 10, 16, 17];

/// Execution domains that programs use: Linux, its 32-bit and short-inode variants, the query,
/// and `ADDR_NO_RANDOMIZE` (debuggers, sanitizers), which concerns only the caller. Others change
/// how the kernel protects address space.
pub(super) const PERSONALITIES: &[u32] = &[0x0, 0x0008, 0x0002_0000, 0x0002_0008, 0xffff_ffff, 0x0004_0000];

/// What a process that makes sockets for another calls besides socket(2) and mmap(2): it waits, is asked, answers, ends, and
/// its allocator may want memory.
pub(super) const SOCKET_MAKER: &[c_long] = &[
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_restart_syscall,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_close,
    libc::SYS_exit_group,
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_madvise,
];

/// `CLONE_NEW*`: NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET. (NEWTIME is a
/// signal number to clone(2); unshare(2) of it needs CAP_SYS_ADMIN, which the payload lacks.)
pub(super) const NEW_NAMESPACES: u32 =
    0x0002_0000 | 0x0200_0000 | 0x0400_0000 | 0x0800_0000 | 0x1000_0000 | 0x2000_0000 | 0x4000_0000;

/// Calls that set an owner, with the index of the uid; the gid follows it.
pub(super) const CHOWN: &[(c_long, u32)] = &[
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_chown, 1),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_lchown, 1),
    (libc::SYS_fchown, 1),
    (libc::SYS_fchownat, 2),
];

/// Calls that make a device node, with the index of the mode; the device number follows it.
pub(super) const MKNOD: &[(c_long, u32)] = &[
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_mknod, 1),
    (libc::SYS_mknodat, 2),
];

/// Calls that change the caller's uids, with the number of ids they take.
pub(super) const SET_UID: &[(c_long, u32)] =
    &[(libc::SYS_setuid, 1), (libc::SYS_setreuid, 2), (libc::SYS_setresuid, 3)];

/// The same for gids.
pub(super) const SET_GID: &[(c_long, u32)] =
    &[(libc::SYS_setgid, 1), (libc::SYS_setregid, 2), (libc::SYS_setresgid, 3)];
