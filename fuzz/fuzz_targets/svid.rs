//! No bytes make the certificate checks panic, and what they accept is within its own window.
#![no_main]

use hauberk_core::{
    svid::{check_intermediate, check_leaf, check_root},
    time::Timestamp,
};

libfuzzer_sys::fuzz_target!(|input: (i64, &[u8])| {
    let (now, der) = input;
    let now = Timestamp::from_unix_millis(now);
    if let Ok(facts) = check_leaf(der, now) {
        // Both ends are included: RFC 5280, section 4.1.2.5.
        assert!(facts.not_before() <= now && now <= facts.not_after());
        assert!(!facts.id().path().is_empty());
    }
    let _intermediate = check_intermediate(der, now);
    let _root = check_root(der, now);
});
