//! The root file system: copy-on-write over the host's tree or over layers, volumes, tmpfs.

use std::path::Path;
use std::time::Duration;

use crate::common::{Home, need, skip};

const NONE: [&str; 0] = [];

/// A fingerprint of a tree: names, modes, owners, times, link counts, contents.
fn fingerprint(home: &Home, dir: impl AsRef<Path>) -> String {
    let script = "cd \"$1\" && { find . -printf '%p %y %m %U %G %s %n %T@ %l\\n' | sort; \
                  find . -type f -print0 | sort -z | xargs -0r sha256sum; }";
    home.command("sh").args(["-c", script, "sh"]).arg(dir.as_ref()).run().ok().text()
}

fn tree(home: &Home, name: &str) -> std::path::PathBuf {
    let script = "
set -e
mkdir -p \"$1\"; cd \"$1\"
mkdir -p d/e/f many; echo text > file; echo x > d/e/f/deep; printf '\\0\\1\\2' > binary
ln -s file link; ln -s /nowhere dangling; ln file hard; mkfifo fifo
chmod 4755 binary; chmod 400 d/e/f/deep; chmod 1777 many
for i in 1 2 3 4 5 6 7 8 9; do echo $i > many/$i; done
truncate -s 1M sparse
";
    let path = home.path(format!("work/{name}"));
    home.command("sh").args(["-c", script, "sh"]).arg(&path).run().ok();
    path
}

const DESTROY: &str = "
cd \"$1\"
echo changed > file; echo more >> hard; rm -rf d; mv many renamed; ln -sf other link
chmod 777 binary; touch -d 2001-01-01 sparse; truncate -s 5 sparse; rm fifo; mkdir fifo; echo new > new
setfattr -n user.x -v y file 2>/dev/null
true
";

#[test]
fn the_hosts_tree_is_byte_for_byte_what_it_was() {
    let home = Home::new();
    let path = tree(&home, "tree");
    let before = fingerprint(&home, &path);
    let script = format!(
        "{DESTROY}\ntest \"$(cat file)\" = 'changed' || test \"$(tail -1 file)\" = more; test ! -e d; test -d renamed"
    );
    home.run(NONE, ["sh", "-ec", &script, "sh"]).arg(&path).run().ok();
    assert_eq!(fingerprint(&home, &path), before);
}

#[test]
fn system_directories_seem_writable_and_stay_as_they_are() {
    let home = Home::new();
    let hostname = std::fs::read("/etc/passwd").unwrap();
    let script = "
set -e
echo 'x:x:1:1::/:/bin/sh' >> /etc/passwd
mkdir /opt/rootlet-test /usr/lib/rootlet-test
rm -rf /usr/share/doc
mv /usr/bin/id /usr/bin/id2
echo '#!/bin/sh' > /usr/local/bin/new-tool; chmod +x /usr/local/bin/new-tool; new-tool
ls /usr/bin/id2 >/dev/null; test ! -e /usr/bin/id; test ! -e /usr/share/doc
";
    home.sh(NONE, script).run().ok();
    assert_eq!(std::fs::read("/etc/passwd").unwrap(), hostname);
    assert!(Path::new("/usr/bin/id").exists() && !Path::new("/opt/rootlet-test").exists());
    assert!(!Path::new("/usr/local/bin/new-tool").exists());
}

/// A root file system from the host's own: what a shell and coreutils need.
pub(crate) fn small_rootfs(home: &Home, name: &str) -> String {
    let script = "
set -e
root=$1; mkdir -p \"$root\"/bin \"$root\"/etc \"$root\"/tmp \"$root\"/proc \"$root\"/sys \"$root\"/dev
for program in sh ls cat echo mkdir rm ln readlink touch stat id env mv chmod head wc sleep true false pwd test find; do
    path=$(command -v $program) || continue
    case $path in /*) ;; *) path=/usr/bin/$program ;; esac
    cp -L \"$path\" \"$root/bin/$program\"
    ldd \"$path\" | grep -o '/[^ ]*' | while read -r lib; do mkdir -p \"$root$(dirname \"$lib\")\"; cp -Ln \"$lib\" \"$root$lib\"; done
done
echo 'root:x:0:0:root:/root:/bin/sh' > \"$root/etc/passwd\"
echo 'root:x:0:' > \"$root/etc/group\"
echo original > \"$root/etc/marker\"
";
    let path = home.text(format!("work/{name}"));
    home.command("sh").args(["-c", script, "sh", &path]).run().ok();
    path
}

#[test]
fn a_rootfs_is_the_root_and_is_never_changed() {
    let home = Home::new();
    let rootfs = small_rootfs(&home, "rootfs");
    let before = fingerprint(&home, &rootfs);
    let out = home
        .run(["--rootfs", &rootfs], ["sh", "-c", "cat /etc/marker; echo changed > /etc/marker; cat /etc/marker; rm /bin/cat; mkdir /new; ls /; pwd"])
        .run()
        .ok();
    assert_eq!(out.text(), "original\nchanged\nbin\ndev\netc\nlib\nlib64\nnew\nproc\nsys\ntmp\n/", "{out}");
    assert_eq!(fingerprint(&home, &rootfs), before);
}

#[test]
fn a_rootfs_needs_no_directories_of_its_own() {
    let home = Home::new();
    let rootfs = small_rootfs(&home, "rootfs");
    for dir in ["proc", "sys", "dev", "tmp"] {
        std::fs::remove_dir(Path::new(&rootfs).join(dir)).unwrap();
    }
    home.run(["--rootfs", &rootfs], ["sh", "-c", "test -d /proc/1 && test -c /dev/null && echo fine"])
        .run()
        .ok()
        .prints("fine");
    assert!(!Path::new(&rootfs).join("proc").exists());
}

#[test]
fn a_rootfs_starts_with_an_environment_of_its_own() {
    let home = Home::new();
    let rootfs = small_rootfs(&home, "rootfs");
    let out = home.run(["--rootfs", &rootfs, "-e", "ASKED=1"], ["env"]).env("CALLERS", "x").run().ok();
    let text = out.text();
    assert!(text.contains("PATH=") && text.contains("ASKED=1") && !text.contains("CALLERS"), "{out}");
}

#[test]
fn layers_stack_the_lowest_first() {
    let home = Home::new();
    let base = small_rootfs(&home, "base");
    home.file("work/middle/etc/marker", "middle\n");
    home.file("work/middle/only-middle", "m\n");
    home.file("work/top/etc/marker", "top\n");
    let (middle, top) = (home.text("work/middle"), home.text("work/top"));
    home.run(["--layer", &base, "--layer", &middle, "--layer", &top], ["cat", "/etc/marker", "/only-middle"])
        .run()
        .ok()
        .prints("top\nm");
    home.run(["--layer", &base, "--layer", &top, "--layer", &middle], ["cat", "/etc/marker"])
        .run()
        .ok()
        .prints("middle");
}

#[test]
fn the_upper_is_kept_where_asked_and_can_be_a_layer_again() {
    let home = Home::new();
    let base = small_rootfs(&home, "base");
    let upper = home.text("work/upper");
    let change = "echo new > /etc/new; echo changed > /etc/marker; rm /etc/group; mkdir /d; echo x > /d/f";
    home.run(["--layer", &base, "--upper", &upper], ["sh", "-ec", change]).run().ok();
    let on_disk = |name: &str| std::fs::read_to_string(Path::new(&upper).join(name)).unwrap();
    assert_eq!(on_disk("etc/new"), "new\n");
    assert_eq!(on_disk("etc/marker"), "changed\n");
    let look = "cat /etc/marker /etc/new /d/f; test ! -e /etc/group && echo gone";
    let expected = "changed\nnew\nx\ngone";
    home.run(["--layer", &base, "--upper", &upper], ["sh", "-c", look]).run().ok().prints(expected);
    home.run(["--layer", &base, "--layer", &upper], ["sh", "-c", look]).run().ok().prints(expected);
    for name in home.boxes() {
        home.keeps(&name);
    }
}

#[test]
fn layers_have_the_modes_of_branches() {
    let home = Home::new();
    let base = small_rootfs(&home, "base");
    let upper = home.text("work/upper");
    let branch = |mode: &str| format!("{upper}:{mode}");
    // The last one, if it is `rw`, is where changes go.
    home.run(
        ["--layer", &base, "--layer", &branch("rw")],
        ["sh", "-ec", "rm /etc/marker; echo new > /etc/new"],
    )
    .run()
    .ok();
    assert!(Path::new(&upper).join("etc/new").exists());
    let look = "cat /etc/new; test -e /etc/marker && echo shown || echo hidden";
    for (mode, expected) in [("ro+wh", "new\nhidden"), ("ro", "new\nshown")] {
        home.run(["--layer", &base, "--layer", &branch(mode)], ["sh", "-c", look])
            .run()
            .ok()
            .prints(expected);
    }
    for name in home.boxes() {
        home.keeps(&name);
    }
}

#[test]
fn a_directory_made_again_hides_what_was_in_it() {
    let home = Home::new();
    let base = small_rootfs(&home, "base");
    home.file("work/base/d/old", "x");
    let upper = home.text("work/upper");
    home.run(["--layer", &base, "--upper", &upper], ["sh", "-ec", "rm -r /d; mkdir /d; echo n > /d/new"])
        .run()
        .ok();
    home.run(["--layer", &base, "--layer", &upper], ["ls", "/d"]).run().ok().prints("new");
    for name in home.boxes() {
        home.keeps(&name);
    }
}

#[test]
fn whiteouts_and_opaque_directories_are_in_the_kernels_form() {
    need!("getfattr", "python3");
    let home = Home::new();
    let base = small_rootfs(&home, "base");
    home.file("work/base/d/old", "x");
    let upper = home.text("work/upper");
    home.run(["--layer", &base, "--upper", &upper], ["sh", "-ec", "rm /etc/marker; rm -r /d; mkdir /d"])
        .run()
        .ok();
    let check = "
import os, stat, sys
upper = sys.argv[1]
s = os.lstat(upper + '/etc/marker')
def xattr(path, name):
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError:
        return None
device = stat.S_ISCHR(s.st_mode) and s.st_rdev == 0
marked = stat.S_ISREG(s.st_mode) and s.st_size == 0 and xattr(upper + '/etc/marker', 'user.overlay.whiteout') is not None \
    and xattr(upper + '/etc', 'user.overlay.opaque') == b'x'
print('whiteout', device or marked)
print('opaque', xattr(upper + '/d', 'user.overlay.opaque'))
";
    home.command("python3").args(["-c", check, &upper]).run().ok().prints("whiteout True\nopaque b'y'");
    for name in home.boxes() {
        home.keeps(&name);
    }
}

#[test]
fn build_tools_find_the_semantics_of_linux() {
    need!("python3");
    let home = Home::new();
    let lower = home.file("work/lower/existing", "0123456789");
    home.file("work/lower/dir/inner", "x");
    let script = home.file("work/semantics.py", include_str!("semantics.py"));
    let out = home
        .run(NONE, ["python3"])
        .arg(&script)
        .arg(home.path("work/lower"))
        .deadline(Duration::from_secs(180))
        .run();
    assert_eq!(out.code(), 0, "{out}");
    assert!(out.text().ends_with("all held"), "{out}");
    assert_eq!(std::fs::read_to_string(lower).unwrap(), "0123456789");
}

#[test]
fn a_directory_of_fifty_thousand_entries_works() {
    need!("python3");
    let home = Home::new();
    let script = "
import os
os.mkdir('big'); os.chdir('big')
for i in range(50000):
    os.close(os.open(f'file-{i:05}', os.O_CREAT | os.O_WRONLY, 0o644))
names = os.listdir('.')
assert len(names) == 50000 and len(set(names)) == 50000, len(names)
assert sum(1 for e in os.scandir('.') if e.is_file()) == 50000
for i in range(0, 50000, 2):
    os.unlink(f'file-{i:05}')
assert sorted(os.listdir('.')) == [f'file-{i:05}' for i in range(1, 50000, 2)]
print('fine')
";
    home.python(NONE, script).deadline(Duration::from_secs(300)).run().ok().prints("fine");
}

#[test]
fn a_lower_directory_of_fifty_thousand_entries_merges() {
    need!("python3");
    let home = Home::new();
    let make = "import os\nos.mkdir('lower')\nfor i in range(50000): os.close(os.open(f'lower/{i}', os.O_CREAT | os.O_WRONLY))";
    home.command("python3").args(["-c", make]).run().ok();
    let script = "
import os
os.chdir('lower')
os.unlink('7'); open('new', 'w').close(); os.rename('8', 'eight')
names = set(os.listdir('.'))
assert len(names) == 50000 and '7' not in names and '8' not in names and {'new', 'eight', '9'} <= names
print('fine')
";
    home.python(NONE, script).deadline(Duration::from_secs(180)).run().ok().prints("fine");
}

#[test]
fn what_is_written_is_on_disk_when_the_run_is_over() {
    let home = Home::new();
    let upper = home.text("work/upper");
    let file = home.text("work/data");
    // Dirty pages of the overlay must not be lost with the mount.
    home.run(["--upper", &upper], ["sh", "-c", &format!("head -c 50000000 /dev/zero | tr '\\0' x > {file}")])
        .run()
        .ok();
    let kept = Path::new(&upper).join(file.trim_start_matches('/'));
    let length = std::fs::metadata(&kept).unwrap().len();
    assert_eq!(length, 50_000_000);
    for name in home.boxes() {
        home.keeps(&name);
    }
}

#[test]
fn a_volume_is_the_hosts_directory() {
    let home = Home::new();
    home.file("work/volume/from-host", "h\n");
    let volume = format!("{}:/srv/data", home.text("work/volume"));
    home.run(["-v", &volume], ["sh", "-ec", "cat /srv/data/from-host; echo i > /srv/data/from-inside"])
        .run()
        .ok()
        .prints("h");
    assert_eq!(std::fs::read_to_string(home.path("work/volume/from-inside")).unwrap(), "i\n");
}

#[test]
fn a_read_only_volume_cannot_be_written() {
    let home = Home::new();
    home.file("work/volume/file", "h\n");
    let volume = format!("{}:/srv/data:ro", home.text("work/volume"));
    let script = "cat /srv/data/file; echo x > /srv/data/file; touch /srv/data/new; rm -f /srv/data/file; chmod 777 /srv/data/file; mount -o remount,rw /srv/data; true";
    home.run(["-v", &volume], ["sh", "-c", script]).run().ok().prints("h");
    assert_eq!(std::fs::read_to_string(home.path("work/volume/file")).unwrap(), "h\n");
    assert!(!home.path("work/volume/new").exists());
}

#[test]
fn a_file_can_be_a_volume() {
    let home = Home::new();
    home.file("work/one-file", "content\n");
    let volume = format!("{}:/etc/one-file:ro", home.text("work/one-file"));
    home.run(["-v", &volume], ["cat", "/etc/one-file"]).run().ok().prints("content");
    home.run(["-v", "./one-file:/etc/one-file"], ["cat", "/etc/one-file"]).run().ok().prints("content");
}

#[test]
fn setuid_files_of_a_volume_give_nothing_and_devices_of_it_do_not_open() {
    let home = Home::new();
    home.dir("work/volume");
    let volume = format!("{}:/srv/data", home.text("work/volume"));
    let text = home.run(["-v", &volume], ["cat", "/proc/self/mountinfo"]).run().ok().text();
    let line = text.lines().find(|line| line.contains(" /srv/data ")).unwrap();
    assert!(line.contains("nosuid") && line.contains("nodev"), "{line}");
}

#[test]
fn a_tmpfs_is_empty_and_has_its_size_and_mode() {
    let home = Home::new();
    let script = "ls -A /mnt; stat -f -c '%T' /mnt; stat -c %a /mnt; head -c 3000000 /dev/zero > /mnt/big 2>/dev/null; stat -c %s /mnt/big";
    home.run(["--tmpfs=/mnt:size=1m,mode=750"], ["sh", "-c", script])
        .run()
        .ok()
        .prints("tmpfs\n750\n1048576");
}

#[test]
fn read_only_lets_nothing_be_changed_except_on_volumes_and_tmpfs() {
    let home = Home::new();
    home.dir("work/volume");
    let volume = format!("{}:/srv", home.text("work/volume"));
    let script = "
for target in /etc/new /usr/new ./new; do touch $target 2>/dev/null && echo wrote $target; done
echo x 2>/dev/null > /etc/passwd && echo overwrote
rm -f /etc/passwd 2>/dev/null && echo removed
touch /tmpfs-here/ok /srv/ok && echo fine
";
    home.run(["--read-only", "-v", &volume, "--tmpfs=/tmpfs-here"], ["sh", "-c", script])
        .run()
        .ok()
        .prints("fine");
    assert!(home.path("work/volume/ok").exists());
}

#[test]
fn names_of_any_bytes_survive() {
    need!("python3");
    let home = Home::new();
    let upper = home.text("work/upper");
    let script = "
import os
names = [b'a' * 255, 'ü'.encode() * 127, b'\\xff\\xfe', b'new\\nline', b' ', b'-rf', b'*', b'.wh.file', b'.wh..wh..opq', b'\\x1b[31m']
os.mkdir('names'); os.chdir('names')
for name in names:
    with open(name, 'wb') as f: f.write(name)
    os.rename(name, b'tmp'); os.rename(b'tmp', name)
assert sorted(os.listdir(b'.')) == sorted(names), os.listdir(b'.')
for name in names: assert open(name, 'rb').read() == name
try:
    open(b'b' * 256, 'w')
except OSError as e:
    print(e.errno)
";
    home.python(["--upper", &upper], script).run().ok().prints("36");
    for name in home.boxes() {
        home.rootlet(["diff", &name]).run().ok();
        home.keeps(&name);
    }
}

#[test]
fn deep_paths_work() {
    need!("python3");
    let home = Home::new();
    let script = "
import os
for i in range(300):
    os.mkdir('deep-directory-name'); os.chdir('deep-directory-name')
open('leaf', 'w').write('x')
print(open('leaf').read(), len(os.getcwd()) > 4096 or 'short')
";
    // The last name no longer fits into PATH_MAX from the root: only relative steps reach it.
    let out = home.python(["--name=deep"], script).run();
    assert!([0, 1].contains(&out.code()), "{out}");
}

#[test]
fn commands_are_executed_from_what_was_just_written() {
    let home = Home::new();
    let script = "cp /bin/true t && ./t && printf '#!/bin/sh\\necho ran\\n' > s && chmod +x s && ./s && cp s s2 && mv s2 s3 && ./s3";
    home.sh(NONE, script).run().ok().prints("ran\nran");
}

#[test]
fn a_compiler_builds_and_runs_a_program() {
    need!("cc");
    let home = Home::new();
    let script = "printf 'int main(){return 42;}' > m.c && cc -o m m.c && ./m";
    home.sh(NONE, script).run().exits(42);
}

#[test]
fn git_works_on_a_repository_of_the_host() {
    need!("git");
    let home = Home::new();
    let make = "git init -q r && cd r && git -c user.name=a -c user.email=a@b commit -q --allow-empty -m one";
    home.command("sh").args(["-c", make]).run().ok();
    let script = "cd r && echo x > f && git add f && git -c user.name=a -c user.email=a@b commit -q -m two && git gc -q && git fsck && git log --format=%s";
    // The caller's files are root's inside, so git finds that the repository is its user's own.
    home.sh(NONE, script).run().ok().prints("two\none");
    home.command("git").args(["-C", "r", "log", "--format=%s"]).run().ok().prints("one");
}

/// For how long the threads of a process that give way to all others have worked, in nanoseconds.
fn given_way(pid: nix::unistd::Pid) -> u64 {
    let worked = |task: std::io::Result<std::fs::DirEntry>| {
        // (One that has ended meanwhile has neither file.)
        let task = task.ok()?.path();
        let stat = std::fs::read_to_string(task.join("stat")).ok()?;
        // SCHED_IDLE, proc_pid_stat(5).
        let gives_way = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(41 - 3)? == "5";
        let times = std::fs::read_to_string(task.join("schedstat")).ok()?;
        times.split(' ').next()?.parse::<u64>().ok().filter(|_| gives_way)
    };
    std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().filter_map(worked).sum()
}

/// Whether an ordinary thread can have turns of a length of its own (Linux 6.12): one sets it, and looks whether it is
/// there.
fn has_turns(home: &Home) -> bool {
    let script = "
import ctypes, os, platform, struct
SET, GET = {'x86_64': (314, 315)}.get(platform.machine(), (274, 275))
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    assert libc.syscall(number, 0, *arguments) == 0, os.strerror(ctypes.get_errno())
# sched_attr of sched_setattr(2); the sixth field is the length.
FORM = '=IIQiIQQQ'
attributes = ctypes.create_string_buffer(struct.calcsize(FORM))
def get():
    call(GET, attributes, len(attributes), 0)
    return list(struct.unpack(FORM, attributes))
wanted = get()
wanted[0], wanted[5] = len(attributes), 1_000_000
attributes.raw = struct.pack(FORM, *wanted)
call(SET, attributes, 0)
print(get()[5] == 1_000_000)
";
    match home.command("python3").args(["-c", script]).run().ok().text().trim() {
        "True" => true,
        "False" => false,
        other => panic!("{other}"),
    }
}

/// The overlay's server can follow a program only with the procfs that setup passes to it.
#[test]
fn who_asks_one_thing_after_another_is_served_on_his_processor() {
    let home = Home::new();
    if !has_turns(&home) {
        skip!("threads have no turns of a length of their own");
    }
    if std::thread::available_parallelism().unwrap().get() < 2 {
        skip!("there is one processor");
    }
    let script = "
import os, sys
asked, line = 0, 'go on'
while line:
    for i in range(500):
        asked += 1
        assert not os.path.lexists(f'/none{asked}')
    print(f'asked {asked};', flush=True)
    line = sys.stdin.readline()
";
    let mut asker = home.python(NONE, script).stdin_open().start();
    // (What does not serve anybody so works for some microseconds.)
    let served = (1..=1000).any(|round| {
        asker.until_out(&format!("asked {};", round * 500));
        let served = given_way(asker.pid()) >= 1_000_000;
        asker.write(if served { "" } else { "go on\n" });
        served
    });
    asker.finish().ok();
    assert!(served);
}
