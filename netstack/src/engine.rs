//! The event loop: one thread, one epoll, no wake-up without a reason.
//!
//! A turn: wait; note what happened to host sockets; take up to [`TURN_FRAMES`] frames from the guest, each of which
//! goes through [`ingress`](crate::ingress) to the module of its protocol; exchange queries and answers between TCP and
//! DNS; look after every TCP flow that anything happened to; fire timers. All state belongs to this thread.
//!
//! While the TAP takes no more frames nothing is read from it, and flows rest; when it does again, what waits goes first.
//! Sockets tell once that they have become readable (EPOLLET), or those that must rest would wake the thread without end:
//! who leaves something unread says so ([`Shared::come_back`]).
//!
//! A panic ends the network with a message in the log, not the process (`defect.rs`).

use std::collections::{HashSet, VecDeque};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{PipeReader, PipeWriter};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::UdpPacket;

use crate::config::{
    Error, LAST_DATA_MOST, LAST_DATA_QUIET, MAX_SUPER_SEGMENT, Publish, REASSEMBLY, StackSpec,
};
use crate::control::{self, Commands, Control};
use crate::defect::{self, At};
use crate::device::{self, ReadResult, Segmentation, Tap};
use crate::dhcp;
use crate::dns::pins::Pins;
use crate::dns::{Dns, Origin};
use crate::emit;
use crate::flow::{Endpoint, FlowId, FlowKey, TimerKey, Timers};
use crate::flowlog::{EachFlow, FlowEvent, FlowEventKind, FlowState, Refusals};
use crate::forward::{self, BoundPort, Forward, PortId, Published, PublishedPort};
use crate::fragment::Reassembly;
use crate::host::{self, Budget};
use crate::icmp::Icmp;
use crate::ingress::{self, Drop as Dropped, ICMP, ICMPV6, Inbound, Packet, TCP, UDP};
use crate::join::Join;
use crate::ndp;
use crate::netlink::Routes;
use crate::policy::hello::Hello;
use crate::policy::{self, DNS_PORT, KnownAs, PolicySpec, Reason, RouteKind, Rules, Transport, Verdict};
use crate::rate::{Bucket, Rates};
use crate::stats::{Counters, Stats};
use crate::suspend::Suspension;
use crate::sys;
use crate::tcp::Tcp;
use crate::udp::Udp;

/// Frames taken from the guest in one turn.
const TURN_FRAMES: usize = 64;
/// How long the end of the thread is waited for. It has nothing to wait for itself but the host's file systems, when it
/// reads the list of resolvers.
const STOP_PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);
/// Queries over TCP that are answered in one turn before others get theirs; those that the flows already have under way
/// come on top.
const TURN_QUERIES: usize = 256;
/// Events taken in one turn.
const TURN_EVENTS: usize = 256;

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
    fn pack(self) -> u64 {
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

    fn unpack(bits: u64) -> Option<Self> {
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
struct Unread {
    queue: VecDeque<u64>,
    waiting: HashSet<u64>,
}

impl Unread {
    fn push(&mut self, token: Token) {
        if self.waiting.insert(token.pack()) {
            self.queue.push_back(token.pack());
        }
    }

    fn pop(&mut self) -> Option<u64> {
        let token = self.queue.pop_front()?;
        self.waiting.remove(&token);
        Some(token)
    }
}

/// What the modules of the protocols share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) spec: StackSpec,
    rules: Rules,
    routes: Routes,
    pub(crate) tap: Tap,
    epoll: Epoll,
    pub(crate) timers: Timers,
    pub(crate) stats: Arc<Counters>,
    pub(crate) budget: Budget,
    pub(crate) random: Random,
    /// The names by which the guest knows addresses.
    pub(crate) pins: Pins,
    suspension: Suspension,
    /// How often it was noticed that the host had been suspended.
    pub(crate) suspensions: u64,
    /// Buffer for datagrams of the host's side.
    pub(crate) datagram: Box<[u8]>,
    /// Datagram sockets with more to read than could be taken: there was no room in the TAP, or others had to get their
    /// turn.
    unread: Unread,
    /// A descriptor was closed, so listeners that were starved of them may go on.
    pub(crate) descriptor_freed: bool,
    /// When this turn began to do things.
    pub(crate) now: Instant,
    refusals: Refusals,
    /// TCP connections that are joined to a socket inside, and the others.
    pub(crate) joined: usize,
    pub(crate) tcp_flows: usize,
    /// What may still go from the guest to the world, and the other way.
    pub(crate) sent: Bucket,
    pub(crate) received: Bucket,
    at: At,
    /// What a test wants to fail.
    #[cfg(test)]
    pub(crate) trap: Option<fn(At) -> bool>,
}

impl Shared {
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

    /// Says how many TCP connections there are.
    pub(crate) fn count_tcp(&self) {
        self.stats.tcp_flows.set(self.tcp_flows + self.joined);
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
            let mut embedded = policy::embedded_v4(remote.ip).map(|ip| self.routes.kind_of(ip.into()));
            embedded.find(|kind| *kind != RouteKind::Remote).unwrap_or_else(|| self.routes.kind_of(remote.ip))
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

/// The stack, without its thread.
#[derive(Debug)]
pub(crate) struct Engine {
    sh: Shared,
    tcp: Tcp,
    join: Join,
    udp: Udp,
    icmp: Icmp,
    dns: Dns,
    forward: Forward,
    reassembly: Reassembly,
    commands: Commands,
    /// Where frames are read into.
    buffer: Box<[u8]>,
    /// What the TAP is watched for.
    watching: EpollFlags,
    /// There may be more frames than one turn takes.
    more_frames: bool,
    /// Flows have more to do than one turn takes.
    more_work: bool,
    /// It ends because it cannot go on.
    broken: bool,
    /// Who waits until the guest's last data has been passed on, and whether a whole turn has looked for it.
    drained: Option<(bool, PipeWriter)>,
    /// The guest was ended, and its last data is not waited for.
    cut: bool,
}

/// How a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    Goes,
    /// Asked to stop, or the TAP is gone.
    Ends,
}

impl Engine {
    pub(crate) fn new(
        tap: OwnedFd,
        spec: &StackSpec,
        mut published: Published,
        segmentation: Segmentation,
        now: Instant,
    ) -> nix::Result<(Self, Control)> {
        let stats = Arc::<Counters>::default();
        let (control, commands) = control::commands(Arc::clone(&stats))?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let mut sh = Shared {
            spec: spec.clone(),
            rules: Rules::new(spec),
            routes: Routes::default(),
            tap: Tap::new(tap, spec, segmentation, Arc::clone(&stats)),
            epoll,
            timers: Timers::default(),
            stats,
            budget: forward::budget_for(&published, spec.outbound),
            random: Random::default(),
            pins: Pins::default(),
            suspension: Suspension::new(),
            suspensions: 0,
            datagram: device::frame_buffer(),
            unread: Unread::default(),
            descriptor_freed: false,
            now,
            refusals: Refusals::new(now),
            joined: 0,
            tcp_flows: 0,
            sent: Bucket::new(spec.rates.sent, now),
            received: Bucket::new(spec.rates.received, now),
            at: At::Housekeeping,
            #[cfg(test)]
            trap: None,
        };
        sh.watch(sh.tap.as_fd(), Token::Tap, EpollFlags::EPOLLIN)?;
        sh.watch(commands.as_fd(), Token::Command, EpollFlags::EPOLLIN)?;
        let join = Join::new(&mut sh, published.inside.take())?;
        let forward = Forward::new(&mut sh, published)?;
        let engine = Self {
            tcp: Tcp::new(&mut sh, now),
            join,
            udp: Udp::default(),
            icmp: Icmp::default(),
            dns: Dns::new(&mut sh, now),
            forward,
            reassembly: Reassembly::default(),
            commands,
            buffer: device::frame_buffer(),
            watching: EpollFlags::EPOLLIN,
            more_frames: false,
            more_work: false,
            broken: false,
            drained: None,
            cut: false,
            sh,
        };
        Ok((engine, control))
    }

    /// Runs the commands that wait ([`crate::control`]).
    fn obey(&mut self, now: Instant) -> Turn {
        while let Some(command) = self.commands.next() {
            self.sh.begin(At::Command);
            if command(self, now) == Turn::Ends {
                return Turn::Ends;
            }
        }
        Turn::Goes
    }

    /// See [`Control::set_policy`].
    pub(crate) fn set_policy(&mut self, policy: PolicySpec) {
        let wanted_names = self.sh.want_names();
        self.sh.spec.policy = policy;
        self.sh.rules = Rules::new(&self.sh.spec);
        if self.sh.want_names() && !wanted_names {
            // What is kept need not have been pinned until now.
            self.dns.forget();
        }
        self.tcp.review(&mut self.sh);
        self.udp.review(&mut self.sh);
        self.icmp.review(&mut self.sh);
    }

    /// See [`Control::policy`].
    pub(crate) fn policy(&self) -> PolicySpec {
        self.sh.spec.policy.clone()
    }

    /// See [`Control::set_rates`].
    pub(crate) fn set_rates(&mut self, now: Instant, rates: Rates) {
        let held = std::mem::replace(&mut self.sh.spec.rates, rates);
        // A way whose rate stays has no new burst, and its debt is not forgotten.
        if rates.sent != held.sent {
            self.sh.sent = Bucket::new(rates.sent, now);
        }
        if rates.received != held.received {
            self.sh.received = Bucket::new(rates.received, now);
        }
    }

    /// See [`Control::rates`].
    pub(crate) fn rates(&self) -> Rates {
        self.sh.spec.rates
    }

    /// Tells of the end of every flow that is still there.
    fn tell_the_rest(&self, reason: &'static str) {
        if self.sh.spec.flow_log.is_some() {
            self.each_flow(&mut |transport, inbound, key, account| {
                self.sh.tell(transport, inbound, key, account.closed(self.sh.now, reason));
            });
        }
    }

    fn each_flow(&self, each: &mut EachFlow<'_>) {
        self.tcp.each_flow(each);
        self.join.each_flow(each);
        self.udp.each_flow(each);
        self.icmp.each_flow(each);
    }

    /// See [`Control::flows_after`].
    pub(crate) fn flows(&self, skip: usize, most: usize) -> Vec<FlowState> {
        let mut flows = Vec::new();
        let mut skipped = 0;
        self.each_flow(&mut |transport, inbound, key, account| {
            if skipped < skip {
                skipped += 1;
            } else if flows.len() < most {
                flows.push(FlowState {
                    transport,
                    inbound,
                    guest: key.guest.into(),
                    remote: key.remote.into(),
                    name: self.sh.pins.names(self.sh.now, key.remote.ip).next().map(String::from),
                    sent: account.sent,
                    received: account.received,
                    lasted: account.lasted(self.sh.now),
                });
            }
        });
        flows
    }

    /// See [`Control::publish`].
    pub(crate) fn publish(&mut self, port: BoundPort) -> Result<PublishedPort, Error> {
        self.forward.add(&mut self.sh, port)
    }

    /// See [`Control::publish_all`].
    pub(crate) fn check_room_for(&self, ports: &[Publish]) -> Result<(), Error> {
        self.forward.check_room_for(&self.sh, ports)
    }

    /// See [`Control::publish_all`].
    pub(crate) fn publish_all(&mut self, ports: Published) -> Result<Vec<PublishedPort>, Error> {
        let mut done: Vec<PublishedPort> = Vec::new();
        for port in ports.into_ports() {
            match self.publish(port) {
                Ok(port) => done.push(port),
                Err(error) => {
                    for port in done {
                        self.unpublish(port.id);
                    }
                    return Err(error);
                }
            }
        }
        Ok(done)
    }

    /// See [`Control::unpublish`].
    pub(crate) fn unpublish(&mut self, port: PortId) -> Option<PublishedPort> {
        self.forward.remove(&mut self.sh, &mut self.udp, port)
    }

    /// See [`Control::published`].
    pub(crate) fn published(&self) -> Vec<PublishedPort> {
        self.forward.list()
    }

    /// Time until the next timer; `None`: until something happens.
    fn patience(&self, now: Instant) -> Option<Duration> {
        let frames = self.more_frames && !self.sh.sent.is_in_debt();
        let unread = !self.sh.unread.queue.is_empty() && !self.sh.received.is_dry();
        let more = frames || self.more_work || unread;
        if self.forward.is_eager() || self.join.has_work() || more && !self.sh.tap.is_blocked() {
            return Some(Duration::ZERO);
        }
        self.sh.timers.next_at().map(|at| if at > now { at - now } else { Duration::ZERO })
    }

    /// One turn: waits for `clock`'s next timer or an event, and does what there is to do.
    pub(crate) fn turn(&mut self, clock: &mut impl FnMut() -> Instant, most: Option<Duration>) -> Turn {
        let patience = match (self.patience(clock()), most) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        let timeout = match patience {
            None => EpollTimeout::NONE,
            // Rounded up: a timer that fires a little early would be set again at once, over and over.
            Some(patience) => {
                let millis = i32::try_from(patience.total_micros().div_ceil(1000)).unwrap_or(i32::MAX);
                EpollTimeout::try_from(millis).unwrap_or(EpollTimeout::ZERO)
            }
        };
        let mut events = [EpollEvent::empty(); TURN_EVENTS];
        let count = match self.sh.epoll.wait(&mut events, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => {
                tracing::error!(%errno, "the network stack cannot wait for events; it ends");
                self.broken = true;
                return Turn::Ends;
            }
        };
        let now = clock();
        self.sh.now = now;
        self.sh.begin(At::Housekeeping);
        self.sh.sent.fill(now);
        self.sh.received.fill(now);
        let mut frames = self.more_frames;
        let mut obeyed = Turn::Goes;
        // As many as wait now: who is not done comes again the next turn.
        for _ in 0..self.sh.unread.queue.len() {
            if self.sh.tap.is_blocked() || self.sh.received.is_dry() {
                break;
            }
            if let Some(token) = self.sh.unread.pop().and_then(Token::unpack) {
                self.sh.begin(At::Event(token));
                self.datagrams(now, token, EpollFlags::EPOLLIN | EpollFlags::EPOLLERR);
            }
        }
        for event in events.iter().take(count) {
            let flags = event.events();
            let token = Token::unpack(event.data());
            if let Some(token) = token {
                self.sh.begin(At::Event(token));
            }
            match token {
                Some(Token::Tap) => {
                    if flags.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP) {
                        tracing::debug!("the TAP is gone");
                        return Turn::Ends;
                    }
                    frames |= flags.contains(EpollFlags::EPOLLIN);
                    if flags.contains(EpollFlags::EPOLLOUT) {
                        self.sh.tap.flush();
                        self.more_work = true;
                    }
                }
                Some(Token::Command) => obeyed = self.obey(now),
                Some(Token::Tcp(id)) => self.tcp.host_event(&mut self.sh, now, id, flags),
                Some(Token::Dns(id)) => self.dns.host_event(&mut self.sh, now, id),
                Some(Token::TcpListener(id)) => self.accept(now, id),
                Some(Token::Near(id)) => self.join.near_event(id, flags),
                Some(Token::Inner(id)) => {
                    self.join.inner_event(&mut self.sh, now, &mut self.tcp, id, flags);
                }
                Some(Token::Inside) => self.join.sockets(&mut self.sh, now, &mut self.tcp),
                Some(token) => self.datagrams(now, token, flags),
                None => {}
            }
        }
        if obeyed == Turn::Ends {
            return Turn::Ends;
        }
        for id in self.forward.take_eager() {
            self.accept(now, id);
        }
        if frames && self.read_frames(now) == Turn::Ends {
            return Turn::Ends;
        }
        self.fire_timers(now);
        self.sh.begin(At::Housekeeping);
        self.tcp.resume(&self.sh);
        self.join.run(&mut self.sh);
        // A query may be answered at once, and the answer let its flow take the next query: thousands may wait.
        let mut queries_left = TURN_QUERIES;
        loop {
            self.more_work = self.tcp.run(&mut self.sh, now);
            let queries = std::mem::take(&mut self.tcp.dns_queries);
            for query in &queries {
                self.dns.query(&mut self.sh, now, Origin::Tcp(query.flow), &query.message);
            }
            if !self.deliver_answers() {
                break;
            }
            queries_left = queries_left.saturating_sub(queries.len());
            if queries_left == 0 {
                self.more_work = true;
                break;
            }
        }
        if std::mem::take(&mut self.sh.descriptor_freed) {
            let starved = self.forward.take_starved();
            self.more_work |= !starved.is_empty();
            for id in starved {
                self.accept(now, id);
            }
        }
        self.sh.tap.end_run();
        self.watch_tap();
        self.await_tokens();
        self.tell_drained();
        Turn::Goes
    }

    /// Lets go of `waiter` when all that the guest has sent has been passed on.
    fn drain(&mut self, waiter: PipeWriter) {
        self.drained = Some((false, waiter));
    }

    fn tell_drained(&mut self) {
        let Some((looked, _)) = &mut self.drained else { return };
        if self.sh.sent.is_in_debt() {
            // No frame is read until that is paid.
            *looked = false;
        } else if !std::mem::replace(looked, true) {
            // Frames may wait that this turn did not know of.
            self.more_work = true;
        } else if !self.more_frames && !self.more_work && !self.tcp.is_owed() && !self.join.is_owed() {
            self.drained = None;
        }
    }

    /// Something that changes while data of the guest's is passed on.
    fn progress(&self) -> u64 {
        let from_guest = self.sh.stats.snapshot().bytes_from_guest;
        let passed_on = self.tcp.passed_on().wrapping_add(self.join.passed_on());
        // Datagrams have gone, and what comes after them waits until they are paid for.
        from_guest.wrapping_add(passed_on).wrapping_sub(self.sh.sent.debt())
    }

    /// Who got a part must not take it for the whole.
    fn end_flows(&mut self) {
        let gave_up = self.drained.take().is_some();
        let gone = gave_up || self.cut;
        let reset = self.tcp.reset_if_owed(gone) + self.join.reset_if_owed(gone);
        if gave_up {
            tracing::warn!(
                connections = reset,
                "the network ended before all that the inside had sent was passed on; these connections were reset"
            );
        }
        self.tell_the_rest("stopped");
    }

    /// Connections wait at a listener.
    fn accept(&mut self, now: Instant, listener: FlowId) {
        self.forward.accept(&mut self.sh, now, listener, &mut self.tcp, &mut self.join);
        if self.forward.is_starved() {
            self.udp.spare(&mut self.sh, now);
        }
    }

    /// A datagram socket has something to say.
    fn datagrams(&mut self, now: Instant, token: Token, flags: EpollFlags) {
        match token {
            Token::Udp(id) => self.udp.host_event(&mut self.sh, now, id, flags),
            Token::Ping(id) => self.icmp.host_event(&mut self.sh, now, id, flags),
            Token::UdpListener(i) => self.forward.receive(&mut self.sh, now, i, &mut self.udp),
            Token::Tap
            | Token::Command
            | Token::Tcp(_)
            | Token::Dns(_)
            | Token::TcpListener(_)
            | Token::Near(_)
            | Token::Inner(_)
            | Token::Inside => {}
        }
    }

    /// Hands the answers out to TCP flows; whether there were any.
    fn deliver_answers(&mut self) -> bool {
        let answers = std::mem::take(&mut self.dns.answers);
        for answer in &answers {
            self.tcp.dns_answer(answer.flow, &answer.message);
        }
        !answers.is_empty()
    }

    /// Watches the TAP for room while frames wait, and only then; for nothing while the guest has sent more than it may.
    fn watch_tap(&mut self) {
        let flags = match (self.sh.tap.is_blocked(), self.sh.sent.is_in_debt()) {
            // Nothing is read meanwhile, so frames of the guest must not wake us.
            (true, _) => EpollFlags::EPOLLOUT,
            (false, true) => EpollFlags::empty(),
            (false, false) => EpollFlags::EPOLLIN,
        };
        if flags != self.watching {
            let mut event = EpollEvent::new(flags, Token::Tap.pack());
            if let Err(errno) = self.sh.epoll.modify(self.sh.tap.as_fd(), &mut event) {
                tracing::error!(%errno, "cannot watch the TAP");
            }
            self.watching = flags;
        }
    }

    /// Sets the timer for whoever waits until more data may go.
    fn await_tokens(&mut self) {
        let [sent, received] = self.tcp.waits_for_tokens();
        let joined = self.join.waits_for_tokens();
        let sent = sent || joined[0] || self.sh.sent.is_in_debt();
        let received = received || joined[1] || !self.sh.unread.queue.is_empty();
        let at = [self.sh.sent.ready_at().filter(|_| sent), self.sh.received.ready_at().filter(|_| received)];
        if let Some(at) = at.into_iter().flatten().min() {
            self.sh.timers.set(at, TimerKey::Rate);
        }
    }

    fn read_frames(&mut self, now: Instant) -> Turn {
        let mut buffer = std::mem::take(&mut self.buffer);
        self.more_frames = true;
        for _ in 0..TURN_FRAMES {
            if self.sh.tap.is_blocked() || self.sh.sent.is_in_debt() {
                break;
            }
            match self.sh.tap.read(&mut buffer) {
                ReadResult::Frame(len) => self.frame(now, buffer.get(..len).unwrap_or_default()),
                ReadResult::Empty => {
                    self.more_frames = false;
                    break;
                }
                ReadResult::Gone => {
                    self.buffer = buffer;
                    return Turn::Ends;
                }
            }
        }
        self.buffer = buffer;
        self.udp.flush(&mut self.sh);
        Turn::Goes
    }

    /// A frame from the guest, its virtio header included.
    fn frame(&mut self, now: Instant, buffer: &[u8]) {
        self.sh.begin(At::Frame);
        let Some(frame) = Tap::frame(buffer) else {
            self.sh.stats.dropped_malformed.one();
            return;
        };
        match ingress::parse_frame(frame.bytes, self.sh.tap.gateway_mac(), frame.checksum_pending) {
            Ok(Inbound::Arp { source_mac, source, target }) => {
                ndp::arp(&mut self.sh, source_mac, source, target);
            }
            Ok(Inbound::Ip(mut packet)) => {
                packet.datagram_size = frame.datagram_size;
                self.packet(now, &packet, ingress::source_mac(frame.bytes));
            }
            Err(Dropped::Malformed) => self.sh.stats.dropped_malformed.one(),
            Err(Dropped::NotForUs) => {}
        }
    }

    fn packet(&mut self, now: Instant, packet: &Packet<'_>, mac: Option<[u8; 6]>) {
        self.sh.begin(At::packet(packet));
        if packet.is_v6() && !self.sh.spec.ipv6 {
            self.sh.stats.dropped_source.one();
            return;
        }
        if packet.dst.is_multicast() || packet.dst == IpAddr::from([255; 4]) {
            if packet.protocol == ICMPV6 && packet.fragment.is_none() {
                return ndp::neighbour(&mut self.sh, now, packet, mac);
            }
            if dhcp::ingress(&mut self.sh, packet, mac) {
                return;
            }
            return self.group(packet);
        }
        if !self.sh.is_guest(packet.src) {
            // Link-local neighbours ask about us by unicast, too, to see whether we still are there.
            if packet.protocol == ICMPV6 && packet.fragment.is_none() {
                return ndp::neighbour(&mut self.sh, now, packet, mac);
            }
            if dhcp::ingress(&mut self.sh, packet, mac) {
                return;
            }
            self.sh.stats.dropped_source.one();
            return;
        }
        if let Some(mac) = mac {
            self.sh.tap.learn_guest_mac(mac);
        }
        let Some(piece) = packet.fragment else { return self.datagram(now, packet) };
        match self.reassembly.add(now, packet, piece) {
            Ok(Some(whole)) => match ingress::parse_ip(&whole, false) {
                Ok(whole) if whole.fragment.is_none() => self.datagram(now, &whole),
                _ => self.sh.stats.dropped_malformed.one(),
            },
            Ok(None) => self.sh.timers.set(now + REASSEMBLY, TimerKey::Reassembly),
            Err(()) => self.sh.stats.dropped_malformed.one(),
        }
    }

    /// A packet for many receivers, none of whom it will reach.
    fn group(&mut self, packet: &Packet<'_>) {
        let later = packet.fragment.is_some_and(|piece| piece.offset != 0);
        match packet.payload() {
            [a, b, c, d, ..] if packet.protocol == UDP && !later => {
                let reason = if packet.dst.is_multicast() { Reason::Multicast } else { Reason::Broadcast };
                let key = FlowKey {
                    guest: Endpoint::new(packet.src, u16::from_be_bytes([*a, *b])),
                    remote: Endpoint::new(packet.dst, u16::from_be_bytes([*c, *d])),
                };
                self.sh.refused(Transport::Udp, key, reason);
            }
            // Group management and discovery that every kernel does by itself.
            _ => self.sh.stats.dropped_multicast.one(),
        }
    }

    /// A whole datagram from the guest.
    fn datagram(&mut self, now: Instant, packet: &Packet<'_>) {
        if !ingress::verify_checksum(packet) {
            self.sh.stats.dropped_malformed.one();
            return;
        }
        match (packet.protocol, packet.is_v6()) {
            (TCP, _) if self.sh.spec.is_ours(packet.dst) || !self.expired(packet) => {
                // What begins a connection needs a descriptor.
                let begins = packet.payload().get(13).is_some_and(|flags| flags & 0x12 == 0x02);
                if begins && self.sh.budget.is_short() {
                    self.join.spare(&mut self.sh);
                    self.udp.spare(&mut self.sh, now);
                }
                self.tcp.ingress(&mut self.sh, now, packet);
            }
            (TCP, _) => {}
            (UDP, _) => self.udp_datagram(now, packet),
            (ICMP, false) | (ICMPV6, true) => {
                if let Some(key) = ingress::refused_datagram(packet) {
                    return self.udp.refused(&mut self.sh, now, key);
                }
                if packet.is_v6() {
                    ndp::neighbour(&mut self.sh, now, packet, None);
                }
                self.icmp.ingress(&mut self.sh, now, packet);
            }
            // Protocols that a host socket cannot carry.
            _ => {
                self.sh.stats.refused_by_policy.one();
                crate::udp::unreachable(&mut self.sh, packet, emit::Unreachable::Prohibited);
            }
        }
    }

    /// Whether a packet has no hop left for the way beyond the gateway, which then says so.
    fn expired(&mut self, packet: &Packet<'_>) -> bool {
        let expired = packet.hop_limit <= 1;
        if expired {
            crate::udp::hops_exceeded(&mut self.sh, packet);
        }
        expired
    }

    fn udp_datagram(&mut self, now: Instant, packet: &Packet<'_>) {
        // Each of them is a call of the host's kernel, or an answer.
        if packet.datagram_size.is_some_and(|size| packet.payload().len() > 8 + size * MAX_SUPER_SEGMENT) {
            return self.sh.stats.dropped_malformed.one();
        }
        if self.sh.spec.gateway.is(packet.dst) && dhcp::ingress(&mut self.sh, packet, None) {
            return;
        }
        if self.sh.spec.is_resolver(packet.dst)
            && let Ok(datagram) = UdpPacket::new_checked(packet.payload())
            && datagram.dst_port() == DNS_PORT
            && datagram.src_port() != 0
        {
            let guest = Endpoint::new(packet.src, datagram.src_port());
            let gateway = Endpoint::new(packet.dst, DNS_PORT);
            let origin = Origin::Udp { guest, gateway };
            for query in datagram.payload().chunks(packet.datagram_size.unwrap_or(usize::MAX)) {
                self.dns.query(&mut self.sh, now, origin, query);
            }
            return;
        }
        if self.expired(packet) {
            return;
        }
        self.udp.ingress(&mut self.sh, now, packet, &self.forward);
    }

    fn fire_timers(&mut self, now: Instant) {
        while let Some(key) = self.sh.timers.pop_due(now) {
            self.sh.begin(At::Timer(key));
            match key {
                TimerKey::Tcp(id) => self.tcp.timer(id),
                TimerKey::Udp => self.udp.timer(&mut self.sh, now),
                TimerKey::Ping => self.icmp.timer(&mut self.sh, now),
                TimerKey::Dns(id) => self.dns.timer(&mut self.sh, now, id),
                // It has brought us here: buckets are filled each turn.
                TimerKey::Rate => {}
                TimerKey::Join => self.join.timer(&mut self.sh, now, &mut self.tcp),
                TimerKey::Accept => self.sh.descriptor_freed = true,
                TimerKey::Router => ndp::advertise_router(&mut self.sh, now, ndp::ALL_NODES),
                TimerKey::Reassembly => {
                    if let Some(at) = self.reassembly.expire(now) {
                        self.sh.timers.set(at, TimerKey::Reassembly);
                    }
                }
            }
        }
        self.deliver_answers();
    }
}

/// What a stack is for: turns until the end; whether that was a good one. A defect ends the network, and nothing else.
pub(crate) fn live(mut engine: Engine, mut clock: impl FnMut() -> Instant) -> bool {
    let turns = AssertUnwindSafe(|| {
        while engine.turn(&mut clock, None) == Turn::Goes {}
        engine.end_flows();
    });
    let Err(panic) = catch_unwind(turns) else {
        let good = !engine.broken;
        return release(engine) && good;
    };
    // Tables may contradict each other now. That is no reason not to say what happened.
    let what = catch_unwind(AssertUnwindSafe(|| engine.name(engine.sh.at)));
    tracing::error!(
        at = what.unwrap_or_default(),
        panic = defect::message(&*panic),
        "the network stack failed (this is a defect): the sandbox has no network from here on"
    );
    let rest = AssertUnwindSafe(|| {
        engine.tcp.reset_on_close();
        engine.join.reset_on_close();
        engine.tell_the_rest("failed");
    });
    // The message above says it.
    drop(catch_unwind(rest));
    release(engine);
    false
}

/// Drops the engine; whether that went well. A panic on the way must not keep the caller from hearing how the stack ended.
fn release(engine: Engine) -> bool {
    let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(engine))) else { return true };
    tracing::error!(
        panic = defect::message(&*panic),
        "the network stack failed at its end (this is a defect)"
    );
    false
}

impl Engine {
    /// What the stack was at, for the log.
    fn name(&self, at: At) -> String {
        let tcp = |key| match key {
            Some(FlowKey { guest, remote }) => {
                format!("TCP connection between {} and {}", SocketAddr::from(guest), SocketAddr::from(remote))
            }
            None => "TCP connection that is gone".into(),
        };
        let from = |name: &str, guest: Option<Endpoint>| match guest {
            Some(guest) => format!("{name} of {}", SocketAddr::from(guest)),
            None => format!("{name} that are gone"),
        };
        match at {
            At::Housekeeping => "no flow in particular".into(),
            At::Command => "a command".into(),
            At::Frame => "a frame from inside".into(),
            At::Packet(packet) => packet.to_string(),
            At::Flow(id) | At::Event(Token::Tcp(id)) | At::Timer(TimerKey::Tcp(id)) => tcp(self.tcp.key(id)),
            At::Event(Token::Near(id) | Token::Inner(id)) => tcp(self.join.key(id)),
            At::Event(Token::Udp(id)) => from("datagrams", self.udp.guest(id)),
            At::Event(Token::Ping(id)) => from("echo requests", self.icmp.guest(id)),
            At::Event(Token::Dns(_)) | At::Timer(TimerKey::Dns(_)) => "a question to a resolver".into(),
            At::Event(Token::TcpListener(_) | Token::UdpListener(_)) => "a published port".into(),
            At::Event(Token::Tap | Token::Command | Token::Inside) => "an event".into(),
            At::Timer(_) => "a timer of no flow in particular".into(),
        }
    }
}

/// What only tests look at.
#[cfg(test)]
impl Engine {
    /// Has the engine fail when it begins what `trap` says.
    pub(crate) fn set_trap(&mut self, trap: fn(At) -> bool) {
        self.sh.trap = Some(trap);
    }

    pub(crate) fn budget(&mut self) -> &mut Budget {
        &mut self.sh.budget
    }

    pub(crate) fn stats(&self) -> Stats {
        self.sh.stats.snapshot()
    }

    /// Whether nothing but a timer would wake the engine now.
    pub(crate) fn is_quiet(&self, now: Instant) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let mut fds = [PollFd::new(self.sh.epoll.0.as_fd(), PollFlags::POLLIN)];
        self.patience(now) != Some(Duration::ZERO) && poll(&mut fds, PollTimeout::ZERO) == Ok(0)
    }

    /// Has epoll tell again of every connection's socket that is ready.
    pub(crate) fn tell_again(&self) {
        self.tcp.each_host(|fd, id, flags| {
            let mut event = EpollEvent::new(flags, Token::Tcp(id).pack());
            self.sh.epoll.modify(fd, &mut event).expect("a watched socket");
        });
    }

    /// What keeps the engine from resting, for whoever has to find out.
    pub(crate) fn restless(&self, now: Instant) -> String {
        let mut events = [EpollEvent::empty(); 16];
        let count = self.sh.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
        let events: Vec<_> =
            events.iter().take(count).map(|event| (Token::unpack(event.data()), event.events())).collect();
        let Self { more_frames, more_work, .. } = self;
        let unread = self.sh.unread.queue.len();
        format!(
            "{events:?}, frames {more_frames}, work {more_work}, unread {unread}, patience {:?}",
            self.patience(now)
        )
    }

    pub(crate) fn is_blocked(&self) -> bool {
        self.sh.tap.is_blocked()
    }

    pub(crate) fn open_queries(&self) -> usize {
        self.dns.under_way()
    }

    /// Has the resolvers, which a test has on its loopback, taken for distant ones.
    pub(crate) fn take_resolvers_for_distant(&mut self) {
        self.dns.take_for_distant();
    }

    /// As if the host had been suspended for so long.
    pub(crate) fn pretend_suspension(&mut self, slept: Duration) {
        self.sh.suspension.pretended += slept;
    }

    pub(crate) fn names_of(&self, now: Instant, ip: IpAddr) -> Vec<String> {
        self.sh.pins.names(now, ip).map(String::from).collect()
    }

    /// Descriptors of the host's side that are open.
    pub(crate) fn descriptors(&self) -> usize {
        self.sh.budget.used()
    }

    pub(crate) fn timers(&self) -> usize {
        self.sh.timers.len()
    }

    pub(crate) fn held_bytes(&self) -> usize {
        self.tcp.held_bytes()
    }

    pub(crate) fn dns_bytes(&self) -> usize {
        self.tcp.dns_bytes()
    }

    /// Every table within its bound, and agreeing with the others.
    pub(crate) fn check_bounds(&self) {
        self.tcp.check_bounds();
        self.join.check_bounds();
        self.udp.check_bounds();
        self.icmp.check_bounds();
        self.dns.check_bounds();
        self.sh.pins.check_bounds();
        self.reassembly.check_bounds();
        self.sh.tap.check_bounds();
        let flows = self.sh.stats.snapshot().tcp_flows + u64::try_from(self.dns.under_way()).unwrap_or(0);
        assert!(u64::try_from(self.sh.timers.len()).is_ok_and(|timers| timers <= flows + 7));
    }
}

/// A running stack: one thread.
#[derive(Debug)]
pub struct Stack {
    thread: Option<JoinHandle<()>>,
    control: Control,
    /// Ends when the thread does.
    ended: PipeReader,
    /// It has ended, and not because it should.
    failed: Arc<AtomicBool>,
}

/// The monotonic clock, with an arbitrary beginning.
///
/// It stands still while the host is suspended, as do the clocks that the guest's kernel and epoll count by. That is
/// right for everything that is timed here: a guest that slept owes us no acknowledgement from that time, and no flow
/// was idle because nobody was awake. What grows old in the world meanwhile is asked for anew in any case (the list of
/// resolvers and the host's addresses are never older than some seconds of this clock), or looks at another clock, too
/// ([`Suspension`]: answers of resolvers).
fn clock() -> impl FnMut() -> Instant {
    let start = std::time::Instant::now();
    move || {
        let micros = i64::try_from(start.elapsed().as_micros()).unwrap_or(i64::MAX);
        // Not from zero: smoltcp takes zero for "long ago".
        Instant::from_micros(micros.saturating_add(1_000_000))
    }
}

impl Stack {
    /// Starts the stack's thread on `tap`, which came from [`open_tap`](crate::open_tap), in whatever network
    /// namespace. The flows' other ends are sockets of the calling thread's network namespace.
    ///
    /// Nothing is read, resolved or connected before the guest's first frame asks for it.
    ///
    /// # Errors
    ///
    /// If the MTU is too small, `tap` is none, or a descriptor or the thread cannot be made.
    pub fn start(tap: OwnedFd, spec: &StackSpec, published: Published) -> Result<Self, Error> {
        if spec.mtu < spec.least_mtu() {
            return Err(Error::SmallMtu { mtu: spec.mtu, least: spec.least_mtu() });
        }
        if !sys::is_vnet_tap(tap.as_fd()) {
            return Err(Error::NotATap);
        }
        let failed = |what| move |errno: Errno| Error::Start { what, source: errno.into() };
        sys::set_vnet_header_len(tap.as_fd()).map_err(failed("virtio header"))?;
        let segmentation = sys::set_offload(tap.as_fd())
            .inspect_err(
                |errno| tracing::warn!(%errno, "the TAP takes no super-segments: the network will be slower"),
            )
            .unwrap_or(Segmentation::None);
        host::nonblocking(tap.as_fd()).map_err(failed("non-blocking TAP"))?;
        let mut clock = clock();
        let (engine, control) =
            Engine::new(tap, spec, published, segmentation, clock()).map_err(failed("event loop"))?;
        let (ended, alive) =
            std::io::pipe().map_err(|source| Error::Start { what: "pipe of its end", source })?;
        let failed_late = Arc::<AtomicBool>::default();
        let of_thread = Arc::clone(&failed_late);
        let body = move || {
            let _alive = alive;
            // Signals are the business of the process's main thread.
            let _ = nix::sys::signal::SigSet::all().thread_block();
            if !live(engine, clock) {
                of_thread.store(true, Ordering::Relaxed);
            }
        };
        let thread = std::thread::Builder::new()
            .name("netstack".into())
            .spawn(body)
            .map_err(|source| Error::Start { what: "thread", source })?;
        Ok(Self { thread: Some(thread), control, ended, failed: failed_late })
    }

    /// What the stack has done so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.control.stats()
    }

    /// For commands while it runs.
    #[must_use]
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// A descriptor that hangs up (poll(2), POLLHUP) when the stack's thread has ended.
    #[must_use]
    pub fn end_event(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    /// Whether the stack's thread still runs. It ends by itself when the TAP's network namespace is gone.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Whether the stack has ended for another reason than that: a defect, or the kernel let it wait for nothing any more.
    /// The log has the reason.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// Waits until what the guest has sent has been passed on, datagrams and connections with their ends, as the guest's
    /// kernel sends it when the last program is gone. Not longer than data goes, and a second; ten seconds in all; and not
    /// longer than until `interrupt` can be read. Where some is left then, the connection ends with a reset.
    pub fn drain(&self, interrupt: Option<BorrowedFd<'_>>) {
        let until = std::time::Instant::now() + LAST_DATA_MOST;
        let progress = || self.control.ask_within(LAST_DATA_QUIET, |engine| engine.progress());
        let begin = || {
            // Nothing is sent: the other end goes, with the engine if it must be.
            let (drained, waiter) = std::io::pipe().ok()?;
            self.control.tell(move |engine| engine.drain(waiter)).ok()?;
            Some((drained, progress()?))
        };
        let Some((drained, mut seen)) = begin() else { return };
        while !ready_within(drained.as_fd(), interrupt, LAST_DATA_QUIET) {
            match progress() {
                Some(now) if now != seen && std::time::Instant::now() < until => seen = now,
                _ => return,
            }
        }
    }

    /// Has every connection whose end the guest has not sent, or the stack not passed on, end with a reset when the stack
    /// does: the guest's programs were ended in the midst of what they did.
    pub fn cut(&self) {
        // It cannot be told only if it has ended.
        let _ = self.control.tell(|engine| engine.cut = true);
    }

    /// Ends the thread and closes every flow. Dropping the stack does the same. A thread that a system call holds up for
    /// seconds is left to end by itself.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        self.control.stop();
        let Some(thread) = self.thread.take() else { return };
        if end_within(&self.ended, STOP_PATIENCE) {
            let _ = thread.join();
        } else {
            tracing::error!("the network stack does not end: its thread is left behind");
        }
    }
}

/// Whether the thread that holds the other end is gone within `patience`.
fn end_within(ended: &PipeReader, patience: std::time::Duration) -> bool {
    ready_within(ended.as_fd(), None, patience)
}

/// Whether something is to be had from one of them within `patience`.
fn ready_within(fd: BorrowedFd<'_>, other: Option<BorrowedFd<'_>>, patience: std::time::Duration) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let until = std::time::Instant::now() + patience;
    let mut fds: Vec<PollFd<'_>> =
        std::iter::once(fd).chain(other).map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    loop {
        let left = until.saturating_duration_since(std::time::Instant::now());
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, left) {
            Err(Errno::EINTR) => {}
            ready => return ready != Ok(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_that_is_too_small_is_refused() {
        for (ipv6, mtu) in [(true, 1279), (false, 575)] {
            let spec = StackSpec { ipv6, mtu, ..crate::config::tests::spec() };
            let (_, no_tap) = std::io::pipe().expect("pipe");
            let started = Stack::start(no_tap.into(), &spec, Published::default());
            assert!(
                matches!(started, Err(Error::SmallMtu { mtu: of, least }) if of == mtu && least == mtu + 1)
            );
        }
    }

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
    fn a_thread_that_does_not_end_is_not_waited_for_without_end() {
        let (ended, alive) = std::io::pipe().expect("pipe");
        assert!(!end_within(&ended, std::time::Duration::ZERO));
        drop(alive);
        assert!(end_within(&ended, STOP_PATIENCE));
    }

    #[test]
    fn last_data_is_not_waited_for_when_the_thread_does_not_answer() {
        let (ended, _alive) = std::io::pipe().expect("pipe");
        let (control, _unread) = control::commands(Arc::default()).expect("queue");
        let stack = Stack { thread: None, control, ended, failed: Arc::default() };
        let (over, waited) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            stack.drain(None);
            over.send(())
        });
        assert_eq!(waited.recv_timeout(LAST_DATA_MOST), Ok(()));
    }

    #[test]
    fn random_numbers_differ() {
        let mut random = Random::default();
        assert_ne!(random.next(), random.next());
        assert_ne!(Random::default().next(), Random::default().next());
    }
}
