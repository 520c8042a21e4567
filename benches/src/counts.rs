//! Instructions of the steps of a connection, without sockets and without the kernel: they repeat within
//! half a percent on any machine of the kind, so that a regression shows at once. Under valgrind the crypto
//! takes its AVX2 way, and the build is that of the tests: the numbers are for comparing, not for quoting.

use std::process::Command;

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use hauberk_core::session::{Event, Machine, Open, Role};
use hauberk_tls::channel::{Channel, MAX_PLAINTEXT, Opened};

use crate::{decide, world::World};

/// How far a count may be from the written one, in a hundred.
const BAND: f64 = 5.0;

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
    /// 1 MiB one way.
    Mebibyte,
    /// One decision of one side that allows, with 10,000 policies about its destination.
    Decision,
}

impl Step {
    const ALL: [Self; 5] =
        [Self::Handshake, Self::Stream, Self::RoundTrip, Self::Mebibyte, Self::Decision];

    /// Enough that what starting costs, which is never quite the same, does not show.
    fn times(self) -> usize {
        match self {
            Self::Handshake | Self::Mebibyte => 20,
            Self::Stream | Self::RoundTrip => 4_000,
            // Reading in the policies is a lot of what starting costs.
            Self::Decision => 50_000,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Handshake => "handshake",
            Self::Stream => "stream",
            Self::RoundTrip => "round-trip",
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
        let line = written.lines().find_map(|line| line.strip_prefix(step.word()));
        let expected: u64 = line.context("a step is not in the file")?.trim().parse()?;
        #[allow(clippy::as_conversions, reason = "counts for a ratio")]
        let change = (count as f64 / expected as f64 - 1.0) * 100.0;
        println!("{:<12} {count:>12} instructions, {change:+.1} %", step.word());
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
        }
    }
    Ok(())
}

/// Both ends of a session, and the wire between them.
struct Ends {
    source: (Channel, Machine),
    destination: (Channel, Machine),
    wire: Vec<u8>,
    plain: Vec<u8>,
}

impl Ends {
    fn connect(world: &World) -> anyhow::Result<Self> {
        let (source, destination) = world.connect()?;
        Ok(Self {
            source: (source, Machine::new(Role::Source)),
            destination: (destination, Machine::new(Role::Destination)),
            wire: Vec::new(),
            plain: vec![0; MAX_PLAINTEXT + 256],
        })
    }

    /// Frames of one end, sealed, opened and understood by the other. How many data bytes that was.
    fn say(
        &mut self,
        from_source: bool,
        say: impl FnOnce(&mut Machine, &mut Vec<u8>) -> anyhow::Result<()>,
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
                let received = to.1.receive(plain)?;
                plain = plain.get(received.used..).unwrap_or_default();
                if let Some(Event::Data(bytes)) = received.event {
                    data += bytes.len();
                }
            }
        }
        Ok(data)
    }

    fn open(&mut self) -> anyhow::Result<()> {
        let address = std::net::SocketAddr::from(([10, 0, 0, 1], 80));
        let open = Open {
            connection_id: [1; 16],
            trace_id: [0; 16],
            original_destination: address,
            source_address: address,
        };
        self.say(true, |machine, out| Ok(machine.open(&open, out)?))?;
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
