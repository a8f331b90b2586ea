//! Counters. Written by the stack's thread, read by anybody, never used to decide anything.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What the stack has done so far. Frames and bytes are counted at the TAP.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct Stats {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Stats {
            /// All of them, by their names.
            pub fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name),)*].into_iter()
            }
        }

        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: Counter,)*
        }

        impl Counters {
            pub(crate) fn snapshot(&self) -> Stats {
                Stats { $($name: self.$name.get(),)* }
            }
        }
    };
}

counters! {
    /// Frames from the guest.
    frames_from_guest,
    /// Bytes of frames from the guest.
    bytes_from_guest,
    /// Frames to the guest.
    frames_to_guest,
    /// Bytes of frames to the guest.
    bytes_to_guest,
    /// TCP connections that the guest asked for and the policy allowed.
    tcp_out,
    /// TCP connections to published ports.
    tcp_in,
    /// Those of them that were joined to a socket inside.
    tcp_joined,
    /// TCP connections that exist now, half-open ones included.
    tcp_flows,
    /// UDP sockets that exist now.
    udp_flows,
    /// Ping sockets that exist now.
    ping_flows,
    /// Questions to the DNS forwarder.
    dns_queries,
    /// Those answered from the cache.
    dns_cached,
    /// What came to a socket to a resolver and was no answer: other messages, wrong checksums, ICMP errors that did not quote
    /// the question.
    dns_ignored,
    /// Flows that the policy refused.
    refused_by_policy,
    /// Flows refused because a table was full or descriptors had run out.
    refused_by_limit,
    /// Flows ended early to make room for new ones: idle UDP flows, and TCP connections that nobody has answered.
    evicted,
    /// Frames that could not be understood: wrong lengths, checksums, protocols.
    dropped_malformed,
    /// Frames to a multicast or broadcast address.
    dropped_multicast,
    /// Frames from an address that is not the guest's.
    dropped_source,
    /// Datagrams dropped because the host's or the TAP's queue was full, because they were more than may go, or because
    /// nobody in the guest asked for them.
    dropped_datagrams,
}

#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: usize) {
        self.0.fetch_add(u64::try_from(n).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(crate) fn one(&self) {
        self.add(1);
    }

    pub(crate) fn set(&self, n: usize) {
        self.0.store(u64::try_from(n).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
