//! What the modules of the protocols share: the TAP, the watch on descriptors, timers, counters, what the policy says, and
//! whom to tell.

use std::collections::{HashSet, VecDeque};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use smoltcp::time::{Duration, Instant};

use crate::config::{MAX_HALF_OPEN, MAX_TCP_FLOWS, StackSpec};
use crate::defect::At;
use crate::device::{self, Tap};
use crate::dns::pins::Pins;
use crate::flow::{Endpoint, FlowId, FlowKey, Timers};
use crate::flowlog::{FlowEvent, FlowEventKind, Refusals};
use crate::host::Budget;
use crate::netlink::Routes;
use crate::policy::hello::Hello;
use crate::policy::{self, KnownAs, Reason, RouteKind, Rules, Transport, Verdict};
use crate::rate::Bucket;
use crate::stats::Counters;
use crate::suspend::Suspension;

/// What an epoll event belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Token {
    Tap,
    Command,
    Tcp(FlowId),
    Udp(FlowId),
    Ping(FlowId),
    Dns(FlowId),
    TcpListener(FlowId),
    UdpListener(FlowId),
    /// Of a joined connection: the client's socket, and that inside.
    Near(FlowId),
    Inner(FlowId),
    /// Where sockets inside come from.
    Inside,
}

impl Token {
    pub(crate) fn pack(self) -> u64 {
        let (kind, rest) = match self {
            Self::Tap => (0, 0),
            Self::Command => (1, 0),
            Self::Tcp(id) => (2, id.pack()),
            Self::Udp(id) => (3, id.pack()),
            Self::Ping(id) => (4, id.pack()),
            Self::Dns(id) => (5, id.pack()),
            Self::TcpListener(id) => (6, id.pack()),
            Self::UdpListener(id) => (7, id.pack()),
            Self::Near(id) => (8, id.pack()),
            Self::Inner(id) => (9, id.pack()),
            Self::Inside => (10, 0),
        };
        kind << 56 | rest
    }

    pub(crate) fn unpack(bits: u64) -> Option<Self> {
        let rest = bits & !(0xff << 56);
        let id = FlowId::unpack(rest);
        Some(match bits >> 56 {
            0 => Self::Tap,
            1 => Self::Command,
            2 => Self::Tcp(id),
            3 => Self::Udp(id),
            4 => Self::Ping(id),
            5 => Self::Dns(id),
            6 => Self::TcpListener(id),
            7 => Self::UdpListener(id),
            8 => Self::Near(id),
            9 => Self::Inner(id),
            10 => Self::Inside,
            _ => return None,
        })
    }
}

/// Numbers that the guest cannot foresee: a keyed hash (SipHash, key from the kernel) of a counter.
#[derive(Debug, Default)]
pub(crate) struct Random(RandomState, u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.1 += 1;
        let mut hasher = self.0.build_hasher();
        hasher.write_u64(self.1);
        hasher.finish()
    }
}

/// Sockets that were not read to their end, the longest waiting first, each of them once.
///
/// They are served before whatever has become readable since, and one that could not be read to its end again goes to
/// the end of the queue: while the TAP takes fewer frames than come, all get their share of it.
#[derive(Debug, Default)]
pub(crate) struct Unread {
    pub(crate) queue: VecDeque<u64>,
    waiting: HashSet<u64>,
}

impl Unread {
    fn push(&mut self, token: Token) {
        if self.waiting.insert(token.pack()) {
            self.queue.push_back(token.pack());
        }
    }

    pub(crate) fn pop(&mut self) -> Option<u64> {
        let token = self.queue.pop_front()?;
        self.waiting.remove(&token);
        Some(token)
    }
}

/// What the modules of the protocols share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) spec: StackSpec,
    pub(crate) rules: Rules,
    routes: Routes,
    pub(crate) tap: Tap,
    pub(crate) epoll: Epoll,
    pub(crate) timers: Timers,
    pub(crate) stats: Arc<Counters>,
    pub(crate) budget: Budget,
    pub(crate) random: Random,
    /// The names by which the guest knows addresses.
    pub(crate) pins: Pins,
    pub(crate) suspension: Suspension,
    /// How often it was noticed that the host had been suspended.
    pub(crate) suspensions: u64,
    /// Buffer for datagrams of the host's side.
    pub(crate) datagram: Box<[u8]>,
    /// Datagram sockets with more to read than could be taken: there was no room in the TAP, or others had to get their
    /// turn.
    pub(crate) unread: Unread,
    /// A descriptor was closed, so listeners that were starved of them may go on.
    pub(crate) descriptor_freed: bool,
    /// When this turn began to do things.
    pub(crate) now: Instant,
    refusals: Refusals,
    /// How many TCP flows there are, whichever way they go, and may be: [`MAX_TCP_FLOWS`], unless a test wants less.
    pub(crate) tcp_flows: usize,
    pub(crate) most_tcp_flows: usize,
    /// Of these, those that the guest began, and joined ones, whose other end has not answered yet.
    pub(crate) half_open: usize,
    /// What may still go from the guest to the world, and the other way.
    pub(crate) sent: Bucket,
    pub(crate) received: Bucket,
    /// How often a TCP flow had to wait until more may go.
    pub(crate) waits: u64,
    pub(crate) at: At,
    /// What a test wants to fail.
    #[cfg(test)]
    pub(crate) trap: Option<fn(At) -> bool>,
}

impl Shared {
    pub(crate) fn new(
        tap: Tap,
        spec: &StackSpec,
        stats: Arc<Counters>,
        budget: Budget,
        now: Instant,
    ) -> nix::Result<Self> {
        Ok(Self {
            spec: spec.clone(),
            rules: Rules::new(spec),
            routes: Routes::default(),
            tap,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            timers: Timers::default(),
            stats,
            budget,
            random: Random::default(),
            pins: Pins::default(),
            suspension: Suspension::new(),
            suspensions: 0,
            datagram: device::frame_buffer(),
            unread: Unread::default(),
            descriptor_freed: false,
            now,
            refusals: Refusals::new(now),
            tcp_flows: 0,
            most_tcp_flows: MAX_TCP_FLOWS,
            half_open: 0,
            sent: Bucket::new(spec.rates.sent, now),
            received: Bucket::new(spec.rates.received, now),
            waits: 0,
            at: At::Housekeeping,
            #[cfg(test)]
            trap: None,
        })
    }

    /// Notes what is done next.
    pub(crate) fn begin(&mut self, at: At) {
        self.at = at;
        #[cfg(test)]
        assert!(!self.trap.is_some_and(|trap| trap(at)), "part of the test");
    }

    /// Watches a descriptor. It is forgotten when it is closed, as no other copy of it exists.
    pub(crate) fn watch(&self, fd: BorrowedFd<'_>, token: Token, flags: EpollFlags) -> nix::Result<()> {
        #[cfg(test)]
        crate::calls::may_fail(crate::calls::Call::EpollAdd, std::os::fd::AsRawFd::as_raw_fd(&fd))?;
        self.epoll.add(fd, EpollEvent::new(flags, token.pack()))
    }

    /// Watches a descriptor no more.
    pub(crate) fn unwatch(&self, fd: BorrowedFd<'_>) {
        let _ = self.epoll.delete(fd);
    }

    /// Says how many TCP flows there are now.
    pub(crate) fn set_tcp_flows(&mut self, count: usize) {
        self.tcp_flows = count;
        self.stats.tcp_flows.set(count);
    }

    /// How many TCP flows may be half-open.
    pub(crate) fn most_half_open(&self) -> usize {
        MAX_HALF_OPEN.min(self.budget.limit / 2)
    }

    /// Remembers a socket that was not read to its end.
    pub(crate) fn come_back(&mut self, token: Token) {
        self.unread.push(token);
    }

    /// What is to be done with a flow of the guest's to `remote`.
    pub(crate) fn decide(&mut self, transport: Transport, remote: Endpoint) -> Verdict {
        self.decide_again(transport, remote, None)
    }

    /// The same for one that exists, and was allowed by `name`, if it was by one: names are forgotten, flows go on.
    pub(crate) fn decide_again(
        &mut self,
        transport: Transport,
        remote: Endpoint,
        name: Option<&Arc<str>>,
    ) -> Verdict {
        // The gateway is known without asking. Behind a translator the host may meet itself.
        let route = if self.spec.is_ours(remote.ip) {
            RouteKind::Unknown
        } else {
            let own = self.routes.kind_of(remote.ip);
            policy::embedded_v4(remote.ip).map(|ip| self.routes.kind_of(ip.into())).fold(own, RouteKind::max)
        };
        let mut names: Vec<KnownAs<'_>> = Vec::new();
        if self.rules.want_names() {
            self.notice_suspension(self.now);
            let pinned = self.pins.known(self.now, remote.ip);
            names.extend(pinned.map(|(name, by_spec)| KnownAs { name, by_spec }));
            names.extend(name.map(|name| KnownAs { name, by_spec: false }));
        }
        policy::decide(&self.rules, transport, remote.into(), route, &names)
    }

    /// The name by which a flow to `ip` is allowed now, if any is.
    pub(crate) fn name_for(&self, ip: IpAddr) -> Option<Arc<str>> {
        if !self.rules.want_names() {
            return None;
        }
        let mut names = self.pins.known(self.now, ip).map(|(name, _)| name);
        names.find(|name| self.rules.allows_name(name)).map(Arc::clone)
    }

    /// Whether a TCP flow to `remote` that was let begin may go on, by its first bytes.
    pub(crate) fn decide_hello(&self, remote: Endpoint, hello: &Hello) -> Result<(), Reason> {
        policy::decide_hello(&self.rules, remote.into(), hello)
    }

    /// Whether rules are about names.
    pub(crate) fn want_names(&self) -> bool {
        self.rules.want_names()
    }

    /// Looks whether the host was suspended: names then are that much older.
    pub(crate) fn notice_suspension(&mut self, now: Instant) {
        if let Some(slept) = self.suspension.since(now) {
            tracing::debug!(seconds = slept.secs(), "the host was suspended");
            self.suspensions += 1;
            self.pins.grow_older(slept);
        }
    }

    /// Counts a refused flow and says by which rule; whether the guest is to be told.
    pub(crate) fn refused(&mut self, transport: Transport, key: FlowKey, reason: Reason) -> bool {
        tracing::debug!(
            transport = transport.name(),
            to = %SocketAddr::from(key.remote),
            reason = reason.name(),
            rule = self.rules.rule_of(reason),
            "refused"
        );
        if reason.is_silent() {
            self.stats.dropped_multicast.one();
        } else {
            self.stats.refused_by_policy.one();
        }
        let rule = self.rules.rule_of(reason);
        self.tell_refused(transport, key, reason.name(), rule.as_deref());
        !reason.is_silent()
    }

    /// Counts a flow of the guest's that is allowed, and for which there is no room.
    pub(crate) fn refused_by_limit(&mut self, transport: Transport, key: FlowKey) {
        self.stats.refused_by_limit.one();
        self.tell_refused(transport, key, "limit", None);
    }

    /// Tells of a flow of the guest's of which nothing leaves, if not too many have been told.
    pub(crate) fn tell_refused(
        &mut self,
        transport: Transport,
        key: FlowKey,
        reason: &'static str,
        rule: Option<&str>,
    ) {
        if self.spec.flow_log.is_some()
            && let Some(untold) = self.refusals.take(self.now)
        {
            self.tell(transport, false, key, FlowEventKind::Refused { reason, rule, untold });
        }
    }

    /// Pins `name` to `ip`: [`Pins::pin`].
    pub(crate) fn pin(&mut self, now: Instant, name: &Arc<str>, ip: IpAddr, ttl: Option<Duration>) -> bool {
        if let Some(capture) = &self.tap.capture
            && self.pins.names(now, ip).all(|known| known != &**name)
        {
            capture.name(ip, name);
        }
        self.pins.pin(now, name, ip, ttl)
    }

    /// Tells whoever listens what happened to a flow.
    pub(crate) fn tell(&self, transport: Transport, inbound: bool, key: FlowKey, kind: FlowEventKind<'_>) {
        let Some(log) = &self.spec.flow_log else { return };
        let name = self.pins.names(self.now, key.remote.ip).next();
        let (guest, remote) = (key.guest.into(), key.remote.into());
        log.tell(&FlowEvent { transport, inbound, guest, remote, name, kind });
    }

    /// Whether `ip` is an address that the guest may send from.
    pub(crate) fn is_guest(&self, ip: IpAddr) -> bool {
        let link = &self.spec.guest;
        link.contains(ip) && !self.spec.is_ours(ip) && !link.is_subnet_edge(ip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_packing() {
        let mut slab = crate::flow::Slab::default();
        for _ in 0..3 {
            let id = slab.insert_with(|_| ());
            for token in [
                Token::Tap,
                Token::Command,
                Token::Tcp(id),
                Token::Udp(id),
                Token::Ping(id),
                Token::Dns(id),
                Token::TcpListener(id),
                Token::UdpListener(id),
                Token::Near(id),
                Token::Inner(id),
                Token::Inside,
            ] {
                assert_eq!(Token::unpack(token.pack()), Some(token));
            }
            slab.remove(id);
        }
        assert_eq!(Token::unpack(u64::MAX), None);
    }

    #[test]
    fn unread_sockets_take_turns_and_wait_once() {
        let mut unread = Unread::default();
        for token in [
            Token::UdpListener(FlowId::unpack(3)),
            Token::UdpListener(FlowId::unpack(1)),
            Token::UdpListener(FlowId::unpack(3)),
        ] {
            unread.push(token);
        }
        // The one that could not be read to its end goes behind the other.
        assert_eq!(unread.pop(), Some(Token::UdpListener(FlowId::unpack(3)).pack()));
        unread.push(Token::UdpListener(FlowId::unpack(3)));
        assert_eq!(unread.pop(), Some(Token::UdpListener(FlowId::unpack(1)).pack()));
        assert_eq!(unread.pop(), Some(Token::UdpListener(FlowId::unpack(3)).pack()));
        assert!(unread.pop().is_none() && unread.waiting.is_empty());
    }

    #[test]
    fn random_numbers_differ() {
        let mut random = Random::default();
        assert_ne!(random.next(), random.next());
        assert_ne!(Random::default().next(), Random::default().next());
    }
}
