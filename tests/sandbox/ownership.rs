//! Owners, modes and devices that the caller could not make: recorded, shown, kept, and every
//! file on disk still the caller's own.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use super::files::small_rootfs;
use crate::common::{Home, has_id_range, is_root, uid};

const NONE: [&str; 0] = [];

/// The owner that `stat` shows inside for a recorded one: with a single id there is only that.
fn shown(id: u32) -> u32 {
    if has_id_range() { id } else { 0 }
}

#[test]
fn chown_to_any_id_succeeds() {
    let home = Home::new();
    let script =
        "touch f; chown 33:44 f && chown -h 1000:1000 f && chgrp 7 f && chown 65534 f && stat -c '%u %g' f";
    home.sh(NONE, script).run().ok().prints(&format!("{} {}", shown(65534), shown(7)));
}

#[test]
fn chown_of_the_hosts_files_succeeds_and_does_not_reach_them() {
    let home = Home::new();
    let before = std::fs::metadata("/etc/passwd").unwrap();
    home.file("work/mine", "x");
    home.sh(NONE, "chown 12:13 /etc/passwd mine && chmod 600 /etc/passwd && chown -R 5:5 /etc/cron.d 2>/dev/null || test ! -d /etc/cron.d")
        .run()
        .ok();
    let after = std::fs::metadata("/etc/passwd").unwrap();
    assert_eq!((before.uid(), before.mode(), before.ctime()), (after.uid(), after.mode(), after.ctime()));
    assert_eq!(std::fs::metadata(home.path("work/mine")).unwrap().uid(), uid());
}

#[test]
fn chown_alone_shows_as_metadata_in_diff() {
    let home = Home::new();
    let file = home.file("work/f", "x");
    home.rootlet(["run", "--name=owned", "--", "chown", "33:33", "f"]).run().ok();
    home.keeps("owned");
    let text = home.rootlet(["diff", "owned"]).run().ok().text();
    assert!(text.lines().any(|line| line == format!("m {}", file.display())), "{text}");
}

#[test]
fn a_recorded_owner_is_there_again_in_the_next_run() {
    let home = Home::new();
    let upper = home.text("work/upper");
    home.run(["--upper", &upper], ["sh", "-c", "touch f; chown 33:44 f; chmod 4751 f"]).run().ok();
    home.run(["--upper", &upper], ["stat", "-c", "%u %g %a", "f"]).run().ok().prints(&format!(
        "{} {} 4751",
        shown(33),
        shown(44)
    ));
    for name in home.boxes() {
        home.keeps(&name);
    }
}

#[test]
fn device_nodes_of_any_number_can_be_made_and_are_recorded() {
    let home = Home::new();
    let upper = home.text("work/upper");
    let script = "mknod c c 1 3 && mknod b b 8 1 && mknod p p && mknod big c 4000 70000 && stat -c '%F %t %T' c b p big";
    let out = home.rootlet(["run", "--upper", &upper, "--", "sh", "-c", script]).run().ok();
    assert_eq!(
        out.text(),
        "character special file 1 3\nblock special file 8 1\nfifo 0 0\ncharacter special file fa0 11170"
    );
    // No device on the disk.
    let work = Path::new(&upper).join(home.text("work").trim_start_matches('/'));
    let kinds = home.command("find").arg(&work).args(["-type", "b", "-o", "-type", "c"]).run().ok();
    assert_eq!(kinds.text(), "");
    let name = home.boxes().into_iter().next().unwrap();
    let diff = home.rootlet(["diff", &name]).run().ok().text();
    assert!(diff.lines().any(|line| line.ends_with("/work/big") && line.starts_with("A ")), "{diff}");
    home.keeps(&name);
}

#[test]
fn a_device_node_that_was_made_does_not_open_a_device() {
    let home = Home::new();
    home.sh(NONE, "mknod disk b 8 0; mknod mem c 1 1; head -c 1 disk; head -c 1 mem; mknod null c 1 3; head -c 1 null; cat disk mem >&2")
        .run()
        .exits(1);
}

#[test]
fn tar_unpacks_owners_and_modes() {
    let home = Home::new();
    let script = "
set -e
mkdir t; cd t; echo x > a; mkdir d; chmod 1777 d; echo y > d/b; ln -s a l; ln a h; mknod dev c 5 1
chown 33:33 a; chown -h 10:11 l; chown 42:0 d; chmod 4755 d/b
cd ..; tar --numeric-owner -cpf t.tar t; mkdir out; tar -xpf t.tar -C out --same-owner --numeric-owner
cd out/t; stat -c '%n %F %u %g %a' a d d/b l dev; stat -c %h a
";
    let (u33, u42, u10, u11) = (shown(33), shown(42), shown(10), shown(11));
    home.sh(NONE, script).run().ok().prints(&format!(
        "a regular file {u33} {u33} 644\nd directory {u42} 0 1777\nd/b regular file 0 0 4755\n\
         l symbolic link {u10} {u11} 777\ndev character special file 0 0 644\n2"
    ));
}

#[test]
fn install_sets_owner_and_mode() {
    let home = Home::new();
    let script = "echo x > f; install -o 33 -g 44 -m 2750 f /usr/local/bin/installed && install -d -o 5 -g 5 -m 700 /opt/dir && stat -c '%u %g %a' /usr/local/bin/installed /opt/dir";
    home.sh(NONE, script).run().ok().prints(&format!(
        "{} {} 2750\n{} {} 700",
        shown(33),
        shown(44),
        shown(5),
        shown(5)
    ));
}

#[test]
fn useradd_makes_a_system_user() {
    let home = Home::new();
    let script = "useradd --system --home-dir /var/lib/testd --create-home --shell /usr/sbin/nologin testd && getent passwd testd && stat -c %n /var/lib/testd && grep -c ^testd: /etc/shadow";
    let out = home.sh(NONE, script).run().ok();
    assert!(out.text().contains("testd:x:") && out.text().ends_with("/var/lib/testd\n1"), "{out}");
}

#[test]
fn shadow_is_not_the_hosts() {
    if is_root() {
        crate::common::skip!("root may read it anyway");
    }
    let home = Home::new();
    let out =
        home.sh(NONE, "cat /etc/shadow && touch /etc/shadow && echo x:*:1:::::: >> /etc/shadow").run().ok();
    assert!(out.text().contains("root:*:"), "{out}");
}

#[test]
fn what_the_caller_may_not_read_stays_unreadable() {
    if is_root() {
        crate::common::skip!("root may read everything");
    }
    let home = Home::new();
    // Fake root must not see more than the caller: /etc/ssl/private, root's home.
    for path in ["/root", "/etc/ssl/private"] {
        if std::fs::read_dir(path).is_ok() || !Path::new(path).exists() {
            continue;
        }
        // It may be listed as an empty directory that can be written.
        home.run(NONE, ["ls", "-A", path]).run().ok().prints("");
    }
}

#[test]
fn directories_the_caller_may_not_read_are_empty_and_writable() {
    if is_root() {
        crate::common::skip!("root may read everything");
    }
    let home = Home::new();
    let closed = ["/var/cache/ldconfig", "/etc/ssl/private", "/var/lib/apt/lists/partial", "/root"];
    let closed: Vec<&str> = closed
        .into_iter()
        .filter(|path| Path::new(path).exists() && std::fs::read_dir(path).is_err())
        .collect();
    if closed.is_empty() {
        crate::common::skip!("this host has no such directory");
    }
    for path in closed {
        let script = format!("ls -A {path} && touch {path}/new && echo x > {path}/new && ls -A {path}");
        home.rootlet(["run", "--name", "closed", "--", "sh", "-euc", &script]).run().ok().prints("new");
        // Nor may the attributes of such a directory be read, which `diff` compares.
        let diff = home.rootlet(["diff", "closed"]).run().ok();
        assert!(diff.text().lines().any(|line| line == format!("A {path}/new")), "{path}: {diff}");
        home.rootlet(["rm", "closed"]).run().ok();
    }
}

#[test]
fn dpkg_installs_a_package_with_maintainer_scripts() {
    crate::common::need!("dpkg-deb");
    let home = Home::new();
    let script = "
set -e
mkdir -p p/DEBIAN p/usr/share/rootlet-test p/var/lib/rootlet-test
printf 'Package: rootlet-test\\nVersion: 1\\nArchitecture: all\\nMaintainer: a <a@b>\\nDescription: x\\n' > p/DEBIAN/control
printf '#!/bin/sh\\nset -e\\nadduser --system --group --quiet --home /var/lib/rootlet-test rt 2>/dev/null || useradd --system --user-group rt\\nchown rt:rt /var/lib/rootlet-test\\n' > p/DEBIAN/postinst
chmod 755 p/DEBIAN/postinst
echo content > p/usr/share/rootlet-test/file
dpkg-deb --root-owner-group -b p p.deb >/dev/null
dpkg -i p.deb >/dev/null
dpkg -s rootlet-test | grep ^Status
cat /usr/share/rootlet-test/file
getent passwd rt | cut -d: -f1
";
    home.sh(NONE, script)
        .deadline(Duration::from_secs(180))
        .run()
        .ok()
        .prints("Status: install ok installed\ncontent\nrt");
    assert!(!Path::new("/usr/share/rootlet-test").exists());
}

#[test]
fn everything_on_disk_belongs_to_the_caller_and_rm_rf_removes_it() {
    let home = Home::new();
    let script = "
mkdir -p a/b; touch a/b/f; chown -R 33:33 a; chmod 000 a/b/f; mknod a/dev c 1 3; ln -s x a/l; chown -h 5 a/l
mkdir s; chmod 1777 s; chown 12 s; mkfifo s/p; chmod 0 s/p
";
    home.rootlet(["run", "--name=mine", "--", "sh", "-c", script]).run().ok();
    let dir = home.boxes_dir().join("mine");
    let foreign = home.command("find").arg(&dir).args(["!", "-uid", &uid().to_string()]).run().ok();
    assert_eq!(foreign.text(), "");
    home.command("rm").arg("-rf").arg(&dir).run().ok();
    assert!(!dir.exists());
}

#[test]
fn owners_are_kept_over_a_rootfs() {
    let home = Home::new();
    let rootfs = small_rootfs(&home, "rootfs");
    let upper = home.text("work/upper");
    let run = |command: &[&str]| home.run(["--rootfs", &rootfs, "--upper", &upper], command).run().ok();
    run(&["stat", "-c", "%u %g", "/etc/passwd"]).prints("0 0");
    run(&["sh", "-c", "touch /f; mkdir /d"]);
    let out = run(&["stat", "-c", "%u %g", "/f", "/d"]);
    assert_eq!(out.text(), "0 0\n0 0");
    for name in home.boxes() {
        home.keeps(&name);
    }
}

#[test]
fn another_user_inside_has_no_more_than_his_rights() {
    if !has_id_range() {
        crate::common::skip!("only one id exists without subordinate ids");
    }
    let home = Home::new();
    let script = "
touch /tmp/roots; chmod 600 /tmp/roots; mkdir -m 777 /tmp/open
setpriv --reuid=33 --regid=33 --clear-groups sh -c 'cat /tmp/roots 2>/dev/null && echo read it; touch /tmp/open/f && stat -c %u /tmp/open/f; chown 0 /tmp/open/f 2>/dev/null && echo gave it away; touch /etc/x 2>/dev/null && echo wrote'
true";
    home.sh(NONE, script).run().ok().prints("33");
}
