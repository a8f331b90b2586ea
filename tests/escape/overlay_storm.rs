//! The overlay under attack: storms from inside leave it up, right and without leftovers, and the lower as it was.

use std::path::Path;

use crate::common::{Home, rootlet_binary};

const NONE: [&str; 0] = [];

/// See there: what is done at once, and what must be true afterwards.
const STORM: &str = include_str!("overlay_storm.py");

/// The supervisor's limit on open files in the storm. The payload opens twenty times as many.
const FEW: usize = 1024;

/// The tree that the storm is about, as the program expects it.
fn make_tree(tree: &Path) {
    let content = |number: u32| format!("{number:06}\n").repeat(4096 / 7 * 4);
    let directories = [("gone", 400), ("many", 400), ("xattr", 4), ("mapped", 40)];
    let shared = ["d0", "d1", "d2", "d3"].map(|name| (name, 200));
    for (name, files) in directories.into_iter().chain(shared) {
        let directory = tree.join(name);
        std::fs::create_dir_all(&directory).unwrap();
        for number in 0..files {
            std::fs::write(directory.join(format!("f{number}")), content(number)).unwrap();
        }
        for sub in ["sub0/x", "sub1/x", "sub2/x"] {
            std::fs::create_dir_all(directory.join(sub)).unwrap();
        }
    }
}

/// Everything about the lower that a storm could change.
fn fingerprint(home: &Home) -> String {
    let script = "find tree -printf '%p %y %m %n %u %g %s %T@ %i %l\n' | sort | sha256sum; find tree -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum; find tree -type f -print0 | xargs -0 getfattr -d -m - 2>&1 | sha256sum";
    home.command("sh").args(["-c", script]).run().ok().text()
}

#[test]
fn a_storm_on_the_overlay_leaves_it_right_and_the_lower_unchanged() {
    let home = Home::new();
    make_tree(&home.path("work/tree"));
    let program = home.file("work/storm.py", STORM);
    let before = fingerprint(&home);
    let limit = format!("--nofile={FEW}:{FEW}");
    let mut command = home.command("prlimit").args([&limit, "--"]).arg(rootlet_binary());
    command = command.args(["run", "--rm", "-i", "--", "python3"]).arg(&program).arg("1");
    let running = command.stdin_open().start();
    running.until_out("storm over\n");
    // prlimit became rootlet. Of the handles, links and names that are gone nothing stays behind: what
    // is held is the cache, a quarter of the limit, and what any run has.
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", running.pid())).unwrap().count();
    let out = running.finish().ok();
    assert!(out.text().ends_with("\nstorm over"), "{out}");
    assert!(descriptors < FEW / 4 + 100, "the supervisor holds {descriptors} descriptors\n{out}");
    assert_eq!(fingerprint(&home), before, "the lower was changed\n{out}");
    // What the storm takes for right is what the kernel does; and there the tree does not outlive it.
    home.command("python3").arg(&program).arg("2").run().ok();
    assert_ne!(fingerprint(&home), before);
}

#[test]
fn the_overlay_cannot_be_unmounted_covered_or_moved() {
    let home = Home::new();
    home.file("work/file", "still here");
    home.dir("work/place");
    let script = r#"
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
def outcome(name, result):
    print(name, 'hit' if result >= 0 else errno.errorcode[ctypes.get_errno()])
os.makedirs('place', exist_ok=True)
for path in (b'/', b'.', os.getcwdb()):
    for flag in (0, 1, 2, 4, 8):  # MNT_FORCE ends a FUSE connection even where the mount is busy
        outcome('umount', libc.umount2(path, flag))
    for kind in (b'tmpfs', b'overlay', b'fuse'):
        outcome('cover', libc.mount(b'none', path, kind, 0, None))
    outcome('bind', libc.mount(b'/', path, None, 4096 | 16384, None))
    outcome('move', libc.mount(path, b'place', None, 8192, None))
    outcome('remount', libc.mount(b'none', path, None, 32 | 1, None))
    outcome('pivot', libc.syscall(155, path, b'place'))
for old, new in ((b'/', b'/x'), (b'place', b'/'), (b'/', b'place'), (b'/.', b'/x'), (b'/..', b'/x')):
    outcome('rename', libc.rename(old, new))
    outcome('exchange', libc.renameat2(-100, old, -100, new, 2))
    outcome('link', libc.link(old, new))
outcome('rmdir', libc.rmdir(b'/'))
outcome('fuse', libc.open(b'/dev/fuse', os.O_RDWR))
outcome('abort', libc.open(b'/sys/fs/fuse/connections', os.O_RDONLY | os.O_DIRECTORY) if os.path.isdir('/sys/fs/fuse/connections') and os.listdir('/sys/fs/fuse/connections') else libc.open(b'/nowhere', 0))
"#;
    let check = format!("{script}\nprint(open('file').read(), os.listdir('.') != [], os.path.isdir('/usr'))");
    for options in [&[][..], &["--network=host"], &["--user=1000:1000"]] {
        let out = home.python(options, &check).run().ok();
        let text = out.text();
        assert!(text.ends_with("still here True True"), "{out}");
        assert!(!text.contains("hit"), "{options:?}: {out}");
    }
    // In a mount namespace of one's own, where nothing refuses it, the same covers the directory.
    let outside = home.command("unshare").args(["-Urm", "python3", "-c", script]).run();
    assert!(outside.text().contains("cover hit") && outside.text().contains("bind hit"), "{outside}");
}

#[test]
fn a_nested_payload_that_aborts_its_own_mount_ends_only_itself() {
    let home = Home::new();
    home.file("work/file", "lower");
    // With --nested mounts are the payload's business, so it can end the connection to the overlay's server.
    let script = r#"
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
os.write(1, b'start\n')
libc.umount2(b'/', 1)
try:
    os.stat('/usr/bin/never-looked-at')
    os.write(1, b'alive\n')
except OSError as error:
    os.write(1, b'%d\n' % error.errno)
os._exit(9)
"#;
    let out = home.python(["--nested"], script).run();
    assert!(out.text().starts_with("start\n"), "{out}");
    assert_eq!(out.code(), 9, "{out}");
    assert_eq!(std::fs::read_to_string(home.path("work/file")).unwrap(), "lower");
    // The next run is as good as any.
    home.run(NONE, ["cat", "file"]).run().ok().prints("lower");
}
