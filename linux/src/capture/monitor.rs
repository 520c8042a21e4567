//! News from the kernel that the rules may have been altered: of nftables, and of rules, routes, addresses and
//! interfaces. And reports of captured connections that cannot be led to the agent.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use netlink_bindings::utils;
use nix::sys::socket::SockProtocol;

use super::{
    REPORT_GROUP,
    log::{self, Log, drain},
    route_news,
    transaction::TABLE,
};
use crate::{
    dump::messages,
    error::{Context, Result},
    sys,
};

/// `NFNLGRP_NFTABLES` and `RTNLGRP_*` of the kernel's headers.
const NFTABLES: u32 = 7;
const ROUTING: [u32; 7] = [1, 5, 7, 8, 9, 11, 19];

/// `NFT_MSG_NEWGEN`: the end of each transaction.
const NEW_GENERATION: u8 = 15;

/// `NFT_MSG_NEWCHAIN`, and `NFTA_CHAIN_TYPE`, which only chains have that are at a hook.
const NEW_CHAIN: u8 = 3;
const CHAIN_TYPE: u16 = 7;

/// Bytes of a packet that are reported: the headers.
const REPORTED: u32 = 128;

/// Reports that are taken at once.
const REPORTS: usize = 4_096;

/// Listens in the namespace of the thread that made it. Any thread may read it.
#[derive(Debug)]
pub struct Monitor {
    nftables: OwnedFd,
    routing: OwnedFd,
}

/// The reports of captured connections that cannot be led to the agent.
#[derive(Debug)]
pub struct Reports(Log);

impl Monitor {
    /// Begins to listen in the calling thread's namespace.
    ///
    /// # Errors
    /// If the kernel does not allow it.
    pub fn start() -> Result<Self> {
        let operation = "listening for changes of the network";
        let nftables = listen(SockProtocol::NetlinkNetFilter, &[NFTABLES]).context(operation)?;
        let routing = listen(SockProtocol::NetlinkRoute, &ROUTING).context(operation)?;
        route_news::only_ours(&routing).context(operation)?;
        Ok(Self { nftables, routing })
    }

    /// The two sockets, one of which becomes readable when there is something to [`drain`](Self::drain).
    pub fn sockets(&self) -> [BorrowedFd<'_>; 2] {
        [self.nftables.as_fd(), self.routing.as_fd()]
    }

    /// Takes all news, without waiting. Returns whether any of it may concern the rules.
    ///
    /// # Errors
    /// If the kernel refuses it.
    pub fn drain(&self) -> io::Result<bool> {
        let of_table = drain(&self.nftables, concerns_table)?;
        let of_routing = drain(&self.routing, |_| true)?;
        Ok(of_table || of_routing)
    }
}

impl Reports {
    /// Begins to listen in the calling thread's namespace.
    ///
    /// # Errors
    /// If the kernel does not allow it: it tells one listener only, which may be another agent.
    pub fn start() -> Result<Self> {
        let operation = "listening for connections that cannot be captured";
        Ok(Self(Log::listen(REPORT_GROUP, REPORTED).context(operation)?))
    }

    /// The socket, which becomes readable when there is something to [`take`](Self::take).
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.0.socket()
    }

    /// Takes all reports of captured connections that cannot be led to the agent, without waiting: their two ends,
    /// the workload's first.
    ///
    /// # Errors
    /// If the kernel refuses it.
    pub fn take(&self) -> io::Result<Vec<(SocketAddr, SocketAddr)>> {
        let mut all = Vec::new();
        loop {
            let (found, none_left) =
                self.0.take(|packet| log::ends(packet).map(|(from, to, _)| (from, to)))?;
            all.extend(found);
            // Whoever makes very many of them is told of for some.
            if none_left || all.len() > REPORTS {
                return Ok(all);
            }
        }
    }
}

fn listen(protocol: SockProtocol, groups: &[u32]) -> io::Result<OwnedFd> {
    let found = log::listen(protocol)?;
    groups.iter().try_for_each(|group| sys::join_netlink_group(&found, *group))?;
    Ok(found)
}

/// Whether one of a datagram's messages names our table, or tells of another program's address translation.
fn concerns_table(datagram: &[u8]) -> bool {
    const HEADERS: usize = 20;
    let name = TABLE.to_bytes_with_nul();
    messages(datagram).any(|message| {
        let generation = message.get(4) == Some(&NEW_GENERATION);
        let body = message.get(HEADERS..).unwrap_or_default();
        let translates = message.get(4) == Some(&NEW_CHAIN)
            && utils::find_attr(body, CHAIN_TYPE).is_some_and(|kind| kind == b"nat\0");
        !generation && (translates || body.windows(name.len()).any(|part| part == name))
    })
}
