//! Forwarding under a permit: the relay, raced against everything that can end the permission.

mod carried;
mod ending;

use std::{
    ops::ControlFlow,
    sync::Arc,
    time::{Duration, Instant},
};

use hauberk_core::{
    policy::Reason,
    session::{Reauthenticate, Refusal},
    time::Timestamp,
};
use hauberk_telemetry::record::Path;
use tokio::sync::{oneshot, watch};

pub(crate) use self::carried::Carried;
use self::ending::{Cut, Ending, failed, wind_up};
use crate::{
    authorize::Permit,
    context::{Context, Local},
    policy::Snapshot,
    quietly::Quietly,
    relay::{Application, End, Event, Relay},
    report::Report,
    session::{OPEN_TIMEOUT, Session, SessionError},
    trunks::Mover,
};

/// How often a connection looks whether its peer is still there, and whether the wall clock has jumped.
const LOOK: Duration = Duration::from_secs(30);

/// Between two of them at least.
const LEAST_PAUSE: Duration = Duration::from_millis(1);

/// The same while the peer's certificate has ended.
const OVERDUE_LOOK: Duration = Duration::from_millis(500);

/// A peer's kernel that acknowledges nothing for this long is gone. The local kernel would go on for
/// a quarter of an hour.
const SILENCE: Duration = Duration::from_secs(30);

/// Over how long the open connections of a workload show their peers its new certificate: all at once would
/// hold up everybody's bytes. Less where the old one ends soon.
const PROOF_SPREAD: Duration = Duration::from_secs(10);

/// How long after an application reads again the proof of the peer's newer certificate may take, that
/// waited behind what was not read.
const PROOF_GRACE: Duration = Duration::from_secs(10);

/// A stream's permission, and what may end it.
pub(crate) struct Forward<'a> {
    context: &'a Context,
    local: Arc<Local>,
    pub(crate) permit: Permit,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    /// Tells when the local workload has a newer certificate.
    installed: watch::Receiver<u64>,
    /// The local workload has left the mesh.
    is_let_go: bool,
    /// Nobody tells any more.
    dismissed: Option<watch::Sender<u64>>,
    /// When the peer must have answered.
    unanswered: Instant,
    proof_until: Option<Instant>,
    /// When to show the newest certificate.
    proof_due: Option<Instant>,
    /// Source: what makes dedicated sessions for streams with much to say.
    mover: Option<Box<Mover>>,
    /// Destination: who wants the dedicated session back that carries on.
    back: Option<oneshot::Sender<Box<Session>>>,
}

/// How it went.
pub(crate) enum Outcome {
    /// The stream is over. The session, if another stream may come on it.
    Over(Option<Box<Session>>),
    /// The destination's agent did not answer.
    Unanswered,
    /// The destination went away before it saw the stream, which may be opened anew elsewhere.
    NotTaken(Application),
    /// The destination's agent refused it before the application was told anything.
    Refused(Application, Reason, Box<Refusal>),
}

impl<'a> Forward<'a> {
    pub(crate) fn new(
        context: &'a Context,
        local: Arc<Local>,
        permit: Permit,
        snapshots: watch::Receiver<Arc<Snapshot>>,
    ) -> Self {
        let installed = local.identity.installed.clone();
        let unanswered = Instant::now();
        Self {
            context,
            local,
            permit,
            snapshots,
            installed,
            is_let_go: false,
            dismissed: None,
            unanswered,
            proof_until: None,
            proof_due: None,
            mover: None,
            back: None,
        }
    }

    /// Source: a stream with much to say goes on over a dedicated session.
    pub(crate) fn moving_with(mut self, mover: Box<Mover>) -> Self {
        self.mover = Some(mover);
        self
    }

    /// Copies until the stream ends or the permission does.
    ///
    /// Every open connection has this future for as long as it lives: what happens once is done in functions
    /// that are not part of it, or in boxes of their own.
    pub(crate) async fn run(&mut self, carried: Carried, report: &mut Report<'_>) -> Outcome {
        let outcome = self.carry(carried, report).await;
        match (outcome, self.back.take()) {
            // Another stream may come on it, for whoever had it before.
            (Outcome::Over(Some(session)), Some(back)) => {
                drop(back.send(session));
                Outcome::Over(None)
            }
            (outcome, _) => outcome,
        }
    }

    async fn carry(&mut self, mut relay: Carried, report: &mut Report<'_>) -> Outcome {
        if let Err(ending) = self.begin(&mut relay) {
            return Box::pin(wind_up(self.context, relay, ending, report)).await;
        }
        loop {
            let turn = {
                let pause = self.next_look(&relay);
                let interrupt = std::pin::pin!(interruption(
                    self.context,
                    &mut self.snapshots,
                    &mut self.installed,
                    pause
                ));
                let interrupt = Quietly::new(interrupt);
                tokio::select! {
                    biased;
                    interrupt = interrupt => Turn::Interrupt(interrupt),
                    event = relay.run() => Turn::Event(event),
                }
            };
            let turn = match turn {
                Turn::Event(Event::Moved) => {
                    relay.tell_bytes(report);
                    relay = match self.carry_on(relay) {
                        Ok(relay) => relay,
                        Err(error) => {
                            failed(&error, report);
                            return Outcome::Over(None);
                        }
                    };
                    continue;
                }
                other => other,
            };
            let Some(turn) = turn.unless_accepted() else {
                match Box::pin(relay.connect_application()).await {
                    // It is open already if it has moved.
                    Ok(()) if report.is_open() => {}
                    Ok(()) => report.opened(Path::Mtls),
                    Err(error) => {
                        let ending = Box::new(Ending::Relay(End::ApplicationFailed(error)));
                        return Box::pin(wind_up(self.context, relay, ending, report)).await;
                    }
                }
                continue;
            };
            if let ControlFlow::Break(ending) = self.take(turn, &mut relay) {
                return Box::pin(wind_up(self.context, relay, ending, report)).await;
            }
        }
    }

    /// Gets ready for another stream.
    fn begin(&mut self, relay: &mut Carried) -> Result<(), Box<Ending>> {
        self.unanswered = Instant::now() + OPEN_TIMEOUT;
        self.installed.mark_unchanged();
        let Carried::Dedicated(relay) = relay else { return Ok(()) };
        // Renewed since the session was made, and nobody has told the peer.
        match self.local.identity.slot.load() {
            Some(own) if !relay.session.was_made_with(&own) => relay
                .session
                .show_proof(&own)
                .map_err(|error| Box::new(Ending::Cut(Cut::unproven(error)))),
            Some(_) | None => Ok(()),
        }
    }

    /// A stream goes on over a dedicated session.
    fn carry_on(&mut self, relay: Carried) -> Result<Carried, SessionError> {
        let Carried::Stream(stream) = relay else { return Ok(relay) };
        let mut moved = stream.into_moved().ok_or(SessionError::Closed)?;
        self.back = moved.back.take();
        if let Some(mover) = &self.mover {
            mover.moved();
        }
        let mut relay = Carried::Dedicated(Relay::carrying_on(moved)?);
        match self.begin(&mut relay) {
            Ok(()) => Ok(relay),
            Err(_) => Err(SessionError::Closed),
        }
    }

    fn take(&mut self, turn: Turn, relay: &mut Carried) -> ControlFlow<Box<Ending>> {
        let cut = match turn {
            Turn::Interrupt(Interrupt::Cut(cut)) => Some(cut),
            Turn::Interrupt(Interrupt::Policy) => {
                let snapshot = self.snapshots.borrow_and_update().clone();
                self.ask_again(&snapshot)
            }
            Turn::Interrupt(Interrupt::Certificate) => {
                // Of a multiplexed session, somebody else sees to it.
                let Carried::Dedicated(relay) = relay else { return ControlFlow::Continue(()) };
                let left = relay.session.shown_until().map(|end| end.since(hauberk_tls::now()));
                let due = Instant::now() + proof_delay(left.unwrap_or_default());
                self.proof_due = Some(self.proof_due.map_or(due, |earlier| earlier.min(due)));
                None
            }
            Turn::Interrupt(Interrupt::Dismissed) => {
                let snapshot = self.snapshots.borrow().clone();
                if snapshot.has_let_go(&self.context.node, &self.local.workload) {
                    // What is open lives, as long as the last certificate is good.
                    let (sender, installed) = watch::channel(0);
                    (self.dismissed, self.installed) = (Some(sender), installed);
                    None
                } else {
                    Some(Cut::Unregistered)
                }
            }
            Turn::Interrupt(Interrupt::Look) => self.look(relay),
            // They were taken care of.
            Turn::Event(Event::Accepted | Event::Moved) => None,
            Turn::Event(Event::Bulk) => {
                if let Carried::Stream(stream) = relay {
                    match &self.mover {
                        Some(mover) => stream.wait_for_tail(mover.start()),
                        None => stream.wish_to_move(),
                    }
                }
                None
            }
            Turn::Event(Event::Reauthenticate(frame)) => self.take_proof(&frame, relay),
            Turn::Event(Event::End(end)) => {
                return ControlFlow::Break(Box::new(Ending::Relay(end)));
            }
        };
        match cut {
            None => ControlFlow::Continue(()),
            Some(cut) => ControlFlow::Break(Box::new(Ending::Cut(cut))),
        }
    }

    fn take_proof(&mut self, frame: &Reauthenticate, relay: &mut Carried) -> Option<Cut> {
        let Carried::Dedicated(relay) = relay else { return None };
        let trust = self.context.trust.load();
        if let Err(error) = relay.session.take_proof(frame, &trust, hauberk_tls::now()) {
            return Some(Cut::Proof(error));
        }
        relay.suspended = false;
        self.proof_until = None;
        None
    }

    fn ask_again(&mut self, snapshot: &Snapshot) -> Option<Cut> {
        // Its peer decides for itself.
        self.is_let_go = snapshot.has_let_go(&self.context.node, &self.local.workload);
        if self.is_let_go {
            return None;
        }
        // Before its capture ends, whatever its peer's mode.
        if !snapshot.has_on(&self.context.node, &self.local.workload) {
            return Some(Cut::Unregistered);
        }
        match self.permit.renew(snapshot) {
            Ok(renewed) => self.permit = renewed,
            Err(denial) => return Some(Cut::Policy(denial)),
        }
        None
    }

    fn next_look(&self, relay: &Carried) -> Duration {
        let now = hauberk_tls::now();
        let mut pause = LOOK;
        // Nobody asks for it any more once the workload has left.
        if let Some(until) = self.permit.until().filter(|_| !self.is_let_go) {
            pause = pause.min(until.since(now));
        }
        if relay.awaits_answer() {
            pause = pause.min(self.unanswered.saturating_duration_since(Instant::now()));
        }
        let Carried::Dedicated(relay) = relay else { return pause.max(LEAST_PAUSE) };
        let certificate: Timestamp = relay.session.peer().facts().not_after();
        // Past its end only while it waits for the application to read.
        let overdue = if certificate <= now { OVERDUE_LOOK } else { Duration::ZERO };
        pause = pause.min(certificate.since(now).max(overdue));
        if let Some(due) = self.proof_due {
            pause = pause.min(due.saturating_duration_since(Instant::now()));
        }
        pause.max(LEAST_PAUSE)
    }

    /// What may have ended without anything having happened.
    fn look(&mut self, relay: &mut Carried) -> Option<Cut> {
        let now = Instant::now();
        relay.keep_alive();
        if relay.awaits_answer() && now >= self.unanswered {
            return Some(Cut::Unanswered);
        }
        if let Carried::Dedicated(relay) = relay
            && let Some(cut) = self.look_at_session(relay)
        {
            return Some(cut);
        }
        let snapshot = self.snapshots.borrow().clone();
        self.ask_again(&snapshot)
    }

    fn look_at_session(&mut self, relay: &mut Relay) -> Option<Cut> {
        let now = Instant::now();
        if self.proof_due.is_some_and(|due| due <= now) {
            self.proof_due = None;
            if let Some(credential) = self.local.identity.slot.load()
                && let Err(error) = relay.session.show_proof(&credential)
            {
                return Some(Cut::unproven(error));
            }
        }
        if relay.session.silence().is_some_and(|silence| silence >= SILENCE) {
            return Some(Cut::Silent);
        }
        if relay.session.peer().facts().not_after() <= hauberk_tls::now() {
            // The proof comes in turn, behind data. While the application does not read that, nothing
            // passes in that direction anyway, and nothing is sent in the other.
            if relay.held_back {
                relay.suspended = true;
                self.proof_until = Some(now + PROOF_GRACE);
            }
            if self.proof_until.is_none_or(|until| now >= until) {
                return Some(Cut::Certificate);
            }
        }
        None
    }
}

/// A chance part of the time that there is: the peer goes by the certificate it was shown for `left` more.
fn proof_delay(left: Duration) -> Duration {
    let share = getrandom::u32().map_or(0.0, |chance| f64::from(chance) / f64::from(u32::MAX));
    PROOF_SPREAD.min(left / 4).mul_f64(share)
}

enum Turn {
    Interrupt(Interrupt),
    Event(Event),
}

impl Turn {
    /// Nothing if it is that the destination took the stream.
    fn unless_accepted(self) -> Option<Self> {
        match self {
            Self::Event(Event::Accepted) => None,
            other @ (Self::Interrupt(_) | Self::Event(_)) => Some(other),
        }
    }
}

/// What may come in between.
enum Interrupt {
    Cut(Cut),
    /// Another policy is in force.
    Policy,
    /// The local workload has a newer certificate.
    Certificate,
    /// It gets none any more.
    Dismissed,
    /// It is time to look.
    Look,
}

async fn interruption(
    context: &Context,
    snapshots: &mut watch::Receiver<Arc<Snapshot>>,
    installed: &mut watch::Receiver<u64>,
    pause: Duration,
) -> Interrupt {
    tokio::select! {
        biased;
        () = context.cut.cancelled() => Interrupt::Cut(Cut::Draining),
        changed = snapshots.changed() => match changed {
            Ok(()) => Interrupt::Policy,
            Err(_) => Interrupt::Cut(Cut::Draining),
        },
        changed = installed.changed() => match changed {
            Ok(()) => Interrupt::Certificate,
            Err(_) => Interrupt::Dismissed,
        },
        () = tokio::time::sleep(pause) => Interrupt::Look,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_comes_well_before_the_certificate_that_it_follows_has_ended() {
        let longest = |left: u64| {
            (0..1_000).map(|_| proof_delay(Duration::from_secs(left))).max().unwrap_or_default()
        };
        assert_eq!(longest(0), Duration::ZERO);
        for (left, most) in [(4, 1), (20, 5), (3_600, 10)] {
            let (longest, most) = (longest(left), Duration::from_secs(most));
            assert!(longest <= most && longest > most / 2, "{longest:?} with {left} s left");
        }
    }
}
