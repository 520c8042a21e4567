//! The copy loop between an application's connection and a session: the hot path.
//!
//! Polled by hand in one task, both directions. Bytes go from the application's socket into the
//! places where records will be, are sealed there and sent in one write; what comes from the session
//! is read many records at once, opened into one run, and written in one call. The buffers are the
//! thread's (`session/scratch.rs`); a relay keeps only what a socket did not take.
//!
//! A failed write ends nothing by itself: what that side said before is still in the receive queue of its
//! socket, and is passed on first. A server that refuses an upload answers and resets its connection at once.

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::Shutdown,
    pin::Pin,
    task::{Context, Poll, ready},
};

use hauberk_core::session::{
    Event as Frame, FrameError, HEADER_LENGTH, Reauthenticate, Refusal, ResetCause,
};
use hauberk_linux::socket::{keep_alive, linger_on_close, reset_on_close};
use hauberk_telemetry::EdgeCounters;
use hauberk_tls::channel::{MAX_PLAINTEXT, RECORD_HEADER, RECORD_OVERHEAD};
use tokio::{io::AsyncWrite, net::TcpStream};

use crate::{
    capture::Waiting,
    delivery::delivered,
    mux::Moved,
    receive::poll_receive,
    session::{ProofRefused, RECORD, SLOTS, Scratch, Session, SessionError, owned, with_scratch},
};

/// Bursts in one direction before other connections of the thread get their turn.
const BURSTS: usize = 1;

/// Runs of data that are written to an application at once.
const RUNS: usize = 16;

/// How a relay ended.
#[derive(Debug)]
pub(crate) enum End {
    /// Both sides sent their last byte.
    Complete,
    /// The application here broke its connection.
    ApplicationFailed(io::Error),
    /// The destination refused the stream.
    Refused(Refusal),
    /// The destination went away before it saw the stream.
    NotTaken,
    /// The peer said why it broke off.
    Reset(ResetCause),
    /// The session ended without an end of the stream: cut off, not complete.
    Truncated,
    /// The session failed.
    SessionFailed(SessionError),
    /// The peer broke the protocol.
    Protocol(FrameError),
    /// This side ended the whole session, for a reason of the closed set.
    Cut(ProofRefused),
}

/// What happens on a relay.
#[derive(Debug)]
pub(crate) enum Event {
    /// The destination took the stream: now the application that wants it is to be connected.
    Accepted,
    /// The peer shows a newer certificate.
    Reauthenticate(Reauthenticate),
    /// A stream of a multiplexed session has much to say.
    Bulk,
    /// It goes on over a dedicated session.
    Moved,
    /// It is over.
    End(End),
}

/// An application's connection, there or still wanted. Whatever ends this process, or the connection before both have
/// sent their last byte, the application sees as a reset, or its `connect` fails: never as an end, which could be
/// taken for the last byte.
pub(crate) enum Application {
    /// It waits for the destination.
    Waiting(Box<Waiting>),
    /// It is connected.
    Connected(TcpStream),
    /// It has given up.
    Gone,
}

impl Application {
    pub(crate) fn waiting(waiting: Box<Waiting>) -> Self {
        Self::Waiting(waiting)
    }

    pub(crate) fn connected(stream: TcpStream) -> Self {
        // The connection may be gone already.
        drop(reset_on_close(&stream));
        Self::Connected(stream)
    }

    /// Lets its `connect` succeed, if it waits.
    ///
    /// # Errors
    /// If it has given up.
    pub(crate) async fn connect(&mut self) -> io::Result<()> {
        match std::mem::replace(self, Self::Gone) {
            // It is reset when it is closed, as its listener is.
            Self::Waiting(waiting) => *self = Self::Connected(waiting.connect().await?),
            other @ (Self::Connected(_) | Self::Gone) => *self = other,
        }
        Ok(())
    }

    pub(crate) fn stream(&self) -> Option<&TcpStream> {
        match self {
            Self::Connected(stream) => Some(stream),
            Self::Waiting(_) | Self::Gone => None,
        }
    }

    pub(crate) fn stream_mut(&mut self) -> Option<&mut TcpStream> {
        match self {
            Self::Connected(stream) => Some(stream),
            Self::Waiting(_) | Self::Gone => None,
        }
    }

    /// Has the kernel ask now and then whether it is still there, unless that was `done` before: most connections do not
    /// last so long.
    pub(crate) fn keep_alive(&self, done: &mut bool) {
        if !std::mem::replace(done, true)
            && let Some(stream) = self.stream()
        {
            // It may be gone already.
            drop(keep_alive(stream));
        }
    }

    /// Lets what was written go out, now that both have sent their last byte.
    pub(crate) fn complete(&self) {
        if let Some(stream) = self.stream() {
            // The connection may be gone already.
            drop(linger_on_close(stream));
        }
    }

    /// Makes the application see a reset, as it would without us in between.
    pub(crate) fn reset(self) {
        drop(self);
    }

    /// The same once its kernel has what was written before, so that the reset takes none of that away.
    pub(crate) async fn reset_when_delivered(self) {
        if let Some(stream) = self.stream() {
            delivered(stream).await;
        }
        self.reset();
    }
}

/// Both directions of one stream.
pub(crate) struct Relay {
    application: Application,
    pub(crate) session: Box<Session>,
    counters: EdgeCounters,
    /// Records of the next burst, each way. Grows while everything that is read also goes out, so that
    /// a connection that is held back does not fill memory.
    up: u8,
    down: u8,
    /// So many of the session's plain bytes are data that the application did not take.
    undelivered: usize,
    /// What comes after them.
    then: Option<Box<Frame<'static>>>,
    /// The application does not read.
    pub(crate) held_back: bool,
    /// How writing to the application failed. What it said before is read to its end and sent; what comes for
    /// it is thrown away.
    broken: Option<io::Error>,
    /// How writing to the session's socket failed. What the peer said before is read to its end.
    unsendable: Option<io::Error>,
    /// Nothing is sent to a peer whose certificate has ended.
    pub(crate) suspended: bool,
    kept_alive: bool,
    /// Application → peer.
    pub(crate) sent: u64,
    /// Peer → application.
    pub(crate) received: u64,
}

impl Relay {
    /// For a session whose stream is asked for, by an application that waits, or taken.
    pub(crate) fn new(
        application: Application,
        session: Box<Session>,
        counters: EdgeCounters,
    ) -> Box<Self> {
        Box::new(Self {
            application,
            session,
            counters,
            up: 1,
            down: 1,
            undelivered: 0,
            then: None,
            held_back: false,
            broken: None,
            unsendable: None,
            suspended: false,
            kept_alive: false,
            sent: 0,
            received: 0,
        })
    }

    /// For a stream that was one of a multiplexed session until now.
    pub(crate) fn carrying_on(moved: Moved) -> Result<Box<Self>, SessionError> {
        let Moved { application, mut session, counters, undelivered, finished, broken, .. } = moved;
        if finished {
            session.fin()?;
        }
        let length = undelivered.len();
        session.put_before_plain(undelivered);
        let mut relay = Self::new(application, session, counters);
        relay.undelivered = length;
        relay.broken = broken;
        (relay.sent, relay.received) = (moved.sent, moved.received);
        Ok(relay)
    }

    /// Lets the application's `connect` succeed, if it waits. Nothing is lost if this is dropped: then it is refused.
    ///
    /// # Errors
    /// If it has given up.
    pub(crate) async fn connect_application(&mut self) -> io::Result<()> {
        self.application.connect().await
    }

    /// As [`Application::keep_alive`].
    pub(crate) fn keep_alive(&mut self) {
        self.application.keep_alive(&mut self.kept_alive);
    }

    pub(crate) fn into_parts(mut self) -> (Application, Box<Session>) {
        self.session.skip_plain(self.undelivered);
        (self.application, self.session)
    }

    /// Goes on until something happens that is not copying. Nothing is lost if it is dropped in
    /// between and called again.
    pub(crate) async fn run(&mut self) -> Event {
        std::future::poll_fn(|cx| with_scratch(|scratch| self.poll(cx, scratch))).await
    }

    fn poll(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> Poll<Event> {
        // Down first: a reset by the peer explains why sending fails.
        if let Poll::Ready(event) = self.poll_down(cx, scratch) {
            return Poll::Ready(event);
        }
        if let Poll::Ready(end) = self.poll_up(cx, scratch) {
            return self.ended_sending(cx, end).map(Event::End);
        }
        if self.is_complete() {
            self.application.complete();
            return Poll::Ready(Event::End(End::Complete));
        }
        Poll::Pending
    }

    /// A session that takes nothing more may still have something to say, which tells more than the failure.
    fn ended_sending(&mut self, cx: &mut Context<'_>, end: End) -> Poll<End> {
        match end {
            // The kernel's own errors only: then reading comes to an end as well.
            End::SessionFailed(SessionError::Io(error))
                if error.raw_os_error().is_some() && !self.is_over() =>
            {
                self.unsendable = Some(error);
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            end => Poll::Ready(end),
        }
    }

    /// Both directions are over, and all that came is delivered.
    fn is_over(&self) -> bool {
        self.session.machine.is_idle() && self.undelivered == 0 && self.then.is_none()
    }

    fn is_complete(&self) -> bool {
        self.is_over() && !self.session.has_unsent()
    }

    /// Application → session. Ready only at an end that is not the good one.
    fn poll_up(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> Poll<End> {
        if self.unsendable.is_some() {
            if self.is_over() {
                return Poll::Ready(self.end_of(SessionError::Closed));
            }
            return Poll::Pending;
        }
        for _ in 0..BURSTS {
            if let Err(error) = ready!(self.session.poll_unsent(cx)) {
                return Poll::Ready(end_of(error));
            }
            let may_send = self.session.machine.may_send() && !self.suspended;
            if let Some(error) = self.broken.take_if(|_| !may_send) {
                return Poll::Ready(End::ApplicationFailed(error));
            }
            match self.poll_burst(cx, scratch) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(end)) => return Poll::Ready(end),
                Poll::Pending => return Poll::Pending,
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// One read, one write. Pending if there is nothing to send.
    fn poll_burst(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> Poll<Result<(), End>> {
        let waiting = self.session.prepare_burst().map_err(end_of)?;
        if self.session.is_blocked() {
            return Poll::Ready(Ok(()));
        }
        let start = waiting + HEADER_LENGTH;
        let read = match self.poll_read(cx, scratch, start) {
            Poll::Ready(Ok(read)) => read,
            Poll::Ready(Err(error)) => {
                let first = self.broken.take().unwrap_or(error);
                return Poll::Ready(Err(End::ApplicationFailed(first)));
            }
            Poll::Pending if waiting == 0 => return Poll::Pending,
            Poll::Pending => return Poll::Ready(self.session.seal_control().map_err(end_of)),
        };
        if read == 0 {
            // The kernel reports a reset once, and to the write that failed.
            if let Some(error) = self.broken.take() {
                return Poll::Ready(Err(End::ApplicationFailed(error)));
            }
            return Poll::Ready(self.session.fin().map_err(end_of));
        }
        self.sent += count(read);
        self.counters.add_sent(count(read));
        let header = self
            .session
            .machine
            .data(read)
            .map_err(|error| End::SessionFailed(SessionError::Io(io::Error::other(error))))?;
        let frames = self.session.take_control();
        // What waits and the header have the room that was left for them.
        let (room, after) =
            scratch.cipher[RECORD_HEADER..RECORD_HEADER + start].split_at_mut(frames.len());
        room.copy_from_slice(&frames);
        after.copy_from_slice(&header);
        let length = seal_records(&mut self.session, scratch, start + read).map_err(end_of)?;
        let sealed = &scratch.cipher[..length];
        if !self.session.send(sealed).map_err(end_of)? {
            self.up = (self.up / 2).max(1);
        }
        Poll::Ready(Ok(()))
    }

    /// Reads from the application to where its bytes will be sealed, `start` bytes into the first
    /// record.
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        start: usize,
    ) -> Poll<io::Result<usize>> {
        let room = MAX_PLAINTEXT.saturating_sub(start);
        if room == 0 || !self.session.machine.may_send() || self.suspended {
            return Poll::Pending;
        }
        let Some(stream) = self.application.stream() else { return Poll::Pending };
        let slots = usize::from(self.up);
        let mut places: [IoSliceMut<'_>; SLOTS] = std::array::from_fn(|_| IoSliceMut::new(&mut []));
        for (number, (place, record)) in
            places.iter_mut().zip(scratch.cipher.chunks_mut(RECORD)).take(slots).enumerate()
        {
            let from = RECORD_HEADER + if number == 0 { start } else { 0 };
            let to = RECORD_HEADER + MAX_PLAINTEXT;
            *place = IoSliceMut::new(&mut record[from..to]);
        }
        let places = &mut places[..slots];
        let read = ready!(poll_receive(cx, stream, places))?;
        let room = slots * MAX_PLAINTEXT - start;
        if read == room {
            let most = u8::try_from(SLOTS).unwrap_or(u8::MAX);
            self.up = self.up.saturating_mul(if self.up == 1 { 4 } else { 2 }).min(most);
        } else if read < room / 4 {
            self.up = (self.up / 2).max(1);
        }
        Poll::Ready(Ok(read))
    }

    /// Session → application.
    fn poll_down(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> Poll<Event> {
        let mut bursts = 0;
        loop {
            if self.is_over() {
                return Poll::Pending;
            }
            if let Some((plain, used)) = self.session.take_plain() {
                let rest = &plain[used..];
                match self.deliver(cx, rest) {
                    Delivered::All => {}
                    Delivered::Over(more) => {
                        self.session.keep_plain(plain, used + more);
                        return Poll::Pending;
                    }
                    Delivered::Blocked(kept) => {
                        match kept {
                            None => self.session.keep_plain(plain, used),
                            Some(kept) => self.session.keep_plain(kept, 0),
                        }
                        return Poll::Pending;
                    }
                    Delivered::Event(event, more) => {
                        self.session.keep_plain(plain, used + more);
                        return Poll::Ready(event);
                    }
                }
            }
            if self.is_over() {
                return Poll::Pending;
            }
            if bursts == BURSTS {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            bursts += 1;
            let limit = usize::from(self.down) * RECORD;
            let length = match ready!(self.session.poll_fill(cx, scratch, limit)) {
                Ok(length) => length,
                Err(error) => return Poll::Ready(Event::End(self.end_of(error))),
            };
            if length + RECORD >= limit {
                self.down = (self.down * 2).min(u8::try_from(SLOTS).unwrap_or(u8::MAX));
            } else if length < limit / 4 {
                self.down = (self.down / 2).max(1);
            }
            let plain = &scratch.plain[..length];
            match self.deliver(cx, plain) {
                Delivered::All => {}
                Delivered::Over(used) => {
                    let rest = &plain[used..];
                    self.session.keep_plain(rest.to_vec(), 0);
                    return Poll::Pending;
                }
                Delivered::Blocked(kept) => {
                    self.session.keep_plain(kept.unwrap_or_else(|| plain.to_vec()), 0);
                    return Poll::Pending;
                }
                Delivered::Event(event, used) => {
                    let rest = &plain[used..];
                    self.session.keep_plain(rest.to_vec(), 0);
                    return Poll::Ready(event);
                }
            }
        }
    }

    /// Uses up opened bytes: data to the application, frames as they come.
    fn deliver(&mut self, cx: &mut Context<'_>, input: &[u8]) -> Delivered {
        let mut used = 0;
        loop {
            let mut runs = [IoSlice::new(&[]); RUNS];
            let mut places = runs.iter_mut();
            let old = &input[..self.undelivered];
            let mut total = old.len();
            if !old.is_empty()
                && let Some(place) = places.next()
            {
                *place = IoSlice::new(old);
                used = old.len();
            }
            while used < input.len() && places.len() > 0 && self.then.is_none() {
                let rest = &input[used..];
                let received = match self.session.machine.receive(rest) {
                    Ok(received) => received,
                    Err(error) => return Delivered::Event(Event::End(End::Protocol(error)), used),
                };
                used += received.used;
                match received.event {
                    None if self.session.machine.is_idle() => break,
                    None => {}
                    Some(Frame::Data(bytes)) => {
                        total += bytes.len();
                        if let Some(place) = places.next() {
                            *place = IoSlice::new(bytes);
                        }
                    }
                    Some(frame) => match owned(frame) {
                        Ok(frame) => self.then = Some(Box::new(frame)),
                        Err(error) => return Delivered::Event(Event::End(end_of(error)), used),
                    },
                }
            }
            if total > 0 {
                let filled = RUNS - places.len();
                let runs = &runs[..filled];
                let written = self.write(cx, runs, total);
                self.undelivered = total - written;
                self.held_back = written < total;
                if written < total {
                    self.down = (self.down / 2).max(1);
                    if written == 0 && total == old.len() && used == total {
                        // As it was.
                        return Delivered::Blocked(None);
                    }
                    let rest = &input[used..];
                    return self.poll_again(cx, kept(runs, written, rest));
                }
            }
            if let Some(frame) = self.then.take()
                && let Some(event) = self.take_frame(*frame)
            {
                return Delivered::Event(event, used);
            }
            if used == input.len() {
                return Delivered::All;
            }
            if self.session.machine.is_idle() {
                return Delivered::Over(used);
            }
        }
    }

    /// Writes to the application. Returns how many bytes are done with: all of them if it takes nothing any
    /// more.
    fn write(&mut self, cx: &mut Context<'_>, runs: &[IoSlice<'_>], total: usize) -> usize {
        if self.broken.is_some() {
            return total;
        }
        let Some(stream) = self.application.stream_mut() else { return 0 };
        match Pin::new(stream).poll_write_vectored(cx, runs) {
            Poll::Ready(Ok(written)) => {
                self.received += count(written);
                self.counters.add_received(count(written));
                written
            }
            Poll::Ready(Err(error)) => {
                self.broken = Some(error);
                total
            }
            Poll::Pending => 0,
        }
    }

    /// A short write clears the socket's readiness: asks to be woken when there is room again.
    fn poll_again(&mut self, cx: &mut Context<'_>, kept: Vec<u8>) -> Delivered {
        if self.application.stream().is_some_and(|stream| stream.poll_write_ready(cx).is_ready()) {
            cx.waker().wake_by_ref();
        }
        Delivered::Blocked(Some(kept))
    }

    fn take_frame(&mut self, frame: Frame<'static>) -> Option<Event> {
        match frame {
            Frame::Accept => Some(Event::Accepted),
            Frame::Refuse(refusal) => Some(Event::End(End::Refused(refusal))),
            Frame::Reset(cause) => Some(Event::End(End::Reset(cause))),
            Frame::NotTaken => Some(Event::End(End::NotTaken)),
            Frame::Reauthenticate(proof) => Some(Event::Reauthenticate(proof)),
            Frame::GoingAway => None,
            Frame::Fin => {
                let stream = self.application.stream()?;
                match socket2::SockRef::from(stream).shutdown(Shutdown::Write) {
                    Ok(()) => {}
                    // It has closed both ways already: its last read says so.
                    Err(error) if error.kind() == io::ErrorKind::NotConnected => {}
                    Err(error) => self.broken = self.broken.take().or(Some(error)),
                }
                None
            }
            Frame::Open(_) | Frame::Continue(_) | Frame::Data(_) => Some(Event::End(
                End::Protocol(FrameError::OutOfTurn(hauberk_core::session::FrameType::Open)),
            )),
        }
    }
}

impl Relay {
    /// The end of a session that cannot be read any more.
    fn end_of(&mut self, error: SessionError) -> End {
        match self.unsendable.take() {
            Some(first) => End::SessionFailed(first.into()),
            None => end_of(error),
        }
    }
}

enum Delivered {
    All,
    /// The stream is over after so many bytes of the input. The rest belongs to the next one.
    Over(usize),
    /// The application takes no more for now. What is left, if it is not the input as it was.
    Blocked(Option<Vec<u8>>),
    /// After so many bytes of the input.
    Event(Event, usize),
}

/// What the application did not take, and everything behind it.
fn kept(runs: &[IoSlice<'_>], mut written: usize, rest: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    for run in runs {
        let skip = written.min(run.len());
        written -= skip;
        all.extend_from_slice(&run[skip..]);
    }
    all.extend_from_slice(rest);
    all
}

/// Seals the first `length` bytes of content that stand in the places of their records. Returns how
/// many bytes the records have.
fn seal_records(
    session: &mut Session,
    scratch: &mut Scratch,
    length: usize,
) -> Result<usize, SessionError> {
    let (mut left, mut total) = (length, 0);
    for record in scratch.cipher.chunks_mut(RECORD) {
        if left == 0 {
            break;
        }
        let content = left.min(MAX_PLAINTEXT);
        let size = content + RECORD_OVERHEAD;
        session.seal_in_place(&mut record[..size])?;
        left -= content;
        total += size;
    }
    Ok(total)
}

pub(crate) fn end_of(error: SessionError) -> End {
    match error {
        SessionError::Closed => End::Truncated,
        SessionError::Protocol(error) => End::Protocol(error),
        SessionError::Io(_) | SessionError::TimedOut | SessionError::Refused(_) => {
            End::SessionFailed(error)
        }
    }
}

fn count(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}
