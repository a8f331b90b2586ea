//! Locks that a panic cannot poison.
//!
//! A handler that panics answers `EIO` for its one request (see [`crate::fs`]);
//! the next request must find the locks usable. Every structure guarded here is
//! changed in steps that each leave it consistent.
//!
//! And threads that cannot be had: whoever wants one has to go on without.

use std::cell::RefCell;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError, RwLockReadGuard, RwLockWriteGuard, TryLockError, mpsc};
use std::thread::{Builder, JoinHandle};

/// A mutex whose `lock` always succeeds.
#[derive(Debug, Default)]
pub(crate) struct Mutex<T>(std::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(std::sync::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lock, if nobody holds it.
    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        match self.0.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    pub(crate) fn get_mut(&mut self) -> &mut T {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A reader-writer lock whose `read` and `write` always succeed.
#[derive(Debug, Default)]
pub(crate) struct RwLock<T> {
    lock: std::sync::RwLock<T>,
    written: AtomicU64,
}

impl<T> RwLock<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self { lock: std::sync::RwLock::new(value), written: AtomicU64::new(0) }
    }

    pub(crate) fn read(&self) -> RwLockReadGuard<'_, T> {
        self.lock.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lock for reading, if nobody holds it for writing or waits to.
    pub(crate) fn try_read(&self) -> Option<RwLockReadGuard<'_, T>> {
        match self.lock.try_read() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// How often it was locked for writing. For who holds it for reading: what he saw with the same number is
    /// still so.
    pub(crate) fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// The lock for writing, if nobody holds it.
    pub(crate) fn try_write(&self) -> Option<RwLockWriteGuard<'_, T>> {
        let guard = match self.lock.try_write() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        self.written.fetch_add(1, Ordering::Relaxed);
        Some(guard)
    }

    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, T> {
        let guard = self.lock.write().unwrap_or_else(PoisonError::into_inner);
        // Seen by whoever gets the lock after this.
        self.written.fetch_add(1, Ordering::Relaxed);
        guard
    }
}

/// Starts a thread; where too many processes run already there is none.
pub(crate) fn start(name: &str, main: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    #[cfg(test)]
    tests::come_between();
    #[cfg(test)]
    if tests::THREADLESS.get() {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    STARTER.with_borrow(|starter| {
        let Some(starter) = starter else { return Builder::new().name(name.to_owned()).spawn(main) };
        let (answer, started) = mpsc::channel();
        let ended = || io::Error::from(io::ErrorKind::WouldBlock);
        let order = Order { name: name.to_owned(), main: Box::new(main), answer };
        starter.send(order).map_err(|_| ended())?;
        started.recv().map_err(|_| ended())?
    })
}

/// The same for something that comes back where there is none.
pub(crate) fn start_with<T: Send + 'static>(
    name: &str,
    task: T,
    main: impl FnOnce(T) + Send + 'static,
) -> Result<JoinHandle<()>, T> {
    let task = Arc::new(Mutex::new(Some(task)));
    let theirs = task.clone();
    let run = move || {
        // In a statement of its own, for the lock not to be held.
        let task = theirs.lock().take();
        if let Some(task) = task {
            main(task);
        }
    };
    start(name, run).map_err(|_| task.lock().take().expect("a thread that was not started takes nothing"))
}

/// A thread that somebody wants to have started.
struct Order {
    name: String,
    main: Box<dyn FnOnce() + Send>,
    answer: mpsc::Sender<io::Result<JoinHandle<()>>>,
}

thread_local! {
    static STARTER: RefCell<Option<mpsc::Sender<Order>>> = const { RefCell::new(None) };
}

/// What this thread starts from now on is started by another one, and so does not inherit what this one makes of
/// itself.
pub(crate) fn start_elsewhere() -> io::Result<()> {
    let (orders, ordered) = mpsc::channel::<Order>();
    start("fsoverlay-start", move || {
        for Order { name, main, answer } in ordered {
            // Who ordered it waits for the answer.
            let _ = answer.send(Builder::new().name(name).spawn(main));
        }
    })?;
    STARTER.set(Some(orders));
    Ok(())
}

/// What this thread starts it starts itself again.
pub(crate) fn start_here() {
    STARTER.set(None);
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::{Cell, RefCell};
    use std::time::{Duration, Instant};

    thread_local! {
        pub(super) static THREADLESS: Cell<bool> = const { Cell::new(false) };
        static BETWEEN: RefCell<Option<Box<dyn FnOnce()>>> = const { RefCell::new(None) };
    }

    pub(super) fn come_between() {
        if let Some(between) = BETWEEN.take() {
            between();
        }
    }

    /// Runs something, and has another thread do something else while the first thread that it starts is being started:
    /// it ends within that time.
    pub(crate) fn while_starting<T>(
        other: impl FnOnce() + Send + 'static,
        operation: impl FnOnce() -> T,
    ) -> T {
        BETWEEN.set(Some(Box::new(|| {
            let thread = std::thread::spawn(other);
            in_time(|| thread.is_finished().then_some(()));
            thread.join().expect("no panic");
        })));
        let done = operation();
        assert!(BETWEEN.take().is_none(), "none was started");
        done
    }

    /// Runs something that can start no thread.
    pub(crate) fn without_threads<T>(operation: impl FnOnce() -> T) -> T {
        THREADLESS.set(true);
        let done = operation();
        THREADLESS.set(false);
        done
    }

    /// Waits for what other threads bring about; fails where they never do.
    pub(crate) fn in_time<T>(mut condition: impl FnMut() -> Option<T>) -> T {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(found) = condition() {
                return found;
            }
            assert!(Instant::now() < end, "it does not come about");
            std::thread::yield_now();
        }
    }
}
