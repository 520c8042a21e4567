//! The index of everything that is allowed, and the decision.
//!
//! Built whole from resolved policies and never changed: an agent swaps one table for the next. A
//! decision costs two or three hash look-ups however many policies there are; only a denial looks
//! at rules one by one, a bounded number of them, to name the nearest miss.

use std::collections::HashMap;

use super::{
    Allowed, Denial, GuardrailPorts, Mode, NearestMiss, PolicyRef, Reason, Verdict,
    resolve::{PeerMatch, ResolvedGuardrail, ResolvedPeers, ResolvedPolicy, ResolvedRule},
    verdict::{Difference, as_peer_yaml, strictest},
};
use crate::{
    identity::{IdentityKind, SpiffeId, TrustDomain},
    time::Timestamp,
};

/// How many rules a denial looks at to find the nearest miss: denials must stay cheap under a flood.
const NEAREST_MISS_SCAN: usize = 64;

/// How many ports a nearest miss lists.
const NEAREST_MISS_PORTS: usize = 5;

/// A question: may this caller connect to this port of this destination now?
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Who connects, as proven.
    pub source: &'a SpiffeId,
    /// To whom.
    pub destination: &'a SpiffeId,
    /// To which port.
    pub port: u16,
    /// At what time.
    pub now: Timestamp,
}

/// Everything that is allowed, indexed.
#[derive(Debug, Default)]
pub struct DecisionTable {
    destinations: HashMap<SpiffeId, Destination>,
    guardrails: Guardrails,
}

impl DecisionTable {
    /// Indexes policies, guardrails and the posture of every registered workload. The order of the arguments never
    /// matters to a decision.
    #[must_use]
    pub fn build(
        mut policies: Vec<ResolvedPolicy>,
        mut guardrails: Vec<ResolvedGuardrail>,
        postures: impl IntoIterator<Item = (SpiffeId, Mode)>,
    ) -> Self {
        policies.sort_by(|a, b| (&a.destination, &a.policy).cmp(&(&b.destination, &b.policy)));
        guardrails.sort_by(|a, b| a.policy.cmp(&b.policy));
        let mut destinations: HashMap<SpiffeId, Destination> = HashMap::new();
        for policy in policies {
            destinations.entry(policy.destination.clone()).or_default().add(policy);
        }
        for (id, mode) in postures {
            let destination = destinations.entry(id).or_default();
            destination.posture =
                strictest(destination.posture.into_iter().chain(std::iter::once(mode)));
        }
        Self { destinations, guardrails: Guardrails::build(guardrails) }
    }

    /// The one decision. Everything that lets a byte through, or says whether it would, asks here.
    #[must_use]
    pub fn decide(&self, request: Request<'_>) -> Verdict {
        if let Some(guardrail) = self.guardrails.denying(request) {
            return Verdict::Deny(denied_by_guardrail(guardrail));
        }
        let Some(destination) = self.destinations.get(request.destination) else {
            return Verdict::Deny(no_policy(request));
        };
        let registered = self.is_registered(request);
        if registered && let Some(allowed) = destination.allowing(request) {
            return Verdict::Allow(allowed);
        }
        let denial = if registered {
            destination.denial(request)
        } else {
            destination.unregistered(request)
        };
        match destination.mode() {
            Mode::Enforce => Verdict::Deny(denial),
            Mode::Audit => Verdict::WouldDeny(denial),
        }
    }

    /// The guardrail that denies it, whatever policies allow.
    #[must_use]
    pub fn guardrail_for(&self, request: Request<'_>) -> Option<&PolicyRef> {
        self.guardrails.denying(request).map(|guardrail| &guardrail.policy)
    }

    /// The rule that covers it, whether or not its caller is registered now: for callers that come and
    /// go. No decision: only [`decide`](Self::decide) lets anything through.
    #[must_use]
    pub fn rule_for(&self, request: Request<'_>) -> Option<Allowed> {
        self.destinations.get(request.destination)?.allowing(request)
    }

    /// A name in a rule is a reference, and an unknown reference denies: who was taken out of the
    /// registry is cut off at once, whatever certificate it still has. Of other trust domains there is
    /// no registry here; there the certificate alone counts.
    fn is_registered(&self, request: Request<'_>) -> bool {
        request.source.trust_domain() != request.destination.trust_domain()
            || self
                .destinations
                .get(request.source)
                .is_some_and(|workload| workload.posture.is_some())
    }

    /// How many identities have a policy or a posture.
    #[must_use]
    pub fn destinations(&self) -> usize {
        self.destinations.len()
    }
}

#[derive(Debug, Default)]
struct Destination {
    /// The posture of the workload itself; there is one exactly if it is registered.
    posture: Option<Mode>,
    policies: Vec<ResolvedPolicy>,
    /// The strictest of theirs; none if there is none.
    policies_mode: Option<Mode>,
    by_caller: HashMap<SpiffeId, Vec<RuleIndex>>,
    by_namespace: HashMap<TrustDomain, HashMap<String, Vec<RuleIndex>>>,
}

/// Where a rule stands: the policy's place, and the rule's place in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct RuleIndex {
    policy: usize,
    rule: usize,
}

impl Destination {
    fn add(&mut self, policy: ResolvedPolicy) {
        let place = self.policies.len();
        for (number, rule) in policy.rules.iter().enumerate() {
            let index = RuleIndex { policy: place, rule: number };
            for peer in &rule.peers {
                let list = match peer {
                    PeerMatch::Exact(id) => self.by_caller.entry(id.clone()).or_default(),
                    PeerMatch::AnyIn { trust_domain, namespace } => self
                        .by_namespace
                        .entry(trust_domain.clone())
                        .or_default()
                        .entry(namespace.as_str().to_owned())
                        .or_default(),
                };
                if list.last() != Some(&index) {
                    list.push(index);
                }
            }
        }
        self.policies_mode =
            strictest(self.policies_mode.into_iter().chain(std::iter::once(policy.mode)));
        self.policies.push(policy);
    }

    /// `Audit` only if the workload says so, or if it has policies and all of them say so.
    fn mode(&self) -> Mode {
        if self.posture == Some(Mode::Audit) {
            return Mode::Audit;
        }
        self.policies_mode.unwrap_or(Mode::Enforce)
    }

    /// The rules whose `from` covers the caller, exact ones first.
    fn covering<'a>(
        &'a self,
        source: &SpiffeId,
    ) -> impl Iterator<Item = (&'a ResolvedPolicy, &'a ResolvedRule)> + use<'a> {
        let exact = self.by_caller.get(source).map_or(&[][..], Vec::as_slice);
        let namespace = match source.kind() {
            IdentityKind::Workload { namespace, .. } => self
                .by_namespace
                .get(source.trust_domain())
                .and_then(|namespaces| namespaces.get(namespace))
                .map_or(&[][..], Vec::as_slice),
            IdentityKind::Machine { .. }
            | IdentityKind::Node { .. }
            | IdentityKind::ControlPlane
            | IdentityKind::Other => &[],
        };
        exact.iter().chain(namespace).filter_map(|index| {
            let policy = self.policies.get(index.policy)?;
            Some((policy, policy.rules.get(index.rule)?))
        })
    }

    fn allowing(&self, request: Request<'_>) -> Option<Allowed> {
        self.covering(request.source)
            .find(|(_, rule)| rule.ports.contains(&request.port) && rule.in_force(request.now))
            .map(|(policy, rule)| Allowed {
                policy: policy.policy.clone(),
                rule: rule.name.clone(),
                owner: policy.owner.clone(),
                until: rule.not_after,
            })
    }

    fn unregistered(&self, request: Request<'_>) -> Denial {
        let policy = self.policies.first();
        Denial {
            reason: Reason::NoMatchingRule,
            policy: policy.map(|policy| policy.policy.clone()),
            owner: policy.map(|policy| policy.owner.clone()),
            nearest_miss: None,
            mend: format!(
                "no registered workload is {}; put the caller into the mesh: a pod by its namespace's label \
                 hauberk.dev/mode, anything else by a Workload or Machine manifest",
                request.source
            ),
        }
    }

    fn denial(&self, request: Request<'_>) -> Denial {
        let covering = self
            .covering(request.source)
            .take(NEAREST_MISS_SCAN)
            .filter_map(|(policy, rule)| {
                covering_differs(rule, request).map(|differs| (differs, policy, rule))
            })
            .min_by(|a, b| a.0.cmp(&b.0));
        // Who is named in no rule has the right port in one, at the nearest.
        let nearest = covering.or_else(|| {
            self.policies
                .iter()
                .flat_map(|policy| policy.rules.iter().map(move |rule| (policy, rule)))
                .take(NEAREST_MISS_SCAN)
                .filter(|(_, rule)| rule.ports.contains(&request.port))
                .filter(|(_, rule)| !rule.peers.iter().any(|peer| peer.matches(request.source)))
                .find_map(|(policy, rule)| {
                    let allowed = rule.peers.first()?.to_string();
                    Some((Difference::Caller { allowed }, policy, rule))
                })
        });
        let Some((differs, policy, rule)) = nearest else {
            return match self.policies.first() {
                None => no_policy(request),
                Some(policy) => Denial {
                    reason: Reason::NoMatchingRule,
                    policy: Some(policy.policy.clone()),
                    owner: Some(policy.owner.clone()),
                    nearest_miss: None,
                    mend: format!(
                        "in AccessPolicy {}, add to spec.rules: {}",
                        policy.policy,
                        rule_yaml(request)
                    ),
                },
            };
        };
        let mend = mend(policy, rule, &differs, request);
        let reason = match &differs {
            Difference::Expired { .. } => Reason::GrantExpired,
            Difference::Port { .. } | Difference::Caller { .. } => Reason::NoMatchingRule,
        };
        Denial {
            reason,
            policy: Some(policy.policy.clone()),
            owner: Some(policy.owner.clone()),
            nearest_miss: Some(NearestMiss { rule: rule.name.clone(), differs }),
            mend,
        }
    }
}

/// What keeps a rule that names the caller from matching.
fn covering_differs(rule: &ResolvedRule, request: Request<'_>) -> Option<Difference> {
    if !rule.ports.contains(&request.port) {
        let allowed = rule.ports.iter().copied().take(NEAREST_MISS_PORTS).collect();
        return Some(Difference::Port { allowed });
    }
    // A rule that matches and never ends would have allowed it.
    rule.not_after.map(|at| Difference::Expired { at })
}

fn mend(
    policy: &ResolvedPolicy,
    rule: &ResolvedRule,
    differs: &Difference,
    request: Request<'_>,
) -> String {
    let place = format!("in AccessPolicy {}, rule {}", policy.policy, rule.name);
    match differs {
        Difference::Expired { .. } => format!("{place}, set a later notAfter"),
        Difference::Port { .. } => format!("{place}, add to ports: {}", request.port),
        Difference::Caller { .. } => {
            format!("{place}, add to from: - {}", as_peer_yaml(request.source))
        }
    }
}

fn rule_yaml(request: Request<'_>) -> String {
    format!(
        "- {{name: NAME, ports: [{}], from: [{{{}}}]}}",
        request.port,
        as_peer_yaml(request.source)
    )
}

fn no_policy(request: Request<'_>) -> Denial {
    let mend = match request.destination.kind() {
        IdentityKind::Workload { namespace, service_account } => format!(
            "create an AccessPolicy in namespace {namespace} with target {{serviceAccount: \
             {service_account}}} and the rule {}",
            rule_yaml(request)
        ),
        IdentityKind::Machine { name } => format!(
            "create an AccessPolicy with target {{machine: {name}}} and the rule {}",
            rule_yaml(request)
        ),
        IdentityKind::Node { .. } | IdentityKind::ControlPlane | IdentityKind::Other => {
            "only workloads and machines can be destinations".to_owned()
        }
    };
    Denial { reason: Reason::NoPolicy, policy: None, owner: None, nearest_miss: None, mend }
}

fn denied_by_guardrail(guardrail: &ResolvedGuardrail) -> Denial {
    Denial {
        reason: Reason::Guardrail,
        policy: Some(guardrail.policy.clone()),
        owner: Some(guardrail.owner.clone()),
        nearest_miss: None,
        mend: format!(
            "only its owner {} can change Guardrail {}{}",
            guardrail.owner,
            guardrail.policy,
            guardrail.reason.as_ref().map_or_else(String::new, |reason| format!(" ({reason})"))
        ),
    }
}

/// Guardrails by what they protect, so that a decision looks only at those of its destination.
#[derive(Debug, Default)]
struct Guardrails {
    exact: HashMap<SpiffeId, Vec<ResolvedGuardrail>>,
    namespace: HashMap<TrustDomain, HashMap<String, Vec<ResolvedGuardrail>>>,
}

impl Guardrails {
    fn build(guardrails: Vec<ResolvedGuardrail>) -> Self {
        let mut index = Self::default();
        for guardrail in guardrails {
            match guardrail.destination.clone() {
                PeerMatch::Exact(id) => index.exact.entry(id).or_default().push(guardrail),
                PeerMatch::AnyIn { trust_domain, namespace } => index
                    .namespace
                    .entry(trust_domain)
                    .or_default()
                    .entry(namespace.as_str().to_owned())
                    .or_default()
                    .push(guardrail),
            }
        }
        index
    }

    fn denying(&self, request: Request<'_>) -> Option<&ResolvedGuardrail> {
        let exact = self.exact.get(request.destination).map_or(&[][..], Vec::as_slice);
        let namespace = match request.destination.kind() {
            IdentityKind::Workload { namespace, .. } => self
                .namespace
                .get(request.destination.trust_domain())
                .and_then(|namespaces| namespaces.get(namespace))
                .map_or(&[][..], Vec::as_slice),
            IdentityKind::Machine { .. }
            | IdentityKind::Node { .. }
            | IdentityKind::ControlPlane
            | IdentityKind::Other => &[],
        };
        exact.iter().chain(namespace).find(|guardrail| {
            let port = match &guardrail.ports {
                GuardrailPorts::All => true,
                GuardrailPorts::Only(ports) => ports.contains(&request.port),
            };
            port && match &guardrail.denies {
                ResolvedPeers::From(peers) => peers.iter().any(|p| p.matches(request.source)),
                ResolvedPeers::UnlessFrom(peers) => {
                    !peers.iter().any(|p| p.matches(request.source))
                }
            }
        })
    }
}
