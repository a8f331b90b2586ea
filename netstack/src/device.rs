//! The TAP: frames with their virtio header in and out, and the device that smoltcp sees.
//!
//! Segmentation. The link's MTU is that of the spec, 1500 as a rule, and the guest sees nothing else. smoltcp, however,
//! is told that the MTU is 65,535 and that the guest takes segments of any size: we rewrite the MSS option of the
//! guest's SYN on its way in, and that of smoltcp's SYN on its way out. So smoltcp makes super-segments of up to 64 KiB
//! for IPv4 and IPv6 alike (its own segmentation offload drops those of IPv6), and we give them to the kernel with the
//! real segment size in the virtio header. The kernel takes them as the result of receive offload.
//!
//! Checksums. The kernel is asked to finish TCP's and UDP's (NEEDS_CSUM; the field holds the pseudo-header's sum), so
//! nobody ever computes them. ICMP's and fragments' are complete.
//!
//! Datagrams that follow each other from one endpoint to another, and are of one size but for the last, are given to the
//! kernel as one such super-segment, too, where it takes them (Linux 6.2): they wait in `run` for the end of the engine's
//! turn at most. The receiver's kernel takes it apart in front of the socket.
//!
//! A frame is never dropped here while the TAP cannot take it: a lost segment would cost smoltcp's minimum
//! retransmission time, one second. It waits in `pending`; while something does, smoltcp finds the device exhausted,
//! and the engine reads no more from the guest.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use smoltcp::phy::{Checksum, ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;
use smoltcp::wire::{IpAddress, IpProtocol, TcpPacket, TcpSeqNumber, checksum};

use crate::config::{MAX_PENDING_FRAMES, StackSpec};
use crate::emit::{self, ip_header_len};
use crate::flow::Endpoint;
use crate::pcap::{Capture, Direction};
use crate::stats::Counters;
use crate::sys::VNET_HEADER_LEN;

pub(crate) const ETHERNET_HEADER_LEN: usize = 14;
const HEAD: usize = VNET_HEADER_LEN + ETHERNET_HEADER_LEN;
/// Longest IP packet that smoltcp may build.
const BIG_MTU: usize = 65_535;
/// Enough for a header, a VLAN tag or two, and an IPv6 packet of the greatest length.
const FRAME_BUFFER: usize = HEAD + 8 + 40 + 65_535 + 64;

const NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;

/// Datagrams of a run: what older kernels take at once (UDP_MAX_SEGMENTS).
pub(crate) const MAX_RUN: usize = 64;
/// Bytes of a run that fit into an IP packet, whatever its version.
pub(crate) const MAX_RUN_BYTES: usize = 65_535 - 40 - 8;

pub(crate) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(crate) const ETHERTYPE_ARP: u16 = 0x0806;
pub(crate) const ETHERTYPE_IPV6: u16 = 0x86dd;

/// Which super-segments the kernel takes and gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Segmentation {
    None,
    Tcp,
    TcpAndUdp,
}

/// What the kernel is asked to do to a packet. Offsets count from the IP header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Offload {
    /// Where the checksum starts, and where its field is from there.
    checksum: Option<(u16, u16)>,
    /// Kind, length of the headers, bytes of payload per segment.
    segments: Option<(u8, u16, u16)>,
}

impl Offload {
    /// The packet is complete.
    pub(crate) const NONE: Self = Self { checksum: None, segments: None };
}

/// One frame from the guest.
#[derive(Debug)]
pub(crate) struct Frame<'a> {
    pub(crate) bytes: &'a [u8],
    /// The frame never was on a wire: its checksum is unfinished, and nothing can have damaged it.
    pub(crate) checksum_pending: bool,
    /// These are as many datagrams of so many bytes as there are, the last one as long as is left. The guest may say what
    /// it likes here.
    pub(crate) datagram_size: Option<usize>,
}

/// Result of reading the TAP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReadResult {
    /// A frame of this many bytes is in the buffer, the virtio header included.
    Frame(usize),
    /// Nothing to read now.
    Empty,
    /// The TAP is gone.
    Gone,
}

/// What TCP segments that were sent have said.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Said {
    /// What the last one acknowledged.
    pub(crate) acknowledged: Option<TcpSeqNumber>,
    /// What acknowledges the last FIN.
    pub(crate) fin_ack: Option<TcpSeqNumber>,
}

/// The TAP's sending half, and its descriptor.
#[derive(Debug)]
pub(crate) struct Tap {
    fd: OwnedFd,
    guest_mac: [u8; 6],
    gateway_mac: [u8; 6],
    pub(crate) mtu: usize,
    segmentation: Segmentation,
    scratch: Box<[u8]>,
    /// What TCP segments have said since this was taken.
    pub(crate) said: Said,
    run: Option<Run>,
    /// Where the packet of `run` is built.
    run_packet: Box<[u8]>,
    pending: VecDeque<Box<[u8]>>,
    ipv4_ident: u16,
    stats: Arc<Counters>,
    pub(crate) capture: Option<Capture>,
}

/// Datagrams on their way to the guest that go together.
#[derive(Debug)]
struct Run {
    from: Endpoint,
    to: Endpoint,
    /// Payload of each but the last.
    size: usize,
    count: usize,
    /// Payload of all.
    len: usize,
}

impl Run {
    /// Whether another datagram of `len` bytes may follow.
    fn takes(&self, from: Endpoint, to: Endpoint, len: usize) -> bool {
        (self.from, self.to) == (from, to)
            && (1..=self.size).contains(&len)
            // A shorter one is the last.
            && self.len == self.count * self.size
            && self.count < MAX_RUN
            && self.len + len <= MAX_RUN_BYTES
    }
}

/// Makes the buffer that [`Tap::read`] wants.
pub(crate) fn frame_buffer() -> Box<[u8]> {
    vec![0; FRAME_BUFFER].into_boxed_slice()
}

impl Tap {
    pub(crate) fn new(
        fd: OwnedFd,
        spec: &StackSpec,
        segmentation: Segmentation,
        stats: Arc<Counters>,
    ) -> Self {
        Self {
            fd,
            guest_mac: spec.guest.mac,
            gateway_mac: spec.gateway.mac,
            // Nothing above BIG_MTU fits into an IPv4 packet.
            mtu: usize::from(spec.mtu.max(spec.least_mtu())).min(BIG_MTU),
            segmentation,
            scratch: frame_buffer(),
            said: Said::default(),
            run: None,
            run_packet: frame_buffer(),
            pending: VecDeque::new(),
            ipv4_ident: 1,
            stats,
            capture: spec.capture.clone(),
        }
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Learns the guest's Ethernet address from a frame that it sent.
    pub(crate) fn learn_guest_mac(&mut self, mac: [u8; 6]) {
        // The group bit marks what cannot be a source.
        if mac[0] & 1 == 0 && mac != self.gateway_mac {
            self.guest_mac = mac;
        }
    }

    pub(crate) fn gateway_mac(&self) -> [u8; 6] {
        self.gateway_mac
    }

    /// Reads one frame into `buffer`.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> ReadResult {
        loop {
            match nix::unistd::read(&self.fd, buffer) {
                Ok(0) => return ReadResult::Gone,
                Ok(len) => {
                    self.stats.frames_from_guest.one();
                    self.stats.bytes_from_guest.add(len.saturating_sub(VNET_HEADER_LEN));
                    if let Some(capture) = &self.capture
                        && let Some(frame) = buffer.get(VNET_HEADER_LEN..len)
                    {
                        capture.frame(Direction::FromGuest, frame);
                    }
                    return ReadResult::Frame(len);
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return ReadResult::Empty,
                Err(errno) => {
                    tracing::debug!(%errno, "the TAP cannot be read any more");
                    return ReadResult::Gone;
                }
            }
        }
    }

    /// Takes the virtio header off what [`Tap::read`] read.
    pub(crate) fn frame(buffer: &[u8]) -> Option<Frame<'_>> {
        let (header, bytes) = buffer.split_at_checked(VNET_HEADER_LEN)?;
        let size = usize::from(u16::from_ne_bytes([header[4], header[5]]));
        Some(Frame {
            bytes,
            checksum_pending: header[0] & NEEDS_CSUM != 0,
            datagram_size: (header[1] == GSO_UDP_L4 && size > 0).then_some(size),
        })
    }

    /// Whether frames wait for the TAP to take them.
    pub(crate) fn is_blocked(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Whether a datagram, which may be lost, should rather be dropped now.
    pub(crate) fn is_congested(&self) -> bool {
        self.pending.len() >= MAX_PENDING_FRAMES
    }

    #[cfg(test)]
    pub(crate) fn check_bounds(&self) {
        // What was begun below the limit may end above it: a datagram in fragments.
        assert!(self.pending.len() <= MAX_PENDING_FRAMES + 64, "{}", self.pending.len());
    }

    /// Sends what is pending, as far as the TAP takes it.
    pub(crate) fn flush(&mut self) {
        while let Some(frame) = self.pending.front() {
            if self.write(frame) == Err(Errno::EAGAIN) {
                return;
            }
            self.pending.pop_front();
        }
    }

    /// The place where the next IP packet of `len` bytes is built; [`Tap::send_ip`] sends it.
    pub(crate) fn packet_mut(&mut self, len: usize) -> &mut [u8] {
        let packet = &mut self.scratch[HEAD..HEAD + len];
        packet.fill(0);
        packet
    }

    /// Sends a datagram that fits into the MTU, together with others if more follow before [`Tap::end_run`].
    pub(crate) fn send_datagram(&mut self, from: Endpoint, to: Endpoint, payload: &[u8]) {
        let at = HEAD + ip_header_len(to.ip) + 8;
        if let Some(run) = &mut self.run {
            if run.takes(from, to, payload.len()) {
                self.run_packet[at + run.len..][..payload.len()].copy_from_slice(payload);
                run.count += 1;
                run.len += payload.len();
                return;
            }
            self.end_run();
        }
        self.run_packet[at..][..payload.len()].copy_from_slice(payload);
        self.run = Some(Run { from, to, size: payload.len(), count: 1, len: payload.len() });
        if self.segmentation != Segmentation::TcpAndUdp {
            self.end_run();
        }
    }

    /// Sends the datagrams that wait for others.
    pub(crate) fn end_run(&mut self) {
        let Some(Run { from, to, size, count, len }) = self.run.take() else { return };
        let mut buffer = std::mem::take(&mut self.run_packet);
        let header_len = ip_header_len(to.ip);
        let packet = &mut buffer[HEAD..HEAD + header_len + 8 + len];
        emit::udp_headers(packet, from, to);
        let small = |n: usize| u16::try_from(n).unwrap_or_default();
        // The kernel finishes the sums.
        let offload = Offload {
            checksum: Some((small(header_len), 6)),
            segments: (count > 1).then_some((GSO_UDP_L4, small(header_len + 8), small(size))),
        };
        self.send_in(&mut buffer, header_len + 8 + len, offload);
        self.run_packet = buffer;
    }

    /// Sends the IP packet of `len` bytes that was built in [`Tap::packet_mut`].
    pub(crate) fn send_ip(&mut self, len: usize, offload: Offload) {
        // What was said first comes first.
        self.end_run();
        let mut buffer = std::mem::take(&mut self.scratch);
        self.send_in(&mut buffer, len, offload);
        self.scratch = buffer;
    }

    /// Sends the IP packet of `len` bytes behind the place for the headers in `buffer`.
    fn send_in(&mut self, buffer: &mut [u8], len: usize, offload: Offload) {
        let ethertype = if buffer[HEAD] >> 4 == 6 { ETHERTYPE_IPV6 } else { ETHERTYPE_IPV4 };
        let link = u16::try_from(ETHERNET_HEADER_LEN).unwrap_or_default();
        let mut header = [0; VNET_HEADER_LEN];
        if let Some((start, field)) = offload.checksum {
            header[0] = NEEDS_CSUM;
            header[6..8].copy_from_slice(&(start + link).to_ne_bytes());
            header[8..10].copy_from_slice(&field.to_ne_bytes());
        }
        if let Some((kind, headers, size)) = offload.segments {
            header[1] = kind;
            header[2..4].copy_from_slice(&(headers + link).to_ne_bytes());
            header[4..6].copy_from_slice(&size.to_ne_bytes());
        }
        self.send(buffer, ethertype, header, len);
    }

    /// Sends a frame with another payload than IP.
    pub(crate) fn send_arp(&mut self, payload: &[u8]) {
        self.packet_mut(payload.len()).copy_from_slice(payload);
        let mut buffer = std::mem::take(&mut self.scratch);
        self.send(&mut buffer, ETHERTYPE_ARP, [0; VNET_HEADER_LEN], payload.len());
        self.scratch = buffer;
    }

    fn send(&mut self, buffer: &mut [u8], ethertype: u16, header: [u8; VNET_HEADER_LEN], len: usize) {
        let (head, _) = buffer.split_at_mut(HEAD);
        let (vnet, ethernet) = head.split_at_mut(VNET_HEADER_LEN);
        vnet.copy_from_slice(&header);
        ethernet[..6].copy_from_slice(&self.guest_mac);
        ethernet[6..12].copy_from_slice(&self.gateway_mac);
        ethernet[12..].copy_from_slice(&ethertype.to_be_bytes());
        let frame = &buffer[..HEAD + len];
        // What waits goes first: order matters to TCP.
        if self.is_blocked() || self.write(frame) == Err(Errno::EAGAIN) {
            self.pending.push_back(frame.into());
        }
    }

    /// Writes a frame. Only EAGAIN is reported: other errors will not go away by waiting.
    fn write(&self, frame: &[u8]) -> nix::Result<()> {
        loop {
            match nix::unistd::write(&self.fd, frame) {
                Ok(_) => {
                    self.stats.frames_to_guest.one();
                    self.stats.bytes_to_guest.add(frame.len() - VNET_HEADER_LEN);
                    if let Some(capture) = &self.capture {
                        capture.frame(Direction::ToGuest, &frame[VNET_HEADER_LEN..]);
                    }
                    return Ok(());
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Err(Errno::EAGAIN),
                Err(errno) => {
                    // EIO: the link is down, the guest's doing.
                    tracing::trace!(%errno, len = frame.len(), "the TAP refused a frame");
                    return Ok(());
                }
            }
        }
    }

    /// A new identification for an IPv4 datagram that is fragmented.
    pub(crate) fn next_ipv4_ident(&mut self) -> u16 {
        self.ipv4_ident = self.ipv4_ident.wrapping_add(1);
        self.ipv4_ident
    }

    /// Largest TCP payload of a segment of the given family without options.
    pub(crate) fn link_mss(&self, is_v6: bool) -> u16 {
        let headers = if is_v6 { 60 } else { 40 };
        u16::try_from(self.mtu - headers).unwrap_or(u16::MAX)
    }

    /// Prepares the guest's SYN for smoltcp (see the module's documentation) and returns the guest's real segment size.
    pub(crate) fn widen_syn(&self, packet: &mut [u8], tcp_offset: usize, is_v6: bool) -> u16 {
        let link = self.link_mss(is_v6);
        let Some(option) = packet.get_mut(tcp_offset..).and_then(mss_option) else {
            // RFC 9293 section 3.7.1. smoltcp assumes the same, and will never exceed it.
            return 536;
        };
        let announced = u16::from_be_bytes(*option);
        if self.segmentation != Segmentation::None {
            *option = u16::MAX.to_be_bytes();
        }
        // 48 is the least that smoltcp believes, too.
        announced.clamp(48, link)
    }

    /// Finishes a TCP packet of smoltcp's.
    fn offload_tcp(&mut self, len: usize, mss: u16) -> Offload {
        let link = [self.link_mss(false), self.link_mss(true)];
        let segmentation = self.segmentation != Segmentation::None;
        let packet = &mut self.scratch[HEAD..HEAD + len];
        let (ip_len, src, dst): (usize, IpAddress, IpAddress) = if packet[0] >> 4 == 6 {
            let ip = smoltcp::wire::Ipv6Packet::new_unchecked(&*packet);
            (40, ip.src_addr().into(), ip.dst_addr().into())
        } else {
            let ip = smoltcp::wire::Ipv4Packet::new_unchecked(&*packet);
            (20, ip.src_addr().into(), ip.dst_addr().into())
        };
        let is_v6 = ip_len == 40;
        let Some(tcp) = packet.get_mut(ip_len..).filter(|tcp| tcp.len() >= 20) else { return Offload::NONE };
        let tcp_len = u32::try_from(tcp.len()).unwrap_or_default();
        let header_len = usize::from(tcp[12] >> 4) * 4;
        if let Ok(segment) = TcpPacket::new_checked(&*tcp)
            && segment.ack()
        {
            self.said.acknowledged = Some(segment.ack_number());
            if segment.fin() {
                self.said.fin_ack = Some(segment.seq_number() + segment.payload().len() + 1);
            }
        }
        if segmentation && let Some(option) = mss_option(tcp) {
            *option = link[usize::from(is_v6)].to_be_bytes();
        }
        let sum = checksum::pseudo_header(&src, &dst, IpProtocol::Tcp, tcp_len);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        let small = |n: usize| u16::try_from(n).unwrap_or_default();
        let payload = tcp.len().saturating_sub(header_len);
        // The announced size does not count options (RFC 6691).
        let size = mss.saturating_sub(small(header_len.saturating_sub(20))).max(1);
        let kind = if is_v6 { GSO_TCPV6 } else { GSO_TCPV4 };
        let segments = (payload > usize::from(size)).then_some((kind, small(ip_len + header_len), size));
        Offload { checksum: Some((small(ip_len), 16)), segments }
    }
}

/// The value of the MSS option, if `tcp` is a SYN that has one.
fn mss_option(tcp: &mut [u8]) -> Option<&mut [u8; 2]> {
    const SYN: u8 = 2;
    let header_len = usize::from(tcp.get(12)? >> 4) * 4;
    if tcp[12..].get(1)? & SYN == 0 || header_len > tcp.len() {
        return None;
    }
    let mut at = 20;
    while at < header_len {
        match *tcp.get(at)? {
            0 => return None,
            1 => at += 1,
            2 if tcp.get(at + 1) == Some(&4) && at + 4 <= header_len => {
                return tcp.get_mut(at + 2..at + 4)?.try_into().ok();
            }
            _ => at += usize::from(*tcp.get(at + 1)?).max(2),
        }
    }
    None
}

/// What smoltcp sees: one packet to receive at most, and the TAP to send to.
#[derive(Debug)]
pub(crate) struct FlowDevice<'a> {
    pub(crate) tap: &'a mut Tap,
    pub(crate) rx: Option<&'a [u8]>,
    /// The guest's segment size for this flow.
    pub(crate) mss: u16,
}

impl Device for FlowDevice<'_> {
    type RxToken<'t>
        = RxPacket<'t>
    where
        Self: 't;
    type TxToken<'t>
        = TxPacket<'t>
    where
        Self: 't;

    fn receive(&mut self, _: Instant) -> Option<(RxPacket<'_>, TxPacket<'_>)> {
        let packet = self.rx.take()?;
        Some((RxPacket(packet), TxPacket { tap: self.tap, mss: self.mss }))
    }

    fn transmit(&mut self, _: Instant) -> Option<TxPacket<'_>> {
        (!self.tap.is_blocked()).then_some(TxPacket { tap: self.tap, mss: self.mss })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut checksum = ChecksumCapabilities::ignored();
        // The rest was verified on the way in, if it needed to be, and is finished by the kernel on the way out.
        checksum.ipv4 = Checksum::Tx;
        let mut caps = DeviceCapabilities::default();
        caps.medium = Medium::Ip;
        caps.max_transmission_unit =
            if self.tap.segmentation != Segmentation::None { BIG_MTU } else { self.tap.mtu };
        caps.checksum = checksum;
        caps
    }
}

#[derive(Debug)]
pub(crate) struct RxPacket<'a>(&'a [u8]);

impl RxToken for RxPacket<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

#[derive(Debug)]
pub(crate) struct TxPacket<'a> {
    tap: &'a mut Tap,
    mss: u16,
}

impl TxToken for TxPacket<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        // smoltcp writes every byte of its packets, so the buffer need not be cleared.
        let result = f(&mut self.tap.scratch[HEAD..HEAD + len]);
        let offload = self.tap.offload_tcp(len, self.mss);
        self.tap.send_ip(len, offload);
        result
    }
}
