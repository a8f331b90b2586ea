//! What is wanted of the stack: plain data, and the limits that are not configurable.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use smoltcp::time::Duration;

use crate::flowlog::FlowLog;
use crate::pcap::Capture;
use crate::policy::PolicySpec;
use crate::rate::Rates;

/// Everything the stack needs to know.
#[derive(Debug, Clone)]
pub struct StackSpec {
    /// Link MTU in bytes (the IP packet, without the Ethernet header): 576 at least, with IPv6 1,280.
    pub mtu: u16,
    /// Addresses of the inside.
    pub guest: Link,
    /// Addresses of the gateway (the stack itself).
    pub gateway: Link,
    /// Whether the link carries IPv6. Without, what comes in such packets is dropped.
    pub ipv6: bool,
    /// DNS forwarder.
    pub dns: DnsSpec,
    /// What the guest may reach.
    pub policy: PolicySpec,
    /// Is told of every flow; `None` costs nothing.
    pub flow_log: Option<FlowLog>,
    /// Gets every frame that crosses the TAP; `None` costs nothing.
    pub capture: Option<Capture>,
    /// How fast data may go.
    pub rates: Rates,
    /// Addresses of the host that flows leave from.
    pub outbound: Outbound,
}

/// Addresses of the host that flows leave from; `None`: what the routing table says. What goes to the host's loopback
/// comes from there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Outbound {
    /// For IPv4.
    pub v4: Option<Ipv4Addr>,
    /// For IPv6.
    pub v6: Option<Ipv6Addr>,
}

impl Outbound {
    /// The address for what goes to `to`.
    pub(crate) fn towards(&self, to: IpAddr) -> Option<IpAddr> {
        match to {
            _ if to.is_loopback() => None,
            IpAddr::V4(_) => self.v4.map(IpAddr::from),
            IpAddr::V6(_) => self.v6.map(IpAddr::from),
        }
    }
}

impl StackSpec {
    /// The smallest MTU that the link may have.
    pub(crate) fn least_mtu(&self) -> u16 {
        if self.ipv6 { 1280 } else { 576 }
    }

    /// Whether `ip` is an address that the stack answers for.
    pub(crate) fn is_ours(&self, ip: IpAddr) -> bool {
        self.gateway.is(ip) || self.is_resolver(ip)
    }

    /// Whether the DNS forwarder is at `ip`.
    pub(crate) fn is_resolver(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => self.resolver_v4() == Some(ip),
            IpAddr::V6(ip) => self.resolver_v6() == Some(ip),
        }
    }

    /// The forwarder's IPv4 address.
    pub(crate) fn resolver_v4(&self) -> Option<Ipv4Addr> {
        match self.dns.at {
            DnsAt::Gateway => Some(self.gateway.v4.0),
            DnsAt::Addresses(v4, _) => Some(v4),
            DnsAt::Nowhere => None,
        }
    }

    /// The forwarder's IPv6 address.
    pub(crate) fn resolver_v6(&self) -> Option<Ipv6Addr> {
        match self.dns.at {
            DnsAt::Gateway => Some(self.gateway.v6.0),
            DnsAt::Addresses(_, v6) => Some(v6),
            DnsAt::Nowhere => None,
        }
    }
}

/// Addresses of one end of the TAP link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Ethernet address. That of the guest should be the TAP's own; the stack also learns it from what the guest sends.
    pub mac: [u8; 6],
    /// IPv4 address and prefix length.
    pub v4: (Ipv4Addr, u8),
    /// IPv6 address and prefix length (a ULA).
    pub v6: (Ipv6Addr, u8),
}

impl Link {
    /// The address of the same family as `like`.
    pub(crate) fn ip_like(&self, like: IpAddr) -> IpAddr {
        match like {
            IpAddr::V4(_) => self.v4.0.into(),
            IpAddr::V6(_) => self.v6.0.into(),
        }
    }

    /// Whether `ip` is this end's own address.
    pub(crate) fn is(&self, ip: IpAddr) -> bool {
        ip == self.ip_like(ip)
    }

    /// Whether `ip` lies in the link's subnet.
    pub(crate) fn contains(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.v4.1.min(32))).unwrap_or(0);
                (u32::from(ip) ^ u32::from(self.v4.0)) & mask == 0
            }
            IpAddr::V6(ip) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.v6.1.min(128))).unwrap_or(0);
                (u128::from(ip) ^ u128::from(self.v6.0)) & mask == 0
            }
        }
    }

    /// Whether `ip` is the subnet's network or broadcast address.
    pub(crate) fn is_subnet_edge(&self, ip: IpAddr) -> bool {
        let IpAddr::V4(ip) = ip else { return false };
        let host_bits = u32::MAX.checked_shr(u32::from(self.v4.1.min(32))).unwrap_or(0);
        // RFC 3021: a /31 and a /32 have no such addresses.
        host_bits > 1
            && self.contains(ip.into())
            && matches!(u32::from(ip) & host_bits, low if low == 0 || low == host_bits)
    }
}

/// The DNS forwarder.
#[derive(Debug, Clone, Default)]
pub struct DnsSpec {
    /// Where the guest finds it.
    pub at: DnsAt,
    /// Resolvers to forward to; empty: those of the host's /etc/resolv.conf, re-read when it changes.
    pub upstreams: Vec<SocketAddr>,
    /// Names answered by the forwarder itself.
    pub hosts: Vec<(String, IpAddr)>,
}

/// Where the DNS forwarder is, port 53.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DnsAt {
    /// At the gateway's addresses.
    #[default]
    Gateway,
    /// At addresses of its own, in the guest's subnets.
    Addresses(Ipv4Addr, Ipv6Addr),
    /// There is none.
    Nowhere,
}

/// A published port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publish {
    /// Host address; `None`: all, IPv4 and IPv6.
    pub host_ip: Option<IpAddr>,
    /// Port on the host; 0: any free one.
    pub host_port: u16,
    /// Address inside; `None`: the guest's, of whichever family the server there listens on.
    pub inside_ip: Option<IpAddr>,
    /// Port inside.
    pub inside_port: u16,
    /// Protocol.
    pub protocol: Protocol,
}

/// Transport protocol of a published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A published port cannot be bound.
    #[error("cannot listen on {addr}")]
    Listen {
        /// The address on the host.
        addr: SocketAddr,
        /// For what.
        protocol: Protocol,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// The stack has ended, so it obeys no commands any more.
    #[error("the network stack does not run any more")]
    Stopped,
    /// IPv6 asks for 1,280 bytes from every link (RFC 8200 section 5), and IPv4 for 576 from every host (RFC 791).
    #[error("an MTU of {mtu} is too small: this link needs {least}")]
    SmallMtu {
        /// The link's.
        mtu: u16,
        /// What it must have.
        least: u16,
    },
    /// The descriptor is not a TAP made by [`open_tap`](crate::open_tap).
    #[error("the descriptor is not a TAP with virtio headers")]
    NotATap,
    /// The stack's thread or one of its descriptors cannot be made.
    #[error("cannot start the network stack: {what}")]
    Start {
        /// What was being made.
        what: &'static str,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
}

/// Bytes of each of the two rings of a TCP flow that begins while there are so many others, or fewer. The window scale
/// follows from it, so it stays as it is. Only what is used becomes memory, but a guest may use all of it, and whoever
/// has thousands of connections fills none of them as fast as a single one: so all of them together never have more
/// than 672 MiB.
pub(crate) const RINGS: [(usize, usize); 3] =
    [(63, LARGEST_RING), (511, 128 * 1024), (MAX_TCP_FLOWS, 16 * 1024)];
pub(crate) const LARGEST_RING: usize = 512 * 1024;
/// Largest rings kept for the next flow instead of being unmapped.
pub(crate) const RING_POOL: usize = 32;
/// TCP flows at once, whatever the descriptor limit.
pub(crate) const MAX_TCP_FLOWS: usize = 16_384;
/// TCP flows that the guest began, and joined ones, whose other end has not answered yet, at once (half of the descriptors
/// if that is fewer). Joined ones are half of them at most. As each of those has two descriptors, half-open flows have
/// three quarters of the descriptors at worst.
///
/// Those that cross the TAP to published ports are not counted: others begin them, who could keep the guest from connecting
/// so, while its kernel answers a SYN at once unless the server's backlog is full. They wait for [`INBOUND_CONNECT`] at most, at
/// either place of the server, and give way after [`HALF_OPEN_SPARE`] when the guest begins a flow for which there is no
/// room: of [`MAX_TCP_FLOWS`], or no descriptor.
pub(crate) const MAX_HALF_OPEN: usize = 2_048;
/// A queue of flows, or a table of peers, may have so much more than twice the entries that are alive.
pub(crate) const QUEUE_SLACK: usize = 64;
/// For so many descriptors there is room from the start (64 KiB of the kernel's memory), if so many are allowed.
pub(crate) const DESCRIPTOR_ROOM: usize = 8_192;
/// How long the other end must have been silent before its flow gives way to another, when descriptors run out or there are
/// too many flows.
pub(crate) const HALF_OPEN_SPARE: Duration = Duration::from_secs(1);
/// How long the guest may leave data or a FIN of ours unacknowledged before the flow is given up. Its kernel answers
/// even window probes, whatever its programs do, so silence means that it is gone.
pub(crate) const GUEST_SILENCE: Duration = Duration::from_secs(180);
/// How long the guest may say nothing on a connection whose end it has acknowledged before it is asked whether it still has
/// it. Its own end, or its RST, may have been lost where the TAP's queue was full, and nobody says a RST twice.
pub(crate) const FIN_WAIT_PROBE: Duration = Duration::from_secs(60);
/// How long the guest has to answer the SYN of a connection to a published port.
pub(crate) const INBOUND_CONNECT: Duration = Duration::from_secs(10);
/// How long a connection from the host's loopback waits for a socket of the guest's namespace, which is there at once unless
/// something is wrong.
pub(crate) const INSIDE_SOCKET: Duration = Duration::from_secs(1);
/// Connections in a row for which it did not come in time, and then no more is asked for: whoever was stopped, as the
/// program's own processes may be from inside, would cost each connection that time.
pub(crate) const INSIDE_LATE: u32 = 3;
/// For how long; then for one connection, to see whether an answer comes again, and so on. Who is late need not be lost: a
/// control group that was frozen goes on, and in `rootlet run` it is init, which has the payload to start first.
pub(crate) const INSIDE_PAUSE: Duration = Duration::from_secs(30);

/// Pipes at once that connections from the host's loopback to published ports have data in, and the bytes that each of
/// them takes. Beyond that the data is copied.
pub(crate) const MAX_PIPES: usize = 64;
pub(crate) const JOIN_PIPE: i32 = 256 * 1024;
/// How long the guest's last data is waited for when the stack is to end: after the last of it, and in all.
pub(crate) const LAST_DATA_QUIET: std::time::Duration = std::time::Duration::from_secs(1);
pub(crate) const LAST_DATA_MOST: std::time::Duration = std::time::Duration::from_secs(10);

/// UDP sockets at once (a quarter of the descriptors if that is fewer).
pub(crate) const MAX_UDP_SOCKETS: usize = 4_096;
/// Destinations remembered for each UDP socket.
pub(crate) const MAX_UDP_PEERS: usize = 64;
/// How long what the policy said about a destination of a UDP flow holds.
pub(crate) const VERDICT_AGE: Duration = Duration::from_secs(2);
/// Datagrams that one super-segment of the guest's may hold; the kernel makes none with more (UDP_MAX_SEGMENTS).
pub(crate) const MAX_SUPER_SEGMENT: usize = 128;
/// Refused flows that are told at once to whoever listens.
pub(crate) const REFUSALS_TOLD: u64 = 1_000;
/// Refused flows that are told each second after that.
pub(crate) const REFUSALS_TOLD_PER_SECOND: u64 = 100;
/// How long a UDP flow must have been idle before it gives way to a connection, when descriptors run out.
pub(crate) const UDP_SPARE: Duration = Duration::from_secs(5);
/// Flows of published UDP ports at once.
pub(crate) const MAX_UDP_INBOUND: usize = 4_096;
/// Idle time of a UDP flow that got an answer (RFC 4787 REQ-5 asks for two minutes at least).
pub(crate) const UDP_IDLE: Duration = Duration::from_secs(180);
/// Idle time of a UDP flow that got none.
pub(crate) const UDP_UNANSWERED: Duration = Duration::from_secs(60);
/// Idle time of a UDP flow to port 53.
pub(crate) const UDP_DNS_IDLE: Duration = Duration::from_secs(15);

/// Ping sockets at once.
pub(crate) const MAX_PINGS: usize = 64;
/// Idle time of a ping socket.
pub(crate) const PING_IDLE: Duration = Duration::from_secs(30);

/// DNS queries under way at once.
pub(crate) const MAX_DNS_QUERIES: usize = 128;
/// Who waits for them, at once: the same question of several is asked once.
pub(crate) const MAX_DNS_WAITERS: usize = 1_024;
/// Longest answer in one datagram to the guest, whatever the guest says that it takes. The TAP loses no fragments.
pub(crate) const MAX_DNS_DATAGRAM: usize = 4_096;
/// Answers that are kept, and their bytes.
pub(crate) const MAX_DNS_CACHE: usize = 4_096;
pub(crate) const MAX_DNS_CACHE_BYTES: usize = 1 << 20;
/// How long an answer is kept at most, in seconds: a day. One that says no: half a minute, because a network that the host
/// has just joined may have what the last one had not, and resolvers that follow it do not look changed from here.
pub(crate) const MAX_DNS_TTL: u32 = 86_400;
pub(crate) const MAX_DNS_NEGATIVE_TTL: u32 = 30;
/// The same if all resolvers are on the host's loopback: those keep answers themselves, and they alone know when the
/// host has joined another network. This saves asking them for every program that starts.
pub(crate) const MAX_DNS_LOCAL_TTL: u32 = 5;
/// Time for one resolver to answer, unless the host's resolv.conf says otherwise. Three tries stay below the five
/// seconds that a libc waits.
pub(crate) const DNS_TRY: Duration = Duration::from_millis(1_500);
/// TCP connections to the forwarder at once.
pub(crate) const MAX_DNS_CONNECTIONS: usize = 128;
/// Queries under way on one TCP connection to the forwarder.
pub(crate) const MAX_DNS_PIPELINE: usize = 16;
/// Idle time of a TCP connection to the forwarder (RFC 7766 section 6.2.3: a few seconds).
pub(crate) const DNS_TCP_IDLE: Duration = Duration::from_secs(10);

/// Addresses that are known to be those of a name, at once.
pub(crate) const MAX_PINS: usize = 4_096;
/// Names of one address.
pub(crate) const MAX_PIN_NAMES: usize = 16;
/// Targets of services, and addresses, that are remembered of one answer. One of 64 KiB has thousands, which would drive
/// out all others. No set of addresses that is meant to be used has so many: 75 fit into the datagrams we ask for.
pub(crate) const MAX_DNS_TARGETS: usize = 16;
pub(crate) const MAX_DNS_ADDRESSES: usize = 256;
/// Names of one address, and those whose services lead to them.
pub(crate) const MAX_KNOWN_NAMES: usize = 64;
/// How much longer than its answer's time to live an address is known to be that of a name: programs keep addresses for
/// a while before they use them.
pub(crate) const PIN_GRACE: Duration = Duration::from_secs(300);

/// Datagrams being put together from fragments at once.
pub(crate) const MAX_REASSEMBLIES: usize = 64;
/// How long fragments wait for the rest (RFC 8200 section 4.5: 60 seconds).
pub(crate) const REASSEMBLY: Duration = Duration::from_secs(30);

/// What a lease of DHCP holds.
pub(crate) const LEASE: Duration = Duration::from_secs(86_400);
/// How long a router advertisement holds (RFC 8319: the most there is).
pub(crate) const ROUTER_LIFETIME: Duration = Duration::from_secs(65_535);
/// When it is repeated, if the guest has asked for one.
pub(crate) const ROUTER_REFRESH: Duration = Duration::from_secs(65_535 / 3);

/// Bytes of a capture that wait for its file.
pub(crate) const CAPTURE_BUFFER: usize = 16 << 20;

/// Frames towards the guest that wait for the TAP to take them.
pub(crate) const MAX_PENDING_FRAMES: usize = 1_024;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The addresses that the tests of this crate use.
    pub(crate) fn spec() -> StackSpec {
        StackSpec {
            mtu: 1500,
            guest: Link {
                mac: [0x52, 0x54, 0, 0, 0, 2],
                v4: (Ipv4Addr::new(10, 0, 2, 100), 24),
                v6: ("fd00::100".parse().expect("address"), 64),
            },
            gateway: Link {
                mac: [0x52, 0x54, 0, 0, 0, 1],
                v4: (Ipv4Addr::new(10, 0, 2, 2), 24),
                v6: ("fd00::2".parse().expect("address"), 64),
            },
            ipv6: true,
            dns: DnsSpec::default(),
            policy: PolicySpec::default(),
            flow_log: None,
            capture: None,
            rates: Rates::default(),
            outbound: Outbound::default(),
        }
    }

    #[test]
    fn the_rings_of_all_flows_together_are_bounded() {
        let mut most = 0;
        let mut flows = 0;
        for (others, ring) in RINGS {
            let until = (others + 1).min(MAX_TCP_FLOWS);
            most += (until - flows) * 2 * ring;
            flows = until;
        }
        assert_eq!((flows, most), (MAX_TCP_FLOWS, 672 << 20));
    }

    #[test]
    fn subnets_and_their_edges() {
        let link = spec().guest;
        let ip = |text: &str| text.parse::<IpAddr>().expect("address");
        assert!(link.contains(ip("10.0.2.255")) && !link.contains(ip("10.0.3.1")));
        assert!(link.contains(ip("fd00::1")) && !link.contains(ip("fd00:0:0:1::1")));
        assert!(link.is_subnet_edge(ip("10.0.2.255")) && link.is_subnet_edge(ip("10.0.2.0")));
        assert!(!link.is_subnet_edge(ip("10.0.2.1")) && !link.is_subnet_edge(ip("10.0.3.255")));
        let whole = Link { v4: (link.v4.0, 0), v6: (link.v6.0, 0), ..link };
        assert!(whole.contains(ip("192.0.2.1")) && whole.contains(ip("2001:db8::1")));
        let single = Link { v4: (link.v4.0, 32), v6: (link.v6.0, 128), ..link };
        assert!(!single.contains(ip("10.0.2.101")) && !single.is_subnet_edge(ip("10.0.2.100")));
    }
}
