//! Hand-shake between the supervisor and the setup process, which later is init.
//!
//! ```text
//! supervisor -> setup      : MapsWritten         unless setup maps its own id; now setup may setresuid
//! setup      -> supervisor : Proc + fd           the sandbox's procfs, before what needs it
//! setup      -> supervisor : Fuse + fd           mounted; the kernel's INIT waits on it
//! setup      -> supervisor : Tap + fd            only with the stack
//! setup      -> supervisor : Terminal + fd       only with a terminal of its own
//! setup      -> supervisor : Failed              at any time: the launch is over
//! init       -> supervisor : Started             the payload is about to be executed, or was
//! init       -> supervisor : ExecFailed          the command cannot be executed: the run is over
//! supervisor -> init       : Signal              send it to the payload
//! init       -> supervisor : Exited              the payload has ended; init ends next
//! ```
//! Both ends are in this module and speak whole messages over a `SOCK_SEQPACKET` pair. The
//! messages from setup come from our own code, but setup serves the payload: whatever does
//! not parse ends the run.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::report::Outcome;
use crate::sys::fdpass;

/// Longest message in bytes: an object is at most a path.
const MESSAGE_MAX: usize = 16 * 1024;

/// Longest object of a failure in characters.
const OBJECT_MAX: usize = 2048;

/// What the setup process, later init, says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromSetup {
    /// The root of the sandbox's procfs comes with this message.
    Proc,
    /// The descriptor of the mounted overlay comes with this message.
    Fuse,
    /// The TAP comes with this message.
    Tap,
    /// The payload's terminal (the master side) comes with this message.
    Terminal,
    /// The sandbox is complete and the payload's process exists.
    Started,
    /// A step failed; nothing untrusted has run.
    Failed(SetupFailure),
    /// The command could not be executed.
    ExecFailed(SetupFailure),
    /// The payload ended.
    Exited(Outcome),
}

/// What the supervisor says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToSetup {
    /// uid_map and gid_map are written.
    MapsWritten,
    /// Send this signal to the payload.
    Signal(i32),
}

/// A step that failed in another process, as data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{}", self.step.attempt(&self.object))]
pub struct SetupFailure {
    /// The step.
    pub step: Step,
    /// What it was about: a path, a name, an id.
    pub object: String,
    /// What the kernel said (errno(3)); 0 when it was not the kernel.
    pub errno: i32,
}

impl SetupFailure {
    /// Makes one from an errno of nix or rustix.
    pub fn new(step: Step, object: impl Into<String>, errno: impl Into<ErrnoLike>) -> Self {
        let mut object: String = object.into();
        // A longer one would not fit into a message; escaped, a character may take six bytes.
        if let Some((end, _)) = object.char_indices().nth(OBJECT_MAX) {
            object.truncate(end);
            object.push('…');
        }
        Self { step, object, errno: errno.into().0 }
    }

    /// The errno by its name.
    #[must_use]
    pub fn cause(&self) -> Errno {
        Errno::from_raw(self.errno)
    }
}

/// An errno of nix, of rustix or of std.
#[derive(Debug, Clone, Copy)]
pub struct ErrnoLike(i32);

impl From<Errno> for ErrnoLike {
    fn from(errno: Errno) -> Self {
        Self(errno as i32)
    }
}

impl From<rustix::io::Errno> for ErrnoLike {
    fn from(errno: rustix::io::Errno) -> Self {
        Self(errno.raw_os_error())
    }
}

impl From<std::io::Error> for ErrnoLike {
    fn from(error: std::io::Error) -> Self {
        Self(error.raw_os_error().unwrap_or(0))
    }
}

macro_rules! steps {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $attempt:literal;)*) => {
        /// The steps of setup, init and payload that can fail.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum Step { $($(#[$doc])* $variant,)* }

        impl Step {
            /// The step's stable name, by which hints are found.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// What was attempted, on which object, for people.
            #[must_use]
            pub fn attempt(self, object: &str) -> String {
                match self { $(Self::$variant => $attempt.replace("{}", &crate::log::escape(object)),)* }
            }
        }
    };
}

steps! {
    /// clone3(2) of the user and pid namespace.
    Clone = "clone", "cannot create the sandbox's namespaces";
    /// unshare(2) of the others.
    Unshare = "unshare", "cannot create the sandbox's namespaces in its user namespace";
    /// Writing /proc/self/setgroups, uid_map or gid_map.
    WriteMaps = "uid_map", "cannot write {}";
    /// newuidmap(1) or newgidmap(1).
    MapHelper = "map_helper", "{} failed";
    /// setresuid(2) and relatives in setup.
    Become = "become", "cannot become {}";
    /// Closing what was inherited.
    Inherit = "inherit", "cannot close inherited descriptors";
    /// A read-only view of our own program.
    OwnProgram = "own_program", "cannot make a read-only view of {}";
    /// open(2) of /dev/fuse.
    FuseOpen = "fuse_open", "cannot open {}";
    /// The mount of the overlay.
    FuseMount = "fuse_mount", "cannot mount the overlay";
    /// open(2) of /dev/net/tun and making the TAP.
    TapOpen = "tap_open", "cannot make the network device {}";
    /// Addresses, routes, links.
    Network = "network", "cannot set up the network: {}";
    /// sethostname(2), setdomainname(2).
    Hostname = "hostname", "cannot set {}";
    /// unshare(CLONE_NEWTIME) and timens_offsets.
    Time = "time", "cannot set up the time namespace: {}";
    /// A mount on the root.
    Mount = "mount", "cannot mount {}";
    /// The source of a volume.
    VolumeSource = "volume_source", "cannot open the volume's source {}";
    /// The place of a mount inside.
    MountPoint = "mount_point", "cannot use {} inside the sandbox as a mount point";
    /// pivot_root(2) and letting go of the old root.
    PivotRoot = "pivot_root", "cannot change the root: {}";
    /// The payload's terminal.
    Terminal = "terminal", "cannot make the sandbox's terminal: {}";
    /// Looking up `--user`.
    User = "user", "no such user inside the sandbox: {}";
    /// `--workdir`.
    Workdir = "workdir", "cannot use {} as the working directory inside the sandbox";
    /// Capabilities, no_new_privs, Landlock, the filter.
    Confine = "confine", "cannot confine the payload: {}";
    /// fork(2) and pipes of init.
    Spawn = "spawn", "cannot start the payload: {}";
    /// execve(2) of the command.
    Exec = "exec", "cannot execute {}";
    /// A message that did not arrive or did not parse.
    Handshake = "handshake", "the sandbox's setup process ended early: {}";
}

/// A message with the descriptor that came with it; `None` when the other side is gone.
type Received<M> = Result<Option<(M, Option<OwnedFd>)>, rustix::io::Errno>;

/// One end of the hand-shake.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl From<OwnedFd> for Channel {
    fn from(socket: OwnedFd) -> Self {
        Self(socket)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Channel {
    /// Makes both ends: the supervisor's and setup's.
    ///
    /// # Errors
    /// As socketpair(2).
    pub fn pair() -> Result<(Self, Self), rustix::io::Errno> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self(ours), Self(theirs)))
    }

    /// Sends a message.
    ///
    /// # Errors
    /// `EPIPE` when the other side is gone.
    pub fn send<M: Serialize>(
        &self,
        message: &M,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), rustix::io::Errno> {
        let bytes = serde_json::to_vec(message).map_err(|_| rustix::io::Errno::INVAL)?;
        fdpass::send(self.as_fd(), &bytes, fd)
    }

    /// Receives a message; `None` when the other side is gone.
    ///
    /// # Errors
    /// `EBADMSG` for what does not parse; as recvmsg(2).
    pub fn receive<M: DeserializeOwned>(&self) -> Received<M> {
        let Some((bytes, fd)) = self.receive_bytes()? else { return Ok(None) };
        let message = serde_json::from_slice(&bytes).map_err(|_| rustix::io::Errno::BADMSG)?;
        Ok(Some((message, fd)))
    }

    /// Receives a message as it was sent; `None` when the other side is gone.
    ///
    /// # Errors
    /// As recvmsg(2).
    pub fn receive_bytes(&self) -> Received<Vec<u8>> {
        let mut buffer = vec![0; MESSAGE_MAX];
        let (length, fd) = match fdpass::receive(self.as_fd(), &mut buffer) {
            // The other side ended with a message of ours unread. That is said once, and before what it
            // sent: its last words are still there.
            Err(rustix::io::Errno::CONNRESET) => fdpass::receive(self.as_fd(), &mut buffer)?,
            other => other?,
        };
        if length == 0 {
            return Ok(None);
        }
        buffer.truncate(length);
        Ok(Some((buffer, fd)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_arrives_with_its_descriptor() {
        let (ours, theirs) = Channel::pair().expect("socketpair");
        let file = std::fs::File::open("/dev/null").expect("/dev/null");
        theirs.send(&FromSetup::Fuse, Some(file.as_fd())).expect("send");
        let (message, fd) = ours.receive::<FromSetup>().expect("receive").expect("a message");
        assert_eq!(message, FromSetup::Fuse);
        assert!(fd.is_some());
    }

    #[test]
    fn the_end_of_the_other_side_is_noticed() {
        let (ours, theirs) = Channel::pair().expect("socketpair");
        drop(theirs);
        assert_eq!(ours.receive::<FromSetup>().expect("receive").map(|(m, _)| m), None);
        assert_eq!(ours.send(&ToSetup::MapsWritten, None), Err(rustix::io::Errno::PIPE));
    }

    #[test]
    fn last_words_are_heard_though_ours_were_not() {
        let (ours, theirs) = Channel::pair().expect("socketpair");
        ours.send(&ToSetup::MapsWritten, None).expect("send");
        theirs.send(&FromSetup::Started, None).expect("send");
        drop(theirs);
        assert_eq!(ours.receive().expect("receive").map(|(m, _)| m), Some(FromSetup::Started));
        assert_eq!(ours.receive::<FromSetup>().expect("receive").map(|(m, _)| m), None);
    }

    #[test]
    fn what_does_not_parse_is_refused() {
        let (ours, theirs) = Channel::pair().expect("socketpair");
        fdpass::send(theirs.as_fd(), b"{\"Fuse\":", None).expect("send");
        assert_eq!(ours.receive::<FromSetup>().err(), Some(rustix::io::Errno::BADMSG));
    }
}
