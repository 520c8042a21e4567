//! Connections of captured workloads that the agent does not carry: ended, or let through and recorded.

use std::{net::SocketAddr, sync::Arc};

use hauberk_core::policy::{Mode, ProcessSelector, Reason};
use hauberk_linux::sockets::{TcpSocket, destroy, tcp_sockets};
use hauberk_telemetry::Side;

use super::{Locals, guard::Site};
use crate::{
    authorize::without_policy,
    context::{Context, Local, connection_id},
    report::Report,
};

/// It was opened while the capture rules were missing, and has been ended.
pub(super) fn cut(context: &Context, locals: &Locals, socket: &TcpSocket) {
    let served =
        locals.all().into_iter().find(|local| local.workload.ports.contains(&socket.local.port()));
    let (side, from, wanted, local) = match served {
        Some(local) => (Side::Destination, socket.remote, socket.local, Some(local)),
        None => (Side::Source, socket.local, socket.remote, of_user(locals, socket.user)),
    };
    let fix = "find out who altered the capture rules (nftables, ip rule, ip route) of this place; the agent's log \
               has the time";
    record(
        context,
        side,
        from,
        wanted,
        local.as_deref(),
        fix,
        "opened while the capture rules were missing, and cut",
    );
}

/// It cannot be led to the agent, since its socket is bound to an interface.
pub(super) fn unroutable(
    context: &Context,
    locals: &Locals,
    site: &Site,
    local: SocketAddr,
    remote: SocketAddr,
) {
    // The kernel has it as an attempt that nobody answers.
    let found = site.call(move || {
        let all = tcp_sockets()?;
        Ok(all.into_iter().find(|socket| (socket.local, socket.remote) == (local, remote)))
    });
    let socket = found.unwrap_or_default();
    let workload = match &socket {
        Some(socket) => of_user(locals, socket.user),
        None => only(locals),
    };
    let audited = workload.as_ref().is_some_and(|local| local.workload.mode == Mode::Audit);
    let fix = "the socket is bound to an interface (SO_BINDTODEVICE), where the agent cannot take it up: let the \
               program connect without that";
    if !audited && let Some(socket) = socket {
        // Or it would try for minutes.
        if let Err(error) = site.call(move || destroy(&socket)) {
            tracing::debug!(error = format!("{error:#}"), "the attempt goes on");
        }
    }
    let detail = if audited {
        "bound to an interface, let through in clear"
    } else {
        "bound to an interface"
    };
    record(context, Side::Source, local, remote, workload.as_deref(), fix, detail);
}

fn record(
    context: &Context,
    side: Side,
    from: SocketAddr,
    wanted: SocketAddr,
    local: Option<&Local>,
    fix: &str,
    detail: &str,
) {
    let mut report = Report::new(context, side, connection_id(), Some(from), Some(wanted));
    if let Some(local) = local {
        match side {
            Side::Source => report.source(&local.workload.identity, Some(&local.workload)),
            Side::Destination => {
                report.destination(&local.workload.identity, Some(&local.workload))
            }
        }
    }
    report.denied(&without_policy(Reason::Uncaptured, fix), Some(detail.to_owned()));
}

/// The workload of a namespace, or the one that is this user.
fn of_user(locals: &Locals, user: u32) -> Option<Arc<Local>> {
    only(locals).or_else(|| {
        locals.all().into_iter().find(|local| match &local.workload.process {
            ProcessSelector::User(name) => super::host::user_id(name).is_ok_and(|id| id == user),
            ProcessSelector::Cgroup(_)
            | ProcessSelector::NetworkNamespace { .. }
            | ProcessSelector::Pod { .. } => false,
        })
    })
}

fn only(locals: &Locals) -> Option<Arc<Local>> {
    let mut all = locals.all().into_iter();
    let first = all.next()?;
    let alone = all.next().is_none();
    match &first.workload.process {
        ProcessSelector::NetworkNamespace { .. } | ProcessSelector::Pod { .. } if alone => {
            Some(first)
        }
        ProcessSelector::NetworkNamespace { .. }
        | ProcessSelector::Pod { .. }
        | ProcessSelector::User(_)
        | ProcessSelector::Cgroup(_) => None,
    }
}
