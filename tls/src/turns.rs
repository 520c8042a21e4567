//! Turns for incoming handshakes, so that whoever floods us with them, or says nothing in them, waits
//! for itself and for nobody else.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Handshakes under way at once from one address: more than a busy machine has, and about 10 MB.
const AT_ONCE: usize = 256;

/// Those and the ones that wait for a turn; over it a connection is refused.
const WAITING: usize = 4_096;

/// The same for all addresses together, so that many of them leave files for everything else.
const WAITING_ALL: usize = 8_192;

/// Who is shaking hands. The lock is held for a look-up, never across a wait.
#[derive(Debug, Default)]
pub struct Handshakes(Mutex<Callers>);

#[derive(Debug, Default)]
struct Callers {
    by_address: HashMap<IpAddr, Caller>,
    present: usize,
}

#[derive(Debug)]
struct Caller {
    turns: Arc<Semaphore>,
    present: usize,
}

/// Too many handshakes of this address wait already, or of all together, or this one waited for too
/// long.
#[derive(Debug, thiserror::Error)]
#[error("too many handshakes of this address wait already")]
pub struct RateLimited;

/// A turn; over when it is dropped.
#[derive(Debug)]
pub struct Turn {
    _turn: Option<OwnedSemaphorePermit>,
    _present: Present,
}

/// Counts a caller for as long as it waits or shakes hands.
#[derive(Debug)]
struct Present {
    handshakes: Arc<Handshakes>,
    address: IpAddr,
}

impl Handshakes {
    /// Waits for a turn, but not for long.
    ///
    /// # Errors
    /// If too many wait already, or it did not come in time.
    pub async fn turn(
        self: &Arc<Self>,
        address: IpAddr,
        patience: Duration,
    ) -> Result<Turn, RateLimited> {
        let (turns, present) = self.enter(address)?;
        let turn = tokio::time::timeout(patience, turns.acquire_owned());
        // Never closed.
        let turn = turn.await.map_err(|_| RateLimited)?.ok();
        Ok(Turn { _turn: turn, _present: present })
    }

    fn enter(self: &Arc<Self>, address: IpAddr) -> Result<(Arc<Semaphore>, Present), RateLimited> {
        let address = site(address);
        let mut callers = self.lock();
        if callers.present >= WAITING_ALL {
            return Err(RateLimited);
        }
        let caller = callers
            .by_address
            .entry(address)
            .or_insert_with(|| Caller { turns: Arc::new(Semaphore::new(AT_ONCE)), present: 0 });
        if caller.present >= WAITING {
            return Err(RateLimited);
        }
        caller.present += 1;
        let turns = caller.turns.clone();
        callers.present += 1;
        Ok((turns, Present { handshakes: self.clone(), address }))
    }

    /// Plain data: a panic elsewhere leaves nothing half-changed in it.
    fn lock(&self) -> MutexGuard<'_, Callers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A machine has its /64 of IPv6 to itself: all addresses in it are one caller.
fn site(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            let bits = u128::from(address) & !u128::from(u64::MAX);
            IpAddr::V6(Ipv6Addr::from(bits))
        }
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        let mut callers = self.handshakes.lock();
        callers.present -= 1;
        if let Some(caller) = callers.by_address.get_mut(&self.address) {
            caller.present -= 1;
            if caller.present == 0 {
                callers.by_address.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(10);
    const FLOOD: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const OTHER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

    #[tokio::test]
    async fn a_flood_of_one_address_takes_no_turn_of_another() {
        let handshakes = Arc::new(Handshakes::default());
        let mut held = Vec::new();
        for _ in 0..AT_ONCE {
            held.push(handshakes.turn(FLOOD, LONG).await.unwrap());
        }
        let full = std::time::Duration::from_millis(20);
        assert!(tokio::time::timeout(full, handshakes.turn(FLOOD, LONG)).await.is_err());
        assert!(tokio::time::timeout(full, handshakes.turn(OTHER, LONG)).await.is_ok());
        held.pop();
        assert!(tokio::time::timeout(full, handshakes.turn(FLOOD, LONG)).await.is_ok());
    }

    #[test]
    fn the_queue_is_bounded_and_nothing_is_kept_afterwards() {
        let handshakes = Arc::new(Handshakes::default());
        let mut present = Vec::new();
        for _ in 0..WAITING {
            present.push(handshakes.enter(FLOOD).unwrap().1);
        }
        assert!(handshakes.enter(FLOOD).is_err());
        assert!(handshakes.enter(OTHER).is_ok());
        present.clear();
        assert!(handshakes.lock().by_address.is_empty() && handshakes.lock().present == 0);
    }

    #[test]
    fn many_addresses_together_are_bounded_too() {
        let handshakes = Arc::new(Handshakes::default());
        let mut present = Vec::new();
        for number in 0..u16::try_from(WAITING_ALL).unwrap() {
            let [high, low] = number.to_be_bytes();
            let address = IpAddr::from([10, 1, high, low]);
            present.push(handshakes.enter(address).unwrap().1);
        }
        assert!(handshakes.enter(OTHER).is_err());
        present.pop();
        assert!(handshakes.enter(OTHER).is_ok());
    }

    #[test]
    fn the_addresses_of_a_64_are_one_caller() {
        let same = ["fd00::1", "fd00::ffff:2"].map(|text| site(text.parse().unwrap()));
        assert_eq!(same[0], same[1]);
        assert_ne!(same[0], site("fd00:0:0:1::1".parse().unwrap()));
        assert_eq!(site("::ffff:10.0.0.1".parse().unwrap()), FLOOD);
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_is_not_waited_for_for_ever() {
        let handshakes = Arc::new(Handshakes::default());
        let mut held = Vec::new();
        for _ in 0..AT_ONCE {
            held.push(handshakes.turn(FLOOD, LONG).await.unwrap());
        }
        assert!(handshakes.turn(FLOOD, LONG).await.is_err());
        assert_eq!(handshakes.lock().present, AT_ONCE, "the one that gave up is not counted");
    }
}
