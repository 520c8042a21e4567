//! The node certificate is kept young, by one agent of the node at a time.

use std::{sync::Arc, time::Duration};

use hauberk_core::rotation::{self, Failure, Step};
use hauberk_telemetry::{Health, State as HealthState, metrics::AgentMetrics};
use tokio::sync::{Mutex, watch};

use super::{
    Node,
    node::renew_node,
    rotate::{draw_jitter, system_time},
};
use crate::handover::Replaced;

/// The health check of the node certificate.
pub(crate) const NODE_CHECK: &str = "node_certificate";

/// How often a replaced agent looks for the node certificate that the next one has got.
const FOLLOW: Duration = Duration::from_secs(1);

/// Wall-clock jumps are noticed at this pace.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);

/// Between two tries to attest a node whose certificate has ended.
const ATTEST_PAUSE: Duration = Duration::from_secs(5);

/// Keeps the node certificate young, or uses another agent's while that one does so. Two that each renewed
/// their own would pass for a node and a stolen copy of it.
pub(crate) async fn tend_or_follow(
    node: Arc<Mutex<Node>>,
    health: Health,
    metrics: AgentMetrics,
    renewed: watch::Sender<u64>,
    replaced: Replaced,
) {
    loop {
        let mut tended = node.lock().await;
        tokio::select! {
            () = tend_node(&mut tended, &health, &metrics, &renewed) => {}
            () = replaced.wait_set() => {}
        }
        drop(tended);
        while replaced.is_set() {
            let reloaded = node.lock().await.reload();
            match reloaded {
                Ok(false) => {}
                Ok(true) => renewed.send_modify(|count| *count += 1),
                Err(error) => {
                    let error = format!("{error:#}");
                    tracing::debug!(error, "the next agent's node certificate");
                }
            }
            tokio::select! {
                () = tokio::time::sleep(FOLLOW) => {}
                () = replaced.wait_clear() => {}
            }
        }
    }
}

/// Keeps the node certificate young.
async fn tend_node(
    node: &mut Node,
    health: &Health,
    metrics: &AgentMetrics,
    renewed: &watch::Sender<u64>,
) {
    let mut jitter = draw_jitter();
    let mut failure: Option<Failure> = None;
    health.set(NODE_CHECK, HealthState::Ready);
    loop {
        if let Some(end) = node.trust.load().first_expiry() {
            metrics.set_trust_root_expiry(system_time(end));
        }
        let now = hauberk_tls::now();
        match rotation::next(node.validity, now, jitter, failure) {
            Step::Wait(until) | Step::RetryAt(until) => {
                let pause = until.since(now).max(Duration::from_millis(20)).min(LONGEST_SLEEP);
                tokio::time::sleep(pause).await;
            }
            // A pod's token needs no certificate to get one.
            Step::Expired if node.attests_itself() => {
                health.set(
                    NODE_CHECK,
                    HealthState::NotReady("the node certificate has expired".to_owned()),
                );
                match renew_node(node).await {
                    Ok(()) => {
                        failure = None;
                        renewed.send_modify(|count| *count += 1);
                        health.set(NODE_CHECK, HealthState::Ready);
                        tracing::info!(node = node.name, "the node was attested anew");
                    }
                    Err(error) => {
                        tracing::error!(
                            error = format!("{error:#}"),
                            "the node certificate has expired"
                        );
                        tokio::time::sleep(ATTEST_PAUSE).await;
                    }
                }
            }
            Step::Expired => {
                let text = "the node certificate has expired: join anew with a new token \
                            (`hauberk token create` on the control plane)";
                tracing::error!("{text}");
                health.set(NODE_CHECK, HealthState::NotReady(text.to_owned()));
                tokio::time::sleep(LONGEST_SLEEP).await;
            }
            Step::RenewNow => match renew_node(node).await {
                Ok(()) => {
                    failure = None;
                    jitter = draw_jitter();
                    renewed.send_modify(|count| *count += 1);
                    health.set(NODE_CHECK, HealthState::Ready);
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
