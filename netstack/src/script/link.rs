//! The link and its router: neighbours, addresses, what the stack says of itself, and what is not for it.

use super::*;

#[test]
fn the_wire_is_a_socket_pair() {
    // What these scripts stand on: one write is one frame, whatever its size, and a full wire says so.
    let script = Script::new(&spec(), true);
    nix::unistd::write(script.wire.as_fd(), &[0; 66_000]).expect("a large frame");
    let mut full = false;
    for _ in 0..1_000 {
        full |= nix::unistd::write(script.wire.as_fd(), &[0; 66_000]).is_err();
    }
    assert!(full);
}

#[test]
fn the_gateway_and_nobody_else_answers_arp_and_neighbour_solicitations() {
    let mut script = Script::new(&spec(), false);
    let arp = |target: [u8; 4]| {
        let mut request =
            vec![0, 1, 8, 0, 6, 4, 0, 1, 0x52, 0x54, 0, 0, 0, 2, 10, 0, 2, 100, 0, 0, 0, 0, 0, 0];
        request.extend(target);
        request
    };
    script.send_frame(false, 0x0806, &arp([10, 0, 2, 3]));
    script.nothing_comes("an answer for somebody else");
    script.send_frame(false, 0x0806, &arp([10, 0, 2, 2]));
    let reply = script.expect("ARP reply", |_| true);
    assert_eq!(reply.ethernet()[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
    assert_eq!(reply.ethernet()[22..28], [0x52, 0x54, 0, 0, 0, 1]);

    let mut frame = solicitation("fd00::3", &[1, 1, 0x52, 0x54, 0, 0, 0, 2]);
    script.send_ip(&frame);
    frame = solicitation("fd00::2", &[1, 1, 0x52, 0x54, 0, 0, 0, 2]);
    // A hop limit that proves that it has crossed a router.
    let mut forged = frame.clone();
    forged[7] = 254;
    script.send_ip(&forged);
    script.nothing_comes("an answer for somebody else, or to somebody far away");
    script.send_ip(&frame);
    let advert = script.expect("neighbour advertisement", |_| true);
    let packet = advert.packet();
    assert_eq!((packet.payload()[0], packet.hop_limit, packet.dst), (136, 255, ip("fe80::1")));
    assert_eq!(packet.payload()[4], 0xe0, "a router, solicited, the only one");
    // Whether the address is free is asked by nobody, and answered to all.
    let IpAddr::V6(target) = ip("fd00::2") else { unreachable!("written as IPv6") };
    let question = [&[135, 0, 0, 0, 0, 0, 0, 0], &target.octets()[..]].concat();
    script.send_ip(&icmpv6("::", "ff02::1:ff00:2", 255, &question));
    let advert = script.expect("neighbour advertisement", |_| true);
    let packet = advert.packet();
    assert_eq!((packet.payload()[0], packet.payload()[4], packet.dst), (136, 0xa0, ip("ff02::1")));
}

#[test]
fn neighbour_solicitations_with_options_of_every_kind() {
    let mut script = Script::new(&spec(), true);
    for (options, answered) in [
        (&[][..], true),
        (&[1, 1, 0x52, 0x54, 0, 0, 0, 2], true),
        // Unknown to us, or longer than it has to be: not our business.
        (&[14, 1, 1, 2, 3, 4, 5, 6], true),
        (&[253, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], true),
        // No length at all, which must not be an endless list (RFC 4861 section 4.6), and too much of it.
        (&[1, 0, 0, 0, 0, 0, 0, 0], false),
        (&[14, 0, 0, 0, 0, 0, 0, 0], false),
        (&[1, 1, 0x52, 0x54, 0, 0, 0, 2, 14, 0, 0, 0, 0, 0, 0, 0], false),
        (&[1, 255, 0, 0, 0, 0, 0, 0], false),
        (&[1], false),
        (&[1, 1, 0x52], false),
    ] {
        script.send_ip(&solicitation("fd00::2", options));
        script.settle();
        assert_eq!(script.try_recv().is_some(), answered, "{options:?}");
    }
    // Too short for a target, and for a type.
    for len in 0..24 {
        let whole = [&[135, 0, 0, 0, 0, 0, 0, 0], &[0xfd; 16][..]].concat();
        script.send_ip(&icmpv6("fe80::1", "ff02::1:ff00:2", 255, &whole[..len]));
        script.send_ip(&icmpv6(GUEST_V6, GATEWAY_V6, 255, &whole[..len]));
        script.nothing_comes("an answer to half a message");
    }
}

#[test]
fn questions_about_the_link_get_one_answer_each_and_leave_one_timer() {
    let mut script = Script::new(&spec(), true);
    let mut discover = vec![0; 240];
    discover[..4].copy_from_slice(&[1, 1, 6, 0]);
    discover[236..].copy_from_slice(&[0x63, 0x82, 0x53, 0x63]);
    discover.extend([53, 1, 1, 255]);
    let solicit = [1, 0, 0, 1, 0, 1, 0, 2, b'm', b'e'];
    let questions = [
        udp(("0.0.0.0", 68), ("255.255.255.255", 67), &discover),
        udp(("fe80::1", 546), ("ff02::1:2", 547), &solicit),
        icmpv6("fe80::1", "ff02::2", 255, &[133, 0, 0, 0, 0, 0, 0, 0]),
    ];
    for _ in 0..200 {
        for question in &questions {
            script.send_ip(question);
            script.settle();
            assert!(script.try_recv().is_some() && script.try_recv().is_none());
        }
    }
    // From elsewhere, to elsewhere, cut, and through a router: nothing.
    for question in [
        udp(("192.0.2.1", 68), ("255.255.255.255", 67), &discover),
        udp(("0.0.0.0", 69), ("255.255.255.255", 67), &discover),
        udp(("0.0.0.0", 68), ("255.255.255.255", 67), &discover[..239]),
        udp(("2001:db8::1", 546), ("ff02::1:2", 547), &solicit),
        udp(("fe80::1", 546), ("ff02::1:2", 547), &solicit[..7]),
        icmpv6("fe80::1", "ff02::2", 254, &[133, 0, 0, 0, 0, 0, 0, 0]),
    ] {
        script.send_ip(&question);
        script.settle();
        assert!(script.try_recv().is_none(), "{question:?}");
    }
    script.engine.check_bounds();
    assert_eq!(script.engine.timers(), 1);
    // What the router says of itself holds for eighteen hours, and is said again before they are over.
    script.advance(crate::config::ROUTER_REFRESH);
    let again = script.try_recv().expect("an advertisement");
    assert_eq!(again.packet().payload()[0], 134);
    assert_eq!(again.packet().dst, ip("ff02::1"));
}

#[test]
fn frames_from_other_addresses_than_the_guests_go_nowhere() {
    let mut script = Script::new(&spec(), false);
    for (i, src) in ["127.0.0.1", "192.0.2.1", "10.0.2.2", "10.0.2.255", "0.0.0.0"].into_iter().enumerate() {
        script.send_ip(&udp((src, 5), (GATEWAY_V4, 9), b"x"));
        script.nothing_comes(src);
        assert_eq!(script.stats().dropped_source, u64::try_from(i + 1).expect("number"));
    }
}

#[test]
fn an_expired_hop_limit_is_reported() {
    let mut script = Script::new(&spec(), true);
    let mut packet = udp((GUEST_V4, 5_000), (GATEWAY_V4, 33_434), b"probe");
    let mut header = smoltcp::wire::Ipv4Packet::new_unchecked(&mut packet[..]);
    header.set_hop_limit(1);
    header.fill_checksum();
    script.send_ip(&packet);
    let error = script.expect("time exceeded", |_| true);
    let error = error.packet();
    let icmp = Icmpv4Packet::new_checked(error.payload()).expect("message");
    assert!(icmp.verify_checksum());
    assert_eq!((error.payload()[0], &error.payload()[8..]), (11, &packet[..]));
}
