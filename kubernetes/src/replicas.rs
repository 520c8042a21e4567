//! What each replica of the control plane knows of the agents that are connected to it, for the others.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::{
    Api, Client, Resource,
    api::{Patch, PatchParams},
};
use serde_json::json;

use crate::shared::SharedError;

/// The label of such a ConfigMap.
pub(crate) const LABEL: &str = "hauberk.dev/replica";

/// The key in it.
const AGENTS: &str = "agents";

/// The revisions that agents enforce, by their nodes.
pub type Enforced = BTreeMap<String, u64>;

/// This replica's own report.
pub struct Report {
    client: Client,
    namespace: String,
    replica: String,
}

impl Report {
    /// For the replica that runs as the pod of this name.
    #[must_use]
    pub fn new(client: Client, namespace: String, replica: String) -> Self {
        Self { client, namespace, replica }
    }

    /// Writes it. It goes with the pod.
    ///
    /// # Errors
    /// If it cannot be written.
    pub async fn write(&self, enforced: &Enforced) -> Result<(), SharedError> {
        let failed = |source| SharedError::Api {
            what: "write this replica's report",
            namespace: self.namespace.clone(),
            source: Box::new(source),
        };
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let owner = pods.get(&self.replica).await.map_err(failed)?.owner_ref(&());
        let text = serde_json::to_string(enforced).unwrap_or_default();
        let name = format!("{}-agents", self.replica);
        let map = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": name,
                "namespace": self.namespace,
                "labels": {LABEL: self.replica},
                "ownerReferences": owner.into_iter().collect::<Vec<_>>(),
            },
            "data": {AGENTS: text},
        });
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.namespace);
        let params = PatchParams::apply(&self.replica).force();
        maps.patch(&name, &params, &Patch::Apply(map)).await.map_err(failed)?;
        Ok(())
    }
}

/// What a report says; nothing if it is none.
pub(crate) fn read(map: &ConfigMap) -> Enforced {
    let text = map.data.as_ref().and_then(|data| data.get(AGENTS));
    text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}
