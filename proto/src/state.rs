//! The state that agents enforce, as resources with keys and one hash over all of them, so that both
//! ends can tell whether they mean the same.

use std::collections::BTreeMap;

use prost::Message;
use sha2::{Digest, Sha256};

use crate::v1;

/// SHA-256 over all resources: of each its key and its encoding, in the order of the keys.
#[must_use]
pub fn state_hash(resources: &BTreeMap<String, v1::Resource>) -> [u8; 32] {
    let mut hash = Sha256::new();
    for (key, resource) in resources {
        for bytes in [key.as_bytes(), &resource.encode_to_vec()] {
            // Lengths keep neighbours apart, so that no two states have the same input.
            hash.update(u64::try_from(bytes.len()).unwrap_or(u64::MAX).to_be_bytes());
            hash.update(bytes);
        }
    }
    hash.finalize().into()
}

/// What leads from one state to the next: new or changed resources, and the keys that are gone.
#[must_use]
pub fn delta(
    before: &BTreeMap<String, v1::Resource>,
    after: &BTreeMap<String, v1::Resource>,
) -> (Vec<v1::Resource>, Vec<String>) {
    let upserts = after
        .iter()
        .filter(|(key, resource)| before.get(*key) != Some(resource))
        .map(|(_, resource)| resource.clone())
        .collect();
    let removals = before.keys().filter(|key| !after.contains_key(*key)).cloned().collect();
    (upserts, removals)
}
