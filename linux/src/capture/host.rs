//! The rules on a plain machine: declared processes only, told by user or cgroup.

use std::{
    collections::{BTreeSet, HashSet},
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::{
    CAPTURED_BITS, MARK_TRANSPARENT, MARK_UNCAPTURED, SERVED, UNDECIDED, Unroutable, captured,
    expression::{
        Expression, Is, cgroup, destination_port, destination_port_in, discard, from_loopback,
        goto, jump, let_through, mark, marked, masked_mark, opening, pass, reset, set_mark,
        source_port_in, tcp, to_listener, to_loopback, to_this_host, unmarked, untracked, user,
    },
    older::{Process, Scope},
    parts::{
        agents_own_untracked, carried, dialled_chain, families_to_listener, given_back,
        given_back_to_listener, held, leaving, mesh_from_loopback, not_own, older_chain,
        older_sets, unroutable,
    },
    published,
    ruleset::{Chain, Hook, Ruleset, Set, SetContent},
    second_line::Routing,
};
use crate::{
    error::{Context, Error, Result},
    links::Family,
    sockets::TcpSocket,
};

/// Where cgroup2 is mounted: alone, or beside the version 1 controllers.
const CGROUP2_MOUNTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// Capture of declared workloads among everything else that runs on a machine.
///
/// - TCP of a workload's process goes to that workload's `outbound_port`: the port tells the
///   identity. Over loopback only what goes to another workload's service port is taken.
/// - TCP to a service port goes to `plaintext_port`, whether from outside or from a process of
///   the machine that is no declared workload; from outside, TCP to `mesh_port` goes to `mesh_listener`.
/// - What processes answer on ports that nobody declared is left alone, and so is everything else.
///
/// Whoever serves no port of the agent's (`None`) is refused instead: an agent that cannot
/// listen, or a workload whose processes the kernel cannot tell yet, leaves nothing open.
///
/// The agent's listeners are as for [`NamespaceRules`](super::NamespaceRules). A process
/// that matches several workloads belongs to the first of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostRules {
    /// The port that other agents dial.
    pub mesh_port: u16,
    /// The agent's port for other agents; none while it does not listen.
    pub mesh_listener: Option<u16>,
    /// The agent's port for what comes in without the mesh; none while it does not listen.
    pub plaintext_port: Option<u16>,
    /// The declared workloads.
    pub workloads: Vec<HostWorkload>,
}

/// A workload on a plain machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostWorkload {
    /// What tells it from the others, whatever its process is.
    pub name: String,
    /// Which processes it is; none while the kernel cannot be told, as when its cgroup is not there. Its
    /// service ports are protected all the same.
    pub process: Option<ProcessMatch>,
    /// The agent's port for what this workload sends, no other's; none while it does not listen.
    pub outbound_port: Option<u16>,
    /// The ports it serves.
    pub service_ports: Vec<u16>,
    /// What becomes of its connections that cannot be led to the agent.
    pub unroutable: Unroutable,
}

/// How the kernel tells a workload's processes, by their sockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProcessMatch {
    /// The socket's user id.
    User(u32),
    /// The cgroup that the process was in when it made the socket.
    Cgroup {
        /// The depth of `path`: 1 for a child of the root. A cgroup below `path` matches too.
        level: u32,
        /// The path from the root of the cgroup2 hierarchy, as in `/proc/<pid>/cgroup`.
        path: String,
    },
}

impl HostRules {
    /// The rules as a description; nothing is changed.
    ///
    /// A cgroup is known to the kernel by its inode, looked up here: one that is made anew, as
    /// systemd does when a service restarts, needs the rules installed again.
    pub fn ruleset(&self) -> Result<Ruleset> {
        self.check()?;
        let served = self.service_ports();
        let mut sets = older_sets();
        sets.push(Set { name: SERVED, content: SetContent::Ports(served.clone()) });
        let mut chains = vec![Chain::named(UNDECIDED), older_chain(), dialled_chain(), answers()];
        let mut output = Chain::at("output", Hook::ROUTE_OUTPUT)
            .rule([tcp(Is::Not), pass()])
            .rules(agents_own_untracked());
        for (index, workload) in self.workloads.iter().enumerate() {
            let Some(process) = &workload.process else { continue };
            let name = format!("workload_{index}");
            output = output.rule([process.expressions()?, goto(&name)]);
            chains.push(workload_chain(name, workload));
        }
        let output =
            output.rule([source_port_in(SERVED), opening(Is::Not), goto("answers")]).rule([
                to_loopback(Is::Equal),
                destination_port_in(SERVED),
                to_this_host(Is::Equal),
                untracked(),
                opening(Is::Equal),
                set_mark(captured(self.plaintext_port.unwrap_or(0))),
            ]);
        chains.extend([
            self.loopback_chain(),
            self.mesh_chain(),
            self.plaintext_chain(),
            output,
            self.prerouting(),
            self.guard_output(),
            self.leaving(),
        ]);
        Ok(Ruleset {
            sets,
            chains,
            routing: Routing::Host { users: self.users(), service_ports: served.clone() },
            scope: Scope::Host {
                processes: self
                    .workloads
                    .iter()
                    .filter_map(|workload| {
                        Some(Process {
                            name: workload.name.clone(),
                            process: workload.process.clone()?,
                            service_ports: workload.service_ports.iter().copied().collect(),
                            unroutable: workload.unroutable,
                        })
                    })
                    .collect(),
                declared: self.workloads.iter().map(|workload| workload.name.clone()).collect(),
                service_ports: served,
                passing_ports: self.passing_ports(),
            },
            owner: String::new(),
        })
    }

    /// Those that are no other workload's as well.
    fn passing_ports(&self) -> BTreeSet<u16> {
        let of = |what| {
            let workloads = self.workloads.iter().filter(move |one| one.unroutable == what);
            workloads.flat_map(|one| one.service_ports.iter().copied()).collect::<BTreeSet<_>>()
        };
        of(Unroutable::Pass).difference(&of(Unroutable::Refuse)).copied().collect()
    }

    /// Those that the kernel's routing can tell. Of root's sockets it cannot tell what comes in from what goes out.
    fn users(&self) -> BTreeSet<u32> {
        let users = self.workloads.iter().filter_map(|workload| match &workload.process {
            Some(ProcessMatch::User(user)) if *user != 0 => Some(*user),
            Some(ProcessMatch::User(_) | ProcessMatch::Cgroup { .. }) | None => None,
        });
        users.collect()
    }

    fn prerouting(&self) -> Chain {
        let chain = Chain::at("prerouting", Hook::PREROUTING)
            .rule([tcp(Is::Not), pass()])
            .rule([from_loopback(Is::Equal), goto("from_loopback")])
            // A machine may route for others: what only passes through is not ours.
            .rule([destination_port(self.mesh_port), to_this_host(Is::Equal), goto("mesh")])
            .rule([destination_port_in(SERVED), to_this_host(Is::Equal), goto("plaintext")]);
        // The socket of a connection that is accepted here inherits the mark, which tells its answers from what
        // its process opens. What only passes through would look false otherwise, as if ports of its numbers
        // were ours; kernels differ in which of the two they look at.
        [opening(Is::Equal), source_port_in(SERVED), destination_port_in(SERVED)]
            .into_iter()
            .fold(chain, |chain, which| chain.rule([which, unmarked(), set_mark(MARK_UNCAPTURED)]))
    }

    /// See the one of the namespace rules.
    fn loopback_chain(&self) -> Chain {
        let mut chain =
            mesh_from_loopback(Chain::named("from_loopback"), self.mesh_port, self.mesh_listener)
                // Before the answers of older connections, which look like those that the agent carries.
                .rule([opening(Is::Not), jump(UNDECIDED)])
                .rules(carried())
                .rule([opening(Is::Not), pass()]);
        chain = given_back_to_listener(chain);
        for port in self.workloads.iter().filter_map(|workload| workload.outbound_port) {
            chain = held(chain, port, || mark(captured(port)));
        }
        if let Some(port) = self.plaintext_port {
            for family in Family::ALL {
                chain =
                    chain.rule([mark(captured(port)), to_listener(family, port), let_through()]);
            }
        }
        chain.rule([masked_mark(Is::Equal, captured(0), CAPTURED_BITS), reset()])
    }

    fn mesh_chain(&self) -> Chain {
        families_to_listener(Chain::named("mesh"), self.mesh_listener).rule([
            opening(Is::Equal),
            set_mark(MARK_UNCAPTURED),
            reset(),
        ])
    }

    fn plaintext_chain(&self) -> Chain {
        // Or the rule that leads the answers from these ports to loopback would make its source look false.
        let chain = Chain::named("plaintext").rule([set_mark(MARK_UNCAPTURED)]);
        families_to_listener(chain, self.plaintext_port).rule([opening(Is::Equal), reset()])
    }

    /// As that of a namespace, for each workload by itself.
    fn leaving(&self) -> Chain {
        let chain = self.workloads.iter().fold(leaving(), |chain, workload| {
            let own = || mark(captured(workload.outbound_port.unwrap_or(0)));
            // The mark of those without a listener is of all of them.
            let what = match workload.outbound_port {
                Some(_) => workload.unroutable,
                None => Unroutable::Refuse,
            };
            unroutable(chain, own, what)
        });
        chain
            .rule([masked_mark(Is::Equal, captured(0), CAPTURED_BITS), discard()])
            .rule([mark(MARK_TRANSPARENT), discard()])
            .rule([given_back(), discard()])
    }

    /// Nobody but the agent reaches the agents of other hosts: it would take the room of all workloads here.
    fn guard_output(&self) -> Chain {
        Chain::at("guard_output", Hook::FILTER_OUTPUT)
            .rule([tcp(Is::Not), pass()])
            .rule(published::untranslated())
            .rule([destination_port(self.mesh_port), opening(Is::Equal), not_own(), reset()])
    }

    fn service_ports(&self) -> BTreeSet<u16> {
        self.workloads.iter().flat_map(|workload| workload.service_ports.iter().copied()).collect()
    }

    /// Every port of the agent's has one meaning and every process one workload, or identities would mix.
    fn check(&self) -> Result<()> {
        let refuse = |reason: String| Err(Error::InvalidRules { reason });
        let mut ports = BTreeSet::new();
        let own = [Some(self.mesh_port), self.mesh_listener, self.plaintext_port];
        let outbound = self.workloads.iter().map(|workload| workload.outbound_port);
        for port in own.into_iter().chain(outbound).flatten() {
            if port == 0 {
                return refuse("port 0 is not a port".to_owned());
            }
            if !ports.insert(port) {
                return refuse(format!("the port {port} is used twice"));
            }
        }
        if self.service_ports().contains(&self.mesh_port) {
            return refuse(format!("the port {} is that of the agents", self.mesh_port));
        }
        for (index, workload) in self.workloads.iter().enumerate() {
            let others = self.workloads.iter().skip(index + 1);
            if let Some(process) = &workload.process
                && others.into_iter().any(|other| other.process.as_ref() == Some(process))
            {
                return refuse(format!("two workloads are {process:?}"));
            }
        }
        Ok(())
    }
}

/// What a workload's process sends.
fn workload_chain(name: String, workload: &HostWorkload) -> Chain {
    let own_mark = captured(workload.outbound_port.unwrap_or(0));
    let here = || [to_loopback(Is::Equal), to_this_host(Is::Equal)];
    let chain = Chain::named(name)
        .rule([source_port_in(SERVED), opening(Is::Not), goto("answers")])
        // Its socket was accepted, and inherited a mark: it answers on a port that nobody declared.
        .rule([opening(Is::Not), marked(), pass()])
        .rule([jump("older")])
        // Captured already, by the routing rules or by its first packet.
        .rule([
            opening(Is::Not),
            to_loopback(Is::Equal),
            to_this_host(Is::Not),
            untracked(),
            pass(),
        ])
        .rule([
            opening(Is::Not),
            to_loopback(Is::Equal),
            destination_port_in(SERVED),
            untracked(),
            pass(),
        ])
        .rule([opening(Is::Not), to_loopback(Is::Equal), pass()]);
    let chain = workload.service_ports.iter().fold(chain, |chain, port| {
        let [loopback, this_host] = here();
        chain.rule([destination_port(*port), loopback, this_host, pass()])
    });
    let [loopback, this_host] = here();
    let chain = chain.rule([
        destination_port_in(SERVED),
        loopback,
        this_host,
        set_mark(own_mark),
        untracked(),
        let_through(),
    ]);
    let [loopback, this_host] = here();
    chain.rule([loopback, this_host, pass()]).rule([set_mark(own_mark), untracked()])
}

/// What is answered on a port that a workload serves goes to the agent's end of the connection, on loopback.
fn answers() -> Chain {
    Chain::named("answers")
        .rule([jump("older")])
        .rule([to_loopback(Is::Equal), pass()])
        .rule([set_mark(MARK_TRANSPARENT), untracked()])
}

impl ProcessMatch {
    /// What the kernel knows it by; of a cgroup that is made anew, another.
    pub fn kernel_id(&self) -> Result<u64> {
        match self {
            ProcessMatch::User(uid) => Ok(u64::from(*uid)),
            ProcessMatch::Cgroup { level, path } => cgroup_id(*level, path),
        }
    }

    /// Whether one of its processes made this socket.
    ///
    /// # Errors
    /// If its cgroup cannot be looked up.
    pub fn made(&self, socket: &TcpSocket) -> Result<bool> {
        match self {
            ProcessMatch::User(user) => Ok(socket.user == *user),
            ProcessMatch::Cgroup { .. } => {
                let mut cgroups = HashSet::new();
                self.cgroups_below(&mut cgroups)?;
                Ok(socket.cgroup.is_some_and(|cgroup| cgroups.contains(&cgroup)))
            }
        }
    }

    /// The numbers of its cgroup and of those below it; none of a user.
    pub(super) fn cgroups_below(&self, found: &mut HashSet<u64>) -> Result<()> {
        let Self::Cgroup { level, path } = self else { return Ok(()) };
        found.insert(cgroup_id(*level, path)?);
        let mut folders = vec![cgroup2_root()?.join(path.trim_start_matches('/'))];
        while let Some(folder) = folders.pop() {
            // One that goes meanwhile has no sockets any more.
            let Ok(entries) = std::fs::read_dir(folder) else { continue };
            for entry in entries.flatten() {
                if let Ok(metadata) = entry.metadata()
                    && metadata.is_dir()
                {
                    found.insert(metadata.ino());
                    folders.push(entry.path());
                }
            }
        }
        Ok(())
    }

    fn expressions(&self) -> Result<Vec<Expression>> {
        match self {
            ProcessMatch::User(uid) => Ok(user(*uid)),
            ProcessMatch::Cgroup { level, path } => Ok(cgroup(*level, cgroup_id(*level, path)?)),
        }
    }
}

/// The kernel's id of a cgroup, which is its folder's inode.
fn cgroup_id(level: u32, path: &str) -> Result<u64> {
    let relative = Path::new(path.trim_start_matches('/'));
    let normal = relative.components().all(|component| matches!(component, Component::Normal(_)));
    let depth = relative.components().count();
    if !normal || depth == 0 || u32::try_from(depth) != Ok(level) {
        return Err(Error::InvalidRules {
            reason: format!("the cgroup {path:?} is not {level} levels below the root"),
        });
    }
    let folder = cgroup2_root()?.join(relative);
    match std::fs::metadata(&folder) {
        Ok(metadata) if metadata.is_dir() => Ok(metadata.ino()),
        Ok(_) => Err(Error::NoSuchCgroup { path: folder }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(Error::NoSuchCgroup { path: folder })
        }
        Err(error) => Err(error).context(format!("looking up the cgroup {}", folder.display())),
    }
}

fn cgroup2_root() -> Result<PathBuf> {
    CGROUP2_MOUNTS
        .iter()
        .find(|mount| {
            statfs(**mount).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC)
        })
        .map(PathBuf::from)
        .ok_or_else(|| Error::NoCgroup2 { looked_at: CGROUP2_MOUNTS.join(", ") })
}
