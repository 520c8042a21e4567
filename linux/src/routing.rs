//! Policy routing of the calling thread's network namespace: the rules and the table that lead captured
//! connections to loopback, whatever nftables says.
//!
//! Rules and routes are compared with the kernel's own list of them, told from everybody else's by their owner
//! ([`ROUTE_OWNER`]), and brought in line: what is missing is added, what is ours and not wanted is deleted.

use std::{
    ffi::CStr,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use netlink_bindings::{rt_route, rt_rule, traits::NetlinkRequest};
use netlink_socket2::NetlinkSocket;
use nix::libc;

use crate::{
    dump,
    error::{Context, Result, accept},
    links::{self, Family, addresses, if_index, send, unspecified},
};

/// The owner written into our routes and policy rules (`proto` in `ip route`, `ip rule`), so that
/// ours can be told from everybody else's. Unassigned in `rtnetlink.h`.
pub const ROUTE_OWNER: u8 = 0x48;

/// `RTM_F_LOOKUP_TABLE`: answer with the table that matched; IPv4 says "main" otherwise.
const RTM_F_LOOKUP_TABLE: u32 = 0x1000;

/// `RT_SCOPE_HOST`.
const SCOPE_HOST: u8 = 254;

/// `FR_ACT_*` of `linux/fib_rules.h`.
const ACTION_LOOKUP: u8 = 1;
const ACTION_GOTO: u8 = 2;
const ACTION_NOTHING: u8 = 3;

const TCP: u8 = 6;

/// Where what this namespace sends comes from, for a policy rule.
const LOOPBACK: &CStr = c"lo";

/// Addresses of documentation prefixes: no namespace has them, so only a default route leads there.
pub(crate) const ELSEWHERE_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
pub(crate) const ELSEWHERE_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));

/// A policy rule.
///
/// It has no `not`: the kernel's inversion covers *all* of a rule's conditions, so that
/// `not fwmark X ipproto tcp` also takes everything that is not TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    /// The rule's place: lower numbers are asked first.
    pub priority: u32,
    /// What happens.
    pub action: Action,
    /// The packet's or socket's mark, and which bits of it count.
    pub mark: Option<(u32, u32)>,
    /// TCP only.
    pub tcp: bool,
    /// Only what this namespace sends itself, not what it forwards.
    pub only_sent_here: bool,
    /// The user whose socket it is.
    pub user: Option<u32>,
    /// The port that sends.
    pub source_port: Option<u16>,
}

/// What a policy rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// Asks this routing table.
    Lookup(u32),
    /// Goes on with the rule of this priority.
    Goto(u32),
    /// Nothing: a place to go to.
    Nothing,
}

impl Rule {
    /// A rule without conditions.
    pub fn new(priority: u32, action: Action) -> Self {
        Self {
            priority,
            action,
            mark: None,
            tcp: false,
            only_sent_here: false,
            user: None,
            source_port: None,
        }
    }
}

/// `local DESTINATION/PREFIX dev lo`: what is sent there arrives here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LocalRoute {
    /// The network's address.
    pub destination: IpAddr,
    /// The length of its prefix, in bits.
    pub prefix: u8,
    /// The address that a socket gets that has none yet. Without one it gets the destination's.
    pub source: Option<IpAddr>,
}

/// Makes our rules of one family be these, and adds before it deletes.
pub fn set_rules(family: Family, wanted: &[Rule]) -> Result<()> {
    let present = rules(family)?;
    for rule in wanted.iter().filter(|rule| !present.contains(rule)) {
        add_rule(family, rule)?;
    }
    present
        .iter()
        .filter(|rule| !wanted.contains(rule))
        .try_for_each(|rule| delete_rule(family, rule))
}

/// Our rules of one family, in the kernel's order.
pub fn rules(family: Family) -> Result<Vec<Rule>> {
    let header = rt_rule::FibRuleHdr { family: family.number(), ..Default::default() };
    let request = rt_rule::Request::new().op_getrule_dump(&header);
    let mut found = Vec::new();
    list(
        &request,
        || format!("listing the {family:?} policy rules"),
        |(message, attributes)| {
            if attributes.get_protocol().ok() != Some(ROUTE_OWNER) {
                return;
            }
            let action = match message.action {
                ACTION_LOOKUP => Action::Lookup(attributes.get_table().unwrap_or_default()),
                ACTION_GOTO => Action::Goto(attributes.get_goto().unwrap_or_default()),
                _ => Action::Nothing,
            };
            let mark = attributes.get_fwmark().ok();
            found.push(Rule {
                priority: attributes.get_priority().unwrap_or_default(),
                action,
                mark: mark.map(|mark| (mark, attributes.get_fwmask().unwrap_or(u32::MAX))),
                tcp: attributes.get_ip_proto().ok() == Some(TCP),
                only_sent_here: attributes.get_iifname().ok() == Some(LOOPBACK),
                user: attributes.get_uid_range().ok().map(|range| range.start),
                source_port: attributes.get_sport_range().ok().map(|range| range.start),
            });
        },
    )?;
    Ok(found)
}

/// Gives each entry of one of the kernel's lists to `each`; none if the kernel does not have what the list is of.
pub(crate) fn list<R: NetlinkRequest>(
    request: &R,
    operation: impl Fn() -> String,
    each: impl FnMut(R::ReplyType<'_>),
) -> Result<()> {
    // A kernel without IPv6, and a table that nobody has written to.
    const NOTHING_THERE: [i32; 4] =
        [libc::EAFNOSUPPORT, libc::EOPNOTSUPP, libc::ENODEV, libc::ENOENT];
    accept(dump::strictly(request, each).context(operation()), &NOTHING_THERE)
}

/// Makes our routes of one family in this table be these.
pub fn set_local_routes(family: Family, table: u32, wanted: &[LocalRoute]) -> Result<()> {
    let present = local_routes(family, table)?;
    // Two routes to one network differ in their source only: the old one goes first.
    for route in present.iter().filter(|route| !wanted.contains(route)) {
        delete_route(family, table, route)?;
    }
    for route in wanted.iter().filter(|route| !present.contains(route)) {
        add_route(family, table, route)?;
    }
    Ok(())
}

/// Our routes of one family in this table.
pub fn local_routes(family: Family, table: u32) -> Result<Vec<LocalRoute>> {
    // The kernel gives no others, however many it has.
    let header = rt_route::Rtmsg {
        rtm_family: family.number(),
        rtm_protocol: ROUTE_OWNER,
        ..Default::default()
    };
    let mut request = rt_route::Request::new().op_getroute_dump(&header);
    request.encode().push_table(table);
    let mut found = Vec::new();
    list(
        &request,
        || format!("listing the {family:?} routes"),
        |(message, attributes)| {
            found.push(LocalRoute {
                destination: attributes.get_dst().unwrap_or_else(|_| unspecified(family)),
                prefix: message.rtm_dst_len,
                source: attributes.get_prefsrc().ok(),
            });
        },
    )?;
    Ok(found)
}

/// Routes that lead everywhere to loopback, and give each socket the source address that it would have without
/// them: to a network of this namespace its own address there, to anywhere else the one that the
/// kernel would choose for a packet with `mark`, which is not led to loopback. None while loopback is down, as in a
/// namespace that is being taken down: what is captured then goes nowhere.
pub fn routes_to_loopback(family: Family, mark: u32) -> Result<Vec<LocalRoute>> {
    if !links::loopback_is_up()? {
        return Ok(Vec::new());
    }
    let own: Vec<_> = addresses()?
        .into_iter()
        .filter(|address| address.is_global && Family::of(address.ip) == family)
        .collect();
    let default = source_to(elsewhere(family), mark)?
        .filter(|source| own.iter().any(|address| address.ip == *source))
        .or_else(|| own.first().map(|address| address.ip));
    let mut routes =
        vec![LocalRoute { destination: unspecified(family), prefix: 0, source: default }];
    for address in &own {
        let (destination, prefix) = (network(address.ip, address.prefix), address.prefix);
        let known = routes.iter().any(|r| (r.destination, r.prefix) == (destination, prefix));
        if !known && Some(address.ip) != default {
            routes.push(LocalRoute { destination, prefix, source: Some(address.ip) });
        }
    }
    Ok(routes)
}

/// Whether a packet with `mark` to some address elsewhere would be delivered locally by `table`: asks the
/// kernel's own lookup, so a rule or route that is missing or shadowed shows.
pub fn leads_to_loopback(family: Family, mark: u32, table: u32) -> Result<bool> {
    let found = lookup(elsewhere(family), mark)?;
    Ok(found.is_some_and(|route| route.is_local && route.table == Some(table)))
}

fn elsewhere(family: Family) -> IpAddr {
    match family {
        Family::V4 => ELSEWHERE_V4,
        Family::V6 => ELSEWHERE_V6,
    }
}

/// What the kernel would do.
struct Lookup {
    is_local: bool,
    table: Option<u32>,
    source: Option<IpAddr>,
}

fn source_to(destination: IpAddr, mark: u32) -> Result<Option<IpAddr>> {
    Ok(lookup(destination, mark)?.and_then(|route| route.source))
}

/// Nothing if there is no way.
fn lookup(destination: IpAddr, mark: u32) -> Result<Option<Lookup>> {
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
        Ok((route, attributes)) => Ok(Some(Lookup {
            is_local: route.rtm_type == libc::RTN_LOCAL,
            table: attributes.get_table().ok(),
            source: attributes.get_prefsrc().ok(),
        })),
        Err(error) => match error.as_io_error().raw_os_error() {
            // No route, or a rule or route that says unreachable, prohibit, blackhole.
            Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ESRCH) => Ok(None),
            Some(libc::EACCES | libc::EINVAL) => Ok(None),
            _ => Err(error).context(operation()),
        },
    }
}

fn add_rule(family: Family, rule: &Rule) -> Result<()> {
    let header = rule_header(family, rule);
    let mut request = rt_rule::Request::new().set_create().set_excl().op_newrule_do(&header);
    push_rule(request.encode(), rule);
    let added = send(&request, || format!("adding the {family:?} policy rule {rule:?}"));
    accept(added, &[libc::EEXIST])
}

/// Deletes one of our rules, if it is there.
pub fn delete_rule(family: Family, rule: &Rule) -> Result<()> {
    let mut request = rt_rule::Request::new().op_delrule_do(&rule_header(family, rule));
    push_rule(request.encode(), rule);
    let deleted = send(&request, || format!("deleting the {family:?} policy rule {rule:?}"));
    accept(deleted, &[libc::ENOENT])
}

fn rule_header(family: Family, rule: &Rule) -> rt_rule::FibRuleHdr {
    rt_rule::FibRuleHdr {
        family: family.number(),
        action: match rule.action {
            Action::Lookup(_) => ACTION_LOOKUP,
            Action::Goto(_) => ACTION_GOTO,
            Action::Nothing => ACTION_NOTHING,
        },
        ..Default::default()
    }
}

fn push_rule<P: netlink_bindings::traits::Pusher>(
    attributes: rt_rule::PushFibRuleAttrs<P>,
    rule: &Rule,
) {
    let mut attributes = attributes.push_priority(rule.priority).push_protocol(ROUTE_OWNER);
    attributes = match rule.action {
        Action::Lookup(table) => attributes.push_table(table),
        Action::Goto(priority) => attributes.push_goto(priority),
        Action::Nothing => attributes,
    };
    if let Some((mark, mask)) = rule.mark {
        attributes = attributes.push_fwmark(mark).push_fwmask(mask);
    }
    if rule.tcp {
        attributes = attributes.push_ip_proto(TCP);
    }
    if rule.only_sent_here {
        attributes = attributes.push_iifname(LOOPBACK);
    }
    if let Some(user) = rule.user {
        attributes = attributes.push_uid_range(rt_rule::FibRuleUidRange { start: user, end: user });
    }
    if let Some(port) = rule.source_port {
        attributes =
            attributes.push_sport_range(rt_rule::FibRulePortRange { start: port, end: port });
    }
    drop(attributes);
}

fn add_route(family: Family, table: u32, route: &LocalRoute) -> Result<()> {
    let header = route_header(family, route);
    let mut request = rt_route::Request::new().set_create().set_excl().op_newroute_do(&header);
    push_route(request.encode(), table, if_index("lo")?, route);
    let added = send(&request, || format!("adding the local route {route:?} to table {table}"));
    accept(added, &[libc::EEXIST])
}

fn delete_route(family: Family, table: u32, route: &LocalRoute) -> Result<()> {
    let mut request = rt_route::Request::new().op_delroute_do(&route_header(family, route));
    push_route(request.encode(), table, if_index("lo")?, route);
    let deleted =
        send(&request, || format!("deleting the local route {route:?} from table {table}"));
    accept(deleted, &[libc::ESRCH])
}

fn route_header(family: Family, route: &LocalRoute) -> rt_route::Rtmsg {
    rt_route::Rtmsg {
        rtm_family: family.number(),
        rtm_dst_len: route.prefix,
        // The table's number does not fit this byte and comes as an attribute.
        rtm_table: libc::RT_TABLE_UNSPEC,
        rtm_protocol: ROUTE_OWNER,
        rtm_scope: SCOPE_HOST,
        rtm_type: libc::RTN_LOCAL,
        ..Default::default()
    }
}

fn push_route<P: netlink_bindings::traits::Pusher>(
    attributes: rt_route::PushRouteAttrs<P>,
    table: u32,
    lo: u32,
    route: &LocalRoute,
) {
    let mut attributes = attributes.push_table(table).push_oif(lo);
    if route.prefix > 0 {
        attributes = attributes.push_dst(route.destination);
    }
    if let Some(source) = route.source {
        attributes = attributes.push_prefsrc(source);
    }
    drop(attributes);
}

/// The network of an address: its bits beyond the prefix are zero.
fn network(address: IpAddr, prefix: u8) -> IpAddr {
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
            Ipv4Addr::from(u32::from(address) & mask).into()
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix.min(128))).unwrap_or(0);
            Ipv6Addr::from(u128::from(address) & mask).into()
        }
    }
}

/// The families that the namespace can carry.
pub fn families() -> impl Iterator<Item = Family> {
    let without_v6 = !links::ipv6_is_enabled();
    Family::ALL.into_iter().filter(move |family| *family == Family::V4 || !without_v6)
}
