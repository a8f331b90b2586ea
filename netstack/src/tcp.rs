//! TCP flows: a smoltcp socket towards the guest, a plain host socket on the other side, two rings between them.
//!
//! States of a flow, and what each permits:
//!
//! - `Connecting`: the guest's SYN is held, the host socket connects. No smoltcp socket and no ring exists yet, so this
//!   is cheap (a descriptor and some hundred bytes), and there may be [`MAX_HALF_OPEN`] of them; one more, and the oldest
//!   gives way. When the host socket is connected the held SYN is fed to a new smoltcp socket,
//!   which answers it: the guest sees "connected" only if its peer does. A refusal becomes a RST, an unreachable
//!   destination an ICMP error (RFC 1122 section 4.2.3.9 makes that end a SYN-SENT), a time-out silence: the guest's own
//!   timer has then run out, too.
//! - `Open`: data flows. Host to guest: `recv` straight into the transmit ring, as much as there is room. Guest to host:
//!   `send` straight out of the receive ring. A side that does not read fills its ring, which closes the window or stops
//!   the reading; nothing is buffered anywhere else.
//! - gone: the table forgets the flow at once. TIME-WAIT is never kept: the TAP neither delays nor repeats segments.
//!
//! Ends. The host's EOF becomes a FIN behind the ring's last byte; the guest's FIN becomes `shutdown(SHUT_WR)` when the
//! ring is empty. The host's error becomes a RST, the guest's RST closes the host socket with a reset. So each side sees
//! what it would have seen without us.
//!
//! A connection to DNS at the gateway has the forwarder for its other side (`Far::Dns`, [`Stream`]).
//!
//! Timers: smoltcp's own (retransmission, window probes), and the guest's silence ([`GUEST_SILENCE`]). An idle flow has
//! none, but for two kinds: one that we have ended and the guest has not, which is asked every minute whether the guest
//! still has it ([`FIN_WAIT_PROBE`](crate::config::FIN_WAIT_PROBE)), and one to the forwarder, which ends when it has been
//! idle for long enough.
//!
//! Work is per flow: frames find theirs by hash and mark it dirty, events likewise; only dirty flows are looked at, once
//! per turn of the engine, however many frames came. Acknowledgements are thereby sent once per turn, too.

mod guest;

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{MsgFlags, Shutdown};
use smoltcp::iface::{Interface, SocketSet};
use smoltcp::socket::tcp::State;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::TcpPacket;

use crate::calls::{recv, send, shutdown};
use crate::config::{
    GUEST_SILENCE, HALF_OPEN_SPARE, INBOUND_CONNECT, LARGEST_RING, MAX_DNS_CONNECTIONS, MAX_HALF_OPEN,
    MAX_TCP_FLOWS, RING_POOL, RINGS,
};
use crate::defect::At;
use crate::device::{FlowDevice, Said};
use crate::dns::stream::{Query, Stream};
use crate::emit::{self, IcmpError, Unreachable};
use crate::flow::{Endpoint, FlowId, FlowKey, TimerKey};
use crate::flowlog::{Account, FlowEventKind};
use crate::flows::{Entry, Flows, TcpFlow};
use crate::host::{self, HostFd};
use crate::ingress::{self, Packet};
use crate::policy::hello::{self, Hello, MAX_HELLO};
use crate::policy::{Transport, Verdict};
use crate::shared::{Shared, Token};
use crate::side::{Side, WATCHED, retry};
use crate::sys::{RingSocket, Rings};
use crate::udp;
use guest::{Numbers, Silence};

/// Bytes moved for one flow before the others get their turn.
const TURN_BUDGET: usize = 1024 * 1024;
/// Segments sent for one flow before the others get their turn.
const TURN_SEGMENTS: usize = 1024;
/// Connections that are looked at for one that may give way, each time there is no descriptor for another.
const SPARE_TURN: usize = 64;
/// Pages of a finished or idle flow that moved more than this go back to the kernel.
const KEEP_WARM: usize = 64 * 1024;
/// Among more flows than this all pages of an idle flow go back.
const MANY: usize = if cfg!(test) { 2 } else { 512 };
/// How long one of many flows has to be idle for that.
const IDLE_OF_MANY: Duration = Duration::from_secs(2);

/// The other side of a flow.
#[derive(Debug)]
enum Far {
    Host(Side),
    Dns(Stream),
}

#[derive(Debug)]
enum Phase {
    /// Holds the guest's SYN as a plain IP packet without data, which the guest sends again: 2,048 of 64 KiB would be a
    /// lot of memory for connections that do not exist yet.
    Connecting {
        syn: Vec<u8>,
    },
    Open(Box<RingSocket>),
}

#[derive(Debug)]
pub(crate) struct Flow {
    entry: Entry,
    phase: Phase,
    far: Far,
    /// The guest's segment size.
    mss: u16,
    numbers: Numbers,
    /// The smoltcp socket has begun to close its sending half.
    closed: bool,
    /// The last acknowledgement of a connection in TIME-WAIT has been sent.
    finished: bool,
    /// A connection to a published port that the guest has not accepted yet.
    inbound_until: Option<Instant>,
    /// Where else the server inside may listen.
    other_way: Option<FlowKey>,
    /// Its first bytes are to be looked at before they go on.
    peek: bool,
    /// What they were, if they were looked at.
    hello: Option<Hello>,
    /// See [`Shared::name_for`].
    name: Option<Arc<str>>,
    /// Why it ends, where that is known better than by how it ends.
    why: Option<&'static str>,
    silence: Silence,
    /// The flow's earliest timer.
    timer: Option<Instant>,
    /// A timer, and nothing else, brought us here.
    rested: bool,
    /// Bytes moved.
    moved: usize,
    /// What that was when the rings' pages were last given back.
    released: usize,
}

impl TcpFlow for Flow {
    fn entry(&self) -> &Entry {
        &self.entry
    }

    fn entry_mut(&mut self) -> &mut Entry {
        &mut self.entry
    }

    fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let host = if let Far::Host(host) = &self.far { Some(host.fd.as_fd()) } else { None };
        host.into_iter()
    }

    fn owes(&self) -> bool {
        match (&self.far, &self.phase) {
            (Far::Host(host), Phase::Open(_)) => self.inbound_until.is_none() && !host.shut && !host.failed,
            _ => false,
        }
    }

    fn holds_data(&self) -> bool {
        match (&self.far, &self.phase) {
            (Far::Host(_), Phase::Open(socket)) => socket.can_recv() || self.numbers.has_gap(),
            _ => false,
        }
    }

    fn passed_on(&self) -> u64 {
        self.entry.account.sent.bytes
    }
}

/// What may be moved for a flow now.
#[derive(Debug, Clone, Copy)]
struct Allowance {
    sent: usize,
    received: usize,
    /// More was there, from the guest and for it.
    wanted: [bool; 2],
}

/// All TCP flows.
pub(crate) struct Tcp {
    iface: Interface,
    /// Without a socket: smoltcp answers what it is fed with a RST.
    nobody: SocketSet<'static>,
    pub(crate) flows: Flows<Flow>,
    by_key: HashMap<FlowKey, FlowId>,
    /// Connections to the forwarder.
    dns_flows: usize,
    /// Flows that have begun to connect, oldest first; some are connected or gone by now.
    connecting: VecDeque<FlowId>,
    /// Connections to published ports, oldest first; some have been answered by the guest, or are gone by now.
    arriving: VecDeque<FlowId>,
    pool: Vec<Rings>,
    /// Queries to be fetched by the engine.
    pub(crate) dns_queries: Vec<Query>,
}

impl std::fmt::Debug for Tcp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tcp").field("flows", &self.flows.len()).finish_non_exhaustive()
    }
}

/// Clock of TCP timestamps: milliseconds (RFC 7323 section 5.4 wants 1 ms to 1 s).
fn timestamp_clock() -> u32 {
    use nix::time::{ClockId, clock_gettime};
    let Ok(now) = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE) else { return 0 };
    let millis = now.tv_sec().wrapping_mul(1000).wrapping_add(now.tv_nsec() / 1_000_000);
    u32::try_from(millis & i64::from(u32::MAX)).unwrap_or_default()
}

impl Tcp {
    pub(crate) fn new(sh: &mut Shared, now: Instant) -> Self {
        let mut config = smoltcp::iface::Config::new(smoltcp::wire::HardwareAddress::Ip);
        config.random_seed = sh.random.next();
        let mut device = FlowDevice { tap: &mut sh.tap, rx: None, mss: 0 };
        let mut iface = Interface::new(config, &mut device, now);
        // Every address that the guest may ask for is ours.
        iface.set_any_ip(true);
        Self {
            iface,
            nobody: SocketSet::new(Vec::new()),
            flows: Flows::default(),
            by_key: HashMap::new(),
            dns_flows: 0,
            connecting: VecDeque::new(),
            arriving: VecDeque::new(),
            pool: Vec::new(),
            dns_queries: Vec::new(),
        }
    }

    /// Flows whose other end has not answered yet.
    #[cfg(test)]
    pub(crate) fn half_open(&self) -> usize {
        self.flows.iter().filter(|(id, _)| is_connecting(&self.flows, *id)).count()
    }

    #[cfg(test)]
    pub(crate) fn check_bounds(&self) {
        assert!(self.flows.len() <= MAX_TCP_FLOWS && self.by_key.len() == self.flows.len());
        let dns = self.flows.iter().filter(|(_, flow)| matches!(flow.far, Far::Dns(_))).count();
        assert!(self.dns_flows == dns && dns <= MAX_DNS_CONNECTIONS);
        assert!(self.pool.len() <= RING_POOL && self.connecting.len() <= 2 * MAX_HALF_OPEN);
        assert!(self.arriving.len() <= 2 * MAX_TCP_FLOWS);
        assert!(self.dns_bytes() <= self.dns_flows * (2 + crate::config::MAX_DNS_PIPELINE) * 65_537);
        assert!(self.held_bytes() <= self.half_open() * 256);
    }

    /// Every host socket, by its flow, and what it is watched for.
    #[cfg(test)]
    pub(crate) fn each_host(&self, mut each: impl FnMut(std::os::fd::BorrowedFd<'_>, FlowId, EpollFlags)) {
        for (id, flow) in self.flows.iter() {
            if let Far::Host(host) = &flow.far {
                each(host.fd.as_fd(), id, WATCHED);
            }
        }
    }

    /// Bytes of SYNs that are held.
    #[cfg(test)]
    pub(crate) fn held_bytes(&self) -> usize {
        let held = |flow: &Flow| match &flow.phase {
            Phase::Connecting { syn } => syn.capacity(),
            Phase::Open(_) => 0,
        };
        self.flows.iter().map(|(_, flow)| held(flow)).sum()
    }

    /// Bytes of queries and answers that wait outside the rings.
    #[cfg(test)]
    pub(crate) fn dns_bytes(&self) -> usize {
        let side = |flow: &Flow| match &flow.far {
            Far::Dns(dns) => dns.bytes(),
            Far::Host(_) => 0,
        };
        self.flows.iter().map(|(_, flow)| side(flow)).sum()
    }

    /// A segment from the guest.
    pub(crate) fn ingress(&mut self, sh: &mut Shared, now: Instant, packet: &Packet<'_>) {
        let Ok(segment) = TcpPacket::new_checked(packet.payload()) else {
            sh.stats.dropped_malformed.one();
            return;
        };
        let guest = Endpoint::new(packet.src, segment.src_port());
        let remote = Endpoint::new(packet.dst, segment.dst_port());
        let only_syn = segment.syn() && !segment.ack() && !segment.rst() && !segment.fin();
        if guest.port == 0 || remote.port == 0 || segment.syn() && (segment.rst() || segment.fin()) {
            sh.stats.dropped_malformed.one();
            return;
        }
        let key = FlowKey { guest, remote };
        match self.by_key.get(&key) {
            Some(&id) if only_syn && self.has_ended(id) => {
                // The guest uses the port again before anybody has looked after its last connection.
                self.service(sh, now, id);
                // If there still is something to deliver, the guest has to repeat its SYN.
                if !self.by_key.contains_key(&key) {
                    self.outbound(sh, now, key, packet);
                }
            }
            Some(&id) => self.flow_ingress(sh, now, id, packet),
            None if only_syn => self.outbound(sh, now, key, packet),
            None => self.refuse(sh, now, packet),
        }
    }

    /// Whether the guest's side of a flow is over, and only the flow's end is missing.
    fn has_ended(&self, id: FlowId) -> bool {
        let Some(Flow { phase: Phase::Open(socket), .. }) = self.flows.get(id) else { return false };
        matches!(socket.state(), State::Closed | State::Listen | State::TimeWait)
    }

    fn flow_ingress(&mut self, sh: &mut Shared, now: Instant, id: FlowId, packet: &Packet<'_>) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        flow.silence.end(now);
        flow.entry.account.sent.packets += 1;
        match &mut flow.phase {
            Phase::Connecting { .. } => {
                // A repeated SYN changes nothing; a RST means that the guest has given up.
                if TcpPacket::new_unchecked(packet.payload()).rst() {
                    flow.why = Some("given-up");
                    self.remove(sh, id, true);
                }
            }
            Phase::Open(socket) => {
                let plain = packet.plain();
                let mut widened = None;
                if TcpPacket::new_unchecked(packet.payload()).syn() {
                    // The guest's answer to our SYN: it, too, announces a segment size.
                    let mut copy = plain.to_vec();
                    let at = if packet.is_v6() { 40 } else { 20 };
                    let mss = sh.tap.widen_syn(&mut copy, at, packet.is_v6());
                    if flow.inbound_until.is_some() {
                        flow.mss = mss;
                    }
                    widened = Some(copy);
                }
                let segment = TcpPacket::new_unchecked(packet.payload());
                if flow.numbers.is_behind_fin(&segment) {
                    // smoltcp would take it; the host must not see anything behind what it was told was the end.
                    sh.stats.dropped_malformed.one();
                    return;
                }
                if flow.numbers.hear_ack(&segment) && only_fin_is_missing(socket, &segment) {
                    return;
                }
                let apart = (!flow.numbers.has_guest_fin() && segment.fin() && !segment.payload().is_empty())
                    .then(|| fin_apart(packet, &segment));
                let whole = widened.as_deref().unwrap_or(&plain);
                let parts = match &apart {
                    Some([data, fin]) => [Some(&data[..]), Some(&fin[..])],
                    None => [Some(whole), None],
                };
                sh.tap.said = Said::default();
                for rx in parts.into_iter().flatten() {
                    let mut device = FlowDevice { tap: &mut sh.tap, rx: Some(rx), mss: flow.mss };
                    socket.poll_ingress(&mut self.iface, now, &mut device);
                }
                let state = socket.state();
                flow.numbers.say(std::mem::take(&mut sh.tap.said));
                let ends =
                    matches!(state, State::CloseWait | State::LastAck | State::Closing | State::TimeWait);
                flow.numbers.hear_data(&segment, ends);
                if !matches!(state, State::SynSent | State::Closed) {
                    flow.inbound_until = None;
                    flow.other_way = None;
                }
                self.flows.mark(id);
            }
        }
    }

    /// Answers a segment that belongs to no flow: a RST, unless it is one.
    fn refuse(&mut self, sh: &mut Shared, now: Instant, packet: &Packet<'_>) {
        let plain = packet.plain();
        let mut device = FlowDevice { tap: &mut sh.tap, rx: Some(&plain), mss: 536 };
        let _ = self.iface.poll_ingress_single(now, &mut device, &mut self.nobody);
    }

    /// A SYN for a new flow.
    fn outbound(&mut self, sh: &mut Shared, now: Instant, key: FlowKey, packet: &Packet<'_>) {
        match sh.decide(Transport::Tcp, key.remote) {
            Verdict::Gateway => self.outbound_dns(sh, now, key, packet),
            Verdict::Allow(to) => self.outbound_host(sh, now, key, packet, to, false),
            Verdict::Peek(to) => self.outbound_host(sh, now, key, packet, to, true),
            Verdict::Refuse(reason) => {
                // Not by a RST, which would be the peer's own refusal.
                if sh.refused(Transport::Tcp, key, reason) {
                    udp::unreachable(sh, packet, Unreachable::Prohibited);
                }
            }
        }
    }

    fn outbound_host(
        &mut self,
        sh: &mut Shared,
        now: Instant,
        key: FlowKey,
        packet: &Packet<'_>,
        to: SocketAddr,
        peek: bool,
    ) {
        // Joined ones never have all of it.
        if sh.half_open >= sh.most_half_open() {
            self.evict_half_open(sh, Duration::ZERO);
        }
        if sh.tcp_flows >= MAX_TCP_FLOWS {
            sh.refused_by_limit(Transport::Tcp, key);
            return self.refuse(sh, now, packet);
        }
        let mut opened = host::tcp_connect(&sh.budget, to, sh.budget.reserve());
        if matches!(opened, Err(Errno::EMFILE | Errno::ENFILE)) && self.spare(sh) {
            opened = host::tcp_connect(&sh.budget, to, sh.budget.reserve());
        }
        let (fd, connected) = match opened {
            Ok(opened) => opened,
            Err(errno) => {
                if is_want(errno) {
                    sh.refused_by_limit(Transport::Tcp, key);
                } else {
                    sh.tell(Transport::Tcp, false, key, FlowEventKind::Opened);
                    let closed = Account::new(now).closed(now, failure_word(errno));
                    sh.tell(Transport::Tcp, false, key, closed);
                }
                return self.fail_syn(sh, now, packet, errno);
            }
        };
        let syn = held_syn(packet);
        let far = Side { writable: connected, ..Side::new(fd) };
        sh.half_open += 1;
        let id = self.insert(sh, now, key, Phase::Connecting { syn }, Far::Host(far));
        let Some(flow) = self.flows.get_mut(id) else { return };
        let Far::Host(host) = &flow.far else { return };
        flow.peek = peek;
        flow.name = sh.name_for(key.remote.ip);
        if let Err(errno) = sh.watch(host.fd.as_fd(), Token::Tcp(id), WATCHED) {
            self.remove(sh, id, true);
            sh.refused_by_limit(Transport::Tcp, key);
            return self.fail_syn(sh, now, packet, errno);
        }
        sh.stats.tcp_out.one();
        flow.entry.tell_begin(sh);
        if connected {
            return self.establish(sh, now, id);
        }
        if self.connecting.len() >= 2 * MAX_HALF_OPEN {
            let flows = &self.flows;
            self.connecting.retain(|&id| is_connecting(flows, id));
        }
        self.connecting.push_back(id);
    }

    /// Forgets the flow that has been connecting for longest, and for `least`, without a word: if the guest still wants it,
    /// it repeats its SYN. So a guest that tries thousands of hosts that do not answer does not keep itself from reaching
    /// others. Whether there was one.
    fn evict_half_open(&mut self, sh: &mut Shared, least: Duration) -> bool {
        while let Some(&id) = self.connecting.front() {
            if is_connecting(&self.flows, id) {
                let lasted = self.flows.get(id).map(|flow| flow.entry.account.lasted(sh.now));
                if lasted.is_none_or(|lasted| lasted < least.into()) {
                    return false;
                }
                self.connecting.pop_front();
                sh.stats.evicted.one();
                self.give_reason(id, "evicted");
                self.remove(sh, id, true);
                return true;
            }
            self.connecting.pop_front();
        }
        false
    }

    /// Ends a connection of either direction that nobody has taken for long enough, so that another gets its descriptor;
    /// whether there was one. Those to outside that have waited for longest come first.
    pub(crate) fn spare(&mut self, sh: &mut Shared) -> bool {
        if self.evict_half_open(sh, HALF_OPEN_SPARE) {
            return true;
        }
        for _ in 0..self.arriving.len().min(SPARE_TURN) {
            let Some(id) = self.arriving.pop_front() else { break };
            let Some(flow) = self.flows.get(id).filter(|flow| !flow.numbers.is_taken()) else { continue };
            let since = match flow.inbound_until {
                Some(_) => Some(flow.entry.account.opened),
                None => flow.silence.owed_since(),
            };
            if since.is_none_or(|since| sh.now < since + HALF_OPEN_SPARE) {
                self.arriving.push_back(id);
                continue;
            }
            sh.stats.evicted.one();
            self.give_reason(id, "evicted");
            self.remove(sh, id, true);
            return true;
        }
        false
    }

    fn outbound_dns(&mut self, sh: &mut Shared, now: Instant, key: FlowKey, packet: &Packet<'_>) {
        if sh.tcp_flows >= MAX_TCP_FLOWS || self.dns_flows >= MAX_DNS_CONNECTIONS {
            sh.stats.refused_by_limit.one();
            return self.refuse(sh, now, packet);
        }
        let syn = held_syn(packet);
        sh.half_open += 1;
        self.dns_flows += 1;
        let id = self.insert(sh, now, key, Phase::Connecting { syn }, Far::Dns(Stream::default()));
        self.establish(sh, now, id);
    }

    /// A connection to a published port has been accepted. The server inside may be reached in two ways, which are tried
    /// one after the other.
    pub(crate) fn inbound(&mut self, sh: &mut Shared, now: Instant, fd: HostFd, ways: [FlowKey; 2]) {
        let refuse = |sh: &mut Shared, fd: HostFd| {
            sh.stats.refused_by_limit.one();
            host::reset_on_close(fd.as_fd());
        };
        let [way, other] = ways;
        if sh.tcp_flows >= MAX_TCP_FLOWS {
            return refuse(sh, fd);
        }
        let others = self.flows.len();
        let Some((key, socket)) = self.connect_inside(sh, way, others) else { return refuse(sh, fd) };
        host::tune_tcp(fd.as_fd());
        let far = Far::Host(Side::connected(fd));
        let id = self.insert(sh, now, key, Phase::Open(Box::new(socket)), far);
        sh.stats.tcp_in.one();
        if self.arriving.len() >= 2 * MAX_TCP_FLOWS {
            let flows = &self.flows;
            self.arriving.retain(|&id| flows.get(id).is_some_and(|flow| !flow.numbers.is_taken()));
        }
        self.arriving.push_back(id);
        let Some(flow) = self.flows.get_mut(id) else { return };
        flow.entry.inbound = true;
        flow.inbound_until = Some(now + INBOUND_CONNECT);
        flow.other_way = (other != way).then_some(other);
        let Far::Host(host) = &flow.far else { return };
        if sh.watch(host.fd.as_fd(), Token::Tcp(id), WATCHED).is_err() {
            return self.remove(sh, id, true);
        }
        flow.entry.tell_begin(sh);
        self.flows.mark(id);
    }

    fn give_reason(&mut self, id: FlowId, why: &'static str) {
        if let Some(flow) = self.flows.get_mut(id) {
            flow.why = Some(why);
        }
    }

    /// Ends the guest's flows that are not allowed any more, with a reset on both sides.
    pub(crate) fn review(&mut self, sh: &mut Shared) {
        let outbound = |flow: &Flow| !flow.entry.inbound && matches!(flow.far, Far::Host(_));
        let ids: Vec<FlowId> =
            self.flows.iter().filter(|(_, flow)| outbound(flow)).map(|(id, _)| id).collect();
        for id in ids {
            let Some(flow) = self.flows.get_mut(id) else { continue };
            let remote = flow.entry.key.remote;
            let verdict = sh.decide_again(Transport::Tcp, remote, flow.name.as_ref());
            let refused = match (verdict, &flow.hello) {
                (Verdict::Refuse(reason), _) => Some(reason),
                (Verdict::Peek(_), Some(hello)) => sh.decide_hello(remote, hello).err(),
                _ => None,
            };
            let Some(reason) = refused else {
                flow.name = sh.name_for(remote.ip).or(flow.name.take());
                // Only what has not gone yet can be looked at.
                let untouched = flow.entry.account.sent.bytes == 0;
                let peek = matches!(verdict, Verdict::Peek(_)) && flow.hello.is_none() && untouched;
                if std::mem::replace(&mut flow.peek, peek) && !peek {
                    self.flows.mark(id);
                }
                continue;
            };
            flow.why = Some("policy");
            let tell = sh.refused(Transport::Tcp, flow.entry.key, reason);
            match &mut flow.phase {
                Phase::Connecting { syn } => {
                    if tell && let Ok(packet) = ingress::parse_ip(syn, true) {
                        udp::unreachable(sh, &packet, Unreachable::Prohibited);
                    }
                }
                Phase::Open(socket) => {
                    let mut device = FlowDevice { tap: &mut sh.tap, rx: None, mss: flow.mss };
                    socket.abort();
                    send_segments(socket, &mut self.iface, sh.now, &mut device);
                }
            }
            self.remove(sh, id, true);
        }
    }

    /// A socket that connects to a server inside. The peer's port is its own where that is free, else any.
    fn connect_inside(
        &mut self,
        sh: &mut Shared,
        mut key: FlowKey,
        others: usize,
    ) -> Option<(FlowKey, RingSocket)> {
        for _ in 0..64 {
            if !self.by_key.contains_key(&key) {
                break;
            }
            let [a, b, ..] = sh.random.next().to_ne_bytes();
            key.remote.port = u16::from_ne_bytes([a, b]) | 0x8000;
        }
        if self.by_key.contains_key(&key) {
            return None;
        }
        let mut socket = self.new_socket(others)?;
        socket.connect(&mut self.iface, key.guest.into(), key.remote.into()).ok()?;
        Some((key, socket))
    }

    /// The server inside does not listen where it was looked for first.
    fn try_other_way(&mut self, sh: &mut Shared, now: Instant, id: FlowId, way: FlowKey) {
        let others = self.flows.len().saturating_sub(1);
        let Some((key, socket)) = self.connect_inside(sh, way, others) else {
            return self.remove(sh, id, true);
        };
        let Some(flow) = self.flows.get_mut(id) else { return };
        // By another name it is another flow.
        let why = if flow.inbound_until.is_some_and(|until| now >= until) {
            "not-answered"
        } else {
            "refused-inside"
        };
        flow.entry.tell_end(sh, now, why);
        self.by_key.remove(&std::mem::replace(&mut flow.entry.key, key));
        self.by_key.insert(key, id);
        flow.entry.tell_begin(sh);
        (flow.entry.account.sent, flow.entry.account.received) = Default::default();
        let before = std::mem::replace(&mut flow.phase, Phase::Open(Box::new(socket)));
        flow.inbound_until = Some(now + INBOUND_CONNECT);
        flow.silence = Silence::new(now);
        flow.numbers = Numbers::default();
        if let Phase::Open(socket) = before {
            self.recycle(socket.into_rings(), 0);
        }
        self.flows.mark(id);
    }

    fn insert(&mut self, sh: &mut Shared, now: Instant, key: FlowKey, phase: Phase, far: Far) -> FlowId {
        let flow = Flow {
            entry: Entry::new(key, false, now),
            phase,
            far,
            mss: 536,
            numbers: Numbers::default(),
            closed: false,
            finished: false,
            inbound_until: None,
            other_way: None,
            peek: false,
            hello: None,
            name: None,
            why: None,
            silence: Silence::new(now),
            timer: None,
            rested: false,
            moved: 0,
            released: 0,
        };
        let id = self.flows.insert(sh, flow);
        self.by_key.insert(key, id);
        id
    }

    /// A socket for a flow beside so many others.
    fn new_socket(&mut self, others: usize) -> Option<RingSocket> {
        let (_, ring) = RINGS.into_iter().find(|(most, _)| others <= *most)?;
        let pooled = if ring == LARGEST_RING { self.pool.pop() } else { None };
        let rings = match pooled {
            Some(rings) => rings,
            None => Rings::map(ring)
                .inspect_err(|error| tracing::warn!(%error, "no memory for a TCP connection"))
                .ok()?,
        };
        let mut socket = RingSocket::new(rings);
        socket.configure(timestamp_clock);
        Some(socket)
    }

    /// Keeps the rings of a flow that moved so many bytes for the next one, if they are good enough.
    fn recycle(&mut self, mut rings: Rings, moved: usize) {
        if self.pool.len() < RING_POOL && rings.capacity() == LARGEST_RING {
            if moved > KEEP_WARM {
                rings.release_pages();
            }
            self.pool.push(rings);
        }
    }

    /// The other side is there: lets smoltcp answer the held SYN.
    fn establish(&mut self, sh: &mut Shared, now: Instant, id: FlowId) {
        let others = self.flows.len().saturating_sub(1);
        let opened = self.new_socket(others);
        let Some(flow) = self.flows.get_mut(id) else { return };
        let Phase::Connecting { syn } = &mut flow.phase else { return };
        let Some(mut socket) = opened else {
            let syn = std::mem::take(syn);
            self.remove(sh, id, true);
            if let Ok(packet) = ingress::parse_ip(&syn, true) {
                self.fail_syn(sh, now, &packet, Errno::ENOMEM);
            }
            return;
        };
        let is_v6 = flow.entry.key.remote.ip.is_ipv6();
        flow.mss = sh.tap.widen_syn(syn, if is_v6 { 40 } else { 20 }, is_v6);
        let mut device = FlowDevice { tap: &mut sh.tap, rx: Some(syn), mss: flow.mss };
        if socket.listen(flow.entry.key.remote.into()).is_err() {
            return self.remove(sh, id, true);
        }
        socket.poll_ingress(&mut self.iface, now, &mut device);
        flow.phase = Phase::Open(Box::new(socket));
        sh.half_open -= 1;
        self.flows.mark(id);
    }

    /// Tells the guest why its SYN led nowhere.
    fn fail_syn(&mut self, sh: &mut Shared, now: Instant, packet: &Packet<'_>, errno: Errno) {
        tracing::debug!(%errno, to = %packet.dst, "TCP connection failed");
        let Some(what) = Unreachable::from_errno(errno) else {
            // The guest's own timer has run out, too.
            if errno != Errno::ETIMEDOUT {
                self.refuse(sh, now, packet);
            }
            return;
        };
        let error = IcmpError::unreachable(packet.is_v6(), what);
        let from = sh.spec.gateway.ip_like(packet.dst);
        emit::icmp_error(&mut sh.tap, from, packet.src, error, packet.bytes);
    }

    /// Something happened to a host socket.
    pub(crate) fn host_event(&mut self, sh: &mut Shared, now: Instant, id: FlowId, events: EpollFlags) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        let Far::Host(host) = &mut flow.far else { return };
        if let Phase::Connecting { syn } = &flow.phase {
            if !events.intersects(EpollFlags::EPOLLOUT | EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP) {
                return;
            }
            let error = host::socket_error(host.fd.as_fd());
            host.readable = true;
            host.writable = true;
            host.more_behind = events.intersects(EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLPRI);
            match error {
                None => self.establish(sh, now, id),
                Some(errno) => {
                    let syn = syn.clone();
                    self.give_reason(id, failure_word(errno));
                    self.remove(sh, id, true);
                    if let Ok(packet) = ingress::parse_ip(&syn, true) {
                        self.fail_syn(sh, now, &packet, errno);
                    }
                }
            }
            return;
        }
        host.event(events);
        self.flows.mark(id);
    }

    /// An answer for a query that came over TCP.
    pub(crate) fn dns_answer(&mut self, id: FlowId, answer: &[u8]) {
        let Some(Flow { far: Far::Dns(dns), .. }) = self.flows.get_mut(id) else { return };
        dns.answer(answer);
        self.flows.mark(id);
    }

    pub(crate) fn timer(&mut self, id: FlowId) {
        if let Some(flow) = self.flows.get_mut(id) {
            flow.timer = None;
            flow.rested = true;
            self.flows.mark(id);
        }
    }

    /// Looks after every dirty flow once; whether some still have work to do.
    pub(crate) fn run(&mut self, sh: &mut Shared, now: Instant) -> bool {
        for _ in 0..self.flows.marked() {
            // While the TAP takes no frames flows rest.
            if sh.tap.is_blocked() {
                return false;
            }
            let Some(id) = self.flows.next_marked() else { break };
            sh.begin(At::Flow(id));
            self.service(sh, now, id);
        }
        self.flows.marked() > 0 && !sh.tap.is_blocked()
    }

    fn service(&mut self, sh: &mut Shared, now: Instant, id: FlowId) {
        let many = self.flows.len() > MANY;
        let [sent, received] = self.flows.share(sh);
        let share = Allowance { sent, received, wanted: [false; 2] };
        let Some(flow) = self.flows.get_mut(id) else { return };
        let Phase::Open(socket) = &mut flow.phase else { return };
        // Refused, or never answered: by a guest without an address of this family, for example.
        let in_vain = flow.inbound_until.is_some_and(|until| now >= until || socket.state() == State::Closed);
        if in_vain
            && !matches!(&flow.far, Far::Host(host) if host.failed)
            && let Some(way) = flow.other_way.take()
        {
            return self.try_other_way(sh, now, id, way);
        }
        if flow.peek
            && let Some(hello) = first_bytes(socket, flow.numbers.has_guest_fin())
        {
            flow.peek = false;
            let decided = sh.decide_hello(flow.entry.key.remote, &hello);
            flow.hello = Some(hello);
            if let Err(reason) = decided {
                flow.why = Some("policy");
                sh.refused(Transport::Tcp, flow.entry.key, reason);
                let mut device = FlowDevice { tap: &mut sh.tap, rx: None, mss: flow.mss };
                socket.abort();
                send_segments(socket, &mut self.iface, now, &mut device);
                return self.remove(sh, id, true);
            }
        }
        sh.tap.said = Said::default();
        let before = flow.moved;
        let mut allowance = share;
        let ends;
        let mut fate = match &mut flow.far {
            Far::Host(host) => {
                let hold = flow.peek;
                let fate = move_host(
                    socket,
                    host,
                    &mut flow.moved,
                    &mut flow.entry.account,
                    &mut allowance,
                    flow.closed,
                    hold,
                );
                sh.sent.take(share.sent - allowance.sent);
                sh.received.take(share.received - allowance.received);
                // An end of the host's stream is passed on at once: the flow's last word often comes with it.
                ends = host.eof;
                if flow.numbers.has_guest_fin() && !host.shut && !socket.can_recv() {
                    host.shut = true;
                    let _ = shutdown(host.fd.as_raw_fd(), Shutdown::Write);
                }
                fate
            }
            Far::Dns(dns) => {
                dns.exchange(id, socket, &mut self.dns_queries);
                ends = dns.ends(socket, flow.numbers.has_guest_fin(), flow.silence.since(), now);
                if dns.is_abandoned(flow.silence.since(), now) { Fate::Broken } else { Fate::Goes }
            }
        };
        // The FIN goes behind the last byte, so it may be said before that is sent. But smoltcp 0.14 hears of no window in
        // LAST-ACK, unless more data is acknowledged with it: a guest that closed its half first and reads slowly would
        // wait for a probe each time that its window was closed, and for ever where data was lost then.
        if ends && !flow.closed && (socket.state() != State::CloseWait || socket.send_queue() == 0) {
            flow.closed = true;
            socket.close();
        }
        if fate == Fate::Broken
            || flow.inbound_until.is_some_and(|until| now >= until)
            || flow.silence.is_too_long(now)
        {
            flow.why.get_or_insert(match fate {
                Fate::Broken => "reset-by-peer",
                Fate::Goes if flow.inbound_until.is_some() => "not-answered",
                Fate::Goes => "silent",
            });
            fate = Fate::Broken;
            // What the peer said before it went away goes first, as far as the guest has room for it.
            let mut device = FlowDevice { tap: &mut sh.tap, rx: None, mss: flow.mss };
            send_segments(socket, &mut self.iface, now, &mut device);
            socket.abort();
        }
        // Once in TIME-WAIT smoltcp has nothing to say but one acknowledgement, and would clear its ring in ten seconds.
        let mut sent = 0;
        if !flow.finished {
            let mut device = FlowDevice { tap: &mut sh.tap, rx: None, mss: flow.mss };
            sent = send_segments(socket, &mut self.iface, now, &mut device);
            flow.numbers.say(std::mem::take(&mut sh.tap.said));
            flow.silence.sent(sent);
            flow.entry.account.received.packets += u64::try_from(sent).unwrap_or(0);
            flow.finished = socket.state() == State::TimeWait && !sh.tap.is_blocked();
            if socket.state() == State::FinWait2 && now >= flow.silence.ask_at() {
                flow.silence.ask(now);
                if let Some((seq, ack)) = flow.numbers.of_probe() {
                    emit::tcp_probe(&mut sh.tap, flow.entry.key.remote, flow.entry.key.guest, seq, ack);
                }
            }
        }
        if sh.tap.is_blocked() {
            // The rest when the TAP takes frames again: the engine runs us then.
            return self.flows.mark(id);
        }
        match socket.state() {
            _ if fate == Fate::Broken => return self.remove(sh, id, true),
            // A SYN that was answered by a RST puts a listening socket back.
            State::Listen => {
                flow.why = Some("given-up");
                return self.remove(sh, id, true);
            }
            State::Closed if !(flow.numbers.has_guest_fin() && flow.closed) => {
                flow.why =
                    Some(if flow.inbound_until.is_some() { "refused-inside" } else { "reset-by-guest" });
                return self.remove(sh, id, true);
            }
            State::Closed | State::TimeWait => {
                // Both sides have said their last word; what they said may still be on its way to the host.
                let delivered = match &flow.far {
                    Far::Host(host) => host.shut,
                    Far::Dns(_) => true,
                };
                if delivered {
                    return self.remove(sh, id, false);
                }
            }
            _ => {}
        }
        let again = flow.moved - before >= TURN_BUDGET || sent >= TURN_SEGMENTS;
        let served = [share.sent > 0, share.received > 0];
        let again = self.flows.wait(sh, id, allowance.wanted, served) || again;
        if again {
            return self.flows.mark(id);
        }
        let Some(flow) = self.flows.get_mut(id) else { return };
        let Phase::Open(socket) = &mut flow.phase else { return };
        // The retransmission timer outlives the data it was set for: a good moment to see whether the flow rests.
        let rested = std::mem::take(&mut flow.rested) && flow.moved == before;
        let warm = if many { 0 } else { KEEP_WARM };
        if rested && flow.moved - flow.released > warm && socket.is_empty() {
            socket.release_idle_pages(flow.numbers.has_gap());
            flow.released = flow.moved;
        }
        self.arm(sh, now, id);
    }

    /// Sets the flow's timer, if it needs one that is earlier than the one it has.
    fn arm(&mut self, sh: &mut Shared, now: Instant, id: FlowId) {
        let many = self.flows.len() > MANY;
        let Some(flow) = self.flows.get_mut(id) else { return };
        let Phase::Open(socket) = &mut flow.phase else { return };
        let waits = flow.finished || socket.state() == State::FinWait2;
        // In a moment of rest its pages are looked after.
        let cold = (many && flow.moved > flow.released && socket.is_empty()).then_some(now + IDLE_OF_MANY);
        let mut own = if waits { None } else { socket.poll_at(&mut self.iface, now) };
        let owes = awaits_guest(socket);
        if own.is_none()
            && socket.send_queue() > 0
            && let Some(reminder) = reminder(flow.entry.key, &flow.numbers)
        {
            for packet in &reminder {
                let mut device = FlowDevice { tap: &mut sh.tap, rx: Some(packet), mss: flow.mss };
                socket.poll_ingress(&mut self.iface, now, &mut device);
            }
            own = socket.poll_at(&mut self.iface, now);
        }
        flow.silence.set_owed(owes, now);
        // What is due now has just been done; a moment's patience keeps a misunderstanding from becoming a busy loop.
        let own = own.map(|at| at.max(now + Duration::from_millis(10)));
        let silence = flow.silence.owed_since().map(|since| since + GUEST_SILENCE);
        let idle =
            matches!(flow.far, Far::Dns(_)).then(|| Stream::look_at(flow.silence.since(), flow.closed));
        let probe = (socket.state() == State::FinWait2).then(|| flow.silence.ask_at());
        let wanted = [own, silence, probe, idle, cold, flow.inbound_until].into_iter().flatten().min();
        let Some(at) = wanted.map(|at| at.max(now + Duration::from_millis(1))) else { return };
        if flow.timer.is_none_or(|timer| at < timer) {
            if let Some(later) = flow.timer.replace(at) {
                sh.timers.cancel(later, TimerKey::Tcp(id));
            }
            sh.timers.set(at, TimerKey::Tcp(id));
        }
    }

    /// Ends a flow; `reset`: so that the host's peer notices that something went wrong.
    fn remove(&mut self, sh: &mut Shared, id: FlowId, reset: bool) {
        let Some(mut flow) = self.flows.remove(sh, id) else { return };
        self.by_key.remove(&flow.entry.key);
        if let Some(at) = flow.timer {
            sh.timers.cancel(at, TimerKey::Tcp(id));
        }
        let why = flow.why.unwrap_or(if reset { "failed" } else { "finished" });
        flow.entry.tell_end(sh, sh.now, why);
        match flow.phase {
            Phase::Connecting { .. } => sh.half_open -= 1,
            Phase::Open(socket) => {
                self.recycle(socket.into_rings(), flow.moved);
            }
        }
        match &flow.far {
            Far::Host(host) if reset => host::reset_on_close(host.fd.as_fd()),
            Far::Host(_) => {}
            Far::Dns(_) => self.dns_flows -= 1,
        }
    }
}

/// Whether the host lacks something, rather than the way to the peer.
fn is_want(errno: Errno) -> bool {
    matches!(errno, Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM)
}

/// Why a connection to the host's world did not come about, in a word.
fn failure_word(errno: Errno) -> &'static str {
    match errno {
        Errno::ECONNREFUSED => "refused-by-peer",
        Errno::ECONNRESET => "reset-by-peer",
        Errno::ETIMEDOUT => "timed-out",
        Errno::EHOSTUNREACH | Errno::ENETUNREACH => "unreachable",
        _ => "failed",
    }
}

/// A SYN as it is kept: no options of IP, no data.
fn held_syn(packet: &Packet<'_>) -> Vec<u8> {
    let segment = packet.payload();
    let header_len = segment.get(12).map_or(0, |offset| usize::from(offset >> 4) * 4);
    let header = segment.get(..header_len).unwrap_or(segment);
    ingress::rebuild(packet.src, packet.dst, ingress::TCP, packet.hop_limit, header)
}

/// A segment of data with a FIN, as one of the data and one of the FIN. smoltcp 0.14 cuts off what lies behind the end of
/// its window and takes the FIN that follows all the same: the cut would be lost, and nobody would know. A FIN alone it
/// takes only where its data ends.
fn fin_apart(packet: &Packet<'_>, segment: &TcpPacket<&[u8]>) -> [Vec<u8>; 2] {
    let rebuild =
        |segment: &[u8]| ingress::rebuild(packet.src, packet.dst, ingress::TCP, packet.hop_limit, segment);
    let whole = packet.payload();
    let mut data = whole.to_vec();
    TcpPacket::new_unchecked(&mut data[..]).set_fin(false);
    let mut fin = whole.get(..usize::from(segment.header_len())).unwrap_or(whole).to_vec();
    TcpPacket::new_unchecked(&mut fin[..]).set_seq_number(segment.seq_number() + segment.payload().len());
    [rebuild(&data), rebuild(&fin)]
}

/// What makes smoltcp 0.14 go on where data waits and no timer runs: acknowledgements of the guest's, which say again what
/// it has acknowledged, and that its window is closed.
///
/// There is no timer after one for retransmission that found the window closed: then they start that for window probes.
/// Nor is there one for data under way after one for window probes that found the window open again: then they are the
/// three that say that something was lost, after which it is sent, whatever the window is. The first one is for nothing
/// but to differ from the next, as only what is the same counts. The guest's answer tells what its window really is.
fn reminder(key: FlowKey, numbers: &Numbers) -> Option<[Vec<u8>; 5]> {
    let (seq, ack) = numbers.of_guest()?;
    let say = |window| emit::bare_segment(key.guest, key.remote, seq, ack, window);
    Some([1, 0, 0, 0, 0].map(say))
}

fn is_connecting(flows: &Flows<Flow>, id: FlowId) -> bool {
    flows.get(id).is_some_and(|flow| matches!(flow.phase, Phase::Connecting { .. }))
}

/// Sends what a socket has to send; how many segments that were.
fn send_segments(
    socket: &mut RingSocket,
    iface: &mut Interface,
    now: Instant,
    device: &mut FlowDevice<'_>,
) -> usize {
    // In FIN-WAIT-2 there is nothing to send but an acknowledgement. smoltcp sends it without end if the window was closed
    // when the FIN was acknowledged, since that does not stop its timer for window probes.
    let most = if socket.state() == State::FinWait2 { 1 } else { TURN_SEGMENTS };
    (0..most).take_while(|_| socket.poll_egress(iface, now, device)).count()
}

/// Whether `segment` says nothing but that it still waits for our FIN, if its acknowledgement is neither a new one nor that
/// of the FIN. After three of them smoltcp 0.14 looks for the first data to send again. There is none, and the timer that
/// would have brought the FIN again has been stopped: it would never come. Without them, it comes when its time is up.
///
/// That of the FIN may have been heard and still be news to smoltcp: the first may have come with the guest's own FIN when
/// that came again, in which smoltcp looks at nothing.
fn only_fin_is_missing(socket: &RingSocket, segment: &TcpPacket<&[u8]>) -> bool {
    matches!(socket.state(), State::FinWait1 | State::Closing | State::LastAck)
        && socket.send_queue() == 0
        && segment.payload().is_empty()
        && !(segment.syn() || segment.fin() || segment.rst())
}

/// Whether something of ours is on its way to the guest, which it has to acknowledge.
fn awaits_guest(socket: &RingSocket) -> bool {
    socket.send_queue() > 0
        || matches!(
            socket.state(),
            State::SynSent | State::SynReceived | State::FinWait1 | State::Closing | State::LastAck
        )
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Goes,
    /// The host's side is gone, and the guest must know.
    Broken,
}

/// What the guest's first bytes say, if that can be said yet. They stay where they are.
fn first_bytes(socket: &mut RingSocket, is_all: bool) -> Option<Hello> {
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
fn move_host(
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
