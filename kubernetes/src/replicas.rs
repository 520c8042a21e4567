//! What each replica of the control plane knows of the agents that are connected to it, for the others.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::{
    Api, Client, Resource,
    api::{Patch, PatchParams},
};
use serde_json::json;

use crate::{captured::NodeCaptures, shared::SharedError};

/// The label of such a ConfigMap.
pub(crate) const LABEL: &str = "hauberk.dev/replica";

/// The keys in it.
const AGENTS: &str = "agents";
const CAPTURES: &str = "captures";

/// Half of what a ConfigMap may have: some 5,000 pairs of a node and a namespace. With more, the namespaces' conditions are unknown.
const LONGEST_CAPTURES: usize = 512 * 1024;

/// What a replica says of its agents.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reported {
    /// Which revisions they enforce.
    pub enforced: Enforced,
    /// What they have captured.
    pub captures: NodeCaptures,
}

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

    /// Its ConfigMap, as `namespace/name`.
    #[must_use]
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name())
    }

    fn name(&self) -> String {
        format!("{}-agents", self.replica)
    }

    /// Writes it. It goes with the pod.
    ///
    /// # Errors
    /// If it cannot be written.
    pub async fn write(&self, reported: &Reported) -> Result<(), SharedError> {
        let failed = |source| SharedError::Api {
            what: "write this replica's report",
            namespace: self.namespace.clone(),
            source: Box::new(source),
        };
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let owner = pods.get(&self.replica).await.map_err(failed)?.owner_ref(&());
        let agents = serde_json::to_string(&reported.enforced).unwrap_or_default();
        let captures = serde_json::to_string(&reported.captures)
            .ok()
            // What the other part says must not be refused for it.
            .filter(|text| text.len() <= LONGEST_CAPTURES)
            .unwrap_or_else(|| "{}".to_owned());
        let name = self.name();
        let map = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": name,
                "namespace": self.namespace,
                "labels": {LABEL: self.replica},
                "ownerReferences": owner.into_iter().collect::<Vec<_>>(),
            },
            "data": {AGENTS: agents, CAPTURES: captures},
        });
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.namespace);
        let params = PatchParams::apply(&self.replica).force();
        maps.patch(&name, &params, &Patch::Apply(map)).await.map_err(failed)?;
        Ok(())
    }
}

/// What a report says; nothing where it is none.
pub(crate) fn read(map: &ConfigMap) -> Reported {
    let text = |key| map.data.as_ref().and_then(|data: &BTreeMap<String, String>| data.get(key));
    let enforced = text(AGENTS).and_then(|text| serde_json::from_str(text).ok());
    let captures = text(CAPTURES).and_then(|text| serde_json::from_str(text).ok());
    Reported { enforced: enforced.unwrap_or_default(), captures: captures.unwrap_or_default() }
}
