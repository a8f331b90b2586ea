//! How to mend what a host does not allow: one table for `doctor` and for the errors of
//! `run`, so that the two cannot disagree.

use nix::errno::Errno;

use super::HostFacts;

/// What mends an upper's file system without `user.*` attributes.
pub const MEND_XATTRS: &str =
    "choose a directory on ext4, xfs, btrfs or tmpfs (Linux 6.6) with XDG_STATE_HOME=DIR or --upper DIR";

/// Something that is missing on a host, with what mends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Trouble {
    /// user.max_user_namespaces (or another limit of ucounts) is reached or 0.
    UsernsLimit,
    /// kernel.unprivileged_userns_clone is 0.
    UsernsClone,
    /// AppArmor restricts unprivileged user namespaces.
    UsernsApparmor,
    /// An AppArmor profile confines the caller and allows none.
    UsernsProfile,
    /// Something else forbids user namespaces: a container's filter, SELinux.
    UsernsForbidden,
    /// A limit on another kind of namespace is reached or 0.
    NamespaceLimit,
    /// Namespaces are nested 32 deep.
    UsernsDepth,
    /// The kernel has no such namespace.
    NoNamespace,
    /// No subordinate ids.
    Subids,
    /// newuidmap and newgidmap are missing or lack their privilege.
    Helpers,
    /// newuidmap did not answer.
    HelperHangs,
    /// newuidmap or newgidmap refused.
    HelperRefuses,
    /// No /dev/fuse.
    FuseMissing,
    /// /dev/fuse may not be opened.
    FuseDenied,
    /// FUSE cannot be mounted in a user namespace.
    FuseMount,
    /// No /dev/net/tun.
    TunMissing,
    /// /dev/net/tun may not be opened.
    TunDenied,
    /// A TAP cannot be made.
    TapDenied,
    /// /proc cannot be mounted anew.
    ProcCovered,
    /// No room.
    DiskFull,
    /// No inodes or quota.
    NotPermittedOnState,
    /// Too many open files.
    DescriptorLimit,
    /// The port needs privilege.
    PrivilegedPort,
    /// Something else listens there.
    PortBusy,
    /// The host address is not this host's.
    NoSuchAddress,
    /// seccomp filters cannot be installed.
    Seccomp,
    /// A filter outside answers calls already: the kernel allows one such filter only.
    SeccompAnswered,
    /// Echo sockets are not allowed: ping does not work through the stack.
    PingGroup,
    /// No such working directory inside.
    WorkdirMissing,
    /// The user is in no file inside.
    UserUnknown,
    /// The id does not exist inside.
    IdUnmapped,
    /// Nothing to mount on.
    MountPointMissing,
    /// The clocks cannot be set so.
    TimeOffset,
    /// A file is not there.
    CommandMissing,
    /// The file is there but cannot be executed.
    CommandDenied,
    /// Not a program the kernel knows.
    CommandFormat,
    /// The same file is being written.
    CommandBusy,
}

/// What was found and the command that mends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hint {
    /// What is the matter, in a few words.
    pub text: &'static str,
    /// What to run or to do.
    pub mend: String,
}

impl std::fmt::Display for Hint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.text, self.mend)
    }
}

/// The command that gives the caller subordinate ids.
#[must_use]
pub fn mend_subids(facts: &HostFacts) -> String {
    let user = facts.user_name.as_deref().unwrap_or("USER");
    let (first, last) = (facts.free_subids, facts.free_subids.saturating_add(65_535));
    format!("sudo usermod --add-subuids {first}-{last} --add-subgids {first}-{last} {user}")
}

fn sysctl(setting: &str) -> String {
    format!("echo '{setting}' | sudo tee -a /etc/sysctl.d/60-rootlet.conf && sudo sysctl --system")
}

impl Trouble {
    /// What to say and do about it.
    #[must_use]
    pub fn hint(self, facts: &HostFacts) -> Hint {
        let (text, mend) = match self {
            Self::UsernsLimit => (
                "not about disk space: the limit on user namespaces is reached or 0",
                sysctl("user.max_user_namespaces = 28633"),
            ),
            Self::UsernsClone => (
                "this kernel forbids user namespaces to ordinary users",
                sysctl("kernel.unprivileged_userns_clone = 1"),
            ),
            Self::UsernsApparmor => (
                "AppArmor restricts user namespaces of ordinary users",
                sysctl("kernel.apparmor_restrict_unprivileged_userns = 0"),
            ),
            Self::UsernsProfile => (
                "the AppArmor profile that confines the caller allows no user namespaces",
                "start it outside of that profile (`cat /proc/self/attr/current` names it), or have the \
                 administrator let the profile start it unconfined"
                    .into(),
            ),
            Self::UsernsForbidden => (
                "user namespaces are forbidden here",
                "inside rootlet, run the outer one with --nested; in a container, run it with \
                 `--security-opt seccomp=unconfined` (docker, podman) or let its security profile allow clone and \
                 unshare with CLONE_NEWUSER"
                    .into(),
            ),
            Self::NamespaceLimit => (
                "not about disk space: a limit on namespaces is reached or 0",
                "`sysctl -a | grep 'user.max_.*_namespaces'` shows them; in bash, \
                 `sudo sysctl -w user.max_{user,pid,mnt,uts,ipc,net,cgroup,time}_namespaces=65536` sets them all"
                    .into(),
            ),
            Self::UsernsDepth => ("the kernel nests user namespaces 32 deep", "start it in an outer sandbox".into()),
            Self::NoNamespace => (
                "this kernel lacks a kind of namespace",
                "use a kernel with CONFIG_USER_NS, CONFIG_PID_NS, CONFIG_NET_NS, CONFIG_UTS_NS, CONFIG_IPC_NS and \
                 CONFIG_CGROUPS"
                    .into(),
            ),
            Self::Subids => ("the caller has no subordinate ids", mend_subids(facts)),
            Self::Helpers => {
                ("newuidmap and newgidmap are missing or lack their privilege", "sudo apt install uidmap".into())
            }
            Self::HelperHangs => (
                "newuidmap does not answer in time (a hung name service?)",
                "check with `newuidmap`; `--uidmap 0:$(id -u):1 --gidmap 0:$(id -g):1` does without it".into(),
            ),
            Self::HelperRefuses => (
                "newuidmap and newgidmap allow what /etc/subuid and /etc/subgid list",
                "check the caller's lines there; `--uidmap 0:$(id -u):1 --gidmap 0:$(id -g):1` does without".into(),
            ),
            Self::FuseMissing => ("the FUSE module is not loaded", "sudo modprobe fuse".into()),
            Self::FuseDenied => ("the caller may not open /dev/fuse", "sudo chmod 666 /dev/fuse".into()),
            Self::FuseMount => (
                "this kernel does not let a user namespace mount FUSE",
                "use Linux 4.18 or later; in a container, let its security profile allow mount".into(),
            ),
            Self::TunMissing => (
                "there is no /dev/net/tun",
                "sudo modprobe tun; in a container, add `--device /dev/net/tun`; or use `--network none` or \
                 `--network host`"
                    .into(),
            ),
            Self::TunDenied => ("the caller may not open /dev/net/tun", "sudo chmod 666 /dev/net/tun".into()),
            Self::TapDenied => (
                "a TAP device cannot be made in the sandbox's network namespace",
                "let the security profile in force allow it, or use `--network none` or `--network host`".into(),
            ),
            Self::ProcCovered => (
                "the kernel refuses a new /proc where the caller's own is partly covered",
                "in a container, run it with `--security-opt systempaths=unconfined` (docker) or \
                 `--security-opt unmask=ALL` (podman); inside rootlet, run the outer one with --nested"
                    .into(),
            ),
            Self::DiskFull => ("no space is left", "rootlet prune, or free some with `df -h` and `df -i`".into()),
            Self::NotPermittedOnState => (
                "the state directory cannot be written",
                "choose another with XDG_STATE_HOME=DIR".into(),
            ),
            Self::DescriptorLimit => ("too many files are open", "raise the limit: ulimit -n 20000".into()),
            Self::PrivilegedPort => (
                "an ordinary user may not listen on ports this low",
                format!("publish a higher one, or: {}", sysctl("net.ipv4.ip_unprivileged_port_start = 80")),
            ),
            Self::PortBusy => {
                ("something else listens on this port", "`ss -ltnup` shows what; or choose another port".into())
            }
            Self::NoSuchAddress => ("this host has no such address", "`ip addr` shows those it has".into()),
            Self::Seccomp => (
                "system call filters cannot be installed",
                "use a kernel with CONFIG_SECCOMP_FILTER; rootlet does not run without one".into(),
            ),
            Self::SeccompAnswered => (
                "a program outside answers filtered calls of this one already, and the kernel allows one to do so",
                "in an LXC or Incus container, turn off `security.syscalls.intercept.*`; in another, take \
                 SCMP_ACT_NOTIFY out of its seccomp profile; `rootlet run --nested` does without"
                    .into(),
            ),
            Self::PingGroup => (
                "ping sockets are not allowed to the caller's group",
                sysctl("net.ipv4.ping_group_range = 0 2147483647"),
            ),
            Self::WorkdirMissing => (
                "it is looked up inside the sandbox",
                "name a directory that is there and that the user inside may enter".into(),
            ),
            Self::UserUnknown => (
                "names are looked up in /etc/passwd and /etc/group inside the sandbox",
                "check the spelling, or give numbers".into(),
            ),
            Self::IdUnmapped => (
                "this id does not exist in the sandbox",
                format!("choose one of those that `rootlet run --dry-run` shows, or get more: {}", mend_subids(facts)),
            ),
            Self::MountPointMissing => (
                "there is nothing to mount on",
                "make the file or directory first in the volume that the place is in".into(),
            ),
            Self::TimeOffset => (
                "the kernel refuses these offsets",
                "the clocks must not become negative; 0 for none".into(),
            ),
            Self::CommandMissing => (
                "no such file inside the sandbox, or its interpreter or loader is missing",
                "check the spelling and the PATH inside".into(),
            ),
            Self::CommandDenied => (
                "the file is there but cannot be executed",
                "check that it is a file, not a directory, with execute permission (`ls -l`)"
                    .into(),
            ),
            Self::CommandFormat => (
                "the file is no program for this kernel",
                "a script needs a first line like #!/bin/sh; a program must be for this architecture".into(),
            ),
            Self::CommandBusy => ("the file is being written", "try again when it is finished".into()),
        };
        Hint { text, mend }
    }
}

/// Settings of the kernel that decide which trouble an errno stands for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sysctls {
    /// user.max_user_namespaces
    pub max_user_namespaces: Option<u64>,
    /// kernel.unprivileged_userns_clone (Debian and descendants)
    pub unprivileged_userns_clone: Option<u64>,
    /// kernel.apparmor_restrict_unprivileged_userns (Ubuntu and descendants)
    pub apparmor_restrict: Option<u64>,
    /// The caller is confined by an AppArmor profile (apparmor(7)), and by no system call filter, which
    /// says the same.
    pub apparmor_confined: bool,
}

impl Sysctls {
    /// Reads them.
    #[must_use]
    pub fn read() -> Self {
        let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let number = |name: &str| text(&format!("/proc/sys/{name}")).trim().parse().ok();
        Self {
            max_user_namespaces: number("user/max_user_namespaces"),
            unprivileged_userns_clone: number("kernel/unprivileged_userns_clone"),
            apparmor_restrict: number("kernel/apparmor_restrict_unprivileged_userns"),
            // Another security module answers there too, without a mode in brackets.
            apparmor_confined: text("/proc/self/attr/current").trim_end().ends_with("(enforce)")
                && text("/proc/self/status").lines().any(|line| line == "Seccomp:\t0"),
        }
    }
}

/// Which trouble a failed step stands for. `step` is the name of a step of the launch
/// (`launch::handshake::Step::name`) or of a probe of the doctor.
#[must_use]
pub fn diagnose(step: &str, errno: Errno, sysctls: &Sysctls) -> Option<Trouble> {
    use Errno::{
        EACCES, EADDRINUSE, EADDRNOTAVAIL, EBUSY, EDQUOT, EINVAL, EISDIR, EMFILE, ENFILE, ENODEV, ENOENT,
        ENOEXEC, ENOSPC, ENOSYS, ENOTDIR, ENXIO, EPERM, ERANGE, EROFS, ETIMEDOUT, ETXTBSY, EUSERS,
    };
    let forbidden = || {
        if sysctls.unprivileged_userns_clone == Some(0) {
            Trouble::UsernsClone
        } else if sysctls.apparmor_restrict.is_some_and(|value| value != 0) {
            Trouble::UsernsApparmor
        } else if sysctls.max_user_namespaces == Some(0) {
            Trouble::UsernsLimit
        } else if sysctls.apparmor_confined {
            Trouble::UsernsProfile
        } else {
            Trouble::UsernsForbidden
        }
    };
    Some(match (step, errno) {
        (_, EMFILE | ENFILE) => Trouble::DescriptorLimit,
        ("clone", ENOSPC | EUSERS) if sysctls.max_user_namespaces.is_some_and(|max| max > 1000) => {
            Trouble::UsernsDepth
        }
        ("clone", ENOSPC | EUSERS) => Trouble::UsernsLimit,
        ("unshare", ENOSPC | EUSERS) => Trouble::NamespaceLimit,
        ("clone" | "unshare", EINVAL) => Trouble::NoNamespace,
        // No kernel that runs us lacks clone3: a filter answers so.
        ("clone" | "unshare" | "uid_map", EPERM | EACCES | ENOSYS) => forbidden(),
        ("map_helper", ENOENT) => Trouble::Helpers,
        ("map_helper", ETIMEDOUT) => Trouble::HelperHangs,
        ("map_helper", _) => Trouble::HelperRefuses,
        ("fuse_open", ENOENT | ENODEV | ENXIO) => Trouble::FuseMissing,
        ("fuse_open", _) => Trouble::FuseDenied,
        // AppArmor on Ubuntu takes the capabilities away after the namespace is made.
        ("fuse_mount" | "mount" | "hostname", EPERM | EACCES)
            if sysctls.apparmor_restrict.is_some_and(|value| value != 0) =>
        {
            Trouble::UsernsApparmor
        }
        ("fuse_mount" | "mount" | "hostname", EPERM | EACCES) if sysctls.apparmor_confined => {
            Trouble::UsernsProfile
        }
        ("fuse_mount", ENODEV) => Trouble::FuseMissing,
        ("fuse_mount", _) => Trouble::FuseMount,
        ("tap_open", ENOENT | ENODEV | ENXIO) => Trouble::TunMissing,
        ("tap_open", EACCES) => Trouble::TunDenied,
        ("tap_open", _) => Trouble::TapDenied,
        ("procfs", EPERM) => Trouble::ProcCovered,
        ("confine", EINVAL | ENOSYS) => Trouble::Seccomp,
        ("confine", EBUSY) => Trouble::SeccompAnswered,
        ("state", ENOSPC | EDQUOT) => Trouble::DiskFull,
        ("state", EROFS | EACCES | EPERM) => Trouble::NotPermittedOnState,
        ("listen", EACCES) => Trouble::PrivilegedPort,
        ("listen", EADDRINUSE) => Trouble::PortBusy,
        ("listen", EADDRNOTAVAIL) => Trouble::NoSuchAddress,
        ("workdir", _) => Trouble::WorkdirMissing,
        ("user", _) => Trouble::UserUnknown,
        ("become", EINVAL | EPERM) => Trouble::IdUnmapped,
        ("mount_point", ENOENT | ENOTDIR) => Trouble::MountPointMissing,
        ("time", ERANGE | EINVAL) => Trouble::TimeOffset,
        ("exec", ENOENT | ENOTDIR) => Trouble::CommandMissing,
        ("exec", EACCES | EPERM | EISDIR) => Trouble::CommandDenied,
        ("exec", ENOEXEC) => Trouble::CommandFormat,
        ("exec", ETXTBSY) => Trouble::CommandBusy,
        (_, ENOSPC | EDQUOT) => Trouble::DiskFull,
        _ => return None,
    })
}

/// The hint for a failed step of the launch, on `object`.
#[must_use]
pub fn hint(step: &str, object: &str, errno: Errno, facts: &HostFacts) -> Option<Hint> {
    let step = if step == "mount" && object == "/proc" { "procfs" } else { step };
    diagnose(step, errno, &Sysctls::read()).map(|trouble| trouble.hint(facts))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_errno_means_what_the_settings_say() {
        let of = |sysctls: Sysctls| diagnose("clone", Errno::EPERM, &sysctls);
        assert_eq!(of(Sysctls::default()), Some(Trouble::UsernsForbidden));
        assert_eq!(diagnose("clone", Errno::ENOSYS, &Sysctls::default()), Some(Trouble::UsernsForbidden));
        let debian = Sysctls { unprivileged_userns_clone: Some(0), ..Sysctls::default() };
        assert_eq!(of(debian), Some(Trouble::UsernsClone));
        let ubuntu = Sysctls { apparmor_restrict: Some(1), ..Sysctls::default() };
        assert_eq!(of(ubuntu), Some(Trouble::UsernsApparmor));
        assert_eq!(diagnose("uid_map", Errno::EPERM, &ubuntu), Some(Trouble::UsernsApparmor));
        assert_eq!(diagnose("fuse_mount", Errno::EPERM, &ubuntu), Some(Trouble::UsernsApparmor));
        let confined = Sysctls { apparmor_confined: true, ..Sysctls::default() };
        assert_eq!(of(confined), Some(Trouble::UsernsProfile));
        assert_eq!(diagnose("uid_map", Errno::EPERM, &confined), Some(Trouble::UsernsProfile));
    }

    #[test]
    fn no_space_for_namespaces_is_not_about_disks() {
        let none = Sysctls { max_user_namespaces: Some(0), ..Sysctls::default() };
        assert_eq!(diagnose("clone", Errno::ENOSPC, &none), Some(Trouble::UsernsLimit));
        let many = Sysctls { max_user_namespaces: Some(96_365), ..Sysctls::default() };
        assert_eq!(diagnose("clone", Errno::ENOSPC, &many), Some(Trouble::UsernsDepth));
        assert_eq!(diagnose("unshare", Errno::ENOSPC, &many), Some(Trouble::NamespaceLimit));
        assert_eq!(diagnose("state", Errno::ENOSPC, &none), Some(Trouble::DiskFull));
    }

    #[test]
    fn one_program_only_can_answer_filtered_calls() {
        let trouble = diagnose("confine", Errno::EBUSY, &Sysctls::default());
        assert_eq!(trouble, Some(Trouble::SeccompAnswered));
        let mend = trouble.map(|trouble| trouble.hint(&HostFacts::gather()).mend);
        assert!(mend.is_some_and(|mend| mend.contains("--nested")));
        assert_eq!(diagnose("confine", Errno::EINVAL, &Sysctls::default()), Some(Trouble::Seccomp));
    }

    #[test]
    fn devices() {
        let none = Sysctls::default();
        assert_eq!(diagnose("fuse_open", Errno::ENOENT, &none), Some(Trouble::FuseMissing));
        assert_eq!(diagnose("fuse_open", Errno::EACCES, &none), Some(Trouble::FuseDenied));
        assert_eq!(diagnose("tap_open", Errno::ENOENT, &none), Some(Trouble::TunMissing));
        assert_eq!(diagnose("tap_open", Errno::EACCES, &none), Some(Trouble::TunDenied));
        assert_eq!(diagnose("pivot_root", Errno::EINVAL, &none), None);
    }
}
