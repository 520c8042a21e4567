//! Callers that finished a handshake lately, by a token that only they can know.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hauberk_core::time::Timestamp;

use super::{Caller, room::Room};
use crate::channel::CallerToken;

/// Tokens in all, some 200 bytes each.
const CAPACITY: usize = 16_384;

/// Tokens of one identity of one node. A caller uses the newest of each of its edges.
const SHARE: usize = 256;

/// How long a token is good.
const LIFETIME: Duration = Duration::from_secs(3_600);

/// Tokens, and whose they are. What one is worth is only a place among the callers that wait: it proves nothing.
#[derive(Debug)]
pub(super) struct KnownCallers(Mutex<State>);

#[derive(Debug)]
struct State {
    room: Room<CallerToken>,
    /// Of the next token.
    number: u64,
    by_token: HashMap<CallerToken, Known>,
}

#[derive(Debug)]
struct Known {
    caller: Arc<Caller>,
    until: Timestamp,
}

impl KnownCallers {
    pub(super) fn new() -> Self {
        let room = Room::new(CAPACITY, SHARE);
        Self(Mutex::new(State { room, number: 0, by_token: HashMap::new() }))
    }

    /// Remembers the token of a caller that has just proven who it is.
    pub(super) fn remember(&self, token: CallerToken, caller: Arc<Caller>, now: Timestamp) {
        let State { room, number, by_token } = &mut *self.lock();
        let displaced = room.insert(&caller, *number, token);
        *number += 1;
        by_token.insert(token, Known { caller, until: now.saturating_add(LIFETIME) });
        if let Some(displaced) = displaced {
            by_token.remove(&displaced);
        }
    }

    /// Whose token it is. Nothing if it is not known, or too old.
    pub(super) fn find(&self, token: &CallerToken, now: Timestamp) -> Option<Arc<Caller>> {
        let state = self.lock();
        let known = state.by_token.get(token)?;
        (now < known.until).then(|| known.caller.clone())
    }

    /// Plain data: a panic elsewhere leaves nothing half-changed in it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(number: usize) -> CallerToken {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&number.to_be_bytes());
        CallerToken::new(bytes)
    }

    fn web() -> Arc<Caller> {
        let identity = "spiffe://example.org/ns/shop/sa/web".parse().unwrap();
        let address = "10.0.0.9".parse().unwrap();
        Arc::new(Caller::proven(identity, Some("a".parse().unwrap()), address))
    }

    #[test]
    fn a_token_is_known_for_its_time() {
        let known = KnownCallers::new();
        let now = Timestamp::from_unix_millis(1_000);
        known.remember(token(1), web(), now);
        assert_eq!(known.find(&token(1), now).as_deref(), Some(&*web()));
        assert_eq!(known.find(&token(2), now), None);
        assert_eq!(known.find(&token(1), now.saturating_add(LIFETIME)), None);
    }

    #[test]
    fn one_caller_has_a_share_of_them_the_newest() {
        let known = KnownCallers::new();
        let now = Timestamp::from_unix_millis(1_000);
        for number in 0..=SHARE {
            known.remember(token(number), web(), now);
        }
        assert_eq!(known.find(&token(0), now), None);
        assert!((1..=SHARE).all(|number| known.find(&token(number), now).is_some()));
        assert_eq!(known.lock().by_token.len(), SHARE);
    }
}
