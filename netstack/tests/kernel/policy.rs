//! The host is not reached, and rules hold.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, UdpSocket};
use std::process::Command;

use netstack::{DnsSpec, HostLoopback, PolicySpec, StackSpec};
use nix::errno::Errno;

use crate::common::*;
use crate::tools::*;

crate::tests! {
    host_is_unreachable_by_default,
    host_loopback_can_be_allowed,
    host_loopback_can_be_allowed_by_port,
    rules_hold_and_say_so,
    rules_are_replaced_under_flows_that_exist,
    names_are_looked_at_where_rules_want_them,
}

/// Servers on every address of the host that a guest might try; they say who they are.
fn canaries() -> Vec<(SocketAddr, TcpListener, UdpSocket)> {
    ["127.0.0.1", "::1", HOST_V4, HOST_V6, "198.51.100.1", "2001:db8:1::1"]
        .into_iter()
        .map(|ip| {
            let tcp = TcpListener::bind((ip, 0)).unwrap();
            let addr = tcp.local_addr().unwrap();
            let udp = UdpSocket::bind(addr).unwrap();
            tcp.set_nonblocking(true).unwrap();
            udp.set_nonblocking(true).unwrap();
            (addr, tcp, udp)
        })
        .collect()
}

/// The names by which a guest could try to reach `canary`.
fn names_for(canary: SocketAddr) -> Vec<SocketAddr> {
    let port = canary.port();
    match canary.ip() {
        IpAddr::V4(ip) if ip.is_loopback() => {
            vec![at(GATEWAY_V4, port), at("::ffff:127.0.0.1", port), at("64:ff9b::7f00:1", port)]
        }
        IpAddr::V6(ip) if ip.is_loopback() => vec![at(GATEWAY_V6, port)],
        _ => vec![canary],
    }
}

fn host_is_unreachable_by_default(_: &World) {
    let guest = Guest::new();
    for (addr, tcp, udp) in canaries() {
        for name in names_for(addr) {
            let result = guest.net.run(move || {
                let result = connect(name).map(drop);
                if let Ok(socket) = UdpSocket::bind((any(&name.ip().to_string()), 0)) {
                    let _ = socket.send_to(b"x", name);
                }
                result
            });
            assert!(result.is_err(), "{name}");
            // Frames are handled in order, so this answer means that the datagram has been looked at.
            guest.net.run(|| sh(&format!("ping -c 1 -W 5 {GATEWAY_V4}")));
            assert_eq!(tcp.accept().unwrap_err().kind(), ErrorKind::WouldBlock, "{name}");
            assert_eq!(udp.recv_from(&mut [0; 4]).unwrap_err().kind(), ErrorKind::WouldBlock, "{name}");
        }
    }
    assert!(guest.stack.stats().refused_by_policy > 0);
}

fn with_loopback(host_loopback: HostLoopback) -> StackSpec {
    StackSpec { policy: PolicySpec { host_loopback, ..PolicySpec::default() }, ..spec() }
}

fn host_loopback_can_be_allowed(_: &World) {
    let guest = Guest::with(&with_loopback(HostLoopback::All), &[]);
    for (addr, tcp, udp) in canaries() {
        tcp.set_nonblocking(false).unwrap();
        udp.set_nonblocking(false).unwrap();
        udp.set_read_timeout(Some(PATIENCE)).unwrap();
        let name = names_for(addr)[0];
        let client = guest.net.spawn(move || {
            let mut stream = connect(name).unwrap();
            let mut hello = [0; 5];
            stream.read_exact(&mut hello).unwrap();
            assert_eq!(&hello, b"hello");
            let socket = UdpSocket::bind((any(&name.ip().to_string()), 0)).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.send_to(b"x", name).unwrap();
            assert_eq!(
                socket.recv_from(&mut hello).unwrap(),
                (1, name),
                "the answer comes from the name asked"
            );
        });
        tcp.accept().unwrap().0.write_all(b"hello").unwrap();
        let (_, from) = udp.recv_from(&mut [0; 4]).unwrap();
        udp.send_to(b"y", from).unwrap();
        client.join().unwrap();
    }
    // Loopback by its own names, and the rest, stay refused.
    guest.net.run(|| assert!(connect(at("169.254.169.254", 80)).is_err()));
}

fn host_loopback_can_be_allowed_by_port(_: &World) {
    let canaries = canaries();
    let [(open, ..), (open_v6, ..), ..] = canaries.as_slice() else { unreachable!("six canaries") };
    let ports = HostLoopback::Ports([open.port(), open_v6.port()].into());
    let guest = Guest::with(&with_loopback(ports), &[]);
    for (addr, tcp, udp) in &canaries {
        let name = names_for(*addr)[0];
        let connected = guest.net.run(move || {
            if let Ok(socket) = UdpSocket::bind((any(&name.ip().to_string()), 0)) {
                let _ = socket.send_to(b"x", name);
            }
            connect(name)
        });
        if addr == open || addr == open_v6 {
            connected.unwrap();
            tcp.set_nonblocking(false).unwrap();
            tcp.accept().unwrap();
            udp.set_nonblocking(false).unwrap();
            udp.set_read_timeout(Some(PATIENCE)).unwrap();
            udp.recv_from(&mut [0; 4]).unwrap();
        } else {
            let expected =
                if name.is_ipv6() { ErrorKind::PermissionDenied } else { ErrorKind::HostUnreachable };
            assert_eq!(connected.unwrap_err().kind(), expected, "{name}");
            // The datagram came before the SYN, so it has been looked at.
            assert_eq!(udp.recv_from(&mut [0; 4]).unwrap_err().kind(), ErrorKind::WouldBlock, "{name}");
        }
    }
}

/// What the guest's kernel tells a program that sends a datagram from a connected socket.
fn datagram_error(net: &Net, to: SocketAddr) -> Option<i32> {
    net.run(move || {
        let socket = UdpSocket::bind((any(&to.ip().to_string()), 0)).unwrap();
        socket.connect(to).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let _ = socket.send(b"x");
        socket.recv(&mut [0; 4]).err().and_then(|error| error.raw_os_error())
    })
}

fn rules_hold_and_say_so(world: &World) {
    let ports =
        INTERNET.map(|ip| serve(&world.internet, ip, |mut stream| stream.write_all(b"hello").unwrap()));
    let [v4, v6] = [at(INTERNET_V4, ports[0]), at(INTERNET_V6, ports[1])];
    let parse = |texts: &[String]| texts.iter().map(|text| text.parse().unwrap()).collect();
    let policy = |allow: &[String], deny: &[String]| StackSpec {
        policy: PolicySpec { allow: parse(allow), deny: parse(deny), ..PolicySpec::default() },
        ..spec()
    };
    let hello = |guest: &Guest, to: SocketAddr| {
        guest.net.run(move || {
            let mut text = String::new();
            connect(to)?.read_to_string(&mut text).map(|_| text)
        })
    };
    // Only this port of this address.
    let guest = Guest::with(&policy(&[format!("tcp:{v4}")], &[]), &[]);
    assert_eq!(hello(&guest, v4).unwrap(), "hello");
    assert_eq!(hello(&guest, at(INTERNET_V4, 1)).unwrap_err().kind(), ErrorKind::HostUnreachable);
    assert_eq!(hello(&guest, v6).unwrap_err().kind(), ErrorKind::PermissionDenied);
    assert_eq!(datagram_error(&guest.net, v4), Some(Errno::EHOSTUNREACH as i32));
    assert_eq!(datagram_error(&guest.net, v6), Some(Errno::EACCES as i32));
    let ping = |ip: &'static str| {
        guest.net.run(move || {
            let output = Command::new("ping").args(["-c", "1", "-W", "10", ip]).output().unwrap();
            String::from_utf8_lossy(&output.stdout).into_owned()
        })
    };
    assert!(ping(INTERNET_V4).contains("Packet filtered"));
    assert!(ping(INTERNET_V6).contains("Administratively prohibited"));
    assert!(ping(GATEWAY_V4).contains("1 received"), "the gateway is part of the stack");
    assert_eq!(guest.stack.stats().refused_by_policy, 6);
    // Everything but this network.
    let guest = Guest::with(&policy(&[], &["[2001:db8:1::/48]".to_owned()]), &[]);
    assert_eq!(hello(&guest, v4).unwrap(), "hello");
    assert_eq!(hello(&guest, v6).unwrap_err().kind(), ErrorKind::PermissionDenied);
}

fn rules_are_replaced_under_flows_that_exist(world: &World) {
    let guest = Guest::new();
    let (addr, accepted) = accept_one(&world.internet, INTERNET_V4);
    let mut client = guest.net.run(move || connect(addr).unwrap());
    let mut server = accepted.join().unwrap();
    let echo = world.internet.run(|| UdpSocket::bind((INTERNET_V4, 0)).unwrap());
    echo.set_read_timeout(Some(PATIENCE)).unwrap();
    let to = echo.local_addr().unwrap();
    let datagrams = guest.net.run(move || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect(to).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    });
    datagrams.send(b"x").unwrap();
    let (_, from) = echo.recv_from(&mut [0; 4]).unwrap();

    // What is still allowed does not notice.
    let control = guest.stack.control().clone();
    let open = PolicySpec { deny: vec!["192.0.2.0/24".parse().unwrap()], ..PolicySpec::default() };
    control.set_policy(open.clone()).unwrap();
    assert_eq!(control.policy().unwrap(), open);
    client.write_all(b"hello").unwrap();
    server.read_exact(&mut [0; 5]).unwrap();
    datagrams.send(b"y").unwrap();
    echo.recv_from(&mut [0; 4]).unwrap();

    control
        .set_policy(PolicySpec { deny: vec!["198.51.100.0/24".parse().unwrap()], ..PolicySpec::default() })
        .unwrap();
    assert_eq!(client.read(&mut [0; 5]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(server.read(&mut [0; 5]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    // Neither way: what the peer sends, before the guest sends again, does not come.
    let before = guest.stack.stats();
    echo.send_to(b"z", from).unwrap();
    wait_until("the datagram is dropped", || {
        guest.stack.stats().dropped_datagrams > before.dropped_datagrams
    });
    datagrams.send(b"z").unwrap();
    assert_eq!(datagrams.recv(&mut [0; 4]).unwrap_err().raw_os_error(), Some(Errno::EHOSTUNREACH as i32));
    let again = guest.net.run(move || connect(addr).unwrap_err().kind());
    assert_eq!(again, ErrorKind::HostUnreachable);
    assert_eq!(guest.stack.stats().tcp_flows, 0);
}

/// The ClientHello of a program, out of the parser's own test data.
fn client_hello(program: &str) -> Vec<u8> {
    let lines = include_str!("../../src/policy/hellos.txt").lines();
    let hex = lines.filter_map(|line| line.split_once(' ')).find(|(name, _)| *name == program).unwrap().1;
    hex.as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

fn names_are_looked_at_where_rules_want_them(world: &World) {
    // Says hello, and then how many bytes came before the end or the reset.
    let (counts, counted) = std::sync::mpsc::channel();
    let port = serve(&world.internet, INTERNET_V4, move |mut stream| {
        let _ = stream.write_all(b"banner");
        let mut count = 0;
        while let Ok(n) = stream.read(&mut [0; 4096])
            && n > 0
        {
            count += n;
        }
        let _ = counts.send(count);
    });
    let exchange = |guest: &Guest, ip: &'static str, parts: Vec<Vec<u8>>| {
        guest.net.run(move || {
            let mut stream = connect(at(ip, port)).map_err(|error| error.kind())?;
            stream.set_nodelay(true).unwrap();
            let mut banner = [0; 6];
            stream.read_exact(&mut banner).map_err(|error| error.kind())?;
            for part in parts {
                stream.write_all(&part).map_err(|error| error.kind())?;
                // Frames are handled in order: so each part is looked at by itself.
                sh(&format!("ping -c 1 -W 10 {GATEWAY_V4}"));
            }
            stream.shutdown(Shutdown::Write).map_err(|error| error.kind())?;
            stream.read_to_end(&mut Vec::new()).map_err(|error| error.kind())
        })
    };
    let bad = client_hello("curl-openssl");
    let good = client_hello("git-gnutls");
    let halves = |bytes: &[u8]| vec![bytes[..100].to_vec(), bytes[100..].to_vec()];

    let deny_names = vec!["www.example.com".parse().unwrap()];
    let policy = PolicySpec { deny_names, ..PolicySpec::default() };
    let guest = Guest::with(&StackSpec { policy, ..spec() }, &[]);
    for (parts, arrives) in [
        (halves(&good), Some(good.len())),
        (halves(&bad), None),
        (vec![b"SSH-2.0-client".to_vec()], Some(14)),
        (vec![bad[..100].to_vec()], None),
        (vec![], Some(0)),
    ] {
        let result = exchange(&guest, INTERNET_V4, parts);
        match arrives {
            Some(_) => assert_eq!(result, Ok(0)),
            // By which call the reset is noticed is a matter of time.
            None => assert!(result.is_err(), "{result:?}"),
        }
        assert_eq!(counted.recv_timeout(PATIENCE).unwrap(), arrives.unwrap_or(0), "{arrives:?}");
    }
    assert_eq!(guest.stack.stats().refused_by_policy, 2);

    // Only what the name server gave for a name, and what then asks for it.
    let policy = PolicySpec { allow_names: vec!["*.example.org".parse().unwrap()], ..PolicySpec::default() };
    let hosts = vec![("git.example.org".to_owned(), INTERNET_V4.parse().unwrap())];
    let dns = DnsSpec { hosts, ..DnsSpec::default() };
    let guest = Guest::with(&StackSpec { policy, dns, ..spec() }, &[]);
    assert_eq!(exchange(&guest, INTERNET_V4, halves(&good)), Ok(0));
    assert_eq!(counted.recv_timeout(PATIENCE).unwrap(), good.len());
    assert!(exchange(&guest, INTERNET_V4, halves(&bad)).is_err());
    assert_eq!(counted.recv_timeout(PATIENCE).unwrap(), 0);
    assert_eq!(exchange(&guest, INTERNET_V6, vec![]), Err(ErrorKind::PermissionDenied));
}
