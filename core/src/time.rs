//! The instants that every decision in this crate is made against.
//!
//! This module decides how an instant is represented, compared, read and written. It never reads
//! a clock: `now` is always an argument, handed in by the process that owns one.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

const MILLIS_PER_SECOND: i64 = 1_000;

/// An instant: whole milliseconds since the Unix epoch, in UTC, without leap seconds.
///
/// Milliseconds, because certificates that live for ten seconds are rotated within fractions of
/// one. Written and read as RFC 3339 (`2026-07-01T12:00:00Z`, with a fraction only when there is
/// one); digits below a millisecond are dropped when reading.
///
/// Constructors and arithmetic saturate at [`Timestamp::MIN`] and [`Timestamp::MAX`], so that
/// every value can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

/// A text that is not an RFC 3339 instant.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{value:?} is not an RFC 3339 timestamp: write it like \"2026-07-01T12:00:00Z\"")]
pub struct TimestampError {
    value: String,
    source: jiff::Error,
}

impl Timestamp {
    /// The Unix epoch, `1970-01-01T00:00:00Z`.
    pub const UNIX_EPOCH: Self = Self(0);

    /// The earliest instant that can be represented: RFC 3339's first, `0000-01-01T00:00:00Z`.
    pub const MIN: Self = Self(-62_167_219_200_000);

    /// The latest instant that can be represented, `9999-12-30T22:00:00Z`: the last that is
    /// within the year 9999 at every offset from UTC.
    pub const MAX: Self = Self(253_402_207_200_000);

    /// The instant this many seconds after (or, negative, before) the Unix epoch.
    pub fn from_unix_seconds(seconds: i64) -> Self {
        Self::from_unix_millis(seconds.saturating_mul(MILLIS_PER_SECOND))
    }

    /// The instant this many milliseconds after (or, negative, before) the Unix epoch.
    pub fn from_unix_millis(millis: i64) -> Self {
        Self(millis).clamp(Self::MIN, Self::MAX)
    }

    /// Whole seconds since the Unix epoch, rounded towards the past.
    pub fn unix_seconds(self) -> i64 {
        self.0.div_euclid(MILLIS_PER_SECOND)
    }

    /// Whole milliseconds since the Unix epoch.
    pub fn unix_millis(self) -> i64 {
        self.0
    }

    /// This instant moved into the future, at most to [`Timestamp::MAX`]. Fractions of a
    /// millisecond in `duration` are dropped.
    #[must_use]
    pub fn saturating_add(self, duration: Duration) -> Self {
        Self::from_unix_millis(self.0.saturating_add(millis(duration)))
    }

    /// This instant moved into the past, at most to [`Timestamp::MIN`]. Fractions of a
    /// millisecond in `duration` are dropped.
    #[must_use]
    pub fn saturating_sub(self, duration: Duration) -> Self {
        Self::from_unix_millis(self.0.saturating_sub(millis(duration)))
    }

    /// The time that has passed since `earlier`: zero when `earlier` is not in the past.
    pub fn since(self, earlier: Self) -> Duration {
        u64::try_from(self.0.saturating_sub(earlier.0))
            .map_or(Duration::ZERO, Duration::from_millis)
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // `MIN` and `MAX` lie within jiff's range, so the error cannot occur.
        let instant = jiff::Timestamp::from_millisecond(self.0).map_err(|_| fmt::Error)?;
        instant.fmt(f)
    }
}

impl FromStr for Timestamp {
    type Err = TimestampError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let instant: jiff::Timestamp =
            text.parse().map_err(|source| TimestampError { value: text.to_owned(), source })?;
        Ok(Self::from_unix_millis(instant.as_millisecond()))
    }
}

impl From<SystemTime> for Timestamp {
    fn from(instant: SystemTime) -> Self {
        match instant.duration_since(SystemTime::UNIX_EPOCH) {
            Ok(after) => Self::UNIX_EPOCH.saturating_add(after),
            Err(before) => Self::UNIX_EPOCH.saturating_sub(before.duration()),
        }
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_timestamp_is_written_as_rfc_3339_in_utc() {
        let cases = [
            ("epoch", 0, "1970-01-01T00:00:00Z"),
            ("whole second", 1_782_907_200_000, "2026-07-01T12:00:00Z"),
            ("fraction", 1_782_907_200_250, "2026-07-01T12:00:00.25Z"),
            ("before the epoch", -1, "1969-12-31T23:59:59.999Z"),
            ("first", i64::MIN, "0000-01-01T00:00:00Z"),
            ("last", i64::MAX, "9999-12-30T22:00:00Z"),
        ];
        for (name, millis, text) in cases {
            assert_eq!(Timestamp::from_unix_millis(millis).to_string(), text, "{name}");
        }
    }

    #[test]
    fn an_offset_is_read_and_normalised_to_utc() {
        let read: Timestamp = "2026-07-01T14:00:00+02:00".parse().unwrap();
        assert_eq!(read, "2026-07-01T12:00:00Z".parse().unwrap());
    }

    #[test]
    fn a_text_that_is_no_instant_is_refused_with_the_value_and_the_form_expected() {
        for text in ["", "tomorrow", "2026-07-01", "2026-07-01T12:00:00", "2026-13-01T00:00:00Z"] {
            let message = text.parse::<Timestamp>().unwrap_err().to_string();
            assert!(message.starts_with(&format!("{text:?} is not an RFC 3339")), "{message}");
        }
    }

    #[test]
    fn seconds_before_the_epoch_round_towards_the_past() {
        assert_eq!(Timestamp::from_unix_millis(-1).unix_seconds(), -1);
        assert_eq!(Timestamp::from_unix_millis(1_999).unix_seconds(), 1);
    }

    #[test]
    fn the_time_since_a_later_instant_is_zero() {
        let (early, late) = (Timestamp::from_unix_seconds(1), Timestamp::from_unix_seconds(3));
        assert_eq!(late.since(early), Duration::from_secs(2));
        assert_eq!(early.since(late), Duration::ZERO);
        assert_eq!(Timestamp::MIN.since(Timestamp::MAX), Duration::ZERO);
    }

    #[test]
    fn arithmetic_saturates_at_both_ends() {
        assert_eq!(Timestamp::MAX.saturating_add(Duration::MAX), Timestamp::MAX);
        assert_eq!(Timestamp::MIN.saturating_sub(Duration::MAX), Timestamp::MIN);
    }

    proptest! {
        #[test]
        fn parse_and_display_are_inverse(millis in any::<i64>()) {
            let instant = Timestamp::from_unix_millis(millis);
            prop_assert_eq!(instant.to_string().parse::<Timestamp>().unwrap(), instant);
            let json = serde_json::to_string(&instant).unwrap();
            prop_assert_eq!(serde_json::from_str::<Timestamp>(&json).unwrap(), instant);
        }

        #[test]
        fn arbitrary_text_is_refused_or_reads_back_but_never_panics(text in ".{0,40}") {
            if let Ok(instant) = text.parse::<Timestamp>() {
                prop_assert_eq!(instant.to_string().parse::<Timestamp>().unwrap(), instant);
            }
        }

        #[test]
        fn adding_what_has_passed_since_gives_the_later_instant(a in any::<i64>(), b in any::<i64>()) {
            let (a, b) = (Timestamp::from_unix_millis(a), Timestamp::from_unix_millis(b));
            let (early, late) = (a.min(b), a.max(b));
            prop_assert_eq!(early.saturating_add(late.since(early)), late);
            prop_assert_eq!(late.saturating_sub(late.since(early)), early);
        }
    }
}
