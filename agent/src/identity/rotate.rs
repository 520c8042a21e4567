//! Certificates of the local workloads: asked for when a workload appears, renewed at half of their
//! life, kept on disk so that a restart needs no control plane. The sole writer of their slots.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use hauberk_core::{
    policy::resolve::MeshWorkload,
    rotation::{self, Failure, Jitter, Step, Validity},
    session,
    time::Timestamp,
};
use hauberk_proto::v1::{self, workload_identity_client::WorkloadIdentityClient};
use hauberk_telemetry::metrics::{AgentMetrics, Outcome, RenewalStep, WorkloadLabels};
use hauberk_tls::{
    Credential, CredentialSlot, TrustBundle, TrustSlot, mesh_client_config, signing_request,
    verify_chain,
};
use rustls::ClientConfig;
use tokio::{sync::watch, task::JoinHandle};

use super::{ControlPlane, Kept, explain};
use crate::handover::Replaced;

/// Wall-clock jumps and suspended machines are noticed at this pace.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);

/// How often an agent whose node has no certificate that it can use looks for what was kept of a workload's.
const NODE_LOOK: Duration = Duration::from_secs(2);

/// One local workload's certificate, and what is built on it.
pub(crate) struct LocalIdentity {
    pub(crate) slot: Arc<CredentialSlot>,
    /// For connections to other agents, as this workload.
    pub(crate) client_tls: Arc<ClientConfig>,
    /// The same for sessions that carry one stream after another.
    pub(crate) dedicated_tls: Arc<ClientConfig>,
    /// Counts up with each certificate that is put to use.
    pub(crate) installed: watch::Receiver<u64>,
    subject: Arc<ArcSwap<Subject>>,
    task: JoinHandle<()>,
}

/// The workload that a certificate is for, by its present name.
struct Subject {
    key: String,
    namespace: String,
    name: String,
    /// Where it is kept.
    path: PathBuf,
}

impl Subject {
    fn of(workload: &MeshWorkload, folder: &Path) -> Self {
        let key = workload.key();
        Self {
            namespace: workload.namespace.as_ref().map(ToString::to_string).unwrap_or_default(),
            name: workload.name.to_string(),
            path: kept_at(folder, &key),
            key,
        }
    }
}

fn kept_at(folder: &Path, key: &str) -> PathBuf {
    folder.join(format!("{}.json", key.replace('/', "__")))
}

impl Drop for LocalIdentity {
    fn drop(&mut self) {
        self.task.abort();
        self.slot.clear();
    }
}

fn folder(data: &Path) -> PathBuf {
    data.join("workloads")
}

/// Forgets the keys of all workloads, which another CA has certified.
///
/// # Errors
/// If they cannot be removed.
pub(crate) fn forget(data: &Path) -> anyhow::Result<()> {
    let folder = folder(data);
    match std::fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", folder.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Gives local workloads their identities.
pub(crate) struct Identities {
    folder: PathBuf,
    control_plane: ControlPlane,
    trust: Arc<TrustSlot>,
    metrics: AgentMetrics,
    replaced: Replaced,
    current: HashMap<String, Arc<LocalIdentity>>,
}

impl Identities {
    pub(crate) fn new(
        data: &Path,
        control_plane: ControlPlane,
        trust: Arc<TrustSlot>,
        metrics: AgentMetrics,
        replaced: Replaced,
    ) -> anyhow::Result<Self> {
        let folder = folder(data);
        hauberk_tls::files::private_folder(&folder)?;
        Ok(Self { folder, control_plane, trust, metrics, replaced, current: HashMap::new() })
    }

    /// The identity of a workload, made now if it is new or has become another.
    pub(crate) fn ensure(&mut self, workload: &MeshWorkload) -> anyhow::Result<Arc<LocalIdentity>> {
        let key = workload.key();
        if let Some(identity) = self.current.get(&key)
            && *identity.slot.id() == workload.identity
        {
            return Ok(identity.clone());
        }
        let slot = CredentialSlot::new(workload.identity.clone());
        let client_tls = |protocols: &[&[u8]]| {
            mesh_client_config(slot.clone(), self.trust.clone(), protocols).map(Arc::new)
        };
        let dedicated_tls = client_tls(&[session::ALPN])?;
        let client_tls = client_tls(&[session::ALPN_MULTIPLEXED])?;
        let (sender, installed) = watch::channel(0);
        let subject = Arc::new(ArcSwap::from_pointee(Subject::of(workload, &self.folder)));
        let rotation = Rotation {
            subject: subject.clone(),
            slot: slot.clone(),
            control_plane: self.control_plane.clone(),
            trust: self.trust.clone(),
            metrics: self.metrics.clone(),
            replaced: self.replaced.clone(),
            installed: sender,
        };
        let identity = Arc::new(LocalIdentity {
            slot,
            client_tls,
            dedicated_tls,
            installed,
            subject,
            task: tokio::spawn(rotation.run()),
        });
        self.current.insert(key, identity.clone());
        Ok(identity)
    }

    /// A workload has another name, and is the same one.
    pub(crate) fn rename(&mut self, before: &str, workload: &MeshWorkload) {
        let Some(identity) = self.current.remove(before) else { return };
        let subject = Subject::of(workload, &self.folder);
        let renamed = std::fs::rename(kept_at(&self.folder, before), &subject.path);
        if let Err(error) = renamed
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %subject.path.display(), "the key of a renamed workload is not kept until its next renewal");
        }
        identity.subject.store(Arc::new(subject));
        self.current.insert(workload.key(), identity);
    }

    /// Forgets every workload but these, and its key on disk.
    pub(crate) fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        let folder = &self.folder;
        self.current.retain(|key, _| {
            let stays = keep(key);
            if !stays {
                let path = kept_at(folder, key);
                if let Err(error) = std::fs::remove_file(&path)
                    && error.kind() != std::io::ErrorKind::NotFound
                {
                    tracing::warn!(%error, path = %path.display(), "the key of a workload that is gone stays on disk");
                }
            }
            stays
        });
    }
}

fn pause(until: Timestamp, now: Timestamp) -> Duration {
    until.since(now).max(Duration::from_millis(20)).min(LONGEST_SLEEP)
}

struct Rotation {
    subject: Arc<ArcSwap<Subject>>,
    slot: Arc<CredentialSlot>,
    control_plane: ControlPlane,
    trust: Arc<TrustSlot>,
    metrics: AgentMetrics,
    /// Another agent keeps the keys on disk meanwhile.
    replaced: Replaced,
    installed: watch::Sender<u64>,
}

impl Rotation {
    async fn run(self) {
        self.load(true);
        let mut obtained_at = hauberk_tls::now();
        let mut jitter = draw_jitter();
        let mut failure: Option<Failure> = None;
        let mut renewals = self.control_plane.renewals();
        loop {
            let now = hauberk_tls::now();
            let step = match self.validity(obtained_at) {
                Some(validity) if validity.not_after <= now || self.is_trusted(now) => {
                    rotation::next(validity, now, jitter, failure)
                }
                Some(_) | None => rotation::acquire(now, jitter, failure),
            };
            match step {
                Step::Wait(until) => tokio::select! {
                    () = tokio::time::sleep(pause(until, now)) => {}
                    // It may have come from another CA.
                    () = self.control_plane.renewed(&mut renewals) => {}
                },
                Step::RetryAt(until) => tokio::select! {
                    () = tokio::time::sleep(pause(until, now)) => {}
                    // What has failed may have failed for want of that.
                    () = self.control_plane.renewed(&mut renewals) => failure = None,
                },
                Step::Expired => {
                    tracing::warn!(
                        workload = self.subject.load().key,
                        "the certificate expired before it was renewed"
                    );
                    self.slot.clear();
                }
                Step::RenewNow if !self.may_ask(now, obtained_at).await => {
                    failure = None;
                    if self.slot.load().is_none() {
                        // What was kept may be good by now, if the clock was wrong.
                        self.load(false);
                        obtained_at = hauberk_tls::now();
                    }
                }
                Step::RenewNow => match self.renew().await {
                    Ok(()) => {
                        obtained_at = hauberk_tls::now();
                        failure = None;
                        jitter = draw_jitter();
                    }
                    Err(error) => failure = Some(self.failed(failure, &error)),
                },
            }
        }
    }

    /// Whether those who trust the roots of now take the certificate: not if the control plane has another CA since,
    /// which did not pass from one root to the next.
    fn is_trusted(&self, now: Timestamp) -> bool {
        let trust = self.trust.load();
        let Some(credential) = self.slot.load() else { return false };
        match credential.chain().split_first() {
            Some((leaf, intermediates)) if !trust.roots().is_empty() => {
                verify_chain(leaf, intermediates, &trust, true, now).is_ok()
            }
            // Nobody knows any roots: that is the node's trouble, and no certificate mends it.
            Some(_) | None => true,
        }
    }

    fn failed(&self, before: Option<Failure>, error: &anyhow::Error) -> Failure {
        let attempts = before.map_or(1, |failure| failure.attempts.saturating_add(1));
        tracing::warn!(
            workload = self.subject.load().key,
            attempts,
            error = format!("{error:#}"),
            "a certificate could not be renewed"
        );
        Failure { at: hauberk_tls::now(), attempts }
    }

    /// Whether the control plane can be asked: not while the node has no certificate that it can use. Waits for
    /// one, but not for long, and not beyond the end of what is in use.
    async fn may_ask(&self, now: Timestamp, obtained_at: Timestamp) -> bool {
        let end = self.validity(obtained_at).map(|validity| validity.not_after.since(now));
        let patience = end.unwrap_or(NODE_LOOK).min(NODE_LOOK).max(Duration::from_millis(20));
        tokio::time::timeout(patience, self.control_plane.usable()).await.is_ok()
    }

    fn validity(&self, obtained_at: Timestamp) -> Option<Validity> {
        let credential = self.slot.load()?;
        let facts = credential.facts();
        Some(Validity::of_issued(facts.not_before(), facts.not_after(), obtained_at))
    }

    /// Takes up what is on disk, if nothing is in use and there are roots to trust beside it. `first` says what is
    /// wrong with it.
    fn load(&self, first: bool) {
        if self.slot.load().is_some() || self.trust.load().roots().is_empty() {
            return;
        }
        let subject = self.subject.load();
        let path = &subject.path;
        let loaded = Kept::load(path).map_err(anyhow::Error::from).and_then(|kept| {
            let Some(kept) = kept else { return Ok(()) };
            let chain = kept.chain(path)?;
            let credential = Credential::new(chain, &kept.key(path)?, hauberk_tls::now())?;
            self.install(credential)
        });
        if let Err(error) = loaded
            && first
        {
            tracing::info!(
                workload = self.subject.load().key,
                error = format!("{error:#}"),
                "the kept certificate is not used, asking for another"
            );
        }
    }

    async fn renew(&self) -> anyhow::Result<()> {
        let (key, request) = signing_request()?;
        let answer = WorkloadIdentityClient::new(self.control_plane.channel())
            .issue(v1::IssueRequest {
                workload: self.subject.load().key.clone(),
                certificate_request: request,
            })
            .await
            .map_err(|status| explain(&status));
        self.metrics.certificate_renewal(RenewalStep::Call, Outcome::from(&answer));
        let answer = answer?.into_inner();
        let installed = self.take(&answer, &key);
        self.metrics.certificate_renewal(RenewalStep::Install, Outcome::from(&installed));
        installed
    }

    fn take(
        &self,
        answer: &v1::WorkloadCredential,
        key: &hauberk_tls::PrivateKey,
    ) -> anyhow::Result<()> {
        let now = hauberk_tls::now();
        let certificates = |list: &[Vec<u8>]| {
            list.iter().map(|der| rustls_pki_types::CertificateDer::from(der.clone())).collect()
        };
        let bundle = TrustBundle::of_now(
            self.trust.load().trust_domain().clone(),
            certificates(&answer.trust_bundle),
            now,
        )?;
        let credential = Credential::new(certificates(&answer.certificate_chain), key, now)?;
        if bundle.roots().is_empty() {
            anyhow::bail!("no root of the answer is valid by the clock of this machine");
        }
        if let Some((leaf, intermediates)) = credential.chain().split_first() {
            verify_chain(leaf, intermediates, &bundle, true, now)
                .context("the certificate is not of the roots that came with it")?;
        }
        self.trust.store(bundle);
        self.install(credential)?;
        if self.replaced.is_set() {
            return Ok(());
        }
        // A full disk costs the certificate at the next restart, not the connections of now.
        if let Err(error) = Kept::new(key, &answer.certificate_chain, &answer.trust_bundle)
            .save(&self.subject.load().path)
        {
            tracing::warn!(
                workload = self.subject.load().key,
                error = format!("{:#}", anyhow::Error::from(error)),
                "the certificate is in use but could not be kept for a restart"
            );
        }
        Ok(())
    }

    fn install(&self, credential: Credential) -> anyhow::Result<()> {
        let not_after = credential.facts().not_after();
        if let Err(other) = self.slot.store(credential) {
            anyhow::bail!("the certificate is for {}, not {}", other.facts().id(), self.slot.id());
        }
        let subject = self.subject.load();
        self.metrics.set_certificate_expiry(
            WorkloadLabels { namespace: &subject.namespace, name: &subject.name },
            system_time(not_after),
        );
        self.installed.send_modify(|count| *count += 1);
        Ok(())
    }
}

pub(super) fn draw_jitter() -> Jitter {
    let mut bytes = [0; 2];
    // Without random numbers no key can be made either: then jitter is the least of it.
    let drawn = if getrandom::fill(&mut bytes).is_ok() { u16::from_ne_bytes(bytes) } else { 0 };
    Jitter::new(drawn)
}

pub(super) fn system_time(timestamp: Timestamp) -> SystemTime {
    let millis = u64::try_from(timestamp.unix_millis()).unwrap_or(0);
    SystemTime::UNIX_EPOCH + Duration::from_millis(millis)
}
