//! Reading the facts: a few small files, no process, no thread, no name service.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read as _;
use std::net::Ipv4Addr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::thread::CapabilitySet;

use super::HostFacts;
use crate::spec::IdExtent;

impl HostFacts {
    /// Reads the facts. What cannot be read counts as absent: the launch tries and says
    /// what fails.
    #[must_use]
    pub fn gather() -> Self {
        let uid = rustix::process::geteuid().as_raw();
        let gid = rustix::process::getegid().as_raw();
        let needed = CapabilitySet::SETUID | CapabilitySet::SETGID | CapabilitySet::SETFCAP;
        let may_set_ids =
            rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(needed));
        let own_uid_map = parse_id_map(&read("/proc/self/uid_map"));
        let own_gid_map = parse_id_map(&read("/proc/self/gid_map"));
        let user_name = passwd_name(&read("/etc/passwd"), uid);
        // Who may write any map needs neither ranges nor helpers.
        let (subuid, subgid) = if may_set_ids {
            (String::new(), String::new())
        } else {
            (read("/etc/subuid"), read("/etc/subgid"))
        };
        let subuids = subordinate_range(&subuid, user_name.as_deref(), uid);
        let subgids = subordinate_range(&subgid, user_name.as_deref(), uid);
        let (newuidmap, newgidmap) = if subuids.is_some() && subgids.is_some() {
            (find_helper("newuidmap"), find_helper("newgidmap"))
        } else {
            (None, None)
        };
        let initial_userns = is_whole(&own_uid_map) && is_whole(&own_gid_map);
        Self {
            uid,
            gid,
            initial_userns,
            may_set_ids,
            // The initial namespace never denies.
            setgroups_denied: !initial_userns && read("/proc/self/setgroups").trim() == "deny",
            landlock_scopes: crate::sys::landlock::has_scopes(),
            no_new_privs: rustix::thread::no_new_privs().unwrap_or(false),
            user_name,
            subuids,
            subgids,
            free_subids: free_range(&subuid).max(free_range(&subgid)),
            newuidmap,
            newgidmap,
            own_uid_map,
            own_gid_map,
            networks_v4: parse_routes(&read("/proc/self/net/route")),
            resolv: super::resolv::parse(&read("/etc/resolv.conf")),
            current_dir: std::env::current_dir().ok(),
            environ: std::env::vars_os().collect(),
        }
    }
}

/// A whole small file; what cannot be read is empty. Not `std::fs::read`, which asks for the
/// size first and reads files of /proc, which have none, in small bites.
fn read(path: &str) -> String {
    let mut bytes = Vec::new();
    let mut buffer = [0; 8192];
    if let Ok(mut file) = File::open(path) {
        while let Ok(length @ 1..) = file.read(&mut buffer) {
            bytes.extend_from_slice(buffer.get(..length).unwrap_or_default());
        }
    }
    // Account files may hold anything; what is not UTF-8 in them is no name we look for.
    String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

fn parse_id_map(text: &str) -> Vec<IdExtent> {
    text.lines()
        .filter_map(|line| {
            let mut numbers = line.split_ascii_whitespace().map(str::parse);
            Some(IdExtent {
                inside: numbers.next()?.ok()?,
                outside: numbers.next()?.ok()?,
                count: numbers.next()?.ok()?,
            })
        })
        .collect()
}

fn is_whole(map: &[IdExtent]) -> bool {
    matches!(map, [IdExtent { inside: 0, outside: 0, count: u32::MAX }])
}

fn passwd_name(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, _, id) = (fields.next()?, fields.next()?, fields.next()?);
        (id.parse() == Ok(uid)).then(|| name.to_owned())
    })
}

/// subuid(5): `USER:FIRST:COUNT`, USER by name or number; the longest range serves best.
fn subordinate_range(text: &str, name: Option<&str>, uid: u32) -> Option<(u32, u32)> {
    subordinate_ranges(text)
        .filter(|(owner, ..)| Some(*owner) == name || owner.parse() == Ok(uid))
        .map(|(_, first, count)| (first, count))
        .max_by_key(|(_, count)| *count)
}

fn subordinate_ranges(text: &str) -> impl Iterator<Item = (&str, u32, u32)> {
    text.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let owner = fields.next()?;
        let first: u32 = fields.next()?.parse().ok()?;
        let count: u32 = fields.next()?.parse().ok()?;
        (count > 0 && first.checked_add(count).is_some()).then_some((owner, first, count))
    })
}

/// The first id from which on nobody has a range; useradd(8) begins at 100000.
fn free_range(text: &str) -> u32 {
    subordinate_ranges(text).map(|(_, first, count)| first.saturating_add(count)).fold(100_000, u32::max)
}

/// Finds a helper that can do its work: executable, and set-user-ID root or with file
/// capabilities (Fedora).
fn find_helper(name: &str) -> Option<PathBuf> {
    let usable = |path: &Path| {
        std::fs::metadata(path).is_ok_and(|meta| {
            let mode = meta.permissions().mode();
            let setuid = mode & 0o4000 != 0 && meta.uid() == 0;
            let mut none: [u8; 0] = [];
            meta.is_file()
                && mode & 0o111 != 0
                && (setuid
                    || rustix::fs::getxattr(path, "security.capability", &mut none).is_ok_and(|n| n > 0))
        })
    };
    let first = Path::new("/usr/bin").join(name);
    if usable(&first) {
        return Some(first);
    }
    let path = std::env::var_os("PATH")?;
    path.as_bytes()
        .split(|b| *b == b':')
        .map(|dir| Path::new(OsStr::from_bytes(dir)).join(name))
        .find(|path| path.is_absolute() && usable(path))
}

/// /proc/net/route: addresses are hexadecimal numbers as a load of the bytes in network
/// order makes them on this machine.
fn parse_routes(text: &str) -> Vec<(Ipv4Addr, u8)> {
    let mut networks: Vec<(Ipv4Addr, u8)> = text
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            let hex = |at: usize| u32::from_str_radix(fields.get(at)?, 16).ok();
            let (destination, mask) = (hex(1)?, hex(7)?);
            let prefix = u8::try_from(mask.count_ones()).ok()?;
            (prefix > 0).then(|| (Ipv4Addr::from(destination.to_ne_bytes()), prefix))
        })
        .collect();
    networks.sort_unstable();
    networks.dedup();
    networks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_maps() {
        let whole = parse_id_map("         0          0 4294967295\n");
        assert!(is_whole(&whole));
        let nested = parse_id_map("0 1000 1\n1 100000 65535\n");
        assert_eq!(nested.len(), 2);
        assert!(!is_whole(&nested));
        assert_eq!(parse_id_map("x y z\n0 1\n"), []);
    }

    #[test]
    fn names_and_ranges() {
        let passwd = "root:x:0:0::/root:/bin/sh\nbroken\nada:x:1000:1000::/home/ada:/bin/sh\n";
        assert_eq!(passwd_name(passwd, 1000).as_deref(), Some("ada"));
        assert_eq!(passwd_name(passwd, 7), None);
        let subuid = "ada:100000:10\nbob:1:65536\n1000:200000:65536\nada:4294967295:9\nada:x\n";
        assert_eq!(subordinate_range(subuid, Some("ada"), 1000), Some((200_000, 65_536)));
        assert_eq!(subordinate_range(subuid, None, 7), None);
        assert_eq!(free_range(subuid), 265_536);
        assert_eq!(free_range(""), 100_000);
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn routes_without_the_default() {
        let text = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n\
            eth0\t00000000\t0102A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
            eth0\t0002A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
            tun0\t0000000A\t00000000\t0001\t0\t0\t0\t000000FF\t0\t0\t0\n";
        assert_eq!(
            parse_routes(text),
            [(Ipv4Addr::new(10, 0, 0, 0), 8), (Ipv4Addr::new(192, 168, 2, 0), 24)]
        );
    }

    #[test]
    fn gathering_says_who_we_are() {
        let facts = HostFacts::gather();
        assert_eq!(facts.uid, rustix::process::geteuid().as_raw());
        assert!(!facts.own_uid_map.is_empty());
        assert!(!serde_json::to_string(&facts).unwrap().contains("PATH"), "the environment is not shown");
    }
}
