//! rootlet inside rootlet.

use std::time::Duration;

use crate::common::{Home, Lab, lab, rootlet_binary, skip};

/// `rootlet run --nested --rm -- ` three times around a script.
fn three_deep(home: &Home, script: &str) -> crate::common::Cmd {
    let rootlet = rootlet_binary().into_os_string().into_string().unwrap();
    // Inside, the state of the outer one is hidden: each level keeps its own below its /tmp.
    let level = |depth: u32| {
        [
            "env".to_owned(),
            format!("XDG_STATE_HOME=/tmp/state-{depth}"),
            rootlet.clone(),
            "run".into(),
            "--rm".into(),
            "--nested".into(),
            "--".into(),
        ]
    };
    let words: Vec<String> =
        level(2).into_iter().chain(level(3)).chain(["sh".into(), "-c".into(), script.to_owned()]).collect();
    home.run(["--nested"], words).deadline(Duration::from_secs(120))
}

#[test]
fn three_deep_each_with_its_own_overlay() {
    let home = Home::new();
    home.file("work/file", "host\n");
    let script = "cat file; echo third > file; cat file; rm -rf /usr/share/doc; mkdir /opt/three; ls -d /opt/three; readlink /proc/self/ns/user | cut -c1-5";
    three_deep(&home, script).run().ok().prints("host\nthird\n/opt/three\nuser:");
    assert_eq!(std::fs::read(home.path("work/file")).unwrap(), b"host\n");
}

#[test]
fn three_deep_with_network() {
    let Some(lab) = lab() else { skip!("outside tests/lab there are no servers to talk to") };
    let home = Home::new();
    let url = format!("http://{}:{}/deep", lab.world, Lab::HTTP);
    three_deep(&home, &format!("curl -sS --max-time 50 {url}; getent hosts world.test | wc -l"))
        .run()
        .ok()
        .prints("hello from the world, /deep\n1");
}

#[test]
fn each_level_has_namespaces_of_its_own() {
    let home = Home::new();
    let text = three_deep(
        &home,
        "for n in user pid mnt uts ipc net cgroup; do readlink /proc/self/ns/$n; done; cat /proc/1/comm",
    )
    .run()
    .ok()
    .text();
    for line in text.lines().filter(|line| line.contains(':')) {
        let kind = line.split(':').next().unwrap();
        let host = std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
        assert_ne!(host.to_str().unwrap(), line);
    }
}

#[test]
fn without_nested_an_inner_rootlet_fails_with_a_hint() {
    let home = Home::new();
    let rootlet = rootlet_binary();
    let inner = [rootlet.to_str().unwrap(), "run", "--rm", "--", "true"];
    let out = home.run(["--env=XDG_STATE_HOME=/tmp/inner-state"], inner).run().exits(125);
    out.says("error:").says("hint:");
}

#[test]
fn nested_gives_fuse_and_tun_and_only_then() {
    let home = Home::new();
    home.sh(["--nested"], "test -c /dev/fuse && test -c /dev/net/tun && echo both").run().ok().prints("both");
    home.sh([""; 0], "test ! -e /dev/fuse && test ! -e /dev/net && echo none").run().ok().prints("none");
}

#[test]
fn the_exit_status_passes_through_all_levels() {
    let home = Home::new();
    three_deep(&home, "exit 77").run().exits(77);
    three_deep(&home, "kill -9 $$").run().exits(137);
}

#[test]
fn deeper_than_the_kernel_allows_is_a_clean_error() {
    let home = Home::new();
    // user_namespaces(7): 32 within one another. As many as go, then rootlet must say why it cannot.
    let deep = |depth: usize, command: &[&str]| {
        let outer = ["unshare", "--user", "--map-root-user"].repeat(depth);
        home.command("env").args(outer).args(command).run()
    };
    let depth = (20..40).rev().find(|depth| deep(*depth, &["true"]).code() == 0).expect("20 are possible");
    let binary = rootlet_binary();
    let run = [binary.to_str().unwrap(), "run", "--rm", "--", "true"];
    deep(depth, &run).exits(125).says("32 deep");
    deep(depth - 1, &run).ok();
}
