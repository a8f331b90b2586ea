//! Rules by name and the flows that they are about, in a network namespace where every address is the host's own.

use super::dns::Dns;
use super::*;
use crate::config::PIN_GRACE;
use crate::dns::message::tests::query;
use crate::dns::message::{TYPE_A, TYPE_HTTPS, wire};
use crate::policy::hello::tests::real;

const PEER: &str = "192.0.2.1";

fn listener_there() -> (TcpListener, u16) {
    let listener = TcpListener::bind((PEER, 0)).expect("listener");
    let port = listener.local_addr().expect("address").port();
    (listener, port)
}

fn peer_there(from: u16, port: u16) -> Peer {
    let mut peer = Peer::new(false, port);
    (peer.guest.1, peer.remote.0) = (from, ip(PEER));
    peer
}

fn opened(script: &mut Script, from: u16, listener: &(TcpListener, u16)) -> (Peer, TcpStream) {
    let mut peer = peer_there(from, listener.1);
    peer.open(script);
    let stream = accept(&listener.0);
    stream.set_read_timeout(Some(std::time::Duration::from_secs(10))).expect("time-out");
    (peer, stream)
}

/// What a program that asks for this name says first.
fn hello(program: &str) -> Vec<u8> {
    real().into_iter().find(|(name, _)| *name == program).expect("a program").1
}

fn echo_request(sequence: u8) -> Vec<u8> {
    let mut message = vec![8, 0, 0, 0, 0, 7, 0, sequence];
    Icmpv4Packet::new_unchecked(&mut message[..]).fill_checksum();
    ingress::rebuild(ip(GUEST_V4), ip(PEER), ingress::ICMP, 64, &message)
}

/// Everything that waits for the guest: segments with RST, datagrams, and of ICMP the types.
fn told(script: &mut Script) -> (usize, usize, Vec<u8>) {
    script.settle();
    let mut all = (0, 0, Vec::new());
    while let Some(frame) = script.try_recv() {
        let packet = frame.packet();
        match packet.protocol {
            ingress::TCP => all.0 += usize::from(frame.tcp().rst()),
            ingress::UDP => all.1 += 1,
            _ => all.2.push(packet.payload()[0]),
        }
    }
    all
}

fn received(stream: &mut TcpStream, wanted: &[u8]) {
    let mut buffer = vec![0; wanted.len()];
    stream.read_exact(&mut buffer).expect("data");
    assert_eq!(buffer, wanted);
}

#[test]
fn what_a_services_target_is_resolved_to_is_known_by_the_services_name() {
    if !in_empty_namespace(
        "script::names::what_a_services_target_is_resolved_to_is_known_by_the_services_name",
    ) {
        return;
    }
    let service = |target: &str| [&[0, 1][..], &wire(target).expect("name")].concat();
    // Which of the names is asked for first, and whether the target is asked for again: from the cache, then.
    for order in [&["a.example", "cdn.example"][..], &["cdn.example", "a.example", "cdn.example"]] {
        let mut dns = Dns::with(|spec| spec.policy.allow_names = vec!["a.example".parse().expect("name")]);
        let goes = |dns: &mut Dns, from| {
            dns.script.send_ip(&udp((GUEST_V4, from), (PEER, 7), b"x"));
            told(&mut dns.script);
            // What is let through finds nobody there, which is no refusal of ours.
            dns.script.stats().refused_by_policy == 0
        };
        let mut kept = 0;
        for &name in order {
            let kind = if name == "a.example" { TYPE_HTTPS } else { TYPE_A };
            dns.ask(1_000, &query(1, name, kind, true));
            if std::mem::replace(&mut kept, dns.script.stats().dns_cached) == kept {
                match kind {
                    TYPE_A => dns.answers(0, &[(0, name, kind, 60, vec![192, 0, 2, 1])]),
                    _ => dns.answers(0, &[(0, name, kind, 60, service("cdn.example"))]),
                }
            }
            dns.heard(1_000);
        }
        assert!(goes(&mut dns, 5_000), "{order:?}");
        // Without the service's name it is only the target's, which nobody has allowed.
        dns.script.advance(PIN_GRACE + Duration::from_secs(61));
        dns.ask(1_000, &query(1, "cdn.example", TYPE_A, true));
        dns.answers(0, &[(0, "cdn.example", TYPE_A, 60, vec![192, 0, 2, 1])]);
        dns.heard(1_000);
        assert!(!goes(&mut dns, 5_001), "{order:?}");
    }
}

#[test]
fn flows_outlive_the_name_that_they_were_allowed_by() {
    if !in_empty_namespace("script::names::flows_outlive_the_name_that_they_were_allowed_by") {
        return;
    }
    let mut dns = Dns::with(|spec| spec.policy.allow_names = vec!["a.example".parse().expect("name")]);
    dns.ask(1_000, &query(1, "a.example", TYPE_A, true));
    dns.answers(0, &[(0, "a.example", TYPE_A, 60, vec![192, 0, 2, 1])]);
    dns.heard(1_000);
    let script = &mut dns.script;
    let listener = listener_there();
    let (mut peer, mut stream) = opened(script, 40_000, &listener);
    peer.send(script, TcpControl::Psh, b"no TLS");
    received(&mut stream, b"no TLS");
    let server = UdpSocket::bind((PEER, 0)).expect("socket");
    server.set_nonblocking(true).expect("non-blocking");
    let port = server.local_addr().expect("address").port();
    told(script);
    // As often as it takes to keep them, until long after the name is forgotten.
    for round in 0..40u8 {
        script.send_ip(&udp((GUEST_V4, 5_000), (PEER, port), &[round]));
        script.send_ip(&echo_request(round));
        assert_eq!(told(script), (0, 0, vec![0]), "{round}");
        assert!(server.recv(&mut [0; 8]).is_ok(), "{round}");
        script.advance_millis(15_000);
    }
    assert!(script.engine.names_of(script.now, ip(PEER)).is_empty());
    assert!(PIN_GRACE + Duration::from_secs(60) < Duration::from_secs(600));
    // What is new is refused.
    script.send_ip(&udp((GUEST_V4, 5_001), (PEER, port), b"new"));
    assert_eq!(told(script), (0, 0, vec![3]));
    // Other rules that allow it as well.
    let mut policy = script.engine.policy();
    policy.allow_names = vec!["*.example".parse().expect("name")];
    for _ in 0..2 {
        script.engine.set_policy(policy.clone());
    }
    script.send_ip(&udp((GUEST_V4, 5_000), (PEER, port), b"old"));
    script.send_ip(&echo_request(100));
    peer.send(script, TcpControl::Psh, b"more");
    received(&mut stream, b"more");
    assert_eq!(told(script), (0, 0, vec![0]));
    assert_eq!(server.recv(&mut [0; 8]).expect("a datagram"), 3);
    // And others that do not.
    policy.allow_names = vec!["b.example".parse().expect("name")];
    script.engine.set_policy(policy);
    assert_eq!(told(script).0, 1);
    script.send_ip(&udp((GUEST_V4, 5_000), (PEER, port), b"old"));
    script.send_ip(&echo_request(101));
    assert_eq!(told(script), (0, 0, vec![3, 3]));
    assert!(server.recv(&mut [0; 8]).is_err());
}

#[test]
fn flows_go_on_after_a_suspension() {
    if !in_empty_namespace("script::names::flows_go_on_after_a_suspension") {
        return;
    }
    let mut dns = Dns::with(|spec| spec.policy.allow_names = vec!["a.example".parse().expect("name")]);
    dns.ask(1_000, &query(1, "a.example", TYPE_A, true));
    dns.answers(0, &[(0, "a.example", TYPE_A, 3_600, vec![192, 0, 2, 1])]);
    dns.heard(1_000);
    let script = &mut dns.script;
    let listener = listener_there();
    let (mut peer, mut stream) = opened(script, 40_000, &listener);
    peer.send(script, TcpControl::Psh, b"before");
    received(&mut stream, b"before");
    let server = UdpSocket::bind((PEER, 0)).expect("socket");
    server.set_read_timeout(Some(std::time::Duration::from_secs(10))).expect("time-out");
    let port = server.local_addr().expect("address").port();
    let mut from = Vec::new();
    for _ in 0..2 {
        script.send_ip(&udp((GUEST_V4, 5_000), (PEER, port), b"x"));
        script.settle();
        from.push(server.recv_from(&mut [0; 8]).expect("a datagram").1);
        // A night, of which the clock of flows shows some seconds.
        script.engine.pretend_suspension(Duration::from_secs(10 * 3_600));
        script.advance_millis(3_000);
    }
    assert_eq!(from[0], from[1], "still the same socket");
    peer.send(script, TcpControl::Psh, b"after");
    received(&mut stream, b"after");
    told(script);
    // The name is that old, and has to be asked for again.
    script.send_ip(&udp((GUEST_V4, 5_001), (PEER, port), b"new"));
    assert_eq!(told(script), (0, 0, vec![3]));
    dns.ask(1_000, &query(1, "a.example", TYPE_A, true));
    dns.answers(0, &[(0, "a.example", TYPE_A, 3_600, vec![192, 0, 2, 1])]);
    dns.heard(1_000);
    dns.script.send_ip(&udp((GUEST_V4, 5_001), (PEER, port), b"new"));
    assert_eq!(told(&mut dns.script), (0, 0, vec![]));
}

#[test]
fn rules_by_name_that_come_and_go_find_the_connections_that_have_not_begun() {
    if !in_empty_namespace(
        "script::names::rules_by_name_that_come_and_go_find_the_connections_that_have_not_begun",
    ) {
        return;
    }
    let bad = hello("curl-openssl");
    let good = hello("git-gnutls");
    let mut script = Script::new(&spec(), true);
    let listener = listener_there();
    let (mut late, mut late_stream) = opened(&mut script, 40_001, &listener);
    let (mut early, mut early_stream) = opened(&mut script, 40_002, &listener);
    early.send(&mut script, TcpControl::Psh, b"early");
    received(&mut early_stream, b"early");
    let open = script.engine.policy();
    let denying = |name: &str| {
        let mut policy = open.clone();
        policy.deny_names = vec![name.parse().expect("name")];
        policy
    };
    script.engine.set_policy(denying("www.example.com"));
    // What was not looked at from its beginning is nothing that can be understood.
    early.send(&mut script, TcpControl::Psh, &bad);
    received(&mut early_stream, &bad);
    assert_eq!(told(&mut script).0, 0);
    late.send(&mut script, TcpControl::Psh, &bad);
    assert_eq!(told(&mut script).0, 1);
    assert!(!matches!(late_stream.read(&mut [0; 8]), Ok(1..)), "nothing of it went through");
    // Half of one waits, and does not have to when nobody wants to see it any more.
    let (mut half, mut half_stream) = opened(&mut script, 40_003, &listener);
    half.send(&mut script, TcpControl::Psh, &bad[..100]);
    half_stream.set_nonblocking(true).expect("non-blocking");
    assert!(half_stream.read(&mut [0; 8]).is_err());
    half_stream.set_nonblocking(false).expect("blocking");
    script.engine.set_policy(open.clone());
    script.settle();
    received(&mut half_stream, &bad[..100]);
    // One that was looked at is known by its name from then on.
    script.engine.set_policy(denying("www.example.com"));
    let (mut named, mut named_stream) = opened(&mut script, 40_004, &listener);
    named.send(&mut script, TcpControl::Psh, &good);
    received(&mut named_stream, &good);
    told(&mut script);
    script.engine.set_policy(denying("other.example"));
    assert_eq!(told(&mut script).0, 0);
    script.engine.set_policy(denying("git.example.org"));
    assert_eq!(told(&mut script).0, 1);
    assert_eq!(script.stats().refused_by_policy, 2);
}
