//! Frames that no honest kernel sends, from inside: the stack stays up, and what it costs is bounded.

use crate::common::{Home, lab, skip};

/// See there: a seeded storm, and what must still work after each part of it.
const FRAMES: &str = include_str!("frames.py");

/// What the supervisor may have needed at any time, docs/security-model.md. It needs a third of it; a hundred
/// thousand flows that were remembered would need more.
const MEMORY_KIB: u64 = 32 * 1024;

/// Open files of the supervisor: the stack's tables (docs/networking.md: 2,048 flows that nobody has answered,
/// 4,096 UDP sockets, 64 pings, 128 DNS queries) and what any run has.
const DESCRIPTORS: usize = 2_048 + 4_096 + 64 + 128 + 500;

#[test]
fn a_storm_of_malformed_frames_and_floods_harms_nobody() {
    let Some(lab) = lab() else { skip!("outside tests/lab there are no servers to talk to") };
    let home = Home::new();
    let program = home.file("work/frames.py", FRAMES);
    let [world, world_v6] = lab.both().map(|address| address.to_string());
    let nobody = lab.nobody.to_string();
    let command =
        ["python3", program.to_str().unwrap(), world.as_str(), world_v6.as_str(), nobody.as_str(), "20251"];
    let running = home.run(["-i"], command).stdin_open().start();
    running.until_out("after\n");
    let supervisor = running.pid();
    let status = std::fs::read_to_string(format!("/proc/{supervisor}/status")).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    let descriptors = std::fs::read_dir(format!("/proc/{supervisor}/fd")).unwrap().count();
    let out = running.finish().exits(7);
    assert!(peak < MEMORY_KIB, "the supervisor needed {peak} KiB\n{out}");
    assert!(descriptors < DESCRIPTORS, "the supervisor holds {descriptors} descriptors\n{out}");
    assert!(out.text().ends_with("\nafter\nend"), "{out}");
    // The generator sent what it was to send.
    let sent: u64 = out.text().lines().filter_map(|line| line.split(' ').nth(1)?.parse::<u64>().ok()).sum();
    assert!(sent > 190_000, "{out}");
}
