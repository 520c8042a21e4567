//! Connections that are older than the capture rules and go on in clear: counted, told of for `hauberk learn`, and
//! closed some time after their workload is enforced.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context as _;
use hauberk_core::{
    learn::{Edge, End, Outcome},
    policy::Mode,
};
use hauberk_linux::{
    capture::{Connection, OpenOlder, open_older},
    sockets::destroy,
};

use super::{Locals, guard::Site, uncaptured};
use crate::{
    config::OlderConnections,
    context::{Context, Local},
    policy::{Found, Snapshot},
};

/// One on which nobody has waited for an answer for so long is closed first: that harms its application least.
const IDLE: Duration = Duration::from_secs(1);

/// How long one that is never idle is spared, once it is time to close.
const BUSY_GRACE: Duration = Duration::from_secs(10);

/// At least so long between two looks that miss a connection, before it counts as over.
const BETWEEN: Duration = Duration::from_secs(1);

/// What there is of a workload's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct OlderCount {
    pub(super) open: u64,
    /// When it is time to close them, if it ever is.
    pub(super) closed_from: Option<SystemTime>,
}

/// The older connections of one place.
#[derive(Default)]
pub(super) struct Older {
    /// Those that are open.
    noted: HashMap<Connection, Noted>,
    /// Those that were not found at the last look.
    missing: HashSet<Connection>,
    /// When that was.
    looked: Option<Instant>,
    /// By the workloads' keys: since when it has had such connections while enforced.
    enforced: HashMap<String, (Instant, SystemTime)>,
    /// Why one could not be closed.
    unclosable: Option<String>,
}

/// What is known of one.
#[derive(Default)]
struct Noted {
    /// The key of its workload. It is not looked up each time: that may ask for users and walk through cgroups.
    owner: Option<String>,
    /// As it was first seen: whoever listens may stop before its connections end.
    incoming: Option<bool>,
    /// What was told of it. Its caller may become known later.
    edge: Option<Edge>,
}

impl Older {
    /// Looks after them: notes edges for the new ones, and closes what is to be closed. Returns how many are open, by
    /// the workloads' keys. Asks the kernel.
    ///
    /// # Errors
    /// If the kernel cannot be asked, or does not know: then nothing has changed.
    pub(super) fn look(
        &mut self,
        context: &Context,
        site: &Site,
        locals: &Locals,
    ) -> anyhow::Result<BTreeMap<String, OlderCount>> {
        let open = site.call(open_older)?.context("the capture rules are not in place")?;
        let snapshot = context.snapshot();
        let mut before = std::mem::take(&mut self.noted);
        let mut of_workloads: BTreeMap<String, (Arc<Local>, Vec<OpenOlder>)> = BTreeMap::new();
        for mut one in open {
            let ends = Connection::of(&one.socket);
            let mut noted = before.remove(&ends).unwrap_or_default();
            one.incoming = *noted.incoming.get_or_insert(one.incoming);
            let known = noted.owner.as_ref().and_then(|key| locals.get(key));
            let local = known.or_else(|| uncaptured::owner(locals, &one.socket, one.incoming));
            noted.owner = local.as_ref().map(|local| local.workload.key());
            if let Some(local) = local {
                // Its address may be another's by the time it is looked at again: who was known stays who it was.
                let is_known = noted.edge.as_ref().is_some_and(|edge| edge.identities().is_some());
                let edge = edge(&snapshot, &local, &one).filter(|edge| {
                    noted.edge.is_none() || (!is_known && edge.identities().is_some())
                });
                if let Some(edge) = edge {
                    context.edges.note(edge.clone(), hauberk_tls::now());
                    noted.edge = Some(edge);
                }
                let entry = of_workloads.entry(local.workload.key());
                entry.or_insert_with(|| (local, Vec::new())).1.push(one);
            }
            self.noted.insert(ends, noted);
        }
        self.enforced.retain(|key, _| of_workloads.contains_key(key));
        let mut counts = BTreeMap::new();
        for (key, (local, all)) in of_workloads {
            let open = u64::try_from(all.len()).unwrap_or(u64::MAX);
            let closed_from = match self.due(context.older_connections, &key, &local, open) {
                None => None,
                Some((due, closed_from)) => {
                    if due <= Instant::now() {
                        self.close(context, site, &local, all, due);
                    }
                    Some(closed_from).filter(|_| self.unclosable.is_none())
                }
            };
            counts.insert(key, OlderCount { open, closed_from });
        }
        Ok(counts)
    }

    /// Which of these may be over: two looks have not found them. One may miss what changes meanwhile.
    pub(super) fn over(&mut self, known: &[Connection]) -> HashSet<Connection> {
        if self.looked.is_some_and(|last| last.elapsed() < BETWEEN) {
            return HashSet::new();
        }
        self.looked = Some(Instant::now());
        let open = &self.noted;
        let is_missing = |one: &Connection| !open.contains_key(one);
        let missing: HashSet<_> = known.iter().copied().filter(is_missing).collect();
        let over = missing.intersection(&self.missing).copied().collect();
        self.missing = missing;
        over
    }

    /// Closes those that are idle, and those that have had their time.
    fn close(
        &mut self,
        context: &Context,
        site: &Site,
        local: &Local,
        all: Vec<OpenOlder>,
        due: Instant,
    ) {
        let over = due.elapsed() >= BUSY_GRACE;
        for one in all {
            if !over && one.idle().is_none_or(|idle| idle < IDLE) {
                continue;
            }
            let socket = one.socket.clone();
            match site.call(move || destroy(&socket)) {
                Ok(()) => {
                    self.unclosable = None;
                    uncaptured::older(context, local, &one);
                }
                Err(error) => {
                    let error = format!("{error:#}");
                    if self.unclosable.as_ref() != Some(&error) {
                        tracing::error!(
                            workload = local.workload.key(),
                            error,
                            "connections that are older than the capture cannot be closed, and go on in clear"
                        );
                    }
                    self.unclosable = Some(error);
                }
            }
        }
    }

    /// When those of a workload are to be closed, if ever.
    fn due(
        &mut self,
        what: OlderConnections,
        key: &str,
        local: &Local,
        open: u64,
    ) -> Option<(Instant, SystemTime)> {
        if local.workload.mode != Mode::Enforce {
            self.enforced.remove(key);
            return None;
        }
        let OlderConnections::CloseAfter(after) = what else {
            let now = (Instant::now(), SystemTime::now());
            if self.enforced.insert(key.to_owned(), now).is_none() {
                tracing::warn!(
                    workload = key,
                    open,
                    "is enforced, and has connections that are older than its capture; they go on in clear"
                );
            }
            return None;
        };
        let (since, at) = *self.enforced.entry(key.to_owned()).or_insert_with(|| {
            tracing::warn!(
                workload = key,
                open,
                closed_after = ?after,
                "is enforced, and has connections that are older than its capture; they go on in clear until they are closed"
            );
            (Instant::now(), SystemTime::now())
        });
        Some((since.checked_add(after)?, at.checked_add(after)?))
    }
}

/// Who calls whom, as far as addresses tell, and if this end is the one to tell it: the destination's within the mesh.
fn edge(snapshot: &Snapshot, local: &Local, one: &OpenOlder) -> Option<Edge> {
    let remote = one.socket.remote;
    let own = End::Identity(local.workload.identity.clone());
    let (source, destination, port) = if one.incoming {
        (at(snapshot, remote), own, one.socket.local.port())
    } else {
        let is_known = snapshot.service(remote).is_some()
            || matches!(snapshot.find(remote), Found::Workload(_) | Found::UndeclaredPort);
        if is_known {
            return None;
        }
        (own, End::Address(remote.ip()), remote.port())
    };
    Some(Edge { source, destination, port, outcome: Outcome::Older })
}

/// Who has an address for its own.
fn at(snapshot: &Snapshot, caller: SocketAddr) -> End {
    match snapshot.alone_at(caller.ip()) {
        Some(workload) => End::Identity(workload.identity.clone()),
        None => End::Address(caller.ip()),
    }
}
