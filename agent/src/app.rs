//! The wiring: identity first, then what is enforced, then captures; and the way down.

use std::{future::Future, path::Path, process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context as _;
use hauberk_core::rotation::{self, Failure, Step};
use hauberk_linux::{Netns, capture};
use hauberk_telemetry::{
    Health, LogFormat as TelemetryFormat, LogOptions, RecordSink, State as HealthState,
    metrics::AgentMetrics,
    record::{Destination, RecordOptions},
};
use tokio::{net::TcpListener, sync::watch};

use crate::{
    capture::{Captures, StatusBoard},
    cni::{self, Installation, Server, Starting},
    config::{Args, LocalEdges, LogFormat},
    context::Context,
    identity::{
        Attestation, Identities, Node, PodToken, draw_jitter, open_node, renew_node, system_time,
    },
    policy::{Enforcer, POLICY_CHECK, Subscription},
};

/// Turns of tasks between two looks for what the network has. A turn of a bulk stream is some 150 µs: at
/// tokio's 61 of them, small exchanges would wait for 9 ms.
const EVENT_INTERVAL: u32 = 8;

/// How long closing records may take to be written.
const RECORDS_GRACE: Duration = Duration::from_secs(2);

/// Wall-clock jumps are noticed at this pace.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);

const NODE_CHECK: &str = "node_certificate";

/// Runs the agent as a program: logs, runtime, signals, exit code.
#[must_use]
pub fn main(args: Args) -> ExitCode {
    let outcome = hauberk_telemetry::log::init(&LogOptions {
        format: match args.log_format {
            LogFormat::Text => TelemetryFormat::Text,
            LogFormat::Json => TelemetryFormat::Json,
        },
        filter: None,
    })
    .context("set up logs")
    .and_then(|()| {
        hauberk_telemetry::process::raise_file_limit();
        hauberk_telemetry::process::keep_memory_private();
        tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .event_interval(EVENT_INTERVAL)
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

/// Runs the agent until `stop` is done, then drains.
///
/// # Errors
/// If it has no identity and cannot get one, or cannot open or bind what it needs.
pub async fn run(
    args: Args,
    stop: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<()> {
    hauberk_tls::files::private_folder(&args.data).context("open the data folder")?;
    let _lock = lock(&args.data)?;
    let metrics = AgentMetrics::new().context("set up metrics")?;
    let metrics_listener = TcpListener::bind(args.metrics)
        .await
        .with_context(|| format!("listen for metrics on {}", args.metrics))?;
    let destination = if args.records == Path::new("-") {
        Destination::Stdout
    } else {
        Destination::File(args.records.clone())
    };
    let records = RecordSink::start(RecordOptions::new(destination), metrics.records_lost())?;
    let health = Health::new(&[NODE_CHECK, POLICY_CHECK]);
    let attestation = match (&args.kubernetes_token, &args.trust_bundle, &args.control_plane) {
        (Some(token), Some(roots), Some(address)) => Attestation::Pod(PodToken {
            token: token.clone(),
            roots: roots.clone(),
            address: address.clone(),
        }),
        _ => Attestation::Token(args.join_token.clone()),
    };
    let mut stop = std::pin::pin!(stop);
    // A pod tries for a while, when the control plane is away; a token's only try is over soon, and whoever
    // gave it wants to hear how it went.
    let tries_again = matches!(attestation, Attestation::Pod(_));
    let opening = open_node(&args.data, attestation, args.control_plane.as_deref());
    let node = tokio::select! {
        node = opening => node?,
        () = &mut stop, if tries_again => return Ok(()),
    };
    let enforcer = Arc::new(Enforcer::open(&args.data, metrics.clone(), health.clone()));
    let context = Arc::new(Context::new(
        node.name.clone(),
        node.trust.clone(),
        metrics.clone(),
        records.clone(),
        args.local_edges,
        args.records_per_key.unwrap_or(u64::MAX),
        enforcer.subscribe(),
    ));
    let identities = Identities::new(
        &args.data,
        node.control_plane.clone(),
        node.trust.clone(),
        metrics.clone(),
    )?;
    let board = StatusBoard::new(context.clone(), node.slot.clone());
    let starting = Starting::default();
    let (plugin_server, installation) = match &args.cni_plugin {
        None => (None, None),
        Some(plugin) => {
            let server = Server {
                node: node.name.clone(),
                netns_dir: args.netns_dir.clone(),
                board: board.clone(),
                starting: starting.clone(),
                snapshots: enforcer.subscribe(),
            };
            let installation = Installation {
                plugin: plugin.clone(),
                bin: args.cni_bin_dir.clone(),
                configurations: args.cni_conf_dir.clone(),
                socket: args.cni_socket.clone(),
                exempt: args.cni_exempt_namespaces.clone(),
            };
            (Some((server, cni::listen(&args.cni_socket)?)), Some(installation))
        }
    };
    let captures = Captures {
        context: context.clone(),
        identities,
        netns_dir: args.netns_dir.clone(),
        cri_socket: args.cri_socket.clone(),
        starting: starting.clone(),
        installation,
        board: board.clone(),
        snapshots: enforcer.subscribe(),
    };
    let (renewed, node_renewed) = watch::channel(0);
    let subscription = Subscription {
        enforcer,
        control_plane: node.control_plane.clone(),
        metrics: metrics.clone(),
        records: records.clone(),
        edges: context.edges.clone(),
        status: board,
        node_renewed,
    };
    if args.local_edges == LocalEdges::VerifiedLocal {
        tracing::info!(
            "connections between workloads of this node are carried without TLS, once both are verified"
        );
    }
    tracing::info!(node = node.name, metrics = %args.metrics, control_plane = node.control_plane.address(), "ready");

    let server = tokio::spawn(hauberk_telemetry::serve(
        metrics_listener,
        vec![
            metrics.registry().clone(),
            hauberk_telemetry::metrics::process_registry().context("set up process metrics")?,
        ],
        health.clone(),
        context.cut.clone().cancelled_owned(),
    ));
    let captures = tokio::spawn(captures.run());
    let plugin_server = plugin_server.map(|(server, listener)| tokio::spawn(server.run(listener)));
    let subscription = tokio::spawn(subscription.run());
    let tending = tokio::spawn(tend_node(node, health, metrics, renewed));
    stop.await;

    tracing::info!(open = context.open_connections(), "stopping, draining open connections");
    context.stopping.cancel();
    // Pods that start from now on wait for the next agent.
    if let Some(server) = plugin_server {
        server.abort();
    }
    let captured = captures.await.context("stop capturing")?;
    drain(&context, args.drain).await;
    context.cut.cancel();
    // A moment for the resets to leave.
    drain(&context, Duration::from_secs(1)).await;
    if args.remove_rules_on_stop {
        captured.remove_rules();
        // Nobody would answer the plugin any more.
        if args.cni_plugin.is_some()
            && let Err(error) = cni::uninstall(&args.cni_bin_dir, &args.cni_conf_dir)
        {
            tracing::error!(error = format!("{error:#}"), "the CNI plugin stays in place");
        }
    }
    subscription.abort();
    tending.abort();
    server.abort();
    let flushed = tokio::task::spawn_blocking(move || records.shutdown(RECORDS_GRACE)).await;
    if let Ok(Err(error)) = flushed {
        tracing::warn!(%error, "some records were lost");
    }
    Ok(())
}

async fn drain(context: &Context, patience: Duration) {
    let empty = async {
        while context.open_connections() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    drop(tokio::time::timeout(patience, empty).await);
}

/// Two agents on one data folder would fight over rules and certificates.
fn lock(data: &Path) -> anyhow::Result<nix::fcntl::Flock<std::fs::File>> {
    let path = data.join("lock");
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("open {}", path.display()))?;
    nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock).map_err(
        |(_, error)| {
            anyhow::anyhow!("another agent uses {} ({error}); stop it first", data.display())
        },
    )
}

/// Between two tries to attest a node whose certificate has ended.
const ATTEST_PAUSE: Duration = Duration::from_secs(5);

/// Keeps the node certificate young.
async fn tend_node(
    mut node: Node,
    health: Health,
    metrics: AgentMetrics,
    renewed: watch::Sender<u64>,
) {
    let mut jitter = draw_jitter();
    let mut failure: Option<Failure> = None;
    health.set(NODE_CHECK, HealthState::Ready);
    loop {
        if let Some(end) = node.trust.load().first_expiry() {
            metrics.set_trust_root_expiry(system_time(end));
        }
        let now = hauberk_tls::now();
        match rotation::next(node.validity, now, jitter, failure) {
            Step::Wait(until) | Step::RetryAt(until) => {
                let pause = until.since(now).max(Duration::from_millis(20)).min(LONGEST_SLEEP);
                tokio::time::sleep(pause).await;
            }
            // A pod's token needs no certificate to get one.
            Step::Expired if node.attests_itself() => {
                health.set(
                    NODE_CHECK,
                    HealthState::NotReady("the node certificate has expired".to_owned()),
                );
                match renew_node(&mut node).await {
                    Ok(()) => {
                        failure = None;
                        renewed.send_modify(|count| *count += 1);
                        health.set(NODE_CHECK, HealthState::Ready);
                        tracing::info!(node = node.name, "the node was attested anew");
                    }
                    Err(error) => {
                        tracing::error!(
                            error = format!("{error:#}"),
                            "the node certificate has expired"
                        );
                        tokio::time::sleep(ATTEST_PAUSE).await;
                    }
                }
            }
            Step::Expired => {
                let text = "the node certificate has expired: join anew with a new token \
                            (`hauberk token create` on the control plane)";
                tracing::error!("{text}");
                health.set(NODE_CHECK, HealthState::NotReady(text.to_owned()));
                tokio::time::sleep(LONGEST_SLEEP).await;
            }
            Step::RenewNow => match renew_node(&mut node).await {
                Ok(()) => {
                    failure = None;
                    jitter = draw_jitter();
                    renewed.send_modify(|count| *count += 1);
                    health.set(NODE_CHECK, HealthState::Ready);
                    tracing::info!(node = node.name, "the node certificate was renewed");
                }
                Err(error) => {
                    let attempts = failure.map_or(1, |f| f.attempts.saturating_add(1));
                    failure = Some(Failure { at: hauberk_tls::now(), attempts });
                    tracing::warn!(
                        attempts,
                        error = format!("{error:#}"),
                        "the node certificate could not be renewed"
                    );
                }
            },
        }
    }
}

/// Removes every capture rule: of the network namespace this runs in, and of the named ones.
#[must_use]
pub fn cleanup(args: &Args) -> ExitCode {
    let mut failed = false;
    let mut note = |place: String, outcome: anyhow::Result<()>| match outcome {
        Ok(()) => println!("nothing left in {place}"),
        Err(error) => {
            failed = true;
            eprintln!("error: {place}: {error:#}");
        }
    };
    note("the host's network namespace".to_owned(), capture::remove().map_err(Into::into));
    if args.cni_plugin.is_some() {
        let outcome = cni::uninstall(&args.cni_bin_dir, &args.cni_conf_dir);
        note(args.cni_conf_dir.display().to_string(), outcome);
    }
    let entries = match std::fs::read_dir(&args.netns_dir) {
        Ok(entries) => entries.collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => vec![Err(error)],
    };
    for entry in entries {
        match entry {
            Ok(entry) => {
                let path = entry.path();
                let outcome = Netns::open(&path)
                    .and_then(|netns| netns.run(capture::remove).and_then(|result| result));
                note(path.display().to_string(), outcome.map_err(Into::into));
            }
            Err(error) => note(args.netns_dir.display().to_string(), Err(error.into())),
        }
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
