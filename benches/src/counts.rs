//! Instructions of the steps of a connection, without sockets and without the kernel: they repeat within
//! half a percent on any machine of the kind, so that a regression shows at once. Under valgrind the crypto
//! takes its AVX2 way, and the build is that of the tests: the numbers are for comparing, not for quoting.

use std::process::Command;

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use hauberk_core::session::{Event, Machine, Multiplex, OfStream, Open, Role};
use hauberk_tls::channel::{Channel, MAX_PLAINTEXT, Opened};

use crate::{decide, world::World};

/// How far a count may be from the written one, in a hundred.
const BAND: f64 = 5.0;

/// Streams that speak together on a multiplexed session.
const TOGETHER: usize = 16;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/counts.txt");

/// What is counted, both sides together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Step {
    /// A full handshake, both certificates verified before.
    Handshake,
    /// A stream on a session that stands: open, one byte each way, both ends.
    Stream,
    /// 64 bytes there and 64 bytes back on an open stream.
    RoundTrip,
    /// One of sixteen streams that open, say one byte each way and end together on a multiplexed session.
    MultiplexedStream,
    /// One of sixteen streams of a multiplexed session that say 64 bytes there and 64 bytes back together. So few that
    /// their credit lasts.
    MultiplexedRoundTrip,
    /// 1 MiB one way.
    Mebibyte,
    /// One decision of one side that allows, with 10,000 policies about its destination.
    Decision,
}

impl Step {
    const ALL: [Self; 7] = [
        Self::Handshake,
        Self::Stream,
        Self::RoundTrip,
        Self::MultiplexedStream,
        Self::MultiplexedRoundTrip,
        Self::Mebibyte,
        Self::Decision,
    ];

    /// Enough that what starting costs, which is never quite the same, does not show.
    fn times(self) -> usize {
        match self {
            Self::Handshake | Self::Mebibyte => 20,
            Self::Stream
            | Self::RoundTrip
            | Self::MultiplexedStream
            | Self::MultiplexedRoundTrip => 4_000,
            // Reading in the policies is a lot of what starting costs.
            Self::Decision => 50_000,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Handshake => "handshake",
            Self::Stream => "stream",
            Self::RoundTrip => "round-trip",
            Self::MultiplexedStream => "multiplexed-stream",
            Self::MultiplexedRoundTrip => "multiplexed-round-trip",
            Self::Mebibyte => "mebibyte",
            Self::Decision => "decision",
        }
    }
}

/// Counts all of them, and holds them against the file or writes it.
pub(crate) fn run(write: bool) -> anyhow::Result<()> {
    let mut counted = Vec::new();
    for step in Step::ALL {
        // The difference is what the steps cost without starting and ending.
        let (few, many) = (instructions(step, 5)?, instructions(step, 5 + step.times())?);
        counted.push((step, (many - few) / u64::try_from(step.times())?));
    }
    if write {
        let mut text = String::from(
            "# Instructions of each step, both sides together; `hauberk-bench counts --write`.\n",
        );
        for (step, count) in &counted {
            text += &format!("{} {count}\n", step.word());
        }
        return std::fs::write(FILE, text).with_context(|| format!("write {FILE}"));
    }
    let written = std::fs::read_to_string(FILE).with_context(|| format!("read {FILE}"))?;
    let mut strays = Vec::new();
    for (step, count) in counted {
        let mut lines = written.lines().filter_map(|line| line.split_once(' '));
        let line = lines.find(|(word, _)| *word == step.word());
        let expected: u64 = line.context("a step is not in the file")?.1.parse()?;
        #[allow(clippy::as_conversions, reason = "counts for a ratio")]
        let change = (count as f64 / expected as f64 - 1.0) * 100.0;
        println!("{:<22} {count:>12} instructions, {change:+.1} %", step.word());
        if change.abs() > BAND {
            strays.push(format!("{} {change:+.1} %", step.word()));
        }
    }
    ensure!(
        strays.is_empty(),
        "more than {BAND} % from benches/counts.txt: {}; if that is meant, write them anew with \
         `hauberk-bench counts --write`",
        strays.join(", ")
    );
    Ok(())
}

fn instructions(step: Step, times: usize) -> anyhow::Result<u64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe()?)
        .args(["step", step.word(), &times.to_string()])
        .output()
        .context("start valgrind; ./test installs it")?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    if !output.status.success() {
        bail!("valgrind: {text}");
    }
    let line = text.lines().find_map(|line| line.split_once("Collected :"));
    let (_, count) = line.with_context(|| format!("valgrind counted nothing: {text}"))?;
    Ok(count.trim().parse()?)
}

/// Takes a step so many times.
pub(crate) fn steps(step: Step, times: usize) -> anyhow::Result<()> {
    let world = World::new()?;
    if matches!(step, Step::MultiplexedStream | Step::MultiplexedRoundTrip) {
        return multiplexed(&world, step, times);
    }
    let mut ends = Ends::connect(&world)?;
    if matches!(step, Step::RoundTrip | Step::Mebibyte) {
        ends.open()?;
    }
    for _ in 0..times {
        match step {
            Step::Handshake => drop(Ends::connect(&world)?),
            Step::Stream => {
                ends.open()?;
                ends.pass(true, b"1")?;
                ends.pass(false, b"1")?;
                ends.end()?;
            }
            Step::RoundTrip => {
                ends.pass(true, &[7; 64])?;
                ends.pass(false, &[7; 64])?;
            }
            Step::Mebibyte => ends.pass(true, &vec![7; 1 << 20])?,
            // All at once: what loading the policies costs must not count.
            Step::Decision => return decide::repeat(times),
            Step::MultiplexedStream | Step::MultiplexedRoundTrip => {}
        }
    }
    Ok(())
}

/// The same on a multiplexed session, [`TOGETHER`] at a time.
fn multiplexed(world: &World, step: Step, times: usize) -> anyhow::Result<()> {
    let mut ends = Ends::multiplexed(world)?;
    let mut numbers = Vec::new();
    if step == Step::MultiplexedRoundTrip {
        numbers = ends.open_together()?;
    }
    for _ in 0..times.div_ceil(TOGETHER) {
        if step == Step::MultiplexedRoundTrip {
            ends.pass_together(true, &numbers, &[7; 64])?;
            ends.pass_together(false, &numbers, &[7; 64])?;
        } else {
            numbers = ends.open_together()?;
            ends.pass_together(true, &numbers, b"1")?;
            ends.pass_together(false, &numbers, b"1")?;
            ends.end_together(&numbers)?;
        }
    }
    Ok(())
}

/// Both ends of a session, and the wire between them.
struct Ends<M> {
    source: (Channel, M),
    destination: (Channel, M),
    wire: Vec<u8>,
    plain: Vec<u8>,
}

/// What understands the bytes of either kind of session.
trait Understands {
    /// Reads the next thing: how many bytes that used, and how many of them were data.
    fn understand(&mut self, plain: &[u8]) -> anyhow::Result<(usize, usize)>;
}

impl Understands for Machine {
    fn understand(&mut self, plain: &[u8]) -> anyhow::Result<(usize, usize)> {
        let received = self.receive(plain)?;
        let data = match received.event {
            Some(Event::Data(bytes)) => bytes.len(),
            Some(_) | None => 0,
        };
        Ok((received.used, data))
    }
}

impl Understands for Multiplex {
    fn understand(&mut self, plain: &[u8]) -> anyhow::Result<(usize, usize)> {
        let came = self.receive(plain)?;
        let data = match came.event {
            Some((_, OfStream::Data(bytes))) => bytes.len(),
            Some(_) | None => 0,
        };
        Ok((came.used, data))
    }
}

impl<M: Understands> Ends<M> {
    fn of(world: &World, machine: impl Fn(Role) -> M) -> anyhow::Result<Self> {
        let (source, destination) = world.connect()?;
        Ok(Self {
            source: (source, machine(Role::Source)),
            destination: (destination, machine(Role::Destination)),
            wire: Vec::new(),
            plain: vec![0; MAX_PLAINTEXT + 256],
        })
    }

    /// Frames of one end, sealed, opened and understood by the other. How many data bytes that was.
    fn say(
        &mut self,
        from_source: bool,
        say: impl FnOnce(&mut M, &mut Vec<u8>) -> anyhow::Result<()>,
    ) -> anyhow::Result<usize> {
        let (from, to) = if from_source {
            (&mut self.source, &mut self.destination)
        } else {
            (&mut self.destination, &mut self.source)
        };
        let mut frames = Vec::new();
        say(&mut from.1, &mut frames)?;
        self.wire.clear();
        from.0.seal(&frames, &mut self.wire)?;
        let (mut rest, mut data) = (self.wire.as_slice(), 0);
        while !rest.is_empty() {
            let Opened::Data { used, length } = to.0.open(rest, &mut self.plain)? else {
                bail!("half a record");
            };
            rest = rest.get(used..).unwrap_or_default();
            let mut plain = self.plain.get(..length).unwrap_or_default();
            while !plain.is_empty() {
                let (used, more) = to.1.understand(plain)?;
                plain = plain.get(used..).unwrap_or_default();
                data += more;
            }
        }
        Ok(data)
    }
}

fn wish() -> Open {
    let address = std::net::SocketAddr::from(([10, 0, 0, 1], 80));
    Open {
        connection_id: [1; 16],
        trace_id: [0; 16],
        original_destination: address,
        source_address: address,
    }
}

impl Ends<Multiplex> {
    fn multiplexed(world: &World) -> anyhow::Result<Self> {
        Self::of(world, Multiplex::new)
    }

    fn open_together(&mut self) -> anyhow::Result<Vec<u32>> {
        let mut numbers = Vec::new();
        self.say(true, |session, out| {
            for _ in 0..TOGETHER {
                numbers.push(session.open(&wish(), out)?);
            }
            Ok(())
        })?;
        self.say(false, |session, out| {
            numbers.iter().try_for_each(|number| Ok(session.accept(*number, out)?))
        })?;
        Ok(numbers)
    }

    fn pass_together(
        &mut self,
        from_source: bool,
        numbers: &[u32],
        bytes: &[u8],
    ) -> anyhow::Result<()> {
        let passed = self.say(from_source, |session, out| {
            for number in numbers {
                out.extend_from_slice(&session.data(*number, bytes.len())?);
                out.extend_from_slice(bytes);
            }
            Ok(())
        })?;
        ensure!(passed == bytes.len() * numbers.len(), "{passed} bytes came");
        Ok(())
    }

    fn end_together(&mut self, numbers: &[u32]) -> anyhow::Result<()> {
        for from_source in [true, false] {
            self.say(from_source, |session, out| {
                numbers.iter().try_for_each(|number| Ok(session.fin(*number, out)?))
            })?;
        }
        ensure!(self.source.1.open_streams() == 0, "streams are not over");
        Ok(())
    }
}

impl Ends<Machine> {
    fn connect(world: &World) -> anyhow::Result<Self> {
        Self::of(world, Machine::new)
    }

    fn open(&mut self) -> anyhow::Result<()> {
        self.say(true, |machine, out| Ok(machine.open(&wish(), out)?))?;
        self.say(false, |machine, out| Ok(machine.accept(out)?))?;
        Ok(())
    }

    fn pass(&mut self, from_source: bool, bytes: &[u8]) -> anyhow::Result<()> {
        let passed = self.say(from_source, |machine, out| {
            out.extend_from_slice(&machine.data(bytes.len())?);
            out.extend_from_slice(bytes);
            Ok(())
        })?;
        ensure!(passed == bytes.len(), "{passed} of {} bytes came", bytes.len());
        Ok(())
    }

    fn end(&mut self) -> anyhow::Result<()> {
        self.say(true, |machine, out| Ok(machine.fin(out)?))?;
        self.say(false, |machine, out| Ok(machine.fin(out)?))?;
        ensure!(self.source.1.is_reusable(), "the stream is not over");
        Ok(())
    }
}
