//! The two questions that this crate has for rtnetlink(7): what kind of address is this, and may the TAP's queue be
//! longer. Messages are built and read by hand: they are few, short, and never anybody else's.

use std::net::{IpAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType};

use crate::calls::{bind, recv, send, socket};
use crate::policy::RouteKind;

const RTM_NEWLINK: u16 = 16;
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const IFLA_TXQLEN: u16 = 13;
const RTA_DST: u16 = 1;
const NLMSG_HEADER: usize = 16;

/// A netlink socket. The kernel answers within the call that sends the question.
#[derive(Debug)]
struct Netlink {
    fd: OwnedFd,
    sequence: u32,
}

impl Netlink {
    fn open() -> nix::Result<Self> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self { fd, sequence: 0 })
    }

    /// Sends a message; the type and the body of the answer.
    fn ask(&mut self, kind: u16, flags: u16, body: &[u8]) -> nix::Result<(u16, Vec<u8>)> {
        self.sequence = self.sequence.wrapping_add(1);
        let len = u32::try_from(NLMSG_HEADER + body.len()).map_err(|_| Errno::EMSGSIZE)?;
        let mut message = Vec::with_capacity(64);
        message.extend(len.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        message.extend([0; 4]);
        message.extend(body);
        send(self.fd.as_raw_fd(), &message, MsgFlags::empty())?;
        // Anything else in the queue is an older answer.
        for _ in 0..8 {
            let mut reply = [0; 1024];
            let len = recv(self.fd.as_raw_fd(), &mut reply, MsgFlags::MSG_DONTWAIT)?;
            if let Some(answer) = parse_reply(reply.get(..len).unwrap_or_default(), self.sequence) {
                return Ok(answer);
            }
        }
        Err(Errno::EBADMSG)
    }
}

/// Type and body of an answer; `None` if it is one to another question.
fn parse_reply(reply: &[u8], sequence: u32) -> Option<(u16, Vec<u8>)> {
    let kind = reply.get(4..6)?.try_into().ok().map(u16::from_ne_bytes)?;
    let answered = reply.get(8..12)?.try_into().ok().map(u32::from_ne_bytes)?;
    (answered == sequence).then(|| (kind, reply.get(NLMSG_HEADER..).unwrap_or_default().to_vec()))
}

/// An attribute, padded to a multiple of four.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = u16::try_from(4 + value.len()).unwrap_or_default();
    let mut bytes = [&len.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Asks the host's routing table what an address is. One round trip (some microseconds) for each new flow: always right,
/// also for addresses that came a moment ago and for local routes to whole ranges, neither of which a list of the
/// interfaces' addresses would show.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    netlink: Option<Netlink>,
}

impl Routes {
    pub(crate) fn kind_of(&mut self, ip: IpAddr) -> RouteKind {
        self.ask(ip).unwrap_or_else(|errno| {
            tracing::debug!(%errno, %ip, "no answer from the routing table");
            self.netlink = None;
            kind_by_source(ip)
        })
    }

    fn ask(&mut self, ip: IpAddr) -> nix::Result<RouteKind> {
        let netlink = match &mut self.netlink {
            Some(netlink) => netlink,
            None => self.netlink.insert(Netlink::open()?),
        };
        let (kind, body) = netlink.ask(RTM_GETROUTE, 0, &route_request(ip))?;
        Ok(route_kind(kind, &body))
    }
}

/// The body of RTM_GETROUTE for one address.
fn route_request(ip: IpAddr) -> Vec<u8> {
    let (family, address): (i32, Vec<u8>) = match ip {
        IpAddr::V4(ip) => (libc::AF_INET, ip.octets().to_vec()),
        IpAddr::V6(ip) => (libc::AF_INET6, ip.octets().to_vec()),
    };
    let byte = |n: usize| u8::try_from(n).unwrap_or_default();
    // rtmsg: family, length of the destination's prefix, and nothing else.
    let mut body = vec![u8::try_from(family).unwrap_or_default(), byte(address.len() * 8)];
    body.resize(12, 0);
    body.extend(attribute(RTA_DST, &address));
    body
}

/// What the answer to RTM_GETROUTE means.
fn route_kind(kind: u16, body: &[u8]) -> RouteKind {
    if kind != RTM_NEWROUTE {
        // NLMSG_ERROR: no route. Then it is not the host, and connecting will fail by itself.
        return RouteKind::Remote;
    }
    // rtm_type: RTN_LOCAL 2, RTN_BROADCAST 3, RTN_ANYCAST 4, RTN_MULTICAST 5.
    match body.get(7) {
        // An anycast address is one that the host answers.
        Some(2 | 4) => RouteKind::Local,
        Some(3 | 5) => RouteKind::Broadcast,
        Some(_) => RouteKind::Remote,
        None => RouteKind::Unknown,
    }
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

/// Sets how many frames that its kernel has sent an interface holds. (The ioctl for it wants more than a namespace's
/// own capabilities; this does not.)
pub(crate) fn set_queue_len(interface: &str, frames: u32) -> nix::Result<()> {
    let index = i32::try_from(nix::net::if_::if_nametoindex(interface)?).map_err(|_| Errno::ENODEV)?;
    // ifinfomsg: family, type, index, flags, and which of those are to change.
    let mut body = vec![0; 4];
    body.extend(index.to_ne_bytes());
    body.resize(16, 0);
    body.extend(attribute(IFLA_TXQLEN, &frames.to_ne_bytes()));
    let (kind, answer) = Netlink::open()?.ask(RTM_NEWLINK, NLM_F_ACK, &body)?;
    match answer.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
        Some(0) if kind == NLMSG_ERROR => Ok(()),
        Some(code) if kind == NLMSG_ERROR => Err(Errno::from_raw(-code)),
        _ => Err(Errno::EBADMSG),
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
        assert_eq!(kind_by_source("127.0.0.1".parse().expect("address")), RouteKind::Local);
        assert_eq!(kind_by_source("::1".parse().expect("address")), RouteKind::Local);
        assert_eq!(kind_by_source("192.0.2.77".parse().expect("address")), RouteKind::Remote);
    }

    #[test]
    fn answers_to_other_questions_are_not_taken() {
        let mut reply = vec![0; 28];
        reply[4..6].copy_from_slice(&RTM_NEWROUTE.to_ne_bytes());
        reply[8..12].copy_from_slice(&7u32.to_ne_bytes());
        reply[23] = 2;
        let (kind, body) = parse_reply(&reply, 7).expect("an answer");
        assert_eq!(route_kind(kind, &body), RouteKind::Local);
        assert_eq!(parse_reply(&reply, 8), None);
        assert_eq!(parse_reply(&reply[..10], 7), None);
        assert_eq!(parse_reply(&[], 7), None);
        assert_eq!(route_kind(RTM_NEWROUTE, &body[..3]), RouteKind::Unknown);
    }

    #[test]
    fn an_interface_that_does_not_exist_has_no_queue() {
        assert_eq!(set_queue_len("no-such-link", 10), Err(Errno::ENODEV));
    }
}
