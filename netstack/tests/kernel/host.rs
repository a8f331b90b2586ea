//! Changes of the host's network.

use std::io::{ErrorKind, Write};
use std::net::{TcpListener, UdpSocket};

use crate::common::*;
use crate::tools::*;

crate::tests! {
    routes_and_addresses_of_the_host_are_followed,
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
