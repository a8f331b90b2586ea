//! The host's resolvers: `nameserver` lines of /etc/resolv.conf (resolv.conf(5)), read again when the file changes.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::path::PathBuf;
use std::time::SystemTime;

use smoltcp::time::{Duration, Instant};

use crate::policy::DNS_PORT;

/// How often the file's time stamp is looked at, at most.
const CHECK: Duration = Duration::from_secs(1);
/// A libc looks at three; more do no harm.
const MAX_SERVERS: usize = 8;

/// The resolvers to ask.
#[derive(Debug)]
pub(crate) struct Resolvers {
    fixed: bool,
    servers: Vec<SocketAddr>,
    path: PathBuf,
    checked: Option<Instant>,
    /// Time stamp, length and inode of what was read.
    stamp: Option<(SystemTime, u64, u64)>,
}

impl Resolvers {
    /// `fixed`: always these; if there are none, those of the host. Reads nothing yet.
    pub(crate) fn new(fixed: &[SocketAddr], path: PathBuf) -> Self {
        Self { fixed: !fixed.is_empty(), servers: fixed.to_vec(), path, checked: None, stamp: None }
    }

    /// The resolvers as of now.
    pub(crate) fn get(&mut self, now: Instant) -> &[SocketAddr] {
        if !self.fixed && self.checked.is_none_or(|checked| now >= checked + CHECK) {
            self.checked = Some(now);
            self.refresh();
        }
        &self.servers
    }

    fn refresh(&mut self) {
        use std::os::unix::fs::MetadataExt;
        // Follows the symbolic link that the file often is.
        let stamp = std::fs::metadata(&self.path)
            .ok()
            .and_then(|meta| Some((meta.modified().ok()?, meta.len(), meta.ino())));
        if stamp.is_some() && stamp == self.stamp {
            return;
        }
        self.stamp = stamp;
        self.servers = match std::fs::read(&self.path) {
            Ok(text) => parse(&String::from_utf8_lossy(&text)),
            Err(error) => {
                tracing::debug!(%error, path = %self.path.display(), "no list of resolvers");
                Vec::new()
            }
        };
        tracing::debug!(servers = ?self.servers, "resolvers of the host");
    }
}

fn parse(text: &str) -> Vec<SocketAddr> {
    let mut servers = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if words.next() == Some("nameserver")
            && let Some(server) = words.next().and_then(parse_server)
            && !servers.contains(&server)
            && servers.len() < MAX_SERVERS
        {
            servers.push(server);
        }
    }
    servers
}

/// An address, with an interface if it is link-local.
fn parse_server(text: &str) -> Option<SocketAddr> {
    let Some((ip, interface)) = text.split_once('%') else {
        let ip: IpAddr = text.parse().ok()?;
        // resolv.conf(5): the unspecified address means this host.
        let ip = match ip {
            IpAddr::V4(ip) if ip.is_unspecified() => std::net::Ipv4Addr::LOCALHOST.into(),
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

    #[test]
    fn nameserver_lines_count_and_nothing_else() {
        let text = "# nameserver 192.0.2.9\nsearch example.com\nnameserver 127.0.0.53\n  nameserver\t2001:db8::1 x\n\
                    nameserver 127.0.0.53\nnameserver nonsense\nnameserver fe80::1%1\nnameserver 0.0.0.0\noptions edns0\n";
        let servers: Vec<String> = parse(text).iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["127.0.0.53:53", "[2001:db8::1]:53", "[fe80::1%1]:53", "127.0.0.1:53"]);
    }

    #[test]
    fn a_changed_file_is_read_again_and_an_unchanged_one_is_not() {
        let path = std::env::temp_dir().join(format!("netstack-resolv-{}", std::process::id()));
        let at = |s| Instant::ZERO + Duration::from_secs(s);
        std::fs::write(&path, "nameserver 192.0.2.1\n").expect("write");
        let mut resolvers = Resolvers::new(&[], path.clone());
        assert_eq!(resolvers.get(at(0)), ["192.0.2.1:53".parse().expect("address")]);
        std::fs::write(&path, "nameserver 192.0.2.22\n").expect("write");
        assert_eq!(resolvers.get(at(0)), ["192.0.2.1:53".parse().expect("address")], "not looked at yet");
        assert_eq!(resolvers.get(at(2)), ["192.0.2.22:53".parse().expect("address")]);
        std::fs::remove_file(&path).expect("remove");
        assert!(resolvers.get(at(4)).is_empty());
        let fixed = ["192.0.2.5:5353".parse().expect("address")];
        assert_eq!(Resolvers::new(&fixed, path).get(at(0)), fixed);
    }
}
