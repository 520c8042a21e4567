//! The bodies of control frames, as bytes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::FrameError;
use crate::policy::Reason;

/// The longest text in a refusal.
const MAX_TEXT: usize = 1024;

/// The first frame of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Open {
    /// Names the connection at both ends.
    pub connection_id: [u8; 16],
    /// The trace that the connection belongs to, as W3C Trace Context has it; all zero: none.
    pub trace_id: [u8; 16],
    /// Where the application wanted to go.
    pub original_destination: SocketAddr,
    /// Where it came from.
    pub source_address: SocketAddr,
}

/// The first frame on a session that carries on with a stream of a multiplexed one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Continue {
    /// The name of that session, which only its two ends know.
    pub session: [u8; 16],
    /// The stream's number there.
    pub stream: u32,
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
    /// Nothing broke here: ends this direction after the other side refused or reset the stream.
    Answer,
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
            Self::Answer => 6,
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
            Self::Answer,
        ]
        .into_iter()
        .find(|cause| cause.byte() == byte)
        .ok_or(FrameError::UnknownResetCause(byte))
    }
}

/// A newer certificate of the sender, with the proof that the same party sends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reauthenticate {
    /// Counts up in each direction, so that none can be replayed; a number may be left out.
    pub sequence: u32,
    /// The TLS signature scheme of the signature.
    pub scheme: u16,
    /// Over the connection's exporter value, the direction, the sequence and the chain.
    pub signature: Vec<u8>,
    /// Leaf first, DER.
    pub chain: Vec<Vec<u8>>,
}

/// The most certificates in a chain: leaf, intermediate, and one cross-signed CA.
const MAX_CHAIN: usize = 4;

impl Open {
    /// The body of the frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(72);
        body.extend_from_slice(&self.connection_id);
        body.extend_from_slice(&self.trace_id);
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
            trace_id: reader.array("trace id")?,
            original_destination: reader.address("original destination")?,
            source_address: reader.address("source address")?,
        };
        reader.end()?;
        Ok(open)
    }
}

impl Continue {
    /// The body of the frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        [&self.session[..], &self.stream.to_be_bytes()].concat()
    }

    /// Reads the body of the frame.
    ///
    /// # Errors
    /// If it is not exactly such a frame.
    pub fn decode(body: &[u8]) -> Result<Self, FrameError> {
        let mut reader = Reader { frame: "continue", rest: body };
        let session = reader.array("session")?;
        let stream = u32::from_be_bytes(reader.array("stream")?);
        reader.end()?;
        Ok(Self { session, stream })
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

    /// What the signature is over. `from_source` says which side sends; `binding` is the value that
    /// only the two ends of this very TLS connection know, so that the proof is worth nothing on
    /// another.
    #[must_use]
    pub fn signed_message(
        binding: &[u8; 32],
        from_source: bool,
        sequence: u32,
        chain: &[Vec<u8>],
    ) -> Vec<u8> {
        let mut message = b"hauberk/1 reauthenticate\0".to_vec();
        message.push(u8::from(from_source));
        message.extend_from_slice(binding);
        message.extend_from_slice(&sequence.to_be_bytes());
        for certificate in chain {
            put_bytes(&mut message, certificate);
        }
        message
    }
}

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
