//! The rules on a plain machine: declared processes only, told by user or cgroup.

use std::{
    collections::BTreeSet,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::{
    expression::{
        Expression, Is, cgroup, destination_port, from_loopback, goto, opening, pass, redirect_to,
        redirected, reset, tcp, to_loopback, to_this_host, user,
    },
    our_own,
    ruleset::{Chain, Hook, Ruleset},
    transparent,
};
use crate::error::{Context, Error, Result};

/// Where cgroup2 is mounted: alone, or beside the version 1 controllers.
const CGROUP2_MOUNTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// Capture of declared workloads among everything else that runs on a machine.
///
/// - TCP of a workload's process goes to that workload's `outbound_port`: the port tells the
///   identity. Over loopback only what goes to another workload's service port is taken.
/// - TCP to a service port goes to `plaintext_port`, whether from outside or from a process of
///   the machine that is no declared workload; `mesh_port` is reached directly.
/// - Everything else is left alone.
///
/// Whoever serves no port of the agent's (`None`) is refused instead of redirected: an agent that cannot
/// listen, or a workload whose processes the kernel cannot tell yet, leaves nothing open.
///
/// The agent's outbound listeners should be bound to loopback, where the rules send to. A process
/// that matches several workloads belongs to the first of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostRules {
    /// The agent's port for other agents.
    pub mesh_port: u16,
    /// The agent's port for what comes in without the mesh; none while it does not listen.
    pub plaintext_port: Option<u16>,
    /// The declared workloads.
    pub workloads: Vec<HostWorkload>,
}

/// A workload on a plain machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostWorkload {
    /// Which processes it is; none while the kernel cannot be told, as when its cgroup is not there. Its
    /// service ports are protected all the same.
    pub process: Option<ProcessMatch>,
    /// The agent's port for what this workload sends, no other's; none while it does not listen.
    pub outbound_port: Option<u16>,
    /// The ports it serves.
    pub service_ports: Vec<u16>,
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
        let processes = self
            .workloads
            .iter()
            .map(|workload| workload.process.as_ref().map(ProcessMatch::expressions).transpose())
            .collect::<Result<Vec<_>>>()?;

        let mut output =
            Chain::at("output", Hook::NAT_OUTPUT).rule([tcp(Is::Not), pass()]).rules(our_own());
        let mut guard_output =
            Chain::at("guard_output", Hook::FILTER_OUTPUT)
                .rule([tcp(Is::Not), pass()])
                .rules(our_own())
                .rules(self.closed_ports().map(|port| {
                    [to_loopback(Is::Equal), destination_port(port), opening(), reset()]
                }))
                .rule([to_loopback(Is::Equal), pass()])
                .rule([redirected(), pass()]);
        let mut own = Vec::new();
        for (index, (workload, process)) in self.workloads.iter().zip(&processes).enumerate() {
            let Some(process) = process else { continue };
            guard_output = guard_output.rule([process.clone(), opening(), reset()]);
            let Some(outbound_port) = workload.outbound_port else { continue };
            let name = format!("workload_{index}");
            output = output.rule([process.clone(), goto(&name)]);
            own.push(self.workload_chain(name, workload, outbound_port));
        }
        let output = output.rules(self.redirected_ports().map(|(port, plaintext)| {
            [to_loopback(Is::Equal), destination_port(port), opening(), redirect_to(plaintext)]
        }));

        let mut chains = own;
        chains.extend([
            output,
            self.prerouting(),
            transparent::chain(),
            guard_output,
            self.guard_input(),
        ]);
        Ok(Ruleset { chains })
    }

    /// Installs the rules in the calling thread's namespace, in place of any earlier ones.
    pub fn install(&self) -> Result<()> {
        self.ruleset()?.install()
    }

    /// What a workload sends.
    fn workload_chain(&self, name: String, workload: &HostWorkload, outbound_port: u16) -> Chain {
        let own_port = |port: &u16| workload.service_ports.contains(port);
        Chain::named(name)
            .rules(self.service_ports().filter(|port| !own_port(port)).map(|port| {
                [
                    to_loopback(Is::Equal),
                    destination_port(port),
                    opening(),
                    redirect_to(outbound_port),
                ]
            }))
            .rule([to_loopback(Is::Equal), pass()])
            .rule([opening(), redirect_to(outbound_port)])
    }

    fn prerouting(&self) -> Chain {
        Chain::at("prerouting", Hook::NAT_PREROUTING)
            .rule([tcp(Is::Not), pass()])
            .rule([from_loopback(Is::Equal), pass()])
            .rules(self.redirected_ports().map(|(port, plaintext)| {
                [
                    destination_port(port),
                    // A machine may route for others: what only passes through is not ours.
                    to_this_host(),
                    opening(),
                    redirect_to(plaintext),
                ]
            }))
    }

    /// Refuses from outside what must never arrive there: a service port that escaped the
    /// redirection (see the guard of the namespace rules), and the agent's outbound ports.
    fn guard_input(&self) -> Chain {
        let outbound_ports = self.workloads.iter().filter_map(|workload| workload.outbound_port);
        Chain::at("guard_input", Hook::FILTER_INPUT)
            .rule([tcp(Is::Not), pass()])
            .rule([from_loopback(Is::Equal), pass()])
            .rules(
                self.service_ports()
                    .chain(outbound_ports)
                    .map(|port| [destination_port(port), opening(), reset()]),
            )
    }

    fn service_ports(&self) -> impl Iterator<Item = u16> {
        let ports: BTreeSet<u16> = self
            .workloads
            .iter()
            .flat_map(|workload| workload.service_ports.iter().copied())
            .collect();
        ports.into_iter()
    }

    /// The service ports, each with where its connections go instead.
    fn redirected_ports(&self) -> impl Iterator<Item = (u16, u16)> {
        let plaintext = self.plaintext_port;
        self.service_ports().filter_map(move |port| Some((port, plaintext?)))
    }

    /// Those whose connections have nowhere else to go.
    fn closed_ports(&self) -> impl Iterator<Item = u16> {
        let open = self.plaintext_port.is_some();
        self.service_ports().filter(move |_| !open)
    }

    /// Every port has one meaning and every process one workload, or identities would mix.
    fn check(&self) -> Result<()> {
        let refuse = |reason: String| Err(Error::InvalidRules { reason });
        let mut ports = BTreeSet::new();
        let all = std::iter::once(self.mesh_port).chain(self.plaintext_port).chain(
            self.workloads.iter().flat_map(|workload| {
                workload.outbound_port.into_iter().chain(workload.service_ports.clone())
            }),
        );
        for port in all {
            if port == 0 {
                return refuse("port 0 is not a port".to_owned());
            }
            if !ports.insert(port) {
                return refuse(format!("the port {port} is used twice"));
            }
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

impl ProcessMatch {
    /// What the kernel knows it by; of a cgroup that is made anew, another.
    pub fn kernel_id(&self) -> Result<u64> {
        match self {
            ProcessMatch::User(uid) => Ok(u64::from(*uid)),
            ProcessMatch::Cgroup { level, path } => cgroup_id(*level, path),
        }
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
