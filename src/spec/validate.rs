//! The checks that need nothing but the spec itself.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use super::{IdExtent, LoopbackSpec, NetMode, RootSpec, SandboxSpec, TimeSpec};

/// Why a spec is not acceptable. `field` is the name of the flag or key without dashes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// A value cannot be what it says.
    #[error("{field}: {value:?} is not valid: {reason}")]
    Invalid {
        /// Name of the field.
        field: &'static str,
        /// The value.
        value: String,
        /// Why not.
        reason: String,
    },
    /// Nothing was given where something is needed.
    #[error("{field}: nothing given: {reason}")]
    Missing {
        /// Name of the field.
        field: &'static str,
        /// What is needed.
        reason: &'static str,
    },
    /// Two fields contradict each other.
    #[error("{field} and {other} cannot go together: {reason}")]
    Conflict {
        /// Name of the field.
        field: &'static str,
        /// Name of the other field.
        other: &'static str,
        /// Why not.
        reason: String,
    },
}

/// A spec that [`SandboxSpec::validate`] accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValidSpec(SandboxSpec);

impl std::ops::Deref for ValidSpec {
    type Target = SandboxSpec;

    fn deref(&self) -> &SandboxSpec {
        &self.0
    }
}

/// Longest name of a box: it serves as host name too.
const NAME_MAX: usize = 63;

/// Most extents of a map. The kernel takes 340 (user_namespaces(7)), but the system call filter
/// compares ids with one after the other, and it must not become too long.
pub const EXTENTS_MAX: usize = 128;

/// Paths inside that are ours: a mount over them would hide or forge what the
/// confinement of the payload rests on.
const OURS: [&str; 3] = ["/proc", "/sys", "/dev"];

impl SandboxSpec {
    /// Checks everything that can be checked without looking at the machine.
    pub fn validate(self) -> Result<ValidSpec, SpecError> {
        if let Some(name) = &self.name {
            check_box_name(name)?;
        }
        self.check_process()?;
        self.check_fs()?;
        check_extents("uidmap", self.ids.uid_map.as_deref())?;
        check_extents("gidmap", self.ids.gid_map.as_deref())?;
        if self.ids.uid_map.is_some() != self.ids.gid_map.is_some() {
            let (field, other) =
                if self.ids.uid_map.is_some() { ("uidmap", "gidmap") } else { ("gidmap", "uidmap") };
            return Err(SpecError::Missing {
                field: other,
                reason: if field == "uidmap" {
                    "uidmap needs gidmap beside it"
                } else {
                    "gidmap needs uidmap beside it"
                },
            });
        }
        self.check_net()?;
        if let Some(hostname) = &self.hostname {
            check_host_name("hostname", hostname)?;
        }
        if let Some(domainname) = &self.domainname {
            check_domain_name(domainname)?;
        }
        if let Some(time) = &self.time {
            check_time(time)?;
        }
        Ok(ValidSpec(self))
    }

    fn check_process(&self) -> Result<(), SpecError> {
        let process = &self.process;
        let Some(command) = process.args.first() else {
            return Err(SpecError::Missing { field: "command", reason: "a command must follow --" });
        };
        if command.is_empty() {
            return Err(invalid("command", command, "it is empty"));
        }
        for arg in &process.args {
            refuse_nul("command", arg)?;
        }
        for (name, value) in &process.env {
            if name.is_empty() || name.as_bytes().contains(&b'=') {
                return Err(invalid("env", name, "a name must not be empty or hold '='"));
            }
            refuse_nul("env", name)?;
            if value.as_ref().is_some_and(|value| value.as_bytes().contains(&0)) {
                return Err(invalid("env", name, "its value holds a NUL byte"));
            }
        }
        if let Some(workdir) = &process.workdir {
            check_root_path("workdir", workdir)?;
        }
        if let Some(user) = &process.user {
            for name in [Some(&user.user), user.group.as_ref()].into_iter().flatten() {
                check_user_name(name)?;
            }
        }
        if process.timeout.is_some_and(|timeout| timeout.is_zero()) {
            return Err(invalid("timeout", "0", "it must be longer than 0"));
        }
        Ok(())
    }

    fn check_fs(&self) -> Result<(), SpecError> {
        let fs = &self.fs;
        if let RootSpec::Layers(layers) = &fs.root {
            if layers.is_empty() {
                return Err(SpecError::Missing { field: "layer", reason: "at least one directory" });
            }
            for layer in layers {
                check_host_path("layer", &layer.host_path)?;
            }
        }
        if let Some(upper) = &fs.upper {
            check_host_path("upper", upper)?;
            if upper.file_name().is_none() {
                return Err(invalid("upper", upper, "it must name a directory below another one"));
            }
            if fs.read_only {
                return Err(SpecError::Conflict {
                    field: "upper",
                    other: "read-only",
                    reason: "nothing is written with read-only".into(),
                });
            }
        }
        let mut targets = HashSet::new();
        for volume in &fs.volumes {
            check_host_path("volume", &volume.host_path)?;
            check_mount_point("volume", &volume.root_path)?;
            if !targets.insert(normal(&volume.root_path)) {
                return Err(invalid("volume", &volume.root_path, "something else is mounted there already"));
            }
        }
        for tmpfs in &fs.tmpfs {
            check_mount_point("tmpfs", &tmpfs.root_path)?;
            if tmpfs.mode > 0o7777 {
                return Err(invalid("tmpfs", format!("{:o}", tmpfs.mode), "the mode is more than 7777"));
            }
            if !targets.insert(normal(&tmpfs.root_path)) {
                return Err(invalid("tmpfs", &tmpfs.root_path, "something else is mounted there already"));
            }
        }
        Ok(())
    }

    fn check_net(&self) -> Result<(), SpecError> {
        let net = &self.net;
        let has_loopback = net.mode == NetMode::Stack && net.host_loopback != LoopbackSpec::Refused;
        if let Some(host) = net.add_host.iter().find(|host| host.ip.is_none() && !has_loopback) {
            return Err(invalid(
                "add-host",
                format!("{}:host-gateway", host.name),
                "no address stands for the host's loopback without --allow-host-loopback",
            ));
        }
        if net.mode != NetMode::Stack {
            let reason = match net.mode {
                NetMode::Host => "with the host's network, everything that the host reaches is reached",
                _ => "there is no network to reach",
            };
            let field = if net.host_loopback != LoopbackSpec::Refused {
                "allow-host-loopback"
            } else if !net.allow.is_empty() {
                "allow"
            } else if !net.deny.is_empty() {
                "deny"
            } else if net.rate_in.or(net.rate_out).is_some() {
                "network-rate"
            } else if !net.publish.is_empty() {
                "publish"
            } else if !net.dns.is_empty() {
                "dns"
            } else if net.dns_search.is_some() {
                "dns-search"
            } else if net.control.is_some() {
                "network-control"
            } else {
                return Ok(());
            };
            let other = if net.mode == NetMode::Host { "network host" } else { "network none" };
            return Err(SpecError::Conflict { field, other, reason: reason.into() });
        }
        if let Some(control) = &net.control {
            check_host_path("network-control", control)?;
            if control.file_name().is_none() {
                return Err(invalid("network-control", control, "it must name a socket in a directory"));
            }
        }
        let mut taken = HashSet::new();
        for publish in &net.publish {
            if publish.inside_port == 0 {
                return Err(invalid("publish", "0", "the port inside must be 1 to 65535"));
            }
            if publish.host_port != 0 && !taken.insert((publish.host_ip, publish.host_port, publish.udp)) {
                return Err(invalid(
                    "publish",
                    publish.host_port.to_string(),
                    "this port is published twice",
                ));
            }
        }
        Ok(())
    }
}

fn invalid(field: &'static str, value: impl AsRef<OsStr>, reason: impl Into<String>) -> SpecError {
    SpecError::Invalid { field, value: value.as_ref().to_string_lossy().into_owned(), reason: reason.into() }
}

/// `[a-z0-9][a-z0-9_.-]*`, at most 63 bytes, and not the word `last`: it is a directory
/// name, a host name and a word on the command line.
pub fn check_box_name(name: &str) -> Result<(), SpecError> {
    let mut bytes = name.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let rest = bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_.-".contains(&b));
    if !(first && rest) {
        return Err(invalid("name", name, "use a-z 0-9 _ . - and start with a letter or digit"));
    }
    if name.len() > NAME_MAX {
        return Err(invalid("name", name, format!("it is longer than {NAME_MAX} bytes")));
    }
    if name == "last" {
        return Err(invalid("name", name, "this word stands for the latest box"));
    }
    Ok(())
}

/// RFC 1123, at most the 64 bytes that the kernel holds.
fn check_host_name(field: &'static str, name: &str) -> Result<(), SpecError> {
    if name.is_empty() || name.len() > 64 {
        return Err(invalid(field, name, "it must have 1 to 64 bytes"));
    }
    for label in name.split('.') {
        let inner = label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        if label.is_empty() || label.len() > 63 || !inner || label.starts_with('-') || label.ends_with('-') {
            return Err(invalid(
                field,
                name,
                "a host name has labels of letters, digits and inner hyphens, with dots between them (RFC 1123)",
            ));
        }
    }
    Ok(())
}

/// A NIS domain name may also hold `_`, and `(none)` is what the kernel starts with.
fn check_domain_name(name: &str) -> Result<(), SpecError> {
    if name == "(none)" {
        return Ok(());
    }
    check_host_name("domainname", &name.replace('_', "x")).map_err(|error| match error {
        SpecError::Invalid { field, reason, .. } => {
            SpecError::Invalid { field, value: name.to_owned(), reason }
        }
        other => other,
    })
}

fn check_user_name(name: &str) -> Result<(), SpecError> {
    if name.is_empty() || name.bytes().any(|b| b == b':' || b == b'\n' || b == 0) {
        return Err(invalid("user", name, "it is neither a name nor a number"));
    }
    // (uid_t)-1 means "do not change" to every call that takes an id.
    if name.bytes().all(|b| b.is_ascii_digit()) && !name.parse::<u32>().is_ok_and(|id| id != u32::MAX) {
        return Err(invalid("user", name, "an id is at most 4294967294"));
    }
    Ok(())
}

fn refuse_nul(field: &'static str, value: &OsStr) -> Result<(), SpecError> {
    if value.as_bytes().contains(&0) { Err(invalid(field, value, "it holds a NUL byte")) } else { Ok(()) }
}

fn check_host_path(field: &'static str, path: &Path) -> Result<(), SpecError> {
    refuse_nul(field, path.as_os_str())?;
    if !path.is_absolute() {
        return Err(invalid(field, path, "the path must be absolute"));
    }
    Ok(())
}

fn check_root_path(field: &'static str, path: &Path) -> Result<(), SpecError> {
    check_host_path(field, path)?;
    if path.components().any(|c| c == Component::ParentDir) {
        return Err(invalid(field, path, "a path inside must not hold '..'"));
    }
    Ok(())
}

fn check_mount_point(field: &'static str, path: &Path) -> Result<(), SpecError> {
    check_root_path(field, path)?;
    let path = normal(path);
    if path == Path::new("/") {
        return Err(invalid(field, path, "the root itself is chosen with layer and rootfs"));
    }
    if OURS.iter().any(|ours| path == Path::new(ours))
        || path.starts_with("/proc")
        || path.starts_with("/sys")
    {
        return Err(invalid(field, path, "/proc, /sys and /dev are the sandbox's own"));
    }
    Ok(())
}

/// Without `.` and doubled or trailing slashes.
fn normal(path: &Path) -> std::path::PathBuf {
    path.components().filter(|c| *c != Component::CurDir).collect()
}

fn check_extents(field: &'static str, extents: Option<&[IdExtent]>) -> Result<(), SpecError> {
    let Some(extents) = extents else { return Ok(()) };
    if extents.is_empty() {
        return Err(SpecError::Missing { field, reason: "at least one extent" });
    }
    if extents.len() > EXTENTS_MAX {
        return Err(invalid(
            field,
            format!("{} extents", extents.len()),
            format!("there may be at most {EXTENTS_MAX}"),
        ));
    }
    if let Some((extent, reason)) = wrong_extent(extents) {
        let text = format!("{}:{}:{}", extent.inside, extent.outside, extent.count);
        return Err(invalid(field, text, reason));
    }
    Ok(())
}

/// The first extent that maps nothing, ends beyond the ids, or maps what another maps, and which it is.
pub(super) fn wrong_extent(extents: &[IdExtent]) -> Option<(&IdExtent, &'static str)> {
    let overlap = |a: u32, an: u32, b: u32, bn: u32| {
        u64::from(a) < u64::from(b) + u64::from(bn) && u64::from(b) < u64::from(a) + u64::from(an)
    };
    extents.iter().enumerate().find_map(|(at, extent)| {
        let end = |first: u32| first.checked_add(extent.count);
        let overlaps = |other: &IdExtent| {
            overlap(extent.inside, extent.count, other.inside, other.count)
                || overlap(extent.outside, extent.count, other.outside, other.count)
        };
        let reason = if extent.count == 0 {
            "the count is 0"
        } else if end(extent.inside).is_none() || end(extent.outside).is_none() {
            "it goes beyond the largest id, 4294967294"
        } else if extents[..at].iter().any(overlaps) {
            "it overlaps another extent"
        } else {
            return None;
        };
        Some((extent, reason))
    })
}

fn check_time(time: &TimeSpec) -> Result<(), SpecError> {
    // time_namespaces(7): an offset that makes the clock negative or larger than half of
    // KTIME_SEC_MAX is refused with ERANGE; the first needs the clock and is left to the kernel.
    const LIMIT: i64 = (i64::MAX / 1_000_000_000) / 2;
    for (field, value) in [("monotonic", time.monotonic), ("boottime", time.boottime)] {
        if value.abs() >= LIMIT {
            return Err(invalid(field, value.to_string(), "the kernel takes offsets up to 146 years"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{
        AddHostSpec, FsSpec, IdsSpec, NetSpec, ProcessSpec, PublishSpec, TmpfsSpec, UserSpec, VolumeSpec,
    };
    use std::os::unix::ffi::OsStringExt;
    use std::time::Duration;

    fn spec() -> SandboxSpec {
        SandboxSpec::new(vec!["true".into()])
    }

    fn refused(change: impl FnOnce(&mut SandboxSpec)) -> String {
        let mut spec = spec();
        change(&mut spec);
        spec.validate().unwrap_err().to_string()
    }

    #[test]
    fn the_default_spec_is_valid() {
        assert_eq!(*spec().validate().unwrap(), spec());
        let _ = (FsSpec::default(), IdsSpec::default(), NetSpec::default(), ProcessSpec::default());
    }

    #[test]
    fn box_names() {
        for good in ["a", "0", "calm-otter", "a_b.c-d", &"x".repeat(63)] {
            check_box_name(good).unwrap();
        }
        for bad in ["", "-a", ".a", "..", "A", "a/b", "a b", "a\0", "é", "last", &"x".repeat(64)] {
            assert!(check_box_name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn host_names() {
        for good in ["a", "A-b.c9", "1"] {
            check_host_name("hostname", good).unwrap();
        }
        for bad in ["", "a_b", "-a", "a-", "a..b", ".a", "a\u{1b}", &"x".repeat(65)] {
            assert!(check_host_name("hostname", bad).is_err(), "{bad:?}");
        }
        check_domain_name("(none)").unwrap();
        check_domain_name("a_b").unwrap();
        assert!(check_domain_name("a b").is_err());
    }

    #[test]
    fn commands() {
        assert!(refused(|s| s.process.args.clear()).starts_with("command: nothing given"));
        assert!(refused(|s| s.process.args = vec!["".into()]).contains("empty"));
        assert!(refused(|s| s.process.args.push(std::ffi::OsString::from_vec(vec![0]))).contains("NUL"));
    }

    #[test]
    fn environment() {
        assert!(refused(|s| s.process.env.push(("".into(), None))).starts_with("env:"));
        assert!(refused(|s| s.process.env.push(("A=B".into(), None))).starts_with("env:"));
        let secret = refused(|s| s.process.env.push(("A".into(), Some("geheim\0".into()))));
        assert!(secret.contains("NUL") && !secret.contains("geheim"), "{secret}");
    }

    #[test]
    fn paths_inside_are_absolute_and_without_dotdot() {
        assert!(refused(|s| s.process.workdir = Some("x".into())).starts_with("workdir:"));
        assert!(refused(|s| s.process.workdir = Some("/a/../b".into())).contains(".."));
        let volume =
            |target: &str| VolumeSpec { host_path: "/a".into(), root_path: target.into(), read_only: false };
        for bad in ["b", "/", "//", "/.", "/a/../..", "/proc", "/proc/self", "/sys/fs", "/dev", "/dev/"] {
            assert!(refused(|s| s.fs.volumes.push(volume(bad))).starts_with("volume:"), "{bad}");
        }
        let mut good = spec();
        good.fs.volumes.push(volume("/dev/input"));
        good.validate().unwrap();
    }

    #[test]
    fn one_mount_per_place() {
        let text = refused(|s| {
            s.fs.volumes.push(VolumeSpec {
                host_path: "/a".into(),
                root_path: "/d/".into(),
                read_only: false,
            });
            s.fs.tmpfs.push(TmpfsSpec { root_path: "/d".into(), size: None, mode: 0o755 });
        });
        assert!(text.starts_with("tmpfs:"), "{text}");
    }

    #[test]
    fn upper_and_read_only_contradict() {
        let text = refused(|s| {
            s.fs.upper = Some("/u/x".into());
            s.fs.read_only = true;
        });
        assert!(text.starts_with("upper and read-only"), "{text}");
    }

    #[test]
    fn extents() {
        let map = |extents: &[(u32, u32, u32)]| {
            let extents =
                extents.iter().map(|&(inside, outside, count)| IdExtent { inside, outside, count }).collect();
            refused(|s| {
                s.ids = IdsSpec {
                    uid_map: Some(extents),
                    gid_map: Some(vec![IdExtent { inside: 0, outside: 0, count: 1 }]),
                }
            })
        };
        assert!(map(&[]).contains("nothing given"));
        assert!(map(&[(0, 0, 0)]).contains("count"));
        assert!(map(&[(0, u32::MAX, 1)]).contains("largest"));
        assert!(map(&[(0, 10, 5), (4, 20, 1)]).contains("overlaps"));
        assert!(map(&[(0, 10, 5), (9, 14, 1)]).contains("overlaps"));
        let many = |count: u32| (0..count).map(|id| (id, id, 1)).collect::<Vec<_>>();
        let text = map(&many(129));
        assert!(text.contains("\"129 extents\"") && text.contains("at most 128"), "{text}");
        let most: Vec<_> = many(128)
            .into_iter()
            .map(|(inside, outside, count)| IdExtent { inside, outside, count })
            .collect();
        check_extents("uidmap", Some(&most)).unwrap();
        let half = refused(|s| s.ids.uid_map = Some(vec![IdExtent { inside: 0, outside: 0, count: 1 }]));
        assert!(half.starts_with("gidmap:"), "{half}");
    }

    #[test]
    fn ports_need_the_stack() {
        let port = PublishSpec { host_ip: None, host_port: 1, inside_port: 1, udp: false };
        let text = refused(|s| {
            s.net.mode = NetMode::None;
            s.net.publish.push(port.clone());
        });
        assert!(text.starts_with("publish and network none"), "{text}");
        let text = refused(|s| {
            s.net.mode = NetMode::Host;
            s.net.host_loopback = LoopbackSpec::All;
        });
        assert!(text.starts_with("allow-host-loopback and network host"), "{text}");
        for (mode, word) in [(NetMode::Host, "host"), (NetMode::None, "none")] {
            let allow = refused(|s| {
                s.net.mode = mode;
                s.net.allow = vec!["any".parse().unwrap()];
            });
            assert!(allow.starts_with(&format!("allow and network {word}")), "{allow}");
            let deny = refused(|s| {
                s.net.mode = mode;
                s.net.deny = vec!["any".parse().unwrap()];
            });
            assert!(deny.starts_with(&format!("deny and network {word}")), "{deny}");
        }
        assert!(refused(|s| s.net.publish = vec![port.clone(), port.clone()]).contains("twice"));
    }

    #[test]
    fn names_need_somebody_to_ask() {
        for (mode, other) in [(NetMode::None, "network none"), (NetMode::Host, "network host")] {
            let text = refused(|s| {
                s.net.mode = mode;
                s.net.dns = vec!["192.0.2.1:53".parse().unwrap()];
            });
            assert!(text.starts_with(&format!("dns and {other}")), "{text}");
            let text = refused(|s| {
                s.net.mode = mode;
                s.net.dns_search = Some(Vec::new());
            });
            assert!(text.starts_with(&format!("dns-search and {other}")), "{text}");
        }
        for mode in [NetMode::Stack, NetMode::Host] {
            let text = refused(|s| {
                s.net.mode = mode;
                s.net.add_host = vec![AddHostSpec { name: "db".into(), ip: None }];
            });
            assert!(text.contains("db:host-gateway") && text.contains("--allow-host-loopback"), "{text}");
        }
    }

    #[test]
    fn users_and_times() {
        let user = |user: &str| Some(UserSpec { user: user.into(), group: None });
        assert!(refused(|s| s.process.user = user("4294967295")).starts_with("user:"));
        assert!(refused(|s| s.process.user = user("a:b")).starts_with("user:"));
        assert!(refused(|s| s.process.timeout = Some(Duration::ZERO)).starts_with("timeout:"));
        assert!(
            refused(|s| s.time = Some(TimeSpec { monotonic: i64::MIN + 1, boottime: 0 }))
                .starts_with("monotonic:")
        );
    }
}
