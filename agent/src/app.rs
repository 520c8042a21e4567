//! The wiring: which node this is, what is enforced there, then captures; its certificate meanwhile; and the way
//! down.

use std::{
    future::Future,
    io::Write as _,
    path::Path,
    process::ExitCode,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::Context as _;
use hauberk_linux::{Netns, capture};
use hauberk_telemetry::{
    Health, LogFormat as TelemetryFormat, LogOptions, RecordSink,
    metrics::AgentMetrics,
    record::{Destination, RecordOptions},
};
use tokio::sync::Mutex;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    capture::{CAPTURE_CHECK, Captured, Captures, StatusBoard},
    cni::{self, Installation, Server, Starting},
    config::{Args, LocalEdges, LogFormat},
    context::Context,
    departed::Departed,
    duties::{Means, OnDuty},
    handover::{Before, End, Incumbent, Replaced, Successors, is_taken, tell_when_ready},
    identity::{
        Attestation, Identities, NODE_CHECK, Node, PodToken, forget_another, forget_workloads,
        join_for_another, regain_beside, tend_or_follow,
    },
    pages::Pages,
    policy::{Enforcer, Owner, POLICY_CHECK, Subscription, forget_kept, kept_owner},
};

/// Threads for everything that is not a connection: certificates, policies, captures, pages.
const CONTROL_THREADS: usize = 2;

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
            .worker_threads(CONTROL_THREADS)
            .enable_all()
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

/// Says what may not work here, before it fails.
fn tell_what_the_kernel_lacks() {
    let release = hauberk_linux::kernel::release().unwrap_or_default();
    match hauberk_linux::kernel::lacks(&release) {
        Some(lacks) => {
            for feature in lacks {
                let (what, without) = (feature.what, feature.without);
                let since = format!("{}.{}", feature.since.0, feature.since.1);
                tracing::warn!(
                    release,
                    what,
                    since,
                    without,
                    "the kernel is older than a part that is needed"
                );
            }
        }
        None => tracing::warn!(
            release,
            "the kernel's version is not known: Linux 5.10 or newer is needed"
        ),
    }
}

/// Runs the agent until `stop` is done, then drains.
///
/// # Errors
/// If nothing says which node this is and it cannot join or be attested, if it cannot open or bind what it needs,
/// or was replaced by another agent that then went away.
pub async fn run(
    args: Args,
    stop: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<()> {
    hauberk_tls::files::private_folder(&args.data).context("open the data folder")?;
    tell_what_the_kernel_lacks();
    let stop = token(stop);
    if joined_for_another(&args).await? {
        return Ok(());
    }
    let Some(mut before) = Before::find(&args.data, args.take_over, &stop).await? else {
        return Ok(());
    };
    let metrics = AgentMetrics::new().context("set up metrics")?;
    let registries = vec![
        metrics.registry().clone(),
        hauberk_telemetry::metrics::process_registry().context("set up process metrics")?,
    ];
    let health = Health::new(&[NODE_CHECK, POLICY_CHECK, CAPTURE_CHECK]);
    let mut pages = Pages::listen(args.metrics, before.metrics(), registries, health.clone())?;
    pages.open()?;
    let destination = if args.records == Path::new("-") {
        Destination::Stdout
    } else {
        Destination::File(args.records.clone())
    };
    let records = RecordSink::start(RecordOptions::new(destination), metrics.records_lost())?;
    let Some(mut node) = open_node(&args, &stop).await? else { return Ok(()) };
    // Whoever is to stop takes nobody's place.
    if stop.is_cancelled() {
        return Ok(());
    }
    let regaining = regain_beside(&mut node, &health);
    let Some(before) = before.wait(&args.data, regaining, &stop).await? else { return Ok(()) };
    let Some((own, inherited, taken)) = before.take(&args.data, &stop).await? else {
        return Ok(());
    };
    let mut own = Some(own);
    // The agent before may have renewed it since.
    node.reload();
    let successors = Successors::listen(&args.data)?;
    let replaced = Replaced::default();
    forget_another(&args.data, || {
        forget_kept(&args.data)?;
        forget_workloads(&args.data)
    })?;
    let enforcer = Arc::new(Enforcer::open(
        Owner { node: node.name.clone(), trust_domain: node.slot.id().trust_domain().clone() },
        &args.data,
        metrics.clone(),
        health.clone(),
        replaced.clone(),
    ));
    let context = Arc::new(Context::start(
        node.name.clone(),
        node.trust.clone(),
        metrics.clone(),
        records.clone(),
        &args.carrying(),
        enforcer.subscribe(),
    )?);
    let board = StatusBoard::new(context.clone(), node.slot.clone());
    let starting = Starting::default();
    let (server, installation) = match &args.cni_plugin {
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
                namespaces: cni::namespaces_file(&args.data),
                exempt: args.cni_exempt_namespaces.clone(),
            };
            (Some((server, args.cni_socket.clone())), Some(installation))
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
        kept_sandboxes: args.data.join("sandboxes.json"),
        cri_socket: args.cri_socket.clone(),
        starting: starting.clone(),
        has_plugin: installation.is_some(),
        board: board.clone(),
        snapshots: enforcer.subscribe(),
        inherited: inherited.clone(),
        replaced: replaced.clone(),
        health: health.clone(),
        since: None,
        departed: Departed::default(),
    };
    let subscription = Subscription {
        enforcer: enforcer.clone(),
        control_plane: node.control_plane.clone(),
        metrics: metrics.clone(),
        records: records.clone(),
        edges: context.edges.clone(),
        status: board,
        node_renewed: node.renewals(),
    };
    if args.local_edges == LocalEdges::VerifiedLocal {
        tracing::info!(
            "connections between workloads of this node are carried without TLS, once both are verified"
        );
    }
    tracing::info!(node = node.name, metrics = %args.metrics, control_plane = node.control_plane.address(), "ready");

    let node = Arc::new(Mutex::new(node));
    let means = Means {
        context: context.clone(),
        health: health.clone(),
        enforcer,
        subscription,
        node: node.clone(),
        plugin: server,
        installation,
        replaced: replaced.clone(),
    };
    let duties = OnDuty::begin(means, captures, Captured::default())?;
    let tending = tokio::spawn(tend_or_follow(node, health.clone(), metrics, replaced));
    let stands_by = taken.stands_by();
    let taken = tokio::spawn(tell_when_ready(taken, inherited.clone(), health));
    let incumbent = Incumbent {
        data: args.data.clone(),
        successors,
        duties,
        inherited,
        taken: AbortOnDropHandle::new(taken),
        drain: args.drain,
    };
    let mut end = incumbent.run(&mut own, &mut pages, &stop).await?;

    let open = context.open_connections();
    let patience = match &end {
        End::Stopped(_) => {
            tracing::info!(open, "stopping, draining open connections");
            args.drain
        }
        End::Replaced(..) => {
            tracing::info!(open, "replaced, draining open connections");
            args.drain
        }
        // The node is closed until this one is started anew, which comes first.
        End::Lost(_) => Duration::ZERO,
    };
    context.stopping.cancel();
    if let End::Stopped(off) | End::Replaced(off, _) = &mut end {
        off.close();
    }
    drain(&context, patience).await;
    context.cut.cancel();
    // A moment for the resets to leave.
    drain(&context, Duration::from_secs(1)).await;
    let ended = match end {
        End::Stopped(mut off) => {
            // Whoever has the folder has the rules, but for an agent before that is about to take both back.
            if args.remove_rules_on_stop && own.is_some() && !stands_by.load(Ordering::Relaxed) {
                remove_rules(off.captured(), &args);
            }
            Ok(())
        }
        End::Replaced(off, successor) => {
            // It asks for no certificates while it waits.
            drop(off);
            successor.outlive(&stop).await
        }
        End::Lost(error) => Err(error),
    };
    tending.abort();
    drop(tending.await);
    // Nothing is written there any more, and somebody may wait for it.
    drop(own);
    pages.close();
    let flushed = tokio::task::spawn_blocking(move || records.shutdown(RECORDS_GRACE)).await;
    if let Ok(Err(error)) = flushed {
        tracing::warn!(%error, "some records were lost");
    }
    ended
}

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

/// Which node this is; nothing if this agent is to stop meanwhile.
async fn open_node(args: &Args, stop: &CancellationToken) -> anyhow::Result<Option<Node>> {
    let attestation = attestation(args);
    // A pod tries for a while, when the control plane is away; a token's only try is over soon, and whoever
    // gave it wants to hear how it went.
    let tries_again = matches!(attestation, Attestation::Pod(_));
    let address = args.control_plane.as_deref();
    let opening = Node::open(&args.data, attestation, address, owner_of(args));
    tokio::select! {
        node = opening => node.map(Some),
        () = stop.cancelled(), if tries_again => Ok(None),
    }
}

/// Whose state is on disk.
fn owner_of(args: &Args) -> Option<Owner> {
    kept_owner(&args.data).unwrap_or_else(|error| {
        // Whoever enforces it says so aloud.
        tracing::debug!(error = format!("{error:#}"), "the state on disk");
        None
    })
}

/// With a join token, beside an agent that runs and has no identity that it can use: that one gets it, and goes on.
async fn joined_for_another(args: &Args) -> anyhow::Result<bool> {
    let Some(token) = args.join_token.as_ref().filter(|_| !args.take_over) else {
        return Ok(false);
    };
    if !is_taken(&args.data) {
        return Ok(false);
    }
    let address = args.control_plane.as_deref();
    match join_for_another(&args.data, token, address, owner_of(args)).await? {
        None => Ok(false),
        Some(node) => {
            tracing::info!(node, "joined; the agent that runs here goes on with it");
            Ok(true)
        }
    }
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

fn remove_rules(captured: &mut Captured, args: &Args) {
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
        // Whether anybody reads it or not, the next place has its turn.
        Ok(()) => drop(writeln!(std::io::stdout(), "nothing left in {place}")),
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
