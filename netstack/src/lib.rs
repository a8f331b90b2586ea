//! A TCP/IP stack in a thread, which connects a TAP device to ordinary sockets of the host.
//!
//! The guest's kernel, at the other end of the TAP, believes that it talks to a router. There is none: TCP ends here
//! ([smoltcp] is the peer that the guest's kernel talks to), and every flow goes on as a plain socket of this process,
//! with the rights of whoever runs it. So no privilege is needed on the host, and nothing there is configured.
//!
//! ```text
//!  guest's kernel                         this thread                              host's kernel
//!  ──────────────   frames   ┌────────┐  packets  ┌─────────────────────┐  bytes   ─────────────
//!   eth ── TAP ──────────────│ device │───────────│ tcp: smoltcp + rings │──────── stream sockets
//!                            │ ingress│           │ udp: table of flows  │──────── datagram sockets
//!                            │ fragment           │ icmp: ping sockets   │──────── ping sockets
//!                            └────────┘           │ dns: forwarder, cache│──────── resolvers
//!                              engine ─ timers    │ forward: listeners   │──────── published ports
//!                                                 └─────────────────────┘
//!                              policy: a pure function asked before any flow's first packet leaves
//! ```
//!
//! Where to look: the order of things, `engine.rs`; what may be reached, `policy.rs`; how a connection lives and ends,
//! `tcp.rs`; why it is fast, `device.rs`; what a hostile frame meets first, `ingress.rs`; every limit with its number,
//! `config.rs`; every `unsafe` line, `sys.rs`.
//!
//! What it refuses to do: it never opens a path but /dev/net/tun (in [`open_tap`]) and /etc/resolv.conf, never runs a
//! program, never needs a capability (but for [`open_tap`], which is called inside), never wakes up without a reason, and
//! keeps no data but in the rings of TCP flows, answers of resolvers, and a capture that was asked for.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use netstack::{DnsSpec, Link, Outbound, PolicySpec, Published, Rates, Stack, StackSpec, open_tap};
//! // In the guest's network namespace; the descriptor may then be sent elsewhere.
//! let tap = open_tap("tap0")?;
//! let spec = StackSpec {
//!     mtu: 1500,
//!     guest: Link {
//!         mac: [0x52, 0x54, 0, 0, 0, 2],
//!         v4: ([10, 0, 2, 100].into(), 24),
//!         v6: ("fd00::100".parse()?, 64),
//!     },
//!     gateway: Link {
//!         mac: [0x52, 0x54, 0, 0, 0, 1],
//!         v4: ([10, 0, 2, 2].into(), 24),
//!         v6: ("fd00::2".parse()?, 64),
//!     },
//!     ipv6: true,
//!     dns: DnsSpec::default(),
//!     policy: PolicySpec::default(),
//!     flow_log: None,
//!     capture: None,
//!     rates: Rates::default(),
//!     outbound: Outbound::default(),
//! };
//! // In the host's.
//! let stack = Stack::start(tap, &spec, Published::bind(&[])?)?;
//! println!("{:?}", stack.stats());
//! stack.stop();
//! # Ok(())
//! # }
//! ```
//!
//! The guest's side has to be configured by the caller: the TAP's Ethernet address and MTU as in the spec, link up, both
//! addresses (IPv6 without duplicate address detection), default routes through the gateway's addresses.

mod calls;
mod config;
mod control;
mod defect;
mod device;
mod dhcp;
mod dns;
mod emit;
mod engine;
mod flow;
mod flowlog;
mod flows;
mod forward;
mod fragment;
mod host;
mod icmp;
mod ingress;
mod inside;
mod join;
mod ndp;
mod netlink;
mod pcap;
mod policy;
mod rate;
#[cfg(test)]
mod script;
mod shared;
mod side;
mod stack;
mod stats;
mod suspend;
mod sys;
mod tcp;
mod udp;

pub use config::{DnsAt, DnsSpec, Error, Link, Outbound, Protocol, Publish, StackSpec};
pub use control::Control;
pub use flowlog::{FlowEvent, FlowEventKind, FlowLog, FlowState, Traffic};
pub use forward::{PortId, Published, PublishedPort};
pub use inside::{InsideSockets, SocketMaker, inside_sockets};
pub use ndp::slaac_address;
pub use pcap::{Capture, Captured};
pub use policy::{HostLoopback, NamePattern, PolicySpec, Rule, RuleError, Transport};
pub use rate::{Rate, Rates};
pub use stack::Stack;
pub use stats::Stats;

use std::os::fd::OwnedFd;

/// Makes the TAP `name` in the calling thread's network namespace, ready for [`Stack::start`].
///
/// Needs CAP_NET_ADMIN in that namespace, and /dev/net/tun. The descriptor may be sent to a process elsewhere; the
/// device lives as long as the descriptor does.
///
/// # Errors
///
/// What the kernel said: ENOENT or EACCES for /dev/net/tun, EPERM or EBUSY for the device.
pub fn open_tap(name: &str) -> std::io::Result<OwnedFd> {
    let tap = sys::open_tap(name)?;
    // The network works without it.
    if let Err(errno) = netlink::set_queue_len(name, TAP_QUEUE) {
        tracing::debug!(%errno, "the TAP's queue keeps its length");
    }
    Ok(tap)
}

/// Frames that the guest's kernel has sent and the stack has not read yet. The driver drops what does not fit: with the
/// 1,000 frames that are its default, the acknowledgements of a thousand connections that end together are lost, and each
/// of them costs a second. This takes eight bytes of the kernel's memory per frame.
const TAP_QUEUE: u32 = 10_000;

/// Leaves a device made by [`open_tap`] to its network namespace: it goes with the namespace, not with the descriptor.
///
/// Removing a network device makes the closing process wait for the kernel's grace periods, some 20 ms; a namespace is
/// taken down by a kernel thread, for which nobody waits. For namespaces made for the device only: elsewhere it stays.
///
/// # Errors
///
/// As ioctl(2) of TUNSETPERSIST.
pub fn leave_tap_to_namespace(tap: std::os::fd::BorrowedFd<'_>) -> std::io::Result<()> {
    sys::leave_tap_to_namespace(tap)
}
