//! The CA that the control plane makes itself: a root and an intermediate, made on first start, kept in
//! a folder, the intermediate renewed at half of its life.

use std::{collections::BTreeMap, path::Path, time::Duration};

use hauberk_core::{
    clock::NOT_BEFORE_BACKDATE,
    identity::{SpiffeId, TrustDomain},
    svid::{check_intermediate, check_root},
    time::Timestamp,
};
use hauberk_tls::{
    files::{private_folder, read_private, write_private},
    sha256,
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;
use zeroize::Zeroizing;

use super::{
    authority::{CaError, Maker, Signer},
    issuer,
};

/// How long the own root lives. Replacing it is a deliberate act.
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// How long the online intermediate lives: it caps the harm of a stolen CA key.
const INTERMEDIATE_LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);

const ROOT_KEY: &str = "root.key.der";
const ROOT_CERTIFICATE: &str = "root.crt.der";
const INTERMEDIATE_KEY: &str = "intermediate.key.der";
const INTERMEDIATE_CERTIFICATE: &str = "intermediate.crt.der";

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

/// Loads the CA of the folder, or makes one if there is none at all.
pub(crate) fn open(
    folder: &Path,
    trust_domain: &TrustDomain,
    now: Timestamp,
) -> Result<Signer, CaError> {
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
    Ok(signer(folder, root, intermediate))
}

/// Whether the folder has a root.
pub(crate) fn exists(folder: &Path) -> bool {
    folder.join(ROOT_CERTIFICATE).exists()
}

/// A signer with a new intermediate under the same root.
pub(super) fn renew(
    folder: &Path,
    trust_domain: &TrustDomain,
    root: &CertificateDer<'static>,
    root_not_after: Timestamp,
    now: Timestamp,
) -> Result<Signer, CaError> {
    let root = Root { certificate: root.clone(), not_after: root_not_after };
    let intermediate = make_intermediate(folder, trust_domain, &root, now)?;
    Ok(signer(folder, root, intermediate))
}

/// A key and a certificate for an online intermediate under any CA, and when that ends: with the CA, at the
/// latest.
pub(super) fn intermediate_under(
    upper: &Issuer<'_, KeyPair>,
    trust_domain: &TrustDomain,
    at_most: Timestamp,
    now: Timestamp,
) -> Result<(KeyPair, CertificateDer<'static>, Timestamp), CaError> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let validity = issuer::validity(now, INTERMEDIATE_LIFETIME, Some(at_most))?;
    let parameters = ca_parameters(trust_domain, "Hauberk intermediate", 0, validity)?;
    let certificate = parameters.signed_by(&key, upper)?;
    let not_after = Timestamp::from_unix_seconds(validity.1.unix_timestamp());
    Ok((key, certificate.der().clone(), not_after))
}

fn signer(folder: &Path, root: Root, intermediate: Intermediate) -> Signer {
    Signer {
        maker: Maker::Own(folder.to_owned()),
        root: root.certificate,
        chain: vec![intermediate.certificate],
        issuer: intermediate.issuer,
        root_not_after: root.not_after,
        not_after: intermediate.not_after,
        made_at: intermediate.made_at,
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
    let (key, certificate, _) =
        intermediate_under(&root_issuer, trust_domain, root.not_after, now)?;
    write_private(&folder.join(INTERMEDIATE_KEY), &Zeroizing::new(key.serialize_der()))?;
    write_private(&folder.join(INTERMEDIATE_CERTIFICATE), &certificate)?;
    intermediate(certificate, key, now, folder)
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
        made_at: facts.not_before().saturating_add(NOT_BEFORE_BACKDATE),
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
