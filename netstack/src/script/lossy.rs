//! Two stacks and a bad link: ours, and smoltcp's own interface in the guest's place, in virtual time. The link loses
//! frames, repeats them, changes their order and some of their bits; programs at both ends read and write as they please.
//! What arrives is what was sent, every connection comes to its end, and nothing is left of it.
//!
//! The TAP does nothing of the kind. But the guest's kernel drops frames when a queue is full, and whatever a guest's
//! own network does to its packets before they reach the TAP, it does to ours.
//!
//! `NETSTACK_SEED` chooses one seed, `NETSTACK_FLOOD` says how many times as many there are.

use std::collections::{BinaryHeap, VecDeque};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::wire::{HardwareAddress, IpCidr, IpEndpoint};

use super::*;

/// What happens to frames in one direction, in thousandths.
#[derive(Debug, Clone, Copy)]
struct Weather {
    loss: usize,
    twice: usize,
    late: usize,
    damage: usize,
}

/// Frames lost one after another at most, and how long after the last one that arrived one may be lost: so no chain of
/// losses is so long that an end gives up, whatever the seed.
const LOST_IN_A_ROW: usize = 3;
const LOST_WITHIN: Duration = Duration::from_secs(20);

/// One direction of the link.
struct Way {
    weather: Weather,
    /// What is under way, the first to arrive on top.
    frames: BinaryHeap<std::cmp::Reverse<(Instant, u64, Vec<u8>)>>,
    count: u64,
    in_a_row: usize,
    /// When the last one was sent that arrives.
    last: Instant,
    happened: [usize; 4],
}

impl Way {
    fn new(weather: Weather) -> Self {
        Self {
            weather,
            frames: BinaryHeap::new(),
            count: 0,
            in_a_row: 0,
            last: Instant::ZERO,
            happened: [0; 4],
        }
    }

    fn send(&mut self, random: &mut Seeded, now: Instant, frame: &[u8]) {
        let mut happens = |permille: usize| random.below(1_000) < permille;
        let Weather { loss, twice, late, damage } = self.weather;
        let may_be_lost = self.in_a_row < LOST_IN_A_ROW && now < self.last + LOST_WITHIN;
        let events =
            [happens(loss) && may_be_lost, happens(damage) && may_be_lost, happens(twice), happens(late)];
        let [lost, damaged, twice, late] = events;
        self.in_a_row = if lost || damaged { self.in_a_row + 1 } else { 0 };
        if self.in_a_row == 0 {
            self.last = now;
        }
        for (count, event) in self.happened.iter_mut().zip(events) {
            *count += usize::from(event);
        }
        if lost {
            return;
        }
        for copy in 0..1 + usize::from(twice) {
            let mut frame = frame.to_vec();
            if damaged && copy == 0 {
                let at = random.below(frame.len());
                frame[at] ^= 1 << random.below(8);
            }
            // A late one comes behind what is sent after it.
            let delay = if late || copy > 0 { 1 + random.below(300) } else { 1 };
            let at = now + Duration::from_millis(u64::try_from(delay).expect("small"));
            self.count += 1;
            self.frames.push(std::cmp::Reverse((at, self.count, frame)));
        }
    }

    fn next_at(&self) -> Option<Instant> {
        self.frames.peek().map(|std::cmp::Reverse((at, ..))| *at)
    }

    fn arrived(&mut self, now: Instant) -> Option<Vec<u8>> {
        self.next_at().filter(|at| *at <= now)?;
        self.frames.pop().map(|std::cmp::Reverse((.., frame))| frame)
    }
}

/// The guest's network device.
struct Card {
    received: VecDeque<Vec<u8>>,
    sent: VecDeque<Vec<u8>>,
}

struct Received(Vec<u8>);

struct Sending<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        self.0.push_back(packet);
        result
    }
}

impl Device for Card {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Sending<'_>)> {
        Some((Received(self.received.pop_front()?), Sending(&mut self.sent)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        Some(Sending(&mut self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        caps.medium = Medium::Ip;
        caps.max_transmission_unit = 1_500;
        // The stack leaves sums to the driver; its own are right.
        caps.checksum.tcp = smoltcp::phy::Checksum::Tx;
        caps
    }
}

/// The segments that the driver makes of a super-segment.
fn segments(frame: &Out) -> Vec<Vec<u8>> {
    let packet = &frame.ethernet()[ETHERNET_HEADER_LEN..];
    let (kind, size) = frame.offload();
    if kind == 0 {
        return vec![packet.to_vec()];
    }
    let is_v6 = packet[0] >> 4 == 6;
    let tcp = if is_v6 { 40 } else { 20 };
    let header_len = tcp + usize::from(packet[tcp + 12] >> 4) * 4;
    let (headers, payload) = packet.split_at(header_len);
    let pieces = payload.chunks(size.into());
    let count = pieces.len();
    let piece = |(i, piece): (usize, &[u8])| {
        let mut whole = [headers, piece].concat();
        let mut segment = TcpPacket::new_unchecked(&mut whole[tcp..]);
        let seq = segment.seq_number() + i * usize::from(size);
        segment.set_seq_number(seq);
        if i + 1 < count {
            segment.set_fin(false);
            segment.set_psh(false);
        }
        let len = u16::try_from(whole.len()).expect("a segment");
        if is_v6 {
            smoltcp::wire::Ipv6Packet::new_unchecked(&mut whole[..]).set_payload_len(len - 40);
        } else {
            let mut header = smoltcp::wire::Ipv4Packet::new_unchecked(&mut whole[..]);
            header.set_total_len(len);
            header.fill_checksum();
        }
        whole
    };
    pieces.enumerate().map(piece).collect()
}

/// A program that sends `data` and wants `wanted`.
struct Program {
    data: Vec<u8>,
    sent: usize,
    wanted: Vec<u8>,
    received: usize,
    /// Says that it has sent all before it has heard all.
    eager: bool,
    shut: bool,
    finished: bool,
}

impl Program {
    fn new(data: &[u8], wanted: &[u8], eager: bool) -> Self {
        let (data, wanted) = (data.to_vec(), wanted.to_vec());
        Self { data, sent: 0, wanted, received: 0, eager, shut: false, finished: false }
    }

    /// What it writes next, some of it.
    fn next(&self, random: &mut Seeded) -> &[u8] {
        let rest = &self.data[self.sent..];
        let most = [1, 100, 5_000, 200_000][random.below(4)];
        &rest[..rest.len().min(1 + random.below(most))]
    }

    fn heard(&mut self, bytes: &[u8]) {
        let expected = self.wanted.get(self.received..self.received + bytes.len());
        assert!(expected == Some(bytes), "{} bytes from {} on are others", bytes.len(), self.received);
        self.received += bytes.len();
    }

    fn heard_the_end(&mut self) {
        assert_eq!(self.received, self.wanted.len(), "the end comes behind the last byte");
        self.finished = true;
    }

    fn may_shut(&self) -> bool {
        !self.shut && self.sent == self.data.len() && (self.eager || self.finished)
    }

    fn is_over(&self) -> bool {
        self.shut && self.finished
    }
}

struct Connection {
    handle: SocketHandle,
    guest: Program,
    host: Program,
    stream: Option<TcpStream>,
    /// What it says first, by which the server knows it.
    name: u8,
    /// The end of the window that the guest has announced last.
    edge: Option<TcpSeqNumber>,
    /// The most that the stack has acknowledged.
    acked: Option<TcpSeqNumber>,
}

struct Lossy {
    script: Script,
    random: Seeded,
    out: Way,
    back: Way,
    card: Card,
    iface: Interface,
    sockets: SocketSet<'static>,
    listeners: [(TcpListener, u16); 2],
    /// Accepted, but their first byte has not come.
    nameless: Vec<TcpStream>,
    connections: Vec<Connection>,
    deadline: std::time::Instant,
}

const CALM: Weather = Weather { loss: 0, twice: 0, late: 0, damage: 0 };

impl Lossy {
    fn new(seed: u64) -> Self {
        let mut random = Seeded(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let segmentation = random.below(2) == 0;
        let port = forwarded(Protocol::Tcp, 80);
        let script = Script::with(&spec(), segmentation, &[port]);
        let mut card = Card { received: VecDeque::new(), sent: VecDeque::new() };
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = random.next();
        let mut iface = Interface::new(config, &mut card, script.now);
        iface.update_ip_addrs(|addrs| {
            for (addr, prefix) in [(GUEST_V4, 24), (GUEST_V6, 64)] {
                addrs.push(IpCidr::new(ip(addr).into(), prefix)).expect("room for two");
            }
        });
        let listeners = [listener(false), listener(true)];
        for (listener, _) in &listeners {
            listener.set_nonblocking(true).expect("non-blocking");
        }
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        Self {
            script,
            random,
            out: Way::new(CALM),
            back: Way::new(CALM),
            card,
            iface,
            sockets: SocketSet::new(Vec::new()),
            listeners,
            nameless: Vec::new(),
            connections: Vec::new(),
            deadline,
        }
    }

    fn weather(&mut self) -> Weather {
        let random = &mut self.random;
        Weather {
            loss: [0, 20, 100, 200][random.below(4)],
            twice: [0, 20, 200][random.below(3)],
            late: [0, 50, 300][random.below(3)],
            damage: [0, 0, 20][random.below(3)],
        }
    }

    fn bytes(&mut self) -> Vec<u8> {
        let most = [1, 3_000, 60_000, 300_000][self.random.below(4)];
        let len = self.random.below(most);
        std::iter::repeat_with(|| self.random.byte()).take(len).collect()
    }

    /// A connection of the guest's, or to its server.
    fn connect(&mut self, name: u8) {
        let mut ring =
            || tcp::SocketBuffer::new(vec![0; [2_000, 10_000, 30_000, 60_000][self.random.below(4)]]);
        let (rx, tx) = (ring(), ring());
        let mut socket = tcp::Socket::new(rx, tx);
        if self.random.below(2) == 0 {
            socket.set_tsval_generator(Some(|| 7));
        }
        let inbound = name.is_multiple_of(3);
        let is_v6 = self.random.below(2) == 0;
        let mut stream = None;
        if inbound {
            socket.listen(80).expect("a port");
            let client = TcpStream::connect(self.script.published[0]).expect("connect");
            client.set_nonblocking(true).expect("non-blocking");
            stream = Some(client);
        } else {
            let to = IpEndpoint::new(
                ip(if is_v6 { GATEWAY_V6 } else { GATEWAY_V4 }).into(),
                self.listeners[usize::from(is_v6)].1,
            );
            socket.connect(self.iface.context(), to, 2_000 + u16::from(name)).expect("connect");
        }
        let handle = self.sockets.add(socket);
        let (mut there, back) = (self.bytes(), self.bytes());
        there.insert(0, name);
        let guest = Program::new(&there, &back, self.random.below(2) == 0);
        // If each waited for the other's end, neither would come.
        let host = Program::new(&back, &there, !guest.eager || self.random.below(2) == 0);
        self.connections.push(Connection { handle, guest, host, stream, name, edge: None, acked: None });
    }

    /// The programs on the host's side.
    fn host(&mut self) {
        for (listener, _) in &self.listeners {
            while let Ok((stream, _)) = listener.accept() {
                stream.set_nonblocking(true).expect("non-blocking");
                self.nameless.push(stream);
            }
        }
        // A SYN that comes again after all is over is a connection, too, which says nothing.
        for stream in std::mem::take(&mut self.nameless) {
            let mut name = [0];
            match stream.peek(&mut name) {
                Ok(1) => {
                    let known = self.connections.iter_mut().find(|c| c.name == name[0]);
                    let before = known.expect("a name").stream.replace(stream);
                    assert!(before.is_none(), "one connection became two");
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => self.nameless.push(stream),
                _ => {}
            }
        }
        for Connection { stream, host, .. } in &mut self.connections {
            let Some(open) = stream else { continue };
            if self.random.below(3) == 0 && !host.data[host.sent..].is_empty() {
                match open.write(host.next(&mut self.random)) {
                    Ok(len) => host.sent += len,
                    Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "host writes"),
                }
            }
            if host.may_shut() {
                open.shutdown(std::net::Shutdown::Write).expect("shutdown");
                host.shut = true;
            }
            if self.random.below(3) == 0 && !host.finished {
                let mut buffer = vec![0; 1 + self.random.below(50_000)];
                match open.read(&mut buffer) {
                    Ok(0) => host.heard_the_end(),
                    Ok(len) => host.heard(&buffer[..len]),
                    Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "host reads"),
                }
            }
            if host.is_over() {
                *stream = None;
            }
        }
    }

    /// The programs inside.
    fn guest(&mut self) {
        for Connection { handle, guest, name, .. } in &mut self.connections {
            let socket = self.sockets.get_mut::<tcp::Socket<'_>>(*handle);
            if self.random.below(3) == 0 && socket.can_send() {
                guest.sent += socket.send_slice(guest.next(&mut self.random)).expect("guest writes");
            }
            if guest.may_shut() && socket.may_send() {
                socket.close();
                guest.shut = true;
            }
            let opening =
                matches!(socket.state(), tcp::State::Listen | tcp::State::SynSent | tcp::State::SynReceived);
            if self.random.below(3) == 0 && !guest.finished && !opening {
                let mut buffer = vec![0; 1 + self.random.below(50_000)];
                match socket.recv_slice(&mut buffer) {
                    Ok(len) => guest.heard(&buffer[..len]),
                    Err(tcp::RecvError::Finished) => guest.heard_the_end(),
                    Err(error) => panic!(
                        "{name}: guest reads: {error:?}, {}, {} of {} read, {} of {} sent, {} kept",
                        socket.state(),
                        guest.received,
                        guest.wanted.len(),
                        guest.sent,
                        guest.data.len(),
                        socket.send_queue()
                    ),
                }
            }
        }
    }

    /// Everything that happens at one moment, and then the next one.
    fn step(&mut self) {
        assert!(std::time::Instant::now() < self.deadline, "no end of it: {}", self.state());
        let now = self.script.now;
        while let Some(packet) = self.out.arrived(now) {
            let ethertype = if packet[0] >> 4 == 6 { 0x86dd } else { 0x0800 };
            // No room is one more loss.
            self.script.try_send_frame(false, ethertype, &packet);
        }
        while let Some(packet) = self.back.arrived(now) {
            if !self.is_misunderstood(&packet) {
                self.card.received.push_back(packet);
                self.iface.poll(now, &mut self.card, &mut self.sockets);
            }
        }
        self.host();
        self.guest();
        self.iface.poll(now, &mut self.card, &mut self.sockets);
        for packet in std::mem::take(&mut self.card.sent) {
            self.note_window(&packet);
            self.out.send(&mut self.random, now, &packet);
        }
        self.script.turn(Duration::ZERO);
        while let Some(frame) = self.script.try_recv() {
            for packet in segments(&frame) {
                self.back.send(&mut self.random, now, &packet);
            }
        }
        // Programs do something every few milliseconds, and sometimes nothing for a while.
        let pause = if self.random.below(200) == 0 { 4_000 } else { 20 };
        let mut next =
            now + Duration::from_millis(u64::try_from(1 + self.random.below(pause)).expect("small"));
        for at in [self.out.next_at(), self.back.next_at()].into_iter().flatten() {
            next = next.min(at);
        }
        self.script.now = next.max(now + Duration::from_millis(1));
    }

    /// What smoltcp 0.14 makes the wrong thing of: acknowledgements that stop it from repeating a FIN (see
    /// `tcp::quirks::only_fin_is_missing`, by which the stack keeps them from its own), a FIN behind data that ends outside its
    /// window, which it takes without the end of the data (`fin_apart` there), and what was said long ago about a window that
    /// was closed then, after which it stops all timers (`reminder`).
    fn is_misunderstood(&mut self, packet: &[u8]) -> bool {
        let Ok(packet) = ingress::parse_ip(packet, true) else { return false };
        let Ok(segment) = TcpPacket::new_checked(packet.payload()) else { return false };
        let ends = (Some(segment.dst_port()), Some(segment.src_port()));
        for Connection { handle, acked, edge, .. } in &mut self.connections {
            let socket = self.sockets.get::<tcp::Socket<'_>>(*handle);
            let own = (socket.local_endpoint(), socket.remote_endpoint());
            if (own.0.map(|end| end.port), own.1.map(|end| end.port)) == ends {
                let ack = segment.ack_number();
                let again = acked.is_some_and(|acked| ack <= acked);
                if !again {
                    *acked = Some(ack);
                }
                let end = segment.seq_number() + segment.payload().len();
                if again && segment.window_len() == 0 && !segment.syn() && !segment.rst() {
                    return true;
                }
                if segment.fin() && edge.is_none_or(|edge| end > edge) {
                    return true;
                }
                let closing = matches!(
                    socket.state(),
                    tcp::State::FinWait1 | tcp::State::Closing | tcp::State::LastAck
                );
                let plain = segment.payload().is_empty() && !segment.fin() && !segment.rst();
                return closing && plain && again && socket.send_queue() == 0;
            }
        }
        false
    }

    fn note_window(&mut self, packet: &[u8]) {
        let Ok(packet) = ingress::parse_ip(packet, true) else { return };
        let Ok(segment) = TcpPacket::new_checked(packet.payload()) else { return };
        for Connection { handle, edge, .. } in &mut self.connections {
            let own = self.sockets.get::<tcp::Socket<'_>>(*handle).local_endpoint().map(|end| end.port);
            if own == Some(segment.src_port()) {
                *edge = Some(segment.ack_number() + usize::from(segment.window_len()));
            }
        }
    }

    /// For whoever has to find out why it goes no further.
    fn state(&self) -> String {
        let mut text = format!(
            "{}, {} frames and {} back, {} flows, {} timers, {} without a name",
            self.script.now,
            self.out.count,
            self.back.count,
            self.script.stats().tcp_flows,
            self.script.engine.timers(),
            self.nameless.len()
        );
        for Connection { handle, guest, host, name, .. } in &self.connections {
            let socket = self.sockets.get::<tcp::Socket<'_>>(*handle);
            let of = |program: &Program| {
                let Program { sent, received, data, wanted, .. } = program;
                format!("sent {sent} of {}, got {received} of {}", data.len(), wanted.len())
            };
            text += &format!("\n{name}: guest {}, {}; host {}", socket.state(), of(guest), of(host));
            text += &format!("; {} unacknowledged, {} unread", socket.send_queue(), socket.recv_queue());
        }
        text
    }

    fn until(&mut self, over: impl Fn(&Self) -> bool) {
        while !over(self) {
            self.step();
        }
    }
}

fn run(seed: u64) {
    println!("seed {seed}");
    let mut lossy = Lossy::new(seed);
    // The guest has ten seconds to answer from a published port, so those connections begin on a link that works.
    lossy.connect(0);
    lossy.until(|lossy| {
        let socket = lossy.sockets.get::<tcp::Socket<'_>>(lossy.connections[0].handle);
        !matches!(socket.state(), tcp::State::Listen | tcp::State::SynReceived)
    });
    (lossy.out.weather, lossy.back.weather) = (lossy.weather(), lossy.weather());
    // Sums of what the stack sends are the driver's business, so nobody would see it.
    lossy.back.weather.damage = 0;
    println!("{:?}, {:?}", lossy.out.weather, lossy.back.weather);
    let count = [1, 2, 4][lossy.random.below(3)];
    for name in [1, 2, 4, 5].into_iter().take(count) {
        lossy.connect(name);
    }
    lossy.until(|lossy| lossy.connections.iter().all(|c| c.guest.is_over() && c.host.is_over()));
    lossy.script.engine.check_bounds();
    // The last words may be lost, too. What comes too late may look like the beginning of something, which nobody inside
    // wants to know of.
    lossy.until(|lossy| {
        let script = &lossy.script;
        lossy.nameless.is_empty() && script.stats().tcp_flows == 0 && script.engine.timers() == 0
    });
    lossy.script.engine.check_bounds();
    let happened = lossy.out.happened.iter().zip(lossy.back.happened).map(|(a, b)| a + b).collect::<Vec<_>>();
    println!("{happened:?} of {} and {}", lossy.out.count, lossy.back.count);
}

#[test]
fn what_arrives_over_a_bad_link_is_what_was_sent() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    if let Some(seed) = number("NETSTACK_SEED") {
        return run(seed);
    }
    for seed in 0..64 * number("NETSTACK_FLOOD").unwrap_or(1) {
        run(seed);
    }
}
