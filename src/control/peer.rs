//! Who may command: processes of the caller's, and of root's ([`crate::local_socket`] sends all others away), that are in our
//! own user namespace.
//!
//! The payload has the caller's ids, seen from here, so ids alone do not tell it from the caller. Every sandbox has a user
//! namespace of its own, which no process of it can leave for ours (setns(2) needs a capability there).
//!
//! Whose namespace it is, is read from /proc by the peer's number, which the kernel kept when it connected. A pidfd
//! of the peer (SO_PEERPIDFD, Linux 6.5) that is still alive afterwards says that the number was not another's meanwhile;
//! who has ended, or cannot be looked at, is nobody. Before 6.5 the pidfd is made from the number: who connects, ends, and
//! has its number taken over by a process of the caller's, all before we accept, passes for that one.
//!
//! An ordinary user may not look at root's processes so. What anybody may read is how ids are mapped where they are. The
//! initial user namespace alone has all user, group and project ids, if root does not give all of them to another one, as
//! to a container. Such a container has mounts of its own, and which is at a process's root anybody may read, too. So where
//! the initial namespace is ours, whoever has these maps and our root mount, and is root, is obeyed. (What is left is who
//! root let keep root's ids and the host's own files: that one commands root's files anyway.) In other namespaces maps prove
//! nothing, and of network namespaces nothing can be read: there such processes are sent away.

use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};

/// Why a peer may not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Stranger {
    #[error("a process of another {0} namespace has connected, such as that of the sandbox")]
    OtherNamespace(&'static str),
    /// In a mount namespace of its own, or in a chroot: which of them it is cannot be read.
    #[error("a process of root's has connected that has another root directory, such as that of a container")]
    OtherRoot,
    #[error("a process has connected that has ended, or cannot be looked at")]
    Unknown,
}

/// By what a process of the sandbox is told from one of the caller's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Apart {
    /// The sandbox has a user namespace of its own.
    User,
    /// It may share ours, as that of a program which its own caller has put into a user namespace. But it has the network
    /// namespace that we serve, which is not ours.
    UserOrNetwork,
}

impl Apart {
    fn namespaces(self) -> &'static [&'static str] {
        match self {
            Self::User => &["user"],
            Self::UserOrNetwork => &["user", "net"],
        }
    }
}

/// Namespaces, by their names in /proc/PID/ns and their inodes on nsfs.
type Namespaces = Vec<(&'static str, u64, u64)>;

/// Those who may.
#[derive(Debug, Clone)]
pub(super) struct Peers {
    uid: u32,
    apart: Apart,
    namespaces: Namespaces,
}

impl Peers {
    /// Processes like this one.
    ///
    /// # Errors
    ///
    /// When /proc does not tell in which namespaces this process is.
    pub(super) fn like_us(apart: Apart) -> std::io::Result<Self> {
        let namespaces = namespaces_of("self", apart)?;
        Ok(Self { uid: rustix::process::geteuid().as_raw(), apart, namespaces })
    }

    /// Whether the other end of `stream` was one of them when it connected.
    pub(super) fn check(&self, stream: &UnixStream) -> Result<(), Stranger> {
        let peer = getsockopt(stream, sockopt::PeerCredentials).map_err(|_| Stranger::Unknown)?;
        // 0 is who is not in our pid namespace.
        let pid = rustix::process::Pid::from_raw(peer.pid()).ok_or(Stranger::Unknown)?;
        let pidfd = pidfd_of(stream, pid).ok_or(Stranger::Unknown)?;
        let process = peer.pid().to_string();
        let judged = match namespaces_of(&process, self.apart) {
            Ok(found) => match found.iter().zip(&self.namespaces).find(|(theirs, ours)| theirs != ours) {
                Some((&(name, ..), _)) => Err(Stranger::OtherNamespace(name)),
                None => Ok(()),
            },
            Err(error) if is_denied(&error) && peer.uid() == 0 && self.uid != 0 => self.judge_root(&process),
            Err(_) => Err(Stranger::Unknown),
        };
        if is_alive(&pidfd) { judged } else { Err(Stranger::Unknown) }
    }

    /// Whether a process of root's, in whose namespaces we may not look, is in ours.
    fn judge_root(&self, process: &str) -> Result<(), Stranger> {
        let user_namespace = self.namespaces.iter().any(|&(name, _, inode)| (name, inode) == INITIAL);
        if self.apart != Apart::User || !user_namespace {
            return Err(Stranger::Unknown);
        }
        let told = |found: std::io::Result<bool>, stranger| match found {
            Ok(true) => Ok(()),
            Ok(false) => Err(stranger),
            Err(_) => Err(Stranger::Unknown),
        };
        told(maps_all(process), Stranger::OtherNamespace("user"))?;
        let ours = root_mounts("self").ok().filter(|ours| !ours.is_empty()).ok_or(Stranger::Unknown)?;
        told(root_mounts(process).map(|theirs| theirs == ours), Stranger::OtherRoot)
    }
}

/// The initial user namespace: it has this inode on every machine (`USER_NS_INIT_INO` in linux/nsfs.h).
const INITIAL: (&str, u64) = ("user", 0xEFFF_FFFD);

/// Whether this process is in the initial user namespace. Not if /proc does not tell.
pub(super) fn in_initial_user_namespace() -> bool {
    std::fs::metadata("/proc/self/ns/user").is_ok_and(|file| file.ino() == INITIAL.1)
}

/// Whether a process is in a user namespace that has all ids, each of them under its own number.
fn maps_all(process: &str) -> std::io::Result<bool> {
    for map in ["uid_map", "gid_map", "projid_map"] {
        let map = std::fs::read_to_string(format!("/proc/{process}/{map}"))?;
        if !map.split_whitespace().eq(["0", "0", "4294967295"]) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The numbers of the mounts at the root of a process: no two mounts have the same, in whatever namespace they are.
fn root_mounts(process: &str) -> std::io::Result<Vec<String>> {
    let mounts = std::fs::read(format!("/proc/{process}/mountinfo"))?;
    let number = |line: &[u8]| {
        let mut fields = line.split(|byte| *byte == b' ');
        let number = fields.next()?;
        // Behind the parent's number, the device and the directory of the file system (proc_pid_mountinfo(5)).
        (fields.nth(3)? == b"/").then(|| String::from_utf8_lossy(number).into_owned())
    };
    Ok(mounts.split(|byte| *byte == b'\n').filter_map(number).collect())
}

fn is_denied(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::EACCES | Errno::EPERM))
}

fn pidfd_of(stream: &UnixStream, pid: rustix::process::Pid) -> Option<OwnedFd> {
    match getsockopt(stream, sockopt::PeerPidfd) {
        Ok(pidfd) => Some(pidfd),
        Err(Errno::ENOPROTOOPT) => {
            rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()
        }
        // It was reaped already; or there is no descriptor.
        Err(_) => None,
    }
}

/// A pidfd becomes readable when its process ends.
fn is_alive(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ended| ended == 0)
}

fn namespaces_of(process: &str, apart: Apart) -> std::io::Result<Namespaces> {
    let look = |&name: &&'static str| {
        let file = std::fs::metadata(format!("/proc/{process}/ns/{name}"))?;
        Ok((name, file.dev(), file.ino()))
    };
    apart.namespaces().iter().map(look).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// A stream whose other end this process has made.
    fn connected() -> (UnixStream, UnixStream) {
        let path = std::env::temp_dir().join(format!("rootlet-peer-{}", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        let ours = UnixStream::connect(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        (listener.accept().unwrap().0, ours)
    }

    #[test]
    fn a_process_has_a_mount_at_its_root() {
        let ours = root_mounts("self").unwrap();
        assert!(ours.iter().all(|number| number.parse::<u64>().is_ok()) && !ours.is_empty(), "{ours:?}");
        assert!(root_mounts("0").is_err());
    }

    #[test]
    fn only_the_same_namespaces_may() {
        let (stream, _other) = connected();
        for apart in [Apart::User, Apart::UserOrNetwork] {
            let like_us = Peers::like_us(apart).unwrap();
            assert_eq!(like_us.check(&stream), Ok(()));
            for at in 0..like_us.namespaces.len() {
                let mut others = like_us.clone();
                others.namespaces[at].2 += 1;
                assert_eq!(others.check(&stream), Err(Stranger::OtherNamespace(others.namespaces[at].0)));
            }
        }
    }
}
