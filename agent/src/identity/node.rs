//! The node's own identity: joined once with a token and renewed from then on, or attested
//! by its pod each time.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use hauberk_core::{identity::TrustDomain, rotation::Validity};
use hauberk_proto::{
    token::JoinToken,
    v1::{self, enrollment_client::EnrollmentClient},
};
use hauberk_tls::{
    Credential, CredentialSlot, PrivateKey, TrustBundle, TrustSlot, signing_request,
};

use rustls_pki_types::{CertificateDer, pem::PemObject};

use super::{ControlPlane, Kept};

/// Who this node is.
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) slot: Arc<CredentialSlot>,
    pub(crate) trust: Arc<TrustSlot>,
    pub(crate) control_plane: ControlPlane,
    pub(crate) validity: Validity,
    path: PathBuf,
    address: String,
    /// Attested by this instead of the certificate before.
    pod: Option<PodToken>,
}

impl Node {
    /// Takes up what another agent has kept in the data folder meanwhile. Returns whether there was anything new.
    ///
    /// # Errors
    /// If it cannot be used.
    pub(crate) fn reload(&mut self) -> anyhow::Result<bool> {
        let Some(kept) = Kept::load(&self.path)? else { return Ok(false) };
        let kept = from_kept(&kept, &self.path, None)?;
        let credential = kept.slot.load().context("the kept certificate is missing")?;
        let serial = |credential: &Credential| credential.facts().serial();
        if self.slot.load().is_some_and(|own| serial(&own) == serial(&credential)) {
            return Ok(false);
        }
        if self.slot.store(Credential::clone(&credential)).is_err() {
            bail!("{}: the certificate is of another node", self.path.display());
        }
        self.trust.store(TrustBundle::clone(&kept.trust.load()));
        self.validity = kept.validity;
        Ok(true)
    }

    /// Whether it needs no certificate to get one.
    pub(crate) fn attests_itself(&self) -> bool {
        self.pod.is_some()
    }
}

/// How long a node without any identity tries to be attested before its agent gives up.
const ATTEST_PATIENCE: Duration = Duration::from_secs(60);

/// Between two tries.
const ATTEST_PAUSE: Duration = Duration::from_secs(2);

/// How a node proves which one it is.
pub(crate) enum Attestation {
    /// By a join token once, and by what it got from then on.
    Token(Option<JoinToken>),
    /// By its own pod's token, each time.
    Pod(PodToken),
}

/// Where a pod's token is, and to whom it is shown.
pub(crate) struct PodToken {
    pub(crate) token: PathBuf,
    /// The roots of the control plane, PEM.
    pub(crate) roots: PathBuf,
    pub(crate) address: String,
}

/// Loads the node's identity, or joins if there is none that is good.
pub(crate) async fn open_node(
    data: &Path,
    attestation: Attestation,
    address: Option<&str>,
) -> anyhow::Result<Node> {
    let path = data.join("node.json");
    let kept = Kept::load(&path)
        .map_err(anyhow::Error::from)
        .and_then(|kept| kept.map(|kept| from_kept(&kept, &path, address)).transpose());
    let token = match attestation {
        Attestation::Pod(pod) => return open_attested(pod, kept, &path).await,
        Attestation::Token(token) => token,
    };
    let kept = match kept {
        Ok(Some(node)) => {
            if token.is_some() {
                tracing::info!(node = node.name, "already joined, the join token is not needed");
            }
            return Ok(node);
        }
        Ok(None) => None,
        Err(error) => Some(error),
    };
    let Some(token) = token else {
        return Err(match kept {
            Some(error) => error.context(
                "the node's identity cannot be used; join anew with a token \
                 (`hauberk token create` on the control plane)",
            ),
            None => anyhow::anyhow!(
                "this machine has not joined: start with --join-token TOKEN \
                 (`hauberk token create` on the control plane makes one)"
            ),
        });
    };
    if let Some(error) = kept {
        tracing::warn!(
            error = format!("{error:#}"),
            "the node's identity cannot be used, joining anew"
        );
    }
    join(&token, &path, address).await
}

/// Attests the node. If the control plane is away, goes on with what was kept; without that, tries for a
/// while.
async fn open_attested(
    pod: PodToken,
    kept: anyhow::Result<Option<Node>>,
    path: &Path,
) -> anyhow::Result<Node> {
    let mut kept = kept.unwrap_or_else(|error| {
        tracing::warn!(error = format!("{error:#}"), "the kept node identity cannot be used");
        None
    });
    let since = Instant::now();
    let known = kept.as_ref().map(known_roots).unwrap_or_default();
    loop {
        let error = match attest(&pod, &known, path).await {
            Ok(mut node) => {
                tracing::info!(node = node.name, "attested by this pod's token");
                node.pod = Some(pod);
                return Ok(node);
            }
            Err(error) => error,
        };
        if let Some(mut node) = kept.take() {
            tracing::warn!(
                error = format!("{error:#}"),
                node = node.name,
                "the node could not be attested, it goes on with the identity that it has"
            );
            node.pod = Some(pod);
            return Ok(node);
        }
        if since.elapsed() > ATTEST_PATIENCE {
            return Err(error.context("attest the node by this pod's token"));
        }
        tracing::warn!(
            error = format!("{error:#}"),
            "the node could not be attested, trying again"
        );
        tokio::time::sleep(ATTEST_PAUSE).await;
    }
}

/// The roots that this node trusts already.
fn known_roots(node: &Node) -> Vec<CertificateDer<'static>> {
    node.trust.load().roots().to_vec()
}

/// Trades the pod's token for a node certificate. The roots in the file are a minute or two old at times: while
/// one takes another's place, the control plane may be under one that only this node knows of, by what it
/// was told with its last certificate.
async fn attest(
    pod: &PodToken,
    known: &[CertificateDer<'static>],
    path: &Path,
) -> anyhow::Result<Node> {
    let token = std::fs::read_to_string(&pod.token)
        .with_context(|| format!("read the token {}", pod.token.display()))?;
    let mut roots = roots(&pod.roots)?;
    roots.extend(known.iter().filter(|root| !roots.contains(root)).cloned().collect::<Vec<_>>());
    if roots.is_empty() {
        bail!("{} has no certificate", pod.roots.display());
    }
    // One of them is the right one, and what went wrong under it is among what went wrong.
    let mut failed = Vec::new();
    for root in roots {
        let (key, request) = signing_request()?;
        let root_sha256 = hauberk_tls::sha256(&root);
        let control_plane = ControlPlane::pinned(pod.address.clone(), root_sha256)?;
        let answer = EnrollmentClient::new(control_plane.channel())
            .attest_pod(v1::AttestPodRequest {
                token: token.trim().to_owned(),
                certificate_request: request,
            })
            .await
            .map_err(|status| explain(&status))
            .with_context(|| format!("ask the control plane at {}", pod.address));
        match answer {
            Ok(answer) => {
                let answer = answer.into_inner();
                demand_root(&answer, root_sha256)?;
                return keep(&answer, &key, path, &pod.address);
            }
            Err(error) => failed.push(format!("{error:#}")),
        }
    }
    bail!("{}", failed.join("; "))
}

pub(crate) fn roots(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| anyhow::anyhow!("read the roots in {}: {error}", path.display()))
}

/// The answer came over a connection whose root is known; the roots in it must include it.
fn demand_root(answer: &v1::NodeCredential, root_sha256: [u8; 32]) -> anyhow::Result<()> {
    if !answer.trust_bundle.iter().any(|root| hauberk_tls::sha256(root) == root_sha256) {
        bail!("the control plane's trust bundle does not have the root that it was reached by");
    }
    Ok(())
}

async fn join(token: &JoinToken, path: &Path, address: Option<&str>) -> anyhow::Result<Node> {
    let address = address.unwrap_or(&token.control_plane).to_owned();
    let (key, request) = signing_request()?;
    let control_plane = ControlPlane::pinned(address.clone(), token.root_sha256)?;
    let answer = EnrollmentClient::new(control_plane.channel())
        .join(v1::JoinRequest { token_secret: token.secret.to_vec(), certificate_request: request })
        .await
        .map_err(|status| explain(&status))
        .with_context(|| format!("join through the control plane at {address}"))?
        .into_inner();
    demand_root(&answer, token.root_sha256)?;
    let node = keep(&answer, &key, path, &address)?;
    tracing::info!(node = node.name, "joined");
    Ok(node)
}

/// Asks for the next node certificate, for a new key, and puts it to use.
pub(super) async fn renew_node(node: &mut Node) -> anyhow::Result<()> {
    let renewed = match &node.pod {
        Some(pod) => attest(pod, &known_roots(node), &node.path).await?,
        None => {
            let (key, request) = signing_request()?;
            let answer = EnrollmentClient::new(node.control_plane.channel())
                .renew_node(v1::RenewNodeRequest { certificate_request: request })
                .await
                .map_err(|status| explain(&status))?
                .into_inner();
            keep(&answer, &key, &node.path, &node.address)?
        }
    };
    if renewed.name != node.name {
        bail!("the control plane answered for node {}, this is {}", renewed.name, node.name);
    }
    let credential = renewed.slot.load().context("the renewed certificate is missing")?;
    if node.slot.store(Credential::clone(&credential)).is_err() {
        bail!("the renewed certificate is of another identity");
    }
    node.trust.store(TrustBundle::clone(&renewed.trust.load()));
    node.validity = renewed.validity;
    Ok(())
}

fn keep(
    answer: &v1::NodeCredential,
    key: &PrivateKey,
    path: &Path,
    address: &str,
) -> anyhow::Result<Node> {
    let mut kept = Kept::new(key, &answer.certificate_chain, &answer.trust_bundle);
    kept.control_plane = address.to_owned();
    kept.node.clone_from(&answer.node);
    kept.trust_domain.clone_from(&answer.trust_domain);
    // Checked before it replaces what is there.
    let node = from_kept(&kept, path, None)?;
    kept.save(path)?;
    Ok(node)
}

fn from_kept(kept: &Kept, path: &Path, address: Option<&str>) -> anyhow::Result<Node> {
    let now = hauberk_tls::now();
    let trust_domain: TrustDomain = kept
        .trust_domain
        .parse()
        .with_context(|| format!("{}: trust domain {:?}", path.display(), kept.trust_domain))?;
    let bundle = TrustBundle::of_now(trust_domain.clone(), kept.bundle(path)?, now)?;
    let credential = Credential::new(kept.chain(path)?, &kept.key(path)?, now)
        .with_context(|| format!("the node certificate in {}", path.display()))?;
    let id = hauberk_core::identity::SpiffeId::node(&trust_domain, &kept.node)
        .with_context(|| format!("{}: node {:?}", path.display(), kept.node))?;
    let facts = credential.facts();
    let validity = Validity::of_issued(facts.not_before(), facts.not_after(), now);
    let slot = CredentialSlot::new(id);
    if slot.store(credential).is_err() {
        bail!("{}: the certificate is not that of node {}", path.display(), kept.node);
    }
    let trust = TrustSlot::new(bundle);
    let address = address.unwrap_or(&kept.control_plane).to_owned();
    Ok(Node {
        name: kept.node.clone(),
        control_plane: ControlPlane::new(address.clone(), slot.clone(), trust.clone())?,
        slot,
        trust,
        validity,
        path: path.to_owned(),
        address,
        pod: None,
    })
}

/// A status in words: what the control plane says, or that it could not be asked.
pub(crate) fn explain(status: &tonic::Status) -> anyhow::Error {
    let mut text = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(cause) = source {
        // rustls writes our own reasons as values of the program, not as a sentence.
        if let Some(failure) = cause.downcast_ref().and_then(hauberk_tls::reason_of) {
            return anyhow::anyhow!("{text}: {}", failure.detail);
        }
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    anyhow::anyhow!("{text}")
}
