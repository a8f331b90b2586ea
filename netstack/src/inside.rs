//! Sockets of the guest's network namespace.
//!
//! A socket belongs to the namespace in which it was made, whoever uses it later. So whoever has a process in the guest's
//! namespace may keep a [`SocketMaker`] there, which makes sockets for the stack and hands them out over a socket pair,
//! and that is all it does: it never connects, reads or writes one, and knows no address.
//!
//! ```text
//! stack -> maker : flow (8 bytes), family (4 or 6)
//! maker -> stack : the same 9 bytes, errno (4 bytes), and the socket if that is 0
//! ```
//!
//! An answer that is lost, since nobody had room for it, costs one connection, which is given up when its time is up.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, recv, send, sendmsg, socket,
    socketpair,
};

use crate::flow::FlowId;
use crate::host;
use crate::sys;

const QUESTION: usize = 9;
const ANSWER: usize = QUESTION + 4;
/// Questions answered before the maker's owner gets its turn.
const TURN: usize = 64;

/// The stack's end: to be given to [`Published::through`](crate::Published::through).
#[derive(Debug)]
pub struct InsideSockets(OwnedFd);

/// The end for a process in the guest's network namespace.
#[derive(Debug)]
pub struct SocketMaker(OwnedFd);

/// Makes both ends. Which namespace sockets belong to is decided by the thread that calls [`SocketMaker::answer`].
///
/// # Errors
///
/// As socketpair(2).
pub fn inside_sockets() -> io::Result<(InsideSockets, SocketMaker)> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
    Ok((InsideSockets(ours), SocketMaker(theirs)))
}

impl AsFd for SocketMaker {
    /// Becomes readable when [`SocketMaker::answer`] has something to do.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl SocketMaker {
    /// Makes the sockets that the stack has asked for, if any, and never waits. Whether the stack is still there: if it is
    /// not, there is nothing more to do.
    #[must_use]
    pub fn answer(&self) -> bool {
        for _ in 0..TURN {
            let mut question = [0; QUESTION];
            match recv(self.0.as_raw_fd(), &mut question, MsgFlags::MSG_DONTWAIT) {
                Ok(QUESTION) => {}
                Ok(0) => return false,
                // Not one of ours.
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(errno) => return errno == Errno::EAGAIN,
            }
            let [.., family] = question;
            let ip: IpAddr =
                if family == 6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            let made = socket(host::family(ip), SockType::Stream, flags, None);
            let errno = made.as_ref().map_or_else(|errno| *errno as i32, |_| 0);
            let mut answer = [0; ANSWER];
            let (head, tail) = answer.split_at_mut(QUESTION);
            head.copy_from_slice(&question);
            tail.copy_from_slice(&errno.to_ne_bytes());
            let fds: Vec<_> = made.iter().map(AsRawFd::as_raw_fd).collect();
            let rights = [ControlMessage::ScmRights(&fds)];
            let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            let whole = [io::IoSlice::new(&answer)];
            if sendmsg::<UnixAddr>(self.0.as_raw_fd(), &whole, control, flags, None) == Err(Errno::EPIPE) {
                return false;
            }
        }
        true
    }
}

/// What the maker said.
#[derive(Debug)]
pub(crate) struct Made {
    pub(crate) flow: FlowId,
    pub(crate) socket: nix::Result<OwnedFd>,
}

impl InsideSockets {
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Asks for a socket for `flow` that can connect to `to`.
    pub(crate) fn ask(&self, flow: FlowId, to: IpAddr) -> nix::Result<()> {
        let mut question = [0; QUESTION];
        let (head, tail) = question.split_at_mut(QUESTION - 1);
        head.copy_from_slice(&flow.pack().to_ne_bytes());
        tail.copy_from_slice(if to.is_ipv6() { &[6] } else { &[4] });
        send(self.0.as_raw_fd(), &question, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL).map(drop)
    }

    /// The next answer; an error other than EAGAIN if there will be none any more.
    pub(crate) fn next(&self) -> nix::Result<Made> {
        let mut answer = [0; ANSWER];
        let (len, socket) = sys::receive_descriptor(self.0.as_fd(), &mut answer)?;
        if len != ANSWER {
            return Err(Errno::EPIPE);
        }
        let (question, errno) = answer.split_at(QUESTION);
        let flow = question.first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes));
        let errno = errno.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
        Ok(Made { flow: FlowId::unpack(flow), socket: socket.ok_or(Errno::from_raw(errno)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{getsockopt, sockopt};

    #[test]
    fn sockets_of_both_families_are_made_for_who_asked() {
        let (ours, maker) = inside_sockets().expect("socket pair");
        assert!(maker.answer() && ours.next().is_err_and(|errno| errno == Errno::EAGAIN));
        let wanted = [(FlowId::unpack(7), "192.0.2.1"), (FlowId::unpack(1 << 40), "2001:db8::1")];
        for (flow, ip) in wanted {
            ours.ask(flow, ip.parse().expect(ip)).expect("asked");
        }
        assert!(maker.answer());
        for (flow, ip) in wanted {
            let made = ours.next().expect("an answer");
            assert_eq!(made.flow, flow);
            let socket = made.socket.expect("a socket");
            assert_eq!(getsockopt(&socket, sockopt::SockType), Ok(SockType::Stream));
            let name = nix::sys::socket::getsockname::<nix::sys::socket::SockaddrStorage>(socket.as_raw_fd());
            let family = name.ok().and_then(|name| nix::sys::socket::SockaddrLike::family(&name));
            assert_eq!(family, Some(host::family(ip.parse().expect(ip))));
        }
        assert_eq!(ours.next().err(), Some(Errno::EAGAIN));
    }

    #[test]
    fn who_does_not_listen_holds_nobody_up() {
        let (ours, maker) = inside_sockets().expect("socket pair");
        let ip = Ipv4Addr::LOCALHOST.into();
        // The queue takes some hundreds.
        let asked = (0..100_000).take_while(|flow| ours.ask(FlowId::unpack(*flow), ip).is_ok()).count();
        assert!((16..100_000).contains(&asked), "{asked}");
        // Nor does who does not take the answers.
        let answered =
            (0..2_000).take_while(|_| maker.answer() && ours.ask(FlowId::unpack(0), ip).is_ok()).count();
        assert_eq!(answered, 2_000);
        drop(ours);
        assert!(!maker.answer());
    }

    #[test]
    fn the_end_of_the_maker_is_noticed() {
        let (ours, maker) = inside_sockets().expect("socket pair");
        drop(maker);
        assert_eq!(ours.next().err(), Some(Errno::EPIPE));
        assert_eq!(ours.ask(FlowId::unpack(0), Ipv4Addr::LOCALHOST.into()), Err(Errno::EPIPE));
    }
}
