//! Rules by address, port and protocol: their text form, and tables that find the rule for a flow.
//!
//! ```text
//!  RULE    = [PROTOCOL ":"] TARGET [":" PORTS]
//!  PROTOCOL= tcp | udp | icmp                 none: all three; with ports: tcp and udp
//!  TARGET  = any                              every address of both families
//!          | IPV4 ["/" PREFIX]
//!          | "[" IPV6 ["/" PREFIX] "]"
//!  PORTS   = PORT ["-" PORT] {"," PORT ["-" PORT]}      1 to 65535; none: all
//! ```
//!
//! A table answers whether a rule matches at all, and which: that of the longest prefix, and of several with the same
//! network and port the first. It costs one look-up of a hash table for each length of prefix that occurs in the rules,
//! and one in a sorted map of ports, whatever the number of rules; and it is asked for a flow's first packet only.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use super::Transport;

/// A rule of `--allow` or `--deny`; `FromStr` and `Display` have the text form.
///
/// ```no_run
/// use netstack::Rule;
/// let rule: Rule = "tcp:192.0.2.0/24:80,8000-8999".parse()?;
/// assert_eq!(rule.to_string(), "tcp:192.0.2.0/24:80,8000-8999");
/// assert!("192.0.2.1/24".parse::<Rule>().is_err());
/// # Ok::<(), netstack::RuleError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Rule {
    /// `None`: all.
    transport: Option<Transport>,
    /// `None`: every address.
    network: Option<Network>,
    /// First and last of each range; none: all.
    ports: Vec<(u16, u16)>,
}

/// An address and a prefix length; the bits behind the prefix are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Network {
    ip: IpAddr,
    prefix: u8,
}

/// Why a text is no rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct RuleError {
    reason: String,
}

/// No rule needs more ranges of ports.
const MAX_RANGES: usize = 64;

impl RuleError {
    pub(super) fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into() }
    }
}

fn error(reason: impl Into<String>) -> RuleError {
    RuleError::new(reason)
}

impl Network {
    /// The bits of an address, from the highest on; both families in the same type.
    fn bits(ip: IpAddr) -> u128 {
        match ip {
            IpAddr::V4(ip) => u128::from(ip.to_bits()) << 96,
            IpAddr::V6(ip) => ip.to_bits(),
        }
    }

    fn masked(ip: IpAddr, prefix: u8) -> u128 {
        Self::bits(ip) & u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0)
    }

    fn parse(text: &str) -> Result<Self, RuleError> {
        let (ip, prefix) = text.split_once('/').map_or((text, None), |(ip, prefix)| (ip, Some(prefix)));
        let ip: IpAddr = ip.parse().map_err(|_| error(format!("{ip:?} is no IP address")))?;
        let most = if ip.is_ipv6() { 128 } else { 32 };
        let prefix = match prefix {
            None => most,
            Some(prefix) => decimal::<u8>(prefix)
                .filter(|prefix| *prefix <= most)
                .ok_or_else(|| error(format!("the length of the prefix must be 0 to {most}")))?,
        };
        if Self::masked(ip, prefix) != Self::bits(ip) {
            return Err(error(format!("{text} has bits behind its prefix")));
        }
        if matches!(ip, IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some()) && prefix >= 96 {
            return Err(error("write the IPv4 address itself"));
        }
        Ok(Self { ip, prefix })
    }

    /// First and last address.
    fn range(self) -> (IpAddr, IpAddr) {
        let host = u128::MAX.checked_shr(u32::from(self.prefix)).unwrap_or(0);
        let last = Self::bits(self.ip) | host;
        let last = match self.ip {
            IpAddr::V4(_) => IpAddr::from(u32::try_from(last >> 96).unwrap_or(u32::MAX).to_be_bytes()),
            IpAddr::V6(_) => IpAddr::from(last.to_be_bytes()),
        };
        (self.ip, last)
    }
}

impl Rule {
    /// First and last address, unless it is about every address.
    pub(super) fn range(&self) -> Option<(IpAddr, IpAddr)> {
        self.network.map(Network::range)
    }

    /// Whether it is about nothing but addresses whose first `prefix` bits are those of `ip`.
    #[must_use]
    pub fn is_within(&self, ip: IpAddr, prefix: u8) -> bool {
        let network = |ip: IpAddr| (ip.is_ipv6(), Network::masked(ip, prefix));
        self.range()
            .is_some_and(|(first, last)| network(first) == network(ip) && network(last) == network(ip))
    }
}

/// A number of digits alone: `str::parse` would take a sign too.
fn decimal<T: FromStr>(text: &str) -> Option<T> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// Ports and ranges with commas between them.
fn parse_ports(text: &str) -> Result<Vec<(u16, u16)>, RuleError> {
    let ports: Vec<(u16, u16)> = text
        .split(',')
        .map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            match (decimal::<u16>(first), decimal::<u16>(last)) {
                (Some(first), Some(last)) if first != 0 && first <= last => Ok((first, last)),
                _ => Err(error(format!("{range:?} is no port (1 to 65535) and no range of ports"))),
            }
        })
        .collect::<Result<_, _>>()?;
    if ports.len() > MAX_RANGES {
        return Err(error(format!("more than {MAX_RANGES} ports and ranges: write several rules")));
    }
    Ok(ports)
}

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let (transport, rest) = match text.split_once(':') {
            Some(("tcp", rest)) => (Some(Transport::Tcp), rest),
            Some(("udp", rest)) => (Some(Transport::Udp), rest),
            Some(("icmp", rest)) => (Some(Transport::Ping), rest),
            _ => (None, text),
        };
        let (target, ports) = if let Some(rest) = rest.strip_prefix('[') {
            let (target, rest) = rest.split_once(']').ok_or_else(|| error("the bracket is not closed"))?;
            if !target.contains(':') {
                return Err(error("only IPv6 addresses stand in brackets"));
            }
            match rest {
                "" => (target, None),
                rest => {
                    let ports = rest.strip_prefix(':');
                    (
                        target,
                        Some(ports.ok_or_else(|| error("behind the bracket only `:` and ports may follow"))?),
                    )
                }
            }
        } else {
            let (target, ports) = rest.split_once(':').map_or((rest, None), |(ip, ports)| (ip, Some(ports)));
            if ports.is_some_and(|ports| ports.contains(':')) {
                return Err(error("write an IPv6 address in brackets: [2001:db8::/32]:443"));
            }
            (target, ports)
        };
        let network = if target == "any" { None } else { Some(Network::parse(target)?) };
        let ports = ports.map(parse_ports).transpose()?.unwrap_or_default();
        if transport == Some(Transport::Ping) && !ports.is_empty() {
            return Err(error("icmp has no ports"));
        }
        Ok(Self { transport, network, ports })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(transport) = self.transport {
            write!(f, "{}:", transport.name())?;
        }
        match self.network {
            None => f.write_str("any")?,
            Some(Network { ip, prefix }) => {
                let (open, close, most) = if ip.is_ipv6() { ("[", "]", 128) } else { ("", "", 32) };
                write!(f, "{open}{ip}")?;
                if prefix != most {
                    write!(f, "/{prefix}")?;
                }
                f.write_str(close)?;
            }
        }
        for (at, (first, last)) in self.ports.iter().enumerate() {
            f.write_str(if at == 0 { ":" } else { "," })?;
            write!(f, "{first}")?;
            if last != first {
                write!(f, "-{last}")?;
            }
        }
        Ok(())
    }
}

/// Ports of one network and protocol: disjoint ranges by their first port, each with its last one and its rule.
type Ports = BTreeMap<u16, (u16, usize)>;

/// A length of prefix, and its networks, each with the ports of each protocol.
type Level = (u8, HashMap<u128, [Ports; 3]>);

/// The rules of one kind, by prefix.
#[derive(Debug, Clone, Default)]
pub(crate) struct Table {
    /// For IPv4 and IPv6: longest prefix first, then by network, then by protocol.
    levels: [Vec<Level>; 2],
}

impl Table {
    /// A table of `rules`, each of which goes by its number.
    pub(crate) fn new<'a>(rules: impl IntoIterator<Item = (usize, &'a Rule)>) -> Self {
        let mut table = Self::default();
        for (number, rule) in rules {
            let any = [Network { ip: [0; 4].into(), prefix: 0 }, Network { ip: [0; 16].into(), prefix: 0 }];
            for network in rule.network.as_ref().map_or(&any[..], std::slice::from_ref) {
                table.add(number, rule, *network);
            }
        }
        table
    }

    fn add(&mut self, number: usize, rule: &Rule, network: Network) {
        let level = &mut self.levels[usize::from(network.ip.is_ipv6())];
        let at = match level.binary_search_by(|(prefix, _)| network.prefix.cmp(prefix)) {
            Ok(at) => at,
            Err(at) => {
                level.insert(at, (network.prefix, HashMap::new()));
                at
            }
        };
        let lanes = level[at].1.entry(Network::bits(network.ip)).or_default();
        for (transport, lane) in [Transport::Tcp, Transport::Udp, Transport::Ping].into_iter().zip(lanes) {
            if rule.transport.is_some_and(|wanted| wanted != transport) {
                continue;
            }
            match rule.ports.as_slice() {
                [] => add_ports(lane, 0, u16::MAX, number),
                _ if transport == Transport::Ping => {}
                ports => ports.iter().for_each(|(first, last)| add_ports(lane, *first, *last, number)),
            }
        }
    }

    /// The number of the rule for a flow.
    pub(crate) fn find(&self, transport: Transport, to: SocketAddr) -> Option<usize> {
        let port = if transport == Transport::Ping { 0 } else { to.port() };
        self.levels[usize::from(to.is_ipv6())].iter().find_map(|(prefix, networks)| {
            let lanes = networks.get(&Network::masked(to.ip(), *prefix))?;
            let lane = match transport {
                Transport::Tcp => &lanes[0],
                Transport::Udp => &lanes[1],
                Transport::Ping => &lanes[2],
            };
            let (_, (last, number)) = lane.range(..=port).next_back()?;
            (port <= *last).then_some(*number)
        })
    }
}

/// Adds what is not covered yet of a range: so ranges stay disjoint, and the first rule counts.
fn add_ports(lane: &mut Ports, first: u16, last: u16, number: usize) {
    let before = lane.range(..first).next_back().map(|(first, (last, _))| (*first, *last));
    let within = lane.range(first..=last).map(|(first, (last, _))| (*first, *last));
    let taken: Vec<(u16, u16)> = before.into_iter().chain(within).collect();
    let mut next = u32::from(first);
    let end = (u32::from(last) + 1, u32::from(last) + 1);
    for (start, stop) in taken.into_iter().map(|(a, b)| (u32::from(a), u32::from(b) + 1)).chain([end]) {
        if next < start
            && let (Ok(from), Ok(to)) = (u16::try_from(next), u16::try_from(start - 1))
        {
            lane.insert(from, (to, number));
        }
        next = next.max(stop);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ingress::tests::Seeded;

    fn rule(text: &str) -> Rule {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn rules_have_one_text_form_that_means_the_same() {
        for (text, canonical) in [
            ("any", "any"),
            ("tcp:any:22", "tcp:any:22"),
            ("any:53,5353", "any:53,5353"),
            ("192.0.2.1", "192.0.2.1"),
            ("192.0.2.1/32:1-65535", "192.0.2.1:1-65535"),
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("udp:10.0.0.0/8:7-7", "udp:10.0.0.0/8:7"),
            ("icmp:192.0.2.0/25", "icmp:192.0.2.0/25"),
            ("[2001:DB8::/32]:443", "[2001:db8::/32]:443"),
            ("[::1]", "[::1]"),
            ("tcp:[::/0]:80-90,443", "tcp:[::/0]:80-90,443"),
        ] {
            assert_eq!(rule(text).to_string(), canonical, "{text}");
            assert_eq!(rule(canonical), rule(text), "{text}");
        }
    }

    #[test]
    fn what_is_no_rule_is_told_so() {
        for (text, part) in [
            ("", "no IP address"),
            ("tcp:", "no IP address"),
            ("tcp:22", "no IP address"),
            ("sctp:192.0.2.1", "no IP address"),
            ("TCP:any", "no IP address"),
            ("example.com", "no IP address"),
            ("192.0.2.1/33", "0 to 32"),
            ("192.0.2.1/", "0 to 32"),
            ("192.0.2.0/+24", "0 to 32"),
            ("192.0.2.1/24", "bits behind"),
            ("[2001:db8::1/64]", "bits behind"),
            ("[2001:db8::/129]", "0 to 128"),
            ("2001:db8::1", "in brackets"),
            ("2001:db8::/32:443", "in brackets"),
            ("[2001:db8::1", "not closed"),
            ("[2001:db8::1]443", "behind the bracket"),
            ("[2001:db8::]/32", "behind the bracket"),
            ("[192.0.2.1]:80", "only IPv6"),
            ("[any]:80", "only IPv6"),
            ("[::ffff:192.0.2.1]", "IPv4 address itself"),
            ("any:", "no port"),
            ("any:0", "no port"),
            ("any:65536", "no port"),
            ("any:9-8", "no port"),
            ("any:80,", "no port"),
            ("any:-80", "no port"),
            ("any:http", "no port"),
            ("icmp:any:7", "no ports"),
            (" any", "no IP address"),
        ] {
            let error = text.parse::<Rule>().expect_err(text).to_string();
            assert!(error.contains(part), "{text:?}: {error}");
        }
        let many = format!("any:{}", vec!["1"; MAX_RANGES + 1].join(","));
        assert!(many.parse::<Rule>().is_err());
    }

    /// What a rule says, read off word by word: slow, and obviously right.
    fn matches(rule: &Rule, transport: Transport, to: SocketAddr) -> bool {
        let address = rule.range().is_none_or(|(first, last)| {
            first.is_ipv4() == to.is_ipv4() && first <= to.ip() && to.ip() <= last
        });
        let ports = rule.ports.is_empty()
            || transport != Transport::Ping
                && rule.ports.iter().any(|(first, last)| (*first..=*last).contains(&to.port()));
        address && ports && rule.transport.is_none_or(|wanted| wanted == transport)
    }

    #[test]
    fn a_table_finds_what_reading_every_rule_finds() {
        let mut seed = Seeded(7);
        for _ in 0..60 {
            let rules: Vec<Rule> = (0..=seed.below(40)).map(|_| rule(&random_rule(&mut seed))).collect();
            let table = Table::new(rules.iter().enumerate());
            for _ in 0..300 {
                let ips = [
                    "192.0.2.0",
                    "192.0.2.1",
                    "192.0.2.3",
                    "192.0.77.1",
                    "198.51.100.1",
                    "2001:db8::1",
                    "::1",
                ];
                let ip = ips[seed.below(ips.len())];
                let to = SocketAddr::new(ip.parse().expect(ip), u16::try_from(seed.below(35)).expect("port"));
                let transport = [Transport::Tcp, Transport::Udp, Transport::Ping][seed.below(3)];
                let all: Vec<usize> =
                    (0..rules.len()).filter(|&i| matches(&rules[i], transport, to)).collect();
                match table.find(transport, to) {
                    Some(found) => assert!(all.contains(&found), "{transport:?} {to} {found} {rules:?}"),
                    None => assert!(all.is_empty(), "{transport:?} {to} {rules:?}"),
                }
            }
        }
    }

    fn random_rule(seed: &mut Seeded) -> String {
        let transport = ["", "tcp:", "udp:", "icmp:"][seed.below(4)];
        let target = match seed.below(5) {
            0 => "any".to_owned(),
            1 => format!("192.0.2.{}", seed.below(4)),
            2 => format!("192.0.2.{}/31", seed.below(2) * 2),
            3 => format!("[2001:db8::{:x}]", seed.below(3)),
            _ => format!("192.0.0.0/{}", 10 + seed.below(9)),
        };
        let first = 1 + seed.below(20);
        let ports = match seed.below(3) {
            1 if transport != "icmp:" => format!(":{first}"),
            2 if transport != "icmp:" => format!(":{first}-{},{}", first + seed.below(9), 1 + seed.below(30)),
            _ => String::new(),
        };
        format!("{transport}{target}{ports}")
    }

    #[test]
    fn the_longest_prefix_and_then_the_first_rule_is_named() {
        let rules = ["any", "10.0.0.0/8", "10.0.0.0/8:80", "10.1.0.0/16:80", "10.1.0.0/16:70-90"].map(rule);
        let table = Table::new(rules.iter().enumerate());
        let find = |to: &str| table.find(Transport::Tcp, to.parse().expect(to));
        assert_eq!(find("10.1.2.3:80"), Some(3));
        assert_eq!(find("10.1.2.3:81"), Some(4));
        assert_eq!(find("10.1.2.3:22"), Some(1));
        assert_eq!(find("10.2.2.3:80"), Some(1));
        assert_eq!(find("192.0.2.1:80"), Some(0));
        assert_eq!(find("[2001:db8::1]:80"), Some(0));
    }

    #[test]
    fn thousands_of_rules_for_one_network_stay_one_look_up() {
        let rules: Vec<Rule> = (1..=20_000).map(|port| rule(&format!("tcp:192.0.2.0/24:{port}"))).collect();
        let table = Table::new(rules.iter().enumerate());
        assert_eq!(table.levels[0].len(), 1);
        assert_eq!(table.levels[0][0].1.len(), 1);
        for port in [1, 777, 20_000] {
            assert_eq!(
                table.find(Transport::Tcp, SocketAddr::from(([192, 0, 2, 9], port))),
                Some(usize::from(port) - 1)
            );
        }
        assert_eq!(table.find(Transport::Tcp, SocketAddr::from(([192, 0, 2, 9], 20_001))), None);
    }

    #[test]
    fn a_rule_is_within_a_network_or_not() {
        let is = |text, ip: &str, prefix| rule(text).is_within(ip.parse().expect(ip), prefix);
        assert!(is("10.87.0.1:80", "10.87.0.1", 24) && is("10.87.0.0/24", "10.87.0.1", 24));
        assert!(is("tcp:[fd87::1]", "fd87::2", 64) && is("[fd87::2]", "fd87::2", 128));
        assert!(!is("10.87.0.0/23", "10.87.0.1", 24) && !is("10.87.1.1", "10.87.0.1", 24));
        assert!(!is("any", "0.0.0.0", 0) && !is("[::]", "0.0.0.0", 0) && is("[::]", "::", 0));
    }

    #[test]
    fn text_of_any_kind_does_no_harm() {
        let mut seed = Seeded(11);
        let parts = [
            "tcp:",
            "any",
            "[",
            "]",
            ":",
            "/",
            "1",
            "65535",
            "-",
            ",",
            "192.0.2.0",
            "::",
            "2001:db8::",
            "é",
            " ",
        ];
        for _ in 0..20_000 {
            let text: String = (0..seed.below(9)).map(|_| parts[seed.below(parts.len())]).collect();
            if let Ok(parsed) = text.parse::<Rule>() {
                assert_eq!(parsed.to_string().parse(), Ok(parsed), "{text}");
            }
        }
    }
}
