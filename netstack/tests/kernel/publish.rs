//! Published ports.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use netstack::{Protocol, Publish};

use crate::common::*;
use crate::tools::*;

crate::tests! {
    published_tcp_ports_lead_inside,
    published_tcp_port_without_a_server_is_refused,
    published_udp_ports_lead_inside,
    published_ports_find_a_server_of_either_family,
    ports_come_and_go_while_the_stack_runs,
    a_thousand_ports_are_cheap,
}

fn published_tcp_ports_lead_inside(world: &World) {
    let guest = Guest::with(&spec(), &[publish(None, 8080, Protocol::Tcp)]);
    let port = guest.published[0].port();
    for (from, to, seen) in [
        (&world.internet, "198.51.100.1", INTERNET_V4),
        (&world.internet, "2001:db8:1::1", INTERNET_V6),
        (&world.host, "127.0.0.1", GATEWAY_V4),
        (&world.host, "::1", GATEWAY_V4),
        (&world.host, HOST_V4, HOST_V4),
    ] {
        let listener = guest.net.run(move || TcpListener::bind((any(to), 8080)).unwrap());
        let server = std::thread::spawn(move || {
            let (stream, peer) = listener.accept().unwrap();
            let mut stream = patient(stream);
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            stream.write_all(&all).unwrap();
            peer
        });
        from.run(move || {
            let mut stream = connect(at(to, port)).unwrap();
            let data = pattern(8, 3_000_000);
            stream.write_all(&data).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut back = Vec::new();
            stream.read_to_end(&mut back).unwrap();
            assert!(back == data, "{to}: {} bytes", back.len());
        });
        assert_eq!(server.join().unwrap().ip().to_canonical(), seen.parse::<IpAddr>().unwrap(), "{to}");
    }
    wait_until("flows gone", || guest.stack.stats().tcp_flows == 0);
}

fn published_tcp_port_without_a_server_is_refused(_: &World) {
    let guest = Guest::with(&spec(), &[publish(Some("127.0.0.1"), 8080, Protocol::Tcp)]);
    // The host's kernel accepts; the reset comes in a moment.
    let answer = connect(guest.published[0]).and_then(|mut stream| stream.read(&mut [0; 10]));
    assert_eq!(answer.unwrap_err().kind(), ErrorKind::ConnectionReset);
    // Many connections at once to one that is slow to accept.
    let listener = guest.net.run(|| TcpListener::bind("0.0.0.0:8080").unwrap());
    let addr = guest.published[0];
    let clients: Vec<TcpStream> = (0..100).map(|_| connect(addr).unwrap()).collect();
    let servers: Vec<TcpStream> = (0..100).map(|_| listener.accept().unwrap().0).collect();
    assert_eq!(guest.stack.stats().tcp_flows, 100);
    drop((clients, servers));
}

fn published_udp_ports_lead_inside(world: &World) {
    let guest = Guest::with(&spec(), &[publish(None, 9090, Protocol::Udp)]);
    let port = guest.published[0].port();
    for (from, to, seen) in [
        (&world.internet, "198.51.100.1", INTERNET_V4),
        (&world.internet, "2001:db8:1::1", INTERNET_V6),
        (&world.host, "127.0.0.1", GATEWAY_V4),
        (&world.host, "::1", GATEWAY_V4),
    ] {
        let server = guest.net.run(move || UdpSocket::bind((any(to), 9090)).unwrap());
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        let clients = from.run(move || [(); 2].map(|()| UdpSocket::bind((any(to), 0)).unwrap()));
        let mut buffer = vec![0; 65_536];
        for (client, len) in clients.iter().zip([10, 5_000]).chain(clients.iter().zip([20_000, 0])) {
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            let data = pattern(9, len);
            client.send_to(&data, at(to, port)).unwrap();
            let (got, peer) = server
                .recv_from(&mut buffer)
                .unwrap_or_else(|error| panic!("{to} {len}: {error}; {:?}", guest.stack.stats()));
            assert_eq!((got, peer.ip().to_canonical()), (len, seen.parse::<IpAddr>().unwrap()));
            server.send_to(&buffer[..got], peer).unwrap();
            // The answer comes from where the question went to.
            let (got, from) = client.recv_from(&mut buffer).unwrap();
            assert_eq!((got, from), (len, at(to, port)));
            assert!(buffer[..got] == data);
        }
    }
}

/// A socket on every address of the family of `ip`, and of no other.
fn bound_alone(
    net: &Net,
    ip: &'static str,
    port: u16,
    kind: nix::sys::socket::SockType,
) -> std::os::fd::OwnedFd {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, sockopt};
    use std::os::fd::AsRawFd;
    net.run(move || {
        let family = if ip.contains(':') { AddressFamily::Inet6 } else { AddressFamily::Inet };
        let fd = nix::sys::socket::socket(family, kind, SockFlag::SOCK_CLOEXEC, None).unwrap();
        if ip.contains(':') {
            nix::sys::socket::setsockopt(&fd, sockopt::Ipv6V6Only, &true).unwrap();
        }
        nix::sys::socket::setsockopt(&fd, sockopt::ReuseAddr, &true).unwrap();
        // Holds for accept, too.
        let patience = nix::sys::time::TimeVal::new(20, 0);
        nix::sys::socket::setsockopt(&fd, sockopt::ReceiveTimeout, &patience).unwrap();
        nix::sys::socket::bind(fd.as_raw_fd(), &SockaddrStorage::from(at(any(ip), port))).unwrap();
        if kind == SockType::Stream {
            nix::sys::socket::listen(&fd, Backlog::MAXCONN).unwrap();
        }
        fd
    })
}

fn published_ports_find_a_server_of_either_family(world: &World) {
    use nix::sys::socket::SockType;
    let ports = [publish(None, 8080, Protocol::Tcp), publish(None, 9090, Protocol::Udp)];
    for server_ip in [GATEWAY_V4, GATEWAY_V6] {
        let guest = Guest::with(&spec(), &ports);
        let (tcp_port, udp_port) = (guest.published[0].port(), guest.published[2].port());
        let tcp = TcpListener::from(bound_alone(&guest.net, server_ip, 8080, SockType::Stream));
        let udp = UdpSocket::from(bound_alone(&guest.net, server_ip, 9090, SockType::Datagram));
        udp.set_read_timeout(Some(PATIENCE)).unwrap();
        for (from, to, own) in [
            (&world.host, "127.0.0.1", None),
            (&world.host, "::1", None),
            (&world.internet, "198.51.100.1", Some(INTERNET_V4)),
            (&world.internet, "2001:db8:1::1", Some(INTERNET_V6)),
        ] {
            // Its own address if the server speaks its family, else the gateway.
            let seen = own.filter(|own| own.contains(':') == server_ip.contains(':')).unwrap_or(server_ip);
            let seen: IpAddr = seen.parse().unwrap();
            let client = from.run(move || connect(at(to, tcp_port)).unwrap());
            let (server, peer) = tcp.accept().unwrap();
            assert_eq!(peer.ip(), seen, "{to}");
            let (mut client, mut server) = (client, patient(server));
            client.write_all(b"question").unwrap();
            server.read_exact(&mut [0; 8]).unwrap();
            server.write_all(b"answer").unwrap();
            client.read_exact(&mut [0; 6]).unwrap();

            let client = from.run(move || UdpSocket::bind((any(to), 0)).unwrap());
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut buffer = [0; 10];
            // Not even the first one is lost.
            for question in ["first", "second"] {
                client.send_to(question.as_bytes(), at(to, udp_port)).unwrap();
                let (len, peer) = udp.recv_from(&mut buffer).unwrap();
                assert_eq!((&buffer[..len], peer.ip()), (question.as_bytes(), seen), "{to}");
                udp.send_to(b"answer", peer).unwrap();
                assert_eq!(client.recv_from(&mut buffer).unwrap(), (6, at(to, udp_port)));
            }
        }
        // The server gives way to one of the other family.
        drop((tcp, udp));
        let other = if server_ip == GATEWAY_V4 { GATEWAY_V6 } else { GATEWAY_V4 };
        let tcp = TcpListener::from(bound_alone(&guest.net, other, 8080, SockType::Stream));
        let udp = UdpSocket::from(bound_alone(&guest.net, other, 9090, SockType::Datagram));
        udp.set_read_timeout(Some(PATIENCE)).unwrap();
        for to in ["127.0.0.1", "::1"] {
            let client = connect(at(to, tcp_port)).unwrap();
            tcp.accept().unwrap();
            drop(client);
            // A server that is gone was expected to be there: this one is lost, the next one is not.
            let client = UdpSocket::bind((any(to), 0)).unwrap();
            client.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            let mut buffer = [0; 10];
            wait_until("an answer", || {
                client.send_to(b"there?", at(to, udp_port)).unwrap();
                udp.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
                udp.recv_from(&mut buffer).is_ok_and(|(_, peer)| {
                    udp.send_to(b"yes", peer).unwrap();
                    client.recv_from(&mut buffer).is_ok()
                })
            });
        }
        // Nobody at all.
        drop((tcp, udp));
        let answer = connect(at("::1", tcp_port)).and_then(|mut stream| stream.read(&mut [0; 10]));
        assert_eq!(answer.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
}

fn ports_come_and_go_while_the_stack_runs(world: &World) {
    let guest = Guest::new();
    let control = guest.stack.control().clone();
    let servers = guest
        .net
        .run(|| (TcpListener::bind(("0.0.0.0", 80)).unwrap(), UdpSocket::bind(("0.0.0.0", 53)).unwrap()));
    servers.1.set_read_timeout(Some(PATIENCE)).unwrap();
    let add = {
        let control = control.clone();
        let host = world.host.clone();
        move |port: Publish| {
            let control = control.clone();
            host.run(move || control.publish(&port))
        }
    };
    let tcp = add(publish(None, 80, Protocol::Tcp)).unwrap();
    let udp = add(publish(Some("127.0.0.1"), 53, Protocol::Udp)).unwrap();
    assert_eq!((tcp.addresses.len(), udp.addresses.len()), (2, 1));
    assert_eq!(control.published().unwrap(), [tcp.clone(), udp.clone()]);

    let (tcp_to, udp_to) = (at("127.0.0.1", tcp.addresses[0].port()), udp.addresses[0]);
    let mut client = world.host.run(move || connect(tcp_to).unwrap());
    let mut server = patient(servers.0.accept().unwrap().0);
    let asking = world.host.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    asking.set_read_timeout(Some(PATIENCE)).unwrap();
    asking.send_to(b"x", udp_to).unwrap();
    let (_, peer) = servers.1.recv_from(&mut [0; 8]).unwrap();

    assert_eq!(control.unpublish(tcp.id).unwrap(), Some(tcp.clone()));
    assert_eq!(control.unpublish(tcp.id).unwrap(), None);
    assert_eq!(control.unpublish(udp.id).unwrap(), Some(udp));
    assert_eq!(control.published().unwrap(), []);
    for to in tcp.addresses {
        let refused = world.host.run(move || connect(to)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    }
    // What came through it goes on.
    client.write_all(b"still").unwrap();
    server.read_exact(&mut [0; 5]).unwrap();
    drop(client);
    assert_eq!(server.read(&mut [0; 8]).unwrap(), 0);

    // Its addresses can be bound at once, by us and for something else inside; names are not used again.
    let again = Publish { host_port: tcp_to.port(), ..publish(None, 81, Protocol::Tcp) };
    let other = add(again.clone()).unwrap();
    assert_ne!(other.id, tcp.id);
    match add(again) {
        Err(netstack::Error::Listen { source, .. }) => assert_eq!(source.kind(), ErrorKind::AddrInUse),
        other => panic!("{other:?}"),
    }
    let taken = add(Publish { host_port: udp_to.port(), ..publish(Some("127.0.0.1"), 53, Protocol::Udp) });
    assert_eq!(taken.unwrap().addresses, [udp_to]);
    // An answer to what came through the old socket is not sent from the new one.
    servers.1.send_to(b"old", peer).unwrap();
    // It has been read before what follows: a turn that obeys a command ends by reading frames.
    for _ in 0..2 {
        control.published().unwrap();
    }
    asking.send_to(b"new", udp_to).unwrap();
    let (_, peer) = servers.1.recv_from(&mut [0; 8]).unwrap();
    servers.1.send_to(b"answer", peer).unwrap();
    let mut buffer = [0; 8];
    assert_eq!(asking.recv_from(&mut buffer).unwrap(), (6, udp_to));

    // Where the server's address is given, only that is tried.
    let elsewhere =
        Publish { inside_ip: Some("10.0.2.101".parse().unwrap()), ..publish(None, 82, Protocol::Tcp) };
    let to = at("::1", add(elsewhere).unwrap().addresses[1].port());
    guest.net.run(|| sh("ip addr add 10.0.2.101/24 dev tap0"));
    let listener = guest.net.run(|| TcpListener::bind(("10.0.2.101", 82)).unwrap());
    let client = world.host.run(move || connect(to).unwrap());
    assert_eq!(listener.accept().unwrap().1.ip(), GATEWAY_V4.parse::<IpAddr>().unwrap());
    drop(client);

    guest.stack.stop();
    assert!(matches!(control.published(), Err(netstack::Error::Stopped)));
}

fn a_thousand_ports_are_cheap(world: &World) {
    const COUNT: usize = 1_000;
    let before = private_memory();
    let begin = Instant::now();
    let guest = Guest::with(&spec(), &vec![publish(None, 80, Protocol::Tcp); COUNT]);
    println!("  {COUNT} ports for both families and a stack: {} ms", begin.elapsed().as_millis());
    let control = guest.stack.control().clone();
    let begin = Instant::now();
    let list = control.published().unwrap();
    assert_eq!(list.len(), COUNT);
    println!("  list: {} us", begin.elapsed().as_micros());
    let each = (private_memory() - before.min(private_memory())) * 1024 / COUNT;
    println!("  {each} bytes for each");
    // Generous: the list that was just made is among it, and the stack itself.
    assert!(each < 4_096, "{each} bytes for each port");
    let server = guest.net.run(|| TcpListener::bind(("0.0.0.0", 80)).unwrap());
    for to in [list[0].addresses[0], list[COUNT - 1].addresses[1]] {
        let ip = if to.is_ipv4() { "127.0.0.1" } else { "::1" };
        let client = world.host.run(move || connect(at(ip, to.port())).unwrap());
        server.accept().unwrap();
        drop(client);
    }
}
