//! DNS at the gateway against resolvers that the script plays: real sockets, virtual time.

use hickory_proto::op::{Message, ResponseCode};
use nix::errno::Errno;

use super::*;
use crate::calls::{Call, Fault, set_plan};
use crate::config::{MAX_DNS_LOCAL_TTL, MAX_DNS_QUERIES, MAX_DNS_WAITERS, MAX_PINS, PIN_GRACE};
use crate::dns::message::tests::query;
use crate::dns::message::{TYPE_A, TYPE_AAAA, TYPE_SOA, parse_query};
use crate::dns::response::tests::{Record, response, soa};

const A: [u8; 4] = [192, 0, 2, 1];

/// A resolver and the guest that is to use it.
pub(super) struct Dns {
    pub(super) script: Script,
    server: UdpSocket,
}

impl Dns {
    fn new() -> Self {
        Self::with(|_| {})
    }

    /// The resolver is taken for one that is far away.
    pub(super) fn with(change: impl FnOnce(&mut StackSpec)) -> Self {
        let mut dns = Self::near(change);
        dns.script.engine.take_resolvers_for_distant();
        dns
    }

    /// The resolver is where it is: on the host's loopback.
    fn near(change: impl FnOnce(&mut StackSpec)) -> Self {
        let server = UdpSocket::bind("127.0.0.1:0").expect("socket");
        server.set_read_timeout(Some(std::time::Duration::from_secs(10))).expect("time-out");
        let mut spec = spec();
        spec.dns.upstreams = vec![server.local_addr().expect("address")];
        change(&mut spec);
        // Answers one by one.
        Self { script: Script::new(&spec, false), server }
    }

    /// The guest asks from `port`.
    pub(super) fn ask(&mut self, port: u16, query: &[u8]) {
        self.script.send_ip(&udp((GUEST_V4, port), (GATEWAY_V4, 53), query));
        self.script.settle();
    }

    /// What the resolver is asked, and from where.
    fn asked(&self) -> (Vec<u8>, SocketAddr) {
        let mut buffer = [0; 512];
        let (len, from) = self.server.recv_from(&mut buffer).expect("a query");
        (buffer[..len].to_vec(), from)
    }

    fn not_asked(&self) {
        self.server.set_nonblocking(true).expect("non-blocking");
        let got = self.server.recv(&mut [0; 512]);
        self.server.set_nonblocking(false).expect("blocking");
        got.expect_err("nothing to ask");
    }

    /// The resolver answers what it is asked next.
    pub(super) fn answers(&self, code: u8, records: &[Record<'_>]) {
        let (ask, from) = self.asked();
        self.server.send_to(&response(&ask, code, records), from).expect("send");
    }

    /// The next answer that the guest gets, which comes for `port`.
    fn told(&mut self, port: u16) -> Vec<u8> {
        let frame = self.script.expect("an answer", |_| true);
        let packet = frame.packet();
        assert_eq!(packet.payload()[2..4], port.to_be_bytes());
        packet.payload()[8..].to_vec()
    }

    /// The same, understood.
    pub(super) fn heard(&mut self, port: u16) -> Message {
        Message::from_vec(&self.told(port)).expect("a message")
    }
}

fn ttls(message: &Message) -> Vec<u32> {
    message.all_sections().map(|record| record.ttl).collect()
}

#[test]
fn an_answer_is_kept_and_its_time_is_counted_down() {
    let mut dns = Dns::new();
    dns.ask(1_000, &query(1, "a.example", TYPE_A, true));
    dns.answers(0, &[(0, "a.example", TYPE_A, 100, A.into()), (0, "a.example", TYPE_A, 200, A.into())]);
    assert_eq!(ttls(&dns.heard(1_000)), [100, 200]);
    for (millis, left) in [(0, [100, 200]), (30_900, [70, 170]), (100, [69, 169]), (68_900, [1, 101])] {
        dns.script.advance_millis(millis);
        // In other letters, with another identifier and without EDNS: the same question.
        let ask = query(7, "A.Example", TYPE_A, false);
        dns.ask(1_001, &ask);
        let told = dns.told(1_001);
        assert_eq!((&told[..2], &told[12..ask.len()]), (&ask[..2], &ask[12..]), "as it was asked");
        let message = Message::from_vec(&told).expect("a message");
        assert_eq!((ttls(&message), message.edns.is_some()), (left.to_vec(), false));
        assert_eq!(dns.script.engine.open_queries(), 0);
    }
    dns.not_asked();
    assert_eq!((dns.script.stats().dns_queries, dns.script.stats().dns_cached), (5, 4));
    dns.script.advance_millis(200);
    dns.ask(1_002, &query(8, "a.example", TYPE_A, true));
    dns.answers(0, &[(0, "a.example", TYPE_A, 100, A.into())]);
    assert_eq!(ttls(&dns.heard(1_002)), [100]);
    // Another type is another question.
    dns.ask(1_003, &query(8, "a.example", TYPE_AAAA, true));
    dns.answers(0, &[(0, "a.example", TYPE_AAAA, 100, vec![0x20; 16])]);
    assert_eq!(ttls(&dns.heard(1_003)), [100]);
}

#[test]
fn no_is_kept_as_long_as_its_soa_record_says_and_failures_are_not() {
    let mut dns = Dns::new();
    for (code, expected, name) in
        [(3, ResponseCode::NXDomain, "nobody.example"), (0, ResponseCode::NoError, "nothing.example")]
    {
        dns.ask(1_000, &query(1, name, TYPE_A, true));
        dns.answers(code, &[(1, "example", TYPE_SOA, 900, soa(20))]);
        let message = dns.heard(1_000);
        assert_eq!((message.metadata.response_code, ttls(&message)), (expected, vec![20]));
        dns.script.advance_millis(19_000);
        dns.ask(1_000, &query(2, name, TYPE_A, true));
        let message = dns.heard(1_000);
        assert_eq!((message.metadata.response_code, ttls(&message)), (expected, vec![1]));
        dns.not_asked();
        dns.script.advance_millis(1_000);
        dns.ask(1_000, &query(3, name, TYPE_A, true));
        dns.answers(code, &[]);
        dns.heard(1_000);
        // Nobody has said how long.
        dns.ask(1_000, &query(4, name, TYPE_A, true));
        dns.answers(2, &[]);
        assert_eq!(dns.heard(1_000).metadata.response_code, ResponseCode::ServFail);
        dns.ask(1_000, &query(5, name, TYPE_A, true));
        dns.answers(0, &[(0, name, TYPE_A, 0, A.into())]);
        assert_eq!(ttls(&dns.heard(1_000)), [0]);
        dns.ask(1_000, &query(6, name, TYPE_A, true));
        dns.answers(3, &[]);
        dns.heard(1_000);
    }
}

#[test]
fn what_the_hosts_own_resolver_says_is_kept_for_moments() {
    let mut dns = Dns::near(|_| {});
    dns.ask(1_000, &query(1, "a.example", TYPE_A, true));
    dns.answers(0, &[(0, "a.example", TYPE_A, 100, A.into())]);
    assert_eq!(ttls(&dns.heard(1_000)), [100], "how long it holds is not ours to say");
    dns.script.advance_millis(u64::from(MAX_DNS_LOCAL_TTL) * 1_000 - 1);
    dns.ask(1_000, &query(2, "a.example", TYPE_A, true));
    assert_eq!(ttls(&dns.heard(1_000)), [96]);
    dns.not_asked();
    // It has joined another network meanwhile.
    dns.script.advance_millis(1);
    dns.ask(1_000, &query(3, "a.example", TYPE_A, true));
    dns.answers(3, &[]);
    assert_eq!(dns.heard(1_000).metadata.response_code, ResponseCode::NXDomain);
}

#[test]
fn after_a_suspension_everything_is_asked_for_anew_and_names_are_older() {
    let mut dns = Dns::new();
    let names = |dns: &Dns| dns.script.engine.names_of(dns.script.now, ip("192.0.2.1"));
    let record = [(0, "a.example", TYPE_A, 3_600, A.into())];
    dns.ask(1_000, &query(1, "a.example", TYPE_A, true));
    dns.answers(0, &record);
    dns.heard(1_000);
    dns.script.advance_millis(2_000);
    // Asked before, and not answered yet.
    dns.ask(1_000, &query(2, "b.example", TYPE_A, true));
    let (old, old_from) = dns.asked();
    dns.script.engine.pretend_suspension(Duration::from_secs(600));
    dns.script.advance_millis(1_000);
    dns.ask(1_001, &query(3, "a.example", TYPE_A, true));
    dns.answers(0, &record);
    dns.heard(1_001);
    // Whoever waits still gets what comes, but it is not kept.
    dns.server
        .send_to(&response(&old, 0, &[(0, "b.example", TYPE_A, 3_600, A.into())]), old_from)
        .expect("send");
    assert_eq!(dns.heard(1_000).answers.len(), 1);
    for name in ["b.example", "a.example"] {
        dns.ask(1_002, &query(4, name, TYPE_A, true));
        if name == "b.example" {
            dns.answers(0, &[(0, name, TYPE_A, 3_600, A.into())]);
        }
        dns.heard(1_002);
        dns.not_asked();
    }
    assert_eq!(names(&dns), ["a.example", "b.example"]);
    // The pins grow older by what the clock does not show, when names are asked for the next time.
    dns.script.advance_millis(1_000);
    dns.script.engine.pretend_suspension(Duration::from_secs(3_500) + PIN_GRACE);
    dns.ask(1_003, &query(5, "c.example", TYPE_A, true));
    assert_eq!(names(&dns), ["a.example", "b.example"]);
    dns.script.advance_millis(99_000);
    assert!(names(&dns).is_empty());
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

/// Leads more names to addresses than can be remembered.
fn overflow_pins(dns: &mut Dns, round: u8) {
    for part in 0..=u8::try_from(MAX_PINS / 200).expect("small") {
        let name = format!("many-{round}-{part}.example");
        let address = |i| vec![10, round, part, i];
        let records: Vec<Record<'_>> = (0..200).map(|i| (0, &*name, TYPE_A, 60, address(i))).collect();
        dns.ask(1_000, &query(1, &name, TYPE_A, false));
        dns.answers(0, &records);
        dns.heard(1_000);
    }
    dns.script.engine.check_bounds();
}

#[test]
fn what_is_kept_is_forgotten_for_lost_names_only_where_rules_want_them() {
    let mut dns = Dns::new();
    let ask = query(1, "a.example", TYPE_A, true);
    let kept = |dns: &mut Dns| {
        let before = dns.script.stats().dns_cached;
        dns.ask(1_000, &ask);
        let kept = dns.script.stats().dns_cached > before;
        if !kept {
            dns.answers(0, &[(0, "a.example", TYPE_A, 3_600, A.into())]);
        }
        dns.heard(1_000);
        kept
    };
    assert!(!kept(&mut dns));
    overflow_pins(&mut dns, 1);
    assert!(kept(&mut dns));
    // From now on it has to be pinned.
    let mut policy = dns.script.engine.policy();
    policy.deny_names = vec!["bad.example".parse().expect("name")];
    dns.script.engine.set_policy(policy.clone());
    assert!(!kept(&mut dns) && kept(&mut dns));
    dns.script.engine.set_policy(policy);
    assert!(kept(&mut dns), "it was pinned before");
    overflow_pins(&mut dns, 2);
    assert!(!kept(&mut dns));
}

#[test]
fn what_nobody_checked_is_no_name_for_rules() {
    let mut unchecked = query(1, "a.example", TYPE_A, true);
    unchecked[3] |= 0x10;
    for (allow_names, passed_on, pinned) in [(vec![], 0x10, false), (vec!["*.example"], 0, true)] {
        let mut dns = Dns::with(|spec| {
            spec.policy.allow_names = allow_names.iter().map(|name| name.parse().expect(name)).collect();
        });
        dns.ask(1_000, &unchecked);
        let (ask, from) = dns.asked();
        assert_eq!(ask[3] & 0x10, passed_on);
        dns.server
            .send_to(&response(&ask, 0, &[(0, "a.example", TYPE_A, 60, A.into())]), from)
            .expect("send");
        let told = dns.heard(1_000);
        assert!(told.metadata.checking_disabled && told.answers.len() == 1, "as it was asked");
        let names = dns.script.engine.names_of(dns.script.now, ip("192.0.2.1"));
        assert_eq!(!names.is_empty(), pinned, "{names:?}");
    }
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
    if !super::hostile::in_empty_namespace("script::dns::what_is_no_answer_ends_no_try") {
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

#[test]
fn hints_of_services_are_pinned_to_their_hosts() {
    let mut dns = Dns::new();
    let service = vec![0, 1, 0, 0, 4, 0, 4, 192, 0, 2, 1];
    for (name, kind) in [("a.example", 65), ("_8443._https.b.example", 65), ("_dns.c.example", 64)] {
        dns.ask(1_000, &query(1, name, kind, true));
        dns.answers(0, &[(0, name, kind, 60, service.clone())]);
        dns.heard(1_000);
    }
    // Only services have names of that kind.
    dns.ask(1_000, &query(1, "_d.example", TYPE_A, true));
    dns.answers(0, &[(0, "_d.example", TYPE_A, 60, A.into())]);
    dns.heard(1_000);
    let names = dns.script.engine.names_of(dns.script.now, ip("192.0.2.1"));
    assert_eq!(names, ["a.example", "b.example", "c.example", "_d.example"]);
}

#[test]
fn resolved_names_are_pinned_to_their_addresses() {
    let mut dns = Dns::with(|spec| spec.dns.hosts = vec![("Box.".into(), ip("192.0.2.1"))]);
    let names = |dns: &Dns| dns.script.engine.names_of(dns.script.now, ip("192.0.2.1"));
    assert_eq!(names(&dns), ["box"]);
    dns.ask(1_000, &query(1, "WWW.example", TYPE_A, true));
    dns.answers(0, &[(0, "www.example", TYPE_A, 60, A.into())]);
    dns.heard(1_000);
    assert_eq!(names(&dns), ["box", "www.example"]);
    // As long as the guest may still have it from the cache, and the grace.
    dns.script.advance_millis(59_000);
    dns.ask(1_000, &query(2, "www.example", TYPE_A, true));
    dns.heard(1_000);
    dns.script.advance(PIN_GRACE);
    assert_eq!(names(&dns), ["box", "www.example"]);
    dns.script.advance_millis(1_000);
    assert_eq!(names(&dns), ["box"]);
}
