//! CVE-2019-5736: the payload must not be able to write rootlet's own program.

use std::path::PathBuf;

use crate::common::{Home, is_root, rootlet_binary, skip};

/// A copy of the binary that the caller may write: what the attack is after.
fn canary(home: &Home) -> PathBuf {
    let copy = home.path("work/rootlet-copy");
    std::fs::copy(rootlet_binary(), &copy).unwrap();
    copy
}

/// Writes to whatever /proc/PID/exe it may open, in a loop, since a running program is busy.
const OVERWRITE: &str = r#"
import os, sys
hit = []
for target in sys.argv[1:]:
    for path in [f'/proc/{target}/exe', f'/proc/{target}/root/proc/{target}/exe']:
        try:
            fd = os.open(path, os.O_PATH)
        except OSError:
            continue
        for _ in range(2000):
            try:
                w = os.open(f'/proc/self/fd/{fd}', os.O_WRONLY)
            except OSError as e:
                if e.errno == 26: continue  # ETXTBSY: as long as it runs
                break
            os.write(w, b'#!/bin/sh\necho pwned\n')
            hit.append(path)
            break
print('hit' if hit else 'missed', *hit)
"#;

#[test]
fn the_attack_hits_where_nothing_defends() {
    let home = Home::new();
    let victim = home.path("work/victim");
    std::fs::copy("/bin/sleep", &victim).unwrap();
    let mut child = home.command(&victim).arg("1000").start();
    // The descriptor is taken while it runs, and written when it is gone.
    let script = format!(
        "import os, signal\nfd = os.open('/proc/{0}/exe', os.O_PATH)\nos.kill({0}, 9)\n\
         while True:\n    try: w = os.open(f'/proc/self/fd/{{fd}}', os.O_WRONLY); break\n    except OSError: pass\n\
         print(os.write(w, b'pwned'))",
        child.pid()
    );
    child.close_stdin();
    home.command("python3").args(["-c", &script]).run().ok().prints("5");
    child.finish();
    assert!(std::fs::read(victim).unwrap().starts_with(b"pwned"));
}

#[test]
fn the_payload_cannot_write_our_program() {
    let home = Home::new();
    let program = canary(&home);
    let before = std::fs::read(&program).unwrap();
    for options in [&[][..], &["--nested"]] {
        let out = home
            .command(&program)
            .args(["run", "--rm"])
            .args(options)
            .args(["--", "python3", "-c", OVERWRITE, "1", "self", "thread-self"])
            .run()
            .ok();
        // Its own program is python3, on the copy-on-write tree.
        assert!(!out.text().contains("/proc/1/"), "{out}");
        assert!(std::fs::read(&program).unwrap() == before, "the program was changed");
    }
}

/// Starts a run in which our own program, found by /proc/self/exe, is what runs inside: it waits for a fifo
/// that it shares with this script, which looks from outside where its file is.
const LOOK_AT_OUR_PROGRAM: &str = r#"
import os, subprocess, sys
fifo, *command = sys.argv[1:]
run = subprocess.Popen(command, stderr=subprocess.PIPE)
waits = os.open(fifo, os.O_WRONLY)
for pid in filter(str.isdigit, os.listdir('/proc')):
    try:
        if open(f'/proc/{pid}/cmdline').read().startswith('/proc/self/exe\0'):
            file = os.open(f'/proc/{pid}/exe', os.O_RDONLY)
            print('read-only' if os.fstatvfs(file).f_flag & os.ST_RDONLY else 'writable', os.readlink(f'/proc/{pid}/exe'))
    except OSError:
        pass
os.close(waits)
run.communicate()
"#;

#[test]
fn our_program_inside_is_on_a_read_only_mount() {
    let home = Home::new();
    let program = canary(&home);
    let before = std::fs::read(&program).unwrap();
    let shared = home.dir("work/shared");
    home.command("mkfifo").arg(shared.join("fifo")).run().ok();
    let volume = format!("--volume={}:/mnt", shared.display());
    for options in [&[][..], &["--nested"]] {
        let out = home
            .command("python3")
            .args(["-c", LOOK_AT_OUR_PROGRAM])
            .arg(shared.join("fifo"))
            .arg(&program)
            .args(["run", "--rm", &volume])
            .args(options)
            .args(["--", "/proc/self/exe", "run", "--env-file=/mnt/fifo", "--", "true"])
            .run()
            .ok();
        // The mount is detached, so this is all there is of its file's name.
        assert_eq!(out.text().trim(), "read-only /", "{options:?}: {out}");
        assert!(std::fs::read(&program).unwrap() == before);
    }
}

#[test]
fn a_loader_that_opens_proc_self_exe_during_start_finds_a_read_only_file() {
    let home = Home::new();
    let program = canary(&home);
    let before = std::fs::read(&program).unwrap();
    // LD_PRELOAD does not act on a static program, so the payload polls pid 1 and its siblings
    // from before the first instruction of its own.
    let script = "for i in 1 2 3 4 5 6 7 8 9; do for p in /proc/[0-9]*; do { echo pwned > $p/exe; } 2>/dev/null && echo hit $p; done; done; true";
    let out = home.command(&program).args(["run", "--rm", "--", "bash", "-c", script]).run().ok();
    assert!(!out.text().contains("/proc/1\n"), "{out}");
    assert!(std::fs::read(&program).unwrap() == before);
}

#[test]
fn a_setuid_rootlet_refuses_to_run() {
    if !is_root() {
        skip!("only root can make a program set-user-ID another user");
    }
    use std::os::unix::fs::PermissionsExt;
    let home = Home::new();
    let program = canary(&home);
    for (owner, mode) in [("1:1", 0o6755), ("1:1", 0o4755), ("1:1", 0o2755)] {
        home.command("chown").arg(owner).arg(&program).run().ok();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(mode)).unwrap();
        let out = home.command(&program).args(["run", "--rm", "--", "id"]).run();
        assert_eq!(out.code(), 125, "{out}");
        assert!(out.errors().contains("set"), "{out}");
        // argv[0] is the caller's choice: neither hidden stage is a door.
        let stages = [&["rootlet-exec", "3", "! ", "/usr/bin/id", "id"][..], &["rootlet", "internal-probe"]];
        for stage in stages {
            let through = "import os, socket, sys
a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
os.dup2(b.fileno(), 3)
os.execv(sys.argv[1], sys.argv[2:])";
            let out = home.command("python3").args(["-c", through]).arg(&program).args(stage).run();
            assert_eq!(out.code(), 125, "{stage:?}: {out}");
            assert!(out.errors().contains("set-user-ID") && !out.text().contains("uid="), "{stage:?}: {out}");
        }
    }
}
