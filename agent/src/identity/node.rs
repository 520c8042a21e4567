//! The node's own identity: joined once with a token, renewed from then on.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
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
}

/// Loads the node's identity, or joins with the token if there is none that is good.
pub(crate) async fn open_node(
    data: &Path,
    token: Option<&JoinToken>,
    address: Option<&str>,
) -> anyhow::Result<Node> {
    let path = data.join("node.json");
    let kept = match Kept::load(&path)
        .map_err(anyhow::Error::from)
        .and_then(|kept| kept.map(|kept| from_kept(&kept, &path, address)).transpose())
    {
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
    join(token, &path, address).await
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
    // The answer came over a connection whose root the token names; the roots in it must include it.
    if !answer.trust_bundle.iter().any(|root| hauberk_tls::sha256(root) == token.root_sha256) {
        bail!("the control plane's trust bundle does not have the root that the join token names");
    }
    let node = keep(&answer, &key, path, &address)?;
    tracing::info!(node = node.name, "joined");
    Ok(node)
}

/// Asks for the next node certificate, for a new key, and puts it to use.
pub(crate) async fn renew_node(node: &mut Node) -> anyhow::Result<()> {
    let (key, request) = signing_request()?;
    let answer = EnrollmentClient::new(node.control_plane.channel())
        .renew_node(v1::RenewNodeRequest { certificate_request: request })
        .await
        .map_err(|status| explain(&status))?
        .into_inner();
    if answer.node != node.name {
        bail!("the control plane answered for node {}, this is {}", answer.node, node.name);
    }
    let renewed = keep(&answer, &key, &node.path, &node.address)?;
    let credential = renewed.slot.load().context("the renewed certificate is missing")?;
    let chain = credential.chain().to_vec();
    let stored = node.slot.store(Credential::new(chain, &key, hauberk_tls::now())?);
    if stored.is_err() {
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
    let bundle = TrustBundle::new(trust_domain.clone(), kept.bundle(path)?, now)?;
    let credential = Credential::new(kept.chain(path)?, &kept.key(path)?, now)
        .with_context(|| format!("the node certificate in {}", path.display()))?;
    let id = hauberk_core::identity::SpiffeId::node(&trust_domain, &kept.node)
        .with_context(|| format!("{}: node {:?}", path.display(), kept.node))?;
    let facts = credential.facts();
    let validity = Validity::observed(
        facts.not_before().saturating_add(super::rotate::BACKDATE),
        facts.not_after(),
        facts.not_before().saturating_add(super::rotate::BACKDATE),
    );
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
    })
}

/// A status in words: what the control plane says, or that it could not be asked.
pub(super) fn explain(status: &tonic::Status) -> anyhow::Error {
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
