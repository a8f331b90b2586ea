//! The stack against the real kernel: in a world of network namespaces (see `common`), as whoever runs the tests.
//!
//! Every test has a guest and a stack of its own. Names of tests to run may be given as arguments.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a test program")]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::panic::catch_unwind;
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::*;
use netstack::{
    DnsSpec, FlowEventKind, FlowLog, HostLoopback, PolicySpec, Protocol, Publish, StackSpec, Traffic,
};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Long enough for anything that is going to happen.
const PATIENCE: Duration = Duration::from_secs(20);
const INTERNET: [&str; 2] = [INTERNET_V4, INTERNET_V6];

fn main() -> ExitCode {
    enter(|| {
        let log = std::env::var("RUST_LOG").unwrap_or_default();
        if !log.is_empty() {
            tracing_subscriber::fmt().with_env_filter(log).with_writer(std::io::stderr).init();
        }
        let world = World::new();
        let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
        let mut failed = 0;
        let started = Instant::now();
        for (name, test) in TESTS {
            if !wanted.is_empty() && !wanted.iter().any(|part| name.contains(part.as_str())) {
                continue;
            }
            let begin = Instant::now();
            let result = catch_unwind(|| test(&world));
            failed += usize::from(result.is_err());
            let word = if result.is_ok() { "ok" } else { "FAILED" };
            println!("test {name} ... {word} ({} ms)", begin.elapsed().as_millis());
        }
        println!("{failed} failed; {} s", started.elapsed().as_secs());
        if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    })
}

macro_rules! tests {
    ($($name:ident,)*) => {
        const TESTS: &[(&str, fn(&World))] = &[$((stringify!($name), $name),)*];
    };
}

tests! {
    tcp_reaches_the_internet_and_half_closes_both_ways,
    tcp_data_arrives_whole_both_ways_at_once,
    tcp_refused_is_refused_and_unreachable_unreachable,
    tcp_hosts_that_do_not_answer_are_so_inside,
    tcp_reset_by_the_peer_reaches_the_guest,
    tcp_reset_by_the_guest_reaches_the_peer,
    tcp_a_guest_that_does_not_read_stops_the_peer,
    tcp_a_peer_that_does_not_read_stops_the_guest,
    tcp_close_at_once_is_a_close_and_no_reset,
    tcp_what_the_peer_sent_before_its_reset_is_not_lost,
    tcp_two_thousand_connections_at_once,
    tcp_idle_connections_cost_little_memory,
    tcp_urgent_data_stays_in_the_stream,
    tcp_without_descriptors_is_refused_politely,
    tcp_flood_of_half_open_connections_is_bounded,
    udp_reaches_the_internet_with_datagrams_of_any_size,
    udp_port_unreachable_comes_back,
    udp_answers_from_another_port_pass_and_from_strangers_do_not,
    udp_to_ten_thousand_ports_costs_a_bounded_number_of_sockets,
    ping_works_both_families_and_the_gateway_answers,
    ping_where_the_host_forbids_it_is_refused,
    traceroute_sees_the_gateway,
    multicast_goes_nowhere,
    host_is_unreachable_by_default,
    host_loopback_can_be_allowed,
    host_loopback_can_be_allowed_by_port,
    rules_hold_and_say_so,
    rules_are_replaced_under_flows_that_exist,
    every_flow_is_told,
    names_are_looked_at_where_rules_want_them,
    routes_and_addresses_of_the_host_are_followed,
    dns_by_dnsmasq_over_udp_and_tcp,
    dns_answers_are_kept_while_the_resolver_is_gone,
    dns_follows_the_hosts_resolv_conf,
    dns_names_of_the_spec_are_answered,
    dns_goes_to_the_next_resolver_and_fails_clearly,
    dns_only_the_right_answer_counts,
    published_tcp_ports_lead_inside,
    published_tcp_port_without_a_server_is_refused,
    published_udp_ports_lead_inside,
    published_ports_find_a_server_of_either_family,
    ports_come_and_go_while_the_stack_runs,
    a_thousand_ports_are_cheap,
    ports_beyond_the_descriptors_are_refused,
    programs_of_every_day_work,
    idle_means_no_wake_up,
    stopping_ends_every_flow,
    the_stack_ends_with_its_namespace,
}

/// A TCP server in `net`: handles each connection by `handle`, on a thread of its own.
fn serve(net: &Net, ip: &'static str, handle: impl Fn(TcpStream) + Send + Clone + 'static) -> u16 {
    let listener = net.run(move || TcpListener::bind((ip, 0)).unwrap());
    let port = listener.local_addr().unwrap().port();
    net.spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let handle = handle.clone();
            std::thread::spawn(move || handle(stream));
        }
    });
    port
}

fn patient(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn connect(addr: SocketAddr) -> std::io::Result<TcpStream> {
    TcpStream::connect_timeout(&addr, PATIENCE).map(patient)
}

/// One server that accepts a single connection and hands it to the test.
fn accept_one(net: &Net, ip: &'static str) -> (SocketAddr, JoinHandle<TcpStream>) {
    let listener = net.run(move || TcpListener::bind((ip, 0)).unwrap());
    let addr = listener.local_addr().unwrap();
    (addr, std::thread::spawn(move || patient(listener.accept().unwrap().0)))
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        std::thread::yield_now();
    }
}

/// Bytes that tell their place.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn any(ip: &str) -> &'static str {
    if ip.contains(':') { "::" } else { "0.0.0.0" }
}

fn tcp_reaches_the_internet_and_half_closes_both_ways(world: &World) {
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

fn tcp_data_arrives_whole_both_ways_at_once(world: &World) {
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

fn tcp_refused_is_refused_and_unreachable_unreachable(_: &World) {
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

fn tcp_hosts_that_do_not_answer_are_so_inside(_: &World) {
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

fn reset(stream: TcpStream) {
    nix::sys::socket::setsockopt(
        &stream,
        nix::sys::socket::sockopt::Linger,
        &nix::libc::linger { l_onoff: 1, l_linger: 0 },
    )
    .unwrap();
}

fn tcp_reset_by_the_peer_reaches_the_guest(world: &World) {
    let guest = Guest::new();
    for ip in INTERNET {
        let (addr, server) = accept_one(&world.internet, ip);
        let mut client = guest.net.run(move || connect(addr).unwrap());
        reset(server.join().unwrap());
        assert_eq!(client.read(&mut [0; 10]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
}

fn tcp_reset_by_the_guest_reaches_the_peer(world: &World) {
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

fn tcp_a_guest_that_does_not_read_stops_the_peer(world: &World) {
    let guest = Guest::new();
    let (addr, server) = accept_one(&world.internet, INTERNET_V4);
    let mut client = guest.net.run(move || connect(addr).unwrap());
    let mut server = server.join().unwrap();
    let sent = fill(&mut server);
    // Others are not held up by it.
    tcp_close_at_once(world, &guest);
    let reader = guest.net.spawn(move || read_all_of(&mut client, sent));
    reader.join().unwrap();
    drop(server);
}

fn tcp_a_peer_that_does_not_read_stops_the_guest(world: &World) {
    let guest = Guest::new();
    let (addr, server) = accept_one(&world.internet, INTERNET_V6);
    let mut client = guest.net.run(move || connect(addr).unwrap());
    let mut server = server.join().unwrap();
    let (sent, client) = guest.net.run(move || (fill(&mut client), client));
    tcp_close_at_once(world, &guest);
    read_all_of(&mut server, sent);
    drop(client);
}

fn tcp_close_at_once(world: &World, guest: &Guest) {
    for ip in INTERNET {
        let port = serve(&world.internet, ip, drop);
        guest.net.run(move || {
            for _ in 0..20 {
                let mut stream = connect(at(ip, port)).unwrap();
                assert_eq!(stream.read(&mut [0; 10]).unwrap(), 0);
            }
        });
        let port = serve(&world.internet, ip, |mut stream| assert_eq!(stream.read(&mut [0; 10]).unwrap(), 0));
        guest.net.run(move || (0..20).for_each(|_| drop(connect(at(ip, port)).unwrap())));
    }
}

fn tcp_close_at_once_is_a_close_and_no_reset(world: &World) {
    let guest = Guest::new();
    tcp_close_at_once(world, &guest);
    wait_until("flows gone", || guest.stack.stats().tcp_flows == 0);
}

fn tcp_what_the_peer_sent_before_its_reset_is_not_lost(world: &World) {
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

fn tcp_two_thousand_connections_at_once(world: &World) {
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

/// Private memory of this process, in KiB.
fn private_memory() -> usize {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = rollup.lines().find(|line| line.starts_with("Private_Dirty:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn tcp_idle_connections_cost_little_memory(world: &World) {
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

fn tcp_urgent_data_stays_in_the_stream(world: &World) {
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

/// Runs `f` with a small limit of descriptors for stacks that are started in it.
fn with_descriptors<T>(limit: u64, f: impl FnOnce() -> T) -> T {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, limit, hard).unwrap();
    let result = f();
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    result
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
    tcp_close_at_once(world, &guest);
    let stats = guest.stack.stats();
    // The eighty of a moment ago may not be quite gone.
    assert!(stats.tcp_flows <= 2_048 + 80, "{stats:?}");
    assert!(stats.tcp_flows > 100 && stats.evicted > 100, "{stats:?}");
}

/// A UDP echo server in `net`.
fn udp_echo(net: &Net, ip: &'static str) -> SocketAddr {
    let socket = net.run(move || UdpSocket::bind((ip, 0)).unwrap());
    let addr = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..len], from);
        }
    });
    addr
}

fn udp_client(net: &Net, ip: &'static str) -> UdpSocket {
    let socket = net.run(move || UdpSocket::bind((any(ip), 0)).unwrap());
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn udp_reaches_the_internet_with_datagrams_of_any_size(world: &World) {
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

fn udp_port_unreachable_comes_back(_: &World) {
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

fn udp_answers_from_another_port_pass_and_from_strangers_do_not(world: &World) {
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

fn ping_works_both_families_and_the_gateway_answers(_: &World) {
    let guest = Guest::new();
    guest.net.run(|| {
        for ip in [INTERNET_V4, INTERNET_V6, GATEWAY_V4, GATEWAY_V6] {
            sh(&format!("ping -c 2 -i 0.2 -W 5 {ip}"));
        }
        // Larger than the MTU.
        for ip in [INTERNET_V4, INTERNET_V6, GATEWAY_V4] {
            sh(&format!("ping -c 1 -s 4000 -W 5 {ip}"));
        }
        let refused = Command::new("ping").args(["-c", "1", "-W", "5", HOST_V4]).output().unwrap();
        assert!(String::from_utf8_lossy(&refused.stdout).contains("Packet filtered"), "{refused:?}");
    });
    assert_eq!(guest.stack.stats().dropped_malformed, 0);
}

fn ping_where_the_host_forbids_it_is_refused(_: &World) {
    // A host where nobody set the range: the kernel's default is an empty one.
    let guest = Net::new().run(Guest::new);
    let output =
        guest.net.run(|| Command::new("ping").args(["-c", "1", "-W", "5", INTERNET_V4]).output().unwrap());
    assert!(String::from_utf8_lossy(&output.stdout).contains("Packet filtered"), "{output:?}");
}

fn traceroute_sees_the_gateway(_: &World) {
    let guest = Guest::new();
    for (ip, gateway) in [(INTERNET_V4, GATEWAY_V4), (INTERNET_V6, GATEWAY_V6)] {
        let first = guest.net.run(move || {
            let output =
                Command::new("ping").args(["-c", "1", "-W", "5", "-t", "1", "-n", ip]).output().unwrap();
            String::from_utf8_lossy(&output.stdout).into_owned()
        });
        assert!(
            first.contains(&format!("From {gateway}")) && first.to_lowercase().contains("exceeded"),
            "{first}"
        );
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

/// A line for each event: protocol, direction, remote, what, and how much both ways.
fn flow_lines() -> (FlowLog, std::sync::mpsc::Receiver<String>) {
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

/// The ClientHello of a program, out of the parser's own test data.
fn client_hello(program: &str) -> Vec<u8> {
    let lines = include_str!("../src/policy/hellos.txt").lines();
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

/// A directory that goes with the test.
struct TempDir(std::path::PathBuf);

impl TempDir {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("netstack-test-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn dns_spec(upstreams: &[SocketAddr]) -> StackSpec {
    StackSpec { dns: DnsSpec { upstreams: upstreams.to_vec(), ..DnsSpec::default() }, ..spec() }
}

fn dns_by_dnsmasq_over_udp_and_tcp(_: &World) {
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

/// dnsmasq at `addr`, which knows `web.example` as `ip`, for five minutes.
fn dnsmasq(addr: &str, port: u16, ip: &str) -> Process {
    let server = Process(
        Command::new("dnsmasq")
            .args(["--no-daemon", "--pid-file=", "--conf-file=/dev/null", "--bind-interfaces", "--no-resolv"])
            .args(["--no-hosts", "--local-ttl=300", "--local=/example/", "--listen-address", addr])
            .arg(format!("--port={port}"))
            .arg(format!("--address=/web.example/{ip}"))
            .arg("--host-record=other.example,192.0.2.99")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    wait_until("dnsmasq listens", || TcpStream::connect((addr, port)).is_ok());
    server
}

fn dns_answers_are_kept_while_the_resolver_is_gone(_: &World) {
    let server = dnsmasq("127.0.0.1", 5354, "192.0.2.80");
    let guest = Guest::with(&dns_spec(&[at("127.0.0.1", 5354)]), &[]);
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
    let _server = dnsmasq("127.0.0.1", 5354, "192.0.2.80");
    assert_eq!(dig("+short other.example"), "192.0.2.99\n");
}

fn dns_follows_the_hosts_resolv_conf(_: &World) {
    let dir = TempDir::new();
    let file = dir.0.join("resolv.conf");
    let path = file.display().to_string();
    std::fs::write(&file, "nameserver 127.0.0.53\n").unwrap();
    // In this program's own mount namespace.
    sh(&format!("mount --bind {path} /etc/resolv.conf"));
    let _resolved = dnsmasq("127.0.0.53", 53, "192.0.2.53");
    let _other = dnsmasq("127.0.0.9", 53, "192.0.2.9");
    let guest = Guest::new();
    let dig = || guest.net.run(|| sh(&format!("dig +tries=1 +time=10 +short @{GATEWAY_V4} web.example")));
    assert_eq!(dig(), "192.0.2.53\n");
    // What the old one said is forgotten, though it was to be kept for five minutes.
    std::fs::write(&file, "nameserver 127.0.0.9\noptions timeout:2 attempts:1\n").unwrap();
    wait_until("the new resolver is asked", || dig() == "192.0.2.9\n");
    // Nothing named: whoever listens on the local machine.
    std::fs::write(&file, "search example\n").unwrap();
    wait_until("the local machine is asked", || dig() == "192.0.2.53\n");
    sh("umount /etc/resolv.conf");
}

fn dns_names_of_the_spec_are_answered(_: &World) {
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

fn dns_goes_to_the_next_resolver_and_fails_clearly(_: &World) {
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

fn dns_only_the_right_answer_counts(_: &World) {
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

fn publish(host_ip: Option<&str>, inside_port: u16, protocol: Protocol) -> Publish {
    Publish {
        host_ip: host_ip.map(|ip| ip.parse().unwrap()),
        host_port: 0,
        inside_ip: None,
        inside_port,
        protocol,
    }
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
            let (got, peer) = server.recv_from(&mut buffer).unwrap();
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

fn programs_of_every_day_work(world: &World) {
    let guest = Guest::new();
    let port = serve(&world.internet, any(INTERNET_V6), |mut stream| {
        let mut request = [0; 4096];
        let _ = stream.read(&mut request);
        let _ = stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello");
    });
    guest.net.run(move || {
        for url in [format!("http://{INTERNET_V4}:{port}/"), format!("http://[{INTERNET_V6}]:{port}/")] {
            assert_eq!(sh(&format!("curl -sSg -m 20 '{url}'")), "hello");
        }
        // nc closes its sending half at the end of its input and waits for the answer.
        let answer = sh(&format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -N -w 20 {INTERNET_V4} {port}"));
        assert!(answer.ends_with("hello"), "{answer}");
    });
}

/// How often the stack's threads have gone to sleep.
fn sleeps() -> u64 {
    let mut sum = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let Ok(status) = std::fs::read_to_string(task.path().join("status")) else { continue };
        // By its whole name: the test program may be called by a longer one.
        if status.starts_with("Name:\tnetstack\n") {
            let line = status.lines().find(|line| line.starts_with("voluntary_ctxt")).unwrap();
            sum += line.rsplit('\t').next().unwrap().parse::<u64>().unwrap();
        }
    }
    sum
}

fn idle_means_no_wake_up(world: &World) {
    let guest = Guest::new();
    let (addr, server) = accept_one(&world.internet, INTERNET_V4);
    let mut client = guest.net.run(move || connect(addr).unwrap());
    let mut server = server.join().unwrap();
    client.write_all(&pattern(10, 1_000_000)).unwrap();
    server.read_exact(&mut vec![0; 1_000_000]).unwrap();
    // IPv6 of the guest's kernel is chatty for some seconds after the link came up, and timers of the transfer run out.
    let quiet = |ms| {
        let before = sleeps();
        let (reader, _writer) = std::io::pipe().unwrap();
        let mut fds =
            [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(&reader), nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut fds, nix::poll::PollTimeout::from(ms)).unwrap();
        sleeps() - before
    };
    wait_until("two seconds without a wake-up", || quiet(2_000u16) == 0);
    // The connection is still there.
    server.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
}

fn stopping_ends_every_flow(world: &World) {
    let guest = Guest::new();
    let (addr, server) = accept_one(&world.internet, INTERNET_V4);
    let _client = guest.net.run(move || connect(addr).unwrap());
    let mut server = server.join().unwrap();
    guest.stack.stop();
    assert!(matches!(server.read(&mut [0; 10]), Ok(0) | Err(_)));
}

fn the_stack_ends_with_its_namespace(_: &World) {
    let Guest { net, stack, .. } = Guest::new();
    net.run(|| sh("ip link delete tap0"));
    wait_until("the stack ended", || !stack.is_running());
    drop(net);
    stack.stop();
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
