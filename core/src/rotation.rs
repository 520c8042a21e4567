//! When a certificate is renewed, and when a failed renewal is tried again.
//!
//! Pure schedule: `now`, the jitter and the last failure come in, one [`Step`] goes out, and the
//! caller sleeps and calls. The old certificate serves until it expires, whatever happens here.
//! The schedule never steps past the expiry and never asks for two tries within
//! [`MIN_RETRY_DELAY`].

use std::time::Duration;

use crate::{clock::NOT_BEFORE_BACKDATE, time::Timestamp};

/// The first retry after a failure comes this long after it, and each further one after twice
/// the time.
pub const FIRST_RETRY_DELAY: Duration = Duration::from_secs(1);

/// Retries are never further apart: a control plane that has come back is noticed in this time.
pub const MAX_RETRY_DELAY: Duration = Duration::from_secs(60);

/// Retries are never closer together, however short the certificate's life: no busy loop.
pub const MIN_RETRY_DELAY: Duration = Duration::from_millis(200);

/// A certificate's first retry waits at most this part of its lifetime.
const FIRST_RETRY_LIFETIME_PART: u32 = 20;

/// A retry waits at most this part of what remains until the expiry, so that several are left.
const RETRY_REMAINING_PART: u32 = 4;

/// Renewal comes within this part of the half-life before or after it.
const RENEWAL_SPREAD_PART: u32 = 10;

/// Jitter takes up to this part off the delay of a retry.
const RETRY_SPREAD_PART: u32 = 5;

/// The time within which a certificate is to be renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// The issuance, from which the lifetime counts. It is later than the certificate's own
    /// `notBefore`: see [`Validity::of_issued`].
    pub not_before: Timestamp,
    /// The certificate's `notAfter`, by the caller's clock.
    pub not_after: Timestamp,
}

/// Where in the spread a certificate's renewal falls. To be drawn once per certificate: drawing
/// again at every look would renew at the earliest of many draws.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Jitter(u16);

/// The last of a row of failures to get a certificate. Failed calls count as well as failed
/// installations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failure {
    /// When it failed.
    pub at: Timestamp,
    /// How many tries have failed in a row; zero is taken as one.
    pub attempts: u32,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing before this instant; then ask again.
    Wait(Timestamp),
    /// Renew at once.
    RenewNow,
    /// The last try failed: ask again at this instant, which is before the expiry.
    RetryAt(Timestamp),
    /// The certificate must not be used any more: go on with [`acquire`].
    Expired,
}

impl Validity {
    /// The validity of a certificate of our issuer, from the two times in it. `obtained_at` is when
    /// it was issued to the caller, or read from disk.
    ///
    /// The lifetime counts from the issuance, [`NOT_BEFORE_BACKDATE`] after `not_before`: counted
    /// from `not_before`, the half-life of a short one would lie before its issuance, and it would be
    /// renewed without end. A certificate cannot be obtained before it is issued: if it was, the
    /// caller's clock is behind by at least the difference, and both times are moved back by that, so
    /// that the renewal comes in time by the issuer's clock.
    #[must_use]
    pub fn of_issued(not_before: Timestamp, not_after: Timestamp, obtained_at: Timestamp) -> Self {
        let issued = not_before.saturating_add(NOT_BEFORE_BACKDATE);
        let behind = issued.since(obtained_at);
        Self {
            not_before: issued.saturating_sub(behind),
            not_after: not_after.saturating_sub(behind),
        }
    }

    fn lifetime(self) -> Duration {
        self.not_after.since(self.not_before)
    }
}

impl Jitter {
    /// The earliest renewal.
    pub const MIN: Self = Self(0);

    /// The latest renewal.
    pub const MAX: Self = Self(u16::MAX);

    /// A jitter from a number drawn evenly from all of `u16`.
    #[must_use]
    pub const fn new(drawn: u16) -> Self {
        Self(drawn)
    }

    /// This jitter's share of `spread`: from zero up to all of it.
    fn share_of(self, spread: Duration) -> Duration {
        // The quotient is at most `spread`, so neither step overflows.
        let nanos = spread.as_nanos().saturating_mul(u128::from(self.0)) / u128::from(u16::MAX);
        Duration::from_nanos_u128(nanos.min(Duration::MAX.as_nanos()))
    }
}

/// The next step for a certificate in use: renewal falls at half of its life, up to a tenth of
/// that earlier or later by `jitter`.
///
/// `last_failure` is that of renewing this very certificate; after a success it is `None` again.
#[must_use]
pub fn next(
    validity: Validity,
    now: Timestamp,
    jitter: Jitter,
    last_failure: Option<Failure>,
) -> Step {
    if now >= validity.not_after {
        return Step::Expired;
    }
    let renewal = renewal_at(validity, jitter);
    if now < renewal {
        return Step::Wait(renewal);
    }
    // A failure in the future was noted before the clock was set back: it says nothing.
    let Some(failure) = last_failure.filter(|failure| failure.at <= now) else {
        return Step::RenewNow;
    };
    let remaining = validity.not_after.since(failure.at);
    let first = (validity.lifetime() / FIRST_RETRY_LIFETIME_PART).min(FIRST_RETRY_DELAY);
    let longest = (remaining / RETRY_REMAINING_PART).min(MAX_RETRY_DELAY);
    let retry = failure.at.saturating_add(retry_delay(first, longest, failure.attempts, jitter));
    match retry {
        // Too late for another try: this certificate serves out its last moments.
        retry if retry >= validity.not_after => Step::Wait(validity.not_after),
        retry if retry > now => Step::RetryAt(retry),
        _ => Step::RenewNow,
    }
}

/// The next step for who has no certificate, or an expired one: at once, then with the same
/// retries, which here no expiry shortens. Never [`Step::Wait`] or [`Step::Expired`].
#[must_use]
pub fn acquire(now: Timestamp, jitter: Jitter, last_failure: Option<Failure>) -> Step {
    let Some(failure) = last_failure.filter(|failure| failure.at <= now) else {
        return Step::RenewNow;
    };
    let delay = retry_delay(FIRST_RETRY_DELAY, MAX_RETRY_DELAY, failure.attempts, jitter);
    match failure.at.saturating_add(delay) {
        retry if retry > now => Step::RetryAt(retry),
        _ => Step::RenewNow,
    }
}

fn renewal_at(validity: Validity, jitter: Jitter) -> Timestamp {
    let half_life = validity.lifetime() / 2;
    let spread = half_life / RENEWAL_SPREAD_PART;
    let earliest = half_life.saturating_sub(spread);
    validity.not_before.saturating_add(earliest.saturating_add(jitter.share_of(spread * 2)))
}

fn retry_delay(first: Duration, longest: Duration, attempts: u32, jitter: Jitter) -> Duration {
    let doublings = attempts.saturating_sub(1).min(31);
    let nominal = first.max(MIN_RETRY_DELAY).saturating_mul(1 << doublings).min(longest);
    // Spread downwards, so that neither cap is passed: agents cut off together by one outage do
    // not come back together.
    let delay = nominal.saturating_sub(jitter.share_of(nominal / RETRY_SPREAD_PART));
    delay.max(MIN_RETRY_DELAY)
}
