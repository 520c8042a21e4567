//! X.509-SVIDs: what a certificate says, and whether it may say so.
//!
//! This module decides everything about a certificate that rustls-webpki does not look at: key
//! usage, the one URI name, the path, the trust domain. It does **not** verify signatures or
//! chains, and it applies no name constraints: hauberk-tls has rustls-webpki do that, and vouches
//! for it with [`ChainVerified`], the only way to a [`VerifiedSvid`]. What is not understood whole
//! is refused whole.

use sha2::{Digest, Sha256};
use x509_parser::prelude::X509Certificate;

pub use self::error::SvidError;
use self::read::Read;
pub use self::serial::{MAX_SERIAL_BYTES, Serial, SerialError};
use crate::identity::{SpiffeId, TrustDomain};
use crate::time::Timestamp;

mod error;
mod read;
mod serial;

/// The largest path length constraint: more than one byte is beyond rustls-webpki, which would
/// refuse every chain without saying why.
pub const MAX_PATH_LENGTH: u32 = 255;

/// What a leaf certificate says that has passed [`check_leaf`]. Whether anybody trustworthy has
/// signed it is another question: see [`VerifiedSvid`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeafFacts {
    id: SpiffeId,
    serial: Serial,
    not_before: Timestamp,
    not_after: Timestamp,
    public_key_sha256: [u8; 32],
}

/// What a CA certificate says that has passed [`check_intermediate`] or [`check_root`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SigningFacts {
    trust_domain: Option<TrustDomain>,
    serial: Serial,
    not_before: Timestamp,
    not_after: Timestamp,
    path_length: Option<u32>,
    public_key_sha256: [u8; 32],
}

/// The word of hauberk-tls that rustls-webpki has verified a chain: every signature, from the
/// leaf up to a root in the bundle of one trust domain.
//= X509-SVID.md#51-path-validation
//# The validation of trust in a given SVID is based on standard X.509 path validation, and MUST follow [RFC 5280][1] path validation semantics.
#[derive(Debug)]
pub struct ChainVerified(());

/// The facts of a leaf whose chain leads to the bundle of its own trust domain: an authenticated
/// identity. Whoever holds one need check nothing again but time and revocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedSvid {
    facts: LeafFacts,
}

/// Checks that the DER is one X.509-SVID leaf, valid at `now`, and reads what it says.
///
/// # Errors
/// The first rule that does not hold. The validity is judged last: an expired certificate that is
/// wrong in other ways is reported as wrong.
pub fn check_leaf(der: &[u8], now: Timestamp) -> Result<LeafFacts, SvidError> {
    let certificate = read::certificate(der)?;
    let read = Read::leaf(&certificate)?;
    let serial = serial_of(&certificate)?;
    check_leaf_constraints(&read)?;
    check_leaf_usages(&read)?;
    let id = leaf_id(&certificate, &read)?;
    let (not_before, not_after) = check_validity(&certificate, now)?;
    let public_key_sha256 = public_key_sha256(&certificate);
    Ok(LeafFacts { id, serial, not_before, not_after, public_key_sha256 })
}

/// Checks that the DER is one intermediate CA certificate, valid at `now`, that may issue SVIDs.
///
/// # Errors
/// The first rule that does not hold.
pub fn check_intermediate(der: &[u8], now: Timestamp) -> Result<SigningFacts, SvidError> {
    let certificate = read::certificate(der)?;
    let read = Read::signing(&certificate)?;
    // The standard leaves this open. rustls-webpki applies the usages of an intermediate to all
    // it issues, and every leaf is both client and server: say so here rather than in a handshake.
    if let Some(usages) = &read.extended_key_usage {
        check_both_purposes(usages.server_auth, usages.client_auth)?;
    }
    signing_facts(&certificate, &read, now)
}

/// Checks that the DER is one CA certificate, valid at `now`, fit for a trust bundle.
///
/// It need not be self-signed: an organisation may anchor its trust in an intermediate. Its
/// extended key usage is not looked at: path validation starts below a trust anchor.
///
/// # Errors
/// The first rule that does not hold.
pub fn check_root(der: &[u8], now: Timestamp) -> Result<SigningFacts, SvidError> {
    let certificate = read::certificate(der)?;
    let read = Read::signing(&certificate)?;
    signing_facts(&certificate, &read, now)
}

impl ChainVerified {
    /// Vouches that the chain of the leaf that this token is used for has been verified, up to a
    /// root of the trust domain that it is used with.
    ///
    /// **Only hauberk-tls's certificate verifier may call this**, right after rustls-webpki has
    /// accepted the path; an architecture test searches for other callers.
    #[must_use]
    pub fn assert_signature_path_checked() -> Self {
        Self(())
    }
}

impl VerifiedSvid {
    /// The authenticated identity of a leaf whose chain leads to the bundle of
    /// `expected_trust_domain`.
    ///
    /// # Errors
    /// When [`check_leaf`] refuses it, or it is of another trust domain than the bundle.
    pub fn from_verified_chain(
        proof: ChainVerified,
        leaf_der: &[u8],
        expected_trust_domain: &TrustDomain,
        now: Timestamp,
    ) -> Result<Self, SvidError> {
        // Spent: one verification vouches for one leaf.
        let ChainVerified(()) = proof;
        let facts = check_leaf(leaf_der, now)?;
        //= X509-SVID.md#52-leaf-validation
        //# Namely, we must ensure that 1) the certificate is a leaf certificate, and 2) that the signing authority was authorized to issue it.
        if facts.id.trust_domain() != expected_trust_domain {
            let (id, expected) = (facts.id, expected_trust_domain.clone());
            return Err(SvidError::WrongTrustDomain { id, expected });
        }
        Ok(Self { facts })
    }

    /// The authenticated identity.
    pub fn id(&self) -> &SpiffeId {
        self.facts.id()
    }

    /// All that the leaf says.
    pub fn facts(&self) -> &LeafFacts {
        &self.facts
    }
}

impl LeafFacts {
    /// The identity.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The serial number.
    pub fn serial(&self) -> Serial {
        self.serial
    }

    /// The first instant of its validity.
    pub fn not_before(&self) -> Timestamp {
        self.not_before
    }

    /// The last instant of its validity.
    pub fn not_after(&self) -> Timestamp {
        self.not_after
    }

    /// SHA-256 of the DER of the subject public key info: the key id of revocations.
    pub fn public_key_sha256(&self) -> &[u8; 32] {
        &self.public_key_sha256
    }
}

impl SigningFacts {
    /// The trust domain it names, if it is itself an SVID.
    pub fn trust_domain(&self) -> Option<&TrustDomain> {
        self.trust_domain.as_ref()
    }

    /// The serial number.
    pub fn serial(&self) -> Serial {
        self.serial
    }

    /// The first instant of its validity.
    pub fn not_before(&self) -> Timestamp {
        self.not_before
    }

    /// The last instant of its validity.
    pub fn not_after(&self) -> Timestamp {
        self.not_after
    }

    /// How many CA certificates may follow between it and a leaf; without a limit, `None`.
    pub fn path_length(&self) -> Option<u32> {
        self.path_length
    }

    /// SHA-256 of the DER of the subject public key info.
    pub fn public_key_sha256(&self) -> &[u8; 32] {
        &self.public_key_sha256
    }
}

fn check_leaf_constraints(read: &Read) -> Result<(), SvidError> {
    //= X509-SVID.md#41-basic-constraints
    //# Signing certificates MUST set the `cA` field to `true`, and leaf certificates MUST set the `cA` field to `false`.
    let constraints = read.basic_constraints.as_ref().ok_or(SvidError::NoBasicConstraints)?;
    //= X509-SVID.md#52-leaf-validation
    //# When validating an X.509 SVID for authentication purposes, the validator MUST ensure that the `cA` field in the basic constraints extension is set to `false`, and that `keyCertSign` and `cRLSign` are not set in the key usage extension.
    //= X509-SVID.md#32-signing-certificates
    //# Signing certificates MUST NOT be used for authentication purposes.
    if constraints.ca {
        return Err(SvidError::LeafIsCa);
    }
    Ok(())
}

fn check_leaf_usages(read: &Read) -> Result<(), SvidError> {
    let usage = read.critical_key_usage()?;
    //= X509-SVID.md#43-key-usage
    //# Leaf SVIDs MUST NOT set `keyCertSign` or `cRLSign`.
    if usage.key_cert_sign() {
        return Err(SvidError::KeyUsageForbidden { usage: "keyCertSign" });
    }
    if usage.crl_sign() {
        return Err(SvidError::KeyUsageForbidden { usage: "cRLSign" });
    }
    //= X509-SVID.md#43-key-usage
    //# Leaf SVIDs MUST set `digitalSignature`.
    if !usage.digital_signature() {
        return Err(SvidError::KeyUsageMissing { usage: "digitalSignature" });
    }
    // Stricter than the standard, under which the extension may be left out.
    let purposes = read.extended_key_usage.as_ref().ok_or(SvidError::NoExtendedKeyUsage)?;
    check_both_purposes(purposes.server_auth, purposes.client_auth)
}

fn check_both_purposes(server_auth: bool, client_auth: bool) -> Result<(), SvidError> {
    //= X509-SVID.md#44-extended-key-usage
    //# When included, fields `id-kp-serverAuth` and `id-kp-clientAuth` MUST be set.
    match (server_auth, client_auth) {
        (false, _) => Err(SvidError::ExtendedKeyUsageMissing { purpose: "serverAuth" }),
        (true, false) => Err(SvidError::ExtendedKeyUsageMissing { purpose: "clientAuth" }),
        (true, true) => Ok(()),
    }
}

fn leaf_id(certificate: &X509Certificate<'_>, read: &Read) -> Result<SpiffeId, SvidError> {
    //= X509-SVID.md#2-spiffe-id
    //# An X.509 SVID MUST contain exactly one URI SAN, and by extension, exactly one SPIFFE ID.
    let id = read.id()?.ok_or(SvidError::NoUriName)?;
    //= X509-SVID.md#52-leaf-validation
    //# The validator MUST also ensure that the scheme of the SPIFFE ID is set to `spiffe`, and MUST ensure that the SPIFFE ID has a non-root path component.
    //= X509-SVID.md#31-leaf-certificates
    //# Leaf certificate SPIFFE IDs MUST have a non-root path component.
    if id.path().is_empty() {
        return Err(SvidError::NoPath { id });
    }
    //= X509-SVID.md#31-leaf-certificates
    //# The Subject field is not required, however the URI SAN extension MUST be marked as critical if Subject is omitted, per section 4.1.2.6 of [RFC 5280][1].
    if is_subject_empty(certificate) && !read.names_critical {
        return Err(SvidError::NamesNotCritical);
    }
    Ok(id)
}

fn signing_facts(
    certificate: &X509Certificate<'_>,
    read: &Read,
    now: Timestamp,
) -> Result<SigningFacts, SvidError> {
    let serial = serial_of(certificate)?;
    let constraints = read.basic_constraints.as_ref().ok_or(SvidError::NoBasicConstraints)?;
    //= X509-SVID.md#41-basic-constraints
    //# Signing certificates MUST set the `cA` field to `true`, and leaf certificates MUST set the `cA` field to `false`.
    if !constraints.ca {
        return Err(SvidError::NotCa);
    }
    if let Some(found) = constraints.path_len_constraint.filter(|length| *length > MAX_PATH_LENGTH)
    {
        return Err(SvidError::PathLength { found });
    }
    //= X509-SVID.md#43-key-usage
    //# SVID signing certificates MUST set `keyCertSign`.
    if !read.critical_key_usage()?.key_cert_sign() {
        return Err(SvidError::KeyUsageMissing { usage: "keyCertSign" });
    }
    // RFC 5280, section 4.1.2.6. Chains are built by this name.
    if is_subject_empty(certificate) {
        return Err(SvidError::CaWithoutSubject);
    }
    //= X509-SVID.md#32-signing-certificates
    //# If present, the SPIFFE ID of a signing certificate MUST NOT have a path component, and SHOULD reside in the trust domain of any leaf SVIDs it issues.
    let id = read.id()?;
    if let Some(id) = id.as_ref().filter(|id| !id.path().is_empty()) {
        return Err(SvidError::SigningIdHasPath { id: id.clone() });
    }
    let (not_before, not_after) = check_validity(certificate, now)?;
    Ok(SigningFacts {
        trust_domain: id.map(|id| id.trust_domain().clone()),
        serial,
        not_before,
        not_after,
        path_length: constraints.path_len_constraint,
        public_key_sha256: public_key_sha256(certificate),
    })
}

/// RFC 5280, section 4.1.2.5: valid from `notBefore` through `notAfter`, both included. Nothing is allowed for clocks
/// that are off: the issuer dates `notBefore` back ([`NOT_BEFORE_BACKDATE`](crate::clock::NOT_BEFORE_BACKDATE)), and an
/// expired certificate is expired.
fn check_validity(
    certificate: &X509Certificate<'_>,
    now: Timestamp,
) -> Result<(Timestamp, Timestamp), SvidError> {
    let not_before = Timestamp::from_unix_seconds(certificate.validity().not_before.timestamp());
    let not_after = Timestamp::from_unix_seconds(certificate.validity().not_after.timestamp());
    if not_before > not_after {
        return Err(SvidError::EmptyValidity { not_before, not_after });
    }
    if now < not_before {
        return Err(SvidError::NotYetValid { not_before, now });
    }
    if now > not_after {
        return Err(SvidError::Expired { not_after, now });
    }
    Ok((not_before, not_after))
}

/// RFC 5280, section 4.1.2.2: positive, and at most 20 bytes as encoded.
fn serial_of(certificate: &X509Certificate<'_>) -> Result<Serial, SvidError> {
    let bytes = certificate.raw_serial();
    if bytes.len() > MAX_SERIAL_BYTES {
        return Err(SvidError::SerialTooLong { length: bytes.len() });
    }
    if bytes.first().is_none_or(|first| *first >= 0x80) {
        return Err(SvidError::SerialNotPositive);
    }
    Serial::from_be_bytes(bytes)
}

fn is_subject_empty(certificate: &X509Certificate<'_>) -> bool {
    certificate.subject().iter_rdn().next().is_none()
}

fn public_key_sha256(certificate: &X509Certificate<'_>) -> [u8; 32] {
    Sha256::digest(certificate.public_key().raw).into()
}
