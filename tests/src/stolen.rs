//! A thief: calls of the control plane with what an agent keeps on its disk.

use std::{net::TcpStream, sync::Arc};

use anyhow::Context;
use base64::{Engine, engine::general_purpose::STANDARD};
use hauberk_core::identity::{SpiffeId, TrustDomain};
use hauberk_proto::v1::{
    IssueRequest, NodeCredential, RenewNodeRequest, enrollment_client::EnrollmentClient,
    workload_identity_client::WorkloadIdentityClient,
};
use hauberk_tls::{Credential, CredentialSlot, PrivateKey, TrustBundle, TrustSlot, client_config};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::{CertificateDer, ServerName};
use serde_json::Value;
use tokio::runtime::Runtime;
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

/// A channel to the control plane, and the runtime that its calls need.
pub struct Stolen {
    channel: Channel,
    runtime: Runtime,
}

impl Stolen {
    /// With a node's credential, the text of its agent's `node.json`. `stream` leads to the control plane's
    /// port for agents.
    ///
    /// # Errors
    /// If the text is no credential, or the control plane does not take it.
    pub fn open(kept: &[u8], stream: TcpStream) -> anyhow::Result<Self> {
        let kept: Value = serde_json::from_slice(kept)?;
        let now = hauberk_tls::now();
        let key = PrivateKey::from_pkcs8(decode(&kept["key"])?);
        let credential = Credential::new(certificates(&kept["chain"])?, &key, now)?;
        let id = credential.facts().id().clone();
        let slot = CredentialSlot::new(id.clone());
        slot.store(credential).ok().context("not its own identity")?;
        let roots = certificates(&kept["bundle"])?;
        let trust = TrustSlot::new(TrustBundle::new(id.trust_domain().clone(), roots, now)?);
        let tls = client_config(slot, trust, b"h2")?;
        Self::connect(Arc::new(tls), id.trust_domain(), stream)
    }

    /// With whatever these settings show, or nothing.
    ///
    /// # Errors
    /// If the control plane does not take it.
    pub fn connect(
        tls: Arc<ClientConfig>,
        trust_domain: &TrustDomain,
        stream: TcpStream,
    ) -> anyhow::Result<Self> {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let name = SpiffeId::control_plane(trust_domain).server_name();
        let channel = runtime.block_on(async {
            let stream = tokio::net::TcpStream::from_std(stream)?;
            let connector = tokio_rustls::TlsConnector::from(tls);
            let stream = connector.connect(ServerName::try_from(name)?, stream).await?;
            let mut once = Some(TokioIo::new(stream));
            let connector = tower::service_fn(move |_: tonic::transport::Uri| {
                let stream = once.take().ok_or_else(|| std::io::Error::other("used"));
                async move { stream }
            });
            anyhow::Ok(
                Endpoint::from_static("https://control-plane")
                    .connect_with_connector(connector)
                    .await?,
            )
        })?;
        Ok(Self { channel, runtime })
    }

    /// For calls that are not here.
    #[must_use]
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Where they are waited for.
    #[must_use]
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Asks for a certificate of a workload: its chain.
    ///
    /// # Errors
    /// If it is refused.
    pub fn issue(&self, workload: &str, request: Vec<u8>) -> Result<Vec<Vec<u8>>, Status> {
        let request = IssueRequest { workload: workload.to_owned(), certificate_request: request };
        let mut client = WorkloadIdentityClient::new(self.channel());
        Ok(self.runtime.block_on(client.issue(request))?.into_inner().certificate_chain)
    }

    /// Asks for the node's next certificate.
    ///
    /// # Errors
    /// If it is refused.
    pub fn renew(&self, certificate_request: Vec<u8>) -> Result<NodeCredential, Status> {
        let mut client = EnrollmentClient::new(self.channel());
        let request = RenewNodeRequest { certificate_request };
        Ok(self.runtime.block_on(client.renew_node(request))?.into_inner())
    }
}

fn decode(value: &Value) -> anyhow::Result<Vec<u8>> {
    Ok(STANDARD.decode(value.as_str().context("not text")?)?)
}

fn certificates(value: &Value) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let items = value.as_array().context("not a list")?;
    items.iter().map(|item| Ok(CertificateDer::from(decode(item)?))).collect()
}
