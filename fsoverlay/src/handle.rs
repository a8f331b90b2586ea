//! Descriptors are a bounded cache, never one per inode.
//!
//! A directory or a file owns an [`FdSlot`]; a slot that is filled is queued in the
//! [`FdRing`], whose length bounds how many are open. When the ring is full the oldest
//! slot is emptied unless it was used since it came round last (second chance). The
//! descriptor itself is shared, so a request that is using it goes on undisturbed and
//! the kernel closes it when the last user is done.
//!
//! `RLIMIT_NOFILE` may be 1,024 and belongs to the whole process; the ring takes a
//! quarter of the soft limit, and descriptors of unlinked open files ([`Pins`]) an eighth.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use crate::attr::Kind;
use crate::hooks::Quota;
use crate::inode::Node;
use crate::layer::{RealDir, stat_fd};
use crate::sync::Mutex;

/// Has the kernel make room in the process's table for `count` descriptors in all.
///
/// It doubles the table when it is full, and in a process of several threads whoever opens the next file waits for an
/// RCU grace period then, which is 3 to 10 ms (`expand_fdtable` of the kernel's fs/file.c): up to eight times while the
/// caches fill. A process of one thread does not wait; the room costs 8 bytes of the kernel's each. Where there is none,
/// all goes on as it did.
pub(crate) fn make_room(fd: BorrowedFd<'_>, count: usize) {
    let _ = rustix::io::fcntl_dupfd_cloexec(fd, i32::try_from(count).unwrap_or(i32::MAX));
}

/// A shared open descriptor.
pub(crate) type Fd = Arc<OwnedFd>;

/// Where an object keeps its descriptor while it has one.
#[derive(Debug, Default)]
pub(crate) struct FdSlot {
    fd: Mutex<Option<(Fd, bool)>>,
    used: AtomicBool,
}

impl FdSlot {
    /// The descriptor, if it is open and (where asked) writable.
    pub(crate) fn get(&self, writable: bool) -> Option<Fd> {
        let slot = self.fd.lock();
        let (fd, can_write) = slot.as_ref()?;
        if writable && !can_write {
            return None;
        }
        self.used.store(true, Ordering::Relaxed);
        Some(fd.clone())
    }

    /// Puts a descriptor in; true if the slot was empty and must be queued.
    #[must_use]
    pub(crate) fn put(&self, fd: Fd, writable: bool) -> bool {
        self.used.store(true, Ordering::Relaxed);
        self.fd.lock().replace((fd, writable)).is_none()
    }

    /// Empties the slot.
    pub(crate) fn take(&self) -> Option<(Fd, bool)> {
        self.fd.lock().take()
    }

    /// One turn of the clock: true if the slot has been emptied.
    fn expire(&self) -> bool {
        if self.used.swap(false, Ordering::Relaxed) {
            return false;
        }
        let old = self.take();
        drop(old);
        true
    }
}

/// Whoever owns a queued slot.
#[derive(Debug)]
pub(crate) enum Holder {
    Dir(Weak<RealDir>),
    File(Weak<Node>),
}

/// The queue of filled slots.
#[derive(Debug)]
pub(crate) struct FdRing {
    queue: Mutex<VecDeque<Holder>>,
    capacity: usize,
}

impl FdRing {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { queue: Mutex::new(VecDeque::new()), capacity }
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Queues a slot that has just been filled and empties old ones.
    pub(crate) fn push(&self, holder: Holder) {
        self.queue.lock().push_back(holder);
        // Bounded work: a slot that gets its second chance expires the next time.
        for _ in 0..64 {
            let oldest = {
                let mut queue = self.queue.lock();
                if queue.len() <= self.capacity {
                    return;
                }
                queue.pop_front()
            };
            let Some(oldest) = oldest else { return };
            // Closing happens without the queue's lock.
            let gone = match &oldest {
                Holder::Dir(weak) => weak.upgrade().is_none_or(|dir| dir.slot.expire()),
                Holder::File(weak) => weak.upgrade().is_none_or(|node| node.file.expire()),
            };
            if !gone {
                self.queue.lock().push_back(oldest);
            }
        }
    }
}

/// How many descriptors of unlinked files may be held open.
#[derive(Debug)]
pub(crate) struct Pins {
    left: AtomicUsize,
    /// Is told when what an unlinked file took is free.
    pub(crate) quota: OnceLock<Arc<dyn Quota>>,
}

impl Pins {
    pub(crate) fn new(count: usize) -> Arc<Self> {
        Arc::new(Self { left: AtomicUsize::new(count), quota: OnceLock::new() })
    }

    /// How many more are allowed.
    pub(crate) fn left(&self) -> usize {
        self.left.load(Ordering::Relaxed)
    }

    /// Takes one of the descriptors allowed, if any is left.
    pub(crate) fn pin(self: &Arc<Self>, fd: Fd) -> Result<Pinned, Fd> {
        let taken = self.left.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1));
        match taken {
            Ok(_) => Ok(Pinned { fd, last: AtomicBool::new(false), pins: self.clone() }),
            Err(_) => Err(fd),
        }
    }
}

/// A descriptor that must stay open: the only way to an unlinked file.
#[derive(Debug)]
pub(crate) struct Pinned {
    pub(crate) fd: Fd,
    /// The file is gone when this is.
    last: AtomicBool,
    pins: Arc<Pins>,
}

impl Pinned {
    /// The file has lost its last name.
    pub(crate) fn is_last(&self) {
        self.last.store(true, Ordering::Relaxed);
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if *self.last.get_mut()
            && let Some(quota) = self.pins.quota.get()
            && let Ok(stat) = stat_fd(self.fd.as_fd())
        {
            crate::hooks::released(&**quota, Kind::File, &stat);
        }
        self.pins.left.fetch_add(1, Ordering::AcqRel);
    }
}
