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

use std::io::PipeWriter;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags, EpollTimeout};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::UdpPacket;

use crate::config::{Error, MAX_SUPER_SEGMENT, Publish, REASSEMBLY, StackSpec};
use crate::control::{self, Commands, Control};
use crate::defect::{self, At};
use crate::device::{self, ReadResult, Segmentation, Tap};
use crate::dhcp;
use crate::dns::{Dns, Origin};
use crate::emit;
use crate::flow::{Endpoint, FlowId, FlowKey, TimerKey};
use crate::flowlog::{EachFlow, FlowState};
use crate::forward::{self, BoundPort, Forward, PortId, Published, PublishedPort};
use crate::fragment::Reassembly;
use crate::icmp::Icmp;
use crate::ingress::{self, Drop as Dropped, ICMP, ICMPV6, Inbound, Packet, TCP, UDP};
use crate::join::Join;
use crate::ndp;
use crate::policy::{DNS_PORT, PolicySpec, Reason, Rules, Transport};
use crate::rate::Rates;
use crate::shared::{Shared, Token};
use crate::stats::Counters;
use crate::tcp::Tcp;
use crate::udp::Udp;

/// Frames taken from the guest in one turn.
const TURN_FRAMES: usize = 64;
/// Queries over TCP that are answered in one turn before others get theirs; those that the flows already have under way
/// come on top.
const TURN_QUERIES: usize = 256;
/// Events taken in one turn.
const TURN_EVENTS: usize = 256;

/// The stack, without its thread.
#[derive(Debug)]
pub(crate) struct Engine {
    sh: Shared,
    tcp: Tcp,
    join: Join,
    pub(crate) udp: Udp,
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
    pub(crate) cut: bool,
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
        let tap = Tap::new(tap, spec, segmentation, Arc::clone(&stats));
        let budget = forward::budget_for(&published, spec.outbound);
        let mut sh = Shared::new(tap, spec, stats, budget, now)?;
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
            self.sh.sent.set_rate(rates.sent, now);
        }
        if rates.received != held.received {
            self.sh.received.set_rate(rates.received, now);
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
        self.tcp.flows.each(each);
        self.join.flows.each(each);
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
        let frames = self.more_frames && !self.sh.sent.holds_frames();
        let unread = !self.sh.unread.queue.is_empty() && !self.sh.received.have_datagrams_to_wait();
        let more = frames || self.more_work || unread;
        if self.forward.is_eager() || self.join.flows.have_work() || more && !self.sh.tap.is_blocked() {
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
            if self.sh.tap.is_blocked() || self.sh.received.have_datagrams_to_wait() {
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
        self.resume(now);
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

    /// Looks after the flows whose data may go on now, those that cross the TAP and those that do not in one line.
    fn resume(&mut self, now: Instant) {
        let mut line = Vec::new();
        self.tcp.flows.release(&self.sh, &mut line, Token::Tcp);
        self.join.flows.release(&self.sh, &mut line, Token::Near);
        // Who has waited both ways has one place, the first of the two.
        line.sort_unstable_by_key(|(place, token)| (token.pack(), *place));
        line.dedup_by_key(|(_, token)| token.pack());
        line.sort_unstable_by_key(|(place, _)| *place);
        for (_, token) in line {
            match token {
                Token::Tcp(id) => self.tcp.look_after(&mut self.sh, now, id),
                Token::Near(id) => self.join.look_after(&mut self.sh, id),
                _ => {}
            }
        }
    }

    /// Lets go of `waiter` when all that the guest has sent has been passed on.
    pub(crate) fn drain(&mut self, waiter: PipeWriter) {
        self.drained = Some((false, waiter));
    }

    fn tell_drained(&mut self) {
        let Some((looked, _)) = &mut self.drained else { return };
        if self.sh.sent.holds_frames() {
            // No frame is read until that is paid.
            *looked = false;
        } else if !std::mem::replace(looked, true) {
            // Frames may wait that this turn did not know of.
            self.more_work = true;
        } else if !self.more_frames
            && !self.more_work
            && !self.tcp.flows.are_owed()
            && !self.join.flows.are_owed()
        {
            self.drained = None;
        }
    }

    /// Something that changes while data of the guest's is passed on.
    pub(crate) fn progress(&self) -> u64 {
        let from_guest = self.sh.stats.snapshot().bytes_from_guest;
        let passed_on = self.tcp.flows.passed_on().wrapping_add(self.join.flows.passed_on());
        // Datagrams have gone, and what comes after them waits until they are paid for.
        from_guest.wrapping_add(passed_on).wrapping_sub(self.sh.sent.debt())
    }

    /// Who got a part must not take it for the whole.
    fn end_flows(&mut self) {
        let gave_up = self.drained.take().is_some();
        let gone = gave_up || self.cut;
        let reset = self.tcp.flows.reset_if_owed(gone) + self.join.flows.reset_if_owed(gone);
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
        let flags = match (self.sh.tap.is_blocked(), self.sh.sent.holds_frames()) {
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
        let [sent, received] = self.tcp.flows.wait_for_tokens();
        let joined = self.join.flows.wait_for_tokens();
        let sent = sent || joined[0] || self.sh.sent.holds_frames();
        let received = received || joined[1];
        let unread = !self.sh.unread.queue.is_empty();
        let at = [
            self.sh.sent.ready_at().filter(|_| sent),
            self.sh.received.ready_at().filter(|_| received),
            self.sh.received.datagrams_at().filter(|_| unread),
        ];
        if let Some(at) = at.into_iter().flatten().min() {
            self.sh.timers.set(at, TimerKey::Rate);
        }
    }

    fn read_frames(&mut self, now: Instant) -> Turn {
        let mut buffer = std::mem::take(&mut self.buffer);
        self.more_frames = true;
        for _ in 0..TURN_FRAMES {
            if self.sh.tap.is_blocked() || self.sh.sent.holds_frames() {
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
        engine.tcp.flows.reset_on_close();
        engine.join.flows.reset_on_close();
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
            At::Flow(id) | At::Event(Token::Tcp(id)) | At::Timer(TimerKey::Tcp(id)) => {
                tcp(self.tcp.flows.key(id))
            }
            At::Event(Token::Near(id) | Token::Inner(id)) => tcp(self.join.flows.key(id)),
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

    pub(crate) fn budget(&mut self) -> &mut crate::host::Budget {
        &mut self.sh.budget
    }

    pub(crate) fn stats(&self) -> crate::stats::Stats {
        self.sh.stats.snapshot()
    }

    /// Whether nothing but a timer would wake the engine now.
    pub(crate) fn is_quiet(&self, now: Instant) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd as _;
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

    /// As if epoll had told of these events of every connection's socket.
    pub(crate) fn pretend_events(&mut self, now: Instant, events: EpollFlags) {
        let mut ids = Vec::new();
        self.tcp.each_host(|_, id, _| ids.push(id));
        ids.into_iter().for_each(|id| self.tcp.host_event(&mut self.sh, now, id, events));
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

    /// Lets there be fewer flows.
    pub(crate) fn limit_flows(&mut self, most: usize) {
        self.sh.most_tcp_flows = most;
    }

    /// Flows among which what may go is divided, each way.
    pub(crate) fn sharers(&self) -> [usize; 2] {
        [self.sh.sent.sharers(), self.sh.received.sharers()]
    }

    pub(crate) fn half_open(&self) -> usize {
        self.sh.half_open
    }

    /// Every table within its bound, and agreeing with the others.
    pub(crate) fn check_bounds(&self) {
        use crate::config::MAX_HALF_OPEN;
        self.tcp.check_bounds();
        self.join.check_bounds();
        assert_eq!(self.sh.tcp_flows, self.tcp.flows.len() + self.join.flows.len());
        let (tcp, joined) = (self.tcp.flows.sharers(), self.join.flows.sharers());
        assert_eq!(self.sharers(), [tcp[0] + joined[0], tcp[1] + joined[1]]);
        assert_eq!(self.sh.half_open, self.tcp.half_open() + self.join.half_open());
        assert!(self.sh.half_open <= MAX_HALF_OPEN && self.join.half_open() <= MAX_HALF_OPEN / 2);
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
