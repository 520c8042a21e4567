//! Sockets: TLS for agents, a local socket for people.

use std::{
    future::Future,
    io,
    net::IpAddr,
    os::unix::fs::PermissionsExt,
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hauberk_tls::{
    TrustSlot, lapsed_client_of,
    limiter::{Caller, FairRoom, HandshakeLimiter, Slot},
    peer_of,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, UnixListener, UnixStream},
    sync::mpsc,
    time::Sleep,
};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use crate::{
    attest::{Connection, Peer},
    handshake::{Shaken, shake},
};

/// A handshake that takes longer is given up: a silent peer must not hold anything.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection without a good certificate may last: it can only join, or renew an expired one, which is
/// one call.
const JOIN_TIMEOUT: Duration = Duration::from_secs(20);

/// Connections without a good certificate at once. Above it, the oldest one of the address with most has to go.
const STRANGERS: usize = 1_024;

/// Connections with a good certificate at once, and those of one node at one address: an agent has a few.
const CONNECTIONS: usize = 65_536;
const CONNECTIONS_OF_NODE: usize = 64;

/// A connection of an agent, with who it is.
pub(crate) struct AgentStream {
    stream: Shaken,
    connection: Connection,
    stay: Stay,
}

/// For how long a connection may stay.
struct Stay {
    slot: Slot,
    /// Of whoever has not shown a good certificate.
    until: Option<Pin<Box<Sleep>>>,
}

impl Stay {
    fn poll(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let is_over = self.until.as_mut().is_some_and(|until| until.as_mut().poll(cx).is_ready());
        if is_over || self.slot.poll_displaced(cx).is_ready() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(())
    }
}

/// Room for connections after their handshake.
struct Rooms {
    nodes: Arc<FairRoom>,
    strangers: Arc<FairRoom>,
}

impl Rooms {
    fn enter(&self, peer: &Peer, address: IpAddr) -> Stay {
        match peer {
            Peer::Proven(svid) => {
                let caller = Caller::proven(svid.id().clone(), None, address);
                Stay { slot: self.nodes.enter(Arc::new(caller)), until: None }
            }
            Peer::Lapsed(_) | Peer::Nobody => Stay {
                slot: self.strangers.enter(Arc::new(Caller::at(address))),
                until: Some(Box::pin(tokio::time::sleep(JOIN_TIMEOUT))),
            },
        }
    }
}

impl Connected for AgentStream {
    type ConnectInfo = Connection;

    fn connect_info(&self) -> Connection {
        self.connection.clone()
    }
}

/// Accepts, shakes hands beside each other, hands the finished ones on. `grace` is how long ago a peer's certificate
/// may have expired; it is good for one call at most then.
pub(crate) fn tls_connections(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    trust: Arc<TrustSlot>,
    grace: Duration,
) -> ReceiverStream<io::Result<AgentStream>> {
    let (sender, receiver) = mpsc::channel(16);
    tokio::spawn(async move {
        let limiter = HandshakeLimiter::new();
        let rooms = Arc::new(Rooms {
            nodes: FairRoom::new(CONNECTIONS, CONNECTIONS_OF_NODE),
            strangers: FairRoom::new(STRANGERS, STRANGERS),
        });
        loop {
            let (stream, address) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            if sender.is_closed() {
                return;
            }
            let (sender, acceptor, trust) = (sender.clone(), acceptor.clone(), trust.clone());
            let (limiter, rooms) = (limiter.clone(), rooms.clone());
            tokio::spawn(async move {
                let shaken = shake(&limiter, &acceptor, stream, address, HANDSHAKE_TIMEOUT).await;
                let stream = match shaken {
                    Ok(stream) => stream,
                    Err(error) => {
                        tracing::warn!(addr = %address, %error, "a TLS handshake failed");
                        return;
                    }
                };
                let peer = who_is(&stream, &trust, grace);
                let stay = rooms.enter(&peer, address.ip());
                let connection = Connection { peer, address };
                // The server may be stopping.
                drop(sender.send(Ok(AgentStream { stream, connection, stay })).await);
            });
        }
    });
    ReceiverStream::new(receiver)
}

fn who_is(stream: &Shaken, trust: &TrustSlot, grace: Duration) -> Peer {
    let tls = stream.get_ref().1;
    let (trust, now) = (trust.load(), hauberk_tls::now());
    match peer_of(tls, &trust, false, now) {
        Ok(svid) => Peer::Proven(svid),
        Err(_) => lapsed_client_of(tls, &trust, grace, now).map_or(Peer::Nobody, Peer::Lapsed),
    }
}

impl AsyncRead for AgentStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.stay.poll(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for AgentStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        // A peer that reads nothing keeps a server writing, which then reads nothing.
        self.stay.poll(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stay.poll(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// The local socket: only its owner and root may use it, by its mode, its folder's mode and by a
/// look at who connects.
pub(crate) fn operator_connections(
    path: &Path,
) -> io::Result<ReceiverStream<io::Result<UnixStream>>> {
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    let (sender, receiver) = mpsc::channel(4);
    tokio::spawn(async move {
        let us = nix::unistd::geteuid().as_raw();
        loop {
            match listener.accept().await {
                Ok((stream, _)) => match stream.peer_cred() {
                    Ok(peer) if peer.uid() == us || peer.uid() == 0 => {
                        if sender.send(Ok(stream)).await.is_err() {
                            return;
                        }
                    }
                    Ok(peer) => {
                        tracing::warn!(uid = peer.uid(), "a stranger on the operator socket");
                    }
                    Err(error) => tracing::warn!(%error, "who is on the operator socket?"),
                },
                Err(error) => {
                    tracing::warn!(%error, "accepting on the operator socket failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    });
    Ok(ReceiverStream::new(receiver))
}
