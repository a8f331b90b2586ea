//! The resolver at the gateway.

use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use netstack::{DnsSpec, StackSpec};

use crate::common::*;
use crate::tools::*;

crate::tests! {
    by_dnsmasq_over_udp_and_tcp,
    answers_are_kept_while_the_resolver_is_gone,
    follows_the_hosts_resolv_conf,
    names_of_the_spec_are_answered,
    goes_to_the_next_resolver_and_fails_clearly,
    only_the_right_answer_counts,
}

fn dns_spec(upstreams: &[SocketAddr]) -> StackSpec {
    StackSpec { dns: DnsSpec { upstreams: upstreams.to_vec(), ..DnsSpec::default() }, ..spec() }
}

fn by_dnsmasq_over_udp_and_tcp(_: &World) {
    let dir = TempDir::new();
    let config = dir.0.join("dnsmasq.conf");
    let mut text = String::from(
        "port=5353\nlisten-address=127.0.0.1,::1\nbind-interfaces\nno-resolv\nno-hosts\n\
         address=/web.example/192.0.2.80\naddress=/web.example/2001:db8::80\nlocal=/example/\n\
         edns-packet-max=4096\n",
    );
    // An answer that does not fit into 512 bytes, nor into one frame.
    for i in 0..100 {
        text.push_str(&format!("host-record=many.example,192.0.2.{}\n", i + 1));
    }
    std::fs::write(&config, text).unwrap();
    // On the host's loopback, as systemd-resolved is.
    let server = Process(
        Command::new("dnsmasq")
            .args(["--no-daemon", "--pid-file=", "-C"])
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    wait_until("dnsmasq listens", || TcpStream::connect("127.0.0.1:5353").is_ok());
    let guest = Guest::with(&dns_spec(&[at("127.0.0.1", 5353), at("::1", 5353)]), &[]);
    guest.net.run(|| {
        let dig = |line: &str| sh(&format!("dig +tries=1 +time=5 +noall +answer +comments {line}"));
        for gateway in [GATEWAY_V4, GATEWAY_V6] {
            for transport in ["+notcp", "+tcp", "+noedns", "+tcp +noedns"] {
                let answer = dig(&format!("@{gateway} {transport} web.example A"));
                assert!(answer.contains("192.0.2.80"), "{answer}");
                let answer = dig(&format!("@{gateway} {transport} web.example AAAA"));
                assert!(answer.contains("2001:db8::80"), "{answer}");
            }
            let answer = dig(&format!("@{gateway} nothing.example A"));
            assert!(answer.contains("NXDOMAIN"), "{answer}");
            // More than a datagram without EDNS holds: truncated, then asked again over TCP by dig itself.
            for edns in ["+noedns", "+bufsize=4096", "+tcp"] {
                let answer = dig(&format!("@{gateway} {edns} many.example A"));
                assert_eq!(answer.matches("192.0.2.").count(), 100, "{answer}");
            }
            let answer = dig(&format!("@{gateway} +noedns +ignore many.example A"));
            assert!(answer.contains("tc"), "{answer}");
        }
        // Several queries on one connection.
        let answer = sh(&format!(
            "dig +tcp +keepopen +short @{GATEWAY_V4} web.example A web.example AAAA web.example A"
        ));
        assert_eq!(answer.lines().count(), 3, "{answer}");
    });
    drop(server);
}

fn answers_are_kept_while_the_resolver_is_gone(world: &World) {
    let resolver = || world.internet.run(|| dnsmasq(INTERNET_V4, 5354, "192.0.2.80"));
    let server = resolver();
    let guest = Guest::with(&dns_spec(&[at(INTERNET_V4, 5354)]), &[]);
    let dig = |line: &str| {
        let line = format!("dig +tries=1 +time=10 @{GATEWAY_V4} {line}");
        guest.net.run(move || sh(&line))
    };
    assert_eq!(dig("+short web.example"), "192.0.2.80\n");
    drop(server);
    for transport in ["+notcp", "+tcp", "+noedns"] {
        let answer = dig(&format!("{transport} WEB.example"));
        assert!(answer.contains("192.0.2.80") && answer.contains("WEB.example"), "{answer}");
        let ttl = answer.lines().find(|line| line.ends_with("192.0.2.80")).unwrap();
        let ttl: u32 = ttl.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert!((200..=300).contains(&ttl), "{answer}");
    }
    assert_eq!(guest.stack.stats().dns_cached, 3);
    let answer = dig("other.example");
    assert!(answer.contains("SERVFAIL") && answer.contains("no resolver of the host answers"), "{answer}");
    let _server = resolver();
    assert_eq!(dig("+short other.example"), "192.0.2.99\n");
}

fn follows_the_hosts_resolv_conf(world: &World) {
    let dir = TempDir::new();
    let file = dir.0.join("resolv.conf");
    let path = file.display().to_string();
    std::fs::write(&file, format!("nameserver {INTERNET_V4}\n")).unwrap();
    // In this program's own mount namespace.
    sh(&format!("mount --bind {path} /etc/resolv.conf"));
    let _distant = world.internet.run(|| dnsmasq(INTERNET_V4, 53, "192.0.2.2"));
    let _resolved = dnsmasq("127.0.0.53", 53, "192.0.2.53");
    let _other = dnsmasq("127.0.0.9", 53, "192.0.2.9");
    let guest = Guest::new();
    let dig = || guest.net.run(|| sh(&format!("dig +tries=1 +time=10 +short @{GATEWAY_V4} web.example")));
    assert_eq!(dig(), "192.0.2.2\n");
    // What the old one said is forgotten, though it was to be kept for five minutes.
    std::fs::write(&file, "nameserver 127.0.0.9\noptions timeout:2 attempts:1\n").unwrap();
    wait_until("the new resolver is asked", || dig() == "192.0.2.9\n");
    // Nothing named: whoever listens on the local machine.
    std::fs::write(&file, "search example\n").unwrap();
    wait_until("the local machine is asked", || dig() == "192.0.2.53\n");
    sh("umount /etc/resolv.conf");
}

fn names_of_the_spec_are_answered(_: &World) {
    let mut spec = dns_spec(&[]);
    spec.dns.hosts = vec![
        ("Box.Internal".into(), "10.0.2.2".parse().unwrap()),
        ("box.internal.".into(), "fd00::2".parse().unwrap()),
        ("four.only".into(), "192.0.2.4".parse().unwrap()),
    ];
    let guest = Guest::with(&spec, &[]);
    guest.net.run(|| {
        for transport in ["+notcp", "+tcp"] {
            let dig = |line: &str| sh(&format!("dig +tries=1 +time=5 {transport} @{GATEWAY_V4} {line}"));
            assert_eq!(dig("+short BOX.internal A"), "10.0.2.2\n");
            assert_eq!(dig("+short box.internal AAAA"), "fd00::2\n");
            let nodata = dig("four.only AAAA");
            assert!(nodata.contains("NOERROR") && nodata.contains("ANSWER: 0"), "{nodata}");
        }
    });
}

/// A resolver that answers every query by `answer`, given the query.
fn resolver(answer: impl Fn(&UdpSocket, SocketAddr, &[u8]) + Send + 'static) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let addr = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            answer(&socket, from, &buffer[..len]);
        }
    });
    addr
}

/// A response to `query` with one address, 192.0.2.`last`.
fn response(query: &[u8], last: u8) -> Vec<u8> {
    let mut message = query.to_vec();
    message[2] |= 0x80;
    message[7] = 1;
    message[11] = 0;
    // Whatever follows the question goes.
    let end = 12 + message[12..].iter().position(|&byte| byte == 0).unwrap() + 5;
    message.truncate(end);
    message.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, last]);
    message
}

fn goes_to_the_next_resolver_and_fails_clearly(_: &World) {
    let good = resolver(|socket, from, query| drop(socket.send_to(&response(query, 7), from)));
    let silent = resolver(|_, _, _| {});
    let failing = resolver(|socket, from, query| {
        let mut message = response(query, 9);
        message[3] = 0x82;
        let _ = socket.send_to(&message, from);
    });
    let closed = at("127.0.0.1", 9);
    let ask = |upstreams: &[SocketAddr]| {
        let guest = Guest::with(&dns_spec(upstreams), &[]);
        guest.net.run(|| sh(&format!("dig +tries=1 +time=10 @{GATEWAY_V4} some.name A")))
    };
    for upstreams in
        [vec![closed, good], vec![silent, good], vec![failing, good], vec![failing, closed, good]]
    {
        let answer = ask(&upstreams);
        assert!(answer.contains("192.0.2.7"), "{upstreams:?}: {answer}");
    }
    for upstreams in [vec![closed], vec![silent], vec![failing], vec![silent, closed, failing]] {
        let answer = ask(&upstreams);
        assert!(answer.contains("SERVFAIL"), "{upstreams:?}: {answer}");
    }
    // The one that answered is asked first the next time.
    let guest = Guest::with(&dns_spec(&[silent, good]), &[]);
    guest.net.run(|| {
        sh(&format!("dig +tries=1 +time=10 @{GATEWAY_V4} one.name A"));
        let begin = Instant::now();
        sh(&format!("dig +tries=1 +time=10 @{GATEWAY_V4} two.name A"));
        assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    });
}

fn only_the_right_answer_counts(_: &World) {
    let liar = resolver(|socket, from, query| {
        let mut wrong_id = response(query, 66);
        wrong_id[0] ^= 0x55;
        let mut wrong_question = response(query, 66);
        wrong_question[13] = b'X';
        let mut no_response = response(query, 66);
        no_response[2] &= 0x7f;
        for message in [&wrong_id, &wrong_question, &no_response, &b"junk".to_vec(), &response(query, 8)] {
            let _ = socket.send_to(message, from);
        }
        // From somewhere else.
        let other = UdpSocket::bind("127.0.0.1:0").unwrap();
        let _ = other.send_to(&response(query, 66), from);
    });
    let guest = Guest::with(&dns_spec(&[liar]), &[]);
    let answer = guest.net.run(|| sh(&format!("dig +tries=1 +time=5 +short @{GATEWAY_V4} some.name A")));
    assert_eq!(answer, "192.0.2.8\n");
}
