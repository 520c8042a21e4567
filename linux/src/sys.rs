//! The one place with `unsafe`: a socket option that neither nix nor socket2 knows.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

use nix::libc;

/// `PACKET_STATISTICS` of `linux/if_packet.h`.
const PACKET_STATISTICS: libc::c_int = 6;

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
