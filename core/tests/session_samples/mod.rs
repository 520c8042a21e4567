//! What a stream is asked for with, and how one is refused: of both kinds of session.

use hauberk_core::{
    policy::Reason,
    session::{Open, Refusal, RefusalCause},
};

pub(crate) fn open() -> Open {
    Open {
        connection_id: [7; 16],
        trace_id: [0; 16],
        original_destination: "10.0.0.1:80".parse().unwrap(),
        source_address: "[fd00::1]:4000".parse().unwrap(),
    }
}

pub(crate) fn refusal() -> Refusal {
    Refusal {
        cause: RefusalCause::Denied(Reason::NoMatchingRule),
        policy: "payments/ledger".to_owned(),
        rule: String::new(),
        owner: "payments".to_owned(),
        nearest_miss: String::new(),
        mend: "ask".to_owned(),
    }
}
