//! What a multiplexed session's own task does with its socket: what streams have gathered goes out, what comes in is handed
//! to them.

use std::{
    io,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hauberk_core::session::{OfStream, Open, Reauthenticate};
use hauberk_tls::Credential;

use super::{Ended, Entry, MOST_UNREAD, Mux, Speakers, State, Stream};
use crate::session::{RECORD, Scratch, SessionError, with_scratch};

/// Records that are read at once.
const READ_AT_ONCE: usize = 4;

/// Reads in one turn, before others of the thread get theirs.
const TURNS: usize = 2;

/// Flushes in one turn, likewise.
const FLUSHES: usize = 2;

/// Reads from the socket, and sends what streams do not send themselves.
pub(crate) struct Driver {
    mux: Driven,
    /// Opened bytes that are not used up, and how many of them are.
    plain: Vec<u8>,
    plain_used: usize,
    /// Everything that was ready has had its turn since the first frame waited.
    gathered: bool,
}

/// Without its driver a session is over, however that came.
struct Driven(Arc<Mux>);

impl std::ops::Deref for Driven {
    type Target = Arc<Mux>;

    fn deref(&self) -> &Arc<Mux> {
        &self.0
    }
}

impl Drop for Driven {
    fn drop(&mut self) {
        self.0.lock().end(SessionError::Closed);
        // The peer hears of it now, not when the last stream is gone.
        drop(self.0.wire().take());
    }
}

/// What the owner of the driver has to see to.
pub(crate) enum Event {
    /// The peer wants a stream.
    Open(Box<Open>, Stream),
    /// The peer shows a newer certificate.
    Reauthenticate(Box<Reauthenticate>),
    /// It takes no further streams, and the last one is over.
    Done,
}

impl Driver {
    pub(super) fn new(mux: Arc<Mux>, plain: Vec<u8>) -> Self {
        Self { mux: Driven(mux), plain, plain_used: 0, gathered: false }
    }

    pub(crate) fn mux(&self) -> &Arc<Mux> {
        &self.mux
    }

    /// How often its sending key was renewed since this was last asked.
    pub(crate) fn take_renewals(&mut self) -> u32 {
        self.mux.wire().as_mut().map_or(0, |wire| wire.link.take_renewals())
    }

    /// How long the peer's kernel has acknowledged nothing of what was sent to it.
    pub(crate) fn silence(&self) -> Option<Duration> {
        self.mux.wire().as_ref().and_then(|wire| wire.link.silence())
    }

    /// Shows the peer a newer certificate.
    pub(crate) fn show_proof(&self, credential: &Credential) -> Result<(), String> {
        self.mux.show_proof(credential)
    }

    /// Destination: takes no further streams.
    pub(crate) fn go_away(&self) {
        let mut state = self.mux.lock();
        let State { machine, out, .. } = &mut *state;
        // Only a source has nothing to say.
        let _source_only = machine.go_away(out);
        state.retiring = true;
        state.wake_driver();
    }

    /// Goes on until something happens that is not copying. Nothing is lost if it is dropped in between and called
    /// again.
    ///
    /// # Errors
    /// If the session is over, otherwise than by [`Event::Done`].
    pub(crate) async fn run(&mut self) -> Result<Event, SessionError> {
        std::future::poll_fn(|cx| with_scratch(|scratch| self.poll(cx, scratch))).await
    }

    /// It is over: every stream hears of it.
    pub(crate) fn end(&self, error: &SessionError) {
        self.mux.lock().end(error.again());
    }

    /// Says goodbye, with everything that waits.
    pub(crate) async fn close(mut self) {
        let flushed = std::future::poll_fn(|cx| {
            with_scratch(|scratch| {
                loop {
                    match self.poll_flush(cx, scratch, true) {
                        Poll::Ready(Ok(true)) => {}
                        Poll::Ready(Ok(false)) => return Poll::Ready(true),
                        Poll::Ready(Err(_)) => return Poll::Ready(false),
                        Poll::Pending => return Poll::Pending,
                    }
                }
            })
        });
        let flushed = tokio::time::timeout(crate::session::SETTLE_TIMEOUT, flushed).await;
        let wire = self.mux.wire().take();
        drop(self);
        if flushed == Ok(true)
            && let Some(wire) = wire
        {
            wire.link.close().await;
        }
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
    ) -> Poll<Result<Event, SessionError>> {
        match self.poll_in(cx, scratch) {
            Poll::Ready(Ok(event)) => return Poll::Ready(Ok(event)),
            // It may have said so together with the end of the last stream.
            Poll::Ready(Err(SessionError::Closed)) => {
                return Poll::Ready(self.done_if(|_| true).ok_or(SessionError::Closed));
            }
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            Poll::Pending => {}
        }
        for _ in 0..FLUSHES {
            match self.poll_flush(cx, scratch, false) {
                // There may be more.
                Poll::Ready(Ok(true)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Ready(Ok(false)) => {
                    let done = self.done_if(|state| state.retiring);
                    return done.map_or(Poll::Pending, |done| Poll::Ready(Ok(done)));
                }
                Poll::Pending => return Poll::Pending,
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Its end, if it carries nothing.
    fn done_if(&self, also: impl FnOnce(&State) -> bool) -> Option<Event> {
        let mut state = self.mux.lock();
        if state.machine.open_streams() > 0 || state.ended.is_some() || !also(&state) {
            return None;
        }
        // Nothing of it is seen that anybody opens now.
        state.end(SessionError::Closed);
        Some(Event::Done)
    }

    /// Whether sealed bytes wait for the network.
    #[cfg(test)]
    pub(super) fn is_held_up(&self) -> bool {
        self.mux.wire().as_ref().is_some_and(|wire| wire.link.is_blocked())
    }

    /// Lets what was said out.
    #[cfg(test)]
    pub(super) fn poll_out(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let flushed = with_scratch(|scratch| self.poll_flush(cx, scratch, true));
        assert!(!matches!(flushed, Poll::Ready(Err(_))));
        flushed.map(drop)
    }

    /// What comes in.
    fn poll_in(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
    ) -> Poll<Result<Event, SessionError>> {
        if !self.plain.is_empty() {
            let plain = std::mem::take(&mut self.plain);
            let (used, event) = self.take(&plain[self.plain_used..])?;
            if let Some(event) = event {
                self.plain_used += used;
                self.plain = plain;
                return Poll::Ready(Ok(event));
            }
            self.plain_used = 0;
        }
        for _ in 0..TURNS {
            let length = {
                let mut wire = self.mux.wire();
                let wire = wire.as_mut().ok_or(SessionError::Closed)?;
                match wire.link.poll_fill(cx, scratch, READ_AT_ONCE * RECORD) {
                    Poll::Ready(Ok(length)) => length,
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => return Poll::Pending,
                }
            };
            let plain = &scratch.plain[..length];
            let (used, event) = self.take(plain)?;
            if let Some(event) = event {
                self.plain = plain[used..].to_vec();
                return Poll::Ready(Ok(event));
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Hands what came to its streams, up to something that is for the owner: how many bytes that is.
    fn take(&self, plain: &[u8]) -> Result<(usize, Option<Event>), SessionError> {
        let mut state = self.mux.lock();
        if state.out.len() > MOST_UNREAD {
            let text = "the peer asks for more and more and does not read the answers";
            return Err(SessionError::Io(io::Error::new(io::ErrorKind::TimedOut, text)));
        }
        let mut used = 0;
        while used < plain.len() {
            let came = state.machine.receive(&plain[used..])?;
            used += came.used;
            let Some((number, event)) = came.event else { continue };
            let event = match event {
                OfStream::Open(open) => {
                    state.streams.insert(number, Entry::default());
                    Event::Open(Box::new(open), Stream::new(self.mux.0.clone(), number))
                }
                OfStream::Reauthenticate(proof) => Event::Reauthenticate(Box::new(proof)),
                OfStream::GoingAway { not_taken } => {
                    state.retiring = true;
                    for number in not_taken {
                        state.note(number, |entry| entry.end = Some(Ended::NotTaken));
                    }
                    continue;
                }
                other => {
                    state.note(number, |entry| entry.take(other));
                    continue;
                }
            };
            state.note_idle();
            return Ok((used, Some(event)));
        }
        state.note_idle();
        Ok((used, None))
    }

    /// Seals and sends what waits. Whether it did so; there may be more then.
    fn poll_flush(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        at_once: bool,
    ) -> Poll<Result<bool, SessionError>> {
        let mut wire = self.mux.wire();
        let wire = wire.as_mut().ok_or(SessionError::Closed)?;
        wire.check()?;
        match wire.link.poll_unsent(cx) {
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            Poll::Pending => return Poll::Pending,
        }
        let mut state = self.mux.lock();
        if !state.driver.as_ref().is_some_and(|driver| driver.will_wake(cx.waker())) {
            state.driver = Some(cx.waker().clone());
        }
        if state.out.is_empty() {
            self.gathered = false;
            state.speakers = Speakers::None;
            return Poll::Ready(Ok(false));
        }
        if !at_once && state.gathers() && !std::mem::replace(&mut self.gathered, true) {
            drop(state);
            yield_to_others(cx);
            return Poll::Pending;
        }
        self.gathered = false;
        wire.take(&mut state);
        drop(state);
        wire.send(scratch)?;
        Poll::Ready(Ok(true))
    }
}

impl State {
    fn note(&mut self, number: u32, what: impl FnOnce(&mut Entry)) {
        // Its task may be gone.
        if let Some(entry) = self.streams.get_mut(&number) {
            what(entry);
            entry.wake();
        }
    }
}

impl Entry {
    fn take(&mut self, event: OfStream<'_>) {
        match event {
            OfStream::Accept => self.accepted = true,
            OfStream::Data(bytes) => self.inbox.extend_from_slice(bytes),
            OfStream::Fin => self.end = Some(Ended::Fin),
            OfStream::Moved => self.end = Some(Ended::Moved),
            // What came first says why.
            OfStream::Refuse(refusal) => {
                self.end.get_or_insert_with(|| Ended::Refused(Box::new(refusal)));
            }
            OfStream::Reset(_) if matches!(self.end, Some(Ended::Refused(_))) => {}
            OfStream::Reset(cause) => self.end = Some(Ended::Reset(cause)),
            OfStream::Bulk => self.bulk = true,
            // It looks by itself.
            OfStream::Credit => {}
            // Of the session, which are taken before.
            OfStream::Open(_) | OfStream::Reauthenticate(_) | OfStream::GoingAway { .. } => {}
        }
    }
}

/// Has the task polled again once everything that is ready now has had its turn, and the network was asked for more.
fn yield_to_others(cx: &mut Context<'_>) {
    let yielding = std::pin::pin!(tokio::task::yield_now());
    // Its first poll says when to wake; there is no need for a second one.
    assert_pending(yielding.poll(cx));
}

fn assert_pending(poll: Poll<()>) {
    debug_assert!(poll.is_pending(), "a task that yields waits once");
}
