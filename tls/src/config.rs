//! The only TLS configurations in Hauberk. Built once for an identity; credentials and bundles are
//! swapped inside them.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use rustls::{
    ClientConfig, Error, ServerConfig,
    client::Resumption,
    crypto::CryptoProvider,
    server::{NoServerSessionStorage, ResolvesServerCert},
    version::TLS13,
};

use crate::{
    CredentialSlot, NamedSlot, TrustSlot,
    channel::CallerToken,
    verify::{ClientVerifier, ServerTrust, ServerVerifier},
};

/// aws-lc-rs with the hybrid X25519MLKEM768 first.
pub fn provider() -> &'static Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
}

/// An agent's side that is connected to: takes only clients with a valid SVID of the trust domain.
/// Its connections become a [`Channel`](crate::channel::Channel).
///
/// # Errors
/// If rustls does not take the configuration.
pub fn mesh_server_config(
    resolver: Arc<dyn ResolvesServerCert>,
    trust: Arc<TrustSlot>,
    alpn: &[&[u8]],
) -> Result<ServerConfig, Error> {
    let mut config = server(resolver, trust, &[], true, Duration::ZERO)?;
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.enable_secret_extraction = true;
    Ok(config)
}

/// A server that also takes clients without a certificate, as joining machines are. Whoever serves
/// with it must ask for the certificate itself in every call but the one to join.
///
/// With a `grace`, clients whose certificate expired no longer ago than that are taken as well: by
/// [`peer_of`](crate::peer_of) they are nobody, and [`lapsed_client_of`](crate::lapsed_client_of) tells who they
/// were.
///
/// # Errors
/// If rustls does not take the configuration.
pub fn shared_server_config(
    resolver: Arc<dyn ResolvesServerCert>,
    trust: Arc<TrustSlot>,
    alpn: &[u8],
    grace: Duration,
) -> Result<ServerConfig, Error> {
    server(resolver, trust, alpn, false, grace)
}

fn server(
    resolver: Arc<dyn ResolvesServerCert>,
    trust: Arc<TrustSlot>,
    alpn: &[u8],
    mandatory: bool,
    grace: Duration,
) -> Result<ServerConfig, Error> {
    let mut config = ServerConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(ClientVerifier { trust, mandatory, grace }))
        .with_cert_resolver(resolver);
    finish_server(&mut config, alpn);
    Ok(config)
}

/// A server that its callers know by its name in DNS, and that asks none of them for a certificate: for callers
/// outside of the mesh, such as the API server of Kubernetes. They are nobody until they prove themselves in
/// another way.
///
/// # Errors
/// If rustls does not take the configuration.
pub fn named_server_config(slot: Arc<NamedSlot>, alpn: &[u8]) -> Result<ServerConfig, Error> {
    let mut config = ServerConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(slot);
    finish_server(&mut config, alpn);
    Ok(config)
}

fn finish_server(config: &mut ServerConfig, alpn: &[u8]) {
    config.alpn_protocols = vec![alpn.to_vec()];
    // rustls restores a client's chain from a ticket without verifying it again.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.max_early_data_size = 0;
}

/// A client that shows the credential of `slot`, and takes only the exact identity whose
/// [`server name`](hauberk_core::identity::SpiffeId::server_name) it asks for.
///
/// # Errors
/// If rustls does not take the configuration.
pub fn client_config(
    slot: Arc<CredentialSlot>,
    trust: Arc<TrustSlot>,
    alpn: &[u8],
) -> Result<ClientConfig, Error> {
    let mut config = client(ServerTrust::Bundle(trust))?.with_client_cert_resolver(slot);
    finish(&mut config, alpn);
    Ok(config)
}

/// The same for an agent's connections to other agents, which become a
/// [`Channel`](crate::channel::Channel).
///
/// # Errors
/// If rustls does not take the configuration.
pub fn mesh_client_config(
    slot: Arc<CredentialSlot>,
    trust: Arc<TrustSlot>,
    alpn: &[&[u8]],
) -> Result<ClientConfig, Error> {
    let mut config = client_config(slot, trust, &[])?;
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.enable_secret_extraction = true;
    Ok(config)
}

/// The same with the token of an earlier connection to the same destination in its hello.
#[must_use]
pub fn with_caller_token(config: &ClientConfig, token: CallerToken) -> Arc<ClientConfig> {
    let mut config = config.clone();
    config.alpn_protocols.push(token.to_protocol());
    Arc::new(config)
}

/// A client without a credential that takes only a control plane under the root with this SHA-256.
///
/// # Errors
/// If rustls does not take the configuration.
pub fn join_client_config(root_sha256: [u8; 32], alpn: &[u8]) -> Result<ClientConfig, Error> {
    let mut config = client(ServerTrust::PinnedRoot(root_sha256))?.with_no_client_auth();
    finish(&mut config, alpn);
    Ok(config)
}

fn client(
    trust: ServerTrust,
) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>, Error> {
    Ok(ClientConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerVerifier(trust))))
}

fn finish(config: &mut ClientConfig, alpn: &[u8]) {
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
}
