//! The TCP sockets of the calling thread's network namespace, and their end: `sock_diag(7)`.
//!
//! The kernel's own list tells which connections are captured, which are older than the capture rules, and
//! which were opened while the rules were missing. Nothing here depends on connection tracking or on
//! what this process remembers.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use netlink_bindings::{
    inet_diag::{IterableReplyAttrs, Msg, OpTcpDiagDump, ReqV2, Request, Sockid},
    traits::{NetlinkRequest, Protocol},
};
use netlink_socket2::NetlinkSocket;
use nix::libc;

use crate::{
    capture::{MARK, MARK_PUBLISHED, MARK_TRANSPARENT, MARK_UNCAPTURED},
    error::{Context, Result, accept},
    links::Family,
};

/// `TCP_*` of `include/net/tcp_states.h`.
const ESTABLISHED: u8 = 1;
const SYN_SENT: u8 = 2;
const TIME_WAIT: u8 = 6;
const CLOSE: u8 = 7;
const CLOSE_WAIT: u8 = 8;
const LISTEN: u8 = 10;
const NEW_SYN_RECV: u8 = 12;

/// Bit 0 of the extensions is number 1, `INET_DIAG_MEMINFO`; this is `INET_DIAG_INFO`.
const EXTENSION_INFO: u8 = 1 << 1;

/// `SOCK_DESTROY` and `NETLINK_SOCK_DIAG` of `linux/sock_diag.h` and `linux/netlink.h`.
const SOCK_DESTROY: u16 = 21;
const NETLINK_SOCK_DIAG: u16 = 4;

/// A TCP socket that is, or is about to be, one end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpSocket {
    /// Its own end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// Whose it is.
    pub user: u32,
    /// The cgroup it was made in, by the kernel's number; none if the kernel has no cgroups for sockets.
    pub cgroup: Option<u64>,
    /// `SO_MARK`. Zero, too, if the caller may not see it.
    mark: u32,
    /// Whether a program has it open: it has accepted it, and has not closed it.
    held: bool,
    state: u8,
    header: Sockid,
    family: Family,
}

impl TcpSocket {
    /// Whether the agent made it, or accepted it.
    pub fn is_agents(&self) -> bool {
        [MARK, MARK_PUBLISHED, MARK_TRANSPARENT].contains(&self.mark)
    }

    /// Whether this is the very same socket, in another listing.
    pub fn is_same_as(&self, other: &Self) -> bool {
        self.header == other.header
    }

    /// Whether it waits out the end of its connection, with no application behind it any more. The kernel does not
    /// tell such a socket's mark.
    pub fn is_over(&self) -> bool {
        self.state == TIME_WAIT
    }

    /// Whether an application has it open, or is about to accept it: the kernel does not merely see it to its end.
    pub fn is_in_use(&self) -> bool {
        self.held || [ESTABLISHED, CLOSE_WAIT].contains(&self.state)
    }

    /// Whether it only listens.
    pub fn listens(&self) -> bool {
        self.state == LISTEN
    }

    /// Whether it is waiting for the answer to its first packet.
    pub fn is_opening(&self) -> bool {
        self.state == SYN_SENT
    }
}

/// All TCP sockets, of both families.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn tcp_sockets() -> Result<Vec<TcpSocket>> {
    let all = list(0, |_, _| ())?;
    Ok(all.into_iter().map(|(socket, ())| socket).collect())
}

/// All TCP sockets with what else is told of each, for which these extensions are asked.
fn list<T>(
    extensions: u8,
    more: impl Fn(&Msg, &IterableReplyAttrs<'_>) -> T,
) -> Result<Vec<(TcpSocket, T)>> {
    let mut found = Vec::new();
    for family in Family::ALL {
        let operation = || format!("listing the {family:?} TCP sockets");
        let header = ReqV2 {
            family: family.number(),
            protocol: 6,
            ext: extensions,
            // Those that are half open are listed as SYN_RECV, whatever the other state is called.
            states: !((1 << CLOSE) | (1 << NEW_SYN_RECV)),
            ..Default::default()
        };
        let request = Request::new().op_tcp_diag_dump(&header);
        let mut socket = NetlinkSocket::new();
        let mut reply = socket.request(&request).context(operation())?;
        while let Some(answer) = reply.recv() {
            match answer {
                Ok((message, attributes)) => found.extend(
                    read(family, &message, &attributes)
                        .map(|socket| (socket, more(&message, &attributes))),
                ),
                // A kernel without IPv6 has no such sockets.
                Err(error) if error.as_io_error().raw_os_error() == Some(libc::ENOENT) => break,
                Err(error) => return Err(error).context(operation()),
            }
        }
    }
    Ok(found)
}

/// How long ago bytes passed on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rest {
    /// Since the last was sent from this end.
    pub sent: Duration,
    /// Since the last came in.
    pub received: Duration,
}

/// The same, each with how long it has rested; nothing where the kernel does not tell, or bytes wait in a queue.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn tcp_sockets_with_rest() -> Result<Vec<(TcpSocket, Option<Rest>)>> {
    list(EXTENSION_INFO, |message, attributes| {
        let info = attributes.get_tcp_info().ok()?;
        let waits = message.rqueue > 0 || message.wqueue > 0;
        let ago = |millis: u32| Duration::from_millis(millis.into());
        let rest = Rest { sent: ago(info.last_data_sent), received: ago(info.last_data_recv) };
        (!waits).then_some(rest)
    })
}

/// The TCP sockets that listen.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn tcp_listeners() -> Result<Vec<TcpSocket>> {
    Ok(tcp_sockets()?.into_iter().filter(TcpSocket::listens).collect())
}

fn read(family: Family, message: &Msg, attributes: &IterableReplyAttrs<'_>) -> Option<TcpSocket> {
    let ports = (u16::from_be(message.sockid._sport_be), u16::from_be(message.sockid._dport_be));
    Some(TcpSocket {
        local: SocketAddr::new(address(family, &message.sockid.src)?, ports.0),
        remote: SocketAddr::new(address(family, &message.sockid.dst)?, ports.1),
        user: message.uid,
        cgroup: attributes.get_cgroup_id().ok(),
        mark: attributes.get_mark().unwrap_or(0),
        held: message.inode != 0,
        state: message.state,
        header: message.sockid.clone(),
        family,
    })
}

fn address(family: Family, bytes: &[u8; 16]) -> Option<IpAddr> {
    Some(match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::from(bytes.first_chunk::<4>().copied()?)),
        // An IPv6 socket may have an IPv4 connection.
        Family::V6 => Ipv6Addr::from(*bytes).to_canonical(),
    })
}

/// The applications' connections to other hosts among these sockets that do not go through the agent: neither
/// end is a socket of the agent's, and the other end is no address of this namespace.
pub fn uncaptured<'a>(
    sockets: &'a [TcpSocket],
    own_addresses: &'a HashSet<IpAddr>,
) -> Vec<&'a TcpSocket> {
    let agents = other_ends(sockets, own_addresses);
    connections(sockets, own_addresses)
        .filter(|socket| !agents.contains(&(socket.local, socket.remote)))
        .collect()
}

/// The connections that have a socket of the agent's at their other end, as the application sees them. What has
/// another host's address as its own is one of these, too: nobody else's socket has. The kernel does not tell the
/// mark of all of them.
pub fn other_ends(
    sockets: &[TcpSocket],
    own_addresses: &HashSet<IpAddr>,
) -> HashSet<(SocketAddr, SocketAddr)> {
    let elsewhere = |address: IpAddr| {
        !address.is_loopback() && !address.is_unspecified() && !own_addresses.contains(&address)
    };
    sockets
        .iter()
        .filter(|socket| !socket.listens())
        .filter(|socket| socket.is_agents() || elsewhere(socket.local.ip()))
        .map(|socket| (socket.remote, socket.local))
        .collect()
}

/// The applications' connections to other hosts, whether captured or not.
pub fn connections<'a>(
    sockets: &'a [TcpSocket],
    own_addresses: &'a HashSet<IpAddr>,
) -> impl Iterator<Item = &'a TcpSocket> {
    sockets.iter().filter(|socket| {
        let remote = socket.remote.ip();
        !socket.is_agents()
            // Accepted on a host's port that nobody declared: no business of the mesh.
            && socket.mark != MARK_UNCAPTURED
            && !socket.is_over()
            && !socket.listens()
            && !remote.is_unspecified()
            && !remote.is_loopback()
            && !own_addresses.contains(&remote)
    })
}

/// The connections between two programs of this namespace of which neither is the agent: one end, and the end of a program
/// that has it open. Left out is what the kernel sees to its end for a program that has closed it: it does not tell the
/// mark of all of these.
pub fn direct(sockets: &[TcpSocket]) -> Vec<(&TcpSocket, &TcpSocket)> {
    let applications = || sockets.iter().filter(|socket| !socket.listens() && !socket.is_agents());
    let open: HashMap<_, _> = applications()
        .filter(|socket| socket.held)
        .map(|socket| ((socket.local, socket.remote), socket))
        .collect();
    applications()
        // Nobody has accepted some of them yet.
        .filter(|socket| socket.is_in_use())
        .filter_map(|socket| Some((socket, *open.get(&(socket.remote, socket.local))?)))
        .collect()
}

/// Ends a connection at once: its application sees a reset, and nothing of it is sent any more.
///
/// # Errors
/// If the kernel cannot do that (`CONFIG_INET_DIAG_DESTROY`). One that is gone already is no error.
pub fn destroy(socket: &TcpSocket) -> Result<()> {
    let operation = || format!("ending the connection {} to {}", socket.local, socket.remote);
    let request = Destroy::new(socket);
    let mut netlink = NetlinkSocket::new();
    let mut reply = netlink.request(&request).context(operation())?;
    accept(reply.recv_ack().context(operation()), &[libc::ENOENT])
}

/// A request that the bindings have no type for.
struct Destroy(Vec<u8>);

impl Destroy {
    fn new(socket: &TcpSocket) -> Self {
        let header = ReqV2 {
            family: socket.family.number(),
            protocol: 6,
            states: u32::MAX,
            sockid: socket.header.clone(),
            ..Default::default()
        };
        let mut payload = Vec::new();
        drop(OpTcpDiagDump::encode_request(&mut payload, &header));
        Self(payload)
    }
}

impl NetlinkRequest for Destroy {
    type ReplyType<'buf> = ();

    fn protocol(&self) -> Protocol {
        Protocol::Raw { protonum: NETLINK_SOCK_DIAG, request_type: SOCK_DESTROY }
    }

    fn flags(&self) -> u16 {
        // What every request has is added on its way.
        0
    }

    fn payload(&self) -> &[u8] {
        &self.0
    }

    fn decode_reply(_: &[u8]) -> Self::ReplyType<'_> {}
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// One in this state, `SYN_SENT` if it is opening.
    pub(crate) fn socket(local: SocketAddr, remote: SocketAddr, is_opening: bool) -> TcpSocket {
        TcpSocket {
            local,
            remote,
            user: 0,
            cgroup: None,
            mark: 0,
            held: true,
            state: if is_opening { SYN_SENT } else { ESTABLISHED },
            header: Sockid::default(),
            family: Family::of(local.ip()),
        }
    }
}
