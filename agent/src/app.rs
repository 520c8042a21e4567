//! The wiring: identity first, then what is enforced, then captures; and the way down.

use std::{future::Future, path::Path, process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context as _;
use hauberk_linux::{Netns, capture};
use hauberk_telemetry::{
    Health, LogFormat as TelemetryFormat, LogOptions, RecordSink, State as HealthState,
    metrics::AgentMetrics,
    record::{Destination, RecordOptions},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    capture::{CAPTURE_CHECK, Captured, Captures, StatusBoard},
    cni::{self, Installation, Server, Starting},
    config::{Args, LocalEdges, LogFormat},
    context::Context,
    handover::{
        Inherited, Predecessor, Successors, Taken, hand_over, lock_folder, take_place,
        tell_when_ready, wait,
    },
    identity::{Attestation, Identities, NODE_CHECK, PodToken, open_node, tend_or_follow},
    pages::Pages,
    policy::{Enforcer, POLICY_CHECK, Subscription},
};

/// Turns of tasks between two looks for what the network has. A turn of a bulk stream is some 150 µs: at
/// tokio's 61 of them, small exchanges would wait for 9 ms.
const EVENT_INTERVAL: u32 = 8;

/// How long closing records may take to be written.
const RECORDS_GRACE: Duration = Duration::from_secs(2);

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
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .event_interval(EVENT_INTERVAL)
            .build()
            .context("start the runtime")?;
        let outcome = runtime.block_on(async {
            let stop = hauberk_telemetry::process::stop_signal(args.stop_with_stdin)
                .context("listen for signals")?;
            run(args, stop).await
        });
        // A thread may still wait for standard input, when it is not that which has ended this.
        runtime.shutdown_background();
        outcome
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
/// If it has no identity and cannot get one, cannot open or bind what it needs, or was replaced by another agent
/// that then went away.
pub async fn run(
    args: Args,
    stop: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<()> {
    hauberk_tls::files::private_folder(&args.data).context("open the data folder")?;
    let stop = token(stop);
    let mut predecessor = None;
    if args.take_over {
        predecessor = tokio::task::block_in_place(|| Predecessor::find(&args.data))
            .context("take over from the agent that runs")?;
    }
    let mut own = None;
    if predecessor.is_none() {
        own = lock_folder(&args.data, args.take_over, &stop).await?;
        if own.is_none() {
            return Ok(());
        }
    }
    let metrics = AgentMetrics::new().context("set up metrics")?;
    let registries = vec![
        metrics.registry().clone(),
        hauberk_telemetry::metrics::process_registry().context("set up process metrics")?,
    ];
    let health = Health::new(&[NODE_CHECK, POLICY_CHECK, CAPTURE_CHECK]);
    let before = predecessor.as_mut().and_then(Predecessor::metrics);
    let mut pages = Pages::listen(args.metrics, before, registries, health.clone())?;
    pages.open()?;
    let destination = if args.records == Path::new("-") {
        Destination::Stdout
    } else {
        Destination::File(args.records.clone())
    };
    let records = RecordSink::start(RecordOptions::new(destination), metrics.records_lost())?;
    let attestation = attestation(&args);
    // A pod tries for a while, when the control plane is away; a token's only try is over soon, and whoever
    // gave it wants to hear how it went.
    let tries_again = matches!(attestation, Attestation::Pod(_));
    let opening = open_node(&args.data, attestation, args.control_plane.as_deref());
    let mut node = tokio::select! {
        node = opening => node?,
        () = stop.cancelled(), if tries_again => return Ok(()),
    };
    // Whoever is to stop takes nobody's place.
    if stop.is_cancelled() {
        return Ok(());
    }
    let (own, inherited, taken) = match own {
        Some(own) => (own, Inherited::default(), Taken::default()),
        None => {
            let (inherited, taken) = take_place(predecessor);
            let Some(own) = lock_folder(&args.data, args.take_over, &stop).await? else {
                return Ok(());
            };
            // The agent before may have renewed it since.
            node.reload().context("the node's identity")?;
            (own, inherited, taken)
        }
    };
    let mut successors = Successors::listen(&args.data)?;
    let replaced = CancellationToken::new();
    let enforcer =
        Arc::new(Enforcer::open(&args.data, metrics.clone(), health.clone(), replaced.clone()));
    let context = Arc::new(Context::new(
        node.name.clone(),
        node.trust.clone(),
        metrics.clone(),
        records.clone(),
        args.local_edges,
        args.records_per_key.unwrap_or(u64::MAX),
        enforcer.subscribe(),
    ));
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
                replaced: replaced.clone(),
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
    let identities = Identities::new(
        &args.data,
        node.control_plane.clone(),
        node.trust.clone(),
        metrics.clone(),
        replaced.clone(),
    )?;
    let captures = Captures {
        context: context.clone(),
        identities,
        netns_dir: args.netns_dir.clone(),
        cri_socket: args.cri_socket.clone(),
        starting: starting.clone(),
        installation,
        board: board.clone(),
        snapshots: enforcer.subscribe(),
        inherited: inherited.clone(),
        replaced: replaced.clone(),
        health: health.clone(),
        since: None,
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

    let captures = tokio::spawn(captures.run());
    let plugin_server = plugin_server.map(|(server, listener)| tokio::spawn(server.run(listener)));
    let subscription = tokio::spawn(subscription.run());
    let tending =
        tokio::spawn(tend_or_follow(node, health.clone(), metrics, renewed, replaced.clone()));
    let taken = tokio::spawn(tell_when_ready(taken, inherited.clone(), health.clone()));
    let successor = wait(&stop, &mut successors, &mut pages).await;
    // The one before, if it is still there, has to go on without this one.
    taken.abort();
    drop(successors);
    let text = "the agent is stopping, or another one takes its place";
    health.set(CAPTURE_CHECK, HealthState::NotReady(text.to_owned()));

    // Pods that start from now on wait for the next agent.
    if let Some(server) = plugin_server {
        server.abort();
    }
    let (mut captured, outcome, patience) = match successor {
        None => {
            tracing::info!(
                open = context.open_connections(),
                "stopping, draining open connections"
            );
            context.stopping.cancel();
            (captures.await.context("stop capturing")?, Ok(None), args.drain)
        }
        Some(successor) => {
            tracing::info!("another agent takes this one's place");
            replaced.cancel();
            let captured = captures.await.context("stop capturing")?;
            let handed = hand_over(successor, &captured, &inherited, own, &stop).await;
            // Without the next one the node is closed until this one is started anew, which comes first.
            let patience = if handed.is_ok() { args.drain } else { Duration::ZERO };
            tracing::info!(
                open = context.open_connections(),
                "replaced, draining open connections"
            );
            context.stopping.cancel();
            (captured, handed.map(Some), patience)
        }
    };
    captured.close();
    drain(&context, patience).await;
    context.cut.cancel();
    // A moment for the resets to leave.
    drain(&context, Duration::from_secs(1)).await;
    subscription.abort();
    let ended = match outcome {
        Ok(None) => {
            if args.remove_rules_on_stop {
                remove_rules(&captured, &args);
            }
            Ok(())
        }
        // Whoever started this one decides when it ends: one that ended by itself would be started again. It
        // asks for no certificates meanwhile.
        Ok(Some(mut successor)) => {
            drop(captured);
            tokio::select! {
                biased;
                () = stop.cancelled() => Ok(()),
                () = successor.gone() => Err(anyhow::anyhow!(REPLACED)),
            }
        }
        Err(error) => Err(error.context(REPLACED)),
    };
    tending.abort();
    pages.close();
    let flushed = tokio::task::spawn_blocking(move || records.shutdown(RECORDS_GRACE)).await;
    if let Ok(Err(error)) = flushed {
        tracing::warn!(%error, "some records were lost");
    }
    ended
}

/// Why a replaced agent ends with an error: it has to be started anew.
const REPLACED: &str = "the agent that took this one's place went away; start this one again";

/// Cancelled when the future is done.
fn token(done: impl Future<Output = ()> + Send + 'static) -> CancellationToken {
    let token = CancellationToken::new();
    let cancelled = token.clone();
    tokio::spawn(async move {
        done.await;
        cancelled.cancel();
    });
    token
}

fn attestation(args: &Args) -> Attestation {
    match (&args.kubernetes_token, &args.trust_bundle, &args.control_plane) {
        (Some(token), Some(roots), Some(address)) => Attestation::Pod(PodToken {
            token: token.clone(),
            roots: roots.clone(),
            address: address.clone(),
        }),
        _ => Attestation::Token(args.join_token.clone()),
    }
}

fn remove_rules(captured: &Captured, args: &Args) {
    captured.remove_rules();
    // Nobody would answer the plugin any more.
    if args.cni_plugin.is_some()
        && let Err(error) = cni::uninstall(&args.cni_bin_dir, &args.cni_conf_dir)
    {
        tracing::error!(error = format!("{error:#}"), "the CNI plugin stays in place");
    }
}

async fn drain(context: &Context, patience: Duration) {
    let empty = async {
        while context.open_connections() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    drop(tokio::time::timeout(patience, empty).await);
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
