//! Links, addresses, routes and sysctls of the calling thread's network namespace.
//!
//! Enough of rtnetlink for the agent's own needs and for building the networks of the demo and of the
//! tests; policy routing is in `routing.rs`. Names are looked up at every call: an index may be reused.

use std::{
    ffi::CString,
    fs,
    net::IpAddr,
    os::fd::{AsFd, AsRawFd},
    path::Path,
};

use netlink_bindings::{rt_addr, rt_link, rt_route, traits::Pusher, utils};
use netlink_socket2::NetlinkSocket;
use nix::{libc, net::if_::if_nametoindex};

use crate::{
    error::{Context, Error, Result, accept},
    netns::Netns,
    sys,
};

/// The longest interface name, without its final zero (`IFNAMSIZ - 1`).
const INTERFACE_NAME_MAX: usize = 15;

/// `VETH_INFO_PEER` of `linux/veth.h`, which the bindings have no type for.
const VETH_INFO_PEER: u16 = 1;

/// `IFLA_INFO_DATA` of `linux/if_link.h`.
const IFLA_INFO_DATA: u16 = 2;

/// `AF_INET`, `IFLA_AF_SPEC`, `IFLA_INET_CONF` and `IPV4_DEVCONF_SRC_VMARK` of the kernel's headers.
const AF_INET: u16 = 2;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET_CONF: u16 = 1;
const SRC_VALID_MARK: usize = 24;

/// `IFA_F_TENTATIVE` and `IFA_F_DADFAILED`: an address that is still probed for, or that another host has.
const UNUSABLE: u32 = 0x40 | 0x08;

/// `IFA_F_NODAD`: the address is usable at once, not after a second of probing.
const IFA_F_NODAD: u8 = 0x02;

/// `RT_SCOPE_UNIVERSE`.
pub(crate) const SCOPE_UNIVERSE: u8 = 0;

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

    pub(crate) fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        }
    }

    pub(crate) fn number(self) -> u8 {
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

/// An address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// The length of its network's prefix, in bits.
    pub prefix: u8,
    /// The interface's index.
    pub interface: u32,
    /// Whether it is known beyond the link: neither loopback nor link-local.
    pub is_global: bool,
}

/// All addresses of the namespace that can be used.
pub fn addresses() -> Result<Vec<Address>> {
    let operation = "listing the addresses";
    let mut found = Vec::new();
    for family in Family::ALL {
        let header = rt_addr::Ifaddrmsg { ifa_family: family.number(), ..Default::default() };
        let request = rt_addr::Request::new().op_getaddr_dump(&header);
        let mut socket = NetlinkSocket::new();
        let mut reply = socket.request(&request).context(operation)?;
        while let Some(answer) = reply.recv() {
            let (message, attributes) = answer.context(operation)?;
            // Of a point-to-point link, the address attribute is the other end's.
            let Ok(ip) = attributes.get_local().or_else(|_| attributes.get_address()) else {
                continue;
            };
            let flags = attributes.get_flags().unwrap_or_else(|_| message.ifa_flags.into());
            if message.ifa_family == family.number() && flags & UNUSABLE == 0 {
                found.push(Address {
                    ip,
                    prefix: message.ifa_prefixlen,
                    interface: message.ifa_index,
                    is_global: message.ifa_scope == SCOPE_UNIVERSE,
                });
            }
        }
    }
    Ok(found)
}

/// Makes the reverse path check of IPv4 packets that come in through each interface but `lo` obey their mark
/// (`src_valid_mark`). By netlink, since `/proc/sys` is read-only in a container.
pub fn check_sources_by_mark() -> Result<()> {
    for (index, settings) in interfaces()? {
        if settings.get(SRC_VALID_MARK - 1).is_some_and(|value| *value != 0) {
            continue;
        }
        let operation = || format!("setting src_valid_mark of the interface {index}");
        let header = rt_link::Ifinfomsg { ifi_index: index, ..Default::default() };
        let mut request = rt_link::Request::new().op_setlink_do(&header);
        let mut spec = request.encode().nested_af_spec();
        let message = spec.as_vec_mut();
        let inet = utils::push_nested_header(message, AF_INET);
        let configuration = utils::push_nested_header(message, IFLA_INET_CONF);
        utils::push_header(message, u16::try_from(SRC_VALID_MARK).unwrap_or_default(), 4);
        message.extend(1u32.to_ne_bytes());
        utils::finalize_nested_header(message, configuration);
        utils::finalize_nested_header(message, inet);
        drop(spec);
        // It may be gone already.
        accept(send(&request, operation), &[libc::ENODEV])?;
    }
    Ok(())
}

/// Whether it does, for each interface.
pub fn sources_are_checked_by_mark() -> Result<bool> {
    let all = interfaces()?;
    Ok(all
        .iter()
        .all(|(_, settings)| settings.get(SRC_VALID_MARK - 1).is_some_and(|value| *value != 0)))
}

/// Whether `lo` is up. Without it nothing gets to loopback, and no route leads there.
pub fn loopback_is_up() -> Result<bool> {
    const IFF_UP: u32 = 1;
    let operation = "looking up the loopback interface";
    let header = rt_link::Ifinfomsg { ifi_index: signed_index("lo")?, ..Default::default() };
    let request = rt_link::Request::new().op_getlink_do(&header);
    let mut socket = NetlinkSocket::new();
    let mut reply = socket.request(&request).context(operation)?;
    let (message, _) = reply.recv_one().context(operation)?;
    Ok(message.ifi_flags & IFF_UP != 0)
}

/// The interfaces but `lo`, by index, with their IPv4 settings in the kernel's order.
fn interfaces() -> Result<Vec<(i32, Vec<u32>)>> {
    const IFF_LOOPBACK: u32 = 8;
    let operation = "listing the interfaces";
    let request = rt_link::Request::new().op_getlink_dump(&rt_link::Ifinfomsg::new());
    let mut socket = NetlinkSocket::new();
    let mut reply = socket.request(&request).context(operation)?;
    let mut found = Vec::new();
    while let Some(answer) = reply.recv() {
        let (message, attributes) = answer.context(operation)?;
        if message.ifi_flags & IFF_LOOPBACK != 0 {
            continue;
        }
        let settings = utils::find_attr(attributes.get_buf(), IFLA_AF_SPEC)
            .and_then(|spec| utils::find_attr(spec, AF_INET))
            .and_then(|inet| utils::find_attr(inet, IFLA_INET_CONF))
            .unwrap_or_default();
        let numbers = settings.chunks_exact(4).filter_map(|bytes| bytes.first_chunk());
        let numbers: Vec<_> = numbers.map(|bytes| u32::from_ne_bytes(*bytes)).collect();
        // One without IPv4, as with a very small MTU, has none.
        if numbers.len() >= SRC_VALID_MARK {
            found.push((message.ifi_index, numbers));
        }
    }
    Ok(found)
}

/// Whether the namespace can carry IPv6 at all: it may be off in the kernel or by sysctl.
pub fn ipv6_is_enabled() -> bool {
    fs::read_to_string("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
        .is_ok_and(|disabled| disabled.trim() == "0")
}

/// Writes a network sysctl of the calling thread's namespace; `path` is relative to
/// `/proc/sys/net`, for example `ipv4/ip_forward`. Where that is read-only, as in a container, by a mount of its own.
pub fn sysctl(path: &str, value: &str) -> Result<()> {
    let file = Path::new("/proc/sys/net").join(path);
    let operation = || format!("writing {value:?} to {}", file.display());
    match fs::write(&file, value) {
        Err(error) if error.kind() == std::io::ErrorKind::ReadOnlyFilesystem => {
            let proc = sys::detached_proc().context(operation())?;
            let file = format!("/proc/self/fd/{}/sys/net/{path}", proc.as_raw_fd());
            fs::write(file, value).context(operation())
        }
        outcome => outcome.context(operation()),
    }
}

/// Reads a network sysctl of the calling thread's namespace.
pub fn read_sysctl(path: &str) -> Result<String> {
    let file = Path::new("/proc/sys/net").join(path);
    fs::read_to_string(&file).context(format!("reading {}", file.display()))
}

pub(crate) fn send<R: netlink_bindings::traits::NetlinkRequest>(
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

pub(crate) fn unspecified(family: Family) -> IpAddr {
    match family {
        Family::V4 => std::net::Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
    }
}
