//! The generators of load.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::unistd::Pid;

use crate::common::Net;
use crate::contenders::{self, Route, Running, accept};

/// What a measurement gives: its values, or why there are none.
pub(crate) type Measured = Result<Vec<f64>, String>;

const PATIENCE: Duration = Duration::from_secs(5);
/// For all connections of [`many`] together.
const MANY_PATIENCE: Duration = Duration::from_secs(20);
/// Left out at the beginning of a bulk transfer.
const WARM_UP: Duration = Duration::from_millis(300);
/// Length of what goes to and fro in ping-pongs.
const BALL: usize = 64;

/// A program that ends with us.
pub(crate) struct Server(pub(crate) Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[expect(clippy::cast_precision_loss, reason = "figures to look at")]
fn float(n: u64) -> f64 {
    n as f64
}

/// Pairs of connected streams: the client's end, the server's end.
fn pairs(route: &Route, count: usize) -> Result<Vec<(TcpStream, TcpStream)>, String> {
    let (listener, to) = route.listen()?;
    (0..count).map(|_| Ok((route.connect(to)?, accept(&listener, PATIENCE)?))).collect()
}

/// Gbit/s that arrive over so many connections, and the contender's seconds of CPU time per GiB.
pub(crate) fn bulk(
    guest: &Running,
    route: &Route,
    streams: usize,
    to_client: bool,
    time: Duration,
) -> Measured {
    let pairs = pairs(route, streams)?;
    let received = Arc::new(AtomicU64::new(0));
    let mut threads = Vec::new();
    for (client, server) in &pairs {
        let (from, to) = if to_client { (server, client) } else { (client, server) };
        let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        threads.push(std::thread::spawn(move || {
            let block = vec![7; 128 * 1024];
            while from.write_all(&block).is_ok() {}
        }));
        let received = Arc::clone(&received);
        threads.push(std::thread::spawn(move || {
            let mut block = vec![0; 256 * 1024];
            while let Ok(n @ 1..) = to.read(&mut block) {
                received.fetch_add(u64::try_from(n).unwrap(), Ordering::Relaxed);
            }
        }));
    }
    std::thread::sleep(WARM_UP);
    let before = (Instant::now(), received.load(Ordering::Relaxed), guest.used().cpu);
    std::thread::sleep(time);
    let after = (before.0.elapsed(), received.load(Ordering::Relaxed), guest.used().cpu);
    for (client, server) in &pairs {
        let _ = client.shutdown(Shutdown::Both);
        let _ = server.shutdown(Shutdown::Both);
    }
    for thread in threads {
        thread.join().unwrap();
    }
    let bytes = float(after.1 - before.1);
    let cost = (after.2 - before.2).as_secs_f64() / (bytes / f64::from(1 << 30));
    Ok(vec![bytes * 8.0 / 1e9 / after.0.as_secs_f64(), cost])
}

fn percentiles(mut times: Vec<Duration>) -> Vec<f64> {
    times.sort_unstable();
    [50, 99].iter().map(|percent| times[times.len() * percent / 100].as_secs_f64() * 1e6).collect()
}

/// Where the two ends of a ping-pong run. Left to the scheduler they are on one processor in one run and on two in the
/// next, which is ten times as slow where waking a processor takes long: that would be what is measured.
#[derive(Clone, Copy)]
pub(crate) enum Ends {
    /// Each on a processor of its own, as on two machines.
    Apart,
    /// Both on the same. Nobody has to be woken on another then.
    Together,
}

impl Ends {
    /// The processors of client and server.
    fn processors(self) -> [usize; 2] {
        let all = sched_getaffinity(Pid::from_raw(0)).unwrap();
        let all: Vec<usize> =
            (0..CpuSet::count()).filter(|processor| all.is_set(*processor).unwrap()).collect();
        match self {
            Self::Apart => [all[0], all[all.len() - 1]],
            Self::Together => [all[0]; 2],
        }
    }
}

/// Runs `end` in a thread on that processor.
fn on_processor<T: Send + 'static>(
    processor: usize,
    end: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    std::thread::spawn(move || {
        let mut only = CpuSet::new();
        only.set(processor).unwrap();
        sched_setaffinity(Pid::from_raw(0), &only).unwrap();
        end()
    })
}

/// Microseconds of a small request and its answer, the median and the slowest hundredth, over one connection.
pub(crate) fn tcp_ping_pong(route: &Route, ends: Ends, time: Duration) -> Measured {
    let (mut client, mut server) = pairs(route, 1)?.pop().unwrap();
    let [near, far] = ends.processors();
    let echo = on_processor(far, move || {
        let mut ball = [0; BALL];
        while server.read_exact(&mut ball).is_ok() && server.write_all(&ball).is_ok() {}
    });
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let asking = on_processor(near, move || {
        let mut times = Vec::new();
        let mut ball = [1; BALL];
        let begin = Instant::now();
        while begin.elapsed() < time {
            let sent = Instant::now();
            client
                .write_all(&ball)
                .and_then(|()| client.read_exact(&mut ball))
                .map_err(|e| format!("echo: {e}"))?;
            times.push(sent.elapsed());
        }
        let _ = client.shutdown(Shutdown::Both);
        Ok(percentiles(times))
    });
    let measured = asking.join().unwrap();
    echo.join().unwrap();
    measured
}

/// Two sockets that know each other, the client's having spoken first.
fn datagram_pair(route: &Route) -> Result<(UdpSocket, UdpSocket), String> {
    let bind = route.bind;
    let server = route.server.run(move || UdpSocket::bind(bind)).unwrap();
    let to = server.local_addr().unwrap();
    let client = route.client.run(move || {
        let socket = UdpSocket::bind(("0.0.0.0", 0)).unwrap();
        socket.connect(to).map(|()| socket)
    });
    let client = client.map_err(|error| format!("connect: {error}"))?;
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    client.send(b"hello").map_err(|error| format!("send: {error}"))?;
    let (_, from) = server.recv_from(&mut [0; 64]).map_err(|error| format!("no datagram came: {error}"))?;
    server.connect(from).unwrap();
    Ok((client, server))
}

/// As [`tcp_ping_pong`], by datagrams.
pub(crate) fn udp_ping_pong(route: &Route, ends: Ends, time: Duration) -> Measured {
    let (client, server) = datagram_pair(route)?;
    let [near, far] = ends.processors();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    server.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let echo = on_processor(far, move || {
        let mut ball = [0; BALL];
        while !stopped.load(Ordering::Relaxed) {
            if server.recv(&mut ball).is_ok() {
                let _ = server.send(&ball);
            }
        }
    });
    client.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let asking = on_processor(near, move || {
        let mut times = Vec::new();
        let mut lost = 0;
        let begin = Instant::now();
        while begin.elapsed() < time {
            let sent = Instant::now();
            let _ = client.send(&[1; BALL]);
            match client.recv(&mut [0; BALL]) {
                Ok(_) => times.push(sent.elapsed()),
                Err(_) => lost += 1,
            }
        }
        (times, lost)
    });
    let (times, lost) = asking.join().unwrap();
    stop.store(true, Ordering::Relaxed);
    echo.join().unwrap();
    if times.is_empty() { Err(format!("all {lost} datagrams were lost")) } else { Ok(percentiles(times)) }
}

/// Thousands of datagrams per second that arrive, and the contender's microseconds of CPU time for each. `segments`: how
/// many the sender gives to its kernel at once (UDP_SEGMENT).
pub(crate) fn datagrams(
    guest: &Running,
    route: &Route,
    size: usize,
    segments: usize,
    to_client: bool,
    time: Duration,
) -> Measured {
    let (client, server) = datagram_pair(route)?;
    let (sender, receiver) = if to_client { (server, client) } else { (client, server) };
    if segments > 1 {
        let size = i32::try_from(size).unwrap();
        nix::sys::socket::setsockopt(&sender, nix::sys::socket::sockopt::UdpGsoSegment, &size)
            .map_err(|errno| format!("UDP_SEGMENT: {errno}"))?;
    }
    receiver.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let sending = std::thread::spawn(move || {
        let block = vec![7; size * segments];
        while !stopped.load(Ordering::Relaxed) {
            for _ in 0..64 {
                let _ = sender.send(&block);
            }
        }
    });
    let received = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&received);
    let stopped = Arc::clone(&stop);
    let receiving = std::thread::spawn(move || {
        let mut buffer = [0; 2_000];
        while !stopped.load(Ordering::Relaxed) {
            if receiver.recv(&mut buffer).is_ok() {
                count.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    std::thread::sleep(WARM_UP);
    let before = (Instant::now(), received.load(Ordering::Relaxed), guest.used().cpu);
    std::thread::sleep(time);
    let after = (before.0.elapsed(), received.load(Ordering::Relaxed), guest.used().cpu);
    stop.store(true, Ordering::Relaxed);
    sending.join().unwrap();
    receiving.join().unwrap();
    let count = float(after.1 - before.1);
    let cost = (after.2 - before.2).as_secs_f64() * 1e6 / count;
    Ok(vec![count / 1e3 / after.0.as_secs_f64(), cost])
}

/// Closes everything that comes, until told to stop.
fn close_all(listener: TcpListener, stop: &Arc<AtomicBool>) -> JoinHandle<()> {
    let stop = Arc::clone(stop);
    std::thread::spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            let _ = accept(&listener, Duration::from_millis(50));
        }
    })
}

/// Connections per second, of so many clients at a time: connected, and closed by the server.
pub(crate) fn connections(route: &Route, at_a_time: usize, time: Duration) -> Measured {
    let (listener, to) = route.listen()?;
    let stop = Arc::new(AtomicBool::new(false));
    let server = close_all(listener, &stop);
    let begin = Instant::now();
    let clients: Vec<JoinHandle<Result<u64, String>>> = (0..at_a_time)
        .map(|_| {
            route.client.spawn(move || {
                let mut count = 0;
                while begin.elapsed() < time {
                    let mut stream =
                        TcpStream::connect_timeout(&to, PATIENCE).map_err(|e| format!("connect: {e}"))?;
                    stream.set_read_timeout(Some(PATIENCE)).unwrap();
                    stream.read(&mut [0]).map_err(|error| format!("after {count} connections: {error}"))?;
                    count += 1;
                }
                Ok(count)
            })
        })
        .collect();
    let counts: Vec<Result<u64, String>> = clients.into_iter().map(|client| client.join().unwrap()).collect();
    let took = begin.elapsed();
    stop.store(true, Ordering::Relaxed);
    server.join().unwrap();
    let sum: u64 = counts.into_iter().sum::<Result<u64, String>>()?;
    Ok(vec![float(sum) / took.as_secs_f64()])
}

const REQUEST: &[u8] =
    b"GET /index.html HTTP/1.1\r\nHost: bench.test\r\nUser-Agent: netstack-bench\r\nAccept: */*\r\n\r\n";
const BODY: usize = 600;

fn response() -> Vec<u8> {
    let head = format!(
        "HTTP/1.1 200 OK\r\nServer: netstack-bench\r\nContent-Type: text/html\r\nContent-Length: {BODY}\r\n\
         Connection: keep-alive\r\n\r\n"
    );
    let mut response = head.into_bytes();
    response.resize(response.len() + BODY, b'x');
    response
}

/// Reacts to whole messages of `wanted` bytes on any of the streams, by one thread, until told to stop.
fn serve_messages(
    streams: Vec<TcpStream>,
    wanted: usize,
    answer: Vec<u8>,
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
        for (index, stream) in streams.iter().enumerate() {
            stream.set_nonblocking(true).unwrap();
            let event = EpollEvent::new(EpollFlags::EPOLLIN, u64::try_from(index).unwrap());
            epoll.add(stream.as_fd(), event).unwrap();
        }
        let mut have = vec![0; streams.len()];
        let mut buffer = vec![0; 64 * 1024];
        let mut events = [EpollEvent::empty(); 64];
        while !stop.load(Ordering::Relaxed) {
            let ready = epoll.wait(&mut events, 50_u16).unwrap_or(0);
            for event in &events[..ready] {
                let index = usize::try_from(event.data()).unwrap();
                let mut stream = &streams[index];
                match stream.read(&mut buffer) {
                    Ok(0) => return,
                    Ok(n) => have[index] += n,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(_) => return,
                }
                while have[index] >= wanted {
                    have[index] -= wanted;
                    count.fetch_add(1, Ordering::Relaxed);
                    // Small enough for any socket's buffer.
                    if stream.write_all(&answer).is_err() {
                        return;
                    }
                }
            }
        }
    })
}

/// Requests per second over so many connections that stay, each with one request under way.
pub(crate) fn http(route: &Route, connections: usize, time: Duration) -> Measured {
    let (clients, servers): (Vec<_>, Vec<_>) = pairs(route, connections)?.into_iter().unzip();
    let stop = Arc::new(AtomicBool::new(false));
    let count = Arc::new(AtomicU64::new(0));
    let answer = response();
    let response_len = answer.len();
    let server = serve_messages(servers, REQUEST.len(), answer, Arc::clone(&stop), Arc::default());
    for mut client in &clients {
        client.write_all(REQUEST).map_err(|error| error.to_string())?;
    }
    let client =
        serve_messages(clients, response_len, REQUEST.to_vec(), Arc::clone(&stop), Arc::clone(&count));
    std::thread::sleep(WARM_UP);
    let before = (Instant::now(), count.load(Ordering::Relaxed));
    std::thread::sleep(time);
    let rate = float(count.load(Ordering::Relaxed) - before.1) / before.0.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    client.join().unwrap();
    server.join().unwrap();
    Ok(vec![rate])
}

/// A query for `name.bench.test`, type A.
fn query(id: u16) -> Vec<u8> {
    let mut query = id.to_be_bytes().to_vec();
    query.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in ["name", "bench", "test"] {
        query.push(u8::try_from(label.len()).unwrap());
        query.extend(label.bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    query
}

/// Answers per second of the resolver at `to`, always for the same name, sixteen queries under way.
pub(crate) fn names(client: &Net, to: SocketAddr, time: Duration) -> Measured {
    let socket = client.run(move || UdpSocket::bind(("0.0.0.0", 0)).and_then(|s| s.connect(to).map(|()| s)));
    let socket = socket.map_err(|error| error.to_string())?;
    socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let mut id = 0;
    let mut ask = || {
        id += 1;
        let _ = socket.send(&query(id % 60_000));
    };
    (0..16).for_each(|_| ask());
    let (mut count, mut failures) = (0_u64, 0);
    let mut buffer = [0; 512];
    let begin = Instant::now();
    while begin.elapsed() < time {
        match socket.recv(&mut buffer) {
            // An answer without an error and with a record.
            Ok(n) if n > 12 && buffer[3] & 15 == 0 && buffer[7] > 0 => {
                count += 1;
                ask();
            }
            Ok(_) => return Err("the resolver does not know the name".to_owned()),
            // Something was lost.
            Err(_) => {
                failures += 1;
                if failures > 5 && count == 0 {
                    return Err("the resolver does not answer".to_owned());
                }
                (0..16).for_each(|_| ask());
            }
        }
    }
    Ok(vec![float(count) / begin.elapsed().as_secs_f64()])
}

/// The process `echo ADDRESS`: says its port, and echoes on every connection that comes until its input ends. Client and
/// server of ten thousand connections in one process would need twice as many descriptors as many a limit allows.
pub(crate) fn echo_all(args: &[String]) {
    let addr: SocketAddr = args[0].parse().unwrap();
    let listener = contenders::listen(addr).unwrap();
    println!("{}", listener.local_addr().unwrap().port());
    let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
    listener.set_nonblocking(true).unwrap();
    let (of_input, of_listener) = (0, u64::MAX);
    epoll.add(std::io::stdin().as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, of_input)).unwrap();
    epoll.add(listener.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, of_listener)).unwrap();
    let mut streams: HashMap<u64, TcpStream> = HashMap::new();
    let mut events = [EpollEvent::empty(); 256];
    let mut ball = [0; BALL];
    loop {
        let ready = epoll.wait(&mut events, EpollTimeout::NONE).unwrap_or(0);
        for event in &events[..ready] {
            if event.data() == of_input {
                return;
            } else if event.data() == of_listener {
                while let Ok((stream, _)) = listener.accept() {
                    stream.set_nodelay(true).unwrap();
                    let key = u64::try_from(stream.as_raw_fd()).unwrap();
                    epoll.add(stream.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, key)).unwrap();
                    streams.insert(key, stream);
                }
            } else if let Some(mut stream) = streams.get(&event.data()) {
                match stream.read(&mut ball) {
                    Ok(n @ 1..) => drop(stream.write_all(&ball[..n])),
                    _ => drop(streams.remove(&event.data())),
                }
            }
        }
    }
}

/// So many connections at once: how many were served, the seconds that it took, microseconds of a ping-pong over one of
/// them, and private MiB when nothing happens any more.
pub(crate) fn many(guest: &Running, route: &Route, wanted: usize, time: Duration) -> Measured {
    const WORKERS: usize = 8;
    let bind = route.bind;
    let spawned = route.server.run(move || {
        let program = std::env::current_exe().unwrap();
        let mut echo = Command::new(program);
        echo.arg("echo").arg(bind.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()
    });
    let mut server = Server(spawned.map_err(|error| error.to_string())?);
    let mut port = String::new();
    BufReader::new(server.0.stdout.take().unwrap()).read_line(&mut port).unwrap();
    let to = SocketAddr::new(bind.ip(), port.trim().parse().unwrap());
    let begin = Instant::now();
    let workers: Vec<JoinHandle<Vec<TcpStream>>> = (0..WORKERS)
        .map(|_| {
            route.client.spawn(move || {
                let mut streams = Vec::new();
                for _ in 0..wanted / WORKERS {
                    // Not to wait for thousands of time-outs.
                    if begin.elapsed() > MANY_PATIENCE {
                        break;
                    }
                    let served = || -> std::io::Result<TcpStream> {
                        let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
                        stream.set_nodelay(true)?;
                        stream.set_read_timeout(Some(PATIENCE))?;
                        let mut ball = [2; BALL];
                        stream.write_all(&ball)?;
                        stream.read_exact(&mut ball)?;
                        Ok(stream)
                    };
                    match served() {
                        Ok(stream) => streams.push(stream),
                        Err(_) => break,
                    }
                }
                streams
            })
        })
        .collect();
    let mut streams: Vec<TcpStream> = workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect();
    let took = begin.elapsed();
    let served = streams.len();
    let mut times = Vec::new();
    let begin = Instant::now();
    let mut ball = [3; BALL];
    while begin.elapsed() < time && served > 0 {
        let sent = Instant::now();
        // Always another one.
        let stream = &mut streams[times.len() * 7919 % served];
        if stream.write_all(&ball).and_then(|()| stream.read_exact(&mut ball)).is_err() {
            break;
        }
        times.push(sent.elapsed());
    }
    guest.settle();
    let private = if guest.is_process() { guest.used().private } else { f64::NAN };
    drop(streams);
    drop(server);
    let median = if times.is_empty() { f64::NAN } else { percentiles(times)[0] };
    Ok(vec![float(u64::try_from(served).unwrap()), took.as_secs_f64(), median, private])
}

/// Times that the contender's process woke up in a second in which nobody wanted anything of it, and its private MiB.
pub(crate) fn idle(guest: &Running) -> Measured {
    if !guest.is_process() {
        return Err("has no process".to_owned());
    }
    guest.settle();
    let before = guest.used();
    let time = Duration::from_secs(3);
    std::thread::sleep(time);
    let after = guest.used();
    Ok(vec![(after.switches - before.switches) / time.as_secs_f64(), after.private])
}
