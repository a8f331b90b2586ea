//! System calls that the default filter refuses, also by other doors.

use crate::common::{Home, skip};

const NONE: [&str; 0] = [];

/// Calls each of these with arguments that would work or fail harmlessly, and prints the outcome.
const CALLS: &str = r#"
import ctypes, errno, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments))
    return errno.errorcode[ctypes.get_errno()] if result < 0 else 'ok'
zero = ctypes.create_string_buffer(256)
# A directory of its own: what others mounted below a shared one would decide the outcome.
os.makedirs('attacked', exist_ok=True)
path = ctypes.create_string_buffer(os.path.abspath('attacked').encode())
NEW = dict(newns=0x20000, newcgroup=0x2000000, newuts=0x4000000, newipc=0x8000000, newuser=0x10000000, newpid=0x20000000, newnet=0x40000000)
print('io_uring_setup', call(425, 1, zero))
print('io_uring_enter', call(426, 99, 0, 0, 0, 0))
print('io_uring_register', call(427, 99, 0, 0, 0))
print('bpf', call(321, 0, zero, 128))
print('userfaultfd', call(323, 1))
print('perf_event_open', call(298, zero, 0, 2**64 - 1, 2**64 - 1, 0))
print('fanotify_init', call(300, 0, 0))
print('keyctl', call(250, 0, 2**64 - 3, 0))
print('add_key', call(248, path, path, zero, 1, 2**64 - 3))
print('request_key', call(249, path, path, zero, 0))
print('open_by_handle_at', call(304, 2**64 - 100, zero, 0))
print('kexec_load', call(246, 0, 0, zero, 0))
print('kexec_file_load', call(320, 99, 99, 0, zero, 0))
print('init_module', call(175, zero, 0, zero))
print('finit_module', call(313, 99, zero, 0))
print('delete_module', call(176, zero, 0))
print('reboot', call(169, 0, 0, 0, 0))
print('swapon', call(167, zero, 0))
print('syslog', call(103, 10, 0, 0))
print('acct', call(163, path))
print('quotactl', call(179, 0, 0, 0, 0))
print('settimeofday', call(164, 0, 0))
print('clock_settime', call(227, 0, zero))
print('iopl', call(172, 3))
print('ioperm', call(173, 0, 1, 1))
print('mount', call(165, path, path, zero, 4096, 0))
print('umount2', call(166, path, 0))
print('pivot_root', call(155, path, path))
print('open_tree', call(428, 2**64 - 100, path, 1))
print('move_mount', call(429, 99, zero, 99, zero, 0))
print('fsopen', call(430, path, 0))
print('fspick', call(433, 2**64 - 100, path, 0))
print('mount_setattr', call(442, 2**64 - 100, path, 0, zero, 32))
print('setns', call(308, 99, 0))
def in_a_child(label, attempt):
    """What was unshared must not act on the next attempt."""
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        print(label, attempt(), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
def cloned(pid):
    if pid == 0: os._exit(0)
    if pid < 0: return errno.errorcode[ctypes.get_errno()]
    os.waitpid(pid, 0)
    return 'ok'
for name, flag in NEW.items():
    in_a_child('unshare ' + name, lambda: call(272, flag))
    in_a_child('unshare+high ' + name, lambda: call(272, flag | 1 << 40))
    in_a_child('clone ' + name, lambda: cloned(libc.syscall(ctypes.c_long(56), ctypes.c_ulong(flag | 17), 0, 0, 0, 0)))
arguments = ctypes.create_string_buffer(struct.pack('=11Q', 0x10000000, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0))
in_a_child('clone3', lambda: cloned(libc.syscall(ctypes.c_long(435), arguments, ctypes.c_ulong(88))))
print('unknown', call(600))
print('vsock', errno.errorcode.get(ctypes.get_errno()) if libc.socket(40, 1, 0) < 0 else 'ok')
print('alg', errno.errorcode.get(ctypes.get_errno()) if libc.socket(38, 5, 0) < 0 else 'ok')
"#;

fn outcomes(text: &str) -> Vec<(String, String)> {
    text.lines()
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(a, b)| (a.to_owned(), b.to_owned()))
        .collect()
}

#[test]
fn dangerous_calls_are_refused_by_the_filter() {
    let home = Home::new();
    let inside = outcomes(&home.python(NONE, CALLS).run().ok().text());
    assert!(inside.len() > 50);
    for (call, outcome) in &inside {
        assert!(["EPERM", "ENOSYS", "EAFNOSUPPORT"].contains(&outcome.as_str()), "{call}: {outcome}");
    }
}

#[test]
fn the_same_calls_get_further_outside() {
    let home = Home::new();
    // As root of a user namespace, which is what the payload would be without a filter.
    let out = home.command("unshare").args(["-Urm", "python3", "-c", CALLS]).run().ok();
    let outside = outcomes(&out.text());
    let get = |name: &str| outside.iter().find(|(call, _)| call == name).unwrap().1.as_str();
    for call in ["mount", "umount2", "clone3", "keyctl", "open_tree"] {
        assert_eq!(get(call), "ok", "{call}\n{out}");
    }
    for namespace in ["newns", "newuts", "newipc", "newuser", "newpid", "newnet", "newcgroup"] {
        for door in ["unshare", "clone"] {
            assert_eq!(get(&format!("{door} {namespace}")), "ok", "{door} {namespace}\n{out}");
        }
    }
    // What fails there fails by its arguments, which a filter does not look at. (What the kernel keeps from
    // ordinary users by itself, or this one may lack or forbid by a sysctl, is not among them.)
    for (call, outcome) in [
        ("move_mount", "EBADF"),
        ("setns", "EBADF"),
        ("pivot_root", "EINVAL"),
        ("fspick", "EINVAL"),
        ("mount_setattr", "EINVAL"),
        ("fsopen", "ENODEV"),
        ("unshare+high newuser", "EINVAL"),
    ] {
        assert_eq!(get(call), outcome, "{call}\n{out}");
    }
    for call in ["io_uring_enter", "io_uring_register", "add_key", "request_key"] {
        assert_ne!(get(call), "EPERM", "{call}\n{out}");
    }
    assert_eq!(get("unknown"), "ENOSYS");
}

#[test]
fn nested_opens_only_what_another_sandbox_needs() {
    let home = Home::new();
    let nested = outcomes(&home.python(["--nested"], CALLS).run().ok().text());
    let get = |name: &str| nested.iter().find(|(call, _)| call == name).unwrap().1.as_str();
    for call in ["mount", "unshare newuser", "clone newuser", "clone3"] {
        assert_eq!(get(call), "ok", "{call}");
    }
    for call in [
        "bpf",
        "keyctl",
        "kexec_load",
        "io_uring_setup",
        "userfaultfd",
        "open_by_handle_at",
        "init_module",
        "perf_event_open",
    ] {
        assert!(["EPERM", "ENOSYS"].contains(&get(call)), "{call}: {}", get(call));
    }
}

/// Calls of the 32-bit and x32 doors, by machine code, since no library has them.
const OTHER_DOORS: &str = r#"
import ctypes, mmap, sys
def run(code):
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(code)
    return ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))() & 0xffffffff
def int80(number, argument=0):
    # push rbx; mov eax, number; mov ebx, argument; int 0x80; pop rbx; ret
    return run(b'\x53\xb8' + number.to_bytes(4, 'little') + b'\xbb' + argument.to_bytes(4, 'little') + b'\xcd\x80\x5b\xc3')
def x32(number, argument=0):
    # mov eax, number | 1 << 30; mov edi, argument; syscall; ret
    return run(b'\xb8' + (number | 1 << 30).to_bytes(4, 'little') + b'\xbf' + argument.to_bytes(4, 'little') + b'\x0f\x05\xc3')
name = lambda r: 'ENOSYS' if r == 0xffffffda else 'EPERM' if r == 0xffffffff else 'ok'
print('getpid int80', name(int80(20)))
print('unshare int80', name(int80(310, 0x10000000)))
print('getpid x32', name(x32(39)))
print('unshare x32', name(x32(272, 0x10000000)))
"#;

#[test]
fn calls_of_other_architectures_do_not_pass_round_the_filter() {
    if !cfg!(target_arch = "x86_64") {
        skip!("only x86-64 has other doors");
    }
    let home = Home::new();
    for options in [&[][..], &["--nested"]] {
        home.python(options, OTHER_DOORS)
            .run()
            .ok()
            .prints("getpid int80 ENOSYS\nunshare int80 ENOSYS\ngetpid x32 ENOSYS\nunshare x32 ENOSYS");
    }
}

#[test]
fn the_32_bit_door_is_open_outside() {
    let home = Home::new();
    let out = home.command("python3").args(["-c", OTHER_DOORS]).run();
    if out.code() != 0 || out.text().contains("getpid int80 ENOSYS") {
        skip!("this kernel has no 32-bit calls");
    }
    assert!(out.text().contains("unshare int80 ok"), "{out}");
}

#[test]
fn keys_of_the_caller_are_out_of_reach() {
    let home = Home::new();
    // The caller's session keyring holds a secret; the payload searches it by every way.
    let script = r#"
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
found = []
for keyring in (-3, -4, -5, -1, -2):
    key = libc.syscall(ctypes.c_long(250), ctypes.c_long(10), ctypes.c_long(keyring), b'user', b'rootlet-canary', ctypes.c_long(0))
    if key > 0: found.append(key)
joined = libc.syscall(ctypes.c_long(250), ctypes.c_long(1), None)
print('found' if found else 'nothing', open('/proc/keys').read().count('rootlet-canary'))
"#;
    let plant = format!(
        "
import ctypes, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall(ctypes.c_long(250), ctypes.c_long(1), None)
key = libc.syscall(ctypes.c_long(248), b'user', b'rootlet-canary', b'secret', ctypes.c_ulong(6), ctypes.c_long(-3))
assert key > 0, ctypes.get_errno()
attack = {script:?}
print(subprocess.run(['python3', '-c', attack], capture_output=True, text=True).stdout.strip())
print(subprocess.run([sys.argv[1], 'run', '--rm', '--', 'python3', '-c', attack], capture_output=True, text=True).stdout.strip())
"
    );
    let out = home.command("python3").args(["-c", &plant]).arg(crate::common::rootlet_binary()).run().ok();
    let text = out.text();
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("found"), "the attack does not hit outside\n{out}");
    assert_eq!(lines[1], "nothing 0", "{out}");
}

#[test]
fn a_filter_of_the_payloads_own_cannot_answer_for_ours() {
    let home = Home::new();
    // A later filter can only take away: an ALLOW on top does not open mount(2).
    let script = r#"
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
code = ctypes.create_string_buffer(struct.pack('HBBI', 0x06, 0, 0, 0x7fff0000))
program = ctypes.create_string_buffer(struct.pack('HxxxxxxQ', 1, ctypes.addressof(code)))
assert libc.prctl(22, 2, program) == 0
print(libc.mount(b'none', b'/mnt', b'tmpfs', 0, None), ctypes.get_errno())
"#;
    home.python(NONE, script).run().ok().prints("-1 1");
}
