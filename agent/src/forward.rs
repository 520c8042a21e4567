//! Forwarding under a permit: the relay, raced against everything that can end the permission.

use std::{
    ops::ControlFlow,
    sync::Arc,
    time::{Duration, Instant},
};

use hauberk_core::{
    policy::{Denial, Reason},
    session::{Reauthenticate, RefusalCause, ResetCause},
    time::Timestamp,
};
use hauberk_telemetry::record::Path;
use tokio::sync::{oneshot, watch};

use crate::{
    authorize::Permit,
    context::{Context, Local},
    mux,
    policy::Snapshot,
    quietly::Quietly,
    relay::{Application, End, Event, Relay},
    report::Report,
    session::{OPEN_TIMEOUT, ProofRefused, Session, SessionError},
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

/// What carries the bytes.
pub(crate) enum Carried {
    /// A session of its own.
    Dedicated(Box<Relay>),
    /// One of many streams of a session.
    Stream(Box<mux::Relay>),
}

/// The same without the application.
enum Road {
    Dedicated(Box<Session>),
    Stream(mux::Stream),
}

/// How it went.
pub(crate) enum Outcome {
    /// The stream is over. The session, if another stream may come on it.
    Over(Option<Box<Session>>),
    /// The destination went away before it saw the stream, which may be opened anew elsewhere.
    NotTaken(Application),
}

enum Cut {
    Policy(Denial),
    Unregistered,
    Certificate,
    Draining,
    Proof(ProofRefused),
    Unanswered,
    Silent,
}

impl Cut {
    /// The new certificate of the own workload cannot be shown.
    fn unproven(detail: String) -> Self {
        Self::Proof(ProofRefused { reason: Reason::BadSvid, detail })
    }
}

/// Why nothing is copied any more.
enum Ending {
    Cut(Cut),
    Relay(End),
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
        if let Some(until) = self.permit.until() {
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

/// What becomes of the relay that is over.
async fn wind_up(
    context: &Context,
    mut relay: Carried,
    ending: Box<Ending>,
    report: &mut Report<'_>,
) -> Outcome {
    match *ending {
        Ending::Relay(End::NotTaken) => Outcome::NotTaken(relay.into_parts().0),
        Ending::Relay(end) => {
            relay.tell_bytes(report);
            if let Carried::Dedicated(relay) = &mut relay {
                context.metrics.keys_renewed(relay.session.take_renewals());
            }
            Outcome::Over(finish(relay, end, report).await)
        }
        Ending::Cut(cut) => {
            relay.tell_bytes(report);
            cut_off(relay, &cut, report).await;
            Outcome::Over(None)
        }
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
            Err(_) => Interrupt::Cut(Cut::Unregistered),
        },
        () = tokio::time::sleep(pause) => Interrupt::Look,
    }
}

async fn cut_off(relay: Carried, cut: &Cut, report: &mut Report<'_>) {
    let cause = match cut {
        // Nothing was open: its application waits.
        Cut::Policy(denial) if !report.is_open() => {
            report.denied(denial, None);
            ResetCause::PolicyRevoked
        }
        Cut::Policy(denial) => {
            report.terminated(Reason::PolicyRevoked, format!("{}: {}", denial.reason, denial.mend));
            ResetCause::PolicyRevoked
        }
        Cut::Unregistered => {
            let text = "the workload is no longer registered here".to_owned();
            report.terminated(Reason::PolicyRevoked, text);
            ResetCause::PolicyRevoked
        }
        Cut::Certificate => {
            let text = "the peer's certificate ended and it showed no newer one".to_owned();
            report.terminated(Reason::ExpiredCert, text);
            ResetCause::CertificateExpired
        }
        Cut::Proof(ProofRefused { reason, detail }) => {
            report.terminated(*reason, detail.clone());
            ResetCause::Protocol
        }
        Cut::Draining => {
            report.closed("draining", Some("the agent is stopping".to_owned()));
            ResetCause::Draining
        }
        Cut::Unanswered => {
            let text = "the destination's agent did not answer in time".to_owned();
            report.closed("unreachable", Some(text));
            if let Carried::Stream(stream) = &relay {
                stream.distrust_session();
            }
            ResetCause::Application
        }
        Cut::Silent => {
            let text = "the peer's machine acknowledges nothing any more".to_owned();
            report.closed("session_failed", Some(text));
            ResetCause::Application
        }
    };
    break_off(relay, cause).await;
}

/// Resets the application, tells the peer why, and gives the session up.
async fn break_off(relay: Carried, cause: ResetCause) {
    let (application, road) = relay.into_parts();
    application.reset();
    if let Some(session) = road.reset(cause).await {
        session.close().await;
    }
}

impl Carried {
    async fn run(&mut self) -> Event {
        match self {
            Self::Dedicated(relay) => relay.run().await,
            Self::Stream(relay) => match relay.run().await {
                mux::Fate::Accepted => Event::Accepted,
                mux::Fate::Bulk => Event::Bulk,
                mux::Fate::Moved => Event::Moved,
                mux::Fate::End(end) => Event::End(end),
            },
        }
    }

    async fn connect_application(&mut self) -> std::io::Result<()> {
        match self {
            Self::Dedicated(relay) => relay.connect_application().await,
            Self::Stream(relay) => relay.connect_application().await,
        }
    }

    fn keep_alive(&mut self) {
        match self {
            Self::Dedicated(relay) => relay.keep_alive(),
            Self::Stream(relay) => relay.keep_alive(),
        }
    }

    fn awaits_answer(&self) -> bool {
        match self {
            Self::Dedicated(relay) => relay.session.machine.awaits_answer(),
            Self::Stream(relay) => relay.awaits_answer(),
        }
    }

    fn tell_bytes(&self, report: &mut Report<'_>) {
        match self {
            Self::Dedicated(relay) => report.bytes(relay.sent, relay.received),
            Self::Stream(relay) => report.bytes(relay.sent, relay.received),
        }
    }

    fn into_parts(self) -> (Application, Road) {
        match self {
            Self::Dedicated(relay) => {
                let (application, session) = relay.into_parts();
                (application, Road::Dedicated(session))
            }
            Self::Stream(relay) => {
                let (application, stream) = relay.into_parts();
                (application, Road::Stream(stream))
            }
        }
    }
}

impl Road {
    /// Breaks the stream off. The session, if another stream may come on it.
    async fn reset(self, cause: ResetCause) -> Option<Box<Session>> {
        match self {
            Self::Dedicated(mut session) => {
                session.reset(cause);
                session.settle().await.then_some(session)
            }
            Self::Stream(stream) => {
                stream.reset(cause);
                None
            }
        }
    }
}

/// The session, if another stream may come on it.
async fn finish(relay: Carried, end: End, report: &mut Report<'_>) -> Option<Box<Session>> {
    let by_application = matches!(end, End::Reset(ResetCause::Application | ResetCause::Answer));
    let answer = match end {
        End::Complete => {
            report.closed("complete", None);
            return match relay.into_parts().1 {
                Road::Dedicated(session) => Some(session),
                Road::Stream(_) => None,
            };
        }
        End::ApplicationFailed(error) => {
            report.closed("application_reset", Some(error.to_string()));
            ResetCause::Application
        }
        End::Refused(refusal) => {
            match refusal.cause {
                RefusalCause::Denied(reason) => report.denied_by_peer(reason, &refusal),
                RefusalCause::Unreachable => {
                    report.closed("unreachable", Some(refusal.mend.clone()));
                }
            }
            ResetCause::Answer
        }
        End::Reset(cause) => {
            reset_by_peer(cause, report);
            ResetCause::Answer
        }
        End::Truncated => {
            report.closed("truncated", Some("the session ended before the stream did".to_owned()));
            relay.into_parts().0.reset_when_delivered().await;
            return None;
        }
        End::SessionFailed(error) => {
            failed(&error, report);
            relay.into_parts().0.reset_when_delivered().await;
            return None;
        }
        End::Protocol(error) => {
            report.closed("protocol_error", Some(error.to_string()));
            let (application, road) = relay.into_parts();
            application.reset();
            if let Road::Dedicated(mut session) = road {
                session.reset(ResetCause::Protocol);
                // Nothing more is read of it. It may be gone.
                drop(session.flush().await);
            }
            return None;
        }
        End::Cut(ProofRefused { reason, detail }) => {
            report.terminated(reason, detail);
            relay.into_parts().0.reset();
            return None;
        }
        // The caller has taken care of it.
        End::NotTaken => return None,
    };
    let (application, road) = relay.into_parts();
    let reset = async {
        if by_application {
            application.reset_when_delivered().await;
        } else {
            application.reset();
        }
    };
    // Neither waits for the other: an application that does not read costs no session.
    tokio::join!(road.reset(answer), reset).0
}

fn reset_by_peer(cause: ResetCause, report: &mut Report<'_>) {
    let word = match cause {
        ResetCause::Application | ResetCause::Answer => "peer_application_reset",
        ResetCause::PolicyRevoked => {
            let text = "cut by the peer's agent after a policy change".to_owned();
            report.terminated(Reason::PolicyRevoked, text);
            "policy_revoked"
        }
        ResetCause::CertificateExpired => "peer_certificate_expired",
        ResetCause::Draining => "peer_draining",
        ResetCause::Protocol => "peer_protocol_error",
    };
    report.closed(word, None);
}

/// The peer may refuse us after our side of the handshake is done.
fn failed(error: &SessionError, report: &mut Report<'_>) {
    match error {
        SessionError::Refused(failure) if !report.is_open() => {
            let denial = crate::authorize::without_policy(failure.reason, "");
            report.denied(&denial, Some(failure.detail.clone()));
        }
        SessionError::Refused(_)
        | SessionError::Io(_)
        | SessionError::TimedOut
        | SessionError::Protocol(_)
        | SessionError::Closed
            if report.is_open() =>
        {
            report.closed("session_failed", Some(error.to_string()));
        }
        SessionError::Refused(_)
        | SessionError::Io(_)
        | SessionError::TimedOut
        | SessionError::Protocol(_)
        | SessionError::Closed => {
            report.closed("unreachable", Some(format!("the destination's agent: {error}")));
        }
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
