//! Certificates of workloads, for the node they are registered on and for nobody else.

use std::sync::Arc;

use hauberk_core::{
    admission::{NodeStanding, RegisteredWorkload, WorkloadKey, admit},
    policy::{ProcessSelector, RESERVED_NAMESPACE, resolve::MeshWorkload},
};
use hauberk_proto::v1::{self, workload_identity_server};
use hauberk_telemetry::metrics::Outcome;
use tonic::{Request, Response, Status};

use super::{Shared, chain_message, enrollment::refused};
use crate::attest;

pub(crate) struct WorkloadIdentity(pub(crate) Arc<Shared>);

#[tonic::async_trait]
impl workload_identity_server::WorkloadIdentity for WorkloadIdentity {
    async fn issue(
        &self,
        request: Request<v1::IssueRequest>,
    ) -> Result<Response<v1::WorkloadCredential>, Status> {
        let shared = &self.0;
        let caller = attest::node(request.extensions(), shared)?;
        shared.within_rate(caller.node.name(), "workload")?;
        let message = request.into_inner();
        let key = workload_key(&message.workload)?;
        let published = shared.publisher.current();
        let found = published.workload(&message.workload).filter(|found| found.is_entitled());
        let registered = found.map(|workload| RegisteredWorkload {
            key: registered_key(workload),
            node: workload.node.to_string(),
            identity: workload.identity.clone(),
        });
        let id = admit(&caller.node, &key, registered.as_ref(), NodeStanding::Good).map_err(
            |refusal| {
                shared.metrics.certificate_issued("workload", Outcome::Failure);
                tracing::warn!(target: "hauberk.audit", node = caller.node.name(),
                    workload = message.workload, reason = %refusal, "an identity was refused");
                Status::permission_denied(refusal.to_string())
            },
        )?;
        let issued = shared.authority.issue(
            &id,
            &message.certificate_request,
            shared.workload_lifetime,
            hauberk_tls::now(),
        );
        shared.metrics.certificate_issued("workload", Outcome::from(&issued));
        let issued = issued.map_err(|error| {
            tracing::warn!(target: "hauberk.audit", node = caller.node.name(),
                workload = message.workload, reason = %error, "an identity was refused");
            refused(error)
        })?;
        tracing::info!(target: "hauberk.audit", node = caller.node.name(), workload = message.workload,
            spiffe_id = %id, serial = issued.serial, "an identity was issued");
        Ok(Response::new(v1::WorkloadCredential {
            certificate_chain: chain_message(&issued.chain),
            trust_bundle: shared.trust_bundle(),
        }))
    }
}

fn workload_key(text: &str) -> Result<WorkloadKey, Status> {
    let invalid = || {
        Status::invalid_argument(format!(
            "workload: {text:?} is not namespace/name, namespace/name@uid of a pod, nor machine/name"
        ))
    };
    let (first, rest) = text.split_once('/').ok_or_else(invalid)?;
    let (name, uid) = match rest.split_once('@') {
        Some((name, uid)) => (name, Some(uid)),
        None => (rest, None),
    };
    let name = name.parse().map_err(|_| invalid())?;
    Ok(match (first, uid) {
        (RESERVED_NAMESPACE, None) => WorkloadKey::Machine { name },
        (RESERVED_NAMESPACE, Some(_)) => return Err(invalid()),
        (namespace, uid) => {
            let namespace = namespace.parse().map_err(|_| invalid())?;
            match uid {
                None => WorkloadKey::Namespaced { namespace, name },
                Some(uid) if ProcessSelector::is_pod_uid(uid) => {
                    WorkloadKey::Pod { namespace, name, uid: uid.to_owned() }
                }
                Some(_) => return Err(invalid()),
            }
        }
    })
}

fn registered_key(workload: &MeshWorkload) -> WorkloadKey {
    let name = workload.name.clone();
    match (workload.namespace.clone(), &workload.process) {
        (Some(namespace), ProcessSelector::Pod { uid, .. }) => {
            WorkloadKey::Pod { namespace, name, uid: uid.clone() }
        }
        (
            Some(namespace),
            ProcessSelector::User(_)
            | ProcessSelector::Cgroup(_)
            | ProcessSelector::NetworkNamespace { .. },
        ) => WorkloadKey::Namespaced { namespace, name },
        (None, _) => WorkloadKey::Machine { name },
    }
}
