//! How long a decision takes, with few policies and with many.
//!
//! The policies are those of the benchmark's field as an agent gets them, read and bound to identities by the
//! control plane: each allows a caller of its own. In one table all are about one destination, in the other
//! each is about its own. Every caller is registered.

use std::{hint::black_box, time::Instant};

use anyhow::{Context, ensure};
use hauberk_core::{
    identity::{SpiffeId, TrustDomain},
    policy::{
        DecisionTable, Mode, Owner, PolicyKind, PolicyRef, Request, Verdict,
        resolve::{PeerMatch, ResolvedPolicy, ResolvedRule},
    },
};

use crate::report::median;

const COUNTS: [usize; 3] = [1, 100, MANY];

const MANY: usize = 10_000;

/// Decisions between two looks at the clock.
const BATCH: u32 = 500;

const PORT: u16 = 7000;

/// How much is measured.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Batches of 500 decisions, of each kind.
    #[arg(long, default_value_t = 300)]
    batches: usize,
}

/// Measures all kinds and prints the table.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mut loaded = Vec::new();
    for shape in [Shape::OneDestination, Shape::ManyDestinations] {
        for count in COUNTS {
            loaded.push(Loaded::new(shape, count)?);
        }
    }
    let mut cells = Vec::new();
    for loaded in &loaded {
        for asked in Asked::ALL {
            loaded.check(asked)?;
            cells.push(Cell { loaded, asked, nanoseconds: Vec::new() });
        }
    }
    for number in 0..args.batches.max(1) {
        for cell in &mut cells {
            let taken = cell.loaded.batch(cell.asked, number)?;
            cell.nanoseconds.push(taken);
        }
        cells.rotate_left(1);
    }
    cells.sort_by_key(|cell| (cell.loaded.shape, cell.asked, cell.loaded.count));
    println!(
        "Nanoseconds of one decision, its outcome dropped; medians of {} batches of {BATCH}.\n",
        args.batches.max(1)
    );
    let mut heading = format!("{:<36}", "policies");
    for count in COUNTS {
        heading += &format!("{count:>9}");
    }
    println!("{heading}   {MANY} to 1");
    let mut shape = None;
    for row in cells.chunks(COUNTS.len()) {
        let (Some(first), Some(last)) = (row.first(), row.last()) else { continue };
        if shape.replace(first.loaded.shape) != Some(first.loaded.shape) {
            println!("{}", first.loaded.shape.name());
        }
        let mut line = format!("  {:<34}", first.asked.name());
        for cell in row {
            line += &format!("{:>9.0}", cell.median()?);
        }
        println!("{line}   {:.2}×", last.median()? / first.median()?);
    }
    Ok(())
}

/// For the counts of instructions: so many decisions against 10,000 policies of one destination, for the
/// caller of each policy in turn. Always the same one would be luck: how far a hash table looks for it is
/// drawn anew in each process.
pub(crate) fn repeat(times: usize) -> anyhow::Result<()> {
    let loaded = Loaded::new(Shape::OneDestination, MANY)?;
    for request in loaded.requests(Asked::InTurn, 0).take(times) {
        let verdict = black_box(loaded.table.decide(request));
        ensure!(matches!(verdict, Verdict::Allow(_)), "{} is denied", request.source);
    }
    Ok(())
}

struct Cell<'a> {
    loaded: &'a Loaded,
    asked: Asked,
    nanoseconds: Vec<f64>,
}

impl Cell<'_> {
    fn median(&self) -> anyhow::Result<f64> {
        median(&self.nanoseconds).context("nothing was measured")
    }
}

/// What the policies are about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Shape {
    OneDestination,
    ManyDestinations,
}

impl Shape {
    fn name(self) -> &'static str {
        match self {
            Self::OneDestination => "all about one destination",
            Self::ManyDestinations => "each about a destination of its own",
        }
    }
}

/// Who asks, in the order of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Asked {
    First,
    Last,
    InTurn,
    Denied,
}

impl Asked {
    const ALL: [Self; 4] = [Self::First, Self::Last, Self::InTurn, Self::Denied];

    fn name(self) -> &'static str {
        match self {
            Self::First => "allowed by the first policy",
            Self::Last => "allowed by the last policy",
            Self::InTurn => "allowed by each policy in turn",
            Self::Denied => "denied",
        }
    }
}

/// A caller and whom it wants.
struct Pair {
    source: SpiffeId,
    destination: SpiffeId,
}

/// A table, and what can be asked of it.
struct Loaded {
    shape: Shape,
    count: usize,
    table: DecisionTable,
    /// What each policy allows, in their order.
    allowed: Vec<Pair>,
    /// A caller that no rule names.
    denied: Pair,
}

impl Loaded {
    fn new(shape: Shape, count: usize) -> anyhow::Result<Self> {
        let domain: TrustDomain = "example.org".parse()?;
        let (mut policies, mut allowed) = (Vec::new(), Vec::new());
        for number in 0..count {
            let server = match shape {
                Shape::OneDestination => "server".to_owned(),
                Shape::ManyDestinations => format!("server-{number:05}"),
            };
            let pair = Pair {
                source: SpiffeId::workload(&domain, &format!("other-{number:05}"), "caller")?,
                destination: SpiffeId::workload(&domain, "bench", &server)?,
            };
            policies.push(policy(number, &pair)?);
            allowed.push(pair);
        }
        let denied = Pair {
            source: SpiffeId::workload(&domain, "bench", "stranger")?,
            destination: allowed.last().context("no policies")?.destination.clone(),
        };
        let registered = allowed
            .iter()
            .chain([&denied])
            .flat_map(|pair| [pair.source.clone(), pair.destination.clone()])
            .map(|id| (id, Mode::Enforce));
        let table = DecisionTable::build(policies, Vec::new(), registered);
        Ok(Self { shape, count, table, allowed, denied })
    }

    /// That the answers are those that are meant to be measured.
    fn check(&self, asked: Asked) -> anyhow::Result<()> {
        for request in self.requests(asked, 0).take(self.count) {
            let verdict = self.table.decide(request);
            let as_meant = match asked {
                Asked::First | Asked::Last | Asked::InTurn => matches!(verdict, Verdict::Allow(_)),
                Asked::Denied => matches!(verdict, Verdict::Deny(_)),
            };
            let (source, destination) = (request.source, request.destination);
            ensure!(as_meant, "{source} to {destination}: {}", verdict.as_str());
        }
        Ok(())
    }

    /// Without end, from this place on.
    fn requests(&self, asked: Asked, from: usize) -> impl Iterator<Item = Request<'_>> {
        let pairs = match asked {
            Asked::First => self.allowed.first().map_or(&[][..], std::slice::from_ref),
            Asked::Last => self.allowed.last().map_or(&[][..], std::slice::from_ref),
            Asked::InTurn => self.allowed.as_slice(),
            Asked::Denied => std::slice::from_ref(&self.denied),
        };
        let now = hauberk_tls::now();
        pairs.iter().cycle().skip(from % pairs.len().max(1)).map(move |pair| Request {
            source: &pair.source,
            destination: &pair.destination,
            port: PORT,
            now,
        })
    }

    /// Nanoseconds of each decision in the batch of this number.
    fn batch(&self, asked: Asked, number: usize) -> anyhow::Result<f64> {
        let length = usize::try_from(BATCH)?;
        let requests: Vec<Request<'_>> =
            self.requests(asked, number * length).take(length).collect();
        let started = Instant::now();
        for request in &requests {
            drop(black_box(self.table.decide(black_box(*request))));
        }
        Ok(started.elapsed().as_secs_f64() * 1e9 / f64::from(BATCH))
    }
}

fn policy(number: usize, pair: &Pair) -> anyhow::Result<ResolvedPolicy> {
    Ok(ResolvedPolicy {
        policy: PolicyRef {
            kind: PolicyKind::AccessPolicy,
            namespace: Some("bench".parse()?),
            // With leading zeros, for policies are sorted by name: the last one made is the last.
            name: format!("other-{number:05}").parse()?,
        },
        owner: Owner { team: "bench".to_owned(), contact: "#bench".to_owned(), runbook: None },
        mode: Mode::Enforce,
        destination: pair.destination.clone(),
        rules: vec![ResolvedRule {
            name: "load".parse()?,
            ports: (PORT..PORT + 4).collect(),
            peers: vec![PeerMatch::Exact(pair.source.clone())],
            not_after: None,
        }],
    })
}
