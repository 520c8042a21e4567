//! Sockets of the agent: what options they carry and why.
//!
//! Every function acts in the calling thread's namespace where it makes a socket; on a socket
//! that exists, the thread does not matter.

use std::{
    io::{self, IoSliceMut},
    net::{Ipv6Addr, SocketAddr, TcpListener},
    os::fd::AsFd,
    time::Duration,
};

use nix::libc;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

use crate::{
    capture::{MARK, MARK_PUBLISHED, MARK_TRANSPARENT},
    sys,
};

/// A peer that vanished is noticed after 30 s + 3 × 10 s of silence, which is well below the
/// idle timeouts of NAT devices and load balancers.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 3;

/// How many connections the kernel holds until they are accepted; capped by `net.core.somaxconn`. The kernel's
/// default ceiling since Linux 5.4.
const BACKLOG: i32 = 4096;

/// Listens on `address`: non-blocking, address reuse on, an IPv6 socket for IPv6 only.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = listening_socket(address)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Who is at the other end of captured connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// An application of this machine. What its kernel answers by itself, as with a reset, has the mark of what it
    /// answers, and must find its way back: [`MARK_TRANSPARENT`].
    Application,
    /// Another host: [`MARK`].
    Network,
}

impl Peer {
    fn mark(self) -> u32 {
        match self {
            Peer::Application => MARK_TRANSPARENT,
            Peer::Network => MARK,
        }
    }
}

/// Listens on `address` for captured connections: what it accepts has as its own address the one that was wanted.
/// Options that accepted sockets inherit are set here once: the mark, no delay, keepalive, and for applications
/// [`reset_on_close`].
///
/// A connection that was dialled to the listener itself has the listener's own address and
/// port; the caller must refuse it, or it would connect to itself.
pub fn listen_captured(address: SocketAddr, peer: Peer) -> io::Result<TcpListener> {
    let socket = listening_socket(address)?;
    set_transparent(&socket, address)?;
    socket.set_mark(peer.mark())?;
    tune(&socket)?;
    keep_alive(&socket)?;
    match peer {
        Peer::Application => reset_on_close(&socket)?,
        Peer::Network => {}
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A socket for dialling `destination`: non-blocking, close-on-exec, and with [`MARK`], so the
/// capture rules let it out.
pub fn outbound_socket(destination: SocketAddr) -> io::Result<Socket> {
    let socket = stream_socket(destination)?;
    socket.set_mark(MARK)?;
    tune(&socket)?;
    keep_alive(&socket)?;
    Ok(socket)
}

/// A socket for dialling one of this host's own ports to where another program's address translation leads it, with
/// [`MARK_PUBLISHED`]: under the capture rules it is refused if nothing leads it elsewhere, and it does not leave the
/// machine. The application sees this host as its caller.
pub fn published_socket(destination: SocketAddr) -> io::Result<Socket> {
    let socket = stream_socket(destination)?;
    socket.set_mark(MARK_PUBLISHED)?;
    tune(&socket)?;
    Ok(socket)
}

/// A socket for dialling the local application as if from `source`, the client's real address
/// and port; with [`MARK_TRANSPARENT`], so the answers find their way back to it. It is not kept alive
/// ([`keep_alive`]).
///
/// Where the port is taken, another one of the same address is used. Connecting can still fail
/// with `EADDRNOTAVAIL` when the same source already has a connection to the same destination:
/// dial again with [`transparent_socket_other_port`].
///
/// Must not be used for a connection that itself came in without the mesh: its own two ends are those that the
/// application would see. There, [`transparent_socket_other_port`] keeps the address and gives up the port.
pub fn transparent_socket(source: SocketAddr) -> io::Result<Socket> {
    let socket = unbound_transparent_socket(source)?;
    // A client may have several connections from one port, to different ports of the workload.
    socket.set_reuse_address(true)?;
    match socket.bind(&canonical(source).into()) {
        Ok(()) => Ok(socket),
        // Taken, or one that needs a privilege which the agent may not have.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EADDRINUSE | libc::EACCES)) => {
            transparent_socket_other_port(source)
        }
        Err(error) => Err(error),
    }
}

/// As [`transparent_socket`], but surely not with the source's own port.
pub fn transparent_socket_other_port(source: SocketAddr) -> io::Result<Socket> {
    let any_port = SocketAddr::new(canonical(source).ip(), 0);
    // Without address reuse the kernel gives out a port nobody has.
    let first = unbound_transparent_socket(source)?;
    first.bind(&any_port.into())?;
    if local_port(&first)? != source.port() {
        return Ok(first);
    }
    // The first one holds the unwanted port meanwhile, so that this one cannot get it as well.
    let second = unbound_transparent_socket(source)?;
    second.bind(&any_port.into())?;
    Ok(second)
}

/// `TCP_CLOSE` of `include/net/tcp_states.h`: the peer reset the connection.
const CLOSED: u8 = 7;

/// How long the peer's kernel has acknowledged nothing although something was sent to it; none if
/// nothing is under way, as when its reader pauses. The longest time there is if the connection is closed.
pub fn unacknowledged_for(socket: &impl AsFd) -> io::Result<Option<Duration>> {
    let info = sys::tcp_info(socket)?;
    if info.tcpi_state == CLOSED {
        return Ok(Some(Duration::MAX));
    }
    // Acknowledgements that ride on a stream of data do not count as such; a peer that sends is there.
    let silent = info.tcpi_last_ack_recv.min(info.tcpi_last_data_recv);
    let lost = info.tcpi_unacked > 0 && info.tcpi_retransmits > 0;
    Ok(lost.then_some(Duration::from_millis(silent.into())))
}

/// Whether the peer's kernel has everything that was written. True as well if the connection is closed: then
/// nothing more gets there.
pub fn is_delivered(socket: &impl AsFd) -> io::Result<bool> {
    Ok(sys::send_queue(socket)? == 0 || sys::tcp_info(socket)?.tcpi_state == CLOSED)
}

/// Makes closing the socket send a reset, so that the peer sees a refusal and not a clean end.
pub fn reset_on_close(socket: &impl AsFd) -> io::Result<()> {
    SockRef::from(socket).set_linger(Some(Duration::ZERO))
}

/// Undoes [`reset_on_close`]: what was written goes out, and then the end.
pub fn linger_on_close(socket: &impl AsFd) -> io::Result<()> {
    SockRef::from(socket).set_linger(None)
}

fn listening_socket(address: SocketAddr) -> io::Result<Socket> {
    let socket = stream_socket(address)?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // Both families get a listener of their own, so none shows IPv4 peers as ::ffff:….
        socket.set_only_v6(true)?;
    }
    Ok(socket)
}

fn stream_socket(address: SocketAddr) -> io::Result<Socket> {
    // socket2 sets close-on-exec itself; not to block takes no call of its own.
    let kind = Type::STREAM.nonblocking();
    Socket::new(Domain::for_address(canonical(address)), kind, Some(Protocol::TCP))
}

fn unbound_transparent_socket(source: SocketAddr) -> io::Result<Socket> {
    let socket = stream_socket(source)?;
    socket.set_mark(MARK_TRANSPARENT)?;
    set_transparent(&socket, canonical(source))?;
    tune(&socket)?;
    Ok(socket)
}

fn set_transparent(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    match address {
        SocketAddr::V4(_) => socket.set_ip_transparent_v4(true),
        SocketAddr::V6(_) => socket.set_ip_transparent_v6(true),
    }
}

/// No delay, urgent data in line, and [`receive`] says whether more is there.
fn tune(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    // An urgent byte is delivered in its place among the others, instead of being lost.
    socket.set_out_of_band_inline(true)?;
    sys::tell_what_is_left(socket)
}

/// What came from a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// How many bytes; none at the end.
    pub bytes: usize,
    /// Whether there is surely nothing more to read now. The end of what the peer sends counts as something to read.
    pub is_all: bool,
}

/// Reads what is there, without waiting, from a connection that one of this module's functions made or that came to
/// one of its listeners.
///
/// The kernel's own word is used for whether more is there: a read that got less than it had room for says nothing,
/// since the kernel also stops before an urgent byte.
pub fn receive(socket: &impl AsFd, into: &mut [IoSliceMut<'_>]) -> io::Result<Received> {
    let (bytes, left) = sys::receive(socket, into)?;
    // After the last byte there is the end, of which the kernel does not always tell in the same breath.
    Ok(Received { bytes, is_all: bytes > 0 && left == Some(0) })
}

/// Has the kernel ask now and then whether the peer is still there. Sockets that [`listen_captured`] accepts, and those
/// for other agents, do so already; one for a local application only needs it if the connection lasts.
///
/// No `TCP_USER_TIMEOUT`: it also ends connections whose reader only pauses, which a network without us
/// in between would let live for ever. See [`unacknowledged_for`].
pub fn keep_alive(socket: &impl AsFd) -> io::Result<()> {
    SockRef::from(socket).set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(KEEPALIVE_IDLE)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(KEEPALIVE_PROBES),
    )
}

fn local_port(socket: &Socket) -> io::Result<u16> {
    let address = socket.local_addr()?.as_socket();
    Ok(address.map_or(0, |address| address.port()))
}

/// `::ffff:192.0.2.1` is an IPv4 address and must be dialled as one.
fn canonical(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(v6) if Ipv6Addr::to_ipv4_mapped(v6.ip()).is_some() => {
            SocketAddr::new(address.ip().to_canonical(), address.port())
        }
        SocketAddr::V4(_) | SocketAddr::V6(_) => address,
    }
}
