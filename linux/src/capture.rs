//! Capture: how traffic gets into the agent without the application knowing.
//!
//! The rules are one nftables table, `inet hauberk`, described as values ([`Ruleset`]) and put
//! in place in one transaction, plus a policy rule and a local route for each IP family. All of
//! it acts in the calling thread's network namespace. The rules stay when the agent dies: what
//! they redirect is refused then, not let through.
//!
//! Only packets that open a TCP connection are redirected, so connections older than the rules
//! keep working.

mod drift;
mod expression;
mod host;
mod namespace;
mod ruleset;
mod transaction;
mod transparent;

pub use drift::Drift;
pub use host::{HostRules, HostWorkload, ProcessMatch};
pub use namespace::NamespaceRules;
pub use ruleset::Ruleset;

use crate::error::Result;
use expression::{Expression, mark, pass};

/// The mark of packets from the agent's own sockets: the rules let them pass. "HB" in ASCII.
///
/// It has no meaning for routing. Its bit 0x4000 is also kube-proxy's request for masquerading,
/// so on a Kubernetes node the agent's own connections would leave with the node's address,
/// which they have anyway.
pub const MARK: u32 = 0x4842;

/// The mark of packets on connections to the local application that carry the client's real
/// address: the agent's and, through conntrack, the application's answers. It is routed to
/// loopback, which is why it cannot be [`MARK`].
pub const MARK_TRANSPARENT: u32 = 0x4843;

/// The routing table for [`MARK_TRANSPARENT`].
pub const ROUTE_TABLE: u32 = 18502;

impl Ruleset {
    /// Installs the rules in the calling thread's namespace, in place of any earlier ones.
    ///
    /// The table is replaced in one transaction, so no packet meets half of it or none.
    pub fn install(&self) -> Result<()> {
        // Routing first: it concerns only packets that the rules mark.
        transparent::install_routing()?;
        transaction::replace(self)
    }

    /// What differs between these rules and those in the calling thread's namespace; empty when
    /// they are in force as described.
    pub fn drift(&self) -> Result<Vec<Drift>> {
        let mut found = drift::compare(self)?;
        if !transparent::routing_works()? {
            found.push(Drift::PolicyRoutingMissing);
        }
        Ok(found)
    }
}

/// Removes the rules, the policy rules and the routes from the calling thread's namespace, those
/// that are there. Redirected connections that are established keep their translation.
pub fn remove() -> Result<()> {
    transaction::delete()?;
    transparent::remove_routing()
}

/// Whether the calling thread's namespace has our table, in force. Says nothing of its contents:
/// for that, [`Ruleset::drift`].
pub fn installed() -> Result<bool> {
    Ok(drift::table()?.is_none())
}

/// What leaves the chain untouched because it is the agent's own.
fn our_own() -> [[Vec<Expression>; 2]; 2] {
    [[mark(MARK), pass()], [mark(MARK_TRANSPARENT), pass()]]
}
