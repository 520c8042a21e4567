//! What is remembered of the kubelet's probes: they come every few seconds for ever, so that each is counted, and only now and
//! then one recorded.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Between two records of probes of one port of a workload that end alike.
const PAUSE: Duration = Duration::from_secs(600);

/// Ends of ports of workloads of a node. Where there are more, all are told of anew.
const MOST: usize = 10_000;

/// Which probes were recorded when: by the workload's key, the port, and how it ended.
#[derive(Default)]
pub(crate) struct Probes(Mutex<HashMap<(String, u16, &'static str), Instant>>);

impl Probes {
    /// Notes how one has ended now. Returns whether that is to be recorded.
    pub(crate) fn note(
        &self,
        workload: String,
        port: u16,
        end: &'static str,
        now: Instant,
    ) -> bool {
        // Plain data: a panic elsewhere leaves nothing half-changed in it.
        let mut recorded = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if recorded.len() >= MOST {
            recorded.clear();
        }
        match recorded.entry((workload, port, end)) {
            Entry::Occupied(last) if now.saturating_duration_since(*last.get()) < PAUSE => false,
            Entry::Occupied(mut last) => {
                last.insert(now);
                true
            }
            Entry::Vacant(entry) => {
                entry.insert(now);
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_those_that_end_alike_is_recorded_in_ten_minutes() {
        let (probes, start) = (Probes::default(), Instant::now());
        let note = |workload: &str, port, end, seconds| {
            probes.note(workload.to_owned(), port, end, start + Duration::from_secs(seconds))
        };
        assert!(note("shop/web@1", 80, "complete", 0));
        assert!(!note("shop/web@1", 80, "complete", 1));
        assert!(note("shop/web@1", 81, "complete", 1));
        assert!(note("shop/web@2", 80, "complete", 1));
        // Two kinds of probes of one port may end each in its own way.
        assert!(note("shop/web@1", 80, "application_reset", 2));
        assert!(!note("shop/web@1", 80, "complete", 3));
        assert!(!note("shop/web@1", 80, "application_reset", 4));
        assert!(note("shop/web@1", 80, "complete", 600));
        assert!(!note("shop/web@1", 80, "complete", 1_199));
    }
}
