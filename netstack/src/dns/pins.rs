//! Which names our own DNS has resolved to which addresses: what a rule by name needs to know, since a packet has only
//! an address. Pure data.
//!
//! A pin is made for the name that the guest asked for (or for whose services it asked), not for the names that lead from
//! it to the address: whoever controls a zone can write an alias to any name. It holds as long as the answer that it came
//! with may be kept (its time to live), and [`PIN_GRACE`] longer, because programs connect some time after they have
//! asked. The names of the spec are pinned for ever.
//!
//! A record of a service (SVCB, HTTPS) may leave its addresses to another name, its target, which the guest then asks
//! for in a query of its own (RFC 9460 section 3). So it is remembered, for as long, which names lead to a target; what
//! is pinned to the target is known by those names, too, and so on if they are targets themselves. That is found out when
//! an address is looked up: so it does not matter which of the answers came first, or which came from the cache. The
//! spec's word for a target is not its word for the names that lead there.
//!
//! Bounded twice: [`MAX_PINS`] in all, of which those that end first give way, and [`MAX_PIN_NAMES`] for one address,
//! since whoever runs a zone can lead any number of names to an address. The same bounds hold for targets. With what leads
//! to the names of an address it is known by [`MAX_KNOWN_NAMES`].

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use smoltcp::time::{Duration, Instant};

use crate::config::{MAX_KNOWN_NAMES, MAX_PIN_NAMES, MAX_PINS, PIN_GRACE};

#[derive(Debug)]
struct Pin {
    /// In lower case, without the dot at the end; bytes that are no letters, digits, hyphens or underscores are written
    /// `\123` (RFC 1035 section 5.1).
    name: Arc<str>,
    /// `None`: for ever.
    until: Option<Instant>,
}

impl Pin {
    fn holds(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| now < until)
    }
}

/// Names by what they lead to.
#[derive(Debug)]
struct Table<K> {
    by: HashMap<K, Vec<Pin>>,
    /// All of them together.
    count: usize,
}

impl<K> Default for Table<K> {
    fn default() -> Self {
        Self { by: HashMap::new(), count: 0 }
    }
}

/// The tables.
#[derive(Debug, Default)]
pub(crate) struct Pins {
    by_ip: Table<IpAddr>,
    by_target: Table<Arc<str>>,
}

impl Pins {
    /// The names that were resolved to `ip`.
    pub(crate) fn names(&self, now: Instant, ip: IpAddr) -> impl Iterator<Item = &str> {
        self.by_ip.get(now, &ip).map(|pin| &*pin.name)
    }

    /// The names that the guest may have meant by `ip`, those that lead to its names among them; each with whether the
    /// spec says so.
    pub(crate) fn known(&self, now: Instant, ip: IpAddr) -> impl Iterator<Item = (&Arc<str>, bool)> {
        let own = self.by_ip.get(now, &ip).map(|pin| (&pin.name, pin.until.is_none()));
        own.chain(self.leading(now, ip).into_iter().map(|name| (name, false)))
    }

    /// The names that lead to those of `ip`. Each flow of the guest's asks, and zones say how many there are: each is looked
    /// up once, and nothing is made while there are no targets.
    fn leading(&self, now: Instant, ip: IpAddr) -> Vec<&Arc<str>> {
        if self.by_target.count == 0 {
            return Vec::new();
        }
        let mut known: Vec<&Arc<str>> = self.by_ip.get(now, &ip).map(|pin| &pin.name).collect();
        let own = known.len();
        let mut seen: HashSet<&str> = known.iter().map(|name| &***name).collect();
        let mut next = 0;
        while known.len() < MAX_KNOWN_NAMES
            && let Some(&target) = known.get(next)
        {
            let further =
                self.by_target.get(now, target).map(|pin| &pin.name).filter(|name| seen.insert(name));
            known.extend(further.take(MAX_KNOWN_NAMES - known.len()));
            next += 1;
        }
        known.split_off(own)
    }

    /// Pins `name` to `ip` for `ttl`, or for ever; whether other pins that hold had to give way.
    pub(crate) fn pin(&mut self, now: Instant, name: &Arc<str>, ip: IpAddr, ttl: Option<Duration>) -> bool {
        self.by_ip.pin(now, name, ip, ttl)
    }

    /// Has `name` lead to what `target` is pinned to, for `ttl`; whether others that hold had to give way.
    pub(crate) fn lead(&mut self, now: Instant, name: &Arc<str>, target: Arc<str>, ttl: Duration) -> bool {
        *name != target && self.by_target.pin(now, name, target, Some(ttl))
    }

    /// Time has passed that `now` does not show: the host was suspended.
    pub(crate) fn grow_older(&mut self, by: Duration) {
        self.by_ip.grow_older(by);
        self.by_target.grow_older(by);
    }

    #[cfg(test)]
    pub(crate) fn check_bounds(&self) {
        self.by_ip.check_bounds();
        self.by_target.check_bounds();
    }
}

impl<K: Eq + Hash> Table<K> {
    /// What holds of what leads to `key`.
    fn get<'a>(&'a self, now: Instant, key: &K) -> impl Iterator<Item = &'a Pin> + use<'a, K> {
        let pins = self.by.get(key).map(Vec::as_slice).unwrap_or_default();
        pins.iter().filter(move |pin| pin.holds(now))
    }

    /// [`Pins::pin`].
    fn pin(&mut self, now: Instant, name: &Arc<str>, key: K, ttl: Option<Duration>) -> bool {
        let until = ttl.map(|ttl| now + ttl + PIN_GRACE);
        if let Some(pin) = self.by.get_mut(&key).and_then(|pins| pins.iter_mut().find(|p| p.name == *name)) {
            pin.until = pin.until.zip(until).map(|(a, b)| a.max(b));
            return false;
        }
        let mut lost = self.count >= MAX_PINS && self.make_room(now);
        let pins = self.by.entry(key).or_default();
        if pins.len() >= MAX_PIN_NAMES
            && let Some(first) =
                (0..pins.len()).filter(|&i| pins[i].until.is_some()).min_by_key(|&i| pins[i].until)
        {
            lost |= pins.swap_remove(first).holds(now);
            self.count -= 1;
        }
        pins.push(Pin { name: Arc::clone(name), until });
        self.count += 1;
        lost
    }

    fn grow_older(&mut self, by: Duration) {
        for pin in self.by.values_mut().flatten() {
            // What is then before the beginning of time ends there.
            let left = |until: Instant| if until - Instant::ZERO > by { until - by } else { Instant::ZERO };
            pin.until = pin.until.map(left);
        }
    }

    /// Removes what has ended, and if that is not enough, a sixteenth; whether any of them still held.
    fn make_room(&mut self, now: Instant) -> bool {
        let mut ends: Vec<Instant> =
            self.by.values().flatten().filter_map(|pin| pin.until).filter(|until| *until > now).collect();
        let mut limit = now;
        if ends.len() >= MAX_PINS - MAX_PINS / 16 {
            limit = *ends.select_nth_unstable(MAX_PINS / 16).1;
        }
        for pins in self.by.values_mut() {
            pins.retain(|pin| pin.until.is_none_or(|until| until > limit));
        }
        self.by.retain(|_, pins| !pins.is_empty());
        self.count = self.by.values().map(Vec::len).sum();
        limit > now
    }

    #[cfg(test)]
    fn check_bounds(&self) {
        assert_eq!(self.count, self.by.values().map(Vec::len).sum::<usize>());
        assert!(self.count <= MAX_PINS && self.by.values().all(|pins| pins.len() <= MAX_PIN_NAMES));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(s: u64) -> Instant {
        Instant::ZERO + Duration::from_secs(s)
    }

    fn ip(n: usize) -> IpAddr {
        IpAddr::from(u32::try_from(n).expect("small").to_be_bytes())
    }

    fn names(pins: &Pins, s: u64, address: IpAddr) -> Vec<&str> {
        pins.names(at(s), address).collect()
    }

    const MINUTE: Option<Duration> = Some(Duration::from_secs(60));

    #[test]
    fn a_pin_holds_for_the_time_to_live_and_the_grace() {
        let mut pins = Pins::default();
        let grace = PIN_GRACE.secs();
        pins.pin(at(0), &"a.example".into(), ip(1), MINUTE);
        pins.pin(at(0), &"own".into(), ip(1), None);
        assert_eq!(names(&pins, 59 + grace, ip(1)), ["a.example", "own"]);
        assert_eq!(names(&pins, 60 + grace, ip(1)), ["own"]);
        assert!(names(&pins, 0, ip(2)).is_empty());
    }

    #[test]
    fn a_new_answer_lengthens_a_pin_and_never_shortens_it() {
        let mut pins = Pins::default();
        let name: Arc<str> = "a.example".into();
        let grace = PIN_GRACE.secs();
        pins.pin(at(0), &name, ip(1), MINUTE);
        pins.pin(at(30), &name, ip(1), MINUTE);
        pins.pin(at(31), &name, ip(1), Some(Duration::ZERO));
        assert_eq!(names(&pins, 89 + grace, ip(1)), ["a.example"]);
        assert!(names(&pins, 90 + grace, ip(1)).is_empty());
        pins.pin(at(0), &name, ip(1), None);
        assert_eq!(names(&pins, 1_000_000, ip(1)), ["a.example"], "for ever is longer than any time");
        pins.pin(at(0), &name, ip(1), MINUTE);
        assert_eq!(names(&pins, 1_000_000, ip(1)), ["a.example"]);
    }

    #[test]
    fn time_that_the_clock_does_not_show_counts() {
        let mut pins = Pins::default();
        pins.pin(at(100), &"a.example".into(), ip(1), MINUTE);
        pins.pin(at(100), &"own".into(), ip(1), None);
        pins.grow_older(PIN_GRACE);
        assert_eq!(names(&pins, 159, ip(1)), ["a.example", "own"]);
        assert_eq!(names(&pins, 160, ip(1)), ["own"]);
        pins.grow_older(Duration::from_secs(1_000_000));
        assert_eq!(names(&pins, 100, ip(1)), ["own"]);
        pins.check_bounds();
    }

    #[test]
    fn the_table_is_bounded_and_what_ends_first_gives_way() {
        let mut pins = Pins::default();
        pins.pin(at(0), &"own".into(), ip(0), None);
        let mut lost = false;
        for i in 0..3 * MAX_PINS {
            // Later ones end earlier.
            let ttl = Duration::from_secs(u64::try_from(4 * MAX_PINS - i).expect("small"));
            lost |= pins.pin(at(0), &"a.example".into(), ip(i + 1), Some(ttl));
            if i % 500 == 0 {
                pins.check_bounds();
            }
        }
        pins.check_bounds();
        assert!(lost);
        assert_eq!(names(&pins, 0, ip(1)), ["a.example"]);
        assert_eq!(names(&pins, 0, ip(0)), ["own"]);
        // What has ended gives way before anything that holds.
        let later = 4 * u64::try_from(MAX_PINS).expect("small") + PIN_GRACE.secs();
        for i in 0..MAX_PINS - 2 {
            assert!(!pins.pin(at(later), &"b.example".into(), ip(i + 1), MINUTE));
        }
    }

    #[test]
    fn an_address_has_a_bounded_number_of_names() {
        let mut pins = Pins::default();
        pins.pin(at(0), &"own".into(), ip(1), None);
        for i in 0..10 * MAX_PIN_NAMES {
            pins.pin(at(i as u64), &format!("{i}.example").into(), ip(1), MINUTE);
            pins.check_bounds();
        }
        let names = names(&pins, 0, ip(1));
        assert_eq!(names.len(), MAX_PIN_NAMES);
        assert!(names.contains(&"own") && names.contains(&&*format!("{}.example", 10 * MAX_PIN_NAMES - 1)));
    }

    fn known(pins: &Pins, s: u64, address: IpAddr) -> Vec<(&str, bool)> {
        pins.known(at(s), address).map(|(name, by_spec)| (&**name, by_spec)).collect()
    }

    #[test]
    fn names_that_lead_to_a_name_of_an_address_are_names_of_it() {
        let mut pins = Pins::default();
        let lead = |pins: &mut Pins, s, name: &str, target: &str| {
            pins.lead(at(s), &name.into(), target.into(), Duration::from_secs(60))
        };
        // Whatever came first; in a circle, too.
        lead(&mut pins, 0, "b.example", "c.example");
        pins.pin(at(0), &"c.example".into(), ip(1), None);
        assert_eq!(known(&pins, 0, ip(2)), []);
        lead(&mut pins, 1, "a.example", "b.example");
        lead(&mut pins, 2, "c.example", "a.example");
        lead(&mut pins, 2, "c.example", "c.example");
        let all = [("c.example", true), ("b.example", false), ("a.example", false)];
        assert_eq!(known(&pins, 0, ip(1)), all);
        assert_eq!(names(&pins, 0, ip(1)), ["c.example"]);
        assert!(known(&pins, 0, ip(2)).is_empty());
        // As long as every step holds.
        let grace = PIN_GRACE.secs();
        assert_eq!(known(&pins, 59 + grace, ip(1)), all);
        assert_eq!(known(&pins, 60 + grace, ip(1)), all[..1]);
        pins.grow_older(Duration::from_secs(10));
        assert_eq!(known(&pins, 50 + grace, ip(1)), all[..1]);
        pins.check_bounds();
    }

    #[test]
    fn without_targets_nothing_is_made_for_a_lookup() {
        let mut pins = Pins::default();
        pins.pin(at(0), &"a.example".into(), ip(1), MINUTE);
        assert_eq!(pins.leading(at(0), ip(1)).capacity(), 0);
        // Nor twice what is there in two ways.
        for target in ["a.example", "b.example"] {
            pins.pin(at(0), &target.into(), ip(2), MINUTE);
            pins.lead(at(0), &"c.example".into(), target.into(), Duration::from_secs(60));
        }
        assert_eq!(pins.leading(at(0), ip(2)).len(), 1);
    }

    #[test]
    fn what_leads_to_an_address_is_bounded() {
        let mut pins = Pins::default();
        pins.pin(at(0), &"0".into(), ip(1), None);
        let mut lost = false;
        // Sixteen names for each name.
        for i in 1..3 * MAX_PINS {
            let target = ((i - 1) / MAX_PIN_NAMES).to_string();
            lost |= pins.lead(at(0), &i.to_string().into(), target.into(), Duration::from_secs(60));
        }
        pins.check_bounds();
        assert!(lost);
        let mut pins = Pins::default();
        pins.pin(at(0), &"0".into(), ip(1), None);
        for i in 1..10 * MAX_KNOWN_NAMES {
            let target = ((i - 1) / MAX_PIN_NAMES).to_string();
            assert!(!pins.lead(at(0), &i.to_string().into(), target.into(), Duration::from_secs(60)));
        }
        assert_eq!(known(&pins, 0, ip(1)).len(), MAX_KNOWN_NAMES);
    }
}
