//! How long a sandbox takes to start and end, as a ratio to fork and exec of the same command.
//!
//! `cargo bench --bench startup [-- ROUNDS]`. Every round measures each program once, in turn, so
//! that whatever else the machine does meets all of them alike. Medians and minima; the ratio is
//! of medians. Others are measured if they are installed. `ROOTLET_BENCH_CHECK=1` makes a ratio
//! above the limit a failure, and a network that can be used too late.
//!
//! And what rootlet's own network costs until it can be used: a command that connects to a server on the host and ends,
//! with that network and with the host's. The difference is of medians, too; bash connects, if it is installed.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a program of our own, for people to read")]

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What `rootlet run -- true` with everything may take, in times of fork and exec.
const LIMIT: f64 = 12.0;

/// What it may take until the network can be used.
const FIRST_CONNECTION: Duration = Duration::from_millis(5);

const OURS: &str = "rootlet: the first connection by its own network";
const HOSTS: &str = "rootlet --network host: the first connection";

struct Contender {
    name: &'static str,
    words: Vec<String>,
    times: Vec<Duration>,
}

fn main() {
    let rounds: u32 = std::env::args().skip(1).find_map(|word| word.parse().ok()).unwrap_or(200);
    let home = std::env::temp_dir().join(format!("rootlet-bench-{}", std::process::id()));
    std::fs::create_dir_all(&home).unwrap();
    let rootlet = env!("CARGO_BIN_EXE_rootlet");
    let mut contenders = vec![
        contender("fork and exec of true", &["true"]),
        contender("rootlet: all namespaces, overlay, network", &[rootlet, "run", "--", "true"]),
        contender("rootlet --network none", &[rootlet, "run", "--network", "none", "--", "true"]),
        contender("rootlet --network host", &[rootlet, "run", "--network", "host", "--", "true"]),
    ];
    if found("bwrap") {
        let words =
            ["bwrap", "--unshare-all", "--bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "true"];
        contenders.push(contender("bubblewrap: all namespaces, no overlay, no network", &words));
    }
    if found("unshare") {
        contenders.push(contender(
            "unshare -Urmpfinu --mount-proc",
            &["unshare", "-Urmpfinu", "--mount-proc", "true"],
        ));
    }
    if found("crun") && crun_bundle(&home) {
        let bundle = home.to_str().unwrap();
        let root = format!("--root={bundle}/crun");
        contenders.push(contender("crun", &["crun", &root, "run", "--bundle", bundle, "rootlet-bench"]));
    }
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || listener.incoming().for_each(drop));
    if found("bash") {
        let connect = |host: &str| format!("exec 3<>/dev/tcp/{host}/{port}");
        let allow = format!("--allow-host-loopback={port}");
        let ours = [rootlet, "run", &allow, "--", "bash", "-c", &connect("host.containers.internal")];
        let hosts = [rootlet, "run", "--network", "host", "--", "bash", "-c", &connect("localhost")];
        contenders.push(contender(OURS, &ours));
        contenders.push(contender(HOSTS, &hosts));
    }
    contenders.retain(|contender| {
        let works = run(contender, &home).is_some();
        if !works {
            println!("left out, as it does not work here: {}", contender.name);
        }
        works
    });
    for _ in 0..rounds {
        for contender in &mut contenders {
            let time = run(contender, &home).expect("it worked a moment ago");
            contender.times.push(time);
        }
    }
    std::fs::remove_dir_all(&home).unwrap();

    let base = median(&contenders[0].times);
    println!("\n{rounds} rounds, as uid {}\n", rustix::process::geteuid().as_raw());
    println!("{:>10} {:>10} {:>7}", "median", "minimum", "ratio");
    for contender in &contenders {
        let (median, minimum) = (median(&contender.times), *contender.times.iter().min().unwrap());
        println!(
            "{:>7.2} ms {:>7.2} ms {:>7.1}  {}",
            milliseconds(median),
            milliseconds(minimum),
            milliseconds(median) / milliseconds(base),
            contender.name
        );
    }
    let check = std::env::var_os("ROOTLET_BENCH_CHECK").is_some_and(|value| value == "1");
    let ratio = milliseconds(median(&contenders[1].times)) / milliseconds(base);
    let of = |name| contenders.iter().find(|one| one.name == name).map(|one| median(&one.times));
    if let (Some(ours), Some(hosts)) = (of(OURS), of(HOSTS)) {
        let until = milliseconds(ours) - milliseconds(hosts);
        let wanted = milliseconds(FIRST_CONNECTION);
        println!("\nuntil rootlet's network can be used: {until:.2} ms (wanted: {wanted:.0})");
        if check {
            assert!(until <= wanted, "the network can be used after {until:.2} ms, later than {wanted:.0}");
        }
    }
    if check {
        assert!(ratio <= LIMIT, "the start takes {ratio:.1} times fork and exec, more than {LIMIT}");
    }
}

fn contender(name: &'static str, words: &[&str]) -> Contender {
    Contender { name, words: words.iter().map(|word| (*word).to_owned()).collect(), times: Vec::new() }
}

/// Runs it once; `None` when it failed.
fn run(contender: &Contender, home: &Path) -> Option<Duration> {
    let mut command = Command::new(&contender.words[0]);
    command
        .args(&contender.words[1..])
        .env("HOME", home)
        .env("XDG_STATE_HOME", home.join("state"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let started = Instant::now();
    let status = command.status().ok()?;
    let took = started.elapsed();
    status.success().then_some(took)
}

fn median(times: &[Duration]) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted[sorted.len() / 2]
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn found(program: &str) -> bool {
    std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .any(|dir| dir.join(program).is_file())
}

/// A bundle for crun: the host's root, read-only, and `true`.
fn crun_bundle(dir: &Path) -> bool {
    let rootless = rustix::process::geteuid().as_raw() != 0;
    let mut spec = Command::new("crun");
    spec.arg("spec").current_dir(dir).stderr(Stdio::null());
    if rootless {
        spec.arg("--rootless");
    }
    if !spec.status().is_ok_and(|status| status.success()) {
        return false;
    }
    let path = dir.join("config.json");
    let Ok(text) = std::fs::read(&path) else { return false };
    let Ok(mut config) = serde_json::from_slice::<serde_json::Value>(&text) else { return false };
    config["process"]["args"] = serde_json::json!(["true"]);
    config["process"]["terminal"] = false.into();
    config["root"] = serde_json::json!({ "path": "/", "readonly": true });
    std::fs::write(path, config.to_string()).is_ok()
}
