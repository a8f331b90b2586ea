//! Boxes: what a run keeps, and `diff`, `ls`, `rm`, `prune`.

use std::os::unix::fs::PermissionsExt;

use nix::sys::signal::Signal;

use crate::common::Home;

const NONE: [&str; 0] = [];

#[test]
fn a_run_that_changed_nothing_keeps_nothing() {
    let home = Home::new();
    let out =
        home.rootlet(["run", "--", "sh", "-c", "cat /etc/passwd >/dev/null; ls -R . >/dev/null"]).run().ok();
    assert_eq!(out.errors(), "");
    assert!(home.boxes().is_empty());
}

#[test]
fn a_run_that_changed_something_says_so_in_one_line() {
    let home = Home::new();
    let out = home.rootlet(["run", "--name=changed", "--", "sh", "-c", "echo x > new"]).run().ok();
    home.keeps("changed");
    let said = out.errors();
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("rootlet diff changed") && said.contains("rootlet rm changed"), "{said}");
    assert!(!home.path("work/new").exists());
}

#[test]
fn rm_flag_keeps_nothing() {
    let home = Home::new();
    let out = home.run(NONE, ["sh", "-c", "echo x > new; rm -rf /etc/hostname"]).run().ok();
    assert_eq!(out.errors(), "");
    assert!(home.boxes().is_empty());
}

fn changed_box(home: &Home, name: &str) {
    home.file("work/stays", "same");
    home.file("work/modified", "before");
    home.file("work/deleted", "x");
    home.file("work/chmodded", "x");
    home.file("work/dir/inside", "x");
    home.file("work/emptied/inside", "x");
    let script = "echo after > modified; rm deleted; chmod 600 chmodded; echo x > added; mkdir newdir; echo y > newdir/f; \
                  rm -r dir; rm emptied/inside; cat stays >/dev/null";
    home.rootlet(["run", "--name", name, "--", "sh", "-ec", script]).run().ok();
    home.keeps(name);
}

#[test]
fn diff_lists_what_changed_and_nothing_else() {
    let home = Home::new();
    changed_box(&home, "differs");
    let work = home.text("work");
    let text = home.rootlet(["diff", "differs"]).run().ok().text();
    let mut lines: Vec<String> = text.lines().map(|line| line.replace(&work, "W")).collect();
    lines.retain(|line| line != "m W");
    lines.retain(|line| line != "m W/emptied");
    lines.sort();
    let expected = [
        "A W/added",
        "A W/newdir",
        "A W/newdir/f",
        "D W/deleted",
        "D W/dir",
        "D W/emptied/inside",
        "M W/modified",
        "m W/chmodded",
    ];
    assert_eq!(lines, expected);
}

#[test]
fn diff_as_json_says_the_same() {
    let home = Home::new();
    changed_box(&home, "differs");
    let text = home.rootlet(["diff", "differs"]).run().ok().text();
    let json = home.rootlet(["diff", "--json", "differs"]).run().ok().json();
    let letter = |kind: &str| match kind {
        "added" => "A",
        "modified" => "M",
        "deleted" => "D",
        "metadata" => "m",
        other => panic!("kind {other}"),
    };
    let lines: Vec<String> = json
        .as_array()
        .unwrap()
        .iter()
        .map(|change| {
            format!("{} {}", letter(change["kind"].as_str().unwrap()), change["path"].as_str().unwrap())
        })
        .collect();
    assert_eq!(lines.join("\n"), text);
}

#[test]
fn last_names_the_latest_box() {
    let home = Home::new();
    for name in ["one", "two"] {
        home.rootlet(["run", "--name", name, "--", "touch", &format!("by-{name}")]).run().ok();
        home.keeps(name);
    }
    let text = home.rootlet(["diff", "last"]).run().ok().text();
    assert!(text.contains("by-two") && !text.contains("by-one"), "{text}");
}

#[test]
fn ls_shows_running_and_ended_boxes() {
    let home = Home::new();
    home.rootlet(["run", "--name=ended", "--", "sh", "-c", "touch new; exit 3"]).run().exits(3);
    home.keeps("ended");
    let running =
        home.rootlet(["run", "--name=busy", "--", "sh", "-c", "echo ready; cat"]).stdin_open().start();
    running.until_out("ready");
    let text = home.rootlet(["ls"]).run().ok().text();
    let line =
        |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{text}"));
    assert!(line("busy").contains("running"), "{text}");
    assert!(line("ended").contains('3'), "{text}");
    home.rootlet(["ls", "--quiet"]).run().ok();
    let json = home.rootlet(["ls", "--json"]).run().ok().json();
    let names: Vec<&str> = json.as_array().unwrap().iter().map(|b| b["name"].as_str().unwrap()).collect();
    assert!(names.contains(&"busy") && names.contains(&"ended"), "{json}");
    running.finish().ok();
}

#[test]
fn rm_removes_a_box_and_only_that() {
    let home = Home::new();
    for name in ["one", "two"] {
        home.rootlet(["run", "--name", name, "--", "touch", "new"]).run().ok();
    }
    home.rootlet(["rm", "one"]).run().ok();
    assert_eq!(home.boxes().into_iter().collect::<Vec<_>>(), ["two"]);
    home.rootlet(["rm", "one"]).run().exits(1).says("one");
    home.rootlet(["rm", "last"]).run().ok();
    assert!(home.boxes().is_empty());
}

#[test]
fn rm_refuses_a_running_box_unless_forced() {
    let home = Home::new();
    let running =
        home.rootlet(["run", "--name=busy", "--", "sh", "-c", "echo ready; exec sleep 1000"]).start();
    running.until_out("ready");
    home.rootlet(["rm", "busy"]).run().exits(1).says("running");
    home.rootlet(["rm", "--force", "busy"]).run().ok();
    assert!(home.boxes().is_empty());
    let out = running.finish();
    assert_ne!(out.code(), 0, "{out}");
}

#[test]
fn rm_removes_what_has_no_permissions() {
    let home = Home::new();
    let script = "mkdir -p a/b/c; echo x > a/b/c/f; chmod 000 a/b/c/f a/b/c a/b a";
    home.rootlet(["run", "--name=locked", "--", "sh", "-c", script]).run().ok();
    home.rootlet(["rm", "locked"]).run().ok();
    assert!(home.boxes().is_empty());
}

#[test]
fn prune_keeps_boxes_with_changes_and_all_removes_them() {
    let home = Home::new();
    home.rootlet(["run", "--name=kept", "--", "touch", "new"]).run().ok();
    home.rootlet(["prune"]).run().ok().prints("");
    assert_eq!(home.boxes().len(), 1);
    let running = home
        .rootlet(["run", "--name=busy", "--rm", "--", "sh", "-c", "echo ready; cat"])
        .stdin_open()
        .start();
    running.until_out("ready");
    let json = home.rootlet(["prune", "--all", "--json"]).run().ok().json();
    assert_eq!(json[0]["name"], "kept", "{json}");
    assert_eq!(home.boxes().into_iter().collect::<Vec<_>>(), ["busy"]);
    running.finish().ok();
}

#[test]
fn a_name_that_is_taken_is_refused() {
    let home = Home::new();
    home.rootlet(["run", "--name=taken", "--", "touch", "new"]).run().ok();
    home.keeps("taken");
    home.rootlet(["run", "--name=taken", "--", "true"]).run().exits(125).says("taken").says("hint:");
    assert!(home.boxes_dir().join("taken/upper").exists());
}

#[test]
fn an_upper_of_the_callers_is_kept_and_used_again() {
    let home = Home::new();
    let upper = home.text("work/kept-upper");
    let file = home.text("work/new");
    let run = |script: &str| {
        home.rootlet(["run", "--name=with-upper", "--upper", &upper, "--", "sh", "-c", script]).run()
    };
    run(&format!("echo first > {file}")).ok();
    home.rootlet(["rm", "with-upper"]).run().ok();
    assert!(std::path::Path::new(&upper).exists());
    run(&format!("cat {file}")).ok().prints("first");
    for name in home.boxes() {
        home.rootlet(["rm", &name]).run().ok();
    }
}

#[test]
fn a_state_directory_that_others_may_write_is_refused() {
    let home = Home::new();
    let state = home.dir("state/rootlet");
    std::fs::set_permissions(&state, PermissionsExt::from_mode(0o777)).unwrap();
    home.run(NONE, ["true"]).run().exits(125).says(state.to_str().unwrap()).says("hint:");
    std::fs::set_permissions(&state, PermissionsExt::from_mode(0o700)).unwrap();
    home.run(NONE, ["true"]).run().ok();
}

#[test]
fn a_state_directory_that_is_a_link_or_a_file_is_refused() {
    let home = Home::new();
    let elsewhere = home.dir("work/elsewhere");
    let state = home.path("state/rootlet");
    std::os::unix::fs::symlink(&elsewhere, &state).unwrap();
    home.run(NONE, ["true"]).run().exits(125).says("state");
    std::fs::remove_file(&state).unwrap();
    std::fs::write(&state, "").unwrap();
    home.run(NONE, ["true"]).run().exits(125).says("state");
    std::fs::remove_file(&state).unwrap();
    assert_eq!(std::fs::read_dir(elsewhere).unwrap().count(), 0);
}

#[test]
fn without_home_and_state_home_the_error_says_what_to_set() {
    let home = Home::new();
    home.run(NONE, ["true"])
        .env_remove("HOME")
        .env_remove("XDG_STATE_HOME")
        .run()
        .exits(125)
        .says("XDG_STATE_HOME");
}

#[test]
fn the_state_directory_does_not_show_inside() {
    let home = Home::new();
    let state = home.text("state/rootlet");
    home.run(["--name=inside"], ["ls", "-A", &state]).run().ok().prints("");
}

#[test]
fn a_box_that_is_damaged_can_be_listed_and_removed() {
    let home = Home::new();
    home.rootlet(["run", "--name=damaged", "--", "touch", "new"]).run().ok();
    std::fs::write(home.boxes_dir().join("damaged/box.json"), "{").unwrap();
    home.rootlet(["ls"]).run().ok();
    home.rootlet(["diff", "damaged"]).run().exits(1).says("damaged");
    home.rootlet(["rm", "damaged"]).run().ok();
    assert!(home.boxes().is_empty());
}

#[test]
fn two_runs_do_not_share_an_upper() {
    let home = Home::new();
    let upper = home.text("work/shared-upper");
    let running = home.run(["--upper", &upper], ["sh", "-c", "echo ready; cat"]).stdin_open().start();
    running.until_out("ready");
    home.run(["--upper", &upper], ["true"]).run().exits(125).says("shared-upper").says("hint:");
    running.finish().ok();
}

#[test]
fn ctrl_c_on_a_running_box_keeps_its_changes() {
    let home = Home::new();
    let running = home
        .rootlet(["run", "--name=stopped", "--", "sh", "-c", "echo x > new; echo ready; exec sleep 1000"])
        .start();
    running.until_out("ready");
    running.signal(Signal::SIGINT);
    running.finish().exits(130).says("rootlet diff stopped");
    home.keeps("stopped");
}
