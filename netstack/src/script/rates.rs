//! Data that may not go as fast as it comes. Virtual time alone says how much may go.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::joined::Joining;
use super::*;
use crate::rate::{Rate, Rates};

const RATE: u64 = 100_000;
const BURST: usize = 64 * 1024;
const LIMIT: Option<Rate> = Some(Rate { bytes_per_second: RATE, burst: Some(BURST as u64) });

fn script(sent: Option<Rate>, received: Option<Rate>) -> Script {
    Script::new(&StackSpec { rates: Rates { sent, received }, ..spec() }, true)
}

/// Payload of data that the guest gets until it has `wanted` bytes, and that no more comes.
fn takes(script: &mut Script, peer: &mut Peer, wanted: usize) {
    let mut taken = 0;
    while taken < wanted {
        let frame = script.expect_tcp("data", |segment| !segment.payload().is_empty());
        taken += peer.take(script, &frame);
    }
    assert_eq!(taken, wanted);
    rests(script);
}

/// Nothing comes, and nothing but a timer would wake the stack.
fn rests(script: &mut Script) {
    script.settle();
    while let Some(frame) = script.try_recv() {
        assert!(frame.packet().protocol == ingress::TCP && frame.tcp().payload().is_empty(), "{frame:?}");
    }
    assert!(script.engine.is_quiet(script.now), "it spins");
}

/// Bytes that have come to a socket of the host's, and no more come.
fn came(script: &mut Script, server: &mut TcpStream, wanted: usize) {
    let mut buffer = vec![0; wanted];
    script.settle();
    server.set_nonblocking(false).expect("blocking");
    server.read_exact(&mut buffer).expect("data");
    server.set_nonblocking(true).expect("non-blocking");
    script.settle();
    assert!(!matches!(server.read(&mut buffer), Ok(1..)), "more than may go");
}

fn open(script: &mut Script) -> (Peer, TcpStream) {
    let (listener, port) = listener(false);
    let mut peer = Peer::new(false, port);
    peer.open(script);
    (peer, accept(&listener))
}

#[test]
fn a_connection_gets_its_burst_and_then_the_rate() {
    let mut script = script(None, LIMIT);
    let (mut peer, mut server) = open(&mut script);
    server.write_all(&[7; 300_000]).expect("write");
    takes(&mut script, &mut peer, BURST);
    // What may not go yet is not counted.
    let flows = script.engine.flows(0, 9);
    assert_eq!((flows.len(), flows[0].received.bytes, flows[0].sent.bytes), (1, BURST as u64, 0));
    assert_eq!((flows[0].remote, flows[0].inbound), (SocketAddr::from(peer.remote), false));
    assert!(script.engine.flows(0, 0).is_empty());
    script.advance(Duration::from_micros(9_000));
    rests(&mut script);
    script.advance(Duration::from_micros(1_000));
    takes(&mut script, &mut peer, 1_000);
    script.advance_millis(400);
    takes(&mut script, &mut peer, 40_000);
    // What is left fits into several bursts; the end comes behind it.
    drop(server);
    let mut left = 300_000 - BURST - 41_000;
    while left > 0 {
        script.advance_millis(2_000);
        let next = left.min(BURST);
        if next < left {
            takes(&mut script, &mut peer, next);
        } else {
            let mut taken = 0;
            while taken < next {
                let frame = script.expect_tcp("data", |segment| !segment.payload().is_empty());
                taken += peer.take(&mut script, &frame);
            }
        }
        left -= next;
    }
    script.advance_millis(2_000);
    // The FIN has come with the last data or after it.
    peer.ack = peer.ack.wrapping_add(1);
    peer.send(&mut script, TcpControl::Fin, b"");
    script.advance_millis(2_000);
    assert_eq!(script.stats().tcp_flows, 0);
}

#[test]
fn what_the_guest_sends_waits_behind_its_window() {
    let mut script = script(LIMIT, None);
    let (mut peer, mut server) = open(&mut script);
    for _ in 0..200 {
        peer.send(&mut script, TcpControl::Psh, &[8; 1_000]);
    }
    came(&mut script, &mut server, BURST);
    // All of it was acknowledged; the rest fills the ring, which is what closes the window.
    let mut last = None;
    while let Some(frame) = script.try_recv() {
        last = Some(frame);
    }
    let last = last.expect("an acknowledgement");
    assert_eq!(last.tcp().ack_number(), TcpSeqNumber(peer.seq));
    assert!(usize::from(last.tcp().window_len()) << 3 <= 524_280 - (200_000 - BURST));
    rests(&mut script);
    script.advance_millis(1_000);
    came(&mut script, &mut server, BURST);
    peer.send(&mut script, TcpControl::Fin, b"");
    script.advance_millis(1_000);
    // Faster from now on, or not limited at all.
    script.engine.set_rates(script.now, Rates::default());
    came(&mut script, &mut server, 200_000 - 2 * BURST);
}

#[test]
fn a_rate_that_stays_brings_no_new_burst() {
    let mut script = script(None, LIMIT);
    let (mut peer, mut server) = open(&mut script);
    server.write_all(&[7; 300_000]).expect("write");
    takes(&mut script, &mut peer, BURST);
    // The other way gets one.
    script.engine.set_rates(script.now, Rates { sent: LIMIT, received: LIMIT });
    rests(&mut script);
    script.advance_millis(10);
    takes(&mut script, &mut peer, 1_000);
    let faster = LIMIT.map(|limit| Rate { bytes_per_second: 2 * RATE, ..limit });
    script.engine.set_rates(script.now, Rates { sent: LIMIT, received: faster });
    takes(&mut script, &mut peer, BURST);
}

#[test]
fn datagrams_of_the_guest_wait_in_the_tap() {
    let mut script = script(LIMIT, None);
    let server = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let port = server.local_addr().expect("address").port();
    server.set_nonblocking(true).expect("non-blocking");
    let count = |server: &UdpSocket| std::iter::from_fn(|| server.recv(&mut [0; 2_000]).ok()).count();
    for _ in 0..80 {
        script.send_ip(&udp((GUEST_V4, 5_000), (GATEWAY_V4, port), &[9; 1_000]));
    }
    script.settle();
    // The one that the burst did not suffice for is the last.
    assert_eq!(count(&server), BURST / 1_000 + 1);
    assert!(script.engine.is_quiet(script.now), "it spins");
    script.advance_millis(1);
    assert_eq!(count(&server), 0);
    script.advance_millis(5_000);
    assert_eq!(count(&server), 80 - (BURST / 1_000 + 1), "none is lost");
    assert_eq!(script.stats().dropped_datagrams, 0);
}

#[test]
fn what_does_not_leave_for_the_world_is_free() {
    let mut script = script(LIMIT, None);
    let server = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let port = server.local_addr().expect("address").port();
    server.set_nonblocking(true).expect("non-blocking");
    let mut request = vec![8, 0, 0, 0, 0, 7, 0, 1];
    request.resize(1_000, 0);
    Icmpv4Packet::new_unchecked(&mut request[..]).fill_checksum();
    for _ in 0..BURST / 1_000 + 10 {
        // Refused, and answered here.
        script.send_ip(&udp((GUEST_V4, 5_000), ("127.0.0.1", port), &[9; 1_000]));
        script.send_ip(&ingress::rebuild(ip(GUEST_V4), ip(GATEWAY_V4), ingress::ICMP, 64, &request));
        script.settle();
        while script.try_recv().is_some() {}
    }
    // So the whole burst is still there.
    for _ in 0..BURST / 1_000 {
        script.send_ip(&udp((GUEST_V4, 5_000), (GATEWAY_V4, port), &[9; 1_000]));
    }
    script.settle();
    let count = std::iter::from_fn(|| server.recv(&mut [0; 2_000]).ok()).count();
    assert_eq!(count, BURST / 1_000);
}

#[test]
fn echo_requests_to_the_world_wait_in_the_tap() {
    if !in_empty_namespace("script::rates::echo_requests_to_the_world_wait_in_the_tap") {
        return;
    }
    let mut script = script(LIMIT, None);
    let mut request = vec![8, 0, 0, 0, 0, 7, 0, 1];
    request.resize(1_000, 0);
    Icmpv4Packet::new_unchecked(&mut request[..]).fill_checksum();
    for _ in 0..80 {
        script.send_ip(&ingress::rebuild(ip(GUEST_V4), ip("192.0.2.1"), ingress::ICMP, 64, &request));
    }
    let replies = |script: &mut Script| {
        script.settle();
        std::iter::from_fn(|| script.try_recv()).count()
    };
    assert_eq!(replies(&mut script), BURST / 1_000 + 1);
    script.advance_millis(5_000);
    assert_eq!(replies(&mut script), 80 - (BURST / 1_000 + 1));
}

#[test]
fn datagrams_for_the_guest_wait_in_the_hosts_queue() {
    let mut script = script(None, LIMIT);
    let server = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let port = server.local_addr().expect("address").port();
    script.send_ip(&udp((GUEST_V4, 5_000), (GATEWAY_V4, port), b"hello"));
    script.settle();
    let guest = server.recv_from(&mut [0; 10]).expect("hello").1;
    let bytes = |script: &mut Script| {
        script.settle();
        let payload = |frame: Out| frame.packet().payload().len() - 8;
        let all: usize = std::iter::from_fn(|| script.try_recv()).map(payload).sum();
        assert!(script.engine.is_quiet(script.now), "it spins");
        all
    };
    for _ in 0..80 {
        server.send_to(&[9; 1_000], guest).expect("send");
    }
    assert_eq!(bytes(&mut script), (BURST / 1_000 + 1) * 1_000);
    script.advance_millis(1);
    assert_eq!(bytes(&mut script), 0);
    script.advance_millis(1_000);
    assert_eq!(bytes(&mut script), (80 - BURST / 1_000 - 1) * 1_000);
}

#[test]
fn connections_share_what_there_is() {
    let mut script = script(None, LIMIT);
    let mut ends: Vec<(Peer, TcpStream)> = (0..4).map(|_| open(&mut script)).collect();
    let ports: Vec<u16> = ends.iter().map(|(peer, _)| peer.remote.1).collect();
    for (_, server) in &mut ends {
        server.write_all(&[7; 200_000]).expect("write");
    }
    let mut got = [0; 4];
    for _ in 0..100 {
        script.advance_millis(60);
        while let Some(frame) = script.try_recv() {
            let from = frame.tcp().src_port();
            let which = ports.iter().position(|port| *port == from).expect("one of ours");
            if !frame.tcp().payload().is_empty() {
                got[which] += ends[which].0.take(&mut script, &frame);
            }
        }
    }
    let all: usize = got.iter().sum();
    // Six seconds and a burst; the last part may be on its way.
    assert!((600_000..=600_000 + BURST).contains(&all), "{got:?}");
    assert!(got.iter().all(|got| (120_000..=200_000).contains(got)), "{got:?}");
}

#[test]
fn a_thousand_flows_that_come_and_go_leave_nothing_waiting() {
    let mut script = script(None, Some(Rate { bytes_per_second: 1_000, burst: None }));
    let (listener, port) = listener(false);
    for n in 0..1_000 {
        let mut peer = Peer::new(false, port);
        peer.guest.1 = 10_000 + n;
        peer.open(&mut script);
        accept(&listener).write_all(&[7; 2_000]).expect("write");
        script.settle();
        peer.send(&mut script, TcpControl::Rst, b"");
        while script.try_recv().is_some() {}
    }
    script.engine.check_bounds();
    assert_eq!(script.stats().tcp_flows, 0);
    script.advance_millis(3_600_000);
    assert_eq!(script.engine.timers(), 0);
}

/// Bytes that can be read now.
fn drain(stream: &mut TcpStream) -> usize {
    let mut buffer = vec![0; 100_000];
    std::iter::from_fn(|| stream.read(&mut buffer).ok().filter(|len| *len > 0)).sum()
}

/// What `tap` connections of the guest's and `joined` ones get in `seconds` after the burst, all of which want all they can
/// get one way.
fn contest(rate: Option<Rate>, out: bool, [tap, joined]: [u16; 2], seconds: usize) -> [Vec<usize>; 2] {
    let rates = if out { Rates { sent: rate, received: None } } else { Rates { sent: None, received: rate } };
    let mut joining = Joining::with(&StackSpec { rates, ..spec() });
    let (listener, port) = listener(false);
    let mut over: Vec<(Peer, TcpStream)> = Vec::new();
    for n in 0..tap {
        let mut peer = Peer::new(false, port);
        peer.guest.1 = 41_000 + n;
        peer.open(&mut joining.script);
        let server = accept(&listener);
        server.set_nonblocking(true).expect("non-blocking");
        over.push((peer, server));
    }
    let mut past: Vec<(TcpStream, TcpStream)> = Vec::new();
    for n in 0..joined {
        let client = TcpStream::connect(joining.script.published[0]).expect("connect");
        client.set_nonblocking(true).expect("non-blocking");
        joining
            .script
            .wait_for("the connection", |script| script.stats().tcp_flows == u64::from(tap + n) + 1);
        assert!(joining.maker.answer());
        joining.script.wait_for("it is joined", |script| script.stats().tcp_joined == u64::from(n) + 1);
        let server = accept(&joining.inside);
        server.set_nonblocking(true).expect("non-blocking");
        past.push((client, server));
    }
    let script = &mut joining.script;
    let mut got = [vec![0; usize::from(tap)], vec![0; usize::from(joined)]];
    let chunk = vec![7; 20_000];
    for step in 0..seconds * 100 + 10 {
        // What the burst brought belongs to whoever came first.
        if step == 10 {
            got = [vec![0; usize::from(tap)], vec![0; usize::from(joined)]];
        }
        for (peer, server) in &mut over {
            if out {
                // Until its window closes.
                if step < 200 {
                    peer.send(script, TcpControl::Psh, &chunk[..1_000]);
                    peer.send(script, TcpControl::Psh, &chunk[..1_000]);
                }
            } else {
                let _ = server.write(&chunk);
            }
        }
        for (client, server) in &mut past {
            let _ = if out { server.write(&chunk) } else { client.write(&chunk) };
        }
        script.advance_millis(10);
        while let Some(frame) = script.try_recv() {
            let to = frame.tcp().dst_port();
            let Some(at) = over.iter().position(|(peer, _)| peer.guest.1 == to) else { continue };
            if !frame.tcp().payload().is_empty() {
                got[0][at] += over[at].0.take(script, &frame);
            }
        }
        for (at, (_, server)) in over.iter_mut().enumerate().filter(|_| out) {
            got[0][at] += drain(server);
        }
        for (at, (client, server)) in past.iter_mut().enumerate() {
            got[1][at] += drain(if out { client } else { server });
        }
    }
    script.engine.check_bounds();
    drop((over, past));
    got
}

#[test]
fn connections_that_cross_the_tap_and_those_that_do_not_share_alike() {
    let name = "script::rates::connections_that_cross_the_tap_and_those_that_do_not_share_alike";
    if !in_empty_namespace(name) {
        return;
    }
    // One of each; more of one kind than of the other; and so many that only some of them can go each time.
    for (rate, counts, out) in [
        (RATE, [1, 1], true),
        (RATE, [1, 1], false),
        (10 * RATE, [1, 1], false),
        (10 * RATE, [1, 3], false),
        (RATE, [3, 1], false),
        (RATE, [2, 10], false),
    ] {
        let rate = Some(Rate { bytes_per_second: rate, burst: Some(BURST as u64) });
        let got = contest(rate, out, counts, 3);
        let all: Vec<usize> = got.concat();
        let fair = all.iter().sum::<usize>() / all.len();
        assert!(fair > 10_000, "{got:?}");
        assert!(
            all.iter().all(|got| (fair * 9 / 10..=fair * 11 / 10).contains(got)),
            "{counts:?} {out}: {got:?}"
        );
    }
}

#[test]
fn who_waits_both_ways_gets_no_more_than_who_waits_one_way() {
    let faster = LIMIT.map(|limit| Rate { bytes_per_second: 10 * RATE, ..limit });
    let mut script = script(LIMIT, faster);
    let mut ends: Vec<(Peer, TcpStream)> = (0..2).map(|_| open(&mut script)).collect();
    for (_, server) in &ends {
        server.set_nonblocking(true).expect("non-blocking");
    }
    for _ in 0..400 {
        ends[0].0.send(&mut script, TcpControl::Psh, &[8; 1_000]);
    }
    let mut got = [0; 2];
    for _ in 0..60 {
        for (_, server) in &mut ends {
            let _ = server.write(&[7; 100_000]);
        }
        script.advance_millis(50);
        while let Some(frame) = script.try_recv() {
            let to = frame.tcp().src_port();
            let which = ends.iter().position(|(peer, _)| peer.remote.1 == to).expect("one of ours");
            if !frame.tcp().payload().is_empty() {
                got[which] += ends[which].0.take(&mut script, &frame);
            }
        }
    }
    assert!(drain(&mut ends[0].1) > 300_000);
    let fair = got.iter().sum::<usize>() / 2;
    assert!(fair > 1_000_000 && got[0].abs_diff(fair) < fair / 10, "{got:?}");
}

#[test]
fn who_has_gone_has_no_share() {
    let mut script = script(None, LIMIT);
    let mut ends: Vec<(Peer, TcpStream)> = (0..20).map(|_| open(&mut script)).collect();
    for (_, server) in &mut ends {
        server.write_all(&[7; 200_000]).expect("write");
    }
    script.advance_millis(100);
    script.engine.check_bounds();
    assert!(script.engine.sharers()[1] >= 19);
    for (mut peer, _) in ends {
        peer.send(&mut script, TcpControl::Rst, b"");
        script.settle();
        while script.try_recv().is_some() {}
    }
    assert_eq!((script.engine.sharers(), script.stats().tcp_flows), ([0, 0], 0));
    script.engine.check_bounds();
}

/// UDP datagrams that come to a socket of the host's.
fn datagrams_at(server: &UdpSocket) -> usize {
    let mut buffer = [0; 2_000];
    std::iter::from_fn(|| server.recv(&mut buffer).ok()).sum()
}

/// A socket of the host's gets UDP datagrams with so much payload, and no more. The kernel may take its time.
fn gets_datagrams(server: &UdpSocket, wanted: usize) {
    let mut got = 0;
    while got < wanted {
        let mut fds = [PollFd::new(server.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(10_000u16)), Ok(1), "{got} of {wanted}");
        got += datagrams_at(server);
    }
    assert_eq!(got, wanted);
}

#[test]
fn datagrams_leave_connections_their_part() {
    for (rate, steps) in [(RATE, 210), (10 * RATE, 60)] {
        let rate = Some(Rate { bytes_per_second: rate, burst: Some(BURST as u64) });
        for out in [false, true] {
            let mut script = if out { script(rate, None) } else { script(None, rate) };
            let (mut peer, mut server) = open(&mut script);
            server.set_nonblocking(true).expect("non-blocking");
            let other = UdpSocket::bind("127.0.0.1:0").expect("socket");
            other.set_nonblocking(true).expect("non-blocking");
            let port = other.local_addr().expect("address").port();
            let datagram = udp((GUEST_V4, 5_000), (GATEWAY_V4, port), &[9; 1_000]);
            script.send_ip(&datagram);
            script.settle();
            let guest = other.recv_from(&mut [0; 2_000]).expect("a datagram").1;
            let (mut by_tcp, mut by_udp) = (0, 0);
            for step in 0..steps {
                // By then the burst is gone, and what may go at once of datagrams.
                if step == 30 {
                    (by_tcp, by_udp) = (0, 0);
                }
                // All that can go, and more.
                if out {
                    if step < 10 {
                        (0..45).for_each(|_| peer.send(&mut script, TcpControl::Psh, &[8; 1_000]));
                    } else {
                        while script.try_send_frame(false, 0x0800, &datagram) {}
                    }
                } else {
                    let _ = server.write(&[7; 20_000]);
                    for _ in 0..30 {
                        let _ = other.send_to(&[9; 1_000], guest);
                    }
                }
                script.advance_millis(10);
                for _ in 0..8 {
                    script.settle();
                }
                assert!(script.engine.is_quiet(script.now), "it spins");
                by_udp += datagrams_at(&other);
                by_tcp += if out { drain(&mut server) } else { 0 };
                while let Some(frame) = script.try_recv() {
                    match frame.packet().protocol {
                        ingress::UDP => by_udp += frame.packet().payload().len() - 8,
                        _ if frame.tcp().payload().is_empty() => {}
                        _ => by_tcp += peer.take(&mut script, &frame),
                    }
                }
            }
            let all = by_tcp + by_udp;
            assert!(
                all > 170_000 && by_tcp * 100 >= all * 40 && by_udp * 100 >= all * 40,
                "{out}: {by_tcp} {by_udp}"
            );
        }
    }
}

#[test]
fn datagrams_that_are_few_wait_for_no_connection() {
    let mut script = script(None, LIMIT);
    let (mut peer, mut server) = open(&mut script);
    server.set_nonblocking(true).expect("non-blocking");
    let other = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let port = other.local_addr().expect("address").port();
    script.send_ip(&udp((GUEST_V4, 5_000), (GATEWAY_V4, port), b"hello"));
    script.settle();
    let guest = other.recv_from(&mut [0; 10]).expect("hello").1;
    for step in 0..200 {
        let _ = server.write(&[7; 20_000]);
        // A fifth of the rate.
        other.send_to(&[9; 200], guest).expect("send");
        script.advance_millis(10);
        let mut came = 0;
        while let Some(frame) = script.try_recv() {
            match frame.packet().protocol {
                ingress::UDP => came += 1,
                _ => drop(peer.take(&mut script, &frame)),
            }
        }
        assert_eq!(came, 1, "{step}");
    }
}

#[test]
fn a_flood_of_datagrams_holds_up_no_connection_behind_it() {
    let mut script = script(LIMIT, None);
    let (mut peer, _server) = open(&mut script);
    // It wants more for seconds.
    for _ in 0..400 {
        peer.send(&mut script, TcpControl::Psh, &[8; 1_000]);
    }
    script.advance_millis(100);
    let other = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let to = other.local_addr().expect("address").port();
    for _ in 0..60 {
        script.send_ip(&udp((GUEST_V4, 5_000), (GATEWAY_V4, to), &[9; 1_000]));
    }
    let (_listener, port) = listener(false);
    let mut late = Peer::new(false, port);
    late.guest.1 = 41_000;
    late.send(&mut script, TcpControl::Syn, b"");
    let mut answered = false;
    for _ in 0..5 {
        script.advance_millis(10);
        while let Some(frame) = script.try_recv() {
            answered |= frame.tcp().syn() && frame.tcp().dst_port() == 41_000;
        }
    }
    // Six tenths of a second's datagrams were before it.
    assert!(answered && script.stats().dropped_datagrams > 0, "{}", script.stats().dropped_datagrams);
}

/// Payload of each of the datagrams that come together.
const EACH: u16 = 1_400;

/// As many as a super-segment takes.
fn together() -> Vec<u8> {
    vec![9; 45 * usize::from(EACH)]
}

#[test]
fn of_datagrams_that_the_guest_sends_together_no_more_go_than_are_soon_paid_for() {
    // The debt for all 45 would be one of a minute, and of half a second; at a high rate it is of no account.
    for (rate, left, going, millis) in
        [(1_000, 2_000, 3, 2_210), (RATE, 2_000, 9, 110), (20 * RATE, 2_000, 45, 40), (1_000, BURST, 45, 0)]
    {
        let server = UdpSocket::bind("127.0.0.1:0").expect("socket");
        server.set_nonblocking(true).expect("non-blocking");
        let port = server.local_addr().expect("address").port();
        let mut script = script(Some(Rate { bytes_per_second: rate, burst: Some(BURST as u64) }), None);
        let ask = |script: &mut Script, len: usize| {
            script.send_ip(&udp((GUEST_V4, 5_000), (GATEWAY_V4, port), &vec![9; len]));
            script.settle();
        };
        if left < BURST {
            ask(&mut script, BURST - left);
            // Cut by the buffer.
            gets_datagrams(&server, 2_000);
        }
        runs::send_run(&script, EACH, &udp((GUEST_V4, 5_000), (GATEWAY_V4, port), &together()));
        script.settle();
        gets_datagrams(&server, going * usize::from(EACH));
        assert_eq!(script.stats().dropped_datagrams, 45 - going as u64);
        // What else the guest sends waits for them, and no longer.
        ask(&mut script, 10);
        if millis > 0 {
            script.advance_millis(millis / 2);
            assert_eq!(datagrams_at(&server), 0, "{rate}");
            script.advance_millis(millis - millis / 2);
        }
        gets_datagrams(&server, 10);
    }
}

#[test]
fn what_comes_for_the_guest_together_is_not_lost() {
    // Together only if that is soon paid for: else singly, until as much is owed as one of them has.
    for (rate, at_once) in [(1_000, 2), (655_359, 2), (655_360, 45)] {
        for published in [false, true] {
            let rates = Rates {
                received: Some(Rate { bytes_per_second: rate, burst: Some(BURST as u64) }),
                sent: None,
            };
            let ports = if published { vec![forwarded(Protocol::Udp, 9_090)] } else { vec![] };
            let mut script = Script::with(&StackSpec { rates, ..spec() }, true, &ports);
            let server = UdpSocket::bind("127.0.0.1:0").expect("socket");
            let guest = if published {
                script.published[0]
            } else {
                let port = server.local_addr().expect("address").port();
                script.send_ip(&udp((GUEST_V4, 5_000), (GATEWAY_V4, port), b"hello"));
                script.settle();
                server.recv_from(&mut [0; 10]).expect("hello").1
            };
            for len in [1_000; 63].into_iter().chain([BURST - 63_000 - 2_000]) {
                server.send_to(&vec![9; len], guest).expect("send");
            }
            datagrams_come(&mut script, BURST - 2_000);
            let segment = nix::sys::socket::sockopt::UdpGsoSegment;
            nix::sys::socket::setsockopt(&server, segment, &EACH.into()).expect("segments");
            server.send_to(&together(), guest).expect("send");
            let each = usize::from(EACH);
            datagrams_come(&mut script, at_once * each);
            // The others when those before them are paid for.
            script.advance_millis(70_000);
            datagrams_come(&mut script, (45 - at_once) * each);
            assert_eq!(script.stats().dropped_datagrams, 0, "{rate} {published}");
        }
    }
}

/// The guest gets datagrams with so much payload, and no more.
fn datagrams_come(script: &mut Script, wanted: usize) {
    let mut got = 0;
    while got < wanted {
        let frame = script.expect("a datagram", |frame| frame.packet().protocol == ingress::UDP);
        got += frame.packet().payload().len() - 8;
    }
    assert_eq!(got, wanted);
    script.nothing_comes("more than may go");
}
