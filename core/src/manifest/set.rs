//! What only shows when all manifests are seen together.

use std::{collections::HashMap, hash::Hash, net::IpAddr};

use super::{Located, ManifestError};
use crate::policy::{Object, ProcessSelector};

/// Checks all objects of a mesh against each other.
///
/// # Errors
/// Every clash, at the later of the two objects, naming the earlier one's place.
pub fn check_set(objects: &[Located<Object>]) -> Result<(), Vec<ManifestError>> {
    let mut check = Check::default();
    for object in objects {
        check.name(object);
    }
    for object in objects {
        check.place(object);
    }
    if check.errors.is_empty() { Ok(()) } else { Err(check.errors) }
}

#[derive(Default)]
struct Check {
    errors: Vec<ManifestError>,
    names: HashMap<(&'static str, String), String>,
    processes: HashMap<(String, ProcessKey), String>,
    addresses: HashMap<IpAddr, (String, String)>,
    ports: HashMap<(String, u16), String>,
}

#[derive(PartialEq, Eq, Hash)]
enum ProcessKey {
    User(String),
    Cgroup(String),
    Namespace(String),
}

impl Check {
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

    fn name(&mut self, object: &Located<Object>) {
        let (kind, name) = match &object.value {
            Object::AccessPolicy(policy) => ("AccessPolicy", policy.name.to_string()),
            Object::Guardrail(guardrail) => ("Guardrail", guardrail.name.to_string()),
            Object::Machine(machine) => ("Machine", machine.name.to_string()),
            Object::Workload(workload) => {
                ("Workload", format!("{}/{}", workload.namespace, workload.name))
            }
        };
        if let Some(first) = claim(&mut self.names, (kind, name.clone()), object) {
            self.wrong(
                object,
                "metadata.name",
                format!("{kind} {name} stands at {first} too"),
                "give it another name, or remove one of the two",
            );
        }
    }

    fn place(&mut self, object: &Located<Object>) {
        match &object.value {
            Object::AccessPolicy(_) | Object::Guardrail(_) => {}
            Object::Machine(machine) => {
                let machine_name = machine.name.to_string();
                for address in &machine.addresses {
                    self.address(object, *address, format!("host of {machine_name}"));
                }
                if let Some(process) = &machine.workload {
                    self.process(object, &machine_name, &process.selector);
                    for port in &process.ports {
                        self.port(object, &machine_name, *port);
                    }
                }
            }
            Object::Workload(workload) => {
                let machine = workload.machine.to_string();
                if !self.names.contains_key(&("Machine", machine.clone())) {
                    self.wrong(
                        object,
                        "spec.machine",
                        format!("there is no Machine {machine}"),
                        "declare the Machine, or correct the name",
                    );
                }
                self.process(object, &machine, &workload.process.selector);
                match &workload.process.selector {
                    ProcessSelector::NetworkNamespace { name, addresses } => {
                        for address in addresses {
                            self.address(
                                object,
                                *address,
                                format!("namespace {name} of {machine}"),
                            );
                        }
                    }
                    ProcessSelector::User(_) | ProcessSelector::Cgroup(_) => {
                        for port in &workload.process.ports {
                            self.port(object, &machine, *port);
                        }
                    }
                }
            }
        }
    }

    fn process(&mut self, object: &Located<Object>, machine: &str, selector: &ProcessSelector) {
        let (key, text) = match selector {
            ProcessSelector::User(user) => {
                (ProcessKey::User(user.clone()), format!("the user {user}"))
            }
            ProcessSelector::Cgroup(path) => {
                (ProcessKey::Cgroup(path.clone()), format!("the cgroup {path}"))
            }
            ProcessSelector::NetworkNamespace { name, .. } => {
                (ProcessKey::Namespace(name.clone()), format!("the network namespace {name}"))
            }
        };
        if let Some(first) = claim(&mut self.processes, (machine.to_owned(), key), object) {
            self.wrong(
                object,
                "spec.process",
                format!("{text} of machine {machine} is another workload already, at {first}"),
                "let each workload be a process of its own",
            );
        }
    }

    fn address(&mut self, object: &Located<Object>, address: IpAddr, place: String) {
        let here = format!("{}:{}", object.source, object.line);
        match self.addresses.get(&address) {
            Some((other, first)) if *other != place => {
                let problem =
                    format!("{address} is the address of the {other} already, at {first}");
                self.wrong(object, "spec.addresses", problem, "give each its own address");
            }
            Some(_) => {}
            None => {
                self.addresses.insert(address, (place, here));
            }
        }
    }

    fn port(&mut self, object: &Located<Object>, machine: &str, port: u16) {
        if let Some(first) = claim(&mut self.ports, (machine.to_owned(), port), object) {
            self.wrong(
                object,
                "spec.ports",
                format!(
                    "port {port} of machine {machine} is served by another workload, at {first}"
                ),
                "let one workload of a machine serve a port",
            );
        }
    }
}

/// Claims a key; gives back who had it before.
fn claim<K: Hash + Eq>(
    claims: &mut HashMap<K, String>,
    key: K,
    object: &Located<Object>,
) -> Option<String> {
    let here = format!("{}:{}", object.source, object.line);
    match claims.entry(key) {
        std::collections::hash_map::Entry::Occupied(entry) => Some(entry.get().clone()),
        std::collections::hash_map::Entry::Vacant(entry) => {
            entry.insert(here);
            None
        }
    }
}
