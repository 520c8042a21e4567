//! Which connections no policy allows: those that passed because somebody is only audited, and those that were
//! refused for want of a rule. Each edge once, with a count, for as long as the agent runs; the control plane is
//! told, so that policies can be learned from it. What there is no room for is counted.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Mutex, MutexGuard, PoisonError},
};

use hauberk_core::{
    learn::{Edge, Outcome, Seen},
    time::Timestamp,
};
use hauberk_proto::{convert::seen_message, v1};

/// Edges between identities that passed. A node's pods have some hundred; 10,000 take about 4 MiB.
const MAX_PASSED: usize = 10_000;

/// Edges of each other kind. Their own rooms, so that a scan of ports or callers without an identity take none of
/// that of what policies are learned from.
const MAX_OTHERS: usize = 1_000;

/// Edges in one report: the longest identities fill half of what a message may have.
const EDGES_A_REPORT: usize = 500;

pub(crate) struct Edges {
    /// Tells this start of the agent from others.
    since: Timestamp,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    edges: HashMap<Edge, Noted>,
    /// How many there are of each kind.
    held: HashMap<Kind, usize>,
    /// Connections of edges that found no room.
    missed: u64,
    /// Counts up with each connection.
    notes: u64,
}

struct Noted {
    seen: Seen,
    /// The number of its last connection.
    note: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Passed,
    Denied,
    /// One end has no identity.
    Outside,
}

impl Kind {
    fn of(edge: &Edge) -> Self {
        match (edge.identities(), edge.outcome) {
            (None, _) => Self::Outside,
            (Some(_), Outcome::WouldDeny | Outcome::Older) => Self::Passed,
            (Some(_), Outcome::Denied) => Self::Denied,
        }
    }

    fn room(self) -> usize {
        match self {
            Self::Passed => MAX_PASSED,
            Self::Denied | Self::Outside => MAX_OTHERS,
        }
    }
}

impl Edges {
    /// None yet, of an agent that starts now.
    pub(crate) fn new(now: Timestamp) -> Self {
        Self { since: now, table: Mutex::default() }
    }

    /// Notes one connection.
    pub(crate) fn note(&self, edge: Edge, now: Timestamp) {
        let mut guard = self.lock();
        let table = &mut *guard;
        table.notes = table.notes.saturating_add(1);
        let kind = Kind::of(&edge);
        let held = table.held.entry(kind).or_insert(0);
        match table.edges.entry(edge) {
            Entry::Occupied(mut entry) => {
                let noted = entry.get_mut();
                noted.seen.add(&Seen::once(now));
                noted.note = table.notes;
            }
            Entry::Vacant(entry) if *held < kind.room() => {
                *held += 1;
                entry.insert(Noted { seen: Seen::once(now), note: table.notes });
            }
            Entry::Vacant(_) => table.missed = table.missed.saturating_add(1),
        }
    }

    /// What is new since `told`, which it moves on; everything for one who has been told nothing, which is 0.
    pub(crate) fn news(&self, told: &mut u64) -> Vec<v1::Seen> {
        let table = self.lock();
        if table.notes == *told {
            return Vec::new();
        }
        let new = table.edges.iter().filter(|(_, noted)| noted.note > *told);
        let edges: Vec<v1::SeenEdge> =
            new.map(|(edge, noted)| seen_message(edge, &noted.seen)).collect();
        *told = table.notes;
        let report = |edges: &[v1::SeenEdge]| v1::Seen {
            since_unix_ms: self.since.unix_millis(),
            edges: edges.to_vec(),
            missed: table.missed,
        };
        if edges.is_empty() {
            return vec![report(&[])];
        }
        edges.chunks(EDGES_A_REPORT).map(report).collect()
    }

    /// Plain data: a panic elsewhere leaves nothing half-changed in it.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use hauberk_core::learn::End;

    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_unix_seconds(seconds)
    }

    fn edge(port: u16, outcome: Outcome) -> Edge {
        let identity = |name: &str| {
            End::Identity(format!("spiffe://example.org/ns/shop/sa/{name}").parse().unwrap())
        };
        Edge { source: identity("web"), destination: identity("ledger"), port, outcome }
    }

    fn outside(port: u16) -> Edge {
        let source = End::Address("10.0.0.9".parse().unwrap());
        Edge { source, ..edge(port, Outcome::WouldDeny) }
    }

    /// Port and count of each edge.
    fn counts(reports: &[v1::Seen]) -> Vec<(u32, u64)> {
        let mut counts: Vec<_> = reports
            .iter()
            .flat_map(|seen| &seen.edges)
            .map(|edge| (edge.port, edge.count))
            .collect();
        counts.sort_unstable();
        counts
    }

    #[test]
    fn an_edge_is_told_once_and_again_only_when_it_changes() {
        let edges = Edges::new(at(1));
        edges.note(edge(80, Outcome::WouldDeny), at(10));
        edges.note(edge(80, Outcome::WouldDeny), at(12));
        edges.note(edge(81, Outcome::WouldDeny), at(11));
        let mut told = 0;
        let first = edges.news(&mut told);
        assert_eq!(counts(&first), [(80, 2), (81, 1)]);
        let of_80 = first[0].edges.iter().find(|edge| edge.port == 80).unwrap();
        assert_eq!((of_80.first_unix_ms, of_80.last_unix_ms), (10_000, 12_000));
        assert_eq!(edges.news(&mut told), []);
        edges.note(edge(81, Outcome::WouldDeny), at(20));
        assert_eq!(counts(&edges.news(&mut told)), [(81, 2)]);
        // A control plane that knows nothing is told all, under the same start.
        let again = edges.news(&mut 0);
        assert_eq!(counts(&again), [(80, 2), (81, 2)]);
        assert_eq!(again[0].since_unix_ms, first[0].since_unix_ms);
    }

    #[test]
    fn what_finds_no_room_is_counted_and_takes_no_room_of_another_kind() {
        let edges = Edges::new(at(1));
        let all: Vec<u16> = (1..=1_100).collect();
        for port in &all {
            edges.note(edge(*port, Outcome::Denied), at(1));
            edges.note(outside(*port), at(1));
            edges.note(edge(*port, Outcome::WouldDeny), at(1));
        }
        // One that is known already is counted as before.
        edges.note(edge(1, Outcome::Denied), at(2));
        let mut told = 0;
        let reports = edges.news(&mut told);
        assert!(reports.iter().all(|seen| seen.edges.len() <= EDGES_A_REPORT));
        assert!(reports.iter().all(|seen| seen.missed == 200));
        assert_eq!(counts(&reports).len(), 1_000 + 1_000 + 1_100);
        // That more were missed is news by itself.
        edges.note(outside(2_000), at(3));
        let more = edges.news(&mut told);
        assert_eq!((more.len(), more[0].edges.len(), more[0].missed), (1, 0, 201));
    }
}
