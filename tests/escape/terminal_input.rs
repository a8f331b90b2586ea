//! CVE-2017-5226, CVE-2019-10063: the payload must not type into the caller's terminal.

use crate::common::{Home, rootlet_binary, skip};

/// Types into each terminal it has, also with high bits in the request that a filter may overlook.
const TYPE: &str = r#"
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
def syscall_ioctl(fd, request, argument):
    return libc.syscall(ctypes.c_long(16), ctypes.c_long(fd), ctypes.c_ulong(request), ctypes.c_void_p(argument))
fds = [0, 1, 2]
try: fds.append(os.open('/dev/tty', os.O_RDWR))
except OSError: pass
hits = 0
for fd in fds:
    for high in (0, 1 << 32, 0xdead0000 << 32, 1 << 63):
        for request in (0x5412, 0x541c):
            for char in b'canary\n':
                buffer = ctypes.create_string_buffer(bytes([char if request == 0x5412 else 2]))
                if syscall_ioctl(fd, request | high, ctypes.addressof(buffer)) == 0 and request == 0x5412: hits += 1
print('attack-done', 'hits', 'some' if hits else 'none', flush=True)
"#;

/// Runs a program on a pseudo terminal and returns what it wrote and what can be read from the
/// terminal afterwards, which is what the caller's shell would read.
const ON_TERMINAL: &str = r#"
import fcntl, os, pty, select, sys, termios, tty
master, slave = pty.openpty()
mode = termios.tcgetattr(slave); mode[3] &= ~termios.ECHO; termios.tcsetattr(slave, termios.TCSANOW, mode)
child = os.fork()
if child == 0:
    os.setsid(); fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for fd in (0, 1, 2): os.dup2(slave, fd)
    os.execvp(sys.argv[1], sys.argv[1:])
pidfd, out = os.pidfd_open(child), b''
while not select.select([pidfd], [], [], 0)[0]:
    if master in select.select([pidfd, master], [], [], 50)[0]: out += os.read(master, 65536)
while select.select([master], [], [], 0)[0]: out += os.read(master, 65536)
os.waitpid(child, 0)
typed = b''
while select.select([slave], [], [], 0)[0]: typed += os.read(slave, 65536)
print(out.decode().replace('\r', ''), 'typed:', typed)
"#;

#[test]
fn the_payload_cannot_type_into_the_callers_terminal() {
    let home = Home::new();
    let rootlet = rootlet_binary();
    for options in
        [&[][..], &["-i"], &["-t"], &["-it"], &["--nested"], &["-it", "--nested"], &["--network=host", "-i"]]
    {
        let out = home
            .command("python3")
            .args(["-c", ON_TERMINAL])
            .arg(&rootlet)
            .args(["run", "--rm"])
            .args(options)
            .args(["--", "python3", "-c", TYPE])
            .run()
            .ok();
        assert!(out.text().contains("attack-done"), "{options:?}: the attack did not run\n{out}");
        assert!(out.text().contains("typed: b''"), "{options:?}: typed into the caller's terminal\n{out}");
        assert!(out.text().contains("hits none"), "{options:?}\n{out}");
    }
}

/// Says which standard streams are terminals, and so readable whatever they were opened for.
const HOLDS: &str = "import os; print('holds', [fd for fd in (0, 1, 2) if os.isatty(fd)])";

#[test]
fn the_payload_does_not_hold_the_callers_terminal() {
    let home = Home::new();
    let rootlet = rootlet_binary();
    for options in [&[][..], &["-i"]] {
        let out = home
            .command("python3")
            .args(["-c", ON_TERMINAL])
            .arg(&rootlet)
            .args(["run", "--rm"])
            .args(options)
            .args(["--", "python3", "-c", HOLDS])
            .run()
            .ok();
        assert!(out.text().contains("holds []"), "{options:?}\n{out}");
    }
    let outside = home.command("python3").args(["-c", ON_TERMINAL, "python3", "-c", HOLDS]).run().ok();
    assert!(outside.text().contains("holds [0, 1, 2]"), "{outside}");
}

#[test]
fn the_attack_hits_outside() {
    let home = Home::new();
    let out = home.command("python3").args(["-c", ON_TERMINAL, "python3", "-c", TYPE]).run().ok();
    if out.text().contains("hits none") {
        skip!("this kernel has no TIOCSTI for ordinary users (dev.tty.legacy_tiocsti)");
    }
    assert!(out.text().contains("canary"), "{out}");
}

#[test]
fn the_callers_terminal_is_not_the_payloads_controlling_terminal() {
    let home = Home::new();
    let script = "import os\ntry:\n    os.open('/dev/tty', os.O_RDWR); print('opened')\nexcept OSError as e: print('errno', e.errno)\nprint('session', os.getsid(0) == os.getpid() or os.getsid(0) != 0)";
    let out = home
        .command("python3")
        .args(["-c", ON_TERMINAL])
        .arg(rootlet_binary())
        .args(["run", "--rm", "-i", "--", "python3", "-c", script])
        .run()
        .ok();
    assert!(out.text().contains("errno 6"), "{out}");
}
