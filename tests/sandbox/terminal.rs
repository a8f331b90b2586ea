//! `-t`: a real terminal for the command, and the caller's own whole again afterwards.

use serde_json::{Value, json};

use crate::common::{Home, Out, need, rootlet_binary};

/// Runs `rootlet run --rm OPTIONS -- COMMAND` on a terminal, with a script of keys and expectations.
fn on_terminal(home: &Home, options: &[&str], command: &[&str], script: &[Value]) -> Out {
    let driver = home.file("tmp-driver/terminal.py", include_str!("terminal.py"));
    let lines: String = script.iter().map(|line| format!("{line}\n")).collect();
    home.command("python3")
        .arg(driver)
        .arg(rootlet_binary())
        .args(["run", "--rm"])
        .args(options)
        .arg("--")
        .args(command)
        .stdin(lines)
        .run()
        .ok()
}

const SHELL: [&str; 2] = ["sh", "-i"];

#[test]
fn a_shell_on_a_terminal_echoes_and_answers() {
    let home = Home::new();
    let out = on_terminal(
        &home,
        &["-it"],
        &SHELL,
        &[
            json!(["send", "echo 4$((1+1))7; tty; test -t 0 && test -t 1 && test -t 2 && echo all-ttys\r"]),
            json!(["expect", "echo 4$((1+1))7"]),
            json!(["expect", "427"]),
            json!(["expect", "/dev/pts/0"]),
            json!(["expect", "all-ttys\r\n"]),
            json!(["send", "exit 7\r"]),
            json!(["end"]),
            json!(["settings"]),
        ],
    );
    assert!(out.text().starts_with("status 7\nsettings same"), "{out}");
}

#[test]
fn ctrl_c_ends_the_foreground_command_and_not_the_shell() {
    let home = Home::new();
    let out = on_terminal(
        &home,
        &["-it"],
        &SHELL,
        &[
            // The command itself says that it is in the foreground: a shell is not there yet when it forks.
            json!(["send", "sh -c 'echo st\"\"art; exec sleep 1000'\r"]),
            json!(["expect", "start\r\n"]),
            json!(["send", "\u{3}"]),
            json!(["expect", "^C"]),
            json!(["send", "echo status $?-alive\r"]),
            json!(["expect", "status 130-alive"]),
            json!(["send", "exit\r"]),
            json!(["end"]),
            json!(["settings"]),
        ],
    );
    assert!(out.text().contains("settings same"), "{out}");
}

#[test]
fn ctrl_z_and_fg_work_in_a_shell_inside() {
    let home = Home::new();
    let out = on_terminal(
        &home,
        &["-it"],
        &["bash", "--norc", "-i"],
        &[
            json!(["expect", "# "]),
            json!(["send", "sh -c 'echo re\"\"ady; exec cat'\r"]),
            json!(["expect", "ready\r\n"]),
            json!(["send", "one\r"]),
            json!(["expect", "one\r\none\r\n"]),
            json!(["send", "\u{1a}"]),
            json!(["expect", "Stopped"]),
            json!(["expect", "# "]),
            json!(["send", "fg\r"]),
            json!(["expect", "exec cat'\r\n"]),
            json!(["send", "two\r"]),
            json!(["expect", "two\r\ntwo\r\n"]),
            json!(["send", "\u{4}"]),
            json!(["expect", "# "]),
            json!(["send", "exit 3\r"]),
            json!(["end"]),
            json!(["settings"]),
        ],
    );
    assert!(out.text().starts_with("status 3\nsettings same"), "{out}");
}

#[test]
fn ctrl_d_ends_input() {
    let home = Home::new();
    on_terminal(
        &home,
        &["-it"],
        &["cat"],
        &[
            json!(["send", "line\r"]),
            json!(["expect", "line\r\nline\r\n"]),
            json!(["send", "\u{4}"]),
            json!(["end"]),
        ],
    );
}

#[test]
fn a_new_window_size_reaches_the_command() {
    let home = Home::new();
    let script = "stty size; trap 'stty size; exit 0' WINCH; echo ready; while :; do sleep 1000 & wait; done";
    on_terminal(
        &home,
        &["-it"],
        &["bash", "-c", script],
        &[
            json!(["expect", "24 80\r\n"]),
            json!(["expect", "ready"]),
            json!(["size", 50, 132]),
            json!(["expect", "50 132\r\n"]),
            json!(["end"]),
        ],
    );
}

#[test]
fn all_output_arrives_before_the_end() {
    let home = Home::new();
    let out = on_terminal(
        &home,
        &["-t"],
        &["sh", "-c", "seq 1 20000; echo the-very-end"],
        &[
            json!(["expect", "19999\r\n20000\r\n"]),
            json!(["expect", "the-very-end\r\n"]),
            json!(["end"]),
            json!(["settings"]),
        ],
    );
    assert!(out.text().starts_with("status 0\nsettings same"), "{out}");
}

#[test]
fn the_terminal_is_whole_after_the_command_left_it_raw() {
    let home = Home::new();
    let out = on_terminal(
        &home,
        &["-it"],
        &["sh", "-c", "stty raw -echo; echo x; exit 5"],
        &[json!(["end"]), json!(["settings"])],
    );
    assert!(out.text().starts_with("status 5\nsettings same"), "{out}");
}

#[test]
fn the_terminal_is_whole_after_a_signal_and_after_a_failed_start() {
    let home = Home::new();
    let out = on_terminal(
        &home,
        &["-it"],
        &["sh", "-c", "echo ready; exec sleep 1000"],
        &[json!(["expect", "ready"]), json!(["kill", "SIGTERM"]), json!(["end"]), json!(["settings"])],
    );
    assert!(out.text().starts_with("status 143\nsettings same"), "{out}");
    let out = on_terminal(&home, &["-it"], &["no-such-command"], &[json!(["end"]), json!(["settings"])]);
    assert!(out.text().starts_with("status 127\nsettings same"), "{out}");
}

#[test]
fn without_a_terminal_a_stdin_that_is_one_is_not_read() {
    let home = Home::new();
    // Without -i a caller's terminal is not the command's.
    let out = on_terminal(
        &home,
        &[],
        &["sh", "-c", "cat; echo end-of-input"],
        &[json!(["expect", "end-of-input"]), json!(["end"])],
    );
    assert!(out.text().starts_with("status 0"), "{out}");
}

#[test]
fn interactive_without_tty_reads_the_callers_terminal() {
    let home = Home::new();
    on_terminal(
        &home,
        &["-i"],
        &["sh", "-c", "echo ready; read line; echo got-$line"],
        &[json!(["expect", "ready"]), json!(["send", "abc\r"]), json!(["expect", "got-abc"]), json!(["end"])],
    );
}

#[test]
fn tty_without_a_terminal_of_the_caller_works_too() {
    let home = Home::new();
    let out = home.run(["-t"], ["sh", "-c", "test -t 0 && test -t 1 && echo terminal"]).run().ok();
    assert_eq!(out.out, b"terminal\r\n", "{out}");
}

#[test]
fn piped_input_reaches_a_command_on_a_terminal() {
    let home = Home::new();
    let out = home.run(["-it"], ["sh", "-c", "stty -echo; echo go; cat"]).stdin("piped line\n").run().ok();
    assert!(out.text().contains("piped line"), "{out}");
}

#[test]
fn ctrl_z_stops_rootlet_without_a_terminal_of_its_own_and_fg_goes_on() {
    need!("bash");
    let home = Home::new();
    // A job of an interactive shell: stopped by SIGTSTP from the caller's terminal, continued by fg.
    let driver = home.file("tmp-driver/terminal.py", include_str!("terminal.py"));
    let command =
        format!("{} run --rm -i -- sh -c 'echo re''ady; read x; echo got-$x'\r", rootlet_binary().display());
    let prompt = if crate::common::is_root() { "# " } else { "$ " };
    let script = [
        json!(["expect", prompt]),
        json!(["send", command]),
        json!(["expect", "ready\r\n"]),
        json!(["send", "\u{1a}"]),
        json!(["expect", "Stopped"]),
        json!(["expect", prompt]),
        // The shell reads this, not the stopped command.
        json!(["send", "echo shell-''again\r"]),
        json!(["expect", "shell-again"]),
        json!(["expect", prompt]),
        json!(["send", "fg\r"]),
        json!(["expect", "rootlet"]),
        json!(["send", "word\r"]),
        json!(["expect", "got-word"]),
        json!(["expect", prompt]),
        json!(["send", "exit\r"]),
        json!(["end"]),
        json!(["settings"]),
    ];
    let lines: String = script.iter().map(|line| format!("{line}\n")).collect();
    home.command("python3").arg(driver).args(["bash", "--norc", "-i"]).stdin(lines).run().ok();
}

#[test]
fn it_works_in_tmux() {
    need!("tmux");
    let home = Home::new();
    let socket = home.text("work/tmux");
    let tmux = |args: &[&str]| home.command("tmux").args(["-S", &socket, "-f", "/dev/null"]).args(args).run();
    let outcome = home.text("work/outcome");
    let command = format!(
        "{} run --rm -it -- bash --norc -i; echo $? > {outcome}.part; mv {outcome}.part {outcome}",
        rootlet_binary().display()
    );
    tmux(&["new-session", "-d", "-x", "90", "-y", "30", "-s", "t", "sh", "-c", &command]).ok();
    let shows = |text: &str| {
        let until = std::time::Instant::now() + std::time::Duration::from_secs(50);
        loop {
            let screen = tmux(&["capture-pane", "-p", "-t", "t"]);
            if screen.text().contains(text) {
                return;
            }
            assert!(std::time::Instant::now() < until, "{text:?} is not on the screen\n{screen}");
        }
    };
    tmux(&["send-keys", "-t", "t", "stty size; echo in''side", "Enter"]).ok();
    shows("30 90");
    shows("inside");
    tmux(&["resize-window", "-t", "t", "-x", "100", "-y", "40"]).ok();
    tmux(&["send-keys", "-t", "t", "stty size", "Enter"]).ok();
    shows("40 100");
    tmux(&["send-keys", "-t", "t", "sh -c 'echo slee\"\"ping; exec sleep 1000'", "Enter"]).ok();
    shows("sleeping");
    tmux(&["send-keys", "-t", "t", "C-c"]).ok();
    tmux(&["send-keys", "-t", "t", "echo af''ter", "Enter"]).ok();
    shows("after");
    tmux(&["send-keys", "-t", "t", "exit 6", "Enter"]).ok();
    let until = std::time::Instant::now() + std::time::Duration::from_secs(50);
    while !std::path::Path::new(&outcome).exists() {
        assert!(std::time::Instant::now() < until, "it did not end");
        std::thread::yield_now();
    }
    assert_eq!(std::fs::read_to_string(&outcome).unwrap(), "6\n");
    tmux(&["kill-server"]);
}
