//! Bad input and hosts that lack something: one screen of error that says what, why and what to
//! do, the right exit status, and nothing left behind (which every [`Home`] checks).

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::files::small_rootfs;
use crate::common::{Cmd, Home, Out, has_id_range, is_root, rootlet_binary, skip};

const NONE: [&str; 0] = [];

/// An error as people should get it.
#[track_caller]
fn is_one_screen(out: &Out) {
    let text = out.errors();
    assert!(text.starts_with("error: "), "{out}");
    assert!(text.lines().count() <= 12, "more than a screen\n{out}");
    for word in ["panicked", "RUST_BACKTRACE", "Os {", "Errno(", "Err("] {
        assert!(!text.contains(word), "{word}\n{out}");
    }
    assert!(out.out.is_empty(), "{out}");
}

/// Fails with this status, an error of one screen that holds the words, and a mending hint.
#[track_caller]
fn refused(command: Cmd, code: i32, words: &[&str]) -> Out {
    let out = command.run().exits(code);
    is_one_screen(&out);
    words.iter().fold(out, |out, word| out.says(word))
}

#[test]
fn an_unknown_option_is_named() {
    let home = Home::new();
    let out = home.rootlet(["run", "--no-such-option", "--", "true"]).run().exits(125);
    assert!(out.errors().contains("--no-such-option"), "{out}");
    let out = home.rootlet(["ls", "--no-such-option"]).run().exits(2);
    assert!(out.errors().contains("--no-such-option"), "{out}");
    home.rootlet(["no-such-command"]).run().exits(2).says("no-such-command");
    home.rootlet(["run", "--timeout", "--", "true"]).run().exits(125);
}

#[test]
fn a_missing_command_or_separator_says_how_to_write_it() {
    let home = Home::new();
    refused(home.rootlet(["run"]), 125, &["hint:", "--"]);
    refused(home.rootlet(["run", "true"]), 125, &["hint:", "rootlet run -- true"]);
    refused(home.rootlet(["run", "alpine", "--", "true"]), 125, &["alpine", "hint:"]);
    refused(home.rootlet(["run", "--", ""]), 125, &["command"]);
}

#[test]
fn a_rootfs_that_is_missing_a_file_or_empty_is_refused() {
    let home = Home::new();
    refused(home.run(["--rootfs=/no/such/rootfs"], ["true"]), 125, &["/no/such/rootfs", "ENOENT", "hint:"]);
    let file = home.file("work/file", "x");
    refused(home.run(["--rootfs", file.to_str().unwrap()], ["true"]), 125, &["file", "directory", "hint:"]);
    let empty = home.dir("work/empty");
    let out = home.run(["--rootfs", empty.to_str().unwrap()], ["true"]).run();
    assert!([125, 127].contains(&out.code()), "{out}");
    is_one_screen(&out);
    out.says("empty");
    assert_eq!(std::fs::read_dir(empty).unwrap().count(), 0);
}

#[test]
fn a_layer_that_does_not_exist_is_refused() {
    let home = Home::new();
    let base = small_rootfs(&home, "base");
    refused(
        home.run(["--layer", &base, "--layer=/no/such/layer"], ["true"]),
        125,
        &["/no/such/layer", "hint:"],
    );
}

#[test]
fn a_layer_that_is_not_readable_is_refused() {
    if is_root() {
        skip!("root reads everything");
    }
    let home = Home::new();
    let base = small_rootfs(&home, "base");
    let closed = home.dir("work/closed");
    std::fs::set_permissions(&closed, PermissionsExt::from_mode(0o000)).unwrap();
    refused(
        home.run(["--layer", &base, "--layer", closed.to_str().unwrap()], ["true"]),
        125,
        &["closed", "EACCES"],
    );
    std::fs::set_permissions(&closed, PermissionsExt::from_mode(0o700)).unwrap();
}

#[test]
fn only_the_last_layer_can_be_written_to() {
    let home = Home::new();
    let base = small_rootfs(&home, "base");
    let (other, upper) = (home.text("work/other"), home.text("work/upper"));
    let writable = format!("{other}:rw");
    refused(home.run(["--layer", &writable, "--layer", &base], ["true"]), 125, &["other:rw", "last layer"]);
    refused(
        home.run(["--layer", &base, "--layer", &writable, "--upper", &upper], ["true"]),
        125,
        &["other:rw", "--upper"],
    );
    assert!(!Path::new(&other).exists());
}

#[test]
fn an_upper_inside_a_lower_or_around_it_is_refused() {
    let home = Home::new();
    let base = small_rootfs(&home, "base");
    let inside = format!("{base}/upper");
    refused(home.run(["--layer", &base, "--upper", &inside], ["true"]), 125, &["upper"]);
    assert!(!Path::new(&inside).exists());
    // Around: the lower would be inside what is written.
    refused(home.run(["--layer", &base, "--upper", &home.text("work")], ["true"]), 125, &["upper"]);
    refused(home.run(["--layer", &base, "--upper", &base], ["true"]), 125, &["upper"]);
    let link = home.path("work/link");
    std::os::unix::fs::symlink(&base, &link).unwrap();
    refused(
        home.run(["--layer", &base, "--upper", &format!("{}/upper", link.display())], ["true"]),
        125,
        &["upper"],
    );
}

#[test]
fn an_upper_that_cannot_be_made_is_refused() {
    let home = Home::new();
    let file = home.file("work/file", "x");
    refused(home.run(["--upper", file.to_str().unwrap()], ["true"]), 125, &["file"]);
    refused(home.run(["--upper", "/no/such/parent/upper"], ["true"]), 125, &["/no/such/parent"]);
    if !is_root() {
        refused(home.run(["--upper", "/etc/upper-of-a-test"], ["true"]), 125, &["/etc/upper-of-a-test"]);
    }
}

#[test]
fn commands_that_cannot_be_executed_are_told_apart() {
    let home = Home::new();
    refused(home.run(NONE, ["no-such-command"]), 127, &["no-such-command", "hint:"]);
    let plain = home.file("work/plain", "x");
    refused(home.run(NONE, [&plain]), 126, &["plain", "EACCES", "hint:"]);
    refused(home.run(NONE, ["/usr"]), 126, &["/usr", "directory"]);
    let script = home.script("work/script", "#!/no/such/interpreter\n");
    let out = home.run(NONE, [&script]).run();
    assert!([126, 127].contains(&out.code()), "{out}");
    is_one_screen(&out);
    out.says("/no/such/interpreter");
    let empty = home.script("work/garbage", "\x7fELF garbage");
    refused(home.run(NONE, [&empty]), 126, &["garbage", "ENOEXEC"]);
}

#[test]
fn what_is_said_of_a_command_is_true_of_the_payload() {
    let home = Home::new();
    // Init has more descriptors, and other threads.
    for command in ["/proc/self/fd/3", "/proc/self/fd/5", "/proc/self/task/1/exe"] {
        refused(home.run(NONE, [command]), 127, &[command, "ENOENT"]);
    }
}

#[test]
fn a_command_is_not_looked_for_where_the_payload_is_not() {
    if !has_id_range() {
        skip!("with one id there is no user who cannot enter the directory");
    }
    let home = Home::new();
    let hidden = home.dir("work/hidden");
    home.script("work/hidden/command", "#!/no/such/interpreter\n");
    std::fs::set_permissions(&hidden, PermissionsExt::from_mode(0o700)).unwrap();
    refused(home.run(["--user=1234:1234"], ["./command"]).cwd(&hidden), 127, &["./command", "ENOENT"]);
    let root = home.run(NONE, ["./command"]).cwd(&hidden);
    refused(root, 126, &["./command", "/no/such/interpreter"]);
}

#[test]
fn a_busy_port_says_what_to_do() {
    let home = Home::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    refused(
        home.run(["-p", &format!("127.0.0.1:{port}:80")], ["true"]),
        125,
        &["EADDRINUSE", "hint:", &port.to_string(), &format!("(pid {}) has it", std::process::id())],
    );
    refused(home.run(["-p", "nonsense"], ["true"]), 125, &["publish", "nonsense"]);
    refused(home.run(["-p", "80:80/sctp"], ["true"]), 125, &["sctp"]);
    refused(home.run(["-p", "80:80", "--network=none"], ["true"]), 125, &["publish", "network none"]);
}

#[test]
fn volumes_that_cannot_be_are_refused() {
    let home = Home::new();
    refused(home.run(["-v", "/no/such/source:/mnt"], ["true"]), 125, &["/no/such/source"]);
    refused(home.run(["-v", "name:/mnt"], ["true"]), 125, &["named volumes"]);
    refused(home.run(["-v", "/tmp:/proc/x"], ["true"]), 125, &["/proc"]);
    refused(home.run(["-v", "/tmp:relative"], ["true"]), 125, &["absolute"]);
    refused(home.run(["-v", "/tmp:/a/../../b"], ["true"]), 125, &[".."]);
    refused(home.run(["-v", "/tmp:/mnt:zz"], ["true"]), 125, &["ro"]);
    refused(home.run(["-v", "/tmp:/mnt", "--tmpfs=/mnt"], ["true"]), 125, &["/mnt"]);
    refused(home.run(["-v", "/etc/passwd:/usr"], ["true"]), 125, &["/usr"]);
}

#[test]
fn values_that_are_nonsense_are_refused_by_field() {
    let home = Home::new();
    for (option, field) in [
        ("--name=UPPER", "name"),
        ("--name=last", "name"),
        ("--name=../x", "name"),
        ("--hostname=a_b", "hostname"),
        ("--hostname=", "hostname"),
        ("--domainname=a b", "domainname"),
        ("--timeout=never", "timeout"),
        ("--timeout=0", "timeout"),
        ("--user=:", "user"),
        ("--user=4294967295", "user"),
        ("--uidmap=x", "uidmap"),
        ("--tmpfs=/mnt:size=much", "tmpfs"),
        ("--tmpfs=/", "tmpfs"),
        ("--env==x", "env"),
    ] {
        refused(home.run([option], ["true"]), 125, &[field]);
    }
    refused(home.run(["--env-file=/no/such/file"], ["true"]), 125, &["/no/such/file"]);
    refused(home.run(["--network=nonsense"], ["true"]), 125, &["nonsense"]);
}

#[test]
fn a_current_directory_that_is_gone_is_no_panic() {
    let home = Home::new();
    let dir = home.text("work/gone");
    let script =
        format!("mkdir {dir}; cd {dir}; rmdir {dir}; {} run --rm -- pwd", rootlet_binary().display());
    let out = home.command("sh").args(["-c", &script]).run();
    assert!([0, 125].contains(&out.code()), "{out}");
    assert!(!out.errors().contains("panicked"), "{out}");
}

/// A shell as root of a user and mount namespace, to take something away from the host.
fn in_namespaces(home: &Home, script: &str) -> Cmd {
    let unshare: &[&str] = if is_root() { &["--mount"] } else { &["--user", "--map-root-user", "--mount"] };
    home.command("unshare").args(unshare).args(["sh", "-ec", script]).env("ROOTLET", rootlet_binary())
}

#[test]
fn a_full_disk_is_told_and_nothing_is_left() {
    let home = Home::new();
    let state = home.text("state");
    let script = format!(
        "mount -t tmpfs -o size=64k,nr_inodes=100 none {state}; head -c 1M /dev/zero > {state}/filler 2>/dev/null || true
         \"$ROOTLET\" run --rm -- true"
    );
    refused(in_namespaces(&home, &script), 125, &["ENOSPC", "hint:"]);
    // Enough room for a box, but not for what the command writes: its own error.
    let script = format!(
        "mount -t tmpfs -o size=2m none {state}
         \"$ROOTLET\" run --rm -- sh -c 'head -c 10M /dev/zero > big; echo status $?; rm -f big; echo x > small && cat small'
         ls -A {state}/rootlet/boxes"
    );
    let out = in_namespaces(&home, &script).run().ok();
    assert_eq!(out.text(), "status 1\nx", "{out}");
    assert!(out.errors().contains("No space left"), "{out}");
}

#[test]
fn a_state_directory_on_a_read_only_file_system_is_told() {
    let home = Home::new();
    let state = home.text("state");
    let script = format!("mount -t tmpfs -o ro none {state}; \"$ROOTLET\" run --rm -- true");
    refused(in_namespaces(&home, &script), 125, &["EROFS", "XDG_STATE_HOME"]);
}

/// A /dev with these devices only.
fn with_devices(home: &Home, devices: &[&str]) -> String {
    let dev = home.text("dev");
    std::fs::create_dir_all(&dev).unwrap();
    let mut script = format!("mount -t tmpfs none {dev}\n");
    for device in devices {
        script += &format!(
            "mkdir -p $(dirname {dev}/{device}); : > {dev}/{device}; mount --bind /dev/{device} {dev}/{device}\n"
        );
    }
    script + &format!("mount --rbind {dev} /dev\n")
}

const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];

#[test]
fn without_dev_fuse_the_error_says_how_to_get_it() {
    let home = Home::new();
    let devices: Vec<&str> = DEVICES.into_iter().chain(["net/tun"]).collect();
    let script = with_devices(&home, &devices);
    refused(
        in_namespaces(&home, &format!("{script}\"$ROOTLET\" run --rm -- true")),
        125,
        &["/dev/fuse", "hint:", "modprobe fuse"],
    );
    let doctor = in_namespaces(&home, &format!("{script}\"$ROOTLET\" doctor")).run().exits(1);
    assert!(doctor.text().contains("modprobe fuse"), "{doctor}");
}

#[test]
fn without_dev_net_tun_the_error_says_how_to_get_it_or_do_without() {
    let home = Home::new();
    let devices: Vec<&str> = DEVICES.into_iter().chain(["fuse"]).collect();
    let script = with_devices(&home, &devices);
    refused(
        in_namespaces(&home, &format!("{script}\"$ROOTLET\" run --rm -- true")),
        125,
        &["tun", "hint:", "modprobe tun"],
    );
    in_namespaces(&home, &format!("{script}\"$ROOTLET\" run --rm --network none -- echo without"))
        .run()
        .ok()
        .prints("without");
    let doctor = in_namespaces(&home, &format!("{script}\"$ROOTLET\" doctor")).run();
    assert!(doctor.text().contains("modprobe tun"), "{doctor}");
}

#[test]
fn forbidden_user_namespaces_are_told_with_the_sysctl() {
    let home = Home::new();
    // The limit counts per user namespace: an outer one in which no further may be made. It must
    // be one in which the caller is an ordinary user again, since root is above some limits.
    let script = "echo 0 > /proc/sys/user/max_user_namespaces; \"$ROOTLET\" run --rm -- true";
    let outer = |script: &str| {
        home.command("unshare")
            .args(["--user", "--map-root-user", "sh", "-ec", script])
            .env("ROOTLET", rootlet_binary())
    };
    refused(outer(script), 125, &["ENOSPC", "user.max_user_namespaces", "hint:"]);
    let doctor = outer("echo 0 > /proc/sys/user/max_user_namespaces; \"$ROOTLET\" doctor").run().exits(1);
    assert!(doctor.text().contains("max_user_namespaces"), "{doctor}");
}

#[test]
fn a_file_limit_that_is_too_low_is_no_hang() {
    let home = Home::new();
    let script = format!("ulimit -n 12; {} run --rm -- true", rootlet_binary().display());
    let out = home.command("sh").args(["-c", &script]).run();
    if out.code() != 0 {
        assert_eq!(out.code(), 125, "{out}");
        is_one_screen(&out);
    }
}

#[test]
fn a_hung_id_map_helper_is_given_up() {
    if !crate::common::has_subids() {
        skip!("without subordinate ids no helper is asked");
    }
    let home = Home::new();
    // A helper that never answers, in front of the real one.
    let script = "for h in newuidmap newgidmap; do printf '#!/bin/sh\\nexec sleep 1000\\n' > $1/$h; chmod 4755 $1/$h; done";
    let dir = home.dir("work/helpers");
    home.command("sh").args(["-c", script, "sh"]).arg(&dir).run().ok();
    let path = format!("{}:{}", dir.display(), "/usr/sbin:/usr/bin:/sbin:/bin");
    // Not set-user-ID root, so it must not be taken at all.
    home.run(NONE, ["true"]).env("PATH", path).run().ok();
}
