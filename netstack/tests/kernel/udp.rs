//! Datagrams out, and what comes back.

use std::io::ErrorKind;
use std::net::UdpSocket;

use netstack::Outbound;
use nix::sys::socket::{setsockopt, sockopt};

use crate::common::*;
use crate::tools::*;

crate::tests! {
    reaches_the_internet_with_datagrams_of_any_size,
    port_unreachable_comes_back,
    answers_from_another_port_pass_and_from_strangers_do_not,
    leaves_from_the_address_that_is_configured,
    multicast_goes_nowhere,
}

fn reaches_the_internet_with_datagrams_of_any_size(world: &World) {
    let guest = Guest::new();
    for ip in INTERNET {
        let server = udp_echo(&world.internet, ip);
        let client = udp_client(&guest.net, ip);
        let mut buffer = vec![0; 70_000];
        for len in [0, 1, 1400, 1472, 1473, 2000, 9000, 40_000, 65_507] {
            let data = pattern(7, len);
            client.send_to(&data, server).unwrap();
            let (got, from) = client.recv_from(&mut buffer).unwrap();
            assert_eq!((got, from), (len, server));
            assert!(buffer[..got] == data);
        }
    }
    assert_eq!(guest.stack.stats().udp_flows, 2);
    assert_eq!(guest.stack.stats().dropped_malformed, 0);
}

fn port_unreachable_comes_back(_: &World) {
    let guest = Guest::new();
    for ip in INTERNET {
        let client = udp_client(&guest.net, ip);
        client.connect(at(ip, 9)).unwrap();
        client.send(b"anybody?").unwrap();
        assert_eq!(client.recv(&mut [0; 10]).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }
    // Refused by the policy. (That there is no route, the guest's kernel would not tell the program.)
    let client = udp_client(&guest.net, "169.254.169.254");
    client.connect(at("169.254.169.254", 9)).unwrap();
    client.send(b"anybody?").unwrap();
    assert_eq!(client.recv(&mut [0; 10]).unwrap_err().kind(), ErrorKind::HostUnreachable);
}

fn answers_from_another_port_pass_and_from_strangers_do_not(world: &World) {
    let guest = Guest::new();
    let server = world.internet.run(|| UdpSocket::bind((INTERNET_V4, 0)).unwrap());
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let client = udp_client(&guest.net, INTERNET_V4);
    client.send_to(b"ask", server.local_addr().unwrap()).unwrap();
    let (_, mapped) = server.recv_from(&mut [0; 10]).unwrap();
    // A stranger: another address that the guest has never sent to.
    let stranger = UdpSocket::bind((HOST_V4, 0)).unwrap();
    stranger.send_to(b"spoof", mapped).unwrap();
    wait_until("the stranger's datagram dropped", || guest.stack.stats().dropped_datagrams == 1);
    // The server, from another port, as TFTP does.
    let other = world.internet.run(|| UdpSocket::bind((INTERNET_V4, 0)).unwrap());
    other.send_to(b"data", mapped).unwrap();
    let mut buffer = [0; 10];
    let (len, from) = client.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..len], from), (&b"data"[..], other.local_addr().unwrap()));
    // One port of the guest is one port of the host, whatever the destination.
    client.send_to(b"ask", other.local_addr().unwrap()).unwrap();
    other.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(other.recv_from(&mut buffer).unwrap().1, mapped);
}

fn leaves_from_the_address_that_is_configured(world: &World) {
    let mut spec = spec();
    spec.outbound = Outbound { v4: HOST_V4.parse().ok(), v6: HOST_V6.parse().ok() };
    let guest = Guest::with(&spec, &[]);
    for (ip, from) in INTERNET.into_iter().zip([HOST_V4, HOST_V6]) {
        let server = world.internet.run(move || UdpSocket::bind((ip, 0)).unwrap());
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        let client = udp_client(&guest.net, ip);
        let mut mapped = None;
        // The last one has a hop limit of its own on the way.
        for hops in [64, 64, 9] {
            if ip.contains(':') {
                setsockopt(&client, sockopt::Ipv6Ttl, &hops).unwrap();
            } else {
                setsockopt(&client, sockopt::Ipv4Ttl, &hops).unwrap();
            }
            client.send_to(b"ask", server.local_addr().unwrap()).unwrap();
            let (_, peer) = server.recv_from(&mut [0; 10]).unwrap();
            assert_eq!(peer.ip(), from.parse::<std::net::IpAddr>().unwrap());
            assert_eq!(*mapped.get_or_insert(peer), peer);
            server.send_to(b"answer", peer).unwrap();
            assert_eq!(client.recv(&mut [0; 10]).unwrap(), 6);
        }
        setsockopt(&client, sockopt::UdpGsoSegment, &500).unwrap();
        client.send_to(&[1; 1200], server.local_addr().unwrap()).unwrap();
        for expected in [500, 500, 200] {
            let (len, peer) = server.recv_from(&mut [0; 1000]).unwrap();
            assert_eq!((len, Some(peer)), (expected, mapped));
        }
        guest.net.run(move || sh(&format!("ping -c 1 -W 5 {ip}")));
    }
}

fn multicast_goes_nowhere(_: &World) {
    let guest = Guest::new();
    let before = guest.stack.stats().dropped_multicast;
    guest.net.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_broadcast(true).unwrap();
        for to in ["239.255.255.250:1900", "255.255.255.255:67", "10.0.2.255:137"] {
            socket.send_to(b"x", to).unwrap();
        }
    });
    wait_until("three drops", || guest.stack.stats().dropped_multicast >= before + 3);
    assert_eq!(guest.stack.stats().udp_flows, 0);
}
