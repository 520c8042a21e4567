//! nftables expressions: the kernel's small register machine, one step each.
//!
//! An [`Expression`] holds exactly the attributes that go to the kernel, which gives them back
//! in a dump: that is what drift is told by.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_bindings::{
    nftables::{
        PushExprBitwiseAttrs, PushExprCmpAttrs, PushExprFibAttrs, PushExprImmediateAttrs,
        PushExprMetaAttrs, PushExprPayloadAttrs, PushExprRejectAttrs,
    },
    utils,
};

use crate::links::Family;

// Constants of `linux/netfilter/nf_tables.h`. The bindings have most of them as enums, which
// only a cast turns into the numbers that their own builders want.
const REG_VERDICT: u32 = 0;
/// The register that most matches use: they load it and compare it at once.
const REG: u32 = 1;
const REG_2: u32 = 2;
/// The first of the registers of 4 bytes, which a key of several parts is put together in; it starts where
/// [`REG`] does.
const REG32: u32 = 8;
const CMP_EQ: u32 = 0;
const CMP_NEQ: u32 = 1;
const META_MARK: u32 = 3;
const META_OIF: u32 = 5;
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_SKUID: u32 = 10;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
const PAYLOAD_NETWORK_HEADER: u32 = 1;
const PAYLOAD_TRANSPORT_HEADER: u32 = 2;
const FIB_RESULT_ADDRTYPE: u32 = 3;
const FIB_F_SADDR: u32 = 1 << 0;
const FIB_F_DADDR: u32 = 1 << 1;
const FIB_F_MARK: u32 = 1 << 2;
const FIB_F_OIF: u32 = 1 << 4;
const REJECT_TCP_RST: u32 = 1;
const SOCKET_TRANSPARENT: u32 = 0;
const SOCKET_CGROUPV2: u32 = 3;
const TPROXY_FAMILY: u16 = 1;
const TPROXY_REG_ADDR: u16 = 2;
const TPROXY_REG_PORT: u16 = 3;
const NAT_TYPE: u16 = 1;
const NAT_FAMILY: u16 = 2;
const NAT_REG_ADDR_MIN: u16 = 3;
const NAT_REG_PROTO_MIN: u16 = 5;
const NAT_FLAGS: u16 = 7;
const NAT_DNAT: u32 = 1;
/// An address and a port are given.
const NAT_RANGE_MAP_IPS_PROTO_SPECIFIED: u32 = 3;
const CT_DREG: u16 = 1;
const CT_KEY: u16 = 2;
const CT_DIRECTION: u16 = 3;
const CT_PROTO_DST: u32 = 12;
const CT_DST_IP: u32 = 20;
const CT_DST_IP6: u32 = 22;
/// `IP_CT_DIR_ORIGINAL` of `linux/netfilter/nf_conntrack_tuple_common.h`.
const ORIGINAL: u8 = 0;
const LOOKUP_SET: u16 = 1;
const LOOKUP_SREG: u16 = 2;
const DYNSET_SET: u16 = 1;
const DYNSET_OP: u16 = 3;
const DYNSET_SREG_KEY: u16 = 4;
const DYNSET_ADD: u32 = 0;
const DYNSET_DELETE: u32 = 2;
const LOG_GROUP: u16 = 1;
const VERDICT_ACCEPT: u32 = 1;
const VERDICT_DROP: u32 = 0;
const VERDICT_JUMP: u32 = (-3_i32).cast_unsigned();
const SOCKET_KEY: u16 = 1;
const SOCKET_DREG: u16 = 2;
const SOCKET_LEVEL: u16 = 3;
const VERDICT_RETURN: u32 = (-5_i32).cast_unsigned();
const VERDICT_GOTO: u32 = (-4_i32).cast_unsigned();

/// `NFPROTO_*` of `linux/netfilter.h`.
const IPV4: u8 = 2;
const IPV6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
const RTN_LOCAL: u32 = 2;
/// Interface names are compared whole, zero-padded to `IFNAMSIZ`.
const LOOPBACK: [u8; 16] = *b"lo\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// A step of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Expression {
    /// The expression type's name.
    pub(super) name: &'static str,
    /// Its attributes, encoded.
    pub(super) attributes: Vec<u8>,
}

/// How a loaded value must compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Is {
    /// Equal.
    Equal,
    /// Different.
    Not,
}

pub(super) fn tcp(is: Is) -> Vec<Expression> {
    vec![meta(META_L4PROTO), compare(is, &[IPPROTO_TCP])]
}

pub(super) fn mark(value: u32) -> Vec<Expression> {
    vec![meta(META_MARK), compare(Is::Equal, &value.to_ne_bytes())]
}

/// The packet's mark is none.
pub(super) fn unmarked() -> Vec<Expression> {
    mark(0)
}

/// The packet has some mark.
pub(super) fn marked() -> Vec<Expression> {
    vec![meta(META_MARK), compare(Is::Not, &0u32.to_ne_bytes())]
}

/// The bits of the packet's mark that `mask` has.
pub(super) fn masked_mark(is: Is, value: u32, mask: u32) -> Vec<Expression> {
    vec![meta(META_MARK), and(&mask.to_ne_bytes()), compare(is, &value.to_ne_bytes())]
}

pub(super) fn from_loopback(is: Is) -> Vec<Expression> {
    vec![meta(META_IIFNAME), compare(is, &LOOPBACK)]
}

pub(super) fn to_loopback(is: Is) -> Vec<Expression> {
    vec![meta(META_OIFNAME), compare(is, &LOOPBACK)]
}

pub(super) fn user(uid: u32) -> Vec<Expression> {
    vec![meta(META_SKUID), compare(Is::Equal, &uid.to_ne_bytes())]
}

/// The socket's cgroup, or its ancestor at `level` (1 is a child of the root), by inode.
pub(super) fn cgroup(level: u32, id: u64) -> Vec<Expression> {
    let mut attributes = Vec::new();
    push_u32(&mut attributes, SOCKET_KEY, SOCKET_CGROUPV2);
    push_u32(&mut attributes, SOCKET_DREG, REG);
    push_u32(&mut attributes, SOCKET_LEVEL, level);
    let load = Expression { name: "socket", attributes };
    vec![load, compare(Is::Equal, &id.to_ne_bytes())]
}

pub(super) fn destination_port(port: u16) -> Vec<Expression> {
    vec![transport(2, 2), compare(Is::Equal, &port.to_be_bytes())]
}

/// The first packet of a connection, which has SYN and none of FIN, RST, ACK; or any other one.
pub(super) fn opening(is: Is) -> Vec<Expression> {
    const FLAGS: u8 = 13;
    const FIN_SYN_RST_ACK: u8 = 0x17;
    const SYN: u8 = 0x02;
    vec![transport(FLAGS.into(), 1), and(&[FIN_SYN_RST_ACK]), compare(is, &[SYN])]
}

/// The destination is one of this namespace's addresses, whatever the interface. The look-up is made with the
/// packet's mark, since rules of ours lead what has none to loopback, too.
pub(super) fn to_this_host(is: Is) -> Vec<Expression> {
    let mut attributes = Vec::new();
    drop(
        PushExprFibAttrs::new(&mut attributes)
            .push_dreg(REG)
            .push_result(FIB_RESULT_ADDRTYPE)
            .push_flags(FIB_F_DADDR | FIB_F_MARK),
    );
    let load = Expression { name: "fib", attributes };
    vec![load, compare(is, &RTN_LOCAL.to_ne_bytes())]
}

/// IPv6, with other headers before that of TCP.
pub(super) fn extended() -> Vec<Expression> {
    const NEXT_HEADER: u32 = 6;
    vec![
        meta(META_NFPROTO),
        compare(Is::Equal, &[IPV6]),
        payload(REG, PAYLOAD_NETWORK_HEADER, NEXT_HEADER, 1),
        compare(Is::Not, &[IPPROTO_TCP]),
    ]
}

/// The packet belongs to a socket here that may have any address: one of the agent's.
pub(super) fn to_transparent_socket() -> Vec<Expression> {
    let mut attributes = Vec::new();
    push_u32(&mut attributes, SOCKET_KEY, SOCKET_TRANSPARENT);
    push_u32(&mut attributes, SOCKET_DREG, REG);
    vec![Expression { name: "socket", attributes }, compare(Is::Equal, &[1])]
}

/// The transport header's source port is in this set of ports.
pub(super) fn source_port_in(set: &str) -> Vec<Expression> {
    vec![transport(0, 2), lookup(set)]
}

/// The transport header's destination port is in this set of ports.
pub(super) fn destination_port_in(set: &str) -> Vec<Expression> {
    vec![transport(2, 2), lookup(set)]
}

/// The connection that an outgoing packet belongs to is in this set of one family.
pub(super) fn outgoing_in(family: Family, set: &str) -> Vec<Expression> {
    let mut parts = ends(family, Way::Out);
    parts.push(lookup(set));
    parts
}

/// Takes it out of there.
pub(super) fn forget_outgoing(family: Family, set: &str) -> Vec<Expression> {
    change(ends(family, Way::Out), set, DYNSET_DELETE)
}

/// Takes that out of there to which a packet belongs that comes from the other end.
pub(super) fn forget_incoming(family: Family, set: &str) -> Vec<Expression> {
    change(ends(family, Way::In), set, DYNSET_DELETE)
}

/// Puts it in there. Does not match if the set is full.
pub(super) fn remember_outgoing(family: Family, set: &str) -> Vec<Expression> {
    change(ends(family, Way::Out), set, DYNSET_ADD)
}

/// The same for the connection that an incoming packet belongs to, as its outgoing packets have it.
pub(super) fn remember_incoming(family: Family, set: &str) -> Vec<Expression> {
    change(ends(family, Way::In), set, DYNSET_ADD)
}

fn change(mut parts: Vec<Expression>, set: &str, how: u32) -> Vec<Expression> {
    let mut attributes = Vec::new();
    push_name(&mut attributes, DYNSET_SET, set);
    push_u32(&mut attributes, DYNSET_OP, how);
    push_u32(&mut attributes, DYNSET_SREG_KEY, REG);
    parts.push(Expression { name: "dynset", attributes });
    parts
}

/// Where a packet goes, as its workload sees it.
#[derive(Clone, Copy)]
enum Way {
    Out,
    In,
}

/// Loads the workload's address and port and those of the other end, as the sets of older connections have them.
fn ends(family: Family, way: Way) -> Vec<Expression> {
    // Offsets of the addresses in the IP header, and their length.
    let (number, source, destination, length) = match family {
        Family::V4 => (IPV4, 12, 16, 4),
        Family::V6 => (IPV6, 8, 24, 16),
    };
    // Each with the offset of its port in the header of TCP.
    let (source, destination) = ((source, 0), (destination, 2));
    let (own, other) = match way {
        Way::Out => (source, destination),
        Way::In => (destination, source),
    };
    let registers = length / 4;
    vec![
        meta(META_NFPROTO),
        compare(Is::Equal, &[number]),
        payload(register(0), PAYLOAD_NETWORK_HEADER, own.0, length),
        payload(register(registers), PAYLOAD_TRANSPORT_HEADER, own.1, 2),
        payload(register(registers + 1), PAYLOAD_NETWORK_HEADER, other.0, length),
        payload(register(2 * registers + 1), PAYLOAD_TRANSPORT_HEADER, other.1, 2),
    ]
}

/// The register that begins after so many words of 4 bytes, by the name that the kernel gives back: those that
/// are also the beginning of a register of 16 bytes have its name.
fn register(words: u32) -> u32 {
    if words.is_multiple_of(4) { REG + words / 4 } else { REG32 + words }
}

/// Hands the packet to the connection of the agent's that it belongs to, or else to the agent's listener on this
/// port of the family's loopback address. Matches only if there is one that may have any address
/// (`IP_TRANSPARENT`), which takes a privilege: another program on the port gets nothing.
pub(super) fn to_listener(family: Family, port: u16) -> Vec<Expression> {
    to_listener_on(family, load_constant_into(REG_2, &port.to_be_bytes()))
}

/// The same with the listener whose port the packet's mark has ([`released`](super::released)).
pub(super) fn to_listener_of_mark(family: Family) -> Vec<Expression> {
    to_listener_on(family, meta_into(REG_2, META_MARK))
}

/// On the port that `port` loads into the second register.
fn to_listener_on(family: Family, port: Expression) -> Vec<Expression> {
    let (number, address): (u8, &[u8]) = match family {
        Family::V4 => (IPV4, &Ipv4Addr::LOCALHOST.octets()),
        Family::V6 => (IPV6, &Ipv6Addr::LOCALHOST.octets()),
    };
    let mut attributes = Vec::new();
    push_u32(&mut attributes, TPROXY_FAMILY, number.into());
    push_u32(&mut attributes, TPROXY_REG_ADDR, REG);
    push_u32(&mut attributes, TPROXY_REG_PORT, REG_2);
    vec![
        meta(META_NFPROTO),
        compare(Is::Equal, &[number]),
        load_constant_into(REG, address),
        port,
        Expression { name: "tproxy", attributes },
    ]
}

/// The packet leaves through the interface of this index.
pub(super) fn outgoing_interface(index: u32) -> Vec<Expression> {
    vec![meta(META_OIF), compare(Is::Equal, &index.to_ne_bytes())]
}

/// The packet's source is an address of the interface through which it leaves.
pub(super) fn from_address_of_outgoing_interface() -> Vec<Expression> {
    let mut attributes = Vec::new();
    drop(
        PushExprFibAttrs::new(&mut attributes)
            .push_dreg(REG)
            .push_result(FIB_RESULT_ADDRTYPE)
            .push_flags(FIB_F_SADDR | FIB_F_OIF),
    );
    let load = Expression { name: "fib", attributes };
    vec![load, compare(Is::Equal, &RTN_LOCAL.to_ne_bytes())]
}

/// The packet belongs to a connection that was opened to one of the ports of this set, wherever it was led then. Makes the kernel track connections.
pub(super) fn opened_to_port(ports: &str) -> Vec<Expression> {
    vec![of_tracked(CT_PROTO_DST), lookup(ports)]
}

/// The same for this address.
pub(super) fn opened_to(address: IpAddr) -> Vec<Expression> {
    let (number, key, bytes) = match address {
        IpAddr::V4(address) => (IPV4, CT_DST_IP, address.octets().to_vec()),
        IpAddr::V6(address) => (IPV6, CT_DST_IP6, address.octets().to_vec()),
    };
    vec![
        meta(META_NFPROTO),
        compare(Is::Equal, &[number]),
        of_tracked(key),
        compare(Is::Equal, &bytes),
    ]
}

/// Loads a part of what connection tracking knows of the connection, as it was opened.
fn of_tracked(key: u32) -> Expression {
    let mut attributes = Vec::new();
    push_u32(&mut attributes, CT_DREG, REG);
    push_u32(&mut attributes, CT_KEY, key);
    utils::push_header(&mut attributes, CT_DIRECTION, 1);
    attributes.push(ORIGINAL);
    utils::align(&mut attributes);
    Expression { name: "ct", attributes }
}

/// A translation of a family's connection to where it is going anyway. No other translation is looked for then.
pub(super) fn keep_destination(family: Family) -> Vec<Expression> {
    let (number, offset, length) = match family {
        Family::V4 => (IPV4, 16, 4),
        Family::V6 => (IPV6, 24, 16),
    };
    let mut attributes = Vec::new();
    push_u32(&mut attributes, NAT_TYPE, NAT_DNAT);
    push_u32(&mut attributes, NAT_FAMILY, number.into());
    push_u32(&mut attributes, NAT_REG_ADDR_MIN, REG);
    push_u32(&mut attributes, NAT_REG_PROTO_MIN, REG_2);
    push_u32(&mut attributes, NAT_FLAGS, NAT_RANGE_MAP_IPS_PROTO_SPECIFIED);
    vec![
        meta(META_NFPROTO),
        compare(Is::Equal, &[number]),
        payload(REG, PAYLOAD_NETWORK_HEADER, offset, length),
        payload(REG_2, PAYLOAD_TRANSPORT_HEADER, 2, 2),
        Expression { name: "nat", attributes },
    ]
}

/// Connection tracking leaves the packet alone.
pub(super) fn untracked() -> Vec<Expression> {
    vec![Expression { name: "notrack", attributes: Vec::new() }]
}

/// Tells the listeners of this group of the packet, by `nfnetlink_log`.
pub(super) fn report_to(group: u16) -> Vec<Expression> {
    let mut attributes = Vec::new();
    utils::push_header(&mut attributes, LOG_GROUP, 2);
    attributes.extend(group.to_be_bytes());
    utils::align(&mut attributes);
    vec![Expression { name: "log", attributes }]
}

pub(super) fn set_mark(value: u32) -> Vec<Expression> {
    let mut attributes = Vec::new();
    drop(PushExprMetaAttrs::new(&mut attributes).push_key(META_MARK).push_sreg(REG));
    let store = Expression { name: "meta", attributes };
    vec![load_constant(&value.to_ne_bytes()), store]
}

/// Answers with a TCP reset.
pub(super) fn reset() -> Vec<Expression> {
    let mut attributes = Vec::new();
    drop(PushExprRejectAttrs::new(&mut attributes).push_type(REJECT_TCP_RST));
    vec![Expression { name: "reject", attributes }]
}

/// Leaves the chain; in a base chain, the packet passes on as it is.
pub(super) fn pass() -> Vec<Expression> {
    verdict(VERDICT_RETURN, None)
}

/// The packet passes on, as far as this hook is concerned.
pub(super) fn let_through() -> Vec<Expression> {
    verdict(VERDICT_ACCEPT, None)
}

pub(super) fn discard() -> Vec<Expression> {
    verdict(VERDICT_DROP, None)
}

pub(super) fn goto(chain: &str) -> Vec<Expression> {
    verdict(VERDICT_GOTO, Some(chain))
}

pub(super) fn jump(chain: &str) -> Vec<Expression> {
    verdict(VERDICT_JUMP, Some(chain))
}

fn verdict(code: u32, chain: Option<&str>) -> Vec<Expression> {
    let mut attributes = Vec::new();
    let verdict = PushExprImmediateAttrs::new(&mut attributes)
        .push_dreg(REG_VERDICT)
        .nested_data()
        .nested_verdict()
        .push_code(code);
    match chain {
        Some(chain) => drop(verdict.push_chain_bytes(chain.as_bytes())),
        None => drop(verdict),
    }
    vec![Expression { name: "immediate", attributes }]
}

fn meta(key: u32) -> Expression {
    meta_into(REG, key)
}

fn meta_into(register: u32, key: u32) -> Expression {
    let mut attributes = Vec::new();
    drop(PushExprMetaAttrs::new(&mut attributes).push_dreg(register).push_key(key));
    Expression { name: "meta", attributes }
}

fn transport(offset: u32, length: u32) -> Expression {
    payload(REG, PAYLOAD_TRANSPORT_HEADER, offset, length)
}

fn payload(register: u32, base: u32, offset: u32, length: u32) -> Expression {
    let mut attributes = Vec::new();
    drop(
        PushExprPayloadAttrs::new(&mut attributes)
            .push_dreg(register)
            .push_base(base)
            .push_offset(offset)
            .push_len(length),
    );
    Expression { name: "payload", attributes }
}

fn lookup(set: &str) -> Expression {
    let mut attributes = Vec::new();
    push_name(&mut attributes, LOOKUP_SET, set);
    push_u32(&mut attributes, LOOKUP_SREG, REG);
    Expression { name: "lookup", attributes }
}

fn compare(is: Is, value: &[u8]) -> Expression {
    let operator = match is {
        Is::Equal => CMP_EQ,
        Is::Not => CMP_NEQ,
    };
    let mut attributes = Vec::new();
    drop(
        PushExprCmpAttrs::new(&mut attributes)
            .push_sreg(REG)
            .push_op(operator)
            .nested_data()
            .push_value(value),
    );
    Expression { name: "cmp", attributes }
}

/// `value & mask`, for values of up to 4 bytes.
fn and(mask: &[u8]) -> Expression {
    let length = if mask.len() == 1 { 1 } else { 4 };
    let nothing = [0u8; 4];
    let mut attributes = Vec::new();
    drop(
        PushExprBitwiseAttrs::new(&mut attributes)
            .push_sreg(REG)
            .push_dreg(REG)
            .push_len(length)
            .nested_mask()
            .push_value(mask)
            .end_nested()
            .nested_xor()
            .push_value(nothing.get(..mask.len()).unwrap_or(&nothing)),
    );
    Expression { name: "bitwise", attributes }
}

fn load_constant(value: &[u8]) -> Expression {
    load_constant_into(REG, value)
}

fn load_constant_into(register: u32, value: &[u8]) -> Expression {
    let mut attributes = Vec::new();
    drop(
        PushExprImmediateAttrs::new(&mut attributes)
            .push_dreg(register)
            .nested_data()
            .push_value(value),
    );
    Expression { name: "immediate", attributes }
}

fn push_u32(attributes: &mut Vec<u8>, kind: u16, value: u32) {
    utils::push_header(attributes, kind, 4);
    attributes.extend(value.to_be_bytes());
}

/// A name of fewer than 12 letters, with its final zero.
fn push_name(attributes: &mut Vec<u8>, kind: u16, name: &str) {
    let length = u16::try_from(name.len() + 1).unwrap_or(u16::MAX);
    utils::push_header(attributes, kind, length);
    attributes.extend(name.as_bytes());
    attributes.push(0);
    utils::align(attributes);
}
