//! The table's way into the kernel and out of it: one transaction, all or nothing.

use std::ffi::CStr;

use netlink_bindings::{
    nftables::{Chained, ChainedFinal, Nfgenmsg, PushRuleAttrs, Request},
    traits::Pusher,
    utils,
};
use netlink_socket2::NetlinkSocket;
use nix::libc;

use super::{
    UNDECIDED, parts,
    published::{self, Surroundings},
    ruleset::{Chain, Rule, Ruleset, Set, SetContent},
};
use crate::{
    error::{Context, Result, accept},
    links::Family,
};

/// The one table, of the `inet` family: IPv4 and IPv6 alike.
pub(super) const TABLE: &CStr = c"hauberk";

/// `NFPROTO_INET` of `linux/netfilter.h`.
pub(super) const INET: u8 = 1;

/// A list of elements is one attribute, whose length has 16 bits.
const ELEMENTS_A_MESSAGE: usize = 500;

const ACCEPT: u32 = 1;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const LIST_ELEMENT: u16 = 1;
/// `NFTNL_UDATA_TABLE_COMMENT`: what `nft list table` shows as the comment.
const USERDATA_COMMENT: u8 = 0;

/// Puts the table in place of whatever table of that name there is, in one transaction: a packet
/// meets either the old rules or the new ones. `opening` are in their sets of older connections from the first moment.
pub(super) fn replace(
    ruleset: &Ruleset,
    around: &Surroundings,
    opening: &[(&str, Vec<Vec<u8>>)],
) -> Result<()> {
    send(replacement(ruleset, around, opening), "installing the capture rules")
}

/// Deletes the table, if there is one.
pub(super) fn delete() -> Result<()> {
    let mut batch = Batch::begin();
    batch.delete_table();
    accept(send(batch.end(), "removing the capture rules"), &[libc::ENOENT])
}

fn send(batch: ChainedFinal<'_>, operation: &str) -> Result<()> {
    let mut socket = NetlinkSocket::new();
    let mut reply = socket.request_chained(&batch).context(operation)?;
    reply.recv_all().context(operation)
}

/// Ends the time in which it is being found out which connections are older than the rules.
pub(super) fn decide() -> Result<()> {
    let mut batch = Batch::begin();
    batch.flush_chain(UNDECIDED);
    send(batch.end(), "installing the capture rules")
}

/// Adds connections to the set of those that are older than the rules.
pub(super) fn add_connections(set: &str, keys: &[Vec<u8>]) -> Result<()> {
    for keys in keys.chunks(ELEMENTS_A_MESSAGE) {
        let mut batch = Batch::begin();
        batch.add_elements(set, keys);
        send(batch.end(), "telling the capture rules of older connections")?;
    }
    Ok(())
}

/// Takes connections out of it. One that is not there is no error.
pub(super) fn remove_connections(set: &str, keys: &[Vec<u8>]) -> Result<()> {
    // Many at a time: the kernel waits some milliseconds for each transaction. Rules take them out as well, and one with
    // a connection that is gone does nothing: then each half is tried.
    let mut left: Vec<_> = keys.chunks(ELEMENTS_A_MESSAGE).collect();
    while let Some(keys) = left.pop() {
        let mut batch = Batch::begin();
        batch.remove_elements(set, keys);
        match send(batch.end(), "taking closed connections out of the capture rules") {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                let (first, second) = keys.split_at(keys.len() / 2);
                left.extend([first, second].into_iter().filter(|half| half.len() < keys.len()));
                left.retain(|keys| !keys.is_empty());
            }
            sent => sent?,
        }
    }
    Ok(())
}

/// Makes the chains that depend on the network around the table be those of these surroundings.
pub(super) fn adapt(ruleset: &Ruleset, around: &Surroundings) -> Result<()> {
    let mut batch = Batch::begin();
    for name in published::BESIDE {
        // Made first: deleting what isn't there would fail the transaction.
        batch.create_chain(&Chain::named(name));
        batch.flush_chain(name);
        batch.delete_chain(name);
    }
    batch.flush_chain(published::LEAVING);
    for chain in around.chains(&ruleset.sets) {
        batch.create_chain(&chain);
        for rule in &chain.rules {
            batch.append_rule(&chain.name, rule);
        }
    }
    send(batch.end(), "fitting the capture rules to other programs' address translation")
}

fn replacement(
    ruleset: &Ruleset,
    around: &Surroundings,
    opening: &[(&str, Vec<Vec<u8>>)],
) -> ChainedFinal<'static> {
    let mut batch = Batch::begin();
    // Deleting what isn't there would fail the transaction, so it is made first.
    batch.create_table(ruleset);
    batch.delete_table();
    batch.create_table(ruleset);
    for (number, set) in (1..).zip(&ruleset.sets) {
        batch.create_set(set, number);
    }
    let fitted = around.chains(&ruleset.sets);
    for chain in ruleset.chains.iter().chain(&fitted) {
        batch.create_chain(chain);
    }
    for set in &ruleset.sets {
        if let SetContent::Ports(ports) = &set.content {
            let keys: Vec<_> = ports.iter().map(|port| port.to_be_bytes().to_vec()).collect();
            keys.chunks(ELEMENTS_A_MESSAGE).for_each(|keys| batch.add_elements(set.name, keys));
        }
    }
    for (set, keys) in opening {
        keys.chunks(ELEMENTS_A_MESSAGE).for_each(|keys| batch.add_elements(set, keys));
    }
    for chain in ruleset.chains.iter().chain(&fitted).chain([&parts::undecided()]) {
        for rule in &chain.rules {
            batch.append_rule(&chain.name, rule);
        }
    }
    batch.end()
}

struct Batch {
    messages: Chained<'static>,
    header: Nfgenmsg,
}

impl Batch {
    fn begin() -> Self {
        let mut batch = Self {
            messages: Chained::new(1),
            header: Nfgenmsg { nfgen_family: INET, ..Default::default() },
        };
        drop(batch.messages.request().op_batch_begin_do(&subsystem()));
        batch
    }

    fn end(mut self) -> ChainedFinal<'static> {
        drop(self.messages.request().op_batch_end_do(&subsystem()));
        self.messages.finalize()
    }

    fn create(&mut self) -> Request<'_> {
        self.messages.request().set_create()
    }

    fn create_table(&mut self, ruleset: &Ruleset) {
        let header = self.header.clone();
        let comment = comment(&format!("hauberk {:016x} {}", ruleset.fingerprint(), ruleset.owner));
        self.create().op_newtable_do(&header).encode().push_name(TABLE).push_userdata(&comment);
    }

    fn delete_table(&mut self) {
        let header = self.header.clone();
        self.messages.request().op_deltable_do(&header).encode().push_name(TABLE);
    }

    fn create_chain(&mut self, chain: &Chain) {
        let header = self.header.clone();
        let mut request = self.create().op_newchain_do(&header);
        let attributes = request.encode().push_table(TABLE).push_name_bytes(chain.name.as_bytes());
        if let Some(hook) = chain.hook {
            attributes
                .nested_hook()
                .push_num(hook.number)
                .push_priority(hook.priority)
                .end_nested()
                .push_type_bytes(hook.kind.name().as_bytes())
                .push_policy(ACCEPT);
        }
    }

    fn delete_chain(&mut self, chain: &str) {
        let header = self.header.clone();
        let mut request = self.messages.request().op_delchain_do(&header);
        request.encode().push_table(TABLE).push_name_bytes(chain.as_bytes());
    }

    fn create_set(&mut self, set: &Set, number: u32) {
        // Types of nft's own, by which it shows the elements; the kernel does not look at them.
        const IPV4_ADDRESS: u32 = 7;
        const IPV6_ADDRESS: u32 = 8;
        const PORT: u32 = 13;
        /// `NFT_SET_EVAL`: rules take elements out.
        const CHANGED_BY_RULES: u32 = 0x20;
        let ends = |address: u32| (((address << 6 | PORT) << 6 | address) << 6) | PORT;
        let (key_type, key_length, flags) = match &set.content {
            SetContent::Ports(_) => (PORT, 2, 0),
            SetContent::Connections(Family::V4) => (ends(IPV4_ADDRESS), 16, CHANGED_BY_RULES),
            SetContent::Connections(Family::V6) => (ends(IPV6_ADDRESS), 40, CHANGED_BY_RULES),
        };
        let header = self.header.clone();
        let mut request = self.create().op_newset_do(&header);
        request
            .encode()
            .push_table(TABLE)
            .push_name_bytes(set.name.as_bytes())
            .push_flags(flags)
            .push_key_type(key_type)
            .push_key_len(key_length)
            .push_id(number);
    }

    fn add_elements(&mut self, set: &str, keys: &[Vec<u8>]) {
        let header = self.header.clone();
        let mut request = self.create().op_newsetelem_do(&header);
        let mut elements =
            request.encode().push_table(TABLE).push_set_bytes(set.as_bytes()).nested_elements();
        for key in keys {
            elements =
                elements.nested_elem().nested_key().push_value(key).end_nested().end_nested();
        }
    }

    fn remove_elements(&mut self, set: &str, keys: &[Vec<u8>]) {
        let header = self.header.clone();
        let mut request = self.messages.request().op_delsetelem_do(&header);
        let mut elements =
            request.encode().push_table(TABLE).push_set_bytes(set.as_bytes()).nested_elements();
        for key in keys {
            elements =
                elements.nested_elem().nested_key().push_value(key).end_nested().end_nested();
        }
    }

    fn flush_chain(&mut self, chain: &str) {
        let header = self.header.clone();
        self.messages
            .request()
            .op_delrule_do(&header)
            .encode()
            .push_table(TABLE)
            .push_chain_bytes(chain.as_bytes());
    }

    fn append_rule(&mut self, chain: &str, rule: &Rule) {
        let header = self.header.clone();
        let mut request = self.create().set_append().op_newrule_do(&header);
        let attributes = request.encode().push_table(TABLE).push_chain_bytes(chain.as_bytes());
        push_expressions(attributes, rule);
    }
}

fn push_expressions<P: Pusher>(attributes: PushRuleAttrs<P>, rule: &Rule) {
    let mut list = attributes.nested_expressions();
    for expression in &rule.expressions {
        // The bindings have no types for `tproxy` and `socket`; this does for all alike.
        let message = list.as_vec_mut();
        let element = utils::push_nested_header(message, LIST_ELEMENT);
        let name = utils::push_header(message, EXPRESSION_NAME, 0);
        message.extend(expression.name.as_bytes());
        message.push(0);
        set_length(message, name);
        utils::align(message);
        let data = utils::push_nested_header(message, EXPRESSION_DATA);
        message.extend(&expression.attributes);
        utils::finalize_nested_header(message, data);
        utils::finalize_nested_header(message, element);
    }
}

/// Writes an attribute's length without the padding that follows it.
fn set_length(message: &mut [u8], offset: usize) {
    let length = u16::try_from(message.len() - offset).unwrap_or(u16::MAX);
    if let Some(field) = message.get_mut(offset..offset + 2) {
        field.copy_from_slice(&length.to_ne_bytes());
    }
}

fn subsystem() -> Nfgenmsg {
    // NFNL_SUBSYS_NFTABLES, in network order as its name says.
    let mut header = Nfgenmsg::new();
    header.set_res_id(10);
    header
}

/// The owner that a table's user data name.
pub(super) fn owner(userdata: &[u8]) -> Option<String> {
    let text = userdata.strip_prefix(&[USERDATA_COMMENT])?.get(1..)?.strip_suffix(&[0])?;
    let text = std::str::from_utf8(text).ok()?;
    Some(text.splitn(3, ' ').nth(2)?.to_owned())
}

fn comment(text: &str) -> Vec<u8> {
    let length = u8::try_from(text.len() + 1).unwrap_or(u8::MAX);
    let mut userdata = vec![USERDATA_COMMENT, length];
    userdata.extend(text.as_bytes());
    userdata.push(0);
    userdata
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use netlink_bindings::traits::NetlinkChained;

    use super::*;
    use crate::capture::{MAX_OPENING, NamespaceRules, OLDER_V6, Unroutable};

    /// The message types of a batch, in order.
    fn types(payload: &[u8]) -> Vec<u16> {
        let mut rest = payload;
        let mut types = Vec::new();
        while let Some((header, _)) = rest.split_at_checked(16) {
            let length = u32::from_ne_bytes(header[..4].try_into().unwrap());
            types.push(u16::from_ne_bytes(header[4..6].try_into().unwrap()));
            rest = &rest[usize::try_from(length).unwrap()..];
        }
        assert!(rest.is_empty());
        types
    }

    #[test]
    fn a_replacement_is_one_transaction() {
        const BATCH_BEGIN: u16 = 0x10;
        const BATCH_END: u16 = 0x11;
        const NEW_TABLE: u16 = 0xa00;
        const DELETE_TABLE: u16 = 0xa02;
        let rules = NamespaceRules {
            outbound_port: Some(1),
            plaintext_port: Some(2),
            mesh_listener: Some(3),
            mesh_port: 4,
            unroutable: Unroutable::Refuse,
            letting_go: false,
        };
        let batch = replacement(&rules.ruleset().unwrap(), &Surroundings::default(), &[]);
        // As many as there may be of the longer ones, beside rules of the longest kind: the kernel takes a message of
        // 212,960 bytes by default.
        let opening = [(OLDER_V6, vec![vec![0; 40]; MAX_OPENING])];
        let full = replacement(&rules.ruleset().unwrap(), &Surroundings::default(), &opening);
        assert!(full.payload().len() < 100_000, "{}", full.payload().len());
        let types = types(batch.payload());
        let count = |wanted| types.iter().filter(|found| **found == wanted).count();
        let opening = [BATCH_BEGIN, NEW_TABLE, DELETE_TABLE, NEW_TABLE];
        assert_eq!(types[..4], opening);
        assert_eq!(types.last(), Some(&BATCH_END));
        assert_eq!((count(BATCH_BEGIN), count(BATCH_END)), (1, 1));
    }
}
