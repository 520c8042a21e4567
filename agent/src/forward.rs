//! Forwarding under a permit: the relay, raced against everything that can end the permission.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use hauberk_core::{
    policy::{Denial, Reason},
    session::{RefusalCause, ResetCause},
    time::Timestamp,
};
use hauberk_telemetry::record::Path;
use tokio::sync::watch;

use crate::{
    authorize::Permit,
    context::{Context, Local},
    policy::Snapshot,
    quietly::Quietly,
    relay::{Application, End, Event, Relay},
    report::Report,
    session::{OPEN_TIMEOUT, Session, SessionError},
};

/// How often a connection looks whether its peer is still there, and whether the wall clock has jumped.
const LOOK: Duration = Duration::from_secs(30);

/// A peer's kernel that acknowledges nothing for this long is gone. The local kernel would go on for
/// a quarter of an hour.
const SILENCE: Duration = Duration::from_secs(30);

/// Over how long the open connections of a workload show their peers its new certificate: all at once would
/// hold up everybody's bytes. Less where the old one ends soon.
const PROOF_SPREAD: Duration = Duration::from_secs(10);

/// How long after an application reads again the proof of the peer's newer certificate may take, that
/// waited behind what was not read.
const PROOF_GRACE: Duration = Duration::from_secs(10);

/// Everything that a forwarded stream needs.
pub(crate) struct Forward<'a> {
    pub(crate) context: &'a Context,
    pub(crate) local: &'a Local,
    pub(crate) relay: Box<Relay>,
    pub(crate) snapshots: watch::Receiver<Arc<Snapshot>>,
}

/// How it went.
pub(crate) enum Outcome {
    /// The stream is over. The session, if another stream may come on it.
    Over(Option<Box<Session>>),
    /// The destination went away before it saw the stream, which may be opened anew elsewhere.
    NotTaken(Application, Permit),
}

enum Cut {
    Policy(Denial),
    Unregistered,
    Certificate,
    Draining,
    Proof(String),
    Unanswered,
    Silent,
}

impl Forward<'_> {
    /// Copies until the stream ends or the permission does.
    pub(crate) async fn run(self, mut permit: Permit, report: &mut Report<'_>) -> Outcome {
        let Self { context, local, mut relay, mut snapshots } = self;
        let unanswered = Instant::now() + OPEN_TIMEOUT;
        let mut proof_until = None;
        // When to show the newest certificate.
        let mut proof_due: Option<Instant> = None;
        let mut installed = local.identity.installed.clone();
        installed.mark_unchanged();
        // Renewed since the session was made, and nobody has told the peer.
        if let Some(own) = local.identity.slot.load()
            && !relay.session.was_made_with(&own)
            && let Err(error) = relay.session.show_proof(&own)
        {
            Box::pin(cut_off(relay, &Cut::Proof(error), report)).await;
            return Outcome::Over(None);
        }
        let cut = loop {
            let mut pause = next_look(&relay, &permit, unanswered);
            if let Some(due) = proof_due {
                pause = pause.min(due.saturating_duration_since(Instant::now()));
            }
            let turn = {
                let interrupt = interruption(context, &mut snapshots, &mut installed, pause);
                let interrupt = std::pin::pin!(interrupt);
                let interrupt = Quietly::new(interrupt);
                tokio::select! {
                    biased;
                    interrupt = interrupt => Turn::Interrupt(interrupt),
                    event = relay.run() => Turn::Event(event),
                }
            };
            match turn {
                Turn::Interrupt(Interrupt::Cut(cut)) => break cut,
                Turn::Interrupt(Interrupt::Policy) => {
                    let snapshot = snapshots.borrow_and_update().clone();
                    match permit.renew(&snapshot) {
                        Ok(renewed) => permit = renewed,
                        Err(denial) => break Cut::Policy(denial),
                    }
                }
                Turn::Interrupt(Interrupt::Certificate) => {
                    let left = relay.session.shown_until().map(|end| end.since(hauberk_tls::now()));
                    let due = Instant::now() + proof_delay(left.unwrap_or_default());
                    proof_due = Some(proof_due.map_or(due, |earlier| earlier.min(due)));
                }
                Turn::Interrupt(Interrupt::Look) => {
                    if proof_due.is_some_and(|due| due <= Instant::now()) {
                        proof_due = None;
                        if let Some(credential) = local.identity.slot.load()
                            && let Err(error) = relay.session.show_proof(&credential)
                        {
                            break Cut::Proof(error);
                        }
                    }
                    if let Some(cut) = look(&mut relay, unanswered, &mut proof_until) {
                        break cut;
                    }
                    let snapshot = snapshots.borrow().clone();
                    match permit.renew(&snapshot) {
                        Ok(renewed) => permit = renewed,
                        Err(denial) => break Cut::Policy(denial),
                    }
                }
                Turn::Event(event) => match event {
                    Event::Accepted => report.opened(Path::Mtls),
                    Event::Reauthenticate(frame) => {
                        let trust = context.trust.load();
                        if let Err(error) =
                            relay.session.take_proof(&frame, &trust, hauberk_tls::now())
                        {
                            break Cut::Proof(error);
                        }
                        relay.suspended = false;
                        proof_until = None;
                    }
                    Event::End(End::NotTaken) => {
                        return Outcome::NotTaken(relay.into_parts().0, permit);
                    }
                    Event::End(end) => {
                        report.bytes(relay.sent, relay.received);
                        context.metrics.keys_renewed(relay.session.take_renewals());
                        return Outcome::Over(Box::pin(finish(relay, end, report)).await);
                    }
                },
            }
        };
        report.bytes(relay.sent, relay.received);
        Box::pin(cut_off(relay, &cut, report)).await;
        Outcome::Over(None)
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

fn next_look(relay: &Relay, permit: &Permit, unanswered: Instant) -> Duration {
    let now = hauberk_tls::now();
    let mut pause = LOOK;
    if let Some(until) = permit.until() {
        pause = pause.min(until.since(now));
    }
    let certificate: Timestamp = relay.session.peer().facts().not_after();
    // Past its end only while it waits for the application to read.
    pause = pause.min(certificate.since(now).max(Duration::from_millis(if certificate <= now {
        500
    } else {
        0
    })));
    if relay.session.machine.awaits_answer() {
        pause = pause.min(unanswered.saturating_duration_since(Instant::now()));
    }
    pause.max(Duration::from_millis(1))
}

/// What may have ended without anything having happened.
fn look(relay: &mut Relay, unanswered: Instant, proof_until: &mut Option<Instant>) -> Option<Cut> {
    let now = Instant::now();
    if relay.session.machine.awaits_answer() && now >= unanswered {
        return Some(Cut::Unanswered);
    }
    if relay.session.silence().is_some_and(|silence| silence >= SILENCE) {
        return Some(Cut::Silent);
    }
    if relay.session.peer().facts().not_after() > hauberk_tls::now() {
        return None;
    }
    // The proof comes in turn, behind data. While the application does not read that, nothing passes
    // in that direction anyway, and nothing is sent in the other.
    if relay.held_back {
        relay.suspended = true;
        *proof_until = Some(now + PROOF_GRACE);
    }
    if proof_until.is_some_and(|until| now < until) { None } else { Some(Cut::Certificate) }
}

async fn cut_off(relay: Box<Relay>, cut: &Cut, report: &mut Report<'_>) {
    let cause = match cut {
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
        Cut::Proof(detail) => {
            report.terminated(Reason::BadSvid, detail.clone());
            ResetCause::Protocol
        }
        Cut::Draining => {
            report.closed("draining", Some("the agent is stopping".to_owned()));
            ResetCause::Draining
        }
        Cut::Unanswered => {
            let text = "the destination's agent did not answer in time".to_owned();
            report.closed("unreachable", Some(text));
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
async fn break_off(relay: Box<Relay>, cause: ResetCause) {
    let (application, mut session) = relay.into_parts();
    application.reset();
    session.reset(cause);
    if session.settle().await {
        session.close().await;
    }
}

/// The session, if another stream may come on it.
async fn finish(relay: Box<Relay>, end: End, report: &mut Report<'_>) -> Option<Box<Session>> {
    let answer = match end {
        End::Complete => {
            report.closed("complete", None);
            return Some(relay.into_parts().1);
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
            relay.into_parts().0.reset();
            return None;
        }
        End::SessionFailed(error) => {
            failed(&error, report);
            relay.into_parts().0.reset();
            return None;
        }
        End::Protocol(error) => {
            report.closed("protocol_error", Some(error.to_string()));
            let (application, mut session) = relay.into_parts();
            application.reset();
            session.reset(ResetCause::Protocol);
            // Nothing more is read of it. It may be gone.
            drop(session.flush().await);
            return None;
        }
        // The caller has taken care of it.
        End::NotTaken => return None,
    };
    let (application, mut session) = relay.into_parts();
    application.reset();
    session.reset(answer);
    session.settle().await.then_some(session)
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
