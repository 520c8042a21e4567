//! Sockets: TLS for agents, a local socket for people.

use std::{
    future::Future,
    io,
    os::unix::fs::PermissionsExt,
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hauberk_tls::{
    TrustSlot, lapsed_client_of, peer_of,
    turns::{Handshakes, Turn},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::mpsc,
    time::Sleep,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use crate::attest::{Connection, Peer};

/// A handshake that takes longer is given up: a silent peer must not hold anything.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection without a good certificate may last: it can only join, or renew an expired one, which is
/// one call.
const JOIN_TIMEOUT: Duration = Duration::from_secs(20);

/// A connection of an agent, with who it is.
pub(crate) struct AgentStream {
    stream: TlsStream<TcpStream>,
    connection: Connection,
    stranger: Option<Stranger>,
}

/// Whoever has not shown a good certificate keeps its turn, and not for long.
struct Stranger {
    until: Pin<Box<Sleep>>,
    _turn: Turn,
}

impl Stranger {
    fn poll(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.until.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(()),
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
        let handshakes: Arc<Handshakes> = Arc::default();
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
            let handshakes = handshakes.clone();
            tokio::spawn(async move {
                let turn = match handshakes.turn(address.ip(), HANDSHAKE_TIMEOUT).await {
                    Ok(turn) => turn,
                    Err(error) => {
                        tracing::warn!(addr = %address, %error, "a TLS handshake was not begun");
                        return;
                    }
                };
                let handshake = async {
                    stream.set_nodelay(true)?;
                    acceptor.accept(stream).await
                };
                match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
                    Ok(Ok(stream)) => {
                        let tls = stream.get_ref().1;
                        let (trust, now) = (trust.load(), hauberk_tls::now());
                        let peer = match peer_of(tls, &trust, false, now) {
                            Ok(svid) => Peer::Proven(svid),
                            Err(_) => lapsed_client_of(tls, &trust, grace, now)
                                .map_or(Peer::Nobody, Peer::Lapsed),
                        };
                        let stranger = match peer {
                            Peer::Proven(_) => None,
                            Peer::Lapsed(_) | Peer::Nobody => Some(Stranger {
                                until: Box::pin(tokio::time::sleep(JOIN_TIMEOUT)),
                                _turn: turn,
                            }),
                        };
                        let connection = Connection { peer, address };
                        // The server may be stopping.
                        drop(sender.send(Ok(AgentStream { stream, connection, stranger })).await);
                    }
                    Ok(Err(error)) => {
                        tracing::warn!(addr = %address, %error, "a TLS handshake failed");
                    }
                    Err(_) => tracing::warn!(addr = %address, "a TLS handshake took too long"),
                }
            });
        }
    });
    ReceiverStream::new(receiver)
}

impl AsyncRead for AgentStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(stranger) = &mut self.stranger {
            stranger.poll(cx)?;
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for AgentStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
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
