//! Who is measured: each gives a guest that reaches the internet, and a published port.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use netstack::{DnsSpec, Protocol, Publish, Published, Stack, StackSpec, open_tap};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};

use crate::common::{GATEWAY_V4, INTERNET_V4, Net, World, at, spec};
use crate::first_line;
use crate::relay::{RELAY_PORT, RELAYED_PORT};

/// The port inside that is published.
pub(crate) const INSIDE_PORT: u16 = 7_001;
/// The host's address on the link to the internet.
pub(crate) const HOST_OUTSIDE: &str = "198.51.100.1";

#[derive(Clone)]
pub(crate) enum Contender {
    /// The host in the place of the guest.
    Native,
    /// This crate, in another process of the bench.
    Ours,
    /// passt's `pasta`.
    Pasta,
    Slirp,
    /// `rootlet netstack`.
    Program(String),
    /// No network at all, but what bounds all of them.
    Relay,
}

/// A guest, and the process that is its network.
pub(crate) struct Running {
    /// The guest's network namespace.
    pub(crate) inside: Net,
    /// Where in the host [`INSIDE_PORT`] is published.
    pub(crate) published: u16,
    /// Whom the guest asks for names.
    pub(crate) resolver: SocketAddr,
    process: Option<Child>,
    /// What the guest's namespace is bound to.
    file: Option<PathBuf>,
    /// From the process's start to the guest's first connection.
    pub(crate) first_connection: Duration,
    /// There is one way to one port of the internet.
    relayed: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // Ours ends with its input.
            drop(process.stdin.take());
            let _ = process.kill();
            let _ = process.wait();
        }
        if let Some(file) = &self.file {
            let _ = umount2(file, MntFlags::MNT_DETACH);
            let _ = std::fs::remove_file(file);
        }
    }
}

impl Contender {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Ours => "ours",
            Self::Pasta => "pasta",
            Self::Slirp => "slirp",
            Self::Program(_) => "program",
            Self::Relay => "relay",
        }
    }

    /// What exactly it is; `None` if it is not here.
    pub(crate) fn version(&self) -> Option<String> {
        match self {
            Self::Native => Some("veth between two namespaces".to_owned()),
            Self::Ours => Some(format!("netstack {}", env!("CARGO_PKG_VERSION"))),
            // Debian's does not know its version.
            Self::Pasta => first_line("pasta", &["--version"])
                .map(|line| first_line("dpkg-query", &["-W", "passt"]).unwrap_or(line)),
            Self::Slirp => first_line("slirp4netns", &["--version"]),
            Self::Program(path) => first_line(path, &["--version"]),
            Self::Relay => Some("a recv and a send for each message, TCP only".to_owned()),
        }
    }

    /// Starts it; returns when the guest has had its first connection.
    pub(crate) fn start(&self, world: &World, index: usize) -> Result<Running, String> {
        let published = 7_100 + u16::try_from(index).unwrap();
        let internet = at(INTERNET_V4, 53);
        if let Self::Native = self {
            return Ok(Running {
                inside: world.host.clone(),
                published: INSIDE_PORT,
                resolver: internet,
                process: None,
                file: None,
                first_connection: Duration::ZERO,
                relayed: false,
            });
        }
        let relayed = matches!(self, Self::Relay);
        let inside = Net::new();
        // A new namespace has the machine's, not that of the host here.
        const CONTROL: &str = "/proc/sys/net/ipv4/tcp_congestion_control";
        let control = world.host.run(|| std::fs::read_to_string(CONTROL).unwrap());
        inside.run(move || std::fs::write(CONTROL, control.trim()).unwrap());
        let file = std::env::temp_dir().join(format!("netstack-compare-{}-{index}", std::process::id()));
        std::fs::write(&file, "").unwrap();
        let none: Option<&str> = None;
        let bound = file.clone();
        // The mounts of a thread are those of its process, unlike its network namespace.
        inside
            .run(move || mount(Some("/proc/thread-self/ns/net"), &bound, none, MsFlags::MS_BIND, none))
            .unwrap();
        let port = if relayed { RELAYED_PORT } else { 0 };
        let listener = world.internet.run(move || TcpListener::bind((INTERNET_V4, port))).unwrap();
        let server = if relayed { at("127.0.0.1", RELAY_PORT) } else { listener.local_addr().unwrap() };
        let begin = Instant::now();
        let mut command = self.command(&file, published);
        let process =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(|e| e.to_string())?;
        let mut running = Running {
            inside,
            published,
            resolver: if matches!(self, Self::Ours) { at(GATEWAY_V4, 53) } else { internet },
            process: Some(process),
            file: Some(file),
            first_connection: Duration::ZERO,
            relayed,
        };
        if let Self::Ours = self {
            let mut byte = [0];
            let output = running.process.as_mut().and_then(|child| child.stdout.as_mut()).unwrap();
            output.read_exact(&mut byte).map_err(|error| error.to_string())?;
            running.inside.run(configure_guest);
        }
        running.inside.run(move || {
            while TcpStream::connect_timeout(&server, Duration::from_millis(100)).is_err() {
                if begin.elapsed() > Duration::from_secs(10) {
                    return Err("the guest has no network after 10 s".to_owned());
                }
                std::thread::sleep(Duration::from_micros(100));
            }
            Ok(())
        })?;
        running.first_connection = begin.elapsed();
        if let Self::Slirp = self {
            running.publish_by_api()?;
        }
        Ok(running)
    }

    fn command(&self, net: &Path, published: u16) -> Command {
        let mut command = match self {
            Self::Native => unreachable!("needs no process"),
            Self::Ours | Self::Relay => {
                let mut command = Command::new(std::env::current_exe().unwrap());
                command.arg(if let Self::Ours = self { "stack" } else { "relay" });
                command.arg(net).arg(published.to_string());
                return command;
            }
            Self::Pasta => {
                let mut command = Command::new("pasta");
                command.args(["--foreground", "--quiet", "--netns-only", "--config-net", "--mtu", "1500"]);
                command.args([
                    "-t",
                    &format!("{published}:{INSIDE_PORT}"),
                    "-u",
                    "none",
                    "-T",
                    "none",
                    "-U",
                    "none",
                ]);
                command.arg("--netns").arg(net);
                command
            }
            Self::Slirp => {
                let mut command = Command::new("slirp4netns");
                command.args(["--configure", "--mtu=1500", "--netns-type=path"]);
                command.arg("--api-socket").arg(net.with_extension("api")).arg(net).arg("tap0");
                command
            }
            Self::Program(path) => {
                let mut command = Command::new(path);
                command.args(["netstack", "--configure", "--mtu=1500", "--netns-type=path"]);
                command.arg("--api-socket").arg(net.with_extension("api")).arg(net).arg("tap0");
                command
            }
        };
        command.stderr(Stdio::null());
        command
    }
}

/// What `ip` is told in the guest of ours.
fn configure_guest() {
    for (what, value) in [("accept_ra", "0"), ("accept_dad", "0")] {
        std::fs::write(format!("/proc/sys/net/ipv6/conf/tap0/{what}"), value).unwrap();
    }
    let mut ip = Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    let lines = "link set tap0 address 52:54:00:00:00:02 mtu 1500 up
        addr add 10.0.2.100/24 dev tap0
        addr add fd00::100/64 dev tap0 nodad
        route add default via 10.0.2.2
        route add ::/0 via fd00::2\n";
    ip.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    assert!(ip.wait().unwrap().success());
}

/// The process of ours: `stack NAMESPACE PORT`. Ends with its input.
pub(crate) fn serve(args: &[String]) {
    let [net, port] = args else { panic!("two arguments") };
    let port = Publish {
        host_ip: Some(Ipv4Addr::UNSPECIFIED.into()),
        host_port: port.parse().unwrap(),
        inside_ip: None,
        inside_port: INSIDE_PORT,
        protocol: Protocol::Tcp,
    };
    let published = Published::bind(&[port]).unwrap();
    let host = std::fs::File::open("/proc/self/ns/net").unwrap();
    setns(std::fs::File::open(net).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
    let tap = open_tap("tap0").unwrap();
    let (inside, maker) = netstack::inside_sockets().unwrap();
    // It stays in the guest's namespace.
    std::thread::spawn(move || crate::common::make_sockets(&maker));
    setns(host, CloneFlags::CLONE_NEWNET).unwrap();
    let dns = DnsSpec { upstreams: vec![at(INTERNET_V4, 53)], ..DnsSpec::default() };
    let stack = Stack::start(tap, &StackSpec { dns, ..spec() }, published.through(inside)).unwrap();
    let mut out = std::io::stdout();
    out.write_all(b"s").and_then(|()| out.flush()).unwrap();
    let _ = std::io::stdin().read(&mut [0]);
    stack.stop();
}

/// What the process of a contender has used so far.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Use {
    pub(crate) cpu: Duration,
    /// How often one of its threads went to sleep or was made to wait.
    pub(crate) switches: f64,
    /// Private memory in MiB.
    pub(crate) private: f64,
}

impl Running {
    /// Publishes [`INSIDE_PORT`] by the JSON socket that slirp4netns has.
    fn publish_by_api(&self) -> Result<(), String> {
        let path = self.file.as_ref().unwrap().with_extension("api");
        let ask = || -> std::io::Result<String> {
            let mut stream = std::os::unix::net::UnixStream::connect(&path)?;
            let port = self.published;
            // In one piece: it reads once.
            let question = format!(
                "{{\"execute\":\"add_hostfwd\",\"arguments\":{{\"proto\":\"tcp\",\"host_addr\":\"0.0.0.0\",\
                 \"host_port\":{port},\"guest_port\":{INSIDE_PORT}}}}}"
            );
            stream.write_all(question.as_bytes())?;
            stream.shutdown(std::net::Shutdown::Write)?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        let answer = ask();
        let _ = std::fs::remove_file(&path);
        match answer {
            Ok(answer) if answer.contains("return") => Ok(()),
            other => Err(format!("add_hostfwd: {other:?}")),
        }
    }

    /// What it has used; nothing for native.
    pub(crate) fn used(&self) -> Use {
        let mut all = Use::default();
        let Some(process) = &self.process else { return all };
        let text = |path: String| std::fs::read_to_string(path).unwrap_or_default();
        // Some leave the work to a child.
        let mut pids = vec![process.id()];
        let mut next = 0;
        while let Some(pid) = pids.get(next).copied() {
            next += 1;
            let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { continue };
            for task in tasks.flatten() {
                let task = task.path().display().to_string();
                let nanos = text(format!("{task}/schedstat"));
                let nanos = nanos.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0);
                all.cpu += Duration::from_nanos(nanos);
                all.switches += sum_of(&text(format!("{task}/status")), "voluntary_ctxt_switches:")
                    + sum_of(&text(format!("{task}/status")), "nonvoluntary_ctxt_switches:");
                pids.extend(
                    text(format!("{task}/children")).split_whitespace().filter_map(|n| n.parse::<u32>().ok()),
                );
            }
            all.private += sum_of(&text(format!("/proc/{pid}/smaps_rollup")), "Private_") / 1024.0;
        }
        all
    }

    /// Whether there is a process to be looked at.
    pub(crate) fn is_process(&self) -> bool {
        self.process.is_some()
    }

    /// Waits until the network's process has nothing to do for a while.
    pub(crate) fn settle(&self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut before = self.used().switches;
        while Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(500));
            let now = self.used().switches;
            if now == before {
                return;
            }
            before = now;
        }
    }

    /// From the guest to the internet.
    pub(crate) fn out(&self, world: &World) -> Route {
        Route {
            client: self.inside.clone(),
            server: world.internet.clone(),
            bind: at(INTERNET_V4, if self.relayed { RELAYED_PORT } else { 0 }),
            to: self.relayed.then(|| at("127.0.0.1", RELAY_PORT)),
        }
    }

    /// To the published port: from the host's loopback, or from the internet.
    pub(crate) fn published(&self, world: &World, loopback: bool) -> Route {
        let (client, ip) =
            if loopback { (world.host.clone(), "127.0.0.1") } else { (world.internet.clone(), HOST_OUTSIDE) };
        let any: IpAddr = Ipv4Addr::UNSPECIFIED.into();
        Route {
            client,
            server: self.inside.clone(),
            bind: SocketAddr::new(any, INSIDE_PORT),
            to: Some(at(ip, self.published)),
        }
    }
}

/// The sum of the lines of a file of /proc that begin so.
fn sum_of(text: &str, begin: &str) -> f64 {
    text.lines()
        .filter(|line| line.starts_with(begin))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok())
        .sum()
}

/// A way for connections and datagrams.
pub(crate) struct Route {
    pub(crate) client: Net,
    pub(crate) server: Net,
    /// Where the server binds.
    pub(crate) bind: SocketAddr,
    /// Where the client connects to; `None`: to where the server is bound.
    pub(crate) to: Option<SocketAddr>,
}

impl Route {
    /// A listener, and where it is reached.
    pub(crate) fn listen(&self) -> Result<(TcpListener, SocketAddr), String> {
        let bind = self.bind;
        let listener = self.server.run(move || listen(bind)).map_err(|error| format!("listen: {error}"))?;
        let to = self.to.unwrap_or(listener.local_addr().unwrap());
        Ok((listener, to))
    }

    /// A connection from the client's side.
    pub(crate) fn connect(&self, to: SocketAddr) -> Result<TcpStream, String> {
        let connect = move || TcpStream::connect_timeout(&to, Duration::from_secs(5));
        let stream = self.client.run(connect).map_err(|error| format!("connect: {error}"))?;
        stream.set_nodelay(true).unwrap();
        Ok(stream)
    }
}

/// A listener with a long queue, whatever was bound there before.
pub(crate) fn listen(addr: SocketAddr) -> std::io::Result<TcpListener> {
    let listener = TcpListener::bind(addr)?;
    // As often as one likes, the later number counts.
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(4096)?)?;
    Ok(listener)
}

/// Accepts one connection, if it comes in time.
pub(crate) fn accept(listener: &TcpListener, patience: Duration) -> Result<TcpStream, String> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd as _;
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    let patience = PollTimeout::try_from(patience).unwrap();
    match poll(&mut fds, patience) {
        Ok(1) => {}
        _ => return Err(format!("no connection came to descriptor {}", listener.as_raw_fd())),
    }
    let (stream, _) = listener.accept().map_err(|error| error.to_string())?;
    stream.set_nodelay(true).unwrap();
    Ok(stream)
}
