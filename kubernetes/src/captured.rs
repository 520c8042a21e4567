//! The condition of a namespace that says whether all of its pods are captured, and nothing of them goes on in clear.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{Namespace, NamespaceCondition},
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde::{Deserialize, Serialize};
use serde_json::json;

/// The type of the condition.
pub const CAPTURED: &str = "hauberk.dev/Captured";

/// What agents say of the workloads of a namespace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NamespaceCapture {
    /// How many are captured.
    pub captured: u64,
    /// How many open connections are older than the capture of their workload.
    pub older: u64,
    /// How many workloads have such connections.
    pub with_older: u64,
    /// When the first of these are to be closed, in milliseconds since the Unix epoch; 0 if none are.
    pub closed_unix_ms: i64,
}

impl NamespaceCapture {
    /// Adds what others say.
    pub fn add(&mut self, others: &Self) {
        self.captured = self.captured.saturating_add(others.captured);
        self.older = self.older.saturating_add(others.older);
        self.with_older = self.with_older.saturating_add(others.with_older);
        self.closed_unix_ms = match (self.closed_unix_ms, others.closed_unix_ms) {
            (0, time) | (time, 0) => time,
            (one, other) => one.min(other),
        };
    }
}

/// What one node's agent says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeCapture {
    /// When it connected to the replica that tells of it, in milliseconds since the Unix epoch: of two replicas that do, the later one
    /// hears it.
    pub since_unix_ms: i64,
    /// By the namespaces' names.
    pub namespaces: BTreeMap<String, NamespaceCapture>,
}

/// By the nodes' names.
pub type NodeCaptures = BTreeMap<String, NodeCapture>;

/// The condition that a namespace should have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Captured {
    /// None if it is not known.
    pub holds: Option<bool>,
    /// In one word.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

/// How the condition of a namespace is to change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// What is merged into the namespace.
    pub patch: serde_json::Value,
    /// Whether it says the same as before in other words.
    pub is_wording: bool,
}

/// What a namespace says of itself.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct NamespaceFacts {
    /// The condition, if it has it.
    pub(crate) condition: Option<NamespaceCondition>,
    /// Somebody has deleted it.
    pub(crate) is_ending: bool,
}

impl NamespaceFacts {
    pub(crate) fn new(namespace: &Namespace) -> Self {
        let status = namespace.status.as_ref();
        let conditions = status.and_then(|status| status.conditions.as_ref()).into_iter().flatten();
        let mut ours = conditions.filter(|condition| condition.type_ == CAPTURED);
        Self {
            condition: ours.next().cloned(),
            is_ending: namespace.metadata.deletion_timestamp.is_some(),
        }
    }
}

/// What to write so that a namespace has this condition, or none; nothing if it is so already.
#[must_use]
pub fn change(known: Option<&NamespaceCondition>, wanted: Option<&Captured>) -> Option<Change> {
    let (condition, is_wording) = match (known, wanted) {
        (None, None) => return None,
        (Some(_), None) => (json!({"$patch": "delete", "type": CAPTURED}), false),
        (known, Some(wanted)) => {
            let status = match wanted.holds {
                Some(true) => "True",
                Some(false) => "False",
                None => "Unknown",
            };
            let same = known.filter(|known| known.status == status);
            let reason = same.and_then(|known| known.reason.as_deref());
            let message = same.and_then(|known| known.message.as_deref());
            if (reason, message) == (Some(wanted.reason), Some(wanted.message.as_str())) {
                return None;
            }
            let since = same
                .and_then(|known| known.last_transition_time.clone())
                .unwrap_or_else(|| Time(Timestamp::now()));
            let condition = json!({
                "type": CAPTURED,
                "status": status,
                "reason": wanted.reason,
                "message": wanted.message,
                "lastTransitionTime": since,
            });
            (condition, reason == Some(wanted.reason))
        }
    };
    Some(Change { patch: json!({"status": {"conditions": [condition]}}), is_wording })
}

/// Writes it.
///
/// # Errors
/// If the API server refuses. A namespace that is gone is none.
pub async fn write_change(
    client: &Client,
    namespace: &str,
    change: &Change,
) -> Result<(), kube::Error> {
    let api: Api<Namespace> = Api::all(client.clone());
    // Merged by the conditions' types: those of others stay.
    let patch = Patch::Strategic(&change.patch);
    let patched = api.patch_status(namespace, &PatchParams::default(), &patch).await;
    match patched {
        Err(kube::Error::Api(error)) if error.is_not_found() => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use super::*;

    fn told(holds: bool, message: &str) -> Captured {
        Captured { holds: Some(holds), reason: "Reason", message: message.to_owned() }
    }

    fn known(status: &str, message: &str) -> NamespaceCondition {
        NamespaceCondition {
            type_: CAPTURED.to_owned(),
            status: status.to_owned(),
            reason: Some("Reason".to_owned()),
            message: Some(message.to_owned()),
            last_transition_time: Some(Time("2026-01-02T03:04:05Z".parse().unwrap())),
        }
    }

    #[test]
    fn only_what_differs_is_written_and_the_time_is_that_of_the_status() {
        assert_eq!(change(None, None), None);
        assert_eq!(change(Some(&known("True", "all")), Some(&told(true, "all"))), None);
        let since = |change: &Change| {
            let condition = &change.patch["status"]["conditions"][0];
            condition["lastTransitionTime"].as_str().unwrap().to_owned()
        };
        let same = change(Some(&known("True", "all 2")), Some(&told(true, "all 3"))).unwrap();
        assert_eq!((since(&same).as_str(), same.is_wording), ("2026-01-02T03:04:05Z", true));
        let other = change(Some(&known("True", "all")), Some(&told(false, "all"))).unwrap();
        assert_ne!(since(&other), "2026-01-02T03:04:05Z");
        assert!(!other.is_wording);
        let gone = change(Some(&known("True", "all")), None).unwrap();
        assert_eq!(gone.patch["status"]["conditions"][0]["$patch"], "delete");
    }

    #[test]
    fn the_earliest_end_counts() {
        let of = |closed_unix_ms| NamespaceCapture {
            captured: 1,
            older: 2,
            with_older: 1,
            closed_unix_ms,
        };
        let mut sum = of(0);
        sum.add(&of(5));
        sum.add(&of(3));
        sum.add(&of(0));
        let wanted = NamespaceCapture { captured: 4, older: 8, with_older: 4, closed_unix_ms: 3 };
        assert_eq!(sum, wanted);
    }
}
