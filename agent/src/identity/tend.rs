//! The node certificate is kept young, or got back, by one agent of the node at a time.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use hauberk_core::rotation::{self, Failure, Step};
use hauberk_telemetry::{Health, State as HealthState, metrics::AgentMetrics};
use tokio::sync::Mutex;

use super::{
    Node,
    node::Standing,
    rotate::{draw_jitter, system_time},
};
use crate::handover::Replaced;

/// The health check of the node certificate.
pub(crate) const NODE_CHECK: &str = "node_certificate";

/// How often a replaced agent looks for the node certificate that the next one has got, and an agent without one
/// whether somebody has joined for it, or its clock is right by now.
const LOOK: Duration = Duration::from_secs(1);

/// Wall-clock jumps are noticed at this pace.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);

/// How often it is told what is wrong, while it is.
const TELL_AGAIN: Duration = Duration::from_secs(30);

/// Keeps the node certificate young, or uses another agent's while that one does so. Two that each renewed
/// their own would pass for a node and a stolen copy of it.
pub(crate) async fn tend_or_follow(
    node: Arc<Mutex<Node>>,
    health: Health,
    metrics: AgentMetrics,
    replaced: Replaced,
) {
    loop {
        let mut tended = node.lock().await;
        tokio::select! {
            () = tend(&mut tended, &health, &metrics) => {}
            () = replaced.wait_set() => {}
        }
        drop(tended);
        while replaced.is_set() {
            if node.lock().await.reload() {
                tracing::debug!("uses the next agent's node certificate");
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = replaced.wait_clear() => {}
            }
        }
    }
}

/// Until there is a node certificate that can be used: for an agent that is to take the place of another one, and
/// leaves the certificate that both have to that one.
pub(crate) async fn regain_beside(node: &mut Node, health: &Health) {
    if !node.is_usable() {
        regain(node, health, false).await;
    }
}

/// Keeps the node certificate young, and gets another one if it cannot be used.
async fn tend(node: &mut Node, health: &Health, metrics: &AgentMetrics) {
    let mut jitter = draw_jitter();
    let mut failure: Option<Failure> = None;
    let mut due = node.proves_itself_first();
    loop {
        let validity = match node.standing() {
            Standing::Usable(validity) => *validity,
            Standing::Unusable(_) => {
                regain(node, health, true).await;
                (jitter, failure, due) = (draw_jitter(), None, false);
                continue;
            }
        };
        health.set(NODE_CHECK, HealthState::Ready);
        if let Some(end) = node.trust.load().first_expiry() {
            metrics.set_trust_root_expiry(system_time(end));
        }
        let now = hauberk_tls::now();
        let step = match rotation::next(validity, now, jitter, failure) {
            Step::Wait(_) if due => Step::RenewNow,
            step => step,
        };
        due = false;
        match step {
            Step::Wait(until) | Step::RetryAt(until) => {
                let pause = until.since(now).max(Duration::from_millis(20)).min(LONGEST_SLEEP);
                tokio::time::sleep(pause).await;
            }
            Step::Expired => node.lapse(),
            Step::RenewNow => match node.renew().await {
                Ok(()) => {
                    failure = None;
                    jitter = draw_jitter();
                    tracing::info!(node = node.name, "the node certificate was renewed");
                }
                Err(error) => {
                    let attempts = failure.map_or(1, |f| f.attempts.saturating_add(1));
                    failure = Some(Failure { at: hauberk_tls::now(), attempts });
                    tracing::warn!(
                        attempts,
                        error = format!("{error:#}"),
                        "the node certificate could not be renewed"
                    );
                }
            },
        }
    }
}

/// Until the node has a certificate that it can use. What is enforced stands meanwhile.
async fn regain(node: &mut Node, health: &Health, sole: bool) {
    let jitter = draw_jitter();
    let mut failure: Option<Failure> = None;
    let mut last = String::new();
    let mut told: Option<Instant> = None;
    while !node.is_usable() {
        tell(node, health, &last, &mut told);
        if rotation::acquire(hauberk_tls::now(), jitter, failure) == Step::RenewNow {
            match node.regain(sole).await {
                Ok(true) if node.is_usable() => break,
                Ok(_) => (failure, last) = (None, String::new()),
                Err(error) => {
                    let attempts = failure.map_or(1, |f| f.attempts.saturating_add(1));
                    failure = Some(Failure { at: hauberk_tls::now(), attempts });
                    let error = format!("{error:#}");
                    if last != error {
                        told = None;
                    }
                    last = error;
                }
            }
            tell(node, health, &last, &mut told);
        }
        tokio::time::sleep(LOOK).await;
        node.reload();
    }
    tracing::info!(node = node.name, "the node has a certificate that it can use");
}

/// Says what is wrong: at once where it is asked for, and now and then in the log.
fn tell(node: &Node, health: &Health, last: &str, told: &mut Option<Instant>) {
    let Some(trouble) = node.trouble(hauberk_tls::now()) else { return };
    let text = match last {
        "" => trouble.to_string(),
        last => format!("{trouble}; the last try: {last}"),
    };
    if told.is_none_or(|at| at.elapsed() >= TELL_AGAIN) {
        *told = Some(Instant::now());
        tracing::error!("{text}");
    }
    health.set(NODE_CHECK, HealthState::NotReady(text));
}
