//! How connections begin: what the stack says in its SYN, when, and to whom it says no.

use super::*;

#[test]
fn a_syn_is_answered_with_the_links_real_segment_size() {
    for (is_v6, segmentation) in [(false, false), (false, true), (true, false), (true, true)] {
        let (listener, port) = listener(is_v6);
        let mut script = Script::new(&spec(), segmentation);
        let syn_ack = Peer::new(is_v6, port).open(&mut script);
        let segment = syn_ack.tcp();
        let repr = TcpRepr::parse(
            &segment,
            &syn_ack.packet().src.into(),
            &syn_ack.packet().dst.into(),
            &smoltcp::phy::ChecksumCapabilities::ignored(),
        )
        .expect("segment");
        assert_eq!(repr.max_seg_size, Some(if is_v6 { 1440 } else { 1460 }));
        assert!(repr.window_scale.is_some() && repr.sack_permitted && repr.timestamp.is_some());
        accept(&listener);
    }
}

#[test]
fn a_link_without_ipv6_may_be_small() {
    let (listener, port) = listener(false);
    let mut script = Script::new(&StackSpec { mtu: 600, ipv6: false, ..spec() }, false);
    let mut peer = Peer::new(false, port);
    let syn_ack = peer.open(&mut script);
    let (src, dst) = (syn_ack.packet().src.into(), syn_ack.packet().dst.into());
    let ignored = smoltcp::phy::ChecksumCapabilities::ignored();
    let repr = TcpRepr::parse(&syn_ack.tcp(), &src, &dst, &ignored).expect("segment");
    assert_eq!(repr.max_seg_size, Some(560));
    accept(&listener).write_all(&[7; 3_000]).expect("write");
    let mut got = 0;
    while got < 3_000 {
        let frame = script.expect_tcp("data", |segment| !segment.payload().is_empty());
        assert!(frame.packet().bytes.len() <= 600);
        got += peer.take(&mut script, &frame);
    }
}

#[test]
fn a_refused_connection_is_a_reset_that_acknowledges_the_syn() {
    let port = {
        let (_listener, port) = listener(false);
        port
    };
    let mut script = Script::new(&spec(), true);
    let mut peer = Peer::new(false, port);
    peer.send(&mut script, TcpControl::Syn, b"");
    let reset = script.expect_tcp("RST", |_| true);
    let segment = reset.tcp();
    assert!(segment.rst() && segment.ack() && !segment.syn());
    assert_eq!(segment.ack_number(), TcpSeqNumber(peer.seq));
    assert_eq!(script.stats().tcp_flows, 0);
}

#[test]
fn a_syn_is_held_without_its_data_until_the_host_is_connected() {
    let busy = Busy::new();
    let mut script = Script::new(&spec(), true);
    let mut peer = Peer::new(false, busy.port);
    let start = peer.seq;
    peer.send(&mut script, TcpControl::Syn, &[7; 20_000]);
    // The guest repeats it, as its kernel would.
    for _ in 0..3 {
        peer.seq = start;
        peer.send(&mut script, TcpControl::Syn, &[7; 20_000]);
    }
    script.nothing_comes("an answer before the host's");
    assert_eq!((script.stats().tcp_flows, script.stats().tcp_out), (1, 1));
    assert!(script.engine.held_bytes() < 200, "{}", script.engine.held_bytes());
    // Now there is room; the host's kernel tries again within some seconds of real time.
    accept(&busy.listener);
    let answer = script.expect_tcp("SYN-ACK", |segment| segment.syn() && segment.ack());
    assert_eq!(
        answer.tcp().ack_number(),
        TcpSeqNumber(start.wrapping_add(1)),
        "the data is not acknowledged"
    );
    peer.seq = start.wrapping_add(1);
    peer.ack = answer.tcp().seq_number().0.wrapping_add(1);
    peer.send(&mut script, TcpControl::None, b"hello");
    let mut hello = [0; 5];
    accept(&busy.listener).read_exact(&mut hello).expect("read");
    assert_eq!(&hello, b"hello");
}

#[test]
fn a_guest_that_gives_up_connecting_is_forgotten() {
    let busy = Busy::new();
    let mut script = Script::new(&spec(), true);
    let mut peer = Peer::new(false, busy.port);
    peer.send(&mut script, TcpControl::Syn, b"");
    assert_eq!(script.stats().tcp_flows, 1);
    peer.send(&mut script, TcpControl::Rst, b"");
    script.nothing_comes("an answer to a reset");
    assert_eq!(script.stats().tcp_flows, 0);
}

#[test]
fn a_port_may_be_used_again_at_once() {
    let (listener, port) = listener(false);
    for established in [true, false] {
        let mut script = Script::new(&spec(), true);
        let mut peer = Peer::new(false, port);
        if established {
            peer.open(&mut script);
        } else {
            peer.send(&mut script, TcpControl::Syn, b"");
            script.expect_tcp("SYN-ACK", |segment| segment.syn());
        }
        let mut first = accept(&listener);
        // Both in one turn.
        script.send_ip(&peer.segment(TcpControl::Rst, b""));
        let mut again = Peer { seq: peer.seq.wrapping_add(1 << 30), ack: 0, ..peer };
        again.open(&mut script);
        again.send(&mut script, TcpControl::Psh, b"hello");
        let mut hello = [0; 5];
        accept(&listener).read_exact(&mut hello).expect("read");
        first.read(&mut hello).expect_err("reset");
        assert_eq!(script.stats().tcp_flows, 1);
    }
}

#[test]
fn segments_of_no_connection_are_reset_and_resets_are_not() {
    let mut script = Script::new(&spec(), true);
    let mut peer = Peer::new(true, 9);
    peer.ack = 77;
    peer.send(&mut script, TcpControl::None, b"data");
    assert!(script.expect_tcp("RST", |_| true).tcp().rst());
    peer.send(&mut script, TcpControl::Rst, b"");
    script.nothing_comes("an answer to a reset");
}

#[test]
fn the_more_connections_the_smaller_their_windows() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("limit");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("limit");
    let (listener, port) = listener(true);
    let mut script = Script::new(&spec(), true);
    let mut streams = Vec::new();
    let mut scales = Vec::new();
    for i in 0..520u16 {
        let mut peer = Peer::new(true, port);
        peer.guest.1 = 1_000 + i;
        let answer = peer.open(&mut script);
        streams.push(accept(&listener));
        let packet = answer.packet();
        let unchecked = smoltcp::phy::ChecksumCapabilities::ignored();
        let repr = TcpRepr::parse(&answer.tcp(), &packet.src.into(), &packet.dst.into(), &unchecked);
        scales.push(repr.expect("segment").window_scale);
    }
    let with = |scale| scales.iter().filter(|other| **other == Some(scale)).count();
    assert_eq!((with(3), with(1), with(0)), (64, 448, 8));
}

#[test]
fn the_largest_rings_are_for_the_first_connections_from_outside_too() {
    let port = forwarded(Protocol::Tcp, 80);
    let mut script = Script::with(&spec(), true, &[port]);
    let clients: Vec<TcpStream> =
        (0..66).map(|_| TcpStream::connect(script.published[0]).expect("connect")).collect();
    // The scale of the window in a SYN follows from the size of the ring.
    let scales: Vec<Option<u8>> = clients
        .iter()
        .map(|_| {
            let syn = script.expect_tcp("SYN", |segment| segment.syn() && !segment.ack());
            let segment = syn.tcp();
            let (src, dst) = (syn.packet().src.into(), syn.packet().dst.into());
            let ignored = smoltcp::phy::ChecksumCapabilities::ignored();
            TcpRepr::parse(&segment, &src, &dst, &ignored).expect("segment").window_scale
        })
        .collect();
    assert_eq!(scales[..64], [Some(3); 64]);
    assert_eq!(scales[64..], [Some(1); 2]);
}

#[test]
fn a_published_port_is_tried_both_ways() {
    let port = forwarded(Protocol::Tcp, 80);
    // A guest that refuses, one that never answers, and one that accepts the second time.
    for (refuses, accepts) in [(true, false), (false, false), (true, true)] {
        let mut script = Script::with(&spec(), true, std::slice::from_ref(&port));
        let mut client = TcpStream::connect(script.published[0]).expect("connect");
        client.set_read_timeout(Some(std::time::Duration::from_secs(10))).expect("time-out");
        for is_v6 in [false, true] {
            // Repetitions of the first one do not count.
            let syn = script.expect("SYN", |frame| frame.packet().is_v6() == is_v6);
            let (packet, segment) = (syn.packet(), syn.tcp());
            assert!(segment.syn() && segment.dst_port() == 80);
            assert_eq!(packet.src, ip(if is_v6 { GATEWAY_V6 } else { GATEWAY_V4 }));
            // By another name it is another flow, which begins now.
            let lasted = script.engine.flows(0, 1)[0].lasted;
            assert_eq!(lasted, std::time::Duration::ZERO, "{is_v6}");
            let mut peer = Peer::new(is_v6, segment.src_port());
            peer.guest.1 = 80;
            peer.ack = segment.seq_number().0.wrapping_add(1);
            if is_v6 && accepts {
                peer.send(&mut script, TcpControl::Syn, b"");
                peer.send(&mut script, TcpControl::Psh, b"hello");
                client.read_exact(&mut [0; 5]).expect("read");
                script.advance(Duration::from_secs(60));
                assert_eq!(script.stats().tcp_flows, 1);
            } else if refuses {
                script.advance(Duration::from_millis(500));
                peer.send(&mut script, TcpControl::Rst, b"");
            } else {
                script.advance(Duration::from_secs(11));
            }
        }
        if !accepts {
            assert_eq!(script.stats().tcp_flows, 0);
            client.read(&mut [0; 5]).expect_err("reset");
        }
    }
}

#[test]
fn who_waits_at_a_published_port_gives_way_to_the_guests_connections() {
    let port = forwarded(Protocol::Tcp, 80);
    let mut script = Script::with(&spec(), true, &[port]);
    script.engine.limit_flows(3);
    let (listener, port) = listener(false);
    let mut peers = (0..4).map(|n| {
        let mut peer = Peer::new(false, port);
        peer.guest.1 += n;
        peer
    });
    let mut begin = |script: &mut Script| {
        let mut peer = peers.next().expect("a port");
        peer.send(script, TcpControl::Syn, b"");
        let own = |segment: &TcpPacket<&[u8]>| segment.dst_port() == peer.guest.1;
        let frame = script.expect_tcp("an answer", own);
        (!frame.tcp().rst()).then(|| accept(&listener))
    };
    let _first = begin(&mut script).expect("a connection");
    let mut clients = [(); 3].map(|()| TcpStream::connect(script.published[0]).expect("connect"));
    script.wait_for("the connections", |script| script.stats().tcp_flows == 3);
    // The third finds no room, and neither does the guest's while the others have only begun to wait.
    script.wait_for("a refusal", |script| script.stats().refused_by_limit == 1);
    assert!(begin(&mut script).is_none());
    script.advance(crate::config::HALF_OPEN_SPARE);
    let _second = begin(&mut script).expect("a connection");
    assert_eq!((script.stats().evicted, script.stats().tcp_flows), (1, 3));
    clients[0].set_read_timeout(Some(std::time::Duration::from_secs(10))).expect("time-out");
    let ended = clients[0].read(&mut [0]).expect_err("reset");
    assert_eq!(ended.kind(), std::io::ErrorKind::ConnectionReset);
    // Names are asked for over TCP, too.
    let mut peer = Peer::new(false, 53);
    peer.open(&mut script);
    assert_eq!((script.stats().evicted, script.stats().tcp_flows), (2, 3));
    // Nobody is left who waits.
    assert!(begin(&mut script).is_none());
    script.engine.check_bounds();
}
