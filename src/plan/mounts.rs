//! What is mounted on the root, and the generated layer that holds what the sandbox needs
//! and no layer has.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::{BoxPlace, GeneratedPlan, MountStep, NetPlan, Note, PlanError, StackPlan};
use crate::host::HostFacts;
use crate::host::layers::{Accounts, Kind, PlaceFacts};
use crate::spec::{NetMode, RootSpec, ValidSpec};

/// What says too much of the host or of the kernel, as docker has it.
const MASKED: [&str; 18] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/kpagecgroup",
    "/proc/kpagecount",
    "/proc/kpageflags",
    "/proc/latency_stats",
    "/proc/pagetypeinfo",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/slabinfo",
    "/proc/vmallocinfo",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
/// What would change the host or the kernel.
const READ_ONLY: [&str; 6] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/pressure", "/proc/sys", "/proc/sysrq-trigger"];
/// File systems below /sys where it is the host's own, bound: a new one has none of them.
const MASKED_OF_HOST_SYS: [&str; 5] =
    ["/sys/fs/bpf", "/sys/fs/cgroup", "/sys/kernel/debug", "/sys/kernel/security", "/sys/kernel/tracing"];
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
const NESTED_DEVICES: [&str; 2] = ["fuse", "net/tun"];

/// Decides the mounts, in order: an outer place before those inside it.
pub(super) fn plan_mounts(spec: &ValidSpec, place: &BoxPlace, notes: &mut Vec<Note>) -> Vec<MountStep> {
    let nested = if spec.nested { &NESTED_DEVICES[..] } else { &[] };
    let nodes = DEVICES.iter().chain(nested).map(|node| (*node).to_owned()).collect();
    let mut steps = vec![MountStep::Dev { nodes }, MountStep::Proc, MountStep::Sys];

    let tmpfs = spec.fs.tmpfs.iter().map(|tmpfs| {
        let mut options = format!("mode={:o}", tmpfs.mode);
        if let Some(size) = tmpfs.size {
            write!(options, ",size={size}").expect("writing to a String does not fail");
        }
        (&tmpfs.root_path, MountStep::Tmpfs { root_path: tmpfs.root_path.clone(), options })
    });
    let binds = spec.fs.volumes.iter().zip(&place.root.volumes).map(|(volume, found)| {
        let step = MountStep::Bind {
            host_path: found.host_path.clone(),
            root_path: volume.root_path.clone(),
            read_only: volume.read_only,
        };
        (&volume.root_path, step)
    });
    let mut placed: Vec<_> = tmpfs.chain(binds).collect();
    placed.sort_by_key(|(path, _)| path.components().count());
    steps.extend(placed.into_iter().map(|(_, step)| step));

    // A volume may hold the state directory, or an upper elsewhere: the payload must not reach
    // its own upper, or other boxes, past the overlay.
    let external = place.upper.iter().flat_map(|upper| [&upper.dir, &upper.work]);
    let external = external.filter(|path| !path.starts_with(&place.state_root));
    let covered: Vec<&PathBuf> = std::iter::once(&place.state_root).chain(external).collect();
    for (volume, found) in spec.fs.volumes.iter().zip(&place.root.volumes) {
        let inside = covered.iter().filter_map(|path| path.strip_prefix(&found.host_path).ok());
        steps.extend(inside.map(|inside| MountStep::Mask(volume.root_path.join(inside))));
    }
    if spec.nested {
        notes.push(Note::new(
            "nothing in /proc and /sys is masked",
            "the kernel refuses a sandbox inside its own /proc where ours is partly covered",
        ));
    } else {
        steps.extend(MASKED.iter().map(|path| MountStep::Mask(path.into())));
        if spec.net.mode == NetMode::Host {
            steps.extend(MASKED_OF_HOST_SYS.iter().map(|path| MountStep::Mask(path.into())));
        }
        steps.extend(READ_ONLY.iter().map(|path| MountStep::ReadOnly(path.into())));
    }
    steps
}

/// Decides the generated layer.
pub(super) fn plan_generated(
    spec: &ValidSpec,
    facts: &HostFacts,
    place: &BoxPlace,
    net: &NetPlan,
    hostname: &str,
    single: bool,
    notes: &mut Vec<Note>,
) -> Result<Vec<GeneratedPlan>, PlanError> {
    let host_tree = spec.fs.root == RootSpec::Host;
    let mut generated = Vec::new();
    let mut file = |path: &str, mode: u32, content: String| {
        generated.push(GeneratedPlan { path: path.into(), mode, content: Some(content) });
    };
    file("etc/hosts", 0o644, hosts(spec, net, hostname, place.root.hosts.as_deref()));
    file("etc/hostname", 0o644, format!("{hostname}\n"));
    match net {
        NetPlan::Stack(stack) => {
            file("etc/resolv.conf", 0o644, resolv_conf(stack));
        }
        NetPlan::None => file("etc/resolv.conf", 0o644, "# this sandbox has no network\n".into()),
        NetPlan::Host => {
            if let Some(content) = &place.root.resolv_conf {
                file("etc/resolv.conf", 0o644, content.clone());
            }
        }
    }
    if let Some(accounts) = &place.root.accounts
        && facts.uid != 0
    {
        let (shadow, gshadow) = locked(accounts);
        file("etc/shadow", 0o640, shadow);
        file("etc/gshadow", 0o640, gshadow);
    }
    if single && place.root.has_apt {
        file("etc/apt/apt.conf.d/99rootlet", 0o644, "APT::Sandbox::User \"root\";\n".into());
        notes.push(Note::new(
            "apt downloads as root",
            "its own user _apt does not exist where there is only one id",
        ));
    }
    generated.extend(mount_points(spec, place, host_tree)?);
    Ok(generated)
}

/// What has to be made to mount on.
fn mount_points(
    spec: &ValidSpec,
    place: &BoxPlace,
    host_tree: bool,
) -> Result<Vec<GeneratedPlan>, PlanError> {
    let directory = |path: PathBuf| GeneratedPlan { path, mode: 0o755, content: None };
    let mut points = Vec::new();
    // In a rootfs these may be missing, or links that lead elsewhere: then ours hide them.
    // Over the host's tree they are hidden, which makes them directories.
    for own in ["proc", "sys", "dev"] {
        let found = find(place, &Path::new("/").join(own));
        let usable = found.is_some_and(|f| f.kind == Some(Kind::Directory) && f.resolved == Path::new(own));
        if !host_tree && !usable {
            points.push(directory(own.into()));
        }
    }
    let volumes =
        spec.fs.volumes.iter().zip(&place.root.volumes).map(|(v, found)| (&v.root_path, found.kind));
    let tmpfs = spec.fs.tmpfs.iter().map(|tmpfs| (&tmpfs.root_path, Kind::Directory));
    let placed: Vec<(&PathBuf, Kind)> = volumes.chain(tmpfs).collect();
    for (path, wanted) in &placed {
        let inside_another = placed.iter().any(|(other, _)| other != path && path.starts_with(other));
        if inside_another || path.starts_with("/dev") {
            // The place belongs to what is mounted there, not to the layers.
            continue;
        }
        let Some(found) = find(place, path) else { continue };
        let refuse = |reason| Err(PlanError::MountPoint { root_path: (*path).clone(), reason });
        match (found.kind, wanted) {
            (None, Kind::Directory) => points.push(directory(found.resolved.clone())),
            (None, _) => points.push(GeneratedPlan {
                path: found.resolved.clone(),
                mode: 0o644,
                content: Some(String::new()),
            }),
            (Some(Kind::Blocked), _) => return refuse("a part of the path is not a directory"),
            (Some(Kind::Directory), Kind::Directory) | (Some(Kind::File), Kind::File) => {}
            (Some(Kind::Directory), _) => return refuse("a directory is there, and the source is a file"),
            (Some(Kind::File), _) => return refuse("a file is there, and a directory is to be mounted"),
        }
    }
    // As docker does. Over the host's tree a wrong one is a mistake to be told of.
    if let Some(workdir) = &spec.process.workdir
        && !host_tree
        && !placed.iter().any(|(other, _)| workdir.starts_with(other))
        && let Some(found) = find(place, workdir)
        && found.kind.is_none()
    {
        points.push(directory(found.resolved.clone()));
    }
    points.dedup();
    Ok(points)
}

fn find<'a>(place: &'a BoxPlace, root_path: &Path) -> Option<&'a PlaceFacts> {
    place.root.places.iter().find(|found| found.root_path == root_path)
}

/// resolv.conf(5).
fn resolv_conf(stack: &StackPlan) -> String {
    let mut text = format!("nameserver {}\n", stack.gateway_v4);
    if !stack.search.is_empty() {
        writeln!(text, "search {}", stack.search.join(" ")).expect("writing to a String does not fail");
    }
    if let Some(ndots) = stack.ndots {
        writeln!(text, "options ndots:{ndots}").expect("writing to a String does not fail");
    }
    text
}

/// hosts(5). What the host's own file adds stays, except names of the host itself: its
/// loopback is not this one.
fn hosts(spec: &ValidSpec, net: &NetPlan, hostname: &str, host: Option<&str>) -> String {
    let mut text = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    match net {
        NetPlan::Stack(stack) => {
            writeln!(text, "{}\t{hostname}", stack.guest_v4.0).expect("writing to a String does not fail");
            for name in stack.gateway_names() {
                writeln!(text, "{}\t{name}", stack.gateway_v4).expect("writing to a String does not fail");
            }
        }
        NetPlan::None | NetPlan::Host => {
            writeln!(text, "127.0.1.1\t{hostname}").expect("writing to a String does not fail");
        }
    }
    let gateway = match net {
        NetPlan::Stack(stack) => Some(stack.gateway_v4),
        NetPlan::None | NetPlan::Host => None,
    };
    for (name, ip) in super::net::added_hosts(spec, gateway) {
        writeln!(text, "{ip}\t{name}").expect("writing to a String does not fail");
    }
    for line in host.unwrap_or_default().lines() {
        let words: Vec<&str> = line.split('#').next().unwrap_or_default().split_ascii_whitespace().collect();
        if let [address, names @ ..] = words.as_slice()
            && let Ok(ip) = address.parse::<std::net::IpAddr>()
            && !ip.is_loopback()
            && !names.is_empty()
        {
            writeln!(text, "{ip}\t{}", names.join(" ")).expect("writing to a String does not fail");
        }
    }
    text
}

/// shadow(5) and gshadow(5) with no password that fits.
fn locked(accounts: &Accounts) -> (String, String) {
    let shadow =
        accounts.users.iter().fold(String::new(), |text, user| text + user + ":*:19000:0:99999:7:::\n");
    let gshadow = accounts
        .groups
        .iter()
        .fold(String::new(), |text, (group, members)| text + group + ":*::" + members + "\n");
    (shadow, gshadow)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_keeps_what_the_host_added() {
        let host = "127.0.0.1 localhost\n127.0.1.1 mylaptop\n10.0.0.5 build build.lan # the server\n\
            ::1 localhost\nfe80::zz bad\n0.0.0.0 ads.example\n# comment\n192.0.2.1\n";
        let mut spec = crate::spec::SandboxSpec::new(vec!["true".into()]);
        spec.net.add_host = vec![crate::spec::parse::add_host("db:192.0.2.7").unwrap()];
        let text = hosts(&spec.validate().unwrap(), &NetPlan::None, "box", Some(host));
        assert_eq!(
            text,
            "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\tbox\n192.0.2.7\tdb\n\
             10.0.0.5\tbuild build.lan\n0.0.0.0\tads.example\n"
        );
    }

    #[test]
    fn shadow_entries_are_locked() {
        let accounts = Accounts {
            users: vec!["root".into(), "ada".into()],
            groups: vec![("adm".into(), "ada,bob".into())],
        };
        assert_eq!(
            locked(&accounts),
            ("root:*:19000:0:99999:7:::\nada:*:19000:0:99999:7:::\n".into(), "adm:*::ada,bob\n".into())
        );
    }
}
