//! Reading a certificate: to the last byte, each extension once, nothing critical passed over.
//!
//! x509-parser ignores bytes left over within a SEQUENCE or behind an extension's value, and reads
//! every extension it knows. Here only those are read that a decision depends on, and left-over
//! bytes are refused: what we read and what another parser reads must not differ.

use std::collections::BTreeSet;

use x509_parser::certificate::X509CertificateParser;
use x509_parser::der_parser::oid::Oid;
use x509_parser::error::X509Error;
use x509_parser::extensions::{
    BasicConstraints, ExtendedKeyUsage, GeneralName, KeyUsage, SubjectAlternativeName,
    X509Extension,
};
use x509_parser::nom::Parser;
use x509_parser::oid_registry::{
    OID_X509_EXT_BASIC_CONSTRAINTS, OID_X509_EXT_EXTENDED_KEY_USAGE, OID_X509_EXT_KEY_USAGE,
    OID_X509_EXT_NAME_CONSTRAINTS, OID_X509_EXT_SUBJECT_ALT_NAME,
};
use x509_parser::prelude::{FromDer, X509Certificate, X509Version};

use super::SvidError;
use crate::identity::SpiffeId;

/// The extensions that decide about a certificate. Those of no consequence (key identifiers,
/// distribution points) are not here.
#[derive(Debug, Default)]
pub(super) struct Read<'a> {
    pub(super) basic_constraints: Option<BasicConstraints>,
    pub(super) extended_key_usage: Option<ExtendedKeyUsage<'a>>,
    pub(super) names_critical: bool,
    key_usage: Option<CriticalOr<KeyUsage>>,
    uris: Vec<&'a str>,
}

#[derive(Debug)]
struct CriticalOr<T> {
    critical: bool,
    value: T,
}

/// Reads one certificate and nothing but one certificate.
pub(super) fn certificate(der: &[u8]) -> Result<X509Certificate<'_>, SvidError> {
    let malformed = SvidError::Malformed { part: "structure" };
    let mut parser = X509CertificateParser::new().with_deep_parse_extensions(false);
    let (rest, certificate) = parser.parse(der).map_err(|_| malformed.clone())?;
    if !rest.is_empty() {
        return Err(SvidError::TrailingBytes { count: rest.len() });
    }
    // The signature is the last field: it must end where the certificate ends.
    if certificate.signature_value.data.as_ptr_range().end != der.as_ptr_range().end {
        return Err(malformed);
    }
    match certificate.version() {
        X509Version::V3 => Ok(certificate),
        X509Version(encoded) => Err(SvidError::Version { version: encoded.saturating_add(1) }),
    }
}

impl<'a> Read<'a> {
    /// What matters of a leaf.
    pub(super) fn leaf(certificate: &X509Certificate<'a>) -> Result<Self, SvidError> {
        Self::extensions(certificate, |_| false)
    }

    /// What matters of a CA certificate. Name constraints may be critical there: they are not
    /// read here, but rustls-webpki applies them, those of a root included, to every name below. It
    /// cannot compare URIs, and so refuses whatever is issued under a constraint on them.
    pub(super) fn signing(certificate: &X509Certificate<'a>) -> Result<Self, SvidError> {
        //= X509-SVID.md#42-name-constraints
        //# Name constraints indicate a namespace within which all SPIFFE IDs in subsequent certificates in a certification path MUST be located.
        Self::extensions(certificate, |oid| *oid == OID_X509_EXT_NAME_CONSTRAINTS)
    }

    /// The key usage, which must be there and critical.
    pub(super) fn critical_key_usage(&self) -> Result<KeyUsage, SvidError> {
        //= X509-SVID.md#43-key-usage
        //# The key usage extension MUST be set on all SVIDs, and MUST be marked critical.
        match &self.key_usage {
            None => Err(SvidError::NoKeyUsage),
            Some(CriticalOr { critical: false, .. }) => Err(SvidError::KeyUsageNotCritical),
            Some(CriticalOr { critical: true, value }) => Ok(*value),
        }
    }

    /// The SPIFFE ID, if there is a URI name at all.
    pub(super) fn id(&self) -> Result<Option<SpiffeId>, SvidError> {
        //= X509-SVID.md#2-spiffe-id
        //# Validators encountering an SVID containing more than one URI SAN MUST reject the SVID.
        //= X509-SVID.md#52-leaf-validation
        //# SVIDs containing more than one URI SAN MUST be rejected.
        match self.uris.as_slice() {
            [] => Ok(None),
            [uri] => uri.parse().map(Some).map_err(SvidError::InvalidId),
            uris => Err(SvidError::SeveralUriNames { count: uris.len() }),
        }
    }

    fn extensions(
        certificate: &X509Certificate<'a>,
        evaluated_elsewhere: impl Fn(&Oid<'_>) -> bool,
    ) -> Result<Self, SvidError> {
        let mut read = Self::default();
        let mut seen = BTreeSet::new();
        for extension in certificate.extensions() {
            // RFC 5280, section 4.2: no extension twice, none critical that is not understood.
            if !seen.insert(extension.oid.as_bytes()) {
                return Err(SvidError::DuplicateExtension { oid: extension.oid.to_string() });
            }
            let understood = read.extension(extension)? || evaluated_elsewhere(&extension.oid);
            if extension.critical && !understood {
                return Err(SvidError::UnknownCriticalExtension { oid: extension.oid.to_string() });
            }
        }
        Ok(read)
    }

    /// Reads an extension if it decides anything, and says whether it does.
    fn extension(&mut self, extension: &X509Extension<'a>) -> Result<bool, SvidError> {
        let critical = extension.critical;
        if extension.oid == OID_X509_EXT_BASIC_CONSTRAINTS {
            self.basic_constraints = Some(whole(extension, "basic constraints")?);
        } else if extension.oid == OID_X509_EXT_KEY_USAGE {
            let value = whole(extension, "key usage")?;
            self.key_usage = Some(CriticalOr { critical, value });
        } else if extension.oid == OID_X509_EXT_EXTENDED_KEY_USAGE {
            self.extended_key_usage = Some(whole(extension, "extended key usage")?);
        } else if extension.oid == OID_X509_EXT_SUBJECT_ALT_NAME {
            self.names_critical = critical;
            self.uris = uris(&whole(extension, "subject alternative name")?)?;
        } else {
            return Ok(false);
        }
        Ok(true)
    }
}

//= X509-SVID.md#2-spiffe-id
//# An X.509 SVID MAY contain any number of other SAN field types, including DNS SANs.
fn uris<'a>(names: &SubjectAlternativeName<'a>) -> Result<Vec<&'a str>, SvidError> {
    let mut uris = Vec::new();
    for name in &names.general_names {
        match name {
            GeneralName::URI(uri) => uris.push(*uri),
            // It may be a URI that another parser would read.
            GeneralName::Invalid(..) => {
                return Err(SvidError::Malformed { part: "subject alternative name" });
            }
            GeneralName::OtherName(..)
            | GeneralName::RFC822Name(_)
            | GeneralName::DNSName(_)
            | GeneralName::X400Address(_)
            | GeneralName::DirectoryName(_)
            | GeneralName::EDIPartyName(_)
            | GeneralName::IPAddress(_)
            | GeneralName::RegisteredID(_) => {}
        }
    }
    Ok(uris)
}

fn whole<'a, T: FromDer<'a, X509Error>>(
    extension: &X509Extension<'a>,
    part: &'static str,
) -> Result<T, SvidError> {
    match T::from_der(extension.value) {
        Ok(([], value)) => Ok(value),
        Ok(_) | Err(_) => Err(SvidError::Malformed { part }),
    }
}
