//! `rootlet run` as a command: exit status, streams, signals, environment, and what is printed.

use std::os::unix::fs::PermissionsExt as _;

use nix::sys::signal::Signal;

use crate::common::Home;

const NONE: [&str; 0] = [];

#[test]
fn exit_status_is_the_commands_own() {
    let home = Home::new();
    for code in [0, 1, 42, 124, 125, 126, 127, 255] {
        home.sh(NONE, &format!("exit {code}")).run().exits(code);
    }
}

#[test]
fn a_signal_that_ends_the_command_is_128_and_its_number() {
    let home = Home::new();
    for (signal, code) in [("KILL", 137), ("TERM", 143), ("SEGV", 139), ("HUP", 129)] {
        home.sh(NONE, &format!("kill -{signal} $$")).run().exits(code);
    }
    // Real-time signals have no name but a number.
    home.sh(NONE, "kill -40 $$").run().exits(168);
}

#[test]
fn the_report_tells_a_commands_125_from_ours() {
    let home = Home::new();
    let report = home.path("work/report.json");
    let flag = format!("--report={}", report.display());
    home.sh([&flag], "exit 125").run().exits(125);
    let read = || serde_json::from_slice::<serde_json::Value>(&std::fs::read(&report).unwrap()).unwrap();
    let own = read();
    assert_eq!((&own["exit_code"], &own["run"]["outcome"]["Exited"]), (&125.into(), &125.into()), "{own}");
    assert!(own["error"].is_null(), "{own}");
    home.sh([&flag, "--rootfs=/does/not/exist"], "true").run().exits(125);
    let ours = read();
    assert!(ours["run"].is_null() && ours["error"].as_str().unwrap().contains("/does/not/exist"), "{ours}");
}

#[test]
fn ten_mebibytes_pass_through_stdin_and_stdout_byte_for_byte() {
    let home = Home::new();
    // Every byte value, no period of a power of two.
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let bytes: Vec<u8> = (0..10 << 20)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .collect();
    let out = home.run(NONE, ["cat"]).stdin(bytes.clone()).run().ok();
    assert!(out.out == bytes, "{} bytes came back of {}", out.out.len(), bytes.len());
    assert_eq!(out.errors(), "");
}

#[test]
fn stdout_and_stderr_stay_apart() {
    let home = Home::new();
    let out = home.sh(NONE, r"printf 'o\0\377'; printf 'e\0\376' >&2").run().ok();
    assert_eq!((out.out.as_slice(), out.err.as_slice()), (&b"o\0\xff"[..], &b"e\0\xfe"[..]), "{out}");
}

#[test]
fn the_end_of_stdin_reaches_the_command() {
    let home = Home::new();
    let mut running = home.run(NONE, ["cat"]).stdin_open().start();
    running.write("first\n");
    running.until_out("first\n");
    running.write("second");
    running.close_stdin();
    running.finish().ok().prints("first\nsecond");
}

#[test]
fn a_reader_that_goes_away_gives_the_command_sigpipe() {
    let home = Home::new();
    // `yes` ends by the signal as it would outside; pipefail shows it.
    let script = format!(
        "{} run --rm -- yes | head -1; echo ${{PIPESTATUS[0]}}",
        crate::common::rootlet_binary().display()
    );
    home.command("bash").args(["-c", &script]).run().ok().prints("y\n141");
}

#[test]
fn signals_reach_the_command() {
    let home = Home::new();
    for signal in
        [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2]
    {
        let name = signal.as_str().trim_start_matches("SIG");
        let script =
            format!("trap 'echo got {name}; exit 7' {name}; echo ready; while :; do sleep 1000 & wait; done");
        let running = home.run(NONE, ["bash", "-c", &script]).start();
        running.until_out("ready");
        running.signal(signal);
        running.finish().exits(7).prints(&format!("ready\ngot {name}"));
    }
}

#[test]
fn a_command_without_a_handler_is_ended_by_the_signal() {
    let home = Home::new();
    let running = home.sh(NONE, "echo ready; exec sleep 1000").start();
    running.until_out("ready");
    running.signal(Signal::SIGTERM);
    running.finish().exits(143);
}

#[test]
fn a_signal_during_start_leaves_nothing() {
    let home = Home::new();
    for _ in 0..10 {
        let running = home.run(NONE, ["true"]).start();
        running.signal(Signal::SIGTERM);
        let out = running.finish();
        assert!([0, 143].contains(&out.code()), "{out}");
    }
}

#[test]
fn timeout_ends_the_command_with_124() {
    let home = Home::new();
    home.run(["--timeout=300ms"], ["sleep", "1000"]).run().exits(124);
    // In time: no difference.
    home.sh(["--timeout=1h"], "exit 3").run().exits(3);
}

#[test]
fn timeout_kills_what_ignores_sigterm() {
    let home = Home::new();
    let out = home.sh(["--timeout=300ms"], "trap '' TERM; while :; do sleep 1000; done").run().exits(124);
    assert_eq!(out.text(), "");
}

#[test]
fn a_command_that_is_not_there_is_127() {
    let home = Home::new();
    home.run(NONE, ["no-such-command"]).run().exits(127).says("no-such-command").says("hint:");
    home.run(NONE, ["/no/such/command"]).run().exits(127).says("/no/such/command");
    home.run(NONE, ["./neither"]).run().exits(127).says("./neither");
}

#[test]
fn a_command_that_cannot_be_executed_is_126() {
    let home = Home::new();
    let plain = home.file("work/plain", "#!/bin/sh\n");
    let garbage = home.script("work/garbage", b"\x01\x02\x03\x04 no program");
    home.run(NONE, [&plain]).run().exits(126).says("plain").says("hint:");
    home.run(NONE, [home.path("work")]).run().exits(126).says("directory");
    home.run(NONE, [&garbage]).run().exits(126).says("garbage").says("hint:");
}

#[test]
fn a_missing_interpreter_is_named() {
    let home = Home::new();
    let script = home.script("work/script", "#!/no/such/interpreter -x\n");
    let out = home.run(NONE, [&script]).run();
    assert!([126, 127].contains(&out.code()), "{out}");
    out.says("/no/such/interpreter").says("script");
}

#[test]
fn the_command_is_found_in_the_path_inside() {
    let home = Home::new();
    let bin = home.dir("work/bin");
    home.script("work/bin/only-here", "#!/bin/sh\necho found \"$@\"\n");
    let path = format!("--env=PATH={}:/usr/bin:/bin", bin.display());
    home.run([&path], ["only-here", "a b", ""]).run().ok().prints("found a b ");
}

#[test]
fn arguments_arrive_as_they_are() {
    use std::os::unix::ffi::OsStrExt as _;
    let home = Home::new();
    let odd = std::ffi::OsStr::from_bytes(b"\xff\xfe\n\x1b[31m *");
    let out = home
        .run(
            NONE,
            ["printf", r"%s|", "-x", "--", "", "a b", "$HOME"]
                .map(std::ffi::OsStr::new)
                .into_iter()
                .chain([odd]),
        )
        .run()
        .ok();
    assert_eq!(out.out, b"-x|--||a b|$HOME|\xff\xfe\n\x1b[31m *|", "{out}");
}

#[test]
fn the_callers_environment_passes_and_can_be_changed() {
    let home = Home::new();
    let file = home.file("work/vars", "# comment\nFROM_FILE=a = b\nTAKEN\nOVER=file\n\n");
    let out = home
        .run(["-e", "SET=x y", "-e", "OVER=flag", "--env-file", file.to_str().unwrap()], ["env"])
        .env("OWN", "caller's")
        .env("TAKEN", "from the caller")
        .run()
        .ok();
    let text = out.text();
    let lines: Vec<&str> = text.lines().collect();
    for line in ["OWN=caller's", "SET=x y", "FROM_FILE=a = b", "TAKEN=from the caller", "OVER=flag"] {
        assert!(lines.contains(&line), "{line} is missing\n{out}");
    }
    assert!(!text.contains("OVER=file"), "{out}");
}

#[test]
fn programs_of_root_are_found_by_an_ordinary_users_path() {
    let home = Home::new();
    let out = home.run(NONE, ["ldconfig", "--version"]).env("PATH", "/usr/bin:/bin").run().ok();
    assert!(out.text().starts_with("ldconfig "), "{out}");
    let path = "--env=PATH=/usr/bin:/bin";
    home.run([path], ["ldconfig", "--version"]).run().exits(127);
}

#[test]
fn variables_that_name_the_callers_session_do_not_pass() {
    let home = Home::new();
    let left_out = [
        "SSH_AUTH_SOCK",
        "DBUS_SESSION_BUS_ADDRESS",
        "XDG_RUNTIME_DIR",
        "DISPLAY",
        "TMUX",
        "WAYLAND_DISPLAY",
    ];
    let run = |options: &[&str]| {
        let command = home.run(options, ["env"]);
        left_out.iter().fold(command, |command, name| command.env(name, "/secret/place")).run().ok().text()
    };
    assert!(!run(&[]).contains("/secret/place"));
    assert!(run(&["--env", "DISPLAY"]).contains("DISPLAY=/secret/place"));
}

#[test]
fn workdir_is_the_callers_over_the_hosts_tree() {
    let home = Home::new();
    let work = home.text("work");
    home.run(NONE, ["pwd"]).run().ok().prints(&work);
    home.run(["--workdir=/usr/lib"], ["pwd"]).run().ok().prints("/usr/lib");
    home.run(["-w/no/such/dir"], ["pwd"]).run().exits(125).says("/no/such/dir");
    home.run(["--workdir=relative"], ["pwd"]).run().exits(125).says("absolute");
}

#[test]
fn the_command_is_root_inside() {
    let home = Home::new();
    home.sh(NONE, "id -u; id -g").run().ok().prints("0\n0");
}

#[test]
fn user_chooses_the_id() {
    let home = Home::new();
    let out = home.sh(["--user=1234:4321"], "id -u; id -g").run();
    out.ok().prints("1234\n4321");
}

#[test]
fn user_by_name_is_looked_up_inside() {
    let home = Home::new();
    let command = home.sh(["--user=nobody"], "id -un; id -u");
    if crate::common::has_id_range() {
        command.run().ok().prints("nobody\n65534");
    } else {
        // The single id must be known before the sandbox is there to look in.
        command.run().exits(125).says("nobody").says("hint:");
    }
    home.sh(["--user=no-such-user"], "true").run().exits(125).says("no-such-user");
}

#[test]
fn host_and_domain_names_are_the_sandboxs_own() {
    let home = Home::new();
    let before = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    home.sh(["--hostname=inner.test", "--domainname=nis_dom"], "hostname; cat /proc/sys/kernel/domainname /etc/hostname; getent hosts inner.test >/dev/null && echo known")
        .run()
        .ok()
        .prints("inner.test\nnis_dom\ninner.test\nknown");
    assert_eq!(std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap(), before);
}

#[test]
fn the_box_name_is_the_host_name() {
    let home = Home::new();
    home.run(["--name=calm-otter"], ["hostname"]).run().ok().prints("calm-otter");
}

#[test]
fn dry_run_prints_the_plan_and_does_nothing() {
    let home = Home::new();
    let mark = home.path("work/made");
    let touch = ["touch", mark.to_str().unwrap()];
    let out = home.run(["--dry-run", "--hostname=planned", "-p", "8099:80"], touch).run().ok();
    let text = out.text();
    for word in ["planned", "8099", "touch"] {
        assert!(text.contains(word), "{word} is missing\n{out}");
    }
    let json = home.run(["--dry-run", "--json", "--hostname=planned"], touch).run().ok().json();
    assert!(json.to_string().contains("planned"), "{json}");
    assert!(!mark.exists());
    assert!(home.boxes().is_empty());
    assert!(!home.boxes_dir().parent().unwrap().exists(), "the state directory was made");
    let report = home.path("work/report");
    let flag = format!("--report={}", report.display());
    let both = home.run(["--dry-run", &flag], touch).run().exits(125);
    assert!(both.errors().contains("--report") && !report.exists(), "{both}");
}

#[test]
fn a_report_that_cannot_be_written_does_not_hide_the_end() {
    let home = Home::new();
    let out = home.sh(["--report=/dev/full"], "echo ran; exit 7").run().exits(7);
    assert!(out.text() == "ran" && out.errors().contains("cannot write the report /dev/full"), "{out}");
    let early = home.sh(["--report=/does/not/exist"], "echo ran").run().exits(125);
    assert_eq!(early.text(), "", "{early}");
}

#[test]
fn nothing_is_written_through_a_link_that_a_payload_may_have_left() {
    let home = Home::new();
    let target = home.file("work/target", "kept");
    std::os::unix::fs::symlink(&target, home.path("work/link")).unwrap();
    let log = |path: &str| {
        home.rootlet(["--log-level=info", &format!("--log-file={path}"), "run", "--rm", "--", "true"])
    };
    for refused in [home.sh(["--report=link"], "echo ran"), log("link")] {
        let out = refused.run().exits(125).says("ELOOP");
        assert_eq!(out.text(), "", "{out}");
    }
    assert_eq!(std::fs::read_to_string(&target).unwrap(), "kept");
    // The host's own are.
    assert!(home.sh(["--report=/dev/stderr"], "true").run().ok().errors().contains("\"outcome\""));
    log("/proc/self/fd/2").run().ok().says("INFO");
}

#[test]
fn what_is_made_to_be_written_to_is_the_callers_alone_and_what_is_there_stays_as_it_is() {
    use std::os::unix::fs::PermissionsExt as _;
    let home = Home::new();
    let names = ["report", "log", "network-log", "network-capture"];
    let run = || {
        home.rootlet(["--log-level=info", "--log-file=log", "run", "--rm", "--report=report"])
            .args(["--network-log=network-log", "--network-capture=network-capture", "--", "true"])
            .run()
            .ok();
    };
    let mode = |name: &&str| home.path("work").join(name).metadata().unwrap().permissions().mode() & 0o7777;
    run();
    assert_eq!(names.each_ref().map(mode), [0o600; 4]);
    for name in names {
        let path = home.path("work").join(name);
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o640)).unwrap();
    }
    run();
    assert_eq!(names.each_ref().map(mode), [0o640; 4]);
}

#[test]
fn the_report_has_the_notes_of_the_plan() {
    let home = Home::new();
    let report = home.path("work/report.json");
    home.sh(["--network=host", &format!("--report={}", report.display())], "true").run().ok();
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    let notes = json["run"]["notes"].as_array().unwrap();
    let network = notes.iter().find(|note| note["what"] == "the network is not isolated").unwrap();
    assert_eq!(network["weaker"], false, "{json}");
}

#[test]
fn the_plan_does_not_show_values_of_variables() {
    let home = Home::new();
    for json in [None, Some("--json")] {
        let options = ["--dry-run", "--env=TOKEN=s3cret-flag"].into_iter().chain(json);
        let out = home.run(options, ["true"]).env("PASSWORD", "s3cret-caller").run().ok();
        assert!(!out.text().contains("s3cret"), "{out}");
    }
}

#[test]
fn the_supervisors_table_of_descriptors_need_not_grow() {
    let home = Home::new();
    let mut running = home.run(["--network=none"], ["sh", "-c", "echo ready; cat"]).stdin_open().start();
    running.until_out("ready");
    let status = std::fs::read_to_string(format!("/proc/{}/status", running.pid())).unwrap();
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", running.pid())).unwrap();
    let number = |text: &str, name: &str| -> u64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    let (room, limit) = (number(&status, "FDSize:"), number(&limits, "Max open files"));
    assert!(room >= limit.min(16_384), "room for {room}, {limit} are allowed");
    running.close_stdin();
    running.finish().ok();
}

#[test]
fn secrets_are_not_in_arguments_state_or_log_of_the_supervisor() {
    let home = Home::new();
    let secret = "s3cret-81f2";
    let running = home
        .rootlet(["run", "--name=secrets", "--log-level=trace", "--env", &format!("TOKEN={secret}")])
        .args(["--", "sh", "-c", "echo ready; cat"])
        .stdin_open()
        .start();
    running.until_out("ready");
    let state = home.command("grep").args(["-r", secret]).arg(home.path("state")).run();
    assert_eq!(state.code(), 1, "{state}");
    // Other users must not read the state either.
    let mode = std::fs::metadata(home.path("state/rootlet")).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0, "{mode:o}");
    let out = running.finish().ok();
    assert!(!out.errors().contains(secret), "{}", out.errors());
}

#[test]
fn log_level_and_rust_log_go_to_stderr_or_a_file() {
    let home = Home::new();
    assert_eq!(home.run(NONE, ["true"]).run().ok().errors(), "");
    let by_flag = home.rootlet(["--log-level=debug", "run", "--rm", "--", "true"]).run().ok();
    assert!(by_flag.errors().contains("rootlet"), "{by_flag}");
    let by_variable = home.run(NONE, ["true"]).env("RUST_LOG", "rootlet=debug").run().ok();
    assert!(by_variable.errors().contains("rootlet"), "{by_variable}");
    let file = home.path("work/log");
    let to_file = home.rootlet([
        "--log-level=debug",
        "--log-file",
        file.to_str().unwrap(),
        "run",
        "--rm",
        "--",
        "true",
    ]);
    assert_eq!(to_file.run().ok().errors(), "");
    assert!(std::fs::read_to_string(&file).unwrap().contains("rootlet"));
    home.rootlet(["--log-level=nonsense=what", "run", "--", "true"]).run().exits(125).says("nonsense");
}

#[test]
fn completions_load_in_bash() {
    let home = Home::new();
    for shell in ["bash", "zsh", "fish"] {
        let out = home.rootlet(["completions", shell]).run().ok();
        for word in ["run", "prune", "allow-host-loopback"] {
            assert!(out.text().contains(word), "{shell} lacks {word}");
        }
    }
    let script = format!(
        "source <({0} completions bash); COMP_WORDS=(rootlet pru); COMP_CWORD=1; _rootlet rootlet pru rootlet; echo \"${{COMPREPLY[*]}}\"",
        crate::common::rootlet_binary().display()
    );
    home.command("bash").args(["-c", &script]).run().ok().prints("prune");
}

#[test]
fn manual_pages_are_printed() {
    let home = Home::new();
    let page = home.rootlet(["man"]).run().ok().text();
    assert!(page.contains(".TH") && page.contains("doctor"), "{page}");
    let run = home.rootlet(["man", "run"]).run().ok().text();
    assert!(run.contains("timeout") && run.contains("rootfs"), "{run}");
    home.rootlet(["man", "no-such"]).run().exits(2).says("no-such");
}

#[test]
fn doctor_says_that_this_host_can_run() {
    let home = Home::new();
    let text = home.rootlet(["doctor"]).run().ok().text();
    assert!(text.contains("user namespace"), "{text}");
    let json = home.rootlet(["doctor", "--json"]).run().ok().json();
    assert!(json.is_object() || json.is_array(), "{json}");
}

#[test]
fn help_fits_what_exists() {
    let home = Home::new();
    let help = home.rootlet(["--help"]).run().ok().text();
    for command in ["run", "diff", "ls", "rm", "prune", "doctor", "completions", "man"] {
        assert!(help.contains(command), "{command}\n{help}");
    }
    let run = home.rootlet(["run", "--help"]).run().ok().text();
    for option in [
        "--rootfs",
        "--layer",
        "--upper",
        "--volume",
        "--tmpfs",
        "--read-only",
        "--timeout",
        "--publish",
        "--nested",
    ] {
        assert!(run.contains(option), "{option}\n{run}");
    }
    home.rootlet(["--version"]).run().ok();
}

#[test]
fn closed_standard_streams_do_no_harm() {
    let home = Home::new();
    let script =
        format!("{} run --rm -- sh -c 'exit 5' <&- >&- 2>&-", crate::common::rootlet_binary().display());
    home.command("bash").args(["-c", &script]).run().exits(5);
}

#[test]
fn background_processes_end_with_the_command() {
    let home = Home::new();
    // setsid and a double fork do not get out of the pid namespace.
    home.sh(NONE, "(setsid sleep 1000 >/dev/null 2>&1 &) ; nohup sleep 1000 >/dev/null 2>&1 & exit 4")
        .run()
        .exits(4);
}
