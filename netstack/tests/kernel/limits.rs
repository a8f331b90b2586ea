//! Floods, and what happens when descriptors run out.

use std::io::{ErrorKind, Read, Write};
use std::net::UdpSocket;
use std::time::Duration;

use netstack::Protocol;

use crate::common::*;
use crate::tools::*;

crate::tests! {
    tcp_without_descriptors_is_refused_politely,
    tcp_flood_of_half_open_connections_is_bounded,
    udp_to_ten_thousand_ports_costs_a_bounded_number_of_sockets,
    ports_beyond_the_descriptors_are_refused,
}

fn tcp_without_descriptors_is_refused_politely(world: &World) {
    let guest = with_descriptors(200, Guest::new);
    let port = serve(&world.internet, INTERNET_V4, |mut stream| {
        let _ = std::io::copy(&mut stream.try_clone().unwrap(), &mut stream);
    });
    guest.net.run(move || {
        let mut streams = Vec::new();
        let refused = loop {
            match connect(at(INTERNET_V4, port)) {
                Ok(stream) => streams.push(stream),
                Err(error) => break error,
            }
        };
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        assert!((40..200).contains(&streams.len()), "{}", streams.len());
        // The others live.
        for stream in &mut streams {
            stream.write_all(b"x").unwrap();
            stream.read_exact(&mut [0]).unwrap();
        }
        // One gone, one more possible.
        streams.pop();
        wait_until("a connection", || connect(at(INTERNET_V4, port)).is_ok());
    });
    assert!(guest.stack.stats().refused_by_limit > 0);
}

fn tcp_flood_of_half_open_connections_is_bounded(world: &World) {
    // A route that leads to nobody: connecting takes minutes.
    sh(
        "ip route replace 203.0.113.0/24 dev host0; ip neigh replace 203.0.113.9 lladdr 02:00:00:00:00:09 dev host0",
    );
    let guest = Guest::new();
    guest.net.run(|| {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};
        use std::os::fd::AsRawFd;
        let to = SockaddrStorage::from(at("203.0.113.9", 80));
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let mut held = Vec::new();
        for _ in 0..3_000 {
            let fd = socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
            let _ = connect(fd.as_raw_fd(), &to);
            held.push(fd);
        }
    });
    close_at_once(world, &guest);
    let stats = guest.stack.stats();
    // The eighty of a moment ago may not be quite gone.
    assert!(stats.tcp_flows <= 2_048 + 80, "{stats:?}");
    assert!(stats.tcp_flows > 100 && stats.evicted > 100, "{stats:?}");
}

fn udp_to_ten_thousand_ports_costs_a_bounded_number_of_sockets(world: &World) {
    let guest = with_descriptors(400, Guest::new);
    let server = udp_echo(&world.internet, INTERNET_V4);
    guest.net.run(move || {
        for port in 20_000..30_000u16 {
            let socket = UdpSocket::bind(("0.0.0.0", port)).unwrap();
            let _ = socket.send_to(b"x", at(INTERNET_V4, port));
        }
        // And from one port to many.
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        for port in 20_000..30_000u16 {
            let _ = socket.send_to(b"x", at(INTERNET_V4, port));
        }
        let client = UdpSocket::bind("0.0.0.0:0").unwrap();
        client.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        wait_until("an answer", || {
            client.send_to(b"still here?", server).unwrap();
            client.recv_from(&mut [0; 20]).is_ok()
        });
    });
    let stats = guest.stack.stats();
    assert!(stats.udp_flows <= 100 && stats.evicted > 1_000, "{stats:?}");
}

fn ports_beyond_the_descriptors_are_refused(world: &World) {
    let guest = with_descriptors(256, Guest::new);
    let control = guest.stack.control().clone();
    let mut ports = Vec::new();
    let refused = loop {
        match control.publish(&publish(None, 80, Protocol::Udp)) {
            Ok(port) => ports.push(port),
            Err(netstack::Error::Listen { source, .. }) => break source,
            Err(error) => panic!("{error}"),
        }
        assert!(ports.len() < 128, "half of the descriptors are not the stack's");
    };
    assert_eq!(refused.raw_os_error(), Some(nix::errno::Errno::EMFILE as i32), "{refused}");
    // Connections still get some.
    let port = serve(&world.internet, INTERNET_V4, |mut stream| drop(stream.write_all(b"x")));
    guest.net.run(move || connect(at(INTERNET_V4, port)).unwrap().read_exact(&mut [0; 1]).unwrap());
    // What was closed can be had again.
    assert!(control.unpublish(ports[0].id).unwrap().is_some());
    control.publish(&publish(None, 80, Protocol::Udp)).unwrap();
}
