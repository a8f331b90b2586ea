//! What all kinds of flows share: their names, a table that notices stale names, and the queue of timers.

use std::collections::{BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};

use smoltcp::time::Instant;

use crate::config::QUEUE_SLACK;

/// An address and port, without the scope and flow label that `SocketAddr` carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Endpoint {
    pub(crate) ip: IpAddr,
    pub(crate) port: u16,
}

impl Endpoint {
    pub(crate) fn new(ip: IpAddr, port: u16) -> Self {
        Self { ip, port }
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(addr: SocketAddr) -> Self {
        Self { ip: addr.ip(), port: addr.port() }
    }
}

impl From<Endpoint> for SocketAddr {
    fn from(end: Endpoint) -> Self {
        Self::new(end.ip, end.port)
    }
}

impl From<Endpoint> for smoltcp::wire::IpEndpoint {
    fn from(end: Endpoint) -> Self {
        Self::new(end.ip.into(), end.port)
    }
}

/// A flow as the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct FlowKey {
    pub(crate) guest: Endpoint,
    pub(crate) remote: Endpoint,
}

/// Name of an entry of a [`Slab`]. Never valid again once its entry is gone, so that an event or a timer that was
/// under way cannot meet the next flow in the same place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct FlowId {
    index: u32,
    generation: u32,
}

/// Generations fit into an epoll token beside the index and the kind.
const GENERATIONS: u32 = 1 << 24;

impl FlowId {
    pub(crate) fn pack(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    pub(crate) fn unpack(bits: u64) -> Self {
        let [_, g2, g1, g0, i3, i2, i1, i0] = bits.to_be_bytes();
        Self { index: u32::from_be_bytes([i3, i2, i1, i0]), generation: u32::from_be_bytes([0, g2, g1, g0]) }
    }
}

/// A table with stable names.
#[derive(Debug)]
pub(crate) struct Slab<T> {
    entries: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { entries: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    pub(crate) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    pub(crate) fn insert_with(&mut self, make: impl FnOnce(FlowId) -> T) -> FlowId {
        if let Some(index) = self.free.pop()
            && let Some((generation, slot)) = self.entries.get_mut(index as usize)
        {
            let id = FlowId { index, generation: *generation };
            *slot = Some(make(id));
            return id;
        }
        let index = u32::try_from(self.entries.len()).expect("limits keep tables far below 2^32 entries");
        let id = FlowId { index, generation: 0 };
        self.entries.push((0, Some(make(id))));
        id
    }

    pub(crate) fn get(&self, id: FlowId) -> Option<&T> {
        let (generation, slot) = self.entries.get(id.index as usize)?;
        slot.as_ref().filter(|_| *generation == id.generation)
    }

    pub(crate) fn get_mut(&mut self, id: FlowId) -> Option<&mut T> {
        let (generation, slot) = self.entries.get_mut(id.index as usize)?;
        slot.as_mut().filter(|_| *generation == id.generation)
    }

    pub(crate) fn remove(&mut self, id: FlowId) -> Option<T> {
        let (generation, slot) = self.entries.get_mut(id.index as usize)?;
        if *generation != id.generation {
            return None;
        }
        let value = slot.take()?;
        *generation = (*generation + 1) % GENERATIONS;
        self.free.push(id.index);
        Some(value)
    }

    /// The sixteenth of the entries, one at least, that come first by `key`. To make room in a full table for that many
    /// new entries at once is cheaper than to look for the first one each time.
    pub(crate) fn first_by<K: Ord>(&self, key: impl Fn(&T) -> K) -> Vec<FlowId> {
        let mut all: Vec<(K, FlowId)> = self.iter().map(|(id, value)| (key(value), id)).collect();
        let some = (all.len() / 16).max(1);
        if all.len() > some {
            all.select_nth_unstable(some);
            all.truncate(some);
        }
        all.into_iter().map(|(_, id)| id).collect()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (FlowId, &T)> {
        (0u32..).zip(&self.entries).filter_map(|(index, (generation, slot))| {
            slot.as_ref().map(|value| (FlowId { index, generation: *generation }, value))
        })
    }

    pub(crate) fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.entries.iter_mut().filter_map(|(_, slot)| slot.as_mut())
    }
}

/// Puts one at the end of a queue whose members are not taken out when they need not be there any more. `live` of them
/// at most are to be kept: what is too many for them goes, so that a queue costs what is alive and not what there has been.
pub(crate) fn enqueue<T>(queue: &mut VecDeque<T>, value: T, live: usize, keep: impl Fn(&T) -> bool) {
    if queue.len() >= 2 * live + QUEUE_SLACK {
        queue.retain(keep);
    }
    queue.push_back(value);
}

/// What a timer belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum TimerKey {
    Tcp(FlowId),
    Udp,
    Ping,
    Dns(FlowId),
    Reassembly,
    Accept,
    Router,
    Rate,
    Join,
}

impl TimerKey {
    /// A timer that one table has for all its entries, which come and go faster than they expire.
    fn of_a_table(self) -> Option<usize> {
        match self {
            Self::Udp => Some(0),
            Self::Ping => Some(1),
            Self::Reassembly => Some(2),
            Self::Accept => Some(3),
            Self::Router => Some(4),
            Self::Rate => Some(5),
            Self::Join => Some(6),
            Self::Tcp(_) | Self::Dns(_) => None,
        }
    }
}

/// Timers, earliest first: one for each flow or query at most, and one for each table, so that their number is bounded
/// like that of what they belong to.
///
/// The owner of a flow's timer keeps its time, and cancels it when it sets an earlier one or ends. It does not set a later
/// one: when the timer fires, the owner finds that it is not due, and sets another. So a busy flow costs one entry per
/// second or so, not one per packet, and an idle one costs nothing.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    queue: BTreeSet<(Instant, TimerKey)>,
    tables: [Option<Instant>; 7],
}

impl Timers {
    /// Sets a timer. That of a table is left as it is if it comes early enough.
    pub(crate) fn set(&mut self, at: Instant, key: TimerKey) {
        if let Some(timer) = key.of_a_table().and_then(|table| self.tables.get_mut(table)) {
            match timer.replace(at) {
                Some(earlier) if earlier <= at => {
                    *timer = Some(earlier);
                    return;
                }
                Some(later) => self.queue.remove(&(later, key)),
                None => false,
            };
        }
        self.queue.insert((at, key));
    }

    /// Takes a flow's timer back.
    pub(crate) fn cancel(&mut self, at: Instant, key: TimerKey) {
        self.queue.remove(&(at, key));
    }

    pub(crate) fn next_at(&self) -> Option<Instant> {
        self.queue.first().map(|(at, _)| *at)
    }

    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<TimerKey> {
        if self.next_at()? > now {
            return None;
        }
        let (_, key) = self.queue.pop_first()?;
        if let Some(timer) = key.of_a_table().and_then(|table| self.tables.get_mut(table)) {
            *timer = None;
        }
        Some(key)
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.queue.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ingress::tests::Seeded;
    use smoltcp::time::Duration;
    use std::collections::HashMap;

    #[test]
    fn a_name_dies_with_its_entry() {
        let mut slab = Slab::default();
        let first = slab.insert_with(|_| "first");
        assert_eq!(slab.remove(first), Some("first"));
        let second = slab.insert_with(|_| "second");
        assert_ne!(first, second);
        assert!(slab.get(first).is_none() && slab.remove(first).is_none());
        assert_eq!(slab.get(second), Some(&"second"));
        assert_eq!(slab.len(), 1);
    }

    #[test]
    fn the_first_sixteenth_is_what_comes_first() {
        let mut slab = Slab::default();
        for i in 0..64 {
            slab.insert_with(|_| (i * 37) % 64);
        }
        let mut first: Vec<i32> =
            slab.first_by(|value| *value).into_iter().filter_map(|id| slab.get(id).copied()).collect();
        first.sort_unstable();
        assert_eq!(first, [0, 1, 2, 3]);
        assert!(Slab::<i32>::default().first_by(|value| *value).is_empty());
    }

    #[test]
    fn a_queue_holds_what_is_alive_in_its_order_and_not_what_there_has_been() {
        let mut queue = VecDeque::new();
        let live = |value: &u32| value.is_multiple_of(1_000);
        for value in 0..100_000 {
            enqueue(&mut queue, value, 100, live);
            assert!(queue.len() <= 2 * 100 + QUEUE_SLACK, "{}", queue.len());
        }
        queue.retain(live);
        assert!(queue.into_iter().eq((0..100).map(|value| value * 1_000)));
    }

    #[test]
    fn names_survive_packing() {
        let mut slab = Slab::default();
        for round in 0..300 {
            let id = slab.insert_with(|_| round);
            assert_eq!(FlowId::unpack(id.pack()), id);
            assert_eq!(FlowId::unpack(id.pack() | 0x7f << 56), id, "the kind's byte is not part of the name");
            slab.remove(id);
        }
    }

    #[test]
    fn timers_fire_in_order_and_not_early() {
        let mut timers = Timers::default();
        let at = |s| Instant::ZERO + Duration::from_secs(s);
        timers.set(at(2), TimerKey::Reassembly);
        timers.set(at(1), TimerKey::Udp);
        assert_eq!(timers.pop_due(at(0)), None);
        assert_eq!(timers.pop_due(at(5)), Some(TimerKey::Udp));
        assert_eq!(timers.pop_due(at(1)), None);
        assert_eq!(timers.next_at(), Some(at(2)));
    }

    #[test]
    fn a_table_has_one_timer_and_a_cancelled_one_does_not_fire() {
        let mut timers = Timers::default();
        let at = |s| Instant::ZERO + Duration::from_secs(s);
        for s in [5, 3, 4, 3] {
            timers.set(at(s), TimerKey::Reassembly);
        }
        assert_eq!((timers.len(), timers.next_at()), (1, Some(at(3))));
        assert_eq!(timers.pop_due(at(3)), Some(TimerKey::Reassembly));
        assert_eq!(timers.pop_due(at(9)), None);
        timers.set(at(10), TimerKey::Reassembly);
        assert_eq!(timers.pop_due(at(10)), Some(TimerKey::Reassembly));
        let flow = TimerKey::Tcp(FlowId::unpack(7));
        timers.set(at(11), flow);
        timers.cancel(at(11), flow);
        assert_eq!((timers.len(), timers.pop_due(at(12))), (0, None));
    }

    /// Where a sequence of random operations begins; `NETSTACK_SEED` chooses a single one.
    fn seeds() -> Vec<u64> {
        let chosen = std::env::var("NETSTACK_SEED").ok().and_then(|text| text.parse().ok());
        chosen.map_or_else(|| (0x5eed_2000..0x5eed_2000 + 32).collect(), |seed| vec![seed])
    }

    /// Flows as TCP and UDP keep them: the table, and beside it the index by key. The model is a plain list of all that
    /// was ever inserted.
    #[test]
    fn random_operations_leave_what_a_plain_list_would_have() {
        struct Entry {
            id: FlowId,
            key: FlowKey,
            value: u64,
            alive: bool,
        }
        for seed in seeds() {
            println!("seed {seed}");
            let mut random = Seeded(seed);
            let mut slab: Slab<(FlowKey, u64)> = Slab::default();
            let mut by_key: HashMap<FlowKey, FlowId> = HashMap::new();
            let mut model: Vec<Entry> = Vec::new();
            let mut most = 0;
            // Growing, shrinking, and growing again: slots are used many times.
            for round in 0..3_000usize {
                let growing = round / 500 % 2 == 0;
                match random.below(10) {
                    0..=3 => {
                        let end = |random: &mut Seeded, is_v6: bool| {
                            let last = random.byte() % 8;
                            let v4 = IpAddr::from([10, 0, 2, last]);
                            let v6 = IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, u16::from(last)]);
                            Endpoint::new(if is_v6 { v6 } else { v4 }, 1 + u16::from(random.byte() % 16))
                        };
                        let is_v6 = random.below(2) == 0;
                        let key = FlowKey { guest: end(&mut random, is_v6), remote: end(&mut random, is_v6) };
                        let known = model.iter().any(|entry| entry.alive && entry.key == key);
                        assert_eq!(by_key.contains_key(&key), known);
                        if known || !growing && random.below(3) != 0 {
                            continue;
                        }
                        let value = random.next();
                        let mut told = None;
                        let id = slab.insert_with(|id| {
                            told = Some(id);
                            (key, value)
                        });
                        assert_eq!(told, Some(id), "an entry knows its own name");
                        assert!(model.iter().all(|entry| entry.id != id), "no name is given twice");
                        by_key.insert(key, id);
                        model.push(Entry { id, key, value, alive: true });
                    }
                    4..=6 if !model.is_empty() && (!growing || random.below(3) == 0) => {
                        // Often one that is gone already.
                        let at = random.below(model.len());
                        let entry = &mut model[at];
                        let removed = slab.remove(entry.id);
                        assert_eq!(removed, entry.alive.then_some((entry.key, entry.value)));
                        if removed.is_some() {
                            assert_eq!(by_key.remove(&entry.key), Some(entry.id));
                        }
                        entry.alive = false;
                    }
                    7 if !model.is_empty() => {
                        let at = random.below(model.len());
                        let entry = &mut model[at];
                        let value = random.next();
                        if let Some((_, kept)) = slab.get_mut(entry.id) {
                            assert!(entry.alive);
                            *kept = value;
                            entry.value = value;
                        } else {
                            assert!(!entry.alive);
                        }
                    }
                    8 if random.below(20) == 0 => {
                        // Room is made: the sixteenth with the least values goes.
                        let first = slab.first_by(|(_, value)| *value);
                        let mut values: Vec<u64> =
                            model.iter().filter(|entry| entry.alive).map(|entry| entry.value).collect();
                        values.sort_unstable();
                        values.truncate((values.len() / 16).max(1));
                        let mut gone: Vec<u64> = Vec::new();
                        for id in first {
                            let (key, value) = slab.remove(id).expect("an entry of the table");
                            assert_eq!(by_key.remove(&key), Some(id));
                            gone.push(value);
                        }
                        gone.sort_unstable();
                        assert_eq!(gone, values);
                        for entry in model.iter_mut().filter(|entry| gone.contains(&entry.value)) {
                            entry.alive = false;
                        }
                    }
                    _ => {}
                }
                let alive = model.iter().filter(|entry| entry.alive).count();
                most = most.max(alive);
                assert_eq!((slab.len(), by_key.len()), (alive, alive));
                // What was freed is used again before the table grows.
                assert!(slab.entries.len() <= most);
                let Some(entry) = model.get(random.below(model.len())) else { continue };
                let expected = entry.alive.then_some((entry.key, entry.value));
                assert_eq!(slab.get(entry.id).copied(), expected);
                assert_eq!(slab.get(FlowId::unpack(entry.id.pack())).copied(), expected);
            }
            assert!(most > 50 && model.len() > most + 200, "{most} of {}", model.len());
            let mut left: Vec<(FlowId, u64)> = slab.iter().map(|(id, (_, value))| (id, *value)).collect();
            let mut expected: Vec<(FlowId, u64)> =
                model.iter().filter(|entry| entry.alive).map(|entry| (entry.id, entry.value)).collect();
            left.sort_unstable();
            expected.sort_unstable();
            assert_eq!(left, expected);
        }
    }

    /// Timers as their owners use them. The model is a list of who wants to be woken when.
    #[test]
    fn random_timers_fire_once_in_order_and_as_early_as_anybody_asked() {
        const TABLES: [TimerKey; 5] =
            [TimerKey::Udp, TimerKey::Ping, TimerKey::Reassembly, TimerKey::Accept, TimerKey::Router];
        for seed in seeds() {
            println!("seed {seed}");
            let mut random = Seeded(seed);
            let mut timers = Timers::default();
            let mut model: Vec<(Instant, TimerKey)> = Vec::new();
            let mut now = Instant::from_secs(1_000);
            let (mut fired, mut cancelled) = (0, 0);
            for _ in 0..3_000 {
                let at = now + Duration::from_millis(random.next() % 5_000);
                let flow = FlowId::unpack(random.next() % 32);
                let flow = if random.below(2) == 0 { TimerKey::Tcp(flow) } else { TimerKey::Dns(flow) };
                let wanted = model.iter().position(|(_, key)| *key == flow);
                match (random.below(8), wanted) {
                    (0..3, None) => {
                        timers.set(at, flow);
                        model.push((at, flow));
                    }
                    // An owner takes its timer back before it sets an earlier one.
                    (0..3, Some(i)) if at < model[i].0 => {
                        timers.cancel(model[i].0, flow);
                        timers.set(at, flow);
                        model[i].0 = at;
                    }
                    (3, Some(i)) => {
                        timers.cancel(model.swap_remove(i).0, flow);
                        cancelled += 1;
                    }
                    // Nothing to take back: what is there stays.
                    (3, None) => timers.cancel(at, flow),
                    (4..6, _) => {
                        let key = TABLES[random.below(TABLES.len())];
                        timers.set(at, key);
                        match model.iter_mut().find(|(_, other)| *other == key) {
                            Some((earlier, _)) => *earlier = at.min(*earlier),
                            None => model.push((at, key)),
                        }
                    }
                    _ => {
                        now += Duration::from_millis(random.next() % 500);
                        while let Some(key) = timers.pop_due(now) {
                            let i = model.iter().position(|(_, other)| *other == key).expect("was set");
                            let (at, _) = model.swap_remove(i);
                            assert!(at <= now && model.iter().all(|(other, _)| *other >= at));
                            fired += 1;
                        }
                        assert!(model.iter().all(|(at, _)| *at > now), "nothing that is due is left");
                    }
                }
                assert_eq!(timers.next_at(), model.iter().map(|(at, _)| *at).min());
                assert_eq!(timers.len(), model.len());
            }
            assert!(fired > 300 && cancelled > 20, "{fired} {cancelled}");
        }
    }
}
