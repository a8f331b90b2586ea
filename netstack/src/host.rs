//! The host's side: sockets with the caller's ordinary rights, and descriptors that are counted.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage, sockopt};

use crate::calls::{bind, connect, getsockopt, setsockopt, socket};
use crate::config::{DESCRIPTOR_ROOM, Outbound};
use crate::sys;

/// How many descriptors the stack may use, and does: half of the process's limit, and a sixteenth of what that is above
/// 4,096. The others are for the rest of the process, which must not run out of them whatever the guest does; where there
/// are many, it needs less than half (a quarter and an eighth are the overlay's).
#[derive(Debug, Clone)]
pub(crate) struct Budget {
    used: Arc<AtomicUsize>,
    pub(crate) limit: usize,
    /// Of these, those of the ports that were published from the start.
    pub(crate) ports: usize,
    /// Which of the host's addresses sockets use.
    pub(crate) outbound: Outbound,
}

impl Budget {
    /// Reads the process's limit.
    pub(crate) fn from_rlimit() -> Self {
        use nix::sys::resource::{Resource, getrlimit};
        let soft = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
        let soft = usize::try_from(soft).unwrap_or(usize::MAX).min(1 << 20);
        Self::new(soft / 2 + soft.saturating_sub(4_096) / 16)
    }

    /// Has the kernel make room for them in the process's table, for many connections at least.
    ///
    /// It doubles the table when it is full, and in a process of several threads whoever makes the next descriptor waits
    /// for an RCU grace period then, which is 3 to 10 ms (`expand_fdtable` of the kernel's fs/file.c), and with it every
    /// flow. A process of one thread does not wait; the room costs 8 bytes of the kernel's each.
    pub(crate) fn make_room(&self, fd: BorrowedFd<'_>) {
        use nix::fcntl::{FcntlArg, fcntl};
        let room = i32::try_from(self.limit.min(DESCRIPTOR_ROOM)).unwrap_or(i32::MAX);
        // Where there is none, all goes on as it did.
        if let Ok(fd) = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(room)) {
            let _ = nix::unistd::close(fd);
        }
    }

    pub(crate) fn new(limit: usize) -> Self {
        Self { used: Arc::default(), limit, ports: 0, outbound: Outbound::default() }
    }

    /// Counts `fd` for as long as it lives.
    pub(crate) fn hold(&self, fd: OwnedFd) -> HostFd {
        self.used.fetch_add(1, Ordering::Relaxed);
        HostFd { fd, used: Arc::clone(&self.used) }
    }

    /// How many are open.
    #[cfg(test)]
    pub(crate) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Counts a descriptor that is on its way to us.
    pub(crate) fn room(&self) -> Room {
        self.used.fetch_add(1, Ordering::Relaxed);
        Room(Arc::clone(&self.used))
    }

    /// Descriptors that TCP leaves to names and datagrams: an eighth of what ports have left, 512 at most.
    pub(crate) fn reserve(&self) -> usize {
        (self.limit.saturating_sub(self.ports) / 8).min(512)
    }

    /// Whether one more may be opened.
    pub(crate) fn check(&self) -> nix::Result<()> {
        self.check_leaving(0)
    }

    /// Whether there is none left for a connection.
    pub(crate) fn is_short(&self) -> bool {
        self.check_leaving(self.reserve()).is_err()
    }

    /// Whether one more may be opened, with `rest` left for others then.
    pub(crate) fn check_leaving(&self, rest: usize) -> nix::Result<()> {
        if self.used.load(Ordering::Relaxed) + rest < self.limit { Ok(()) } else { Err(Errno::EMFILE) }
    }
}

/// What is kept for a descriptor that will come.
#[derive(Debug)]
pub(crate) struct Room(Arc<AtomicUsize>);

impl Drop for Room {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A descriptor of the host's side.
#[derive(Debug)]
pub(crate) struct HostFd {
    fd: OwnedFd,
    used: Arc<AtomicUsize>,
}

impl Drop for HostFd {
    fn drop(&mut self) {
        self.used.fetch_sub(1, Ordering::Relaxed);
    }
}

impl AsFd for HostFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for HostFd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// The address family of `ip`.
pub(crate) fn family(ip: IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

const FLAGS: SockFlag = SockFlag::SOCK_NONBLOCK.union(SockFlag::SOCK_CLOEXEC);

/// Opens a TCP socket and begins to connect it; whether it is connected already. `rest` descriptors are left for others:
/// a guest full of connections must still be able to resolve names.
pub(crate) fn tcp_connect(budget: &Budget, to: SocketAddr, rest: usize) -> nix::Result<(HostFd, bool)> {
    budget.check_leaving(rest)?;
    let fd = socket(family(to.ip()), SockType::Stream, FLAGS, None)?;
    tune_tcp(fd.as_fd());
    bind_outbound(budget, &fd, to.ip())?;
    let connected = match connect(fd.as_raw_fd(), &SockaddrStorage::from(to)) {
        Ok(()) => true,
        Err(Errno::EINPROGRESS) => false,
        Err(errno) => return Err(errno),
    };
    Ok((budget.hold(fd), connected))
}

/// Options of every TCP socket. None is needed for the flow to work, so failures are ignored.
pub(crate) fn tune_tcp(fd: BorrowedFd<'_>) {
    // The guest's own stack has already decided what to send at once.
    let _ = setsockopt(&fd, sockopt::TcpNoDelay, &true);
    // Urgent data stays in its place in the stream (RFC 6093 section 4).
    let _ = setsockopt(&fd, sockopt::OobInline, &true);
    // A peer that vanished is noticed, even if the guest relies on its own probes, which end here.
    let _ = setsockopt(&fd, sockopt::KeepAlive, &true);
}

/// Makes the descriptor's end a reset instead of a close.
pub(crate) fn reset_on_close(fd: BorrowedFd<'_>) {
    let _ = setsockopt(&fd, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 });
}

/// Has calls on a descriptor fail instead of waiting.
pub(crate) fn nonblocking(fd: BorrowedFd<'_>) -> nix::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop)
}

/// The pending error of a socket.
pub(crate) fn socket_error(fd: BorrowedFd<'_>) -> Option<Errno> {
    match getsockopt(&fd, sockopt::SocketError) {
        Ok(0) => None,
        Ok(errno) => Some(Errno::from_raw(errno)),
        Err(errno) => Some(errno),
    }
}

/// Opens a datagram socket of the kind `protocol` (`None`: UDP) for the family of `ip`, whose error queue tells of ICMP
/// errors.
pub(crate) fn datagram_socket(
    budget: &Budget,
    ip: IpAddr,
    protocol: Option<SockProtocol>,
) -> nix::Result<HostFd> {
    budget.check()?;
    let fd = socket(family(ip), SockType::Datagram, FLAGS, protocol)?;
    let _ = match ip {
        IpAddr::V4(_) => setsockopt(&fd, sockopt::Ipv4RecvErr, &true),
        IpAddr::V6(_) => setsockopt(&fd, sockopt::Ipv6RecvErr, &true),
    };
    sys::want_extensions(fd.as_fd(), ip.is_ipv6());
    Ok(budget.hold(fd))
}

/// Gives a socket for what goes to `to` the address that is configured for that.
pub(crate) fn bind_outbound(budget: &Budget, fd: &impl AsFd, to: IpAddr) -> nix::Result<()> {
    budget.outbound.towards(to).map_or(Ok(()), |from| bind_address(fd, from))
}

/// Gives a socket an address of its own.
pub(crate) fn bind_address(fd: &impl AsFd, from: IpAddr) -> nix::Result<()> {
    let fd = fd.as_fd();
    // Of a connection, the port is chosen when the destination is known: many may share one.
    let _ = setsockopt(&fd, sockopt::IpBindAddressNoPort, &true);
    bind(fd.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(from, 0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_descriptors_is_for_others() {
        use nix::sys::resource::{Resource, getrlimit};
        let limit = u64::try_from(Budget::from_rlimit().limit).expect("limit");
        // Asked afterwards: another test may raise it meanwhile.
        let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).expect("limit");
        let most = soft / 2 + soft.saturating_sub(4_096) / 16;
        assert!(limit >= 16 && limit <= most, "{limit} of {soft}");
    }

    #[test]
    fn descriptors_are_counted_while_they_live() {
        let budget = Budget::new(1);
        assert!(budget.check().is_ok());
        let held = budget.hold(std::fs::File::open("/dev/null").expect("/dev/null").into());
        assert_eq!(budget.check(), Err(Errno::EMFILE));
        drop(held);
        assert!(budget.check().is_ok());
    }
}
