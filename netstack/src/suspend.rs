//! Whether the host has been suspended. The clock by which the stack counts does not show it: it stands still meanwhile
//! (see `clock` in [`engine`](crate::engine)), which is wrong for what grows old in the world, as answers of resolvers do.
//!
//! Nothing wakes up for it: whoever uses such a thing asks before.

use nix::time::{ClockId, clock_gettime};
use smoltcp::time::{Duration, Instant};

/// How often the clocks are read, at most.
const CHECK: Duration = Duration::from_secs(1);
/// Less than this is not worth a word.
const LEAST: Duration = Duration::from_secs(1);

/// The two clocks.
#[derive(Debug)]
pub(crate) struct Suspension {
    checked: Option<Instant>,
    /// For how long the host had been suspended since it was started, when that was told last.
    told: Duration,
    /// What a test adds.
    #[cfg(test)]
    pub(crate) pretended: Duration,
}

impl Suspension {
    pub(crate) fn new() -> Self {
        Self {
            checked: None,
            told: suspended(),
            #[cfg(test)]
            pretended: Duration::ZERO,
        }
    }

    /// For how long the host has been suspended since this was said last.
    pub(crate) fn since(&mut self, now: Instant) -> Option<Duration> {
        if self.checked.is_some_and(|checked| now < checked + CHECK) {
            return None;
        }
        self.checked = Some(now);
        let all = suspended();
        #[cfg(test)]
        let all = all + self.pretended;
        self.told_until(all)
    }

    fn told_until(&mut self, all: Duration) -> Option<Duration> {
        if all < self.told + LEAST {
            return None;
        }
        let new = all - self.told;
        self.told = all;
        Some(new)
    }
}

/// For how long the host has been suspended since it was started: CLOCK_BOOTTIME counts that time, CLOCK_MONOTONIC does not.
fn suspended() -> Duration {
    // In this order: whatever happens between the two makes the difference less, never more.
    let clocks = [ClockId::CLOCK_BOOTTIME, ClockId::CLOCK_MONOTONIC];
    let [Some(boot), Some(monotonic)] = clocks.map(|clock| {
        let time = clock_gettime(clock).ok()?;
        let seconds = u64::try_from(time.tv_sec()).ok()?;
        Some(
            Duration::from_secs(seconds) + Duration::from_micros(u64::try_from(time.tv_nsec() / 1_000).ok()?),
        )
    }) else {
        return Duration::ZERO;
    };
    if boot > monotonic { boot - monotonic } else { Duration::ZERO }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(s: u64) -> Instant {
        Instant::from_secs(1_000) + Duration::from_secs(s)
    }

    #[test]
    fn a_time_of_suspension_is_told_once() {
        let mut suspension = Suspension::new();
        assert_eq!(suspension.since(at(0)), None);
        suspension.pretended = Duration::from_secs(3_600);
        assert_eq!(suspension.since(at(0)), None, "the clocks were just read");
        let told = suspension.since(at(1)).expect("an hour");
        // The real clocks may run on a little, and the machine may really sleep.
        assert!(told >= Duration::from_secs(3_599), "{told}");
        assert_eq!(suspension.since(at(2)), None);
    }

    #[test]
    fn moments_do_not_count_but_are_not_lost() {
        let mut suspension = Suspension { told: Duration::from_secs(10), ..Suspension::new() };
        for (millis, told) in
            [(9_000, None), (10_999, None), (11_500, Some(1_500)), (11_600, None), (14_500, Some(3_000))]
        {
            let told = told.map(Duration::from_millis);
            assert_eq!(suspension.told_until(Duration::from_millis(millis)), told, "{millis}");
        }
    }
}
