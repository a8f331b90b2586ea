//! Sockets of the target's network namespace, to which connections from the host's loopback are joined.
//!
//! The child that has made the interface stays in the target's namespaces and makes them when the stack asks
//! ([`netstack::SocketMaker`]), where ports can be published and no capture is to have every packet.
//!
//! Why a process: a socket belongs to the network namespace of the thread that makes it, and to join one takes
//! CAP_SYS_ADMIN in the user namespace that owns it and in one's own. The program has none in its own, as a rule. The
//! child has, because it has joined the former, and cannot come back.
//!
//! It keeps nothing alive: a TAP belongs to its network namespace as a socket does, so the namespace lasts as long as the
//! program has it in any case. The child ends with the program: its only descriptor then hangs up, and the kernel kills
//! it, which counts if somebody has stopped it. If it ends before, connections cross the interface.
//!
//! What it gives up before it answers the first question: every descriptor but its end of the socket pair, standard
//! streams included; every capability, and what could give one back; with `--enable-sandbox` the host's files; every
//! system call but the few that it makes. It is not dumpable: the target's root may not trace
//! it, unless the program itself was called in the target's user namespace; it may kill and stop it.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::fd::AsFd as _;

use netstack::{InsideSockets, SocketMaker};

use super::confine;
use crate::cli::output::Failure;
use crate::sys::process;

/// The child, for the program: ended and waited for when this is dropped, so that nobody finds a process that is left.
#[derive(Debug)]
pub(super) struct Maker(pub(super) Pid);

impl Drop for Maker {
    fn drop(&mut self) {
        // It may have been stopped, and would not see that its descriptor has hung up.
        kill(self.0, Signal::SIGKILL).ok();
        while nix::sys::wait::waitpid(self.0, None) == Err(Errno::EINTR) {}
    }
}

/// What the program has of it.
#[derive(Debug)]
pub(super) struct Inside {
    pub(super) sockets: InsideSockets,
    pub(super) maker: Maker,
}

/// In the child, which has given up what it does not need: makes sockets until the stack is gone.
pub(super) fn make_sockets(maker: &SocketMaker) {
    loop {
        let mut fds = [PollFd::new(maker.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => {}
            Ok(_) if maker.answer() => {}
            _ => return,
        }
    }
}

/// In the child. What is open but the standard streams must be its end of the socket pair, and what it will close itself.
pub(super) fn give_up(sandbox: bool) -> Result<(), Failure> {
    let failed = confine::failed;
    // As ps(1) shows it: the command line is the program's.
    nix::sys::prctl::set_name(c"netstack-inside").map_err(failed("name"))?;
    if sandbox {
        confine::leave_files(&[])?;
    }
    confine::drop_capabilities(rustix::thread::CapabilitySet::empty())?;
    // After the last change of credentials, which would clear the first and set the second.
    nix::sys::prctl::set_pdeathsig(Some(Signal::SIGKILL)).map_err(failed("parent-death signal"))?;
    nix::sys::prctl::set_dumpable(false).map_err(failed("debuggers"))?;
    confine::allow_only_sockets()?;
    // Nothing is written there any more. Whoever waits for the end of a standard stream waits for the program alone.
    process::close_standard_streams();
    Ok(())
}
