use hauberk_core::{
    identity::SpiffeId,
    learn::{Edge, End, Outcome, Seen},
    policy::{Mode, Owner},
    time::Timestamp,
};

use super::{
    ConvertError,
    policy::owner,
    workload::{address, mode, port, spiffe_id},
};
use crate::v1::{self, end::Kind};

/// The message of an edge and how often it was seen.
#[must_use]
pub fn seen_message(edge: &Edge, seen: &Seen) -> v1::SeenEdge {
    v1::SeenEdge {
        source: Some(end_message(&edge.source)),
        destination: Some(end_message(&edge.destination)),
        port: u32::from(edge.port),
        outcome: match edge.outcome {
            Outcome::WouldDeny => v1::Outcome::WouldDeny,
            Outcome::Denied => v1::Outcome::Denied,
            Outcome::Older => v1::Outcome::Older,
        }
        .into(),
        count: seen.count,
        first_unix_ms: seen.first.unix_millis(),
        last_unix_ms: seen.last.unix_millis(),
    }
}

/// Reads an edge and how often it was seen.
///
/// # Errors
/// If any field is missing, unknown or malformed, or neither end has an identity.
pub fn seen(message: v1::SeenEdge) -> Result<(Edge, Seen), ConvertError> {
    let edge = Edge {
        source: end("seen.source", message.source)?,
        destination: end("seen.destination", message.destination)?,
        port: port("seen.port", message.port)?,
        outcome: match v1::Outcome::try_from(message.outcome) {
            Ok(v1::Outcome::WouldDeny) => Outcome::WouldDeny,
            Ok(v1::Outcome::Denied) => Outcome::Denied,
            Ok(v1::Outcome::Older) => Outcome::Older,
            Ok(v1::Outcome::Unspecified) | Err(_) => {
                return Err(ConvertError::missing("seen.outcome"));
            }
        },
    };
    if matches!((&edge.source, &edge.destination), (End::Address(_), End::Address(_))) {
        return Err(ConvertError::new("seen", "neither end has an identity"));
    }
    let seen = Seen {
        count: message.count,
        first: Timestamp::from_unix_millis(message.first_unix_ms),
        last: Timestamp::from_unix_millis(message.last_unix_ms),
    };
    Ok((edge, seen))
}

/// Reads who answers for a destination, and the mode of its policies.
///
/// # Errors
/// If any field is missing, unknown or malformed.
pub fn learned_destination(
    message: v1::LearnedDestination,
) -> Result<(SpiffeId, (Owner, Mode)), ConvertError> {
    let id = spiffe_id("learned_destination.spiffe_id", &message.spiffe_id)?;
    let owner = owner("learned_destination.owner", message.owner)?;
    Ok((id, (owner, mode("learned_destination.mode", message.mode)?)))
}

fn end_message(end: &End) -> v1::End {
    v1::End {
        kind: Some(match end {
            End::Identity(id) => Kind::SpiffeId(id.to_string()),
            End::Address(address) => Kind::Address(address.to_string()),
        }),
    }
}

fn end(field: &str, message: Option<v1::End>) -> Result<End, ConvertError> {
    let kind = message.and_then(|end| end.kind).ok_or(ConvertError::missing(field))?;
    Ok(match kind {
        Kind::SpiffeId(text) => End::Identity(spiffe_id(field, &text)?),
        Kind::Address(text) => End::Address(address(field, &text)?),
    })
}
