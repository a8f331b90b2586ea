//! Whether others can put something else at a path.
//!
//! Who may write to a directory may move what is in it, so it is not enough to look at the last one. Every directory in which
//! a part of the path is looked up must be the caller's or root's and nobody else's to write to, as sshd wants it of
//! authorized_keys. In one with the sticky bit only the owner of a file, and its own, may move it; there the file must
//! be the caller's or root's. What a link on the way leads to is walked alike.
//!
//! In a user namespace of its own, such as Podman's, root's directories (`/`, `/home`) belong to the overflow uid, as do those
//! of all who have no id there. They cannot be told apart and are taken for root's, but for the last one. Links in a directory
//! with the sticky bit are not.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;

/// As path_resolution(7).
const MAX_LINKS: u32 = 40;

/// Why others can put something else there.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unsafe {
    #[error("{} cannot be looked at", .0.display())]
    Unknown(PathBuf, #[source] io::Error),
    #[error("{} belongs to another user", .0.display())]
    Theirs(PathBuf),
    #[error("{} is open to other users", .0.display())]
    Open(PathBuf),
}

/// Those who may change the way.
#[derive(Debug, Clone, Copy)]
struct Trusted {
    own: u32,
    /// Who owns what belongs to nobody of our user namespace, unless it is the initial one.
    overflow: Option<u32>,
}

impl Trusted {
    fn has(self, uid: u32) -> bool {
        uid == self.own || uid == 0
    }
}

/// Checks the way to `dir`, an absolute path of a directory.
pub(super) fn check(dir: &Path) -> Result<(), Unsafe> {
    let own = rustix::process::geteuid().as_raw();
    let overflow = (!super::peer::in_initial_user_namespace()).then(|| {
        let uid = std::fs::read_to_string("/proc/sys/kernel/overflowuid").unwrap_or_default();
        uid.trim().parse().unwrap_or(65_534)
    });
    walk(dir, Trusted { own, overflow })
}

fn walk(dir: &Path, trusted: Trusted) -> Result<(), Unsafe> {
    let mut at = PathBuf::from("/");
    let mut left: VecDeque<OsString> = parts(dir).collect();
    let mut links = 0;
    loop {
        let sticky = check_directory(&at, trusted, left.is_empty())?;
        let Some(part) = left.pop_front() else { return Ok(()) };
        if part == ".." {
            // No link is in it, so that is where the kernel goes.
            at.pop();
            continue;
        }
        let next = at.join(part);
        let unknown = |error| Unsafe::Unknown(next.clone(), error);
        let found = std::fs::symlink_metadata(&next).map_err(unknown)?;
        if !found.is_symlink() {
            // Whose it is, is looked at next.
            at = next;
            continue;
        }
        if sticky && !trusted.has(found.uid()) {
            return Err(Unsafe::Theirs(next));
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(unknown(Errno::ELOOP.into()));
        }
        let to = std::fs::read_link(&next).map_err(unknown)?;
        if to.is_absolute() {
            at = PathBuf::from("/");
        }
        left = parts(&to).chain(left).collect();
    }
}

/// Whether only owners may move what is in it.
fn check_directory(dir: &Path, trusted: Trusted, is_last: bool) -> Result<bool, Unsafe> {
    let found = std::fs::symlink_metadata(dir).map_err(|error| Unsafe::Unknown(dir.to_owned(), error))?;
    if !found.is_dir() {
        return Err(Unsafe::Unknown(dir.to_owned(), Errno::ENOTDIR.into()));
    }
    let is_roots = !is_last && trusted.overflow == Some(found.uid());
    if !trusted.has(found.uid()) && !is_roots {
        return Err(Unsafe::Theirs(dir.to_owned()));
    }
    let open = found.mode() & 0o022 != 0;
    let sticky = found.mode() & 0o1000 != 0;
    if open && !sticky { Err(Unsafe::Open(dir.to_owned())) } else { Ok(open) }
}

/// What is to be walked, but for `/` and `.`.
fn parts(path: &Path) -> impl Iterator<Item = OsString> {
    path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("rootlet-place-{}-{name}", std::process::id()));
            let dirs = ["", "a", "a/b", "a/b/c", "open", "open/in"];
            for path in dirs {
                std::fs::create_dir_all(dir.join(path)).unwrap();
            }
            let dir = Self(dir.canonicalize().unwrap());
            // Whatever the umask is.
            dirs.iter().for_each(|path| dir.set(path, 0o755));
            dir
        }

        fn set(&self, path: &str, mode: u32) {
            std::fs::set_permissions(self.0.join(path), PermissionsExt::from_mode(mode)).unwrap();
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn open_at(dir: &Path) -> Option<PathBuf> {
        match check(dir) {
            Ok(()) => None,
            Err(Unsafe::Open(at)) => Some(at),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn every_directory_on_the_way_counts() {
        let dir = Dir::new("way");
        let path = dir.0.join("a/b/c");
        assert_eq!(open_at(&path), None);
        for open in ["a", "a/b", "a/b/c"] {
            for mode in [0o777, 0o775, 0o702] {
                dir.set(open, mode);
                assert_eq!(open_at(&path), Some(dir.0.join(open)));
            }
            dir.set(open, 0o1777);
            assert_eq!(open_at(&path), None);
            dir.set(open, 0o755);
        }
        assert!(matches!(check(&path.join("d")), Err(Unsafe::Unknown(..))));
        std::fs::write(path.join("file"), "").unwrap();
        assert!(matches!(check(&path.join("file")), Err(Unsafe::Unknown(..))));
    }

    #[test]
    fn links_are_walked_and_so_is_where_they_are() {
        let dir = Dir::new("links");
        let open = dir.0.join("open");
        symlink("../a/./b", dir.0.join("open/in/relative")).unwrap();
        symlink("../../a/b", dir.0.join("open/in/to")).unwrap();
        symlink(dir.0.join("open/in/to"), dir.0.join("absolute")).unwrap();
        assert_eq!(open_at(&dir.0.join("absolute/c")), None);
        assert!(matches!(check(&dir.0.join("open/in/relative/c")), Err(Unsafe::Unknown(..))));
        // The link is not in it, but on the way to the second.
        dir.set("open", 0o777);
        assert_eq!(open_at(&dir.0.join("absolute/c")), Some(open.clone()));
        assert_eq!(open_at(&dir.0.join("open/../a/b")), Some(open));
        assert_eq!(open_at(&dir.0.join("a/b/..")), None);
        symlink("self", dir.0.join("self")).unwrap();
        assert!(matches!(check(&dir.0.join("self")), Err(Unsafe::Unknown(..))));
    }

    #[test]
    fn what_is_anothers_is_refused() {
        let dir = Dir::new("owners");
        let path = dir.0.join("a/b/c");
        let own = rustix::process::geteuid().as_raw();
        let theirs = |trusted| match walk(&path, trusted) {
            Ok(()) => None,
            Err(Unsafe::Theirs(at)) => Some(at),
            Err(other) => panic!("{other}"),
        };
        assert_eq!(theirs(Trusted { own, overflow: None }), None);
        // As it is seen by somebody else; root's directories are nobody's to complain of.
        let other = Trusted { own: own + 1, overflow: None };
        let foreign = Trusted { own: own + 1, overflow: Some(own) };
        if own == 0 {
            assert_eq!(theirs(other), None);
            std::os::unix::fs::chown(dir.0.join("a"), Some(54_321), None).unwrap();
            assert_eq!(theirs(Trusted { own, overflow: None }), Some(dir.0.join("a")));
            assert_eq!(theirs(Trusted { own, overflow: Some(54_321) }), None);
            std::os::unix::fs::chown(&path, Some(54_321), None).unwrap();
            assert_eq!(theirs(Trusted { own, overflow: Some(54_321) }), Some(path.clone()));
            // A link that its owner may not replace, and then may.
            let link = dir.0.join("link");
            symlink("open", &link).unwrap();
            std::os::unix::fs::lchown(&link, Some(54_321), None).unwrap();
            assert!(check(&link).is_ok());
            dir.set("", 0o1777);
            let through = walk(&link, Trusted { own, overflow: Some(54_321) });
            assert!(matches!(through, Err(Unsafe::Theirs(at)) if at == link));
        } else {
            assert!(theirs(other).is_some());
            assert!(theirs(foreign).is_some());
        }
    }
}
