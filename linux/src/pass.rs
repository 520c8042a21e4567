//! Open files over a Unix socket to another process of this machine, each with a line of text that says
//! what it is.
//!
//! A listener that is passed on is the same listener in both processes: connections that wait in its queue are
//! lost neither when it changes hands nor when one of the two closes it.

use std::{
    collections::VecDeque,
    io::{self, IoSlice, IoSliceMut, Write},
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};

use crate::sys;

/// The longest line.
const MAX_LINE: usize = 4096;

/// Sends a line, without its newline, and a file with it.
///
/// # Errors
/// If the other process is gone, or the line is too long or has more than one line.
pub fn send(stream: &UnixStream, line: &str, file: Option<BorrowedFd<'_>>) -> io::Result<()> {
    if line.len() >= MAX_LINE || line.contains('\n') {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let text = format!("{line}\n");
    let files: Vec<_> = file.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&files)];
    let with = if files.is_empty() { [].as_slice() } else { rights.as_slice() };
    let sent = sendmsg::<UnixAddr>(
        stream.as_raw_fd(),
        &[IoSlice::new(text.as_bytes())],
        with,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    // The rest of a line that did not fit; the file has gone with the first byte.
    let mut stream = stream;
    stream.write_all(text.as_bytes().get(sent..).unwrap_or_default())
}

/// Takes lines and files from a stream.
#[derive(Debug)]
pub struct Receiver {
    stream: UnixStream,
    text: Vec<u8>,
    files: VecDeque<OwnedFd>,
}

impl Receiver {
    /// From this stream, whose blocking mode and timeouts hold.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, text: Vec::new(), files: VecDeque::new() }
    }

    /// The next line; `None` when the other process has closed its end.
    ///
    /// # Errors
    /// If the stream fails, or a line is too long or no text.
    pub fn line(&mut self) -> io::Result<Option<String>> {
        loop {
            if let Some(end) = self.text.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.text.drain(..=end).take(end).collect();
                return String::from_utf8(line)
                    .map(Some)
                    .map_err(|_| io::Error::from(io::ErrorKind::InvalidData));
            }
            if self.text.len() >= MAX_LINE {
                return Err(io::Error::from(io::ErrorKind::InvalidData));
            }
            if self.fill()? == 0 {
                return Ok(None);
            }
        }
    }

    /// The file that came with the last line; the oldest one not taken yet.
    pub fn file(&mut self) -> Option<OwnedFd> {
        self.files.pop_front()
    }

    /// The stream, to answer on.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    fn fill(&mut self) -> io::Result<usize> {
        let mut bytes = [0; 1024];
        let mut room = nix::cmsg_space!([std::os::fd::RawFd; 8]);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let received = recvmsg::<UnixAddr>(
            self.stream.as_raw_fd(),
            &mut slices,
            Some(&mut room),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        for message in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(files) = message {
                self.files.extend(files.into_iter().map(sys::received));
            }
        }
        let count = received.bytes;
        self.text.extend_from_slice(bytes.get(..count).unwrap_or_default());
        Ok(count)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use std::{
        io::Read,
        net::{TcpListener, TcpStream},
        os::fd::AsFd,
    };

    use super::*;

    #[test]
    fn a_listener_that_was_passed_on_takes_what_waited_in_its_queue() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut waiting = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        waiting.write_all(b"x").unwrap();
        send(&ours, "without a file", None).unwrap();
        send(&ours, "a listener", Some(listener.as_fd())).unwrap();
        send(&ours, "the end", None).unwrap();
        drop((listener, ours));
        let mut receiver = Receiver::new(theirs);
        assert_eq!(receiver.line().unwrap().unwrap(), "without a file");
        assert_eq!(receiver.line().unwrap().unwrap(), "a listener");
        let passed = TcpListener::from(receiver.file().unwrap());
        assert_eq!(receiver.line().unwrap().unwrap(), "the end");
        assert!(receiver.line().unwrap().is_none());
        assert!(receiver.file().is_none());
        let mut byte = [0];
        passed.accept().unwrap().0.read_exact(&mut byte).unwrap();
        assert_eq!(byte, *b"x");
    }

    #[test]
    fn a_line_without_an_end_takes_no_memory() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        assert!(send(&ours, &"x".repeat(MAX_LINE), None).is_err());
        assert!(send(&ours, "two\nlines", None).is_err());
        let writer = std::thread::spawn(move || {
            let mut ours = ours;
            // The reader gives up in between.
            drop(ours.write_all(&[b'x'; 3 * MAX_LINE]));
        });
        let mut receiver = Receiver::new(theirs);
        assert!(receiver.line().is_err());
        drop(receiver);
        writer.join().unwrap();
    }
}
