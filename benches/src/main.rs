//! The benchmark anyone can run: raw TCP, a plain relay of the project's own, haproxy, stunnel and Hauberk
//! between the same kind of namespaces, in interleaved rounds, with medians and ratios.
//!
//! `just bench` runs all of it, `just bench-quick` a form of under five minutes. See docs/performance.md.
//! Besides, what single parts cost, and whether agents stay as they are for a million connections.

mod apps;
mod contenders;
mod counts;
mod decide;
mod figures;
mod load;
mod plain;
mod processes;
mod records;
mod report;
mod serve;
mod soak;
mod world;

use std::{ffi::OsString, net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, Subcommand};

/// The children of the lab are this very program, as the `hauberk` command.
const AS_HAUBERK: &str = "--as-hauberk";

#[derive(Parser)]
#[command(about = "Measures Hauberk beside what anyone can install", disable_version_flag = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the rounds and write the table.
    Run(RunArgs),
    /// Run three programs of others straight and through the mesh: pgbench with one client, redis-benchmark with 64, iperf3.
    /// Needs root, since PostgreSQL does not run as root.
    Apps(AppsArgs),
    /// Count the instructions of the steps of a connection, under valgrind, and hold them against the
    /// written ones.
    Counts {
        /// Write them anew instead.
        #[arg(long)]
        write: bool,
    },
    /// Measure what sealing and opening records costs, beside rustls' own ways to do it.
    Records(records::Args),
    /// Measure how long a decision takes, with few policies and with many.
    Decide(decide::Args),
    /// Send a million connections and much bulk through one mesh, and fail if the agents' memory or open
    /// files do not come back to where they were.
    Soak(soak::Args),
    /// One of the steps that are counted, so many times.
    #[command(hide = true)]
    Step { step: counts::Step, times: usize },
    /// The server of the load: echo, sink, source and one-shot, on ports one after the other.
    #[command(hide = true)]
    Serve { address: SocketAddr },
    /// One load, whose result is printed as JSON.
    #[command(hide = true)]
    Load(load::Args),
    /// One part of the soak's load, whose result is printed as JSON.
    #[command(hide = true)]
    SoakPart(soak::PartArgs),
    /// One half of the plain relay chain.
    #[command(hide = true)]
    Plain { listen: SocketAddr, to: SocketAddr },
}

/// What is measured, and how long.
#[derive(clap::Args)]
pub(crate) struct RunArgs {
    /// Two rounds of short measurements, under five minutes: nothing of 10,000 connections.
    #[arg(long)]
    pub(crate) quick: bool,
    /// Rounds; each measures every contender, in another order.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// An earlier build of the `hauberk` command, to be measured as a contender of its own, `before`.
    #[arg(long, value_name = "PATH")]
    pub(crate) before: Option<PathBuf>,
    /// Only these contenders: raw, plain, haproxy, stunnel, hauberk, before, one-node, verified-local.
    #[arg(long, value_delimiter = ',')]
    contenders: Vec<String>,
    /// Only figures of these: memory, throughput, round trips, new connections, fairness, crowd.
    #[arg(long, value_delimiter = ',')]
    figures: Vec<String>,
    /// Rules in Hauberk's policy, besides the one that allows the load.
    #[arg(long, default_value_t = 10_000)]
    rules: usize,
    /// How long Hauberk's certificates live; they are renewed at the half, all the time.
    #[arg(long, default_value = "60s")]
    certificate_lifetime: String,
    /// The folder for the table (performance-table.md), the plot (performance.svg) and the raw figures
    /// (performance.json); nothing is written without it.
    #[arg(long)]
    out: Option<PathBuf>,
}

/// How long, and beside which earlier build.
#[derive(clap::Args)]
pub(crate) struct AppsArgs {
    /// Rounds; each measures every contender, in another order.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// An earlier build of the `hauberk` command, to be measured as a contender of its own, `before`.
    #[arg(long, value_name = "PATH")]
    before: Option<PathBuf>,
}

impl From<AppsArgs> for RunArgs {
    fn from(args: AppsArgs) -> Self {
        let AppsArgs { rounds, seconds, before } = args;
        let mut contenders = vec!["raw".to_owned(), "hauberk".to_owned()];
        contenders.extend(before.as_ref().map(|_| "before".to_owned()));
        Self {
            quick: false,
            rounds,
            seconds,
            before,
            contenders,
            figures: vec![figures::APPS.to_owned()],
            rules: 10_000,
            certificate_lifetime: "60s".to_owned(),
            out: None,
        }
    }
}

impl RunArgs {
    fn rounds(&self) -> usize {
        if self.quick { 2 } else { self.rounds.max(1) }
    }

    fn duration(&self) -> Duration {
        Duration::from_secs_f64(if self.quick { 0.5 } else { self.seconds })
    }
}

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    if arguments.nth(1).is_some_and(|first| first == AS_HAUBERK) {
        let rest: Vec<OsString> = arguments.collect();
        return hauberk_cli::main(std::iter::once(OsString::from("hauberk")).chain(rest));
    }
    let outcome = match Cli::parse().command {
        Command::Run(args) => figures::run(&args),
        Command::Apps(args) => figures::run(&args.into()),
        Command::Counts { write } => counts::run(write),
        Command::Records(args) => records::run(&args),
        Command::Decide(args) => decide::run(&args),
        Command::Soak(args) => soak::run(&args),
        Command::Step { step, times } => counts::steps(step, times),
        Command::Serve { address } => serve::run(address),
        Command::Load(args) => load::run(&args),
        Command::SoakPart(args) => soak::part(&args),
        Command::Plain { listen, to } => plain::run(listen, to),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
