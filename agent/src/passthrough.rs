//! Connections of audited workloads that go on without the mesh: counted and recorded, never silent.

use std::net::SocketAddr;

use hauberk_core::policy::{Mode, Reason};
use hauberk_linux::socket::reset_on_close;
use hauberk_telemetry::EdgeCounters;
use tokio::net::TcpStream;

use crate::{
    context::{Context, Local},
    report::Report,
};

/// To a destination that the mesh does not know.
pub(crate) async fn outbound(
    context: &Context,
    local: &Local,
    application: TcpStream,
    wanted: SocketAddr,
    counters: EdgeCounters,
    report: &mut Report<'_>,
) {
    match local.place.dial(wanted).await {
        Ok(peer) => copy(context, local, application, peer, &counters, report).await,
        Err(error) => {
            report.closed("unreachable", Some(error.to_string()));
            drop(reset_on_close(&application));
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
    counters: EdgeCounters,
    report: &mut Report<'_>,
) {
    match local.place.dial_as_address(from, wanted).await {
        Ok(application) => copy(context, local, application, caller, &counters, report).await,
        Err(error) => {
            report.closed("unreachable", Some(error.to_string()));
            drop(reset_on_close(&caller));
        }
    }
}

async fn copy(
    context: &Context,
    local: &Local,
    mut application: TcpStream,
    mut peer: TcpStream,
    counters: &EdgeCounters,
    report: &mut Report<'_>,
) {
    report.opened();
    let ended = tokio::select! {
        () = context.cut.cancelled() => Ended::Draining,
        () = no_longer_audited(context, local) => Ended::Enforced,
        copied = tokio::io::copy_bidirectional(&mut application, &mut peer) => match copied {
            Ok((sent, received)) => {
                counters.add_sent(sent);
                counters.add_received(received);
                report.bytes(sent, received);
                report.closed("complete", None);
                return;
            }
            Err(error) => Ended::Failed(error),
        }
    };
    match ended {
        Ended::Draining => report.closed("draining", None),
        Ended::Enforced => {
            let text = "the workload is no longer only audited".to_owned();
            report.terminated(Reason::PolicyRevoked, text);
        }
        Ended::Failed(error) => report.closed("application_reset", Some(error.to_string())),
    }
    drop(reset_on_close(&application));
    drop(reset_on_close(&peer));
}

enum Ended {
    Draining,
    Enforced,
    Failed(std::io::Error),
}

/// Done when the workload is enforced, or gone.
async fn no_longer_audited(context: &Context, local: &Local) {
    let mut snapshots = context.subscribe();
    loop {
        let snapshot = snapshots.borrow_and_update().clone();
        let key = local.workload.key();
        let mut here = snapshot.on_node(&context.node);
        let audited = here.any(|w| w.key() == key && w.mode == Mode::Audit);
        if !audited || snapshots.changed().await.is_err() {
            return;
        }
    }
}
