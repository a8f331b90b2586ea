//! Sockets of the host that fail in every way, by a plan (`calls.rs`): the guest is told what happened, other flows go on,
//! nothing is left, and nothing spins.
//!
//! `NETSTACK_SEED` chooses one seed of the storm, `NETSTACK_FLOOD` says how many times as long it is.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::os::fd::{AsRawFd as _, RawFd};
use std::rc::Rc;

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};

use super::good::{Good, open_files, own_memory};
use super::*;
use crate::calls::{Call, Fault, set_plan};
use crate::config::{INSIDE_PAUSE, INSIDE_SOCKET};

/// Errors of every kind: no room, no right, no way, and those of connections.
const ERRORS: [Errno; 16] = [
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
struct Planned;

impl Drop for Planned {
    fn drop(&mut self) {
        set_plan(None);
    }
}

fn plan(decide: impl FnMut(Call, RawFd) -> Fault + 'static) -> Planned {
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

fn is_connecting(frame: &Out) -> bool {
    connecting_port(frame).is_some()
}

/// From which port it does.
fn connecting_port(frame: &Out) -> Option<u16> {
    let Ok(Inbound::Ip(packet)) = ingress::parse_frame(frame.ethernet(), [0x52, 0x54, 0, 0, 0, 2], true)
    else {
        return None;
    };
    let segment = TcpPacket::new_checked(packet.payload()).ok()?;
    let connects = packet.protocol == ingress::TCP && segment.syn() && !segment.ack();
    connects.then(|| segment.src_port())
}

/// Lets the engine do what there is to do. It has to come to an end.
fn calm_down(script: &mut Script, what: &str) -> Vec<Out> {
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
    fn inventory(&self) -> (u64, u64, u64, usize, usize) {
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
    if !hostile::in_empty_namespace("script::faults::a_storm_of_faults_harms_nobody_else_and_leaves_nothing")
    {
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

/// A client on the host's loopback and a server in what stands for the guest's namespace, with a connection of the stack's
/// between them that does not cross the TAP.
pub(super) struct Joining {
    pub(super) script: Script,
    pub(super) maker: crate::SocketMaker,
    pub(super) inside: TcpListener,
}

/// How an exchange over such a connection ended for the client: the bytes that came back, or why not.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    Echoed(usize),
    Failed(std::io::ErrorKind),
    /// It went over the TAP, behind which nobody is here.
    Crossed,
}

impl Joining {
    pub(super) fn new() -> Self {
        Self::with(&spec())
    }

    pub(super) fn with(spec: &StackSpec) -> Self {
        let (sockets, maker) = crate::inside_sockets().expect("socket pair");
        Self::through(spec, sockets, maker)
    }

    fn through(spec: &StackSpec, sockets: crate::InsideSockets, maker: crate::SocketMaker) -> Self {
        let port = Publish {
            host_ip: Some(ip("127.0.0.1")),
            host_port: 0,
            inside_ip: None,
            inside_port: 80,
            protocol: crate::Protocol::Tcp,
        };
        let published = Published::bind(&[port]).expect("port").through(sockets);
        let script = Script::of(spec, true, published);
        // Every address is the host's own here, the guest's too.
        let inside = TcpListener::bind("[::]:80").expect("listener");
        inside.set_nonblocking(true).expect("non-blocking");
        Self { script, maker, inside }
    }

    /// One client's exchange: sends so many bytes, has them echoed, and both close.
    fn exchange(&mut self, len: usize, what: &str) -> Ended {
        let data: Vec<u8> = (0..len).map(Good::byte).collect();
        let mut client = TcpStream::connect(self.script.published[0]).expect("connect");
        client.set_nonblocking(true).expect("non-blocking");
        let mut servers: Vec<(TcpStream, Vec<u8>, bool)> = Vec::new();
        let (mut sent, mut back, mut buffer) = (0, Vec::<u8>::new(), vec![0u8; 100_000]);
        let would_block = |error: &std::io::Error| error.kind() == std::io::ErrorKind::WouldBlock;
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        loop {
            assert!(std::time::Instant::now() < deadline, "{what}: it stands still");
            assert!(self.maker.answer(), "{what}: the stack has given the maker up");
            self.script.turn(Duration::ZERO);
            while let Some(frame) = self.script.try_recv() {
                if is_connecting(&frame) {
                    return Ended::Crossed;
                }
            }
            while let Ok((stream, _)) = self.inside.accept() {
                stream.set_nonblocking(true).expect("non-blocking");
                servers.push((stream, Vec::new(), false));
            }
            servers.retain_mut(|(stream, held, ended)| {
                if held.is_empty() && !*ended {
                    match stream.read(&mut buffer) {
                        Ok(0) => *ended = true,
                        Ok(len) => held.extend(&buffer[..len]),
                        Err(error) if would_block(&error) => {}
                        Err(_) => return false,
                    }
                }
                match stream.write(held) {
                    Ok(len) => drop(held.drain(..len)),
                    Err(error) if would_block(&error) => {}
                    Err(_) => return false,
                }
                !(*ended && held.is_empty())
            });
            if sent < data.len() {
                match client.write(&data[sent..]) {
                    Ok(len) => sent += len,
                    Err(error) if would_block(&error) => {}
                    Err(error) => return Ended::Failed(error.kind()),
                }
                if sent == data.len() {
                    client.shutdown(std::net::Shutdown::Write).expect("shutdown");
                }
            }
            match client.read(&mut buffer) {
                Ok(0) => {
                    assert!(back == data[..back.len()], "{what}: other bytes");
                    return Ended::Echoed(back.len());
                }
                Ok(len) => back.extend(&buffer[..len]),
                Err(error) if would_block(&error) => {}
                Err(error) => return Ended::Failed(error.kind()),
            }
        }
    }
}

#[test]
fn joined_connections_whose_calls_fail_cross_the_tap_or_are_reset_or_do_without() {
    let name = "script::faults::joined_connections_whose_calls_fail_cross_the_tap_or_are_reset_or_do_without";
    if !hostile::in_empty_namespace(name) {
        return;
    }
    const LEN: usize = 400_000;
    let mut joining = Joining::new();
    assert_eq!(joining.exchange(LEN, "no fault"), Ended::Echoed(LEN));
    assert_eq!(joining.script.stats().tcp_joined, 1);
    calm_down(&mut joining.script, "no fault");
    let before = joining.script.inventory();
    drop(joining);
    for call in [
        Call::Bind,
        Call::Connect,
        Call::EpollAdd,
        Call::Send,
        Call::Recv,
        Call::Splice,
        Call::Pipe,
        Call::SetSockOpt,
        Call::GetSockOpt,
    ] {
        for errno in ERRORS {
            let what = format!("{call:?} {errno}");
            // A pipe that is kept would be used again.
            let mut joining = Joining::new();
            let empty = joining.script.inventory();
            let ended = {
                // The client's socket is watched first; if that fails, the connection goes the way of all others.
                let mut watched = usize::from(errno == ERRORS[0]);
                let _plan = plan(move |asked, _| {
                    watched += usize::from(asked == Call::EpollAdd);
                    let fails = asked == call && (call != Call::EpollAdd || watched > 1);
                    if fails { Fault::Fails(errno) } else { Fault::None }
                });
                joining.exchange(LEN, &what)
            };
            let refused = [Errno::ECONNREFUSED, Errno::EHOSTUNREACH, Errno::ENETUNREACH, Errno::ETIMEDOUT];
            if matches!(call, Call::Pipe | Call::SetSockOpt) {
                assert_eq!(ended, Ended::Echoed(LEN), "{what}");
            } else if matches!(call, Call::Bind | Call::Connect)
                || call == Call::GetSockOpt && refused.contains(&errno)
            {
                // Nobody has answered, so the link is asked.
                assert_eq!(ended, Ended::Crossed, "{what}");
                assert_eq!(
                    (joining.script.stats().tcp_in, joining.script.stats().tcp_joined),
                    (1, 0),
                    "{what}"
                );
            } else {
                use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
                assert!(matches!(ended, Ended::Failed(ConnectionReset | BrokenPipe)), "{what}: {ended:?}");
            }
            // The inside does not answer.
            joining.script.advance(Duration::from_secs(11));
            calm_down(&mut joining.script, &what);
            joining.script.advance(Duration::from_secs(11));
            calm_down(&mut joining.script, &what);
            let left = joining.script.inventory();
            assert_eq!((left.0, left.1, left.2, left.3), (0, 0, 0, 0), "{what}");
            assert!(left.4 - empty.4 <= before.4 - empty.4, "{what}: descriptors");
            joining.script.engine.check_bounds();
            // It was not for ever.
            assert_eq!(joining.exchange(1_000, &what), Ended::Echoed(1_000), "{what}");
        }
    }
}

const REST: Duration = Duration::from_millis(1);

/// Of so many connections that come at once, how many cross the TAP at once. The others do after a second, or this fails.
fn cross(script: &mut Script, many: usize) -> usize {
    let clients: Vec<TcpStream> =
        (0..many).map(|_| TcpStream::connect(script.published[0]).expect("connect")).collect();
    let wanted = many as u64;
    script.wait_for("flows", |script| script.stats().tcp_flows == wanted);
    // Whoever gets no answer says it again.
    let mut known = std::collections::HashSet::new();
    let mut crossing = |script: &Script| {
        let ports = std::iter::from_fn(|| script.try_recv()).filter_map(|frame| connecting_port(&frame));
        ports.filter(|port| known.insert(*port)).count()
    };
    let at_once = crossing(script);
    if at_once < many {
        script.advance(INSIDE_SOCKET - REST);
        assert_eq!(crossing(script), 0);
        script.advance(REST);
        assert_eq!(crossing(script), many - at_once);
    }
    // The inside gives no answer at any of the server's places.
    drop(clients);
    for _ in 0..2 {
        script.advance(Duration::from_secs(11));
        crossing(script);
    }
    assert_eq!(script.stats().tcp_flows, 0);
    at_once
}

/// Whether the maker has a question before it.
fn is_asked(maker: &crate::SocketMaker) -> bool {
    let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(maker.as_fd().as_raw_fd(), &mut [0; 64], peek).is_ok()
}

#[test]
fn questions_that_nobody_reads_count_when_there_is_no_room_for_more() {
    let name = "script::faults::questions_that_nobody_reads_count_when_there_is_no_room_for_more";
    if !hostile::in_empty_namespace(name) {
        return;
    }
    let (sockets, maker) = crate::inside_sockets().expect("socket pair");
    // The kernel makes some thousands of it.
    setsockopt(&sockets.as_fd(), sockopt::SndBuf, &1).expect("SO_SNDBUF");
    let mut joining = Joining::through(&spec(), sockets, maker);
    for _ in 0..3 {
        assert_eq!(cross(&mut joining.script, 40), 0);
    }
    assert_eq!(cross(&mut joining.script, 40), 40);
}

#[test]
fn who_does_not_answer_for_sockets_is_asked_again_after_a_pause() {
    let name = "script::faults::who_does_not_answer_for_sockets_is_asked_again_after_a_pause";
    if !hostile::in_empty_namespace(name) {
        return;
    }
    let mut joining = Joining::new();
    let script = &mut joining.script;
    assert_eq!(cross(script, 1), 0);
    assert_eq!(cross(script, 1), 0);
    // An answer in time makes up for them, and those that come too late do not.
    let client = TcpStream::connect(script.published[0]).expect("connect");
    script.wait_for("flow", |script| script.stats().tcp_flows == 1);
    assert!(joining.maker.answer());
    script.wait_for("joined", |script| script.stats().tcp_joined == 1);
    drop(client);
    joining.inside.accept().expect("its other end");
    script.wait_for("the end", |script| script.stats().tcp_flows == 0);
    // Many at once are one.
    assert_eq!(cross(script, 20), 0);
    assert_eq!(cross(script, 1), 0);
    assert!(joining.maker.answer());
    script.settle();
    assert_eq!(cross(script, 1), 0);
    assert!(joining.maker.answer());
    // From now on nobody waits, until the pause is over, of which the last ones have seen the first 22 seconds.
    script.advance(INSIDE_PAUSE - Duration::from_secs(22) - REST);
    assert_eq!(cross(script, 5), 5);
    assert!(!is_asked(&joining.maker));
    // Then one does. It is paused again from when it was asked for on: so much has gone by since then.
    assert_eq!(cross(script, 20), 19);
    assert!(is_asked(&joining.maker));
    script.advance(INSIDE_PAUSE - Duration::from_secs(23) - REST);
    assert_eq!(cross(script, 2), 2);
    assert_eq!(cross(script, 2), 1);
    // What was asked for before is answered too late.
    assert!(joining.maker.answer());
    script.settle();
    assert_eq!(cross(script, 1), 1);
    // As soon as it answers in time it is asked each time.
    let clients: Vec<TcpStream> = (1..=3)
        .map(|joined| {
            let client = TcpStream::connect(script.published[0]).expect("connect");
            script.wait_for("flow", |script| script.stats().tcp_flows == joined);
            assert!(joining.maker.answer());
            script.wait_for("joined", |script| script.stats().tcp_joined == 1 + joined);
            client
        })
        .collect();
    drop(clients);
    assert_eq!(script.stats().tcp_joined, 4);
}
