//! What the rules of a namespace and those of a host have in common.

use super::{
    DIALLED, MARK, MARK_PUBLISHED, MARK_TRANSPARENT, MARK_UNCAPTURED, OLDER_V4, OLDER_V6,
    OWN_MARKS, RELEASED_BITS, REPORT_GROUP, UNDECIDED, Unroutable,
    expression::{
        Expression, Is, destination_port, discard, extended, forget_incoming, forget_outgoing,
        goto, jump, let_through, mark, masked_mark, opening, outgoing_in, pass, report_to, reset,
        set_mark, tcp, to_listener, to_listener_of_mark, to_loopback, to_this_host,
        to_transparent_socket, untracked,
    },
    published, released,
    ruleset::{Chain, Hook, Set, SetContent},
};
use crate::links::Family;

/// What the agent sends, and what was found to be no business of the mesh, leaves as it is.
pub(super) fn agents_own() -> Vec<Vec<Vec<Expression>>> {
    vec![
        vec![own(), let_through()],
        vec![mark(MARK_TRANSPARENT), opening(Is::Equal), jump(DIALLED)],
        vec![mark(MARK_TRANSPARENT), let_through()],
        vec![given_back(), let_through()],
    ]
}

/// The same on a host: what the agent exchanges with applications over loopback is no business of connection
/// tracking, which others use there. But for what is to be led to a container by it.
pub(super) fn agents_own_untracked() -> Vec<Vec<Vec<Expression>>> {
    vec![
        vec![mark(MARK_PUBLISHED), let_through()],
        vec![own(), to_loopback(Is::Equal), untracked(), let_through()],
        vec![own(), let_through()],
        vec![mark(MARK_TRANSPARENT), opening(Is::Equal), jump(DIALLED)],
        vec![mark(MARK_TRANSPARENT), untracked(), let_through()],
        vec![given_back(), untracked(), let_through()],
    ]
}

/// A first packet that was held.
pub(super) fn given_back() -> Vec<Expression> {
    masked_mark(Is::Equal, released(0), RELEASED_BITS)
}

/// What was held and is given back goes to the listener that its mark names; without one, it is refused.
pub(super) fn given_back_to_listener(chain: Chain) -> Chain {
    let here = || [given_back(), opening(Is::Equal)];
    let chain = Family::ALL.into_iter().fold(chain, |chain, family| {
        let [given_back, opening] = here();
        chain.rule([given_back, opening, to_listener_of_mark(family), let_through()])
    });
    let [given_back, opening] = here();
    chain.rule([given_back, opening, reset()])
}

/// The first packets of connections for the agent's listener are held: the agent is told of each, and it goes no
/// further. One with extension headers, which the agent does not read, is refused. Where there is no listener, nobody would answer it, and the rules after these refuse it.
pub(super) fn held(chain: Chain, port: u16, which: impl Fn() -> Vec<Expression>) -> Chain {
    let chain = chain.rule([which(), opening(Is::Equal), extended(), reset()]);
    Family::ALL.into_iter().fold(chain, |chain, family| {
        chain.rule([
            which(),
            opening(Is::Equal),
            to_listener(family, port),
            report_to(port),
            discard(),
        ])
    })
}

/// The agent's own mark, or that of what is left alone.
fn own() -> Vec<Expression> {
    masked_mark(Is::Equal, MARK & OWN_MARKS, OWN_MARKS)
}

/// Neither of them.
pub(super) fn not_own() -> Vec<Expression> {
    masked_mark(Is::Not, MARK & OWN_MARKS, OWN_MARKS)
}

/// The agent's own packets to applications, and their answers.
pub(super) fn carried() -> Vec<Vec<Vec<Expression>>> {
    vec![vec![own(), pass()], vec![mark(MARK_TRANSPARENT), pass()]]
}

/// From one workload's agent to another's, on one machine.
pub(super) fn mesh_from_loopback(chain: Chain, mesh_port: u16, listener: Option<u16>) -> Chain {
    let Some(listener) = listener else { return chain };
    Family::ALL.into_iter().fold(chain, |chain, family| {
        chain.rule([
            mark(MARK),
            destination_port(mesh_port),
            to_listener(family, listener),
            let_through(),
        ])
    })
}

/// All packets that do not belong to a connection of an application's go to the agent's listener.
pub(super) fn families_to_listener(chain: Chain, listener: Option<u16>) -> Chain {
    let Some(listener) = listener else { return chain };
    Family::ALL
        .into_iter()
        .fold(chain, |chain, family| chain.rule([to_listener(family, listener), let_through()]))
}

/// The connections that are older than the rules.
pub(super) fn older_sets() -> Vec<Set> {
    vec![
        Set { name: OLDER_V4, content: SetContent::Connections(Family::V4) },
        Set { name: OLDER_V6, content: SetContent::Connections(Family::V6) },
    ]
}

/// Lets connections go on that are older than the rules. One that is opened anew between the same ends is not.
pub(super) fn older_chain() -> Chain {
    let families = [(Family::V4, OLDER_V4), (Family::V6, OLDER_V6)];
    families.into_iter().fold(Chain::named("older"), |chain, (family, set)| {
        chain.rule([opening(Is::Equal), forget_outgoing(family, set)]).rule([
            outgoing_in(family, set),
            set_mark(MARK_UNCAPTURED),
            let_through(),
        ])
    })
}

/// What the agent opens to an application has the ends that its caller has, and the application's answers look like
/// those of an older connection between the same ends: they would leave as they are.
pub(super) fn dialled_chain() -> Chain {
    let families = [(Family::V4, OLDER_V4), (Family::V6, OLDER_V6)];
    families.into_iter().fold(Chain::named(DIALLED), |chain, (family, set)| {
        chain.rule([forget_incoming(family, set)])
    })
}

/// Leaves connections alone that are opened from here on, if they are to another host or not, noted by `remember` among
/// those that are older.
pub(super) fn left_alone(
    chain: Chain,
    to_this: Is,
    remember: impl Fn(Family, &str) -> Vec<Expression>,
) -> Chain {
    let families = [(Family::V4, OLDER_V4), (Family::V6, OLDER_V6)];
    families.into_iter().fold(chain, |chain, (family, set)| {
        chain.rule([
            opening(Is::Equal),
            // Before it is looked where it goes, or everything would seem to go to loopback.
            set_mark(MARK_UNCAPTURED),
            to_this_host(to_this),
            remember(family, set),
            let_through(),
        ])
    })
}

/// The rules of the chain [`UNDECIDED`](super::UNDECIDED) while it is being found out which connections are older
/// than the rules: a packet on loopback that belongs to none of the agent's is lost, and sent again by its
/// application's kernel, rather than refused.
pub(super) fn undecided() -> Chain {
    Chain::named(UNDECIDED)
        .rule([to_transparent_socket(), pass()])
        .rule([set_mark(MARK_UNCAPTURED), to_this_host(Is::Equal), pass()])
        .rule([discard()])
}

/// The beginning of a chain for what is captured and was not led to loopback after all, as with a socket that is
/// bound to another interface.
pub(super) fn leaving() -> Chain {
    Chain::at("leaving", Hook::POSTROUTING)
        .rule([tcp(Is::Not), pass()])
        .rule([to_loopback(Is::Equal), pass()])
        .rule([mark(MARK_PUBLISHED), goto(published::LEAVING)])
        .rule([own(), pass()])
}

/// Tells of such a connection of a workload, and stops it or not. A reset cannot be sent from here: whoever is told
/// ends the connection.
pub(super) fn unroutable(
    chain: Chain,
    of_workload: impl Fn() -> Vec<Expression>,
    what: Unroutable,
) -> Chain {
    let chain = chain.rule([of_workload(), opening(Is::Equal), report_to(REPORT_GROUP)]);
    match what {
        Unroutable::Refuse => chain.rule([of_workload(), discard()]),
        Unroutable::Pass => chain.rule([of_workload(), let_through()]),
    }
}
