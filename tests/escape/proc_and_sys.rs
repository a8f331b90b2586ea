//! /proc and /sys: what tells of or changes the host is masked, read-only or absent.

use std::os::fd::AsRawFd as _;

use crate::common::Home;

const NONE: [&str; 0] = [];

#[test]
fn what_tells_of_the_kernel_is_masked() {
    let home = Home::new();
    let script = "
for f in /proc/kcore /proc/keys /proc/timer_list /proc/sched_debug /proc/latency_stats /proc/interrupts \
    /proc/kpagecount /proc/kpageflags /proc/kpagecgroup /proc/vmallocinfo /proc/pagetypeinfo /proc/slabinfo; do
    test -e $f || continue
    n=$(head -c 100 $f 2>/dev/null | wc -c); test $n = 0 || echo $f shows $n
done
for d in /proc/acpi /proc/scsi /proc/asound /sys/firmware /sys/devices/virtual/powercap; do
    test -e $d || continue
    n=$(ls -A $d 2>/dev/null | wc -l); test $n = 0 || echo $d shows $n
done
head -c 1 /proc/kmsg 2>/dev/null && echo kmsg shows
true
";
    home.sh(NONE, script).run().ok().prints("");
    // Outside at least one of them shows something, else this proves nothing.
    let outside = home.command("sh").args(["-c", script]).run();
    assert!(outside.text().contains("shows"), "{outside}");
}

#[test]
fn masks_cannot_be_taken_away() {
    let home = Home::new();
    let script = "mkdir m; umount /proc/kcore; umount -l /proc; mount -t proc proc m; mount -o remount,rw /proc/sys; mount --bind /proc m; ls -A m; true";
    let out = home.sh(NONE, script).run().ok();
    assert_eq!(out.text(), "", "{out}");
    home.sh(NONE, "umount /proc/kcore 2>/dev/null; head -c 10 /proc/kcore | wc -c").run().ok().prints("0");
}

/// Everything in /proc and /sys that could be opened for writing as (fake) root, and would act
/// beyond the sandbox. Opening is what counts; nothing is written.
const WRITABLE: &str = r#"
import os, stat, sys
hits = []
own = {str(os.getpid()), 'self', 'thread-self', '1'}
for top in ('/proc', '/sys'):
    for directory, names, files in os.walk(top):
        if directory == '/proc':
            names[:] = [n for n in names if not n.isdigit() and n not in own]
        for name in files:
            path = os.path.join(directory, name)
            try:
                mode = os.lstat(path).st_mode
                # Root opens what has no write permission too, but there is nothing behind it.
                if not stat.S_ISREG(mode) or not mode & 0o222: continue
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                hits.append(path)
            except OSError:
                pass
print(len(hits), *hits)
"#;

#[test]
fn nothing_of_proc_and_sys_can_be_written() {
    let home = Home::new();
    let text = home.python(NONE, WRITABLE).run().ok().text();
    let hits: Vec<&str> = text.split(' ').skip(1).filter(|path| !path.starts_with("/proc/net")).collect();
    assert!(hits.is_empty(), "{text}");
    // The search finds something where nothing is masked: in a user namespace of one's own.
    let outside = home.command("unshare").args(["-Ur", "python3", "-c", WRITABLE]).run();
    let count: u32 = outside.text().split(' ').next().unwrap().parse().unwrap_or(0);
    assert!(count > 0, "{outside}");
}

#[test]
fn the_ways_to_the_kernels_helpers_are_closed() {
    let home = Home::new();
    let script = "
for f in /proc/sys/kernel/core_pattern /proc/sys/kernel/modprobe /proc/sys/kernel/hotplug /proc/sysrq-trigger \
    /sys/kernel/uevent_helper /proc/sys/fs/binfmt_misc/register /sys/fs/cgroup/release_agent /sys/fs/cgroup/*/release_agent \
    /proc/sys/vm/drop_caches /proc/sys/kernel/panic /proc/sys/kernel/randomize_va_space /proc/sys/vm/overcommit_memory; do
    { echo 1 > $f; } 2>/dev/null && echo wrote $f
done
true
";
    home.sh(NONE, script).run().ok().prints("");
    home.sh(["--network=host"], script).run().ok().prints("");
}

/// CVE-2022-0492: a cgroup hierarchy mounted in namespaces of one's own, and its release_agent, which the
/// kernel would run as root of the machine.
const RELEASE_AGENT: &str = r#"
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print('unshare', libc.unshare(0x10000000 | 0x20000 | 0x2000000))
os.makedirs('hierarchy', exist_ok=True)
for kind, options in ((b'cgroup', b'rdma'), (b'cgroup', b'memory'), (b'cgroup', b'none,name=rootlet'), (b'cgroup2', None)):
    if libc.mount(b'none', b'hierarchy', kind, 0, options) == 0: print('mounted', kind.decode())
for top in ('hierarchy', '/sys/fs/cgroup'):
    for directory, _, files in os.walk(top):
        for name in files:
            if name in ('release_agent', 'notify_on_release', 'cgroup.procs', 'tasks', 'cgroup.kill'):
                try:
                    os.close(os.open(os.path.join(directory, name), os.O_WRONLY)); print('opened', name)
                except OSError: pass
"#;

#[test]
fn no_cgroup_hierarchy_can_be_mounted_or_written() {
    let home = Home::new();
    home.dir("work/hierarchy");
    for options in [&[][..], &["--network=host"], &["--network=none"], &["--user=1000:1000"]] {
        home.python(options, RELEASE_AGENT).run().ok().prints("unshare -1");
    }
    // Outside the way is open as far as an ordinary user may go.
    let outside = home.command("unshare").args(["-Ur", "python3", "-c", RELEASE_AGENT]).run().ok();
    assert!(outside.text().contains("unshare 0") && outside.text().contains("mounted cgroup2"), "{outside}");
}

#[test]
fn sysctls_of_the_machine_cannot_be_changed_even_when_nested() {
    let home = Home::new();
    let before = std::fs::read("/proc/sys/vm/overcommit_memory").unwrap();
    let script = "{ echo 1 > /proc/sys/vm/overcommit_memory; } 2>/dev/null && echo wrote; { echo x > /proc/sys/kernel/core_pattern; } 2>/dev/null && echo wrote; true";
    // Nothing is covered there: what refuses is that uid 0 inside is another one outside, whoever calls.
    home.sh(["--nested"], script).run().ok().prints("");
    let errno =
        "for f in vm/overcommit_memory kernel/core_pattern; do echo 1 > /proc/sys/$f; done 2>&1; true";
    let nested = home.sh(["--nested"], errno).run().ok().text();
    assert_eq!(nested.matches("Permission denied").count(), 2, "{nested}");
    if crate::common::is_root() {
        let maps = ["--nested", "--uidmap=0:0:1", "--gidmap=0:1:1"];
        let refused = home.sh(maps, "true").run().exits(125);
        assert!(refused.errors().contains("uidmap: cannot map 0:0:1 with --nested"), "{refused}");
    }
    home.sh(NONE, script).run().ok().prints("");
    assert_eq!(std::fs::read("/proc/sys/vm/overcommit_memory").unwrap(), before);
}

#[test]
fn the_cgroup_tree_of_the_host_is_not_there() {
    let home = Home::new();
    let out = home.sh(NONE, "ls -A /sys/fs/cgroup 2>/dev/null | head -3; mkdir /sys/fs/cgroup/x 2>/dev/null && echo made; true").run().ok();
    assert!(!out.text().contains("made"), "{out}");
    // There /sys is the host's own.
    let script = "for d in fs/cgroup fs/bpf kernel/debug kernel/security kernel/tracing; do ls -A /sys/$d 2>/dev/null; done; true";
    home.sh(["--network=host"], script).run().ok().prints("");
}

#[test]
fn sockets_of_the_host_are_not_there_or_lead_nowhere() {
    let home = Home::new();
    home.sh(NONE, "ls -A /run; ls -A /var/run/").run().ok().prints("");
    // The name of a socket elsewhere shows through the overlay, but nobody listens behind it.
    // By way of a descriptor: the path itself may be longer than a socket's name can be.
    let work = std::fs::File::open(home.path("work")).unwrap();
    let path = format!("/proc/self/fd/{}/socket", work.as_raw_fd());
    let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
    let connect = "
import errno, socket
try:
    socket.socket(socket.AF_UNIX).connect('socket'); print('connected')
except OSError as e:
    print(errno.errorcode[e.errno])
";
    home.command("python3").args(["-c", connect]).run().ok().prints("connected");
    for options in [&[][..], &["--network=host"]] {
        home.python(options, connect).run().ok().prints("ECONNREFUSED");
    }
    drop(listener);
}
