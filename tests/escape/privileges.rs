//! What the payload is: capabilities, no_new_privs, set-user-ID files, groups.

use crate::common::{Home, has_id_range, is_root, rootlet_binary, skip};

const NONE: [&str; 0] = [];

/// Docker's default set, which docs/security-model.md names.
const KEPT: u64 = 0xa804_25fb;

fn status(home: &Home, options: &[&str], field: &str) -> String {
    let text = home.run(options, ["cat", "/proc/self/status"]).run().ok().text();
    let line =
        text.lines().find(|line| line.starts_with(&format!("{field}:"))).unwrap_or_else(|| panic!("{text}"));
    line.split_once(':').unwrap().1.trim().to_owned()
}

#[test]
fn capability_sets_are_the_documented_default() {
    let home = Home::new();
    let hex = |text: String| u64::from_str_radix(&text, 16).unwrap();
    assert_eq!(hex(status(&home, &[], "CapInh")), 0);
    assert_eq!(hex(status(&home, &[], "CapAmb")), 0);
    assert_eq!(hex(status(&home, &[], "CapBnd")), KEPT);
    assert_eq!(hex(status(&home, &[], "CapPrm")), KEPT);
    assert_eq!(hex(status(&home, &[], "CapEff")), KEPT);
}

#[test]
fn another_user_has_no_capability() {
    let home = Home::new();
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(status(&home, &["--user=1000:1000"], set), "0000000000000000", "{set}");
    }
}

#[test]
fn no_new_privs_and_a_filter_are_in_force() {
    let home = Home::new();
    for options in [&[][..], &["--nested"], &["--user=1000:1000"], &["--network=host"]] {
        assert_eq!(status(&home, options, "NoNewPrivs"), "1", "{options:?}");
        assert_eq!(status(&home, options, "Seccomp"), "2", "{options:?}");
    }
}

#[test]
fn a_setuid_file_gives_nothing() {
    if !has_id_range() {
        skip!("with one id there is nobody to be set to");
    }
    let home = Home::new();
    let script = "
cp /usr/bin/id /tmp/id && chown 0:0 /tmp/id && chmod 6755 /tmp/id && chmod 777 /tmp
cp /usr/bin/id /tmp/id2 && chown 7:7 /tmp/id2 && chmod 6755 /tmp/id2
setpriv --reuid=33 --regid=33 --clear-groups /tmp/id -u
/tmp/id2 -u
";
    home.sh(NONE, script).run().ok().prints("33\n0");
}

#[test]
fn setuid_programs_of_the_host_give_nothing() {
    let home = Home::new();
    let script = "for p in /usr/bin/su /usr/bin/sudo /usr/bin/newuidmap /usr/bin/passwd; do test -u $p && echo $p is setuid; done; grep -E '^(CapEff|NoNewPrivs)' /proc/self/status";
    let text = home.run(["--user=1000:1000"], ["sh", "-c", script]).run().ok().text();
    assert!(text.contains("CapEff:\t0000000000000000") && text.contains("NoNewPrivs:\t1"), "{text}");
}

#[test]
fn file_capabilities_give_nothing() {
    if !crate::common::has_program("setcap") {
        skip!("setcap is not installed");
    }
    let home = Home::new();
    let script = "cp /bin/cat /tmp/cat; chmod 755 /tmp/cat; setcap cap_sys_admin+ep /tmp/cat 2>/dev/null; /tmp/cat /proc/self/status | grep CapEff";
    let out = home.sh(NONE, script).run().ok();
    assert!(out.text().ends_with("00000000a80425fb"), "{out}");
}

#[test]
fn root_inside_is_not_root_on_the_hosts_files() {
    if is_root() {
        skip!("root is root on files, as the plan says");
    }
    let home = Home::new();
    // What fake root may write of the caller's is copy-on-write, and what the caller cannot write
    // on a volume he cannot write as fake root either.
    home.run(["-v", "/etc:/mnt"], ["sh", "-c", "touch /mnt/rootlet-was-here 2>/dev/null && echo wrote; echo x 2>/dev/null >> /mnt/passwd && echo appended; cat /mnt/shadow 2>/dev/null && echo read; true"])
        .run()
        .ok()
        .prints("");
}

/// Reads a file, then again after it has left its groups by every way there is.
const LEAVE: &str = r#"
import os, sys
def attempt(when):
    for path in sys.argv[1:]:
        try:
            print(when, path, open(path).read())
        except OSError as error:
            print(when, path, error.errno)
attempt('before')
for leave in (lambda: os.setgroups([]), lambda: os.setgroups([1]), lambda: os.setresgid(1, 1, 1), lambda: os.setresuid(1, 1, 1)):
    try: leave()
    except OSError: pass
    attempt('after')
"#;

#[test]
fn a_file_denied_to_a_group_stays_denied() {
    // CVE-2014-8989: leaving a group must not open what is denied to it, and to it alone. The file belongs
    // to another user, and to a group of the caller's.
    let home = Home::new();
    let denied = home.file("work/denied", "canary");
    let path = denied.to_str().unwrap();
    let volume = format!("{}:/mnt", home.text("work"));
    let attack = ["run", "--rm", "-v", &volume, "--", "python3", "-c", LEAVE];
    let own_program = rootlet_binary();
    if is_root() {
        // A user of no account with a supplementary group, whose sandbox has one id.
        let (user, group) = ("--reuid=54321", "54322");
        let state = home.dir("work/state-of-user");
        home.command("chown").args(["54321:54321"]).arg(&state).run().ok();
        home.command("chown").args([&format!("1:{group}")]).arg(&denied).run().ok();
        home.command("chmod").arg("604").arg(&denied).run().ok();
        let become_user = |groups: &str| home.command("setpriv").args([user, "--regid=54321", groups, "--"]);
        let inside = become_user(&format!("--groups={group}"))
            .arg(&own_program)
            .args(attack)
            .args([path, "/mnt/denied"])
            .env("XDG_STATE_HOME", &state)
            .run()
            .ok();
        assert!(inside.text().lines().count() == 10 && !inside.text().contains("canary"), "{inside}");
        // Outside, where nothing keeps him from it, leaving the group is all it takes.
        become_user(&format!("--groups={group}"))
            .args(["cat", path])
            .run()
            .exits(1)
            .says("Permission denied");
        become_user("--clear-groups").args(["cat", path]).run().ok().prints("canary");
    } else if has_id_range() {
        // Somebody else's is what a sandbox makes so on a volume.
        let give_away = "chown 1:0 /mnt/denied && chmod 604 /mnt/denied";
        home.sh(["-v", &volume], give_away).run().ok();
        home.command("cat").arg(path).run().exits(1).says("Permission denied");
        let inside = home.rootlet(attack).args([path]).run().ok();
        assert!(inside.text().lines().count() == 5 && !inside.text().contains("canary"), "{inside}");
        // On a volume the kernel alone decides, and it lets who has a range leave groups, as
        // docs/security-model.md says.
        let on_volume = home.rootlet(attack).args(["/mnt/denied"]).run().ok();
        assert!(on_volume.text().contains("canary"), "{on_volume}");
    } else {
        skip!("with one id nobody can make a file of another user");
    }
}

#[test]
fn groups_can_be_left_only_where_a_range_was_given() {
    let home = Home::new();
    let text = home.run(NONE, ["cat", "/proc/self/setgroups"]).run().ok().text();
    assert_eq!(text, if has_id_range() { "allow" } else { "deny" });
}
