//! The node's identity as the data folder has it: whole, or good at another time only.

use std::path::Path;

use anyhow::{Context, bail};
use hauberk_core::{
    identity::{SpiffeId, TrustDomain},
    svid::SvidError,
    time::Timestamp,
};
use hauberk_tls::{Credential, CredentialError, TrustBundle};
use rustls_pki_types::CertificateDer;

use super::Kept;

/// The node's identity, with whatever its certificate is worth now.
pub(super) struct Identity {
    pub(super) name: String,
    pub(super) id: SpiffeId,
    /// The control plane's host:port.
    pub(super) control_plane: String,
    /// [Nobody](TrustBundle::nobody) if no root is valid by the clock of this machine.
    pub(super) trust: TrustBundle,
    /// All roots that came with it, whatever the clock says.
    pub(super) roots: Vec<CertificateDer<'static>>,
    pub(super) credential: Dated,
}

/// A credential in its time, or out of it.
pub(super) enum Dated {
    /// Valid now.
    Current(Credential),
    /// Expired.
    Lapsed(Credential),
    /// Not valid before this.
    Early(Timestamp),
}

impl Identity {
    /// Reads it; none if there is no file.
    ///
    /// # Errors
    /// If the file cannot be read, or what it says does not fit together.
    pub(super) fn read(path: &Path) -> anyhow::Result<Option<Self>> {
        Kept::load(path)?.map(|kept| Self::of(&kept, path, hauberk_tls::now())).transpose()
    }

    /// What is kept, or about to be kept, as of `now`.
    ///
    /// # Errors
    /// If it does not fit together.
    pub(super) fn of(kept: &Kept, path: &Path, now: Timestamp) -> anyhow::Result<Self> {
        let trust_domain: TrustDomain = kept
            .trust_domain
            .parse()
            .with_context(|| format!("{}: trust domain {:?}", path.display(), kept.trust_domain))?;
        let roots = kept.bundle(path)?;
        let trust = TrustBundle::of_now(trust_domain.clone(), roots.clone(), now)
            .with_context(|| format!("the roots in {}", path.display()))?;
        let id = SpiffeId::node(&trust_domain, &kept.node)
            .with_context(|| format!("{}: node {:?}", path.display(), kept.node))?;
        let at = |time| -> anyhow::Result<_> {
            Ok(Credential::new(kept.chain(path)?, &kept.key(path)?, time))
        };
        let outcome = match at(now)? {
            Ok(credential) => Ok(Dated::Current(credential)),
            // Whatever else may be wrong with it shows at a time when it was valid.
            Err(CredentialError::Leaf(SvidError::Expired { not_after, .. })) => {
                at(not_after)?.map(Dated::Lapsed)
            }
            Err(CredentialError::Leaf(SvidError::NotYetValid { not_before, .. })) => {
                at(not_before)?.map(|_| Dated::Early(not_before))
            }
            Err(error) => Err(error),
        };
        let credential =
            outcome.with_context(|| format!("the node certificate in {}", path.display()))?;
        if let Dated::Current(credential) | Dated::Lapsed(credential) = &credential
            && *credential.facts().id() != id
        {
            bail!("{}: the certificate is not that of node {}", path.display(), kept.node);
        }
        Ok(Self {
            name: kept.node.clone(),
            id,
            control_plane: kept.control_plane.clone(),
            trust,
            roots,
            credential,
        })
    }
}
