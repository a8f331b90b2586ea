//! Values of variables reach the payload and nobody else: no process list, no file, no log, no message.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt};

use crate::common::{Home, is_root, uid};

/// By `--env NAME`, by `--env-file`, and from the caller's environment. (The second test has another word: its
/// command lines, which hold it, are on the process list meanwhile.)
const SECRETS: [&str; 3] = ["unsaid-word-by-name", "unsaid-word-by-file", "unsaid-word-by-caller"];

#[track_caller]
fn has_no(secret: &str, text: impl AsRef<[u8]>, what: &str) {
    let text = String::from_utf8_lossy(text.as_ref()).into_owned();
    assert!(!text.contains(secret), "{what} tells a secret: {text}");
}

/// /proc/PID of every process, with the numbers of those in this group.
fn all_processes(group: i32) -> Vec<(i32, bool)> {
    let pids = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let in_group = |pid: i32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields = stat.rsplit_once(") ").map(|(_, fields)| fields.to_owned()).unwrap_or_default();
        fields.split(' ').nth(2) == Some(&group.to_string())
    };
    pids.map(|pid| (pid, in_group(pid))).collect()
}

#[test]
fn values_of_variables_are_seen_by_the_payload_alone() {
    let home = Home::new();
    let file = home.file("work/variables", format!("BY_FILE={}\n", SECRETS[1]));
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
    let log = home.text("work/log");
    let report = home.text("work/report");
    let script = "echo $BY_NAME $BY_FILE $BY_CALLER; echo ready; cat; touch made; exit 3";
    let running = home
        .rootlet(["--log-level=trace", &format!("--log-file={log}"), "run", "--name=secrets"])
        .args([
            &format!("--report={report}"),
            "--env=BY_NAME",
            "--env-file=variables",
            "--",
            "sh",
            "-c",
            script,
        ])
        .env("BY_NAME", SECRETS[0])
        .env("BY_CALLER", SECRETS[2])
        .stdin_open()
        .start();
    // The payload has them.
    assert!(running.until_out("ready").starts_with(&SECRETS.join(" ")));
    let mut ours = 0;
    for (pid, in_group) in all_processes(running.pid().as_raw()) {
        has_no(
            "unsaid-word",
            std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default(),
            "a process list",
        );
        has_no(
            "unsaid-word",
            std::fs::read(format!("/proc/{pid}/comm")).unwrap_or_default(),
            "a process list",
        );
        let environ = format!("/proc/{pid}/environ");
        if in_group && let Ok(meta) = std::fs::metadata(&environ) {
            ours += 1;
            // Nobody but the caller opens it, and for what is not dumpable it is root's.
            assert_eq!(meta.mode() & 0o777, 0o400, "{environ}");
            assert!([0, uid()].contains(&meta.uid()), "{environ}");
            if is_root() {
                let stranger = ["--reuid=54321", "--regid=54321", "--clear-groups", "cat", environ.as_str()];
                let out = home.command("setpriv").args(stranger).run();
                has_no("unsaid-word", &out.out, &environ);
                assert_ne!(out.code(), 0, "{out}");
            }
        }
    }
    assert!(ours >= 2, "supervisor and init are in the group");
    let out = running.finish().exits(3);
    home.keeps("secrets");
    has_no("unsaid-word", &out.err, "standard error");
    for path in [&log, &report] {
        let text = std::fs::read(path).unwrap();
        assert!(!text.is_empty());
        has_no("unsaid-word", text, path);
    }
    home.command("grep").args(["-r", "unsaid-word", &home.text("state")]).run().exits(1);
    home.command("grep").args(["-r", "unsaid-word-by-file", &home.text("work")]).run().ok();
    for args in [&["ls"][..], &["ls", "--json"], &["diff", "secrets"], &["diff", "--json", "secrets"]] {
        let out = home.rootlet(args).run().ok();
        has_no("unsaid-word", &out.out, args[0]);
    }
}

#[test]
fn values_of_variables_are_in_no_message() {
    let home = Home::new();
    for (name, content) in [
        ("none", "=h1dden\n"),
        ("space", "BAD NAME=h1dden\n"),
        ("nul", "NUL=h1dden\0\n"),
        ("dash", "-=h1dden\nB=h1dden"),
        ("bytes", "A=h1dden\u{1b}[2J\n"),
    ] {
        home.file(format!("work/{name}"), content);
        let out = home.run(["--log-level=trace", &format!("--env-file={name}")], ["/no/such/command"]).run();
        assert!([125, 127].contains(&out.code()), "{out}");
        has_no("h1dden", &out.err, name);
        let plan = home.run(["--dry-run", "--json", &format!("--env-file={name}")], ["true"]).run();
        has_no("h1dden", &plan.out, name);
        has_no("h1dden", &plan.err, name);
    }
    let by_flag = ["--env==h1dden", "--env=A B=h1dden", "--env=A=h1dden\u{1b}"];
    for flag in by_flag {
        let out = home.run([flag, "--log-level=trace"], ["/no/such/command"]).run();
        has_no("h1dden", &out.err, flag);
    }
}
