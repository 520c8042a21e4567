//! Custom resources as manifests: what owners write is read by one reader, wherever they put it.

use kube::core::DynamicObject;
use serde_json::{Map, Value, json};

use crate::crd::Status;

/// A custom resource as the text of a manifest.
#[derive(Debug, Clone)]
pub struct ManifestObject {
    /// The kind.
    pub kind: &'static str,
    /// The namespace, if the kind has one.
    pub namespace: Option<String>,
    /// The name.
    pub name: String,
    /// The generation, for the status.
    pub generation: Option<i64>,
    /// The manifest: JSON, which is YAML.
    pub text: String,
    /// Its status, as it was written last.
    pub status: Status,
}

/// Whether they say the same. What we write into the status ourselves is no news.
impl PartialEq for ManifestObject {
    fn eq(&self, other: &Self) -> bool {
        self.source() == other.source()
            && self.generation == other.generation
            && self.text == other.text
    }
}

impl ManifestObject {
    /// As people call it in messages: `AccessPolicy payments/ledger`.
    #[must_use]
    pub fn source(&self) -> String {
        match &self.namespace {
            Some(namespace) => format!("{} {namespace}/{}", self.kind, self.name),
            None => format!("{} {}", self.kind, self.name),
        }
    }

    /// Leaves out what the API server has added.
    pub(crate) fn new(kind: &'static str, object: DynamicObject) -> Self {
        let meta = object.metadata;
        let name = meta.name.unwrap_or_default();
        let mut metadata = Map::new();
        metadata.insert("name".to_owned(), json!(name));
        if let Some(namespace) = &meta.namespace {
            metadata.insert("namespace".to_owned(), json!(namespace));
        }
        if let Some(labels) = &meta.labels {
            metadata.insert("labels".to_owned(), json!(labels));
        }
        // What is no status of ours is written anew.
        let status = object.data.get("status").cloned().unwrap_or_default();
        let status = serde_json::from_value(status).unwrap_or_default();
        let mut manifest = json!({
            "apiVersion": "hauberk.dev/v1alpha1",
            "kind": kind,
            "metadata": metadata,
        });
        if let (Some(manifest), Value::Object(rest)) = (manifest.as_object_mut(), object.data) {
            // A field that the reader does not know is for the reader to refuse.
            manifest.extend(rest.into_iter().filter(|(key, _)| key != "status"));
        }
        Self {
            kind,
            namespace: meta.namespace,
            name,
            generation: meta.generation,
            text: manifest.to_string(),
            status,
        }
    }
}
