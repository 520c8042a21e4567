//! What whoever applies an object is told at once.
//!
//! It is judged by what judges the objects that are stored, as if it was one of them, and told in the words of
//! its status to be. What is told of others is what that status would tell, too, and nothing more.

use hauberk_core::{
    identity::TrustDomain,
    manifest,
    policy::{Object, PeerSelector, Rule},
    time::Timestamp,
};
use hauberk_kubernetes::{Enforced, ManifestObject, Snapshot, Told};

use super::{
    judge::{judge, state_of},
    status::{ObjectState, matches, tell},
};

/// The longest warning, in characters. API servers cut longer ones when there are many.
const MAX_WARNING: usize = 256;

/// The most warnings: together they are not longer than the 4,096 characters that API servers pass on.
const MAX_WARNINGS: usize = 15;

/// The longest name in front of a warning, in characters, so that there is room for what is wrong.
const MAX_SOURCE: usize = 96;

/// What its author should know of an object that is about to be stored in a cluster that is as the snapshot
/// says; nothing if it is going to do what it says.
pub(crate) fn warnings(
    snapshot: Snapshot,
    mut object: ManifestObject,
    trust_domain: &TrustDomain,
    now: Timestamp,
) -> Vec<String> {
    let snapshot = with(snapshot, &mut object);
    let (accepted, errors) = judge(&snapshot, trust_domain);
    let matched = accepted.as_ref().map(|accepted| matches(&accepted.resolved));
    let resolved = accepted
        .as_ref()
        .zip(matched.as_ref())
        .map(|(accepted, matched)| (matched, accepted.resolved.unresolved.as_slice()));
    // No agent can have it yet.
    let state = state_of(&object, &errors, resolved, u64::MAX);
    // Something else is wrong that nothing can be said without.
    if resolved.is_none() && state.errors.is_empty() {
        return Vec::new();
    }
    let (conditions, _, _) = tell(&state, &Enforced::new());
    let mut lines = Vec::new();
    for condition in conditions.iter().filter(|condition| is_news(condition, &state)) {
        let told = condition.message.lines().map(|line| without_place(line, &object.source()));
        lines.extend(told.map(|line| format!("{}=False: {line}", condition.kind)));
    }
    if state.errors.is_empty() {
        lines.extend(hints(&object, now));
    }
    bounded(&object.source(), lines)
}

/// The snapshot with an object as if it was stored, and without all that it has nothing to do with: other
/// policies.
fn with(mut snapshot: Snapshot, object: &mut ManifestObject) -> Snapshot {
    let source = object.source();
    let known = snapshot.objects.iter().find(|known| known.source() == source);
    // The status that counts is the one that is stored, whatever its author writes.
    object.status = known.map(|known| known.status.clone()).unwrap_or_default();
    snapshot
        .objects
        .retain(|other| matches!(other.kind, "Machine" | "Workload") && other.source() != source);
    snapshot.objects.push(object.clone());
    // As they are listed: of two that clash the later is wrong.
    snapshot.objects.sort_by_cached_key(ManifestObject::source);
    snapshot
}

/// Whether a condition tells of something to mend.
fn is_news(condition: &Told, state: &ObjectState) -> bool {
    match condition.reason {
        // Agents have not had the time.
        "Waiting" => false,
        // Of the version before, which is in force.
        "NotFound" => state.errors.is_empty(),
        // For a policy, its target has told so already.
        "NoWorkload" => state.unresolved.is_empty(),
        _ => !condition.holds,
    }
}

/// Without whose line it is, which stands in front, and where in a text that its author has not seen.
fn without_place<'a>(line: &'a str, source: &str) -> &'a str {
    let Some(rest) = line.strip_prefix(source) else { return line };
    rest.trim_start_matches(|c: char| c == ':' || c.is_ascii_digit()).trim_start()
}

/// What holds as it is written, and often is not meant so.
fn hints(object: &ManifestObject, now: Timestamp) -> Vec<String> {
    let parsed = manifest::parse(&object.source(), &object.text).unwrap_or_default();
    parsed
        .iter()
        .flat_map(|found| match &found.value {
            Object::AccessPolicy(policy) => policy.rules.as_slice(),
            Object::Guardrail(_) | Object::Machine(_) | Object::Workload(_) => Default::default(),
        })
        .flat_map(|rule| hints_of(rule, now))
        .collect()
}

fn hints_of(rule: &Rule, now: Timestamp) -> Vec<String> {
    let over = rule.not_after.filter(|end| *end <= now);
    let over = over.map(|end| format!("rule {} ended at {end}: it allows nobody", rule.name));
    let wide = rule.from.iter().filter_map(|peer| match peer {
        PeerSelector::AnyIn { namespace } => Some(format!(
            "rule {} allows every service account of namespace {namespace}, those to come as well",
            rule.name
        )),
        PeerSelector::ServiceAccount { .. }
        | PeerSelector::Machine { .. }
        | PeerSelector::SpiffeId(_) => None,
    });
    over.into_iter().chain(wide).collect()
}

/// As many and as long as API servers pass on; what is left out is said to be, and stands in the status.
fn bounded(source: &str, mut lines: Vec<String>) -> Vec<String> {
    if lines.len() > MAX_WARNINGS {
        let kept = MAX_WARNINGS - 1;
        let more = lines.len() - kept;
        lines.truncate(kept);
        lines.push(format!("and {more} more: see status.conditions"));
    }
    let source = clipped(source, MAX_SOURCE);
    let whole = lines.iter().map(|line| clipped(&format!("{source}: {line}"), MAX_WARNING));
    whole.collect()
}

/// Not longer than that, and without what API servers drop a warning for.
fn clipped(text: &str, limit: usize) -> String {
    let plain = text.replace(char::is_control, " ");
    if plain.chars().count() <= limit {
        return plain;
    }
    let mut cut: String = plain.chars().take(limit - 1).collect();
    cut.push('…');
    cut
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use std::collections::BTreeSet;

    use hauberk_core::policy::{Mode, Process, ProcessSelector, Workload};
    use hauberk_kubernetes::crd::Status;
    use serde_json::{Value, json};

    use super::*;

    const LEDGER: &str = "AccessPolicy payments/ledger";

    fn pod(namespace: &str, account: &str) -> Workload {
        Workload {
            namespace: namespace.parse().unwrap(),
            name: account.parse().unwrap(),
            labels: [("app".to_owned(), account.to_owned())].into(),
            service_account: account.parse().unwrap(),
            machine: "node-a".parse().unwrap(),
            process: Process {
                selector: ProcessSelector::Pod {
                    uid: format!("uid-of-{account}"),
                    addresses: BTreeSet::new(),
                    probe_ports: BTreeSet::new(),
                    orphaned: false,
                },
                ports: BTreeSet::new(),
                mode: Mode::Enforce,
            },
        }
    }

    /// A ledger and its callers.
    fn cluster() -> Snapshot {
        let workloads =
            vec![pod("payments", "ledger"), pod("shop", "checkout"), pod("shop", "web")];
        Snapshot { workloads, ..Snapshot::default() }
    }

    fn object(
        kind: &'static str,
        namespace: Option<&str>,
        name: &str,
        spec: Value,
    ) -> ManifestObject {
        let mut manifest = json!({
            "apiVersion": "hauberk.dev/v1alpha1",
            "kind": kind,
            "metadata": {"name": name},
            "spec": spec,
        });
        if let Some(namespace) = namespace {
            manifest["metadata"]["namespace"] = json!(namespace);
        }
        ManifestObject {
            kind,
            namespace: namespace.map(str::to_owned),
            name: name.to_owned(),
            generation: Some(1),
            text: manifest.to_string(),
            status: Status::default(),
        }
    }

    fn owner() -> Value {
        json!({"team": "payments", "contact": "#payments"})
    }

    /// What the owner of the ledger writes: its one rule, and its examples.
    fn ledger(target: &str, rule: &Value, tests: &Value) -> ManifestObject {
        let spec = json!({
            "owner": owner(),
            "target": {"selector": {"matchLabels": {"app": target}}},
            "rules": [rule],
            "tests": tests,
        });
        object("AccessPolicy", Some("payments"), "ledger", spec)
    }

    fn rule(from: &Value) -> Value {
        json!({"name": "checkout", "ports": [8080], "from": from})
    }

    fn account(name: &str) -> Value {
        json!({"serviceAccount": {"namespace": "shop", "name": name}})
    }

    /// One that does what it says.
    fn good() -> ManifestObject {
        ledger("ledger", &rule(&json!([account("checkout")])), &json!([]))
    }

    /// One with an example that does not hold.
    fn failing() -> ManifestObject {
        let tests = json!([{"from": account("web"), "port": 8080, "expect": "allow"}]);
        ledger("ledger", &rule(&json!([account("checkout")])), &tests)
    }

    fn told(snapshot: Snapshot, object: ManifestObject) -> Vec<String> {
        let now = "2026-11-01T00:00:00Z".parse().unwrap();
        warnings(snapshot, object, &"test.example".parse().unwrap(), now)
    }

    #[test]
    fn a_policy_that_does_what_it_says_is_no_news() {
        assert_eq!(told(cluster(), good()), Vec::<String>::new());
    }

    #[test]
    fn each_peer_that_nobody_is_and_a_target_without_workloads_are_told() {
        let from =
            json!([account("nobody"), account("checkout"), {"anyIn": {"namespace": "nowhere"}}]);
        let missing = "which no registered workload has";
        assert_eq!(
            told(cluster(), ledger("ledger", &rule(&from), &json!([]))),
            [
                format!(
                    "{LEDGER}: ResolvedRefs=False: rule checkout allows \
                     spiffe://test.example/ns/shop/sa/nobody, {missing}"
                ),
                format!(
                    "{LEDGER}: ResolvedRefs=False: rule checkout allows any service account of \
                     namespace nowhere in test.example, {missing}"
                ),
                format!(
                    "{LEDGER}: rule checkout allows every service account of namespace nowhere, \
                     those to come as well"
                ),
            ]
        );
        let nothing = ledger("ledgre", &rule(&json!([account("checkout")])), &json!([]));
        let problem = "spec.target matches no workload, so the policy allows nothing";
        assert_eq!(told(cluster(), nothing), [format!("{LEDGER}: ResolvedRefs=False: {problem}")]);
    }

    #[test]
    fn an_example_that_fails_is_told_with_what_holds_instead() {
        let refused = format!(
            "{LEDGER}: Accepted=False: spec.tests[0]: the test fails: service account shop/web on \
             port 8080 should be allowed, but is denied: the rules with this port have other \
             callers; mend: correct the rules, or expect deny"
        );
        let nothing = format!(
            "{LEDGER}: Programmed=False: it was not accepted, nor was any version before: it \
             allows nothing"
        );
        assert_eq!(told(cluster(), failing()), [refused.clone(), nothing.clone()]);

        let mut before = cluster();
        let mut stored = good();
        stored.status.last_accepted = Some(stored.text.clone());
        before.objects.push(stored);
        let earlier = format!(
            "{LEDGER}: Programmed=False: it was not accepted; the version that was accepted before \
             stays in force"
        );
        assert_eq!(told(before, failing()), [refused.clone(), earlier]);

        // What its author says of versions before is no proof.
        let mut claims = failing();
        claims.status.last_accepted = Some(good().text);
        assert_eq!(told(cluster(), claims), [refused, nothing]);
    }

    #[test]
    fn rules_that_are_over_and_rules_for_everybody_of_a_namespace_are_told() {
        let mut over = rule(&json!([account("checkout"), {"anyIn": {"namespace": "shop"}}]));
        over["notAfter"] = json!("2026-10-31T00:00:00Z");
        let wide =
            "rule checkout allows every service account of namespace shop, those to come as well";
        assert_eq!(
            told(cluster(), ledger("ledger", &over, &json!([]))),
            [
                format!("{LEDGER}: rule checkout ended at 2026-10-31T00:00:00Z: it allows nobody"),
                format!("{LEDGER}: {wide}"),
            ]
        );
        over["notAfter"] = json!("2026-11-02T00:00:00Z");
        assert_eq!(
            told(cluster(), ledger("ledger", &over, &json!([]))),
            [format!("{LEDGER}: {wide}")]
        );
    }

    #[test]
    fn other_kinds_are_told_of_what_their_status_would_tell() {
        let spec = json!({
            "owner": owner(),
            "target": {"namespace": "pci"},
            "allPorts": true,
            "denyFrom": [{"anyIn": {"namespace": "shop"}}],
        });
        assert_eq!(
            told(cluster(), object("Guardrail", None, "pci", spec)),
            ["Guardrail pci: Programmed=False: it is about no workload that runs"]
        );
        let spec = json!({
            "machine": "gone",
            "serviceAccount": "batch",
            "process": {"user": "batch"},
            "ports": [],
        });
        assert_eq!(
            told(cluster(), object("Workload", Some("payments"), "batch", spec)),
            ["Workload payments/batch: Accepted=False: spec.machine: there is no Machine gone; \
              mend: declare it, or correct the name"]
        );
        let machine = json!({"addresses": ["192.0.2.7"]});
        assert!(told(cluster(), object("Machine", None, "gone", machine)).is_empty());
    }

    #[test]
    fn nothing_is_told_of_the_policies_of_others() {
        let mut others = cluster();
        let spec = json!({"owner": owner(), "target": {"machine": "gone"}, "rules": [{}]});
        others.objects.push(object("AccessPolicy", Some("shop"), "web", spec));
        others.objects.push(object("Guardrail", None, "pci", json!({})));
        assert_eq!(told(others, good()), Vec::<String>::new());
    }

    #[test]
    fn warnings_are_as_many_and_as_long_as_api_servers_pass_on() {
        let long = "n".repeat(200);
        let peers: Vec<Value> = (0..40).map(|number| account(&format!("{long}{number}"))).collect();
        let mut named = ledger("ledger", &rule(&json!(peers)), &json!([]));
        named.name = "l".repeat(253);
        named.text =
            named.text.replace("\"name\":\"ledger\"", &format!("\"name\":\"{}\"", named.name));
        let told = told(cluster(), named);
        assert_eq!(told.len(), MAX_WARNINGS);
        for warning in &told {
            assert!(warning.chars().count() <= MAX_WARNING, "{warning}");
            assert!(warning.starts_with("AccessPolicy payments/lll"), "{warning}");
        }
        let [.., second_last, last] = told.as_slice() else { unreachable!("there are 15") };
        assert!(second_last.ends_with("nnn…"), "{second_last}");
        assert!(last.ends_with("lll…: and 26 more: see status.conditions"), "{last}");
        let all: usize = told.iter().map(|warning| warning.chars().count()).sum();
        assert!(all <= 4_096, "{all}");
    }

    #[test]
    fn no_control_character_is_told() {
        assert_eq!(clipped("a\tb\u{7f}c\r\n", 10), "a b c  ");
    }
}
