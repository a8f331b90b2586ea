//! When it is worth it that a companion begins, and goes on.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// So many requests of one thread, none of another between, and the companion takes over.
pub(super) const STREAK: u32 = 32;

/// If they come slower than that, waking up is not what they wait for. (On another processor the least request took 15 to
/// 240 us, docs/decisions/0009; more where other virtual machines have the host's.)
pub(super) const SLOW: Duration = Duration::from_millis(1);

/// After so many requests the companion looks whether it is worth it, and, if it is not or they have become slow, where
/// the asker is now.
pub(super) const LOOK: u32 = 8;

/// How many of these, at most, came from another thread than the one before: one between makes two.
const OTHERS: u32 = 2;

/// It is worth it while requests take less than so many percent of the time that they took before.
const WORTH: u32 = 80;

/// How many looks in a row may find that it is not.
const PATIENCE: u32 = 8;

/// Who has left the companion's processor stays where he is, and his requests take four times as long: if they take so
/// many times as long as when both were together, it looks where he is.
const AWAY: u32 = 2;

/// After so many ticks without a request all is as before.
const QUIET: u32 = 4;

/// Who asked last, and how often since somebody else did.
#[derive(Debug)]
pub(super) struct Streak {
    /// [`SLOW`].
    slow: Duration,
    /// The thread and the count.
    last: AtomicU64,
    /// When it began, in nanoseconds since `clock`.
    began: AtomicU64,
    clock: Instant,
}

impl Streak {
    pub(super) fn new(slow: Duration) -> Self {
        Self { slow, last: AtomicU64::new(0), began: AtomicU64::new(0), clock: Instant::now() }
    }

    /// Counts a request of a thread; says how long each took when that were enough. Two at a time may be counted as
    /// one: then they do not come one after the other.
    pub(super) fn count(&self, asker: u32) -> Option<Duration> {
        let last = self.last.load(Ordering::Relaxed);
        let pack = |count: u32| u64::from(asker) << 32 | u64::from(count);
        let count = last.wrapping_sub(pack(0));
        if !(1..u64::from(STREAK)).contains(&count) {
            self.began.store(self.nanos(), Ordering::Relaxed);
            self.last.store(pack(1), Ordering::Relaxed);
            return None;
        }
        self.last.store(last + 1, Ordering::Relaxed);
        if count + 1 < u64::from(STREAK) {
            return None;
        }
        let took = self.nanos().saturating_sub(self.began.load(Ordering::Relaxed));
        let pace = Duration::from_nanos(took) / STREAK;
        (pace <= self.slow).then_some(pace)
    }

    fn nanos(&self) -> u64 {
        u64::try_from(self.clock.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// The least time that requests have taken with a companion so far, in nanoseconds.
#[derive(Debug)]
pub(super) struct Best(AtomicU64);

impl Best {
    pub(super) fn new() -> Self {
        Self(AtomicU64::new(u64::MAX))
    }

    fn note(&self, pace: Duration) {
        let nanos = u64::try_from(pace.as_nanos()).unwrap_or(u64::MAX);
        if nanos < self.0.load(Ordering::Relaxed) {
            self.0.store(nanos, Ordering::Relaxed);
        }
    }

    /// Whether one may be worth it where requests take so long. It is not where asker and worker are on one processor by
    /// chance; to begin and end there would only put off the next one, for which there may be more to gain.
    pub(super) fn is_better_than(&self, pace: Duration) -> bool {
        let best = self.0.load(Ordering::Relaxed);
        best == u64::MAX || pace * WORTH > Duration::from_nanos(best) * 100
    }
}

/// How the companion gets along with the one whom it serves.
#[derive(Debug)]
pub(super) struct Progress {
    pub(super) asker: u32,
    /// How long a request took before.
    before: Duration,
    /// Since the last look: requests, and how often somebody else asked.
    requests: u32,
    others: u32,
    looked: Instant,
    /// How long each took by the last look.
    pace: Duration,
    /// How many looks in a row found that it is not worth it.
    in_vain: u32,
    /// How long a request takes while both are on one processor, about.
    together: Duration,
}

/// What a look finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Worth {
    GoOn,
    /// The asker may be somewhere else now.
    Follow,
    Stop,
}

impl Progress {
    pub(super) fn new(asker: u32, before: Duration) -> Self {
        Self {
            asker,
            before,
            requests: 0,
            others: 0,
            looked: Instant::now(),
            pace: Duration::ZERO,
            in_vain: 0,
            together: Duration::ZERO,
        }
    }

    /// Counts a request of a thread (0: of nobody's).
    pub(super) fn count(&mut self, asker: u32, best: &Best) -> Worth {
        self.requests += 1;
        if asker != 0 && asker != std::mem::replace(&mut self.asker, asker) {
            self.others += 1;
        }
        if self.requests < LOOK {
            return Worth::GoOn;
        }
        let now = Instant::now();
        let pace = now.saturating_duration_since(std::mem::replace(&mut self.looked, now)) / LOOK;
        best.note(pace);
        self.look(pace)
    }

    /// Whether to go on, when the last [`LOOK`] requests took `pace` each.
    fn look(&mut self, pace: Duration) -> Worth {
        let others = std::mem::take(&mut self.others);
        self.requests = 0;
        let worth = pace * 100 < self.before * WORTH;
        self.in_vain = if worth { 0 } else { self.in_vain + 1 };
        self.pace = pace;
        if others > OTHERS || self.in_vain >= PATIENCE {
            Worth::Stop
        } else if worth && pace <= self.together.saturating_mul(AWAY) {
            self.together = self.together - self.together / 8 + pace / 8;
            Worth::GoOn
        } else {
            Worth::Follow
        }
    }

    /// The asker is on the companion's processor: what took longer takes longer there, too. (Or he has just come back, and
    /// is about to leave again: so not all of it is believed at once.)
    pub(super) fn not_away(&mut self) {
        self.together = if self.together.is_zero() {
            self.pace
        } else {
            self.pace.min(self.together.saturating_mul(AWAY))
        };
    }
}

/// What is seen of the companion at every tick.
#[derive(Debug)]
pub(super) struct Watch {
    served: u64,
    quiet: u32,
    doubt: bool,
}

/// What follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    GoesOn,
    /// A request waits for it.
    Starves,
    /// Nobody asks any more.
    Quiet,
}

impl Watch {
    pub(super) fn new(served: u64) -> Self {
        Self { served, quiet: 0, doubt: false }
    }

    /// Whether to look again soon.
    pub(super) fn doubts(&self) -> bool {
        self.doubt
    }

    /// So many requests have been served, and one is `held` up, or in its hands, or none is.
    pub(super) fn look(&mut self, served: u64, held: bool) -> Seen {
        let idle = served == std::mem::replace(&mut self.served, served);
        let doubted = std::mem::replace(&mut self.doubt, idle && held);
        self.quiet = if idle && !held { self.quiet + 1 } else { 0 };
        if idle && held && doubted {
            Seen::Starves
        } else if self.quiet == QUIET {
            Seen::Quiet
        } else {
            Seen::GoesOn
        }
    }
}

/// When the next companion may begin: the sooner the better the last ones got along.
#[derive(Debug)]
pub(super) struct Pause {
    next: Duration,
    until: Instant,
    /// When the last one began.
    began: Instant,
}

impl Default for Pause {
    fn default() -> Self {
        let now = Instant::now();
        Self { next: Self::SHORTEST, until: now, began: now }
    }
}

impl Pause {
    const SHORTEST: Duration = Duration::from_millis(50);
    const LONGEST: Duration = Duration::from_secs(5);
    /// A companion that lasted as long was a good one.
    const GOOD: Duration = Duration::from_secs(1);

    pub(super) fn is_over(&self, now: Instant) -> bool {
        now >= self.until
    }

    /// A companion begins.
    pub(super) fn end(&mut self, now: Instant) {
        self.began = now;
    }

    /// The companion did not get along.
    pub(super) fn begin(&mut self, now: Instant) {
        let lasted = now.saturating_duration_since(self.began);
        if lasted >= Self::GOOD {
            self.next = Self::SHORTEST;
        }
        self.until = now + self.next;
        // One that lasted longer than it will be missed was none too bad.
        if lasted < self.next {
            self.next = (self.next * 2).min(Self::LONGEST);
        }
    }

    /// The companion got along.
    pub(super) fn shorten(&mut self) {
        self.next = Self::SHORTEST;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on_while_it_is_worth_it() {
        let micros = Duration::from_micros;
        let mut it = Progress::new(1, micros(20));
        assert_eq!(it.look(micros(9)), Worth::Follow, "nobody has seen yet that they are together");
        it.not_away();
        assert_eq!(it.look(micros(9)), Worth::GoOn);
        for _ in 1..PATIENCE {
            assert_eq!(it.look(micros(30)), Worth::Follow, "the asker may have moved");
        }
        assert_eq!(it.look(micros(9)), Worth::GoOn, "it was found again");
        for _ in 1..PATIENCE {
            assert_eq!(it.look(micros(19)), Worth::Follow, "hardly faster");
        }
        assert_eq!(it.look(micros(19)), Worth::Stop);
    }

    #[test]
    fn who_seems_to_have_left_is_looked_for() {
        let micros = Duration::from_micros;
        let mut it = Progress::new(1, micros(1000));
        it.look(micros(10));
        it.not_away();
        assert_eq!(it.look(micros(19)), Worth::GoOn);
        // Faster than before there was a companion, and slower than with one.
        for _ in 0..2 * PATIENCE {
            assert_eq!(it.look(micros(90)), Worth::Follow);
        }
        assert_eq!(it.look(micros(10)), Worth::GoOn, "found");
        // There all the time: these take longer.
        let looks = (0..10).take_while(|_| {
            let follow = it.look(micros(90)) == Worth::Follow;
            it.not_away();
            follow
        });
        assert_eq!(looks.count(), 3, "not believed at once");
        // Nor is it believed for ever.
        for _ in 0..32 {
            assert_eq!(it.look(micros(10)), Worth::GoOn);
        }
        assert_eq!(it.look(micros(90)), Worth::Follow);
    }

    #[test]
    fn it_stops_when_several_ask() {
        // So slow before that anything is worth it.
        let mut it = Progress::new(1, Duration::MAX / 100);
        let best = Best::new();
        let mut ask =
            |askers: [u32; LOOK as usize]| askers.map(|asker| it.count(asker, &best))[LOOK as usize - 1];
        assert_ne!(ask([1, 1, 1, 2, 1, 1, 1, 1]), Worth::Stop, "one between");
        assert_ne!(ask([1, 0, 1, 0, 1, 0, 1, 0]), Worth::Stop, "nobody's");
        assert_eq!(ask([1, 2, 1, 2, 1, 1, 1, 1]), Worth::Stop);
        assert_ne!(ask([1; 8]), Worth::Stop, "counted anew");
    }

    #[test]
    fn it_is_not_begun_where_requests_are_as_fast_as_they_get() {
        let micros = Duration::from_micros;
        let best = Best::new();
        assert!(best.is_better_than(micros(1)), "not known yet");
        best.note(micros(13));
        best.note(micros(20));
        assert!([1, 13, 16].into_iter().all(|pace| !best.is_better_than(micros(pace))));
        assert!([17, 100].into_iter().all(|pace| best.is_better_than(micros(pace))));
        best.note(micros(10));
        assert!(best.is_better_than(micros(16)));
    }

    #[test]
    fn it_starves_only_if_nothing_is_done_between_two_looks_at_a_request_that_waits() {
        let mut watch = Watch::new(7);
        let mut look = |served, held| (watch.look(served, held), watch.doubts());
        assert_eq!(look(8, true), (Seen::GoesOn, false), "it goes along");
        assert_eq!(look(8, true), (Seen::GoesOn, true), "maybe it has just come");
        assert_eq!(look(9, true), (Seen::GoesOn, false), "it had");
        assert_eq!(look(9, true), (Seen::GoesOn, true));
        assert_eq!(look(9, false), (Seen::GoesOn, false), "nobody waits");
        assert_eq!(look(9, true), (Seen::GoesOn, true));
        assert_eq!(look(9, true), (Seen::Starves, true));
    }

    #[test]
    fn it_is_quiet_when_nobody_has_asked_for_some_ticks() {
        let mut watch = Watch::new(0);
        for _ in 1..QUIET {
            assert_eq!(watch.look(0, false), Seen::GoesOn);
        }
        assert_eq!(watch.look(1, false), Seen::GoesOn, "somebody has");
        for _ in 1..QUIET {
            assert_eq!(watch.look(1, false), Seen::GoesOn);
        }
        assert_eq!(watch.look(1, false), Seen::Quiet);
    }

    #[test]
    fn a_pause_grows_until_one_got_along() {
        let mut pause = Pause::default();
        let start = pause.began;
        let length = |pause: &mut Pause, now: Instant| {
            pause.begin(now);
            assert!(!pause.is_over(now));
            pause.until.duration_since(now)
        };
        assert_eq!(length(&mut pause, start), Pause::SHORTEST);
        assert_eq!(length(&mut pause, start), Pause::SHORTEST * 2);
        for _ in 0..20 {
            assert!(length(&mut pause, start) <= Pause::LONGEST);
        }
        pause.shorten();
        assert_eq!(length(&mut pause, start), Pause::SHORTEST);
        assert_eq!(length(&mut pause, start), Pause::SHORTEST * 2);
        let later = start + 2 * Pause::SHORTEST;
        assert_eq!(length(&mut pause, later), 4 * Pause::SHORTEST);
        assert_eq!(length(&mut pause, start + 8 * Pause::SHORTEST), 8 * Pause::SHORTEST);
        assert_eq!(
            length(&mut pause, start + 8 * Pause::SHORTEST),
            8 * Pause::SHORTEST,
            "it had lasted as long"
        );
        let later = start + Pause::GOOD;
        assert_eq!(length(&mut pause, later), Pause::SHORTEST);
        assert!(pause.is_over(later + Pause::SHORTEST));
    }

    #[test]
    fn only_who_asks_again_and_again_is_followed() {
        let streak = Streak::new(Duration::MAX);
        let asks = |asker, times: u32| (0..times).filter(|_| streak.count(asker).is_some()).count();
        assert_eq!(asks(1, STREAK - 1), 0);
        assert_eq!(asks(2, 1), 0);
        assert_eq!(asks(1, STREAK - 1), 0, "another one came between");
        assert_eq!(asks(1, 1), 1);
        assert_eq!(asks(1, STREAK - 1), 0, "counted anew");
        assert_eq!(asks(1, 1), 1);
        assert_eq!(asks(u32::MAX, STREAK), 1);
        let slow = Streak::new(Duration::ZERO);
        assert!((0..2 * STREAK).all(|_| slow.count(1).is_none()), "waking is not what it waits for");
    }
}
