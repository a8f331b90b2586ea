//! Sockets of smoltcp and their rings, the largest of which are used again.

use crate::config::{LARGEST_RING, RING_POOL, RINGS};
use crate::sys::{RingSocket, Rings};

/// Pages of a finished or idle flow that moved more than this go back to the kernel.
pub(super) const KEEP_WARM: usize = 64 * 1024;

/// Rings that wait for the next flow.
#[derive(Debug, Default)]
pub(super) struct Pool(Vec<Rings>);

impl Pool {
    /// A socket for a flow beside so many others.
    pub(super) fn socket(&mut self, others: usize) -> Option<RingSocket> {
        let (_, ring) = RINGS.into_iter().find(|(most, _)| others <= *most)?;
        let pooled = if ring == LARGEST_RING { self.0.pop() } else { None };
        let rings = match pooled {
            Some(rings) => rings,
            None => Rings::map(ring)
                .inspect_err(|error| tracing::warn!(%error, "no memory for a TCP connection"))
                .ok()?,
        };
        let mut socket = RingSocket::new(rings);
        socket.configure(timestamp_clock);
        Some(socket)
    }

    /// Keeps the rings of a flow that moved so many bytes for the next one, if they are good enough.
    pub(super) fn give_back(&mut self, mut rings: Rings, moved: usize) {
        if self.0.len() < RING_POOL && rings.capacity() == LARGEST_RING {
            if moved > KEEP_WARM {
                rings.release_pages();
            }
            self.0.push(rings);
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

/// Clock of TCP timestamps: milliseconds (RFC 7323 section 5.4 wants 1 ms to 1 s).
fn timestamp_clock() -> u32 {
    use nix::time::{ClockId, clock_gettime};
    let Ok(now) = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE) else { return 0 };
    let millis = now.tv_sec().wrapping_mul(1000).wrapping_add(now.tv_nsec() / 1_000_000);
    u32::try_from(millis & i64::from(u32::MAX)).unwrap_or_default()
}
