//! Which news of routes is worth waking up for: the kernel keeps the rest from the listener.
//!
//! A router's routes change all the time. Of these, only two kinds make a difference to what was put in place: those in our
//! own table, and those by which the kernel would choose the source address towards elsewhere.

use std::{io, net::IpAddr, os::fd::AsFd};

use nix::libc;
use socket2::{SockFilter, SockRef};

use super::ROUTE_TABLE;
use crate::{
    links::Family,
    routing::{ELSEWHERE_V4, ELSEWHERE_V6},
};

// Classic BPF, of `linux/bpf_common.h`: what each instruction does to the accumulator (A), the index (X), and memory (M).
const LOAD_BYTE: u16 = 0x30;
const LOAD_HALF: u16 = 0x28;
const LOAD_WORD: u16 = 0x20;
const LOAD_WORD_BEHIND_X: u16 = 0x40;
const LOAD_CONSTANT: u16 = 0x00;
const LOAD_X_CONSTANT: u16 = 0x01;
const LOAD_X_MEMORY: u16 = 0x61;
const STORE: u16 = 0x02;
const SUBTRACT_X: u16 = 0x1c;
const XOR_X: u16 = 0xac;
const SHIFT_RIGHT_BY_X: u16 = 0x7c;
const JUMP: u16 = 0x05;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_GREATER: u16 = 0x25;
const A_TO_X: u16 = 0x07;
const RETURN: u16 = 0x06;

/// `SKF_AD_OFF + SKF_AD_NLATTR`: from the offset A on, look for the attribute of type X, and give its offset.
const FIND_ATTRIBUTE: u32 = 0xffff_f000 + 12;

/// Where things are in a message of a route: `struct nlmsghdr`, then `struct rtmsg`, then attributes, each with a header of
/// 4 bytes.
const TYPE: u32 = 4;
const FAMILY: u32 = 16;
const PREFIX: u32 = 17;
const ATTRIBUTES: u32 = 28;
const ATTRIBUTE_HEADER: u32 = 4;

/// Bits of a destination that are compared: those that one load gives. Of IPv6 they are all of the prefix of documentation,
/// in which nobody has routes.
const COMPARED: u32 = 32;

/// Places in memory.
const SHIFT: u32 = 0;
const DESTINATION: u32 = 1;

/// The last instruction, which takes the message. A jump counts from the instruction behind it.
const TAKE: u8 = 34;

/// Makes the kernel tell this listener of no other routes. Of what is no route it tells as before.
pub(super) fn only_ours(listener: &impl AsFd) -> io::Result<()> {
    let filter = program().map(|(code, yes, no, value)| SockFilter::new(code, yes, no, value));
    SockRef::from(listener).attach_filter(&filter)
}

/// Each instruction with how many to leave out if what it asks is so, and if not, and its value.
fn program() -> [(u16, u8, u8, u32); 35] {
    let number = |value: u16| u32::from(u16::from_be_bytes(value.to_ne_bytes()));
    [
        (LOAD_HALF, 0, 0, TYPE),
        (JUMP_IF_EQUAL, 1, 0, number(libc::RTM_NEWROUTE)),
        (JUMP_IF_EQUAL, 0, TAKE - 3, number(libc::RTM_DELROUTE)),
        // Those of our table.
        (LOAD_CONSTANT, 0, 0, ATTRIBUTES),
        (LOAD_X_CONSTANT, 0, 0, u32::from(libc::RTA_TABLE)),
        (LOAD_WORD, 0, 0, FIND_ATTRIBUTE),
        (A_TO_X, 0, 0, 0),
        (LOAD_WORD_BEHIND_X, 0, 0, ATTRIBUTE_HEADER),
        (JUMP_IF_EQUAL, TAKE - 9, 0, u32::from_be_bytes(ROUTE_TABLE.to_ne_bytes())),
        // Those to everywhere.
        (LOAD_BYTE, 0, 0, PREFIX),
        (JUMP_IF_EQUAL, TAKE - 11, 0, 0),
        // Those to a network that "elsewhere" is in: the first bits of both are the same.
        (JUMP_IF_GREATER, 0, 1, COMPARED),
        (LOAD_CONSTANT, 0, 0, COMPARED),
        (A_TO_X, 0, 0, 0),
        (LOAD_CONSTANT, 0, 0, COMPARED),
        (SUBTRACT_X, 0, 0, 0),
        (STORE, 0, 0, SHIFT),
        (LOAD_CONSTANT, 0, 0, ATTRIBUTES),
        (LOAD_X_CONSTANT, 0, 0, u32::from(libc::RTA_DST)),
        (LOAD_WORD, 0, 0, FIND_ATTRIBUTE),
        (A_TO_X, 0, 0, 0),
        (LOAD_WORD_BEHIND_X, 0, 0, ATTRIBUTE_HEADER),
        (STORE, 0, 0, DESTINATION),
        (LOAD_BYTE, 0, 0, FAMILY),
        (JUMP_IF_EQUAL, 0, 2, u32::from(Family::V4.number())),
        (LOAD_CONSTANT, 0, 0, first_bits(ELSEWHERE_V4)),
        (JUMP, 0, 0, 1),
        (LOAD_CONSTANT, 0, 0, first_bits(ELSEWHERE_V6)),
        (LOAD_X_MEMORY, 0, 0, DESTINATION),
        (XOR_X, 0, 0, 0),
        (LOAD_X_MEMORY, 0, 0, SHIFT),
        (SHIFT_RIGHT_BY_X, 0, 0, 0),
        (JUMP_IF_EQUAL, 1, 0, 0),
        (RETURN, 0, 0, 0),
        (RETURN, 0, 0, u32::MAX),
    ]
}

fn first_bits(address: IpAddr) -> u32 {
    let octets = match address {
        IpAddr::V4(address) => address.octets(),
        IpAddr::V6(address) => {
            let [first, second, third, fourth, ..] = address.octets();
            [first, second, third, fourth]
        }
    };
    u32::from_be_bytes(octets)
}
