//! Turns for incoming handshakes, so that whoever floods us with them, or says nothing in them, waits
//! for itself and for nobody else.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Handshakes under way at once from one address: more than a busy machine has, and about 10 MB.
const AT_ONCE: usize = 256;

/// Those and the ones that wait for a turn; over it a connection is refused.
const WAITING: usize = 4_096;

/// Who is shaking hands, by address. The lock is held for a look-up, never across a wait.
#[derive(Default)]
pub(crate) struct Handshakes(Mutex<HashMap<IpAddr, Caller>>);

struct Caller {
    turns: Arc<Semaphore>,
    present: usize,
}

/// Too many handshakes of this address wait already.
#[derive(Debug)]
pub(crate) struct RateLimited;

/// A turn; over when it is dropped.
pub(crate) struct Turn<'a> {
    _turn: Option<OwnedSemaphorePermit>,
    _present: Present<'a>,
}

/// Counts a caller for as long as it waits or shakes hands.
struct Present<'a> {
    handshakes: &'a Handshakes,
    address: IpAddr,
}

impl Handshakes {
    /// Waits for a turn.
    pub(crate) async fn turn(&self, address: IpAddr) -> Result<Turn<'_>, RateLimited> {
        let (turns, present) = self.enter(address)?;
        // Never closed.
        let turn = turns.acquire_owned().await.ok();
        Ok(Turn { _turn: turn, _present: present })
    }

    fn enter(&self, address: IpAddr) -> Result<(Arc<Semaphore>, Present<'_>), RateLimited> {
        let mut callers = self.lock();
        let caller = callers
            .entry(address)
            .or_insert_with(|| Caller { turns: Arc::new(Semaphore::new(AT_ONCE)), present: 0 });
        if caller.present >= WAITING {
            return Err(RateLimited);
        }
        caller.present += 1;
        Ok((caller.turns.clone(), Present { handshakes: self, address }))
    }

    /// Plain data: a panic elsewhere leaves nothing half-changed in it.
    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, Caller>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Present<'_> {
    fn drop(&mut self) {
        let mut callers = self.handshakes.lock();
        if let Some(caller) = callers.get_mut(&self.address) {
            caller.present -= 1;
            if caller.present == 0 {
                callers.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOOD: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const OTHER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

    #[tokio::test]
    async fn a_flood_of_one_address_takes_no_turn_of_another() {
        let handshakes = Handshakes::default();
        let mut held = Vec::new();
        for _ in 0..AT_ONCE {
            held.push(handshakes.turn(FLOOD).await.unwrap());
        }
        let full = std::time::Duration::from_millis(20);
        assert!(tokio::time::timeout(full, handshakes.turn(FLOOD)).await.is_err());
        assert!(tokio::time::timeout(full, handshakes.turn(OTHER)).await.is_ok());
        held.pop();
        assert!(tokio::time::timeout(full, handshakes.turn(FLOOD)).await.is_ok());
    }

    #[test]
    fn the_queue_is_bounded_and_nothing_is_kept_afterwards() {
        let handshakes = Handshakes::default();
        let mut present = Vec::new();
        for _ in 0..WAITING {
            present.push(handshakes.enter(FLOOD).unwrap().1);
        }
        assert!(handshakes.enter(FLOOD).is_err());
        assert!(handshakes.enter(OTHER).is_ok());
        present.clear();
        assert!(handshakes.lock().is_empty());
    }
}
