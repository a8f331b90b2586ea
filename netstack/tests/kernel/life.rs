//! Idle, end, and programs of every day.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use netstack::{Rate, Rates, StackSpec};

use crate::common::*;
use crate::flowlog::flow_lines;
use crate::tools::*;

crate::tests! {
    programs_of_every_day_work,
    idle_means_no_wake_up,
    there_is_room_for_descriptors_before_they_are_wanted,
    stopping_ends_every_flow,
    the_stack_ends_with_its_namespace,
    what_was_sent_last_arrives,
    what_comes_after_datagrams_that_are_not_paid_for_arrives,
    who_was_cut_off_is_told,
}

fn programs_of_every_day_work(world: &World) {
    let guest = Guest::new();
    let port = serve(&world.internet, any(INTERNET_V6), |mut stream| {
        let mut request = [0; 4096];
        let _ = stream.read(&mut request);
        let _ = stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello");
    });
    guest.net.run(move || {
        for url in [format!("http://{INTERNET_V4}:{port}/"), format!("http://[{INTERNET_V6}]:{port}/")] {
            assert_eq!(sh(&format!("curl -sSg -m 20 '{url}'")), "hello");
        }
        // nc closes its sending half at the end of its input and waits for the answer.
        let answer = sh(&format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -N -w 20 {INTERNET_V4} {port}"));
        assert!(answer.ends_with("hello"), "{answer}");
    });
}

/// How often the stack's threads have gone to sleep.
fn sleeps() -> u64 {
    let mut sum = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let Ok(status) = std::fs::read_to_string(task.path().join("status")) else { continue };
        // By its whole name: the test program may be called by a longer one.
        if status.starts_with("Name:\tnetstack\n") {
            let line = status.lines().find(|line| line.starts_with("voluntary_ctxt")).unwrap();
            sum += line.rsplit('\t').next().unwrap().parse::<u64>().unwrap();
        }
    }
    sum
}

fn idle_means_no_wake_up(world: &World) {
    let guest = Guest::new();
    let (addr, server) = accept_one(&world.internet, INTERNET_V4);
    let mut client = guest.net.run(move || connect(addr).unwrap());
    let mut server = server.join().unwrap();
    client.write_all(&pattern(10, 1_000_000)).unwrap();
    server.read_exact(&mut vec![0; 1_000_000]).unwrap();
    // IPv6 of the guest's kernel is chatty for some seconds after the link came up, and timers of the transfer run out.
    let quiet = |ms| {
        let before = sleeps();
        let (reader, _writer) = std::io::pipe().unwrap();
        let mut fds =
            [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(&reader), nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut fds, nix::poll::PollTimeout::from(ms)).unwrap();
        sleeps() - before
    };
    wait_until("two seconds without a wake-up", || quiet(2_000u16) == 0);
    // The connection is still there.
    server.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
}

/// While the table of descriptors grows all flows stand still.
fn there_is_room_for_descriptors_before_they_are_wanted(_: &World) {
    use nix::sys::resource::{Resource, getrlimit};
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let _guest = Guest::new();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let room: u64 = status
        .lines()
        .find_map(|line| line.strip_prefix("FDSize:"))
        .and_then(|size| size.trim().parse().ok())
        .expect("FDSize of proc_pid_status(5)");
    assert!(room >= (soft / 2).min(8_192), "for {room} of {soft}");
}

fn stopping_ends_every_flow(world: &World) {
    let guest = Guest::new();
    let (addr, server) = accept_one(&world.internet, INTERNET_V4);
    let _client = guest.net.run(move || connect(addr).unwrap());
    let mut server = server.join().unwrap();
    guest.stack.stop();
    assert!(matches!(server.read(&mut [0; 10]), Ok(0) | Err(_)));
}

fn the_stack_ends_with_its_namespace(_: &World) {
    let Guest { net, stack, .. } = Guest::new();
    net.run(|| sh("ip link delete tap0"));
    wait_until("the stack ended", || !stack.is_running());
    drop(net);
    stack.stop();
}

/// Writes as much as the guest's kernel and the stack take while nobody reads; how much that is.
fn fill(guest: &Guest, client: &mut TcpStream, data: &[u8]) -> usize {
    client.set_nonblocking(true).unwrap();
    let mut sent = 0;
    wait_until("nothing more is taken", || {
        while let Ok(some) = client.write(&data[sent..]) {
            sent += some;
        }
        let (flows, bytes) = (guest.stack.stats().tcp_flows, guest.stack.stats().bytes_from_guest);
        assert_eq!(flows, 1);
        // It stands still for as long as an answer of the gateway takes.
        guest.net.run(|| sh(&format!("ping -c 1 -W 5 {GATEWAY_V4}")));
        guest.stack.stats().bytes_from_guest < bytes + 1_000 && client.write(&data[sent..]).is_err()
    });
    sent
}

fn what_was_sent_last_arrives(world: &World) {
    let data = pattern(11, 1 << 20).repeat(64);
    let guest = Guest::new();
    let udp = world.internet.run(|| UdpSocket::bind((INTERNET_V4, 0)).unwrap());
    udp.set_read_timeout(Some(PATIENCE)).unwrap();
    let (addr, server) = accept_one(&world.internet, INTERNET_V4);
    let mut client = guest.net.run(move || connect(addr).unwrap());
    let mut server = server.join().unwrap();
    // The guest's program ends when nobody takes anything any more.
    let sent = fill(&guest, &mut client, &data);
    let to = udp.local_addr().unwrap();
    guest.net.run(move || {
        UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"last words", to).unwrap();
        drop(client);
    });
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        server.read_to_end(&mut all).map(|_| all)
    });
    guest.stack.drain(None);
    guest.stack.stop();
    assert!(reader.join().unwrap().unwrap() == data[..sent], "{sent} bytes");
    assert_eq!(udp.recv_from(&mut [0; 16]).unwrap().0, 10);

    // A peer that does not read is not waited for.
    let (log, lines) = flow_lines();
    let guest = Guest::with(&StackSpec { flow_log: Some(log), ..spec() }, &[]);
    let (addr, server) = accept_one(&world.internet, INTERNET_V4);
    let mut client = guest.net.run(move || connect(addr).unwrap());
    let mut server = server.join().unwrap();
    fill(&guest, &mut client, &data);
    drop(client);
    let began = Instant::now();
    guest.stack.drain(None);
    assert!(began.elapsed() < Duration::from_secs(8), "as if something still went");
    guest.stack.stop();
    // It learns that this is not all, as the log does.
    assert_eq!(server.read_to_end(&mut Vec::new()).unwrap_err().kind(), ErrorKind::ConnectionReset);
    let lines: Vec<String> = lines.try_iter().collect();
    assert!(lines.iter().any(|line| line.contains(" closed cut ")), "{lines:?}");

    // What the stack has taken and may not send yet is on its way, though nothing comes from the guest meanwhile.
    let rates = Rates { sent: Some(Rate { bytes_per_second: 150_000, burst: None }), received: None };
    let guest = Guest::with(&StackSpec { rates, ..spec() }, &[]);
    let (addr, server) = accept_one(&world.internet, INTERNET_V4);
    let mut client = guest.net.run(move || connect(addr).unwrap());
    let mut server = server.join().unwrap();
    client.write_all(&data[..400_000]).unwrap();
    drop(client);
    let reader = std::thread::spawn(move || server.read_to_end(&mut Vec::new()).unwrap());
    guest.stack.drain(None);
    guest.stack.stop();
    assert_eq!(reader.join().unwrap(), 400_000);
}

fn what_comes_after_datagrams_that_are_not_paid_for_arrives(world: &World) {
    let rates = Rates { sent: Some(Rate { bytes_per_second: 20_000, burst: None }), received: None };
    let guest = Guest::with(&StackSpec { rates, ..spec() }, &[]);
    let server = world.internet.run(|| UdpSocket::bind((INTERNET_V4, 0)).unwrap());
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let to = server.local_addr().unwrap();
    let client = guest.net.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    let mut buffer = vec![0; 1 << 16];
    // The burst, and as much again: no frame is read for seconds.
    for _ in 0..2 {
        client.send_to(&[1; 60_000], to).unwrap();
        assert_eq!(server.recv(&mut buffer).unwrap(), 60_000);
    }
    client.send_to(b"last words", to).unwrap();
    drop(client);
    guest.stack.drain(None);
    guest.stack.stop();
    server.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    assert_eq!(server.recv(&mut buffer).unwrap(), 10);
}

fn who_was_cut_off_is_told(world: &World) {
    for interrupted in [false, true] {
        let rates = Rates { sent: Some(Rate { bytes_per_second: 10_000, burst: None }), received: None };
        let guest = Guest::with(&StackSpec { rates, ..spec() }, &[]);
        let (addr, server) = accept_one(&world.internet, INTERNET_V4);
        let mut client = guest.net.run(move || connect(addr).unwrap());
        let mut server = server.join().unwrap();
        if interrupted {
            client.write_all(&[1; 300_000]).unwrap();
            drop(client);
            // Its other end is closed: there is something to be read at once.
            let (interrupt, _) = std::io::pipe().unwrap();
            let began = Instant::now();
            guest.stack.drain(Some(interrupt.as_fd()));
            assert!(began.elapsed() < Duration::from_secs(8));
        } else {
            // All of it has gone, and nobody knows whether more would have come.
            client.write_all(b"half").unwrap();
            server.read_exact(&mut [0; 4]).unwrap();
            guest.stack.cut();
        }
        guest.stack.stop();
        let end = server.read_to_end(&mut Vec::new());
        assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
}
