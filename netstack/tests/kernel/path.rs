//! A bad way between the host and a server far away: what lies between the stack's sockets and their peers must not show
//! inside. No queueing discipline is needed for it: two TAPs, one at the host and one far away, and a thread that carries
//! frames between them, late, twice, in another order or not at all, and that has a smaller MTU than both.

use std::collections::BinaryHeap;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use netstack::{Protocol, Publish};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::common::*;
use crate::tools::*;

crate::tests! {
    loss_and_disorder_behind_the_host_do_not_show,
    a_long_way_with_a_small_mtu_does_not_show,
    datagrams_get_through_a_small_mtu,
}

const NEAR_V4: &str = "198.51.101.1";
const NEAR_V6: &str = "2001:db8:2::1";
const FAR_V4: &str = "198.51.101.2";
const FAR_V6: &str = "2001:db8:2::2";
/// Says that packets are too big.
const ROUTER_V4: [u8; 4] = [198, 51, 101, 254];
const ROUTER_V6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xfe];
/// Of [`netstack::open_tap`], before each frame.
const VNET_HEADER_LEN: usize = 10;
const ETHERNET: usize = VNET_HEADER_LEN + 14;
/// Loss makes the kernel wait longer and longer.
const LONG: Duration = Duration::from_secs(100);

/// What happens to frames on their way.
#[derive(Debug, Clone, Copy)]
struct Weather {
    /// In thousandths.
    loss: u64,
    twice: u64,
    /// Milliseconds that each takes, and as many more at most.
    delay: u64,
    jitter: u64,
    mtu: usize,
}

const FINE: Weather = Weather { loss: 0, twice: 0, delay: 0, jitter: 0, mtu: 1_500 };

/// The way, for as long as it lives.
struct Path {
    far: Net,
    stop: Option<PipeWriter>,
    carrier: Option<JoinHandle<()>>,
}

impl Path {
    fn new(weather: Weather, seed: u64) -> Self {
        let far = Net::new();
        let near = netstack::open_tap("near0").unwrap();
        let distant = far.run(|| netstack::open_tap("far0").unwrap());
        for tap in [&near, &distant] {
            fcntl(tap, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK)).unwrap();
        }
        sh(&format!(
            "ip link set near0 up; ip addr add {NEAR_V4}/24 dev near0; ip addr add {NEAR_V6}/64 dev near0 nodad"
        ));
        far.run(|| {
            sh(&format!(
                "ip link set far0 up; ip addr add {FAR_V4}/24 dev far0; ip addr add {FAR_V6}/64 dev far0 nodad"
            ));
        });
        let (stopped, stop) = std::io::pipe().unwrap();
        let carrier = std::thread::spawn(move || carry(&[near, distant], weather, seed, &stopped));
        Self { far, stop: Some(stop), carrier: Some(carrier) }
    }
}

impl Drop for Path {
    fn drop(&mut self) {
        drop(self.stop.take());
        let carried = self.carrier.take().map(JoinHandle::join);
        assert!(std::thread::panicking() || matches!(carried, Some(Ok(()))), "the carrier failed");
    }
}

/// Carries frames between the two until the other end of `stopped` is gone.
fn carry(taps: &[OwnedFd; 2], weather: Weather, seed: u64, stopped: &PipeReader) {
    let mut state = seed | 1;
    let mut below = |limit: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % limit.max(1)
    };
    // What is under way, the first to arrive on top.
    let mut frames = BinaryHeap::<std::cmp::Reverse<(Instant, u64, usize, Vec<u8>)>>::new();
    let mut count = 0;
    let mut buffer = vec![0; 70_000];
    loop {
        let now = Instant::now();
        while frames.peek().is_some_and(|std::cmp::Reverse((at, ..))| *at <= now) {
            let Some(std::cmp::Reverse((_, _, to, frame))) = frames.pop() else { break };
            // No room is one more loss.
            let _ = nix::unistd::write(&taps[to], &frame);
        }
        for from in [0, 1] {
            for _ in 0..64 {
                let Ok(len) = nix::unistd::read(&taps[from], &mut buffer) else { break };
                let frame = &buffer[..len];
                if frame.len() > ETHERNET + weather.mtu {
                    if let Some(answer) = too_big(frame, weather.mtu) {
                        let _ = nix::unistd::write(&taps[from], &answer);
                    }
                    continue;
                }
                if below(1_000) < weather.loss {
                    continue;
                }
                for _ in 0..1 + u64::from(below(1_000) < weather.twice) {
                    let delay = Duration::from_millis(weather.delay + below(weather.jitter + 1));
                    count += 1;
                    frames.push(std::cmp::Reverse((Instant::now() + delay, count, 1 - from, frame.to_vec())));
                }
            }
        }
        let patience = match frames.peek() {
            Some(std::cmp::Reverse((at, ..))) => {
                let left = at.saturating_duration_since(Instant::now()).as_micros().div_ceil(1_000);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }
            None => PollTimeout::NONE,
        };
        let mut fds = [
            PollFd::new(taps[0].as_fd(), PollFlags::POLLIN),
            PollFd::new(taps[1].as_fd(), PollFlags::POLLIN),
            PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
        ];
        let _ = poll(&mut fds, patience);
        if fds[2].revents().is_some_and(|events| !events.is_empty()) {
            return;
        }
    }
}

fn sum(parts: &[&[u8]]) -> [u8; 2] {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u32 =
        words.map(|word| u32::from(u16::from_be_bytes([word[0], *word.get(1).unwrap_or(&0)]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).unwrap()).to_be_bytes()
}

/// What a router says to a packet that does not fit; nothing if it may be cut, which this one does not do.
fn too_big(frame: &[u8], mtu: usize) -> Option<Vec<u8>> {
    let packet = &frame[ETHERNET..];
    let mtu = u16::try_from(mtu).unwrap().to_be_bytes();
    let mut answer = vec![0; VNET_HEADER_LEN];
    // Back to where it came from.
    answer.extend(&frame[VNET_HEADER_LEN + 6..VNET_HEADER_LEN + 12]);
    answer.extend(&frame[VNET_HEADER_LEN..VNET_HEADER_LEN + 6]);
    answer.extend(&frame[VNET_HEADER_LEN + 12..ETHERNET]);
    let (mut header, mut message, source);
    if packet[0] >> 4 == 4 {
        if packet[6] & 0x40 == 0 {
            return None;
        }
        message = [&[3, 4, 0, 0, 0, 0, mtu[0], mtu[1]], &packet[..68]].concat();
        let check = sum(&[&message]);
        message[2..4].copy_from_slice(&check);
        let len = u8::try_from(20 + message.len()).unwrap();
        header = vec![0x45, 0, 0, len, 0, 0, 0, 0, 64, 1, 0, 0];
        header.extend(ROUTER_V4);
        header.extend(&packet[12..16]);
        let check = sum(&[&header]);
        header[10..12].copy_from_slice(&check);
    } else {
        source = &packet[8..24];
        message = [&[2, 0, 0, 0, 0, 0, mtu[0], mtu[1]], &packet[..1_000]].concat();
        let len = u16::try_from(message.len()).unwrap().to_be_bytes();
        let check = sum(&[&ROUTER_V6, source, &[0, 0, len[0], len[1], 0, 0, 0, 58], &message]);
        message[2..4].copy_from_slice(&check);
        header = vec![0x60, 0, 0, 0, len[0], len[1], 58, 64];
        header.extend(ROUTER_V6);
        header.extend(source);
    }
    answer.extend(header);
    answer.extend(message);
    Some(answer)
}

fn long(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.set_write_timeout(Some(LONG)).unwrap();
    stream
}

/// Sends `size` bytes each way at once over a connection, and compares.
fn exchange(a: TcpStream, b: TcpStream, size: usize) {
    let one_way = |mut from: TcpStream, mut to: TcpStream, seed| {
        let sender = std::thread::spawn(move || {
            from.write_all(&pattern(seed, size)).unwrap();
            from.shutdown(Shutdown::Write).unwrap();
        });
        let receiver = std::thread::spawn(move || {
            let mut all = Vec::with_capacity(size);
            to.read_to_end(&mut all).unwrap();
            assert!(all == pattern(seed, size), "{} bytes of {size}", all.len());
        });
        [sender, receiver]
    };
    let (a, b) = (long(a), long(b));
    let there = one_way(a.try_clone().unwrap(), b.try_clone().unwrap(), 3);
    let back = one_way(b, a, 4);
    for thread in there.into_iter().chain(back) {
        thread.join().unwrap();
    }
}

/// Connections out to the far server and in from there, of either family, with `size` bytes each way.
fn connections(path: &Path, size: usize) {
    let port =
        Publish { host_ip: None, host_port: 0, inside_ip: None, inside_port: 80, protocol: Protocol::Tcp };
    let guest = Guest::with(&spec(), &[port]);
    let inside = guest.net.run(|| TcpListener::bind("[::]:80").unwrap());
    for (near, far) in [(NEAR_V4, FAR_V4), (NEAR_V6, FAR_V6)] {
        let listener = path.far.run(move || TcpListener::bind((far, 0)).unwrap());
        let addr = listener.local_addr().unwrap();
        let client = guest.net.spawn(move || TcpStream::connect_timeout(&addr, LONG).unwrap());
        let server = listener.accept().unwrap().0;
        exchange(client.join().unwrap(), server, size);

        let published = at(near, guest.published[0].port());
        let client = path.far.spawn(move || TcpStream::connect_timeout(&published, LONG).unwrap());
        let server = inside.accept().unwrap().0;
        exchange(client.join().unwrap(), server, size);
    }
    wait_until("flows gone", || guest.stack.stats().tcp_flows == 0);
}

fn loss_and_disorder_behind_the_host_do_not_show(_: &World) {
    for (seed, weather, size) in [
        (1, Weather { loss: 10, twice: 20, delay: 1, jitter: 4, ..FINE }, 1 << 20),
        (2, Weather { loss: 80, twice: 100, jitter: 20, ..FINE }, 100_000),
    ] {
        println!("  seed {seed}: {weather:?}");
        connections(&Path::new(weather, seed), size);
    }
}

fn a_long_way_with_a_small_mtu_does_not_show(_: &World) {
    let weather = Weather { delay: 40, mtu: 1_300, ..FINE };
    connections(&Path::new(weather, 3), 2 << 20);
}

fn datagrams_get_through_a_small_mtu(_: &World) {
    let path = Path::new(Weather { loss: 50, twice: 50, jitter: 5, mtu: 1_300, ..FINE }, 4);
    let guest = Guest::new();
    for far in [FAR_V4, FAR_V6] {
        let server = udp_echo(&path.far, far);
        let client = udp_client(&guest.net, far);
        client.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        for size in [1, 1_000, 1_400, 3_000, 20_000] {
            // Any of it may be lost; who wants to be sure asks again.
            let deadline = Instant::now() + LONG;
            let mut buffer = vec![0; 65_536];
            loop {
                assert!(Instant::now() < deadline, "in vain: {size} bytes to {far}");
                client.send_to(&pattern(5, size), server).unwrap();
                match client.recv_from(&mut buffer) {
                    // An answer to an earlier question, perhaps for the second time.
                    Ok((len, _)) if len != size => {}
                    Ok((len, from)) => {
                        assert!(from == server && buffer[..len] == pattern(5, size));
                        break;
                    }
                    Err(_) => {}
                }
            }
        }
    }
}
