//! Proof, inside a live connection, that the peer still has a valid certificate.
//!
//! A connection may outlive the certificate it was opened with, but not the right to have one: at
//! each renewal both sides sign this connection's channel binding with the new key. Who can no longer
//! renew (revoked, unregistered, banned) cannot prove, and the connection ends with the old
//! certificate.

use hauberk_core::{session::Reauthenticate, svid::VerifiedSvid, time::Timestamp};
use rustls::SignatureScheme;
use rustls_pki_types::CertificateDer;
use webpki::EndEntityCert;

use crate::{Credential, TrustBundle, VerifyError, config::provider, verify_chain};

/// A proof that could not be made, or that does not hold.
#[derive(Debug, thiserror::Error)]
pub enum ReauthenticateError {
    /// rustls gave no signature.
    #[error("sign the connection with the new certificate")]
    Tls(#[source] rustls::Error),
    /// The key has no scheme that the protocol allows.
    #[error("the new key has no usable signature scheme")]
    NoScheme,
    /// The chain does not verify.
    #[error("the new certificate is refused")]
    Chain(#[source] VerifyError),
    /// The signature is not the new key's, or not over this connection.
    #[error("the new certificate's signature does not fit this connection")]
    Signature,
    /// The new certificate is somebody else's.
    #[error("the new certificate is of another identity")]
    OtherIdentity,
    /// The sequence does not count up.
    #[error("the new certificate's sequence is {got}, the last one was {last}")]
    Sequence {
        /// What came.
        got: u32,
        /// What came before.
        last: u32,
    },
}

const SCHEMES: &[SignatureScheme] =
    &[SignatureScheme::ECDSA_NISTP256_SHA256, SignatureScheme::ECDSA_NISTP384_SHA384];

/// Makes the frame that proves `credential` on the connection with this channel binding.
///
/// # Errors
/// If the key cannot sign.
pub fn prove(
    credential: &Credential,
    binding: &[u8; 32],
    from_source: bool,
    sequence: u32,
) -> Result<Reauthenticate, ReauthenticateError> {
    let chain: Vec<Vec<u8>> = credential.chain().iter().map(|der| der.to_vec()).collect();
    let message = Reauthenticate::signed_message(binding, from_source, sequence, &chain);
    let signer =
        credential.certified().key.choose_scheme(SCHEMES).ok_or(ReauthenticateError::NoScheme)?;
    let signature = signer.sign(&message).map_err(ReauthenticateError::Tls)?;
    Ok(Reauthenticate { sequence, scheme: u16::from(signer.scheme()), signature, chain })
}

/// Checks such a frame: chain, signature over this very connection, sequence, and that it is the
/// same identity as before.
///
/// # Errors
/// If any of it does not hold; the connection must end then.
pub fn verify_proof(
    frame: &Reauthenticate,
    before: &VerifiedSvid,
    bundle: &TrustBundle,
    binding: &[u8; 32],
    from_source: bool,
    last_sequence: u32,
    now: Timestamp,
) -> Result<VerifiedSvid, ReauthenticateError> {
    // A sender that could not send one leaves it out.
    if frame.sequence <= last_sequence {
        return Err(ReauthenticateError::Sequence { got: frame.sequence, last: last_sequence });
    }
    let chain: Vec<CertificateDer<'_>> =
        frame.chain.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
    let (leaf, intermediates) = chain.split_first().ok_or(ReauthenticateError::Signature)?;
    let peer = verify_chain(leaf, intermediates, bundle, !from_source, now)
        .map_err(ReauthenticateError::Chain)?;
    if peer.id() != before.id() {
        return Err(ReauthenticateError::OtherIdentity);
    }
    let scheme = SignatureScheme::from(frame.scheme);
    if !SCHEMES.contains(&scheme) {
        return Err(ReauthenticateError::NoScheme);
    }
    let message =
        Reauthenticate::signed_message(binding, from_source, frame.sequence, &frame.chain);
    let certificate = EndEntityCert::try_from(leaf).map_err(|_| ReauthenticateError::Signature)?;
    let holds = provider()
        .signature_verification_algorithms
        .mapping
        .iter()
        .filter(|(mapped, _)| *mapped == scheme)
        .flat_map(|(_, algorithms)| algorithms.iter())
        .any(|algorithm| {
            certificate.verify_signature(*algorithm, &message, &frame.signature).is_ok()
        });
    if holds { Ok(peer) } else { Err(ReauthenticateError::Signature) }
}
