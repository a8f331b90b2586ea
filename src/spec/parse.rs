//! The text form of each part of a spec, as flags and files write it.
//!
//! Each function takes the text alone and reads nothing of the machine: relative paths
//! stay relative (the caller knows what they are relative to).

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::time::Duration;

use netstack::{Rule, RuleError};

use super::{
    AddHostSpec, IdExtent, LoopbackSpec, PublishSpec, RateSpec, SpecError, TmpfsSpec, UserSpec, VolumeSpec,
};

fn invalid(field: &'static str, value: impl AsRef<OsStr>, reason: impl Into<String>) -> SpecError {
    SpecError::Invalid { field, value: value.as_ref().to_string_lossy().into_owned(), reason: reason.into() }
}

/// `SRC:DST[:ro|:rw]`. `SRC` may be relative but must look like a path: a bare word is
/// a named volume for docker, and taking it for a directory would surprise.
pub fn volume(text: &OsStr) -> Result<VolumeSpec, SpecError> {
    const FIELD: &str = "volume";
    let parts: Vec<&[u8]> = text.as_bytes().split(|&b| b == b':').collect();
    let (source, target, options) = match parts.as_slice() {
        [source, target] => (source, target, None),
        [source, target, options] => (source, target, Some(options)),
        _ => return Err(invalid(FIELD, text, "write it as SRC:DST or SRC:DST:ro")),
    };
    if source.is_empty() || target.is_empty() {
        return Err(invalid(FIELD, text, "write it as SRC:DST or SRC:DST:ro"));
    }
    if !source.starts_with(b"/") && !source.starts_with(b".") {
        return Err(invalid(
            FIELD,
            text,
            "the source must be a path that starts with / or . (named volumes are not available)",
        ));
    }
    let mut read_only = false;
    for option in options.into_iter().flat_map(|options| options.split(|&b| b == b',')) {
        match option {
            b"ro" => read_only = true,
            b"rw" => read_only = false,
            _ => return Err(invalid(FIELD, text, "the options known are ro and rw")),
        }
    }
    Ok(VolumeSpec { host_path: path_of(source), root_path: path_of(target), read_only })
}

fn path_of(bytes: &[u8]) -> PathBuf {
    OsString::from_vec(bytes.to_vec()).into()
}

/// `[[IP:]HOST:]INSIDE[/tcp|/udp]`, where `HOST` and `INSIDE` may be ranges `A-B` of the
/// same length. No `HOST`: any free port. An IPv6 address stands in brackets.
pub fn publish(text: &str) -> Result<Vec<PublishSpec>, SpecError> {
    const FIELD: &str = "publish";
    let bad = |reason: &str| invalid(FIELD, text, reason);
    let (ports, udp) = match text.rsplit_once('/') {
        None => (text, false),
        Some((ports, "tcp")) => (ports, false),
        Some((ports, "udp")) => (ports, true),
        Some(_) => return Err(bad("the protocols known are tcp and udp")),
    };
    let (rest, inside) = match ports.rsplit_once(':') {
        None => ("", ports),
        Some(split) => split,
    };
    let (ip, host) = if let Some(bracketed) = rest.strip_prefix('[') {
        let (ip, host) = bracketed.split_once(']').ok_or_else(|| bad("the bracket is not closed"))?;
        (Some(ip), host.strip_prefix(':').ok_or_else(|| bad("a port must follow the address"))?)
    } else {
        match rest.rsplit_once(':') {
            Some((ip, _)) if ip.contains(':') => {
                return Err(bad("write an IPv6 address in brackets: [::1]:8080:80"));
            }
            Some((ip, host)) => (Some(ip), host),
            None => (None, rest),
        }
    };
    let host_ip = match ip {
        None => None,
        Some(ip) => Some(ip.parse::<IpAddr>().map_err(|_| bad("this is no IP address"))?),
    };
    let (first, last) = port_range(inside).ok_or_else(|| bad("the port inside must be 1 to 65535"))?;
    if host.is_empty() {
        return Ok((first..=last)
            .map(|inside_port| PublishSpec { host_ip, host_port: 0, inside_port, udp })
            .collect());
    }
    let (host_first, host_last) = if host == "0" {
        (0, 0)
    } else {
        port_range(host).ok_or_else(|| bad("the port on the host must be 0 (any) to 65535"))?
    };
    if host_last - host_first != last - first {
        return Err(bad("both ranges must have the same length"));
    }
    Ok((host_first..=host_last)
        .zip(first..=last)
        .map(|(host_port, inside_port)| PublishSpec { host_ip, host_port, inside_port, udp })
        .collect())
}

/// `[tcp:|udp:|icmp:]TARGET[:PORTS]` of `--allow` (see [`netstack::Rule`]).
pub fn allow(text: &str) -> Result<Rule, SpecError> {
    let rule: Rule = text.parse().map_err(|error: RuleError| invalid("allow", text, error.to_string()))?;
    rule.check_allow().map_err(|error| invalid("allow", text, error.to_string()))?;
    Ok(rule)
}

/// The same of `--deny`.
pub fn deny(text: &str) -> Result<Rule, SpecError> {
    text.parse().map_err(|error: RuleError| invalid("deny", text, error.to_string()))
}

/// `all`, or `PORT[,PORT...]` with ranges `A-B`, of `--allow-host-loopback`.
pub fn host_loopback(text: &str) -> Result<LoopbackSpec, SpecError> {
    const FIELD: &str = "allow-host-loopback";
    if text == "all" {
        return Ok(LoopbackSpec::All);
    }
    let mut ports = BTreeSet::new();
    for range in text.split(',') {
        let (first, last) = port_range(range)
            .ok_or_else(|| invalid(FIELD, text, "write ports, 1 to 65535: 5432,8000-8009"))?;
        ports.extend(first..=last);
    }
    Ok(LoopbackSpec::Ports(ports))
}

/// `IP[:PORT]`, the port of a resolver being 53. An IPv6 address with a port stands in brackets.
pub fn dns(text: &str) -> Result<SocketAddr, SpecError> {
    const FIELD: &str = "dns";
    let server = match text.parse::<IpAddr>() {
        Ok(ip) => SocketAddr::new(ip, 53),
        Err(_) => text.parse().map_err(|_| {
            invalid(FIELD, text, "write the address of a resolver: IP, IP:PORT or [IPV6]:PORT")
        })?,
    };
    let nobody = match server.ip() {
        IpAddr::V4(ip) => ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast(),
        IpAddr::V6(ip) => ip.is_unspecified() || ip.is_multicast(),
    };
    if nobody || server.port() == 0 {
        return Err(invalid(FIELD, text, "no resolver can be there"));
    }
    if let SocketAddr::V6(server) = server
        && server.ip().is_unicast_link_local()
        && server.scope_id() == 0
    {
        let reason = "a link-local address needs the number of its interface (see `ip link`): [fe80::1%2]:53";
        return Err(invalid(FIELD, text, reason));
    }
    Ok(server)
}

/// A domain, or `.` for none at all.
pub fn dns_search(text: &str) -> Result<Option<String>, SpecError> {
    match text {
        "." => Ok(None),
        _ if is_name(text) => Ok(Some(text.to_owned())),
        _ => Err(invalid("dns-search", text, "write a domain, as example.com, or . for none at all")),
    }
}

/// `NAME:IP` or `NAME=IP`; an IPv6 address may stand in brackets; `host-gateway` is the address that
/// stands for the host's loopback.
pub fn add_host(text: &str) -> Result<AddHostSpec, SpecError> {
    let bad = |reason: &str| invalid("add-host", text, reason);
    let (name, address) =
        text.split_once(['=', ':']).ok_or_else(|| bad("write it as NAME:IP, or NAME:host-gateway"))?;
    if !is_name(name) || name.ends_with('.') {
        return Err(bad("a name has letters, digits, hyphens and underscores, with dots between them"));
    }
    if address == "host-gateway" {
        return Ok(AddHostSpec { name: name.to_owned(), ip: None });
    }
    let plain = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
    let ip = plain.parse().map_err(|_| bad("what follows the name is no IP address, nor host-gateway"))?;
    Ok(AddHostSpec { name: name.to_owned(), ip: Some(ip) })
}

/// Whether DNS can have this name, in the characters that names are written in (underscores included). A dot
/// may stand at the end.
pub(crate) fn is_name(name: &str) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name);
    let good = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    name.len() <= 253
        && name.split('.').all(|label| (1..=63).contains(&label.len()) && label.bytes().all(good))
}

fn port_range(text: &str) -> Option<(u16, u16)> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (decimal::<u16>(first)?, decimal::<u16>(last)?);
    (first != 0 && first <= last).then_some((first, last))
}

/// Ports as `port_range` reads them, neighbours as one range.
pub fn port_ranges(ports: &BTreeSet<u16>) -> Vec<String> {
    let mut ranges: Vec<(u16, u16)> = Vec::new();
    for &port in ports {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == port => *last = port,
            _ => ranges.push((port, port)),
        }
    }
    let text = |(first, last)| if first == last { format!("{first}") } else { format!("{first}-{last}") };
    ranges.into_iter().map(text).collect()
}

/// A number of digits alone: `str::parse` would take a sign too.
fn decimal<T: std::str::FromStr>(text: &str) -> Option<T> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// `DST[:size=N[kmg],mode=OCTAL]`; `nosuid`, `nodev` and `rw` are always so.
pub fn tmpfs(text: &OsStr) -> Result<TmpfsSpec, SpecError> {
    const FIELD: &str = "tmpfs";
    let bytes = text.as_bytes();
    let split = bytes.iter().position(|&b| b == b':');
    let (target, options) = match split {
        None => (bytes, &b""[..]),
        Some(at) => (&bytes[..at], &bytes[at + 1..]),
    };
    let mut spec = TmpfsSpec { root_path: path_of(target), size: None, mode: 0o1777 };
    let options = std::str::from_utf8(options).map_err(|_| invalid(FIELD, text, "unknown option"))?;
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option.split_once('=') {
            Some(("size", value)) => {
                spec.size = Some(size(value).ok_or_else(|| {
                    invalid(FIELD, text, "size is a number of bytes, with k, m or g after it, and not 0")
                })?);
            }
            Some(("mode", value)) => {
                spec.mode = u32::from_str_radix(value, 8)
                    .ok()
                    .filter(|mode| *mode <= 0o7777)
                    .ok_or_else(|| invalid(FIELD, text, "mode is an octal number up to 7777"))?;
            }
            None if matches!(option, "rw" | "nosuid" | "nodev") => {}
            _ => {
                return Err(invalid(
                    FIELD,
                    text,
                    format!("unknown option {option:?}; known are size= and mode="),
                ));
            }
        }
    }
    Ok(spec)
}

/// `N`, `Nk`, `Nm`, `Ng` (also `NkB`, `NKiB`) in bytes, not 0.
fn size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        _ => return None,
    };
    decimal::<u64>(digits)?.checked_mul(1 << shift).filter(|size| *size > 0)
}

/// Several of [`network_rate`] together.
pub fn network_rates(texts: &[String]) -> Result<[Option<RateSpec>; 2], SpecError> {
    let mut rates = [None, None];
    for text in texts {
        for (place, rate) in rates.iter_mut().zip(network_rate(text)?) {
            if rate.is_some() && std::mem::replace(place, rate).is_some() {
                return Err(SpecError::Conflict {
                    field: "network-rate",
                    other: "network-rate",
                    reason: "each way has one rate".into(),
                });
            }
        }
    }
    Ok(rates)
}

/// `[in:|out:]RATE[,burst=SIZE]`: the rates that it sets, that of what comes in first
pub fn network_rate(text: &str) -> Result<[Option<RateSpec>; 2], SpecError> {
    let bad = |reason: &str| invalid("network-rate", text, reason);
    let (ways, rest) = match text.split_once(':') {
        Some(("in", rest)) => ([true, false], rest),
        Some(("out", rest)) => ([false, true], rest),
        Some(_) => return Err(bad("before the colon stands in or out")),
        None => ([true; 2], text),
    };
    let (rate, burst) = match rest.split_once(",burst=") {
        Some((rate, burst)) => (rate, Some(burst)),
        None => (rest, None),
    };
    let digits = rate.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let bits = match rate[digits.len()..].to_ascii_lowercase().as_str() {
        "kbit" => Some(1_000),
        "mbit" => Some(1_000_000),
        "gbit" => Some(1_000_000_000),
        _ => None,
    };
    let bytes_per_second = match bits {
        Some(unit) => decimal::<u64>(digits).and_then(|n| n.checked_mul(unit)).map(|bits| bits / 8),
        None => size(rate),
    };
    let bytes_per_second = bytes_per_second.ok_or_else(|| {
        bad("write the rate as 10mbit (also kbit, gbit), or in bytes per second as 500k, 2m or 1g")
    })?;
    if bytes_per_second < LEAST_RATE {
        return Err(bad("less than 8kbit is not a network"));
    }
    let burst = burst
        .map(|burst| {
            size(burst).filter(|burst| *burst >= LEAST_BURST).ok_or_else(|| {
                bad("write the burst in bytes as 64k, 2m or 1g; no less than 64k, which is one frame")
            })
        })
        .transpose()?;
    Ok(ways.map(|way| way.then_some(RateSpec { bytes_per_second, burst })))
}

/// Bytes per second; the stack takes no less.
const LEAST_RATE: u64 = 1_000;
const LEAST_BURST: u64 = 64 << 10;

/// `USER[:GROUP]`
pub fn user(text: &str) -> Result<UserSpec, SpecError> {
    let (user, group) = match text.split_once(':') {
        None => (text, None),
        Some((user, group)) => (user, Some(group)),
    };
    if user.is_empty() || group == Some("") {
        return Err(invalid("user", text, "write it as USER or USER:GROUP, each a name or a number"));
    }
    Ok(UserSpec { user: user.to_owned(), group: group.map(str::to_owned) })
}

/// `30` (seconds), `500ms`, `5s`, `2m`, `1h30m`, `1d`
pub fn duration(text: &str) -> Result<Duration, SpecError> {
    let bad = || invalid("timeout", text, "write it as 30 (seconds), 500ms, 5s, 2m, 1h30m or 1d");
    if let Some(seconds) = decimal::<u64>(text) {
        return nonzero(Duration::from_secs(seconds)).ok_or_else(bad);
    }
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let number = decimal::<u64>(&rest[..digits]).filter(|_| digits > 0).ok_or_else(bad)?;
        rest = &rest[digits..];
        let letters = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_alphabetic()).len();
        let seconds = |unit: u64| number.checked_mul(unit).map(Duration::from_secs);
        let part = match &rest[..letters] {
            "ms" => Some(Duration::from_millis(number)),
            "s" => seconds(1),
            "m" => seconds(60),
            "h" => seconds(3600),
            "d" => seconds(86_400),
            _ => None,
        };
        total = part.and_then(|part| total.checked_add(part)).ok_or_else(bad)?;
        rest = &rest[letters..];
    }
    nonzero(total).ok_or_else(bad)
}

fn nonzero(duration: Duration) -> Option<Duration> {
    (!duration.is_zero()).then_some(duration)
}

/// `INSIDE:OUTSIDE:COUNT`
pub fn id_extent(field: &'static str, text: &str) -> Result<IdExtent, SpecError> {
    let numbers: Option<Vec<u32>> =
        text.split(':').map(|part| decimal(part).filter(|_| !part.is_empty())).collect();
    match numbers.as_deref() {
        Some(&[inside, outside, count]) => Ok(IdExtent { inside, outside, count }),
        _ => Err(invalid(field, text, "write it as INSIDE:OUTSIDE:COUNT, three numbers")),
    }
}

/// `NAME=VALUE` sets, `NAME` alone takes the value that `lookup` finds (or takes the
/// variable away when there is none).
pub fn env(text: &OsStr, lookup: &dyn Fn(&OsStr) -> Option<OsString>) -> (OsString, Option<OsString>) {
    let bytes = text.as_bytes();
    match bytes.iter().position(|&b| b == b'=') {
        Some(at) => {
            (OsStr::from_bytes(&bytes[..at]).to_owned(), Some(OsStr::from_bytes(&bytes[at + 1..]).to_owned()))
        }
        None => (text.to_owned(), lookup(text)),
    }
}

/// The lines of a file for `--env-file`, in docker's format: `NAME=VALUE` or `NAME` each,
/// nothing is quoted or expanded; empty lines and those that start with `#` do not count.
pub fn env_file(
    content: &[u8],
    lookup: &dyn Fn(&OsStr) -> Option<OsString>,
) -> Vec<(OsString, Option<OsString>)> {
    content
        .split(|&b| b == b'\n')
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line).trim_ascii_start())
        .filter(|line| !line.is_empty() && !line.starts_with(b"#"))
        .map(|line| env(OsStr::from_bytes(line), lookup))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume_of(text: &str) -> Result<(String, String, bool), String> {
        volume(OsStr::new(text))
            .map(|v| (v.host_path.display().to_string(), v.root_path.display().to_string(), v.read_only))
            .map_err(|e| e.to_string())
    }

    #[test]
    fn volume_forms() {
        assert_eq!(volume_of("/a:/b").unwrap(), ("/a".into(), "/b".into(), false));
        assert_eq!(volume_of("./a:/b:ro").unwrap(), ("./a".into(), "/b".into(), true));
        assert_eq!(volume_of("/a:/b:rw").unwrap(), ("/a".into(), "/b".into(), false));
        for bad in ["/a", "", ":", "/a:", ":/b", "/a:/b:zz", "/a:/b:ro:x", "data:/b"] {
            assert!(volume_of(bad).is_err(), "{bad}");
        }
        assert!(volume_of("data:/b").unwrap_err().contains("named volumes"));
    }

    #[test]
    fn resolvers_and_domains() {
        for (text, addr) in [
            ("192.0.2.1", "192.0.2.1:53"),
            ("192.0.2.1:5353", "192.0.2.1:5353"),
            ("2001:db8::1", "[2001:db8::1]:53"),
            ("[2001:db8::1]:5353", "[2001:db8::1]:5353"),
            ("127.0.0.53", "127.0.0.53:53"),
            ("[fe80::1%2]:53", "[fe80::1%2]:53"),
        ] {
            assert_eq!(dns(text).unwrap().to_string(), addr);
        }
        for bad in ["", "dns.example", "192.0.2.1:", "192.0.2.1:0", "0.0.0.0", "::", "224.0.0.251", "1.2.3"] {
            assert!(dns(bad).is_err(), "{bad}");
        }
        for bad in ["255.255.255.255", "ff02::fb", "fe80::1", "[fe80::1]:53"] {
            assert!(dns(bad).is_err(), "{bad}");
        }
        assert!(dns("fe80::1").unwrap_err().to_string().contains("%2"));
        assert_eq!(dns_search("."), Ok(None));
        assert_eq!(dns_search("corp.example"), Ok(Some("corp.example".into())));
        for bad in ["", "a b", "..", "a..b", "a\nb", &"a".repeat(64)] {
            assert!(dns_search(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn added_hosts() {
        for (text, name, ip) in [
            ("db:192.0.2.1", "db", Some("192.0.2.1")),
            ("db.lan=192.0.2.1", "db.lan", Some("192.0.2.1")),
            ("my_db:2001:db8::1", "my_db", Some("2001:db8::1")),
            ("db:[2001:db8::1]", "db", Some("2001:db8::1")),
            ("host.docker.internal:host-gateway", "host.docker.internal", None),
        ] {
            let host = add_host(text).unwrap();
            assert_eq!((&*host.name, host.ip.map(|ip| ip.to_string()).as_deref()), (name, ip));
        }
        for bad in [
            "",
            "db",
            "db:",
            ":192.0.2.1",
            "a b:192.0.2.1",
            "db:192.0.2",
            "db.:192.0.2.1",
            "db:[192.0.2.1",
            "a\n:::1",
        ] {
            assert!(add_host(bad).is_err(), "{bad}");
        }
    }

    fn publish_one(text: &str) -> (Option<String>, u16, u16, bool) {
        let specs = publish(text).unwrap();
        assert_eq!(specs.len(), 1, "{text}");
        (specs[0].host_ip.map(|ip| ip.to_string()), specs[0].host_port, specs[0].inside_port, specs[0].udp)
    }

    #[test]
    fn publish_forms() {
        assert_eq!(publish_one("8080:80"), (None, 8080, 80, false));
        assert_eq!(publish_one("8080:80/tcp"), (None, 8080, 80, false));
        assert_eq!(publish_one("53:53/udp"), (None, 53, 53, true));
        assert_eq!(publish_one("127.0.0.1:8080:80"), (Some("127.0.0.1".into()), 8080, 80, false));
        assert_eq!(publish_one("[::1]:8080:80/udp"), (Some("::1".into()), 8080, 80, true));
        assert_eq!(publish_one("80"), (None, 0, 80, false));
        assert_eq!(publish_one(":80"), (None, 0, 80, false));
        assert_eq!(publish_one("0:80"), (None, 0, 80, false));
        assert_eq!(publish_one("127.0.0.1::80"), (Some("127.0.0.1".into()), 0, 80, false));
    }

    #[test]
    fn publish_ranges_pair_up() {
        let specs = publish("8000-8002:80-82").unwrap();
        let pairs: Vec<_> = specs.iter().map(|s| (s.host_port, s.inside_port)).collect();
        assert_eq!(pairs, [(8000, 80), (8001, 81), (8002, 82)]);
        assert!(publish("8000-8002:80").is_err());
    }

    #[test]
    fn publish_refuses_nonsense() {
        for bad in [
            "",
            ":",
            "x:80",
            "80:x",
            "80:0",
            "8080:80/sctp",
            "::1:80:80",
            "[::1:80:80",
            "[::1]80:80",
            "1.2.3:80:80",
            "70000:80",
            "80:70000",
            "+80:80",
            "82-80:82-80",
            "1.2.3.4:5:6:7",
        ] {
            assert!(publish(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rules_and_ports_of_the_loopback() {
        assert_eq!(allow("tcp:[2001:db8::/32]:443").unwrap().to_string(), "tcp:[2001:db8::/32]:443");
        assert!(allow("127.0.0.1").unwrap_err().to_string().contains("allow-host-loopback"));
        assert!(allow("example.com").unwrap_err().to_string().starts_with("allow: "));
        assert!(deny("10.0.0.1/8").unwrap_err().to_string().starts_with("deny: "));
        assert!(deny("127.0.0.1").is_ok());
        assert_eq!(host_loopback("all").unwrap(), LoopbackSpec::All);
        let ports = LoopbackSpec::Ports([80, 8000, 8001].into());
        assert_eq!(host_loopback("8000-8001,80").unwrap(), ports);
        for bad in ["", "0", "80,", "http", "9-8", "65536", "all,80"] {
            assert!(host_loopback(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn tmpfs_forms() {
        let parse = |text: &str| tmpfs(OsStr::new(text));
        assert_eq!(parse("/t").unwrap(), TmpfsSpec { root_path: "/t".into(), size: None, mode: 0o1777 });
        assert_eq!(
            parse("/t:size=64m,mode=700,rw").unwrap(),
            TmpfsSpec { root_path: "/t".into(), size: Some(64 << 20), mode: 0o700 }
        );
        for bad in ["/t:size=x", "/t:size=", "/t:size=0", "/t:mode=8", "/t:mode=17777", "/t:noexec", "/t:ro"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(size("1"), Some(1));
        assert_eq!(size("2k"), Some(2048));
        assert_eq!(size("3MiB"), Some(3 << 20));
        assert_eq!(size("1G"), Some(1 << 30));
        assert_eq!(size("99999999999999999999"), None);
        assert_eq!(size("18446744073709551615g"), None);
        assert_eq!(size("k"), None);
    }

    #[test]
    fn network_rates() {
        let rate = |bytes_per_second, burst| Some(RateSpec { bytes_per_second, burst });
        let ten = rate(1_250_000, None);
        assert_eq!(network_rate("10mbit").unwrap(), [ten, ten]);
        assert_eq!(network_rate("in:10Mbit").unwrap(), [ten, None]);
        assert_eq!(network_rate("out:500k,burst=1m").unwrap(), [None, rate(512_000, Some(1 << 20))]);
        assert_eq!(network_rate("8kbit").unwrap(), [rate(1_000, None); 2]);
        for bad in [
            "",
            "10",
            "mbit",
            "up:1m",
            "1m,burst",
            "1m,burst=",
            "1m,burst=1k",
            "7kbit",
            "1tbit",
            "in:",
            "99999999999g",
            "in:out:1m",
        ] {
            assert!(network_rate(bad).unwrap_err().to_string().starts_with("network-rate: "), "{bad}");
        }
    }

    #[test]
    fn users() {
        assert_eq!(user("www").unwrap(), UserSpec { user: "www".into(), group: None });
        assert_eq!(user("1:2").unwrap(), UserSpec { user: "1".into(), group: Some("2".into()) });
        for bad in ["", ":", "a:", ":b"] {
            assert!(user(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations() {
        assert_eq!(duration("30").unwrap(), Duration::from_secs(30));
        assert_eq!(duration("500ms").unwrap(), Duration::from_millis(500));
        assert_eq!(duration("1h30m").unwrap(), Duration::from_secs(5400));
        assert_eq!(duration("1d").unwrap(), Duration::from_secs(86_400));
        for bad in
            ["", "0", "0s", "s", "5x", "-5", "1.5s", "1h30", "99999999999999999999", "999999999999999999d"]
        {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn id_extents() {
        assert_eq!(id_extent("uidmap", "0:1000:1").unwrap(), IdExtent { inside: 0, outside: 1000, count: 1 });
        for bad in ["", "0:1", "0:1:2:3", "a:1:1", "0::1", "-1:0:1", "0:4294967296:1"] {
            assert!(id_extent("uidmap", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn env_words_and_files() {
        let lookup = |name: &OsStr| (name == "HAVE").then(|| OsString::from("it"));
        let got = env_file(b"# c\n\nA=1\nB=x=y \n  HAVE\r\nHAVENOT\n#D=1\n", &lookup);
        let want: Vec<(OsString, Option<OsString>)> = vec![
            ("A".into(), Some("1".into())),
            ("B".into(), Some("x=y ".into())),
            ("HAVE".into(), Some("it".into())),
            ("HAVENOT".into(), None),
        ];
        assert_eq!(got, want);
    }
}
