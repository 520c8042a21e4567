//! The CA's own keys and certificates: made on first start, kept in the data folder, the
//! intermediate renewed at half of its life.
//!
//! This is the only place that holds a CA key.

use std::{
    collections::BTreeMap,
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
use time::OffsetDateTime;
use zeroize::Zeroizing;

use super::issuer::{self, Holder, Issued, Template};

/// How long the own root lives. Replacing it is a deliberate act.
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// How long the online intermediate lives: it caps the harm of a stolen CA key.
const INTERMEDIATE_LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);

const ROOT_KEY: &str = "root.key.der";
const ROOT_CERTIFICATE: &str = "root.crt.der";
const INTERMEDIATE_KEY: &str = "intermediate.key.der";
const INTERMEDIATE_CERTIFICATE: &str = "intermediate.crt.der";

/// The CA could not be loaded or used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CaError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("make or sign a certificate")]
    Sign(#[from] rcgen::Error),
    #[error("{0} is damaged or not a CA certificate; restore the folder from a backup")]
    Damaged(PathBuf, #[source] hauberk_core::svid::SvidError),
    #[error("{0} is damaged or not a private key; restore the folder from a backup")]
    DamagedKey(PathBuf, #[source] rcgen::Error),
    #[error("{0} is not the key of the certificate beside it; restore the folder from a backup")]
    OtherKey(PathBuf),
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
    #[error("remove {0}")]
    Remove(PathBuf, #[source] std::io::Error),
}

pub(crate) struct Authority {
    trust_domain: TrustDomain,
    folder: PathBuf,
    root: Root,
    intermediate: ArcSwap<Intermediate>,
}

struct Root {
    certificate: CertificateDer<'static>,
    not_after: Timestamp,
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
        let used = demand_private_files(folder)?;
        let path = folder.join(ROOT_CERTIFICATE);
        let certificate = match read_private(&path)? {
            Some(der) => CertificateDer::from(der),
            // A new root would cut off everybody who trusts the old one.
            None if used => return Err(CaError::Missing(path)),
            None => make_root(folder, trust_domain, now)?,
        };
        let facts = check_root(&certificate, now).map_err(|error| CaError::Damaged(path, error))?;
        if let Some(kept) = facts.trust_domain().filter(|kept| *kept != trust_domain) {
            return Err(CaError::OtherTrustDomain {
                folder: folder.display().to_string(),
                kept: kept.to_string(),
                wanted: trust_domain.to_string(),
            });
        }
        demand_key_of_root(folder, facts.public_key_sha256())?;
        let root = Root { certificate, not_after: facts.not_after() };
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
        &self.root.certificate
    }

    pub(crate) fn root_sha256(&self) -> [u8; 32] {
        sha256(&self.root.certificate)
    }

    /// When the root and the intermediate end.
    pub(crate) fn expiries(&self) -> (Timestamp, Timestamp) {
        (self.root.not_after, self.intermediate.load().not_after)
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
        self.sign(Holder::Identity(id), &key, lifetime, now)
    }

    /// The same for a server that callers outside of the mesh know by its name in DNS.
    pub(crate) fn issue_for_server(
        &self,
        name: &str,
        request: &[u8],
        lifetime: Duration,
        now: Timestamp,
    ) -> Result<Issued, CaError> {
        let key = issuer::requested_key(request)?;
        self.sign(Holder::Server(name), &key, lifetime, now)
    }

    fn sign(
        &self,
        holder: Holder<'_>,
        key: &impl PublicKeyData,
        lifetime: Duration,
        now: Timestamp,
    ) -> Result<Issued, CaError> {
        let intermediate = self.intermediate.load();
        let template = Template { holder, lifetime, now, at_most: intermediate.not_after };
        let (leaf, serial, not_after) = issuer::sign_leaf(&template, key, &intermediate.issuer)?;
        Ok(Issued { chain: vec![leaf, intermediate.certificate.clone()], serial, not_after })
    }
}

/// Whether the folder has any file of a CA. Refuses loose modes of all of them, whether they are
/// needed now or not: the root's key is read only when an intermediate is made, days from now.
fn demand_private_files(folder: &Path) -> Result<bool, CaError> {
    let mut any = false;
    for name in [ROOT_KEY, ROOT_CERTIFICATE, INTERMEDIATE_KEY, INTERMEDIATE_CERTIFICATE] {
        any |= read_private(&folder.join(name))?.map(Zeroizing::new).is_some();
    }
    Ok(any)
}

/// The root and its key, as files of the folder: what makes the CA what it is. Intermediates are made
/// from them.
pub(crate) fn root_files(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>, CaError> {
    [ROOT_KEY, ROOT_CERTIFICATE]
        .into_iter()
        .map(|name| {
            let path = folder.join(name);
            let bytes = read_private(&path)?.ok_or(CaError::Missing(path))?;
            Ok((name.to_owned(), bytes))
        })
        .collect()
}

/// Puts the root and its key into the folder. What was made from another root there goes.
pub(crate) fn keep_root(folder: &Path, files: &BTreeMap<String, Vec<u8>>) -> Result<(), CaError> {
    private_folder(folder)?;
    let mut news = false;
    for name in [ROOT_KEY, ROOT_CERTIFICATE] {
        let path = folder.join(name);
        let bytes = files.get(name).ok_or_else(|| CaError::Missing(path.clone()))?;
        if read_private(&path)?.as_ref() != Some(bytes) {
            write_private(&path, bytes)?;
            news = true;
        }
    }
    if news {
        for name in [INTERMEDIATE_KEY, INTERMEDIATE_CERTIFICATE] {
            match std::fs::remove_file(folder.join(name)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(CaError::Remove(folder.join(name), error));
                }
                Ok(()) | Err(_) => {}
            }
        }
    }
    Ok(())
}

fn make_root(
    folder: &Path,
    trust_domain: &TrustDomain,
    now: Timestamp,
) -> Result<CertificateDer<'static>, CaError> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384)?;
    let validity = issuer::validity(now, ROOT_LIFETIME, None)?;
    let parameters = ca_parameters(trust_domain, "Hauberk root", 1, validity)?;
    let certificate = parameters.self_signed(&key)?;
    // The key first: a certificate without its key would look like a damaged folder.
    write_private(&folder.join(ROOT_KEY), &Zeroizing::new(key.serialize_der()))?;
    write_private(&folder.join(ROOT_CERTIFICATE), certificate.der())?;
    tracing::info!(trust_domain = %trust_domain, "made the root of a new trust domain");
    Ok(certificate.der().clone())
}

fn make_intermediate(
    folder: &Path,
    trust_domain: &TrustDomain,
    root: &Root,
    now: Timestamp,
) -> Result<Intermediate, CaError> {
    let root_key_path = folder.join(ROOT_KEY);
    let root_key = read_private(&root_key_path)?
        .map(Zeroizing::new)
        .ok_or_else(|| CaError::Missing(root_key_path.clone()))?;
    let root_key = load_key(&root_key_path, &root_key)?;
    let root_issuer = Issuer::from_ca_cert_der(&root.certificate, root_key)?;
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let validity = issuer::validity(now, INTERMEDIATE_LIFETIME, Some(root.not_after))?;
    let parameters = ca_parameters(trust_domain, "Hauberk intermediate", 0, validity)?;
    let certificate = parameters.signed_by(&key, &root_issuer)?;
    write_private(&folder.join(INTERMEDIATE_KEY), &Zeroizing::new(key.serialize_der()))?;
    write_private(&folder.join(INTERMEDIATE_CERTIFICATE), certificate.der())?;
    intermediate(certificate.der().clone(), key, now, folder)
}

fn load_intermediate(folder: &Path, now: Timestamp) -> Result<Option<Intermediate>, CaError> {
    let certificate = read_private(&folder.join(INTERMEDIATE_CERTIFICATE))?;
    let key_path = folder.join(INTERMEDIATE_KEY);
    let key = read_private(&key_path)?.map(Zeroizing::new);
    let (Some(certificate), Some(key)) = (certificate, key) else { return Ok(None) };
    let certificate = CertificateDer::from(certificate);
    // An expired or half-written one is replaced: the root is here to make another.
    match load_key(&key_path, &key).and_then(|key| intermediate(certificate, key, now, folder)) {
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
        .map_err(|error| CaError::Damaged(folder.join(INTERMEDIATE_CERTIFICATE), error))?;
    if facts.public_key_sha256() != &sha256(&key.subject_public_key_info()) {
        return Err(CaError::OtherKey(folder.join(INTERMEDIATE_KEY)));
    }
    Ok(Intermediate {
        issuer: Issuer::from_ca_cert_der(&certificate, key)?,
        not_after: facts.not_after(),
        made_at: facts.not_before().saturating_add(issuer::BACKDATE),
        certificate,
    })
}

fn load_key(path: &Path, der: &[u8]) -> Result<KeyPair, CaError> {
    KeyPair::try_from(&PrivatePkcs8KeyDer::from(der))
        .map_err(|error| CaError::DamagedKey(path.to_owned(), error))
}

/// The root's key is needed only when an intermediate is due, in days: trouble with it is told now.
fn demand_key_of_root(folder: &Path, public_key_sha256: &[u8; 32]) -> Result<(), CaError> {
    let path = folder.join(ROOT_KEY);
    let Some(der) = read_private(&path)?.map(Zeroizing::new) else { return Ok(()) };
    let key = load_key(&path, &der)?;
    if public_key_sha256 == &sha256(&key.subject_public_key_info()) {
        return Ok(());
    }
    Err(CaError::OtherKey(path))
}

fn ca_parameters(
    trust_domain: &TrustDomain,
    name: &str,
    path_length: u8,
    (not_before, not_after): (OffsetDateTime, OffsetDateTime),
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
    (parameters.not_before, parameters.not_after) = (not_before, not_after);
    Ok(parameters)
}

#[cfg(test)]
mod tests;
