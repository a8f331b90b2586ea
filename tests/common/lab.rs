//! The network that `tests/lab` makes around the tests: `host`, where they and rootlet run, and
//! `world`, where its servers are, with a cable between them. Nothing of it reaches the real network.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Addresses and names of the lab, as `tests/lab` and `tests/lab-world.py` have them.
pub(crate) struct Lab {
    /// The servers.
    pub(crate) world: Ipv4Addr,
    pub(crate) world_v6: Ipv6Addr,
    /// The host's own address, on which the tests may listen.
    pub(crate) host: Ipv4Addr,
    pub(crate) host_v6: Ipv6Addr,
    /// An address of the same network that nobody has.
    pub(crate) nobody: Ipv4Addr,
}

impl Lab {
    /// Sends back what it gets, TCP and UDP.
    pub(crate) const ECHO: u16 = 7;
    /// TCP: reads to the end, then answers with length and sha256 of what it read.
    pub(crate) const HASH: u16 = 9001;
    /// TCP: sends 32 MiB of a fixed pattern and closes.
    pub(crate) const SOURCE: u16 = 9002;
    /// TCP: resets the connection after the first bytes.
    pub(crate) const RESET: u16 = 9003;
    /// TCP: closes its sending side at once, then answers to nobody but counts; says nothing.
    pub(crate) const HALF_CLOSE: u16 = 9004;
    /// TCP: reads nothing until a connection to [`Lab::RELEASE`] came, then as [`Lab::HASH`].
    pub(crate) const STALL: u16 = 9005;
    pub(crate) const RELEASE: u16 = 9006;
    /// TCP and UDP: answers with the address of the peer.
    pub(crate) const WHO: u16 = 9007;
    /// HTTP.
    pub(crate) const HTTP: u16 = 80;
    /// Nobody listens.
    pub(crate) const CLOSED: u16 = 9;
}

/// The lab, if the tests run in it.
pub(crate) fn lab() -> Option<Lab> {
    std::env::var_os("ROOTLET_TEST_LAB").map(|_| Lab {
        world: Ipv4Addr::new(10, 77, 0, 2),
        world_v6: Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 2),
        host: Ipv4Addr::new(10, 77, 0, 1),
        host_v6: Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1),
        nobody: Ipv4Addr::new(10, 77, 0, 99),
    })
}

impl Lab {
    /// Both addresses of the servers.
    pub(crate) fn both(&self) -> [IpAddr; 2] {
        [self.world.into(), self.world_v6.into()]
    }
}
