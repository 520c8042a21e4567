//! Control plane and agent in one process: a mesh of one machine, to which others may join.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context;
use hauberk_core::identity::{ResourceName, TrustDomain};
use hauberk_proto::v1;
use hauberk_telemetry::{LogFormat, LogOptions};
use tokio_util::sync::CancellationToken;

use crate::{Output, control};

/// How long the own control plane may take to answer.
const START: Duration = Duration::from_secs(20);

/// How both run.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// This machine's name, as in its Machine manifest; by default its host name.
    #[arg(long, value_name = "NAME")]
    machine: Option<ResourceName>,

    /// The trust domain: the first part of every identity, such as example.org.
    #[arg(long, env = "HAUBERK_TRUST_DOMAIN", value_name = "NAME")]
    trust_domain: TrustDomain,

    /// The folder with the manifests, watched for changes.
    #[arg(
        long,
        env = "HAUBERK_MANIFESTS",
        value_name = "DIR",
        default_value = "/etc/hauberk/manifests"
    )]
    manifests: PathBuf,

    /// Accept at this start that the manifests have no workload, although the last good ones have some.
    ///
    /// Without it the last good manifests stay in force, because a missing mount and a failed sync look the same, and
    /// the agents open the ports of workloads that are gone. It confirms the folder as it is at this start only: leave
    /// it out of the command of a service.
    #[arg(long)]
    allow_empty: bool,

    /// Where both keep what they must; `control-plane` and `agent` are made in it.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/hauberk")]
    data: PathBuf,

    /// Where other machines' agents connect. By default none can.
    #[arg(long, env = "HAUBERK_LISTEN", value_name = "ADDR", default_value = "127.0.0.1:8443")]
    listen: std::net::SocketAddr,

    /// The host:port that join tokens tell new machines; as --listen if that is a single address.
    #[arg(long, env = "HAUBERK_ADVERTISE", value_name = "HOST:PORT")]
    advertise: Option<String>,

    /// Where connection records go: a file that is appended to, or - for standard output.
    #[arg(long, env = "HAUBERK_RECORDS", value_name = "FILE", default_value = "-")]
    records: PathBuf,

    /// The folder of named network namespaces.
    #[arg(long, env = "HAUBERK_NETNS_DIR", value_name = "DIR", default_value = "/run/netns")]
    netns_dir: PathBuf,

    /// How logs are written.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,

    /// Stop when standard input ends: for a parent that must not leave children behind.
    #[arg(long, hide = true)]
    stop_with_stdin: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let machine = match &args.machine {
        Some(name) => name.to_string(),
        None => nix::unistd::gethostname()
            .context("read the host name")?
            .into_string()
            .ok()
            .context("the host name is not text; give --machine NAME")?,
    };
    let format = match args.output {
        Output::Text => LogFormat::Text,
        Output::Json => LogFormat::Json,
    };
    hauberk_telemetry::log::init(&LogOptions { format, filter: None })?;
    hauberk_telemetry::process::raise_file_limit();
    hauberk_telemetry::process::keep_memory_private();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(both(args, machine))?;
    Ok(ExitCode::SUCCESS)
}

async fn both(args: &Args, machine: String) -> anyhow::Result<()> {
    let stop = hauberk_telemetry::process::stop_signal(args.stop_with_stdin)?;
    let control_plane = control_plane(args);
    let socket = control_plane.data.join(hauberk_control_plane::app::OPERATOR_SOCKET);
    let (agent_stopped, stopping) = (CancellationToken::new(), CancellationToken::new());
    let mut serving = tokio::spawn(hauberk_control_plane::app::run(
        control_plane,
        agent_stopped.clone().cancelled_owned(),
    ));
    let mut agent = agent(args);
    if !agent.data.join("node.json").exists() {
        let token = tokio::select! {
            ended = &mut serving => return ended?.and(Err(anyhow::anyhow!("the control plane ended"))),
            token = own_token(&socket, machine) => token?,
        };
        agent.join_token = Some(token.parse()?);
    }
    let carrying = hauberk_agent::app::run(agent, stopping.clone().cancelled_owned());
    tokio::pin!(carrying);
    tokio::select! {
        ended = &mut serving => {
            stopping.cancel();
            carrying.await?;
            return ended?;
        }
        ended = &mut carrying => ended?,
        () = stop => {
            // The agent first: its last reports go to the control plane.
            stopping.cancel();
            carrying.await?;
        }
    }
    agent_stopped.cancel();
    serving.await?
}

/// A join token for this machine, as soon as the control plane answers.
async fn own_token(socket: &std::path::Path, machine: String) -> anyhow::Result<String> {
    let answering = async {
        loop {
            match control::connect(socket).await {
                Ok(channel) => return channel,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    let channel =
        tokio::time::timeout(START, answering).await.context("the own control plane is silent")?;
    let request = v1::CreateTokenRequest { node: machine, ttl_seconds: 60 };
    let answer = v1::operator_client::OperatorClient::new(channel)
        .create_token(request)
        .await
        .map_err(|status| anyhow::anyhow!("{}", status.message()))
        .context("join this machine to its own mesh")?;
    Ok(answer.into_inner().token)
}

fn control_plane(args: &Args) -> hauberk_control_plane::config::Args {
    hauberk_control_plane::config::Args {
        data: args.data.join("control-plane"),
        manifests: args.manifests.clone(),
        allow_empty: args.allow_empty,
        listen: args.listen,
        advertise: args.advertise.clone(),
        ..hauberk_control_plane::config::Args::defaults(args.trust_domain.clone())
    }
}

fn agent(args: &Args) -> hauberk_agent::config::Args {
    hauberk_agent::config::Args {
        data: args.data.join("agent"),
        records: args.records.clone(),
        netns_dir: args.netns_dir.clone(),
        ..hauberk_agent::config::Args::defaults()
    }
}
