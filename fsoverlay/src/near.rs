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
//! - it works only while one thread asks, at once and again and again ([`STREAK`]), and only where that turns out to
//!   be faster than before ([`Companion::look`]);
//! - what may take long it leaves to other threads: directories are listed and removed, much is copied, and large pieces are
//!   read and written by those ([`crate::errno::gives_way`]);
//! - another worker looks every [`TICK`] whether a request waits while nothing is done, from the same processor; all
//!   others do every [`LONG_TICK`], from any. If so, all work again, and for some time there is no companion
//!   ([`Pause`]). To see that, nobody needs a lock that the companion may hold;
//! - who has stopped it sees it off ([`Near::see_off`]), because it is still the first to get a request;
//! - its turns are short ([`SLICE`]), so that the next one comes soon. Where the kernel has no turns of a length of
//!   one's own (before Linux 6.12) there is no companion.
//!
//! A companion cannot become an ordinary thread again (that takes CAP_SYS_NICE, or RLIMIT_NICE), so between its times it
//! sleeps, and threads that it starts are started for it by an ordinary one ([`crate::sync::start_elsewhere`]).

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, PoisonError, Weak};
use std::thread::Thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::thread::{CpuSet, Pid, gettid, sched_getaffinity, sched_setaffinity};

use crate::errno::{Errno, Res, set_gives_way};
use crate::sync::{Mutex, start_elsewhere, start_here};
use crate::sys::{give_way, has_turns};

/// So many requests of one thread, none of another between, and the companion takes over.
const STREAK: u32 = 32;

/// If they come slower than that, waking up is not what they wait for.
const SLOW: Duration = Duration::from_micros(150);

/// After so many requests the companion looks whether it is worth it, and, if it is not, where the asker is now.
const LOOK: u32 = 8;

/// How many of these, at most, came from another thread than the one before: one between makes two.
const OTHERS: u32 = 2;

/// It is worth it while requests take less than so many percent of the time that they took before.
const WORTH: u32 = 80;

/// How many looks in a row may find that it is not.
const PATIENCE: u32 = 8;

/// How often somebody looks whether the companion gets along. Each time may cost the asker its processor.
const TICK: Duration = Duration::from_millis(4);

/// How often all others do, in case even that is kept from running.
const LONG_TICK: Duration = Duration::from_millis(50);

/// After so many ticks without a request all is as before.
const QUIET: u32 = 4;

/// The length of the companion's turns: the shortest that sched(7) has.
const SLICE: Duration = Duration::from_micros(100);

/// Who served as many requests got along.
const MANY: u64 = 1000;

/// Reading and writing more than so many bytes at once is not short.
pub(crate) const LARGE: u64 = 128 << 10;

/// What the workers share about it.
#[derive(Debug)]
pub(crate) struct Near {
    /// Another descriptor of the connection, to see whether a request waits.
    fuse: OwnedFd,
    /// The procfs that knows the askers by the numbers that requests have.
    proc: OwnedFd,
    /// [`SLOW`].
    slow: Duration,
    began: Instant,
    /// Who asked last, and how often since somebody else did.
    streak: AtomicU64,
    /// When that began, in nanoseconds since `began`.
    streak_began: AtomicU64,
    /// Whether the companion works, and the others sleep. Changes under the lock of `state`.
    on: AtomicBool,
    /// There will be no companion any more.
    ended: AtomicBool,
    /// It is not worth it, the companion found.
    in_vain: AtomicBool,
    /// The companion is in the middle of a request.
    busy: AtomicBool,
    /// The companion sleeps until it is wanted.
    waits: AtomicBool,
    /// Whom it serves, and where; how long a request took before, in nanoseconds.
    asker: AtomicU32,
    processor: AtomicUsize,
    before: AtomicU64,
    /// How many requests the companion has served.
    served: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
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

/// When the next companion may begin: the sooner the better the last ones got along.
#[derive(Debug)]
struct Pause {
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

    fn is_over(&self, now: Instant) -> bool {
        now >= self.until
    }

    /// The companion did not get along.
    fn begin(&mut self, now: Instant) {
        if now.saturating_duration_since(self.began) >= Self::GOOD {
            self.next = Self::SHORTEST;
        }
        self.until = now + self.next;
        self.next = (self.next * 2).min(Self::LONGEST);
    }
}

/// What a worker is.
#[derive(Debug)]
enum Role {
    Ordinary { _leaving: Leaving },
    Companion(Companion),
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
        if left == 0 || near.waiting() == Waiting::Gone {
            near.end();
        }
    }
}

/// A thread that is bound to a processor; afterwards it may run where it could before, unless somebody has chosen for it
/// meanwhile.
#[derive(Debug)]
struct Bound {
    before: CpuSet,
    now: Option<usize>,
}

impl Bound {
    fn new() -> Res<Self> {
        Ok(Self { before: sched_getaffinity(None)?, now: None })
    }

    /// Binds the calling thread; leaves it where it is if it may not run there.
    fn bind(&mut self, processor: usize) {
        if self.now.is_none()
            && let Ok(set) = sched_getaffinity(None)
        {
            self.before = set;
        }
        if self.now != Some(processor)
            && self.before.is_set(processor)
            && sched_setaffinity(None, &only(processor)).is_ok()
        {
            self.now = Some(processor);
        }
    }

    fn release(&mut self) {
        if let Some(processor) = self.now.take() {
            unbind(None, processor, &self.before);
        }
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        self.release();
    }
}

fn unbind(thread: Option<Pid>, processor: usize, before: &CpuSet) {
    if sched_getaffinity(thread).is_ok_and(|set| set == only(processor)) {
        let _ = sched_setaffinity(thread, before);
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

/// What the companion keeps to itself.
#[derive(Debug)]
struct Companion {
    bound: Bound,
    asker: u32,
    /// How long a request took before.
    before: Duration,
    /// Since the last look: requests, and how often somebody else asked.
    requests: u32,
    others: u32,
    looked: Instant,
    /// How many looks in a row found that it is not worth it.
    in_vain: u32,
}

/// What a look finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Worth {
    GoOn,
    /// The asker may be somewhere else now.
    Follow,
    Stop,
}

impl Companion {
    /// Whether to go on, when the last [`LOOK`] requests took `pace` each.
    fn look(&mut self, pace: Duration) -> Worth {
        let others = std::mem::take(&mut self.others);
        self.requests = 0;
        let worth = pace * 100 < self.before * WORTH;
        self.in_vain = if worth { 0 } else { self.in_vain + 1 };
        if others > OTHERS || self.in_vain >= PATIENCE {
            Worth::Stop
        } else if worth {
            Worth::GoOn
        } else {
            Worth::Follow
        }
    }
}

thread_local! {
    static ROLE: RefCell<Option<Role>> = const { RefCell::new(None) };
}

impl Near {
    /// How many workers more than otherwise there are to be: the companion.
    pub(crate) const WORKERS: usize = 1;

    /// With a procfs of the process-ID namespace that the overlay is mounted in. `None` where nothing is gained, with
    /// one worker or one processor, and where the kernel cannot do it.
    pub(crate) fn new(fuse: OwnedFd, proc: OwnedFd, workers: usize) -> Option<Arc<Self>> {
        let processors = sched_getaffinity(None).ok()?.count();
        // Of anything else, opening a file might take for ever.
        let is_proc =
            rustix::fs::fstatfs(&proc).is_ok_and(|stat| stat.f_type == rustix::fs::PROC_SUPER_MAGIC);
        (is_proc && workers > 1 && processors > 1 && has_turns()).then(|| Self::with(fuse, proc, SLOW))
    }

    fn with(fuse: OwnedFd, proc: OwnedFd, slow: Duration) -> Arc<Self> {
        Arc::new(Self {
            fuse,
            proc,
            slow,
            began: Instant::now(),
            streak: AtomicU64::new(0),
            streak_began: AtomicU64::new(0),
            on: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            in_vain: AtomicBool::new(false),
            busy: AtomicBool::new(false),
            waits: AtomicBool::new(false),
            asker: AtomicU32::new(0),
            processor: AtomicUsize::new(0),
            before: AtomicU64::new(0),
            served: AtomicU64::new(0),
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// How many requests were served so.
    pub(crate) fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }

    fn is_on(&self) -> bool {
        self.on.load(Ordering::Acquire)
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// To be called by the companion when it has a request.
    pub(crate) fn begin(&self) {
        self.busy.store(true, Ordering::Relaxed);
    }

    /// To be called by each worker when it has answered a request of the thread `asker` (0 for one of nobody's). It
    /// comes back when the worker is to read the next one.
    pub(crate) fn after(self: &Arc<Self>, asker: u32) {
        ROLE.with_borrow_mut(|role| match role.get_or_insert_with(|| self.take_role()) {
            Role::Ordinary { .. } => self.after_ordinary(asker),
            Role::Companion(companion) => self.after_companion(companion, asker),
        });
    }

    /// The first worker is an ordinary one, for it to see when the mount is gone; the second is the companion.
    fn take_role(self: &Arc<Self>) -> Role {
        let mut state = self.state.lock();
        if state.ordinary > 0
            && state.companion.is_none()
            && !self.has_ended()
            && let Ok(bound) = Bound::new()
        {
            let anywhere = bound.before;
            state.companion = Some(Seat { thread: std::thread::current(), id: gettid(), anywhere });
            // From here on it may be kept from running.
            drop(state);
            match become_companion(bound) {
                Ok(companion) => return Role::Companion(companion),
                Err(err) => tracing::debug!(%err, "nobody is served on his own processor"),
            }
            self.ended.store(true, Ordering::Release);
            state = self.state.lock();
            state.companion = None;
        }
        state.ordinary += 1;
        Role::Ordinary { _leaving: Leaving(Arc::downgrade(self)) }
    }

    fn after_ordinary(&self, asker: u32) {
        if self.is_on() {
            // Many do this, and in no hurry.
            self.look_after(LONG_TICK, None);
        } else if asker != 0
            && let Some(pace) = self.streak(asker)
            && self.accompany(asker, pace)
            && let Ok(mut bound) = Bound::new()
        {
            self.look_after(TICK, Some(&mut bound));
        }
    }

    /// Counts a request of a thread; says how long each took when that were enough. Two at a time may be counted as
    /// one: then they do not come one after the other.
    fn streak(&self, asker: u32) -> Option<Duration> {
        let last = self.streak.load(Ordering::Relaxed);
        let pack = |count: u32| u64::from(asker) << 32 | u64::from(count);
        let count = last.wrapping_sub(pack(0));
        if !(1..u64::from(STREAK)).contains(&count) {
            self.streak_began.store(self.nanos(), Ordering::Relaxed);
            self.streak.store(pack(1), Ordering::Relaxed);
            return None;
        }
        self.streak.store(last + 1, Ordering::Relaxed);
        if count + 1 < u64::from(STREAK) {
            return None;
        }
        let took = self.nanos().saturating_sub(self.streak_began.load(Ordering::Relaxed));
        let pace = Duration::from_nanos(took) / STREAK;
        (pace <= self.slow).then_some(pace)
    }

    fn nanos(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Has the companion serve a thread.
    fn accompany(&self, asker: u32, pace: Duration) -> bool {
        if !self.waits.load(Ordering::Acquire) {
            return false;
        }
        let now = Instant::now();
        // Another one has it to do the same.
        if !self.state.try_lock().is_some_and(|state| state.pause.is_over(now)) {
            return false;
        }
        let found = self.processor_of(asker);
        let Some(mut state) = self.state.try_lock() else { return false };
        if self.is_on()
            || self.has_ended()
            || !self.waits.load(Ordering::Acquire)
            || !state.pause.is_over(now)
        {
            return false;
        }
        state.pause.began = now;
        state.served = self.served();
        let Some(seat) = &mut state.companion else { return false };
        if let Ok(set) = sched_getaffinity(Some(seat.id)) {
            seat.anywhere = set;
        }
        let processor = match found {
            Ok(processor) if seat.anywhere.is_set(processor) => processor,
            Ok(_) | Err(_) => {
                state.pause.begin(now);
                return false;
            }
        };
        self.asker.store(asker, Ordering::Relaxed);
        self.processor.store(processor, Ordering::Relaxed);
        self.before.store(u64::try_from(pace.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.in_vain.store(false, Ordering::Relaxed);
        self.on.store(true, Ordering::Release);
        seat.thread.unpark();
        drop(state);
        tracing::debug!(asker, ?pace, processor, "served on its own processor");
        true
    }

    /// Stays until the companion has stopped, and sees to it that it does when it does not get along. It looks at every
    /// `tick`, from where the companion is if that is asked for: another processor that awoke for this would look for
    /// something to do, and take the asker away.
    fn look_after(&self, tick: Duration, mut bound: Option<&mut Bound>) {
        let (mut before, mut quiet) = (self.served(), 0);
        loop {
            if let Some(bound) = &mut bound {
                bound.bind(self.processor.load(Ordering::Relaxed));
            }
            let state = self.state.lock();
            let wait = self.changed.wait_timeout_while(state, tick, |_| self.is_on());
            drop(wait.unwrap_or_else(PoisonError::into_inner));
            if !self.is_on() {
                return;
            }
            let served = self.served();
            let waiting = self.waiting();
            if waiting == Waiting::Gone {
                self.end();
            } else if self.in_vain.load(Ordering::Relaxed) {
                self.stop(Some("it was not worth it"));
            } else if served != std::mem::replace(&mut before, served) {
                quiet = 0;
            } else if waiting == Waiting::Request {
                self.stop(Some("a request waited"));
            } else if self.busy.load(Ordering::Relaxed) {
                self.stop(Some("it was kept from a request"));
            } else {
                quiet += 1;
                if quiet == QUIET && self.stop(None) {
                    return self.see_off();
                }
            }
        }
    }

    /// The companion still waits for a request, before all others. Stays until it has had it, and sees to it that it does
    /// not keep it waiting.
    fn see_off(&self) {
        while !self.waits.load(Ordering::Acquire) && !self.has_ended() && !self.is_on() {
            let mut waiting = [PollFd::new(&self.fuse, PollFlags::IN)];
            // Not one who reads, so the kernel wakes the companion as well.
            if poll(&mut waiting, None).is_err() {
                return;
            }
            let state = self.state.lock();
            let wait = self.changed.wait_timeout_while(state, TICK, |_| !self.waits.load(Ordering::Acquire));
            drop(wait.unwrap_or_else(PoisonError::into_inner));
            match self.waiting() {
                Waiting::Nothing => {}
                // It is for this worker now.
                Waiting::Request => return,
                Waiting::Gone => return self.end(),
            }
        }
    }

    fn waiting(&self) -> Waiting {
        let mut waiting = [PollFd::new(&self.fuse, PollFlags::IN)];
        match poll(&mut waiting, Some(&Timespec::default())).map(|_| waiting[0].revents()) {
            Ok(events) if events.is_empty() => Waiting::Nothing,
            Ok(events) if events.intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL) => {
                Waiting::Gone
            }
            Ok(_) | Err(_) => Waiting::Request,
        }
    }

    fn after_companion(&self, companion: &mut Companion, asker: u32) {
        self.busy.store(false, Ordering::Relaxed);
        if self.is_on() {
            self.served.fetch_add(1, Ordering::Relaxed);
            companion.requests += 1;
            if asker != 0 && asker != std::mem::replace(&mut companion.asker, asker) {
                companion.others += 1;
            }
            if companion.requests >= LOOK {
                self.follow(companion);
            }
            return;
        }
        companion.bound.release();
        self.waits.store(true, Ordering::Release);
        while !self.is_on() && !self.has_ended() {
            std::thread::park();
        }
        self.waits.store(false, Ordering::Release);
        companion.bound.bind(self.processor.load(Ordering::Relaxed));
        if !self.is_on() {
            companion.bound.release();
        }
        companion.asker = self.asker.load(Ordering::Relaxed);
        companion.before = Duration::from_nanos(self.before.load(Ordering::Relaxed));
        companion.looked = Instant::now();
        (companion.requests, companion.others, companion.in_vain) = (0, 0, 0);
    }

    /// Goes where the asker is; says so where that is not worth it.
    fn follow(&self, companion: &mut Companion) {
        let now = Instant::now();
        let pace = now.saturating_duration_since(std::mem::replace(&mut companion.looked, now)) / LOOK;
        match companion.look(pace) {
            Worth::GoOn => {}
            Worth::Stop => self.in_vain.store(true, Ordering::Relaxed),
            Worth::Follow => {
                if let Ok(processor) = self.processor_of(companion.asker) {
                    companion.bound.bind(processor);
                    self.processor.store(companion.bound.now.unwrap_or(processor), Ordering::Relaxed);
                    // Who stopped it meanwhile has seen it bound elsewhere.
                    if !self.is_on() {
                        companion.bound.release();
                    }
                }
            }
        }
    }

    /// All is as before; for some time, if there is something to be said against it.
    /// False if somebody else has brought it about.
    fn stop(&self, why: Option<&'static str>) -> bool {
        {
            let mut state = self.state.lock();
            if !self.is_on() {
                return false;
            }
            self.on.store(false, Ordering::Release);
            let many = self.served() - state.served >= MANY;
            match why {
                Some(_) => state.pause.begin(Instant::now()),
                None if many => state.pause.next = Pause::SHORTEST,
                None => {}
            }
            if let Some(seat) = &state.companion {
                // It may be in the middle of a request, and go on where there is room.
                unbind(Some(seat.id), self.processor.load(Ordering::Relaxed), &seat.anywhere);
            }
        }
        self.changed.notify_all();
        tracing::debug!(why, served = self.served(), "served on any processor");
        true
    }

    /// The mount is gone.
    fn end(&self) {
        {
            let state = self.state.lock();
            self.ended.store(true, Ordering::Release);
            self.on.store(false, Ordering::Release);
            if let Some(seat) = &state.companion {
                seat.thread.unpark();
            }
        }
        self.changed.notify_all();
    }

    /// The processor that a thread runs on, or ran on last.
    fn processor_of(&self, thread: u32) -> Res<usize> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
        let path = format!("{thread}/task/{thread}/stat");
        let stat = openat2(&self.proc, &path, flags, Mode::empty(), resolve)?;
        let mut text = [0; 1024];
        let n = rustix::io::read(&stat, &mut text)?;
        processor_in(&text[..n]).ok_or(Errno::INVAL)
    }
}

/// Makes the calling thread a companion.
fn become_companion(bound: Bound) -> Res<Companion> {
    // Before it gives way, so that what it starts does not.
    start_elsewhere().map_err(|_| Errno::AGAIN)?;
    if let Err(err) = give_way(SLICE) {
        start_here();
        return Err(err);
    }
    set_gives_way();
    let looked = Instant::now();
    Ok(Companion { bound, asker: 0, before: Duration::ZERO, requests: 0, others: 0, looked, in_vain: 0 })
}

/// The 39th field of `/proc/PID/stat` (proc_pid_stat(5)). The second, in parentheses, may hold anything.
fn processor_in(stat: &[u8]) -> Option<usize> {
    let end = stat.iter().rposition(|&byte| byte == b')')?;
    let text = std::str::from_utf8(stat.get(end + 1..)?).ok()?;
    text.split_ascii_whitespace().nth(39 - 3)?.parse().ok().filter(|&processor| processor < CpuSet::MAX_CPU)
}

fn only(processor: usize) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(processor);
    set
}

#[cfg(test)]
mod tests {
    use std::io::{PipeReader, PipeWriter, Read as _, Write as _, pipe};
    use std::sync::atomic::AtomicU32;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::thread::JoinHandle;

    use super::*;
    use crate::sync::tests::in_time;

    #[test]
    fn the_processor_is_read_whatever_a_program_is_called() {
        let stat = |name: &str| {
            let fields: Vec<String> = (4..=52).map(|field| field.to_string()).collect();
            format!("7 ({name}) S {}\n", fields.join(" "))
        };
        for name in ["sh", "a b", ") S 1 2 3", "((", ""] {
            assert_eq!(processor_in(stat(name).as_bytes()), Some(39), "{name}");
        }
        assert_eq!(processor_in(b"7 (sh) S 1 2 3"), None, "too short");
        assert_eq!(processor_in(b"7 sh S"), None, "no name");
        let own = std::fs::read("/proc/thread-self/stat").expect("own stat");
        assert!(processor_in(&own).is_some(), "the kernel's form");
        assert_eq!(
            processor_in(&stat("sh").replace(" 39 ", " 99999999 ").into_bytes()),
            None,
            "none that can be"
        );
    }

    fn companion(before: Duration) -> Companion {
        let looked = Instant::now();
        let bound = Bound::new().expect("own affinity");
        Companion { bound, asker: 1, before, requests: LOOK, others: 0, looked, in_vain: 0 }
    }

    #[test]
    fn it_goes_on_while_it_is_worth_it() {
        let micros = Duration::from_micros;
        let mut it = companion(micros(20));
        assert_eq!(it.look(micros(9)), Worth::GoOn);
        for _ in 1..PATIENCE {
            assert_eq!(it.look(micros(30)), Worth::Follow, "the asker may have moved");
        }
        assert_eq!(it.look(micros(9)), Worth::GoOn, "it was found again");
        for _ in 1..PATIENCE {
            assert_eq!(it.look(micros(19)), Worth::Follow, "hardly faster");
        }
        assert_eq!(it.look(micros(19)), Worth::Stop);
        it = companion(micros(20));
        it.others = OTHERS + 1;
        assert_eq!(it.look(micros(9)), Worth::Stop, "several ask");
        assert_eq!((it.others, it.requests), (0, 0));
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
        let later = start + Pause::GOOD;
        assert_eq!(length(&mut pause, later), Pause::SHORTEST);
        assert!(pause.is_over(later + Pause::SHORTEST));
    }

    fn proc() -> OwnedFd {
        std::fs::File::open("/proc").expect("/proc").into()
    }

    #[test]
    fn only_who_asks_again_and_again_is_followed() {
        let (requests, _queue) = pipe().expect("pipe");
        let near = Near::with(requests.into(), proc(), Duration::MAX);
        let asks = |asker, times: u32| (0..times).filter(|_| near.streak(asker).is_some()).count();
        assert_eq!(asks(1, STREAK - 1), 0);
        assert_eq!(asks(2, 1), 0);
        assert_eq!(asks(1, STREAK - 1), 0, "another one came between");
        assert_eq!(asks(1, 1), 1);
        assert_eq!(asks(1, STREAK - 1), 0, "counted anew");
        assert_eq!(asks(1, 1), 1);
        assert_eq!(asks(u32::MAX, STREAK), 1);
        let (requests, _queue) = pipe().expect("pipe");
        let slow = Near::with(requests.into(), proc(), Duration::ZERO);
        assert!((0..2 * STREAK).all(|_| slow.streak(1).is_none()), "waking is not what it waits for");
    }

    /// Workers that answer what comes out of a pipe, as those of a mount do.
    struct Bench {
        near: Arc<Near>,
        queue: PipeWriter,
        answers: Receiver<u8>,
        workers: Vec<JoinHandle<()>>,
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
            let tid = gettid().as_raw_nonzero().get().cast_unsigned();
            let worker = |requests: PipeReader| {
                let (near, answer, release, hold) =
                    (near.clone(), answer.clone(), release.clone(), hold.clone());
                std::thread::spawn(move || {
                    let mut request = [0];
                    while (&requests).read(&mut request).is_ok_and(|n| n == 1) {
                        let companion = ROLE.with_borrow(|role| matches!(role, Some(Role::Companion(_))));
                        if companion && hold.load(Ordering::SeqCst) == 1 {
                            hold.store(2, Ordering::SeqCst);
                            // Ends when the sender is dropped.
                            let _ = release.lock().recv();
                        }
                        answer.send(request[0]).expect("somebody waits");
                        near.after(asker(request[0], tid));
                    }
                })
            };
            let workers = (0..3).map(|_| worker(requests.try_clone().expect("dup"))).collect();
            Self { near, queue, answers, workers, held: Some(held), hold }
        }

        fn ask(&mut self, request: u8) {
            self.queue.write_all(&[request]).expect("write");
        }

        fn answer(&self) -> u8 {
            self.answers.recv_timeout(Duration::from_secs(60)).expect("an answer")
        }

        /// Asks until the companion works; false where none can be had.
        fn begin(&mut self) -> bool {
            in_time(|| {
                self.ask(b'a');
                assert_eq!(self.answer(), b'a');
                if self.near.has_ended() {
                    return Some(false);
                }
                self.near.is_on().then_some(true)
            })
        }

        fn end(mut self) {
            drop(self.queue);
            drop(self.held.take());
            for worker in self.workers {
                in_time(|| worker.is_finished().then_some(()));
                worker.join().expect("no panic");
            }
        }
    }

    #[test]
    fn the_companion_serves_who_asks_again_and_again() {
        let mut bench = Bench::new();
        if bench.begin() {
            in_time(|| {
                bench.ask(b'a');
                assert_eq!(bench.answer(), b'a');
                (bench.near.served() > 1).then_some(())
            });
            // Nobody asks any more.
            in_time(|| (!bench.near.is_on()).then_some(()));
            bench.ask(b'a');
            assert_eq!(bench.answer(), b'a');
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
            drop(bench.held.take());
            assert_eq!(bench.answer(), b'a');
        }
        bench.end();
    }

    #[test]
    fn all_end_with_the_mount_while_the_companion_works() {
        let mut bench = Bench::new();
        bench.begin();
        bench.end();
    }

    #[test]
    fn what_a_companion_starts_does_not_give_way() {
        let policy = std::thread::spawn(|| {
            start_elsewhere().expect("a thread");
            if give_way(SLICE).is_err() {
                return None;
            }
            let policy = || {
                let stat = std::fs::read_to_string("/proc/thread-self/stat").expect("own stat");
                let after = stat.rsplit_once(')').expect("a name").1;
                after.split_ascii_whitespace().nth(41 - 3).expect("a policy").to_owned()
            };
            let (tell, told) = channel();
            let started = crate::sync::start("started", move || tell.send(policy()).expect("asked"));
            started.expect("a thread").join().expect("no panic");
            Some((policy(), told.recv().expect("its policy")))
        });
        if let Some((mine, started)) = policy.join().expect("no panic") {
            assert_eq!((&*mine, &*started), ("5", "0"), "SCHED_IDLE, SCHED_OTHER");
        }
    }
}
