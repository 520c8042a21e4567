//! Links, addresses, routes and sysctls of the calling thread's network namespace.
//!
//! Enough of rtnetlink for the agent's own needs (policy routing) and for building the networks
//! of the demo and of the tests. Names are looked up at every call: an index may be reused.

use std::{
    ffi::CString,
    fs,
    net::IpAddr,
    os::fd::{AsFd, AsRawFd},
    path::Path,
};

use netlink_bindings::{rt_addr, rt_link, rt_route, rt_rule, traits::Pusher, utils};
use netlink_socket2::NetlinkSocket;
use nix::{libc, net::if_::if_nametoindex};

use crate::{
    error::{Context, Error, Result},
    netns::Netns,
};

/// The owner written into our routes and policy rules (`proto` in `ip route`, `ip rule`), so that
/// ours can be told from everybody else's. Unassigned in `rtnetlink.h`.
pub const ROUTE_OWNER: u8 = 0x48;

/// The longest interface name, without its final zero (`IFNAMSIZ - 1`).
const INTERFACE_NAME_MAX: usize = 15;

/// `VETH_INFO_PEER` of `linux/veth.h`, which the bindings have no type for.
const VETH_INFO_PEER: u16 = 1;

/// `IFLA_INFO_DATA` of `linux/if_link.h`.
const IFLA_INFO_DATA: u16 = 2;

/// `IFA_F_NODAD`: the address is usable at once, not after a second of probing.
const IFA_F_NODAD: u8 = 0x02;

/// `RTM_F_LOOKUP_TABLE`: answer with the table that matched; IPv4 says "main" otherwise.
const RTM_F_LOOKUP_TABLE: u32 = 0x1000;

/// `RT_SCOPE_HOST` and `RT_SCOPE_UNIVERSE`.
const SCOPE_HOST: u8 = 254;
const SCOPE_UNIVERSE: u8 = 0;

/// An IP family, where no address tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both families.
    pub const ALL: [Family; 2] = [Family::V4, Family::V6];

    fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        }
    }

    fn number(self) -> u8 {
        // AF_INET and AF_INET6 of `linux/socket.h`, which netlink headers hold in one byte.
        match self {
            Family::V4 => 2,
            Family::V6 => 10,
        }
    }
}

/// The index of the interface `name`.
pub fn if_index(name: &str) -> Result<u32> {
    if_nametoindex(name).context(format!("looking up the interface {name}"))
}

/// Makes a bridge.
pub fn create_bridge(name: &str) -> Result<()> {
    let ifname = interface_name(name)?;
    let mut request =
        rt_link::Request::new().set_create().set_excl().op_newlink_do(&rt_link::Ifinfomsg::new());
    request.encode().push_ifname(&ifname).nested_linkinfo().push_kind(c"bridge");
    send(&request, || format!("creating the bridge {name}"))
}

/// Makes a veth pair: `name` here, `peer_name` in `peer_netns`. Both are down and without address.
pub fn create_veth(name: &str, peer_name: &str, peer_netns: &Netns) -> Result<()> {
    let (ifname, peer_ifname) = (interface_name(name)?, interface_name(peer_name)?);
    let operation = || format!("creating the veth pair {name}, {peer_name}");
    let peer_fd = u32::try_from(peer_netns.as_fd().as_raw_fd())
        .map_err(std::io::Error::other)
        .context(operation())?;

    let mut peer = rt_link::Ifinfomsg::new().as_slice().to_vec();
    rt_link::PushLinkAttrs::new(&mut peer).push_ifname(&peer_ifname).push_net_ns_fd(peer_fd);

    let mut request =
        rt_link::Request::new().set_create().set_excl().op_newlink_do(&rt_link::Ifinfomsg::new());
    let mut info = request.encode().push_ifname(&ifname).nested_linkinfo().push_kind(c"veth");
    let message = info.as_vec_mut();
    let data = utils::push_nested_header(message, IFLA_INFO_DATA);
    let peer_info = utils::push_nested_header(message, VETH_INFO_PEER);
    message.extend_from_slice(&peer);
    utils::finalize_nested_header(message, peer_info);
    utils::finalize_nested_header(message, data);
    drop(info);
    send(&request, operation)
}

/// Sets an interface up.
pub fn set_up(name: &str) -> Result<()> {
    let up = 1; // IFF_UP
    let header = rt_link::Ifinfomsg {
        ifi_index: signed_index(name)?,
        ifi_flags: up,
        ifi_change: up,
        ..Default::default()
    };
    let request = rt_link::Request::new().op_newlink_do(&header);
    send(&request, || format!("setting the interface {name} up"))
}

/// Makes an interface a port of a bridge.
pub fn attach(name: &str, bridge: &str) -> Result<()> {
    let header = rt_link::Ifinfomsg { ifi_index: signed_index(name)?, ..Default::default() };
    let master = if_index(bridge)?;
    let mut request = rt_link::Request::new().op_newlink_do(&header);
    request.encode().push_master(master);
    send(&request, || format!("attaching {name} to the bridge {bridge}"))
}

/// Deletes an interface; of a veth pair, both ends.
pub fn delete(name: &str) -> Result<()> {
    let header = rt_link::Ifinfomsg { ifi_index: signed_index(name)?, ..Default::default() };
    let request = rt_link::Request::new().op_dellink_do(&header);
    send(&request, || format!("deleting the interface {name}"))
}

/// Adds an address. IPv6 addresses skip duplicate address detection, so they are usable at once.
pub fn add_address(name: &str, address: IpAddr, prefix: u8) -> Result<()> {
    let header = rt_addr::Ifaddrmsg {
        ifa_index: if_index(name)?,
        ifa_family: Family::of(address).number(),
        ifa_prefixlen: prefix,
        ifa_flags: if address.is_ipv6() { IFA_F_NODAD } else { 0 },
        ifa_scope: SCOPE_UNIVERSE,
    };
    let mut request = rt_addr::Request::new().set_create().set_excl().op_newaddr_do(&header);
    request.encode().push_local(address).push_address(address);
    send(&request, || format!("adding {address}/{prefix} to {name}"))
}

/// Adds a route to `destination`/`prefix` through the gateway `via`.
pub fn add_route(destination: IpAddr, prefix: u8, via: IpAddr) -> Result<()> {
    let header = rt_route::Rtmsg {
        rtm_family: Family::of(destination).number(),
        rtm_dst_len: prefix,
        rtm_table: libc::RT_TABLE_MAIN,
        rtm_protocol: libc::RTPROT_STATIC,
        rtm_scope: SCOPE_UNIVERSE,
        rtm_type: libc::RTN_UNICAST,
        ..Default::default()
    };
    let mut request = rt_route::Request::new().set_create().set_excl().op_newroute_do(&header);
    let mut attributes = request.encode().push_gateway(via);
    if prefix > 0 {
        attributes = attributes.push_dst(destination);
    }
    drop(attributes);
    send(&request, || format!("adding a route to {destination}/{prefix} through {via}"))
}

/// Adds a default route through the gateway `via`.
pub fn add_default_route(via: IpAddr) -> Result<()> {
    add_route(unspecified(Family::of(via)), 0, via)
}

/// Adds `local default dev lo` to the routing table `table`: every destination looked up there is
/// this namespace's own.
pub fn add_local_route(family: Family, table: u32) -> Result<()> {
    let lo = if_index("lo")?;
    let mut request =
        rt_route::Request::new().set_create().set_excl().op_newroute_do(&local_route(family));
    request.encode().push_table(table).push_oif(lo);
    send(&request, || format!("adding the local {family:?} route to table {table}"))
}

/// Deletes what [`add_local_route`] added; fails with `ESRCH` when there is none.
pub fn delete_local_route(family: Family, table: u32) -> Result<()> {
    let lo = if_index("lo")?;
    let mut request = rt_route::Request::new().op_delroute_do(&local_route(family));
    request.encode().push_table(table).push_oif(lo);
    send(&request, || format!("deleting the local {family:?} route from table {table}"))
}

/// A policy rule: packets with this mark are routed by this table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MarkRule {
    /// The whole mark; no mask, so that marks of other software never match.
    pub mark: u32,
    /// The routing table.
    pub table: u32,
    /// The rule's place: lower numbers are asked first.
    pub priority: u32,
}

/// Adds `ip rule fwmark`; fails with `EEXIST` when it is there already.
pub fn add_mark_rule(family: Family, rule: MarkRule) -> Result<()> {
    let mut request =
        rt_rule::Request::new().set_create().set_excl().op_newrule_do(&rule_header(family));
    push_rule(request.encode(), rule);
    send(&request, || format!("adding the {family:?} policy rule {rule:?}"))
}

/// Deletes what [`add_mark_rule`] added; fails with `ENOENT` when there is none.
pub fn delete_mark_rule(family: Family, rule: MarkRule) -> Result<()> {
    let mut request = rt_rule::Request::new().op_delrule_do(&rule_header(family));
    push_rule(request.encode(), rule);
    send(&request, || format!("deleting the {family:?} policy rule {rule:?}"))
}

/// Whether a packet with `mark` to `destination` would be delivered locally by `table`: asks the
/// kernel's own lookup, so a rule or route that is missing or shadowed shows.
pub fn mark_is_local(destination: IpAddr, mark: u32, table: u32) -> Result<bool> {
    let header = rt_route::Rtmsg {
        rtm_family: Family::of(destination).number(),
        rtm_dst_len: if destination.is_ipv4() { 32 } else { 128 },
        rtm_flags: RTM_F_LOOKUP_TABLE,
        ..Default::default()
    };
    let mut request = rt_route::Request::new().op_getroute_do(&header);
    request.encode().push_dst(destination).push_mark(mark);

    let operation = || format!("looking up the route of mark {mark:#x} to {destination}");
    let mut socket = NetlinkSocket::new();
    let mut reply = socket.request(&request).context(operation())?;
    match reply.recv_one() {
        Ok((route, attributes)) => {
            Ok(route.rtm_type == libc::RTN_LOCAL && attributes.get_table().ok() == Some(table))
        }
        Err(error) => match error.as_io_error().raw_os_error() {
            // No route, or a rule or route that says unreachable, prohibit, blackhole.
            Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ESRCH) => Ok(false),
            Some(libc::EACCES | libc::EINVAL) => Ok(false),
            _ => Err(error).context(operation()),
        },
    }
}

/// Whether the namespace can carry IPv6 at all: it may be off in the kernel or by sysctl.
pub fn ipv6_is_enabled() -> bool {
    fs::read_to_string("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
        .is_ok_and(|disabled| disabled.trim() == "0")
}

/// Writes a network sysctl of the calling thread's namespace; `path` is relative to
/// `/proc/sys/net`, for example `ipv4/ip_forward`.
pub fn sysctl(path: &str, value: &str) -> Result<()> {
    let file = Path::new("/proc/sys/net").join(path);
    fs::write(&file, value).context(format!("writing {value:?} to {}", file.display()))
}

fn send<R: netlink_bindings::traits::NetlinkRequest>(
    request: &R,
    operation: impl Fn() -> String,
) -> Result<()> {
    let mut socket = NetlinkSocket::new();
    let mut reply = socket.request(request).context(operation())?;
    reply.recv_ack().context(operation())
}

fn interface_name(name: &str) -> Result<CString> {
    let invalid = || Error::InvalidInterfaceName { name: name.to_owned() };
    if name.is_empty() || name.len() > INTERFACE_NAME_MAX {
        return Err(invalid());
    }
    CString::new(name).map_err(|_| invalid())
}

fn signed_index(name: &str) -> Result<i32> {
    i32::try_from(if_index(name)?)
        .map_err(std::io::Error::other)
        .context(format!("looking up the interface {name}"))
}

fn unspecified(family: Family) -> IpAddr {
    match family {
        Family::V4 => std::net::Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
    }
}

fn local_route(family: Family) -> rt_route::Rtmsg {
    rt_route::Rtmsg {
        rtm_family: family.number(),
        // The table's number does not fit this byte and comes as an attribute.
        rtm_table: libc::RT_TABLE_UNSPEC,
        rtm_protocol: ROUTE_OWNER,
        rtm_scope: SCOPE_HOST,
        rtm_type: libc::RTN_LOCAL,
        ..Default::default()
    }
}

fn rule_header(family: Family) -> rt_rule::FibRuleHdr {
    rt_rule::FibRuleHdr {
        family: family.number(),
        action: 1, // FR_ACT_TO_TBL
        ..Default::default()
    }
}

fn push_rule<P: Pusher>(attributes: rt_rule::PushFibRuleAttrs<P>, rule: MarkRule) {
    attributes
        .push_priority(rule.priority)
        .push_fwmark(rule.mark)
        .push_fwmask(u32::MAX)
        .push_table(rule.table)
        .push_protocol(ROUTE_OWNER);
}
