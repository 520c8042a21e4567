//! The rounds: every figure of every contender, in another order each time.

use std::{collections::BTreeMap, time::Instant};

use anyhow::{Context, ensure};
use serde::Serialize;

use crate::{
    RunArgs,
    apps::App,
    contenders::{Contender, Field, Ready},
    load::Kind,
    processes, report,
};

/// A figure of merit.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Figure {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    /// More is better.
    pub(crate) more: bool,
}

const fn figure(name: &'static str, unit: &'static str, more: bool) -> Figure {
    Figure { name, unit, more }
}

/// In the order of the table.
pub(crate) const FIGURES: &[Figure] = &[
    figure("throughput, 1 stream up", "Gbit/s", true),
    figure("throughput, 8 streams up", "Gbit/s", true),
    figure("throughput, 1 stream down", "Gbit/s", true),
    figure("throughput, 8 streams down", "Gbit/s", true),
    figure("CPU, both relays", "s/GB", false),
    figure("round trips of 64 bytes, 1 connection", "1/s", true),
    figure("round trips of 64 bytes, 16 connections", "1/s", true),
    figure("round trips of 64 bytes, 64 connections", "1/s", true),
    figure("round trip p50, 1 connection", "µs", false),
    figure("round trip p99, 1 connection", "µs", false),
    figure("round trip p99.9, 64 connections", "µs", false),
    figure("new connections, 1 at once", "1/s", true),
    figure("new connections, 16 at once", "1/s", true),
    figure("new connections, 64 at once", "1/s", true),
    figure("connect and 1 byte p50, 1 at once", "µs", false),
    figure("connect and 1 byte p99, 16 at once", "µs", false),
    figure("CPU, both relays", "s/1000 connections", false),
    figure("memory of an idle connection of 1,000, caller's relay", "kB", false),
    figure("memory of an idle connection of 1,000, server's relay", "kB", false),
    figure("memory of an idle connection of 10,000, caller's relay", "kB", false),
    figure("memory of an idle connection of 10,000, server's relay", "kB", false),
    figure("the same after a burst, caller's relay", "kB", false),
    figure("the same after a burst, server's relay", "kB", false),
    figure("small exchanges p99, 1,000 connections", "µs", false),
    figure("small exchanges p99, 1,000 connections beside a bulk stream", "µs", false),
    figure("round trips, 64 connections beside 9,300 idle ones", "1/s", true),
    figure("new connections, 16 at once beside 9,300 idle ones", "1/s", true),
    figure("pgbench -S, 1 client", "transactions/s", true),
    figure("redis-benchmark GET, 64 clients", "requests/s", true),
    figure("iperf3, 4 streams up", "Gbit/s", true),
];

/// What is measured with programs of others, by its own command.
pub(crate) const APPS: &str = "apps";

/// What can be measured by itself.
const PARTS: [&str; 6] =
    ["memory", "throughput", "round trips", "new connections", "fairness", "crowd"];

/// Every value that was measured, by figure and contender.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Results(pub(crate) BTreeMap<String, BTreeMap<&'static str, Vec<f64>>>);

impl Results {
    fn add(&mut self, name: &str, unit: &str, contender: Contender, value: f64) {
        let of_figure = self.0.entry(format!("{name} [{unit}]")).or_default();
        of_figure.entry(contender.name()).or_default().push(value);
    }

    pub(crate) fn of(&self, figure: &Figure, contender: Contender) -> &[f64] {
        self.0
            .get(&format!("{} [{}]", figure.name, figure.unit))
            .and_then(|of_figure| of_figure.get(contender.name()))
            .map_or(&[], Vec::as_slice)
    }
}

/// Runs it all.
pub(crate) fn run(args: &RunArgs) -> anyhow::Result<()> {
    hauberk_cli::lab::become_root()?;
    hauberk_cli::lab::listen_for_interrupts()?;
    processes::raise_file_limit()?;
    let wanted: Vec<Contender> = Contender::ALL
        .into_iter()
        .filter(|contender| *contender != Contender::Before || args.before.is_some())
        .filter(|contender| {
            args.contenders.is_empty() || args.contenders.iter().any(|w| w == contender.word())
        })
        .collect();
    let known = Contender::ALL.map(Contender::word);
    for word in &args.contenders {
        ensure!(known.contains(&word.as_str()), "{word} is not one of {}", known.join(", "));
    }
    ensure!(
        args.before.is_some() || !args.contenders.iter().any(|w| w == Contender::Before.word()),
        "the contender before needs --before, the path of an earlier build of hauberk"
    );
    for part in &args.figures {
        let known = PARTS.iter().any(|word| word.contains(part.as_str())) || part == APPS;
        ensure!(known, "{part} is in none of {}", PARTS.join(", "));
    }
    let started = Instant::now();
    let before = args.before.as_deref();
    let field = Field::new(args.rules, &args.certificate_lifetime, &[], before)?;
    eprintln!("the field is ready: {}, {} rules", field.status()?, args.rules);
    let _servers = if args.figures.iter().any(|part| part == APPS) {
        wanted.iter().map(|contender| field.serve_apps(*contender)).collect::<Result<_, _>>()?
    } else {
        Vec::new()
    };
    let mut results = Results::default();
    for round in 0..args.rounds() {
        for place in 0..wanted.len() {
            let number = (place + round * 2) % wanted.len();
            let contender = wanted.get(number).copied().unwrap_or(Contender::Hauberk);
            eprintln!(
                "round {} of {}: {} ({:.0} s)",
                round + 1,
                args.rounds(),
                contender.name(),
                started.elapsed().as_secs_f64()
            );
            let ready = field.ready(contender)?;
            let mut turn = Turn { args, contender, ready, results: &mut results };
            turn.measure(round == 0).with_context(|| contender.name())?;
        }
    }
    report::write(args, &wanted, &field.status()?, &results)
}

struct Turn<'a> {
    args: &'a RunArgs,
    contender: Contender,
    ready: Ready<'a>,
    results: &'a mut Results,
}

impl Turn<'_> {
    fn wants(&self, word: &str) -> bool {
        self.args.figures.is_empty() || self.args.figures.iter().any(|part| word.contains(part))
    }

    fn add(&mut self, name: &str, unit: &str, value: f64) {
        self.results.add(name, unit, self.contender, value);
    }

    fn measure(&mut self, first_round: bool) -> anyhow::Result<()> {
        let seconds = self.args.duration().as_secs_f64();
        // Memory does not vary as speed does: once is enough. First, before the heap has grown.
        if first_round && self.wants("memory") && self.contender.is_a_pair() {
            self.memory()?;
        }
        if self.wants("throughput") {
            self.throughput(seconds)?;
        }
        if self.wants("round trips") {
            self.rounds(seconds)?;
        }
        if self.wants("new connections") {
            self.connects(seconds)?;
        }
        // stunnel takes minutes for it.
        let slow = self.args.quick && self.contender == Contender::Stunnel;
        if self.wants("fairness") && self.contender.is_a_pair() && !slow {
            self.fairness(seconds)?;
        }
        if !self.args.quick
            && self.wants("crowd")
            && matches!(self.contender, Contender::Plain | Contender::Hauberk | Contender::Before)
        {
            self.crowd(seconds)?;
        }
        if self.args.figures.iter().any(|part| part == APPS) {
            for app in App::ALL {
                let (name, unit) = app.figure();
                let value = self.ready.app(app, seconds).with_context(|| name)?;
                self.add(name, unit, value);
            }
        }
        Ok(())
    }

    fn throughput(&mut self, seconds: f64) -> anyhow::Result<()> {
        let (mut cpu, mut gigabytes) = (0.0, 0.0);
        for (kind, streams, name) in [
            (Kind::Up, 1, "throughput, 1 stream up"),
            (Kind::Up, 8, "throughput, 8 streams up"),
            (Kind::Down, 1, "throughput, 1 stream down"),
            (Kind::Down, 8, "throughput, 8 streams down"),
        ] {
            let cost = self.ready.cost(kind, streams, seconds)?;
            ensure!(cost.measured.failed == 0, "{name}: {} streams failed", cost.measured.failed);
            let bytes = cost.measured.per_second();
            self.add(name, "Gbit/s", bytes * 8.0 / 1e9);
            cpu += cost.cpu_seconds;
            gigabytes += bytes * cost.measured.seconds / 1e9;
        }
        if self.contender != Contender::Raw {
            self.add("CPU, both relays", "s/GB", cpu / gigabytes);
        }
        Ok(())
    }

    fn rounds(&mut self, seconds: f64) -> anyhow::Result<()> {
        for connections in [1, 16, 64] {
            let measured = self.ready.load(Kind::Rounds, connections, seconds, &[])?;
            ensure!(measured.failed == 0, "{} connections failed", measured.failed);
            let [p50, p99, p999] = measured.latency_us.context("nothing came back")?;
            let plural = if connections == 1 { "connection" } else { "connections" };
            self.add(
                &format!("round trips of 64 bytes, {connections} {plural}"),
                "1/s",
                measured.per_second(),
            );
            if connections == 1 {
                self.add("round trip p50, 1 connection", "µs", p50);
                self.add("round trip p99, 1 connection", "µs", p99);
            }
            if connections == 64 {
                self.add("round trip p99.9, 64 connections", "µs", p999);
            }
        }
        Ok(())
    }

    fn connects(&mut self, seconds: f64) -> anyhow::Result<()> {
        for at_once in [1, 16, 64] {
            let cost = self.ready.cost(Kind::Connects, at_once, seconds)?;
            let measured = &cost.measured;
            ensure!(measured.failed == 0, "{} connections failed", measured.failed);
            let [p50, p99, _] = measured.latency_us.context("no connection succeeded")?;
            let rate = measured.per_second();
            self.add(&format!("new connections, {at_once} at once"), "1/s", rate);
            if at_once == 1 {
                self.add("connect and 1 byte p50, 1 at once", "µs", p50);
            }
            if at_once == 16 {
                self.add("connect and 1 byte p99, 16 at once", "µs", p99);
                if self.contender != Contender::Raw {
                    let thousands = rate * measured.seconds / 1000.0;
                    let share = cost.cpu_seconds / thousands;
                    self.add("CPU, both relays", "s/1000 connections", share);
                }
            }
        }
        Ok(())
    }

    fn fairness(&mut self, seconds: f64) -> anyhow::Result<()> {
        for (more, name) in [
            (&[][..], "small exchanges p99, 1,000 connections"),
            (&["--bulk"][..], "small exchanges p99, 1,000 connections beside a bulk stream"),
        ] {
            let measured = self.ready.load(Kind::Fair, 1_000, seconds, more)?;
            ensure!(measured.failed == 0, "{name}: {} connections failed", measured.failed);
            let [_, p99, _] = measured.latency_us.context("nothing came back")?;
            self.add(name, "µs", p99);
        }
        Ok(())
    }

    /// Beside nearly as many idle connections as a process may have.
    fn crowd(&mut self, seconds: f64) -> anyhow::Result<()> {
        let many = processes::many_connections()?.saturating_sub(500);
        let ready = &self.ready;
        let (rounds, connects) = ready.beside(many, || {
            (
                ready.load(Kind::Rounds, 64, seconds, &[]),
                ready.load(Kind::Connects, 16, seconds, &[]),
            )
        })?;
        for (measured, name) in [
            (rounds?, "round trips, 64 connections beside 9,300 idle ones"),
            (connects?, "new connections, 16 at once beside 9,300 idle ones"),
        ] {
            ensure!(measured.failed == 0, "{name}: {} connections failed", measured.failed);
            self.add(name, "1/s", measured.per_second());
        }
        Ok(())
    }

    fn memory(&mut self) -> anyhow::Result<()> {
        let many = processes::many_connections()?;
        // What is allocated once for all, such as buffers and pools, is not a connection's.
        self.ready.load(Kind::Connects, 16, 0.3, &[])?;
        let [near_before, far_before] = self.ready.memory()?;
        for (connections, burst, name) in [
            (1_000, false, "memory of an idle connection of 1,000"),
            (many, false, "memory of an idle connection of 10,000"),
            (many, true, "the same after a burst"),
        ] {
            if self.args.quick && connections == many {
                continue;
            }
            let held = self.ready.memory_with(connections, burst);
            let [near, far] = match held {
                Ok(held) => held,
                Err(error) if self.contender == Contender::Hauberk => return Err(error),
                Err(error) => {
                    // A thread for each, for one: it has no figure then.
                    eprintln!("{}: {connections} connections: {error:#}", self.contender.name());
                    return Ok(());
                }
            };
            #[allow(clippy::as_conversions, reason = "a count for a share")]
            let thousands = connections as f64 * 1000.0;
            self.add(&format!("{name}, caller's relay"), "kB", (near - near_before) / thousands);
            self.add(&format!("{name}, server's relay"), "kB", (far - far_before) / thousands);
        }
        Ok(())
    }
}
