//! Datagrams: how long their flows last, and whom they seem to be from.

use super::*;

#[test]
fn udp_flows_end_by_idleness_only() {
    let server = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let port = server.local_addr().expect("address").port();
    let mut script = Script::new(&spec(), true);
    let ask = |script: &mut Script| {
        script.send_ip(&udp((GUEST_V4, 5_000), (GATEWAY_V4, port), b"ask"));
        script.settle();
        server.recv_from(&mut [0; 10]).expect("datagram").1
    };
    // Unanswered: a minute.
    ask(&mut script);
    script.advance_millis(59_000);
    assert_eq!(script.stats().udp_flows, 1);
    script.advance_millis(2_000);
    assert_eq!(script.stats().udp_flows, 0);
    // Answered: three.
    let from = ask(&mut script);
    server.send_to(b"answer", from).expect("send");
    script.expect("the answer", |frame| frame.packet().payload().ends_with(b"answer"));
    for _ in 0..17 {
        script.advance_millis(10_000);
    }
    assert_eq!(script.stats().udp_flows, 1);
    assert_eq!(ask(&mut script), from, "the same socket");
    script.advance_millis(179_000);
    assert_eq!(script.stats().udp_flows, 1);
    script.advance_millis(2_000);
    assert_eq!(script.stats().udp_flows, 0);
}

#[test]
fn what_many_peers_had_need_of_is_given_back() {
    let mut script = Script::with(&spec(), false, &[forwarded(Protocol::Udp, 9_090)]);
    let to = (ip("127.0.0.1"), script.published[0].port());
    let peers: Vec<_> = (0..400).map(|_| UdpSocket::bind("127.0.0.1:0").expect("socket")).collect();
    for peer in &peers {
        peer.send_to(b"x", to).expect("send");
        script.expect("the datagram", |_| true);
    }
    assert!(script.engine.udp.room_for_peers() >= peers.len());
    script.advance(Duration::from_secs(100));
    peers[0].send_to(b"x", to).expect("send");
    script.expect("the datagram", |_| true);
    script.advance(Duration::from_secs(100));
    assert!((1..100).contains(&script.engine.udp.room_for_peers()), "{}", script.engine.udp.room_for_peers());
}

#[test]
fn peers_that_look_alike_keep_a_port_each() {
    let publish = |host_ip| Publish { host_ip: Some(host_ip), ..forwarded(Protocol::Udp, 9_090) };
    let mut script = Script::with(
        &spec(),
        false,
        &[publish(ip("0.0.0.0")), publish(ip("0.0.0.0")), publish(ip("127.0.0.1"))],
    );
    let first = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let port = first.local_addr().expect("address").port();
    let others = ["127.0.0.2", "127.0.0.3"].map(|from| UdpSocket::bind((from, port)).expect("socket"));
    let [to, second, third] = script.published[..] else { panic!("three ports") };
    let [to, second, third] = [to, second, third].map(|addr| SocketAddr::new(ip("127.0.0.1"), addr.port()));
    let seen = |script: &mut Script, from: &UdpSocket, to: SocketAddr| {
        from.send_to(b"x", to).expect("send");
        let frame = script.expect("the datagram", |_| true);
        let packet = frame.packet();
        assert_eq!(packet.src, ip(GATEWAY_V4));
        UdpPacket::new_checked(packet.payload()).expect("datagram").src_port()
    };
    assert_eq!(seen(&mut script, &first, to), port);
    // Addresses that look alike, and one address at two ports.
    let all = [(&others[0], to), (&others[1], to), (&first, second), (&others[0], second), (&first, third)];
    let ports = all.map(|(from, to)| seen(&mut script, from, to));
    for (i, port_of) in ports.iter().enumerate() {
        assert!(*port_of != port && !ports[..i].contains(port_of), "{port} {ports:?}");
    }
    for _ in 0..3 {
        assert_eq!(all.map(|(from, to)| seen(&mut script, from, to)), ports);
        assert_eq!(seen(&mut script, &first, to), port);
    }
    // The first one is gone, the others stay where they are.
    script.advance(Duration::from_secs(100));
    assert_eq!(all.map(|(from, to)| seen(&mut script, from, to)), ports);
    script.advance(Duration::from_secs(100));
    assert_eq!(all.map(|(from, to)| seen(&mut script, from, to)), ports);
    script.engine.check_bounds();
}

#[test]
fn what_goes_to_the_hosts_loopback_comes_from_there() {
    let server = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let port = server.local_addr().expect("address").port();
    let mut spec = spec();
    spec.outbound.v4 = Some(std::net::Ipv4Addr::new(127, 0, 0, 9));
    let mut script = Script::new(&spec, true);
    script.send_ip(&udp((GUEST_V4, 5_000), (GATEWAY_V4, port), b"ask"));
    script.settle();
    let from = server.recv_from(&mut [0; 10]).expect("datagram").1;
    assert_eq!(from.ip(), ip("127.0.0.1"));
    server.send_to(b"answer", from).expect("send");
    script.expect("the answer", |frame| frame.packet().payload().ends_with(b"answer"));
}
