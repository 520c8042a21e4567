//! What a connection asks of the kernel, and what the cores that carry connections ask of each other.

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

crate::trials!(
    a_short_connection_takes_few_system_calls,
    cores_that_carry_connections_do_not_wait_for_each_other
);

/// Callers, each with one connection after another.
const CALLERS: u32 = 16;

/// Connections of each: enough that what happens now and then hardly counts.
const CONNECTIONS: u32 = 60;

/// Calls of both agents together for one connection, with what happens beside it: 36.8 were counted.
const MOST: f64 = 40.0;

/// Round trips of each caller on an open connection.
const ROUND_TRIPS: u32 = 400;

/// Calls with which one agent's threads that carry connections wait for or wake another thread, for each round trip: 0.000
/// to 0.003 were counted.
const MOST_WAITS: f64 = 0.05;

/// The same for each new connection, of which some are given to the other thread, and all are recorded by a third.
const MOST_WAITS_OF_NEW: f64 = 3.0;

/// CPUs for threads that carry connections: fewer than callers could occupy.
const CPUS: usize = 2;

/// What is started now has few CPUs, and counts its threads accordingly.
struct Pinned(CpuSet);

impl Pinned {
    /// To so many CPUs, or as many as there are.
    fn to(count: usize) -> anyhow::Result<Self> {
        let before = sched_getaffinity(Pid::from_raw(0))?;
        let mut few = CpuSet::new();
        let there = (0..CpuSet::count()).rev().filter(|cpu| before.is_set(*cpu) == Ok(true));
        there.take(count).try_for_each(|cpu| few.set(cpu))?;
        sched_setaffinity(Pid::from_raw(0), &few)?;
        Ok(Self(before))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Err(error) = sched_setaffinity(Pid::from_raw(0), &self.0) {
            eprintln!("error: this thread keeps its few CPUs: {error}");
        }
    }
}

/// `strace` on a running process.
struct Tracer {
    child: Child,
    table: std::path::PathBuf,
}

impl Tracer {
    /// Follows all threads of the process; `what` it writes into the table.
    fn attach(process: u32, table: &Path, what: &[&str]) -> anyhow::Result<Self> {
        let mut child = Command::new("strace")
            .arg("-f")
            .args(what)
            .arg("-o")
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

    /// What it has written.
    fn end(mut self) -> anyhow::Result<String> {
        kill(Pid::from_raw(i32::try_from(self.child.id())?), Signal::SIGINT)?;
        self.child.wait()?;
        Ok(fs::read_to_string(&self.table)?)
    }

    /// How often each call was made, if it was asked to count them.
    fn calls(self) -> anyhow::Result<BTreeMap<String, u32>> {
        let text = self.end()?;
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

/// Answers each byte of each connection, to its end.
fn answering(listener: TcpListener) {
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut byte = [0];
                // A caller that has gone shows on its own side.
                while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
            });
        }
    });
}

fn exchange(mesh: &Mesh) -> anyhow::Result<()> {
    round_trip(&mut mesh.connect("checkout", mesh.ledger(8080))?)
}

fn round_trip(stream: &mut TcpStream) -> anyhow::Result<()> {
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
    // Which of several threads wakes another is chance.
    let pinned = Pinned::to(1)?;
    let mesh = Mesh::start()?;
    drop(pinned);
    answering(mesh.listen("ledger", mesh.ledger(8080))?);
    exchange_all(&mesh, 2)?;
    let tracers = ["machine-a", "machine-b"].map(|machine| {
        let process = mesh.process(machine).context("no agent runs")?;
        Tracer::attach(process, &mesh.folder().join(format!("{machine}.strace")), &["-c"])
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

/// The threads of an agent that carry connections, and the time that each has used, in ticks.
fn carrying(process: u32) -> anyhow::Result<BTreeMap<u32, u64>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{process}/task"))? {
        let folder = entry?.path();
        if !fs::read_to_string(folder.join("comm"))?.starts_with("carry-") {
            continue;
        }
        let stat = fs::read_to_string(folder.join("stat"))?;
        // Behind the name, which is in brackets: the state is the third field, the times are the 14th and 15th.
        let (_, fields) = stat.rsplit_once(')').context("no name")?;
        let times = fields.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
        let used = times.sum::<Result<_, _>>().context("no times")?;
        let thread = folder.file_name().and_then(|name| name.to_str()).context("no number")?;
        found.insert(thread.parse()?, used);
    }
    Ok(found)
}

/// What an agent's threads that carry connections did while something went on.
struct Waits {
    machine: &'static str,
    /// How often they waited for or woke another thread.
    count: u32,
    /// The time that each has used, in ticks.
    used: Vec<u64>,
}

/// Of both agents, while `work` goes on.
fn waits_during(
    mesh: &Mesh,
    work: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<Vec<Waits>> {
    let mut followed = Vec::new();
    for machine in ["machine-a", "machine-b"] {
        let process = mesh.process(machine).context("no agent runs")?;
        let table = mesh.folder().join(format!("{machine}.waits"));
        // Threads that wait for locks use the one; a thread that waits for the network is woken by the other, and bytes of
        // connections go out by neither.
        let tracer = Tracer::attach(process, &table, &["-e", "trace=futex,write"])?;
        followed.push((machine, process, carrying(process)?, tracer));
    }
    // For the threads that are followed a moment later.
    thread::sleep(Duration::from_millis(500));
    work()?;
    followed
        .into_iter()
        .map(|(machine, process, before, tracer)| {
            let after = carrying(process)?;
            let used = after
                .iter()
                .map(|(thread, used)| used - before.get(thread).copied().unwrap_or_default())
                .collect();
            let called = tracer.end()?;
            let waiting = || {
                let is_one = |line: &&str| line.contains("futex(") || line.contains("write(");
                let called = called.lines().filter(is_one);
                called.filter_map(|line| line.split_whitespace().next()?.parse::<u32>().ok())
            };
            // Whatever else the agent does, some of its threads wait for each other now and then.
            ensure!(waiting().count() > 0, "strace saw nothing of {machine}");
            let of_carrying = waiting().filter(|thread| after.contains_key(thread)).count();
            Ok(Waits { machine, count: u32::try_from(of_carrying)?, used })
        })
        .collect()
}

/// Both have as much to do, and neither waits more than `most` times for each of `all`.
fn hardly_wait(waits: &[Waits], what: &str, all: u32, most: f64) -> anyhow::Result<()> {
    for Waits { machine, count, used } in waits {
        let each = f64::from(*count) / f64::from(all);
        println!("{machine}: {each:.3} waits for each {what}; ticks of each thread: {used:?}");
        ensure!(each <= most, "{machine}: {each:.3} waits for each {what}");
        let longest = used.iter().copied().max().unwrap_or_default();
        ensure!(longest > 0, "{machine}: no thread carried anything: {used:?}");
        ensure!(
            used.iter().all(|used| *used * 10 >= longest),
            "{machine}: the {what}s are not on all threads: {used:?}"
        );
    }
    Ok(())
}

fn cores_that_carry_connections_do_not_wait_for_each_other() -> anyhow::Result<()> {
    let pinned = Pinned::to(CPUS)?;
    let mesh = Mesh::start()?;
    drop(pinned);
    answering(mesh.listen("ledger", mesh.ledger(8080))?);
    let open = || mesh.connect("checkout", mesh.ledger(8080));
    let mut streams = (0..CALLERS).map(|_| open()).collect::<anyhow::Result<Vec<_>>>()?;
    let waits = waits_during(&mesh, || {
        thread::scope(|scope| {
            let callers: Vec<_> = streams
                .iter_mut()
                .map(|stream| scope.spawn(|| (0..ROUND_TRIPS).try_for_each(|_| round_trip(stream))))
                .collect();
            callers.into_iter().try_for_each(|caller| {
                caller.join().map_err(|_| anyhow::anyhow!("a caller panicked"))?
            })
        })
    })?;
    hardly_wait(&waits, "round trip", CALLERS * ROUND_TRIPS, MOST_WAITS)?;
    drop(streams);
    let waits = waits_during(&mesh, || exchange_all(&mesh, CONNECTIONS))?;
    hardly_wait(&waits, "new connection", CALLERS * CONNECTIONS, MOST_WAITS_OF_NEW)
}
