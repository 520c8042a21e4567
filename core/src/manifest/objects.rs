//! The kinds, field by field.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use super::{
    reader::{Field, Fields, Reader},
    tree::Node,
};
use crate::{
    identity::{IdentityKind, ResourceName},
    policy::{
        AccessPolicy, Expectation, Guardrail, GuardrailPeers, GuardrailPorts, GuardrailTarget,
        Machine, Mode, Object, Owner, PeerSelector, PolicyKind, PolicyRef, PolicyTest, Process,
        ProcessSelector, Rule, Target, Workload,
    },
};

const API_VERSION: &str = "hauberk.dev/v1alpha1";

const NAME: &str = "use lower-case letters, digits, - and ., such as checkout-2";

#[derive(Clone, Copy)]
enum Kind {
    AccessPolicy,
    Guardrail,
    Machine,
    Workload,
}

const KINDS: [(&str, Kind); 4] = [
    ("AccessPolicy", Kind::AccessPolicy),
    ("Guardrail", Kind::Guardrail),
    ("Machine", Kind::Machine),
    ("Workload", Kind::Workload),
];

const MODES: [(&str, Mode); 2] = [("Enforce", Mode::Enforce), ("Audit", Mode::Audit)];

struct Metadata {
    namespace: Option<ResourceName>,
    name: ResourceName,
    labels: BTreeMap<String, String>,
}

/// Reads one object; `None` if anything is wrong, which the reader then has.
pub(super) fn read(reader: &mut Reader, document: &Node) -> Option<Object> {
    let mut fields = reader.root(document).map()?;
    let version = fields.required("apiVersion").and_then(|field| {
        let text = field.text()?;
        if text == API_VERSION {
            return Some(());
        }
        field.wrong(format_args!("{text:?} is not supported"), format_args!("write {API_VERSION}"))
    });
    let kind = fields.required("kind").and_then(|field| field.word(&KINDS));
    let metadata = fields.required("metadata");
    let spec = fields.required("spec");
    // What the control plane writes into custom resources; a file may carry it along.
    let _status = fields.optional("status");
    fields.finish();
    let (kind, metadata, spec) = (kind?, metadata?, spec?);
    let namespaced = matches!(kind, Kind::AccessPolicy | Kind::Workload);
    let metadata = read_metadata(&metadata, namespaced);
    let mut spec = spec.map()?;
    let object = match kind {
        Kind::AccessPolicy => access_policy(metadata, &mut spec).map(Object::AccessPolicy),
        Kind::Guardrail => guardrail(metadata, &mut spec).map(Object::Guardrail),
        Kind::Machine => machine(metadata, &mut spec).map(Object::Machine),
        Kind::Workload => workload(metadata, &mut spec).map(Object::Workload),
    };
    spec.finish();
    version?;
    object
}

fn read_metadata(field: &Field<'_>, namespaced: bool) -> Option<Metadata> {
    let mut fields = field.map()?;
    let name = fields.required("name").and_then(|field| field.parsed::<ResourceName>(NAME));
    let namespace = if namespaced {
        fields.required("namespace").and_then(|field| field.parsed::<ResourceName>(NAME)).map(Some)
    } else {
        match fields.optional("namespace") {
            None => Some(None),
            Some(field) => {
                field.wrong("this kind belongs to no namespace", "remove metadata.namespace")
            }
        }
    };
    let labels = fields.optional("labels").map_or(Some(BTreeMap::new()), |field| labels(&field));
    let _annotations = fields.optional("annotations");
    fields.finish();
    Some(Metadata { namespace: namespace?, name: name?, labels: labels? })
}

fn labels(field: &Field<'_>) -> Option<BTreeMap<String, String>> {
    let fields = field.map()?;
    all(fields.entries(), |(key, field)| Some((key.to_owned(), field.text()?.to_owned())))
}

fn access_policy(metadata: Option<Metadata>, spec: &mut Fields<'_>) -> Option<AccessPolicy> {
    let owner = spec.required("owner").and_then(|field| owner(&field));
    let target = spec.required("target").and_then(|field| target(&field));
    let mode = mode(spec);
    let rules = spec.required("rules").and_then(|field| rules(&field));
    let tests = match spec.optional("tests") {
        None => Some(Vec::new()),
        Some(field) => field
            .list()
            .and_then(|list| all(list, |field| policy_test(&field).map(|test| (field, test)))),
    };
    let metadata = metadata?;
    let (rules, tests) = (rules?, tests?);
    let policy = AccessPolicy {
        name: PolicyRef {
            kind: PolicyKind::AccessPolicy,
            namespace: metadata.namespace,
            name: metadata.name,
        },
        owner: owner?,
        target: target?,
        mode: mode?,
        rules,
        tests: tests.iter().map(|(_, test)| test.clone()).collect(),
    };
    let held: Vec<Option<()>> =
        tests.iter().map(|(field, test)| hold_test(&policy, field, test)).collect();
    held.into_iter().all(|held| held.is_some()).then_some(policy)
}

fn owner(field: &Field<'_>) -> Option<Owner> {
    let mut fields = field.map()?;
    let team = fields.required("team").and_then(|field| field.text());
    let contact = fields.required("contact").and_then(|field| field.text());
    let runbook = match fields.optional("runbook") {
        None => Some(None),
        Some(field) => field.text().map(|text| Some(text.to_owned())),
    };
    fields.finish();
    Some(Owner { team: team?.to_owned(), contact: contact?.to_owned(), runbook: runbook? })
}

fn mode(spec: &mut Fields<'_>) -> Option<Mode> {
    spec.optional("mode").map_or(Some(Mode::Enforce), |field| field.word(&MODES))
}

fn target(field: &Field<'_>) -> Option<Target> {
    let mut fields = field.map()?;
    let one = fields.one_of(&["selector", "serviceAccount", "machine"]);
    fields.finish();
    let (which, field) = one?;
    match which {
        "selector" => {
            let mut selector = field.map()?;
            let wanted = selector.required("matchLabels");
            selector.finish();
            let wanted = wanted?;
            let labels = labels(&wanted)?;
            if labels.is_empty() {
                return wanted
                    .wrong("no label is named", "name at least one; nothing means all here");
            }
            Some(Target::Selector(labels))
        }
        "serviceAccount" => name_or_object(&field).map(Target::ServiceAccount),
        _ => name_or_object(&field).map(Target::Machine),
    }
}

/// `name`, or `{name: name}`.
fn name_or_object(field: &Field<'_>) -> Option<ResourceName> {
    if !field.is_map() {
        return field.parsed(NAME);
    }
    let mut fields = field.map()?;
    let name = fields.required("name").and_then(|field| field.parsed(NAME));
    fields.finish();
    name
}

fn rules(field: &Field<'_>) -> Option<Vec<Rule>> {
    // An empty list is allowed here: it allows nothing, which is what it says.
    let mut rules: Vec<Rule> = Vec::new();
    let mut whole = true;
    for field in field.list()? {
        match rule(&field) {
            None => whole = false,
            Some(rule) if rules.iter().any(|other| other.name == rule.name) => {
                whole = false;
                let _: Option<()> = field.wrong(
                    format_args!("the rule {} stands twice", rule.name),
                    "give each rule a name of its own",
                );
            }
            Some(rule) => rules.push(rule),
        }
    }
    rules.sort_by(|a, b| a.name.cmp(&b.name));
    whole.then_some(rules)
}

fn rule(field: &Field<'_>) -> Option<Rule> {
    let mut fields = field.map()?;
    let name = fields.required("name").and_then(|field| field.parsed::<ResourceName>(NAME));
    let reason = optional_text(&mut fields, "reason");
    let ports = fields.required("ports").and_then(|field| some_ports(&field));
    let from = fields.required("from").and_then(|field| some_peers(&field));
    let not_after = match fields.optional("notAfter") {
        None => Some(None),
        Some(field) => field.parsed("write a date such as 2027-01-31T00:00:00Z").map(Some),
    };
    let expected_every = match fields.optional("expectedEvery") {
        None => Some(None),
        Some(field) => duration(&field).map(Some),
    };
    fields.finish();
    Some(Rule {
        name: name?,
        reason: reason?,
        ports: ports?,
        from: from?,
        not_after: not_after?,
        expected_every: expected_every?,
    })
}

fn optional_text(fields: &mut Fields<'_>, name: &'static str) -> Option<Option<String>> {
    match fields.optional(name) {
        None => Some(None),
        Some(field) => field.text().map(|text| Some(text.to_owned())),
    }
}

fn duration(field: &Field<'_>) -> Option<Duration> {
    let text = field.text()?;
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit = match unit {
        "s" => Some(1),
        "m" => Some(60),
        "h" => Some(3_600),
        "d" => Some(86_400),
        _ => None,
    };
    let seconds = number.parse::<u64>().ok().zip(unit).and_then(|(n, unit)| n.checked_mul(unit));
    match seconds {
        Some(seconds) if seconds > 0 => Some(Duration::from_secs(seconds)),
        Some(_) | None => field.wrong(
            format_args!("{text:?} is not a duration"),
            "write a whole number with s, m, h or d, such as 90d",
        ),
    }
}

fn some_ports(field: &Field<'_>) -> Option<BTreeSet<u16>> {
    unique_ports(field.some_list()?)
}

fn unique_ports(fields: Vec<Field<'_>>) -> Option<BTreeSet<u16>> {
    let mut ports = BTreeSet::new();
    let mut whole = true;
    for field in fields {
        match field.port() {
            None => whole = false,
            Some(port) if !ports.insert(port) => {
                whole = false;
                let _: Option<()> =
                    field.wrong(format_args!("the port {port} stands twice"), "name it once");
            }
            Some(_) => {}
        }
    }
    whole.then_some(ports)
}

fn some_peers(field: &Field<'_>) -> Option<Vec<PeerSelector>> {
    all(field.some_list()?, |field| peer(&field))
}

fn peer(field: &Field<'_>) -> Option<PeerSelector> {
    let mut fields = field.map()?;
    let one = fields.one_of(&["serviceAccount", "machine", "spiffeId", "anyIn"]);
    fields.finish();
    let (which, field) = one?;
    match which {
        "serviceAccount" => {
            let (namespace, name) = namespaced_name(&field)?;
            Some(PeerSelector::ServiceAccount { namespace, name })
        }
        "machine" => name_or_object(&field).map(|name| PeerSelector::Machine { name }),
        "spiffeId" => field
            .parsed("write an ID such as spiffe://example.org/ns/shop/sa/checkout")
            .map(PeerSelector::SpiffeId),
        _ => {
            let mut fields = field.map()?;
            let namespace = fields.required("namespace").and_then(|field| field.parsed(NAME));
            fields.finish();
            Some(PeerSelector::AnyIn { namespace: namespace? })
        }
    }
}

fn namespaced_name(field: &Field<'_>) -> Option<(ResourceName, ResourceName)> {
    let mut fields = field.map()?;
    let namespace = fields.required("namespace").and_then(|field| field.parsed(NAME));
    let name = fields.required("name").and_then(|field| field.parsed(NAME));
    fields.finish();
    Some((namespace?, name?))
}

fn policy_test(field: &Field<'_>) -> Option<PolicyTest> {
    let mut fields = field.map()?;
    let from = fields.required("from").and_then(|field| match peer(&field)? {
        PeerSelector::AnyIn { .. } => {
            field.wrong("anyIn is not one caller", "name a serviceAccount, machine or spiffeId")
        }
        other @ (PeerSelector::ServiceAccount { .. }
        | PeerSelector::Machine { .. }
        | PeerSelector::SpiffeId(_)) => Some(other),
    });
    let port = fields.required("port").and_then(|field| field.port());
    let words = [("allow", Expectation::Allow), ("deny", Expectation::Deny)];
    let expect = fields.required("expect").and_then(|field| field.word(&words));
    fields.finish();
    Some(PolicyTest { from: from?, port: port?, expect: expect? })
}

/// Tests speak about the rules as written, whatever the date.
fn hold_test(policy: &AccessPolicy, field: &Field<'_>, test: &PolicyTest) -> Option<()> {
    let allowing = policy.rules.iter().find(|rule| {
        rule.ports.contains(&test.port) && rule.from.iter().any(|peer| covers(peer, &test.from))
    });
    match (test.expect, allowing) {
        (Expectation::Allow, Some(_)) | (Expectation::Deny, None) => Some(()),
        (Expectation::Allow, None) => field.wrong(
            "the test expects allow, but no rule of this policy allows it",
            "correct the rules or the test",
        ),
        (Expectation::Deny, Some(rule)) => field.wrong(
            format_args!("the test expects deny, but the rule {} allows it", rule.name),
            "correct the rules or the test",
        ),
    }
}

fn covers(rule: &PeerSelector, caller: &PeerSelector) -> bool {
    match (rule, caller) {
        (PeerSelector::AnyIn { namespace }, PeerSelector::ServiceAccount { namespace: of, .. }) => {
            namespace == of
        }
        (PeerSelector::AnyIn { namespace }, PeerSelector::SpiffeId(id)) => {
            matches!(id.kind(), IdentityKind::Workload { namespace: of, .. } if of == namespace.as_str())
        }
        (rule, caller) => rule == caller,
    }
}

fn guardrail(metadata: Option<Metadata>, spec: &mut Fields<'_>) -> Option<Guardrail> {
    let owner = spec.required("owner").and_then(|field| owner(&field));
    let reason = optional_text(spec, "reason");
    let target = spec.required("target").and_then(|field| guardrail_target(&field));
    let ports = spec.one_of(&["ports", "allPorts"]).and_then(|(which, field)| match which {
        "ports" => some_ports(&field).map(GuardrailPorts::Only),
        _ => field.is_true().map(|()| GuardrailPorts::All),
    });
    let denies =
        spec.one_of(&["denyFrom", "denyUnlessFrom"]).and_then(|(which, field)| match which {
            "denyFrom" => some_peers(&field).map(GuardrailPeers::From),
            _ => some_peers(&field).map(GuardrailPeers::UnlessFrom),
        });
    Some(Guardrail {
        name: PolicyRef { kind: PolicyKind::Guardrail, namespace: None, name: metadata?.name },
        owner: owner?,
        reason: reason?,
        target: target?,
        ports: ports?,
        denies: denies?,
    })
}

fn guardrail_target(field: &Field<'_>) -> Option<GuardrailTarget> {
    let mut fields = field.map()?;
    let one = fields.one_of(&["namespace", "serviceAccount", "machine"]);
    fields.finish();
    let (which, field) = one?;
    match which {
        "namespace" => field.parsed(NAME).map(GuardrailTarget::Namespace),
        "serviceAccount" => {
            let (namespace, name) = namespaced_name(&field)?;
            Some(GuardrailTarget::ServiceAccount { namespace, name })
        }
        _ => name_or_object(&field).map(GuardrailTarget::Machine),
    }
}

fn machine(metadata: Option<Metadata>, spec: &mut Fields<'_>) -> Option<Machine> {
    let addresses =
        spec.optional("addresses").map_or(Some(BTreeSet::new()), |field| addresses(&field));
    let process = match spec.optional("process") {
        None => {
            for name in ["ports", "mode"] {
                if let Some(field) = spec.optional(name) {
                    let _: Option<()> = field.wrong(
                        format_args!("{name} says something of spec.process, which is missing"),
                        "add spec.process, or remove it",
                    );
                }
            }
            Some(None)
        }
        Some(field) => process(&field, spec, None).map(Some),
    };
    let metadata = metadata?;
    Some(Machine {
        name: metadata.name,
        addresses: addresses?,
        labels: metadata.labels,
        workload: process?,
    })
}

fn workload(metadata: Option<Metadata>, spec: &mut Fields<'_>) -> Option<Workload> {
    let machine = spec.required("machine").and_then(|field| name_or_object(&field));
    let service_account = spec.required("serviceAccount").and_then(|field| name_or_object(&field));
    let given = spec.optional("addresses");
    let process =
        spec.required("process").and_then(|field| process(&field, spec, Some(given.as_ref())));
    let metadata = metadata?;
    Some(Workload {
        namespace: metadata.namespace?,
        name: metadata.name,
        labels: metadata.labels,
        service_account: service_account?,
        machine: machine?,
        process: process?,
    })
}

/// `namespaces` is `None` where a process cannot have a network namespace of its own; else it
/// holds the addresses given for it, if any.
fn process(
    field: &Field<'_>,
    spec: &mut Fields<'_>,
    namespaces: Option<Option<&Field<'_>>>,
) -> Option<Process> {
    let ports = spec.required("ports").and_then(|field| unique_ports(field.list()?));
    let mode = mode(spec);
    let mut fields = field.map()?;
    let one = match namespaces {
        None => fields.one_of(&["user", "cgroup"]),
        Some(_) => fields.one_of(&["user", "cgroup", "networkNamespace"]),
    };
    fields.finish();
    let (which, chosen) = one?;
    let given = namespaces.flatten();
    if let Some(given) = given
        && which != "networkNamespace"
    {
        return given.wrong(
            "a process of the host is reached at its machine's addresses",
            "remove spec.addresses; the Machine has them",
        );
    }
    let selector = match which {
        "user" => user(&chosen).map(ProcessSelector::User),
        "cgroup" => cgroup(&chosen).map(ProcessSelector::Cgroup),
        _ => {
            let name = namespace_name(&chosen);
            let addresses = match given {
                Some(field) => field.some_list().and_then(|_| addresses(field)),
                None => chosen.wrong(
                    "a network namespace has addresses of its own, and none are given",
                    "add spec.addresses",
                ),
            };
            Some(ProcessSelector::NetworkNamespace { name: name?, addresses: addresses? })
        }
    };
    Some(Process { selector: selector?, ports: ports?, mode: mode? })
}

fn user(field: &Field<'_>) -> Option<String> {
    if let Some(id) = field.number() {
        return match u32::try_from(id) {
            Ok(id) => Some(id.to_string()),
            Err(_) => {
                field.wrong(format_args!("{id} is not a user"), "write a user's name or number")
            }
        };
    }
    let text = field.text()?;
    let good = text.len() <= 32
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '$'))
        && !text.starts_with('-');
    if good {
        Some(text.to_owned())
    } else {
        field.wrong(format_args!("{text:?} is not a user"), "write a user's name or number")
    }
}

fn cgroup(field: &Field<'_>) -> Option<String> {
    let text = field.text()?;
    let good = !text.starts_with('/')
        && text.split('/').all(|part| !matches!(part, "" | "." | ".."))
        && !text.chars().any(char::is_control);
    if good {
        Some(text.to_owned())
    } else {
        field.wrong(
            format_args!("{text:?} is not a cgroup below the root"),
            "write it without a leading slash, such as system.slice/ledger.service",
        )
    }
}

fn namespace_name(field: &Field<'_>) -> Option<String> {
    let text = field.text()?;
    let good = text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        && !matches!(text, "." | "..")
        && text.len() <= 255;
    if good {
        Some(text.to_owned())
    } else {
        field.wrong(
            format_args!("{text:?} is not the name of a network namespace"),
            "write the name that ip netns shows",
        )
    }
}

fn addresses(field: &Field<'_>) -> Option<BTreeSet<IpAddr>> {
    let mut found = BTreeSet::new();
    let mut whole = true;
    for field in field.list()? {
        let mend = "write an IP address that other machines reach, such as 10.0.0.5";
        match field.parsed::<IpAddr>(mend) {
            None => whole = false,
            Some(ip) if ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() => {
                whole = false;
                let _: Option<()> =
                    field.wrong(format_args!("{ip} is not an address of one machine"), mend);
            }
            Some(ip) if !found.insert(ip) => {
                whole = false;
                let _: Option<()> =
                    field.wrong(format_args!("the address {ip} stands twice"), "name it once");
            }
            Some(_) => {}
        }
    }
    whole.then_some(found)
}

/// Looks at every item, so that every error is found, and returns them only whole.
fn all<T, U, C: FromIterator<U>>(
    items: impl IntoIterator<Item = T>,
    read: impl FnMut(T) -> Option<U>,
) -> Option<C> {
    let read: Vec<Option<U>> = items.into_iter().map(read).collect();
    read.into_iter().collect()
}
