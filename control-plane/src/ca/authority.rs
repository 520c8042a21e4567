//! What issues certificates now, and which roots those who verify them are told to trust.
//!
//! A signer is never changed: the next one takes its place. Whether one may, the custody of the CA decides.

use std::{path::PathBuf, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use hauberk_core::{
    identity::{SpiffeId, TrustDomain},
    svid::SvidError,
    time::Timestamp,
};
use hauberk_tls::{TrustBundle, TrustError, VerifyError, files::FileError, sha256, verify_chain};
use rcgen::{Issuer, KeyPair, PublicKeyData};
use rustls_pki_types::CertificateDer;

use super::{
    brought::Brought,
    handover::Handover,
    issuer::{self, Holder, Issued, Template},
    own,
};

/// How long the leaf would live that a signer is tried out with. Nobody gets it.
const TRIAL_LIFETIME: Duration = Duration::from_secs(60);

/// The CA could not be loaded or used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CaError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("make or sign a certificate")]
    Sign(#[from] rcgen::Error),
    #[error("{0} is damaged or not a CA certificate; restore the folder from a backup")]
    Damaged(PathBuf, #[source] SvidError),
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
    #[error("the CA's certificates ended at {0}; nothing is issued until it has others")]
    Ended(Timestamp),
    #[error("the root cannot be trusted")]
    Root(#[from] TrustError),
    #[error("peers would refuse what this CA issues")]
    Trial(#[source] VerifyError),
    #[error("what another replica handed over is damaged")]
    Handover,
    #[error("a certificate that another replica handed over is not good")]
    Handed(#[source] SvidError),
}

/// Issues leaves under one root.
pub(crate) struct Signer {
    pub(super) maker: Maker,
    pub(super) root: CertificateDer<'static>,
    /// Who issues the leaves first, then who issued that one, up to the root and without it: empty if the
    /// root itself issues them.
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) issuer: Issuer<'static, KeyPair>,
    pub(super) root_not_after: Timestamp,
    /// The first end of all of them.
    pub(super) not_after: Timestamp,
    pub(super) made_at: Timestamp,
}

/// What the next signer is made from.
pub(super) enum Maker {
    /// The folder of the own root.
    Own(PathBuf),
    /// A CA that somebody brought.
    Brought(Arc<Brought>),
    /// Nothing: another replica handed it over, for the time until a new CA may issue.
    Handed,
}

impl Signer {
    pub(crate) fn root(&self) -> &CertificateDer<'static> {
        &self.root
    }

    /// When it can issue no more.
    pub(crate) fn not_after(&self) -> Timestamp {
        self.not_after
    }

    /// Whether it can issue.
    pub(crate) fn is_good(&self, now: Timestamp) -> bool {
        now < self.not_after
    }

    /// What ends above the intermediate, as in the metric, and when. Nothing for one that is handed over: it
    /// is here for a while only, and whose it is knows more.
    pub(crate) fn upper_end(&self) -> Option<(&'static str, Timestamp)> {
        match &self.maker {
            Maker::Own(_) => Some(("root", self.root_not_after)),
            // Whoever brings a CA renews it, and its root: how early, is up to them.
            Maker::Brought(brought) => Some(("brought", brought.not_after())),
            Maker::Handed => None,
        }
    }

    /// It, for other replicas to go on with. Never the key of a CA that somebody brought: that is kept
    /// where its owner keeps it.
    pub(crate) fn hand_over(&self) -> Option<Handover> {
        let own_intermediate = match &self.maker {
            Maker::Own(_) | Maker::Handed => true,
            Maker::Brought(brought) => !brought.issues_leaves(),
        };
        own_intermediate.then(|| Handover::of(&self.chain, self.issuer.key()))
    }

    /// Issues a leaf that nobody gets, and verifies it as a peer would: what nobody would accept shows before
    /// anything is issued.
    pub(super) fn try_out(
        &self,
        trust_domain: &TrustDomain,
        now: Timestamp,
    ) -> Result<(), CaError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let id = SpiffeId::control_plane(trust_domain);
        let (leaf, _, _) = self.leaf(Holder::Identity(&id), &key, TRIAL_LIFETIME, now)?;
        let bundle = TrustBundle::new(trust_domain.clone(), vec![self.root.clone()], now)?;
        for is_server in [true, false] {
            verify_chain(&leaf, &self.chain, &bundle, is_server, now).map_err(CaError::Trial)?;
        }
        Ok(())
    }

    fn sign(
        &self,
        holder: Holder<'_>,
        key: &impl PublicKeyData,
        lifetime: Duration,
        now: Timestamp,
    ) -> Result<Issued, CaError> {
        let (leaf, serial, not_after) = self.leaf(holder, key, lifetime, now)?;
        let chain = std::iter::once(leaf).chain(self.chain.iter().cloned()).collect();
        Ok(Issued { chain, serial, not_after })
    }

    fn leaf(
        &self,
        holder: Holder<'_>,
        key: &impl PublicKeyData,
        lifetime: Duration,
        now: Timestamp,
    ) -> Result<(CertificateDer<'static>, String, Timestamp), CaError> {
        if !self.is_good(now) {
            return Err(CaError::Ended(self.not_after));
        }
        let template = Template { holder, lifetime, now, at_most: self.not_after };
        issuer::sign_leaf(&template, key, &self.issuer)
    }

    /// The next one of the same CA, if this one is past half of its life.
    fn next(&self, trust_domain: &TrustDomain, now: Timestamp) -> Result<Option<Self>, CaError> {
        let life = self.not_after.since(self.made_at);
        if now < self.made_at.saturating_add(life / 2) {
            return Ok(None);
        }
        match &self.maker {
            Maker::Own(folder) => {
                own::renew(folder, trust_domain, &self.root, self.root_not_after, now).map(Some)
            }
            // No intermediate outlives the CA: near its end another one would be no younger.
            Maker::Brought(brought)
                if brought.issues_leaves() || self.not_after >= brought.not_after() =>
            {
                Ok(None)
            }
            Maker::Brought(brought) => brought.signer(trust_domain, now).map(Some),
            Maker::Handed => Ok(None),
        }
    }
}

/// Issues, and says what to trust.
pub(crate) struct Authority {
    trust_domain: TrustDomain,
    signer: ArcSwap<Signer>,
    roots: ArcSwap<Vec<CertificateDer<'static>>>,
    notes: ArcSwap<Vec<String>>,
}

impl Authority {
    /// Trusts the root of the signer and no other.
    pub(crate) fn new(trust_domain: TrustDomain, signer: Signer) -> Self {
        let roots = vec![signer.root.clone()];
        Self {
            trust_domain,
            signer: ArcSwap::from_pointee(signer),
            roots: ArcSwap::from_pointee(roots),
            notes: ArcSwap::default(),
        }
    }

    pub(crate) fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    pub(crate) fn signer(&self) -> Arc<Signer> {
        self.signer.load_full()
    }

    /// Issues with another signer from now on. Leaves of the old one stay good: they carry it along, and
    /// its root is trusted for as long as they live.
    pub(crate) fn put(&self, signer: Signer) {
        self.signer.store(Arc::new(signer));
    }

    /// The root that issues.
    pub(crate) fn root(&self) -> CertificateDer<'static> {
        self.signer.load().root.clone()
    }

    pub(crate) fn root_sha256(&self) -> [u8; 32] {
        sha256(&self.signer.load().root)
    }

    /// The roots that agents are told to trust.
    pub(crate) fn roots(&self) -> Arc<Vec<CertificateDer<'static>>> {
        self.roots.load_full()
    }

    pub(crate) fn trust(&self, roots: Vec<CertificateDer<'static>>) {
        self.roots.store(Arc::new(roots));
    }

    /// What people should know of the CA.
    pub(crate) fn notes(&self) -> Arc<Vec<String>> {
        self.notes.load_full()
    }

    pub(crate) fn note(&self, notes: Vec<String>) {
        self.notes.store(Arc::new(notes));
    }

    /// When the root and the intermediate end.
    pub(crate) fn expiries(&self) -> (Timestamp, Timestamp) {
        let signer = self.signer.load();
        (signer.root_not_after, signer.not_after)
    }

    /// Makes the next intermediate if the present one is past half of its life.
    pub(crate) fn renew_intermediate(&self, now: Timestamp) -> Result<bool, CaError> {
        let next = self.signer.load().next(&self.trust_domain, now)?;
        let renewed = next.is_some();
        if let Some(next) = next {
            self.put(next);
        }
        Ok(renewed)
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
        self.signer.load().sign(Holder::Identity(id), &key, lifetime, now)
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
        self.signer.load().sign(Holder::Server(name), &key, lifetime, now)
    }
}
