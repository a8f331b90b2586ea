//! A stream socket that is one side of a flow, with what is known of it.
//!
//! epoll says once that something has become so ([`WATCHED`] is edge-triggered), so it is kept until the kernel answers
//! EAGAIN. What came before an end or a failure can still be read, so those are kept beside it.

use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;

use crate::host::{self, HostFd};

/// What epoll tells of such a socket, each time it becomes so.
pub(crate) const WATCHED: EpollFlags = EpollFlags::EPOLLIN
    .union(EpollFlags::EPOLLPRI)
    .union(EpollFlags::EPOLLOUT)
    .union(EpollFlags::EPOLLRDHUP)
    .union(EpollFlags::EPOLLET);

#[derive(Debug)]
pub(crate) struct Side {
    pub(crate) fd: HostFd,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    /// A short read does not mean that there is nothing more to read: the peer's FIN is somewhere in the queue, or
    /// urgent data, at which reads stop (tcp(7)).
    pub(crate) more_behind: bool,
    /// What is left is copied: splice(2) stops for ever at urgent data, and may tell an end or a failure there, though more
    /// can be read.
    pub(crate) copied: bool,
    /// Everything up to the end of its stream has been read.
    pub(crate) eof: bool,
    /// The end of the other's stream has been passed on to it.
    pub(crate) shut: bool,
    /// The connection broke. What came before can still be read.
    pub(crate) failed: bool,
}

impl Side {
    /// A socket of which nothing is known yet.
    pub(crate) fn new(fd: HostFd) -> Self {
        Self {
            fd,
            readable: false,
            writable: false,
            more_behind: false,
            copied: false,
            eof: false,
            shut: false,
            failed: false,
        }
    }

    /// One that is connected.
    pub(crate) fn connected(fd: HostFd) -> Self {
        Self { readable: true, writable: true, ..Self::new(fd) }
    }

    /// What has become of connecting, if that is known by now.
    pub(crate) fn connect_outcome(&self, events: EpollFlags) -> Option<nix::Result<()>> {
        let decided = EpollFlags::EPOLLOUT | EpollFlags::EPOLLHUP;
        if !events.intersects(decided | EpollFlags::EPOLLERR) {
            return None;
        }
        match host::socket_error(self.fd.as_fd()) {
            Some(errno) => Some(Err(errno)),
            // The kernel puts an ICMP error for a SYN over IPv4 into the socket's error queue (tcp_v4_err), of which epoll
            // tells, and has it fail only then. epoll tells of that, too.
            None => events.intersects(decided).then_some(Ok(())),
        }
    }

    /// Notes what epoll says.
    pub(crate) fn event(&mut self, events: EpollFlags) {
        let broken = events.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP);
        if events.contains(EpollFlags::EPOLLERR) {
            // Asking takes the error away, so it has to be remembered.
            self.failed |= host::socket_error(self.fd.as_fd()).is_some();
        }
        self.readable |= broken || events.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP);
        self.writable |= broken || events.contains(EpollFlags::EPOLLOUT);
        self.more_behind |= broken || events.intersects(EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLPRI);
        self.copied |= events.contains(EpollFlags::EPOLLPRI);
    }

    /// Whether it broke and nothing more can be read from it.
    pub(crate) fn is_over(&self) -> bool {
        self.failed && (self.eof || !self.readable)
    }
}

/// Calls again what a signal has interrupted.
pub(crate) fn retry<R>(mut call: impl FnMut() -> nix::Result<R>) -> nix::Result<R> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}
