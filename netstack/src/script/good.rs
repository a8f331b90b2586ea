//! What has to go on as ever while others fail or attack, and what must not grow.

use super::*;

/// A connection that echoes, beside whatever happens to others: its bytes come back.
pub(super) struct Good {
    peer: Peer,
    server: TcpStream,
    /// What has been sent and echoed, of a pattern that never repeats within a window.
    sent: usize,
    back: usize,
}

impl Good {
    pub(super) fn open(script: &mut Script, listener: &TcpListener) -> Self {
        let mut peer = Peer::new(false, listener.local_addr().expect("address").port());
        peer.guest.1 = 60_000;
        peer.open(script);
        let server = accept(listener);
        server.set_nonblocking(true).expect("non-blocking");
        Self { peer, server, sent: 0, back: 0 }
    }

    pub(super) fn byte(at: usize) -> u8 {
        u8::try_from(at % 251).expect("small")
    }

    /// Sends a piece, and has it echoed.
    pub(super) fn go_on(&mut self, script: &mut Script, len: usize) {
        let piece: Vec<u8> = (self.sent..self.sent + len).map(Self::byte).collect();
        script.send_ip(&self.peer.segment(TcpControl::Psh, &piece));
        self.peer.seq = self.peer.seq.wrapping_add(i32::try_from(len).expect("length"));
        self.sent += len;
        self.wait(script);
    }

    /// Waits until all has come back.
    fn wait(&mut self, script: &mut Script) {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        let mut buffer = [0; 10_000];
        while self.back < self.sent {
            assert!(std::time::Instant::now() < deadline, "the good connection stands still");
            script.turn(Duration::from_millis(1));
            if let Ok(len) = self.server.read(&mut buffer) {
                self.server.write_all(&buffer[..len]).expect("echo");
            }
            while let Some(frame) = script.try_recv() {
                self.hear(script, &frame);
            }
        }
    }

    /// Takes what is for this connection.
    pub(super) fn hear(&mut self, script: &Script, frame: &Out) {
        let Ok(Inbound::Ip(packet)) = ingress::parse_frame(frame.ethernet(), [0x52, 0x54, 0, 0, 0, 2], true)
        else {
            return;
        };
        let Ok(segment) = TcpPacket::new_checked(packet.payload()) else { return };
        let (from, to) = ((packet.src, segment.src_port()), (packet.dst, segment.dst_port()));
        if packet.protocol != ingress::TCP || (from, to) != (self.peer.remote, self.peer.guest) {
            return;
        }
        assert!(!segment.rst() && !segment.fin(), "it has done no wrong: {segment}");
        let data = segment.payload();
        if data.is_empty() || segment.seq_number() != TcpSeqNumber(self.peer.ack) {
            return;
        }
        let expected: Vec<u8> = (self.back..self.back + data.len()).map(Self::byte).collect();
        assert!(data == expected, "bytes from {} on are others", self.back);
        self.back += data.len();
        self.peer.ack = self.peer.ack.wrapping_add(i32::try_from(data.len()).expect("length"));
        script.send_ip(&self.peer.segment(TcpControl::None, b""));
    }
}

/// Memory of this process that is its own, in KiB.
pub(super) fn own_memory() -> usize {
    let text = std::fs::read_to_string("/proc/self/status").expect("status");
    let line = text.lines().find(|line| line.starts_with("RssAnon:")).expect("RssAnon");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number")
}

pub(super) fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("descriptors").count()
}

#[test]
fn what_has_come_and_gone_leaves_no_timer() {
    let server = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let (listener, port) = listener(false);
    let mut spec = spec();
    spec.dns.upstreams = vec![server.local_addr().expect("address")];
    let mut script = Script::new(&spec, true);
    let sink = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let sink_port = sink.local_addr().expect("address").port();
    let whole = udp((GUEST_V4, 5_000), (GATEWAY_V4, sink_port), &[9; 64]);
    for id in 0..200u16 {
        for (at, end) in [(0, 40), (40, 72)] {
            script.send_ip(&v4_fragment(&whole, id, at, end));
        }
        // No fragment of this one ever comes.
        script.send_ip(&v4_fragment(&whole, id | 0x8000, 0, 40));
        script.settle();
        while script.try_recv().is_some() {}
        let query = crate::dns::message::tests::query(id, "some.name", 1, true);
        script.send_ip(&udp((GUEST_V4, 5_000), (GATEWAY_V4, 53), &query));
        script.settle();
        let mut buffer = [0; 512];
        let (len, from) = server.recv_from(&mut buffer).expect("query");
        buffer[2] |= 0x80;
        server.send_to(&buffer[..len], from).expect("answer");
        script.expect("the answer", |_| true);
        let mut peer = Peer::new(false, port);
        peer.guest.1 = 1_000 + id;
        peer.open(&mut script);
        drop(accept(&listener));
        peer.send(&mut script, TcpControl::Rst, b"");
    }
    assert_eq!((script.stats().tcp_flows, script.engine.open_queries()), (0, 0));
    assert!(script.engine.timers() <= 4, "{}", script.engine.timers());
}
