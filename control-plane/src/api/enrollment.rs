//! Joining, and renewing what joining gave.

use std::sync::Arc;

use hauberk_core::identity::SpiffeId;
use hauberk_kubernetes::AttestError;
use hauberk_proto::v1::{self, enrollment_server};
use hauberk_telemetry::metrics::Outcome;
use hauberk_tls::sha256;
use tonic::{Request, Response, Status};

use super::{Shared, chain_message};
use crate::{
    attest::{self, Connection, Renewing, internal},
    ca::{CaError, Issued},
    store::{Consumed, Node},
};

/// The longest token of a service account, by far.
const MAX_TOKEN: usize = 16 * 1024;

pub(crate) struct Enrollment(pub(crate) Arc<Shared>);

#[tonic::async_trait]
impl enrollment_server::Enrollment for Enrollment {
    async fn join(
        &self,
        request: Request<v1::JoinRequest>,
    ) -> Result<Response<v1::NodeCredential>, Status> {
        let address = request.extensions().get::<Connection>().map(|c| c.address.to_string());
        let message = request.into_inner();
        let shared = &self.0;
        let now = hauberk_tls::now();
        let hash = sha256(&message.token_secret);
        let address = address.unwrap_or_default();
        // Only looked at: a request that is no good costs nobody a token.
        let found = shared.store.look_at_token(&hash, now.unix_millis()).map_err(internal)?;
        let node = named(shared, found, &address)?;
        let issued = issue_node(shared, &node, &message.certificate_request)?;
        let consumed = shared.store.consume_token(&hash, now.unix_millis()).map_err(internal)?;
        // Used meanwhile: the certificate goes nowhere.
        let node = named(shared, consumed, &address)?;
        let record = Node {
            current_serial: issued.serial.clone(),
            next_serial: None,
            not_after_unix_ms: issued.not_after.unix_millis(),
            joined_unix_ms: now.unix_millis(),
            superseded_unix_ms: None,
            locked: None,
        };
        shared.store.node_joined(&node, &record).map_err(internal)?;
        // Whoever had the node's credential before is somebody else now.
        shared.fleet.cut(&node);
        shared.metrics.join_attempt(Outcome::Success);
        tracing::info!(target: "hauberk.audit", node, serial = issued.serial, addr = address, "a node joined");
        Ok(Response::new(credential(shared, node, &issued)))
    }

    async fn attest_pod(
        &self,
        request: Request<v1::AttestPodRequest>,
    ) -> Result<Response<v1::NodeCredential>, Status> {
        let address = request.extensions().get::<Connection>().map(|c| c.address.to_string());
        let address = address.unwrap_or_default();
        let shared = &self.0;
        let Some(kubernetes) = &shared.kubernetes else {
            return Err(Status::unimplemented(
                "this control plane is not one of a Kubernetes cluster; join with a token",
            ));
        };
        let message = request.into_inner();
        if message.token.len() > MAX_TOKEN {
            return Err(Status::invalid_argument("token: is longer than any token"));
        }
        let _turn = kubernetes.attesting.acquire().await.map_err(internal)?;
        let pod = kubernetes.attestor.attest(message.token).await.map_err(|error| {
            shared.metrics.join_attempt(Outcome::Failure);
            tracing::warn!(target: "hauberk.audit", addr = address, reason = %error,
                "a pod's token was refused");
            match error {
                AttestError::Api(_) => Status::unavailable(error.to_string()),
                AttestError::Token { .. }
                | AttestError::User { .. }
                | AttestError::NoPod
                | AttestError::Gone(_)
                | AttestError::NoNode(_) => Status::permission_denied(error.to_string()),
            }
        })?;
        shared.within_rate(&pod.node, "node")?;
        let issued = issue_node(shared, &pod.node, &message.certificate_request)?;
        shared.metrics.join_attempt(Outcome::Success);
        tracing::info!(target: "hauberk.audit", node = pod.node, pod = pod.pod, pod_uid = pod.uid,
            serial = issued.serial, addr = address, "a node was attested by its agent's pod");
        Ok(Response::new(credential(shared, pod.node, &issued)))
    }

    async fn renew_node(
        &self,
        request: Request<v1::RenewNodeRequest>,
    ) -> Result<Response<v1::NodeCredential>, Status> {
        let shared = &self.0;
        let address = request.extensions().get::<Connection>().map(|c| c.address.to_string());
        let Renewing { name: node, lapsed } = attest::renewing(request.extensions(), shared)?;
        // Its certificate proves what its agent's pod was, not what it is.
        if shared.kubernetes.as_ref().is_some_and(|kubernetes| kubernetes.cluster.has_node(&node)) {
            return Err(Status::permission_denied(
                "a node of the cluster is attested by its agent's pod, and renews in no other way",
            ));
        }
        shared.within_rate(&node, "node")?;
        let issued = issue_node(shared, &node, &request.into_inner().certificate_request)?;
        shared
            .store
            .node_renewed(&node, &issued.serial, issued.not_after.unix_millis())
            .map_err(internal)?;
        match lapsed {
            None => {
                tracing::info!(target: "hauberk.audit", node, serial = issued.serial, "a node certificate was renewed");
            }
            Some(expired) => {
                tracing::warn!(target: "hauberk.audit", node, serial = issued.serial, %expired,
                    addr = address.unwrap_or_default(),
                    "an expired node certificate was renewed: the machine was away for longer than it lived");
            }
        }
        Ok(Response::new(credential(shared, node, &issued)))
    }
}

/// The node that a token names, if it is good.
fn named(shared: &Shared, token: Consumed, address: &str) -> Result<String, Status> {
    let (why, told) = match token {
        Consumed::Good(node) => return Ok(node),
        Consumed::Expired => {
            ("expired", "the join token has expired; make a new one with `hauberk token create`")
        }
        Consumed::Unknown => (
            "unknown or used before",
            "the join token is unknown or has been used before; make a new one with \
             `hauberk token create`",
        ),
    };
    shared.metrics.join_attempt(Outcome::Failure);
    tracing::warn!(target: "hauberk.audit", addr = address, "a join token was refused: {why}");
    Err(Status::permission_denied(told))
}

fn issue_node(shared: &Shared, node: &str, request: &[u8]) -> Result<Issued, Status> {
    let id = SpiffeId::node(shared.authority.trust_domain(), node)
        .map_err(|error| Status::invalid_argument(format!("node {node}: {error}")))?;
    let issued = shared.authority.issue(&id, request, shared.node_lifetime, hauberk_tls::now());
    shared.metrics.certificate_issued("node", Outcome::from(&issued));
    issued.map_err(|error| {
        tracing::warn!(target: "hauberk.audit", node, reason = %error,
            "a node certificate was refused");
        refused(error)
    })
}

fn credential(shared: &Shared, node: String, issued: &Issued) -> v1::NodeCredential {
    v1::NodeCredential {
        certificate_chain: chain_message(&issued.chain),
        trust_bundle: shared.trust_bundle(),
        trust_domain: shared.authority.trust_domain().to_string(),
        node,
    }
}

/// The caller's fault is told to the caller; ours is told to the log.
pub(super) fn refused(error: CaError) -> Status {
    match error {
        CaError::Request(_) | CaError::WeakKey => {
            Status::invalid_argument(format!("certificate_request: {error}"))
        }
        CaError::File(_)
        | CaError::Sign(_)
        | CaError::Damaged(..)
        | CaError::DamagedKey(..)
        | CaError::OtherKey(_)
        | CaError::Missing(_)
        | CaError::OtherTrustDomain { .. }
        | CaError::Remove(..)
        | CaError::Ended(_)
        | CaError::Root(_)
        | CaError::Trial(_)
        | CaError::Handover
        | CaError::Handed(_)
        | CaError::Date => internal(error),
    }
}
