//! Connections of one client reach their server in the order in which the client opened them.
//!
//! A captured client's `connect` returns before its connection is carried, so the next one may overtake it: in
//! this agent, on the way, or at the destination. Therefore the source numbers its streams
//! ([`Departures`]) in the order in which the kernel gave it the connections ([`Arrival`]), one queue for each
//! source workload, destination identity, agent and port. The destination dials the streams of a queue in the
//! order of their numbers ([`ConnectOrder`]), and waits a moment for one that has not come yet. Queues know nothing of
//! each other. See `docs/adr/0013-connects-keep-their-order.md`.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use hauberk_core::{identity::SpiffeId, session::Order};
use tokio::sync::oneshot;

use crate::pool::Edge;

/// How long a stream waits for those before it that have not come. One that was lost holds up only what comes
/// within this time after it.
const PATIENCE: Duration = Duration::from_millis(250);

/// A queue that was not used for this long gets a new number, from whose first place on nothing is missing.
const QUEUE_IDLE: Duration = Duration::from_secs(60);

/// When the destination forgets a queue: only after the source has given it up.
const FORGET_AFTER: Duration = Duration::from_secs(120);

/// Queues of one source workload.
const MAX_DEPARTURES: usize = 1_024;

/// Locks of the destination's queues, so that those of different edges hardly ever meet.
const SHARDS: usize = 16;

/// Queues of one shard. A queue that finds no room has no order; nothing waits because of that.
const MAX_QUEUES: usize = 4_096;

/// How often a full table is looked through at most.
const SWEEP_PAUSE: Duration = Duration::from_secs(1);

/// Streams of one queue that wait, or were given up before their turn.
const MAX_OUT_OF_ORDER: usize = 1_024;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain data: a panic elsewhere leaves nothing half-changed in it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who waits for whom: places are taken in their order, each when those before have been given up.
#[derive(Default)]
struct Line {
    /// Whose turn it is.
    next: u64,
    /// Dropped when the turn has come. Nothing is ever sent.
    waiting: BTreeMap<u64, oneshot::Sender<()>>,
    /// Given up before their turn.
    gone: BTreeSet<u64>,
}

/// Numbers the streams of one workload.
pub(crate) struct Departures {
    arriving: Arc<Mutex<Arriving>>,
    departing: Mutex<Departing>,
}

/// Connections that have no number yet.
#[derive(Default)]
struct Arriving {
    arrived: u64,
    line: Line,
}

#[derive(Default)]
struct Departing {
    queues: HashMap<(Edge, u16), Numbers>,
    swept: Option<Instant>,
}

struct Numbers {
    queue: u64,
    last: u64,
    used: Instant,
}

/// A connection that the kernel gave us, in its place among those of its workload. Whoever drops it lets the
/// next one go on.
pub(crate) struct Arrival {
    arriving: Arc<Mutex<Arriving>>,
    place: u64,
}

impl Departures {
    pub(crate) fn new() -> Self {
        Self { arriving: Arc::default(), departing: Mutex::default() }
    }

    /// Must be called in the order in which the connections were accepted.
    pub(crate) fn arrive(&self) -> Arrival {
        let mut arriving = lock(&self.arriving);
        let place = arriving.arrived;
        arriving.arrived += 1;
        Arrival { arriving: self.arriving.clone(), place }
    }

    /// The next number for this edge and port, once all connections before have theirs, or need none.
    pub(crate) async fn number(&self, arrival: Arrival, edge: &Edge, port: u16) -> Order {
        let turn = lock(&self.arriving).line.wait_for(arrival.place);
        if let Some(turn) = turn {
            // Ends with its sender.
            drop(turn.await);
        }
        self.next(edge, port, Instant::now())
    }

    fn next(&self, edge: &Edge, port: u16, now: Instant) -> Order {
        let Departing { queues, swept } = &mut *lock(&self.departing);
        let key = (edge.clone(), port);
        let is_in_use =
            |numbers: &Numbers| now.saturating_duration_since(numbers.used) < QUEUE_IDLE;
        if let Some(numbers) = queues.get_mut(&key)
            && is_in_use(numbers)
        {
            numbers.used = now;
            numbers.last += 1;
            return Order { queue: numbers.queue, place: numbers.last };
        }
        if queues.len() >= MAX_DEPARTURES && is_due(swept, now) {
            queues.retain(|_, numbers| is_in_use(numbers));
        }
        let order = Order { queue: getrandom::u64().unwrap_or_default(), place: 0 };
        if queues.len() < MAX_DEPARTURES || queues.contains_key(&key) {
            queues.insert(key, Numbers { queue: order.queue, last: 0, used: now });
        }
        order
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        lock(&self.arriving).line.leave(self.place);
    }
}

/// Whether it is time to look through everything again.
fn is_due(swept: &mut Option<Instant>, now: Instant) -> bool {
    let is_due = swept.is_none_or(|at| now.saturating_duration_since(at) >= SWEEP_PAUSE);
    if is_due {
        *swept = Some(now);
    }
    is_due
}

/// The queues of all sources whose streams come here.
#[derive(Default)]
pub(crate) struct ConnectOrder {
    shards: [Mutex<Shard>; SHARDS],
}

#[derive(Default)]
struct Shard {
    queues: HashMap<u64, Queue>,
    swept: Option<Instant>,
}

/// Streams of one source to one port of one destination.
struct Queue {
    /// Who numbers it: nobody else gets into it.
    peer: SpiffeId,
    line: Line,
    used: Instant,
}

/// A stream's turn to dial its application. Whoever drops it lets the next one dial.
pub(crate) struct Turn {
    order: Arc<ConnectOrder>,
    place: Order,
    /// None once it may dial.
    waits: Option<oneshot::Receiver<()>>,
    /// Its queue has room for it.
    is_ordered: bool,
}

impl ConnectOrder {
    /// The stream of this peer with this number has come.
    pub(crate) fn enter(self: &Arc<Self>, peer: &SpiffeId, place: Order) -> Turn {
        let now = Instant::now();
        let waits = self.shard(place.queue).and_then(|mut shard| {
            let Shard { queues, swept } = &mut *shard;
            if queues.len() >= MAX_QUEUES && !queues.contains_key(&place.queue) {
                if is_due(swept, now) {
                    queues.retain(|_, queue| queue.is_in_use(now));
                }
                if queues.len() >= MAX_QUEUES {
                    return None;
                }
            }
            let queue = queues.entry(place.queue).or_insert_with(|| Queue {
                peer: peer.clone(),
                line: Line::default(),
                used: now,
            });
            queue.enter(peer, place.place, now)
        });
        let is_ordered = waits.is_some();
        Turn { order: self.clone(), place, waits: waits.flatten(), is_ordered }
    }

    fn shard(&self, queue: u64) -> Option<MutexGuard<'_, Shard>> {
        let number = usize::try_from(queue % 16).ok()?;
        self.shards.get(number).map(lock)
    }

    fn with(&self, queue: u64, change: impl FnOnce(&mut Line)) {
        if let Some(mut shard) = self.shard(queue)
            && let Some(queue) = shard.queues.get_mut(&queue)
        {
            change(&mut queue.line);
        }
    }
}

impl Queue {
    fn is_in_use(&self, now: Instant) -> bool {
        !self.line.waiting.is_empty() || now.saturating_duration_since(self.used) < FORGET_AFTER
    }

    /// What to wait for, if it is not its turn; nothing at all if it has no order here.
    fn enter(
        &mut self,
        peer: &SpiffeId,
        place: u64,
        now: Instant,
    ) -> Option<Option<oneshot::Receiver<()>>> {
        let is_full = self.line.waiting.len() >= MAX_OUT_OF_ORDER;
        if self.peer != *peer || is_full || self.line.waiting.contains_key(&place) {
            return None;
        }
        self.used = now;
        Some(self.line.wait_for(place))
    }
}

impl Line {
    /// What to wait for, if it is not its turn.
    fn wait_for(&mut self, place: u64) -> Option<oneshot::Receiver<()>> {
        (place > self.next).then(|| {
            let (sender, receiver) = oneshot::channel();
            self.waiting.insert(place, sender);
            receiver
        })
    }

    /// Those before the first one that waits are not waited for any longer.
    fn skip_missing(&mut self) {
        if let Some(first) = self.waiting.keys().next() {
            self.next = self.next.max(*first);
        }
        self.advance();
    }

    /// It has had its turn, or has waited for it for long enough.
    fn pass(&mut self, place: u64) {
        self.waiting.remove(&place);
        self.next = self.next.max(place.saturating_add(1));
        self.advance();
    }

    /// It wants no turn any more, whether it was its turn or not.
    fn leave(&mut self, place: u64) {
        self.waiting.remove(&place);
        if place >= self.next {
            self.gone.insert(place);
        }
        if self.gone.len() > MAX_OUT_OF_ORDER
            && let Some(first) = self.gone.first()
        {
            self.next = self.next.max(*first);
        }
        self.advance();
    }

    /// Tells those whose turn it is by now.
    fn advance(&mut self) {
        if !self.gone.is_empty() {
            self.gone = self.gone.split_off(&self.next);
        }
        while self.gone.remove(&self.next) {
            self.next = self.next.saturating_add(1);
        }
        while let Some(first) = self.waiting.first_entry()
            && *first.key() <= self.next
        {
            drop(first.remove());
        }
    }
}

impl Turn {
    /// Returns when those before have dialled, or were waited for.
    pub(crate) async fn come(&mut self) {
        // In a box: hardly any stream waits, and every stream's future would have room for it.
        if let Some(turn) = self.waits.take() {
            Box::pin(self.wait(turn)).await;
        }
    }

    async fn wait(&self, mut turn: oneshot::Receiver<()>) {
        if tokio::time::timeout(PATIENCE, &mut turn).await.is_ok() {
            return;
        }
        self.order.with(self.place.queue, Line::skip_missing);
        // Those that did come dial first, unless their dialling takes long as well.
        drop(tokio::time::timeout(PATIENCE, turn).await);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if !self.is_ordered {
            return;
        }
        let place = self.place.place;
        // Whether it has been waited for.
        let never_came = self.waits.is_some();
        self.order.with(self.place.queue, |line| {
            if never_came {
                line.leave(place);
            } else {
                line.pass(place);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(name: &str) -> SpiffeId {
        format!("spiffe://example.org/ns/shop/sa/{name}").parse().unwrap()
    }

    fn edge() -> Edge {
        Edge { destination: peer("ledger"), agent: "10.0.0.1:15008".parse().unwrap() }
    }

    fn place(place: u64) -> Order {
        Order { queue: 7, place }
    }

    /// How long until it may dial.
    async fn waited(turn: &mut Turn) -> Duration {
        let start = tokio::time::Instant::now();
        turn.come().await;
        start.elapsed()
    }

    /// A stream that dials when it may, and tells of it.
    fn dialling(
        order: &Arc<ConnectOrder>,
        number: u64,
        dialled: &Arc<Mutex<Vec<u64>>>,
    ) -> tokio::task::JoinHandle<()> {
        let (mut turn, dialled) = (order.enter(&peer("web"), place(number)), dialled.clone());
        tokio::spawn(async move {
            turn.come().await;
            lock(&dialled).push(number);
        })
    }

    #[tokio::test(start_paused = true)]
    async fn streams_that_come_in_order_do_not_wait() {
        let order = Arc::new(ConnectOrder::default());
        for number in 0..1_000 {
            let mut turn = order.enter(&peer("web"), place(number));
            assert!(turn.waits.is_none());
            assert_eq!(waited(&mut turn).await, Duration::ZERO);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn streams_that_come_in_any_order_dial_in_that_of_their_numbers() {
        let order = Arc::new(ConnectOrder::default());
        let dialled = Arc::new(Mutex::new(Vec::new()));
        let tasks: Vec<_> =
            [3, 1, 4, 2, 0, 5].map(|number| dialling(&order, number, &dialled)).into();
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(*lock(&dialled), [0, 1, 2, 3, 4, 5]);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_was_lost_is_waited_for_once_and_not_for_long() {
        let order = Arc::new(ConnectOrder::default());
        assert_eq!(waited(&mut order.enter(&peer("web"), place(0))).await, Duration::ZERO);
        // 1 and 3 never come.
        let dialled = Arc::new(Mutex::new(Vec::new()));
        let start = tokio::time::Instant::now();
        let tasks: Vec<_> = [4, 2, 5].map(|number| dialling(&order, number, &dialled)).into();
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(*lock(&dialled), [2, 4, 5]);
        assert!(start.elapsed() <= 2 * PATIENCE, "{:?}", start.elapsed());
        assert_eq!(waited(&mut order.enter(&peer("web"), place(6))).await, Duration::ZERO);
        // The one that was given up for lost does not wait either.
        assert_eq!(waited(&mut order.enter(&peer("web"), place(1))).await, Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_refused_holds_up_nobody() {
        let order = Arc::new(ConnectOrder::default());
        let (first, second) =
            (order.enter(&peer("web"), place(0)), order.enter(&peer("web"), place(1)));
        let mut third = order.enter(&peer("web"), place(2));
        drop(second);
        let waits = tokio::spawn(async move { waited(&mut third).await });
        tokio::task::yield_now().await;
        drop(first);
        assert_eq!(waits.await.unwrap(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn an_application_that_does_not_answer_is_not_waited_for_for_long() {
        let order = Arc::new(ConnectOrder::default());
        let _dials = order.enter(&peer("web"), place(0));
        let mut next = order.enter(&peer("web"), place(1));
        let waited = waited(&mut next).await;
        assert!(waited >= PATIENCE && waited <= 2 * PATIENCE, "{waited:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn queues_and_peers_do_not_wait_for_each_other() {
        let order = Arc::new(ConnectOrder::default());
        let _dials = order.enter(&peer("web"), place(0));
        let mut other = order.enter(&peer("web"), Order { queue: 8, place: 0 });
        assert_eq!(waited(&mut other).await, Duration::ZERO);
        // Nobody gets into another's queue.
        let mut stranger = order.enter(&peer("thief"), place(9));
        assert_eq!(waited(&mut stranger).await, Duration::ZERO);
        drop(stranger);
        assert!(order.enter(&peer("web"), place(1)).waits.is_some());
    }

    #[test]
    fn what_a_peer_can_make_us_remember_is_bounded() {
        let order = Arc::new(ConnectOrder::default());
        for queue in 0..100_000 {
            drop(order.enter(&peer("web"), Order { queue, place: 0 }));
        }
        let queues: usize = order.shards.iter().map(|shard| lock(shard).queues.len()).sum();
        assert!(queues <= SHARDS * MAX_QUEUES, "{queues} queues");
        let order = Arc::new(ConnectOrder::default());
        let turns: Vec<_> =
            (1..5_000).map(|number| order.enter(&peer("web"), place(2 * number))).collect();
        order.with(7, |line| assert_eq!(line.waiting.len(), MAX_OUT_OF_ORDER));
        drop(turns);
        order.with(7, |line| assert!(line.gone.len() <= MAX_OUT_OF_ORDER));
        let last = Order { queue: 7, place: u64::MAX };
        drop((order.enter(&peer("web"), last), order.enter(&peer("web"), last)));
    }

    #[tokio::test]
    async fn connections_are_numbered_as_they_arrived() {
        let departures = Arc::new(Departures::new());
        let arrivals: Vec<Arrival> = (0..100).map(|_| departures.arrive()).collect();
        // The last one is the first to ask for its number; one in between needs none.
        let mut asking = Vec::new();
        for (arrived, arrival) in arrivals.into_iter().enumerate().rev() {
            if arrived == 50 {
                continue;
            }
            let departures = departures.clone();
            asking.push((
                arrived,
                tokio::spawn(async move { departures.number(arrival, &edge(), 80).await }),
            ));
            tokio::task::yield_now().await;
        }
        let mut numbers = Vec::new();
        for (arrived, number) in asking.into_iter().rev() {
            numbers.push((arrived, number.await.unwrap()));
        }
        let queue = numbers[0].1.queue;
        for (place, (arrived, order)) in (0..).zip(numbers) {
            assert_eq!(order, Order { queue, place }, "the one that came as number {arrived}");
        }
    }

    #[test]
    fn another_port_has_another_queue_and_an_idle_one_begins_anew() {
        let (departures, now) = (Departures::new(), Instant::now());
        let first = departures.next(&edge(), 80, now);
        assert_ne!(departures.next(&edge(), 81, now).queue, first.queue);
        let second = departures.next(&edge(), 80, now + QUEUE_IDLE / 2);
        assert_eq!(second, Order { place: 1, ..first });
        let later = departures.next(&edge(), 80, now + QUEUE_IDLE * 2);
        assert_eq!(later.place, 0);
        assert_ne!(later.queue, first.queue);
        for port in 0..u16::MAX {
            departures.next(&edge(), port, now + QUEUE_IDLE * 2);
        }
        assert!(lock(&departures.departing).queues.len() <= MAX_DEPARTURES);
    }
}
