//! UDP: one host socket for each address and port that the guest sends from.
//!
//! The mapping is endpoint-independent (RFC 4787 REQ-1): whatever destinations the guest talks to from one port, the
//! world sees one port of the host, so that protocols which tell a third party about it work. What comes in is filtered
//! by address (REQ-8): it must be from an address that the guest has sent to, any port of it. A destination passes the
//! policy when it is first used, and again when that is [`VERDICT_AGE`] ago, since the host's addresses change while it
//! joins other networks; [`MAX_UDP_PEERS`] are remembered, the longest unused forgotten first.
//!
//! Ends by idleness only: [`UDP_IDLE`] after the last datagram either way, [`UDP_UNANSWERED`] if nothing ever came back,
//! [`UDP_DNS_IDLE`] for flows to port 53. When the table or the descriptors are full, the longest idle flow gives way:
//! a guest that sends from, or to, a million ports costs a bounded number of sockets.
//!
//! ICMP errors come out of the host socket's error queue (ip(7), IP_RECVERR) and are sent on with the guest's own
//! datagram as the cause, and with their extensions (RFC 4884). Datagrams from the guest have been put together from their
//! fragments before they come here.
//!
//! Datagrams that follow each other to the same destination, of one size but for the last, go to the kernel by one call
//! (udp(7), UDP_SEGMENT): they wait in `Outgoing` while there are frames to be read. What the kernel has put together
//! (UDP_GRO) is taken apart here, and put together again for the guest by [`Tap`](crate::device::Tap).
//!
//! A socket is bound to no address: where one is configured for what leaves the host, each datagram says it, for others
//! from the same port go to the host's loopback.
//!
//! Published ports have flows of their own (`Inbound`), since their answers must leave from the published socket. The
//! server inside may listen on one family only. Where it answers is remembered for each socket; until it has answered, the
//! last datagram is kept, and if the guest's kernel says that nobody wants it, it goes the other way.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::io::{IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, sockopt};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::UdpPacket;

use crate::calls::{self, recvmsg, sendmsg};
use crate::config::{
    MAX_UDP_INBOUND, MAX_UDP_PEERS, MAX_UDP_SOCKETS, QUEUE_SLACK, UDP_DNS_IDLE, UDP_IDLE, UDP_SPARE,
    UDP_UNANSWERED, VERDICT_AGE,
};
use crate::device::{MAX_RUN, MAX_RUN_BYTES};
use crate::emit::{self, IcmpError, Unreachable};
use crate::flow::{Endpoint, FlowId, FlowKey, Slab, TimerKey};
use crate::flowlog::{Account, EachFlow, FlowEventKind};
use crate::forward::Forward;
use crate::host::{self, HostFd};
use crate::ingress::{self, Packet};
use crate::policy::{DNS_PORT, Transport, Verdict};
use crate::shared::{Shared, Token};

/// What epoll tells of a datagram socket, each time it becomes so. (Errors it tells always.)
pub(crate) const READABLE: EpollFlags = EpollFlags::EPOLLIN.union(EpollFlags::EPOLLET);
/// Datagrams read from one socket before others get their turn.
const TURN_DATAGRAMS: usize = 64;
/// Hop limits below this are passed on, one less, so that traceroute works; others mean "far enough".
const TRACEROUTE_HOPS: u8 = 40;
/// Ports that a peer may get which looks like another one to the guest.
const STAND_INS: u8 = 8;

/// A destination of a flow.
#[derive(Debug)]
struct Peer {
    /// As the guest sees it.
    seen: Endpoint,
    /// As the host sees it.
    real: SocketAddr,
    used: Instant,
    /// When the policy was asked last.
    asked: Instant,
    /// See [`Shared::name_for`].
    name: Option<Arc<str>>,
    account: Account,
}

#[derive(Debug)]
struct Flow {
    guest: Endpoint,
    fd: HostFd,
    peers: Vec<Peer>,
    used: Instant,
    answered: bool,
    /// The way to some destination takes no super-segments.
    single: bool,
}

impl Flow {
    fn tell_closed(&self, sh: &Shared, peer: &Peer, reason: &'static str) {
        let key = FlowKey { guest: self.guest, remote: peer.seen };
        sh.tell(Transport::Udp, false, key, peer.account.closed(sh.now, reason));
    }

    /// When it has been idle for too long.
    fn until(&self) -> Instant {
        let lifetime = if self.peers.iter().all(|peer| peer.seen.port == DNS_PORT) {
            UDP_DNS_IDLE
        } else if self.answered {
            UDP_IDLE
        } else {
            UDP_UNANSWERED
        };
        self.used + lifetime
    }
}

/// A flow that began outside, at a published port.
#[derive(Debug)]
struct Inbound {
    arrival: Arrival,
    used: Instant,
    account: Account,
}

/// How a datagram came to a published socket.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival {
    /// The socket.
    pub(crate) port: FlowId,
    /// The peer.
    pub(crate) real: SocketAddr,
    /// The host's address that it was sent to: answers must come from it.
    pub(crate) local: Option<IpAddr>,
    /// Where in the guest it may go, and from whom it then seems to be.
    pub(crate) ways: [FlowKey; 2],
}

impl Arrival {
    /// What the way to the server is remembered for: the socket, and which way it would be tried first.
    fn lane(&self) -> (FlowId, bool) {
        (self.port, self.ways[0].guest.ip.is_ipv6())
    }
}

/// What is known of the server behind a published socket.
#[derive(Debug, Default)]
struct Server {
    /// It listens where it is looked for second.
    other: bool,
    /// It has answered there.
    answered: bool,
    /// The last datagram, as long as it has not.
    last: Option<(FlowKey, Vec<u8>)>,
}

/// Datagrams of the guest's that go to the host's kernel together.
#[derive(Debug, Default)]
struct Outgoing {
    /// The flow, and the destination as the guest and as the host sees it; `None` if there are none.
    to: Option<(FlowId, Endpoint, SocketAddr)>,
    /// Payload of each but the last.
    size: usize,
    count: usize,
    /// Payload of all: [`MAX_RUN_BYTES`] at most.
    payload: Vec<u8>,
}

impl Outgoing {
    /// Whether another datagram of `len` bytes may follow.
    fn takes(&self, to: (FlowId, Endpoint, SocketAddr), len: usize) -> bool {
        self.to == Some(to)
            && (1..=self.size).contains(&len)
            // A shorter one is the last.
            && self.payload.len() == self.count * self.size
            && self.count < MAX_RUN
            && self.payload.len() + len <= MAX_RUN_BYTES
    }
}

/// All UDP flows.
#[derive(Debug, Default)]
pub(crate) struct Udp {
    flows: Slab<Flow>,
    by_guest: HashMap<Endpoint, FlowId>,
    inbound: HashMap<FlowKey, Inbound>,
    /// By [`Arrival::lane`]: two for each published socket at most.
    servers: HashMap<(FlowId, bool), Server>,
    /// Keys the ports of peers that would look like others.
    stand_ins: RandomState,
    outgoing: Outgoing,
    /// Until then no flow is idle for so long that it gives way to a connection.
    none_to_spare_until: Option<Instant>,
}

impl Udp {
    #[cfg(test)]
    pub(crate) fn check_bounds(&self) {
        assert!(self.flows.len() <= MAX_UDP_SOCKETS && self.by_guest.len() == self.flows.len());
        assert!(self.flows.iter().all(|(_, flow)| flow.peers.len() <= MAX_UDP_PEERS));
        assert!(self.outgoing.to.is_none() && self.outgoing.payload.capacity() <= 2 * MAX_RUN_BYTES);
        assert!(self.inbound.len() <= MAX_UDP_INBOUND && self.servers.len() <= 4);
    }

    /// For how many peers of published ports there is room.
    #[cfg(test)]
    pub(crate) fn room_for_peers(&self) -> usize {
        self.inbound.capacity()
    }

    /// A whole datagram from the guest. The engine has given those for the forwarder to it before.
    pub(crate) fn ingress(&mut self, sh: &mut Shared, now: Instant, packet: &Packet<'_>, ports: &Forward) {
        let Ok(datagram) = UdpPacket::new_checked(packet.payload()) else {
            sh.stats.dropped_malformed.one();
            return;
        };
        let key = FlowKey {
            guest: Endpoint::new(packet.src, datagram.src_port()),
            remote: Endpoint::new(packet.dst, datagram.dst_port()),
        };
        if key.guest.port == 0 || key.remote.port == 0 {
            sh.stats.dropped_malformed.one();
            return;
        }
        let payload = datagram.payload();
        let size = packet.datagram_size.unwrap_or(usize::MAX);
        if let Some(inbound) = self.inbound.get_mut(&key) {
            inbound.used = now;
            let Some(payload) = admit(sh, payload, size) else { return };
            parts(payload, size).for_each(|part| inbound.account.sent.add(part.len()));
            let Arrival { port, real, local, ways } = inbound.arrival;
            let server = self.servers.entry(inbound.arrival.lane()).or_default();
            *server = Server { other: key.guest == ways[1].guest, answered: true, last: None };
            if let Some(fd) = ports.udp_socket(port) {
                for part in parts(payload, size) {
                    let how = Sending { hops: None, from: local };
                    let sent = send_to(fd, part, part.len(), real, how);
                    count_send(sh, sent);
                }
            }
            return;
        }
        let Some((id, real)) = self.route(sh, now, packet, key) else { return };
        let Some(payload) = admit(sh, payload, size) else { return };
        if let Some(peer) = self.flows.get_mut(id).and_then(|flow| flow.peers.first_mut()) {
            parts(payload, size).for_each(|part| peer.account.sent.add(part.len()));
        }
        let to = (id, key.remote, real);
        let hops = (packet.hop_limit < TRACEROUTE_HOPS).then_some(packet.hop_limit.saturating_sub(1));
        for part in parts(payload, size) {
            if hops.is_some() {
                self.flush(sh);
                self.send(sh, to, part, part.len(), hops);
                continue;
            }
            if !self.outgoing.takes(to, part.len()) {
                self.flush(sh);
                self.outgoing.to = Some(to);
                self.outgoing.size = part.len();
            }
            self.outgoing.count += 1;
            self.outgoing.payload.extend_from_slice(part);
        }
    }

    /// Sends the datagrams that wait for others.
    pub(crate) fn flush(&mut self, sh: &mut Shared) {
        let Some(to) = self.outgoing.to.take() else { return };
        let mut payload = std::mem::take(&mut self.outgoing.payload);
        self.outgoing.count = 0;
        let single = self.flows.get(to.0).is_some_and(|flow| flow.single);
        if single || !self.send(sh, to, &payload, self.outgoing.size, None) {
            for part in parts(&payload, self.outgoing.size) {
                self.send(sh, to, part, part.len(), None);
            }
        }
        payload.clear();
        self.outgoing.payload = payload;
    }

    /// Sends datagrams of `size` bytes each; false if they have to be sent one by one.
    fn send(
        &mut self,
        sh: &mut Shared,
        to: (FlowId, Endpoint, SocketAddr),
        payload: &[u8],
        size: usize,
        hops: Option<u8>,
    ) -> bool {
        let (id, seen, real) = to;
        let how = Sending { hops, from: sh.budget.outbound.towards(real.ip()) };
        let mut tries = 0;
        let errno = loop {
            let Some(flow) = self.flows.get_mut(id) else { break Errno::EBADF };
            match send_to(&flow.fd, payload, size, real, how) {
                Ok(()) => return true,
                // The least size that some hop's link has is less than theirs, or the device finishes no checksums.
                Err(Errno::EINVAL | Errno::EIO | Errno::EMSGSIZE | Errno::EOPNOTSUPP)
                    if payload.len() > size =>
                {
                    flow.single = true;
                    return false;
                }
                // A pending error of an earlier datagram is reported once, by whatever call comes next.
                Err(errno) if errno != Errno::EAGAIN && tries == 0 => self.errors(sh, id),
                Err(errno) => break errno,
            }
            tries += 1;
        };
        match (Unreachable::from_errno(errno), self.flows.get(id)) {
            (Some(what), Some(flow)) => {
                let guest = flow.guest;
                let first = payload.get(..size).unwrap_or(payload);
                let original = emit::original_udp(guest, seen, first);
                if let Ok(packet) = ingress::parse_ip(&original, true) {
                    unreachable(sh, &packet, what);
                }
            }
            _ => sh.stats.dropped_datagrams.add(parts(payload, size).count()),
        }
        true
    }

    /// The guest's flow, and where in the host's world a datagram of it goes. Both are made if need be.
    fn route(
        &mut self,
        sh: &mut Shared,
        now: Instant,
        packet: &Packet<'_>,
        key: FlowKey,
    ) -> Option<(FlowId, SocketAddr)> {
        let known = self.by_guest.get(&key.guest).copied();
        if let Some(id) = known
            && let Some(flow) = self.flows.get_mut(id)
            && let Some(at) = flow.peers.iter().position(|peer| peer.seen == key.remote)
        {
            // The next one is probably for the same.
            flow.peers.swap(0, at);
            let peer = flow.peers.first_mut()?;
            if now >= peer.asked + VERDICT_AGE {
                // The host may have got this address since.
                match sh.decide_again(Transport::Udp, key.remote, peer.name.as_ref()) {
                    Verdict::Allow(real) | Verdict::Peek(real) => (peer.real, peer.asked) = (real, now),
                    Verdict::Gateway => return None,
                    Verdict::Refuse(reason) => {
                        let peer = flow.peers.swap_remove(0);
                        flow.tell_closed(sh, &peer, "policy");
                        if sh.refused(Transport::Udp, key, reason) {
                            unreachable(sh, packet, Unreachable::Prohibited);
                        }
                        return None;
                    }
                }
            }
            flow.used = now;
            peer.used = now;
            return Some((id, peer.real));
        }
        // Refused destinations do not deserve a socket.
        let real = match sh.decide(Transport::Udp, key.remote) {
            Verdict::Allow(real) | Verdict::Peek(real) => real,
            Verdict::Gateway => return None,
            Verdict::Refuse(reason) => {
                if sh.refused(Transport::Udp, key, reason) {
                    unreachable(sh, packet, Unreachable::Prohibited);
                }
                return None;
            }
        };
        let id = match known {
            Some(id) => id,
            None => self.open(sh, now, packet, key)?,
        };
        let flow = self.flows.get_mut(id)?;
        flow.used = now;
        if flow.peers.len() >= MAX_UDP_PEERS
            && let Some(oldest) = (0..flow.peers.len()).min_by_key(|&i| flow.peers[i].used)
        {
            let oldest = flow.peers.swap_remove(oldest);
            flow.tell_closed(sh, &oldest, "evicted");
        }
        let account = Account::new(now);
        let name = sh.name_for(key.remote.ip);
        flow.peers.insert(0, Peer { seen: key.remote, real, used: now, asked: now, name, account });
        sh.tell(Transport::Udp, false, key, FlowEventKind::Opened);
        Some((id, real))
    }

    /// Makes a flow for what the guest sends from one port.
    fn open(&mut self, sh: &mut Shared, now: Instant, packet: &Packet<'_>, key: FlowKey) -> Option<FlowId> {
        let guest = key.guest;
        let most = MAX_UDP_SOCKETS.min(sh.budget.limit / 4).max(8);
        if self.flows.len() >= most {
            self.evict(sh);
        }
        let mut opened = host::datagram_socket(&sh.budget, guest.ip, None);
        if matches!(opened, Err(Errno::EMFILE | Errno::ENFILE)) && self.evict(sh) {
            opened = host::datagram_socket(&sh.budget, guest.ip, None);
        }
        let fd = match opened {
            Ok(fd) => {
                want_runs(sh, &fd);
                fd
            }
            Err(errno) => {
                tracing::debug!(%errno, "no socket for a UDP flow");
                sh.refused_by_limit(Transport::Udp, key);
                unreachable(sh, packet, Unreachable::Prohibited);
                return None;
            }
        };
        let id = self.flows.insert_with(|_| Flow {
            guest,
            fd,
            peers: Vec::new(),
            used: now,
            answered: false,
            single: false,
        });
        self.by_guest.insert(guest, id);
        sh.stats.udp_flows.set(self.flows.len());
        let flow = self.flows.get(id)?;
        if let Err(errno) = sh.watch(flow.fd.as_fd(), Token::Udp(id), READABLE) {
            tracing::debug!(%errno, "no socket for a UDP flow");
            self.remove(sh, id, "failed");
            sh.refused_by_limit(Transport::Udp, key);
            unreachable(sh, packet, Unreachable::Prohibited);
            return None;
        }
        sh.timers.set(now + UDP_DNS_IDLE, TimerKey::Udp);
        Some(id)
    }

    /// Closes the flows that have been idle for longest; whether there were any.
    fn evict(&mut self, sh: &mut Shared) -> bool {
        let oldest = self.flows.first_by(|flow| flow.used);
        sh.stats.evicted.add(oldest.len());
        for &id in &oldest {
            self.remove(sh, id, "evicted");
        }
        !oldest.is_empty()
    }

    /// Closes the flows that have been idle for longest, and long enough, so that connections get their descriptors.
    pub(crate) fn spare(&mut self, sh: &mut Shared, now: Instant) {
        // A flood of connections does not look at all flows each time.
        if self.none_to_spare_until.is_some_and(|until| now < until) {
            return;
        }
        let mut soonest = now + UDP_SPARE;
        for id in self.flows.first_by(|flow| flow.used) {
            let Some(idle_at) = self.flows.get(id).map(|flow| flow.used + UDP_SPARE) else { continue };
            if idle_at <= now {
                sh.stats.evicted.one();
                self.remove(sh, id, "evicted");
            }
            soonest = soonest.min(idle_at);
        }
        self.none_to_spare_until = Some(soonest);
    }

    fn remove(&mut self, sh: &mut Shared, id: FlowId, reason: &'static str) {
        if let Some(flow) = self.flows.remove(id) {
            flow.peers.iter().for_each(|peer| flow.tell_closed(sh, peer, reason));
            self.by_guest.remove(&flow.guest);
            sh.stats.udp_flows.set(self.flows.len());
            sh.descriptor_freed = true;
        }
    }

    /// Forgets the destinations that are not allowed any more.
    pub(crate) fn review(&mut self, sh: &mut Shared) {
        let ids: Vec<FlowId> = self.flows.iter().map(|(id, _)| id).collect();
        for id in ids {
            let Some(flow) = self.flows.get_mut(id) else { continue };
            for mut peer in std::mem::take(&mut flow.peers) {
                match sh.decide_again(Transport::Udp, peer.seen, peer.name.as_ref()) {
                    Verdict::Allow(real) | Verdict::Peek(real) => {
                        (peer.real, peer.asked) = (real, sh.now);
                        peer.name = sh.name_for(peer.seen.ip).or(peer.name);
                        flow.peers.push(peer);
                    }
                    _ => flow.tell_closed(sh, &peer, "policy"),
                }
            }
        }
    }

    /// Where the flow `id` is from.
    pub(crate) fn guest(&self, id: FlowId) -> Option<Endpoint> {
        self.flows.get(id).map(|flow| flow.guest)
    }

    /// Everything that is there.
    pub(crate) fn each_flow(&self, each: &mut EachFlow<'_>) {
        for (_, flow) in self.flows.iter() {
            for peer in &flow.peers {
                let key = FlowKey { guest: flow.guest, remote: peer.seen };
                each(Transport::Udp, false, key, &peer.account);
            }
        }
        for (key, flow) in &self.inbound {
            each(Transport::Udp, true, *key, &flow.account);
        }
    }

    /// Ends flows of published ports but for some.
    fn keep_inbound(&mut self, sh: &Shared, reason: &'static str, keep: impl Fn(&Inbound) -> bool) {
        self.inbound.retain(|key, flow| {
            let kept = keep(flow);
            if !kept {
                sh.tell(Transport::Udp, true, *key, flow.account.closed(sh.now, reason));
            }
            kept
        });
        // What a flood of peers had need of is given back.
        let most = 4 * self.inbound.len() + QUEUE_SLACK;
        if self.inbound.capacity() > most {
            self.inbound.shrink_to(most / 2);
        }
    }

    /// Closes what has been idle for too long.
    pub(crate) fn timer(&mut self, sh: &mut Shared, now: Instant) {
        let expired: Vec<FlowId> =
            self.flows.iter().filter(|(_, flow)| flow.until() <= now).map(|(id, _)| id).collect();
        for id in expired {
            self.remove(sh, id, "idle");
        }
        self.keep_inbound(sh, "idle", |flow| flow.used + UDP_IDLE > now);
        let next = self.flows.iter().map(|(_, flow)| flow.until());
        if let Some(at) = next.chain(self.inbound.values().map(|flow| flow.used + UDP_IDLE)).min() {
            // Once a second is enough, however many flows there are.
            sh.timers.set(at.max(now + Duration::from_secs(1)), TimerKey::Udp);
        }
    }

    /// The flow's host socket has something to say.
    pub(crate) fn host_event(&mut self, sh: &mut Shared, now: Instant, id: FlowId, events: EpollFlags) {
        if sh.tap.is_blocked() {
            return sh.come_back(Token::Udp(id));
        }
        if events.intersects(EpollFlags::EPOLLERR) {
            self.errors(sh, id);
        }
        let Some(Flow { guest, fd, peers, used, answered, .. }) = self.flows.get_mut(id) else { return };
        read_all(sh, Token::Udp(id), fd, |sh, datagram, from, _| {
            let Some(peer) = peers.iter_mut().find(|peer| peer.real.ip() == from.ip()) else {
                return sh.stats.dropped_datagrams.one();
            };
            peer.used = now;
            peer.account.received.add(datagram.len());
            *used = now;
            *answered = true;
            emit::udp(&mut sh.tap, Endpoint::new(peer.seen.ip, from.port()), *guest, datagram);
        });
    }

    /// Turns what the error queue holds into ICMP errors.
    fn errors(&mut self, sh: &mut Shared, id: FlowId) {
        let Some(flow) = self.flows.get(id) else { return };
        // The kernel bounds the queue.
        while let Ok(error) = receive_error(&flow.fd) {
            let Some(error) = error else { continue };
            let Some(peer) = flow.peers.iter().find(|peer| peer.real == error.destination) else { continue };
            let Some(icmp) = error.icmp else { continue };
            if sh.tap.is_congested() {
                continue;
            }
            let original = emit::original_udp(flow.guest, peer.seen, &error.payload);
            // The gateway that stands for loopback must not be told apart.
            let (from, extension) = error.complaint().unwrap_or((peer.seen.ip, &[]));
            emit::extended_icmp_error(&mut sh.tap, from, flow.guest.ip, icmp, &original, extension);
        }
        // A pending error would fail the next datagram.
        let _ = host::socket_error(flow.fd.as_fd());
    }

    /// A datagram has come to a published socket.
    pub(crate) fn inbound(&mut self, sh: &mut Shared, now: Instant, arrival: Arrival, payload: &[u8]) {
        let way = arrival.ways[usize::from(self.servers.entry(arrival.lane()).or_default().other)];
        let Some(key) = self.inbound_key(way, arrival) else { return sh.stats.dropped_datagrams.one() };
        if !self.inbound.contains_key(&key) && self.inbound.len() >= MAX_UDP_INBOUND {
            let mut ages: Vec<Instant> = self.inbound.values().map(|flow| flow.used).collect();
            let (_, &mut limit, _) = ages.select_nth_unstable(MAX_UDP_INBOUND / 16);
            self.keep_inbound(sh, "evicted", |flow| flow.used > limit);
            sh.stats.evicted.add(MAX_UDP_INBOUND.saturating_sub(self.inbound.len()));
        }
        let flow = self.inbound.entry(key).or_insert_with(|| {
            sh.tell(Transport::Udp, true, key, FlowEventKind::Opened);
            Inbound { arrival, used: now, account: Account::new(now) }
        });
        (flow.arrival, flow.used) = (arrival, now);
        flow.account.received.add(payload.len());
        sh.timers.set(now + UDP_IDLE, TimerKey::Udp);
        let server = self.servers.entry(arrival.lane()).or_default();
        // Long ones are not worth the memory: thousands of ports may be published.
        server.last = (!server.answered && payload.len() <= sh.tap.mtu).then(|| (key, payload.to_vec()));
        emit::udp(&mut sh.tap, key.remote, key.guest, payload);
    }

    /// By which key a peer's flow is known that would be `key`, but for others. Two peers may look alike to the guest, if
    /// both appear as the gateway, or one peer at two published ports. The second one then seems to send from another port,
    /// which is the same for as long as it has a flow; nobody outside can tell it, and so take it from him.
    fn inbound_key(&self, key: FlowKey, arrival: Arrival) -> Option<FlowKey> {
        let is_own = |flow: &Inbound| (flow.arrival.real, flow.arrival.port) == (arrival.real, arrival.port);
        if self.inbound.get(&key).is_some_and(is_own) {
            return Some(key);
        }
        let stand_ins = (0..STAND_INS).map(|nth| {
            let [a, b, ..] = self.stand_ins.hash_one((arrival.real, arrival.port, nth)).to_ne_bytes();
            let port = u16::from_ne_bytes([a, b]) | 0x8000;
            FlowKey { remote: Endpoint::new(key.remote.ip, port), ..key }
        });
        // Its flow may be at any of them, now that those are free which once were not.
        let own = stand_ins.clone().find(|key| self.inbound.get(key).is_some_and(is_own));
        own.or_else(|| std::iter::once(key).chain(stand_ins).find(|key| !self.inbound.contains_key(key)))
    }

    /// A published socket is closed.
    pub(crate) fn forget_port(&mut self, sh: &Shared, port: FlowId) {
        self.keep_inbound(sh, "unpublished", |flow| flow.arrival.port != port);
        self.servers.retain(|&(of, _), _| of != port);
    }

    /// The guest's kernel says that nobody wanted a datagram.
    pub(crate) fn refused(&mut self, sh: &mut Shared, now: Instant, key: FlowKey) {
        let Some(Inbound { arrival, account, .. }) = self.inbound.remove(&key) else { return };
        sh.tell(Transport::Udp, true, key, account.closed(now, "refused-inside"));
        let server = self.servers.entry(arrival.lane()).or_default();
        let tried = key.guest == arrival.ways[1].guest;
        // A flow of the way that is not taken any more says nothing about the other.
        if server.other != tried {
            return;
        }
        server.other = !tried;
        server.answered = false;
        if let Some((last, payload)) = server.last.take()
            && last == key
        {
            self.inbound(sh, now, arrival, &payload);
            // Once: it is lost if nobody wants it there either.
            self.servers.entry(arrival.lane()).or_default().last = None;
        }
    }
}

/// The payloads of datagrams of `size` bytes each. One may be empty.
fn parts(payload: &[u8], size: usize) -> impl Iterator<Item = &[u8]> {
    let empty = payload.is_empty().then_some(payload);
    payload.chunks(size.max(1)).chain(empty)
}

/// The datagrams of the guest's that may go now, of those that came together: the first of them, or `None`. The others are
/// lost.
fn admit<'a>(sh: &mut Shared, payload: &'a [u8], size: usize) -> Option<&'a [u8]> {
    let admitted = sh.sent.admit_run(parts(payload, size).map(<[u8]>::len));
    sh.stats.dropped_datagrams.add(parts(payload, size).count() - admitted);
    let len = payload.len().min(size.max(1).saturating_mul(admitted));
    payload.get(..len).filter(|_| admitted > 0)
}

/// Sends an ICMP error about the guest's packet.
pub(crate) fn unreachable(sh: &mut Shared, packet: &Packet<'_>, what: Unreachable) {
    if emit::deserves_icmp_error(packet) && !sh.tap.is_congested() {
        let from = sh.spec.gateway.ip_like(packet.dst);
        let error = IcmpError::unreachable(packet.is_v6(), what);
        emit::icmp_error(&mut sh.tap, from, packet.src, error, packet.bytes);
    }
}

/// Says that a packet had no hop left for the way beyond the gateway, as traceroute wants it.
pub(crate) fn hops_exceeded(sh: &mut Shared, packet: &Packet<'_>) {
    if emit::deserves_icmp_error(packet) && !sh.tap.is_congested() {
        let from = sh.spec.gateway.ip_like(packet.dst);
        let error = IcmpError::time_exceeded(packet.is_v6());
        emit::icmp_error(&mut sh.tap, from, packet.src, error, packet.bytes);
    }
}

fn count_send(sh: &mut Shared, sent: nix::Result<()>) {
    if sent.is_err() {
        sh.stats.dropped_datagrams.one();
    }
}

/// How datagrams are sent, but for what every socket does.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sending {
    /// With this hop limit.
    pub(crate) hops: Option<u8>,
    /// From this address of the host.
    pub(crate) from: Option<IpAddr>,
}

/// Sends datagrams of `size` bytes each.
pub(crate) fn send_to(
    fd: &HostFd,
    payload: &[u8],
    size: usize,
    to: SocketAddr,
    how: Sending,
) -> nix::Result<()> {
    let raw = fd.as_raw_fd();
    let to_raw = SockaddrStorage::from(to);
    let hops = how.hops.map(libc::c_int::from);
    let segment = u16::try_from(size).unwrap_or(u16::MAX);
    let first = match (&hops, to) {
        (Some(hops), SocketAddr::V4(_)) => Some(ControlMessage::Ipv4Ttl(hops)),
        (Some(hops), SocketAddr::V6(_)) => Some(ControlMessage::Ipv6HopLimit(hops)),
        (None, _) => (payload.len() > size).then_some(ControlMessage::UdpGsoSegments(&segment)),
    };
    let v4;
    let v6;
    let second = match how.from {
        Some(IpAddr::V4(ip)) => {
            v4 = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(ip.octets()) },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            Some(ControlMessage::Ipv4PacketInfo(&v4))
        }
        Some(IpAddr::V6(ip)) => {
            v6 = libc::in6_pktinfo { ipi6_addr: libc::in6_addr { s6_addr: ip.octets() }, ipi6_ifindex: 0 };
            Some(ControlMessage::Ipv6PacketInfo(&v6))
        }
        None => None,
    };
    let flags = MsgFlags::MSG_NOSIGNAL;
    let part = [IoSlice::new(payload)];
    match (first, second) {
        (None, None) => calls::sendto(raw, payload, &to_raw, flags).map(drop),
        (Some(one), None) | (None, Some(one)) => sendmsg(raw, &part, &[one], flags, Some(&to_raw)).map(drop),
        (Some(one), Some(two)) => sendmsg(raw, &part, &[one, two], flags, Some(&to_raw)).map(drop),
    }
}

/// Asks for the local address of each datagram.
pub(crate) fn want_local_address(fd: &impl AsFd, is_v6: bool) -> nix::Result<()> {
    if is_v6 {
        calls::setsockopt(fd, sockopt::Ipv6RecvPacketInfo, &true)
    } else {
        calls::setsockopt(fd, sockopt::Ipv4PacketInfo, &true)
    }
}

/// Asks for datagrams that came together to be given together, if not too few may go at once. Kernels before 5.0 do not.
pub(crate) fn want_runs(sh: &Shared, fd: &impl AsFd) {
    if sh.received.takes_runs() {
        let _ = calls::setsockopt(fd, sockopt::UdpGroSegment, &true);
    }
}

/// What was received.
struct Received {
    len: usize,
    /// Length of each datagram but the last, if there are several.
    size: Option<usize>,
    /// The sender, if that is an IP address.
    from: Option<SocketAddr>,
    /// The host's address it was sent to, if that was asked for.
    local: Option<IpAddr>,
}

/// Receives a datagram, or some that came together.
fn receive(fd: &HostFd, buffer: &mut [u8]) -> nix::Result<Received> {
    let mut control = nix::cmsg_space!(libc::in6_pktinfo, libc::c_int);
    let mut parts = [IoSliceMut::new(buffer)];
    let message =
        recvmsg::<SockaddrStorage>(fd.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_DONTWAIT)?;
    let (mut local, mut size) = (None, None);
    for control in message.cmsgs().ok().into_iter().flatten() {
        match control {
            ControlMessageOwned::Ipv4PacketInfo(info) => {
                local = Some(IpAddr::from(info.ipi_spec_dst.s_addr.to_ne_bytes()));
            }
            ControlMessageOwned::Ipv6PacketInfo(info) => {
                local = Some(IpAddr::from(info.ipi6_addr.s6_addr));
            }
            ControlMessageOwned::UdpGroSegments(len) => size = usize::try_from(len).ok(),
            _ => {}
        }
    }
    Ok(Received { len: message.bytes, size, from: message.address.as_ref().and_then(socket_addr), local })
}

/// Reads a datagram socket to its end, or as far as the TAP has room and others need not wait too long: then we come back.
pub(crate) fn read_all(
    sh: &mut Shared,
    token: Token,
    fd: &HostFd,
    mut each: impl FnMut(&mut Shared, &mut [u8], SocketAddr, Option<IpAddr>),
) {
    let mut buffer = std::mem::take(&mut sh.datagram);
    let mut failures = 0;
    for count in 0.. {
        if sh.tap.is_blocked() || sh.received.have_datagrams_to_wait() || count >= TURN_DATAGRAMS {
            // Nothing but errors: it is the socket that fails, and will.
            if failures < TURN_DATAGRAMS {
                sh.come_back(token);
            }
            break;
        }
        match receive(fd, &mut buffer) {
            Ok(Received { len, size, from: Some(from), local }) => {
                sh.received.take_datagram(len);
                let all = buffer.get_mut(..len).unwrap_or_default();
                let size = size.unwrap_or(len).max(1);
                if all.is_empty() {
                    each(sh, all, from, local);
                }
                for datagram in all.chunks_mut(size) {
                    each(sh, datagram, from, local);
                }
            }
            // From nobody who could be answered.
            Ok(Received { from: None, .. }) => sh.stats.dropped_datagrams.one(),
            Err(Errno::EAGAIN) => break,
            Err(Errno::EINTR) => {}
            // Not the datagrams' fault, and no better at once: the next one wakes us.
            Err(Errno::ENOMEM | Errno::ENOBUFS | Errno::EBADF | Errno::ENOTSOCK | Errno::EFAULT) => break,
            // An error of an earlier datagram, reported once.
            // Datagrams may wait behind it, and nothing would tell of them again.
            Err(_) => failures += 1,
        }
    }
    sh.datagram = buffer;
}

pub(crate) fn socket_addr(addr: &SockaddrStorage) -> Option<SocketAddr> {
    match (addr.as_sockaddr_in(), addr.as_sockaddr_in6()) {
        (Some(v4), _) => Some((*v4).into()),
        (None, Some(v6)) => Some((*v6).into()),
        _ => None,
    }
}

/// An entry of a socket's error queue.
#[derive(Debug)]
pub(crate) struct QueuedError {
    /// Where the datagram was sent to.
    pub(crate) destination: SocketAddr,
    /// What it contained, as far as it was quoted. If `extension` followed there may be zeroes behind it, which nothing
    /// tells from its own; and what the kernel does not take for an extension: before 5.9 that is everything.
    pub(crate) payload: Vec<u8>,
    /// What else the error said (RFC 4884): a whole extension structure, of the version that the kernel looks into, with
    /// which it found nothing wrong.
    pub(crate) extension: Vec<u8>,
    /// Who complained. See [`Self::complaint`].
    pub(crate) offender: Option<IpAddr>,
    /// What the guest is to be told; `None` if the error arose on the host itself and means nothing to it.
    pub(crate) icmp: Option<IcmpError>,
}

impl QueuedError {
    /// Who complained, and what else they said; `None` if that was the host itself behind its loopback address. Extensions
    /// may name its interfaces (RFC 5837), which are no business of the guest's.
    pub(crate) fn complaint(&self) -> Option<(IpAddr, &[u8])> {
        self.offender.filter(|ip| !ip.is_loopback()).map(|ip| (ip, &self.extension[..]))
    }
}

/// The next error of a socket's queue; `None` if it means nothing to us.
pub(crate) fn receive_error(fd: &HostFd) -> nix::Result<Option<QueuedError>> {
    let mut control = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6, [u8; 64]);
    let mut buffer = [0; 1280];
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<SockaddrStorage>(fd.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let (len, is_cut) = (message.bytes, message.flags.contains(MsgFlags::MSG_TRUNC));
    let destination = message.address.as_ref().and_then(socket_addr);
    let found = message.cmsgs().ok().into_iter().flatten().find_map(|control| match control {
        ControlMessageOwned::Ipv4RecvErr(error, from) => {
            Some((error, from.map(|from| IpAddr::from(from.sin_addr.s_addr.to_ne_bytes()))))
        }
        ControlMessageOwned::Ipv6RecvErr(error, from) => {
            Some((error, from.map(|from| IpAddr::from(from.sin6_addr.s6_addr))))
        }
        _ => None,
    });
    let (Some(destination), Some((error, offender))) = (destination, found) else { return Ok(None) };
    let from_network = matches!(error.ee_origin, libc::SO_EE_ORIGIN_ICMP | libc::SO_EE_ORIGIN_ICMP6);
    let is_v6 = destination.is_ipv6();
    let icmp = if from_network {
        let too_big = matches!((is_v6, error.ee_type, error.ee_code), (false, 3, 4) | (true, 2, _));
        // The host's kernel fragments for the guest, so the path's MTU is the host's own affair.
        (!too_big).then_some(IcmpError { kind: error.ee_type, code: error.ee_code, word: 0 })
    } else {
        let errno = i32::try_from(error.ee_errno).map(Errno::from_raw);
        matches!(errno, Ok(Errno::EHOSTUNREACH | Errno::ENETUNREACH))
            .then(|| IcmpError::unreachable(is_v6, Unreachable::Host))
    };
    let mut payload = buffer.get(..len).unwrap_or_default().to_vec();
    // See `sock_ee_data_rfc4884` of linux/errqueue.h. What was cut says nothing, nor does what the kernel found wrong. It
    // looks into structures of version 2 only, and finds nothing wrong with others (`ip_icmp_error_rfc4884_validate`).
    let [a, b, flags, _] = error.ee_data.to_ne_bytes();
    let begin = usize::from(u16::from_ne_bytes([a, b]));
    let mut extension = Vec::new();
    if from_network && begin > 0 && begin <= payload.len() {
        extension = payload.split_off(begin);
        let is_known = matches!(extension[..], [version, _, _, _, ..] if version >> 4 == 2);
        if flags != 0 || is_cut || !is_known {
            extension.clear();
        }
    }
    Ok(Some(QueuedError { destination, payload, extension, offender, icmp }))
}
