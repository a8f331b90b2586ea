//! The host's resolvers: /etc/resolv.conf (resolv.conf(5)), read again when the file changes.
//!
//! A resolver on the host's loopback (systemd-resolved's 127.0.0.53, dnsmasq's 127.0.0.1) is as good as any: it is we who
//! ask it, not the guest. Without a file, or without a `nameserver` in it, a libc asks the local machine, and so do we:
//! first where systemd-resolved listens, then where anything else does. If nothing does, that fails at once.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6};
use std::path::PathBuf;
use std::time::SystemTime;

use smoltcp::time::{Duration, Instant};

use crate::config::DNS_TRY;
use crate::policy::DNS_PORT;

/// How often the file's time stamp is looked at, at most.
const CHECK: Duration = Duration::from_secs(1);
/// A libc looks at three; more do no harm.
const MAX_SERVERS: usize = 8;
/// Tries for one query if the file does not say, and at most.
const TRIES: usize = 3;
const MAX_TRIES: usize = 12;
/// Longest time for a try that the file may ask for: the guest's libc does not wait longer.
const MAX_TRY: u64 = 5;
/// Where a resolver of the local machine may listen.
const LOCAL: [Ipv4Addr; 2] = [Ipv4Addr::new(127, 0, 0, 53), Ipv4Addr::LOCALHOST];

/// `options` of the file, as far as they concern who asks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Options {
    /// Seconds to wait for an answer.
    timeout: Option<u64>,
    /// How often each resolver is asked.
    attempts: Option<usize>,
    /// The resolvers take turns.
    pub(crate) rotate: bool,
    /// `use-vc`: TCP from the beginning.
    pub(crate) use_tcp: bool,
}

/// The resolvers to ask.
#[derive(Debug)]
pub(crate) struct Resolvers {
    fixed: bool,
    pub(crate) servers: Vec<SocketAddr>,
    pub(crate) options: Options,
    path: PathBuf,
    checked: Option<Instant>,
    /// Time stamp, length and inode of what was read.
    stamp: Option<(SystemTime, u64, u64)>,
    /// A test's resolvers, which have to be on the loopback, stand for some that are not.
    #[cfg(test)]
    pub(super) distant: bool,
}

impl Resolvers {
    /// `fixed`: always these; if there are none, those of the host. Reads nothing yet.
    pub(crate) fn new(fixed: &[SocketAddr], path: PathBuf) -> Self {
        Self {
            fixed: !fixed.is_empty(),
            servers: fixed.to_vec(),
            options: Options::default(),
            path,
            checked: None,
            stamp: None,
            #[cfg(test)]
            distant: false,
        }
    }

    /// Brings the list up to date; whether it has changed.
    pub(crate) fn refresh(&mut self, now: Instant) -> bool {
        if self.fixed || self.checked.is_some_and(|checked| now < checked + CHECK) {
            return false;
        }
        let first = self.checked.replace(now).is_none();
        use std::os::unix::fs::MetadataExt;
        // Follows the symbolic link that the file often is.
        let stamp = std::fs::metadata(&self.path)
            .ok()
            .and_then(|meta| Some((meta.modified().ok()?, meta.len(), meta.ino())));
        if stamp == self.stamp && !first {
            return false;
        }
        self.stamp = stamp;
        let text = std::fs::read(&self.path).unwrap_or_else(|error| {
            tracing::debug!(%error, path = %self.path.display(), "no list of resolvers");
            Vec::new()
        });
        let before = (std::mem::take(&mut self.servers), self.options);
        (self.servers, self.options) = parse(&String::from_utf8_lossy(&text));
        if self.servers.is_empty() {
            self.servers = LOCAL.map(|ip| SocketAddr::new(ip.into(), DNS_PORT)).into();
        }
        tracing::debug!(servers = ?self.servers, options = ?self.options, "resolvers of the host");
        before != (self.servers.clone(), self.options)
    }

    /// Has the file looked at again at once.
    pub(crate) fn look_again(&mut self) {
        self.checked = None;
    }

    /// Whether all of them are on the host's loopback, where they follow the host from network to network.
    pub(crate) fn are_local(&self) -> bool {
        #[cfg(test)]
        if self.distant {
            return false;
        }
        self.servers.iter().all(|server| server.ip().is_loopback())
    }

    /// How many times a resolver is asked in all.
    pub(crate) fn tries(&self) -> usize {
        match (self.options.attempts, self.servers.len()) {
            (_, 0) => 0,
            (Some(attempts), servers) => (attempts * servers).min(MAX_TRIES),
            // Datagrams get lost, but then a single resolver is probably gone.
            (None, 1) => 2,
            (None, _) => TRIES,
        }
    }

    /// How long each time.
    pub(crate) fn patience(&self) -> Duration {
        self.options.timeout.map_or(DNS_TRY, Duration::from_secs)
    }
}

fn parse(text: &str) -> (Vec<SocketAddr>, Options) {
    let mut servers = Vec::new();
    let mut options = Options::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => {
                if let Some(server) = words.next().and_then(parse_server)
                    && !servers.contains(&server)
                    && servers.len() < MAX_SERVERS
                {
                    servers.push(server);
                }
            }
            Some("options") => words.for_each(|word| parse_option(word, &mut options)),
            _ => {}
        }
    }
    (servers, options)
}

fn parse_option(word: &str, options: &mut Options) {
    match word.split_once(':') {
        Some(("timeout", n)) => options.timeout = n.parse().ok().map(|n: u64| n.clamp(1, MAX_TRY)),
        Some(("attempts", n)) => options.attempts = n.parse().ok().map(|n: usize| n.clamp(1, 5)),
        None if word == "rotate" => options.rotate = true,
        None if word == "use-vc" => options.use_tcp = true,
        _ => {}
    }
}

/// An address, with an interface if it is link-local.
fn parse_server(text: &str) -> Option<SocketAddr> {
    let Some((ip, interface)) = text.split_once('%') else {
        let ip: IpAddr = text.parse().ok()?;
        // resolv.conf(5): the unspecified address means this host.
        let ip = match ip {
            IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(ip) if ip.is_unspecified() => std::net::Ipv6Addr::LOCALHOST.into(),
            ip => ip,
        };
        return Some(SocketAddr::new(ip, DNS_PORT));
    };
    let scope = interface.parse().ok().or_else(|| nix::net::if_::if_nametoindex(interface).ok())?;
    Some(SocketAddrV6::new(ip.parse().ok()?, DNS_PORT, 0, scope).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn servers(resolvers: &Resolvers) -> Vec<String> {
        resolvers.servers.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn nameserver_lines_count_and_nothing_else() {
        let text = "# nameserver 192.0.2.9\nsearch example.com\nnameserver 127.0.0.53\n  nameserver\t2001:db8::1 x\n\
                    nameserver 127.0.0.53\nnameserver nonsense\nnameserver fe80::1%1\nnameserver 0.0.0.0\noptions edns0\n";
        let servers: Vec<String> = parse(text).0.iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["127.0.0.53:53", "[2001:db8::1]:53", "[fe80::1%1]:53", "127.0.0.1:53"]);
    }

    #[test]
    fn options_are_obeyed_within_reason() {
        let with = |text: &str| {
            let mut resolvers = Resolvers::new(&[], PathBuf::new());
            (resolvers.servers, resolvers.options) = parse(text);
            (resolvers.tries(), resolvers.patience().total_millis(), resolvers.options)
        };
        let two = "nameserver 192.0.2.1\nnameserver 192.0.2.2\n";
        assert_eq!(with("").0, 0);
        assert_eq!(with("nameserver 192.0.2.1"), (2, 1_500, Options::default()));
        assert_eq!(with(two), (3, 1_500, Options::default()));
        assert_eq!(with(&format!("{two}nameserver 192.0.2.3\nnameserver 192.0.2.4")).0, 3);
        let (tries, patience, options) =
            with(&format!("{two}options timeout:2 attempts:4 rotate\noptions use-vc ndots:2"));
        assert_eq!((tries, patience, options.rotate, options.use_tcp), (8, 2_000, true, true));
        assert_eq!(with(&format!("{two}options timeout:100 attempts:100")).1, 5_000);
        assert_eq!(with(&format!("{two}options timeout:0 attempts:0")).0, 2);
        assert_eq!(with(&format!("{two}options timeout:x attempts:-1")), (3, 1_500, Options::default()));
    }

    #[test]
    fn a_changed_file_is_read_again_and_an_unchanged_one_is_not() {
        let path = std::env::temp_dir().join(format!("netstack-resolv-{}", std::process::id()));
        let at = |s| Instant::ZERO + Duration::from_secs(s);
        std::fs::write(&path, "nameserver 192.0.2.1\n").expect("write");
        let mut resolvers = Resolvers::new(&[], path.clone());
        assert!(resolvers.refresh(at(0)));
        assert_eq!(servers(&resolvers), ["192.0.2.1:53"]);
        std::fs::write(&path, "nameserver 192.0.2.22\n").expect("write");
        assert!(!resolvers.refresh(at(0)), "not looked at yet");
        assert_eq!(servers(&resolvers), ["192.0.2.1:53"]);
        assert!(resolvers.refresh(at(2)));
        assert_eq!(servers(&resolvers), ["192.0.2.22:53"]);
        assert!(!resolvers.refresh(at(4)));
        // Another file that says the same.
        std::fs::write(&path, "# new\nnameserver 192.0.2.22\n").expect("write");
        assert!(!resolvers.refresh(at(6)));
        std::fs::remove_file(&path).expect("remove");
        let fixed = ["192.0.2.5:5353".parse().expect("address")];
        let mut always = Resolvers::new(&fixed, path);
        assert!(!always.refresh(at(0)));
        assert_eq!(always.servers, fixed);
    }

    #[test]
    fn without_a_file_the_local_machine_is_asked() {
        let path = std::env::temp_dir().join(format!("netstack-no-resolv-{}", std::process::id()));
        let at = |s| Instant::ZERO + Duration::from_secs(s);
        let mut resolvers = Resolvers::new(&[], path.clone());
        assert!(resolvers.refresh(at(0)));
        let local = ["127.0.0.53:53", "127.0.0.1:53"];
        assert_eq!((servers(&resolvers), resolvers.tries()), (local.map(String::from).to_vec(), 3));
        std::fs::write(&path, "nameserver 192.0.2.1\n").expect("write");
        assert!(resolvers.refresh(at(2)));
        assert_eq!(servers(&resolvers), ["192.0.2.1:53"]);
        std::fs::write(&path, "search example\n").expect("write");
        assert!(resolvers.refresh(at(4)));
        assert_eq!(servers(&resolvers), local);
        std::fs::remove_file(&path).expect("remove");
    }
}
