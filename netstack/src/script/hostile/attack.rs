//! A guest that knows enough of its connections to hit them, and servers that answer.

use std::collections::VecDeque;

use super::*;

/// What the guest remembers of a connection that it plays with.
struct Victim {
    peer: Peer,
    /// What the stack said last.
    heard: Option<(i32, i32)>,
}

/// The whole of an attack: a guest that knows enough of its connections to hit them, and servers that answer.
pub(super) struct Attack {
    pub(super) script: Script,
    random: Seeded,
    pub(super) listeners: Vec<(TcpListener, u16)>,
    pub(super) servers: VecDeque<TcpStream>,
    sink: UdpSocket,
    clients: VecDeque<TcpStream>,
    victims: Vec<Victim>,
    resolver: UdpSocket,
    published: Vec<std::net::SocketAddr>,
}

const INSIDE_PORT: u16 = 80;

impl Attack {
    pub(super) fn new(seed: u64) -> Self {
        let listeners = ["0.0.0.0:0", "[::]:0"].map(|addr| {
            let listener = TcpListener::bind(addr).expect("listener");
            listener.set_nonblocking(true).expect("non-blocking");
            let port = listener.local_addr().expect("address").port();
            (listener, port)
        });
        let socket = || {
            let socket = UdpSocket::bind("127.0.0.1:0").expect("socket");
            socket.set_nonblocking(true).expect("non-blocking");
            socket
        };
        let (sink, resolver) = (socket(), socket());
        let mut spec = spec();
        spec.dns.upstreams = vec![resolver.local_addr().expect("address")];
        spec.dns.hosts = vec![("some.name".into(), ip("192.0.2.7"))];
        let publish = |protocol| Publish { host_ip: None, ..forwarded(protocol, INSIDE_PORT) };
        let script =
            Script::with(&spec, true, &[publish(crate::Protocol::Tcp), publish(crate::Protocol::Udp)]);
        let published = script.published.clone();
        Self {
            script,
            random: Seeded(seed),
            listeners: listeners.into(),
            servers: VecDeque::new(),
            sink,
            clients: VecDeque::new(),
            victims: Vec::new(),
            resolver,
            published,
        }
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.random.below(choices.len())]
    }

    fn word(&mut self) -> i32 {
        i32::from_ne_bytes([self.random.byte(), self.random.byte(), self.random.byte(), self.random.byte()])
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        let byte = self.random.byte();
        vec![byte; self.random.below(most)]
    }

    /// A number near `value`, or anywhere.
    fn near(&mut self, value: i32) -> i32 {
        let far = i32::try_from(self.random.below(1 << 20)).expect("small");
        let close = i32::try_from(self.random.below(4)).expect("small");
        let other = self.word();
        let distance = self.one_of(&[0, 0, 0, close, -close, far, -far, other]);
        value.wrapping_add(distance)
    }

    /// A segment of a connection, old or new, right or wrong.
    fn segment(&mut self) -> Vec<u8> {
        if self.victims.len() < 60 && (self.victims.is_empty() || self.random.below(10) == 0) {
            let is_v6 = self.random.below(2) == 0;
            let (open, closed) = (self.listeners[usize::from(is_v6)].1, 9);
            let port = self.one_of(&[open, open, open, open, 53, closed]);
            let mut peer = Peer::new(is_v6, port);
            peer.guest.1 = 1_000 + u16::from(self.random.byte());
            if port == open && self.random.below(2) == 0 {
                peer.remote.0 = ip(if is_v6 { "2001:db8::7" } else { "192.0.2.7" });
            }
            peer.seq = self.word();
            peer.mss = self.one_of(&[0, 1, 536, 1460, 9_000, u16::MAX]);
            peer.window_scale = self.one_of(&[None, Some(0), Some(7), Some(14), Some(255)]);
            self.victims.push(Victim { peer, heard: None });
        }
        let at = self.random.below(self.victims.len());
        let (heard, seq) = (self.victims[at].heard, self.victims[at].peer.seq);
        // Long ones take their time to be summed up.
        let most = if self.random.below(60) == 0 { 60_000 } else { self.one_of(&[1, 2, 100, 1_500]) };
        let payload = self.bytes(most);
        let window = self.one_of(&[0, 0, 1, 1_000, 60_000, u16::MAX]);
        let control = match heard {
            None => self.one_of(&[TcpControl::Syn, TcpControl::Syn, TcpControl::None, TcpControl::Rst]),
            Some(_) => match self.random.below(40) {
                0 => TcpControl::Syn,
                1 => TcpControl::Rst,
                2 | 3 => TcpControl::Fin,
                4..20 => TcpControl::Psh,
                _ => TcpControl::None,
            },
        };
        // Where the stack expects it, or somewhere else.
        let (expected, ack) = heard.map_or((seq, 0), |(theirs, ours)| (ours, theirs));
        let (next_seq, next_ack) = (self.near(expected), self.near(ack));
        let peer = &mut self.victims[at].peer;
        peer.seq = next_seq;
        peer.ack = if heard.is_some() { next_ack } else { 0 };
        peer.window = window;
        let packet = peer.segment(control, if control == TcpControl::Rst { b"" } else { &payload });
        if matches!(control, TcpControl::Rst) && self.random.below(4) == 0 {
            self.victims.swap_remove(at);
        }
        packet
    }

    fn datagram(&mut self) -> Vec<u8> {
        let is_v6 = self.random.below(2) == 0;
        let (guest, gateway, other) =
            if is_v6 { (GUEST_V6, GATEWAY_V6, "2001:db8::1") } else { (GUEST_V4, GATEWAY_V4, "192.0.2.1") };
        let any_port = 1 + u16::from(self.random.byte());
        let sink = self.sink.local_addr().expect("address").port();
        match self.random.below(6) {
            0 => {
                let name = self.one_of(&["some.name", "other.name", "a.very.long.name.with.labels"]);
                let kind = self.one_of(&[1, 28, 255, 65_535]);
                let query = crate::dns::message::tests::query(any_port, name, kind, is_v6);
                udp((guest, any_port), (gateway, 53), &query)
            }
            1 => udp((guest, INSIDE_PORT), (gateway, any_port), b"answer"),
            2 => udp((guest, 5_000), (gateway, sink), &self.bytes(3_000)),
            _ => udp((guest, any_port), (self.one_of(&[gateway, other]), sink), &self.bytes(60)),
        }
    }

    /// ICMP of every type, with the checksum that it wants.
    fn icmp(&mut self) -> Vec<u8> {
        let is_v6 = self.random.below(2) == 0;
        let (src, dsts) = if is_v6 {
            (self.one_of(&[GUEST_V6, "fe80::1", "::"]), [GATEWAY_V6, "2001:db8::1", "ff02::1:ff00:2"])
        } else {
            (GUEST_V4, [GATEWAY_V4, "192.0.2.1", "224.0.0.1"])
        };
        let (src, dst) = (ip(src), ip(self.one_of(&dsts)));
        let kind = self.random.byte();
        let kind = self.one_of(&[kind, 8, 3, 128, 1, 135, 133, 136, 143]);
        let code = self.one_of(&[0, 0, 3, 4, 255]);
        let mut message = vec![kind, code, 0, 0, 0, self.random.byte(), 0, 1];
        if kind == 135 || kind == 136 {
            let IpAddr::V6(target) = ip(GATEWAY_V6) else { unreachable!("written as IPv6") };
            message.extend(target.octets());
            // Options, whose length may be nothing at all.
            let (option, len) = (self.one_of(&[1, 2, 3, 14, 255]), self.one_of(&[0, 1, 1, 2, 255]));
            message.extend([option, len, 0x52, 0x54, 0, 0, 0, 2]);
        } else if kind == 3 || kind == 1 {
            // An error about something that the stack may have sent.
            let (from, to) = if is_v6 { (GATEWAY_V6, GUEST_V6) } else { (GATEWAY_V4, GUEST_V4) };
            let port = u16::from(self.random.byte());
            message.extend(udp((from, port), (to, INSIDE_PORT), b"x"));
        } else {
            message.extend(self.bytes(2_000));
        }
        let cut = self.random.below(message.len() + 1);
        if self.random.below(8) == 0 {
            message.truncate(cut);
        }
        if message.len() >= 4 {
            let len = u32::try_from(message.len()).expect("length");
            let pseudo = match is_v6 {
                true => checksum::pseudo_header(&src.into(), &dst.into(), IpProtocol::Icmpv6, len),
                false => 0,
            };
            let sum = !checksum::combine(&[pseudo, checksum::data(&message)]);
            message[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        let hops = self.one_of(&[255, 64, 2, 1, 0]);
        ingress::rebuild(src, dst, if is_v6 { ingress::ICMPV6 } else { ingress::ICMP }, hops, &message)
    }

    /// A piece of `whole`, somewhere.
    fn piece(&mut self, whole: &[u8]) -> Vec<u8> {
        let id = self.one_of(&[1, 2, 3, 4, 5, 6, 7, 8]);
        let len = whole.len() - if whole[0] >> 4 == 6 { 40 } else { 20 };
        let at = (self.random.below(len + 1) / 8) * 8;
        let end = at + self.random.below(len - at + 1);
        if whole[0] >> 4 == 4 {
            return v4_fragment(whole, id, at, end);
        }
        let more = end < len;
        let field = u16::try_from(self.one_of(&[at, at, at, 0xfff8])).expect("offset") | u16::from(more);
        let mut payload = vec![whole[6], 0];
        payload.extend(field.to_be_bytes());
        payload.extend(u32::from(id).to_be_bytes());
        payload.extend(&whole[40 + at..40 + end]);
        let packet = Packet {
            payload_at: 40,
            ..ingress::parse_ip(whole, true).unwrap_or_else(|_| panic!("whole packet"))
        };
        ingress::rebuild(packet.src, packet.dst, 44, 64, &payload)
    }

    /// `packet` with IP options or extension headers, some of which are nonsense.
    fn with_options(&mut self, packet: &[u8]) -> Vec<u8> {
        let noise = self.random.byte();
        if packet[0] >> 4 == 4 {
            let words = 1 + self.random.below(10);
            let mut options = Vec::new();
            while options.len() < words * 4 {
                let len = self.one_of(&[0, 1, 2, 3, 40, 255]);
                options.extend([self.one_of(&[0, 1, 7, 68, 131, 148, noise]), len, noise]);
            }
            options.truncate(words * 4);
            let mut longer = [&packet[..20], &options, &packet[20..]].concat();
            longer[0] = 0x45 + u8::try_from(words).expect("few");
            let len = u16::try_from(longer.len()).unwrap_or(u16::MAX);
            longer[2..4].copy_from_slice(&len.to_be_bytes());
            longer[10..12].fill(0);
            smoltcp::wire::Ipv4Packet::new_unchecked(&mut longer[..]).fill_checksum();
            return longer;
        }
        let mut payload = packet[40..].to_vec();
        let mut next = packet[6];
        for _ in 0..=self.random.below(10) {
            let len = self.one_of(&[0, 0, 1, 255]);
            // A jumbo payload option, among others.
            let mut header = vec![next, len, self.one_of(&[0xc2, 1, 0, noise]), 4, 0, 1, 0, 0];
            header.resize(if len == 1 { 16 } else { 8 }, noise);
            payload = [header, payload].concat();
            next = self.one_of(&[0, 60, 43, 44, noise]);
        }
        payload.truncate(65_000);
        let mut longer = [&packet[..40], &payload].concat();
        longer[6] = next;
        let len = u16::try_from(payload.len()).expect("length");
        longer[4..6].copy_from_slice(&self.one_of(&[len, len, 0]).to_be_bytes());
        longer
    }

    fn arp(&mut self) -> Vec<u8> {
        let mut request = vec![0, 1, 8, 0, 6, 4, 0, 1, 0x52, 0x54, 0, 0, 0, 2, 10, 0, 2, 100];
        request.extend([0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
        let at = self.random.below(request.len());
        request[at] = self.random.byte();
        request.truncate(self.random.below(60));
        request
    }

    fn mutilate(&mut self, packet: &mut Vec<u8>) {
        for _ in 0..1 + self.random.below(3) {
            let at = self.random.below(packet.len().min(100));
            packet[at] = self.random.byte();
        }
        match self.random.below(8) {
            0 => packet.truncate(self.random.below(packet.len()).max(1)),
            1 => packet.extend(std::iter::repeat_n(0xa5, self.random.below(1_000))),
            _ => {}
        }
        let header_len = usize::from(packet[0] & 15) * 4;
        if packet[0] >> 4 == 4 && header_len >= 20 && packet.len() >= header_len && self.random.below(4) != 0
        {
            smoltcp::wire::Ipv4Packet::new_unchecked(&mut packet[..]).fill_checksum();
        }
    }

    /// Something happens on the host's side.
    fn host(&mut self) {
        let which = self.random.below(self.listeners.len());
        match self.random.below(8) {
            0 | 1 => {
                while let Ok((stream, _)) = self.listeners[which].0.accept() {
                    stream.set_nonblocking(true).expect("non-blocking");
                    self.servers.push_back(stream);
                }
                self.servers.truncate(100);
            }
            2 => drop(self.servers.pop_front()),
            3 | 4 => {
                let bytes = self.bytes(20_000);
                if let Some(server) = self.servers.front_mut() {
                    let _ = server.write(&bytes);
                    let _ = server.read(&mut [0; 100_000]);
                }
                self.servers.rotate_left(usize::from(!self.servers.is_empty()));
            }
            5 => {
                let mut buffer = [0; 2_000];
                while let Ok((len, from)) = self.resolver.recv_from(&mut buffer) {
                    buffer[2] |= 0x80;
                    let at = self.random.below(len);
                    buffer[at] = self.random.byte();
                    let _ = self.resolver.send_to(&buffer[..len], from);
                }
                while let Ok((len, from)) = self.sink.recv_from(&mut buffer) {
                    let _ = self.sink.send_to(&buffer[..len], from);
                }
            }
            6 => {
                // Somebody outside wants a published port.
                let tcp = self.published[self.random.below(2)].port();
                if let Ok(stream) = TcpStream::connect((self.one_of(&["127.0.0.1", "::1", "192.0.2.9"]), tcp))
                {
                    self.clients.push_back(stream);
                }
                if self.clients.len() > 20 {
                    self.clients.pop_front();
                }
                let udp = self.published[2].port();
                let _ = self.sink.send_to(b"hello", ("127.0.0.1", udp));
            }
            _ => {
                let millis = self.one_of(&[1, 10, 300, 5_000]);
                self.script.now += Duration::from_millis(millis);
            }
        }
    }

    /// Reads what the stack says, and remembers it.
    pub(super) fn listen(&mut self) {
        while let Some(frame) = self.script.try_recv() {
            let Ok(Inbound::Ip(packet)) =
                ingress::parse_frame(frame.ethernet(), [0x52, 0x54, 0, 0, 0, 2], true)
            else {
                continue;
            };
            let Ok(segment) = TcpPacket::new_checked(packet.payload()) else { continue };
            if packet.protocol != ingress::TCP {
                continue;
            }
            let len = i32::try_from(segment.segment_len()).expect("length");
            let next = (segment.seq_number().0.wrapping_add(len), segment.ack_number().0);
            let (remote, guest) = ((packet.src, segment.src_port()), (packet.dst, segment.dst_port()));
            let known = self
                .victims
                .iter_mut()
                .find(|victim| victim.peer.guest == guest && victim.peer.remote == remote);
            if let Some(victim) = known {
                victim.heard = (!segment.rst()).then_some(next);
            } else if segment.syn() && !segment.ack() && self.victims.len() < 60 {
                // A connection to the published port: answered, sooner or later.
                let peer = Peer { guest, remote, seq: 77, ..Peer::new(guest.0.is_ipv6(), 1) };
                self.victims.push(Victim { peer, heard: Some((next.0, 77)) });
            }
        }
    }

    pub(super) fn round(&mut self) {
        for _ in 0..=self.random.below(12) {
            let mut packet = match self.random.below(20) {
                0..10 => self.segment(),
                10..13 => self.datagram(),
                13..15 => self.icmp(),
                15 => {
                    let payload = self.arp();
                    self.script.try_send_frame(false, 0x0806, &payload);
                    continue;
                }
                16 => {
                    let whole = self.datagram();
                    self.piece(&whole)
                }
                17 => {
                    let whole = self.segment();
                    self.piece(&whole)
                }
                _ => {
                    let packet = if self.random.below(2) == 0 { self.segment() } else { self.datagram() };
                    self.with_options(&packet)
                }
            };
            if self.random.below(8) == 0 {
                self.mutilate(&mut packet);
            }
            let ethertype = if packet[0] >> 4 == 6 { 0x86dd } else { 0x0800 };
            self.script.try_send_frame(self.random.below(8) != 0, ethertype, &packet);
        }
        self.host();
        self.script.turn(Duration::ZERO);
        // Now and then the guest does not read for a while.
        if self.random.below(4) != 0 {
            self.listen();
        }
    }
}
