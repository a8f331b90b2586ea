//! A root file system that was made to lead out: CVE-2025-31133, CVE-2025-52565, CVE-2026-41579,
//! CVE-2025-52881 and their kin.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::common::Home;

/// A small root file system whose commands are the host's, by a read-only volume.
fn rootfs(home: &Home) -> PathBuf {
    let root = home.dir("work/rootfs");
    for dir in ["etc", "usr", "tmp"] {
        std::fs::create_dir_all(root.join(dir)).unwrap();
    }
    for link in ["bin", "lib", "lib64", "sbin"] {
        symlink(format!("usr/{link}"), root.join(link)).unwrap();
    }
    root
}

/// Runs a script over it. The host's /usr serves programs.
fn run_over(home: &Home, root: &Path, options: &[&str], script: &str) -> crate::common::Cmd {
    home.run(
        ["--rootfs", root.to_str().unwrap(), "-v", "/usr:/usr:ro"].into_iter().chain(options.iter().copied()),
        ["sh", "-c", script],
    )
}

#[test]
fn links_in_place_of_our_mount_points_lead_nowhere() {
    for own in ["dev", "proc", "sys"] {
        let home = Home::new();
        let root = rootfs(&home);
        let canary = home.dir("work/canary");
        // Absolute and relative, out of the root.
        for target in [
            canary.to_str().unwrap().to_owned(),
            "../canary".into(),
            "../../../../../../../../etc".into(),
            "/".into(),
        ] {
            let link = root.join(own);
            std::fs::remove_file(&link).ok();
            symlink(&target, &link).unwrap();
            let out = run_over(&home, &root, &[], "test -d /proc/1 && test -c /dev/null && test -d /sys/class && echo fine; echo x > /dev/shm/f; touch /dev/new").run();
            assert!(out.code() == 125 || out.text().contains("fine"), "/{own} -> {target}\n{out}");
            assert_eq!(
                std::fs::read_dir(&canary).unwrap().count(),
                0,
                "/{own} -> {target}: something was made outside"
            );
            assert_eq!(std::fs::read_link(&link).unwrap(), Path::new(&target), "the rootfs was changed");
        }
    }
}

#[test]
fn etc_as_a_link_leads_nowhere() {
    let home = Home::new();
    let root = rootfs(&home);
    let canary = home.dir("work/canary");
    std::fs::remove_dir(root.join("etc")).unwrap();
    for target in [canary.to_str().unwrap(), "../canary", "/", "/proc/self/cwd"] {
        std::fs::remove_file(root.join("etc")).ok();
        symlink(target, root.join("etc")).unwrap();
        let out = run_over(&home, &root, &[], "cat /etc/resolv.conf /etc/hosts >/dev/null; echo ran").run();
        assert!([0, 125].contains(&out.code()), "{out}");
        assert_eq!(std::fs::read_dir(&canary).unwrap().count(), 0, "etc -> {target}");
    }
}

#[test]
fn links_in_place_of_injected_files_are_not_written_through() {
    for name in ["resolv.conf", "hosts", "hostname", "passwd", "group", "shadow"] {
        let home = Home::new();
        let root = rootfs(&home);
        let canary = home.file("work/canary", "canary");
        symlink(&canary, root.join("etc").join(name)).unwrap();
        let script = format!("cat /etc/{name} 2>/dev/null; echo from-inside > /etc/{name}; true");
        let out = run_over(&home, &root, &[], &script).run();
        assert!([0, 125].contains(&out.code()), "{out}");
        assert!(!out.text().contains("canary"), "/etc/{name} shows a file of the host\n{out}");
        assert_eq!(std::fs::read_to_string(&canary).unwrap(), "canary", "/etc/{name}");
    }
}

#[test]
fn resolv_conf_is_ours_even_where_the_rootfs_has_a_dangling_link() {
    let home = Home::new();
    let root = rootfs(&home);
    symlink("../run/systemd/resolve/stub-resolv.conf", root.join("etc/resolv.conf")).unwrap();
    let text = run_over(&home, &root, &[], "cat /etc/resolv.conf").run().ok().text();
    assert!(text.contains("nameserver"), "{text}");
}

#[test]
fn a_dev_null_of_the_rootfs_does_not_serve_for_masks() {
    let home = Home::new();
    let root = rootfs(&home);
    std::fs::create_dir(root.join("dev")).unwrap();
    symlink("/proc/sys/kernel/core_pattern", root.join("dev/null")).unwrap();
    let before = std::fs::read("/proc/sys/kernel/core_pattern").unwrap();
    let script = "test -c /dev/null && echo device; wc -c < /proc/keys; head -c 10 /proc/kcore | wc -c; echo '|/bin/x' > /proc/sys/kernel/core_pattern; echo x > /dev/null";
    let out = run_over(&home, &root, &[], script).run();
    assert_eq!(out.text(), "device\n0\n0", "{out}");
    assert_eq!(std::fs::read("/proc/sys/kernel/core_pattern").unwrap(), before);
}

#[test]
fn terminals_of_the_rootfs_are_not_used() {
    let home = Home::new();
    let root = rootfs(&home);
    let canary = home.file("work/canary", "canary");
    std::fs::create_dir_all(root.join("dev/pts")).unwrap();
    for name in ["dev/console", "dev/ptmx", "dev/pts/0", "dev/pts/ptmx", "dev/tty"] {
        symlink(&canary, root.join(name)).unwrap();
    }
    run_over(&home, &root, &["-t"], "tty; test -t 0 && echo terminal").run().ok();
    assert_eq!(std::fs::read_to_string(&canary).unwrap(), "canary");
}

#[test]
fn a_false_proc_of_the_rootfs_is_not_written_to() {
    let home = Home::new();
    let root = rootfs(&home);
    for file in [
        "proc/self/attr/exec",
        "proc/self/uid_map",
        "proc/self/oom_score_adj",
        "proc/sys/kernel/hostname",
        "proc/thread-self/attr/current",
    ] {
        let path = root.join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "false").unwrap();
    }
    run_over(
        &home,
        &root,
        &["--user=0"],
        "grep -q proc /proc/self/mountinfo && cat /proc/self/uid_map > /dev/null",
    )
    .run()
    .ok();
    for file in ["proc/self/attr/exec", "proc/self/uid_map", "proc/self/oom_score_adj"] {
        assert_eq!(std::fs::read_to_string(root.join(file)).unwrap(), "false");
    }
}

#[test]
fn volumes_and_workdirs_through_links_of_the_rootfs_stay_inside() {
    let home = Home::new();
    let root = rootfs(&home);
    let canary = home.dir("work/canary");
    home.file("work/source/file", "x");
    symlink(&canary, root.join("out")).unwrap();
    symlink("../../../../../../..", root.join("up")).unwrap();
    let volume = format!("{}:/out/mounted", home.text("work/source"));
    let out = run_over(&home, &root, &["-v", &volume, "--workdir=/out/mounted/work"], "pwd").run();
    assert!([0, 125].contains(&out.code()), "{out}");
    assert_eq!(std::fs::read_dir(&canary).unwrap().count(), 0, "{out}");
    let out =
        run_over(&home, &root, &["--tmpfs=/up/tmp-of-test"], "touch /up/tmp-of-test/x; ls -d /tmp-of-test")
            .run();
    assert!([0, 125].contains(&out.code()), "{out}");
    assert!(!Path::new("/tmp-of-test").exists());
}

#[test]
fn files_of_the_host_are_not_reached_by_links_and_dots() {
    let home = Home::new();
    let root = rootfs(&home);
    let canary = home.file("work/canary", "canary");
    symlink(&canary, root.join("absolute")).unwrap();
    let up = format!("../../../../../../../../../../{}", canary.display());
    symlink(&up, root.join("relative")).unwrap();
    let script = format!(
        "cat /absolute /relative /{up} /proc/self/root/../{up} /proc/1/root{} 2>/dev/null; cd /tmp; cat {up} 2>/dev/null; echo end",
        canary.display()
    );
    run_over(&home, &root, &[], &script).run().ok().prints("end");
}

#[test]
fn hostile_account_files_do_no_harm() {
    let home = Home::new();
    let root = rootfs(&home);
    let long = "x".repeat(1 << 20);
    std::fs::write(root.join("etc/passwd"), format!("{long}\n:::\nroot:x:99999999999:0\nevil:x:0:0:\n\0\n"))
        .unwrap();
    run_over(&home, &root, &["--user=5"], "true").run();
    std::fs::remove_file(root.join("etc/passwd")).unwrap();
    home.command("mkfifo").arg(root.join("etc/passwd")).run().ok();
    let out = run_over(&home, &root, &["--user=0"], "echo ran").run();
    assert!([0, 125].contains(&out.code()), "{out}");
}
