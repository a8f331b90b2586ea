//! Attacks on pid 1 and on what is outside by its number.

use crate::common::Home;

const NONE: [&str; 0] = [];

#[test]
fn pid_1_cannot_be_traced_read_or_killed() {
    let home = Home::new();
    let script = r#"
import ctypes, errno, os, signal, stat
libc = ctypes.CDLL(None, use_errno=True)
def outcome(f):
    try:
        return f() or 'hit'
    except OSError as e:
        return errno.errorcode[e.errno]
def checked(result):
    if result < 0: raise OSError(ctypes.get_errno(), '')
def attack(pid):
    buffer = ctypes.create_string_buffer(16)
    class Vec(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('len', ctypes.c_size_t)]
    local, remote = Vec(ctypes.addressof(buffer), 16), Vec(0x400000, 16)
    yield 'attach', lambda: checked(libc.ptrace(16, pid, None, None))
    yield 'seize', lambda: checked(libc.ptrace(0x4206, pid, None, None))
    yield 'readv', lambda: checked(libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0))
    yield 'writev', lambda: checked(libc.process_vm_writev(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0))
    yield 'mem', lambda: (os.open(f'/proc/{pid}/mem', os.O_RDWR), None)[1]
    yield 'environ', lambda: (open(f'/proc/{pid}/environ').read(), None)[1]
    yield 'maps', lambda: (open(f'/proc/{pid}/maps').read(), None)[1]
    yield 'fds', lambda: [os.open(f'/proc/{pid}/fd/{n}', os.O_RDONLY) for n in range(3)] and None
    yield 'root', lambda: (os.listdir(f'/proc/{pid}/root/'), None)[1]
    yield 'cwd', lambda: (os.listdir(f'/proc/{pid}/cwd/'), None)[1]
    yield 'getfd', lambda: checked(libc.syscall(438, os.pidfd_open(pid), 3, 0))
    yield 'setns', lambda: checked(libc.setns(os.pidfd_open(pid), 0x20000))
victim = os.fork()
if victim == 0:
    signal.pause()
print('own', *(outcome(f) for name, f in attack(victim) if name in ('readv', 'environ', 'fds', 'mem')))
os.kill(victim, 9)
print('init', *(f'{name}={outcome(f)}' for name, f in attack(1)))
for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGSEGV, signal.SIGHUP, signal.SIGINT):
    os.kill(1, number)
# Init's other threads have numbers that are not listed.
for thread in range(2, 20):
    if thread != os.getpid() and libc.syscall(234, 1, thread, 0) == 0:
        for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV):
            libc.syscall(234, 1, thread, number)
            libc.syscall(200, thread, number)
            os.kill(thread, number)
# A device node, and an owner that few maps have: only init's notifier can answer, so it lives, too.
os.mknod('node', stat.S_IFCHR | 0o600, os.makedev(1, 3))
os.chown('node', 4000000000, 4000000000)
print('still here', stat.S_ISCHR(os.stat('node').st_mode))
"#;
    for options in [&[][..], &["--network=host"]] {
        let text = home.python(options, script).run().ok().text();
        let lines: Vec<&str> = text.lines().collect();
        // The same attacks hit a process of the payload's own.
        assert!(lines[0].starts_with("own ") && lines[0].contains("hit"), "{text}");
        for outcome in lines[1].split(' ').skip(1) {
            assert!(!outcome.ends_with("=hit"), "{text}");
        }
        assert_eq!(lines[2], "still here True", "{text}");
    }
}

#[test]
fn the_supervisor_and_the_hosts_processes_are_invisible() {
    let home = Home::new();
    let own = std::process::id();
    let script = format!(
        "
import os
seen = [p for p in os.listdir('/proc') if p.isdigit()]
hits = []
for pid in list(range(2, 3000)) + [{own}, {own} + 1]:
    if str(pid) not in seen:
        try:
            os.kill(pid, 0); hits.append(pid)
        except ProcessLookupError:
            pass
        if os.path.exists(f'/proc/{{pid}}'): hits.append(pid)
# A thread of init has a number too, which is not listed.
def group(pid):
    return next(line.split()[1] for line in open(f'/proc/{{pid}}/status') if line.startswith('Tgid'))
print([pid for pid in hits if group(pid) != '1'], os.getppid())
"
    );
    home.python(NONE, &script).run().ok().prints("[] 1");
    // Outside it is there.
    let alive = nix::sys::signal::kill(nix::unistd::Pid::from_raw(own.cast_signed()), None);
    assert!(alive.is_ok());
}

#[test]
fn a_payload_that_kills_everything_ends_only_itself() {
    let home = Home::new();
    let out = home.sh(NONE, "kill -9 -1; exit 3").run();
    assert!([3, 137].contains(&out.code()), "{out}");
}

#[test]
fn a_payload_that_ignores_everything_double_forks_and_stops_itself_is_gone_in_the_end() {
    let home = Home::new();
    let script = r#"
import os, signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
for _ in range(20):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            while True: signal.pause()
        os._exit(0)
print('started', flush=True)
"#;
    home.python(NONE, script).run().ok().prints("started");
}

#[test]
fn a_payload_that_runs_away_by_forking_is_gone_in_the_end() {
    let home = Home::new();
    // A hundred chains: each process ends as soon as it has a successor, so whoever looks finds it gone.
    let script = r#"
import os, signal
if os.fork() == 0:
    for _ in range(100):
        if os.fork() == 0:
            while True:
                try:
                    if os.fork(): os._exit(0)
                    os.setsid()
                except OSError: pass
    os._exit(0)
print('running', flush=True)
os.read(0, 1)
os._exit(5)
"#;
    let running = home.python(["-i"], script).stdin_open().start();
    running.until_out("running");
    running.finish().exits(5);
    // The same where nobody is left to end it but the kernel.
    let killed = home.python(["-i"], script).stdin_open().start();
    killed.until_out("running");
    killed.signal(nix::sys::signal::Signal::SIGKILL);
    killed.finish().exits(137);
    home.rootlet(["prune"]).run().ok();
}

#[test]
fn a_stopped_payload_is_ended_by_its_timeout() {
    let home = Home::new();
    home.sh(["--timeout=500ms"], "kill -STOP $$").run().exits(124);
}
