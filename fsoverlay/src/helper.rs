//! A thread beside the workers, started by whoever first has something for it.
//!
//! Starting a thread may take long: memory is short, or another thread has to do it
//! ([`crate::sync::start_elsewhere`]). So it is done with no lock in hand. What others have for the thread meanwhile
//! goes to its queue, and they go on. If there is no thread to be had, all of that comes back to whoever tried, and
//! the next one tries again: nothing is left in a queue that nobody reads. One that has ended before its time (which only a
//! panic makes it do) is started anew by the next one who has something for it.

use std::sync::mpsc::{Receiver, SendError, Sender, channel};
use std::sync::{Condvar, PoisonError};
use std::thread::JoinHandle;

use crate::sync::{Mutex, start_with};

/// See the module.
pub(crate) struct Helper<T> {
    name: &'static str,
    state: Mutex<State<T>>,
    /// It is not [`State::Starting`] any more.
    started: Condvar,
}

impl<T> std::fmt::Debug for Helper<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Helper").field("name", &self.name).finish_non_exhaustive()
    }
}

enum State<T> {
    Missing,
    /// Somebody is about to start it.
    Starting(Sender<T>),
    Runs(Sender<T>, JoinHandle<()>),
    /// There will be none any more.
    Over,
}

/// What a helper will not do, whoever gave it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Undone<T> {
    /// Because it has been stopped; otherwise there is no thread to be had.
    pub(crate) over: bool,
    pub(crate) tasks: Vec<T>,
}

impl<T: Send + 'static> Helper<T> {
    pub(crate) const fn new(name: &'static str) -> Self {
        Self { name, state: Mutex::new(State::Missing), started: Condvar::new() }
    }

    /// Gives it something to do. `main` is what it does where it has to be started: it takes everything from its queue,
    /// and ends when that is closed.
    pub(crate) fn give(
        &self,
        task: T,
        main: impl FnOnce(Receiver<T>) + Send + 'static,
    ) -> Result<(), Undone<T>> {
        self.start(Some(task), main)
    }

    /// Sees to it that it is there, or is about to be.
    pub(crate) fn prepare(&self, main: impl FnOnce(Receiver<T>) + Send + 'static) -> Result<(), Undone<T>> {
        self.start(None, main)
    }

    fn start(
        &self,
        first: Option<T>,
        main: impl FnOnce(Receiver<T>) + Send + 'static,
    ) -> Result<(), Undone<T>> {
        let (sender, queue) = {
            let mut state = self.state.lock();
            let first = match &*state {
                State::Starting(sender) | State::Runs(sender, _) => {
                    let sent = first.map_or(Ok(()), |task| sender.send(task));
                    match (sent, &*state) {
                        (Ok(()), _) => return Ok(()),
                        // Nobody reads its queue any more, so it has panicked and ends by itself.
                        (Err(SendError(task)), State::Runs(..)) => Some(task),
                        // Whoever has started it has yet to say so.
                        (Err(SendError(task)), _) => return Err(Undone { over: false, tasks: vec![task] }),
                    }
                }
                State::Over => return Err(Undone { over: true, tasks: first.into_iter().collect() }),
                State::Missing => first,
            };
            let (sender, queue) = channel();
            *state = State::Starting(sender.clone());
            if let Some(task) = first {
                // Before those of others. (Its receiver is here.)
                let _ = sender.send(task);
            }
            (sender, queue)
        };
        let started = start_with(self.name, queue, main);
        let (state, undone) = match started {
            Ok(thread) => (State::Runs(sender, thread), Ok(())),
            Err(queue) => (State::Missing, Err(queue)),
        };
        *self.state.lock() = state;
        self.started.notify_all();
        // Nobody adds to that queue any more.
        undone.map_err(|queue: Receiver<T>| Undone { over: false, tasks: queue.try_iter().collect() })
    }

    /// Closes its queue, and waits until it has ended. What somebody has for it from now on is not done.
    pub(crate) fn stop(&self) {
        let mut state = self.state.lock();
        while matches!(*state, State::Starting(_)) {
            state = self.started.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let before = std::mem::replace(&mut *state, State::Over);
        drop(state);
        if let State::Runs(sender, thread) = before {
            drop(sender);
            // It may sleep although there is something in the queue.
            thread.thread().unpark();
            let _ = thread.join();
        }
    }

    /// Has a thread that a test has made, or none.
    #[cfg(test)]
    pub(crate) fn set(&self, thread: Option<(Sender<T>, JoinHandle<()>)>) {
        *self.state.lock() = thread.map_or(State::Missing, |(sender, thread)| State::Runs(sender, thread));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc;

    use super::*;
    use crate::sync::tests::{in_time, while_starting, without_threads};

    /// Passes on what it is given.
    fn pass_on(to: &mpsc::Sender<u8>) -> impl FnOnce(Receiver<u8>) + Send + 'static {
        let to = to.clone();
        move |queue| queue.into_iter().for_each(|n| to.send(n).expect("somebody listens"))
    }

    #[test]
    fn whoever_comes_while_it_is_started_goes_on_and_there_is_one() {
        let (helper, (sender, receiver)) = (Arc::new(Helper::new("helper")), channel());
        let (theirs, main, second) = (helper.clone(), pass_on(&sender), pass_on(&sender));
        // One that starts a second thread would fail.
        let comes = move || without_threads(|| assert_eq!(theirs.give(2, second), Ok(())));
        assert_eq!(while_starting(comes, || helper.give(1, main)), Ok(()));
        assert_eq!(helper.give(3, pass_on(&sender)), Ok(()));
        assert_eq!([(); 3].map(|()| receiver.recv()), [1, 2, 3].map(Ok));
        helper.stop();
        assert_eq!(helper.give(4, pass_on(&sender)), Err(Undone { over: true, tasks: vec![4] }));
    }

    #[test]
    fn what_no_thread_takes_comes_back_whoever_gave_it() {
        let (helper, (sender, receiver)) = (Arc::new(Helper::new("helper")), channel());
        let (theirs, main, second) = (helper.clone(), pass_on(&sender), pass_on(&sender));
        let comes = move || assert_eq!(theirs.give(2, second), Ok(()));
        let undone = while_starting(comes, || without_threads(|| helper.give(1, main)));
        assert_eq!(undone, Err(Undone { over: false, tasks: vec![1, 2] }));
        // The next one has its thread, and what was given back is not done besides.
        assert_eq!(helper.give(3, pass_on(&sender)), Ok(()));
        helper.stop();
        drop(sender);
        assert_eq!(receiver.iter().collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn one_that_has_ended_is_started_anew() {
        let (helper, (sender, receiver)) = (Helper::new("helper"), channel());
        let (tell, told) = channel();
        let ends = move |queue: Receiver<u8>| {
            drop(queue);
            tell.send(()).expect("somebody listens");
        };
        assert_eq!(helper.prepare(ends), Ok(()));
        assert_eq!(told.recv(), Ok(()));
        assert_eq!(helper.give(1, pass_on(&sender)), Ok(()));
        assert_eq!(helper.give(2, pass_on(&sender)), Ok(()));
        helper.stop();
        assert_eq!(receiver.try_iter().collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn who_stops_it_waits_for_whoever_is_starting_it() {
        let (helper, (sender, receiver)) = (Arc::new(Helper::new("helper")), channel());
        let (theirs, main) = (helper.clone(), pass_on(&sender));
        let (tell, told) = channel();
        let comes = move || {
            let (begin, begun) = channel();
            let stops = std::thread::spawn(move || {
                begin.send(()).expect("somebody listens");
                theirs.stop();
            });
            assert_eq!(begun.recv(), Ok(()));
            // So long that whoever does not wait would have stopped it.
            (0..10_000).for_each(|_| std::thread::yield_now());
            tell.send(stops).expect("somebody listens");
        };
        assert_eq!(while_starting(comes, || helper.give(1, main)), Ok(()));
        let stops = told.recv().expect("one that stops it");
        in_time(|| stops.is_finished().then_some(()));
        drop(sender);
        // All that it had is done.
        assert_eq!(receiver.try_iter().collect::<Vec<_>>(), [1]);
        assert_eq!(receiver.try_recv(), Err(mpsc::TryRecvError::Disconnected), "its thread has ended");
    }
}
