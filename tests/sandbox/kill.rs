//! `kill -9` of rootlet: the kernel cleans up, and `prune` removes what is on disk.

use nix::sys::signal::Signal;

use crate::common::{Home, need};

/// Runs `run --name=killed OPTIONS`, kills it when `ready` came out, and checks that only the box
/// is left, which `prune` removes if it may.
fn killed(home: &Home, options: &[&str], script: &str) {
    let running =
        home.rootlet(["run", "--name=killed"]).args(options).args(["--", "sh", "-c", script]).start();
    running.until_out("ready");
    running.signal(Signal::SIGKILL);
    running.finish().exits(137);
    home.keeps("killed");
    home.check_nothing_left();
}

#[test]
fn kill_9_leaves_no_process_mount_or_device() {
    let home = Home::new();
    killed(&home, &[], "setsid sleep 1000 & sleep 1000 & echo ready; exec sleep 1000");
    home.rootlet(["prune"]).run().ok();
    assert!(home.boxes().is_empty(), "nothing was changed, so prune removes it");
}

#[test]
fn kill_9_of_a_run_that_keeps_nothing_is_pruned_with_its_changes() {
    let home = Home::new();
    killed(&home, &["--rm"], "echo x > new; echo ready; exec sleep 1000");
    let text = home.rootlet(["ls"]).run().ok().text();
    assert!(text.contains("killed"), "{text}");
    home.rootlet(["prune"]).run().ok();
    assert!(home.boxes().is_empty());
}

#[test]
fn kill_9_keeps_the_changes_of_a_run_that_was_to_keep_them() {
    let home = Home::new();
    killed(&home, &[], "echo x > new; sync; echo ready; exec sleep 1000");
    home.rootlet(["prune"]).run().ok();
    let diff = home.rootlet(["diff", "killed"]).run().ok().text();
    assert!(diff.contains("/work/new"), "{diff}");
    home.rootlet(["rm", "killed"]).run().ok();
    assert!(home.boxes().is_empty());
}

#[test]
fn kill_9_of_the_sandboxs_init_ends_the_run() {
    let home = Home::new();
    let running = home.run([""; 0], ["sh", "-c", "echo ready; exec sleep 1000"]).start();
    running.until_out("ready");
    // Its only child.
    let children = format!("/proc/{0}/task/{0}/children", running.pid());
    let init: i32 = std::fs::read_to_string(children).unwrap().trim().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(init), Signal::SIGKILL).unwrap();
    let out = running.finish();
    assert!([125, 137].contains(&out.code()), "{out}");
}

#[test]
fn kill_9_with_a_published_port_frees_it() {
    let home = Home::new();
    let port = crate::common::free_port();
    killed(&home, &["--rm", "-p", &format!("127.0.0.1:{port}:80")], "echo ready; exec sleep 1000");
    std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    home.rootlet(["prune"]).run().ok();
}

#[test]
fn kill_9_in_the_middle_of_writing_keeps_the_host_as_it_was() {
    let home = Home::new();
    home.file("work/data", "original");
    killed(
        &home,
        &["--rm"],
        "echo ready; while :; do head -c 1000000 /dev/zero > data; cp data data2; mv data2 data; done",
    );
    assert_eq!(std::fs::read(home.path("work/data")).unwrap(), b"original");
    home.rootlet(["prune"]).run().ok();
}

/// Kills rootlet when it enters its Nth system call of a kind, for every N until it gets through.
/// strace does it: `--inject` with a signal, on the supervisor or, with `-f`, on every process.
fn killed_at_every(system_call: &str, follow: bool) {
    need!("strace");
    let home = Home::new();
    // A traced newuidmap is not set-user-ID: where every process is traced, the single id serves.
    let maps =
        [format!("--uidmap=0:{}:1", crate::common::uid()), format!("--gidmap=0:{}:1", crate::common::gid())];
    let maps = if follow && crate::common::has_subids() { &maps[..] } else { &[] };
    let mut survived = false;
    let mut tries = 0;
    for number in 1..400 {
        let inject = format!("--inject={system_call}:signal=KILL:when={number}");
        let mut strace = home.command("strace").args([
            "-o",
            "/dev/null",
            "-qq",
            &inject,
            "-e",
            &format!("trace={system_call}"),
        ]);
        if follow {
            strace = strace.arg("-f");
        }
        let out = strace
            .arg(crate::common::rootlet_binary())
            .args(["run", "--rm"])
            .args(maps)
            .args(["--", "sh", "-c", "echo x > new; echo ran"])
            .run();
        tries += 1;
        home.rootlet(["prune"]).run().ok();
        home.check_nothing_left();
        if out.code() == 0 {
            survived = true;
            break;
        }
        assert!(!out.errors().contains("panicked"), "{out}");
    }
    assert!(survived && tries > 1, "{tries} times killed at {system_call}");
}

#[test]
fn killed_at_every_clone() {
    killed_at_every("clone,clone3", false);
}

#[test]
fn killed_at_every_open() {
    killed_at_every("openat,openat2", false);
}

#[test]
fn killed_at_every_directory_made_or_removed() {
    killed_at_every("mkdir,mkdirat,unlink,unlinkat,rmdir,rename,renameat,renameat2", false);
}

#[test]
fn killed_at_every_message_of_the_handshake() {
    killed_at_every("sendmsg,recvmsg,sendto,recvfrom", false);
}

#[test]
fn killed_at_every_wait() {
    killed_at_every("poll,ppoll,waitid,wait4", false);
}

#[test]
fn any_process_killed_at_every_mount() {
    killed_at_every("mount,fsmount,move_mount,fsconfig,pivot_root,umount2", true);
}

#[test]
fn any_process_killed_at_every_execve() {
    killed_at_every("execve,execveat", true);
}
