//! What was settled when a session was made, and the proofs since.

use std::{sync::Arc, time::Instant};

use hauberk_core::{
    policy::Reason,
    session::{ProofAllowance, Reauthenticate, Role},
    svid::VerifiedSvid,
    time::Timestamp,
};
use hauberk_telemetry::record::TlsInfo;
use hauberk_tls::{Credential, TrustBundle, channel::CallerToken, prove, verify_proof};

use super::ProofRefused;

/// Who is at the other end, and how that is known.
pub(crate) struct Facts {
    pub(super) peer: VerifiedSvid,
    pub(super) binding: [u8; 32],
    pub(super) token: CallerToken,
    pub(super) name: [u8; 16],
    pub(super) is_source: bool,
    pub(super) tls: Arc<TlsInfo>,
    pub(super) server_name: Option<String>,
    pub(super) own: Option<Arc<Credential>>,
    pub(super) shown_until: Option<Timestamp>,
    pub(super) trust: Arc<TrustBundle>,
    pub(super) made: Instant,
    pub(super) proofs_sent: u32,
    pub(super) proofs_taken: u32,
    pub(super) proofs_allowed: ProofAllowance,
}

impl Facts {
    /// Who the peer is.
    pub(crate) fn peer(&self) -> &VerifiedSvid {
        &self.peer
    }

    /// Which side this is.
    pub(crate) fn role(&self) -> Role {
        if self.is_source { Role::Source } else { Role::Destination }
    }

    /// What TLS settled on.
    pub(crate) fn tls(&self) -> &Arc<TlsInfo> {
        &self.tls
    }

    /// The name that the caller's agent asked for; at the destination only.
    pub(crate) fn server_name(&self) -> Option<&str> {
        self.server_name.as_deref()
    }

    /// What tells the destination of a later session who called in this one.
    pub(crate) fn token(&self) -> CallerToken {
        self.token
    }

    /// What it is called among those of the destination. Only its two ends know it.
    pub(crate) fn name(&self) -> [u8; 16] {
        self.name
    }

    /// Whether the peer was shown this certificate in the handshake.
    pub(crate) fn was_made_with(&self, own: &Arc<Credential>) -> bool {
        self.own.as_ref().is_some_and(|then| Arc::ptr_eq(then, own))
    }

    /// When it was made.
    pub(crate) fn made(&self) -> Instant {
        self.made
    }

    /// Whether a new stream may still be opened on what was proven when it was made: the same own
    /// certificate, the same roots, and a peer whose certificate has not ended.
    pub(crate) fn is_current(
        &self,
        own: Option<&Arc<Credential>>,
        trust: &Arc<TrustBundle>,
        now: Timestamp,
    ) -> bool {
        let same_own = match (&self.own, own) {
            (Some(then), Some(now)) => Arc::ptr_eq(then, now),
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        same_own && Arc::ptr_eq(&self.trust, trust) && self.peer.facts().not_after() > now
    }

    /// When the newest certificate ends that the peer was shown.
    pub(crate) fn shown_until(&self) -> Option<Timestamp> {
        self.shown_until
    }

    /// Makes the proof of a newer certificate, to be shown to the peer.
    pub(crate) fn show_proof(&mut self, credential: &Credential) -> Result<Reauthenticate, String> {
        let sequence = self.proofs_sent + 1;
        let proof = prove(credential, &self.binding, self.is_source, sequence)
            .map_err(|error| error.to_string())?;
        self.proofs_sent = sequence;
        self.shown_until = Some(credential.facts().not_after());
        Ok(proof)
    }

    /// Takes the peer's newer certificate.
    ///
    /// # Errors
    /// If it does not prove what it should, or proofs come too often.
    pub(crate) fn take_proof(
        &mut self,
        frame: &Reauthenticate,
        trust: &TrustBundle,
        now: Timestamp,
    ) -> Result<(), ProofRefused> {
        // Before the work of verifying it.
        if !self.proofs_allowed.take(now) {
            let detail = "the peer shows newer certificates too often".to_owned();
            return Err(ProofRefused { reason: Reason::RateLimited, detail });
        }
        self.peer = verify_proof(
            frame,
            &self.peer,
            trust,
            &self.binding,
            !self.is_source,
            self.proofs_taken,
            now,
        )
        .map_err(|error| ProofRefused { reason: Reason::BadSvid, detail: error.to_string() })?;
        self.proofs_taken = frame.sequence;
        Ok(())
    }
}
