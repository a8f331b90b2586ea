//! Sockets of the host that fail in every way, by a plan (`calls.rs`): the guest is told what happened, other flows go on,
//! nothing is left, and nothing spins.
//!
//! `NETSTACK_SEED` chooses one seed of the storm, `NETSTACK_FLOOD` says how many times as long it is.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::os::fd::RawFd;
use std::rc::Rc;

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;

use super::good::{Good, open_files, own_memory};
use super::*;
use crate::calls::{Call, Fault, set_plan};

/// Errors of every kind: no room, no right, no way, and those of connections.
pub(super) const ERRORS: [Errno; 16] = [
    Errno::EMFILE,
    Errno::ENFILE,
    Errno::ENOBUFS,
    Errno::ENOMEM,
    Errno::ENOSPC,
    Errno::EPERM,
    Errno::EACCES,
    Errno::ENETUNREACH,
    Errno::EHOSTUNREACH,
    Errno::EADDRNOTAVAIL,
    Errno::ECONNREFUSED,
    Errno::ECONNRESET,
    Errno::ETIMEDOUT,
    Errno::EPIPE,
    Errno::EINVAL,
    Errno::EIO,
];

/// No plan outlives what it was made for.
pub(super) struct Planned;

impl Drop for Planned {
    fn drop(&mut self) {
        set_plan(None);
    }
}

pub(super) fn plan(decide: impl FnMut(Call, RawFd) -> Fault + 'static) -> Planned {
    set_plan(Some(Box::new(decide)));
    Planned
}

/// `call` fails with `errno`, always.
fn always(call: Call, errno: Errno) -> Planned {
    plan(move |asked, _| if asked == call { Fault::Fails(errno) } else { Fault::None })
}

/// Whether a frame is an ICMP error that says "unreachable".
fn is_unreachable(frame: &Out) -> bool {
    let Ok(Inbound::Ip(packet)) = ingress::parse_frame(frame.ethernet(), [0x52, 0x54, 0, 0, 0, 2], true)
    else {
        return false;
    };
    let kind = packet.payload().first().copied();
    matches!((packet.protocol, kind), (ingress::ICMP, Some(3)) | (ingress::ICMPV6, Some(1)))
}

fn is_reset(frame: &Out) -> bool {
    matches!(
        ingress::parse_frame(frame.ethernet(), [0x52, 0x54, 0, 0, 0, 2], true),
        Ok(Inbound::Ip(packet)) if packet.protocol == ingress::TCP
            && TcpPacket::new_checked(packet.payload()).is_ok_and(|segment| segment.rst())
    )
}

pub(super) fn is_connecting(frame: &Out) -> bool {
    connecting_port(frame).is_some()
}

/// From which port it does.
pub(super) fn connecting_port(frame: &Out) -> Option<u16> {
    let Ok(Inbound::Ip(packet)) = ingress::parse_frame(frame.ethernet(), [0x52, 0x54, 0, 0, 0, 2], true)
    else {
        return None;
    };
    let segment = TcpPacket::new_checked(packet.payload()).ok()?;
    let connects = packet.protocol == ingress::TCP && segment.syn() && !segment.ack();
    connects.then(|| segment.src_port())
}

/// Lets the engine do what there is to do. It has to come to an end.
pub(super) fn calm_down(script: &mut Script, what: &str) -> Vec<Out> {
    let mut frames = Vec::new();
    for _ in 0..200 {
        script.turn(Duration::ZERO);
        frames.extend(std::iter::from_fn(|| script.try_recv()));
        if script.engine.is_quiet(script.now) {
            return frames;
        }
    }
    panic!("{what}: it spins: {}", script.engine.restless(script.now));
}

impl Script {
    /// What is there of flows and descriptors.
    pub(super) fn inventory(&self) -> (u64, u64, u64, usize, usize) {
        let stats = self.stats();
        let queries = self.engine.open_queries();
        (stats.tcp_flows, stats.udp_flows, stats.ping_flows, queries, self.engine.descriptors())
    }
}

#[test]
fn a_connection_that_cannot_be_begun_is_refused_or_unreachable() {
    for is_v6 in [false, true] {
        let (listener, port) = listener(is_v6);
        for call in [Call::Socket, Call::Connect, Call::EpollAdd] {
            for errno in ERRORS {
                let what = format!("{call:?} {errno}");
                let mut script = Script::new(&spec(), true);
                let mut peer = Peer::new(is_v6, port);
                {
                    let _plan = always(call, errno);
                    script.send_ip(&peer.segment(TcpControl::Syn, b""));
                    let said = calm_down(&mut script, &what);
                    let unreachable = matches!(
                        errno,
                        Errno::EPERM
                            | Errno::EACCES
                            | Errno::ENETUNREACH
                            | Errno::EHOSTUNREACH
                            | Errno::EADDRNOTAVAIL
                    );
                    let told = said.iter().filter(|frame| match unreachable {
                        true => is_unreachable(frame),
                        false => is_reset(frame),
                    });
                    // A guest whose own timer has not run out sends its SYN again.
                    let expected = usize::from(errno != Errno::ETIMEDOUT);
                    assert_eq!((told.count(), said.len()), (expected, expected), "{what}");
                    assert_eq!(script.inventory(), (0, 0, 0, 0, 0), "{what}");
                    script.engine.check_bounds();
                }
                // It was not for ever.
                peer.open(&mut script);
                drop(accept(&listener));
            }
        }
    }
}

#[test]
fn an_error_that_is_told_before_it_is_there_is_not_a_connection() {
    let busy = Busy::new();
    let mut script = Script::new(&spec(), true);
    let mut peer = Peer::new(false, busy.port);
    peer.send(&mut script, TcpControl::Syn, b"");
    // The socket's error queue has something, and the socket no error.
    script.engine.pretend_events(script.now, EpollFlags::EPOLLERR);
    script.nothing_comes("an answer before there is one");
    assert_eq!((script.stats().tcp_flows, script.engine.half_open()), (1, 1));
    let _plan = always(Call::GetSockOpt, Errno::EHOSTUNREACH);
    script.engine.pretend_events(script.now, EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP);
    let said = calm_down(&mut script, "unreachable");
    assert!(said.len() == 1 && is_unreachable(&said[0]), "{said:?}");
    assert_eq!(script.inventory(), (0, 0, 0, 0, 0));
}

#[test]
fn a_connection_for_which_there_is_no_memory_is_refused() {
    let (listener, port) = listener(false);
    let mut script = Script::new(&spec(), true);
    let mut peer = Peer::new(false, port);
    {
        let _plan = always(Call::Map, Errno::ENOMEM);
        script.send_ip(&peer.segment(TcpControl::Syn, b""));
        // The host connects all the same; it sees a reset.
        script.expect("RST", is_reset);
        assert_eq!(script.inventory(), (0, 0, 0, 0, 0));
        let mut server = accept(&listener);
        server.read(&mut [0]).expect_err("reset");
    }
    peer.open(&mut script);
    drop(accept(&listener));
}

#[test]
fn a_connection_that_breaks_is_reset_on_both_sides() {
    for call in [Call::Send, Call::Recv] {
        for errno in ERRORS {
            let what = format!("{call:?} {errno}");
            let (listener, port) = listener(false);
            let mut script = Script::new(&spec(), true);
            let mut peer = Peer::new(false, port);
            peer.open(&mut script);
            let mut server = accept(&listener);
            let _plan = always(call, errno);
            match call {
                Call::Send => script.send_ip(&peer.segment(TcpControl::Psh, b"data")),
                _ => server.write_all(b"data").expect("write"),
            }
            script.expect(&what, is_reset);
            calm_down(&mut script, &what);
            assert_eq!(script.inventory(), (0, 0, 0, 0, 0), "{what}");
            assert_eq!(
                server.read(&mut [0; 10]).expect_err(&what).kind(),
                std::io::ErrorKind::ConnectionReset
            );
        }
    }
}

#[test]
fn options_that_cannot_be_set_are_done_without() {
    let (listener, port) = listener(true);
    let sink = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let sink_port = sink.local_addr().expect("address").port();
    for errno in ERRORS {
        let _plan = always(Call::SetSockOpt, errno);
        let mut script = Script::new(&spec(), true);
        let mut peer = Peer::new(true, port);
        peer.open(&mut script);
        let mut server = accept(&listener);
        peer.send(&mut script, TcpControl::Psh, b"data");
        server.read_exact(&mut [0; 4]).expect("read");
        script.send_ip(&udp((GUEST_V4, 5_000), (GATEWAY_V4, sink_port), b"datagram"));
        script.settle();
        assert_eq!(sink.recv(&mut [0; 10]).expect("datagram"), 8);
    }
}

#[test]
fn datagrams_that_cannot_be_sent_are_told_or_dropped() {
    let sink = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let port = sink.local_addr().expect("address").port();
    for call in [Call::Socket, Call::EpollAdd, Call::Send] {
        for errno in ERRORS {
            let what = format!("{call:?} {errno}");
            let mut script = Script::new(&spec(), true);
            let datagram = udp((GUEST_V4, 5_000), (GATEWAY_V4, port), b"datagram");
            {
                let _plan = always(call, errno);
                script.send_ip(&datagram);
                let said = calm_down(&mut script, &what);
                let told = said.iter().filter(|frame| is_unreachable(frame)).count();
                let no_way = matches!(
                    errno,
                    Errno::EPERM
                        | Errno::EACCES
                        | Errno::ENETUNREACH
                        | Errno::EHOSTUNREACH
                        | Errno::EADDRNOTAVAIL
                );
                let expected = usize::from(call != Call::Send || no_way);
                assert_eq!((told, said.len()), (expected, expected), "{what}");
                let flows = u64::from(call == Call::Send);
                assert_eq!(script.inventory(), (0, flows, 0, 0, usize::from(call == Call::Send)), "{what}");
            }
            script.send_ip(&datagram);
            script.settle();
            assert_eq!(sink.recv(&mut [0; 10]).expect("datagram"), 8, "{what}");
            script.advance(Duration::from_secs(600));
            assert_eq!(script.inventory(), (0, 0, 0, 0, 0), "{what}");
        }
    }
}

#[test]
fn answers_that_cannot_be_read_do_not_keep_the_thread() {
    for errno in ERRORS {
        let what = format!("{errno}");
        let server = UdpSocket::bind("127.0.0.1:0").expect("socket");
        let port = server.local_addr().expect("address").port();
        let mut script = Script::new(&spec(), true);
        let ask = udp((GUEST_V4, 5_000), (GATEWAY_V4, port), b"ask");
        script.send_ip(&ask);
        script.settle();
        let from = server.recv_from(&mut [0; 10]).expect("datagram").1;
        {
            // Some errors mean that there may be more: those are not for ever.
            let mut left = 1_000;
            let _plan = plan(move |call, _| {
                left -= i32::from(call == Call::Recv);
                if call == Call::Recv && left > 0 { Fault::Fails(errno) } else { Fault::None }
            });
            server.send_to(b"one", from).expect("send");
            calm_down(&mut script, &what);
        }
        server.send_to(b"two", from).expect("send");
        script.expect("the answer", |frame| frame.packet().payload().ends_with(b"two"));
    }
}

#[test]
fn names_that_cannot_be_asked_for_are_failures() {
    let resolver = UdpSocket::bind("127.0.0.1:0").expect("socket");
    resolver.set_nonblocking(true).expect("non-blocking");
    let mut spec = spec();
    spec.dns.upstreams = vec![resolver.local_addr().expect("address")];
    for call in [Call::Socket, Call::Connect, Call::EpollAdd, Call::Send, Call::Recv] {
        for errno in ERRORS {
            let what = format!("{call:?} {errno}");
            let mut script = Script::new(&spec, true);
            let _plan = always(call, errno);
            let query = crate::dns::message::tests::query(7, "some.name", 1, true);
            script.send_ip(&udp((GUEST_V4, 5_000), (GATEWAY_V4, 53), &query));
            let mut said = calm_down(&mut script, &what);
            let mut buffer = [0; 512];
            for _ in 0..10 {
                while let Ok((len, from)) = resolver.recv_from(&mut buffer) {
                    resolver.send_to(&buffer[..len], from).expect("send");
                }
                script.now += Duration::from_secs(2);
                said.extend(calm_down(&mut script, &what));
            }
            assert_eq!(said.len(), 1, "{what}");
            assert_eq!(said[0].packet().payload()[8 + 3] & 15, 2, "SERVFAIL");
            assert_eq!(script.inventory(), (0, 0, 0, 0, 0), "{what}");
        }
    }
}

#[test]
fn a_listener_that_cannot_accept_tries_again_and_rests_meanwhile() {
    let port = forwarded(Protocol::Tcp, 80);
    for call in [Call::Accept, Call::GetPeerName, Call::EpollAdd, Call::Map] {
        for errno in ERRORS {
            let what = format!("{call:?} {errno}");
            let mut script = Script::with(&spec(), true, std::slice::from_ref(&port));
            let before = script.inventory();
            let mut client = TcpStream::connect(script.published[0]).expect("connect");
            client.set_read_timeout(Some(std::time::Duration::from_secs(10))).expect("time-out");
            {
                let _plan = always(call, errno);
                for _ in 0..10 {
                    assert!(calm_down(&mut script, &what).is_empty(), "{what}");
                    script.now += Duration::from_millis(300);
                }
                assert_eq!(script.inventory(), before, "{what}");
            }
            if call == Call::Accept {
                // It waited.
                script.now += Duration::from_secs(5);
                script.expect_tcp("SYN", |segment| segment.syn());
            } else {
                // Whoever has no name is gone already; others are to know that something went wrong.
                let end = client.read(&mut [0]).map_err(|error| error.kind());
                let reset = Err(std::io::ErrorKind::ConnectionReset);
                assert_eq!(end, if call == Call::GetPeerName { Ok(0) } else { reset }, "{what}");
                drop(client);
                client = TcpStream::connect(script.published[0]).expect("connect");
                script.expect_tcp("SYN", |segment| segment.syn());
            }
            drop(client);
        }
    }
}

#[test]
fn a_storm_of_faults_harms_nobody_else_and_leaves_nothing() {
    if !in_empty_namespace("script::faults::a_storm_of_faults_harms_nobody_else_and_leaves_nothing") {
        return;
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds = match number("NETSTACK_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..6 * number("NETSTACK_FLOOD").unwrap_or(1),
    };
    let (mut files, mut memory) = (None, None);
    for seed in seeds {
        println!("seed {seed}");
        storm(seed);
        // Buffers of the first seeds stay with the allocator.
        if seed % 6 >= 2 {
            assert_eq!(*files.get_or_insert_with(open_files), open_files(), "descriptors");
            let first = *memory.get_or_insert_with(own_memory);
            assert!(own_memory() < first + 8 * 1024, "{first} KiB became {}", own_memory());
        }
    }
}

/// One storm: connections out and in, datagrams, echo requests and names, while calls fail one in so many.
fn storm(seed: u64) {
    let mut random = Seeded(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let (listener, port) = listener(false);
    let sink = UdpSocket::bind("127.0.0.1:0").expect("socket");
    sink.set_nonblocking(true).expect("non-blocking");
    let sink_port = sink.local_addr().expect("address").port();
    let resolver = UdpSocket::bind("127.0.0.1:0").expect("socket");
    resolver.set_nonblocking(true).expect("non-blocking");
    let mut spec = spec();
    spec.dns.upstreams = vec![resolver.local_addr().expect("address")];
    let publish = |protocol| forwarded(protocol, 80);
    let mut script =
        Script::with(&spec, true, &[publish(crate::Protocol::Tcp), publish(crate::Protocol::Udp)]);
    let idle = script.inventory();

    // The good one's socket is known by being opened first.
    let spared = Rc::<Cell<Option<RawFd>>>::default();
    let note = Rc::clone(&spared);
    let watch = plan(move |call, fd| {
        if call == Call::Connect && note.get().is_none() {
            note.set(Some(fd));
        }
        Fault::None
    });
    let mut good = Good::open(&mut script, &listener);
    good.go_on(&mut script, 1_000);
    drop(watch);
    listener.set_nonblocking(true).expect("non-blocking");

    let one_in = [3, 10, 40][random.below(3)];
    let forever = random.below(2) == 0;
    let mut faults = Seeded(random.next() | 1);
    let counts = Rc::<RefCell<HashMap<(Call, &str), usize>>>::default();
    let counted = Rc::clone(&counts);
    // Sockets that fail for ever, once they have.
    let mut broken = HashMap::<(Call, RawFd), Fault>::new();
    let storm = plan(move |call, fd| {
        if Some(fd) == spared.get() {
            return Fault::None;
        }
        if matches!(call, Call::Socket | Call::Accept) || fd == -1 {
            broken.retain(|_, _| faults.below(8) != 0);
        } else if let Some(fault) = broken.get(&(call, fd)) {
            return *fault;
        }
        if faults.below(one_in) != 0 {
            return Fault::None;
        }
        let fault = match (call, faults.below(6)) {
            (Call::Send | Call::Recv, 0) => Fault::Short,
            (Call::Send | Call::Recv | Call::Accept, 1) => Fault::Fails(Errno::EAGAIN),
            _ => Fault::Fails(ERRORS[faults.below(ERRORS.len())]),
        };
        let kind = match fault {
            Fault::None => "none",
            Fault::Fails(_) => "fails",
            Fault::Short => "short",
        };
        *counted.borrow_mut().entry((call, kind)).or_default() += 1;
        // No kernel says for ever that there is something to read, and then that there is not.
        let honest = fault != Fault::Short && (call, fault) != (Call::Recv, Fault::Fails(Errno::EAGAIN));
        if forever && honest && matches!(call, Call::Send | Call::Recv) {
            broken.insert((call, fd), fault);
        }
        fault
    });
    let mut servers = Vec::new();
    let mut clients = Vec::new();
    // With whether they have said their last word.
    let mut peers: Vec<(Peer, bool)> = Vec::new();
    for round in 0..1_500u16 {
        let which = random.below(9);
        let guest_port = 1_000 + round;
        match which {
            0 | 1 => {
                let mut peer = Peer::new(false, port);
                peer.guest.1 = guest_port;
                script.send_ip(&peer.segment(TcpControl::Syn, b""));
                peer.seq += 1;
                peers.push((peer, false));
            }
            2 | 3 if !peers.is_empty() => {
                let at = random.below(peers.len());
                let data = vec![7; 1 + random.below(5_000)];
                let ends = random.below(4) == 0;
                let (peer, ended) = &mut peers[at];
                if *ended {
                    continue;
                }
                *ended = ends;
                let control = if ends { TcpControl::Fin } else { TcpControl::Psh };
                script.send_ip(&peer.segment(control, &data));
                peer.seq =
                    peer.seq.wrapping_add(i32::try_from(data.len()).expect("length") + i32::from(ends));
            }
            4 => {
                let to = [(GATEWAY_V4, sink_port), ("192.0.2.1", 9)][random.below(2)];
                script.send_ip(&udp((GUEST_V4, guest_port), to, b"datagram"));
            }
            5 => {
                let query = crate::dns::message::tests::query(round, &format!("name{round}"), 1, true);
                script.send_ip(&udp((GUEST_V4, guest_port), (GATEWAY_V4, 53), &query));
            }
            6 => {
                let [high, low] = round.to_be_bytes();
                let mut message = [8, 0, 0, 0, high, low, 0, 1];
                let sum = !checksum::data(&message);
                message[2..4].copy_from_slice(&sum.to_be_bytes());
                script.send_ip(&ingress::rebuild(ip(GUEST_V4), ip("192.0.2.1"), ingress::ICMP, 64, &message));
            }
            7 => {
                clients.extend(TcpStream::connect(script.published[0]));
                let _ = sink.send_to(b"hello", script.published[1]);
            }
            _ => {
                let millis = [1, 300, 5_000, 70_000][random.below(4)];
                script.now += Duration::from_millis(millis);
            }
        }
        // The other ends.
        while let Ok((mut stream, _)) = listener.accept() {
            stream.set_nonblocking(true).expect("non-blocking");
            let _ = stream.write(&vec![8; random.below(20_000)]);
            servers.push(stream);
        }
        if servers.len() > 20 {
            drop(servers.swap_remove(random.below(20)));
        }
        if clients.len() > 10 {
            drop(clients.swap_remove(random.below(10)));
        }
        let mut buffer = [0; 2_000];
        while let Ok((len, from)) = sink.recv_from(&mut buffer) {
            let _ = sink.send_to(&buffer[..len], from);
        }
        while let Ok((len, from)) = resolver.recv_from(&mut buffer) {
            buffer[2] |= 0x80;
            let _ = resolver.send_to(&buffer[..len], from);
        }
        // Whoever was told to wait is told when to go on.
        script.engine.tell_again();
        for frame in calm_down(&mut script, &format!("round {round}, {which}")) {
            good.hear(&script, &frame);
            answer(&script, &mut peers, &frame);
        }
        if round % 50 == 0 {
            script.engine.check_bounds();
            good.go_on(&mut script, 1 + random.below(20_000));
        }
    }
    drop(storm);
    println!("one in {one_in}, for ever: {forever}, {:?}", counts.borrow());
    // When all is well again everybody is served, and in the end nothing is left but the good one.
    good.go_on(&mut script, 50_000);
    drop((servers, clients));
    for (peer, _) in &peers {
        script.send_ip(&peer.segment(TcpControl::Rst, b""));
    }
    script.engine.tell_again();
    for _ in 0..10 {
        for frame in calm_down(&mut script, "afterwards") {
            good.hear(&script, &frame);
        }
        script.now += Duration::from_secs(100);
        good.go_on(&mut script, 1_000);
    }
    let left = script.inventory();
    assert_eq!((left.0, left.1, left.2, left.3), (1, 0, 0, 0), "{:?}", script.stats());
    assert_eq!(left.4, idle.4 + 1, "descriptors");
    script.engine.check_bounds();
}

/// What a guest's kernel says to segments of the connections that it has begun.
fn answer(script: &Script, peers: &mut Vec<(Peer, bool)>, frame: &Out) {
    let Ok(Inbound::Ip(packet)) = ingress::parse_frame(frame.ethernet(), [0x52, 0x54, 0, 0, 0, 2], true)
    else {
        return;
    };
    let Ok(segment) = TcpPacket::new_checked(packet.payload()) else { return };
    if packet.protocol != ingress::TCP {
        return;
    }
    let Some(at) = peers
        .iter()
        .position(|(peer, _)| (peer.guest.1, peer.remote.1) == (segment.dst_port(), segment.src_port()))
    else {
        if segment.syn() && !segment.ack() {
            // A connection from outside is accepted.
            let mut peer = Peer::new(packet.is_v6(), segment.src_port());
            (peer.remote.0, peer.guest) = (packet.src, (packet.dst, segment.dst_port()));
            peer.ack = segment.seq_number().0.wrapping_add(1);
            script.send_ip(&peer.segment(TcpControl::Syn, b""));
            peer.seq += 1;
            peers.push((peer, false));
        }
        return;
    };
    if segment.rst() {
        peers.swap_remove(at);
        return;
    }
    let (peer, _) = &mut peers[at];
    let len = i32::try_from(segment.segment_len()).expect("length");
    peer.ack = segment.seq_number().0.wrapping_add(len);
    script.send_ip(&peer.segment(TcpControl::None, b""));
}
