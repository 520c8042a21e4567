//! Which roots the mesh trusts, from when certificates may be issued under each, and until when each is needed:
//! what the replicas of a control plane agree on, so that a new root takes the place of an old one without a
//! refused connection.
//!
//! A root that is new is trusted first, and issues later: when every certificate in use was issued together
//! with a word of it, so that whoever has one knows the root. A root that issues no more is trusted until
//! what was issued under it has ended.
//!
//! Decides only: no clock, no IO.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::STANDARD};
use hauberk_core::{svid::check_root, time::Timestamp};
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::handover::Handover;
use crate::config::MAX_LIFETIME;

/// Nothing of now is needed for longer: no certificate lives longer than [`MAX_LIFETIME`], and a need is written
/// for a quarter more. The rest is for a clock that is behind by a time zone: it shortens nothing.
const FARTHEST: Duration = MAX_LIFETIME.saturating_mul(2);

/// What is known of the roots cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RootsError {
    #[error("what is known of the roots is damaged")]
    Damaged(#[from] serde_json::Error),
    #[error("root {number} of those that are known is not base64")]
    Encoding { number: usize },
}

/// All that is known of the roots, the oldest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Roots {
    roots: Vec<Trusted>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Trusted {
    /// DER, base64.
    certificate: String,
    /// From then on every agent knows it.
    known_from: Timestamp,
    /// Until then what was issued under it may be in use.
    needed_until: Timestamp,
    /// For replicas that start while another root is not known yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    handover: Option<Handover>,
}

impl Roots {
    pub(crate) fn read(bytes: &[u8]) -> Result<Self, RootsError> {
        let read: Self = serde_json::from_slice(bytes)?;
        for (place, root) in read.roots.iter().enumerate() {
            if root.der().is_none() {
                return Err(RootsError::Encoding { number: place + 1 });
            }
        }
        Ok(read)
    }

    pub(crate) fn write(&self) -> Result<Vec<u8>, RootsError> {
        Ok(serde_json::to_vec(self)?)
    }

    /// Trusts a root, if it is a new one, and knows it to be needed for as long as a certificate of now
    /// `reaches`. Certificates may be issued under a new one when those that are in use now have ended.
    pub(crate) fn need(&mut self, root: &CertificateDer<'_>, now: Timestamp, reaches: Duration) {
        let certificate = STANDARD.encode(root);
        let least = now.saturating_add(reaches);
        match self.roots.iter_mut().find(|known| known.certificate == certificate) {
            // Not at each look: it is a write that all replicas read.
            Some(known) if known.needed_until < least => {
                known.needed_until = least.saturating_add(reaches / 4);
            }
            Some(_) => {}
            None => {
                let in_use = self.roots.iter().map(|known| known.needed_until).max();
                let known_from = in_use.map_or(now, |until| until.max(now));
                let needed_until = known_from.saturating_add(reaches);
                self.roots.push(Trusted { certificate, known_from, needed_until, handover: None });
            }
        }
    }

    /// Trusts a root of which nobody remembers whether agents know it, nor what else they know: it issues when
    /// everything has ended that may be in use now.
    pub(crate) fn start_over(
        &mut self,
        root: &CertificateDer<'_>,
        now: Timestamp,
        reaches: Duration,
    ) {
        let known_from = now.saturating_add(reaches);
        let needed_until = known_from.saturating_add(reaches);
        let certificate = STANDARD.encode(root);
        self.roots.push(Trusted { certificate, known_from, needed_until, handover: None });
    }

    /// Takes back times that only a clock that was far ahead can have written: else one root would wait for
    /// them, and so would each that comes later.
    pub(crate) fn bound(&mut self, now: Timestamp) {
        let mut last = now.saturating_add(FARTHEST);
        for known in &mut self.roots {
            known.known_from = known.known_from.min(last);
            let needed = known.known_from.max(now).saturating_add(FARTHEST);
            known.needed_until = known.needed_until.min(needed);
            last = last.max(known.needed_until);
        }
    }

    /// Forgets a root that nobody wants any more, if nothing was issued under it: it was not to issue until
    /// `surely`, and agents know another one. Without another it is one that was started over with, and may
    /// have issued.
    pub(crate) fn forget(&mut self, root: &CertificateDer<'_>, surely: Timestamp) {
        let certificate = STANDARD.encode(root);
        if self.roots.iter().any(|known| known.known_from <= surely) {
            self.roots
                .retain(|known| known.known_from <= surely || known.certificate != certificate);
        }
    }

    /// Keeps an intermediate under a root for others to go on with. There is one already: that stays.
    pub(crate) fn offer(&mut self, root: &CertificateDer<'_>, handover: Handover) {
        let certificate = STANDARD.encode(root);
        if let Some(known) = self.roots.iter_mut().find(|known| known.certificate == certificate) {
            known.handover.get_or_insert(handover);
        }
    }

    /// Keeps this one in place of another.
    pub(crate) fn replace(&mut self, root: &CertificateDer<'_>, handover: Handover) {
        let certificate = STANDARD.encode(root);
        if let Some(known) = self.roots.iter_mut().find(|known| known.certificate == certificate) {
            known.handover = Some(handover);
        }
    }

    /// Forgets what was handed over.
    pub(crate) fn withdraw(&mut self) {
        for known in &mut self.roots {
            known.handover = None;
        }
    }

    /// Forgets roots that nobody needs any more, but those of `kept`.
    pub(crate) fn retire(&mut self, kept: &[&CertificateDer<'_>], now: Timestamp) {
        let kept: Vec<String> = kept.iter().map(|root| STANDARD.encode(root)).collect();
        self.roots.retain(|known| known.needed_until >= now || kept.contains(&known.certificate));
    }

    /// Whether no root is known at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.roots.is_empty()
    }

    /// Whether there is a root that not every agent knows yet.
    pub(crate) fn is_changing(&self, now: Timestamp) -> bool {
        self.roots.iter().any(|known| known.known_from > now)
    }

    /// From when certificates may be issued under a root; nothing if it is not trusted at all.
    pub(crate) fn known_from(&self, root: &CertificateDer<'_>) -> Option<Timestamp> {
        let certificate = STANDARD.encode(root);
        let known = self.roots.iter().find(|known| known.certificate == certificate);
        known.map(|known| known.known_from)
    }

    /// What was handed over under roots that every agent knows.
    pub(crate) fn handed_over(
        &self,
        now: Timestamp,
    ) -> impl Iterator<Item = (CertificateDer<'static>, &Handover)> {
        let known = self.roots.iter().filter(move |known| known.known_from <= now);
        known.filter_map(|known| Some((known.der()?, known.handover.as_ref()?)))
    }

    /// What agents are to trust: one that has ended would make them refuse all of it.
    pub(crate) fn certificates(&self, now: Timestamp) -> Vec<CertificateDer<'static>> {
        let roots = self.roots.iter().filter_map(Trusted::der);
        roots.filter(|root| check_root(root, now).is_ok()).collect()
    }
}

impl Trusted {
    fn der(&self) -> Option<CertificateDer<'static>> {
        STANDARD.decode(&self.certificate).ok().map(CertificateDer::from)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use super::*;

    const REACH: Duration = Duration::from_secs(100);

    fn at(second: i64) -> Timestamp {
        Timestamp::from_unix_seconds(second)
    }

    fn root(name: u8) -> CertificateDer<'static> {
        CertificateDer::from(vec![name; 4])
    }

    fn handover() -> Handover {
        serde_json::from_str(r#"{"chain": ["AAAA"], "key": "AAAA"}"#).unwrap()
    }

    #[test]
    fn the_first_root_issues_at_once() {
        let mut roots = Roots::default();
        roots.need(&root(1), at(1000), REACH);
        assert_eq!(roots.known_from(&root(1)), Some(at(1000)));
        assert_eq!(roots.known_from(&root(2)), None);
        assert!(!roots.is_changing(at(1000)));
    }

    #[test]
    fn the_next_root_issues_when_what_was_in_use_has_ended_and_no_earlier() {
        let mut roots = Roots::default();
        roots.need(&root(1), at(1000), REACH);
        // A certificate of this second lives on for longer than one of the first.
        roots.need(&root(1), at(1060), REACH);
        roots.need(&root(2), at(1070), REACH);
        let from = roots.known_from(&root(2)).unwrap();
        assert!(from >= at(1060).saturating_add(REACH), "{from}");
        assert!(roots.is_changing(at(1070)));
        assert!(!roots.is_changing(from));
        // Looked at again, it is no newer than it was.
        roots.need(&root(2), at(1090), REACH);
        assert_eq!(roots.known_from(&root(2)), Some(from));
    }

    #[test]
    fn a_mesh_that_has_slept_for_long_takes_a_new_root_at_once() {
        let mut roots = Roots::default();
        roots.need(&root(1), at(1000), REACH);
        roots.need(&root(2), at(5000), REACH);
        assert_eq!(roots.known_from(&root(2)), Some(at(5000)));
    }

    #[test]
    fn a_root_stays_until_what_was_issued_under_it_has_ended() {
        let mut roots = Roots::default();
        roots.need(&root(1), at(1000), REACH);
        roots.need(&root(2), at(1010), REACH);
        let both = roots.clone();
        roots.retire(&[&root(2)], at(1100));
        assert_eq!(roots, both, "the last certificate ends in this second");
        roots.retire(&[&root(2)], at(1101));
        assert_eq!(roots.known_from(&root(1)), None);
        assert!(roots.known_from(&root(2)).is_some());
        // What a replica has or waits for stays, whenever it was needed last.
        roots.retire(&[&root(2)], at(9000));
        assert!(roots.known_from(&root(2)).is_some());
        roots.retire(&[], at(9000));
        assert_eq!(roots, Roots::default());
    }

    #[test]
    fn what_a_clock_far_ahead_has_written_is_taken_back() {
        let year = Duration::from_secs(365 * 24 * 3600);
        let mut roots = Roots::default();
        roots.need(&root(1), at(1000), REACH);
        // By a clock that is a year ahead, of the old root and of a new one.
        roots.need(&root(1), at(1010).saturating_add(year), REACH);
        roots.need(&root(2), at(1010).saturating_add(year), REACH);
        roots.bound(at(1020));
        let bound = at(1020).saturating_add(FARTHEST);
        assert_eq!(roots.known_from(&root(2)), Some(bound));
        roots.need(&root(3), at(1020), REACH);
        assert_eq!(roots.known_from(&root(3)), Some(bound.saturating_add(FARTHEST)));
        // Looked at later, nothing is put off.
        let before = roots.clone();
        roots.bound(at(5000));
        assert_eq!(roots, before);
    }

    #[test]
    fn a_time_that_may_be_right_is_never_shortened() {
        let day = MAX_LIFETIME.as_secs();
        for reach in [100, day / 24, day] {
            let reach = Duration::from_secs(reach);
            let mut roots = Roots::default();
            // Each is new while the one before is, and the need of the first is written anew.
            for number in 0..4 {
                roots.need(&root(number), at(1_000_000 + i64::from(number)), reach);
                let later = at(1_000_010).saturating_add(reach / 8);
                roots.need(&root(0), later, reach);
            }
            let before = roots.clone();
            for clock in [1_000_010, 1_000_010 - 14 * 3600, 2_000_000] {
                roots.bound(at(clock));
                assert_eq!(roots, before, "{reach:?}, looked at by {clock}");
            }
        }
    }

    #[test]
    fn a_root_that_was_never_to_issue_is_forgotten_at_once_and_no_other() {
        let mut roots = Roots::default();
        roots.need(&root(1), at(1000), REACH);
        roots.need(&root(2), at(1010), REACH);
        let both = roots.clone();
        roots.forget(&root(1), at(1010));
        roots.forget(&root(3), at(1010));
        assert_eq!(roots, both);
        let from = roots.known_from(&root(2)).unwrap();
        roots.forget(&root(2), from);
        assert_eq!(roots, both, "somebody may have issued under it");
        roots.forget(&root(2), at(1010));
        assert_eq!(roots.known_from(&root(2)), None);
        assert!(!roots.is_changing(at(1010)));
        // The next one does not wait for it.
        roots.need(&root(3), at(1020), REACH);
        assert_eq!(roots.known_from(&root(3)), Some(from));
    }

    #[test]
    fn a_root_that_was_started_over_with_waits_and_is_not_forgotten() {
        let mut roots = Roots::default();
        roots.start_over(&root(1), at(1000), REACH);
        roots.need(&root(1), at(1000), REACH);
        assert_eq!(roots.known_from(&root(1)), Some(at(1000).saturating_add(REACH)));
        // What was issued before everything was forgotten may have been issued under it.
        roots.forget(&root(1), at(1010));
        roots.need(&root(2), at(1010), REACH);
        let from = roots.known_from(&root(2)).unwrap();
        assert!(from >= at(1010).saturating_add(REACH), "{from}");
    }

    #[test]
    fn a_need_is_written_now_and_then_and_always_reaches_far_enough() {
        let mut roots = Roots::default();
        let mut writes = 0;
        for second in 1000..1400 {
            let before = roots.clone();
            roots.need(&root(1), at(second), REACH);
            writes += usize::from(roots != before);
            let mut later = roots.clone();
            later.retire(&[], at(second).saturating_add(REACH));
            assert_eq!(later, roots, "second {second}");
        }
        assert!(writes < 20, "{writes} writes");
    }

    #[test]
    fn what_was_handed_over_is_there_until_it_is_replaced_or_withdrawn() {
        let mut roots = Roots::default();
        roots.need(&root(1), at(1000), REACH);
        roots.need(&root(2), at(1010), REACH);
        roots.offer(&root(1), handover());
        let kept = [&root(1), &root(2)];
        roots.retire(&kept, at(1020));
        let handed: Vec<_> = roots.handed_over(at(1020)).map(|(root, _)| root).collect();
        assert_eq!(handed, [root(1)]);
        let other: Handover =
            serde_json::from_str(r#"{"chain": ["BBBB"], "key": "AAAA"}"#).unwrap();
        roots.offer(&root(1), other.clone());
        assert!(roots.handed_over(at(1020)).all(|(_, kept)| *kept == handover()));
        roots.replace(&root(1), other.clone());
        assert!(roots.handed_over(at(1020)).all(|(_, kept)| *kept == other));
        roots.withdraw();
        assert_eq!(roots.handed_over(at(1020)).count(), 0);
    }

    #[test]
    fn what_is_written_is_read_and_what_is_damaged_is_refused() {
        let mut roots = Roots::default();
        roots.need(&root(1), at(1000), REACH);
        roots.offer(&root(1), handover());
        let bytes = roots.write().unwrap();
        assert_eq!(Roots::read(&bytes).unwrap(), roots);
        assert!(!format!("{roots:?}").contains("chain"), "a key is shown: {roots:?}");
        let text = String::from_utf8(bytes).unwrap();
        for damaged in [
            String::new(),
            text.replace("known_from", "known_since"),
            text.replace(&STANDARD.encode(root(1)), "not base64!"),
        ] {
            assert!(Roots::read(damaged.as_bytes()).is_err(), "{damaged}");
        }
    }
}
