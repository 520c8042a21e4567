//! Accept loops: a place for each connection, a task for each, and patience when the system has no
//! more descriptors.

use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use hauberk_linux::socket::{ListenOptions, listen};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinHandle,
};

use crate::context::Context;

/// The pause after a failed accept, so that being out of descriptors does not spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// Connections of one listener at once; over it the kernel's queue holds them back. Each listener has
/// its own, so that a flood of incoming ones leaves the outgoing ones alone.
const MAX_CONNECTIONS: usize = 32_768;

/// A listener's task; ends with its owner.
pub(super) struct Accepting(JoinHandle<()>);

impl Drop for Accepting {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Binds in the calling thread's network namespace.
pub(super) fn bind(address: SocketAddr) -> anyhow::Result<std::net::TcpListener> {
    listen(address, ListenOptions::default()).with_context(|| format!("listen on {address}"))
}

/// Serves every connection of a listener in a task of its own.
pub(super) fn accept<F>(
    context: &Arc<Context>,
    listener: std::net::TcpListener,
    serve: impl Fn(Arc<Context>, TcpStream, SocketAddr) -> F + Send + 'static,
) -> anyhow::Result<Accepting>
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::from_std(listener).context("register a listener")?;
    let context = context.clone();
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    Ok(Accepting(tokio::spawn(async move {
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            let accepted = tokio::select! {
                () = context.stopping.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, from)) => {
                    // In a box of its own: a future that is moved into a task is in it twice.
                    let served = Box::pin(serve(context.clone(), stream, from));
                    let open = context.opened();
                    tokio::spawn(async move {
                        served.await;
                        drop((open, place));
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection failed");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    })))
}
