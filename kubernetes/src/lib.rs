//! Hauberk on Kubernetes: the custom resources that owners write, what the API server knows of pods and
//! services, what replicas of the control plane share through it, and who a projected token is.
//! Everything that talks to the Kubernetes API is in here; it decides nothing.

mod access;
mod admission;
mod attest;
mod captured;
mod cluster;
pub mod crd;
mod leader;
mod objects;
mod pods;
mod replicas;
mod retire;
mod services;
mod shared;
mod status;
mod taints;
mod watched;
mod webhook;

pub use access::{Access, AccessError};
pub use admission::{Answer, Review, ReviewError};
pub use attest::{AttestError, AttestedPod, Attestor};
pub use captured::{
    CAPTURED, Captured, Change, NamespaceCapture, NodeCapture, NodeCaptures, change, write_change,
};
pub use cluster::{Cluster, Snapshot};
pub use kube::Client;
pub use leader::election;
pub use objects::ManifestObject;
pub use replicas::{Enforced, Report, Reported};
pub use retire::{RetireError, retire};
pub use shared::{Agreement, KeptRoots, PublishedRoots, Shared, SharedError};
pub use status::{Told, status_of, write_status};
pub use taints::{AGENT_NOT_READY, NodeAgents};
pub use webhook::{Registration, register, registration};

/// The label of a namespace that puts its pods into the mesh, and says how: `enforce`, `audit` or `off`.
pub const MODE_LABEL: &str = "hauberk.dev/mode";

/// A client for the cluster that this process runs in, or that the user's kubeconfig names. What the API server answers with
/// 429, 503 or 504 it tries again, up to 15 times and for minutes.
///
/// # Errors
/// If there is neither, or it is damaged.
pub async fn client() -> Result<Client, kube::Error> {
    Client::try_default().await
}

/// The same, but it tells at once what the API server answers: for whoever tries again by himself, and sooner.
///
/// # Errors
/// As [`client`].
pub async fn prompt_client() -> Result<Client, kube::Error> {
    let mut config = kube::Config::infer().await.map_err(kube::Error::InferConfig)?;
    config.default_retry = false;
    Client::try_from(config)
}
