//! Published ports: host sockets that lead into the guest.
//!
//! They are bound before anything else is started ([`Published::bind`]), all or none, so that a busy port is an error of
//! the caller's and not of a sandbox that runs already. A port without a host address is bound twice, for IPv4 and for
//! IPv6, with the same number. While the stack runs, ports come and go by [`Control`](crate::Control).
//!
//! The guest sees the peer's own address, unless that means something else inside: loopback, link-local, and what looks
//! like the guest's own subnet appear as the gateway. If the server inside does not listen on the peer's own family the
//! other one is tried, and the peer appears as the gateway, too (see [`ways`]).

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{
    Backlog, SockFlag, SockType, SockaddrStorage, bind, getsockname, listen, setsockopt, socket, sockopt,
};
use smoltcp::time::{Duration, Instant};

use crate::calls::getpeername;
use crate::config::{Error, Link, Outbound, Protocol, Publish};
use crate::flow::{Endpoint, FlowId, FlowKey, Slab, TimerKey};
use crate::host::{self, Budget, HostFd};
use crate::inside::InsideSockets;
use crate::join::Join;
use crate::shared::{Shared, Token};
use crate::tcp::Tcp;
use crate::udp::{self, Arrival, Udp};

/// Connections taken from one listener before others get their turn.
const TURN: usize = 64;
/// When a listener that got no descriptor tries again, if none of ours was closed meanwhile.
const STARVED_RETRY: Duration = Duration::from_secs(1);
/// How often another pair of free ports is looked for, if the one found for IPv4 is taken for IPv6.
const PORT_TRIES: usize = 32;
/// Descriptors for flows, however many the published ports have.
const LEAST_FOR_FLOWS: usize = 16;

#[derive(Debug)]
struct Bound {
    fd: OwnedFd,
    addr: SocketAddr,
}

/// The sockets of one published port.
#[derive(Debug)]
pub(crate) struct BoundPort {
    asked: Publish,
    sockets: Vec<Bound>,
}

/// Host sockets bound for published ports, before anything else is started.
#[derive(Debug, Default)]
pub struct Published {
    ports: Vec<BoundPort>,
    pub(crate) inside: Option<InsideSockets>,
}

impl Published {
    /// Binds every port or none.
    ///
    /// # Errors
    ///
    /// The first address that cannot be bound, and why.
    pub fn bind(ports: &[Publish]) -> Result<Self, Error> {
        let ports = ports.iter().map(bind_port).collect::<Result<_, _>>()?;
        Ok(Self { ports, inside: None })
    }

    /// Has TCP connections from the host's loopback joined to sockets of the guest's namespace: they do not cross the TAP,
    /// which is a good deal faster, and the server inside sees them come from the guest's own address instead of the
    /// gateway's.
    #[must_use]
    pub fn through(self, inside: InsideSockets) -> Self {
        Self { inside: Some(inside), ..self }
    }

    /// What is bound, in the order of the ports given to [`Published::bind`]: address, protocol and port inside.
    pub fn addresses(&self) -> impl Iterator<Item = (SocketAddr, Protocol, u16)> {
        self.ports.iter().flat_map(|port| {
            port.sockets.iter().map(|bound| (bound.addr, port.asked.protocol, port.asked.inside_port))
        })
    }

    pub(crate) fn into_ports(self) -> Vec<BoundPort> {
        self.ports
    }

    fn sockets(&self) -> usize {
        self.ports.iter().map(|port| port.sockets.len()).sum()
    }
}

/// Name of a published port of one stack; never used again for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortId(pub u64);

/// A port that is published now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedPort {
    /// Its name.
    pub id: PortId,
    /// What was asked for.
    pub asked: Publish,
    /// Where it is bound on the host.
    pub addresses: Vec<SocketAddr>,
}

/// Binds one port, for both families if no address is given.
pub(crate) fn bind_port(port: &Publish) -> Result<BoundPort, Error> {
    Ok(BoundPort { asked: port.clone(), sockets: bind_sockets(port)? })
}

fn bind_sockets(port: &Publish) -> Result<Vec<Bound>, Error> {
    if let Some(ip) = port.host_ip {
        return Ok(vec![bind_one(SocketAddr::new(ip, port.host_port), port)?]);
    }
    let mut tries = 0;
    loop {
        let v4 = bind_one((Ipv4Addr::UNSPECIFIED, port.host_port).into(), port)?;
        match bind_one((Ipv6Addr::UNSPECIFIED, v4.addr.port()).into(), port) {
            Ok(v6) => return Ok(vec![v4, v6]),
            // A host without IPv6.
            Err(Error::Listen { source, .. })
                if matches!(
                    source.raw_os_error().map(Errno::from_raw),
                    Some(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL)
                ) =>
            {
                return Ok(vec![v4]);
            }
            Err(error) => {
                tries += 1;
                if port.host_port != 0 || tries >= PORT_TRIES {
                    return Err(error);
                }
            }
        }
    }
}

fn bind_one(addr: SocketAddr, port: &Publish) -> Result<Bound, Error> {
    let open = || -> nix::Result<(OwnedFd, SocketAddr)> {
        let kind = match port.protocol {
            Protocol::Tcp => SockType::Stream,
            Protocol::Udp => SockType::Datagram,
        };
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket(host::family(addr.ip()), kind, flags, None)?;
        if addr.is_ipv6() {
            setsockopt(&fd, sockopt::Ipv6V6Only, &true)?;
        }
        if port.protocol == Protocol::Tcp {
            // Connections of an earlier run in TIME-WAIT are no reason to fail. (A listener still is.)
            setsockopt(&fd, sockopt::ReuseAddr, &true)?;
        } else {
            udp::want_local_address(&fd, addr.is_ipv6())?;
        }
        bind(fd.as_raw_fd(), &SockaddrStorage::from(addr))?;
        if port.protocol == Protocol::Tcp {
            listen(&fd, Backlog::MAXCONN)?;
        }
        let name: SockaddrStorage = getsockname(fd.as_raw_fd())?;
        Ok((fd, udp::socket_addr(&name).unwrap_or(addr)))
    };
    match open() {
        Ok((fd, addr)) => Ok(Bound { fd, addr }),
        Err(errno) => Err(Error::Listen { addr, protocol: port.protocol, source: errno.into() }),
    }
}

/// A socket of a published port.
#[derive(Debug)]
struct Socket {
    fd: HostFd,
    inside: Inside,
}

/// Where a published port leads.
#[derive(Debug, Clone, Copy)]
struct Inside {
    ip: Option<IpAddr>,
    port: u16,
}

/// Where a socket is kept.
#[derive(Debug, Clone, Copy)]
enum Place {
    Tcp(FlowId),
    Udp(FlowId),
}

#[derive(Debug)]
struct Port {
    asked: Publish,
    addresses: Vec<SocketAddr>,
    places: Vec<Place>,
}

/// The published ports of a running stack.
#[derive(Debug, Default)]
pub(crate) struct Forward {
    ports: BTreeMap<PortId, Port>,
    last: u64,
    tcp: Slab<Socket>,
    udp: Slab<Socket>,
    /// Listeners with more connections than one turn takes.
    eager: Vec<FlowId>,
    /// Listeners that could not accept for want of descriptors, and whether they got some before that.
    starved: Vec<(FlowId, bool)>,
}

impl Forward {
    /// Takes over the bound sockets and watches them.
    pub(crate) fn new(sh: &mut Shared, published: Published) -> nix::Result<Self> {
        let mut forward = Self::default();
        for port in published.ports {
            forward.insert(sh, port)?;
        }
        Ok(forward)
    }

    fn insert(&mut self, sh: &mut Shared, port: BoundPort) -> nix::Result<PortId> {
        let BoundPort { asked, sockets } = port;
        let inside = Inside { ip: asked.inside_ip, port: asked.inside_port };
        let addresses = sockets.iter().map(|bound| bound.addr).collect();
        let mut places = Vec::with_capacity(sockets.len());
        let mut watched = Ok(());
        for bound in sockets {
            let socket = Socket { fd: sh.budget.hold(bound.fd), inside };
            let (place, added) = match asked.protocol {
                Protocol::Tcp => {
                    let id = self.tcp.insert_with(|_| socket);
                    // Edge-triggered, so that a listener which may not accept does not spin.
                    let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
                    (Place::Tcp(id), self.watch(sh, Token::TcpListener(id), flags))
                }
                Protocol::Udp => {
                    udp::want_runs(sh, &socket.fd);
                    let id = self.udp.insert_with(|_| socket);
                    (Place::Udp(id), self.watch(sh, Token::UdpListener(id), udp::READABLE))
                }
            };
            places.push(place);
            watched = watched.and(added);
        }
        if let Err(errno) = watched {
            self.close(&places);
            return Err(errno);
        }
        self.last += 1;
        let id = PortId(self.last);
        self.ports.insert(id, Port { asked, addresses, places });
        Ok(id)
    }

    fn watch(&self, sh: &Shared, token: Token, flags: EpollFlags) -> nix::Result<()> {
        let socket = match token {
            Token::TcpListener(id) => self.tcp.get(id),
            Token::UdpListener(id) => self.udp.get(id),
            _ => None,
        };
        sh.watch(socket.ok_or(Errno::EBADF)?.fd.as_fd(), token, flags)
    }

    fn close(&mut self, places: &[Place]) {
        for place in places {
            match *place {
                Place::Tcp(id) => drop(self.tcp.remove(id)),
                Place::Udp(id) => drop(self.udp.remove(id)),
            }
        }
    }

    /// Takes over a port while the stack runs.
    pub(crate) fn add(&mut self, sh: &mut Shared, port: BoundPort) -> Result<PublishedPort, Error> {
        let Some(addr) = port.sockets.first().map(|bound| bound.addr) else { return Err(Error::Stopped) };
        let protocol = port.asked.protocol;
        let refused = |errno: Errno| Error::Listen { addr, protocol, source: errno.into() };
        self.check_room(sh, port.sockets.len()).map_err(refused)?;
        let id = self.insert(sh, port).map_err(refused)?;
        self.get(id).ok_or(Error::Stopped)
    }

    /// Whether there are descriptors for so many sockets more.
    fn check_room(&self, sh: &Shared, sockets: usize) -> nix::Result<()> {
        // As connections: names and datagrams must still get descriptors.
        sh.budget.check_leaving(sh.budget.reserve() + sockets)?;
        // And so must connections, when those that there are have ended.
        let ports = self.tcp.len() + self.udp.len() + sockets;
        if ports + sh.budget.reserve() + LEAST_FOR_FLOWS > sh.budget.limit {
            return Err(Errno::EMFILE);
        }
        Ok(())
    }

    /// Whether all of these could be added, before they are bound: many at once may be more than the process has descriptors.
    pub(crate) fn check_room_for(&self, sh: &Shared, ports: &[Publish]) -> Result<(), Error> {
        let Some(first) = ports.first() else { return Ok(()) };
        let sockets = ports.iter().map(|port| if port.host_ip.is_some() { 1 } else { 2 }).sum();
        self.check_room(sh, sockets).map_err(|errno| Error::Listen {
            addr: (first.host_ip.unwrap_or(Ipv4Addr::UNSPECIFIED.into()), first.host_port).into(),
            protocol: first.protocol,
            source: errno.into(),
        })
    }

    /// Closes a port; what it was. Flows that came through it go on, but for datagrams, which could not be answered.
    pub(crate) fn remove(&mut self, sh: &mut Shared, udp: &mut Udp, id: PortId) -> Option<PublishedPort> {
        let was = self.get(id)?;
        let port = self.ports.remove(&id)?;
        for place in &port.places {
            if let Place::Udp(id) = place {
                udp.forget_port(sh, *id);
            }
        }
        self.close(&port.places);
        sh.descriptor_freed = true;
        Some(was)
    }

    fn get(&self, id: PortId) -> Option<PublishedPort> {
        let port = self.ports.get(&id)?;
        Some(PublishedPort { id, asked: port.asked.clone(), addresses: port.addresses.clone() })
    }

    /// What is published.
    pub(crate) fn list(&self) -> Vec<PublishedPort> {
        self.ports.keys().filter_map(|&id| self.get(id)).collect()
    }

    /// The socket that datagrams to a published port came to.
    pub(crate) fn udp_socket(&self, id: FlowId) -> Option<&HostFd> {
        self.udp.get(id).map(|socket| &socket.fd)
    }

    /// Connections wait at a listener.
    pub(crate) fn accept(
        &mut self,
        sh: &mut Shared,
        now: Instant,
        id: FlowId,
        tcp: &mut Tcp,
        join: &mut Join,
    ) {
        let Some(Socket { fd: listener, inside }) = self.tcp.get(id) else { return };
        for accepted in 0..TURN {
            // Who gets no answer inside makes room, or a flood at one port would take those of the others.
            if sh.budget.is_short() && !join.spare(sh) && !tcp.spare(sh) {
                return self.starve(sh, now, id, accepted > 0);
            }
            let fd = match crate::sys::accept(listener.as_fd()) {
                Ok(fd) => fd,
                Err(Errno::EAGAIN) => return,
                // The connection was gone before we came (accept(2)).
                Err(Errno::ECONNABORTED | Errno::EINTR | Errno::EPROTO) => continue,
                Err(errno) => {
                    tracing::debug!(%errno, "a published port cannot accept");
                    return self.starve(sh, now, id, accepted > 0);
                }
            };
            let peer =
                getpeername::<SockaddrStorage>(fd.as_raw_fd()).ok().as_ref().and_then(udp::socket_addr);
            // Without a name the peer is gone already.
            let Some(peer) = peer else { continue };
            let ways = ways(&sh.spec.guest, &sh.spec.gateway, peer, *inside);
            let fd = sh.budget.hold(fd);
            if let Err(fd) = join.begin(sh, now, fd, peer, ways) {
                tcp.inbound(sh, now, fd, ways);
            }
        }
        self.eager.push(id);
    }

    /// The listener is tried again when one of our descriptors is closed, or in a while; after those that got nothing
    /// if it has been `served`.
    fn starve(&mut self, sh: &mut Shared, now: Instant, id: FlowId, served: bool) {
        if self.starved.is_empty() {
            sh.timers.set(now + STARVED_RETRY, TimerKey::Accept);
        }
        if !self.starved.iter().any(|&(waits, _)| waits == id) {
            sh.stats.refused_by_limit.one();
            self.starved.push((id, served));
        }
    }

    /// Whether there are listeners that wait for descriptors.
    pub(crate) fn is_starved(&self) -> bool {
        !self.starved.is_empty()
    }

    /// Listeners to go on with, since they had more than one turn takes.
    pub(crate) fn take_eager(&mut self) -> Vec<FlowId> {
        std::mem::take(&mut self.eager)
    }

    pub(crate) fn is_eager(&self) -> bool {
        !self.eager.is_empty()
    }

    /// Listeners that had to stop, to be tried again. Those come first that got nothing the last time, or the first would
    /// take every descriptor that is closed.
    pub(crate) fn take_starved(&mut self) -> Vec<FlowId> {
        let mut starved = std::mem::take(&mut self.starved);
        starved.sort_by_key(|&(_, served)| served);
        starved.into_iter().map(|(id, _)| id).collect()
    }

    /// Datagrams wait at a published socket.
    pub(crate) fn receive(&mut self, sh: &mut Shared, now: Instant, id: FlowId, udp: &mut Udp) {
        let Some(Socket { fd, inside }) = self.udp.get(id) else { return };
        udp::read_all(sh, Token::UdpListener(id), fd, |sh, payload, peer, local| {
            let ways = ways(&sh.spec.guest, &sh.spec.gateway, peer, *inside);
            udp.inbound(sh, now, Arrival { port: id, real: peer, local, ways }, payload);
        });
    }
}

/// The two ways to a server inside: with the peer's own address, and, where nothing listens there, by the other family
/// with the gateway's.
///
/// Where the guest cannot be shown the peer's own address it is the gateway's both times, and IPv4 comes first whatever
/// the peer came by: `localhost` means ::1 to many clients, and a server that listens on IPv4 only is more common than one
/// on IPv6 only. Where the server's address is given, there is one way.
fn ways(guest: &Link, gateway: &Link, peer: SocketAddr, inside: Inside) -> [FlowKey; 2] {
    let ip = peer.ip();
    let strange = match ip {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_link_local() || ip.is_unspecified() || ip.is_multicast(),
        IpAddr::V6(ip) => {
            ip.is_loopback() || ip.is_unicast_link_local() || ip.is_unspecified() || ip.is_multicast()
        }
    };
    let gateways: [IpAddr; 2] = [gateway.v4.0.into(), gateway.v6.0.into()];
    let seen = match ip {
        _ if strange || guest.contains(ip) => gateways,
        IpAddr::V4(_) => [ip, gateways[1]],
        IpAddr::V6(_) => [ip, gateways[0]],
    };
    let seen = match inside.ip {
        None => seen,
        Some(to) => [seen.into_iter().find(|from| from.is_ipv4() == to.is_ipv4()).unwrap_or(ip); 2],
    };
    seen.map(|from| FlowKey {
        guest: Endpoint::new(inside.ip.unwrap_or(guest.ip_like(from)), inside.port),
        remote: Endpoint::new(from, peer.port()),
    })
}

/// The sockets of published ports count. They are taken from the stack's share and the rest's alike, and some are left for
/// flows however many ports there are.
pub(crate) fn budget_for(published: &Published, outbound: Outbound) -> Budget {
    let mut budget = Budget::from_rlimit();
    budget.outbound = outbound;
    add_ports(&mut budget, published.sockets());
    budget
}

fn add_ports(budget: &mut Budget, sockets: usize) {
    budget.limit = (budget.limit + sockets / 2).max(sockets + LEAST_FOR_FLOWS);
    budget.ports = sockets;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream, UdpSocket};

    fn publish(host_ip: Option<&str>, host_port: u16, protocol: Protocol) -> Publish {
        let host_ip = host_ip.map(|ip| ip.parse().expect(ip));
        Publish { host_ip, host_port, inside_ip: None, inside_port: 80, protocol }
    }

    #[test]
    fn a_port_without_an_address_is_bound_for_both_families() {
        let published = Published::bind(&[publish(None, 0, Protocol::Tcp)]).expect("bound");
        let bound: Vec<_> = published.addresses().collect();
        assert_eq!(bound.len(), 2);
        assert_eq!(bound[0].0.port(), bound[1].0.port());
        assert_ne!(bound[0].0.port(), 0);
        for ip in ["127.0.0.1", "::1"] {
            TcpStream::connect((ip, bound[0].0.port())).expect(ip);
        }
    }

    #[test]
    fn ports_leave_descriptors_to_flows() {
        for (limit, sockets) in [(16, 0), (16, 1_000), (512, 2_000), (4_096, 100), (4_096, 20_000)] {
            let mut budget = Budget::new(limit);
            add_ports(&mut budget, sockets);
            let tcp = budget.limit - sockets - budget.reserve();
            assert!(tcp >= LEAST_FOR_FLOWS * 7 / 8, "{limit} {sockets}: {tcp}");
        }
    }

    #[test]
    fn all_are_bound_or_none() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("listener");
        let addr = taken.local_addr().expect("address");
        let free = UdpSocket::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("address");
        let ports = [
            publish(Some("127.0.0.1"), free.port(), Protocol::Udp),
            publish(Some("127.0.0.1"), addr.port(), Protocol::Tcp),
        ];
        match Published::bind(&ports) {
            Err(Error::Listen { addr: failed, protocol, source }) => {
                assert_eq!((failed, protocol), (addr, Protocol::Tcp));
                assert_eq!(source.kind(), std::io::ErrorKind::AddrInUse);
            }
            other => panic!("{other:?}"),
        }
        UdpSocket::bind(free).expect("the first one was let go");
    }

    #[test]
    fn peers_that_mean_something_else_inside_appear_as_the_gateway() {
        let spec = crate::config::tests::spec();
        for (peer, first, second) in [
            ("127.0.0.1:5", "10.0.2.2", "fd00::2"),
            ("[::1]:5", "10.0.2.2", "fd00::2"),
            ("[fe80::1]:5", "10.0.2.2", "fd00::2"),
            ("10.0.2.100:5", "10.0.2.2", "fd00::2"),
            ("10.0.2.77:5", "10.0.2.2", "fd00::2"),
            ("[fd00::77]:5", "10.0.2.2", "fd00::2"),
            ("192.0.2.7:5", "192.0.2.7", "fd00::2"),
            ("[2001:db8::7]:5", "2001:db8::7", "10.0.2.2"),
        ] {
            let ways = {
                let inside = Inside { ip: None, port: 80 };
                ways(&spec.guest, &spec.gateway, peer.parse().expect(peer), inside)
            };
            for (way, seen) in ways.into_iter().zip([first, second]) {
                let seen: IpAddr = seen.parse().expect(seen);
                assert_eq!(way.remote, Endpoint::new(seen, 5), "{peer}");
                assert_eq!(way.guest, Endpoint::new(spec.guest.ip_like(seen), 80), "{peer}");
            }
        }
    }
}
