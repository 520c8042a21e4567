//! What the tasks of connections share, and the local workloads they act for.

use std::{
    cell::RefCell,
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use hauberk_core::policy::resolve::MeshWorkload;
use hauberk_linux::{NetnsWorker, socket};
use hauberk_telemetry::{RecordSink, metrics::AgentMetrics};
use hauberk_tls::{
    TrustSlot,
    limiter::{FairRoom, HandshakeLimiter},
};
use nix::libc;
use tokio::{net::TcpStream, sync::watch};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{Carrying, LocalEdges, OlderConnections},
    edges::Edges,
    identity::LocalIdentity,
    inbound::{MAX_IDLE, MAX_IDLE_OF_IDENTITY},
    kubelet::Probes,
    lanes::Lanes,
    mux::Multiplexes,
    policy::Snapshot,
    pool::{OfNode, Pool},
    published::PublishedPorts,
    services::Balancer,
    trunks::Trunks,
};

/// A connection that comes before the agent can decide waits this long, rather than being refused.
const READY_TIMEOUT: Duration = Duration::from_secs(5);

/// How long dialling another agent, or the application, may take.
pub(crate) const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// The port on which agents talk to each other.
pub(crate) const MESH_PORT: u16 = 15_008;

/// What the tasks of connections share.
pub(crate) struct Context {
    pub(crate) node: String,
    pub(crate) trust: Arc<TrustSlot>,
    pub(crate) metrics: AgentMetrics,
    pub(crate) records: RecordSink,
    /// What no policy allows.
    pub(crate) edges: Arc<Edges>,
    /// What becomes of what is older than the capture.
    pub(crate) older_connections: OlderConnections,
    /// Records that are sent under one key, if that is less than TLS allows.
    pub(crate) records_per_key: u64,
    /// Incoming handshakes of all places.
    pub(crate) handshakes: Arc<HandshakeLimiter>,
    /// Incoming sessions that wait for their next stream.
    pub(crate) idle: Arc<FairRoom>,
    /// Which backends of services get this node's connections.
    pub(crate) balancer: Arc<Balancer>,
    /// Which of the kubelet's probes were recorded.
    pub(crate) probes: Probes,
    /// Incoming multiplexed sessions.
    pub(crate) multiplexes: Multiplexes,
    /// The captured workloads of this node by their keys, for `verified-local`; none under `mtls`.
    pub(crate) neighbours: Option<Neighbours>,
    /// Take no more connections.
    pub(crate) stopping: CancellationToken,
    /// End the open ones.
    pub(crate) cut: CancellationToken,
    /// The threads that carry connections.
    pub(crate) lanes: Lanes,
    /// Idle dedicated sessions of all workloads.
    pooled: OfNode,
    open: AtomicUsize,
    snapshots: watch::Receiver<Arc<Snapshot>>,
}

/// Counts a connection as open for as long as it lives.
pub(crate) struct Open(Arc<Context>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Context {
    /// Starts the threads that carry connections.
    ///
    /// # Errors
    /// If there can be no thread.
    pub(crate) fn start(
        node: String,
        trust: Arc<TrustSlot>,
        metrics: AgentMetrics,
        records: RecordSink,
        carrying: &Carrying,
        snapshots: watch::Receiver<Arc<Snapshot>>,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            node,
            trust,
            metrics,
            records,
            edges: Arc::new(Edges::new(SystemTime::now().into())),
            older_connections: carrying.older_connections,
            records_per_key: carrying.records_per_key,
            handshakes: HandshakeLimiter::new(),
            idle: FairRoom::new(MAX_IDLE, MAX_IDLE_OF_IDENTITY),
            balancer: Arc::default(),
            probes: Probes::default(),
            multiplexes: Multiplexes::default(),
            neighbours: match carrying.local_edges {
                LocalEdges::Mtls => None,
                LocalEdges::VerifiedLocal => Some(Neighbours::default()),
            },
            stopping: CancellationToken::new(),
            cut: CancellationToken::new(),
            lanes: Lanes::start()?,
            pooled: OfNode::default(),
            open: AtomicUsize::new(0),
            snapshots,
        })
    }

    /// Connections open now.
    pub(crate) fn open_connections(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Notes one more.
    pub(crate) fn opened(self: &Arc<Self>) -> Open {
        self.open.fetch_add(1, Ordering::Relaxed);
        Open(self.clone())
    }

    /// To what is enforced from now on.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        let mut snapshots = self.snapshots.clone();
        snapshots.mark_unchanged();
        snapshots
    }

    /// What is enforced now.
    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshots.borrow().clone()
    }

    /// Subscribes first, so that no change slips in between a decision and its watching; then waits
    /// for a first state, but not for long.
    pub(crate) async fn snapshots(&self) -> (watch::Receiver<Arc<Snapshot>>, Arc<Snapshot>) {
        let mut snapshots = self.snapshots.clone();
        if snapshots.borrow_and_update().revision == 0 {
            let first = snapshots.wait_for(|snapshot| snapshot.revision > 0);
            // Without one the decision says that the agent is not ready. In a box: it is not waited for
            // but at the very start, and every connection's future would have room for it.
            drop(Box::pin(tokio::time::timeout(READY_TIMEOUT, first)).await);
        }
        let snapshot = snapshots.borrow_and_update().clone();
        (snapshots, snapshot)
    }
}

/// Who lives on this node, over all places.
#[derive(Default)]
pub(crate) struct Neighbours(ArcSwap<HashMap<String, Arc<Local>>>);

impl Neighbours {
    pub(crate) fn find(&self, workload: &MeshWorkload) -> Option<Arc<Local>> {
        self.0.load().get(&workload.key()).cloned()
    }

    pub(crate) fn store(&self, locals: impl Iterator<Item = Arc<Local>>) {
        self.0.store(Arc::new(locals.map(|local| (local.workload.key(), local)).collect()));
    }
}

/// A workload of this node.
pub(crate) struct Local {
    pub(crate) workload: Arc<MeshWorkload>,
    pub(crate) identity: Arc<LocalIdentity>,
    pub(crate) place: Place,
    /// Dedicated sessions to other agents that are idle.
    pub(crate) pool: Pool,
    /// Multiplexed ones.
    pub(crate) trunks: Trunks,
}

/// Where a workload's sockets are.
#[derive(Clone)]
pub(crate) enum Place {
    /// The agent's own network namespace.
    Host(Arc<PublishedPorts>),
    /// The workload's.
    Namespace(Arc<NetnsWorker>),
}

impl Local {
    pub(crate) fn new(
        context: &Context,
        workload: Arc<MeshWorkload>,
        identity: Arc<LocalIdentity>,
        place: Place,
    ) -> Self {
        let (own, trust) = (identity.slot.clone(), context.trust.clone());
        let pool = Pool::new(own, trust, context.metrics.clone(), context.pooled.clone());
        let lanes = context.lanes.count();
        let trunks = Trunks::new(identity.slot.clone(), context.trust.clone(), lanes);
        Self { workload, identity, place, pool, trunks }
    }

    /// Whether it is a process of this host, rather than having a network namespace of its own.
    pub(crate) fn is_on_host(&self) -> bool {
        match self.place {
            Place::Host(_) => true,
            Place::Namespace(_) => false,
        }
    }

    /// Waits for the first certificate, but not for long. Returns whether there is one.
    pub(crate) async fn has_certificate(&self) -> bool {
        if self.identity.slot.load().is_some() {
            return true;
        }
        let mut installed = self.identity.installed.clone();
        let first = installed.wait_for(|count| *count > 0);
        drop(Box::pin(tokio::time::timeout(READY_TIMEOUT, first)).await);
        self.identity.slot.load().is_some()
    }
}

impl Place {
    /// Connects with the agent's mark, so that the capture rules let it pass.
    pub(crate) async fn dial(&self, destination: SocketAddr) -> io::Result<TcpStream> {
        let socket = self.call(|| socket::outbound_socket(destination))?;
        connect(socket, destination).await
    }

    /// Connects to the local application, which sees `source` as the caller.
    pub(crate) async fn dial_as(
        &self,
        source: SocketAddr,
        destination: SocketAddr,
    ) -> io::Result<TcpStream> {
        let socket = self.call(|| socket::transparent_socket(source))?;
        let directly = async {
            match connect(socket, destination).await {
                // The caller's port is in use towards this destination, by a connection that is ending.
                Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
                    let socket = self.call(|| socket::transparent_socket_other_port(source))?;
                    connect(socket, destination).await
                }
                other => other,
            }
        };
        self.reach(destination, directly).await
    }

    /// The same from another port of the caller's address: for a connection that came in clear and is
    /// let through, whose own port would lead it back to us.
    pub(crate) async fn dial_as_address(
        &self,
        source: SocketAddr,
        destination: SocketAddr,
    ) -> io::Result<TcpStream> {
        let socket = self.call(|| socket::transparent_socket_other_port(source))?;
        self.reach(destination, connect(socket, destination)).await
    }

    /// Connects as `directly` does, or to the container from which a port of the host is published.
    async fn reach(
        &self,
        destination: SocketAddr,
        directly: impl Future<Output = io::Result<TcpStream>>,
    ) -> io::Result<TcpStream> {
        match self {
            Self::Host(ports) => ports.reach(destination, directly).await,
            Self::Namespace(_) => directly.await,
        }
    }

    /// Does something there: a system call or two, that do not wait.
    pub(crate) fn call<T>(&self, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        match self {
            Self::Host(_) => work(),
            Self::Namespace(worker) => worker.netns().within(work).map_err(io::Error::other)?,
        }
    }
}

pub(crate) async fn connect(
    socket: socket2::Socket,
    destination: SocketAddr,
) -> io::Result<TcpStream> {
    match socket.connect(&destination.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let stream = TcpStream::from_std(socket.into())?;
    // An application of this machine has answered by now: it is not waited for the runtime to hear of it.
    if stream.peer_addr().is_err() {
        Box::pin(tokio::time::timeout(DIAL_TIMEOUT, stream.writable()))
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        if let Some(error) = stream.take_error()? {
            return Err(error);
        }
    }
    Ok(stream)
}

/// Whether an address is one of this host's own, loopback included.
pub(crate) fn is_own_address(ip: IpAddr) -> bool {
    // Whether it can be bound to says nothing: on some hosts any address can (`ip_nonlocal_bind`).
    ip.is_loopback()
        || hauberk_linux::links::addresses()
            .is_ok_and(|own| own.iter().any(|address| address.ip == ip))
}

/// An address without the IPv4-in-IPv6 form.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// A number for a connection that no other has. Only a name in records, not a secret; all zero says that there was no
/// randomness.
pub(crate) fn connection_id() -> [u8; 16] {
    thread_local! {
        /// The kernel is asked for many at once.
        static STOCK: RefCell<([[u8; 16]; IDS], usize)> = const { RefCell::new(([[0; 16]; IDS], IDS)) };
    }
    STOCK.with_borrow_mut(|(ids, used)| {
        if *used == IDS {
            *used = 0;
            if getrandom::fill(ids.as_flattened_mut()).is_err() {
                *ids = [[0; 16]; IDS];
            }
        }
        let id = ids.get(*used).copied().unwrap_or_default();
        *used += 1;
        id
    })
}

/// Numbers of connections that a thread has in stock.
const IDS: usize = 32;
