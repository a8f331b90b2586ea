//! A guest that does not read its end of the wire: who has something for it rests, and nothing is lost.

use super::*;

#[test]
fn nothing_is_lost_while_the_tap_takes_no_frames() {
    const SIZE: usize = 3_000_000;
    let (listener, port) = listener(false);
    let mut script = Script::new(&spec(), true);
    let mut peer = Peer::new(false, port);
    // 60,000 << 7 bytes: more than the wire holds.
    peer.open(&mut script);
    let server = accept(&listener);
    let writer = std::thread::spawn(move || (&server).write_all(&vec![7; SIZE]).expect("write"));
    for _ in 0..50 {
        script.turn(Duration::from_millis(1));
    }
    let mut got = 0;
    while got < SIZE {
        let frame = script.expect_tcp("data", |segment| !segment.payload().is_empty());
        // `take` demands every byte in order and exactly once, and virtual time stands still: no repetition.
        got += peer.take(&mut script, &frame);
    }
    writer.join().expect("writer");
}

#[test]
fn a_tap_without_room_lets_everybody_rest_and_nothing_is_lost() {
    let publish = forwarded(Protocol::Udp, 9_090);
    let server = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let port = server.local_addr().expect("address").port();
    for inbound in [false, true] {
        let mut script = Script::with(&spec(), false, std::slice::from_ref(&publish));
        script.send_ip(&udp((GUEST_V4, 5_000), (GATEWAY_V4, port), b"ask"));
        script.settle();
        let flow = server.recv_from(&mut [0; 10]).expect("datagram").1;
        let to = if inbound { script.published[0] } else { flow };
        let mut sent = 0u32;
        let mut send = |script: &mut Script, count| {
            for _ in 0..count {
                let mut datagram = [0; 1_000];
                datagram[..4].copy_from_slice(&sent.to_be_bytes());
                server.send_to(&datagram, to).expect("send");
                sent += 1;
            }
            script.settle();
            sent
        };
        while !script.engine.is_blocked() {
            send(&mut script, 10);
        }
        // As many as the socket's own queue holds.
        let all = send(&mut script, 40);
        assert!(script.engine.is_quiet(script.now), "what cannot be sent on must not wake the stack");
        for expected in 0..all {
            let frame = script.expect("every datagram", |_| true);
            assert_eq!(frame.packet().payload()[8..12], expected.to_be_bytes());
        }
        // Far more than anybody holds.
        for _ in 0..100 {
            send(&mut script, 50);
        }
        assert!(script.engine.is_blocked() && script.engine.is_quiet(script.now));
        script.engine.check_bounds();
        while script.engine.is_blocked() || !script.engine.is_quiet(script.now) {
            script.expect("what was held", |_| true);
            script.settle();
        }
    }
}

#[test]
fn connections_rest_while_the_tap_has_no_room() {
    let (listener, port) = listener(false);
    let mut script = Script::new(&spec(), true);
    let mut peers: Vec<Peer> = (0..40).map(|_| Peer::new(false, port)).collect();
    let mut servers = Vec::new();
    for (guest_port, peer) in (1_000..).zip(&mut peers) {
        peer.guest.1 = guest_port;
        peer.open(&mut script);
        let server = accept(&listener);
        server.set_nonblocking(true).expect("non-blocking");
        servers.push(server);
    }
    let mut written: Vec<usize> = vec![0; servers.len()];
    let mut write = |script: &mut Script| {
        for (server, written) in servers.iter_mut().zip(&mut written) {
            *written += server.write(&[7; 50_000]).unwrap_or(0);
        }
        script.settle();
        written.iter().sum::<usize>()
    };
    while !script.engine.is_blocked() {
        write(&mut script);
    }
    write(&mut script);
    assert!(script.engine.is_quiet(script.now));
    let all = write(&mut script);
    assert!(script.engine.is_quiet(script.now));
    let mut got = 0;
    while got < all {
        let frame = script.expect_tcp("data", |segment| !segment.payload().is_empty());
        let to = usize::from(frame.tcp().dst_port() - 1_000);
        got += peers[to].take(&mut script, &frame);
    }
}
