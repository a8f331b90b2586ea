//! The overlay mounted for real, as the user who runs the tests.
//!
//! Each case has two halves. The outer half prepares directories, starts the example
//! program `mount` (which makes the namespaces and serves), and looks at the disk
//! afterwards. The inner half is this program started again by it, with the mount as its
//! working directory. A failure is an error of either half. The example is part of this
//! program, so that it is never an older build.
//!
//! `FSOVERLAY_NO_SKIP` makes a skipped case a failure. Arguments filter cases by name.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a test runner reports on its output")]

mod ahead;
mod disk;
mod durability;
mod hardlinks;
mod harness;
mod layers;
mod limits;
#[path = "../../examples/mount.rs"]
mod mount;
mod near;
mod numbers;
mod operation;
mod owners;
mod passthrough;
mod random;
mod redirects;
mod robust;
mod semantics;
mod steps;
mod upper;

use std::process::ExitCode;

use harness::{Case, Failure};

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    cases.extend(semantics::CASES);
    cases.extend(owners::CASES);
    cases.extend(disk::CASES);
    cases.extend(layers::CASES);
    cases.extend(ahead::CASES);
    cases.extend(near::CASES);
    cases.extend(limits::CASES);
    cases.extend(steps::CASES);
    cases.extend(upper::CASES);
    cases.extend(redirects::CASES);
    cases.extend(numbers::CASES);
    cases.extend(hardlinks::CASES);
    cases.extend(random::CASES);
    cases.extend(durability::CASES);
    cases.extend(robust::CASES);
    cases.extend(passthrough::CASES);
    cases
}

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    if std::env::args().nth(1).as_deref() == Some("--inside") {
        args.next();
        return inside(args.collect());
    }
    if std::env::args().nth(1).as_deref() == Some("--mount") {
        return mount::main().unwrap_or_else(|err| {
            eprintln!("Error: {err:?}");
            ExitCode::FAILURE
        });
    }
    let filters: Vec<String> = args.filter(|a| !a.starts_with('-')).collect();
    if std::env::args().any(|a| a == "--list") {
        for case in cases() {
            println!("{}: test", case.name);
        }
        return ExitCode::SUCCESS;
    }
    let no_skip = std::env::var_os("FSOVERLAY_NO_SKIP").is_some();
    let (mut failed, mut passed, mut skipped) = (0, 0, 0);
    for case in cases() {
        if !filters.is_empty() && !filters.iter().any(|f| case.name.contains(f.as_str())) {
            continue;
        }
        match harness::run(&case) {
            Ok(()) => {
                passed += 1;
                println!("test {} ... ok", case.name);
            }
            Err(Failure::Skip(reason)) if !no_skip => {
                skipped += 1;
                println!("test {} ... skipped: {reason}", case.name);
            }
            Err(Failure::Skip(reason) | Failure::Wrong(reason)) => {
                failed += 1;
                println!("test {} ... FAILED\n{reason}", case.name);
            }
        }
    }
    println!("\n{passed} passed, {failed} failed, {skipped} skipped");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The inner half of a case: `NAME ARGS…`.
fn inside(mut args: Vec<String>) -> ExitCode {
    if args.is_empty() {
        return ExitCode::FAILURE;
    }
    let name = args.remove(0);
    let Some(case) = cases().into_iter().find(|c| c.name == name) else {
        eprintln!("no case is called {name}");
        return ExitCode::FAILURE;
    };
    match (case.inside)(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Skip(reason)) => {
            eprintln!("skip: {reason}");
            ExitCode::from(harness::SKIPPED)
        }
        Err(Failure::Wrong(reason)) => {
            eprintln!("{reason}");
            ExitCode::FAILURE
        }
    }
}
