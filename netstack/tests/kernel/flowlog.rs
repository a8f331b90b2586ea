//! What the flow log tells.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, UdpSocket};

use netstack::{FlowEventKind, FlowLog, PolicySpec, Protocol, Publish, StackSpec, Traffic};

use crate::common::*;
use crate::tools::*;

crate::tests! {
    every_flow_is_told,
    flows_that_the_host_cannot_begin_are_told,
}

/// A line for each event: protocol, direction, remote, what, and how much both ways.
pub(crate) fn flow_lines() -> (FlowLog, std::sync::mpsc::Receiver<String>) {
    let (sender, lines) = std::sync::mpsc::channel();
    let sender = std::sync::Mutex::new(sender);
    let log = FlowLog::new(move |event| {
        let what = match event.kind {
            FlowEventKind::Opened => "opened".to_owned(),
            FlowEventKind::Refused { reason, rule, .. } => {
                format!("refused {reason} {}", rule.unwrap_or_default())
            }
            FlowEventKind::Closed { reason, sent, received, .. } => {
                let some = |traffic: Traffic| {
                    if traffic.packets > 0 { traffic.bytes.to_string() } else { "none".into() }
                };
                format!("closed {reason} {} {}", some(sent), some(received))
            }
            _ => "unknown".to_owned(),
        };
        let direction = if event.inbound { "in" } else { "out" };
        let line =
            format!("{} {direction} {} {}", event.transport.name(), event.remote.ip(), what.trim_end());
        sender.lock().unwrap().send(line).unwrap();
    });
    (log, lines)
}

fn every_flow_is_told(world: &World) {
    let (log, lines) = flow_lines();
    let next = || lines.recv_timeout(PATIENCE).unwrap();
    let policy = PolicySpec { deny: vec!["tcp:any:25".parse().unwrap()], ..PolicySpec::default() };
    let guest = Guest::with(
        &StackSpec { flow_log: Some(log), policy, ..spec() },
        &[Publish {
            host_ip: Some(HOST_V4.parse().unwrap()),
            host_port: 0,
            inside_ip: None,
            inside_port: 8080,
            protocol: Protocol::Tcp,
        }],
    );
    let port = serve(&world.internet, INTERNET_V4, |mut stream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(b"answer").unwrap();
    });
    guest.net.run(move || {
        let mut stream = connect(at(INTERNET_V4, port)).unwrap();
        stream.write_all(b"question").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        stream.read_to_end(&mut Vec::new()).unwrap();
    });
    assert_eq!(next(), format!("tcp out {INTERNET_V4} opened"));
    assert_eq!(next(), format!("tcp out {INTERNET_V4} closed finished 8 6"));
    guest.net.run(|| assert!(connect(at(INTERNET_V4, 1)).is_err()));
    assert_eq!(next(), format!("tcp out {INTERNET_V4} opened"));
    assert_eq!(next(), format!("tcp out {INTERNET_V4} closed refused-by-peer none none"));
    guest.net.run(|| {
        assert!(connect(at(INTERNET_V4, 25)).is_err());
        assert!(connect(at(INTERNET_V6, 25)).is_err());
        assert!(connect(at("169.254.169.254", 80)).is_err());
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_broadcast(true).unwrap();
        socket.send_to(b"x", "239.255.255.250:1900").unwrap();
        socket.send_to(b"x", "10.0.2.255:137").unwrap();
        socket.send_to(b"x", "255.255.255.255:67").unwrap();
        socket.send_to(b"xyz", (INTERNET_V4, 9)).unwrap();
    });
    assert_eq!(next(), format!("tcp out {INTERNET_V4} refused deny tcp:any:25"));
    assert_eq!(next(), format!("tcp out {INTERNET_V6} refused deny tcp:any:25"));
    assert_eq!(next(), "tcp out 169.254.169.254 refused link-local");
    assert_eq!(next(), "udp out 239.255.255.250 refused multicast");
    assert_eq!(next(), "udp out 10.0.2.255 refused broadcast");
    assert_eq!(next(), "udp out 255.255.255.255 refused broadcast");
    assert_eq!(next(), format!("udp out {INTERNET_V4} opened"));
    guest.net.run(|| sh(&format!("ping -c 1 -W 10 -s 100 {INTERNET_V4}")));
    assert_eq!(next(), format!("icmp out {INTERNET_V4} opened"));
    // A connection to a published port.
    let server = guest.net.run(|| TcpListener::bind("0.0.0.0:8080").unwrap());
    let published = guest.published[0];
    let mut client = world.internet.run(move || connect(published).unwrap());
    let mut accepted = patient(server.accept().unwrap().0);
    assert_eq!(next(), format!("tcp in {INTERNET_V4} opened"));
    client.write_all(b"hello").unwrap();
    accepted.read_exact(&mut [0; 5]).unwrap();
    // What is still there when the stack ends is told then.
    guest.stack.stop();
    let mut rest: Vec<String> = lines.iter().collect();
    rest.sort();
    assert_eq!(
        rest,
        [
            format!("icmp out {INTERNET_V4} closed stopped 108 108"),
            format!("tcp in {INTERNET_V4} closed stopped 0 5"),
            format!("udp out {INTERNET_V4} closed stopped 3 none"),
        ]
    );
}

fn flows_that_the_host_cannot_begin_are_told(world: &World) {
    // A host with no way to anywhere, and where nobody may ping.
    let (log, lines) = flow_lines();
    let next = || lines.recv_timeout(PATIENCE).unwrap();
    let cut_off = StackSpec { flow_log: Some(log.clone()), ..spec() };
    let guest = Net::new().run(move || {
        sh("ip link set lo up");
        Guest::with(&cut_off, &[])
    });
    guest.net.run(|| assert!(connect(at(INTERNET_V4, 80)).is_err()));
    assert_eq!(next(), format!("tcp out {INTERNET_V4} opened"));
    assert_eq!(next(), format!("tcp out {INTERNET_V4} closed unreachable none none"));
    guest.net.run(|| {
        let ping = std::process::Command::new("ping").args(["-c", "1", "-W", "5", INTERNET_V4]).output();
        assert!(!ping.unwrap().status.success());
    });
    assert_eq!(next(), format!("icmp out {INTERNET_V4} refused not-permitted"));
    guest.stack.stop();
    // The loopback refuses before connect(2) is back.
    let policy = PolicySpec { host_loopback: netstack::HostLoopback::All, ..PolicySpec::default() };
    let guest = Guest::with(&StackSpec { flow_log: Some(log), policy, ..spec() }, &[]);
    guest.net.run(|| assert!(connect(at(GATEWAY_V4, 1)).is_err()));
    assert_eq!(next(), format!("tcp out {GATEWAY_V4} opened"));
    assert_eq!(next(), format!("tcp out {GATEWAY_V4} closed refused-by-peer none none"));
    guest.stack.stop();
    // Without a descriptor for it.
    let (log, lines) = flow_lines();
    let port = serve(&world.internet, INTERNET_V4, |mut stream| drop(stream.read(&mut [0; 1])));
    let guest = with_descriptors(512, || Guest::with(&StackSpec { flow_log: Some(log), ..spec() }, &[]));
    let begun = guest.net.run(move || {
        let streams: Vec<_> = std::iter::from_fn(|| connect(at(INTERNET_V4, port)).ok()).take(512).collect();
        streams.len()
    });
    assert!((1..256).contains(&begun));
    for _ in 0..begun {
        assert_eq!(lines.recv_timeout(PATIENCE).unwrap(), format!("tcp out {INTERNET_V4} opened"));
    }
    assert_eq!(lines.recv_timeout(PATIENCE).unwrap(), format!("tcp out {INTERNET_V4} refused limit"));
}
