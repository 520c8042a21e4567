//! Ports of this machine that another program's address translation leads elsewhere, as Docker publishes those of
//! its containers.
//!
//! Where there is such translation, and only there, the table has chains of its own kind, ahead of all others:
//! - *What is the agent's stays where it is.* A packet that belongs to one of the agent's sockets, or comes from one, is
//!   translated into itself. Of several translations the kernel takes the first.
//! - *What the agent sends on is led to the container.* A connection with [`MARK_PUBLISHED`] is one that is to be translated. It is
//!   refused if it was not, so that it never takes an application here by surprise, and it is stopped if it would
//!   leave the machine, where it would be in clear.
//! - *What went around the agent ends.* On a host, a connection that was opened to a served port and is led through the machine is older than
//!   the rules, or was opened while they were missing. Its other end would go on sending.
//!
//! Elsewhere nothing here makes the kernel track connections.

use std::{collections::BTreeSet, fs, net::IpAddr};

use netlink_bindings::{rt_link, rt_route};
use netlink_socket2::NetlinkSocket;

use super::{
    MARK_PUBLISHED, MARK_TRANSPARENT, SERVED, drift,
    expression::{
        Expression, Is, discard, from_address_of_outgoing_interface, goto, keep_destination, mark,
        opened_to, opened_to_port, opening, outgoing_interface, pass, reset, tcp, to_this_host,
        to_transparent_socket,
    },
    ruleset::{Chain, Hook, Set},
};
use crate::{
    error::{Context, Result},
    links::{Family, addresses},
    routing,
};

/// The chain that connections with [`MARK_PUBLISHED`] pass when they leave.
pub(super) const LEAVING: &str = "published";

/// The chains that are there only beside other programs' translation.
pub(super) const BESIDE: [&str; 4] = [KEEP_INCOMING, KEEP_OUTGOING, PASSING, PASSING_SERVED];
const KEEP_INCOMING: &str = "keep_incoming";
const KEEP_OUTGOING: &str = "keep_outgoing";
const PASSING: &str = "passing_through";
const PASSING_SERVED: &str = "passing_served";

/// Where the older iptables tell which of their tables are in use here.
const LEGACY_TABLES: [&str; 2] =
    ["/proc/thread-self/net/ip_tables_names", "/proc/thread-self/net/ip6_tables_names"];

/// What of the network around them the rules depend on.
/// By default, nobody else translates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Surroundings {
    /// Another program translates addresses here.
    pub(super) is_translated: bool,
    /// The interfaces that lead into other namespaces of this machine, and nowhere else.
    inner: BTreeSet<u32>,
    /// The addresses of this machine, but for loopback's.
    addresses: BTreeSet<IpAddr>,
}

impl Surroundings {
    /// As they are now.
    pub(super) fn look() -> Result<Self> {
        Self::beside(drift::others_translate()?)
    }

    /// The same, if it is known already whether another table of nftables translates addresses.
    pub(super) fn beside(others_translate: bool) -> Result<Self> {
        let is_translated = others_translate || is_translated_by_legacy_tables();
        if !is_translated {
            return Ok(Self::default());
        }
        let inner = inner_interfaces()?;
        let addresses = addresses()?.into_iter().map(|address| address.ip);
        let addresses = addresses.filter(|address| !address.is_loopback()).collect();
        Ok(Self { is_translated, inner, addresses })
    }

    /// The chains of a table with these sets that depend on them.
    pub(super) fn chains(&self, sets: &[Set]) -> Vec<Chain> {
        let mut chains = vec![self.leaving()];
        if self.is_translated {
            let incoming = Chain::at(KEEP_INCOMING, Hook::NAT_PREROUTING);
            let outgoing = Chain::at(KEEP_OUTGOING, Hook::NAT_OUTPUT);
            chains.push(keep(incoming, to_transparent_socket));
            chains.push(keep(outgoing, || mark(MARK_TRANSPARENT)));
            if sets.iter().any(|set| set.name == SERVED) {
                chains.extend(self.passing());
            }
        }
        chains
    }

    /// What is opened to a served port now never passes through the machine: it is captured. All that the machine forwards
    /// comes here: what was opened to no such port leaves at once.
    fn passing(&self) -> [Chain; 2] {
        let chain = Chain::at(PASSING, Hook::FORWARD).rule([
            tcp(Is::Equal),
            opened_to_port(SERVED),
            goto(PASSING_SERVED),
        ]);
        let addresses = self.addresses.iter();
        let served = addresses.fold(Chain::named(PASSING_SERVED), |chain, address| {
            chain.rule([opened_to(*address), reset()])
        });
        [served, chain]
    }

    /// It may leave where only containers are. Not through an interface with the address that was wanted: there, callers are.
    fn leaving(&self) -> Chain {
        let chain = Chain::named(LEAVING).rule([from_address_of_outgoing_interface(), discard()]);
        let inner = self.inner.iter();
        inner
            .fold(chain, |chain, index| chain.rule([outgoing_interface(*index), pass()]))
            .rule([discard()])
    }
}

/// What was to be translated and was not, is refused.
pub(super) fn untranslated() -> [Vec<Expression>; 4] {
    [mark(MARK_PUBLISHED), opening(Is::Equal), to_this_host(Is::Equal), reset()]
}

fn keep(chain: Chain, which: impl Fn() -> Vec<Expression>) -> Chain {
    Family::ALL.into_iter().fold(chain, |chain, family| {
        chain.rule([tcp(Is::Equal), which(), keep_destination(family)])
    })
}

/// Whether another program translates addresses here.
pub(super) fn is_translated() -> Result<bool> {
    Ok(drift::others_translate()? || is_translated_by_legacy_tables())
}

/// Whether iptables translate that are older than nftables. Nobody tells of their changes.
fn is_translated_by_legacy_tables() -> bool {
    LEGACY_TABLES.iter().any(|file| {
        // A kernel without them has no such file.
        fs::read_to_string(file).is_ok_and(|names| names.lines().any(|name| name == "nat"))
    })
}

/// One interface, as far as it says where it leads.
struct Interface {
    index: u32,
    kind: Option<Kind>,
    /// The bridge that it is a port of.
    master: Option<u32>,
}

#[derive(PartialEq, Eq)]
enum Kind {
    Bridge,
    /// One end of a pair, the other one of which is in another namespace.
    Pair,
    /// A program's: a virtual machine's, if it is the port of a bridge.
    Tap,
}

/// The bridges whose ports all lead into namespaces or virtual machines of this machine, and pairs by themselves. None
/// behind which there is a router.
fn inner_interfaces() -> Result<BTreeSet<u32>> {
    let all = interfaces()?;
    let routed = interfaces_to_routers()?;
    let leads_inside = |interface: &&Interface| match interface.kind {
        Some(Kind::Pair) => interface.master.is_none(),
        Some(Kind::Bridge) => all
            .iter()
            .filter(|port| port.master == Some(interface.index))
            .all(|port| matches!(port.kind, Some(Kind::Pair | Kind::Tap))),
        Some(Kind::Tap) | None => false,
    };
    Ok(all
        .iter()
        .filter(leads_inside)
        .map(|interface| interface.index)
        .filter(|index| !routed.contains(index))
        .collect())
}

fn interfaces() -> Result<Vec<Interface>> {
    let operation = "listing the interfaces";
    let request = rt_link::Request::new().op_getlink_dump(&rt_link::Ifinfomsg::new());
    let mut socket = NetlinkSocket::new();
    let mut reply = socket.request(&request).context(operation)?;
    let mut found = Vec::new();
    while let Some(answer) = reply.recv() {
        let (message, attributes) = answer.context(operation)?;
        let kind = attributes.get_linkinfo().ok().and_then(|info| info.get_kind().ok());
        found.push(Interface {
            index: u32::try_from(message.ifi_index).unwrap_or_default(),
            kind: match kind.map(|kind| kind.to_bytes()) {
                Some(b"bridge") => Some(Kind::Bridge),
                Some(b"veth") if attributes.get_link_netnsid().is_ok() => Some(Kind::Pair),
                Some(b"tun") => Some(Kind::Tap),
                Some(_) | None => None,
            },
            master: attributes.get_master().ok(),
        });
    }
    Ok(found)
}

/// Those by which a route leads to a gateway, and those of routes with several ways.
fn interfaces_to_routers() -> Result<BTreeSet<u32>> {
    let mut found = BTreeSet::new();
    for family in Family::ALL {
        let header = rt_route::Rtmsg { rtm_family: family.number(), ..Default::default() };
        let request = rt_route::Request::new().op_getroute_dump(&header);
        let operation = || format!("listing the {family:?} routes");
        routing::list(&request, operation, |(_, attributes)| {
            if attributes.get_gateway().is_ok() || attributes.get_via().is_ok() {
                found.extend(attributes.get_oif().ok());
            }
            found.extend(attributes.get_multipath().ok().into_iter().flat_map(ways));
        })?;
    }
    Ok(found)
}

/// The interfaces of a route's several ways: `struct rtnexthop` each, with attributes behind it.
fn ways(mut list: &[u8]) -> Vec<u32> {
    let mut found = Vec::new();
    while let Some((length, index)) = list.first_chunk().zip(list.get(4..8)) {
        found.extend(index.first_chunk().map(|index| u32::from_ne_bytes(*index)));
        let length = usize::from(u16::from_ne_bytes(*length)).max(8);
        list = list.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_ways_of_a_route_count() {
        let mut list = Vec::new();
        // The first one with an attribute behind it.
        list.extend(16u16.to_ne_bytes());
        list.extend([0, 0]);
        list.extend(3u32.to_ne_bytes());
        list.extend([8, 0, 5, 0, 10, 0, 0, 1]);
        list.extend(8u16.to_ne_bytes());
        list.extend([0, 0]);
        list.extend(7u32.to_ne_bytes());
        assert_eq!(ways(&list), [3, 7]);
        assert!(ways(&list[..6]).is_empty());
    }
}
