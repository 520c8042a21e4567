//! Conversions between the wire and `hauberk-core`, whole or not at all.

mod error;
mod policy;
mod seen;
mod service;
mod workload;

pub use error::ConvertError;
pub use policy::{guardrail, guardrail_message, policy, policy_message};
pub use seen::{learned_destination, seen, seen_message};
pub use service::{node, node_message, service, service_message};
pub use workload::{workload, workload_message};

use hauberk_core::policy::{
    MeshNamespace, MeshNode, MeshService,
    resolve::{MeshWorkload, ResolvedGuardrail, ResolvedPolicy},
};

use crate::v1;

/// One resource of the state that agents enforce.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resource {
    /// A workload.
    Workload(MeshWorkload),
    /// A policy about one destination.
    Policy(ResolvedPolicy),
    /// A guardrail.
    Guardrail(ResolvedGuardrail),
    /// Addresses that stand for others.
    Service(MeshService),
    /// A namespace of a cluster.
    Namespace(MeshNamespace),
    /// A node of a cluster.
    Node(MeshNode),
}

impl Resource {
    /// Unique in a state: the kind, and the names of the resource.
    #[must_use]
    pub fn key(&self) -> String {
        match self {
            Self::Workload(workload) => format!("workload:{}", workload.key()),
            Self::Policy(policy) => format!("policy:{}:{}", policy.policy, policy.destination),
            Self::Guardrail(guardrail) => {
                format!("guardrail:{}:{}", guardrail.policy, guardrail.destination)
            }
            Self::Namespace(namespace) => format!("namespace:{}", namespace.name),
            Self::Node(node) => format!("node:{}", node.name),
            Self::Service(service) => format!("service:{}/{}", service.namespace, service.name),
        }
    }

    /// The message.
    #[must_use]
    pub fn message(&self) -> v1::Resource {
        use v1::resource::Kind;
        v1::Resource {
            kind: Some(match self {
                Self::Workload(workload) => Kind::Workload(workload_message(workload)),
                Self::Policy(policy) => Kind::Policy(policy_message(policy)),
                Self::Guardrail(guardrail) => Kind::Guardrail(guardrail_message(guardrail)),
                Self::Service(service) => Kind::Service(service_message(service)),
                Self::Namespace(namespace) => Kind::Namespace(v1::Namespace {
                    name: namespace.name.to_string(),
                    enrolled: namespace.enrolled,
                }),
                Self::Node(node) => Kind::Node(node_message(node)),
            }),
        }
    }
}

impl TryFrom<v1::Resource> for Resource {
    type Error = ConvertError;

    fn try_from(message: v1::Resource) -> Result<Self, Self::Error> {
        use v1::resource::Kind;
        Ok(match message.kind.ok_or(ConvertError::missing("resource.kind"))? {
            Kind::Workload(message) => Self::Workload(workload(message)?),
            Kind::Policy(message) => Self::Policy(policy(message)?),
            Kind::Guardrail(message) => Self::Guardrail(guardrail(message)?),
            Kind::Service(message) => Self::Service(service(message)?),
            Kind::Namespace(message) => Self::Namespace(MeshNamespace {
                name: workload::name("namespace.name", &message.name)?,
                enrolled: message.enrolled,
            }),
            Kind::Node(message) => Self::Node(node(message)?),
        })
    }
}
