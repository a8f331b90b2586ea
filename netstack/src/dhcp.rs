//! Answers to DHCP (RFC 2131) and DHCPv6 (RFC 8415), for guests that insist on asking.
//!
//! There is one guest and one address of each family, so a lease is nothing that would have to be remembered: whoever
//! asks gets the guest's address, and what it asks about another is refused. One answer to a question at most, of a bounded
//! size, and nothing is kept: asking without end costs what any other datagram costs.
//!
//! Questions are read by hand: a fixed header and options of type, length and value. The functions here are pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use smoltcp::wire::{IpProtocol, UdpPacket, checksum};

use crate::config::{LEASE, StackSpec};
use crate::device::Offload;
use crate::flow::Endpoint;
use crate::ingress::{self, Packet, UDP};
use crate::ndp;
use crate::shared::Shared;

const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;
const SERVER_PORT_V6: u16 = 547;
const CLIENT_PORT_V6: u16 = 546;
/// All_DHCP_Relay_Agents_and_Servers.
const SERVERS_V6: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);

/// Answers a packet if it is a question to a DHCP server; whether it is one.
pub(crate) fn ingress(sh: &mut Shared, packet: &Packet<'_>, mac: Option<[u8; 6]>) -> bool {
    if packet.protocol != UDP || packet.fragment.is_some() {
        return false;
    }
    let Ok(datagram) = UdpPacket::new_checked(packet.payload()) else { return false };
    let ports = (datagram.src_port(), datagram.dst_port());
    let to_server = match packet.dst {
        IpAddr::V4(dst) => {
            ports == (CLIENT_PORT, SERVER_PORT)
                && (dst.is_broadcast() || dst == sh.spec.gateway.v4.0)
                && (packet.src == IpAddr::V4(Ipv4Addr::UNSPECIFIED) || sh.is_guest(packet.src))
        }
        IpAddr::V6(dst) => {
            ports == (CLIENT_PORT_V6, SERVER_PORT_V6)
                && sh.spec.ipv6
                && dst == SERVERS_V6
                && matches!(packet.src, IpAddr::V6(src) if src.is_unicast_link_local())
        }
    };
    if !to_server {
        return false;
    }
    if !ingress::verify_checksum(packet) {
        sh.stats.dropped_malformed.one();
        return true;
    }
    let answer = match packet.dst {
        IpAddr::V4(_) => answer_v4(&sh.spec, datagram.payload()).map(|(to, answer)| {
            let from = Endpoint::new(sh.spec.gateway.v4.0.into(), SERVER_PORT);
            (from, Endpoint::new(to.into(), CLIENT_PORT), answer)
        }),
        IpAddr::V6(_) => answer_v6(&sh.spec, datagram.payload()).map(|answer| {
            let from = Endpoint::new(ndp::link_local(&sh.tap).into(), SERVER_PORT_V6);
            (from, Endpoint::new(packet.src, CLIENT_PORT_V6), answer)
        }),
    };
    let Some((from, to, answer)) = answer else { return true };
    if let Some(mac) = mac {
        sh.tap.learn_guest_mac(mac);
    }
    if !sh.tap.is_congested() {
        send(sh, from, to, &answer);
    }
    true
}

/// Sends a datagram with a finished checksum: who asks for an address reads frames, in which an unfinished one is wrong.
fn send(sh: &mut Shared, from: Endpoint, to: Endpoint, payload: &[u8]) {
    let header_len = if to.ip.is_ipv6() { 40 } else { 20 };
    let udp_len = 8 + payload.len();
    let len = header_len + udp_len;
    let (Ok(small), true) = (u16::try_from(udp_len), len <= sh.tap.mtu) else { return };
    let packet = sh.tap.packet_mut(len);
    ingress::write_ip_header(packet, from.ip, to.ip, UDP, 64);
    let segment = &mut packet[header_len..];
    segment[..2].copy_from_slice(&from.port.to_be_bytes());
    segment[2..4].copy_from_slice(&to.port.to_be_bytes());
    segment[4..6].copy_from_slice(&small.to_be_bytes());
    segment[8..].copy_from_slice(payload);
    let pseudo = checksum::pseudo_header(&from.ip.into(), &to.ip.into(), IpProtocol::Udp, small.into());
    let sum = match !checksum::combine(&[pseudo, checksum::data(segment)]) {
        0 => u16::MAX,
        sum => sum,
    };
    segment[6..8].copy_from_slice(&sum.to_be_bytes());
    sh.tap.send_ip(len, Offload::NONE);
}

// DHCP: where the fields of a message are.
const HEADER: usize = 240;
const MAGIC: [u8; 4] = [0x63, 0x82, 0x53, 0x63];

/// The value of an option; the first if there are several.
fn option_v4(message: &[u8], wanted: u8) -> Option<&[u8]> {
    let mut rest = message.get(HEADER..)?;
    loop {
        match rest {
            [0, more @ ..] => rest = more,
            [255, ..] | [] | [_] => return None,
            [code, len, more @ ..] => {
                let (value, more) = more.split_at_checked(usize::from(*len))?;
                if *code == wanted {
                    return Some(value);
                }
                rest = more;
            }
        }
    }
}

fn address_v4(bytes: Option<&[u8]>) -> Option<Ipv4Addr> {
    bytes?.first_chunk::<4>().map(|bytes| Ipv4Addr::from(*bytes))
}

/// The answer to a DHCP message, and where it goes.
fn answer_v4(spec: &StackSpec, question: &[u8]) -> Option<(Ipv4Addr, Vec<u8>)> {
    const REQUEST: u8 = 1;
    const REPLY: u8 = 2;
    const DISCOVER: u8 = 1;
    const OFFER: u8 = 2;
    const SELECT: u8 = 3;
    const ACK: u8 = 5;
    const NAK: u8 = 6;
    const INFORM: u8 = 8;
    // A request from an Ethernet, with DHCP's magic number.
    if question.get(..3)? != [REQUEST, 1, 6] || *question.get(236..HEADER)? != MAGIC {
        return None;
    }
    let (guest, prefix) = spec.guest.v4;
    let gateway = spec.gateway.v4.0;
    let client = address_v4(question.get(12..))?;
    let kind = match *option_v4(question, 53)? {
        [DISCOVER] => OFFER,
        [SELECT] => {
            // Another server was chosen.
            if address_v4(option_v4(question, 54)).is_some_and(|server| server != gateway) {
                return None;
            }
            let wanted = address_v4(option_v4(question, 50)).unwrap_or(client);
            if wanted == guest { ACK } else { NAK }
        }
        [INFORM] => ACK,
        // Releasing and declining change nothing: there is no other address.
        _ => return None,
    };
    let is_inform = option_v4(question, 53) == Some(&[INFORM]);
    let mut answer = vec![0; HEADER];
    answer[..4].copy_from_slice(&[REPLY, 1, 6, 0]);
    // Transaction, then flags, addresses and the client's Ethernet address, as they were.
    answer[4..8].copy_from_slice(question.get(4..8)?);
    answer[10..12].copy_from_slice(question.get(10..12)?);
    answer[28..44].copy_from_slice(question.get(28..44)?);
    answer[236..HEADER].copy_from_slice(&MAGIC);
    let mut option = |code: u8, value: &[u8]| {
        answer.extend([code, u8::try_from(value.len()).unwrap_or_default()]);
        answer.extend(value);
    };
    option(53, &[kind]);
    option(54, &gateway.octets());
    if kind != NAK {
        let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
        option(1, &mask.to_be_bytes());
        option(3, &gateway.octets());
        option(28, &(u32::from(guest) | !mask).to_be_bytes());
        option(26, &spec.mtu.to_be_bytes());
        if let Some(resolver) = spec.resolver_v4() {
            option(6, &resolver.octets());
        }
        if !is_inform {
            option(51, &seconds(LEASE).to_be_bytes());
        }
    }
    answer.push(255);
    if kind != NAK {
        let (client, guest) = (client.octets(), if is_inform { [0; 4] } else { guest.octets() });
        answer[12..16].copy_from_slice(&client);
        answer[16..20].copy_from_slice(&guest);
        answer[20..24].copy_from_slice(&gateway.octets());
    }
    // BOOTP's least length, which some clients and relays insist on.
    answer.resize(answer.len().max(300), 0);
    // Who has no address yet cannot be sent to by address (RFC 2131 section 4.1). The frame is for the guest alone.
    let to = if client.is_unspecified() || kind == NAK { Ipv4Addr::BROADCAST } else { client };
    Some((to, answer))
}

fn seconds(time: smoltcp::time::Duration) -> u32 {
    u32::try_from(time.secs()).unwrap_or(u32::MAX)
}

/// Greatest length of a client's identifier that is sent back (RFC 8415 section 11.1).
const MAX_DUID: usize = 130;

/// The options of a DHCPv6 message, or of an option.
fn options_v6(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let [a, b, c, d, more @ ..] = rest else { return None };
        let (value, more) = more.split_at_checked(usize::from(u16::from_be_bytes([*c, *d])))?;
        rest = more;
        Some((u16::from_be_bytes([*a, *b]), value))
    })
}

fn push_v6(answer: &mut Vec<u8>, code: u16, value: &[u8]) {
    answer.extend(code.to_be_bytes());
    answer.extend(u16::try_from(value.len()).unwrap_or_default().to_be_bytes());
    answer.extend(value);
}

/// The answer to a DHCPv6 message.
fn answer_v6(spec: &StackSpec, question: &[u8]) -> Option<Vec<u8>> {
    const SOLICIT: u8 = 1;
    const ADVERTISE: u8 = 2;
    const REQUEST: u8 = 3;
    const CONFIRM: u8 = 4;
    const RENEW: u8 = 5;
    const REBIND: u8 = 6;
    const REPLY: u8 = 7;
    const RELEASE: u8 = 8;
    const DECLINE: u8 = 9;
    const INFORMATION: u8 = 11;
    const CLIENT: u16 = 1;
    const SERVER: u16 = 2;
    const IA_NA: u16 = 3;
    const ADDRESS: u16 = 5;
    const STATUS: u16 = 13;
    const RAPID: u16 = 14;
    const RESOLVERS: u16 = 23;
    const NOT_ON_LINK: u16 = 4;
    let (&kind, options) = (question.first()?, question.get(4..)?);
    let find = |wanted| options_v6(options).find(|(code, _)| *code == wanted).map(|(_, value)| value);
    // By our Ethernet address.
    let [a, b, c, d, e, f] = spec.gateway.mac;
    let server = [0, 3, 0, 1, a, b, c, d, e, f];
    let client = find(CLIENT).filter(|client| client.len() <= MAX_DUID);
    let asked = find(SERVER);
    // Which messages name whom: RFC 8415 section 16.
    let is_sound = match kind {
        SOLICIT | CONFIRM | REBIND => client.is_some() && asked.is_none(),
        REQUEST | RENEW | RELEASE | DECLINE => client.is_some() && asked == Some(&server[..]),
        INFORMATION => asked.is_none_or(|asked| asked == server),
        _ => false,
    };
    if !is_sound {
        return None;
    }
    let rapid = kind == SOLICIT && find(RAPID).is_some();
    let mut answer = vec![if kind == SOLICIT && !rapid { ADVERTISE } else { REPLY }];
    answer.extend(question.get(1..4)?);
    push_v6(&mut answer, SERVER, &server);
    if let Some(client) = client {
        push_v6(&mut answer, CLIENT, client);
    }
    if rapid {
        push_v6(&mut answer, RAPID, &[]);
    }
    let guest = spec.guest.v6.0;
    if let (SOLICIT | REQUEST | RENEW | REBIND, Some(wanted)) = (kind, find(IA_NA)) {
        let lease = seconds(LEASE);
        let mut addresses = Vec::new();
        let mut push = |address: Ipv6Addr, lease: u32| {
            let mut value = address.octets().to_vec();
            value.extend(lease.to_be_bytes());
            value.extend(lease.to_be_bytes());
            push_v6(&mut addresses, ADDRESS, &value);
        };
        push(guest, lease);
        // An address that it has from elsewhere ends now.
        let other = options_v6(wanted.get(12..)?)
            .filter(|(code, _)| *code == ADDRESS)
            .find_map(|(_, value)| value.first_chunk::<16>().map(|bytes| Ipv6Addr::from(*bytes)))
            .filter(|address| *address != guest);
        if let (REQUEST | RENEW | REBIND, Some(other)) = (kind, other) {
            push(other, 0);
        }
        // Its name, then when to renew and to rebind: the usual shares of the lease.
        let mut value = wanted.get(..4)?.to_vec();
        value.extend((lease / 2).to_be_bytes());
        value.extend((lease / 5 * 4).to_be_bytes());
        value.extend(addresses);
        push_v6(&mut answer, IA_NA, &value);
    }
    if kind == CONFIRM {
        let asked = options_v6(options)
            .filter(|(code, value)| *code == IA_NA && value.len() >= 12)
            .flat_map(|(_, value)| options_v6(&value[12..]))
            .filter(|(code, _)| *code == ADDRESS)
            .filter_map(|(_, value)| value.first_chunk::<16>().map(|bytes| Ipv6Addr::from(*bytes)));
        let on_link = asked.fold(None, |all, ip| Some(all.unwrap_or(true) && spec.guest.contains(ip.into())));
        let status = if on_link? { 0 } else { NOT_ON_LINK };
        push_v6(&mut answer, STATUS, &u16::to_be_bytes(status));
    }
    if let RELEASE | DECLINE = kind {
        push_v6(&mut answer, STATUS, &[0, 0]);
    }
    if let Some(resolver) = spec.resolver_v6() {
        push_v6(&mut answer, RESOLVERS, &resolver.octets());
    }
    Some(answer)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::config::DnsAt;
    use crate::ingress::tests::Seeded;

    pub(crate) fn question_v4(kind: u8, options: &[(u8, &[u8])], client: [u8; 4]) -> Vec<u8> {
        let mut question = vec![0; HEADER];
        question[..4].copy_from_slice(&[1, 1, 6, 0]);
        question[4..8].copy_from_slice(b"xyzw");
        question[12..16].copy_from_slice(&client);
        question[28..34].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
        question[236..].copy_from_slice(&MAGIC);
        question.extend([53, 1, kind]);
        for (code, value) in options {
            question.extend([*code, u8::try_from(value.len()).expect("short")]);
            question.extend(*value);
        }
        question.push(255);
        question
    }

    #[test]
    fn whoever_asks_gets_the_guests_address() {
        let spec = crate::config::tests::spec();
        let (to, offer) = answer_v4(&spec, &question_v4(1, &[(12, b"name")], [0; 4])).expect("offer");
        assert_eq!(to, Ipv4Addr::BROADCAST);
        assert_eq!(
            (&offer[4..8], &offer[16..20], &offer[28..34]),
            (&b"xyzw"[..], &[10, 0, 2, 100][..], &[2, 0, 0, 0, 0, 9][..])
        );
        assert_eq!(option_v4(&offer, 53), Some(&[2][..]));
        assert_eq!(option_v4(&offer, 1), Some(&[255, 255, 255, 0][..]));
        assert_eq!(option_v4(&offer, 3), Some(&[10, 0, 2, 2][..]));
        assert_eq!(option_v4(&offer, 6), Some(&[10, 0, 2, 2][..]));
        assert_eq!(option_v4(&offer, 26), Some(&[5, 220][..]));
        assert_eq!(option_v4(&offer, 51), Some(&86_400u32.to_be_bytes()[..]));
        // Selecting, then renewing.
        let select = question_v4(3, &[(50, &[10, 0, 2, 100]), (54, &[10, 0, 2, 2])], [0; 4]);
        assert_eq!(option_v4(&answer_v4(&spec, &select).expect("ack").1, 53), Some(&[5][..]));
        let (to, renewed) = answer_v4(&spec, &question_v4(3, &[], [10, 0, 2, 100])).expect("ack");
        assert_eq!((to, option_v4(&renewed, 53)), (Ipv4Addr::new(10, 0, 2, 100), Some(&[5][..])));
        // The address of another network, and another server.
        let (_, refused) =
            answer_v4(&spec, &question_v4(3, &[(50, &[192, 168, 1, 7])], [0; 4])).expect("nak");
        assert_eq!((option_v4(&refused, 53), &refused[16..20]), (Some(&[6][..]), &[0; 4][..]));
        let elsewhere = question_v4(3, &[(50, &[10, 0, 2, 100]), (54, &[10, 0, 2, 9])], [0; 4]);
        assert!(answer_v4(&spec, &elsewhere).is_none());
        // Only information: no lease.
        let (_, told) = answer_v4(&spec, &question_v4(8, &[], [10, 0, 2, 100])).expect("ack");
        assert_eq!((option_v4(&told, 51), &told[16..20]), (None, &[0; 4][..]));
        assert!(answer_v4(&spec, &question_v4(7, &[], [10, 0, 2, 100])).is_none(), "a release");
    }

    pub(crate) fn question_v6(kind: u8, options: &[(u16, &[u8])]) -> Vec<u8> {
        let mut question = vec![kind, 1, 2, 3];
        for (code, value) in options {
            push_v6(&mut question, *code, value);
        }
        question
    }

    fn find_v6(message: &[u8], wanted: u16) -> Option<Vec<u8>> {
        options_v6(&message[4..]).find(|(code, _)| *code == wanted).map(|(_, value)| value.to_vec())
    }

    #[test]
    fn the_same_by_dhcpv6() {
        let mut spec = crate::config::tests::spec();
        let ia = [&[0, 0, 0, 7][..], &[0; 8]].concat();
        let server = [0, 3, 0, 1, 0x52, 0x54, 0, 0, 0, 1];
        let advert = answer_v6(&spec, &question_v6(1, &[(1, b"me"), (3, &ia)])).expect("advertise");
        assert_eq!(&advert[..4], [2, 1, 2, 3]);
        assert_eq!(find_v6(&advert, 1).as_deref(), Some(&b"me"[..]));
        assert_eq!(find_v6(&advert, 2).as_deref(), Some(&server[..]));
        let granted = find_v6(&advert, 3).expect("IA_NA");
        assert_eq!(granted[..4], [0, 0, 0, 7]);
        assert_eq!(granted[16..32], spec.guest.v6.0.octets());
        assert_eq!(find_v6(&advert, 23), Some(spec.gateway.v6.0.octets().to_vec()));
        let rapid = answer_v6(&spec, &question_v6(1, &[(1, b"me"), (3, &ia), (14, b"")])).expect("reply");
        assert_eq!((rapid[0], find_v6(&rapid, 14)), (7, Some(Vec::new())));
        assert_eq!(
            answer_v6(&spec, &question_v6(3, &[(1, b"me"), (2, &server), (3, &ia)])).expect("reply")[0],
            7
        );
        // Another server's, nobody's, and one who is too long.
        assert!(answer_v6(&spec, &question_v6(3, &[(1, b"me"), (2, b"other"), (3, &ia)])).is_none());
        assert!(answer_v6(&spec, &question_v6(1, &[(3, &ia)])).is_none());
        assert!(answer_v6(&spec, &question_v6(1, &[(1, &[7; 131]), (3, &ia)])).is_none());
        // An address that it still has ends, and is not confirmed.
        let mut with = ia.clone();
        push_v6(
            &mut with,
            5,
            &[&"2001:db8::5".parse::<Ipv6Addr>().expect("address").octets()[..], &[0; 8]].concat(),
        );
        let renewed = answer_v6(&spec, &question_v6(6, &[(1, b"me"), (3, &with)])).expect("reply");
        let ends = find_v6(&renewed, 3).expect("IA_NA");
        assert_eq!((ends.len(), &ends[12 + 28 + 20..]), (12 + 56, &[0; 8][..]));
        let confirm = answer_v6(&spec, &question_v6(4, &[(1, b"me"), (3, &with)])).expect("reply");
        assert_eq!(find_v6(&confirm, 13), Some(vec![0, 4]));
        assert!(answer_v6(&spec, &question_v6(4, &[(1, b"me"), (3, &ia)])).is_none());
        spec.dns.at = DnsAt::Nowhere;
        let told = answer_v6(&spec, &question_v6(11, &[])).expect("reply");
        assert_eq!((told[0], find_v6(&told, 23)), (7, None));
    }

    #[test]
    fn nonsense_is_answered_with_little_or_nothing() {
        let spec = crate::config::tests::spec();
        let mut seeded = Seeded(7);
        let four = question_v4(3, &[(50, &[10, 0, 2, 100]), (61, &[1; 255])], [0; 4]);
        let mut ia = vec![0; 12];
        for _ in 0..40 {
            push_v6(&mut ia, 5, &[9; 24]);
        }
        let six = question_v6(1, &[(1, &[1; 130]), (3, &ia)]);
        for good in [four, six] {
            for _ in 0..20_000 {
                let mut bad = good.clone();
                bad.truncate(usize::try_from(seeded.next()).unwrap_or(0) % (good.len() + 1));
                for _ in 0..4 {
                    let at = usize::try_from(seeded.next() % 1_000).unwrap_or(0) % bad.len().max(1);
                    if let Some(byte) = bad.get_mut(at) {
                        *byte = u8::try_from(seeded.next() & 255).unwrap_or(0);
                    }
                }
                assert!(answer_v4(&spec, &bad).is_none_or(|(_, answer)| answer.len() <= 320));
                assert!(answer_v6(&spec, &bad).is_none_or(|answer| answer.len() <= 320));
            }
        }
    }
}
