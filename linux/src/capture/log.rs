//! Packets that the rules tell of, by `nfnetlink_log`: a socket that the kernel sends them to, one listener a group.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use netlink_bindings::utils;
use nix::{
    errno::Errno,
    libc,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
        setsockopt, socket, sockopt,
    },
};

use crate::dump::messages;

/// Of `linux/netfilter/nfnetlink_log.h`.
const CONFIGURE: u16 = 4 << 8 | 1;
const COMMAND: u16 = 1;
const MODE: u16 = 2;
const BUFFER: u16 = 3;
const THRESHOLD: u16 = 5;
const BIND: u8 = 1;
const COPY_PACKET: u8 = 2;
const PAYLOAD: u16 = 9;

/// What the kernel sets aside for each message, in bytes, if that is enough: its own default is a page, of which few
/// fit into a socket's queue.
const MESSAGE: u32 = 512;

/// The socket's queue, in bytes: thousands of packets. What finds no room is lost, and sent again by its sender's
/// kernel after a second.
const QUEUE: usize = 8 * 1024 * 1024;

/// Datagrams that are taken at once, and the longest: a page, or the packet and its attributes.
const AT_ONCE: usize = 128;
const DATAGRAM: usize = 8 * 1024;

/// One group's packets.
#[derive(Debug)]
pub(super) struct Log(OwnedFd);

impl Log {
    /// Begins to listen in the calling thread's namespace, for the first `range` bytes of each packet.
    ///
    /// # Errors
    /// `EPERM` if somebody else has the group, or the kernel does not allow it.
    pub(super) fn listen(group: u16, range: u32) -> io::Result<Self> {
        let log = listen(SockProtocol::NetlinkNetFilter)?;
        // Without the privilege the queue is as long as any.
        setsockopt(&log, sockopt::RcvBufForce, &QUEUE).ok();
        configure(&log, group, &attribute(COMMAND, &[BIND]))?;
        let settings = [
            attribute(MODE, &[range.to_be_bytes().as_slice(), &[COPY_PACKET, 0]].concat()),
            attribute(BUFFER, &MESSAGE.to_be_bytes()),
            // Each at once.
            attribute(THRESHOLD, &1u32.to_be_bytes()),
        ];
        configure(&log, group, &settings.concat())?;
        Ok(Self(log))
    }

    /// One that another process began to listen to: each packet is taken by one of the two.
    pub(super) fn inherit(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// The socket, which becomes readable when there is something to [`take`](Self::take).
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Takes packets that wait, without waiting for more: not all at once, since they may come faster than they are
    /// taken. Returns whether none is left, too.
    ///
    /// # Errors
    /// If the kernel refuses it.
    pub(super) fn take<T>(&self, read: impl Fn(&[u8]) -> Option<T>) -> io::Result<(Vec<T>, bool)> {
        let mut found = Vec::new();
        let mut buffer = [0; DATAGRAM];
        for _ in 0..AT_ONCE {
            match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => found.extend(
                    messages(buffer.get(..length).unwrap_or_default())
                        .filter_map(|message| utils::find_attr(message.get(20..)?, PAYLOAD))
                        .filter_map(&read),
                ),
                Err(Errno::EAGAIN) => return Ok((found, true)),
                // Some found no room: they are sent again.
                Err(Errno::ENOBUFS) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok((found, false))
    }
}

/// A netlink socket that waits for nothing.
pub(super) fn listen(protocol: SockProtocol) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let found = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
    bind(found.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    Ok(found)
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    utils::push_header(&mut bytes, kind, u16::try_from(value.len()).unwrap_or(u16::MAX));
    bytes.extend(value);
    utils::align(&mut bytes);
    bytes
}

/// Sends a setting of the group, and waits for the kernel's word on it.
fn configure(to: &OwnedFd, group: u16, attributes: &[u8]) -> io::Result<()> {
    const HEADER: usize = 20;
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK;
    let length = u32::try_from(HEADER + attributes.len()).map_err(io::Error::other)?;
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(CONFIGURE.to_ne_bytes());
    message.extend(u16::try_from(flags).map_err(io::Error::other)?.to_ne_bytes());
    message.extend([0; 8]);
    message.extend([0, 0]);
    message.extend(group.to_be_bytes());
    message.extend(attributes);
    send(to.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut answer = [0; 256];
    loop {
        // The kernel answers before `send` returns; packets of the group may come before its answer.
        let length = recv(to.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
        let is_answer = answer.get(4..6) == Some(&ERROR.to_ne_bytes());
        if !is_answer {
            continue;
        }
        let code = answer.get(16..length.min(20)).and_then(|bytes| bytes.first_chunk().copied());
        return match code.map(i32::from_ne_bytes) {
            Some(0) => Ok(()),
            Some(code) => Err(io::Error::from_raw_os_error(-code)),
            None => Err(io::Error::from(io::ErrorKind::InvalidData)),
        };
    }
}

/// `IPPROTO_TCP`.
const TCP: u8 = 6;

/// `NLMSG_ERROR`, which is also the answer that says that there was none.
const ERROR: u16 = 2;

/// The two ends of the connection that a packet belongs to, its sender's first, and where its TCP header begins. Nothing
/// if that does not follow the IP header.
pub(super) fn ends(packet: &[u8]) -> Option<(SocketAddr, SocketAddr, usize)> {
    let (source, destination, header): (IpAddr, IpAddr, usize) = match packet.first()? >> 4 {
        4 => {
            let address = |at: usize| Some(Ipv4Addr::from(*packet.get(at..)?.first_chunk::<4>()?));
            let header = usize::from(packet.first()? & 0xf) * 4;
            (address(12)?.into(), address(16)?.into(), header)
        }
        6 if packet.get(6) == Some(&TCP) => {
            let address = |at: usize| Some(Ipv6Addr::from(*packet.get(at..)?.first_chunk::<16>()?));
            (address(8)?.into(), address(24)?.into(), 40)
        }
        _ => return None,
    };
    let transport = packet.get(header..)?;
    let port = |at: usize| Some(u16::from_be_bytes(*transport.get(at..)?.first_chunk()?));
    Some((SocketAddr::new(source, port(0)?), SocketAddr::new(destination, port(2)?), header))
}

/// Reads everything that waits. Returns whether any of it was of concern.
pub(super) fn drain(from: &OwnedFd, mut concerns: impl FnMut(&[u8]) -> bool) -> io::Result<bool> {
    let mut buffer = [0; 16 * 1024];
    let mut found = false;
    loop {
        match recv(from.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(length) => found |= concerns(buffer.get(..length).unwrap_or_default()),
            Err(Errno::EAGAIN) => return Ok(found),
            // More than there was room for: something of it may have been ours.
            Err(Errno::ENOBUFS) => found = true,
            Err(error) => return Err(error.into()),
        }
    }
}
