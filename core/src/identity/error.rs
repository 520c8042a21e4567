//! Why a text is refused as an identity or a name: one variant a rule, each with the offending part.

use super::{MAX_RESOURCE_NAME_BYTES, MAX_SPIFFE_ID_BYTES, MAX_TRUST_DOMAIN_BYTES, SCHEME};

/// Why a text is not a SPIFFE ID or not a trust domain. Each variant is one rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeIdError {
    /// More than [`MAX_SPIFFE_ID_BYTES`].
    #[error("the SPIFFE ID has {length} bytes: at most {MAX_SPIFFE_ID_BYTES} are allowed")]
    TooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// Does not begin with `spiffe://`.
    #[error("{id:?} does not begin with \"{SCHEME}\", in lower case")]
    Scheme {
        /// The whole text.
        id: String,
    },
    /// A `?` and what follows it.
    #[error("the query {query:?} must be removed: a SPIFFE ID has none")]
    Query {
        /// The query with its `?`.
        query: String,
    },
    /// A `#` and what follows it.
    #[error("the fragment {fragment:?} must be removed: a SPIFFE ID has none")]
    Fragment {
        /// The fragment with its `#`.
        fragment: String,
    },
    /// Nothing where the trust domain belongs.
    #[error(
        "the trust domain is empty: write it after \"{SCHEME}\", like \"{SCHEME}prod.example\""
    )]
    TrustDomainEmpty,
    /// More than [`MAX_TRUST_DOMAIN_BYTES`].
    #[error("the trust domain has {length} bytes: at most {MAX_TRUST_DOMAIN_BYTES} are allowed")]
    TrustDomainTooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// An `@` before the trust domain.
    #[error("the user part {userinfo:?} before the trust domain must be removed")]
    UserInfo {
        /// The user part with its `@`.
        userinfo: String,
    },
    /// A `:` after the trust domain.
    #[error("the port {port:?} after the trust domain must be removed")]
    Port {
        /// The port with its `:`.
        port: String,
    },
    /// An upper-case letter in the trust domain.
    #[error("the trust domain {trust_domain:?} must be in lower case")]
    TrustDomainUpperCase {
        /// The trust domain.
        trust_domain: String,
    },
    /// A character that trust domains never have.
    #[error(
        "the trust domain {trust_domain:?} contains {character:?}: only a-z, 0-9, \".\", \"_\" \
         and \"-\" are allowed"
    )]
    TrustDomainCharacter {
        /// The trust domain.
        trust_domain: String,
        /// The first such character.
        character: char,
    },
    /// A `%` anywhere.
    #[error("{part:?} is percent-encoded: a SPIFFE ID contains its characters as they are")]
    PercentEncoded {
        /// The trust domain or the path segment.
        part: String,
    },
    /// A path that ends in `/`.
    #[error("the path {path:?} ends in \"/\": remove it")]
    TrailingSlash {
        /// The path.
        path: String,
    },
    /// Two slashes in a row, or an empty name given to a builder.
    #[error("the path {path:?} has an empty segment: segments are separated by one \"/\"")]
    EmptySegment {
        /// The path.
        path: String,
    },
    /// A `.` or `..` segment.
    #[error("the path {path:?} has the relative segment {segment:?}: write the path out")]
    RelativeSegment {
        /// The path.
        path: String,
        /// `.` or `..`.
        segment: String,
    },
    /// A character that path segments never have.
    #[error(
        "the path segment {segment:?} contains {character:?}: only a-z, A-Z, 0-9, \".\", \"_\" \
         and \"-\" are allowed"
    )]
    PathCharacter {
        /// The segment.
        segment: String,
        /// The first such character.
        character: char,
    },
}

/// Why a text is not a resource name. Each variant is one rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResourceNameError {
    /// No text at all.
    #[error("the name is empty: give 1 to {MAX_RESOURCE_NAME_BYTES} characters")]
    Empty,
    /// More than [`MAX_RESOURCE_NAME_BYTES`].
    #[error("the name has {length} bytes: at most {MAX_RESOURCE_NAME_BYTES} are allowed")]
    TooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// A character that resource names never have.
    #[error("the name {name:?} contains {character:?}: only a-z, 0-9, \"-\" and \".\" are allowed")]
    Character {
        /// The name.
        name: String,
        /// The first such character.
        character: char,
    },
    /// A `-` or `.` at either end.
    #[error("the name {name:?} must begin and end with a letter or digit")]
    Edge {
        /// The name.
        name: String,
    },
}
