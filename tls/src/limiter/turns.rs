//! Turns: how many handshakes are worked on at once, so that a burst of them is not in the way of open
//! connections. A turn is held for one step of a handshake, never while its peer is waited for.

use std::{
    borrow::Borrow,
    collections::BTreeMap,
    ops::Bound,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use hauberk_core::identity::SpiffeId;
use tokio::sync::oneshot;

use super::{Caller, Origin};

/// Steps at once, where there are fewer processors. Each is some 300 µs of work.
const AT_LEAST: usize = 2;

/// Steps at once. With more of them than processors, everything else would wait behind them.
fn at_once() -> usize {
    std::thread::available_parallelism().map_or(AT_LEAST, usize::from).max(AT_LEAST)
}

/// Who works, and who waits for it.
#[derive(Debug)]
pub(super) struct Turns(Mutex<State>);

#[derive(Debug)]
struct State {
    free: usize,
    waiting: RoundRobin<Origin, RoundRobin<Option<SpiffeId>, Queue>>,
}

/// What waits of one identity, the oldest first.
type Queue = BTreeMap<u64, oneshot::Sender<Turn>>;

/// The keys have their turns one after another.
#[derive(Debug)]
struct RoundRobin<K, V> {
    all: BTreeMap<K, V>,
    last: Option<K>,
}

/// A turn; over when it is dropped.
#[derive(Debug)]
#[must_use = "the turn is over when this is dropped"]
pub struct Turn(Option<Arc<Turns>>);

/// The turns of one caller.
#[derive(Debug)]
pub struct CallerTurns<'a> {
    turns: Arc<Turns>,
    caller: Arc<Caller>,
    number: u64,
    waited: &'a mut Duration,
}

/// One that waits, until it is dropped. It counts for how long.
struct Waiting<'a> {
    turns: &'a Turns,
    caller: &'a Caller,
    number: u64,
    since: Instant,
    waited: &'a mut Duration,
}

impl CallerTurns<'_> {
    /// Waits for a turn: origins have theirs one after another, and so have the identities of an origin. Of what
    /// waits of one of them, the newest is first, as what has waited for long has to give way soon.
    pub async fn turn(&mut self) -> Turn {
        let given = match self.turns.ask(&self.caller, self.number) {
            Asked::Turn(turn) => return turn,
            Asked::Wait(given) => given,
        };
        let waiting = Waiting {
            turns: &self.turns,
            caller: &self.caller,
            number: self.number,
            since: Instant::now(),
            waited: self.waited,
        };
        // The sender does not go without a turn.
        let turn = given.await.unwrap_or(Turn(None));
        // Behind everything else that waits for a thread: under a flood it is accepting connections that must not
        // wait, or the kernel's queue is full, in which all callers are one.
        tokio::task::yield_now().await;
        drop(waiting);
        turn
    }
}

enum Asked {
    Turn(Turn),
    Wait(oneshot::Receiver<Turn>),
}

impl Turns {
    pub(super) fn new() -> Arc<Self> {
        let waiting = RoundRobin::default();
        Arc::new(Self(Mutex::new(State { free: at_once(), waiting })))
    }

    /// The turns of this caller's connection with a number that no other has: the higher, the newer. What it has to wait
    /// for them is added to `waited`.
    pub(super) fn of<'a>(
        self: &Arc<Self>,
        caller: Arc<Caller>,
        number: u64,
        waited: &'a mut Duration,
    ) -> CallerTurns<'a> {
        CallerTurns { turns: self.clone(), caller, number, waited }
    }

    fn ask(self: &Arc<Self>, caller: &Caller, number: u64) -> Asked {
        let mut state = self.lock();
        // Nobody waits while one is free.
        if state.free > 0 {
            state.free -= 1;
            return Asked::Turn(Turn(Some(self.clone())));
        }
        let (sender, receiver) = oneshot::channel();
        let of_origin = state.waiting.all.entry(caller.origin.clone()).or_default();
        let of_identity = of_origin.all.entry(caller.identity.clone()).or_default();
        of_identity.insert(number, sender);
        Asked::Wait(receiver)
    }

    /// Gives a turn that is over to whoever is next.
    fn pass_on(self: Arc<Self>) {
        loop {
            let next = self.lock().next();
            let Some(next) = next else { return };
            // Not under the lock: one that waits no more drops it.
            match next.send(Turn(Some(self.clone()))) {
                Ok(()) => return,
                Err(mut turn) => drop(turn.0.take()),
            }
        }
    }

    /// Plain data: a panic elsewhere leaves nothing half-changed in it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes out who is next. If nobody waits, there is one more turn for whoever comes.
    fn next(&mut self) -> Option<oneshot::Sender<Turn>> {
        let next = self.waiting.next(
            |of_origin| {
                of_origin.next(|of_identity| Some(of_identity.pop_last()?.1), BTreeMap::is_empty)
            },
            |of_origin| of_origin.all.is_empty(),
        );
        self.free += usize::from(next.is_none());
        next
    }
}

impl<K: Ord + Clone, V> RoundRobin<K, V> {
    /// Takes something of the key that is next, and the key out when nothing is left of it.
    fn next<T>(
        &mut self,
        take: impl FnOnce(&mut V) -> Option<T>,
        is_empty: impl FnOnce(&V) -> bool,
    ) -> Option<T> {
        let after = match &self.last {
            Some(last) => (Bound::Excluded(last), Bound::Unbounded),
            None => (Bound::Unbounded, Bound::Unbounded),
        };
        let mut following = self.all.range(after);
        let key = following.next().or_else(|| self.all.first_key_value())?.0.clone();
        let taken = self.change(&key, take, is_empty);
        self.last = Some(key);
        taken
    }

    fn change<T, Q: Ord + ?Sized>(
        &mut self,
        key: &Q,
        change: impl FnOnce(&mut V) -> Option<T>,
        is_empty: impl FnOnce(&V) -> bool,
    ) -> Option<T>
    where
        K: Borrow<Q>,
    {
        let value = self.all.get_mut(key)?;
        let changed = change(value);
        if is_empty(value) {
            self.all.remove(key);
        }
        changed
    }
}

impl<K, V> Default for RoundRobin<K, V> {
    fn default() -> Self {
        Self { all: BTreeMap::new(), last: None }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(turns) = self.0.take() {
            turns.pass_on();
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        *self.waited += self.since.elapsed();
        let Caller { origin, identity } = self.caller;
        let gone = self.turns.lock().waiting.change(
            origin,
            |of_origin| {
                of_origin.change(identity, |queue| queue.remove(&self.number), BTreeMap::is_empty)
            },
            |of_origin| of_origin.all.is_empty(),
        );
        drop(gone);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes all turns that there are.
    async fn all_taken(turns: &Arc<Turns>) -> Vec<Turn> {
        let caller = Arc::new(Caller::at("10.0.0.1".parse().unwrap()));
        let (mut held, mut waited) = (Vec::new(), Duration::ZERO);
        for _ in 0..at_once() {
            held.push(turns.of(caller.clone(), 0, &mut waited).turn().await);
        }
        assert_eq!(waited, Duration::ZERO);
        held
    }

    fn of(node: &str, workload: &str) -> Arc<Caller> {
        let identity = format!("spiffe://example.org/ns/shop/sa/{workload}").parse().unwrap();
        let address = "10.0.0.9".parse().unwrap();
        Arc::new(Caller::proven(identity, Some(node.parse().unwrap()), address))
    }

    /// Lets each wait for its turn in the order of the list, and returns in which order they get one.
    async fn order(callers: &[(Arc<Caller>, &'static str)]) -> Vec<&'static str> {
        let turns = Turns::new();
        let held = all_taken(&turns).await;
        let (told, mut order) = tokio::sync::mpsc::unbounded_channel();
        for (number, (caller, name)) in (1..).zip(callers) {
            let (turns, caller, told) = (turns.clone(), caller.clone(), told.clone());
            let name = *name;
            tokio::spawn(async move {
                let mut waited = Duration::ZERO;
                let turn = turns.of(caller, number, &mut waited).turn().await;
                told.send(name).unwrap();
                drop(turn);
            });
            // The runtime has one thread: by then it waits.
            tokio::task::yield_now().await;
        }
        drop(told);
        let mut held = held.into_iter();
        drop(held.next());
        let mut names = Vec::new();
        while let Some(name) = order.recv().await {
            names.push(name);
        }
        drop(held);
        let state = turns.lock();
        assert!(state.free == at_once() && state.waiting.all.is_empty());
        names
    }

    #[tokio::test]
    async fn a_flood_of_one_origin_waits_for_itself() {
        let flood = Arc::new(Caller::at("10.0.0.1".parse().unwrap()));
        let other = Arc::new(Caller::at("10.0.0.2".parse().unwrap()));
        let mut all = vec![(flood.clone(), "flood"); 50];
        all.push((other, "other"));
        all.extend(vec![(flood, "flood"); 50]);
        let order = order(&all).await;
        assert!(order.iter().take(2).any(|name| *name == "other"), "{order:?}");
    }

    #[tokio::test]
    async fn the_identities_of_a_node_have_their_turns_one_after_another() {
        let mut all = vec![(of("a", "greedy"), "greedy"); 50];
        all.push((of("a", "modest"), "modest"));
        all.push((of("b", "web"), "web"));
        let order = order(&all).await;
        let before = |name| order.iter().position(|one| *one == name).unwrap();
        assert!(before("modest") < 4 && before("web") < 2, "{order:?}");
    }

    #[tokio::test]
    async fn of_one_caller_the_newest_is_first() {
        let caller = of("a", "web");
        let order = order(&["first", "second", "third"].map(|name| (caller.clone(), name))).await;
        assert_eq!(order, ["third", "second", "first"]);
    }

    #[tokio::test]
    async fn whoever_had_to_wait_goes_behind_what_is_ready() {
        let turns = Turns::new();
        let mut held = all_taken(&turns).await;
        let (told, mut order) = tokio::sync::mpsc::unbounded_channel();
        let (waiting, tells) = (turns.clone(), told.clone());
        tokio::spawn(async move {
            let mut waited = Duration::ZERO;
            let _turn = waiting.of(of("a", "web"), 1, &mut waited).turn().await;
            tells.send("a handshake").unwrap();
        });
        tokio::task::yield_now().await;
        held.pop();
        tokio::spawn(async move { told.send("something else").unwrap() });
        assert_eq!(order.recv().await, Some("something else"));
        assert_eq!(order.recv().await, Some("a handshake"));
    }

    #[tokio::test]
    async fn who_waits_no_more_takes_no_turn() {
        let turns = Turns::new();
        let mut held = all_taken(&turns).await;
        let caller = of("a", "web");
        let mut waited = Duration::ZERO;
        for _ in 0..100 {
            let mut asking = turns.of(caller.clone(), 1, &mut waited);
            let asked = tokio::time::timeout(Duration::from_millis(1), asking.turn());
            assert!(asked.await.is_err());
        }
        assert!(turns.lock().waiting.all.is_empty());
        assert!(waited >= Duration::from_millis(100), "what it waited counts: {waited:?}");
        held.clear();
        assert_eq!(turns.lock().free, at_once());
    }

    #[tokio::test]
    async fn a_turn_that_nobody_takes_up_goes_on() {
        let turns = Turns::new();
        let mut held = all_taken(&turns).await;
        let caller = of("a", "web");
        let mut waited = Duration::ZERO;
        let mut asking = turns.of(caller, 1, &mut waited);
        let mut asked = Box::pin(asking.turn());
        let first = std::future::poll_fn(|cx| std::task::Poll::Ready(asked.as_mut().poll(cx)));
        assert!(first.await.is_pending());
        // It is given one, and never looks.
        held.clear();
        assert_eq!(turns.lock().free, at_once() - 1);
        drop(asked);
        assert_eq!(turns.lock().free, at_once());
    }
}
