//! Attacks that must fail, each aimed at a canary. Where it can be done without a switch that
//! turns a defence off, the same attack is also run outside the sandbox and must hit there: else
//! it would prove nothing.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a failure here is a failed test, and says so")]

#[path = "../common/mod.rs"]
mod common;

mod control_socket;
mod descriptors;
mod hostile_rootfs;
mod init_process;
mod names;
mod network_storm;
mod overlay_storm;
mod own_program;
mod privileges;
mod proc_and_sys;
mod secrets;
mod stale_pids;
mod system_calls;
mod terminal_input;
mod volumes;
