//! The wiring: everything is opened and bound first, then runs until it is told to stop.

use std::{
    future::Future,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use hauberk_core::{
    identity::{SpiffeId, TrustDomain},
    time::Timestamp,
};
use hauberk_proto::v1::{
    enrollment_server::EnrollmentServer, operator_server::OperatorServer,
    state_server::StateServer, workload_identity_server::WorkloadIdentityServer,
};
use hauberk_telemetry::{
    ControlPlaneMetrics, Health, LogFormat as TelemetryFormat, LogOptions, State as HealthState,
};
use hauberk_tls::{
    Credential, CredentialSlot, TrustBundle, TrustSlot, files::private_folder,
    shared_server_config, signing_request,
};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::{
    api::{Enrollment, Operator, Shared, State, WorkloadIdentity},
    ca::{Authority, CaError},
    config::{Args, LogFormat, MAX_GRACE},
    custody::{self, Custody, Look, Pace},
    issuance::IssuanceRate,
    kubernetes,
    policy::{self, Emptied, HEALTH_CHECK, Publisher},
    serve,
    store::Store,
};

/// How often the CA's own certificates are looked at.
const CA_CHECK: Duration = Duration::from_secs(30);

/// How long running calls may take to end when the program stops.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// gRPC over TLS.
const ALPN_H2: &[u8] = b"h2";

/// In a cluster: the port of the operators' questions, on loopback alone. The way to it is the permission to
/// forward ports to the control plane's pods.
pub const OPERATOR_PORT: u16 = 9466;

/// The operator socket's name in the data folder.
pub const OPERATOR_SOCKET: &str = "operator.sock";

/// Runs the control plane as a program: logs, runtime, signals, exit code.
#[must_use]
pub fn main(args: Args) -> ExitCode {
    let outcome = init_logs(args.log_format).and_then(|()| {
        hauberk_telemetry::process::raise_file_limit();
        hauberk_telemetry::process::keep_memory_private();
        tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .context("start the runtime")?
            .block_on(async {
                let stop = hauberk_telemetry::process::stop_signal(args.stop_with_stdin)
                    .context("listen for signals")?;
                run(args, stop).await
            })
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn init_logs(format: LogFormat) -> anyhow::Result<()> {
    hauberk_telemetry::log::init(&LogOptions {
        format: match format {
            LogFormat::Text => TelemetryFormat::Text,
            LogFormat::Json => TelemetryFormat::Json,
        },
        filter: None,
    })
    .context("set up logs")
}

/// Runs the control plane until `stop` is done.
///
/// # Errors
/// If anything cannot be opened or bound, before anything is served.
pub async fn run(
    args: Args,
    stop: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<()> {
    let advertised = args.advertised().map_err(anyhow::Error::msg)?;
    private_folder(&args.data).context("open the data folder")?;
    let store = Arc::new(Store::open(&args.data.join("store.redb"))?);
    demand_same_trust_domain(&store, &args.trust_domain, &args.data)?;
    let metrics = Arc::new(ControlPlaneMetrics::new().context("set up metrics")?);
    let mut checks = vec!["store", custody::HEALTH_CHECK];
    checks.extend(args.kubernetes.then_some(HEALTH_CHECK));
    let health = Health::new(&checks);
    health.set("store", HealthState::Ready);
    let stopping = CancellationToken::new();
    // However this ends.
    let _ended = stopping.clone().drop_guard();
    // First of all: whoever asks is told what the CA waits for.
    serve_metrics(&args, &metrics, &health, &stopping).await?;
    tokio::pin!(stop);

    let (cluster, mut custody) = open_ca(&args).await.context("open the certificate authority")?;
    let authority = tokio::select! {
        authority = custody.begin(&health) => authority.context("open the certificate authority")?,
        () = &mut stop => return Ok(()),
    };
    if args.new_epoch {
        let epoch = store.begin_epoch(policy::seconds(hauberk_tls::now()))?;
        tracing::warn!(target: "hauberk.audit", epoch, "the numbering of the revisions begins anew (--new-epoch)");
    }
    let publisher = Publisher::start(
        cluster.is_none().then(|| args.manifests.clone()),
        if args.allow_empty { Emptied::Confirmed } else { Emptied::Refused },
        args.trust_domain.clone(),
        store.clone(),
        metrics.clone(),
    )?;
    let own = own_credential(&authority, args.node_certificate_lifetime)?;
    let trust = TrustSlot::new(bundle_of(&authority)?);
    let names = Arc::new(AnyName(own.clone()));
    // The nodes of a cluster are attested by their agents' pods, and need no certificate for it.
    let grace = if args.kubernetes { Duration::ZERO } else { args.node_renewal_grace };
    // Older ones are let in for as long, to be told in words what is wrong with them.
    let let_in = if grace.is_zero() { grace } else { MAX_GRACE };
    let tls = shared_server_config(names, trust.clone(), ALPN_H2, let_in).context("set up TLS")?;

    let listener = bind(args.listen, "agents").await?;
    let webhook_listener = match args.webhook {
        None => None,
        Some(address) => Some(bind(address, "the webhook").await?),
    };
    let operator_path = args.data.join(OPERATOR_SOCKET);
    let operators = serve::operator_connections(&operator_path)
        .with_context(|| format!("listen on {}", operator_path.display()))?;

    let cluster_operators = match cluster {
        None => None,
        Some(_) => Some(loopback_listeners(OPERATOR_PORT).await?),
    };

    let shared = Arc::new(Shared {
        authority,
        store,
        publisher: publisher.clone(),
        fleet: Arc::default(),
        issuance: IssuanceRate::default(),
        metrics: metrics.clone(),
        kubernetes: cluster.as_ref().map(|cluster| cluster.api(&args.agent_service_account)),
        advertised,
        workload_lifetime: args.workload_certificate_lifetime,
        node_lifetime: args.node_certificate_lifetime,
        renewal_grace: grace,
        stopping: stopping.clone(),
    });
    health.set(custody::HEALTH_CHECK, HealthState::Ready);
    tokio::spawn(forget_gone_nodes(shared.clone()));
    match cluster {
        None => drop(tokio::spawn(publisher.watch())),
        Some(cluster) => {
            let (webhook, fleet) = (cluster.webhook(), shared.fleet.clone());
            let (follower, writer) = cluster.follower(
                publisher,
                &args.trust_domain,
                health.clone(),
                fleet,
                args.taint_nodes,
            );
            if let Some(listener) = webhook_listener {
                webhook.start(listener, writer.leads.clone(), shared.clone())?;
            }
            tokio::spawn(follower.run());
            tokio::spawn(writer.run());
        }
    }
    let tending = Tending {
        shared: shared.clone(),
        custody,
        trust: trust.clone(),
        own,
        health,
        lifetime: args.node_certificate_lifetime,
    };
    tokio::spawn(tending.run());
    if cluster_operators.is_some() {
        tracing::info!(port = OPERATOR_PORT, "operators ask through the Kubernetes API");
    }
    for listener in cluster_operators.into_iter().flatten() {
        let server = Server::builder()
            .add_service(OperatorServer::new(Operator(shared.clone())))
            .serve_with_incoming_shutdown(
                TcpListenerStream::new(listener),
                stopping.clone().cancelled_owned(),
            );
        tokio::spawn(server);
    }
    let operator = Server::builder()
        .add_service(OperatorServer::new(Operator(shared.clone())))
        .serve_with_incoming_shutdown(operators, stopping.clone().cancelled_owned());
    let agents = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .max_concurrent_streams(64)
        .add_service(EnrollmentServer::new(Enrollment(shared.clone())))
        .add_service(WorkloadIdentityServer::new(WorkloadIdentity(shared.clone())))
        .add_service(StateServer::new(State(shared.clone())))
        .serve_with_incoming_shutdown(
            serve::tls_connections(listener, TlsAcceptor::from(Arc::new(tls)), trust, let_in),
            stopping.clone().cancelled_owned(),
        );
    tracing::info!(listen = %args.listen, metrics = %args.metrics, operator = %operator_path.display(),
        trust_domain = %args.trust_domain, revision = shared.publisher.current().revision, "ready");

    let servers = async { tokio::try_join!(operator, agents) };
    tokio::pin!(servers);
    tokio::select! {
        outcome = &mut servers => { outcome.context("serve")?; }
        () = &mut stop => {
            tracing::info!("stopping");
            stopping.cancel();
            // Agents' streams have no end of their own; they connect anew to the next process.
            drop(tokio::time::timeout(STOP_GRACE, servers).await);
        }
    }
    drop(std::fs::remove_file(&operator_path));
    Ok(())
}

/// With each revision nodes may have left the mesh.
async fn forget_gone_nodes(shared: Arc<Shared>) {
    let mut published = shared.publisher.subscribe();
    while published.changed().await.is_ok() {
        shared.forget_gone_nodes();
    }
}

/// Serves metrics and health until the program ends.
async fn serve_metrics(
    args: &Args,
    metrics: &ControlPlaneMetrics,
    health: &Health,
    stopping: &CancellationToken,
) -> anyhow::Result<()> {
    let listener = bind(args.metrics, "metrics").await?;
    let registries = vec![
        metrics.registry().clone(),
        hauberk_telemetry::metrics::process_registry().context("set up process metrics")?,
    ];
    let stopped = stopping.clone().cancelled_owned();
    tokio::spawn(hauberk_telemetry::serve(listener, registries, health.clone(), stopped));
    Ok(())
}

/// The cluster that this is one of, if it is, and what decides what issues.
async fn open_ca(args: &Args) -> anyhow::Result<(Option<kubernetes::Connection>, Custody)> {
    let lifetime = args.workload_certificate_lifetime.max(args.node_certificate_lifetime);
    let pace = Pace { look: CA_CHECK.min(args.node_certificate_lifetime / 4), lifetime };
    let trust_domain = args.trust_domain.clone();
    if !args.kubernetes {
        let (now, brought) = (hauberk_tls::now(), args.ca.as_deref());
        return Ok((None, Custody::alone(trust_domain, &args.data, brought, pace, now)?));
    }
    let (folder, secret) = (args.data.join("ca"), args.ca_secret.as_deref());
    let cluster = kubernetes::connect(&folder, &trust_domain, secret).await?;
    let (source, keep) = cluster.ca(&folder, secret);
    Ok((Some(cluster), Custody::new(trust_domain, source, keep, pace)))
}

/// Whose certificates are good here.
fn bundle_of(authority: &Authority) -> Result<TrustBundle, hauberk_tls::TrustError> {
    let roots = authority.roots().to_vec();
    TrustBundle::new(authority.trust_domain().clone(), roots, hauberk_tls::now())
}

fn demand_same_trust_domain(
    store: &Store,
    wanted: &TrustDomain,
    folder: &Path,
) -> anyhow::Result<()> {
    let kept = store.trust_domain(wanted.as_str())?;
    if kept == wanted.as_str() {
        return Ok(());
    }
    Err(CaError::OtherTrustDomain {
        folder: folder.display().to_string(),
        kept,
        wanted: wanted.to_string(),
    }
    .into())
}

/// One for each address family that there is; at least one.
async fn loopback_listeners(port: u16) -> anyhow::Result<Vec<TcpListener>> {
    let mut listeners = Vec::new();
    let mut refused = None;
    for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)] {
        match bind(SocketAddr::new(ip, port), "operators").await {
            Ok(listener) => listeners.push(listener),
            Err(error) => refused = Some(error),
        }
    }
    match refused {
        Some(error) if listeners.is_empty() => Err(error),
        Some(_) | None => Ok(listeners),
    }
}

async fn bind(address: std::net::SocketAddr, what: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("listen for {what} on {address}"))
}

/// Serves the control plane's own certificate whatever name is asked for: joining machines know it
/// by its root, agents by its identity.
#[derive(Debug)]
struct AnyName(Arc<CredentialSlot>);

impl rustls::server::ResolvesServerCert for AnyName {
    fn resolve(
        &self,
        _: rustls::server::ClientHello<'_>,
    ) -> Option<Arc<rustls::sign::CertifiedKey>> {
        rustls::client::ResolvesClientCert::resolve(self.0.as_ref(), &[], &[])
    }
}

fn own_credential(
    authority: &Authority,
    lifetime: Duration,
) -> anyhow::Result<Arc<CredentialSlot>> {
    let slot = CredentialSlot::new(SpiffeId::control_plane(authority.trust_domain()));
    renew_own(authority, &slot, lifetime)?;
    Ok(slot)
}

fn renew_own(
    authority: &Authority,
    slot: &CredentialSlot,
    lifetime: Duration,
) -> anyhow::Result<()> {
    let (key, request) = signing_request()?;
    let issued = authority.issue(slot.id(), &request, lifetime, hauberk_tls::now())?;
    let mut chain = issued.chain;
    // Joining machines pin the root by its hash, so it has to be there to be hashed.
    chain.push(authority.root());
    let credential = Credential::new(chain, &key, hauberk_tls::now())?;
    slot.store(credential)
        .map_err(|_| anyhow::anyhow!("the own certificate is of another identity"))
}

/// Keeps the CA, the intermediate and the own certificate, and says so in metrics.
struct Tending {
    shared: Arc<Shared>,
    custody: Custody,
    trust: Arc<TrustSlot>,
    own: Arc<CredentialSlot>,
    health: Health,
    lifetime: Duration,
}

impl Tending {
    async fn run(mut self) {
        loop {
            let now = hauberk_tls::now();
            let active = self.shared.authority.signer();
            let look = self.custody.look(Some(active.as_ref()), now).await;
            let notes = self.custody.tell(&look);
            let state = match self.take_up(look, now) {
                Ok(()) if notes.is_empty() => HealthState::Ready,
                Ok(()) => HealthState::ReadyBut(notes.join("; ")),
                Err(error) => {
                    tracing::error!(
                        error = format!("{error:#}"),
                        "the CA could not renew its own certificates"
                    );
                    HealthState::NotReady(format!("{error:#}"))
                }
            };
            self.health.set(custody::HEALTH_CHECK, state);
            self.shared.authority.note(notes);
            self.tell_ends();
            tokio::time::sleep(self.custody.pace()).await;
        }
    }

    fn take_up(&self, look: Look, now: Timestamp) -> anyhow::Result<()> {
        let authority = &self.shared.authority;
        let another = look.put(authority);
        if *authority.roots() != self.trust.load().roots() {
            self.trust.store(bundle_of(authority)?);
        }
        let renewed = authority.renew_intermediate(now)?;
        let due = self.own.load().is_none_or(|own| past_half(&own, self.lifetime, now));
        if another || renewed || due {
            renew_own(authority, &self.own, self.lifetime)?;
        }
        match authority.signer().is_good(now) {
            true => Ok(()),
            false => Err(CaError::Ended(authority.expiries().1).into()),
        }
    }

    fn tell_ends(&self) {
        let metrics = &self.shared.metrics;
        if let Some((ca, end)) = self.shared.authority.signer().upper_end() {
            metrics.set_ca_expiry(ca, system_time(end));
        }
        let (_, intermediate) = self.shared.authority.expiries();
        metrics.set_ca_expiry("intermediate", system_time(intermediate));
    }
}

fn past_half(credential: &Credential, lifetime: Duration, now: Timestamp) -> bool {
    credential.facts().not_after().since(now) < lifetime / 2
}

fn system_time(timestamp: Timestamp) -> std::time::SystemTime {
    let millis = u64::try_from(timestamp.unix_millis()).unwrap_or(0);
    std::time::SystemTime::UNIX_EPOCH + Duration::from_millis(millis)
}
