//! The control plane as one of a Kubernetes cluster: where its CA comes from, and what it follows.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use anyhow::{Context, bail};
use base64::{Engine, engine::general_purpose::STANDARD};
use hauberk_core::identity::TrustDomain;
use hauberk_kubernetes::{Attestor, Cluster, Report, Shared, election};
use hauberk_telemetry::Health;
use tokio::sync::{Semaphore, watch};

use crate::{
    api::Kubernetes,
    ca::{keep_root, open_own, root_files},
    custody::{Keep, Source},
    fleet::Fleet,
    policy::{Follower, Publisher, StatusWriter},
    webhook::Webhook,
};

/// The audience that agents' tokens must be for.
pub(crate) const AUDIENCE: &str = "hauberk";

/// Tokens that are looked at once; the rest waits its turn.
const ATTESTING: usize = 8;

/// The cluster's API, and what it shows of this namespace.
pub(crate) struct Connection {
    client: hauberk_kubernetes::Client,
    /// For what is tried again every second by whoever asks.
    prompt: hauberk_kubernetes::Client,
    namespace: String,
    shared: Shared,
    cluster: Arc<Cluster>,
    /// The name of this replica's pod.
    replica: String,
}

/// Connects, and puts the CA of the cluster into the folder; makes one if there is none yet. Not if
/// somebody brings one, in a Secret of this name.
pub(crate) async fn connect(
    ca: &Path,
    trust_domain: &TrustDomain,
    brought: Option<&str>,
) -> anyhow::Result<Connection> {
    let client = hauberk_kubernetes::client().await.context("find the Kubernetes API")?;
    let namespace = client.default_namespace().to_owned();
    let prompt = hauberk_kubernetes::prompt_client().await.context("find the Kubernetes API")?;
    let shared = Shared::new(client.clone(), namespace.clone());
    let cluster = Arc::new(Cluster::follow(&prompt, &namespace));
    // A pod's host name is its name, unless it says otherwise.
    let replica = nix::unistd::gethostname().context("ask for the pod's name")?;
    let replica = replica.to_string_lossy().into_owned();
    if brought.is_none() {
        bring_ca(&shared, ca, trust_domain).await.context("bring the CA of the cluster")?;
    }
    Ok(Connection { client, prompt, namespace, shared, cluster, replica })
}

/// Of several replicas that make a CA at once, one is first, and the others take its.
async fn bring_ca(
    shared: &Shared,
    folder: &Path,
    trust_domain: &TrustDomain,
) -> anyhow::Result<()> {
    if let Some(files) = shared.ca().await? {
        return Ok(keep_root(folder, &files)?);
    }
    if shared.published_roots().await?.is_some() {
        bail!(
            "agents trust a CA already (ConfigMap hauberk-trust-bundle), and the Secret hauberk-ca with its key \
             is gone; restore it, or set ca.existingSecret if it was from there, or delete that ConfigMap, too, to \
             go on with a new root"
        );
    }
    drop(open_own(folder, trust_domain, hauberk_tls::now())?);
    let made: BTreeMap<String, Vec<u8>> = root_files(folder)?;
    if shared.keep_ca(made).await? {
        tracing::info!("the CA of this cluster was made, and is kept in the Secret hauberk-ca");
        return Ok(());
    }
    let files = shared.ca().await?.context("the Secret hauberk-ca was there and is gone")?;
    Ok(keep_root(folder, &files)?)
}

impl Connection {
    /// Where the CA comes from, and where it is kept which roots are trusted.
    pub(crate) fn ca(&self, folder: &Path, brought: Option<&str>) -> (Source, Keep) {
        let source = match brought {
            Some(secret) => Source::Secret(self.shared.clone(), secret.to_owned()),
            None => Source::Own(folder.to_owned()),
        };
        (source, Keep::Cluster(self.shared.clone()))
    }

    pub(crate) fn api(&self, agent_service_account: &str) -> Kubernetes {
        let attestor = Attestor::new(
            self.client.clone(),
            AUDIENCE.to_owned(),
            self.namespace.clone(),
            agent_service_account.to_owned(),
        );
        Kubernetes {
            cluster: self.cluster.clone(),
            attestor,
            namespace: self.namespace.clone(),
            service_account: agent_service_account.to_owned(),
            attesting: Semaphore::new(ATTESTING),
        }
    }

    /// What tells authors at once.
    pub(crate) fn webhook(&self) -> Webhook {
        Webhook {
            client: self.client.clone(),
            cluster: self.cluster.clone(),
            namespace: self.namespace.clone(),
        }
    }

    /// What publishes, and what tells of it.
    pub(crate) fn follower(
        self,
        publisher: Arc<Publisher>,
        trust_domain: &TrustDomain,
        health: Health,
        fleet: Arc<Fleet>,
        taints_nodes: bool,
    ) -> (Follower, StatusWriter) {
        let (states, objects) = watch::channel(Arc::default());
        let follower = Follower {
            publisher: publisher.clone(),
            cluster: self.cluster.clone(),
            shared: Shared::new(self.prompt, self.namespace.clone()),
            trust_domain: trust_domain.clone(),
            health,
            since: BTreeMap::new(),
            behind: None,
            states,
        };
        let (client, namespace) = (self.client, self.namespace);
        let writer = StatusWriter {
            leads: election(client.clone(), namespace.clone(), self.replica.clone()),
            report: Report::new(client.clone(), namespace, self.replica),
            client,
            cluster: self.cluster,
            taints_nodes,
            fleet,
            publisher,
            objects,
        };
        (follower, writer)
    }
}

/// RFC 7468.
pub(crate) fn pem(der: &[u8]) -> String {
    let encoded = STANDARD.encode(der);
    let mut text = "-----BEGIN CERTIFICATE-----\n".to_owned();
    let mut rest = encoded.as_str();
    while !rest.is_empty() {
        let (line, more) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = more;
    }
    text.push_str("-----END CERTIFICATE-----\n");
    text
}
