//! ICMP: echo requests through the host's unprivileged ping sockets (icmp(7)), one for each identifier of the guest.
//!
//! The host's kernel puts its own identifier into a request; the reply gets the guest's back. Errors of the network
//! (unreachable, time exceeded) come out of the socket's error queue, with the request as their cause, so traceroute
//! works. Echo requests to the gateway are answered here. Everything else that the guest sends as ICMP is dropped, but
//! for neighbour solicitations, which the engine answers.
//!
//! Where the host forbids ping sockets (`net.ipv4.ping_group_range`) the guest is told "administratively prohibited"
//! and the log says so once.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::SockProtocol;
use smoltcp::time::{Duration, Instant};

use crate::config::{MAX_PINGS, PING_IDLE};
use crate::emit::{self, Unreachable};
use crate::flow::{Endpoint, FlowId, FlowKey, Slab, TimerKey};
use crate::flowlog::{Account, EachFlow, FlowEventKind};
use crate::host::{self, HostFd};
use crate::ingress::{ICMP, ICMPV6, Packet};
use crate::policy::{Transport, Verdict};
use crate::shared::{Shared, Token};
use crate::udp::{self, Sending};

const MAX_DESTINATIONS: usize = 16;

/// Types of echo request and reply.
fn echo_types(is_v6: bool) -> (u8, u8) {
    if is_v6 { (128, 129) } else { (8, 0) }
}

#[derive(Debug)]
struct Ping {
    /// The guest's address, and its identifier as the port.
    guest: Endpoint,
    fd: HostFd,
    destinations: Vec<Destination>,
    used: Instant,
}

#[derive(Debug)]
struct Destination {
    ip: IpAddr,
    /// See [`Shared::name_for`].
    name: Option<Arc<str>>,
    account: Account,
}

impl Ping {
    fn key(&self, to: IpAddr) -> FlowKey {
        FlowKey { guest: self.guest, remote: Endpoint::new(to, 0) }
    }

    fn tell_closed(&self, sh: &Shared, destination: &Destination, reason: &'static str) {
        let kind = destination.account.closed(sh.now, reason);
        sh.tell(Transport::Ping, false, self.key(destination.ip), kind);
    }
}

/// All ping sockets.
#[derive(Debug, Default)]
pub(crate) struct Icmp {
    pings: Slab<Ping>,
    by_guest: HashMap<Endpoint, FlowId>,
    forbidden_logged: bool,
}

impl Icmp {
    #[cfg(test)]
    pub(crate) fn check_bounds(&self) {
        assert!(self.pings.len() <= MAX_PINGS && self.by_guest.len() == self.pings.len());
        assert!(self.pings.iter().all(|(_, ping)| ping.destinations.len() <= MAX_DESTINATIONS));
    }

    /// An ICMP message from the guest; its checksum has been verified.
    pub(crate) fn ingress(&mut self, sh: &mut Shared, now: Instant, packet: &Packet<'_>) {
        let message = packet.payload();
        let (request, reply) = echo_types(packet.is_v6());
        let [kind, 0, _, _, id_high, id_low, _, _, ..] = message else { return };
        if *kind != request {
            return;
        }
        let guest = Endpoint::new(packet.src, u16::from_be_bytes([*id_high, *id_low]));
        let known = self.by_guest.get(&guest).and_then(|id| self.pings.get(*id));
        let known = known.and_then(|ping| ping.destinations.iter().find(|known| known.ip == packet.dst));
        let name = known.and_then(|known| known.name.as_ref());
        match sh.decide_again(Transport::Ping, Endpoint::new(packet.dst, 0), name) {
            Verdict::Gateway => {
                if !sh.tap.is_congested() {
                    let mut answer = message.to_vec();
                    answer[0] = reply;
                    emit::icmp(&mut sh.tap, packet.dst, packet.src, &answer);
                }
            }
            Verdict::Refuse(reason) => {
                let key = FlowKey { guest, remote: Endpoint::new(packet.dst, 0) };
                if sh.refused(Transport::Ping, key, reason) {
                    udp::unreachable(sh, packet, Unreachable::Prohibited);
                }
            }
            Verdict::Allow(to) | Verdict::Peek(to) => self.request(sh, now, packet, guest, to),
        }
    }

    fn request(
        &mut self,
        sh: &mut Shared,
        now: Instant,
        packet: &Packet<'_>,
        guest: Endpoint,
        to: SocketAddr,
    ) {
        let id = match self.by_guest.get(&guest) {
            Some(&id) => id,
            None => match self.open(sh, now, guest) {
                Ok(id) => id,
                Err(errno) => {
                    let key = FlowKey { guest, remote: Endpoint::new(packet.dst, 0) };
                    if matches!(errno, Errno::EMFILE | Errno::ENFILE) {
                        sh.refused_by_limit(Transport::Ping, key);
                    } else {
                        sh.tell_refused(Transport::Ping, key, "not-permitted", None);
                        if !self.forbidden_logged {
                            self.forbidden_logged = true;
                            tracing::warn!(%errno, "the host forbids ping sockets (sysctl net.ipv4.ping_group_range): echo requests from inside are refused");
                        }
                    }
                    return udp::unreachable(sh, packet, Unreachable::Prohibited);
                }
            },
        };
        let Some(ping) = self.pings.get_mut(id) else { return };
        ping.used = now;
        let at = match ping.destinations.iter().position(|destination| destination.ip == to.ip()) {
            Some(at) => at,
            None => {
                if ping.destinations.len() >= MAX_DESTINATIONS {
                    let oldest = ping.destinations.remove(0);
                    ping.tell_closed(sh, &oldest, "evicted");
                }
                sh.tell(Transport::Ping, false, ping.key(to.ip()), FlowEventKind::Opened);
                let name = sh.name_for(to.ip());
                ping.destinations.push(Destination { ip: to.ip(), name, account: Account::new(now) });
                ping.destinations.len() - 1
            }
        };
        if packet.hop_limit > 1 && !sh.sent.admit(packet.payload().len()) {
            return sh.stats.dropped_datagrams.one();
        }
        if let Some(destination) = ping.destinations.get_mut(at) {
            destination.account.sent.add(packet.payload().len());
        }
        let hops = match packet.hop_limit {
            0 | 1 => return udp::hops_exceeded(sh, packet),
            hops => (hops < 64).then_some(hops - 1),
        };
        let to = SocketAddr::new(to.ip(), 0);
        let how = Sending { hops, from: None };
        let mut sent = udp::send_to(&ping.fd, packet.payload(), packet.payload().len(), to, how);
        if sent.is_err_and(|errno| errno != Errno::EAGAIN) {
            self.errors(sh, id);
            if let Some(ping) = self.pings.get(id) {
                sent = udp::send_to(&ping.fd, packet.payload(), packet.payload().len(), to, how);
            }
        }
        if let Err(errno) = sent {
            match Unreachable::from_errno(errno) {
                Some(what) => udp::unreachable(sh, packet, what),
                None => sh.stats.dropped_datagrams.one(),
            }
        }
    }

    fn open(&mut self, sh: &mut Shared, now: Instant, guest: Endpoint) -> nix::Result<FlowId> {
        if self.pings.len() >= MAX_PINGS
            && let Some((oldest, _)) = self.pings.iter().min_by_key(|(_, ping)| ping.used)
        {
            sh.stats.evicted.one();
            self.remove(sh, oldest, "evicted");
        }
        let protocol = if guest.ip.is_ipv6() { SockProtocol::IcmpV6 } else { SockProtocol::Icmp };
        let fd = host::datagram_socket(&sh.budget, guest.ip, Some(protocol))?;
        // The host's loopback is never asked: the gateway answers for itself.
        host::bind_outbound(&sh.budget, &fd, guest.ip)?;
        let id = self.pings.insert_with(|_| Ping { guest, fd, destinations: Vec::new(), used: now });
        self.by_guest.insert(guest, id);
        sh.stats.ping_flows.set(self.pings.len());
        if let Some(ping) = self.pings.get(id) {
            let watched = sh.watch(ping.fd.as_fd(), Token::Ping(id), udp::READABLE);
            watched.inspect_err(|_| self.remove(sh, id, "failed"))?;
        }
        sh.timers.set(now + PING_IDLE, TimerKey::Ping);
        Ok(id)
    }

    fn remove(&mut self, sh: &mut Shared, id: FlowId, reason: &'static str) {
        if let Some(ping) = self.pings.remove(id) {
            ping.destinations.iter().for_each(|destination| ping.tell_closed(sh, destination, reason));
            self.by_guest.remove(&ping.guest);
            sh.stats.ping_flows.set(self.pings.len());
            sh.descriptor_freed = true;
        }
    }

    /// Forgets the destinations that are not allowed any more.
    pub(crate) fn review(&mut self, sh: &mut Shared) {
        let ids: Vec<FlowId> = self.pings.iter().map(|(id, _)| id).collect();
        for id in ids {
            let Some(ping) = self.pings.get_mut(id) else { continue };
            for mut destination in std::mem::take(&mut ping.destinations) {
                let to = Endpoint::new(destination.ip, 0);
                match sh.decide_again(Transport::Ping, to, destination.name.as_ref()) {
                    Verdict::Allow(_) | Verdict::Peek(_) => {
                        destination.name = sh.name_for(to.ip).or(destination.name);
                        ping.destinations.push(destination);
                    }
                    _ => ping.tell_closed(sh, &destination, "policy"),
                }
            }
        }
    }

    /// Where the flow `id` is from.
    pub(crate) fn guest(&self, id: FlowId) -> Option<Endpoint> {
        self.pings.get(id).map(|flow| flow.guest)
    }

    /// Everything that is there.
    pub(crate) fn each_flow(&self, each: &mut EachFlow<'_>) {
        for (_, ping) in self.pings.iter() {
            for destination in &ping.destinations {
                each(Transport::Ping, false, ping.key(destination.ip), &destination.account);
            }
        }
    }

    /// Closes what has been idle for too long.
    pub(crate) fn timer(&mut self, sh: &mut Shared, now: Instant) {
        let expired: Vec<FlowId> =
            self.pings.iter().filter(|(_, ping)| ping.used + PING_IDLE <= now).map(|(id, _)| id).collect();
        for id in expired {
            self.remove(sh, id, "idle");
        }
        let next = self.pings.iter().map(|(_, ping)| ping.used + PING_IDLE).min();
        if let Some(at) = next {
            sh.timers.set(at.max(now + Duration::from_secs(1)), TimerKey::Ping);
        }
    }

    pub(crate) fn host_event(&mut self, sh: &mut Shared, now: Instant, id: FlowId, events: EpollFlags) {
        if sh.tap.is_blocked() {
            return sh.come_back(Token::Ping(id));
        }
        if events.intersects(EpollFlags::EPOLLERR) {
            self.errors(sh, id);
        }
        let Some(Ping { guest, fd, destinations, used }) = self.pings.get_mut(id) else { return };
        udp::read_all(sh, Token::Ping(id), fd, |sh, message, from, _| {
            let known = destinations.iter_mut().find(|destination| destination.ip == from.ip());
            let Some(destination) =
                known.filter(|_| message.len() >= 8 && message[0] == echo_types(guest.ip.is_ipv6()).1)
            else {
                return sh.stats.dropped_datagrams.one();
            };
            destination.account.received.add(message.len());
            *used = now;
            message[4..6].copy_from_slice(&guest.port.to_be_bytes());
            emit::icmp(&mut sh.tap, from.ip(), guest.ip, message);
        });
    }

    fn errors(&mut self, sh: &mut Shared, id: FlowId) {
        let Some(ping) = self.pings.get(id) else { return };
        // The kernel bounds the queue.
        while let Ok(error) = udp::receive_error(&ping.fd) {
            let Some(mut error) = error else { continue };
            let destination = error.destination.ip();
            let (Some(icmp), true) =
                (error.icmp, ping.destinations.iter().any(|known| known.ip == destination))
            else {
                continue;
            };
            // The queue holds our request, with the host's identifier.
            let request = &mut error.payload;
            if request.len() < 8 {
                continue;
            }
            request[4..6].copy_from_slice(&ping.guest.port.to_be_bytes());
            let protocol = if destination.is_ipv6() { ICMPV6 } else { ICMP };
            let original = crate::ingress::rebuild(ping.guest.ip, destination, protocol, 64, request);
            let (from, extension) = error.complaint().unwrap_or((destination, &[]));
            emit::extended_icmp_error(&mut sh.tap, from, ping.guest.ip, icmp, &original, extension);
        }
        let _ = host::socket_error(ping.fd.as_fd());
    }
}
