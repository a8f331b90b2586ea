//! Removing a directory tree that a payload filled.
//!
//! Every object belongs to the caller, but its directories may lack permissions, and it may
//! be deeper than there are descriptors or stack. No link is ever followed: only single names
//! below open directories are used.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, RenameFlags, chmodat, fchmod, fstat, openat, renameat_with,
    statat, unlinkat,
};
use rustix::io::{Errno, Result};

/// Directories below this depth are moved up first, so depth costs neither descriptors nor stack.
const DEPTH_MAX: u32 = 64;

/// Removes `path` and what is below it; nothing there is no error.
///
/// # Errors
/// The first failure; what was not removed yet stays.
pub(super) fn remove_tree(path: &Path) -> Result<()> {
    let name = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::INVAL)?;
    let moved_root = match open_directory(CWD, &name) {
        Ok(root) => root,
        Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTDIR | Errno::LOOP) => return unlinkat(CWD, &name, AtFlags::empty()),
        Err(errno) => return Err(errno),
    };
    let mut number = 0;
    while empty(moved_root.as_fd(), moved_root.as_fd(), 0, &mut number)? {}
    unlinkat(CWD, &name, AtFlags::REMOVEDIR)
}

/// Opens a directory so that its entries can be listed and removed.
fn open_directory(parent: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = || openat(parent, name, flags, Mode::empty());
    let directory = match open() {
        Err(Errno::ACCESS) => {
            // A link would be followed here, but the name was a directory a moment ago and
            // nobody else can write in a box that is not running.
            if FileType::from_raw_mode(statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode)
                != FileType::Directory
            {
                return Err(Errno::NOTDIR);
            }
            chmodat(parent, name, Mode::RWXU, AtFlags::empty())?;
            open()?
        }
        other => other?,
    };
    if Mode::from_raw_mode(fstat(&directory)?.st_mode) & Mode::RWXU != Mode::RWXU {
        fchmod(&directory, Mode::RWXU)?;
    }
    Ok(directory)
}

/// Removes the entries of `directory`. True: some were moved to `root` instead.
fn empty(root: BorrowedFd<'_>, directory: BorrowedFd<'_>, depth: u32, number: &mut u64) -> Result<bool> {
    let mut moved = false;
    // Listed first: removing while listing may skip entries on some file systems.
    let entries: Vec<(CString, FileType)> = Dir::read_from(directory)?
        .map(|entry| entry.map(|entry| (entry.file_name().to_owned(), entry.file_type())))
        .collect::<Result<_>>()?;
    for (name, kind) in entries {
        if name.to_bytes() == b"." || name.to_bytes() == b".." {
            continue;
        }
        if !matches!(kind, FileType::Directory | FileType::Unknown) {
            unlinkat(directory, &name, AtFlags::empty())?;
            continue;
        }
        match unlinkat(directory, &name, AtFlags::REMOVEDIR) {
            Ok(()) => continue,
            Err(Errno::NOTDIR) => {
                unlinkat(directory, &name, AtFlags::empty())?;
                continue;
            }
            Err(Errno::NOTEMPTY | Errno::EXIST | Errno::ACCESS) => {}
            Err(errno) => return Err(errno),
        }
        let child = open_directory(directory, &name)?;
        if depth >= DEPTH_MAX {
            move_up(root, directory, &name, number)?;
            moved = true;
            continue;
        }
        moved |= empty(root, child.as_fd(), depth + 1, number)?;
        unlinkat(directory, &name, AtFlags::REMOVEDIR)?;
    }
    Ok(moved)
}

fn move_up(root: BorrowedFd<'_>, directory: BorrowedFd<'_>, name: &CStr, number: &mut u64) -> Result<()> {
    loop {
        *number += 1;
        let target = format!(".rootlet-remove-{number}");
        match renameat_with(directory, name, root, target, RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    fn scratch(name: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("rootlet-tree-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn nothing_there_is_no_error() {
        remove_tree(Path::new("/nonexistent-rootlet/x")).unwrap();
    }

    #[test]
    fn links_are_removed_and_not_followed() {
        let base = scratch("links");
        let canary = base.join("canary");
        fs::create_dir(&canary).unwrap();
        fs::write(canary.join("file"), "alive").unwrap();
        let tree = base.join("tree");
        fs::create_dir(&tree).unwrap();
        symlink(&canary, tree.join("link")).unwrap();
        symlink("/nowhere", tree.join("dangling")).unwrap();
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
        symlink(&canary, &tree).unwrap();
        remove_tree(&tree).unwrap();
        assert_eq!(fs::read_to_string(canary.join("file")).unwrap(), "alive");
        remove_tree(&base).unwrap();
    }

    #[test]
    fn directories_without_permissions_go_too() {
        let base = scratch("modes");
        let inner = base.join("a/b");
        fs::create_dir_all(&inner).unwrap();
        fs::write(inner.join("file"), "").unwrap();
        for path in [&inner, &base.join("a")] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o000)).unwrap();
        }
        remove_tree(&base).unwrap();
        assert!(!base.exists());
    }

    #[test]
    fn depth_costs_neither_descriptors_nor_stack() {
        let base = scratch("deep");
        let mut at = openat(CWD, &base, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&at, "d", Mode::RWXU).unwrap();
            at = openat(&at, "d", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        }
        drop(at);
        remove_tree(&base).unwrap();
        assert!(!base.exists());
    }
}
