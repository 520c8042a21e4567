//! Named checks that say whether this process is ready, set from wherever the truth is known.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use tokio::sync::watch;

/// Reason of a check that was declared and not yet set.
const STARTING: &str = "starting";

/// State of one check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// The checked part does its work.
    Ready,
    /// It does, and this sentence says what somebody should see to all the same.
    ReadyBut(String),
    /// It does not, and this sentence says why.
    NotReady(String),
}

/// All checks of a process by name. Clones share the same checks.
#[derive(Clone, Debug)]
pub struct Health {
    checks: Arc<watch::Sender<BTreeMap<&'static str, State>>>,
}

impl Health {
    /// Declares checks. Each is not ready until it is set, so that a part that was never started
    /// cannot pass for a healthy one. A process without any check is never ready.
    #[must_use]
    pub fn new(names: &[&'static str]) -> Self {
        let starting = || State::NotReady(STARTING.to_owned());
        let checks = names.iter().map(|name| (*name, starting())).collect();
        Self { checks: Arc::new(watch::Sender::new(checks)) }
    }

    /// Sets a check; a name that was not declared is added.
    pub fn set(&self, name: &'static str, state: State) {
        self.checks.send_if_modified(|checks| {
            let changed = checks.get(name) != Some(&state);
            if changed {
                checks.insert(name, state);
            }
            changed
        });
    }

    /// Whether there are checks and all of them are ready.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        all_ready(&self.checks.borrow())
    }

    /// The checks now, by name.
    #[must_use]
    pub fn checks(&self) -> BTreeMap<&'static str, State> {
        self.checks.borrow().clone()
    }

    /// Follows the checks.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<BTreeMap<&'static str, State>> {
        self.checks.subscribe()
    }

    /// Waits until every check is ready.
    pub async fn ready(&self) {
        let mut changes = self.checks.subscribe();
        // The sender lives in `self`, so that waiting cannot fail while this is borrowed.
        if changes.wait_for(all_ready).await.is_err() {
            tracing::debug!("health checks are gone");
        }
    }

    /// One line a check, `name: ready`, `name: ready, but: reason` or `name: not ready: reason`.
    pub(crate) fn report(&self) -> String {
        let mut text = String::new();
        for (name, state) in self.checks.borrow().iter() {
            let written = match state {
                State::Ready => writeln!(text, "{name}: ready"),
                State::ReadyBut(reason) => writeln!(text, "{name}: ready, but: {reason}"),
                State::NotReady(reason) => writeln!(text, "{name}: not ready: {reason}"),
            };
            debug_assert!(written.is_ok(), "writing to a string cannot fail");
        }
        if text.is_empty() {
            text.push_str("no check is registered\n");
        }
        text
    }
}

fn all_ready(checks: &BTreeMap<&'static str, State>) -> bool {
    let ready = |state: &State| match state {
        State::Ready | State::ReadyBut(_) => true,
        State::NotReady(_) => false,
    };
    !checks.is_empty() && checks.values().all(ready)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_declared_check_is_not_ready_until_it_is_set() {
        let health = Health::new(&["control_plane", "policy"]);
        assert!(!health.is_ready());
        health.set("control_plane", State::Ready);
        assert!(!health.is_ready());
        assert_eq!(health.report(), "control_plane: ready\npolicy: not ready: starting\n");
        health.set("policy", State::Ready);
        assert!(health.is_ready());
    }

    #[test]
    fn what_somebody_should_see_to_is_told_and_takes_nothing_out_of_service() {
        let health = Health::new(&["certificate_authority"]);
        health.set("certificate_authority", State::ReadyBut("it ends soon".to_owned()));
        assert!(health.is_ready());
        assert_eq!(health.report(), "certificate_authority: ready, but: it ends soon\n");
    }

    #[test]
    fn a_process_without_checks_is_not_ready() {
        assert!(!Health::new(&[]).is_ready());
    }

    #[tokio::test]
    async fn waiting_ends_when_the_last_check_turns_ready() {
        let health = Health::new(&["policy"]);
        let waiter = tokio::spawn({
            let health = health.clone();
            async move { health.ready().await }
        });
        health.set("policy", State::Ready);
        waiter.await.unwrap();
    }
}
