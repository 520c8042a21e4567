//! Credentials: a certificate chain with its key, replaced while connections use them.

use std::{collections::HashMap, sync::Arc};

use arc_swap::{ArcSwap, ArcSwapOption};
use hauberk_core::{
    identity::SpiffeId,
    svid::{LeafFacts, SvidError, check_leaf},
    time::Timestamp,
};
use rustls::{
    SignatureScheme,
    client::ResolvesClientCert,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::CertificateDer;

use crate::{PrivateKey, config::provider};

/// A certificate chain, its key, and what its leaf says.
#[derive(Debug, Clone)]
pub struct Credential {
    certified: Arc<CertifiedKey>,
    facts: LeafFacts,
}

/// A chain and key that make no credential.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// There is no certificate.
    #[error("the certificate chain is empty")]
    Empty,
    /// The leaf is not an X.509-SVID.
    #[error("the certificate is not a valid SVID")]
    Leaf(#[source] SvidError),
    /// The key cannot be loaded, or is not the leaf's.
    #[error("load the private key for the certificate")]
    Key(#[source] rustls::Error),
}

impl Credential {
    /// Checks that the leaf is an SVID valid at `now` and that the key is its key.
    ///
    /// # Errors
    /// If it is not.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: &PrivateKey,
        now: Timestamp,
    ) -> Result<Self, CredentialError> {
        let leaf = chain.first().ok_or(CredentialError::Empty)?;
        let facts = check_leaf(leaf, now).map_err(CredentialError::Leaf)?;
        Ok(Self { certified: Arc::new(with_key(chain, key)?), facts })
    }

    /// What the leaf says.
    #[must_use]
    pub fn facts(&self) -> &LeafFacts {
        &self.facts
    }

    /// Leaf first.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    pub(crate) fn certified(&self) -> &Arc<CertifiedKey> {
        &self.certified
    }
}

/// A chain with its key, which must be that of the leaf.
fn with_key(
    chain: Vec<CertificateDer<'static>>,
    key: &PrivateKey,
) -> Result<CertifiedKey, CredentialError> {
    let signing = provider()
        .key_provider
        .load_private_key(key.der().clone_key())
        .map_err(CredentialError::Key)?;
    let certified = CertifiedKey::new(chain, signing);
    certified.keys_match().map_err(CredentialError::Key)?;
    Ok(certified)
}

/// Holds the credential of one identity; empty until the first one is issued. One slot lives as long
/// as its identity, so that a renewal reaches every TLS configuration without building one anew.
#[derive(Debug)]
pub struct CredentialSlot {
    id: SpiffeId,
    current: ArcSwapOption<Credential>,
}

impl CredentialSlot {
    /// An empty slot for `id`.
    #[must_use]
    pub fn new(id: SpiffeId) -> Arc<Self> {
        Arc::new(Self { id, current: ArcSwapOption::empty() })
    }

    /// Whose credential it holds.
    #[must_use]
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The credential in use.
    #[must_use]
    pub fn load(&self) -> Option<Arc<Credential>> {
        self.current.load_full()
    }

    /// Puts a credential to use from the next handshake on. One of another identity is given back.
    ///
    /// # Errors
    /// If the credential is not of this slot's identity.
    pub fn store(&self, credential: Credential) -> Result<(), Credential> {
        if credential.facts().id() != &self.id {
            return Err(credential);
        }
        self.current.store(Some(Arc::new(credential)));
        Ok(())
    }

    /// Takes the credential out of use: handshakes fail from now on.
    pub fn clear(&self) {
        self.current.store(None);
    }
}

impl ResolvesClientCert for CredentialSlot {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.current.load().as_ref().map(|credential| credential.certified().clone())
    }

    fn has_certs(&self) -> bool {
        self.current.load().is_some()
    }
}

/// Holds the certificate of a server that callers outside of the mesh know by its name in DNS; empty until
/// there is one. What it holds is no SVID, and is good for nothing in the mesh.
#[derive(Debug, Default)]
pub struct NamedSlot(ArcSwapOption<CertifiedKey>);

impl NamedSlot {
    /// Puts a certificate to use from the next handshake on.
    ///
    /// # Errors
    /// If the chain is empty, or the key is not that of its leaf.
    pub fn store(
        &self,
        chain: Vec<CertificateDer<'static>>,
        key: &PrivateKey,
    ) -> Result<(), CredentialError> {
        if chain.is_empty() {
            return Err(CredentialError::Empty);
        }
        self.0.store(Some(Arc::new(with_key(chain, key)?)));
        Ok(())
    }
}

impl ResolvesServerCert for NamedSlot {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.load_full()
    }
}

/// Finds a server's credential by the server name that the caller expects
/// ([`SpiffeId::server_name`]). A name that nobody here has gets no certificate.
#[derive(Debug, Default)]
pub struct ByServerName(ArcSwap<HashMap<String, Arc<CredentialSlot>>>);

impl ByServerName {
    /// Serves exactly these from now on.
    pub fn store(&self, slots: impl IntoIterator<Item = Arc<CredentialSlot>>) {
        let map = slots.into_iter().map(|slot| (slot.id().server_name(), slot)).collect();
        self.0.store(Arc::new(map));
    }

    /// The slot that a server name stands for.
    #[must_use]
    pub fn find(&self, server_name: &str) -> Option<Arc<CredentialSlot>> {
        self.0.load().get(server_name).cloned()
    }
}

impl ResolvesServerCert for ByServerName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let slot = self.find(hello.server_name()?)?;
        ResolvesClientCert::resolve(slot.as_ref(), &[], &[])
    }
}
