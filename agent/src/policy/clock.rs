//! The skew between this node's clock and the control plane's: measured while the stream is open, and reported.

use std::time::{Duration, Instant};

use anyhow::Context;
use hauberk_core::{
    clock::{ClockSkew, SkewVerdict},
    time::Timestamp,
};
use hauberk_proto::v1::{self, state_client::StateClient};
use hauberk_telemetry::metrics::AgentMetrics;
use tonic::transport::Channel;

use crate::capture::StatusBoard;

/// How often the control plane is asked for its time.
const MEASURE_INTERVAL: Duration = Duration::from_secs(10);

/// An answer that takes longer says too little: it may be off by half of that.
const MEASURE_TIMEOUT: Duration = Duration::from_secs(10);

/// Measures until it is dropped.
pub(super) async fn watch(channel: Channel, board: StatusBoard, metrics: AgentMetrics) {
    let mut client = StateClient::new(channel);
    let mut told = SkewVerdict::Tolerated;
    loop {
        match measure(&mut client).await {
            Ok(skew) => {
                metrics.set_clock_skew(skew.millis());
                board.set_clock_skew(skew);
                if told != skew.verdict() {
                    told = skew.verdict();
                    tell(skew);
                }
            }
            // The stream tells of a control plane that is away.
            Err(error) => tracing::debug!(error = format!("{error:#}"), "no time was told"),
        }
        tokio::time::sleep(MEASURE_INTERVAL).await;
    }
}

async fn measure(client: &mut StateClient<Channel>) -> anyhow::Result<ClockSkew> {
    let (asked_at, begun) = (hauberk_tls::now(), Instant::now());
    let answer = tokio::time::timeout(MEASURE_TIMEOUT, client.get_time(v1::GetTimeRequest {}))
        .await
        .context("the control plane does not tell its time")?
        .map_err(|status| anyhow::anyhow!("{}", status.message()))?;
    let round_trip = begun.elapsed();
    // This task may not have run in time to see that.
    anyhow::ensure!(round_trip <= MEASURE_TIMEOUT, "the answer took {round_trip:?}");
    let answer = Timestamp::from_unix_millis(answer.into_inner().now_unix_ms);
    Ok(ClockSkew::measured(asked_at, round_trip, answer))
}

fn tell(skew: ClockSkew) {
    let clock_skew_ms = skew.millis();
    match skew.verdict() {
        SkewVerdict::Tolerated => {
            tracing::info!(
                clock_skew_ms,
                "this node's clock agrees with the control plane's again"
            );
        }
        SkewVerdict::Reported => tracing::warn!(
            clock_skew_ms,
            "this node's clock is {skew} the control plane's; set the one that is wrong"
        ),
        SkewVerdict::RefusesFreshCertificates => tracing::error!(
            clock_skew_ms,
            "this node's clock is {skew} the control plane's, so far that new certificates are refused here; set \
             the one that is wrong"
        ),
    }
}
