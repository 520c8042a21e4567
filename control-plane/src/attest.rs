//! Who is calling: the node behind a connection, by its certificate and by what the registry still
//! says of that certificate.

use std::{net::SocketAddr, time::Duration};

use hauberk_core::{
    admission::AttestedNode, clock::NOT_BEFORE_BACKDATE, identity::IdentityKind, svid::VerifiedSvid,
};
use tonic::{Extensions, Status};

use crate::{
    api::Shared,
    store::{SerialCheck, Shown},
};

/// What the TLS layer proves of a connection; travels with each of its calls.
#[derive(Debug, Clone)]
pub(crate) struct Connection {
    pub(crate) peer: Option<VerifiedSvid>,
    pub(crate) address: SocketAddr,
}

/// The node that makes a call.
pub(crate) struct Caller {
    pub(crate) node: AttestedNode,
    pub(crate) svid: VerifiedSvid,
}

/// Demands a node certificate that is valid now, not only when the connection was made, and that has
/// not been superseded.
pub(crate) fn node(extensions: &Extensions, shared: &Shared) -> Result<Caller, Status> {
    let connection = extensions
        .get::<Connection>()
        .ok_or_else(|| Status::unauthenticated("the call came over no known connection"))?;
    let svid = connection
        .peer
        .clone()
        .ok_or_else(|| Status::unauthenticated("this call needs a node certificate; join first"))?;
    if hauberk_tls::now() >= svid.facts().not_after() {
        return Err(Status::unauthenticated(
            "the node certificate of this connection has expired; connect anew",
        ));
    }
    let IdentityKind::Node { name } = svid.id().kind() else {
        return Err(Status::permission_denied(format!(
            "{} is not a node; only agents may call this",
            svid.id()
        )));
    };
    let name = name.to_owned();
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
    let serial = svid.facts().serial().to_string();
    let now = hauberk_tls::now();
    let grace = shared.clone_grace();
    // Whole seconds are in the certificate: rounded up, so that the one of a join is not older than that.
    let issued =
        svid.facts().not_before().saturating_add(NOT_BEFORE_BACKDATE + Duration::from_secs(1));
    let shown = Shown { serial: &serial, issued_unix_ms: issued.unix_millis() };
    match shared.store.check_serial(&name, shown, now.unix_millis(), grace).map_err(internal)? {
        SerialCheck::Good => {}
        SerialCheck::Cloned => {
            shared.fleet.cut(&name);
            shared.metrics.node_locked();
            tracing::error!(target: "hauberk.audit", node = %name, serial, addr = %connection.address,
                "a node was locked: a certificate of it was used after its renewal, so two hold its \
                 credential");
            return Err(locked(&name, "two hold its credential"));
        }
        SerialCheck::Locked(reason) => {
            tracing::warn!(target: "hauberk.audit", node = %name, serial, addr = %connection.address,
                "a call of a locked node was refused");
            return Err(locked(&name, &reason));
        }
        SerialCheck::Superseded => {
            tracing::warn!(target: "hauberk.audit", node = %name, serial, addr = %connection.address,
                "a superseded node certificate was used: the node's credential may have been copied");
            return Err(Status::permission_denied(format!(
                "the certificate {serial} of node {name} has been superseded; if this is the real \
                 node, its credential was copied or restored: join anew with a new token"
            )));
        }
        SerialCheck::UnknownNode => {
            return Err(Status::permission_denied(format!(
                "node {name} is not in the registry of this control plane; join anew"
            )));
        }
    }
    let node = AttestedNode::from_identity(svid.id().clone())
        .map_err(|error| Status::permission_denied(error.to_string()))?;
    Ok(Caller { node, svid })
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
