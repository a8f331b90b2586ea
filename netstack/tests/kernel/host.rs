//! Changes of the host's network.

use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};

use netstack::{DnsSpec, StackSpec};
use nix::sys::socket::{setsockopt, sockopt};

use crate::common::*;
use crate::tools::*;

crate::tests! {
    routes_and_addresses_of_the_host_are_followed,
    a_host_without_any_route_joins_one_network_after_the_other,
}

fn routes_and_addresses_of_the_host_are_followed(world: &World) {
    let guest = Guest::new();
    // A network that the host does not know yet, and joins while the guest is there.
    let (there, moving) = ("192.0.2.130", "198.51.100.50");
    world
        .internet
        .run(move || sh(&format!("ip addr add {there}/32 dev lo; ip addr add {moving}/32 dev inet0")));
    let port = serve(&world.internet, there, |mut stream| stream.write_all(b"hello").unwrap());
    let reach = |ip: &'static str, port| guest.net.run(move || connect(at(ip, port)).map(drop));
    assert_eq!(reach(there, port).unwrap_err().kind(), ErrorKind::NetworkUnreachable);
    sh(&format!("ip route add {there}/32 via {INTERNET_V4}"));
    reach(there, port).unwrap();
    sh(&format!("ip route del {there}/32"));
    assert_eq!(reach(there, port).unwrap_err().kind(), ErrorKind::NetworkUnreachable);

    // An address of another machine that becomes the host's own, under a flow that exists.
    let echo = world.internet.run(move || UdpSocket::bind((moving, 0)).unwrap());
    echo.set_read_timeout(Some(PATIENCE)).unwrap();
    let to = echo.local_addr().unwrap();
    let socket = guest.net.run(move || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect(to).unwrap();
        socket
    });
    socket.send(b"x").unwrap();
    echo.recv_from(&mut [0; 4]).unwrap();
    let before = guest.stack.stats().refused_by_policy;
    world.internet.run(move || sh(&format!("ip addr del {moving}/32 dev inet0")));
    sh(&format!("ip addr add {moving}/32 dev lo"));
    let canary = UdpSocket::bind(to).unwrap();
    let tcp = TcpListener::bind(to).unwrap();
    assert_eq!(reach(moving, to.port()).unwrap_err().kind(), ErrorKind::HostUnreachable);
    wait_until("the flow is refused", || {
        let _ = socket.send(b"x");
        guest.stack.stats().refused_by_policy > before + 1
    });
    // From here on nothing arrives: what was sent before the refusal is read away.
    canary.set_nonblocking(true).unwrap();
    while canary.recv_from(&mut [0; 4]).is_ok() {}
    for _ in 0..10 {
        let _ = socket.send(b"y");
    }
    guest.net.run(|| sh(&format!("ping -c 1 -W 5 {GATEWAY_V4}")));
    assert_eq!(canary.recv_from(&mut [0; 4]).unwrap_err().kind(), ErrorKind::WouldBlock);
    tcp.set_nonblocking(true).unwrap();
    assert_eq!(tcp.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    sh(&format!("ip addr del {moving}/32 dev lo"));
}

/// A laptop's day: no network at first, then one, none again, and another one; the guest sees all of it as it is.
fn a_host_without_any_route_joins_one_network_after_the_other(_: &World) {
    const SERVER: [&str; 2] = ["203.0.113.9", "2001:db8:9::9"];
    let host = Net::new();
    let internet = Net::new();
    let dns = DnsSpec { upstreams: vec![at(SERVER[0], 53)], ..DnsSpec::default() };
    let guest = host.run(move || Guest::with(&StackSpec { dns, ..spec() }, &[]));
    internet.run(|| {
        sh(&format!("ip addr add {}/32 dev lo; ip addr add {}/128 dev lo nodad", SERVER[0], SERVER[1]));
    });
    let ports = SERVER.map(|ip| serve(&internet, ip, |mut stream| stream.write_all(b"hello").unwrap()));
    let _resolver = internet.run(|| dnsmasq(SERVER[0], 53, "192.0.2.80"));
    let echoes = SERVER.map(|ip| udp_echo(&internet, ip));
    // These last.
    let sockets = echoes.map(|to| {
        guest.net.run(move || {
            let socket = UdpSocket::bind((any(&to.ip().to_string()), 0)).unwrap();
            socket.connect(to).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            // Such errors may pass, so a socket has to ask for them.
            let _ = match to {
                SocketAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4RecvErr, &true),
                SocketAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6RecvErr, &true),
            };
            socket
        })
    });
    let reach = |i: usize| {
        let (ip, port) = (SERVER[i], ports[i]);
        guest.net.run(move || connect(at(ip, port)).map(drop))
    };
    let dig = |name: &'static str| {
        guest.net.run(move || sh(&format!("dig +tries=1 +time=10 @{GATEWAY_V4} {name}.example || true")))
    };
    let nothing_works = |name| {
        for (i, socket) in sockets.iter().enumerate() {
            let error = reach(i).unwrap_err().kind();
            assert!(matches!(error, ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable), "{error}");
            // The error comes with the next call.
            socket.send(b"x").unwrap();
            let error = socket.recv(&mut [0; 8]).unwrap_err().kind();
            assert!(matches!(error, ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable), "{error}");
        }
        let answer = dig(name);
        assert!(
            answer.contains("SERVFAIL") && answer.contains("no resolver of the host answers"),
            "{answer}"
        );
    };
    let everything_works = |name| {
        for (i, socket) in sockets.iter().enumerate() {
            reach(i).unwrap();
            socket.send(b"hello").unwrap();
            assert_eq!(socket.recv(&mut [0; 8]).unwrap(), 5);
        }
        let answer = dig(name);
        assert!(answer.contains("NOERROR") && answer.contains("192.0.2."), "{answer}");
    };
    // A link between the two, by which the host gets its addresses.
    let join = |network: u8| {
        let there = internet.path();
        host.run(move || {
            sh(&format!(
                "ip link add up0 type veth peer name down0 netns {there}
                 ip addr add 10.99.{network}.1/24 dev up0
                 ip addr add 2001:db8:{network}::1/64 dev up0 nodad
                 ip link set up0 up"
            ));
        });
        internet.run(move || {
            sh(&format!(
                "ip addr add 10.99.{network}.2/24 dev down0
                 ip addr add 2001:db8:{network}::2/64 dev down0 nodad
                 ip link set down0 up"
            ));
        });
        host.run(move || {
            // IPv6 takes a second until the link is usable.
            sh(&format!(
                "ip route add default via 10.99.{network}.2; ip -6 route add default via 2001:db8:{network}::2
                 ping -c 1 -W 10 2001:db8:{network}::2; ping -c 1 -W 10 10.99.{network}.2"
            ));
        });
    };
    nothing_works("web");
    join(1);
    everything_works("web");
    host.run(|| sh("ip link del up0"));
    nothing_works("other");
    join(2);
    everything_works("other");
}
