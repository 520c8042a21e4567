//! The ways to a node certificate: a join token, the pod's own token, and the certificate before. Each answer is kept
//! in the data folder before it is put to use, under a lock: `hauberk join` may be another process.

use std::{
    fs::{File, OpenOptions},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use hauberk_proto::{
    token::JoinToken,
    v1::{self, enrollment_client::EnrollmentClient},
};
use hauberk_tls::{PrivateKey, signing_request};
use nix::fcntl::{Flock, FlockArg};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use tonic::Code;

use super::{ControlPlane, Kept, control_plane::explain, found::Identity};

/// How often it is tried whether nobody else is getting a certificate.
const LOCK_RETRY: Duration = Duration::from_millis(50);

/// Where a pod's token is, and to whom it is shown.
pub(crate) struct PodToken {
    pub(crate) token: PathBuf,
    /// The roots of the control plane, PEM.
    pub(crate) roots: PathBuf,
    pub(crate) address: String,
}

/// Whose turn it is to get a certificate for the node, and to keep it.
pub(super) struct Turn {
    /// Where the identity is kept.
    path: PathBuf,
    _lock: Flock<File>,
}

impl Turn {
    /// Waits for it. Whoever has it needs some seconds at most, or is gone.
    ///
    /// # Errors
    /// If the lock's file cannot be opened.
    pub(super) async fn wait(path: &Path) -> anyhow::Result<Self> {
        let lock = path.with_extension("lock");
        loop {
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&lock)
                .with_context(|| format!("open {}", lock.display()))?;
            if let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                return Ok(Self { path: path.to_owned(), _lock: lock });
            }
            tokio::time::sleep(LOCK_RETRY).await;
        }
    }

    /// Keeps an answer, if it is for the node that this machine is, and gives what is to be put to use. It may be
    /// one that is good later on only, by the clock of this machine.
    fn keep(
        &self,
        answer: &v1::NodeCredential,
        key: &PrivateKey,
        address: &str,
        node: Option<&str>,
    ) -> anyhow::Result<Identity> {
        if let Some(node) = node.filter(|node| *node != answer.node) {
            let folder = self.path.parent().unwrap_or(&self.path);
            bail!(
                "the control plane answered for node {}, and {} is that of node {node}; to make this machine \
                 another node: stop its agent, run `hauberk agent cleanup`, remove that folder, and join with \
                 a new token",
                answer.node,
                folder.display()
            );
        }
        let mut kept = Kept::new(key, &answer.certificate_chain, &answer.trust_bundle);
        kept.control_plane = address.to_owned();
        kept.node.clone_from(&answer.node);
        kept.trust_domain.clone_from(&answer.trust_domain);
        // Checked before it replaces what is there.
        let identity = Identity::of(&kept, &self.path, hauberk_tls::now())?;
        kept.save(&self.path)?;
        Ok(identity)
    }
}

/// What became of a request.
pub(super) enum Answer {
    Issued(Box<Identity>),
    /// What was shown is good for nothing.
    Refused(anyhow::Error),
}

impl Answer {
    /// The identity, or why there is none.
    ///
    /// # Errors
    /// If it was refused.
    pub(super) fn issued(self) -> anyhow::Result<Identity> {
        match self {
            Self::Issued(identity) => Ok(*identity),
            Self::Refused(error) => Err(error),
        }
    }
}

/// A refusal, or the error that nothing was decided.
fn failed(status: &tonic::Status, doing: String) -> anyhow::Result<Answer> {
    let error = explain(status).context(doing);
    match status.code() {
        Code::PermissionDenied => Ok(Answer::Refused(error)),
        _ => Err(error),
    }
}

/// Trades a join token for a certificate. Goes on to its end if nobody waits for it any more: the token is used
/// up by then.
///
/// # Errors
/// If the control plane cannot be asked, or its answer cannot be kept.
pub(super) async fn join(
    turn: Turn,
    token: JoinToken,
    address: Option<String>,
    node: Option<String>,
) -> anyhow::Result<Answer> {
    tokio::spawn(async move {
        let address = address.unwrap_or_else(|| token.control_plane.clone());
        let (key, request) = signing_request()?;
        let control_plane = ControlPlane::pinned(address.clone(), token.root_sha256)?;
        let request =
            v1::JoinRequest { token_secret: token.secret.to_vec(), certificate_request: request };
        let answer = match EnrollmentClient::new(control_plane.channel()).join(request).await {
            Ok(answer) => answer.into_inner(),
            Err(status) => {
                return failed(&status, format!("join through the control plane at {address}"));
            }
        };
        demand_root(&answer, token.root_sha256)?;
        let identity = turn.keep(&answer, &key, &address, node.as_deref())?;
        Ok(Answer::Issued(Box::new(identity)))
    })
    .await
    .context("join")?
}

/// Trades the pod's token for a node certificate. The roots in the file are a minute or two old at times: while
/// one takes another's place, the control plane may be under one that only this node knows of, by what it
/// was told with its last certificate.
///
/// # Errors
/// If the control plane cannot be asked, refuses it, or its answer cannot be kept.
pub(super) async fn attest(
    turn: &Turn,
    pod: &PodToken,
    known: &[CertificateDer<'static>],
    node: Option<&str>,
) -> anyhow::Result<Identity> {
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
                return turn.keep(&answer, &key, &pod.address, node);
            }
            Err(error) => failed.push(format!("{error:#}")),
        }
    }
    bail!("{}", failed.join("; "))
}

/// Renews the certificate that the calls to this control plane show.
///
/// # Errors
/// If the control plane cannot be asked, or its answer cannot be kept.
pub(super) async fn renew(
    turn: &Turn,
    control_plane: &ControlPlane,
    node: &str,
) -> anyhow::Result<Answer> {
    let (key, request) = signing_request()?;
    let address = control_plane.address();
    let answer = EnrollmentClient::new(control_plane.channel())
        .renew_node(v1::RenewNodeRequest { certificate_request: request })
        .await;
    let answer = match answer {
        Ok(answer) => answer.into_inner(),
        Err(status) => return failed(&status, format!("ask the control plane at {address}")),
    };
    let identity = turn.keep(&answer, &key, &address, Some(node))?;
    Ok(Answer::Issued(Box::new(identity)))
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
