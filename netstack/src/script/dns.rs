//! DNS at the gateway against resolvers that the script plays: real sockets, virtual time.

use hickory_proto::op::{Message, ResponseCode};
use nix::errno::Errno;

use super::*;
use crate::calls::{Call, Fault, set_plan};
use crate::config::{MAX_DNS_LOCAL_TTL, MAX_DNS_QUERIES, MAX_DNS_WAITERS, MAX_PINS, PIN_GRACE};
use crate::dns::message::tests::query;
use crate::dns::message::{TYPE_A, TYPE_AAAA, TYPE_SOA, parse_query};
use crate::dns::response::tests::{Record, response, soa};

mod cache;
mod guest;
mod pinned;
mod resolvers;

const A: [u8; 4] = [192, 0, 2, 1];

/// A resolver and the guest that is to use it.
pub(super) struct Dns {
    pub(super) script: Script,
    server: UdpSocket,
}

impl Dns {
    fn new() -> Self {
        Self::with(|_| {})
    }

    /// The resolver is taken for one that is far away.
    pub(super) fn with(change: impl FnOnce(&mut StackSpec)) -> Self {
        let mut dns = Self::near(change);
        dns.script.engine.take_resolvers_for_distant();
        dns
    }

    /// The resolver is where it is: on the host's loopback.
    fn near(change: impl FnOnce(&mut StackSpec)) -> Self {
        let server = UdpSocket::bind("127.0.0.1:0").expect("socket");
        server.set_read_timeout(Some(std::time::Duration::from_secs(10))).expect("time-out");
        let mut spec = spec();
        spec.dns.upstreams = vec![server.local_addr().expect("address")];
        change(&mut spec);
        // Answers one by one.
        Self { script: Script::new(&spec, false), server }
    }

    /// The guest asks from `port`.
    pub(super) fn ask(&mut self, port: u16, query: &[u8]) {
        self.script.send_ip(&udp((GUEST_V4, port), (GATEWAY_V4, 53), query));
        self.script.settle();
    }

    /// What the resolver is asked, and from where.
    fn asked(&self) -> (Vec<u8>, SocketAddr) {
        let mut buffer = [0; 512];
        let (len, from) = self.server.recv_from(&mut buffer).expect("a query");
        (buffer[..len].to_vec(), from)
    }

    fn not_asked(&self) {
        self.server.set_nonblocking(true).expect("non-blocking");
        let got = self.server.recv(&mut [0; 512]);
        self.server.set_nonblocking(false).expect("blocking");
        got.expect_err("nothing to ask");
    }

    /// The resolver answers what it is asked next.
    pub(super) fn answers(&self, code: u8, records: &[Record<'_>]) {
        let (ask, from) = self.asked();
        self.server.send_to(&response(&ask, code, records), from).expect("send");
    }

    /// The next answer that the guest gets, which comes for `port`.
    fn told(&mut self, port: u16) -> Vec<u8> {
        let frame = self.script.expect("an answer", |_| true);
        let packet = frame.packet();
        assert_eq!(packet.payload()[2..4], port.to_be_bytes());
        packet.payload()[8..].to_vec()
    }

    /// The same, understood.
    pub(super) fn heard(&mut self, port: u16) -> Message {
        Message::from_vec(&self.told(port)).expect("a message")
    }
}

fn ttls(message: &Message) -> Vec<u32> {
    message.all_sections().map(|record| record.ttl).collect()
}
