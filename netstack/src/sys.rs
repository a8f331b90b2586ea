//! The only module of this crate with `unsafe`: ioctls of the TAP driver, `accept4`, descriptors in
//! messages, options that nix lacks, and the rings of TCP sockets.
//!
//! [`RingSocket`] is the one piece with an invariant of its own. smoltcp's sockets want `&'static mut [u8]` or a `Vec`
//! as their rings. A `Vec` from the allocator may be touched (zeroed) as a whole, which made 1,000 idle connections
//! cost hundreds of megabytes. So the rings are anonymous mappings of which the kernel provides a page at the first
//! touch, and `RingSocket` keeps the socket and the mapping together: nothing here ever hands out the socket itself.
#![allow(unsafe_code, reason = "the crate's one module for it")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;

use nix::errno::Errno;
use smoltcp::iface::{Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::Device;
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{IpEndpoint, TcpTimestampGenerator};

use crate::device::Segmentation;

/// Length of the virtio header in front of every frame; set explicitly, though it is the kernel's default.
pub(crate) const VNET_HEADER_LEN: usize = 10;

/// Makes (or attaches to) the TAP `name` in the network namespace of the calling thread.
///
/// EINTR cannot happen: none of these calls sleeps.
pub(crate) fn open_tap(name: &str) -> io::Result<OwnedFd> {
    use nix::fcntl::{OFlag, open};
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['/', '\0']) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a name of an interface"));
    }
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let fd = open("/dev/net/tun", flags, nix::sys::stat::Mode::empty())?;
    // SAFETY: ifreq is plain data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let mode = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(mode).unwrap_or_default();
    // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    set_vnet_header_len(fd.as_fd())?;
    Ok(fd)
}

/// Leaves the device to its network namespace: closing the descriptor no longer removes it.
pub(crate) fn leave_tap_to_namespace(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: TUNSETPERSIST takes its argument by value.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETPERSIST, 1) })
        .map(drop)
        .map_err(io::Error::from)
}

/// Whether `fd` is a TAP in the mode this crate needs (IFF_TAP, IFF_VNET_HDR, no packet information).
pub(crate) fn is_vnet_tap(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: as in `open_tap`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: TUNGETIFF writes one ifreq, which outlives the call; on any other file the call fails with ENOTTY.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request) } < 0 {
        return false;
    }
    // SAFETY: TUNGETIFF fills the flags member of the union.
    let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
    flags & libc::IFF_TAP != 0 && flags & libc::IFF_VNET_HDR != 0 && flags & libc::IFF_NO_PI != 0
}

/// Fixes the length of the virtio header.
pub(crate) fn set_vnet_header_len(fd: BorrowedFd<'_>) -> nix::Result<()> {
    let len = libc::c_int::try_from(VNET_HEADER_LEN).unwrap_or_default();
    // SAFETY: TUNSETVNETHDRSZ reads one int, which outlives the call.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const len) }).map(drop)
}

/// Offers to take frames with unfinished checksums and whole TCP super-segments from the guest's kernel, and those of UDP
/// if the kernel has them (Linux 6.2); what it agreed to.
pub(crate) fn set_offload(fd: BorrowedFd<'_>) -> nix::Result<Segmentation> {
    let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    let set = |offload| {
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        Errno::result(unsafe {
            libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offload))
        })
    };
    // A kernel refuses what it does not know, and then changes nothing.
    if set(tcp | libc::TUN_F_USO4 | libc::TUN_F_USO6).is_ok() {
        return Ok(Segmentation::TcpAndUdp);
    }
    set(tcp).map(|_| Segmentation::Tcp)
}

/// Accepts one connection, non-blocking and close-on-exec from birth.
pub(crate) fn accept(fd: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    use nix::sys::socket::{SockFlag, accept4};
    #[cfg(test)]
    crate::calls::may_fail(crate::calls::Call::Accept, fd.as_raw_fd())?;
    let raw = accept4(fd.as_raw_fd(), SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: accept4 returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Receives a message with the descriptors that come with it, close-on-exec from birth. It never waits.
///
/// By hand, as nix looks at no descriptor of a message with more than there is room for, and those would stay open.
pub(crate) fn receive_descriptors(
    fd: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> nix::Result<(usize, Vec<OwnedFd>)> {
    let mut piece = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // For two, aligned as headers are.
    let mut space = [0u64; 4];
    // SAFETY: msghdr is plain data for which all zeroes is a valid value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut piece;
    message.msg_iovlen = 1;
    message.msg_control = space.as_mut_ptr().cast();
    // SAFETY: it only computes.
    let room = unsafe { libc::CMSG_SPACE(2 * FD_LEN) };
    message.msg_controllen = usize::try_from(room).unwrap_or(0).min(size_of_val(&space)) as _;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the message points to the buffer and the space, which outlive the call, and says how long they are.
    let len = Errno::result(unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, flags) })?;
    let mut fds = Vec::new();
    // SAFETY: recvmsg has filled the space, and the message says how far.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: the header lies within the space, and is aligned as the space is.
        let (level, kind, end) = unsafe { ((*header).cmsg_level, (*header).cmsg_type, (*header).cmsg_len) };
        if (level, kind) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: it only computes.
            let begin = unsafe { libc::CMSG_LEN(0) } as usize;
            #[allow(clippy::unnecessary_cast, reason = "less than usize with some C libraries")]
            let end = end as usize;
            for i in 0..end.saturating_sub(begin) / FD_LEN as usize {
                // SAFETY: the header says that its data has so many descriptors, which nobody else owns.
                fds.push(unsafe {
                    OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<RawFd>().add(i).read_unaligned())
                });
            }
        }
        // SAFETY: as for the first one.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    Ok((usize::try_from(len).unwrap_or(0), fds))
}

/// Bytes of a descriptor in a message.
const FD_LEN: u32 = 4;

/// Family, type and protocol of a socket.
pub(crate) fn kind_of_socket(fd: BorrowedFd<'_>) -> nix::Result<(i32, i32, i32)> {
    let get = |option| {
        let mut value: libc::c_int = 0;
        let mut len = libc::socklen_t::try_from(size_of_val(&value)).unwrap_or(0);
        let (to, level) = ((&raw mut value).cast(), libc::SOL_SOCKET);
        // SAFETY: the value and its length outlive the call, and the length is the value's.
        Errno::result(unsafe { libc::getsockopt(fd.as_raw_fd(), level, option, to, &raw mut len) })?;
        Ok(value)
    };
    Ok((get(libc::SO_DOMAIN)?, get(libc::SO_TYPE)?, get(libc::SO_PROTOCOL)?))
}

/// Has a socket that is about to connect choose another port than `port` for its own, where the kernel can (Linux 6.3) and
/// by its defaults might choose that.
pub(crate) fn avoid_port(fd: BorrowedFd<'_>, port: u16) {
    /// From linux/in.h: the least of the ports to choose from, and in the upper half the greatest; 0: as ever.
    const IP_LOCAL_PORT_RANGE: libc::c_int = 51;
    const RANGE: std::ops::RangeInclusive<u16> = 32_768..=60_999;
    if !RANGE.contains(&port) {
        return;
    }
    // What is more of it.
    let is_low = u32::from(port) < (u32::from(*RANGE.start()) + u32::from(*RANGE.end())) / 2;
    let ports: u32 = if is_low { u32::from(port) + 1 } else { (u32::from(port) - 1) << 16 };
    let len = libc::socklen_t::try_from(size_of_val(&ports)).unwrap_or(0);
    let from = (&raw const ports).cast();
    // SAFETY: the value outlives the call, and the length is its own. If it fails the port is as it was.
    let _ = unsafe { libc::setsockopt(fd.as_raw_fd(), libc::IPPROTO_IP, IP_LOCAL_PORT_RANGE, from, len) };
}

/// Has the error queue of a socket say where in an ICMP error its extensions begin, where the kernel can (Linux 5.9).
pub(crate) fn want_extensions(fd: BorrowedFd<'_>, is_v6: bool) {
    /// From linux/in.h and linux/in6.h.
    const IP_RECVERR_RFC4884: libc::c_int = 26;
    const IPV6_RECVERR_RFC4884: libc::c_int = 31;
    let (level, option) = if is_v6 {
        (libc::IPPROTO_IPV6, IPV6_RECVERR_RFC4884)
    } else {
        (libc::IPPROTO_IP, IP_RECVERR_RFC4884)
    };
    let on: libc::c_int = 1;
    let len = libc::socklen_t::try_from(size_of_val(&on)).unwrap_or(0);
    // SAFETY: the value outlives the call, and the length is its own. If it fails nothing is said of them.
    let _ = unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, (&raw const on).cast(), len) };
}

/// The memory of a receive and a transmit ring: one private anonymous mapping of twice `capacity` bytes, of which each
/// ring uses [`ring_len`].
#[derive(Debug)]
pub(crate) struct Rings {
    base: NonNull<u8>,
    /// A power of two, and whole pages.
    capacity: usize,
}

/// How much of `capacity` bytes a ring uses. The window in a SYN is not scaled, but until its first acknowledgement
/// smoltcp takes what the SYN announced for scaled, and segments that far ahead for acceptable. So the ring must be as
/// long as the greatest window that its scale can express, or a segment behind its end makes smoltcp panic.
fn ring_len(capacity: usize) -> usize {
    const GREATEST: usize = 0xffff;
    // smoltcp takes the least scale with which 65,535 covers the ring.
    if capacity <= GREATEST { capacity } else { GREATEST << (capacity.ilog2() - GREATEST.ilog2() - 1) }
}

// SAFETY: the mapping belongs to this value alone, and nothing about it is tied to the thread that made it.
unsafe impl Send for Rings {}

impl Rings {
    /// Reserves address space; no page is touched.
    pub(crate) fn map(capacity: usize) -> io::Result<Self> {
        #[cfg(test)]
        crate::calls::may_fail(crate::calls::Call::Map, -1)?;
        let len = capacity * 2;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // Huge pages would turn the first byte of every idle connection into two megabytes.
        // SAFETY: the range is the mapping made above; failure (a kernel without huge pages) changes nothing.
        let _ = unsafe { libc::madvise(base, len, libc::MADV_NOHUGEPAGE) };
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Self { base, capacity })
    }

    /// Bytes of each of the two.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Gives the pages back; the rings read as zeroes afterwards.
    pub(crate) fn release_pages(&mut self) {
        // SAFETY: the range is our own mapping, and `&mut self` proves that no socket uses it (see `RingSocket`).
        let _ = unsafe { libc::madvise(self.base.as_ptr().cast(), self.capacity * 2, libc::MADV_DONTNEED) };
    }
}

impl Drop for Rings {
    fn drop(&mut self) {
        // SAFETY: the range is our own mapping; the socket that used it, if any, has been dropped (see `RingSocket`).
        let _ = unsafe { libc::munmap(self.base.as_ptr().cast(), self.capacity * 2) };
    }
}

/// A TCP socket of the stack, alone in its socket set, on rings of its own.
///
/// Every method forwards to the socket of the same name. The socket is never lent out as `&mut`: it could be swapped
/// with another one and so outlive its rings.
#[derive(Debug)]
pub(crate) struct RingSocket {
    /// Before `rings`, since fields are dropped in this order.
    set: SocketSet<'static>,
    handle: SocketHandle,
    rings: Rings,
}

impl RingSocket {
    pub(crate) fn new(rings: Rings) -> Self {
        let len = ring_len(rings.capacity);
        // SAFETY: the mapping is twice `capacity` long, readable and writable, zero-filled, and used by nobody else:
        // `rings` is owned and moves into the value made here, where only `into_rings` and drop reach it, both after
        // the socket is gone. The two slices do not overlap, since `len` is `capacity` at most.
        let (rx, tx) = unsafe {
            let base = rings.base.as_ptr();
            (
                std::slice::from_raw_parts_mut(base, len),
                std::slice::from_raw_parts_mut(base.add(rings.capacity), len),
            )
        };
        let socket = tcp::Socket::new(tcp::SocketBuffer::new(rx), tcp::SocketBuffer::new(tx));
        let mut set = SocketSet::new(Vec::with_capacity(1));
        let handle = set.add(socket);
        Self { set, handle, rings }
    }

    /// Ends the socket and returns its rings for reuse.
    pub(crate) fn into_rings(self) -> Rings {
        let Self { set, rings, .. } = self;
        drop(set);
        rings
    }

    fn get(&self) -> &tcp::Socket<'static> {
        self.set.get(self.handle)
    }

    fn get_mut(&mut self) -> &mut tcp::Socket<'static> {
        self.set.get_mut(self.handle)
    }

    /// No Nagle, no delayed acknowledgements, timestamps: the guest's and the host's kernels have their own opinion
    /// about small segments, and another one between them only adds latency.
    pub(crate) fn configure(&mut self, timestamps: TcpTimestampGenerator) {
        let socket = self.get_mut();
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        socket.set_tsval_generator(Some(timestamps));
    }

    pub(crate) fn listen(&mut self, local: IpEndpoint) -> Result<(), tcp::ListenError> {
        self.get_mut().listen(local)
    }

    pub(crate) fn connect(
        &mut self,
        iface: &mut Interface,
        remote: IpEndpoint,
        local: IpEndpoint,
    ) -> Result<(), tcp::ConnectError> {
        self.get_mut().connect(iface.context(), remote, local)
    }

    pub(crate) fn state(&self) -> tcp::State {
        self.get().state()
    }

    pub(crate) fn can_send(&self) -> bool {
        self.get().can_send()
    }

    pub(crate) fn can_recv(&self) -> bool {
        self.get().can_recv()
    }

    pub(crate) fn send_queue(&self) -> usize {
        self.get().send_queue()
    }

    pub(crate) fn send<R>(&mut self, f: impl FnOnce(&mut [u8]) -> (usize, R)) -> Result<R, tcp::SendError> {
        self.get_mut().send(f)
    }

    pub(crate) fn recv<R>(&mut self, f: impl FnOnce(&mut [u8]) -> (usize, R)) -> Result<R, tcp::RecvError> {
        self.get_mut().recv(f)
    }

    pub(crate) fn close(&mut self) {
        self.get_mut().close();
    }

    pub(crate) fn abort(&mut self) {
        self.get_mut().abort();
    }

    /// Whether neither ring holds anything that is to be delivered. (The receive ring may still hold segments behind a
    /// gap, which smoltcp does not tell of.)
    pub(crate) fn is_empty(&self) -> bool {
        self.get().send_queue() == 0 && self.get().recv_queue() == 0
    }

    /// Gives the pages of the rings back if they are empty; those of the receive ring only if there is no gap.
    pub(crate) fn release_idle_pages(&mut self, has_gap: bool) {
        if !self.is_empty() {
            return;
        }
        let capacity = self.rings.capacity;
        let (from, len) = if has_gap { (capacity, capacity) } else { (0, capacity * 2) };
        // SAFETY: the range lies in our own mapping. The socket's slices of it stay valid, and it is not running; as it
        // holds nothing there, it will write every byte before it reads it, so nobody minds that they become zeroes.
        let _ = unsafe { libc::madvise(self.rings.base.as_ptr().add(from).cast(), len, libc::MADV_DONTNEED) };
    }

    pub(crate) fn poll_ingress(&mut self, iface: &mut Interface, now: Instant, device: &mut impl Device) {
        let _ = iface.poll_ingress_single(now, device, &mut self.set);
    }

    /// Sends at most one segment; whether one was sent.
    pub(crate) fn poll_egress(
        &mut self,
        iface: &mut Interface,
        now: Instant,
        device: &mut impl Device,
    ) -> bool {
        iface.poll_egress(now, device, &mut self.set) == PollResult::SocketStateChanged
    }

    pub(crate) fn poll_at(&self, iface: &mut Interface, now: Instant) -> Option<Instant> {
        iface.poll_at(now, &self.set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_is_as_long_as_its_greatest_window() {
        for (capacity, len) in [(16_384, 16_384), (65_536, 65_535), (131_072, 131_070), (524_288, 524_280)] {
            assert_eq!(ring_len(capacity), len);
        }
    }

    #[test]
    fn rings_are_zero_after_their_pages_are_released() {
        let mut socket = RingSocket::new(Rings::map(4096).expect("mapping"));
        assert_eq!(socket.state(), tcp::State::Closed);
        assert!(!socket.can_send());
        socket.abort();
        let mut rings = socket.into_rings();
        rings.release_pages();
        drop(rings);
    }

    #[test]
    fn names_that_are_no_interface_are_refused_before_the_driver_sees_them() {
        for name in ["", "a/b", "sixteen-bytes-xx"] {
            assert_eq!(open_tap(name).expect_err(name).kind(), io::ErrorKind::InvalidInput);
        }
    }

    #[test]
    fn an_ordinary_file_is_no_tap() {
        let file = std::fs::File::open("/dev/null").expect("/dev/null");
        assert!(!is_vnet_tap(file.as_fd()));
    }
}
