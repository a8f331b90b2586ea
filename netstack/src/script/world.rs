//! What a script runs in: the engine between the guest's end of its wire and the host's sockets, and the time.

use std::os::fd::OwnedFd;

use nix::sys::socket::{setsockopt, socketpair, sockopt};

use super::*;
use crate::device::Segmentation;

pub(super) struct Script {
    pub(super) engine: Engine,
    pub(super) control: Control,
    /// The guest's end.
    pub(super) wire: OwnedFd,
    pub(super) now: Instant,
    pub(super) published: Vec<SocketAddr>,
}

impl Script {
    pub(super) fn new(spec: &StackSpec, segmentation: bool) -> Self {
        Self::with(spec, segmentation, &[])
    }

    pub(super) fn with(spec: &StackSpec, segmentation: bool, ports: &[Publish]) -> Self {
        Self::of(spec, segmentation, Published::bind(ports).expect("ports"))
    }

    pub(super) fn of(spec: &StackSpec, segmentation: bool, published: Published) -> Self {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let (wire, tap) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).expect("socket pair");
        setsockopt(&tap, sockopt::SndBuf, &(1 << 18)).expect("buffer");
        let now = Instant::from_secs(1_000);
        let addresses = published.addresses().map(|(addr, ..)| addr).collect();
        let segmentation = if segmentation { Segmentation::TcpAndUdp } else { Segmentation::None };
        let (engine, control) = Engine::new(tap, spec, published, segmentation, now).expect("engine");
        Self { engine, control, wire, now, published: addresses }
    }

    /// Gives the engine what it needs to handle everything that is there now.
    pub(super) fn settle(&mut self) {
        for _ in 0..4 {
            self.turn(Duration::ZERO);
        }
    }

    /// Turns until something of the host's has happened.
    pub(super) fn wait_for(&mut self, what: &str, happened: impl Fn(&Self) -> bool) {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !happened(self) {
            assert!(std::time::Instant::now() < deadline, "never happened: {what}");
            self.turn(Duration::from_millis(10));
        }
    }

    pub(super) fn turn(&mut self, most: Duration) {
        let now = self.now;
        assert_eq!(self.engine.turn(&mut || now, Some(most)), Turn::Goes);
    }

    pub(super) fn advance(&mut self, by: Duration) {
        self.now += by;
        self.settle();
    }

    pub(super) fn advance_millis(&mut self, millis: u64) {
        self.advance(Duration::from_millis(millis));
    }

    /// A frame from the guest, as its driver hands it out.
    pub(super) fn send_frame(&self, checksum_pending: bool, ethertype: u16, payload: &[u8]) {
        assert!(self.try_send_frame(checksum_pending, ethertype, payload), "room on the wire");
    }

    /// Sends a frame if the wire has room for it.
    pub(super) fn try_send_frame(&self, checksum_pending: bool, ethertype: u16, payload: &[u8]) -> bool {
        let mut frame = vec![0; VNET_HEADER_LEN];
        frame[0] = u8::from(checksum_pending);
        frame.extend([0x52, 0x54, 0, 0, 0, 1, 0x52, 0x54, 0, 0, 0, 2]);
        frame.extend(ethertype.to_be_bytes());
        frame.extend(payload);
        nix::unistd::write(&self.wire, &frame).is_ok()
    }

    pub(super) fn send_ip(&self, packet: &[u8]) {
        let ethertype = if packet[0] >> 4 == 6 { 0x86dd } else { 0x0800 };
        self.send_frame(false, ethertype, packet);
    }

    pub(super) fn try_recv(&self) -> Option<Out> {
        let mut buffer = vec![0; 1 << 17];
        let len = nix::unistd::read(&self.wire, &mut buffer).ok()?;
        buffer.truncate(len);
        Some(Out(buffer))
    }

    /// The next frame that `wanted` wants; others are dropped. Real time passes while the host's kernel works, virtual
    /// time does not.
    pub(super) fn expect(&mut self, what: &str, wanted: impl Fn(&Out) -> bool) -> Out {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        loop {
            while let Some(frame) = self.try_recv() {
                if wanted(&frame) {
                    return frame;
                }
            }
            assert!(std::time::Instant::now() < deadline, "never came: {what}");
            self.turn(Duration::from_millis(20));
        }
    }

    pub(super) fn expect_tcp(&mut self, what: &str, wanted: impl Fn(&TcpPacket<&[u8]>) -> bool) -> Out {
        self.expect(what, |frame| {
            let Ok(Inbound::Ip(packet)) =
                ingress::parse_frame(frame.ethernet(), [0x52, 0x54, 0, 0, 0, 2], true)
            else {
                return false;
            };
            packet.protocol == ingress::TCP
                && TcpPacket::new_checked(packet.payload()).is_ok_and(|segment| wanted(&segment))
        })
    }

    pub(super) fn nothing_comes(&mut self, what: &str) {
        self.settle();
        if let Some(frame) = self.try_recv() {
            panic!("{what}: {:?}", frame.packet());
        }
    }

    pub(super) fn stats(&self) -> crate::stats::Stats {
        self.engine.stats()
    }
}

/// A frame from the stack.
#[derive(Debug, Clone)]
pub(super) struct Out(pub(super) Vec<u8>);

impl Out {
    pub(super) fn ethernet(&self) -> &[u8] {
        &self.0[VNET_HEADER_LEN..]
    }

    pub(super) fn packet(&self) -> Packet<'_> {
        match ingress::parse_frame(self.ethernet(), [0x52, 0x54, 0, 0, 0, 2], true) {
            Ok(Inbound::Ip(packet)) => packet,
            other => panic!("no IP packet: {other:?}"),
        }
    }

    pub(super) fn tcp(&self) -> TcpPacket<&[u8]> {
        let packet = self.packet();
        assert_eq!(packet.protocol, ingress::TCP, "{packet:?}");
        TcpPacket::new_checked(packet.payload()).expect("segment")
    }

    /// Kind of segmentation offload, and segment size.
    pub(super) fn offload(&self) -> (u8, u16) {
        (self.0[1], u16::from_ne_bytes([self.0[4], self.0[5]]))
    }
}

/// Runs the test `name` again, alone, in a network namespace in which every address is the host's own and nobody
/// listens; `true` if this is that run.
pub(super) fn in_empty_namespace(name: &str) -> bool {
    const INSIDE: &str = "NETSTACK_SCRIPT_INSIDE";
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let setup = "ip link set lo up && ip route add local 0.0.0.0/0 dev lo && ip -6 route add local ::/0 dev lo && \
                 ip -6 addr add 2001:db8::9 dev lo && \
                 echo 0 0 >/proc/sys/net/ipv4/ping_group_range && exec \"$0\" --exact \"$1\"";
    let child = std::process::Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "sh", "-c", setup])
        .arg(std::env::current_exe().expect("path of this program"))
        .arg(name)
        .env(INSIDE, "1")
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stderr(std::process::Stdio::inherit())
        .output()
        .expect("unshare of util-linux");
    let said = String::from_utf8_lossy(&child.stdout);
    // A name that no test has is no failure of the child's.
    assert!(child.status.success() && said.contains("1 passed"), "{name} failed in its namespace: {said}");
    false
}
