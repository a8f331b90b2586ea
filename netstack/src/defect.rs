//! What the stack is about to do, so that if a defect ends it, the log says with which flow that began.
//!
//! A panic ends the thread's work and nothing else: the thread owns everything that it uses. Host sockets of TCP flows
//! are reset then, for their peers must not take the end of the network for the end of the data.

use std::any::Any;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use crate::flow::{Endpoint, FlowId, TimerKey};
use crate::ingress::{ICMP, ICMPV6, Packet, TCP, UDP};
use crate::shared::Token;

/// What the stack is at. It is noted for every packet and every flow that is looked after, so it is plain numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum At {
    /// Nothing that belongs to a single flow.
    Housekeeping,
    /// A command of the caller's.
    Command,
    /// A frame of the guest's, of which nothing is known yet.
    Frame,
    /// A packet of the guest's.
    Packet(PacketName),
    /// Something that happened to a descriptor.
    Event(Token),
    /// A timer.
    Timer(TimerKey),
    /// What a TCP flow has to do after anything happened to it.
    Flow(FlowId),
}

impl At {
    pub(crate) fn packet(packet: &Packet<'_>) -> Self {
        let later = packet.fragment.is_some_and(|piece| piece.offset != 0);
        let ports = packet.payload().first_chunk().filter(|_| !later).copied().unwrap_or_default();
        Self::Packet(PacketName { protocol: packet.protocol, src: packet.src, dst: packet.dst, ports })
    }
}

/// A packet for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PacketName {
    protocol: u8,
    src: IpAddr,
    dst: IpAddr,
    ports: [u8; 4],
}

impl fmt::Display for PacketName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { protocol, src, dst, ports: [a, b, c, d] } = *self;
        match protocol {
            TCP | UDP => {
                let name = if protocol == TCP { "TCP" } else { "UDP" };
                let src: SocketAddr = Endpoint::new(src, u16::from_be_bytes([a, b])).into();
                let dst: SocketAddr = Endpoint::new(dst, u16::from_be_bytes([c, d])).into();
                write!(f, "a {name} packet from {src} to {dst}")
            }
            ICMP | ICMPV6 => write!(f, "an ICMP packet from {src} to {dst}"),
            _ => write!(f, "a packet of protocol {protocol} from {src} to {dst}"),
        }
    }
}

/// What a panic said.
pub(crate) fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
