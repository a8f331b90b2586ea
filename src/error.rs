//! What errors have in common: the errno below them, and its name.
//!
//! Each module has an error type of its own; this is only what their printing shares.

use std::error::Error;

use nix::errno::Errno;

/// An errno by its name, then in words: `ENOENT (no such file or directory)`.
#[must_use]
pub fn errno_text(errno: Errno) -> String {
    let words = errno.desc();
    let mut chars = words.chars();
    let lower = chars.next().map(|first| first.to_lowercase().chain(chars).collect::<String>());
    format!("{errno:?} ({})", lower.unwrap_or_default())
}

/// The errno at the bottom of an error, if the kernel is to blame.
#[must_use]
pub fn errno_of(error: &(dyn Error + 'static)) -> Option<Errno> {
    let mut at = Some(error);
    while let Some(error) = at {
        if let Some(errno) = own_errno(error) {
            return Some(errno);
        }
        at = error.source();
    }
    None
}

/// The errno of one error, without those below it.
pub(crate) fn own_errno(error: &(dyn Error + 'static)) -> Option<Errno> {
    if let Some(errno) = error.downcast_ref::<Errno>() {
        return Some(*errno);
    }
    if let Some(errno) = error.downcast_ref::<rustix::io::Errno>() {
        return Some(Errno::from_raw(errno.raw_os_error()));
    }
    error.downcast_ref::<std::io::Error>()?.raw_os_error().map(Errno::from_raw)
}
