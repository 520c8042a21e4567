//! What a failed handshake means, in words of the closed set.

use std::io;

use hauberk_core::policy::Reason;
use rustls::{AlertDescription, CertificateError, Error, OtherError};

use crate::VerifyError;

/// A failed handshake: whose refusal it was, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandshakeFailure {
    /// The reason of the closed set.
    pub reason: Reason,
    /// The peer refused us, not we the peer.
    pub by_peer: bool,
    /// What happened, for people.
    pub detail: String,
}

/// Reads the failure out of the error of a TLS stream; `None` if it is not TLS that failed (the peer
/// went away, for one).
#[must_use]
pub fn reason_of(error: &io::Error) -> Option<HandshakeFailure> {
    error.get_ref()?.downcast_ref::<Error>().map(failure_of)
}

/// What an error of TLS means.
#[must_use]
pub fn failure_of(tls: &Error) -> HandshakeFailure {
    let ours = |reason, detail: String| HandshakeFailure { reason, by_peer: false, detail };
    match tls {
        Error::InvalidCertificate(CertificateError::Other(OtherError(inner))) => {
            match inner.downcast_ref::<VerifyError>() {
                Some(refusal) => ours(refusal.reason(), chain_of(refusal)),
                None => ours(Reason::BadSvid, inner.to_string()),
            }
        }
        Error::NoCertificatesPresented => {
            ours(Reason::NoClientCert, "the peer presented no certificate".to_owned())
        }
        Error::InvalidCertificate(other) => ours(Reason::BadSvid, other.to_string()),
        Error::AlertReceived(alert) => HandshakeFailure {
            reason: match alert {
                AlertDescription::CertificateRequired => Reason::NoClientCert,
                AlertDescription::UnknownCA => Reason::UntrustedRoot,
                AlertDescription::CertificateExpired => Reason::ExpiredCert,
                AlertDescription::AccessDenied | AlertDescription::UnrecognisedName => {
                    Reason::NotReady
                }
                _ => Reason::BadSvid,
            },
            by_peer: true,
            detail: format!("the peer refused the handshake with the alert {alert:?}"),
        },
        // Whoever does not speak our TLS, or no TLS at all, came in clear as far as the mesh goes.
        Error::InvalidMessage(_)
        | Error::InappropriateMessage { .. }
        | Error::InappropriateHandshakeMessage { .. }
        | Error::PeerIncompatible(_)
        | Error::PeerMisbehaved(_)
        | Error::NoApplicationProtocol => {
            ours(Reason::Plaintext, format!("the peer does not speak Hauberk's TLS: {tls}"))
        }
        _ => ours(Reason::NotReady, tls.to_string()),
    }
}

fn chain_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
