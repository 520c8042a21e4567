//! Permission to forward, as a value: nothing is forwarded without a [`Permit`], and only the decision
//! makes one.

use std::{sync::Arc, time::Duration};

use hauberk_core::{
    identity::SpiffeId,
    policy::{
        Allowed, Denial, Mode, ProcessSelector, Reason, Request, Verdict, resolve::MeshWorkload,
    },
    time::Timestamp,
};
use tokio::sync::watch;

use crate::policy::Snapshot;

/// For how long another agent may know something that this one does not know yet.
const NEWS: Duration = Duration::from_secs(1);

/// One edge that was allowed, or let through because its destination is only audited.
pub(crate) struct Permit {
    source: SpiffeId,
    destination: SpiffeId,
    port: u16,
    verdict: Arc<Permitted>,
    revision: u64,
}

/// What the permit rests on.
pub(crate) enum Permitted {
    Allowed(Allowed),
    Audited(Denial),
}

/// Asks the one decision.
pub(crate) fn check(
    snapshot: &Snapshot,
    source: &SpiffeId,
    destination: &SpiffeId,
    port: u16,
) -> Result<Permit, Denial> {
    if snapshot.revision == 0 {
        return Err(not_ready("the agent has no policy yet"));
    }
    let request = Request { source, destination, port, now: hauberk_tls::now() };
    let verdict = match snapshot.table.decide(request) {
        Verdict::Allow(allowed) => Permitted::Allowed(allowed),
        Verdict::WouldDeny(denial) => Permitted::Audited(denial),
        Verdict::Deny(denial) => return Err(denial),
    };
    Ok(Permit {
        source: source.clone(),
        destination: destination.clone(),
        port,
        verdict: Arc::new(verdict),
        revision: snapshot.revision,
    })
}

impl Permit {
    pub(crate) fn verdict(&self) -> &Arc<Permitted> {
        &self.verdict
    }

    pub(crate) fn revision(&self) -> u64 {
        self.revision
    }

    /// When the permission ends by itself.
    pub(crate) fn until(&self) -> Option<Timestamp> {
        match self.verdict.as_ref() {
            Permitted::Allowed(allowed) => allowed.until,
            Permitted::Audited(_) => None,
        }
    }

    /// The question that it answers, without the answer.
    pub(crate) fn asked(&self) -> Asked {
        Asked {
            source: self.source.clone(),
            destination: self.destination.clone(),
            port: self.port,
        }
    }

    /// Asks again, for a newer state or a later time.
    pub(crate) fn renew(&self, snapshot: &Snapshot) -> Result<Self, Denial> {
        check(snapshot, &self.source, &self.destination, self.port)
    }
}

/// A connection without TLS may go on, although no policy can allow it. Only [`pass_audited`], [`pass_probe`] and
/// [`pass_let_go`] make one.
pub(crate) struct Pass(Why);

/// Why it may.
pub(crate) enum Why {
    /// The workload is only audited; this is why it would be denied.
    Audited(Denial),
    /// The node's kubelet sees whether the pod is well, on this port.
    Probe(u16),
    /// The workload is not in the mesh any more.
    LetGo,
}

impl Pass {
    pub(crate) fn why(&self) -> &Why {
        &self.0
    }

    /// Whether it is still good for the workload, as it is now.
    pub(crate) fn holds(&self, workload: &MeshWorkload) -> bool {
        match &self.0 {
            // One that was let go may be back.
            Why::Audited(_) | Why::LetGo => workload.mode == Mode::Audit,
            Why::Probe(port) => probes(workload, *port),
        }
    }
}

/// Lets a connection to a declared probe port pass whose other end is a socket of the node's own network. An
/// address would not do: what comes from outside through a NodePort has the node's, too. Nothing tells the
/// kubelet from other processes there.
pub(crate) fn pass_probe(
    snapshot: &Snapshot,
    workload: &MeshWorkload,
    port: u16,
    from_node: impl FnOnce() -> bool,
) -> Option<Pass> {
    (snapshot.revision > 0 && probes(workload, port) && from_node())
        .then_some(Pass(Why::Probe(port)))
}

fn probes(workload: &MeshWorkload, port: u16) -> bool {
    match &workload.process {
        ProcessSelector::Pod { probe_ports, .. } => probe_ports.contains(&port),
        ProcessSelector::User(_)
        | ProcessSelector::Cgroup(_)
        | ProcessSelector::NetworkNamespace { .. } => false,
    }
}

/// Lets the connection pass if the workload of this node is only audited; else the denial stands.
pub(crate) fn pass_audited(
    snapshot: &Snapshot,
    workload: &MeshWorkload,
    denial: Denial,
) -> Result<Pass, Denial> {
    match workload.mode {
        Mode::Audit if snapshot.revision > 0 => Ok(Pass(Why::Audited(denial))),
        Mode::Audit | Mode::Enforce => Err(denial),
    }
}

/// Lets the connection pass if the workload of this node has left the mesh, whose rules do not know yet.
pub(crate) fn pass_let_go(
    snapshot: &Snapshot,
    node: &str,
    workload: &MeshWorkload,
) -> Option<Pass> {
    snapshot.has_let_go(node, workload).then_some(Pass(Why::LetGo))
}

/// Whether a workload can leave the mesh while it lives, which only its namespace's label makes happen.
pub(crate) fn may_leave(workload: &MeshWorkload) -> bool {
    matches!(workload.process, ProcessSelector::Pod { .. })
}

/// The same as [`pass_let_go`], if it becomes known within the time by which another agent may be ahead of this one.
pub(crate) async fn left_soon(
    snapshots: &mut watch::Receiver<Arc<Snapshot>>,
    node: &str,
    workload: &MeshWorkload,
) -> Option<Pass> {
    let left = async {
        loop {
            let snapshot = snapshots.borrow_and_update().clone();
            if let Some(pass) = pass_let_go(&snapshot, node, workload) {
                return Some(pass);
            }
            snapshots.changed().await.ok()?;
        }
    };
    tokio::time::timeout(NEWS, left).await.ok().flatten()
}

/// What was asked once. Not a permission.
pub(crate) struct Asked {
    source: SpiffeId,
    destination: SpiffeId,
    port: u16,
}

impl Asked {
    /// Whether it would be allowed now.
    pub(crate) fn is_allowed(&self, snapshot: &Snapshot) -> bool {
        check(snapshot, &self.source, &self.destination, self.port).is_ok()
    }
}

/// A denial that no policy made.
pub(crate) fn without_policy(reason: Reason, mend: impl Into<String>) -> Denial {
    Denial { reason, policy: None, owner: None, nearest_miss: None, mend: mend.into() }
}

pub(crate) fn not_ready(why: &str) -> Denial {
    without_policy(Reason::NotReady, format!("{why}; `hauberk status` shows what is missing"))
}
