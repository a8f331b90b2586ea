//! What is to happen at a later moment, on one thread, which exists once there is something to wait for.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::{Arc, Condvar, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::sync::Mutex;

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
    /// Runs `job` once `due` is there. It must be short, and must not panic; after [`Later::stop`] it is
    /// dropped instead. Without a thread to be had it runs at once.
    pub(crate) fn at(&self, due: Instant, job: impl FnOnce() + Send + 'static) {
        let mut state = self.shared.state.lock();
        if state.over {
            return;
        }
        if state.thread.is_none() {
            let shared = self.shared.clone();
            let started =
                std::thread::Builder::new().name("fsoverlay-later".to_owned()).spawn(move || run(&shared));
            match started {
                Ok(thread) => state.thread = Some(thread),
                Err(_) => {
                    drop(state);
                    return job();
                }
            }
        }
        state.count += 1;
        let due = Reverse((due, state.count));
        state.jobs.push(Timed { due, job: Box::new(job) });
        drop(state);
        self.shared.changed.notify_one();
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

    #[test]
    fn the_earliest_comes_first_and_what_is_left_is_dropped() {
        let later = Later::default();
        let (sender, receiver) = mpsc::channel();
        let (now, hour) = (Instant::now(), Duration::from_secs(3600));
        let send = |n: u8| {
            let sender = sender.clone();
            move || sender.send(n).expect("somebody listens")
        };
        later.at(now + hour, send(3));
        later.at(now + Duration::from_millis(2), send(2));
        later.at(now, send(1));
        assert_eq!([receiver.recv(), receiver.recv()], [Ok(1), Ok(2)]);
        later.stop();
        drop(sender);
        assert!(receiver.recv().is_err());
    }
}
