//! Two connections in clear, joined: what one application sends, the other gets. Half-close, back-pressure
//! and fairness are those of the relay (`relay.rs`), and so are the buffers: the thread's own.

use std::{
    io,
    net::Shutdown,
    pin::Pin,
    task::{Context, Poll, ready},
};

use hauberk_linux::socket::{linger_on_close, reset_on_close};
use hauberk_telemetry::EdgeCounters;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use crate::session::{RECORD, SLOTS, with_scratch};

/// The two connections, which are reset if they end otherwise than well, and the counters of the ends that
/// this agent tells of.
pub(crate) struct Joined {
    caller: TcpStream,
    called: TcpStream,
    there: Way,
    back: Way,
    of_caller: Option<EdgeCounters>,
    of_called: Option<EdgeCounters>,
}

/// Whose connection broke, and how.
pub(crate) struct Broken {
    pub(crate) caller: bool,
    pub(crate) error: io::Error,
}

/// One direction.
#[derive(Default)]
struct Way {
    /// What was read and not taken yet, and how much of it is out.
    rest: Vec<u8>,
    rest_used: usize,
    /// Doubles, as the relay's, while everything that is read also goes out.
    burst: usize,
    over: bool,
    bytes: u64,
}

/// Which end failed.
enum Failed {
    Reading(io::Error),
    Writing(io::Error),
}

impl Joined {
    pub(crate) fn new(
        caller: TcpStream,
        called: TcpStream,
        of_caller: Option<EdgeCounters>,
        of_called: Option<EdgeCounters>,
    ) -> Self {
        for stream in [&caller, &called] {
            // As the relay's application. It may be gone already.
            drop(reset_on_close(stream));
        }
        Self { caller, called, there: Way::default(), back: Way::default(), of_caller, of_called }
    }

    /// Bytes from the caller, and to it.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        (self.there.bytes, self.back.bytes)
    }

    /// Goes on until both have sent their last byte. Nothing is lost if it is dropped in between and called
    /// again.
    pub(crate) async fn run(&mut self) -> Result<(), Broken> {
        std::future::poll_fn(|cx| self.poll(cx)).await
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let before = self.bytes();
        let there = self.there.poll(cx, &mut self.caller, &mut self.called);
        let back = self.back.poll(cx, &mut self.called, &mut self.caller);
        self.count(before);
        if let Poll::Ready(Err(failed)) = there {
            return Poll::Ready(Err(failed.of(true)));
        }
        if let Poll::Ready(Err(failed)) = back {
            return Poll::Ready(Err(failed.of(false)));
        }
        if self.there.over && self.back.over {
            for stream in [&self.caller, &self.called] {
                // It may be gone already.
                drop(linger_on_close(stream));
            }
            return Poll::Ready(Ok(()));
        }
        Poll::Pending
    }

    fn count(&self, (there, back): (u64, u64)) {
        let (there, back) = (self.there.bytes - there, self.back.bytes - back);
        if let Some(counters) = &self.of_caller {
            counters.add_sent(there);
            counters.add_received(back);
        }
        if let Some(counters) = &self.of_called {
            counters.add_sent(back);
            counters.add_received(there);
        }
    }
}

impl Failed {
    fn of(self, caller_sends: bool) -> Broken {
        match self {
            Self::Reading(error) => Broken { caller: caller_sends, error },
            Self::Writing(error) => Broken { caller: !caller_sends, error },
        }
    }
}

impl Way {
    /// One burst, then other connections of the thread get their turn.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut TcpStream,
        to: &mut TcpStream,
    ) -> Poll<Result<(), Failed>> {
        ready!(self.poll_rest(cx, to)).map_err(Failed::Writing)?;
        if self.over {
            return Poll::Ready(Ok(()));
        }
        self.burst = self.burst.clamp(1, SLOTS);
        let room = self.burst * RECORD;
        let read = ready!(with_scratch(|scratch| {
            let mut into = ReadBuf::new(scratch.plain.get_mut(..room).unwrap_or_default());
            ready!(Pin::new(&mut *from).poll_read(cx, &mut into)).map_err(Failed::Reading)?;
            let bytes = into.filled();
            self.write(cx, to, bytes).map_err(Failed::Writing)?;
            Poll::Ready(Ok::<_, Failed>(bytes.len()))
        }))?;
        if read == 0 {
            match socket2::SockRef::from(&*to).shutdown(Shutdown::Write) {
                Ok(()) => {}
                // It has closed both ways already: its last read said so.
                Err(error) if error.kind() == io::ErrorKind::NotConnected => {}
                Err(error) => return Poll::Ready(Err(Failed::Writing(error))),
            }
            self.over = true;
            return Poll::Ready(Ok(()));
        }
        if !self.rest.is_empty() {
            self.burst /= 2;
        } else if read == room {
            self.burst *= 2;
        } else if read < room / 4 {
            self.burst /= 2;
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Sends what it can and keeps the rest.
    fn write(&mut self, cx: &mut Context<'_>, to: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let written = match Pin::new(to).poll_write(cx, bytes) {
            Poll::Ready(written) => written?,
            Poll::Pending => 0,
        };
        self.bytes += u64::try_from(written).unwrap_or(u64::MAX);
        self.rest = bytes.get(written..).unwrap_or_default().to_vec();
        self.rest_used = 0;
        Ok(())
    }

    fn poll_rest(&mut self, cx: &mut Context<'_>, to: &mut TcpStream) -> Poll<io::Result<()>> {
        while self.rest_used < self.rest.len() {
            let rest = self.rest.get(self.rest_used..).unwrap_or_default();
            let written = ready!(Pin::new(&mut *to).poll_write(cx, rest))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.bytes += u64::try_from(written).unwrap_or(u64::MAX);
            self.rest_used += written;
        }
        self.rest = Vec::new();
        self.rest_used = 0;
        Poll::Ready(Ok(()))
    }
}
