//! The frames that two agents exchange inside one mutual TLS connection, as bytes.
//!
//! ```text
//! frame   = type (1 byte) length (3 bytes, big endian) body (length bytes)
//! ```
//!
//! Nothing a peer says is trusted for an allocation: every type has its own limit, checked on the
//! four bytes of the header, before any of the body is kept.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::policy::Reason;

/// The application protocol negotiated in the TLS handshake; versions the frames.
pub const ALPN: &[u8] = b"hauberk/1";

/// Bytes of a frame header.
pub const HEADER_LENGTH: usize = 4;

/// The longest run of application bytes in one frame. A run is relayed as it arrives, never
/// gathered, so that this bounds no buffer; it is what three length bytes can say.
pub const MAX_DATA: usize = (1 << 24) - 1;

/// The longest body of a frame that is gathered before it is read: a certificate chain is the
/// longest of them.
pub const MAX_CONTROL: usize = 16 * 1024;

/// The longest text in a refusal.
const MAX_TEXT: usize = 1024;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameType {
    /// The source opens a stream.
    Open,
    /// The destination took it: the application's connection stands.
    Accept,
    /// The destination refuses it, with the reason.
    Refuse,
    /// A run of application bytes.
    Data,
    /// This side's application has sent its last byte.
    Fin,
    /// The stream is broken off.
    Reset,
    /// A new certificate of the sender, bound to this connection.
    Reauthenticate,
}

impl FrameType {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Open,
            2 => Self::Accept,
            3 => Self::Refuse,
            4 => Self::Data,
            5 => Self::Fin,
            6 => Self::Reset,
            7 => Self::Reauthenticate,
            _ => return None,
        })
    }

    fn byte(self) -> u8 {
        match self {
            Self::Open => 1,
            Self::Accept => 2,
            Self::Refuse => 3,
            Self::Data => 4,
            Self::Fin => 5,
            Self::Reset => 6,
            Self::Reauthenticate => 7,
        }
    }
}

/// A frame's header, with a length that its type may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub frame_type: FrameType,
    /// How many bytes follow.
    pub length: usize,
}

impl Header {
    /// Reads a header and checks the length against the type's limit.
    ///
    /// # Errors
    /// If the type is unknown or the length is over its limit: the session must end.
    pub fn decode(bytes: [u8; HEADER_LENGTH]) -> Result<Self, FrameError> {
        let [type_byte, a, b, c] = bytes;
        let length = (usize::from(a) << 16) | (usize::from(b) << 8) | usize::from(c);
        let frame_type =
            FrameType::from_byte(type_byte).ok_or(FrameError::UnknownType(type_byte))?;
        let limit = match frame_type {
            FrameType::Data => MAX_DATA,
            FrameType::Open | FrameType::Refuse | FrameType::Reauthenticate => MAX_CONTROL,
            FrameType::Accept | FrameType::Fin => 0,
            FrameType::Reset => 1,
        };
        if length > limit {
            return Err(FrameError::TooLong { frame_type, length, limit });
        }
        if frame_type == FrameType::Data && length == 0 {
            return Err(FrameError::EmptyData);
        }
        Ok(Self { frame_type, length })
    }

    /// Writes the header of a frame with `length` body bytes.
    ///
    /// # Errors
    /// If the length does not fit into three bytes.
    pub fn encode(frame_type: FrameType, length: usize) -> Result<[u8; HEADER_LENGTH], FrameError> {
        let too_long = FrameError::TooLong { frame_type, length, limit: MAX_DATA };
        let wide = u32::try_from(length).map_err(|_| too_long.clone())?;
        match wide.to_be_bytes() {
            [0, a, b, c] => Ok([frame_type.byte(), a, b, c]),
            _ => Err(too_long),
        }
    }
}

/// The first frame of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Open {
    /// Names the connection at both ends.
    pub connection_id: [u8; 16],
    /// Where the application wanted to go.
    pub original_destination: SocketAddr,
    /// Where it came from.
    pub source_address: SocketAddr,
}

/// What the destination tells the caller's agent when it refuses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Why.
    pub cause: RefusalCause,
    /// The policy that speaks about the destination, if one does.
    pub policy: String,
    /// The nearest rule, if there is one.
    pub rule: String,
    /// Whom to ask.
    pub owner: String,
    /// What came nearest.
    pub nearest_miss: String,
    /// What the owner could change.
    pub mend: String,
}

/// Whose fault a refusal is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusalCause {
    /// The decision, with its reason.
    Denied(Reason),
    /// Allowed, but the application could not be reached.
    Unreachable,
}

/// Why a stream is broken off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetCause {
    /// The application's connection was reset or failed.
    Application,
    /// A policy change no longer allows it.
    PolicyRevoked,
    /// The peer's certificate expired and no newer one came.
    CertificateExpired,
    /// This agent is stopping.
    Draining,
    /// The other side broke the protocol.
    Protocol,
}

impl ResetCause {
    /// The byte on the wire.
    #[must_use]
    pub fn byte(self) -> u8 {
        match self {
            Self::Application => 1,
            Self::PolicyRevoked => 2,
            Self::CertificateExpired => 3,
            Self::Draining => 4,
            Self::Protocol => 5,
        }
    }

    /// Reads the byte.
    ///
    /// # Errors
    /// If it is none of the known ones.
    pub fn from_byte(byte: u8) -> Result<Self, FrameError> {
        [
            Self::Application,
            Self::PolicyRevoked,
            Self::CertificateExpired,
            Self::Draining,
            Self::Protocol,
        ]
        .into_iter()
        .find(|cause| cause.byte() == byte)
        .ok_or(FrameError::UnknownResetCause(byte))
    }
}

/// A newer certificate of the sender, with the proof that the same party sends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reauthenticate {
    /// Counts up from 1 in each direction, so that none can be replayed.
    pub sequence: u32,
    /// The TLS signature scheme of the signature.
    pub scheme: u16,
    /// Over the connection's exporter value, the direction, the sequence and the chain.
    pub signature: Vec<u8>,
    /// Leaf first, DER.
    pub chain: Vec<Vec<u8>>,
}

/// A frame that breaks the protocol. The session ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The type is unknown.
    #[error("unknown frame type {0}")]
    UnknownType(u8),
    /// The body is longer than its type may be.
    #[error("{frame_type:?} frame of {length} bytes, at most {limit} are allowed")]
    TooLong {
        /// The type.
        frame_type: FrameType,
        /// Its length.
        length: usize,
        /// The limit.
        limit: usize,
    },
    /// A data frame says nothing.
    #[error("empty data frame")]
    EmptyData,
    /// The body ends early.
    #[error("{0} frame ends in the middle of {1}")]
    Truncated(&'static str, &'static str),
    /// The body goes on after its end.
    #[error("{0} frame has {1} bytes too many")]
    Trailing(&'static str, usize),
    /// An address family other than 4 and 6.
    #[error("unknown address family {0}")]
    UnknownFamily(u8),
    /// A text is not UTF-8 or has control characters.
    #[error("{0} is not printable text")]
    NotText(&'static str),
    /// A reason outside the closed set.
    #[error("unknown refusal reason {0:?}")]
    UnknownReason(String),
    /// A reset cause outside the closed set.
    #[error("unknown reset cause {0}")]
    UnknownResetCause(u8),
    /// A certificate chain longer than any we issue.
    #[error("certificate chain of {0} certificates")]
    ChainTooLong(usize),
    /// A frame at a time when it may not come.
    #[error("{0:?} frame out of turn")]
    OutOfTurn(FrameType),
}

/// The most certificates in a chain: leaf, intermediate, and one cross-signed CA.
const MAX_CHAIN: usize = 4;

impl Open {
    /// The body of the frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(64);
        body.extend_from_slice(&self.connection_id);
        put_address(&mut body, self.original_destination);
        put_address(&mut body, self.source_address);
        body
    }

    /// Reads the body of the frame.
    ///
    /// # Errors
    /// If it is not exactly an open frame.
    pub fn decode(body: &[u8]) -> Result<Self, FrameError> {
        let mut reader = Reader { frame: "open", rest: body };
        let open = Self {
            connection_id: reader.array("connection id")?,
            original_destination: reader.address("original destination")?,
            source_address: reader.address("source address")?,
        };
        reader.end()?;
        Ok(open)
    }
}

impl Refusal {
    /// The body of the frame. Texts over the limit are cut.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(256);
        let word = match self.cause {
            RefusalCause::Denied(reason) => reason.as_str(),
            RefusalCause::Unreachable => UNREACHABLE,
        };
        for text in [word, &self.policy, &self.rule, &self.owner, &self.nearest_miss, &self.mend] {
            put_text(&mut body, text);
        }
        body
    }

    /// Reads the body of the frame.
    ///
    /// # Errors
    /// If it is not exactly a refusal with a known reason.
    pub fn decode(body: &[u8]) -> Result<Self, FrameError> {
        let mut reader = Reader { frame: "refuse", rest: body };
        let word = reader.text("reason")?;
        let cause = if word == UNREACHABLE {
            RefusalCause::Unreachable
        } else {
            RefusalCause::Denied(word.parse().map_err(|_| FrameError::UnknownReason(word))?)
        };
        let refusal = Self {
            cause,
            policy: reader.text("policy")?,
            rule: reader.text("rule")?,
            owner: reader.text("owner")?,
            nearest_miss: reader.text("nearest miss")?,
            mend: reader.text("mend")?,
        };
        reader.end()?;
        Ok(refusal)
    }
}

const UNREACHABLE: &str = "unreachable";

impl Reauthenticate {
    /// The body of the frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(2048);
        body.extend_from_slice(&self.sequence.to_be_bytes());
        body.extend_from_slice(&self.scheme.to_be_bytes());
        put_bytes(&mut body, &self.signature);
        for certificate in &self.chain {
            put_bytes(&mut body, certificate);
        }
        body
    }

    /// Reads the body of the frame.
    ///
    /// # Errors
    /// If it is not exactly such a frame with one to four certificates.
    pub fn decode(body: &[u8]) -> Result<Self, FrameError> {
        let mut reader = Reader { frame: "reauthenticate", rest: body };
        let sequence = u32::from_be_bytes(reader.array("sequence")?);
        let scheme = u16::from_be_bytes(reader.array("scheme")?);
        let signature = reader.bytes("signature")?.to_vec();
        let mut chain = Vec::new();
        while !reader.rest.is_empty() {
            if chain.len() == MAX_CHAIN {
                return Err(FrameError::ChainTooLong(chain.len() + 1));
            }
            chain.push(reader.bytes("certificate")?.to_vec());
        }
        if chain.is_empty() {
            return Err(FrameError::Truncated("reauthenticate", "certificate"));
        }
        Ok(Self { sequence, scheme, signature, chain })
    }

    /// What the signature is over. `from_source` says which side sends; `exporter` is the TLS
    /// exporter value of this connection, so that the proof is worth nothing on another.
    #[must_use]
    pub fn signed_message(
        exporter: &[u8; 32],
        from_source: bool,
        sequence: u32,
        chain: &[Vec<u8>],
    ) -> Vec<u8> {
        let mut message = b"hauberk/1 reauthenticate\0".to_vec();
        message.push(u8::from(from_source));
        message.extend_from_slice(exporter);
        message.extend_from_slice(&sequence.to_be_bytes());
        for certificate in chain {
            put_bytes(&mut message, certificate);
        }
        message
    }
}

/// The label of the TLS exporter whose value binds a [`Reauthenticate`] to its connection.
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-hauberk-1-reauthenticate";

fn put_address(body: &mut Vec<u8>, address: SocketAddr) {
    match address.ip() {
        IpAddr::V4(ip) => {
            body.push(4);
            body.extend_from_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            body.push(6);
            body.extend_from_slice(&ip.octets());
        }
    }
    body.extend_from_slice(&address.port().to_be_bytes());
}

fn put_bytes(body: &mut Vec<u8>, bytes: &[u8]) {
    // Longer than this is nothing we send; a cut certificate or signature is refused by its reader.
    let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
    body.extend_from_slice(&length.to_be_bytes());
    body.extend_from_slice(bytes.get(..usize::from(length)).unwrap_or(bytes));
}

fn put_text(body: &mut Vec<u8>, text: &str) {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let clean: String = text.get(..end).unwrap_or("").chars().filter(|c| !c.is_control()).collect();
    put_bytes(body, clean.as_bytes());
}

struct Reader<'a> {
    frame: &'static str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize, what: &'static str) -> Result<&'a [u8], FrameError> {
        let (taken, rest) =
            self.rest.split_at_checked(length).ok_or(FrameError::Truncated(self.frame, what))?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], FrameError> {
        let (taken, rest) =
            self.rest.split_first_chunk().ok_or(FrameError::Truncated(self.frame, what))?;
        self.rest = rest;
        Ok(*taken)
    }

    fn address(&mut self, what: &'static str) -> Result<SocketAddr, FrameError> {
        let [family] = self.array(what)?;
        let ip = match family {
            4 => IpAddr::V4(Ipv4Addr::from(self.array::<4>(what)?)),
            6 => IpAddr::V6(Ipv6Addr::from(self.array::<16>(what)?)),
            _ => return Err(FrameError::UnknownFamily(family)),
        };
        Ok(SocketAddr::new(ip, u16::from_be_bytes(self.array(what)?)))
    }

    fn bytes(&mut self, what: &'static str) -> Result<&'a [u8], FrameError> {
        let length = usize::from(u16::from_be_bytes(self.array(what)?));
        self.take(length, what)
    }

    fn text(&mut self, what: &'static str) -> Result<String, FrameError> {
        let bytes = self.bytes(what)?;
        if bytes.len() > MAX_TEXT {
            return Err(FrameError::NotText(what));
        }
        let text = std::str::from_utf8(bytes).map_err(|_| FrameError::NotText(what))?;
        if text.chars().any(char::is_control) {
            return Err(FrameError::NotText(what));
        }
        Ok(text.to_owned())
    }

    fn end(self) -> Result<(), FrameError> {
        match self.rest.len() {
            0 => Ok(()),
            more => Err(FrameError::Trailing(self.frame, more)),
        }
    }
}
