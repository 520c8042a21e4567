//! The rules inside a workload's network namespace: all its TCP goes through the agent.

use std::collections::BTreeMap;

use super::{
    MARK_UNCAPTURED, UNDECIDED, Unroutable, captured,
    expression::{
        Is, destination_port, from_loopback, goto, jump, opening, pass, remember_incoming,
        remember_outgoing, reset, set_mark, tcp, to_loopback, to_this_host,
    },
    older::Scope,
    parts::{
        agents_own, carried, dialled_chain, families_to_listener, given_back_to_listener, held,
        leaving, left_alone, mesh_from_loopback, older_chain, older_sets, unroutable,
    },
    ruleset::{Chain, Hook, Ruleset},
    second_line::Routing,
};
use crate::error::{Error, Result};

/// Capture of one network namespace.
///
/// - The first packet of TCP that leaves the namespace is held ([`Hold`](super::Hold)) until the agent lets it
///   arrive at `outbound_port`; the accepted socket's own address is where it was going. Loopback, which includes the namespace's own addresses, is left alone.
/// - TCP that comes in arrives at `plaintext_port`, but for that to `mesh_port`, which arrives at
///   `mesh_listener`. Whether another program listens on those ports makes no difference.
/// - UDP, ICMP and connections opened before the rules are left alone.
///
/// The agent's listeners are on loopback, may have any address (`IP_TRANSPARENT`) and carry
/// [`MARK`](super::MARK), as [`listen_captured`](crate::socket::listen_captured) makes them. Where none is,
/// connections are refused: the rules stay when the agent dies. A process with `CAP_NET_ADMIN` in the namespace
/// (since Linux 5.17 also one with `CAP_NET_RAW`) can mark its packets and pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamespaceRules {
    /// The agent's port for what the workload sends; none while it does not listen.
    pub outbound_port: Option<u16>,
    /// The agent's port for what comes in without the mesh; none while it does not listen.
    pub plaintext_port: Option<u16>,
    /// The agent's port for other agents; none while it does not listen.
    pub mesh_listener: Option<u16>,
    /// The port that other agents dial.
    pub mesh_port: u16,
    /// What becomes of connections that cannot be led to the agent.
    pub unroutable: Unroutable,
    /// Only those that are captured already go on through the agent: the workload has left the mesh. New ones are
    /// left alone, and noted among those that are older than the rules: for as long as it may take, someone is to have
    /// the closed ones forgotten ([`closed_older`](super::closed_older), [`forget_older`](super::forget_older)), since
    /// there is room for 65,535.
    pub letting_go: bool,
}

impl NamespaceRules {
    /// The rules as a description; nothing is changed. Refuses ports that coincide or are zero.
    pub fn ruleset(&self) -> Result<Ruleset> {
        self.check()?;
        Ok(Ruleset {
            sets: older_sets(),
            chains: vec![
                Chain::named(UNDECIDED),
                older_chain(),
                dialled_chain(),
                self.loopback_chain(),
                self.mesh_chain(),
                self.prerouting(),
                self.output(),
                self.leaving(),
            ],
            routing: Routing::Namespace,
            scope: Scope::Namespace(self.unroutable),
            owner: String::new(),
        })
    }

    fn check(&self) -> Result<()> {
        let ports =
            [self.outbound_port, self.plaintext_port, self.mesh_listener, Some(self.mesh_port)];
        let mut seen = BTreeMap::new();
        for port in ports.into_iter().flatten() {
            if port == 0 || seen.insert(port, ()).is_some() {
                return Err(Error::InvalidRules {
                    reason: format!("the ports must differ and not be zero: {self:?}"),
                });
            }
        }
        Ok(())
    }

    /// The mark of what the workload sends: only where nothing else led it to loopback already.
    fn mark(&self) -> u32 {
        captured(self.outbound_port.unwrap_or(0))
    }

    /// Sees what the workload sends before anything else does, and leads it to loopback if the routing rules did
    /// not.
    fn output(&self) -> Chain {
        let chain = Chain::at("output", Hook::ROUTE_OUTPUT)
            .rule([tcp(Is::Not), pass()])
            .rules(agents_own())
            .rule([jump("older")]);
        let chain = if self.letting_go {
            // What finds no room there is captured, and marked for nothing else.
            left_alone(chain, Is::Not, remember_outgoing).rule([
                opening(Is::Equal),
                to_this_host(Is::Not),
                set_mark(self.mark()),
            ])
        } else {
            chain
        };
        chain.rule([to_loopback(Is::Equal), pass()]).rule([set_mark(self.mark())])
    }

    fn prerouting(&self) -> Chain {
        let chain = Chain::at("prerouting", Hook::PREROUTING)
            .rule([tcp(Is::Not), pass()])
            .rule([from_loopback(Is::Equal), goto("from_loopback")])
            // Or the rule that leads everything to loopback would make its source look false.
            .rule([set_mark(MARK_UNCAPTURED)]);
        let chain = if self.letting_go {
            // An agent that does not know yet learns it from this.
            let chain = chain.rule([destination_port(self.mesh_port), opening(Is::Equal), reset()]);
            left_alone(chain, Is::Equal, remember_incoming)
        } else {
            chain
        };
        let chain = chain.rule([destination_port(self.mesh_port), goto("mesh")]);
        families_to_listener(chain, self.plaintext_port).rule([opening(Is::Equal), reset()])
    }

    fn mesh_chain(&self) -> Chain {
        families_to_listener(Chain::named("mesh"), self.mesh_listener)
            .rule([opening(Is::Equal), reset()])
    }

    fn leaving(&self) -> Chain {
        let any = || tcp(Is::Equal);
        let what = match self.outbound_port {
            Some(_) => self.unroutable,
            None => Unroutable::Refuse,
        };
        unroutable(leaving(), any, what)
    }

    /// What is on loopback belongs to the connection that its addresses name, the agent's end of a captured one
    /// included. Only what opens a connection has to be told where.
    fn loopback_chain(&self) -> Chain {
        let chain =
            mesh_from_loopback(Chain::named("from_loopback"), self.mesh_port, self.mesh_listener)
                .rules(carried());
        let mut chain = given_back_to_listener(chain)
            .rule([opening(Is::Not), jump(UNDECIDED)])
            .rule([opening(Is::Not), pass()])
            .rule([set_mark(MARK_UNCAPTURED), to_this_host(Is::Equal), pass()]);
        if let Some(port) = self.outbound_port {
            chain = held(chain, port, Vec::new);
        }
        chain.rule([reset()])
    }
}
