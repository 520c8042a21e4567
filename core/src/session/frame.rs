//! Frame headers: what may follow, and how long it may be.

use super::reader::ReadHeader;

/// The application protocol of a dedicated session, negotiated in the TLS handshake: one stream after another.
pub const ALPN: &[u8] = b"hauberk/1";

/// The application protocol of a multiplexed session: many streams at a time.
pub const ALPN_MULTIPLEXED: &[u8] = b"hauberk/2";

/// Bytes of a frame header on a dedicated session.
pub const HEADER_LENGTH: usize = 4;

/// Bytes of a frame header on a multiplexed session: as the others, and the stream's number.
pub const NUMBERED_HEADER_LENGTH: usize = 8;

/// The longest run of application bytes in one frame. A run is relayed as it arrives, never
/// gathered, so that this bounds no buffer; it is what three length bytes can say.
pub const MAX_DATA: usize = (1 << 24) - 1;

/// The longest body of a frame that is gathered before it is read: a certificate chain is the
/// longest of them.
pub const MAX_CONTROL: usize = 16 * 1024;

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
    /// The destination takes no further streams on this session.
    GoingAway,
    /// The source has a dedicated session carry on with a stream of a multiplexed one.
    Continue,
    /// The sender takes more bytes of a stream; on a multiplexed session.
    Credit,
    /// The destination has more for a stream than a multiplexed session should carry.
    Bulk,
    /// What follows in this direction of a stream comes on the session that carries on with it.
    Moved,
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
            8 => Self::GoingAway,
            9 => Self::Continue,
            10 => Self::Credit,
            11 => Self::Bulk,
            12 => Self::Moved,
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
            Self::GoingAway => 8,
            Self::Continue => 9,
            Self::Credit => 10,
            Self::Bulk => 11,
            Self::Moved => 12,
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
    /// The stream it is about; 0 if it is about none, and on a dedicated session.
    pub stream: u32,
}

impl Header {
    /// Reads a header of a dedicated session, and checks the length against the type's limit.
    ///
    /// # Errors
    /// If the type is unknown or the length is over its limit: the session must end.
    pub fn decode(bytes: [u8; HEADER_LENGTH]) -> Result<Self, FrameError> {
        let (frame_type, length) = begin(bytes, Kind::Dedicated)?;
        Ok(Self { frame_type, length, stream: 0 })
    }

    /// Reads a header of a multiplexed session.
    ///
    /// # Errors
    /// If the type is unknown, the length is over its limit, or a stream is named where there can be none or
    /// the other way round: the session must end.
    pub fn decode_numbered(bytes: [u8; NUMBERED_HEADER_LENGTH]) -> Result<Self, FrameError> {
        let [a, b, c, d, number @ ..] = bytes;
        let (frame_type, length) = begin([a, b, c, d], Kind::Multiplexed)?;
        let stream = u32::from_be_bytes(number);
        let of_session = matches!(frame_type, FrameType::Reauthenticate | FrameType::GoingAway);
        if of_session != (stream == 0) {
            return Err(FrameError::WrongNumber { frame_type, stream });
        }
        Ok(Self { frame_type, length, stream })
    }

    /// Writes the header of a frame with `length` body bytes, on a dedicated session.
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

    /// The same on a multiplexed session.
    ///
    /// # Errors
    /// If the length does not fit into three bytes.
    pub fn encode_numbered(
        frame_type: FrameType,
        stream: u32,
        length: usize,
    ) -> Result<[u8; NUMBERED_HEADER_LENGTH], FrameError> {
        let [a, b, c, d] = Self::encode(frame_type, length)?;
        let [e, f, g, h] = stream.to_be_bytes();
        Ok([a, b, c, d, e, f, g, h])
    }
}

/// The kind of a session.
#[derive(Clone, Copy)]
enum Kind {
    Dedicated,
    Multiplexed,
}

/// What both kinds of header begin with.
fn begin([byte, a, b, c]: [u8; 4], kind: Kind) -> Result<(FrameType, usize), FrameError> {
    let length = (usize::from(a) << 16) | (usize::from(b) << 8) | usize::from(c);
    let unknown = || FrameError::UnknownType(byte);
    let frame_type = FrameType::from_byte(byte).ok_or_else(unknown)?;
    let (least, limit) = bounds(frame_type, kind).ok_or_else(unknown)?;
    if length > limit {
        return Err(FrameError::TooLong { frame_type, length, limit });
    }
    if length < least {
        return Err(FrameError::TooShort { frame_type, length, least });
    }
    Ok((frame_type, length))
}

/// The least and the greatest length; none if a session of that kind has no such frame.
fn bounds(frame_type: FrameType, kind: Kind) -> Option<(usize, usize)> {
    let bounds = match (frame_type, kind) {
        (FrameType::Data, _) => (1, MAX_DATA),
        (FrameType::Open | FrameType::Refuse | FrameType::Reauthenticate, _) => (1, MAX_CONTROL),
        (FrameType::Accept | FrameType::Fin, _) => (0, 0),
        (FrameType::GoingAway, _) => (4, 4),
        (FrameType::Reset, Kind::Dedicated) => (5, 5),
        (FrameType::Reset, Kind::Multiplexed) => (1, 1),
        (FrameType::Continue, Kind::Dedicated) => (20, 20),
        (FrameType::Credit, Kind::Multiplexed) => (4, 4),
        (FrameType::Bulk | FrameType::Moved, Kind::Multiplexed) => (0, 0),
        (FrameType::Continue, Kind::Multiplexed)
        | (FrameType::Credit | FrameType::Bulk | FrameType::Moved, Kind::Dedicated) => return None,
    };
    Some(bounds)
}

impl ReadHeader for [u8; HEADER_LENGTH] {
    fn read_header(&self) -> Result<Header, FrameError> {
        Header::decode(*self)
    }
}

impl ReadHeader for [u8; NUMBERED_HEADER_LENGTH] {
    fn read_header(&self) -> Result<Header, FrameError> {
        Header::decode_numbered(*self)
    }
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
    /// The body is shorter than its type can be.
    #[error("{frame_type:?} frame of {length} bytes, at least {least} are needed")]
    TooShort {
        /// The type.
        frame_type: FrameType,
        /// Its length.
        length: usize,
        /// The least.
        least: usize,
    },
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
    /// Something about a stream that was never opened.
    #[error("stream {got} is spoken of, the last one is {last}")]
    UnknownStream {
        /// What came.
        got: u32,
        /// The last stream of the session.
        last: u32,
    },
    /// A stream is named where none can be, or none is where one must be.
    #[error("{frame_type:?} frame about stream {stream}")]
    WrongNumber {
        /// The type.
        frame_type: FrameType,
        /// The stream.
        stream: u32,
    },
    /// More bytes of a stream than this side has said that it takes.
    #[error("{length} bytes of a stream, at most {credit} are taken now")]
    OverCredit {
        /// What came.
        length: usize,
        /// What was allowed.
        credit: u32,
    },
    /// The peer allows more bytes of a stream than can be counted.
    #[error("more credit than a stream can have")]
    TooMuchCredit,
    /// More streams at a time than a session can carry.
    #[error("more than {0} streams at a time")]
    TooManyAtATime(usize),
    /// More streams than a session can count.
    #[error("the session has had its last stream")]
    TooManyStreams,
}
