//! The threads that carry connections, one for each core: each has a runtime of its own, and a connection stays with all
//! that belongs to it on the thread where it began. Nothing wakes another core for a burst of bytes, and no lock that a
//! burst takes is wanted elsewhere.
//!
//! Which thread a connection is given to is decided once. What is on another thread than its sockets works all the same,
//! and costs a wake-up across threads each time.

use std::{
    cell::Cell,
    future::Future,
    io,
    num::NonZero,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use anyhow::Context as _;
use tokio::{
    net::TcpStream,
    runtime::{Builder, EnterGuard, Handle},
    sync::oneshot,
};

/// Turns of tasks between two looks for what the network has. A turn of a bulk stream is some 150 µs: at
/// tokio's 61 of them, small exchanges would wait for 9 ms.
const EVENT_INTERVAL: u32 = 8;

/// Every so many turns, one goes to what another thread has woken. At tokio's 31 of them, a revoked permission would wait
/// for that many turns of what is busy here, and a thousand of them for a thousand times as long.
const GLOBAL_QUEUE_INTERVAL: u32 = 2;

/// Connections that stay together on a thread before the next one gets any, so that few of them share a session. Then as
/// many again, and so on.
const TOGETHER: usize = 4;

/// One of the threads. The threads of everything else count as the first one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lane(usize);

thread_local! {
    static LANE: Cell<Option<Lane>> = const { Cell::new(None) };
}

impl Lane {
    /// The calling thread.
    pub(crate) fn current() -> Self {
        LANE.get().unwrap_or_default()
    }

    /// The first is 0.
    pub(crate) fn index(self) -> usize {
        self.0
    }
}

/// All of them. They end when this is dropped, which whatever is on them and shares it puts off.
pub(crate) struct Lanes {
    lanes: Vec<One>,
    /// Places have been given one in turn so far.
    homes: AtomicUsize,
}

struct One {
    runtime: Handle,
    /// Connections on it.
    carried: Arc<AtomicUsize>,
    _ends_when_dropped: oneshot::Sender<()>,
}

/// Counts a connection as carried by its thread for as long as it lives.
struct Carried(Arc<AtomicUsize>);

impl Carried {
    fn by(carried: &Arc<AtomicUsize>) -> Self {
        carried.fetch_add(1, Ordering::Relaxed);
        Self(carried.clone())
    }
}

impl Drop for Carried {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// For as long as it lives, a connection does not count.
pub(crate) struct Lent(Option<Arc<AtomicUsize>>);

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(carried) = &self.0 {
            carried.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Lanes {
    /// One for each core that this process may use.
    ///
    /// # Errors
    /// If there can be no thread or runtime.
    pub(crate) fn start() -> anyhow::Result<Self> {
        Self::start_so_many(thread::available_parallelism().map_or(1, NonZero::get))
    }

    fn start_so_many(count: usize) -> anyhow::Result<Self> {
        let lanes = (0..count).map(|index| One::start(Lane(index)));
        Ok(Self { lanes: lanes.collect::<anyhow::Result<_>>()?, homes: AtomicUsize::new(0) })
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.lanes.len()
    }

    /// For a captured place: its listeners are there, and its connections while there are few.
    pub(crate) fn next_home(&self) -> Lane {
        Lane(self.homes.fetch_add(1, Ordering::Relaxed) % self.lanes.len().max(1))
    }

    /// Sockets that are registered and tasks that are spawned belong to the thread until the guard is dropped. Nothing may
    /// be waited for meanwhile.
    ///
    /// # Errors
    /// If there is no such thread.
    pub(crate) fn enter(&self, lane: Lane) -> anyhow::Result<EnterGuard<'_>> {
        Ok(self.lanes.get(lane.0).context("find a thread for connections")?.runtime.enter())
    }

    /// For a new connection that may share a session with others: the calling thread, or another one that has a few
    /// connections less to carry.
    pub(crate) fn choose(&self) -> Chosen<'_> {
        self.chosen(self.least(TOGETHER))
    }

    /// For one that shares nothing, or a session that will have many: the calling thread, or another one that has less to
    /// carry.
    pub(crate) fn spread(&self) -> Chosen<'_> {
        self.chosen(self.least(1))
    }

    /// For a connection that belongs to what is on the calling thread.
    pub(crate) fn here(&self) -> Chosen<'_> {
        self.chosen(Lane::current())
    }

    /// While a connection of the calling thread only waits for what another one does: it does not count here.
    pub(crate) fn lent(&self) -> Lent {
        let one = self.lanes.get(Lane::current().0);
        Lent(one.map(|one| {
            one.carried.fetch_sub(1, Ordering::Relaxed);
            one.carried.clone()
        }))
    }

    fn chosen(&self, lane: Lane) -> Chosen<'_> {
        Chosen { lane, one: self.lanes.get(lane.0) }
    }

    fn least(&self, together: usize) -> Lane {
        let own = Lane::current().0;
        let from_own = (own..self.lanes.len()).chain(0..own);
        let load = |index: &usize| {
            let carried = self.lanes.get(*index).map(|lane| lane.carried.load(Ordering::Relaxed));
            carried.map_or(usize::MAX, |carried| carried / together)
        };
        // Of equals the first.
        Lane(from_own.min_by_key(load).unwrap_or(own))
    }
}

/// The thread for a connection.
pub(crate) struct Chosen<'a> {
    lane: Lane,
    one: Option<&'a One>,
}

impl Chosen<'_> {
    /// The same connection, registered there.
    ///
    /// # Errors
    /// If the kernel has no room for that.
    pub(crate) fn bring(&self, stream: TcpStream) -> io::Result<TcpStream> {
        match self.one {
            Some(one) if self.lane != Lane::current() => {
                let stream = stream.into_std()?;
                let _there = one.runtime.enter();
                TcpStream::from_std(stream)
            }
            Some(_) | None => Ok(stream),
        }
    }

    /// Carries the connection there.
    pub(crate) fn carry(self, connection: impl Future<Output = ()> + Send + 'static) {
        let Some(one) = self.one else { return };
        let carried = Carried::by(&one.carried);
        one.runtime.spawn(async move {
            connection.await;
            drop(carried);
        });
    }
}

impl One {
    fn start(lane: Lane) -> anyhow::Result<Self> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .event_interval(EVENT_INTERVAL)
            .global_queue_interval(GLOBAL_QUEUE_INTERVAL)
            .build()
            .context("start a runtime for connections")?;
        let handle = runtime.handle().clone();
        let (sender, dropped) = oneshot::channel();
        let run = move || {
            LANE.set(Some(lane));
            // Nobody sends anything.
            drop(runtime.block_on(dropped));
            // Whatever is still there may wait for the file system.
            runtime.shutdown_background();
        };
        thread::Builder::new()
            .name(format!("carry-{}", lane.0))
            .spawn(run)
            .context("start a thread for connections")?;
        Ok(Self { runtime: handle, carried: Arc::default(), _ends_when_dropped: sender })
    }
}

/// The same connection as one of the calling thread, if it was registered on another one.
///
/// # Errors
/// If there is no file left for it.
pub(crate) fn bring_here(stream: TcpStream, from: Lane) -> io::Result<TcpStream> {
    if from == Lane::current() {
        return Ok(stream);
    }
    TcpStream::from_std(stream.into_std()?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
mod tests {
    use std::{sync::mpsc, task::Poll};

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    /// Where each of so many connections is, of which none ends before all have begun.
    fn lanes_of(lanes: &Lanes, count: usize, choose: fn(&Lanes) -> Chosen<'_>) -> Vec<usize> {
        let (sender, on) = mpsc::channel();
        let gates: Vec<_> = (0..count)
            .map(|_| {
                let (gate, closed) = oneshot::channel::<()>();
                let sender = sender.clone();
                choose(lanes).carry(async move {
                    sender.send(Lane::current().index()).unwrap();
                    drop(closed.await);
                });
                gate
            })
            .collect();
        let mut found: Vec<_> = gates.iter().map(|_| on.recv().unwrap()).collect();
        found.sort_unstable();
        found
    }

    #[test]
    fn few_connections_stay_together_and_many_are_spread() {
        let lanes = Lanes::start_so_many(2).unwrap();
        assert_eq!(lanes_of(&lanes, 4, Lanes::choose), [0; 4]);
        let lanes = Lanes::start_so_many(2).unwrap();
        assert_eq!(lanes_of(&lanes, 16, Lanes::choose), [[0; 8], [1; 8]].concat());
        let lanes = Lanes::start_so_many(3).unwrap();
        assert_eq!(lanes_of(&lanes, 6, Lanes::spread), [0, 0, 1, 1, 2, 2]);
        assert_eq!(lanes_of(&Lanes::start_so_many(1).unwrap(), 9, Lanes::choose), [0; 9]);
    }

    #[test]
    fn a_thread_is_free_again_when_its_connections_have_ended() {
        let lanes = Lanes::start_so_many(2).unwrap();
        drop(lanes_of(&lanes, 4, Lanes::choose));
        let patience = std::time::Instant::now() + std::time::Duration::from_secs(10);
        let first = lanes.lanes.first().unwrap();
        while first.carried.load(Ordering::Relaxed) > 0 {
            assert!(std::time::Instant::now() < patience, "they still count");
            thread::yield_now();
        }
        assert_eq!(lanes_of(&lanes, 4, Lanes::choose), [0; 4]);
    }

    #[test]
    fn a_connection_that_waits_for_another_thread_does_not_count() {
        let lanes = Lanes::start_so_many(1).unwrap();
        let carried = || lanes.lanes.first().unwrap().carried.load(Ordering::Relaxed);
        let _one = Carried::by(&lanes.lanes.first().unwrap().carried);
        let lent = lanes.lent();
        assert_eq!(carried(), 0);
        drop(lent);
        assert_eq!(carried(), 1);
    }

    #[test]
    fn what_another_thread_wakes_does_not_wait_until_nothing_is_busy() {
        const WOKEN: usize = 100;
        let lanes = Lanes::start_so_many(1).unwrap();
        let (turns, done) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (begin, wait) = mpsc::channel::<()>();
        let (sender, finished) = mpsc::channel();
        let (counted, woken) = (turns.clone(), done.clone());
        lanes.chosen(Lane(0)).carry(async move {
            // All of them are there before the first one gets its turn.
            wait.recv().unwrap();
            while woken.load(Ordering::Relaxed) < WOKEN {
                counted.fetch_add(1, Ordering::Relaxed);
                // Back to the end of what is ready, without asking the network, as a busy stream does.
                let mut again = true;
                let turn = std::future::poll_fn(|cx| {
                    cx.waker().wake_by_ref();
                    if std::mem::take(&mut again) { Poll::Pending } else { Poll::Ready(()) }
                });
                turn.await;
            }
            sender.send(()).unwrap();
        });
        for _ in 0..WOKEN {
            let done = done.clone();
            lanes.chosen(Lane(0)).carry(async move {
                done.fetch_add(1, Ordering::Relaxed);
            });
        }
        begin.send(()).unwrap();
        finished.recv().unwrap();
        let turns = turns.load(Ordering::Relaxed);
        assert!(turns <= 3 * WOKEN, "{turns} turns of what was busy for {WOKEN} of others");
    }

    #[test]
    fn every_place_gets_a_home_in_turn() {
        let lanes = Lanes::start_so_many(2).unwrap();
        let homes: Vec<_> = (0..4).map(|_| lanes.next_home().index()).collect();
        assert_eq!(homes, [0, 1, 0, 1]);
    }

    #[tokio::test]
    async fn a_connection_goes_on_where_it_was_brought() {
        let lanes = Lanes::start_so_many(2).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dialled = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut near, _) = listener.accept().await.unwrap();
        let there = lanes.chosen(Lane(1));
        let mut far = there.bring(dialled).unwrap();
        let (sender, back) = oneshot::channel();
        there.carry(async move {
            let mut byte = [0];
            far.read_exact(&mut byte).await.unwrap();
            assert!(sender.send((far, Lane::current(), byte)).is_ok());
        });
        near.write_all(b"x").await.unwrap();
        let (far, lane, byte) = back.await.unwrap();
        assert_eq!((lane, byte), (Lane(1), *b"x"));
        // And back: this thread's runtime hears of it now.
        let mut far = bring_here(far, lane).unwrap();
        near.write_all(b"y").await.unwrap();
        let mut byte = [0];
        far.read_exact(&mut byte).await.unwrap();
        assert_eq!(byte, *b"y");
    }
}
