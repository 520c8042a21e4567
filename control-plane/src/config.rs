//! Arguments and environment, checked all at once.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::ValueEnum;
use hauberk_core::identity::TrustDomain;

/// The shortest certificate lifetime: below it, renewals would chase each other.
pub const MIN_LIFETIME: Duration = Duration::from_secs(10);

/// The longest: a certificate that lives longer is no longer a short-lived one.
pub const MAX_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// The longest time after its end for which a node certificate may be renewed: a machine that was away for longer
/// is one that somebody should look at.
pub const MAX_GRACE: Duration = Duration::from_secs(90 * 24 * 3600);

/// What is usual: a long weekend.
const USUAL_GRACE: Duration = Duration::from_secs(72 * 3600);

/// How the control plane runs.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The trust domain: the first part of every identity, such as example.org.
    #[arg(long, env = "HAUBERK_TRUST_DOMAIN", value_name = "NAME")]
    pub trust_domain: TrustDomain,

    /// Where keys, certificates and the registry are kept; made with mode 0700 if it is missing.
    #[arg(
        long,
        env = "HAUBERK_CONTROL_PLANE_DATA",
        value_name = "DIR",
        default_value = "/var/lib/hauberk/control-plane"
    )]
    pub data: PathBuf,

    /// The folder with the manifests, watched for changes.
    #[arg(
        long,
        env = "HAUBERK_MANIFESTS",
        value_name = "DIR",
        default_value = "/etc/hauberk/manifests"
    )]
    pub manifests: PathBuf,

    /// Accept at this start that the manifests have no workload, although the last good ones have some.
    ///
    /// Without it the last good manifests stay in force, because a missing mount and a failed sync look the same, and
    /// agents open the ports of workloads that are gone. It confirms the folder as it is at this start only: leave it
    /// out of the command of a service.
    #[arg(long, conflicts_with = "kubernetes")]
    pub allow_empty: bool,

    /// Begin the numbering of the revisions anew at this start: agents take what this control plane says for newer than
    /// all before.
    ///
    /// After a backup was restored, agents refuse what is older than what they enforce. It is for one start: leave it
    /// out of the command of a service. In a cluster, delete the ConfigMap hauberk-state instead.
    #[arg(long, conflicts_with = "kubernetes")]
    pub new_epoch: bool,

    /// In a cluster: give nodes whose agent is not ready the taint hauberk.dev/agent-not-ready, so that no further pods are
    /// sent there.
    #[arg(long, env = "HAUBERK_TAINT_NODES", requires = "kubernetes")]
    pub taint_nodes: bool,

    /// Take policies, pods and services from the Kubernetes API, and keep the CA and the revision there,
    /// instead of a manifest folder and files: for control planes that run in a cluster.
    #[arg(long, env = "HAUBERK_KUBERNETES", conflicts_with = "manifests")]
    pub kubernetes: bool,

    /// A folder with the CA to issue with, in place of one that is made: tls.crt, tls.key (of mode 0600) and
    /// ca.crt, PEM. It is looked at again and again: a renewed one is taken up.
    #[arg(long, env = "HAUBERK_CA", value_name = "DIR", conflicts_with = "kubernetes")]
    pub ca: Option<PathBuf>,

    /// The same as a Secret of the control plane's own namespace, as cert-manager writes it for a Certificate
    /// with isCA: true. With --kubernetes.
    #[arg(long, env = "HAUBERK_CA_SECRET", value_name = "NAME", requires = "kubernetes")]
    pub ca_secret: Option<String>,

    /// The service account of the agents, in the control plane's own namespace: its pods' tokens attest
    /// their nodes. With --kubernetes.
    #[arg(
        long,
        env = "HAUBERK_AGENT_SERVICE_ACCOUNT",
        value_name = "NAME",
        default_value = "hauberk-agent"
    )]
    pub agent_service_account: String,

    /// Where agents connect.
    #[arg(long, env = "HAUBERK_LISTEN", value_name = "ADDR", default_value = "[::]:8443")]
    pub listen: SocketAddr,

    /// The host:port that join tokens tell new machines; as --listen if that is a single address.
    #[arg(long, env = "HAUBERK_ADVERTISE", value_name = "HOST:PORT")]
    pub advertise: Option<String>,

    /// Where Prometheus scrapes and health is asked.
    #[arg(long, env = "HAUBERK_METRICS", value_name = "ADDR", default_value = "127.0.0.1:9464")]
    pub metrics: SocketAddr,

    /// Where the Kubernetes API server asks what to warn of, when an object is applied; nowhere without it.
    /// With --kubernetes.
    #[arg(long, env = "HAUBERK_WEBHOOK", value_name = "ADDR", requires = "kubernetes")]
    pub webhook: Option<SocketAddr>,

    /// How long workload certificates live, from 10s to 24h.
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = lifetime)]
    pub workload_certificate_lifetime: Duration,

    /// How long node certificates live, from 10s to 24h. A machine that is away for longer needs
    /// --node-renewal-grace or a new join token.
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = lifetime)]
    pub node_certificate_lifetime: Duration,

    /// How long after the end of its certificate a machine may still renew it, at most 90 days (2160h): with its
    /// own key, if that certificate was not superseded, and while its Machine is declared. The expired certificate
    /// is good for nothing else. With 0 it needs a new join token. Nodes of a cluster do not need it.
    #[arg(long, env = "HAUBERK_NODE_RENEWAL_GRACE", value_name = "DURATION", default_value = "72h",
          value_parser = grace)]
    pub node_renewal_grace: Duration,

    /// How logs are written.
    #[arg(long, env = "HAUBERK_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// Stop when standard input ends: for a parent that must not leave children behind.
    #[arg(long, hide = true)]
    pub stop_with_stdin: bool,
}

/// How logs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Reads a duration such as `90s`, `10m` or `1h`.
///
/// # Errors
/// If it is none.
pub fn duration(text: &str) -> Result<Duration, String> {
    let explain = || {
        format!("{text:?} is not a duration; write a number with a unit, such as 90s, 10m or 1h")
    };
    let span: jiff::SignedDuration = text.parse().map_err(|_| explain())?;
    Duration::try_from(span).map_err(|_| explain())
}

fn lifetime(text: &str) -> Result<Duration, String> {
    let lifetime = duration(text)?;
    if (MIN_LIFETIME..=MAX_LIFETIME).contains(&lifetime) {
        Ok(lifetime)
    } else {
        Err(format!("{text} is not between 10s and 24h"))
    }
}

fn grace(text: &str) -> Result<Duration, String> {
    let grace = if text == "0" { Duration::ZERO } else { duration(text)? };
    if grace <= MAX_GRACE {
        Ok(grace)
    } else {
        Err(format!("{text} is longer than 2160h (90 days)"))
    }
}

impl Args {
    /// What the command line gives if only the trust domain is named.
    #[must_use]
    pub fn defaults(trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            data: "/var/lib/hauberk/control-plane".into(),
            manifests: "/etc/hauberk/manifests".into(),
            allow_empty: false,
            new_epoch: false,
            taint_nodes: false,
            kubernetes: false,
            ca: None,
            ca_secret: None,
            agent_service_account: "hauberk-agent".to_owned(),
            listen: SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, 8443)),
            advertise: None,
            metrics: SocketAddr::from((std::net::Ipv4Addr::LOCALHOST, 9464)),
            webhook: None,
            workload_certificate_lifetime: Duration::from_secs(3600),
            node_certificate_lifetime: MAX_LIFETIME,
            node_renewal_grace: USUAL_GRACE,
            log_format: LogFormat::Text,
            stop_with_stdin: false,
        }
    }

    /// The address that join tokens tell.
    ///
    /// # Errors
    /// If none is given and the listening address stands for all addresses.
    pub fn advertised(&self) -> Result<String, String> {
        match &self.advertise {
            Some(address)
                if address.rsplit_once(':').is_some_and(|(host, port)| {
                    !host.is_empty() && port.parse::<u16>().is_ok()
                }) =>
            {
                Ok(address.clone())
            }
            Some(address) => Err(format!(
                "--advertise {address:?} is not host:port, such as cp.example.org:8443"
            )),
            None if self.listen.ip().is_unspecified() => Err(format!(
                "--listen {} stands for every address, so join tokens cannot name one; \
                 add --advertise HOST:PORT with the address that machines reach",
                self.listen
            )),
            None => Ok(self.listen.to_string()),
        }
    }
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
        let parsed = Command::parse_from(["control-plane", "--trust-domain", "example.org"]).args;
        let defaults = Args::defaults("example.org".parse().unwrap());
        assert_eq!(format!("{parsed:?}"), format!("{defaults:?}"));
    }

    #[test]
    fn the_webhook_is_a_clusters() {
        let arguments = ["control-plane", "--trust-domain=example.org", "--webhook=[::]:9443"];
        assert!(Command::try_parse_from(arguments).is_err());
        let more = arguments.into_iter().chain(["--kubernetes"]);
        assert_eq!(Command::parse_from(more).args.webhook.unwrap().port(), 9443);
    }

    #[test]
    fn a_grace_is_nothing_or_a_duration_up_to_90_days() {
        let hours = |hours: u64| Ok(Duration::from_secs(hours * 3600));
        assert_eq!(grace("0"), Ok(Duration::ZERO));
        assert_eq!(grace("0s"), Ok(Duration::ZERO));
        assert_eq!(grace("168h"), hours(168));
        assert_eq!(grace("2160h"), hours(2160));
        assert_eq!(grace("2161h"), Err("2161h is longer than 2160h (90 days)".to_owned()));
        assert!(grace("3").is_err() && grace("-1h").is_err());
    }

    #[test]
    fn a_lifetime_outside_its_bounds_is_refused() {
        for (text, good) in
            [("9s", false), ("10s", true), ("24h", true), ("25h", false), ("x", false)]
        {
            assert_eq!(lifetime(text).is_ok(), good, "{text}");
        }
    }
}
