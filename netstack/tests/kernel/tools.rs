//! What the tests have in common.

use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use netstack::{Protocol, Publish};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::common::*;

/// Long enough for anything that is going to happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
pub(crate) const INTERNET: [&str; 2] = [INTERNET_V4, INTERNET_V6];

/// A TCP server in `net`: handles each connection by `handle`, on a thread of its own.
pub(crate) fn serve(net: &Net, ip: &'static str, handle: impl Fn(TcpStream) + Send + Clone + 'static) -> u16 {
    let listener = net.run(move || TcpListener::bind((ip, 0)).unwrap());
    let port = listener.local_addr().unwrap().port();
    net.spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let handle = handle.clone();
            std::thread::spawn(move || handle(stream));
        }
    });
    port
}

pub(crate) fn patient(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Waits in connect(2), which says why it fails. (`TcpStream::connect_timeout` asks for that once poll(2) tells of an error,
/// which may be too early: the kernel puts an ICMP error for a SYN over IPv4 into the socket's error queue, and has it fail
/// only then.)
pub(crate) fn connect(addr: SocketAddr) -> std::io::Result<TcpStream> {
    use nix::sys::socket::{SockFlag, SockType, SockaddrStorage, setsockopt, socket, sockopt};
    use std::os::fd::AsRawFd as _;
    let family = if addr.is_ipv4() {
        nix::sys::socket::AddressFamily::Inet
    } else {
        nix::sys::socket::AddressFamily::Inet6
    };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let patience = i64::try_from(PATIENCE.as_secs()).unwrap();
    setsockopt(&socket, sockopt::SendTimeout, &nix::sys::time::TimeVal::new(patience, 0))?;
    nix::sys::socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(addr))?;
    Ok(patient(socket.into()))
}

/// One server that accepts a single connection and hands it to the test.
pub(crate) fn accept_one(net: &Net, ip: &'static str) -> (SocketAddr, JoinHandle<TcpStream>) {
    let listener = net.run(move || TcpListener::bind((ip, 0)).unwrap());
    let addr = listener.local_addr().unwrap();
    (addr, std::thread::spawn(move || patient(listener.accept().unwrap().0)))
}

pub(crate) fn wait_until(what: &str, condition: impl FnMut() -> bool) {
    wait_for(PATIENCE, what, condition);
}

pub(crate) fn wait_for(patience: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !condition() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        std::thread::yield_now();
    }
}

/// Bytes that tell their place.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

pub(crate) fn any(ip: &str) -> &'static str {
    if ip.contains(':') { "::" } else { "0.0.0.0" }
}

pub(crate) fn reset(stream: TcpStream) {
    nix::sys::socket::setsockopt(
        &stream,
        nix::sys::socket::sockopt::Linger,
        &nix::libc::linger { l_onoff: 1, l_linger: 0 },
    )
    .unwrap();
}

pub(crate) fn close_at_once(world: &World, guest: &Guest) {
    for ip in INTERNET {
        let port = serve(&world.internet, ip, drop);
        guest.net.run(move || {
            for _ in 0..20 {
                let mut stream = connect(at(ip, port)).unwrap();
                assert_eq!(stream.read(&mut [0; 10]).unwrap(), 0);
            }
        });
        let port = serve(&world.internet, ip, |mut stream| assert_eq!(stream.read(&mut [0; 10]).unwrap(), 0));
        guest.net.run(move || (0..20).for_each(|_| drop(connect(at(ip, port)).unwrap())));
    }
}

/// Private memory of this process, in KiB.
pub(crate) fn private_memory() -> usize {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = rollup.lines().find(|line| line.starts_with("Private_Dirty:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Runs `f` with a small limit of descriptors for stacks that are started in it.
pub(crate) fn with_descriptors<T>(limit: u64, f: impl FnOnce() -> T) -> T {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, limit, hard).unwrap();
    let result = f();
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    result
}

/// dnsmasq at `addr`, which knows `web.example` as `ip`, for five minutes.
pub(crate) fn dnsmasq(addr: &str, port: u16, ip: &str) -> Process {
    let server = Process(
        Command::new("dnsmasq")
            .args(["--no-daemon", "--pid-file=", "--conf-file=/dev/null", "--bind-interfaces", "--no-resolv"])
            .args(["--no-hosts", "--local-ttl=300", "--local=/example/", "--listen-address", addr])
            .arg(format!("--port={port}"))
            .arg(format!("--address=/web.example/{ip}"))
            .arg("--host-record=other.example,192.0.2.99")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    wait_until("dnsmasq listens", || TcpStream::connect((addr, port)).is_ok());
    server
}

/// A UDP echo server in `net`.
pub(crate) fn udp_echo(net: &Net, ip: &'static str) -> SocketAddr {
    let socket = net.run(move || UdpSocket::bind((ip, 0)).unwrap());
    let addr = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..len], from);
        }
    });
    addr
}

pub(crate) fn udp_client(net: &Net, ip: &'static str) -> UdpSocket {
    let socket = net.run(move || UdpSocket::bind((any(ip), 0)).unwrap());
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// A directory that goes with the test.
pub(crate) struct TempDir(pub(crate) std::path::PathBuf);

impl TempDir {
    pub(crate) fn new() -> Self {
        let path = std::env::temp_dir().join(format!("netstack-test-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) struct Process(pub(crate) Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn publish(host_ip: Option<&str>, inside_port: u16, protocol: Protocol) -> Publish {
    Publish {
        host_ip: host_ip.map(|ip| ip.parse().unwrap()),
        host_port: 0,
        inside_ip: None,
        inside_port,
        protocol,
    }
}

/// Numbers that look random and are the same for the same seed.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % end
    }
}
