//! A table of TCP flows, with what is asked of both kinds and whose turn it is: `tcp.rs` has one of those that cross the
//! TAP, `join.rs` one of those that do not.
//!
//! Flows are looked after when something has happened to them ([`Flows::mark`]), once per turn of the engine. Those with
//! data that may not go yet ([`crate::rate`]) are held until their bucket has something again. Then those of both tables
//! are looked after in one line, since the bucket is one: first who got nothing the last time, in the order in which they
//! have waited.

use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::os::fd::BorrowedFd;

use smoltcp::time::Instant;

use crate::config::QUEUE_SLACK;
use crate::flow::{FlowId, FlowKey, Slab};
use crate::flowlog::{Account, EachFlow, FlowEventKind};
use crate::host;
use crate::policy::Transport;
use crate::shared::{Shared, Token};

/// What every flow has.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) key: FlowKey,
    /// It came from outside.
    pub(crate) inbound: bool,
    pub(crate) account: Account,
    /// Its beginning was told, so its end will be.
    told: bool,
    /// In the list of those that something happened to.
    dirty: bool,
    /// In the lists of those that wait until more may go.
    held: [bool; 2],
    /// Counted among those that share the buckets.
    shares: [bool; 2],
}

impl Entry {
    pub(crate) fn new(key: FlowKey, inbound: bool, now: Instant) -> Self {
        Self {
            key,
            inbound,
            account: Account::new(now),
            told: false,
            dirty: false,
            held: [false; 2],
            shares: [false; 2],
        }
    }

    /// Tells that the flow begins, by its present name, unless that was told.
    pub(crate) fn tell_begin(&mut self, sh: &Shared) {
        if !std::mem::replace(&mut self.told, true) {
            sh.tell(Transport::Tcp, self.inbound, self.key, FlowEventKind::Opened);
        }
    }

    /// Tells that the flow ends, if its beginning was told. By another name it may begin again.
    pub(crate) fn tell_end(&mut self, sh: &Shared, now: Instant, why: &'static str) {
        if std::mem::take(&mut self.told) {
            sh.tell(Transport::Tcp, self.inbound, self.key, self.account.closed(now, why));
        }
    }
}

/// A TCP flow, whichever way it goes.
pub(crate) trait TcpFlow {
    fn entry(&self) -> &Entry;
    fn entry_mut(&mut self) -> &mut Entry;
    /// Its stream sockets.
    fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>>;
    /// Whether data from the guest, to its end, has not been passed on. The end may still have to come.
    fn owes(&self) -> bool;
    /// Whether it is known that one side has said something that the other was not given.
    fn holds_data(&self) -> bool;
    /// Bytes from the guest that have been passed on.
    fn passed_on(&self) -> u64;
}

/// Flows that wait until more data may go one way.
#[derive(Debug, Default)]
struct Held {
    /// The last time it was not for them: they come first.
    hungry: Vec<(u64, FlowId)>,
    served: Vec<(u64, FlowId)>,
}

/// Where a flow that was held stands in the line: whether it was served the last time, and when it began to wait.
pub(crate) type Place = (bool, u64);

impl Held {
    fn len(&self) -> usize {
        self.hungry.len() + self.served.len()
    }
}

/// The table. Ways are in this order: from the guest, and to it.
#[derive(Debug)]
pub(crate) struct Flows<F> {
    slab: Slab<F>,
    /// Those that something has happened to; some are gone by now.
    dirty: VecDeque<FlowId>,
    /// How many of them are.
    gone: usize,
    held: [Held; 2],
}

impl<F> Default for Flows<F> {
    fn default() -> Self {
        Self { slab: Slab::default(), dirty: VecDeque::new(), gone: 0, held: Default::default() }
    }
}

impl<F> Deref for Flows<F> {
    type Target = Slab<F>;

    fn deref(&self) -> &Slab<F> {
        &self.slab
    }
}

impl<F> DerefMut for Flows<F> {
    fn deref_mut(&mut self) -> &mut Slab<F> {
        &mut self.slab
    }
}

impl<F: TcpFlow> Flows<F> {
    pub(crate) fn insert(&mut self, sh: &mut Shared, flow: F) -> FlowId {
        sh.set_tcp_flows(sh.tcp_flows + 1);
        self.slab.insert_with(|_| flow)
    }

    pub(crate) fn remove(&mut self, sh: &mut Shared, id: FlowId) -> Option<F> {
        let flow = self.take(id)?;
        sh.set_tcp_flows(sh.tcp_flows - 1);
        let [sent, received] = flow.entry().shares;
        sh.sent.count_sharer(sent, false);
        sh.received.count_sharer(received, false);
        sh.descriptor_freed = true;
        Some(flow)
    }

    fn take(&mut self, id: FlowId) -> Option<F> {
        let flow = self.slab.remove(id)?;
        self.gone += usize::from(flow.entry().dirty);
        // While the TAP takes no frames nobody is looked after, but flows come and go.
        if self.gone > self.slab.len() + QUEUE_SLACK {
            let slab = &self.slab;
            self.dirty.retain(|&id| slab.get(id).is_some());
            self.gone = 0;
        }
        Some(flow)
    }

    /// Something has happened to a flow.
    pub(crate) fn mark(&mut self, id: FlowId) {
        if let Some(flow) = self.slab.get_mut(id)
            && !std::mem::replace(&mut flow.entry_mut().dirty, true)
        {
            self.dirty.push_back(id);
        }
    }

    /// Whether something has happened to any that is there.
    pub(crate) fn have_work(&self) -> bool {
        self.dirty.len() > self.gone
    }

    /// A turn for each that something has happened to by now, those counted that are gone.
    pub(crate) fn turn(&self) -> usize {
        self.dirty.len()
    }

    /// The next of them, which is to be looked after now: what happens from here on marks it again, behind the others.
    /// `turn` is what is left of the [`turn`](Self::turn): none has two, unless many go meanwhile.
    pub(crate) fn next_marked(&mut self, turn: &mut usize) -> Option<FlowId> {
        loop {
            *turn = turn.checked_sub(1)?;
            let id = self.dirty.pop_front()?;
            if let Some(flow) = self.slab.get_mut(id) {
                flow.entry_mut().dirty = false;
                return Some(id);
            }
            self.gone = self.gone.saturating_sub(1);
        }
    }

    /// A flow had more to move than it did, the ways that are `wanted`: it waits where the bucket is dry. Whether it need
    /// not. Who was `served` lets others go first the next time.
    pub(crate) fn wait(&mut self, sh: &mut Shared, id: FlowId, wanted: [bool; 2], served: [bool; 2]) -> bool {
        let mut again = false;
        for way in 0..2 {
            let Some(flow) = self.slab.get_mut(id) else { return false };
            let before = std::mem::replace(&mut flow.entry_mut().shares[way], wanted[way]);
            let bucket = if way == 0 { &mut sh.sent } else { &mut sh.received };
            bucket.count_sharer(before, wanted[way]);
            if wanted[way] && bucket.is_dry() {
                sh.waits += 1;
                self.hold(sh.waits, id, way, served[way]);
            } else {
                again |= wanted[way];
            }
        }
        again
    }

    /// Lets a flow wait until more data may go. `since` grows from one to the next, of both tables.
    fn hold(&mut self, since: u64, id: FlowId, way: usize, served: bool) {
        let Self { slab, held, .. } = self;
        let (Some(held), Some(flow)) = (held.get_mut(way), slab.get_mut(id)) else { return };
        if std::mem::replace(&mut flow.entry_mut().held[way], true) {
            return;
        }
        if held.len() >= 2 * slab.len() + QUEUE_SLACK {
            // Most of them are gone.
            held.hungry.retain(|&(_, id)| slab.get(id).is_some());
            held.served.retain(|&(_, id)| slab.get(id).is_some());
        }
        if served { held.served.push((since, id)) } else { held.hungry.push((since, id)) }
    }

    /// Puts the flows whose data may go on into `line`. The caller looks after them: [`Held`] forgets them.
    pub(crate) fn release(
        &mut self,
        sh: &Shared,
        line: &mut Vec<(Place, Token)>,
        token: impl Fn(FlowId) -> Token,
    ) {
        for (way, dry) in [sh.sent.is_dry(), sh.received.is_dry()].into_iter().enumerate() {
            let Some(held) = self.held.get_mut(way).filter(|held| !dry && held.len() > 0) else { continue };
            let Held { hungry, served } = std::mem::take(held);
            for (list, was_served) in [(hungry, false), (served, true)] {
                for (since, id) in list {
                    if let Some(flow) = self.slab.get_mut(id) {
                        flow.entry_mut().held[way] = false;
                        line.push(((was_served, since), token(id)));
                    }
                }
            }
        }
    }

    /// Whether some wait until more data may go, each way.
    pub(crate) fn wait_for_tokens(&self) -> [bool; 2] {
        self.held.each_ref().map(|held| held.len() > 0)
    }

    /// How many are counted among those that share the buckets.
    #[cfg(test)]
    pub(crate) fn sharers(&self) -> [usize; 2] {
        [0, 1].map(|way| self.slab.iter().filter(|(_, flow)| flow.entry().shares[way]).count())
    }

    /// What the flow `id` is called.
    pub(crate) fn key(&self, id: FlowId) -> Option<FlowKey> {
        self.slab.get(id).map(|flow| flow.entry().key)
    }

    /// Everything that has been told of.
    pub(crate) fn each(&self, each: &mut EachFlow<'_>) {
        for entry in self.slab.iter().map(|(_, flow)| flow.entry()).filter(|entry| entry.told) {
            each(Transport::Tcp, entry.inbound, entry.key, &entry.account);
        }
    }

    /// Whether there are connections whose data from the guest, to its end, has not been passed on.
    pub(crate) fn are_owed(&self) -> bool {
        self.slab.iter().any(|(_, flow)| flow.owes())
    }

    /// Bytes from the guest that have been passed on for the flows that there are.
    pub(crate) fn passed_on(&self) -> u64 {
        self.slab.iter().map(|(_, flow)| flow.passed_on()).sum()
    }

    /// Has the end of a flow's sockets be a reset if somebody said more than was passed on, or may have: the guest is
    /// `gone`, and its end has not been passed on. Of how many flows it is.
    pub(crate) fn reset_if_owed(&mut self, gone: bool) -> usize {
        let cut = self.slab.values_mut().filter(|flow| gone && flow.owes() || flow.holds_data());
        cut.map(|flow| {
            flow.sockets().for_each(host::reset_on_close);
            flow.entry_mut().account.cut = true;
        })
        .count()
    }

    /// Has the end of every socket be a reset.
    pub(crate) fn reset_on_close(&self) {
        self.slab.iter().flat_map(|(_, flow)| flow.sockets()).for_each(host::reset_on_close);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Endpoint;

    struct Plain(Entry);

    impl TcpFlow for Plain {
        fn entry(&self) -> &Entry {
            &self.0
        }

        fn entry_mut(&mut self) -> &mut Entry {
            &mut self.0
        }

        fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
            std::iter::empty()
        }

        fn owes(&self) -> bool {
            false
        }

        fn holds_data(&self) -> bool {
            false
        }

        fn passed_on(&self) -> u64 {
            self.0.account.sent.bytes
        }
    }

    #[test]
    fn a_flow_has_one_turn_however_often_it_is_marked_and_the_next_behind_the_others() {
        let mut flows = Flows::<Plain>::default();
        let end = Endpoint::new([192, 0, 2, 1].into(), 80);
        let key = FlowKey { guest: end, remote: end };
        let ids = [(); 4].map(|()| flows.slab.insert_with(|_| Plain(Entry::new(key, false, Instant::ZERO))));
        let [first, gone, second, quiet] = ids;
        for id in [first, gone, first, second, gone] {
            flows.mark(id);
        }
        assert!(flows.take(gone).is_some());
        let mut turn = flows.turn();
        assert_eq!((turn, flows.next_marked(&mut turn)), (3, Some(first)));
        flows.mark(first);
        flows.mark(gone);
        assert_eq!(flows.next_marked(&mut turn), Some(second));
        // Who is gone leaves its turn to nobody.
        assert_eq!((flows.next_marked(&mut turn), flows.turn()), (None, 1));
        flows.mark(quiet);
        turn = flows.turn();
        assert_eq!([(); 3].map(|()| flows.next_marked(&mut turn)), [Some(first), Some(quiet), None]);
        assert_eq!((flows.turn(), flows.gone), (0, 0));
    }

    #[test]
    fn who_is_gone_has_no_work_and_takes_no_room() {
        let mut flows = Flows::<Plain>::default();
        let end = Endpoint::new([192, 0, 2, 1].into(), 80);
        let add = |flows: &mut Flows<Plain>| {
            let entry = Entry::new(FlowKey { guest: end, remote: end }, false, Instant::ZERO);
            let id = flows.slab.insert_with(|_| Plain(entry));
            flows.mark(id);
            id
        };
        let stays = add(&mut flows);
        for _ in 0..1_000 {
            let goes = add(&mut flows);
            assert!(flows.take(goes).is_some() && flows.have_work());
            assert!(flows.dirty.len() <= 2 + QUEUE_SLACK + 1, "{}", flows.dirty.len());
        }
        let mut turn = flows.turn();
        assert_eq!(flows.next_marked(&mut turn), Some(stays));
        assert!(!flows.have_work());
        assert!(flows.turn() > 0, "those that are gone");
        assert_eq!((flows.next_marked(&mut turn), flows.turn(), flows.gone), (None, 0, 0));
    }
}
