//! The rules inside a workload's network namespace: all its TCP goes through the agent.

use super::{
    expression::{
        Is, destination_port, from_loopback, opening, pass, redirect_to, redirected, reset, tcp,
        to_loopback,
    },
    our_own,
    ruleset::{Chain, Hook, Ruleset},
    transparent,
};
use crate::error::{Error, Result};

/// Capture of one network namespace.
///
/// - TCP that leaves the namespace goes to `outbound_port`; `SO_ORIGINAL_DST` there tells where
///   it was going. Loopback, which includes the namespace's own addresses, is left alone.
/// - TCP that comes in goes to `plaintext_port`, but for `mesh_port`, which is reached directly.
///   That holds for the agent's other ports as well: dialled from outside, they show up at
///   `plaintext_port` as their own original destination.
/// - UDP, ICMP and connections opened before the rules are left alone. So is an opening packet
///   that was already past the rules' place when they came, waiting for an answer to ARP, say:
///   the rules belong in place before the workload's first packet.
///
/// Where nobody listens on those ports, connections are refused: the rules stay when the agent
/// dies. A process with `CAP_NET_ADMIN` in the namespace can mark its packets and pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamespaceRules {
    /// The agent's port for what the workload sends.
    pub outbound_port: u16,
    /// The agent's port for what comes in without the mesh.
    pub plaintext_port: u16,
    /// The agent's port for other agents.
    pub mesh_port: u16,
}

impl NamespaceRules {
    /// The rules as a description; nothing is changed. Refuses ports that coincide or are zero.
    pub fn ruleset(&self) -> Result<Ruleset> {
        self.check()?;
        Ok(Ruleset {
            chains: vec![
                self.output(),
                self.prerouting(),
                transparent::chain(),
                guard_output(),
                self.guard_input(),
            ],
        })
    }

    /// Installs the rules in the calling thread's namespace, in place of any earlier ones.
    pub fn install(&self) -> Result<()> {
        self.ruleset()?.install()
    }

    fn check(&self) -> Result<()> {
        let ports = [self.outbound_port, self.plaintext_port, self.mesh_port];
        let distinct = ports[0] != ports[1] && ports[1] != ports[2] && ports[0] != ports[2];
        if distinct && !ports.contains(&0) {
            return Ok(());
        }
        Err(Error::InvalidRules {
            reason: format!("the ports must differ and not be zero: {self:?}"),
        })
    }

    fn output(&self) -> Chain {
        Chain::at("output", Hook::NAT_OUTPUT)
            .rule([tcp(Is::Not), pass()])
            .rules(our_own())
            .rule([to_loopback(Is::Equal), pass()])
            .rule([opening(), redirect_to(self.outbound_port)])
    }

    fn prerouting(&self) -> Chain {
        Chain::at("prerouting", Hook::NAT_PREROUTING)
            .rule([tcp(Is::Not), pass()])
            .rule([from_loopback(Is::Equal), pass()])
            .rule([destination_port(self.mesh_port), pass()])
            .rule([opening(), redirect_to(self.plaintext_port)])
    }

    /// Redirection sees what conntrack takes for the first packet of a connection. An attempt
    /// that began before the rules, or that conntrack holds invalid, would be sent on as it is.
    fn guard_input(&self) -> Chain {
        Chain::at("guard_input", Hook::FILTER_INPUT)
            .rule([tcp(Is::Not), pass()])
            .rule([from_loopback(Is::Equal), pass()])
            .rule([destination_port(self.mesh_port), pass()])
            .rule([destination_port(self.plaintext_port), pass()])
            .rule([opening(), reset()])
    }
}

/// As [`NamespaceRules::guard_input`], for the way out.
fn guard_output() -> Chain {
    Chain::at("guard_output", Hook::FILTER_OUTPUT)
        .rule([tcp(Is::Not), pass()])
        .rules(our_own())
        .rule([to_loopback(Is::Equal), pass()])
        .rule([redirected(), pass()])
        .rule([opening(), reset()])
}
