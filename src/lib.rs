//! A rootless sandbox: be root inside, stay yourself outside.
//!
//! ```text
//!  flags
//!    |  cli                     text in; nothing on the machine touched yet
//!    v
//!  SandboxSpec -> ValidSpec     spec      WHAT is wanted: plain data; validation names the field
//!    |            HostFacts     host      what this machine allows: found by trying, never by version
//!    v               |
//!  Plan <------------+          plan      HOW: a pure function; ordered steps; every fallback and its reason
//!    v
//!  launch                       launch    clone, maps, hand-shake; each step can be undone
//!    v
//!  supervise                    supervise one event loop until the payload is gone
//!    v
//!  RunReport                    report    what happened; cli renders it for people or as JSON
//! ```
//!
//! Processes, and the one file where each begins:
//!
//! ```text
//!  supervisor      launch/mod.rs     host namespaces, our user; after the fork its threads:
//!   |                                main loop, network stack, overlay workers
//!   +- setup       stage/setup.rs    pid 1 of the sandbox until pivot_root: mounts, names, TAP
//!   |   = init     stage/init.rs     the same pid afterwards: starts the payload, reaps, reports
//!   |   +- payload stage/payload.rs  last steps before execve; from here on untrusted
//! ```
//!
//! Arrows point one way: `cli` → `spec` → `plan` → `launch`/`stage`/`supervise` → `sys`. `spec`
//! needs only serde, `plan` does no I/O, unsafe code is in `sys` alone. The overlay file system
//! and the network stack are the crates `fsoverlay` and `netstack`, which know nothing of
//! sandboxes.

pub mod cli;
pub mod config;
pub mod control;
pub mod error;
pub mod host;
pub mod launch;
mod local_socket;
pub mod log;
pub mod plan;
pub mod report;
pub mod sandbox;
pub mod seccomp;
pub mod spec;
pub mod stage;
pub mod supervise;
mod sys;

pub use sys::process::has_foreign_privilege;
