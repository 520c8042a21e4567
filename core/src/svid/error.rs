//! Why a certificate is refused, and which word of the closed set of reasons that is.

use super::MAX_PATH_LENGTH;
use crate::identity::{SpiffeId, SpiffeIdError, TrustDomain};
use crate::policy::Reason;
use crate::time::Timestamp;

/// Why a certificate is not what it is presented as. Each variant is one rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SvidError {
    /// Not the DER it ought to be.
    #[error("the certificate is malformed: its {part} is not valid DER")]
    Malformed {
        /// The part that could not be read.
        part: &'static str,
    },
    /// Bytes after the end of the certificate.
    #[error("{count} bytes follow the certificate: give one certificate and nothing else")]
    TrailingBytes {
        /// How many.
        count: usize,
    },
    /// Not version 3.
    #[error("the certificate has X.509 version {version}: only version 3 has extensions")]
    Version {
        /// The version as people write it, from 1.
        version: u32,
    },
    /// The serial number is longer than RFC 5280 allows.
    #[error("the serial number has {length} bytes: at most 20 are allowed")]
    SerialTooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// The serial number is zero or negative.
    #[error("the serial number is not positive")]
    SerialNotPositive,
    /// An extension is there twice.
    #[error("the extension {oid} is there more than once")]
    DuplicateExtension {
        /// Its object identifier.
        oid: String,
    },
    /// A critical extension that nothing here evaluates.
    #[error("the critical extension {oid} is not understood: issue without it")]
    UnknownCriticalExtension {
        /// Its object identifier.
        oid: String,
    },
    /// No URI among the subject alternative names.
    #[error(
        "the certificate has no URI among its subject alternative names: it names no SPIFFE ID"
    )]
    NoUriName,
    /// More than one URI among the subject alternative names.
    #[error(
        "the certificate has {count} URIs among its subject alternative names: exactly one is allowed"
    )]
    SeveralUriNames {
        /// How many.
        count: usize,
    },
    /// Neither a subject nor a critical subject alternative name.
    #[error("the subject is empty, so the subject alternative names must be marked critical")]
    NamesNotCritical,
    /// The URI is not a SPIFFE ID.
    #[error("the URI among the subject alternative names is not a SPIFFE ID")]
    InvalidId(#[source] SpiffeIdError),
    /// A leaf with the identity of a whole trust domain.
    #[error("{id} has no path: a leaf names one workload, not a trust domain")]
    NoPath {
        /// The identity.
        id: SpiffeId,
    },
    /// A signing certificate with the identity of something within a trust domain.
    #[error("{id} has a path: a signing certificate names only its trust domain")]
    SigningIdHasPath {
        /// The identity.
        id: SpiffeId,
    },
    /// No basic constraints.
    #[error("the basic constraints are missing: they must say whether this is a CA certificate")]
    NoBasicConstraints,
    /// A CA certificate where a leaf belongs.
    #[error("the certificate is that of a CA (cA is true): it authenticates nobody")]
    LeafIsCa,
    /// A leaf where a CA certificate belongs.
    #[error("the certificate is not that of a CA (cA is not true): it cannot issue others")]
    NotCa,
    /// A path length that cannot be meant.
    #[error(
        "the path length constraint {found} is too large: at most {MAX_PATH_LENGTH} is allowed"
    )]
    PathLength {
        /// The constraint.
        found: u32,
    },
    /// A CA certificate without a subject.
    #[error("the subject of the CA certificate is empty: what it issues could not name its issuer")]
    CaWithoutSubject,
    /// No key usage.
    #[error("the key usage is missing")]
    NoKeyUsage,
    /// The key usage is not marked critical.
    #[error("the key usage is not marked critical")]
    KeyUsageNotCritical,
    /// A key usage that must be there is not.
    #[error("the key usage lacks {usage}")]
    KeyUsageMissing {
        /// Its name in RFC 5280.
        usage: &'static str,
    },
    /// A key usage that a leaf must not have.
    #[error("the key usage has {usage}, which only a CA certificate may have")]
    KeyUsageForbidden {
        /// Its name in RFC 5280.
        usage: &'static str,
    },
    /// No extended key usage.
    #[error("the extended key usage is missing: it must have serverAuth and clientAuth")]
    NoExtendedKeyUsage,
    /// An extended key usage that must be there is not.
    #[error("the extended key usage lacks {purpose}: it must have serverAuth and clientAuth")]
    ExtendedKeyUsageMissing {
        /// Its name in RFC 5280.
        purpose: &'static str,
    },
    /// Its time ends before it begins.
    #[error(
        "the certificate is never valid: its notBefore {not_before} is after its notAfter {not_after}"
    )]
    EmptyValidity {
        /// The certificate's `notBefore`.
        not_before: Timestamp,
        /// The certificate's `notAfter`.
        not_after: Timestamp,
    },
    /// Its time has not begun.
    #[error(
        "the certificate is not valid before {not_before}, and it is {now}: compare the clocks"
    )]
    NotYetValid {
        /// The certificate's `notBefore`.
        not_before: Timestamp,
        /// The time of the check.
        now: Timestamp,
    },
    /// Its time is over.
    #[error("the certificate expired at {not_after}, and it is {now}")]
    Expired {
        /// The certificate's `notAfter`.
        not_after: Timestamp,
        /// The time of the check.
        now: Timestamp,
    },
    /// A leaf of another trust domain than the bundle that verified it.
    #[error("{id} is not in the trust domain {expected}, whose bundle the chain leads to")]
    WrongTrustDomain {
        /// The identity.
        id: SpiffeId,
        /// The trust domain of the bundle.
        expected: TrustDomain,
    },
}

impl SvidError {
    /// The reason under which a connection is refused for this.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::NotYetValid { .. } | Self::Expired { .. } => Reason::ExpiredCert,
            Self::WrongTrustDomain { .. } => Reason::UntrustedRoot,
            Self::Malformed { .. }
            | Self::TrailingBytes { .. }
            | Self::Version { .. }
            | Self::SerialTooLong { .. }
            | Self::SerialNotPositive
            | Self::DuplicateExtension { .. }
            | Self::UnknownCriticalExtension { .. }
            | Self::NoUriName
            | Self::SeveralUriNames { .. }
            | Self::NamesNotCritical
            | Self::InvalidId(_)
            | Self::NoPath { .. }
            | Self::SigningIdHasPath { .. }
            | Self::NoBasicConstraints
            | Self::LeafIsCa
            | Self::NotCa
            | Self::PathLength { .. }
            | Self::CaWithoutSubject
            | Self::NoKeyUsage
            | Self::KeyUsageNotCritical
            | Self::KeyUsageMissing { .. }
            | Self::KeyUsageForbidden { .. }
            | Self::NoExtendedKeyUsage
            | Self::ExtendedKeyUsageMissing { .. }
            | Self::EmptyValidity { .. } => Reason::BadSvid,
        }
    }
}
