//! What is to happen at a later moment, on one thread, which exists once there is something to wait for.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::{Arc, Condvar, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::sync::{Mutex, start};

type Job = Box<dyn FnOnce() + Send>;

/// Orders by time alone; the earliest first.
struct Timed {
    due: Reverse<(Instant, u64)>,
    job: Job,
}

impl PartialEq for Timed {
    fn eq(&self, other: &Self) -> bool {
        self.due == other.due
    }
}

impl Eq for Timed {}

impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Timed {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.due.cmp(&other.due)
    }
}

#[derive(Default)]
struct State {
    jobs: BinaryHeap<Timed>,
    count: u64,
    thread: Option<JoinHandle<()>>,
    over: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Later {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Later {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Later").field("waiting", &self.shared.state.lock().jobs.len()).finish()
    }
}

impl Later {
    /// Starts the thread, which goes on until [`Later::stop`]; false if there is none to be had.
    pub(crate) fn ready(&self) -> bool {
        self.started(&mut self.shared.state.lock())
    }

    fn started(&self, state: &mut State) -> bool {
        if state.thread.is_none() && !state.over {
            let shared = self.shared.clone();
            state.thread = start("fsoverlay-later", move || run(&shared)).ok();
        }
        state.thread.is_some() || state.over
    }

    /// Runs `job` once `due` is there. It must be short, and must not panic; after [`Later::stop`] it is
    /// dropped instead. False, and it is dropped, if there is no thread for it ([`Later::ready`]): to run it
    /// here and now is nothing that a job which comes back to this could bear.
    #[must_use]
    pub(crate) fn at(&self, due: Instant, job: impl FnOnce() + Send + 'static) -> bool {
        let mut state = self.shared.state.lock();
        if !self.started(&mut state) {
            return false;
        }
        if state.over {
            return true;
        }
        state.count += 1;
        let due = Reverse((due, state.count));
        state.jobs.push(Timed { due, job: Box::new(job) });
        drop(state);
        self.shared.changed.notify_one();
        true
    }

    /// Ends the thread; what still waits never happens.
    pub(crate) fn stop(&self) {
        let (thread, jobs) = {
            let mut state = self.shared.state.lock();
            state.over = true;
            (state.thread.take(), std::mem::take(&mut state.jobs))
        };
        self.shared.changed.notify_one();
        drop(jobs);
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared) {
    let mut state = shared.state.lock();
    loop {
        if state.over {
            return;
        }
        let now = Instant::now();
        state = match state.jobs.peek().map(|timed| timed.due.0.0) {
            None => shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            Some(due) if due > now => {
                let waited = shared.changed.wait_timeout(state, due - now);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
            Some(_) => {
                let next = state.jobs.pop();
                drop(state);
                if let Some(timed) = next {
                    (timed.job)();
                }
                shared.state.lock()
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::sync::tests::without_threads;

    #[test]
    fn the_earliest_comes_first_and_what_is_left_is_dropped() {
        let later = Later::default();
        let (sender, receiver) = mpsc::channel();
        let (now, hour) = (Instant::now(), Duration::from_secs(3600));
        let send = |n: u8| {
            let sender = sender.clone();
            move || sender.send(n).expect("somebody listens")
        };
        assert!(later.at(now + hour, send(3)));
        assert!(later.at(now + Duration::from_millis(2), send(2)));
        assert!(later.at(now, send(1)));
        assert_eq!([receiver.recv(), receiver.recv()], [Ok(1), Ok(2)]);
        later.stop();
        drop(sender);
        assert!(receiver.recv().is_err());
    }

    #[test]
    fn without_a_thread_nothing_runs_and_the_caller_learns_of_it() {
        let later = Later::default();
        let (sender, receiver) = mpsc::channel();
        let mine = sender.clone();
        let job = move || mine.send("too early").expect("somebody listens");
        assert!(!without_threads(|| later.at(Instant::now(), job)));
        assert!(!without_threads(|| later.ready()));
        assert!(later.ready());
        assert!(without_threads(|| later.at(Instant::now(), move || sender.send("now").expect("listens"))));
        assert_eq!((receiver.recv(), receiver.recv().is_err()), (Ok("now"), true));
        later.stop();
        assert!(later.at(Instant::now(), || {}));
    }
}
