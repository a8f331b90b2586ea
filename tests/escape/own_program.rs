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

#[test]
fn proc_self_exe_as_the_command_is_not_our_program_on_a_writable_mount() {
    let home = Home::new();
    let program = canary(&home);
    let before = std::fs::read(&program).unwrap();
    for options in [&[][..], &["--nested"]] {
        let out = home
            .command(&program)
            .args(["run", "--rm"])
            .args(options)
            .args(["--", "/proc/self/exe", "--version"])
            .run();
        assert!([0, 2, 125, 126, 127].contains(&out.code()), "{out}");
        assert!(std::fs::read(&program).unwrap() == before);
    }
}

#[test]
fn a_script_whose_interpreter_is_proc_self_exe_cannot_write_our_program() {
    let home = Home::new();
    let program = canary(&home);
    let before = std::fs::read(&program).unwrap();
    // The interpreter is what executes the script: our last stage. What it then is must be on a
    // mount that cannot be written.
    let script = home.script("work/script", "#!/proc/self/exe\n");
    let out = home.command(&program).args(["run", "--rm", "--"]).arg(&script).run();
    assert_ne!(out.code(), 0, "{out}");
    assert!(std::fs::read(&program).unwrap() == before);
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
