//! The custom resources, as the API server is told of them: the same kinds and fields as the manifests of
//! a folder (`hauberk_core::manifest`), which reads them in the end. What can be refused before anything
//! is stored, is: by the schema, and by rules for what a schema cannot say.
//!
//! One difference to files: where these take a name or a map with nothing but a name, a custom resource
//! takes the name.

#[allow(unreachable_pub, reason = "of the types that the derive makes for itself")]
pub mod access_policy;
#[allow(unreachable_pub, reason = "of the types that the derive makes for itself")]
pub mod guardrail;
#[allow(unreachable_pub, reason = "of the types that the derive makes for itself")]
pub mod host;
#[allow(unreachable_pub, reason = "of the types that the derive makes for itself")]
pub mod shared;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;

pub use access_policy::{AccessPolicy, AccessPolicySpec};
pub use guardrail::{Guardrail, GuardrailSpec};
pub use host::{Machine, MachineSpec, Workload, WorkloadSpec};
pub use shared::{Agents, Status};

/// The definitions of all kinds, in the order of their names.
#[must_use]
pub fn all() -> Vec<CustomResourceDefinition> {
    [AccessPolicy::crd(), Guardrail::crd(), Machine::crd(), Workload::crd()].map(strict).into()
}

/// The definitions as templates of the chart, by their file names.
#[must_use]
pub fn templates() -> Vec<(String, String)> {
    all()
        .into_iter()
        .map(|mut definition| {
            let name = format!("{}.yaml", definition.spec.names.plural);
            // Deleting a definition deletes every object of its kind: that is never done on the way.
            definition
                .metadata
                .annotations
                .get_or_insert_default()
                .insert("helm.sh/resource-policy".to_owned(), "keep".to_owned());
            let text = serde_saphyr::to_string(&definition).unwrap_or_default();
            (name, format!("# Written by hauberk-kubernetes' generate-crds; not by hand.\n{text}"))
        })
        .collect()
}

/// An optional field is there or not there; the derived schema would take `null`, too, which the reader
/// refuses.
fn strict(definition: CustomResourceDefinition) -> CustomResourceDefinition {
    fn remove(value: &mut serde_json::Value) {
        match value {
            serde_json::Value::Object(map) => {
                map.retain(|key, value| key != "nullable" || !value.is_boolean());
                map.values_mut().for_each(remove);
            }
            serde_json::Value::Array(list) => list.iter_mut().for_each(remove),
            serde_json::Value::Null
            | serde_json::Value::Bool(_)
            | serde_json::Value::Number(_)
            | serde_json::Value::String(_) => {}
        }
    }
    let Ok(mut value) = serde_json::to_value(&definition) else { return definition };
    remove(&mut value);
    serde_json::from_value(value).unwrap_or(definition)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use super::*;

    #[test]
    fn the_chart_has_the_definitions_as_they_are() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/hauberk-crds/templates");
        for (name, text) in templates() {
            let written = std::fs::read_to_string(format!("{folder}/{name}")).unwrap();
            assert!(
                written == text,
                "{name} is old: cargo run -p hauberk-kubernetes --bin generate-crds"
            );
        }
        assert_eq!(std::fs::read_dir(folder).unwrap().count(), templates().len());
    }

    #[test]
    fn no_field_takes_null() {
        for definition in all() {
            assert!(!serde_json::to_string(&definition).unwrap().contains("nullable"));
        }
    }
}
