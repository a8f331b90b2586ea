//! What smoltcp 0.14 does not do by itself, or does too often: to be looked at again with another version of it. What
//! concerns a single line stands beside that line, and says 0.14.

use smoltcp::iface::Interface;
use smoltcp::socket::tcp::State;
use smoltcp::time::Instant;
use smoltcp::wire::TcpPacket;

use super::TURN_SEGMENTS;
use super::guest::Numbers;
use crate::device::FlowDevice;
use crate::emit;
use crate::flow::FlowKey;
use crate::ingress::{self, Packet};
use crate::sys::RingSocket;

/// Sends what a socket has to send; how many segments that were.
pub(super) fn send_segments(
    socket: &mut RingSocket,
    iface: &mut Interface,
    now: Instant,
    device: &mut FlowDevice<'_>,
) -> usize {
    // In FIN-WAIT-2 there is nothing to send but an acknowledgement. smoltcp sends it without end if the window was closed
    // when the FIN was acknowledged, since that does not stop its timer for window probes.
    let most = if socket.state() == State::FinWait2 { 1 } else { TURN_SEGMENTS };
    (0..most).take_while(|_| socket.poll_egress(iface, now, device)).count()
}

/// A segment of data with a FIN, as one of the data and one of the FIN. smoltcp 0.14 cuts off what lies behind the end of
/// its window and takes the FIN that follows all the same: the cut would be lost, and nobody would know. A FIN alone it
/// takes only where its data ends.
pub(super) fn fin_apart(packet: &Packet<'_>, segment: &TcpPacket<&[u8]>) -> [Vec<u8>; 2] {
    let rebuild =
        |segment: &[u8]| ingress::rebuild(packet.src, packet.dst, ingress::TCP, packet.hop_limit, segment);
    let whole = packet.payload();
    let mut data = whole.to_vec();
    TcpPacket::new_unchecked(&mut data[..]).set_fin(false);
    let mut fin = whole.get(..usize::from(segment.header_len())).unwrap_or(whole).to_vec();
    TcpPacket::new_unchecked(&mut fin[..]).set_seq_number(segment.seq_number() + segment.payload().len());
    [rebuild(&data), rebuild(&fin)]
}

/// Whether `segment` says nothing but that it still waits for our FIN, if its acknowledgement is neither a new one nor that
/// of the FIN. After three of them smoltcp 0.14 looks for the first data to send again. There is none, and the timer that
/// would have brought the FIN again has been stopped: it would never come. Without them, it comes when its time is up.
///
/// That of the FIN may have been heard and still be news to smoltcp: the first may have come with the guest's own FIN when
/// that came again, in which smoltcp looks at nothing.
pub(super) fn only_fin_is_missing(socket: &RingSocket, segment: &TcpPacket<&[u8]>) -> bool {
    matches!(socket.state(), State::FinWait1 | State::Closing | State::LastAck)
        && socket.send_queue() == 0
        && segment.payload().is_empty()
        && !(segment.syn() || segment.fin() || segment.rst())
}

/// What makes smoltcp 0.14 go on where data waits and no timer runs: acknowledgements of the guest's, which say again what
/// it has acknowledged, and that its window is closed.
///
/// There is no timer after one for retransmission that found the window closed: then they start that for window probes.
/// Nor is there one for data under way after one for window probes that found the window open again: then they are the
/// three that say that something was lost, after which it is sent, whatever the window is. The first one is for nothing
/// but to differ from the next, as only what is the same counts. The guest's answer tells what its window really is.
pub(super) fn reminder(key: FlowKey, numbers: &Numbers) -> Option<[Vec<u8>; 5]> {
    let (seq, ack) = numbers.of_guest()?;
    let say = |window| emit::bare_segment(key.guest, key.remote, seq, ack, window);
    Some([1, 0, 0, 0, 0].map(say))
}
