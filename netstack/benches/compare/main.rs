//! The stack against others, in one run: `cargo bench -p netstack --bench compare -- OPTIONS`.
//!
//! ```text
//! --work A,B          only the works whose names begin so (the first column)
//! --who ours,native   only these contenders
//! --rounds N          5
//! --seconds S         length of one measurement (1)
//! --connections N     of the work `many` (10000; the limit of open files should be twice that)
//! --rootlet PATH      another contender, `program`: that program's `netstack` command
//! ```
//!
//! Everything happens in namespaces that the bench makes for itself, as whoever runs it:
//!
//! ```text
//!  internet ── veth ── host ── TAP ── a guest for each contender
//! ```
//!
//! `native` is the host itself in the place of the guest: bare veth. The others are started for each work and take turns
//! in it, so that whatever else the machine does meets all alike; medians are printed, and ours as ratios. The link to
//! the guest has an MTU of 1500 for all. The generators of load are threads of the bench. CPU time is that of the
//! contender's process alone. `--who …,relay` shows what the least relay of connections reaches. Asserts nothing: figures depend on the machine, `met` compares with what is wanted.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program of our own, for people to read"
)]

#[path = "../../tests/common/mod.rs"]
mod common;
mod contenders;
mod load;
mod relay;
mod works;

use std::collections::BTreeMap;
use std::process::{Command, ExitCode};
use std::time::Duration;

use common::{World, enter, sh};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::contenders::{Contender, Running};
use crate::works::{Better, WORKS, Work};

/// What the options say.
pub(crate) struct Options {
    pub(crate) time: Duration,
    pub(crate) connections: usize,
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    match args.first().map(String::as_str) {
        Some("stack") => contenders::serve(&args[1..]),
        Some("relay") => relay::serve(&args[1..]),
        Some("echo") => load::echo_all(&args[1..]),
        _ => return enter(|| compare_all(&args)),
    }
    ExitCode::SUCCESS
}

fn compare_all(args: &[String]) -> ExitCode {
    let value = |name: &str| args.iter().skip_while(|arg| *arg != name).nth(1).cloned();
    let list = |name: &str| value(name).map(|l| l.split(',').map(str::to_owned).collect::<Vec<_>>());
    let rounds: usize = value("--rounds").map_or(5, |n| n.parse().unwrap());
    let options = Options {
        time: Duration::from_secs_f64(value("--seconds").map_or(1.0, |n| n.parse().unwrap())),
        connections: value("--connections").map_or(10_000, |n| n.parse().unwrap()),
    };
    // A network namespace is given to others by a file that it is bound to, which nobody else needs to see.
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    let world = World::new();
    // To pasta the gateway's address stands for the host, so it must not be that of the servers.
    world.internet.run(|| sh("ip addr add 198.51.100.3/24 dev inet0"));
    sh("ip route add default via 198.51.100.3");
    let usual = ["cubic", "reno"].into_iter().find(|name| congestion_control(&world, name));
    let bbr = congestion_control(&world, "bbr");

    let mut all = vec![Contender::Native, Contender::Ours, Contender::Pasta, Contender::Slirp];
    if let Some(path) = value("--rootlet") {
        all.push(Contender::Program(path));
    }
    if let Some(only) = list("--who") {
        all.push(Contender::Relay);
        all.retain(|one| only.iter().any(|name| name == one.name()));
    }
    println!(
        "Linux {}, {} processors, congestion control {} (works of `bbr-`: bbr), {rounds} rounds of {:?}",
        nix::sys::utsname::uname().unwrap().release().display(),
        std::thread::available_parallelism().unwrap(),
        usual.unwrap_or("as it is"),
        options.time,
    );
    all.retain(|one| match one.version() {
        Some(version) => {
            println!("{}: {version}", one.name());
            true
        }
        None => {
            println!("{}: not here", one.name());
            false
        }
    });
    let names: Vec<&str> = all.iter().map(Contender::name).collect();
    let mut head = format!("\n{:<16} {:<10} {:>8}", "work", "part", "unit");
    for name in &names {
        head.push_str(&format!(" {name:>9}"));
    }
    for name in names.iter().filter(|name| **name != "ours") {
        head.push_str(&format!(" {:>9}", format!("÷{name}")));
    }
    println!("{head}  wanted");
    let only = list("--work");
    for work in WORKS {
        if only.as_ref().is_some_and(|only| !only.iter().any(|name| work.name.starts_with(name.as_str()))) {
            continue;
        }
        if work.name.starts_with("bbr-") && !bbr {
            println!("{:<16} this kernel has no BBR", work.name);
            continue;
        }
        if let Some(name) = if work.name.starts_with("bbr-") { Some("bbr") } else { usual } {
            congestion_control(&world, name);
        }
        compare(work, &world, &all, rounds, &options);
    }
    ExitCode::SUCCESS
}

/// Makes `name` what new connections of the host, the internet and guests to come use; whether it could be done.
fn congestion_control(world: &World, name: &'static str) -> bool {
    let set = move || std::fs::write("/proc/sys/net/ipv4/tcp_congestion_control", name).is_ok();
    world.host.run(set) && world.internet.run(set)
}

/// Measures one work for all and prints its lines.
fn compare(work: &Work, world: &World, all: &[Contender], rounds: usize, options: &Options) {
    // part -> contender -> values
    let mut parts: BTreeMap<usize, BTreeMap<usize, Vec<f64>>> = BTreeMap::new();
    let mut failures: BTreeMap<usize, String> = BTreeMap::new();
    let mut running: Vec<Option<Running>> = all.iter().map(|_| None).collect();
    for _ in 0..rounds {
        for (index, contender) in all.iter().enumerate() {
            if failures.contains_key(&index) {
                continue;
            }
            if work.fresh {
                running[index] = None;
            }
            let measured = match &mut running[index] {
                Some(there) => Ok(there),
                empty => contender.start(world, index).map(|new| empty.insert(new)),
            }
            .and_then(|guest| (work.run)(world, guest, options));
            match measured {
                Ok(values) => {
                    for (part, value) in values.into_iter().enumerate() {
                        parts.entry(part).or_default().entry(index).or_default().push(value);
                    }
                }
                Err(why) => {
                    failures.insert(index, why);
                }
            }
            if work.fresh {
                running[index] = None;
            }
        }
    }
    drop(running);
    let ours = all.iter().position(|one| one.name() == "ours");
    for (number, part) in work.parts.iter().enumerate() {
        let by_contender = parts.get(&number);
        let median = |index: usize| {
            if failures.contains_key(&index) {
                return None;
            }
            let mut values = by_contender?.get(&index)?.clone();
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).copied()
        };
        let mut line = format!("{:<16} {:<10} {:>8}", work.name, part.name, part.unit);
        for index in 0..all.len() {
            line.push_str(
                &median(index).map_or_else(|| format!(" {:>9}", "-"), |v| format!(" {:>9}", short(v))),
            );
        }
        let own = ours.and_then(median);
        let ratio = |name: &str| {
            let other = median(all.iter().position(|one| one.name() == name)?)?;
            own.map(|own| own / other).filter(|ratio| ratio.is_finite())
        };
        for one in all.iter().filter(|one| one.name() != "ours") {
            line.push_str(
                &ratio(one.name()).map_or_else(|| format!(" {:>9}", "-"), |r| format!(" {r:>9.2}")),
            );
        }
        println!("{line}  {}", verdict(part, own, &ratio));
    }
    for (index, why) in &failures {
        println!("{:<16} {}: {why}", work.name, all[*index].name());
    }
}

/// What is wanted, and whether it is met as far as that can be told.
fn verdict(part: &works::Part, own: Option<f64>, ratio: &dyn Fn(&str) -> Option<f64>) -> String {
    let sign = match part.better {
        Better::More => "≥",
        Better::Less => "≤",
    };
    let mut words = Vec::new();
    let mut met = Some(true);
    let mut add = |text: String, value: Option<f64>, wanted: f64| {
        words.push(text);
        let holds = value.map(|value| match part.better {
            Better::More => value >= wanted,
            Better::Less => value <= wanted,
        });
        met = met.and_then(|met| holds.map(|holds| met && holds));
    };
    if let Some(wanted) = part.native {
        add(format!("{sign} {wanted} native"), ratio("native"), wanted);
    }
    if let Some(wanted) = part.pasta {
        add(format!("{sign} {wanted} pasta"), ratio("pasta"), wanted);
    }
    if let Some(wanted) = part.own {
        add(format!("{sign} {wanted}"), own, wanted);
    }
    match (words.is_empty(), met) {
        (true, _) => String::new(),
        (_, Some(true)) => format!("{}: met", words.join(", ")),
        (_, Some(false)) => format!("{}: NOT MET", words.join(", ")),
        (_, None) => words.join(", "),
    }
}

fn short(value: f64) -> String {
    match value.abs() {
        a if a >= 1000.0 => format!("{value:.0}"),
        a if a >= 100.0 => format!("{value:.1}"),
        a if a >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// The first line that a program says about its version.
pub(crate) fn first_line(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().next().map(str::to_owned)
}
