//! The state of a session that carries many streams at a time: which frames may come of which stream, which may be
//! sent, and how many bytes. Bytes in, events out; whoever owns the socket does the rest.
//!
//! Each stream is what a dedicated session's is (`machine.rs`), and two things more. A direction has a credit, so that an
//! application that does not read holds up its own stream only. And it may move: what follows then comes on a
//! dedicated session, which carries on with it.

use std::collections::HashMap;

use super::{
    FrameError, FrameType, Header, Misuse, NUMBERED_HEADER_LENGTH, Open, Reauthenticate, Refusal,
    ResetCause, Role,
    reader::{Part, Reader},
};

/// Bytes of a stream that each side may send before the other says that it takes more.
pub const INITIAL_CREDIT: u32 = 64 * 1024;

/// Streams of one session at a time.
pub const MAX_AT_A_TIME: usize = 16_384;

/// Streams for which there is room while there are none.
const SPARE: usize = 64;

/// What came in of a stream, or of the session.
#[derive(Debug, PartialEq, Eq)]
pub enum OfStream<'a> {
    /// The source wants it.
    Open(Open),
    /// The destination took it.
    Accept,
    /// The destination refused it. The source owes the end of its own direction: [`Multiplex::reset`].
    Refuse(Refusal),
    /// Bytes for the application. They count until [`Multiplex::credit`] says that they are delivered.
    Data(&'a [u8]),
    /// The peer takes more bytes.
    Credit,
    /// The peer's application has sent its last byte.
    Fin,
    /// What the peer's application says from here on comes on the session that carries on.
    Moved,
    /// The destination has more to say than a multiplexed session should carry.
    Bulk,
    /// The peer broke the stream off. The end of the own direction is owed: [`Multiplex::reset`].
    Reset(ResetCause),
    /// The peer shows a newer certificate. Of the session.
    Reauthenticate(Reauthenticate),
    /// The destination takes no further streams, and has not seen these: nothing of them was used, they may be opened
    /// again elsewhere, and are over here. Of the session.
    GoingAway {
        /// Their numbers.
        not_taken: Vec<u32>,
    },
}

/// The next thing in the bytes of the peer.
#[derive(Debug, PartialEq, Eq)]
pub struct Came<'a> {
    /// How many of the bytes are used up.
    pub used: usize,
    /// What they mean, and of which stream (0: of the session); nothing if they are the beginning of something, or
    /// are thrown away.
    pub event: Option<(u32, OfStream<'a>)>,
}

/// One session.
#[derive(Debug)]
pub struct Multiplex {
    role: Role,
    reader: Reader<NUMBERED_HEADER_LENGTH>,
    streams: HashMap<u32, Stream>,
    /// The number of the last stream; the first is 1.
    last: u32,
    going_away: bool,
}

#[derive(Debug)]
struct Stream {
    sending: Sending,
    receiving: Receiving,
    /// What comes is thrown away: the stream was broken off here.
    unwanted: bool,
    reset_sent: bool,
    /// Bytes that may be sent.
    may_send: u32,
    /// Bytes that may come.
    may_come: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sending {
    /// Destination: an answer is owed before anything else.
    Answering,
    Active,
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Receiving {
    /// Source: the answer.
    Answer,
    Active,
    Done,
}

impl Multiplex {
    /// A fresh session without a stream.
    #[must_use]
    pub fn new(role: Role) -> Self {
        Self { role, reader: Reader::new(), streams: HashMap::new(), last: 0, going_away: false }
    }

    /// How many streams there are now.
    #[must_use]
    pub fn open_streams(&self) -> usize {
        self.streams.len()
    }

    /// How many streams there were, those under way included.
    #[must_use]
    pub fn streams(&self) -> u32 {
        self.last
    }

    /// Source: another stream may be opened.
    #[must_use]
    pub fn may_open(&self) -> bool {
        self.role == Role::Source
            && !self.going_away
            && self.last < u32::MAX
            && self.streams.len() < MAX_AT_A_TIME
    }

    /// Source: no further stream may be opened, ever.
    #[must_use]
    pub fn is_used_up(&self) -> bool {
        self.going_away || self.last == u32::MAX
    }

    /// How many application bytes may be sent now; none at all once the own direction is over, or before an answer.
    #[must_use]
    pub fn may_send(&self, stream: u32) -> Option<usize> {
        let stream = self.streams.get(&stream)?;
        (stream.sending == Sending::Active)
            .then(|| usize::try_from(stream.may_send).unwrap_or(usize::MAX))
    }

    /// Source: the destination has not answered yet.
    #[must_use]
    pub fn awaits_answer(&self, stream: u32) -> bool {
        self.streams.get(&stream).is_some_and(|stream| stream.receiving == Receiving::Answer)
    }

    /// Destination: it has not been answered yet.
    #[must_use]
    pub fn owes_answer(&self, stream: u32) -> bool {
        self.streams.get(&stream).is_some_and(|stream| stream.sending == Sending::Answering)
    }

    /// Both directions are over, or there was no such stream.
    #[must_use]
    pub fn is_over(&self, stream: u32) -> bool {
        !self.streams.contains_key(&stream)
    }

    /// Reads the next thing out of the peer's bytes. Call it until all are used.
    ///
    /// # Errors
    /// If the peer breaks the protocol: the session must end then, nothing after it counts.
    pub fn receive<'a>(&mut self, input: &'a [u8]) -> Result<Came<'a>, FrameError> {
        let (used, part) = self.reader.read(input)?;
        let event = match part {
            Part::Nothing => None,
            Part::Begin(header) => {
                self.check_turn(header)?;
                if header.frame_type == FrameType::Data {
                    self.spend(header)?;
                }
                None
            }
            Part::Data(number, bytes) => self
                .streams
                .get(&number)
                .is_some_and(|stream| !stream.unwanted)
                .then_some((number, OfStream::Data(bytes))),
            Part::Frame(header, body) => {
                self.check_turn(header)?;
                self.take(header, &body)?.map(|event| (header.stream, event))
            }
        };
        Ok(Came { used, event })
    }

    /// Source: asks for a stream. Returns its number.
    ///
    /// # Errors
    /// If the session takes no more.
    pub fn open(&mut self, open: &Open, out: &mut Vec<u8>) -> Result<u32, Misuse> {
        if !self.may_open() {
            return Err(Misuse(FrameType::Open));
        }
        self.last += 1;
        put(out, FrameType::Open, self.last, &open.encode());
        self.streams.insert(self.last, Stream::new(Sending::Active, Receiving::Answer));
        Ok(self.last)
    }

    /// Destination: takes the stream.
    ///
    /// # Errors
    /// If no answer is owed.
    pub fn accept(&mut self, number: u32, out: &mut Vec<u8>) -> Result<(), Misuse> {
        let stream = self.answering(number, FrameType::Accept)?;
        stream.sending = Sending::Active;
        put(out, FrameType::Accept, number, &[]);
        Ok(())
    }

    /// Destination: refuses the stream. What the source has sent already is thrown away.
    ///
    /// # Errors
    /// If no answer is owed.
    pub fn refuse(
        &mut self,
        number: u32,
        refusal: &Refusal,
        out: &mut Vec<u8>,
    ) -> Result<(), Misuse> {
        let stream = self.answering(number, FrameType::Refuse)?;
        stream.sending = Sending::Done;
        stream.unwanted = true;
        // It says all that there is to say.
        stream.reset_sent = true;
        put(out, FrameType::Refuse, number, &refusal.encode());
        self.settle(number);
        Ok(())
    }

    /// The header of a run of `length` application bytes, which must follow it.
    ///
    /// # Errors
    /// If that many bytes may not be sent now, or none are to be.
    pub fn data(
        &mut self,
        number: u32,
        length: usize,
    ) -> Result<[u8; NUMBERED_HEADER_LENGTH], Misuse> {
        let misuse = Misuse(FrameType::Data);
        let stream = self.sending(number, FrameType::Data)?;
        let wide = u32::try_from(length).map_err(|_| misuse)?;
        let header =
            Header::encode_numbered(FrameType::Data, number, length).map_err(|_| misuse)?;
        stream.may_send = stream.may_send.checked_sub(wide).filter(|_| wide > 0).ok_or(misuse)?;
        Ok(header)
    }

    /// So many more bytes of the peer are delivered, and so many more are taken. Does nothing if none come any more, nor
    /// before the answer: nothing is delivered then.
    pub fn credit(&mut self, number: u32, bytes: u32, out: &mut Vec<u8>) {
        let Some(stream) = self.streams.get_mut(&number) else { return };
        let answering = stream.sending == Sending::Answering;
        if bytes == 0 || answering || stream.unwanted || stream.receiving == Receiving::Done {
            return;
        }
        stream.may_come = stream.may_come.saturating_add(bytes);
        put(out, FrameType::Credit, number, &bytes.to_be_bytes());
    }

    /// The application here has sent its last byte.
    ///
    /// # Errors
    /// If its direction is not open.
    pub fn fin(&mut self, number: u32, out: &mut Vec<u8>) -> Result<(), Misuse> {
        self.end_sending(number, FrameType::Fin, out)
    }

    /// What the application here says from now on goes over a dedicated session.
    ///
    /// # Errors
    /// If its direction is not open.
    pub fn moved(&mut self, number: u32, out: &mut Vec<u8>) -> Result<(), Misuse> {
        self.end_sending(number, FrameType::Moved, out)
    }

    /// Destination: wishes that the stream moves.
    ///
    /// # Errors
    /// If this is the source, or its direction is not open.
    pub fn bulk(&mut self, number: u32, out: &mut Vec<u8>) -> Result<(), Misuse> {
        if self.role == Role::Source {
            return Err(Misuse(FrameType::Bulk));
        }
        self.sending(number, FrameType::Bulk)?;
        put(out, FrameType::Bulk, number, &[]);
        Ok(())
    }

    /// Breaks the stream off, in both directions; where an answer is owed, this is it. Does nothing
    /// if the stream is over or broken off already.
    pub fn reset(&mut self, number: u32, cause: ResetCause, out: &mut Vec<u8>) {
        let Some(stream) = self.streams.get_mut(&number).filter(|stream| !stream.reset_sent) else {
            return;
        };
        stream.reset_sent = true;
        stream.sending = Sending::Done;
        stream.unwanted = true;
        put(out, FrameType::Reset, number, &[cause.byte()]);
        self.settle(number);
    }

    /// Shows the peer a newer certificate. May come at any time.
    pub fn reauthenticate(&mut self, proof: &Reauthenticate, out: &mut Vec<u8>) {
        put(out, FrameType::Reauthenticate, 0, &proof.encode());
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
        if !std::mem::replace(&mut self.going_away, true) {
            put(out, FrameType::GoingAway, 0, &self.last.to_be_bytes());
        }
        Ok(())
    }

    fn answering(&mut self, number: u32, frame_type: FrameType) -> Result<&mut Stream, Misuse> {
        let stream = self.streams.get_mut(&number);
        stream.filter(|stream| stream.sending == Sending::Answering).ok_or(Misuse(frame_type))
    }

    fn sending(&mut self, number: u32, frame_type: FrameType) -> Result<&mut Stream, Misuse> {
        let stream = self.streams.get_mut(&number);
        stream.filter(|stream| stream.sending == Sending::Active).ok_or(Misuse(frame_type))
    }

    fn end_sending(
        &mut self,
        number: u32,
        frame_type: FrameType,
        out: &mut Vec<u8>,
    ) -> Result<(), Misuse> {
        self.sending(number, frame_type)?.sending = Sending::Done;
        put(out, frame_type, number, &[]);
        self.settle(number);
        Ok(())
    }

    /// Whether a frame may come now. Checked on its header, before its body is kept.
    fn check_turn(&self, header: Header) -> Result<(), FrameError> {
        let Header { frame_type, stream: number, .. } = header;
        let source = self.role == Role::Source;
        let in_turn = match frame_type {
            FrameType::Reauthenticate => true,
            FrameType::GoingAway => source && !self.going_away,
            FrameType::Open => !source && Some(number) == self.last.checked_add(1),
            FrameType::Accept | FrameType::Refuse => self.awaits_answer(number),
            FrameType::Data | FrameType::Fin | FrameType::Moved => {
                self.is_not_looked_at(number)
                    || self
                        .streams
                        .get(&number)
                        .is_some_and(|stream| stream.receiving == Receiving::Active)
            }
            // They may have crossed the end of the stream.
            FrameType::Reset => self.is_not_looked_at(number) || number <= self.last,
            FrameType::Credit => {
                self.is_not_looked_at(number)
                    || (number <= self.last && !self.awaits_answer(number))
            }
            FrameType::Bulk => source && number <= self.last && !self.awaits_answer(number),
            FrameType::Continue => false,
        };
        if in_turn {
            return Ok(());
        }
        if frame_type == FrameType::Open && number > self.last && self.going_away {
            return Ok(());
        }
        if number > self.last {
            return Err(FrameError::UnknownStream { got: number, last: self.last });
        }
        Err(FrameError::OutOfTurn(frame_type))
    }

    /// Destination: the source opened it before it knew that no more are taken.
    fn is_not_looked_at(&self, number: u32) -> bool {
        self.role == Role::Destination && self.going_away && number > self.last
    }

    /// A run of data begins.
    fn spend(&mut self, header: Header) -> Result<(), FrameError> {
        // None: it is not looked at.
        let Some(stream) = self.streams.get_mut(&header.stream) else { return Ok(()) };
        let over = FrameError::OverCredit { length: header.length, credit: stream.may_come };
        let length = u32::try_from(header.length).map_err(|_| over.clone())?;
        stream.may_come = stream.may_come.checked_sub(length).ok_or(over)?;
        Ok(())
    }

    fn take(
        &mut self,
        header: Header,
        body: &[u8],
    ) -> Result<Option<OfStream<'static>>, FrameError> {
        let number = header.stream;
        let wanted = |stream: &Stream| !stream.unwanted;
        Ok(match header.frame_type {
            FrameType::Open => {
                let open = Open::decode(body)?;
                if self.going_away {
                    return Ok(None);
                }
                if self.streams.len() == MAX_AT_A_TIME {
                    return Err(FrameError::TooManyAtATime(MAX_AT_A_TIME));
                }
                self.last = number;
                self.streams.insert(number, Stream::new(Sending::Answering, Receiving::Active));
                Some(OfStream::Open(open))
            }
            FrameType::Accept => {
                let Some(stream) = self.streams.get_mut(&number) else { return Ok(None) };
                stream.receiving = Receiving::Active;
                wanted(stream).then_some(OfStream::Accept)
            }
            FrameType::Refuse => {
                let refusal = Refusal::decode(body)?;
                self.end_receiving(number).then_some(OfStream::Refuse(refusal))
            }
            FrameType::Fin => self.end_receiving(number).then_some(OfStream::Fin),
            FrameType::Moved => self.end_receiving(number).then_some(OfStream::Moved),
            FrameType::Reset => {
                let cause = body.first().ok_or(FrameError::Truncated("reset", "cause"))?;
                let cause = ResetCause::from_byte(*cause)?;
                let Some(stream) = self.streams.get_mut(&number) else { return Ok(None) };
                // Nobody here waits for news of what was refused or broken off from this side.
                let wanted = wanted(stream);
                stream.receiving = Receiving::Done;
                self.settle(number);
                wanted.then_some(OfStream::Reset(cause))
            }
            FrameType::Credit => {
                let bytes = body.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
                let Some(stream) = self.streams.get_mut(&number) else { return Ok(None) };
                stream.may_send =
                    stream.may_send.checked_add(bytes).ok_or(FrameError::TooMuchCredit)?;
                (stream.sending == Sending::Active).then_some(OfStream::Credit)
            }
            FrameType::Bulk => {
                self.streams.get(&number).is_some_and(wanted).then_some(OfStream::Bulk)
            }
            FrameType::Reauthenticate => {
                Some(OfStream::Reauthenticate(Reauthenticate::decode(body)?))
            }
            FrameType::GoingAway => {
                let taken = body.first_chunk().map_or(0, |count| u32::from_be_bytes(*count));
                if taken > self.last {
                    return Err(FrameError::UnknownStream { got: taken, last: self.last });
                }
                self.going_away = true;
                let is_not_taken = |(number, stream): (&u32, &mut Stream)| {
                    *number > taken && stream.receiving == Receiving::Answer
                };
                let gone = self.streams.extract_if(|number, stream| is_not_taken((number, stream)));
                // One that this side broke off meanwhile is no news.
                let gone = gone.filter(|(_, stream)| !stream.unwanted);
                let not_taken = gone.map(|(number, _)| number).collect();
                Some(OfStream::GoingAway { not_taken })
            }
            FrameType::Data | FrameType::Continue => {
                return Err(FrameError::OutOfTurn(header.frame_type));
            }
        })
    }

    /// The peer's direction is over. Returns whether that is news.
    fn end_receiving(&mut self, number: u32) -> bool {
        let Some(stream) = self.streams.get_mut(&number) else { return false };
        stream.receiving = Receiving::Done;
        let wanted = !stream.unwanted;
        self.settle(number);
        wanted
    }

    /// Forgets a stream whose directions are both over.
    fn settle(&mut self, number: u32) {
        let is_over = |stream: &Stream| {
            stream.sending == Sending::Done && stream.receiving == Receiving::Done
        };
        if self.streams.get(&number).is_some_and(is_over) {
            self.streams.remove(&number);
            if self.streams.is_empty() {
                self.streams.shrink_to(SPARE);
            }
        }
    }
}

impl Stream {
    fn new(sending: Sending, receiving: Receiving) -> Self {
        Self {
            sending,
            receiving,
            unwanted: false,
            reset_sent: false,
            may_send: INITIAL_CREDIT,
            may_come: INITIAL_CREDIT,
        }
    }
}

fn put(out: &mut Vec<u8>, frame_type: FrameType, stream: u32, body: &[u8]) {
    #[allow(
        clippy::expect_used,
        reason = "every body that is made here is below the limit of its type: texts and chains are cut when encoded"
    )]
    let header =
        Header::encode_numbered(frame_type, stream, body.len()).expect("a body below its limit");
    out.extend_from_slice(&header);
    out.extend_from_slice(body);
}
