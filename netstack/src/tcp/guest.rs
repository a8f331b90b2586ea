//! What a flow knows of the guest's end of its connection beside what smoltcp keeps to itself. Both values are those of one
//! connection: where another is tried for the same flow, they begin anew.

use smoltcp::time::Instant;
use smoltcp::wire::{TcpPacket, TcpSeqNumber};

use crate::config::{FIN_WAIT_PROBE, GUEST_SILENCE};
use crate::device::Said;

/// Segments that are sent without a word from the guest. More than fit into any window some times over: then something
/// is wrong, and the flow ends instead of going on for ever.
const MAX_UNHEARD: usize = 1 << 18;

/// Sequence numbers.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Numbers {
    /// The end of the data from the guest that reached farthest, and what was acknowledged last. If they differ, the
    /// receive ring may hold segments behind a gap.
    farthest: Option<TcpSeqNumber>,
    acknowledged: Option<TcpSeqNumber>,
    /// Where the guest's FIN is, once smoltcp has accepted it.
    guest_fin: Option<TcpSeqNumber>,
    /// The most that the guest has acknowledged.
    heard_ack: Option<TcpSeqNumber>,
    /// What acknowledges our FIN, once it has been sent.
    fin_ack: Option<TcpSeqNumber>,
    taken: bool,
}

impl Numbers {
    /// Notes what a segment of the guest's acknowledges. Whether it may be without news: it acknowledges what was
    /// acknowledged before, and not our FIN; and it is no probe of the guest's, which wants an answer. A probe is before
    /// what we have acknowledged.
    pub(super) fn hear_ack(&mut self, segment: &TcpPacket<&[u8]>) -> bool {
        // Older ones may come late, and what the guest sent before one may be lost.
        let ack = segment.ack_number();
        let again = self.heard_ack.is_some_and(|heard| ack <= heard);
        if !again && segment.ack() {
            self.heard_ack = Some(ack);
            self.taken |= !segment.syn();
        }
        let probe = self.acknowledged.is_none_or(|acknowledged| segment.seq_number() < acknowledged);
        again && !probe && self.fin_ack != Some(ack)
    }

    /// Notes how far a segment of the guest's reaches that smoltcp has been given; `ends`: it has taken the guest's FIN.
    pub(super) fn hear_data(&mut self, segment: &TcpPacket<&[u8]>, ends: bool) {
        let end = end_of(segment);
        if !segment.payload().is_empty() && self.farthest.is_none_or(|farthest| end > farthest) {
            self.farthest = Some(end);
        }
        if ends {
            self.guest_fin.get_or_insert(end);
        }
    }

    /// Notes what smoltcp has said.
    pub(super) fn say(&mut self, said: Said) {
        self.acknowledged = said.acknowledged.or(self.acknowledged);
        self.fin_ack = said.fin_ack.or(self.fin_ack);
    }

    /// Whether smoltcp has accepted the guest's FIN.
    pub(super) fn has_guest_fin(&self) -> bool {
        self.guest_fin.is_some()
    }

    /// Whether a segment has data behind the guest's FIN.
    pub(super) fn is_behind_fin(&self, segment: &TcpPacket<&[u8]>) -> bool {
        !segment.payload().is_empty() && self.guest_fin.is_some_and(|fin| end_of(segment) > fin)
    }

    /// Whether smoltcp may hold data from the guest that cannot be delivered yet: what reached farthest is not acknowledged.
    pub(super) fn has_gap(&self) -> bool {
        self.farthest.is_some_and(|end| self.acknowledged.is_none_or(|acknowledged| acknowledged < end))
    }

    /// Whether the guest has acknowledged more than its SYN-ACK does, which is data of ours. Before that its kernel may have
    /// no room for the connection (the backlog of listen(2)): it drops then whatever we send, and has perhaps forgotten that
    /// there was anything. That its server has spoken first is not looked at.
    pub(super) fn is_taken(&self) -> bool {
        self.taken
    }

    /// Sequence number and acknowledgement of a segment that asks the guest whether it still has the connection.
    pub(super) fn of_probe(&self) -> Option<(TcpSeqNumber, TcpSeqNumber)> {
        Some((self.heard_ack? - 1, self.acknowledged?))
    }

    /// Those of one by which the guest would say again how far it is.
    pub(super) fn of_guest(&self) -> Option<(TcpSeqNumber, Option<TcpSeqNumber>)> {
        Some((self.acknowledged?, self.heard_ack))
    }
}

fn end_of(segment: &TcpPacket<&[u8]>) -> TcpSeqNumber {
    segment.seq_number() + segment.payload().len()
}

/// For how long the guest has said nothing, and whether it should have.
#[derive(Debug, Clone, Copy)]
pub(super) struct Silence {
    /// When the guest was last heard of, or it began to owe us an acknowledgement, whichever was later.
    since: Instant,
    /// Segments sent since it was heard of.
    unheard: usize,
    /// It owes us an acknowledgement.
    owes: bool,
    /// When it was last asked whether it still has the connection.
    asked: Option<Instant>,
}

impl Silence {
    pub(super) fn new(now: Instant) -> Self {
        Self { since: now, unheard: 0, owes: false, asked: None }
    }

    /// The guest has said something.
    pub(super) fn end(&mut self, now: Instant) {
        self.since = now;
        self.unheard = 0;
    }

    /// So many segments have been sent.
    pub(super) fn sent(&mut self, segments: usize) {
        self.unheard += segments;
    }

    /// The guest has been asked whether it still has the connection.
    pub(super) fn ask(&mut self, now: Instant) {
        self.asked = Some(now);
    }

    /// Notes whether the guest owes us an acknowledgement.
    pub(super) fn set_owed(&mut self, owes: bool, now: Instant) {
        if owes && !self.owes {
            self.since = now;
        }
        self.owes = owes;
    }

    /// When the guest was last heard of, or it began to owe us an acknowledgement, whichever was later.
    pub(super) fn since(&self) -> Instant {
        self.since
    }

    /// Since when it should have said something.
    pub(super) fn owed_since(&self) -> Option<Instant> {
        self.owes.then_some(self.since)
    }

    /// When the guest is to be asked next whether it still has a connection on which it owes us nothing.
    pub(super) fn ask_at(&self) -> Instant {
        self.asked.map_or(self.since, |asked| asked.max(self.since)) + FIN_WAIT_PROBE
    }

    /// Whether the flow is to be given up: the guest owes us something, or was asked.
    pub(super) fn is_too_long(&self, now: Instant) -> bool {
        let awaited = self.owes || self.asked > Some(self.since);
        awaited && now >= self.since + GUEST_SILENCE || self.unheard >= MAX_UNHEARD
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use smoltcp::time::Duration;

    const SYN: u8 = 0x02;
    const ACK: u8 = 0x10;

    /// A segment of the guest's as bytes.
    fn segment(seq: i32, ack: i32, flags: u8, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; 20 + len];
        let mut segment = TcpPacket::new_unchecked(&mut bytes[..]);
        segment.set_seq_number(TcpSeqNumber(seq));
        segment.set_ack_number(TcpSeqNumber(ack));
        segment.set_header_len(20);
        segment.set_syn(flags & SYN != 0);
        segment.set_ack(flags & ACK != 0);
        bytes
    }

    fn view(bytes: &[u8]) -> TcpPacket<&[u8]> {
        TcpPacket::new_unchecked(bytes)
    }

    fn said(acknowledged: i32, fin_ack: Option<i32>) -> Said {
        Said { acknowledged: Some(TcpSeqNumber(acknowledged)), fin_ack: fin_ack.map(TcpSeqNumber) }
    }

    #[test]
    fn only_what_is_said_again_and_asks_nothing_is_without_news() {
        let mut numbers = Numbers::default();
        let hear = |numbers: &mut Numbers, seq, ack| numbers.hear_ack(&view(&segment(seq, ack, ACK, 0)));
        assert!(!hear(&mut numbers, 100, 500));
        // Nothing has been acknowledged yet, so it may ask.
        assert!(!hear(&mut numbers, 100, 500));
        numbers.say(said(100, Some(601)));
        assert!(hear(&mut numbers, 100, 500) && hear(&mut numbers, 100, 400));
        assert!(!hear(&mut numbers, 99, 500), "a probe");
        assert!(!hear(&mut numbers, 100, 600), "news");
        assert!(!hear(&mut numbers, 100, 601) && !hear(&mut numbers, 100, 601), "of our FIN");
        // What is said without a FIN leaves the FIN where it is, and an old acknowledgement takes nothing back.
        numbers.say(said(110, None));
        assert!(hear(&mut numbers, 110, 600) && !hear(&mut numbers, 110, 601));
        assert_eq!(numbers.of_guest(), Some((TcpSeqNumber(110), Some(TcpSeqNumber(601)))));
        assert_eq!(numbers.of_probe(), Some((TcpSeqNumber(600), TcpSeqNumber(110))));
    }

    #[test]
    fn a_connection_is_taken_when_data_is_acknowledged_and_not_by_what_the_server_says() {
        let mut numbers = Numbers::default();
        numbers.hear_ack(&view(&segment(7, 501, SYN | ACK, 0)));
        let speaks = segment(8, 501, ACK, 10);
        numbers.hear_ack(&view(&speaks));
        assert!(!numbers.is_taken());
        numbers.hear_ack(&view(&segment(18, 502, ACK, 0)));
        assert!(numbers.is_taken());
    }

    #[test]
    fn a_gap_is_there_until_what_reached_farthest_is_acknowledged() {
        // Across the end of the numbers.
        let base = i32::MAX - 5;
        let mut numbers = Numbers::default();
        numbers.say(said(base, None));
        assert!(!numbers.has_gap());
        numbers.hear_data(&view(&segment(base.wrapping_add(10), 0, ACK, 10)), false);
        numbers.hear_data(&view(&segment(base.wrapping_add(5), 0, ACK, 5)), false);
        numbers.say(said(base.wrapping_add(10), None));
        assert!(numbers.has_gap());
        numbers.say(said(base.wrapping_add(20), None));
        assert!(!numbers.has_gap());
    }

    #[test]
    fn nothing_is_behind_the_first_fin() {
        let mut numbers = Numbers::default();
        let last = segment(100, 0, ACK, 10);
        assert!(!numbers.is_behind_fin(&view(&last)));
        numbers.hear_data(&view(&last), true);
        // Acknowledgements that follow reach one octet farther, and have none.
        numbers.hear_data(&view(&segment(111, 0, ACK, 0)), true);
        assert!(numbers.has_guest_fin() && !numbers.is_behind_fin(&view(&last)));
        assert!(numbers.is_behind_fin(&view(&segment(100, 0, ACK, 11))));
        assert!(!numbers.is_behind_fin(&view(&segment(111, 0, ACK, 0))));
    }

    #[test]
    fn silence_is_too_long_only_when_something_is_awaited() {
        let at = |seconds| Instant::from_secs(1_000) + Duration::from_secs(seconds);
        let (probe, most) = (FIN_WAIT_PROBE.secs(), GUEST_SILENCE.secs());
        let mut silence = Silence::new(at(0));
        assert!(!silence.is_too_long(at(10 * most)));
        assert_eq!(silence.ask_at(), at(probe));
        silence.ask(at(probe));
        assert_eq!(silence.ask_at(), at(2 * probe));
        assert!(!silence.is_too_long(at(most - 1)) && silence.is_too_long(at(most)));
        // An answer is an answer.
        silence.end(at(100));
        assert!(!silence.is_too_long(at(10 * most)));
        // What it owes, it owes since it began to.
        silence.set_owed(true, at(200));
        silence.set_owed(true, at(250));
        assert_eq!(silence.owed_since(), Some(at(200)));
        assert!(!silence.is_too_long(at(200 + most - 1)) && silence.is_too_long(at(200 + most)));
        silence.set_owed(false, at(300));
        assert_eq!(silence.owed_since(), None);
        silence.sent(MAX_UNHEARD);
        assert!(silence.is_too_long(at(300)));
    }
}
