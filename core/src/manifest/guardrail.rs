//! Guardrail.

use super::{
    objects::{Metadata, owner},
    peers::{namespaced_name, some_peers, some_ports},
    reader::Field,
};
use crate::policy::{
    Guardrail, GuardrailPeers, GuardrailPorts, GuardrailTarget, PolicyKind, PolicyRef,
};

pub(super) fn read(metadata: Option<Metadata>, spec: &Field<'_>) -> Option<Guardrail> {
    let fields = spec.fields(&[
        "owner",
        "reason",
        "target",
        "ports",
        "allPorts",
        "denyFrom",
        "denyUnlessFrom",
    ])?;
    let owner = fields.required("owner", "{team: platform, contact: \"#platform\"}", owner);
    let reason = fields.optional("reason", Field::prose);
    let target = fields.required("target", "{namespace: pci}", target);
    let ports = fields.one_of(&["ports", "allPorts"]).and_then(|(which, field)| match which {
        "ports" => some_ports(&field).map(GuardrailPorts::Only),
        _ => field.is_true().map(|()| GuardrailPorts::All),
    });
    let denies =
        fields.one_of(&["denyFrom", "denyUnlessFrom"]).and_then(|(which, field)| match which {
            "denyFrom" => some_peers(&field).map(GuardrailPeers::From),
            _ => some_peers(&field).map(GuardrailPeers::UnlessFrom),
        });
    Some(Guardrail {
        name: PolicyRef { kind: PolicyKind::Guardrail, namespace: None, name: metadata?.name },
        owner: owner?,
        reason: reason?,
        target: target?,
        ports: ports?,
        denies: denies?,
    })
}

fn target(field: &Field<'_>) -> Option<GuardrailTarget> {
    const KINDS: &[&str] = &["namespace", "serviceAccount", "machine"];
    let (which, chosen) = field.fields(KINDS)?.one_of(KINDS)?;
    match which {
        "namespace" => chosen.name().map(GuardrailTarget::Namespace),
        "serviceAccount" => namespaced_name(&chosen)
            .map(|(namespace, name)| GuardrailTarget::ServiceAccount { namespace, name }),
        _ => chosen.name_or_map().map(GuardrailTarget::Machine),
    }
}
