//! What only shows when all manifests are seen together.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::Hash,
    net::IpAddr,
};

use super::{Located, ManifestError};
use crate::{
    identity::ResourceName,
    policy::{Object, Process, ProcessSelector},
};

/// Checks all objects of a mesh against each other: each name once, each process one identity,
/// each address and port one process, no Workload without its Machine.
///
/// Two workloads with one network namespace are one process twice, whatever ports they serve.
///
/// # Errors
/// Every clash, at the later of the two objects, naming the earlier one's file and line.
pub fn check_set(objects: &[Located<Object>]) -> Result<(), Vec<ManifestError>> {
    let mut check = Check::default();
    // Names first, so that a Workload may stand before its Machine. What stands twice is told
    // once: its addresses and ports would clash as well.
    let firsts: Vec<&Located<Object>> =
        objects.iter().filter(|object| check.name(object)).collect();
    for object in firsts {
        check.place(object);
    }
    if check.errors.is_empty() { Ok(()) } else { Err(check.errors) }
}

#[derive(Default)]
struct Check<'a> {
    errors: Vec<ManifestError>,
    /// By kind and name; the value of each is where the first stands.
    names: HashMap<(&'static str, String), String>,
    processes: HashMap<(&'a ResourceName, ProcessKey<'a>), String>,
    ports: HashMap<(&'a ResourceName, u16), String>,
    /// Also whose it is.
    addresses: HashMap<IpAddr, (String, String)>,
}

/// A selector without what does not tell processes apart.
#[derive(PartialEq, Eq, Hash)]
enum ProcessKey<'a> {
    User(&'a str),
    Cgroup(&'a str),
    NetworkNamespace(&'a str),
}

impl<'a> Check<'a> {
    /// Whether the object is the first of its kind and name.
    fn name(&mut self, object: &'a Located<Object>) -> bool {
        let (kind, name) = match &object.value {
            Object::AccessPolicy(policy) => ("AccessPolicy", policy.name.to_string()),
            Object::Guardrail(guardrail) => ("Guardrail", guardrail.name.to_string()),
            Object::Machine(machine) => ("Machine", machine.name.to_string()),
            Object::Workload(workload) => {
                ("Workload", format!("{}/{}", workload.namespace, workload.name))
            }
        };
        let first = claim(&mut self.names, (kind, name.clone()), object);
        if let Some(first) = &first {
            let problem = format!("{kind} {name} stands twice, first at {first}");
            self.wrong(object, "metadata.name", problem, "rename or remove one of the two");
        }
        first.is_none()
    }

    fn place(&mut self, object: &'a Located<Object>) {
        match &object.value {
            Object::AccessPolicy(_) | Object::Guardrail(_) => {}
            Object::Machine(machine) => {
                for address in &machine.addresses {
                    self.address(object, *address, format!("machine {}", machine.name));
                }
                if let Some(process) = &machine.workload {
                    self.process(object, &machine.name, process);
                }
            }
            Object::Workload(workload) => {
                let machine = &workload.machine;
                if !self.names.contains_key(&("Machine", machine.to_string())) {
                    let problem = format!("there is no Machine {machine}");
                    self.wrong(object, "spec.machine", problem, "declare it, or correct the name");
                }
                self.process(object, machine, &workload.process);
            }
        }
    }

    fn process(
        &mut self,
        object: &'a Located<Object>,
        machine: &'a ResourceName,
        process: &'a Process,
    ) {
        let (key, what) = match &process.selector {
            ProcessSelector::User(user) => (ProcessKey::User(user), format!("user {user}")),
            ProcessSelector::Cgroup(path) => (ProcessKey::Cgroup(path), format!("cgroup {path}")),
            ProcessSelector::NetworkNamespace { name, .. } => {
                (ProcessKey::NetworkNamespace(name), format!("network namespace {name}"))
            }
            // No manifest can say so.
            ProcessSelector::Pod { .. } => return,
        };
        if let Some(first) = claim(&mut self.processes, (machine, key), object) {
            let problem = format!("{what} of machine {machine} is a workload already, at {first}");
            let mend = "give each workload a process of its own: it can have one identity only";
            self.wrong(object, "spec.process", problem, mend);
            return;
        }
        match &process.selector {
            ProcessSelector::NetworkNamespace { name, addresses } => {
                let whose = format!("network namespace {name} of machine {machine}");
                for address in addresses {
                    self.address(object, *address, whose.clone());
                }
            }
            // Processes of the host share its addresses, and so its ports.
            ProcessSelector::User(_) | ProcessSelector::Cgroup(_) | ProcessSelector::Pod { .. } => {
                for port in &process.ports {
                    if let Some(first) = claim(&mut self.ports, (machine, *port), object) {
                        let problem = format!(
                            "port {port} of machine {machine} is served already, at {first}"
                        );
                        let mend = "let one workload of a machine serve each port";
                        self.wrong(object, "spec.ports", problem, mend);
                    }
                }
            }
        }
    }

    fn address(&mut self, object: &Located<Object>, address: IpAddr, whose: String) {
        match self.addresses.entry(address) {
            Entry::Vacant(entry) => {
                entry.insert((position(object), whose));
            }
            Entry::Occupied(entry) => {
                let (first, owner) = entry.get();
                let problem = format!("{address} is an address of {owner} already, at {first}");
                self.wrong(object, "spec.addresses", problem, "give each addresses of its own");
            }
        }
    }

    fn wrong(&mut self, at: &Located<Object>, path: &str, problem: String, mend: &str) {
        self.errors.push(ManifestError {
            source: at.source.clone(),
            line: at.line,
            column: 1,
            path: path.to_owned(),
            problem,
            mend: mend.to_owned(),
        });
    }
}

/// Claims a key; gives where the object stands that claimed it before.
fn claim<K: Hash + Eq>(
    claims: &mut HashMap<K, String>,
    key: K,
    object: &Located<Object>,
) -> Option<String> {
    match claims.entry(key) {
        Entry::Occupied(entry) => Some(entry.get().clone()),
        Entry::Vacant(entry) => {
            entry.insert(position(object));
            None
        }
    }
}

fn position(object: &Located<Object>) -> String {
    format!("{}:{}", object.source, object.line)
}
