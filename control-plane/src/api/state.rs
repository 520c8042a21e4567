//! One stream an agent: what it is to enforce, and what it does enforce.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Duration,
};

use hauberk_core::identity::SpiffeId;
use hauberk_proto::{
    state::delta,
    v1::{self, agent_report::Kind, state_server},
};
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::Shared;
use crate::{
    attest,
    policy::{Published, Version},
};

/// Updates in flight to one agent. An agent that does not read gets the newest state when it does.
const IN_FLIGHT: usize = 1;

/// The most denial records in one report: an agent that floods us is cut short, and says so itself.
const MAX_DENIALS: usize = 1_000;

pub(crate) struct State(pub(crate) Arc<Shared>);

#[tonic::async_trait]
impl state_server::State for State {
    type SubscribeStream = ReceiverStream<Result<v1::StateUpdate, Status>>;

    async fn subscribe(
        &self,
        request: Request<Streaming<v1::AgentReport>>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        let shared = self.0.clone();
        // Before the check, so that no cut is missed after it.
        let cuts = self.0.fleet.cuts();
        let caller = attest::node(request.extensions(), &shared)?;
        let node = caller.node.name().to_owned();
        let life = caller.svid.facts().not_after().since(hauberk_tls::now());
        let reports = request.into_inner();
        let (updates, stream) = mpsc::channel(IN_FLIGHT);
        tokio::spawn(async move {
            let connected = Connected::new(&shared, &node);
            let outcome = tokio::select! {
                outcome = read_reports(&shared, &node, reports) => outcome,
                outcome = send_updates(&shared, &updates) => outcome,
                () = shared.stopping.cancelled() => {
                    Err(Status::unavailable("the control plane is stopping"))
                }
                () = cut(&node, cuts) => Err(Status::permission_denied(
                    "the credential of this connection is not good any more",
                )),
                () = tokio::time::sleep(life) => Err(Status::unauthenticated(
                    "the node certificate of this connection has expired; connect anew",
                )),
            };
            drop(connected);
            if let Err(status) = outcome {
                tracing::debug!(node, %status, "an agent's stream ended");
                // The agent may be gone.
                drop(updates.send(Err(status)).await);
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn get_time(
        &self,
        request: Request<v1::GetTimeRequest>,
    ) -> Result<Response<v1::GetTimeResponse>, Status> {
        attest::node(request.extensions(), &self.0)?;
        let now_unix_ms = hauberk_tls::now().unix_millis();
        Ok(Response::new(v1::GetTimeResponse { now_unix_ms }))
    }
}

/// Counts the stream for as long as it lives.
struct Connected<'a> {
    shared: &'a Shared,
    node: &'a str,
}

impl<'a> Connected<'a> {
    fn new(shared: &'a Shared, node: &'a str) -> Self {
        let now = hauberk_tls::now();
        shared.fleet.update(node, now, |agent| {
            agent.streams += 1;
            agent.connected = Some(now);
        });
        shared.metrics.set_agents_connected(connected(shared));
        tracing::info!(node, "an agent connected");
        Self { shared, node }
    }
}

impl Drop for Connected<'_> {
    fn drop(&mut self) {
        self.shared.fleet.update(self.node, hauberk_tls::now(), |agent| {
            agent.streams = agent.streams.saturating_sub(1);
        });
        self.shared.forget_gone_nodes();
        self.shared.metrics.set_agents_connected(connected(self.shared));
        tracing::info!(node = self.node, "an agent disconnected");
    }
}

/// Waits until the node's streams are cut. Whoever missed a message may have missed that one.
async fn cut(node: &str, mut cuts: broadcast::Receiver<String>) {
    while let Ok(name) = cuts.recv().await {
        if name == node {
            return;
        }
    }
}

async fn send_updates(
    shared: &Shared,
    updates: &mpsc::Sender<Result<v1::StateUpdate, Status>>,
) -> Result<(), Status> {
    let mut published = shared.publisher.subscribe();
    let nothing = BTreeMap::new();
    // Not a copy: there is a stream for each agent.
    let mut sent: Option<Arc<Published>> = None;
    loop {
        let next = published.borrow_and_update().clone();
        // Without any state yet there is nothing to send: an agent goes on with what it has.
        let known = sent.as_ref().map(|sent| sent.version());
        if next.revision > 0 && known != Some(next.version()) {
            // Another epoch owes nothing to the one before.
            let base = sent.as_ref().filter(|sent| sent.epoch == next.epoch);
            let full = base.is_none();
            let before = base.map_or(&nothing, |sent| &sent.resources);
            let (upserts, removals) = delta(before, &next.resources);
            let update = v1::StateUpdate {
                revision: next.revision,
                full,
                upserts,
                removals,
                state_hash: next.state_hash.to_vec(),
                made_at_unix_ms: next.made_at.unix_millis(),
                epoch: next.epoch,
            };
            if updates.send(Ok(update)).await.is_err() {
                return Ok(());
            }
            sent = Some(next);
        }
        if published.changed().await.is_err() {
            return Err(Status::unavailable("the control plane is stopping"));
        }
    }
}

async fn read_reports(
    shared: &Shared,
    node: &str,
    mut reports: Streaming<v1::AgentReport>,
) -> Result<(), Status> {
    while let Some(report) = reports.message().await? {
        let now = hauberk_tls::now();
        match report.kind {
            Some(Kind::Hello(hello)) => {
                shared.fleet.update(node, now, |agent| {
                    agent.version = hello.agent_version;
                    agent.enforced = Version { epoch: hello.epoch, revision: hello.revision };
                });
            }
            Some(Kind::Enforced(enforced)) => {
                // The version before says nothing of it, and takes what comes.
                let epoch = match enforced.epoch {
                    0 => shared.publisher.current().epoch,
                    epoch => epoch,
                };
                shared.fleet.update(node, now, |agent| {
                    agent.enforced = Version { epoch, revision: enforced.revision };
                    agent.refused = None;
                });
            }
            Some(Kind::Refused(refused)) => {
                tracing::error!(
                    node,
                    revision = refused.revision,
                    reason = refused.reason,
                    "an agent refuses a revision and enforces what it had"
                );
                shared.fleet.update(node, now, |agent| {
                    agent.refused =
                        Some(format!("revision {}: {}", refused.revision, refused.reason));
                });
                // It needs the whole state to go on; a new stream gives it that, not at once.
                tokio::time::sleep(Duration::from_secs(1)).await;
                return Err(Status::aborted("the update was refused; connect anew for all of it"));
            }
            Some(Kind::Denials(mut denials)) => {
                let over = denials.records.len().saturating_sub(MAX_DENIALS);
                denials.records.truncate(MAX_DENIALS);
                denials.suppressed =
                    denials.suppressed.saturating_add(u64::try_from(over).unwrap_or(u64::MAX));
                shared.fleet.update(node, now, |_| {});
                shared.fleet.add_denials(denials);
            }
            Some(Kind::Seen(seen)) => {
                shared.fleet.update(node, now, |_| {});
                let published = shared.publisher.current();
                let workloads = published.workloads.iter();
                let there: HashSet<&SpiffeId> = workloads
                    .filter(|known| known.node.as_str() == node)
                    .map(|known| &known.identity)
                    .collect();
                shared.fleet.seen().take(node, seen, |id| there.contains(id));
            }
            Some(Kind::Status(status)) => {
                shared.fleet.update(node, now, |agent| agent.status = status);
            }
            None => {
                return Err(Status::invalid_argument(
                    "report.kind: is missing or of an unknown kind",
                ));
            }
        }
    }
    Ok(())
}

fn connected(shared: &Shared) -> u64 {
    u64::try_from(shared.fleet.connected()).unwrap_or(u64::MAX)
}
