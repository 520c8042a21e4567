//! Who is calling: the node behind a connection, by its certificate and by what the registry still
//! says of that certificate.

use std::{net::SocketAddr, time::Duration};

use hauberk_core::{
    admission::AttestedNode,
    clock::NOT_BEFORE_BACKDATE,
    identity::IdentityKind,
    svid::{LeafFacts, VerifiedSvid},
    time::Timestamp,
};
use hauberk_tls::LapsedSvid;
use tonic::{Extensions, Status};

use crate::{
    api::Shared,
    store::{SerialCheck, Shown},
};

/// What the TLS layer proves of a connection; travels with each of its calls.
#[derive(Debug, Clone)]
pub(crate) struct Connection {
    pub(crate) peer: Peer,
    pub(crate) address: SocketAddr,
}

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
pub(crate) enum Peer {
    /// It has shown no certificate, or none that is good.
    Nobody,
    /// By its certificate, which was valid when the connection was made.
    Proven(VerifiedSvid),
    /// By a certificate that has expired, which may be good for a renewal.
    Lapsed(LapsedSvid),
}

/// The node that makes a call.
pub(crate) struct Caller {
    pub(crate) node: AttestedNode,
    pub(crate) svid: VerifiedSvid,
}

/// A node that asks for its next certificate.
pub(crate) struct Renewing {
    pub(crate) name: String,
    /// When its certificate expired, if it has.
    pub(crate) lapsed: Option<Timestamp>,
}

/// Demands a node certificate that is valid now, not only when the connection was made, and that has
/// not been superseded.
pub(crate) fn node(extensions: &Extensions, shared: &Shared) -> Result<Caller, Status> {
    let connection = connection(extensions)?;
    let svid = match &connection.peer {
        Peer::Proven(svid) => svid.clone(),
        Peer::Nobody => {
            return Err(Status::unauthenticated("this call needs a node certificate; join first"));
        }
        Peer::Lapsed(lapsed) => {
            return Err(Status::unauthenticated(format!(
                "the certificate of this connection expired at {}, and is good for its renewal at most",
                lapsed.facts().not_after()
            )));
        }
    };
    let now = hauberk_tls::now();
    if now >= svid.facts().not_after() {
        return Err(Status::unauthenticated(
            "the node certificate of this connection has expired; connect anew",
        ));
    }
    let name = name_of(svid.facts())?;
    // A node of the cluster is attested by its agent's pod, again and again, by whichever replica: there
    // is no one certificate that is its only one. It is one for as long as its agent's pod is there.
    if let Some(kubernetes) = shared.kubernetes.as_ref().filter(|it| it.cluster.has_node(&name)) {
        if !kubernetes.has_agent(&name) {
            tracing::warn!(target: "hauberk.audit", node = %name, addr = %connection.address,
                "a certificate of a node was used that has no agent");
            return Err(Status::permission_denied(format!(
                "no agent of this mesh runs on node {name}: its certificate is good for nothing"
            )));
        }
        let node = AttestedNode::from_identity(svid.id().clone())
            .map_err(|error| Status::permission_denied(error.to_string()))?;
        return Ok(Caller { node, svid });
    }
    let (grace, serial) = (shared.clone_grace(), svid.facts().serial().to_string());
    let check = shared
        .store
        .check_serial(&name, shown(&serial, svid.facts()), now.unix_millis(), grace)
        .map_err(internal)?;
    demand_good(check, &name, &serial, connection, shared)?;
    let node = AttestedNode::from_identity(svid.id().clone())
        .map_err(|error| Status::permission_denied(error.to_string()))?;
    Ok(Caller { node, svid })
}

/// As [`node`], and takes a certificate as well that has expired: no longer ago than the grace, not superseded, and
/// of a machine that is still declared.
pub(crate) fn renewing(extensions: &Extensions, shared: &Shared) -> Result<Renewing, Status> {
    let connection = connection(extensions)?;
    let Peer::Lapsed(lapsed) = &connection.peer else {
        let name = node(extensions, shared)?.node.name().to_owned();
        return Ok(Renewing { name, lapsed: None });
    };
    let (facts, now) = (lapsed.facts(), hauberk_tls::now());
    let (name, serial) = (name_of(facts)?, facts.serial().to_string());
    let refused = |why: &'static str, status: Status| {
        tracing::warn!(target: "hauberk.audit", node = %name, serial, addr = %connection.address,
            expired = %facts.not_after(), "the renewal of an expired node certificate was refused: {why}");
        status
    };
    if now.since(facts.not_after()) > shared.renewal_grace {
        let status = Status::unauthenticated(format!(
            "the certificate of node {name} expired at {}, and it is {now}, which is more than the \
             --node-renewal-grace of {} s later; join anew with a new token",
            facts.not_after(),
            shared.renewal_grace.as_secs()
        ));
        return Err(refused("it expired too long ago", status));
    }
    if !shared.publisher.current().machines.contains(&name) {
        let status = Status::permission_denied(format!(
            "no Machine {name:?} is declared any more, so that its expired certificate is not renewed; \
             declare it, or take the agent off that machine"
        ));
        return Err(refused("its machine is not declared", status));
    }
    let check = shared
        .store
        .check_lapsed(&name, shown(&serial, facts), now.unix_millis())
        .map_err(internal)?;
    demand_good(check, &name, &serial, connection, shared)?;
    Ok(Renewing { name, lapsed: Some(facts.not_after()) })
}

fn connection(extensions: &Extensions) -> Result<&Connection, Status> {
    extensions
        .get::<Connection>()
        .ok_or_else(|| Status::unauthenticated("the call came over no known connection"))
}

fn name_of(facts: &LeafFacts) -> Result<String, Status> {
    match facts.id().kind() {
        IdentityKind::Node { name } => Ok(name.to_owned()),
        IdentityKind::ControlPlane
        | IdentityKind::Workload { .. }
        | IdentityKind::Machine { .. }
        | IdentityKind::Other => Err(Status::permission_denied(format!(
            "{} is not a node; only agents may call this",
            facts.id()
        ))),
    }
}

fn shown<'a>(serial: &'a str, facts: &LeafFacts) -> Shown<'a> {
    // Whole seconds are in the certificate: rounded up, so that the one of a join is not older than that.
    let issued = facts.not_before().saturating_add(NOT_BEFORE_BACKDATE + Duration::from_secs(1));
    Shown { serial, issued_unix_ms: issued.unix_millis() }
}

/// Refuses a certificate that is not its node's only one, and tells auditors.
fn demand_good(
    check: SerialCheck,
    name: &str,
    serial: &str,
    connection: &Connection,
    shared: &Shared,
) -> Result<(), Status> {
    match check {
        SerialCheck::Good => Ok(()),
        SerialCheck::Cloned => {
            shared.fleet.cut(name);
            shared.metrics.node_locked();
            tracing::error!(target: "hauberk.audit", node = %name, serial, addr = %connection.address,
                "a node was locked: a certificate of it was used after its renewal, so two hold its \
                 credential");
            Err(locked(name, "two hold its credential"))
        }
        SerialCheck::Locked(reason) => {
            tracing::warn!(target: "hauberk.audit", node = %name, serial, addr = %connection.address,
                "a call of a locked node was refused");
            Err(locked(name, &reason))
        }
        SerialCheck::Superseded => {
            tracing::warn!(target: "hauberk.audit", node = %name, serial, addr = %connection.address,
                "a superseded node certificate was used: the node's credential may have been copied");
            Err(Status::permission_denied(format!(
                "the certificate {serial} of node {name} has been superseded; if this is the real \
                 node, its credential was copied or restored: join anew with a new token"
            )))
        }
        SerialCheck::UnknownNode => Err(Status::permission_denied(format!(
            "node {name} is not in the registry of this control plane; join anew"
        ))),
    }
}

fn locked(node: &str, reason: &str) -> Status {
    Status::permission_denied(format!(
        "node {node} is locked: {reason}; find out who, then join it anew with a new token"
    ))
}

/// Our own trouble: told in the log whole, and to the caller in one sentence.
pub(crate) fn internal(error: impl std::error::Error + 'static) -> Status {
    tracing::error!(error = %crate::policy::chain(&error), "a call failed");
    Status::unavailable("the control plane could not use its store; its log has the cause")
}
