//! One error type for everything that decides: the kernel's own number.
//!
//! What the file system below says (`ENOSPC`, `EDQUOT`, `EIO`, `EROFS`, …) is passed
//! on unchanged, so no error is ever wrapped on the way to the payload.

pub(crate) use rustix::io::Errno;

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
