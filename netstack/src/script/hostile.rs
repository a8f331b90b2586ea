//! A guest that means harm: frames of every wrong kind, by the hundred thousand. Nothing of it may panic, no table may
//! grow beyond its bound, and who does nothing wrong is served as ever.
//!
//! `NETSTACK_FLOOD` says how many times as long the longest of these tests goes on, and `NETSTACK_SEED` where it begins.

use super::joined::Joining;
use super::*;
use attack::Attack;

mod attack;

#[test]
fn connections_that_nobody_answers_have_one_bound_whichever_way_they_go() {
    let name = "script::hostile::connections_that_nobody_answers_have_one_bound_whichever_way_they_go";
    if !in_empty_namespace(name) {
        return;
    }
    let busy = Busy::new();
    let mut joining = Joining::new();
    let script = &mut joining.script;
    script.engine.budget().limit = 128;
    let mut port = 20_000;
    let mut knock = |script: &mut Script| {
        for _ in 0..70 {
            let mut peer = Peer::new(false, busy.port);
            port += 1;
            peer.guest.1 = port;
            peer.send(script, TcpControl::Syn, b"");
        }
        script.engine.check_bounds();
    };
    // Nobody makes sockets: of the host's connections, half of 64 wait, and the others cross the TAP.
    let clients: Vec<TcpStream> =
        (0..34).map(|_| TcpStream::connect(script.published[0]).expect("connect")).collect();
    script.wait_for("the connections", |script| script.stats().tcp_flows == 34);
    assert_eq!(script.engine.half_open(), 32);
    script.engine.check_bounds();
    // The guest's have the rest, and the oldest of them give way.
    knock(script);
    assert_eq!((script.engine.half_open(), script.stats().evicted), (64, 70 - 32));
    // What has been answered counts no more.
    assert!(joining.maker.answer());
    script.wait_for("all are joined", |script| script.stats().tcp_joined == 32);
    assert_eq!(script.engine.half_open(), 32);
    script.engine.check_bounds();
    drop(clients);
    while joining.inside.accept().is_ok() {}
    script.wait_for("all have ended", |script| script.stats().tcp_flows <= 32 + 2);
    // Now the guest's have all, and one of the host's goes the other way.
    knock(script);
    assert_eq!(script.engine.half_open(), 64);
    let _client = TcpStream::connect(script.published[0]).expect("connect");
    script.wait_for("the connection", |script| script.stats().tcp_in == 32 + 3);
    assert_eq!((script.engine.half_open(), script.stats().tcp_joined), (64, 32));
    script.engine.check_bounds();
}

#[test]
fn connections_of_the_guests_that_nobody_answers_end_none_of_the_hosts() {
    let name = "script::hostile::connections_of_the_guests_that_nobody_answers_end_none_of_the_hosts";
    if !in_empty_namespace(name) {
        return;
    }
    let busy = Busy::new();
    let mut joining = Joining::new();
    // The server's queue is full, too.
    let backlog = nix::sys::socket::Backlog::new(0).expect("backlog");
    nix::sys::socket::listen(&joining.inside, backlog).expect("listen");
    let _queued = TcpStream::connect(("127.0.0.1", 80)).expect("connect");
    let script = &mut joining.script;
    script.engine.budget().limit = 128;
    let _old = TcpStream::connect(script.published[0]).expect("connect");
    script.wait_for("the connection", |script| script.stats().tcp_flows == 1);
    assert!(joining.maker.answer());
    script.settle();
    script.advance(crate::config::HALF_OPEN_SPARE * 2);
    assert_eq!((script.engine.half_open(), script.stats().tcp_in), (1, 0), "it waits for the server");
    for port in 20_000..20_070 {
        let mut peer = Peer::new(false, busy.port);
        peer.guest.1 = port;
        peer.send(script, TcpControl::Syn, b"");
    }
    assert_eq!((script.engine.half_open(), script.stats().evicted), (64, 70 - 63));
    let _new = TcpStream::connect(script.published[0]).expect("connect");
    script.wait_for("the other connection", |script| script.stats().tcp_flows == 65);
    assert_eq!((script.stats().tcp_in, script.stats().evicted), (1, 70 - 63), "it crosses the TAP");
    script.engine.check_bounds();
}

#[test]
fn a_flood_of_mutilated_frames_harms_nobody() {
    if !in_empty_namespace("script::hostile::a_flood_of_mutilated_frames_harms_nobody") {
        return;
    }
    let mut script = Script::new(&spec(), true);
    let mut random = Seeded(0x5eed_0004);
    let query = crate::dns::message::tests::query(7, "some.name", 28, true);
    let seeds = [
        udp((GUEST_V4, 5_000), ("192.0.2.1", 9), b"datagram"),
        udp((GUEST_V6, 5_000), ("2001:db8::1", 9), b"datagram"),
        udp((GUEST_V4, 5_000), (GATEWAY_V4, 53), &query),
        udp((GUEST_V6, 5_000), (GATEWAY_V6, 53), &query),
        Peer::new(false, 80).segment(TcpControl::Syn, b""),
        Peer::new(true, 80).segment(TcpControl::Fin, b"data"),
        ingress::rebuild(
            ip(GUEST_V4),
            ip("192.0.2.1"),
            ingress::ICMP,
            64,
            &[8, 0, 0, 0, 0, 7, 0, 1, 1, 2, 3, 4],
        ),
        ingress::rebuild(ip(GUEST_V6), ip("2001:db8::1"), ingress::ICMPV6, 64, &[128, 0, 0, 0, 0, 7, 0, 1]),
    ];
    for round in 0..100_000usize {
        let mut packet = seeds[random.below(seeds.len())].clone();
        for _ in 0..random.below(4) {
            let at = random.below(packet.len());
            packet[at] = random.byte();
        }
        if random.below(8) == 0 {
            packet.truncate(random.below(packet.len()).max(1));
        } else if random.below(8) == 0 {
            packet.extend(std::iter::repeat_n(0xa5, random.below(9_000)));
        }
        // Damage behind the header should get past the header's checksum.
        if packet[0] >> 4 == 4 && packet.len() >= 20 && packet[0] & 15 >= 5 && random.below(4) != 0 {
            let header_len = usize::from(packet[0] & 15) * 4;
            if packet.len() >= header_len {
                smoltcp::wire::Ipv4Packet::new_unchecked(&mut packet[..]).fill_checksum();
            }
        }
        let ethertype = if packet[0] >> 4 == 6 { 0x86dd } else { 0x0800 };
        script.send_frame(random.below(3) != 0, ethertype, &packet);
        script.turn(Duration::ZERO);
        while script.try_recv().is_some() {}
        if round % 1_000 == 0 {
            script.now += Duration::from_millis(500);
        }
    }
    let stats = script.stats();
    assert!(stats.dropped_malformed > 1_000 && stats.tcp_out > 100 && stats.dns_queries > 1_000, "{stats:?}");
    // Still there.
    script.send_ip(&udp((GUEST_V4, 5_000), (GATEWAY_V4, 53), &query));
    script.expect("an answer", |_| true);
}

#[test]
fn a_flood_of_impossible_segments_harms_nobody() {
    for seed in 0..4 {
        let mut random = Seeded(0x5eed_0005 + seed);
        let is_v6 = seed % 2 == 1;
        let (listener, port) = listener(is_v6);
        let mut script = Script::new(&spec(), true);
        let mut alive = 0;
        for connection in 0..30u16 {
            let mut peer = Peer::new(is_v6, port);
            peer.guest.1 = 1_000 + connection;
            peer.open(&mut script);
            let mut server = accept(&listener);
            server.set_nonblocking(true).expect("non-blocking");
            for _ in 0..300 {
                let near = |random: &mut Seeded, value: i32| match random.below(4) {
                    0 => value,
                    1 => value.wrapping_add(i32::try_from(random.below(4_000)).expect("small")),
                    2 => value.wrapping_sub(i32::try_from(random.below(4_000)).expect("small")),
                    _ => i32::from_ne_bytes([random.byte(), random.byte(), random.byte(), random.byte()]),
                };
                let forged = Peer {
                    seq: near(&mut random, peer.seq),
                    ack: near(&mut random, peer.ack),
                    window: u16::from_ne_bytes([random.byte(), random.byte()]),
                    ..Peer { guest: peer.guest, ..Peer::new(is_v6, port) }
                };
                let payload = vec![1; random.below(3_000)];
                let mut packet = forged.segment(TcpControl::None, &payload);
                let tcp = if is_v6 { 40 } else { 20 };
                // Flags of every kind, now and then with a reset, which would end it too soon.
                packet[tcp + 13] = random.byte() & if random.below(50) == 0 { 0xff } else { 0xfb };
                if random.below(4) == 0 {
                    let at = tcp + 12 + random.below(20);
                    packet[at] = random.byte();
                }
                script.send_frame(true, if is_v6 { 0x86dd } else { 0x0800 }, &packet);
                if random.below(3) == 0 {
                    let _ = server.write(&payload);
                    let _ = server.read(&mut [0; 1_000]);
                }
                script.turn(Duration::ZERO);
                while script.try_recv().is_some() {}
                if random.below(20) == 0 {
                    script.advance_millis(700);
                }
            }
            alive += script.stats().tcp_flows;
        }
        assert!(alive > 0, "some survive for a while");
        // Another connection is as good as ever.
        let (quiet, port) = self::listener(is_v6);
        let mut peer = Peer::new(is_v6, port);
        peer.open(&mut script);
        peer.send(&mut script, TcpControl::Psh, b"hello");
        let mut hello = [0; 5];
        accept(&quiet).read_exact(&mut hello).expect("read");
        assert_eq!(&hello, b"hello");
    }
}

#[test]
fn a_guest_that_knows_where_to_hit_harms_nobody() {
    if !in_empty_namespace("script::hostile::a_guest_that_knows_where_to_hit_harms_nobody") {
        return;
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let rounds = 5_000 * number("NETSTACK_FLOOD").unwrap_or(1);
    let first = number("NETSTACK_SEED").unwrap_or(0x5eed_1000);
    for seed in first..first + 4 {
        println!("seed {seed}");
        let mut attack = Attack::new(seed);
        for round in 0..rounds {
            attack.round();
            if round % 500 == 0 {
                attack.script.engine.check_bounds();
                // What is said to a guest that listens comes to an end.
                let quiet = (0..1_000).any(|_| {
                    attack.listen();
                    attack.script.turn(Duration::ZERO);
                    attack.script.engine.is_quiet(attack.script.now) && !attack.script.engine.is_blocked()
                });
                assert!(quiet);
            }
        }
        let stats = attack.script.stats();
        println!("{stats:?}");
        assert!(stats.tcp_out > 200 && stats.tcp_in > 10 && stats.dropped_malformed > 1_000, "{stats:?}");
        // Hours later, whoever does nothing wrong is served.
        for _ in 0..40 {
            attack.script.advance(Duration::from_secs(60));
            attack.listen();
        }
        let mut peer = Peer::new(false, attack.listeners[0].1);
        peer.guest.1 = 60_000;
        peer.open(&mut attack.script);
        peer.send(&mut attack.script, TcpControl::Psh, b"hello");
        attack.servers.clear();
        attack.listeners[0].0.set_nonblocking(false).expect("blocking");
        // Behind whatever else has been connecting.
        let heard = std::iter::from_fn(|| attack.listeners[0].0.accept().ok()).any(|(mut stream, _)| {
            let mut hello = [0; 5];
            stream.set_read_timeout(Some(std::time::Duration::from_secs(10))).expect("time-out");
            stream.read(&mut hello).is_ok() && &hello == b"hello"
        });
        assert!(heard);
        attack.script.engine.check_bounds();
    }
}
