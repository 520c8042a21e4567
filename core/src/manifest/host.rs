//! Machine and Workload: which process on which host is whom.

use std::{collections::BTreeSet, net::IpAddr};

use super::{
    objects::{Metadata, Scope, all, mode},
    peers::ports,
    reader::{Field, Fields},
    words::quoted,
};
use crate::policy::{Machine, Process, ProcessSelector, Workload};

pub(super) fn machine(metadata: Option<Metadata>, spec: &Field<'_>) -> Option<Machine> {
    let fields = spec.fields(&["addresses", "process", "ports", "mode"])?;
    let addresses = fields.optional("addresses", addresses);
    let workload = match fields.given("process") {
        Some(field) => process(&fields, host_process(&field)).map(Some),
        None => all::<_, (), ()>(["ports", "mode"], |name| match fields.given(name) {
            None => Some(()),
            Some(field) => field.wrong(
                format_args!("{name} is about a process, and spec.process is missing"),
                "add spec.process, or remove this field",
            ),
        })
        .map(|()| None),
    };
    let metadata = metadata?;
    Some(Machine {
        name: metadata.name,
        addresses: addresses?.unwrap_or_default(),
        labels: metadata.labels,
        workload: workload?,
    })
}

pub(super) fn workload(metadata: Option<Metadata>, spec: &Field<'_>) -> Option<Workload> {
    let fields =
        spec.fields(&["machine", "serviceAccount", "process", "addresses", "ports", "mode"])?;
    let machine = fields.required("machine", "batch-01", Field::name_or_map);
    let service_account = fields.required("serviceAccount", "ledger", Field::name_or_map);
    let selector = fields.required("process", "{user: ledger}", |field| selector(&fields, field));
    let process = process(&fields, selector);
    let metadata = metadata?;
    let Scope::Namespace(namespace) = metadata.scope else { return None };
    Some(Workload {
        namespace,
        name: metadata.name,
        labels: metadata.labels,
        service_account: service_account?,
        machine: machine?,
        process: process?,
    })
}

fn process(spec: &Fields<'_>, selector: Option<ProcessSelector>) -> Option<Process> {
    let ports = spec.required("ports", "[8080], or [] for a process that only calls", ports);
    let mode = mode(spec);
    Some(Process { selector: selector?, ports: ports?, mode: mode? })
}

/// A machine speaks through a process of the host; a network namespace would be another host.
fn host_process(field: &Field<'_>) -> Option<ProcessSelector> {
    const KINDS: &[&str] = &["user", "cgroup"];
    let (which, chosen) = field.fields(KINDS)?.one_of(KINDS)?;
    match which {
        "user" => user(&chosen),
        _ => cgroup(&chosen),
    }
}

fn selector(spec: &Fields<'_>, field: &Field<'_>) -> Option<ProcessSelector> {
    const KINDS: &[&str] = &["user", "cgroup", "networkNamespace"];
    let (which, chosen) = field.fields(KINDS)?.one_of(KINDS)?;
    if which == "networkNamespace" {
        let name = network_namespace(&chosen);
        let addresses = spec.required("addresses", "[10.0.0.5], those of the namespace", |field| {
            field.some_list()?;
            addresses(field)
        });
        return Some(ProcessSelector::NetworkNamespace { name: name?, addresses: addresses? });
    }
    let unneeded = spec.optional("addresses", |field| {
        field.wrong::<()>(
            format_args!("a process told apart by {which} has the addresses of its machine"),
            "remove them here; the Machine has them",
        )
    });
    let selector = if which == "user" { user(&chosen) } else { cgroup(&chosen) };
    unneeded.and(selector)
}

fn user(field: &Field<'_>) -> Option<ProcessSelector> {
    // A number is as good as text here: digits as everybody writes them mean one user.
    let text = match field.unquoted() {
        Some(number) => number,
        None => field.text()?,
    };
    if ProcessSelector::is_user(text) {
        return Some(ProcessSelector::User(text.to_owned()));
    }
    field.wrong(
        format_args!("{} is not a Unix user", quoted(text)),
        "write a user's name, or its number as in \"1000\"",
    )
}

fn cgroup(field: &Field<'_>) -> Option<ProcessSelector> {
    let text = field.text()?;
    if ProcessSelector::is_cgroup(text) {
        return Some(ProcessSelector::Cgroup(text.to_owned()));
    }
    field.wrong(
        format_args!("{} is not the path of a cgroup below the root", quoted(text)),
        "write it without leading or trailing slash and .., such as system.slice/ledger.service",
    )
}

fn network_namespace(field: &Field<'_>) -> Option<String> {
    let text = field.text()?;
    if ProcessSelector::is_network_namespace(text) {
        return Some(text.to_owned());
    }
    field.wrong(
        format_args!("{} is not the name of a network namespace", quoted(text)),
        "write the name that ip netns shows: letters, digits, ., _ and -, no path",
    )
}

fn addresses(field: &Field<'_>) -> Option<BTreeSet<IpAddr>> {
    let mut addresses = BTreeSet::new();
    all::<_, (), ()>(field.list()?, |field| {
        let address = field.address()?;
        let unusable = match address {
            IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => Some("an IPv4 address in disguise"),
            IpAddr::V4(v4) if v4.is_broadcast() => Some("the broadcast address"),
            address if address.is_loopback() => Some("a loopback address"),
            address if address.is_unspecified() => Some("the unspecified address"),
            address if address.is_multicast() => Some("a multicast address"),
            IpAddr::V4(_) | IpAddr::V6(_) => None,
        };
        if let Some(what) = unusable {
            let mend = "write an address at which other machines reach it, such as 10.0.0.5";
            return field.wrong(format_args!("{address} is {what}"), mend);
        }
        if addresses.insert(address) {
            return Some(());
        }
        field.wrong(format_args!("the address {address} stands twice"), "name it once")
    })?;
    Some(addresses)
}
