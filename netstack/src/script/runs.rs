//! Datagrams that go together, both ways.

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::UdpGsoSegment;

use super::*;

const GSO_UDP_L4: u8 = 5;

#[test]
fn a_capture_has_every_frame_as_it_crossed_the_tap_and_the_names() {
    use crate::pcap::{Capture, tests as pcap};
    let (file, copy) = pcap::memory();
    let capture = Capture::start(file).expect("thread");
    capture.begin().expect("a file");
    let mut spec = StackSpec { capture: Some(capture.clone()), ..spec() };
    spec.dns.hosts = vec![("own.example".to_owned(), ip(GUEST_V4))];
    let server = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let port = server.local_addr().expect("address").port();
    let mut script = Script::new(&spec, true);
    let packet = udp((GUEST_V4, 5_000), (GATEWAY_V4, port), b"hello");
    script.send_ip(&packet);
    script.settle();
    let guest = server.recv_from(&mut [0; 10]).expect("hello").1;
    // Two datagrams that go to the guest as one super-segment.
    setsockopt(&server, UdpGsoSegment, &700).expect("segments");
    server.send_to(&[1; 1_400], guest).expect("send");
    let out = script.expect("the answer", |_| true);
    assert_eq!(out.offload(), (GSO_UDP_L4, 700));
    drop(script);
    let captured = capture.finish();
    assert!(captured.complete && (captured.seen, captured.dropped) == (2, 0), "{captured:?}");
    let blocks = pcap::blocks(&pcap::read(copy));
    let name =
        blocks.iter().position(|(kind, body)| *kind == 4 && body.windows(11).any(|w| w == b"own.example"));
    let packets: Vec<_> = blocks.iter().filter(|(kind, _)| *kind == 6).collect();
    assert!(name.is_some_and(|at| blocks[at + 1..].iter().filter(|(kind, _)| *kind == 6).count() == 2));
    let (sent, options) = pcap::packet(&packets[0].1);
    assert_eq!((&sent[ETHERNET_HEADER_LEN..], &options[0]), (&packet[..], &(2, vec![2, 0, 0, 0])));
    let (received, options) = pcap::packet(&packets[1].1);
    assert_eq!((&received[..], &options[0]), (out.ethernet(), &(2, vec![1, 0, 0, 0])));
}

#[test]
fn a_capture_that_ends_early_ends_nothing_else() {
    use crate::pcap::Capture;
    let full = std::fs::File::options().write(true).open("/dev/full").expect("/dev/full");
    let capture = Capture::start(full).expect("thread");
    capture.begin().expect("a file");
    assert!(!capture.finish().complete);
    let mut script = Script::new(&StackSpec { capture: Some(capture), ..spec() }, true);
    let server = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let port = server.local_addr().expect("address").port();
    script.send_ip(&udp((GUEST_V4, 5_000), (GATEWAY_V4, port), b"hello"));
    script.settle();
    assert_eq!(server.recv_from(&mut [0; 10]).expect("hello").0, 5);
}

struct Ends {
    script: Script,
    server: UdpSocket,
    /// The server's port, and where it sees the guest.
    port: u16,
    guest: SocketAddr,
}

impl Ends {
    fn new(v6: bool, segmentation: bool) -> Self {
        let server = UdpSocket::bind(if v6 { "[::1]:0" } else { "127.0.0.1:0" }).expect("socket");
        let port = server.local_addr().expect("address").port();
        let mut script = Script::new(&spec(), segmentation);
        let (from, to) = if v6 { (GUEST_V6, GATEWAY_V6) } else { (GUEST_V4, GATEWAY_V4) };
        script.send_ip(&udp((from, 5_000), (to, port), b"hello"));
        script.settle();
        let guest = server.recv_from(&mut [0; 10]).expect("hello").1;
        server.set_nonblocking(true).expect("non-blocking");
        Self { script, server, port, guest }
    }

    fn send(&self, payload: &[u8]) {
        self.server.send_to(payload, self.guest).expect("send");
    }

    /// What the server has received.
    fn received(&mut self) -> Vec<Vec<u8>> {
        self.script.settle();
        let mut buffer = [0; 2_000];
        let mut all = Vec::new();
        while let Ok(len) = self.server.recv(&mut buffer) {
            all.push(buffer[..len].to_vec());
        }
        all
    }

    /// The frames that the guest has got: kind of super-segment, its size, payload.
    fn frames(&mut self) -> Vec<(u8, u16, Vec<u8>)> {
        self.script.settle();
        let mut all = Vec::new();
        while let Some(frame) = self.script.try_recv() {
            let packet = frame.packet();
            assert_eq!(packet.protocol, ingress::UDP);
            let datagram = UdpPacket::new_checked(packet.payload()).expect("datagram");
            assert_eq!(usize::from(datagram.len()), packet.payload().len());
            assert_eq!(datagram.dst_port(), 5_000);
            // The kernel finishes the sum, which begins with the pseudo-header's.
            let pseudo = checksum::pseudo_header(
                &packet.src.into(),
                &packet.dst.into(),
                IpProtocol::Udp,
                u32::from(datagram.len()),
            );
            assert_eq!(datagram.checksum(), pseudo);
            let (kind, size) = frame.offload();
            all.push((kind, size, datagram.payload().to_vec()));
        }
        all
    }
}

fn text(parts: &[&str]) -> Vec<Vec<u8>> {
    parts.iter().map(|part| part.as_bytes().to_vec()).collect()
}

#[test]
fn datagrams_of_one_size_from_the_host_go_to_the_guest_together() {
    for v6 in [false, true] {
        let mut ends = Ends::new(v6, true);
        for part in ["aaa", "bbb", "c", "ddd", "", "eeee", "fffff", "gggg"] {
            ends.send(part.as_bytes());
        }
        let expected = [
            (GSO_UDP_L4, 3, "aaabbbc"),
            (0, 0, "ddd"),
            (0, 0, ""),
            (0, 0, "eeee"),
            (GSO_UDP_L4, 5, "fffffgggg"),
        ];
        assert_eq!(ends.frames(), expected.map(|(kind, size, all)| (kind, size, all.as_bytes().to_vec())));
    }
}

#[test]
fn a_kernel_without_super_segments_of_udp_gets_single_datagrams() {
    let mut ends = Ends::new(false, false);
    for part in ["aaa", "bbb", "c"] {
        ends.send(part.as_bytes());
    }
    let expected = text(&["aaa", "bbb", "c"]).into_iter().map(|part| (0, 0, part));
    assert_eq!(ends.frames(), expected.collect::<Vec<_>>());
}

#[test]
fn what_the_host_received_together_stays_apart_for_the_guest() {
    let mut ends = Ends::new(false, true);
    setsockopt(&ends.server, UdpGsoSegment, &4).expect("UDP_SEGMENT");
    ends.send(b"aaaabbbbcc");
    assert_eq!(ends.frames(), [(GSO_UDP_L4, 4, b"aaaabbbbcc".to_vec())]);
    let mut ends = Ends::new(false, false);
    setsockopt(&ends.server, UdpGsoSegment, &4).expect("UDP_SEGMENT");
    ends.send(b"aaaabbbbcc");
    let expected = text(&["aaaa", "bbbb", "cc"]).into_iter().map(|part| (0, 0, part));
    assert_eq!(ends.frames(), expected.collect::<Vec<_>>());
}

#[test]
fn a_run_for_the_guest_is_bounded_in_number_and_bytes() {
    let mut ends = Ends::new(false, true);
    for _ in 0..70 {
        ends.send(b"x");
    }
    let mut lengths = Vec::new();
    while lengths.iter().sum::<usize>() < 70 {
        lengths.extend(ends.frames().into_iter().map(|(.., all)| all.len()));
    }
    assert_eq!(lengths, [64, 6]);
    for _ in 0..60 {
        ends.send(&[7; 1_472]);
    }
    let mut lengths = Vec::new();
    while lengths.iter().sum::<usize>() < 60 * 1_472 {
        lengths.extend(ends.frames().into_iter().map(|(.., all)| all.len()));
    }
    assert_eq!(lengths, [44 * 1_472, 16 * 1_472]);
}

#[test]
fn datagrams_of_the_guest_arrive_one_by_one_and_in_order() {
    for v6 in [false, true] {
        let mut ends = Ends::new(v6, true);
        let (from, to) = if v6 { (GUEST_V6, GATEWAY_V6) } else { (GUEST_V4, GATEWAY_V4) };
        let parts = ["aaa", "bbb", "c", "ddd", "", "eeee", "fffff", "gggg", "hhhh"];
        for part in parts {
            ends.script.send_ip(&udp((from, 5_000), (to, ends.port), part.as_bytes()));
        }
        assert_eq!(ends.received(), text(&parts));
    }
}

#[test]
fn the_guest_s_runs_to_two_servers_do_not_mix() {
    let mut ends = Ends::new(false, true);
    let other = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let port = other.local_addr().expect("address").port();
    for (i, to) in [ends.port, ends.port, port, ends.port, port, port].into_iter().enumerate() {
        ends.script.send_ip(&udp((GUEST_V4, 5_000), (GATEWAY_V4, to), format!("{i}").as_bytes()));
    }
    assert_eq!(ends.received(), text(&["0", "1", "3"]));
    let mut buffer = [0; 10];
    for expected in ["2", "4", "5"] {
        let len = other.recv(&mut buffer).expect("datagram");
        assert_eq!(&buffer[..len], expected.as_bytes());
    }
}

/// A super-segment of the guest's, of which each datagram has `size` bytes.
pub(super) fn send_run(script: &Script, size: u16, packet: &[u8]) {
    let mut frame = vec![0; VNET_HEADER_LEN];
    frame[0] = 1;
    frame[1] = GSO_UDP_L4;
    frame[4..6].copy_from_slice(&size.to_ne_bytes());
    frame.extend([0x52, 0x54, 0, 0, 0, 1, 0x52, 0x54, 0, 0, 0, 2, 8, 0]);
    frame.extend(packet);
    nix::unistd::write(&script.wire, &frame).expect("room on the wire");
}

#[test]
fn what_the_guest_sent_together_arrives_apart() {
    let mut ends = Ends::new(false, true);
    let to = (GATEWAY_V4, ends.port);
    send_run(&ends.script, 4, &udp((GUEST_V4, 5_000), to, b"aaaabbbbcc"));
    send_run(&ends.script, 4, &udp((GUEST_V4, 5_000), to, b"dddd"));
    assert_eq!(ends.received(), text(&["aaaa", "bbbb", "cc", "dddd"]));
}

#[test]
fn sizes_of_runs_that_make_no_sense_harm_nobody() {
    let mut ends = Ends::new(false, true);
    let to = (GATEWAY_V4, ends.port);
    send_run(&ends.script, 0, &udp((GUEST_V4, 5_000), to, b"none"));
    send_run(&ends.script, 9, &udp((GUEST_V4, 5_000), to, b"more"));
    send_run(&ends.script, 9, &udp((GUEST_V4, 5_000), to, b""));
    assert_eq!(ends.received(), text(&["none", "more", ""]));
    // More datagrams than the kernel takes at once; and more than it makes.
    send_run(&ends.script, 1, &udp((GUEST_V4, 5_000), to, &[b'x'; 128]));
    assert_eq!(ends.received().len(), 128);
    let before = ends.script.stats().dropped_malformed;
    send_run(&ends.script, 1, &udp((GUEST_V4, 5_000), to, &[b'x'; 129]));
    send_run(&ends.script, 1, &udp((GUEST_V4, 5_000), (GATEWAY_V4, 53), &[b'x'; 1_000]));
    assert_eq!(ends.received().len(), 0);
    assert_eq!(ends.script.stats().dropped_malformed, before + 2);
    // A fragment is never a run.
    let whole = udp((GUEST_V4, 5_000), to, &[7; 64]);
    send_run(&ends.script, 8, &v4_fragment(&whole, 9, 0, 40));
    send_run(&ends.script, 8, &v4_fragment(&whole, 9, 40, 72));
    assert_eq!(ends.received(), [vec![7; 64]]);
}
