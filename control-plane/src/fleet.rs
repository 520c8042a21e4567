//! What the agents say of themselves: who is connected, what each enforces, what each denied, and what each saw
//! that no policy allows.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use hauberk_core::time::Timestamp;
use hauberk_proto::v1;
use tokio::sync::broadcast;

use crate::{policy::Version, seen::Memory};

/// How many denied connections are kept for people who ask.
const KEPT_DENIALS: usize = 10_000;

/// How far a follower may fall behind before it is told that it missed some.
const FOLLOWER_BACKLOG: usize = 1_024;

/// One agent, as of its last report.
#[derive(Debug, Clone, Default)]
pub(crate) struct Agent {
    /// Streams open now; more than one only while a restart or a renewal overlaps.
    pub(crate) streams: usize,
    /// When the newest of them was opened.
    pub(crate) connected: Option<Timestamp>,
    pub(crate) version: String,
    /// What it enforces.
    pub(crate) enforced: Version,
    pub(crate) refused: Option<String>,
    pub(crate) last_seen: Option<Timestamp>,
    pub(crate) status: v1::AgentStatus,
}

impl Agent {
    /// What it enforces, as a revision of this epoch; zero if it is of another one.
    pub(crate) fn enforced_in(&self, epoch: u64) -> u64 {
        if self.enforced.epoch == epoch { self.enforced.revision } else { 0 }
    }
}

#[derive(Debug)]
pub(crate) struct Fleet {
    agents: Mutex<BTreeMap<String, Agent>>,
    denials: Mutex<VecDeque<v1::DeniedEvent>>,
    followers: broadcast::Sender<v1::DeniedEvent>,
    seen: Memory,
    cuts: broadcast::Sender<String>,
}

impl Default for Fleet {
    fn default() -> Self {
        Self {
            agents: Mutex::default(),
            denials: Mutex::default(),
            followers: broadcast::channel(FOLLOWER_BACKLOG).0,
            seen: Memory::default(),
            cuts: broadcast::channel(FOLLOWER_BACKLOG).0,
        }
    }
}

impl Fleet {
    pub(crate) fn update(&self, node: &str, now: Timestamp, change: impl FnOnce(&mut Agent)) {
        let mut agents = lock(&self.agents);
        let agent = agents.entry(node.to_owned()).or_default();
        agent.last_seen = Some(now);
        change(agent);
    }

    /// Forgets the agents of nodes that are gone: `is_there` does not know them, and they have no stream. What they saw
    /// is kept for as long as nobody needs its room.
    pub(crate) fn retain_nodes(&self, is_there: impl Fn(&str) -> bool) {
        let mut agents = lock(&self.agents);
        agents.retain(|node, agent| agent.streams > 0 || is_there(node));
        self.seen.nodes_are(|node| is_there(node) || agents.contains_key(node));
    }

    /// Ends the streams that a node has open: its credential is not good any more.
    pub(crate) fn cut(&self, node: &str) {
        // There may be no stream at all.
        drop(self.cuts.send(node.to_owned()));
    }

    /// Told of each cut from now on.
    pub(crate) fn cuts(&self) -> broadcast::Receiver<String> {
        self.cuts.subscribe()
    }

    pub(crate) fn agents(&self) -> BTreeMap<String, Agent> {
        lock(&self.agents).clone()
    }

    pub(crate) fn connected(&self) -> usize {
        lock(&self.agents).values().filter(|agent| agent.streams > 0).count()
    }

    /// What was seen that no policy allows.
    pub(crate) fn seen(&self) -> &Memory {
        &self.seen
    }

    pub(crate) fn add_denials(&self, denials: v1::Denials) {
        let records =
            denials.records.into_iter().map(|record| v1::DeniedEvent { record, suppressed: 0 });
        let rest = (denials.suppressed > 0)
            .then(|| v1::DeniedEvent { record: String::new(), suppressed: denials.suppressed });
        let mut kept = lock(&self.denials);
        for event in records.chain(rest) {
            if kept.len() == KEPT_DENIALS {
                kept.pop_front();
            }
            kept.push_back(event.clone());
            // Nobody may be following.
            drop(self.followers.send(event));
        }
    }

    /// The last denials, and those to come: none is missing or double between the two.
    pub(crate) fn denials(
        &self,
        limit: usize,
    ) -> (Vec<v1::DeniedEvent>, broadcast::Receiver<v1::DeniedEvent>) {
        let kept = lock(&self.denials);
        let skip = kept.len().saturating_sub(limit);
        (kept.iter().skip(skip).cloned().collect(), self.followers.subscribe())
    }
}

/// Plain data: a panic elsewhere leaves nothing half-changed in it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agents_of_nodes_that_are_gone_are_forgotten() {
        let fleet = Fleet::default();
        let now = Timestamp::UNIX_EPOCH;
        for number in 0..10_000 {
            let (node, there) = (format!("node-{number}"), |node: &str| node == "stays");
            fleet.update(&node, now, |agent| agent.streams += 1);
            fleet.retain_nodes(there);
            assert_eq!(fleet.agents()[&node].streams, 1, "it is not registered, but connected");
            fleet.update(&node, now, |agent| agent.streams -= 1);
            fleet.update("stays", now, |_| {});
            fleet.retain_nodes(there);
            assert_eq!(fleet.agents().keys().collect::<Vec<_>>(), ["stays"]);
        }
    }
}
