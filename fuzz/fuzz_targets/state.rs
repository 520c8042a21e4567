//! A state update converts whole or not at all; what converts says the same on the wire again.
#![no_main]

use hauberk_proto::{convert::Resource, v1};
use prost::Message;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(update) = v1::StateUpdate::decode(bytes) else { return };
    for message in update.upserts {
        if let Ok(resource) = Resource::try_from(message) {
            assert_eq!(Resource::try_from(resource.message()), Ok(resource));
        }
    }
});
