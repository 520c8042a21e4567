//! Whatever parses as a SPIFFE ID is written as it was read, and keeps the standard's limits.
#![no_main]

use hauberk_core::identity::SpiffeId;

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Ok(id) = text.parse::<SpiffeId>() {
        assert_eq!(id.as_str(), text);
        assert!(text.len() <= 2048 && id.trust_domain().as_str().len() <= 255);
        assert!(id.server_name().len() < 254);
        let _kind = id.kind();
    }
});
