//! Arguments and environment.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::ValueEnum;
use hauberk_proto::token::JoinToken;

/// How the agent runs.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Where the node's key and certificate, workload certificates and the last good policy are
    /// kept; made with mode 0700 if it is missing.
    #[arg(
        long,
        env = "HAUBERK_AGENT_DATA",
        value_name = "DIR",
        default_value = "/var/lib/hauberk/agent"
    )]
    pub data: PathBuf,

    /// The join token, on the first start, or to replace a node certificate that cannot be used; not needed while
    /// that is good. If an agent runs on the same --data and has none that it can use, it gets this one's, and goes
    /// on with it.
    #[arg(long, env = "HAUBERK_JOIN_TOKEN", value_name = "TOKEN", hide_env_values = true)]
    pub join_token: Option<JoinToken>,

    /// The control plane's host:port, if it is not the one that the join token named.
    #[arg(long, env = "HAUBERK_CONTROL_PLANE", value_name = "HOST:PORT")]
    pub control_plane: Option<String>,

    /// In a Kubernetes cluster: the projected service account token of this pod, which attests its node in
    /// place of a join token. It is read anew each time.
    #[arg(long, env = "HAUBERK_KUBERNETES_TOKEN", value_name = "FILE",
          requires_all = ["trust_bundle", "control_plane"], conflicts_with = "join_token")]
    pub kubernetes_token: Option<PathBuf>,

    /// With --kubernetes-token: the roots of the control plane, PEM.
    #[arg(long, env = "HAUBERK_TRUST_BUNDLE", value_name = "FILE")]
    pub trust_bundle: Option<PathBuf>,

    /// The socket of the container runtime, which knows where pods are.
    #[arg(
        long,
        env = "HAUBERK_CRI_SOCKET",
        value_name = "FILE",
        default_value = "/run/containerd/containerd.sock"
    )]
    pub cri_socket: PathBuf,

    /// On a Kubernetes node: the CNI plugin that comes with this agent, to be chained to the node's network,
    /// so that no pod starts before it is captured. While no agent answers, the plugin goes by a file of the data folder,
    /// which has to be at the same path here and on the host.
    #[arg(long, env = "HAUBERK_CNI_PLUGIN", value_name = "FILE")]
    pub cni_plugin: Option<PathBuf>,

    /// Where the plugin finds this agent; the same path here and on the host.
    #[arg(
        long,
        env = "HAUBERK_CNI_SOCKET",
        value_name = "FILE",
        default_value = "/run/hauberk/cni.sock"
    )]
    pub cni_socket: PathBuf,

    /// Where the container runtime looks for CNI plugins.
    #[arg(long, env = "HAUBERK_CNI_BIN_DIR", value_name = "DIR", default_value = "/opt/cni/bin")]
    pub cni_bin_dir: PathBuf,

    /// Where the container runtime looks for network configurations.
    #[arg(
        long,
        env = "HAUBERK_CNI_CONF_DIR",
        value_name = "DIR",
        default_value = "/etc/cni/net.d"
    )]
    pub cni_conf_dir: PathBuf,

    /// Namespaces whose pods start without waiting for an agent: those that the mesh itself needs.
    #[arg(
        long,
        env = "HAUBERK_CNI_EXEMPT_NAMESPACES",
        value_name = "NAME",
        value_delimiter = ',',
        default_value = "kube-system"
    )]
    pub cni_exempt_namespaces: Vec<String>,

    /// Where Prometheus scrapes and health is asked.
    #[arg(long, env = "HAUBERK_METRICS", value_name = "ADDR", default_value = "127.0.0.1:9465")]
    pub metrics: SocketAddr,

    /// Where connection records go: a file that is appended to, or - for standard output.
    #[arg(long, env = "HAUBERK_RECORDS", value_name = "FILE", default_value = "-")]
    pub records: PathBuf,

    /// The folder of named network namespaces.
    #[arg(long, env = "HAUBERK_NETNS_DIR", value_name = "DIR", default_value = "/run/netns")]
    pub netns_dir: PathBuf,

    /// How connections between two workloads of this node are carried.
    #[arg(long, env = "HAUBERK_LOCAL_EDGES", value_enum, default_value_t = LocalEdges::Mtls)]
    pub local_edges: LocalEdges,

    /// When connections that are older than the capture of their workload, and go on in clear, are closed: so long after
    /// it is enforced, or keep. Idle ones are closed first, the others after 10s more; an agent that starts anew counts
    /// from then.
    #[arg(long, env = "HAUBERK_OLDER_CONNECTIONS", value_name = "DURATION|keep",
          default_value = "5m", value_parser = older_connections)]
    pub older_connections: OlderConnections,

    /// Renew the keys of a session after so many records, if that is earlier than its cipher demands
    /// (2^24.5 records for AES-GCM); at least 64.
    #[arg(long, env = "HAUBERK_RECORDS_PER_KEY", value_name = "NUMBER",
          value_parser = clap::value_parser!(u64).range(64..))]
    pub records_per_key: Option<u64>,

    /// If another agent runs on the same --data, take its place: its listeners are handed over, and no
    /// connection fails. It goes on with those that are open, for its own --drain, and waits to be stopped.
    #[arg(long, env = "HAUBERK_TAKE_OVER")]
    pub take_over: bool,

    /// How long open connections may go on after SIGTERM, or after another agent has taken this one's place.
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = duration)]
    pub drain: Duration,

    /// Remove the capture rules, and the CNI plugin, on a clean stop. Without it they stay, so that workloads are cut
    /// off rather than unprotected while no agent runs.
    #[arg(long, env = "HAUBERK_REMOVE_RULES_ON_STOP")]
    pub remove_rules_on_stop: bool,

    /// How logs are written.
    #[arg(long, env = "HAUBERK_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// Stop when standard input ends: for a parent that must not leave children behind.
    #[arg(long, hide = true)]
    pub stop_with_stdin: bool,
}

/// How connections between two workloads of one node are carried. They are proven, decided and recorded
/// alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LocalEdges {
    /// In mutual TLS, as between two nodes.
    Mtls,
    /// Without TLS, once this agent has verified the certificates of both: their bytes pass over the
    /// loopback interfaces of the two workloads and through the agent, and nowhere else.
    VerifiedLocal,
}

/// What becomes of connections that are older than the capture of their workload, once it is enforced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OlderConnections {
    /// They go on in clear for as long as they are open.
    Keep,
    /// They go on for so long, and are closed.
    CloseAfter(Duration),
}

/// How logs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// How connections are carried.
pub(crate) struct Carrying {
    pub(crate) local_edges: LocalEdges,
    pub(crate) older_connections: OlderConnections,
    /// Records that are sent under one key.
    pub(crate) records_per_key: u64,
}

impl Args {
    pub(crate) fn carrying(&self) -> Carrying {
        Carrying {
            local_edges: self.local_edges,
            older_connections: self.older_connections,
            records_per_key: self.records_per_key.unwrap_or(u64::MAX),
        }
    }

    /// What the command line gives if nothing is named.
    #[must_use]
    pub fn defaults() -> Self {
        Self {
            data: "/var/lib/hauberk/agent".into(),
            join_token: None,
            control_plane: None,
            kubernetes_token: None,
            trust_bundle: None,
            cri_socket: "/run/containerd/containerd.sock".into(),
            cni_plugin: None,
            cni_socket: "/run/hauberk/cni.sock".into(),
            cni_bin_dir: "/opt/cni/bin".into(),
            cni_conf_dir: "/etc/cni/net.d".into(),
            cni_exempt_namespaces: vec!["kube-system".to_owned()],
            metrics: SocketAddr::from((std::net::Ipv4Addr::LOCALHOST, 9465)),
            records: "-".into(),
            netns_dir: "/run/netns".into(),
            local_edges: LocalEdges::Mtls,
            older_connections: OlderConnections::CloseAfter(Duration::from_secs(300)),
            records_per_key: None,
            take_over: false,
            drain: Duration::from_secs(10),
            remove_rules_on_stop: false,
            log_format: LogFormat::Text,
            stop_with_stdin: false,
        }
    }
}

fn older_connections(text: &str) -> Result<OlderConnections, String> {
    if text == "keep" {
        return Ok(OlderConnections::Keep);
    }
    let after = duration(text).map_err(|error| format!("{error}, or keep"))?;
    Ok(OlderConnections::CloseAfter(after))
}

fn duration(text: &str) -> Result<Duration, String> {
    let explain = || {
        format!("{text:?} is not a duration; write a number with a unit, such as 90s, 10m or 1h")
    };
    let span: jiff::SignedDuration = text.parse().map_err(|_| explain())?;
    Duration::try_from(span).map_err(|_| explain())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn the_defaults_are_those_of_the_command_line() {
        let parsed = Command::parse_from(["agent"]).args;
        assert_eq!(format!("{parsed:?}"), format!("{:?}", Args::defaults()));
    }
}
