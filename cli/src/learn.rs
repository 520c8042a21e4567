//! `hauberk learn`: what all replicas know of what was seen, as AccessPolicies.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    process::ExitCode,
    time::SystemTime,
};

use anyhow::Context;
use hauberk_core::{
    identity::{IdentityKind, SpiffeId},
    learn::{self, Edge, End, Existing, Learned, Outcome, Seen},
    manifest::MAX_TEXT,
    time::Timestamp,
};
use hauberk_proto::{convert, v1};
use serde_json::{Value, json};

use crate::{
    LearnArgs, Output, control,
    say::{self, say},
};

pub(crate) fn run(args: &LearnArgs) -> anyhow::Result<ExitCode> {
    let answers = control::run(async {
        let mut answers = Vec::new();
        for mut client in args.asking.way.clients().await? {
            answers.push(control::answer(client.learn(v1::LearnRequest {}).await)?);
        }
        Ok(answers)
    })?;
    let told = merged(answers)?;
    let now = Timestamp::from(SystemTime::now());
    let chosen = Chosen::new(&told, &Choice::new(args, now));
    match args.asking.output {
        Output::Json => say!("{}", chosen.json(&told.gaps)),
        Output::Text => {
            let text = chosen.yaml(&told.gaps);
            say::text(&text);
            if text.len() > MAX_TEXT {
                eprintln!(
                    "this is more than a folder takes in one file; ask for one namespace after the \
                     other, by -n"
                );
            }
            chosen.summarize(&told.gaps);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What the replicas know together.
#[derive(Default)]
struct Told {
    edges: BTreeMap<Edge, (Seen, Standing)>,
    /// Those for which no node can speak that told of them.
    unvouched: BTreeMap<Edge, (Seen, Standing)>,
    existing: Existing,
    /// A sentence each.
    gaps: Vec<String>,
    /// The same, of identities that several workloads have.
    shared_identities: Vec<String>,
}

/// How an edge stands with the policies that are there.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Standing {
    Open,
    Allowed,
    Guarded(String),
    Gone,
}

/// The same connections may have been told to several replicas; those of several nodes are others.
fn merged(mut answers: Vec<v1::LearnResponse>) -> anyhow::Result<Told> {
    // What the newest state says is what holds.
    answers.sort_by_key(|answer| answer.revision);
    let mut told = Told::default();
    let mut of_nodes: BTreeMap<(String, Edge), (Seen, bool)> = BTreeMap::new();
    let mut standings: BTreeMap<Edge, Standing> = BTreeMap::new();
    let mut gaps: BTreeMap<String, v1::LearnedGap> = BTreeMap::new();
    let mut forgotten_nodes = 0;
    for answer in answers {
        forgotten_nodes = forgotten_nodes.max(answer.forgotten_nodes);
        for edge in answer.edges {
            let standing = standing(edge.standing, edge.policy)?;
            let message =
                edge.seen.context("the control plane tells of an edge that it does not name")?;
            let (known, seen) = convert::seen(message)?;
            standings.insert(known.clone(), standing);
            match of_nodes.entry((edge.node, known)) {
                Entry::Vacant(entry) => {
                    entry.insert((seen, edge.vouched));
                }
                Entry::Occupied(mut entry) => {
                    let (joined, vouched) = entry.get_mut();
                    joined.join(&seen);
                    // One replica may have heard of it later, when the workload had left the node.
                    *vouched |= edge.vouched;
                }
            }
        }
        for gap in answer.gaps {
            let known = gaps.entry(gap.node.clone()).or_default();
            known.missed = known.missed.max(gap.missed);
            known.full |= gap.full;
            known.unread |= gap.unread;
        }
        told.shared_identities = answer.shared_identities;
        told.existing = Existing {
            names: answer.policies.into_iter().collect(),
            owners: answer
                .destinations
                .into_iter()
                .map(convert::learned_destination)
                .collect::<Result<_, _>>()?,
        };
    }
    for ((_, edge), (seen, vouched)) in of_nodes {
        let standing = standings.get(&edge).cloned().unwrap_or(Standing::Open);
        let edges = if vouched { &mut told.edges } else { &mut told.unvouched };
        match edges.entry(edge) {
            Entry::Vacant(entry) => {
                entry.insert((seen, standing));
            }
            Entry::Occupied(mut entry) => entry.get_mut().0.add(&seen),
        }
    }
    told.unvouched.retain(|edge, _| !told.edges.contains_key(edge));
    told.gaps = gaps.iter().flat_map(|(node, gap)| sentences(node, gap)).collect();
    if forgotten_nodes > 0 {
        told.gaps.push(format!(
            "{forgotten_nodes} nodes have left the mesh whose edges the control plane dropped, to make room for those \
             of others"
        ));
    }
    Ok(told)
}

fn standing(word: i32, policy: String) -> anyhow::Result<Standing> {
    match v1::Standing::try_from(word) {
        Ok(v1::Standing::Open) => Ok(Standing::Open),
        Ok(v1::Standing::Allowed) => Ok(Standing::Allowed),
        Ok(v1::Standing::Guarded) => Ok(Standing::Guarded(policy)),
        Ok(v1::Standing::Gone) => Ok(Standing::Gone),
        Ok(v1::Standing::Unspecified) | Err(_) => {
            anyhow::bail!("the control plane is of another version than this command")
        }
    }
}

fn sentences(node: &str, gap: &v1::LearnedGap) -> Vec<String> {
    let mut sentences = Vec::new();
    if gap.missed > 0 {
        sentences.push(format!(
            "the agent of {node} had no room for the edges of {} connections; it has again when it is \
             restarted",
            gap.missed
        ));
    }
    if gap.full {
        sentences.push(format!(
            "the control plane had no room for all edges that the agent of {node} told of; it has again \
             when it is restarted"
        ));
    }
    if gap.unread {
        sentences.push(format!(
            "the agent of {node} told of something that the control plane cannot read; is it of another \
             version?"
        ));
    }
    sentences
}

/// What is asked for.
struct Choice<'a> {
    namespace: Option<&'a str>,
    since: Timestamp,
    include_denied: bool,
}

impl<'a> Choice<'a> {
    fn new(args: &'a LearnArgs, now: Timestamp) -> Self {
        Self {
            namespace: args.namespace.as_deref(),
            since: args.since.map_or(Timestamp::MIN, |time| now.saturating_sub(time)),
            include_denied: args.include_denied,
        }
    }

    fn covers(&self, edge: &Edge, seen: &Seen) -> bool {
        // Of what leaves the mesh, the caller's namespace is the only one.
        let owner = match (&edge.destination, &edge.source) {
            (End::Identity(id), _) | (End::Address(_), End::Identity(id)) => namespace(id),
            (End::Address(_), End::Address(_)) => None,
        };
        seen.last >= self.since && self.namespace.is_none_or(|wanted| owner == Some(wanted))
    }
}

fn namespace(id: &SpiffeId) -> Option<&str> {
    match id.kind() {
        IdentityKind::Workload { namespace, .. } => Some(namespace),
        IdentityKind::Machine { .. }
        | IdentityKind::Node { .. }
        | IdentityKind::ControlPlane
        | IdentityKind::Other => None,
    }
}

/// What becomes of an edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    Learned,
    /// The caller has no identity.
    InClear,
    /// The destination has none.
    Outside,
    Guarded,
    /// No manifest has a name for an end of it.
    Unspeakable,
    /// By a policy that is there.
    Allowed,
    /// Its destination is.
    Gone,
    /// Told by a node where neither end ran when it was told.
    Unvouched,
    Denied,
}

impl Fate {
    /// For programs.
    fn as_str(self) -> &'static str {
        match self {
            Self::Learned => "learned",
            Self::InClear => "in_clear",
            Self::Outside => "outside",
            Self::Guarded => "guarded",
            Self::Unspeakable => "unspeakable",
            Self::Allowed => "allowed",
            Self::Gone => "gone",
            Self::Unvouched => "unvouched",
            Self::Denied => "denied",
        }
    }

    /// As comments, why no policy can allow it, and what to do; nothing for the others.
    fn remedy(self) -> Option<&'static str> {
        match self {
            Self::InClear => Some(
                "In clear, from callers without an identity. Bring them into the mesh, or enforcing\n\
                 # refuses them: label their namespaces hauberk.dev/mode=audit, or register them with\n\
                 # Workload manifests.",
            ),
            Self::Outside => Some(
                "To destinations outside of the mesh, which enforced workloads cannot reach. Bring\n\
                 # those into the mesh, or keep the callers audited.",
            ),
            Self::Guarded => {
                Some("Denied by a guardrail, whatever a policy says. Only its owner can change it.")
            }
            Self::Unspeakable => Some("Between identities that no policy can name."),
            Self::Learned | Self::Allowed | Self::Gone | Self::Unvouched | Self::Denied => None,
        }
    }
}

/// What is asked for, sorted by what becomes of it.
struct Chosen<'a> {
    learned: Learned,
    shared_identities: Vec<&'a String>,
    edges: BTreeMap<Fate, Vec<Row<'a>>>,
}

type Row<'a> = (&'a Edge, &'a Seen, &'a Standing);

impl<'a> Chosen<'a> {
    fn new(told: &'a Told, choice: &Choice<'_>) -> Self {
        let covered = told.edges.iter().filter(|(edge, (seen, _))| choice.covers(edge, seen));
        let covered: Vec<_> = covered.collect();
        let wanted = covered
            .iter()
            .filter(|(edge, (_, standing))| fate(edge, standing, choice) == Fate::Learned)
            .map(|(edge, (seen, _))| ((*edge).clone(), *seen));
        let learned = learn::learn(&wanted.collect(), &told.existing);
        let unspeakable: BTreeSet<&Edge> = learned.unspeakable.iter().collect();
        let mut edges: BTreeMap<Fate, Vec<Row<'a>>> = BTreeMap::new();
        for (edge, (seen, standing)) in covered {
            let fate = match fate(edge, standing, choice) {
                Fate::Learned if unspeakable.contains(edge) => Fate::Unspeakable,
                fate => fate,
            };
            edges.entry(fate).or_default().push((edge, seen, standing));
        }
        let unvouched = told.unvouched.iter().filter(|(edge, (seen, _))| choice.covers(edge, seen));
        let unvouched: Vec<Row<'a>> =
            unvouched.map(|(edge, (seen, standing))| (edge, seen, standing)).collect();
        if !unvouched.is_empty() {
            edges.insert(Fate::Unvouched, unvouched);
        }
        let is_of = |sentence: &&String| {
            choice.namespace.is_none_or(|namespace| sentence.contains(&format!(" {namespace}/")))
        };
        let shared_identities = told.shared_identities.iter().filter(is_of).collect();
        Self { learned, shared_identities, edges }
    }

    fn count(&self, fate: Fate) -> usize {
        self.edges.get(&fate).map_or(0, Vec::len)
    }

    /// Manifests, and around them what nobody must miss, as comments.
    fn yaml(&self, gaps: &[String]) -> String {
        let mut text = String::from(
            "# What was seen and no policy allows. These allow it, whatever it was: read them first.\n",
        );
        for shared in &self.shared_identities {
            text.push_str(&format!("# NOT TOLD APART: {shared}\n"));
        }
        for gap in gaps {
            text.push_str(&format!("# NOT COMPLETE: {gap}\n"));
        }
        text.extend(self.learned.policies.iter().map(learn::yaml));
        let mut begun = false;
        for (fate, edges) in &self.edges {
            let Some(remedy) = fate.remedy() else { continue };
            if !begun {
                text.push_str("\n# NO POLICY CAN ALLOW THESE\n");
                begun = true;
            }
            text.push_str(&format!("#\n# {remedy}\n"));
            for (edge, seen, standing) in edges {
                text.push_str(&format!("#   {}: {seen}{}\n", shown(edge), by(standing)));
            }
        }
        text
    }

    fn json(&self, gaps: &[String]) -> Value {
        let policies: Vec<Value> = self.learned.policies.iter().map(learn::json).collect();
        let edges = self.edges.iter().flat_map(|(fate, edges)| {
            edges.iter().map(move |(edge, seen, standing)| edge_json(*fate, edge, seen, standing))
        });
        json!({
            "policies": policies,
            "edges": edges.collect::<Vec<Value>>(),
            "gaps": gaps,
            "shared_identities": self.shared_identities,
        })
    }

    /// To people, beside the manifests.
    fn summarize(&self, gaps: &[String]) {
        let policies = &self.learned.policies;
        let rules: usize = policies.iter().map(|policy| policy.rules.len()).sum();
        match policies.len() {
            0 => eprintln!("nothing was seen that a policy would have to allow"),
            count => eprintln!("policies: {count}, rules: {rules}"),
        }
        let hopeless = self.edges.iter().filter(|(fate, _)| fate.remedy().is_some());
        let hopeless: usize = hopeless.map(|(_, edges)| edges.len()).sum();
        let notes = [
            (hopeless, "that no policy can allow, listed in the comments at the end"),
            (self.count(Fate::Allowed), "that policies allow by now, left out"),
            (self.count(Fate::Gone), "to destinations that no workload is now, left out"),
            (self.count(Fate::Unvouched), "told by nodes where neither end runs, left out"),
            (
                self.count(Fate::Denied),
                "that were denied, left out; --include-denied learns from them, too",
            ),
        ];
        for (count, what) in notes {
            if count > 0 {
                eprintln!("edges {what}: {count}");
            }
        }
        for shared in &self.shared_identities {
            eprintln!("not told apart: {shared}");
        }
        for gap in gaps {
            eprintln!("not complete: {gap}");
        }
    }
}

fn fate(edge: &Edge, standing: &Standing, choice: &Choice<'_>) -> Fate {
    match (&edge.source, &edge.destination, standing) {
        (_, _, Standing::Allowed) => Fate::Allowed,
        (_, _, Standing::Gone) => Fate::Gone,
        _ if edge.outcome == Outcome::Denied && !choice.include_denied => Fate::Denied,
        (_, _, Standing::Guarded(_)) => Fate::Guarded,
        (End::Address(_), _, Standing::Open) => Fate::InClear,
        (End::Identity(_), End::Address(_), Standing::Open) => Fate::Outside,
        (End::Identity(_), End::Identity(_), Standing::Open) => Fate::Learned,
    }
}

fn by(standing: &Standing) -> String {
    match standing {
        Standing::Guarded(guardrail) => format!("; Guardrail {guardrail}"),
        Standing::Open | Standing::Allowed | Standing::Gone => String::new(),
    }
}

fn shown(edge: &Edge) -> String {
    // As in an address with a port.
    let destination = match &edge.destination {
        End::Address(address) => std::net::SocketAddr::new(*address, edge.port).to_string(),
        End::Identity(id) => format!("{}:{}", name(id), edge.port),
    };
    match &edge.source {
        End::Address(address) => format!("{address} -> {destination}"),
        End::Identity(id) => format!("{} -> {destination}", name(id)),
    }
}

fn name(id: &SpiffeId) -> String {
    match id.kind() {
        IdentityKind::Workload { namespace, service_account } => {
            format!("{namespace}/{service_account}")
        }
        IdentityKind::Machine { name } => format!("machine/{name}"),
        IdentityKind::Node { .. } | IdentityKind::ControlPlane | IdentityKind::Other => {
            id.to_string()
        }
    }
}

fn edge_json(fate: Fate, edge: &Edge, seen: &Seen, standing: &Standing) -> Value {
    let end = |end: &End| match end {
        End::Identity(id) => id.to_string(),
        End::Address(address) => address.to_string(),
    };
    json!({
        "fate": fate.as_str(),
        "source": end(&edge.source),
        "destination": end(&edge.destination),
        "port": edge.port,
        "decision": match edge.outcome {
            Outcome::WouldDeny => "would_deny",
            Outcome::Denied => "deny",
            Outcome::Older => "older",
        },
        "guardrail": match standing {
            Standing::Guarded(guardrail) => Some(guardrail),
            Standing::Open | Standing::Allowed | Standing::Gone => None,
        },
        "connections": seen.count,
        "first": seen.first,
        "last": seen.last,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use hauberk_core::{manifest::parse, policy::Object};

    use super::*;

    fn id(namespace: &str, name: &str) -> End {
        End::Identity(format!("spiffe://example.org/ns/{namespace}/sa/{name}").parse().unwrap())
    }

    fn address(text: &str) -> End {
        End::Address(text.parse().unwrap())
    }

    fn told_of(
        node: &str,
        (source, destination, port): (End, End, u16),
        count: u64,
        standing: v1::Standing,
    ) -> v1::LearnedEdge {
        let edge = Edge { source, destination, port, outcome: Outcome::WouldDeny };
        let at = Timestamp::from_unix_seconds;
        let seen = Seen { count, first: at(100), last: at(200) };
        v1::LearnedEdge {
            node: node.to_owned(),
            seen: Some(convert::seen_message(&edge, &seen)),
            standing: standing.into(),
            vouched: true,
            policy: if standing == v1::Standing::Guarded {
                "pci".to_owned()
            } else {
                String::new()
            },
        }
    }

    fn answer(revision: u64, edges: Vec<v1::LearnedEdge>) -> v1::LearnResponse {
        v1::LearnResponse { revision, edges, ..v1::LearnResponse::default() }
    }

    fn to_ledger() -> (End, End, u16) {
        (id("shop", "web"), id("payments", "ledger"), 5432)
    }

    const ALL: Choice<'static> =
        Choice { namespace: None, since: Timestamp::MIN, include_denied: false };

    fn policies(text: &str) -> Vec<String> {
        parse("learned.yaml", text)
            .unwrap()
            .into_iter()
            .map(|object| match object.value {
                Object::AccessPolicy(policy) => policy.name.to_string(),
                other => panic!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn what_several_replicas_heard_of_one_node_is_counted_once() {
        let open = v1::Standing::Open;
        let edge = |node, count| told_of(node, to_ledger(), count, open);
        let told = merged(vec![
            answer(2, vec![edge("a", 7), edge("b", 1)]),
            answer(2, vec![edge("a", 3), edge("c", 20)]),
        ])
        .unwrap();
        let counts: Vec<u64> = told.edges.values().map(|(seen, _)| seen.count).collect();
        assert_eq!(counts, [28]);
    }

    #[test]
    fn nothing_is_learned_from_what_a_node_says_of_others_workloads() {
        let edge = |node, count| told_of(node, to_ledger(), count, v1::Standing::Open);
        let lie = |node, count| v1::LearnedEdge { vouched: false, ..edge(node, count) };
        let told = merged(vec![answer(1, vec![lie("a", 7)])]).unwrap();
        let chosen = Chosen::new(&told, &ALL);
        assert_eq!((chosen.learned.policies.len(), chosen.count(Fate::Unvouched)), (0, 1));
        // Nor does it add to what is true, which one replica is enough to know.
        let answers =
            vec![answer(1, vec![lie("a", 7), edge("b", 2)]), answer(1, vec![lie("b", 3)])];
        let told = merged(answers).unwrap();
        let counts: Vec<u64> = told.edges.values().map(|(seen, _)| seen.count).collect();
        assert_eq!((counts, told.unvouched.len()), (vec![3], 0));
    }

    #[test]
    fn the_newest_state_says_how_an_edge_stands_and_which_policies_there_are() {
        let edge = |standing| told_of("a", to_ledger(), 1, standing);
        let mut new = answer(3, vec![edge(v1::Standing::Allowed)]);
        new.policies = vec!["payments/learned-ledger".to_owned()];
        let old = answer(2, vec![edge(v1::Standing::Open)]);
        for answers in [vec![new.clone(), old.clone()], vec![old, new]] {
            let told = merged(answers).unwrap();
            assert!(told.existing.names.contains("payments/learned-ledger"));
            let chosen = Chosen::new(&told, &ALL);
            assert_eq!((chosen.learned.policies.len(), chosen.count(Fate::Allowed)), (0, 1));
        }
    }

    #[test]
    fn what_no_policy_can_allow_stands_in_comments() {
        use v1::Standing::{Gone, Guarded, Open};
        let clear = (address("10.0.0.9"), id("payments", "ledger"), 5432);
        let outside = (id("shop", "web"), address("fd00::9"), 443);
        let guarded = (id("dev", "web"), id("payments", "ledger"), 5432);
        let gone = (id("shop", "web"), id("payments", "old"), 80);
        let mut known = answer(
            1,
            vec![
                told_of("a", to_ledger(), 12, Open),
                told_of("a", clear, 1, Open),
                told_of("a", outside, 2, Open),
                told_of("a", guarded, 3, Guarded),
                told_of("a", gone, 4, Gone),
            ],
        );
        let gap = v1::LearnedGap { node: "a".to_owned(), missed: 5, full: true, unread: true };
        known.gaps = vec![gap];
        known.forgotten_nodes = 2;
        let told = merged(vec![known]).unwrap();
        let chosen = Chosen::new(&told, &ALL);
        let text = chosen.yaml(&told.gaps);
        assert_eq!(policies(&text), ["payments/learned-ledger"]);
        for part in [
            "  # 12 connections, the last at 1970-01-01T00:03:20Z\n  - name: shop-web\n",
            "#   10.0.0.9 -> payments/ledger:5432: 1 connection, at 1970-01-01T00:03:20Z\n",
            "#   shop/web -> [fd00::9]:443: 2 connections",
            "#   dev/web -> payments/ledger:5432: 3 connections, the last at 1970-01-01T00:03:20Z; Guardrail pci\n",
            "# NOT COMPLETE: the agent of a had no room for the edges of 5 connections",
            "# NOT COMPLETE: 2 nodes have left the mesh whose edges the control plane dropped",
        ] {
            assert!(text.contains(part), "no {part:?} in\n{text}");
        }
        assert_eq!(text.matches("# NOT COMPLETE: ").count(), 4, "{text}");
        assert!(!text.contains("payments/old"), "{text}");
        let value = chosen.json(&told.gaps);
        let fates = value["edges"].as_array().unwrap().iter().map(|edge| edge["fate"].as_str());
        let fates: Vec<&str> = fates.map(Option::unwrap).collect();
        assert_eq!(fates, ["learned", "in_clear", "outside", "guarded", "gone"]);
        assert_eq!(value["policies"][0]["metadata"]["name"], "learned-ledger");
    }

    #[test]
    fn denied_connections_are_learned_only_if_somebody_says_so() {
        let mut edge = told_of("a", to_ledger(), 1, v1::Standing::Open);
        edge.seen.as_mut().unwrap().outcome = v1::Outcome::Denied.into();
        let told = merged(vec![answer(1, vec![edge])]).unwrap();
        let without = Chosen::new(&told, &ALL);
        assert_eq!((without.learned.policies.len(), without.count(Fate::Denied)), (0, 1));
        let with = Chosen::new(&told, &Choice { include_denied: true, ..ALL });
        assert_eq!((with.learned.policies.len(), with.count(Fate::Denied)), (1, 0));
    }

    #[test]
    fn a_namespace_and_a_time_narrow_it_down() {
        let outside = (id("shop", "web"), address("10.0.0.9"), 443);
        let open = v1::Standing::Open;
        let edges = vec![told_of("a", to_ledger(), 1, open), told_of("a", outside, 1, open)];
        let told = merged(vec![answer(1, edges)]).unwrap();
        let after = Timestamp::from_unix_seconds(201);
        for (choice, learned, outside) in [
            (Choice { namespace: Some("payments"), ..ALL }, 1, 0),
            (Choice { namespace: Some("shop"), ..ALL }, 0, 1),
            (Choice { namespace: Some("dev"), ..ALL }, 0, 0),
            (Choice { since: Timestamp::from_unix_seconds(200), ..ALL }, 1, 1),
            (Choice { since: after, ..ALL }, 0, 0),
        ] {
            let chosen = Chosen::new(&told, &choice);
            let counts = (chosen.count(Fate::Learned), chosen.count(Fate::Outside));
            assert_eq!(counts, (learned, outside), "{:?}", choice.namespace);
        }
    }
}
