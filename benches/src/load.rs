//! The application that calls: one kind of load for a time, whose result is JSON on standard output.

use std::{
    io::{self, Write},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::serve::Port;

/// What is loaded, and how.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    kind: Kind,
    /// The server's first port.
    address: SocketAddr,
    /// Connections at once.
    #[arg(long, default_value_t = 1)]
    connections: usize,
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// For `idle`: each connection carries something once before it rests.
    #[arg(long)]
    burst: bool,
    /// For `fair`: one bulk stream beside the small ones.
    #[arg(long)]
    bulk: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Bytes from the caller.
    Up,
    /// Bytes to the caller.
    Down,
    /// 64 bytes there and back, one after the other.
    Rounds,
    /// Connect, one byte, one byte back, closed; over and over.
    Connects,
    /// Connections that are held until standard input ends.
    Idle,
    /// Small exchanges, 10 a second on each connection, with or without a bulk stream beside them.
    Fair,
}

/// What was measured.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Measured {
    /// Bytes, exchanges or connections.
    pub(crate) count: u64,
    pub(crate) seconds: f64,
    /// Of single exchanges or connections, in µs: the 50th, 99th and 99.9th in a hundred.
    pub(crate) latency_us: Option<[f64; 3]>,
    /// Attempts that failed.
    pub(crate) failed: u64,
}

impl Measured {
    pub(crate) fn per_second(&self) -> f64 {
        #[allow(clippy::as_conversions, reason = "a count for a rate")]
        let count = self.count as f64;
        count / self.seconds
    }
}

/// Time for the congestion window, pools and caches.
const WARM_UP: Duration = Duration::from_millis(400);

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    crate::processes::raise_file_limit()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let measured = runtime.block_on(async {
        match args.kind {
            Kind::Up | Kind::Down => bulk(args).await,
            Kind::Rounds => rounds(args).await,
            Kind::Connects => connects(args).await,
            Kind::Idle => idle(args).await,
            Kind::Fair => fair(args).await,
        }
    })?;
    println!("{}", serde_json::to_string(&measured)?);
    Ok(())
}

fn address(args: &Args, port: Port) -> SocketAddr {
    SocketAddr::new(args.address.ip(), args.address.port() + port.offset())
}

pub(crate) async fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn bulk(args: &Args) -> anyhow::Result<Measured> {
    let moved = Arc::new(AtomicU64::new(0));
    let mut tasks = Vec::new();
    for _ in 0..args.connections {
        let moved = moved.clone();
        let up = args.kind == Kind::Up;
        let to = address(args, if up { Port::Sink } else { Port::Source });
        let mut stream = connect(to).await.context("connect")?;
        tasks.push(tokio::spawn(async move {
            let mut buffer = vec![3; 1 << 20];
            loop {
                let count = if up {
                    stream.write(&buffer).await?
                } else {
                    stream.read(&mut buffer).await?
                };
                if count == 0 {
                    return io::Result::Ok(());
                }
                moved.fetch_add(u64::try_from(count).unwrap_or(0), Ordering::Relaxed);
            }
        }));
    }
    tokio::time::sleep(WARM_UP).await;
    let (before, started) = (moved.load(Ordering::Relaxed), Instant::now());
    tokio::time::sleep(Duration::from_secs_f64(args.seconds)).await;
    let count = moved.load(Ordering::Relaxed) - before;
    let seconds = started.elapsed().as_secs_f64();
    let failed = tasks.iter().filter(|task| task.is_finished()).count();
    tasks.iter().for_each(tokio::task::JoinHandle::abort);
    Ok(Measured { count, seconds, latency_us: None, failed: u64::try_from(failed)? })
}

async fn exchange(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<()> {
    stream.write_all(buffer).await?;
    stream.read_exact(buffer).await?;
    Ok(())
}

async fn rounds(args: &Args) -> anyhow::Result<Measured> {
    let (measuring, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let mut tasks = Vec::new();
    for _ in 0..args.connections {
        let (measuring, stop) = (measuring.clone(), stop.clone());
        let mut stream = connect(address(args, Port::Echo)).await.context("connect")?;
        tasks.push(tokio::spawn(async move {
            let (mut buffer, mut times) = ([5; 64], Vec::new());
            while !stop.load(Ordering::Relaxed) {
                let started = Instant::now();
                exchange(&mut stream, &mut buffer).await?;
                if measuring.load(Ordering::Relaxed) {
                    times.push(started.elapsed());
                }
            }
            io::Result::Ok(times)
        }));
    }
    tokio::time::sleep(WARM_UP).await;
    measuring.store(true, Ordering::Relaxed);
    let started = Instant::now();
    tokio::time::sleep(Duration::from_secs_f64(args.seconds)).await;
    let seconds = started.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    collect(tasks, seconds).await
}

async fn collect(
    tasks: Vec<tokio::task::JoinHandle<io::Result<Vec<Duration>>>>,
    seconds: f64,
) -> anyhow::Result<Measured> {
    let (mut all, mut failed) = (Vec::new(), 0);
    for task in tasks {
        match task.await? {
            Ok(times) => all.extend(times),
            Err(_) => failed += 1,
        }
    }
    Ok(Measured {
        count: u64::try_from(all.len())?,
        seconds,
        latency_us: percentiles(&mut all),
        failed,
    })
}

fn percentiles(times: &mut [Duration]) -> Option<[f64; 3]> {
    times.sort_unstable();
    let at = |per_mille: usize| {
        let place = (times.len() * per_mille / 1000).min(times.len().checked_sub(1)?);
        Some(times.get(place)?.as_secs_f64() * 1e6)
    };
    Some([at(500)?, at(990)?, at(999)?])
}

async fn connects(args: &Args) -> anyhow::Result<Measured> {
    let (measuring, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let failures = Arc::new(AtomicU64::new(0));
    let mut tasks = Vec::new();
    for _ in 0..args.connections {
        let (measuring, stop) = (measuring.clone(), stop.clone());
        let failures = failures.clone();
        let to = address(args, Port::Once);
        tasks.push(tokio::spawn(async move {
            let mut times = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let started = Instant::now();
                match once(to).await {
                    Ok(()) if measuring.load(Ordering::Relaxed) => times.push(started.elapsed()),
                    Ok(()) => {}
                    Err(_) => {
                        failures.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
            io::Result::Ok(times)
        }));
    }
    tokio::time::sleep(WARM_UP).await;
    measuring.store(true, Ordering::Relaxed);
    let started = Instant::now();
    tokio::time::sleep(Duration::from_secs_f64(args.seconds)).await;
    let seconds = started.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    let mut measured = collect(tasks, seconds).await?;
    measured.failed += failures.load(Ordering::Relaxed);
    Ok(measured)
}

/// The server closes first, so that no port of the caller is left waiting.
pub(crate) async fn once(to: SocketAddr) -> io::Result<()> {
    let mut stream = connect(to).await?;
    let mut byte = [9];
    exchange(&mut stream, &mut byte).await?;
    match stream.read(&mut byte).await? {
        0 => Ok(()),
        _ => Err(io::Error::other("more than one byte came back")),
    }
}

async fn idle(args: &Args) -> anyhow::Result<Measured> {
    let mut held = Vec::new();
    let mut buffer = [1; 1024];
    for _ in 0..args.connections {
        let mut stream = connect(address(args, Port::Echo)).await.context("connect")?;
        // One byte, so that the whole way stands.
        exchange(&mut stream, &mut buffer[..1]).await.context("first byte")?;
        held.push(stream);
    }
    if args.burst {
        for stream in &mut held {
            exchange(stream, &mut buffer).await.context("burst")?;
        }
    }
    println!("holding");
    io::stdout().flush()?;
    // Ends with the one who measures.
    let mut stdin = tokio::io::stdin();
    while stdin.read(&mut buffer).await? > 0 {}
    Ok(Measured { count: u64::try_from(held.len())?, ..Measured::default() })
}

async fn fair(args: &Args) -> anyhow::Result<Measured> {
    const PAUSE: Duration = Duration::from_millis(100);
    let bulk = if args.bulk {
        let mut stream = connect(address(args, Port::Sink)).await.context("connect")?;
        let buffer = vec![3; 1 << 20];
        Some(tokio::spawn(async move { while stream.write_all(&buffer).await.is_ok() {} }))
    } else {
        None
    };
    let (measuring, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let mut tasks = Vec::new();
    for number in 0..args.connections {
        let (measuring, stop) = (measuring.clone(), stop.clone());
        let mut stream = connect(address(args, Port::Echo)).await.context("connect")?;
        // So that the whole way stands before the clock runs.
        exchange(&mut stream, &mut [5]).await.context("first byte")?;
        tasks.push(tokio::spawn(async move {
            let (mut buffer, mut times) = ([5; 64], Vec::new());
            // Spread over the pause.
            tokio::time::sleep(PAUSE * u32::try_from(number % 100).unwrap_or(0) / 100).await;
            while !stop.load(Ordering::Relaxed) {
                let started = Instant::now();
                exchange(&mut stream, &mut buffer).await?;
                if measuring.load(Ordering::Relaxed) {
                    times.push(started.elapsed());
                }
                tokio::time::sleep(PAUSE).await;
            }
            io::Result::Ok(times)
        }));
    }
    tokio::time::sleep(WARM_UP).await;
    measuring.store(true, Ordering::Relaxed);
    let started = Instant::now();
    tokio::time::sleep(Duration::from_secs_f64(args.seconds)).await;
    let seconds = started.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    let measured = collect(tasks, seconds).await;
    if let Some(bulk) = bulk {
        bulk.abort();
    }
    measured
}
