//! A caller and a server in memory: certificates and TLS configurations as two agents have them, without
//! sockets and without a control plane.

use std::sync::Arc;

use hauberk_core::{identity::SpiffeId, session::ALPN};
use hauberk_tls::{
    ByServerName, Credential, CredentialSlot, PrivateKey, TrustBundle, TrustSlot,
    channel::{Channel, Handshake},
    mesh_client_config, mesh_server_config,
};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls_pki_types::ServerName;

const CALLER: &str = "spiffe://example.org/ns/bench/sa/caller";
const SERVER: &str = "spiffe://example.org/ns/bench/sa/server";

/// Both of them, with one authority.
pub(crate) struct World {
    pub(crate) client: Arc<rustls::ClientConfig>,
    pub(crate) server: Arc<rustls::ServerConfig>,
    /// How the caller names the server.
    pub(crate) name: ServerName<'static>,
    bundle: TrustBundle,
}

impl World {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let root = ca.self_signed(&key)?.der().clone();
        let issuer = Issuer::from_ca_cert_der(&root, key)?;
        let id: SpiffeId = SERVER.parse()?;
        let bundle = TrustBundle::new(id.trust_domain().clone(), vec![root], hauberk_tls::now())?;
        let trust = TrustSlot::new(bundle.clone());
        let names = ByServerName::default();
        names.store([slot(SERVER, &issuer)?]);
        Ok(Self {
            client: Arc::new(mesh_client_config(slot(CALLER, &issuer)?, trust.clone(), &[ALPN])?),
            server: Arc::new(mesh_server_config(Arc::new(names), trust, &[ALPN])?),
            bundle,
            name: ServerName::try_from(id.server_name())?,
        })
    }

    /// A full handshake: the caller's end and the server's.
    pub(crate) fn connect(&self) -> anyhow::Result<(Channel, Channel)> {
        let mut client = Handshake::client(self.client.clone(), self.name.clone())?;
        let mut server = Handshake::server(self.server.clone())?;
        let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
        client.advance(&[], &mut to_server)?;
        server.advance(&to_server, &mut to_client)?;
        to_server.clear();
        client.advance(&to_client, &mut to_server)?;
        server.advance(&to_server, &mut to_client)?;
        let finish = |handshake: Handshake| -> anyhow::Result<Channel> {
            Ok(handshake.finish(&self.bundle, hauberk_tls::now())?.channel)
        };
        Ok((finish(client)?, finish(server)?))
    }
}

fn slot(id: &str, issuer: &Issuer<'_, KeyPair>) -> anyhow::Result<Arc<CredentialSlot>> {
    let key = KeyPair::generate()?;
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    parameters.subject_alt_names = vec![rcgen::SanType::URI(id.try_into()?)];
    parameters.is_ca = IsCa::ExplicitNoCa;
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    parameters.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    parameters.not_before = time::OffsetDateTime::now_utc() - time::Duration::minutes(1);
    parameters.not_after = time::OffsetDateTime::now_utc() + time::Duration::hours(1);
    let leaf = parameters.signed_by(&key, issuer)?.der().clone();
    let key = PrivateKey::from_pkcs8(key.serialize_der());
    let slot = CredentialSlot::new(id.parse()?);
    let credential = Credential::new(vec![leaf], &key, hauberk_tls::now())?;
    slot.store(credential).map_err(|_| anyhow::anyhow!("a credential of another identity"))?;
    Ok(slot)
}
