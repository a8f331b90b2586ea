//! How fast data may go: a token bucket for each way, shared by all flows.
//!
//! Towards the guest the stack does not read the host's sockets while the bucket is empty: TCP peers find their window
//! closed, datagrams wait in the host's queues. From the guest a TCP connection's ring is not emptied, which closes the
//! window that the guest's kernel sees. Datagrams and echo requests have no window: they go, the bucket is in debt for them,
//! and nothing is read from the TAP until that is paid, so that the guest's kernel finds its link busy.
//!
//! While TCP flows want more than may go, datagrams have half at most: they come first, and a flood of them would leave
//! nothing else. What has come for the guest beyond that waits in the host's queues, too. What the guest sends beyond it is
//! dropped ([`Bucket::admit`]), as behind it in the TAP, which is read then in any case, is what its connections send.
//!
//! The datagrams of a super-segment of the guest's come at once, whatever the rate: the debt for all of them could be one
//! of a minute, for which everything else would wait. Those go that are paid for soon, and the others are dropped
//! ([`Bucket::admit_run`]), as a link drops what its queue has no room for. Nothing else is dropped for a rate.
//!
//! What comes for the guest is never dropped: the host's kernel puts datagrams together (UDP_GRO) that nobody sent
//! together. At rates at which it would take long to pay for as many as that, it is not asked to
//! ([`Bucket::takes_runs`]), and they wait in its queues one by one. It is asked when a socket is opened: those that are
//! open when the rate is lowered get runs still, and the debt for one at the least rate is one of a minute.
//!
//! TCP flows that want more than may go share what there is in equal parts ([`Bucket::share`]), and take turns where that
//! would be too little for each (`flows.rs`), whether they cross the TAP or not.
//!
//! What counts is what the flows carry: the payload of TCP, UDP and echo messages that leave for the world or come from
//! it. What the stack answers itself is free.

use smoltcp::time::{Duration, Instant};

/// Least rate, in bytes per second: the longest datagram is paid for in about a minute.
const LEAST: u64 = 1_000;
/// Greatest rate and burst; beyond any machine, and far from overflow.
const MOST: u64 = 1 << 40;
/// Shortest burst: a super-segment.
const LEAST_BURST: u64 = 64 * 1024;
/// The longest run of datagrams that the host's kernel puts together.
const LONGEST_RUN: i64 = 64 * 1024;
/// The least that one flow gets while there is that much: else only small segments would go.
const LEAST_PART: usize = 1_500;
/// What datagrams may take at once while TCP flows want more, and how much those of a super-segment may owe while none do:
/// this part of what goes in a second, and one of usual size at least.
const DATAGRAM_BURST: u64 = 10;
const LEAST_AT_ONCE: i64 = 1_500;

/// A rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// In the long run. Taken for 1,000 if it is less.
    pub bytes_per_second: u64,
    /// What may go at once after a time of rest; `None`: what goes in a tenth of a second. At least 64 KiB.
    pub burst: Option<u64>,
}

/// Rates of all flows together; `None`: as fast as it goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rates {
    /// From the guest to the world.
    pub sent: Option<Rate>,
    /// From the world to the guest.
    pub received: Option<Rate>,
}

/// What may go one way now.
#[derive(Debug)]
pub(crate) struct Bucket {
    /// Bytes per second, and at once.
    limit: Option<(u64, u64)>,
    tokens: i64,
    /// Millionths of a token.
    spare: u64,
    /// Until when tokens have been added.
    filled: Instant,
    /// It was emptied, and has not got enough yet to be worth a turn.
    dry: bool,
    /// Flows that wanted more than went when they were looked after last.
    sharers: usize,
    /// What datagrams may take while there are such flows, in halves of a token: each token that comes is half theirs.
    credit: i64,
    /// What each of them may take when it is looked after, which may be several times in one turn of the engine.
    part: usize,
}

impl Bucket {
    /// A full one.
    pub(crate) fn new(rate: Option<Rate>, now: Instant) -> Self {
        let limit = rate.map(|Rate { bytes_per_second, burst }| {
            let rate = bytes_per_second.clamp(LEAST, MOST);
            (rate, burst.unwrap_or(rate / 10).clamp(LEAST_BURST, MOST))
        });
        let tokens = limit.map_or(0, |(_, burst)| signed(burst));
        let credit = limit.map_or(0, |(rate, _)| most_credit(rate));
        Self { limit, tokens, spare: 0, filled: now, dry: false, sharers: 0, credit, part: usize::MAX }
    }

    /// Becomes a full one with another rate. Who shares it does so still.
    pub(crate) fn set_rate(&mut self, rate: Option<Rate>, now: Instant) {
        *self = Self { sharers: self.sharers, ..Self::new(rate, now) };
        self.divide();
    }

    /// Puts in what time has brought, and divides what there is for this turn.
    pub(crate) fn fill(&mut self, now: Instant) {
        self.pour(now);
        self.divide();
    }

    fn divide(&mut self) {
        if self.limit.is_none() {
            return;
        }
        // Rounded up: a rest would go as a segment of a few bytes.
        self.part = self.left().div_ceil(self.sharers.max(1)).max(LEAST_PART);
    }

    fn pour(&mut self, now: Instant) {
        let Some((rate, burst)) = self.limit else { return };
        if now <= self.filled {
            return;
        }
        let new = u128::from(rate) * u128::from((now - self.filled).total_micros()) + u128::from(self.spare);
        self.filled = now;
        let tokens = i64::try_from(new / 1_000_000).unwrap_or(i64::MAX);
        self.tokens = self.tokens.saturating_add(tokens);
        self.credit = self.credit.saturating_add(tokens).min(most_credit(rate));
        self.spare = u64::try_from(new % 1_000_000).unwrap_or(0);
        if self.tokens >= signed(burst) {
            (self.tokens, self.spare) = (signed(burst), 0);
        }
        self.dry &= self.tokens < self.turn();
    }

    /// A hundredth of a second's worth: less is not worth waking up for.
    fn turn(&self) -> i64 {
        self.limit.map_or(0, |(rate, burst)| signed((rate / 100).clamp(1, burst)))
    }

    /// Bytes that may go now.
    pub(crate) fn left(&self) -> usize {
        match self.limit {
            None => usize::MAX,
            Some(_) if self.dry => 0,
            Some(_) => usize::try_from(self.tokens).unwrap_or(0),
        }
    }

    /// The part of one flow of that, when it is looked after.
    pub(crate) fn share(&self) -> usize {
        if self.limit.is_none() { usize::MAX } else { self.left().min(self.part) }
    }

    /// Whether a flow wants more than has gone of it, and whether it did before.
    pub(crate) fn count_sharer(&mut self, before: bool, wants: bool) {
        self.sharers = self.sharers.saturating_add(usize::from(wants)).saturating_sub(usize::from(before));
    }

    #[cfg(test)]
    pub(crate) fn sharers(&self) -> usize {
        self.sharers
    }

    pub(crate) fn take(&mut self, bytes: usize) {
        if self.limit.is_some() && bytes > 0 {
            self.tokens = self.tokens.saturating_sub(i64::try_from(bytes).unwrap_or(i64::MAX));
            self.dry |= self.tokens <= 0;
        }
    }

    /// Tokens for a datagram that goes, even if there are none.
    pub(crate) fn take_datagram(&mut self, bytes: usize) {
        self.take(bytes);
        // Who is alone has all, and owes nothing to those who come later.
        if self.limit.is_some() && self.sharers > 0 {
            let halves = i64::try_from(bytes).unwrap_or(i64::MAX).saturating_mul(2);
            self.credit = self.credit.saturating_sub(halves);
        }
    }

    /// Whether datagrams have had their half while TCP flows want more.
    fn have_datagrams_had_theirs(&self) -> bool {
        self.limit.is_some() && self.sharers > 0 && self.credit <= 0
    }

    /// Whether a datagram of the guest's may go, for which the tokens are taken then. If not it is to be dropped.
    #[must_use]
    pub(crate) fn admit(&mut self, bytes: usize) -> bool {
        self.admit_run(std::iter::once(bytes)) == 1
    }

    /// How many of the datagrams that came as one super-segment may go, for which the tokens are taken then. The others
    /// are to be dropped.
    ///
    /// Those that are alone go until they owe what may go [`at_once`]. While TCP flows want more there never are tokens to
    /// speak of, and what counts is the datagrams' half. They may owe what it brings in a second, for a super-segment is
    /// more than they may have saved: with less, some of each would be lost although all are less than the half. (Below
    /// 100,000 bytes per second some of the longest are lost even so: the alternative is that connections wait for them for
    /// many seconds. A few they do wait at the least rates, at which a datagram of usual size takes longer than a second.)
    #[must_use]
    pub(crate) fn admit_run(&mut self, lengths: impl Iterator<Item = usize>) -> usize {
        let Some((rate, _)) = self.limit else { return lengths.count() };
        let mut admitted = 0;
        for len in lengths {
            // One that comes alone goes, however long it is.
            let waits = if admitted == 0 {
                self.have_datagrams_had_theirs()
            } else if self.sharers == 0 {
                self.tokens <= -at_once(rate)
            } else {
                self.credit <= -signed(rate).max(most_credit(rate))
            };
            if waits {
                break;
            }
            self.take_datagram(len);
            admitted += 1;
        }
        admitted
    }

    /// Whether what comes together may be taken together, since the debt for it is soon paid.
    pub(crate) fn takes_runs(&self) -> bool {
        self.limit.is_none_or(|(rate, _)| at_once(rate) >= LONGEST_RUN)
    }

    /// Whether datagrams wait where they are.
    pub(crate) fn have_datagrams_to_wait(&self) -> bool {
        self.is_dry() || self.have_datagrams_had_theirs()
    }

    /// When they need not any more, if nothing else changes.
    pub(crate) fn datagrams_at(&self) -> Option<Instant> {
        let (rate, _) = self.limit?;
        let missing = u64::try_from(1_i64.saturating_sub(self.credit)).unwrap_or(0);
        let time = Duration::from_micros(missing.saturating_mul(1_000_000).div_ceil(rate));
        self.have_datagrams_had_theirs().then_some(self.filled + time).max(self.ready_at())
    }

    /// Whether nothing may go now.
    pub(crate) fn is_dry(&self) -> bool {
        self.dry
    }

    /// Whether no frame of the guest's is read until what datagrams took is paid for. While TCP flows want more, what
    /// datagrams may take is bounded, and the flows' own frames are among them.
    pub(crate) fn holds_frames(&self) -> bool {
        self.is_in_debt() && self.sharers == 0
    }

    /// Whether more has gone than may.
    pub(crate) fn is_in_debt(&self) -> bool {
        self.tokens < 0
    }

    /// How much more.
    pub(crate) fn debt(&self) -> u64 {
        if self.is_in_debt() { self.tokens.unsigned_abs() } else { 0 }
    }

    /// When it will not be dry any more.
    pub(crate) fn ready_at(&self) -> Option<Instant> {
        let (rate, _) = self.limit.filter(|_| self.dry)?;
        let missing = u64::try_from(self.turn().saturating_sub(self.tokens)).unwrap_or(0);
        let micros = missing.saturating_mul(1_000_000).saturating_sub(self.spare).div_ceil(rate);
        Some(self.filled + Duration::from_micros(micros))
    }
}

/// The most that datagrams may have saved, in halves of a token.
fn most_credit(rate: u64) -> i64 {
    2 * at_once(rate)
}

/// What datagrams may take at once.
fn at_once(rate: u64) -> i64 {
    signed(rate / DATAGRAM_BURST).max(LEAST_AT_ONCE)
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(micros: u64) -> Instant {
        Instant::from_secs(100) + Duration::from_micros(micros)
    }

    fn bucket(bytes_per_second: u64, burst: Option<u64>) -> Bucket {
        Bucket::new(Some(Rate { bytes_per_second, burst }), at(0))
    }

    #[test]
    fn without_a_rate_everything_may_go() {
        let mut bucket = Bucket::new(None, at(0));
        bucket.take(usize::MAX);
        bucket.fill(at(1));
        assert_eq!((bucket.left(), bucket.share(), bucket.ready_at()), (usize::MAX, usize::MAX, None));
        assert!(!bucket.is_dry() && !bucket.is_in_debt());
    }

    #[test]
    fn a_burst_may_go_and_then_the_rate() {
        let mut bucket = bucket(1_000_000, Some(200_000));
        assert_eq!(bucket.left(), 200_000);
        bucket.take(200_000);
        assert!(bucket.is_dry() && !bucket.is_in_debt());
        // A hundredth of a second at once, and not before.
        assert_eq!(bucket.ready_at(), Some(at(10_000)));
        bucket.fill(at(9_999));
        assert_eq!(bucket.left(), 0);
        bucket.fill(at(10_000));
        assert_eq!(bucket.left(), 10_000);
        // However long it rests, no more than the burst.
        bucket.fill(at(90_000_000));
        assert_eq!((bucket.left(), bucket.share()), (200_000, 200_000));
    }

    #[test]
    fn flows_that_want_more_have_equal_parts_of_a_turn() {
        let mut bucket = bucket(1_000_000, Some(200_000));
        let wants = |bucket: &mut Bucket, before: usize, now: usize| {
            (0..before).for_each(|_| bucket.count_sharer(true, false));
            (0..now).for_each(|_| bucket.count_sharer(false, true));
            bucket.fill(at(1));
            bucket.share()
        };
        assert_eq!(wants(&mut bucket, 0, 3), 66_667);
        bucket.take(66_667);
        assert_eq!(bucket.share(), 66_667, "what others took first is not theirs");
        bucket.take(66_667);
        assert_eq!((bucket.share(), bucket.left()), (66_666, 66_666));
        bucket.take(66_666);
        bucket.fill(at(1_000_000));
        // Never so little that only small segments would go; alone again, everything.
        assert_eq!(wants(&mut bucket, 3, 1_000), 1_500);
        assert_eq!(wants(&mut bucket, 1_000, 1), 200_000);
        bucket.set_rate(Some(Rate { bytes_per_second: 5_000, burst: Some(100_000) }), at(1_000_001));
        assert_eq!((bucket.sharers(), bucket.share()), (1, 100_000));
    }

    #[test]
    fn datagrams_have_half_while_others_want_more_however_often_is_looked() {
        for (rate, step) in [(1_000, 10), (1_000, 50_000), (12_345, 7_777), (100_000_000, 100)] {
            let mut bucket = bucket(rate, None);
            bucket.count_sharer(false, true);
            let mut theirs = 0;
            let mut now = 0;
            // Theirs goes at once, and what has been saved with it.
            let (saved, seconds) = (most_credit(rate).unsigned_abs() / 2, 20);
            while now < seconds * 1_000_000 {
                assert_eq!(bucket.datagrams_at().is_some(), bucket.have_datagrams_to_wait());
                while bucket.admit(100) {
                    theirs += 100;
                }
                let at_last = bucket.datagrams_at().expect("they wait");
                assert!(at_last > at(now), "{rate}");
                now += step.max((at_last - at(now)).total_micros());
                bucket.fill(at(now));
                assert!(bucket.is_dry() || bucket.admit(0));
                // Others take the rest.
                bucket.take(bucket.left());
            }
            let fair = saved + rate * seconds / 2;
            assert!(
                theirs >= fair * 9 / 10 && theirs <= fair + fair / 10 + 100,
                "{rate}: {theirs} of {fair}"
            );
            bucket.count_sharer(true, false);
            assert!((0..100).all(|_| bucket.admit(1_000)), "alone they have all");
        }
    }

    #[test]
    fn of_datagrams_that_come_together_those_go_that_are_soon_paid_for() {
        let run = |bucket: &mut Bucket, count: usize| bucket.admit_run(std::iter::repeat_n(1_000, count));
        let mut unlimited = Bucket::new(None, at(0));
        assert_eq!(run(&mut unlimited, 100), 100);
        for (rate, beyond) in [(1_000, 2), (100_000, 10), (100_000_000, 100)] {
            let mut bucket = bucket(rate, Some(100_000));
            assert_eq!(run(&mut bucket, 99), 99, "what is there");
            assert_eq!(run(&mut bucket, 101), 1 + beyond.min(100), "{rate}");
        }
        // One goes, however long it is.
        let mut alone = bucket(1_000, Some(LEAST_BURST));
        alone.take(usize::try_from(LEAST_BURST).expect("small"));
        assert_eq!(alone.admit_run([60_000, 1].into_iter()), 1);
        // Of their half they owe what it brings in a second.
        for (rate, most) in [(1_000, 3), (100_000, 60)] {
            let mut shared = bucket(rate, Some(100_000));
            shared.count_sharer(false, true);
            assert_eq!((run(&mut shared, 100), run(&mut shared, 1)), (most, 0));
        }
    }

    #[test]
    fn super_segments_that_are_less_than_the_datagrams_half_go() {
        const EACH: usize = 1_400;
        for rate in [125_000, 250_000, 500_000] {
            let mut bucket = bucket(rate, None);
            bucket.count_sharer(false, true);
            let (mut offered, mut gone, mut others, mut debt) = (0, 0, 0, 0);
            for millis in 1..=60_000 {
                bucket.fill(at(millis * 1_000));
                others += bucket.left() as u64;
                bucket.take(bucket.left());
                // Four fifths of the half.
                if offered < rate * millis / 2_500 {
                    offered += 45 * EACH as u64;
                    gone += (bucket.admit_run(std::iter::repeat_n(EACH, 45)) * EACH) as u64;
                    debt = debt.max(bucket.debt());
                }
            }
            assert!(gone * 100 >= offered * 95, "{rate}: {gone} of {offered}");
            assert!(debt < rate && others >= rate * 60 / 2, "{rate}: {debt} {others}");
        }
    }

    #[test]
    fn what_comes_together_is_taken_together_if_that_is_soon_paid() {
        assert!(Bucket::new(None, at(0)).takes_runs());
        assert_eq!(
            [1_000, 655_359, 655_360].map(|rate| bucket(rate, None).takes_runs()),
            [false, false, true]
        );
    }

    #[test]
    fn debt_is_paid_first() {
        let mut bucket = bucket(1_000_000, None);
        assert_eq!(bucket.left(), 100_000);
        bucket.take(130_000);
        assert!(bucket.is_dry() && bucket.is_in_debt());
        assert_eq!(bucket.ready_at(), Some(at(40_000)));
        bucket.fill(at(30_000));
        assert!(bucket.is_dry() && !bucket.is_in_debt());
    }

    #[test]
    fn looking_often_brings_neither_more_nor_less() {
        let mut bucket = bucket(12_345, Some(LEAST_BURST));
        bucket.take(usize::try_from(2 * LEAST_BURST).expect("small"));
        let debt = bucket.tokens;
        for micros in (0..1_000_000).step_by(7) {
            bucket.fill(at(micros));
        }
        bucket.fill(at(1_000_000));
        assert_eq!(bucket.tokens - debt, 12_345);
    }

    #[test]
    fn rates_and_bursts_that_make_no_sense_are_bounded() {
        for rate in [0, u64::MAX] {
            for burst in [None, Some(0), Some(u64::MAX)] {
                let mut bucket = bucket(rate, burst);
                bucket.take(usize::MAX);
                bucket.take(1 << 20);
                assert!(bucket.ready_at() > Some(at(0)));
                bucket.fill(at(u64::MAX / 4));
            }
        }
    }
}
