//! The system call filter of the payload.
//!
//! One classic-BPF program (seccomp(2)), built from the tables of `profile`. What it
//! refuses does not depend on capabilities: the payload may be root in its own user
//! namespace, and namespaces, mounts, io_uring, bpf and the like are kernel surface that
//! builds and servers do not need.
//!
//! - Another architecture's calls (`int 0x80`, x32) and numbers newer than the profile
//!   was reviewed for are `ENOSYS`.
//! - Only integers are compared, and of each argument the low 32 bits, as the kernel does
//!   for ioctl(2) requests and ids: high bits do not get round the filter.
//! - Owners that the user namespace does not map, and device nodes, are handed to init
//!   ([`crate::stage`]), which records them in the overlay.

mod profile;

use std::mem::offset_of;

use nix::errno::Errno;

use crate::plan::SeccompPlan;
use crate::spec::IdExtent;
use crate::sys::seccomp::Instruction;

pub use profile::MAX_KNOWN;

/// What the filter depends on besides the profile.
#[derive(Debug, Clone)]
pub struct FilterSpec<'a> {
    /// Which profile.
    pub profile: SeccompPlan,
    /// uids that exist inside.
    pub uids: &'a [IdExtent],
    /// gids that exist inside.
    pub gids: &'a [IdExtent],
    /// setgroups(2) is denied in the user namespace and only seems to succeed.
    pub fake_setgroups: bool,
    /// A listener answers owners and device nodes. Without, the kernel refuses them.
    pub listener: bool,
}

/// Offsets in `struct seccomp_data`.
const DATA_NUMBER: u32 = 0;
const DATA_ARCH: u32 = 4;
const DATA_ARGS: u32 = 16;
const _: () = assert!(
    offset_of!(libc::seccomp_data, nr) == DATA_NUMBER as usize
        && offset_of!(libc::seccomp_data, arch) == DATA_ARCH as usize
        && offset_of!(libc::seccomp_data, args) == DATA_ARGS as usize
);
#[cfg(target_arch = "x86_64")]
const ARCH: u32 = 0xc000_003e; // AUDIT_ARCH_X86_64
#[cfg(target_arch = "aarch64")]
const ARCH: u32 = 0xc000_00b7; // AUDIT_ARCH_AARCH64

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const NOTIFY: u32 = libc::SECCOMP_RET_USER_NOTIF;
/// Ends the call with 0 without doing it.
const SUCCEED: u32 = libc::SECCOMP_RET_ERRNO;

fn refuse(errno: Errno) -> u32 {
    libc::SECCOMP_RET_ERRNO | (errno as i32).cast_unsigned()
}

/// Builds the filter program.
#[must_use]
pub fn build(spec: &FilterSpec<'_>) -> Vec<Instruction> {
    let mut program = Program::default();
    program.load(DATA_ARCH);
    program.unless(Test::Equal(ARCH), refuse(Errno::ENOSYS));
    program.load(DATA_NUMBER);
    // Also refuses x32 calls, whose numbers have bit 30 set.
    program.when(Test::Above(MAX_KNOWN), refuse(Errno::ENOSYS));
    let nested = spec.profile == SeccompPlan::Nested;
    for denied in profile::DENIED.iter().filter(|d| !(nested && d.nested)) {
        program.when(Test::Equal(number(denied.number)), refuse(denied.errno));
    }
    program.call(libc::SYS_ioctl, |p| {
        p.load_arg(1);
        for request in profile::IOCTLS {
            p.when(Test::Equal(*request), refuse(Errno::EPERM));
        }
    });
    for call in [libc::SYS_socket, libc::SYS_socketpair] {
        program.call(call, |p| {
            p.load_arg(0);
            for family in profile::SOCKET_FAMILIES {
                p.when(Test::Equal(*family), ALLOW);
            }
            p.finish(refuse(Errno::EAFNOSUPPORT));
        });
    }
    program.call(libc::SYS_personality, |p| {
        p.load_arg(0);
        for persona in profile::PERSONALITIES {
            p.when(Test::Equal(*persona), ALLOW);
        }
        p.finish(refuse(Errno::EPERM));
    });
    if !nested {
        for call in [libc::SYS_clone, libc::SYS_unshare] {
            program.call(call, |p| {
                p.load_arg(0);
                p.when(Test::AnyBit(profile::NEW_NAMESPACES), refuse(Errno::EPERM));
            });
        }
        program.when(Test::Equal(number(libc::SYS_clone3)), refuse(Errno::ENOSYS));
    }
    owners(&mut program, spec);
    if spec.listener {
        device_nodes(&mut program);
    }
    program.finish(ALLOW);
    program.0
}

/// The filter of a process that makes sockets for another ([`netstack::SocketMaker`]), and does nothing else. Here what is
/// not listed is refused (`EPERM`).
#[must_use]
pub(crate) fn socket_maker() -> Vec<Instruction> {
    let mut program = Program::default();
    program.load(DATA_ARCH);
    program.unless(Test::Equal(ARCH), refuse(Errno::ENOSYS));
    program.load(DATA_NUMBER);
    for call in profile::SOCKET_MAKER {
        program.when(Test::Equal(number(*call)), ALLOW);
    }
    program.call(libc::SYS_socket, |p| {
        p.load_arg(0);
        p.branch(Test::Equal(libc::AF_INET.cast_unsigned()), 2, 0);
        p.unless(Test::Equal(libc::AF_INET6.cast_unsigned()), refuse(Errno::EAFNOSUPPORT));
        p.load_arg(1);
        p.mask(!(libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK).cast_unsigned());
        p.unless(Test::Equal(libc::SOCK_STREAM.cast_unsigned()), refuse(Errno::EPERM));
        // For a stream socket 0 is TCP; there are others (IPPROTO_MPTCP).
        p.load_arg(2);
        p.when(Test::Equal(0), ALLOW);
        p.unless(Test::Equal(libc::IPPROTO_TCP.cast_unsigned()), refuse(Errno::EPROTONOSUPPORT));
    });
    program.call(libc::SYS_mmap, |p| {
        p.load_arg(2);
        p.when(Test::AnyBit(libc::PROT_EXEC.cast_unsigned()), refuse(Errno::EPERM));
    });
    program.finish(refuse(Errno::EPERM));
    program.0
}

/// Owners and ids that the user namespace does not map.
fn owners(program: &mut Program, spec: &FilterSpec<'_>) {
    // Without a listener the kernel answers EINVAL itself. To seem to succeed would also answer for
    // the filter of a sandbox inside, which records.
    for (call, uid_arg) in profile::CHOWN.iter().filter(|_| spec.listener) {
        program.call(*call, |p| {
            p.load_arg(*uid_arg);
            p.unless_id(spec.uids, NOTIFY);
            p.load_arg(uid_arg + 1);
            p.unless_id(spec.gids, NOTIFY);
        });
    }
    // A single id: programs that drop to a user of their own go on as the only one there is.
    let single = |map: &[IdExtent]| matches!(map, [only] if only.count == 1);
    for (calls, map) in [(profile::SET_UID, spec.uids), (profile::SET_GID, spec.gids)] {
        for (call, args) in calls.iter().filter(|_| single(map)) {
            program.call(*call, |p| {
                for arg in 0..*args {
                    p.load_arg(arg);
                    p.unless_id(map, SUCCEED);
                }
            });
        }
    }
    if spec.fake_setgroups {
        program.when(Test::Equal(number(libc::SYS_setgroups)), SUCCEED);
    }
}

/// mknod(2) of block and character devices, which the kernel refuses outside the initial
/// user namespace.
fn device_nodes(program: &mut Program) {
    for (call, mode_arg) in profile::MKNOD {
        program.call(*call, |p| {
            p.load_arg(*mode_arg);
            p.mask(libc::S_IFMT);
            p.when(Test::Equal(libc::S_IFCHR), NOTIFY);
            p.when(Test::Equal(libc::S_IFBLK), NOTIFY);
        });
    }
}

fn number(call: libc::c_long) -> u32 {
    // System call numbers are small and not negative.
    u32::try_from(call).unwrap_or(u32::MAX)
}

/// A comparison with the loaded value.
#[derive(Debug, Clone, Copy)]
enum Test {
    Equal(u32),
    Above(u32),
    AtLeast(u32),
    AnyBit(u32),
}

/// Builds a program. Conditional jumps, which reach 255 instructions, only go over the one or two
/// instructions that follow; longer ways are `BPF_JA`, which reaches all.
#[derive(Default)]
struct Program(Vec<Instruction>);

impl Program {
    fn load(&mut self, offset: u32) {
        self.push(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset);
    }

    /// Loads the low half of an argument.
    fn load_arg(&mut self, index: u32) {
        let low = if cfg!(target_endian = "little") { 0 } else { 4 };
        self.load(DATA_ARGS + index * 8 + low);
    }

    fn mask(&mut self, bits: u32) {
        self.push(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0, 0, bits);
    }

    fn finish(&mut self, action: u32) {
        self.push(libc::BPF_RET | libc::BPF_K, 0, 0, action);
    }

    fn when(&mut self, test: Test, action: u32) {
        self.branch(test, 0, 1);
        self.finish(action);
    }

    fn unless(&mut self, test: Test, action: u32) {
        self.branch(test, 1, 0);
        self.finish(action);
    }

    /// `action` unless the loaded id is -1 (keep) or in one of the extents.
    fn unless_id(&mut self, extents: &[IdExtent], action: u32) {
        let mut found = Vec::new();
        self.branch(Test::Equal(u32::MAX), 0, 1);
        found.push(self.jump());
        for extent in extents {
            let last = extent.inside.saturating_add(extent.count - 1);
            // Below its start, or above its end: past the jump that says it was found.
            self.branch(Test::AtLeast(extent.inside), 0, 2);
            self.branch(Test::Above(last), 1, 0);
            found.push(self.jump());
        }
        self.finish(action);
        for jump in found {
            self.land(jump);
        }
    }

    /// A jump to a place yet to come.
    fn jump(&mut self) -> usize {
        self.push(libc::BPF_JMP | libc::BPF_JA, 0, 0, 0);
        self.0.len() - 1
    }

    /// Makes a jump lead to the next instruction.
    fn land(&mut self, jump: usize) {
        let distance = u32::try_from(self.0.len() - jump - 1).unwrap_or(u32::MAX);
        if let Some(instruction) = self.0.get_mut(jump) {
            instruction.k = distance;
        }
    }

    /// Instructions for one system call. They end in `ALLOW`; for other calls the number
    /// stays loaded.
    fn call(&mut self, call: libc::c_long, body: impl FnOnce(&mut Self)) {
        self.branch(Test::Equal(number(call)), 1, 0);
        let past = self.jump();
        body(self);
        self.finish(ALLOW);
        self.land(past);
    }

    fn branch(&mut self, test: Test, on_true: u8, on_false: u8) {
        let (code, value) = match test {
            Test::Equal(value) => (libc::BPF_JEQ, value),
            Test::Above(value) => (libc::BPF_JGT, value),
            Test::AtLeast(value) => (libc::BPF_JGE, value),
            Test::AnyBit(bits) => (libc::BPF_JSET, bits),
        };
        self.push(libc::BPF_JMP | code | libc::BPF_K, on_true, on_false, value);
    }

    fn push(&mut self, code: u32, jt: u8, jf: u8, k: u32) {
        // Instruction codes fit into a byte (linux/bpf_common.h).
        let code = u16::try_from(code).unwrap_or_default();
        self.0.push(Instruction { code, jt, jf, k });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program over one call as the kernel does.
    fn evaluate(program: &[Instruction], arch: u32, number: u32, args: [u64; 6]) -> u32 {
        let mut data = [0u8; 64];
        data[0..4].copy_from_slice(&number.to_ne_bytes());
        data[4..8].copy_from_slice(&arch.to_ne_bytes());
        for (i, arg) in args.iter().enumerate() {
            data[16 + i * 8..24 + i * 8].copy_from_slice(&arg.to_ne_bytes());
        }
        let mut accumulator = 0u32;
        let mut at = 0;
        loop {
            let Instruction { code, jt, jf, k } = program[at];
            let jump = |taken: bool| usize::from(if taken { jt } else { jf });
            match u32::from(code) {
                c if c == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS => {
                    let k = k as usize;
                    accumulator = u32::from_ne_bytes(data[k..k + 4].try_into().expect("four bytes"));
                }
                c if c == libc::BPF_ALU | libc::BPF_AND | libc::BPF_K => accumulator &= k,
                c if c == libc::BPF_RET | libc::BPF_K => return k,
                c if c == libc::BPF_JMP | libc::BPF_JA => at += k as usize,
                c if c == libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K => at += jump(accumulator == k),
                c if c == libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K => at += jump(accumulator > k),
                c if c == libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K => at += jump(accumulator >= k),
                c if c == libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K => at += jump(accumulator & k != 0),
                other => panic!("instruction {other:#x}"),
            }
            at += 1;
        }
    }

    const ONE: &[IdExtent] = &[IdExtent { inside: 0, outside: 1000, count: 1 }];
    const RANGE: &[IdExtent] = &[
        IdExtent { inside: 0, outside: 1000, count: 1 },
        IdExtent { inside: 1, outside: 100_000, count: 65_535 },
    ];

    fn filter(profile: SeccompPlan, map: &[IdExtent]) -> Vec<Instruction> {
        let listener = profile == SeccompPlan::Default;
        build(&FilterSpec { profile, uids: map, gids: map, fake_setgroups: map.len() == 1, listener })
    }

    fn verdict(program: &[Instruction], call: libc::c_long, args: &[u64]) -> u32 {
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        evaluate(program, ARCH, number(call), all)
    }

    #[test]
    fn ordinary_calls_are_allowed() {
        let program = filter(SeccompPlan::Default, ONE);
        for call in [libc::SYS_read, libc::SYS_openat, libc::SYS_execve, libc::SYS_futex, libc::SYS_ptrace] {
            assert_eq!(verdict(&program, call, &[]), ALLOW);
        }
    }

    #[test]
    fn other_architectures_and_unknown_numbers_do_not_exist() {
        let program = filter(SeccompPlan::Default, ONE);
        assert_eq!(evaluate(&program, 0x4000_0003, number(libc::SYS_read), [0; 6]), refuse(Errno::ENOSYS));
        assert_eq!(evaluate(&program, ARCH, 0x4000_0000, [0; 6]), refuse(Errno::ENOSYS));
        assert_eq!(evaluate(&program, ARCH, MAX_KNOWN + 1, [0; 6]), refuse(Errno::ENOSYS));
        assert_eq!(evaluate(&program, ARCH, u32::MAX, [0; 6]), refuse(Errno::ENOSYS));
    }

    #[test]
    fn every_listed_call_is_denied_by_default() {
        let program = filter(SeccompPlan::Default, ONE);
        for denied in profile::DENIED {
            assert_eq!(verdict(&program, denied.number, &[]), refuse(denied.errno), "{}", denied.number);
        }
    }

    #[test]
    fn nesting_opens_namespaces_and_mounts_only() {
        let program = filter(SeccompPlan::Nested, ONE);
        for call in [libc::SYS_mount, libc::SYS_setns, libc::SYS_clone3, libc::SYS_pivot_root] {
            assert_eq!(verdict(&program, call, &[]), ALLOW, "{call}");
        }
        assert_eq!(verdict(&program, libc::SYS_unshare, &[0x1000_0000]), ALLOW);
        for call in [libc::SYS_bpf, libc::SYS_io_uring_setup, libc::SYS_keyctl, libc::SYS_kexec_load] {
            assert_ne!(verdict(&program, call, &[]), ALLOW, "{call}");
        }
    }

    #[test]
    fn terminal_input_cannot_be_forged_with_high_bits_set() {
        let program = filter(SeccompPlan::Default, ONE);
        for request in [0x5412u64, 0x5412 | 0xdead_0000_0000_0000, 0x541c] {
            assert_eq!(verdict(&program, libc::SYS_ioctl, &[0, request]), refuse(Errno::EPERM));
        }
        assert_eq!(verdict(&program, libc::SYS_ioctl, &[0, 0x5413]), ALLOW);
    }

    #[test]
    fn sockets_are_of_the_families_that_programs_use() {
        let program = filter(SeccompPlan::Default, ONE);
        for family in [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK, libc::AF_PACKET] {
            let family = u64::from(family.cast_unsigned());
            assert_eq!(verdict(&program, libc::SYS_socket, &[family]), ALLOW);
        }
        for family in
            [libc::AF_VSOCK, libc::AF_ALG, libc::AF_XDP, libc::AF_TIPC, libc::AF_CAN, libc::AF_BLUETOOTH]
        {
            let family = u64::from(family.cast_unsigned());
            assert_eq!(verdict(&program, libc::SYS_socket, &[family]), refuse(Errno::EAFNOSUPPORT));
        }
    }

    #[test]
    fn who_makes_sockets_does_nothing_else() {
        let program = socket_maker();
        let socket_of = |family: libc::c_int, kind: libc::c_int, protocol: libc::c_int| {
            let args = [family, kind, protocol].map(|arg| u64::from(arg.cast_unsigned()));
            verdict(&program, libc::SYS_socket, &args)
        };
        let socket = |family, kind| socket_of(family, kind, 0);
        let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        for family in [libc::AF_INET, libc::AF_INET6] {
            assert_eq!(socket(family, libc::SOCK_STREAM | flags), ALLOW);
            assert_eq!(socket_of(family, libc::SOCK_STREAM | flags, libc::IPPROTO_TCP), ALLOW);
            for protocol in [libc::IPPROTO_MPTCP, libc::IPPROTO_SCTP, libc::IPPROTO_UDP, -1] {
                let verdict = socket_of(family, libc::SOCK_STREAM | flags, protocol);
                assert_eq!(verdict, refuse(Errno::EPROTONOSUPPORT), "{protocol}");
            }
            for kind in [libc::SOCK_DGRAM, libc::SOCK_RAW, libc::SOCK_SEQPACKET] {
                assert_eq!(socket(family, kind | flags), refuse(Errno::EPERM));
            }
        }
        for family in [libc::AF_UNIX, libc::AF_NETLINK, libc::AF_PACKET] {
            assert_eq!(socket(family, libc::SOCK_STREAM), refuse(Errno::EAFNOSUPPORT));
        }
        for call in
            [libc::SYS_recvfrom, libc::SYS_sendmsg, libc::SYS_ppoll, libc::SYS_close, libc::SYS_exit_group]
        {
            assert_eq!(verdict(&program, call, &[]), ALLOW, "{call}");
        }
        let protection = |bits: libc::c_int| [0, 4096, u64::from(bits.cast_unsigned())];
        assert_eq!(verdict(&program, libc::SYS_mmap, &protection(libc::PROT_READ | libc::PROT_WRITE)), ALLOW);
        assert_eq!(verdict(&program, libc::SYS_mmap, &protection(libc::PROT_EXEC)), refuse(Errno::EPERM));
        let refused =
            [libc::SYS_openat, libc::SYS_connect, libc::SYS_bind, libc::SYS_setns, libc::SYS_execve];
        for call in refused.into_iter().chain([libc::SYS_clone, libc::SYS_write, libc::SYS_io_uring_setup]) {
            assert_eq!(verdict(&program, call, &[]), refuse(Errno::EPERM), "{call}");
        }
        assert_eq!(evaluate(&program, 0x4000_0003, number(libc::SYS_close), [0; 6]), refuse(Errno::ENOSYS));
    }

    #[test]
    fn new_namespaces_are_refused_and_threads_are_not() {
        let program = filter(SeccompPlan::Default, ONE);
        let thread = u64::from((libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND).cast_unsigned());
        assert_eq!(verdict(&program, libc::SYS_clone, &[thread]), ALLOW);
        for flag in [libc::CLONE_NEWUSER, libc::CLONE_NEWNS, libc::CLONE_NEWNET, libc::CLONE_NEWPID] {
            let flag = u64::from(flag.cast_unsigned());
            assert_eq!(verdict(&program, libc::SYS_clone, &[flag]), refuse(Errno::EPERM));
            assert_eq!(verdict(&program, libc::SYS_unshare, &[flag]), refuse(Errno::EPERM));
        }
        assert_eq!(verdict(&program, libc::SYS_clone3, &[]), refuse(Errno::ENOSYS));
    }

    #[test]
    fn unmapped_owners_are_handed_over_and_mapped_ones_are_not() {
        let keep = u64::from(u32::MAX);
        for (map, inside, outside) in [(ONE, 0, 33), (RANGE, 65_535, 65_536)] {
            let program = filter(SeccompPlan::Default, map);
            for (call, first) in profile::CHOWN {
                let with = |uid: u64, gid: u64| {
                    let mut args = [0; 6];
                    args[*first as usize] = uid;
                    args[*first as usize + 1] = gid;
                    verdict(&program, *call, &args)
                };
                assert_eq!(with(inside, keep), ALLOW);
                assert_eq!(with(keep, inside), ALLOW);
                assert_eq!(with(outside, keep), NOTIFY);
                assert_eq!(with(inside, outside), NOTIFY);
                assert_eq!(with(u64::from(u32::MAX - 1), keep), NOTIFY);
            }
        }
    }

    #[test]
    fn many_extents_are_all_compared() {
        for count in [1, 62, 63, 128] {
            let map: Vec<IdExtent> =
                (0..count).map(|i| IdExtent { inside: i * 10, outside: 5000 + i * 10, count: 2 }).collect();
            let program = filter(SeccompPlan::Default, &map);
            assert!(program.len() <= 4096, "{count} extents make {} instructions", program.len());
            for i in 0..count {
                let id = u64::from(i * 10);
                assert_eq!(verdict(&program, libc::SYS_fchown, &[0, id, id + 1]), ALLOW, "{count} {i}");
                assert_eq!(verdict(&program, libc::SYS_fchown, &[0, id + 2, id]), NOTIFY, "{count} {i}");
                assert_eq!(verdict(&program, libc::SYS_fchown, &[0, id, id + 9]), NOTIFY, "{count} {i}");
            }
            assert_eq!(verdict(&program, libc::SYS_read, &[]), ALLOW);
            assert_eq!(verdict(&program, libc::SYS_bpf, &[]), refuse(Errno::EPERM));
        }
    }

    #[test]
    fn dropping_to_another_user_seems_to_work_with_a_single_id() {
        let program = filter(SeccompPlan::Default, ONE);
        assert_eq!(verdict(&program, libc::SYS_setuid, &[33]), SUCCEED);
        assert_eq!(verdict(&program, libc::SYS_setresgid, &[33, 33, 33]), SUCCEED);
        assert_eq!(verdict(&program, libc::SYS_setgroups, &[1, 0]), SUCCEED);
        assert_eq!(verdict(&program, libc::SYS_setuid, &[0]), ALLOW);
        let program = filter(SeccompPlan::Default, RANGE);
        assert_eq!(verdict(&program, libc::SYS_setuid, &[33]), ALLOW);
        assert_eq!(verdict(&program, libc::SYS_setgroups, &[1, 0]), ALLOW);
    }

    #[test]
    fn device_nodes_are_handed_over_and_fifos_are_not() {
        let program = filter(SeccompPlan::Default, ONE);
        let mode = |kind: u32| u64::from(kind | 0o644);
        assert_eq!(verdict(&program, libc::SYS_mknodat, &[0, 0, mode(libc::S_IFCHR)]), NOTIFY);
        assert_eq!(verdict(&program, libc::SYS_mknodat, &[0, 0, mode(libc::S_IFBLK)]), NOTIFY);
        assert_eq!(verdict(&program, libc::SYS_mknodat, &[0, 0, mode(libc::S_IFIFO)]), ALLOW);
    }
}
