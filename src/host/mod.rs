//! What this host allows, found by trying, never by version.
//!
//! [`HostFacts::gather`] is on the start path and reads only what planning needs and the
//! launch cannot simply try. [`layers`] looks at the directories a spec names. [`doctor`]
//! tries everything else, and [`hints`] is the one table that says how to mend what is
//! missing, for `doctor` and for the errors of `run` alike.

pub mod doctor;
mod gather;
pub mod hints;
pub mod layers;
pub mod ports;
pub mod probe;
mod resolv;

use std::ffi::OsString;
use std::path::PathBuf;

pub use resolv::ResolvFacts;

use crate::spec::IdExtent;

/// What planning needs to know of this host and its caller. Gathered by
/// [`HostFacts::gather`] in well under a millisecond: only what cannot simply be tried
/// by the launch itself. The doctor tries everything else.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HostFacts {
    /// Effective uid of the caller.
    pub uid: u32,
    /// Effective gid of the caller.
    pub gid: u32,
    /// The uid_map and gid_map this process itself lives in show all ids: it is in
    /// the initial user namespace (or one that looks like it).
    pub initial_userns: bool,
    /// CAP_SETUID, CAP_SETGID and CAP_SETFCAP are effective: this process may write any
    /// map of its own ids.
    pub may_set_ids: bool,
    /// setgroups(2) is denied in this process's user namespace, and so in every one below it.
    pub setgroups_denied: bool,
    /// Landlock can keep a process from abstract unix sockets (Linux 6.12).
    pub landlock_scopes: bool,
    /// no_new_privs is set: setuid helpers would run without their privilege.
    pub no_new_privs: bool,
    /// The caller's name in /etc/passwd.
    pub user_name: Option<String>,
    /// Subordinate uid range (first, count) from /etc/subuid.
    pub subuids: Option<(u32, u32)>,
    /// Subordinate gid range (first, count) from /etc/subgid.
    pub subgids: Option<(u32, u32)>,
    /// First of 65,536 ids that are in nobody's range: two users must not share one.
    pub free_subids: u32,
    /// newuidmap(1), if found in /usr/bin or PATH with the privilege it needs.
    #[serde(with = "crate::spec::os::option")]
    pub newuidmap: Option<PathBuf>,
    /// newgidmap(1).
    #[serde(with = "crate::spec::os::option")]
    pub newgidmap: Option<PathBuf>,
    /// The uid extents of this process's own user namespace (/proc/self/uid_map): needed
    /// when it is itself inside a sandbox.
    pub own_uid_map: Vec<IdExtent>,
    /// The gid extents.
    pub own_gid_map: Vec<IdExtent>,
    /// IPv4 networks this host has a route to other than the default one: (address, prefix length).
    pub networks_v4: Vec<(std::net::Ipv4Addr, u8)>,
    /// What /etc/resolv.conf says.
    pub resolv: ResolvFacts,
    /// The caller's current directory, if it has a name.
    #[serde(with = "crate::spec::os::option")]
    pub current_dir: Option<PathBuf>,
    /// The caller's environment. Never printed or stored: it holds secrets.
    #[serde(skip)]
    pub environ: Vec<(OsString, OsString)>,
}
