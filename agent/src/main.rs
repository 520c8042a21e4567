//! The agent as a program of its own.

use clap::Parser;
use hauberk_agent::{app, boot, config::Args};

/// The Hauberk agent: captures the connections of this node's workloads and carries them in mutual TLS.
#[derive(Parser)]
#[command(name = "hauberk-agent", version)]
struct Command {
    #[command(flatten)]
    args: Args,

    #[command(subcommand)]
    action: Option<Action>,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Removes every capture rule, of the host and of the network namespaces it knows of.
    Cleanup,
    /// Closes what the workloads of this machine serve and refuses what they send, by the state on disk, until an
    /// agent starts: for a unit that runs before the network is up.
    Close,
}

fn main() -> std::process::ExitCode {
    let command = Command::parse();
    match command.action {
        None => app::main(command.args),
        Some(Action::Cleanup) => app::cleanup(&command.args),
        Some(Action::Close) => boot::close(&command.args),
    }
}
