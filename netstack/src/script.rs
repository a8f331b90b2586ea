//! Packet scripts: the whole engine on a socket pair instead of a TAP, with explicit virtual time.
//!
//! The script is the guest: it writes frames and reads frames. The other side is real: sockets on the host's loopback,
//! which the gateway's address stands for. Nothing here sends anything beyond loopback; the floods, whose destinations
//! are arbitrary, run in a network namespace of their own.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{
    Icmpv4Packet, IpAddress, IpProtocol, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber, TcpTimestampRepr,
    UdpPacket, checksum,
};

use crate::config::{Protocol, Publish, StackSpec};
use crate::control::Control;
use crate::device::{ETHERNET_HEADER_LEN, Segmentation};
use crate::engine::{Engine, Turn};
use crate::forward::Published;
use crate::ingress::tests::Seeded;
use crate::ingress::{self, Inbound, Packet};
use crate::policy::{HostLoopback, PolicySpec};
use crate::sys::VNET_HEADER_LEN;

mod defects;
mod dns;
mod faults;
mod good;
mod hostile;
mod lossy;
mod malformed;
mod names;
mod rates;
mod runs;
mod tcp;

const HEAD: usize = VNET_HEADER_LEN + ETHERNET_HEADER_LEN;
const GUEST_V4: &str = "10.0.2.100";
const GATEWAY_V4: &str = "10.0.2.2";
const GUEST_V6: &str = "fd00::100";
const GATEWAY_V6: &str = "fd00::2";

fn ip(text: &str) -> IpAddr {
    text.parse().expect(text)
}

fn spec() -> StackSpec {
    let policy = PolicySpec { host_loopback: HostLoopback::All, ..PolicySpec::default() };
    StackSpec { policy, ..crate::config::tests::spec() }
}

/// Any free port of the host's loopback that leads to this one inside.
fn forwarded(protocol: Protocol, inside_port: u16) -> Publish {
    Publish { host_ip: Some(ip("127.0.0.1")), host_port: 0, inside_ip: None, inside_port, protocol }
}

struct Script {
    engine: Engine,
    control: Control,
    /// The guest's end.
    wire: OwnedFd,
    now: Instant,
    published: Vec<SocketAddr>,
}

/// A frame from the stack.
#[derive(Debug, Clone)]
struct Out(Vec<u8>);

impl Out {
    fn ethernet(&self) -> &[u8] {
        &self.0[VNET_HEADER_LEN..]
    }

    fn packet(&self) -> Packet<'_> {
        match ingress::parse_frame(self.ethernet(), [0x52, 0x54, 0, 0, 0, 2], true) {
            Ok(Inbound::Ip(packet)) => packet,
            other => panic!("no IP packet: {other:?}"),
        }
    }

    fn tcp(&self) -> TcpPacket<&[u8]> {
        let packet = self.packet();
        assert_eq!(packet.protocol, ingress::TCP, "{packet:?}");
        TcpPacket::new_checked(packet.payload()).expect("segment")
    }

    /// Kind of segmentation offload, and segment size.
    fn offload(&self) -> (u8, u16) {
        (self.0[1], u16::from_ne_bytes([self.0[4], self.0[5]]))
    }
}

impl Script {
    fn new(spec: &StackSpec, segmentation: bool) -> Self {
        Self::with(spec, segmentation, &[])
    }

    fn with(spec: &StackSpec, segmentation: bool, ports: &[Publish]) -> Self {
        Self::of(spec, segmentation, Published::bind(ports).expect("ports"))
    }

    fn of(spec: &StackSpec, segmentation: bool, published: Published) -> Self {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let (wire, tap) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).expect("socket pair");
        setsockopt(&tap, sockopt::SndBuf, &(1 << 18)).expect("buffer");
        let now = Instant::from_secs(1_000);
        let addresses = published.addresses().map(|(addr, ..)| addr).collect();
        let segmentation = if segmentation { Segmentation::TcpAndUdp } else { Segmentation::None };
        let (engine, control) = Engine::new(tap, spec, published, segmentation, now).expect("engine");
        Self { engine, control, wire, now, published: addresses }
    }

    /// Gives the engine what it needs to handle everything that is there now.
    fn settle(&mut self) {
        for _ in 0..4 {
            self.turn(Duration::ZERO);
        }
    }

    /// Turns until something of the host's has happened.
    fn wait_for(&mut self, what: &str, happened: impl Fn(&Self) -> bool) {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !happened(self) {
            assert!(std::time::Instant::now() < deadline, "never happened: {what}");
            self.turn(Duration::from_millis(10));
        }
    }

    fn turn(&mut self, most: Duration) {
        let now = self.now;
        assert_eq!(self.engine.turn(&mut || now, Some(most)), Turn::Goes);
    }

    fn advance(&mut self, by: Duration) {
        self.now += by;
        self.settle();
    }

    fn advance_millis(&mut self, millis: u64) {
        self.advance(Duration::from_millis(millis));
    }

    /// A frame from the guest, as its driver hands it out.
    fn send_frame(&self, checksum_pending: bool, ethertype: u16, payload: &[u8]) {
        assert!(self.try_send_frame(checksum_pending, ethertype, payload), "room on the wire");
    }

    /// Sends a frame if the wire has room for it.
    fn try_send_frame(&self, checksum_pending: bool, ethertype: u16, payload: &[u8]) -> bool {
        let mut frame = vec![0; VNET_HEADER_LEN];
        frame[0] = u8::from(checksum_pending);
        frame.extend([0x52, 0x54, 0, 0, 0, 1, 0x52, 0x54, 0, 0, 0, 2]);
        frame.extend(ethertype.to_be_bytes());
        frame.extend(payload);
        nix::unistd::write(&self.wire, &frame).is_ok()
    }

    fn send_ip(&self, packet: &[u8]) {
        let ethertype = if packet[0] >> 4 == 6 { 0x86dd } else { 0x0800 };
        self.send_frame(false, ethertype, packet);
    }

    fn try_recv(&self) -> Option<Out> {
        let mut buffer = vec![0; 1 << 17];
        let len = nix::unistd::read(&self.wire, &mut buffer).ok()?;
        buffer.truncate(len);
        Some(Out(buffer))
    }

    /// The next frame that `wanted` wants; others are dropped. Real time passes while the host's kernel works, virtual
    /// time does not.
    fn expect(&mut self, what: &str, wanted: impl Fn(&Out) -> bool) -> Out {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        loop {
            while let Some(frame) = self.try_recv() {
                if wanted(&frame) {
                    return frame;
                }
            }
            assert!(std::time::Instant::now() < deadline, "never came: {what}");
            self.turn(Duration::from_millis(20));
        }
    }

    fn expect_tcp(&mut self, what: &str, wanted: impl Fn(&TcpPacket<&[u8]>) -> bool) -> Out {
        self.expect(what, |frame| {
            let Ok(Inbound::Ip(packet)) =
                ingress::parse_frame(frame.ethernet(), [0x52, 0x54, 0, 0, 0, 2], true)
            else {
                return false;
            };
            packet.protocol == ingress::TCP
                && TcpPacket::new_checked(packet.payload()).is_ok_and(|segment| wanted(&segment))
        })
    }

    fn nothing_comes(&mut self, what: &str) {
        self.settle();
        if let Some(frame) = self.try_recv() {
            panic!("{what}: {:?}", frame.packet());
        }
    }

    fn stats(&self) -> crate::stats::Stats {
        self.engine.stats()
    }
}

/// A UDP packet as the guest's kernel makes it.
fn udp(from: (&str, u16), to: (&str, u16), payload: &[u8]) -> Vec<u8> {
    let (src, dst) = (ip(from.0), ip(to.0));
    let mut datagram = vec![0; 8];
    datagram[..2].copy_from_slice(&from.1.to_be_bytes());
    datagram[2..4].copy_from_slice(&to.1.to_be_bytes());
    let len = u16::try_from(8 + payload.len()).expect("datagram");
    datagram[4..6].copy_from_slice(&len.to_be_bytes());
    datagram.extend(payload);
    UdpPacket::new_unchecked(&mut datagram[..]).fill_checksum(&src.into(), &dst.into());
    ingress::rebuild(src, dst, ingress::UDP, 64, &datagram)
}

/// The bytes from `at` to `end` of an IPv4 packet's payload, as a fragment.
fn v4_fragment(whole: &[u8], id: u16, at: usize, end: usize) -> Vec<u8> {
    let mut packet = whole[..20].to_vec();
    packet.extend(&whole[20 + at..20 + end]);
    let len = u16::try_from(packet.len()).expect("length");
    let mut header = smoltcp::wire::Ipv4Packet::new_unchecked(&mut packet[..]);
    header.set_total_len(len);
    header.set_dont_frag(false);
    header.set_ident(id);
    header.set_more_frags(end < whole.len() - 20);
    header.set_frag_offset(u16::try_from(at).expect("offset"));
    header.fill_checksum();
    packet
}

/// One end of a connection, played by the script.
struct Peer {
    guest: (IpAddr, u16),
    remote: (IpAddr, u16),
    seq: i32,
    ack: i32,
    mss: u16,
    window: u16,
    window_scale: Option<u8>,
}

impl Peer {
    fn new(is_v6: bool, port: u16) -> Self {
        let (guest, remote) = if is_v6 { (GUEST_V6, GATEWAY_V6) } else { (GUEST_V4, GATEWAY_V4) };
        Self {
            guest: (ip(guest), 40_000),
            remote: (ip(remote), port),
            seq: 1_000_000,
            ack: 0,
            mss: if is_v6 { 1440 } else { 1460 },
            window: 60_000,
            window_scale: Some(7),
        }
    }

    fn segment(&self, control: TcpControl, payload: &[u8]) -> Vec<u8> {
        let syn = control == TcpControl::Syn;
        let repr = TcpRepr {
            src_port: self.guest.1,
            dst_port: self.remote.1,
            control,
            seq_number: TcpSeqNumber(self.seq),
            ack_number: (self.ack != 0).then_some(TcpSeqNumber(self.ack)),
            window_len: self.window,
            window_scale: self.window_scale.filter(|_| syn),
            max_seg_size: syn.then_some(self.mss),
            sack_permitted: syn,
            sack_ranges: [None; 3],
            timestamp: Some(TcpTimestampRepr::new(1, 0)),
            payload,
        };
        let (src, dst): (IpAddress, IpAddress) = (self.guest.0.into(), self.remote.0.into());
        let mut segment = vec![0; repr.buffer_len()];
        let mut packet = TcpPacket::new_unchecked(&mut segment[..]);
        repr.emit(&mut packet, &src, &dst, &smoltcp::phy::ChecksumCapabilities::default());
        ingress::rebuild(self.guest.0, self.remote.0, ingress::TCP, 64, &segment)
    }

    fn send(&mut self, script: &mut Script, control: TcpControl, payload: &[u8]) {
        script.send_ip(&self.segment(control, payload));
        let control_len = i32::from(matches!(control, TcpControl::Syn | TcpControl::Fin));
        self.seq = self.seq.wrapping_add(i32::try_from(payload.len()).expect("length") + control_len);
        script.settle();
    }

    /// The handshake; the SYN-ACK.
    fn open(&mut self, script: &mut Script) -> Out {
        self.send(script, TcpControl::Syn, b"");
        let frame = script.expect_tcp("SYN-ACK", |segment| segment.syn() && segment.ack());
        assert_eq!(frame.tcp().ack_number(), TcpSeqNumber(self.seq));
        self.ack = frame.tcp().seq_number().0.wrapping_add(1);
        self.send(script, TcpControl::None, b"");
        frame
    }

    /// Acknowledges a segment of data that came in order.
    fn take(&mut self, script: &mut Script, frame: &Out) -> usize {
        let segment = frame.tcp();
        assert_eq!(segment.seq_number(), TcpSeqNumber(self.ack), "in order, and only once");
        let len = segment.payload().len();
        self.ack = self.ack.wrapping_add(i32::try_from(len).expect("length"));
        self.send(script, TcpControl::None, b"");
        len
    }
}

fn listener(is_v6: bool) -> (TcpListener, u16) {
    let listener = TcpListener::bind(if is_v6 { "[::1]:0" } else { "127.0.0.1:0" }).expect("listener");
    let port = listener.local_addr().expect("address").port();
    (listener, port)
}

/// The next connection. That nobody connects is a failure, not a test that never ends.
fn accept(listener: &TcpListener) -> TcpStream {
    use nix::poll::{PollFd, PollFlags, poll};
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, 10_000u16), Ok(1), "nobody connects");
    let stream = listener.accept().expect("connection").0;
    stream.set_read_timeout(Some(std::time::Duration::from_secs(10))).expect("time-out");
    stream
}

/// An ICMPv6 message with its checksum.
fn icmpv6(src: &str, dst: &str, hops: u8, message: &[u8]) -> Vec<u8> {
    let (src, dst) = (ip(src), ip(dst));
    let mut message = message.to_vec();
    let len = u32::try_from(message.len()).expect("length");
    let pseudo = checksum::pseudo_header(&src.into(), &dst.into(), IpProtocol::Icmpv6, len);
    let sum = !checksum::combine(&[pseudo, checksum::data(&message)]);
    if let Some(field) = message.get_mut(2..4) {
        field.copy_from_slice(&sum.to_be_bytes());
    }
    ingress::rebuild(src, dst, ingress::ICMPV6, hops, &message)
}

/// A neighbour solicitation for `target`, with options as they are given.
fn solicitation(target: &str, options: &[u8]) -> Vec<u8> {
    let IpAddr::V6(target) = ip(target) else { unreachable!("written as IPv6") };
    let message = [&[135, 0, 0, 0, 0, 0, 0, 0], &target.octets()[..], options].concat();
    icmpv6("fe80::1", "ff02::1:ff00:2", 255, &message)
}

#[test]
fn neighbour_solicitations_with_options_of_every_kind() {
    let mut script = Script::new(&spec(), true);
    for (options, answered) in [
        (&[][..], true),
        (&[1, 1, 0x52, 0x54, 0, 0, 0, 2], true),
        // Unknown to us, or longer than it has to be: not our business.
        (&[14, 1, 1, 2, 3, 4, 5, 6], true),
        (&[253, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], true),
        // No length at all, which must not be an endless list (RFC 4861 section 4.6), and too much of it.
        (&[1, 0, 0, 0, 0, 0, 0, 0], false),
        (&[14, 0, 0, 0, 0, 0, 0, 0], false),
        (&[1, 1, 0x52, 0x54, 0, 0, 0, 2, 14, 0, 0, 0, 0, 0, 0, 0], false),
        (&[1, 255, 0, 0, 0, 0, 0, 0], false),
        (&[1], false),
        (&[1, 1, 0x52], false),
    ] {
        script.send_ip(&solicitation("fd00::2", options));
        script.settle();
        assert_eq!(script.try_recv().is_some(), answered, "{options:?}");
    }
    // Too short for a target, and for a type.
    for len in 0..24 {
        let whole = [&[135, 0, 0, 0, 0, 0, 0, 0], &[0xfd; 16][..]].concat();
        script.send_ip(&icmpv6("fe80::1", "ff02::1:ff00:2", 255, &whole[..len]));
        script.send_ip(&icmpv6(GUEST_V6, GATEWAY_V6, 255, &whole[..len]));
        script.nothing_comes("an answer to half a message");
    }
}

#[test]
fn ipv6_lengths_that_cannot_be_are_malformed() {
    let server = UdpSocket::bind("[::1]:0").expect("socket");
    server.set_nonblocking(true).expect("non-blocking");
    let port = server.local_addr().expect("address").port();
    let mut script = Script::new(&spec(), true);
    let good = udp((GUEST_V6, 5_000), (GATEWAY_V6, port), b"datagram");
    let mut malformed = 0;
    let mut bad = |script: &mut Script, what: &str, packet: &[u8]| {
        script.send_ip(packet);
        script.nothing_comes(what);
        malformed += 1;
        assert_eq!(script.stats().dropped_malformed, malformed, "{what}");
    };
    // A jumbogram (RFC 2675): the length is in an option, and the header's is nothing.
    let mut jumbo = [&good[..40], &[17, 0, 0xc2, 4, 0, 1, 0, 0], &good[40..]].concat();
    jumbo[6] = 0;
    jumbo[4..6].fill(0);
    bad(&mut script, "a jumbogram", &jumbo);
    let mut longer = good.clone();
    longer[5] += 1;
    bad(&mut script, "more than there is", &longer);
    let mut header = good.clone();
    header.truncate(39);
    bad(&mut script, "half a header", &header);
    let mut extension = [&good[..40], &[17, 200, 1, 4, 0, 0, 0, 0], &good[40..]].concat();
    extension[6] = 60;
    extension[5] += 8;
    bad(&mut script, "an extension header behind the end", &extension);
    let mut endless = good[..40].to_vec();
    endless[6] = 60;
    for next in [60, 60, 60, 60, 60, 60, 60, 60, 17] {
        endless.extend([next, 0, 1, 4, 0, 0, 0, 0]);
    }
    endless.extend(&good[40..]);
    let len = u16::try_from(endless.len() - 40).expect("length");
    endless[4..6].copy_from_slice(&len.to_be_bytes());
    bad(&mut script, "nine extension headers", &endless);
    let mut udp_len = good.clone();
    udp_len[45] = 7;
    bad(&mut script, "less than a UDP header", &udp_len);
    server.recv(&mut [0; 10]).expect_err("none of them");
    script.send_ip(&good);
    script.settle();
    assert_eq!(server.recv(&mut [0; 10]).expect("datagram"), 8);
}

#[test]
fn fragments_that_overlap_are_no_datagram() {
    let servers = ["127.0.0.1:0", "[::1]:0"].map(|addr| UdpSocket::bind(addr).expect("socket"));
    for (server, (guest, gateway)) in servers.iter().zip([(GUEST_V4, GATEWAY_V4), (GUEST_V6, GATEWAY_V6)]) {
        server.set_nonblocking(true).expect("non-blocking");
        let port = server.local_addr().expect("address").port();
        let mut script = Script::new(&spec(), true);
        let whole = udp((guest, 5_000), (gateway, port), &[9; 2_000]);
        let header_len = if guest == GUEST_V4 { 20 } else { 40 };
        let len = whole.len() - header_len;
        let send = |id: u16, at: usize, end: usize| {
            if guest == GUEST_V4 {
                return script.send_ip(&v4_fragment(&whole, id, at, end));
            }
            let mut payload = vec![17, 0];
            payload.extend((u16::try_from(at).expect("offset") | u16::from(end < len)).to_be_bytes());
            payload.extend(u32::from(id).to_be_bytes());
            payload.extend(&whole[40 + at..40 + end]);
            script.send_ip(&ingress::rebuild(ip(guest), ip(gateway), 44, 64, &payload));
        };
        for (id, pieces) in [
            (1, vec![(0, 800), (792, len)]),
            (2, vec![(800, len), (0, 808)]),
            (3, vec![(0, 800), (1_600, len), (792, 1_608)]),
            (4, vec![(0, 8), (16, 800), (8, 24), (800, len)]),
        ] {
            for (at, end) in pieces {
                send(id, at, end);
            }
        }
        // As it should be.
        send(5, 0, 800);
        send(5, 0, 800);
        send(5, 800, len);
        script.settle();
        assert_eq!(server.recv(&mut [0; 3_000]).expect("the whole one"), 2_000);
        server.recv(&mut [0; 3_000]).expect_err("nothing else");
    }
}

#[test]
fn the_gateway_and_nobody_else_answers_arp_and_neighbour_solicitations() {
    let mut script = Script::new(&spec(), false);
    let arp = |target: [u8; 4]| {
        let mut request =
            vec![0, 1, 8, 0, 6, 4, 0, 1, 0x52, 0x54, 0, 0, 0, 2, 10, 0, 2, 100, 0, 0, 0, 0, 0, 0];
        request.extend(target);
        request
    };
    script.send_frame(false, 0x0806, &arp([10, 0, 2, 3]));
    script.nothing_comes("an answer for somebody else");
    script.send_frame(false, 0x0806, &arp([10, 0, 2, 2]));
    let reply = script.expect("ARP reply", |_| true);
    assert_eq!(reply.ethernet()[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
    assert_eq!(reply.ethernet()[22..28], [0x52, 0x54, 0, 0, 0, 1]);

    let mut frame = solicitation("fd00::3", &[1, 1, 0x52, 0x54, 0, 0, 0, 2]);
    script.send_ip(&frame);
    frame = solicitation("fd00::2", &[1, 1, 0x52, 0x54, 0, 0, 0, 2]);
    // A hop limit that proves that it has crossed a router.
    let mut forged = frame.clone();
    forged[7] = 254;
    script.send_ip(&forged);
    script.nothing_comes("an answer for somebody else, or to somebody far away");
    script.send_ip(&frame);
    let advert = script.expect("neighbour advertisement", |_| true);
    let packet = advert.packet();
    assert_eq!((packet.payload()[0], packet.hop_limit, packet.dst), (136, 255, ip("fe80::1")));
    assert_eq!(packet.payload()[4], 0xe0, "a router, solicited, the only one");
    // Whether the address is free is asked by nobody, and answered to all.
    let IpAddr::V6(target) = ip("fd00::2") else { unreachable!("written as IPv6") };
    let question = [&[135, 0, 0, 0, 0, 0, 0, 0], &target.octets()[..]].concat();
    script.send_ip(&icmpv6("::", "ff02::1:ff00:2", 255, &question));
    let advert = script.expect("neighbour advertisement", |_| true);
    let packet = advert.packet();
    assert_eq!((packet.payload()[0], packet.payload()[4], packet.dst), (136, 0xa0, ip("ff02::1")));
}

#[test]
fn frames_from_other_addresses_than_the_guests_go_nowhere() {
    let mut script = Script::new(&spec(), false);
    for (i, src) in ["127.0.0.1", "192.0.2.1", "10.0.2.2", "10.0.2.255", "0.0.0.0"].into_iter().enumerate() {
        script.send_ip(&udp((src, 5), (GATEWAY_V4, 9), b"x"));
        script.nothing_comes(src);
        assert_eq!(script.stats().dropped_source, u64::try_from(i + 1).expect("number"));
    }
}

#[test]
fn a_syn_is_answered_with_the_links_real_segment_size() {
    for (is_v6, segmentation) in [(false, false), (false, true), (true, false), (true, true)] {
        let (listener, port) = listener(is_v6);
        let mut script = Script::new(&spec(), segmentation);
        let syn_ack = Peer::new(is_v6, port).open(&mut script);
        let segment = syn_ack.tcp();
        let repr = TcpRepr::parse(
            &segment,
            &syn_ack.packet().src.into(),
            &syn_ack.packet().dst.into(),
            &smoltcp::phy::ChecksumCapabilities::ignored(),
        )
        .expect("segment");
        assert_eq!(repr.max_seg_size, Some(if is_v6 { 1440 } else { 1460 }));
        assert!(repr.window_scale.is_some() && repr.sack_permitted && repr.timestamp.is_some());
        accept(&listener);
    }
}

#[test]
fn a_link_without_ipv6_may_be_small() {
    let (listener, port) = listener(false);
    let mut script = Script::new(&StackSpec { mtu: 600, ipv6: false, ..spec() }, false);
    let mut peer = Peer::new(false, port);
    let syn_ack = peer.open(&mut script);
    let (src, dst) = (syn_ack.packet().src.into(), syn_ack.packet().dst.into());
    let ignored = smoltcp::phy::ChecksumCapabilities::ignored();
    let repr = TcpRepr::parse(&syn_ack.tcp(), &src, &dst, &ignored).expect("segment");
    assert_eq!(repr.max_seg_size, Some(560));
    accept(&listener).write_all(&[7; 3_000]).expect("write");
    let mut got = 0;
    while got < 3_000 {
        let frame = script.expect_tcp("data", |segment| !segment.payload().is_empty());
        assert!(frame.packet().bytes.len() <= 600);
        got += peer.take(&mut script, &frame);
    }
}

#[test]
fn a_refused_connection_is_a_reset_that_acknowledges_the_syn() {
    let port = {
        let (_listener, port) = listener(false);
        port
    };
    let mut script = Script::new(&spec(), true);
    let mut peer = Peer::new(false, port);
    peer.send(&mut script, TcpControl::Syn, b"");
    let reset = script.expect_tcp("RST", |_| true);
    let segment = reset.tcp();
    assert!(segment.rst() && segment.ack() && !segment.syn());
    assert_eq!(segment.ack_number(), TcpSeqNumber(peer.seq));
    assert_eq!(script.stats().tcp_flows, 0);
}

/// A listener whose queue is full: whoever connects now waits until somebody is accepted.
struct Busy {
    listener: TcpListener,
    port: u16,
    _queued: Vec<TcpStream>,
}

impl Busy {
    fn new() -> Self {
        let (listener, port) = listener(false);
        // Shortens the queue of a socket that listens already.
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).expect("backlog"))
            .expect("listen");
        // A queue of no length holds one.
        let queued = vec![TcpStream::connect(("127.0.0.1", port)).expect("connect")];
        Self { listener, port, _queued: queued }
    }
}

#[test]
fn a_syn_is_held_without_its_data_until_the_host_is_connected() {
    let busy = Busy::new();
    let mut script = Script::new(&spec(), true);
    let mut peer = Peer::new(false, busy.port);
    let start = peer.seq;
    peer.send(&mut script, TcpControl::Syn, &[7; 20_000]);
    // The guest repeats it, as its kernel would.
    for _ in 0..3 {
        peer.seq = start;
        peer.send(&mut script, TcpControl::Syn, &[7; 20_000]);
    }
    script.nothing_comes("an answer before the host's");
    assert_eq!((script.stats().tcp_flows, script.stats().tcp_out), (1, 1));
    assert!(script.engine.held_bytes() < 200, "{}", script.engine.held_bytes());
    // Now there is room; the host's kernel tries again within some seconds of real time.
    accept(&busy.listener);
    let answer = script.expect_tcp("SYN-ACK", |segment| segment.syn() && segment.ack());
    assert_eq!(
        answer.tcp().ack_number(),
        TcpSeqNumber(start.wrapping_add(1)),
        "the data is not acknowledged"
    );
    peer.seq = start.wrapping_add(1);
    peer.ack = answer.tcp().seq_number().0.wrapping_add(1);
    peer.send(&mut script, TcpControl::None, b"hello");
    let mut hello = [0; 5];
    accept(&busy.listener).read_exact(&mut hello).expect("read");
    assert_eq!(&hello, b"hello");
}

#[test]
fn a_guest_that_gives_up_connecting_is_forgotten() {
    let busy = Busy::new();
    let mut script = Script::new(&spec(), true);
    let mut peer = Peer::new(false, busy.port);
    peer.send(&mut script, TcpControl::Syn, b"");
    assert_eq!(script.stats().tcp_flows, 1);
    peer.send(&mut script, TcpControl::Rst, b"");
    script.nothing_comes("an answer to a reset");
    assert_eq!(script.stats().tcp_flows, 0);
}

#[test]
fn a_port_may_be_used_again_at_once() {
    let (listener, port) = listener(false);
    for established in [true, false] {
        let mut script = Script::new(&spec(), true);
        let mut peer = Peer::new(false, port);
        if established {
            peer.open(&mut script);
        } else {
            peer.send(&mut script, TcpControl::Syn, b"");
            script.expect_tcp("SYN-ACK", |segment| segment.syn());
        }
        let mut first = accept(&listener);
        // Both in one turn.
        script.send_ip(&peer.segment(TcpControl::Rst, b""));
        let mut again = Peer { seq: peer.seq.wrapping_add(1 << 30), ack: 0, ..peer };
        again.open(&mut script);
        again.send(&mut script, TcpControl::Psh, b"hello");
        let mut hello = [0; 5];
        accept(&listener).read_exact(&mut hello).expect("read");
        first.read(&mut hello).expect_err("reset");
        assert_eq!(script.stats().tcp_flows, 1);
    }
}

#[test]
fn segments_of_no_connection_are_reset_and_resets_are_not() {
    let mut script = Script::new(&spec(), true);
    let mut peer = Peer::new(true, 9);
    peer.ack = 77;
    peer.send(&mut script, TcpControl::None, b"data");
    assert!(script.expect_tcp("RST", |_| true).tcp().rst());
    peer.send(&mut script, TcpControl::Rst, b"");
    script.nothing_comes("an answer to a reset");
}

#[test]
fn super_segments_carry_the_guests_segment_size() {
    for (is_v6, mss, size) in [(false, 1460, 1448), (true, 1440, 1428), (false, 500, 488), (true, 9000, 1428)]
    {
        let (listener, port) = listener(is_v6);
        let mut script = Script::new(&spec(), true);
        let mut peer = Peer::new(is_v6, port);
        peer.mss = mss;
        peer.open(&mut script);
        let mut server = accept(&listener);
        server.write_all(&[7; 30_000]).expect("write");
        let mut got = 0;
        let mut largest = 0;
        while got < 30_000 {
            let frame = script.expect_tcp("data", |segment| !segment.payload().is_empty());
            let kind = if is_v6 { 4 } else { 1 };
            let len = frame.tcp().payload().len();
            largest = largest.max(len);
            let expected = if len > usize::from(size) { (kind, size) } else { (0, 0) };
            assert_eq!(frame.offload(), expected);
            assert_eq!(frame.0[0], 1, "the kernel finishes the checksum");
            got += peer.take(&mut script, &frame);
        }
        assert!(largest > 5_000, "{largest}");
    }
}

#[test]
fn without_segmentation_every_frame_fits_the_link() {
    for is_v6 in [false, true] {
        let (listener, port) = listener(is_v6);
        let mut script = Script::new(&spec(), false);
        let mut peer = Peer::new(is_v6, port);
        peer.open(&mut script);
        accept(&listener).write_all(&[7; 30_000]).expect("write");
        let mut ended = false;
        let mut got = 0;
        while got < 30_000 {
            let frame = script.expect_tcp("data", |segment| !segment.payload().is_empty());
            assert!(frame.0.len() <= HEAD + 1500 && frame.offload() == (0, 0));
            got += peer.take(&mut script, &frame);
            // The server has closed: the end comes with the last byte, or right behind it.
            ended |= frame.tcp().fin();
        }
        if !ended {
            script.expect_tcp("FIN", |segment| segment.fin());
        }
    }
}

#[test]
fn lost_data_is_sent_again_and_a_silent_guest_is_given_up() {
    let (listener, port) = listener(false);
    let mut script = Script::new(&spec(), true);
    let mut peer = Peer::new(false, port);
    peer.open(&mut script);
    let mut server = accept(&listener);
    server.write_all(b"lost").expect("write");
    let first = script.expect_tcp("data", |segment| segment.payload() == b"lost");
    script.nothing_comes("a repetition at once");
    script.advance_millis(1_100);
    let again = script.expect_tcp("data again", |segment| segment.payload() == b"lost");
    assert_eq!(first.tcp().seq_number(), again.tcp().seq_number());
    // It goes on, ever more slowly, for three minutes.
    for _ in 0..179 {
        script.advance_millis(1_000);
    }
    script.expect_tcp("RST", |segment| segment.rst());
    assert_eq!(script.stats().tcp_flows, 0);
    server.read(&mut [0; 10]).expect_err("the peer notices");
}

#[test]
fn a_connection_may_rest_for_a_day() {
    let (listener, port) = listener(false);
    let mut script = Script::new(&spec(), true);
    let mut peer = Peer::new(false, port);
    peer.open(&mut script);
    let mut server = accept(&listener);
    for _ in 0..24 {
        script.advance(Duration::from_secs(3_600));
    }
    script.nothing_comes("anything while nothing happens");
    server.write_all(b"still there?").expect("write");
    let frame = script.expect_tcp("data", |segment| !segment.payload().is_empty());
    peer.take(&mut script, &frame);
    script.advance_millis(5_000);
    assert_eq!(script.stats().tcp_flows, 1);
}

#[test]
fn nothing_is_lost_while_the_tap_takes_no_frames() {
    const SIZE: usize = 3_000_000;
    let (listener, port) = listener(false);
    let mut script = Script::new(&spec(), true);
    let mut peer = Peer::new(false, port);
    // 60,000 << 7 bytes: more than the wire holds.
    peer.open(&mut script);
    let server = accept(&listener);
    let writer = std::thread::spawn(move || (&server).write_all(&vec![7; SIZE]).expect("write"));
    for _ in 0..50 {
        script.turn(Duration::from_millis(1));
    }
    let mut got = 0;
    while got < SIZE {
        let frame = script.expect_tcp("data", |segment| !segment.payload().is_empty());
        // `take` demands every byte in order and exactly once, and virtual time stands still: no repetition.
        got += peer.take(&mut script, &frame);
    }
    writer.join().expect("writer");
}

#[test]
fn a_tap_without_room_lets_everybody_rest_and_nothing_is_lost() {
    let publish = forwarded(Protocol::Udp, 9_090);
    let server = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let port = server.local_addr().expect("address").port();
    for inbound in [false, true] {
        let mut script = Script::with(&spec(), false, std::slice::from_ref(&publish));
        script.send_ip(&udp((GUEST_V4, 5_000), (GATEWAY_V4, port), b"ask"));
        script.settle();
        let flow = server.recv_from(&mut [0; 10]).expect("datagram").1;
        let to = if inbound { script.published[0] } else { flow };
        let mut sent = 0u32;
        let mut send = |script: &mut Script, count| {
            for _ in 0..count {
                let mut datagram = [0; 1_000];
                datagram[..4].copy_from_slice(&sent.to_be_bytes());
                server.send_to(&datagram, to).expect("send");
                sent += 1;
            }
            script.settle();
            sent
        };
        while !script.engine.is_blocked() {
            send(&mut script, 10);
        }
        // As many as the socket's own queue holds.
        let all = send(&mut script, 40);
        assert!(script.engine.is_quiet(script.now), "what cannot be sent on must not wake the stack");
        for expected in 0..all {
            let frame = script.expect("every datagram", |_| true);
            assert_eq!(frame.packet().payload()[8..12], expected.to_be_bytes());
        }
        // Far more than anybody holds.
        for _ in 0..100 {
            send(&mut script, 50);
        }
        assert!(script.engine.is_blocked() && script.engine.is_quiet(script.now));
        script.engine.check_bounds();
        while script.engine.is_blocked() || !script.engine.is_quiet(script.now) {
            script.expect("what was held", |_| true);
            script.settle();
        }
    }
}

#[test]
fn connections_rest_while_the_tap_has_no_room() {
    let (listener, port) = listener(false);
    let mut script = Script::new(&spec(), true);
    let mut peers: Vec<Peer> = (0..40).map(|_| Peer::new(false, port)).collect();
    let mut servers = Vec::new();
    for (guest_port, peer) in (1_000..).zip(&mut peers) {
        peer.guest.1 = guest_port;
        peer.open(&mut script);
        let server = accept(&listener);
        server.set_nonblocking(true).expect("non-blocking");
        servers.push(server);
    }
    let mut written: Vec<usize> = vec![0; servers.len()];
    let mut write = |script: &mut Script| {
        for (server, written) in servers.iter_mut().zip(&mut written) {
            *written += server.write(&[7; 50_000]).unwrap_or(0);
        }
        script.settle();
        written.iter().sum::<usize>()
    };
    while !script.engine.is_blocked() {
        write(&mut script);
    }
    write(&mut script);
    assert!(script.engine.is_quiet(script.now));
    let all = write(&mut script);
    assert!(script.engine.is_quiet(script.now));
    let mut got = 0;
    while got < all {
        let frame = script.expect_tcp("data", |segment| !segment.payload().is_empty());
        let to = usize::from(frame.tcp().dst_port() - 1_000);
        got += peers[to].take(&mut script, &frame);
    }
}

#[test]
fn udp_flows_end_by_idleness_only() {
    let server = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let port = server.local_addr().expect("address").port();
    let mut script = Script::new(&spec(), true);
    let ask = |script: &mut Script| {
        script.send_ip(&udp((GUEST_V4, 5_000), (GATEWAY_V4, port), b"ask"));
        script.settle();
        server.recv_from(&mut [0; 10]).expect("datagram").1
    };
    // Unanswered: a minute.
    ask(&mut script);
    script.advance_millis(59_000);
    assert_eq!(script.stats().udp_flows, 1);
    script.advance_millis(2_000);
    assert_eq!(script.stats().udp_flows, 0);
    // Answered: three.
    let from = ask(&mut script);
    server.send_to(b"answer", from).expect("send");
    script.expect("the answer", |frame| frame.packet().payload().ends_with(b"answer"));
    for _ in 0..17 {
        script.advance_millis(10_000);
    }
    assert_eq!(script.stats().udp_flows, 1);
    assert_eq!(ask(&mut script), from, "the same socket");
    script.advance_millis(179_000);
    assert_eq!(script.stats().udp_flows, 1);
    script.advance_millis(2_000);
    assert_eq!(script.stats().udp_flows, 0);
}

#[test]
fn what_many_peers_had_need_of_is_given_back() {
    let mut script = Script::with(&spec(), false, &[forwarded(Protocol::Udp, 9_090)]);
    let to = (ip("127.0.0.1"), script.published[0].port());
    let peers: Vec<_> = (0..400).map(|_| UdpSocket::bind("127.0.0.1:0").expect("socket")).collect();
    for peer in &peers {
        peer.send_to(b"x", to).expect("send");
        script.expect("the datagram", |_| true);
    }
    assert!(script.engine.udp.room_for_peers() >= peers.len());
    script.advance(Duration::from_secs(100));
    peers[0].send_to(b"x", to).expect("send");
    script.expect("the datagram", |_| true);
    script.advance(Duration::from_secs(100));
    assert!((1..100).contains(&script.engine.udp.room_for_peers()), "{}", script.engine.udp.room_for_peers());
}

#[test]
fn peers_that_look_alike_keep_a_port_each() {
    let publish = |host_ip| Publish { host_ip: Some(host_ip), ..forwarded(Protocol::Udp, 9_090) };
    let mut script = Script::with(
        &spec(),
        false,
        &[publish(ip("0.0.0.0")), publish(ip("0.0.0.0")), publish(ip("127.0.0.1"))],
    );
    let first = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let port = first.local_addr().expect("address").port();
    let others = ["127.0.0.2", "127.0.0.3"].map(|from| UdpSocket::bind((from, port)).expect("socket"));
    let [to, second, third] = script.published[..] else { panic!("three ports") };
    let [to, second, third] = [to, second, third].map(|addr| SocketAddr::new(ip("127.0.0.1"), addr.port()));
    let seen = |script: &mut Script, from: &UdpSocket, to: SocketAddr| {
        from.send_to(b"x", to).expect("send");
        let frame = script.expect("the datagram", |_| true);
        let packet = frame.packet();
        assert_eq!(packet.src, ip(GATEWAY_V4));
        UdpPacket::new_checked(packet.payload()).expect("datagram").src_port()
    };
    assert_eq!(seen(&mut script, &first, to), port);
    // Addresses that look alike, and one address at two ports.
    let all = [(&others[0], to), (&others[1], to), (&first, second), (&others[0], second), (&first, third)];
    let ports = all.map(|(from, to)| seen(&mut script, from, to));
    for (i, port_of) in ports.iter().enumerate() {
        assert!(*port_of != port && !ports[..i].contains(port_of), "{port} {ports:?}");
    }
    for _ in 0..3 {
        assert_eq!(all.map(|(from, to)| seen(&mut script, from, to)), ports);
        assert_eq!(seen(&mut script, &first, to), port);
    }
    // The first one is gone, the others stay where they are.
    script.advance(Duration::from_secs(100));
    assert_eq!(all.map(|(from, to)| seen(&mut script, from, to)), ports);
    script.advance(Duration::from_secs(100));
    assert_eq!(all.map(|(from, to)| seen(&mut script, from, to)), ports);
    script.engine.check_bounds();
}

#[test]
fn what_goes_to_the_hosts_loopback_comes_from_there() {
    let server = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let port = server.local_addr().expect("address").port();
    let mut spec = spec();
    spec.outbound.v4 = Some(std::net::Ipv4Addr::new(127, 0, 0, 9));
    let mut script = Script::new(&spec, true);
    script.send_ip(&udp((GUEST_V4, 5_000), (GATEWAY_V4, port), b"ask"));
    script.settle();
    let from = server.recv_from(&mut [0; 10]).expect("datagram").1;
    assert_eq!(from.ip(), ip("127.0.0.1"));
    server.send_to(b"answer", from).expect("send");
    script.expect("the answer", |frame| frame.packet().payload().ends_with(b"answer"));
}

#[test]
fn fragments_arrive_as_one_datagram_or_not_at_all() {
    let server = UdpSocket::bind("127.0.0.1:0").expect("socket");
    server.set_nonblocking(true).expect("non-blocking");
    let port = server.local_addr().expect("address").port();
    let mut script = Script::new(&spec(), true);
    let whole = udp((GUEST_V4, 5_000), (GATEWAY_V4, port), &[9; 3_000]);
    let piece = |at: usize, end: usize| v4_fragment(&whole, 7, at, end);
    for (at, end) in [(1_480, 2_960), (2_960, 3_008), (0, 1_480)] {
        script.send_ip(&piece(at, end));
    }
    script.settle();
    assert_eq!(server.recv(&mut [0; 4_000]).expect("datagram"), 3_000);
    // Half a minute between the pieces is too much.
    script.send_ip(&piece(0, 1_480));
    script.settle();
    script.advance_millis(31_000);
    script.send_ip(&piece(1_480, 2_960));
    script.send_ip(&piece(2_960, 3_008));
    script.settle();
    server.recv(&mut [0; 4_000]).expect_err("not at all");
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

#[test]
fn dns_tries_on_until_time_is_up() {
    let query = crate::dns::message::tests::query(0x1234, "some.name", 1, true);
    let silent: Vec<UdpSocket> = (0..2).map(|_| UdpSocket::bind("127.0.0.1:0").expect("socket")).collect();
    let asked = |i: usize| {
        silent[i].set_nonblocking(true).expect("non-blocking");
        let mut buffer = [0; 512];
        std::iter::from_fn(|| silent[i].recv(&mut buffer).ok().map(|len| buffer[..len].to_vec()))
            .collect::<Vec<_>>()
    };
    let mut spec = spec();
    spec.dns.upstreams = silent.iter().map(|socket| socket.local_addr().expect("address")).collect();
    let mut script = Script::new(&spec, true);
    let ask = udp((GUEST_V4, 5_000), (GATEWAY_V4, 53), &query);
    script.send_ip(&ask);
    script.send_ip(&ask);
    script.settle();
    let first = asked(0);
    assert_eq!(first.len(), 1, "the repetition of a query under way is not sent on");
    assert!(first[0][12..].eq_ignore_ascii_case(&query[12..]));
    assert!(asked(1).is_empty());
    script.advance_millis(1_600);
    assert_eq!((asked(0).len(), asked(1).len()), (0, 1));
    script.advance_millis(1_600);
    assert_eq!((asked(0).len(), asked(1).len()), (1, 0));
    script.nothing_comes("an answer before its time");
    script.advance_millis(1_600);
    let fail = script.expect("SERVFAIL", |_| true);
    let packet = fail.packet();
    let message = &packet.payload()[8..];
    assert_eq!((&message[..2], message[3] & 15), (&[0x12, 0x34][..], 2));
    assert_eq!(script.engine.open_queries(), 0);
}

#[test]
fn dns_over_tcp_waits_for_a_guest_that_reads_no_answers() {
    let mut script = Script::new(&spec(), true);
    let mut peer = Peer::new(false, 53);
    peer.open(&mut script);
    peer.window = 0;
    // Empty messages: each is answered at once, with an error six times as long. No faster than they are read.
    let mut closed = false;
    for _ in 0..400 {
        peer.send(&mut script, TcpControl::None, &[0; 2_000]);
        closed |= std::iter::from_fn(|| script.try_recv()).any(|frame| frame.tcp().window_len() == 0);
    }
    assert!(closed, "its window closes");
    assert!(script.engine.dns_bytes() <= 1 << 20, "{}", script.engine.dns_bytes());
    assert_eq!(script.stats().tcp_flows, 1);
}

#[test]
fn dns_over_tcp_takes_a_query_in_any_pieces() {
    let mut spec = spec();
    spec.dns.hosts = vec![("some.name".into(), ip("192.0.2.7"))];
    let mut script = Script::new(&spec, true);
    let mut peer = Peer::new(true, 53);
    peer.open(&mut script);
    let query = crate::dns::message::tests::query(0x1234, "some.name", 1, false);
    let mut stream = Vec::new();
    for _ in 0..3 {
        stream.extend(u16::try_from(query.len()).expect("length").to_be_bytes());
        stream.extend(&query);
    }
    let (pieces, rest) = stream.split_at(40);
    for byte in pieces {
        peer.send(&mut script, TcpControl::None, &[*byte]);
    }
    peer.send(&mut script, TcpControl::None, rest);
    let mut answers = 0;
    while answers < 3 {
        let frame = script.expect_tcp("answers", |segment| !segment.payload().is_empty());
        answers += frame.tcp().payload().windows(4).filter(|window| window == &[192, 0, 2, 7]).count();
        peer.take(&mut script, &frame);
    }
    // One too many connections.
    for port in 1..=128 {
        let mut another = Peer::new(true, 53);
        another.guest.1 = port;
        another.send(&mut script, TcpControl::Syn, b"");
    }
    script.expect_tcp("RST", |segment| segment.rst());
    assert_eq!((script.stats().tcp_flows, script.stats().refused_by_limit), (128, 1));
}

#[test]
fn an_expired_hop_limit_is_reported() {
    let mut script = Script::new(&spec(), true);
    let mut packet = udp((GUEST_V4, 5_000), (GATEWAY_V4, 33_434), b"probe");
    let mut header = smoltcp::wire::Ipv4Packet::new_unchecked(&mut packet[..]);
    header.set_hop_limit(1);
    header.fill_checksum();
    script.send_ip(&packet);
    let error = script.expect("time exceeded", |_| true);
    let error = error.packet();
    let icmp = Icmpv4Packet::new_checked(error.payload()).expect("message");
    assert!(icmp.verify_checksum());
    assert_eq!((error.payload()[0], &error.payload()[8..]), (11, &packet[..]));
}

#[test]
fn the_more_connections_the_smaller_their_windows() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("limit");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("limit");
    let (listener, port) = listener(true);
    let mut script = Script::new(&spec(), true);
    let mut streams = Vec::new();
    let mut scales = Vec::new();
    for i in 0..520u16 {
        let mut peer = Peer::new(true, port);
        peer.guest.1 = 1_000 + i;
        let answer = peer.open(&mut script);
        streams.push(accept(&listener));
        let packet = answer.packet();
        let unchecked = smoltcp::phy::ChecksumCapabilities::ignored();
        let repr = TcpRepr::parse(&answer.tcp(), &packet.src.into(), &packet.dst.into(), &unchecked);
        scales.push(repr.expect("segment").window_scale);
    }
    let with = |scale| scales.iter().filter(|other| **other == Some(scale)).count();
    assert_eq!((with(3), with(1), with(0)), (64, 448, 8));
}

#[test]
fn a_segment_behind_the_end_of_the_window_is_not_taken() {
    for window_scale in [Some(7), None] {
        let (listener, port) = listener(false);
        let mut script = Script::new(&spec(), true);
        let mut peer = Peer::new(false, port);
        peer.window_scale = window_scale;
        peer.open(&mut script);
        let start = peer.seq;
        // Before the stack has acknowledged anything, so all that it has announced is the window of its SYN.
        peer.seq = start.wrapping_add(500_000);
        peer.send(&mut script, TcpControl::None, &[7; 60_000]);
        let answer = script.expect_tcp("an acknowledgement", |segment| !segment.syn()).0;
        let segment = Out(answer);
        assert_eq!(segment.tcp().ack_number(), TcpSeqNumber(start));
        for (_, right) in segment.tcp().selective_ack_ranges().expect("options").into_iter().flatten() {
            assert!(right.wrapping_sub(u32::from_ne_bytes(start.to_ne_bytes())) <= 512 * 1024);
        }
        peer.seq = start;
        peer.send(&mut script, TcpControl::None, b"in order");
        accept(&listener).read_exact(&mut [0; 8]).expect("read");
    }
}

#[test]
fn the_wire_is_a_socket_pair() {
    // What these scripts stand on: one write is one frame, whatever its size, and a full wire says so.
    let script = Script::new(&spec(), true);
    nix::unistd::write(script.wire.as_fd(), &[0; 66_000]).expect("a large frame");
    let mut full = false;
    for _ in 0..1_000 {
        full |= nix::unistd::write(script.wire.as_fd(), &[0; 66_000]).is_err();
    }
    assert!(full);
}

#[test]
fn commands_are_obeyed_between_two_packets_and_answered_when_the_stack_is_gone() {
    let Script { mut engine, control, wire, now, .. } = Script::new(&spec(), true);
    let port = forwarded(Protocol::Tcp, 80);
    std::thread::scope(|scope| {
        let caller = scope.spawn(|| {
            // Also if the caller fails: the engine turns until it is told to stop.
            struct Stop<'a>(&'a Control);
            impl Drop for Stop<'_> {
                fn drop(&mut self) {
                    self.0.stop();
                }
            }
            let _stop = Stop(&control);
            let published = control.publish(&port).expect("published");
            assert_eq!(control.published().expect("list"), std::slice::from_ref(&published));
            assert_eq!(control.unpublish(published.id).expect("removed"), Some(published.clone()));
            assert_eq!(control.unpublish(published.id).expect("no such port"), None);
            // What it had is free again.
            TcpListener::bind(published.addresses[0]).expect("closed");
        });
        while engine.turn(&mut || now, None) == Turn::Goes {}
        caller.join().expect("caller");
    });
    // Commands that nobody will run any more are answered, too.
    let waiting = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| control.published());
        drop((engine, wire));
        waiting.join().expect("caller")
    });
    assert!(matches!(waiting, Err(crate::Error::Stopped)));
    assert!(matches!(control.publish(&port), Err(crate::Error::Stopped)));
}

#[test]
fn of_ports_for_which_descriptors_do_not_suffice_none_is_published() {
    let mut script = Script::new(&spec(), true);
    let thirty = || {
        let ports = Published::bind(&[(); 30].map(|()| forwarded(Protocol::Tcp, 80))).expect("bound");
        let addresses: Vec<SocketAddr> = ports.addresses().map(|(address, ..)| address).collect();
        (ports, addresses)
    };
    let used = script.engine.budget().used();
    script.engine.budget().limit = used + 40;
    let (ports, addresses) = thirty();
    // Before anything is bound it is known.
    let [few, many] =
        [6, 30].map(|ports| script.engine.check_room_for(&vec![forwarded(Protocol::Tcp, 80); ports]));
    assert!(few.is_ok() && matches!(many, Err(crate::Error::Listen { .. })));
    match script.engine.publish_all(ports) {
        Err(crate::Error::Listen { addr, source, .. }) => {
            assert_eq!(source.raw_os_error(), Some(nix::errno::Errno::EMFILE as i32));
            assert!(addr != addresses[0], "some did fit");
        }
        other => panic!("{other:?}"),
    }
    assert!(script.engine.published().is_empty() && script.engine.budget().used() == used);
    for address in addresses {
        TcpListener::bind(address).expect("free again");
    }
    script.engine.budget().limit = used + 200;
    let (ports, addresses) = thirty();
    let published = script.engine.publish_all(ports).expect("published");
    assert_eq!(published.iter().flat_map(|port| port.addresses.clone()).collect::<Vec<_>>(), addresses);
    assert_eq!(script.engine.published(), published);
}

#[test]
fn questions_about_the_link_get_one_answer_each_and_leave_one_timer() {
    let mut script = Script::new(&spec(), true);
    let mut discover = vec![0; 240];
    discover[..4].copy_from_slice(&[1, 1, 6, 0]);
    discover[236..].copy_from_slice(&[0x63, 0x82, 0x53, 0x63]);
    discover.extend([53, 1, 1, 255]);
    let solicit = [1, 0, 0, 1, 0, 1, 0, 2, b'm', b'e'];
    let questions = [
        udp(("0.0.0.0", 68), ("255.255.255.255", 67), &discover),
        udp(("fe80::1", 546), ("ff02::1:2", 547), &solicit),
        icmpv6("fe80::1", "ff02::2", 255, &[133, 0, 0, 0, 0, 0, 0, 0]),
    ];
    for _ in 0..200 {
        for question in &questions {
            script.send_ip(question);
            script.settle();
            assert!(script.try_recv().is_some() && script.try_recv().is_none());
        }
    }
    // From elsewhere, to elsewhere, cut, and through a router: nothing.
    for question in [
        udp(("192.0.2.1", 68), ("255.255.255.255", 67), &discover),
        udp(("0.0.0.0", 69), ("255.255.255.255", 67), &discover),
        udp(("0.0.0.0", 68), ("255.255.255.255", 67), &discover[..239]),
        udp(("2001:db8::1", 546), ("ff02::1:2", 547), &solicit),
        udp(("fe80::1", 546), ("ff02::1:2", 547), &solicit[..7]),
        icmpv6("fe80::1", "ff02::2", 254, &[133, 0, 0, 0, 0, 0, 0, 0]),
    ] {
        script.send_ip(&question);
        script.settle();
        assert!(script.try_recv().is_none(), "{question:?}");
    }
    script.engine.check_bounds();
    assert_eq!(script.engine.timers(), 1);
    // What the router says of itself holds for eighteen hours, and is said again before they are over.
    script.advance(crate::config::ROUTER_REFRESH);
    let again = script.try_recv().expect("an advertisement");
    assert_eq!(again.packet().payload()[0], 134);
    assert_eq!(again.packet().dst, ip("ff02::1"));
}
