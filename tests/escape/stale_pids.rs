//! Process ids are used again: what a box's record says of one that is gone must not end another process.

use std::path::PathBuf;

use nix::sys::signal::Signal;

use crate::common::{Home, Running};

/// Start time in clock ticks since boot, by which rootlet knows a process again.
fn start_time(pid: i32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().nth(19).unwrap().parse().unwrap()
}

/// The record of a box, with another supervisor.
fn forge(home: &Home, name: &str, pid: i32, start_time: u64) {
    let path: PathBuf = home.boxes_dir().join(name).join("box.json");
    let mut record: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let supervisor = &mut record["supervisor"];
    assert!(supervisor["pid"].is_i64() && supervisor["start_time"].is_u64(), "{record}");
    *supervisor = serde_json::json!({ "pid": pid, "start_time": start_time });
    std::fs::write(&path, record.to_string()).unwrap();
}

fn is_alive(process: &Running) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid())).unwrap();
    !stat.rsplit_once(") ").unwrap().1.starts_with('Z')
}

/// A process that nobody may end, and a box that runs.
fn innocent_and_box(home: &Home, name: &str) -> (Running, Running) {
    let innocent = home.command("sh").args(["-c", "echo alive; exec sleep 1000"]).start();
    innocent.until_out("alive");
    let command = ["sh", "-c", "echo ready; touch changed; cat"];
    let running = home.rootlet(["run", "--name", name, "--"]).args(command).stdin_open().start();
    running.until_out("ready");
    (innocent, running)
}

#[test]
fn a_process_with_the_number_of_a_supervisor_that_is_gone_is_not_killed() {
    let home = Home::new();
    let (innocent, running) = innocent_and_box(&home, "busy");
    let number = innocent.pid().as_raw();
    forge(&home, "busy", number, start_time(number) - 1);
    let removal = home.rootlet(["rm", "--force", "busy"]).start();
    // It waits for the box's end once it has done what it does to the supervisor; every look is a sleep.
    let sleeps = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", removal.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
        line.trim().parse::<u32>().unwrap()
    };
    while sleeps() < 50 && is_alive(&removal) {
        std::thread::yield_now();
    }
    assert!(is_alive(&innocent), "the process was killed in the supervisor's place");
    assert!(is_alive(&removal), "{}", removal.finish());
    running.finish();
    removal.finish().ok();
    innocent.signal(Signal::SIGTERM);
    innocent.finish().exits(143);
    assert!(home.boxes().is_empty());
}

#[test]
fn the_record_decides_only_about_a_box_that_runs() {
    let home = Home::new();
    for (name, end) in
        [("one", &["rm", "--force", "one"][..]), ("two", &["rm", "two"]), ("three", &["prune", "--all"])]
    {
        let (innocent, running) = innocent_and_box(&home, name);
        running.finish().ok();
        let number = innocent.pid().as_raw();
        // Even the right start time: the lock says that nothing of the box runs.
        forge(&home, name, number, start_time(number));
        home.rootlet(end).run().ok();
        assert!(is_alive(&innocent), "{end:?}");
        innocent.signal(Signal::SIGTERM);
        innocent.finish().exits(143);
        assert!(home.boxes().is_empty());
    }
}

#[test]
fn the_attack_hits_where_the_start_time_is_right() {
    let home = Home::new();
    let (innocent, running) = innocent_and_box(&home, "busy");
    let number = innocent.pid().as_raw();
    forge(&home, "busy", number, start_time(number));
    let removal = home.rootlet(["rm", "--force", "busy"]).start();
    // Killed in the supervisor's place: what the start time is recorded for.
    assert_eq!(innocent.finish().code(), 137);
    running.finish();
    removal.finish().ok();
}
