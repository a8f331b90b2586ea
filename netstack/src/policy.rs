//! What the guest may reach: a pure function from a wanted flow to a verdict. No I/O, no state.
//!
//! By default everything is allowed that the caller can reach, except what would be the host itself or its link:
//!
//! - the host's loopback, by any name: 127/8, ::1, 0.0.0.0/8, ::, their IPv4-mapped, IPv4-compatible, NAT64 and 6to4
//!   forms. The kernel of the host takes 0.0.0.0 and :: for loopback;
//! - the host's own addresses (its LAN address, where services bound to 0.0.0.0 listen), which the caller of
//!   [`decide`] looks up in the host's routing table;
//! - link-local addresses and the cloud's metadata services;
//! - multicast, broadcast and reserved addresses;
//! - the guest's own subnet, where there is nobody but the gateway.
//!
//! With `allow_host_loopback` the gateway's addresses stand for the host's loopback, and the host's own addresses may
//! be reached. The other refusals stay.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::config::{Link, StackSpec};

/// Kind of a wanted flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Transport {
    Tcp,
    Udp,
    Ping,
}

/// What the host's routing table says about a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

/// The rules that do not change while the stack runs.
#[derive(Debug, Clone)]
pub(crate) struct Rules {
    guest: Link,
    gateway: Link,
    allow_host_loopback: bool,
    /// Where the DNS forwarder is.
    resolver: (Option<Ipv4Addr>, Option<Ipv6Addr>),
}

impl Rules {
    pub(crate) fn new(spec: &StackSpec) -> Self {
        Self {
            guest: spec.guest,
            gateway: spec.gateway,
            allow_host_loopback: spec.allow_host_loopback,
            resolver: (spec.resolver_v4(), spec.resolver_v6()),
        }
    }

    fn is_resolver(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => self.resolver.0 == Some(ip),
            IpAddr::V6(ip) => self.resolver.1 == Some(ip),
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
    /// Multicast and broadcast.
    Multicast,
    /// Addresses without a meaning.
    Reserved,
    /// The guest's own subnet.
    Subnet,
    /// The host's routing table could not be asked.
    Unknown,
}

impl Reason {
    /// Multicast is dropped without an answer (RFC 1122 section 3.2.2), everything else is answered.
    pub(crate) fn is_silent(self) -> bool {
        self == Self::Multicast
    }
}

/// The DNS port, which is the forwarder's at the gateway's addresses.
pub(crate) const DNS_PORT: u16 = 53;

/// Decides about a flow of the guest to `destination`, about which the host's routing table says `route`.
pub(crate) fn decide(
    rules: &Rules,
    transport: Transport,
    destination: SocketAddr,
    route: RouteKind,
) -> Verdict {
    let (ip, port) = (destination.ip(), destination.port());
    if rules.is_resolver(ip) && (port == DNS_PORT || transport == Transport::Ping) {
        return Verdict::Gateway;
    }
    if rules.gateway.is(ip) {
        return match transport {
            Transport::Ping => Verdict::Gateway,
            _ if rules.allow_host_loopback => {
                let loopback: IpAddr = match ip {
                    IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                    IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
                };
                Verdict::Allow(SocketAddr::new(loopback, port))
            }
            _ => Verdict::Refuse(Reason::HostLoopback),
        };
    }
    if let Some(reason) = refused_range(ip) {
        return Verdict::Refuse(reason);
    }
    if rules.guest.is_subnet_edge(ip) {
        return Verdict::Refuse(Reason::Multicast);
    }
    if rules.guest.contains(ip) {
        return Verdict::Refuse(Reason::Subnet);
    }
    match route {
        RouteKind::Remote => Verdict::Allow(destination),
        RouteKind::Local if rules.allow_host_loopback => Verdict::Allow(destination),
        RouteKind::Local => Verdict::Refuse(Reason::HostAddress),
        RouteKind::Broadcast => Verdict::Refuse(Reason::Multicast),
        RouteKind::Unknown => Verdict::Refuse(Reason::Unknown),
    }
}

/// Services of clouds at addresses that are not link-local. (169.254.169.254 and its like are.)
const METADATA_V4: [Ipv4Addr; 2] = [Ipv4Addr::new(100, 100, 100, 200), Ipv4Addr::new(168, 63, 129, 16)];
const METADATA_V6: [Ipv6Addr; 2] =
    [Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254), Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)];

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
        _ if ip.is_broadcast() => Some(Reason::Multicast),
        240.. => Some(Reason::Reserved),
        _ if ip.is_link_local() => Some(Reason::LinkLocal),
        _ if METADATA_V4.contains(&ip) => Some(Reason::Metadata),
        _ => None,
    }
}

fn refused_v6(ip: Ipv6Addr) -> Option<Reason> {
    let segments = ip.segments();
    let embedded = |high: u16, low: u16| {
        let [a, b] = high.to_be_bytes();
        let [c, d] = low.to_be_bytes();
        Ipv4Addr::new(a, b, c, d)
    };
    match segments {
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => Some(Reason::HostLoopback),
        // IPv4-mapped and IPv4-compatible (RFC 4291 section 2.5.5): the host's kernel sends the mapped form over IPv4.
        // Neither is ever right on a wire.
        [0, 0, 0, 0, 0, 0xffff | 0, high, low] => {
            Some(refused_v4(embedded(high, low)).unwrap_or(Reason::Reserved))
        }
        // NAT64 (RFC 6052) and 6to4 (RFC 3056): fine, unless what they lead to is not.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0x2002, high, low, ..] => refused_v4(embedded(high, low)),
        [0xff00..=0xffff, ..] => Some(Reason::Multicast),
        // fe80::/10 and the old site-local fec0::/10.
        [0xfe80..=0xfeff, ..] => Some(Reason::LinkLocal),
        _ if METADATA_V6.contains(&ip) => Some(Reason::Metadata),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decide_by(allow_host_loopback: bool, transport: Transport, to: &str, route: RouteKind) -> Verdict {
        let rules = Rules::new(&StackSpec { allow_host_loopback, ..crate::config::tests::spec() });
        decide(&rules, transport, to.parse().expect(to), route)
    }

    fn tcp(to: &str) -> Verdict {
        decide_by(false, Transport::Tcp, to, RouteKind::Remote)
    }

    #[test]
    fn other_machines_are_allowed() {
        for to in [
            "192.0.2.1:80",
            "10.0.3.1:22",
            "100.64.0.1:1",
            "172.16.0.1:443",
            "[2001:db8::1]:443",
            "[fd12::1]:1",
            "[64:ff9b::c000:201]:80",
            "[2002:c000:201::1]:80",
        ] {
            assert_eq!(tcp(to), Verdict::Allow(to.parse().expect(to)), "{to}");
        }
    }

    #[test]
    fn the_hosts_loopback_is_refused_by_every_name() {
        for to in [
            "127.0.0.1:80",
            "127.255.255.254:80",
            "0.0.0.0:80",
            "0.1.2.3:80",
            "[::]:80",
            "[::1]:80",
            "[::ffff:127.0.0.1]:80",
            "[::ffff:0.0.0.0]:80",
            "[::127.0.0.1]:80",
            "[64:ff9b::7f00:1]:80",
            "[2002:7f00:1::1]:80",
            "10.0.2.2:80",
            "[fd00::2]:80",
        ] {
            assert_eq!(tcp(to), Verdict::Refuse(Reason::HostLoopback), "{to}");
        }
    }

    #[test]
    fn ranges_without_a_host_are_refused_by_name() {
        for (to, reason) in [
            ("169.254.169.254:80", Reason::LinkLocal),
            ("[::ffff:169.254.169.254]:80", Reason::LinkLocal),
            ("[64:ff9b::a9fe:a9fe]:80", Reason::LinkLocal),
            ("[fe80::1]:80", Reason::LinkLocal),
            ("[fec0::1]:80", Reason::LinkLocal),
            ("100.100.100.200:80", Reason::Metadata),
            ("168.63.129.16:80", Reason::Metadata),
            ("[fd00:ec2::254]:80", Reason::Metadata),
            ("224.0.0.1:80", Reason::Multicast),
            ("239.255.255.250:1900", Reason::Multicast),
            ("255.255.255.255:67", Reason::Multicast),
            ("[ff02::fb]:5353", Reason::Multicast),
            ("240.0.0.1:80", Reason::Reserved),
            ("[::ffff:192.0.2.1]:80", Reason::Reserved),
            ("10.0.2.255:80", Reason::Multicast),
            ("10.0.2.3:80", Reason::Subnet),
            ("10.0.2.100:80", Reason::Subnet),
            ("[fd00::3]:80", Reason::Subnet),
        ] {
            for allow in [false, true] {
                let verdict = decide_by(allow, Transport::Udp, to, RouteKind::Remote);
                assert_eq!(verdict, Verdict::Refuse(reason), "{to}");
            }
        }
    }

    #[test]
    fn the_hosts_own_addresses_follow_the_routing_table() {
        let to = "198.51.100.7:22";
        for (route, reason) in [
            (RouteKind::Local, Reason::HostAddress),
            (RouteKind::Broadcast, Reason::Multicast),
            (RouteKind::Unknown, Reason::Unknown),
        ] {
            assert_eq!(decide_by(false, Transport::Tcp, to, route), Verdict::Refuse(reason));
        }
        assert_eq!(
            decide_by(true, Transport::Tcp, to, RouteKind::Local),
            Verdict::Allow(to.parse().expect(to))
        );
        assert_eq!(decide_by(true, Transport::Tcp, to, RouteKind::Unknown), Verdict::Refuse(Reason::Unknown));
    }

    #[test]
    fn a_resolver_of_its_own_leaves_port_53_of_the_gateway_to_the_host() {
        let at = crate::config::DnsAt::Addresses([10, 0, 2, 3].into(), "fd00::3".parse().expect("address"));
        let mut spec = StackSpec { allow_host_loopback: true, ..crate::config::tests::spec() };
        spec.dns.at = at;
        let decide = |spec: &StackSpec, transport, to: &str| {
            decide(&Rules::new(spec), transport, to.parse().expect(to), RouteKind::Remote)
        };
        for to in ["10.0.2.3:53", "[fd00::3]:53"] {
            assert_eq!(decide(&spec, Transport::Udp, to), Verdict::Gateway);
        }
        assert_eq!(decide(&spec, Transport::Ping, "10.0.2.3:0"), Verdict::Gateway);
        assert_eq!(decide(&spec, Transport::Tcp, "10.0.2.3:80"), Verdict::Refuse(Reason::Subnet));
        let loopback = Verdict::Allow("127.0.0.1:53".parse().expect("address"));
        assert_eq!(decide(&spec, Transport::Udp, "10.0.2.2:53"), loopback);
        spec.dns.at = crate::config::DnsAt::Nowhere;
        assert_eq!(decide(&spec, Transport::Udp, "10.0.2.3:53"), Verdict::Refuse(Reason::Subnet));
        spec.allow_host_loopback = false;
        assert_eq!(decide(&spec, Transport::Udp, "10.0.2.2:53"), Verdict::Refuse(Reason::HostLoopback));
    }

    #[test]
    fn the_gateway_answers_dns_and_echo_and_stands_for_loopback_when_allowed() {
        for route in [RouteKind::Remote, RouteKind::Unknown] {
            assert_eq!(decide_by(false, Transport::Udp, "10.0.2.2:53", route), Verdict::Gateway);
            assert_eq!(decide_by(true, Transport::Tcp, "[fd00::2]:53", route), Verdict::Gateway);
            assert_eq!(decide_by(false, Transport::Ping, "10.0.2.2:0", route), Verdict::Gateway);
        }
        for (to, real) in [("10.0.2.2:80", "127.0.0.1:80"), ("[fd00::2]:80", "[::1]:80")] {
            assert_eq!(
                decide_by(true, Transport::Tcp, to, RouteKind::Remote),
                Verdict::Allow(real.parse().expect(real))
            );
        }
        // Loopback itself stays refused: only the gateway stands for it.
        let verdict = decide_by(true, Transport::Tcp, "127.0.0.1:80", RouteKind::Local);
        assert_eq!(verdict, Verdict::Refuse(Reason::HostLoopback));
    }
}
