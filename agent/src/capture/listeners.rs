//! Accept loops: a place for each connection, a task for each, and patience when the system has no
//! more descriptors.

use std::{
    future::Future,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use hauberk_linux::socket::{ListenOptions, listen};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinHandle,
};

use crate::{
    context::Context,
    handover::{Inherited, Seat},
};

/// The pause after a failed accept, so that being out of descriptors does not spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// Connections of one listener at once; over it the kernel's queue holds them back. Each listener has
/// its own, so that a flood of incoming ones leaves the outgoing ones alone.
const MAX_CONNECTIONS: usize = 32_768;

/// A listener and its task, which ends with its owner.
pub(super) struct Accepting {
    seat: Seat,
    listener: Arc<TcpListener>,
    task: JoinHandle<()>,
}

impl Accepting {
    /// The listener for another process.
    pub(super) fn share(&self) -> std::io::Result<(Seat, OwnedFd)> {
        Ok((self.seat.clone(), self.listener.as_fd().try_clone_to_owned()?))
    }
}

impl Drop for Accepting {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A listener that nobody accepts from yet.
pub(super) struct Bound {
    pub(super) seat: Seat,
    pub(super) listener: std::net::TcpListener,
}

/// The listener that was handed over for this seat, or a new one in the calling thread's network namespace.
pub(super) fn bind(inherited: &Inherited, seat: Seat) -> anyhow::Result<Bound> {
    let listener = match inherited.claim(&seat) {
        Some(listener) => listener,
        None => listen(seat.address, ListenOptions::default())
            .with_context(|| format!("listen on {}", seat.address))?,
    };
    Ok(Bound { seat, listener })
}

/// Serves every connection of a listener in a task of its own.
pub(super) fn accept<F>(
    context: &Arc<Context>,
    bound: Bound,
    serve: impl Fn(Arc<Context>, TcpStream, SocketAddr) -> F + Send + 'static,
) -> anyhow::Result<Accepting>
where
    F: Future<Output = ()> + Send + 'static,
{
    let Bound { seat, listener } = bound;
    let listener = Arc::new(TcpListener::from_std(listener).context("register a listener")?);
    let (context, accepting) = (context.clone(), listener.clone());
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let task = tokio::spawn(async move {
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            let accepted = tokio::select! {
                () = context.stopping.cancelled() => return,
                accepted = accepting.accept() => accepted,
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
    });
    Ok(Accepting { seat, listener, task })
}
