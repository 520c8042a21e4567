//! The node's own identity: joined once with a token and renewed from then on, or attested by its pod each time.
//!
//! What an agent enforces does not wait for it. A node whose certificate is missing, damaged, expired or not valid
//! yet is a node all the same, by the name that the data folder has for it: it calls nobody, and tries to get its
//! identity back ([`super::tend`]).

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use hauberk_core::{identity::SpiffeId, rotation::Validity, time::Timestamp};
use hauberk_proto::token::JoinToken;
use hauberk_tls::{Credential, CredentialSlot, TrustBundle, TrustSlot};
use tokio::sync::watch;

use super::{
    ControlPlane,
    enroll::{self, Answer, PodToken, Turn},
    found::{Dated, Identity},
    trouble::Trouble,
};
use crate::policy::Owner;

/// The identity's name in the data folder.
const FILE: &str = "node.json";

/// There while the data folder has something of another installation.
const ADOPTING: &str = "adopting";

/// How long a pod of whose node nothing at all is known tries to be attested before its agent gives up.
const ATTEST_PATIENCE: Duration = Duration::from_secs(60);

/// Between two of these tries.
const ATTEST_PAUSE: Duration = Duration::from_secs(2);

/// How a node proves which one it is.
pub(crate) enum Attestation {
    /// By a join token once, and by what it got from then on.
    Token(Option<JoinToken>),
    /// By its own pod's token, each time.
    Pod(PodToken),
}

/// Who this node is.
pub(crate) struct Node {
    pub(crate) name: String,
    /// Empty while there is no credential that can be used.
    pub(crate) slot: Arc<CredentialSlot>,
    /// Trusts nobody while no root is known.
    pub(crate) trust: Arc<TrustSlot>,
    pub(crate) control_plane: ControlPlane,
    standing: Standing,
    attestation: Attestation,
    /// Where the control plane is, if somebody said so.
    address: Option<String>,
    path: PathBuf,
    renewed: watch::Sender<u64>,
}

/// Whether the node's credential can be used.
pub(super) enum Standing {
    Usable(Validity),
    Unusable(Unusable),
}

/// Why not, and what is left of it.
pub(super) enum Unusable {
    Missing,
    /// In words.
    Damaged(String),
    /// It may still be good for its own renewal.
    Lapsed(Credential),
    /// It is not valid before this.
    Early(Timestamp),
}

impl Node {
    /// Opens what the data folder has. Waits for the control plane only if nothing there says which node this is.
    ///
    /// # Errors
    /// If nothing there does, and this node cannot join or be attested now.
    pub(crate) async fn open(
        data: &Path,
        attestation: Attestation,
        address: Option<&str>,
        owner: Option<Owner>,
    ) -> anyhow::Result<Self> {
        let path = data.join(FILE);
        let opening = Opening { attestation, address: address.map(str::to_owned), path };
        match (Identity::read(&opening.path), owner) {
            (Ok(Some(identity)), _) if opening.is_of_another(&identity) => {
                tracing::warn!(
                    node = identity.name,
                    "the node's identity is of another installation, none of whose roots is one of this one's; the node is \
                     attested anew, and what the other one said is forgotten"
                );
                // What is to be forgotten stays until this agent alone has the folder, which may take more than one start.
                hauberk_tls::files::write_private(&data.join(ADOPTING), b"")?;
                opening.first(None).await
            }
            (Ok(Some(identity)), _) => opening.known(identity),
            (Ok(None), Some(owner)) => opening.nameless(owner, Unusable::Missing),
            (Err(error), Some(owner)) => {
                opening.nameless(owner, Unusable::Damaged(format!("{error:#}")))
            }
            (Ok(None), None) => opening.first(None).await,
            (Err(error), None) => opening.first(Some(error)).await,
        }
    }

    /// Whether there is a credential to call the control plane with.
    pub(crate) fn is_usable(&self) -> bool {
        match self.standing {
            Standing::Usable(_) => true,
            Standing::Unusable(_) => false,
        }
    }

    /// Counts up with each certificate that is put to use.
    pub(crate) fn renewals(&self) -> watch::Receiver<u64> {
        self.renewed.subscribe()
    }

    /// Takes up what is in the data folder by now: another agent, or `hauberk join`, may have kept a certificate
    /// there, and time passes. Returns whether a certificate was put to use.
    pub(crate) fn reload(&mut self) -> bool {
        let identity = match Identity::read(&self.path) {
            Ok(Some(identity)) => identity,
            Ok(None) => return false,
            // What is in memory may have been superseded by what cannot be read: whoever uses it then passes for
            // a thief.
            Err(error) => {
                self.give_up(Unusable::Damaged(format!("{error:#}")));
                return false;
            }
        };
        let serial = |credential: &Credential| credential.facts().serial();
        if let Dated::Current(kept) = &identity.credential
            && self.slot.load().is_some_and(|own| serial(&own) == serial(kept))
        {
            return false;
        }
        if let Err(error) = self.take(identity) {
            self.give_up(Unusable::Damaged(format!("{error:#}")));
        }
        self.is_usable()
    }

    pub(super) fn standing(&self) -> &Standing {
        &self.standing
    }

    /// The certificate in use has expired.
    pub(super) fn lapse(&mut self) {
        if let Some(credential) = self.slot.load() {
            self.give_up(Unusable::Lapsed(Credential::clone(&credential)));
        }
    }

    /// Whether its certificate is to be proven at once: a pod says where it is whenever its agent starts, and whoever
    /// gives a join token may know that the certificate is refused.
    pub(super) fn proves_itself_first(&self) -> bool {
        match &self.attestation {
            Attestation::Pod(_) => true,
            Attestation::Token(token) => token.is_some(),
        }
    }

    /// Asks for the next certificate, for a new key, and puts it to use. If the control plane refuses the one that
    /// there is, and somebody gave a join token, that replaces it.
    ///
    /// # Errors
    /// If it does not get one.
    pub(super) async fn renew(&mut self) -> anyhow::Result<()> {
        let turn = Turn::wait(&self.path).await?;
        let identity = match &mut self.attestation {
            Attestation::Pod(pod) => {
                let known = self.trust.load().roots().to_vec();
                enroll::attest(&turn, pod, &known, Some(&self.name)).await?
            }
            Attestation::Token(token) => {
                let answer = enroll::renew(&turn, &self.control_plane, &self.name).await?;
                match (answer, token.take()) {
                    (Answer::Issued(identity), None) => *identity,
                    (Answer::Issued(identity), Some(_)) => {
                        tracing::info!("already joined, the join token is not needed");
                        *identity
                    }
                    (Answer::Refused(error), None) => return Err(error),
                    (Answer::Refused(error), Some(token)) => {
                        let error = format!("{error:#}");
                        tracing::warn!(error, "joining anew");
                        let (address, name) = (self.address.clone(), Some(self.name.clone()));
                        enroll::join(turn, token, address, name).await?.issued()?
                    }
                }
            }
        };
        self.take(identity)
    }

    /// Tries once to get a certificate in place of one that cannot be used. Returns whether there was anything to
    /// try; [`Self::is_usable`] tells what has come of it.
    ///
    /// With its own expired certificate only the agent that has the data folder tries, `sole` then: two that do so
    /// pass for a node and a thief.
    ///
    /// # Errors
    /// If it does not get one.
    pub(super) async fn regain(&mut self, sole: bool) -> anyhow::Result<bool> {
        let turn = Turn::wait(&self.path).await?;
        // Somebody else may have been quicker.
        if self.reload() {
            return Ok(true);
        }
        let identity = match (&mut self.attestation, &self.standing) {
            (Attestation::Pod(pod), _) => {
                let known = self.trust.load().roots().to_vec();
                enroll::attest(&turn, pod, &known, Some(&self.name)).await?
            }
            (Attestation::Token(Some(given)), _) => {
                let (address, name) = (self.address.clone(), Some(self.name.clone()));
                let answer = enroll::join(turn, given.clone(), address, name).await?;
                // Good or not, it is used up.
                self.attestation = Attestation::Token(None);
                answer.issued()?
            }
            (Attestation::Token(None), Standing::Unusable(Unusable::Lapsed(lapsed))) if sole => {
                let control_plane = self.control_plane.as_lapsed(lapsed, self.trust.clone())?;
                enroll::renew(&turn, &control_plane, &self.name).await?.issued()?
            }
            (Attestation::Token(None), Standing::Unusable(_) | Standing::Usable(_)) => {
                return Ok(false);
            }
        };
        self.take(identity)?;
        Ok(true)
    }

    /// What is wrong with its certificate, and what to do about it; nothing if nothing is.
    pub(super) fn trouble(&self, now: Timestamp) -> Option<Trouble<'_>> {
        match &self.standing {
            Standing::Usable(_) => None,
            Standing::Unusable(why) => {
                let attested = match self.attestation {
                    Attestation::Pod(_) => true,
                    Attestation::Token(_) => false,
                };
                Some(Trouble { node: &self.name, attested, why, now })
            }
        }
    }

    /// Puts an identity to use, or notes that it cannot be.
    fn take(&mut self, identity: Identity) -> anyhow::Result<()> {
        if identity.id != *self.slot.id() {
            bail!("{} is of {}, and this is {}", self.path.display(), identity.id, self.slot.id());
        }
        if identity.trust.roots() != self.trust.load().roots() {
            self.trust.store(identity.trust);
        }
        self.control_plane.set_address(self.address.clone().unwrap_or(identity.control_plane));
        match identity.credential {
            Dated::Current(credential) => {
                let facts = credential.facts();
                let now = hauberk_tls::now();
                let validity = Validity::of_issued(facts.not_before(), facts.not_after(), now);
                if self.slot.store(credential).is_err() {
                    bail!("the certificate is not that of {}", self.slot.id());
                }
                self.standing = Standing::Usable(validity);
                self.renewed.send_modify(|count| *count += 1);
            }
            Dated::Lapsed(credential) => self.give_up(Unusable::Lapsed(credential)),
            Dated::Early(not_before) => self.give_up(Unusable::Early(not_before)),
        }
        Ok(())
    }

    fn give_up(&mut self, why: Unusable) {
        self.slot.clear();
        self.standing = Standing::Unusable(why);
    }
}

/// What a node is made of, before it is known which one it is.
struct Opening {
    attestation: Attestation,
    address: Option<String>,
    path: PathBuf,
}

impl Opening {
    /// Whether an identity is of another installation than the one that this pod is part of: where one root follows another,
    /// both are known for a while. One that slept through all of that has nothing that could be used, and is attested anew,
    /// too.
    fn is_of_another(&self, identity: &Identity) -> bool {
        let Attestation::Pod(pod) = &self.attestation else { return false };
        // Who is to be attested says what is wrong with them.
        let roots = enroll::roots(&pod.roots).unwrap_or_default();
        let known = &identity.roots;
        !known.is_empty() && !roots.is_empty() && !known.iter().any(|root| roots.contains(root))
    }

    fn known(self, identity: Identity) -> anyhow::Result<Node> {
        let trust = TrustBundle::nobody(identity.id.trust_domain().clone());
        let id = identity.id.clone();
        let mut node = self.build(identity.name.clone(), id, trust, Unusable::Missing)?;
        node.take(identity)?;
        Ok(node)
    }

    /// By the state on disk, without an identity that can be read.
    fn nameless(self, owner: Owner, why: Unusable) -> anyhow::Result<Node> {
        let id = SpiffeId::node(&owner.trust_domain, &owner.node)?;
        let trust = TrustBundle::nobody(owner.trust_domain);
        self.build(owner.node, id, trust, why)
    }

    /// A machine of which nothing is known joins, or is attested, before anything else.
    async fn first(self, unreadable: Option<anyhow::Error>) -> anyhow::Result<Node> {
        if let Some(error) = &unreadable {
            let error = format!("{error:#}");
            tracing::warn!(error, "the node's identity cannot be used");
        }
        let identity = match &self.attestation {
            Attestation::Pod(pod) => attest_first(pod, &self.path).await?,
            Attestation::Token(Some(token)) => {
                let turn = Turn::wait(&self.path).await?;
                enroll::join(turn, token.clone(), self.address.clone(), None).await?.issued()?
            }
            Attestation::Token(None) => {
                return Err(match unreadable {
                    Some(error) => error.context(
                        "the node's identity cannot be used; join anew with a token \
                         (`hauberk token create` on the control plane)",
                    ),
                    None => anyhow::anyhow!(
                        "this machine has not joined: start with --join-token TOKEN \
                         (`hauberk token create` on the control plane makes one)"
                    ),
                });
            }
        };
        tracing::info!(node = identity.name, "joined");
        let attestation = match self.attestation {
            Attestation::Token(_) => Attestation::Token(None),
            pod @ Attestation::Pod(_) => pod,
        };
        Self { attestation, ..self }.known(identity)
    }

    fn build(
        self,
        name: String,
        id: SpiffeId,
        trust: TrustBundle,
        why: Unusable,
    ) -> anyhow::Result<Node> {
        let (slot, trust) = (CredentialSlot::new(id), TrustSlot::new(trust));
        let renewed = watch::channel(0).0;
        let address = self.address.clone().unwrap_or_default();
        let (calling, renewals) = (slot.clone(), renewed.subscribe());
        Ok(Node {
            name,
            control_plane: ControlPlane::new(address, calling, renewals, trust.clone())?,
            slot,
            trust,
            standing: Standing::Unusable(why),
            attestation: self.attestation,
            address: self.address,
            path: self.path,
            renewed,
        })
    }
}

/// Lets `forget` take away what the data folder has of another installation, if it has; for whoever has the folder alone.
///
/// # Errors
/// If it fails, or what says so cannot be removed. Then it is tried again at the next start.
pub(crate) fn forget_another(
    data: &Path,
    forget: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let path = data.join(ADOPTING);
    if !path.exists() {
        return Ok(());
    }
    forget()?;
    std::fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
}

/// Attests a node of which nothing is known. Tries for a while.
async fn attest_first(pod: &PodToken, path: &Path) -> anyhow::Result<Identity> {
    let since = Instant::now();
    loop {
        let turn = Turn::wait(path).await?;
        let error = match enroll::attest(&turn, pod, &[], None).await {
            Ok(identity) => return Ok(identity),
            Err(error) => error,
        };
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

/// Joins for an agent that runs on this data folder and has no identity that it can use: it takes up what is kept
/// there. Returns the node's name; nothing if that agent's identity is good.
///
/// # Errors
/// If the token is refused, is for another node, or its answer cannot be kept.
pub(crate) async fn join_for_another(
    data: &Path,
    token: &JoinToken,
    address: Option<&str>,
    owner: Option<Owner>,
) -> anyhow::Result<Option<String>> {
    let path = data.join(FILE);
    let turn = Turn::wait(&path).await?;
    let name = match Identity::read(&path) {
        Ok(Some(Identity { credential: Dated::Current(_), .. })) => return Ok(None),
        Ok(Some(identity)) => Some(identity.name),
        Ok(None) | Err(_) => owner.map(|owner| owner.node),
    };
    let answer = enroll::join(turn, token.clone(), address.map(str::to_owned), name).await?;
    Ok(Some(answer.issued()?.name))
}
