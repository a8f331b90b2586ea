//! DNS at the gateway's addresses, port 53.
//!
//! A query is answered by our own names ([`names`]), from the cache ([`cache`]), or by a resolver of the host. It is
//! understood in [`message`], and what a resolver says in [`response`].
//!
//! A resolver is asked over UDP with a buffer of 1,232 bytes, whatever way the guest's query came; over TCP if the answer
//! did not fit. The guest gets what its own buffer holds, or is told to ask over TCP, where the answer then is in the
//! cache. EDNS options end here, since they are about one hop; the DNSSEC bits (DO, CD, AD) are passed on.
//!
//! Against forgery (RFC 5452): each query under way has a socket of its own, connected to the resolver, with a port of the
//! kernel's choice, a random identifier, and a name in random case. An answer counts only if it comes from there, with
//! that identifier, for exactly that question. A resolver that answers in another case is asked again without that, and
//! one that does not know EDNS without that. Nothing else ends a try before its time: what is no answer is counted and
//! passed over, and so is an ICMP error that does not quote the query, which whoever guesses the port can send.
//!
//! If no answer comes in [`DNS_TRY`], or the resolver refuses, the next one is asked, three times in all; then the guest
//! gets the resolver's error, or SERVFAIL and why (RFC 8914). The resolver that answered last is asked first the next
//! time. Options `timeout`, `attempts`, `rotate` and `use-vc` of resolv.conf(5) change this. Failures are not kept.
//!
//! Guests that ask the same at the same time share one query: [`MAX_DNS_QUERIES`] may be under way (the oldest gives
//! way), and [`MAX_DNS_WAITERS`] may wait for them (one more gets SERVFAIL).
//!
//! States of a query: sent over UDP, waiting; or over TCP: connecting, sending, reading. Timer: one per try.
//!
//! Queries and answers over TCP are cut out of, and put into, their connections in [`stream`].
//!
//! What a name was resolved to, and what its services lead to, is told to [`Pins`](pins::Pins). While rules are about names, resolvers are asked to check
//! signatures whatever the guest wishes (CD), and what is kept is pinned: the cache is emptied if pins had to give way.
//! Else nobody misses a pin.
//!
//! The cache is also emptied when the host's resolvers change, and when the host was suspended: it may have woken up in
//! another network. What was asked of the old resolvers is not kept then. Resolvers on the host's loopback do not look
//! changed when what is behind them is; what they say is kept for [`MAX_DNS_LOCAL_TTL`] seconds only.

mod cache;
pub(crate) mod message;
mod names;
pub(crate) mod pins;
pub(crate) mod resolv;
pub(crate) mod response;
pub(crate) mod stream;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::sys::socket::{MsgFlags, SockaddrStorage};
use smoltcp::time::{Duration, Instant};

use crate::calls::{connect, recv, send};
use crate::config::{MAX_DNS_LOCAL_TTL, MAX_DNS_QUERIES, MAX_DNS_WAITERS};
use crate::emit;
use crate::flow::{Endpoint, FlowId, Slab, TimerKey};
use crate::host::{self, HostFd};
use crate::shared::{Shared, Token};
use crate::udp::{READABLE, receive_error};
use cache::Cache;
use message::{Asker, CLASS_IN, Code, ExtendedError, Question, Stored, TYPE_OPT};
use names::{Known, Names};
use resolv::Resolvers;
use response::{Answer as Resolved, Manner, Match, Verdict};

/// Types that ask for more than a forwarder has: transfers of whole zones.
const TRANSFERS: [u16; 2] = [251, 252];
/// Types that are none of a question: OPT, TKEY, TSIG.
const NO_QUESTIONS: [u16; 3] = [TYPE_OPT, 249, 250];

const NO_RESOLVER: ExtendedError = ExtendedError { code: 23, text: "the host has no resolver" };
const NO_ANSWER: ExtendedError = ExtendedError { code: 23, text: "no resolver of the host answers" };
const TOO_MANY: ExtendedError = ExtendedError { code: 0, text: "too many queries at once" };

/// Who asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Origin {
    /// A datagram.
    Udp { guest: Endpoint, gateway: Endpoint },
    /// A TCP flow.
    Tcp(FlowId),
}

impl Origin {
    fn is_tcp(self) -> bool {
        matches!(self, Self::Tcp(_))
    }
}

/// An answer for a TCP flow. Datagrams are sent at once.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) flow: FlowId,
    pub(crate) message: Vec<u8>,
}

#[derive(Debug)]
enum Upstream {
    Udp(HostFd),
    Tcp { fd: HostFd, sent: usize, input: Vec<u8> },
}

/// Who waits for a query.
#[derive(Debug)]
struct Waiter {
    origin: Origin,
    id: [u8; 2],
    flags: [u8; 2],
    question: Box<[u8]>,
    edns: Option<message::Edns>,
}

impl Waiter {
    fn asker(&self) -> Asker<'_> {
        Asker {
            id: self.id,
            flags: self.flags,
            question: &self.question,
            edns: self.edns,
            is_tcp: self.origin.is_tcp(),
        }
    }
}

/// What became of a query.
#[derive(Debug)]
enum Outcome {
    /// What a resolver said.
    Stored(Stored),
    Failed(&'static ExtendedError),
}

#[derive(Debug)]
struct Pending {
    question: Question,
    waiters: Vec<Waiter>,
    /// As it was sent last.
    query: Vec<u8>,
    manner: Manner,
    upstream: Option<Upstream>,
    /// The resolver that is asked first, and how often one was asked.
    first: usize,
    tries: usize,
    deadline: Instant,
    timer: Option<Instant>,
    /// What a resolver said, if it was not what was wanted: better than an error of our own.
    fallback: Option<Stored>,
    /// [`Dns::generation`] when it was sent.
    generation: u64,
    /// How often the socket said since that it has something, and had nothing.
    fruitless: u32,
    /// Messages and errors that had nothing to do with the query, and have not been counted yet.
    ignored: usize,
}

/// The forwarder.
#[derive(Debug)]
pub(crate) struct Dns {
    names: Names,
    cache: Cache,
    resolvers: Resolvers,
    preferred: usize,
    queries: Slab<Pending>,
    /// Queries under way by [`Question::key`].
    by_key: HashMap<Box<[u8]>, FlowId>,
    waiters: usize,
    /// Changes whenever what was known before may be wrong.
    generation: u64,
    /// [`Shared::suspensions`] then.
    suspensions: u64,
    /// Where answers are written.
    scratch: Vec<u8>,
    /// To be fetched by the engine.
    pub(crate) answers: Vec<Answer>,
}

impl Dns {
    pub(crate) fn new(sh: &mut Shared, now: Instant) -> Self {
        for (name, ip) in sh.spec.dns.hosts.clone() {
            if let Some(name) = message::wire(&name) {
                sh.pin(now, &message::text(&name).into(), ip, None);
            }
        }
        Self {
            names: Names::new(&sh.spec),
            cache: Cache::default(),
            resolvers: Resolvers::new(&sh.spec.dns.upstreams, PathBuf::from("/etc/resolv.conf")),
            preferred: 0,
            queries: Slab::default(),
            by_key: HashMap::new(),
            waiters: 0,
            generation: 0,
            suspensions: 0,
            scratch: Vec::with_capacity(512),
            answers: Vec::new(),
        }
    }

    /// Queries that wait for a resolver.
    #[cfg(test)]
    pub(crate) fn under_way(&self) -> usize {
        self.queries.len()
    }

    /// Has resolvers on the loopback taken for distant ones.
    #[cfg(test)]
    pub(crate) fn take_for_distant(&mut self) {
        self.resolvers.distant = true;
    }

    #[cfg(test)]
    pub(crate) fn check_bounds(&self) {
        assert!(self.queries.len() <= MAX_DNS_QUERIES && self.by_key.len() == self.queries.len());
        let waiters: usize = self.queries.iter().map(|(_, pending)| pending.waiters.len()).sum();
        assert!(waiters == self.waiters && waiters <= MAX_DNS_WAITERS);
        assert!(self.answers.is_empty());
        self.cache.check_bounds();
    }

    /// Forgets what is kept, and does not keep what is being asked for.
    pub(crate) fn forget(&mut self) {
        self.cache.clear();
        self.generation += 1;
    }

    /// Looks whether what is kept still holds.
    fn refresh(&mut self, sh: &mut Shared, now: Instant) {
        sh.notice_suspension(now);
        let suspended = std::mem::replace(&mut self.suspensions, sh.suspensions) != sh.suspensions;
        if suspended {
            self.resolvers.look_again();
        }
        if self.resolvers.refresh(now) || suspended {
            self.forget();
        }
    }

    /// A query from the guest.
    pub(crate) fn query(&mut self, sh: &mut Shared, now: Instant, origin: Origin, query: &[u8]) {
        sh.stats.dns_queries.one();
        let question = match message::parse_query(query) {
            Ok(question) => question,
            Err(code) => {
                // Over TCP every query is counted, so what deserves no answer gets one.
                if let Some(code) = code.or(origin.is_tcp().then_some(Code::FormErr)) {
                    Asker::of(query, origin.is_tcp()).write_error(&mut self.scratch, code, None);
                    self.deliver(sh, origin);
                }
                return;
            }
        };
        let asker = question.asker(query, origin.is_tcp());
        if self.answer_at_once(sh, now, &question, &asker) {
            return self.deliver(sh, origin);
        }
        self.ask(sh, now, origin, question, &asker);
    }

    /// Writes the answer if it is known here.
    fn answer_at_once(
        &mut self,
        sh: &mut Shared,
        now: Instant,
        question: &Question,
        asker: &Asker<'_>,
    ) -> bool {
        let out = &mut self.scratch;
        if question.is_bad_version() {
            asker.write_error(out, Code::BadVers, None);
            return true;
        }
        if TRANSFERS.contains(&question.kind) {
            asker.write_error(out, Code::Refused, None);
            return true;
        }
        if NO_QUESTIONS.contains(&question.kind) {
            asker.write_error(out, Code::FormErr, None);
            return true;
        }
        if question.class == CLASS_IN {
            match self.names.get(question.name()) {
                Some(Known::Own(own)) => {
                    asker.write_own(out, question.kind, &own.ips, &own.names);
                    return true;
                }
                Some(Known::Nobody) => {
                    asker.write_error(out, Code::NxDomain, None);
                    return true;
                }
                None => {}
            }
        }
        self.refresh(sh, now);
        if let Some((stored, age)) = self.cache.get(now, question.key()) {
            sh.stats.dns_cached.one();
            asker.write_stored(&mut self.scratch, stored, age);
            return true;
        }
        false
    }

    /// Hands out what has been written.
    fn deliver(&mut self, sh: &mut Shared, origin: Origin) {
        match origin {
            Origin::Udp { guest, gateway } => {
                if !sh.tap.is_congested() {
                    emit::udp(&mut sh.tap, gateway, guest, &self.scratch);
                }
            }
            Origin::Tcp(flow) => self.answers.push(Answer { flow, message: self.scratch.clone() }),
        }
    }

    /// Asks a resolver, unless it is being asked already.
    fn ask(&mut self, sh: &mut Shared, now: Instant, origin: Origin, question: Question, asker: &Asker<'_>) {
        let known = self.by_key.get(question.key()).copied();
        let known = known.filter(|id| self.queries.get(*id).is_some());
        if let Some((id, pending)) = known.and_then(|id| Some((id, self.queries.get(id)?)))
            && !origin.is_tcp()
            && pending.waiters.iter().any(|waiter| waiter.origin == origin && waiter.id == asker.id)
        {
            // The guest has lost its patience.
            return self.ask_anew(sh, now, id);
        }
        if self.waiters >= MAX_DNS_WAITERS {
            sh.stats.refused_by_limit.one();
            asker.write_error(&mut self.scratch, Code::ServFail, Some(&TOO_MANY));
            return self.deliver(sh, origin);
        }
        let waiter = Waiter {
            origin,
            id: asker.id,
            flags: asker.flags,
            question: asker.question.into(),
            edns: asker.edns,
        };
        self.waiters += 1;
        if let Some((id, pending)) = known.and_then(|id| Some((id, self.queries.get_mut(id)?))) {
            pending.waiters.push(waiter);
            return self.ask_anew(sh, now, id);
        }
        if self.queries.len() >= MAX_DNS_QUERIES {
            let oldest = self.queries.iter().min_by_key(|(_, pending)| pending.deadline).map(|(id, _)| id);
            if let Some(oldest) = oldest {
                sh.stats.refused_by_limit.one();
                self.finish(sh, oldest, Outcome::Failed(&TOO_MANY));
            }
        }
        if self.resolvers.options.rotate {
            self.preferred = self.preferred.wrapping_add(1);
        }
        let key: Box<[u8]> = question.key().into();
        let first = self.preferred;
        let id = self.queries.insert_with(|_| Pending {
            question,
            waiters: vec![waiter],
            query: Vec::new(),
            manner: Manner { tcp: false, edns: false, random_case: false, checked: false },
            upstream: None,
            first,
            tries: 0,
            deadline: now,
            timer: None,
            fallback: None,
            generation: self.generation,
            fruitless: 0,
            ignored: 0,
        });
        self.by_key.insert(key, id);
        self.ask_next(sh, now, id);
    }

    /// Begins again with a query that somebody still waits for, if it was sent to resolvers that are not the host's any
    /// more.
    fn ask_anew(&mut self, sh: &mut Shared, now: Instant, id: FlowId) {
        if let Some(pending) =
            self.queries.get_mut(id).filter(|pending| pending.generation != self.generation)
        {
            (pending.first, pending.tries, pending.fallback) = (self.preferred, 0, None);
            self.ask_next(sh, now, id);
        }
    }

    /// Sends a query to the next resolver, or gives up.
    fn ask_next(&mut self, sh: &mut Shared, now: Instant, id: FlowId) {
        loop {
            self.refresh(sh, now);
            let Some(pending) = self.queries.get_mut(id) else { return };
            let servers = &self.resolvers.servers;
            let tries = self.resolvers.tries();
            if pending.tries >= tries {
                if servers.len() > tries {
                    // Those that were not asked come first the next time.
                    self.preferred = pending.first.wrapping_add(tries);
                }
                let why = if servers.is_empty() { &NO_RESOLVER } else { &NO_ANSWER };
                let outcome = pending.fallback.take().map_or(Outcome::Failed(why), Outcome::Stored);
                return self.finish(sh, id, outcome);
            }
            pending.tries += 1;
            let tcp = self.resolvers.options.use_tcp;
            let manner = Manner { tcp, edns: true, random_case: true, checked: sh.want_names() };
            if self.ask_again(sh, now, id, manner) {
                return;
            }
        }
    }

    /// Sends a query to the resolver whose turn it is, in this manner; whether that could be done.
    fn ask_again(&mut self, sh: &mut Shared, now: Instant, id: FlowId, manner: Manner) -> bool {
        let Some(pending) = self.queries.get_mut(id) else { return false };
        pending.upstream = None;
        if let Some(at) = pending.timer.take() {
            sh.timers.cancel(at, TimerKey::Dns(id));
        }
        let servers = &self.resolvers.servers;
        let turn = pending.first.wrapping_add(pending.tries).wrapping_sub(1);
        let Some(&server) = turn.checked_rem(servers.len()).and_then(|i| servers.get(i)) else {
            return false;
        };
        pending.manner = manner;
        pending.generation = self.generation;
        pending.fruitless = 0;
        pending.query = response::write_query(&pending.question, manner, &mut sh.random);
        pending.deadline = now + self.resolvers.patience();
        match pending.send(sh, id, server) {
            Ok(upstream) => {
                pending.upstream = Some(upstream);
                pending.timer = Some(pending.deadline);
                sh.timers.set(pending.deadline, TimerKey::Dns(id));
                true
            }
            Err(errno) => {
                tracing::debug!(%errno, %server, "resolver not reached");
                false
            }
        }
    }

    /// Tells everybody who waits.
    fn finish(&mut self, sh: &mut Shared, id: FlowId, outcome: Outcome) {
        let Some(pending) = self.queries.remove(id) else { return };
        self.by_key.remove(pending.question.key());
        self.waiters -= pending.waiters.len();
        if let Some(at) = pending.timer {
            sh.timers.cancel(at, TimerKey::Dns(id));
        }
        for waiter in &pending.waiters {
            let asker = waiter.asker();
            match &outcome {
                // There is no way left to ask for the rest.
                Outcome::Stored(stored) if stored.is_truncated() && asker.is_tcp => {
                    asker.write_error(&mut self.scratch, Code::ServFail, Some(&NO_ANSWER));
                }
                Outcome::Stored(stored) => asker.write_stored(&mut self.scratch, stored, 0),
                Outcome::Failed(why) => asker.write_error(&mut self.scratch, Code::ServFail, Some(why)),
            }
            self.deliver(sh, waiter.origin);
        }
        sh.descriptor_freed = true;
    }

    pub(crate) fn timer(&mut self, sh: &mut Shared, now: Instant, id: FlowId) {
        if let Some(pending) = self.queries.get_mut(id) {
            pending.timer = None;
            self.ask_next(sh, now, id);
        }
    }

    /// A resolver's socket has something to say.
    pub(crate) fn host_event(&mut self, sh: &mut Shared, now: Instant, id: FlowId) {
        let mut buffer = std::mem::take(&mut sh.datagram);
        let progress = self.queries.get_mut(id).map(|pending| {
            let before = pending.is_noisy();
            let progress = pending.progress(&mut buffer);
            sh.stats.dns_ignored.add(std::mem::take(&mut pending.ignored));
            if let Some(Upstream::Udp(fd)) = &pending.upstream
                && pending.is_noisy() != before
            {
                // From here on only what comes wakes us, and not what is there.
                let mut event = EpollEvent::new(READABLE, Token::Dns(id).pack());
                let _ = sh.epoll.modify(fd.as_fd(), &mut event);
            }
            progress
        });
        sh.datagram = buffer;
        match progress {
            None | Some(Ok(None)) => {}
            Some(Ok(Some((response, case)))) => self.judge(sh, now, id, &response, case),
            Some(Err(errno)) => {
                tracing::debug!(%errno, "resolver failed");
                self.ask_next(sh, now, id);
            }
        }
    }

    /// A resolver has said something.
    fn judge(&mut self, sh: &mut Shared, now: Instant, id: FlowId, response: &[u8], case: Match) {
        let Some(pending) = self.queries.get_mut(id) else { return };
        let manner = pending.manner;
        let again = if case == Match::OtherCase && manner.random_case && !manner.tcp {
            // What was forged would have to be forged once more.
            Manner { random_case: false, ..manner }
        } else {
            match response::judge(response, &pending.question, manner) {
                Verdict::Answer(answer) => return self.resolved(sh, now, id, answer),
                Verdict::Truncated(stored) => {
                    pending.fallback = Some(stored);
                    Manner { tcp: true, ..manner }
                }
                Verdict::NoEdns => Manner { edns: false, ..manner },
                Verdict::Failure(stored) => {
                    pending.fallback.get_or_insert(stored);
                    // Somebody else may know better, but the same one will not.
                    if self.resolvers.servers.len() <= 1 {
                        pending.tries = usize::MAX;
                    }
                    return self.ask_next(sh, now, id);
                }
                Verdict::Malformed => return self.ask_next(sh, now, id),
            }
        };
        if !self.ask_again(sh, now, id, again) {
            self.ask_next(sh, now, id);
        }
    }

    /// The answer is there.
    fn resolved(&mut self, sh: &mut Shared, now: Instant, id: FlowId, answer: Resolved) {
        let Some(pending) = self.queries.get(id) else { return };
        let Resolved { stored, ttl, ips, targets } = answer;
        let question = &pending.question;
        // That of a resolver that is not asked any more is better than none.
        let holds = pending.generation == self.generation;
        if holds {
            self.preferred = pending.first.wrapping_add(pending.tries).wrapping_sub(1);
        }
        let mut lost = false;
        // Anybody can have forged what was not checked.
        let checked = pending.manner.checked || !question.checking_disabled();
        if question.class == CLASS_IN && checked && !(ips.is_empty() && targets.is_empty()) {
            let name: Arc<str> = message::text(question.host_name()).into();
            let ttl = Duration::from_secs(ttl.into());
            for ip in ips {
                lost |= sh.pin(now, &name, ip, Some(ttl));
            }
            for target in targets {
                lost |= sh.pins.lead(now, &name, target, ttl);
            }
        }
        if lost && sh.want_names() {
            // What is in the cache must be pinned, or the guest would be told addresses that rules do not know.
            self.cache.clear();
        }
        if question.class == CLASS_IN && question.recursion_desired() && holds {
            let most = if self.resolvers.are_local() { MAX_DNS_LOCAL_TTL } else { u32::MAX };
            self.cache.insert(now, question.key(), stored.clone(), ttl.min(most));
        }
        self.finish(sh, id, Outcome::Stored(stored));
    }
}

impl Pending {
    /// Opens a socket to `server` and sends the query, or begins to.
    fn send(&self, sh: &mut Shared, id: FlowId, server: SocketAddr) -> nix::Result<Upstream> {
        if self.manner.tcp {
            let (fd, _) = host::tcp_connect(&sh.budget, server, 0)?;
            let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
            sh.watch(fd.as_fd(), Token::Dns(id), flags)?;
            return Ok(Upstream::Tcp { fd, sent: 0, input: Vec::new() });
        }
        let fd = host::datagram_socket(&sh.budget, server.ip(), None)?;
        host::bind_outbound(&sh.budget, &fd, server.ip())?;
        connect(fd.as_raw_fd(), &SockaddrStorage::from(server))?;
        send(fd.as_raw_fd(), &self.query, MsgFlags::MSG_NOSIGNAL)?;
        sh.watch(fd.as_fd(), Token::Dns(id), EpollFlags::EPOLLIN)?;
        Ok(Upstream::Udp(fd))
    }

    /// Whether the socket has said too often that it has something.
    fn is_noisy(&self) -> bool {
        self.fruitless > MAX_FRUITLESS
    }

    /// Goes on as far as the socket lets it; the answer once it is there.
    fn progress(&mut self, buffer: &mut [u8]) -> nix::Result<Option<(Vec<u8>, Match)>> {
        let noisy = self.is_noisy();
        match &mut self.upstream {
            None => Ok(None),
            Some(Upstream::Udp(fd)) => {
                // A flood of wrong answers must not keep the thread: epoll tells again of what is left, if it does.
                let most = if noisy { MAX_QUEUED } else { TURN_ANSWERS };
                for turn in 0..most {
                    let got = recv(fd.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT);
                    match got {
                        Ok(len) => {
                            let answer = buffer.get(..len).unwrap_or_default();
                            let case = response::matches(answer, &self.query, &self.question);
                            if case != Match::Nothing {
                                return Ok(Some((answer.to_vec(), case)));
                            }
                            self.ignored += 1;
                        }
                        Err(Errno::EINTR) => {}
                        // An error of the network's has been announced then, or been put into the queue.
                        Err(errno) if errno == Errno::EAGAIN || is_of_network(errno) => {
                            let (about_us, others) = errors(fd, &self.query);
                            if about_us {
                                return Err(Errno::ECONNREFUSED);
                            }
                            let nothing = turn == 0 && others == 0;
                            self.ignored += others + usize::from(nothing);
                            self.fruitless = self.fruitless.saturating_add(u32::from(nothing));
                            if errno == Errno::EAGAIN {
                                return Ok(None);
                            }
                        }
                        Err(errno) => return Err(errno),
                    }
                }
                Ok(None)
            }
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
                        return match response::matches(answer, &self.query, &self.question) {
                            Match::Nothing => Err(Errno::EBADMSG),
                            case => Ok(Some((answer.to_vec(), case))),
                        };
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

/// Whether a socket says by this error what the network has said about its datagrams (ICMP), and not that it is broken.
fn is_of_network(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::ECONNREFUSED
            | Errno::EHOSTUNREACH
            | Errno::ENETUNREACH
            | Errno::EHOSTDOWN
            | Errno::ENONET
            | Errno::ENOPROTOOPT
            | Errno::EACCES
            | Errno::EPROTO
            | Errno::EOPNOTSUPP
            | Errno::EMSGSIZE
    )
}

/// Empties the error queue of a resolver's socket: whether an error in it is about `query`, and how many others there were.
fn errors(fd: &HostFd, query: &[u8]) -> (bool, usize) {
    let mut others = 0;
    for _ in 0..TURN_ANSWERS {
        match receive_error(fd) {
            Ok(Some(error)) if error.icmp.is_some() && quotes(&error.payload, query) => {
                return (true, others);
            }
            Ok(_) => others += 1,
            Err(_) => break,
        }
    }
    (false, others)
}

/// Whether what follows the headers in an ICMP error begins as `query` does, its identifier included. Behind it may be what
/// the kernel takes for more of it: zeroes to the length that a quotation has where extensions follow (RFC 4884), and with
/// kernels before 5.9 those.
fn quotes(quoted: &[u8], query: &[u8]) -> bool {
    let least = quoted.len().min(query.len()).clamp(message::HEADER, LEAST_QUOTED);
    quoted.get(..least).is_some_and(|quoted| query.starts_with(quoted))
}

/// Of 128 bytes, the least of a long packet that is quoted before extensions, what is behind the headers.
const LEAST_QUOTED: usize = 128 - 40 - 8;

/// Datagrams that are read from a resolver's socket before others get their turn, and errors.
const TURN_ANSWERS: usize = 64;

/// No more datagrams fit into the queue of a socket, unless its owner has asked for a large one.
const MAX_QUEUED: usize = 1_024;

/// Wake-ups of one try for a datagram that is not there. One whose checksum is wrong is announced, and gone when it is
/// read: that is one each. What else the kernel may announce it announces for ever.
const MAX_FRUITLESS: u32 = 32;
