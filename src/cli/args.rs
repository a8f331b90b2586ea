//! The command line: definitions alone. Help, completions and manual pages come from here.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Be root inside, stay yourself outside: run a command in a sandbox, without root.
#[derive(Debug, Parser)]
#[command(name = "rootlet", version, max_term_width = 100, after_help = EXAMPLES)]
pub(super) struct Cli {
    /// What to log: error, warn, info, debug, trace, off, or a filter such as rootlet=debug
    /// (default: $RUST_LOG, else warn)
    #[arg(long, global = true, value_name = "LEVEL", help_heading = "Logging")]
    pub(super) log_level: Option<String>,
    /// Log to this file instead of standard error
    #[arg(long, global = true, value_name = "FILE", help_heading = "Logging")]
    pub(super) log_file: Option<PathBuf>,
    /// What to do
    #[command(subcommand)]
    pub(super) command: Command,
}

const EXAMPLES: &str = "\
Examples:
  rootlet run -- make install       run over your own files; nothing outside changes
  rootlet diff last                 see what it changed
  rootlet rm last                   drop it
  rootlet run -it --rootfs ./debian -- bash
  rootlet doctor                    what this machine allows, and how to mend what is missing";

/// The subcommands.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run a command in a new sandbox
    Run(Box<RunArgs>),
    /// List what a box changed
    Diff(DiffArgs),
    /// List boxes
    Ls(LsArgs),
    /// Remove boxes with their changes
    Rm(RmArgs),
    /// Remove what killed runs left behind
    Prune(PruneArgs),
    /// Check what this machine allows and how to mend what is missing
    Doctor(DoctorArgs),
    /// Mount an overlay of directories; also under the name fuse-overlayfs
    Overlay(OverlayArgs),
    /// Give a network namespace a network; also under the name slirp4netns
    Netstack(Box<NetstackArgs>),
    /// Print a completion script for a shell
    #[command(
        after_help = "Example:\n  rootlet completions bash > ~/.local/share/bash-completion/completions/rootlet"
    )]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print a manual page
    #[command(after_help = "Example:\n  rootlet man run | man -l -")]
    Man {
        /// The subcommand; without one, the page of rootlet itself
        subcommand: Option<String>,
    },
}

const RUN_EXAMPLES: &str = "\
Examples:
  rootlet run -- ./untrusted.sh
      over your own files, copy-on-write: the script sees them, and changes only its box
  rootlet run -p 8080:80 --rootfs ./debian -- nginx -g 'daemon off;'
      a root file system directory, which is never changed; port 80 inside is 8080 outside
  rootlet run -it --layer ./base --layer ./tools --upper ./changes -- sh
      stacked layers, the lowest first; the changes are kept in ./changes
  rootlet run --network none --rm --timeout 10m -v \"$PWD:/src:ro\" -w /src -- make test

Exit status: the command's own, 128+N when signal N ended it; 124 the time limit ended it;
125 rootlet itself failed; 126 the command cannot be executed; 127 it was not found.";

/// `rootlet run`
#[derive(Debug, Args)]
#[command(
    after_help = RUN_EXAMPLES,
    override_usage = "rootlet run [OPTIONS] -- COMMAND [ARG]..."
)]
pub(super) struct RunArgs {
    /// Name of the box (default: one is made up)
    #[arg(long, value_name = "NAME", help_heading = "Box")]
    pub(super) name: Option<String>,
    /// Keep nothing when the run is over
    #[arg(long, help_heading = "Box")]
    pub(super) rm: bool,

    /// Keep standard input open although it is a terminal
    #[arg(short, long, help_heading = "Process")]
    pub(super) interactive: bool,
    /// Give the command a terminal of its own
    #[arg(short, long, help_heading = "Process")]
    pub(super) tty: bool,
    /// Working directory inside (default: the current one over the host's files, else /)
    #[arg(short, long, value_name = "DIR", help_heading = "Process")]
    pub(super) workdir: Option<PathBuf>,
    /// Set a variable; NAME alone takes the caller's value (and keeps it out of process lists)
    #[arg(short, long, value_name = "NAME[=VALUE]", help_heading = "Process")]
    pub(super) env: Vec<OsString>,
    /// Set variables from the lines of a file
    #[arg(long, value_name = "FILE", help_heading = "Process")]
    pub(super) env_file: Vec<PathBuf>,
    /// End the command after this time: 30 (seconds), 5s, 2m, 1h30m
    #[arg(long, value_name = "TIME", help_heading = "Process")]
    pub(super) timeout: Option<String>,

    /// Run as this user (and group) of the sandbox, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]", help_heading = "Identity")]
    pub(super) user: Option<String>,
    /// Map user ids (needs --gidmap too)
    #[arg(long, value_name = "INSIDE:OUTSIDE:COUNT", help_heading = "Identity")]
    pub(super) uidmap: Vec<String>,
    /// Map group ids (needs --uidmap too)
    #[arg(long, value_name = "INSIDE:OUTSIDE:COUNT", help_heading = "Identity")]
    pub(super) gidmap: Vec<String>,
    /// Host name inside (default: the name of the box)
    #[arg(long, value_name = "NAME", help_heading = "Identity")]
    pub(super) hostname: Option<String>,
    /// NIS domain name inside
    #[arg(long, value_name = "NAME", help_heading = "Identity")]
    pub(super) domainname: Option<String>,

    /// Use this directory as the root file system; it is never changed
    #[arg(long, value_name = "DIR", conflicts_with = "layer", help_heading = "Files")]
    pub(super) rootfs: Option<PathBuf>,
    /// Stack this directory on the layers before it (repeatable, the lowest first); ro: its whiteouts hide
    /// nothing, ro+wh (default): they do, rw (the last one): changes go there, as with --upper
    #[arg(long, value_name = "DIR[:ro|:ro+wh|:rw]", help_heading = "Files")]
    pub(super) layer: Vec<OsString>,
    /// Keep the changes in this directory; used again, they are there again
    #[arg(long, value_name = "DIR", help_heading = "Files")]
    pub(super) upper: Option<PathBuf>,
    /// Let nothing be changed, except on volumes and tmpfs
    #[arg(long, help_heading = "Files")]
    pub(super) read_only: bool,
    /// Show a directory or file of the host inside; changes there are real
    #[arg(short, long, value_name = "SRC:DST[:ro]", help_heading = "Files")]
    pub(super) volume: Vec<OsString>,
    /// Mount an empty file system in memory
    #[arg(long, value_name = "DST[:size=N,mode=M]", help_heading = "Files")]
    pub(super) tmpfs: Vec<OsString>,

    /// The network
    #[arg(long, value_enum, default_value_t = Network::Stack, value_name = "MODE", help_heading = "Network")]
    pub(super) network: Network,
    /// Publish a port: [IP:]HOST:INSIDE[/udp]
    #[arg(short, long, value_name = "PORTS", help_heading = "Network")]
    pub(super) publish: Vec<String>,
    /// Let the gateway's address (host.containers.internal) stand for the host's loopback, and the host's own
    /// addresses be reached; with ports, only by those
    #[arg(
        long,
        value_name = "PORTS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "all",
        help_heading = "Network"
    )]
    pub(super) allow_host_loopback: Vec<String>,
    /// Reach this and nothing else (repeatable): an address, a network, or `any`; IPv6 in brackets
    #[arg(long, value_name = "[tcp:|udp:|icmp:]ADDR[/N][:PORTS]", help_heading = "Network")]
    pub(super) allow: Vec<String>,
    /// Do not reach this, whatever is allowed (repeatable)
    #[arg(long, value_name = "[tcp:|udp:|icmp:]ADDR[/N][:PORTS]", help_heading = "Network")]
    pub(super) deny: Vec<String>,
    /// Let all data together be no faster (repeatable, once for each way): 10mbit, or bytes per second as 2m
    #[arg(long, value_name = "[in:|out:]RATE[,burst=SIZE]", help_heading = "Network")]
    pub(super) network_rate: Vec<String>,
    /// Take commands at this socket: read counters and flows, change ports, rules and rates while it runs
    #[arg(long, value_name = "PATH", help_heading = "Network")]
    pub(super) network_control: Option<PathBuf>,
    /// Ask this resolver instead of the host's (repeatable): IP[:PORT]
    #[arg(long, value_name = "IP", help_heading = "Network")]
    pub(super) dns: Vec<String>,
    /// Look for short names in this domain, not in those of the host (repeatable); . for none
    #[arg(long, value_name = "DOMAIN", help_heading = "Network")]
    pub(super) dns_search: Vec<String>,
    /// Give an address a name inside (repeatable); host-gateway is what stands for the host's loopback
    #[arg(long, value_name = "NAME:IP", help_heading = "Network")]
    pub(super) add_host: Vec<String>,

    /// Allow another sandbox inside this one
    #[arg(long, help_heading = "Sandbox")]
    pub(super) nested: bool,
    /// Offset of the monotonic clock inside, in seconds
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true, help_heading = "Sandbox")]
    pub(super) monotonic: Option<i64>,
    /// Offset of the boot-time clock inside, in seconds
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true, help_heading = "Sandbox")]
    pub(super) boottime: Option<i64>,

    /// Print what would be done, and do nothing
    #[arg(long, help_heading = "Report")]
    pub(super) dry_run: bool,
    /// With --dry-run: print it as JSON
    #[arg(long, requires = "dry_run", help_heading = "Report")]
    pub(super) json: bool,
    /// Write what happened to this file, as JSON
    #[arg(long, value_name = "FILE", conflicts_with = "dry_run", help_heading = "Report")]
    pub(super) report: Option<PathBuf>,

    /// Append a line of JSON to this file for each flow that begins, is refused, or ends
    #[arg(long, value_name = "FILE", conflicts_with = "dry_run", help_heading = "Report")]
    pub(super) network_log: Option<PathBuf>,
    /// Write every packet of the sandbox to this file, as pcapng
    #[arg(long, value_name = "FILE", conflicts_with = "dry_run", help_heading = "Report")]
    pub(super) network_capture: Option<PathBuf>,

    /// What stands before `--`: an image
    #[arg(hide = true, value_name = "IMAGE")]
    pub(super) before: Vec<OsString>,
    /// The command and its arguments
    #[arg(last = true, value_name = "COMMAND")]
    pub(super) command: Vec<OsString>,
}

/// `--network`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Network {
    /// A network of its own, with everything the caller can reach, except the host's loopback
    Stack,
    /// A network of its own with nothing in it
    None,
    /// The host's network
    Host,
}

/// `rootlet diff`
#[derive(Debug, Args)]
#[command(
    after_help = "Each line is A (added), M (modified), D (deleted) or m (only mode, owner, times or\nattributes differ), and the path.\n\nExample:\n  rootlet diff last"
)]
pub(super) struct DiffArgs {
    /// Name of the box; `last` is the latest
    #[arg(value_name = "BOX")]
    pub(super) name: String,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// `rootlet ls`
#[derive(Debug, Args)]
pub(super) struct LsArgs {
    /// Print names alone
    #[arg(short, long, conflicts_with = "json")]
    pub(super) quiet: bool,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// `rootlet rm`
#[derive(Debug, Args)]
pub(super) struct RmArgs {
    /// Names of boxes; `last` is the latest
    #[arg(required = true, value_name = "BOX")]
    pub(super) names: Vec<String>,
    /// End a running box first
    #[arg(short, long)]
    pub(super) force: bool,
}

/// `rootlet prune`
#[derive(Debug, Args)]
#[command(
    after_help = "Without --all, only leftovers go: boxes of runs with --rm that were killed, and of killed\nruns that had changed nothing."
)]
pub(super) struct PruneArgs {
    /// Remove every box that is not running, with its changes
    #[arg(short, long)]
    pub(super) all: bool,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// `rootlet doctor`
#[derive(Debug, Args)]
#[command(after_help = "Exit status: 0 when `rootlet run` can work (warnings allowed), 1 when it cannot.")]
pub(super) struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

const OVERLAY_HELP: &str = "\
Options (-o), separated by commas, as fuse-overlayfs and mount(8) have them:
  lowerdir=DIR[:DIR...]     layers, the topmost first, never changed (`\\:` and `\\,` in names)
  upperdir=DIR              where changes go; without it the mount is read-only
  workdir=DIR               an empty directory on the same file system
  ro, nosuid, noexec, sync, allow_other, fsname=NAME, subtype=NAME
  timeout=SECONDS           others change the layers, and that shows after this time
  volatile                  sync nothing
  passthrough               the kernel reads and writes changed files itself (for root of the host)
  threaded=0, max_threads=N
  xattr_permissions=0|1|2   owners on the files, in security.* or in user.* attributes
  uidmapping=ID:SHOWN:COUNT[:...], gidmapping=..., squash_to_root, squash_to_uid=ID, squash_to_gid=ID
  noacl, static_nlink, oci_whiteouts[=0], redirect_dir=on|off

Exit status: 0 once the mount can be used (with -f: when it is gone), 1 failed, 2 wrong usage.

Example:
  unshare -rm sh -c 'rootlet overlay -o lowerdir=a:b,upperdir=u,workdir=w mnt; ls mnt'";

/// `rootlet overlay`
#[derive(Debug, Args)]
#[command(after_help = OVERLAY_HELP)]
pub(super) struct OverlayArgs {
    /// Options, separated by commas (repeatable)
    #[arg(short = 'o', value_name = "OPTIONS", allow_hyphen_values = true)]
    pub(super) options: Vec<OsString>,
    /// Serve in the foreground
    #[arg(short = 'f')]
    pub(super) foreground: bool,
    /// Log what is done, and serve in the foreground
    #[arg(short = 'd', long)]
    pub(super) debug: bool,
    /// Serve with one thread
    #[arg(short = 's')]
    pub(super) single: bool,
    /// Mount nothing: make the upper one that the kernel's overlayfs shows the same, by copying what redirects
    /// lead to. Nobody may have it mounted meanwhile
    #[arg(long, conflicts_with_all = ["foreground", "single", "mountpoint"])]
    pub(super) export: bool,
    /// Where to mount; what stands before it is shown as the source
    #[arg(required_unless_present = "export", num_args = 1..=2, value_name = "[SOURCE] MOUNTPOINT")]
    pub(super) mountpoint: Vec<OsString>,
}

/// The program by its other name.
#[derive(Debug, Parser)]
#[command(
    name = "fuse-overlayfs",
    about = "Mount an overlay of directories (rootlet overlay)",
    version = concat!(env!("CARGO_PKG_VERSION"), " (rootlet)"),
    max_term_width = 100
)]
pub(super) struct FuseOverlayfs {
    #[command(flatten)]
    pub(super) overlay: OverlayArgs,
}

const NETSTACK_HELP: &str = "\
The options are slirp4netns's; `rootlet man netstack` and docs/netstack.md say what each does here.
Addresses, with the default --cidr: guest 10.0.2.100, host 10.0.2.2, resolver 10.0.2.3; with -6 also
fd00::2 and fd00::3.

Exit status: 0 when the exit descriptor said so or the interface is gone, 1 failed, 2 wrong usage.

Example:
  unshare -Urn sleep infinity & rootlet netstack -c --disable-host-loopback $! tap0";

/// `rootlet netstack`
#[derive(Debug, Args)]
#[command(after_help = NETSTACK_HELP)]
pub(super) struct NetstackArgs {
    /// bring up the interface (and lo) with its address, routes and MTU
    #[arg(short, long)]
    pub(super) configure: bool,
    /// end when this descriptor is ready for anything, or closed at its other end
    #[arg(short, long, value_name = "FD")]
    pub(super) exit_fd: Option<i32>,
    /// write "1" to this descriptor when the network can be used
    #[arg(short, long, value_name = "FD")]
    pub(super) ready_fd: Option<i32>,
    /// specify MTU (default=1500, max=65521)
    #[arg(short, long, value_name = "MTU")]
    pub(super) mtu: Option<String>,
    /// enable IPv6
    #[arg(short = '6', long)]
    pub(super) enable_ipv6: bool,
    /// take commands on a unix socket at this path
    #[arg(short, long, value_name = "PATH")]
    pub(super) api_socket: Option<PathBuf>,
    /// take rootlet's own commands (counters, flows, ports, rules, rates) on a unix socket at this path
    #[arg(long, value_name = "PATH", conflicts_with_all = ["enable_sandbox", "enable_seccomp"])]
    pub(super) network_control: Option<PathBuf>,
    /// specify network address CIDR (default=10.0.2.0/24)
    #[arg(long, value_name = "CIDR")]
    pub(super) cidr: Option<String>,
    /// prohibit connecting to 127.0.0.1:* on the host namespace
    #[arg(long)]
    pub(super) disable_host_loopback: bool,
    /// specify network namespace type ([path|pid], default=pid)
    #[arg(long, value_enum, default_value_t = NetnsType::Pid, hide_default_value = true, hide_possible_values = true, value_name = "TYPE")]
    pub(super) netns_type: NetnsType,
    /// specify user namespace path
    #[arg(long, value_name = "PATH")]
    pub(super) userns_path: Option<PathBuf>,
    /// see only /etc and /run of the host's files, and have no capability but to bind low ports
    #[arg(long)]
    pub(super) enable_sandbox: bool,
    /// limit system calls
    #[arg(long)]
    pub(super) enable_seccomp: bool,
    /// specify the address or interface that IPv4 leaves the host by
    #[arg(long, value_name = "IPv4|INTERFACE")]
    pub(super) outbound_addr: Option<String>,
    /// specify the address or interface that IPv6 leaves the host by
    #[arg(long, value_name = "IPv6|INTERFACE")]
    pub(super) outbound_addr6: Option<String>,
    /// have no resolver
    #[arg(long)]
    pub(super) disable_dns: bool,
    /// specify the MAC address of the TAP (only valid with -c)
    #[arg(long, value_name = "MAC", requires = "configure")]
    pub(super) macaddress: Option<String>,
    /// append a line of JSON to this file for each flow that begins, is refused, or ends
    #[arg(long, value_name = "FILE")]
    pub(super) network_log: Option<PathBuf>,
    /// write every packet to this file, as pcapng
    #[arg(long, value_name = "FILE")]
    pub(super) network_capture: Option<PathBuf>,
    /// bound how fast data goes, to the guest (in), from it (out) or both: 10mbit, or 500k, 2m bytes per second
    #[arg(long, value_name = "[in:|out:]RATE[,burst=SIZE]")]
    pub(super) network_rate: Vec<String>,
    /// specify the target type: netns (bess is refused)
    #[arg(long, value_name = "TYPE", default_value = "netns", hide_default_value = true)]
    pub(super) target_type: String,
    /// process whose network namespace it is, or a path of it
    #[arg(value_name = "PID|PATH")]
    pub(super) target: String,
    /// name of the interface
    #[arg(value_name = "TAPNAME", default_value = "tap0", hide_default_value = true)]
    pub(super) tap: String,
}

/// What the target is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum NetnsType {
    /// A path
    Path,
    /// A process
    Pid,
}

/// The program by its other name.
#[derive(Debug, Parser)]
#[command(
    name = "slirp4netns",
    about = "User-mode networking for unprivileged network namespaces (rootlet netstack)",
    version = concat!("version ", env!("CARGO_PKG_VERSION"), " (rootlet)"),
    disable_version_flag = true,
    max_term_width = 100
)]
pub(super) struct Slirp4netns {
    #[command(flatten)]
    pub(super) netstack: NetstackArgs,
    /// show version and exit
    #[arg(short, long, action = clap::ArgAction::Version)]
    pub(super) version: Option<bool>,
}
