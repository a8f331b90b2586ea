//! What the companion does: one value, which it and the others change without a lock.
//!
//! ```text
//!   from            to          when
//!   Missing         Asleep      it has its role
//!   Asleep          Called      somebody calls it
//!   Called          Reads       it wakes up
//!   Reads           Works       it has a request
//!   Works           Reads       it has answered
//!   Works           InVain      it has answered, and gives up
//!   InVain          Asleep      somebody has noted that
//!   Called          Asleep      somebody stops it
//!   Reads           Leaves      "
//!   Works           Last        "
//!   Leaves          Last        it has a request
//!   Last            Asleep      it has answered
//!   any             Ended       for ever
//! ```
//!
//! Who calls, stops or notes does so under the lock of [`super::State`]; the companion takes no lock for its part.

use std::sync::atomic::{AtomicU8, Ordering};

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Phase {
    /// There is none yet.
    Missing,
    /// It sleeps until it is wanted.
    Asleep,
    /// It is wanted, and about to wake up.
    Called,
    /// It waits for a request.
    Reads,
    /// It is in the middle of a request.
    Works,
    /// It has found that it is not worth it, and sleeps. Nobody has drawn a conclusion from that yet.
    InVain,
    /// It is not wanted any more, but waits for a request that it will get before who begins to wait after it.
    Leaves,
    /// It is not wanted any more, but in the middle of a request.
    Last,
    /// The mount is gone, or no companion can be had.
    Ended,
}

impl Phase {
    /// By number.
    const ALL: [Self; 9] = [
        Self::Missing,
        Self::Asleep,
        Self::Called,
        Self::Reads,
        Self::Works,
        Self::InVain,
        Self::Leaves,
        Self::Last,
        Self::Ended,
    ];

    fn of(number: u8) -> Self {
        Self::ALL.get(usize::from(number)).copied().unwrap_or(Self::Ended)
    }

    /// Whether the companion works, and the others sleep.
    pub(super) fn is_on(self) -> bool {
        matches!(self, Self::Called | Self::Reads | Self::Works)
    }

    pub(super) fn call(self) -> Option<Self> {
        (self == Self::Asleep).then_some(Self::Called)
    }

    pub(super) fn wake(self) -> Option<Self> {
        (self == Self::Called).then_some(Self::Reads)
    }

    pub(super) fn begin(self) -> Option<Self> {
        match self {
            Self::Reads => Some(Self::Works),
            Self::Leaves => Some(Self::Last),
            _ => None,
        }
    }

    /// It is to wait for the next request.
    pub(super) fn answer(self) -> Option<Self> {
        (self == Self::Works).then_some(Self::Reads)
    }

    pub(super) fn give_up(self) -> Option<Self> {
        (self == Self::Works).then_some(Self::InVain)
    }

    pub(super) fn fall_asleep(self) -> Option<Self> {
        matches!(self, Self::Missing | Self::Last).then_some(Self::Asleep)
    }

    pub(super) fn stop(self) -> Option<Self> {
        match self {
            Self::Called => Some(Self::Asleep),
            Self::Reads => Some(Self::Leaves),
            Self::Works => Some(Self::Last),
            _ => None,
        }
    }

    pub(super) fn note(self) -> Option<Self> {
        (self == Self::InVain).then_some(Self::Asleep)
    }
}

/// The phase that the companion is in.
#[derive(Debug)]
pub(super) struct Current(AtomicU8);

impl Current {
    pub(super) fn new(phase: Phase) -> Self {
        Self(AtomicU8::new(phase as u8))
    }

    pub(super) fn get(&self) -> Phase {
        Phase::of(self.0.load(Ordering::SeqCst))
    }

    /// Goes on to another phase; false, and nothing is done, if that does not follow from the present one. In one order
    /// for all threads with what they store besides (`SeqCst`).
    pub(super) fn go_on(&self, next: impl Fn(Phase) -> Option<Phase>) -> bool {
        let next = |phase| next(Phase::of(phase)).map(|next| next as u8);
        self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, next).is_ok()
    }

    pub(super) fn end(&self) {
        self.0.store(Phase::Ended as u8, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_phase_leads_to_those_of_the_table_and_no_other() {
        use Phase::{Asleep, Called, Ended, InVain, Last, Leaves, Missing, Reads, Works};
        type Step = fn(Phase) -> Option<Phase>;
        let steps: [(Step, &[(Phase, Phase)]); 8] = [
            (Phase::call, &[(Asleep, Called)]),
            (Phase::wake, &[(Called, Reads)]),
            (Phase::begin, &[(Reads, Works), (Leaves, Last)]),
            (Phase::answer, &[(Works, Reads)]),
            (Phase::give_up, &[(Works, InVain)]),
            (Phase::fall_asleep, &[(Missing, Asleep), (Last, Asleep)]),
            (Phase::stop, &[(Called, Asleep), (Reads, Leaves), (Works, Last)]),
            (Phase::note, &[(InVain, Asleep)]),
        ];
        for (number, (step, allowed)) in steps.into_iter().enumerate() {
            for phase in Phase::ALL {
                let next = allowed.iter().find(|(from, _)| *from == phase).map(|(_, to)| *to);
                assert_eq!(step(phase), next, "step {number} from {phase:?}");
                let current = Current::new(phase);
                assert_eq!(current.go_on(step), next.is_some());
                assert_eq!(current.get(), next.unwrap_or(phase));
            }
        }
        // All that is on can be stopped, and is not on then.
        for phase in Phase::ALL {
            assert_eq!(phase.is_on(), phase.stop().is_some_and(|next| !next.is_on()), "{phase:?}");
        }
        let current = Current::new(Works);
        current.end();
        assert_eq!(current.get(), Ended);
    }
}
