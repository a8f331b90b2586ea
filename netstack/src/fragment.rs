//! Fragments: putting the guest's together, and cutting what is too long for the link.
//!
//! Bounds: [`MAX_REASSEMBLIES`] datagrams at once, each of 65,535 bytes at most and of [`MAX_PIECES`] separate pieces,
//! for [`REASSEMBLY`] seconds. When the table is full the oldest datagram gives way. Fragments that overlap end the
//! whole datagram (RFC 5722; for IPv4 too). A repetition, whole or in part, of what has come is no overlap: it says the same.

use std::collections::HashMap;
use std::net::IpAddr;

use smoltcp::time::Instant;

use crate::config::{MAX_REASSEMBLIES, REASSEMBLY};
use crate::device::{Offload, Tap};
use crate::ingress::{self, Fragment, Packet};

const MAX_PIECES: usize = 128;
const MAX_DATAGRAM: usize = 65_535;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    src: IpAddr,
    dst: IpAddr,
    /// Part of the name in IPv4 only.
    protocol: Option<u8>,
    id: u32,
}

#[derive(Debug)]
struct Partial {
    buffer: Vec<u8>,
    /// What has come, as sorted ranges that do not touch.
    pieces: Vec<(usize, usize)>,
    total: Option<usize>,
    /// Of the first fragment.
    header: Option<(u8, u8)>,
    deadline: Instant,
}

/// Datagrams of which fragments are missing.
#[derive(Debug, Default)]
pub(crate) struct Reassembly {
    partials: HashMap<Key, Partial>,
}

impl Reassembly {
    /// Takes a fragment; the whole datagram with a plain header if it was the last one missing. `Err` if the datagram
    /// was given up.
    pub(crate) fn add(
        &mut self,
        now: Instant,
        packet: &Packet<'_>,
        piece: Fragment,
    ) -> Result<Option<Vec<u8>>, ()> {
        let protocol = (!packet.is_v6()).then_some(packet.protocol);
        let key = Key { src: packet.src, dst: packet.dst, protocol, id: piece.id };
        if !self.partials.contains_key(&key) && self.partials.len() >= MAX_REASSEMBLIES {
            let oldest =
                self.partials.iter().min_by_key(|(_, partial)| partial.deadline).map(|(key, _)| *key);
            if let Some(oldest) = oldest {
                self.partials.remove(&oldest);
            }
        }
        let partial = self.partials.entry(key).or_insert_with(|| Partial {
            buffer: Vec::new(),
            pieces: Vec::new(),
            total: None,
            header: None,
            deadline: now + REASSEMBLY,
        });
        let complete = partial.insert(packet, piece);
        if let Ok(None) = complete {
            return Ok(None);
        }
        let partial = self.partials.remove(&key);
        match (complete, partial) {
            (Ok(Some((protocol, hop_limit))), Some(partial)) => {
                Ok(Some(ingress::rebuild(packet.src, packet.dst, protocol, hop_limit, &partial.buffer)))
            }
            _ => Err(()),
        }
    }

    #[cfg(test)]
    pub(crate) fn check_bounds(&self) {
        assert!(self.partials.len() <= MAX_REASSEMBLIES);
        assert!(self.partials.values().all(|partial| partial.buffer.len() <= MAX_DATAGRAM));
    }

    /// Forgets what has waited too long; when to ask again.
    pub(crate) fn expire(&mut self, now: Instant) -> Option<Instant> {
        self.partials.retain(|_, partial| partial.deadline > now);
        self.partials.values().map(|partial| partial.deadline).min()
    }
}

impl Partial {
    /// `Ok(Some(..))` if the datagram is complete: its protocol and hop limit.
    fn insert(&mut self, packet: &Packet<'_>, piece: Fragment) -> Result<Option<(u8, u8)>, ()> {
        let data = packet.payload();
        let (start, end) = (piece.offset, piece.offset + data.len());
        let aligned = !piece.more || data.len().is_multiple_of(8);
        if data.is_empty() || !aligned || end > MAX_DATAGRAM - 20 {
            return Err(());
        }
        if !piece.more {
            if self.total.is_some_and(|total| total != end) {
                return Err(());
            }
            self.total = Some(end);
        }
        if self.total.is_some_and(|total| end > total || self.buffer.len() > total) {
            return Err(());
        }
        if start == 0 {
            self.header = Some((packet.protocol, packet.hop_limit));
        }
        let at = self.pieces.partition_point(|&(from, _)| from < start);
        let before = at.checked_sub(1).and_then(|i| self.pieces.get(i)).copied();
        let after = self.pieces.get(at).copied();
        let repeats = |(from, to): (usize, usize)| {
            from <= start && end <= to && self.buffer.get(start..end) == Some(data)
        };
        if before.is_some_and(repeats) || after.is_some_and(repeats) {
            return Ok(None);
        }
        if before.is_some_and(|(_, to)| to > start) || after.is_some_and(|(from, _)| from < end) {
            return Err(());
        }
        if self.buffer.len() < end {
            self.buffer.resize(end, 0);
        }
        self.buffer[start..end].copy_from_slice(data);
        let joins_before = before.is_some_and(|(_, to)| to == start);
        let joins_after = after.is_some_and(|(from, _)| from == end);
        match (joins_before, joins_after) {
            (true, true) => {
                self.pieces[at - 1].1 = self.pieces[at].1;
                self.pieces.remove(at);
            }
            (true, false) => self.pieces[at - 1].1 = end,
            (false, true) => self.pieces[at].0 = start,
            (false, false) if self.pieces.len() >= MAX_PIECES => return Err(()),
            (false, false) => self.pieces.insert(at, (start, end)),
        }
        let whole = self.total.is_some_and(|total| self.pieces == [(0, total)]);
        Ok(self.header.filter(|_| whole))
    }
}

/// Sends a datagram whose payload (the transport header included, its checksum complete) is too long for the link.
pub(crate) fn send_fragmented(tap: &mut Tap, src: IpAddr, dst: IpAddr, protocol: u8, payload: &[u8]) {
    let is_v6 = dst.is_ipv6();
    let id = tap.next_ipv4_ident();
    let headers = if is_v6 { 48 } else { 20 };
    let step = (tap.mtu - headers) & !7;
    for (index, piece) in payload.chunks(step).enumerate() {
        let offset = index * step;
        let more = offset + piece.len() < payload.len();
        let len = headers + piece.len();
        let packet = tap.packet_mut(len);
        if is_v6 {
            ingress::write_ip_header(packet, src, dst, 44, 64);
            let field = u16::try_from(offset).unwrap_or(u16::MAX) & !7 | u16::from(more);
            packet[40] = protocol;
            packet[42..44].copy_from_slice(&field.to_be_bytes());
            packet[46..48].copy_from_slice(&id.to_be_bytes());
        } else {
            ingress::write_ip_header(packet, src, dst, protocol, 64);
            let mut ip = smoltcp::wire::Ipv4Packet::new_unchecked(&mut *packet);
            ip.set_dont_frag(false);
            ip.set_ident(id);
            ip.set_more_frags(more);
            ip.set_frag_offset(u16::try_from(offset).unwrap_or(u16::MAX));
            ip.fill_checksum();
        }
        packet[headers..].copy_from_slice(piece);
        tap.send_ip(len, Offload::NONE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ingress::tests::Seeded;
    use smoltcp::time::Duration;

    const V6: [&str; 2] = ["fd00::100", "2001:db8::1"];
    const V4: [&str; 2] = ["10.0.2.100", "192.0.2.1"];

    fn packet<'a>(ends: [&str; 2], payload: &'a [u8]) -> Packet<'a> {
        Packet {
            bytes: payload,
            src: ends[0].parse().expect("address"),
            dst: ends[1].parse().expect("address"),
            protocol: 17,
            hop_limit: 64,
            payload_at: 0,
            fragment: None,
            checksum_pending: false,
            datagram_size: None,
        }
    }

    fn piece(offset: usize, more: bool) -> Fragment {
        Fragment { id: 7, offset, more }
    }

    fn payload_of(datagram: &[u8]) -> Vec<u8> {
        ingress::parse_ip(datagram, false).expect("datagram").payload().to_vec()
    }

    #[test]
    fn pieces_in_any_order_make_the_datagram() {
        let data: Vec<u8> = (0..=255).cycle().take(4000).collect();
        for ends in [V4, V6] {
            let mut random = Seeded(0x5eed_0002);
            for _ in 0..50 {
                let mut pieces: Vec<usize> = (0..10).collect();
                for i in (1..10).rev() {
                    pieces.swap(i, random.below(i + 1));
                }
                let mut table = Reassembly::default();
                let mut whole = None;
                for at in pieces.iter().map(|i| i * 400) {
                    assert!(whole.is_none());
                    let part = packet(ends, &data[at..at + 400]);
                    whole = table.add(Instant::ZERO, &part, piece(at, at != 3600)).expect("accepted");
                }
                assert_eq!(payload_of(&whole.expect("complete")), data);
                assert!(table.partials.is_empty());
            }
        }
    }

    #[test]
    fn overlap_ends_the_datagram_and_repetition_does_not() {
        let mut table = Reassembly::default();
        let now = Instant::ZERO;
        assert_eq!(table.add(now, &packet(V4, &[1; 16]), piece(0, true)), Ok(None));
        assert_eq!(table.add(now, &packet(V4, &[1; 16]), piece(0, true)), Ok(None), "the same again");
        assert_eq!(table.add(now, &packet(V4, &[2; 16]), piece(8, true)), Err(()));
        assert!(table.partials.is_empty(), "nothing of it is left");
    }

    #[test]
    fn impossible_pieces_are_refused() {
        let mut table = Reassembly::default();
        let now = Instant::ZERO;
        assert_eq!(table.add(now, &packet(V4, &[1; 15]), piece(0, true)), Err(()), "not a multiple of eight");
        assert_eq!(table.add(now, &packet(V4, &[]), piece(8, false)), Err(()), "empty");
        assert_eq!(
            table.add(now, &packet(V4, &[1; 64]), piece(65_528, false)),
            Err(()),
            "longer than a packet"
        );
        assert_eq!(table.add(now, &packet(V4, &[1; 8]), piece(16, false)), Ok(None));
        assert_eq!(table.add(now, &packet(V4, &[1; 8]), piece(32, true)), Err(()), "behind the end");
    }

    #[test]
    fn memory_and_time_are_bounded() {
        let mut table = Reassembly::default();
        for id in 0..10_000 {
            let now = Instant::ZERO + Duration::from_millis(u64::from(id));
            let place = Fragment { id, offset: 8, more: true };
            assert_eq!(table.add(now, &packet(V6, &[1; 8]), place), Ok(None));
        }
        assert_eq!(table.partials.len(), MAX_REASSEMBLIES);
        assert!(table.expire(Instant::ZERO + Duration::from_secs(100)).is_none());
        assert!(table.partials.is_empty());
        // One datagram in 8,000 pieces that do not touch.
        let mut given_up = false;
        for at in 0..4_000 {
            given_up |= table.add(Instant::ZERO, &packet(V4, &[1; 8]), piece(at * 16, true)).is_err();
        }
        assert!(given_up);
    }
}
