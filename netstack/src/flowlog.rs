//! What a caller may learn of every flow: that it began, was refused, or ended, with what it carried.
//!
//! The caller's function runs on the stack's thread and holds everything up for as long as it takes, so it must not wait
//! for anybody. Without one nothing is told, and all that a flow costs is its counters.
//!
//! Flows of the world are told, and of published ports; what the stack answers itself (names, echo requests to the
//! gateway) is none. A guest may be refused as often as it likes, so refusals are told at a bounded rate, with the number
//! of those that were not; flows that were allowed are told all, those included of which the host says at once that they
//! cannot be. One that is allowed but beyond a limit of the stack's is refused: nothing of it leaves.

use std::net::SocketAddr;
use std::sync::Arc;

use smoltcp::time::{Duration, Instant};

use crate::config::{REFUSALS_TOLD, REFUSALS_TOLD_PER_SECOND};
use crate::flow::FlowKey;
use crate::policy::Transport;

/// A function that is told of flows.
#[derive(Clone)]
pub struct FlowLog(Arc<dyn Fn(&FlowEvent<'_>) + Send + Sync>);

impl FlowLog {
    /// `tell` runs on the stack's thread, and must not wait.
    pub fn new(tell: impl Fn(&FlowEvent<'_>) + Send + Sync + 'static) -> Self {
        Self(Arc::new(tell))
    }

    pub(crate) fn tell(&self, event: &FlowEvent<'_>) {
        (self.0)(event);
    }
}

impl std::fmt::Debug for FlowLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FlowLog").finish_non_exhaustive()
    }
}

/// Something that happened to a flow.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct FlowEvent<'a> {
    /// Protocol.
    pub transport: Transport,
    /// It came from outside, to a published port.
    pub inbound: bool,
    /// Its end inside. The port of an echo request is its identifier.
    pub guest: SocketAddr,
    /// Its other end, as the guest sees it.
    pub remote: SocketAddr,
    /// A name by which the guest knows that address, if it asked our name server.
    pub name: Option<&'a str>,
    /// What happened.
    pub kind: FlowEventKind<'a>,
}

/// What happened to a flow.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum FlowEventKind<'a> {
    /// It is allowed, and begins. A TCP connection to the peer is not there yet.
    Opened,
    /// It is refused, by a rule or for want of something.
    Refused {
        /// In a word.
        reason: &'static str,
        /// The rule that denies it, if one does.
        rule: Option<&'a str>,
        /// Refusals before this one that were not told.
        untold: u64,
    },
    /// It is over.
    Closed {
        /// In a word.
        reason: &'static str,
        /// What went from the guest to the world.
        sent: Traffic,
        /// What came from the world to the guest.
        received: Traffic,
        /// From its beginning to its end; for those that end by idleness, this included.
        lasted: std::time::Duration,
    },
}

/// What went one way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes, without headers.
    pub bytes: u64,
    /// Packets on the guest's side; a TCP segment that the guest's kernel and the stack have left in one piece is one.
    pub packets: u64,
}

impl Traffic {
    pub(crate) fn add(&mut self, bytes: usize) {
        self.packets += 1;
        self.add_bytes(bytes);
    }

    pub(crate) fn add_bytes(&mut self, bytes: usize) {
        self.bytes += u64::try_from(bytes).unwrap_or(u64::MAX);
    }
}

/// A flow that exists, and what it has carried so far.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FlowState {
    /// Protocol.
    pub transport: Transport,
    /// It came from outside, to a published port.
    pub inbound: bool,
    /// Its end inside. The port of an echo request is its identifier.
    pub guest: SocketAddr,
    /// Its other end, as the guest sees it.
    pub remote: SocketAddr,
    /// A name by which the guest knows that address, if it asked our name server.
    pub name: Option<String>,
    /// What went from the guest to the world.
    pub sent: Traffic,
    /// What came from the world to the guest.
    pub received: Traffic,
    /// For how long it has been there.
    pub lasted: std::time::Duration,
}

/// Takes flows one by one: protocol, whether it came from outside, its ends, what is counted.
pub(crate) type EachFlow<'a> = dyn FnMut(Transport, bool, FlowKey, &Account) + 'a;

/// What is counted of a flow.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Account {
    pub(crate) opened: Instant,
    pub(crate) sent: Traffic,
    pub(crate) received: Traffic,
    /// The stack ended before all of it had gone.
    pub(crate) cut: bool,
}

impl Account {
    pub(crate) fn new(now: Instant) -> Self {
        Self { opened: now, sent: Traffic::default(), received: Traffic::default(), cut: false }
    }

    pub(crate) fn lasted(&self, now: Instant) -> std::time::Duration {
        if now > self.opened { (now - self.opened).into() } else { std::time::Duration::ZERO }
    }

    pub(crate) fn closed(&self, now: Instant, reason: &'static str) -> FlowEventKind<'static> {
        let lasted = self.lasted(now);
        let reason = if self.cut { "cut" } else { reason };
        FlowEventKind::Closed { reason, sent: self.sent, received: self.received, lasted }
    }
}

/// Keeps refusals to a bounded rate.
#[derive(Debug)]
pub(crate) struct Refusals {
    /// What may be told at once, and since when it grows.
    left: u64,
    since: Instant,
    untold: u64,
}

impl Refusals {
    pub(crate) fn new(now: Instant) -> Self {
        Self { left: REFUSALS_TOLD, since: now, untold: 0 }
    }

    /// Whether one more may be told, and how many before it were not.
    pub(crate) fn take(&mut self, now: Instant) -> Option<u64> {
        let seconds = if now > self.since { (now - self.since).secs() } else { 0 };
        if seconds > 0 {
            let more = seconds.saturating_mul(REFUSALS_TOLD_PER_SECOND);
            self.left = self.left.saturating_add(more).min(REFUSALS_TOLD);
            self.since += Duration::from_secs(seconds);
        }
        if self.left == 0 {
            self.untold += 1;
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.untold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_told_at_a_bounded_rate_and_those_left_out_are_counted() {
        let at = |millis| Instant::from_secs(100) + Duration::from_millis(millis);
        let mut refusals = Refusals::new(at(0));
        for _ in 0..REFUSALS_TOLD {
            assert_eq!(refusals.take(at(0)), Some(0));
        }
        assert_eq!([refusals.take(at(1)), refusals.take(at(999))], [None; 2]);
        assert_eq!(refusals.take(at(1000)), Some(2));
        let told = (0..5 * REFUSALS_TOLD).filter(|_| refusals.take(at(1500)).is_some()).count();
        assert_eq!(u64::try_from(told), Ok(REFUSALS_TOLD_PER_SECOND - 1));
        // However long nothing was refused, no more than that.
        let told = (0..5 * REFUSALS_TOLD).filter(|_| refusals.take(at(9_000_000)).is_some()).count();
        assert_eq!(u64::try_from(told), Ok(REFUSALS_TOLD));
    }
}
