//! What the agent says of its workloads: captured or not, and their certificates.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use hauberk_core::{clock::ClockSkew, time::Timestamp};
use hauberk_proto::v1;
use hauberk_tls::CredentialSlot;

use super::{guard::Condition, older::OlderCount};
use crate::context::Context;

/// Shared between the task that captures and the one that reports.
#[derive(Clone)]
pub(crate) struct StatusBoard {
    context: Arc<Context>,
    node: Arc<CredentialSlot>,
    entries: Arc<Mutex<BTreeMap<String, Entry>>>,
    /// As it was measured last.
    clock_skew: Arc<Mutex<Option<ClockSkew>>>,
}

struct Entry {
    slot: Option<Arc<CredentialSlot>>,
    problem: Option<String>,
    /// The network namespace that is captured.
    netns: Option<u64>,
    condition: Condition,
    /// Why what it serves could not be reached lately.
    unreached: String,
    /// Nothing before it was found out.
    older: Option<OlderCount>,
}

impl StatusBoard {
    pub(crate) fn new(context: Arc<Context>, node: Arc<CredentialSlot>) -> Self {
        Self { context, node, entries: Arc::default(), clock_skew: Arc::default() }
    }

    /// Notes how a workload stands. Returns whether that is news.
    pub(super) fn set(
        &self,
        key: &str,
        slot: Option<Arc<CredentialSlot>>,
        problem: Option<String>,
        netns: Option<u64>,
        condition: Condition,
        older: Option<OlderCount>,
    ) -> bool {
        let unreached = String::new();
        let mut entries = self.lock();
        // What is not known now stays as it was.
        let older = older.or_else(|| entries.get(key).and_then(|entry| entry.older));
        let entry = Entry { slot, problem: problem.clone(), netns, condition, unreached, older };
        let before = entries.insert(key.to_owned(), entry);
        before.is_none_or(|entry| entry.problem != problem)
    }

    /// Notes why what a workload serves could not be reached lately; nothing if it could.
    pub(super) fn set_unreached(&self, key: &str, unreached: String) {
        if let Some(entry) = self.lock().get_mut(key) {
            entry.unreached = unreached;
        }
    }

    /// How many connections of a workload are older than its capture.
    pub(super) fn older(&self, key: &str) -> OlderCount {
        self.lock().get(key).and_then(|entry| entry.older).unwrap_or_default()
    }

    /// Whether a workload is captured in this very network namespace.
    ///
    /// # Errors
    /// What stands in the way.
    pub(crate) fn has_captured(&self, key: &str, netns: u64) -> Result<(), String> {
        match self.lock().get(key) {
            Some(Entry { problem: Some(problem), .. }) => Err(problem.clone()),
            Some(entry) if entry.netns == Some(netns) => Ok(()),
            Some(_) | None => Err("the pod is not captured yet".to_owned()),
        }
    }

    pub(super) fn retain(&self, keys: &BTreeSet<String>) {
        self.lock().retain(|key, _| keys.contains(key));
    }

    /// How many workloads are captured, and how many should be and are not.
    pub(super) fn counts(&self) -> (u64, u64) {
        let entries = self.lock();
        let failed = entries.values().filter(|entry| entry.problem.is_some()).count();
        let count = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
        (count(entries.len() - failed), count(failed))
    }

    /// Of how many the agent is not told which connections cannot be captured.
    pub(super) fn unreported(&self) -> u64 {
        let entries = self.lock();
        let unreported = entries.values().filter(|entry| entry.condition.unreported.is_some());
        u64::try_from(unreported.count()).unwrap_or(u64::MAX)
    }

    /// Notes how far this node's clock is from the control plane's.
    pub(crate) fn set_clock_skew(&self, skew: ClockSkew) {
        *self.clock_skew.lock().unwrap_or_else(PoisonError::into_inner) = Some(skew);
    }

    pub(crate) fn report(&self) -> v1::AgentStatus {
        let workloads = self
            .lock()
            .iter()
            .map(|(key, entry)| {
                let credential = entry.slot.as_ref().and_then(|slot| slot.load());
                let facts = credential.as_ref().map(|credential| credential.facts());
                v1::WorkloadStatus {
                    workload: key.clone(),
                    // Who does not know of any is not to be taken for one who has none.
                    captured: entry.problem.is_none() && entry.older.is_some(),
                    problem: entry.problem.clone().unwrap_or_default(),
                    not_after_unix_ms: facts.map_or(0, |f| f.not_after().unix_millis()),
                    serial: facts.map(|f| f.serial().to_string()).unwrap_or_default(),
                    restored: entry.condition.restored,
                    restored_at_unix_ms: entry
                        .condition
                        .restored_at
                        .map_or(0, |at| Timestamp::from(at).unix_millis()),
                    restored_what: entry.condition.restored_what.clone(),
                    unreported: entry.condition.unreported.clone().unwrap_or_default(),
                    unreached: entry.unreached.clone(),
                    older: entry.older.map_or(0, |older| older.open),
                    older_closed_unix_ms: entry
                        .older
                        .and_then(|older| older.closed_from)
                        .map_or(0, |at| Timestamp::from(at).unix_millis()),
                }
            })
            .collect();
        v1::AgentStatus {
            workloads,
            // Those that carry data: sessions that are kept for the next one do not count.
            open_connections: self.context.metrics.open_connections(),
            node_not_after_unix_ms: self
                .node
                .load()
                .map_or(0, |credential| credential.facts().not_after().unix_millis()),
            clock_skew_ms: self
                .clock_skew
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .map(ClockSkew::millis),
        }
    }

    /// Plain data: a panic elsewhere leaves nothing half-changed in it.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
