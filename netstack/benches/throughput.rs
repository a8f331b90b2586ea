//! Throughput through the stack, as a ratio to a bare veth pair in the same run: `cargo bench -p netstack`.
//!
//! For each direction and number of streams iperf3 runs some times over veth (host to internet) and through the stack
//! (guest to the same server), alternating; medians are printed. The same for datagrams of 1,400 bytes, as many as one
//! sender can send, counted where they arrive. Arguments: `--seconds N`, `--runs N`, and `--udp` for datagrams only. It
//! asserts nothing: figures depend on the machine.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program that prints")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::net::UdpSocket;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use common::*;

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn argument(name: &str, default: usize) -> usize {
    let mut args = std::env::args().skip_while(|arg| arg != name);
    args.nth(1).and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// One run of iperf3 in `from`: Gbit/s received.
fn iperf(from: &Net, to: &'static str, streams: usize, reverse: bool, seconds: usize) -> f64 {
    let json = loop {
        let output = from.run(move || {
            let reverse = if reverse { "-R" } else { "" };
            sh(&format!("iperf3 -J -c {to} -t {seconds} -O 1 -P {streams} {reverse} || true"))
        });
        // The server takes a moment between two runs.
        if !output.contains("the server is busy") {
            break output;
        }
    };
    // The sum over all streams, as received.
    let at = json.find("\"sum_received\"").unwrap_or_else(|| panic!("no summary: {json}"));
    let at = at + json[at..].find("\"bits_per_second\":").expect("a rate") + "\"bits_per_second\":".len();
    let number: String = json[at..].trim_start().chars().take_while(|c| !matches!(c, ',' | '\n')).collect();
    number.trim().parse::<f64>().expect("a number") / 1e9
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// CPU time of the stack's thread so far, in seconds.
fn cpu() -> f64 {
    let mut sum = 0.0;
    for task in std::fs::read_dir("/proc/self/task").expect("tasks").flatten() {
        let Ok(stat) = std::fs::read_to_string(task.path().join("stat")) else { continue };
        if let Some((name, rest)) = stat.rsplit_once(')')
            && name.ends_with("(netstack")
        {
            let fields: Vec<&str> = rest.split_whitespace().collect();
            let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
            sum += (ticks(11) + ticks(12)) / 100.0;
        }
    }
    sum
}

/// Datagrams of 1,400 bytes per second that arrive, in thousands: from `inside` to the internet, or back.
fn udp(world: &World, inside: &Net, ip: &'static str, reverse: bool, seconds: usize) -> f64 {
    let any = if ip.contains(':') { "::" } else { "0.0.0.0" };
    let server = world.internet.run(move || UdpSocket::bind((ip, 0)).expect("socket"));
    let addr = server.local_addr().expect("address");
    let client = inside.run(move || {
        let socket = UdpSocket::bind((any, 0)).expect("socket");
        socket.connect(addr).expect("connect");
        socket
    });
    client.send(b"hello").expect("send");
    let (_, from) = server.recv_from(&mut [0; 10]).expect("hello");
    server.connect(from).expect("connect");
    let (sender, receiver) = if reverse { (server, client) } else { (client, server) };
    receiver.set_read_timeout(Some(Duration::from_millis(100))).expect("time-out");
    let time = Duration::from_secs(u64::try_from(seconds).expect("seconds"));
    let sending = std::thread::spawn(move || {
        let begin = Instant::now();
        while begin.elapsed() < time {
            for _ in 0..64 {
                let _ = sender.send(&[7; 1_400]);
            }
        }
    });
    let mut buffer = [0; 2_000];
    let (mut count, mut begin, mut last) = (0u32, None, Instant::now());
    loop {
        let ended = sending.is_finished();
        if receiver.recv(&mut buffer).is_ok() {
            count += 1;
            last = Instant::now();
            begin.get_or_insert(last);
        } else if ended {
            break;
        }
    }
    sending.join().expect("sender");
    f64::from(count) / begin.map_or(1.0, |begin| (last - begin).as_secs_f64()) / 1000.0
}

fn udp_rows(world: &World, guest: &Guest, seconds: usize, runs: usize) {
    println!(
        "\n{:<22} {:>10} {:>10} {:>7} {:>10}",
        "UDP, 1400 bytes", "veth", "stack", "ratio", "cpu us/pkt"
    );
    for (ip, family) in [(INTERNET_V4, "v4"), (INTERNET_V6, "v6")] {
        for (reverse, direction) in [(false, "out"), (true, "in")] {
            let (mut veth, mut stack, mut cost) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..runs {
                veth.push(udp(world, &world.host, ip, reverse, seconds));
                let before = (cpu(), guest.stack.stats());
                stack.push(udp(world, &guest.net, ip, reverse, seconds));
                let (after, stats) = (cpu(), guest.stack.stats());
                let frames = (stats.frames_from_guest + stats.frames_to_guest)
                    - (before.1.frames_from_guest + before.1.frames_to_guest);
                #[expect(clippy::cast_precision_loss, reason = "a figure to look at")]
                cost.push((after - before.0) * 1e6 / frames as f64);
            }
            let (veth, stack) = (median(veth), median(stack));
            println!(
                "{family} {direction:<4}               {veth:>8.0} k {stack:>8.0} k {:>7.2} {:>10.2}",
                stack / veth,
                median(cost)
            );
        }
    }
}

fn main() -> ExitCode {
    enter(|| {
        let (seconds, runs) = (argument("--seconds", 3), argument("--runs", 3));
        let world = World::new();
        let guest = Guest::new();
        if std::env::args().any(|arg| arg == "--udp") {
            udp_rows(&world, &guest, seconds, runs);
            return ExitCode::SUCCESS;
        }
        let server = world.internet.run(|| {
            Server(
                Command::new("iperf3")
                    .arg("-s")
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn()
                    .expect("iperf3"),
            )
        });
        // iperf3 has no way to say that it listens.
        while world.internet.run(|| std::net::TcpStream::connect((INTERNET_V4, 5201))).is_err() {
            std::thread::yield_now();
        }
        println!("{:<22} {:>10} {:>10} {:>7} {:>10}", "", "veth", "stack", "ratio", "cpu s/GiB");
        for (ip, family) in [(INTERNET_V4, "v4"), (INTERNET_V6, "v6")] {
            for (reverse, direction) in [(false, "out"), (true, "in")] {
                for streams in [1, 8] {
                    let (mut veth, mut stack, mut cost) = (Vec::new(), Vec::new(), Vec::new());
                    for _ in 0..runs {
                        veth.push(iperf(&world.host, ip, streams, reverse, seconds));
                        let before = (cpu(), guest.stack.stats());
                        stack.push(iperf(&guest.net, ip, streams, reverse, seconds));
                        let (after, stats) = (cpu(), guest.stack.stats());
                        let bytes = (stats.bytes_from_guest + stats.bytes_to_guest)
                            - (before.1.bytes_from_guest + before.1.bytes_to_guest);
                        #[expect(clippy::cast_precision_loss, reason = "a figure to look at")]
                        cost.push((after - before.0) / (bytes as f64 / f64::from(1 << 30)));
                    }
                    let (veth, stack) = (median(veth), median(stack));
                    println!(
                        "{family} {direction:<4} {streams} stream(s)   {veth:>8.2} G {stack:>8.2} G {:>7.2} {:>10.2}",
                        stack / veth,
                        median(cost)
                    );
                }
            }
        }
        drop(server);
        udp_rows(&world, &guest, seconds, runs);
        ExitCode::SUCCESS
    })
}
