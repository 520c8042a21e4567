//! Capture: how traffic gets into the agent without the application knowing.
//!
//! The rules are one nftables table, `inet hauberk`, described as values ([`Ruleset`]) and put
//! in place in one transaction, and policy routing for each IP family as a second line. All of
//! it acts in the calling thread's network namespace. The rules stay when the agent dies: what
//! they capture is refused then, not let through.
//!
//! Connection tracking has no part in it. A captured connection is led to loopback, where the kernel finds the
//! agent's end of it by its addresses, which are those that the application sees: the agent's sockets have
//! other hosts' addresses (`IP_TRANSPARENT`). Every packet is looked at, not only a connection's first, so that
//! nothing leaves as the application wrote it, whatever was forgotten meanwhile ([ADR 14]).
//!
//! A connection is not answered before the agent has decided about it and reached its destination: its first packet
//! is held ([`Hold`]), so that `connect` tells an application the truth ([ADR 16]).
//!
//! Connections that are older than the rules go on as they are; the kernel keeps a list of them.
//!
//! [ADR 14]: ../../../docs/adr/0014-capture-without-connection-tracking.md
//! [ADR 16]: ../../../docs/adr/0016-connect-tells-the-truth.md

mod drift;
mod expression;
mod held;
mod host;
mod log;
mod monitor;
mod namespace;
mod older;
mod parts;
mod published;
mod route_news;
mod ruleset;
mod second_line;
mod transaction;

pub use drift::Drift;
pub use held::{Hold, Opening};
pub use host::{HostRules, HostWorkload, ProcessMatch};
pub use monitor::{Monitor, Reports};
pub use namespace::NamespaceRules;
pub use older::{
    Connection, OpenOlder, closed as closed_older, forget as forget_older,
    in_force as older_in_force, older, open_older,
};
pub use ruleset::Ruleset;

use std::{collections::HashSet, net::IpAddr};

use crate::{
    error::{Error, Result},
    links::addresses,
    sockets::{self, TcpSocket, tcp_sockets},
};
use older::Scope;
use published::Surroundings;

/// The mark of packets from the agent's own sockets: the rules let them pass. "HB" in ASCII.
///
/// It has no meaning for routing. Its bit 0x4000 is also kube-proxy's request for masquerading,
/// so on a Kubernetes node the agent's own connections would leave with the node's address,
/// which they have anyway.
pub const MARK: u32 = 0x4842;

/// The mark of packets that are no business of the mesh: of connections that are older than the rules, and on a
/// host of those that come in for nobody of the mesh. Without kube-proxy's bit, since a host may
/// forward such packets.
pub(crate) const MARK_UNCAPTURED: u32 = 0x0842;

/// The mark of the agent's connections to a port of this host that another program's address translation leads into a
/// container.
pub const MARK_PUBLISHED: u32 = 0x2842;

/// The bits in which [`MARK`], [`MARK_UNCAPTURED`] and [`MARK_PUBLISHED`] are the same, and differ from all others.
const OWN_MARKS: u32 = !0x6000;

/// The mark of packets on connections to the local application that carry the client's real
/// address: the agent's and the application's answers. It is routed to
/// loopback, which is why it cannot be [`MARK`].
pub const MARK_TRANSPARENT: u32 = 0x4843;

/// The marks of what is captured, each with the port of the agent's listener in the other half.
const CAPTURED: u32 = 0x4844_0000;
const CAPTURED_BITS: u32 = 0xffff_0000;

/// The marks of first packets that were held and go to the agent's listener after all, each with that listener's port.
/// A rule takes the port from there, so it stands in the first two bytes, as it does in a packet.
const RELEASED: [u8; 2] = [0x45, 0x48];
const RELEASED_BITS: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

/// The routing table for what is led to loopback.
pub const ROUTE_TABLE: u32 = 18502;

/// The group of `nfnetlink_log` that is told of captured connections that cannot be led to the agent.
pub const REPORT_GROUP: u16 = 18502;

/// The sets of connections that are older than the rules.
const OLDER_V4: &str = "older_v4";
const OLDER_V6: &str = "older_v6";

/// The set of the ports that a host's workloads serve.
const SERVED: &str = "served";

/// How many connections that are just being opened are left alone when rules are put in place: they have to be in the one
/// message with the rules, whose length the kernel limits. With more, a workload could keep itself from being captured.
const MAX_OPENING: usize = 1_000;

/// The chain for what the agent opens to applications.
const DIALLED: &str = "dialled";

/// The chain that has rules only while it is being found out which connections are older.
const UNDECIDED: &str = "undecided";

/// The mark of what goes to the agent's listener on this port; to none, if it is zero.
const fn captured(port: u16) -> u32 {
    // Lossless, which a const function cannot say otherwise.
    #[allow(clippy::as_conversions)]
    let port = port as u32;
    CAPTURED | port
}

/// The mark of what was held and goes to the agent's listener on this port; to none, if it is zero.
const fn released(port: u16) -> u32 {
    let [first, second] = port.to_be_bytes();
    u32::from_ne_bytes([first, second, RELEASED[0], RELEASED[1]])
}

/// What becomes of connections that are captured and cannot be led to the agent, as those of a socket that is bound
/// to an interface. The agent is told of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unroutable {
    /// They are refused.
    Refuse,
    /// They go on without the mesh.
    Pass,
}

/// What was in force before rules were put in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Before<'a> {
    /// Nothing that this process knows of. If the kernel has nothing either, all open connections are older than
    /// the rules; else those that the kernel has noted.
    Unknown,
    /// These rules, with these older connections; the kernel may have lost either.
    Known(&'a Ruleset, &'a [Connection]),
}

impl Ruleset {
    /// Puts the rules in place in the calling thread's namespace.
    ///
    /// The table is replaced in one transaction, so no packet meets half of it or none. Connections that are
    /// captured by these rules and were not by those before, and are open, are left alone. Returns all connections
    /// that are left alone, and those that were opened although they should have been captured: these are cut, unless
    /// they may pass ([`Unroutable::Pass`]).
    ///
    /// # Errors
    /// If the kernel refuses the table, or cannot be asked. What else failed is in [`Installed::incomplete`].
    pub fn install(&self, before: &Before<'_>) -> Result<Installed> {
        let (mut older, fresh) = self.older_than(before)?;
        // The table first: the routing leads to loopback what only the table lets go on.
        let usual = Surroundings::default();
        // What waits for an answer has left as it is: it has to be known when the answer comes. If it is sent again, that is
        // captured, and takes it out. Nobody may put it back in then, so it is there from the first moment or not at all.
        let opening = match &fresh {
            Some(scope) => older::opening(&older::open_uncaptured(scope)?),
            None => Vec::new(),
        };
        let opening = opening.get(..MAX_OPENING).unwrap_or(&opening);
        transaction::replace(self, &usual, &older::by_set(opening))?;
        older::spare(&older)?;
        // What is missing of it is told in the end: nothing is left half done for it.
        let routed = self.routing.install(&self.owner);
        let fitted = self.fit(&usual);
        let mut open = older::open_uncaptured(&self.scope)?;
        let known: HashSet<Connection> = older.iter().copied().collect();
        let new = match &fresh {
            Some(scope) => {
                older::agreed(&older::open_uncaptured(scope)?, &older::open_uncaptured(scope)?)
            }
            None => Vec::new(),
        };
        let new: Vec<_> = new.into_iter().filter(|one| !known.contains(one)).collect();
        older::spare(&new)?;
        transaction::decide()?;
        // A listing is not made in one moment: only what two agree on went around the agent.
        let again = older::open_uncaptured(&self.scope)?;
        older.extend(new);
        // What the rules themselves left alone meanwhile.
        let known: HashSet<Connection> = older.iter().copied().collect();
        older.extend(older::older()?.into_iter().filter(|one| !known.contains(one)));
        let spared: HashSet<Connection> = older.iter().copied().collect();
        open.retain(|socket| {
            let ends = Connection { local: socket.local, remote: socket.remote };
            !socket.is_opening()
                && !spared.contains(&ends)
                && again.iter().any(|other| other.is_same_as(socket))
        });
        let (mut passed, mut cut) = (Vec::new(), Vec::new());
        for socket in open {
            let side = if self.scope.lets_pass(&socket)? { &mut passed } else { &mut cut };
            side.push(socket);
        }
        let passing: Vec<_> = passed.iter().map(Connection::of).collect();
        older::spare(&passing)?;
        older.extend(passing);
        let ended = end_all(&cut);
        // Whoever was cut is to be told of all the same.
        let incomplete = routed.and(fitted).and(ended).err();
        Ok(Installed { older, cut, passed, incomplete })
    }

    /// The connections that are known to be older than the rules and live, and whose else are to be looked for.
    fn older_than(&self, before: &Before<'_>) -> Result<(Vec<Connection>, Option<Scope>)> {
        let in_kernel = older::in_force()?;
        let (noted, fresh) = match before {
            // What is not in it any more was opened anew.
            Before::Known(rules, noted) => {
                let noted = in_kernel.unwrap_or_else(|| noted.to_vec());
                (noted, Some(self.scope.beyond(&rules.scope)))
            }
            Before::Unknown if installed()? || second_line::present()? => {
                (in_kernel.unwrap_or_default(), None)
            }
            Before::Unknown => (Vec::new(), Some(self.scope.clone())),
        };
        if noted.is_empty() {
            return Ok((noted, fresh));
        }
        let listings = (older::open_uncaptured(&self.scope)?, older::open_uncaptured(&self.scope)?);
        let live: HashSet<_> = older::agreed(&listings.0, &listings.1).into_iter().collect();
        Ok((noted.into_iter().filter(|one| live.contains(one)).collect(), fresh))
    }

    /// Fits the policy routing and the rules to the network around them, as after a change of addresses or when
    /// another program begins to translate them. Connections stay as they are.
    pub fn fit_to_network(&self) -> Result<()> {
        self.routing.install(&self.owner)?;
        if drift::compare(self)?.contains(&Drift::TranslationOutdated) {
            transaction::adapt(self, &Surroundings::look()?)?;
        }
        Ok(())
    }

    /// Fits the table, which was put in place for these surroundings, to those that are there.
    fn fit(&self, before: &Surroundings) -> Result<()> {
        let now = Surroundings::look()?;
        if now == *before { Ok(()) } else { transaction::adapt(self, &now) }
    }

    /// What differs between these rules and those in the calling thread's namespace; empty when
    /// they are in force as described.
    pub fn drift(&self) -> Result<Vec<Drift>> {
        let mut found = drift::compare(self)?;
        found.extend(self.routing.drift(&self.owner)?);
        Ok(found)
    }
}

/// What was found when rules were put in place.
#[derive(Debug, Default)]
pub struct Installed {
    /// The connections that are older than the rules, and are left alone.
    pub older: Vec<Connection>,
    /// Those that were opened while rules should have captured them, and did not. They are ended.
    pub cut: Vec<TcpSocket>,
    /// The same, of those that may pass. They go on, and are among [`older`](Self::older).
    pub passed: Vec<TcpSocket>,
    /// What is in place only in part: the table is there, and the routing is not, or a connection could not be ended.
    pub incomplete: Option<Error>,
}

impl Installed {
    /// All of it.
    ///
    /// # Errors
    /// If something is in place only in part.
    pub fn whole(self) -> Result<Self> {
        match self.incomplete {
            None => Ok(self),
            Some(error) => Err(error),
        }
    }
}

/// Removes the rules, the policy rules and the routes from the calling thread's namespace, those
/// that are there. Captured connections are ended first: without the rules their applications would write to
/// the network.
pub fn remove() -> Result<()> {
    // What cannot be ended keeps nothing from being removed.
    let ended = if anything_installed()? { end_captured() } else { Ok(()) };
    transaction::delete()?;
    second_line::remove()?;
    ended
}

/// Ends the applications' ends of the connections that the agent has the other end of.
fn end_captured() -> Result<()> {
    end_all(&captured_sockets()?)
}

/// Whether a captured connection is open in the calling thread's namespace.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn captured_are_open() -> Result<bool> {
    Ok(!captured_sockets()?.is_empty())
}

/// The applications' ends of the connections that the agent has the other end of.
fn captured_sockets() -> Result<Vec<TcpSocket>> {
    let own: HashSet<IpAddr> = addresses()?.into_iter().map(|address| address.ip).collect();
    let mut open = tcp_sockets()?;
    // Of the agent's as well: a new connection around it may have the ends of one that is over.
    open.retain(|socket| !socket.is_over());
    let agents = sockets::other_ends(&open, &own);
    open.retain(|socket| agents.contains(&(socket.local, socket.remote)));
    Ok(open)
}

/// Ends connections, all that can be, and gives the first error.
fn end_all<'a>(sockets: impl IntoIterator<Item = &'a TcpSocket>) -> Result<()> {
    let mut outcome = Ok(());
    for socket in sockets {
        let ended = sockets::destroy(socket);
        outcome = outcome.and(ended);
    }
    outcome
}

/// Whether the calling thread's namespace has our table, in force. Says nothing of its contents:
/// for that, [`Ruleset::drift`].
pub fn installed() -> Result<bool> {
    Ok(drift::table()?.is_none())
}

/// Whether another program translates addresses in the calling thread's namespace: ports of it may be published from
/// elsewhere.
pub fn is_translated() -> Result<bool> {
    published::is_translated()
}

/// Whether what the calling thread's namespace has of ours was put there by this agent: the table says so, or, if
/// somebody has flushed it, the policy routing.
pub fn is_owned_by(owner: &str) -> Result<bool> {
    match drift::owner()? {
        Some(found) => Ok(found == owner),
        None => second_line::is_owned_by(owner),
    }
}

/// Whether the calling thread's namespace has anything of ours: a table, in force or not, or policy routing.
pub fn anything_installed() -> Result<bool> {
    Ok(drift::table()? != Some(Drift::TableMissing) || second_line::present()?)
}
