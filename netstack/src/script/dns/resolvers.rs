//! Resolvers that are silent, slow, old or gone, and what pretends to be one.

use super::*;

#[test]
fn dns_tries_on_until_time_is_up() {
    let query = crate::dns::message::tests::query(0x1234, "some.name", 1, true);
    let silent: Vec<UdpSocket> = (0..2).map(|_| UdpSocket::bind("127.0.0.1:0").expect("socket")).collect();
    let asked = |i: usize| {
        silent[i].set_nonblocking(true).expect("non-blocking");
        let mut buffer = [0; 512];
        std::iter::from_fn(|| silent[i].recv(&mut buffer).ok().map(|len| buffer[..len].to_vec()))
            .collect::<Vec<_>>()
    };
    let mut spec = spec();
    spec.dns.upstreams = silent.iter().map(|socket| socket.local_addr().expect("address")).collect();
    let mut script = Script::new(&spec, true);
    let ask = udp((GUEST_V4, 5_000), (GATEWAY_V4, 53), &query);
    script.send_ip(&ask);
    script.send_ip(&ask);
    script.settle();
    let first = asked(0);
    assert_eq!(first.len(), 1, "the repetition of a query under way is not sent on");
    assert!(first[0][12..].eq_ignore_ascii_case(&query[12..]));
    assert!(asked(1).is_empty());
    script.advance_millis(1_600);
    assert_eq!((asked(0).len(), asked(1).len()), (0, 1));
    script.advance_millis(1_600);
    assert_eq!((asked(0).len(), asked(1).len()), (1, 0));
    script.nothing_comes("an answer before its time");
    script.advance_millis(1_600);
    let fail = script.expect("SERVFAIL", |_| true);
    let packet = fail.packet();
    let message = &packet.payload()[8..];
    assert_eq!((&message[..2], message[3] & 15), (&[0x12, 0x34][..], 2));
    assert_eq!(script.engine.open_queries(), 0);
}

#[test]
fn every_resolver_gets_its_turn() {
    let others: Vec<UdpSocket> = (0..3).map(|_| UdpSocket::bind("127.0.0.1:0").expect("socket")).collect();
    let count = |socket: &UdpSocket| {
        socket.set_nonblocking(true).expect("non-blocking");
        std::iter::repeat_with(|| socket.recv(&mut [0; 512])).take_while(Result::is_ok).count()
    };
    // Of four, the first three of which are silent.
    let mut dns = Dns::with(|spec| {
        let silent = others.iter().map(|socket| socket.local_addr().expect("address"));
        spec.dns.upstreams = silent.chain(spec.dns.upstreams.clone()).collect();
    });
    dns.ask(1_000, &query(1, "a.example", TYPE_A, true));
    for _ in 0..3 {
        dns.script.advance_millis(1_500);
    }
    assert_eq!(dns.heard(1_000).metadata.response_code, ResponseCode::ServFail);
    assert_eq!(others.iter().map(count).collect::<Vec<_>>(), [1, 1, 1]);
    dns.not_asked();
    dns.ask(1_000, &query(2, "a.example", TYPE_A, true));
    dns.answers(0, &[(0, "a.example", TYPE_A, 0, A.into())]);
    assert_eq!(dns.heard(1_000).answers.len(), 1);
    // It is asked first from now on.
    dns.ask(1_000, &query(3, "a.example", TYPE_A, true));
    dns.answers(0, &[(0, "a.example", TYPE_A, 0, A.into())]);
    dns.heard(1_000);
    assert_eq!(others.iter().map(count).sum::<usize>(), 0);
    // Of two, three times in all.
    let mut dns = Dns::with(|spec| {
        spec.dns.upstreams = others[..2].iter().map(|socket| socket.local_addr().expect("address")).collect();
    });
    dns.ask(1_000, &query(1, "a.example", TYPE_A, true));
    for _ in 0..3 {
        dns.script.nothing_comes("an answer");
        dns.script.advance_millis(1_500);
    }
    assert_eq!(dns.heard(1_000).metadata.response_code, ResponseCode::ServFail);
    assert_eq!(others[..2].iter().map(count).collect::<Vec<_>>(), [2, 1]);
}

#[test]
fn an_answer_without_the_letters_case_is_asked_for_again() {
    let mut dns = Dns::new();
    let name = "a-long-name-with-many-letters.example";
    dns.ask(1_000, &query(1, name, TYPE_A, true));
    let (first, from) = dns.asked();
    let lower = first.to_ascii_lowercase();
    assert_ne!(first[12..50], lower[12..50]);
    let mut wrong = response(&first, 0, &[(0, name, TYPE_A, 60, vec![6; 4])]);
    wrong[12..50].copy_from_slice(&lower[12..50]);
    dns.server.send_to(&wrong, from).expect("send");
    dns.script.settle();
    let (second, again) = dns.asked();
    assert_eq!(second[12..50], lower[12..50]);
    assert_ne!((&first[..2], from), (&second[..2], again), "what was guessed once is worth nothing");
    dns.server.send_to(&response(&second, 0, &[(0, name, TYPE_A, 60, A.into())]), again).expect("send");
    let message = dns.heard(1_000);
    assert_eq!(message.answers[0].data.ip_addr(), Some(ip("192.0.2.1")));
}

#[test]
fn a_resolver_without_edns_is_asked_without() {
    let mut dns = Dns::new();
    for (code, edns) in [(1, true), (4, false)] {
        dns.ask(1_000, &query(1, "a.example", TYPE_A, edns));
        let (ask, from) = dns.asked();
        assert!(parse_query(&ask).expect("query").edns.is_some());
        dns.server.send_to(&response(&ask, code, &[]), from).expect("send");
        dns.script.settle();
        let (ask, from) = dns.asked();
        assert!(parse_query(&ask).expect("query").edns.is_none());
        dns.server.send_to(&response(&ask, 0, &[(0, "a.example", TYPE_A, 0, A.into())]), from).expect("send");
        let message = dns.heard(1_000);
        assert_eq!((message.answers.len(), message.edns.is_some()), (1, edns));
    }
}

#[test]
fn what_does_not_fit_is_fetched_over_tcp_once() {
    let (server, listener) = loop {
        // The same port for both.
        let listener = TcpListener::bind("127.0.0.1:0").expect("listener");
        if let Ok(server) = UdpSocket::bind(listener.local_addr().expect("address")) {
            break (server, listener);
        }
    };
    let mut dns = Dns::with(|spec| spec.dns.upstreams = vec![server.local_addr().expect("address")]);
    dns.server = server;
    let records: Vec<Record<'_>> =
        (0..100).map(|i| (0, "many.example", TYPE_A, 60, vec![192, 0, 2, i])).collect();
    dns.ask(1_000, &query(1, "many.example", TYPE_A, false));
    let (ask, from) = dns.asked();
    let mut truncated = response(&ask, 0, &records[..10]);
    truncated[2] |= 2;
    dns.server.send_to(&truncated, from).expect("send");
    dns.script.settle();
    let mut stream = accept(&listener);
    dns.script.settle();
    let mut len = [0; 2];
    stream.read_exact(&mut len).expect("length");
    let mut ask = vec![0; u16::from_be_bytes(len).into()];
    stream.read_exact(&mut ask).expect("query");
    let whole = response(&ask, 0, &records);
    stream.write_all(&u16::try_from(whole.len()).expect("length").to_be_bytes()).expect("send");
    stream.write_all(&whole).expect("send");
    let told = dns.heard(1_000);
    assert_eq!((told.metadata.truncation, told.answers.len()), (true, 0));
    // What the guest then asks over TCP, or with a larger buffer, is there.
    let mut large = query(2, "many.example", TYPE_A, true);
    let at = large.len() - 8;
    large[at..at + 2].copy_from_slice(&u16::to_be_bytes(4_096));
    dns.ask(1_001, &large);
    let mut pieces = Vec::new();
    while pieces.len() < 2_700 {
        pieces.extend_from_slice(dns.script.expect("fragments", |_| true).packet().payload());
    }
    let told = Message::from_vec(&pieces[8..]).expect("a message");
    assert_eq!((told.metadata.truncation, told.answers.len()), (false, 100));
    let mut peer = Peer::new(false, 53);
    peer.open(&mut dns.script);
    let ask = query(3, "many.example", TYPE_A, false);
    let framed = [&u16::try_from(ask.len()).expect("length").to_be_bytes()[..], &ask].concat();
    peer.send(&mut dns.script, TcpControl::None, &framed);
    let mut stream = Vec::new();
    while stream.len() < 2_700 {
        let frame = dns.script.expect_tcp("the answer", |segment| !segment.payload().is_empty());
        stream.extend_from_slice(frame.tcp().payload());
        peer.take(&mut dns.script, &frame);
    }
    let told = Message::from_vec(&stream[2..]).expect("a message");
    assert_eq!((told.metadata.truncation, told.answers.len()), (false, 100));
    dns.not_asked();
}

#[test]
fn without_tcp_there_is_what_a_datagram_held() {
    let mut dns = Dns::new();
    dns.ask(1_000, &query(1, "many.example", TYPE_A, true));
    for _ in 0..2 {
        let (ask, from) = dns.asked();
        let mut truncated = response(&ask, 0, &[(0, "many.example", TYPE_A, 60, A.into())]);
        truncated[2] |= 2;
        dns.server.send_to(&truncated, from).expect("send");
        dns.script.settle();
    }
    let told = dns.heard(1_000);
    assert_eq!((told.metadata.truncation, told.answers.len()), (true, 1));
    // That is not kept.
    dns.ask(1_000, &query(2, "many.example", TYPE_A, true));
    assert_eq!(dns.script.engine.open_queries(), 1);
}

#[test]
fn a_resolver_that_is_gone_is_told_at_once_and_may_come_back() {
    let mut dns = Dns::new();
    let addr = dns.server.local_addr().expect("address");
    dns.server = UdpSocket::bind("127.0.0.1:0").expect("socket");
    dns.ask(1_000, &query(1, "a.example", TYPE_A, true));
    // No time passes.
    let told = dns.told(1_000);
    assert!(told.ends_with(b"no resolver of the host answers"));
    assert_eq!(Message::from_vec(&told).expect("a message").metadata.response_code, ResponseCode::ServFail);
    dns.server = UdpSocket::bind(addr).expect("socket");
    dns.ask(1_000, &query(2, "a.example", TYPE_A, true));
    dns.answers(0, &[(0, "a.example", TYPE_A, 60, A.into())]);
    assert_eq!(ttls(&dns.heard(1_000)), [60]);
}

#[test]
fn a_socket_that_announces_what_it_does_not_have_wakes_nobody_for_ever() {
    use std::cell::Cell;
    use std::rc::Rc;
    let mut dns = Dns::new();
    let calls = Rc::new(Cell::new(0));
    let count = Rc::clone(&calls);
    set_plan(Some(Box::new(move |call, _| match call {
        Call::Recv => {
            count.set(count.get() + 1);
            Fault::Fails(Errno::EAGAIN)
        }
        _ => Fault::None,
    })));
    dns.ask(1_000, &query(1, "a.example", TYPE_A, true));
    let (ask, from) = dns.asked();
    let answer = response(&ask, 0, &[(0, "a.example", TYPE_A, 60, A.into())]);
    dns.server.send_to(&answer, from).expect("send");
    for _ in 0..20 {
        dns.script.settle();
    }
    // Each time the datagrams were looked for, and errors.
    assert!((10..=70).contains(&calls.get()), "{}", calls.get());
    assert!(dns.script.engine.is_quiet(dns.script.now), "it spins");
    set_plan(None);
    dns.not_asked();
    // No time has passed, and the try has not ended.
    dns.server.send_to(&[0; 3], from).expect("send");
    assert_eq!(ttls(&dns.heard(1_000)), [60]);
    // A few are nothing to worry about.
    let mut left = 3;
    set_plan(Some(Box::new(move |call, _| match call {
        Call::Recv if left > 0 => {
            left -= 1;
            Fault::Fails(Errno::EAGAIN)
        }
        _ => Fault::None,
    })));
    dns.ask(1_000, &query(2, "b.example", TYPE_A, true));
    dns.answers(0, &[(0, "b.example", TYPE_A, 60, A.into())]);
    assert_eq!(ttls(&dns.heard(1_000)), [60]);
    set_plan(None);
}

/// Sends an IP packet of this protocol from the host to itself.
fn send_raw(protocol: nix::sys::socket::SockProtocol, payload: &[u8]) {
    use nix::sys::socket::{MsgFlags, SockaddrIn, sendto, socket};
    use std::os::fd::AsRawFd as _;
    let raw =
        socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol).expect("raw socket");
    let to = SockaddrIn::new(127, 0, 0, 1, 0);
    assert_eq!(sendto(raw.as_raw_fd(), payload, &to, MsgFlags::empty()), Ok(payload.len()));
}

#[test]
fn what_is_no_answer_ends_no_try() {
    use nix::sys::socket::SockProtocol;
    if !in_empty_namespace("script::dns::resolvers::what_is_no_answer_ends_no_try") {
        return;
    }
    let mut dns = Dns::new();
    dns.ask(1_000, &query(1, "a.example", TYPE_A, true));
    let (ask, from) = dns.asked();
    let to = dns.server.local_addr().expect("address");
    // The kernel looks at the checksum of a short one before it says anything.
    let records = vec![(0, "a.example", TYPE_A, 60, A.into()); 12];
    let good = response(&ask, 0, &records);
    let ports =
        |from: SocketAddr, to: SocketAddr| [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    // Nonsense, another identifier, another question.
    let mut other = good.clone();
    other[0] ^= 1;
    let question = response(&query(1, "b.example", TYPE_A, true), 0, &[]);
    for _ in 0..100 {
        for wrong in [&b"nonsense"[..], &other, &question] {
            dns.server.send_to(wrong, from).expect("send");
        }
        dns.script.settle();
    }
    dns.script.wait_for("all are passed over", |script| script.stats().dns_ignored >= 300);
    assert_eq!(dns.script.stats().dns_ignored, 300);
    // Errors that whoever guesses the port can make: without what was sent, and with something else.
    let refusal = |quoted: &[u8]| {
        let mut message = vec![3, 3, 0, 0, 0, 0, 0, 0];
        let mut datagram = ports(from, to);
        datagram.extend(u16::try_from(8 + ask.len()).expect("length").to_be_bytes());
        datagram.extend([0, 0]);
        datagram.extend(quoted);
        message.extend(ingress::rebuild(from.ip(), to.ip(), ingress::UDP, 64, &datagram));
        Icmpv4Packet::new_unchecked(&mut message[..]).fill_checksum();
        send_raw(SockProtocol::Icmp, &message);
    };
    let mut wrong = ask.clone();
    wrong[1] ^= 1;
    for _ in 0..100 {
        refusal(&[]);
        refusal(&wrong);
        dns.script.settle();
    }
    dns.script.wait_for("all are passed over", |script| script.stats().dns_ignored >= 500);
    assert_eq!(dns.script.stats().dns_ignored, 500);
    // The right answer with a wrong checksum: more often than the socket may say so in vain.
    for _ in 0..100 {
        let mut datagram = ports(to, from);
        datagram.extend(u16::try_from(8 + good.len()).expect("length").to_be_bytes());
        datagram.extend([0xba, 0xad]);
        datagram.extend(&good);
        send_raw(SockProtocol::Udp, &datagram);
        dns.script.settle();
    }
    dns.script.wait_for("all are passed over", |script| script.stats().dns_ignored >= 600);
    assert_eq!(dns.script.stats().dns_ignored, 600);
    assert_eq!(dns.script.engine.open_queries(), 1);
    dns.not_asked();
    // No time has passed.
    dns.server.send_to(&good, from).expect("send");
    assert_eq!(ttls(&dns.heard(1_000)), [60; 12]);
    // One that quotes the query is believed: the least of it; or 128 bytes, which may be more than there are, with an
    // extension behind them.
    let long = format!("{0}.{0}.example", "b".repeat(60));
    for (name, extended) in [("b.example", false), ("c.example", true), (&long, true)] {
        dns.ask(1_000, &query(2, name, TYPE_A, true));
        let (ask, from) = dns.asked();
        let mut datagram = ports(from, to);
        datagram.extend([0; 4]);
        datagram.extend(if extended { &ask } else { &ask[..12] });
        let mut quoted = ingress::rebuild(from.ip(), to.ip(), ingress::UDP, 64, &datagram);
        let mut message = vec![3, 3, 0, 0, 0, 0, 0, 0];
        if extended {
            assert_ne!(quoted.len(), 128);
            quoted.resize(128, 0);
            message[5] = 128 / 4;
            // An object of a class for experiments.
            quoted.extend([0x20, 0, 0, 0, 0, 8, 247, 1, 1, 2, 3, 4]);
            let sum = !checksum::data(&quoted[128..]);
            quoted[130..132].copy_from_slice(&sum.to_be_bytes());
        }
        message.extend(quoted);
        Icmpv4Packet::new_unchecked(&mut message[..]).fill_checksum();
        send_raw(SockProtocol::Icmp, &message);
        dns.script.settle();
        let (again, at) = dns.asked();
        assert_ne!(at, from, "{name} is asked again at once");
        dns.server.send_to(&response(&again, 0, &[]), at).expect("send");
        dns.heard(1_000);
    }
}

#[test]
fn a_resolver_that_falls_silent_and_comes_back_leaves_nothing_behind() {
    let mut dns = Dns::new();
    dns.ask(1_000, &query(1, "kept.example", TYPE_A, true));
    dns.answers(0, &[(0, "kept.example", TYPE_A, 3_600, A.into())]);
    dns.heard(1_000);
    let timers = dns.script.engine.timers();
    let mut failed = std::collections::HashSet::new();
    let hear = |dns: &mut Dns, failed: &mut std::collections::HashSet<u16>| {
        while let Some(frame) = dns.script.try_recv() {
            let told = Message::from_vec(&frame.packet().payload()[8..]).expect("a message");
            assert_eq!(told.metadata.response_code, ResponseCode::ServFail);
            assert!(failed.insert(told.metadata.id), "each is told once");
        }
    };
    // More than there may be under way; the oldest give way.
    for id in 0..300 {
        dns.ask(1_000, &query(id, &format!("n{id}.example"), TYPE_A, true));
        hear(&mut dns, &mut failed);
    }
    dns.script.engine.check_bounds();
    assert_eq!(failed.len(), 300 - MAX_DNS_QUERIES);
    dns.ask(1_001, &query(1, "kept.example", TYPE_A, true));
    assert_eq!(dns.heard(1_001).answers.len(), 1, "what is kept is not touched");
    let mut late = Vec::new();
    dns.server.set_nonblocking(true).expect("non-blocking");
    for _ in 0..2 {
        dns.script.advance_millis(1_500);
        let mut buffer = [0; 512];
        while let Ok((len, from)) = dns.server.recv_from(&mut buffer) {
            late.push((buffer[..len].to_vec(), from));
        }
    }
    hear(&mut dns, &mut failed);
    assert_eq!((failed.len(), dns.script.engine.open_queries()), (300, 0));
    assert_eq!(dns.script.engine.timers(), timers);
    // What it says now that nobody waits any more goes nowhere.
    for (ask, from) in &late {
        let _ = dns.server.send_to(&response(ask, 0, &[]), from);
    }
    dns.script.nothing_comes("an answer to nobody");
    dns.server.set_nonblocking(false).expect("blocking");
    dns.ask(1_002, &query(1, "n1.example", TYPE_A, true));
    dns.answers(0, &[(0, "n1.example", TYPE_A, 60, A.into())]);
    assert_eq!(dns.heard(1_002).answers.len(), 1);
}
