//! The thread that writes, and the accounting that no record goes missing uncounted.

use std::io;
use std::mem;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use prometheus::IntCounter;
use serde::Serialize;
use tokio::sync::broadcast;
use tracing::Level;

use super::destination::Output;
use super::sink::Denial;
use super::{
    ConnectionRecord, Decision, DenialEdge, DenialSummary, Destination, rfc3339_millis, sink,
};
use crate::fields;
use crate::log::CONNECTION_TARGET;

/// How often a rotated file is looked for, and how late a window can end.
const TICK: Duration = Duration::from_secs(1);

/// How long the writer lets records gather when one comes to an empty queue: it is woken once for many
/// of them, where connections and the writer share a processor.
const GATHER: Duration = Duration::from_millis(3);

/// Records that are taken together: as many as gather in one pause on a busy node.
const TOGETHER: usize = 256;

/// A record on its way to the writer. One that is dropped unwritten counts itself as lost,
/// whichever way it went: queue full, writer gone, or error.
#[derive(Debug)]
pub(super) struct Queued {
    record: Arc<ConnectionRecord>,
    fate: Fate,
    lost: IntCounter,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Pending,
    Written,
}

impl Queued {
    pub(super) fn new(record: Arc<ConnectionRecord>, lost: IntCounter) -> Self {
        Self { record, fate: Fate::Pending, lost }
    }

    fn written(mut self) {
        self.fate = Fate::Written;
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        if self.fate == Fate::Pending {
            self.lost.inc();
        }
    }
}

/// What the writer is asked to do.
#[derive(Debug)]
pub(super) enum Message {
    Write(Queued),
    /// Write what is queued and the open summaries, then answer and end.
    Stop(SyncSender<()>),
}

/// State of the writer thread.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) output: Output,
    pub(super) destination: Destination,
    pub(super) shared: Arc<Mutex<sink::Shared>>,
    pub(super) denials: broadcast::Sender<Denial>,
    pub(super) window: Duration,
    pub(super) lost: IntCounter,
    pub(super) outage: Outage,
}

/// Whether writing works, so that a full disk is one warning and not one a record.
#[derive(Debug, Default)]
pub(super) enum Outage {
    #[default]
    None,
    Since {
        /// Records lost since the warning.
        lost: u64,
    },
}

impl Writer {
    pub(super) fn run(mut self, messages: &Receiver<Message>) {
        let mut window = Window::begin();
        let mut next_tick = Instant::now() + TICK.min(self.window);
        loop {
            let (message, waited) = match messages.try_recv() {
                Ok(message) => (Ok(message), false),
                Err(_) => {
                    let patience = next_tick.saturating_duration_since(Instant::now());
                    (messages.recv_timeout(patience), true)
                }
            };
            match message {
                Ok(Message::Write(queued)) => {
                    if waited {
                        thread::sleep(GATHER);
                    }
                    if let Some(done) = self.write_with(queued, messages) {
                        return self.stop(&done, messages, &mut window);
                    }
                }
                Ok(Message::Stop(done)) => return self.stop(&done, messages, &mut window),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    self.end_window(&mut window);
                    return;
                }
            }
            // Looked at after every message too: a flood must not put off its own summary.
            let now = Instant::now();
            if now >= next_tick {
                next_tick = now + TICK.min(self.window);
                if let Err(error) = self.output.follow_rotation() {
                    self.failed(&error, 0);
                }
                if now.saturating_duration_since(window.started) >= self.window {
                    self.end_window(&mut window);
                }
            }
        }
    }

    /// Writes what is left, and says so.
    fn stop(&mut self, done: &SyncSender<()>, messages: &Receiver<Message>, window: &mut Window) {
        // Callers that raced with the shutdown; none waits for the channel.
        while let Ok(Message::Write(queued)) = messages.try_recv() {
            // Only the first one stops it.
            let _second = self.write_with(queued, messages);
        }
        self.end_window(window);
        if done.send(()).is_err() {
            tracing::debug!("connection records written after the shutdown's limit");
        }
    }

    /// Writes a record and those that wait behind it. Whom to answer, if it is to stop then.
    fn write_with(
        &mut self,
        first: Queued,
        messages: &Receiver<Message>,
    ) -> Option<SyncSender<()>> {
        let (mut records, mut stop) = (vec![first], None);
        while records.len() < TOGETHER {
            match messages.try_recv() {
                Ok(Message::Write(queued)) => records.push(queued),
                Ok(Message::Stop(done)) => {
                    stop = Some(done);
                    break;
                }
                Err(_) => break,
            }
        }
        let (mut lines, mut ends) = (Vec::new(), Vec::new());
        for queued in records {
            log_connection(&queued.record);
            let before = lines.len();
            if let Err(error) = append(&mut lines, &*queued.record) {
                lines.truncate(before);
                drop(queued);
                self.failed(&error, 1);
                continue;
            }
            if before > 0 && lines.len() > self.output.at_once() {
                let rest = lines.split_off(before);
                self.write_lines(&mem::replace(&mut lines, rest), mem::take(&mut ends));
            }
            ends.push((queued, lines.len()));
        }
        self.write_lines(&lines, ends);
        stop
    }

    /// Writes the lines of records, each with where it ends.
    fn write_lines(&mut self, lines: &[u8], ends: Vec<(Queued, usize)>) {
        if ends.is_empty() {
            return;
        }
        let (used, outcome) = self.output.write_lines(lines);
        let mut lost = 0;
        for (queued, end) in ends {
            if end <= used {
                queued.written();
            } else {
                lost += 1;
            }
        }
        match outcome {
            Ok(()) => self.recovered(),
            Err(error) => self.failed(&error, lost),
        }
    }

    fn end_window(&mut self, window: &mut Window) {
        let ended = mem::replace(window, Window::begin());
        let counted = self.shared.lock().unwrap_or_else(PoisonError::into_inner).end_window();
        for (edge, suppressed) in counted {
            let summary = Arc::new(DenialSummary {
                time: window.since.clone(),
                since: ended.since.clone(),
                edge,
                suppressed,
            });
            log_summary(&summary.edge, suppressed);
            match self.write(&*summary) {
                Ok(()) => self.recovered(),
                Err(error) => {
                    // Without the summary nothing tells of these connections any more.
                    self.lost.inc_by(suppressed);
                    self.failed(&error, suppressed);
                }
            }
            // No follower is no error.
            drop(self.denials.send(Denial::Suppressed(summary)));
        }
    }

    fn write<T: Serialize>(&mut self, line: &T) -> io::Result<()> {
        let mut text = Vec::new();
        append(&mut text, line)?;
        self.output.write_lines(&text).1
    }

    fn failed(&mut self, error: &io::Error, records: u64) {
        match &mut self.outage {
            Outage::Since { lost } => *lost = lost.saturating_add(records),
            Outage::None => {
                self.outage = Outage::Since { lost: records };
                tracing::warn!(
                    { fields::PATH } = %self.destination,
                    { fields::ERROR } = %error,
                    "connection records cannot be written and are being lost, connections go on; \
                     free space or mend the destination"
                );
            }
        }
    }

    fn recovered(&mut self) {
        if let Outage::Since { lost } = mem::take(&mut self.outage) {
            tracing::info!(
                { fields::PATH } = %self.destination,
                { fields::COUNT } = lost,
                "connection records are written again, this many were lost"
            );
        }
    }
}

/// One line.
fn append<T: Serialize>(lines: &mut Vec<u8>, line: &T) -> io::Result<()> {
    serde_json::to_writer(&mut *lines, line)?;
    lines.push(b'\n');
    Ok(())
}

#[derive(Debug)]
struct Window {
    started: Instant,
    since: String,
}

impl Window {
    fn begin() -> Self {
        Self { started: Instant::now(), since: rfc3339_millis(SystemTime::now()) }
    }
}

/// The closing event of a connection on its own target.
fn log_connection(record: &ConnectionRecord) {
    macro_rules! closing_event {
        ($level:expr, $message:literal) => {
            tracing::event!(
                target: CONNECTION_TARGET,
                $level,
                { fields::CONN_ID } = record.conn_id,
                { fields::SIDE } = record.side.as_str(),
                { fields::SRC_IDENTITY } = record.src.spiffe_id,
                { fields::DST_IDENTITY } = record.dst.spiffe_id,
                { fields::DST_PORT } = record.dst_port(),
                { fields::DECISION } = record.decision.as_str(),
                { fields::REASON } = record.reason,
                { fields::DETAIL } = record.detail,
                { fields::POLICY } = record.policy,
                { fields::RULE } = record.rule,
                { fields::OWNER } = record.owner,
                { fields::DURATION_MS } = record.duration_ms,
                { fields::CLOSE_REASON } = record.close_reason,
                $message
            )
        };
    }
    match record.decision {
        Decision::Allow => closing_event!(Level::DEBUG, "connection closed"),
        Decision::Deny => closing_event!(Level::INFO, "connection denied"),
        Decision::WouldDeny => closing_event!(Level::INFO, "connection would be denied"),
    }
}

fn log_summary(edge: &DenialEdge, suppressed: u64) {
    tracing::event!(
        target: CONNECTION_TARGET,
        Level::INFO,
        { fields::SRC_IDENTITY } = edge.src,
        { fields::DST_IDENTITY } = edge.dst,
        { fields::DST_PORT } = edge.port,
        { fields::REASON } = edge.reason,
        { fields::COUNT } = suppressed,
        "more connections of this edge denied"
    );
}
