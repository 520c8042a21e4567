//! The status of custom resources, as the leader of the control plane writes it.

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    core::{ApiResource, DynamicObject},
};
use serde_json::json;

use crate::{crd, objects::ManifestObject};

/// Who writes.
const MANAGER: &str = "hauberk-control-plane";

/// A condition without its time: that is kept while its status stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// The type: `Accepted`, for one.
    pub kind: &'static str,
    /// Whether it holds.
    pub holds: bool,
    /// In one word.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

/// The status that an object should have: nothing if it has it already.
#[must_use]
pub fn status_of(
    object: &ManifestObject,
    told: &[Told],
    matched_workloads: Option<i64>,
    agents: Option<crd::Agents>,
) -> Option<crd::Status> {
    let before = &object.status;
    let condition = |told: &Told| {
        let status = if told.holds { "True" } else { "False" };
        let known = before.conditions.iter().find(|known| known.type_ == told.kind);
        let since = known.filter(|known| known.status == status);
        Condition {
            type_: told.kind.to_owned(),
            status: status.to_owned(),
            reason: told.reason.to_owned(),
            message: told.message.clone(),
            observed_generation: object.generation,
            last_transition_time: since
                .map_or_else(|| Time(Timestamp::now()), |known| known.last_transition_time.clone()),
        }
    };
    let accepted = told.iter().any(|told| told.kind == "Accepted" && told.holds);
    let last_accepted =
        if accepted { Some(object.text.clone()) } else { before.last_accepted.clone() };
    let status = crd::Status {
        observed_generation: object.generation,
        conditions: told.iter().map(condition).collect(),
        matched_workloads,
        agents,
        last_accepted,
    };
    (status != *before).then_some(status)
}

/// Writes it.
///
/// # Errors
/// If the API server refuses.
pub async fn write_status(
    client: &Client,
    object: &ManifestObject,
    status: &crd::Status,
) -> Result<(), kube::Error> {
    let resource = match object.kind {
        "AccessPolicy" => ApiResource::erase::<crd::AccessPolicy>(&()),
        "Guardrail" => ApiResource::erase::<crd::Guardrail>(&()),
        "Machine" => ApiResource::erase::<crd::Machine>(&()),
        _ => ApiResource::erase::<crd::Workload>(&()),
    };
    let api: Api<DynamicObject> = match &object.namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    let patch = json!({
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "metadata": {"name": object.name},
        "status": status,
    });
    let params = PatchParams::apply(MANAGER).force();
    api.patch_status(&object.name, &params, &Patch::Apply(patch)).await?;
    Ok(())
}
