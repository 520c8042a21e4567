//! How often a peer may prove itself anew: each proof costs a verification.

use std::time::Duration;

use crate::time::Timestamp;

/// Proofs that may come at once: several renewals in a row, as when roots are rotated, and more.
const BURST: u64 = 16;

/// How long one proof more takes to be allowed. Renewals are seconds apart even with the shortest lifetime.
const INTERVAL: Duration = Duration::from_secs(1);

/// The allowance of one peer on one session.
#[derive(Debug, Clone, Copy)]
pub struct ProofAllowance {
    left: u64,
    refilled: Timestamp,
}

impl ProofAllowance {
    /// The full allowance.
    #[must_use]
    pub fn new(now: Timestamp) -> Self {
        Self { left: BURST, refilled: now }
    }

    /// Uses one up. Returns whether there was one.
    pub fn take(&mut self, now: Timestamp) -> bool {
        let more = now.since(self.refilled).as_secs() / INTERVAL.as_secs();
        // A clock that was put back begins to count anew.
        if more > 0 || now < self.refilled {
            self.left = self.left.saturating_add(more).min(BURST);
            self.refilled = now;
        }
        let Some(left) = self.left.checked_sub(1) else { return false };
        self.left = left;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixteen_proofs_may_come_at_once_and_then_one_a_second() {
        let start = Timestamp::from_unix_millis(1_000_000);
        let after = |millis| start.saturating_add(Duration::from_millis(millis));
        let mut allowance = ProofAllowance::new(start);
        let mut taken = |now| (0..1_000).filter(|_| allowance.take(now)).count();
        assert_eq!(taken(start), 16);
        assert_eq!(taken(after(999)), 0);
        for second in 1..=3 {
            assert_eq!(taken(after(second * 1_000)), 1);
        }
        // What was not used is not saved up.
        assert_eq!(taken(after(3_600_000)), 16);
        // Nor does a clock that is put back stop it for ever.
        assert_eq!(taken(start), 0);
        assert_eq!(taken(after(1_000)), 1);
    }
}
