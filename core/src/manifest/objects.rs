//! What all kinds have in common: version, kind, metadata, owner, mode.

use std::collections::BTreeMap;

use super::{
    access_policy, guardrail, host,
    reader::{Field, Fields, Reader},
    tree::Node,
    words::quoted,
};
use crate::{
    identity::ResourceName,
    policy::{Mode, Object, Owner, RESERVED_NAMESPACE},
};

const API_GROUP: &str = "hauberk.dev/";
const API_VERSION: &str = "hauberk.dev/v1alpha1";

/// The longest name part of a label's key, and the longest value, as in Kubernetes.
const MAX_LABEL: usize = 63;

#[derive(Clone, Copy)]
enum Kind {
    AccessPolicy,
    Guardrail,
    Machine,
    Workload,
}

const KINDS: [(&str, Kind); 4] = [
    ("AccessPolicy", Kind::AccessPolicy),
    ("Guardrail", Kind::Guardrail),
    ("Machine", Kind::Machine),
    ("Workload", Kind::Workload),
];

/// Kinds of the design that only the control plane's API takes.
const KINDS_TO_COME: [&str; 2] = ["AccessGrant", "Lock"];

pub(super) struct Metadata {
    pub(super) name: ResourceName,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) scope: Scope,
}

/// Where an object lives. Only the kind decides which it is.
pub(super) enum Scope {
    Cluster,
    Namespace(ResourceName),
}

/// Reads one object; `None` if anything of it is wrong, which the reader then has noted.
pub(super) fn read(reader: &Reader, document: &Node) -> Option<Object> {
    // `status` is what the control plane writes into custom resources: a file may carry it along.
    let fields =
        reader.root(document).fields(&["apiVersion", "kind", "metadata", "spec", "status"])?;
    let version = fields.required("apiVersion", API_VERSION, version);
    let kind = fields.required("kind", "AccessPolicy", kind);
    // Without a kind nobody knows which fields are right.
    let kind = kind?;
    let namespaced = match kind {
        Kind::AccessPolicy | Kind::Workload => true,
        Kind::Guardrail | Kind::Machine => false,
    };
    let example = if namespaced { "{name: ledger, namespace: payments}" } else { "{name: pci}" };
    let metadata = fields.required("metadata", example, |field| read_metadata(field, namespaced));
    let object = fields.required("spec", "{…}", |spec| match kind {
        Kind::AccessPolicy => access_policy::read(metadata, spec).map(Object::AccessPolicy),
        Kind::Guardrail => guardrail::read(metadata, spec).map(Object::Guardrail),
        Kind::Machine => host::machine(metadata, spec).map(Object::Machine),
        Kind::Workload => host::workload(metadata, spec).map(Object::Workload),
    });
    version.and(object)
}

pub(super) fn owner(field: &Field<'_>) -> Option<Owner> {
    let fields = field.fields(&["team", "contact", "runbook"])?;
    let team = fields.required("team", "payments", Field::prose);
    let contact = fields.required("contact", "\"#payments-oncall\"", Field::prose);
    let runbook = fields.optional("runbook", Field::prose);
    Some(Owner { team: team?, contact: contact?, runbook: runbook? })
}

/// Enforced unless it says otherwise.
pub(super) fn mode(spec: &Fields<'_>) -> Option<Mode> {
    let words = [Mode::Enforce, Mode::Audit].map(|mode| (mode.as_str(), mode));
    let mode = spec.optional("mode", |field| field.word(&words))?;
    Some(mode.unwrap_or(Mode::Enforce))
}

pub(super) fn labels(field: &Field<'_>) -> Option<BTreeMap<String, String>> {
    all(field.entries()?, |(key, field)| {
        let (prefix, name) = key.rsplit_once('/').unwrap_or(("a", key));
        if !is_label(name) || name.is_empty() || prefix.parse::<ResourceName>().is_err() {
            return field.wrong(
                format_args!("{} is not the key of a label", quoted(key)),
                "use letters, digits, -, _ and ., such as app or example.org/tier",
            );
        }
        let value = field.text()?;
        if !is_label(value) {
            return field.wrong(
                format_args!("{} is not the value of a label", quoted(value)),
                format_args!("use at most {MAX_LABEL} letters, digits, -, _ and ."),
            );
        }
        Some((key.to_owned(), value.to_owned()))
    })
}

/// Looks at every item, so that every error is noted, and gives them only whole.
pub(super) fn all<T, U, C: FromIterator<U>>(
    items: impl IntoIterator<Item = T>,
    read: impl FnMut(T) -> Option<U>,
) -> Option<C> {
    let read: Vec<Option<U>> = items.into_iter().map(read).collect();
    read.into_iter().collect()
}

fn version(field: &Field<'_>) -> Option<()> {
    let text = field.text()?;
    if text == API_VERSION {
        return Some(());
    }
    let what = if text.starts_with(API_GROUP) { "version" } else { "group" };
    field.wrong(
        format_args!("{} is not a supported {what}", quoted(text)),
        format_args!("write {API_VERSION}, the only one supported"),
    )
}

fn kind(field: &Field<'_>) -> Option<Kind> {
    let text = field.text()?;
    if KINDS_TO_COME.contains(&text) {
        return field
            .wrong(format_args!("{text} is not supported in manifests yet"), "remove the object");
    }
    field.word(&KINDS)
}

/// A workload of it would have the key of a machine.
fn namespace(field: &Field<'_>) -> Option<ResourceName> {
    let name = field.name()?;
    if name.as_str() == RESERVED_NAMESPACE {
        return field.wrong(
            format_args!("the namespace {RESERVED_NAMESPACE} stands for machines"),
            "choose another name",
        );
    }
    Some(name)
}

fn read_metadata(field: &Field<'_>, namespaced: bool) -> Option<Metadata> {
    let fields = field.fields(&["name", "namespace", "labels", "annotations"])?;
    let name = fields.required("name", "ledger", Field::name);
    let scope = if namespaced {
        fields.required("namespace", "payments", namespace).map(Scope::Namespace)
    } else {
        match fields.given("namespace") {
            None => Some(Scope::Cluster),
            Some(field) => field.wrong(
                "this kind belongs to the whole cluster, not to a namespace",
                "remove the namespace",
            ),
        }
    };
    let labels = fields.optional("labels", labels);
    // Other tools' notes: nothing here depends on them.
    let annotations = fields.optional("annotations", |field| field.entries().map(drop));
    annotations?;
    Some(Metadata { name: name?, labels: labels?.unwrap_or_default(), scope: scope? })
}

fn is_label(text: &str) -> bool {
    let edge = |c: char| c.is_ascii_alphanumeric();
    text.len() <= MAX_LABEL
        && text.chars().all(|c| edge(c) || matches!(c, '-' | '_' | '.'))
        && text.chars().next().is_none_or(edge)
        && text.chars().next_back().is_none_or(edge)
}
