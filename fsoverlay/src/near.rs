//! Serves a program that asks one thing after another on the processor that it runs on.
//!
//! Such a program and a worker take turns: one sleeps while the other works. The scheduler wakes each of them on a
//! processor that is idle, so on two processors, of which one is idle at any time, and waking it costs several
//! times what the request does (docs/decisions/0009). On one processor both changes are a plain switch.
//!
//! A worker that is bound to the asker's processor is not enough: the asker is woken while the worker still runs,
//! and so on another processor. Unless all that runs there gives way to anybody: a processor that only has threads
//! of `SCHED_IDLE` counts as idle, and who is woken there goes on at once (sched(7)). So one of the workers, the
//! *companion*, gives way to everybody and follows the asker from processor to processor. All others sleep while it
//! works, because the kernel gives a request to whoever has waited longest.
//!
//! A thread that gives way gets little where others have much to compute: after 10 us of work it may wait for its next
//! turn for 70 ms, after 2 ms for seconds. Nobody may wait for that. So
//!
//! - it works only while one thread asks, at once and again and again ([`worth::STREAK`]), and only where that turns out to
//!   be faster than before ([`worth::Progress`]);
//! - what may take long it leaves to other threads: directories are listed and removed, much is copied, large pieces are
//!   read and written, and many names are forgotten by those ([`crate::errno::gives_way`]). There is one exception: it
//!   writes the file of links' owners anew, with the lock in hand for which whoever asks for a link waits, where no other
//!   worker has done so for very long or there is no room left ([`crate::sidecar`]);
//! - another worker looks every [`TICK`] whether a request waits while nothing is done, from the same processor; all
//!   others do every [`LONG_TICK`], from any. If so, all work again, and for some time there is no companion
//!   ([`Pause`]). To see that, nobody needs a lock that the companion may hold;
//! - however it was stopped, somebody sees it off ([`Near::see_off`]) until it has its last request, because it may still
//!   be the first to get one;
//! - its turns are short ([`SLICE`]), so that the next one comes soon. Where the kernel has no turns of a length of
//!   one's own (before Linux 6.12) there is no companion.
//!
//! A companion cannot become an ordinary thread again (that takes CAP_SYS_NICE, or RLIMIT_NICE), so between its times it
//! sleeps, and threads that it starts are started for it by an ordinary one ([`crate::sync::start_elsewhere`]).

mod bound;
mod phase;
mod worth;

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, PoisonError, Weak};
use std::thread::Thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{CpuSet, Pid, gettid};

use self::bound::{Bound, affinity, processor_of, unbind};
use self::phase::{Current, Phase};
use self::worth::{Best, Pause, Progress, SLOW, Seen, Streak, Watch, Worth};
use crate::errno::{Errno, Res, set_gives_way};
use crate::sync::{Mutex, start_elsewhere, start_here};
use crate::sys::{give_way, has_turns};

/// How often somebody looks whether the companion gets along. Each time may cost the asker its processor.
const TICK: Duration = Duration::from_millis(4);

/// How soon who has found something looks again: the processor may have been taken from both of them, as a virtual
/// machine's are, or the request may just have come.
const SOON: Duration = Duration::from_micros(500);

/// How often all others do, in case even that is kept from running.
const LONG_TICK: Duration = Duration::from_millis(50);

/// The length of the companion's turns: the shortest that sched(7) has.
const SLICE: Duration = Duration::from_micros(100);

/// Who served as many requests got along.
const MANY: u64 = 1000;

/// What the workers share about it.
#[derive(Debug)]
pub(crate) struct Near {
    /// Another descriptor of the connection, to see whether a request waits.
    fuse: OwnedFd,
    /// The procfs that knows the askers by the numbers that requests have.
    proc: OwnedFd,
    streak: Streak,
    best: Best,
    phase: Current,
    /// Whom the companion serves, and where; how long a request took before, in nanoseconds.
    asker: AtomicU32,
    processor: AtomicUsize,
    before: AtomicU64,
    /// How many requests the companion has served.
    served: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
    /// Somebody sees it off: one is enough.
    seen_off: AtomicBool,
}

/// Nothing of it is for the companion: it may be kept from running, and whoever has to see that must not wait for a lock
/// that it holds.
#[derive(Debug, Default)]
struct State {
    ordinary: usize,
    companion: Option<Seat>,
    pause: Pause,
    /// How many requests had been served so when the companion began.
    served: u64,
}

/// The companion as others see it.
#[derive(Debug)]
struct Seat {
    thread: Thread,
    id: Pid,
    /// Where it may run when it follows nobody.
    anywhere: CpuSet,
}

/// What a worker is.
#[derive(Debug)]
enum Role {
    Ordinary { _leaving: Leaving },
    Companion(Box<Companion>),
}

/// A worker ends when the mount is gone: then nobody may sleep on.
#[derive(Debug)]
struct Leaving(Weak<Near>);

impl Drop for Leaving {
    fn drop(&mut self) {
        let Some(near) = self.0.upgrade() else { return };
        let left = {
            let mut state = near.state.lock();
            state.ordinary -= 1;
            state.ordinary
        };
        if left == 0 || near.waiting(NOW) == Waiting::Gone {
            near.end();
        }
    }
}

/// What the companion keeps to itself.
#[derive(Debug)]
struct Companion {
    near: Weak<Near>,
    bound: Bound,
    progress: Progress,
}

impl Drop for Companion {
    /// Nobody may wait for it any more. (Without the lock, which is not for it.)
    fn drop(&mut self) {
        if let Some(near) = self.near.upgrade() {
            near.phase.end();
            near.changed.notify_all();
        }
    }
}

/// What the connection says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waiting {
    Nothing,
    Request,
    /// The mount is gone.
    Gone,
}

/// Does not wait for it.
const NOW: Option<&Timespec> = Some(&Timespec { tv_sec: 0, tv_nsec: 0 });

thread_local! {
    static ROLE: RefCell<Option<Role>> = const { RefCell::new(None) };
}

impl Near {
    /// How many workers more than otherwise there are to be: the companion.
    pub(crate) const WORKERS: usize = 1;

    /// With a procfs of the process-ID namespace that the overlay is mounted in. `None` where nothing is gained, with
    /// one worker or one processor, and where the kernel cannot do it.
    pub(crate) fn new(fuse: OwnedFd, proc: OwnedFd, workers: usize) -> Option<Arc<Self>> {
        let processors = affinity(None).ok()?.count();
        // Of anything else, opening a file might take for ever.
        let is_proc =
            rustix::fs::fstatfs(&proc).is_ok_and(|stat| stat.f_type == rustix::fs::PROC_SUPER_MAGIC);
        (is_proc && workers > 1 && processors > 1 && has_turns()).then(|| Self::with(fuse, proc, SLOW))
    }

    fn with(fuse: OwnedFd, proc: OwnedFd, slow: Duration) -> Arc<Self> {
        Arc::new(Self {
            fuse,
            proc,
            streak: Streak::new(slow),
            best: Best::new(),
            phase: Current::new(Phase::Missing),
            asker: AtomicU32::new(0),
            processor: AtomicUsize::new(0),
            before: AtomicU64::new(0),
            served: AtomicU64::new(0),
            state: Mutex::default(),
            changed: Condvar::new(),
            seen_off: AtomicBool::new(false),
        })
    }

    /// How many requests were served so.
    pub(crate) fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }

    fn is_on(&self) -> bool {
        self.phase.get().is_on()
    }

    /// To be called by the companion when it has a request.
    pub(crate) fn begin(&self) {
        self.phase.go_on(Phase::begin);
    }

    /// To be called by each worker when it has answered a request of the thread `asker` (0 for one of nobody's). It
    /// comes back when the worker is to read the next one.
    pub(crate) fn after(self: &Arc<Self>, asker: u32) {
        ROLE.with_borrow_mut(|role| match role.get_or_insert_with(|| self.take_role()) {
            Role::Ordinary { .. } => self.after_ordinary(asker),
            Role::Companion(companion) => self.after_companion(companion, asker),
        });
    }

    /// To be called by each other worker when it has forgotten names, instead: one that has seen a request and so sees the
    /// companion off no longer relies on whoever reads that, whatever it asks for.
    pub(crate) fn after_forget(self: &Arc<Self>) {
        if self.phase.get() == Phase::Leaves {
            self.after(0);
        }
    }

    /// The first worker is an ordinary one, for it to see when the mount is gone; the second is the companion.
    fn take_role(self: &Arc<Self>) -> Role {
        let mut state = self.state.lock();
        if state.ordinary > 0
            && state.companion.is_none()
            && self.phase.get() == Phase::Missing
            && let Ok(bound) = Bound::new()
        {
            let anywhere = bound.anywhere();
            state.companion = Some(Seat { thread: std::thread::current(), id: gettid(), anywhere });
            // From here on it may be kept from running.
            drop(state);
            match become_companion() {
                Ok(()) => {
                    let progress = Progress::new(0, Duration::ZERO);
                    let near = Arc::downgrade(self);
                    return Role::Companion(Box::new(Companion { near, bound, progress }));
                }
                Err(err) => tracing::debug!(%err, "nobody is served on his own processor"),
            }
            self.phase.end();
            state = self.state.lock();
            state.companion = None;
        }
        state.ordinary += 1;
        Role::Ordinary { _leaving: Leaving(Arc::downgrade(self)) }
    }

    fn after_ordinary(&self, asker: u32) {
        match self.phase.get() {
            // Many do this, and in no hurry.
            phase if phase.is_on() => self.look_after(LONG_TICK, None),
            Phase::Asleep if asker != 0 => {
                if let Some(pace) = self.streak.count(asker)
                    && self.best.is_better_than(pace)
                    && let Some(bound) = self.accompany(asker, pace)
                {
                    self.look_after(TICK, Some(bound));
                }
            }
            _ => {}
        }
        // Who has stopped it, or finds it stopped.
        while self.phase.get() == Phase::Leaves && !self.seen_off.swap(true, Ordering::SeqCst) {
            #[cfg(test)]
            tests::step();
            self.see_off();
            #[cfg(test)]
            tests::step();
            self.seen_off.store(false, Ordering::SeqCst);
            // Whoever came by until here has left it to this worker, maybe after the last look: at a request that he had
            // answered by then, or another time that the companion was stopped. So it looks again; not at a request that
            // waits now, since whoever answers that comes by after this.
            if self.waiting(NOW) == Waiting::Request {
                break;
            }
        }
    }

    /// Has the companion serve a thread. Gives what binds the calling one, which has to look after that; without it, it
    /// does not begin.
    fn accompany(&self, asker: u32, pace: Duration) -> Option<Bound> {
        let now = Instant::now();
        // Another one has it to do the same.
        if !self.state.try_lock()?.pause.is_over(now) {
            return None;
        }
        let found = processor_of(&self.proc, asker);
        let bound = Bound::new().ok()?;
        let mut state = self.state.try_lock()?;
        if self.phase.get() != Phase::Asleep || !state.pause.is_over(now) {
            return None;
        }
        state.pause.end(now);
        state.served = self.served();
        let seat = state.companion.as_mut()?;
        if let Ok(set) = affinity(Some(seat.id)) {
            seat.anywhere = set;
        }
        let processor = match found {
            Ok(processor) if seat.anywhere.is_set(processor) => processor,
            Ok(_) | Err(_) => {
                state.pause.begin(now);
                return None;
            }
        };
        self.asker.store(asker, Ordering::Relaxed);
        self.processor.store(processor, Ordering::SeqCst);
        self.before.store(u64::try_from(pace.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        if !self.phase.go_on(Phase::call) {
            return None;
        }
        seat.thread.unpark();
        drop(state);
        tracing::debug!(asker, ?pace, processor, "served on its own processor");
        Some(bound)
    }

    /// Stays until the companion has stopped, and sees to it that it does when it does not get along. It looks at every
    /// `tick`, from where the companion is if that is asked for: another processor that awoke for this would look for
    /// something to do, and take the asker away.
    fn look_after(&self, tick: Duration, mut bound: Option<Bound>) {
        let mut watch = Watch::new(self.served());
        while self.is_on() {
            if let Some(bound) = &mut bound {
                bound.bind(self.processor.load(Ordering::SeqCst));
            }
            let state = self.state.lock();
            let next = if watch.doubts() { SOON } else { tick };
            let wait = self.changed.wait_timeout_while(state, next, |_| self.is_on());
            drop(wait.unwrap_or_else(PoisonError::into_inner));
            if !self.is_on() {
                break;
            }
            let served = self.served();
            let held = match self.waiting(NOW) {
                Waiting::Gone => return self.end(),
                Waiting::Request => Some("a request waited"),
                Waiting::Nothing if self.phase.get() == Phase::Works => Some("it was kept from a request"),
                Waiting::Nothing => None,
            };
            match watch.look(served, held.is_some()) {
                Seen::GoesOn => {}
                Seen::Starves => self.stop(held),
                Seen::Quiet => self.stop(None),
            }
        }
        let mut state = self.state.lock();
        if self.phase.go_on(Phase::note) {
            if self.best.is_better_than(Duration::from_nanos(self.before.load(Ordering::Relaxed))) {
                state.pause.begin(Instant::now());
            }
            tracing::debug!(served = self.served(), "served on any processor: it was not worth it");
        }
    }

    /// The companion has stopped, but is to get one more request, maybe before all others. Stays until it has it, and
    /// does not let that request wait for it; whoever is the next to have answered one goes on with this.
    fn see_off(&self) {
        let mut waiting = self.waiting(NOW);
        while self.phase.get() == Phase::Leaves {
            match waiting {
                Waiting::Gone => return self.end(),
                // It is for this worker now.
                Waiting::Request => return,
                Waiting::Nothing => {}
            }
            // Not one who reads, so the kernel wakes the companion as well.
            if self.waiting(None) == Waiting::Request {
                let state = self.state.lock();
                let leaves = |_: &mut State| self.phase.get() == Phase::Leaves;
                let wait = self.changed.wait_timeout_while(state, TICK, leaves);
                drop(wait.unwrap_or_else(PoisonError::into_inner));
            }
            waiting = self.waiting(NOW);
        }
    }

    /// What the connection says within a time; without one, when there is something.
    fn waiting(&self, time: Option<&Timespec>) -> Waiting {
        let mut waiting = [PollFd::new(&self.fuse, PollFlags::IN)];
        match poll(&mut waiting, time).map(|_| waiting[0].revents()) {
            Ok(events) if events.is_empty() => Waiting::Nothing,
            Ok(events) if events.intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL) => {
                Waiting::Gone
            }
            Ok(_) | Err(_) => Waiting::Request,
        }
    }

    fn after_companion(&self, companion: &mut Companion, asker: u32) {
        let Companion { bound, progress, .. } = companion;
        if self.is_on() {
            self.served.fetch_add(1, Ordering::Relaxed);
            match progress.count(asker, &self.best) {
                Worth::GoOn => {}
                Worth::Follow => {
                    if !self.follow(bound, progress.asker) {
                        progress.not_away();
                    }
                }
                Worth::Stop => return self.give_up(companion),
            }
            if self.phase.go_on(Phase::answer) {
                return;
            }
        }
        bound.release();
        self.phase.go_on(Phase::fall_asleep);
        self.sleep(companion);
    }

    /// It is not worth it.
    fn give_up(&self, companion: &mut Companion) {
        companion.bound.release();
        if self.phase.go_on(Phase::give_up) {
            // (Who does not hear this, since it takes no lock for it, sees it at the next tick.)
            self.changed.notify_all();
        } else {
            // Somebody has stopped it meanwhile.
            self.phase.go_on(Phase::fall_asleep);
        }
        self.sleep(companion);
    }

    /// Sleeps until it is wanted, and goes where the asker is.
    fn sleep(&self, companion: &mut Companion) {
        while !self.phase.go_on(Phase::wake) {
            if self.phase.get() == Phase::Ended {
                return;
            }
            std::thread::park();
        }
        companion.bound.bind(self.processor.load(Ordering::SeqCst));
        // Who stopped it meanwhile has seen it bound to nothing.
        if !self.is_on() {
            companion.bound.release();
        }
        let before = Duration::from_nanos(self.before.load(Ordering::Relaxed));
        companion.progress = Progress::new(self.asker.load(Ordering::Relaxed), before);
    }

    /// Goes where the asker is; false if it is there.
    fn follow(&self, bound: &mut Bound, asker: u32) -> bool {
        let before = bound.processor();
        if let Ok(processor) = processor_of(&self.proc, asker) {
            bound.bind(processor);
            self.processor.store(bound.processor().unwrap_or(processor), Ordering::SeqCst);
            // Who stopped it meanwhile has seen it bound elsewhere.
            if !self.is_on() {
                bound.release();
            }
        }
        bound.processor() != before
    }

    /// All is as before; for some time, if there is something to be said against it. Nothing is done where somebody else
    /// has brought it about.
    fn stop(&self, why: Option<&'static str>) {
        {
            let mut state = self.state.lock();
            if !self.phase.go_on(Phase::stop) {
                return;
            }
            let many = self.served() - state.served >= MANY;
            match why {
                Some(_) => state.pause.begin(Instant::now()),
                None if many => state.pause.shorten(),
                None => {}
            }
            if let Some(seat) = &state.companion {
                // It may be in the middle of a request, and go on where there is room.
                unbind(Some(seat.id), self.processor.load(Ordering::SeqCst), &seat.anywhere);
            }
        }
        self.changed.notify_all();
        tracing::debug!(why, served = self.served(), "served on any processor");
    }

    /// The mount is gone.
    fn end(&self) {
        {
            let state = self.state.lock();
            self.phase.end();
            if let Some(seat) = &state.companion {
                seat.thread.unpark();
            }
        }
        self.changed.notify_all();
    }
}

/// Makes the calling thread a companion.
fn become_companion() -> Res<()> {
    // Before it gives way, so that what it starts does not.
    start_elsewhere().map_err(|_| Errno::AGAIN)?;
    give_way(SLICE).inspect_err(|_| start_here())?;
    set_gives_way();
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{PipeReader, PipeWriter, Read as _, Write as _, pipe};
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::thread::JoinHandle;

    use fuser::INodeNo;

    use super::bound::tests::UNREADABLE;
    use super::worth::STREAK;
    use super::*;
    use crate::dispatch::Shared;
    use crate::engine::Engine;
    use crate::engine::tests::Scratch;
    use crate::fs::FuseFs;
    use crate::hooks::Opcode;
    use crate::sync::tests::in_time;

    /// Waits for what other threads bring about; fails where they never do. Sleeps between: a companion gives way to
    /// whoever looks all the time.
    fn until(near: &Near, condition: impl Fn() -> bool) {
        in_time(|| {
            let state = near.state.lock();
            let wait = near.changed.wait_timeout_while(state, TICK, |_| !condition());
            drop(wait.unwrap_or_else(PoisonError::into_inner));
            condition().then_some(())
        });
    }

    fn proc() -> OwnedFd {
        std::fs::File::open("/proc").expect("/proc").into()
    }

    fn tid() -> u32 {
        gettid().as_raw_nonzero().get().cast_unsigned()
    }

    /// Without workers: what one of them does is done by the test. Requests are bytes in a pipe.
    fn alone(phase: Phase) -> (Arc<Near>, PipeReader, PipeWriter) {
        let (requests, queue) = pipe().expect("pipe");
        let mut near = Near::with(requests.try_clone().expect("dup").into(), proc(), Duration::MAX);
        Arc::get_mut(&mut near).expect("just made").phase = Current::new(phase);
        (near, requests, queue)
    }

    fn one(requests: &PipeReader) -> u8 {
        let mut request = [0];
        (&mut &*requests).read_exact(&mut request).expect("a request");
        request[0]
    }

    #[test]
    fn a_worker_sleeps_until_the_companion_is_kept_from_a_request() {
        let (near, _requests, _queue) = alone(Phase::Works);
        near.look_after(TICK, None);
        assert_eq!(near.phase.get(), Phase::Last);
        assert!(!near.state.lock().pause.is_over(Instant::now()));
    }

    #[test]
    fn a_worker_sleeps_until_a_request_waits_or_none_comes() {
        let (near, requests, mut queue) = alone(Phase::Reads);
        queue.write_all(b"a").expect("write");
        near.look_after(TICK, None);
        assert_eq!(near.phase.get(), Phase::Leaves);
        assert!(!near.state.lock().pause.is_over(Instant::now()));
        assert_eq!(one(&requests), b'a');
        // One that has not even woken up need not be seen off.
        for (phase, after) in [(Phase::Reads, Phase::Leaves), (Phase::Called, Phase::Asleep)] {
            let (near, _requests, _queue) = alone(phase);
            near.look_after(TICK, None);
            assert_eq!(near.phase.get(), after);
            assert!(near.state.lock().pause.is_over(Instant::now()), "nothing is to be said against it");
        }
    }

    #[test]
    fn who_sees_that_it_was_in_vain_begins_a_pause() {
        let (near, _requests, _queue) = alone(Phase::InVain);
        near.look_after(TICK, None);
        assert_eq!(near.phase.get(), Phase::Asleep);
        assert!(!near.state.lock().pause.is_over(Instant::now()));
    }

    /// Whether somebody sees the companion off.
    fn is_seen_off(near: &Near) -> bool {
        near.seen_off.load(Ordering::Acquire)
    }

    #[test]
    fn however_it_was_stopped_somebody_sees_it_off() {
        for (why, waits) in [(None, false), (Some("a request waited"), true)] {
            let (near, requests, mut queue) = alone(Phase::Reads);
            if waits {
                queue.write_all(b"a").expect("write");
            }
            let (worker, read) = (near.clone(), requests.try_clone().expect("dup"));
            let answered = Arc::new(AtomicBool::new(!waits));
            let theirs = answered.clone();
            let worker = std::thread::spawn(move || {
                worker.after_ordinary(1);
                if waits {
                    assert_eq!(worker.phase.get(), Phase::Leaves, "the request comes first");
                    assert_eq!(one(&read), b'a');
                    theirs.store(true, Ordering::SeqCst);
                    worker.after_ordinary(1);
                }
            });
            until(&near, || answered.load(Ordering::SeqCst) && is_seen_off(&near));
            assert_eq!(near.phase.get(), Phase::Leaves);
            // Another worker need not.
            near.after_ordinary(1);
            assert!(!worker.is_finished(), "{why:?}");
            // The companion has its last request.
            near.begin();
            queue.write_all(b"b").expect("write");
            assert_eq!(near.phase.get(), Phase::Last);
            until(&near, || worker.is_finished());
            worker.join().expect("no panic");
        }
    }

    thread_local! {
        /// Is called before this thread sees a companion off, and before it says that it does not any more.
        static STEP: RefCell<Option<Box<dyn FnMut()>>> = const { RefCell::new(None) };
    }

    pub(super) fn step() {
        if let Some(mut between) = STEP.take() {
            between();
            STEP.set(Some(between));
        }
    }

    #[test]
    fn who_is_about_to_see_nobody_off_any_more_looks_whether_others_rely_on_him() {
        // He found a request, which another worker has answered by then; or the companion has had its last, and has been
        // called and stopped again by then.
        for called_again in [false, true] {
            let (near, requests, mut queue) = alone(Phase::Leaves);
            if !called_again {
                queue.write_all(b"a").expect("write");
            }
            let (sender, steps) = channel();
            let theirs = near.clone();
            let worker = std::thread::spawn(move || {
                let (near, mut count) = (theirs.clone(), 0);
                STEP.set(Some(Box::new(move || {
                    count += 1;
                    if count == 2 {
                        assert_eq!(one(&requests), b'a');
                        if called_again {
                            for step in [Phase::fall_asleep, Phase::call, Phase::wake] {
                                assert!(near.phase.go_on(step));
                            }
                            near.stop(None);
                        }
                        // As the other worker, who leaves it to this one.
                        near.after_ordinary(1);
                        assert_eq!(near.phase.get(), Phase::Leaves);
                    }
                    sender.send(count).expect("somebody listens");
                })));
                theirs.after_ordinary(1);
                drop(STEP.take());
            });
            assert_eq!(steps.recv(), Ok(1));
            if called_again {
                near.begin();
                queue.write_all(b"a").expect("write");
            }
            assert_eq!([steps.recv(), steps.recv()], [Ok(2), Ok(3)], "nobody sees it off: {called_again}");
            // The companion has its last request.
            near.begin();
            queue.write_all(b"b").expect("write");
            assert_eq!((steps.recv(), steps.recv().is_err()), (Ok(4), true));
            worker.join().expect("no panic");
        }
    }

    #[test]
    fn no_request_waits_for_a_companion_that_leaves() {
        let (near, requests, mut queue) = alone(Phase::Leaves);
        let theirs = near.clone();
        let worker = std::thread::spawn(move || {
            theirs.after_ordinary(1);
            let first = one(&requests);
            theirs.after_ordinary(1);
            (first, one(&requests), theirs.phase.get())
        });
        // Nobody else reads.
        queue.write_all(b"ab").expect("write");
        until(&near, || worker.is_finished());
        assert_eq!(worker.join().expect("no panic"), (b'a', b'b', Phase::Leaves));
    }

    #[test]
    fn who_sees_it_off_sees_that_the_mount_is_gone() {
        let (near, _requests, queue) = alone(Phase::Leaves);
        let theirs = near.clone();
        let worker = std::thread::spawn(move || theirs.after_ordinary(1));
        until(&near, || is_seen_off(&near));
        drop(queue);
        until(&near, || worker.is_finished());
        worker.join().expect("no panic");
        assert_eq!(near.phase.get(), Phase::Ended);
    }

    #[test]
    fn nothing_is_begun_that_cannot_be_looked_after_as_often() {
        let (near, _requests, _queue) = alone(Phase::Asleep);
        let id = gettid();
        let anywhere = affinity(None).expect("own affinity");
        near.state.lock().companion = Some(Seat { thread: std::thread::current(), id, anywhere });
        UNREADABLE.set(true);
        assert!(near.accompany(tid(), Duration::ZERO).is_none());
        UNREADABLE.set(false);
        assert_eq!(near.phase.get(), Phase::Asleep);
        assert!(near.accompany(tid(), Duration::ZERO).is_some());
        assert_eq!(near.phase.get(), Phase::Called);
    }

    #[test]
    fn who_cannot_be_followed_is_left_alone_for_a_while() {
        let (near, _requests, _queue) = alone(Phase::Asleep);
        let id = gettid();
        let anywhere = affinity(None).expect("own affinity");
        near.state.lock().companion = Some(Seat { thread: std::thread::current(), id, anywhere });
        assert!(near.accompany(u32::MAX, Duration::ZERO).is_none());
        assert_eq!(near.phase.get(), Phase::Asleep);
        assert!(!near.state.lock().pause.is_over(Instant::now()));
        assert!(near.accompany(tid(), Duration::ZERO).is_none());
    }

    #[test]
    fn nobody_sleeps_on_when_the_companion_is_gone() {
        let (near, _requests, _queue) = alone(Phase::Works);
        let progress = Progress::new(1, Duration::ZERO);
        let bound = Bound::new().expect("own affinity");
        drop(Companion { near: Arc::downgrade(&near), bound, progress });
        assert_eq!(near.phase.get(), Phase::Ended);
    }

    /// Workers that answer what comes out of a pipe, as those of a mount do.
    struct Bench {
        near: Arc<Near>,
        queue: PipeWriter,
        answers: Receiver<u8>,
        workers: Vec<JoinHandle<()>>,
        ids: Vec<Pid>,
        /// The companion is not to get along until this is dropped.
        held: Option<Sender<()>>,
        hold: Arc<AtomicU32>,
    }

    /// Who asks; a byte names one of these two.
    fn asker(request: u8, tid: u32) -> u32 {
        if request == b'a' { tid } else { std::process::id() }
    }

    impl Bench {
        fn new() -> Self {
            let (requests, queue) = pipe().expect("pipe");
            let near = Near::with(requests.try_clone().expect("dup").into(), proc(), Duration::MAX);
            let (answer, answers) = channel();
            let (held, release) = channel::<()>();
            let (release, hold) = (Arc::new(Mutex::new(release)), Arc::new(AtomicU32::new(0)));
            let (tell_id, id) = channel();
            let tid = tid();
            let worker = |requests: PipeReader| {
                let (near, answer, release, hold) =
                    (near.clone(), answer.clone(), release.clone(), hold.clone());
                let tell_id = tell_id.clone();
                std::thread::spawn(move || {
                    tell_id.send(gettid()).expect("somebody waits");
                    let mut request = [0];
                    while (&requests).read(&mut request).is_ok_and(|n| n == 1) {
                        if crate::errno::gives_way() {
                            near.begin();
                            if hold.load(Ordering::SeqCst) == 1 {
                                hold.store(2, Ordering::SeqCst);
                                // Ends when the sender is dropped.
                                let _ = release.lock().recv();
                            }
                        }
                        answer.send(request[0]).expect("somebody waits");
                        near.after(asker(request[0], tid));
                    }
                })
            };
            let workers: Vec<_> = (0..3).map(|_| worker(requests.try_clone().expect("dup"))).collect();
            let ids = workers.iter().map(|_| id.recv().expect("an id")).collect();
            Self { near, queue, answers, workers, ids, held: Some(held), hold }
        }

        fn ask(&mut self, request: u8) {
            self.queue.write_all(&[request]).expect("write");
        }

        fn answer(&self) -> u8 {
            self.answers.recv_timeout(Duration::from_secs(60)).expect("an answer")
        }

        /// Asks until the companion works; false where the kernel has none, and all are served as before.
        fn begin(&mut self) -> bool {
            let began = in_time(|| {
                self.ask(b'a');
                assert_eq!(self.answer(), b'a');
                if self.near.phase.get() == Phase::Ended {
                    return Some(false);
                }
                self.near.is_on().then_some(true)
            });
            assert_eq!(began, has_turns(), "there is one where threads have turns of their own");
            if !began {
                for _ in 0..10 * STREAK {
                    self.ask(b'a');
                    assert_eq!(self.answer(), b'a');
                }
                assert_eq!(self.near.served(), 0);
                assert!(self.near.state.lock().companion.is_none());
            }
            began
        }

        /// Asks until a condition holds.
        fn ask_until(&mut self, condition: impl Fn(&Self) -> bool) {
            in_time(|| {
                self.ask(b'a');
                assert_eq!(self.answer(), b'a');
                condition(self).then_some(())
            });
        }

        fn end(mut self) {
            drop(self.queue);
            drop(self.held.take());
            for worker in self.workers {
                until(&self.near, || worker.is_finished());
                worker.join().expect("no panic");
            }
            assert_eq!(self.near.phase.get(), Phase::Ended);
        }
    }

    #[test]
    fn the_companion_serves_who_asks_again_and_again() {
        let mut bench = Bench::new();
        if bench.begin() {
            let before = bench.near.served();
            bench.ask_until(|bench| bench.near.served() > before + 1);
            // Nobody asks any more.
            until(&bench.near, || !bench.near.is_on());
            bench.ask_until(|bench| bench.near.phase.get() == Phase::Asleep);
        }
        bench.end();
    }

    #[test]
    fn afterwards_all_may_run_where_they_could_before() {
        let anywhere = affinity(None).expect("own affinity");
        let mut bench = Bench::new();
        if bench.begin() && anywhere.count() > 1 {
            let are = |bench: &Bench, narrow: usize| {
                let sets = bench.ids.iter().map(|id| affinity(Some(*id)).expect("alive"));
                let counts: Vec<_> = sets.map(|set| (set == anywhere, set.count())).collect();
                counts.iter().filter(|count| **count == (false, 1)).count() == narrow
                    && counts.iter().filter(|count| count.0).count() == counts.len() - narrow
            };
            // The companion, and who looks after it. (It may stop and begin again until that is seen.)
            bench.ask_until(|bench| are(bench, 2));
            // Nobody asks any more. Whoever waits for it to leave is not bound, nor is it.
            until(&bench.near, || !bench.near.is_on() && are(&bench, 0));
            assert!(matches!(bench.near.phase.get(), Phase::Leaves | Phase::Last | Phase::Asleep));
            bench.ask_until(|bench| bench.near.phase.get() == Phase::Asleep);
            until(&bench.near, || are(&bench, 0));
        }
        bench.end();
    }

    #[test]
    fn nobody_waits_for_a_companion_that_does_not_get_along() {
        let mut bench = Bench::new();
        if bench.begin() {
            bench.hold.store(1, Ordering::SeqCst);
            let mut open = 0;
            in_time(|| {
                bench.ask(b'a');
                open += 1;
                while bench.answers.recv_timeout(TICK).is_ok() {
                    open -= 1;
                }
                (bench.hold.load(Ordering::SeqCst) == 2).then_some(())
            });
            // It has one request. The others are for the others.
            for _ in 0..100 {
                bench.ask(b'b');
                while bench.answer() == b'a' {
                    open -= 1;
                }
            }
            assert_eq!(open, 1, "the one that is held");
            assert_eq!(bench.near.phase.get(), Phase::Last);
            drop(bench.held.take());
            assert_eq!(bench.answer(), b'a');
            until(&bench.near, || bench.near.phase.get() == Phase::Asleep);
        }
        bench.end();
    }

    #[test]
    fn who_has_forgotten_names_is_not_in_the_middle_of_it() {
        let scratch = Scratch::new("near-forgets");
        let fs = FuseFs { shared: Shared::new(Engine::open(&scratch.spec()).expect("an overlay")) };
        let (near, _requests, _queue) = alone(Phase::Missing);
        fs.shared.set_near(near.clone());
        // This thread is an ordinary worker.
        fs.run(Opcode::GetAttr, INodeNo(1), || {});
        let theirs = near.clone();
        let worker = std::thread::spawn(move || {
            fs.run(Opcode::GetAttr, INodeNo(1), || {});
            fs.run(Opcode::Forget, INodeNo(1), || {});
            theirs.phase.get()
        });
        if has_turns() {
            until(&near, || near.phase.get() == Phase::Asleep);
            assert!(near.accompany(tid(), Duration::ZERO).is_some());
        }
        until(&near, || worker.is_finished());
        let phase = if has_turns() { Phase::Reads } else { Phase::Ended };
        assert_eq!(worker.join().expect("no panic"), phase);
    }

    #[test]
    fn who_was_told_to_forget_names_sees_the_companion_off() {
        let scratch = Scratch::new("near-forgets-last");
        let fs = FuseFs { shared: Shared::new(Engine::open(&scratch.spec()).expect("an overlay")) };
        let (near, requests, mut queue) = alone(Phase::Leaves);
        fs.shared.set_near(near.clone());
        queue.write_all(b"a").expect("write");
        let worker = std::thread::spawn(move || {
            fs.run(Opcode::GetAttr, INodeNo(1), || {});
            // There is a request, so this one sees nobody off; and this is what it asks for.
            assert_eq!(one(&requests), b'a');
            fs.run(Opcode::Forget, INodeNo(1), || {});
        });
        until(&near, || is_seen_off(&near) || worker.is_finished());
        assert!(!worker.is_finished(), "nobody sees it off");
        // The companion has its last request.
        near.begin();
        queue.write_all(b"b").expect("write");
        until(&near, || worker.is_finished());
        worker.join().expect("no panic");
    }

    #[test]
    fn all_end_with_the_mount_while_the_companion_works() {
        let mut bench = Bench::new();
        bench.begin();
        bench.end();
    }

    #[test]
    fn what_a_companion_starts_does_not_give_way() {
        let policies = std::thread::spawn(|| {
            let becomes = become_companion();
            let policy = || {
                let stat = std::fs::read_to_string("/proc/thread-self/stat").expect("own stat");
                let after = stat.rsplit_once(')').expect("a name").1;
                after.split_ascii_whitespace().nth(41 - 3).expect("a policy").to_owned()
            };
            let (tell, told) = channel();
            let started = crate::sync::start("started", move || tell.send(policy()).expect("asked"));
            started.expect("a thread").join().expect("no panic");
            (becomes, policy(), told.recv().expect("its policy"))
        });
        let (becomes, mine, started) = policies.join().expect("no panic");
        // SCHED_OTHER of sched(7), and SCHED_IDLE where the kernel has turns of a length of one's own.
        let expected = if has_turns() { (Ok(()), "5") } else { (Err(Errno::NOTSUP), "0") };
        assert_eq!((becomes, &*mine, &*started), (expected.0, expected.1, "0"));
    }
}
