//! The payload's environment.
//!
//! Over the host's tree it is the caller's, less the variables that name sockets, sessions
//! and displays which do not exist inside (and would be ways out if they did). `--env NAME`
//! brings one back. With layers it starts empty, as an image's does.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use super::{BoxPlace, IdPlan, Note};
use crate::host::HostFacts;
use crate::spec::{UserSpec, ValidSpec};

/// Not passed over the host's tree.
const DROPPED: [&str; 34] = [
    // Agents and buses: sockets below /run or /tmp that belong to the host.
    "SSH_AUTH_SOCK",
    "SSH_AGENT_PID",
    "GPG_AGENT_INFO",
    "DBUS_SESSION_BUS_ADDRESS",
    "DBUS_SESSION_BUS_PID",
    "DBUS_SYSTEM_BUS_ADDRESS",
    "GNOME_KEYRING_CONTROL",
    "PULSE_SERVER",
    "PIPEWIRE_REMOTE",
    "AT_SPI_BUS_ADDRESS",
    // The session.
    "XDG_RUNTIME_DIR",
    "XDG_SESSION_ID",
    "XDG_SESSION_PATH",
    "XDG_SEAT",
    "XDG_SEAT_PATH",
    "XDG_VTNR",
    "SESSION_MANAGER",
    "ICEAUTHORITY",
    // Displays: who reaches one reads every key typed.
    "DISPLAY",
    "WAYLAND_DISPLAY",
    "WAYLAND_SOCKET",
    "XAUTHORITY",
    "WINDOWID",
    // Terminal multiplexers: their sockets run commands outside.
    "TMUX",
    "TMUX_PANE",
    "STY",
    "ZELLIJ",
    // What a service manager says to the caller alone.
    "NOTIFY_SOCKET",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
    "JOURNAL_STREAM",
    "INVOCATION_ID",
    "SYSTEMD_EXEC_PID",
];

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where only root's programs are: an ordinary user's PATH lacks them, and dpkg refuses to work without.
const DIRECTORIES_OF_ROOT: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

type Env = Vec<(OsString, OsString)>;

/// The caller's PATH, followed by what root needs and it lacks.
fn with_directories_of_root(path: &OsStr) -> OsString {
    let mut path = path.to_owned();
    if path.is_empty() {
        return path;
    }
    for directory in DIRECTORIES_OF_ROOT {
        if !std::env::split_paths(&path).any(|known| known == Path::new(directory)) {
            path.push(":");
            path.push(directory);
        }
    }
    path
}

fn is_root(user: &UserSpec) -> bool {
    user.user == "root" || user.user.parse() == Ok(0_u32)
}

fn set(env: &mut Env, name: impl Into<OsString>, value: impl Into<OsString>) {
    let (name, value) = (name.into(), value.into());
    match env.iter_mut().find(|(known, _)| *known == name) {
        Some((_, old)) => *old = value,
        None => env.push((name, value)),
    }
}

fn has(env: &Env, name: &str) -> bool {
    env.iter().any(|(known, _)| known == name)
}

/// Decides the environment.
pub(super) fn plan_env(
    spec: &ValidSpec,
    facts: &HostFacts,
    place: &BoxPlace,
    ids: &IdPlan,
    hostname: &str,
    workdir: &Path,
    notes: &mut Vec<Note>,
) -> Env {
    let mut env: Env = Vec::new();
    if spec.process.inherit_env {
        let dropped = |name: &OsStr| DROPPED.iter().any(|dropped| name == *dropped);
        let mut gone: Vec<String> = Vec::new();
        for (name, value) in &facts.environ {
            if dropped(name) {
                gone.push(name.to_string_lossy().into_owned());
            } else {
                set(&mut env, name, value);
            }
        }
        if !gone.is_empty() {
            gone.sort();
            notes.push(Note::new(
                format!("variables left out: {}", gone.join(" ")),
                "what they name does not exist inside; --env NAME passes one all the same",
            ));
        }
        for (name, value) in [("HOSTNAME", OsStr::new(hostname)), ("PWD", workdir.as_os_str())] {
            if has(&env, name) {
                set(&mut env, name, value);
            }
        }
        let path = env.iter().find(|(name, _)| name == "PATH").map(|(_, value)| value.clone());
        let root = match &spec.process.user {
            Some(user) => is_root(user),
            None => ids.uids.iter().any(|extent| extent.inside == 0),
        };
        match path {
            None => set(&mut env, "PATH", PATH),
            Some(path) if root => set(&mut env, "PATH", with_directories_of_root(&path)),
            Some(_) => {}
        }
    } else {
        set(&mut env, "PATH", PATH);
        set(&mut env, "HOSTNAME", hostname);
    }
    // Another user's home; the caller's own stays over the host's tree.
    match (&spec.process.user, &place.root.home) {
        (Some(_), Some(home)) => set(&mut env, "HOME", home.clone()),
        (Some(user), None) if !spec.process.inherit_env => {
            set(&mut env, "HOME", if is_root(user) { "/root" } else { "/" });
        }
        (None, _) if !spec.process.inherit_env => set(&mut env, "HOME", "/root"),
        _ => {}
    }
    if spec.process.terminal && !has(&env, "TERM") {
        let term = facts.environ.iter().find(|(name, _)| name == "TERM").map(|(_, value)| value.clone());
        set(&mut env, "TERM", term.unwrap_or_else(|| "xterm".into()));
    }
    set(&mut env, "container", "rootlet");
    // With a range the caller's files belong to his own number inside, not to root. Programs that
    // mind whose files they work on (git's "dubious ownership") ask sudo(8)'s variables who root is.
    let root_inside =
        spec.process.user.as_ref().is_none_or(|u| u.user == "root" || u.user.parse() == Ok(0_u32));
    if spec.process.inherit_env && ids.single().is_none() && facts.uid != 0 && root_inside {
        set(&mut env, "SUDO_UID", facts.uid.to_string());
        set(&mut env, "SUDO_GID", facts.gid.to_string());
    }
    for (name, value) in &spec.process.env {
        match value {
            Some(value) => set(&mut env, name, value),
            None => env.retain(|(known, _)| known != name),
        }
    }
    env
}
