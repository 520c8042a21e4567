//! Hauberk on Kubernetes: the custom resources that owners write, what the API server knows of pods and
//! services, what replicas of the control plane share through it, and who a projected token is.
//! Everything that talks to the Kubernetes API is in here; it decides nothing.

mod access;
mod admission;
mod attest;
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
mod watched;
mod webhook;

pub use access::{Access, AccessError};
pub use admission::{Answer, Review, ReviewError};
pub use attest::{AttestError, AttestedPod, Attestor};
pub use cluster::{Cluster, Snapshot};
pub use kube::Client;
pub use leader::election;
pub use objects::ManifestObject;
pub use replicas::{Enforced, Report};
pub use retire::{RetireError, retire};
pub use shared::{Agreement, KeptRoots, PublishedRoots, Shared, SharedError};
pub use status::{Told, status_of, write_status};
pub use webhook::{Registration, register, registration};

/// The label of a namespace that puts its pods into the mesh, and says how: `enforce`, `audit` or `off`.
pub const MODE_LABEL: &str = "hauberk.dev/mode";

/// A client for the cluster that this process runs in, or that the user's kubeconfig names.
///
/// # Errors
/// If there is neither, or it is damaged.
pub async fn client() -> Result<Client, kube::Error> {
    let config = kube::Config::infer().await.map_err(kube::Error::InferConfig)?;
    Client::try_from(telling(config))
}

/// A client that tells at once what the API server answers. By itself it would try an answer of 429, 503 or 504 again, 15
/// times and for up to two minutes (kube 5.0), and whoever waits could neither say so nor do better.
fn telling(mut config: kube::Config) -> kube::Config {
    config.default_retry = false;
    config
}
