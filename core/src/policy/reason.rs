//! The closed set of reasons: the same word in metrics, records, the audit log, the command line and
//! the refusal sent to the caller's agent.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Why a connection was refused or cut. Closed: an unknown word is an error, never a default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// No policy speaks about the destination, and everything not allowed is denied.
    NoPolicy,
    /// Policies speak about the destination, but none of their rules matches.
    NoMatchingRule,
    /// A guardrail of the platform team denies it; no owner can override that.
    Guardrail,
    /// A lock on the identity, node, serial, service or edge is in force.
    Lock,
    /// A rule or grant would have allowed it, but its time is over.
    GrantExpired,
    /// The peer presented no certificate.
    NoClientCert,
    /// The peer's certificate does not lead to the root of its trust domain.
    UntrustedRoot,
    /// The peer's certificate is expired or not yet valid.
    ExpiredCert,
    /// The peer's certificate is not a valid X.509-SVID.
    BadSvid,
    /// The peer is somebody else than the one the directory has for this address.
    IdentityMismatch,
    /// The mesh does not know the destination address.
    UnknownDestination,
    /// The agent cannot decide or prove its identity yet.
    NotReady,
    /// The connection came without mutual TLS.
    Plaintext,
    /// A limit on connections or handshakes was reached.
    RateLimited,
    /// A live connection was cut because a policy change no longer allows it.
    PolicyRevoked,
    /// The agent did not carry the connection: it was opened while capture rules were missing, or its socket is
    /// bound to an interface.
    Uncaptured,
}

impl Reason {
    /// All reasons, in the order of their documentation.
    pub const ALL: [Self; 16] = [
        Self::NoPolicy,
        Self::NoMatchingRule,
        Self::Guardrail,
        Self::Lock,
        Self::GrantExpired,
        Self::NoClientCert,
        Self::UntrustedRoot,
        Self::ExpiredCert,
        Self::BadSvid,
        Self::IdentityMismatch,
        Self::UnknownDestination,
        Self::NotReady,
        Self::Plaintext,
        Self::RateLimited,
        Self::PolicyRevoked,
        Self::Uncaptured,
    ];

    /// The word used everywhere.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoPolicy => "no_policy",
            Self::NoMatchingRule => "no_matching_rule",
            Self::Guardrail => "guardrail",
            Self::Lock => "lock",
            Self::GrantExpired => "grant_expired",
            Self::NoClientCert => "no_client_cert",
            Self::UntrustedRoot => "untrusted_root",
            Self::ExpiredCert => "expired_cert",
            Self::BadSvid => "bad_svid",
            Self::IdentityMismatch => "identity_mismatch",
            Self::UnknownDestination => "unknown_destination",
            Self::NotReady => "not_ready",
            Self::Plaintext => "plaintext",
            Self::RateLimited => "rate_limited",
            Self::PolicyRevoked => "policy_revoked",
            Self::Uncaptured => "uncaptured",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The word is none of the closed set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown reason {0:?}")]
pub struct UnknownReason(pub String);

impl FromStr for Reason {
    type Err = UnknownReason;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|reason| reason.as_str() == word)
            .ok_or_else(|| UnknownReason(word.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_reads_back_from_its_word() {
        for reason in Reason::ALL {
            assert_eq!(reason.as_str().parse(), Ok(reason));
        }
        assert!("allow".parse::<Reason>().is_err());
    }
}
