//! Sockets of the agent: what options they carry and why.
//!
//! Every function acts in the calling thread's namespace where it makes a socket; on a socket
//! that exists, the thread does not matter.

use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::AsFd,
    time::Duration,
};

use nix::libc;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

use crate::{
    capture::{MARK, MARK_TRANSPARENT},
    sys,
};

/// A peer that vanished is noticed after 30 s + 3 × 10 s of silence, which is well below the
/// idle timeouts of NAT devices and load balancers.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 3;

/// How a listener is set up.
#[derive(Clone, Copy, Debug)]
pub struct ListenOptions {
    /// Connections the kernel holds until they are accepted; capped by `net.core.somaxconn`.
    pub backlog: i32,
    /// Whether the listener may be bound to, and accept on, addresses that are not this
    /// namespace's own.
    pub transparent: bool,
}

impl Default for ListenOptions {
    fn default() -> Self {
        Self {
            // The kernel's default ceiling since Linux 5.4.
            backlog: 4096,
            transparent: false,
        }
    }
}

/// Listens on `address`: non-blocking, address reuse on, an IPv6 socket for IPv6 only.
pub fn listen(address: SocketAddr, options: ListenOptions) -> io::Result<TcpListener> {
    let socket = stream_socket(address)?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // Both families get a listener of their own, so none shows IPv4 peers as ::ffff:….
        socket.set_only_v6(true)?;
    }
    if options.transparent {
        set_transparent(&socket, address)?;
    }
    socket.bind(&address.into())?;
    socket.listen(options.backlog)?;
    Ok(socket.into())
}

/// Where a redirected connection was really going, from conntrack.
///
/// A connection that was dialled to the listener itself gives the listener's own address and
/// port; the caller must refuse it, or it would connect to itself.
pub fn original_destination(socket: &impl AsFd) -> io::Result<SocketAddr> {
    let socket = SockRef::from(socket);
    let local = socket.local_addr()?;
    // An IPv4 connection on a dual-stack listener is known to conntrack as IPv4.
    let destination = match local.as_socket().map(|address| address.ip().to_canonical()) {
        Some(IpAddr::V4(_)) => socket.original_dst_v4()?,
        Some(IpAddr::V6(_)) => socket.original_dst_v6()?,
        None => return Err(io::Error::from(io::ErrorKind::Unsupported)),
    };
    destination.as_socket().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

/// A socket for dialling `destination`: non-blocking, close-on-exec, and with [`MARK`], so the
/// capture rules let it out.
pub fn outbound_socket(destination: SocketAddr) -> io::Result<Socket> {
    let socket = stream_socket(destination)?;
    socket.set_mark(MARK)?;
    tune(&socket)?;
    Ok(socket)
}

/// A socket for dialling the local application as if from `source`, the client's real address
/// and port; with [`MARK_TRANSPARENT`], so the answers find their way back to it.
///
/// Where the port is taken, another one of the same address is used. Connecting can still fail
/// with `EADDRNOTAVAIL` when the same source already has a connection to the same destination:
/// dial again with [`transparent_socket_other_port`].
///
/// Must not be used for a connection that itself came in redirected (to the plaintext port):
/// conntrack would take it for that very connection and redirect it again. There,
/// [`transparent_socket_other_port`] keeps the address and gives up the port.
pub fn transparent_socket(source: SocketAddr) -> io::Result<Socket> {
    let socket = unbound_transparent_socket(source)?;
    // A client may have several connections from one port, to different ports of the workload.
    socket.set_reuse_address(true)?;
    match socket.bind(&canonical(source).into()) {
        Ok(()) => Ok(socket),
        Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) => {
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

/// Keepalive and no-delay for a connection from another machine.
///
/// No `TCP_USER_TIMEOUT`: it also ends connections whose reader only pauses, which a network without us
/// in between would let live for ever. See [`unacknowledged_for`].
pub fn tune_mesh(socket: &impl AsFd) -> io::Result<()> {
    tune(&SockRef::from(socket))
}

/// No-delay for a connection from this machine. Its other end is in the same kernel, which cannot
/// vanish without closing it: no keepalive.
pub fn tune_local(socket: &impl AsFd) -> io::Result<()> {
    SockRef::from(socket).set_tcp_nodelay(true)
}

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

fn stream_socket(address: SocketAddr) -> io::Result<Socket> {
    // socket2 sets close-on-exec itself.
    let socket =
        Socket::new(Domain::for_address(canonical(address)), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn unbound_transparent_socket(source: SocketAddr) -> io::Result<Socket> {
    let socket = stream_socket(source)?;
    socket.set_mark(MARK_TRANSPARENT)?;
    set_transparent(&socket, canonical(source))?;
    tune_local(&socket)?;
    Ok(socket)
}

fn set_transparent(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    match address {
        SocketAddr::V4(_) => {
            socket.set_ip_transparent_v4(true)?;
            socket.set_freebind_v4(true)
        }
        SocketAddr::V6(_) => {
            socket.set_ip_transparent_v6(true)?;
            socket.set_freebind_v6(true)
        }
    }
}

fn tune(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(
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
