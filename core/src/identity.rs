//! SPIFFE IDs, trust domains and resource names: values that are valid because they exist.
//!
//! This module decides which texts name an identity. It refuses everything that could be spelled
//! two ways (upper case in the trust domain, percent-encoding, empty or dot segments, a trailing
//! slash), so that two identities are equal exactly when their bytes are, and a comparison in a
//! policy never needs to normalise.

use std::borrow::Borrow;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha2::{Digest, Sha256};

pub use self::error::{ResourceNameError, SpiffeIdError};

mod error;

/// The longest SPIFFE ID accepted and built, in bytes, scheme and trust domain included.
///
/// The standard obliges us to support this much and asks nobody to generate more.
pub const MAX_SPIFFE_ID_BYTES: usize = 2_048;

/// The longest trust domain name, in bytes: RFC 3986's limit for a host.
pub const MAX_TRUST_DOMAIN_BYTES: usize = 255;

/// The longest resource name, in bytes: that of a DNS subdomain (RFC 1123), as in Kubernetes.
pub const MAX_RESOURCE_NAME_BYTES: usize = 253;

/// The longest name that [`ResourceName::label_of`] makes: with a number, it is still a DNS label.
const MAX_LABEL_BYTES: usize = 56;

/// The domain under which [`SpiffeId::server_name`] places every name.
pub const SERVER_NAME_SUFFIX: &str = ".svid.hauberk.internal";

const SCHEME: &str = "spiffe://";
const CONTROL_PLANE_PATH: &str = "/control-plane";
const SERVER_NAME_CONTEXT: &[u8] = b"hauberk server name v1\0";

/// A SPIFFE ID, such as `spiffe://prod.example/ns/shop/sa/web`.
///
/// Always valid: only parsing and the builders make one. Equality, order and hash are those of
/// the text. Cloning costs two reference counts.
#[derive(Clone)]
pub struct SpiffeId {
    uri: Arc<str>,
    trust_domain: TrustDomain,
}

/// The name of a trust domain: 1 to 255 of `a-z`, `0-9`, `.`, `_` and `-`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(Arc<str>);

/// The name of something in a manifest, a namespace or a service account.
///
/// 1 to 253 of `a-z`, `0-9`, `-` and `.`, with a letter or digit at both ends: what Kubernetes
/// accepts as the name of a namespace or service account, and a little more.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ResourceName(Arc<str>);

/// What an identity's path says it names. Whatever fits none of our four forms is `Other`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdentityKind<'a> {
    /// `/ns/<namespace>/sa/<service account>`
    Workload {
        /// The Kubernetes namespace.
        namespace: &'a str,
        /// The Kubernetes service account.
        service_account: &'a str,
    },
    /// `/machine/<name>`: a workload outside Kubernetes.
    Machine {
        /// The name under which it is registered.
        name: &'a str,
    },
    /// `/node/<name>`: an agent.
    Node {
        /// The node's name.
        name: &'a str,
    },
    /// `/control-plane`
    ControlPlane,
    /// Any other path, and none.
    Other,
}

impl SpiffeId {
    /// The identity of a Kubernetes workload:
    /// `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
    ///
    /// # Errors
    /// When either name is not one path segment, or the whole is too long.
    pub fn workload(
        trust_domain: &TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, SpiffeIdError> {
        Self::from_segments(trust_domain, &["ns", namespace, "sa", service_account])
    }

    /// The identity of a workload outside Kubernetes: `spiffe://<trust domain>/machine/<name>`.
    ///
    /// # Errors
    /// When the name is not one path segment, or the whole is too long.
    pub fn machine(trust_domain: &TrustDomain, name: &str) -> Result<Self, SpiffeIdError> {
        Self::from_segments(trust_domain, &["machine", name])
    }

    /// The identity of an agent: `spiffe://<trust domain>/node/<name>`.
    ///
    /// # Errors
    /// When the name is not one path segment, or the whole is too long.
    pub fn node(trust_domain: &TrustDomain, name: &str) -> Result<Self, SpiffeIdError> {
        Self::from_segments(trust_domain, &["node", name])
    }

    /// The identity of the control plane: `spiffe://<trust domain>/control-plane`.
    pub fn control_plane(trust_domain: &TrustDomain) -> Self {
        // The longest trust domain leaves ample room: the length limit cannot be reached.
        Self {
            uri: format!("{SCHEME}{trust_domain}{CONTROL_PLANE_PATH}").into(),
            trust_domain: trust_domain.clone(),
        }
    }

    /// The identity without a path, `spiffe://<trust domain>`: that of a signing certificate.
    pub fn of_trust_domain(trust_domain: &TrustDomain) -> Self {
        Self { uri: format!("{SCHEME}{trust_domain}").into(), trust_domain: trust_domain.clone() }
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The path with its leading `/`, or nothing for the identity of the trust domain itself.
    pub fn path(&self) -> &str {
        self.uri.get(SCHEME.len() + self.trust_domain.as_str().len()..).unwrap_or_default()
    }

    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    /// What the path says this identity names.
    pub fn kind(&self) -> IdentityKind<'_> {
        let mut segments = self.path().split('/').skip(1);
        let first_five: [Option<&str>; 5] = std::array::from_fn(|_| segments.next());
        match first_five {
            [Some("ns"), Some(namespace), Some("sa"), Some(service_account), None] => {
                IdentityKind::Workload { namespace, service_account }
            }
            [Some("machine"), Some(name), None, ..] => IdentityKind::Machine { name },
            [Some("node"), Some(name), None, ..] => IdentityKind::Node { name },
            [Some("control-plane"), None, ..] => IdentityKind::ControlPlane,
            _ => IdentityKind::Other,
        }
    }

    /// The DNS name sent as TLS server name to the holder of this identity.
    ///
    /// It names the expected identity to a peer that knows it, and says nothing to others on the
    /// wire: 32 characters of lower-case base32 from a hash, below [`SERVER_NAME_SUFFIX`]. Who
    /// can guess an identity can also confirm the guess.
    pub fn server_name(&self) -> String {
        let digest =
            Sha256::new().chain_update(SERVER_NAME_CONTEXT).chain_update(self.as_str()).finalize();
        let mut name = String::with_capacity(32 + SERVER_NAME_SUFFIX.len());
        for five_bytes in digest.as_slice().chunks_exact(5).take(4) {
            push_base32(&mut name, five_bytes);
        }
        name.push_str(SERVER_NAME_SUFFIX);
        name
    }

    fn from_segments(trust_domain: &TrustDomain, names: &[&str]) -> Result<Self, SpiffeIdError> {
        let path: String = names.iter().flat_map(|name| ["/", name]).collect();
        let length = SCHEME.len() + trust_domain.as_str().len() + path.len();
        if length > MAX_SPIFFE_ID_BYTES {
            return Err(SpiffeIdError::TooLong { length });
        }
        // Segment by segment as given: a "/" within a name is an unlawful character, never a
        // separator.
        for name in names {
            check_segment(name, &path)?;
        }
        let uri = format!("{SCHEME}{trust_domain}{path}").into();
        Ok(Self { uri, trust_domain: trust_domain.clone() })
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        //= SPIFFE-ID.md#23-maximum-spiffe-id-length
        //# SPIFFE implementations MUST support SPIFFE URIs up to 2048 bytes in length and SHOULD NOT generate URIs of length greater than 2048 bytes.
        if text.len() > MAX_SPIFFE_ID_BYTES {
            return Err(SpiffeIdError::TooLong { length: text.len() });
        }
        //= SPIFFE-ID.md#2-spiffe-identity
        //# Valid SPIFFE IDs MUST have the scheme set to `spiffe`, include a non-zero trust domain name, and MUST NOT include a query or fragment component.
        // Section 2.4 calls scheme and trust domain case-insensitive, while 2.1 demands a lower-case
        // trust domain: we take the one spelling only, as go-spiffe does.
        let rest = text
            .strip_prefix(SCHEME)
            .ok_or_else(|| SpiffeIdError::Scheme { id: text.to_owned() })?;
        // RFC 3986: the first "#" begins the fragment, even with a "?" behind it.
        if let Some(at) = rest.find(['?', '#']) {
            let (_, part) = rest.split_at(at);
            return Err(match part.starts_with('?') {
                true => SpiffeIdError::Query { query: part.to_owned() },
                false => SpiffeIdError::Fragment { fragment: part.to_owned() },
            });
        }
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let trust_domain = authority.parse()?;
        check_path(path)?;
        Ok(Self { uri: text.into(), trust_domain })
    }
}

impl PartialEq for SpiffeId {
    fn eq(&self, other: &Self) -> bool {
        self.uri == other.uri
    }
}

impl Eq for SpiffeId {}

impl PartialOrd for SpiffeId {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for SpiffeId {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.uri.cmp(&other.uri)
    }
}

impl Hash for SpiffeId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.uri.hash(state);
    }
}

impl TrustDomain {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Stands for our own where that is not known: `.invalid` is nobody's (RFC 2606).
    pub(crate) fn stand_in() -> Self {
        Self("mesh.invalid".into())
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeIdError;

    //= SPIFFE-ID.md#21-trust-domain
    //# Implementations MUST NOT process trust domain names differently whether or not they are valid IP addresses and/or valid DNS names.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        //= SPIFFE-ID.md#21-trust-domain
        //# The `userinfo` and `port` parts of the authority component MUST be empty.
        if let Some(at) = text.find('@') {
            return Err(SpiffeIdError::UserInfo { userinfo: text[..=at].to_owned() });
        }
        if let Some(at) = text.find(':') {
            return Err(SpiffeIdError::Port { port: text[at..].to_owned() });
        }
        //= SPIFFE-ID.md#21-trust-domain
        //# The `host` part of the authority MUST NOT be empty.
        if text.is_empty() {
            return Err(SpiffeIdError::TrustDomainEmpty);
        }
        if text.len() > MAX_TRUST_DOMAIN_BYTES {
            return Err(SpiffeIdError::TrustDomainTooLong { length: text.len() });
        }
        //= SPIFFE-ID.md#21-trust-domain
        //# The `host` part of the authority MUST NOT contain percent-encoded characters.
        if text.contains('%') {
            return Err(SpiffeIdError::PercentEncoded { part: text.to_owned() });
        }
        for character in text.chars() {
            match character {
                'a'..='z' | '0'..='9' | '.' | '_' | '-' => {}
                //= SPIFFE-ID.md#21-trust-domain
                //# The `host` part of the authority MUST be lowercase.
                'A'..='Z' => {
                    return Err(SpiffeIdError::TrustDomainUpperCase {
                        trust_domain: text.to_owned(),
                    });
                }
                //= SPIFFE-ID.md#21-trust-domain
                //# The `host` part of the authority MUST contain only letters, numbers, dots, dashes, and underscores ([a-z0-9.-_]).
                _ => {
                    let trust_domain = text.to_owned();
                    return Err(SpiffeIdError::TrustDomainCharacter { trust_domain, character });
                }
            }
        }
        Ok(Self(text.into()))
    }
}

impl ResourceName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// A DNS label for any text: the text itself if it is a short one, else what can be kept of it
    /// and a hash, so that two texts have two names.
    pub(crate) fn label_of(text: &str) -> Self {
        let is_kept = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '-');
        let is_label = (1..=MAX_LABEL_BYTES).contains(&text.len())
            && text.chars().all(is_kept)
            && !text.starts_with('-')
            && !text.ends_with('-');
        if is_label {
            return Self(text.into());
        }
        let digest = Sha256::new().chain_update(text).finalize();
        let hash: String =
            digest.as_slice().iter().take(4).map(|byte| format!("{byte:02x}")).collect();
        let kept = text.chars().map(|c| if is_kept(c) { c } else { '-' });
        // Room for the hash and the dash before it.
        let kept: String = kept.take(MAX_LABEL_BYTES - 9).collect();
        match kept.trim_matches('-') {
            "" => Self(hash.into()),
            kept => Self(format!("{kept}-{hash}").into()),
        }
    }

    /// The label with a number, for when somebody has it already.
    pub(crate) fn numbered(&self, number: usize) -> Self {
        Self(format!("{self}-{number}").into())
    }
}

impl FromStr for ResourceName {
    type Err = ResourceNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() {
            return Err(ResourceNameError::Empty);
        }
        if text.len() > MAX_RESOURCE_NAME_BYTES {
            return Err(ResourceNameError::TooLong { length: text.len() });
        }
        let unlawful = |c: &char| !matches!(c, 'a'..='z' | '0'..='9' | '-' | '.');
        if let Some(character) = text.chars().find(unlawful) {
            return Err(ResourceNameError::Character { name: text.to_owned(), character });
        }
        if text.starts_with(['-', '.']) || text.ends_with(['-', '.']) {
            return Err(ResourceNameError::Edge { name: text.to_owned() });
        }
        Ok(Self(text.into()))
    }
}

/// What every type has that is a text obeying rules.
macro_rules! checked_text {
    ($type:ident, $error:ident) => {
        impl TryFrom<&str> for $type {
            type Error = $error;

            fn try_from(text: &str) -> Result<Self, Self::Error> {
                text.parse()
            }
        }

        impl AsRef<str> for $type {
            fn as_ref(&self) -> &str {
                self.as_str()
            }
        }

        // Sound for maps: equality, order and hash are those of the text.
        impl Borrow<str> for $type {
            fn borrow(&self) -> &str {
                self.as_str()
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_tuple(stringify!($type)).field(&self.as_str()).finish()
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }
    };
}

checked_text!(SpiffeId, SpiffeIdError);
checked_text!(TrustDomain, SpiffeIdError);
checked_text!(ResourceName, ResourceNameError);

/// Checks a path with its leading `/`, or none at all.
fn check_path(path: &str) -> Result<(), SpiffeIdError> {
    //= SPIFFE-ID.md#22-path
    //# The path component MUST NOT include a trailing `/`.
    if path.ends_with('/') && !path.ends_with("//") {
        return Err(SpiffeIdError::TrailingSlash { path: path.to_owned() });
    }
    path.split('/').skip(1).try_for_each(|segment| check_segment(segment, path))
}

fn check_segment(segment: &str, path: &str) -> Result<(), SpiffeIdError> {
    //= SPIFFE-ID.md#22-path
    //# The path component MUST NOT include segments that are empty or are relative path modifiers (i.e. `.`, `..`)
    if segment.is_empty() {
        return Err(SpiffeIdError::EmptySegment { path: path.to_owned() });
    }
    if matches!(segment, "." | "..") {
        let (path, segment) = (path.to_owned(), segment.to_owned());
        return Err(SpiffeIdError::RelativeSegment { path, segment });
    }
    //= SPIFFE-ID.md#22-path
    //# The path component MUST NOT include percent-encoded characters.
    if segment.contains('%') {
        return Err(SpiffeIdError::PercentEncoded { part: segment.to_owned() });
    }
    //= SPIFFE-ID.md#22-path
    //# Individual path segments MUST contain only letters, numbers, dots, dashes, and underscores ([a-zA-Z0-9.-_]).
    let unlawful = |c: &char| !c.is_ascii_alphanumeric() && !matches!(c, '.' | '_' | '-');
    match segment.chars().find(unlawful) {
        Some(character) => {
            Err(SpiffeIdError::PathCharacter { segment: segment.to_owned(), character })
        }
        None => Ok(()),
    }
}

/// Writes five bytes as eight characters of RFC 4648 base32, in lower case.
fn push_base32(out: &mut String, five_bytes: &[u8]) {
    let bits = five_bytes.iter().fold(0_u64, |bits, byte| (bits << 8) | u64::from(*byte));
    for place in (0..8_u32).rev() {
        let five_bits = u8::try_from((bits >> (place * 5)) & 0x1f).unwrap_or_default();
        let letter = if five_bits < 26 { b'a' + five_bits } else { b'2' + (five_bits - 26) };
        out.push(char::from(letter));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stand_in_for_a_trust_domain_is_one() {
        let stand_in = TrustDomain::stand_in();
        assert_eq!(stand_in.as_str().parse(), Ok(stand_in.clone()));
    }
}
