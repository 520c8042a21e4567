//! The door for records: takes them from connections without ever making one wait.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use prometheus::IntCounter;
use tokio::sync::broadcast;

use super::destination::Output;
use super::flood::{Flood, Verdict};
use super::queue::{Message, Outage, Queued, Writer};
use super::{ConnectionRecord, Decision, DenialEdge, DenialSummary, Destination, FloodLimits};

/// Records waiting for the writer: about 8 MiB, and a second of a busy node's connections.
const QUEUE: usize = 8192;

/// Denials kept in memory for `hauberk denied`.
const RECENT_DENIALS: usize = 1000;

/// Denials a slow follower may lag behind before it misses some, which it is told.
const FOLLOWER_LAG: usize = 1024;

/// How long a shutdown sleeps before it tries a full queue again.
const STOP_RETRY: Duration = Duration::from_millis(5);

/// How records are written.
#[derive(Clone, Debug)]
pub struct RecordOptions {
    /// Where they go.
    pub destination: Destination,
    /// How many denials are written verbatim.
    pub flood: FloodLimits,
}

impl RecordOptions {
    /// Records to `destination`, with the usual limits.
    #[must_use]
    pub fn new(destination: Destination) -> Self {
        Self { destination, flood: FloodLimits::default() }
    }
}

/// Records cannot be written from the start.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The destination cannot be opened.
    #[error("open {destination} for connection records")]
    Open {
        /// Where records should go.
        destination: Destination,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The writer's thread cannot be started.
    #[error("start the thread that writes connection records")]
    Thread(#[source] io::Error),
}

/// The writer did not finish in time; what is still queued is counted as lost when it is dropped.
#[derive(Debug, thiserror::Error)]
#[error("connection records were not all written in time")]
pub struct ShutdownTimedOut;

/// What a follower of denials is told.
#[derive(Clone, Debug)]
pub enum Denial {
    /// A connection was denied.
    Denied(Arc<ConnectionRecord>),
    /// More of an edge were denied in the last window than were told one by one.
    Suppressed(Arc<DenialSummary>),
}

/// Takes records and writes each as one JSON line. Clones share one writer.
#[derive(Clone, Debug)]
pub struct RecordSink {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    queue: SyncSender<Message>,
    shared: Arc<Mutex<Shared>>,
    denials: broadcast::Sender<Denial>,
    closed: AtomicBool,
    lost: IntCounter,
}

/// What connections and the writer both touch. Held for a map look-up, never across a write.
#[derive(Debug)]
pub(super) struct Shared {
    flood: Flood,
    recent: VecDeque<Arc<ConnectionRecord>>,
}

impl Shared {
    pub(super) fn end_window(&mut self) -> Vec<(DenialEdge, u64)> {
        self.flood.end_window()
    }
}

impl RecordSink {
    /// Opens the destination and starts the writer. Records that cannot be written are counted
    /// in `lost`, which is [`AgentMetrics::records_lost`](crate::AgentMetrics::records_lost).
    ///
    /// # Errors
    ///
    /// When the destination cannot be opened or the thread cannot be started.
    pub fn start(options: RecordOptions, lost: IntCounter) -> Result<Self, RecordError> {
        let RecordOptions { destination, flood } = options;
        let output = Output::open(&destination)
            .map_err(|source| RecordError::Open { destination: destination.clone(), source })?;
        let shared = Shared { flood: Flood::new(&flood), recent: VecDeque::new() };
        let shared = Arc::new(Mutex::new(shared));
        let denials = broadcast::Sender::new(FOLLOWER_LAG);
        let (queue, messages) = mpsc::sync_channel(QUEUE);
        let writer = Writer {
            output,
            destination,
            shared: Arc::clone(&shared),
            denials: denials.clone(),
            window: flood.window,
            lost: lost.clone(),
            outage: Outage::default(),
        };
        thread::Builder::new()
            .name("hauberk-records".to_owned())
            .spawn(move || writer.run(&messages))
            .map_err(RecordError::Thread)?;
        let closed = AtomicBool::new(false);
        Ok(Self { inner: Arc::new(Inner { queue, shared, denials, closed, lost }) })
    }

    /// Hands a record over. Never waits: a record there is no room for is counted as lost.
    pub fn submit(&self, record: ConnectionRecord) {
        let record = Arc::new(record);
        match record.decision {
            Decision::Allow | Decision::WouldDeny => self.enqueue(record),
            Decision::Deny => self.submit_denial(record),
        }
    }

    /// The last denied connections, oldest first. Those of a flood that were only counted are
    /// not among them: one noisy caller must not push all others out.
    #[must_use]
    pub fn recent_denials(&self) -> Vec<Arc<ConnectionRecord>> {
        self.shared().recent.iter().cloned().collect()
    }

    /// Follows denials from now on. A follower that lags too far is told how many it missed.
    #[must_use]
    pub fn follow_denials(&self) -> broadcast::Receiver<Denial> {
        self.inner.denials.subscribe()
    }

    /// Writes what is queued and the open summaries, and ends the writer. Records that come
    /// later are counted as lost. Blocks for up to `timeout`: from async code, call it in
    /// `spawn_blocking`.
    ///
    /// # Errors
    ///
    /// When the destination takes longer than that.
    pub fn shutdown(&self, timeout: Duration) -> Result<(), ShutdownTimedOut> {
        let deadline = Instant::now() + timeout;
        if self.inner.closed.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        let (done, finished) = mpsc::sync_channel(1);
        let mut stop = Message::Stop(done);
        loop {
            match self.inner.queue.try_send(stop) {
                Ok(()) => break,
                Err(TrySendError::Disconnected(_)) => return Ok(()),
                Err(TrySendError::Full(_)) if Instant::now() >= deadline => {
                    return Err(ShutdownTimedOut);
                }
                Err(TrySendError::Full(unsent)) => {
                    stop = unsent;
                    thread::sleep(STOP_RETRY);
                }
            }
        }
        finished
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            .map_err(|_| ShutdownTimedOut)
    }

    fn submit_denial(&self, record: Arc<ConnectionRecord>) {
        let edge = DenialEdge::of(&record);
        {
            let mut shared = self.shared();
            // Under the same lock as the count: a denial counted after the writer took its last
            // summaries would be in no record at all.
            if self.inner.closed.load(Ordering::SeqCst) {
                self.inner.lost.inc();
                return;
            }
            match shared.flood.admit(edge) {
                Verdict::Counted => return,
                Verdict::Verbatim => {}
            }
            if shared.recent.len() >= RECENT_DENIALS {
                shared.recent.pop_front();
            }
            shared.recent.push_back(Arc::clone(&record));
        }
        // No follower is no error.
        drop(self.inner.denials.send(Denial::Denied(Arc::clone(&record))));
        self.enqueue(record);
    }

    fn enqueue(&self, record: Arc<ConnectionRecord>) {
        let queued = Queued::new(record, self.inner.lost.clone());
        if self.inner.closed.load(Ordering::SeqCst) {
            return;
        }
        // What does not fit comes back in the error, is dropped here and counts itself.
        drop(self.inner.queue.try_send(Message::Write(queued)));
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        // A panic cannot leave counts half changed; a poisoned lock must not end connections.
        self.inner.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
