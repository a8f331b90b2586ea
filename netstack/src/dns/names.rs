//! Names that are answered here and never asked for outside: those of the spec, with the way back from their addresses;
//! `localhost` (RFC 6761 section 6.3); and every other address of the guest's own network, which nobody outside knows.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::message::wire;
use crate::config::{Link, StackSpec};

/// What is known of a name.
#[derive(Debug, Default)]
pub(crate) struct Own {
    pub(crate) ips: Vec<IpAddr>,
    /// In wire form.
    pub(crate) names: Vec<Box<[u8]>>,
}

/// The names.
#[derive(Debug)]
pub(crate) struct Names {
    by_name: HashMap<Box<[u8]>, Own>,
    localhost: Own,
    guest: Link,
}

/// What these names know about a name.
#[derive(Debug)]
pub(crate) enum Known<'a> {
    Own(&'a Own),
    /// There is no such name.
    Nobody,
}

const LOCALHOST: &[u8] = b"\x09localhost\0";
const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

impl Names {
    pub(crate) fn new(spec: &StackSpec) -> Self {
        let mut by_name: HashMap<Box<[u8]>, Own> = HashMap::new();
        for (text, ip) in &spec.dns.hosts {
            let Some(name) = wire(text) else {
                tracing::warn!(name = %text.escape_default(), "not a name that DNS can have");
                continue;
            };
            let back = &mut by_name.entry(reverse(*ip)).or_default().names;
            if !back.contains(&name) {
                back.push(name.clone());
            }
            let ips = &mut by_name.entry(name).or_default().ips;
            if !ips.contains(ip) {
                ips.push(*ip);
            }
        }
        for ip in LOOPBACK {
            by_name.entry(reverse(ip)).or_default().names.push(LOCALHOST.into());
        }
        Self { by_name, localhost: Own { ips: LOOPBACK.into(), names: Vec::new() }, guest: spec.guest }
    }

    /// Looks up a name in wire form and lower case.
    pub(crate) fn get(&self, name: &[u8]) -> Option<Known<'_>> {
        if let Some(own) = self.by_name.get(name) {
            return Some(Known::Own(own));
        }
        if name.ends_with(LOCALHOST) {
            return Some(Known::Own(&self.localhost));
        }
        address(name).filter(|ip| self.guest.contains(*ip)).map(|_| Known::Nobody)
    }
}

const V4_ZONE: &[u8] = b"\x07in-addr\x04arpa\0";
const V6_ZONE: &[u8] = b"\x03ip6\x04arpa\0";

/// The name under which an address's name is asked for (RFC 1035 section 3.5, RFC 3596 section 2.5), in wire form.
fn reverse(ip: IpAddr) -> Box<[u8]> {
    let mut name = Vec::with_capacity(80);
    match ip {
        IpAddr::V4(ip) => {
            for octet in ip.octets().iter().rev() {
                let digits = octet.to_string();
                name.push(u8::try_from(digits.len()).unwrap_or_default());
                name.extend(digits.bytes());
            }
            name.extend(V4_ZONE);
        }
        IpAddr::V6(ip) => {
            for octet in ip.octets().iter().rev() {
                for digit in [octet & 15, octet >> 4] {
                    name.extend([1, if digit < 10 { b'0' + digit } else { b'a' + digit - 10 }]);
                }
            }
            name.extend(V6_ZONE);
        }
    }
    name.into()
}

/// The address that a name of that kind, in lower case, stands for.
fn address(name: &[u8]) -> Option<IpAddr> {
    if let Some(mut labels) = name.strip_suffix(V4_ZONE) {
        let mut octets = [0; 4];
        for octet in octets.iter_mut().rev() {
            let (&len, rest) = labels.split_first()?;
            let (digits, rest) = rest.split_at_checked(len.into())?;
            *octet = std::str::from_utf8(digits).ok()?.parse().ok()?;
            labels = rest;
        }
        return labels.is_empty().then_some(octets.into());
    }
    let labels = name.strip_suffix(V6_ZONE)?;
    let mut octets = [0u8; 16];
    if labels.len() != 64 {
        return None;
    }
    for (octet, pair) in octets.iter_mut().rev().zip(labels.chunks_exact(4)) {
        let &[1, low, 1, high] = pair else { return None };
        let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        *octet = digit(high)? << 4 | digit(low)?;
    }
    Some(octets.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect(text)
    }

    #[test]
    fn addresses_survive_being_names() {
        for text in ["192.0.2.1", "10.0.255.9", "2001:db8::ab:1", "::1"] {
            assert_eq!(address(&reverse(ip(text))), Some(ip(text)));
        }
        assert_eq!(reverse(ip("192.0.2.1"))[..], *b"\x011\x012\x010\x03192\x07in-addr\x04arpa\0");
        let most = [&b"\x012\x010\x03192"[..], V4_ZONE].concat();
        let more = [&b"\x01x\x011\x012\x010\x03192"[..], V4_ZONE].concat();
        let big = [&b"\x03256\x012\x010\x03192"[..], V4_ZONE].concat();
        for name in [&most[..], &more, &big, V4_ZONE, V6_ZONE, b"\0", b""] {
            assert_eq!(address(name), None);
        }
        let mut letter = reverse(ip("2001:db8::1"));
        letter[1] = b'g';
        assert_eq!(address(&letter), None);
    }

    #[test]
    fn own_names_are_known_both_ways_and_neighbours_are_nobody() {
        let mut spec = crate::config::tests::spec();
        spec.dns.hosts = vec![
            ("Box".into(), ip("10.0.2.100")),
            ("box.".into(), ip("fd00::100")),
            ("other".into(), ip("10.0.2.100")),
            ("".into(), ip("192.0.2.1")),
        ];
        let names = Names::new(&spec);
        let own = |name: &[u8]| match names.get(name) {
            Some(Known::Own(own)) => (own.ips.len(), own.names.len()),
            Some(Known::Nobody) => (0, 0),
            None => (9, 9),
        };
        assert_eq!(own(b"\x03box\0"), (2, 0));
        assert_eq!(own(&reverse(ip("10.0.2.100"))), (0, 2));
        assert_eq!(own(&reverse(ip("fd00::100"))), (0, 1));
        assert_eq!(own(&reverse(ip("10.0.2.77"))), (0, 0));
        assert_eq!(own(&reverse(ip("fd00::77"))), (0, 0));
        assert_eq!(own(&reverse(ip("192.0.2.1"))), (9, 9));
        assert_eq!(own(b"\x09localhost\0"), (2, 0));
        assert_eq!(own(b"\x01a\x09localhost\0"), (2, 0));
        assert_eq!(own(b"\x0amylocalhost\0"), (9, 9));
        assert_eq!(own(&reverse(ip("127.0.0.1"))), (0, 1));
        assert_eq!(own(b"\x07example\0"), (9, 9));
    }
}
