//! Bounded room for what must not give way, such as open streams: whoever has its share gets nothing more, and some is
//! always left for others.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use hauberk_core::identity::SpiffeId;

use super::{Caller, Origin};

/// An identity of an origin may hold this many times what is free: by itself two thirds of everything.
const OF_IDENTITY: usize = 2;

/// And all identities of an origin together: four fifths.
const OF_ORIGIN: usize = 4;

/// Room for `capacity` in all.
#[derive(Debug)]
pub struct Shares {
    capacity: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    held: usize,
    origins: HashMap<Origin, OfOrigin>,
}

#[derive(Debug, Default)]
struct OfOrigin {
    held: usize,
    identities: HashMap<Option<SpiffeId>, usize>,
}

/// One of a caller's, until it is dropped.
#[derive(Debug)]
#[must_use = "it is given back when this is dropped"]
pub struct Share {
    shares: Arc<Shares>,
    caller: Arc<Caller>,
}

impl Shares {
    /// Room for `capacity` in all.
    #[must_use]
    pub fn new(capacity: usize) -> Arc<Self> {
        Arc::new(Self { capacity, state: Mutex::default() })
    }

    /// One more for this caller; nothing if it has its share.
    pub fn take(self: &Arc<Self>, caller: &Arc<Caller>) -> Option<Share> {
        let mut state = self.lock();
        let free = self.capacity.saturating_sub(state.held);
        let of_origin = state.origins.get(&caller.origin);
        let held_by_origin = of_origin.map_or(0, |of_origin| of_origin.held);
        let held_by_identity = of_origin
            .and_then(|of_origin| of_origin.identities.get(&caller.identity))
            .copied()
            .unwrap_or(0);
        if held_by_identity >= OF_IDENTITY.saturating_mul(free)
            || held_by_origin >= OF_ORIGIN.saturating_mul(free)
        {
            return None;
        }
        state.held += 1;
        let of_origin = state.origins.entry(caller.origin.clone()).or_default();
        of_origin.held += 1;
        *of_origin.identities.entry(caller.identity.clone()).or_default() += 1;
        Some(Share { shares: self.clone(), caller: caller.clone() })
    }

    /// Plain data: a panic elsewhere leaves nothing half-changed in it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut state = self.shares.lock();
        state.held -= 1;
        let Caller { origin, identity } = &*self.caller;
        let Some(of_origin) = state.origins.get_mut(origin) else { return };
        of_origin.held -= 1;
        if let Some(held) = of_origin.identities.get_mut(identity) {
            *held -= 1;
            if *held == 0 {
                of_origin.identities.remove(identity);
            }
        }
        if of_origin.held == 0 {
            state.origins.remove(origin);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(node: &str, workload: &str) -> Arc<Caller> {
        let identity = format!("spiffe://example.org/ns/shop/sa/{workload}").parse().unwrap();
        let address = "10.0.0.9".parse().unwrap();
        Arc::new(Caller::proven(identity, Some(node.parse().unwrap()), address))
    }

    /// As many as it gets.
    fn all(shares: &Arc<Shares>, caller: &Arc<Caller>) -> Vec<Share> {
        std::iter::from_fn(|| shares.take(caller)).collect()
    }

    #[test]
    fn whoever_takes_all_it_gets_leaves_some_for_others() {
        let shares = Shares::new(3_000);
        let greedy = all(&shares, &of("a", "greedy"));
        assert_eq!(greedy.len(), 2_000);
        // The node has some left, and other nodes more.
        let neighbour = all(&shares, &of("a", "neighbour"));
        assert_eq!(neighbour.len(), 400);
        assert!(shares.take(&of("a", "third")).is_none());
        let other = all(&shares, &of("b", "other"));
        assert_eq!(other.len(), 400);
        assert!(shares.take(&of("c", "web")).is_some());
    }

    #[test]
    fn what_is_given_back_can_be_had_and_nothing_is_left_over() {
        let shares = Shares::new(30);
        let (greedy, web) = (of("a", "greedy"), of("a", "web"));
        let mut held = all(&shares, &greedy);
        assert!(shares.take(&greedy).is_none());
        held.pop();
        assert!(shares.take(&greedy).is_some());
        let others = all(&shares, &web);
        drop((held, others));
        let state = shares.lock();
        assert!(state.held == 0 && state.origins.is_empty());
    }
}
