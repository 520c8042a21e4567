//! The lock: rustls with SPIFFE rules. Keys and signing requests, credentials that can be swapped
//! while connections use them, verifiers that hand out proof, the only TLS configurations in Hauberk
//! (TLS 1.3, mutual within the mesh, no resumption), the connections between agents after their
//! handshake, and which of many incoming handshakes go on.
//!
//! No sockets and no policy here.

pub mod channel;
mod config;
mod credential;
mod failure;
pub mod files;
mod keys;
pub mod limiter;
mod reauthenticate;
mod trust;
mod verify;

pub use config::{
    client_config, join_client_config, mesh_client_config, mesh_server_config, named_server_config,
    provider, shared_server_config, with_caller_token,
};
pub use credential::{ByServerName, Credential, CredentialError, CredentialSlot, NamedSlot};
pub use failure::{HandshakeFailure, failure_of, reason_of};
pub use keys::{KeyError, PrivateKey, signing_request};
pub use reauthenticate::{ReauthenticateError, prove, verify_proof};
pub use trust::{TrustBundle, TrustError, TrustSlot, sha256};
pub use verify::{LapsedSvid, PeerError, VerifyError, lapsed_client_of, peer_of, verify_chain};

/// The present, to the millisecond, as the core wants it. Only adapters and shells call this.
#[must_use]
pub fn now() -> hauberk_core::time::Timestamp {
    std::time::SystemTime::now().into()
}

/// The time that rustls hands to verifiers: whole seconds.
fn timestamp(time: rustls_pki_types::UnixTime) -> hauberk_core::time::Timestamp {
    let millis = time.as_secs().saturating_mul(1000);
    hauberk_core::time::Timestamp::from_unix_millis(i64::try_from(millis).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use hauberk_core::time::Timestamp;

    use super::*;

    #[test]
    fn the_present_is_told_to_the_millisecond() {
        // Several times, as one may fall on a whole second.
        for _ in 0..5 {
            std::thread::sleep(std::time::Duration::from_millis(3));
            let before = Timestamp::from(std::time::SystemTime::now());
            let told = now();
            let after = Timestamp::from(std::time::SystemTime::now());
            assert!((before..=after).contains(&told), "{told} is not from {before} to {after}");
        }
    }
}
