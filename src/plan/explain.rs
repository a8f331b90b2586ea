//! A plan for people (`--dry-run`) and for programs (`--dry-run --json`).

use std::fmt::{self, Write as _};
use std::path::Path;

use super::{MapWriter, MountStep, NetPlan, Plan, SeccompPlan};
use crate::log::{escape, escape_os};
use crate::spec::parse::port_ranges;
use crate::spec::{IdExtent, LoopbackSpec, RateSpec};

/// The plan as text: one thing a line, in the order in which it is done. Names are escaped
/// for terminals, and values of variables are not shown.
#[must_use]
pub fn explain(plan: &Plan) -> String {
    let mut out = Lines(String::new());
    out.write(plan).expect("writing to a String does not fail");
    out.0
}

/// The plan as JSON: the fields of [`Plan`], with the names of the variables in place of
/// `process.env`.
#[must_use]
pub fn explain_json(plan: &Plan) -> serde_json::Value {
    let mut value = serde_json::to_value(plan).expect("a plan has no map with keys that are not text");
    if let Some(env) = value.pointer_mut("/process/env") {
        *env = plan.process.env.iter().map(|(name, _)| name.to_string_lossy().into_owned()).collect();
    }
    value
}

struct Lines(String);

impl Lines {
    fn line(&mut self, label: &str, text: impl fmt::Display) -> fmt::Result {
        writeln!(self.0, "{label:<11} {text}")
    }

    fn write(&mut self, plan: &Plan) -> fmt::Result {
        self.line("box", format_args!("{} in {}", escape(&plan.name), shown(&plan.state_dir)))?;
        if plan.remove {
            self.line("", "removed when the run is over")?;
        }
        self.line("uids", extents(&plan.ids.uids))?;
        self.line("gids", extents(&plan.ids.gids))?;
        let writer = match &plan.ids.writer {
            MapWriter::Setup => "the setup process".into(),
            MapWriter::Supervisor => "the supervisor".into(),
            MapWriter::Helpers { newuidmap, newgidmap } => {
                format!("{} and {}", shown(newuidmap), shown(newgidmap))
            }
        };
        let setgroups = if plan.ids.deny_setgroups { ", setgroups denied" } else { "" };
        self.line("maps", format_args!("written by {writer}{setgroups}"))?;
        let namespaces: Vec<String> =
            plan.namespaces.iter().map(|n| format!("{n:?}").to_lowercase()).collect();
        self.line("namespaces", namespaces.join(" "))?;
        if let Some(time) = &plan.time {
            self.line(
                "clocks",
                format_args!("monotonic {:+} s, boottime {:+} s", time.monotonic, time.boottime),
            )?;
        }
        self.line("hostname", escape(&plan.hostname))?;
        if let Some(domainname) = &plan.domainname {
            self.line("domainname", escape(domainname))?;
        }
        self.write_root(plan)?;
        for step in &plan.mounts {
            self.write_mount(step)?;
        }
        self.write_net(&plan.net)?;
        self.write_process(plan)?;
        let seccomp = match plan.confine.seccomp {
            SeccompPlan::Default => "default",
            SeccompPlan::Nested => "nested",
        };
        self.line("confine", format_args!("no_new_privs, system call filter: {seccomp}"))?;
        if plan.confine.scope_abstract_sockets {
            self.line("", "no abstract unix sockets of the host (Landlock)")?;
        }
        self.line("", format_args!("capabilities: {}", plan.confine.keep_caps.join(" ")))?;
        for note in &plan.notes {
            let label = if note.weaker { "weaker" } else { "note" };
            self.line(label, format_args!("{}: {}", escape(&note.what), escape(&note.reason)))?;
        }
        Ok(())
    }

    fn write_root(&mut self, plan: &Plan) -> fmt::Result {
        for layer in &plan.root.layers {
            let owners = if layer.translate_owners { "by the maps" } else { "as on disk" };
            let marks = if layer.whiteouts { "" } else { ", whiteouts not looked for" };
            self.line("layer", format_args!("{} (owners {owners}{marks})", shown(&layer.host_path)))?;
            if !layer.hidden.is_empty() {
                let hidden: Vec<String> = layer.hidden.iter().map(|path| shown(path)).collect();
                self.line("", format_args!("hidden: {}", hidden.join(" ")))?;
            }
        }
        for object in &plan.root.generated {
            let kind = match &object.content {
                None => "directory".into(),
                Some(content) => format!("{} bytes", content.len()),
            };
            self.line(
                "generated",
                format_args!("/{} ({kind}, mode {:04o})", shown(&object.path), object.mode),
            )?;
        }
        match &plan.root.upper {
            Some(upper) => self.line("upper", shown(&upper.dir)),
            None => self.line("upper", "none: read-only"),
        }
    }

    fn write_mount(&mut self, step: &MountStep) -> fmt::Result {
        match step {
            MountStep::Proc => self.line("mount", "/proc (of the pid namespace)"),
            MountStep::Sys => self.line("mount", "/sys (read-only)"),
            MountStep::Dev { nodes } => {
                self.line("mount", format_args!("/dev ({} pts shm mqueue)", nodes.join(" ")))
            }
            MountStep::Tmpfs { root_path, options } => {
                self.line("mount", format_args!("{} (tmpfs {options})", shown(root_path)))
            }
            MountStep::Bind { host_path, root_path, read_only } => {
                let mode = if *read_only { "read-only" } else { "writable" };
                self.line(
                    "mount",
                    format_args!("{} ({mode}, {} of the host)", shown(root_path), shown(host_path)),
                )
            }
            MountStep::Mask(path) => self.line("mask", shown(path)),
            MountStep::ReadOnly(path) => self.line("read-only", shown(path)),
        }
    }

    fn write_net(&mut self, net: &NetPlan) -> fmt::Result {
        let stack = match net {
            NetPlan::None => return self.line("network", "none"),
            NetPlan::Host => return self.line("network", "the host's"),
            NetPlan::Stack(stack) => stack,
        };
        self.line("network", format_args!("stack on {}, MTU {}", escape(&stack.tap), stack.mtu))?;
        let (v4, v4_prefix) = stack.guest_v4;
        let (v6, v6_prefix) = stack.guest_v6;
        self.line("", format_args!("{v4}/{v4_prefix}, gateway and name server {}", stack.gateway_v4))?;
        self.line("", format_args!("{v6}/{v6_prefix}, gateway {}", stack.gateway_v6))?;
        match &stack.host_loopback {
            LoopbackSpec::Refused => self.line("", "the host's loopback cannot be reached")?,
            LoopbackSpec::Ports(ports) => {
                self.line(
                    "",
                    format_args!(
                        "the host's loopback is the gateway's address, ports {}",
                        port_ranges(ports).join(" ")
                    ),
                )?;
            }
            LoopbackSpec::All => self.line("", "the host's loopback is the gateway's address")?,
        }
        for rule in &stack.allow {
            self.line("allow", rule)?;
        }
        for rule in &stack.deny {
            self.line("deny", rule)?;
        }
        for (way, rate) in [("in", stack.rate_in), ("out", stack.rate_out)] {
            if let Some(RateSpec { bytes_per_second, burst }) = rate {
                let burst = burst.map(|burst| format!(", {burst} bytes at once")).unwrap_or_default();
                self.line("rate", format_args!("{way}: {bytes_per_second} bytes per second{burst}"))?;
            }
        }
        if let Some(path) = &stack.control {
            self.line("control", shown(path))?;
        }
        if !stack.dns.is_empty() {
            let servers: Vec<String> = stack.dns.iter().map(ToString::to_string).collect();
            self.line("dns", servers.join(" "))?;
        }
        if !stack.search.is_empty() {
            self.line("search", escape(&stack.search.join(" ")))?;
        }
        for (name, ip) in &stack.hosts {
            self.line("host", format_args!("{} is {ip}", escape(name)))?;
        }
        for publish in &stack.publish {
            let ip = match publish.host_ip {
                Some(std::net::IpAddr::V6(ip)) => format!("[{ip}]"),
                Some(ip) => ip.to_string(),
                None => "*".into(),
            };
            let port = if publish.host_port == 0 { "any".into() } else { publish.host_port.to_string() };
            let protocol = if publish.udp { "udp" } else { "tcp" };
            self.line("publish", format_args!("{ip}:{port} -> {}/{protocol}", publish.inside_port))?;
        }
        Ok(())
    }

    fn write_process(&mut self, plan: &Plan) -> fmt::Result {
        let process = &plan.process;
        let args: Vec<String> = process.args.iter().map(|arg| quoted(&escape_os(arg))).collect();
        self.line("command", args.join(" "))?;
        if let Some(user) = &process.user {
            let group = user.group.as_deref().map(|group| format!(":{}", escape(group))).unwrap_or_default();
            self.line("user", format_args!("{}{group}", escape(&user.user)))?;
        }
        let fallback = if process.workdir_required { "" } else { " (else /)" };
        self.line("workdir", format_args!("{}{fallback}", shown(&process.workdir)))?;
        let mut names: Vec<String> = process.env.iter().map(|(name, _)| escape_os(name)).collect();
        names.sort();
        self.line("env", names.join(" "))?;
        if process.terminal {
            self.line("terminal", "its own")?;
        }
        if process.interactive {
            self.line("stdin", "passed through")?;
        }
        if let Some(timeout) = process.timeout {
            self.line("timeout", format_args!("{timeout:?}"))?;
        }
        Ok(())
    }
}

fn shown(path: &Path) -> String {
    escape_os(path.as_os_str())
}

/// Quoted where a reader could not tell where an argument ends.
fn quoted(arg: &str) -> String {
    if arg.is_empty() || arg.contains([' ', '\'', '"']) {
        format!("'{}'", arg.replace('\'', "'\\''"))
    } else {
        arg.into()
    }
}

fn extents(extents: &[IdExtent]) -> String {
    let text = |e: &IdExtent| match e.count {
        1 => format!("{} = {} outside", e.inside, e.outside),
        count => {
            // Validated or read from the kernel: no extent goes beyond the last id.
            let (inside, outside) = (e.inside.saturating_add(count - 1), e.outside.saturating_add(count - 1));
            format!("{}-{inside} = {}-{outside} outside", e.inside, e.outside)
        }
    };
    extents.iter().map(text).collect::<Vec<_>>().join(", ")
}
