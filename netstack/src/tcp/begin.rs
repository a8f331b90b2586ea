//! How a connection begins, from the guest or to it, and what gives way to it.

use std::net::SocketAddr;
use std::os::fd::AsFd;

use nix::errno::Errno;
use smoltcp::time::{Duration, Instant};

use super::guest::{Numbers, Silence};
use super::{Far, Flow, Phase, Tcp, is_connecting};
use crate::config::{HALF_OPEN_SPARE, INBOUND_CONNECT, MAX_DNS_CONNECTIONS};
use crate::device::FlowDevice;
use crate::dns::stream::Stream;
use crate::emit::{self, IcmpError, Unreachable};
use crate::flow::{FlowId, FlowKey, enqueue};
use crate::flowlog::{Account, FlowEventKind};
use crate::flows::Entry;
use crate::host::{self, HostFd};
use crate::ingress::{self, Packet};
use crate::policy::{Transport, Verdict};
use crate::shared::{Shared, Token};
use crate::side::{Side, WATCHED};
use crate::sys::RingSocket;
use crate::udp;

/// Connections that are looked at for one that may give way, each time there is no descriptor for another.
const SPARE_TURN: usize = 64;

impl Tcp {
    /// A SYN for a new flow.
    pub(super) fn outbound(&mut self, sh: &mut Shared, now: Instant, key: FlowKey, packet: &Packet<'_>) {
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
        if sh.tcp_flows >= sh.most_tcp_flows && !self.spare(sh) {
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
        let flows = &self.flows;
        enqueue(&mut self.connecting, id, sh.half_open, |&id| is_connecting(flows, id));
    }

    fn outbound_dns(&mut self, sh: &mut Shared, now: Instant, key: FlowKey, packet: &Packet<'_>) {
        if self.dns_flows >= MAX_DNS_CONNECTIONS || sh.tcp_flows >= sh.most_tcp_flows && !self.spare(sh) {
            sh.stats.refused_by_limit.one();
            return self.refuse(sh, now, packet);
        }
        let syn = held_syn(packet);
        sh.half_open += 1;
        self.dns_flows += 1;
        let id = self.insert(sh, now, key, Phase::Connecting { syn }, Far::Dns(Stream::default()));
        self.establish(sh, now, id);
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

    /// Ends a connection of either direction that nobody has taken for long enough, so that another gets its place or its
    /// descriptor; whether there was one. Those to outside that have waited for longest come first.
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

    /// A connection to a published port has been accepted. The server inside may be reached in two ways, which are tried
    /// one after the other.
    pub(crate) fn inbound(&mut self, sh: &mut Shared, now: Instant, fd: HostFd, ways: [FlowKey; 2]) {
        let refuse = |sh: &mut Shared, fd: HostFd| {
            sh.stats.refused_by_limit.one();
            host::reset_on_close(fd.as_fd());
        };
        let [way, other] = ways;
        if sh.tcp_flows >= sh.most_tcp_flows {
            return refuse(sh, fd);
        }
        let others = self.flows.len();
        let Some((key, socket)) = self.connect_inside(sh, way, others) else { return refuse(sh, fd) };
        host::tune_tcp(fd.as_fd());
        let far = Far::Host(Side::connected(fd));
        let id = self.insert(sh, now, key, Phase::Open(Box::new(socket)), far);
        sh.stats.tcp_in.one();
        let flows = &self.flows;
        enqueue(&mut self.arriving, id, flows.len(), |&id| {
            flows.get(id).is_some_and(|flow| !flow.numbers.is_taken())
        });
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
        let mut socket = self.pool.socket(others)?;
        socket.connect(&mut self.iface, key.guest.into(), key.remote.into()).ok()?;
        Some((key, socket))
    }

    /// The server inside does not listen where it was looked for first.
    pub(super) fn try_other_way(&mut self, sh: &mut Shared, now: Instant, id: FlowId, way: FlowKey) {
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
        flow.entry.account = Account::new(now);
        let before = std::mem::replace(&mut flow.phase, Phase::Open(Box::new(socket)));
        flow.inbound_until = Some(now + INBOUND_CONNECT);
        flow.silence = Silence::new(now);
        flow.numbers = Numbers::default();
        if let Phase::Open(socket) = before {
            self.pool.give_back(socket.into_rings(), 0);
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

    /// The other side is there: lets smoltcp answer the held SYN.
    pub(super) fn establish(&mut self, sh: &mut Shared, now: Instant, id: FlowId) {
        let others = self.flows.len().saturating_sub(1);
        let opened = self.pool.socket(others);
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
    pub(super) fn fail_syn(&mut self, sh: &mut Shared, now: Instant, packet: &Packet<'_>, errno: Errno) {
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
}

/// A SYN as it is kept: no options of IP, no data.
fn held_syn(packet: &Packet<'_>) -> Vec<u8> {
    let segment = packet.payload();
    let header_len = segment.get(12).map_or(0, |offset| usize::from(offset >> 4) * 4);
    let header = segment.get(..header_len).unwrap_or(segment);
    ingress::rebuild(packet.src, packet.dst, ingress::TCP, packet.hop_limit, header)
}

/// Whether the host lacks something, rather than the way to the peer.
fn is_want(errno: Errno) -> bool {
    matches!(errno, Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM)
}

/// Why a connection to the host's world did not come about, in a word.
pub(super) fn failure_word(errno: Errno) -> &'static str {
    match errno {
        Errno::ECONNREFUSED => "refused-by-peer",
        Errno::ECONNRESET => "reset-by-peer",
        Errno::ETIMEDOUT => "timed-out",
        Errno::EHOSTUNREACH | Errno::ENETUNREACH => "unreachable",
        _ => "failed",
    }
}
