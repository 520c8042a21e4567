//! The agent's listeners for captured connections, and accept loops: a place for each connection, a task for
//! each, and patience when the system has no more descriptors.
//!
//! The listeners are on loopback, at ports of the agent's choice: the capture rules lead connections there
//! whatever they were for, so that no other program's port stands in the way.

use std::{
    collections::BTreeSet,
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use hauberk_linux::{
    capture::{Hold, REPORT_GROUP},
    links::ipv6_is_enabled,
    socket::{Peer, listen_captured},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinHandle,
};

use crate::{
    context::{Context, canonical},
    handover::{Inherited, Role, Seat},
    lanes::Lane,
};

/// The pause after a failed accept, so that being out of descriptors does not spin.
pub(super) const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// Connections of one listener at once; over it the kernel's queue holds them back. Each listener has
/// its own, so that a flood of incoming ones leaves the outgoing ones alone. More than there are unfinished handshakes, idle
/// sessions and streams, which callers share.
pub(super) const MAX_CONNECTIONS: usize = 40_960;

/// The ports that the agent chooses from: below those that the kernel gives to outgoing connections, so that none of
/// these is in the way.
const PORTS: std::ops::Range<u16> = 15_100..16_000;

/// How often the kernel is asked for a port when all of these are taken.
const KERNELS_CHOICES: usize = 8;

/// How many groups are tried.
const HOLDS: usize = 4;

/// A listener and its task, which ends with its owner.
pub(super) struct Accepting {
    seat: Seat,
    listener: Arc<TcpListener>,
    task: JoinHandle<()>,
}

impl Accepting {
    /// The listener for another process.
    pub(super) fn share(&self) -> io::Result<(Seat, OwnedFd)> {
        share(&self.seat, &*self.listener)
    }
}

/// A socket for another process.
pub(super) fn share(seat: &Seat, socket: &impl AsFd) -> io::Result<(Seat, OwnedFd)> {
    Ok((seat.clone(), socket.as_fd().try_clone_to_owned()?))
}

impl Drop for Accepting {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A listener that nobody accepts from yet.
pub(super) struct Bound {
    pub(super) seat: Seat,
    pub(super) listener: std::net::TcpListener,
}

/// Listeners of both families at one port.
pub(super) struct Pair {
    pub(super) port: u16,
    pub(super) listeners: Vec<Bound>,
}

/// What it takes to serve what a workload sends.
pub(super) struct OutboundSockets {
    /// The rules name its port. Nothing arrives there, but where nobody listens, connections are refused.
    pub(super) listeners: Pair,
    /// What is held arrives here when it is let go.
    pub(super) arrivals: Pair,
    pub(super) hold: Hold,
    /// The seat of what is held.
    pub(super) seat: Seat,
}

/// The sockets that were handed over for this workload, or new ones in the calling thread's network namespace, at
/// ports that are none of `avoid` and that nobody has.
///
/// # Errors
/// If there are none.
pub(super) fn bind_outbound(
    inherited: &Inherited,
    namespace: Option<u64>,
    key: Option<&str>,
    avoid: &BTreeSet<u16>,
) -> anyhow::Result<OutboundSockets> {
    let (role, held) = (Role::Outbound(key.map(str::to_owned)), Role::Held(key.map(str::to_owned)));
    let seat = Seat { namespace, role: held, v6: false };
    let arrivals = bind(&Inherited::default(), namespace, &Role::Arrivals, avoid)?;
    let mut avoid = avoid.clone();
    avoid.extend([REPORT_GROUP, arrivals.port]);
    if let Some(socket) = inherited.claim_socket(&seat) {
        let listeners = bind(inherited, namespace, &role, &avoid)?;
        let hold = Hold::inherit(socket, arrivals.port).context("hold what the workload opens")?;
        return Ok(OutboundSockets { listeners, arrivals, hold, seat });
    }
    for _ in 0..HOLDS {
        let listeners = bind(&Inherited::default(), namespace, &role, &avoid)?;
        match Hold::start(listeners.port, arrivals.port) {
            Ok(hold) => return Ok(OutboundSockets { listeners, arrivals, hold, seat }),
            // Another program may have the group of this number.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                avoid.insert(listeners.port);
            }
            Err(error) => return Err(error).context("hold what the workload opens"),
        }
    }
    anyhow::bail!(
        "the kernel does not tell of what the workload opens (nfnetlink_log): the agent needs CAP_NET_ADMIN and \
         CAP_NET_RAW, and a group of a number from {} to {} that no other program listens to",
        PORTS.start,
        PORTS.end - 1
    )
}

/// The listeners that were handed over for this role, or new ones in the calling thread's network namespace, at
/// a port that is none of `avoid` and that nobody has.
///
/// # Errors
/// If there is none.
pub(super) fn bind(
    inherited: &Inherited,
    namespace: Option<u64>,
    role: &Role,
    avoid: &BTreeSet<u16>,
) -> anyhow::Result<Pair> {
    let seat = |v6: bool| Seat { namespace, role: role.clone(), v6 };
    let families: &[bool] = if ipv6_is_enabled() { &[false, true] } else { &[false] };
    let mut listeners = Vec::new();
    for v6 in families {
        if let Some(listener) = inherited.claim(&seat(*v6)) {
            listeners.push(Bound { seat: seat(*v6), listener });
        }
    }
    if let Some(first) = listeners.first() {
        let port = first.listener.local_addr().context("an inherited listener's port")?.port();
        // IPv6 may have come meanwhile.
        for v6 in families
            .iter()
            .filter(|v6| listeners.iter().all(|l| l.seat.v6 != **v6))
            .copied()
            .collect::<Vec<_>>()
        {
            let listener =
                listen(v6, port, role).with_context(|| format!("listen on port {port}"))?;
            listeners.push(Bound { seat: seat(v6), listener });
        }
        return Ok(Pair { port, listeners });
    }
    let listen_on = |port: u16| -> io::Result<Pair> {
        let mut listeners: Vec<Bound> = Vec::new();
        let mut port = port;
        for v6 in families {
            let listener = listen(*v6, port, role)?;
            port = listener.local_addr()?.port();
            listeners.push(Bound { seat: seat(*v6), listener });
        }
        Ok(Pair { port, listeners })
    };
    let is_free = |port: u16| !avoid.contains(&port) && port != crate::context::MESH_PORT;
    let count = u32::from(PORTS.end - PORTS.start);
    let first = getrandom::u32().unwrap_or(0) % count;
    let of_range = (0..count)
        .map(|step| PORTS.start + u16::try_from((first + step) % count).unwrap_or(0))
        .filter(|port| is_free(*port));
    // Somebody may have taken the whole range: then any port that the kernel gives.
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for port in of_range.chain([0; KERNELS_CHOICES]) {
        match listen_on(port) {
            Ok(pair) if is_free(pair.port) => return Ok(pair),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = error,
            Err(error) => return Err(error).with_context(|| format!("listen on port {port}")),
        }
    }
    Err(last).with_context(|| {
        format!("listen on any of the ports {} to {}, or any other", PORTS.start, PORTS.end - 1)
    })
}

fn listen(v6: bool, port: u16, role: &Role) -> io::Result<std::net::TcpListener> {
    let address: IpAddr = if v6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
    let peer = match role {
        Role::Outbound(_) | Role::Held(_) | Role::Arrivals => Peer::Application,
        Role::Plaintext | Role::Mesh => Peer::Network,
    };
    listen_captured(SocketAddr::new(address, port), peer)
}

/// A connection that was accepted.
pub(crate) struct CapturedConnection {
    pub(crate) stream: TcpStream,
    pub(crate) from: SocketAddr,
    /// Where it was going; nothing if it was dialled to the listener itself, where no capture rule led it.
    pub(crate) wanted: Option<SocketAddr>,
}

/// Serves every connection of a listener in a task of its own; the listener is at `home`.
pub(super) fn accept<F>(
    context: &Arc<Context>,
    home: Lane,
    bound: Bound,
    serve: impl Fn(Arc<Context>, CapturedConnection) -> F + Send + 'static,
) -> anyhow::Result<Accepting>
where
    F: Future<Output = ()> + Send + 'static,
{
    let Bound { seat, listener } = bound;
    let own = listener.local_addr().context("a listener's address")?;
    let _at_home = context.lanes.enter(home)?;
    let listener = Arc::new(TcpListener::from_std(listener).context("register a listener")?);
    let (context, accepting) = (context.clone(), listener.clone());
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let task = tokio::spawn(async move {
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            let accepted = tokio::select! {
                () = context.stopping.cancelled() => return,
                accepted = accepting.accept() => accepted,
            };
            let chosen = context.lanes.spread();
            let brought = accepted.and_then(|(stream, from)| Ok((chosen.bring(stream)?, from)));
            match brought {
                Ok((stream, from)) => {
                    let wanted = stream.local_addr().ok().filter(|address| *address != own);
                    let captured = CapturedConnection {
                        stream,
                        from: canonical(from),
                        wanted: wanted.map(canonical),
                    };
                    // In a box of its own: a future that is moved into a task is in it twice.
                    let served = Box::pin(serve(context.clone(), captured));
                    let open = context.opened();
                    chosen.carry(async move {
                        served.await;
                        drop((open, place));
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection failed");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    });
    Ok(Accepting { seat, listener, task })
}
