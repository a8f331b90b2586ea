//! DNS over TCP (RFC 1035 section 4.2.2, RFC 7766): what is behind a connection of the guest to the gateway's port 53,
//! where other flows have a socket of the host's. [`tcp`](crate::tcp) has the connection itself.
//!
//! Whole queries are taken out of the receive ring, [`MAX_DNS_PIPELINE`] at once, and none while the guest leaves answers
//! unread: what it sends beyond that stays in the ring and closes its window. Answers go in the order in which they are
//! found.
//!
//! Our half is closed when the guest has closed its own and got its answers, or was silent for [`DNS_TCP_IDLE`]; once more
//! as long after that it is gone. A query under way keeps it.

use std::collections::VecDeque;

use smoltcp::socket::tcp::State;
use smoltcp::time::Instant;

use crate::config::{DNS_TCP_IDLE, MAX_DNS_PIPELINE};
use crate::flow::FlowId;
use crate::sys::RingSocket;

/// A query that came over TCP.
#[derive(Debug)]
pub(crate) struct Query {
    pub(crate) flow: FlowId,
    pub(crate) message: Vec<u8>,
}

/// The forwarder's side of a connection.
#[derive(Debug, Default)]
pub(crate) struct Stream {
    /// Bytes from the guest that are no whole query yet: 65,537 at most.
    input: Vec<u8>,
    /// Answers that did not fit into the ring yet: [`MAX_DNS_PIPELINE`] at most.
    output: VecDeque<u8>,
    under_way: usize,
}

impl Stream {
    /// Puts answers into the transmit ring, and takes whole queries out of the receive ring, of which no more bytes are
    /// taken than one query needs.
    pub(crate) fn exchange(&mut self, id: FlowId, socket: &mut RingSocket, queries: &mut Vec<Query>) {
        while !self.output.is_empty() && socket.can_send() {
            let sent = socket.send(|room| {
                let (first, _) = self.output.as_slices();
                let n = first.len().min(room.len());
                room[..n].copy_from_slice(&first[..n]);
                (n, n)
            });
            match sent {
                Ok(n) => drop(self.output.drain(..n)),
                Err(_) => break,
            }
        }
        while self.under_way < MAX_DNS_PIPELINE && self.output.is_empty() {
            let missing = match self.input.split_first_chunk() {
                Some((len, rest)) => usize::from(u16::from_be_bytes(*len)).saturating_sub(rest.len()),
                None => 2 - self.input.len(),
            };
            if missing == 0 {
                let message = self.input.split_off(2);
                self.input.clear();
                self.under_way += 1;
                queries.push(Query { flow: id, message });
                continue;
            }
            let taken = socket.recv(|data| {
                let n = data.len().min(missing);
                self.input.extend_from_slice(&data[..n]);
                (n, n)
            });
            if !taken.is_ok_and(|n| n > 0) {
                break;
            }
        }
    }

    /// The answer to one of the queries.
    pub(crate) fn answer(&mut self, answer: &[u8]) {
        self.under_way = self.under_way.saturating_sub(1);
        if let Ok(len) = u16::try_from(answer.len()) {
            self.output.extend(len.to_be_bytes());
            self.output.extend(answer);
        }
    }

    /// Whether our half is to be closed. The guest was heard of at `heard`; `all_said`: it has closed its own.
    pub(crate) fn ends(&self, socket: &RingSocket, all_said: bool, heard: Instant, now: Instant) -> bool {
        let done = all_said && !socket.can_recv();
        let idle = now >= heard + DNS_TCP_IDLE;
        let open = matches!(socket.state(), State::Established | State::CloseWait);
        (done || idle) && self.under_way == 0 && open && self.output.is_empty()
    }

    /// Whether the guest has had its time to close its half, too.
    pub(crate) fn is_abandoned(&self, heard: Instant, now: Instant) -> bool {
        now >= heard + DNS_TCP_IDLE * 2 && self.under_way == 0
    }

    /// When that has to be asked next.
    pub(crate) fn look_at(heard: Instant, closed: bool) -> Instant {
        heard + if closed { DNS_TCP_IDLE * 2 } else { DNS_TCP_IDLE }
    }

    /// Bytes that wait outside the rings.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> usize {
        self.input.len() + self.output.len()
    }
}
