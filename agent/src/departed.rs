//! Workloads that have left the mesh: their series stay a little, for the last scrape, and go then.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use crate::policy::Snapshot;

/// How long the series of a workload that is gone stay.
const STAY: Duration = Duration::from_secs(60);

/// Namespace, empty for machines, and name.
type Name = (String, String);

/// Who is there, and who has left.
#[derive(Default)]
pub(crate) struct Departed {
    version: (u64, u64),
    present: HashSet<Name>,
    gone: HashMap<Name, Instant>,
}

impl Departed {
    /// The workloads whose time is over, each once.
    pub(crate) fn look(&mut self, snapshot: &Snapshot, now: Instant) -> Vec<Name> {
        let version = (snapshot.epoch, snapshot.revision);
        if std::mem::replace(&mut self.version, version) != version {
            self.take(snapshot.names().collect(), now);
        }
        self.over(now)
    }

    fn take(&mut self, present: HashSet<Name>, now: Instant) {
        for name in self.present.difference(&present) {
            self.gone.insert(name.clone(), now);
        }
        self.gone.retain(|name, _| !present.contains(name));
        self.present = present;
    }

    fn over(&mut self, now: Instant) -> Vec<Name> {
        let over = |since: &Instant| now.saturating_duration_since(*since) >= STAY;
        let names = self.gone.iter().filter(|(_, since)| over(since)).map(|(name, _)| name.clone());
        let names: Vec<Name> = names.collect();
        self.gone.retain(|_, since| !over(since));
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> HashSet<Name> {
        list.iter().map(|name| ("shop".to_owned(), (*name).to_owned())).collect()
    }

    #[test]
    fn a_workload_is_forgotten_once_a_minute_after_it_left_and_not_if_it_came_back() {
        let mut departed = Departed::default();
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        departed.take(names(&["web", "cart"]), start);
        departed.take(names(&[]), after(10));
        departed.take(names(&["cart"]), after(20));
        assert_eq!(departed.over(after(69)), []);
        assert_eq!(departed.over(after(70)), [("shop".to_owned(), "web".to_owned())]);
        assert_eq!(departed.over(after(500)), []);
    }
}
