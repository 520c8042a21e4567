//! How the replicas of a control plane agree on the roots: each reads what is kept, adds what it needs, writes it
//! unless somebody else has meanwhile, and publishes what agents are told of. Alone, one agrees with a file.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use hauberk_core::time::Timestamp;
use hauberk_kubernetes::PublishedRoots;
use rustls_pki_types::{CertificateDer, pem::PemObject};

use super::{Custody, Keep, Wanted};
use crate::{
    ca::{Roots, Signer},
    kubernetes::pem,
};

/// How often one tries to agree while other replicas write, too.
const ATTEMPTS: usize = 8;

impl Custody {
    /// Tells the other replicas what this one needs, hears what they need, and publishes it.
    pub(super) async fn agree(
        &mut self,
        active: Option<&Signer>,
        now: Timestamp,
        began: Instant,
    ) -> anyhow::Result<()> {
        // Others have had time when this one has seen for as long that nobody did: a look that failed saw nothing.
        let lost_since = self.lost_since.take();
        let complaint = self.compare_clocks(now, began).await?;
        for _ in 0..ATTEMPTS {
            // Read before the roots are, so that what is written in its place is of what was known later: no
            // older word takes the place of a newer one.
            let published = self.keep.published().await?;
            let kept = self.keep.kept().await?;
            let read = kept.as_ref().map(|kept| Roots::read(&kept.bytes)).transpose().context(
                "delete the Secret hauberk-roots, or the file roots.json: it is written anew from what \
                 this replica knows",
            )?;
            // Who has nothing to say, or is not to say it, hears all the same: what is issued here comes with a
            // word of every root.
            let is_mute = complaint.is_some() || (active.is_none() && self.wanted.is_none());
            if is_mute {
                if let Some(mut read) = read {
                    // Not written, and yet to be trusted by whoever gets a certificate under it.
                    if let Some(active) = active
                        && read.known_from(active.root()).is_none()
                    {
                        read.need(active.root(), now, self.pace.reach());
                    }
                    self.roots = read;
                }
                return complaint.map_or(Ok(()), |complaint| Err(anyhow::Error::msg(complaint)));
            }
            let mut roots = match read.clone().filter(|read| !read.is_empty()) {
                Some(read) => read,
                None if self.roots.is_empty() => {
                    self.begin_anew(published.as_ref(), lost_since, now)?
                }
                None => self.roots.clone(),
            };
            self.settle(&mut roots, active, now);
            if read.as_ref() != Some(&roots) && !self.keep.write(&roots, kept).await? {
                continue;
            }
            self.roots = roots;
            self.dropped.clear();
            if self.publish(published, now).await? {
                return Ok(());
            }
        }
        bail!("other replicas write at the same time, again and again; it is tried again");
    }

    /// Says what is wrong if the clock here is not that of the API server, as nearly as it has to be. A time that
    /// is written by a wrong one would count for all replicas.
    async fn compare_clocks(
        &mut self,
        now: Timestamp,
        began: Instant,
    ) -> anyhow::Result<Option<String>> {
        let Some(theirs) = self.keep.time().await? else { return Ok(None) };
        let (ours, tolerance) = (now.saturating_add(began.elapsed()), self.pace.tolerance());
        let (ahead, behind) = (ours.since(theirs), theirs.since(ours));
        self.ahead = if ahead > tolerance { ahead } else { Duration::ZERO };
        let which = match (ahead > tolerance, behind > tolerance) {
            (false, false) => return Ok(None),
            (true, _) => "ahead of",
            (false, true) => "behind",
        };
        Ok(Some(format!(
            "the clock here is more than {} s {which} the Kubernetes API server's; set it right: until then this \
             replica says nothing of the roots that it needs, and takes up no other one",
            tolerance.as_secs()
        )))
    }

    /// What to begin with where nothing is kept and this replica remembers nothing. Agents know of roots that are
    /// forgotten, and have certificates under them. What is published tells of those, but nobody takes roots
    /// from there: more may write it. So it only says whether the root that is wanted is the one they all
    /// have; any other waits until everything has ended.
    fn begin_anew(
        &mut self,
        published: Option<&PublishedRoots>,
        lost_since: Option<Timestamp>,
        now: Timestamp,
    ) -> anyhow::Result<Roots> {
        let mut roots = Roots::default();
        let Some(published) = published else { return Ok(roots) };
        let since = lost_since.unwrap_or(now);
        let others_had_time = now.since(since) >= self.pace.look.saturating_mul(2);
        if !others_had_time {
            self.lost_since = Some(since);
            bail!(
                "the Secret hauberk-roots is gone; replicas that run write it anew within a minute, or else \
                 this one does"
            );
        }
        if let Some(wanted) = &self.wanted
            && !is_alone_in(published.pem(), wanted.root())
        {
            roots.start_over(wanted.root(), now, self.pace.reach());
        }
        Ok(roots)
    }

    fn settle(&self, roots: &mut Roots, active: Option<&Signer>, now: Timestamp) {
        let wanted = self.wanted.as_ref().map(Wanted::root);
        // What issues comes first: if nothing is known, it is what agents know.
        let needed: Vec<_> = active.map(Signer::root).into_iter().chain(wanted).collect();
        roots.bound(now);
        // By the clock of every replica.
        let surely = now.saturating_add(self.pace.tolerance().saturating_mul(2));
        for root in self.dropped.iter().filter(|root| !needed.contains(root)) {
            roots.forget(root, surely);
        }
        for root in &needed {
            roots.need(root, now, self.pace.reach());
        }
        // A control plane that is alone hands over to itself: it may be started with another CA, and no other
        // goes on with this one meanwhile.
        let alone = matches!(self.keep, Keep::File(_));
        if let Some(active) = active
            && let Some(handover) = active.hand_over()
        {
            if alone {
                roots.replace(active.root(), handover);
            } else if roots.is_changing(now) {
                roots.offer(active.root(), handover);
            }
        }
        roots.retire(&needed, now);
        if !alone && !roots.is_changing(now) {
            roots.withdraw();
        }
    }

    /// Tells agents that have no identity yet which roots the control plane may have. Returns whether nobody else
    /// has meanwhile.
    async fn publish(
        &mut self,
        read: Option<PublishedRoots>,
        now: Timestamp,
    ) -> anyhow::Result<bool> {
        let roots = self.roots.certificates(now);
        let text: String = roots.iter().map(|root| pem(root)).collect();
        let is_told = match &read {
            Some(read) => read.pem() == text,
            // Who deletes it does so to begin with another root.
            None => roots == self.published,
        };
        let is_done = text.is_empty() || is_told || self.keep.publish(&text, read).await?;
        if is_done {
            self.published = roots;
        }
        Ok(is_done)
    }
}

/// Whether some certificates are this root and nothing else.
fn is_alone_in(pem: &str, root: &CertificateDer<'_>) -> bool {
    let listed: Result<Vec<CertificateDer<'static>>, _> =
        CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    listed.is_ok_and(|listed| matches!(listed.as_slice(), [only] if only.as_ref() == root.as_ref()))
}
