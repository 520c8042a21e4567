//! How fast a node may ask for certificates: signing is the dearest thing that a caller can make the
//! control plane do, and one node must not take that from the others.

use std::{
    collections::HashMap,
    fmt,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// What a node may ask for at once: more workloads than one node runs.
const BURST: u32 = 1_000;

/// And in the long run, a second. A thousand workloads with certificates of 20 s need that.
const PER_SECOND: u32 = 100;

/// A node asked for too much.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Exceeded {
    /// Whether it is the first time since the node was within its rate.
    pub(crate) first: bool,
}

impl fmt::Display for Exceeded {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "the node asks for more than {BURST} certificates at once and {PER_SECOND} a second; \
             ask again in a second"
        )
    }
}

struct Node {
    /// When everything taken so far is earned again.
    earned: Instant,
    exceeded: bool,
}

/// With this many buckets, the full ones are thrown away for the first time.
const FIRST_SWEEP: usize = 1_000;

/// A bucket for each node that asked lately. A full one is as good as none.
#[derive(Default)]
pub(crate) struct IssuanceRate {
    nodes: Mutex<Nodes>,
}

#[derive(Default)]
struct Nodes {
    buckets: HashMap<String, Node>,
    /// How many there were after the last sweep.
    swept: usize,
}

impl Nodes {
    /// Throws the full buckets away whenever there are twice as many as were left the last time.
    fn sweep(&mut self, now: Instant) {
        if self.buckets.len() >= FIRST_SWEEP.max(self.swept.saturating_mul(2)) {
            self.buckets.retain(|_, node| node.earned > now);
            self.swept = self.buckets.len();
        }
    }
}

impl IssuanceRate {
    /// Takes the right to ask once.
    pub(crate) fn take(&self, node: &str, now: Instant) -> Result<(), Exceeded> {
        let one = Duration::from_secs(1) / PER_SECOND;
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.sweep(now);
        let node = nodes
            .buckets
            .entry(node.to_owned())
            .or_insert_with(|| Node { earned: now, exceeded: false });
        let earned = node.earned.max(now) + one;
        if earned.saturating_duration_since(now) > one * BURST {
            let first = !std::mem::replace(&mut node.exceeded, true);
            return Err(Exceeded { first });
        }
        node.earned = earned;
        // Told again only after a real pause, not for each request that just fits.
        if earned.saturating_duration_since(now) < one * (BURST / 2) {
            node.exceeded = false;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_that_ask_no_more_are_forgotten() {
        let rate = IssuanceRate::default();
        let mut now = Instant::now();
        for number in 0..20_000 {
            now += Duration::from_millis(10);
            assert_eq!(rate.take(&format!("node-{number}"), now), Ok(()));
            assert!(rate.nodes.lock().unwrap().buckets.len() <= FIRST_SWEEP, "number {number}");
        }
        // One that asks too much is not let off by it.
        for _ in 0..BURST {
            drop(rate.take("flood", now));
        }
        for number in 0..FIRST_SWEEP * 3 {
            drop(rate.take(&format!("other-{number}"), now));
        }
        assert_eq!(rate.take("flood", now), Err(Exceeded { first: true }));
    }

    #[test]
    fn a_flood_is_slowed_down_told_once_and_leaves_others_alone() {
        let rate = IssuanceRate::default();
        let start = Instant::now();
        for number in 0..BURST {
            assert_eq!(rate.take("a", start), Ok(()), "number {number}");
        }
        assert_eq!(rate.take("a", start), Err(Exceeded { first: true }));
        assert_eq!(rate.take("a", start), Err(Exceeded { first: false }));
        assert_eq!(rate.take("b", start), Ok(()), "another node");
        let later = start + Duration::from_secs(1);
        let taken = (0..BURST).filter(|_| rate.take("a", later).is_ok()).count();
        assert_eq!(taken, 100, "what a second earns");
        let long = start + Duration::from_secs(60);
        assert_eq!(rate.take("a", long), Ok(()));
    }
}
