//! Packets that the stack itself makes: UDP, ICMP errors and echo replies, ARP and neighbour advertisements.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nix::errno::Errno;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, Icmpv4Packet, Icmpv6Packet, Icmpv6Repr, IpProtocol,
    NdiscNeighborFlags, NdiscRepr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber, checksum,
};

use crate::device::{Offload, Tap};
use crate::flow::Endpoint;
use crate::fragment::send_fragmented;
use crate::ingress::{self, ICMP, ICMPV6, Packet, UDP};

/// Hop limit of what we send.
const HOPS: u8 = 64;

pub(crate) fn ip_header_len(ip: IpAddr) -> usize {
    if ip.is_ipv6() { 40 } else { 20 }
}

fn small(n: usize) -> u16 {
    u16::try_from(n).unwrap_or(u16::MAX)
}

/// Sends a UDP datagram to the guest, in fragments if the link demands it.
pub(crate) fn udp(tap: &mut Tap, from: Endpoint, to: Endpoint, payload: &[u8]) {
    let udp_len = 8 + payload.len();
    if udp_len > 65_535 - 20 {
        return;
    }
    if ip_header_len(to.ip) + udp_len <= tap.mtu {
        tap.send_datagram(from, to, payload);
    } else {
        let mut segment = vec![0; udp_len];
        segment[8..].copy_from_slice(payload);
        udp_header(&mut segment, from, to);
        // It begins with the pseudo-header's. RFC 768: zero means none, so a sum of zero is sent as all ones.
        let sum = match !checksum::data(&segment) {
            0 => u16::MAX,
            sum => sum,
        };
        segment[6..8].copy_from_slice(&sum.to_be_bytes());
        send_fragmented(tap, from.ip, to.ip, UDP, &segment);
    }
}

/// Writes the header of a datagram; its sum is that of the pseudo-header, to be finished.
fn udp_header(segment: &mut [u8], from: Endpoint, to: Endpoint) {
    let len = segment.len();
    let wide = u32::try_from(len).unwrap_or_default();
    let sum = checksum::pseudo_header(&from.ip.into(), &to.ip.into(), IpProtocol::Udp, wide);
    segment[..2].copy_from_slice(&from.port.to_be_bytes());
    segment[2..4].copy_from_slice(&to.port.to_be_bytes());
    segment[4..6].copy_from_slice(&small(len).to_be_bytes());
    segment[6..8].copy_from_slice(&sum.to_be_bytes());
}

/// Writes both headers of a packet that holds a datagram's payload already.
pub(crate) fn udp_headers(packet: &mut [u8], from: Endpoint, to: Endpoint) {
    let header_len = ingress::write_ip_header(packet, from.ip, to.ip, UDP, HOPS);
    udp_header(&mut packet[header_len..], from, to);
}

/// A packet with a segment that says nothing but how far its sender is: no data, no options.
pub(crate) fn bare_segment(
    from: Endpoint,
    to: Endpoint,
    seq_number: TcpSeqNumber,
    ack_number: Option<TcpSeqNumber>,
    window_len: u16,
) -> Vec<u8> {
    let segment = TcpRepr {
        src_port: from.port,
        dst_port: to.port,
        control: TcpControl::None,
        seq_number,
        ack_number,
        window_len,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    let header_len = ip_header_len(to.ip);
    let mut packet = vec![0; header_len + segment.buffer_len()];
    ingress::write_ip_header(&mut packet, from.ip, to.ip, ingress::TCP, HOPS);
    let sums = ChecksumCapabilities::default();
    let segment_at = &mut packet[header_len..];
    segment.emit(&mut TcpPacket::new_unchecked(segment_at), &from.ip.into(), &to.ip.into(), &sums);
    packet
}

/// Sends a segment whose number has been acknowledged already, so that the guest answers it: with what it has received, or,
/// if it does not know the connection, with a RST (RFC 9293 section 3.8.4, the probe of a keep-alive without its octet).
pub(crate) fn tcp_probe(tap: &mut Tap, from: Endpoint, to: Endpoint, seq: TcpSeqNumber, ack: TcpSeqNumber) {
    let packet = bare_segment(from, to, seq, Some(ack), u16::MAX);
    tap.packet_mut(packet.len()).copy_from_slice(&packet);
    tap.send_ip(packet.len(), Offload::NONE);
}

/// What an ICMP error says: type, code, and the word behind the checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct IcmpError {
    pub(crate) kind: u8,
    pub(crate) code: u8,
    pub(crate) word: u32,
}

/// Errors that exist in both families.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unreachable {
    Network,
    Host,
    Prohibited,
}

impl Unreachable {
    /// What the host's kernel meant when it would not send to, or connect to, a destination.
    pub(crate) fn from_errno(errno: Errno) -> Option<Self> {
        match errno {
            Errno::ENETUNREACH | Errno::EADDRNOTAVAIL | Errno::EAFNOSUPPORT => Some(Self::Network),
            Errno::EHOSTUNREACH => Some(Self::Host),
            // The host's own rules, a firewall's for example, forbid it.
            Errno::EACCES | Errno::EPERM => Some(Self::Prohibited),
            _ => None,
        }
    }
}

impl IcmpError {
    pub(crate) fn unreachable(is_v6: bool, what: Unreachable) -> Self {
        let (kind, code) = match (is_v6, what) {
            (false, Unreachable::Network) => (3, 0),
            (false, Unreachable::Host) => (3, 1),
            (false, Unreachable::Prohibited) => (3, 13),
            (true, Unreachable::Network) => (1, 0),
            (true, Unreachable::Prohibited) => (1, 1),
            (true, Unreachable::Host) => (1, 3),
        };
        Self { kind, code, word: 0 }
    }

    pub(crate) fn time_exceeded(is_v6: bool) -> Self {
        Self { kind: if is_v6 { 3 } else { 11 }, code: 0, word: 0 }
    }
}

/// Sends an ICMP error from `from` about `original`, a packet of the guest that starts with its IP header.
///
/// The caller sees to it that the original was no ICMP error and had one sender and one receiver (RFC 1122 section
/// 3.2.2, RFC 4443 section 2.4).
pub(crate) fn icmp_error(tap: &mut Tap, from: IpAddr, to: IpAddr, error: IcmpError, original: &[u8]) {
    extended_icmp_error(tap, from, to, error, original, &[]);
}

/// The same, with what a router has said beyond the error, its MPLS labels for example: an extension structure (RFC 4884)
/// with which the host's kernel found nothing wrong, or nothing.
pub(crate) fn extended_icmp_error(
    tap: &mut Tap,
    from: IpAddr,
    to: IpAddr,
    error: IcmpError,
    original: &[u8],
    extension: &[u8],
) {
    // As much of it as fits into the least packet that everybody must take (RFC 1812: 576; RFC 4443: 1,280).
    let most: usize = if to.is_ipv6() { 1280 - 48 } else { 576 - 28 };
    // What stands before an extension is of whole words, a least number of bytes, and as long as a field of the header says.
    let (word_len, shift) = if to.is_ipv6() { (8, 24) } else { (4, 16) };
    let room = most.saturating_sub(extension.len()) / word_len * word_len;
    let (most, quoted_len, words, extension) = if extension.is_empty() || room < LEAST_BEFORE_EXTENSION {
        (most, original.len().min(most), 0, &[][..])
    } else {
        let padded = original.len().next_multiple_of(word_len).clamp(LEAST_BEFORE_EXTENSION, room);
        (room, padded, u32::from(small(padded / word_len)), extension)
    };
    let original = &original[..original.len().min(most)];
    let header_len = ip_header_len(to);
    let len = header_len + 8 + quoted_len + extension.len();
    let packet = tap.packet_mut(len);
    packet[header_len] = error.kind;
    packet[header_len + 1] = error.code;
    packet[header_len + 4..header_len + 8].copy_from_slice(&(error.word | words << shift).to_be_bytes());
    // The padding, if any, is zero already.
    let (quoted, behind) = packet[header_len + 8..].split_at_mut(quoted_len);
    quoted[..original.len()].copy_from_slice(original);
    behind.copy_from_slice(extension);
    finish_icmp(packet, from, to);
    tap.send_ip(len, Offload::NONE);
}

/// What is quoted of a packet if extensions follow it is padded to that (RFC 4884 section 3).
const LEAST_BEFORE_EXTENSION: usize = 128;

/// Sends an ICMP message (header and all; its checksum is filled in), in fragments if the link demands it.
pub(crate) fn icmp(tap: &mut Tap, from: IpAddr, to: IpAddr, message: &[u8]) {
    let header_len = ip_header_len(to);
    let len = header_len + message.len();
    if message.len() < 8 || len > 65_535 {
        return;
    }
    if len <= tap.mtu {
        let packet = tap.packet_mut(len);
        packet[header_len..].copy_from_slice(message);
        finish_icmp(packet, from, to);
        tap.send_ip(len, Offload::NONE);
    } else {
        let mut packet = vec![0; len];
        packet[header_len..].copy_from_slice(message);
        let protocol = finish_icmp(&mut packet, from, to);
        send_fragmented(tap, from, to, protocol, &packet[header_len..]);
    }
}

/// Writes the IP header and the ICMP checksum; the protocol.
fn finish_icmp(packet: &mut [u8], from: IpAddr, to: IpAddr) -> u8 {
    match (from, to) {
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            ingress::write_ip_header(packet, from, to, ICMPV6, HOPS);
            Icmpv6Packet::new_unchecked(&mut packet[40..]).fill_checksum(&src, &dst);
            ICMPV6
        }
        _ => {
            ingress::write_ip_header(packet, from, to, ICMP, HOPS);
            Icmpv4Packet::new_unchecked(&mut packet[20..]).fill_checksum();
            ICMP
        }
    }
}

/// The header of a packet as the guest sent it, for an ICMP error about it, when only the flow is known.
pub(crate) fn original_udp(guest: Endpoint, remote: Endpoint, payload: &[u8]) -> Vec<u8> {
    let mut udp = Vec::with_capacity(8 + payload.len());
    udp.extend(guest.port.to_be_bytes());
    udp.extend(remote.port.to_be_bytes());
    udp.extend(small(8 + payload.len()).to_be_bytes());
    udp.extend([0; 2]);
    udp.extend(payload);
    ingress::rebuild(guest.ip, remote.ip, UDP, HOPS, &udp)
}

/// Whether an ICMP error may be sent about `packet`.
pub(crate) fn deserves_icmp_error(packet: &Packet<'_>) -> bool {
    let is_error = match (packet.protocol, packet.payload().first()) {
        (ICMP, Some(kind)) => !matches!(kind, 0 | 8 | 13 | 14),
        (ICMPV6, Some(kind)) => *kind < 128,
        (ICMP | ICMPV6, None) => true,
        _ => false,
    };
    let later_fragment = packet.fragment.is_some_and(|piece| piece.offset != 0);
    let group = match packet.dst {
        IpAddr::V4(ip) => ip.is_multicast() || ip.is_broadcast(),
        IpAddr::V6(ip) => ip.is_multicast(),
    };
    !is_error && !later_fragment && !group
}

/// Answers an ARP request.
pub(crate) fn arp_reply(tap: &mut Tap, target: Ipv4Addr, source_mac: [u8; 6], source: Ipv4Addr) {
    let reply = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: EthernetAddress(tap.gateway_mac()),
        source_protocol_addr: target,
        target_hardware_addr: EthernetAddress(source_mac),
        target_protocol_addr: source,
    };
    let mut payload = [0; 28];
    reply.emit(&mut ArpPacket::new_unchecked(&mut payload[..]));
    tap.send_arp(&payload);
}

/// Answers a neighbour solicitation (RFC 4861 section 7.2.4). One that goes to all nodes must not claim to be solicited:
/// kernels ignore it then.
pub(crate) fn neighbour_advert(tap: &mut Tap, target: Ipv6Addr, to: Ipv6Addr) {
    let solicited =
        if to.is_multicast() { NdiscNeighborFlags::empty() } else { NdiscNeighborFlags::SOLICITED };
    let advert = Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert {
        flags: NdiscNeighborFlags::ROUTER | NdiscNeighborFlags::OVERRIDE | solicited,
        target_addr: target,
        lladdr: Some(EthernetAddress(tap.gateway_mac()).into()),
    });
    let message_len = advert.buffer_len();
    let packet = tap.packet_mut(40 + message_len);
    // Neighbour discovery is believed only with the greatest hop limit.
    ingress::write_ip_header(packet, target.into(), to.into(), ICMPV6, 255);
    let mut icmp = Icmpv6Packet::new_unchecked(&mut packet[40..]);
    advert.emit(&target, &to, &mut icmp, &smoltcp::phy::ChecksumCapabilities::default());
    tap.send_ip(40 + message_len, Offload::NONE);
}
