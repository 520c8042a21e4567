//! The admission webhook: who applies an object is told at once what its status is going to say.
//!
//! It allows everything, changes nothing, and holds nobody up: an API server that gets no answer goes on
//! without. Its port is open to the whole cluster, and a warning says who is registered: so only the API server
//! is answered, which alone is told the path ([`Registrar`]); everybody else finds nothing.

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use hauberk_core::identity::TrustDomain;
use hauberk_kubernetes::{
    Client, Cluster, ManifestObject, Registration, Review, register, registration,
};
use hauberk_telemetry::{ControlPlaneMetrics, metrics};
use hauberk_tls::{
    NamedSlot,
    limiter::{Caller, FairRoom, HandshakeLimiter},
    named_server_config, sha256, signing_request,
};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body, Bytes, Incoming},
    header::{ALLOW, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::{Semaphore, watch},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::{
    api::Shared,
    ca::{Authority, Signer},
    handshake::shake,
    kubernetes::pem,
    policy::warnings,
};

/// The Service that the API server asks; its name is in the certificate.
const SERVICE: &str = "hauberk-control-plane";

/// HTTP over TLS: the one version that API servers speak to webhooks.
const ALPN_HTTP: &[u8] = b"http/1.1";

/// How long the webhook's certificate lives, and when there is a new one at the latest: two may fail.
const CERTIFICATE_LIFETIME: Duration = Duration::from_secs(3600);
const CERTIFICATE_RENEWAL: Duration = Duration::from_secs(1200);

/// One question a connection, and who takes longer is none that waits: API servers give up after 2 s.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(5);

/// A handshake that takes longer is given up, as the API server gives it up.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(2);

/// Connections at once after their handshake. Above it, the oldest one of the address with most has to go.
const CONNECTIONS: usize = 1_024;

/// Pause after a failed accept, so that being out of descriptors does not spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// The longest question: an object as it is to be and as it was.
const MAX_QUESTION: usize = 1024 * 1024;

/// Questions that are read and judged at once; the rest waits its turn.
const JUDGING: usize = 4;

/// Where the API server asks, without the part that only it knows.
const PATH: &str = "/warnings/";

/// The length of that part: 128 bits as hex.
const SECRET: usize = 32;

/// How often it is looked whether the API server knows what it must, and whether the certificate is of who issues.
const LOOK: Duration = Duration::from_secs(5);

/// What the webhook is made of.
pub(crate) struct Webhook {
    pub(crate) client: Client,
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) namespace: String,
}

impl Webhook {
    /// Issues its certificate and starts it, until the program ends. The leader tells the API server of it.
    pub(crate) fn start(
        self,
        listener: TcpListener,
        leads: watch::Receiver<bool>,
        shared: Arc<Shared>,
    ) -> anyhow::Result<()> {
        let mut certificate = Certificate::new(format!("{SERVICE}.{}.svc", self.namespace));
        certificate.look(&shared.authority).context("issue the webhook's certificate")?;
        let tls = named_server_config(certificate.slot.clone(), ALPN_HTTP)
            .context("set up the webhook's TLS")?;
        let (path, known) = watch::channel(None);
        let registrar = Registrar { client: self.client, leads, shared: shared.clone(), path };
        let desk = Arc::new(Desk {
            judge: judge(self.cluster, shared.authority.trust_domain().clone()),
            metrics: shared.metrics.clone(),
            path: known,
            judging: Arc::new(Semaphore::new(JUDGING)),
        });
        let stopping = shared.stopping.clone();
        tokio::spawn(desk.serve(listener, TlsAcceptor::from(Arc::new(tls)), stopping));
        tokio::spawn(registrar.run());
        tokio::spawn(certificate.tend(shared));
        Ok(())
    }
}

/// What there is to warn of an object; nothing if too little is known to say.
type Judge = Arc<dyn Fn(ManifestObject) -> Option<Vec<String>> + Send + Sync>;

fn judge(cluster: Arc<Cluster>, trust_domain: TrustDomain) -> Judge {
    Arc::new(move |object: ManifestObject| {
        let known = cluster.unlisted().is_empty();
        known.then(|| warnings(cluster.snapshot(), object, &trust_domain, hauberk_tls::now()))
    })
}

/// Renewed in memory, of this replica's own intermediate. It is nobody's in the mesh.
struct Certificate {
    name: String,
    slot: Arc<NamedSlot>,
    /// What issued it, and when.
    issued: Option<(Arc<Signer>, Instant)>,
}

impl Certificate {
    fn new(name: String) -> Self {
        Self { name, slot: Arc::default(), issued: None }
    }

    /// Renews it if that is due, and if another signer issues by now: the API server is told of a root for as
    /// long as agents are, which may be shorter than this lives. Returns whether it did.
    fn look(&mut self, authority: &Authority) -> anyhow::Result<bool> {
        let signer = authority.signer();
        let is_good = self.issued.as_ref().is_some_and(|(issuer, at)| {
            Arc::ptr_eq(issuer, &signer) && at.elapsed() < CERTIFICATE_RENEWAL
        });
        if is_good {
            return Ok(false);
        }
        let (key, request) = signing_request()?;
        let now = hauberk_tls::now();
        let issued = authority.issue_for_server(&self.name, &request, CERTIFICATE_LIFETIME, now)?;
        self.slot.store(issued.chain, &key)?;
        self.issued = Some((signer, Instant::now()));
        Ok(true)
    }

    async fn tend(mut self, shared: Arc<Shared>) {
        let mut is_told = false;
        loop {
            tokio::time::sleep(LOOK).await;
            let looked = self.look(&shared.authority);
            if let Err(error) = &looked
                && !is_told
            {
                tracing::error!(
                    error = format!("{error:#}"),
                    "the webhook's certificate could not be renewed"
                );
            }
            is_told = looked.is_err();
        }
    }
}

/// Sees to it that the API server and this replica know of each other.
struct Registrar {
    client: Client,
    leads: watch::Receiver<bool>,
    shared: Arc<Shared>,
    path: watch::Sender<Option<String>>,
}

impl Registrar {
    async fn run(self) {
        loop {
            if let Err(error) = self.look().await {
                tracing::info!(
                    error = format!("{error:#}"),
                    "the API server could not be told of the webhook"
                );
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The path is made by the leader and kept in the API server's configuration of the webhook, which only
    /// administrators can read. So all replicas have the same.
    async fn look(&self) -> anyhow::Result<()> {
        let Some(mut told) = registration(&self.client).await? else {
            self.path.send_replace(None);
            return Ok(());
        };
        told.path = told.path.filter(|path| is_secret(path));
        // All that are trusted: replicas may issue under two of them for a while.
        let roots = self.shared.authority.roots();
        let roots: String = roots.iter().map(|root| pem(root)).collect();
        let complete = told.path.is_some() && told.ca_bundle == roots.as_bytes();
        let leads = *self.leads.borrow();
        if leads && !complete {
            let path = told.path.map_or_else(secret_path, Ok)?;
            told = Registration { ca_bundle: roots.into_bytes(), path: Some(path) };
            register(&self.client, &told).await?;
            tracing::info!("the API server is told of the webhook");
        }
        self.path.send_replace(told.path);
        Ok(())
    }
}

fn is_secret(path: &str) -> bool {
    path.strip_prefix(PATH).is_some_and(|secret| secret.len() == SECRET)
}

fn secret_path() -> anyhow::Result<String> {
    let mut bytes = [0; SECRET / 2];
    getrandom::fill(&mut bytes)
        .map_err(|error| anyhow::anyhow!("draw the webhook's path: {error}"))?;
    Ok(format!("{PATH}{}", hex::encode(bytes)))
}

/// Where questions are answered.
struct Desk {
    judge: Judge,
    metrics: Arc<ControlPlaneMetrics>,
    path: watch::Receiver<Option<String>>,
    judging: Arc<Semaphore>,
}

impl Desk {
    async fn serve(
        self: Arc<Self>,
        listener: TcpListener,
        tls: TlsAcceptor,
        stopping: CancellationToken,
    ) {
        let (limiter, open) = (HandshakeLimiter::new(), FairRoom::new(CONNECTIONS, CONNECTIONS));
        loop {
            let accepted = tokio::select! {
                () = stopping.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::debug!(%error, "accepting a connection to the webhook failed");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                    continue;
                }
            };
            let (desk, tls) = (self.clone(), tls.clone());
            let (limiter, open) = (limiter.clone(), open.clone());
            tokio::spawn(async move {
                let stream = match shake(&limiter, &tls, stream, address, HANDSHAKE_TIMEOUT).await {
                    Ok(stream) => stream,
                    Err(error) => {
                        tracing::debug!(addr = %address, %error, "a connection to the webhook failed");
                        return;
                    }
                };
                // Who floods the port is alone in giving way: the API server has another address.
                let mut slot = open.enter(Arc::new(Caller::at(address.ip())));
                let served = tokio::time::timeout(CONNECTION_LIFETIME, desk.converse(stream));
                tokio::select! {
                    () = slot.displaced() => {
                        tracing::debug!(addr = %address, "a connection to the webhook gave way to newer ones");
                    }
                    served = served => match served {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => {
                            tracing::debug!(addr = %address, %error, "a connection to the webhook failed");
                        }
                        Err(_) => {
                            tracing::debug!(addr = %address, "a connection to the webhook took too long");
                        }
                    },
                }
            });
        }
    }

    /// One question and its answer.
    async fn converse<S>(self: Arc<Self>, stream: S) -> hyper::Result<()>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let service = service_fn(move |request: Request<Incoming>| {
            let desk = Arc::clone(&self);
            async move { Ok::<_, Infallible>(desk.answer(request).await) }
        });
        let conversation = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(CONNECTION_LIFETIME)
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), service);
        conversation.await
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        if !self.is_asked_at(request.uri().path()) {
            return text(StatusCode::NOT_FOUND, "there is nothing here\n".to_owned());
        }
        if request.method() != Method::POST {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "use POST\n".to_owned());
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("POST"));
            return response;
        }
        match self.review(request.into_body()).await {
            Ok(answer) => {
                let mut response = Response::new(Full::new(answer.into()));
                let json = HeaderValue::from_static("application/json");
                response.headers_mut().insert(CONTENT_TYPE, json);
                response
            }
            Err(refusal) => {
                self.metrics.admission_review(metrics::Review::Refused);
                tracing::debug!(error = refusal.why, "a question to the webhook is refused");
                text(refusal.status, format!("{}\n", refusal.why))
            }
        }
    }

    fn is_asked_at(&self, path: &str) -> bool {
        // Hashed, so that the time this takes tells nothing of the path.
        let known = self.path.borrow();
        known.as_deref().is_some_and(|known| sha256(known.as_bytes()) == sha256(path.as_bytes()))
    }

    async fn review(&self, body: Incoming) -> Result<Vec<u8>, Refusal> {
        let long = || Refusal {
            status: StatusCode::PAYLOAD_TOO_LARGE,
            why: format!("more than {MAX_QUESTION} bytes are no question"),
        };
        let limit = u64::try_from(MAX_QUESTION).unwrap_or(u64::MAX);
        if body.size_hint().lower() > limit {
            return Err(long());
        }
        // Before anything is read: what is in memory at once is bounded. It is never closed.
        let turn = self.judging.clone().acquire_owned().await;
        let body = match Limited::new(body, MAX_QUESTION).collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) if error.is::<LengthLimitError>() => return Err(long()),
            Err(error) => return Err(Refusal::bad(format!("it could not be read: {error}"))),
        };
        let question = Review::read(&body).map_err(|error| Refusal::bad(error.to_string()))?;
        let Some(object) = question.object else {
            self.metrics.admission_review(metrics::Review::Quiet);
            return Ok(question.answer.allow(Vec::new()));
        };
        let (source, judge) = (object.source(), self.judge.clone());
        let judged = tokio::task::spawn_blocking(move || {
            let judged = judge(object);
            drop(turn);
            judged
        });
        let told = judged.await.unwrap_or_else(|error| {
            tracing::error!(%error, "an object could not be judged");
            None
        });
        self.metrics.admission_review(match &told {
            None => metrics::Review::NotReady,
            Some(warnings) if warnings.is_empty() => metrics::Review::Quiet,
            Some(_) => metrics::Review::Warned,
        });
        tracing::debug!(object = source, warnings = ?told, "an object is applied");
        Ok(question.answer.allow(told.unwrap_or_default()))
    }
}

/// Why a question is not answered.
struct Refusal {
    status: StatusCode,
    why: String,
}

impl Refusal {
    fn bad(why: String) -> Self {
        Self { status: StatusCode::BAD_REQUEST, why }
    }
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, plain);
    response
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use serde_json::{Value, json};
    use tempfile::TempDir;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::ca::open_own;

    const SECRET_PATH: &str = "/warnings/0123456789abcdef0123456789abcdef";

    fn desk(path: Option<&str>, told: Option<&str>) -> Arc<Desk> {
        let told = told.map(|warning| vec![warning.to_owned()]);
        Arc::new(Desk {
            judge: Arc::new(move |_: ManifestObject| told.clone()),
            metrics: Arc::new(ControlPlaneMetrics::new().unwrap()),
            path: watch::channel(path.map(str::to_owned)).1,
            judging: Arc::new(Semaphore::new(1)),
        })
    }

    fn known() -> Arc<Desk> {
        desk(Some(SECRET_PATH), Some("beware"))
    }

    /// The status and the body.
    async fn ask(desk: Arc<Desk>, request: &[u8]) -> (String, String) {
        let (mut caller, stream) = tokio::io::duplex(4 * MAX_QUESTION);
        let served = tokio::spawn(desk.converse(stream));
        caller.write_all(request).await.unwrap();
        let mut answer = String::new();
        caller.read_to_string(&mut answer).await.unwrap();
        // An error here is that of a question that was not read to its end.
        drop(served.await.unwrap());
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap();
        (status.to_owned(), body.to_owned())
    }

    fn request(method: &str, path: &str, body: &str) -> Vec<u8> {
        let length = body.len();
        format!("{method} {path} HTTP/1.1\r\nhost: it\r\ncontent-length: {length}\r\n\r\n{body}")
            .into_bytes()
    }

    fn question() -> String {
        json!({
            "apiVersion": "admission.k8s.io/v1",
            "kind": "AdmissionReview",
            "request": {
                "uid": "1-2-3",
                "kind": {"group": "hauberk.dev", "version": "v1alpha1", "kind": "Guardrail"},
                "resource": {
                    "group": "hauberk.dev",
                    "version": "v1alpha1",
                    "resource": "guardrails",
                },
                "operation": "UPDATE",
                "userInfo": {},
                "object": {
                    "apiVersion": "hauberk.dev/v1alpha1",
                    "kind": "Guardrail",
                    "metadata": {"name": "pci"},
                    "spec": {},
                },
            },
        })
        .to_string()
    }

    #[tokio::test]
    async fn an_object_is_allowed_with_its_warnings() {
        let desk = known();
        let (status, body) =
            ask(Arc::clone(&desk), &request("POST", SECRET_PATH, &question())).await;
        assert_eq!(status, "200");
        let answer: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(answer["response"]["allowed"], true);
        assert_eq!(answer["response"]["uid"], "1-2-3");
        assert_eq!(answer["response"]["warnings"], json!(["beware"]));
        assert_eq!(desk.judging.available_permits(), 1);
    }

    #[tokio::test]
    async fn before_the_cluster_is_known_an_object_is_allowed_without_a_word() {
        let desk = desk(Some(SECRET_PATH), None);
        let (status, body) = ask(desk, &request("POST", SECRET_PATH, &question())).await;
        assert_eq!(status, "200");
        let answer: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(answer["response"]["allowed"], true);
        assert!(answer["response"].get("warnings").is_none(), "{answer}");
    }

    #[tokio::test]
    async fn who_does_not_know_the_path_finds_nothing() {
        let wrong = "/warnings/0123456789abcdef0123456789abcdee";
        for path in ["/", "/warnings/", "/warnings", wrong, "/metrics"] {
            for method in ["GET", "POST"] {
                let (status, body) = ask(known(), &request(method, path, &question())).await;
                assert_eq!((status.as_str(), body.as_str()), ("404", "there is nothing here\n"));
            }
        }
        // Nobody has been told of a path.
        let (status, _) = ask(desk(None, None), &request("POST", SECRET_PATH, &question())).await;
        assert_eq!(status, "404");
        let (status, _) = ask(desk(None, None), &request("POST", "/", &question())).await;
        assert_eq!(status, "404");
    }

    #[tokio::test]
    async fn other_methods_and_what_is_no_question_are_refused() {
        let (status, body) = ask(known(), &request("GET", SECRET_PATH, "")).await;
        assert_eq!((status.as_str(), body.as_str()), ("405", "use POST\n"));
        for body in ["", "{", "[]", "not json", "{\"request\": {}}"] {
            let (status, said) = ask(known(), &request("POST", SECRET_PATH, body)).await;
            assert_eq!(status, "400", "{body}");
            assert!(said.starts_with("it is not an AdmissionReview: "), "{said}");
        }
        // Nested deeper than anybody reads.
        let deep = format!("{{\"kind\": {}", "[".repeat(100_000));
        let (status, _) = ask(known(), &request("POST", SECRET_PATH, &deep)).await;
        assert_eq!(status, "400");
    }

    #[tokio::test]
    async fn a_question_that_is_too_long_is_refused_whether_it_says_so_or_not() {
        let long = "x".repeat(MAX_QUESTION + 1);
        let (status, _) = ask(known(), &request("POST", SECRET_PATH, &long)).await;
        assert_eq!(status, "413");
        let chunked = format!(
            "POST {SECRET_PATH} HTTP/1.1\r\nhost: it\r\ntransfer-encoding: chunked\r\n\r\n\
             {:x}\r\n{long}\r\n0\r\n\r\n",
            long.len()
        );
        let (status, _) = ask(known(), chunked.as_bytes()).await;
        assert_eq!(status, "413");
    }

    #[test]
    fn the_certificate_is_renewed_as_soon_as_another_signer_issues() {
        let trust_domain: TrustDomain = "prod.example".parse().unwrap();
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let signer = |folder: &TempDir| {
            open_own(&folder.path().join("ca"), &trust_domain, hauberk_tls::now()).unwrap()
        };
        let authority = Authority::new(trust_domain.clone(), signer(&folders[0]));
        let mut certificate = Certificate::new("it.hauberk-system.svc".to_owned());
        assert!(certificate.look(&authority).unwrap(), "there was none");
        assert!(!certificate.look(&authority).unwrap(), "there is nothing new");
        // Under another root.
        authority.put(signer(&folders[1]));
        assert!(certificate.look(&authority).unwrap(), "it is of a signer that issues no more");
        assert!(!certificate.look(&authority).unwrap(), "there is nothing new");
        let (issuer, _) = certificate.issued.unwrap();
        assert_eq!(*issuer.root(), authority.root());
    }

    #[test]
    fn paths_are_secret_and_none_is_like_another() {
        let (one, other) = (secret_path().unwrap(), secret_path().unwrap());
        assert_ne!(one, other);
        assert!(is_secret(&one) && is_secret(SECRET_PATH));
        for path in ["", "/", "/warnings/", "/warnings/short", "0123456789abcdef0123456789abcdef"] {
            assert!(!is_secret(path), "{path}");
        }
    }
}
