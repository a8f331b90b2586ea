//! CVE-2024-21626, CVE-2016-9962: no descriptor or directory of the host is left to the payload.

use crate::common::{Home, rootlet_binary};

const NONE: [&str; 0] = [];

#[test]
fn a_workdir_below_proc_self_fd_is_refused() {
    let home = Home::new();
    for number in 0..32 {
        let option = format!("--workdir=/proc/self/fd/{number}");
        let out = home.run([&option], ["pwd", "-P"]).run();
        assert_eq!(out.code(), 125, "{option}\n{out}");
    }
    for path in ["/proc/1/cwd", "/proc/1/root", "/proc/self/cwd", "/proc/thread-self/root/.."] {
        let out = home.run([&format!("--workdir={path}")], ["sh", "-c", "pwd -P; ls /"]).run();
        assert!(out.code() == 125 || !out.text().contains("(unreachable)"), "{path}\n{out}");
    }
}

#[test]
fn a_workdir_that_is_a_link_to_a_descriptor_is_refused() {
    let home = Home::new();
    for number in 3..16 {
        let link = home.path(format!("work/link-{number}"));
        std::os::unix::fs::symlink(format!("/proc/self/fd/{number}"), &link).unwrap();
        let out = home
            .run([format!("--workdir={}", link.display())], ["cat", "../../../../../../etc/hostname"])
            .run();
        assert_eq!(out.code(), 125, "{out}");
    }
}

#[test]
fn every_workdir_number_up_to_1023_is_refused() {
    let home = Home::new();
    // One sandbox suffices: the command tries what a workdir would.
    let script = "
import os
for n in range(3, 1024):
    for path in (f'/proc/self/fd/{n}', f'/proc/1/fd/{n}'):
        try:
            os.chdir(path)
            print('entered', path, os.getcwd())
        except OSError:
            pass
print('end')
";
    home.python(NONE, script).run().ok().prints("end");
}

#[test]
fn only_the_standard_streams_are_inherited() {
    let home = Home::new();
    let secret = home.file("work/secret", "canary");
    // A descriptor that the caller forgot to close, without close-on-exec.
    let script = format!(
        "exec 7<{0} 8<>{0} 9</ 77</etc; {1} run --rm -- sh -c 'ls -l /proc/self/fd; cat <&7; cat /proc/self/fd/9/etc/hostname' 2>&1",
        secret.display(),
        rootlet_binary().display()
    );
    let out = home.command("bash").args(["-c", &script]).run();
    assert!(!out.text().contains("canary"), "{out}");
    assert!(!out.text().contains(" 77 ->"), "{out}");
    let numbers: Vec<&str> = out
        .text()
        .lines()
        .filter_map(|line| line.split(" -> ").next()?.split_ascii_whitespace().nth(8).map(str::to_owned))
        .map(|s| &*s.leak())
        .collect();
    // 0 to 2, and the one by which ls reads the directory.
    assert!(numbers.iter().all(|number| ["0", "1", "2", "3"].contains(number)), "{out}");
    // Outside the same descriptors are there.
    let outside = format!("exec 7<{}; cat <&7", secret.display());
    home.command("bash").args(["-c", &outside]).run().ok().prints("canary");
}

#[test]
fn the_working_directory_is_inside_the_root() {
    let home = Home::new();
    let script =
        "readlink /proc/self/cwd; cd /proc/self/cwd/../../../../../../..; pwd -P; ls -d /proc/self/root/";
    let text = home.sh(NONE, script).run().ok().text();
    assert_eq!(text, format!("{}\n/\n/proc/self/root/", home.text("work")));
}

#[test]
fn a_directory_as_a_standard_stream_is_no_way_out() {
    let home = Home::new();
    let dir = home.dir("work/canary");
    home.file("work/secret", "canary");
    let attack = "cat /proc/self/fd/0/../secret; touch /proc/self/fd/0/hit";
    let outside =
        home.command("sh").args(["-c", attack]).stdin_from(std::fs::File::open(&dir).unwrap()).run();
    assert!(outside.text() == "canary" && dir.join("hit").exists(), "{outside}");
    std::fs::remove_file(dir.join("hit")).unwrap();
    // The host's file is seen through the overlay anyway; what must not be is a write past it.
    for options in [&[][..], &["-i"]] {
        let out = home.sh(options, attack).stdin_from(std::fs::File::open(&dir).unwrap()).run();
        assert!(!dir.join("hit").exists(), "a directory as standard input is a way out\n{out}");
    }
}
