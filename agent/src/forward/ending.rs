//! How a connection ends: what its application, its peer and its record are told.

use hauberk_core::{
    policy::{Denial, Reason},
    session::{RefusalCause, ResetCause},
};

use super::{
    Outcome,
    carried::{Carried, Road},
};
use crate::{
    context::Context,
    relay::End,
    report::Report,
    session::{ProofRefused, Session, SessionError},
};

/// Why this side ends it.
pub(super) enum Cut {
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
    pub(super) fn unproven(detail: String) -> Self {
        Self::Proof(ProofRefused { reason: Reason::BadSvid, detail })
    }
}

/// Why nothing is copied any more.
pub(super) enum Ending {
    Cut(Cut),
    Relay(End),
}

/// What becomes of the relay that is over.
pub(super) async fn wind_up(
    context: &Context,
    mut relay: Carried,
    ending: Box<Ending>,
    report: &mut Report<'_>,
) -> Outcome {
    match *ending {
        Ending::Relay(End::NotTaken) => Outcome::NotTaken(relay.into_parts().0),
        Ending::Relay(End::Refused(refusal)) if !report.is_open() => match refusal.cause {
            RefusalCause::Denied(reason) => {
                Outcome::Refused(relay.into_parts().0, reason, Box::new(refusal))
            }
            RefusalCause::Unreachable => {
                report.closed("unreachable", Some(refusal.mend));
                relay.into_parts().0.reset();
                Outcome::Over(None)
            }
        },
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
            match cut {
                Cut::Unanswered => Outcome::Unanswered,
                Cut::Policy(_)
                | Cut::Unregistered
                | Cut::Certificate
                | Cut::Draining
                | Cut::Proof(_)
                | Cut::Silent => Outcome::Over(None),
            }
        }
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
        // Behind the answer that took it.
        End::Refused(_) => {
            report.closed("protocol_error", Some("refused after it was taken".to_owned()));
            ResetCause::Protocol
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
pub(super) fn failed(error: &SessionError, report: &mut Report<'_>) {
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
