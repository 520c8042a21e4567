//! Before the mesh is uninstalled: its pods are let go, all at the same time, and its agents are told to take what is
//! left of their rules along when they stop.

use std::time::Duration;

use k8s_openapi::api::{apps::v1::DaemonSet, core::v1::ServiceAccount};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;
use tokio::time::Instant;

/// The agents' DaemonSet and service account.
pub(crate) const AGENTS: &str = "hauberk-agent";

/// The annotation of the agents' service account that takes every pod out of the mesh. It goes with the release, so that a
/// new one knows nothing of it.
pub(crate) const RETIRING: &str = "hauberk.dev/retiring";

/// For how long connections that the mesh carries may end by themselves, before the agents are restarted.
const LETTING_GO: Duration = Duration::from_secs(10);

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);

/// Why the agents are not ready to go.
#[derive(Debug, thiserror::Error)]
pub enum RetireError {
    /// The API server refused, or could not be asked.
    #[error("the DaemonSet and the service account {AGENTS} in namespace {namespace}: {source}")]
    Api {
        /// Where it should be.
        namespace: String,
        /// Why it failed.
        #[source]
        source: Box<kube::Error>,
    },
    /// Some agents have not restarted with the order.
    #[error(
        "{ready} of {wanted} agents have been told; pods of the other nodes would stay cut off. See to the \
         pods of the DaemonSet {AGENTS}, or uninstall with --no-hooks and clean those nodes by hand"
    )]
    Waiting {
        /// Those that have.
        ready: i32,
        /// All of them.
        wanted: i32,
    },
}

/// Has the control plane let every pod go, whose connections go on: new ones are none of the mesh's business from then on,
/// and those that it carries have a while to end. Then restarts the agents with the order to remove their rules and the CNI
/// plugin when they stop, and waits until all have it. `tell` hears how far it is.
///
/// # Errors
/// If that is not so when the patience is over.
pub async fn retire(
    client: &Client,
    namespace: &str,
    patience: Duration,
    mut tell: impl FnMut(&str),
) -> Result<(), RetireError> {
    let failed =
        |source| RetireError::Api { namespace: namespace.to_owned(), source: Box::new(source) };
    let until = Instant::now() + patience;
    let params = PatchParams::default();
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), namespace);
    let retiring = Patch::Merge(json!({"metadata": {"annotations": {RETIRING: "true"}}}));
    accounts.patch(AGENTS, &params, &retiring).await.map_err(failed)?;
    tell("every pod is let go: new connections are no business of the mesh any more");
    tokio::time::sleep(LETTING_GO).await;
    tell("the agents are told to remove what is left when they stop");
    let api: Api<DaemonSet> = Api::namespaced(client.clone(), namespace);
    let patch = json!({"spec": {
        // All at once: they are about to go.
        "updateStrategy": {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxUnavailable": "100%", "maxSurge": 0},
        },
        "template": {"spec": {"containers": [{
            "name": "agent",
            "env": [{"name": "HAUBERK_REMOVE_RULES_ON_STOP", "value": "true"}],
        }]}},
    }});
    let patched = api.patch(AGENTS, &params, &Patch::Strategic(patch)).await.map_err(failed)?;
    let generation = patched.metadata.generation;
    loop {
        let status = api.get(AGENTS).await.map_err(failed)?.status.unwrap_or_default();
        let wanted = status.desired_number_scheduled;
        let updated = status.updated_number_scheduled.unwrap_or(0);
        let ready = updated.min(status.number_ready);
        if status.observed_generation >= generation && ready >= wanted {
            return Ok(());
        }
        tell(&format!("{ready} of {wanted} agents have been told"));
        if Instant::now() >= until {
            return Err(RetireError::Waiting { ready, wanted });
        }
        tokio::time::sleep(LOOK).await;
    }
}
