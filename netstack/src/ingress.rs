//! From a frame of the guest to a packet that is known to be whole. Nothing here has state or does I/O.
//!
//! The guest is hostile: every length is checked against what is there, headers that have no business here end the
//! packet, and what leaves this module as [`Packet`] has a correct header checksum, a plausible length and, for the
//! protocols we know, a correct checksum ([`verify_checksum`]). Padding behind the packet is cut off.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr};

use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, Icmpv4Packet, Icmpv6Packet, IpProtocol, Ipv4Packet, Ipv6Packet,
    TcpPacket, UdpPacket,
};

use crate::device::{ETHERNET_HEADER_LEN, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6};
use crate::flow::{Endpoint, FlowKey};

pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMPV6: u8 = 58;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;
/// No honest packet has more extension headers.
const MAX_EXTENSIONS: usize = 8;

/// Why a frame goes no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Drop {
    /// It contradicts itself.
    Malformed,
    /// It is for somebody else, or of a protocol that this link does not carry.
    NotForUs,
}

/// A frame, understood.
#[derive(Debug)]
pub(crate) enum Inbound<'a> {
    /// A question for the Ethernet address of `target`.
    Arp { source_mac: [u8; 6], source: Ipv4Addr, target: Ipv4Addr },
    /// An IP packet.
    Ip(Packet<'a>),
}

/// Place of a fragment in its datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fragment {
    pub(crate) id: u32,
    pub(crate) offset: usize,
    pub(crate) more: bool,
}

/// An IP packet.
#[derive(Debug, Clone)]
pub(crate) struct Packet<'a> {
    /// All of it, from the IP header on, without padding.
    pub(crate) bytes: &'a [u8],
    pub(crate) src: IpAddr,
    pub(crate) dst: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) hop_limit: u8,
    /// Where the payload starts.
    pub(crate) payload_at: usize,
    /// Set if this is not the whole datagram.
    pub(crate) fragment: Option<Fragment>,
    /// The transport's checksum was left to us, so there is nothing to verify.
    pub(crate) checksum_pending: bool,
    /// Set if the payload of this datagram is that of several, each of so many bytes.
    pub(crate) datagram_size: Option<usize>,
}

impl<'a> Packet<'a> {
    pub(crate) fn payload(&self) -> &'a [u8] {
        &self.bytes[self.payload_at..]
    }

    pub(crate) fn is_v6(&self) -> bool {
        self.dst.is_ipv6()
    }

    fn header_len(&self) -> usize {
        if self.is_v6() { 40 } else { 20 }
    }

    /// The packet without IP options and extension headers, which is what smoltcp gets to see.
    pub(crate) fn plain(&self) -> Cow<'a, [u8]> {
        if self.payload_at == self.header_len() {
            return Cow::Borrowed(self.bytes);
        }
        Cow::Owned(rebuild(self.src, self.dst, self.protocol, self.hop_limit, self.payload()))
    }
}

/// An IP packet with a plain header. The payload must fit into a packet; what does not is cut off.
pub(crate) fn rebuild(src: IpAddr, dst: IpAddr, protocol: u8, hop_limit: u8, payload: &[u8]) -> Vec<u8> {
    let header_len = if dst.is_ipv6() { 40 } else { 20 };
    let payload = &payload[..payload.len().min(65_535 - 20)];
    let mut packet = vec![0; header_len + payload.len()];
    write_ip_header(&mut packet, src, dst, protocol, hop_limit);
    packet[header_len..].copy_from_slice(payload);
    packet
}

/// Writes a plain IP header for the rest of `packet`; its length.
pub(crate) fn write_ip_header(
    packet: &mut [u8],
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    hop_limit: u8,
) -> usize {
    let len = packet.len();
    let protocol = IpProtocol::from(protocol);
    match (src, dst) {
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let mut ip = Ipv6Packet::new_unchecked(packet);
            ip.set_version(6);
            ip.set_traffic_class(0);
            ip.set_flow_label(0);
            ip.set_payload_len(u16::try_from(len - 40).unwrap_or(u16::MAX));
            ip.set_next_header(protocol);
            ip.set_hop_limit(hop_limit);
            ip.set_src_addr(src);
            ip.set_dst_addr(dst);
            40
        }
        (src, dst) => {
            let v4 = |ip| match ip {
                IpAddr::V4(ip) => ip,
                IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
            };
            let mut ip = Ipv4Packet::new_unchecked(packet);
            ip.set_version(4);
            ip.set_header_len(20);
            ip.set_dscp(0);
            ip.set_ecn(0);
            ip.set_total_len(u16::try_from(len).unwrap_or(u16::MAX));
            ip.set_ident(0);
            ip.clear_flags();
            ip.set_dont_frag(true);
            ip.set_frag_offset(0);
            ip.set_hop_limit(hop_limit);
            ip.set_next_header(protocol);
            ip.set_src_addr(v4(src));
            ip.set_dst_addr(v4(dst));
            ip.fill_checksum();
            20
        }
    }
}

/// The source address of a frame.
pub(crate) fn source_mac(frame: &[u8]) -> Option<[u8; 6]> {
    frame.get(6..12)?.try_into().ok()
}

/// Understands a frame.
pub(crate) fn parse_frame(
    frame: &[u8],
    our_mac: [u8; 6],
    checksum_pending: bool,
) -> Result<Inbound<'_>, Drop> {
    let (header, payload) = frame.split_at_checked(ETHERNET_HEADER_LEN).ok_or(Drop::Malformed)?;
    // The group bit covers broadcast and multicast, which ARP and neighbour discovery use.
    if header[..6] != our_mac && header[0] & 1 == 0 {
        return Err(Drop::NotForUs);
    }
    match u16::from_be_bytes([header[12], header[13]]) {
        ETHERTYPE_IPV4 | ETHERTYPE_IPV6 => parse_ip(payload, checksum_pending).map(Inbound::Ip),
        ETHERTYPE_ARP => parse_arp(payload),
        _ => Err(Drop::NotForUs),
    }
}

fn parse_arp(payload: &[u8]) -> Result<Inbound<'_>, Drop> {
    let packet = ArpPacket::new_checked(payload).map_err(|_| Drop::Malformed)?;
    match ArpRepr::parse(&packet).map_err(|_| Drop::Malformed)? {
        ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr,
            source_protocol_addr,
            target_protocol_addr,
            ..
        } => Ok(Inbound::Arp {
            source_mac: source_hardware_addr.0,
            source: source_protocol_addr,
            target: target_protocol_addr,
        }),
        _ => Err(Drop::NotForUs),
    }
}

/// Understands an IP packet, down to where its payload starts.
pub(crate) fn parse_ip(bytes: &[u8], checksum_pending: bool) -> Result<Packet<'_>, Drop> {
    match bytes.first().map(|first| first >> 4) {
        Some(4) => parse_v4(bytes, checksum_pending),
        Some(6) => parse_v6(bytes, checksum_pending),
        _ => Err(Drop::Malformed),
    }
}

fn parse_v4(bytes: &[u8], checksum_pending: bool) -> Result<Packet<'_>, Drop> {
    let ip = Ipv4Packet::new_checked(bytes).map_err(|_| Drop::Malformed)?;
    let (header_len, total_len) = (usize::from(ip.header_len()), usize::from(ip.total_len()));
    if header_len < 20 || total_len < header_len || total_len > bytes.len() || !ip.verify_checksum() {
        return Err(Drop::Malformed);
    }
    let (offset, more) = (usize::from(ip.frag_offset()), ip.more_frags());
    if has_source_route(&bytes[20..header_len]) {
        return Err(Drop::NotForUs);
    }
    Ok(Packet {
        bytes: &bytes[..total_len],
        src: ip.src_addr().into(),
        dst: ip.dst_addr().into(),
        protocol: ip.next_header().into(),
        hop_limit: ip.hop_limit(),
        payload_at: header_len,
        fragment: (more || offset != 0).then_some(Fragment { id: ip.ident().into(), offset, more }),
        checksum_pending,
        datagram_size: None,
    })
}

/// Source routes say that the destination is not the destination (RFC 7126 section 4.3 and 4.4: drop). Other options
/// mean nothing to a host.
fn has_source_route(mut options: &[u8]) -> bool {
    loop {
        match options {
            [] | [0, ..] => return false,
            [1, rest @ ..] => options = rest,
            [131 | 137, ..] => return true,
            [_, len, ..] => match options.get(usize::from(*len).max(2)..) {
                Some(rest) => options = rest,
                None => return false,
            },
            [_] => return false,
        }
    }
}

fn parse_v6(bytes: &[u8], checksum_pending: bool) -> Result<Packet<'_>, Drop> {
    let ip = Ipv6Packet::new_checked(bytes).map_err(|_| Drop::Malformed)?;
    let total_len = 40 + usize::from(ip.payload_len());
    let bytes = bytes.get(..total_len).ok_or(Drop::Malformed)?;
    let mut packet = Packet {
        bytes,
        src: ip.src_addr().into(),
        dst: ip.dst_addr().into(),
        protocol: ip.next_header().into(),
        hop_limit: ip.hop_limit(),
        payload_at: 40,
        fragment: None,
        checksum_pending,
        datagram_size: None,
    };
    for _ in 0..MAX_EXTENSIONS {
        let rest = &bytes[packet.payload_at..];
        match packet.protocol {
            HOP_BY_HOP if packet.payload_at != 40 => return Err(Drop::Malformed),
            HOP_BY_HOP | DESTINATION_OPTIONS | ROUTING => {
                let [next, len, _, segments_left, ..] = rest else { return Err(Drop::Malformed) };
                // RFC 5095 for type 0; no other type has a meaning at the last hop but this.
                if packet.protocol == ROUTING && *segments_left != 0 {
                    return Err(Drop::NotForUs);
                }
                packet.protocol = *next;
                packet.payload_at += (usize::from(*len) + 1) * 8;
                if packet.payload_at > bytes.len() {
                    return Err(Drop::Malformed);
                }
            }
            FRAGMENT => {
                let [next, _, offset_high, offset_low, a, b, c, d, ..] = rest else {
                    return Err(Drop::Malformed);
                };
                let field = u16::from_be_bytes([*offset_high, *offset_low]);
                let (offset, more) = (usize::from(field & !7), field & 1 != 0);
                packet.protocol = *next;
                packet.payload_at += 8;
                // RFC 6946: an atomic fragment is not one.
                if more || offset != 0 {
                    packet.fragment =
                        Some(Fragment { id: u32::from_be_bytes([*a, *b, *c, *d]), offset, more });
                    return Ok(packet);
                }
            }
            _ => return Ok(packet),
        }
    }
    Err(Drop::Malformed)
}

/// The flow of a datagram of ours that nobody in the guest wanted, if `packet`, a whole ICMP message, says so. Nothing
/// says that there ever was such a datagram.
pub(crate) fn refused_datagram(packet: &Packet<'_>) -> Option<FlowKey> {
    let message = packet.payload();
    let original = message.get(8..)?;
    let v6 = |at: usize| original.get(at..)?.first_chunk::<16>().copied();
    let (protocol, src, dst, udp): (u8, IpAddr, IpAddr, usize) = match (packet.protocol, message) {
        (ICMP, [3, 3, ..]) if original.first()? >> 4 == 4 => {
            let ends: [u8; 8] = original.get(12..20)?.try_into().ok()?;
            let [a, b, c, d, e, f, g, h] = ends;
            let header_len = usize::from(original.first()? & 15) * 4;
            (*original.get(9)?, [a, b, c, d].into(), [e, f, g, h].into(), header_len)
        }
        (ICMPV6, [1, 4, ..]) if original.first()? >> 4 == 6 => {
            (*original.get(6)?, v6(8)?.into(), v6(24)?.into(), 40)
        }
        _ => return None,
    };
    let [a, b, c, d] = *original.get(udp..)?.first_chunk()?;
    (protocol == UDP).then_some(FlowKey {
        guest: Endpoint::new(dst, u16::from_be_bytes([c, d])),
        remote: Endpoint::new(src, u16::from_be_bytes([a, b])),
    })
}

/// Whether the checksum of a whole datagram is right. True for protocols that we do not know.
pub(crate) fn verify_checksum(packet: &Packet<'_>) -> bool {
    if packet.checksum_pending {
        return true;
    }
    let (src, dst, payload) = (packet.src.into(), packet.dst.into(), packet.payload());
    match (packet.protocol, packet.src, packet.dst) {
        (TCP, ..) => TcpPacket::new_checked(payload).is_ok_and(|tcp| tcp.verify_checksum(&src, &dst)),
        // smoltcp accepts a zero checksum, which RFC 8200 section 8.1 forbids for IPv6.
        (UDP, ..) => UdpPacket::new_checked(payload)
            .is_ok_and(|udp| !(packet.is_v6() && udp.checksum() == 0) && udp.verify_checksum(&src, &dst)),
        (ICMP, ..) => Icmpv4Packet::new_checked(payload).is_ok_and(|icmp| icmp.verify_checksum()),
        (ICMPV6, IpAddr::V6(src), IpAddr::V6(dst)) => {
            Icmpv6Packet::new_checked(payload).is_ok_and(|icmp| icmp.verify_checksum(&src, &dst))
        }
        _ => true,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const OURS: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

    fn frame(ethertype: u16, payload: &[u8]) -> Vec<u8> {
        [&OURS[..], &[0x52, 0x54, 0, 0, 0, 2], &ethertype.to_be_bytes(), payload].concat()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect(text)
    }

    fn expect_ip(frame: &[u8]) -> Packet<'_> {
        match parse_frame(frame, OURS, false) {
            Ok(Inbound::Ip(packet)) => packet,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn padding_is_cut_off() {
        let mut bytes =
            frame(ETHERTYPE_IPV4, &rebuild(ip("10.0.2.100"), ip("192.0.2.1"), UDP, 64, b"12345678"));
        bytes.extend([0xaa; 20]);
        let packet = expect_ip(&bytes);
        assert_eq!((packet.payload(), packet.protocol, packet.hop_limit), (&b"12345678"[..], UDP, 64));
    }

    #[test]
    fn frames_for_others_are_not_ours() {
        let mut bytes = frame(ETHERTYPE_IPV4, &rebuild(ip("10.0.2.100"), ip("192.0.2.1"), UDP, 64, b""));
        bytes[5] = 9;
        assert_eq!(parse_frame(&bytes, OURS, false).expect_err("dropped"), Drop::NotForUs);
    }

    #[test]
    fn extension_headers_are_walked_and_left_out_of_the_plain_packet() {
        let mut payload = vec![DESTINATION_OPTIONS, 0, 1, 4, 0, 0, 0, 0];
        payload.extend([TCP, 0, 1, 4, 0, 0, 0, 0]);
        payload.extend(b"segment");
        let whole = rebuild(ip("fd00::100"), ip("2001:db8::1"), HOP_BY_HOP, 64, &payload);
        let packet = parse_ip(&whole, false).expect("packet");
        assert_eq!((packet.protocol, packet.payload()), (TCP, &b"segment"[..]));
        let plain = packet.plain();
        let again = parse_ip(&plain, false).expect("packet");
        assert_eq!((again.protocol, again.payload(), again.payload_at), (TCP, &b"segment"[..], 40));
    }

    #[test]
    fn source_routes_are_refused() {
        let mut whole = vec![0; 28];
        write_ip_header(&mut whole, ip("10.0.2.100"), ip("192.0.2.1"), UDP, 64);
        whole[20..28].copy_from_slice(&[1, 131, 7, 4, 127, 0, 0, 1]);
        whole[0] = 0x47;
        whole[10..12].fill(0);
        Ipv4Packet::new_unchecked(&mut whole[..]).fill_checksum();
        assert_eq!(parse_ip(&whole, false).expect_err("dropped"), Drop::NotForUs);
        let routing = [TCP, 2, 0, 1, 0, 0, 0, 0];
        let whole =
            rebuild(ip("fd00::100"), ip("2001:db8::1"), ROUTING, 64, &[&routing[..], &[0; 16]].concat());
        assert_eq!(parse_ip(&whole, false).expect_err("dropped"), Drop::NotForUs);
    }

    #[test]
    fn an_unwanted_datagram_is_recognised_in_an_error() {
        for (us, guest, head, protocol) in
            [("10.0.2.2", "10.0.2.100", [3, 3], ICMP), ("fd00::2", "fd00::100", [1, 4], ICMPV6)]
        {
            let datagram = rebuild(ip(us), ip(guest), UDP, 64, &[0, 7, 0, 80, 0, 9, 0, 0, 1]);
            let message = [&head[..], &[0; 6], &datagram].concat();
            let error = rebuild(ip(guest), ip(us), protocol, 64, &message);
            let packet = parse_ip(&error, true).expect("packet");
            let key = FlowKey { guest: Endpoint::new(ip(guest), 80), remote: Endpoint::new(ip(us), 7) };
            assert_eq!(refused_datagram(&packet), Some(key));
            // As much as an error has to quote, and anything less.
            let header_len = error.len() - message.len();
            for len in 0..message.len() - 5 {
                let short = rebuild(ip(guest), ip(us), protocol, 64, &message[..len]);
                assert_eq!(refused_datagram(&parse_ip(&short, true).expect("packet")), None, "{len}");
            }
            for (at, byte) in [(0, 8), (1, 1), (8, 0x25), (8 + if header_len == 20 { 9 } else { 6 }, TCP)] {
                let mut other = error.clone();
                other[header_len + at] = byte;
                assert_eq!(refused_datagram(&parse_ip(&other, true).expect("packet")), None, "{at}");
            }
        }
    }

    #[test]
    fn fragments_know_their_place() {
        let header = [UDP, 0, 0x05, 0xa9, 0, 0, 0, 7];
        let whole =
            rebuild(ip("fd00::100"), ip("2001:db8::1"), FRAGMENT, 64, &[&header[..], b"data"].concat());
        let packet = parse_ip(&whole, false).expect("packet");
        assert_eq!(packet.fragment, Some(Fragment { id: 7, offset: 1448, more: true }));
        assert_eq!(packet.payload(), b"data");
        let atomic = [UDP, 0, 0, 0, 0, 0, 0, 7];
        let whole =
            rebuild(ip("fd00::100"), ip("2001:db8::1"), FRAGMENT, 64, &[&atomic[..], b"data"].concat());
        assert_eq!(parse_ip(&whole, false).expect("packet").fragment, None);
    }

    #[test]
    fn a_wrong_checksum_is_noticed_unless_the_kernel_left_it_to_us() {
        let whole = rebuild(ip("10.0.2.100"), ip("192.0.2.1"), UDP, 64, &[0, 1, 0, 2, 0, 8, 0x12, 0x34]);
        let mut packet = parse_ip(&whole, false).expect("packet");
        assert!(!verify_checksum(&packet));
        packet.checksum_pending = true;
        assert!(verify_checksum(&packet));
        let mut header = whole;
        header[8] ^= 1;
        assert_eq!(parse_ip(&header, true).expect_err("header checksum"), Drop::Malformed);
    }

    /// A small generator of pseudo-random numbers (xorshift64), so that a failure can be repeated.
    pub(crate) struct Seeded(pub(crate) u64);

    impl Seeded {
        pub(crate) fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }

        pub(crate) fn below(&mut self, n: usize) -> usize {
            usize::try_from(self.next() >> 1).unwrap_or(0) % n.max(1)
        }

        pub(crate) fn byte(&mut self) -> u8 {
            self.next().to_le_bytes()[3]
        }
    }

    #[test]
    fn no_bytes_make_the_parser_panic() {
        let mut random = Seeded(0x5eed_0001);
        let v4 = frame(ETHERTYPE_IPV4, &rebuild(ip("10.0.2.100"), ip("192.0.2.1"), TCP, 64, &[0x50; 40]));
        let headers =
            [DESTINATION_OPTIONS, 0, 1, 4, 0, 0, 0, 0, FRAGMENT, 0, 1, 4, 0, 0, 0, 0, UDP, 0, 0, 1, 0, 0];
        let v6 =
            frame(ETHERTYPE_IPV6, &rebuild(ip("fd00::100"), ip("2001:db8::1"), HOP_BY_HOP, 64, &headers));
        let arp = frame(
            ETHERTYPE_ARP,
            &[0, 1, 8, 0, 6, 4, 0, 1, 2, 2, 2, 2, 2, 2, 10, 0, 2, 100, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2],
        );
        for round in 0..60_000 {
            let mut bytes = [&v4, &v6, &arp][round % 3].clone();
            for _ in 0..random.below(6) {
                let at = random.below(bytes.len());
                bytes[at] = random.byte();
            }
            bytes.truncate(random.below(bytes.len() * 2));
            if let Ok(Inbound::Ip(packet)) = parse_frame(&bytes, OURS, round % 2 == 0) {
                verify_checksum(&packet);
                packet.plain();
            }
        }
    }
}
