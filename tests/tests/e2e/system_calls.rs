//! What a connection asks of the kernel.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, ensure};
use hauberk_tests::mesh::{Mesh, PATIENCE};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

crate::trials!(a_short_connection_takes_few_system_calls);

/// Callers, each with one connection after another.
const CALLERS: u32 = 16;

/// Connections of each: enough that what happens now and then hardly counts.
const CONNECTIONS: u32 = 60;

/// Calls of both agents together for one connection, with what happens beside it: 43.3 were counted.
const MOST: f64 = 46.0;

/// What is started now has this one CPU, and counts its threads accordingly: which of them wakes another is chance.
struct OneCpu(CpuSet);

impl OneCpu {
    fn pin() -> anyhow::Result<Self> {
        let before = sched_getaffinity(Pid::from_raw(0))?;
        let mut one = CpuSet::new();
        let last = (0..CpuSet::count()).rev().find(|cpu| before.is_set(*cpu) == Ok(true));
        one.set(last.context("no CPU")?)?;
        sched_setaffinity(Pid::from_raw(0), &one)?;
        Ok(Self(before))
    }
}

impl Drop for OneCpu {
    fn drop(&mut self) {
        if let Err(error) = sched_setaffinity(Pid::from_raw(0), &self.0) {
            eprintln!("error: this thread keeps its one CPU: {error}");
        }
    }
}

/// `strace` on a running process.
struct Tracer {
    child: Child,
    table: std::path::PathBuf,
}

impl Tracer {
    /// Follows all threads of the process.
    fn attach(process: u32, table: &Path) -> anyhow::Result<Self> {
        let mut child = Command::new("strace")
            .args(["-f", "-c", "-o"])
            .arg(table)
            .args(["-p", &process.to_string()])
            .stderr(Stdio::piped())
            .spawn()
            .context("start strace; ./test installs what the tests need")?;
        let mut told = BufReader::new(child.stderr.take().context("no standard error")?);
        let mut line = String::new();
        told.read_line(&mut line)?;
        ensure!(line.contains("attached"), "strace: {line}");
        // Of further threads it tells more lines, which nobody needs.
        thread::spawn(move || std::io::copy(&mut told, &mut std::io::sink()));
        Ok(Self { child, table: table.to_owned() })
    }

    /// How often each call was made.
    fn calls(mut self) -> anyhow::Result<BTreeMap<String, u32>> {
        kill(Pid::from_raw(i32::try_from(self.child.id())?), Signal::SIGINT)?;
        self.child.wait()?;
        let text = fs::read_to_string(&self.table)?;
        let mut calls = BTreeMap::new();
        for line in text.lines() {
            // % time, seconds, usecs/call, calls, perhaps errors, syscall.
            let words: Vec<_> = line.split_whitespace().collect();
            let (Some(count), Some(name)) = (words.get(3), words.last()) else { continue };
            if let Ok(count) = count.parse()
                && *name != "total"
                // Of debug builds alone, which look at each descriptor before they use or close it.
                && *name != "fcntl"
            {
                calls.insert((*name).to_owned(), count);
            }
        }
        ensure!(!calls.is_empty(), "strace wrote no table:\n{text}");
        Ok(calls)
    }
}

/// Answers each connection's first byte and waits for its end.
fn answering(listener: TcpListener) {
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut byte = [0];
                // A caller that has gone shows on its own side.
                if stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {
                    drop(stream.read(&mut byte));
                }
            });
        }
    });
}

fn exchange(mesh: &Mesh) -> anyhow::Result<()> {
    let mut stream: TcpStream = mesh.connect("checkout", mesh.ledger(8080))?;
    stream.write_all(b"x")?;
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    Ok(())
}

/// Of all callers at once, so many each.
fn exchange_all(mesh: &Mesh, connections: u32) -> anyhow::Result<()> {
    thread::scope(|scope| {
        let calling = || (0..connections).try_for_each(|_| exchange(mesh));
        let callers: Vec<_> = (0..CALLERS).map(|_| scope.spawn(calling)).collect();
        callers.into_iter().try_for_each(|caller| {
            caller.join().map_err(|_| anyhow::anyhow!("a caller panicked"))?
        })
    })
}

fn a_short_connection_takes_few_system_calls() -> anyhow::Result<()> {
    let one = OneCpu::pin()?;
    let mesh = Mesh::start()?;
    drop(one);
    answering(mesh.listen("ledger", mesh.ledger(8080))?);
    exchange_all(&mesh, 2)?;
    let tracers = ["machine-a", "machine-b"].map(|machine| {
        let process = mesh.process(machine).context("no agent runs")?;
        Tracer::attach(process, &mesh.folder().join(format!("{machine}.strace")))
    });
    let [near, far] = tracers;
    let (near, far) = (near?, far?);
    // For the threads that are followed a moment later.
    thread::sleep(Duration::from_millis(500));
    exchange_all(&mesh, CONNECTIONS)?;
    mesh.wait("the end of all connections", PATIENCE, |mesh| {
        let open = mesh.metric("machine-b", "hauberk_open_connections", &[])?;
        ensure!(open < 0.5, "{open} are open");
        Ok(())
    })?;
    let mut sum = 0.0;
    for (side, tracer) in [("caller's agent", near), ("destination's agent", far)] {
        let calls = tracer.calls()?;
        let each = |count: u32| f64::from(count) / f64::from(CALLERS * CONNECTIONS);
        let mut names: Vec<_> = calls.iter().filter(|(_, count)| each(**count) >= 0.05).collect();
        names.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        let all = each(calls.values().sum());
        let listed: Vec<_> =
            names.iter().map(|(name, count)| format!("{name} {:.2}", each(**count))).collect();
        println!("{side}: {all:.1} calls a connection: {}", listed.join(", "));
        sum += all;
    }
    println!("both: {sum:.1}");
    // Both were followed: an application's two ends alone take as many.
    ensure!(sum > 20.0, "only {sum:.1} system calls were seen");
    ensure!(sum <= MOST, "{sum:.1} system calls for a short connection, not {MOST}");
    Ok(())
}
