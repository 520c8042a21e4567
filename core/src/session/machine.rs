//! The state of one session: which frames may come, which may be sent, and when it is free for the
//! next stream. Bytes in, events out; whoever owns the socket does the rest.
//!
//! A stream is over when each side has ended its direction: with `Fin` or `Reset`, or, on the
//! destination's side, with `Refuse`. Then the session is idle and the source may open the next one.

use super::{
    Continue, FrameError, FrameType, HEADER_LENGTH, Header, MAX_DATA, Open, Reauthenticate,
    Refusal, ResetCause,
    reader::{Part, Reader},
};

/// Which side of the session this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The caller's agent: opens streams.
    Source,
    /// The called workload's agent: takes or refuses them.
    Destination,
}

/// What came in.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// The source wants a stream.
    Open(Open),
    /// The source wants this session to carry on with a stream of a multiplexed one.
    Continue(Continue),
    /// The destination took it.
    Accept,
    /// The destination refused it. The source owes the end of its own direction: [`Machine::reset`].
    Refuse(Refusal),
    /// Bytes for the application.
    Data(&'a [u8]),
    /// The peer's application has sent its last byte.
    Fin,
    /// The peer broke the stream off. The end of the own direction is owed: [`Machine::reset`].
    Reset(ResetCause),
    /// The peer shows a newer certificate.
    Reauthenticate(Reauthenticate),
    /// The destination takes no further streams. The one that is under way goes on.
    GoingAway,
    /// The destination went away before it saw the stream: nothing of it was used, and it may be
    /// opened again on another session. This one is over.
    NotTaken,
}

/// The next thing in the bytes of the peer.
#[derive(Debug, PartialEq, Eq)]
pub struct Received<'a> {
    /// How many of the bytes are used up.
    pub used: usize,
    /// What they mean; nothing if they are the beginning of something, or are thrown away.
    pub event: Option<Event<'a>>,
}

/// A call that the state does not allow: an error of the caller, not of the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} frame cannot be sent now")]
pub struct Misuse(pub FrameType);

/// One session.
#[derive(Debug)]
pub struct Machine {
    role: Role,
    reader: Reader<HEADER_LENGTH>,
    sending: Sending,
    receiving: Receiving,
    /// The number of the last stream; the first is 1.
    stream: u32,
    reset_sent: bool,
    going_away: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sending {
    Idle,
    /// Destination: an answer is owed before anything else.
    Answering,
    Active,
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Receiving {
    Idle,
    /// Source: the answer to the open frame. Whether what follows is wanted.
    Answer(Wanted),
    Active(Wanted),
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Yes,
    /// The stream was broken off here: what is still on its way is thrown away.
    No,
}

impl Machine {
    /// A fresh session without a stream.
    #[must_use]
    pub fn new(role: Role) -> Self {
        Self {
            role,
            reader: Reader::new(),
            sending: Sending::Idle,
            receiving: Receiving::Idle,
            stream: 0,
            reset_sent: false,
            going_away: false,
        }
    }

    /// Which side this is.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// No stream is under way, and the next frame would begin anew.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.sending == Sending::Idle
            && self.receiving == Receiving::Idle
            && self.reader.is_between_frames()
    }

    /// Idle, and a further stream may come.
    #[must_use]
    pub fn is_reusable(&self) -> bool {
        self.is_idle() && !self.going_away && self.stream < u32::MAX
    }

    /// How many streams there were, the one under way included.
    #[must_use]
    pub fn streams(&self) -> u32 {
        self.stream
    }

    /// Application bytes may be sent.
    #[must_use]
    pub fn may_send(&self) -> bool {
        self.sending == Sending::Active
    }

    /// The peer may still send application bytes of this stream.
    #[must_use]
    pub fn expects_data(&self) -> bool {
        matches!(self.receiving, Receiving::Active(_) | Receiving::Answer(_))
    }

    /// Source: the destination has not answered yet.
    #[must_use]
    pub fn awaits_answer(&self) -> bool {
        matches!(self.receiving, Receiving::Answer(_))
    }

    /// Reads the next thing out of the peer's bytes. Call it until all are used.
    ///
    /// # Errors
    /// If the peer breaks the protocol: the session must end then, nothing after it counts.
    pub fn receive<'a>(&mut self, input: &'a [u8]) -> Result<Received<'a>, FrameError> {
        if self.going_away && self.role == Role::Destination && self.is_idle() {
            // The source learns from our count that nobody looked at what it opened meanwhile.
            return Ok(Received { used: input.len(), event: None });
        }
        let (used, part) = self.reader.read(input)?;
        let event = match part {
            Part::Nothing => None,
            Part::Begin(header) => {
                self.check_turn(header.frame_type)?;
                None
            }
            Part::Data(_, bytes) => match self.receiving {
                Receiving::Active(Wanted::Yes) => Some(Event::Data(bytes)),
                Receiving::Active(Wanted::No) => None,
                Receiving::Idle | Receiving::Answer(_) | Receiving::Done => {
                    return Err(FrameError::OutOfTurn(FrameType::Data));
                }
            },
            Part::Frame(header, body) => {
                self.check_turn(header.frame_type)?;
                self.take(header.frame_type, &body)?
            }
        };
        Ok(Received { used, event })
    }

    /// Source: asks for a stream.
    ///
    /// # Errors
    /// If one is under way, or the session takes no more.
    pub fn open(&mut self, open: &Open, out: &mut Vec<u8>) -> Result<(), Misuse> {
        if self.role != Role::Source || !self.is_reusable() {
            return Err(Misuse(FrameType::Open));
        }
        self.ask(FrameType::Open, &open.encode(), out);
        Ok(())
    }

    /// Source: asks that this session carries on with a stream of a multiplexed one.
    ///
    /// # Errors
    /// If a stream is under way, or the session takes no more.
    pub fn carry_on(&mut self, stream: &Continue, out: &mut Vec<u8>) -> Result<(), Misuse> {
        if self.role != Role::Source || !self.is_reusable() {
            return Err(Misuse(FrameType::Continue));
        }
        self.ask(FrameType::Continue, &stream.encode(), out);
        Ok(())
    }

    fn ask(&mut self, frame_type: FrameType, body: &[u8], out: &mut Vec<u8>) {
        put_frame(out, frame_type, body);
        self.stream += 1;
        self.reset_sent = false;
        self.sending = Sending::Active;
        self.receiving = Receiving::Answer(Wanted::Yes);
    }

    /// Destination: takes the stream.
    ///
    /// # Errors
    /// If no answer is owed.
    pub fn accept(&mut self, out: &mut Vec<u8>) -> Result<(), Misuse> {
        if self.sending != Sending::Answering {
            return Err(Misuse(FrameType::Accept));
        }
        put_frame(out, FrameType::Accept, &[]);
        self.sending = Sending::Active;
        Ok(())
    }

    /// Destination: refuses the stream. What the source has sent already is thrown away.
    ///
    /// # Errors
    /// If no answer is owed.
    pub fn refuse(&mut self, refusal: &Refusal, out: &mut Vec<u8>) -> Result<(), Misuse> {
        if self.sending != Sending::Answering {
            return Err(Misuse(FrameType::Refuse));
        }
        put_frame(out, FrameType::Refuse, &refusal.encode());
        self.sending = Sending::Done;
        self.discard();
        self.settle();
        Ok(())
    }

    /// The header of a run of `length` application bytes, which must follow it.
    ///
    /// # Errors
    /// If no bytes may be sent now, or none or too many are to be.
    pub fn data(&self, length: usize) -> Result<[u8; HEADER_LENGTH], Misuse> {
        if self.sending != Sending::Active || length == 0 || length > MAX_DATA {
            return Err(Misuse(FrameType::Data));
        }
        Header::encode(FrameType::Data, length).map_err(|_| Misuse(FrameType::Data))
    }

    /// The application here has sent its last byte.
    ///
    /// # Errors
    /// If its direction is not open.
    pub fn fin(&mut self, out: &mut Vec<u8>) -> Result<(), Misuse> {
        if self.sending != Sending::Active {
            return Err(Misuse(FrameType::Fin));
        }
        put_frame(out, FrameType::Fin, &[]);
        self.sending = Sending::Done;
        self.settle();
        Ok(())
    }

    /// Breaks the stream off, in both directions; where an answer is owed, this is it. Does nothing
    /// if the stream is over or broken off already.
    pub fn reset(&mut self, cause: ResetCause, out: &mut Vec<u8>) {
        if self.reset_sent || self.sending == Sending::Idle {
            return;
        }
        let mut body = [0; 5];
        if let Some((number, byte)) = body.split_first_chunk_mut::<4>() {
            *number = self.stream.to_be_bytes();
            if let Some(byte) = byte.first_mut() {
                *byte = cause.byte();
            }
        }
        put_frame(out, FrameType::Reset, &body);
        self.reset_sent = true;
        self.sending = Sending::Done;
        self.discard();
        self.settle();
    }

    /// Shows the peer a newer certificate. May come at any time.
    pub fn reauthenticate(&mut self, proof: &Reauthenticate, out: &mut Vec<u8>) {
        put_frame(out, FrameType::Reauthenticate, &proof.encode());
    }

    /// Destination: tells the source that no further stream is taken. Whatever it opens after this
    /// is not looked at. Says nothing the second time.
    ///
    /// # Errors
    /// If this is the source, who simply opens no more.
    pub fn go_away(&mut self, out: &mut Vec<u8>) -> Result<(), Misuse> {
        if self.role != Role::Destination {
            return Err(Misuse(FrameType::GoingAway));
        }
        if !self.going_away {
            put_frame(out, FrameType::GoingAway, &self.stream.to_be_bytes());
            self.going_away = true;
        }
        Ok(())
    }

    /// Whether a frame of this type may come now. Checked on its header, before its body is kept.
    fn check_turn(&self, frame_type: FrameType) -> Result<(), FrameError> {
        let source = self.role == Role::Source;
        let in_turn = match frame_type {
            FrameType::Open | FrameType::Continue => {
                !source && self.sending == Sending::Idle && self.is_receiving_idle()
            }
            FrameType::Accept | FrameType::Refuse => self.awaits_answer(),
            FrameType::Data | FrameType::Fin => matches!(self.receiving, Receiving::Active(_)),
            FrameType::Reset => self.stream > 0,
            FrameType::Reauthenticate => true,
            FrameType::GoingAway => source && !self.going_away,
            // Their reader alone knows them.
            FrameType::Credit | FrameType::Bulk | FrameType::Moved => false,
        };
        if in_turn { Ok(()) } else { Err(FrameError::OutOfTurn(frame_type)) }
    }

    fn is_receiving_idle(&self) -> bool {
        self.receiving == Receiving::Idle
    }

    fn take(
        &mut self,
        frame_type: FrameType,
        body: &[u8],
    ) -> Result<Option<Event<'static>>, FrameError> {
        Ok(match frame_type {
            FrameType::Open => {
                let open = Open::decode(body)?;
                self.begin()?.then_some(Event::Open(open))
            }
            FrameType::Continue => {
                let stream = Continue::decode(body)?;
                self.begin()?.then_some(Event::Continue(stream))
            }
            FrameType::Accept => {
                let Receiving::Answer(wanted) = self.receiving else {
                    return Err(FrameError::OutOfTurn(frame_type));
                };
                self.receiving = Receiving::Active(wanted);
                (wanted == Wanted::Yes).then_some(Event::Accept)
            }
            FrameType::Refuse => {
                let refusal = Refusal::decode(body)?;
                let wanted = self.receiving == Receiving::Answer(Wanted::Yes);
                self.receiving = Receiving::Done;
                self.settle();
                wanted.then_some(Event::Refuse(refusal))
            }
            FrameType::Fin => {
                let wanted = self.receiving == Receiving::Active(Wanted::Yes);
                self.receiving = Receiving::Done;
                self.settle();
                wanted.then_some(Event::Fin)
            }
            FrameType::Reset => self.take_reset(body)?,
            FrameType::Reauthenticate => Some(Event::Reauthenticate(Reauthenticate::decode(body)?)),
            FrameType::GoingAway => {
                let taken = body.first_chunk().map_or(0, |count| u32::from_be_bytes(*count));
                if taken > self.stream {
                    return Err(FrameError::UnknownStream { got: taken, last: self.stream });
                }
                self.going_away = true;
                if self.awaits_answer() && self.stream > taken {
                    self.sending = Sending::Idle;
                    self.receiving = Receiving::Idle;
                    Some(Event::NotTaken)
                } else {
                    Some(Event::GoingAway)
                }
            }
            FrameType::Data | FrameType::Credit | FrameType::Bulk | FrameType::Moved => {
                return Err(FrameError::OutOfTurn(frame_type));
            }
        })
    }

    /// Destination: another stream begins, unless its header had come before this side said that it takes no more.
    fn begin(&mut self) -> Result<bool, FrameError> {
        if self.going_away {
            return Ok(false);
        }
        self.stream = self.stream.checked_add(1).ok_or(FrameError::TooManyStreams)?;
        self.reset_sent = false;
        self.sending = Sending::Answering;
        self.receiving = Receiving::Active(Wanted::Yes);
        Ok(true)
    }

    fn take_reset(&mut self, body: &[u8]) -> Result<Option<Event<'static>>, FrameError> {
        let (number, rest) =
            body.split_first_chunk().ok_or(FrameError::Truncated("reset", "stream"))?;
        let number = u32::from_be_bytes(*number);
        let cause = rest.first().ok_or(FrameError::Truncated("reset", "cause"))?;
        let cause = ResetCause::from_byte(*cause)?;
        if number == 0 || number > self.stream {
            return Err(FrameError::UnknownStream { got: number, last: self.stream });
        }
        // It crossed our own end of the stream: that one is over at both sides already.
        if number < self.stream || self.sending == Sending::Idle {
            return Ok(None);
        }
        // Nobody here waits for news of a direction that was refused, or broken off from this side.
        let wanted = self.sending != Sending::Done
            || matches!(
                self.receiving,
                Receiving::Answer(Wanted::Yes) | Receiving::Active(Wanted::Yes)
            );
        self.receiving = Receiving::Done;
        self.settle();
        Ok((wanted && !self.reset_sent).then_some(Event::Reset(cause)))
    }

    fn discard(&mut self) {
        self.receiving = match self.receiving {
            Receiving::Answer(_) => Receiving::Answer(Wanted::No),
            Receiving::Active(_) => Receiving::Active(Wanted::No),
            Receiving::Idle => Receiving::Idle,
            Receiving::Done => Receiving::Done,
        };
    }

    /// Both directions are over: free for the next stream.
    fn settle(&mut self) {
        if self.sending == Sending::Done && self.receiving == Receiving::Done {
            self.sending = Sending::Idle;
            self.receiving = Receiving::Idle;
        }
    }
}

fn put_frame(out: &mut Vec<u8>, frame_type: FrameType, body: &[u8]) {
    #[allow(
        clippy::expect_used,
        reason = "every body that is made here is below the limit of its type: texts and chains are cut when encoded"
    )]
    let header = Header::encode(frame_type, body.len()).expect("a body below its limit");
    out.extend_from_slice(&header);
    out.extend_from_slice(body);
}

/// A session's part of an idle connection's memory.
const _: () = assert!(std::mem::size_of::<Machine>() <= 48);
