//! A session: one mutual TLS connection between two workload identities, which carries streams one
//! after another. `handshake.rs` makes one, or a multiplexed one (`mux.rs`), `facts.rs` is what was proven of it,
//! `link.rs` its records and the socket, `scratch.rs` lends the buffers that every session of a thread shares.
//!
//! Buffers are sliced by bounds that were made here: where one is wrong, that is a mistake of ours, and the panic ends the
//! connection, whose ends see a reset. Nothing is sent that was not counted, and nothing that came is left out.
//!
//! The protocol is `hauberk_core::session`, the records are `hauberk_tls::channel`. An idle session holds no buffer, and it
//! is handed around in a box, so that the futures of connections have no room for it but where it is used.

mod facts;
mod handshake;
mod link;
mod scratch;

use std::{
    io,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

pub(crate) use facts::Facts;
pub(crate) use handshake::{HANDSHAKE_TIMEOUT, New, Trunk, accept, connect, greeting};
use hauberk_core::{
    policy::Reason,
    session::{Continue, Event, FrameError, Machine, Reauthenticate, Refusal, ResetCause},
    svid::VerifiedSvid,
    time::Timestamp,
};
use hauberk_telemetry::record::TlsInfo;
use hauberk_tls::{
    Credential, HandshakeFailure, TrustBundle, channel::MAX_PLAINTEXT, failure_of,
    limiter::RateLimited, reason_of,
};
pub(crate) use link::Link;
pub(crate) use scratch::{RECORD, SLOTS, Scratch, with_scratch};

/// How long the answer to an open frame may take: the destination dials its application in this
/// time.
pub(crate) const OPEN_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a stream that was broken off may take to be over at both ends.
pub(crate) const SETTLE_TIMEOUT: Duration = Duration::from_secs(1);

/// Control frames are gathered up to this size before they are sealed by themselves; below it they
/// ride along with data.
const RIDE_ALONG: usize = MAX_PLAINTEXT / 2;

/// A connection whose peer is proven, for one stream after another.
pub(crate) struct Session {
    link: Link,
    facts: Box<Facts>,
    pub(crate) machine: Machine,
    /// Opened bytes that are not used up, and how many of them are.
    plain: Vec<u8>,
    plain_used: usize,
    /// Frames that are not sealed yet.
    control: Vec<u8>,
    /// The newest proof, not sent yet. One that waits gives way to a newer one.
    proof: Option<Box<Reauthenticate>>,
}

/// Why a peer's newer certificate is not taken. The session must end.
#[derive(Debug, Clone)]
pub(crate) struct ProofRefused {
    pub(crate) reason: Reason,
    pub(crate) detail: String,
}

/// Why there is no session, or no stream on it.
#[derive(Debug)]
pub(crate) enum SessionError {
    /// TLS refused it, here or there.
    Refused(HandshakeFailure),
    /// The network failed, or the peer went away.
    Io(io::Error),
    /// It took too long.
    TimedOut,
    /// The peer broke the protocol.
    Protocol(FrameError),
    /// The peer closed the session.
    Closed,
}

impl SessionError {
    /// The same once more, for another who waits for it.
    pub(crate) fn again(&self) -> Self {
        match self {
            Self::Refused(failure) => Self::Refused(failure.clone()),
            Self::Io(error) => Self::Io(match error.raw_os_error() {
                Some(code) => io::Error::from_raw_os_error(code),
                None => io::Error::new(error.kind(), error.to_string()),
            }),
            Self::TimedOut => Self::TimedOut,
            Self::Protocol(error) => Self::Protocol(error.clone()),
            Self::Closed => Self::Closed,
        }
    }
}

impl std::fmt::Display for SessionError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Refused(failure) => f.write_str(&failure.detail),
            Self::Io(error) => write!(f, "{error}"),
            Self::TimedOut => f.write_str("the peer did not answer in time"),
            Self::Protocol(error) => write!(f, "the peer broke the protocol: {error}"),
            Self::Closed => f.write_str("the peer closed the session"),
        }
    }
}

impl From<io::Error> for SessionError {
    fn from(error: io::Error) -> Self {
        match reason_of(&error) {
            Some(failure) => Self::Refused(failure),
            None => Self::Io(error),
        }
    }
}

impl From<rustls::Error> for SessionError {
    fn from(error: rustls::Error) -> Self {
        Self::Refused(failure_of(&error))
    }
}

impl From<RateLimited> for SessionError {
    fn from(error: RateLimited) -> Self {
        let (reason, detail) = (Reason::RateLimited, error.to_string());
        Self::Refused(HandshakeFailure { reason, by_peer: false, detail })
    }
}

impl From<FrameError> for SessionError {
    fn from(error: FrameError) -> Self {
        Self::Protocol(error)
    }
}

impl Session {
    pub(crate) fn new(link: Link, facts: Box<Facts>, plain: Vec<u8>) -> Box<Self> {
        let machine = Machine::new(facts.role());
        let (plain_used, control, proof) = (0, Vec::new(), None);
        Box::new(Self { link, facts, machine, plain, plain_used, control, proof })
    }

    /// What is proven of it.
    pub(crate) fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Who the peer is.
    pub(crate) fn peer(&self) -> &VerifiedSvid {
        self.facts.peer()
    }

    /// What TLS settled on.
    pub(crate) fn tls(&self) -> &Arc<TlsInfo> {
        self.facts.tls()
    }

    /// The name that the caller's agent asked for.
    pub(crate) fn server_name(&self) -> Option<&str> {
        self.facts.server_name()
    }

    /// Whether the peer was shown this certificate in the handshake.
    pub(crate) fn was_made_with(&self, own: &Arc<Credential>) -> bool {
        self.facts.was_made_with(own)
    }

    /// When it was made.
    pub(crate) fn made(&self) -> Instant {
        self.facts.made()
    }

    /// As [`Facts::is_current`].
    pub(crate) fn is_current(
        &self,
        own: Option<&Arc<Credential>>,
        trust: &Arc<TrustBundle>,
        now: Timestamp,
    ) -> bool {
        self.facts.is_current(own, trust, now)
    }

    /// Nothing waits in it, and the peer has said nothing since the last stream. What an idle peer can
    /// say is only that it goes away.
    pub(crate) fn is_quiet(&self) -> bool {
        if !self.machine.is_reusable() || self.has_unsent() || self.plain_used < self.plain.len() {
            return false;
        }
        self.link.is_quiet()
    }

    /// Asks that it carries on with a stream of a multiplexed session. The frame goes out when the session is polled.
    pub(crate) fn carry_on(&mut self, stream: &Continue) -> Result<(), SessionError> {
        self.machine.carry_on(stream, &mut self.control).map_err(misuse)
    }

    pub(crate) fn accept(&mut self) -> Result<(), SessionError> {
        self.machine.accept(&mut self.control).map_err(misuse)
    }

    pub(crate) fn refuse(&mut self, refusal: &Refusal) -> Result<(), SessionError> {
        self.machine.refuse(refusal, &mut self.control).map_err(misuse)
    }

    pub(crate) fn fin(&mut self) -> Result<(), SessionError> {
        self.machine.fin(&mut self.control).map_err(misuse)
    }

    pub(crate) fn reset(&mut self, cause: ResetCause) {
        self.machine.reset(cause, &mut self.control);
    }

    pub(crate) fn go_away(&mut self) -> Result<(), SessionError> {
        self.machine.go_away(&mut self.control).map_err(misuse)
    }

    /// When the newest certificate ends that the peer was shown.
    pub(crate) fn shown_until(&self) -> Option<Timestamp> {
        self.facts.shown_until()
    }

    /// Shows the peer a newer certificate, in place of one that it was not shown yet.
    pub(crate) fn show_proof(&mut self, credential: &Credential) -> Result<(), String> {
        self.proof = Some(Box::new(self.facts.show_proof(credential)?));
        Ok(())
    }

    /// As [`Facts::take_proof`].
    pub(crate) fn take_proof(
        &mut self,
        frame: &Reauthenticate,
        trust: &TrustBundle,
        now: Timestamp,
    ) -> Result<(), ProofRefused> {
        self.facts.take_proof(frame, trust, now)
    }

    /// Whether sealed bytes wait for the network.
    pub(crate) fn is_blocked(&self) -> bool {
        self.link.is_blocked()
    }

    /// Whether anything waits to go out.
    pub(crate) fn has_unsent(&self) -> bool {
        self.is_blocked() || !self.control.is_empty() || self.proof.is_some()
    }

    /// How often its sending key was renewed since this was last asked.
    pub(crate) fn take_renewals(&mut self) -> u32 {
        self.link.take_renewals()
    }

    /// How long the peer's kernel has acknowledged nothing of what was sent to it.
    pub(crate) fn silence(&self) -> Option<Duration> {
        self.link.silence()
    }

    /// Gets ready for a burst of records: seals what must go out before it, which is in the way until it
    /// is sent ([`Self::is_blocked`]). Returns the length of the frames that wait, to ride along.
    pub(crate) fn prepare_burst(&mut self) -> Result<usize, SessionError> {
        self.link.prepare()?;
        if let Some(proof) = self.proof.take() {
            self.machine.reauthenticate(&proof, &mut self.control);
        }
        if self.control.len() > RIDE_ALONG {
            self.seal_control()?;
        }
        Ok(self.control.len())
    }

    /// Takes the frames that wait, to be sealed together with data.
    pub(crate) fn take_control(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.control)
    }

    /// Seals the frames that wait.
    pub(crate) fn seal_control(&mut self) -> Result<(), SessionError> {
        if let Some(proof) = self.proof.take() {
            self.machine.reauthenticate(&proof, &mut self.control);
        }
        let control = std::mem::take(&mut self.control);
        self.link.seal(&control)
    }

    /// Seals one record in place.
    pub(crate) fn seal_in_place(&mut self, record: &mut [u8]) -> Result<(), SessionError> {
        self.link.seal_in_place(record)
    }

    /// From now on the calling thread is woken by its socket.
    pub(crate) fn come_here(&mut self) {
        self.link.come_here();
    }

    /// Sends sealed bytes; what does not go out now waits, for [`Self::poll_unsent`]. Only while nothing else waits.
    /// Returns whether all of it went.
    pub(crate) fn send(&mut self, sealed: &[u8]) -> Result<bool, SessionError> {
        self.link.send(sealed)
    }

    /// Ready once all sealed bytes are out.
    pub(crate) fn poll_unsent(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        self.link.poll_unsent(cx)
    }

    /// Ready once everything is out, frames that wait included.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        loop {
            ready!(self.poll_unsent(cx))?;
            if !self.has_unsent() {
                return Poll::Ready(Ok(()));
            }
            self.seal_control()?;
        }
    }

    /// Opened bytes that are not used up.
    pub(crate) fn take_plain(&mut self) -> Option<(Vec<u8>, usize)> {
        if self.plain_used == self.plain.len() {
            self.plain = Vec::new();
            self.plain_used = 0;
            return None;
        }
        Some((std::mem::take(&mut self.plain), std::mem::take(&mut self.plain_used)))
    }

    /// Throws away the first of them, which are data of a stream that was broken off: not a byte of them
    /// may be taken for a frame.
    pub(crate) fn skip_plain(&mut self, count: usize) {
        self.plain_used = self.plain_used.saturating_add(count).min(self.plain.len());
    }

    /// Puts bytes before them that came otherwise.
    pub(crate) fn put_before_plain(&mut self, mut bytes: Vec<u8>) {
        bytes.extend_from_slice(&self.plain[self.plain_used..]);
        self.keep_plain(bytes, 0);
    }

    /// Gives them back.
    pub(crate) fn keep_plain(&mut self, plain: Vec<u8>, used: usize) {
        self.plain = plain;
        self.plain_used = used;
    }

    /// As [`Link::poll_fill`].
    pub(crate) fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        limit: usize,
    ) -> Poll<Result<usize, SessionError>> {
        self.link.poll_fill(cx, scratch, limit)
    }

    /// What the peer says next, outside of a stream's data; nothing if it ended the stream without
    /// anything that anybody waits for.
    pub(crate) fn poll_event(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Event<'static>>, SessionError>> {
        loop {
            while self.plain_used < self.plain.len() {
                let was_idle = self.machine.is_idle();
                let rest = &self.plain[self.plain_used..];
                let received = self.machine.receive(rest)?;
                self.plain_used += received.used;
                if let Some(event) = received.event {
                    return Poll::Ready(owned(event).map(Some));
                }
                if !was_idle && self.machine.is_idle() {
                    return Poll::Ready(Ok(None));
                }
            }
            self.plain = Vec::new();
            self.plain_used = 0;
            let filled = with_scratch(|scratch| {
                self.poll_fill(cx, scratch, RECORD)
                    .map_ok(|length| scratch.plain[..length].to_vec())
            });
            self.plain = ready!(filled)?;
        }
    }

    /// Waits until the stream that was broken off or refused is over at both ends, so that the next
    /// one may come. Returns whether it is.
    pub(crate) async fn settle(&mut self) -> bool {
        let settling = std::future::poll_fn(|cx| {
            loop {
                if let Poll::Ready(Err(_)) = self.poll_flush(cx) {
                    return Poll::Ready(false);
                }
                if self.machine.is_idle() && !self.has_unsent() {
                    return Poll::Ready(true);
                }
                match self.poll_event(cx) {
                    Poll::Ready(Ok(Some(Event::Reset(_) | Event::Refuse(_)))) => {
                        self.reset(ResetCause::Answer);
                    }
                    Poll::Ready(Ok(_)) => {}
                    Poll::Ready(Err(_)) => return Poll::Ready(false),
                    Poll::Pending => return Poll::Pending,
                }
            }
        });
        tokio::time::timeout(SETTLE_TIMEOUT, settling).await.unwrap_or(false)
    }

    /// Sends everything that waits, as far as the peer listens.
    pub(crate) async fn flush(&mut self) -> Result<(), SessionError> {
        tokio::time::timeout(SETTLE_TIMEOUT, std::future::poll_fn(|cx| self.poll_flush(cx)))
            .await
            .unwrap_or(Err(SessionError::TimedOut))
    }

    /// Says goodbye and waits for the peer's, so that the kernel does not throw away what is still on
    /// its way because of a byte that nobody read.
    pub(crate) async fn close(mut self: Box<Self>) {
        // A peer that is gone already takes nothing away from it.
        if self.flush().await.is_ok() {
            self.link.close().await;
        }
    }

    /// The same without waiting, for a session that carries nothing.
    pub(crate) fn close_idle(mut self: Box<Self>) {
        if self.seal_control().is_ok() {
            self.link.close_now();
        }
    }
}

/// Events that are not data outlive the bytes they were in.
pub(crate) fn owned(event: Event<'_>) -> Result<Event<'static>, SessionError> {
    Ok(match event {
        Event::Open(open) => Event::Open(open),
        Event::Continue(stream) => Event::Continue(stream),
        Event::Accept => Event::Accept,
        Event::Refuse(refusal) => Event::Refuse(refusal),
        Event::Fin => Event::Fin,
        Event::Reset(cause) => Event::Reset(cause),
        Event::Reauthenticate(proof) => Event::Reauthenticate(proof),
        Event::GoingAway => Event::GoingAway,
        Event::NotTaken => Event::NotTaken,
        Event::Data(_) => {
            return Err(FrameError::OutOfTurn(hauberk_core::session::FrameType::Data).into());
        }
    })
}

/// Our own mistake in what is sent when; ends the session rather than the process.
fn misuse(error: hauberk_core::session::Misuse) -> SessionError {
    SessionError::Io(io::Error::other(error))
}
