//! A million connections and much bulk through one mesh: whether the agents are afterwards what they were
//! before.
//!
//! The field is that of the benchmark, certificates of a minute and all, so that renewals go on meanwhile.
//! What may stay behind is what one wave of connections leaves: idle sessions, until they are a minute
//! old, and what the allocator keeps. A leak grows with the number of connections, and shows.

use std::{
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::ensure;
use clap::ValueEnum;
use hauberk_cli::lab;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{
    contenders::{Contender, Field, Ready},
    load::{connect, once},
    processes,
    serve::Port,
};

/// What the agents are started with besides: the place for settings that make rare things frequent, such
/// as the renewal of keys.
const AGENT_ARGUMENTS: &[&str] = &["--records-per-key", "4096"];

/// Connections after which an agent is warm, and bulk, for the buffers of its thread.
const WARM_CONNECTIONS: u64 = 10_000;
const WARM_BYTES: u64 = 256 << 20;

/// How long nothing happens before memory is looked at.
const QUIET: Duration = Duration::from_secs(10);

/// Idle sessions are gone by then: a caller's agent closes one after 60 s, the server's after 90 s.
const IDLE_PATIENCE: Duration = Duration::from_secs(120);

/// Files that an agent may have open above those before the first connection: a renewal can be under way.
const FILES_MORE: usize = 4;

/// Connections that carry the bulk.
const STREAMS: u64 = 4;

/// A part of the load that is slower than this is broken off, with so many seconds besides.
const LEAST_CONNECTIONS_A_SECOND: u64 = 100;
const LEAST_BYTES_A_SECOND: u64 = 20 << 20;
const MORE_SECONDS: u64 = 60;

/// How long one connection may take.
const CONNECTION_PATIENCE: Duration = Duration::from_secs(10);

/// A worker that has met so many failures stops: it would meet nothing else.
const MAX_FAILURES: u64 = 20;

const AGENTS: [&str; 2] = ["caller's agent", "server's agent"];

/// How much goes through.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Connections in total: connect, one byte, one byte back, closed.
    #[arg(long, default_value_t = 1_000_000)]
    connections: u64,
    /// Bulk after them, half of it each way, such as 16GiB, 512MiB or a number of bytes.
    #[arg(long, value_name = "SIZE", default_value = "16GiB", value_parser = size)]
    bytes: u64,
    /// Connections at once.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=4_096))]
    concurrent: u64,
    /// Rules in the policy, besides the one that allows the load.
    #[arg(long, default_value_t = 10_000)]
    rules: usize,
    /// How much an agent's memory may grow from its warm state on, in kB. Less than the default comes
    /// and goes with what the heap keeps.
    #[arg(long, value_name = "KB", default_value_t = 16_384)]
    growth: u32,
}

/// One part of the load, in a process of its own where the caller is.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct PartArgs {
    part: Part,
    /// The server's first port.
    address: SocketAddr,
    /// Connections or bytes, of all workers together.
    #[arg(long)]
    count: u64,
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    workers: u64,
    /// It is broken off after so many seconds.
    #[arg(long)]
    seconds: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Short connections, one after the other.
    Connections,
    /// Bytes from the caller.
    Up,
    /// Bytes to the caller.
    Down,
}

impl Part {
    fn word(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Up => "up",
            Self::Down => "down",
        }
    }

    /// Seconds that it may take.
    fn patience(self, count: u64) -> u64 {
        let a_second = match self {
            Self::Connections => LEAST_CONNECTIONS_A_SECOND,
            Self::Up | Self::Down => LEAST_BYTES_A_SECOND,
        };
        MORE_SECONDS + count / a_second
    }
}

/// What became of a part.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Done {
    /// Connections, or bytes of connections that came to their end.
    count: u64,
    /// Connections.
    failed: u64,
    /// The first failure.
    failure: Option<String>,
}

impl Done {
    fn add(&mut self, other: Self) {
        self.count += other.count;
        self.failed += other.failed;
        self.failure = self.failure.take().or(other.failure);
    }

    fn fail(&mut self, failure: String) {
        self.failed += 1;
        self.failure.get_or_insert(failure);
    }
}

/// Runs it all. An error if anything failed or stayed behind.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    lab::become_root()?;
    lab::listen_for_interrupts()?;
    processes::raise_file_limit()?;
    let field = Field::new(args.rules, "60s", AGENT_ARGUMENTS, None)?;
    eprintln!("the field is ready: {}, {} rules", field.status()?, args.rules);
    let agents = field.agents()?;
    let start = states(agents)?;
    let ready = field.ready(Contender::Hauberk)?;
    let mut soak =
        Soak { field: &field, ready, agents, started: Instant::now(), all: Done::default() };
    println!("{:<26} {:>7}   {:<28} {:<28}", "", "", AGENTS[0], AGENTS[1]);
    let head = format!("{:>9} {:>7} {:>8}  ", "kB", "files", "threads");
    println!("{:<26} {:>7} {head} {head}", "after", "s");
    soak.row("nothing", &start);

    let warm_connections = WARM_CONNECTIONS.min(args.connections);
    soak.connections(warm_connections, args.concurrent)?;
    soak.bulk(WARM_BYTES.min(args.bytes))?;
    let warm = soak.quiet()?;
    soak.row(&format!("{warm_connections} connections, quiet"), &warm);

    let mut made = warm_connections;
    for tenth in 1..=10 {
        let goal = args.connections.saturating_mul(tenth) / 10;
        if goal <= made {
            continue;
        }
        soak.connections(goal - made, args.concurrent)?;
        made = goal;
        soak.row(&format!("{made} connections"), &states(agents)?);
    }
    soak.bulk(args.bytes)?;
    soak.row(&format!("{} of bulk", shown_size(args.bytes)), &states(agents)?);
    let end = soak.quiet()?;
    soak.row("quiet", &end);
    let rested = soak.files_back(&start)?;
    soak.row("idle sessions closed", &rested);
    judge(args, &soak.all, [start, warm, end, rested])
}

/// Says what stayed behind, and whether that is too much.
fn judge(
    args: &Args,
    all: &Done,
    [start, warm, end, rested]: [[State; 2]; 4],
) -> anyhow::Result<()> {
    println!();
    let mut wrong = Vec::new();
    for (agent, (warm, end)) in AGENTS.iter().zip(warm.iter().zip(&end)) {
        let growth = end.kilobytes - warm.kilobytes;
        println!("{agent}: {growth:+.0} kB since it was warm, at most {} are allowed", args.growth);
        if growth > f64::from(args.growth) {
            wrong.push(format!("{agent}: memory grew by {growth:.0} kB"));
        }
    }
    for (agent, (start, rested)) in AGENTS.iter().zip(start.iter().zip(&rested)) {
        let (before, after) = (start.files, rested.files);
        println!("{agent}: {before} files before, {after} after; {FILES_MORE} more are allowed");
        if after > before + FILES_MORE {
            wrong.push(format!("{agent}: {after} files are open, {before} were"));
        }
    }
    println!("{} connections failed", all.failed);
    if let Some(failure) = &all.failure {
        wrong.push(format!("{} connections failed, the first one: {failure}", all.failed));
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}

/// What an agent has at a moment.
#[derive(Debug, Clone, Copy)]
struct State {
    kilobytes: f64,
    files: usize,
    threads: usize,
}

fn states([near, far]: [u32; 2]) -> anyhow::Result<[State; 2]> {
    let state = |process| {
        anyhow::Ok(State {
            kilobytes: processes::memory_bytes(process)? / 1024.0,
            files: processes::open_files(process)?,
            threads: processes::threads(process)?,
        })
    };
    Ok([state(near)?, state(far)?])
}

struct Soak<'a> {
    field: &'a Field,
    ready: Ready<'a>,
    agents: [u32; 2],
    started: Instant,
    /// What became of all parts.
    all: Done,
}

impl Soak<'_> {
    fn row(&self, label: &str, states: &[State; 2]) {
        let [near, far] = states.map(|state| {
            let State { kilobytes, files, threads } = state;
            format!("{kilobytes:>9.0} {files:>7} {threads:>8}  ")
        });
        println!("{label:<26} {:>7.0} {near} {far}", self.started.elapsed().as_secs_f64());
    }

    fn connections(&mut self, count: u64, workers: u64) -> anyhow::Result<()> {
        self.part(Part::Connections, count, workers)
    }

    fn bulk(&mut self, bytes: u64) -> anyhow::Result<()> {
        self.part(Part::Up, bytes / 2, STREAMS)?;
        self.part(Part::Down, bytes - bytes / 2, STREAMS)
    }

    /// One part to its end. That some of it failed is kept for the end; that it was broken off ends everything.
    fn part(&mut self, part: Part, count: u64, workers: u64) -> anyhow::Result<()> {
        lab::interrupted()?;
        let started = Instant::now();
        let arguments = [
            "soak-part".to_owned(),
            part.word().to_owned(),
            format!("--count={count}"),
            format!("--workers={workers}"),
            format!("--seconds={}", part.patience(count)),
        ];
        let done: Done = self.ready.load_with(&arguments)?;
        self.field.drop_records()?;
        let (seconds, word) = (started.elapsed().as_secs_f64(), part.word());
        let (whole, failed) = (done.count, done.failed);
        eprintln!("{word}: {whole} of {count} in {seconds:.1} s, {failed} connections failed");
        self.all.add(done);
        let failure = self.all.failure.as_deref().unwrap_or_default();
        ensure!(failed < MAX_FAILURES, "{word}: {failed} connections failed, the first: {failure}");
        // Streams that take too long have failed.
        ensure!(
            part != Part::Connections || whole + failed == count,
            "{word}: {whole} of {count} were made in {seconds:.0} s, that is too few"
        );
        Ok(())
    }

    /// The agents once nothing has happened for a while.
    fn quiet(&self) -> anyhow::Result<[State; 2]> {
        eprintln!("quiet for {} s", QUIET.as_secs());
        let until = Instant::now() + QUIET;
        while Instant::now() < until {
            lab::interrupted()?;
            std::thread::sleep(Duration::from_millis(100));
        }
        states(self.agents)
    }

    /// Waits until as many files are open as before, or idle sessions have had their time.
    fn files_back(&self, start: &[State; 2]) -> anyhow::Result<[State; 2]> {
        eprintln!("waiting for idle sessions to end, at most {} s", IDLE_PATIENCE.as_secs());
        let until = Instant::now() + IDLE_PATIENCE;
        loop {
            lab::interrupted()?;
            let now = states(self.agents)?;
            let back = now.iter().zip(start).all(|(now, start)| now.files <= start.files);
            if back || Instant::now() >= until {
                return Ok(now);
            }
            std::thread::sleep(Duration::from_millis(500));
        }
    }
}

/// A part of the load, whose result is JSON on standard output.
pub(crate) fn part(args: &PartArgs) -> anyhow::Result<()> {
    processes::raise_file_limit()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let done = runtime.block_on(workers(args))?;
    println!("{}", serde_json::to_string(&done)?);
    Ok(())
}

async fn workers(args: &PartArgs) -> anyhow::Result<Done> {
    let patience = Duration::from_secs(args.seconds);
    let mut tasks = Vec::new();
    for number in 0..args.workers {
        let share = args.count / args.workers + u64::from(number < args.count % args.workers);
        let (part, address) = (args.part, args.address);
        tasks.push(tokio::spawn(async move {
            match part {
                Part::Connections => {
                    connections(at(address, Port::Once), share, Instant::now() + patience).await
                }
                Part::Up => stream(share, patience, up(at(address, Port::Sink), share)).await,
                Part::Down => stream(share, patience, down(at(address, Port::Source), share)).await,
            }
        }));
    }
    let mut all = Done::default();
    for task in tasks {
        all.add(task.await?);
    }
    Ok(all)
}

fn at(address: SocketAddr, port: Port) -> SocketAddr {
    SocketAddr::new(address.ip(), address.port() + port.offset())
}

async fn connections(to: SocketAddr, count: u64, until: Instant) -> Done {
    let mut done = Done::default();
    for _ in 0..count {
        if done.failed >= MAX_FAILURES || Instant::now() >= until {
            break;
        }
        match tokio::time::timeout(CONNECTION_PATIENCE, once(to)).await {
            Ok(Ok(())) => done.count += 1,
            Ok(Err(error)) => done.fail(error.to_string()),
            Err(_) => done.fail(format!("not over after {} s", CONNECTION_PATIENCE.as_secs())),
        }
    }
    done
}

/// One connection with so many bytes.
async fn stream(
    bytes: u64,
    patience: Duration,
    work: impl Future<Output = io::Result<()>>,
) -> Done {
    let mut done = Done::default();
    match tokio::time::timeout(patience, work).await {
        Ok(Ok(())) => done.count = bytes,
        Ok(Err(error)) => done.fail(error.to_string()),
        Err(_) => done.fail(format!("not over after {} s", patience.as_secs())),
    }
    done
}

const CHUNK: usize = 1 << 20;

/// Over once the server has read to the end: it closes only then.
async fn up(to: SocketAddr, bytes: u64) -> io::Result<()> {
    let mut stream = connect(to).await?;
    let mut buffer = vec![3; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let length = usize::try_from(left).map_or(CHUNK, |left| left.min(CHUNK));
        stream.write_all(buffer.get(..length).unwrap_or_default()).await?;
        left = left.saturating_sub(u64::try_from(length).unwrap_or(u64::MAX));
    }
    stream.shutdown().await?;
    while stream.read(&mut buffer).await? > 0 {}
    Ok(())
}

/// The server never ends by itself.
async fn down(to: SocketAddr, bytes: u64) -> io::Result<()> {
    let mut stream = connect(to).await?;
    let mut buffer = vec![0; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        left = left.saturating_sub(u64::try_from(count).unwrap_or(u64::MAX));
    }
    Ok(())
}

const UNITS: [(&str, u64); 3] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

/// A size as people write it.
fn size(text: &str) -> Result<u64, String> {
    let (digits, unit) = UNITS
        .iter()
        .find_map(|(suffix, unit)| Some((text.strip_suffix(*suffix)?, *unit)))
        .unwrap_or((text, 1));
    let count: Option<u64> = digits.trim_end().parse().ok();
    count.and_then(|count| count.checked_mul(unit)).ok_or_else(|| {
        "expected a whole number of bytes, KiB, MiB or GiB, such as 16GiB".to_owned()
    })
}

fn shown_size(bytes: u64) -> String {
    let unit = UNITS.iter().find(|(_, unit)| bytes >= *unit && bytes.is_multiple_of(*unit));
    unit.map_or_else(|| format!("{bytes} B"), |(name, unit)| format!("{} {name}", bytes / unit))
}
