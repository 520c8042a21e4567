//! What a running control plane sends to agents, over the real wire: everything at first, then only
//! what has changed.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]

mod place;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant, SystemTime},
};

use hauberk_core::time::Timestamp;
use hauberk_proto::{
    convert::Resource,
    state::state_hash,
    v1::{self, agent_report::Kind, state_client::StateClient},
};
use place::{PATIENCE, Place};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, transport::Channel};

const HOSTS: &str = "
apiVersion: hauberk.dev/v1alpha1
kind: Machine
metadata: {name: machine-a}
spec: {addresses: [10.0.0.1]}
---
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: web, namespace: shop}
spec: {machine: machine-a, serviceAccount: web, process: {user: web}, ports: [80]}
---
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: ledger, namespace: payments}
spec: {machine: machine-a, serviceAccount: ledger, process: {user: ledger}, ports: [5432]}
---
";

const OLD: &str = "
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: old, namespace: payments}
spec: {machine: machine-a, serviceAccount: old, process: {user: old}, ports: []}
---
";

const LEDGER_POLICY: &str = "policy:payments/ledger:spiffe://example.org/ns/payments/sa/ledger";

/// The policy of the ledger, with these ports open.
fn policy(ports: &str) -> String {
    format!(
        "
apiVersion: hauberk.dev/v1alpha1
kind: AccessPolicy
metadata: {{name: ledger, namespace: payments}}
spec:
  owner: {{team: payments, contact: '#payments'}}
  target: {{serviceAccount: ledger}}
  rules:
  - {{name: web, ports: {ports}, from: [{{serviceAccount: {{namespace: shop, name: web}}}}]}}
"
    )
}

/// An agent's stream, and what it has been told so far.
struct Agent {
    reports: mpsc::Sender<v1::AgentReport>,
    updates: Streaming<v1::StateUpdate>,
    resources: BTreeMap<String, v1::Resource>,
}

impl Agent {
    /// Says at first that it has the state of `known` from before.
    async fn subscribe(channel: &Channel, known: &v1::StateUpdate) -> Self {
        let (reports, outgoing) = mpsc::channel(8);
        let hello = v1::Hello {
            agent_version: "test".to_owned(),
            revision: known.revision,
            state_hash: known.state_hash.clone(),
            epoch: known.epoch,
        };
        reports.send(v1::AgentReport { kind: Some(Kind::Hello(hello)) }).await.unwrap();
        let outgoing = ReceiverStream::new(outgoing);
        let updates = StateClient::new(channel.clone()).subscribe(outgoing).await.unwrap();
        Self { reports, updates: updates.into_inner(), resources: BTreeMap::new() }
    }

    async fn message(&mut self) -> Result<v1::StateUpdate, Status> {
        let message = timeout(PATIENCE, self.updates.message()).await.unwrap();
        message.map(|update| update.unwrap())
    }

    /// The next update, put in force as agents do it.
    async fn next(&mut self) -> v1::StateUpdate {
        let update = self.message().await.unwrap();
        if update.full {
            self.resources.clear();
        }
        for key in &update.removals {
            assert!(self.resources.remove(key).is_some(), "{key} was not there");
        }
        for message in &update.upserts {
            self.resources.insert(key(message), message.clone());
        }
        assert_eq!(update.state_hash, state_hash(&self.resources), "the hash is of another state");
        update
    }

    fn keys(&self) -> Vec<&str> {
        self.resources.keys().map(String::as_str).collect()
    }
}

fn key(message: &v1::Resource) -> String {
    Resource::try_from(message.clone()).unwrap().key()
}

fn nothing() -> v1::StateUpdate {
    v1::StateUpdate::default()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_message_is_everything_and_each_later_one_only_what_changed() {
    let place = Place::new(&[HOSTS, OLD, &policy("[5432]")].concat());
    let test = async {
        let channel = place.join().await.channel(&place);
        let mut agent = Agent::subscribe(&channel, &nothing()).await;
        let first = agent.next().await;
        assert!(first.full);
        assert_eq!(first.removals, Vec::<String>::new());
        let (web, ledger, old) =
            ("workload:shop/web", "workload:payments/ledger", "workload:payments/old");
        assert_eq!(agent.keys(), [LEDGER_POLICY, ledger, old, web]);

        place.put(&[HOSTS, &policy("[5432, 5433]")].concat());
        let second = agent.next().await;
        assert!(!second.full, "the whole state was sent once more");
        assert_eq!(second.revision, first.revision + 1);
        let changed: Vec<String> = second.upserts.iter().map(key).collect();
        assert_eq!(
            (changed, &second.removals),
            (vec![LEDGER_POLICY.to_owned()], &vec![old.to_owned()])
        );
        assert_ne!(second.state_hash, first.state_hash);
        assert_eq!(agent.keys(), [LEDGER_POLICY, ledger, web]);

        // A third one builds on the second and not on the first.
        place.put(&[HOSTS, OLD, &policy("[5432, 5433]")].concat());
        let third = agent.next().await;
        assert!(!third.full);
        assert_eq!(third.revision, second.revision + 1);
        assert_eq!(third.upserts.iter().map(key).collect::<Vec<_>>(), [old]);
        assert_eq!(third.removals, Vec::<String>::new());
    };
    place.serve(test).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_stream_begins_with_everything_whatever_the_agent_has() {
    let place = Place::new(&[HOSTS, &policy("[5432]")].concat());
    let test = async {
        let channel = place.join().await.channel(&place);
        let mut before = Agent::subscribe(&channel, &nothing()).await;
        let known = before.next().await;
        for known in [known.clone(), v1::StateUpdate { state_hash: vec![7; 32], ..known.clone() }] {
            let mut again = Agent::subscribe(&channel, &known).await;
            let first = again.next().await;
            assert!(first.full);
            assert_eq!(first.revision, known.revision);
            assert_eq!(again.resources, before.resources);
        }
    };
    place.serve(test).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_update_ends_the_stream_and_the_next_one_has_everything() {
    let place = Place::new(&[HOSTS, &policy("[5432]")].concat());
    let test = async {
        let channel = place.join().await.channel(&place);
        let mut agent = Agent::subscribe(&channel, &nothing()).await;
        let first = agent.next().await;
        let refused = v1::Refused { revision: first.revision, reason: "no".to_owned() };
        let report = v1::AgentReport { kind: Some(Kind::Refused(refused)) };
        agent.reports.send(report).await.unwrap();
        let ended = agent.message().await.unwrap_err();
        assert_eq!(ended.code(), Code::Aborted, "{ended}");
        let mut again = Agent::subscribe(&channel, &nothing()).await;
        assert!(again.next().await.full);
        let status = place.operator().await.get_status(v1::GetStatusRequest {}).await.unwrap();
        let status = status.into_inner();
        let node = status.nodes.iter().find(|node| node.name == "machine-a").unwrap();
        assert_eq!(node.refused, format!("revision {}: no", first.revision));
    };
    place.serve(test).await;
}

fn system_time_ms() -> i64 {
    Timestamp::from(SystemTime::now()).unix_millis()
}

#[tokio::test(flavor = "multi_thread")]
async fn revisions_and_the_time_are_told_to_the_millisecond() {
    let place = Place::new(&[HOSTS, &policy("[5432]")].concat());
    let test = async {
        let channel = place.join().await.channel(&place);
        let mut agent = Agent::subscribe(&channel, &nothing()).await;
        agent.next().await;
        // Several times, as one may fall on a whole second.
        for port in 6000..6003 {
            let before = system_time_ms();
            place.put(&[HOSTS, &policy(&format!("[{port}]"))].concat());
            let made = agent.next().await.made_at_unix_ms;
            assert!((before..=system_time_ms()).contains(&made), "made {} ms early", before - made);
            let before = system_time_ms();
            let mut client = StateClient::new(channel.clone());
            let told = client.get_time(v1::GetTimeRequest {}).await.unwrap().into_inner();
            assert!((before..=system_time_ms()).contains(&told.now_unix_ms), "{told:?} {before}");
        }
    };
    place.serve(test).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn status_has_the_clock_skew_that_an_agent_reports() {
    let place = Place::new(&[HOSTS, &policy("[5432]")].concat());
    let test = async {
        let channel = place.join().await.channel(&place);
        let agent = Agent::subscribe(&channel, &nothing()).await;
        let skew = async || {
            let status = place.operator().await.get_status(v1::GetStatusRequest {}).await.unwrap();
            status.into_inner().nodes[0].clock_skew_ms
        };
        assert_eq!(skew().await, None);
        let report = v1::AgentStatus { clock_skew_ms: Some(-90_000), ..v1::AgentStatus::default() };
        let report = v1::AgentReport { kind: Some(Kind::Status(report)) };
        agent.reports.send(report).await.unwrap();
        let begun = Instant::now();
        while skew().await != Some(-90_000) {
            assert!(begun.elapsed() < PATIENCE, "it is not told");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    place.serve(test).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_agent_said_is_forgotten_when_its_machine_is_gone() {
    const OTHER: &str = "
apiVersion: hauberk.dev/v1alpha1
kind: Machine
metadata: {name: machine-b}
spec: {addresses: [10.0.0.2]}
---
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: other, namespace: shop}
spec: {machine: machine-b, serviceAccount: other, process: {user: other}, ports: []}
---
";
    let place = Place::new(&[HOSTS, OTHER].concat());
    let test = async {
        let channel = place.join().await.channel(&place);
        let mut agent = Agent::subscribe(&channel, &nothing()).await;
        agent.next().await;
        // What of machine-a the status says, once `wanted` holds.
        let status = async |wanted: fn(Option<&v1::NodeInfo>) -> bool| {
            let begun = Instant::now();
            loop {
                let answer = place.operator().await.get_status(v1::GetStatusRequest {}).await;
                let nodes = answer.unwrap().into_inner().nodes;
                if wanted(nodes.iter().find(|node| node.name == "machine-a")) {
                    return;
                }
                assert!(begun.elapsed() < PATIENCE, "{nodes:?}");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        status(|node| node.is_some_and(|node| node.connected)).await;
        drop(agent);
        status(|node| node.is_some_and(|node| !node.connected && node.last_seen_unix_ms > 0)).await;
        place.put(OTHER);
        status(|node| node.is_none()).await;
        place.put(&[HOSTS, OTHER].concat());
        status(|node| node.is_some_and(|node| node.last_seen_unix_ms == 0)).await;
    };
    place.serve(test).await;
}
