//! Packet scripts: the whole engine on a socket pair instead of a TAP, with explicit virtual time.
//!
//! The script is the guest: it writes frames and reads frames. The other side is real: sockets on the host's loopback,
//! which the gateway's address stands for. Nothing here sends anything beyond loopback; the floods, whose destinations
//! are arbitrary, run in a network namespace of their own.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;

use nix::sys::socket::{AddressFamily, SockFlag, SockType};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{
    Icmpv4Packet, IpProtocol, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber, UdpPacket, checksum,
};

use crate::config::{Protocol, Publish, StackSpec};
use crate::control::Control;
use crate::device::ETHERNET_HEADER_LEN;
use crate::engine::{Engine, Turn};
use crate::forward::Published;
use crate::ingress::tests::Seeded;
use crate::ingress::{self, Inbound, Packet};
use crate::policy::{HostLoopback, PolicySpec};
use crate::sys::VNET_HEADER_LEN;

// What scripts are made of.
mod packets;
mod peer;
mod world;

// The link, and datagrams.
mod errors;
mod fragments;
mod full;
mod link;
mod runs;
mod udp;

// Connections.
mod begin;
mod data;
mod joined;
mod tcp;

// Names, limits, commands.
mod control;
mod dns;
mod names;
mod rates;

// What others do wrong, and we.
mod defects;
mod faults;
mod good;
mod hostile;
mod lossy;
mod malformed;

use packets::{icmpv6, solicitation, udp, v4_fragment};
use peer::{Busy, Peer, accept, listener};
use world::{Out, Script, in_empty_namespace};

const HEAD: usize = VNET_HEADER_LEN + ETHERNET_HEADER_LEN;
const GUEST_V4: &str = "10.0.2.100";
const GATEWAY_V4: &str = "10.0.2.2";
const GUEST_V6: &str = "fd00::100";
const GATEWAY_V6: &str = "fd00::2";

fn ip(text: &str) -> IpAddr {
    text.parse().expect(text)
}

fn spec() -> StackSpec {
    let policy = PolicySpec { host_loopback: HostLoopback::All, ..PolicySpec::default() };
    StackSpec { policy, ..crate::config::tests::spec() }
}

/// Any free port of the host's loopback that leads to this one inside.
fn forwarded(protocol: Protocol, inside_port: u16) -> Publish {
    Publish { host_ip: Some(ip("127.0.0.1")), host_port: 0, inside_ip: None, inside_port, protocol }
}
