//! The one place with `unsafe`: socket options that neither nix nor socket2 knows, and descriptors that came in a message.
#![allow(unsafe_code)]

use std::{
    io::{self, IoSliceMut},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
};

use nix::libc;

/// `PACKET_STATISTICS` of `linux/if_packet.h`.
const PACKET_STATISTICS: libc::c_int = 6;

/// `NETLINK_GET_STRICT_CHK` of `linux/netlink.h`.
const NETLINK_GET_STRICT_CHK: libc::c_int = 12;

/// `TCP_INQ` of `linux/tcp.h`, and the type of the message that it brings.
const TCP_INQ: libc::c_int = 36;

/// How many packets a packet socket lost because its buffer was full. Reading resets the count.
pub(crate) fn packet_drops(socket: &impl AsFd) -> io::Result<u32> {
    // struct tpacket_stats: packets seen, packets lost.
    let mut statistics = [0u32; 2];
    let mut length =
        libc::socklen_t::try_from(size_of_val(&statistics)).map_err(io::Error::other)?;
    // SAFETY: both pointers are to live local values of the types the option wants, and `length`
    // is the size of the first, which the kernel does not write beyond.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_PACKET,
            PACKET_STATISTICS,
            (&raw mut statistics).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(statistics[1]) } else { Err(io::Error::last_os_error()) }
}

/// What the kernel knows of a TCP connection.
pub(crate) fn tcp_info(socket: &impl AsFd) -> io::Result<libc::tcp_info> {
    // SAFETY: a struct of plain integers, for which zero is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = libc::socklen_t::try_from(size_of_val(&info)).map_err(io::Error::other)?;
    // SAFETY: both pointers are to live local values, and `length` is the size of the first, which
    // the kernel does not write beyond; what an older kernel does not write stays zero.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(info) } else { Err(io::Error::last_os_error()) }
}

/// Has each `recvmsg` of a TCP connection say how much is left: [`crate::socket::receive`]. Connections inherit it from their
/// listener. Since Linux 4.18.
pub(crate) fn tell_what_is_left(socket: &impl AsFd) -> io::Result<()> {
    set_option(socket, libc::IPPROTO_TCP, TCP_INQ, 1)
}

/// Bytes in a connection's send queue that its peer has not acknowledged, sent or not.
pub(crate) fn send_queue(socket: &impl AsFd) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the pointer is to a live local value of the type that this request writes.
    let result = unsafe {
        // SIOCOUTQ, which is TIOCOUTQ on every architecture.
        libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes)
    };
    if result == 0 {
        usize::try_from(bytes).map_err(io::Error::other)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A descriptor that has just come in a message.
pub(crate) fn received(descriptor: RawFd) -> OwnedFd {
    // SAFETY: the kernel has made it for this process, and nobody else knows of it.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

/// Joins a multicast group of netlink.
pub(crate) fn join_netlink_group(socket: &impl AsFd, group: u32) -> io::Result<()> {
    set_netlink_option(socket, libc::NETLINK_ADD_MEMBERSHIP, group)
}

/// Makes the kernel obey all of a request for a list, and refuse what it does not know.
pub(crate) fn check_netlink_strictly(socket: &impl AsFd) -> io::Result<()> {
    set_netlink_option(socket, NETLINK_GET_STRICT_CHK, 1)
}

fn set_netlink_option(socket: &impl AsFd, option: libc::c_int, value: u32) -> io::Result<()> {
    set_option(socket, libc::SOL_NETLINK, option, value)
}

fn set_option(
    socket: &impl AsFd,
    level: libc::c_int,
    option: libc::c_int,
    value: u32,
) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of_val(&value)).map_err(io::Error::other)?;
    // SAFETY: the pointer is to a live local value, and `length` is its size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            length,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `FSCONFIG_CMD_CREATE` of `linux/mount.h`.
const CREATE: libc::c_uint = 6;

/// A mount of `procfs` that no folder has, and that can be written: that of a container is read-only below `sys`. It
/// shows the network settings of the namespace of the thread that looks. Since Linux 5.2; takes `CAP_SYS_ADMIN`.
pub(crate) fn detached_proc() -> io::Result<OwnedFd> {
    let opened = |result: libc::c_long| {
        let descriptor = RawFd::try_from(result).map_err(io::Error::other)?;
        if descriptor < 0 { Err(io::Error::last_os_error()) } else { Ok(received(descriptor)) }
    };
    // SAFETY: the name is a string with a final zero that lives for ever; the kernel makes a new descriptor.
    let context = opened(unsafe { libc::syscall(libc::SYS_fsopen, c"proc".as_ptr(), 1) })?;
    // SAFETY: the descriptor is open, and the command takes neither a key nor a value.
    let created = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            CREATE,
            std::ptr::null::<libc::c_char>(),
            std::ptr::null::<libc::c_void>(),
            0,
        )
    };
    if created != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open; the kernel makes a new one. 1 is FSMOUNT_CLOEXEC.
    opened(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), 1, 0) })
}

/// Reads from a connection without waiting: how many bytes, and how much is left if the kernel tells: see
/// [`tell_what_is_left`].
pub(crate) fn receive(
    socket: &impl AsFd,
    into: &mut [IoSliceMut<'_>],
) -> io::Result<(usize, Option<u32>)> {
    let mut control = LeftMessage::default();
    // SAFETY: a struct of integers and pointers, for which zero is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    // An `IoSliceMut` is an `iovec`, as its documentation promises.
    message.msg_iov = into.as_mut_ptr().cast();
    message.msg_iovlen = into.len();
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of_val(&control);
    // SAFETY: the message points to live values, which the kernel alone writes meanwhile and only within the lengths
    // that stand beside the pointers.
    let read =
        unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    let Ok(read) = usize::try_from(read) else { return Err(io::Error::last_os_error()) };
    let told = message.msg_controllen >= size_of_val(&control)
        && (control.level, control.kind) == (libc::IPPROTO_TCP, TCP_INQ);
    Ok((read, told.then_some(control.left)))
}

/// A `cmsghdr` with the one value that comes for [`TCP_INQ`], filled up to a whole word as the kernel does.
#[repr(C)]
#[derive(Default)]
struct LeftMessage {
    length: usize,
    level: libc::c_int,
    kind: libc::c_int,
    left: u32,
    filling: u32,
}
