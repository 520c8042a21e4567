//! The two kinds of place that are captured: a network namespace of a workload's own, and the host
//! with the workloads that are its users and cgroups.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, bail};
use hauberk_core::{
    identity::ResourceName,
    policy::{ProcessSelector, resolve::MeshWorkload},
    session,
};
use hauberk_linux::{
    Netns, NetnsWorker,
    capture::{self, HostRules, HostWorkload, NamespaceRules, ProcessMatch},
    links::ipv6_is_enabled,
};
use hauberk_tls::mesh_server_config;
use rustls::ServerConfig;

use super::{
    Locals,
    listeners::{Accepting, Bound, accept, bind},
};
use crate::{
    context::{Context, Local, MESH_PORT, Place},
    handover::{Inherited, Seat},
    identity::Identities,
    inbound, outbound,
};

/// Where captured outgoing connections arrive, in a namespace of a workload's own.
const OUTBOUND_PORT: u16 = 15_001;

/// Where incoming connections arrive that did not come over the mesh.
const PLAINTEXT_PORT: u16 = 15_006;

/// What becomes of a place whose workload is gone from the registry.
pub(super) enum Departure {
    /// It may still be running, and must not be free: a pod whose object was deleted by force, for one.
    Stays,
    /// It gets its plain network back.
    Free,
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
    rules: capture::Ruleset,
    locals: Arc<Locals>,
    inherited: Inherited,
    outbound: Vec<Accepting>,
    inbound: Vec<Accepting>,
}

impl NamespaceCapture {
    pub(super) fn start(
        context: &Arc<Context>,
        workload: &Arc<MeshWorkload>,
        path: &Path,
        identities: &mut Identities,
        inherited: &Inherited,
    ) -> anyhow::Result<Self> {
        let netns = Netns::open(path)
            .with_context(|| format!("open the network namespace {}", path.display()))?;
        let worker = Arc::new(NetnsWorker::start(&netns, workload.name.as_ref())?);
        // The rules first: from here on nothing of the workload is unprotected, and what comes
        // before the listeners are up is refused.
        let rules = NamespaceRules {
            outbound_port: OUTBOUND_PORT,
            plaintext_port: PLAINTEXT_PORT,
            mesh_port: MESH_PORT,
        }
        .ruleset()?;
        let locals = Arc::new(Locals::default());
        let installed = rules.clone();
        worker.call(move || installed.install())??;
        let (namespace, from_before) = (Some(netns.inode()), inherited.clone());
        let listeners = worker.call(move || {
            Ok::<_, anyhow::Error>((
                bind_all(&from_before, namespace, &any_addresses(), PLAINTEXT_PORT)?,
                bind_all(&from_before, namespace, &any_addresses(), MESH_PORT)?,
            ))
        })??;
        let mut inbound = Vec::new();
        for listener in listeners.0 {
            inbound.push(accept_plaintext(context, listener, &locals)?);
        }
        let tls = mesh_tls(context, &locals)?;
        for listener in listeners.1 {
            inbound.push(accept_mesh(context, listener, &locals, &tls)?);
        }
        let mut capture = Self {
            path: path.to_owned(),
            pod_namespace: match &workload.process {
                ProcessSelector::Pod { .. } => workload.namespace.clone(),
                ProcessSelector::User(_)
                | ProcessSelector::Cgroup(_)
                | ProcessSelector::NetworkNamespace { .. } => None,
            },
            context: context.clone(),
            worker,
            rules,
            locals,
            inherited: inherited.clone(),
            outbound: Vec::new(),
            inbound,
        };
        capture.update(workload, identities)?;
        Ok(capture)
    }

    /// What is to become of it, now that its workload is gone. Only leaving the mesh frees a pod.
    pub(super) fn departure(&self, is_enrolled: impl Fn(&str) -> Option<bool>) -> Departure {
        match &self.pod_namespace {
            None => Departure::Free,
            Some(namespace) if is_enrolled(namespace.as_str()) == Some(false) => Departure::Free,
            // Its sandbox is gone, or another one has the name.
            Some(_) if !self.still_there(&self.path).unwrap_or(false) => Departure::Gone,
            Some(_) => Departure::Stays,
        }
    }

    /// The number of the namespace, as the kernel has it.
    pub(super) fn inode(&self) -> u64 {
        self.worker.netns().inode()
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
        let rules = self.rules.clone();
        let drift = self.worker.call(move || {
            let drift = rules.drift()?;
            if !drift.is_empty() {
                rules.install()?;
            }
            Ok::<_, hauberk_linux::Error>(drift)
        })??;
        for difference in drift {
            tracing::warn!(workload = workload.key(), %difference, "the capture rules were altered, they are restored");
        }
        let identity = identities.ensure(workload)?;
        if let Some(local) = self.locals.get(&workload.key())
            && local.workload == *workload
            && Arc::ptr_eq(&local.identity, &identity)
            && !self.outbound.is_empty()
        {
            return Ok(());
        }
        let local = Arc::new(Local::new(
            &self.context,
            workload.clone(),
            identity,
            Place::Namespace(self.worker.clone()),
        ));
        self.locals.store(vec![local]);
        if self.outbound.is_empty() {
            let (namespace, inherited) = (Some(self.inode()), self.inherited.clone());
            let listeners = self
                .worker
                .call(move || bind_all(&inherited, namespace, &loopbacks(), OUTBOUND_PORT))??;
            for listener in listeners {
                let (locals, key) = (self.locals.clone(), workload.key());
                self.outbound.push(accept(
                    &self.context,
                    listener,
                    move |context, stream, from| {
                        // In the order in which they were accepted.
                        let local =
                            locals.get(&key).map(|local| (local.departures.arrive(), local));
                        async move {
                            if let Some((arrival, local)) = local {
                                outbound::serve(&context, &local, arrival, stream, from).await;
                            }
                        }
                    },
                )?);
            }
        }
        Ok(())
    }

    pub(super) fn locals(&self) -> &Locals {
        &self.locals
    }

    pub(super) fn listeners(&self) -> impl Iterator<Item = &Accepting> {
        self.outbound.iter().chain(&self.inbound)
    }

    /// New connections are refused from here on, unless another agent has the listeners.
    pub(super) fn close(&mut self) {
        self.outbound.clear();
        self.inbound.clear();
    }

    pub(super) fn remove_rules(&self) {
        let removed = self.worker.call(capture::remove).and_then(|result| result);
        if let Err(error) = removed {
            tracing::warn!(%error, "capture rules could not be removed");
        }
    }
}

/// The captured users and cgroups of the host.
pub(super) struct HostCapture {
    locals: Arc<Locals>,
    /// The ports of outgoing connections, one a workload: the port tells who is connecting.
    outbound: BTreeMap<String, (u16, Vec<Accepting>)>,
    rules: Option<capture::Ruleset>,
    /// The cgroups that are captured or should be, and what the kernel knew them by.
    cgroups: Vec<(ProcessMatch, Option<u64>)>,
    inherited: Inherited,
    inbound: Vec<Accepting>,
}

impl HostCapture {
    pub(super) fn start(context: &Arc<Context>, inherited: &Inherited) -> anyhow::Result<Self> {
        let locals = Arc::new(Locals::default());
        let mut inbound = Vec::new();
        for listener in bind_all(inherited, None, &any_addresses(), PLAINTEXT_PORT)? {
            inbound.push(accept_plaintext(context, listener, &locals)?);
        }
        let tls = mesh_tls(context, &locals)?;
        for listener in bind_all(inherited, None, &any_addresses(), MESH_PORT)? {
            inbound.push(accept_mesh(context, listener, &locals, &tls)?);
        }
        Ok(Self {
            locals,
            outbound: BTreeMap::new(),
            rules: None,
            cgroups: Vec::new(),
            inherited: inherited.clone(),
            inbound,
        })
    }

    /// Captures exactly these workloads. Returns how it went for each, in their order: one that
    /// cannot be captured (its user is unknown, its cgroup is not there) keeps no other from it.
    pub(super) fn update(
        &mut self,
        context: &Arc<Context>,
        workloads: &[Arc<MeshWorkload>],
        identities: &mut Identities,
    ) -> Vec<anyhow::Result<()>> {
        let mut outcomes = Vec::new();
        let (mut locals, mut rules) = (Vec::new(), Vec::new());
        for workload in workloads {
            let taken = self.take_up(context, workload, identities);
            rules.push(match &taken {
                Ok((_, rule)) => rule.clone(),
                // What it serves stays closed, whoever it will be.
                Err(_) => closed(workload),
            });
            outcomes.push(taken.map(|(local, _)| locals.push(local)));
        }
        let processes =
            workloads.iter().filter_map(|workload| host_process(&workload.process).ok());
        self.cgroups = processes
            .filter(|process| matches!(process, ProcessMatch::Cgroup { .. }))
            .map(|process| (process.clone(), process.kernel_id().ok()))
            .collect();
        self.outbound.retain(|key, _| workloads.iter().any(|workload| workload.key() == *key));
        self.locals.store(locals);
        if let Err(error) = self.enforce(rules) {
            let text = format!("{error:#}");
            outcomes = workloads.iter().map(|_| Err(anyhow::anyhow!("{text}"))).collect();
        }
        outcomes
    }

    fn take_up(
        &mut self,
        context: &Arc<Context>,
        workload: &Arc<MeshWorkload>,
        identities: &mut Identities,
    ) -> anyhow::Result<(Arc<Local>, HostWorkload)> {
        // One that is not there must not keep the others from being captured.
        let process = known_process(workload)?;
        let identity = identities.ensure(workload)?;
        let key = workload.key();
        if !self.outbound.contains_key(&key) {
            let listening = self.listen_outbound(context, &key)?;
            self.outbound.insert(key.clone(), listening);
        }
        let port = self.outbound.get(&key).map(|(port, _)| *port);
        let local = match self.locals.get(&key) {
            Some(local)
                if local.workload == *workload && Arc::ptr_eq(&local.identity, &identity) =>
            {
                local
            }
            Some(_) | None => {
                Arc::new(Local::new(context, workload.clone(), identity, Place::Host))
            }
        };
        let rule = HostWorkload {
            process: Some(process),
            outbound_port: port,
            service_ports: workload.ports.iter().copied().collect(),
        };
        Ok((local, rule))
    }

    /// One port for both families, chosen by the kernel.
    fn listen_outbound(
        &self,
        context: &Arc<Context>,
        key: &str,
    ) -> anyhow::Result<(u16, Vec<Accepting>)> {
        let seat = |address, port| Seat {
            namespace: None,
            workload: Some(key.to_owned()),
            address: SocketAddr::new(address, port),
        };
        let mut addresses = loopbacks().into_iter();
        let first = addresses.next().context("no loopback address")?;
        let first = bind(&self.inherited, seat(first, 0))?;
        let port = first.listener.local_addr()?.port();
        let mut listeners = vec![first];
        for address in addresses {
            listeners.push(bind(&self.inherited, seat(address, port))?);
        }
        let mut accepting = Vec::new();
        for listener in listeners {
            let (locals, key) = (self.locals.clone(), key.to_owned());
            accepting.push(accept(context, listener, move |context, stream, from| {
                // In the order in which they were accepted.
                let local = locals.get(&key).map(|local| (local.departures.arrive(), local));
                async move {
                    if let Some((arrival, local)) = local {
                        outbound::serve(&context, &local, arrival, stream, from).await;
                    }
                }
            })?);
        }
        Ok((port, accepting))
    }

    fn enforce(&mut self, workloads: Vec<HostWorkload>) -> anyhow::Result<()> {
        let plaintext_port = Some(PLAINTEXT_PORT);
        let wanted = HostRules { mesh_port: MESH_PORT, plaintext_port, workloads }.ruleset()?;
        let drift = wanted.drift()?;
        if drift.is_empty() {
            self.rules = Some(wanted);
            return Ok(());
        }
        if self.rules.as_ref().is_some_and(|rules| rules.fingerprint() == wanted.fingerprint()) {
            for difference in drift {
                tracing::warn!(%difference, "the host's capture rules were altered, they are restored");
            }
        }
        wanted.install()?;
        self.rules = Some(wanted);
        Ok(())
    }

    /// Whether a cgroup has come, gone, or been made anew since it was looked at.
    pub(super) fn cgroups_differ(&self) -> bool {
        self.cgroups.iter().any(|(process, then)| process.kernel_id().ok() != *then)
    }

    /// Closes what these workloads serve and send, while the agent cannot listen for them.
    pub(super) fn close(workloads: &[Arc<MeshWorkload>]) -> anyhow::Result<()> {
        let rules = HostRules {
            mesh_port: MESH_PORT,
            plaintext_port: None,
            workloads: workloads.iter().map(|workload| closed(workload)).collect(),
        };
        let rules = rules.ruleset()?;
        if !rules.drift()?.is_empty() {
            rules.install()?;
        }
        Ok(())
    }

    pub(super) fn locals(&self) -> &Locals {
        &self.locals
    }

    /// As [`NamespaceCapture::close`].
    pub(super) fn close_listeners(&mut self) {
        self.outbound.clear();
        self.inbound.clear();
    }

    pub(super) fn listeners(&self) -> impl Iterator<Item = &Accepting> {
        self.outbound.values().flat_map(|(_, listeners)| listeners).chain(&self.inbound)
    }

    pub(super) fn remove_rules() {
        if let Err(error) = capture::remove() {
            tracing::warn!(%error, "the host's capture rules could not be removed");
        }
    }
}

/// A workload that is not captured: its service ports lead nowhere but to the refusal, and neither does
/// what it sends, if the kernel can tell its processes.
fn closed(workload: &MeshWorkload) -> HostWorkload {
    HostWorkload {
        process: known_process(workload).ok(),
        outbound_port: None,
        service_ports: workload.ports.iter().copied().collect(),
    }
}

/// What the kernel is to match, if it can.
fn known_process(workload: &MeshWorkload) -> anyhow::Result<ProcessMatch> {
    let process = host_process(&workload.process)?;
    process.kernel_id()?;
    Ok(process)
}

/// What the kernel is to match.
fn host_process(process: &ProcessSelector) -> anyhow::Result<ProcessMatch> {
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

fn user_id(user: &str) -> anyhow::Result<u32> {
    if let Ok(id) = user.parse() {
        return Ok(id);
    }
    match nix::unistd::User::from_name(user)? {
        Some(found) => Ok(found.uid.as_raw()),
        None => bail!("this machine has no user {user:?}; create it, or correct spec.process.user"),
    }
}

fn mesh_tls(context: &Context, locals: &Locals) -> anyhow::Result<Arc<ServerConfig>> {
    let config = mesh_server_config(locals.names.clone(), context.trust.clone(), session::ALPN)?;
    Ok(Arc::new(config))
}

fn accept_mesh(
    context: &Arc<Context>,
    listener: Bound,
    locals: &Arc<Locals>,
    tls: &Arc<ServerConfig>,
) -> anyhow::Result<Accepting> {
    let (locals, tls) = (locals.clone(), tls.clone());
    accept(context, listener, move |context, stream, from| {
        let (locals, tls) = (locals.clone(), tls.clone());
        async move { inbound::serve_mesh(&context, &locals, tls, stream, from).await }
    })
}

fn accept_plaintext(
    context: &Arc<Context>,
    listener: Bound,
    locals: &Arc<Locals>,
) -> anyhow::Result<Accepting> {
    let locals = locals.clone();
    accept(context, listener, move |context, stream, from| {
        let locals = locals.clone();
        async move { inbound::serve_plaintext(&context, &locals, stream, from).await }
    })
}

fn bind_all(
    inherited: &Inherited,
    namespace: Option<u64>,
    addresses: &[IpAddr],
    port: u16,
) -> anyhow::Result<Vec<Bound>> {
    let seat = |address: &IpAddr| Seat {
        namespace,
        workload: None,
        address: SocketAddr::new(*address, port),
    };
    addresses.iter().map(|address| bind(inherited, seat(address))).collect()
}

fn any_addresses() -> Vec<IpAddr> {
    families(Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED)
}

fn loopbacks() -> Vec<IpAddr> {
    families(Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST)
}

fn families(v4: Ipv4Addr, v6: Ipv6Addr) -> Vec<IpAddr> {
    let mut addresses = vec![IpAddr::V4(v4)];
    if ipv6_is_enabled() {
        addresses.push(IpAddr::V6(v6));
    }
    addresses
}
