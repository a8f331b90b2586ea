//! Data between the rings of a flow and its host socket.

use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::MsgFlags;

use super::TURN_BUDGET;
use crate::calls::{recv, send};
use crate::flowlog::Account;
use crate::policy::hello::{self, Hello, MAX_HELLO};
use crate::side::{Side, retry};
use crate::sys::RingSocket;

/// What may be moved for a flow now.
#[derive(Debug, Clone, Copy)]
pub(super) struct Allowance {
    pub(super) sent: usize,
    pub(super) received: usize,
    /// More was there, from the guest and for it.
    pub(super) wanted: [bool; 2],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Goes,
    /// The host's side is gone, and the guest must know.
    Broken,
}

/// What the guest's first bytes say, if that can be said yet. They stay where they are.
pub(super) fn first_bytes(socket: &mut RingSocket, is_all: bool) -> Option<Hello> {
    let hello = socket.recv(|data| (0, (hello::read(data), data.len())));
    match hello {
        Ok((Hello::More, 0)) | Err(_) => is_all.then_some(Hello::Nameless),
        // Beyond that it is no honest one, however it is cut into records. The smallest ring holds more.
        Ok((Hello::More, len)) if is_all || len >= MAX_HELLO => Some(Hello::Broken),
        Ok((Hello::More, _)) => None,
        Ok((hello, _)) => Some(hello),
    }
}

/// Moves data between the rings and a host socket, as much as both sides take.
pub(super) fn move_host(
    socket: &mut RingSocket,
    host: &mut Side,
    moved: &mut usize,
    account: &mut Account,
    allowance: &mut Allowance,
    closed: bool,
    hold: bool,
) -> Fate {
    let raw = host.fd.as_raw_fd();
    while host.writable && !hold && socket.can_recv() {
        if allowance.sent == 0 {
            allowance.wanted[0] = true;
            break;
        }
        let sent = socket.recv(|data| {
            let data = &data[..data.len().min(allowance.sent)];
            let sent = retry(|| send(raw, data, MsgFlags::MSG_NOSIGNAL));
            (sent.unwrap_or(0), (sent, data.len()))
        });
        match sent {
            Ok((Ok(n), len)) => {
                *moved += n;
                account.sent.add_bytes(n);
                allowance.sent -= n;
                host.writable = n == len;
            }
            Ok((Err(Errno::EAGAIN), _)) => host.writable = false,
            // The guest may still read what the peer sent before it went away, as it could without us: below.
            Ok((Err(_), _)) => {
                host.failed = true;
                break;
            }
            Err(_) => break,
        }
    }
    let limit = *moved + TURN_BUDGET;
    while host.readable && !closed && !host.eof && socket.can_send() && *moved < limit {
        if allowance.received == 0 {
            allowance.wanted[1] = true;
            break;
        }
        let got = socket.send(|room| {
            let most = room.len().min(allowance.received);
            let room = &mut room[..most];
            let got = retry(|| recv(raw, room, MsgFlags::empty()));
            (got.unwrap_or(0), (got, room.len()))
        });
        match got {
            Ok((Ok(0), _)) if host.failed => return Fate::Broken,
            Ok((Ok(0), _)) => host.eof = true,
            Ok((Ok(n), room)) => {
                *moved += n;
                account.received.add_bytes(n);
                allowance.received -= n;
                host.readable = n == room || host.more_behind;
            }
            Ok((Err(Errno::EAGAIN), _)) => host.readable = false,
            Ok((Err(_), _)) => return Fate::Broken,
            Err(_) => break,
        }
    }
    // Nothing more will be read, or there never will be room for it.
    if host.is_over() { Fate::Broken } else { Fate::Goes }
}
