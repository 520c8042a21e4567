//! Forwarding under a permit: the relay, raced against everything that can end the permission.

use std::{sync::Arc, time::Duration};

use hauberk_core::{
    policy::Reason,
    session::{FrameType, Reauthenticate, ResetCause},
    svid::VerifiedSvid,
    time::Timestamp,
};
use hauberk_telemetry::EdgeCounters;
use hauberk_tls::{prove, verify_proof};
use tokio::{net::TcpStream, sync::watch};

use crate::{
    authorize::Permit,
    context::{Context, Local},
    policy::Snapshot,
    relay::{End, Event, Relay},
    report::Report,
    session::Session,
};

/// How long after its end a session waits for the peer's close, so that no last byte is lost.
const LINGER: Duration = Duration::from_secs(2);

/// Everything that a forwarded stream needs.
pub(crate) struct Forward<'a> {
    pub(crate) context: &'a Context,
    pub(crate) local: &'a Local,
    pub(crate) application: TcpStream,
    pub(crate) session: Session,
    pub(crate) snapshots: watch::Receiver<Arc<Snapshot>>,
    pub(crate) counters: EdgeCounters,
}

/// What goes on besides the copying.
struct Watching<'a> {
    local: &'a Local,
    context: &'a Context,
    peer: VerifiedSvid,
    exporter: [u8; 32],
    is_source: bool,
    proofs_sent: u32,
    proofs_taken: u32,
}

enum Cut {
    Policy(String),
    Certificate,
    Draining,
    Proof(String),
}

impl Forward<'_> {
    /// Copies until the stream ends or the permission does.
    pub(crate) async fn run(self, permit: Permit, report: &mut Report<'_>) {
        let Self { context, local, application, session, mut snapshots, counters } = self;
        let mut watching = Watching {
            local,
            context,
            peer: session.peer,
            exporter: session.exporter,
            is_source: session.is_source,
            proofs_sent: 0,
            proofs_taken: 0,
        };
        let mut relay = Relay::new(application, session.stream, counters);
        let mut installed = local.identity.installed.clone();
        installed.mark_unchanged();
        let mut permit = permit;
        let cut = loop {
            let deadline = watching.deadline(&permit);
            tokio::select! {
                biased;
                () = context.cut.cancelled() => break Cut::Draining,
                changed = snapshots.changed() => {
                    if changed.is_err() {
                        break Cut::Draining;
                    }
                    let snapshot = snapshots.borrow_and_update().clone();
                    match permit.renew(&snapshot) {
                        Ok(renewed) => permit = renewed,
                        Err(denial) => break Cut::Policy(format!("{}: {}", denial.reason, denial.mend)),
                    }
                }
                changed = installed.changed() => {
                    if changed.is_err() {
                        break Cut::Policy("the workload is no longer registered here".to_owned());
                    }
                    if let Err(error) = watching.show_proof(&mut relay) {
                        break Cut::Proof(error);
                    }
                }
                () = sleep_until(deadline) => {
                    let snapshot = snapshots.borrow().clone();
                    if watching.peer.facts().not_after() <= hauberk_tls::now() {
                        break Cut::Certificate;
                    }
                    match permit.renew(&snapshot) {
                        Ok(renewed) => permit = renewed,
                        Err(denial) => break Cut::Policy(format!("{}: {}", denial.reason, denial.mend)),
                    }
                }
                event = relay.run() => match event {
                    Event::Reauthenticate(frame) => {
                        if let Err(error) = watching.take_proof(&frame) {
                            break Cut::Proof(error);
                        }
                    }
                    Event::End(end) => {
                        report.bytes(relay.sent, relay.received);
                        finish(relay, end, report).await;
                        return;
                    }
                },
            }
        };
        report.bytes(relay.sent, relay.received);
        let cause = match cut {
            Cut::Policy(detail) => {
                report.terminated(Reason::PolicyRevoked, detail);
                ResetCause::PolicyRevoked
            }
            Cut::Certificate => {
                report.terminated(
                    Reason::ExpiredCert,
                    "the peer's certificate ended and it showed no newer one".to_owned(),
                );
                ResetCause::CertificateExpired
            }
            Cut::Proof(detail) => {
                report.terminated(Reason::BadSvid, detail);
                ResetCause::Protocol
            }
            Cut::Draining => {
                report.closed("draining", Some("the agent is stopping".to_owned()));
                ResetCause::Draining
            }
        };
        relay.break_off(cause).await;
    }
}

impl Watching<'_> {
    fn deadline(&self, permit: &Permit) -> Timestamp {
        let certificate = self.peer.facts().not_after();
        permit.until().map_or(certificate, |until| until.min(certificate))
    }

    fn show_proof(&mut self, relay: &mut Relay) -> Result<(), String> {
        let Some(credential) = self.local.identity.slot.load() else { return Ok(()) };
        self.proofs_sent += 1;
        let frame = prove(&credential, &self.exporter, self.is_source, self.proofs_sent)
            .map_err(|error| error.to_string())?;
        relay.queue(FrameType::Reauthenticate, &frame.encode()).map_err(|error| error.to_string())
    }

    fn take_proof(&mut self, frame: &Reauthenticate) -> Result<(), String> {
        self.peer = verify_proof(
            frame,
            &self.peer,
            &self.context.trust.load(),
            &self.exporter,
            !self.is_source,
            self.proofs_taken + 1,
            hauberk_tls::now(),
        )
        .map_err(|error| error.to_string())?;
        self.proofs_taken += 1;
        Ok(())
    }
}

async fn finish(relay: Relay, end: End, report: &mut Report<'_>) {
    match end {
        End::Complete => {
            report.closed("complete", None);
            relay.close(LINGER).await;
        }
        End::ApplicationFailed(error) => {
            report.closed("application_reset", Some(error.to_string()));
            relay.break_off(ResetCause::Application).await;
        }
        End::Reset(cause) => {
            let word = match cause {
                ResetCause::Application => "peer_application_reset",
                ResetCause::PolicyRevoked => {
                    report.terminated(
                        Reason::PolicyRevoked,
                        "cut by the peer's agent after a policy change".to_owned(),
                    );
                    "policy_revoked"
                }
                ResetCause::CertificateExpired => "peer_certificate_expired",
                ResetCause::Draining => "peer_draining",
                ResetCause::Protocol => "peer_protocol_error",
            };
            report.closed(word, None);
            relay.reset_application();
        }
        End::Truncated => {
            report.closed("truncated", Some("the session ended before the stream did".to_owned()));
            relay.reset_application();
        }
        End::SessionFailed(error) => {
            report.closed("session_failed", Some(error.to_string()));
            relay.reset_application();
        }
        End::Protocol(error) => {
            report.closed("protocol_error", Some(error.to_string()));
            relay.break_off(ResetCause::Protocol).await;
        }
    }
}

async fn sleep_until(deadline: Timestamp) {
    // In steps, so that a jump of the wall clock is noticed.
    let pause = deadline.since(hauberk_tls::now()).min(Duration::from_secs(60));
    tokio::time::sleep(pause.max(Duration::from_millis(1))).await;
}
