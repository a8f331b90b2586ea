//! Connections from the host's loopback to published ports, where somebody makes sockets inside.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use netstack::{Capture, Protocol, Rate, Rates, StackSpec};
use nix::sys::socket::MsgFlags;

use crate::common::*;
use crate::flowlog::flow_lines;
use crate::tools::*;

crate::tests! {
    loopback_connections_are_joined_to_sockets_inside,
    other_connections_are_not,
    joined_connections_end_as_their_ends_do,
    joined_connections_without_a_server_are_reset,
    a_thousand_joined_connections_are_served,
    joined_data_waits_for_who_does_not_read,
    urgent_data_passes_a_joined_connection,
    joined_connections_obey_rates_and_are_told,
    joined_connections_work_with_few_descriptors,
    without_a_maker_of_sockets_connections_cross_the_tap,
}

const GUEST_V4: &str = "10.0.2.100";
const GUEST_V6: &str = "fd00::100";

fn guest(spec: &StackSpec) -> Guest {
    Guest::joined(spec, &[publish(None, 8080, Protocol::Tcp)])
}

fn listener(guest: &Guest, ip: &'static str) -> TcpListener {
    guest.net.run(move || TcpListener::bind((ip, 8080)).unwrap())
}

/// The client's end of a joined connection, and the server's.
fn pair(guest: &Guest, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let client = connect(at("127.0.0.1", guest.published[0].port())).unwrap();
    (client, patient(listener.accept().unwrap().0))
}

fn loopback_connections_are_joined_to_sockets_inside(_: &World) {
    let guest = guest(&spec());
    let port = guest.published[0].port();
    let mut joined = 0;
    for (bound, seen) in [("0.0.0.0", GUEST_V4), (GUEST_V4, GUEST_V4), ("::", GUEST_V4), (GUEST_V6, GUEST_V6)]
    {
        for to in ["127.0.0.1", "::1"] {
            let listener = listener(&guest, bound);
            let server = std::thread::spawn(move || {
                let (stream, peer) = listener.accept().unwrap();
                let mut stream = patient(stream);
                // Both ways at once, in pieces of all sizes.
                let mut all = Vec::new();
                let mut piece = vec![0; 300_000];
                loop {
                    let n = stream.read(&mut piece).unwrap();
                    if n == 0 {
                        break;
                    }
                    all.extend_from_slice(&piece[..n]);
                    stream.write_all(&piece[..n]).unwrap();
                }
                (all, peer)
            });
            let mut stream = connect(at(to, port)).unwrap();
            let data = pattern(8, 5_000_000);
            let mut writer = stream.try_clone().unwrap();
            let sent = data.clone();
            let writing = std::thread::spawn(move || {
                let mut rest = &sent[..];
                for size in (1..).map(|n: usize| n * n % 100_003 + 1) {
                    let (piece, left) = rest.split_at(size.min(rest.len()));
                    writer.write_all(piece).unwrap();
                    rest = left;
                    if rest.is_empty() {
                        break;
                    }
                }
                writer.shutdown(Shutdown::Write).unwrap();
            });
            let mut back = Vec::new();
            stream.read_to_end(&mut back).unwrap();
            writing.join().unwrap();
            let (arrived, peer) = server.join().unwrap();
            assert!(back == data && arrived == data, "{bound} {to}: {} bytes", back.len());
            assert_eq!(peer.ip().to_canonical(), seen.parse::<IpAddr>().unwrap(), "{bound} {to}");
            joined += 1;
            assert_eq!(guest.stack.stats().tcp_joined, joined);
        }
    }
    wait_until("flows gone", || guest.stack.stats().tcp_flows == 0);
    // Nothing of it was seen on the link.
    assert!(guest.stack.stats().bytes_to_guest < 100_000);
}

fn other_connections_are_not(world: &World) {
    let directory = std::env::temp_dir().join(format!("netstack-joined-{}", std::process::id()));
    let capture = Capture::start(std::fs::File::create(&directory).unwrap()).unwrap();
    let guests = [guest(&spec()), guest(&StackSpec { capture: Some(capture.clone()), ..spec() })];
    let _ = std::fs::remove_file(directory);
    for (guest, net, to, seen) in [
        (&guests[0], &world.internet, "198.51.100.1", INTERNET_V4),
        (&guests[0], &world.host, HOST_V4, HOST_V4),
        // A capture is to have its packets.
        (&guests[1], &world.host, "127.0.0.1", GATEWAY_V4),
    ] {
        let listener = listener(guest, "0.0.0.0");
        let port = guest.published[0].port();
        let mut client = net.run(move || connect(at(to, port)).unwrap());
        let (stream, peer) = listener.accept().unwrap();
        assert_eq!(peer.ip(), seen.parse::<IpAddr>().unwrap(), "{to}");
        patient(stream).write_all(b"hello").unwrap();
        client.read_exact(&mut [0; 5]).unwrap();
        assert_eq!((guest.stack.stats().tcp_joined, guest.stack.stats().tcp_in > 0), (0, true), "{to}");
    }
    drop(guests);
    assert!(capture.finish().seen > 5);
}

fn joined_connections_end_as_their_ends_do(_: &World) {
    let guest = guest(&spec());
    let listener = listener(&guest, "0.0.0.0");
    // Half-closed by the server first; data the other way goes on.
    let (mut client, mut server) = pair(&guest, &listener);
    server.write_all(b"last words").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    let mut words = Vec::new();
    client.read_to_end(&mut words).unwrap();
    assert_eq!(words, b"last words");
    client.write_all(b"go on").unwrap();
    server.read_exact(&mut [0; 5]).unwrap();
    assert_eq!(guest.stack.stats().tcp_flows, 1);
    drop(client);
    assert_eq!(server.read(&mut [0; 1]).unwrap(), 0);
    wait_until("the flow is gone", || guest.stack.stats().tcp_flows == 0);
    // A reset by either side is one for the other, after what was said before it.
    let (mut client, server) = pair(&guest, &listener);
    reset(server);
    assert_eq!(client.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    let (client, mut server) = pair(&guest, &listener);
    reset(client);
    assert_eq!(server.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    wait_until("the flows are gone", || guest.stack.stats().tcp_flows == 0);
    // A server that is gone with something unread: the client learns that nobody will read it.
    let (mut client, server) = pair(&guest, &listener);
    client.write_all(b"unread").unwrap();
    let mut byte = [0];
    wait_until("arrived", || server.peek(&mut byte).is_ok_and(|n| n == 1));
    drop(server);
    assert_eq!(client.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    wait_until("the flow is gone", || guest.stack.stats().tcp_flows == 0);
    // Both at once.
    let (client, server) = pair(&guest, &listener);
    client.shutdown(Shutdown::Write).unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    wait_until("the flow is gone", || guest.stack.stats().tcp_flows == 0);
}

fn joined_connections_without_a_server_are_reset(_: &World) {
    let guest = guest(&spec());
    let port = guest.published[0].port();
    let refused = |guest: &Guest| {
        let answer = connect(at("127.0.0.1", port)).and_then(|mut stream| stream.read(&mut [0; 10]));
        assert_eq!(answer.unwrap_err().kind(), ErrorKind::ConnectionReset);
        wait_until("the flow is gone", || guest.stack.stats().tcp_flows == 0);
    };
    refused(&guest);
    // What listens on the guest's loopback only is its own.
    for ip in ["127.0.0.1", "::1"] {
        let _own = listener(&guest, ip);
        refused(&guest);
    }
    assert_eq!(guest.stack.stats().tcp_joined, 3);
}

fn a_thousand_joined_connections_are_served(_: &World) {
    let guest = guest(&spec());
    let listener = listener(&guest, "0.0.0.0");
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(4096).unwrap()).unwrap();
    let port = guest.published[0].port();
    let clients: Vec<TcpStream> = (0..1_000).map(|_| connect(at("127.0.0.1", port)).unwrap()).collect();
    wait_until("connected inside", || guest.stack.stats().tcp_joined == 1_000);
    let servers: Vec<TcpStream> = (0..1_000).map(|_| patient(listener.accept().unwrap().0)).collect();
    assert_eq!((guest.stack.stats().tcp_joined, guest.stack.stats().tcp_flows), (1_000, 1_000));
    // Which is whose they find out themselves.
    for (number, mut client) in clients.iter().enumerate() {
        client.write_all(&u32::try_from(number).unwrap().to_be_bytes()).unwrap();
    }
    for mut server in &servers {
        let mut number = [0; 4];
        server.read_exact(&mut number).unwrap();
        server.write_all(&number).unwrap();
    }
    for (number, mut client) in clients.iter().enumerate() {
        let mut answer = [0; 4];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer, u32::try_from(number).unwrap().to_be_bytes());
    }
    drop((clients, servers));
    wait_until("the flows are gone", || guest.stack.stats().tcp_flows == 0);
}

/// Writes as much as goes at once; how much that was.
fn fill(stream: &mut TcpStream) -> usize {
    stream.set_write_timeout(Some(Duration::from_millis(30))).unwrap();
    let block = pattern(3, 1 << 20);
    let mut all = 0;
    loop {
        match stream.write(&block[..]) {
            Ok(n) => all += n,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return all,
            Err(error) => panic!("{error}"),
        }
    }
}

fn joined_data_waits_for_who_does_not_read(_: &World) {
    let guest = guest(&spec());
    let listener = listener(&guest, "0.0.0.0");
    let (mut client, mut server) = pair(&guest, &listener);
    let sent = fill(&mut client);
    assert!(sent < 64 << 20, "{sent}");
    // Others are not held up.
    let (mut other, mut others) = pair(&guest, &listener);
    other.write_all(b"hello").unwrap();
    others.read_exact(&mut [0; 5]).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut all = Vec::new();
    server.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), sent);
    // A reset while data waits ends it, too.
    let (mut client, server) = pair(&guest, &listener);
    fill(&mut client);
    reset(server);
    wait_until("the client is told", || client.write(b"x").is_err());
}

fn urgent_data_passes_a_joined_connection(_: &World) {
    use std::os::fd::AsRawFd as _;
    let guest = guest(&spec());
    let listener = listener(&guest, "0.0.0.0");
    let (mut client, mut server) = pair(&guest, &listener);
    // Enough at once that it would be spliced.
    let data = pattern(5, 1_000_000);
    let mut writer = client.try_clone().unwrap();
    let sent = data.clone();
    let writing = std::thread::spawn(move || {
        for piece in sent.chunks(100_000) {
            writer.write_all(piece).unwrap();
            nix::sys::socket::send(writer.as_raw_fd(), b"!", MsgFlags::MSG_OOB).unwrap();
        }
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut all = Vec::new();
    server.read_to_end(&mut all).unwrap();
    writing.join().unwrap();
    // In its place in the stream.
    assert_eq!(all.len(), data.len() + 10);
    for (got, piece) in all.chunks(100_001).zip(data.chunks(100_000)) {
        assert!(got[..100_000] == *piece && got[100_000] == b'!');
    }
    server.write_all(b"x").unwrap();
    client.read_exact(&mut [0; 1]).unwrap();
}

fn joined_connections_obey_rates_and_are_told(_: &World) {
    let (log, lines) = flow_lines();
    let rate = |bytes_per_second| Some(Rate { bytes_per_second, burst: Some(64 * 1024) });
    let rates = Rates { sent: rate(4_000_000), received: rate(4_000_000) };
    let guest = guest(&StackSpec { flow_log: Some(log), rates, ..spec() });
    let listener = listener(&guest, "0.0.0.0");
    let (mut client, mut server) = pair(&guest, &listener);
    for to_guest in [true, false] {
        let (from, to) = if to_guest { (&mut client, &mut server) } else { (&mut server, &mut client) };
        let begin = Instant::now();
        let mut writer = from.try_clone().unwrap();
        let writing = std::thread::spawn(move || writer.write_all(&pattern(1, 2_000_000)).unwrap());
        to.read_exact(&mut vec![0; 2_000_000]).unwrap();
        writing.join().unwrap();
        // What is beyond the burst takes its time.
        let least = Duration::from_secs_f64((2_000_000.0 - 65_536.0) / 4e6);
        assert!(begin.elapsed() >= least, "{to_guest}: {:?}", begin.elapsed());
    }
    // Taken away while the connection is there.
    guest.stack.control().set_rates(Rates::default()).unwrap();
    let flows = guest.stack.control().flows(10).unwrap();
    assert_eq!(flows.len(), 1);
    assert_eq!(
        (flows[0].sent.bytes, flows[0].received.bytes, flows[0].inbound),
        (2_000_000, 2_000_000, true)
    );
    assert_eq!(flows[0].remote, server.peer_addr().unwrap());
    drop((client, server));
    wait_until("the flow is gone", || guest.stack.stats().tcp_flows == 0);
    assert_eq!(lines.recv_timeout(PATIENCE).unwrap(), format!("tcp in {GUEST_V4} opened"));
    let closed = format!("tcp in {GUEST_V4} closed finished 2000000 2000000");
    assert_eq!(lines.recv_timeout(PATIENCE).unwrap(), closed);
}

fn joined_connections_work_with_few_descriptors(_: &World) {
    // 64 for the stack, an eighth of which are for names.
    let guest = with_descriptors(128, || guest(&spec()));
    let listener = listener(&guest, "0.0.0.0");
    let port = guest.published[0].port();
    let mut clients: Vec<TcpStream> = Vec::new();
    let mut servers: Vec<TcpStream> = Vec::new();
    for _ in 0..20 {
        let (client, server) = pair(&guest, &listener);
        clients.push(client);
        servers.push(server);
    }
    wait_until("all are joined", || guest.stack.stats().tcp_joined == 20);
    // There is no room for many pipes; data goes on all the same.
    let sent: Vec<usize> = clients.iter_mut().map(fill).collect();
    for client in &clients {
        client.shutdown(Shutdown::Write).unwrap();
    }
    for (server, sent) in servers.iter_mut().zip(sent) {
        let mut all = Vec::new();
        server.read_to_end(&mut all).unwrap();
        assert_eq!(all.len(), sent);
    }
    drop((clients, servers));
    wait_until("the flows are gone", || guest.stack.stats().tcp_flows == 0);
    // As many as come are served, now or when others end.
    let clients: Vec<TcpStream> = (0..100).map(|_| connect(at("127.0.0.1", port)).unwrap()).collect();
    for _ in clients {
        let mut server = patient(listener.accept().unwrap().0);
        server.write_all(b"hello").unwrap();
    }
}

fn without_a_maker_of_sockets_connections_cross_the_tap(_: &World) {
    let published = netstack::Published::bind(&[publish(None, 8080, Protocol::Tcp)]).unwrap();
    let (inside, maker) = netstack::inside_sockets().unwrap();
    let guest = Guest::in_net(Net::new(), &spec(), published.through(inside));
    let listener = listener(&guest, "0.0.0.0");
    let port = guest.published[0].port();
    // One waits for a socket when the maker goes.
    let mut first = connect(at("127.0.0.1", port)).unwrap();
    wait_until("the flow", || guest.stack.stats().tcp_flows == 1);
    drop(maker);
    let mut second = connect(at("::1", port)).unwrap();
    for client in [&mut first, &mut second] {
        let (stream, peer) = listener.accept().unwrap();
        assert_eq!(peer.ip(), GATEWAY_V4.parse::<IpAddr>().unwrap());
        patient(stream).write_all(b"hello").unwrap();
        client.read_exact(&mut [0; 5]).unwrap();
    }
    assert_eq!(guest.stack.stats().tcp_joined, 0);
}
