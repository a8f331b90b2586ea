//! Answers that are kept for as long as they say (RFC 1035 section 7.4, RFC 2308 for negative ones).
//!
//! Bounded by number and by bytes. When it is full the sixteenth of the answers that has not been used for longest gives
//! way, what has expired first of all. Nothing wakes up to remove what has expired: it is not used, and gives way.

use std::collections::HashMap;

use smoltcp::time::{Duration, Instant};

use super::message::Stored;
use crate::config::{MAX_DNS_CACHE, MAX_DNS_CACHE_BYTES};

/// What an entry takes beside its answer and its key.
const OVERHEAD: usize = 128;

#[derive(Debug)]
struct Entry {
    stored: Stored,
    since: Instant,
    until: Instant,
    used: Instant,
}

/// The answers, by what they depend on ([`Question::key`](super::message::Question::key)).
#[derive(Debug, Default)]
pub(crate) struct Cache {
    entries: HashMap<Box<[u8]>, Entry>,
    bytes: usize,
}

fn size(key: &[u8], stored: &Stored) -> usize {
    key.len() + stored.size() + OVERHEAD
}

impl Cache {
    /// The answer for `key`, and the seconds since it came.
    pub(crate) fn get(&mut self, now: Instant, key: &[u8]) -> Option<(&Stored, u32)> {
        let entry = self.entries.get_mut(key).filter(|entry| now < entry.until)?;
        entry.used = now;
        let age = u32::try_from((now - entry.since).secs()).unwrap_or(u32::MAX);
        Some((&entry.stored, age))
    }

    /// Keeps an answer for `ttl` seconds, if it is worth it.
    pub(crate) fn insert(&mut self, now: Instant, key: &[u8], stored: Stored, ttl: u32) {
        let size = size(key, &stored);
        // One answer must not push everybody else's out.
        if ttl == 0 || size > MAX_DNS_CACHE_BYTES / 8 {
            return;
        }
        self.remove(key);
        while self.entries.len() >= MAX_DNS_CACHE || self.bytes + size > MAX_DNS_CACHE_BYTES {
            self.make_room(now);
        }
        let until = now + Duration::from_secs(ttl.into());
        self.entries.insert(key.into(), Entry { stored, since: now, until, used: now });
        self.bytes += size;
    }

    fn remove(&mut self, key: &[u8]) {
        if let Some(entry) = self.entries.remove(key) {
            self.bytes -= size(key, &entry.stored);
        }
    }

    fn make_room(&mut self, now: Instant) {
        // Expired ones have been used before the beginning of time.
        let rank = |entry: &Entry| if entry.until <= now { Instant::ZERO } else { entry.used };
        let mut ranks: Vec<Instant> = self.entries.values().map(rank).collect();
        let some = ranks.len() / 16;
        let limit = if ranks.is_empty() { now } else { *ranks.select_nth_unstable(some).1 };
        // Many may have been used at the same time: no more of them than it takes.
        let mut equal = some + 1;
        let bytes = &mut self.bytes;
        self.entries.retain(|key, entry| {
            let rank = rank(entry);
            let goes = rank == Instant::ZERO || rank < limit || rank == limit && equal > 0;
            if goes {
                equal = equal.saturating_sub(1);
                *bytes -= size(key, &entry.stored);
            }
            !goes
        });
    }

    /// Forgets everything: other resolvers may say something else.
    pub(crate) fn clear(&mut self) {
        self.entries.clear();
        self.bytes = 0;
    }

    #[cfg(test)]
    pub(crate) fn check_bounds(&self) {
        let bytes: usize = self.entries.iter().map(|(key, entry)| size(key, &entry.stored)).sum();
        assert_eq!(bytes, self.bytes);
        assert!(self.entries.len() <= MAX_DNS_CACHE && bytes <= MAX_DNS_CACHE_BYTES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(s: u64) -> Instant {
        Instant::from_secs(1_000) + Duration::from_secs(s)
    }

    fn stored(len: usize) -> Stored {
        Stored { message: vec![0; len].into(), ttls: Box::default(), code: 0 }
    }

    #[test]
    fn an_answer_is_there_until_its_time_is_up() {
        let mut cache = Cache::default();
        cache.insert(at(0), b"a", stored(50), 10);
        cache.insert(at(0), b"b", stored(50), 0);
        assert_eq!(cache.get(at(0), b"a"), Some((&stored(50), 0)));
        assert_eq!(cache.get(at(9), b"a"), Some((&stored(50), 9)));
        assert_eq!(cache.get(at(10), b"a"), None);
        assert_eq!(cache.get(at(0), b"b"), None);
        cache.insert(at(20), b"a", stored(60), 10);
        assert_eq!(cache.get(at(21), b"a"), Some((&stored(60), 1)));
        cache.check_bounds();
        cache.clear();
        assert_eq!(cache.get(at(21), b"a"), None);
        cache.check_bounds();
    }

    #[test]
    fn what_is_used_stays_and_what_has_expired_goes_first() {
        let mut cache = Cache::default();
        let key = |i: usize| i.to_be_bytes();
        for i in 0..MAX_DNS_CACHE {
            let ttl = if i % 2 == 0 { 10 } else { 1_000_000 };
            cache.insert(at(0), &key(i), stored(50), ttl);
        }
        cache.insert(at(20), &key(MAX_DNS_CACHE), stored(50), 1_000);
        assert!((0..MAX_DNS_CACHE).all(|i| cache.get(at(20), &key(i)).is_some() == (i % 2 == 1)));
        for i in 0..4 * MAX_DNS_CACHE {
            let now = at(21 + i as u64);
            cache.insert(now, &key(MAX_DNS_CACHE + i), stored(50), 1_000_000);
            assert!(cache.get(now, &key(1)).is_some(), "it has just been used");
        }
        cache.check_bounds();
        assert!(cache.get(at(20_000), &key(3)).is_none());
    }

    #[test]
    fn long_answers_count_for_what_they_are() {
        let mut cache = Cache::default();
        for i in 0..1_000usize {
            cache.insert(at(0), &i.to_be_bytes(), stored(20_000), 100);
            cache.check_bounds();
        }
        cache.insert(at(0), b"huge", stored(MAX_DNS_CACHE_BYTES), 100);
        assert_eq!(cache.get(at(0), b"huge"), None);
        assert!(cache.get(at(0), &999usize.to_be_bytes()).is_some());
    }
}
