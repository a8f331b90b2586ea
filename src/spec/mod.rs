//! What is wanted: plain data, filled from flags today and from files and bundles later.
//!
//! Nothing here touches the machine. [`validate`](SandboxSpec::validate) turns a
//! [`SandboxSpec`] into a [`ValidSpec`], the only type that [`crate::plan`] accepts.

pub(crate) mod os;
pub mod overlay;
pub mod parse;
pub mod slirp;
pub(crate) mod text_list;
mod validate;

pub use validate::{EXTENTS_MAX, SpecError, ValidSpec, check_box_name};

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use netstack::Rule;
use serde::{Deserialize, Serialize};

/// Everything that is wanted of one sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxSpec {
    /// Name of the box; `None`: one is made up.
    pub name: Option<String>,
    /// Keep nothing when the run is over.
    pub remove: bool,
    /// The payload.
    pub process: ProcessSpec,
    /// The file system.
    pub fs: FsSpec,
    /// User and group ids.
    pub ids: IdsSpec,
    /// The network.
    pub net: NetSpec,
    /// Host name inside; `None`: the name of the box.
    pub hostname: Option<String>,
    /// NIS domain name inside (domainname(1)).
    pub domainname: Option<String>,
    /// A time namespace with these offsets; `None`: the host's clocks.
    pub time: Option<TimeSpec>,
    /// Allow another sandbox inside this one: nested user namespaces, mounts,
    /// /dev/fuse and /dev/net/tun.
    pub nested: bool,
}

impl SandboxSpec {
    /// `args` over the host's own tree, with everything else as `run` has it by default.
    #[must_use]
    pub fn new(args: Vec<OsString>) -> Self {
        Self {
            name: None,
            remove: false,
            process: ProcessSpec { args, inherit_env: true, ..ProcessSpec::default() },
            fs: FsSpec::default(),
            ids: IdsSpec::default(),
            net: NetSpec::default(),
            hostname: None,
            domainname: None,
            time: None,
            nested: false,
        }
    }
}

/// The payload.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSpec {
    /// Command and arguments; the command is looked up in the payload's `PATH`.
    #[serde(with = "os::list")]
    pub args: Vec<OsString>,
    /// Start from the caller's environment (over the host's tree) or from a minimal one.
    pub inherit_env: bool,
    /// Variables set (`Some`) or taken away (`None`), in order.
    #[serde(with = "os::changes")]
    pub env: Vec<(OsString, Option<OsString>)>,
    /// Working directory inside, absolute.
    #[serde(with = "os::option")]
    pub workdir: Option<PathBuf>,
    /// Who the payload runs as.
    pub user: Option<UserSpec>,
    /// Give the payload a terminal of its own (`-t`).
    pub terminal: bool,
    /// Keep standard input open although it is a terminal (`-i`).
    pub interactive: bool,
    /// End the payload after this time.
    pub timeout: Option<Duration>,
}

/// `USER[:GROUP]`, each a name of the sandbox's /etc/passwd or /etc/group, or a number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserSpec {
    /// User name or number.
    pub user: String,
    /// Group name or number; `None`: the user's own group.
    pub group: Option<String>,
}

/// The file system.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsSpec {
    /// What lies under the changes.
    pub root: RootSpec,
    /// Keep the changes in this directory instead of the box's own place.
    #[serde(with = "os::option")]
    pub upper: Option<PathBuf>,
    /// No change at all is possible, except on volumes and tmpfs.
    pub read_only: bool,
    /// Directories and files of the host seen inside.
    pub volumes: Vec<VolumeSpec>,
    /// Empty file systems in memory.
    pub tmpfs: Vec<TmpfsSpec>,
}

/// What lies under the changes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RootSpec {
    /// The host's own file system.
    #[default]
    Host,
    /// These directories, the lowest first. `--rootfs DIR` is one such layer.
    Layers(Vec<LayerSpec>),
}

/// `--layer DIR[:ro|:ro+wh]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerSpec {
    /// The directory.
    #[serde(with = "os")]
    pub host_path: PathBuf,
    /// Its whiteouts and opaque directories hide what is below (`ro+wh`); `ro`: they are not looked for.
    pub whiteouts: bool,
}

impl<T: Into<PathBuf>> From<T> for LayerSpec {
    fn from(host_path: T) -> Self {
        Self { host_path: host_path.into(), whiteouts: true }
    }
}

/// `--volume SRC:DST[:ro]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// Path on the host.
    #[serde(with = "os")]
    pub host_path: PathBuf,
    /// Path inside, absolute.
    #[serde(with = "os")]
    pub root_path: PathBuf,
    /// Read-only, with everything mounted below it.
    pub read_only: bool,
}

/// `--tmpfs DST[:size=…,mode=…]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TmpfsSpec {
    /// Path inside, absolute.
    #[serde(with = "os")]
    pub root_path: PathBuf,
    /// Limit in bytes; `None`: the kernel's default, half of the memory.
    pub size: Option<u64>,
    /// Permission bits of its root.
    pub mode: u32,
}

/// User and group ids: `None` chooses by what the host allows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdsSpec {
    /// uid extents (`--uidmap INSIDE:OUTSIDE:COUNT`).
    pub uid_map: Option<Vec<IdExtent>>,
    /// gid extents (`--gidmap INSIDE:OUTSIDE:COUNT`).
    pub gid_map: Option<Vec<IdExtent>>,
}

/// One line of uid_map or gid_map (user_namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdExtent {
    /// First id inside.
    pub inside: u32,
    /// First id outside.
    pub outside: u32,
    /// Number of ids.
    pub count: u32,
}

/// The network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetSpec {
    /// Which network.
    pub mode: NetMode,
    /// Ports of the host that lead inside.
    pub publish: Vec<PublishSpec>,
    /// Resolvers to ask instead of the host's.
    pub dns: Vec<SocketAddr>,
    /// Domains in which short names are looked for; `None`: the host's.
    pub dns_search: Option<Vec<String>>,
    /// Names that are known inside.
    pub add_host: Vec<AddHostSpec>,
    /// What the gateway's address leads to.
    pub host_loopback: LoopbackSpec,
    /// If there are any, nothing else is reached.
    #[serde(with = "text_list")]
    pub allow: Vec<Rule>,
    /// Not reached, whatever is allowed.
    #[serde(with = "text_list")]
    pub deny: Vec<Rule>,
    /// How fast data may go from the sandbox to the world.
    pub rate_out: Option<RateSpec>,
    /// The other way.
    pub rate_in: Option<RateSpec>,
    /// A socket that takes commands while it runs.
    #[serde(with = "os::option")]
    pub control: Option<PathBuf>,
}

/// `--network-rate`: how fast all flows together may be one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateSpec {
    /// In the long run.
    pub bytes_per_second: u64,
    /// Bytes that may go at once; `None`: those of a tenth of a second.
    pub burst: Option<u64>,
}

impl From<RateSpec> for netstack::Rate {
    fn from(RateSpec { bytes_per_second, burst }: RateSpec) -> Self {
        Self { bytes_per_second, burst }
    }
}

/// `--allow-host-loopback[=PORT[,PORT...]]`: whether the gateway's address stands for the host's
/// loopback, and the host's own addresses may be reached.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LoopbackSpec {
    /// Neither.
    #[default]
    Refused,
    /// Both, by these ports.
    Ports(BTreeSet<u16>),
    /// Both, wholly.
    All,
}

impl From<LoopbackSpec> for netstack::HostLoopback {
    fn from(spec: LoopbackSpec) -> Self {
        match spec {
            LoopbackSpec::Refused => Self::Refused,
            LoopbackSpec::Ports(ports) => Self::Ports(ports),
            LoopbackSpec::All => Self::All,
        }
    }
}

/// `--add-host NAME:IP`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddHostSpec {
    /// A host name.
    pub name: String,
    /// Its address; `None` (`host-gateway`): that which stands for the host's loopback.
    pub ip: Option<IpAddr>,
}

/// `--network`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetMode {
    /// A network namespace served by the in-process stack.
    #[default]
    Stack,
    /// A network namespace with nothing but its own loopback.
    None,
    /// The host's network.
    Host,
}

/// `-p [IP:]HOST:INSIDE[/udp]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishSpec {
    /// Address on the host; `None`: all.
    pub host_ip: Option<IpAddr>,
    /// Port on the host; 0: any free one.
    pub host_port: u16,
    /// Port inside.
    pub inside_port: u16,
    /// UDP instead of TCP.
    pub udp: bool,
}

impl From<&PublishSpec> for netstack::Publish {
    fn from(spec: &PublishSpec) -> Self {
        Self {
            host_ip: spec.host_ip,
            host_port: spec.host_port,
            inside_ip: None,
            inside_port: spec.inside_port,
            protocol: if spec.udp { netstack::Protocol::Udp } else { netstack::Protocol::Tcp },
        }
    }
}

/// Offsets of a time namespace in seconds (time_namespaces(7)).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimeSpec {
    /// Added to CLOCK_MONOTONIC.
    pub monotonic: i64,
    /// Added to CLOCK_BOOTTIME.
    pub boottime: i64,
}
