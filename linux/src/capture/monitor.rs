//! News from the kernel that the rules may have been altered: of nftables, and of rules, routes, addresses and
//! interfaces. And reports of captured connections that cannot be led to the agent.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use netlink_bindings::utils;
use nix::{
    errno::Errno,
    libc,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
        socket,
    },
};

use super::{REPORT_GROUP, route_news, transaction::TABLE};
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

/// Of `linux/netfilter/nfnetlink_log.h`.
const LOG_CONFIGURE: u16 = 4 << 8 | 1;
const LOG_COMMAND: u16 = 1;
const LOG_MODE: u16 = 2;
const LOG_THRESHOLD: u16 = 5;
const BIND: u8 = 1;
const COPY_PACKET: u8 = 2;
const LOG_PAYLOAD: u16 = 9;

/// Bytes of a packet that are reported: the headers.
const REPORTED: u32 = 128;

/// Listens in the namespace of the thread that made it. Any thread may read it.
#[derive(Debug)]
pub struct Monitor {
    nftables: OwnedFd,
    routing: OwnedFd,
}

/// The reports of captured connections that cannot be led to the agent.
#[derive(Debug)]
pub struct Reports(OwnedFd);

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
        let reports = listen(SockProtocol::NetlinkNetFilter, &[]).context(operation)?;
        for attributes in [
            attribute(LOG_COMMAND, &[BIND]),
            [
                attribute(
                    LOG_MODE,
                    &[REPORTED.to_be_bytes().as_slice(), &[COPY_PACKET, 0]].concat(),
                ),
                // Each at once.
                attribute(LOG_THRESHOLD, &1u32.to_be_bytes()),
            ]
            .concat(),
        ] {
            configure_reports(&reports, &attributes).context(operation)?;
        }
        Ok(Self(reports))
    }

    /// The socket, which becomes readable when there is something to [`take`](Self::take).
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Takes all reports of captured connections that cannot be led to the agent, without waiting: their two ends,
    /// the workload's first.
    ///
    /// # Errors
    /// If the kernel refuses it.
    pub fn take(&self) -> io::Result<Vec<(SocketAddr, SocketAddr)>> {
        let mut found = Vec::new();
        drain(&self.0, |datagram| {
            found.extend(messages(datagram).filter_map(reported));
            true
        })?;
        Ok(found)
    }
}

fn listen(protocol: SockProtocol, groups: &[u32]) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let found = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
    bind(found.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    groups.iter().try_for_each(|group| sys::join_netlink_group(&found, *group))?;
    Ok(found)
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    utils::push_header(&mut bytes, kind, u16::try_from(value.len()).unwrap_or(u16::MAX));
    bytes.extend(value);
    utils::align(&mut bytes);
    bytes
}

/// Sends a setting of the reports' group, and waits for the kernel's word on it.
fn configure_reports(to: &OwnedFd, attributes: &[u8]) -> io::Result<()> {
    const HEADER: usize = 20;
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK;
    let length = u32::try_from(HEADER + attributes.len()).map_err(io::Error::other)?;
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(LOG_CONFIGURE.to_ne_bytes());
    message.extend(u16::try_from(flags).map_err(io::Error::other)?.to_ne_bytes());
    message.extend([0; 8]);
    message.extend([0, 0]);
    message.extend(REPORT_GROUP.to_be_bytes());
    message.extend(attributes);
    send(to.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut answer = [0; 256];
    // The kernel answers before `send` returns.
    let length = recv(to.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
    let code = answer.get(16..length.min(20)).and_then(|bytes| bytes.first_chunk().copied());
    match code.map(i32::from_ne_bytes) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(-code)),
        None => Err(io::Error::from(io::ErrorKind::InvalidData)),
    }
}

/// The ends of the connection that a reported packet opens.
fn reported(message: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let attributes = message.get(20..)?;
    let packet = utils::find_attr(attributes, LOG_PAYLOAD)?;
    let (source, destination, transport): (IpAddr, IpAddr, &[u8]) = match packet.first()? >> 4 {
        4 => {
            let header = usize::from(packet.first()? & 0xf) * 4;
            let address = |at: usize| Some(Ipv4Addr::from(*packet.get(at..)?.first_chunk::<4>()?));
            (address(12)?.into(), address(16)?.into(), packet.get(header..)?)
        }
        // The first packet of a connection has no extension headers.
        6 => {
            let address = |at: usize| Some(Ipv6Addr::from(*packet.get(at..)?.first_chunk::<16>()?));
            (address(8)?.into(), address(24)?.into(), packet.get(40..)?)
        }
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes(*transport.get(at..)?.first_chunk()?));
    Some((SocketAddr::new(source, port(0)?), SocketAddr::new(destination, port(2)?)))
}

fn drain(from: &OwnedFd, mut concerns: impl FnMut(&[u8]) -> bool) -> io::Result<bool> {
    let mut buffer = [0; 16 * 1024];
    let mut found = false;
    loop {
        match recv(from.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(length) => found |= concerns(buffer.get(..length).unwrap_or_default()),
            Err(Errno::EAGAIN) => return Ok(found),
            // More than there was room for: something of it may have been ours.
            Err(Errno::ENOBUFS) => found = true,
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether one of a datagram's messages names our table.
fn concerns_table(datagram: &[u8]) -> bool {
    const HEADERS: usize = 20;
    let name = TABLE.to_bytes_with_nul();
    messages(datagram).any(|message| {
        let generation = message.get(4) == Some(&NEW_GENERATION);
        let body = message.get(HEADERS..).unwrap_or_default();
        !generation && body.windows(name.len()).any(|part| part == name)
    })
}
