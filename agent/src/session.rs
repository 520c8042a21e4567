//! One mutual TLS connection between two workload identities, and the frames on it before and after
//! the application's bytes.

use std::{io, time::Duration};

use hauberk_core::{
    policy::Reason,
    session::{ALPN, FrameError, FrameType, HEADER_LENGTH, Header, MAX_CONTROL, Open, Refusal},
    svid::VerifiedSvid,
};
use hauberk_telemetry::record::TlsInfo;
use hauberk_tls::{Credential, HandshakeFailure, TrustBundle, exporter, peer_of, reason_of};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::TlsStream;

/// How long a handshake may take. A peer that is silent for longer is given up.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the first frame, and the answer to it, may take: the destination dials its application
/// in this time.
pub(crate) const OPEN_TIMEOUT: Duration = Duration::from_secs(15);

/// A connection whose peer is proven.
pub(crate) struct Session {
    pub(crate) stream: TlsStream<TcpStream>,
    pub(crate) peer: VerifiedSvid,
    /// Binds proofs of newer certificates to this connection.
    pub(crate) exporter: [u8; 32],
    /// This side opened it.
    pub(crate) is_source: bool,
    pub(crate) tls: TlsInfo,
}

/// Why there is no session.
#[derive(Debug)]
pub(crate) enum SessionError {
    /// TLS refused it, here or there.
    Refused(HandshakeFailure),
    /// The network failed, or the peer went away.
    Io(io::Error),
    /// It took too long.
    TimedOut,
    /// The peer broke the protocol.
    Protocol(FrameError),
    /// The destination refused the stream.
    Denied(Refusal),
}

impl std::fmt::Display for SessionError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Refused(failure) => f.write_str(&failure.detail),
            Self::Io(error) => write!(f, "{error}"),
            Self::TimedOut => f.write_str("the peer did not answer in time"),
            Self::Protocol(error) => write!(f, "the peer broke the protocol: {error}"),
            Self::Denied(_) => f.write_str("refused by the destination"),
        }
    }
}

impl From<io::Error> for SessionError {
    fn from(error: io::Error) -> Self {
        match reason_of(&error) {
            Some(failure) => Self::Refused(failure),
            None => Self::Io(error),
        }
    }
}

impl From<FrameError> for SessionError {
    fn from(error: FrameError) -> Self {
        Self::Protocol(error)
    }
}

impl Session {
    /// Takes a finished handshake: the protocol must be ours, and the peer proven.
    pub(crate) fn new(
        stream: TlsStream<TcpStream>,
        own: Option<&Credential>,
        bundle: &TrustBundle,
        is_source: bool,
    ) -> Result<Self, SessionError> {
        let refused = |reason, detail: String| {
            SessionError::Refused(HandshakeFailure { reason, by_peer: false, detail })
        };
        let (_, state) = stream.get_ref();
        if state.alpn_protocol() != Some(ALPN) {
            return Err(refused(Reason::Plaintext, "the peer does not speak hauberk/1".to_owned()));
        }
        let peer = peer_of(state, bundle, is_source, hauberk_tls::now()).map_err(|error| {
            let reason = match &error {
                hauberk_tls::PeerError::NoCertificate => Reason::NoClientCert,
                hauberk_tls::PeerError::Verify(error) => error.reason(),
            };
            refused(reason, error.to_string())
        })?;
        let exporter = match &stream {
            TlsStream::Client(inner) => exporter(inner.get_ref().1),
            TlsStream::Server(inner) => exporter(inner.get_ref().1),
        }
        .map_err(|error| refused(Reason::NotReady, error.to_string()))?;
        let tls = TlsInfo {
            version: state.protocol_version().and_then(|v| v.as_str()).map(str::to_owned),
            group: state
                .negotiated_key_exchange_group()
                .and_then(|group| group.name().as_str())
                .map(str::to_owned),
            local_serial: own.map(|own| own.facts().serial().to_string()),
            peer_serial: Some(peer.facts().serial().to_string()),
            peer_not_after: Some(peer.facts().not_after().to_string()),
        };
        Ok(Self { stream, peer, exporter, is_source, tls })
    }

    /// Sends the open frame and waits for the answer.
    pub(crate) async fn open(&mut self, open: &Open) -> Result<(), SessionError> {
        let exchange = async {
            self.send(FrameType::Open, &open.encode()).await?;
            let header = self.header().await?;
            match header.frame_type {
                FrameType::Accept => Ok(()),
                FrameType::Refuse => {
                    let body = self.body(header.length).await?;
                    Err(SessionError::Denied(Refusal::decode(&body)?))
                }
                other => Err(FrameError::OutOfTurn(other).into()),
            }
        };
        tokio::time::timeout(OPEN_TIMEOUT, exchange).await.unwrap_or(Err(SessionError::TimedOut))
    }

    /// Waits for the open frame.
    pub(crate) async fn opened(&mut self) -> Result<Open, SessionError> {
        let exchange = async {
            let header = self.header().await?;
            match header.frame_type {
                FrameType::Open => Ok(Open::decode(&self.body(header.length).await?)?),
                other => Err(FrameError::OutOfTurn(other).into()),
            }
        };
        tokio::time::timeout(HANDSHAKE_TIMEOUT, exchange)
            .await
            .unwrap_or(Err(SessionError::TimedOut))
    }

    pub(crate) async fn accept(&mut self) -> Result<(), SessionError> {
        self.send(FrameType::Accept, &[]).await
    }

    /// Tells the caller's agent why not, and closes.
    pub(crate) async fn refuse(&mut self, refusal: &Refusal) -> Result<(), SessionError> {
        let exchange = async {
            self.send(FrameType::Refuse, &refusal.encode()).await?;
            Ok(self.stream.shutdown().await?)
        };
        tokio::time::timeout(HANDSHAKE_TIMEOUT, exchange)
            .await
            .unwrap_or(Err(SessionError::TimedOut))
    }

    async fn send(&mut self, frame_type: FrameType, body: &[u8]) -> Result<(), SessionError> {
        let mut frame = Header::encode(frame_type, body.len())?.to_vec();
        frame.extend_from_slice(body);
        self.stream.write_all(&frame).await?;
        Ok(self.stream.flush().await?)
    }

    async fn header(&mut self) -> Result<Header, SessionError> {
        let mut bytes = [0; HEADER_LENGTH];
        self.stream.read_exact(&mut bytes).await?;
        Ok(Header::decode(bytes)?)
    }

    async fn body(&mut self, length: usize) -> Result<Vec<u8>, SessionError> {
        let mut body = vec![0; length.min(MAX_CONTROL)];
        self.stream.read_exact(&mut body).await?;
        Ok(body)
    }
}
