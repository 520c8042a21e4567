use hauberk_core::{
    manifest::{Located, check_set, parse},
    policy::{GuardrailPeers, GuardrailPorts, Object, PeerSelector, ProcessSelector, Target},
};
use proptest::prelude::*;

const VALID: [&str; 2] =
    [include_str!("../manifests/policy.yaml"), include_str!("../manifests/hosts.yaml")];

/// What a mutation puts in: what YAML and our fields find special.
const PIECES: [&str; 24] = [
    "",
    "\n",
    "  ",
    "\t",
    ": ",
    "- ",
    "[]",
    "{}",
    "~",
    "'",
    "\"",
    "&a ",
    "*a",
    "!!str ",
    "---\n",
    "#",
    "0",
    "70000",
    "name",
    "from",
    "ports: [1]",
    "\u{0}",
    "é",
    "spec:",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn arbitrary_text_never_panics_and_never_yields_an_empty_permission(text in "\\PC{0,200}") {
        holds(&text)?;
    }

    #[test]
    fn arbitrary_yaml_never_panics_and_never_yields_an_empty_permission(
        pieces in prop::collection::vec(prop::sample::select(&PIECES[..]), 0..60),
    ) {
        holds(&pieces.concat())?;
    }

    #[test]
    fn a_mutated_manifest_never_panics_and_never_yields_an_empty_permission(
        valid in prop::sample::select(&VALID[..]),
        edits in prop::collection::vec(
            (any::<prop::sample::Index>(), 0_usize..12, prop::sample::select(&PIECES[..])), 1..5,
        ),
    ) {
        let mut text: Vec<char> = valid.chars().collect();
        for (place, removed, piece) in edits {
            let start = place.index(text.len() + 1);
            let end = (start + removed).min(text.len());
            text.splice(start..end, piece.chars());
        }
        holds(&text.into_iter().collect::<String>())?;
    }
}

fn holds(text: &str) -> Result<(), TestCaseError> {
    match parse("a.yaml", text) {
        Ok(objects) => {
            for object in &objects {
                prop_assert!(nothing_is_empty(object), "{object:#?}\nof\n{text}");
            }
            for error in check_set(&objects).err().into_iter().flatten() {
                prop_assert!(!error.problem.is_empty() && !error.mend.is_empty());
            }
        }
        Err(errors) => {
            prop_assert!(!errors.is_empty());
            let lines = text.lines().count() + 1;
            for error in errors {
                prop_assert!((1..=lines).contains(&error.line), "{error:?}\nof\n{text}");
                prop_assert!(error.column >= 1 && !error.mend.is_empty(), "{error:?}");
                prop_assert!(!error.to_string().chars().any(char::is_control), "{error:?}");
            }
        }
    }
    Ok(())
}

fn nothing_is_empty(object: &Located<Object>) -> bool {
    match &object.value {
        Object::AccessPolicy(policy) => {
            let target = match &policy.target {
                Target::Selector(labels) => !labels.is_empty(),
                Target::ServiceAccount(_) | Target::Machine(_) => true,
            };
            let one = |test: &_| !matches!(test, PeerSelector::AnyIn { .. });
            target
                && policy.name.namespace.is_some()
                && policy.rules.iter().all(|rule| !rule.ports.is_empty() && !rule.from.is_empty())
                && policy.rules.iter().all(|rule| !rule.ports.contains(&0))
                && policy.rules.windows(2).all(|two| two[0].name < two[1].name)
                && policy.tests.iter().all(|test| one(&test.from))
        }
        Object::Guardrail(guardrail) => {
            let ports = match &guardrail.ports {
                GuardrailPorts::All => true,
                GuardrailPorts::Only(ports) => !ports.is_empty(),
            };
            let peers = match &guardrail.denies {
                GuardrailPeers::From(peers) | GuardrailPeers::UnlessFrom(peers) => peers,
            };
            ports && !peers.is_empty()
        }
        Object::Machine(_) => true,
        Object::Workload(workload) => match &workload.process.selector {
            ProcessSelector::NetworkNamespace { addresses, .. } => !addresses.is_empty(),
            // Of pods no manifest speaks.
            ProcessSelector::Pod { .. } => false,
            ProcessSelector::User(name) | ProcessSelector::Cgroup(name) => !name.is_empty(),
        },
    }
}
