//! Connections to published ports from the host's own loopback, without a TCP of ours in between.
//!
//! Nothing about them has to be seen by the stack: both ends are sockets of the same kernel. So the connection that was
//! accepted is joined to a socket of the guest's namespace ([`crate::inside`]), connected to the server there, and data
//! goes from one to the other. What is left to do is what a relay does: pass on data, ends and failures, both ways.
//!
//! ```text
//! client (loopback) ══ near | Way to the guest:  recv, send; or splice through a pipe | inner ══ server in the guest
//! ```
//!
//! The server sees a connection from the guest's own address to the guest's own address: the one address that leads back
//! by itself. It is not loopback: a service that trusts its loopback is not meant to be reached from elsewhere, and what
//! listens there only is not reached (nor is it otherwise).
//! A service that trusts the addresses of its own machine, or asks who owns the other end's socket, takes it for local,
//! though: docs/networking.md says so.
//!
//! States of a flow:
//!
//! - `Waiting`: for a socket of the guest's namespace, [`INSIDE_SOCKET`] at most.
//! - `Connecting`: to the server's IPv4 address, and if that is refused, to the IPv6 one.
//! - `Open`: data flows, until both ends have been passed on or one side is broken.
//!
//! Whatever goes wrong on our side before the server has answered (there is no socket, or no port for it) is no failure of
//! the connection's: nothing of it has been read yet, so it goes the way of all others ([`Tcp::inbound`]). So it does if the
//! guest has not the address that it is expected to have, and if both addresses refuse: the guest's kernel may lead what
//! comes by the link to somebody else, as one that forwards for others does.
//!
//! Data. Little at a time is copied: `recv`, `send`. Whoever fills [`CHUNK`] at once gets a pipe through which the kernel
//! hands on pages. A flow has a pipe only while something is in it, and there are [`MAX_PIPES`] at most, beyond which is
//! copied. What the receiver does not take waits in the pipe, or in a buffer of [`CHUNK`]; then nothing more is read.

use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl};
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{MsgFlags, Shutdown, SockaddrStorage, getsockname};
use smoltcp::time::Instant;

use crate::calls::{connect, pipe2, recv, send, shutdown, splice};
use crate::config::{
    HALF_OPEN_SPARE, INBOUND_CONNECT, INSIDE_LATE, INSIDE_PAUSE, INSIDE_SOCKET, JOIN_PIPE, MAX_PIPES,
};
use crate::defect::At;
use crate::flow::{Endpoint, FlowId, FlowKey, TimerKey, enqueue};
use crate::flowlog::{Account, Traffic};
use crate::flows::{Entry, Flows, TcpFlow};
use crate::host::{self, HostFd, Room};
use crate::inside::{Family, InsideSockets};
use crate::shared::{Shared, Token};
use crate::side::{Side, WATCHED, retry};
use crate::sys;
use crate::tcp::Tcp;
use crate::udp;

/// Bytes that are copied at once, and so the most that a flow keeps of each way without a pipe.
pub(crate) const CHUNK: usize = 16 * 1024;
/// Bytes moved one way of a flow before the others get their turn.
const TURN_BUDGET: usize = 1024 * 1024;
/// Sockets that are asked for at once: answers beyond that would not fit into the queue.
const MAX_ASKED: usize = 64;
/// Empty pipes that are kept for the next.
const POOL: usize = 4;

/// Both ends of a pipe.
#[derive(Debug)]
struct Pipe {
    out: HostFd,
    into: HostFd,
}

/// Data on its way from one side to the other.
#[derive(Debug, Default)]
struct Way {
    /// Has something in it.
    pipe: Option<Pipe>,
    in_pipe: usize,
    /// What was copied, and the receiver has not taken yet: from `taken` on.
    rest: Vec<u8>,
    taken: usize,
    /// Much came at once the last time.
    bulk: bool,
}

impl Way {
    fn is_empty(&self) -> bool {
        self.in_pipe == 0 && self.taken == self.rest.len()
    }
}

#[derive(Debug)]
enum Phase {
    /// For a socket; a descriptor is kept for it.
    Waiting(#[expect(dead_code, reason = "it counts while it lives")] Room),
    Connecting,
    Open,
}

#[derive(Debug)]
pub(crate) struct Joined {
    entry: Entry,
    /// The client, on the host's loopback.
    near: Side,
    /// In the guest's namespace.
    inner: Option<Side>,
    phase: Phase,
    /// When that is given up, unless it is open.
    until: Instant,
    /// The two places of the server, as they would be seen if the flow went the way of all others.
    ways: [FlowKey; 2],
    /// Which of them it is at.
    way: usize,
    /// From the guest, and to it.
    traffic: [Way; 2],
}

impl TcpFlow for Joined {
    fn entry(&self) -> &Entry {
        &self.entry
    }

    fn entry_mut(&mut self) -> &mut Entry {
        &mut self.entry
    }

    fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        std::iter::once(&self.near).chain(&self.inner).map(|side| side.fd.as_fd())
    }

    fn owes(&self) -> bool {
        matches!(self.phase, Phase::Open) && !self.near.shut && !self.near.failed
    }

    fn holds_data(&self) -> bool {
        let Some(inner) = &self.inner else { return false };
        let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let unread = |side: &Side| retry(|| recv(side.fd.as_raw_fd(), &mut [0], peek)) == Ok(1);
        !self.traffic.iter().all(Way::is_empty) || unread(inner) || unread(&self.near)
    }

    fn passed_on(&self) -> u64 {
        let [Way { in_pipe, rest, taken, .. }, _] = &self.traffic;
        let held = u64::try_from(in_pipe + rest.len() - taken).unwrap_or(0);
        self.entry.account.sent.bytes.saturating_sub(held)
    }
}

/// Pipes that flows use.
#[derive(Debug, Default)]
struct Pipes {
    free: Vec<Pipe>,
    lent: usize,
}

impl Pipes {
    /// One that is empty, if there may be another.
    fn lend(&mut self, sh: &Shared) -> Option<Pipe> {
        if self.lent >= MAX_PIPES {
            return None;
        }
        let pipe = match self.free.pop() {
            Some(pipe) => pipe,
            None => {
                sh.budget.check_leaving(sh.budget.reserve() + 1).ok()?;
                let (out, into) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).ok()?;
                // Who has many pipes gets small ones.
                let _ = fcntl(&into, FcntlArg::F_SETPIPE_SZ(JOIN_PIPE));
                Pipe { out: sh.budget.hold(out), into: sh.budget.hold(into) }
            }
        };
        self.lent += 1;
        Some(pipe)
    }

    fn give_back(&mut self, pipe: Pipe, is_empty: bool) {
        self.lent -= 1;
        if is_empty && self.free.len() < POOL {
            self.free.push(pipe);
        }
    }
}

/// Why a server was not met where it was looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Missed {
    /// There is none.
    Refused,
    NotAnswered,
}

impl Missed {
    /// As it is told.
    fn reason(self) -> &'static str {
        match self {
            Self::Refused => "refused-inside",
            Self::NotAnswered => "not-answered",
        }
    }
}

/// What may be moved one way now.
#[derive(Debug)]
struct Allowance {
    left: usize,
    /// There is more to move: beyond that, or beyond the turn.
    wanted: bool,
}

/// A socket that was asked for.
#[derive(Debug)]
struct Asked {
    /// When the answer is taken for lost.
    until: Instant,
    flow: FlowId,
    family: Family,
}

/// All joined flows.
#[derive(Debug)]
pub(crate) struct Join {
    inside: Option<InsideSockets>,
    /// Those that have not come: [`MAX_ASKED`] at most.
    asked: VecDeque<Asked>,
    /// Answers in a row that did not come in time, and when the last of them was missed. What was asked for before that
    /// is none of another: many connections may come at once.
    late: u32,
    missed: Option<Instant>,
    /// Nobody is asked until then; then one is, to see whether it answers again, and the others go on not to be until it
    /// does.
    paused: Option<Instant>,
    /// Who is to get the next ones.
    unasked: VecDeque<(FlowId, Family)>,
    pub(crate) flows: Flows<Joined>,
    /// When those that are not open yet are given up.
    deadlines: BTreeSet<(Instant, FlowId)>,
    pipes: Pipes,
}

impl Join {
    pub(crate) fn new(sh: &mut Shared, inside: Option<InsideSockets>) -> nix::Result<Self> {
        if let Some(inside) = &inside {
            sh.watch(inside.as_fd(), Token::Inside, EpollFlags::EPOLLIN)?;
        }
        Ok(Self {
            inside,
            asked: VecDeque::new(),
            late: 0,
            missed: None,
            paused: None,
            unasked: VecDeque::new(),
            flows: Flows::default(),
            deadlines: BTreeSet::new(),
            pipes: Pipes::default(),
        })
    }

    /// Takes a connection over that was accepted from `peer` at a port which leads to `ways`; gives it back if it has to go
    /// the way of all others.
    pub(crate) fn begin(
        &mut self,
        sh: &mut Shared,
        now: Instant,
        fd: HostFd,
        peer: SocketAddr,
        ways: [FlowKey; 2],
    ) -> Result<(), HostFd> {
        let own = ways.iter().all(|way| sh.spec.guest.is(way.guest.ip));
        // A capture is to have its packets. Beyond the limits it is refused there, or needs less.
        if !peer.ip().to_canonical().is_loopback()
            || !own
            || sh.spec.capture.is_some()
            || sh.tcp_flows >= sh.most_tcp_flows
            || sh.budget.check_leaving(sh.budget.reserve()).is_err()
        {
            return Err(fd);
        }
        if !self.asks(now) {
            return Err(fd);
        }
        // Across the TAP it is none of these, so no older one has to give way: the guest could have them all end like that.
        let most = sh.most_half_open();
        if sh.half_open >= most {
            return Err(fd);
        }
        // Half of them at most: each has two descriptors, and the guest's own are not kept out.
        if self.half_open() >= most / 2 && !self.spare(sh) {
            return Err(fd);
        }
        host::tune_tcp(fd.as_fd());
        let flow = Joined {
            entry: Entry::new(ways[0], true, now),
            near: Side::connected(fd),
            inner: None,
            phase: Phase::Waiting(sh.budget.room()),
            until: now,
            ways,
            way: 0,
            traffic: Default::default(),
        };
        let id = self.flows.insert(sh, flow);
        let watched = match self.flows.get(id) {
            Some(flow) => sh.watch(flow.near.fd.as_fd(), Token::Near(id), WATCHED),
            None => Err(Errno::EBADF),
        };
        if watched.is_err()
            && let Some(flow) = self.flows.remove(sh, id)
        {
            return Err(flow.near.fd);
        }
        sh.half_open += 1;
        self.want(sh, now, id);
        Ok(())
    }

    /// Flows that the server inside has not answered yet.
    pub(crate) fn half_open(&self) -> usize {
        self.deadlines.len()
    }

    /// Ends a flow that the server has not answered for long enough, so that another gets its descriptors; whether there was
    /// one.
    pub(crate) fn spare(&mut self, sh: &mut Shared) -> bool {
        let flows = &self.flows;
        let is_old = |id| {
            flows.get(id).is_some_and(|flow| flow.entry.account.lasted(sh.now) >= HALF_OPEN_SPARE.into())
        };
        let Some(&(_, id)) = self.deadlines.iter().find(|(_, id)| is_old(*id)) else { return false };
        sh.stats.evicted.one();
        self.remove(sh, id, Some("evicted"));
        true
    }

    /// Whether sockets are asked for now.
    fn asks(&self, now: Instant) -> bool {
        self.inside.is_some() && self.paused.is_none_or(|until| until <= now)
    }

    /// Wants a socket for a flow, which is to be asked for.
    fn want(&mut self, sh: &mut Shared, now: Instant, id: FlowId) {
        // Only for this one.
        if let Some(until) = &mut self.paused {
            *until = now + INSIDE_PAUSE;
        }
        self.wait_until(sh, id, now + INSIDE_SOCKET);
        let flows = &self.flows;
        let Some(flow) = flows.get(id) else { return };
        let wanted = (id, Family::of(flow.ways[flow.way].guest.ip));
        enqueue(&mut self.unasked, wanted, flows.len(), |(id, _)| flows.get(*id).is_some());
        self.ask(now);
    }

    /// Asks for as many sockets as may be under way.
    fn ask(&mut self, now: Instant) {
        let Some(inside) = &self.inside else { return };
        while self.asked.len() < MAX_ASKED
            && let Some((flow, family)) = self.unasked.pop_front()
        {
            if self.flows.get(flow).is_none() {
                continue;
            }
            // That nobody is there is said when the answers are read. If no answer is to come, which would have it tried
            // again, the queue is full of questions that nobody has read: this one counts as not answered, too.
            if inside.ask(flow, family).is_err() && !self.asked.is_empty() {
                return self.unasked.push_front((flow, family));
            }
            // The timer is set: the flow waits no longer than for this answer.
            self.asked.push_back(Asked { until: now + INSIDE_SOCKET, flow, family });
        }
    }

    fn wait_until(&mut self, sh: &mut Shared, id: FlowId, until: Instant) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        self.deadlines.remove(&(flow.until, id));
        self.deadlines.insert((until, id));
        flow.until = until;
        sh.timers.set(until, TimerKey::Join);
    }

    /// Gives up what has lasted for too long.
    pub(crate) fn timer(&mut self, sh: &mut Shared, now: Instant, tcp: &mut Tcp) {
        while let Some(&(at, id)) = self.deadlines.first()
            && at <= now
        {
            self.deadlines.pop_first();
            match self.flows.get(id).map(|flow| &flow.phase) {
                Some(Phase::Waiting(_)) => {
                    tracing::debug!("no socket inside came in time");
                    self.cross(sh, now, tcp, id);
                }
                Some(Phase::Connecting) => self.try_other(sh, now, tcp, id, Missed::NotAnswered),
                Some(Phase::Open) | None => {}
            }
        }
        // Their answers were lost, or will come too late.
        while let Some(until) = self.asked.front().map(|asked| asked.until).filter(|until| *until <= now) {
            self.asked.pop_front();
            if self.missed.is_none_or(|missed| until >= missed + INSIDE_SOCKET) {
                self.late += 1;
                self.missed = Some(now);
            }
        }
        if self.late >= INSIDE_LATE && self.paused.is_none() && self.inside.is_some() {
            tracing::warn!(
                "nobody answers who makes sockets inside: connections from the loopback cross the interface until that changes"
            );
            self.paused = Some(now + INSIDE_PAUSE);
            self.cross_waiting(sh, now, tcp);
        }
        self.ask(now);
        let asked = self.asked.front().map(|asked| asked.until);
        if let Some(at) = self.deadlines.first().map(|(at, _)| *at).into_iter().chain(asked).min() {
            sh.timers.set(at, TimerKey::Join);
        }
    }

    /// Sockets of the guest's namespace have come.
    pub(crate) fn sockets(&mut self, sh: &mut Shared, now: Instant, tcp: &mut Tcp) {
        for _ in 0..MAX_ASKED {
            let Some(inside) = &self.inside else { return };
            match inside.next() {
                Ok(made) => {
                    let is_it = |asked: &Asked| asked.flow == made.flow && asked.family == made.family;
                    // Who answers late, or was not asked, has nobody who waits.
                    if self.asked.iter().position(is_it).and_then(|at| self.asked.remove(at)).is_none() {
                        continue;
                    }
                    self.late = 0;
                    if self.paused.take().is_some() {
                        tracing::info!("who makes sockets inside answers again");
                    }
                    match made.socket {
                        Ok(socket) => {
                            let fd = sh.budget.hold(socket);
                            self.connect(sh, now, tcp, made.flow, fd);
                        }
                        // Without IPv6 there, for example.
                        Err(Errno::EAFNOSUPPORT) => {
                            self.try_other(sh, now, tcp, made.flow, Missed::Refused);
                        }
                        Err(errno) => {
                            tracing::debug!(%errno, "no socket inside");
                            self.cross(sh, now, tcp, made.flow);
                        }
                    }
                    self.ask(now);
                }
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR) => {}
                Err(errno) => {
                    tracing::debug!(%errno, "nobody makes sockets inside any more");
                    // Who waits goes the way of all others, and so do those that come from now on.
                    self.inside = None;
                    return self.cross_waiting(sh, now, tcp);
                }
            }
        }
    }

    /// Who waits for a socket goes the way of all others.
    fn cross_waiting(&mut self, sh: &mut Shared, now: Instant, tcp: &mut Tcp) {
        self.asked.clear();
        self.unasked.clear();
        let waits = |flow: &Joined| matches!(flow.phase, Phase::Waiting(_));
        let waiting = self.flows.iter().filter(|(_, flow)| waits(flow));
        let ids: Vec<FlowId> = waiting.map(|(id, _)| id).collect();
        ids.into_iter().for_each(|id| self.cross(sh, now, tcp, id));
    }

    /// Has a flow of which nothing has been read go the way of all others, from that place of the server on at which it is.
    fn cross(&mut self, sh: &mut Shared, now: Instant, tcp: &mut Tcp, id: FlowId) {
        if self.flows.get(id).is_some_and(|flow| flow.near.failed) {
            return self.remove(sh, id, Some("reset-by-peer"));
        }
        let Some(mut flow) = self.take(sh, id) else { return };
        flow.entry.tell_end(sh, now, "failed");
        sh.unwatch(flow.near.fd.as_fd());
        tcp.inbound(sh, now, flow.near.fd, [flow.ways[flow.way], flow.ways[1]]);
    }

    fn connect(&mut self, sh: &mut Shared, now: Instant, tcp: &mut Tcp, id: FlowId, fd: HostFd) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        let guest = flow.ways[flow.way].guest;
        host::tune_tcp(fd.as_fd());
        sys::avoid_port(fd.as_fd(), guest.port);
        // What answers is to be the guest itself. Only its own address the kernel gives to a socket, and reaches from there:
        // what leads to this one from another address of the inside's is known to the link. With ip_nonlocal_bind, which only
        // the inside can set for itself, it gives any; then nobody answers, or whoever the inside has at that address.
        if let Err(errno) = host::bind_address(&fd, guest.ip) {
            tracing::debug!(%errno, "the inside has not the server's address");
            return self.cross(sh, now, tcp, id);
        }
        if let Err(errno) = sh.watch(fd.as_fd(), Token::Inner(id), WATCHED) {
            tracing::debug!(%errno, "a socket inside cannot be watched");
            return self.cross(sh, now, tcp, id);
        }
        match connect(fd.as_raw_fd(), &SockaddrStorage::from(SocketAddr::from(guest))) {
            Ok(()) | Err(Errno::EINPROGRESS) => {}
            Err(errno) => {
                sh.unwatch(fd.as_fd());
                drop(fd);
                if is_refusal(errno) {
                    return self.try_other(sh, now, tcp, id, Missed::Refused);
                }
                // Of so many connections the inside's kernel has no port left, for example.
                tracing::debug!(%errno, "a socket inside cannot connect");
                return self.cross(sh, now, tcp, id);
            }
        }
        let from = getsockname::<SockaddrStorage>(fd.as_raw_fd()).ok();
        let from = from.as_ref().and_then(udp::socket_addr).map(Endpoint::from);
        if from == Some(guest) {
            // It got the server's port for its own, and so has met itself. Then there is no server.
            sh.unwatch(fd.as_fd());
            host::reset_on_close(fd.as_fd());
            drop(fd);
            return self.try_other(sh, now, tcp, id, Missed::Refused);
        }
        flow.entry.key = FlowKey { guest, remote: from.unwrap_or(flow.ways[flow.way].remote) };
        flow.entry.tell_begin(sh);
        flow.inner = Some(Side::new(fd));
        flow.phase = Phase::Connecting;
        self.wait_until(sh, id, now + INBOUND_CONNECT);
    }

    /// The server is not where it was looked for: at the other place, or nowhere.
    fn try_other(&mut self, sh: &mut Shared, now: Instant, tcp: &mut Tcp, id: FlowId, why: Missed) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        if let Some(inner) = flow.inner.take() {
            // Who made it may not have closed it yet.
            sh.unwatch(inner.fd.as_fd());
        }
        let is_last = flow.way > 0 || flow.ways[0] == flow.ways[1];
        if flow.near.failed || is_last && why != Missed::Refused {
            return self.remove(sh, id, Some(why.reason()));
        }
        flow.entry.tell_end(sh, now, why.reason());
        if is_last {
            // Rules of the inside's kernel may lead somewhere what comes by its link.
            flow.way = 0;
            return self.cross(sh, now, tcp, id);
        }
        flow.way = 1;
        flow.entry.key = flow.ways[1];
        flow.entry.account = Account::new(now);
        flow.phase = Phase::Waiting(sh.budget.room());
        if !self.asks(now) {
            return self.cross(sh, now, tcp, id);
        }
        self.want(sh, now, id);
    }

    /// Something happened to the client's socket.
    pub(crate) fn near_event(&mut self, id: FlowId, events: EpollFlags) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        flow.near.event(events);
        self.flows.mark(id);
    }

    /// Something happened to the socket in the guest's namespace.
    pub(crate) fn inner_event(
        &mut self,
        sh: &mut Shared,
        now: Instant,
        tcp: &mut Tcp,
        id: FlowId,
        events: EpollFlags,
    ) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        let Some(inner) = &mut flow.inner else { return };
        if let Phase::Connecting = flow.phase {
            let Some(outcome) = inner.connect_outcome(events) else { return };
            if outcome.is_err_and(is_refusal) {
                return self.try_other(sh, now, tcp, id, Missed::Refused);
            }
            // With another one the server was there, and has reset the connection since. What it said before is there.
            if outcome.is_err() {
                // It may have come since we were woken, which was to say something else.
                inner.failed = true;
                inner.event(EpollFlags::EPOLLERR);
            }
            flow.phase = Phase::Open;
            self.deadlines.remove(&(flow.until, id));
            sh.half_open -= 1;
            count(sh);
        }
        inner.event(events);
        self.flows.mark(id);
    }

    /// Looks after every flow that anything happened to, once.
    pub(crate) fn run(&mut self, sh: &mut Shared) {
        let mut turn = self.flows.turn();
        while let Some(id) = self.flows.next_marked(&mut turn) {
            self.look_after(sh, id);
        }
    }

    /// Looks after one flow.
    pub(crate) fn look_after(&mut self, sh: &mut Shared, id: FlowId) {
        sh.begin(At::Event(Token::Near(id)));
        self.service(sh, id);
    }

    fn service(&mut self, sh: &mut Shared, id: FlowId) {
        let before = [sh.sent.share(), sh.received.share()];
        let Some(flow) = self.flows.get_mut(id) else { return };
        let Joined { near, inner, phase, traffic: [out, to_guest], entry: Entry { account, .. }, .. } = flow;
        let (Phase::Open, Some(inner)) = (phase, inner) else {
            if near.failed {
                self.remove(sh, id, Some("reset-by-peer"));
            }
            return;
        };
        let [mut sent, mut received] = before.map(|left| Allowance { left, wanted: false });
        pump(sh, &mut self.pipes, inner, near, out, &mut account.sent, &mut sent);
        pump(sh, &mut self.pipes, near, inner, to_guest, &mut account.received, &mut received);
        sh.sent.take(before[0] - sent.left);
        sh.received.take(before[1] - received.left);
        if inner.is_over() && out.is_empty() {
            return self.remove(sh, id, Some("reset-by-guest"));
        }
        if near.is_over() && to_guest.is_empty() {
            return self.remove(sh, id, Some("reset-by-peer"));
        }
        if near.shut && inner.shut {
            return self.remove(sh, id, None);
        }
        let wanted = [sent.wanted, received.wanted];
        if self.flows.wait(sh, id, wanted, before.map(|share| share > 0)) {
            self.flows.mark(id);
        }
    }

    /// Ends a flow; with a reason: so that both sides notice that something went wrong.
    fn remove(&mut self, sh: &mut Shared, id: FlowId, failure: Option<&'static str>) {
        let Some(mut flow) = self.take(sh, id) else { return };
        if !matches!(flow.phase, Phase::Open) {
            count(sh);
        }
        flow.entry.tell_begin(sh);
        flow.entry.tell_end(sh, sh.now, failure.unwrap_or("finished"));
        if failure.is_some() {
            flow.sockets().for_each(host::reset_on_close);
        }
        for Way { pipe, in_pipe, .. } in flow.traffic {
            if let Some(pipe) = pipe {
                self.pipes.give_back(pipe, in_pipe == 0);
            }
        }
    }

    /// Takes a flow out of the tables.
    fn take(&mut self, sh: &mut Shared, id: FlowId) -> Option<Joined> {
        let flow = self.flows.remove(sh, id)?;
        self.deadlines.remove(&(flow.until, id));
        if !matches!(flow.phase, Phase::Open) {
            sh.half_open -= 1;
        }
        Some(flow)
    }

    #[cfg(test)]
    pub(crate) fn check_bounds(&self) {
        use crate::config::{MAX_TCP_FLOWS, QUEUE_SLACK};
        let lent = self.flows.iter().flat_map(|(_, flow)| &flow.traffic).filter(|way| way.pipe.is_some());
        assert_eq!(self.pipes.lent, lent.count());
        assert!(self.asked.len() <= MAX_ASKED && self.unasked.len() <= 2 * MAX_TCP_FLOWS + QUEUE_SLACK);
        assert!(self.pipes.lent <= MAX_PIPES && self.pipes.free.len() <= POOL);
        let waiting = self.flows.iter().filter(|(_, flow)| !matches!(flow.phase, Phase::Open)).count();
        assert!(self.flows.len() <= MAX_TCP_FLOWS && self.deadlines.len() == waiting);
        for way in self.flows.iter().flat_map(|(_, flow)| &flow.traffic) {
            assert!(way.rest.capacity() <= CHUNK && (way.pipe.is_none() || way.in_pipe > 0));
        }
    }
}

/// Whether a socket says by this error that there is no server where it was to connect to.
fn is_refusal(errno: Errno) -> bool {
    matches!(errno, Errno::ECONNREFUSED | Errno::EHOSTUNREACH | Errno::ENETUNREACH | Errno::ETIMEDOUT)
}

/// Counts a flow of which is known that it does not cross the TAP.
fn count(sh: &Shared) {
    sh.stats.tcp_in.one();
    sh.stats.tcp_joined.one();
}

/// Moves data from one side to the other, as much as both take, and the end of it.
fn pump(
    sh: &mut Shared,
    pipes: &mut Pipes,
    from: &mut Side,
    to: &mut Side,
    way: &mut Way,
    traffic: &mut Traffic,
    allowance: &mut Allowance,
) {
    let mut moved = 0;
    while to.writable && !to.failed {
        if !way.is_empty() {
            deliver(way, to);
            continue;
        }
        if !from.readable || from.eof {
            break;
        }
        if moved >= TURN_BUDGET || allowance.left == 0 {
            allowance.wanted = true;
            break;
        }
        if from.copied
            && let Some(pipe) = way.pipe.take()
        {
            pipes.give_back(pipe, true);
        }
        let pipe = match way.pipe.take() {
            None if way.bulk && !from.copied => pipes.lend(sh),
            other => other,
        };
        let n = match pipe {
            Some(pipe) => take_pages(from, way, pipe, allowance.left),
            None => take_bytes(from, to, way, &mut sh.datagram, allowance.left),
        };
        if n > 0 {
            moved += n;
            traffic.add(n);
            allowance.left -= n;
        }
    }
    if way.in_pipe == 0
        && let Some(pipe) = way.pipe.take()
    {
        pipes.give_back(pipe, true);
    }
    if way.bulk && moved < CHUNK {
        way.bulk = false;
    }
    // Nobody will take it any more.
    if to.failed {
        way.rest = Vec::new();
        way.taken = 0;
    }
    if from.eof && !from.failed && way.is_empty() && !to.shut {
        to.shut = true;
        let _ = shutdown(to.fd.as_raw_fd(), Shutdown::Write);
    }
}

/// Hands on what was taken.
fn deliver(way: &mut Way, to: &mut Side) {
    let sent = match &way.pipe {
        Some(pipe) => {
            retry(|| splice(&pipe.out, None, &to.fd, None, way.in_pipe, SpliceFFlags::SPLICE_F_NONBLOCK))
        }
        None => {
            let rest = way.rest.get(way.taken..).unwrap_or_default();
            retry(|| send(to.fd.as_raw_fd(), rest, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT))
        }
    };
    match sent {
        Ok(n) if way.pipe.is_some() => way.in_pipe = way.in_pipe.saturating_sub(n),
        Ok(n) => {
            way.taken += n;
            if way.taken >= way.rest.len() {
                way.rest = Vec::new();
                way.taken = 0;
            }
        }
        Err(Errno::EAGAIN) => to.writable = false,
        Err(_) => to.failed = true,
    }
}

/// Takes what there is into a pipe that is empty.
fn take_pages(from: &mut Side, way: &mut Way, pipe: Pipe, most: usize) -> usize {
    let most = most.min(usize::try_from(JOIN_PIPE).unwrap_or(CHUNK));
    let got = retry(|| splice(&from.fd, None, &pipe.into, None, most, SpliceFFlags::SPLICE_F_NONBLOCK));
    way.pipe = Some(pipe);
    match got {
        // It may stand at urgent data. recv(2) knows.
        Ok(0) => (from.copied, from.more_behind) = (true, true),
        Ok(n) => {
            way.in_pipe = n;
            return n;
        }
        Err(Errno::EAGAIN) => from.readable = false,
        Err(_) => {
            from.failed = true;
            (from.copied, from.more_behind) = (true, true);
        }
    }
    0
}

/// Takes a little and hands it on at once; what is not taken is kept.
fn take_bytes(from: &mut Side, to: &mut Side, way: &mut Way, buffer: &mut [u8], most: usize) -> usize {
    let Some(buffer) = buffer.get_mut(..CHUNK.min(most)) else { return 0 };
    match retry(|| recv(from.fd.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT)) {
        Ok(0) => from.eof = true,
        Ok(n) => {
            from.readable = n == buffer.len() || from.more_behind;
            way.bulk |= n == CHUNK;
            let data = buffer.get(..n).unwrap_or_default();
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            let sent = match retry(|| send(to.fd.as_raw_fd(), data, flags)) {
                Ok(sent) => sent,
                Err(Errno::EAGAIN) => 0,
                Err(_) => {
                    to.failed = true;
                    n
                }
            };
            if sent < n {
                to.writable = false;
                way.rest = data.get(sent..).unwrap_or_default().to_vec();
                way.taken = 0;
            }
            return n;
        }
        Err(Errno::EAGAIN) => from.readable = false,
        Err(_) => {
            from.failed = true;
            from.readable = false;
        }
    }
    0
}
