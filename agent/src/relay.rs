//! The copy loop between an application's connection and a session: the hot path.
//!
//! Polled by hand in one task, both directions. Buffers come from a stock of the thread and go back
//! as soon as nothing is in them, so that an idle connection holds none.

use std::{
    cell::RefCell,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use hauberk_core::session::{
    FrameError, FrameType, HEADER_LENGTH, Header, Reauthenticate, ResetCause,
};
use hauberk_telemetry::EdgeCounters;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::TlsStream;

/// One read from an application, one frame to the peer, is at most this long.
const BUFFER: usize = 64 * 1024;

/// Idle buffers that a thread keeps.
const STOCK: usize = 32;

thread_local! {
    static BUFFERS: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

fn take_buffer() -> Box<[u8]> {
    BUFFERS
        .with_borrow_mut(Vec::pop)
        .unwrap_or_else(|| vec![0; BUFFER + HEADER_LENGTH].into_boxed_slice())
}

fn give_buffer(buffer: Box<[u8]>) {
    BUFFERS.with_borrow_mut(|stock| {
        if stock.len() < STOCK {
            stock.push(buffer);
        }
    });
}

/// How a relay ended.
#[derive(Debug)]
pub(crate) enum End {
    /// Both sides sent their last byte.
    Complete,
    /// The application here broke its connection.
    ApplicationFailed(io::Error),
    /// The peer said why it broke off.
    Reset(ResetCause),
    /// The session ended without an end of the stream: cut off, not complete.
    Truncated,
    /// The session failed.
    SessionFailed(io::Error),
    /// The peer broke the protocol.
    Protocol(FrameError),
}

/// What happens on a relay.
#[derive(Debug)]
pub(crate) enum Event {
    /// The peer shows a newer certificate.
    Reauthenticate(Reauthenticate),
    /// It is over.
    End(End),
}

/// Both directions of one stream.
pub(crate) struct Relay {
    application: TcpStream,
    session: TlsStream<TcpStream>,
    counters: EdgeCounters,
    up: Up,
    down: Down,
    /// Application → peer.
    pub(crate) sent: u64,
    /// Peer → application.
    pub(crate) received: u64,
}

/// Application → session.
struct Up {
    /// Framed bytes on their way out, and how many of them are out.
    frame: Option<(Box<[u8]>, usize, usize)>,
    /// A control frame that goes out before the next data.
    control: Vec<u8>,
    control_out: usize,
    needs_flush: bool,
    state: UpState,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum UpState {
    Open,
    /// The end-of-stream frame is queued.
    Ending,
    Ended,
}

/// Session → application.
struct Down {
    /// Bytes out of the session that are not used up: from, to.
    buffer: Option<(Box<[u8]>, usize, usize)>,
    header: [u8; HEADER_LENGTH],
    header_read: usize,
    frame: InFrame,
    ended: bool,
}

enum InFrame {
    /// Between frames, or in the middle of a header.
    Header,
    /// This much of a data frame is still to come.
    Data(usize),
    /// A control frame is being gathered.
    Control(Header, Vec<u8>),
}

impl Relay {
    pub(crate) fn new(
        application: TcpStream,
        session: TlsStream<TcpStream>,
        counters: EdgeCounters,
    ) -> Self {
        Self {
            application,
            session,
            counters,
            up: Up {
                frame: None,
                control: Vec::new(),
                control_out: 0,
                needs_flush: false,
                state: UpState::Open,
            },
            down: Down {
                buffer: None,
                header: [0; HEADER_LENGTH],
                header_read: 0,
                frame: InFrame::Header,
                ended: false,
            },
            sent: 0,
            received: 0,
        }
    }

    /// Sends a control frame after the data frame that is under way.
    pub(crate) fn queue(&mut self, frame_type: FrameType, body: &[u8]) -> Result<(), FrameError> {
        self.up.control.extend_from_slice(&Header::encode(frame_type, body.len())?);
        self.up.control.extend_from_slice(body);
        Ok(())
    }

    /// Goes on until something happens that is not copying. Nothing is lost if it is dropped in
    /// between and called again.
    pub(crate) async fn run(&mut self) -> Event {
        std::future::poll_fn(|cx| self.poll(cx)).await
    }

    /// Tells the peer why the stream ends here, as far as it listens, and resets the application.
    pub(crate) async fn break_off(mut self, cause: ResetCause) {
        self.reset_application();
        if self.queue(FrameType::Reset, &[cause.byte()]).is_ok() {
            let send = std::future::poll_fn(|cx| match self.up.poll_out(cx, &mut self.session) {
                Poll::Ready(Ok(())) => Pin::new(&mut self.session).poll_flush(cx).map(|_| ()),
                Poll::Ready(Err(_)) => Poll::Ready(()),
                Poll::Pending => Poll::Pending,
            });
            // A peer that does not read must not keep a cut connection alive.
            drop(tokio::time::timeout(std::time::Duration::from_secs(1), send).await);
        }
    }

    /// Says goodbye and waits for the peer's, so that the kernel does not throw away what is still on
    /// its way because of a byte that nobody read.
    pub(crate) async fn close(mut self, patience: std::time::Duration) {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let goodbye = async {
            self.session.shutdown().await?;
            let mut rest = [0; 512];
            while self.session.read(&mut rest).await? > 0 {}
            io::Result::Ok(())
        };
        // The stream is complete: a peer that is gone already takes nothing away from it.
        drop(tokio::time::timeout(patience, goodbye).await);
    }

    /// Makes the application see a reset, as it would without us in between.
    pub(crate) fn reset_application(&self) {
        // The connection may be gone already.
        drop(socket2::SockRef::from(&self.application).set_linger(Some(std::time::Duration::ZERO)));
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        // Down first: a reset by the peer explains why sending fails.
        let down = self.poll_down(cx);
        if let Poll::Ready(Some(event)) = down {
            return Poll::Ready(event);
        }
        if let Poll::Ready(Some(end)) = self.poll_up(cx) {
            return Poll::Ready(Event::End(end));
        }
        if self.up.state == UpState::Ended && self.down.ended {
            return Poll::Ready(Event::End(End::Complete));
        }
        Poll::Pending
    }

    fn poll_up(&mut self, cx: &mut Context<'_>) -> Poll<Option<End>> {
        loop {
            match self.up.poll_out(cx, &mut self.session) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Some(End::SessionFailed(error))),
                Poll::Pending => return Poll::Pending,
            }
            match self.up.state {
                UpState::Open => {}
                UpState::Ending => self.up.state = UpState::Ended,
                UpState::Ended => {
                    return self.poll_flush(cx).map(|failed| failed.map(End::SessionFailed));
                }
            }
            if self.up.state == UpState::Ended {
                continue;
            }
            match self.poll_application(cx) {
                Poll::Ready(Ok(0)) => {
                    if let Err(error) = self.queue(FrameType::Fin, &[]) {
                        return Poll::Ready(Some(End::Protocol(error)));
                    }
                    self.up.state = UpState::Ending;
                }
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => {
                    return Poll::Ready(Some(End::ApplicationFailed(error)));
                }
                Poll::Pending => {
                    return self.poll_flush(cx).map(|failed| failed.map(End::SessionFailed));
                }
            }
        }
    }

    /// Pending once everything is flushed: there is nothing more to do then.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Error>> {
        if self.up.needs_flush {
            match ready!(Pin::new(&mut self.session).poll_flush(cx)) {
                Ok(()) => self.up.needs_flush = false,
                Err(error) => return Poll::Ready(Some(error)),
            }
        }
        if self.up.state == UpState::Ended { Poll::Ready(None) } else { Poll::Pending }
    }

    fn poll_application(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        // No buffer before there is something to read.
        ready!(self.application.poll_read_ready(cx))?;
        let mut buffer = take_buffer();
        let (_, body) = buffer.split_at_mut(HEADER_LENGTH);
        let mut into = ReadBuf::new(body);
        match Pin::new(&mut self.application).poll_read(cx, &mut into) {
            Poll::Ready(Ok(())) => {
                let length = into.filled().len();
                if length == 0 {
                    give_buffer(buffer);
                    return Poll::Ready(Ok(0));
                }
                let header = Header::encode(FrameType::Data, length).map_err(io::Error::other)?;
                for (to, from) in buffer.iter_mut().zip(header) {
                    *to = from;
                }
                self.up.frame = Some((buffer, 0, HEADER_LENGTH + length));
                self.sent += u64::try_from(length).unwrap_or(0);
                self.counters.add_sent(u64::try_from(length).unwrap_or(0));
                Poll::Ready(Ok(length))
            }
            Poll::Ready(Err(error)) => {
                give_buffer(buffer);
                Poll::Ready(Err(error))
            }
            Poll::Pending => {
                give_buffer(buffer);
                Poll::Pending
            }
        }
    }

    fn poll_down(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        loop {
            if self.down.buffer.is_none() {
                let mut buffer = take_buffer();
                let mut into = ReadBuf::new(&mut buffer);
                match Pin::new(&mut self.session).poll_read(cx, &mut into) {
                    Poll::Ready(Ok(())) => {
                        let length = into.filled().len();
                        if length == 0 {
                            give_buffer(buffer);
                            return self.session_ended();
                        }
                        self.down.buffer = Some((buffer, 0, length));
                    }
                    Poll::Ready(Err(error)) => {
                        give_buffer(buffer);
                        let end = if error.kind() == io::ErrorKind::UnexpectedEof {
                            End::Truncated
                        } else {
                            End::SessionFailed(error)
                        };
                        return Poll::Ready(Some(Event::End(end)));
                    }
                    Poll::Pending => {
                        give_buffer(buffer);
                        return Poll::Pending;
                    }
                }
            }
            if let Some(event) = ready!(self.poll_use(cx)) {
                return Poll::Ready(Some(event));
            }
        }
    }

    /// After both ends of the stream the peer may close; before them it is a truncation.
    fn session_ended(&mut self) -> Poll<Option<Event>> {
        let end = if self.down.ended && self.up.state == UpState::Ended {
            End::Complete
        } else {
            End::Truncated
        };
        Poll::Ready(Some(Event::End(end)))
    }

    /// Uses up the buffer: headers, data to the application, control frames.
    fn poll_use(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        while let Some((buffer, from, to)) = &mut self.down.buffer {
            if from == to {
                if let Some((buffer, ..)) = self.down.buffer.take() {
                    give_buffer(buffer);
                }
                break;
            }
            let rest = buffer.get(*from..*to).unwrap_or_default();
            match &mut self.down.frame {
                InFrame::Header => {
                    let wanted = self.down.header.get_mut(self.down.header_read..);
                    let wanted = wanted.unwrap_or_default();
                    let count = wanted.len().min(rest.len());
                    for (to, from) in wanted.iter_mut().zip(rest) {
                        *to = *from;
                    }
                    *from += count;
                    self.down.header_read += count;
                    if self.down.header_read == HEADER_LENGTH {
                        self.down.header_read = 0;
                        match Header::decode(self.down.header) {
                            Ok(header) => {
                                if let Some(event) = self.begin_frame(header) {
                                    return Poll::Ready(Some(event));
                                }
                            }
                            Err(error) => {
                                return Poll::Ready(Some(Event::End(End::Protocol(error))));
                            }
                        }
                    }
                }
                InFrame::Data(left) => {
                    let run = rest.get(..rest.len().min(*left)).unwrap_or_default();
                    match ready!(Pin::new(&mut self.application).poll_write(cx, run)) {
                        Ok(count) => {
                            *from += count;
                            *left -= count;
                            if *left == 0 {
                                self.down.frame = InFrame::Header;
                            }
                            self.received += u64::try_from(count).unwrap_or(0);
                            self.counters.add_received(u64::try_from(count).unwrap_or(0));
                        }
                        Err(error) => {
                            return Poll::Ready(Some(Event::End(End::ApplicationFailed(error))));
                        }
                    }
                }
                InFrame::Control(header, body) => {
                    let count = rest.len().min(header.length - body.len());
                    body.extend_from_slice(rest.get(..count).unwrap_or_default());
                    *from += count;
                    if body.len() == header.length {
                        let (header, body) = (*header, std::mem::take(body));
                        self.down.frame = InFrame::Header;
                        return Poll::Ready(Some(control_event(header.frame_type, &body)));
                    }
                }
            }
        }
        Poll::Ready(None)
    }

    fn begin_frame(&mut self, header: Header) -> Option<Event> {
        let out_of_turn =
            || Some(Event::End(End::Protocol(FrameError::OutOfTurn(header.frame_type))));
        match header.frame_type {
            FrameType::Data if !self.down.ended => {
                self.down.frame = InFrame::Data(header.length);
                None
            }
            FrameType::Fin if !self.down.ended => {
                self.down.ended = true;
                let closed =
                    socket2::SockRef::from(&self.application).shutdown(std::net::Shutdown::Write);
                match closed {
                    Ok(()) => None,
                    // It has closed both ways already: its last read said so.
                    Err(error) if error.kind() == io::ErrorKind::NotConnected => None,
                    Err(error) => Some(Event::End(End::ApplicationFailed(error))),
                }
            }
            FrameType::Reset | FrameType::Reauthenticate if header.length > 0 => {
                self.down.frame = InFrame::Control(header, Vec::with_capacity(header.length));
                None
            }
            FrameType::Data
            | FrameType::Fin
            | FrameType::Reset
            | FrameType::Reauthenticate
            | FrameType::Open
            | FrameType::Accept
            | FrameType::Refuse => out_of_turn(),
        }
    }
}

fn control_event(frame_type: FrameType, body: &[u8]) -> Event {
    let decoded = match frame_type {
        FrameType::Reset => body
            .first()
            .ok_or(FrameError::Truncated("reset", "cause"))
            .and_then(|byte| ResetCause::from_byte(*byte))
            .map(|cause| Event::End(End::Reset(cause))),
        FrameType::Reauthenticate => Reauthenticate::decode(body).map(Event::Reauthenticate),
        FrameType::Open
        | FrameType::Accept
        | FrameType::Refuse
        | FrameType::Data
        | FrameType::Fin => Err(FrameError::OutOfTurn(frame_type)),
    };
    decoded.unwrap_or_else(|error| Event::End(End::Protocol(error)))
}

impl Up {
    /// Ready once neither data nor control frames wait.
    fn poll_out(
        &mut self,
        cx: &mut Context<'_>,
        session: &mut TlsStream<TcpStream>,
    ) -> Poll<io::Result<()>> {
        while let Some((buffer, from, to)) = &mut self.frame {
            let rest = buffer.get(*from..*to).unwrap_or_default();
            let count = ready!(Pin::new(&mut *session).poll_write(cx, rest))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.needs_flush = true;
            *from += count;
            if from == to
                && let Some((buffer, ..)) = self.frame.take()
            {
                give_buffer(buffer);
            }
        }
        while self.control_out < self.control.len() {
            let rest = self.control.get(self.control_out..).unwrap_or_default();
            let count = ready!(Pin::new(&mut *session).poll_write(cx, rest))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.needs_flush = true;
            self.control_out += count;
        }
        if self.control_out > 0 {
            self.control = Vec::new();
            self.control_out = 0;
        }
        Poll::Ready(Ok(()))
    }
}

/// The relay's own memory for an idle connection is this struct and what rustls keeps.
const _: () = assert!(std::mem::size_of::<Up>() + std::mem::size_of::<Down>() < 256);
