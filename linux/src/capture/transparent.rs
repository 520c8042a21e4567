//! The plumbing for transparent sources: the application's answers to a client's real address
//! must come back to the agent's socket, not leave for the client.
//!
//! The agent's transparent sockets mark their packets with [`MARK_TRANSPARENT`]. A connection
//! opened with such a packet over loopback keeps the mark (in conntrack); answers within it get
//! the mark themselves, and a policy rule sends what carries it to loopback.
//!
//! The mark is one of its own: the kernel routes a socket by its mark, so the same rule on
//! [`MARK`](super::MARK) would turn the agent's connections to other machines back to loopback.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nix::libc;

use super::{
    MARK_TRANSPARENT, ROUTE_TABLE,
    expression::{
        Is, connection_mark, mark, reply_direction, set_connection_mark, set_mark, tcp, to_loopback,
    },
    ruleset::{Chain, Hook},
};
use crate::{
    error::{Result, accept},
    links::{self, Family, MarkRule},
};

/// Before the main table (32766) and the usual rules of network plugins (from 100 on), which
/// could otherwise answer first; after the kernel's local table (0).
const PRIORITY: u32 = 72;

const RULE: MarkRule = MarkRule { mark: MARK_TRANSPARENT, table: ROUTE_TABLE, priority: PRIORITY };

/// Addresses of documentation prefixes: no namespace has them, so only our rule can claim them.
const ELSEWHERE_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const ELSEWHERE_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));

/// The chain that carries the mark from a connection's first packet to its answers.
pub(super) fn chain() -> Chain {
    Chain::at("transparent", Hook::ROUTE_OUTPUT)
        .rule([
            tcp(Is::Equal),
            mark(MARK_TRANSPARENT),
            to_loopback(Is::Equal),
            set_connection_mark(MARK_TRANSPARENT),
        ])
        .rule([
            tcp(Is::Equal),
            reply_direction(),
            connection_mark(MARK_TRANSPARENT),
            set_mark(MARK_TRANSPARENT),
        ])
}

/// Adds the policy rules and routes; those that are there already stay.
pub(super) fn install_routing() -> Result<()> {
    for family in families() {
        accept(links::add_local_route(family, ROUTE_TABLE), &[libc::EEXIST])?;
        accept(links::add_mark_rule(family, RULE), &[libc::EEXIST])?;
    }
    Ok(())
}

/// Removes them, if they are there.
pub(super) fn remove_routing() -> Result<()> {
    // What a kernel without IPv6 answers, beside "not there".
    let gone = [libc::ENOENT, libc::ESRCH, libc::EAFNOSUPPORT, libc::EOPNOTSUPP, libc::ENODEV];
    for family in Family::ALL {
        accept(links::delete_mark_rule(family, RULE), &gone)?;
        accept(links::delete_local_route(family, ROUTE_TABLE), &gone)?;
    }
    Ok(())
}

/// Whether answers would be routed as they must be.
pub(super) fn routing_works() -> Result<bool> {
    for family in families() {
        let elsewhere = match family {
            Family::V4 => ELSEWHERE_V4,
            Family::V6 => ELSEWHERE_V6,
        };
        if !links::mark_is_local(elsewhere, MARK_TRANSPARENT, ROUTE_TABLE)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn families() -> impl Iterator<Item = Family> {
    let without_v6 = !links::ipv6_is_enabled();
    Family::ALL.into_iter().filter(move |family| *family == Family::V4 || !without_v6)
}
