//! What was seen says the same on the wire and off it, or is refused with its field.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use hauberk_core::{
    learn::{Edge, End, Outcome, Seen},
    policy::{Mode, Owner},
    time::Timestamp,
};
use hauberk_proto::{
    convert::{learned_destination, seen, seen_message},
    v1::{self, end::Kind},
};

const WEB: &str = "spiffe://prod.example/ns/shop/sa/web";
const LEDGER: &str = "spiffe://prod.example/ns/payments/sa/ledger";

fn identity(text: &str) -> Option<v1::End> {
    Some(v1::End { kind: Some(Kind::SpiffeId(text.to_owned())) })
}

fn address(text: &str) -> Option<v1::End> {
    Some(v1::End { kind: Some(Kind::Address(text.to_owned())) })
}

fn message() -> v1::SeenEdge {
    v1::SeenEdge {
        source: identity(WEB),
        destination: identity(LEDGER),
        port: 5432,
        outcome: v1::Outcome::WouldDeny.into(),
        count: 12,
        first_unix_ms: 1_000,
        last_unix_ms: 2_000,
    }
}

fn edge() -> Edge {
    Edge {
        source: End::Identity(WEB.parse().unwrap()),
        destination: End::Identity(LEDGER.parse().unwrap()),
        port: 5432,
        outcome: Outcome::WouldDeny,
    }
}

fn times() -> Seen {
    Seen {
        count: 12,
        first: Timestamp::from_unix_seconds(1),
        last: Timestamp::from_unix_seconds(2),
    }
}

#[test]
fn an_edge_says_the_same_on_the_wire_and_off_it() {
    let address_of = |text: &str| End::Address(text.parse().unwrap());
    let cases = [
        ("between identities", message(), edge()),
        (
            "denied",
            v1::SeenEdge { outcome: v1::Outcome::Denied.into(), ..message() },
            Edge { outcome: Outcome::Denied, ..edge() },
        ),
        (
            "from outside",
            v1::SeenEdge { source: address("10.0.0.9"), ..message() },
            Edge { source: address_of("10.0.0.9"), ..edge() },
        ),
        (
            "to outside",
            v1::SeenEdge { destination: address("fd00::9"), ..message() },
            Edge { destination: address_of("fd00::9"), ..edge() },
        ),
    ];
    for (name, message, edge) in cases {
        assert_eq!(seen_message(&edge, &times()), message, "{name}");
        assert_eq!(seen(message), Ok((edge, times())), "{name}");
    }
}

#[test]
fn an_edge_that_is_not_whole_is_refused_with_its_field() {
    let cases = [
        ("seen.source", v1::SeenEdge { source: None, ..message() }),
        ("seen.source", v1::SeenEdge { source: Some(v1::End::default()), ..message() }),
        ("seen.source", v1::SeenEdge { source: identity("web"), ..message() }),
        ("seen.destination", v1::SeenEdge { destination: None, ..message() }),
        ("seen.destination", v1::SeenEdge { destination: address("10.0.0.9:80"), ..message() }),
        ("seen.port", v1::SeenEdge { port: 0, ..message() }),
        ("seen.port", v1::SeenEdge { port: 65_536, ..message() }),
        ("seen.outcome", v1::SeenEdge { outcome: 0, ..message() }),
        ("seen.outcome", v1::SeenEdge { outcome: 9, ..message() }),
        (
            "seen",
            v1::SeenEdge {
                source: address("10.0.0.1"),
                destination: address("10.0.0.2"),
                ..message()
            },
        ),
    ];
    for (field, message) in cases {
        let refused = seen(message.clone()).map_err(|error| error.field);
        assert_eq!(refused, Err(field.to_owned()), "{message:?}");
    }
}

#[test]
fn a_destination_has_its_owner_and_mode_or_is_refused() {
    let message = || v1::LearnedDestination {
        spiffe_id: LEDGER.to_owned(),
        owner: Some(v1::Owner {
            team: "payments".to_owned(),
            contact: "#payments".to_owned(),
            runbook: String::new(),
        }),
        mode: v1::Mode::Audit.into(),
    };
    let owner =
        Owner { team: "payments".to_owned(), contact: "#payments".to_owned(), runbook: None };
    let whole = (LEDGER.parse().unwrap(), (owner, Mode::Audit));
    assert_eq!(learned_destination(message()), Ok(whole));
    let cases = [
        ("spiffe_id", v1::LearnedDestination { spiffe_id: String::new(), ..message() }),
        ("owner", v1::LearnedDestination { owner: None, ..message() }),
        ("mode", v1::LearnedDestination { mode: 0, ..message() }),
    ];
    for (field, message) in cases {
        let refused = learned_destination(message).map_err(|error| error.field);
        assert_eq!(refused, Err(format!("learned_destination.{field}")));
    }
}
