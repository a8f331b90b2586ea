//! The stack against the real kernel: in a world of network namespaces (see `common`), as whoever runs the tests.
//!
//! Every test has a guest and a stack of its own. Names of tests to run, or parts of them, may be given as arguments.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a test program")]

#[path = "../common/mod.rs"]
mod common;

mod dns;
mod flowlog;
mod host;
mod icmp;
mod joined;
mod life;
mod limits;
mod path;
mod policy;
mod publish;
mod tcp;
mod tools;
mod udp;

use std::panic::catch_unwind;
use std::process::ExitCode;
use std::time::Instant;

use common::*;

/// A test's name and what it does.
pub(crate) type Test = (&'static str, fn(&World));

/// Lists the tests of a module.
#[macro_export]
macro_rules! tests {
    ($($name:ident,)*) => {
        pub(crate) const TESTS: &[$crate::Test] =
            &[$((concat!(module_path!(), "::", stringify!($name)), $name),)*];
    };
}

/// Each module's, in the order in which they run.
const TESTS: &[&[Test]] = &[
    tcp::TESTS,
    udp::TESTS,
    icmp::TESTS,
    path::TESTS,
    limits::TESTS,
    policy::TESTS,
    flowlog::TESTS,
    host::TESTS,
    dns::TESTS,
    publish::TESTS,
    joined::TESTS,
    life::TESTS,
];

fn main() -> ExitCode {
    if std::env::args().any(|arg| arg == "--list") {
        TESTS.iter().copied().flatten().for_each(|(path, _)| println!("{}: test", name_of(path)));
        return ExitCode::SUCCESS;
    }
    enter(|| {
        let log = std::env::var("RUST_LOG").unwrap_or_default();
        if !log.is_empty() {
            tracing_subscriber::fmt().with_env_filter(log).with_writer(std::io::stderr).init();
        }
        let world = World::new();
        let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
        let mut failed = 0;
        let started = Instant::now();
        for (path, test) in TESTS.iter().copied().flatten() {
            let name = name_of(path);
            if !wanted.is_empty() && !wanted.iter().any(|part| name.contains(part.as_str())) {
                continue;
            }
            let begin = Instant::now();
            let result = catch_unwind(|| test(&world));
            failed += usize::from(result.is_err());
            let word = if result.is_ok() { "ok" } else { "FAILED" };
            println!("test {name} ... {word} ({} ms)", begin.elapsed().as_millis());
        }
        println!("{failed} failed; {} s", started.elapsed().as_secs());
        if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    })
}

/// A test's path without the name of this program.
fn name_of(path: &'static str) -> &'static str {
    path.split_once("::").map_or(path, |(_, name)| name)
}
