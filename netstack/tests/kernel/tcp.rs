//! Connections out: data, ends, resets, and peers that do neither read nor answer.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::common::*;
use crate::tools::*;

crate::tests! {
    reaches_the_internet_and_half_closes_both_ways,
    data_arrives_whole_both_ways_at_once,
    refused_is_refused_and_unreachable_unreachable,
    hosts_that_do_not_answer_are_so_inside,
    reset_by_the_peer_reaches_the_guest,
    reset_by_the_guest_reaches_the_peer,
    a_guest_that_does_not_read_stops_the_peer,
    a_peer_that_does_not_read_stops_the_guest,
    close_at_once_is_a_close_and_no_reset,
    what_the_peer_sent_before_its_reset_is_not_lost,
    two_thousand_connections_at_once,
    idle_connections_cost_little_memory,
    urgent_data_stays_in_the_stream,
}

fn reaches_the_internet_and_half_closes_both_ways(world: &World) {
    let guest = Guest::new();
    for ip in INTERNET {
        // The guest says all, then listens; the server answers after the guest's end.
        let port = serve(&world.internet, ip, |mut stream| {
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            stream.write_all(&all).unwrap();
        });
        guest.net.run(move || {
            let mut stream = connect(at(ip, port)).unwrap();
            let data = pattern(1, 100_000);
            stream.write_all(&data).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut back = Vec::new();
            stream.read_to_end(&mut back).unwrap();
            assert!(back == data);
        });
        // The other way round.
        let port = serve(&world.internet, ip, |mut stream| {
            stream.write_all(b"hello").unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut all = Vec::new();
            patient(stream.try_clone().unwrap()).read_to_end(&mut all).unwrap();
            assert_eq!(all.len(), 70_000);
        });
        guest.net.run(move || {
            let mut stream = connect(at(ip, port)).unwrap();
            let mut hello = Vec::new();
            stream.read_to_end(&mut hello).unwrap();
            assert_eq!(hello, b"hello");
            stream.write_all(&pattern(2, 70_000)).unwrap();
        });
    }
    wait_until("flows gone", || guest.stack.stats().tcp_flows == 0);
}

fn data_arrives_whole_both_ways_at_once(world: &World) {
    const SIZE: usize = 24 << 20;
    let guest = Guest::new();
    for ip in INTERNET {
        let (addr, server) = accept_one(&world.internet, ip);
        let client = guest.net.run(move || connect(addr).unwrap());
        let server = server.join().unwrap();
        let one_way = |mut from: TcpStream, mut to: TcpStream, seed| {
            let sender = std::thread::spawn(move || {
                from.write_all(&pattern(seed, SIZE)).unwrap();
                from.shutdown(Shutdown::Write).unwrap();
            });
            let receiver = std::thread::spawn(move || {
                let mut all = Vec::with_capacity(SIZE);
                to.read_to_end(&mut all).unwrap();
                assert!(all == pattern(seed, SIZE), "{} bytes", all.len());
            });
            [sender, receiver]
        };
        let out = one_way(client.try_clone().unwrap(), server.try_clone().unwrap(), 3);
        let back = one_way(server, client, 4);
        for thread in out.into_iter().chain(back) {
            thread.join().unwrap();
        }
    }
}

fn refused_is_refused_and_unreachable_unreachable(_: &World) {
    let guest = Guest::new();
    guest.net.run(|| {
        for (to, kind) in [
            (at(INTERNET_V4, 1), ErrorKind::ConnectionRefused),
            (at(INTERNET_V6, 1), ErrorKind::ConnectionRefused),
            // No route on the host.
            (at("203.0.113.1", 80), ErrorKind::NetworkUnreachable),
            (at("2001:db8:ffff::1", 80), ErrorKind::NetworkUnreachable),
            // Refused by the policy.
            (at("169.254.169.254", 80), ErrorKind::HostUnreachable),
            (at("100.100.100.200", 80), ErrorKind::HostUnreachable),
            (at("fd00:ec2::254", 80), ErrorKind::PermissionDenied),
        ] {
            let begin = Instant::now();
            assert_eq!(connect(to).unwrap_err().kind(), kind, "{to}");
            assert!(begin.elapsed() < Duration::from_secs(10), "{to}");
        }
    });
}

fn hosts_that_do_not_answer_are_so_inside(_: &World) {
    // A machine that is not there, which the kernel notices at once, and a route that leads to nobody: it gives up after
    // three seconds.
    sh("for family in ipv4 ipv6; do echo 1 >/proc/sys/net/$family/neigh/host0/mcast_solicit; done
        ip route replace 203.0.113.0/24 dev host0
        ip neigh replace 203.0.113.9 lladdr 02:00:00:00:00:09 dev host0");
    let retries = "/proc/sys/net/ipv4/tcp_syn_retries";
    let before = std::fs::read_to_string(retries).unwrap();
    std::fs::write(retries, "1").unwrap();
    let guest = Guest::new();
    guest.net.run(move || std::fs::write(retries, "1").unwrap());
    let attempts = [
        (at("198.51.100.77", 80), ErrorKind::HostUnreachable),
        (at("2001:db8:1::77", 80), ErrorKind::HostUnreachable),
        (at("203.0.113.9", 80), ErrorKind::TimedOut),
    ];
    let attempts = attempts.map(|(to, kind)| {
        let attempt = guest.net.spawn(move || connect(to).unwrap_err().kind());
        (to, kind, attempt)
    });
    for (to, kind, attempt) in attempts {
        assert_eq!(attempt.join().unwrap(), kind, "{to}");
    }
    wait_until("flows gone", || guest.stack.stats().tcp_flows == 0);
    std::fs::write(retries, before).unwrap();
    sh("for family in ipv4 ipv6; do echo 3 >/proc/sys/net/$family/neigh/host0/mcast_solicit; done
        ip route del 203.0.113.0/24 dev host0");
}

fn reset_by_the_peer_reaches_the_guest(world: &World) {
    let guest = Guest::new();
    for ip in INTERNET {
        let (addr, server) = accept_one(&world.internet, ip);
        let mut client = guest.net.run(move || connect(addr).unwrap());
        reset(server.join().unwrap());
        assert_eq!(client.read(&mut [0; 10]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
}

fn reset_by_the_guest_reaches_the_peer(world: &World) {
    let guest = Guest::new();
    for ip in INTERNET {
        let (addr, server) = accept_one(&world.internet, ip);
        let client = guest.net.run(move || connect(addr).unwrap());
        let mut server = server.join().unwrap();
        guest.net.run(|| reset(client));
        assert_eq!(server.read(&mut [0; 10]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        // Also when data is under way in the other direction.
        let (addr, server) = accept_one(&world.internet, ip);
        let client = guest.net.run(move || connect(addr).unwrap());
        let mut server = server.join().unwrap();
        guest.net.spawn(move || {
            let mut client = client;
            client.read_exact(&mut [0; 1000]).unwrap();
            // Closing with unread data is a reset.
        });
        let chunk = [0; 65536];
        let error = loop {
            if let Err(error) = server.write_all(&chunk) {
                break error;
            }
        };
        assert!(matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error}");
    }
    wait_until("flows gone", || guest.stack.stats().tcp_flows == 0);
}

/// Writes until nobody takes it any more; how much went.
fn fill(stream: &mut TcpStream) -> usize {
    stream.set_write_timeout(Some(Duration::from_millis(700))).unwrap();
    let data = pattern(5, 1 << 26);
    let mut sent = 0;
    while sent < data.len() {
        match stream.write(&data[sent..(sent + 65536).min(data.len())]) {
            Ok(n) => sent += n,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return sent,
            // A process that was stopped and goes on hears that of a call with a time limit (signal(7)).
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => panic!("{error}"),
        }
    }
    panic!("64 MiB went into a connection that nobody reads");
}

fn read_all_of(stream: &mut TcpStream, sent: usize) {
    let mut all = vec![0; sent];
    stream.read_exact(&mut all).unwrap();
    assert!(all == pattern(5, sent));
}

fn a_guest_that_does_not_read_stops_the_peer(world: &World) {
    let guest = Guest::new();
    let (addr, server) = accept_one(&world.internet, INTERNET_V4);
    let mut client = guest.net.run(move || connect(addr).unwrap());
    let mut server = server.join().unwrap();
    let sent = fill(&mut server);
    // Others are not held up by it.
    close_at_once(world, &guest);
    let reader = guest.net.spawn(move || read_all_of(&mut client, sent));
    reader.join().unwrap();
    drop(server);
}

fn a_peer_that_does_not_read_stops_the_guest(world: &World) {
    let guest = Guest::new();
    let (addr, server) = accept_one(&world.internet, INTERNET_V6);
    let mut client = guest.net.run(move || connect(addr).unwrap());
    let mut server = server.join().unwrap();
    let (sent, client) = guest.net.run(move || (fill(&mut client), client));
    close_at_once(world, &guest);
    read_all_of(&mut server, sent);
    drop(client);
}

fn close_at_once_is_a_close_and_no_reset(world: &World) {
    let guest = Guest::new();
    close_at_once(world, &guest);
    wait_until("flows gone", || guest.stack.stats().tcp_flows == 0);
}

fn what_the_peer_sent_before_its_reset_is_not_lost(world: &World) {
    let guest = Guest::new();
    let (addr, server) = accept_one(&world.internet, INTERNET_V4);
    let mut client = guest.net.run(move || connect(addr).unwrap());
    let mut server = server.join().unwrap();
    // Less than the first window of any congestion control, so that all of it is on its way when the reset follows.
    server.write_all(&pattern(6, 10_000)).unwrap();
    reset(server);
    let mut all = vec![0; 10_000];
    client.read_exact(&mut all).unwrap();
    assert!(all == pattern(6, 10_000));
    assert_eq!(client.read(&mut [0; 10]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

fn two_thousand_connections_at_once(world: &World) {
    const COUNT: usize = 2_000;
    let guest = Guest::new();
    let listener = world.internet.run(|| TcpListener::bind((INTERNET_V4, 0)).unwrap());
    let addr = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let mut streams: Vec<TcpStream> = (0..COUNT).map(|_| patient(listener.accept().unwrap().0)).collect();
        for stream in &mut streams {
            let mut bytes = [0; 100];
            stream.read_exact(&mut bytes).unwrap();
            stream.write_all(&bytes).unwrap();
        }
        streams
    });
    let clients = guest.net.run(move || {
        let mut streams: Vec<TcpStream> = (0..COUNT).map(|_| connect(addr).unwrap()).collect();
        for (i, stream) in (0..).zip(&mut streams) {
            stream.write_all(&pattern(i, 100)).unwrap();
        }
        for (i, stream) in (0..).zip(&mut streams) {
            let mut bytes = [0; 100];
            stream.read_exact(&mut bytes).unwrap();
            assert!(bytes[..] == pattern(i, 100));
        }
        streams
    });
    let servers = server.join().unwrap();
    assert_eq!(guest.stack.stats().tcp_flows, 2_000);
    drop((clients, servers));
    wait_until("flows gone", || guest.stack.stats().tcp_flows == 0);
}

fn idle_connections_cost_little_memory(world: &World) {
    const COUNT: usize = 1_000;
    let guest = Guest::new();
    let listener = world.internet.run(|| TcpListener::bind((INTERNET_V4, 0)).unwrap());
    let addr = listener.local_addr().unwrap();
    let before = private_memory();
    let server = std::thread::spawn(move || -> Vec<TcpStream> {
        (0..COUNT).map(|_| listener.accept().unwrap().0).collect()
    });
    let clients: Vec<TcpStream> = guest.net.run(move || (0..COUNT).map(|_| connect(addr).unwrap()).collect());
    let servers = server.join().unwrap();
    for (mut client, mut server) in clients.iter().zip(&servers) {
        client.write_all(b"one byte or two").unwrap();
        server.read_exact(&mut [0; 15]).unwrap();
        server.write_all(b"and back").unwrap();
        client.read_exact(&mut [0; 8]).unwrap();
    }
    let each = (private_memory() - before.min(private_memory())) / COUNT;
    // Two pages of rings, and the socket; a ring as a whole would be half a mebibyte.
    assert!(each <= 16, "{each} KiB each");
    // Among so many, the rings of those that rest take none.
    wait_until("pages of idle flows go back", || private_memory() <= before + 3 * COUNT);
    for (mut client, mut server) in clients.iter().zip(&servers) {
        client.write_all(b"still here").unwrap();
        server.read_exact(&mut [0; 10]).unwrap();
    }
    drop((clients, servers));
}

fn urgent_data_stays_in_the_stream(world: &World) {
    use nix::sys::socket::{MsgFlags, send};
    use std::os::fd::AsRawFd;
    let guest = Guest::new();
    let (addr, server) = accept_one(&world.internet, INTERNET_V4);
    let mut client = guest.net.run(move || connect(addr).unwrap());
    let mut server = server.join().unwrap();
    let both_ways = |from: &TcpStream, to: &mut TcpStream| {
        for (bytes, flags) in [("ab", MsgFlags::empty()), ("c", MsgFlags::MSG_OOB), ("d", MsgFlags::empty())]
        {
            send(from.as_raw_fd(), bytes.as_bytes(), flags).unwrap();
        }
        let mut all = [0; 4];
        to.read_exact(&mut all).unwrap();
        assert_eq!(&all, b"abcd");
    };
    both_ways(&client, &mut server);
    both_ways(&server, &mut client);
}
