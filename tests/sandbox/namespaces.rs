//! What of the machine the command sees: its own namespaces, /proc, /sys, /dev, ids.

use std::collections::BTreeSet;
use std::fs::read_link;

use crate::common::{Home, gid, has_id_range, has_subids, is_root, need, skip, uid};

const NONE: [&str; 0] = [];

/// The namespaces seen inside, by kind.
fn inside(home: &Home, options: &[&str], kind: &str) -> String {
    home.run(options, ["readlink", &format!("/proc/self/ns/{kind}")]).run().ok().text()
}

fn outside(kind: &str) -> String {
    read_link(format!("/proc/self/ns/{kind}")).unwrap().into_os_string().into_string().unwrap()
}

macro_rules! own_namespace {
    ($($test:ident: $kind:literal;)*) => {$(
        #[test]
        fn $test() {
            let home = Home::new();
            assert_ne!(inside(&home, &[], $kind), outside($kind));
        }
    )*};
}

own_namespace! {
    the_user_namespace_is_its_own: "user";
    the_pid_namespace_is_its_own: "pid";
    the_mount_namespace_is_its_own: "mnt";
    the_uts_namespace_is_its_own: "uts";
    the_ipc_namespace_is_its_own: "ipc";
    the_net_namespace_is_its_own: "net";
    the_cgroup_namespace_is_its_own: "cgroup";
}

#[test]
fn every_other_namespace_belongs_to_the_sandboxs_user_namespace() {
    need!("python3");
    let home = Home::new();
    // NS_GET_USERNS, ioctl_ns(2). It answers with a descriptor of the owner, which is ours.
    let script = "
import fcntl, os
own = os.stat('/proc/self/ns/user').st_ino
for kind in ('pid', 'mnt', 'uts', 'ipc', 'net', 'cgroup'):
    fd = os.open('/proc/self/ns/' + kind, os.O_RDONLY)
    owner = fcntl.ioctl(fd, 0xb701)
    print(kind, os.fstat(owner).st_ino == own)
";
    home.python(NONE, script)
        .run()
        .ok()
        .prints("pid True\nmnt True\nuts True\nipc True\nnet True\ncgroup True");
}

#[test]
fn the_host_network_is_shared_only_on_request() {
    let home = Home::new();
    assert_eq!(inside(&home, &["--network=host"], "net"), outside("net"));
    assert_ne!(inside(&home, &["--network=none"], "net"), outside("net"));
}

#[test]
fn the_time_namespace_is_made_on_request_with_its_offsets() {
    need!("python3");
    let home = Home::new();
    assert_eq!(inside(&home, &[], "time"), outside("time"));
    assert_ne!(inside(&home, &["--monotonic=100000"], "time"), outside("time"));
    let clocks = "import time; print(time.clock_gettime(time.CLOCK_MONOTONIC), time.clock_gettime(time.CLOCK_BOOTTIME))";
    let read = |options: &[&str]| -> Vec<f64> {
        let text = home.python(options, clocks).run().ok().text();
        text.split(' ').map(|number| number.parse().unwrap()).collect()
    };
    let before = read(&[]);
    let shifted = read(&["--monotonic=100000", "--boottime=500000"]);
    let after = read(&[]);
    assert!(
        shifted[0] - 100_000.0 >= before[0] && shifted[0] - 100_000.0 <= after[0],
        "{before:?} {shifted:?} {after:?}"
    );
    assert!(
        shifted[1] - 500_000.0 >= before[1] && shifted[1] - 500_000.0 <= after[1],
        "{before:?} {shifted:?} {after:?}"
    );
}

#[test]
fn a_clock_that_would_be_negative_is_refused() {
    let home = Home::new();
    home.run(["--monotonic=-4000000000"], ["true"]).run().exits(125).says("time");
}

#[test]
fn proc_shows_only_the_sandboxs_processes() {
    let home = Home::new();
    let text = home.sh(NONE, "for p in /proc/[0-9]*; do echo ${p#/proc/}; done; echo $$").run().ok().text();
    let mut lines: Vec<&str> = text.lines().collect();
    let own = lines.pop().unwrap();
    assert_eq!(lines.iter().copied().collect::<BTreeSet<_>>(), BTreeSet::from(["1", own]), "{text}");
}

#[test]
fn pid_1_is_init_and_reaps_orphans() {
    need!("python3");
    let home = Home::new();
    // An orphan's parent becomes pid 1, and its zombie goes away, which a pidfd tells.
    let script = "
import os, select, time
r, w = os.pipe()
if os.fork() == 0:
    child = os.fork()
    if child == 0:
        os.read(r, 1)
        os._exit(0)
    os._exit(0)
os.wait()
orphans = [p for p in os.listdir('/proc') if p.isdigit() and int(p) not in (1, os.getpid())]
assert len(orphans) == 1, orphans
orphan = int(orphans[0])
print('parent', open(f'/proc/{orphan}/stat').read().split()[3])
fd = os.pidfd_open(orphan)
os.write(w, b'x')
select.select([fd], [], [])
deadline = time.monotonic() + 30
while os.path.exists(f'/proc/{orphan}') and time.monotonic() < deadline:
    os.sched_yield()
print('reaped', not os.path.exists(f'/proc/{orphan}'))
";
    home.python(NONE, script).run().ok().prints("parent 1\nreaped True");
}

#[test]
fn a_thousand_orphans_are_reaped_and_the_status_is_still_the_commands() {
    let home = Home::new();
    home.sh(NONE, "i=0; while [ $i -lt 1000 ]; do (true &); i=$((i+1)); done; exit 9").run().exits(9);
}

#[test]
fn mounts_shows_only_the_sandboxs_own() {
    let home = Home::new();
    let secret = home.dir("work/volume");
    let volume = format!("{}:/mnt", secret.display());
    let text = home.run(["-v", &volume, "--tmpfs=/media"], ["cat", "/proc/self/mountinfo"]).run().ok().text();
    let mut places: Vec<&str> = text.lines().map(|line| line.split(' ').nth(4).unwrap()).collect();
    places.sort_unstable();
    places.dedup();
    assert!(places.contains(&"/") && places.contains(&"/mnt") && places.contains(&"/media"), "{text}");
    for place in &places {
        let known = ["/", "/mnt", "/media"].contains(place)
            || ["/proc", "/sys", "/dev"].iter().any(|own| place.starts_with(own));
        assert!(known, "{place} shows\n{text}");
    }
    let root = text.lines().find(|line| line.split(' ').nth(4) == Some("/")).unwrap();
    assert!(root.contains("fuse"), "{root}");
    // Nothing of the host's tree by its path there, beside the source of the volume.
    assert!(!text.contains("/state/"), "{text}");
}

#[test]
fn mounts_do_not_propagate_to_the_host() {
    let home = Home::new();
    let before = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    home.run(["--tmpfs=/media"], ["true"]).run().ok();
    assert_eq!(std::fs::read_to_string("/proc/self/mountinfo").unwrap(), before);
}

#[test]
fn dev_is_minimal() {
    let home = Home::new();
    let text = home.sh(NONE, "ls -A /dev | sort").run().ok().text();
    let names: BTreeSet<&str> = text.lines().collect();
    let expected = [
        "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty",
        "urandom", "zero",
    ];
    assert_eq!(names, BTreeSet::from(expected));
}

#[test]
fn the_devices_work() {
    let home = Home::new();
    let script = "
set -e
echo x > /dev/null
test $(head -c 5 /dev/zero | tr '\\0' z) = zzzzz
test $(head -c 1000 /dev/urandom | wc -c) = 1000
head -c 16 /dev/random | wc -c
if echo x 2>/dev/null > /dev/full; then exit 1; fi
echo hello > /dev/shm/f && cat /dev/shm/f
echo via-fd | cat /dev/stdin
echo to-stderr > /dev/stderr
ls /dev/fd/ >/dev/null
";
    home.sh(NONE, script).run().ok().prints("16\nhello\nvia-fd");
}

#[test]
fn pseudo_terminals_are_the_sandboxs_own() {
    need!("python3");
    let home = Home::new();
    let script = "
import os
m, s = os.openpty()
print(os.ttyname(s))
os.write(s, b'ping')
print(os.read(m, 4).decode())
";
    home.python(NONE, script).run().ok().prints("/dev/pts/0\nping");
}

#[test]
fn shared_memory_and_message_queues_are_the_sandboxs_own() {
    need!("python3");
    let home = Home::new();
    let script = "
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
queue = libc.mq_open(b'/rootlet-test', os.O_CREAT | os.O_RDWR, 0o600, None)
assert queue >= 0, os.strerror(ctypes.get_errno())
assert os.listdir('/dev/mqueue') == ['rootlet-test'], os.listdir('/dev/mqueue')
assert os.listdir('/dev/shm') == []
segment = libc.shmget(4711, 4096, 0o1600)
assert segment >= 0
print(open('/proc/sysvipc/shm').read().count('\\n'))
";
    home.python(NONE, script).run().ok().prints("2");
    assert!(!std::path::Path::new("/dev/mqueue/rootlet-test").exists());
    let host = std::fs::read_to_string("/proc/sysvipc/shm").unwrap();
    assert!(!host.lines().any(|line| line.split_ascii_whitespace().next() == Some("4711")), "{host}");
}

#[test]
fn sys_shows_the_sandboxs_network_and_is_read_only() {
    let home = Home::new();
    home.sh(["--network=none"], "ls /sys/class/net").run().ok().prints("lo");
    home.sh(NONE, "ls /sys/class/net").run().ok().prints("lo\ntap0");
    home.sh(NONE, "echo x > /sys/kernel/profiling").run().exits(2);
    home.sh(NONE, "touch /sys/x").run().exits(1);
}

#[test]
fn the_cgroup_path_of_the_host_does_not_show() {
    let home = Home::new();
    let text = home.run(NONE, ["cat", "/proc/self/cgroup"]).run().ok().text();
    for line in text.lines() {
        assert_eq!(line.rsplit(':').next(), Some("/"), "{text}");
    }
}

#[test]
fn the_id_map_is_the_callers_single_id_or_his_range() {
    let home = Home::new();
    let text = home.run(NONE, ["cat", "/proc/self/uid_map"]).run().ok().text();
    let lines: Vec<Vec<u64>> = text
        .lines()
        .map(|line| line.split_ascii_whitespace().map(|number| number.parse().unwrap()).collect())
        .collect();
    assert_eq!(lines[0][..2], [0, u64::from(uid())], "{text}");
    if is_root() {
        assert!(lines[0][2] > 1, "{text}");
    } else if has_subids() {
        assert!(lines.len() == 2 && lines[1][0] == 1 && lines[1][2] > 1000, "{text}");
    } else {
        assert_eq!(lines, [[0, u64::from(uid()), 1]], "{text}");
    }
}

#[test]
fn uidmap_and_gidmap_choose_the_map() {
    let home = Home::new();
    let (own_uid, own_gid) = (format!("--uidmap=5:{}:1", uid()), format!("--gidmap=6:{}:1", gid()));
    home.sh([&own_uid, &own_gid], "id -u; id -g; cat /proc/self/uid_map | tr -s ' '")
        .run()
        .ok()
        .prints(&format!("5\n6\n 5 {} 1", uid()));
    home.run(["--uidmap=0:0:1"], ["true"]).run().exits(125).says("gidmap");
}

#[test]
fn a_map_of_foreign_ids_is_refused() {
    if is_root() {
        skip!("root may map any id");
    }
    let home = Home::new();
    home.run(["--uidmap=0:0:1", "--gidmap=0:0:1"], ["true"]).run().exits(125).says("uidmap");
}

#[test]
fn real_set_id_calls_work_with_a_range() {
    need!("python3");
    let home = Home::new();
    let script = "
import os
os.setgroups([7, 8])
os.setgid(33)
os.setuid(33)
print(os.getuid(), os.getgid(), os.getgroups())
";
    let out = home.python(NONE, script).run().ok();
    if has_id_range() {
        out.prints("33 33 [7, 8]");
    } else {
        // The only id there is stays, and programs that drop to another go on.
        assert!(out.text().starts_with("0 0"), "{out}");
    }
}

#[test]
fn limits_of_the_caller_are_the_commands() {
    let home = Home::new();
    let script = format!(
        "ulimit -Sn 777; {} run --rm -- sh -c 'ulimit -n'",
        crate::common::rootlet_binary().display()
    );
    home.command("bash").args(["-c", &script]).run().ok().prints("777");
}

#[test]
fn the_umask_of_the_caller_is_the_commands() {
    let home = Home::new();
    let script =
        format!("umask 027; {} run --rm -- sh -c 'umask'", crate::common::rootlet_binary().display());
    home.command("bash").args(["-c", &script]).run().ok().prints("0027");
}
