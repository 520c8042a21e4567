//! Connections that an application wants and that nobody has answered yet.
//!
//! The rules give the first packet of a captured connection to the agent and drop it. The application's `connect` waits
//! meanwhile, as for a far host, and its kernel sends the packet again from time to time. Once the agent has reached
//! the destination it gives the packet back ([`Hold::release`]): it arrives at the agent's listener as if it had never
//! been away. Or it refuses it ([`Hold::refuse`]), and `connect` fails.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::libc;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::{
    log::{self, Log},
    released,
};

/// Bytes of a first packet that are kept: its headers. Data in it (TCP Fast Open) is sent again by its sender.
const LONGEST: u32 = 128;

/// `IPPROTO_RAW`: packets are sent with their IP header as they are.
const RAW: i32 = 255;

/// Where an IPv6 header has the length of what follows it.
const V6_LENGTH: usize = 4;

/// Where a TCP header has its sequence number, its own length and its checksum, and its number in an IP header.
const SEQUENCE: usize = 4;
const OFFSET: usize = 12;
const CHECKSUM: usize = 16;
const TCP: u16 = 6;

/// The connections that go to one listener of the agent's ([`listen_captured`](crate::socket::listen_captured)), by
/// its port. Those that are let go arrive at another one, or the same. It stays that of the network namespace it was
/// made in; any thread may use it.
#[derive(Debug)]
pub struct Hold {
    log: Log,
    release: Raw,
    refuse: Raw,
}

/// The first packet of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opening {
    /// The application's end.
    pub from: SocketAddr,
    /// Where it wants to go.
    pub wanted: SocketAddr,
    /// The number of its first byte, the same when its sender sends it again.
    pub sequence: u32,
    packet: Box<[u8]>,
}

impl Hold {
    /// Begins to take the first packets of connections that go to the listener at this port, in the calling thread's
    /// namespace. They are let go to the listener at `arrivals`.
    ///
    /// # Errors
    /// `EPERM` if somebody else listens to the group of `nfnetlink_log` with the port's number, or the kernel does not
    /// allow it, which takes `CAP_NET_ADMIN` and `CAP_NET_RAW`.
    pub fn start(port: u16, arrivals: u16) -> io::Result<Self> {
        Self::of(Log::listen(port, LONGEST)?, arrivals)
    }

    /// Takes them together with another process, which has given this one its socket ([`share`](Self::share)): each is
    /// taken by one of the two.
    ///
    /// # Errors
    /// If the kernel does not allow it, which takes `CAP_NET_RAW`.
    pub fn inherit(socket: OwnedFd, arrivals: u16) -> io::Result<Self> {
        Self::of(Log::inherit(socket), arrivals)
    }

    fn of(log: Log, arrivals: u16) -> io::Result<Self> {
        // No listener has port 0, and what has none is refused.
        Ok(Self { log, release: Raw::new(released(arrivals))?, refuse: Raw::new(released(0))? })
    }

    /// The socket, for another process.
    ///
    /// # Errors
    /// If the system has no more descriptors.
    pub fn share(&self) -> io::Result<OwnedFd> {
        self.log.socket().try_clone_to_owned()
    }

    /// The socket, which becomes readable when there is something to [`take`](Self::take).
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.log.socket()
    }

    /// Takes first packets that wait, without waiting for more, and not all at once if they are many. Returns whether none
    /// is left, too. One that its sender has sent again is among them again.
    ///
    /// # Errors
    /// If the kernel refuses it.
    pub fn take(&self) -> io::Result<(Vec<Opening>, bool)> {
        self.log.take(Opening::read)
    }

    /// Gives it back: the agent's listener gets the connection.
    ///
    /// # Errors
    /// If the kernel does not send it.
    pub fn release(&self, opening: &Opening) -> io::Result<()> {
        self.release.send(opening)
    }

    /// Answers with a reset: the application's `connect` is refused.
    ///
    /// # Errors
    /// If the kernel does not send it.
    pub fn refuse(&self, opening: &Opening) -> io::Result<()> {
        self.refuse.send(opening)
    }
}

impl Opening {
    /// Reads a packet, with its IP header. Nothing if it is not TCP or its headers are not whole.
    pub fn read(packet: &[u8]) -> Option<Self> {
        let (from, wanted, header) = log::ends(packet)?;
        let length = usize::from(*packet.get(header + OFFSET)? >> 4) * 4;
        let mut packet: Box<[u8]> = packet.get(..header + length)?.into();
        if wanted.is_ipv6() {
            let place = packet.get_mut(V6_LENGTH..V6_LENGTH + 2)?;
            place.copy_from_slice(&u16::try_from(length).ok()?.to_be_bytes());
        }
        // Over loopback the kernel leaves it out.
        let sum = checksum(from, wanted, packet.get(header..)?)?;
        let place = packet.get_mut(header + CHECKSUM..header + CHECKSUM + 2)?;
        place.copy_from_slice(&sum.to_be_bytes());
        let sequence = u32::from_be_bytes(*packet.get(header + SEQUENCE..)?.first_chunk()?);
        Some(Self { from, wanted, sequence, packet })
    }
}

/// Sends whole packets, with a mark.
#[derive(Debug)]
struct Raw {
    v4: Socket,
    /// Not where the kernel has no IPv6.
    v6: Option<Socket>,
}

impl Raw {
    fn new(mark: u32) -> io::Result<Self> {
        let socket = |domain| {
            let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(RAW)))?;
            socket.set_nonblocking(true)?;
            socket.set_mark(mark)?;
            Ok::<_, io::Error>(socket)
        };
        let v6 = match socket(Domain::IPV6) {
            Ok(socket) => Some(socket),
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => None,
            Err(error) => return Err(error),
        };
        Ok(Self { v4: socket(Domain::IPV4)?, v6 })
    }

    fn send(&self, opening: &Opening) -> io::Result<()> {
        let socket = match (opening.wanted, &self.v6) {
            (SocketAddr::V4(_), _) => &self.v4,
            (SocketAddr::V6(_), Some(socket)) => socket,
            (SocketAddr::V6(_), None) => return Err(io::ErrorKind::Unsupported.into()),
        };
        // The packet has the port; of a raw socket's address it would be the protocol.
        let to = SockAddr::from(SocketAddr::new(opening.wanted.ip(), 0));
        socket.send_to(&opening.packet, &to).map(|_| ())
    }
}

impl AsFd for Hold {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket()
    }
}

/// The checksum of a TCP segment, whose own place for it counts as zero (RFC 9293, section 3.1).
fn checksum(from: SocketAddr, to: SocketAddr, segment: &[u8]) -> Option<u16> {
    let mut sum = 0u64;
    let mut add = |bytes: &[u8]| {
        for pair in bytes.chunks(2) {
            let word = [pair.first().copied().unwrap_or(0), pair.get(1).copied().unwrap_or(0)];
            sum += u64::from(u16::from_be_bytes(word));
        }
    };
    match (from, to) {
        (SocketAddr::V4(from), SocketAddr::V4(to)) => {
            add(&from.ip().octets());
            add(&to.ip().octets());
        }
        (SocketAddr::V6(from), SocketAddr::V6(to)) => {
            add(&from.ip().octets());
            add(&to.ip().octets());
        }
        (SocketAddr::V4(_), SocketAddr::V6(_)) | (SocketAddr::V6(_), SocketAddr::V4(_)) => {
            return None;
        }
    }
    add(&TCP.to_be_bytes());
    add(&u32::try_from(segment.len()).ok()?.to_be_bytes());
    add(segment.get(..CHECKSUM)?);
    add(segment.get(CHECKSUM + 2..)?);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).ok().map(|sum| !sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first packet of a connection from 10.99.0.1:40000 to 10.99.0.2:80, with a checksum of the kernel's own.
    const WHOLE: [u8; 44] = [
        0x45, 0, 0, 44, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 99, 0, 1, 10, 99, 0, 2, 0x9c, 0x40, 0, 80,
        0, 0, 0, 1, 0, 0, 0, 0, 0x60, 2, 0x10, 0, 0, 0, 0, 0, 2, 4, 5, 0xb4,
    ];

    #[test]
    fn a_first_packet_gets_its_checksum() {
        let opening = Opening::read(&WHOLE).unwrap();
        assert_eq!(opening.from, "10.99.0.1:40000".parse().unwrap());
        assert_eq!(opening.wanted, "10.99.0.2:80".parse().unwrap());
        assert_eq!(opening.sequence, 1);
        // Over a segment with its checksum, the sum is all ones.
        let segment = &opening.packet[20..];
        let again = checksum(opening.from, opening.wanted, segment).unwrap();
        assert_eq!(again.to_be_bytes(), segment[16..18], "it does not depend on what was there");
        let mut words: u32 = [10 << 8 | 99, 1, 10 << 8 | 99, 2, 6, 24].iter().sum();
        words +=
            segment.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum::<u32>();
        assert_eq!((words & 0xffff) + (words >> 16), 0xffff);
    }

    #[test]
    fn what_is_no_first_packet_is_left_out() {
        for length in 0..38 {
            assert_eq!(Opening::read(&WHOLE[..length]), None, "{length} bytes");
        }
        assert_eq!(Opening::read(&[0x15; 60]), None, "neither IPv4 nor IPv6");
    }
}
