//! Who asks: many at once, the same question again, over TCP, and for what the stack answers itself.

use super::*;

#[test]
fn the_same_question_of_many_is_asked_once() {
    let mut dns = Dns::new();
    for port in 1_000..1_010 {
        let name = if port % 2 == 0 { "a.example" } else { "A.EXAMPLE" };
        dns.ask(port, &query(port, name, TYPE_A, port % 3 == 0));
        // Its libc asks again.
        dns.ask(port, &query(port, name, TYPE_A, port % 3 == 0));
    }
    assert_eq!(dns.script.engine.open_queries(), 1);
    dns.answers(0, &[(0, "a.example", TYPE_A, 0, A.into())]);
    for port in 1_000..1_010u16 {
        let told = dns.told(port);
        let name: &[u8] = if port % 2 == 0 { b"\x01a\x07example\0" } else { b"\x01A\x07EXAMPLE\0" };
        assert_eq!((&told[..2], &told[12..23]), (&port.to_be_bytes()[..], name));
        assert_eq!(Message::from_vec(&told).expect("a message").edns.is_some(), port % 3 == 0);
    }
    dns.script.nothing_comes("a second answer");
    dns.not_asked();
    // DNSSEC records are another question.
    let mut dnssec = query(7, "a.example", TYPE_A, true);
    let at = dnssec.len() - 4;
    dnssec[at] = 0x80;
    dns.ask(1, &dnssec);
    dns.ask(2, &query(8, "a.example", TYPE_A, true));
    assert_eq!(dns.script.engine.open_queries(), 2);
    let asked = [dns.asked().0, dns.asked().0].map(|ask| parse_query(&ask).expect("query").edns);
    assert_eq!(asked.map(|edns| edns.expect("EDNS").dnssec), [true, false]);
}

#[test]
fn who_asks_again_after_a_suspension_does_not_wait_for_an_old_question() {
    let mut dns = Dns::new();
    let ask = query(1, "a.example", TYPE_A, true);
    dns.ask(1_000, &ask);
    dns.asked();
    dns.script.engine.pretend_suspension(Duration::from_secs(60));
    dns.script.advance_millis(1_000);
    dns.not_asked();
    // The same guest, and another one.
    for port in [1_000, 1_001] {
        dns.ask(port, &ask);
    }
    dns.answers(0, &[(0, "a.example", TYPE_A, 60, A.into())]);
    dns.not_asked();
    for port in [1_000, 1_001] {
        assert_eq!(dns.heard(port).answers.len(), 1);
    }
    assert_eq!(dns.script.engine.open_queries(), 0);
}

#[test]
fn those_who_wait_are_bounded() {
    let mut dns = Dns::new();
    let most = u16::try_from(MAX_DNS_WAITERS).expect("small");
    for id in 0..most {
        dns.ask(1_000, &query(id, "a.example", TYPE_A, true));
    }
    dns.script.nothing_comes("an answer");
    dns.ask(1_000, &query(most, "a.example", TYPE_A, true));
    assert_eq!(dns.heard(1_000).metadata.response_code, ResponseCode::ServFail);
    dns.script.engine.check_bounds();
    dns.answers(0, &[(0, "a.example", TYPE_A, 60, A.into())]);
    for id in 0..most {
        assert_eq!(dns.heard(1_000).metadata.id, id);
    }
    dns.script.engine.check_bounds();
}

#[test]
fn dns_over_tcp_waits_for_a_guest_that_reads_no_answers() {
    let mut script = Script::new(&spec(), true);
    let mut peer = Peer::new(false, 53);
    peer.open(&mut script);
    peer.window = 0;
    // Empty messages: each is answered at once, with an error six times as long. No faster than they are read.
    let mut closed = false;
    for _ in 0..400 {
        peer.send(&mut script, TcpControl::None, &[0; 2_000]);
        closed |= std::iter::from_fn(|| script.try_recv()).any(|frame| frame.tcp().window_len() == 0);
    }
    assert!(closed, "its window closes");
    assert!(script.engine.dns_bytes() <= 1 << 20, "{}", script.engine.dns_bytes());
    assert_eq!(script.stats().tcp_flows, 1);
}

#[test]
fn dns_over_tcp_takes_a_query_in_any_pieces() {
    let mut spec = spec();
    spec.dns.hosts = vec![("some.name".into(), ip("192.0.2.7"))];
    let mut script = Script::new(&spec, true);
    let mut peer = Peer::new(true, 53);
    peer.open(&mut script);
    let query = crate::dns::message::tests::query(0x1234, "some.name", 1, false);
    let mut stream = Vec::new();
    for _ in 0..3 {
        stream.extend(u16::try_from(query.len()).expect("length").to_be_bytes());
        stream.extend(&query);
    }
    let (pieces, rest) = stream.split_at(40);
    for byte in pieces {
        peer.send(&mut script, TcpControl::None, &[*byte]);
    }
    peer.send(&mut script, TcpControl::None, rest);
    let mut answers = 0;
    while answers < 3 {
        let frame = script.expect_tcp("answers", |segment| !segment.payload().is_empty());
        answers += frame.tcp().payload().windows(4).filter(|window| window == &[192, 0, 2, 7]).count();
        peer.take(&mut script, &frame);
    }
    // One too many connections.
    for port in 1..=128 {
        let mut another = Peer::new(true, 53);
        another.guest.1 = port;
        another.send(&mut script, TcpControl::Syn, b"");
    }
    script.expect_tcp("RST", |segment| segment.rst());
    assert_eq!((script.stats().tcp_flows, script.stats().refused_by_limit), (128, 1));
}

#[test]
fn thousands_of_queries_on_one_connection_leave_others_their_turn() {
    let mut dns = Dns::with(|spec| spec.dns.hosts = vec![("a.example".into(), ip("192.0.2.1"))]);
    let mut peer = Peer::new(false, 53);
    peer.open(&mut dns.script);
    let ask = query(3, "a.example", TYPE_A, false);
    let framed = [&u16::try_from(ask.len()).expect("length").to_be_bytes()[..], &ask].concat();
    let segment = framed.repeat(40);
    const SEGMENTS: usize = 50;
    for _ in 0..SEGMENTS {
        dns.script.send_ip(&peer.segment(TcpControl::None, &segment));
        peer.seq = peer.seq.wrapping_add(i32::try_from(segment.len()).expect("length"));
    }
    let answered = |dns: &Dns| usize::try_from(dns.script.stats().dns_queries).expect("few");
    dns.script.turn(Duration::ZERO);
    let first = answered(&dns);
    assert!((256..300).contains(&first), "{first}");
    // And it goes on by itself.
    let mut got = 0;
    while got < SEGMENTS * 40 * (framed.len() + 16) {
        let frame = dns.script.expect_tcp("an answer", |segment| !segment.payload().is_empty());
        got += peer.take(&mut dns.script, &frame);
    }
    assert_eq!(answered(&dns), SEGMENTS * 40);
}

#[test]
fn own_names_are_answered_both_ways_and_neighbours_are_not_asked_for() {
    let mut dns = Dns::with(|spec| {
        spec.dns.hosts = vec![("Box".into(), ip(GUEST_V4)), ("Box".into(), ip(GUEST_V6))];
    });
    for (name, kind, answer) in [
        ("bOx", TYPE_A, Some(GUEST_V4)),
        ("box", TYPE_AAAA, Some(GUEST_V6)),
        ("localhost", TYPE_A, Some("127.0.0.1")),
        ("100.2.0.10.in-addr.arpa", 12, Some("box.")),
        ("1.0.0.127.in-addr.arpa", 12, Some("localhost.")),
        ("77.2.0.10.in-addr.arpa", 12, None),
    ] {
        dns.ask(1_000, &query(1, name, kind, true));
        let told = dns.heard(1_000);
        let answers: Vec<String> = told.answers.iter().map(|record| record.data.to_string()).collect();
        assert_eq!(answers.first().map(String::as_str), answer, "{name}");
        let code = if answer.is_some() { ResponseCode::NoError } else { ResponseCode::NXDomain };
        assert_eq!(told.metadata.response_code, code, "{name}");
    }
    dns.not_asked();
}

#[test]
fn questions_that_have_no_answer_are_refused_here() {
    let mut dns = Dns::new();
    let mut version = query(1, "a.example", TYPE_A, true);
    let at = version.len() - 5;
    version[at] = 1;
    for (ask, code) in [
        (query(1, "a.example", 252, true), ResponseCode::Refused),
        (query(1, "a.example", 251, true), ResponseCode::Refused),
        (query(1, "a.example", 41, true), ResponseCode::FormErr),
        (query(1, "a.example", 250, true), ResponseCode::FormErr),
        // Its number is BADSIG's, too.
        (version, ResponseCode::BADSIG),
    ] {
        dns.ask(1_000, &ask);
        assert_eq!(dns.heard(1_000).metadata.response_code, code);
    }
    dns.not_asked();
}
