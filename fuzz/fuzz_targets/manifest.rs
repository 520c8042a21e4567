//! No text makes the reader panic, and nothing that it accepts is empty where empty could mean all.
#![no_main]

use hauberk_core::{
    manifest::{check_set, parse},
    policy::{GuardrailPeers, GuardrailPorts, Object, Target},
};

libfuzzer_sys::fuzz_target!(|text: &str| {
    match parse("fuzz.yaml", text) {
        Ok(objects) => {
            let _set = check_set(&objects);
            for object in &objects {
                demand_nothing_empty(&object.value);
            }
        }
        Err(errors) => {
            assert!(!errors.is_empty());
            for error in errors {
                assert!(error.line >= 1 && !error.mend.is_empty());
                assert!(!error.to_string().contains('\u{1b}'));
            }
        }
    }
});

fn demand_nothing_empty(object: &Object) {
    match object {
        Object::AccessPolicy(policy) => {
            if let Target::Selector(labels) = &policy.target {
                assert!(!labels.is_empty());
            }
            for rule in &policy.rules {
                assert!(!rule.ports.is_empty() && !rule.from.is_empty());
            }
        }
        Object::Guardrail(guardrail) => {
            let (GuardrailPeers::From(list) | GuardrailPeers::UnlessFrom(list)) = &guardrail.denies;
            assert!(!list.is_empty());
            if let GuardrailPorts::Only(ports) = &guardrail.ports {
                assert!(!ports.is_empty());
            }
        }
        Object::Machine(_) | Object::Workload(_) => {}
    }
}
