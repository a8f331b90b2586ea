//! A unix socket that the caller, and root, may talk to while something runs.
//!
//! The file is the caller's alone from its first moment on, and goes with the [`LocalListener`]. Who connects must be the
//! caller or root: a directory that others may enter, or a socket that was handed on, says nothing about that.
//!
//! Waiting for connections costs no more than they do: [`MAX_ACCEPTED`] are taken at once, so that who connects without end
//! does not keep the waiting thread from its other work; and if there is no descriptor for one, which poll(2) would tell of
//! again and again, the listener rests for [`REST`].

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen, socket, sockopt,
};
use nix::sys::stat::{Mode, fchmod};

/// Connections taken at once.
const MAX_ACCEPTED: usize = 16;
/// How long a listener that cannot accept is left alone.
const REST: Duration = Duration::from_secs(1);

/// A socket that listens.
#[derive(Debug)]
pub(crate) struct LocalListener {
    listener: UnixListener,
    file: Option<SocketFile>,
    rests_until: Option<Instant>,
}

impl LocalListener {
    /// Listens at `path`. What a server that is gone has left there is replaced.
    ///
    /// # Errors
    ///
    /// As bind(2): EADDRINUSE if there is anything else, a link included; EINVAL if the file system cannot exchange files.
    pub(crate) fn bind(path: &Path) -> io::Result<Self> {
        let (listener, id) = match listen_at(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => replace(path)?,
            other => (other?, identity(path)),
        };
        // The working directory may be another one when the file goes.
        let file = std::path::absolute(path).ok().and_then(|path| Some(SocketFile { path, id: id? }));
        Ok(Self { listener, file, rests_until: None })
    }

    /// The file, which then goes with what is returned: for who hands the listener to a thread that he does not wait for.
    pub(crate) fn take_file(&mut self) -> Option<SocketFile> {
        self.file.take()
    }

    /// What to wait for; nothing while the listener rests.
    pub(crate) fn event(&self) -> Option<BorrowedFd<'_>> {
        self.rests_until.is_none().then(|| self.listener.as_fd())
    }

    /// For how long to wait at most; `None`: for ever.
    pub(crate) fn patience(&self) -> Option<Duration> {
        // poll(2) counts whole milliseconds.
        let grain = Duration::from_millis(1);
        self.rests_until.map(|until| until.saturating_duration_since(Instant::now()) + grain)
    }

    /// Who has connected, non-blocking. If there are more, [`event`](Self::event) tells of them again.
    pub(crate) fn accept(&mut self) -> Vec<UnixStream> {
        let mut accepted = Vec::new();
        if self.rests_until.is_some_and(|until| Instant::now() < until) {
            return accepted;
        }
        self.rests_until = None;
        for _ in 0..MAX_ACCEPTED {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    if is_caller(&stream) && stream.set_nonblocking(true).is_ok() {
                        accepted.push(stream);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error)
                    if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
                // No descriptor, or no memory: no better at once.
                Err(error) => {
                    tracing::debug!(%error, "a unix socket cannot accept");
                    self.rests_until = Some(Instant::now() + REST);
                    break;
                }
            }
        }
        accepted
    }
}

/// The name of a socket, and which file it was.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    id: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Not what somebody else has put there since.
        if identity(&self.path) == Some(self.id) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Listens in place of a socket of the caller's that nobody listens at any more.
fn replace(path: &Path) -> io::Result<(UnixListener, Option<(u64, u64)>)> {
    listen_in_place_of(dead_socket(path).ok_or(Errno::EADDRINUSE)?, path, exchange)
}

fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    Ok(renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)?)
}

/// Listens in place of the socket `left`. Another one may have taken its place meanwhile: the two sockets change places, and
/// if the one that comes out is not the one that was looked at, they change back.
fn listen_in_place_of(
    left: (u64, u64),
    path: &Path,
    mut exchange: impl FnMut(&Path, &Path) -> io::Result<()>,
) -> io::Result<(UnixListener, Option<(u64, u64)>)> {
    // Relative to the open directory, so that a path of the greatest length has room for the other name.
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let dir = std::fs::File::open(dir)?;
    let mut beside = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    beside.push(format!(".{:016x}", RandomState::new().build_hasher().finish()));
    let listener = listen_at(&beside)?;
    let id = identity(&beside);
    let replaced = exchange(&beside, path).and_then(|()| {
        if identity(&beside) == Some(left) {
            return Ok(());
        }
        exchange(&beside, path)?;
        Err(Errno::EADDRINUSE.into())
    });
    let there = identity(&beside);
    // If they could not change back, it is another server's.
    let removed = if there == id || there == Some(left) { std::fs::remove_file(&beside) } else { Ok(()) };
    replaced.and(removed).map(|()| (listener, id))
}

/// A socket of the caller's at which nobody listens. (What is no socket refuses a connection, too.)
fn dead_socket(path: &Path) -> Option<(u64, u64)> {
    let there = std::fs::symlink_metadata(path).ok()?;
    let is_own = there.file_type().is_socket() && there.uid() == nix::unistd::geteuid().as_raw();
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let probe = socket(AddressFamily::Unix, SockType::Stream, flags, None).ok()?;
    // One that listens may have no room for another connection: EAGAIN.
    let is_dead = connect(probe.as_raw_fd(), &UnixAddr::new(path).ok()?) == Err(Errno::ECONNREFUSED);
    (is_own && is_dead).then_some((there.dev(), there.ino()))
}

fn listen_at(path: &Path) -> io::Result<UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    // The file gets the socket's mode; changed afterwards, others could connect before.
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&fd, Backlog::MAXCONN)?;
    Ok(fd.into())
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

/// Whether the other end is the caller's, or root's.
fn is_caller(stream: &UnixStream) -> bool {
    getsockopt(stream, sockopt::PeerCredentials)
        .is_ok_and(|peer| peer.uid() == 0 || peer.uid() == nix::unistd::geteuid().as_raw())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Self {
            Self(std::env::temp_dir().join(format!("rootlet-socket-{}-{name}", std::process::id())))
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    #[test]
    fn the_file_is_the_callers_and_goes_with_the_listener() {
        let place = Place::new("file");
        let path = &place.0;
        let listener = LocalListener::bind(path).unwrap();
        assert_eq!(std::fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(LocalListener::bind(path).unwrap_err().kind(), ErrorKind::AddrInUse);
        drop(listener);
        assert!(!path.exists());
        // One that was killed leaves it.
        drop(UnixListener::bind(path).unwrap());
        let listener = LocalListener::bind(path).unwrap();
        // Somebody else's is left alone.
        std::fs::remove_file(path).unwrap();
        std::fs::write(path, "theirs").unwrap();
        drop(listener);
        assert_eq!(std::fs::read_to_string(path).unwrap(), "theirs");
        assert_eq!(LocalListener::bind(path).unwrap_err().kind(), ErrorKind::AddrInUse);
    }

    #[test]
    fn connections_are_taken_some_at_a_time() {
        let place = Place::new("many");
        let path = &place.0;
        let mut listener = LocalListener::bind(path).unwrap();
        let clients: Vec<_> = (0..=MAX_ACCEPTED).map(|_| UnixStream::connect(path).unwrap()).collect();
        assert_eq!(listener.accept().len(), MAX_ACCEPTED);
        assert_eq!(listener.accept().len(), 1);
        assert!(listener.accept().is_empty() && listener.event().is_some() && listener.patience().is_none());
        drop(clients);
    }

    #[test]
    fn of_two_that_find_the_same_dead_socket_one_gets_its_place() {
        let dir = Place::new("race").0.clone();
        std::fs::create_dir(&dir).unwrap();
        let path = &dir.join("socket");
        drop(UnixListener::bind(path).unwrap());
        let left = dead_socket(path).unwrap();
        let mut first = LocalListener::bind(path).unwrap();
        assert_eq!(dead_socket(path), None);
        let second = listen_in_place_of(left, path, exchange).unwrap_err();
        assert_eq!(second.raw_os_error(), Some(Errno::EADDRINUSE as i32));
        // To ask whether anybody listens is to connect.
        assert_eq!(first.accept().len(), 1);
        let client = UnixStream::connect(path).unwrap();
        assert_eq!(first.accept().len(), 1);
        drop((client, first));
        // Empty: nothing is left beside.
        std::fs::remove_dir(&dir).unwrap();
    }

    #[test]
    fn what_cannot_be_exchanged_is_left_as_it_is() {
        let dir = Place::new("exchange").0.clone();
        std::fs::create_dir(&dir).unwrap();
        let path = &dir.join("socket");
        drop(UnixListener::bind(path).unwrap());
        let left = dead_socket(path).unwrap();
        let count = || std::fs::read_dir(&dir).unwrap().count();
        // As on a file system that does not know it. It is not said that somebody is there.
        let none = listen_in_place_of(left, path, |_, _| Err(Errno::EINVAL.into())).unwrap_err();
        assert_eq!((none.raw_os_error(), count()), (Some(Errno::EINVAL as i32), 1));
        // Another server's is taken out by mistake, and cannot be put back: it stays.
        let theirs = UnixListener::bind(dir.join("theirs")).unwrap();
        std::fs::rename(dir.join("theirs"), path).unwrap();
        let theirs_id = identity(path);
        let mut times = 0;
        let failed = listen_in_place_of(left, path, |a, b| {
            times += 1;
            if times == 1 { exchange(a, b) } else { Err(Errno::ENOENT.into()) }
        });
        assert_eq!(failed.unwrap_err().raw_os_error(), Some(Errno::ENOENT as i32));
        let ids = std::fs::read_dir(&dir).unwrap().map(|entry| identity(&entry.unwrap().path()));
        assert!(ids.into_iter().any(|id| id == theirs_id));
        drop(theirs);
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_listener_that_cannot_accept_rests() {
        // Not one that listens: accept(2) fails, and would do so again.
        let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let mut listener = LocalListener { listener: fd.into(), file: None, rests_until: None };
        assert!(listener.event().is_some() && listener.accept().is_empty());
        assert!(listener.event().is_none());
        assert!(listener.patience().is_some_and(|patience| !patience.is_zero()));
        // It is not tried before, whoever asks, and then is again.
        let until = listener.rests_until;
        assert!(listener.accept().is_empty() && listener.rests_until == until);
        listener.rests_until = Some(Instant::now());
        assert!(listener.accept().is_empty() && listener.rests_until > until);
    }
}
