//! How: a pure function from what is wanted and what the host allows to ordered steps.
//!
//! Nothing here does I/O, so every decision can be printed (`--dry-run`) and tested
//! from recorded facts. Every choice that is weaker than what was asked leaves a
//! [`Note`] with its reason.

mod build;
mod env;
mod explain;
mod ids;
mod mounts;
mod net;
mod overlay;
#[cfg(test)]
mod tests;

pub use build::{PlanError, plan};
pub use explain::{explain, explain_json};

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::host::layers::RootFacts;
use crate::spec::{IdExtent, LoopbackSpec, PublishSpec, RateSpec, TimeSpec, UserSpec};

/// Where a box is kept and what its root is made of: found before planning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoxPlace {
    /// Name of the box.
    pub name: String,
    /// Directory of all state, without links; hidden inside.
    #[serde(with = "crate::spec::os")]
    pub state_root: PathBuf,
    /// The box's own directory below it.
    #[serde(with = "crate::spec::os")]
    pub state_dir: PathBuf,
    /// Where changes are kept, without links; `None`: nowhere.
    pub upper: Option<UpperPlan>,
    /// What was found of the root.
    pub root: RootFacts,
}

/// Everything the launch does, decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Name of the box.
    pub name: String,
    /// Where its state is kept.
    #[serde(with = "crate::spec::os")]
    pub state_dir: PathBuf,
    /// Keep nothing afterwards.
    pub remove: bool,
    /// User and group ids.
    pub ids: IdPlan,
    /// Namespaces made, the user namespace first: it owns the others.
    pub namespaces: Vec<Namespace>,
    /// Offsets of the time namespace.
    pub time: Option<TimeSpec>,
    /// Host name inside.
    pub hostname: String,
    /// Domain name inside.
    pub domainname: Option<String>,
    /// The root file system.
    pub root: RootPlan,
    /// What is mounted on it, in order.
    pub mounts: Vec<MountStep>,
    /// The network.
    pub net: NetPlan,
    /// The payload.
    pub process: ProcessPlan,
    /// What the payload may not do.
    pub confine: ConfinePlan,
    /// What is weaker or other than asked, and why.
    pub notes: Vec<Note>,
}

/// How the user namespace gets its ids.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdPlan {
    /// uid_map.
    pub uids: Vec<IdExtent>,
    /// gid_map.
    pub gids: Vec<IdExtent>,
    /// Who writes them.
    pub writer: MapWriter,
    /// Write `deny` to /proc/PID/setgroups first (required for an unprivileged gid_map).
    pub deny_setgroups: bool,
}

impl IdPlan {
    /// The one (uid, gid) that exists inside, if there is only one.
    #[must_use]
    pub fn single(&self) -> Option<(u32, u32)> {
        match (self.uids.as_slice(), self.gids.as_slice()) {
            ([u], [g]) if u.count == 1 && g.count == 1 => Some((u.inside, g.inside)),
            _ => None,
        }
    }
}

/// Who writes uid_map and gid_map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MapWriter {
    /// The setup process itself: its own single id (user_namespaces(7)).
    Setup,
    /// The supervisor, which holds CAP_SETUID and CAP_SETGID.
    Supervisor,
    /// newuidmap(1) and newgidmap(1).
    Helpers {
        /// Path of newuidmap.
        #[serde(with = "crate::spec::os")]
        newuidmap: PathBuf,
        /// Path of newgidmap.
        #[serde(with = "crate::spec::os")]
        newgidmap: PathBuf,
    },
}

/// A namespace that is made (namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the names are those of namespaces(7)")]
pub enum Namespace {
    User,
    Pid,
    Mnt,
    Uts,
    Ipc,
    Net,
    Cgroup,
    Time,
}

/// The root file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootPlan {
    /// Layers, the lowest first.
    pub layers: Vec<LayerPlan>,
    /// Directories, files and links made up for this run.
    pub generated: Vec<GeneratedPlan>,
    /// Upper and work directory; `None`: read-only.
    pub upper: Option<UpperPlan>,
}

/// One layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerPlan {
    /// Directory on the host.
    #[serde(with = "crate::spec::os")]
    pub host_path: PathBuf,
    /// Owners are shown through the inverse of the id maps rather than as they are on disk.
    pub translate_owners: bool,
    /// Its whiteouts and opaque directories hide what is below.
    pub whiteouts: bool,
    /// Shown as empty directories; relative to `host_path`.
    #[serde(with = "crate::spec::os::list")]
    pub hidden: Vec<PathBuf>,
}

/// The writable layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpperPlan {
    /// Where changes are kept.
    #[serde(with = "crate::spec::os")]
    pub dir: PathBuf,
    /// Work directory on the same file system.
    #[serde(with = "crate::spec::os")]
    pub work: PathBuf,
}

/// One object of the generated init layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GeneratedPlan {
    /// Path inside, relative to the root.
    #[serde(with = "crate::spec::os")]
    pub path: PathBuf,
    /// Permission bits.
    pub mode: u32,
    /// File content; `None`: a directory.
    pub content: Option<String>,
}

/// One mount on the root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountStep {
    /// A new /proc of the pid namespace.
    Proc,
    /// A new /sys of the net namespace, read-only.
    Sys,
    /// /dev: tmpfs with these device nodes of the host bound in, pts, shm, mqueue and links.
    Dev {
        /// Names below /dev.
        nodes: Vec<String>,
    },
    /// An empty tmpfs.
    Tmpfs {
        /// Path inside.
        #[serde(with = "crate::spec::os")]
        root_path: PathBuf,
        /// Mount options.
        options: String,
    },
    /// A host path seen inside.
    Bind {
        /// Path on the host.
        #[serde(with = "crate::spec::os")]
        host_path: PathBuf,
        /// Path inside.
        #[serde(with = "crate::spec::os")]
        root_path: PathBuf,
        /// Read-only recursively.
        read_only: bool,
    },
    /// A path inside made unreadable (an empty read-only directory or /dev/null over it), if it exists.
    Mask(#[serde(with = "crate::spec::os")] PathBuf),
    /// A path inside made read-only, if it exists.
    ReadOnly(#[serde(with = "crate::spec::os")] PathBuf),
}

/// The network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NetPlan {
    /// The in-process stack on a TAP.
    Stack(Box<StackPlan>),
    /// Only the loopback of a new net namespace.
    None,
    /// The host's net namespace.
    Host,
}

/// The in-process stack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StackPlan {
    /// Name of the TAP inside.
    pub tap: String,
    /// Link MTU in bytes.
    pub mtu: u16,
    /// Address and prefix length inside.
    pub guest_v4: (std::net::Ipv4Addr, u8),
    /// The gateway's address: the stack and its DNS forwarder.
    pub gateway_v4: std::net::Ipv4Addr,
    /// Address and prefix length inside.
    pub guest_v6: (std::net::Ipv6Addr, u8),
    /// The gateway's address.
    pub gateway_v6: std::net::Ipv6Addr,
    /// Resolvers that are asked; none: the host's.
    pub dns: Vec<std::net::SocketAddr>,
    /// Domains in which short names are looked for.
    pub search: Vec<String>,
    /// Dots with which a name is tried as it is first; `None`: as the libc will have it.
    pub ndots: Option<u8>,
    /// Names that were given to addresses.
    pub hosts: Vec<(String, std::net::IpAddr)>,
    /// Published ports.
    pub publish: Vec<PublishSpec>,
    /// Whether the gateway's address leads to the host's loopback.
    pub host_loopback: LoopbackSpec,
    /// If there are any, nothing else is reached.
    #[serde(with = "crate::spec::text_list")]
    pub allow: Vec<netstack::Rule>,
    /// Not reached, whatever is allowed.
    #[serde(with = "crate::spec::text_list")]
    pub deny: Vec<netstack::Rule>,
    /// How fast data may come.
    pub rate_in: Option<RateSpec>,
    /// How fast data may go.
    pub rate_out: Option<RateSpec>,
    /// A socket that takes commands while it runs.
    #[serde(with = "crate::spec::os::option")]
    pub control: Option<PathBuf>,
}

impl StackPlan {
    /// The gateway's name: the one that systemd's nss-myhostname has for a gateway.
    pub const GATEWAY_NAME: &str = "_gateway";
    /// Ethernet address of the inside: locally administered, seen by nobody but the stack.
    pub const GUEST_MAC: [u8; 6] = [0x02, 0x72, 0x6f, 0x6f, 0x74, 0x01];
    /// Names that lead to the gateway's IPv4 address, as those of other tools do.
    pub const GATEWAY_NAMES: [&str; 2] = ["host.containers.internal", "host.docker.internal"];

    /// Those of them that were not given to another address.
    pub fn gateway_names(&self) -> impl Iterator<Item = &'static str> {
        let given = |name: &str| self.hosts.iter().any(|(other, _)| other.eq_ignore_ascii_case(name));
        Self::GATEWAY_NAMES.into_iter().filter(move |name| !given(name))
    }
    /// Ethernet address of the gateway.
    pub const GATEWAY_MAC: [u8; 6] = [0x02, 0x72, 0x6f, 0x6f, 0x74, 0x02];
}

/// The payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessPlan {
    /// Command and arguments.
    #[serde(with = "crate::spec::os::list")]
    pub args: Vec<OsString>,
    /// Whole environment.
    #[serde(with = "crate::spec::os::pairs")]
    pub env: Vec<(OsString, OsString)>,
    /// Working directory inside.
    #[serde(with = "crate::spec::os")]
    pub workdir: PathBuf,
    /// `--workdir` was given: a missing one is an error rather than `/`.
    pub workdir_required: bool,
    /// Who it runs as, looked up inside; `None`: the first mapped id.
    pub user: Option<UserSpec>,
    /// A terminal of its own.
    pub terminal: bool,
    /// Standard input passes through although it is a terminal.
    pub interactive: bool,
    /// Ended after this time.
    pub timeout: Option<Duration>,
}

/// What the payload may not do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfinePlan {
    /// Capabilities kept, by their names in capabilities(7) without `CAP_`.
    pub keep_caps: Vec<String>,
    /// Which system call filter.
    pub seccomp: SeccompPlan,
    /// Landlock keeps the payload from abstract unix sockets of the host.
    pub scope_abstract_sockets: bool,
}

/// Which system call filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SeccompPlan {
    /// The default filter.
    Default,
    /// The default filter less what another sandbox inside needs.
    Nested,
}

/// Something weaker or other than asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// What.
    pub what: String,
    /// Why.
    pub reason: String,
    /// Something security-relevant holds less than was asked: told in any case.
    pub weaker: bool,
}

impl Note {
    fn new(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { what: what.into(), reason: reason.into(), weaker: false }
    }
}
