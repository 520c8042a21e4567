//! nftables expressions: the kernel's small register machine, one step each.
//!
//! An [`Expression`] holds exactly the attributes that go to the kernel, which gives them back
//! in a dump: that is what drift is told by.

use netlink_bindings::{
    nftables::{
        PushExprBitwiseAttrs, PushExprCmpAttrs, PushExprCtAttrs, PushExprFibAttrs,
        PushExprImmediateAttrs, PushExprMetaAttrs, PushExprPayloadAttrs, PushExprRejectAttrs,
    },
    utils,
};

// Constants of `linux/netfilter/nf_tables.h`. The bindings have most of them as enums, which
// only a cast turns into the numbers that their own builders want.
const REG_VERDICT: u32 = 0;
/// The one register used: every match loads it and compares it at once.
const REG: u32 = 1;
const CMP_EQ: u32 = 0;
const CMP_NEQ: u32 = 1;
const META_MARK: u32 = 3;
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_SKUID: u32 = 10;
const META_L4PROTO: u32 = 16;
const CT_DIRECTION: u32 = 1;
const CT_STATUS: u32 = 2;
const CT_MARK: u32 = 3;
const PAYLOAD_TRANSPORT_HEADER: u32 = 2;
const FIB_RESULT_ADDRTYPE: u32 = 3;
const FIB_F_DADDR: u32 = 1 << 1;
const REJECT_TCP_RST: u32 = 1;
const SOCKET_CGROUPV2: u32 = 3;
const REDIR_REG_PROTO_MIN: u16 = 1;
const REDIR_REG_PROTO_MAX: u16 = 2;
const SOCKET_KEY: u16 = 1;
const SOCKET_DREG: u16 = 2;
const SOCKET_LEVEL: u16 = 3;
const VERDICT_RETURN: u32 = (-5_i32).cast_unsigned();
const VERDICT_GOTO: u32 = (-4_i32).cast_unsigned();

const IPPROTO_TCP: u8 = 6;
const RTN_LOCAL: u32 = 2;
/// `IPS_DST_NAT` of `nf_conntrack_common.h`: the connection's destination was rewritten.
const CT_STATUS_DST_NAT: u32 = 1 << 5;
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

/// The first packet of a connection: SYN, and none of FIN, RST, ACK.
pub(super) fn opening() -> Vec<Expression> {
    const FLAGS: u8 = 13;
    const FIN_SYN_RST_ACK: u8 = 0x17;
    const SYN: u8 = 0x02;
    vec![transport(FLAGS.into(), 1), and(&[FIN_SYN_RST_ACK]), compare(Is::Equal, &[SYN])]
}

/// The destination is one of this namespace's addresses, whatever the interface.
pub(super) fn to_this_host() -> Vec<Expression> {
    let mut attributes = Vec::new();
    drop(
        PushExprFibAttrs::new(&mut attributes)
            .push_dreg(REG)
            .push_result(FIB_RESULT_ADDRTYPE)
            .push_flags(FIB_F_DADDR),
    );
    let load = Expression { name: "fib", attributes };
    vec![load, compare(Is::Equal, &RTN_LOCAL.to_ne_bytes())]
}

/// The connection's destination has been rewritten, by us or another.
pub(super) fn redirected() -> Vec<Expression> {
    vec![
        ct(CT_STATUS),
        and(&CT_STATUS_DST_NAT.to_ne_bytes()),
        compare(Is::Not, &0u32.to_ne_bytes()),
    ]
}

pub(super) fn reply_direction() -> Vec<Expression> {
    vec![ct(CT_DIRECTION), compare(Is::Equal, &[1])]
}

pub(super) fn connection_mark(value: u32) -> Vec<Expression> {
    vec![ct(CT_MARK), compare(Is::Equal, &value.to_ne_bytes())]
}

pub(super) fn set_connection_mark(value: u32) -> Vec<Expression> {
    let mut attributes = Vec::new();
    drop(PushExprCtAttrs::new(&mut attributes).push_key(CT_MARK).push_sreg(REG));
    let store = Expression { name: "ct", attributes };
    vec![load_constant(&value.to_ne_bytes()), store]
}

pub(super) fn set_mark(value: u32) -> Vec<Expression> {
    let mut attributes = Vec::new();
    drop(PushExprMetaAttrs::new(&mut attributes).push_key(META_MARK).push_sreg(REG));
    let store = Expression { name: "meta", attributes };
    vec![load_constant(&value.to_ne_bytes()), store]
}

pub(super) fn redirect_to(port: u16) -> Vec<Expression> {
    let mut attributes = Vec::new();
    push_u32(&mut attributes, REDIR_REG_PROTO_MIN, REG);
    push_u32(&mut attributes, REDIR_REG_PROTO_MAX, REG);
    let redirect = Expression { name: "redir", attributes };
    vec![load_constant(&port.to_be_bytes()), redirect]
}

/// Answers with a TCP reset.
pub(super) fn reset() -> Vec<Expression> {
    let mut attributes = Vec::new();
    drop(PushExprRejectAttrs::new(&mut attributes).push_type(REJECT_TCP_RST));
    vec![Expression { name: "reject", attributes }]
}

/// Leaves the chain; in a base chain, the packet passes on as it is.
pub(super) fn pass() -> Vec<Expression> {
    let mut attributes = Vec::new();
    drop(
        PushExprImmediateAttrs::new(&mut attributes)
            .push_dreg(REG_VERDICT)
            .nested_data()
            .nested_verdict()
            .push_code(VERDICT_RETURN),
    );
    vec![Expression { name: "immediate", attributes }]
}

pub(super) fn goto(chain: &str) -> Vec<Expression> {
    let mut attributes = Vec::new();
    drop(
        PushExprImmediateAttrs::new(&mut attributes)
            .push_dreg(REG_VERDICT)
            .nested_data()
            .nested_verdict()
            .push_code(VERDICT_GOTO)
            .push_chain_bytes(chain.as_bytes()),
    );
    vec![Expression { name: "immediate", attributes }]
}

fn meta(key: u32) -> Expression {
    let mut attributes = Vec::new();
    drop(PushExprMetaAttrs::new(&mut attributes).push_dreg(REG).push_key(key));
    Expression { name: "meta", attributes }
}

fn ct(key: u32) -> Expression {
    let mut attributes = Vec::new();
    drop(PushExprCtAttrs::new(&mut attributes).push_dreg(REG).push_key(key));
    Expression { name: "ct", attributes }
}

fn transport(offset: u32, length: u32) -> Expression {
    let mut attributes = Vec::new();
    drop(
        PushExprPayloadAttrs::new(&mut attributes)
            .push_dreg(REG)
            .push_base(PAYLOAD_TRANSPORT_HEADER)
            .push_offset(offset)
            .push_len(length),
    );
    Expression { name: "payload", attributes }
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
    let mut attributes = Vec::new();
    drop(
        PushExprImmediateAttrs::new(&mut attributes).push_dreg(REG).nested_data().push_value(value),
    );
    Expression { name: "immediate", attributes }
}

fn push_u32(attributes: &mut Vec<u8>, kind: u16, value: u32) {
    utils::push_header(attributes, kind, 4);
    attributes.extend(value.to_be_bytes());
}
