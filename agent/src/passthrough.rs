//! Connections that go on without the mesh, of audited workloads and of kubelets that probe: counted and
//! recorded, never silent.

use std::net::SocketAddr;

use hauberk_core::policy::Reason;
use hauberk_linux::socket::{keep_alive, reset_on_close};
use hauberk_telemetry::record::Path;
use tokio::net::TcpStream;

use crate::{
    authorize::Pass,
    capture::Waiting,
    context::{Context, Local},
    copy::{Broken, Joined},
    report::Report,
};

/// `to` a destination that the mesh does not know, or cannot reach. Dropping the application's connection refuses it.
pub(crate) async fn outbound(
    context: &Context,
    local: &Local,
    application: Box<Waiting>,
    to: SocketAddr,
    pass: Pass,
    report: &mut Report<'_>,
) {
    let counters = report.passed(&pass);
    let peer = match local.place.dial(to).await {
        Ok(peer) => peer,
        Err(error) => {
            report.closed("unreachable", Some(error.to_string()));
            return;
        }
    };
    match application.connect().await {
        Ok(application) => {
            let joined = Joined::new(application, peer, Some(counters), None);
            copy(context, local, &pass, joined, true, report).await;
        }
        Err(error) => {
            report.closed("application_reset", Some(error.to_string()));
            drop(reset_on_close(&peer));
        }
    }
}

/// From a caller without the mesh, to the local application, which sees the caller's address.
pub(crate) async fn inbound(
    context: &Context,
    local: &Local,
    caller: TcpStream,
    from: SocketAddr,
    wanted: SocketAddr,
    pass: Pass,
    report: &mut Report<'_>,
) {
    let counters = report.passed(&pass);
    match local.place.dial_as_address(from, wanted).await {
        Ok(application) => {
            // It may be gone already.
            drop(keep_alive(&application));
            let joined = Joined::new(caller, application, None, Some(counters));
            copy(context, local, &pass, joined, false, report).await;
        }
        Err(error) => {
            report.closed("unreachable", Some(error.to_string()));
            drop(reset_on_close(&caller));
        }
    }
}

async fn copy(
    context: &Context,
    local: &Local,
    pass: &Pass,
    mut joined: Joined,
    local_is_caller: bool,
    report: &mut Report<'_>,
) {
    report.opened(Path::Clear);
    let ended = tokio::select! {
        // What may no longer pass does not, however long it waited for its application or its destination.
        biased;
        () = context.cut.cancelled() => Ended::Draining,
        () = no_longer(context, local, pass) => Ended::Enforced,
        copied = joined.run() => match copied {
            Ok(()) => Ended::Complete,
            Err(broken) => Ended::Broken(broken),
        },
    };
    let (there, back) = joined.bytes();
    let (sent, received) = if local_is_caller { (there, back) } else { (back, there) };
    report.bytes(sent, received);
    match ended {
        Ended::Complete => report.closed("complete", None),
        Ended::Draining => report.closed("draining", None),
        Ended::Enforced => {
            let text = "it may no longer pass without the mesh".to_owned();
            report.terminated(Reason::PolicyRevoked, text);
        }
        Ended::Broken(Broken { caller, error }) if caller == local_is_caller => {
            report.closed("application_reset", Some(error.to_string()));
        }
        Ended::Broken(Broken { error, .. }) => {
            report.closed("peer_application_reset", Some(error.to_string()));
        }
    }
}

enum Ended {
    Complete,
    Draining,
    Enforced,
    Broken(Broken),
}

/// Done when the pass is not good any more, or the workload gone.
async fn no_longer(context: &Context, local: &Local, pass: &Pass) {
    let mut snapshots = context.subscribe();
    loop {
        let snapshot = snapshots.borrow_and_update().clone();
        let mut here = snapshot.on_node(&context.node);
        let holds = here.any(|workload| {
            workload.identity == local.workload.identity
                && workload.process.is_same_as(&local.workload.process)
                && pass.holds(workload)
        });
        let holds = holds || snapshot.has_let_go(&context.node, &local.workload);
        if !holds || snapshots.changed().await.is_err() {
            return;
        }
    }
}
