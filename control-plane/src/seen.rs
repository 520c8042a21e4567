//! Connections that agents saw and no policy allows, for policies to be learned from: each edge once for each
//! node, with a count.
//!
//! An agent tells all of its edges anew on each new stream, so what a replica forgets comes back; what an agent
//! forgets when it is restarted, the replica keeps. A node speaks for its own workloads only: what it says of others is
//! kept, but nothing is learned from it. What nodes told that are gone stays for as long as there is room: it is dropped, the
//! oldest first, as soon as nodes that are there need that.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::{Mutex, MutexGuard, PoisonError},
};

use hauberk_core::{
    identity::SpiffeId,
    learn::{Edge, End, Outcome, Seen},
};
use hauberk_proto::{convert, v1};

/// Edges of all nodes together: some 20 MiB of them.
const MAX_EDGES: usize = 50_000;

/// Edges of one report; agents send half of that. The rest of a longer one is not read.
const MAX_A_REPORT: usize = 1_000;

/// Edges of one node: as many as its agent remembers. One that lies fills no more.
const MAX_OF_NODE: usize = 12_000;

#[derive(Debug, Default)]
pub(crate) struct Memory(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    nodes: BTreeMap<String, Told>,
    /// How many edges all of them have.
    held: usize,
    /// How many nodes that are gone lost their edges to others.
    forgotten: u64,
}

/// What one node's agent told.
#[derive(Debug, Default)]
struct Told {
    edges: BTreeMap<Edge, Counted>,
    missed: Tally,
    full: bool,
    unread: bool,
    /// Whether its node has left the mesh.
    gone: bool,
}

#[derive(Debug)]
struct Counted {
    count: Tally,
    /// Of it, only the times are used.
    seen: Seen,
    /// Whether the node could speak for it when it told of it, once.
    vouched: bool,
}

/// An edge as one node tells of it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Sighting {
    pub(crate) node: String,
    pub(crate) edge: Edge,
    pub(crate) seen: Seen,
    pub(crate) vouched: bool,
}

/// A count that begins anew whenever the agent does.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    /// Which start of the agent.
    since: i64,
    now: u64,
    /// Of earlier starts.
    before: u64,
}

impl Tally {
    fn told(&mut self, since: i64, count: u64) {
        // Of a stream that is about to end.
        if since < self.since {
            return;
        }
        if since > self.since {
            *self = Self { since, now: 0, before: self.total() };
        }
        // Two streams of one agent may overlap.
        self.now = self.now.max(count);
    }

    fn total(self) -> u64 {
        self.before.saturating_add(self.now)
    }
}

impl Memory {
    /// Takes a report. `runs_there` says whether an identity is that of a workload of the node.
    pub(crate) fn take(
        &self,
        node: &str,
        report: v1::Seen,
        runs_there: impl Fn(&SpiffeId) -> bool,
    ) {
        let since = report.since_unix_ms;
        // All that costs something before the lock, for which every agent's reports wait.
        let (mut read, mut bad) = (Vec::new(), report.edges.len() > MAX_A_REPORT);
        for message in report.edges.into_iter().take(MAX_A_REPORT) {
            match convert::seen(message) {
                Ok(edge) => read.push(edge),
                Err(error) => {
                    tracing::debug!(node, %error, "what an agent saw cannot be read");
                    bad = true;
                }
            }
        }
        let mut guard = self.lock();
        guard.make_room(node, &read);
        let Inner { nodes, held, forgotten: _ } = &mut *guard;
        let Told { edges, missed, full, unread, gone } = nodes.entry(node.to_owned()).or_default();
        *gone = false;
        missed.told(since, report.missed);
        *unread |= bad;
        for (edge, seen) in read {
            let room = edges.len() < MAX_OF_NODE && *held < MAX_EDGES;
            match edges.entry(edge) {
                Entry::Occupied(mut known) => {
                    let vouched = known.get().vouched || vouches(known.key(), &runs_there);
                    known.get_mut().told(since, &seen, vouched);
                }
                Entry::Vacant(new) if room => {
                    let vouched = vouches(new.key(), &runs_there);
                    let mut counted = Counted { count: Tally::default(), seen, vouched };
                    counted.told(since, &seen, vouched);
                    new.insert(counted);
                    *held += 1;
                }
                Entry::Vacant(_) => *full = true,
            }
        }
    }

    /// Notes which nodes are there. Of those that are gone only edges stay.
    pub(crate) fn nodes_are(&self, is_there: impl Fn(&str) -> bool) {
        self.lock().nodes.retain(|node, told| {
            told.gone = !is_there(node);
            !told.gone || !told.edges.is_empty()
        });
    }

    /// Every edge of every node.
    pub(crate) fn sightings(&self) -> Vec<Sighting> {
        let guard = self.lock();
        let nodes = guard.nodes.iter();
        nodes
            .flat_map(|(node, told)| {
                told.edges.iter().map(move |(edge, counted)| Sighting {
                    node: node.clone(),
                    edge: edge.clone(),
                    seen: Seen { count: counted.count.total(), ..counted.seen },
                    vouched: counted.vouched,
                })
            })
            .collect()
    }

    /// The nodes of which not everything is here.
    pub(crate) fn gaps(&self) -> Vec<v1::LearnedGap> {
        let guard = self.lock();
        let gaps = guard.nodes.iter().map(|(node, told)| v1::LearnedGap {
            node: node.clone(),
            missed: told.missed.total(),
            full: told.full,
            unread: told.unread,
        });
        gaps.filter(|gap| gap.missed > 0 || gap.full || gap.unread).collect()
    }

    /// How many nodes that are gone lost their edges to others.
    pub(crate) fn forgotten_nodes(&self) -> u64 {
        self.lock().forgotten
    }

    /// Plain data: a panic elsewhere leaves nothing half-changed in it.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Drops what nodes told that are gone, until the edges of a report find room or no such node is left.
    fn make_room(&mut self, node: &str, read: &[(Edge, Seen)]) {
        let known = self.nodes.get(node).map(|told| &told.edges);
        let is_new = |edge: &Edge| known.is_none_or(|edges| !edges.contains_key(edge));
        let new = read.iter().filter(|(edge, _)| is_new(edge)).count();
        while self.held + new > MAX_EDGES {
            let gone = self.nodes.iter().filter(|(name, told)| told.gone && *name != node);
            let oldest =
                gone.min_by_key(|(_, told)| told.edges.values().map(|edge| edge.seen.last).max());
            let Some(oldest) = oldest.map(|(name, _)| name.clone()) else { return };
            let dropped = self.nodes.remove(&oldest).map_or(0, |told| told.edges.len());
            self.held -= dropped;
            self.forgotten += 1;
            tracing::info!(
                node = oldest,
                edges = dropped,
                "the edges of a node that is gone are dropped, for those of others"
            );
        }
    }
}

impl Counted {
    fn told(&mut self, since: i64, seen: &Seen, vouched: bool) {
        self.count.told(since, seen.count);
        self.seen.join(seen);
        self.vouched = vouched;
    }
}

/// Whether a node may speak for an edge: it knows of its own workloads only.
fn vouches(edge: &Edge, runs_there: impl Fn(&SpiffeId) -> bool) -> bool {
    let there = |end: &End| matches!(end, End::Identity(id) if runs_there(id));
    match (edge.outcome, edge.identities()) {
        // The destination's agent has seen the caller's proof, or, where it is older than the capture, its address; a
        // caller's could make edges up for anybody.
        (Outcome::WouldDeny | Outcome::Older, Some(_)) => there(&edge.destination),
        (Outcome::WouldDeny | Outcome::Older, None) | (Outcome::Denied, _) => {
            there(&edge.source) || there(&edge.destination)
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use hauberk_core::time::Timestamp;

    use super::*;

    fn identity(name: &str) -> End {
        End::Identity(format!("spiffe://example.org/ns/n/sa/{name}").parse().unwrap())
    }

    fn edge(source: &str, destination: &str, port: u16) -> Edge {
        Edge {
            source: identity(source),
            destination: identity(destination),
            port,
            outcome: Outcome::WouldDeny,
        }
    }

    fn report(since: i64, edges: &[(Edge, u64)]) -> v1::Seen {
        let at = Timestamp::from_unix_seconds;
        let message = |(edge, count): &(Edge, u64)| {
            let seen = Seen { count: *count, first: at(since), last: at(since + 1) };
            convert::seen_message(edge, &seen)
        };
        v1::Seen { since_unix_ms: since, edges: edges.iter().map(message).collect(), missed: 0 }
    }

    fn is_ledger(id: &SpiffeId) -> bool {
        id.path().ends_with("/ledger")
    }

    fn counts(memory: &Memory) -> Vec<(String, u16, u64)> {
        let sightings = memory.sightings().into_iter();
        sightings.map(|one| (one.node, one.edge.port, one.seen.count)).collect()
    }

    #[test]
    fn counts_go_on_over_streams_and_starts_of_an_agent() {
        let memory = Memory::default();
        let called = edge("web", "ledger", 80);
        for (since, count, total) in [
            (10, 3, 3),
            // Told anew on the next stream, and once more by one that lagged.
            (10, 5, 5),
            (10, 4, 5),
            // A new start, and what is left of the one before.
            (20, 2, 7),
            (10, 5, 7),
            (20, 6, 11),
        ] {
            memory.take("a", report(since, &[(called.clone(), count)]), is_ledger);
            assert_eq!(counts(&memory), [("a".to_owned(), 80, total)], "{since} {count}");
        }
        let Sighting { seen, .. } = memory.sightings().remove(0);
        let at = Timestamp::from_unix_seconds;
        assert_eq!((seen.first, seen.last), (at(10), at(21)));
        memory.take("b", report(5, &[(called, 1)]), is_ledger);
        assert_eq!(counts(&memory), [("a".to_owned(), 80, 11), ("b".to_owned(), 80, 1)]);
        assert!(memory.gaps().is_empty());
    }

    #[test]
    fn a_node_speaks_for_its_own_workloads_only() {
        let address = End::Address("10.0.0.9".parse().unwrap());
        let denied = |edge: Edge| Edge { outcome: Outcome::Denied, ..edge };
        let cases = [
            ("to its own", edge("web", "ledger", 80), true),
            ("from its own, which anybody could say", edge("ledger", "web", 80), false),
            ("between others", edge("web", "cart", 80), false),
            ("denied to its own", denied(edge("web", "ledger", 80)), true),
            ("denied from its own", denied(edge("ledger", "web", 80)), true),
            ("denied between others", denied(edge("web", "cart", 80)), false),
            ("in clear", Edge { source: address.clone(), ..edge("x", "ledger", 80) }, true),
            ("in clear to others", Edge { source: address.clone(), ..edge("x", "web", 80) }, false),
            ("to outside", Edge { destination: address, ..edge("ledger", "x", 80) }, true),
        ];
        for (name, edge, vouched) in cases {
            let memory = Memory::default();
            memory.take("a", report(1, &[(edge, 1)]), is_ledger);
            assert_eq!(memory.sightings().remove(0).vouched, vouched, "{name}");
        }
    }

    #[test]
    fn a_workload_that_has_left_its_node_is_vouched_for_as_before() {
        let memory = Memory::default();
        let called = || report(1, &[(edge("web", "ledger", 80), 1)]);
        let vouched = |runs_there: bool| {
            memory.take("a", called(), |_| runs_there);
            memory.sightings().remove(0).vouched
        };
        assert_eq!([vouched(false), vouched(true), vouched(false)], [false, true, true]);
    }

    #[test]
    fn nodes_that_are_gone_crowd_out_no_edge_of_one_that_is_there() {
        const OF_EACH: u16 = 10_000;
        let memory = Memory::default();
        let many: Vec<(Edge, u64)> =
            (1..=OF_EACH).map(|port| (edge("web", "ledger", port), 1)).collect();
        let of = |node: &str| counts(&memory).iter().filter(|(name, ..)| name == node).count();
        for number in 0..20_i64 {
            let node = format!("node-{number}");
            for part in many.chunks(MAX_A_REPORT) {
                memory.take(&node, report(number, part), is_ledger);
            }
            assert_eq!(of(&node), usize::from(OF_EACH), "{node} found no room");
            assert!(memory.sightings().len() <= MAX_EDGES);
            memory.nodes_are(|name| name == node);
        }
        // What is gone stays while there is room, the newest of it.
        assert_eq!(memory.sightings().len(), MAX_EDGES);
        assert_eq!((of("node-14"), of("node-15")), (0, usize::from(OF_EACH)));
        assert_eq!((memory.forgotten_nodes(), memory.gaps()), (15, Vec::new()));
        // A node that comes back is told of by its agent anew.
        memory.take("node-16", report(30, &many[..1]), is_ledger);
        memory.take("other", report(31, &many[..2]), is_ledger);
        assert_eq!((of("node-16"), of("node-15"), of("other")), (usize::from(OF_EACH), 0, 2));
    }

    #[test]
    fn nodes_that_are_gone_and_have_no_edge_leave_nothing() {
        let memory = Memory::default();
        for number in 0..10_000 {
            let node = format!("node-{number}");
            let told = v1::Seen { since_unix_ms: 1, edges: Vec::new(), missed: 1 };
            memory.take(&node, told, is_ledger);
            memory.nodes_are(|_| false);
        }
        assert_eq!((memory.gaps(), memory.lock().nodes.len()), (Vec::new(), 0));
    }

    #[test]
    fn what_cannot_be_read_or_finds_no_room_is_told() {
        let memory = Memory::default();
        let mut bad = report(1, &[(edge("web", "ledger", 80), 1)]);
        bad.edges[0].port = 0;
        bad.missed = 7;
        memory.take("a", bad, is_ledger);
        let gap = v1::LearnedGap { node: "a".to_owned(), missed: 7, full: false, unread: true };
        assert_eq!((memory.sightings(), memory.gaps()), (Vec::new(), vec![gap]));

        let many =
            (1..=u16::try_from(MAX_OF_NODE).unwrap() + 1).map(|p| (edge("web", "ledger", p), 1));
        let many: Vec<(Edge, u64)> = many.collect();
        let in_parts = |node: &str| {
            for part in many.chunks(MAX_A_REPORT) {
                memory.take(node, report(1, part), is_ledger);
            }
        };
        in_parts("b");
        assert_eq!(memory.sightings().len(), MAX_OF_NODE);
        assert!(memory.gaps().iter().any(|gap| gap.node == "b" && gap.full));
        // Those that are known are counted on.
        memory.take("b", report(2, &many[..1]), is_ledger);
        assert_eq!(counts(&memory).first(), Some(&("b".to_owned(), 1, 2)));
        for node in ["c", "d", "e", "f"] {
            in_parts(node);
        }
        assert_eq!(memory.sightings().len(), MAX_EDGES);
        // A longer report than agents send is read as far as they go, and that is told.
        let memory = Memory::default();
        memory.take("g", report(1, &many), is_ledger);
        assert_eq!(memory.sightings().len(), MAX_A_REPORT);
        assert!(memory.gaps().iter().any(|gap| gap.node == "g" && gap.unread));
    }
}
