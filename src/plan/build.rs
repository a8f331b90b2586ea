//! Putting the parts of a plan together.

use std::path::{Path, PathBuf};

use super::{
    BoxPlace, ConfinePlan, LayerPlan, Namespace, Note, Plan, ProcessPlan, RootPlan, SeccompPlan, env, ids,
    mounts, net,
};
use crate::host::HostFacts;
use crate::host::layers::HIDDEN_OF_HOST;
use crate::spec::{EXTENTS_MAX, IdExtent, NetMode, RootSpec, ValidSpec};

/// Why there is no plan for a spec on this host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Nobody here can write this map.
    #[error("{field}: cannot map {inside}:{outside}:{count}: {reason}")]
    UnwritableMap {
        /// `uidmap` or `gidmap`.
        field: &'static str,
        /// First id inside.
        inside: u32,
        /// First id outside.
        outside: u32,
        /// Number of ids.
        count: u32,
        /// Why not.
        reason: &'static str,
        /// What would help.
        hint: Option<String>,
    },
    /// `--nested` with id 0 of the initial user namespace in the map.
    #[error(
        "{field}: cannot map {inside}:{outside}:{count} with --nested: /proc/sys is not covered then, and id 0 outside could write to it"
    )]
    RootInNested {
        /// `uidmap` or `gidmap`.
        field: &'static str,
        /// First id inside.
        inside: u32,
        /// First id outside.
        outside: u32,
        /// Number of ids.
        count: u32,
    },
    /// The caller's own namespace has more extents than a sandbox may have.
    #[error(
        "{field}: the caller's own user namespace has {count} extents, and a sandbox at most {EXTENTS_MAX}"
    )]
    TooManyExtents {
        /// `uidmap` or `gidmap`.
        field: &'static str,
        /// Number of extents.
        count: usize,
    },
    /// A name cannot be chosen where only one id exists.
    #[error(
        "user: cannot run as {name:?}: only one id exists in the sandbox here, and it must be known before the sandbox is"
    )]
    NameInSingleMap {
        /// The name.
        name: String,
        /// What would help.
        hint: String,
    },
    /// Something cannot be mounted where it was asked for.
    #[error("cannot mount on {root_path} in the sandbox: {reason}")]
    MountPoint {
        /// Path inside.
        root_path: PathBuf,
        /// Why not.
        reason: &'static str,
    },
    /// Every network that could be used inside is taken.
    #[error("cannot find a private IPv4 network for the sandbox: this host has routes into all of them")]
    NoFreeNetwork,
    /// `--allow` with addresses of the sandbox's own network.
    #[error("allow: {rule} is about the sandbox's own network, in which there is nobody but the gateway")]
    RuleForOwnNetwork {
        /// The rule.
        rule: String,
    },
}

impl PlanError {
    /// What can be done about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::UnwritableMap { hint, .. } => hint.clone(),
            Self::NameInSingleMap { hint, .. } => Some(hint.clone()),
            Self::TooManyExtents { .. } => Some("choose some of them with --uidmap and --gidmap".into()),
            Self::RootInNested { .. } => {
                Some("map ids from 1 on outside, or none at all; or run it as an ordinary user".into())
            }
            Self::MountPoint { .. } => None,
            Self::RuleForOwnNetwork { .. } => Some(
                "the gateway stands for the host's loopback with `--allow-host-loopback=PORT`, whatever the rules are"
                    .into(),
            ),
            Self::NoFreeNetwork => Some("use `--network host` or `--network none`".into()),
        }
    }
}

/// Decides how `spec` is carried out on a host of which `facts` and `place` are known.
///
/// # Errors
/// When the host cannot do what is asked and no fallback is as safe.
pub fn plan(spec: &ValidSpec, facts: &HostFacts, place: &BoxPlace) -> Result<Plan, PlanError> {
    let mut notes = Vec::new();
    let ids = ids::plan_ids(spec, facts, &mut notes)?;
    let net = net::plan_net(spec, facts, &mut notes)?;
    // Box names may hold what host names must not.
    let hostname = spec.hostname.clone().unwrap_or_else(|| host_name_of(&place.name));
    let single = ids.single().is_some();
    let generated = mounts::plan_generated(spec, facts, place, &net, &hostname, single, &mut notes)?;
    let mount_steps = mounts::plan_mounts(spec, place, &mut notes);

    let mut namespaces = vec![
        Namespace::User,
        Namespace::Pid,
        Namespace::Mnt,
        Namespace::Uts,
        Namespace::Ipc,
        Namespace::Cgroup,
    ];
    if spec.net.mode == NetMode::Host {
        notes.push(Note::new(
            "the network is not isolated",
            "with --network host the payload reaches what the caller reaches, the host's loopback included",
        ));
    } else {
        namespaces.push(Namespace::Net);
    }
    if spec.time.is_some() {
        namespaces.push(Namespace::Time);
    }

    let layers = place
        .root
        .layers
        .iter()
        .enumerate()
        .map(|(at, layer)| LayerPlan {
            host_path: layer.host_path.clone(),
            translate_owners: spec.fs.root != RootSpec::Host
                && (owns(facts.uid, &ids.uids, layer.uid) || owns(facts.gid, &ids.gids, layer.gid)),
            whiteouts: match &spec.fs.root {
                RootSpec::Host => true,
                RootSpec::Layers(layers) => layers.get(at).is_none_or(|layer| layer.whiteouts),
            },
            hidden: hidden_in(&layer.host_path, spec, place),
        })
        .collect();

    let host_tree = spec.fs.root == RootSpec::Host;
    let workdir = match (&spec.process.workdir, &facts.current_dir) {
        (Some(workdir), _) => workdir.clone(),
        (None, Some(current)) if host_tree => {
            if place.root.layers.iter().any(|layer| {
                hidden_in(&layer.host_path, spec, place)
                    .iter()
                    .any(|hidden| current.starts_with(layer.host_path.join(hidden)))
            }) {
                notes.push(Note::new(
                    "the working directory is /",
                    format!("{} is hidden in the sandbox", current.display()),
                ));
                "/".into()
            } else {
                current.clone()
            }
        }
        _ => "/".into(),
    };
    let env = env::plan_env(spec, facts, place, &ids, &hostname, &workdir, &mut notes);
    let confine = plan_confine(spec, facts, &mut notes);
    Ok(Plan {
        name: place.name.clone(),
        state_dir: place.state_dir.clone(),
        remove: spec.remove,
        process: ProcessPlan {
            args: spec.process.args.clone(),
            env,
            workdir,
            workdir_required: spec.process.workdir.is_some(),
            user: ids::plan_user(spec, &ids),
            terminal: spec.process.terminal,
            interactive: spec.process.interactive,
            timeout: spec.process.timeout,
        },
        ids,
        namespaces,
        time: spec.time,
        hostname,
        domainname: spec.domainname.clone(),
        root: RootPlan { layers, generated, upper: place.upper.clone() },
        mounts: mount_steps,
        net,
        confine,
        notes,
    })
}

fn host_name_of(name: &str) -> String {
    let label = |label: &str| label.trim_matches('-').to_owned();
    let name: Vec<String> =
        name.replace('_', "-").split('.').map(label).filter(|label| !label.is_empty()).collect();
    if name.is_empty() { "box".into() } else { name.join(".") }
}

/// Whether a tree whose root has this owner was unpacked for these maps: it belongs to the
/// caller himself or to one of the ids the map leads to. The identity is no translation.
fn owns(own: u32, extents: &[IdExtent], owner: u32) -> bool {
    let outside = extents.iter().any(|e| e.outside <= owner && owner - e.outside < e.count);
    let identity = extents.iter().all(|e| e.inside == e.outside);
    !identity && (outside || owner == own)
}

/// What must not show of a layer. Through the state directory a payload would see its own upper and those of other boxes.
fn hidden_in(layer: &Path, spec: &ValidSpec, place: &BoxPlace) -> Vec<PathBuf> {
    let mut hidden: Vec<PathBuf> = match spec.fs.root {
        RootSpec::Host => HIDDEN_OF_HOST.map(PathBuf::from).into(),
        RootSpec::Layers(_) => Vec::new(),
    };
    let external = place.upper.iter().flat_map(|upper| [&upper.dir, &upper.work]);
    for path in std::iter::once(&place.state_root).chain(external) {
        // An upper in the state directory is hidden with it.
        if let Ok(relative) = path.strip_prefix(layer)
            && !relative.as_os_str().is_empty()
            && !hidden.iter().any(|hidden| relative.starts_with(hidden))
        {
            hidden.push(relative.to_owned());
        }
    }
    hidden
}

/// Docker's default set: what package managers and servers need. Each counts in the
/// sandbox's own namespaces only.
const KEEP_CAPS: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "SETFCAP",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SYS_CHROOT",
    "MKNOD",
    "AUDIT_WRITE",
];

/// capabilities(7), in the kernel's order.
const ALL_CAPS: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

fn plan_confine(spec: &ValidSpec, facts: &HostFacts, notes: &mut Vec<Note>) -> ConfinePlan {
    // Abstract sockets belong to the net namespace: with one of its own there is nothing of the
    // host's to reach.
    let host_network = spec.net.mode == NetMode::Host;
    if host_network && !facts.landlock_scopes {
        notes.push(Note {
            what: "the host's abstract unix sockets are in reach".into(),
            reason: "they belong to the host's network, and this kernel's Landlock cannot keep them away (6.12 can)"
                .into(),
            weaker: true,
        });
    }
    let names: &[&str] = if spec.nested { &ALL_CAPS } else { &KEEP_CAPS };
    ConfinePlan {
        keep_caps: names.iter().map(|name| (*name).to_owned()).collect(),
        seccomp: if spec.nested { SeccompPlan::Nested } else { SeccompPlan::Default },
        scope_abstract_sockets: host_network && facts.landlock_scopes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn box_names_become_host_names() {
        assert_eq!(host_name_of("calm-otter"), "calm-otter");
        assert_eq!(host_name_of("a_b.c-"), "a-b.c");
        assert_eq!(host_name_of("0--"), "0");
        assert_eq!(host_name_of("a.."), "a");
    }
}
