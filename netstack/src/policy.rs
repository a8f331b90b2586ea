//! What the guest may reach: a pure function from a wanted flow to a verdict. No I/O, no state.
//!
//! In this order, and the first that applies decides:
//!
//! 1. The gateway's and the forwarder's addresses: the stack answers DNS and echo requests. Other ports of the gateway stand for the host's loopback as far
//!    as [`HostLoopback`] opens it, and are refused else. Rules by address are not asked: the gateway is no address of
//!    anybody's network.
//! 2. What is refused always:
//!    - the host's loopback, by any name: 127/8, ::1, 0.0.0.0/8, ::, their IPv4-mapped, IPv4-compatible, IPv4-translated,
//!      NAT64, 6to4, Teredo and ISATAP forms. The kernel of the host takes 0.0.0.0 and :: for loopback;
//!    - multicast, broadcast and reserved addresses;
//!    - link-local addresses and the cloud's metadata services, but for an `allow` rule that is about nothing else;
//!    - the guest's own subnet, where there is nobody but the gateway;
//!    - the host's own addresses (its LAN address, where services bound to 0.0.0.0 listen), which the caller of
//!      [`decide`] looks up in the host's routing table, but for ports that [`HostLoopback`] opens.
//! 3. A `deny` rule that matches refuses. Rules about an IPv4 address count for the translated forms of it, too. So does
//!    `deny_names` for a name by which the guest knows the address.
//! 4. If there are `allow` rules or `allow_names`, one of them has to match. If there are none, everything else is allowed
//!    that the caller can reach. A name opens private addresses only if the spec says that they are its: whoever runs a
//!    zone may write there what lies in the caller's own network.
//!
//! Names are known in two ways: what our name server answered ([`Pins`](crate::dns::pins::Pins)), and what a TLS
//! ClientHello asks for ([`hello`]). One address has many names, so where rules are about names the first bytes of a TCP
//! connection wait until they have been looked at ([`Verdict::Peek`], [`decide_hello`]). Where they are not, nobody looks.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::config::{Link, StackSpec};

pub(crate) mod hello;
pub(crate) mod names;
mod rules;

use hello::Hello;
pub use names::NamePattern;
use rules::Table;
pub use rules::{Rule, RuleError};

/// What the guest may reach.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PolicySpec {
    /// If there are any, nothing else is allowed.
    pub allow: Vec<Rule>,
    /// Refused, whatever is allowed.
    pub deny: Vec<Rule>,
    /// Allowed as by `allow`: addresses that the name server gave the guest for such a name. A TLS connection that is
    /// allowed only thereby must ask for such a name, too, if it asks for any. Private addresses (RFC 1918, RFC 6598, RFC
    /// 4193) need a rule in `allow` besides, or a name in [`DnsSpec::hosts`](crate::DnsSpec::hosts).
    pub allow_names: Vec<NamePattern>,
    /// Refused as by `deny`: addresses that the name server gave the guest for such a name, and TLS connections that ask
    /// for one. This keeps honest programs away; one that knows an address, and hides the name, is not stopped.
    pub deny_names: Vec<NamePattern>,
    /// The host's loopback and own addresses.
    pub host_loopback: HostLoopback,
}

/// Whether the gateway's addresses stand for the host's loopback, and the host's own addresses may be reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum HostLoopback {
    /// Neither.
    #[default]
    Refused,
    /// Both, by these TCP and UDP ports. (Where the forwarder is, port 53 is always its own.)
    Ports(BTreeSet<u16>),
    /// Both, wholly.
    All,
}

impl HostLoopback {
    fn opens(&self, transport: Transport, port: u16) -> bool {
        match self {
            Self::Refused => false,
            Self::Ports(ports) => transport != Transport::Ping && ports.contains(&port),
            Self::All => true,
        }
    }
}

/// Kind of a wanted flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// Echo requests of ICMP and ICMPv6.
    Ping,
}

impl Transport {
    /// The word for it in rules and logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Ping => "icmp",
        }
    }
}

/// What the host's routing table says about a destination.
///
/// In an order: of an address and those embedded in it, what it says last counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum RouteKind {
    /// Some other machine, or nobody: connecting will tell.
    Remote,
    /// The host itself.
    Local,
    /// A broadcast address of one of the host's subnets.
    Broadcast,
    /// The host could not be asked.
    Unknown,
}

/// The rules, in tables.
#[derive(Debug, Clone)]
pub(crate) struct Rules {
    guest: Link,
    gateway: Link,
    policy: PolicySpec,
    allow: Table,
    deny: Table,
    /// Those of `allow` that open what is refused else.
    opened: Table,
    /// Where the DNS forwarder is.
    resolver: (Option<Ipv4Addr>, Option<Ipv6Addr>),
}

impl Rules {
    pub(crate) fn new(spec: &StackSpec) -> Self {
        let policy = spec.policy.clone();
        let opening = |(_, rule): &(usize, &Rule)| rule.opens();
        Self {
            guest: spec.guest,
            gateway: spec.gateway,
            allow: Table::new(policy.allow.iter().enumerate()),
            deny: Table::new(policy.deny.iter().enumerate()),
            opened: Table::new(policy.allow.iter().enumerate().filter(opening)),
            policy,
            resolver: (spec.resolver_v4(), spec.resolver_v6()),
        }
    }

    fn is_resolver(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => self.resolver.0 == Some(ip),
            IpAddr::V6(ip) => self.resolver.1 == Some(ip),
        }
    }

    /// Whether a decision needs the names of an address.
    pub(crate) fn want_names(&self) -> bool {
        !self.policy.allow_names.is_empty() || !self.policy.deny_names.is_empty()
    }

    /// The number of the pattern in `deny_names` that `name` matches.
    fn denied_name(&self, name: &str) -> Option<usize> {
        self.policy.deny_names.iter().position(|pattern| pattern.matches(name))
    }

    pub(crate) fn allows_name(&self, name: &str) -> bool {
        self.policy.allow_names.iter().any(|pattern| pattern.matches(name))
    }

    /// The rule that a refusal names, as it is written.
    pub(crate) fn rule_of(&self, reason: Reason) -> Option<String> {
        match reason {
            Reason::Denied(rule) => self.policy.deny.get(rule).map(ToString::to_string),
            Reason::DeniedName(name) => self.policy.deny_names.get(name).map(ToString::to_string),
            _ => None,
        }
    }
}

/// What is to be done with a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The stack answers it: DNS at port 53, echo requests.
    Gateway,
    /// Connect to this address of the host's world.
    Allow(SocketAddr),
    /// Connect, but let nothing of the guest's through before [`decide_hello`] has seen it. TCP only.
    Peek(SocketAddr),
    /// Refuse.
    Refuse(Reason),
}

/// Why a flow is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    /// The host's loopback.
    HostLoopback,
    /// Another address of the host.
    HostAddress,
    /// Link-local addresses.
    LinkLocal,
    /// A cloud's metadata service.
    Metadata,
    /// Multicast.
    Multicast,
    /// Broadcast.
    Broadcast,
    /// Addresses without a meaning.
    Reserved,
    /// The guest's own subnet.
    Subnet,
    /// The host's routing table could not be asked.
    Unknown,
    /// By this one of the `deny` rules.
    Denied(usize),
    /// By this one of the names that are denied.
    DeniedName(usize),
    /// By none of the `allow` rules, and no name that is allowed.
    NotAllowed,
    /// A name that is allowed leads to it, but it is an address of private networks.
    PrivateAddress,
    /// The TLS ClientHello cannot be understood.
    BrokenHello,
}

impl Reason {
    /// Multicast and broadcast are dropped without an answer (RFC 1122 section 3.2.2, RFC 4443 section 2.4), everything
    /// else is answered.
    pub(crate) fn is_silent(self) -> bool {
        matches!(self, Self::Multicast | Self::Broadcast)
    }

    /// The word for it in logs.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::HostLoopback => "host-loopback",
            Self::HostAddress => "host-address",
            Self::LinkLocal => "link-local",
            Self::Metadata => "metadata",
            Self::Multicast => "multicast",
            Self::Broadcast => "broadcast",
            Self::Reserved => "reserved",
            Self::Subnet => "subnet",
            Self::Unknown => "route-unknown",
            Self::Denied(_) => "deny",
            Self::DeniedName(_) => "deny-name",
            Self::BrokenHello => "broken-hello",
            Self::NotAllowed => "not-allowed",
            Self::PrivateAddress => "private-address",
        }
    }
}

/// The DNS port, which is the forwarder's at the gateway's addresses.
pub(crate) const DNS_PORT: u16 = 53;

/// A name by which the guest knows an address.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KnownAs<'a> {
    pub(crate) name: &'a str,
    /// The spec says so, and not just whoever runs the name's zone.
    pub(crate) by_spec: bool,
}

/// Decides about a flow of the guest to `destination`, about which (and about the IPv4 addresses in it) the host's routing
/// table says `route`. The guest knows it by `names`, which are empty if the rules do not want them.
pub(crate) fn decide(
    rules: &Rules,
    transport: Transport,
    destination: SocketAddr,
    route: RouteKind,
    names: &[KnownAs<'_>],
) -> Verdict {
    let (ip, port) = (destination.ip(), destination.port());
    if rules.is_resolver(ip) && (port == DNS_PORT || transport == Transport::Ping) {
        return Verdict::Gateway;
    }
    let host_loopback = &rules.policy.host_loopback;
    if rules.gateway.is(ip) {
        return match transport {
            Transport::Ping => Verdict::Gateway,
            _ if host_loopback.opens(transport, port) => {
                let loopback: IpAddr = match ip {
                    IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                    IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
                };
                Verdict::Allow(SocketAddr::new(loopback, port))
            }
            _ => Verdict::Refuse(Reason::HostLoopback),
        };
    }
    if let Some(reason) = refused_range(ip)
        && !(reason.can_be_opened() && rules.opened.find(transport, destination).is_some())
    {
        return Verdict::Refuse(reason);
    }
    if rules.guest.is_subnet_edge(ip) {
        return Verdict::Refuse(Reason::Broadcast);
    }
    if rules.guest.contains(ip) {
        return Verdict::Refuse(Reason::Subnet);
    }
    match route {
        RouteKind::Remote => {}
        RouteKind::Local if host_loopback.opens(transport, port) => {}
        RouteKind::Local => return Verdict::Refuse(Reason::HostAddress),
        RouteKind::Broadcast => return Verdict::Refuse(Reason::Broadcast),
        RouteKind::Unknown => return Verdict::Refuse(Reason::Unknown),
    }
    let denied = |to| rules.deny.find(transport, to);
    let mut embedded = embedded_v4(ip).map(|v4| SocketAddr::new(v4.into(), port));
    if let Some(rule) = denied(destination).or_else(|| embedded.find_map(denied)) {
        return Verdict::Refuse(Reason::Denied(rule));
    }
    if let Some(name) = names.iter().find_map(|known| rules.denied_name(known.name)) {
        return Verdict::Refuse(Reason::DeniedName(name));
    }
    let peek = match rules.basis(transport, destination) {
        Basis::Rules => !rules.policy.deny_names.is_empty(),
        Basis::Names => {
            let mut allowed = names.iter().filter(|known| rules.allows_name(known.name)).peekable();
            if allowed.peek().is_none() {
                return Verdict::Refuse(Reason::NotAllowed);
            }
            if is_private(ip) && !allowed.any(|known| known.by_spec) {
                return Verdict::Refuse(Reason::PrivateAddress);
            }
            true
        }
    };
    if peek && transport == Transport::Tcp { Verdict::Peek(destination) } else { Verdict::Allow(destination) }
}

/// What a flow can be allowed by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Basis {
    /// A rule about its address, or there being no rules that allow.
    Rules,
    /// A name, or nothing.
    Names,
}

impl Rules {
    fn basis(&self, transport: Transport, destination: SocketAddr) -> Basis {
        let open = self.policy.allow.is_empty() && self.policy.allow_names.is_empty();
        match open || self.allow.find(transport, destination).is_some() {
            true => Basis::Rules,
            false => Basis::Names,
        }
    }
}

/// Decides about a TCP flow to `destination` that was let begin, by its first bytes.
pub(crate) fn decide_hello(rules: &Rules, destination: SocketAddr, hello: &Hello) -> Result<(), Reason> {
    match hello {
        Hello::Name(name) => match rules.denied_name(name) {
            Some(number) => Err(Reason::DeniedName(number)),
            None if rules.allows_name(name) => Ok(()),
            None if rules.basis(Transport::Tcp, destination) == Basis::Rules => Ok(()),
            None => Err(Reason::NotAllowed),
        },
        Hello::Nameless => Ok(()),
        Hello::More | Hello::Broken => Err(Reason::BrokenHello),
    }
}

impl Reason {
    /// Whether an `allow` rule that is about nothing else takes a refusal back.
    fn can_be_opened(self) -> bool {
        matches!(self, Self::LinkLocal | Self::Metadata)
    }
}

impl Rule {
    /// The reason for which every address of this rule is refused without it.
    fn refused_always(&self) -> Option<Reason> {
        let (first, last) = self.range()?;
        let reason = refused_range(first)?;
        // Two refused ranges may hold a rule's both ends, but not its middle, too. That is the first address of the upper
        // half: the last of the lower one has only ones at its end, which Teredo reads as 0.0.0.0.
        let middle = match (first, last) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                let half = (b.to_bits() - a.to_bits()).div_ceil(2);
                Ipv4Addr::from_bits(a.to_bits() + half).into()
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => {
                let half = (b.to_bits() - a.to_bits()).div_ceil(2);
                Ipv6Addr::from_bits(a.to_bits() + half).into()
            }
            _ => first,
        };
        [middle, last].iter().all(|ip| refused_range(*ip) == Some(reason)).then_some(reason)
    }

    /// Whether, as an `allow` rule, it opens what is refused else.
    fn opens(&self) -> bool {
        self.refused_always().is_some_and(Reason::can_be_opened)
    }

    /// Whether it makes sense as an `allow` rule.
    ///
    /// # Errors
    ///
    /// If nothing that it is about can ever be reached.
    pub fn check_allow(&self) -> Result<(), RuleError> {
        let reason = match self.refused_always() {
            Some(Reason::HostLoopback) => {
                "the host's loopback is reached by the gateway's address, and opened with allow-host-loopback"
            }
            Some(Reason::LinkLocal) if matches!(self.range(), Some((IpAddr::V6(_), _))) => {
                "a link-local IPv6 address means nothing on another link"
            }
            None | Some(Reason::LinkLocal | Reason::Metadata) => return Ok(()),
            Some(Reason::Multicast | Reason::Broadcast) => "multicast and broadcast cannot be reached",
            Some(_) => "nobody has such an address",
        };
        Err(RuleError::new(reason))
    }
}

/// Services of clouds at addresses that are not link-local. (169.254.169.254 and its like are.)
const METADATA_V4: [Ipv4Addr; 3] =
    [Ipv4Addr::new(100, 100, 100, 200), Ipv4Addr::new(168, 63, 129, 16), Ipv4Addr::new(192, 0, 0, 192)];
/// Addresses and prefix lengths.
const METADATA_V6: [(Ipv6Addr, u32); 6] = [
    // Amazon: the instance's, the containers' and the time service.
    (Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0), 32),
    // Google.
    (Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254), 128),
    // Scaleway.
    (Ipv6Addr::new(0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42), 128),
    // Oracle.
    (Ipv6Addr::new(0xfd00, 0xc1, 0, 0, 0, 0, 0xa9fe, 0xa9fe), 128),
    // Akamai (Linode).
    (Ipv6Addr::new(0xfd00, 0xa9fe, 0xa9fe, 0, 0, 0, 0, 1), 128),
    // Alibaba.
    (Ipv6Addr::new(0xfd00, 0x100, 0, 0, 0, 0, 0x100, 0x200), 128),
];

fn is_metadata_v6(ip: Ipv6Addr) -> bool {
    METADATA_V6.iter().any(|(prefix, length)| (ip.to_bits() ^ prefix.to_bits()).leading_zeros() >= *length)
}

/// Addresses that are refused whoever asks.
fn refused_range(ip: IpAddr) -> Option<Reason> {
    match ip {
        IpAddr::V4(ip) => refused_v4(ip),
        IpAddr::V6(ip) => refused_v6(ip),
    }
}

fn refused_v4(ip: Ipv4Addr) -> Option<Reason> {
    let [first, ..] = ip.octets();
    match first {
        0 | 127 => Some(Reason::HostLoopback),
        224..=239 => Some(Reason::Multicast),
        _ if ip.is_broadcast() => Some(Reason::Broadcast),
        240.. => Some(Reason::Reserved),
        _ if ip.is_link_local() => Some(Reason::LinkLocal),
        _ if METADATA_V4.contains(&ip) => Some(Reason::Metadata),
        _ => None,
    }
}

/// The IPv4 addresses that translators and tunnels may make of an IPv6 one: NAT64 (RFC 6052), also by prefixes for local
/// use (RFC 8215), stateless translation (RFC 2765), 6to4 (RFC 3056), the server's and the client's of Teredo (RFC 4380),
/// and of any prefix ISATAP (RFC 5214).
pub(crate) fn embedded_v4(ip: IpAddr) -> impl Iterator<Item = Ipv4Addr> {
    let (by_prefix, isatap) = match ip {
        IpAddr::V4(_) => ([None; 4], None),
        IpAddr::V6(ip) => {
            let by_prefix = match ip.segments() {
                [0x64, 0xff9b, 0, 0, 0, 0, high, low]
                | [0x2002, high, low, ..]
                | [0, 0, 0, 0, 0xffff, 0, high, low] => [Some(v4_of(high, low)), None, None, None],
                [0x64, 0xff9b, 1, ..] => local_use_v4(ip),
                // The client's is written with all its bits inverted, so that no router on the way translates it.
                [0x2001, 0, server_high, server_low, _, _, high, low] => {
                    [Some(v4_of(server_high, server_low)), Some(v4_of(!high, !low)), None, None]
                }
                _ => [None; 4],
            };
            // The identifier of the interface; 0x200 says that the address is globally unique.
            let isatap = match ip.segments() {
                [_, _, _, _, 0 | 0x200, 0x5efe, high, low] => Some(v4_of(high, low)),
                _ => None,
            };
            (by_prefix, isatap)
        }
    };
    by_prefix.into_iter().chain([isatap]).flatten()
}

/// What may be embedded behind 64:ff9b:1::/48. Only its network knows how long the prefix is that it uses of it, and with
/// that where the address is (RFC 6052 section 2.2). What would be no host's address is the rest of a longer prefix, or
/// what is behind the address.
fn local_use_v4(ip: Ipv6Addr) -> [Option<Ipv4Addr>; 4] {
    let [_, _, _, _, _, _, a, b, _, c, d, e, f, g, h, i] = ip.octets();
    // Prefixes of 48, 56, 64 and 96 bits. The octet that they leave out is always zero.
    let all = [[a, b, c, d], [b, c, d, e], [c, d, e, f], [f, g, h, i]];
    all.map(|octets| (1..224).contains(&octets[0]).then(|| octets.into()))
}

/// Addresses of private networks, whose owner is whoever is there: RFC 1918, RFC 6598, RFC 4193.
fn is_private(ip: IpAddr) -> bool {
    let is_private_v4 = |ip: Ipv4Addr| ip.is_private() || matches!(ip.octets(), [100, 64..=127, ..]);
    match ip {
        IpAddr::V4(ip) => is_private_v4(ip),
        IpAddr::V6(v6) => v6.is_unique_local() || embedded_v4(ip).any(is_private_v4),
    }
}

fn v4_of(high: u16, low: u16) -> Ipv4Addr {
    Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low))
}

fn refused_v6(ip: Ipv6Addr) -> Option<Reason> {
    let own = refused_by_own_range(ip);
    if own.is_some_and(|reason| !reason.can_be_opened()) {
        return own;
    }
    // Translated addresses are fine, unless what they lead to is not: whichever of them it is that nothing opens.
    let embedded = embedded_v4(ip.into()).filter_map(refused_v4);
    own.into_iter().chain(embedded).min_by_key(|reason| match reason {
        Reason::HostLoopback => 0,
        reason if !reason.can_be_opened() => 1,
        _ => 2,
    })
}

fn refused_by_own_range(ip: Ipv6Addr) -> Option<Reason> {
    match ip.segments() {
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => Some(Reason::HostLoopback),
        // IPv4-mapped and IPv4-compatible (RFC 4291 section 2.5.5): the host's kernel sends the mapped form over IPv4.
        // Neither is ever right on a wire.
        [0, 0, 0, 0, 0, 0xffff | 0, high, low] => {
            Some(refused_v4(v4_of(high, low)).unwrap_or(Reason::Reserved))
        }
        [0xff00..=0xffff, ..] => Some(Reason::Multicast),
        // fe80::/10 and the old site-local fec0::/10.
        [0xfe80..=0xfeff, ..] => Some(Reason::LinkLocal),
        _ if is_metadata_v6(ip) => Some(Reason::Metadata),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
