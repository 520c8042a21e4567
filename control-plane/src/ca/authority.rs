//! The CA's own keys and certificates: made on first start, kept in the data folder, the
//! intermediate renewed at half of its life.
//!
//! This is the only place that holds a CA key.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use hauberk_core::{
    identity::{SpiffeId, TrustDomain},
    svid::{check_intermediate, check_root},
    time::Timestamp,
};
use hauberk_tls::{
    files::{FileError, private_folder, read_private, write_private},
    sha256,
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use zeroize::Zeroizing;

use super::issuer::{self, Issued, Template};

/// How long the own root lives. Replacing it is a deliberate act.
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// How long the online intermediate lives: it caps the harm of a stolen CA key.
const INTERMEDIATE_LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);

/// The CA could not be loaded or used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CaError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("make or sign a certificate")]
    Sign(#[from] rcgen::Error),
    #[error("{0} is damaged or not a CA certificate; restore the folder from a backup")]
    Damaged(PathBuf, #[source] hauberk_core::svid::SvidError),
    #[error("{0} is missing beside the other files of the CA; restore the folder from a backup")]
    Missing(PathBuf),
    #[error(
        "the CA in {folder} is of trust domain {kept}, not {wanted}; use --trust-domain {kept}"
    )]
    OtherTrustDomain { folder: String, kept: String, wanted: String },
    #[error("the certificate request does not carry a usable public key")]
    Request(#[source] rcgen::Error),
    #[error("the request's key is of a kind that is not accepted; use P-256, P-384 or Ed25519")]
    WeakKey,
    #[error("a lifetime reaches past what a date can say")]
    Date,
}

pub(crate) struct Authority {
    trust_domain: TrustDomain,
    folder: PathBuf,
    root: CertificateDer<'static>,
    intermediate: ArcSwap<Intermediate>,
}

struct Intermediate {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
    not_after: Timestamp,
    made_at: Timestamp,
}

impl Authority {
    /// Loads the CA of the folder, or makes one if there is none at all.
    pub(crate) fn open(
        folder: &Path,
        trust_domain: &TrustDomain,
        now: Timestamp,
    ) -> Result<Self, CaError> {
        private_folder(folder)?;
        let root_path = folder.join("root.crt.der");
        let root = match read_private(&root_path)? {
            Some(der) => CertificateDer::from(der),
            None if folder.join("root.key.der").exists() => {
                return Err(CaError::Missing(root_path));
            }
            None => make_root(folder, trust_domain, now)?,
        };
        check_root(&root, now).map_err(|error| CaError::Damaged(root_path, error))?;
        let intermediate = match load_intermediate(folder, now)? {
            Some(intermediate) => intermediate,
            None => make_intermediate(folder, trust_domain, &root, now)?,
        };
        Ok(Self {
            trust_domain: trust_domain.clone(),
            folder: folder.to_owned(),
            root,
            intermediate: ArcSwap::from_pointee(intermediate),
        })
    }

    pub(crate) fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    pub(crate) fn root(&self) -> &CertificateDer<'static> {
        &self.root
    }

    pub(crate) fn root_sha256(&self) -> [u8; 32] {
        sha256(&self.root)
    }

    /// When the root and the intermediate end.
    pub(crate) fn expiries(&self) -> (Timestamp, Timestamp) {
        let root = check_root(&self.root, Timestamp::from_unix_millis(0))
            .map_or(self.intermediate.load().not_after, |facts| facts.not_after());
        (root, self.intermediate.load().not_after)
    }

    /// Makes the next intermediate if the present one is past half of its life. Leaves of the old
    /// one stay good: they carry it along.
    pub(crate) fn renew_intermediate(&self, now: Timestamp) -> Result<bool, CaError> {
        let present = self.intermediate.load();
        let life = present.not_after.since(present.made_at);
        if now < present.made_at.saturating_add(life / 2) {
            return Ok(false);
        }
        let next = make_intermediate(&self.folder, &self.trust_domain, &self.root, now)?;
        self.intermediate.store(Arc::new(next));
        Ok(true)
    }

    /// Issues a leaf for the public key of a request. Nothing else of the request is used.
    pub(crate) fn issue(
        &self,
        id: &SpiffeId,
        request: &[u8],
        lifetime: Duration,
        now: Timestamp,
    ) -> Result<Issued, CaError> {
        let key = issuer::requested_key(request)?;
        self.sign(id, &key, lifetime, now)
    }

    fn sign(
        &self,
        id: &SpiffeId,
        key: &impl PublicKeyData,
        lifetime: Duration,
        now: Timestamp,
    ) -> Result<Issued, CaError> {
        let intermediate = self.intermediate.load();
        let template = Template { id, lifetime, now, at_most: intermediate.not_after };
        let (leaf, serial, not_after) = issuer::sign_leaf(&template, key, &intermediate.issuer)?;
        Ok(Issued { chain: vec![leaf, intermediate.certificate.clone()], serial, not_after })
    }
}

fn make_root(
    folder: &Path,
    trust_domain: &TrustDomain,
    now: Timestamp,
) -> Result<CertificateDer<'static>, CaError> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384)?;
    let parameters = ca_parameters(trust_domain, "Hauberk root", 1, ROOT_LIFETIME, now)?;
    let certificate = parameters.self_signed(&key)?;
    // The key first: a certificate without its key would look like a damaged folder.
    write_private(&folder.join("root.key.der"), &Zeroizing::new(key.serialize_der()))?;
    write_private(&folder.join("root.crt.der"), certificate.der())?;
    tracing::info!(trust_domain = %trust_domain, "made the root of a new trust domain");
    Ok(certificate.der().clone())
}

fn make_intermediate(
    folder: &Path,
    trust_domain: &TrustDomain,
    root: &CertificateDer<'static>,
    now: Timestamp,
) -> Result<Intermediate, CaError> {
    let root_key_path = folder.join("root.key.der");
    let root_key =
        read_private(&root_key_path)?.map(Zeroizing::new).ok_or(CaError::Missing(root_key_path))?;
    let root_issuer = Issuer::from_ca_cert_der(root, load_key(&root_key)?)?;
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let parameters =
        ca_parameters(trust_domain, "Hauberk intermediate", 0, INTERMEDIATE_LIFETIME, now)?;
    let certificate = parameters.signed_by(&key, &root_issuer)?;
    write_private(&folder.join("intermediate.key.der"), &Zeroizing::new(key.serialize_der()))?;
    write_private(&folder.join("intermediate.crt.der"), certificate.der())?;
    intermediate(certificate.der().clone(), key, now, folder)
}

fn load_intermediate(folder: &Path, now: Timestamp) -> Result<Option<Intermediate>, CaError> {
    let certificate = read_private(&folder.join("intermediate.crt.der"))?;
    let key = read_private(&folder.join("intermediate.key.der"))?.map(Zeroizing::new);
    let (Some(certificate), Some(key)) = (certificate, key) else { return Ok(None) };
    let certificate = CertificateDer::from(certificate);
    // An expired or half-written one is replaced: the root is here to make another.
    match intermediate(certificate, load_key(&key)?, now, folder) {
        Ok(loaded) => Ok(Some(loaded)),
        Err(error) => {
            tracing::warn!(%error, "the intermediate is not usable and is made anew");
            Ok(None)
        }
    }
}

fn intermediate(
    certificate: CertificateDer<'static>,
    key: KeyPair,
    now: Timestamp,
    folder: &Path,
) -> Result<Intermediate, CaError> {
    let facts = check_intermediate(&certificate, now)
        .map_err(|error| CaError::Damaged(folder.join("intermediate.crt.der"), error))?;
    if facts.public_key_sha256() != &sha256(&key.subject_public_key_info()) {
        return Err(CaError::Missing(folder.join("intermediate.key.der")));
    }
    Ok(Intermediate {
        issuer: Issuer::from_ca_cert_der(&certificate, key)?,
        not_after: facts.not_after(),
        made_at: facts.not_before().saturating_add(issuer::BACKDATE),
        certificate,
    })
}

fn load_key(der: &[u8]) -> Result<KeyPair, CaError> {
    Ok(KeyPair::try_from(&PrivatePkcs8KeyDer::from(der))?)
}

fn ca_parameters(
    trust_domain: &TrustDomain,
    name: &str,
    path_length: u8,
    lifetime: Duration,
    now: Timestamp,
) -> Result<CertificateParams, CaError> {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = DistinguishedName::new();
    parameters.distinguished_name.push(DnType::OrganizationName, trust_domain.to_string());
    parameters.distinguished_name.push(DnType::CommonName, name);
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_length));
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    parameters.subject_alt_names =
        vec![SanType::URI(SpiffeId::of_trust_domain(trust_domain).as_str().try_into()?)];
    parameters.serial_number = Some(issuer::random_serial()?);
    parameters.use_authority_key_identifier_extension = true;
    (parameters.not_before, parameters.not_after) = issuer::validity(now, lifetime, None)?;
    Ok(parameters)
}
