//! The handshakes of whoever connects to a port of the control plane.

use std::{
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hauberk_tls::{
    channel::{Hello, read_hello},
    limiter::{HandshakeLimiter, RateLimited},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

/// A ClientHello with post-quantum key shares is 1.5 kB.
const HELLO: usize = 2 * 1024;

/// A connection after its TLS handshake.
pub(crate) type Shaken = TlsStream<Reread>;

/// Why a handshake came to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    /// The peer went away, or does not speak our TLS.
    #[error(transparent)]
    Failed(#[from] io::Error),
    /// There were too many.
    #[error(transparent)]
    RateLimited(#[from] RateLimited),
    /// It took too long.
    #[error("the peer did not answer in time")]
    TimedOut,
}

/// Shakes hands, in `timeout` and unless the connection has to give way to others before that is over.
pub(crate) async fn shake(
    limiter: &Arc<HandshakeLimiter>,
    acceptor: &TlsAcceptor,
    mut stream: TcpStream,
    address: SocketAddr,
    timeout: Duration,
) -> Result<Shaken, HandshakeError> {
    let shaking = async {
        let mut admission = limiter.enter(address.ip());
        let hello = admission.unless_displaced(hello(&mut stream)).await??;
        admission.heard(None, hauberk_tls::now());
        let mut waited = Duration::ZERO;
        let mut turns = admission.turns(&mut waited);
        let accepting = async {
            let mut accepting = pin!(acceptor.accept(Reread { hello, used: 0, stream }));
            // Most of the work is done before the peer is waited for.
            let mut turn = Some(turns.turn().await);
            poll_fn(|cx| {
                let polled = accepting.as_mut().poll(cx);
                drop(turn.take());
                polled
            })
            .await
        };
        Ok(admission.unless_displaced(accepting).await??)
    };
    tokio::time::timeout(timeout, shaking).await.unwrap_or(Err(HandshakeError::TimedOut))
}

/// Waits for a ClientHello. A peer that is silent costs no more than its socket.
async fn hello(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    stream.set_nodelay(true)?;
    stream.readable().await?;
    let (mut bytes, mut alert) = (Vec::new(), Vec::new());
    loop {
        bytes.reserve(HELLO);
        if stream.read_buf(&mut bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match read_hello(&bytes, &mut alert) {
            Ok(Hello::Read { .. }) => return Ok(bytes),
            Ok(Hello::Incomplete) => {}
            Err(error) => {
                // It may be gone.
                drop(stream.write_all(&alert).await);
                return Err(io::Error::new(io::ErrorKind::InvalidData, error));
            }
        }
    }
}

/// A stream whose beginning is read a second time.
#[derive(Debug)]
pub(crate) struct Reread {
    hello: Vec<u8>,
    used: usize,
    stream: TcpStream,
}

impl AsyncRead for Reread {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { hello, used, stream } = &mut *self;
        let rest = hello.get(*used..).unwrap_or_default();
        if rest.is_empty() {
            return Pin::new(stream).poll_read(cx, buffer);
        }
        let (now, later) = rest.split_at(rest.len().min(buffer.remaining()));
        buffer.put_slice(now);
        *used += now.len();
        if later.is_empty() {
            // Its room goes.
            (*hello, *used) = (Vec::new(), 0);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Reread {
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

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn the_beginning_is_read_again_and_then_the_rest() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        peer.write_all(b" world").await.unwrap();
        drop(peer);
        let mut stream = Reread { hello: b"hello".to_vec(), used: 0, stream };
        let mut first = [0; 2];
        stream.read_exact(&mut first).await.unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert_eq!((&first, rest.as_str()), (b"he", "llo world"));
    }
}
