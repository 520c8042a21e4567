//! Bounded room that callers share: when it is full, whoever has most of it gives some back.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use hauberk_core::identity::SpiffeId;
use tokio::sync::oneshot;

use super::{Caller, Origin};

/// What callers hold, oldest first. `capacity` bounds it in all, `share` for one identity of one origin.
#[derive(Debug)]
pub(super) struct Room<T> {
    capacity: usize,
    share: usize,
    held: usize,
    origins: HashMap<Origin, OfOrigin<T>>,
    /// Origins by how much they hold. Of those with as much, the one that came last is first.
    by_size: BTreeSet<(usize, Reverse<u64>, Origin)>,
}

#[derive(Debug)]
struct OfOrigin<T> {
    held: usize,
    /// The highest number of what it brought.
    latest: u64,
    identities: HashMap<Option<SpiffeId>, BTreeMap<u64, T>>,
}

impl<T> Room<T> {
    pub(super) fn new(capacity: usize, share: usize) -> Self {
        Self { capacity, share, held: 0, origins: HashMap::new(), by_size: BTreeSet::new() }
    }

    /// Takes one in, under a number that no other has: the lower, the older. Returns what had to give way for it: the
    /// oldest of the caller, if it has its share, or of the identity that holds most at the origin that holds most. That
    /// may be this very one.
    pub(super) fn insert(&mut self, caller: &Caller, number: u64, value: T) -> Option<T> {
        let of_identity = self.change(&caller.origin, |of_origin| {
            of_origin.held += 1;
            of_origin.latest = of_origin.latest.max(number);
            let values = of_origin.identities.entry(caller.identity.clone()).or_default();
            values.insert(number, value);
            values.len()
        });
        self.held += 1;
        if of_identity > self.share {
            self.remove_oldest(&caller.origin, &caller.identity)
        } else if self.held > self.capacity {
            self.largest().and_then(|(origin, identity)| self.remove_oldest(&origin, &identity))
        } else {
            None
        }
    }

    /// Takes one out, unless it had to give way before.
    pub(super) fn remove(&mut self, caller: &Caller, number: u64) -> Option<T> {
        self.take(&caller.origin, &caller.identity, |values| values.remove(&number))
    }

    fn remove_oldest(&mut self, origin: &Origin, identity: &Option<SpiffeId>) -> Option<T> {
        self.take(origin, identity, |values| Some(values.pop_first()?.1))
    }

    fn take(
        &mut self,
        origin: &Origin,
        identity: &Option<SpiffeId>,
        take: impl FnOnce(&mut BTreeMap<u64, T>) -> Option<T>,
    ) -> Option<T> {
        if !self.origins.contains_key(origin) {
            return None;
        }
        let taken = self.change(origin, |of_origin| {
            let values = of_origin.identities.get_mut(identity)?;
            let taken = take(values);
            if values.is_empty() {
                of_origin.identities.remove(identity);
            }
            of_origin.held -= usize::from(taken.is_some());
            taken
        });
        self.held -= usize::from(taken.is_some());
        taken
    }

    /// Changes what an origin holds, and its place among the others.
    fn change<R>(&mut self, origin: &Origin, change: impl FnOnce(&mut OfOrigin<T>) -> R) -> R {
        let of_origin = self.origins.entry(origin.clone()).or_insert_with(|| OfOrigin {
            held: 0,
            latest: 0,
            identities: HashMap::new(),
        });
        let mut key = (of_origin.held, Reverse(of_origin.latest), origin.clone());
        self.by_size.remove(&key);
        let result = change(of_origin);
        if of_origin.held == 0 {
            self.origins.remove(origin);
        } else {
            (key.0, key.1) = (of_origin.held, Reverse(of_origin.latest));
            self.by_size.insert(key);
        }
        result
    }

    /// Who holds most at the origin that holds most. Of those with as much, whoever holds the oldest.
    fn largest(&self) -> Option<(Origin, Option<SpiffeId>)> {
        let (_, _, origin) = self.by_size.last()?;
        let identities = self.origins.get(origin)?.identities.iter();
        let (identity, _) = identities
            .max_by_key(|(_, values)| (values.len(), Reverse(values.keys().next().copied())))?;
        Some((origin.clone(), identity.clone()))
    }

    #[cfg(test)]
    fn held_by(&self, caller: &Caller) -> usize {
        let of_origin = self.origins.get(&caller.origin);
        let values = of_origin.and_then(|of_origin| of_origin.identities.get(&caller.identity));
        values.map_or(0, BTreeMap::len)
    }
}

/// Room for connections. One that has to give way is told.
#[derive(Debug)]
pub struct FairRoom {
    room: Mutex<Room<oneshot::Sender<()>>>,
    next: AtomicU64,
}

impl FairRoom {
    /// Room for `capacity` connections in all, and for `share` of one identity of one origin.
    #[must_use]
    pub fn new(capacity: usize, share: usize) -> Arc<Self> {
        Arc::new(Self { room: Mutex::new(Room::new(capacity, share)), next: AtomicU64::new(0) })
    }

    /// Takes a connection in. If there is no room, another one has to give way: the oldest one of whoever holds
    /// most.
    pub fn enter(self: &Arc<Self>, caller: Arc<Caller>) -> Slot {
        self.enter_as(caller, self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// The same for one whose age the number tells, which no other has.
    pub(super) fn enter_as(self: &Arc<Self>, caller: Arc<Caller>, number: u64) -> Slot {
        let (sender, receiver) = oneshot::channel();
        let displaced = self.lock().insert(&caller, number, sender);
        // It is told by the end of its channel.
        drop(displaced);
        Slot { room: self.clone(), caller, number, told: receiver, is_displaced: false }
    }

    /// Plain data: a panic elsewhere leaves nothing half-changed in it.
    fn lock(&self) -> MutexGuard<'_, Room<oneshot::Sender<()>>> {
        self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a connection holds of a [`FairRoom`], until it is dropped.
#[derive(Debug)]
pub struct Slot {
    room: Arc<FairRoom>,
    caller: Arc<Caller>,
    number: u64,
    told: oneshot::Receiver<()>,
    is_displaced: bool,
}

impl Slot {
    /// Whose it is.
    #[must_use]
    pub fn caller(&self) -> &Arc<Caller> {
        &self.caller
    }

    /// Returns when the connection has to give way. It must end then.
    pub async fn displaced(&mut self) {
        poll_fn(|cx| self.poll_displaced(cx)).await;
    }

    /// The same, to be polled.
    pub fn poll_displaced(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        // Nothing is ever sent.
        if !self.is_displaced && Pin::new(&mut self.told).poll(cx).is_pending() {
            return Poll::Pending;
        }
        self.is_displaced = true;
        Poll::Ready(())
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let held = self.room.lock().remove(&self.caller, self.number);
        drop(held);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(address: &str) -> Caller {
        Caller::at(address.parse().unwrap())
    }

    fn of_node(node: &str, workload: &str) -> Caller {
        let identity = format!("spiffe://example.org/ns/shop/sa/{workload}").parse().unwrap();
        Caller::proven(identity, Some(node.parse().unwrap()), "10.0.0.9".parse().unwrap())
    }

    /// Who has to give way, in order, when these come.
    fn displaced(room: &mut Room<&'static str>, comers: &[(&Caller, &'static str)]) -> Vec<String> {
        let next = room.origins.values().map(|origin| origin.latest + 1).max().unwrap_or(0);
        let displaced = (next..)
            .zip(comers)
            .filter_map(|(number, (caller, name))| room.insert(caller, number, name));
        displaced.map(str::to_owned).collect()
    }

    #[test]
    fn whoever_came_earlier_is_older_however_late_it_speaks() {
        let flood = at("10.0.0.1");
        let mut room = Room::new(2, 10);
        assert_eq!(room.insert(&flood, 7, "honest"), None);
        assert_eq!(room.insert(&flood, 3, "flood"), None);
        assert_eq!(room.insert(&flood, 2, "earlier"), Some("earlier"), "it gives way itself");
        assert_eq!(room.insert(&flood, 4, "later"), Some("flood"));
        assert_eq!(room.insert(&flood, 5, "later still"), Some("later"));
        assert_eq!(room.remove(&flood, 7), Some("honest"));
    }

    #[test]
    fn whoever_holds_most_gives_way_the_oldest_first() {
        let (flood, other) = (at("10.0.0.1"), at("10.0.0.2"));
        let mut room = Room::new(3, 10);
        let first = [(&other, "other"), (&flood, "1"), (&flood, "2")];
        assert!(displaced(&mut room, &first).is_empty());
        let more = [(&flood, "3"), (&flood, "4"), (&other, "other 2"), (&other, "other 3")];
        // With as much as the other has, whoever was here last is spared.
        assert_eq!(displaced(&mut room, &more), ["1", "2", "3", "other"]);
        assert_eq!((room.held_by(&flood), room.held_by(&other)), (1, 2));
    }

    #[test]
    fn many_callers_with_one_each_give_way_the_oldest_first() {
        let mut room = Room::new(2, 10);
        let [a, b, c, d] = ["10.0.0.9", "10.0.0.1", "10.0.0.5", "10.0.0.2"].map(at);
        let all = [(&a, "a"), (&b, "b"), (&c, "c"), (&d, "d")];
        assert_eq!(displaced(&mut room, &all), ["a", "b"]);
    }

    #[test]
    fn an_identity_has_a_share_and_displaces_only_itself_beyond_it() {
        let (greedy, other) = (of_node("a", "greedy"), of_node("a", "other"));
        let mut room = Room::new(100, 2);
        let all = [(&other, "other"), (&greedy, "1"), (&greedy, "2"), (&greedy, "3")];
        assert_eq!(displaced(&mut room, &all), ["1"]);
        assert_eq!((room.held_by(&greedy), room.held_by(&other)), (2, 1));
    }

    #[test]
    fn many_identities_of_one_node_take_nothing_of_anothers() {
        let mut room = Room::new(4, 10);
        let other = of_node("b", "web");
        assert!(displaced(&mut room, &[(&other, "other"), (&other, "other 2")]).is_empty());
        let mut gone = Vec::new();
        for number in 0..20 {
            let identity = of_node("a", &format!("w{number}"));
            gone.extend(displaced(&mut room, &[(&identity, "of a")]));
        }
        assert_eq!(room.held_by(&other), 2);
        assert!(gone.iter().all(|name| name == "of a") && gone.len() == 18, "{gone:?}");
    }

    #[test]
    fn of_one_nodes_identities_the_one_with_most_gives_way() {
        let (greedy, other) = (of_node("a", "greedy"), of_node("a", "other"));
        let mut room = Room::new(4, 10);
        let greed = [(&other, "other"), (&greedy, "1"), (&greedy, "2"), (&greedy, "3")];
        assert!(displaced(&mut room, &greed).is_empty());
        let all = [(&other, "other 2")];
        assert_eq!(displaced(&mut room, &all), ["1"]);
    }

    #[test]
    fn the_newest_is_never_the_one_that_gives_way_and_nothing_is_left_over() {
        let callers = [at("10.0.0.1"), at("10.0.0.2"), of_node("a", "web"), of_node("a", "db")];
        let mut room = Room::new(5, 3);
        let mut held: Vec<(usize, u64)> = Vec::new();
        // Any order will do, as long as it is the same in each run.
        let mut random: usize = 1;
        for step in 0..2_000_u64 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let which = (random >> 33) % callers.len();
            if (random >> 40).is_multiple_of(3) && !held.is_empty() {
                let (caller, number) = held.swap_remove((random >> 45) % held.len());
                assert!(room.remove(&callers[caller], number).is_some());
            }
            let displaced = room.insert(&callers[which], step, step);
            assert_ne!(displaced, Some(step));
            held.retain(|(_, number)| Some(*number) != displaced);
            held.push((which, step));
            assert!(held.len() <= 5 && room.held == held.len());
        }
        for (caller, number) in held {
            assert!(room.remove(&callers[caller], number).is_some());
            assert!(room.remove(&callers[caller], number).is_none());
        }
        assert!(room.origins.is_empty() && room.by_size.is_empty() && room.held == 0);
    }

    #[tokio::test]
    async fn who_gives_way_is_told_as_often_as_it_asks() {
        let room = FairRoom::new(1, 1);
        let caller = Arc::new(at("10.0.0.1"));
        let mut first = room.enter(caller.clone());
        let mut second = room.enter(caller.clone());
        first.displaced().await;
        first.displaced().await;
        assert!(futures_pending(&mut second).await);
        drop((first, second));
        assert_eq!(room.lock().held, 0);
    }

    async fn futures_pending(slot: &mut Slot) -> bool {
        poll_fn(|cx| Poll::Ready(slot.poll_displaced(cx).is_pending())).await
    }
}
