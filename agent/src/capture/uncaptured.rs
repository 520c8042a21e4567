//! Connections of captured workloads that the agent does not carry: ended, or let through and recorded.

use std::{collections::HashSet, net::SocketAddr, sync::Arc};

use hauberk_core::policy::{Mode, ProcessSelector, Reason};
use hauberk_linux::{
    capture::OpenOlder,
    sockets::{TcpSocket, destroy, tcp_sockets},
};
use hauberk_telemetry::Side;

use super::{Locals, guard::Site, host::host_process};
use crate::{
    authorize::{self, without_policy},
    context::{Context, Local, connection_id},
    report::Report,
};

/// One that is older than the capture rules was closed.
pub(super) fn older(context: &Context, local: &Local, one: &OpenOlder) {
    let (side, from, wanted) = if one.incoming {
        (Side::Destination, one.socket.remote, one.socket.local)
    } else {
        (Side::Source, one.socket.local, one.socket.remote)
    };
    let fix = "nothing, if its application connects anew: that goes through the mesh; an agent's \
               --older-connections says when such connections are closed";
    let detail = "older than the capture, and closed since its workload is enforced";
    record(context, side, from, wanted, Some(local), fix, detail);
}

/// Whose socket this is. What a host accepted on a port that nobody declared is nobody's: it is no business of the mesh.
pub(super) fn owner(locals: &Locals, socket: &TcpSocket, incoming: bool) -> Option<Arc<Local>> {
    let serves = |local: &Arc<Local>| local.workload.ports.contains(&socket.local.port());
    match only(locals) {
        Some(local) => Some(local),
        None if incoming => locals.all().into_iter().find(serves),
        None => of_process(locals, socket),
    }
}

/// It was opened while the capture rules were missing, and has been ended, under Audit let through.
pub(super) fn missed(context: &Context, locals: &Locals, socket: &TcpSocket) {
    let served =
        locals.all().into_iter().find(|local| local.workload.ports.contains(&socket.local.port()));
    let (side, from, wanted, local) = match served {
        Some(local) => (Side::Destination, socket.remote, socket.local, Some(local)),
        None => (Side::Source, socket.local, socket.remote, of_process(locals, socket)),
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
        "opened while the capture rules were missing",
    );
}

/// These cannot be led to the agent, since their sockets are bound to an interface.
pub(super) fn unroutable(
    context: &Context,
    locals: &Locals,
    site: &Site,
    connections: &HashSet<(SocketAddr, SocketAddr)>,
) {
    // The kernel has them as attempts that nobody answers.
    let all = site.call(tcp_sockets).unwrap_or_else(|error| {
        tracing::debug!(error = format!("{error:#}"), "whose connections they are is not known");
        Vec::new()
    });
    for (local, remote) in connections {
        let socket = all.iter().find(|socket| (socket.local, socket.remote) == (*local, *remote));
        let workload = match socket {
            Some(socket) => of_process(locals, socket),
            None => only(locals),
        };
        let mode = workload.as_ref().map(|local| local.workload.mode);
        if mode == Some(Mode::Enforce)
            && let Some(socket) = socket.cloned()
            // Or it would try for minutes.
            && let Err(error) = site.call(move || destroy(&socket))
        {
            tracing::debug!(error = format!("{error:#}"), "the attempt goes on");
        }
        let fix = "the socket is bound to an interface (SO_BINDTODEVICE), where the agent cannot take it up: let \
                   the program connect without that";
        let detail = "bound to an interface";
        record(context, Side::Source, *local, *remote, workload.as_deref(), fix, detail);
    }
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
    let denial = without_policy(Reason::Uncaptured, fix);
    let passed = match local {
        Some(local) => authorize::pass_audited(&context.snapshot(), &local.workload, denial),
        None => Err(denial),
    };
    match passed {
        Ok(pass) => {
            let _counters = report.passed(&pass);
            report.closed("uncaptured", Some(format!("{detail}, let through in clear")));
        }
        Err(denial) => report.denied(&denial, Some(detail.to_owned())),
    }
}

/// The workload of a namespace, or the one whose process made this socket.
fn of_process(locals: &Locals, socket: &TcpSocket) -> Option<Arc<Local>> {
    only(locals).or_else(|| {
        let mut all = locals.all();
        // Of several it is the same one each time.
        all.sort_by_key(|local| local.workload.key());
        all.into_iter().find(|local| {
            // One that cannot be looked up is nobody's.
            host_process(&local.workload.process)
                .is_ok_and(|process| process.made(socket).unwrap_or(false))
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
