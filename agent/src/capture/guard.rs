//! Keeps the rules of one place in force: it listens for the kernel's news of nftables, routing, addresses and
//! interfaces, and puts back what was altered within milliseconds. What was opened meanwhile is ended and
//! recorded.

use std::{
    collections::{BTreeMap, HashSet},
    os::fd::BorrowedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use hauberk_linux::{
    NetnsWorker,
    capture::{
        Before, Connection, Drift, Installed, Monitor, Reports, Ruleset, closed_older,
        forget_older, older, older_in_force,
    },
};
use tokio::{io::Interest, net::UnixDatagram};
use tokio_util::task::AbortOnDropHandle;

use super::{
    Locals,
    older::{Older, OlderCount},
    uncaptured,
};
use crate::{context::Context, handover::Replaced};

/// Between two looks that news has caused: other programs may change their own rules many times a second.
const QUIET: Duration = Duration::from_millis(5);

/// The same once that many in a row have found something to do: somebody else goes on altering the rules.
const LONGEST_QUIET: Duration = Duration::from_millis(200);
const QUICK_LOOKS: u32 = 20;

/// Between two tries to be told.
const RETRY: Duration = Duration::from_secs(1);

/// How long the kernel may refuse to report connections before that is a problem: it reports to one agent only, which may
/// be the one that this one is just replacing.
const UNREPORTED_GRACE: Duration = Duration::from_secs(5);

/// Where rules are put in place: the agent's own network namespace, or a workload's.
#[derive(Clone)]
pub(super) enum Site {
    Host,
    Namespace(Arc<NetnsWorker>),
}

impl Site {
    /// Does something there. Blocks.
    pub(super) fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> hauberk_linux::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        Ok(match self {
            Self::Host => work()?,
            Self::Namespace(worker) => worker.call(work)??,
        })
    }
}

/// How the capture of a place is doing.
#[derive(Clone, Debug, Default)]
pub(super) struct Condition {
    /// How often rules were found altered.
    pub(super) restored: u64,
    /// When that was last.
    pub(super) restored_at: Option<SystemTime>,
    pub(super) restored_what: String,
    /// Why the kernel does not report connections that cannot be captured, if it does not.
    pub(super) unreported: Option<String>,
}

/// The rules of one place.
pub(super) struct Guard {
    watch: Arc<Watch>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

/// What the task shares with its owner.
struct Watch {
    context: Arc<Context>,
    site: Site,
    /// For people.
    name: String,
    locals: Arc<Locals>,
    replaced: Replaced,
    state: Mutex<State>,
}

/// What was done about the rules.
enum Change {
    None,
    /// Nothing; these are the older connections that the kernel knows of.
    Known(Vec<Connection>),
    Installed(Installed),
}

#[derive(Default)]
struct State {
    rules: Option<Ruleset>,
    older: Vec<Connection>,
    condition: Condition,
    retired: bool,
}

impl Guard {
    /// Begins to listen. Nothing is put in place yet.
    ///
    /// # Errors
    /// If the kernel does not allow it.
    pub(super) fn start(
        context: &Arc<Context>,
        site: Site,
        name: String,
        locals: &Arc<Locals>,
        replaced: &Replaced,
    ) -> anyhow::Result<Self> {
        let monitor = site.call(Monitor::start)?;
        let [nftables, routing] = monitor.sockets().map(|socket| waitable(&socket));
        let sockets = [nftables?, routing?];
        let watch = Arc::new(Watch {
            context: context.clone(),
            site,
            name,
            locals: locals.clone(),
            replaced: replaced.clone(),
            state: Mutex::default(),
        });
        let tasks = [
            tokio::spawn(follow(watch.clone(), monitor, sockets)),
            tokio::spawn(follow_reports(watch.clone())),
        ];
        Ok(Self { watch, _tasks: tasks.map(AbortOnDropHandle::new) })
    }

    /// Puts these rules in place, unless they are. Blocks.
    ///
    /// # Errors
    /// If the kernel refuses them: what was in force stays so.
    pub(super) fn enforce(&self, wanted: &Ruleset) -> anyhow::Result<()> {
        self.watch.enforce(Some(wanted)).map(|_| ())
    }

    /// Looks after the connections that are older than the rules ([`Older::look`]). The kernel is asked only if there were
    /// any.
    ///
    /// # Errors
    /// If it cannot be asked.
    pub(super) fn look_at_older(
        &self,
        older: &mut Older,
    ) -> anyhow::Result<BTreeMap<String, OlderCount>> {
        let known = self.watch.lock().older.clone();
        if known.is_empty() {
            return Ok(BTreeMap::new());
        }
        let watch = &self.watch;
        let counts = older.look(&watch.context, &watch.site, &watch.locals)?;
        let over = older.over(&known);
        if !over.is_empty() {
            // Or a new connection from the same port would be taken for one of them, and its answers would leave in clear.
            // What the kernel still sees to its end, for an application that has closed it, needs them.
            let over = watch.site.call(move || {
                let over: HashSet<_> = closed_older()?.intersection(&over).copied().collect();
                forget_older(&over)?;
                Ok(over)
            })?;
            watch.lock().older.retain(|one| !over.contains(one));
        }
        // One that was opened anew is out of the rules already, and must not come back with the next ones.
        let mut state = watch.lock();
        if let Some(in_force) = watch.site.call(older_in_force)? {
            let in_force: HashSet<_> = in_force.into_iter().collect();
            state.older.retain(|one| in_force.contains(one));
        }
        drop(state);
        Ok(counts)
    }

    /// Puts nothing back from here on. Waits for what it is doing.
    pub(super) fn retire(self) {
        self.watch.lock().retired = true;
    }

    /// How the capture is doing.
    pub(super) fn condition(&self) -> Condition {
        self.watch.lock().condition.clone()
    }
}

impl Watch {
    /// Puts these rules in place, or those that were; nothing happens if they are. Returns whether anything was to be
    /// done.
    fn enforce(&self, wanted: Option<&Ruleset>) -> anyhow::Result<bool> {
        let mut state = self.lock();
        if state.retired || (wanted.is_none() && self.replaced.is_set()) {
            return Ok(false);
        }
        let Some(rules) = wanted.or(state.rules.as_ref()).cloned() else { return Ok(false) };
        let known = state.rules.as_ref().map(|rules| (rules.clone(), state.older.clone()));
        let same = state.rules.as_ref() == Some(&rules);
        let looked_at = rules.clone();
        let (drift, installed) = self.site.call(move || {
            let drift = looked_at.drift()?;
            if drift.is_empty() {
                // Those of an agent before are known to the kernel alone.
                return Ok((
                    drift,
                    if known.is_none() { Change::Known(older()?) } else { Change::None },
                ));
            }
            if known.is_some() && drift.iter().all(Drift::is_of_the_network) {
                looked_at.fit_to_network()?;
                return Ok((drift, Change::None));
            }
            let before = match &known {
                Some((rules, older)) => Before::Known(rules, older),
                None => Before::Unknown,
            };
            Ok((drift, Change::Installed(looked_at.install(&before)?)))
        })?;
        if !drift.is_empty() {
            let what: Vec<_> = drift.iter().map(ToString::to_string).collect();
            tracing::debug!(
                place = self.name,
                what = what.join(", "),
                "the capture rules are put in place"
            );
        }
        state.rules = Some(rules);
        let changed = !drift.is_empty();
        let Installed { older, cut, passed, incomplete } = match installed {
            Change::Installed(installed) => installed,
            Change::Known(older) => {
                state.older = older;
                return Ok(changed);
            }
            Change::None => return Ok(changed),
        };
        state.older = older;
        if same {
            let what: Vec<_> = drift.iter().map(ToString::to_string).collect();
            let what = what.join(", ");
            tracing::warn!(
                place = self.name,
                what,
                cut = cut.len(),
                "the capture rules were altered, they are restored"
            );
            self.context.metrics.capture_restored();
            state.condition.restored += 1;
            state.condition.restored_at = Some(SystemTime::now());
            state.condition.restored_what = what;
        }
        drop(state);
        for socket in cut.iter().chain(&passed) {
            uncaptured::missed(&self.context, &self.locals, socket);
        }
        if let Some(error) = incomplete {
            return Err(error.into());
        }
        Ok(changed)
    }

    /// Notes why the kernel does not report connections that cannot be captured, if it does not, and says so once.
    fn set_unreported(&self, why: Option<String>) {
        let before = std::mem::replace(&mut self.lock().condition.unreported, why.clone());
        match (before, why) {
            (None, Some(why)) => tracing::warn!(
                place = self.name,
                why,
                "connections that cannot be captured are not recorded: the kernel does not report them"
            ),
            (Some(_), None) => tracing::info!(
                place = self.name,
                "connections that cannot be captured are recorded again"
            ),
            (None, None) | (Some(_), Some(_)) => {}
        }
    }

    /// Plain data: a panic elsewhere leaves nothing half-changed in it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The runtime can wait for a socket of the kinds that it knows; of what kind it really is makes no difference to
/// that, and nothing else is asked of it.
fn waitable(socket: &BorrowedFd<'_>) -> std::io::Result<UnixDatagram> {
    let socket = std::os::unix::net::UnixDatagram::from(socket.try_clone_to_owned()?);
    socket.set_nonblocking(true)?;
    UnixDatagram::from_std(socket)
}

/// Waits until one of the sockets is readable, and takes what is there.
async fn news<T>(
    sockets: &[UnixDatagram],
    take: impl FnOnce() -> std::io::Result<T>,
) -> std::io::Result<Option<T>> {
    let waiting = sockets.iter().map(|socket| Box::pin(socket.readable()));
    let (ready, which, _) = futures_util::future::select_all(waiting).await;
    ready?;
    let Some(socket) = sockets.get(which) else { return Ok(None) };
    let mut taken = None;
    // That nothing is left is what makes the runtime wait again.
    let emptied: std::io::Result<()> = socket.try_io(Interest::READABLE, || {
        taken = Some(take());
        Err(std::io::ErrorKind::WouldBlock.into())
    });
    match (taken, emptied) {
        (Some(taken), _) => taken.map(Some),
        (None, Err(error)) if error.kind() != std::io::ErrorKind::WouldBlock => Err(error),
        (None, Ok(()) | Err(_)) => Ok(None),
    }
}

async fn follow(watch: Arc<Watch>, monitor: Monitor, sockets: [UnixDatagram; 2]) {
    // What it puts in place is news, too; and somebody else may put their own there each time.
    let (mut busy, mut failures) = (0, 0);
    loop {
        let news = match failures {
            0 => news(&sockets, || monitor.drain()).await,
            _ => Ok(Some(true)),
        };
        match news {
            Ok(Some(true)) => {
                let healing = watch.clone();
                let healed = tokio::task::spawn_blocking(move || healing.enforce(None)).await;
                (busy, failures) = match healed {
                    Ok(Ok(true)) => (busy + 1, 0),
                    Ok(Ok(false)) | Err(_) => (0, 0),
                    Ok(Err(error)) => {
                        tell_of_failed_healing(&watch, &error, failures + 1);
                        (busy + 1, failures + 1)
                    }
                };
            }
            Ok(_) => {}
            Err(error) => {
                // The slow look goes on.
                tracing::warn!(place = watch.name, %error, "no news of the network");
                tokio::time::sleep(RETRY).await;
            }
        }
        tokio::time::sleep(match (busy, failures) {
            (_, QUICK_LOOKS..) => RETRY,
            (QUICK_LOOKS.., _) => LONGEST_QUIET,
            _ => QUIET,
        })
        .await;
    }
}

/// Whoever restarts a firewall flushes twice, and the second time may be in the middle of healing: that is no error if one
/// of the next looks does it. If none does, it is told once.
fn tell_of_failed_healing(watch: &Watch, error: &anyhow::Error, failures: u32) {
    let (place, error) = (&watch.name, format!("{error:#}"));
    if failures == QUICK_LOOKS {
        tracing::error!(place, error, "the capture rules were altered and could not be restored");
    } else {
        tracing::debug!(
            place,
            error,
            failures,
            "the capture rules could not be restored, trying again"
        );
    }
}

/// The kernel tells one agent only: this one, for as long as it has its place.
async fn follow_reports(watch: Arc<Watch>) {
    let mut refused_since = None;
    loop {
        watch.replaced.wait_clear().await;
        match start_reports(&watch).await {
            Ok((reports, socket)) => {
                refused_since = None;
                watch.set_unreported(None);
                take_reports(&watch, &reports, socket).await;
            }
            Err(error) => {
                let since = *refused_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= UNREPORTED_GRACE {
                    watch.set_unreported(Some(format!("{error:#}")));
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn start_reports(watch: &Arc<Watch>) -> anyhow::Result<(Reports, UnixDatagram)> {
    let site = watch.site.clone();
    let reports = tokio::task::spawn_blocking(move || site.call(Reports::start)).await??;
    let socket = waitable(&reports.socket())?;
    Ok((reports, socket))
}

/// Until another agent has this one's place.
async fn take_reports(watch: &Arc<Watch>, reports: &Reports, socket: UnixDatagram) {
    let sockets = [socket];
    loop {
        let taken = tokio::select! {
            () = watch.replaced.wait_set() => return,
            taken = news(&sockets, || reports.take()) => taken,
        };
        let taken: HashSet<_> = taken.ok().flatten().unwrap_or_default().into_iter().collect();
        if taken.is_empty() {
            continue;
        }
        let told = watch.clone();
        // One batch at a time: whoever makes many of them holds up nobody else.
        let looked = tokio::task::spawn_blocking(move || {
            uncaptured::unroutable(&told.context, &told.locals, &told.site, &taken);
        });
        drop(looked.await);
    }
}
