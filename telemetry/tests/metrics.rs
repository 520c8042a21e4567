//! Names, help texts and labels, which dashboards and alerts are built on.

use std::time::{Duration, UNIX_EPOCH};

use hauberk_telemetry::metrics::{
    Direction, OVERFLOW, Outcome, RenewalStep, Review, WorkloadLabels,
};
use hauberk_telemetry::{AgentMetrics, ControlPlaneMetrics, Decision, EdgeLabels, Side};
use prometheus::{Registry, TextEncoder};

const CHECKOUT: WorkloadLabels<'static> = WorkloadLabels { namespace: "shop", name: "checkout" };
const LEDGER: WorkloadLabels<'static> = WorkloadLabels { namespace: "payments", name: "ledger" };

fn edge(decision: Decision, reason: &'static str, dst_port: u16) -> EdgeLabels<'static> {
    EdgeLabels {
        direction: Direction::Inbound,
        decision,
        reason,
        src: CHECKOUT,
        dst: LEDGER,
        dst_port,
        policy: "payments/ledger",
    }
}

fn exposition(registry: &Registry) -> String {
    TextEncoder::new().encode_to_string(&registry.gather()).unwrap()
}

#[test]
fn the_agents_metrics_are_these() {
    let metrics = AgentMetrics::new().unwrap();
    let allowed = metrics.edge(&edge(Decision::Allow, "", 5432));
    allowed.count_connection();
    allowed.add_sent(1_000);
    allowed.add_received(2_000);
    metrics.edge(&edge(Decision::Deny, "no_matching_rule", 5433)).count_connection();
    metrics.edge(&edge(Decision::WouldDeny, "no_policy", 5434)).count_connection();
    metrics.connection_terminated("policy_revoked", CHECKOUT, LEDGER);
    metrics.connection_captured(Direction::Outbound);
    let _open = metrics.connection_opened(Direction::Inbound);
    metrics.observe_open(Direction::Inbound, Duration::from_micros(700));
    metrics.observe_handshake(Side::Source, Outcome::Success, Duration::from_millis(3));
    metrics.set_certificate_expiry(LEDGER, UNIX_EPOCH + Duration::from_secs(1_800_000_000));
    metrics.certificate_renewal(RenewalStep::Call, Outcome::Success);
    metrics.set_trust_root_expiry(UNIX_EPOCH + Duration::from_secs(1_900_000_000));
    let now = UNIX_EPOCH + Duration::from_secs(1_795_000_000);
    metrics.policy_enforced(42, now, Duration::from_millis(250));
    metrics.policy_refused();
    metrics.control_plane_connected();
    metrics.set_clock_skew(-90_250);
    metrics.set_workloads(12, 3);
    metrics.records_lost().inc_by(0);
    insta::assert_snapshot!(exposition(metrics.registry()));
}

#[test]
fn the_control_planes_metrics_are_these() {
    let metrics = ControlPlaneMetrics::new().unwrap();
    metrics.certificate_issued("workload", Outcome::Success);
    metrics.set_agents_connected(41);
    metrics.set_state_revision(42);
    metrics.manifests_read(0, UNIX_EPOCH + Duration::from_secs(1_795_000_000));
    metrics.manifests_read(1, UNIX_EPOCH + Duration::from_secs(1_795_000_060));
    metrics.join_attempt(Outcome::Failure);
    metrics.admission_review(Review::Warned);
    metrics.set_ca_expiry("root", UNIX_EPOCH + Duration::from_secs(1_900_000_000));
    insta::assert_snapshot!(exposition(metrics.registry()));
}

#[test]
fn a_new_agent_exposes_the_series_that_alerts_need() {
    let page = exposition(AgentMetrics::new().unwrap().registry());
    for line in [
        "hauberk_records_lost_total 0",
        "hauberk_control_plane_connected 0",
        "hauberk_certificate_renewals_total{kind=\"call\",result=\"failure\"} 0",
        "hauberk_policy_updates_total{result=\"failure\"} 0",
    ] {
        assert!(page.lines().any(|found| found == line), "{line} is not in\n{page}");
    }
}

#[test]
fn a_port_scan_ends_in_the_overflow_series_with_its_reason() {
    let metrics = AgentMetrics::with_series_cap(100).unwrap();
    for port in 1..=1_000 {
        metrics.edge(&edge(Decision::Deny, "no_matching_rule", port)).count_connection();
    }
    let page = exposition(metrics.registry());
    let series: Vec<&str> =
        page.lines().filter(|line| line.starts_with("hauberk_connections_denied_total{")).collect();
    assert_eq!(series.len(), 101);
    let overflow = format!(
        "hauberk_connections_denied_total{{direction=\"inbound\",decision=\"deny\",\
         reason=\"no_matching_rule\",src_namespace=\"{OVERFLOW}\",src_workload=\"{OVERFLOW}\",\
         dst_namespace=\"{OVERFLOW}\",dst_workload=\"{OVERFLOW}\",dst_port=\"{OVERFLOW}\",\
         policy=\"{OVERFLOW}\"}} 900"
    );
    assert!(series.contains(&overflow.as_str()), "{series:#?}");
}

#[test]
fn a_forgotten_workload_is_in_no_series() {
    let metrics = AgentMetrics::new().unwrap();
    let counters = metrics.edge(&edge(Decision::WouldDeny, "no_policy", 5432));
    counters.count_connection();
    metrics.connection_terminated("lock", CHECKOUT, LEDGER);
    metrics.set_certificate_expiry(LEDGER, UNIX_EPOCH);
    assert!(exposition(metrics.registry()).contains("ledger"));
    metrics.forget("payments", "ledger");
    // A connection that outlives its workload's series goes on counting.
    counters.add_sent(1);
    assert!(!exposition(metrics.registry()).contains("ledger"));
}

#[test]
fn a_state_restored_from_disk_keeps_its_age_and_is_no_update() {
    let metrics = AgentMetrics::new().unwrap();
    metrics.policy_restored(7, UNIX_EPOCH + Duration::from_secs(1_795_000_000));
    let page = exposition(metrics.registry());
    assert!(page.contains("hauberk_policy_revision 7\n"), "{page}");
    assert!(page.contains("hauberk_policy_last_good_timestamp_seconds 1795000000\n"), "{page}");
    assert!(page.contains("hauberk_policy_updates_total{result=\"success\"} 0\n"), "{page}");
}

#[test]
fn a_connection_counts_as_open_until_it_is_dropped() {
    let metrics = AgentMetrics::new().unwrap();
    let open = metrics.connection_opened(Direction::Outbound);
    let line = |count| format!("hauberk_open_connections{{direction=\"outbound\"}} {count}\n");
    assert!(exposition(metrics.registry()).contains(&line(1)));
    drop(open);
    assert!(exposition(metrics.registry()).contains(&line(0)));
}
