//! The captured users and cgroups of the host.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context as _, bail};
use hauberk_core::policy::{ProcessSelector, resolve::MeshWorkload};
use hauberk_linux::capture::{self, HostRules, HostWorkload, ProcessMatch};
use rustls::ServerConfig;

use super::{
    Locals,
    guard::{Condition, Guard, Site},
    hold::Outbound,
    listeners::{Accepting, OutboundSockets, Pair, bind, bind_outbound},
    namespace::unroutable,
    older::{Older, OlderCount},
    serve::{accept_mesh, accept_plaintext, mesh_tls},
};
use crate::{
    context::{Context, Local, MESH_PORT, Place},
    handover::{Inherited, Replaced, Role, Seat},
    identity::Identities,
    outbound,
    published::PublishedPorts,
};

/// The captured users and cgroups of the host.
pub(super) struct HostCapture {
    locals: Arc<Locals>,
    guard: Guard,
    older: Older,
    /// What its workloads serve from containers.
    published: Arc<PublishedPorts>,
    /// The ports of outgoing connections, one a workload: the port tells who is connecting.
    outbound: BTreeMap<String, Outbound>,
    /// The cgroups that are captured or should be, and what the kernel knew them by.
    cgroups: Vec<(ProcessMatch, Option<u64>)>,
    inherited: Inherited,
    plaintext_port: Option<u16>,
    mesh_listener: Option<u16>,
    inbound: Vec<Accepting>,
    /// Listeners that nobody accepts from yet.
    bound: Option<Inbound>,
    bound_outbound: BTreeMap<String, OutboundSockets>,
}

/// Listeners for what comes in.
struct Inbound {
    plaintext: Pair,
    mesh: Pair,
    tls: Arc<ServerConfig>,
}

impl HostCapture {
    /// Nothing is captured yet.
    ///
    /// # Errors
    /// If the kernel does not tell of changes.
    pub(super) fn start(
        context: &Arc<Context>,
        inherited: &Inherited,
        replaced: &Replaced,
    ) -> anyhow::Result<Self> {
        let locals = Arc::new(Locals::default());
        let guard = Guard::start(context, Site::Host, "the host".to_owned(), &locals, replaced)?;
        Ok(Self {
            locals,
            guard,
            older: Older::default(),
            published: Arc::default(),
            outbound: BTreeMap::new(),
            cgroups: Vec::new(),
            inherited: inherited.clone(),
            plaintext_port: None,
            mesh_listener: None,
            inbound: Vec::new(),
            bound: None,
            bound_outbound: BTreeMap::new(),
        })
    }

    /// Listens for what comes in, if it does not yet.
    fn listen(&mut self, context: &Arc<Context>, avoid: &BTreeSet<u16>) -> anyhow::Result<()> {
        if !self.inbound.is_empty() || self.bound.is_some() {
            return Ok(());
        }
        let plaintext = bind(&self.inherited, None, &Role::Plaintext, avoid)?;
        let mesh = bind(&self.inherited, None, &Role::Mesh, avoid)?;
        let tls = mesh_tls(context, &self.locals)?;
        self.plaintext_port = Some(plaintext.port);
        self.mesh_listener = Some(mesh.port);
        self.bound = Some(Inbound { plaintext, mesh, tls });
        Ok(())
    }

    /// Accepts on listeners that nobody accepts from yet. Not earlier than it is known who lives here: connections may
    /// wait in a listener that was handed over.
    fn accept_bound(&mut self, context: &Arc<Context>) -> anyhow::Result<()> {
        if let Some(Inbound { plaintext, mesh, tls }) = self.bound.take() {
            let home = context.lanes.next_home();
            for listener in plaintext.listeners {
                self.inbound.push(accept_plaintext(context, home, listener, &self.locals)?);
            }
            for listener in mesh.listeners {
                self.inbound.push(accept_mesh(context, home, listener, &self.locals, &tls)?);
            }
        }
        for (key, sockets) in std::mem::take(&mut self.bound_outbound) {
            let outbound = self.take_outbound(context, &key, sockets)?;
            self.outbound.insert(key, outbound);
        }
        Ok(())
    }

    /// Captures exactly these workloads. Returns how it went for each, in their order: one that
    /// cannot be captured (its user is unknown, its cgroup is not there, another one is the same user) is closed,
    /// and keeps no other from it.
    pub(super) fn update(
        &mut self,
        context: &Arc<Context>,
        workloads: &[Arc<MeshWorkload>],
        identities: &mut Identities,
    ) -> Vec<anyhow::Result<()>> {
        let declared: BTreeSet<u16> =
            workloads.iter().flat_map(|workload| workload.ports.iter().copied()).collect();
        let listening = self.listen(context, &declared);
        let shared = Shared::of(workloads);
        let mut outcomes = Vec::new();
        let (mut locals, mut rules) = (Vec::new(), Vec::new());
        for workload in workloads {
            let taken = match &listening {
                Ok(()) => self.take_up(context, workload, identities, &shared, &declared),
                Err(error) => Err(anyhow::anyhow!("{error:#}")),
            };
            rules.push(match &taken {
                Ok((_, rule)) => rule.clone(),
                // What it serves stays closed, whoever it will be.
                Err(_) => closed(workload),
            });
            outcomes.push(taken.map(|(local, _)| locals.push(local)));
        }
        close_once(&mut rules);
        let processes =
            workloads.iter().filter_map(|workload| host_process(&workload.process).ok());
        self.cgroups = processes
            .filter(|process| matches!(process, ProcessMatch::Cgroup { .. }))
            .map(|process| (process.clone(), process.kernel_id().ok()))
            .collect();
        self.locals.store(locals);
        if let Err(error) = self.accept_bound(context) {
            tracing::error!(
                error = format!("{error:#}"),
                "connections of the host are not accepted"
            );
        }
        if let Err(error) = self.enforce(&context.node, rules) {
            let text = format!("{error:#}");
            outcomes = workloads.iter().map(|_| Err(anyhow::anyhow!("{text}"))).collect();
        }
        // Only now that no rule leads there.
        self.outbound.retain(|key, _| workloads.iter().any(|workload| workload.key() == *key));
        outcomes
    }

    fn take_up(
        &mut self,
        context: &Arc<Context>,
        workload: &Arc<MeshWorkload>,
        identities: &mut Identities,
        shared: &Shared,
        declared: &BTreeSet<u16>,
    ) -> anyhow::Result<(Arc<Local>, HostWorkload)> {
        shared.check(workload)?;
        // One that is not there must not keep the others from being captured.
        let process = known_process(workload)?;
        let identity = identities.ensure(workload)?;
        let key = workload.key();
        let listens = self.outbound.contains_key(&key) || self.bound_outbound.contains_key(&key);
        if !listens {
            let sockets = bind_outbound(&self.inherited, None, Some(&key), declared)?;
            self.bound_outbound.insert(key.clone(), sockets);
        }
        let taking = self.outbound.get(&key).map(|outbound| outbound.port);
        let port =
            taking.or_else(|| self.bound_outbound.get(&key).map(|sockets| sockets.listeners.port));
        let local = match self.locals.get(&key) {
            Some(local)
                if local.workload == *workload && Arc::ptr_eq(&local.identity, &identity) =>
            {
                local
            }
            Some(_) | None => {
                let place = Place::Host(self.published.clone());
                Arc::new(Local::new(context, workload.clone(), identity, place))
            }
        };
        let rule = HostWorkload {
            name: workload.key(),
            process: Some(process),
            outbound_port: port,
            service_ports: workload.ports.iter().copied().collect(),
            unroutable: unroutable(workload.mode),
        };
        Ok((local, rule))
    }

    fn take_outbound(
        &self,
        context: &Arc<Context>,
        key: &str,
        sockets: OutboundSockets,
    ) -> anyhow::Result<Outbound> {
        let (locals, key) = (self.locals.clone(), key.to_owned());
        let (of_dialled, key_of_dialled) = (locals.clone(), key.clone());
        Outbound::start(
            context,
            context.lanes.next_home(),
            Place::Host(self.published.clone()),
            sockets,
            move |context, waiting| {
                let local = locals.get(&key)?;
                Some(async move { outbound::serve(&context, &local, waiting).await })
            },
            move |context, stream, from| {
                let local = of_dialled.get(&key_of_dialled);
                async move { outbound::refuse_dialled(&context, local.as_deref(), &stream, from) }
            },
        )
    }

    fn enforce(&self, node: &str, workloads: Vec<HostWorkload>) -> anyhow::Result<()> {
        let rules = HostRules {
            mesh_port: MESH_PORT,
            mesh_listener: self.mesh_listener,
            plaintext_port: self.plaintext_port,
            workloads,
        };
        self.guard.enforce(&rules.ruleset()?.owned_by(node))?;
        self.published.look();
        Ok(())
    }

    /// Why what a workload serves could not be reached lately; empty if it could.
    pub(super) fn unreached(&self, workload: &MeshWorkload) -> String {
        self.published.unreached(workload.ports.iter().copied())
    }

    /// Whether a cgroup has come, gone, or been made anew since it was looked at.
    pub(super) fn cgroups_differ(&self) -> bool {
        self.cgroups.iter().any(|(process, then)| process.kernel_id().ok() != *then)
    }

    pub(super) fn locals(&self) -> &Locals {
        &self.locals
    }

    /// Looks after connections that are older than the capture.
    pub(super) fn look_at_older(&mut self) -> anyhow::Result<BTreeMap<String, OlderCount>> {
        self.guard.look_at_older(&mut self.older)
    }

    /// How its capture is doing.
    pub(super) fn condition(&self) -> Condition {
        self.guard.condition()
    }

    /// New connections are refused from here on, unless another agent has the listeners.
    pub(super) fn close_listeners(&mut self) {
        self.outbound.clear();
        self.inbound.clear();
    }

    /// Its sockets for another process.
    pub(super) fn share(&self) -> impl Iterator<Item = io::Result<(Seat, OwnedFd)>> {
        let outbound = self.outbound.values().flat_map(Outbound::share);
        outbound.chain(self.inbound.iter().map(Accepting::share))
    }

    /// Ends what is captured, and gives the plain network back.
    pub(super) fn remove_rules(self) {
        let Self { guard, outbound, inbound, .. } = self;
        // It would put them back.
        guard.retire();
        if let Err(error) = capture::remove() {
            tracing::warn!(%error, "the host's capture rules could not be removed");
        }
        drop((outbound, inbound));
    }
}

/// What several workloads of the host claim to be, each with all of their keys: nobody can tell whose it is.
struct Shared(Vec<(ProcessMatch, Vec<String>)>);

impl Shared {
    fn of(workloads: &[Arc<MeshWorkload>]) -> Self {
        let mut by_process: Vec<(ProcessMatch, Vec<String>)> = Vec::new();
        for workload in workloads {
            let Ok(process) = host_process(&workload.process) else { continue };
            match by_process.iter_mut().find(|(known, _)| *known == process) {
                Some((_, keys)) => keys.push(workload.key()),
                None => by_process.push((process, vec![workload.key()])),
            }
        }
        by_process.retain(|(_, keys)| keys.len() > 1);
        Self(by_process)
    }

    fn check(&self, workload: &MeshWorkload) -> anyhow::Result<()> {
        if workload.ports.contains(&MESH_PORT) {
            bail!(
                "spec.ports has {MESH_PORT}, which is the port of the agents on every machine of the mesh; let it \
                 serve another port"
            );
        }
        let key = workload.key();
        match self.0.iter().find(|(_, keys)| keys.contains(&key)) {
            None => Ok(()),
            Some((process, keys)) => bail!(
                "{} are the same to the kernel ({process:?}), which cannot tell whose connections are whose; give \
                 each a user or cgroup of its own in spec.process",
                keys.join(" and ")
            ),
        }
    }
}

/// Of workloads that are the same to the kernel, all are closed; it needs to be told of the process only once.
fn close_once(rules: &mut [HostWorkload]) {
    let mut seen = Vec::new();
    for rule in rules {
        if let Some(process) = rule.process.take_if(|process| seen.contains(process)) {
            drop(process);
        } else if let Some(process) = &rule.process {
            seen.push(process.clone());
        }
    }
}

/// Rules that close these workloads of the host, and lead nothing anywhere.
pub(crate) fn closed_rules(workloads: &[Arc<MeshWorkload>]) -> Vec<HostWorkload> {
    let mut rules: Vec<_> = workloads.iter().map(|workload| closed(workload)).collect();
    close_once(&mut rules);
    rules
}

/// A workload that is not captured: its service ports lead nowhere but to the refusal, and neither does
/// what it sends, if the kernel can tell its processes.
fn closed(workload: &MeshWorkload) -> HostWorkload {
    HostWorkload {
        name: workload.key(),
        process: known_process(workload).ok(),
        outbound_port: None,
        service_ports: workload.ports.iter().copied().filter(|port| *port != MESH_PORT).collect(),
        unroutable: unroutable(workload.mode),
    }
}

/// What the kernel is to match, if it can.
fn known_process(workload: &MeshWorkload) -> anyhow::Result<ProcessMatch> {
    let process = host_process(&workload.process)?;
    process.kernel_id()?;
    Ok(process)
}

/// What the kernel is to match.
pub(super) fn host_process(process: &ProcessSelector) -> anyhow::Result<ProcessMatch> {
    match process {
        ProcessSelector::User(user) => Ok(ProcessMatch::User(user_id(user)?)),
        ProcessSelector::Cgroup(path) => {
            let level = u32::try_from(path.split('/').filter(|part| !part.is_empty()).count())?;
            Ok(ProcessMatch::Cgroup { level, path: path.clone() })
        }
        ProcessSelector::NetworkNamespace { .. } | ProcessSelector::Pod { .. } => {
            bail!("a workload in a network namespace of its own is not a process of the host")
        }
    }
}

/// The number of a user, by name or number.
///
/// A number that was found once is kept: a directory service that is away for a moment takes nobody's
/// protection away.
///
/// # Errors
/// If it was never found.
fn user_id(user: &str) -> anyhow::Result<u32> {
    static KNOWN: Mutex<BTreeMap<String, u32>> = Mutex::new(BTreeMap::new());
    if let Ok(id) = user.parse() {
        return Ok(id);
    }
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let found = nix::unistd::User::from_name(user)
        .with_context(|| format!("look up the user {user:?} of spec.process.user"));
    match (found, known.get(user)) {
        (Ok(Some(found)), _) => {
            let id = found.uid.as_raw();
            known.insert(user.to_owned(), id);
            Ok(id)
        }
        (Ok(None) | Err(_), Some(id)) => Ok(*id),
        (Ok(None), None) => {
            bail!("this machine has no user {user:?}; create it, or correct spec.process.user")
        }
        (Err(error), None) => Err(error),
    }
}
