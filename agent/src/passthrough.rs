//! Connections of audited workloads that go on without the mesh: counted and recorded, never silent.

use std::net::SocketAddr;

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
        Ok(peer) => copy(context, application, peer, &counters, report).await,
        Err(error) => {
            report.closed("unreachable", Some(error.to_string()));
            drop(hauberk_linux::socket::reset_on_close(&application));
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
        Ok(application) => copy(context, application, caller, &counters, report).await,
        Err(error) => {
            report.closed("unreachable", Some(error.to_string()));
            drop(hauberk_linux::socket::reset_on_close(&caller));
        }
    }
}

async fn copy(
    context: &Context,
    mut application: TcpStream,
    mut peer: TcpStream,
    counters: &EdgeCounters,
    report: &mut Report<'_>,
) {
    report.opened();
    tokio::select! {
        () = context.cut.cancelled() => report.closed("draining", None),
        copied = tokio::io::copy_bidirectional(&mut application, &mut peer) => match copied {
            Ok((sent, received)) => {
                counters.add_sent(sent);
                counters.add_received(received);
                report.bytes(sent, received);
                report.closed("complete", None);
            }
            Err(error) => {
                report.closed("application_reset", Some(error.to_string()));
                drop(hauberk_linux::socket::reset_on_close(&application));
                drop(hauberk_linux::socket::reset_on_close(&peer));
            }
        }
    }
}
