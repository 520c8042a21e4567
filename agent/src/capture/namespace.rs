//! A network namespace of a workload's own that is captured.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;
use hauberk_core::{
    identity::ResourceName,
    policy::{Mode, ProcessSelector, resolve::MeshWorkload},
};
use hauberk_linux::{
    Netns, NetnsWorker,
    capture::{self, Before, Connection, NamespaceRules, Unroutable},
};

use super::{
    Locals,
    guard::{Condition, Guard, Site},
    hold::Outbound,
    listeners::{Accepting, Pair, bind, bind_outbound},
    older::{Older, OlderCount},
    serve::{accept_mesh, accept_plaintext, mesh_tls},
};
use crate::{
    context::{Context, Local, MESH_PORT, Place},
    handover::{Inherited, Replaced, Role, Seat},
    identity::Identities,
    lanes::Lane,
    outbound,
};

/// How many closed connections the rules may remember of a workload that is let go: a quarter of those for which there
/// is room.
const CROWDED: usize = 16_384;

/// What becomes of a place whose workload is gone from the registry.
#[derive(Clone, Copy)]
pub(super) enum Departure {
    /// It may still be running, and must not be free: a pod whose object was deleted by force, for one.
    Stays,
    /// It is not registered any more, and gets its plain network back.
    Removed,
    /// A pod whose namespace has left the mesh: the same, and its connections live.
    LetGo,
    /// Nothing is there any more.
    Gone,
}

/// A captured network namespace.
pub(super) struct NamespaceCapture {
    path: PathBuf,
    /// Of a pod.
    pod_namespace: Option<ResourceName>,
    context: Arc<Context>,
    worker: Arc<NetnsWorker>,
    guard: Guard,
    older: Older,
    locals: Arc<Locals>,
    /// Where its connections are while there are few.
    home: Lane,
    ports: Ports,
    outbound: Option<Outbound>,
    listeners: Vec<Accepting>,
    /// What new connections of a workload that is let go left behind in the rules, at the last look.
    closed: HashSet<Connection>,
    /// Its rules leave new connections alone.
    is_let_go: bool,
}

/// Where the agent listens; nothing where it could not.
#[derive(Clone, Copy, Default)]
struct Ports {
    outbound: Option<u16>,
    plaintext: Option<u16>,
    mesh: Option<u16>,
}

impl NamespaceCapture {
    /// Listens first, and then puts the rules in place, so that nobody is cut off for a moment. If it cannot
    /// listen, the rules close the namespace.
    ///
    /// # Errors
    /// If it could not be captured. What could be closed is.
    pub(super) fn start(
        context: &Arc<Context>,
        workload: &Arc<MeshWorkload>,
        path: &Path,
        identities: &mut Identities,
        inherited: &Inherited,
        replaced: &Replaced,
    ) -> anyhow::Result<Self> {
        let netns = Netns::open(path)
            .with_context(|| format!("open the network namespace {}", path.display()))?;
        let worker = Arc::new(NetnsWorker::start(&netns, workload.name.as_ref())?);
        let locals = Arc::new(Locals::default());
        let site = Site::Namespace(worker.clone());
        let guard = match Guard::start(context, site, workload.key(), &locals, replaced) {
            Ok(guard) => guard,
            Err(error) => {
                let rules = closed(workload.mode).ruleset()?.owned_by(&context.node);
                worker
                    .call(move || rules.install(&Before::Unknown)?.whole())?
                    .context("close what could not be captured")?;
                return Err(error);
            }
        };
        let mut capture = Self {
            path: path.to_owned(),
            pod_namespace: None,
            context: context.clone(),
            worker,
            guard,
            older: Older::default(),
            locals,
            home: context.lanes.next_home(),
            ports: Ports::default(),
            outbound: None,
            listeners: Vec::new(),
            closed: HashSet::new(),
            is_let_go: false,
        };
        // Who lives here first: connections may wait in a listener that was handed over.
        let ready = capture.settle(workload, identities).and_then(|()| capture.listen(inherited));
        if let Err(error) = ready {
            capture.ports = Ports::default();
            capture.close();
            capture.enforce(workload).context("close what could not be captured")?;
            return Err(error);
        }
        capture.enforce(workload)?;
        Ok(capture)
    }

    /// What is to become of it, now that its workload is gone. Only leaving the mesh frees a pod.
    pub(super) fn departure(&self, is_enrolled: impl Fn(&str) -> Option<bool>) -> Departure {
        match &self.pod_namespace {
            None => Departure::Removed,
            // Its sandbox is gone, or another one has the name.
            Some(_) if !self.still_there(&self.path).unwrap_or(false) => Departure::Gone,
            Some(namespace) if is_enrolled(namespace.as_str()) == Some(false) => Departure::LetGo,
            Some(_) => Departure::Stays,
        }
    }

    /// The number of the namespace, as the kernel has it.
    pub(super) fn inode(&self) -> u64 {
        self.worker.netns().inode()
    }

    /// Whether it is the namespace of this path.
    pub(super) fn is_at(&self, path: &Path) -> bool {
        self.path == path
    }

    /// Whether the path still names this very namespace.
    pub(super) fn still_there(&self, path: &Path) -> anyhow::Result<bool> {
        let netns = Netns::open(path)
            .with_context(|| format!("open the network namespace {}", path.display()))?;
        Ok(netns.inode() == self.worker.netns().inode())
    }

    /// Takes up a change of the workload, and heals the rules.
    pub(super) fn update(
        &mut self,
        workload: &Arc<MeshWorkload>,
        identities: &mut Identities,
    ) -> anyhow::Result<()> {
        let settled = self.settle(workload, identities);
        // Whoever cannot be settled is captured all the same.
        self.enforce(workload)?;
        settled
    }

    /// Makes the workload the one that lives here.
    fn settle(
        &mut self,
        workload: &Arc<MeshWorkload>,
        identities: &mut Identities,
    ) -> anyhow::Result<()> {
        self.pod_namespace = match &workload.process {
            ProcessSelector::Pod { .. } => workload.namespace.clone(),
            ProcessSelector::User(_)
            | ProcessSelector::Cgroup(_)
            | ProcessSelector::NetworkNamespace { .. } => None,
        };
        let identity = identities.ensure(workload)?;
        let known = self.locals.get(&workload.key()).is_some_and(|local| {
            local.workload == *workload && Arc::ptr_eq(&local.identity, &identity)
        });
        if !known {
            let place = Place::Namespace(self.worker.clone());
            let local = Local::new(&self.context, workload.clone(), identity, place);
            self.locals.store(vec![Arc::new(local)]);
        }
        Ok(())
    }

    fn listen(&mut self, inherited: &Inherited) -> anyhow::Result<()> {
        let (namespace, from_before) = (Some(self.inode()), inherited.clone());
        let (outbound, [plaintext, mesh]) = self.worker.call(move || {
            let role = |role| bind(&from_before, namespace, &role, &BTreeSet::new());
            let outbound = bind_outbound(&from_before, namespace, None, &BTreeSet::new());
            (outbound, [Role::Plaintext, Role::Mesh].map(role))
        })?;
        let outbound = outbound?;
        self.ports.outbound = Some(outbound.listeners.port);
        let (locals, dialled) = (self.locals.clone(), self.locals.clone());
        let only = |locals: &Locals| locals.all().into_iter().next();
        self.outbound = Some(Outbound::start(
            &self.context,
            self.home,
            Place::Namespace(self.worker.clone()),
            outbound,
            move |context, waiting| {
                let local = only(&locals)?;
                Some(async move { outbound::serve(&context, &local, waiting).await })
            },
            move |context, stream, from| {
                let local = only(&dialled);
                async move { outbound::refuse_dialled(&context, local.as_deref(), &stream, from) }
            },
        )?);
        let Pair { port, listeners } = plaintext?;
        self.ports.plaintext = Some(port);
        let (context, home) = (&self.context, self.home);
        for listener in listeners {
            self.listeners.push(accept_plaintext(context, home, listener, &self.locals)?);
        }
        let Pair { port, listeners } = mesh?;
        self.ports.mesh = Some(port);
        let tls = mesh_tls(context, &self.locals)?;
        for listener in listeners {
            self.listeners.push(accept_mesh(context, home, listener, &self.locals, &tls)?);
        }
        Ok(())
    }

    fn enforce(&mut self, workload: &MeshWorkload) -> anyhow::Result<()> {
        self.enforce_mode(workload.mode)
    }

    fn enforce_mode(&mut self, mode: Mode) -> anyhow::Result<()> {
        let rules = NamespaceRules {
            outbound_port: self.ports.outbound,
            plaintext_port: self.ports.plaintext,
            mesh_listener: self.ports.mesh,
            ..closed(mode)
        };
        self.guard.enforce(&rules.ruleset()?.owned_by(&self.context.node))?;
        self.is_let_go = false;
        Ok(())
    }

    /// Captures everything again if it was let go, whatever else becomes of it.
    pub(super) fn take_back(&mut self) -> anyhow::Result<()> {
        if self.is_let_go { self.enforce_mode(Mode::Enforce) } else { Ok(()) }
    }

    /// Leaves everything alone that is opened from here on; what is carried goes on.
    pub(super) fn let_go(&mut self) -> anyhow::Result<()> {
        self.is_let_go = true;
        let rules = NamespaceRules {
            outbound_port: self.ports.outbound,
            plaintext_port: self.ports.plaintext,
            mesh_listener: self.ports.mesh,
            letting_go: true,
            ..closed(Mode::Audit)
        };
        self.guard.enforce(&rules.ruleset()?.owned_by(&self.context.node))
    }

    /// Whether anything is carried still, for a workload that is let go.
    pub(super) fn carries(&mut self) -> anyhow::Result<bool> {
        let before = std::mem::take(&mut self.closed);
        let (closed, carries) = self.worker.call(move || {
            let closed = capture::closed_older()?;
            // Only when there are many: one of them may just be opened anew, between the same ends, and nothing tells.
            if closed.len() > CROWDED {
                // At the second look: at the first it may be about to be opened.
                capture::forget_older(&closed.intersection(&before).copied().collect())?;
            }
            Ok::<_, hauberk_linux::Error>((closed, capture::captured_are_open()?))
        })??;
        self.closed = closed;
        Ok(carries)
    }

    pub(super) fn locals(&self) -> &Locals {
        &self.locals
    }

    /// Its sockets for another process.
    pub(super) fn share(&self) -> impl Iterator<Item = io::Result<(Seat, OwnedFd)>> {
        let outbound = self.outbound.iter().flat_map(Outbound::share);
        outbound.chain(self.listeners.iter().map(Accepting::share))
    }

    /// Looks after its connections that are older than its capture.
    pub(super) fn look_at_older(&mut self) -> anyhow::Result<BTreeMap<String, OlderCount>> {
        self.guard.look_at_older(&mut self.older)
    }

    /// How its capture is doing.
    pub(super) fn condition(&self) -> Condition {
        self.guard.condition()
    }

    /// Another capture takes this one's place in the same namespace: the rules stay, and are its business.
    pub(super) fn retire(self) {
        self.guard.retire();
    }

    /// New connections are refused from here on, unless another agent has the listeners.
    pub(super) fn close(&mut self) {
        self.outbound = None;
        self.listeners.clear();
    }

    /// Ends what is captured, and gives the plain network back.
    pub(super) fn remove_rules(self) {
        let Self { worker, guard, outbound, listeners, .. } = self;
        // It would put them back.
        guard.retire();
        let removed = worker.call(capture::remove).and_then(|result| result);
        if let Err(error) = removed {
            tracing::warn!(%error, "capture rules could not be removed");
        }
        drop((outbound, listeners));
    }
}

/// Rules that lead nothing anywhere.
pub(crate) fn closed(mode: Mode) -> NamespaceRules {
    NamespaceRules {
        outbound_port: None,
        plaintext_port: None,
        mesh_listener: None,
        mesh_port: MESH_PORT,
        unroutable: unroutable(mode),
        letting_go: false,
    }
}

/// What becomes of connections that cannot be led to the agent.
pub(super) fn unroutable(mode: Mode) -> Unroutable {
    match mode {
        Mode::Enforce => Unroutable::Refuse,
        Mode::Audit => Unroutable::Pass,
    }
}
