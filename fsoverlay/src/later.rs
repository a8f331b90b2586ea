//! What is to happen at a later moment, on one thread, which exists once there is something to wait for.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Instant;

use crate::errno::calmly;
use crate::helper::{Helper, Undone};

/// Why something is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Called {
    /// Its moment has come. It must be short, and must not panic.
    InTime,
    /// At once, and by whoever tried to start the thread: there is none to be had, and so nobody who would call it in
    /// time. To ask for a later moment again would be in vain.
    NoThread,
}

type Job = Box<dyn FnOnce(Called) + Send>;

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

/// See the module.
#[derive(Debug)]
pub(crate) struct Later {
    helper: Helper<(Instant, Job)>,
}

impl Default for Later {
    fn default() -> Self {
        Self { helper: Helper::new("fsoverlay-later") }
    }
}

impl Later {
    /// Starts the thread, which goes on until [`Later::stop`]; false if there is none to be had. (True also says that
    /// somebody else is about to start it, who may yet find that there is none: it is for a time when nobody else does.)
    pub(crate) fn ready(&self) -> bool {
        let started = self.helper.prepare(run);
        started.map_err(give_up).is_ok()
    }

    /// Calls `job` once `due` is there; after [`Later::stop`] it is dropped instead.
    pub(crate) fn at(&self, due: Instant, job: impl FnOnce(Called) + Send + 'static) {
        if let Err(undone) = self.helper.give((due, Box::new(job)), run) {
            give_up(undone);
        }
    }

    /// Ends the thread; what still waits never happens.
    pub(crate) fn stop(&self) {
        self.helper.stop();
    }
}

/// For the jobs of others, too, which came while the thread was about to be there.
fn give_up(undone: Undone<(Instant, Job)>) {
    if !undone.over {
        calmly(|| undone.tasks.into_iter().for_each(|(_, job)| job(Called::NoThread)));
    }
}

fn run(queue: Receiver<(Instant, Job)>) {
    let mut jobs = BinaryHeap::<Timed>::new();
    let mut count = 0;
    loop {
        // What is new comes first, then whether it is over, then what is due.
        let next = match jobs.peek().map(|timed| timed.due.0.0) {
            None => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(due) => queue.recv_timeout(due.saturating_duration_since(Instant::now())),
        };
        match next {
            Ok((due, job)) => {
                count += 1;
                jobs.push(Timed { due: Reverse((due, count)), job });
            }
            Err(RecvTimeoutError::Timeout) => {
                if let Some(timed) = jobs.pop() {
                    (timed.job)(Called::InTime);
                }
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc};
    use std::time::Duration;

    use super::*;
    use crate::sync::tests::{while_starting, without_threads};

    #[test]
    fn the_earliest_comes_first_and_what_is_left_is_dropped() {
        let later = Later::default();
        let (sender, receiver) = mpsc::channel();
        let (now, hour) = (Instant::now(), Duration::from_secs(3600));
        let send = |n: u8| {
            let sender = sender.clone();
            move |called| sender.send((n, called)).expect("somebody listens")
        };
        later.at(now + hour, send(3));
        later.at(now + Duration::from_millis(2), send(2));
        later.at(now, send(1));
        assert_eq!([receiver.recv(), receiver.recv()], [1, 2].map(|n| Ok((n, Called::InTime))));
        later.stop();
        later.at(now, send(4));
        drop(sender);
        assert!(receiver.recv().is_err());
    }

    #[test]
    fn what_others_wait_for_is_not_called_in_the_hurry_of_whoever_calls_it() {
        use crate::errno::{far_mount, hurried, is_hurried, note_far};
        let (later, far) = (Later::default(), crate::far::tests::some_far());
        let (sender, receiver) = mpsc::channel();
        let job = move |called| {
            hurried(|| ());
            let _ = sender.send((called, is_hurried(), far_mount().is_some()));
        };
        hurried(|| {
            note_far(&far);
            without_threads(|| later.at(Instant::now(), job));
            assert_eq!((is_hurried(), far_mount().is_some()), (true, true));
        });
        assert_eq!(receiver.try_recv(), Ok((Called::NoThread, false, false)));
    }

    #[test]
    fn without_a_thread_all_are_called_at_once() {
        let later = Arc::new(Later::default());
        let (sender, receiver) = mpsc::channel();
        let hour = Instant::now() + Duration::from_secs(3600);
        let send = |n: u8| {
            let sender = sender.clone();
            move |called| sender.send((n, called)).expect("somebody listens")
        };
        without_threads(|| later.at(hour, send(1)));
        assert_eq!(receiver.try_recv(), Ok((1, Called::NoThread)));
        // Also the one who relied on a thread that was about to be there.
        let (theirs, relies) = (later.clone(), send(2));
        let comes = move || theirs.at(hour, relies);
        assert!(!while_starting(comes, || without_threads(|| later.ready())));
        assert_eq!(receiver.try_recv(), Ok((2, Called::NoThread)));
        assert!(later.ready());
        without_threads(|| later.at(Instant::now(), send(3)));
        assert_eq!(receiver.recv(), Ok((3, Called::InTime)));
        later.stop();
    }
}
