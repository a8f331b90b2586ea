//! The root crate's unsafe lines, and the kernel interfaces that nix and rustix lack.
//!
//! Wrappers take borrowed descriptors and typed values, give owned descriptors and
//! errno, and hold no policy.
#![expect(unsafe_code, reason = "the one module of this crate that may")]

pub(crate) mod exec_stage;
pub(crate) mod fdpass;
pub(crate) mod landlock;
pub(crate) mod mount;
pub(crate) mod netlink;
pub(crate) mod process;
pub(crate) mod seccomp;
