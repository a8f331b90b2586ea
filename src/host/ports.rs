//! Who has a port that cannot be bound: what /proc tells the caller.
//!
//! The tables of sockets name every socket of the network namespace, with its owner's uid and its inode; whose it is can be
//! read from the descriptors of processes, of which an ordinary user sees his own.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

/// Who has a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holder {
    /// This process.
    Process {
        /// Its name.
        name: String,
        /// Its id.
        pid: i32,
    },
    /// A process that the caller may not look into.
    User {
        /// Whose it is.
        uid: u32,
    },
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { name, pid } => write!(f, "{name} (pid {pid}) has it"),
            Self::User { uid } => write!(f, "a process of uid {uid} has it"),
        }
    }
}

/// A line of /proc/net/tcp and its like.
#[derive(Debug, PartialEq, Eq)]
struct Socket {
    local: SocketAddr,
    state: u8,
    uid: u32,
    inode: u64,
}

/// `TCP_LISTEN`
const LISTEN: u8 = 10;

/// Who keeps `wanted` from being bound, if that can be known.
#[must_use]
pub fn holder(wanted: SocketAddr, udp: bool) -> Option<Holder> {
    let name = if udp { "udp" } else { "tcp" };
    let tables = [name.to_owned(), format!("{name}6")];
    let socket = tables
        .iter()
        .filter_map(|table| std::fs::read_to_string(format!("/proc/self/net/{table}")).ok())
        .flat_map(|text| text.lines().skip(1).filter_map(parse).collect::<Vec<_>>())
        .find(|socket| (udp || socket.state == LISTEN) && is_in_the_way(socket.local, wanted))?;
    Some(process_with(socket.inode).unwrap_or(Holder::User { uid: socket.uid }))
}

/// Whether two addresses cannot both be bound.
fn is_in_the_way(taken: SocketAddr, wanted: SocketAddr) -> bool {
    let (taken_ip, wanted_ip) = (taken.ip().to_canonical(), wanted.ip().to_canonical());
    let same_family = taken_ip.is_ipv4() == wanted_ip.is_ipv4();
    taken.port() == wanted.port()
        && (taken_ip == wanted_ip
            || same_family && (taken_ip.is_unspecified() || wanted_ip.is_unspecified())
            // One socket for both families.
            || taken_ip == IpAddr::V6(Ipv6Addr::UNSPECIFIED))
}

/// `sl local_address rem_address st tx_queue:rx_queue tr:tm->when retrnsmt uid timeout inode …`
fn parse(line: &str) -> Option<Socket> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    Some(Socket {
        local: parse_address(fields.get(1)?)?,
        state: u8::from_str_radix(fields.get(3)?, 16).ok()?,
        uid: fields.get(7)?.parse().ok()?,
        inode: fields.get(9)?.parse().ok()?,
    })
}

/// The kernel writes addresses as words of its own byte order.
fn parse_address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| {
        let word = ip.get(at * 8..at * 8 + 8)?;
        u32::from_str_radix(word, 16).ok().map(u32::to_ne_bytes)
    };
    let ip: IpAddr = match ip.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let mut octets = [0; 16];
            for at in 0..4 {
                octets.get_mut(at * 4..at * 4 + 4)?.copy_from_slice(&word(at)?);
            }
            Ipv6Addr::from(octets).into()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

fn process_with(inode: u64) -> Option<Holder> {
    let link = format!("socket:[{inode}]");
    let has = |pid: i32| {
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        fds.map(|fd| fd.path()).any(|fd| std::fs::read_link(fd).is_ok_and(|to| to == Path::new(&link)))
    };
    let pids = std::fs::read_dir("/proc").ok()?.flatten();
    let pid = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(|&pid| has(pid))?;
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(Holder::Process { name: name.trim_end().to_owned(), pid })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, UdpSocket};

    #[test]
    fn a_listener_of_ours_is_found() {
        let own = i32::try_from(std::process::id()).unwrap();
        for ip in ["127.0.0.1", "::1"] {
            let tcp = TcpListener::bind((ip, 0)).unwrap().local_addr().map(|addr| (addr, false));
            assert_eq!(holder(tcp.unwrap().0, false), None, "it is closed");
            let listener = TcpListener::bind((ip, 0)).unwrap();
            let udp = UdpSocket::bind((ip, 0)).unwrap();
            for (addr, is_udp) in [(listener.local_addr().unwrap(), false), (udp.local_addr().unwrap(), true)]
            {
                match holder(addr, is_udp) {
                    Some(Holder::Process { pid, name }) => assert!(pid == own && !name.is_empty()),
                    other => panic!("{addr}: {other:?}"),
                }
            }
        }
    }

    #[test]
    fn lines_of_proc_are_read() {
        let line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4711 1 x";
        let socket = parse(line).unwrap();
        assert_eq!((socket.local, socket.state), ("127.0.0.1:8080".parse().unwrap(), LISTEN));
        assert_eq!((socket.uid, socket.inode), (1000, 4711));
        let any = "00000000000000000000000000000000:0050";
        assert_eq!(parse_address(any), Some("[::]:80".parse().unwrap()));
        assert_eq!(parse("  sl  local_address rem_address   st"), None);
        assert_eq!(parse_address("0100007F"), None);
    }

    #[test]
    fn addresses_are_in_the_way_of_each_other() {
        let conflict =
            |taken: &str, wanted: &str| is_in_the_way(taken.parse().unwrap(), wanted.parse().unwrap());
        assert!(conflict("0.0.0.0:80", "127.0.0.1:80") && conflict("127.0.0.1:80", "0.0.0.0:80"));
        assert!(conflict("[::]:80", "0.0.0.0:80") && conflict("[::ffff:127.0.0.1]:80", "127.0.0.1:80"));
        assert!(!conflict("0.0.0.0:80", "0.0.0.0:81") && !conflict("127.0.0.1:80", "192.0.2.1:80"));
        assert!(!conflict("[::1]:80", "0.0.0.0:80"));
    }
}
