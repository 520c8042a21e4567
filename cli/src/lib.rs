//! The `hauberk` command: everything in one file. Runs the control plane and the agent, asks the
//! control plane, and shows all of it in a demonstration.

mod check;
mod control;
mod demo;
pub mod lab;
mod learn;
mod operator;
mod probe;
mod retire;
mod say;
mod up;

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

/// Hauberk: mutual TLS between services, and no connection without permission.
#[derive(Parser)]
#[command(name = "hauberk", version, max_term_width = 100)]
struct Command {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Show the whole of it on this machine: an allowed and a denied connection. Needs no root.
    Demo(demo::Args),
    /// Run control plane and agent in one process: a mesh of this machine, to which others may join.
    Up(up::Args),
    /// Run the control plane.
    ControlPlane(hauberk_control_plane::config::Args),
    /// Run the agent of this node.
    Agent(AgentArgs),
    /// Make this machine a node of a mesh, and run its agent.
    Join(JoinArgs),
    /// Join tokens for new machines.
    #[command(subcommand)]
    Token(TokenAction),
    /// Nodes, workloads and certificates, and which policy each node enforces.
    Status(Asking),
    /// May a workload connect, and which rule says so?
    Why(WhyArgs),
    /// Connections that were denied.
    Denied(DeniedArgs),
    /// Write the AccessPolicies that would allow what was seen and no policy allows yet.
    ///
    /// Label a namespace hauberk.dev/mode=audit (or give workloads mode: Audit), let its traffic run, then
    /// `hauberk learn > policies.yaml`, read what was seen, apply it, and enforce. What was denied is not
    /// learned, and neither is what no policy can allow: that is written as comments, with what to do. No
    /// policy that is there is replaced or repeated.
    Learn(LearnArgs),
    /// Look for what is wrong, with a hint for each finding. Exits with 1 if something is.
    Check(CheckArgs),
    /// Ask whether a control plane answers as agents need it. Exits with 1 if it does not, with 2 if
    /// there is no file of roots to know it by.
    Probe(ProbeArgs),
    /// Before the mesh is uninstalled from a cluster: let every pod go, without a connection failing, and tell
    /// the agents to take what is left of their rules along when they stop.
    Retire(RetireArgs),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

#[derive(clap::Args)]
struct AgentArgs {
    #[command(flatten)]
    args: hauberk_agent::config::Args,

    #[command(subcommand)]
    action: Option<AgentAction>,
}

#[derive(Subcommand)]
enum AgentAction {
    /// Remove every capture rule, of the host and of the named network namespaces.
    Cleanup,
    /// Close what the workloads of this machine serve and refuse what they send, by the state on disk, until an
    /// agent starts: for a unit that runs before the network is up.
    Close,
}

#[derive(clap::Args)]
struct JoinArgs {
    /// The join token.
    token: hauberk_proto::token::JoinToken,

    /// How logs are written; as --log-format.
    #[arg(short, long, value_enum)]
    output: Option<Output>,

    #[command(flatten)]
    args: hauberk_agent::config::Args,
}

#[derive(Subcommand)]
enum TokenAction {
    /// Make a join token: good once, for one machine, for a short time.
    Create {
        /// The machine that may use it, as in its Machine manifest.
        #[arg(long, value_name = "NAME")]
        node: String,
        /// How long it is good, at most 24h.
        #[arg(long, value_name = "DURATION", default_value = "10m",
            value_parser = hauberk_control_plane::config::duration)]
        ttl: std::time::Duration,
        #[command(flatten)]
        asking: Asking,
    },
}

/// Whom to ask, and how to answer.
#[derive(Clone, clap::Args)]
struct Asking {
    #[command(flatten)]
    way: control::Way,

    /// How to write the answer.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Text,
    /// One JSON value, or one a line for a stream.
    Json,
}

#[derive(clap::Args)]
struct WhyArgs {
    /// Who connects: namespace/workload, machine/name or a SPIFFE ID.
    source: String,
    /// To whom: namespace/workload:port, machine/name:port or a SPIFFE ID and :port.
    #[arg(value_name = "DESTINATION:PORT")]
    destination: String,
    #[command(flatten)]
    asking: Asking,
}

#[derive(clap::Args)]
struct DeniedArgs {
    /// Go on with new ones as they come.
    #[arg(short, long)]
    follow: bool,
    /// At most this many past ones.
    #[arg(short = 'n', long, default_value_t = 20)]
    lines: u32,
    #[command(flatten)]
    asking: Asking,
}

#[derive(clap::Args)]
struct LearnArgs {
    /// Only what connects to this namespace, or from it to outside of the mesh.
    #[arg(short, long, value_name = "NAME")]
    namespace: Option<String>,
    /// Only edges whose last connection was opened within this time, such as 24h.
    #[arg(long, value_name = "DURATION",
        value_parser = hauberk_control_plane::config::duration)]
    since: Option<std::time::Duration>,
    /// Learn from denied connections as well. Whoever tried to get in where nobody let it would be
    /// allowed to: read every rule of the answer.
    #[arg(long)]
    include_denied: bool,
    #[command(flatten)]
    asking: Asking,
}

#[derive(clap::Args)]
struct CheckArgs {
    /// Warn of CA certificates that end sooner than this.
    #[arg(long, value_name = "DURATION", default_value = "48h",
        value_parser = hauberk_control_plane::config::duration)]
    expiry_warn: std::time::Duration,
    #[command(flatten)]
    asking: Asking,
}

#[derive(clap::Args)]
struct ProbeArgs {
    /// Where agents connect.
    #[arg(long, value_name = "HOST:PORT")]
    control_plane: String,
    /// The roots that agents trust, PEM.
    #[arg(long, value_name = "FILE")]
    trust_bundle: PathBuf,
    /// How long to try.
    #[arg(long, value_name = "DURATION", default_value = "30s",
        value_parser = hauberk_control_plane::config::duration)]
    timeout: std::time::Duration,
}

#[derive(clap::Args)]
struct RetireArgs {
    /// The namespace of the mesh.
    #[arg(long, value_name = "NAME", default_value = "hauberk-system")]
    namespace: String,
    /// How long to wait for the agents.
    #[arg(long, value_name = "DURATION", default_value = "4m",
        value_parser = hauberk_control_plane::config::duration)]
    timeout: std::time::Duration,
}

/// The name by which `kubectl` finds it.
const PLUGIN: &str = "kubectl-hauberk";

/// Runs the command with these arguments, the program's name first.
#[must_use]
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let called = arguments.first().map(Path::new).and_then(Path::file_name);
    let parser = match called {
        // As people call it, for its help.
        Some(name) if name == PLUGIN => Command::command().bin_name("kubectl hauberk"),
        Some(_) | None => Command::command(),
    };
    let command = Command::from_arg_matches(&parser.get_matches_from(arguments))
        .unwrap_or_else(|error| error.exit());
    let outcome = match command.action {
        Action::Demo(args) => demo::run(&args),
        Action::Up(args) => up::run(&args),
        Action::ControlPlane(args) => return hauberk_control_plane::app::main(args),
        Action::Agent(AgentArgs { args, action: None }) => return hauberk_agent::app::main(args),
        Action::Agent(AgentArgs { args, action: Some(AgentAction::Cleanup) }) => {
            return hauberk_agent::app::cleanup(&args);
        }
        Action::Agent(AgentArgs { args, action: Some(AgentAction::Close) }) => {
            return hauberk_agent::boot::close(&args);
        }
        Action::Join(JoinArgs { token, output, mut args }) => {
            args.join_token = Some(token);
            if let Some(output) = output {
                args.log_format = match output {
                    Output::Text => hauberk_agent::config::LogFormat::Text,
                    Output::Json => hauberk_agent::config::LogFormat::Json,
                };
            }
            return hauberk_agent::app::main(args);
        }
        Action::Token(TokenAction::Create { node, ttl, asking }) => {
            operator::create_token(&asking, node, ttl)
        }
        Action::Retire(args) => retire::run(&args),
        Action::Probe(args) => probe::run(&args),
        Action::Status(asking) => operator::status(&asking),
        Action::Why(args) => operator::why(&args),
        Action::Denied(args) => operator::denied(&args),
        Action::Learn(args) => learn::run(&args),
        Action::Check(args) => check::check(&args),
        Action::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Command::command(), "hauberk", &mut script);
            say::text(&String::from_utf8_lossy(&script));
            Ok(ExitCode::SUCCESS)
        }
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::from(2)
    })
}
