//! A session: one mutual TLS connection between two workload identities, which carries streams one
//! after another. `handshake.rs` makes one, `scratch.rs` lends the buffers that every session of a
//! thread shares.
//!
//! The protocol is `hauberk_core::session`, the records are `hauberk_tls::channel`; this is the socket
//! between them. An idle session holds no buffer, and it is handed around in a box, so that the futures of
//! connections have no room for it but where it is used. One that is dropped without [`Session::close`] is
//! reset, so that nothing of it stays behind in the kernel.

mod handshake;
mod scratch;

use std::{
    io,
    mem::MaybeUninit,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use hauberk_core::{
    policy::Reason,
    session::{
        Event, FrameError, Machine, Open, ProofAllowance, Reauthenticate, Refusal, ResetCause,
    },
    svid::VerifiedSvid,
    time::Timestamp,
};
use hauberk_linux::socket::{self, reset_on_close};
use hauberk_telemetry::record::TlsInfo;
use hauberk_tls::{
    Credential, HandshakeFailure, TrustBundle,
    channel::{CallerToken, Channel, MAX_PLAINTEXT, Opened},
    failure_of,
    limiter::RateLimited,
    prove, reason_of, verify_proof,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

pub(crate) use handshake::{HANDSHAKE_TIMEOUT, accept, connect, greeting};
pub(crate) use scratch::{RECORD, SLOTS, Scratch, with_scratch};

/// How long the answer to an open frame may take: the destination dials its application in this
/// time.
pub(crate) const OPEN_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a stream that was broken off may take to be over at both ends.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a closing session waits for the peer's end, so that no last byte is lost.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Control frames are gathered up to this size before they are sealed by themselves; below it they
/// ride along with data.
const RIDE_ALONG: usize = MAX_PLAINTEXT / 2;

/// A connection whose peer is proven.
pub(crate) struct Session {
    socket: TcpStream,
    channel: Channel,
    pub(crate) machine: Machine,
    /// The beginning of a record.
    partial: Vec<u8>,
    /// Opened bytes that are not used up, and how many of them are.
    plain: Vec<u8>,
    plain_used: usize,
    /// Sealed bytes on their way out, and how many of them are out.
    unsent: Vec<u8>,
    unsent_used: usize,
    /// Frames that are not sealed yet.
    control: Vec<u8>,
    /// The newest proof, not sent yet. One that waits gives way to a newer one.
    proof: Option<Box<Reauthenticate>>,
    facts: Box<Facts>,
    /// The peer has said that nothing comes any more.
    peer_closed: bool,
    /// This side has said goodbye.
    closed: bool,
}

/// What was settled when the session was made, and the proofs since.
struct Facts {
    peer: VerifiedSvid,
    binding: [u8; 32],
    token: CallerToken,
    is_source: bool,
    tls: Arc<TlsInfo>,
    /// The name the caller asked for; at the destination only.
    server_name: Option<String>,
    own: Option<Arc<Credential>>,
    /// When the newest certificate ends that the peer was shown.
    shown_until: Option<Timestamp>,
    trust: Arc<TrustBundle>,
    made: Instant,
    proofs_sent: u32,
    proofs_taken: u32,
    proofs_allowed: ProofAllowance,
}

/// Why a peer's newer certificate is not taken. The session must end.
#[derive(Debug)]
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

impl Drop for Session {
    fn drop(&mut self) {
        if !self.closed {
            // The connection may be gone already.
            drop(reset_on_close(&self.socket));
        }
    }
}

impl Session {
    /// Who the peer is.
    pub(crate) fn peer(&self) -> &VerifiedSvid {
        &self.facts.peer
    }

    /// What TLS settled on.
    pub(crate) fn tls(&self) -> &Arc<TlsInfo> {
        &self.facts.tls
    }

    /// The name that the caller's agent asked for.
    pub(crate) fn server_name(&self) -> Option<&str> {
        self.facts.server_name.as_deref()
    }

    /// What tells the destination of a later session who called in this one.
    pub(crate) fn token(&self) -> CallerToken {
        self.facts.token
    }

    /// Whether the peer was shown this certificate in the handshake.
    pub(crate) fn was_made_with(&self, own: &Arc<Credential>) -> bool {
        self.facts.own.as_ref().is_some_and(|then| Arc::ptr_eq(then, own))
    }

    /// When it was made.
    pub(crate) fn made(&self) -> Instant {
        self.facts.made
    }

    /// Whether a new stream may still be opened on what was proven when it was made: the same own
    /// certificate, the same roots, and a peer whose certificate has not ended.
    pub(crate) fn is_current(
        &self,
        own: Option<&Arc<Credential>>,
        trust: &Arc<TrustBundle>,
        now: Timestamp,
    ) -> bool {
        let same_own = match (&self.facts.own, own) {
            (Some(then), Some(now)) => Arc::ptr_eq(then, now),
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        same_own
            && Arc::ptr_eq(&self.facts.trust, trust)
            && self.facts.peer.facts().not_after() > now
    }

    /// Nothing waits in it, and the peer has said nothing since the last stream. What an idle peer can
    /// say is only that it goes away.
    pub(crate) fn is_quiet(&self) -> bool {
        if !self.machine.is_reusable()
            || self.has_unsent()
            || !self.partial.is_empty()
            || self.plain_used < self.plain.len()
        {
            return false;
        }
        // The kernel is asked, not the runtime, which may not have heard of it yet.
        let peeked = socket2::SockRef::from(&self.socket).peek(&mut [MaybeUninit::uninit()]);
        matches!(peeked, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Asks for a stream. The frame goes out when the session is polled.
    pub(crate) fn open(&mut self, open: &Open) -> Result<(), SessionError> {
        self.machine.open(open, &mut self.control).map_err(misuse)
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
        self.facts.shown_until
    }

    /// Shows the peer a newer certificate, in place of one that it was not shown yet.
    pub(crate) fn show_proof(&mut self, credential: &Credential) -> Result<(), String> {
        let sequence = self.facts.proofs_sent + 1;
        let proof = prove(credential, &self.facts.binding, self.facts.is_source, sequence)
            .map_err(|error| error.to_string())?;
        self.facts.proofs_sent = sequence;
        self.facts.shown_until = Some(credential.facts().not_after());
        self.proof = Some(Box::new(proof));
        Ok(())
    }

    /// Takes the peer's newer certificate.
    ///
    /// # Errors
    /// If it does not prove what it should, or proofs come too often.
    pub(crate) fn take_proof(
        &mut self,
        frame: &Reauthenticate,
        trust: &TrustBundle,
        now: Timestamp,
    ) -> Result<(), ProofRefused> {
        let facts = &mut self.facts;
        // Before the work of verifying it.
        if !facts.proofs_allowed.take(now) {
            let detail = "the peer shows newer certificates too often".to_owned();
            return Err(ProofRefused { reason: Reason::RateLimited, detail });
        }
        facts.peer = verify_proof(
            frame,
            &facts.peer,
            trust,
            &facts.binding,
            !facts.is_source,
            facts.proofs_taken,
            now,
        )
        .map_err(|error| ProofRefused { reason: Reason::BadSvid, detail: error.to_string() })?;
        facts.proofs_taken = frame.sequence;
        Ok(())
    }

    /// Whether sealed bytes wait for the network.
    pub(crate) fn is_blocked(&self) -> bool {
        self.unsent_used < self.unsent.len()
    }

    /// Whether anything waits to go out.
    pub(crate) fn has_unsent(&self) -> bool {
        self.is_blocked() || !self.control.is_empty() || self.proof.is_some()
    }

    /// How often its sending key was renewed since this was last asked.
    pub(crate) fn take_renewals(&mut self) -> u32 {
        self.channel.take_renewals()
    }

    /// How long the peer's kernel has acknowledged nothing of what was sent to it.
    pub(crate) fn silence(&self) -> Option<Duration> {
        socket::unacknowledged_for(&self.socket).ok().flatten()
    }

    /// Gets ready for a burst of records: seals what must go out before it, which is in the way until it
    /// is sent ([`Self::is_blocked`]). Returns the length of the frames that wait, to ride along.
    pub(crate) fn prepare_burst(&mut self) -> Result<usize, SessionError> {
        self.channel.prepare(&mut self.unsent)?;
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
        Ok(self.channel.seal(&control, &mut self.unsent)?)
    }

    /// Seals one record in place.
    pub(crate) fn seal_in_place(&mut self, record: &mut [u8]) -> Result<(), SessionError> {
        Ok(self.channel.seal_in_place(record)?)
    }

    /// Sends sealed bytes; what does not go out now waits. Only while nothing else waits. Returns
    /// whether all of it went.
    pub(crate) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        sealed: &[u8],
    ) -> Result<bool, SessionError> {
        let sent = match Pin::new(&mut self.socket).poll_write(cx, sealed) {
            Poll::Ready(sent) => sent?,
            Poll::Pending => 0,
        };
        let rest = sealed.get(sent..).unwrap_or_default();
        if rest.is_empty() {
            return Ok(true);
        }
        self.unsent = rest.to_vec();
        self.unsent_used = 0;
        Ok(false)
    }

    /// Ready once all sealed bytes are out.
    pub(crate) fn poll_unsent(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        while self.is_blocked() {
            let rest = self.unsent.get(self.unsent_used..).unwrap_or_default();
            match ready!(Pin::new(&mut self.socket).poll_write(cx, rest))? {
                0 => return Poll::Ready(Err(io::Error::from(io::ErrorKind::WriteZero).into())),
                count => self.unsent_used += count,
            }
        }
        if !self.unsent.is_empty() {
            self.unsent = Vec::new();
            self.unsent_used = 0;
        }
        Poll::Ready(Ok(()))
    }

    /// Ready once everything is out, frames that wait included.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
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

    /// Gives them back.
    pub(crate) fn keep_plain(&mut self, plain: Vec<u8>, used: usize) {
        self.plain = plain;
        self.plain_used = used;
    }

    /// Reads at most about `limit` bytes from the network and opens all whole records, into
    /// `scratch.plain`: how many bytes that is, at least one. `Closed` at the end.
    pub(crate) fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        limit: usize,
    ) -> Poll<Result<usize, SessionError>> {
        loop {
            if self.peer_closed {
                return Poll::Ready(Err(SessionError::Closed));
            }
            let have = self.partial.len();
            let (front, rest) = scratch.cipher.split_at_mut(have.min(scratch.cipher.len()));
            let room = limit.max(RECORD).min(rest.len());
            let mut into = ReadBuf::new(rest.get_mut(..room).unwrap_or_default());
            ready!(Pin::new(&mut self.socket).poll_read(cx, &mut into))?;
            let count = into.filled().len();
            if count == 0 {
                return Poll::Ready(Err(SessionError::Closed));
            }
            for (to, from) in front.iter_mut().zip(&self.partial) {
                *to = *from;
            }
            let opened = self.open_records(scratch, have + count)?;
            if opened > 0 {
                return Poll::Ready(Ok(opened));
            }
        }
    }

    /// Opens the whole records among the first bytes of `scratch.cipher`, keeps the rest.
    fn open_records(
        &mut self,
        scratch: &mut Scratch,
        length: usize,
    ) -> Result<usize, SessionError> {
        let (mut used, mut opened) = (0, 0);
        loop {
            let input = scratch.cipher.get(used..length).unwrap_or_default();
            let output = scratch.plain.get_mut(opened..).unwrap_or_default();
            match self.channel.open(input, output)? {
                Opened::Incomplete => break,
                Opened::Data { used: more, length } => {
                    used += more;
                    opened += length;
                }
                Opened::Closed => {
                    self.peer_closed = true;
                    break;
                }
            }
        }
        let rest = scratch.cipher.get(used..length).unwrap_or_default();
        // Nothing counts behind a close.
        self.partial = if self.peer_closed { Vec::new() } else { rest.to_vec() };
        Ok(opened)
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
                let rest = self.plain.get(self.plain_used..).unwrap_or_default();
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
                    .map_ok(|length| scratch.plain.get(..length).unwrap_or_default().to_vec())
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
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let goodbye = async {
            self.flush().await?;
            self.channel.close(&mut self.unsent)?;
            std::future::poll_fn(|cx| self.poll_unsent(cx)).await?;
            self.socket.shutdown().await?;
            let mut rest = [0; 512];
            while self.socket.read(&mut rest).await? > 0 {}
            Ok::<_, SessionError>(())
        };
        // A peer that is gone already takes nothing away from it.
        if matches!(tokio::time::timeout(CLOSE_TIMEOUT, goodbye).await, Ok(Ok(()))) {
            self.closed = true;
        }
    }

    /// The same without waiting, for a session that carries nothing.
    pub(crate) fn close_idle(mut self: Box<Self>) {
        if self.seal_control().is_err() || self.channel.close(&mut self.unsent).is_err() {
            return;
        }
        let rest = self.unsent.get(self.unsent_used..).unwrap_or_default();
        self.closed = matches!(self.socket.try_write(rest), Ok(sent) if sent == rest.len());
    }
}

/// Events that are not data outlive the bytes they were in.
pub(crate) fn owned(event: Event<'_>) -> Result<Event<'static>, SessionError> {
    Ok(match event {
        Event::Open(open) => Event::Open(open),
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
