//! Learned policies as manifests: one writer for people's YAML, one for programs' JSON.

use serde_json::{Map, Value, json};

use super::{LearnedPolicy, LearnedRule};
use crate::policy::{Mode, Owner, PeerSelector, Target};

const API_VERSION: &str = "hauberk.dev/v1alpha1";

/// The contact of an owner whom no policy names yet.
const UNKNOWN: &str = "unknown";

/// What YAML 1.1, as in Kubernetes, takes for something else than text, though it begins with a letter.
const SWITCHES: [&str; 9] = ["true", "false", "yes", "no", "on", "off", "y", "n", "null"];

/// The policy as a document of a manifest, which says of each rule what it rests on.
#[must_use]
pub fn yaml(policy: &LearnedPolicy) -> String {
    let name = scalar(policy.name.as_str());
    let namespace = scalar(policy.namespace.as_str());
    let mut text = format!(
        "---\napiVersion: {API_VERSION}\nkind: AccessPolicy\n\
         metadata: {{name: {name}, namespace: {namespace}}}\nspec:\n"
    );
    if policy.owner.is_none() {
        text.push_str("  # Fill in who answers for it.\n");
    }
    text.push_str(&format!("  owner: {}\n", owner_yaml(&owner(policy))));
    text.push_str(&format!("  target: {}\n", target_yaml(&policy.target)));
    if policy.mode == Mode::Audit {
        text.push_str("  # As the others about it: one that enforces is enough.\n  mode: Audit\n");
    }
    text.push_str("  rules:\n");
    for rule in &policy.rules {
        let ports: Vec<String> = rule.ports.iter().map(ToString::to_string).collect();
        text.push_str(&format!(
            "  # {}{}\n  - name: {}\n    ports: [{}]\n    from: [{}]\n",
            rule.seen,
            older(rule),
            scalar(rule.name.as_str()),
            ports.join(", "),
            peer_yaml(&rule.from),
        ));
    }
    text
}

/// What is to be known of connections whose callers proved nothing.
fn older(rule: &LearnedRule) -> String {
    match rule.older {
        0 => String::new(),
        older => format!("; {older} of them older than the capture, from who has the address"),
    }
}

/// The same as one JSON value, without the remarks.
#[must_use]
pub fn json(policy: &LearnedPolicy) -> Value {
    let owner = owner(policy);
    let mut owner_fields = Map::new();
    owner_fields.insert("team".to_owned(), json!(owner.team));
    owner_fields.insert("contact".to_owned(), json!(owner.contact));
    if let Some(runbook) = owner.runbook {
        owner_fields.insert("runbook".to_owned(), json!(runbook));
    }
    let rules: Vec<Value> = policy
        .rules
        .iter()
        .map(
            |rule| json!({"name": rule.name, "ports": rule.ports, "from": [peer_json(&rule.from)]}),
        )
        .collect();
    let mut spec = Map::new();
    spec.insert("owner".to_owned(), Value::Object(owner_fields));
    spec.insert("target".to_owned(), target_json(&policy.target));
    if policy.mode == Mode::Audit {
        spec.insert("mode".to_owned(), json!(policy.mode.as_str()));
    }
    spec.insert("rules".to_owned(), Value::Array(rules));
    json!({
        "apiVersion": API_VERSION,
        "kind": "AccessPolicy",
        "metadata": {"name": policy.name, "namespace": policy.namespace},
        "spec": spec,
    })
}

fn owner(policy: &LearnedPolicy) -> Owner {
    policy.owner.clone().unwrap_or_else(|| Owner {
        team: policy.namespace.to_string(),
        contact: UNKNOWN.to_owned(),
        runbook: None,
    })
}

fn owner_yaml(owner: &Owner) -> String {
    let mut text = format!("{{team: {}, contact: {}", scalar(&owner.team), scalar(&owner.contact));
    if let Some(runbook) = &owner.runbook {
        text.push_str(&format!(", runbook: {}", scalar(runbook)));
    }
    text.push('}');
    text
}

fn target_yaml(target: &Target) -> String {
    match target {
        Target::ServiceAccount(name) => format!("{{serviceAccount: {}}}", scalar(name.as_str())),
        Target::Machine(name) => format!("{{machine: {}}}", scalar(name.as_str())),
        Target::Selector(labels) => {
            let labels =
                labels.iter().map(|(key, value)| format!("{}: {}", quoted(key), quoted(value)));
            format!("{{selector: {{matchLabels: {{{}}}}}}}", labels.collect::<Vec<_>>().join(", "))
        }
    }
}

fn target_json(target: &Target) -> Value {
    match target {
        Target::ServiceAccount(name) => json!({"serviceAccount": name}),
        Target::Machine(name) => json!({"machine": name}),
        Target::Selector(labels) => json!({"selector": {"matchLabels": labels}}),
    }
}

fn peer_yaml(peer: &PeerSelector) -> String {
    match peer {
        PeerSelector::ServiceAccount { namespace, name } => format!(
            "{{serviceAccount: {{namespace: {}, name: {}}}}}",
            scalar(namespace.as_str()),
            scalar(name.as_str())
        ),
        PeerSelector::Machine { name } => format!("{{machine: {}}}", scalar(name.as_str())),
        PeerSelector::SpiffeId(id) => format!("{{spiffeId: {}}}", quoted(id.as_str())),
        PeerSelector::AnyIn { namespace } => {
            format!("{{anyIn: {{namespace: {}}}}}", scalar(namespace.as_str()))
        }
    }
}

fn peer_json(peer: &PeerSelector) -> Value {
    match peer {
        PeerSelector::ServiceAccount { namespace, name } => {
            json!({"serviceAccount": {"namespace": namespace, "name": name}})
        }
        PeerSelector::Machine { name } => json!({"machine": name}),
        PeerSelector::SpiffeId(id) => json!({"spiffeId": id}),
        PeerSelector::AnyIn { namespace } => json!({"anyIn": {"namespace": namespace}}),
    }
}

/// A text that every YAML reader takes for that text: in quotes, unless it is a plain name.
fn scalar(text: &str) -> String {
    let is_name = text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.chars().all(|c| matches!(c, 'a'..='z' | '0'..='9' | '-' | '.'));
    if is_name && !SWITCHES.contains(&text) { text.to_owned() } else { quoted(text) }
}

/// The texts here have no control characters: what is read refuses them.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}
