//! TLS records over a socket. It is reset when it is dropped before [`Link::close`], so that nothing of it stays behind
//! in the kernel.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::AsFd,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use hauberk_linux::socket::{self, reset_on_close};
use hauberk_tls::channel::{Channel, Opened};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
};

use super::{RECORD, Scratch, SessionError};
use crate::lanes::Lane;

/// How long a closing session waits for the peer's end, so that no last byte is lost.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// A TLS connection after its handshake.
pub(crate) struct Link {
    socket: TcpStream,
    /// Where the socket is registered.
    lane: Lane,
    channel: Channel,
    /// The beginning of a record.
    partial: Vec<u8>,
    /// Sealed bytes on their way out, and how many of them are out.
    unsent: Vec<u8>,
    unsent_used: usize,
    /// The peer has said that nothing comes any more.
    peer_closed: bool,
    /// This side has said goodbye.
    closed: bool,
}

impl Drop for Link {
    fn drop(&mut self) {
        if !self.closed {
            // The connection may be gone already.
            drop(reset_on_close(&self.socket));
        }
    }
}

impl Link {
    /// `partial` is what came behind the handshake, `unsent` the end of it that is not sent yet.
    pub(super) fn new(
        socket: TcpStream,
        channel: Channel,
        partial: Vec<u8>,
        unsent: Vec<u8>,
    ) -> Self {
        Self {
            socket,
            lane: Lane::current(),
            channel,
            partial,
            unsent,
            unsent_used: 0,
            peer_closed: false,
            closed: false,
        }
    }

    /// From now on the calling thread is woken by its socket.
    pub(super) fn come_here(&mut self) {
        let here = Lane::current();
        if self.lane == here {
            return;
        }
        let copied = self.socket.as_fd().try_clone_to_owned();
        let registered = copied.and_then(|copied| TcpStream::from_std(copied.into()));
        // Where it is it works as well, and wakes across threads.
        if let Ok(socket) = registered {
            (self.socket, self.lane) = (socket, here);
        }
    }

    /// Nothing waits in it, and the peer has said nothing.
    pub(super) fn is_quiet(&self) -> bool {
        if self.is_blocked() || !self.partial.is_empty() {
            return false;
        }
        // The kernel is asked, not the runtime, which may not have heard of it yet.
        let peeked = socket2::SockRef::from(&self.socket).peek(&mut [MaybeUninit::uninit()]);
        matches!(peeked, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Whether sealed bytes wait for the network.
    pub(crate) fn is_blocked(&self) -> bool {
        self.unsent_used < self.unsent.len()
    }

    /// How often its sending key was renewed since this was last asked.
    pub(crate) fn take_renewals(&mut self) -> u32 {
        self.channel.take_renewals()
    }

    /// How long the peer's kernel has acknowledged nothing of what was sent to it.
    pub(crate) fn silence(&self) -> Option<Duration> {
        socket::unacknowledged_for(&self.socket).ok().flatten()
    }

    /// Seals what TLS itself has to say before the next records.
    pub(crate) fn prepare(&mut self) -> Result<(), SessionError> {
        Ok(self.channel.prepare(&mut self.unsent)?)
    }

    /// Seals bytes, to go out when it is polled.
    pub(crate) fn seal(&mut self, plain: &[u8]) -> Result<(), SessionError> {
        Ok(self.channel.seal(plain, &mut self.unsent)?)
    }

    /// Seals one record in place.
    pub(crate) fn seal_in_place(&mut self, record: &mut [u8]) -> Result<(), SessionError> {
        Ok(self.channel.seal_in_place(record)?)
    }

    /// Sends sealed bytes; what does not go out now waits, for [`Self::poll_unsent`]. Only while nothing else waits.
    /// Returns whether all of it went.
    pub(crate) fn send(&mut self, sealed: &[u8]) -> Result<bool, SessionError> {
        let sent = match self.socket.try_write(sealed) {
            Ok(sent) => sent,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => return Err(error.into()),
        };
        let rest = &sealed[sent..];
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
            let rest = &self.unsent[self.unsent_used..];
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
            let mut into = ReadBuf::new(&mut rest[..room]);
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
            let input = &scratch.cipher[used..length];
            let output = &mut scratch.plain[opened..];
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
        let rest = &scratch.cipher[used..length];
        // Nothing counts behind a close.
        self.partial = if self.peer_closed { Vec::new() } else { rest.to_vec() };
        Ok(opened)
    }

    /// Says goodbye and waits for the peer's.
    pub(crate) async fn close(mut self) {
        let goodbye = async {
            self.channel.close(&mut self.unsent)?;
            std::future::poll_fn(|cx| self.poll_unsent(cx)).await?;
            self.socket.shutdown().await?;
            let mut rest = [0; 512];
            while self.socket.read(&mut rest).await? > 0 {}
            Ok::<_, SessionError>(())
        };
        if matches!(tokio::time::timeout(CLOSE_TIMEOUT, goodbye).await, Ok(Ok(()))) {
            self.closed = true;
        }
    }

    /// The same without waiting.
    pub(crate) fn close_now(mut self) {
        if self.channel.close(&mut self.unsent).is_err() {
            return;
        }
        let rest = &self.unsent[self.unsent_used..];
        self.closed = matches!(self.socket.try_write(rest), Ok(sent) if sent == rest.len());
    }
}
