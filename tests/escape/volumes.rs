//! CVE-2021-30465 and its kin: what `-v` names is changed by another payload that shares a directory, while
//! sandboxes start.

use std::os::unix::fs::symlink;
use std::path::Path;

use crate::common::{Home, Running};

/// Exchanges two names as fast as it can until standard input ends.
const SWAP: &str = r#"
import ctypes, os, select, sys
libc = ctypes.CDLL(None, use_errno=True)
one, two = (name.encode() for name in sys.argv[1:])
def exchange():
    if libc.renameat2(-100, one, -100, two, 2) != 0: raise OSError(ctypes.get_errno(), 'renameat2')
exchange()
print('swapping', flush=True)
while not select.select([0], [], [], 0)[0]:
    for _ in range(20): exchange()
"#;

/// A payload with `shared` as a volume that swaps two names in it.
fn swapping(home: &Home, one: &str, two: &str) -> Running {
    let volume = format!("{}:/shared", home.text("work/shared"));
    let command = ["python3", "-c", SWAP, one, two];
    let running = home.run(["-i", "--workdir=/shared", "-v", &volume], command).stdin_open().start();
    running.until_out("swapping");
    running
}

/// How many sandboxes start during the swapping. The defence off, one in four was led astray.
const RUNS: usize = 40;

#[test]
fn a_mount_point_that_is_swapped_for_a_link_leads_nowhere() {
    let home = Home::new();
    let canary = home.file("work/canary/file", "canary").parent().unwrap().to_owned();
    let data = home.file("work/data/known", "data").parent().unwrap().to_owned();
    let root = home.dir("work/rootfs");
    for dir in ["usr", "mnt"] {
        std::fs::create_dir(root.join(dir)).unwrap();
    }
    for link in ["bin", "lib", "lib64", "sbin"] {
        symlink(format!("usr/{link}"), root.join(link)).unwrap();
    }
    home.dir("work/shared/a");
    let up = "../".repeat(40);
    let targets = [canary.display().to_string(), format!("{up}{}", canary.display()), "/".into()];
    for (number, target) in targets.iter().enumerate() {
        let link = format!("link{number}");
        symlink(target, home.path("work/shared").join(&link)).unwrap();
        let attacker = swapping(&home, "a", &link);
        let volumes =
            [format!("{}:/mnt", home.text("work/shared")), format!("{}:/mnt/a/made/inside", data.display())];
        let options =
            ["--rootfs", root.to_str().unwrap(), "-v/usr:/usr:ro", "-v", &volumes[0], "-v", &volumes[1]];
        for _ in 0..RUNS / 2 {
            let out = home.run(options, ["ls", "/mnt/a/made/inside", "/mnt/a", "/made/inside"]).run();
            assert!([0, 2, 125].contains(&out.code()), "{out}");
            // The host's canary is not in this root at all.
            assert!(!out.text().lines().any(|line| line == "file"), "the host's file shows\n{out}");
        }
        attacker.finish().ok();
        let names: Vec<_> =
            std::fs::read_dir(&canary).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["file"], "something was made outside by way of {target}");
        assert!(!Path::new("/made").exists());
    }
    assert_eq!(std::fs::read_dir(&data).unwrap().count(), 1);
}

#[test]
fn a_source_that_is_swapped_for_a_link_does_not_uncover_what_the_plan_masks() {
    let home = Home::new();
    // A volume may hold the state directory, which is masked in it: the plan knows where the source leads.
    home.file("work/shared/source/known", "");
    symlink(home.path(""), home.path("work/shared/link")).unwrap();
    let attacker = swapping(&home, "source", "link");
    let volume = format!("{}:/mnt", home.text("work/shared/source"));
    let look = "test -e /mnt/known && echo source; test -d /mnt/work && echo link; ls -A /mnt/state/rootlet";
    let (mut sources, mut links) = (0, 0);
    for _ in 0..RUNS {
        let out = home.sh(["-v", &volume], &format!("{{ {look}; }} 2>/dev/null; true")).run();
        match (out.code(), out.text().as_str()) {
            (0, "source") => sources += 1,
            (0, "link") => links += 1,
            (125, _) => {}
            _ => panic!("the state directory is uncovered, or worse\n{out}"),
        }
    }
    attacker.finish().ok();
    // Links in a source are the caller's own affair, and followed when the run is planned.
    assert!(sources + links > 0);
    // The state is there to be seen.
    let outside = home.command("ls").arg(home.path("state/rootlet")).run().ok();
    outside.prints("boxes");
}

#[test]
fn sources_with_links_and_dots_are_what_they_lead_to_and_devices_are_refused() {
    let home = Home::new();
    home.file("work/one/two/name", "inner");
    home.file("work/one/name", "outer");
    symlink("one/two", home.path("work/link")).unwrap();
    symlink("/dev/zero", home.path("work/device")).unwrap();
    symlink("nowhere", home.path("work/dangling")).unwrap();
    symlink("loop", home.path("work/loop")).unwrap();
    for (source, name) in [("./link", "inner"), ("./link/..", "outer"), ("./one/two/../../link/.", "inner")] {
        home.run(["-v", &format!("{source}:/mnt:ro")], ["cat", "/mnt/name"]).run().ok().prints(name);
    }
    for (source, reason) in [
        ("/dev/zero", "is a device"),
        ("./device", "is a device"),
        ("./dangling", "ENOENT"),
        ("./loop", "ELOOP"),
        ("./one/name/..", "ENOTDIR"),
    ] {
        let out = home.run(["-v", &format!("{source}:/mnt")], ["true"]).run().exits(125);
        assert!(out.errors().contains(reason), "{source}: {out}");
    }
    assert!(!home.path("work/nowhere").exists());
}
