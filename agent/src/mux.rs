//! A multiplexed session: one mutual TLS connection between two workload identities that carries many streams at a
//! time, so that what many connections have to say goes out in one record, and an idle one costs next to nothing.
//!
//! `driver.rs` reads and writes for all of them, in a task of its own (`tend.rs`); `stream.rs` is one stream, of the task of
//! its connection. Between them stands what is here, behind a lock that is held for as long as it takes to copy a frame. What
//! several streams have to say is gathered until everything else that is ready has had its turn, then sealed and written at
//! once; where one alone speaks, its own task sends it (`wire.rs`).
//!
//! A stream with much to say moves to a dedicated session (`session.rs`), where bytes are not copied once more:
//! `stream.rs` tells how.

mod driver;
mod stream;
mod tend;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
mod tests;
mod wire;

use std::{
    collections::{HashMap, VecDeque},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Waker},
    time::{Duration, Instant},
};

use hauberk_core::{
    identity::SpiffeId,
    session::{Multiplex, Open, Reauthenticate, Refusal, ResetCause, Role},
    time::Timestamp,
};
use hauberk_telemetry::{
    metrics::{AgentMetrics, Direction, IdleSession},
    record::TlsInfo,
};
use hauberk_tls::{Credential, TrustBundle};
use tokio::sync::oneshot;

pub(crate) use driver::Driver;
pub(crate) use stream::{Fate, Moved, Relay, Stream};
pub(crate) use tend::{Multiplexes, tend_destination, tend_source};

use crate::session::{Facts, ProofRefused, Session, SessionError, Trunk, with_scratch};
use wire::Wire;

/// Bytes of frames that wait to be sealed, above which streams wait.
const MOST_WAITING: usize = 128 * 1024;

/// The same with all that does not wait, such as answers: whoever asks for more of them and does not read is given up. A
/// kilobyte for each stream that a session may have at a time.
const MOST_UNREAD: usize = 16 * 1024 * 1024;

/// Streams for which there is room while there are none.
const SPARE: usize = 64;

/// What the tasks of its streams and its driver share.
pub(crate) struct Mux {
    state: Mutex<State>,
    /// For as long as there is a driver. Who has both locks has taken this one first.
    wire: Mutex<Option<Wire>>,
    peer: SpiffeId,
    server_name: Option<String>,
    tls: Arc<TlsInfo>,
    name: [u8; 16],
    made: Instant,
}

struct State {
    machine: Multiplex,
    facts: Box<Facts>,
    streams: HashMap<u32, Entry>,
    /// Frames that are not sealed yet.
    out: Vec<u8>,
    /// Whose they are.
    speakers: Speakers,
    /// Flushes in a row that had the frames of one stream alone.
    alone: u32,
    /// Who wakes it; nobody after it was woken, until it has looked for what was said.
    driver: Option<Waker>,
    /// Streams that wait for room in `out`, each once.
    waiting: Vec<u32>,
    /// Streams that ended here and whose end the peer owes, since when: the oldest first.
    owed: VecDeque<(Instant, u32)>,
    /// No further stream is wanted: it ends when the last one is over.
    retiring: bool,
    ended: Option<SessionError>,
    metrics: AgentMetrics,
    /// Since when it carries nothing.
    idle: Option<(Instant, IdleSession)>,
}

/// The streams of which something waits to be sealed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Speakers {
    None,
    One(u32),
    Several,
}

/// What came of a stream and its task has not taken yet.
#[derive(Default)]
struct Entry {
    inbox: Vec<u8>,
    accepted: bool,
    /// After the bytes.
    end: Option<Ended>,
    /// The destination wishes that it moves.
    bulk: bool,
    /// A dedicated session carries on with it.
    moves: bool,
    /// The dedicated session that carries on with it, and who wants it back.
    tail: Option<Tail>,
    task: Option<Waker>,
    /// It is among those that wait for room.
    waits: bool,
}

/// A dedicated session that carries on with a stream.
pub(crate) struct Tail {
    pub(crate) session: Box<Session>,
    /// Who wants it back, at the destination.
    pub(crate) back: Option<oneshot::Sender<Box<Session>>>,
}

/// How the peer's direction of a stream ended.
enum Ended {
    Fin,
    Moved,
    Refused(Box<Refusal>),
    Reset(ResetCause),
    NotTaken,
    /// This side ended the whole session.
    Cut(ProofRefused),
}

impl Mux {
    /// The two halves of a new session.
    pub(crate) fn of(trunk: Box<Trunk>, metrics: &AgentMetrics) -> (Arc<Self>, Driver) {
        let Trunk { link, facts, plain } = *trunk;
        let mux = Arc::new(Self {
            peer: facts.peer().id().clone(),
            server_name: facts.server_name().map(str::to_owned),
            tls: facts.tls().clone(),
            name: facts.name(),
            made: facts.made(),
            wire: Mutex::new(Some(Wire::new(link))),
            state: Mutex::new(State {
                machine: Multiplex::new(facts.role()),
                facts,
                streams: HashMap::new(),
                out: Vec::new(),
                speakers: Speakers::None,
                alone: 0,
                driver: None,
                waiting: Vec::new(),
                owed: VecDeque::new(),
                retiring: false,
                ended: None,
                metrics: metrics.clone(),
                idle: None,
            }),
        });
        mux.lock().note_idle();
        let driver = Driver::new(mux.clone(), plain);
        (mux, driver)
    }

    /// Who the peer is.
    pub(crate) fn peer(&self) -> &SpiffeId {
        &self.peer
    }

    /// The name that the caller's agent asked for; at the destination only.
    pub(crate) fn server_name(&self) -> Option<&str> {
        self.server_name.as_deref()
    }

    /// What TLS settled on.
    pub(crate) fn tls(&self) -> &Arc<TlsInfo> {
        &self.tls
    }

    /// What it is called among those of the destination.
    pub(crate) fn name(&self) -> [u8; 16] {
        self.name
    }

    /// When it was made.
    pub(crate) fn made(&self) -> Instant {
        self.made
    }

    /// Whether a new stream may be opened on it, as far as `is_current` knows.
    pub(crate) fn may_open(&self, is_current: impl FnOnce(&Facts) -> bool) -> bool {
        let state = self.lock();
        state.ended.is_none()
            && !state.retiring
            && state.machine.may_open()
            && is_current(&state.facts)
    }

    /// Whether it carries nothing.
    pub(crate) fn is_idle(&self) -> bool {
        self.lock().idle.is_some()
    }

    /// For how long it has carried nothing, if it does not.
    fn idle_for(&self) -> Option<Duration> {
        self.lock().idle.as_ref().map(|(since, _)| since.elapsed())
    }

    /// For how long the peer has owed the end of a stream that ended here.
    fn owed_for(&self) -> Option<Duration> {
        let mut state = self.lock();
        state.forget_settled();
        state.owed.front().map(|(since, _)| since.elapsed())
    }

    /// Whether it is over.
    pub(crate) fn is_over(&self) -> bool {
        self.lock().ended.is_some()
    }

    /// No further stream is wanted: it ends when the last one is over.
    pub(crate) fn retire(&self) {
        let mut state = self.lock();
        state.retiring = true;
        state.wake_driver();
    }

    /// Asks for a stream.
    ///
    /// # Errors
    /// If it takes no more.
    pub(crate) fn open(self: &Arc<Self>, open: &Open) -> Result<Stream, SessionError> {
        let mut state = self.lock();
        if let Some(ended) = &state.ended {
            return Err(ended.again());
        }
        let State { machine, out, .. } = &mut *state;
        let number = machine.open(open, out).map_err(misuse)?;
        state.streams.insert(number, Entry::default());
        let at_once = state.speaks(number);
        drop(state);
        if at_once {
            with_scratch(|scratch| self.send_at_once(scratch));
        }
        Ok(Stream::new(self.clone(), number))
    }

    /// Shows the peer a newer certificate.
    fn show_proof(&self, credential: &Credential) -> Result<(), String> {
        let mut state = self.lock();
        let proof = state.facts.show_proof(credential)?;
        let State { machine, out, .. } = &mut *state;
        machine.reauthenticate(&proof, out);
        state.wake_driver();
        Ok(())
    }

    /// Accepts that a dedicated session carries on with a stream, and hands it over. Gives it back if there is no such
    /// stream, or another one carries on with it: nothing is accepted then.
    ///
    /// # Errors
    /// If the session does not take the answer.
    pub(crate) fn carry_on(
        &self,
        number: u32,
        mut session: Box<Session>,
        back: oneshot::Sender<Box<Session>>,
    ) -> Result<Option<Box<Session>>, SessionError> {
        let mut state = self.lock();
        let is_carried = !state.machine.is_over(number) && !state.machine.owes_answer(number);
        let entry = state.streams.get_mut(&number);
        let Some(entry) = entry.filter(|entry| is_carried && !entry.moves) else {
            return Ok(Some(session));
        };
        session.accept()?;
        entry.moves = true;
        entry.tail = Some(Tail { session, back: Some(back) });
        entry.wake();
        Ok(None)
    }

    /// Takes the peer's newer certificate.
    ///
    /// # Errors
    /// As [`Facts::take_proof`].
    fn take_proof(
        &self,
        frame: &Reauthenticate,
        trust: &TrustBundle,
        now: Timestamp,
    ) -> Result<(), ProofRefused> {
        self.lock().facts.take_proof(frame, trust, now)
    }

    /// Ends all streams, and tells the peer why.
    fn cut(&self, why: &ProofRefused, cause: ResetCause) {
        let mut state = self.lock();
        let State { machine, streams, out, .. } = &mut *state;
        for (number, entry) in streams {
            machine.reset(*number, cause, out);
            entry.inbox = Vec::new();
            entry.end = Some(Ended::Cut(why.clone()));
            entry.wake();
        }
        state.retiring = true;
        state.wake_driver();
    }

    /// Plain data: a panic elsewhere leaves nothing half-changed in it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wire(&self) -> MutexGuard<'_, Option<Wire>> {
        self.wire.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// A stream has said something. Whether its task is to send that at once, with [`Mux::send_at_once`]; otherwise the
    /// driver will.
    fn speaks(&mut self, number: u32) -> bool {
        self.speakers = match self.speakers {
            Speakers::None => Speakers::One(number),
            Speakers::One(other) if other == number => Speakers::One(number),
            Speakers::One(_) | Speakers::Several => Speakers::Several,
        };
        self.note_idle();
        // The driver sees to it that a session ends whose last stream has.
        let at_once = self.driver.is_some() && !self.gathers() && !self.retiring;
        if !at_once {
            self.wake_driver();
        }
        at_once
    }

    /// The same where the driver is to send it in any case.
    fn spoken(&mut self, number: u32) {
        if self.speaks(number) {
            self.wake_driver();
        }
    }

    /// Something has changed that the driver has to see to.
    fn wake_driver(&mut self) {
        self.note_idle();
        if let Some(driver) = self.driver.take() {
            driver.wake();
        }
    }

    fn note_idle(&mut self) {
        let is_idle = self.machine.open_streams() == 0 && self.ended.is_none();
        if is_idle == self.idle.is_some() {
            return;
        }
        let direction = match self.facts.role() {
            Role::Source => Direction::Outbound,
            Role::Destination => Direction::Inbound,
        };
        self.idle = is_idle.then(|| (Instant::now(), self.metrics.session_idle(direction)));
    }

    /// It is over: every stream hears of it.
    fn end(&mut self, error: SessionError) {
        self.ended.get_or_insert(error);
        self.note_idle();
        for entry in self.streams.values_mut() {
            entry.wake();
        }
    }

    /// There is room again.
    fn wake_waiting(&mut self) {
        for number in self.waiting.drain(..) {
            if let Some(entry) = self.streams.get_mut(&number) {
                entry.waits = false;
                entry.wake();
            }
        }
    }

    /// The task of a stream is done with it.
    fn leave(&mut self, number: u32) {
        self.streams.remove(&number);
        if self.streams.is_empty() {
            self.streams.shrink_to(SPARE);
        }
        self.forget_settled();
        if !self.machine.is_over(number) {
            self.owed.push_back((Instant::now(), number));
        }
    }

    fn forget_settled(&mut self) {
        while self.owed.front().is_some_and(|(_, number)| self.machine.is_over(*number)) {
            self.owed.pop_front();
        }
    }
}

impl Entry {
    fn wake(&mut self) {
        if let Some(task) = self.task.take() {
            task.wake();
        }
    }

    fn wait(&mut self, cx: &Context<'_>) {
        if !self.task.as_ref().is_some_and(|task| task.will_wake(cx.waker())) {
            self.task = Some(cx.waker().clone());
        }
    }
}

/// Our own mistake in what is sent when; ends the stream rather than the process.
fn misuse(error: hauberk_core::session::Misuse) -> SessionError {
    SessionError::Io(io::Error::other(error))
}
