//! Two connections in clear, joined: what one application sends, the other gets. Half-close, back-pressure
//! and fairness are those of the relay (`relay.rs`), and so are the buffers: the thread's own.

use std::{
    io::{self, IoSliceMut},
    net::Shutdown,
    pin::Pin,
    task::{Context, Poll, ready},
};

use hauberk_linux::socket::{linger_on_close, reset_on_close};
use hauberk_telemetry::EdgeCounters;
use tokio::{io::AsyncWrite, net::TcpStream};

use crate::{
    delivery::delivered,
    receive::poll_receive,
    session::{RECORD, SLOTS, with_scratch},
};

/// The two connections, which are reset if they end otherwise than well, and the counters of the ends that
/// this agent tells of.
pub(crate) struct Joined {
    caller: TcpStream,
    called: TcpStream,
    there: Way,
    back: Way,
    /// The first connection that broke. What that end said before is still passed on.
    broken: Option<Broken>,
    of_caller: Option<EdgeCounters>,
    of_called: Option<EdgeCounters>,
}

/// Whose connection broke, and how.
#[derive(Debug)]
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
    /// The receiving end is gone: what is read is thrown away, so that the sending end is not held up.
    discards: bool,
    /// The sending end is gone: what it sent before ends without an end of file, which the receiving end could
    /// take for the whole.
    is_cut_short: bool,
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
        let (there, back) = (Way::default(), Way::default());
        Self { caller, called, there, back, broken: None, of_caller, of_called }
    }

    /// Bytes from the caller, and to it.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        (self.there.bytes, self.back.bytes)
    }

    /// Goes on until both have sent their last byte, or one of them broke and the other has got what that one
    /// said before. Nothing is lost if it is dropped in between and called again.
    pub(crate) async fn run(&mut self) -> Result<(), Broken> {
        std::future::poll_fn(|cx| self.poll(cx)).await;
        if let Some(broken) = &self.broken {
            delivered(if broken.caller { &self.called } else { &self.caller }).await;
        }
        self.broken.take().map_or(Ok(()), Err)
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let before = self.bytes();
        // Each is noted before the other way goes on.
        let there = self.there.poll(cx, &self.caller, &mut self.called);
        self.note(cx, there, true);
        let back = self.back.poll(cx, &self.called, &mut self.caller);
        self.note(cx, back, false);
        self.count(before);
        let over = match &self.broken {
            None => self.there.over && self.back.over,
            Some(broken) if broken.caller => self.there.over,
            Some(_) => self.back.over,
        };
        if !over {
            return Poll::Pending;
        }
        if self.broken.is_none() {
            for stream in [&self.caller, &self.called] {
                // It may be gone already.
                drop(linger_on_close(stream));
            }
        }
        Poll::Ready(())
    }

    fn note(
        &mut self,
        cx: &mut Context<'_>,
        outcome: Poll<Result<(), Failed>>,
        caller_sends: bool,
    ) {
        let Poll::Ready(Err(failed)) = outcome else { return };
        let broken = failed.of(caller_sends);
        let (from_it, to_it) = if broken.caller {
            (&mut self.there, &mut self.back)
        } else {
            (&mut self.back, &mut self.there)
        };
        from_it.is_cut_short = true;
        to_it.discard();
        match &self.broken {
            None => self.broken = Some(broken),
            // Its reading ends as its writing did.
            Some(first) if first.caller == broken.caller => {}
            // Nobody is left.
            Some(_) => (self.there.over, self.back.over) = (true, true),
        }
        cx.waker().wake_by_ref();
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
        from: &TcpStream,
        to: &mut TcpStream,
    ) -> Poll<Result<(), Failed>> {
        ready!(self.poll_rest(cx, to)).map_err(Failed::Writing)?;
        if self.over {
            return Poll::Ready(Ok(()));
        }
        self.burst = self.burst.clamp(1, SLOTS);
        let room = self.burst * RECORD;
        let read = ready!(with_scratch(|scratch| {
            // A burst has room in it.
            let into = &mut scratch.plain[..room];
            let read = match ready!(poll_receive(cx, from, &mut [IoSliceMut::new(into)])) {
                Ok(read) => read,
                Err(error) => {
                    self.over = true;
                    return Poll::Ready(Err(Failed::Reading(error)));
                }
            };
            let bytes = &scratch.plain[..read];
            self.write(cx, to, bytes).map_err(Failed::Writing)?;
            Poll::Ready(Ok::<_, Failed>(bytes.len()))
        }))?;
        if read == 0 {
            self.over = true;
            if self.is_cut_short {
                return Poll::Ready(Ok(()));
            }
            return Poll::Ready(match socket2::SockRef::from(&*to).shutdown(Shutdown::Write) {
                Ok(()) => Ok(()),
                // It has closed both ways already: its last read says so.
                Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
                Err(error) => Err(Failed::Writing(error)),
            });
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

    /// Nobody takes any more of it.
    fn discard(&mut self) {
        self.discards = true;
        self.rest = Vec::new();
        self.rest_used = 0;
    }

    /// Sends what it can and keeps the rest.
    fn write(&mut self, cx: &mut Context<'_>, to: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() || self.discards {
            return Ok(());
        }
        let written = match Pin::new(to).poll_write(cx, bytes) {
            Poll::Ready(written) => written?,
            Poll::Pending => 0,
        };
        self.bytes += u64::try_from(written).unwrap_or(u64::MAX);
        self.rest = bytes[written..].to_vec();
        self.rest_used = 0;
        Ok(())
    }

    fn poll_rest(&mut self, cx: &mut Context<'_>, to: &mut TcpStream) -> Poll<io::Result<()>> {
        while self.rest_used < self.rest.len() {
            let rest = &self.rest[self.rest_used..];
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, Interest},
        net::TcpListener,
    };

    use super::*;

    const LONG: Duration = Duration::from_secs(10);

    /// Several bursts, and less than a receive buffer.
    const ANSWER: usize = 40_000;

    /// Both ends of a connection over the loopback interface.
    async fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (connected, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        (connected.unwrap(), accepted.unwrap().0)
    }

    /// An application's connection that has said something and was then closed with unread data in it, which
    /// resets it.
    async fn answered_and_reset() -> TcpStream {
        let (mut ours, mut theirs) = connection().await;
        ours.write_all(b"unread").await.unwrap();
        theirs.readable().await.unwrap();
        theirs.write_all(&[5; ANSWER]).await.unwrap();
        drop(theirs);
        // Not before the reset is here.
        while !ours.ready(Interest::READABLE).await.unwrap().is_read_closed() {
            tokio::task::yield_now().await;
        }
        ours
    }

    async fn what_came(mut application: TcpStream) -> (Vec<u8>, io::Result<usize>) {
        let mut all = Vec::new();
        let end = application.read_to_end(&mut all).await;
        (all, end)
    }

    /// How the connection ended, and the bytes of both ways.
    async fn run(mut joined: Joined) -> (Result<(), Broken>, (u64, u64)) {
        let ended = joined.run().await;
        (ended, joined.bytes())
    }

    async fn soon<T>(future: impl Future<Output = T>) -> T {
        tokio::time::timeout(LONG, future).await.unwrap()
    }

    #[tokio::test]
    async fn what_a_side_said_before_it_broke_comes_before_the_reset() {
        for caller_breaks in [true, false] {
            let (mut application, ours) = connection().await;
            // Writing this to the side that broke fails.
            application.write_all(b"more").await.unwrap();
            ours.readable().await.unwrap();
            let broken = answered_and_reset().await;
            let (caller, called) = if caller_breaks { (broken, ours) } else { (ours, broken) };
            let joined = Joined::new(caller, called, None, None);
            let ((ended, bytes), (came, end)) =
                soon(async { tokio::join!(run(joined), what_came(application)) }).await;
            assert_eq!(ended.unwrap_err().caller, caller_breaks);
            assert_eq!(came.len(), ANSWER, "caller breaks: {caller_breaks}");
            assert_eq!(end.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
            let passed = u64::try_from(ANSWER).unwrap();
            assert_eq!(bytes, if caller_breaks { (passed, 0) } else { (0, passed) });
        }
    }

    #[tokio::test]
    async fn a_side_that_goes_on_sending_to_one_that_broke_is_not_held_up() {
        let (mut application, ours) = connection().await;
        let joined = Joined::new(ours, answered_and_reset().await, None, None);
        let sending = async move {
            // Until it may no longer; it reads only then.
            while application.write_all(&[7; 16_384]).await.is_ok() {}
            what_came(application).await.0
        };
        let ((ended, _), came) = soon(async { tokio::join!(run(joined), sending) }).await;
        assert!(!ended.unwrap_err().caller);
        assert_eq!(came.len(), ANSWER);
    }

    #[tokio::test]
    async fn two_sides_that_broke_end_it() {
        let (caller, called) = (answered_and_reset().await, answered_and_reset().await);
        soon(run(Joined::new(caller, called, None, None))).await.0.expect_err("both are gone");
    }
}
