//! The control plane as a program of its own.

use clap::Parser;
use hauberk_control_plane::{app, config::Args};

/// The Hauberk control plane: certificate authority, registry and policy distribution.
#[derive(Parser)]
#[command(name = "hauberk-control-plane", version)]
struct Command {
    #[command(flatten)]
    args: Args,
}

fn main() -> std::process::ExitCode {
    app::main(Command::parse().args)
}
