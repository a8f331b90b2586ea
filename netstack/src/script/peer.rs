//! The ends of connections: the guest's, played segment by segment, and the host's, which are real.

use smoltcp::wire::{IpAddress, TcpTimestampRepr};

use super::*;

/// One end of a connection, played by the script.
pub(super) struct Peer {
    pub(super) guest: (IpAddr, u16),
    pub(super) remote: (IpAddr, u16),
    pub(super) seq: i32,
    pub(super) ack: i32,
    pub(super) mss: u16,
    pub(super) window: u16,
    pub(super) window_scale: Option<u8>,
}

impl Peer {
    pub(super) fn new(is_v6: bool, port: u16) -> Self {
        let (guest, remote) = if is_v6 { (GUEST_V6, GATEWAY_V6) } else { (GUEST_V4, GATEWAY_V4) };
        Self {
            guest: (ip(guest), 40_000),
            remote: (ip(remote), port),
            seq: 1_000_000,
            ack: 0,
            mss: if is_v6 { 1440 } else { 1460 },
            window: 60_000,
            window_scale: Some(7),
        }
    }

    pub(super) fn segment(&self, control: TcpControl, payload: &[u8]) -> Vec<u8> {
        let syn = control == TcpControl::Syn;
        let repr = TcpRepr {
            src_port: self.guest.1,
            dst_port: self.remote.1,
            control,
            seq_number: TcpSeqNumber(self.seq),
            ack_number: (self.ack != 0).then_some(TcpSeqNumber(self.ack)),
            window_len: self.window,
            window_scale: self.window_scale.filter(|_| syn),
            max_seg_size: syn.then_some(self.mss),
            sack_permitted: syn,
            sack_ranges: [None; 3],
            timestamp: Some(TcpTimestampRepr::new(1, 0)),
            payload,
        };
        let (src, dst): (IpAddress, IpAddress) = (self.guest.0.into(), self.remote.0.into());
        let mut segment = vec![0; repr.buffer_len()];
        let mut packet = TcpPacket::new_unchecked(&mut segment[..]);
        repr.emit(&mut packet, &src, &dst, &smoltcp::phy::ChecksumCapabilities::default());
        ingress::rebuild(self.guest.0, self.remote.0, ingress::TCP, 64, &segment)
    }

    pub(super) fn send(&mut self, script: &mut Script, control: TcpControl, payload: &[u8]) {
        script.send_ip(&self.segment(control, payload));
        let control_len = i32::from(matches!(control, TcpControl::Syn | TcpControl::Fin));
        self.seq = self.seq.wrapping_add(i32::try_from(payload.len()).expect("length") + control_len);
        script.settle();
    }

    /// The handshake; the SYN-ACK.
    pub(super) fn open(&mut self, script: &mut Script) -> Out {
        self.send(script, TcpControl::Syn, b"");
        let frame = script.expect_tcp("SYN-ACK", |segment| segment.syn() && segment.ack());
        assert_eq!(frame.tcp().ack_number(), TcpSeqNumber(self.seq));
        self.ack = frame.tcp().seq_number().0.wrapping_add(1);
        self.send(script, TcpControl::None, b"");
        frame
    }

    /// Acknowledges a segment of data that came in order.
    pub(super) fn take(&mut self, script: &mut Script, frame: &Out) -> usize {
        let segment = frame.tcp();
        assert_eq!(segment.seq_number(), TcpSeqNumber(self.ack), "in order, and only once");
        let len = segment.payload().len();
        self.ack = self.ack.wrapping_add(i32::try_from(len).expect("length"));
        self.send(script, TcpControl::None, b"");
        len
    }
}

pub(super) fn listener(is_v6: bool) -> (TcpListener, u16) {
    let listener = TcpListener::bind(if is_v6 { "[::1]:0" } else { "127.0.0.1:0" }).expect("listener");
    let port = listener.local_addr().expect("address").port();
    (listener, port)
}

/// The next connection. That nobody connects is a failure, not a test that never ends.
pub(super) fn accept(listener: &TcpListener) -> TcpStream {
    use nix::poll::{PollFd, PollFlags, poll};
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, 10_000u16), Ok(1), "nobody connects");
    let stream = listener.accept().expect("connection").0;
    stream.set_read_timeout(Some(std::time::Duration::from_secs(10))).expect("time-out");
    stream
}

/// A listener whose queue is full: whoever connects now waits until somebody is accepted.
pub(super) struct Busy {
    pub(super) listener: TcpListener,
    pub(super) port: u16,
    _queued: Vec<TcpStream>,
}

impl Busy {
    pub(super) fn new() -> Self {
        let (listener, port) = listener(false);
        // Shortens the queue of a socket that listens already.
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).expect("backlog"))
            .expect("listen");
        // A queue of no length holds one.
        let queued = vec![TcpStream::connect(("127.0.0.1", port)).expect("connect")];
        Self { listener, port, _queued: queued }
    }
}
