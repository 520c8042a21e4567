//! What sealing and opening application bytes costs: the records of `hauberk_tls::channel` beside rustls' own
//! ways to do it, in one thread and in memory.
//!
//! All of them have the certificates, configurations, cipher and allocator of two agents, and bytes go one
//! way in runs of 256 KiB, as bulk does in a relay. A connection is made anew for each round. Bytes are
//! where each way wants them before the clock runs: in an agent the kernel's read puts them there, whatever
//! comes after. A few bytes of each record are changed in each run and looked for at the other end.

use std::{
    io::{Read, Write},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use hauberk_tls::channel::{Channel, MAX_PLAINTEXT, Opened, RECORD_HEADER, RECORD_OVERHEAD};
use nix::time::ClockId;
use rustls::{
    ClientConnection, ConnectionCommon, ServerConnection,
    client::UnbufferedClientConnection,
    server::UnbufferedServerConnection,
    unbuffered::{ConnectionState, EncodeError, UnbufferedStatus},
};

use crate::{
    report::{cell, median},
    world::World,
};

/// As in the agent's `session/scratch.rs`: the longest record, and records in a run.
const RECORD: usize = MAX_PLAINTEXT + RECORD_OVERHEAD;
const SLOTS: usize = 16;

const RUN: usize = SLOTS * MAX_PLAINTEXT;
const RUNS_OF_A_GIBIBYTE: usize = (1 << 30) / RUN;

/// Runs before the clock counts: for caches, and for what is allocated once.
const WARM_UP: usize = 64;

/// More than any handshake has.
const FLIGHTS: usize = 64;

/// How much is measured.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Rounds; each measures every way, in another order.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// What goes through each in a round. No key has to be renewed for it.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    gibibytes: u32,
}

/// Measures all ways and prints the table.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let world = World::new()?;
    let rounds = args.rounds.max(1);
    let mut costs = Kind::ALL.map(|kind| (kind, Vec::new()));
    for round in 0..rounds {
        for (kind, costs) in &mut costs {
            eprintln!("round {} of {rounds}: {}", round + 1, kind.name());
            let mut way = way(*kind, &world)?;
            let cost = measure(way.as_mut(), args.gibibytes).with_context(|| kind.name())?;
            costs.push(cost);
        }
        costs.rotate_left(1);
    }
    costs.sort_by_key(|(kind, _)| *kind);
    println!(
        "{}, runs of {} KiB, {rounds} rounds of {} GiB. Milliseconds of CPU for each GiB, medians; in \
         brackets least and most. The last column has the medians of each round's ratio to the channel.\n",
        Buffered::new(&world)?.suite()?,
        RUN / 1024,
        args.gibibytes
    );
    println!("{:<30} {:<20} {:<20} {:<20} ratio", "", "sealed", "opened", "both");
    let ours: Vec<f64> = costs
        .iter()
        .filter(|(kind, _)| *kind == Kind::Channel)
        .flat_map(|(_, costs)| costs.iter().map(Cost::both))
        .collect();
    for (kind, costs) in &costs {
        let column = |figure: fn(&Cost) -> f64| -> Vec<f64> { costs.iter().map(figure).collect() };
        let both = column(Cost::both);
        let ratios: Vec<f64> = both.iter().zip(&ours).map(|(both, ours)| both / ours).collect();
        println!(
            "{:<30} {:<20} {:<20} {:<20} {:.2}×",
            kind.name(),
            cell(&column(|cost| cost.sealed)),
            cell(&column(|cost| cost.opened)),
            cell(&both),
            median(&ratios).context("nothing was measured")?
        );
    }
    Ok(())
}

/// Which way, in the order of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Channel,
    Unbuffered,
    UnbufferedGathered,
    Buffered,
}

impl Kind {
    const ALL: [Self; 4] =
        [Self::Channel, Self::Unbuffered, Self::UnbufferedGathered, Self::Buffered];

    fn name(self) -> &'static str {
        match self {
            Self::Channel => "channel",
            Self::Unbuffered => "rustls, unbuffered",
            Self::UnbufferedGathered => "rustls, unbuffered, gathered",
            Self::Buffered => "rustls, buffered",
        }
    }
}

/// A way to protect bytes, with both ends of a connection.
trait Way {
    /// Puts bytes of the application into the next run, to where a read would have put them.
    fn put(&mut self, place: usize, bytes: &[u8]);

    /// The caller's end makes records of the run.
    fn seal(&mut self) -> anyhow::Result<()>;

    /// The server's end opens them: how many bytes were in them.
    fn open(&mut self) -> anyhow::Result<usize>;

    /// What was in them.
    fn opened(&self) -> &[u8];
}

fn way(kind: Kind, world: &World) -> anyhow::Result<Box<dyn Way>> {
    Ok(match kind {
        Kind::Channel => Box::new(InPlace::new(world)?),
        Kind::Unbuffered => Box::new(Unbuffered::new(world, Take::Samples)?),
        Kind::UnbufferedGathered => Box::new(Unbuffered::new(world, Take::All)?),
        Kind::Buffered => Box::new(Buffered::new(world)?),
    })
}

/// Milliseconds for each GiB.
#[derive(Debug, Clone, Copy)]
struct Cost {
    sealed: f64,
    opened: f64,
}

impl Cost {
    fn both(&self) -> f64 {
        self.sealed + self.opened
    }
}

fn measure(way: &mut dyn Way, gibibytes: u32) -> anyhow::Result<Cost> {
    for number in 0..WARM_UP {
        pass(way, number)?;
    }
    let (mut sealed, mut opened) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..gibibytes {
        for number in 0..RUNS_OF_A_GIBIBYTE {
            let [sealing, opening] = pass(way, number)?;
            sealed += sealing;
            opened += opening;
        }
    }
    let of_a_gibibyte = |time: Duration| time.as_secs_f64() * 1e3 / f64::from(gibibytes);
    Ok(Cost { sealed: of_a_gibibyte(sealed), opened: of_a_gibibyte(opened) })
}

/// One run there: what sealing and opening it took. The clock is read three times for it, which is about
/// one in a hundred of what it measures, for every way alike.
fn pass(way: &mut dyn Way, number: usize) -> anyhow::Result<[Duration; 2]> {
    for place in samples() {
        way.put(place, &sample(number, place));
    }
    let started = cpu_time()?;
    way.seal()?;
    let sealed = cpu_time()?;
    let length = way.open()?;
    let opened = cpu_time()?;
    ensure!(length == RUN, "{length} of {RUN} bytes came");
    for place in samples() {
        let found = way.opened().get(place..place + SAMPLE);
        ensure!(
            found == Some(sample(number, place).as_slice()),
            "what came at {place} of run {number} is not what was sealed"
        );
    }
    Ok([sealed.saturating_sub(started), opened.saturating_sub(sealed)])
}

fn cpu_time() -> anyhow::Result<Duration> {
    Ok(ClockId::CLOCK_THREAD_CPUTIME_ID.now().map(Duration::from)?)
}

const SAMPLE: usize = size_of::<usize>();

/// The first and the last bytes of each record.
fn samples() -> impl Iterator<Item = usize> {
    (0..SLOTS).flat_map(|slot| {
        let first = slot * MAX_PLAINTEXT;
        [first, first + MAX_PLAINTEXT - SAMPLE]
    })
}

/// Differs between the places of a run, and from the run before.
fn sample(number: usize, place: usize) -> [u8; SAMPLE] {
    (number * RUN + place).to_le_bytes()
}

fn copy(bytes: &[u8], to: &mut [u8], place: usize) {
    if let Some(to) = to.get_mut(place..place + bytes.len()) {
        to.copy_from_slice(bytes);
    }
}

/// Ours: sealed where the bytes are, opened from one buffer into another.
struct InPlace {
    caller: Channel,
    server: Channel,
    cipher: Vec<u8>,
    plain: Vec<u8>,
    /// What must go out before the run; nothing, as long as no key is renewed.
    control: Vec<u8>,
}

impl InPlace {
    fn new(world: &World) -> anyhow::Result<Self> {
        let (caller, server) = world.connect()?;
        Ok(Self {
            caller,
            server,
            cipher: vec![7; SLOTS * RECORD],
            plain: vec![0; RUN + 256],
            control: Vec::new(),
        })
    }
}

impl Way for InPlace {
    fn put(&mut self, place: usize, bytes: &[u8]) {
        let record = place / MAX_PLAINTEXT * RECORD;
        copy(bytes, &mut self.cipher, record + RECORD_HEADER + place % MAX_PLAINTEXT);
    }

    fn seal(&mut self) -> anyhow::Result<()> {
        self.caller.prepare(&mut self.control)?;
        ensure!(self.control.is_empty(), "a key was renewed");
        for record in self.cipher.chunks_mut(RECORD) {
            self.caller.seal_in_place(record)?;
        }
        Ok(())
    }

    fn open(&mut self) -> anyhow::Result<usize> {
        let (mut used, mut opened) = (0, 0);
        while used < self.cipher.len() {
            let input = self.cipher.get(used..).unwrap_or_default();
            let output = self.plain.get_mut(opened..).unwrap_or_default();
            let Opened::Data { used: more, length } = self.server.open(input, output)? else {
                bail!("half a record");
            };
            used += more;
            opened += length;
        }
        Ok(opened)
    }

    fn opened(&self) -> &[u8] {
        &self.plain
    }
}

/// rustls without buffers of its own: sealed from one buffer into another, opened records come one at a time.
struct Unbuffered {
    caller: UnbufferedClientConnection,
    server: UnbufferedServerConnection,
    plain: Vec<u8>,
    wire: Vec<u8>,
    sealed: usize,
    take: Take,
    opened: Vec<u8>,
}

/// What is done with an opened record.
#[derive(Debug, Clone, Copy)]
enum Take {
    /// It is looked at where it is: for who writes each to a socket by itself.
    Samples,
    /// It is copied behind the one before: for who writes a run in one call, as a relay does.
    All,
}

impl Unbuffered {
    fn new(world: &World, take: Take) -> anyhow::Result<Self> {
        let mut caller = UnbufferedClientConnection::new(world.client.clone(), world.name.clone())?;
        let mut server = UnbufferedServerConnection::new(world.server.clone())?;
        let (mut to_caller, mut to_server) = (Vec::new(), Vec::new());
        let mut done = false;
        for _ in 0..FLIGHTS {
            let (used, caller_done) =
                answer(caller.process_tls_records(&mut to_caller), &mut to_server)?;
            to_caller.drain(..used);
            let (used, server_done) =
                answer(server.process_tls_records(&mut to_server), &mut to_caller)?;
            to_server.drain(..used);
            done = caller_done && server_done && to_caller.is_empty() && to_server.is_empty();
            if done {
                break;
            }
        }
        ensure!(done, "the handshake does not end");
        Ok(Self {
            caller,
            server,
            plain: vec![7; RUN],
            wire: vec![0; SLOTS * RECORD],
            sealed: 0,
            take,
            opened: vec![0; RUN],
        })
    }
}

/// One step of a handshake, its answer behind what is in `out`. How many bytes of the peer are used up, and
/// whether this end is done.
fn answer<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    out: &mut Vec<u8>,
) -> anyhow::Result<(usize, bool)> {
    let done = match status.state? {
        ConnectionState::EncodeTlsData(mut encode) => {
            let start = out.len();
            // Nothing fits into no room: it says how much it needs.
            match encode.encode(&mut []) {
                Err(EncodeError::InsufficientSize(size)) => {
                    out.resize(start + size.required_size, 0);
                    encode.encode(out.get_mut(start..).unwrap_or_default())?;
                }
                encoded => {
                    encoded?;
                }
            }
            false
        }
        ConnectionState::TransmitTlsData(transmit) => {
            transmit.done();
            false
        }
        ConnectionState::BlockedHandshake => false,
        ConnectionState::WriteTraffic(_) => true,
        state => bail!("{state:?} in a handshake"),
    };
    Ok((status.discard, done))
}

impl Way for Unbuffered {
    fn put(&mut self, place: usize, bytes: &[u8]) {
        copy(bytes, &mut self.plain, place);
    }

    fn seal(&mut self) -> anyhow::Result<()> {
        let status = self.caller.process_tls_records(&mut []);
        let ConnectionState::WriteTraffic(mut traffic) = status.state? else {
            bail!("the caller's end has something else to do");
        };
        self.sealed = traffic.encrypt(&self.plain, &mut self.wire)?;
        Ok(())
    }

    fn open(&mut self) -> anyhow::Result<usize> {
        let (mut used, mut opened) = (0, 0);
        while used < self.sealed {
            let input = self.wire.get_mut(used..self.sealed).unwrap_or_default();
            let UnbufferedStatus { mut discard, state } = self.server.process_tls_records(input);
            let ConnectionState::ReadTraffic(mut traffic) = state? else {
                bail!("half a record");
            };
            while let Some(record) = traffic.next_record() {
                let record = record?;
                let payload = record.payload;
                match self.take {
                    Take::All => copy(payload, &mut self.opened, opened),
                    Take::Samples => {
                        let last = payload.len().saturating_sub(SAMPLE);
                        for place in [0, last] {
                            let sample = payload.get(place..place + SAMPLE).unwrap_or_default();
                            copy(sample, &mut self.opened, opened + place);
                        }
                    }
                }
                opened += payload.len();
                discard += record.discard;
            }
            used += discard;
        }
        Ok(opened)
    }

    fn opened(&self) -> &[u8] {
        &self.opened
    }
}

/// rustls as it is usually used.
struct Buffered {
    caller: ClientConnection,
    server: ServerConnection,
    plain: Vec<u8>,
    wire: Vec<u8>,
    opened: Vec<u8>,
}

impl Buffered {
    fn new(world: &World) -> anyhow::Result<Self> {
        let mut caller = ClientConnection::new(world.client.clone(), world.name.clone())?;
        let mut server = ServerConnection::new(world.server.clone())?;
        for _ in 0..FLIGHTS {
            deliver(&mut caller, &mut server)?;
            deliver(&mut server, &mut caller)?;
            if !caller.wants_write() {
                break;
            }
        }
        ensure!(!caller.is_handshaking() && !server.is_handshaking(), "the handshake does not end");
        // A run's records, with room to spare: by default it takes 64 KiB at a time.
        caller.set_buffer_limit(Some(2 * RUN));
        Ok(Self {
            caller,
            server,
            plain: vec![7; RUN],
            wire: Vec::with_capacity(SLOTS * RECORD),
            opened: vec![0; RUN],
        })
    }

    /// The cipher that all of them have: the configurations are the same.
    fn suite(&self) -> anyhow::Result<String> {
        let suite = self.caller.negotiated_cipher_suite().context("no cipher was settled on")?;
        Ok(format!("{:?}", suite.suite()))
    }
}

fn deliver<A, B>(
    from: &mut ConnectionCommon<A>,
    to: &mut ConnectionCommon<B>,
) -> anyhow::Result<()> {
    let mut wire = Vec::new();
    while from.wants_write() {
        from.write_tls(&mut wire)?;
    }
    let mut rest = wire.as_slice();
    while !rest.is_empty() {
        to.read_tls(&mut rest)?;
        to.process_new_packets()?;
    }
    Ok(())
}

impl Way for Buffered {
    fn put(&mut self, place: usize, bytes: &[u8]) {
        copy(bytes, &mut self.plain, place);
    }

    fn seal(&mut self) -> anyhow::Result<()> {
        self.wire.clear();
        self.caller.writer().write_all(&self.plain)?;
        while self.caller.wants_write() {
            self.caller.write_tls(&mut self.wire)?;
        }
        Ok(())
    }

    fn open(&mut self) -> anyhow::Result<usize> {
        let (mut rest, mut opened) = (self.wire.as_slice(), 0);
        while !rest.is_empty() {
            self.server.read_tls(&mut rest)?;
            let ready = self.server.process_new_packets()?.plaintext_bytes_to_read();
            let into = self.opened.get_mut(opened..opened + ready);
            self.server.reader().read_exact(into.context("more came than was sealed")?)?;
            opened += ready;
        }
        Ok(opened)
    }

    fn opened(&self) -> &[u8] {
        &self.opened
    }
}
