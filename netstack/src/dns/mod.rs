//! The DNS forwarder at the gateway's addresses, port 53.
//!
//! A query is answered from the spec's own names, or sent to a resolver of the host over the transport that it came by,
//! as it is: EDNS, DNSSEC bits and whatever else passes through. So does the truncation mark of an answer; the guest then
//! asks again over TCP, and so do we.
//!
//! Each query under way has a socket of its own, connected to the resolver, with a port of the kernel's choice, and a
//! random identifier (RFC 5452): an answer counts only if it comes from there, with that identifier, for that question.
//! If none comes in [`DNS_TRY`], or the resolver refuses, the next one is asked, three times at most; then SERVFAIL. The
//! resolver that answered last is asked first the next time. [`MAX_DNS_QUERIES`] may be under way; the oldest gives way.
//!
//! States of a query: sent over UDP, waiting; or over TCP: connecting, sending, reading. Timer: one per try.

pub(crate) mod message;
pub(crate) mod pins;
pub(crate) mod resolv;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{MsgFlags, SockaddrStorage, connect, recv, send};
use smoltcp::time::Instant;

use crate::config::{DNS_TRY, DnsSpec, MAX_DNS_QUERIES};
use crate::engine::{Shared, Token};
use crate::flow::{Endpoint, FlowId, Slab, TimerKey};
use crate::host::{self, HostFd};
use message::{Code, Question};
use resolv::Resolvers;

/// Tries for one query, the first included.
const MAX_TRIES: usize = 3;

/// Who asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Origin {
    /// A datagram.
    Udp { guest: Endpoint, gateway: Endpoint },
    /// A TCP flow.
    Tcp(FlowId),
}

/// An answer for the guest.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) origin: Origin,
    pub(crate) message: Vec<u8>,
}

#[derive(Debug)]
enum Upstream {
    Udp(HostFd),
    Tcp { fd: HostFd, sent: usize, input: Vec<u8> },
}

#[derive(Debug)]
struct Pending {
    origin: Origin,
    /// The guest's own identifier.
    guest_id: [u8; 2],
    /// With our identifier.
    query: Vec<u8>,
    question: Question,
    upstream: Option<Upstream>,
    server: usize,
    tries: usize,
    deadline: Instant,
    timer: Option<Instant>,
    /// A failure that a resolver answered with: better than one of our own.
    failure: Option<Vec<u8>>,
}

/// The forwarder.
#[derive(Debug)]
pub(crate) struct Dns {
    hosts: Vec<(String, IpAddr)>,
    resolvers: Resolvers,
    preferred: usize,
    queries: Slab<Pending>,
    /// UDP queries under way, so that a repeated one is not sent again.
    by_origin: HashMap<(Origin, [u8; 2]), FlowId>,
    /// To be fetched by the engine.
    pub(crate) answers: Vec<Answer>,
}

impl Dns {
    pub(crate) fn new(spec: &DnsSpec) -> Self {
        let normal = |name: &String| name.trim_end_matches('.').to_ascii_lowercase();
        Self {
            hosts: spec.hosts.iter().map(|(name, ip)| (normal(name), *ip)).collect(),
            resolvers: Resolvers::new(&spec.upstreams, PathBuf::from("/etc/resolv.conf")),
            preferred: 0,
            queries: Slab::default(),
            by_origin: HashMap::new(),
            answers: Vec::new(),
        }
    }

    /// Queries that wait for a resolver.
    #[cfg(test)]
    pub(crate) fn under_way(&self) -> usize {
        self.queries.len()
    }

    #[cfg(test)]
    pub(crate) fn check_bounds(&self) {
        assert!(self.queries.len() <= MAX_DNS_QUERIES && self.by_origin.len() <= self.queries.len());
        assert!(self.answers.is_empty());
    }

    /// A query from the guest.
    pub(crate) fn query(&mut self, sh: &mut Shared, now: Instant, origin: Origin, query: &[u8]) {
        sh.stats.dns_queries.one();
        let question = match message::parse_query(query) {
            Ok(question) => question,
            Err(code) => {
                // Over TCP every query is counted, so what deserves no answer gets one.
                let code = code.or(matches!(origin, Origin::Tcp(_)).then_some(Code::FormErr));
                if let Some(code) = code {
                    self.answers.push(Answer { origin, message: message::error(query, None, code) });
                }
                return;
            }
        };
        let ips: Vec<IpAddr> =
            self.hosts.iter().filter(|(name, _)| *name == question.name).map(|(_, ip)| *ip).collect();
        if !ips.is_empty() {
            let message = message::hosts_answer(query, &question, &ips);
            return self.answers.push(Answer { origin, message });
        }
        let [a, b, ..] = query else { return };
        let guest_id = [*a, *b];
        if matches!(origin, Origin::Udp { .. })
            && let Some(id) = self.by_origin.get(&(origin, guest_id))
            && self.queries.get(*id).is_some_and(|pending| pending.question == question)
        {
            return;
        }
        if self.queries.len() >= MAX_DNS_QUERIES {
            let oldest = self.queries.iter().min_by_key(|(_, pending)| pending.deadline).map(|(id, _)| id);
            if let Some(oldest) = oldest {
                sh.stats.refused_by_limit.one();
                self.give_up(sh, oldest);
            }
        }
        let mut query = query.to_vec();
        let [c, d, ..] = sh.random.next().to_ne_bytes();
        query[..2].copy_from_slice(&[c, d]);
        let server = self.preferred;
        let id = self.queries.insert_with(|_| Pending {
            origin,
            guest_id,
            query,
            question,
            upstream: None,
            server,
            tries: 0,
            deadline: now,
            timer: None,
            failure: None,
        });
        if matches!(origin, Origin::Udp { .. }) {
            self.by_origin.insert((origin, guest_id), id);
        }
        self.try_next(sh, now, id);
    }

    /// Sends a query to the next resolver, or gives up.
    fn try_next(&mut self, sh: &mut Shared, now: Instant, id: FlowId) {
        loop {
            let Some(pending) = self.queries.get_mut(id) else { return };
            pending.upstream = None;
            if let Some(at) = pending.timer.take() {
                sh.timers.cancel(at, TimerKey::Dns(id));
            }
            let servers = self.resolvers.get(now);
            // A single resolver is asked twice: datagrams get lost.
            if pending.tries >= MAX_TRIES.min(servers.len().max(2)) || servers.is_empty() {
                return self.give_up(sh, id);
            }
            let Some(&server) = servers.get((pending.server + pending.tries) % servers.len()) else { return };
            pending.tries += 1;
            pending.deadline = now + DNS_TRY;
            match pending.send(sh, id, server) {
                Ok(upstream) => {
                    pending.upstream = Some(upstream);
                    pending.timer = Some(pending.deadline);
                    sh.timers.set(pending.deadline, TimerKey::Dns(id));
                    return;
                }
                Err(errno) => tracing::debug!(%errno, %server, "resolver not reached"),
            }
        }
    }

    fn give_up(&mut self, sh: &mut Shared, id: FlowId) {
        let Some(pending) = self.queries.get_mut(id) else { return };
        let failed = || message::error(&pending.query, Some(&pending.question), Code::ServFail);
        let message = pending.failure.take().unwrap_or_else(failed);
        self.finish(sh, id, message);
    }

    fn finish(&mut self, sh: &mut Shared, id: FlowId, mut message: Vec<u8>) {
        let Some(pending) = self.queries.remove(id) else { return };
        self.by_origin.remove(&(pending.origin, pending.guest_id));
        if let Some(at) = pending.timer {
            sh.timers.cancel(at, TimerKey::Dns(id));
        }
        if let Some(id) = message.get_mut(..2) {
            id.copy_from_slice(&pending.guest_id);
        }
        self.answers.push(Answer { origin: pending.origin, message });
        sh.descriptor_freed = true;
    }

    pub(crate) fn timer(&mut self, sh: &mut Shared, now: Instant, id: FlowId) {
        self.try_next(sh, now, id);
    }

    /// A resolver's socket has something to say.
    pub(crate) fn host_event(&mut self, sh: &mut Shared, now: Instant, id: FlowId) {
        let mut buffer = std::mem::take(&mut sh.datagram);
        let Some(pending) = self.queries.get_mut(id) else {
            sh.datagram = buffer;
            return;
        };
        let progress = pending.progress(&mut buffer);
        sh.datagram = buffer;
        match progress {
            Ok(None) => {}
            // Somebody else may know better, but the same one will not.
            Ok(Some(answer)) if message::is_failure(&answer) && self.resolvers.get(now).len() > 1 => {
                pending.failure = Some(answer);
                self.try_next(sh, now, id);
            }
            Ok(Some(answer)) => {
                let servers = self.resolvers.get(now).len().max(1);
                self.preferred = (pending.server + pending.tries.saturating_sub(1)) % servers;
                self.finish(sh, id, answer);
            }
            Err(errno) => {
                tracing::debug!(%errno, "resolver failed");
                self.try_next(sh, now, id);
            }
        }
    }
}

impl Pending {
    /// Opens a socket to `server` and sends the query, or begins to.
    fn send(&self, sh: &mut Shared, id: FlowId, server: SocketAddr) -> nix::Result<Upstream> {
        match self.origin {
            Origin::Udp { .. } => {
                let fd = host::datagram_socket(&sh.budget, server.ip(), None)?;
                connect(fd.as_raw_fd(), &SockaddrStorage::from(server))?;
                send(fd.as_raw_fd(), &self.query, MsgFlags::MSG_NOSIGNAL)?;
                sh.watch(fd.as_fd(), Token::Dns(id), EpollFlags::EPOLLIN)?;
                Ok(Upstream::Udp(fd))
            }
            Origin::Tcp(_) => {
                let (fd, _) = host::tcp_connect(&sh.budget, server, 0)?;
                let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
                sh.watch(fd.as_fd(), Token::Dns(id), flags)?;
                Ok(Upstream::Tcp { fd, sent: 0, input: Vec::new() })
            }
        }
    }

    /// Goes on as far as the socket lets it; the answer once it is there.
    fn progress(&mut self, buffer: &mut [u8]) -> nix::Result<Option<Vec<u8>>> {
        match &mut self.upstream {
            None => Ok(None),
            Some(Upstream::Udp(fd)) => loop {
                match recv(fd.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
                    Ok(len) => {
                        let answer = buffer.get(..len).unwrap_or_default();
                        if message::is_response_to(answer, &self.query, &self.question) {
                            return Ok(Some(answer.to_vec()));
                        }
                    }
                    Err(Errno::EAGAIN) => return Ok(None),
                    Err(Errno::EINTR) => {}
                    Err(errno) => return Err(errno),
                }
            },
            Some(Upstream::Tcp { fd, sent, input }) => {
                let len = u16::try_from(self.query.len()).map_err(|_| Errno::EMSGSIZE)?;
                let framed = [&len.to_be_bytes()[..], &self.query].concat();
                while let Some(rest) = framed.get(*sent..).filter(|rest| !rest.is_empty()) {
                    match send(fd.as_raw_fd(), rest, MsgFlags::MSG_NOSIGNAL) {
                        Ok(n) => *sent += n,
                        Err(Errno::EAGAIN | Errno::ENOTCONN) => return Ok(None),
                        Err(Errno::EINTR) => {}
                        Err(errno) => return Err(errno),
                    }
                }
                loop {
                    if let Some((len, rest)) = input.split_first_chunk()
                        && let Some(answer) = rest.get(..usize::from(u16::from_be_bytes(*len)))
                    {
                        let good = message::is_response_to(answer, &self.query, &self.question);
                        return if good { Ok(Some(answer.to_vec())) } else { Err(Errno::EBADMSG) };
                    }
                    match recv(fd.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
                        Ok(0) => return Err(Errno::ECONNRESET),
                        Ok(n) => input.extend_from_slice(buffer.get(..n).unwrap_or_default()),
                        Err(Errno::EAGAIN) => return Ok(None),
                        Err(Errno::EINTR) => {}
                        Err(errno) => return Err(errno),
                    }
                }
            }
        }
    }
}
