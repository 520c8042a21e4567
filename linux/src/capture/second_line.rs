//! The policy routing that belongs to the rules: a second line that stays when somebody flushes nftables.
//!
//! What is captured is led to loopback by its mark, which nftables sets, and also by what it is: in a
//! namespace all TCP, on a host the connections of a workload's user, and the answers from the ports that
//! workloads serve. So without nftables it arrives nowhere, rather than leaving as it is.
//!
//! What routing cannot tell: the cgroup of a socket, and on a host what passes over loopback. There, nftables is
//! the only line.
//!
//! It also says whose it is, so that it can be released when its workload went while nftables was flushed.

use std::collections::BTreeSet;

use super::{
    CAPTURED_BITS, Drift, MARK, MARK_TRANSPARENT, OWN_MARKS, RELEASED_BITS, ROUTE_TABLE, captured,
    released, ruleset::Fnv,
};
use crate::{
    error::Result,
    links::{self, Family},
    routing::{self, Action, Rule, families},
};

/// Before the main table (32766) and the usual rules of network plugins (from 100 on), which
/// could otherwise answer first; after the kernel's local table (0).
const BY_MARK: u32 = 71;
const OWN: u32 = 72;
const BY_KIND: u32 = 73;
const END: u32 = 74;

/// What is refused is told so by packets of the kernel's own, which must not be led to loopback: they have the
/// mark of what they answer.
const MARK_ANSWERED: [(Family, &str); 2] =
    [(Family::V4, "ipv4/fwmark_reflect"), (Family::V6, "ipv6/fwmark_reflect")];

/// A socket that is accepted has the mark of the packet that opened its connection. IPv6 obeys it, too.
const MARK_ACCEPTED: &str = "ipv4/tcp_fwmark_accept";

/// What is led to loopback.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Routing {
    /// All TCP of the namespace, also what it forwards: a network below it is the workload's, too.
    Namespace,
    /// What these users open, and what is answered on these ports. What the host forwards is other hosts'.
    Host { users: BTreeSet<u32>, service_ports: BTreeSet<u16> },
}

impl Routing {
    /// In an order in which they can be added one by one.
    fn rules(&self, owner: &str) -> Vec<Rule> {
        let lookup = |priority| Rule::new(priority, Action::Lookup(ROUTE_TABLE));
        let mut rules = vec![
            end(owner),
            Rule { mark: Some((MARK & OWN_MARKS, OWN_MARKS)), ..Rule::new(OWN, Action::Goto(END)) },
            Rule { mark: Some((MARK_TRANSPARENT, u32::MAX)), ..lookup(BY_MARK) },
            Rule { mark: Some((captured(0), CAPTURED_BITS)), ..lookup(BY_MARK) },
            Rule { mark: Some((released(0), RELEASED_BITS)), ..lookup(BY_MARK) },
        ];
        let by_kind = Rule { tcp: true, ..lookup(BY_KIND) };
        match self {
            Self::Namespace => rules.push(by_kind),
            Self::Host { users, service_ports } => {
                let by_kind = Rule { only_sent_here: true, ..by_kind };
                rules.extend(users.iter().map(|user| Rule { user: Some(*user), ..by_kind }));
                let ports = service_ports.iter();
                rules.extend(ports.map(|port| Rule { source_port: Some(*port), ..by_kind }));
            }
        }
        rules
    }

    /// Puts it in place, in place of what there was of it.
    pub(super) fn install(&self, owner: &str) -> Result<()> {
        for family in families() {
            let answered = MARK_ANSWERED.into_iter().filter(|(of, _)| *of == family);
            for (_, setting) in answered {
                // Without it, what is refused times out instead.
                drop(links::sysctl(setting, "1"));
            }
            let routes = routing::routes_to_loopback(family, MARK)?;
            routing::set_local_routes(family, ROUTE_TABLE, &routes)?;
            routing::set_rules(family, &self.rules(owner))?;
        }
        links::check_sources_by_mark()?;
        match self {
            Self::Namespace => Ok(()),
            Self::Host { .. } => links::sysctl(MARK_ACCEPTED, "1"),
        }
    }

    /// How it differs from what is there.
    pub(super) fn drift(&self, owner: &str) -> Result<Vec<Drift>> {
        let mut found = Vec::new();
        let mut wanted = self.rules(owner);
        wanted.sort_unstable();
        for family in families() {
            let mut rules = routing::rules(family)?;
            rules.sort_unstable();
            let mut routes = routing::local_routes(family, ROUTE_TABLE)?;
            routes.sort_unstable();
            let mut wanted_routes = routing::routes_to_loopback(family, MARK)?;
            wanted_routes.sort_unstable();
            let leads = wanted_routes.is_empty()
                || routing::leads_to_loopback(family, captured(0), ROUTE_TABLE)?;
            if rules != wanted || (routes == wanted_routes && !leads) {
                found.push(Drift::PolicyRoutingMissing);
                break;
            }
            if routes != wanted_routes {
                found.push(Drift::RoutesOutdated);
                break;
            }
        }
        if !links::sources_are_checked_by_mark()? {
            found.push(Drift::SettingChanged("src_valid_mark"));
        }
        if let Self::Host { .. } = self
            && links::read_sysctl(MARK_ACCEPTED)?.trim() != "1"
        {
            found.push(Drift::SettingChanged("tcp_fwmark_accept"));
        }
        Ok(found)
    }
}

/// Where the rule leads that spares the agent. It does nothing, so its mark has no meaning for packets: it is the number of
/// the agent that put the rules there.
fn end(owner: &str) -> Rule {
    let number = (!owner.is_empty()).then(|| {
        let mut hash = Fnv::new();
        hash.part(owner.as_bytes());
        // Its upper half is as good as any. The kernel takes zero for no mark.
        let number = u32::try_from(hash.0 >> 32).unwrap_or(u32::MAX);
        (number.max(1), u32::MAX)
    });
    Rule { mark: number, ..Rule::new(END, Action::Nothing) }
}

/// Whether what is there was put there by this agent.
pub(super) fn is_owned_by(owner: &str) -> Result<bool> {
    for family in families() {
        if routing::rules(family)?.contains(&end(owner)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Removes it, if it is there. Settings stay: without our marks they mean nothing.
pub(super) fn remove() -> Result<()> {
    for family in Family::ALL {
        let mut present = routing::rules(family)?;
        // What leads to loopback first, and then what spares the agent.
        present.sort_by_key(|rule| rule.mark.is_some());
        let (last, first): (Vec<_>, Vec<_>) =
            present.iter().partition(|rule| rule.action == Action::Nothing);
        first.iter().try_for_each(|rule| routing::delete_rule(family, rule))?;
        routing::set_local_routes(family, ROUTE_TABLE, &[])?;
        // Whose all of it was, for as long as anything of it is there.
        last.iter().try_for_each(|rule| routing::delete_rule(family, rule))?;
    }
    Ok(())
}

/// Whether any of it is there: somebody was captured here once.
pub(super) fn present() -> Result<bool> {
    for family in families() {
        if !routing::rules(family)?.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}
