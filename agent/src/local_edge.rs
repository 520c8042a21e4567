//! A connection between two workloads of this very node, under the setting `verified-local`: proven and
//! decided as any other, and then carried without TLS. Its bytes pass from the loopback interface of one
//! workload's network through this process to that of the other, and over no other interface.
//!
//! What mutual TLS proves between two agents, this agent knows of itself: it holds the keys of
//! both. That their certificates are good, now and while the connection lasts, is checked by the same
//! verification as a peer's.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use hauberk_core::policy::{Denial, Reason};
use hauberk_linux::socket::{keep_alive, reset_on_close};
use hauberk_telemetry::{Side, metrics::SessionKind, record::Path};
use hauberk_tls::{Credential, TrustBundle, verify_chain};
use tokio::sync::watch;

use crate::{
    authorize::{Permit, not_ready, without_policy},
    capture::Waiting,
    context::{Context, Local},
    copy::{Broken, Joined},
    policy::Snapshot,
    report::Report,
};

/// How often certificates and the wall clock are looked at.
const LOOK: Duration = Duration::from_secs(30);

/// Two workloads of this node, one of which calls the other.
pub(crate) struct LocalEdge<'a> {
    pub(crate) context: &'a Arc<Context>,
    pub(crate) source: &'a Local,
    pub(crate) destination: Arc<Local>,
    pub(crate) id: [u8; 16],
    /// The caller's real address, which is one of its workload's.
    pub(crate) from: SocketAddr,
    pub(crate) wanted: SocketAddr,
}

enum Cut {
    Policy(Denial),
    Unregistered,
    Certificate(Reason, String),
    Draining,
}

impl LocalEdge<'_> {
    /// Carries the connection to its end. Dropping the application's connection refuses it.
    pub(crate) async fn carry(
        &self,
        application: Box<Waiting>,
        permit: Permit,
        snapshots: watch::Receiver<Arc<Snapshot>>,
        report: &mut Report<'_>,
    ) {
        // The destination's side of the story.
        let (client, wanted) = (Some(self.from), Some(self.wanted));
        let mut there = Report::new(self.context, Side::Destination, self.id, client, wanted);
        there.source(&self.source.workload.identity, Some(&self.source.workload));
        there.destination(&self.destination.workload.identity, Some(&self.destination.workload));
        if let Err((denial, detail)) = self.prove_both().await {
            report.denied(&denial, detail.clone());
            there.denied(&denial, detail);
            return;
        }
        let (of_caller, of_called) = (report.permitted(&permit), there.permitted(&permit));
        let called = match self.destination.place.dial_as(self.from, self.wanted).await {
            Ok(called) => {
                // It may be gone already.
                drop(keep_alive(&called));
                called
            }
            Err(error) => {
                let text = format!("the application: {error}");
                report.closed("unreachable", Some(text.clone()));
                there.closed("unreachable", Some(text));
                return;
            }
        };
        let application = match application.connect().await {
            Ok(application) => application,
            Err(error) => {
                let text = Some(error.to_string());
                report.closed("application_reset", text);
                there.closed("peer_application_reset", None);
                drop(reset_on_close(&called));
                return;
            }
        };
        self.context.metrics.stream_opened(SessionKind::VerifiedLocal);
        report.opened(Path::VerifiedLocal);
        there.opened(Path::VerifiedLocal);
        let mut joined = Joined::new(application, called, Some(of_caller), Some(of_called));
        let ended = self.forward(&mut joined, permit, snapshots).await;
        let (sent, received) = joined.bytes();
        report.bytes(sent, received);
        there.bytes(received, sent);
        match ended {
            Ended::Complete => {
                report.closed("complete", None);
                there.closed("complete", None);
            }
            Ended::Broken(Broken { caller, error }) => {
                let text = Some(error.to_string());
                if caller {
                    report.closed("application_reset", text);
                    there.closed("peer_application_reset", None);
                } else {
                    report.closed("peer_application_reset", None);
                    there.closed("application_reset", text);
                }
            }
            Ended::Cut(cut) => {
                cut.tell(report);
                cut.tell(&mut there);
            }
        }
    }

    /// Copies under the permit, raced against everything that can end it.
    async fn forward(
        &self,
        joined: &mut Joined,
        mut permit: Permit,
        mut snapshots: watch::Receiver<Arc<Snapshot>>,
    ) -> Ended {
        let mut installed =
            [self.source.identity.installed.clone(), self.destination.identity.installed.clone()];
        installed.iter_mut().for_each(watch::Receiver::mark_unchanged);
        let [of_source, of_destination] = &mut installed;
        let cut = loop {
            let pause = self.next_look(&permit);
            tokio::select! {
                biased;
                () = self.context.cut.cancelled() => break Cut::Draining,
                changed = snapshots.changed() => if changed.is_err() { break Cut::Draining },
                changed = of_source.changed() => if changed.is_err() { break Cut::Unregistered },
                changed = of_destination.changed() => if changed.is_err() { break Cut::Unregistered },
                () = tokio::time::sleep(pause) => {}
                ended = joined.run() => return match ended {
                    Ok(()) => Ended::Complete,
                    Err(broken) => Ended::Broken(broken),
                },
            }
            let snapshot = snapshots.borrow_and_update().clone();
            let has_left = |local: &Local| snapshot.has_let_go(&self.context.node, &local.workload);
            if has_left(self.source) && has_left(&self.destination) {
                // Nobody's business any more; what is open lives.
                continue;
            }
            if let Err((denial, detail)) = self.check_both() {
                break match denial.reason {
                    // There was one: whoever renews it took it out of use at its end.
                    Reason::NotReady => {
                        let text = "a workload's certificate ended and there is no newer one";
                        Cut::Certificate(Reason::ExpiredCert, text.to_owned())
                    }
                    reason => Cut::Certificate(reason, detail.unwrap_or(denial.mend)),
                };
            }
            match permit.renew(&snapshot) {
                Ok(renewed) => permit = renewed,
                Err(denial) => break Cut::Policy(denial),
            }
        };
        Ended::Cut(cut)
    }

    /// Waits for certificates that are not there yet, and checks them.
    async fn prove_both(&self) -> Result<(), (Denial, Option<String>)> {
        for local in [self.source, self.destination.as_ref()] {
            if !local.has_certificate().await {
                return Err((no_certificate(local), None));
            }
        }
        self.check_both()
    }

    fn check_both(&self) -> Result<(), (Denial, Option<String>)> {
        let trust = self.context.trust.load();
        for (local, is_server) in [(self.source, false), (self.destination.as_ref(), true)] {
            let Some(credential) = local.identity.slot.load() else {
                return Err((no_certificate(local), None));
            };
            check(local, &credential, &trust, is_server)
                .map_err(|(reason, detail)| (without_policy(reason, ""), Some(detail)))?;
        }
        Ok(())
    }

    fn next_look(&self, permit: &Permit) -> Duration {
        let now = hauberk_tls::now();
        let certificates = [self.source, self.destination.as_ref()]
            .map(|local| local.identity.slot.load().map(|own| own.facts().not_after()));
        let ends = certificates.into_iter().flatten().chain(permit.until());
        ends.map(|end| end.since(now)).fold(LOOK, Duration::min).max(Duration::from_millis(1))
    }
}

/// The same that is asked of a peer.
fn check(
    local: &Local,
    credential: &Credential,
    trust: &TrustBundle,
    is_server: bool,
) -> Result<(), (Reason, String)> {
    let identity = &local.workload.identity;
    let Some((leaf, intermediates)) = credential.chain().split_first() else {
        return Err((Reason::BadSvid, format!("{identity} has an empty certificate chain")));
    };
    let proven = verify_chain(leaf, intermediates, trust, is_server, hauberk_tls::now())
        .map_err(|error| (error.reason(), format!("the certificate of {identity}: {error}")))?;
    if proven.id() == identity {
        return Ok(());
    }
    Err((Reason::IdentityMismatch, format!("{} is not {identity}", proven.id())))
}

fn no_certificate(local: &Local) -> Denial {
    not_ready(&format!("{} has no certificate yet", local.workload.identity))
}

enum Ended {
    Complete,
    Broken(Broken),
    Cut(Cut),
}

impl Cut {
    fn tell(&self, report: &mut Report<'_>) {
        match self {
            Self::Policy(denial) => {
                let text = format!("{}: {}", denial.reason, denial.mend);
                report.terminated(Reason::PolicyRevoked, text);
            }
            Self::Unregistered => {
                let text = "a workload of it is no longer registered here".to_owned();
                report.terminated(Reason::PolicyRevoked, text);
            }
            Self::Certificate(reason, detail) => {
                report.terminated(*reason, detail.clone());
            }
            Self::Draining => {
                report.closed("draining", Some("the agent is stopping".to_owned()));
            }
        }
    }
}
