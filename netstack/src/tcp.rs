//! TCP flows: a smoltcp socket towards the guest, a plain host socket on the other side, two rings between them.
//!
//! States of a flow, and what each permits:
//!
//! - `Connecting`: the guest's SYN is held, the host socket connects. No smoltcp socket and no ring exists yet, so this
//!   is cheap (a descriptor and some hundred bytes), and their number is bounded (`MAX_HALF_OPEN` in `config.rs`); one more,
//!   and the oldest gives way. When the host socket is connected the held SYN is fed to a new smoltcp socket,
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
//! still has it (`FIN_WAIT_PROBE`), and one to the forwarder, which ends when it has been
//! idle for long enough.
//!
//! Work is per flow: frames find theirs by hash and mark it dirty, events likewise; only dirty flows are looked at, once
//! per turn of the engine, however many frames came. Acknowledgements are thereby sent once per turn, too.
//!
//! How a flow begins is in `tcp/begin.rs`; what it knows of the guest, in `tcp/guest.rs`; how data is moved, in
//! `tcp/relay.rs`; what smoltcp has to be helped with, in `tcp/quirks.rs`. What it has in common with joined connections
//! (`join.rs`) is in `flows.rs`.

mod begin;
mod guest;
mod quirks;
mod relay;
mod rings;

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use nix::sys::epoll::EpollFlags;
use nix::sys::socket::Shutdown;
use smoltcp::iface::{Interface, SocketSet};
use smoltcp::socket::tcp::State;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::TcpPacket;

use crate::calls::shutdown;
use crate::config::GUEST_SILENCE;
use crate::defect::At;
use crate::device::{FlowDevice, Said};
use crate::dns::stream::{Query, Stream};
use crate::emit::{self, Unreachable};
use crate::flow::{Endpoint, FlowId, FlowKey, TimerKey};
use crate::flows::{Entry, Flows, TcpFlow};
use crate::host;
use crate::ingress::{self, Packet};
use crate::policy::hello::Hello;
use crate::policy::{Transport, Verdict};
use crate::shared::Shared;
use crate::side::Side;
use crate::sys::RingSocket;
use crate::udp;
use begin::failure_word;
use guest::{Numbers, Silence};
use quirks::{fin_apart, only_fin_is_missing, reminder, send_segments};
use relay::{Allowance, Fate, first_bytes, move_host};
use rings::{KEEP_WARM, Pool};

/// Bytes moved for one flow before the others get their turn.
const TURN_BUDGET: usize = 1024 * 1024;
/// Segments sent for one flow before the others get their turn.
const TURN_SEGMENTS: usize = 1024;
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
    pool: Pool,
    /// Queries to be fetched by the engine.
    pub(crate) dns_queries: Vec<Query>,
}

impl std::fmt::Debug for Tcp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tcp").field("flows", &self.flows.len()).finish_non_exhaustive()
    }
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
            pool: Pool::default(),
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
        use crate::config::{
            MAX_DNS_CONNECTIONS, MAX_DNS_PIPELINE, MAX_HALF_OPEN, MAX_TCP_FLOWS, QUEUE_SLACK, RING_POOL,
        };
        assert!(self.flows.len() <= MAX_TCP_FLOWS && self.by_key.len() == self.flows.len());
        let dns = self.flows.iter().filter(|(_, flow)| matches!(flow.far, Far::Dns(_))).count();
        assert!(self.dns_flows == dns && dns <= MAX_DNS_CONNECTIONS);
        assert!(self.pool.len() <= RING_POOL && self.connecting.len() <= 2 * MAX_HALF_OPEN + QUEUE_SLACK);
        assert!(self.arriving.len() <= 2 * MAX_TCP_FLOWS + QUEUE_SLACK);
        assert!(self.dns_bytes() <= self.dns_flows * (2 + MAX_DNS_PIPELINE) * 65_537);
        assert!(self.held_bytes() <= self.half_open() * 256);
    }

    /// Every host socket, by its flow, and what it is watched for.
    #[cfg(test)]
    pub(crate) fn each_host(&self, mut each: impl FnMut(BorrowedFd<'_>, FlowId, EpollFlags)) {
        for (id, flow) in self.flows.iter() {
            if let Far::Host(host) = &flow.far {
                each(host.fd.as_fd(), id, crate::side::WATCHED);
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

    /// Something happened to a host socket.
    pub(crate) fn host_event(&mut self, sh: &mut Shared, now: Instant, id: FlowId, events: EpollFlags) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        let Far::Host(host) = &mut flow.far else { return };
        if let Phase::Connecting { syn } = &flow.phase {
            let Some(outcome) = host.connect_outcome(events) else { return };
            host.readable = true;
            host.writable = true;
            host.more_behind = events.intersects(EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLPRI);
            match outcome {
                Ok(()) => self.establish(sh, now, id),
                Err(errno) => {
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
        let mut turn = self.flows.turn();
        // While the TAP takes no frames flows rest.
        while !sh.tap.is_blocked()
            && let Some(id) = self.flows.next_marked(&mut turn)
        {
            self.look_after(sh, now, id);
        }
        self.flows.have_work() && !sh.tap.is_blocked()
    }

    /// Looks after one flow, once the TAP takes frames.
    pub(crate) fn look_after(&mut self, sh: &mut Shared, now: Instant, id: FlowId) {
        if sh.tap.is_blocked() {
            return self.flows.mark(id);
        }
        sh.begin(At::Flow(id));
        self.service(sh, now, id);
    }

    fn service(&mut self, sh: &mut Shared, now: Instant, id: FlowId) {
        let many = self.flows.len() > MANY;
        let [sent, received] = [sh.sent.share(), sh.received.share()];
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
                self.pool.give_back(socket.into_rings(), flow.moved);
            }
        }
        match &flow.far {
            Far::Host(host) if reset => host::reset_on_close(host.fd.as_fd()),
            Far::Host(_) => {}
            Far::Dns(_) => self.dns_flows -= 1,
        }
    }
}

fn is_connecting(flows: &Flows<Flow>, id: FlowId) -> bool {
    flows.get(id).is_some_and(|flow| matches!(flow.phase, Phase::Connecting { .. }))
}

/// Whether something of ours is on its way to the guest, which it has to acknowledge.
fn awaits_guest(socket: &RingSocket) -> bool {
    socket.send_queue() > 0
        || matches!(
            socket.state(),
            State::SynSent | State::SynReceived | State::FinWait1 | State::Closing | State::LastAck
        )
}
