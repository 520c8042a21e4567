//! Reading from an application, whose bytes come as it sent them: urgent ones among them.

use std::{
    io::{self, IoSliceMut},
    task::{Context, Poll, ready},
};

use hauberk_linux::socket::receive;
use tokio::{io::Interest, net::TcpStream};

/// Reads what is there; none at the end.
///
/// The runtime's own `poll_read` takes a read that did not fill its buffer for the last that there is, and then waits
/// for the network to tell of more. The kernel ends a read also before an urgent byte: what stands behind it would
/// wait until something else comes, which may be never. Here the kernel says whether there is more.
pub(crate) fn poll_receive(
    cx: &mut Context<'_>,
    stream: &TcpStream,
    places: &mut [IoSliceMut<'_>],
) -> Poll<io::Result<usize>> {
    loop {
        ready!(stream.poll_read_ready(cx))?;
        let mut last = None;
        let outcome = stream.try_io(Interest::READABLE, || {
            let received = receive(stream, places)?;
            if received.is_all {
                // What the runtime makes of it is right: it waits for the network before the next read.
                last = Some(received.bytes);
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Ok(received.bytes)
        });
        match (outcome, last) {
            (_, Some(bytes)) => return Poll::Ready(Ok(bytes)),
            (Err(error), None) if error.kind() == io::ErrorKind::WouldBlock => {}
            (outcome, None) => return Poll::Ready(outcome),
        }
    }
}
