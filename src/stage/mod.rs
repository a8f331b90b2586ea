//! The processes inside: setup, which becomes init, and the payload.
//!
//! What each holds besides standard input, output and error:
//!
//! | process | descriptors | privilege |
//! |---|---|---|
//! | setup | channel to the supervisor, socket maker, mounts under construction | every capability in the sandbox's user namespace |
//! | init | channel, socket maker, signalfd, listener of the filter | the same; not dumpable, so the payload cannot trace or read it |
//! | payload before execve | channel to init, socket maker (both closed by execve) | gives up step by step, see `payload.rs` |
//! | payload | none | the capabilities of the plan, no_new_privs, the filter |

mod command;
mod init;
mod notify;
mod payload;
mod setup;
mod users;

use crate::launch::handshake::{Channel, FromSetup};
use crate::plan::Plan;
use crate::sys::process::exit_now;

pub(crate) use setup::write_maps;

/// What setup takes over from the supervisor besides the plan.
#[derive(Debug)]
pub struct Inherited {
    /// Its end of the hand-shake.
    pub channel: Channel,
    /// Over which the network stack asks for sockets of the sandbox's namespace.
    pub maker: Option<netstack::SocketMaker>,
    /// The soft limits that the payload gets back.
    pub limits: Vec<crate::launch::SoftLimit>,
    /// What takes the place of standard input, output and error.
    pub streams: crate::supervise::streams::Inside,
}

/// Runs as the first process of the new namespaces, from the clone to its end.
///
/// Never returns into the supervisor's code, not even by a panic.
pub fn enter(plan: &Plan, inherited: &Inherited) -> ! {
    let run = std::panic::AssertUnwindSafe(|| match setup::run(plan, inherited) {
        Ok(ready) => init::run(plan, inherited, &ready),
        Err(failure) => {
            // If the supervisor is gone there is nobody left to tell.
            inherited.channel.send(&FromSetup::Failed(failure), None).ok();
        }
    });
    drop(std::panic::catch_unwind(run));
    exit_now(1)
}
