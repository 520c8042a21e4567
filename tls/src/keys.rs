//! Private keys and certificate signing requests.

use std::fmt;

use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use zeroize::Zeroizing;

/// A private key, PKCS#8 DER. Wiped when dropped, never shown.
pub struct PrivateKey(Zeroizing<Vec<u8>>);

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(redacted)")
    }
}

impl PrivateKey {
    /// Takes PKCS#8 DER; whether it is a usable key shows when it is used.
    #[must_use]
    pub fn from_pkcs8(der: Vec<u8>) -> Self {
        Self(Zeroizing::new(der))
    }

    /// The PKCS#8 DER, to be stored.
    #[must_use]
    pub fn pkcs8(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn der(&self) -> PrivateKeyDer<'_> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.0.as_slice()))
    }
}

/// A key or request that could not be made.
#[derive(Debug, thiserror::Error)]
#[error("make a key and signing request")]
pub struct KeyError(#[from] rcgen::Error);

/// A fresh P-256 key, and a PKCS#10 request (DER) that carries its public key and nothing else:
/// what the certificate says is the authority's business.
///
/// # Errors
/// If the crypto library fails.
pub fn signing_request() -> Result<(PrivateKey, Vec<u8>), KeyError> {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut parameters = rcgen::CertificateParams::default();
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    let request = parameters.serialize_request(&key)?;
    Ok((PrivateKey::from_pkcs8(key.serialize_der()), request.der().to_vec()))
}
