//! What a leaf looks like: everything in it is decided here, whatever the request says.

use std::time::Duration;

use hauberk_core::{clock::NOT_BEFORE_BACKDATE, identity::SpiffeId, time::Timestamp};
use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DistinguishedName, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
    SubjectPublicKeyInfo,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};
use time::OffsetDateTime;
use x509_parser::{certification_request::X509CertificationRequest, prelude::FromDer};

use super::CaError;

/// A certificate request longer than this carries more than a key.
const MAX_REQUEST: usize = 8 * 1024;

/// What was issued.
pub(crate) struct Issued {
    /// Leaf first.
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) serial: String,
    pub(crate) not_after: Timestamp,
}

/// Whose certificate it is.
#[derive(Clone, Copy)]
pub(super) enum Holder<'a> {
    /// An identity of the mesh, which may be at either end of a connection.
    Identity(&'a SpiffeId),
    /// A server that callers outside of the mesh know by its name in DNS. In the mesh it is nobody.
    Server(&'a str),
}

/// What a leaf is to say.
pub(super) struct Template<'a> {
    pub(super) holder: Holder<'a>,
    pub(super) lifetime: Duration,
    pub(super) now: Timestamp,
    /// The issuer's own end.
    pub(super) at_most: Timestamp,
}

/// Takes the public key out of a request, whose signature proves that the caller has the private
/// one. rcgen reads the requested names, usages and CA flag too: they are dropped here.
pub(super) fn requested_key(request: &[u8]) -> Result<SubjectPublicKeyInfo, CaError> {
    let unreadable = || CaError::Request(rcgen::Error::CouldNotParseCertificationRequest);
    if request.len() > MAX_REQUEST {
        return Err(unreadable());
    }
    let der = CertificateSigningRequestDer::from(request);
    // For the signature only. rcgen takes the curve from the signature's hash, which is not always
    // the key's: OpenSSL signs with SHA-256 for a P-384 key, too.
    CertificateSigningRequestParams::from_der(&der).map_err(CaError::Request)?;
    let (_, parsed) = X509CertificationRequest::from_der(request).map_err(|_| unreadable())?;
    let key = SubjectPublicKeyInfo::from_der(parsed.certification_request_info.subject_pki.raw)
        .map_err(CaError::Request)?;
    let accepted =
        [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519];
    if accepted.contains(&key.algorithm()) { Ok(key) } else { Err(CaError::WeakKey) }
}

pub(super) fn sign_leaf(
    template: &Template<'_>,
    key: &impl PublicKeyData,
    issuer: &Issuer<'static, KeyPair>,
) -> Result<(CertificateDer<'static>, String, Timestamp), CaError> {
    let serial = random_serial()?;
    let hex = hex::encode(serial.to_bytes());
    let (name, usages) = match template.holder {
        Holder::Identity(id) => (
            SanType::URI(id.as_str().try_into()?),
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
        ),
        Holder::Server(name) => {
            (SanType::DnsName(name.try_into()?), vec![ExtendedKeyUsagePurpose::ServerAuth])
        }
    };
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = DistinguishedName::new();
    parameters.subject_alt_names = vec![name];
    parameters.is_ca = IsCa::ExplicitNoCa;
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    parameters.extended_key_usages = usages;
    parameters.serial_number = Some(serial);
    parameters.use_authority_key_identifier_extension = true;
    let (start, end) = validity(template.now, template.lifetime, Some(template.at_most))?;
    (parameters.not_before, parameters.not_after) = (start, end);
    let certificate = parameters.signed_by(key, issuer)?;
    let not_after = Timestamp::from_unix_millis(end.unix_timestamp().saturating_mul(1000));
    Ok((certificate.der().clone(), hex, not_after))
}

/// A random serial of 128 bits, positive.
pub(super) fn random_serial() -> Result<SerialNumber, CaError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|_| rcgen::Error::RingUnspecified)?;
    bytes[0] = (bytes[0] & 0x7f) | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

pub(super) fn validity(
    now: Timestamp,
    lifetime: Duration,
    at_most: Option<Timestamp>,
) -> Result<(OffsetDateTime, OffsetDateTime), CaError> {
    let date = |timestamp: Timestamp| {
        OffsetDateTime::from_unix_timestamp(timestamp.unix_millis().div_euclid(1000))
            .map_err(|_| CaError::Date)
    };
    let mut end = now.saturating_add(lifetime);
    if let Some(limit) = at_most {
        end = end.min(limit);
    }
    Ok((date(now.saturating_sub(NOT_BEFORE_BACKDATE))?, date(end)?))
}
