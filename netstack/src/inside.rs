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
//! A descriptor that cannot be sent (ETOOMANYREFS: the kernel counts those in flight by user, and the payload may keep
//! many) is answered for with the errno alone. An answer that is lost all the same costs one connection its time.
//!
//! What comes is looked at before it is used: a socket of another kind is closed, and who sends what is no answer at all is
//! not listened to any more.

use std::io;
use std::net::IpAddr;
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
            let family = if family == Family::V6 as u8 { AddressFamily::Inet6 } else { AddressFamily::Inet };
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            let made = socket(family, SockType::Stream, flags, None);
            let said = self.say(&question, made.as_ref().map_err(|errno| *errno));
            let said = match said {
                Err(errno) if made.is_ok() && errno != Errno::EPIPE => self.say(&question, Err(errno)),
                said => said,
            };
            if said == Err(Errno::EPIPE) {
                return false;
            }
        }
        true
    }

    fn say(&self, question: &[u8; QUESTION], made: nix::Result<&OwnedFd>) -> nix::Result<()> {
        let errno = made.map_or_else(|errno| errno as i32, |_| 0);
        let mut answer = [0; ANSWER];
        let (head, tail) = answer.split_at_mut(QUESTION);
        head.copy_from_slice(question);
        tail.copy_from_slice(&errno.to_ne_bytes());
        let fds = made.map(AsRawFd::as_raw_fd);
        let rights = fds.as_ref().map(|fd| [ControlMessage::ScmRights(std::slice::from_ref(fd))]);
        let control = rights.as_ref().map_or(&[][..], |rights| &rights[..]);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let whole = [io::IoSlice::new(&answer)];
        sendmsg::<UnixAddr>(self.0.as_raw_fd(), &whole, control, flags, None).map(drop)
    }
}

/// What a socket can connect to. As it is in messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Family {
    V4 = 4,
    V6 = 6,
}

impl Family {
    pub(crate) fn of(ip: IpAddr) -> Self {
        if ip.is_ipv6() { Self::V6 } else { Self::V4 }
    }
}

/// What the maker said.
#[derive(Debug)]
pub(crate) struct Made {
    pub(crate) flow: FlowId,
    pub(crate) family: Family,
    pub(crate) socket: nix::Result<OwnedFd>,
}

impl InsideSockets {
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Asks for a socket for `flow`.
    pub(crate) fn ask(&self, flow: FlowId, family: Family) -> nix::Result<()> {
        let mut question = [0; QUESTION];
        let (head, tail) = question.split_at_mut(QUESTION - 1);
        head.copy_from_slice(&flow.pack().to_ne_bytes());
        tail.copy_from_slice(&[family as u8]);
        send(self.0.as_raw_fd(), &question, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL).map(drop)
    }

    /// The next answer; an error other than EAGAIN if there will be none any more.
    pub(crate) fn next(&self) -> nix::Result<Made> {
        let mut answer = [0; ANSWER];
        let (len, mut sockets) = sys::receive_descriptors(self.0.as_fd(), &mut answer)?;
        let (question, errno) = answer.split_at(QUESTION);
        let family = match question.last() {
            Some(4) => Family::V4,
            Some(6) => Family::V6,
            _ => return Err(Errno::EPIPE),
        };
        if len != ANSWER || sockets.len() > 1 {
            return Err(Errno::EPIPE);
        }
        let flow = question.first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes));
        let errno = errno.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
        let socket = sockets.pop().ok_or(Errno::from_raw(errno)).and_then(|fd| usable(fd, family));
        Ok(Made { flow: FlowId::unpack(flow), family, socket })
    }
}

/// The descriptor, if it is a TCP socket of this family, after whose calls nobody has to wait.
fn usable(fd: OwnedFd, family: Family) -> nix::Result<OwnedFd> {
    let domain = if family == Family::V6 { libc::AF_INET6 } else { libc::AF_INET };
    if sys::kind_of_socket(fd.as_fd())? != (domain, libc::SOCK_STREAM, libc::IPPROTO_TCP) {
        return Err(Errno::EPROTOTYPE);
    }
    host::nonblocking(fd.as_fd())?;
    Ok(fd)
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
            ours.ask(flow, Family::of(ip.parse().expect(ip))).expect("asked");
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
        let v4 = Family::V4;
        // The queue takes some hundreds.
        let asked = (0..100_000).take_while(|flow| ours.ask(FlowId::unpack(*flow), v4).is_ok()).count();
        assert!((16..100_000).contains(&asked), "{asked}");
        // Nor does who does not take the answers.
        let answered =
            (0..2_000).take_while(|_| maker.answer() && ours.ask(FlowId::unpack(0), v4).is_ok()).count();
        assert_eq!(answered, 2_000);
        drop(ours);
        assert!(!maker.answer());
    }

    #[test]
    fn the_end_of_the_maker_is_noticed() {
        let (ours, maker) = inside_sockets().expect("socket pair");
        drop(maker);
        assert_eq!(ours.next().err(), Some(Errno::EPIPE));
        assert_eq!(ours.ask(FlowId::unpack(0), Family::V4), Err(Errno::EPIPE));
    }

    #[test]
    fn what_is_no_good_answer_leaves_nothing_open() {
        use std::io::{Read as _, Write as _};
        let answer = |maker: &SocketMaker, len: usize, fds: &[OwnedFd]| {
            let answer = [&[1, 0, 0, 0, 0, 0, 0, 0, 4][..], &[0; 8]].concat();
            let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
            let rights = [ControlMessage::ScmRights(&fds)];
            let whole = [io::IoSlice::new(&answer[..len])];
            let sent =
                sendmsg::<UnixAddr>(maker.0.as_raw_fd(), &whole, &rights, MsgFlags::MSG_DONTWAIT, None);
            assert_eq!(sent, Ok(len));
        };
        // Of another kind: that flow does without. More than there is room for, or no answer: that is the end.
        for (len, fds, ends) in
            [(ANSWER, 1, false), (ANSWER, 2, true), (ANSWER, 9, true), (ANSWER - 1, 1, true)]
        {
            let (ours, maker) = inside_sockets().expect("socket pair");
            let (mut reader, mut writer) = io::pipe().expect("pipe");
            writer.write_all(b"x").expect("written");
            let copies: Vec<OwnedFd> = (0..fds).map(|_| writer.try_clone().expect("copy").into()).collect();
            drop(writer);
            answer(&maker, len, &copies);
            drop(copies);
            match ours.next() {
                Ok(made) => assert!(!ends && made.socket.is_err()),
                Err(errno) => assert!(ends && errno == Errno::EPIPE),
            }
            // The pipe has an end: nobody holds what could be written to.
            let mut all = Vec::new();
            nix::fcntl::fcntl(&reader, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))
                .expect("non-blocking");
            assert_eq!(reader.read_to_end(&mut all).expect("an end"), 1, "{len} {fds}");
        }
    }

    #[test]
    fn a_socket_of_the_maker_is_of_the_family_asked_for_and_does_not_block() {
        for (asked, got, kind, good) in [
            (Family::V4, AddressFamily::Inet, SockType::Stream, true),
            (Family::V6, AddressFamily::Inet6, SockType::Stream, true),
            (Family::V4, AddressFamily::Inet6, SockType::Stream, false),
            (Family::V6, AddressFamily::Inet, SockType::Stream, false),
            (Family::V4, AddressFamily::Inet, SockType::Datagram, false),
            (Family::V4, AddressFamily::Unix, SockType::Stream, false),
        ] {
            let made = usable(socket(got, kind, SockFlag::SOCK_CLOEXEC, None).expect("socket"), asked);
            assert_eq!(made.is_ok(), good, "{asked:?} {got:?} {kind:?}");
            if let Ok(made) = made {
                let flags = nix::fcntl::fcntl(&made, nix::fcntl::FcntlArg::F_GETFL).expect("flags");
                assert!(nix::fcntl::OFlag::from_bits_retain(flags).contains(nix::fcntl::OFlag::O_NONBLOCK));
            }
        }
    }
}
