//! Frame headers: what may follow, and how long it may be.

/// The application protocol negotiated in the TLS handshake; versions everything here.
pub const ALPN: &[u8] = b"hauberk/1";

/// Bytes of a frame header.
pub const HEADER_LENGTH: usize = 4;

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
        let (least, limit) = match frame_type {
            FrameType::Data => (1, MAX_DATA),
            FrameType::Open | FrameType::Refuse | FrameType::Reauthenticate => (1, MAX_CONTROL),
            FrameType::Accept | FrameType::Fin => (0, 0),
            FrameType::Reset => (5, 5),
            FrameType::GoingAway => (4, 4),
        };
        if length > limit {
            return Err(FrameError::TooLong { frame_type, length, limit });
        }
        if length < least {
            return Err(FrameError::TooShort { frame_type, length, least });
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
    /// More streams than a session can count.
    #[error("the session has had its last stream")]
    TooManyStreams,
}
