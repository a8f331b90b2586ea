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
    what_the_inside_leads_elsewhere_crosses_the_tap,
    a_thousand_joined_connections_are_served,
    joined_data_waits_for_who_does_not_read,
    urgent_data_passes_a_joined_connection,
    joined_connections_obey_rates_and_are_told,
    joined_connections_work_with_few_descriptors,
    without_a_maker_of_sockets_connections_cross_the_tap,
    without_answers_of_the_maker_connections_cross_the_tap,
    answers_that_cannot_carry_a_socket_say_so,
    what_is_no_good_answer_is_not_used,
    no_connection_meets_itself,
    without_a_port_inside_connections_cross_the_tap,
    a_server_that_resets_at_once_is_met_once,
    nothing_behind_urgent_data_is_lost,
    each_place_of_the_server_is_told_apart,
    what_a_joined_server_sent_last_arrives,
    connections_that_a_full_backlog_leaves_waiting_give_way,
}

const GUEST_V4: &str = "10.0.2.100";
const GUEST_V6: &str = "fd00::100";

fn guest(spec: &StackSpec) -> Guest {
    Guest::joined(spec, &[publish(None, 8080, Protocol::Tcp)])
}

fn listener(guest: &Guest, ip: &'static str) -> TcpListener {
    guest.net.run(move || TcpListener::bind((ip, 8080)).unwrap())
}

/// A guest whose maker of sockets is the test's.
fn guest_of(spec: &StackSpec) -> (Guest, netstack::SocketMaker) {
    let published = netstack::Published::bind(&[publish(None, 8080, Protocol::Tcp)]).unwrap();
    let (inside, maker) = netstack::inside_sockets().unwrap();
    (Guest::in_net(Net::new(), spec, published.through(inside)), maker)
}

/// Whom a server sees when the next client comes, who is served.
fn seen_by(guest: &Guest, listener: &TcpListener) -> IpAddr {
    let mut client = connect(at("127.0.0.1", guest.published[0].port())).unwrap();
    greet(&mut client, listener)
}

fn greet(client: &mut TcpStream, listener: &TcpListener) -> IpAddr {
    let (stream, peer) = listener.accept().unwrap();
    patient(stream).write_all(b"hello").unwrap();
    client.read_exact(&mut [0; 5]).unwrap();
    peer.ip().to_canonical()
}

fn is(ip: &str) -> IpAddr {
    ip.parse().unwrap()
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
    // The link had the last word.
    assert_eq!((guest.stack.stats().tcp_joined, guest.stack.stats().tcp_in), (0, 3));
}

fn what_the_inside_leads_elsewhere_crosses_the_tap(_: &World) {
    let guest = guest(&spec());
    let server = listener(&guest, "::");
    assert_eq!(seen_by(&guest, &server), is(GUEST_V4));
    drop(server);
    // The guest forwards what comes by the link, as it would by a rule of its NAT, and refuses connections of its own.
    let other = Net::new();
    let path = other.path();
    guest.net.run(move || {
        sh(&format!(
            "ip link add far type veth peer name near netns {path}
             ip addr add 192.0.2.1/24 dev far
             ip link set far up
             for name in ipv4/ip_forward ipv4/conf/far/accept_local; do echo 1 > /proc/sys/net/$name; done
             ip rule add pref 10 lookup local
             ip rule del pref 0
             ip rule add pref 5 iif tap0 lookup 100
             ip route add 10.0.2.100 via 192.0.2.2 table 100"
        ))
    });
    other.run(|| {
        sh("ip addr add 192.0.2.2/24 dev near
            ip addr add 10.0.2.100/32 dev near
            ip link set near up
            ip route add default via 192.0.2.1")
    });
    let far = other.run(|| TcpListener::bind(("0.0.0.0", 8080)).unwrap());
    assert_eq!(seen_by(&guest, &far), is(GATEWAY_V4));
    // The same if nobody refuses, but the guest has another address. It would be found by its IPv6 address.
    guest.net.run(|| sh("ip addr del 10.0.2.100/24 dev tap0; ip addr add 10.0.2.101/24 dev tap0"));
    for (listener, word) in [(far, b"far "), (listener(&guest, "::"), b"near")] {
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            patient(stream).write_all(word)
        });
    }
    let opens = || guest.net.run(|| sh("grep ^Tcp: /proc/net/snmp | tail -1 | cut -d ' ' -f 6"));
    let before = opens();
    let mut word = [0; 4];
    connect(at("127.0.0.1", guest.published[0].port())).unwrap().read_exact(&mut word).unwrap();
    assert_eq!(&word, b"far ");
    // No SYN was made inside, for whoever has that address there.
    assert_eq!(opens(), before);
    assert_eq!((guest.stack.stats().tcp_joined, guest.stack.stats().tcp_in), (1, 3));
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
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
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
    let (guest, maker) = guest_of(&spec());
    let listener = listener(&guest, "0.0.0.0");
    let port = guest.published[0].port();
    // One is there and one waits for a socket when the maker goes.
    let mut open = connect(at("127.0.0.1", port)).unwrap();
    wait_until("the first is asked for", || guest.stack.stats().tcp_flows == 1);
    let maker = guest.net.run(move || {
        wait_until("a question", || {
            use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
            let fd = std::os::fd::AsFd::as_fd(&maker);
            poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::ZERO) == Ok(1)
        });
        assert!(maker.answer());
        maker
    });
    let (stream, peer) = listener.accept().unwrap();
    assert_eq!(peer.ip(), is(GUEST_V4));
    let mut first = connect(at("127.0.0.1", port)).unwrap();
    wait_until("the flow", || guest.stack.stats().tcp_flows == 2);
    drop(maker);
    let mut second = connect(at("::1", port)).unwrap();
    for client in [&mut first, &mut second] {
        assert_eq!(greet(client, &listener), is(GATEWAY_V4));
    }
    assert_eq!(guest.stack.stats().tcp_joined, 1);
    patient(stream).write_all(b"hello").unwrap();
    open.read_exact(&mut [0; 5]).unwrap();
}

fn without_answers_of_the_maker_connections_cross_the_tap(_: &World) {
    let (guest, maker) = guest_of(&spec());
    let listener = listener(&guest, "0.0.0.0");
    // More than are asked for at once.
    let port = guest.published[0].port();
    let mut clients: Vec<TcpStream> = (0..70).map(|_| connect(at("127.0.0.1", port)).unwrap()).collect();
    let servers: Vec<_> = clients.iter().map(|_| listener.accept().unwrap()).collect();
    for (stream, peer) in servers {
        assert_eq!(peer.ip(), is(GATEWAY_V4));
        patient(stream).write_all(b"hello").unwrap();
    }
    clients.iter_mut().for_each(|client| client.read_exact(&mut [0; 5]).unwrap());
    assert_eq!((guest.stack.stats().tcp_joined, guest.stack.stats().tcp_in), (0, 70));
    // The maker comes back; what it answers now to the old questions is of no use, and does no harm.
    guest.net.spawn(move || make_sockets(&maker));
    assert_eq!(seen_by(&guest, &listener), is(GUEST_V4));
}

fn answers_that_cannot_carry_a_socket_say_so(_: &World) {
    use nix::sys::socket::{ControlMessage, UnixAddr, sendmsg};
    use std::os::fd::AsRawFd as _;
    let (limit, in_flight) = (500, 3 * 250);
    let guest = guest(&spec());
    let listener = listener(&guest, "0.0.0.0");
    assert_eq!(seen_by(&guest, &listener), is(GUEST_V4));
    // The kernel takes no more descriptors of a user without privilege who has so many under way. The payload is the same
    // user as the maker.
    let (queue, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    for _ in 0..in_flight / 250 {
        let fds = [queue.as_raw_fd(); 250];
        let rights = [ControlMessage::ScmRights(&fds)];
        let byte = [std::io::IoSlice::new(b"x")];
        sendmsg::<UnixAddr>(queue.as_raw_fd(), &byte, &rights, MsgFlags::empty(), None).unwrap();
    }
    with_descriptors(limit, || {
        for _ in 0..70 {
            assert_eq!(seen_by(&guest, &listener), is(GATEWAY_V4));
        }
    });
    drop((queue, _other));
    // The kernel collects what nobody can receive any more in its own time.
    wait_until("sockets come again", || seen_by(&guest, &listener) == is(GUEST_V4));
}

fn what_is_no_good_answer_is_not_used(_: &World) {
    use nix::sys::socket::{
        AddressFamily, ControlMessage, SockFlag, SockType, UnixAddr, recv, sendmsg, socket,
    };
    use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
    let (guest, maker) = guest_of(&spec());
    let listener = listener(&guest, "0.0.0.0");
    let answer = |maker: &netstack::SocketMaker, question: &[u8], fds: &[OwnedFd]| {
        let whole = [question, &[0; 4]].concat();
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        let whole = [std::io::IoSlice::new(&whole)];
        sendmsg::<UnixAddr>(maker.as_fd().as_raw_fd(), &whole, control, MsgFlags::MSG_DONTWAIT, None)
    };
    let open = |family, kind| socket(family, kind, SockFlag::SOCK_CLOEXEC, None).unwrap();
    let port = guest.published[0].port();
    // Nobody has asked. As much as there is room for, time and again.
    let unasked = [1, 0, 0, 0, 0, 0, 0, 0, 4];
    for _ in 0..10_000 {
        let _ = answer(&maker, &unasked, &[open(AddressFamily::Inet, SockType::Stream)]);
    }
    let round = |fds: &mut dyn FnMut() -> Vec<OwnedFd>| {
        let mut client = connect(at("127.0.0.1", port)).unwrap();
        let mut question = [0; 9];
        let flags = MsgFlags::empty();
        wait_until("a question", || recv(maker.as_fd().as_raw_fd(), &mut question, flags) == Ok(9));
        wait_until("answered", || answer(&maker, &question, &fds()).is_ok());
        greet(&mut client, &listener)
    };
    // No TCP socket, or one of the other family.
    let no_socket = || vec![std::fs::File::open("/dev/null").unwrap().into()];
    assert_eq!(round(&mut { no_socket }), is(GATEWAY_V4));
    for (family, kind) in [
        (AddressFamily::Inet, SockType::Datagram),
        (AddressFamily::Unix, SockType::Stream),
        (AddressFamily::Inet6, SockType::Stream),
    ] {
        assert_eq!(round(&mut || vec![open(family, kind)]), is(GATEWAY_V4), "{family:?} {kind:?}");
    }
    assert_eq!(round(&mut Vec::new), is(GATEWAY_V4));
    // One that waits for the other end: others would wait, too.
    let net = guest.net.clone();
    let blocking = move || vec![net.run(move || open(AddressFamily::Inet, SockType::Stream))];
    assert_eq!(round(&mut { blocking }), is(GUEST_V4));
    assert_eq!(
        round(&mut || vec![open(AddressFamily::Inet, SockType::Stream), no_socket().remove(0)]),
        is(GATEWAY_V4)
    );
    // That was the last answer that anybody listened to.
    wait_until("the maker is not listened to", || {
        answer(&maker, &unasked, &[]) == Err(nix::errno::Errno::EPIPE)
    });
    assert_eq!(seen_by(&guest, &listener), is(GATEWAY_V4));
}

/// A guest whose kernel chooses from these ports, with a server's port published.
fn guest_with_ports(ports: &'static str, inside_port: u16) -> Guest {
    let guest = Guest::joined(&spec(), &[publish(None, inside_port, Protocol::Tcp)]);
    guest.net.run(move || std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", ports).unwrap());
    guest
}

fn no_connection_meets_itself(_: &World) {
    // It might be chosen, among few, or nothing else can be.
    for ports in ["40000 40003", "39997 40000", "40000 40000"] {
        let guest = guest_with_ports(ports, 40_000);
        for _ in 0..50 {
            let answer = connect(at("127.0.0.1", guest.published[0].port())).and_then(|mut client| {
                client.write_all(b"anybody there?")?;
                client.read(&mut [0; 10])
            });
            assert!(answer.is_err(), "{ports}: {answer:?}");
        }
        assert_eq!((guest.stack.stats().tcp_joined, guest.stack.stats().tcp_in), (0, 50));
        // The server gets its port.
        let listener = guest.net.run(|| TcpListener::bind(("0.0.0.0", 40_000)).unwrap());
        if ports != "40000 40000" {
            assert_eq!(seen_by(&guest, &listener), is(GUEST_V4), "{ports}");
        }
    }
}

fn without_a_port_inside_connections_cross_the_tap(_: &World) {
    let guest = guest_with_ports("50000 50003", 8080);
    let listener = listener(&guest, "0.0.0.0");
    let pairs: Vec<_> = (0..4).map(|_| pair(&guest, &listener)).collect();
    wait_until("joined", || guest.stack.stats().tcp_joined == 4);
    assert_eq!(seen_by(&guest, &listener), is(GATEWAY_V4));
    assert_eq!((guest.stack.stats().tcp_in, guest.stack.stats().tcp_joined), (5, 4));
    drop(pairs);
}

fn a_server_that_resets_at_once_is_met_once(_: &World) {
    let guest = guest(&spec());
    let listener = listener(&guest, "::");
    let met = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let meeting = std::sync::Arc::clone(&met);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            meeting.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            let mut stream = stream.unwrap();
            let _ = stream.write_all(b"go away");
            reset(stream);
        }
    });
    let mut heard = 0;
    for _ in 0..500 {
        // Not the one with a time-out, which may take the reset for its own.
        let mut client = TcpStream::connect(at("127.0.0.1", guest.published[0].port())).map(patient).unwrap();
        let mut all = Vec::new();
        let end = client.read_to_end(&mut all);
        assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert!(all.is_empty() || all == b"go away", "{all:?}");
        heard += u64::from(!all.is_empty());
    }
    // Over the TAP, which is the way of those for whom there was no socket in time, a reset overtakes data.
    let joined = guest.stack.stats().tcp_joined;
    assert!(heard >= joined && joined > 0, "{heard} of {joined}");
    assert_eq!(met.load(std::sync::atomic::Ordering::SeqCst), 500);
}

fn nothing_behind_urgent_data_is_lost(_: &World) {
    use std::os::fd::AsRawFd as _;
    let guest = guest(&spec());
    let listener = listener(&guest, "0.0.0.0");
    let data = pattern(5, 400_000);
    for round in 0..300 {
        let (client, mut server) = pair(&guest, &listener);
        let reading = std::thread::spawn(move || {
            let mut all = Vec::new();
            server.read_to_end(&mut all).map(|_| all)
        });
        let mut client = client;
        client.write_all(&data).unwrap();
        nix::sys::socket::send(client.as_raw_fd(), b"!", MsgFlags::MSG_OOB).unwrap();
        client.write_all(&data[..5_000]).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let all = reading.join().unwrap().unwrap();
        let whole = [&data[..], b"!", &data[..5_000]].concat();
        assert!(all == whole, "{round}: {} of {}", all.len(), whole.len());
    }
}

fn what_a_joined_server_sent_last_arrives(_: &World) {
    for reads in [true, false] {
        let guest = guest(&spec());
        let listener = listener(&guest, "0.0.0.0");
        let (mut client, mut server) = pair(&guest, &listener);
        let sent = fill(&mut server);
        drop(server);
        let mut read = move || {
            let mut all = Vec::new();
            client.read_to_end(&mut all).map(|_| all.len()).map_err(|error| error.kind())
        };
        let drain = move || {
            guest.stack.drain(None);
            guest.stack.stop();
        };
        if reads {
            let reader = std::thread::spawn(read);
            drain();
            assert_eq!(reader.join().unwrap(), Ok(sent));
        } else {
            // It is not waited for, and learns that this is not all.
            drain();
            assert_eq!(read(), Err(ErrorKind::ConnectionReset));
        }
    }
}

fn connections_that_a_full_backlog_leaves_waiting_give_way(world: &World) {
    let ports = [8080, 8081].map(|port| publish(Some("127.0.0.1"), port, Protocol::Tcp));
    let guest = with_descriptors(128, || Guest::joined(&spec(), &ports));
    let full = listener(&guest, "::");
    nix::sys::socket::listen(&full, nix::sys::socket::Backlog::new(1).unwrap()).unwrap();
    // As many as the host's kernel takes for us.
    let flood: Vec<_> = (0..200).map(|_| connect(guest.published[0]).unwrap()).collect();
    let good = guest.net.run(|| TcpListener::bind(("0.0.0.0", 8081)).unwrap());
    for _ in 0..3 {
        let mut client = connect(guest.published[1]).unwrap();
        greet(&mut client, &good);
    }
    // Connections of the guest's own, too.
    let (addr, server) = accept_one(&world.internet, INTERNET_V4);
    guest.net.run(move || {
        wait_until("connected", || connect(addr).is_ok());
    });
    server.join().unwrap();
    assert!(guest.stack.stats().evicted > 0);
    drop(flood);
}

fn each_place_of_the_server_is_told_apart(_: &World) {
    let (log, lines) = flow_lines();
    let guest = guest(&StackSpec { flow_log: Some(log), ..spec() });
    let listener = listener(&guest, GUEST_V6);
    let (client, server) = pair(&guest, &listener);
    drop((client, server));
    wait_until("the flow is gone", || guest.stack.stats().tcp_flows == 0);
    for line in [
        format!("tcp in {GUEST_V4} opened"),
        format!("tcp in {GUEST_V4} closed refused-inside none none"),
        format!("tcp in {GUEST_V6} opened"),
        format!("tcp in {GUEST_V6} closed finished none none"),
    ] {
        assert_eq!(lines.recv_timeout(PATIENCE).unwrap(), line);
    }
    // Where there is none, both are told once more, as seen across the TAP.
    drop(listener);
    assert!(connect(at("127.0.0.1", guest.published[0].port())).and_then(|mut s| s.read(&mut [0])).is_err());
    for ip in [GUEST_V4, GUEST_V6, GATEWAY_V4, GATEWAY_V6] {
        for what in ["opened", "closed refused-inside"] {
            let line = lines.recv_timeout(PATIENCE).unwrap();
            assert!(line.starts_with(&format!("tcp in {ip} {what}")), "{line}");
        }
    }
    // Across the TAP as well.
    let (log, lines) = flow_lines();
    let guest =
        Guest::with(&StackSpec { flow_log: Some(log), ..spec() }, &[publish(None, 8080, Protocol::Tcp)]);
    let listener = self::listener(&guest, GUEST_V6);
    let (client, server) = pair(&guest, &listener);
    drop((client, server));
    wait_until("the flow is gone", || guest.stack.stats().tcp_flows == 0);
    for (ip, what) in [(GATEWAY_V4, "opened"), (GATEWAY_V4, "closed refused-inside"), (GATEWAY_V6, "opened")]
    {
        let line = lines.recv_timeout(PATIENCE).unwrap();
        assert!(line.starts_with(&format!("tcp in {ip} {what}")), "{line}");
    }
}
