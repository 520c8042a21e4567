//! The gRPC services: decode, ask the core, act, encode. No rules of their own.

mod enrollment;
mod operator;
mod state;
mod workload_identity;

use std::{sync::Arc, time::Duration};

use hauberk_telemetry::ControlPlaneMetrics;
use tokio_util::sync::CancellationToken;

pub(crate) use enrollment::Enrollment;
pub(crate) use operator::Operator;
pub(crate) use state::State;
pub(crate) use workload_identity::WorkloadIdentity;

use crate::{ca::Authority, fleet::Fleet, policy::Publisher, store::Store};

/// What the services share.
pub(crate) struct Shared {
    pub(crate) authority: Authority,
    pub(crate) store: Arc<Store>,
    pub(crate) publisher: Arc<Publisher>,
    pub(crate) fleet: Fleet,
    pub(crate) metrics: Arc<ControlPlaneMetrics>,
    pub(crate) advertised: String,
    pub(crate) workload_lifetime: Duration,
    pub(crate) node_lifetime: Duration,
    /// Streams without an end of their own end with this.
    pub(crate) stopping: CancellationToken,
}

impl Shared {
    fn trust_bundle(&self) -> Vec<Vec<u8>> {
        vec![self.authority.root().to_vec()]
    }
}

fn chain_message(chain: &[rustls_pki_types::CertificateDer<'_>]) -> Vec<Vec<u8>> {
    chain.iter().map(|certificate| certificate.to_vec()).collect()
}
