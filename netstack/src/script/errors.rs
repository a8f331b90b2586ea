//! ICMP errors that routers send about packets of the guest's: it hears of them what its own kernel would have heard.

use std::io::IoSlice;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::sys::socket::{
    ControlMessage, MsgFlags, SockProtocol, SockaddrStorage, recv, sendmsg, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

use super::*;

/// What a router says about MPLS: an extension structure with objects of one label each (RFC 4950).
fn extension(objects: usize) -> Vec<u8> {
    let mut structure = vec![0x20, 0, 0, 0];
    structure.extend([0, 8, 1, 1, 0x12, 0x34, 0x51, 64].repeat(objects));
    let sum = !checksum::data(&structure);
    structure[2..4].copy_from_slice(&sum.to_be_bytes());
    structure
}

/// The router: it sees what the host sends, and can say that it came too far.
struct Router {
    raw: OwnedFd,
    is_v6: bool,
    to: SocketAddr,
}

impl Router {
    fn new(is_v6: bool) -> Self {
        let (family, protocol, to) = if is_v6 {
            (AddressFamily::Inet6, SockProtocol::IcmpV6, "[::1]:0")
        } else {
            (AddressFamily::Inet, SockProtocol::Icmp, "127.0.0.1:0")
        };
        let raw = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol).expect("raw socket");
        setsockopt(&raw, sockopt::ReceiveTimeout, &TimeVal::seconds(10)).expect("timeout");
        Self { raw, is_v6, to: to.parse().expect("address") }
    }

    /// Says "time exceeded" about `original`, of which it quotes `quoted` bytes, with zeroes behind it if need be, and with
    /// an extension.
    fn exceeded(&self, from: IpAddr, original: &[u8], quoted: usize, extension: &[u8]) {
        let mut message = vec![if self.is_v6 { 3 } else { 11 }, 0, 0, 0, 0, 0, 0, 0];
        message.extend(original);
        message.resize(8 + quoted, 0);
        if !extension.is_empty() {
            let (at, word) = if self.is_v6 { (4, 8) } else { (5, 4) };
            message[at] = u8::try_from(quoted / word).expect("small");
            message.extend(extension);
        }
        if !self.is_v6 {
            // Of the other family the kernel does it.
            Icmpv4Packet::new_unchecked(&mut message[..]).fill_checksum();
        }
        let to = SockaddrStorage::from(self.to);
        let parts = [IoSlice::new(&message)];
        let send =
            |how| sendmsg(self.raw.as_raw_fd(), &parts, &[how], MsgFlags::empty(), Some(&to)).expect("send");
        let sent = match from {
            IpAddr::V4(ip) => send(ControlMessage::Ipv4PacketInfo(&libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(ip.octets()) },
                ipi_addr: libc::in_addr { s_addr: 0 },
            })),
            IpAddr::V6(ip) => send(ControlMessage::Ipv6PacketInfo(&libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr { s6_addr: ip.octets() },
                ipi6_ifindex: 0,
            })),
        };
        assert_eq!(sent, message.len());
    }

    /// The ICMP message of this type that the host has sent.
    fn sees(&self, kind: u8) -> Vec<u8> {
        loop {
            let mut buffer = [0; 1_000];
            let len = recv(self.raw.as_raw_fd(), &mut buffer, MsgFlags::empty()).expect("another message");
            let message = &buffer[if self.is_v6 { 0 } else { 20 }..len];
            if message[0] == kind {
                return message.to_vec();
            }
        }
    }
}

/// Where routers are, one for each family.
const ROUTERS: [&str; 2] = ["192.0.2.9", "2001:db8::9"];

/// The error that the guest gets: the length that it says, what it quotes, and what is behind that. If it says none,
/// everything is a quotation. It is to be from `from`.
fn told(script: &mut Script, is_v6: bool, from: IpAddr) -> (usize, Vec<u8>, Vec<u8>) {
    let kind = if is_v6 { 3 } else { 11 };
    let frame = script.expect("time exceeded", |frame| {
        let packet = frame.packet();
        matches!(packet.protocol, ingress::ICMP | ingress::ICMPV6) && packet.payload()[0] == kind
    });
    assert!(ingress::verify_checksum(&frame.packet()));
    let packet = frame.packet();
    assert_eq!(packet.src, from);
    let message = packet.payload();
    let said = if is_v6 { usize::from(message[4]) * 8 } else { usize::from(message[5]) * 4 };
    let (quoted, behind) = message[8..].split_at(if said == 0 { message.len() - 8 } else { said });
    (said, quoted.to_vec(), behind.to_vec())
}

#[test]
fn what_routers_say_beyond_an_error_is_told_apart_from_what_they_quote() {
    if !in_empty_namespace(
        "script::errors::what_routers_say_beyond_an_error_is_told_apart_from_what_they_quote",
    ) {
        return;
    }
    for is_v6 in [false, true] {
        let (guest, gateway) = if is_v6 { (GUEST_V6, GATEWAY_V6) } else { (GUEST_V4, GATEWAY_V4) };
        let router = Router::new(is_v6);
        let server = UdpSocket::bind(if is_v6 { "[::1]:0" } else { "127.0.0.1:0" }).expect("socket");
        let to = server.local_addr().expect("address");
        let mut script = Script::new(&spec(), true);
        let (far, near) = (ip(ROUTERS[usize::from(is_v6)]), router.to.ip());
        let broken = [&extension(1)[..11], &[65]].concat();
        let mut unknown = extension(1);
        unknown[0] = 0x30;
        let most = if is_v6 { 1_280 - 48 } else { 576 - 28 };
        for (by, len, quoted, extension, words) in [
            // As it always was: what was sent, or as much of it as there is room for.
            (far, 3, None, vec![], false),
            (far, 1_000, None, vec![], false),
            // Padded to the least that an extension may follow, and longer.
            (far, 3, Some(128), extension(1), true),
            (far, 400, Some(256), extension(1), true),
            // So much that both do not fit.
            (far, 2_000, Some(if is_v6 { 1_216 } else { 540 }), extension(4), true),
            // So long that of IPv4 there is no room before it for the least.
            (far, 3, Some(256), extension(60), is_v6),
            // More than is read of an error.
            (far, 2_000, Some(if is_v6 { 1_216 } else { 540 }), extension(60), false),
            // Nothing that anybody should believe.
            (far, 3, Some(128), broken, false),
            // Nor of a version that the kernel does not look into.
            (far, 3, Some(128), unknown, false),
            // What the host itself says.
            (near, 3, Some(128), extension(1), false),
        ] {
            let payload = vec![7; len];
            script.send_ip(&udp((guest, 5_000), (gateway, to.port()), &payload));
            script.settle();
            let from = server.recv_from(&mut [0; 2_000]).expect("datagram").1;
            let mut original = udp((guest, from.port()), (guest, to.port()), &payload);
            original =
                ingress::rebuild(from.ip(), to.ip(), ingress::UDP, 64, &original[original.len() - 8 - len..]);
            router.exceeded(by, &original, quoted.unwrap_or(original.len().min(most)), &extension);
            let from = if by == far { far } else { ip(gateway) };
            let (said, heard, behind) = told(&mut script, is_v6, from);
            let (header, ports) = heard.split_at(if is_v6 { 40 } else { 20 });
            let addresses = if is_v6 { &header[8..] } else { &header[12..] };
            let expected = match (ip(guest), ip(gateway)) {
                (IpAddr::V4(from), IpAddr::V4(to)) => [from.octets(), to.octets()].concat(),
                (IpAddr::V6(from), IpAddr::V6(to)) => [from.octets(), to.octets()].concat(),
                _ => unreachable!("one family"),
            };
            assert_eq!(addresses, expected, "its own addresses");
            assert_eq!(ports[..4], [5_000u16.to_be_bytes(), to.port().to_be_bytes()].concat());
            let (payload, padding) = ports[8..].split_at(len.min(ports.len() - 8));
            assert!(
                payload.iter().all(|byte| *byte == 7) && padding.iter().all(|byte| *byte == 0),
                "{ports:?}"
            );
            let what = format!("{is_v6} {len} {quoted:?}");
            if words {
                let word = if is_v6 { 8 } else { 4 };
                let room = (most - extension.len()) / word * word;
                assert_eq!((said, behind), (quoted.unwrap_or(0).min(room), extension), "{what}");
            } else {
                let quoted = quoted.unwrap_or(original.len().min(most));
                assert_eq!((said, heard.len(), behind.len()), (0, quoted, 0), "{what}");
            }
        }
    }
}

#[test]
fn what_routers_say_about_echo_requests_comes_with_the_guests_own() {
    if !in_empty_namespace("script::errors::what_routers_say_about_echo_requests_comes_with_the_guests_own") {
        return;
    }
    for (is_v6, guest, far, kind) in [(false, GUEST_V4, "192.0.2.1", 8), (true, GUEST_V6, "2001:db8::1", 128)]
    {
        let router = Router::new(is_v6);
        let mut script = Script::new(&spec(), true);
        let request = [kind, 0, 0, 0, 0x12, 0x34, 0, 1, b'w', b'h', b'o'];
        if is_v6 {
            script.send_ip(&icmpv6(guest, far, 64, &request));
        } else {
            let mut request = request;
            Icmpv4Packet::new_unchecked(&mut request[..]).fill_checksum();
            script.send_ip(&ingress::rebuild(ip(guest), ip(far), ingress::ICMP, 64, &request));
        }
        script.settle();
        let seen = router.sees(kind);
        assert_eq!(seen[6..], request[6..]);
        let protocol = if is_v6 { ingress::ICMPV6 } else { ingress::ICMP };
        let original = ingress::rebuild(router.to.ip(), ip(far), protocol, 64, &seen);
        // What the host itself says is from where it was sent to, as far as the guest hears, and has no extension.
        let by = ip(ROUTERS[usize::from(is_v6)]);
        for (by, from, expected) in
            [(by, by, (128, extension(1))), (router.to.ip(), ip(far), (0, Vec::new()))]
        {
            router.exceeded(by, &original, 128, &extension(1));
            let (said, heard, behind) = told(&mut script, is_v6, from);
            let quoted = &heard[if is_v6 { 40 } else { 20 }..];
            assert_eq!(quoted[4..11], request[4..]);
            assert!(quoted[11..].iter().all(|byte| *byte == 0));
            assert_eq!((said, behind), expected);
        }
    }
}
