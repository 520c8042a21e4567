//! The way to the control plane: gRPC over mutual TLS, from a socket that the capture rules let pass.

use std::{io, sync::Arc, time::Duration};

use hauberk_core::identity::SpiffeId;
use hauberk_tls::{CredentialSlot, TrustSlot, client_config, join_client_config};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::net::{TcpStream, lookup_host};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::{Channel, Endpoint};

/// gRPC over TLS.
const ALPN_H2: &[u8] = b"h2";

/// A control plane that does not answer within this is away, as far as one try goes.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The most that a call may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// How to reach the control plane as the node.
#[derive(Clone)]
pub(crate) struct ControlPlane {
    address: String,
    tls: Arc<ClientConfig>,
    server_name: ServerName<'static>,
    /// Whether the capture rules let its connections pass, which takes a privilege.
    marked: bool,
}

impl ControlPlane {
    pub(crate) fn new(
        address: String,
        node: Arc<CredentialSlot>,
        trust: Arc<TrustSlot>,
    ) -> anyhow::Result<Self> {
        let id = SpiffeId::control_plane(trust.load().trust_domain());
        Ok(Self {
            address,
            tls: Arc::new(client_config(node, trust, ALPN_H2)?),
            server_name: ServerName::try_from(id.server_name())?,
            marked: true,
        })
    }

    /// First contact: whoever shows the root with this hash, and a control plane under it.
    pub(crate) fn pinned(address: String, root_sha256: [u8; 32]) -> anyhow::Result<Self> {
        Ok(Self {
            address,
            tls: Arc::new(join_client_config(root_sha256, ALPN_H2)?),
            server_name: ServerName::try_from("join.hauberk.internal")?,
            marked: true,
        })
    }

    /// The same without any privilege, as an ordinary program of this machine.
    pub(crate) fn unprivileged(self) -> Self {
        Self { marked: false, ..self }
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// A channel that connects when it is used, with the node certificate of that moment. A new
    /// certificate needs a new channel. Calls on it take at most [`CALL_TIMEOUT`].
    pub(crate) fn channel(&self) -> Channel {
        self.connect(Some(CALL_TIMEOUT))
    }

    /// A channel for calls without an end.
    pub(crate) fn streaming_channel(&self) -> Channel {
        self.connect(None)
    }

    fn connect(&self, timeout: Option<Duration>) -> Channel {
        let mut endpoint = Endpoint::from_static("https://control-plane.hauberk.internal")
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(10))
            .keep_alive_while_idle(true);
        if let Some(timeout) = timeout {
            endpoint = endpoint.timeout(timeout);
        }
        let this = self.clone();
        endpoint.connect_with_connector_lazy(tower::service_fn(move |_: tonic::transport::Uri| {
            let this = this.clone();
            async move { this.dial().await.map(TokioIo::new) }
        }))
    }

    async fn dial(&self) -> io::Result<TlsStream<TcpStream>> {
        let mut last =
            io::Error::new(io::ErrorKind::NotFound, format!("{} has no address", self.address));
        for address in lookup_host(&self.address).await? {
            match self.dial_address(address).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn dial_address(
        &self,
        address: std::net::SocketAddr,
    ) -> io::Result<TlsStream<TcpStream>> {
        let stream = if self.marked {
            let socket = hauberk_linux::socket::outbound_socket(address)?;
            tokio::net::TcpSocket::from_std_stream(socket.into()).connect(address).await?
        } else {
            TcpStream::connect(address).await?
        };
        TlsConnector::from(self.tls.clone()).connect(self.server_name.clone(), stream).await
    }
}
