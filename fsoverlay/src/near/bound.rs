//! Threads that are bound to a processor, and where others run.

use std::os::fd::AsFd;

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::thread::{CpuSet, Pid, sched_setaffinity};

use crate::errno::{Errno, Res};

/// A thread that is bound to a processor; afterwards it may run where it could before, unless somebody has chosen for it
/// meanwhile.
#[derive(Debug)]
pub(super) struct Bound {
    before: CpuSet,
    now: Option<usize>,
}

impl Bound {
    /// For the calling thread, which is not bound yet.
    pub(super) fn new() -> Res<Self> {
        Ok(Self { before: affinity(None)?, now: None })
    }

    /// Where it may run when it is not bound.
    pub(super) fn anywhere(&self) -> CpuSet {
        self.before
    }

    /// The processor that it is bound to.
    pub(super) fn processor(&self) -> Option<usize> {
        self.now
    }

    /// Binds the calling thread; leaves it where it is if it may not run there.
    pub(super) fn bind(&mut self, processor: usize) {
        if self.now.is_none()
            && let Ok(set) = affinity(None)
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

    pub(super) fn release(&mut self) {
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

/// Lets a thread (the calling one for `None`) that is bound to a processor run where it could before.
pub(super) fn unbind(thread: Option<Pid>, processor: usize, before: &CpuSet) {
    if affinity(thread).is_ok_and(|set| set == only(processor)) {
        let _ = sched_setaffinity(thread, before);
    }
}

/// Where a thread may run.
pub(super) fn affinity(thread: Option<Pid>) -> Res<CpuSet> {
    #[cfg(test)]
    if tests::UNREADABLE.get() {
        return Err(Errno::INVAL);
    }
    rustix::thread::sched_getaffinity(thread)
}

fn only(processor: usize) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(processor);
    set
}

/// The processor that a thread runs on, or ran on last, by a procfs that knows it by this number.
pub(super) fn processor_of(proc: impl AsFd, thread: u32) -> Res<usize> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
    let path = format!("{thread}/task/{thread}/stat");
    let stat = openat2(proc, &path, flags, Mode::empty(), resolve)?;
    let mut text = [0; 1024];
    let n = rustix::io::read(&stat, &mut text)?;
    processor_in(&text[..n]).ok_or(Errno::INVAL)
}

/// The 39th field of `/proc/PID/stat` (proc_pid_stat(5)). The second, in parentheses, may hold anything.
fn processor_in(stat: &[u8]) -> Option<usize> {
    let end = stat.iter().rposition(|&byte| byte == b')')?;
    let text = std::str::from_utf8(stat.get(end + 1..)?).ok()?;
    text.split_ascii_whitespace().nth(39 - 3)?.parse().ok().filter(|&processor| processor < CpuSet::MAX_CPU)
}

#[cfg(test)]
pub(super) mod tests {
    use std::cell::Cell;

    use super::*;

    thread_local! {
        /// This thread's affinity cannot be read, as where there are more processors than a set has room for.
        pub(in crate::near) static UNREADABLE: Cell<bool> = const { Cell::new(false) };
    }

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

    #[test]
    fn who_was_bound_may_run_where_he_could_before_unless_somebody_chose_for_him() {
        // (A thread of its own, since it is changed.)
        let thread = std::thread::spawn(|| {
            let before = affinity(None).expect("own affinity");
            let first =
                (0..CpuSet::MAX_CPU).find(|&processor| before.is_set(processor)).expect("there is one");
            let mut bound = Bound::new().expect("own affinity");
            bound.bind(first);
            assert_eq!((bound.processor(), affinity(None)), (Some(first), Ok(only(first))));
            bound.release();
            assert_eq!((bound.processor(), affinity(None)), (None, Ok(before)));
            bound.bind(first);
            drop(bound);
            assert_eq!(affinity(None), Ok(before));
            if before.count() > 1 {
                let mut bound = Bound::new().expect("own affinity");
                bound.bind(first);
                let mut other = before;
                other.unset(first);
                sched_setaffinity(None, &other).expect("allowed");
                drop(bound);
                assert_eq!(affinity(None), Ok(other));
            }
        });
        thread.join().expect("no panic");
    }
}
