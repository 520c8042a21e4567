//! Trust bundles: the roots of a trust domain.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use arc_swap::ArcSwap;
use hauberk_core::{
    identity::TrustDomain,
    svid::{self, SvidError, VerifiedSvid},
    time::Timestamp,
};
use rustls_pki_types::{CertificateDer, TrustAnchor};

/// The roots of one trust domain, never merged with another domain's. Without a root only where
/// that is meant: [`TrustBundle::nobody`].
#[derive(Debug, Clone)]
pub struct TrustBundle {
    trust_domain: TrustDomain,
    roots: Vec<CertificateDer<'static>>,
    anchors: Vec<TrustAnchor<'static>>,
    first_expiry: Option<Timestamp>,
    /// Chains that were verified against these very roots.
    verified: Arc<VerifiedChains>,
}

/// Roots that cannot be trusted.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// Somebody gave a bundle without roots, which would trust nobody; it is refused rather than kept.
    #[error("the trust bundle has no root")]
    Empty,
    /// A root is not a certificate that webpki can anchor.
    #[error("read root {number} of the trust bundle")]
    Anchor {
        /// Its place, from 1.
        number: usize,
        /// What webpki says.
        #[source]
        source: webpki::Error,
    },
    /// A root is not fit to be one.
    #[error("root {number} of the trust bundle is not a certificate authority")]
    Unfit {
        /// Its place, from 1.
        number: usize,
        /// Which rule it breaks.
        #[source]
        source: svid::SvidError,
    },
}

impl TrustBundle {
    /// Checks each root and keeps them.
    ///
    /// # Errors
    /// If there is none, or one is unreadable, unfit or expired at `now`.
    pub fn new(
        trust_domain: TrustDomain,
        roots: Vec<CertificateDer<'static>>,
        now: Timestamp,
    ) -> Result<Self, TrustError> {
        if roots.is_empty() {
            return Err(TrustError::Empty);
        }
        let mut anchors = Vec::with_capacity(roots.len());
        let mut first_expiry = None;
        for (place, root) in roots.iter().enumerate() {
            let number = place + 1;
            let facts = svid::check_root(root, now)
                .map_err(|source| TrustError::Unfit { number, source })?;
            let end = facts.not_after();
            first_expiry = Some(first_expiry.map_or(end, |first: Timestamp| first.min(end)));
            let anchor = webpki::anchor_from_trusted_cert(root)
                .map_err(|source| TrustError::Anchor { number, source })?;
            anchors.push(anchor.to_owned());
        }
        let verified = Arc::default();
        Ok(Self { trust_domain, roots, anchors, first_expiry, verified })
    }

    /// The same without the roots that are good at another time only: one that this machine's clock does not
    /// believe yet, or any more, takes nothing from the others.
    ///
    /// # Errors
    /// If one is unreadable or unfit, or there was none from the start. If all are good at another time only, the
    /// bundle trusts [nobody](Self::nobody): that may be the fault of this machine's clock, and passes with it.
    pub fn of_now(
        trust_domain: TrustDomain,
        mut roots: Vec<CertificateDer<'static>>,
        now: Timestamp,
    ) -> Result<Self, TrustError> {
        let in_time = |root: &CertificateDer<'_>| {
            !matches!(
                svid::check_root(root, now),
                Err(SvidError::Expired { .. } | SvidError::NotYetValid { .. })
            )
        };
        let before = roots.len();
        roots.retain(in_time);
        if roots.is_empty() && before > 0 {
            return Ok(Self::nobody(trust_domain));
        }
        Self::new(trust_domain, roots, now)
    }

    /// A bundle without roots: every chain is refused. For whoever does not know the roots of its trust domain
    /// (yet).
    #[must_use]
    pub fn nobody(trust_domain: TrustDomain) -> Self {
        let (roots, anchors, verified) = (Vec::new(), Vec::new(), Arc::default());
        Self { trust_domain, roots, anchors, first_expiry: None, verified }
    }

    /// Whose roots they are.
    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The roots, DER.
    #[must_use]
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// When the first of the roots ends.
    #[must_use]
    pub fn first_expiry(&self) -> Option<Timestamp> {
        self.first_expiry
    }

    pub(crate) fn verified(&self) -> &VerifiedChains {
        &self.verified
    }

    pub(crate) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.anchors
    }
}

/// The most chains that are remembered: those of the peers of a busy node. They are a few hundred bytes
/// each.
const MAX_CHAINS: usize = 4_096;

/// Chains that were verified, by their SHA-256. An agent meets the same chain in every handshake with a
/// peer, and at each renewal once on every open connection: the signatures on it are checked once.
/// Only what passed is remembered, together with the time for which that holds.
#[derive(Debug, Default)]
pub(crate) struct VerifiedChains(Mutex<HashMap<[u8; 32], VerifiedChain>>);

#[derive(Debug, Clone)]
pub(crate) struct VerifiedChain {
    pub(crate) peer: VerifiedSvid,
    /// When all certificates of the chain are valid.
    pub(crate) not_before: Timestamp,
    pub(crate) not_after: Timestamp,
}

impl VerifiedChains {
    /// The proof, if this chain was verified before and is valid now.
    pub(crate) fn find(&self, chain: &[u8; 32], now: Timestamp) -> Option<VerifiedSvid> {
        let chains = self.lock();
        let found = chains.get(chain)?;
        (found.not_before <= now && now < found.not_after).then(|| found.peer.clone())
    }

    pub(crate) fn remember(&self, chain: [u8; 32], verified: VerifiedChain, now: Timestamp) {
        let mut chains = self.lock();
        if chains.len() >= MAX_CHAINS {
            chains.retain(|_, chain| chain.not_after > now);
        }
        if chains.len() >= MAX_CHAINS {
            // Rather all anew than a bound that is none.
            chains.clear();
        }
        chains.insert(chain, verified);
    }

    /// Plain data: a panic elsewhere leaves nothing half-changed in it.
    fn lock(&self) -> MutexGuard<'_, HashMap<[u8; 32], VerifiedChain>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A trust bundle that can be replaced while connections are being verified.
#[derive(Debug)]
pub struct TrustSlot(ArcSwap<TrustBundle>);

impl TrustSlot {
    /// A slot with its first bundle.
    #[must_use]
    pub fn new(bundle: TrustBundle) -> Arc<Self> {
        Arc::new(Self(ArcSwap::from_pointee(bundle)))
    }

    /// The bundle in force.
    #[must_use]
    pub fn load(&self) -> Arc<TrustBundle> {
        self.0.load_full()
    }

    /// Puts another bundle in force for every verification from now on.
    pub fn store(&self, bundle: TrustBundle) {
        self.0.store(Arc::new(bundle));
    }
}

/// SHA-256, as used to pin a root.
#[must_use]
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    let mut out = [0; 32];
    out.copy_from_slice(digest.as_ref());
    out
}
