//! Whether the kernel still has the rules it was given, told from its own dump of them.
//!
//! Every attribute that was sent must come back with the same value. Attributes that were not
//! sent are not looked at: newer kernels add some of their own. What this cannot see is another
//! table, with a lower priority number, that takes packets before ours does.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use netlink_bindings::{
    nftables::{IterableChainAttrs, Nfgenmsg, Request},
    utils,
};
use netlink_socket2::NetlinkSocket;
use nix::libc;

use super::{
    expression::Expression,
    published::{self, Surroundings},
    ruleset::{Chain, Ruleset, SetContent},
    transaction::{self, INET, TABLE},
};
use crate::error::{Context, Result};

const ACCEPT: u32 = 1;
const TABLE_DORMANT: u32 = 1;
/// `NFTA_SET_ELEM_LIST_ELEMENTS`, `NFTA_SET_ELEM_KEY` and `NFTA_DATA_VALUE`.
const SET_ELEMENTS: u16 = 3;
const ELEMENT_KEY: u16 = 1;
const DATA_VALUE: u16 = 1;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;

/// A difference between the rules asked for and those in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Drift {
    /// The table is not there.
    TableMissing,
    /// The table is there, but switched off.
    TableDormant,
    /// A chain is not there.
    ChainMissing(String),
    /// A chain nobody asked for is there.
    ChainUnknown(String),
    /// A chain's hook, type, priority or policy was changed.
    ChainAltered(String),
    /// A chain's rules were added to, removed, reordered or changed.
    RulesAltered(String),
    /// A set is not there, or has other ports.
    SetAltered(String),
    /// The policy routing that leads captured connections to loopback is missing, altered or overridden.
    PolicyRoutingMissing,
    /// The routes that lead to loopback are not those of the namespace's present addresses.
    RoutesOutdated,
    /// The rules are not fitted to other programs' address translation, or to where its connections may go.
    TranslationOutdated,
    /// A setting of the kernel that the rules need is not as it was set.
    SettingChanged(&'static str),
}

impl Drift {
    /// Whether the network around the rules has changed, as when an interface or an address comes, rather than what
    /// was put in place. [`Ruleset::fit_to_network`] mends it.
    pub fn is_of_the_network(&self) -> bool {
        match self {
            Drift::RoutesOutdated | Drift::TranslationOutdated | Drift::SettingChanged(_) => true,
            Drift::TableMissing
            | Drift::TableDormant
            | Drift::ChainMissing(_)
            | Drift::ChainUnknown(_)
            | Drift::ChainAltered(_)
            | Drift::RulesAltered(_)
            | Drift::SetAltered(_)
            | Drift::PolicyRoutingMissing => false,
        }
    }
}

impl fmt::Display for Drift {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Drift::TableMissing => write!(f, "the table is missing"),
            Drift::TableDormant => write!(f, "the table is dormant"),
            Drift::ChainMissing(chain) => write!(f, "the chain {chain} is missing"),
            Drift::ChainUnknown(chain) => write!(f, "the chain {chain} is not ours"),
            Drift::ChainAltered(chain) => write!(f, "the chain {chain} has another hook"),
            Drift::RulesAltered(chain) => write!(f, "the rules of the chain {chain} differ"),
            Drift::SetAltered(set) => write!(f, "the set {set} differs"),
            Drift::PolicyRoutingMissing => write!(f, "the policy routing is missing"),
            Drift::RoutesOutdated => write!(f, "the routes to loopback are outdated"),
            Drift::TranslationOutdated => {
                write!(f, "the rules are not fitted to other programs' address translation")
            }
            Drift::SettingChanged(setting) => write!(f, "the setting {setting} was changed"),
        }
    }
}

/// Whether the table exists and works.
pub(super) fn table() -> Result<Option<Drift>> {
    let operation = "looking up the capture table";
    let mut request = Request::new().op_gettable_do(&header());
    request.encode().push_name(TABLE);
    let mut socket = NetlinkSocket::new();
    let mut reply = socket.request(&request).context(operation)?;
    match reply.recv_one() {
        Ok((_, attributes)) => {
            let flags = attributes.get_flags().unwrap_or(0);
            Ok((flags & TABLE_DORMANT != 0).then_some(Drift::TableDormant))
        }
        Err(error) if error.as_io_error().raw_os_error() == Some(libc::ENOENT) => {
            Ok(Some(Drift::TableMissing))
        }
        Err(error) => Err(error).context(operation),
    }
}

/// Who put the table there, as its comment says; nothing if there is no table, or it does not say.
pub(super) fn owner() -> Result<Option<String>> {
    let operation = "looking up the capture table";
    let mut request = Request::new().op_gettable_do(&header());
    request.encode().push_name(TABLE);
    let mut socket = NetlinkSocket::new();
    let mut reply = socket.request(&request).context(operation)?;
    match reply.recv_one() {
        Ok((_, attributes)) => Ok(attributes.get_userdata().ok().and_then(transaction::owner)),
        Err(error) if error.as_io_error().raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error).context(operation),
    }
}

/// Compares the kernel's chains and rules with `ruleset`.
pub(super) fn compare(ruleset: &Ruleset) -> Result<Vec<Drift>> {
    let mut found = match table()? {
        Some(Drift::TableMissing) => return Ok(vec![Drift::TableMissing]),
        other => Vec::from_iter(other),
    };
    let (mut chains, others_translate) = installed_chains()?;
    let mut rules = installed_rules()?;
    let around = Surroundings::beside(others_translate)?;
    if !are_fitted(&around.chains(&ruleset.sets), &mut chains, &rules) {
        found.push(Drift::TranslationOutdated);
    }
    for expected in &ruleset.chains {
        let name = || expected.name.clone();
        match chains.remove(&expected.name) {
            None => {
                found.push(Drift::ChainMissing(name()));
                continue;
            }
            Some(installed) if installed != Base::of(expected) => {
                found.push(Drift::ChainAltered(name()));
            }
            Some(_) => {}
        }
        if !same_rules(expected, &rules.remove(&expected.name).unwrap_or_default()) {
            found.push(Drift::RulesAltered(name()));
        }
    }
    found.extend(chains.into_keys().map(Drift::ChainUnknown));
    for set in &ruleset.sets {
        let same = match (&set.content, elements(set.name)?) {
            (_, None) => false,
            (SetContent::Connections(_), Some(_)) => true,
            (SetContent::Ports(ports), Some(keys)) => {
                let wanted: BTreeSet<_> =
                    ports.iter().map(|port| port.to_be_bytes().to_vec()).collect();
                wanted == keys.into_iter().collect()
            }
        };
        if !same {
            found.push(Drift::SetAltered(set.name.to_owned()));
        }
    }
    Ok(found)
}

/// Whether the chains that depend on the network around the table are these; takes them out of the list.
fn are_fitted(
    wanted: &[Chain],
    chains: &mut BTreeMap<String, Base>,
    rules: &BTreeMap<String, Vec<Vec<u8>>>,
) -> bool {
    let all = published::BESIDE.into_iter().chain([published::LEAVING]);
    all.fold(true, |fitted, name| {
        let found = chains.remove(name);
        let wanted = wanted.iter().find(|chain| chain.name == name);
        let rules = rules.get(name).map(Vec::as_slice).unwrap_or_default();
        fitted
            && match (wanted, found) {
                (Some(wanted), Some(found)) => {
                    found == Base::of(wanted) && same_rules(wanted, rules)
                }
                (None, None) => true,
                (Some(_), None) | (None, Some(_)) => false,
            }
    })
}

/// Whether another table of nftables in the calling thread's namespace translates addresses.
pub(super) fn others_translate() -> Result<bool> {
    Ok(installed_chains()?.1)
}

/// The keys of a set's elements; nothing if there is no such set.
pub(super) fn elements(set: &str) -> Result<Option<Vec<Vec<u8>>>> {
    let operation = || format!("listing the capture rules' set {set}");
    let mut request = Request::new().op_getsetelem_dump(&header());
    request.encode().push_table(TABLE).push_set_bytes(set.as_bytes());
    let mut socket = NetlinkSocket::new();
    let mut reply = socket.request(&request).context(operation())?;
    let mut keys = Vec::new();
    while let Some(answer) = reply.recv() {
        let (_, list) = match answer {
            Err(error) if error.as_io_error().raw_os_error() == Some(libc::ENOENT) => {
                return Ok(None);
            }
            answer => answer.context(operation())?,
        };
        let elements = utils::find_attr(list.get_buf(), SET_ELEMENTS).unwrap_or_default();
        for (_, element) in utils::IterableChunks::new(elements) {
            let key = utils::find_attr(element, ELEMENT_KEY)
                .and_then(|key| utils::find_attr(key, DATA_VALUE))
                .unwrap_or_default();
            keys.push(key.to_vec());
        }
    }
    Ok(Some(keys))
}

/// What makes a base chain: type, hook, priority and policy; `None` for any other chain.
#[derive(Debug, PartialEq, Eq)]
struct Base(Option<(Vec<u8>, u32, i32, u32)>);

impl Base {
    fn of(chain: &Chain) -> Self {
        Self(chain.hook.map(|hook| {
            let kind = hook.kind.name().as_bytes().to_vec();
            (kind, hook.number, hook.priority, ACCEPT)
        }))
    }

    fn installed(attributes: &IterableChainAttrs<'_>) -> Self {
        let Ok(hook) = attributes.get_hook() else {
            return Self(None);
        };
        Self(Some((
            attributes.get_type().map(|kind| kind.to_bytes().to_vec()).unwrap_or_default(),
            hook.get_num().unwrap_or(u32::MAX),
            hook.get_priority().unwrap_or(i32::MAX),
            attributes.get_policy().unwrap_or(u32::MAX),
        )))
    }
}

/// The chains of our table, and whether a chain of another one translates addresses.
fn installed_chains() -> Result<(BTreeMap<String, Base>, bool)> {
    let operation = "listing the capture chains";
    // Of all families.
    let request = Request::new().op_getchain_dump(&Nfgenmsg::new());
    let mut socket = NetlinkSocket::new();
    let mut reply = socket.request(&request).context(operation)?;
    let mut chains = BTreeMap::new();
    let mut others_translate = false;
    while let Some(answer) = reply.recv() {
        let (header, chain) = answer.context(operation)?;
        if header.nfgen_family != INET || chain.get_table() != Ok(TABLE) {
            others_translate |= chain.get_type().is_ok_and(|kind| kind == c"nat");
        } else if let Ok(name) = chain.get_name() {
            let name = name.to_string_lossy().into_owned();
            chains.insert(name, Base::installed(&chain));
        }
    }
    Ok((chains, others_translate))
}

/// The rules of each chain, in order, as the bytes of their expression lists.
fn installed_rules() -> Result<BTreeMap<String, Vec<Vec<u8>>>> {
    let operation = "listing the capture rules";
    let mut request = Request::new().op_getrule_dump(&header());
    request.encode().push_table(TABLE);
    let mut socket = NetlinkSocket::new();
    let mut reply = socket.request(&request).context(operation)?;
    let mut rules: BTreeMap<_, Vec<_>> = BTreeMap::new();
    while let Some(answer) = reply.recv() {
        let (_, rule) = answer.context(operation)?;
        if rule.get_table() == Ok(TABLE)
            && let Ok(chain) = rule.get_chain()
        {
            let expressions =
                rule.get_expressions().map(|list| list.get_buf().to_vec()).unwrap_or_default();
            let name = chain.to_string_lossy().into_owned();
            rules.entry(name).or_default().push(expressions);
        }
    }
    Ok(rules)
}

fn same_rules(expected: &Chain, installed: &[Vec<u8>]) -> bool {
    expected.rules.len() == installed.len()
        && expected
            .rules
            .iter()
            .zip(installed)
            .all(|(rule, list)| same_expressions(&rule.expressions, list))
}

fn same_expressions(expected: &[Expression], list: &[u8]) -> bool {
    let installed: Vec<_> = utils::IterableChunks::new(list).collect();
    expected.len() == installed.len()
        && expected.iter().zip(installed).all(|(expected, (_, it))| {
            let name = utils::find_attr(it, EXPRESSION_NAME)
                .and_then(|name| name.strip_suffix(&[0]))
                .unwrap_or_default();
            let data = utils::find_attr(it, EXPRESSION_DATA).unwrap_or_default();
            name == expected.name.as_bytes() && contains(data, &expected.attributes)
        })
}

/// Whether `installed` has every attribute of `expected`, with the same value.
fn contains(installed: &[u8], expected: &[u8]) -> bool {
    utils::IterableChunks::new(expected).all(|(header, value)| {
        utils::find_attr(installed, header.r#type).is_some_and(|found| {
            if header.is_nested { contains(found, value) } else { found == value }
        })
    })
}

fn header() -> Nfgenmsg {
    Nfgenmsg { nfgen_family: INET, ..Default::default() }
}
