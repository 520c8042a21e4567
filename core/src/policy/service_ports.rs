//! Rules that name a service's port where they mean that of its pods.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use super::{
    MeshService,
    resolve::{MeshWorkload, Resolved, Unresolved},
};
use crate::identity::SpiffeId;

/// Where the ports of services lead, by the addresses that they lead to.
#[derive(Default)]
pub struct ServicePorts<'a> {
    led: HashMap<IpAddr, Vec<Led<'a>>>,
}

#[derive(Clone, Copy)]
struct Led<'a> {
    service: &'a MeshService,
    port: u16,
    target: u16,
}

impl<'a> ServicePorts<'a> {
    /// Of these services.
    #[must_use]
    pub fn of(services: &'a [MeshService]) -> Self {
        let mut led: HashMap<IpAddr, Vec<Led<'a>>> = HashMap::new();
        for service in services {
            for (port, backends) in &service.ports {
                for backend in backends.keys() {
                    let one = Led { service, port: *port, target: backend.port() };
                    led.entry(backend.ip()).or_default().push(one);
                }
            }
        }
        Self { led }
    }

    /// If a port of these addresses is one that a service has and leads to others: which service that is, and to which ones.
    #[must_use]
    pub fn elsewhere(
        &self,
        addresses: impl IntoIterator<Item = IpAddr>,
        port: u16,
    ) -> Option<(String, BTreeSet<u16>)> {
        let led = addresses.into_iter().filter_map(|address| self.led.get(&address)).flatten();
        let led: Vec<_> = led.filter(|led| led.port == port).collect();
        let targets: BTreeSet<u16> = led.iter().map(|led| led.target).collect();
        let service = led.first()?.service;
        (!targets.contains(&port))
            .then(|| (format!("{}/{}", service.namespace, service.name), targets))
    }
}

/// Notes each rule that allows the port of a service, and not the one of the pods that it leads to: connections are decided
/// by the latter, so that it allows nothing which goes through the service.
pub fn note_service_ports(resolved: &mut Resolved, services: &[MeshService]) {
    let ports = ServicePorts::of(services);
    let mut workloads: HashMap<&SpiffeId, Vec<&MeshWorkload>> = HashMap::new();
    for workload in &resolved.workloads {
        workloads.entry(&workload.identity).or_default().push(workload);
    }
    // By policy and rule, once for all of a policy's destinations.
    let mut found = BTreeMap::new();
    for policy in &resolved.policies {
        let of_it = workloads.get(&policy.destination).map(Vec::as_slice).unwrap_or_default();
        for rule in &policy.rules {
            for port in &rule.ports {
                if of_it.iter().any(|workload| workload.ports.contains(port)) {
                    continue;
                }
                let addresses =
                    of_it.iter().flat_map(|workload| workload.addresses.iter().copied());
                let Some((service, targets)) = ports.elsewhere(addresses, *port) else { continue };
                if targets.iter().all(|target| rule.ports.contains(target)) {
                    continue;
                }
                let targets: Vec<String> = targets.iter().map(u16::to_string).collect();
                let problem = format!(
                    "rule {} allows port {port}, which is that of Service {service}; its pods listen on {}, and rules are \
                     about the pods' ports",
                    rule.name,
                    targets.join(" and ")
                );
                found.insert((policy.policy.clone(), rule.name.clone(), *port), problem);
            }
        }
    }
    resolved
        .unresolved
        .extend(found.into_iter().map(|((policy, ..), problem)| Unresolved { policy, problem }));
}
