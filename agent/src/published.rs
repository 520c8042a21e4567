//! Ports of this host that another program's address translation leads into a container, as Docker publishes
//! them.
//!
//! The kernel alone knows where a port leads, and may be told otherwise at any time. So each connection is dialled as the host itself
//! would dial it, and translated as its own. The container sees the host's address as its caller's, as it does with
//! Docker's proxy. What was not translated never gets to an application here that way: the capture rules refuse it, and it is
//! dialled as any other, from the caller's own address.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use hauberk_linux::{
    capture, owner,
    socket::{published_socket, reset_on_close},
};
use tokio::net::TcpStream;

use crate::context::connect;

/// How long a port that could not be reached is told of, unless it is reached before.
const TOLD: Duration = Duration::from_secs(600);

/// Between two looks that refused connections cause.
const LOOK: Duration = Duration::from_secs(1);

/// What is known of them.
#[derive(Default)]
pub(crate) struct PublishedPorts {
    /// Another program translates addresses on this host.
    is_translated: AtomicBool,
    /// When that was last asked because of a port that could not be reached.
    asked: Mutex<Option<Instant>>,
    /// Why a port could not be reached, and when that was.
    unreached: Mutex<BTreeMap<u16, (Instant, String)>>,
}

impl PublishedPorts {
    /// Asks the kernel whether another program translates addresses on this host, and gives the answer.
    pub(crate) fn look(&self) -> bool {
        let found = capture::is_translated().unwrap_or_else(|error| {
            tracing::warn!(%error, "whether ports of this host are published is not known");
            false
        });
        self.is_translated.store(found, Ordering::Relaxed);
        found
    }

    /// The same, but not for each connection to an application that is down.
    fn look_again(&self) -> bool {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.is_some_and(|asked| asked.elapsed() < LOOK) {
            return self.is_translated.load(Ordering::Relaxed);
        }
        *asked = Some(Instant::now());
        self.look()
    }

    /// Connects to a port of this host: to where it is published from, or else as `directly` does.
    ///
    /// # Errors
    /// If nobody answers at either.
    pub(crate) async fn reach(
        &self,
        destination: SocketAddr,
        directly: impl Future<Output = io::Result<TcpStream>>,
    ) -> io::Result<TcpStream> {
        let known = self.is_translated.load(Ordering::Relaxed);
        // In boxes of their own: on most hosts there is nothing to follow.
        let followed = if known { Box::pin(follow(destination)).await } else { Ok(None) };
        let reached = match followed {
            Ok(Some(stream)) => Ok(stream),
            Ok(None) => directly.await,
            Err(error) => Err(error),
        };
        match reached {
            Err(error) if is_refused(&error) && (known || self.look_again()) => {
                // Somebody may have begun to translate a moment ago.
                let followed = if known { Ok(None) } else { Box::pin(follow(destination)).await };
                let followed = followed.map_err(|error| self.note(destination, error))?;
                followed.ok_or_else(|| self.note(destination, nobody_answers(destination, &error)))
            }
            Err(error) if known => Err(self.note(destination, error)),
            Ok(stream) if known => {
                self.lock().remove(&destination.port());
                Ok(stream)
            }
            reached => reached,
        }
    }

    /// Why these ports could not be reached lately; empty if they could.
    pub(crate) fn unreached(&self, ports: impl IntoIterator<Item = u16>) -> String {
        let mut unreached = self.lock();
        unreached.retain(|_, (since, _)| since.elapsed() < TOLD);
        let texts = ports.into_iter().filter_map(|port| Some(unreached.get(&port)?.1.clone()));
        texts.collect::<Vec<_>>().join("; ")
    }

    fn note(&self, destination: SocketAddr, error: io::Error) -> io::Error {
        self.lock().insert(destination.port(), (Instant::now(), error.to_string()));
        error
    }

    /// Plain data: a panic elsewhere leaves nothing half-changed in it.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u16, (Instant, String)>> {
        self.unreached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Connects to where the destination is published from; nothing if it is not.
async fn follow(destination: SocketAddr) -> io::Result<Option<TcpStream>> {
    match connect(published_socket(destination)?, destination).await {
        // An application here would take the host for its caller. The rules that prevent it may be missing at this
        // moment.
        Ok(stream) if owner::has_tcp_socket(destination, stream.local_addr()?)? => {
            drop(reset_on_close(&stream));
            Ok(None)
        }
        Ok(stream) => Ok(Some(stream)),
        Err(error) if is_refused(&error) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::TimedOut => Err(leads_away(destination)),
        Err(error) => Err(error),
    }
}

fn is_refused(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::ConnectionRefused
}

fn nobody_answers(destination: SocketAddr, error: &io::Error) -> io::Error {
    let text = format!(
        "{error}: nothing answers at {destination}; if address translation publishes it from elsewhere, its rules \
         have to be for what this machine sends (OUTPUT), too, and not only for what comes in (PREROUTING)"
    );
    io::Error::new(error.kind(), text)
}

fn leads_away(destination: SocketAddr) -> io::Error {
    let text = format!(
        "address translation leads {destination} to where nothing answers, or off this machine, where the connection \
         would be in clear; let it lead to a container of this machine"
    );
    io::Error::new(io::ErrorKind::TimedOut, text)
}
