//! A control plane that runs in a test, and who connects to it.
#![allow(dead_code, reason = "each test of this folder uses some of it")]

use std::{
    fs,
    future::Future,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::{Duration, Instant},
};

use hauberk_control_plane::{app, config::Args};
use hauberk_core::{
    identity::{SpiffeId, TrustDomain},
    time::Timestamp,
};
use hauberk_proto::{
    token::JoinToken,
    v1::{self, enrollment_client::EnrollmentClient, operator_client::OperatorClient},
};
use hauberk_tls::{
    Credential, CredentialSlot, PrivateKey, TrustBundle, TrustSlot, client_config,
    join_client_config, signing_request,
};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::{CertificateDer, ServerName};
use tempfile::TempDir;
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn trust_domain() -> TrustDomain {
    "example.org".parse().unwrap()
}

/// A control plane's folder and address.
pub(crate) struct Place {
    folder: TempDir,
    listen: SocketAddr,
}

impl Place {
    pub(crate) fn new(manifests: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("manifests")).unwrap();
        // A port that is free: tokens name it, so it cannot be left to the system. At an address of this place's own, or
        // somebody's outgoing connection may have the port by then.
        static PLACES: AtomicU8 = AtomicU8::new(1);
        let [.., high, low] = std::process::id().to_be_bytes();
        let own = Ipv4Addr::new(127, high | 0x80, low, PLACES.fetch_add(1, Ordering::Relaxed));
        let listen = TcpListener::bind((own, 0)).unwrap().local_addr().unwrap();
        let place = Self { folder, listen };
        place.put(manifests);
        place
    }

    /// Replaces all manifests at once.
    pub(crate) fn put(&self, manifests: &str) {
        let folder = self.folder.path().join("manifests");
        let hidden = folder.join(".new");
        fs::write(&hidden, manifests).unwrap();
        fs::rename(hidden, folder.join("all.yaml")).unwrap();
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// Runs the control plane for as long as the test takes.
    pub(crate) async fn serve(&self, test: impl Future<Output = ()>) {
        self.serve_with(|_| {}, test).await;
    }

    /// The same, with some settings changed.
    pub(crate) async fn serve_with(
        &self,
        change: impl FnOnce(&mut Args),
        test: impl Future<Output = ()>,
    ) {
        let mut args = Args {
            data: self.data(),
            manifests: self.folder.path().join("manifests"),
            listen: self.listen,
            metrics: "127.0.0.1:0".parse().unwrap(),
            ..Args::defaults(trust_domain())
        };
        change(&mut args);
        tokio::select! {
            outcome = app::run(args, std::future::pending()) => panic!("it ended: {outcome:?}"),
            () = test => {}
        }
    }

    pub(crate) async fn operator(&self) -> OperatorClient<Channel> {
        let path = self.data().join(app::OPERATOR_SOCKET);
        let begun = Instant::now();
        while UnixStream::connect(&path).await.is_err() {
            assert!(begun.elapsed() < PATIENCE, "no operator socket");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let connector = service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://operator.hauberk.internal");
        OperatorClient::new(endpoint.connect_with_connector(connector).await.unwrap())
    }

    /// A channel to it, which connects when it is used.
    pub(crate) fn channel(&self, tls: ClientConfig, name: String) -> Channel {
        let (address, connector) = (self.listen, TlsConnector::from(Arc::new(tls)));
        let name = ServerName::try_from(name).unwrap();
        let connector = service_fn(move |_: Uri| {
            let (connector, name) = (connector.clone(), name.clone());
            async move {
                let stream = TcpStream::connect(address).await?;
                connector.connect(name, stream).await.map(TokioIo::new)
            }
        });
        let endpoint = Endpoint::from_static("https://control-plane.hauberk.internal");
        endpoint.connect_with_connector_lazy(connector)
    }

    /// Joins as machine-a does.
    pub(crate) async fn join(&self) -> Joined {
        let wanted = v1::CreateTokenRequest { node: "machine-a".to_owned(), ttl_seconds: 60 };
        let answer = self.operator().await.create_token(wanted).await.unwrap().into_inner();
        let token: JoinToken = answer.token.parse().unwrap();
        let pinned = join_client_config(token.root_sha256, b"h2").unwrap();
        let channel = self.channel(pinned, "join.hauberk.internal".to_owned());
        let (key, certificate_request) = signing_request().unwrap();
        let request = v1::JoinRequest { token_secret: token.secret.to_vec(), certificate_request };
        let answer = EnrollmentClient::new(channel).join(request).await.unwrap().into_inner();
        Joined::new(key, answer)
    }
}

/// What a node has of its identity.
pub(crate) struct Joined {
    pub(crate) key: PrivateKey,
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) roots: Vec<CertificateDer<'static>>,
}

impl Joined {
    pub(crate) fn new(key: PrivateKey, answer: v1::NodeCredential) -> Self {
        let certificates = |list: Vec<Vec<u8>>| -> Vec<CertificateDer<'static>> {
            list.into_iter().map(CertificateDer::from).collect()
        };
        Self {
            key,
            chain: certificates(answer.certificate_chain),
            roots: certificates(answer.trust_bundle),
        }
    }

    /// A channel to the control plane with it, whether the certificate is valid now or at `then`.
    pub(crate) fn channel_as_of(&self, place: &Place, then: Timestamp) -> Channel {
        let trust = TrustBundle::new(trust_domain(), self.roots.clone(), hauberk_tls::now());
        let credential = Credential::new(self.chain.clone(), &self.key, then).unwrap();
        let slot = CredentialSlot::new(credential.facts().id().clone());
        slot.store(credential).unwrap();
        let tls = client_config(slot, TrustSlot::new(trust.unwrap()), b"h2").unwrap();
        place.channel(tls, SpiffeId::control_plane(&trust_domain()).server_name())
    }

    pub(crate) fn channel(&self, place: &Place) -> Channel {
        self.channel_as_of(place, hauberk_tls::now())
    }
}
