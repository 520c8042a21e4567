//! AccessPolicy, and the tests that it carries.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    time::Duration,
};

use super::{
    objects::{Metadata, Scope, all, labels, mode, owner},
    peers::{peer, some_peers, some_ports},
    reader::Field,
    words::{canonical_number, clipped, quoted},
};
use crate::{
    identity::{ResourceName, TrustDomain},
    policy::{
        AccessPolicy, Expectation, PeerSelector, PolicyKind, PolicyRef, PolicyTest, Rule, Target,
        examples::failed_tests,
    },
};

pub(super) fn read(metadata: Option<Metadata>, spec: &Field<'_>) -> Option<AccessPolicy> {
    let fields = spec.fields(&["owner", "target", "mode", "rules", "tests"])?;
    let owner = fields.required("owner", "{team: payments, contact: \"#payments-oncall\"}", owner);
    let target = fields.required("target", "{selector: {matchLabels: {app: ledger}}}", target);
    let mode = mode(&fields);
    let rules = fields.required("rules", "[…], or [] to deny everybody", rules);
    let tests = fields.optional("tests", |field| {
        let tests = field.list()?.into_iter().map(|field| (policy_test(&field), field));
        Some(tests.collect::<Vec<_>>())
    });
    let metadata = metadata?;
    let namespace = match metadata.scope {
        Scope::Namespace(namespace) => Some(namespace),
        Scope::Cluster => None,
    };
    let tests = tests?.unwrap_or_default();
    let readable = tests.iter().all(|(test, _)| test.is_some());
    let (tests, places): (Vec<PolicyTest>, Vec<Field<'_>>) =
        tests.into_iter().filter_map(|(test, place)| Some((test?, place))).unzip();
    let policy = AccessPolicy {
        name: PolicyRef { kind: PolicyKind::AccessPolicy, namespace, name: metadata.name },
        owner: owner?,
        target: target?,
        mode: mode?,
        rules: rules?,
        tests,
    };
    // Only of a policy that is right otherwise, so that one mistake is not told twice.
    hold(&policy, spec, &places).filter(|()| readable).map(|()| policy)
}

fn target(field: &Field<'_>) -> Option<Target> {
    const KINDS: &[&str] = &["selector", "serviceAccount", "machine"];
    let (which, chosen) = field.fields(KINDS)?.one_of(KINDS)?;
    match which {
        "selector" => chosen
            .fields(&["matchLabels"])?
            .required("matchLabels", "{app: ledger}", some_labels)
            .map(Target::Selector),
        "serviceAccount" => chosen.name_or_map().map(Target::ServiceAccount),
        _ => chosen.name_or_map().map(Target::Machine),
    }
}

fn some_labels(field: &Field<'_>) -> Option<BTreeMap<String, String>> {
    let labels = labels(field)?;
    if labels.is_empty() {
        return field.wrong("no label is given", "name at least one; empty never means all");
    }
    Some(labels)
}

/// The rules by name. An explicit empty list is accepted: it allows nobody, which is what it says
/// and what a missing policy does too.
fn rules(field: &Field<'_>) -> Option<Vec<Rule>> {
    let mut rules = BTreeMap::new();
    all::<_, (), ()>(field.list()?, |field| {
        let rule = rule(&field)?;
        match rules.entry(rule.name.clone()) {
            Entry::Vacant(entry) => {
                entry.insert(rule);
                Some(())
            }
            Entry::Occupied(_) => field.wrong(
                format_args!("another rule is named {} too", quoted(rule.name.as_str())),
                "give each rule a name of its own",
            ),
        }
    })?;
    Some(rules.into_values().collect())
}

fn rule(field: &Field<'_>) -> Option<Rule> {
    let fields = field.fields(&["name", "reason", "ports", "from", "notAfter", "expectedEvery"])?;
    let name: Option<ResourceName> = fields.required("name", "checkout", Field::name);
    let reason = fields.optional("reason", Field::prose);
    let ports = fields.required("ports", "[5432]", some_ports);
    let example = "[serviceAccount: {namespace: shop, name: checkout}]";
    let from = fields.required("from", example, some_peers);
    let not_after = fields.optional("notAfter", Field::timestamp);
    let expected_every = fields.optional("expectedEvery", duration);
    Some(Rule {
        name: name?,
        reason: reason?,
        ports: ports?,
        from: from?,
        not_after: not_after?,
        expected_every: expected_every?,
    })
}

fn duration(field: &Field<'_>) -> Option<Duration> {
    let text = match field.unquoted() {
        Some(number) => number,
        None => field.text()?,
    };
    let (number, unit) =
        text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let seconds = match unit {
        "s" => Some(1),
        "m" => Some(60),
        "h" => Some(3_600),
        "d" => Some(86_400),
        _ => None,
    };
    canonical_number::<u64>(number)
        .filter(|number| *number > 0)
        .and_then(|number| number.checked_mul(seconds?))
        .map(Duration::from_secs)
        .or_else(|| {
            field.wrong(
                format_args!("{} is not a duration", quoted(text)),
                "write a whole number and s, m, h or d, such as 90d",
            )
        })
}

fn policy_test(field: &Field<'_>) -> Option<PolicyTest> {
    let fields = field.fields(&["from", "port", "expect"])?;
    let example = "{serviceAccount: {namespace: shop, name: checkout}}";
    let from = fields.required("from", example, |field| match peer(field)? {
        PeerSelector::AnyIn { .. } => {
            field.wrong("anyIn is not one caller", "name a serviceAccount, machine or spiffeId")
        }
        one @ (PeerSelector::ServiceAccount { .. }
        | PeerSelector::Machine { .. }
        | PeerSelector::SpiffeId(_)) => Some(one),
    });
    let port = fields.required("port", "5432", Field::port);
    let words = [("allow", Expectation::Allow), ("deny", Expectation::Deny)];
    let expect = fields.required("expect", "allow", |field| field.word(&words));
    Some(PolicyTest { from: from?, port: port?, expect: expect? })
}

/// Whether every test comes out as expected; notes those that do not, each at its place.
///
/// Decided by [`failed_tests`], and so by the decision that agents make. Which trust domain is ours,
/// a manifest does not say: here it is one that no SPIFFE ID is of, and [`resolve`] asks again in
/// the real one.
///
/// [`resolve`]: crate::policy::resolve::resolve
fn hold(policy: &AccessPolicy, spec: &Field<'_>, places: &[Field<'_>]) -> Option<()> {
    let failed = match failed_tests(policy, &TrustDomain::stand_in()) {
        Ok(failed) => failed,
        Err(error) => return spec.wrong(clipped(&error), "shorten the names"),
    };
    for test in &failed {
        places.get(test.number).unwrap_or(spec).note(&test.problem, test.mend);
    }
    failed.is_empty().then_some(())
}
