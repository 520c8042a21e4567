//! Verification of a peer's chain: the path by webpki, the SPIFFE rules by the core, and the only
//! place that puts the two together into proof.

use std::{sync::Arc, time::Duration};

use hauberk_core::{
    identity::{IdentityKind, SpiffeId, TrustDomain},
    policy::Reason,
    svid::{ChainVerified, LeafFacts, SvidError, VerifiedSvid, check_intermediate, check_leaf},
    time::Timestamp,
};
use rustls::{
    CertificateError, CommonState, DigitallySignedStruct, DistinguishedName, Error, OtherError,
    SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::{EndEntityCert, KeyUsage};

use crate::{
    TrustBundle, TrustSlot,
    config::provider,
    timestamp,
    trust::{VerifiedChain, sha256},
};

/// The side that the peer plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PeerRole {
    Server,
    Client,
}

/// Why a peer's certificate is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// A certificate of the chain is good from later on, by the clock of this machine.
    #[error(
        "a certificate of the chain is not valid before {not_before}, and the clock of this machine says {now}: compare the clocks"
    )]
    NotYetValid {
        /// Its `notBefore`.
        not_before: Timestamp,
        /// The time of the check.
        now: Timestamp,
    },
    /// The time of a certificate of the chain is over, by the clock of this machine.
    #[error(
        "a certificate of the chain expired at {not_after}, and the clock of this machine says {now}"
    )]
    Expired {
        /// Its `notAfter`.
        not_after: Timestamp,
        /// The time of the check.
        now: Timestamp,
    },
    /// No path leads from the certificate to a root of the trust domain.
    #[error("the certificate chain does not lead to a trusted root")]
    Chain(#[source] webpki::Error),
    /// A certificate of the chain breaks the SPIFFE rules.
    #[error("the certificate is not a valid SVID")]
    Svid(#[source] SvidError),
    /// The peer is somebody else than expected.
    #[error("the peer is {presented}, which is not whom this connection is for")]
    IdentityMismatch {
        /// Who it is.
        presented: SpiffeId,
    },
    /// It is asked for as an expired one, and is not.
    #[error("the certificate has not expired")]
    Current,
    /// The chain has no certificate with the pinned SHA-256.
    #[error("the control plane's root is not the one that the join token names")]
    PinMismatch,
}

impl VerifyError {
    /// The reason of the closed set.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::NotYetValid { .. } | Self::Expired { .. } => Reason::ExpiredCert,
            Self::Chain(webpki::Error::UnknownIssuer) | Self::PinMismatch => Reason::UntrustedRoot,
            Self::Chain(
                webpki::Error::InvalidSignatureForPublicKey
                | webpki::Error::UnsupportedSignatureAlgorithmContext(_),
            ) => Reason::UntrustedRoot,
            Self::Chain(_) | Self::Current => Reason::BadSvid,
            Self::Svid(error) => error.reason(),
            Self::IdentityMismatch { .. } => Reason::IdentityMismatch,
        }
    }
}

/// Verifies a chain (leaf first) against a bundle and returns the proof of who it is.
///
/// # Errors
/// If any rule of the path or of SPIFFE is broken.
pub fn verify_chain(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    bundle: &TrustBundle,
    role_is_server: bool,
    time: Timestamp,
) -> Result<VerifiedSvid, VerifyError> {
    let role = if role_is_server { PeerRole::Server } else { PeerRole::Client };
    verify(leaf, intermediates, bundle, role, unix_time(time))
}

fn unix_time(time: Timestamp) -> UnixTime {
    let seconds = u64::try_from(time.unix_millis() / 1000).unwrap_or(0);
    UnixTime::since_unix_epoch(Duration::from_secs(seconds))
}

fn verify(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    bundle: &TrustBundle,
    role: PeerRole,
    time: UnixTime,
) -> Result<VerifiedSvid, VerifyError> {
    let now = timestamp(time);
    let key = chain_key(leaf, intermediates, role);
    if let Some(peer) = bundle.verified().find(&key, now) {
        return Ok(peer);
    }
    let usage = match role {
        PeerRole::Server => KeyUsage::server_auth(),
        PeerRole::Client => KeyUsage::client_auth(),
    };
    let path = EndEntityCert::try_from(leaf).and_then(|certificate| {
        certificate
            .verify_for_usage(
                provider().signature_verification_algorithms.all,
                bundle.anchors(),
                intermediates,
                time,
                usage,
                None,
                None,
            )
            .map(|_| ())
    });
    path.map_err(chain_error)?;
    let (mut not_before, mut not_after) = (None, None);
    for intermediate in intermediates {
        // webpki does not look at key usage; the core does. A root sent along is not part of the
        // path and anchors nothing.
        if !bundle.roots().iter().any(|root| root.as_ref() == intermediate.as_ref()) {
            let facts = check_intermediate(intermediate, now).map_err(VerifyError::Svid)?;
            not_before = not_before.max(Some(facts.not_before()));
            not_after = Some(not_after.unwrap_or(facts.not_after()).min(facts.not_after()));
        }
    }
    let peer = VerifiedSvid::from_verified_chain(
        ChainVerified::assert_signature_path_checked(),
        leaf,
        bundle.trust_domain(),
        now,
    )
    .map_err(VerifyError::Svid)?;
    let facts = peer.facts();
    let verified = VerifiedChain {
        not_before: not_before.unwrap_or(facts.not_before()).max(facts.not_before()),
        not_after: not_after.unwrap_or(facts.not_after()).min(facts.not_after()),
        peer: peer.clone(),
    };
    bundle.verified().remember(key, verified, now);
    Ok(peer)
}

/// What webpki says against a chain. It writes times as numbers.
fn chain_error(error: webpki::Error) -> VerifyError {
    match error {
        webpki::Error::CertNotValidYet { time, not_before } => {
            VerifyError::NotYetValid { not_before: timestamp(not_before), now: timestamp(time) }
        }
        webpki::Error::CertExpired { time, not_after } => {
            VerifyError::Expired { not_after: timestamp(not_after), now: timestamp(time) }
        }
        other => VerifyError::Chain(other),
    }
}

/// Names the very bytes of a chain in a role.
fn chain_key(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    role: PeerRole,
) -> [u8; 32] {
    let mut digest = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    digest.update(match role {
        PeerRole::Server => b"server",
        PeerRole::Client => b"client",
    });
    for certificate in std::iter::once(leaf).chain(intermediates) {
        // Its length, so that no two chains have the same bytes one after the other.
        digest.update(&u64::try_from(certificate.len()).unwrap_or(u64::MAX).to_be_bytes());
        digest.update(certificate);
    }
    let mut key = [0; 32];
    key.copy_from_slice(digest.finish().as_ref());
    key
}

/// A finished handshake without a usable peer.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// The handshake is not finished, or the peer has shown no certificate.
    #[error("the peer has shown no certificate")]
    NoCertificate,
    /// Its certificate has become unacceptable since.
    #[error(transparent)]
    Verify(#[from] VerifyError),
}

/// Who the peer of a finished handshake is. Verifies the chain once more, so that the proof does
/// not hang on which configuration made the connection.
///
/// # Errors
/// If the handshake is not finished, there is no certificate, or it does not verify.
pub fn peer_of(
    connection: &CommonState,
    bundle: &TrustBundle,
    peer_is_server: bool,
    now: Timestamp,
) -> Result<VerifiedSvid, PeerError> {
    let (leaf, intermediates) = shown(connection)?;
    Ok(verify_chain(leaf, intermediates, bundle, peer_is_server, now)?)
}

/// Who a client was until its certificate expired, no longer ago than whoever asked allows. Its chain was in
/// order at that moment, and it has proven in the handshake that it has the key. It is good for asking for another
/// certificate and for nothing else, which is why it is no [`VerifiedSvid`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LapsedSvid(VerifiedSvid);

impl LapsedSvid {
    /// What the expired leaf says.
    #[must_use]
    pub fn facts(&self) -> &LeafFacts {
        self.0.facts()
    }
}

/// Who the client of a finished handshake was, if its certificate has expired and that is at most `grace` ago.
/// The chain is verified as of its end, against the roots of today.
///
/// # Errors
/// If the handshake is not finished, there is no certificate, it is valid still or not yet, it expired earlier, or
/// it did not verify before either.
pub fn lapsed_client_of(
    connection: &CommonState,
    bundle: &TrustBundle,
    grace: Duration,
    now: Timestamp,
) -> Result<LapsedSvid, PeerError> {
    let (leaf, intermediates) = shown(connection)?;
    Ok(verify_lapsed(leaf, intermediates, bundle, grace, now)?)
}

fn verify_lapsed(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    bundle: &TrustBundle,
    grace: Duration,
    now: Timestamp,
) -> Result<LapsedSvid, VerifyError> {
    let not_after = match check_leaf(leaf, now) {
        Err(SvidError::Expired { not_after, .. }) => not_after,
        Err(error) => return Err(VerifyError::Svid(error)),
        Ok(_) => return Err(VerifyError::Current),
    };
    if now.since(not_after) > grace {
        return Err(VerifyError::Expired { not_after, now });
    }
    verify(leaf, intermediates, bundle, PeerRole::Client, unix_time(not_after)).map(LapsedSvid)
}

fn shown(
    connection: &CommonState,
) -> Result<(&CertificateDer<'static>, &[CertificateDer<'static>]), PeerError> {
    if connection.is_handshaking() {
        return Err(PeerError::NoCertificate);
    }
    connection.peer_certificates().and_then(<[_]>::split_first).ok_or(PeerError::NoCertificate)
}

fn refused(error: VerifyError) -> Error {
    // The precise error rides along, for the log of this side; the peer sees only the alert.
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
}

fn schemes() -> Vec<SignatureScheme> {
    provider().signature_verification_algorithms.supported_schemes()
}

fn verify_signature(
    message: &[u8],
    certificate: &CertificateDer<'_>,
    signature: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, Error> {
    rustls::crypto::verify_tls13_signature(
        message,
        certificate,
        signature,
        &provider().signature_verification_algorithms,
    )
}

fn no_tls12() -> Error {
    Error::General("TLS 1.2 is not spoken here".to_owned())
}

/// Verifies whoever connects to us.
#[derive(Debug)]
pub(crate) struct ClientVerifier {
    pub(crate) trust: Arc<TrustSlot>,
    pub(crate) mandatory: bool,
    /// How long ago a certificate may have expired, for a server that lets its client ask for another one.
    pub(crate) grace: Duration,
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let trust = self.trust.load();
        let refusal = match verify(leaf, intermediates, &trust, PeerRole::Client, now) {
            Ok(_) => return Ok(ClientCertVerified::assertion()),
            Err(refusal) => refusal,
        };
        // Without a grace, an expired certificate is refused as any other that is no good.
        if self.grace > Duration::ZERO
            && verify_lapsed(leaf, intermediates, &trust, self.grace, timestamp(now)).is_ok()
        {
            return Ok(ClientCertVerified::assertion());
        }
        Err(refused(refusal))
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}

/// What a client trusts a server by.
#[derive(Debug)]
pub(crate) enum ServerTrust {
    /// The trust domain's bundle, and the server name that stands for the exact identity.
    Bundle(Arc<TrustSlot>),
    /// First contact: the SHA-256 of the root, out of a join token.
    PinnedRoot([u8; 32]),
}

/// Verifies whom we connect to.
#[derive(Debug)]
pub(crate) struct ServerVerifier(pub(crate) ServerTrust);

impl ServerVerifier {
    fn check(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), VerifyError> {
        match &self.0 {
            ServerTrust::Bundle(trust) => {
                let peer = verify(leaf, intermediates, &trust.load(), PeerRole::Server, now)?;
                if peer.id().server_name() == server_name.to_str() {
                    Ok(())
                } else {
                    Err(VerifyError::IdentityMismatch { presented: peer.id().clone() })
                }
            }
            ServerTrust::PinnedRoot(pin) => check_pinned(leaf, intermediates, pin, now),
        }
    }
}

/// The chain must carry the root that the token names, lead to it, and be the control plane's.
fn check_pinned(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    pin: &[u8; 32],
    now: UnixTime,
) -> Result<(), VerifyError> {
    let root = intermediates
        .iter()
        .find(|certificate| sha256(certificate) == *pin)
        .ok_or(VerifyError::PinMismatch)?;
    let facts = check_leaf(leaf, timestamp(now)).map_err(VerifyError::Svid)?;
    let trust_domain: TrustDomain = facts.id().trust_domain().clone();
    let bundle = TrustBundle::new(trust_domain, vec![root.clone().into_owned()], timestamp(now))
        .map_err(|_| VerifyError::PinMismatch)?;
    let peer = verify(leaf, intermediates, &bundle, PeerRole::Server, now)?;
    match peer.id().kind() {
        IdentityKind::ControlPlane => Ok(()),
        IdentityKind::Workload { .. }
        | IdentityKind::Machine { .. }
        | IdentityKind::Node { .. }
        | IdentityKind::Other => {
            Err(VerifyError::IdentityMismatch { presented: peer.id().clone() })
        }
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(leaf, intermediates, server_name, now)
            .map(|()| ServerCertVerified::assertion())
            .map_err(refused)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}
