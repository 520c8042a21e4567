//! The way to the control plane: gRPC over mutual TLS, from a socket that the capture rules let pass.

use std::{io, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use hauberk_core::identity::SpiffeId;
use hauberk_tls::{Credential, CredentialSlot, TrustSlot, client_config, join_client_config};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::{
    net::{TcpStream, lookup_host},
    sync::watch,
};
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
    /// Host:port. Empty while nobody has told it, which is only so while there is no credential either.
    address: Arc<ArcSwap<String>>,
    tls: Arc<ClientConfig>,
    server_name: ServerName<'static>,
    /// Whether the capture rules let its connections pass, which takes a privilege.
    marked: bool,
    /// As whom it is called; as nobody at the first contact.
    caller: Option<Caller>,
}

#[derive(Clone)]
struct Caller {
    slot: Arc<CredentialSlot>,
    renewals: watch::Receiver<u64>,
}

impl ControlPlane {
    /// Called as `node`, whose certificates `renewals` counts.
    pub(crate) fn new(
        address: String,
        node: Arc<CredentialSlot>,
        renewals: watch::Receiver<u64>,
        trust: Arc<TrustSlot>,
    ) -> anyhow::Result<Self> {
        let caller = Some(Caller { slot: node.clone(), renewals });
        Ok(Self { caller, ..Self::as_whom(address, node, trust)? })
    }

    /// The same control plane, called with an expired credential. It is good for a renewal, if at all.
    pub(super) fn as_lapsed(
        &self,
        lapsed: &Credential,
        trust: Arc<TrustSlot>,
    ) -> anyhow::Result<Self> {
        let slot = CredentialSlot::new(lapsed.facts().id().clone());
        if slot.store(lapsed.clone()).is_err() {
            anyhow::bail!("the expired certificate is of another identity");
        }
        Self::as_whom(self.address(), slot, trust)
    }

    fn as_whom(
        address: String,
        slot: Arc<CredentialSlot>,
        trust: Arc<TrustSlot>,
    ) -> anyhow::Result<Self> {
        let id = SpiffeId::control_plane(trust.load().trust_domain());
        Ok(Self {
            address: Arc::new(ArcSwap::from_pointee(address)),
            tls: Arc::new(client_config(slot, trust, ALPN_H2)?),
            server_name: ServerName::try_from(id.server_name())?,
            marked: true,
            caller: None,
        })
    }

    /// First contact: whoever shows the root with this hash, and a control plane under it.
    pub(crate) fn pinned(address: String, root_sha256: [u8; 32]) -> anyhow::Result<Self> {
        Ok(Self {
            address: Arc::new(ArcSwap::from_pointee(address)),
            tls: Arc::new(join_client_config(root_sha256, ALPN_H2)?),
            server_name: ServerName::try_from("join.hauberk.internal")?,
            marked: true,
            caller: None,
        })
    }

    /// Done when there is a credential to call with.
    pub(crate) async fn usable(&self) {
        let Some(Caller { slot, renewals }) = &self.caller else { return };
        let mut renewals = renewals.clone();
        loop {
            renewals.mark_unchanged();
            if slot.load().is_some() {
                return;
            }
            if renewals.changed().await.is_err() {
                // The node is gone, and so is this agent.
                return std::future::pending().await;
            }
        }
    }

    /// How many credentials the node has had so far.
    pub(super) fn renewals(&self) -> u64 {
        self.caller.as_ref().map_or(0, |caller| *caller.renewals.borrow())
    }

    /// Done when the node has had more of them than `seen`, which is brought up to date.
    pub(super) async fn renewed(&self, seen: &mut u64) {
        let Some(Caller { renewals, .. }) = &self.caller else {
            return std::future::pending().await;
        };
        let mut renewals = renewals.clone();
        let had = renewals.wait_for(|count| count != seen).await.map(|count| *count);
        match had {
            Ok(count) => *seen = count,
            Err(_) => std::future::pending().await,
        }
    }

    /// Calls go there from now on, those of all clones.
    pub(super) fn set_address(&self, address: String) {
        self.address.store(Arc::new(address));
    }

    /// The same without any privilege, as an ordinary program of this machine.
    pub(crate) fn unprivileged(self) -> Self {
        Self { marked: false, ..self }
    }

    pub(crate) fn address(&self) -> String {
        String::clone(&self.address.load())
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
        let address = self.address();
        let mut last = io::Error::new(io::ErrorKind::NotFound, format!("{address} has no address"));
        for address in lookup_host(&address).await? {
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

/// A status in words: what the control plane says, or that it could not be asked.
pub(crate) fn explain(status: &tonic::Status) -> anyhow::Error {
    let mut text = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(cause) = source {
        // rustls writes our own reasons as values of the program, not as a sentence.
        if let Some(failure) = cause.downcast_ref().and_then(hauberk_tls::reason_of) {
            return anyhow::anyhow!("{text}: {}", failure.detail);
        }
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    anyhow::anyhow!("{text}")
}
