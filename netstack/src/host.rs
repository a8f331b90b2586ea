//! The host's side: sockets with the caller's ordinary rights, descriptors that are counted, and the routing table.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect,
    recv, send, setsockopt, socket, sockopt,
};

use crate::policy::RouteKind;

/// How many descriptors the stack may use, and does. The rest of the process keeps the others: at a limit of 1,024
/// half of them, at larger limits a quarter.
#[derive(Debug, Clone)]
pub(crate) struct Budget {
    used: Arc<AtomicUsize>,
    pub(crate) limit: usize,
}

impl Budget {
    /// Reads the process's limit.
    pub(crate) fn from_rlimit() -> Self {
        use nix::sys::resource::{Resource, getrlimit};
        let soft = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
        let soft = usize::try_from(soft).unwrap_or(usize::MAX).min(1 << 20);
        Self::new(soft - (soft / 4).max((soft / 2).min(512)))
    }

    pub(crate) fn new(limit: usize) -> Self {
        Self { used: Arc::default(), limit }
    }

    /// Counts `fd` for as long as it lives.
    pub(crate) fn hold(&self, fd: OwnedFd) -> HostFd {
        self.used.fetch_add(1, Ordering::Relaxed);
        HostFd { fd, used: Arc::clone(&self.used) }
    }

    /// Whether one more may be opened.
    pub(crate) fn check(&self) -> nix::Result<()> {
        self.check_leaving(0)
    }

    /// Whether one more may be opened, with `rest` left for others then.
    pub(crate) fn check_leaving(&self, rest: usize) -> nix::Result<()> {
        if self.used.load(Ordering::Relaxed) + rest < self.limit { Ok(()) } else { Err(Errno::EMFILE) }
    }
}

/// A descriptor of the host's side.
#[derive(Debug)]
pub(crate) struct HostFd {
    fd: OwnedFd,
    used: Arc<AtomicUsize>,
}

impl Drop for HostFd {
    fn drop(&mut self) {
        self.used.fetch_sub(1, Ordering::Relaxed);
    }
}

impl AsFd for HostFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for HostFd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// The address family of `ip`.
pub(crate) fn family(ip: IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

const FLAGS: SockFlag = SockFlag::SOCK_NONBLOCK.union(SockFlag::SOCK_CLOEXEC);

/// Opens a TCP socket and begins to connect it; whether it is connected already. `rest` descriptors are left for others:
/// a guest full of connections must still be able to resolve names.
pub(crate) fn tcp_connect(budget: &Budget, to: SocketAddr, rest: usize) -> nix::Result<(HostFd, bool)> {
    budget.check_leaving(rest)?;
    let fd = socket(family(to.ip()), SockType::Stream, FLAGS, None)?;
    tune_tcp(fd.as_fd());
    let connected = match connect(fd.as_raw_fd(), &SockaddrStorage::from(to)) {
        Ok(()) => true,
        Err(Errno::EINPROGRESS) => false,
        Err(errno) => return Err(errno),
    };
    Ok((budget.hold(fd), connected))
}

/// Options of every TCP socket. None is needed for the flow to work, so failures are ignored.
pub(crate) fn tune_tcp(fd: BorrowedFd<'_>) {
    // The guest's own stack has already decided what to send at once.
    let _ = setsockopt(&fd, sockopt::TcpNoDelay, &true);
    // Urgent data stays in its place in the stream (RFC 6093 section 4).
    let _ = setsockopt(&fd, sockopt::OobInline, &true);
    // A peer that vanished is noticed, even if the guest relies on its own probes, which end here.
    let _ = setsockopt(&fd, sockopt::KeepAlive, &true);
}

/// Makes the descriptor's end a reset instead of a close.
pub(crate) fn reset_on_close(fd: BorrowedFd<'_>) {
    let _ = setsockopt(&fd, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 });
}

/// The pending error of a socket.
pub(crate) fn socket_error(fd: BorrowedFd<'_>) -> Option<Errno> {
    match nix::sys::socket::getsockopt(&fd, sockopt::SocketError) {
        Ok(0) => None,
        Ok(errno) => Some(Errno::from_raw(errno)),
        Err(errno) => Some(errno),
    }
}

/// Opens a datagram socket of the kind `protocol` (`None`: UDP) whose error queue tells of ICMP errors.
pub(crate) fn datagram_socket(
    budget: &Budget,
    ip: IpAddr,
    protocol: Option<SockProtocol>,
) -> nix::Result<HostFd> {
    budget.check()?;
    let fd = socket(family(ip), SockType::Datagram, FLAGS, protocol)?;
    let _ = match ip {
        IpAddr::V4(_) => setsockopt(&fd, sockopt::Ipv4RecvErr, &true),
        IpAddr::V6(_) => setsockopt(&fd, sockopt::Ipv6RecvErr, &true),
    };
    Ok(budget.hold(fd))
}

/// Asks the host's routing table what an address is. One netlink round trip (some microseconds) for each new flow:
/// always right, also for addresses that came a moment ago and for local routes to whole ranges, neither of which a
/// list of the interfaces' addresses would show.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    socket: Option<OwnedFd>,
    sequence: u32,
}

const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const NLM_F_REQUEST: u16 = 1;
const RTA_DST: u16 = 1;
const NLMSG_HEADER: usize = 16;
const RTMSG: usize = 12;

impl Routes {
    pub(crate) fn kind_of(&mut self, ip: IpAddr) -> RouteKind {
        match self.ask(ip) {
            Ok(kind) => kind,
            Err(errno) => {
                tracing::debug!(%errno, %ip, "no answer from the routing table");
                self.socket = None;
                Self::kind_by_source(ip)
            }
        }
    }

    fn ask(&mut self, ip: IpAddr) -> nix::Result<RouteKind> {
        let fd = match &self.socket {
            Some(fd) => fd,
            None => {
                let route = SockProtocol::NetlinkRoute;
                let fd = socket(AddressFamily::Netlink, SockType::Raw, FLAGS, route)?;
                bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
                self.socket.insert(fd)
            }
        };
        self.sequence = self.sequence.wrapping_add(1);
        let request = route_request(ip, self.sequence);
        send(fd.as_raw_fd(), &request, MsgFlags::empty())?;
        // The kernel answers within the call above. Anything else in the queue is an older answer.
        for _ in 0..8 {
            let mut reply = [0; 1024];
            let len = recv(fd.as_raw_fd(), &mut reply, MsgFlags::MSG_DONTWAIT)?;
            if let Some(kind) = parse_route_reply(reply.get(..len).unwrap_or_default(), self.sequence) {
                return Ok(kind);
            }
        }
        Err(Errno::EBADMSG)
    }

    /// The same question where netlink is forbidden: to itself, the kernel talks from the very address it talks to.
    fn kind_by_source(ip: IpAddr) -> RouteKind {
        let any: IpAddr = match ip {
            IpAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
        };
        let source = UdpSocket::bind((any, 0)).and_then(|socket| {
            socket.connect((ip, 9))?;
            socket.local_addr()
        });
        match source {
            Ok(source) if source.ip() == ip => RouteKind::Local,
            Ok(_) => RouteKind::Remote,
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => RouteKind::Broadcast,
            Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::ENETUNREACH | Errno::EHOSTUNREACH) => RouteKind::Remote,
                _ => RouteKind::Unknown,
            },
        }
    }
}

/// RTM_GETROUTE for one address (rtnetlink(7)).
fn route_request(ip: IpAddr, sequence: u32) -> Vec<u8> {
    let (family, address): (i32, Vec<u8>) = match ip {
        IpAddr::V4(ip) => (libc::AF_INET, ip.octets().to_vec()),
        IpAddr::V6(ip) => (libc::AF_INET6, ip.octets().to_vec()),
    };
    let bits = u8::try_from(address.len() * 8).unwrap_or_default();
    let len = u32::try_from(NLMSG_HEADER + RTMSG + 4 + address.len()).unwrap_or_default();
    let attribute_len = u16::try_from(4 + address.len()).unwrap_or_default();
    let mut message = Vec::with_capacity(48);
    message.extend(len.to_ne_bytes());
    message.extend(RTM_GETROUTE.to_ne_bytes());
    message.extend(NLM_F_REQUEST.to_ne_bytes());
    message.extend(sequence.to_ne_bytes());
    message.extend([0; 4]);
    // rtmsg: family, length of the destination's prefix, and nothing else.
    message.extend([u8::try_from(family).unwrap_or_default(), bits, 0, 0, 0, 0, 0, 0]);
    message.extend([0; 4]);
    message.extend(attribute_len.to_ne_bytes());
    message.extend(RTA_DST.to_ne_bytes());
    message.extend(address);
    message
}

/// The kind of the route in the kernel's answer; `None` if it answers another question.
fn parse_route_reply(reply: &[u8], sequence: u32) -> Option<RouteKind> {
    let word = |at: usize| reply.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes);
    let long = |at: usize| reply.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
    if long(8)? != sequence {
        return None;
    }
    if word(4)? != RTM_NEWROUTE {
        // NLMSG_ERROR: no route. Then it is not the host, and connecting will fail by itself.
        return Some(RouteKind::Remote);
    }
    // rtm_type: RTN_LOCAL 2, RTN_BROADCAST 3, RTN_ANYCAST 4, RTN_MULTICAST 5.
    match *reply.get(NLMSG_HEADER + 7)? {
        // An anycast address is one that the host answers.
        2 | 4 => Some(RouteKind::Local),
        3 | 5 => Some(RouteKind::Broadcast),
        _ => Some(RouteKind::Remote),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_routing_table_knows_the_host_itself() {
        let mut routes = Routes::default();
        for local in ["127.0.0.1", "127.1.2.3", "::1"] {
            assert_eq!(routes.ask(local.parse().expect(local)), Ok(RouteKind::Local), "{local}");
        }
        assert_eq!(routes.ask("255.255.255.255".parse().expect("address")), Ok(RouteKind::Broadcast));
        // With or without a route: some other machine.
        assert_eq!(routes.kind_of("192.0.2.77".parse().expect("address")), RouteKind::Remote);
        assert_eq!(routes.kind_of("2001:db8::77".parse().expect("address")), RouteKind::Remote);
    }

    #[test]
    fn without_netlink_the_source_address_tells() {
        assert_eq!(Routes::kind_by_source("127.0.0.1".parse().expect("address")), RouteKind::Local);
        assert_eq!(Routes::kind_by_source("::1".parse().expect("address")), RouteKind::Local);
        assert_eq!(Routes::kind_by_source("192.0.2.77".parse().expect("address")), RouteKind::Remote);
    }

    #[test]
    fn answers_to_other_questions_are_not_taken() {
        let mut reply = vec![0; 28];
        reply[4..6].copy_from_slice(&RTM_NEWROUTE.to_ne_bytes());
        reply[8..12].copy_from_slice(&7u32.to_ne_bytes());
        reply[23] = 2;
        assert_eq!(parse_route_reply(&reply, 7), Some(RouteKind::Local));
        assert_eq!(parse_route_reply(&reply, 8), None);
        assert_eq!(parse_route_reply(&reply[..20], 7), None);
        assert_eq!(parse_route_reply(&[], 7), None);
    }

    #[test]
    fn descriptors_are_counted_while_they_live() {
        let budget = Budget::new(1);
        assert!(budget.check().is_ok());
        let held = budget.hold(std::fs::File::open("/dev/null").expect("/dev/null").into());
        assert_eq!(budget.check(), Err(Errno::EMFILE));
        drop(held);
        assert!(budget.check().is_ok());
    }
}
