//! How far apart clocks may be, and what is said of it.
//!
//! Every certificate is dated by the control plane's clock and judged by the clocks of agents. This module decides how
//! far back the start of a certificate lies, how two clocks are compared, and from when a difference is reported. It
//! reads no clock.

use std::{fmt, time::Duration};

use crate::time::Timestamp;

/// How long before its issuance a certificate becomes valid: a clock that is behind the control plane's by less than
/// this accepts it at once.
///
/// Two minutes, because a clock that drifts by a second a day is reported for months ([`SKEW_WARNING`]) before it
/// refuses anything, and because a supplied CA issues only this long after its own `notBefore`.
pub const NOT_BEFORE_BACKDATE: Duration = Duration::from_secs(120);

/// From this difference on, between an agent's clock and the control plane's, it is reported.
///
/// Machines that keep time with NTP are apart by milliseconds. A measurement over a slow network is wrong by at most
/// half of its round trip, and agents give one up after 10 s: so slowness alone is never reported.
pub const SKEW_WARNING: Duration = Duration::from_secs(10);

// What is refused has been reported long before.
const _: () = assert!(SKEW_WARNING.as_secs() * 4 < NOT_BEFORE_BACKDATE.as_secs());

/// By how much an agent's clock is ahead of the control plane's, or behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockSkew(i64);

/// What a difference between clocks means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SkewVerdict {
    /// Nothing to report.
    Tolerated,
    /// To be reported; certificates that live for at least three times that are not refused for it.
    Reported,
    /// The agent's clock is so far behind that it refuses certificates which were just issued.
    RefusesFreshCertificates,
}

impl ClockSkew {
    /// What one exchange says: asked at `asked_at` by the agent's clock, answered `round_trip` later with the control
    /// plane's time `answer`. Off by half of `round_trip` at most.
    #[must_use]
    pub fn measured(asked_at: Timestamp, round_trip: Duration, answer: Timestamp) -> Self {
        let answered_at = asked_at.saturating_add(round_trip / 2);
        Self(answered_at.unix_millis().saturating_sub(answer.unix_millis()))
    }

    /// A skew in milliseconds: positive if the agent's clock is ahead.
    #[must_use]
    pub fn from_millis(millis: i64) -> Self {
        Self(millis)
    }

    /// In milliseconds: positive if the agent's clock is ahead.
    #[must_use]
    pub fn millis(self) -> i64 {
        self.0
    }

    /// What it means.
    #[must_use]
    pub fn verdict(self) -> SkewVerdict {
        let size = Duration::from_millis(self.0.unsigned_abs());
        if self.0 < 0 && size >= NOT_BEFORE_BACKDATE {
            SkewVerdict::RefusesFreshCertificates
        } else if size >= SKEW_WARNING {
            SkewVerdict::Reported
        } else {
            SkewVerdict::Tolerated
        }
    }
}

impl fmt::Display for ClockSkew {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = Duration::from_millis(self.0.unsigned_abs());
        let side = if self.0 < 0 { "behind" } else { "ahead of" };
        write!(formatter, "{:.1} s {side}", size.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_round_trip_belongs_to_each_way() {
        let at = Timestamp::from_unix_millis;
        let cases = [
            ("the same", 10_000, 0, 10_000, 0),
            ("the same, far away", 10_000, 400, 10_200, 0),
            ("behind", 10_000, 400, 100_200, -90_000),
            ("ahead", 100_000, 400, 10_200, 90_000),
            ("all of the way is the answer's", 10_000, 400, 10_000, 200),
        ];
        for (name, asked, round_trip, answer, wanted) in cases {
            let round_trip = Duration::from_millis(round_trip);
            let skew = ClockSkew::measured(at(asked), round_trip, at(answer));
            assert_eq!(skew.millis(), wanted, "{name}");
        }
        let extreme = ClockSkew::measured(Timestamp::MIN, Duration::MAX, Timestamp::MIN);
        assert_eq!(extreme.verdict(), SkewVerdict::Reported);
    }

    #[test]
    fn small_differences_are_tolerated_larger_ones_reported_before_anything_is_refused() {
        let cases = [
            (0, SkewVerdict::Tolerated, "0.0 s ahead of"),
            (9_999, SkewVerdict::Tolerated, "10.0 s ahead of"),
            (-9_999, SkewVerdict::Tolerated, "10.0 s behind"),
            (10_000, SkewVerdict::Reported, "10.0 s ahead of"),
            (-10_000, SkewVerdict::Reported, "10.0 s behind"),
            (-90_040, SkewVerdict::Reported, "90.0 s behind"),
            (-119_999, SkewVerdict::Reported, "120.0 s behind"),
            (-120_000, SkewVerdict::RefusesFreshCertificates, "120.0 s behind"),
            (3_600_000, SkewVerdict::Reported, "3600.0 s ahead of"),
        ];
        for (millis, verdict, text) in cases {
            let skew = ClockSkew::from_millis(millis);
            assert_eq!((skew.verdict(), skew.to_string().as_str()), (verdict, text), "{millis}");
        }
        assert_eq!(
            ClockSkew::from_millis(i64::MIN).verdict(),
            SkewVerdict::RefusesFreshCertificates
        );
    }
}
