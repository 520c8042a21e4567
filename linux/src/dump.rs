//! Lists that the kernel filters by the request (`NETLINK_GET_STRICT_CHK`, Linux 4.20). Without that it ignores most of
//! a request and lists everything: on a router, hundreds of thousands of routes.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use netlink_bindings::traits::{NetlinkRequest, Protocol};
use nix::{
    libc,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
        socket,
    },
};

use crate::sys;

/// Bytes of a netlink header.
const HEADER: usize = 16;

/// More than the kernel puts into one datagram of a list.
const DATAGRAM: usize = 64 * 1024;

/// Gives each entry of a list of rtnetlink to `each`.
///
/// # Errors
/// If the kernel refuses the request, or its list is cut off.
pub(crate) fn strictly<R: NetlinkRequest>(
    request: &R,
    mut each: impl FnMut(R::ReplyType<'_>),
) -> io::Result<()> {
    let socket = ask(request)?;
    let mut buffer = vec![0; DATAGRAM];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let datagram = buffer.get(..length).unwrap_or_default();
        for message in messages(datagram) {
            let body = message.get(HEADER..).unwrap_or_default();
            match i32::from(kind(message)) {
                libc::NLMSG_DONE | libc::NLMSG_ERROR => {
                    let code = body.first_chunk().copied().map(i32::from_ne_bytes);
                    return match code {
                        Some(0) => Ok(()),
                        Some(code) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
                        None => Err(io::Error::from(io::ErrorKind::InvalidData)),
                    };
                }
                libc::NLMSG_NOOP => {}
                _ => each(R::decode_reply(body)),
            }
        }
    }
}

fn ask<R: NetlinkRequest>(request: &R) -> io::Result<OwnedFd> {
    let kind = match request.protocol() {
        Protocol::Raw { protonum: 0, request_type } => request_type,
        Protocol::Raw { .. } | Protocol::Generic(_) => {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
    };
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    sys::check_netlink_strictly(&netlink)?;
    bind(netlink.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    let length = u32::try_from(HEADER + request.payload().len()).map_err(io::Error::other)?;
    let flags = u16::try_from(libc::NLM_F_REQUEST).map_err(io::Error::other)? | request.flags();
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]);
    message.extend(request.payload());
    send(netlink.as_raw_fd(), &message, MsgFlags::empty())?;
    Ok(netlink)
}

/// The type of a message.
fn kind(message: &[u8]) -> u16 {
    message
        .get(4..)
        .and_then(|rest| rest.first_chunk().copied())
        .map(u16::from_ne_bytes)
        .unwrap_or_default()
}

/// The messages of a datagram, each with its header. One that is cut off is given as it is.
pub(crate) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*datagram.first_chunk()?);
        let length =
            usize::try_from(length).unwrap_or(usize::MAX).clamp(HEADER, datagram.len().max(HEADER));
        let message = datagram.get(..length)?;
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}
