//! What people ask, over the local socket.

use std::{pin::Pin, sync::Arc, time::Duration};

use hauberk_core::{
    identity::{IdentityKind, SpiffeId},
    likeness::most_alike,
    policy::{Mode, Request as Question, Verdict, service_ports::ServicePorts},
    time::Timestamp,
};
use hauberk_proto::{
    convert::Resource,
    token::JoinToken,
    v1::{self, operator_server},
};
use hauberk_tls::sha256;
use tokio_stream::{Stream, StreamExt, wrappers::BroadcastStream};
use tonic::{Request, Response, Status};

use super::{Shared, learn::learn};
use crate::{
    attest::internal,
    policy::Published,
    store::{Node, Token},
};

/// The longest life of a join token: it is a password while it lives.
const MAX_TOKEN_LIFETIME: Duration = Duration::from_secs(24 * 3600);

const DEFAULT_DENIALS: usize = 100;

/// How many names are told to whom asks about one that nobody has.
const NEAREST: usize = 3;

pub(crate) struct Operator(pub(crate) Arc<Shared>);

#[tonic::async_trait]
impl operator_server::Operator for Operator {
    type DeniedStream = Pin<Box<dyn Stream<Item = Result<v1::DeniedEvent, Status>> + Send>>;

    async fn create_token(
        &self,
        request: Request<v1::CreateTokenRequest>,
    ) -> Result<Response<v1::CreateTokenResponse>, Status> {
        let message = request.into_inner();
        let shared = &self.0;
        let machines = &shared.publisher.current().machines;
        if !machines.contains(&message.node) {
            let known = match machines.as_slice() {
                [] => "none is declared".to_owned(),
                names => format!("declared are: {}", names.join(", ")),
            };
            return Err(Status::not_found(format!(
                "no Machine {:?} in the manifests ({known}); declare it first",
                message.node
            )));
        }
        let lifetime = Duration::from_secs(message.ttl_seconds);
        if lifetime.is_zero() || lifetime > MAX_TOKEN_LIFETIME {
            return Err(Status::invalid_argument(format!(
                "ttl: {} s is not between 1s and 24h",
                message.ttl_seconds
            )));
        }
        let mut secret = [0; 32];
        getrandom::fill(&mut secret)
            .map_err(|_| Status::unavailable("the system gives no random numbers"))?;
        let expires = hauberk_tls::now().saturating_add(lifetime);
        let record = Token { node: message.node.clone(), expires_unix_ms: expires.unix_millis() };
        shared.store.add_token(&sha256(&secret), &record).map_err(internal)?;
        tracing::info!(target: "hauberk.audit", node = message.node, expires = %expires, "a join token was made");
        let token = JoinToken {
            control_plane: shared.advertised.clone(),
            root_sha256: shared.authority.root_sha256(),
            secret,
        };
        Ok(Response::new(v1::CreateTokenResponse {
            token: token.reveal(),
            expires_at_unix_ms: expires.unix_millis(),
        }))
    }

    async fn get_status(
        &self,
        _: Request<v1::GetStatusRequest>,
    ) -> Result<Response<v1::GetStatusResponse>, Status> {
        status(&self.0).map(Response::new)
    }

    async fn why(
        &self,
        request: Request<v1::WhyRequest>,
    ) -> Result<Response<v1::WhyResponse>, Status> {
        why(&self.0, &request.into_inner()).map(Response::new)
    }

    async fn denied(
        &self,
        request: Request<v1::DeniedRequest>,
    ) -> Result<Response<Self::DeniedStream>, Status> {
        let message = request.into_inner();
        let limit = match message.limit {
            0 => DEFAULT_DENIALS,
            limit => usize::try_from(limit).unwrap_or(DEFAULT_DENIALS),
        };
        let (past, followed) = self.0.fleet.denials(limit);
        let past = tokio_stream::iter(past.into_iter().map(Ok));
        if !message.follow {
            return Ok(Response::new(Box::pin(past)));
        }
        let coming = BroadcastStream::new(followed).map(|event| {
            Ok(event.unwrap_or_else(
                |tokio_stream::wrappers::errors::BroadcastStreamRecvError::Lagged(missed)| {
                    v1::DeniedEvent { record: String::new(), suppressed: missed }
                },
            ))
        });
        Ok(Response::new(Box::pin(past.chain(coming))))
    }

    async fn learn(
        &self,
        _: Request<v1::LearnRequest>,
    ) -> Result<Response<v1::LearnResponse>, Status> {
        Ok(Response::new(learn(&self.0)))
    }
}

fn status(shared: &Shared) -> Result<v1::GetStatusResponse, Status> {
    let published = shared.publisher.current();
    let agents = shared.fleet.agents();
    let mut nodes = Vec::new();
    for name in &published.machines {
        let record = shared.store.node(name).map_err(internal)?;
        let agent = agents.get(name).cloned().unwrap_or_default();
        nodes.push(v1::NodeInfo {
            name: name.clone(),
            // A node of the cluster needs no joining.
            joined: record.is_some() || agent.streams > 0,
            connected: agent.streams > 0,
            enforced_revision: agent.enforced_in(published.epoch),
            refused: agent.refused.unwrap_or_default(),
            locked: record.as_ref().and_then(|node| node.locked.clone()).unwrap_or_default(),
            renewable_until_unix_ms: record
                .as_ref()
                .map_or(0, |node| renewable_until(node, shared.renewal_grace)),
            certificate_not_after_unix_ms: record.map_or(0, |node| node.not_after_unix_ms),
            last_seen_unix_ms: agent.last_seen.map_or(0, |seen| seen.unix_millis()),
            agent_version: agent.version,
            open_connections: agent.status.open_connections,
            clock_skew_ms: agent.status.clock_skew_ms,
        });
    }
    let workloads = published
        .workloads
        .iter()
        .map(|workload| {
            let key = workload.key();
            let report = agents
                .get(workload.node.as_str())
                .and_then(|agent| agent.status.workloads.iter().find(|w| w.workload == key))
                .cloned()
                .unwrap_or_default();
            v1::WorkloadInfo {
                workload: workload.shown(),
                spiffe_id: workload.identity.to_string(),
                node: workload.node.to_string(),
                mode: match workload.mode {
                    Mode::Enforce => v1::Mode::Enforce.into(),
                    Mode::Audit => v1::Mode::Audit.into(),
                },
                addresses: workload.addresses.iter().map(ToString::to_string).collect(),
                ports: workload.ports.iter().copied().map(u32::from).collect(),
                captured: report.captured,
                problem: report.problem,
                not_after_unix_ms: report.not_after_unix_ms,
                serial: report.serial,
                restored: report.restored,
                restored_at_unix_ms: report.restored_at_unix_ms,
                restored_what: report.restored_what,
                unreached: report.unreached,
                unreported: report.unreported,
                older: report.older,
                older_closed_unix_ms: report.older_closed_unix_ms,
            }
        })
        .collect();
    let (root, intermediate) = shared.authority.expiries();
    Ok(v1::GetStatusResponse {
        trust_domain: shared.authority.trust_domain().to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        revision: published.revision,
        nodes,
        workloads,
        manifest_errors: shared.publisher.errors(),
        warnings: published.warnings.clone(),
        root_not_after_unix_ms: root.unix_millis(),
        intermediate_not_after_unix_ms: intermediate.unix_millis(),
        policies: u64::try_from(published.policies).unwrap_or(u64::MAX),
        guardrails: u64::try_from(published.guardrails).unwrap_or(u64::MAX),
        ca_notes: shared.authority.notes().to_vec(),
        kubernetes: shared.kubernetes.is_some(),
    })
}

fn renewable_until(node: &Node, grace: Duration) -> i64 {
    if grace.is_zero() || node.locked.is_some() {
        return 0;
    }
    Timestamp::from_unix_millis(node.not_after_unix_ms).saturating_add(grace).unix_millis()
}

fn why(shared: &Shared, question: &v1::WhyRequest) -> Result<v1::WhyResponse, Status> {
    let published = shared.publisher.current();
    let source = identity("source", &question.source, &published)?;
    let destination = identity("destination", &question.destination, &published)?;
    let port = u16::try_from(question.port).ok().filter(|port| *port > 0).ok_or_else(|| {
        Status::invalid_argument(format!("port: {} is not from 1 to 65535", question.port))
    })?;
    let verdict = published.table.decide(Question {
        source: &source,
        destination: &destination,
        port,
        now: hauberk_tls::now(),
    });
    let mut answer = v1::WhyResponse {
        source_id: source.to_string(),
        destination_id: destination.to_string(),
        decision: verdict.as_str().to_owned(),
        revision: published.revision,
        notes: notes(shared, &published, &source, &destination, port),
        ..v1::WhyResponse::default()
    };
    match verdict {
        Verdict::Allow(allowed) => {
            answer.policy = allowed.policy.to_string();
            answer.rule = allowed.rule.to_string();
            answer.owner = allowed.owner.to_string();
        }
        Verdict::WouldDeny(denial) | Verdict::Deny(denial) => {
            let text = |value: Option<String>| value.unwrap_or_default();
            answer.reason = denial.reason.to_string();
            answer.policy = text(denial.policy.map(|policy| policy.to_string()));
            answer.owner = text(denial.owner.map(|owner| owner.to_string()));
            answer.rule = text(denial.nearest_miss.as_ref().map(|miss| miss.rule.to_string()));
            answer.nearest_miss = text(denial.nearest_miss.map(|miss| miss.to_string()));
            answer.mend = denial.mend;
        }
    }
    Ok(answer)
}

fn identity(field: &str, text: &str, published: &Published) -> Result<SpiffeId, Status> {
    if text.starts_with("spiffe://") {
        return text
            .parse()
            .map_err(|error| Status::invalid_argument(format!("{field}: {text:?}: {error}")));
    }
    if let Some(workload) = published.named(text) {
        return Ok(workload.identity.clone());
    }
    // Pods have names that nobody knows by heart; those of their service accounts, people do.
    let by_account = published.workloads.iter().find(|workload| {
        matches!(workload.identity.kind(), IdentityKind::Workload { namespace, service_account }
            if text.split_once('/') == Some((namespace, service_account)))
    });
    if let Some(workload) = by_account {
        return Ok(workload.identity.clone());
    }
    let known = published.workloads.iter().flat_map(|workload| {
        let account = match workload.identity.kind() {
            IdentityKind::Workload { namespace, service_account } => {
                Some(format!("{namespace}/{service_account}"))
            }
            IdentityKind::Machine { .. }
            | IdentityKind::Node { .. }
            | IdentityKind::ControlPlane
            | IdentityKind::Other => None,
        };
        std::iter::once(workload.shown()).chain(account)
    });
    let nearest = most_alike(text, known, NEAREST).join(", ");
    let nearest = match published.workloads.len() {
        0 => "none is registered".to_owned(),
        count if nearest.is_empty() => format!("{count} are registered"),
        count => format!("of {count} that are registered the nearest are {nearest}"),
    };
    Err(Status::not_found(format!(
        "{field}: no workload {text:?}; {nearest}. Give namespace/workload, namespace/service-account, machine/name or a \
         SPIFFE ID; hauberk status lists all"
    )))
}

/// What stands in the way besides policy.
fn notes(
    shared: &Shared,
    published: &Published,
    source: &SpiffeId,
    destination: &SpiffeId,
    port: u16,
) -> Vec<String> {
    let agents = shared.fleet.agents();
    let mut notes = Vec::new();
    if source == destination {
        notes.push(
            "a workload reaches its own addresses without the mesh, which is not asked; this answer is about other \
             instances of the same identity"
                .to_owned(),
        );
    }
    for (role, id) in [("source", source), ("destination", destination)] {
        let Some(workload) = published.by_identity(id) else {
            notes.push(format!("no registered workload is the {role} {id}"));
            continue;
        };
        let node = workload.node.as_str();
        let enforced = agents.get(node).map_or(0, |agent| agent.enforced_in(published.epoch));
        match agents.get(node) {
            None => {
                notes.push(format!("the agent of {node}, where the {role} runs, has not connected"))
            }
            Some(agent) if agent.streams == 0 => {
                notes.push(format!(
                    "the agent of {node}, where the {role} runs, is away; it enforces revision {enforced}"
                ));
            }
            Some(_) if enforced != published.revision => notes.push(format!(
                "the agent of {node} still enforces revision {enforced}, this answer is about {}",
                published.revision
            )),
            Some(_) => {}
        }
        // Every port of an address of its own is its own.
        let declares = workload.process.own_addresses().is_none() || !workload.ports.is_empty();
        if role == "destination" && declares && !workload.ports.contains(&port) {
            notes.push(format!("{} does not declare that it serves port {port}", workload.shown()));
        }
    }
    notes.extend(led_elsewhere(published, destination, port));
    notes
}

/// If the port is one of a service's, which leads to other ports of the destination's pods.
fn led_elsewhere(published: &Published, destination: &SpiffeId, port: u16) -> Option<String> {
    let service = |message: &v1::Resource| match Resource::try_from(message.clone()) {
        Ok(Resource::Service(service)) => Some(service),
        Ok(_) | Err(_) => None,
    };
    let services: Vec<_> = published.resources.values().filter_map(service).collect();
    let pods = published.workloads.iter().filter(|workload| workload.identity == *destination);
    let addresses = pods.flat_map(|workload| workload.addresses.iter().copied());
    let (service, targets) = ServicePorts::of(&services).elsewhere(addresses, port)?;
    let targets: Vec<_> = targets.iter().map(u16::to_string).collect();
    let targets = targets.join(" or ");
    Some(format!(
        "port {port} is that of the service {service}; connections to it go to port {targets} of the pods, and are \
         decided as such: ask about that one"
    ))
}
