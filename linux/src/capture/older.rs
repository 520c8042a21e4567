//! Connections that are older than the rules: they go on as they are.
//!
//! The kernel keeps them, in two sets of the table, and tells which they are: it lists its sockets. So an
//! agent that starts anew knows them, and nothing that was opened while the rules were missing is taken for
//! one of them.

use std::{
    collections::{BTreeSet, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use super::{OLDER_V4, OLDER_V6, ProcessMatch, Unroutable, drift, transaction};
use crate::{
    error::Result,
    links::{Family, addresses},
    sockets::{
        Rest, TcpSocket, direct, other_ends, tcp_sockets, tcp_sockets_with_rest, uncaptured,
    },
};

/// The processes of a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Process {
    /// Of the workload.
    pub(super) name: String,
    pub(super) process: ProcessMatch,
    pub(super) service_ports: BTreeSet<u16>,
    pub(super) unroutable: Unroutable,
}

/// Whose connections are captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// All of the namespace.
    Namespace(Unroutable),
    /// Those of these processes, and those of these ports.
    Host {
        /// Of workloads whose processes the kernel can tell. One that is of several belongs to the first of them.
        processes: Vec<Process>,
        /// All workloads, also those whose processes the kernel cannot tell yet.
        declared: BTreeSet<String>,
        service_ports: BTreeSet<u16>,
        /// Those of them to which connections may pass without the agent.
        passing_ports: BTreeSet<u16>,
    },
}

impl Scope {
    /// Whether there is nothing to capture.
    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::Namespace(_) => false,
            Self::Host { processes, service_ports, .. } => {
                processes.is_empty() && service_ports.is_empty()
            }
        }
    }

    /// What this one has and another one had not. The processes of a workload that was there before have nothing that
    /// is older: their cgroup was made anew, or their user has just been made.
    pub(super) fn beyond(&self, before: &Self) -> Self {
        let (before_declared, before_ports) = match before {
            Self::Namespace(_) => return Self::none(),
            Self::Host { declared, service_ports, .. } => (declared, service_ports),
        };
        match self {
            Self::Namespace(_) => Self::none(),
            Self::Host { processes, declared, service_ports, passing_ports } => Self::Host {
                processes: processes
                    .iter()
                    .filter(|process| !before_declared.contains(&process.name))
                    .cloned()
                    .collect(),
                declared: declared.clone(),
                service_ports: service_ports.difference(before_ports).copied().collect(),
                passing_ports: passing_ports.clone(),
            },
        }
    }

    fn none() -> Self {
        Self::Host {
            processes: Vec::new(),
            declared: BTreeSet::new(),
            service_ports: BTreeSet::new(),
            passing_ports: BTreeSet::new(),
        }
    }

    /// Whether a connection that went around the agent may go on.
    pub(super) fn lets_pass(&self, socket: &TcpSocket) -> Result<bool> {
        match self {
            Self::Namespace(unroutable) => Ok(*unroutable == Unroutable::Pass),
            Self::Host { processes, service_ports, passing_ports, .. } => {
                let port = socket.local.port();
                if service_ports.contains(&port) {
                    return Ok(passing_ports.contains(&port));
                }
                for one in processes {
                    if one.process.made(socket)? {
                        return Ok(one.unroutable == Unroutable::Pass);
                    }
                }
                Ok(false)
            }
        }
    }

    /// Whether a connection is one of these.
    fn covers(&self, socket: &TcpSocket, cgroups: &HashSet<u64>) -> bool {
        match self {
            Self::Namespace(_) => true,
            Self::Host { processes, service_ports, .. } => {
                service_ports.contains(&socket.local.port())
                    || socket.cgroup.is_some_and(|cgroup| cgroups.contains(&cgroup))
                    || processes.iter().any(|one| one.process == ProcessMatch::User(socket.user))
            }
        }
    }

    /// Whether a connection between two programs here should go through the agent: it is to a served port, and the caller
    /// is not what serves it.
    fn covers_direct(&self, served: &TcpSocket, caller: &TcpSocket) -> Result<bool> {
        let Self::Host { processes, service_ports, .. } = self else { return Ok(false) };
        let port = served.local.port();
        if !service_ports.contains(&port) {
            return Ok(false);
        }
        for one in processes {
            if one.process.made(caller)? {
                return Ok(!one.service_ports.contains(&port));
            }
        }
        Ok(true)
    }

    /// The kernel's numbers of the cgroups that count, with those below them.
    fn cgroups(&self) -> Result<HashSet<u64>> {
        let mut found = HashSet::new();
        if let Self::Host { processes, .. } = self {
            for one in processes {
                one.process.cgroups_below(&mut found)?;
            }
        }
        Ok(found)
    }
}

/// The two ends of a connection, as its workload sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Connection {
    /// The workload's end.
    pub local: SocketAddr,
    /// The other one.
    pub remote: SocketAddr,
}

impl Connection {
    /// That of this socket.
    pub fn of(socket: &TcpSocket) -> Self {
        Self { local: socket.local, remote: socket.remote }
    }

    /// As the sets have it: both ends, each part padded to 4 bytes.
    fn key(&self) -> (Family, Vec<u8>) {
        let mut key = Vec::new();
        for end in [self.local, self.remote] {
            match end.ip() {
                IpAddr::V4(address) => key.extend(address.octets()),
                IpAddr::V6(address) => key.extend(address.octets()),
            }
            key.extend(end.port().to_be_bytes());
            key.extend([0; 2]);
        }
        (Family::of(self.remote.ip()), key)
    }

    fn from_key(key: &[u8]) -> Option<Self> {
        let (local, remote) = key.split_at_checked(key.len() / 2)?;
        let end = |part: &[u8]| {
            let (address, port) = part.split_at_checked(part.len().checked_sub(4)?)?;
            let address = match address.len() {
                4 => IpAddr::V4(Ipv4Addr::from(*address.first_chunk::<4>()?)),
                _ => IpAddr::V6(Ipv6Addr::from(*address.first_chunk::<16>()?)),
            };
            Some(SocketAddr::new(address, u16::from_be_bytes(*port.first_chunk()?)))
        };
        Some(Self { local: end(local)?, remote: end(remote)? })
    }
}

/// The connections in the calling thread's namespace that are known to be older than the rules.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn older() -> Result<Vec<Connection>> {
    Ok(in_force()?.unwrap_or_default())
}

/// The same; nothing if the rules are not in place.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn in_force() -> Result<Option<Vec<Connection>>> {
    let mut found = Vec::new();
    for set in [OLDER_V4, OLDER_V6] {
        let Some(keys) = drift::elements(set)? else { return Ok(None) };
        found.extend(keys.iter().filter_map(|key| Connection::from_key(key)));
    }
    Ok(Some(found))
}

/// Those of them that are closed by now, or over but for what may be late.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn closed() -> Result<HashSet<Connection>> {
    // Before the sockets: what is noted meanwhile has one.
    let noted = older()?;
    let sockets = tcp_sockets()?;
    let open = sockets.iter().filter(|socket| !socket.is_over());
    let open: HashSet<_> = open.map(Connection::of).collect();
    Ok(noted.into_iter().filter(|one| !open.contains(one)).collect())
}

/// One of them that is open.
#[derive(Clone, Debug)]
pub struct OpenOlder {
    /// The workload's end.
    pub socket: TcpSocket,
    /// Whether a program listens on its port: it was accepted, and not opened from here.
    pub incoming: bool,
    /// How long nothing has passed; none if bytes wait, or it is not known.
    pub rest: Option<Rest>,
}

impl OpenOlder {
    /// For how long nobody has waited for an answer on it: the last bytes were the server's. Nothing if somebody does.
    pub fn idle(&self) -> Option<Duration> {
        let Rest { sent, received } = self.rest?;
        let (answered, asked) = if self.incoming { (sent, received) } else { (received, sent) };
        // The kernel's clock for them is coarse: where both are alike, somebody may be waiting.
        (answered < asked).then_some(answered)
    }
}

/// Those of them that are open, and have an application; nothing if the rules are not in place, which alone know of them.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn open_older() -> Result<Option<Vec<OpenOlder>>> {
    let Some(noted) = in_force()? else { return Ok(None) };
    let noted: HashSet<Connection> = noted.into_iter().collect();
    if noted.is_empty() {
        return Ok(Some(Vec::new()));
    }
    let own: HashSet<IpAddr> = addresses()?.into_iter().map(|address| address.ip).collect();
    let with_rest = tcp_sockets_with_rest()?;
    let sockets: Vec<_> = with_rest.iter().map(|(socket, _)| socket.clone()).collect();
    // A new connection through the agent may have the ends of one that is over.
    let carried = other_ends(&sockets, &own);
    let served: HashSet<u16> = sockets
        .iter()
        .filter(|socket| socket.listens())
        .map(|socket| socket.local.port())
        .collect();
    let open = with_rest
        .into_iter()
        .filter(|(socket, _)| {
            socket.is_in_use()
                && !socket.listens()
                && !socket.is_agents()
                && !carried.contains(&(socket.local, socket.remote))
                && noted.contains(&Connection::of(socket))
        })
        .map(|(socket, rest)| {
            let incoming = served.contains(&socket.local.port());
            OpenOlder { socket, incoming, rest }
        });
    Ok(Some(open.collect()))
}

/// Has the rules forget them.
///
/// # Errors
/// If the kernel refuses that.
pub fn forget(connections: &HashSet<Connection>) -> Result<()> {
    let all: Vec<_> = connections.iter().copied().collect();
    for (set, keys) in by_set(&all) {
        transaction::remove_connections(set, &keys)?;
    }
    Ok(())
}

/// The connections that are open and not captured, of those that the rules are to capture.
pub(super) fn open_uncaptured(scope: &Scope) -> Result<Vec<TcpSocket>> {
    if scope.is_empty() {
        return Ok(Vec::new());
    }
    let cgroups = scope.cgroups()?;
    let own: HashSet<IpAddr> = addresses()?.into_iter().map(|address| address.ip).collect();
    let sockets = tcp_sockets()?;
    let mut found: Vec<_> = uncaptured(&sockets, &own)
        .into_iter()
        .filter(|socket| scope.covers(socket, &cgroups))
        .cloned()
        .collect();
    for (served, caller) in direct(&sockets) {
        if scope.covers_direct(served, caller)? {
            found.push(served.clone());
        }
    }
    Ok(found)
}

/// Those that have been opened, rather than being about to be, and are the same in another listing. A listing is not made
/// in one moment: the agent may have opened both ends of a connection of its own since it was at the first one.
pub(super) fn agreed(sockets: &[TcpSocket], again: &[TcpSocket]) -> Vec<Connection> {
    let opened = |socket: &&TcpSocket| !socket.is_opening();
    let again: HashSet<Connection> = again.iter().filter(opened).map(Connection::of).collect();
    let both = sockets.iter().filter(opened).map(Connection::of);
    both.filter(|one| again.contains(one)).collect()
}

/// Those that wait for the answer to their first packet.
pub(super) fn opening(sockets: &[TcpSocket]) -> Vec<Connection> {
    sockets.iter().filter(|socket| socket.is_opening()).map(Connection::of).collect()
}

/// Their keys, by the sets that they belong into.
pub(super) fn by_set(connections: &[Connection]) -> [(&'static str, Vec<Vec<u8>>); 2] {
    [(Family::V4, OLDER_V4), (Family::V6, OLDER_V6)].map(|(family, set)| {
        let keys = connections.iter().map(Connection::key);
        (set, keys.filter(|(of, _)| *of == family).map(|(_, key)| key).collect())
    })
}

/// Tells the rules of them.
pub(super) fn spare(connections: &[Connection]) -> Result<()> {
    for (set, keys) in by_set(connections) {
        transaction::add_connections(set, &keys)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sockets::tests::socket;

    #[test]
    fn only_what_two_listings_agree_on_is_older() {
        let remote = SocketAddr::from(([10, 0, 0, 1], 80));
        let at = |port: u16, is_opening| {
            socket(SocketAddr::from(([10, 0, 0, 2], port)), remote, is_opening)
        };
        let ports = |found: Vec<Connection>| -> Vec<u16> {
            found.iter().map(|one| one.local.port()).collect()
        };
        // The agent was between both ends of its own at the first listing; the second one knows better.
        let first = [at(1, false), at(2, false), at(3, true), at(4, false)];
        let second = [at(1, false), at(3, false), at(4, true), at(5, false)];
        assert_eq!(ports(agreed(&first, &second)), [1]);
        assert_eq!(ports(opening(&first)), [3]);
    }
}
