//! What every captured place serves: the mesh, and what comes in without it.

use std::sync::Arc;

use hauberk_core::session::{ALPN, ALPN_MULTIPLEXED};
use hauberk_linux::socket::reset_on_close;
use hauberk_tls::mesh_server_config;
use rustls::ServerConfig;

use super::{
    Locals,
    listeners::{Accepting, Bound, CapturedConnection, accept},
};
use crate::{context::Context, inbound, lanes::Lane};

/// The protocols of sessions. If the caller's agent knows both, it opens many streams at a time.
const SERVED: [&[u8]; 2] = [ALPN_MULTIPLEXED, ALPN];

pub(super) fn mesh_tls(context: &Context, locals: &Locals) -> anyhow::Result<Arc<ServerConfig>> {
    let config = mesh_server_config(locals.names.clone(), context.trust.clone(), &SERVED)?;
    Ok(Arc::new(config))
}

pub(super) fn accept_mesh(
    context: &Arc<Context>,
    home: Lane,
    listener: Bound,
    locals: &Arc<Locals>,
    tls: &Arc<ServerConfig>,
) -> anyhow::Result<Accepting> {
    let (locals, tls) = (locals.clone(), tls.clone());
    accept(context, home, listener, move |context, captured| {
        let (locals, tls) = (locals.clone(), tls.clone());
        async move {
            let CapturedConnection { stream, from, wanted } = captured;
            match wanted {
                Some(_) => inbound::serve_mesh(&context, &locals, tls, stream, from).await,
                // A program of this machine, which has no business here.
                None => drop(reset_on_close(&stream)),
            }
        }
    })
}

pub(super) fn accept_plaintext(
    context: &Arc<Context>,
    home: Lane,
    listener: Bound,
    locals: &Arc<Locals>,
) -> anyhow::Result<Accepting> {
    let locals = locals.clone();
    accept(context, home, listener, move |context, captured| {
        let locals = locals.clone();
        async move { inbound::serve_plaintext(&context, &locals, captured).await }
    })
}
