//! The gRPC services: decode, ask the core, act, encode. No rules of their own.

mod enrollment;
mod learn;
mod operator;
mod state;
mod workload_identity;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use hauberk_kubernetes::{Attestor, Cluster};
use hauberk_telemetry::{ControlPlaneMetrics, metrics::Outcome};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::Status;

pub(crate) use enrollment::Enrollment;
pub(crate) use operator::Operator;
pub(crate) use state::State;
pub(crate) use workload_identity::WorkloadIdentity;

use crate::{ca::Authority, fleet::Fleet, issuance::IssuanceRate, policy::Publisher, store::Store};

/// What the services share.
pub(crate) struct Shared {
    pub(crate) authority: Authority,
    pub(crate) store: Arc<Store>,
    pub(crate) publisher: Arc<Publisher>,
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) issuance: IssuanceRate,
    pub(crate) metrics: Arc<ControlPlaneMetrics>,
    /// In a cluster, its API.
    pub(crate) kubernetes: Option<Kubernetes>,
    pub(crate) advertised: String,
    pub(crate) workload_lifetime: Duration,
    pub(crate) node_lifetime: Duration,
    /// How long after its end a machine's certificate may be renewed.
    pub(crate) renewal_grace: Duration,
    /// Streams without an end of their own end with this.
    pub(crate) stopping: CancellationToken,
}

/// The cluster that this control plane is one of.
pub(crate) struct Kubernetes {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) attestor: Attestor,
    /// Of the agents.
    pub(crate) namespace: String,
    pub(crate) service_account: String,
    /// Tokens that are being looked at: each one asks the API server twice.
    pub(crate) attesting: Semaphore,
}

impl Kubernetes {
    /// Whether a pod of the agents runs on a node.
    pub(crate) fn has_agent(&self, node: &str) -> bool {
        self.cluster.runs_on(node, &self.namespace, &self.service_account)
    }
}

/// The longest time for which a node's own calls may be on their way with the certificate before.
const LONGEST_GRACE: Duration = Duration::from_secs(30);

impl Shared {
    /// How long after a renewal the certificate before is only refused, in milliseconds; a later use
    /// of it locks the node.
    pub(crate) fn clone_grace(&self) -> i64 {
        let grace = (self.node_lifetime / 10).min(LONGEST_GRACE);
        i64::try_from(grace.as_millis()).unwrap_or(i64::MAX)
    }

    /// Refuses a node that asks for more certificates than any node needs; `kind` as in the metric.
    fn within_rate(&self, node: &str, kind: &'static str) -> Result<(), Status> {
        self.issuance.take(node, Instant::now()).map_err(|exceeded| {
            self.metrics.certificate_issued(kind, Outcome::Failure);
            if exceeded.first {
                tracing::warn!(target: "hauberk.audit", node,
                    "a node asks for certificates faster than any node needs; it is slowed down");
            }
            Status::resource_exhausted(exceeded.to_string())
        })
    }

    /// Forgets what agents said whose nodes have left the mesh.
    pub(crate) fn forget_gone_nodes(&self) {
        let published = self.publisher.current();
        // Without a state no node is known, and none is gone.
        if published.revision > 0 {
            self.fleet.retain_nodes(|node| published.has_machine(node));
        }
    }

    fn trust_bundle(&self) -> Vec<Vec<u8>> {
        self.authority.roots().iter().map(|root| root.to_vec()).collect()
    }
}

fn chain_message(chain: &[rustls_pki_types::CertificateDer<'_>]) -> Vec<Vec<u8>> {
    chain.iter().map(|certificate| certificate.to_vec()).collect()
}
