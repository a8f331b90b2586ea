//! One error type for everything that decides: the kernel's own number.
//!
//! What the file system below says (`ENOSPC`, `EDQUOT`, `EIO`, `EROFS`, …) is passed
//! on unchanged, so no error is ever wrapped on the way to the payload.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

pub(crate) use rustix::io::Errno;

use crate::far::Far;

/// A result whose error is the number that the payload will see.
pub(crate) type Res<T> = Result<T, Errno>;

/// Turns "not there" into `None`.
pub(crate) fn missing_ok<T>(result: Res<T>) -> Res<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Errno::NOENT) => Ok(None),
        Err(err) => Err(err),
    }
}

/// Not for the payload: what was asked for takes long, and nothing has been done of it that shows.
/// See [`hurried`].
pub(crate) const LONG: Errno = Errno::INPROGRESS;

/// Not for the payload: what was asked for touches a file system that may never answer ([`crate::far`]), and
/// nothing has been done of it that shows.
pub(crate) const FAR: Errno = Errno::ALREADY;

thread_local! {
    static HURRIED: Cell<bool> = const { Cell::new(false) };
    /// Which file system the last [`FAR`] was about.
    static FAR_MOUNT: RefCell<Option<Arc<Far>>> = const { RefCell::new(None) };
}

pub(crate) fn note_far(far: &Arc<Far>) {
    FAR_MOUNT.set(Some(far.clone()));
}

/// The file system that this thread's [`FAR`] was about.
pub(crate) fn far_mount() -> Option<Arc<Far>> {
    FAR_MOUNT.take()
}

/// Runs an operation that must not take long here: it ends with [`LONG`] before it begins to copy
/// much, or to wait for somebody who does.
pub(crate) fn hurried<T>(operation: impl FnOnce() -> T) -> T {
    struct Calm;
    impl Drop for Calm {
        fn drop(&mut self) {
            HURRIED.set(false);
        }
    }
    HURRIED.set(true);
    let _calm = Calm;
    operation()
}

/// Runs something that is not part of what this thread does, and may take long: it is in no hurry, and changes nothing of
/// that.
pub(crate) fn calmly<T>(operation: impl FnOnce() -> T) -> T {
    struct Before(bool, Option<Arc<Far>>);
    impl Drop for Before {
        fn drop(&mut self) {
            HURRIED.set(self.0);
            FAR_MOUNT.set(self.1.take());
        }
    }
    let _before = Before(HURRIED.replace(false), FAR_MOUNT.take());
    operation()
}

thread_local! {
    /// See [`gives_way`].
    static GIVES_WAY: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread gives way to all others ([`crate::near`]): on a busy machine what takes some milliseconds takes it
/// seconds, and whoever waits for its locks. So it leaves more to others: before it begins, by what is asked for
/// ([`crate::dispatch::takes_long`]), and in a hurry by what turns out to be needed ([`may_take_long`]).
pub(crate) fn gives_way() -> bool {
    GIVES_WAY.get()
}

/// From now on this thread does.
pub(crate) fn set_gives_way() {
    GIVES_WAY.set(true);
}

/// Whether so many bytes are more than others are made to wait for, by this thread.
pub(crate) fn is_much(bytes: u64) -> bool {
    bytes > if gives_way() { 128 << 10 } else { 4 << 20 }
}

/// To be called before something that may take some milliseconds: ends it with [`LONG`] where this thread gives way.
pub(crate) fn may_take_long() -> Res<()> {
    if is_hurried() && gives_way() { Err(LONG) } else { Ok(()) }
}

/// The same, unless it is short; that is only looked at where it matters.
pub(crate) fn may_take_long_unless(is_short: impl FnOnce() -> bool) -> Res<()> {
    may_take_long().or_else(|long| if is_short() { Ok(()) } else { Err(long) })
}

pub(crate) fn is_hurried() -> bool {
    HURRIED.get()
}
