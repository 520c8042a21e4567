//! Manifests: what is accepted, what is refused and with which words.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on panics")]

mod manifest {
    mod accepted;
    mod any_text;
    mod policy_tests;
    mod refused;
    mod set;

    /// A manifest with one policy; `spec` follows its metadata.
    fn policy(spec: &str) -> String {
        object("AccessPolicy", "{name: ledger, namespace: payments}", spec)
    }

    fn object(kind: &str, metadata: &str, spec: &str) -> String {
        format!(
            "apiVersion: hauberk.dev/v1alpha1\nkind: {kind}\nmetadata: {metadata}\nspec: {spec}\n"
        )
    }
}
