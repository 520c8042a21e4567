//! What a multiplexed session needs beside its bytes, for as long as it lives: proofs of newer certificates, looks at the
//! peer, and an end.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};

use hauberk_core::{
    policy::Reason,
    session::{Open, ResetCause},
};
use hauberk_telemetry::metrics::Direction;
use hauberk_tls::{
    CredentialSlot,
    limiter::{Caller, Slot},
};

use super::{
    Mux, Stream,
    driver::{Driver, Event},
};
use crate::{
    context::Context,
    policy::Snapshot,
    quietly::Quietly,
    session::{ProofRefused, SessionError},
};

/// How often a session is held against what is current.
const LOOK: Duration = Duration::from_secs(5);

/// How often at least: of what a certificate has left, a part.
const LEAST_LOOK: Duration = Duration::from_millis(50);

/// How long a peer may owe the end of a stream that was refused or broken off here.
const OWED: Duration = Duration::from_secs(30);

/// A peer's kernel that acknowledges nothing for this long is gone.
const SILENCE: Duration = Duration::from_secs(30);

/// The multiplexed sessions of a destination's agent by their names.
#[derive(Default)]
pub(crate) struct Multiplexes(Mutex<HashMap<[u8; 16], Weak<Mux>>>);

impl Multiplexes {
    pub(crate) fn find(&self, name: &[u8; 16]) -> Option<Arc<Mux>> {
        self.lock().get(name)?.upgrade()
    }

    fn enter(&self, mux: &Arc<Mux>) {
        self.lock().insert(mux.name(), Arc::downgrade(mux));
    }

    fn leave(&self, mux: &Mux) {
        self.lock().remove(&mux.name());
    }

    /// Plain data: a panic elsewhere leaves nothing half-changed in it.
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<[u8; 16], Weak<Mux>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Tended<'a> {
    context: &'a Context,
    driver: Driver,
    /// The own certificate.
    slot: Option<Arc<CredentialSlot>>,
    direction: Direction,
    /// A session that carries nothing for so long is closed.
    patience: Duration,
    leaving: bool,
    /// Nobody tells of policies any more: the agent is about to end.
    orphaned: bool,
    /// When to look next, whatever happens until then.
    look_at: Instant,
}

/// The side that opens streams, to the end of the session.
pub(crate) async fn tend_source(
    context: Arc<Context>,
    driver: Driver,
    slot: Arc<CredentialSlot>,
    patience: Duration,
) {
    let tended = Tended::new(&context, driver, Some(slot), Direction::Outbound, patience);
    // Whoever opens streams on it hears of its end.
    drop(tended.run(None, |_| true, |_, _| {}).await);
}

/// The side that takes them. An idle session is left when another policy comes and it is not `still_wanted`.
///
/// # Errors
/// If the peer broke the protocol, or could not prove itself anew.
pub(crate) async fn tend_destination(
    context: &Context,
    driver: Driver,
    slot: Option<Arc<CredentialSlot>>,
    caller: &Arc<Caller>,
    patience: Duration,
    still_wanted: impl Fn(&Snapshot) -> bool,
    opened: impl Fn(Box<Open>, Stream),
) -> Result<(), ProofRefused> {
    let mux = driver.mux().clone();
    context.multiplexes.enter(&mux);
    let tended = Tended::new(context, driver, slot, Direction::Inbound, patience);
    let ended = tended.run(Some(caller), still_wanted, opened).await;
    context.multiplexes.leave(&mux);
    ended
}

impl<'a> Tended<'a> {
    fn new(
        context: &'a Context,
        driver: Driver,
        slot: Option<Arc<CredentialSlot>>,
        direction: Direction,
        patience: Duration,
    ) -> Self {
        Self {
            context,
            driver,
            slot,
            direction,
            patience,
            leaving: false,
            orphaned: false,
            look_at: Instant::now() + LOOK,
        }
    }

    async fn run(
        mut self,
        caller: Option<&Arc<Caller>>,
        still_wanted: impl Fn(&Snapshot) -> bool,
        opened: impl Fn(Box<Open>, Stream),
    ) -> Result<(), ProofRefused> {
        let mut snapshots = self.context.subscribe();
        // It begins with nothing.
        let mut room = caller.map(|caller| self.context.idle.enter(caller.clone()));
        loop {
            // Sooner if a certificate came that ends sooner; never put off by what happens meanwhile.
            self.look_at = self.look_at.min(Instant::now() + self.next_look());
            let turn = {
                let (leaving, orphaned, look_at) = (self.leaving, self.orphaned, self.look_at);
                let interrupt = async {
                    tokio::select! {
                        () = self.context.stopping.cancelled(), if !leaving => Turn::Leave,
                        () = displaced(&mut room) => Turn::Leave,
                        changed = snapshots.changed(), if !orphaned => match changed {
                            Ok(()) => Turn::Policy,
                            Err(_) => Turn::Orphaned,
                        },
                        () = tokio::time::sleep_until(look_at.into()) => Turn::Look,
                    }
                };
                let interrupt = std::pin::pin!(interrupt);
                let interrupt = Quietly::new(interrupt);
                tokio::select! {
                    biased;
                    turn = interrupt => turn,
                    event = self.driver.run() => Turn::Event(event),
                }
            };
            match turn {
                Turn::Leave => {
                    room = None;
                    self.leave();
                }
                Turn::Orphaned => {
                    self.orphaned = true;
                    self.leave();
                }
                Turn::Policy => {
                    let snapshot = snapshots.borrow_and_update().clone();
                    if self.driver.mux().is_idle() && !still_wanted(&snapshot) {
                        self.leave();
                    }
                }
                Turn::Look => {
                    self.look_at = Instant::now() + self.next_look();
                    match self.look() {
                        Looked::Good => {}
                        Looked::Refused(refused) => {
                            return self.cut(refused, ResetCause::CertificateExpired).await;
                        }
                        Looked::Silent => {
                            let text = "the peer's machine acknowledges nothing any more";
                            let error = std::io::Error::new(std::io::ErrorKind::TimedOut, text);
                            self.driver.end(&SessionError::Io(error));
                            return Ok(());
                        }
                        Looked::Unsettled => {
                            self.driver.end(&SessionError::TimedOut);
                            return Ok(());
                        }
                    }
                    if !self.driver.mux().is_idle() {
                        room = None;
                    } else if room.is_none() {
                        room = caller.map(|caller| self.context.idle.enter(caller.clone()));
                    }
                }
                Turn::Event(Ok(Event::Open(open, stream))) => opened(open, stream),
                Turn::Event(Ok(Event::Reauthenticate(proof))) => {
                    let (trust, now) = (self.context.trust.load(), hauberk_tls::now());
                    if let Err(refused) = self.driver.mux().take_proof(&proof, &trust, now) {
                        return self.cut(refused, ResetCause::Protocol).await;
                    }
                }
                Turn::Event(Ok(Event::Done)) => {
                    self.count_renewals();
                    self.driver.close().await;
                    return Ok(());
                }
                Turn::Event(Err(error)) => {
                    self.count_renewals();
                    self.driver.end(&error);
                    return match error {
                        SessionError::Closed | SessionError::Io(_) | SessionError::TimedOut => {
                            Ok(())
                        }
                        SessionError::Protocol(_) | SessionError::Refused(_) => {
                            let (reason, detail) = (Reason::NotReady, error.to_string());
                            Err(ProofRefused { reason, detail })
                        }
                    };
                }
            }
        }
    }

    fn count_renewals(&mut self) {
        self.context.metrics.keys_renewed(self.driver.take_renewals());
    }

    /// No further stream is wanted.
    fn leave(&mut self) {
        self.leaving = true;
        match self.direction {
            Direction::Inbound => self.driver.go_away(),
            Direction::Outbound => self.driver.mux().retire(),
        }
    }

    /// Ends all of it, and says why.
    async fn cut(mut self, refused: ProofRefused, cause: ResetCause) -> Result<(), ProofRefused> {
        self.driver.mux().cut(&refused, cause);
        self.count_renewals();
        self.driver.close().await;
        Err(refused)
    }

    fn next_look(&self) -> Duration {
        let now = hauberk_tls::now();
        let state = self.driver.mux().lock();
        let ends = [Some(state.facts.peer().facts().not_after()), state.facts.shown_until()];
        let parts = ends.into_iter().flatten().map(|end| (end.since(now) / 4).max(LEAST_LOOK));
        parts.fold(LOOK, Duration::min)
    }

    /// What may have ended without anything having happened.
    fn look(&mut self) -> Looked {
        self.count_renewals();
        let (now, trust) = (hauberk_tls::now(), self.context.trust.load());
        let own = self.slot.as_ref().and_then(|slot| slot.load());
        let mux = self.driver.mux().clone();
        let (peer_until, is_current, shown) = {
            let state = mux.lock();
            let facts = &state.facts;
            (
                facts.peer().facts().not_after(),
                facts.is_current(own.as_ref(), &trust, now),
                facts.shown_until(),
            )
        };
        if peer_until <= now {
            let detail = "the peer's certificate ended and it showed no newer one".to_owned();
            return Looked::Refused(ProofRefused { reason: Reason::ExpiredCert, detail });
        }
        let idle_for = mux.idle_for();
        if let Some(own) =
            own.filter(|own| shown.is_some_and(|until| until < own.facts().not_after()))
            && idle_for.is_none()
            && let Err(error) = self.driver.show_proof(&own)
        {
            return Looked::Refused(ProofRefused { reason: Reason::BadSvid, detail: error });
        }
        // Whoever still wants to come proves itself anew.
        if !is_current && !self.leaving {
            self.leave();
        }
        if idle_for.is_some_and(|idle| idle >= self.patience) && !self.leaving {
            self.leave();
        }
        if self.driver.silence().is_some_and(|silence| silence >= SILENCE) {
            return Looked::Silent;
        }
        if mux.owed_for().is_some_and(|owed| owed >= OWED) {
            return Looked::Unsettled;
        }
        Looked::Good
    }
}

/// What is found when a session is looked at.
enum Looked {
    Good,
    /// It must end.
    Refused(ProofRefused),
    /// The peer's machine is gone.
    Silent,
    /// The peer does not end a stream that ended here.
    Unsettled,
}

enum Turn {
    Leave,
    /// Nobody tells of policies any more.
    Orphaned,
    /// Another policy is in force.
    Policy,
    Look,
    Event(Result<Event, SessionError>),
}

async fn displaced(room: &mut Option<Slot>) {
    match room {
        Some(room) => room.displaced().await,
        None => std::future::pending().await,
    }
}
