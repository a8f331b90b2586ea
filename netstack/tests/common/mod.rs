//! A world made of network namespaces, for an ordinary user: the "host", where the stack's sockets live, the "internet"
//! behind a veth pair, and guests behind TAPs.
//!
//! ```text
//!  internet 198.51.100.2, 2001:db8:1::2 ── veth ── 198.51.100.1, 2001:db8:1::1 host 192.0.2.1, 2001:db8::1
//!  guest 10.0.2.100, fd00::100 ── TAP ── stack (in the host)
//! ```
//!
//! The test program runs itself again inside a new user and network namespace: that is the host. Other namespaces are
//! made by threads, and a closure runs "in" one on a thread that joins it.
#![allow(dead_code, reason = "the benchmark and the tests use different parts")]

use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;

use netstack::{DnsSpec, Link, Outbound, PolicySpec, Publish, Published, Stack, StackSpec};
use nix::sched::{CloneFlags, setns, unshare};

/// The host's own addresses.
pub(crate) const HOST_V4: &str = "192.0.2.1";
pub(crate) const HOST_V6: &str = "2001:db8::1";
/// Another machine.
pub(crate) const INTERNET_V4: &str = "198.51.100.2";
pub(crate) const INTERNET_V6: &str = "2001:db8:1::2";
/// The guest's gateway.
pub(crate) const GATEWAY_V4: &str = "10.0.2.2";
pub(crate) const GATEWAY_V6: &str = "fd00::2";

const STAGE: &str = "NETSTACK_TEST_INSIDE";

/// Runs `inside` in a new user, network and mount namespace.
pub(crate) fn enter(inside: impl FnOnce() -> ExitCode) -> ExitCode {
    if std::env::var_os(STAGE).is_some() {
        use nix::sys::resource::{Resource, getrlimit, setrlimit};
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("limit");
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("limit");
        return inside();
    }
    let status = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "--mount", "--"])
        .arg(std::env::current_exe().expect("path of this program"))
        .args(std::env::args_os().skip(1))
        .env(STAGE, "1")
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .status()
        .expect("unshare of util-linux");
    if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs a program to its end; what it printed.
pub(crate) fn sh(line: &str) -> String {
    let output = Command::new("sh").args(["-ec", line]).stdin(Stdio::null()).output().expect("sh");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{line}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// A network namespace.
#[derive(Clone)]
pub(crate) struct Net(Arc<File>);

impl Net {
    /// The calling thread's.
    pub(crate) fn current() -> Self {
        Self(Arc::new(File::open("/proc/thread-self/ns/net").expect("own namespace")))
    }

    /// That which is bound to a file.
    pub(crate) fn at_path(path: &str) -> Self {
        Self(Arc::new(File::open(path).expect("a namespace")))
    }

    /// A path by which programs find it.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    pub(crate) fn new() -> Self {
        std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
            sh("ip link set lo up");
            Self::current()
        })
        .join()
        .expect("thread")
    }

    /// Runs `f` on a thread in this namespace.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        f: impl FnOnce() -> T + Send + 'static,
    ) -> std::thread::JoinHandle<T> {
        let ns = Arc::clone(&self.0);
        std::thread::spawn(move || {
            setns(&*ns, CloneFlags::CLONE_NEWNET).expect("setns");
            f()
        })
    }

    /// Runs `f` in this namespace and waits for it. A panic of `f` goes on here.
    pub(crate) fn run<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> T {
        match self.spawn(f).join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// The host and the internet.
pub(crate) struct World {
    pub(crate) host: Net,
    pub(crate) internet: Net,
}

impl World {
    pub(crate) fn new() -> Self {
        sh("ip link set lo up
            ip addr add 192.0.2.1/32 dev lo
            ip addr add 2001:db8::1/128 dev lo nodad
            echo '0 0' > /proc/sys/net/ipv4/ping_group_range");
        let internet = Net::new();
        let pid = std::process::id();
        internet.run(move || {
            sh(&format!("ip link add inet0 type veth peer name host0 netns {pid}"));
            sh("ip addr add 198.51.100.2/24 dev inet0
                ip addr add 2001:db8:1::2/64 dev inet0 nodad
                ip link set inet0 up");
        });
        sh("ip addr add 198.51.100.1/24 dev host0
            ip addr add 2001:db8:1::1/64 dev host0 nodad
            ip link set host0 up");
        internet
            .run(|| sh("ip route add default via 198.51.100.1; ip -6 route add default via 2001:db8:1::1"));
        // IPv6 takes a second until the link is usable.
        internet.run(|| sh("ping -c 1 -W 10 2001:db8:1::1; ping -c 1 -W 10 198.51.100.1"));
        Self { host: Net::current(), internet }
    }
}

/// Makes sockets in the calling thread's namespace for as long as the stack that asks for them is there.
pub(crate) fn make_sockets(maker: &netstack::SocketMaker) {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd as _;
    while maker.answer() {
        let _ = poll(&mut [PollFd::new(maker.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE);
    }
}

/// A guest and its stack.
pub(crate) struct Guest {
    pub(crate) net: Net,
    pub(crate) stack: Stack,
    pub(crate) published: Vec<SocketAddr>,
}

pub(crate) fn spec() -> StackSpec {
    StackSpec {
        mtu: 1500,
        guest: Link {
            mac: [0x52, 0x54, 0, 0, 0, 2],
            v4: ([10, 0, 2, 100].into(), 24),
            v6: ("fd00::100".parse().expect("address"), 64),
        },
        gateway: Link {
            mac: [0x52, 0x54, 0, 0, 0, 1],
            v4: ([10, 0, 2, 2].into(), 24),
            v6: ("fd00::2".parse().expect("address"), 64),
        },
        ipv6: true,
        dns: DnsSpec::default(),
        policy: PolicySpec::default(),
        flow_log: None,
        capture: None,
        rates: netstack::Rates::default(),
        outbound: Outbound::default(),
    }
}

impl Guest {
    pub(crate) fn new() -> Self {
        Self::with(&spec(), &[])
    }

    pub(crate) fn with(spec: &StackSpec, ports: &[Publish]) -> Self {
        Self::in_net(Net::new(), spec, Published::bind(ports).expect("published ports"))
    }

    /// With a maker of sockets inside, for connections from the host's loopback.
    pub(crate) fn joined(spec: &StackSpec, ports: &[Publish]) -> Self {
        let net = Net::new();
        let (inside, maker) = netstack::inside_sockets().expect("socket pair");
        net.spawn(move || make_sockets(&maker));
        let published = Published::bind(ports).expect("published ports");
        Self::in_net(net, spec, published.through(inside))
    }

    pub(crate) fn in_net(net: Net, spec: &StackSpec, published: Published) -> Self {
        let addresses = published.addresses().map(|(addr, ..)| addr).collect();
        let tap = net.run(|| netstack::open_tap("tap0").expect("TAP"));
        let stack = Stack::start(tap, spec, published).expect("stack");
        let mtu = spec.mtu;
        net.run(move || {
            sh(&format!(
                "echo 0 > /proc/sys/net/ipv6/conf/tap0/accept_ra
                 echo 0 > /proc/sys/net/ipv6/conf/tap0/accept_dad
                 ip link set tap0 address 52:54:00:00:00:02 mtu {mtu} up
                 ip addr add 10.0.2.100/24 dev tap0
                 ip addr add fd00::100/64 dev tap0 nodad
                 ip route add default via 10.0.2.2
                 ip -6 route add default via fd00::2
                 # The kernel's own thread makes the address usable.
                 until ip -6 route show table local dev tap0 | grep -q 'fd00::100 '; do :; done
                 echo '0 0' > /proc/sys/net/ipv4/ping_group_range"
            ));
        });
        Self { net, stack, published: addresses }
    }
}

/// `[v6]:port` or `v4:port`.
pub(crate) fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse::<IpAddr>().expect(ip), port)
}
