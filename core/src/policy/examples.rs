//! The tests that a policy carries, asked of the one decision before the policy is in force.
//!
//! A test speaks about the rules as they are written: it is asked of a table with this policy
//! alone, without guardrails, with every caller registered, and at an instant when no rule is over.

use std::fmt;

use super::{
    AccessPolicy, DecisionTable, Denial, Expectation, Mode, PeerSelector, PolicyTest, Request,
    Verdict,
    resolve::{PeerMatch, ResolveError, ResolvedPolicy, bind_peer, bind_rule},
    verdict::Difference,
};
use crate::{
    identity::{SpiffeId, TrustDomain},
    time::Timestamp,
};

/// A test that does not come out as its policy's owner expects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailedTest {
    /// Its place among the policy's tests, from 0.
    pub number: usize,
    /// What comes out instead.
    pub problem: String,
    /// What to change.
    pub mend: &'static str,
}

impl fmt::Display for FailedTest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spec.tests[{}]: {}; mend: {}", self.number, self.problem, self.mend)
    }
}

/// Asks [`DecisionTable::decide`] every test of a policy, as in a mesh of `trust_domain`.
///
/// # Errors
/// If a name makes no valid SPIFFE ID.
pub fn failed_tests(
    policy: &AccessPolicy,
    trust_domain: &TrustDomain,
) -> Result<Vec<FailedTest>, ResolveError> {
    if policy.tests.is_empty() {
        return Ok(Vec::new());
    }
    let callers: Vec<PeerMatch> = policy
        .tests
        .iter()
        .map(|test| bind_peer(&test.from, trust_domain))
        .collect::<Result<_, _>>()?;
    // A rule holds for every destination of its policy alike, so one stands for all of them.
    let destination = SpiffeId::of_trust_domain(trust_domain);
    let table = table_of(policy, &destination, &callers, trust_domain)?;
    let tests = policy.tests.iter().zip(&callers).enumerate();
    let failed = tests.filter_map(|(number, (test, caller))| {
        let (problem, mend) = match caller {
            PeerMatch::Exact(source) => {
                let (port, now) = (test.port, Timestamp::MIN);
                let request = Request { source, destination: &destination, port, now };
                failure(test, table.decide(request))?
            }
            PeerMatch::AnyIn { .. } => {
                ("anyIn is not one caller".to_owned(), "name a serviceAccount, machine or spiffeId")
            }
        };
        Some(FailedTest { number, problem, mend })
    });
    Ok(failed.collect())
}

fn table_of(
    policy: &AccessPolicy,
    destination: &SpiffeId,
    callers: &[PeerMatch],
    trust_domain: &TrustDomain,
) -> Result<DecisionTable, ResolveError> {
    let rules = policy.rules.iter().map(|rule| bind_rule(rule, trust_domain));
    let resolved = ResolvedPolicy {
        policy: policy.name.clone(),
        owner: policy.owner.clone(),
        mode: policy.mode,
        destination: destination.clone(),
        rules: rules.collect::<Result<_, _>>()?,
    };
    let registered = callers.iter().filter_map(|caller| match caller {
        PeerMatch::Exact(id) => Some((id.clone(), Mode::Enforce)),
        PeerMatch::AnyIn { .. } => None,
    });
    Ok(DecisionTable::build(vec![resolved], Vec::new(), registered))
}

/// The problem and its mend, if the verdict is not the expected one.
fn failure(test: &PolicyTest, verdict: Verdict) -> Option<(String, &'static str)> {
    let who = format!("{} on port {}", caller(&test.from), test.port);
    match (test.expect, verdict) {
        (Expectation::Allow, Verdict::Allow(_))
        | (Expectation::Deny, Verdict::Deny(_) | Verdict::WouldDeny(_)) => None,
        (Expectation::Deny, Verdict::Allow(allowed)) => Some((
            format!(
                "the test fails: {who} should be denied, but the rule {:?} allows it",
                allowed.rule.as_str()
            ),
            "correct that rule, or expect allow",
        )),
        (Expectation::Allow, Verdict::Deny(denial) | Verdict::WouldDeny(denial)) => Some((
            format!("the test fails: {who} should be allowed, but is denied: {}", why(&denial)),
            "correct the rules, or expect deny",
        )),
    }
}

fn why(denial: &Denial) -> &'static str {
    match denial.nearest_miss.as_ref().map(|miss| &miss.differs) {
        Some(Difference::Expired { .. }) => "its rule is over before anybody can connect",
        Some(Difference::Port { .. }) => "the rules with this caller have other ports",
        Some(Difference::Caller { .. }) => "the rules with this port have other callers",
        None => "no rule has this caller",
    }
}

fn caller(peer: &PeerSelector) -> String {
    match peer {
        PeerSelector::ServiceAccount { namespace, name } => {
            format!("service account {namespace}/{name}")
        }
        PeerSelector::Machine { name } => format!("machine {name}"),
        PeerSelector::SpiffeId(id) => id.to_string(),
        PeerSelector::AnyIn { namespace } => format!("any service account of {namespace}"),
    }
}
