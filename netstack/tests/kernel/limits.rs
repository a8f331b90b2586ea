//! Floods, and what happens when descriptors run out.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use netstack::Protocol;
use nix::sys::resource::{Resource, getrlimit};

use crate::common::*;
use crate::tools::*;

crate::tests! {
    tcp_without_descriptors_is_refused_politely,
    tcp_flood_of_half_open_connections_is_bounded,
    udp_to_ten_thousand_ports_costs_a_bounded_number_of_sockets,
    ports_beyond_the_descriptors_are_refused,
    idle_datagrams_give_way_to_connections,
    silent_hosts_give_way_to_connections,
    floods_harm_nobody_and_leave_nothing,
    peers_that_never_read_cost_their_rings_and_no_more,
    peers_that_send_a_byte_a_second_are_all_served,
    a_flood_at_a_published_port_leaves_the_others_alone,
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
    let port = serve(&world.internet, INTERNET_V4, |mut stream| drop(stream.read(&mut [0; 1])));
    guest.net.run(move || {
        let streams: Vec<_> = (0..10).map(|_| connect(at(INTERNET_V4, port)).unwrap()).collect();
        drop(streams);
    });
    // What was closed can be had again.
    assert!(control.unpublish(ports[0].id).unwrap().is_some());
    control.publish(&publish(None, 80, Protocol::Udp)).unwrap();
}

/// Connects to `port` from `guest` until there is no descriptor for another; what there is then.
fn fill(guest: &Guest, port: u16) -> Vec<TcpStream> {
    guest.net.run(move || {
        let mut streams = Vec::new();
        while let Ok(stream) = connect(at(INTERNET_V4, port)) {
            streams.push(stream);
        }
        streams
    })
}

fn echo(mut stream: TcpStream) {
    let _ = std::io::copy(&mut stream.try_clone().unwrap(), &mut stream);
}

fn idle_datagrams_give_way_to_connections(world: &World) {
    let guest = with_descriptors(1_024, Guest::new);
    let port = serve(&world.internet, INTERNET_V4, echo);
    let server = udp_echo(&world.internet, INTERNET_V4);
    let ask = move |socket: &UdpSocket| {
        socket.send_to(b"x", server).unwrap();
        socket.recv_from(&mut [0]).is_ok()
    };
    let (busy, idle) = guest.net.run(move || {
        let [busy, idle] = [20, 100].map(|count| -> Vec<UdpSocket> {
            (0..count).map(|_| UdpSocket::bind("0.0.0.0:0").unwrap()).collect()
        });
        for socket in busy.iter().chain(&idle) {
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            assert!(ask(socket));
        }
        (busy, idle)
    });
    let streams = fill(&guest, port);
    let stats = guest.stack.stats();
    assert_eq!((stats.udp_flows, stats.evicted), (120, 0), "nothing has been idle for long");
    let more = guest.net.run(move || {
        let mut more = Vec::new();
        wait_until("as many connections more as datagrams were idle, but for what they are left", || {
            assert!(busy.iter().all(ask), "who talks stays");
            more.extend(connect(at(INTERNET_V4, port)).ok());
            more.len() == 60
        });
        more
    });
    assert!(guest.stack.stats().evicted >= 60, "{:?}", guest.stack.stats());
    for mut stream in streams.iter().chain(&more) {
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
    }
    // Whose socket is gone gets another.
    drop((streams, more));
    wait_until("flows gone", || guest.stack.stats().tcp_flows == 0);
    assert!(guest.net.run(move || idle.iter().all(ask)));
}

/// Begins to connect to `to`, whatever comes of it.
fn knock(to: SocketAddr) -> OwnedFd {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let fd = socket(family, SockType::Stream, flags, None).unwrap();
    let _ = connect(fd.as_raw_fd(), &SockaddrStorage::from(to));
    fd
}

/// A network that leads to nobody: connecting takes minutes.
fn nowhere() {
    sh(
        "ip route replace 203.0.113.0/24 dev host0
        for host in 9 10 11 12; do ip neigh replace 203.0.113.$host lladdr 02:00:00:00:00:09 dev host0; done",
    );
}

fn silent_hosts_give_way_to_connections(world: &World) {
    nowhere();
    let guest = with_descriptors(1_024, Guest::new);
    let port = serve(&world.internet, INTERNET_V4, echo);
    let _held = guest.net.run(|| (0..600).map(|_| knock(at("203.0.113.9", 80))).collect::<Vec<_>>());
    // The limit of those that are not answered leaves some for others at once.
    let streams = fill(&guest, port);
    assert!(streams.len() >= 100, "{}", streams.len());
    guest.net.run(move || {
        let mut more = Vec::new();
        wait_until("a hundred more", || {
            more.extend(connect(at(INTERNET_V4, port)).ok());
            more.len() == 100
        });
        for mut stream in streams.iter().chain(&more) {
            stream.write_all(b"x").unwrap();
            stream.read_exact(&mut [0]).unwrap();
        }
    });
}

/// This process's descriptors.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// A connection that asks and is answered all the time, until it is stopped; how often that was.
struct Conversation {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicUsize>,
    thread: JoinHandle<()>,
}

impl Conversation {
    fn begin(guest: &Guest, port: u16) -> Self {
        let (stop, count) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&count));
        let thread = guest.net.spawn(move || {
            let mut stream = connect(at(INTERNET_V4, port)).unwrap();
            while !stopped.load(Ordering::Relaxed) {
                stream.write_all(b"question").unwrap();
                stream.read_exact(&mut [0; 8]).unwrap();
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self { stop, count, thread }
    }

    /// Waits until there were some exchanges more.
    fn goes_on(&self) {
        let before = self.count.load(Ordering::Relaxed);
        wait_until("the conversation goes on", || self.count.load(Ordering::Relaxed) >= before + 20);
    }

    fn end(self) {
        self.goes_on();
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}

fn floods_harm_nobody_and_leave_nothing(world: &World) {
    nowhere();
    // The host gives up after three seconds, in which a flow of nobody's takes a descriptor.
    let retries = "/proc/sys/net/ipv4/tcp_syn_retries";
    let before = std::fs::read_to_string(retries).unwrap();
    std::fs::write(retries, "1").unwrap();
    let port = serve(&world.internet, INTERNET_V4, echo);
    let at_rest = descriptors();
    let guest = with_descriptors(1_024, Guest::new);
    let conversation = Conversation::begin(&guest, port);
    conversation.goes_on();
    let warm = private_memory();
    for round in 0..3u64 {
        let mut random = Random(round + 1);
        guest.net.run(move || {
            let sockets: Vec<UdpSocket> = (0..200).map(|_| UdpSocket::bind("0.0.0.0:0").unwrap()).collect();
            let mut held = VecDeque::new();
            for _ in 0..4_000 {
                let port = u16::try_from(random.below(65_535)).unwrap() + 1;
                let host = random.below(4);
                // Of the world: who does not answer, whom there is not, and who refuses; and whom the rules refuse.
                let to = match random.below(6) {
                    0 | 1 => at(&format!("203.0.113.{}", 9 + host), port),
                    2 => at(&format!("198.51.100.{}", 100 + host), port),
                    3 => at(INTERNET_V4, port),
                    4 => at(&format!("169.254.169.{host}"), port),
                    _ => at(&format!("10.{}.{}.{host}", random.below(256), random.below(256)), port),
                };
                held.push_back(knock(to));
                if held.len() > 500 {
                    held.pop_front();
                }
                for _ in 0..3 {
                    let from = usize::try_from(random.below(200)).unwrap();
                    let _ = sockets[from].send_to(b"a flood", to);
                }
            }
        });
        conversation.goes_on();
        let grown = private_memory().saturating_sub(warm);
        assert!(grown < 24 << 10, "{grown} KiB more after {} connections", (round + 1) * 4_000);
    }
    let stats = guest.stack.stats();
    assert!(stats.udp_flows <= 128 && stats.evicted > 1_000, "{stats:?}");
    wait_until("half-open flows are given up", || guest.stack.stats().tcp_flows == 1);
    conversation.end();
    guest.stack.stop();
    drop(guest.net);
    std::fs::write(retries, before).unwrap();
    wait_until("descriptors are returned", || descriptors() <= at_rest);
}

fn peers_that_never_read_cost_their_rings_and_no_more(world: &World) {
    const COUNT: usize = 200;
    let guest = Guest::new();
    let listener = world.internet.run(|| TcpListener::bind((INTERNET_V4, 0)).unwrap());
    let addr = listener.local_addr().unwrap();
    let port = serve(&world.internet, INTERNET_V4, echo);
    let conversation = Conversation::begin(&guest, port);
    let warm = private_memory();
    let accepted = std::thread::spawn(move || -> Vec<TcpStream> {
        (0..COUNT).map(|_| listener.accept().unwrap().0).collect()
    });
    let mut clients = guest.net.run(move || -> Vec<TcpStream> {
        let clients: Vec<TcpStream> = (0..COUNT).map(|_| connect(addr).unwrap()).collect();
        clients.iter().for_each(|client| client.set_nonblocking(true).unwrap());
        clients
    });
    let mut servers = accepted.join().unwrap();
    let data = vec![7; 1 << 16];
    let mut sent = vec![0; COUNT];
    // Until a turn over all finds no room at any of them.
    wait_until("nobody takes more", || {
        let mut all = 0;
        for (client, sent) in clients.iter_mut().zip(&mut sent) {
            if let Ok(some) = client.write(&data) {
                *sent += some;
                all += some;
            }
        }
        conversation.goes_on();
        all == 0
    });
    let grown = private_memory().saturating_sub(warm);
    // The rings towards the world of 63 flows, and of the others.
    let rings = (63 * 512 + (COUNT - 63) * 128) + (16 << 10);
    assert!(grown < rings, "{grown} KiB of {rings}");
    // All of it is there when they read at last.
    clients.iter().for_each(|client| client.shutdown(Shutdown::Write).unwrap());
    for (server, sent) in servers.iter_mut().zip(&sent) {
        let server = &mut patient(server.try_clone().unwrap());
        assert_eq!(std::io::copy(server, &mut std::io::sink()).unwrap(), *sent as u64);
    }
    conversation.end();
}

fn peers_that_send_a_byte_a_second_are_all_served(world: &World) {
    let full = std::env::var_os("NETSTACK_FULL").is_some();
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    // Both ends of each, and the stack's.
    let count = if full { 10_000.min(usize::try_from(most).unwrap() / 3 - 200) } else { 1_000 };
    let guest = Guest::new();
    let listener = world.internet.run(|| TcpListener::bind((INTERNET_V4, 0)).unwrap());
    let addr = listener.local_addr().unwrap();
    let accepted = std::thread::spawn(move || -> Vec<TcpStream> {
        (0..count).map(|_| listener.accept().unwrap().0).collect()
    });
    let before = private_memory();
    let clients: Vec<TcpStream> = guest.net.run(move || (0..count).map(|_| connect(addr).unwrap()).collect());
    let servers = accepted.join().unwrap();
    let mut warm = 0;
    for second in 0..if full { 30 } else { 5 } {
        // The second is what the kernel's clock says, and not how long a byte takes.
        let begun = Instant::now();
        for mut server in &servers {
            server.write_all(&[second]).unwrap();
        }
        for mut client in &clients {
            let mut byte = [0];
            client.read_exact(&mut byte).unwrap();
            assert_eq!(byte, [second]);
        }
        if second == 0 {
            warm = private_memory();
        }
        let _ = nix::poll::poll(
            &mut [],
            nix::poll::PollTimeout::try_from(Duration::from_secs(1).saturating_sub(begun.elapsed())).unwrap(),
        );
    }
    let after = private_memory();
    println!(
        "  {count} connections: {} KiB before, {warm} KiB after a byte each, {after} KiB at the end",
        before
    );
    // A page for every fourth: those that happen to rest give theirs back for a while.
    assert!(after <= warm + 2_048 + count, "{warm} KiB, then {after} KiB");
    assert!(after.saturating_sub(before) / count <= 16, "{before} KiB, then {after} KiB");
    drop((clients, servers));
    // So many ends at once are more than the TAP's queue takes; those that were lost are asked for after a minute.
    wait_for(PATIENCE + Duration::from_secs(if full { 180 } else { 0 }), "flows gone", || {
        guest.stack.stats().tcp_flows == 0
    });
}

fn a_flood_at_a_published_port_leaves_the_others_alone(world: &World) {
    let port = serve(&world.internet, INTERNET_V4, echo);
    // And the listener inside, whose thread goes on for ever.
    let at_rest = descriptors() + 1;
    let guest = with_descriptors(1_024, || {
        Guest::with(&spec(), &[publish(None, 80, Protocol::Tcp), publish(None, 81, Protocol::Tcp)])
    });
    let [flooded, other] = [guest.published[0].port(), guest.published[2].port()];
    let conversation = Conversation::begin(&guest, port);
    // A server that accepts nobody, and one that does.
    let (deaf, open) = guest
        .net
        .run(|| (TcpListener::bind("0.0.0.0:80").unwrap(), TcpListener::bind("0.0.0.0:81").unwrap()));
    std::thread::spawn(move || open.incoming().map_while(Result::ok).for_each(echo));
    let warm = private_memory();
    for _ in 0..2 {
        let flood = world
            .internet
            .run(move || (0..1_500).map(|_| knock(at("198.51.100.1", flooded))).collect::<Vec<_>>());
        conversation.goes_on();
        let grown = private_memory().saturating_sub(warm);
        assert!(grown < 24 << 10, "{grown} KiB more");
        drop(flood);
        // Those that were accepted go with their peers; whoever comes next is served.
        wait_until("somebody else is served", || {
            world.internet.run(move || {
                let Ok(mut stream) = connect(at("198.51.100.1", other)) else { return false };
                stream.write_all(b"x").is_ok() && stream.read_exact(&mut [0]).is_ok()
            })
        });
    }
    drop(deaf);
    conversation.end();
    wait_until("flows gone", || guest.stack.stats().tcp_flows == 0);
    guest.stack.stop();
    drop(guest.net);
    wait_until("descriptors are returned", || descriptors() <= at_rest);
}
