//! Whether a connection's other end is a socket of the calling thread's network namespace: the kernel is
//! asked, by `sock_diag(7)`.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd,
};

use nix::{
    libc,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket},
};

/// `SOCK_DIAG_BY_FAMILY` of `linux/sock_diag.h`.
const BY_FAMILY: u16 = 20;

/// `TCP_SYN_SENT` and `TCP_LISTEN` of `include/net/tcp_states.h`.
const OPENING: u8 = 2;
const LISTENING: u8 = 10;

/// Bytes of a netlink header, and of the request behind it.
const HEADER: usize = 16;
const REQUEST: usize = 56;

/// Where the answer's state and ports are, behind the header.
const STATE: usize = 1;
const LOCAL_PORT: usize = 4;
const REMOTE_PORT: usize = 6;

/// Whether a TCP socket here has these two ends, whatever state the connection is in.
///
/// # Errors
/// If the kernel cannot be asked, or says something else.
pub fn has_tcp_socket(local: SocketAddr, remote: SocketAddr) -> io::Result<bool> {
    Ok(state(local, remote)?.is_some())
}

/// What became of a wish for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// It waits for an answer.
    Open,
    /// It has got one.
    Answered,
    /// No socket has it.
    Gone,
}

/// What became of a TCP socket's wish for a connection between these two ends.
///
/// # Errors
/// If the kernel cannot be asked, or says something else.
pub fn wish(local: SocketAddr, remote: SocketAddr) -> io::Result<Wish> {
    Ok(match state(local, remote)? {
        Some(OPENING) => Wish::Open,
        Some(_) => Wish::Answered,
        None => Wish::Gone,
    })
}

/// The state of the connection between these two ends, if a socket here has them.
fn state(local: SocketAddr, remote: SocketAddr) -> io::Result<Option<u8>> {
    let Some(request) = request(local, remote) else { return Ok(None) };
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )?;
    send(netlink.as_raw_fd(), &request, MsgFlags::empty())?;
    let mut answer = [0; 1024];
    let length = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    read(answer.get(..length).unwrap_or_default(), local, remote)
}

/// Nothing for ends of two families, which no connection has.
fn request(local: SocketAddr, remote: SocketAddr) -> Option<Vec<u8>> {
    let (family, local_ip, remote_ip) = match (local.ip(), remote.ip()) {
        (IpAddr::V4(local), IpAddr::V4(remote)) => {
            let wide = |octets: [u8; 4]| {
                let mut wide = [0; 16];
                wide.iter_mut().zip(octets).for_each(|(to, from)| *to = from);
                wide
            };
            (libc::AF_INET, wide(local.octets()), wide(remote.octets()))
        }
        (IpAddr::V6(local), IpAddr::V6(remote)) => {
            (libc::AF_INET6, local.octets(), remote.octets())
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => return None,
    };
    let length = u32::try_from(HEADER + REQUEST).ok()?;
    let mut message = Vec::with_capacity(HEADER + REQUEST);
    message.extend(length.to_ne_bytes());
    message.extend(BY_FAMILY.to_ne_bytes());
    message.extend(u16::try_from(libc::NLM_F_REQUEST).ok()?.to_ne_bytes());
    message.extend([0; 8]);
    message.extend([u8::try_from(family).ok()?, u8::try_from(libc::IPPROTO_TCP).ok()?, 0, 0]);
    message.extend(u32::MAX.to_ne_bytes());
    message.extend(local.port().to_be_bytes());
    message.extend(remote.port().to_be_bytes());
    message.extend(local_ip);
    message.extend(remote_ip);
    message.extend([0; 4]);
    // No cookie: whichever socket it is.
    message.extend([0xff; 8]);
    Some(message)
}

fn read(answer: &[u8], local: SocketAddr, remote: SocketAddr) -> io::Result<Option<u8>> {
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer is too short");
    let number = |at: usize| answer.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes);
    let kind = number(4).ok_or_else(damaged)?;
    let body = answer.get(HEADER..).ok_or_else(damaged)?;
    if i32::from(kind) == libc::NLMSG_ERROR {
        let code = body.first_chunk().copied().map(i32::from_ne_bytes).ok_or_else(damaged)?;
        return match code.saturating_neg() {
            libc::ENOENT => Ok(None),
            code => Err(io::Error::from_raw_os_error(code)),
        };
    }
    if kind != BY_FAMILY {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "an answer of another kind"));
    }
    let port = |at: usize| body.get(at..at + 2)?.try_into().ok().map(u16::from_be_bytes);
    let state = *body.get(STATE).ok_or_else(damaged)?;
    // Without such a connection the kernel gives a listener that would take it.
    let is_it = state != LISTENING
        && port(LOCAL_PORT) == Some(local.port())
        && port(REMOTE_PORT) == Some(remote.port());
    Ok(is_it.then_some(state))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn the_ends_of_a_connection_are_found_and_nothing_else_is() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let server = listener.local_addr().unwrap();
            let stream = TcpStream::connect(server).unwrap();
            let client = stream.local_addr().unwrap();
            let (accepted, _) = listener.accept().unwrap();
            assert!(has_tcp_socket(client, server).unwrap(), "the client's end");
            assert!(has_tcp_socket(server, client).unwrap(), "the server's end");
            let mut other = client;
            other.set_port(client.port() ^ 1);
            assert!(!has_tcp_socket(other, server).unwrap(), "a connection that is not there");
            assert!(!has_tcp_socket(server, other).unwrap(), "a listener is no connection");
            assert_eq!(wish(client, server).unwrap(), Wish::Answered);
            let nobody = SocketAddr::new(server.ip(), 1);
            assert_eq!(wish(client, nobody).unwrap(), Wish::Gone);
            // One that says goodbye is there still.
            drop(stream);
            assert!(has_tcp_socket(client, server).unwrap());
            drop(accepted);
        }
        let v4 = "127.0.0.1:1".parse().unwrap();
        assert!(!has_tcp_socket(v4, "[::1]:1".parse().unwrap()).unwrap());
    }
}
