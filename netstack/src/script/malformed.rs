//! Frames that are nearly right: of each protocol that the stack understands, by structure and by mutation, with lengths and
//! virtio headers that lie. Nothing panics, no table, descriptor or page is left over, and a connection that does no
//! wrong is served all the while, with the right bytes.
//!
//! `NETSTACK_SEED` chooses one seed, `NETSTACK_FLOOD` says how many times as many there are.

use super::good::{Good, open_files, own_memory};
use super::*;
use crate::dns::message::tests::query;

const ARP: u16 = 0x0806;
const V4: u16 = 0x0800;
const V6: u16 = 0x86dd;

/// A frame that is right, without the Ethernet header.
struct Sample {
    name: &'static str,
    ethertype: u16,
    bytes: Vec<u8>,
    /// The stack itself answers.
    answered: bool,
    /// Where lengths, counts and offsets are.
    lengths: &'static [usize],
}

fn v4_with(options: &[u8], packet: &[u8]) -> Vec<u8> {
    let mut longer = [&packet[..20], options, &packet[20..]].concat();
    longer[0] = 0x45 + u8::try_from(options.len() / 4).expect("few");
    let len = u16::try_from(longer.len()).expect("length");
    longer[2..4].copy_from_slice(&len.to_be_bytes());
    smoltcp::wire::Ipv4Packet::new_unchecked(&mut longer[..]).fill_checksum();
    longer
}

/// `packet` behind extension headers, of which `first` is the first.
fn v6_with(first: u8, extensions: &[u8], packet: &[u8]) -> Vec<u8> {
    let mut longer = [&packet[..40], extensions, &packet[40..]].concat();
    longer[6] = first;
    let len = u16::try_from(longer.len() - 40).expect("length");
    longer[4..6].copy_from_slice(&len.to_be_bytes());
    longer
}

fn icmp_v4(to: &str, message: &[u8]) -> Vec<u8> {
    let mut message = message.to_vec();
    let sum = !checksum::data(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    ingress::rebuild(ip(GUEST_V4), ip(to), ingress::ICMP, 64, &message)
}

/// A segment with every option that there is.
fn syn(is_v6: bool, port: u16) -> Vec<u8> {
    let peer =
        Peer { guest: (ip(if is_v6 { GUEST_V6 } else { GUEST_V4 }), 30_000), ..Peer::new(is_v6, port) };
    peer.segment(TcpControl::Syn, b"")
}

/// One of each kind. `open` is a TCP port where somebody listens, `sink` one for datagrams.
fn samples(open: u16, sink: u16) -> Vec<Sample> {
    use crate::dhcp::tests::{question_v4, question_v6};
    const NO_LENGTHS: &[usize] = &[];
    const UDP_V4: &[usize] = &[0, 2, 3, 6, 7, 24, 25];
    const UDP_V6: &[usize] = &[4, 5, 6, 44, 45];
    const DNS_V4: &[usize] = &[2, 3, 24, 25, 32, 33, 34, 35, 36, 37, 38, 39, 40, 45, 56, 57];
    let sample =
        |name, ethertype, answered, lengths, bytes| Sample { name, ethertype, bytes, answered, lengths };
    let arp = [
        &[0, 1, 8, 0, 6, 4, 0, 1, 0x52, 0x54, 0, 0, 0, 2, 10, 0, 2, 100][..],
        &[0, 0, 0, 0, 0, 0, 10, 0, 2, 2],
    ]
    .concat();
    let v4 = udp((GUEST_V4, 5_000), (GATEWAY_V4, sink), b"datagram");
    let v6 = udp((GUEST_V6, 5_000), (GATEWAY_V6, sink), b"datagram");
    let long = udp((GUEST_V4, 5_000), (GATEWAY_V4, sink), &[9; 2_000]);
    let echo = [8, 0, 0, 0, 0, 7, 0, 1, 1, 2, 3, 4];
    let echo_v6 = [128, 0, 0, 0, 0, 7, 0, 1, 1, 2, 3, 4];
    // What the stack might have sent, as the cause of an error.
    let cause = udp((GATEWAY_V4, 40_000), (GUEST_V4, 80), b"x");
    let cause_v6 = udp((GATEWAY_V6, 40_000), (GUEST_V6, 80), b"x");
    let hop_by_hop = [17, 0, 1, 4, 0, 0, 0, 0];
    // Hop by hop, destination options, routing, a fragment that is the whole.
    let chain = [
        [60, 0, 1, 4, 0, 0, 0, 0],
        [43, 0, 1, 4, 0, 0, 0, 0],
        [44, 0, 0, 0, 0, 0, 0, 0],
        [17, 0, 0, 0, 0, 0, 0, 9],
    ]
    .concat();
    let fragment_v6 = [17, 0, 0, 1, 0, 0, 0, 5];
    let labels = ["abcdefghi"; 20].join(".");
    vec![
        sample("ARP", ARP, true, &[2, 4, 5, 6, 7], arp),
        sample("UDP", V4, false, UDP_V4, v4.clone()),
        sample("UDP over IPv6", V6, false, UDP_V6, v6.clone()),
        sample(
            "IPv4 options",
            V4,
            false,
            &[0, 3, 21, 22, 25, 28],
            v4_with(&[7, 7, 4, 0, 0, 0, 0, 1, 68, 8, 5, 0, 0, 0, 0, 0, 148, 4, 0, 0], &v4),
        ),
        sample("first fragment", V4, false, &[2, 3, 4, 6, 7], v4_fragment(&long, 5, 0, 1_480)),
        sample("last fragment", V4, false, &[2, 3, 4, 6, 7], v4_fragment(&long, 5, 1_480, 2_008)),
        sample("overlapping fragment", V4, false, &[2, 3, 4, 6, 7], v4_fragment(&long, 6, 800, 1_600)),
        sample("hop by hop", V6, false, &[4, 5, 6, 40, 41, 42, 43], v6_with(0, &hop_by_hop, &v6)),
        sample(
            "extensions",
            V6,
            false,
            &[4, 5, 6, 40, 41, 48, 49, 51, 56, 57, 59, 64, 66, 67],
            v6_with(0, &chain, &v6),
        ),
        sample("IPv6 fragment", V6, false, &[4, 5, 6, 40, 41, 42, 43], v6_with(44, &fragment_v6, &v6)),
        sample("SYN", V4, false, &[2, 3, 32, 33, 41, 44, 46, 48, 50], syn(false, open)),
        sample("SYN over IPv6", V6, false, &[4, 5, 52, 53, 61, 64, 66, 68], syn(true, open)),
        sample("SYN to nobody", V4, false, &[32, 33, 41], syn(false, 9)),
        sample("segment of nothing", V4, true, &[2, 3, 32, 33, 38, 39], {
            let mut peer = Peer::new(false, 9);
            peer.ack = 1;
            peer.segment(TcpControl::Psh, b"data")
        }),
        sample("echo", V4, true, &[2, 3, 20, 21], icmp_v4(GATEWAY_V4, &echo)),
        sample("echo over IPv6", V6, true, &[4, 5, 40, 41], icmpv6(GUEST_V6, GATEWAY_V6, 64, &echo_v6)),
        sample("port unreachable", V4, false, &[20, 21, 28, 30, 31, 37], {
            icmp_v4(GATEWAY_V4, &[&[3, 3, 0, 0, 0, 0, 0, 0], &cause[..]].concat())
        }),
        sample("port unreachable over IPv6", V6, false, &[40, 41, 48, 52, 53, 54], {
            icmpv6(GUEST_V6, GATEWAY_V6, 64, &[&[1, 4, 0, 0, 0, 0, 0, 0], &cause_v6[..]].concat())
        }),
        sample("neighbour solicitation", V6, true, &[40, 41, 64, 65], {
            solicitation(GATEWAY_V6, &[1, 1, 0x52, 0x54, 0, 0, 0, 2])
        }),
        sample("router solicitation", V6, true, &[40, 41, 48, 49], {
            icmpv6("fe80::1", "ff02::2", 255, &[133, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0x52, 0x54, 0, 0, 0, 2])
        }),
        sample("listener report", V6, false, &[40, 41, 46, 47], {
            icmpv6(
                "fe80::1",
                "ff02::16",
                1,
                &[[143, 0, 0, 0, 0, 0, 0, 1], [4, 0, 0, 0, 0xff, 2, 0, 0]].concat(),
            )
        }),
        sample("DHCP", V4, true, &[2, 3, 24, 25, 28, 30, 264, 268, 269, 271, 272], {
            let question = question_v4(1, &[(12, b"name"), (55, &[1, 3, 6])], [0; 4]);
            udp(("0.0.0.0", 68), ("255.255.255.255", 67), &question)
        }),
        sample("DHCPv6", V6, true, &[4, 5, 44, 45, 48, 52, 53, 54, 55, 62, 63], {
            let ia = [&[0, 0, 0, 7][..], &[0; 8]].concat();
            let question = question_v6(1, &[(1, &[0, 3, 0, 1, 2, 0, 0, 0, 0, 9]), (3, &ia), (6, &[0, 23])]);
            udp(("fe80::1", 546), ("ff02::1:2", 547), &question)
        }),
        sample(
            "name",
            V4,
            true,
            DNS_V4,
            udp((GUEST_V4, 5_001), (GATEWAY_V4, 53), &query(7, "some.name", 1, true)),
        ),
        sample(
            "long name",
            V4,
            false,
            DNS_V4,
            udp((GUEST_V4, 5_001), (GATEWAY_V4, 53), &query(8, &labels, 255, true)),
        ),
        sample("another protocol", V4, true, NO_LENGTHS, {
            ingress::rebuild(ip(GUEST_V4), ip("192.0.2.1"), 132, 64, &[1; 40])
        }),
        sample("group", V4, false, NO_LENGTHS, udp((GUEST_V4, 5_000), ("224.0.0.251", 5_353), b"group")),
    ]
}

fn spec_for(resolver: &UdpSocket) -> StackSpec {
    let mut spec = spec();
    spec.dns.upstreams = vec![resolver.local_addr().expect("address")];
    spec.dns.hosts = vec![("some.name".into(), ip("192.0.2.7"))];
    // So that first bytes of connections are looked at.
    spec.policy.deny_names = vec!["bad.example".parse().expect("pattern")];
    spec
}

fn listener_and_sink() -> (TcpListener, UdpSocket) {
    let sink = UdpSocket::bind("0.0.0.0:0").expect("socket");
    sink.set_nonblocking(true).expect("non-blocking");
    (TcpListener::bind("0.0.0.0:0").expect("listener"), sink)
}

#[test]
fn the_samples_are_right() {
    if !in_empty_namespace("script::malformed::the_samples_are_right") {
        return;
    }
    let (listener, sink) = listener_and_sink();
    let ports = (listener.local_addr().expect("address").port(), sink.local_addr().expect("address").port());
    for sample in samples(ports.0, ports.1) {
        let mut script = Script::new(&spec_for(&sink), true);
        script.send_frame(false, sample.ethertype, &sample.bytes);
        script.settle();
        assert!(script.try_recv().is_some() || !sample.answered, "{}", sample.name);
        assert_eq!(script.stats().dropped_malformed, 0, "{}", sample.name);
        assert!(sample.lengths.iter().all(|at| *at < sample.bytes.len()), "{}", sample.name);
    }
}

/// Changes a frame a little, or more.
fn mutate(random: &mut Seeded, sample: &Sample) -> Vec<u8> {
    let mut bytes = sample.bytes.clone();
    for _ in 0..1 + random.below(3) {
        if bytes.is_empty() {
            break;
        }
        let any = random.below(bytes.len().min(120));
        match random.below(6) {
            // A length that is not.
            0 | 1 if !sample.lengths.is_empty() => {
                let at = sample.lengths[random.below(sample.lengths.len())];
                if let Some(byte) = bytes.get_mut(at) {
                    let near = [byte.wrapping_sub(1), byte.wrapping_add(1), *byte << 1];
                    *byte =
                        [0, 1, 2, 0x40, 0x7f, 0x80, 0xc0, 0xff, near[0], near[1], near[2]][random.below(11)];
                }
            }
            2 => bytes[any] ^= 1 << random.below(8),
            3 => bytes[any] = random.byte(),
            4 => bytes.truncate(random.below(bytes.len() + 1)),
            _ => {
                // A piece again, or twice as much of it.
                let len = random.below(bytes.len() - any + 1);
                let piece = bytes[any..any + len].to_vec();
                let at = random.below(bytes.len() + 1);
                if random.below(2) == 0 {
                    bytes.splice(at..at, piece);
                } else {
                    bytes.extend(std::iter::repeat_n(piece, 1 + random.below(40)).flatten().take(9_000));
                }
            }
        }
    }
    // So that it gets past the header's sum, and then perhaps past the others.
    if sample.ethertype == V4 && bytes.len() >= 20 && random.below(5) != 0 {
        let header_len = usize::from(bytes[0] & 15) * 4;
        if header_len >= 20 && bytes.len() >= header_len {
            smoltcp::wire::Ipv4Packet::new_unchecked(&mut bytes[..]).fill_checksum();
        }
    }
    bytes
}

/// A virtio header, with whatever lies.
fn offload(random: &mut Seeded) -> [u8; VNET_HEADER_LEN] {
    let mut header = [0; VNET_HEADER_LEN];
    // That the sum is left to us is the easiest way past it.
    header[0] = [0, 1, 1, 1, 1, 2, 0xff][random.below(7)];
    if random.below(2) == 0 {
        header[1] = [0, 1, 3, 4, 5, 0x81, 0x85, random.byte()][random.below(8)];
        let mut word = |at: usize, values: &[u16]| {
            let any = u16::from_ne_bytes([random.byte(), random.byte()]);
            let value = values.get(random.below(values.len() + 1)).copied().unwrap_or(any);
            header[at..at + 2].copy_from_slice(&value.to_ne_bytes());
        };
        word(2, &[0, 14, 54, 66, u16::MAX]);
        word(4, &[0, 1, 2, 8, 536, 1_448, u16::MAX]);
        word(6, &[0, 14, 34, 54, u16::MAX]);
        word(8, &[0, 6, 16, u16::MAX]);
    }
    header
}

/// Connections on which nonsense comes in the right order: to the name server, and where a ClientHello belongs.
struct Stream {
    peer: Peer,
    rest: Vec<u8>,
}

impl Stream {
    fn open(script: &mut Script, random: &mut Seeded, port: u16, guest_port: u16, open: u16) -> Self {
        let mut peer = Peer::new(false, port);
        peer.guest.1 = guest_port;
        let mut rest = Vec::new();
        if port == 53 {
            for id in 0..4 {
                let question = query(id, "some.name", 1, true);
                rest.extend(u16::try_from(question.len()).expect("short").to_be_bytes());
                rest.extend(question);
            }
        } else {
            (peer.remote.0, peer.remote.1) = (ip("192.0.2.7"), open);
            let real = crate::policy::hello::tests::real();
            rest = real[random.below(real.len())].1.clone();
        }
        for _ in 0..random.below(4) {
            let at = random.below(rest.len());
            rest[at] = [0, 1, 0xff, random.byte()][random.below(4)];
        }
        peer.send(script, TcpControl::Syn, b"");
        // Others are being opened, too.
        let frame = script.expect_tcp("SYN-ACK", |segment| {
            segment.syn() && segment.ack() && segment.dst_port() == guest_port
        });
        peer.ack = frame.tcp().seq_number().0.wrapping_add(1);
        peer.send(script, TcpControl::None, b"");
        Self { peer, rest }
    }

    fn go_on(&mut self, script: &mut Script, random: &mut Seeded) {
        let len = self.rest.len().min(1 + random.below(300));
        let piece: Vec<u8> = self.rest.drain(..len).collect();
        let control = if self.rest.is_empty() { TcpControl::Fin } else { TcpControl::Psh };
        self.peer.send(script, control, &piece);
    }
}

#[test]
fn frames_that_are_nearly_right_harm_nobody() {
    if !in_empty_namespace("script::malformed::frames_that_are_nearly_right_harm_nobody") {
        return;
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds = match number("NETSTACK_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..4 * number("NETSTACK_FLOOD").unwrap_or(1),
    };
    let (mut files, mut memory) = (None, None);
    for seed in seeds {
        println!("seed {seed}");
        storm(seed);
        if seed % 4 >= 1 {
            assert_eq!(*files.get_or_insert_with(open_files), open_files(), "descriptors");
            let first = *memory.get_or_insert_with(own_memory);
            assert!(own_memory() < first + 8 * 1024, "{first} KiB became {}", own_memory());
        }
    }
}

fn storm(seed: u64) {
    let mut random = Seeded(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let (listener, sink) = listener_and_sink();
    let resolver = UdpSocket::bind("127.0.0.1:0").expect("socket");
    resolver.set_nonblocking(true).expect("non-blocking");
    let open = listener.local_addr().expect("address").port();
    let samples = samples(open, sink.local_addr().expect("address").port());
    let mut script = Script::new(&spec_for(&resolver), random.below(2) == 0);
    let mut good = Good::open(&mut script, &listener);
    listener.set_nonblocking(true).expect("non-blocking");
    let mut servers = Vec::new();
    let mut streams = Vec::<Stream>::new();
    for round in 0..8_000u16 {
        let sample = &samples[random.below(samples.len())];
        let bytes = match random.below(10) {
            0 => sample.bytes.clone(),
            _ => mutate(&mut random, sample),
        };
        let mut frame = offload(&mut random).to_vec();
        frame.extend([0x52, 0x54, 0, 0, 0, 1, 0x52, 0x54, 0, 0, 0, 2]);
        frame.extend(sample.ethertype.to_be_bytes());
        frame.extend(&bytes);
        if random.below(20) == 0 {
            let at = VNET_HEADER_LEN + random.below(ETHERNET_HEADER_LEN);
            frame[at] = random.byte();
            frame.truncate(1 + random.below(frame.len()));
        }
        nix::unistd::write(&script.wire, &frame).expect("room on the wire");
        script.turn(Duration::ZERO);
        while let Some(frame) = script.try_recv() {
            good.hear(&script, &frame);
        }
        // The other ends.
        while let Ok((stream, _)) = listener.accept() {
            servers.push(stream);
            servers.drain(..servers.len().saturating_sub(30));
        }
        let mut buffer = [0; 4_000];
        while let Ok((len, from)) = sink.recv_from(&mut buffer) {
            let _ = sink.send_to(&buffer[..len], from);
        }
        while let Ok((len, from)) = resolver.recv_from(&mut buffer) {
            // An answer that counts what is not there, and whose name leads to itself.
            buffer[2] |= 0x80;
            let answer = [
                &buffer[..len],
                &[0xc0, u8::try_from(len % 256).expect("byte"), 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 1, 2, 3, 4],
            ]
            .concat();
            let mut answer = if random.below(2) == 0 { answer } else { buffer[..len].to_vec() };
            for _ in 0..random.below(3) {
                let at = 4 + random.below(answer.len() - 4);
                answer[at] = [0, 1, 0xc0, 0xff, random.byte()][random.below(5)];
            }
            let _ = resolver.send_to(&answer, from);
        }
        match random.below(40) {
            0 if streams.len() < 8 => {
                let port = [53, open][random.below(2)];
                streams.push(Stream::open(&mut script, &mut random, port, 10_000 + round, open));
            }
            1..4 if !streams.is_empty() => {
                let at = random.below(streams.len());
                streams[at].go_on(&mut script, &mut random);
                if streams[at].rest.is_empty() {
                    streams.swap_remove(at);
                }
            }
            4 => script.now += Duration::from_millis([10, 700, 20_000][random.below(3)]),
            _ => {}
        }
        if round % 400 == 0 {
            script.engine.check_bounds();
            good.go_on(&mut script, 1 + random.below(20_000));
        }
    }
    let stats = script.stats();
    println!("{stats:?}");
    assert!(stats.dropped_malformed > 1_000 && stats.tcp_out > 50 && stats.dns_queries > 300, "{stats:?}");
    // In the end nothing is left but the good one.
    drop(servers);
    for _ in 0..20 {
        script.advance(Duration::from_secs(100));
        while let Some(frame) = script.try_recv() {
            good.hear(&script, &frame);
        }
        good.go_on(&mut script, 1_000);
    }
    let stats = script.stats();
    let left = (stats.tcp_flows, stats.udp_flows, stats.ping_flows, script.engine.descriptors());
    assert_eq!(left, (1, 0, 0, 1), "{stats:?} {:?}", script.engine.flows(0, 10));
    script.engine.check_bounds();
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
