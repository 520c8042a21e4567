//! The renewal schedule: when it acts, and that it neither sleeps through an expiry nor spins.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::time::Duration;

use hauberk_core::clock::NOT_BEFORE_BACKDATE;
use hauberk_core::rotation::{
    Failure, Jitter, MAX_RETRY_DELAY, MIN_RETRY_DELAY, Step, Validity, acquire, next,
};
use hauberk_core::time::Timestamp;
use proptest::prelude::*;

const MIDDLE: Jitter = Jitter::new(u16::MAX / 2);

fn at(millis: i64) -> Timestamp {
    Timestamp::from_unix_millis(millis)
}

fn lifetime(millis: i64) -> Validity {
    Validity { not_before: at(0), not_after: at(millis) }
}

fn failure(millis: i64, attempts: u32) -> Option<Failure> {
    Some(Failure { at: at(millis), attempts })
}

const HOUR: i64 = 3_600_000;

#[test]
fn renewal_comes_at_half_life_give_or_take_a_tenth_of_it() {
    let cases = [
        ("an hour, earliest", HOUR, Jitter::MIN, 1_620_000),
        ("an hour, latest", HOUR, Jitter::MAX, 1_980_000),
        ("ten seconds, earliest", 10_000, Jitter::MIN, 4_500),
        ("ten seconds, latest", 10_000, Jitter::MAX, 5_500),
        ("a millisecond", 1, Jitter::MAX, 0),
    ];
    for (name, life, jitter, renewal) in cases {
        let before = at(renewal - 1);
        assert_eq!(next(lifetime(life), before, jitter, None), Step::Wait(at(renewal)), "{name}");
        assert_eq!(next(lifetime(life), at(renewal), jitter, None), Step::RenewNow, "{name}");
    }
}

#[test]
fn a_certificate_at_its_not_after_is_expired_whatever_failed_before() {
    for last_failure in [None, failure(HOUR - 1, 3), failure(HOUR + 5, 1)] {
        assert_eq!(next(lifetime(HOUR), at(HOUR), MIDDLE, last_failure), Step::Expired);
    }
    assert_eq!(next(lifetime(HOUR), at(HOUR - 1), MIDDLE, None), Step::RenewNow);
}

#[test]
fn a_validity_that_ends_before_it_begins_is_expired() {
    let backwards = Validity { not_before: at(10), not_after: at(5) };
    assert_eq!(next(backwards, at(7), MIDDLE, None), Step::Expired);
}

#[test]
fn retries_double_from_a_second_up_to_a_minute() {
    let failed_at = 2_000_000;
    let cases = [(0, 1), (1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (8, 60), (u32::MAX, 60)];
    for (attempts, seconds) in cases {
        let step = next(lifetime(HOUR), at(failed_at), Jitter::MIN, failure(failed_at, attempts));
        let retry = at(failed_at + seconds * 1_000);
        assert_eq!(step, Step::RetryAt(retry), "{attempts} attempts");
        let step = next(lifetime(HOUR), retry, Jitter::MIN, failure(failed_at, attempts));
        assert_eq!(step, Step::RenewNow, "{attempts} attempts");
    }
}

#[test]
fn jitter_takes_up_to_a_fifth_off_a_retry() {
    let step = next(lifetime(HOUR), at(2_000_000), Jitter::MAX, failure(2_000_000, 7));
    assert_eq!(step, Step::RetryAt(at(2_048_000)));
}

#[test]
fn a_short_lived_certificate_retries_within_a_twentieth_of_its_life() {
    let step = next(lifetime(10_000), at(5_600), Jitter::MIN, failure(5_600, 1));
    assert_eq!(step, Step::RetryAt(at(6_100)));
    let step = next(lifetime(2_000), at(1_150), Jitter::MIN, failure(1_150, 1));
    assert_eq!(step, Step::RetryAt(at(1_350)), "the floor is 200 ms");
}

#[test]
fn a_retry_waits_at_most_a_quarter_of_what_remains() {
    let failed_at = HOUR - 40_000;
    let step = next(lifetime(HOUR), at(failed_at), Jitter::MIN, failure(failed_at, 10));
    assert_eq!(step, Step::RetryAt(at(failed_at + 10_000)));
}

#[test]
fn without_time_for_another_try_the_certificate_serves_until_it_expires() {
    let failed_at = HOUR - 200;
    let step = next(lifetime(HOUR), at(failed_at), Jitter::MIN, failure(failed_at, 10));
    assert_eq!(step, Step::Wait(at(HOUR)));
}

#[test]
fn a_failure_noted_before_the_clock_was_set_back_does_not_hold_renewal_up() {
    let step = next(lifetime(HOUR), at(2_000_000), MIDDLE, failure(3_000_000, 4));
    assert_eq!(step, Step::RenewNow);
    assert_eq!(acquire(at(2_000_000), MIDDLE, failure(3_000_000, 4)), Step::RenewNow);
}

#[test]
fn a_backdated_certificate_is_not_renewed_as_soon_as_it_is_obtained() {
    // Issued at 120 s for 10 s, with notBefore 120 s earlier, and obtained a moment later.
    let validity = Validity::of_issued(at(0), at(130_000), at(120_300));
    assert_eq!(next(validity, at(120_300), Jitter::MIN, None), Step::Wait(at(124_500)));
    // Read from disk when its time has come.
    let validity = Validity::of_issued(at(0), at(130_000), at(126_000));
    assert_eq!(next(validity, at(126_000), Jitter::MIN, None), Step::RenewNow);
}

#[test]
fn by_a_clock_that_is_behind_renewal_comes_in_time_all_the_same() {
    // Issued at 120 s for 10 s; the caller's clock says 30 s.
    let validity = Validity::of_issued(at(0), at(130_000), at(30_000));
    assert_eq!(next(validity, at(30_000), Jitter::MIN, None), Step::Wait(at(34_500)));
    assert_eq!(next(validity, at(40_000), Jitter::MIN, None), Step::Expired);
}

#[test]
fn without_a_certificate_the_first_try_is_at_once_and_retries_double_up_to_a_minute() {
    assert_eq!(acquire(at(0), MIDDLE, None), Step::RenewNow);
    for (attempts, seconds) in [(1, 1), (2, 2), (7, 60), (u32::MAX, 60)] {
        let retry = at(seconds * 1_000);
        let last = failure(0, attempts);
        assert_eq!(acquire(at(0), Jitter::MIN, last), Step::RetryAt(retry));
        assert_eq!(acquire(retry, Jitter::MIN, last), Step::RenewNow);
    }
}

/// Lifetimes from a millisecond to some 35 years, with the short ones as likely as the long.
fn any_validity() -> impl Strategy<Value = Validity> {
    (0_i64..4_000_000_000_000, 0_u32..40, 1_i64..1_000).prop_map(|(not_before, power, factor)| {
        let not_after = not_before.saturating_add(factor << (power.min(30)));
        Validity { not_before: at(not_before), not_after: at(not_after) }
    })
}

fn any_jitter() -> impl Strategy<Value = Jitter> {
    any::<u16>().prop_map(Jitter::new)
}

fn within(validity: Validity, part: u16) -> Timestamp {
    let life = validity.not_after.since(validity.not_before);
    validity.not_before.saturating_add(life.mul_f64(f64::from(part) / f64::from(u16::MAX)))
}

proptest! {
    #[test]
    fn renewal_comes_strictly_before_expiry(validity in any_validity(), jitter in any_jitter()) {
        match next(validity, validity.not_before, jitter, None) {
            Step::Wait(renewal) => {
                prop_assert!(renewal > validity.not_before && renewal < validity.not_after);
                prop_assert_eq!(next(validity, renewal, jitter, None), Step::RenewNow);
            }
            Step::RenewNow => prop_assert!(validity.not_before < validity.not_after),
            step => prop_assert!(false, "{step:?}"),
        }
    }

    #[test]
    fn renewal_is_monotone_in_time(
        validity in any_validity(), jitter in any_jitter(), a in any::<u16>(), b in any::<u16>(),
    ) {
        let rank = |step| match step {
            Step::Wait(_) => 0,
            Step::RenewNow => 1,
            Step::Expired => 2,
            Step::RetryAt(_) => unreachable!("nothing has failed"),
        };
        let (early, late) = (within(validity, a.min(b)), within(validity, a.max(b)));
        prop_assert!(
            rank(next(validity, early, jitter, None)) <= rank(next(validity, late, jitter, None))
        );
    }

    #[test]
    fn more_jitter_never_renews_earlier(
        validity in any_validity(), a in any::<u16>(), b in any::<u16>(),
    ) {
        let renewal = |drawn| match next(validity, validity.not_before, Jitter::new(drawn), None) {
            Step::Wait(renewal) => renewal,
            _ => validity.not_before,
        };
        prop_assert!(renewal(a.min(b)) <= renewal(a.max(b)));
    }

    #[test]
    fn a_retry_is_in_the_future_and_before_the_expiry_and_at_most_a_minute_away(
        validity in any_validity(), jitter in any_jitter(),
        now in any::<u16>(), failed in any::<u16>(), attempts in any::<u32>(),
    ) {
        let (now, failed_at) = (within(validity, now), within(validity, failed));
        let last_failure = Some(Failure { at: failed_at, attempts });
        if let Step::RetryAt(retry) = next(validity, now, jitter, last_failure) {
            prop_assert!(now < retry && retry < validity.not_after);
            prop_assert!(retry.since(failed_at) >= MIN_RETRY_DELAY);
            prop_assert!(retry.since(failed_at) <= MAX_RETRY_DELAY);
        }
    }

    #[test]
    fn a_renewal_that_always_fails_is_tried_until_the_expiry_and_never_in_a_busy_loop(
        validity in any_validity(), jitter in any_jitter(),
    ) {
        // Only the last quarter of an hour: retries are a minute apart before that.
        let start = validity.not_before.max(validity.not_after.saturating_sub(Duration::from_secs(900)));
        let (mut now, mut last_failure, mut tries) = (start, None, Vec::new());
        for _ in 0..1_000 {
            match next(validity, now, jitter, last_failure) {
                Step::Wait(until) | Step::RetryAt(until) => {
                    prop_assert!(until > now, "the clock must move on");
                    now = until;
                }
                Step::RenewNow => {
                    tries.push(now);
                    let attempts = u32::try_from(tries.len()).unwrap();
                    last_failure = Some(Failure { at: now, attempts });
                }
                Step::Expired => break,
            }
        }
        prop_assert_eq!(next(validity, now, jitter, last_failure), Step::Expired);
        prop_assert!(!tries.is_empty());
        prop_assert!(tries.windows(2).all(|pair| pair[1].since(pair[0]) >= MIN_RETRY_DELAY));
        // The last try is not long before the expiry: nobody has given up early.
        let unused = validity.not_after.since(*tries.last().unwrap());
        let life = validity.not_after.since(validity.not_before);
        prop_assert!(unused <= Duration::from_millis(300).max(life));
        if life > Duration::from_secs(10) {
            prop_assert!(unused <= Duration::from_secs(1), "{unused:?} of {life:?}");
        }
    }

    #[test]
    fn a_fresh_certificate_is_never_renewed_at_once(
        validity in any_validity(), jitter in any_jitter(), behind in 0_u64..1_000_000,
    ) {
        let behind = Duration::from_millis(behind);
        let life = validity.not_after.since(validity.not_before);
        let dated = validity.not_before.saturating_sub(NOT_BEFORE_BACKDATE);
        // By a clock that is right or behind, by however much.
        let obtained_at = validity.not_before.saturating_sub(behind);
        let issued = Validity::of_issued(dated, validity.not_after, obtained_at);
        if life >= Duration::from_millis(10) {
            let Step::Wait(renewal) = next(issued, obtained_at, jitter, None) else {
                return Err(TestCaseError::fail("renewed at once"));
            };
            prop_assert!(renewal.since(obtained_at) >= life * 2 / 5);
            prop_assert!(renewal.since(obtained_at) <= life * 3 / 5);
        }
    }

    #[test]
    fn acquiring_never_waits_longer_than_a_minute_and_never_spins(
        now in any::<i32>(), ago in 0_i64..200_000, attempts in any::<u32>(), jitter in any_jitter(),
    ) {
        let now = at(i64::from(now));
        let failed_at = now.saturating_sub(Duration::from_millis(ago.unsigned_abs()));
        match acquire(now, jitter, Some(Failure { at: failed_at, attempts })) {
            Step::RetryAt(retry) => {
                prop_assert!(retry > now && retry.since(failed_at) <= MAX_RETRY_DELAY);
            }
            Step::RenewNow => prop_assert!(now.since(failed_at) >= MIN_RETRY_DELAY),
            step => prop_assert!(false, "{step:?}"),
        }
    }
}
