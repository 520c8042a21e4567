//! An intermediate as another replica goes on with it, for the time in which a new root is not known to every
//! agent yet: a replica that starts then has nothing else to issue with.

use std::fmt;

use base64::{Engine, engine::general_purpose::STANDARD};
use hauberk_core::{
    identity::TrustDomain,
    svid::{check_intermediate, check_root},
    time::Timestamp,
};
use rcgen::{Issuer, KeyPair};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::authority::{CaError, Maker, Signer};

/// The certificates up to the root, without it, and the key of the first.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Handover {
    /// DER, base64.
    chain: Vec<String>,
    /// PKCS#8, base64.
    key: String,
}

impl fmt::Debug for Handover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Handover(redacted)")
    }
}

impl Handover {
    pub(super) fn of(chain: &[CertificateDer<'_>], key: &KeyPair) -> Self {
        let chain = chain.iter().map(|certificate| STANDARD.encode(certificate)).collect();
        Self { chain, key: STANDARD.encode(key.serialized_der()) }
    }

    /// What issues under the root that it was handed over for.
    pub(crate) fn signer(
        &self,
        root: &CertificateDer<'static>,
        trust_domain: &TrustDomain,
        now: Timestamp,
    ) -> Result<Signer, CaError> {
        let root_not_after = check_root(root, now).map_err(CaError::Handed)?.not_after();
        let mut not_after = root_not_after;
        let mut chain = Vec::new();
        for text in &self.chain {
            let certificate = CertificateDer::from(decoded(text)?);
            let facts = check_intermediate(&certificate, now).map_err(CaError::Handed)?;
            not_after = not_after.min(facts.not_after());
            chain.push(certificate);
        }
        let key = Zeroizing::new(decoded(&self.key)?);
        let key = KeyPair::try_from(&PrivatePkcs8KeyDer::from(key.as_slice()))?;
        let issuer = Issuer::from_ca_cert_der(chain.first().ok_or(CaError::Handover)?, key)?;
        let root = root.clone();
        let made_at = now;
        let maker = Maker::Handed;
        let signer = Signer { maker, root, chain, issuer, root_not_after, not_after, made_at };
        signer.try_out(trust_domain, now)?;
        Ok(signer)
    }
}

fn decoded(text: &str) -> Result<Vec<u8>, CaError> {
    STANDARD.decode(text).map_err(|_| CaError::Handover)
}
