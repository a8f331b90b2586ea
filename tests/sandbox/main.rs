//! Tests of the program as its users meet it: the real binary, a home of its own for each test,
//! and nothing left afterwards. `docs/testing.md` says how they are run.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a failure here is a failed test, and says so")]

#[path = "../common/mod.rs"]
mod common;

mod bad_input;
mod boxes;
mod cli;
mod control;
mod docs;
mod files;
mod kill;
mod namespaces;
mod nested;
mod netstack;
mod network;
mod overlay;
mod ownership;
mod terminal;
