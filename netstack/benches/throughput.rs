//! Throughput through the stack, as a ratio to a bare veth pair in the same run: `cargo bench -p netstack`.
//!
//! For each direction and number of streams iperf3 runs some times over veth (host to internet) and through the stack
//! (guest to the same server), alternating; medians are printed. Arguments: `--seconds N` and `--runs N`. It asserts
//! nothing: figures depend on the machine.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program that prints")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::process::{Child, Command, ExitCode, Stdio};

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

/// CPU time of this process so far, in seconds: the stack's, since the rest of it only waits.
fn cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("stat");
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

fn main() -> ExitCode {
    enter(|| {
        let (seconds, runs) = (argument("--seconds", 3), argument("--runs", 3));
        let world = World::new();
        let guest = Guest::new();
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
        ExitCode::SUCCESS
    })
}
