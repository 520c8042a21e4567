//! Making a session, on either side.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use hauberk_core::{
    policy::Reason,
    session::{ALPN, ALPN_MULTIPLEXED, ProofAllowance, Role},
};
use hauberk_telemetry::record::TlsInfo;
use hauberk_tls::{
    Credential, HandshakeFailure, PeerError, TrustBundle,
    channel::{CallerToken, Established, FinishError, Handshake, Hello, Progress, read_hello},
    limiter::CallerTurns,
};
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{Facts, Link, Session, SessionError};

/// How long a handshake may take. A peer that is silent for longer is given up.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// A ClientHello with post-quantum key shares is 1.5 kB, a server's flight with two certificates
/// 3 kB.
const BUFFER: usize = 4 * 1024;

/// The side that connects. The last flight of the handshake is not sent yet: it goes out with the
/// first frame.
pub(crate) async fn connect(
    mut socket: TcpStream,
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    own: Option<Arc<Credential>>,
    trust: Arc<TrustBundle>,
    records_per_key: u64,
) -> Result<New, SessionError> {
    let mut handshake = Handshake::client(config, name)?;
    let mut out = Vec::with_capacity(BUFFER);
    let mut input = Vec::with_capacity(BUFFER);
    drive(&mut handshake, &mut socket, &mut input, &mut out, None).await?;
    let mut established = handshake.finish(&trust, hauberk_tls::now()).map_err(refused)?;
    established.channel.lower_key_limit(records_per_key);
    New::of(socket, established, Role::Source, None, own, trust, &out)
}

/// What a caller has said first.
pub(crate) struct Greeting {
    bytes: Vec<u8>,
    /// Whom it wants.
    pub(crate) server_name: Option<String>,
    /// What it knows of an earlier session.
    pub(crate) token: Option<CallerToken>,
}

/// Waits for a caller's ClientHello. One that is silent costs no more than its socket.
pub(crate) async fn greeting(socket: &mut TcpStream) -> Result<Greeting, SessionError> {
    socket.readable().await?;
    let (mut bytes, mut alert) = (Vec::new(), Vec::new());
    loop {
        read(socket, &mut bytes).await?;
        match read_hello(&bytes, &mut alert) {
            Ok(Hello::Read { server_name, token }) => {
                return Ok(Greeting { bytes, server_name, token });
            }
            Ok(Hello::Incomplete) => {}
            Err(error) => return Err(fail(socket, &alert, error).await),
        }
    }
}

/// The side that is connected to, once it has been greeted. `own` is the certificate that is going to be shown: where
/// it is renewed before the handshake is over, the peer is shown the newer one once more.
pub(crate) async fn accept(
    mut socket: TcpStream,
    greeting: Greeting,
    config: Arc<ServerConfig>,
    own: Option<Arc<Credential>>,
    trust: Arc<TrustBundle>,
    records_per_key: u64,
    mut turns: CallerTurns<'_>,
) -> Result<New, SessionError> {
    let Greeting { bytes: mut input, server_name, .. } = greeting;
    let mut out = Vec::new();
    let mut handshake = Handshake::server(config)?;
    drive(&mut handshake, &mut socket, &mut input, &mut out, Some(&mut turns)).await?;
    let mut established = handshake.finish(&trust, hauberk_tls::now()).map_err(refused)?;
    established.channel.lower_key_limit(records_per_key);
    New::of(socket, established, Role::Destination, server_name, own, trust, &out)
}

/// To the end of the handshake. Whoever serves many callers does each step in a turn.
async fn drive(
    handshake: &mut Handshake,
    socket: &mut TcpStream,
    input: &mut Vec<u8>,
    out: &mut Vec<u8>,
    mut turns: Option<&mut CallerTurns<'_>>,
) -> Result<(), SessionError> {
    loop {
        let turn = match &mut turns {
            Some(turns) => Some(turns.turn().await),
            None => None,
        };
        let step = handshake.advance(input, out);
        drop(turn);
        match step {
            Ok(Progress::Done) => return Ok(()),
            Ok(Progress::NeedsBytes) => {}
            Err(error) => return Err(fail(socket, out, error).await),
        }
        socket.write_all(out).await?;
        out.clear();
        input.clear();
        read(socket, input).await?;
    }
}

async fn read(socket: &mut TcpStream, input: &mut Vec<u8>) -> Result<(), SessionError> {
    input.reserve(BUFFER);
    if socket.read_buf(input).await? == 0 {
        return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
    }
    Ok(())
}

/// Sends the alert, as far as the peer listens.
async fn fail(socket: &mut TcpStream, alert: &[u8], error: rustls::Error) -> SessionError {
    // It may be gone.
    drop(socket.write_all(alert).await);
    drop(socket.shutdown().await);
    error.into()
}

fn refused(error: FinishError) -> SessionError {
    let reason = match &error {
        FinishError::Peer(PeerError::NoCertificate) => Reason::NoClientCert,
        FinishError::Peer(PeerError::Verify(error)) => error.reason(),
        FinishError::Tls(_) => Reason::NotReady,
    };
    SessionError::Refused(HandshakeFailure { reason, by_peer: false, detail: error.to_string() })
}

/// A session that has just been made: of the kind that the destination chose.
pub(crate) enum New {
    /// For one stream after another.
    Dedicated(Box<Session>),
    /// For many streams at a time.
    Multiplexed(Box<Trunk>),
}

/// What a multiplexed session is made of.
pub(crate) struct Trunk {
    pub(crate) link: Link,
    pub(crate) facts: Box<Facts>,
    /// What the peer has said behind its handshake.
    pub(crate) plain: Vec<u8>,
}

impl New {
    /// What is proven of it.
    pub(crate) fn facts(&self) -> &Facts {
        match self {
            Self::Dedicated(session) => session.facts(),
            Self::Multiplexed(trunk) => &trunk.facts,
        }
    }

    fn of(
        socket: TcpStream,
        established: Established,
        role: Role,
        server_name: Option<String>,
        own: Option<Arc<Credential>>,
        trust: Arc<TrustBundle>,
        unsent: &[u8],
    ) -> Result<Self, SessionError> {
        let is_multiplexed = match established.alpn.as_deref() {
            Some(ALPN) => false,
            Some(ALPN_MULTIPLEXED) => true,
            Some(_) | None => {
                return Err(SessionError::Refused(HandshakeFailure {
                    reason: Reason::Plaintext,
                    by_peer: false,
                    detail: "the peer speaks neither hauberk/1 nor hauberk/2".to_owned(),
                }));
            }
        };
        let peer = established.peer.facts();
        let tls = TlsInfo {
            version: established.version.map(str::to_owned),
            group: established.group.map(str::to_owned),
            local_serial: own.as_ref().map(|own| own.facts().serial().to_string()),
            peer_serial: Some(peer.serial().to_string()),
            peer_not_after: Some(peer.not_after().to_string()),
        };
        let facts = Box::new(Facts {
            peer: established.peer,
            binding: established.binding,
            token: established.token,
            name: established.name,
            is_source: role == Role::Source,
            tls: Arc::new(tls),
            server_name,
            shown_until: own.as_ref().map(|own| own.facts().not_after()),
            own,
            trust,
            made: Instant::now(),
            proofs_sent: 0,
            proofs_taken: 0,
            proofs_allowed: ProofAllowance::new(hauberk_tls::now()),
        });
        // An exact copy: the room that the handshake needed goes.
        let unsent = unsent.to_vec();
        let link = Link::new(socket, established.channel, established.ciphertext, unsent);
        let plain = established.plaintext;
        Ok(if is_multiplexed {
            Self::Multiplexed(Box::new(Trunk { link, facts, plain }))
        } else {
            Self::Dedicated(Session::new(link, facts, plain))
        })
    }
}
