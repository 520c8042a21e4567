//! One stream of a multiplexed session, and the copying between it and an application's connection.
//!
//! A stream that has much to say moves: the source asks that a dedicated session carries on with it, and once that is
//! accepted each side says on the multiplexed one where its bytes end here. What came before that and the application has
//! not taken goes along.

use std::{
    io::{self, IoSliceMut},
    net::Shutdown,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use hauberk_core::session::{
    Continue, Event, INITIAL_CREDIT, NUMBERED_HEADER_LENGTH, Refusal, ResetCause, Role,
};
use hauberk_telemetry::EdgeCounters;
use hauberk_tls::channel::MAX_PLAINTEXT;
use tokio::{io::AsyncWrite, sync::oneshot, time::Sleep};

use super::{Ended, MOST_WAITING, Mux, State, Tail, misuse};
use crate::{
    receive::poll_receive,
    relay::{Application, End, end_of},
    session::{OPEN_TIMEOUT, Scratch, Session, SessionError, with_scratch},
};

/// Bytes in one run: with its header, a record.
const MOST_AT_ONCE: usize = MAX_PLAINTEXT - NUMBERED_HEADER_LENGTH;

/// Delivered bytes after which the peer is told that more are taken.
const CREDIT_STEP: u32 = INITIAL_CREDIT / 2;

/// Bytes one way before a stream that is held up for want of credit counts as one that has much to say.
const BULK: u64 = 256 * 1024;

/// Reads of one direction before other connections of the thread get their turn. The second one is made only if the kernel
/// has said that more is there.
const READS: usize = 2;

/// A stream. It is reset when it is dropped before its end.
pub(crate) struct Stream {
    mux: Arc<Mux>,
    number: u32,
}

impl Stream {
    pub(super) fn new(mux: Arc<Mux>, number: u32) -> Self {
        Self { mux, number }
    }

    pub(crate) fn mux(&self) -> &Arc<Mux> {
        &self.mux
    }

    /// Destination: takes it.
    pub(crate) fn accept(&self) -> Result<(), SessionError> {
        let mut state = self.mux.lock();
        let State { machine, out, .. } = &mut *state;
        machine.accept(self.number, out).map_err(misuse)?;
        let at_once = state.speaks(self.number);
        drop(state);
        if at_once {
            with_scratch(|scratch| self.mux.send_at_once(scratch));
        }
        Ok(())
    }

    /// Destination: refuses it.
    pub(crate) fn refuse(self, refusal: &Refusal) {
        let mut state = self.mux.lock();
        let State { machine, out, .. } = &mut *state;
        // If it is over already, nobody waits for the answer.
        let _answered_before = machine.refuse(self.number, refusal, out);
        state.spoken(self.number);
    }

    /// Breaks it off.
    pub(crate) fn reset(self, cause: ResetCause) {
        self.break_off(cause);
    }

    fn break_off(&self, cause: ResetCause) {
        let mut state = self.mux.lock();
        let State { machine, out, .. } = &mut *state;
        let before = out.len();
        machine.reset(self.number, cause, out);
        if out.len() > before {
            state.spoken(self.number);
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.break_off(ResetCause::Application);
        self.mux.lock().leave(self.number);
    }
}

/// What happens on a relay over a multiplexed session.
pub(crate) enum Fate {
    /// The destination took the stream: now the application that wants it is to be connected.
    Accepted,
    /// It has much to say: a dedicated session is wanted ([`Relay::wait_for_tail`]). Once.
    Bulk,
    /// It goes on with [`Relay::into_tail`].
    Moved,
    /// It is over.
    End(End),
}

/// A stream that goes on over a dedicated session.
pub(crate) struct Moved {
    pub(crate) application: Application,
    pub(crate) session: Box<Session>,
    /// Who wants the session back.
    pub(crate) back: Option<oneshot::Sender<Box<Session>>>,
    pub(crate) counters: EdgeCounters,
    /// What the application has not taken yet.
    pub(crate) undelivered: Vec<u8>,
    /// The application has sent its last byte.
    pub(crate) finished: bool,
    /// How writing to the application failed.
    pub(crate) broken: Option<io::Error>,
    pub(crate) sent: u64,
    pub(crate) received: u64,
}

/// Both directions of one stream.
pub(crate) struct Relay {
    application: Application,
    stream: Stream,
    counters: EdgeCounters,
    /// What the application has not taken yet.
    undelivered: Vec<u8>,
    undelivered_used: usize,
    /// What it has taken since the peer was told.
    delivered: u32,
    accepted: bool,
    /// The application has been told that nothing comes any more.
    finished: bool,
    /// How writing to the application failed. What it said before is read to its end and sent; what comes for
    /// it is thrown away.
    broken: Option<io::Error>,
    /// The destination wishes that it moves.
    bulk_wished: bool,
    bulk_told: bool,
    kept_alive: bool,
    /// A dedicated session that is being made for it.
    coming: Option<oneshot::Receiver<Box<Session>>>,
    /// The peer has not said yet that it carries on.
    asked: Option<Asked>,
    tail: Option<Tail>,
    /// The application had sent its last byte before the stream moved.
    finished_before: bool,
    pub(crate) sent: u64,
    pub(crate) received: u64,
}

/// A dedicated session whose peer is asked whether it carries on.
struct Asked {
    session: Box<Session>,
    /// When it must have answered.
    until: Pin<Box<Sleep>>,
}

/// What is found on the stream in one look.
struct Look {
    /// The session has ended, and the stream does with what is to be delivered.
    ended: bool,
    accepted: bool,
    may_send: Option<usize>,
    has_room: bool,
    bulk: bool,
    tail: Option<Tail>,
}

impl Relay {
    /// For a stream that is asked for, by an application that waits, or taken.
    pub(crate) fn new(
        application: Application,
        stream: Stream,
        counters: EdgeCounters,
    ) -> Box<Self> {
        // A destination has answered. A source learns of the answer, which may have come already, when it is polled.
        let accepted = stream.mux.lock().facts.role() == Role::Destination;
        Box::new(Self {
            application,
            stream,
            counters,
            undelivered: Vec::new(),
            undelivered_used: 0,
            delivered: 0,
            accepted,
            finished: false,
            broken: None,
            bulk_wished: false,
            bulk_told: false,
            kept_alive: false,
            coming: None,
            asked: None,
            tail: None,
            finished_before: false,
            sent: 0,
            received: 0,
        })
    }

    /// The destination has not answered yet.
    pub(crate) fn awaits_answer(&self) -> bool {
        !self.accepted
    }

    /// Lets the application's `connect` succeed, if it waits.
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

    pub(crate) fn into_parts(self) -> (Application, Stream) {
        (self.application, self.stream)
    }

    /// Goes on until something happens that is not copying. Nothing is lost if it is dropped in
    /// between and called again.
    pub(crate) async fn run(&mut self) -> Fate {
        std::future::poll_fn(|cx| {
            // With buffers of its own.
            if let Poll::Ready(end) = self.poll_coming(cx) {
                return Poll::Ready(Fate::End(end));
            }
            with_scratch(|scratch| self.poll(cx, scratch))
        })
        .await
    }

    fn poll(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> Poll<Fate> {
        let mut look = match self.look(cx) {
            Ok(look) => look,
            Err(end) => return Poll::Ready(Fate::End(end)),
        };
        self.bulk_wished |= look.bulk;
        if let Some(tail) = look.tail.take() {
            self.move_to(tail);
        }
        if look.accepted && !std::mem::replace(&mut self.accepted, true) {
            return Poll::Ready(Fate::Accepted);
        }
        if let Some(tail) = &mut self.tail {
            // That it is taken does not wait until it carries on. How it fails is seen then.
            let _flushed = tail.session.poll_flush(cx);
        }
        // Down first: a reset by the peer explains why sending fails.
        if let Poll::Ready(fate) = self.poll_down(cx) {
            return Poll::Ready(fate);
        }
        if look.ended && self.undelivered.is_empty() {
            // Nobody else wakes it any more.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if self.is_bulk(&look) {
            self.bulk_told = true;
            return Poll::Ready(Fate::Bulk);
        }
        if let Poll::Ready(end) = self.poll_up(cx, scratch, &look) {
            return Poll::Ready(Fate::End(end));
        }
        // Where the peer is asked to carry on, it may have agreed.
        if self.finished
            && self.asked.is_none()
            && self.stream.mux.lock().machine.is_over(self.stream.number)
        {
            self.application.complete();
            return Poll::Ready(Fate::End(End::Complete));
        }
        Poll::Pending
    }

    /// Takes what has come, and asks to be woken by what comes next.
    fn look(&mut self, cx: &mut Context<'_>) -> Result<Look, End> {
        let mut state = self.stream.mux.lock();
        let number = self.stream.number;
        let (may_send, has_room) = (state.machine.may_send(number), state.out.len() < MOST_WAITING);
        let ended = state.ended.as_ref().map(SessionError::again);
        let Some(entry) = state.streams.get_mut(&number) else {
            return Err(End::Truncated);
        };
        entry.wait(cx);
        let waits = may_send.is_some() && !has_room && !std::mem::replace(&mut entry.waits, true);
        if self.undelivered_used == self.undelivered.len() {
            self.undelivered = std::mem::take(&mut entry.inbox);
            self.undelivered_used = 0;
        }
        let mut look = Look {
            ended: false,
            accepted: entry.accepted,
            may_send,
            has_room,
            bulk: std::mem::take(&mut entry.bulk),
            tail: entry.tail.take(),
        };
        if matches!(entry.end, Some(Ended::Cut(_))) {
            // Nothing more of it is wanted.
            self.undelivered.clear();
            self.undelivered_used = 0;
        }
        let is_told = match &entry.end {
            None => false,
            // There is the other direction, too.
            Some(Ended::Fin | Ended::Moved) => state.machine.is_over(number),
            Some(Ended::Refused(_) | Ended::Reset(_) | Ended::NotTaken | Ended::Cut(_)) => true,
        };
        look.ended = ended.is_some() && !is_told;
        if waits {
            state.waiting.push(number);
        }
        match ended {
            // Of the stream itself is known how it ended.
            Some(error) if !is_told && self.undelivered.is_empty() => Err(match error {
                // Nothing of it was used: its application waits.
                SessionError::Closed | SessionError::Io(_) if !self.accepted && !look.accepted => {
                    End::NotTaken
                }
                error => end_of(error),
            }),
            Some(_) | None => Ok(look),
        }
    }

    /// Session → application.
    fn poll_down(&mut self, cx: &mut Context<'_>) -> Poll<Fate> {
        loop {
            while self.undelivered_used < self.undelivered.len() {
                let rest = &self.undelivered[self.undelivered_used..];
                let length = rest.len();
                let written = if self.broken.is_some() {
                    length
                } else {
                    let Some(stream) = self.application.stream_mut() else { return Poll::Pending };
                    match Pin::new(stream).poll_write(cx, rest) {
                        Poll::Ready(Ok(written)) => {
                            self.received += count(written);
                            self.counters.add_received(count(written));
                            written
                        }
                        Poll::Ready(Err(error)) => {
                            self.broken = Some(error);
                            length
                        }
                        Poll::Pending => return self.held_back(),
                    }
                };
                self.undelivered_used += written;
                self.delivered =
                    self.delivered.saturating_add(u32::try_from(written).unwrap_or(u32::MAX));
            }
            // An idle stream keeps no room.
            self.undelivered = Vec::new();
            self.undelivered_used = 0;
            let mut state = self.stream.mux.lock();
            let number = self.stream.number;
            if self.delivered >= CREDIT_STEP {
                let State { machine, out, .. } = &mut *state;
                machine.credit(number, std::mem::take(&mut self.delivered), out);
                state.spoken(number);
            }
            let Some(entry) = state.streams.get_mut(&number) else { return Poll::Pending };
            if !entry.inbox.is_empty() {
                self.undelivered = std::mem::take(&mut entry.inbox);
                self.undelivered_used = 0;
                continue;
            }
            let fate = match &mut entry.end {
                None => return Poll::Pending,
                Some(Ended::Moved | Ended::Fin) if self.tail.is_some() => Fate::Moved,
                Some(Ended::Fin) if self.finished => return Poll::Pending,
                Some(Ended::Fin) => {
                    // Closing says it as well, which follows.
                    let closes = self.asked.is_none() && state.machine.is_over(number);
                    drop(state);
                    self.finish(closes);
                    return Poll::Pending;
                }
                // The dedicated session comes, or nobody has asked for that.
                Some(Ended::Moved) if self.asked.is_some() || entry.tail.is_some() => {
                    return Poll::Pending;
                }
                Some(Ended::Moved) => Fate::End(End::Truncated),
                Some(ended) => Fate::End(match std::mem::replace(ended, Ended::Fin) {
                    Ended::Refused(refusal) => End::Refused(*refusal),
                    Ended::Reset(cause) => End::Reset(cause),
                    Ended::NotTaken => End::NotTaken,
                    Ended::Cut(cut) => End::Cut(cut),
                    Ended::Fin | Ended::Moved => return Poll::Pending,
                }),
            };
            return Poll::Ready(fate);
        }
    }

    /// The application takes no more for now. If all that is missing for a move has come, it goes along as it is.
    fn held_back(&mut self) -> Poll<Fate> {
        if self.tail.is_none() {
            return Poll::Pending;
        }
        let mut state = self.stream.mux.lock();
        let Some(entry) = state.streams.get_mut(&self.stream.number) else { return Poll::Pending };
        let is_whole = matches!(entry.end, Some(Ended::Moved | Ended::Fin));
        if is_whole {
            self.undelivered.append(&mut entry.inbox);
        }
        if is_whole { Poll::Ready(Fate::Moved) } else { Poll::Pending }
    }

    /// The peer's application has sent its last byte, of which this one is told, unless the connection `closes`.
    fn finish(&mut self, closes: bool) {
        self.finished = true;
        if closes {
            return;
        }
        let Some(stream) = self.application.stream() else { return };
        match socket2::SockRef::from(stream).shutdown(Shutdown::Write) {
            Ok(()) => {}
            // It has closed both ways already: its last read says so.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => {}
            Err(error) => self.broken = self.broken.take().or(Some(error)),
        }
    }

    /// Application → session. Ready only at an end that is not the good one.
    fn poll_up(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch, look: &Look) -> Poll<End> {
        if self.tail.is_some() {
            // The rest goes over that one, also of an application that broke.
            return Poll::Pending;
        }
        let Some(mut may_send) = look.may_send else {
            return match self.broken.take() {
                Some(error) => Poll::Ready(End::ApplicationFailed(error)),
                None => Poll::Pending,
            };
        };
        if !look.has_room {
            return Poll::Pending;
        }
        for _ in 0..READS {
            // Of what it says without a credit nothing is lost: it waits where it is.
            let room = may_send.min(MOST_AT_ONCE);
            if room == 0 {
                return Poll::Pending;
            }
            let Some(stream) = self.application.stream() else { return Poll::Pending };
            let place = &mut scratch.plain[..room];
            let read = match poll_receive(cx, stream, &mut [IoSliceMut::new(place)]) {
                Poll::Ready(Ok(read)) => read,
                Poll::Ready(Err(error)) => {
                    let first = self.broken.take().unwrap_or(error);
                    return Poll::Ready(End::ApplicationFailed(first));
                }
                Poll::Pending => return Poll::Pending,
            };
            if read == 0 {
                // The kernel reports a reset once, and to the write that failed.
                if let Some(error) = self.broken.take() {
                    return Poll::Ready(End::ApplicationFailed(error));
                }
                if let Err(error) = self.say(scratch, |state, number, _| {
                    let State { machine, out, .. } = state;
                    machine.fin(number, out).map_err(misuse)
                }) {
                    return Poll::Ready(End::SessionFailed(error));
                }
                return Poll::Pending;
            }
            if let Err(error) = self.say(scratch, |state, number, plain| {
                let header = state.machine.data(number, read).map_err(misuse)?;
                state.out.extend_from_slice(&header);
                state.out.extend_from_slice(&plain[..read]);
                Ok(())
            }) {
                return Poll::Ready(End::SessionFailed(error));
            }
            self.sent += count(read);
            self.counters.add_sent(count(read));
            may_send -= read;
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Says what is in `scratch.plain`, or something else.
    fn say(
        &self,
        scratch: &mut Scratch,
        what: impl FnOnce(&mut State, u32, &[u8]) -> Result<(), SessionError>,
    ) -> Result<(), SessionError> {
        let mut state = self.stream.mux.lock();
        what(&mut state, self.stream.number, &scratch.plain)?;
        let at_once = state.speaks(self.stream.number);
        drop(state);
        if at_once {
            self.stream.mux.send_at_once(scratch);
        }
        Ok(())
    }

    /// Whether a dedicated session should carry on with it, as far as this side knows.
    fn is_bulk(&self, look: &Look) -> bool {
        !self.bulk_told
            && self.tail.is_none()
            && (self.bulk_wished || (look.may_send == Some(0) && self.sent >= BULK))
    }

    /// Destination: wishes that the source moves it.
    pub(crate) fn wish_to_move(&self) {
        // If it is over meanwhile, there is nothing to move.
        drop(with_scratch(|scratch| {
            self.say(scratch, |state, number, _| {
                let State { machine, out, .. } = state;
                machine.bulk(number, out).map_err(misuse)
            })
        }));
    }

    /// Source: a dedicated session is being made for it.
    pub(crate) fn wait_for_tail(&mut self, coming: oneshot::Receiver<Box<Session>>) {
        self.coming = Some(coming);
    }

    /// If it has come, the peer is asked that it carries on. Without one, or if the peer does not want to, the stream
    /// stays where it is. Ready if it is not known any more where it is.
    fn poll_coming(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        if let Some(coming) = &mut self.coming
            && let Poll::Ready(session) = Pin::new(coming).poll(cx)
        {
            self.coming = None;
            let of = Continue { session: self.stream.mux.name, stream: self.stream.number };
            let session = session
                .ok()
                .and_then(|mut session| session.carry_on(&of).is_ok().then_some(session));
            let until = || Box::pin(tokio::time::sleep(OPEN_TIMEOUT));
            self.asked = session.map(|session| Asked { session, until: until() });
        }
        let Some(asked) = &mut self.asked else { return Poll::Pending };
        let answer = loop {
            let answer = match asked.session.poll_flush(cx) {
                Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                Poll::Ready(Ok(())) | Poll::Pending => asked.session.poll_event(cx),
            };
            match answer {
                // Of later ones. This one is answered yet.
                Poll::Ready(Ok(Some(Event::GoingAway))) => {}
                Poll::Ready(answer) => break answer,
                Poll::Pending if asked.until.as_mut().poll(cx).is_ready() => {
                    break Err(SessionError::TimedOut);
                }
                Poll::Pending => return Poll::Pending,
            }
        };
        let Some(Asked { session, .. }) = self.asked.take() else { return Poll::Pending };
        match answer {
            Ok(Some(Event::Accept)) => {
                self.move_to(Tail { session, back: None });
                Poll::Pending
            }
            Ok(Some(Event::Refuse(_) | Event::NotTaken)) => Poll::Pending,
            // It may have accepted, and have said so.
            Ok(_) => Poll::Ready(End::Truncated),
            Err(error) => Poll::Ready(end_of(error)),
        }
    }

    /// Says that it moves, which it does not.
    #[cfg(test)]
    pub(super) fn stream_says_moved(&self) {
        let moved = with_scratch(|scratch| {
            self.say(scratch, |state, number, _| {
                let State { machine, out, .. } = state;
                machine.moved(number, out).map_err(misuse)
            })
        });
        assert!(moved.is_ok());
    }

    /// Nothing more is said here.
    fn move_to(&mut self, mut tail: Tail) {
        tail.session.come_here();
        let mut state = self.stream.mux.lock();
        let State { machine, out, .. } = &mut *state;
        self.finished_before = machine.moved(self.stream.number, out).is_err();
        state.spoken(self.stream.number);
        drop(state);
        self.tail = Some(tail);
    }

    /// What carries on.
    pub(crate) fn into_moved(self) -> Option<Moved> {
        let Self { application, counters, tail, undelivered, undelivered_used, broken, .. } = self;
        let undelivered = undelivered[undelivered_used..].to_vec();
        let Tail { session, back } = tail?;
        let (finished, sent, received) = (self.finished_before, self.sent, self.received);
        Some(Moved {
            application,
            session,
            back,
            counters,
            undelivered,
            finished,
            broken,
            sent,
            received,
        })
    }
}

fn count(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}
