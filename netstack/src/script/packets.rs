//! Packets as the guest's kernel makes them.

use super::*;

/// A UDP packet as the guest's kernel makes it.
pub(super) fn udp(from: (&str, u16), to: (&str, u16), payload: &[u8]) -> Vec<u8> {
    let (src, dst) = (ip(from.0), ip(to.0));
    let mut datagram = vec![0; 8];
    datagram[..2].copy_from_slice(&from.1.to_be_bytes());
    datagram[2..4].copy_from_slice(&to.1.to_be_bytes());
    let len = u16::try_from(8 + payload.len()).expect("datagram");
    datagram[4..6].copy_from_slice(&len.to_be_bytes());
    datagram.extend(payload);
    UdpPacket::new_unchecked(&mut datagram[..]).fill_checksum(&src.into(), &dst.into());
    ingress::rebuild(src, dst, ingress::UDP, 64, &datagram)
}

/// The bytes from `at` to `end` of an IPv4 packet's payload, as a fragment.
pub(super) fn v4_fragment(whole: &[u8], id: u16, at: usize, end: usize) -> Vec<u8> {
    let mut packet = whole[..20].to_vec();
    packet.extend(&whole[20 + at..20 + end]);
    let len = u16::try_from(packet.len()).expect("length");
    let mut header = smoltcp::wire::Ipv4Packet::new_unchecked(&mut packet[..]);
    header.set_total_len(len);
    header.set_dont_frag(false);
    header.set_ident(id);
    header.set_more_frags(end < whole.len() - 20);
    header.set_frag_offset(u16::try_from(at).expect("offset"));
    header.fill_checksum();
    packet
}

/// An ICMPv6 message with its checksum.
pub(super) fn icmpv6(src: &str, dst: &str, hops: u8, message: &[u8]) -> Vec<u8> {
    let (src, dst) = (ip(src), ip(dst));
    let mut message = message.to_vec();
    let len = u32::try_from(message.len()).expect("length");
    let pseudo = checksum::pseudo_header(&src.into(), &dst.into(), IpProtocol::Icmpv6, len);
    let sum = !checksum::combine(&[pseudo, checksum::data(&message)]);
    if let Some(field) = message.get_mut(2..4) {
        field.copy_from_slice(&sum.to_be_bytes());
    }
    ingress::rebuild(src, dst, ingress::ICMPV6, hops, &message)
}

/// A neighbour solicitation for `target`, with options as they are given.
pub(super) fn solicitation(target: &str, options: &[u8]) -> Vec<u8> {
    let IpAddr::V6(target) = ip(target) else { unreachable!("written as IPv6") };
    let message = [&[135, 0, 0, 0, 0, 0, 0, 0], &target.octets()[..], options].concat();
    icmpv6("fe80::1", "ff02::1:ff00:2", 255, &message)
}
