//! The handshake, by rustls, without a socket: bytes in, bytes out, and at the end a [`Channel`] with a
//! proven peer.

use std::sync::Arc;

use aws_lc_rs::hkdf;
use hauberk_core::{svid::VerifiedSvid, time::Timestamp};
use rustls::{
    ClientConfig, CommonState, ConnectionTrafficSecrets, Error, ProtocolVersion, ServerConfig,
    client::UnbufferedClientConnection,
    server::{Acceptor, UnbufferedServerConnection},
    unbuffered::{ConnectionState, EncodeError, UnbufferedStatus},
};
use rustls_pki_types::ServerName;

use super::{Channel, Secrets};
use crate::{PeerError, TrustBundle, peer_of};

/// More bytes than any handshake of ours has, in either direction: two certificate chains and the
/// post-quantum key shares come to about 8 kB.
const MAX_HANDSHAKE: usize = 64 * 1024;

/// More bytes than a ClientHello has, by far. They are read from the start each time that more come.
const MAX_HELLO: usize = 8 * 1024;

/// A handshake under way.
pub struct Handshake {
    connection: Connection,
    /// What the peer sent and rustls has not used.
    incoming: Vec<u8>,
    taken: usize,
    early: Vec<u8>,
}

enum Connection {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

/// How far a handshake is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The peer must speak next.
    NeedsBytes,
    /// It is done.
    Done,
}

/// A finished handshake.
#[derive(Debug)]
pub struct Established {
    /// The connection.
    pub channel: Channel,
    /// Who the peer is.
    pub peer: VerifiedSvid,
    /// A value that only the two ends of this very connection know.
    pub binding: [u8; 32],
    /// What tells the destination of a later connection who called in this one.
    pub token: CallerToken,
    /// What the connection is called among those of the destination.
    pub name: [u8; 16],
    /// Application bytes that came along with the handshake.
    pub plaintext: Vec<u8>,
    /// The beginning of a record that did.
    pub ciphertext: Vec<u8>,
    /// The application protocol that both speak.
    pub alpn: Option<Vec<u8>>,
    /// The TLS version, such as `TLSv1.3`.
    pub version: Option<&'static str>,
    /// The group of the key exchange, such as `X25519MLKEM768`.
    pub group: Option<&'static str>,
}

/// Why a finished handshake gives no connection.
#[derive(Debug, thiserror::Error)]
pub enum FinishError {
    /// Who the peer is cannot be proven.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// rustls does not hand the connection over.
    #[error("take over the connection after its handshake")]
    Tls(#[from] Error),
}

impl Handshake {
    /// The side that connects.
    ///
    /// # Errors
    /// If rustls does not take the configuration.
    pub fn client(config: Arc<ClientConfig>, name: ServerName<'static>) -> Result<Self, Error> {
        Ok(Self::new(Connection::Client(UnbufferedClientConnection::new(config, name)?)))
    }

    /// The side that is connected to.
    ///
    /// # Errors
    /// If rustls does not take the configuration.
    pub fn server(config: Arc<ServerConfig>) -> Result<Self, Error> {
        Ok(Self::new(Connection::Server(UnbufferedServerConnection::new(config)?)))
    }

    fn new(connection: Connection) -> Self {
        Self { connection, incoming: Vec::new(), taken: 0, early: Vec::new() }
    }

    /// Takes bytes of the peer and writes the answer behind what is in `out`: to be sent also after
    /// an error, for it is the alert then.
    ///
    /// # Errors
    /// If the handshake fails.
    pub fn advance(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<Progress, Error> {
        self.taken = self.taken.saturating_add(bytes.len());
        if self.taken > MAX_HANDSHAKE {
            return Err(Error::General(format!("a handshake of more than {MAX_HANDSHAKE} bytes")));
        }
        self.incoming.extend_from_slice(bytes);
        loop {
            let (used, step) = self.step(out);
            match step {
                Ok(Step::Again) => {}
                Ok(Step::Blocked) => {
                    self.discard(used);
                    return Ok(Progress::NeedsBytes);
                }
                Ok(Step::Done) => {
                    self.discard(used);
                    return Ok(Progress::Done);
                }
                Err(error) => {
                    // What rustls wants to say about it comes out of the next calls. They get the
                    // same bytes: its places in them stay where they are.
                    while let (_, Ok(Step::Again)) = self.step(out) {}
                    return Err(error);
                }
            }
            self.discard(used);
        }
    }

    fn step(&mut self, out: &mut Vec<u8>) -> (usize, Result<Step, Error>) {
        let Self { connection, incoming, early, .. } = self;
        match connection {
            Connection::Client(connection) => {
                step(connection.process_tls_records(incoming), out, early)
            }
            Connection::Server(connection) => {
                step(connection.process_tls_records(incoming), out, early)
            }
        }
    }

    fn discard(&mut self, used: usize) {
        self.incoming.drain(..used.min(self.incoming.len()));
    }

    /// Proves the peer and takes the connection over. Only after [`Progress::Done`].
    ///
    /// # Errors
    /// If the peer's certificate is not acceptable, or the handshake is not done.
    pub fn finish(self, bundle: &TrustBundle, now: Timestamp) -> Result<Established, FinishError> {
        let (state, peer_is_server): (&CommonState, _) = match &self.connection {
            Connection::Client(connection) => (connection, true),
            Connection::Server(connection) => (connection, false),
        };
        let peer = peer_of(state, bundle, peer_is_server, now)?;
        let alpn = state.alpn_protocol().map(<[u8]>::to_vec);
        let version =
            (state.protocol_version() == Some(ProtocolVersion::TLSv1_3)).then_some("TLSv1.3");
        let group = state.negotiated_key_exchange_group().and_then(|group| group.name().as_str());
        // No other version is in the configuration, whatever rustls was built with.
        let suite = state
            .negotiated_cipher_suite()
            .and_then(|suite| suite.tls13())
            .ok_or(Error::HandshakeNotComplete)?;
        let key_limit = suite.common.confidentiality_limit;
        let (extracted, secrets) = match self.connection {
            Connection::Client(connection) => {
                let (extracted, kernel) = connection.dangerous_into_kernel_connection()?;
                (extracted, Secrets::Client(kernel))
            }
            Connection::Server(connection) => {
                let (extracted, kernel) = connection.dangerous_into_kernel_connection()?;
                (extracted, Secrets::Server(kernel))
            }
        };
        let binding = match secrets {
            Secrets::Client(_) => binding(&extracted.tx.1, &extracted.rx.1),
            Secrets::Server(_) => binding(&extracted.rx.1, &extracted.tx.1),
        }?;
        let channel = Channel::new(extracted.tx, extracted.rx, secrets, key_limit)?;
        Ok(Established {
            channel,
            peer,
            token: CallerToken::of(&binding)?,
            name: name_of(&binding)?,
            binding,
            // An exact copy: the room that the handshake needed goes.
            plaintext: self.early.as_slice().to_vec(),
            ciphertext: self.incoming.as_slice().to_vec(),
            alpn,
            version,
            group,
        })
    }
}

enum Step {
    Again,
    Blocked,
    Done,
}

fn step<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    out: &mut Vec<u8>,
    early: &mut Vec<u8>,
) -> (usize, Result<Step, Error>) {
    let mut discard = status.discard;
    let step = match status.state {
        Err(error) => Err(error),
        Ok(ConnectionState::EncodeTlsData(mut encode)) => {
            let start = out.len();
            let encoded = match encode.encode(&mut []) {
                Ok(length) => Ok(length),
                Err(EncodeError::InsufficientSize(size)) => {
                    out.resize(start + size.required_size, 0);
                    encode.encode(&mut out[start..])
                }
                Err(error) => Err(error),
            };
            encoded.map(|_| Step::Again).map_err(|error| Error::General(error.to_string()))
        }
        Ok(ConnectionState::TransmitTlsData(transmit)) => {
            // The caller sends `out` before it waits for an answer.
            transmit.done();
            Ok(Step::Again)
        }
        Ok(ConnectionState::ReadTraffic(mut traffic)) => {
            let mut read = Ok(Step::Again);
            while let Some(record) = traffic.next_record() {
                match record {
                    Ok(record) => {
                        discard += record.discard;
                        early.extend_from_slice(record.payload);
                    }
                    Err(error) => read = Err(error),
                }
            }
            read
        }
        Ok(ConnectionState::BlockedHandshake) => Ok(Step::Blocked),
        Ok(ConnectionState::WriteTraffic(_)) => Ok(Step::Done),
        // 0-RTT is never offered nor taken; a peer that closes now has said nothing.
        Ok(_) => Err(Error::General("the peer closed in its handshake".to_owned())),
    };
    (discard, step)
}

/// One way from the first traffic keys, which depend on the whole transcript of the handshake: two
/// connections with the same value would have to have the same keys.
fn binding(
    of_client: &ConnectionTrafficSecrets,
    of_server: &ConnectionTrafficSecrets,
) -> Result<[u8; 32], Error> {
    let mut keys = zeroize::Zeroizing::new(Vec::with_capacity(96));
    for secrets in [of_client, of_server] {
        let (key, iv) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv }
            | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
            | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (key, iv),
            _ => return Err(Error::General("a cipher that is not known here".to_owned())),
        };
        keys.extend_from_slice(key.as_ref());
        keys.extend_from_slice(iv.as_ref());
    }
    let mut value = [0; 32];
    derive(&keys, b"channel binding", &mut value)?;
    Ok(value)
}

/// A name for a connection that only its two ends know. It tells nothing of any other value of it.
fn name_of(binding: &[u8; 32]) -> Result<[u8; 16], Error> {
    let mut name = [0; 16];
    derive(binding, b"session name", &mut name)?;
    Ok(name)
}

/// Derives at most 32 bytes of a secret.
fn derive(secret: &[u8], info: &[u8], out: &mut [u8]) -> Result<(), Error> {
    let mut value = [0; 32];
    hkdf::Salt::new(hkdf::HKDF_SHA256, b"hauberk/1")
        .extract(secret)
        .expand(&[info], hkdf::HKDF_SHA256)
        .and_then(|okm| okm.fill(&mut value))
        .map_err(|_| Error::General("derive a value of the connection".to_owned()))?;
    for (to, from) in out.iter_mut().zip(value) {
        *to = from;
    }
    Ok(())
}

/// What the two ends of a connection know, and nobody else: the source has it in the hello of its next connection to
/// the same destination, which tells that there was an earlier one, and whose. It proves nothing more, as whoever sees
/// that hello can repeat it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct CallerToken([u8; 16]);

/// What stands before a token in a ClientHello, where it is an application protocol that nobody speaks.
const TOKEN_PREFIX: &[u8] = b"hauberk/1 caller ";

impl CallerToken {
    #[cfg(test)]
    pub(crate) fn new(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// That of the connection with this [`binding`](Established::binding).
    fn of(binding: &[u8; 32]) -> Result<Self, Error> {
        let mut token = [0; 16];
        derive(binding, b"caller token", &mut token)?;
        Ok(Self(token))
    }

    pub(crate) fn to_protocol(self) -> Vec<u8> {
        [TOKEN_PREFIX, &self.0].concat()
    }

    fn from_protocol(protocol: &[u8]) -> Option<Self> {
        protocol.strip_prefix(TOKEN_PREFIX)?.try_into().ok().map(Self)
    }
}

impl std::fmt::Debug for CallerToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CallerToken(..)")
    }
}

/// How far the beginning of a connection can be read.
#[derive(Debug, PartialEq, Eq)]
pub enum Hello {
    /// The ClientHello is not whole.
    Incomplete,
    /// It is.
    Read {
        /// The name that the connection is for, if it has one.
        server_name: Option<String>,
        /// That of an earlier connection, if it has one.
        token: Option<CallerToken>,
    },
}

/// Reads a ClientHello, so that it is known before the handshake begins who may be calling, and a certificate can be
/// waited for. After an error `out` holds the alert to send.
///
/// # Errors
/// If the bytes are not the beginning of a TLS handshake.
pub fn read_hello(bytes: &[u8], out: &mut Vec<u8>) -> Result<Hello, Error> {
    if bytes.len() > MAX_HELLO {
        return Err(Error::General(format!("a ClientHello of more than {MAX_HELLO} bytes")));
    }
    let mut acceptor = Acceptor::default();
    let mut rest = bytes;
    while !rest.is_empty() {
        acceptor.read_tls(&mut rest).map_err(|error| Error::General(error.to_string()))?;
        match acceptor.accept() {
            Ok(None) => {}
            Ok(Some(accepted)) => {
                let hello = accepted.client_hello();
                let server_name = hello.server_name().map(str::to_owned);
                let mut protocols = hello.alpn().into_iter().flatten();
                let token = protocols.find_map(CallerToken::from_protocol);
                return Ok(Hello::Read { server_name, token });
            }
            Err((error, mut alert)) => {
                // Into memory: cannot fail.
                drop(alert.write_all(out));
                return Err(error);
            }
        }
    }
    Ok(Hello::Incomplete)
}
