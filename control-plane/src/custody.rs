//! Keeps the CA: takes up one that somebody brings when it is renewed, and passes from one root to the next
//! without a refused connection. Certificates are issued under a root only when every agent knows it, and it
//! is trusted until the last of them has ended; see [`Roots`]. What is wrong stops nothing that works.

mod agree;
mod keep;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use hauberk_core::{identity::TrustDomain, time::Timestamp};
use hauberk_telemetry::{Health, State as HealthState};
use hauberk_tls::{files::read_private, sha256};
use rustls_pki_types::CertificateDer;
use zeroize::Zeroize;

use crate::ca::{self, Authority, Brought, Roots, Signer, open_own, own_exists};

pub(crate) use keep::Keep;
use keep::in_time;

/// The name of the health check.
pub(crate) const HEALTH_CHECK: &str = "certificate_authority";

/// What is known of the roots, in the data folder.
const ROOTS_FILE: &str = "roots.json";

/// How far clocks may be apart in any case: an answer takes some seconds, and tells whole ones.
const LEAST_TOLERANCE: Duration = Duration::from_secs(10);

/// Between two looks of a replica that cannot issue yet.
const WAITING_PACE: Duration = Duration::from_secs(2);

/// Where the CA comes from.
pub(crate) enum Source {
    /// The control plane makes it itself, in this folder.
    Own(PathBuf),
    /// Somebody brings it, in a folder.
    Folder(PathBuf),
    /// Somebody brings it, in a Secret of this name.
    Secret(hauberk_kubernetes::Shared, String),
}

/// How long certificates live, and how often one looks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    /// Between two looks.
    pub(crate) look: Duration,
    /// The longest life of a certificate.
    pub(crate) lifetime: Duration,
}

impl Pace {
    /// How far a certificate of now reaches. Some looks more than its life: for so long another replica may
    /// not have heard of a new root, and issue without a word of it.
    fn reach(self) -> Duration {
        self.lifetime.saturating_add(self.look.saturating_mul(4))
    }

    /// How far a clock may be from the API server's. A look is within what certificates reach further.
    fn tolerance(self) -> Duration {
        self.look.max(LEAST_TOLERANCE)
    }
}

/// Whoever has this decides what issues.
pub(crate) struct Custody {
    trust_domain: TrustDomain,
    source: Source,
    keep: Keep,
    pace: Pace,
    roots: Roots,
    wanted: Option<Wanted>,
    /// The SHA-256 of what was brought and taken up last.
    taken: Option<[u8; 32]>,
    /// Roots that were wanted until something else was brought; the other replicas do not know yet.
    dropped: Vec<CertificateDer<'static>>,
    /// How far this clock was ahead of the API server's, where that was too far.
    ahead: Duration,
    /// When it was first seen that nobody remembers the roots.
    lost_since: Option<Timestamp>,
    published: Vec<CertificateDer<'static>>,
    told: Vec<String>,
}

/// The CA that is to issue.
struct Wanted {
    ca: Ca,
    /// Whether it does.
    issues: bool,
}

enum Ca {
    Own(PathBuf, CertificateDer<'static>),
    Brought(Arc<Brought>),
}

/// What one look has found.
pub(crate) struct Look {
    /// What agents are to trust.
    pub(crate) roots: Vec<CertificateDer<'static>>,
    /// What is to issue from now on, if that is another one.
    pub(crate) signer: Option<Signer>,
    /// What somebody should mend.
    pub(crate) problems: Vec<anyhow::Error>,
    /// What only takes its time.
    pub(crate) waiting: Option<String>,
}

impl Look {
    /// Puts it into force: first what to trust, then what issues. Returns whether another one does.
    pub(crate) fn put(self, authority: &Authority) -> bool {
        if !self.roots.is_empty() && *authority.roots() != self.roots {
            authority.trust(self.roots);
        }
        let another = self.signer.is_some();
        if let Some(signer) = self.signer {
            authority.put(signer);
        }
        another
    }
}

impl Wanted {
    fn new(ca: Ca) -> Self {
        Self { ca, issues: false }
    }

    fn root(&self) -> &CertificateDer<'static> {
        match &self.ca {
            Ca::Own(_, root) => root,
            Ca::Brought(brought) => brought.root(),
        }
    }

    /// From when nobody whose clock is behind refuses it.
    fn settled_from(&self) -> Timestamp {
        match &self.ca {
            // Its certificates begin in the past.
            Ca::Own(..) => Timestamp::MIN,
            Ca::Brought(brought) => brought.settled_from(),
        }
    }

    fn signer(&self, trust_domain: &TrustDomain, now: Timestamp) -> Result<Signer, ca::CaError> {
        match &self.ca {
            Ca::Own(folder, _) => open_own(folder, trust_domain, now),
            Ca::Brought(brought) => brought.signer(trust_domain, now),
        }
    }
}

impl Custody {
    pub(crate) fn new(trust_domain: TrustDomain, source: Source, keep: Keep, pace: Pace) -> Self {
        Self {
            trust_domain,
            source,
            keep,
            pace,
            roots: Roots::default(),
            wanted: None,
            taken: None,
            dropped: Vec::new(),
            ahead: Duration::ZERO,
            lost_since: None,
            published: Vec::new(),
            told: Vec::new(),
        }
    }

    /// That of a control plane that is alone, with its data folder, and the folder of a CA if one is brought.
    pub(crate) fn alone(
        trust_domain: TrustDomain,
        data: &Path,
        brought: Option<&Path>,
        pace: Pace,
        now: Timestamp,
    ) -> anyhow::Result<Self> {
        let (own, file) = (data.join("ca"), data.join(ROOTS_FILE));
        let first = !file.exists();
        let (source, keep) = match brought {
            None if first => (Source::Own(own.clone()), Keep::Nowhere),
            None => (Source::Own(own.clone()), Keep::File(file)),
            Some(folder) => (Source::Folder(folder.to_owned()), Keep::File(file)),
        };
        let mut custody = Self::new(trust_domain, source, keep, pace);
        // What was issued under the own root until now is trusted until it has ended, and the own CA goes
        // on until every agent knows the root that was brought.
        if brought.is_some() && first && own_exists(&own) {
            let signer = open_own(&own, &custody.trust_domain, now)?;
            custody.roots.need(signer.root(), now, pace.reach());
            if let Some(handover) = signer.hand_over() {
                custody.roots.offer(signer.root(), handover);
            }
        }
        Ok(custody)
    }

    /// Between two looks.
    pub(crate) fn pace(&self) -> Duration {
        self.pace.look
    }

    /// Waits until there is something to issue with. Alone, what is wrong is told at once, and ends it; in a
    /// cluster it may be mended while this waits.
    pub(crate) async fn begin(&mut self, health: &Health) -> anyhow::Result<Authority> {
        loop {
            let look = self.look(None, hauberk_tls::now()).await;
            let notes = self.tell(&look);
            if let Some(signer) = look.signer {
                let authority = Authority::new(self.trust_domain.clone(), signer);
                authority.trust(look.roots);
                authority.note(notes);
                return Ok(authority);
            }
            let in_cluster = matches!(self.keep, Keep::Cluster(_));
            if let Some(problem) = look.problems.into_iter().next().filter(|_| !in_cluster) {
                return Err(problem);
            }
            health.set(HEALTH_CHECK, HealthState::NotReady(notes.join("; ")));
            tokio::time::sleep(WAITING_PACE.min(self.pace.look)).await;
        }
    }

    /// Looks at what was brought and at what the other replicas say, and decides what issues, given what
    /// does so now.
    pub(crate) async fn look(&mut self, active: Option<&Signer>, now: Timestamp) -> Look {
        let began = Instant::now();
        let mut problems = Vec::new();
        if let Err(error) = self.refresh(now).await {
            let what = self.described();
            problems.push(error.context(format!("{what} is not taken up")));
        }
        if let Err(error) = self.agree(active, now, began).await {
            problems.push(error.context("agree on the roots that agents trust"));
        }
        let signer = self.choose(active, now).unwrap_or_else(|error| {
            problems.push(error);
            None
        });
        let roots = self.roots.certificates(now);
        let issues = signer.is_some() || active.is_some_and(|active| active.is_good(now));
        Look { roots, signer, problems, waiting: self.waiting(issues) }
    }

    /// Logs what is new, and returns all of it for people.
    pub(crate) fn tell(&mut self, look: &Look) -> Vec<String> {
        let problems: Vec<String> =
            look.problems.iter().map(|problem| format!("{problem:#}")).collect();
        for problem in problems.iter().filter(|problem| !self.told.contains(problem)) {
            tracing::error!(error = problem, "the CA needs somebody");
        }
        for note in look.waiting.iter().filter(|note| !self.told.contains(note)) {
            tracing::info!(note, "the CA waits");
        }
        let all: Vec<String> = problems.into_iter().chain(look.waiting.clone()).collect();
        self.told.clone_from(&all);
        all
    }

    fn described(&self) -> String {
        match &self.source {
            Source::Own(folder) => format!("the own CA in {}", folder.display()),
            Source::Folder(folder) => format!("the CA in {} (--ca)", folder.display()),
            Source::Secret(_, name) => format!("the CA in the Secret {name} (ca.existingSecret)"),
        }
    }

    /// Looks at what is to issue. After an error it is what it was before.
    async fn refresh(&mut self, now: Timestamp) -> anyhow::Result<()> {
        let mut files = match &self.source {
            Source::Own(_) if self.wanted.is_some() => return Ok(()),
            Source::Own(folder) => {
                let root = open_own(folder, &self.trust_domain, now)?.root().clone();
                self.wanted = Some(Wanted::new(Ca::Own(folder.clone(), root)));
                return Ok(());
            }
            Source::Folder(folder) => folder_files(folder)?,
            Source::Secret(shared, name) => in_time(shared.brought_ca(name))
                .await?
                .context("there is no such Secret; make it, or mend the name")?,
        };
        let digest = digest(&files);
        let news = self.taken != Some(digest);
        let brought = news.then(|| Brought::read(&files, &self.trust_domain, now));
        files.values_mut().for_each(Zeroize::zeroize);
        if let Some(brought) = brought.transpose()? {
            self.taken = Some(digest);
            let before = self.wanted.replace(Wanted::new(Ca::Brought(brought)));
            self.dropped.extend(before.map(|before| before.root().clone()));
        }
        Ok(())
    }

    /// What issues from now on, if another one may, or has to.
    fn choose(
        &mut self,
        active: Option<&Signer>,
        now: Timestamp,
    ) -> anyhow::Result<Option<Signer>> {
        let active = active.filter(|active| active.is_good(now));
        // What is over by one clock alone may not be.
        let surely = now.saturating_sub(self.ahead);
        if let Some(wanted) = self.wanted.as_mut().filter(|wanted| !wanted.issues) {
            let known = self.roots.known_from(wanted.root()).is_some_and(|from| from <= surely);
            if known && (active.is_none() || wanted.settled_from() <= surely) {
                let signer = wanted.signer(&self.trust_domain, now)?;
                // One that has ended meanwhile takes no other's place.
                if !signer.is_good(now) {
                    return Err(ca::CaError::Ended(signer.not_after()).into());
                }
                wanted.issues = true;
                tracing::info!(root = hex::encode(sha256(signer.root())), "the CA issues");
                return Ok(Some(signer));
            }
        }
        if active.is_some() {
            return Ok(None);
        }
        for (root, handover) in self.roots.handed_over(surely) {
            match handover.signer(&root, &self.trust_domain, now) {
                Ok(signer) => return Ok(Some(signer)),
                Err(error) => tracing::warn!(
                    error = crate::policy::chain(&error),
                    "what another replica handed over cannot be used"
                ),
            }
        }
        Ok(None)
    }

    /// Why what is wanted does not issue yet.
    fn waiting(&self, issues: bool) -> Option<String> {
        let wanted = self.wanted.as_ref().filter(|wanted| !wanted.issues)?;
        let from = self.roots.known_from(wanted.root())?.max(wanted.settled_from());
        let what = self.described();
        let meanwhile = if issues {
            "certificates are issued as before"
        } else {
            "nothing is issued by this replica, since none that can has handed anything over"
        };
        Some(format!(
            "{what} issues from {from} on, when every agent takes what it issues; until then {meanwhile}"
        ))
    }
}

/// The files of a CA that somebody brings. The key has to be private.
fn folder_files(folder: &Path) -> anyhow::Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    if let Some(key) = read_private(&folder.join(ca::KEY))? {
        files.insert(ca::KEY.to_owned(), key);
    }
    for name in [ca::CERTIFICATE, ca::ROOTS] {
        let path = folder.join(name);
        match fs::read(&path) {
            Ok(bytes) => drop(files.insert(name.to_owned(), bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error).with_context(|| format!("read {}", path.display()));
            }
        }
    }
    Ok(files)
}

/// Names the very bytes of some files.
fn digest(files: &BTreeMap<String, Vec<u8>>) -> [u8; 32] {
    let mut digests = Vec::new();
    for (name, bytes) in files {
        digests.extend(sha256(name.as_bytes()));
        digests.extend(sha256(bytes));
    }
    sha256(&digests)
}

#[cfg(test)]
mod tests;
