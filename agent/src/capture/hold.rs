//! Connections of local applications, each held until somebody has decided about it and has reached where it goes.
//!
//! The kernel gives the agent the first packet of each and tells the application nothing
//! ([`hauberk_linux::capture::Hold`]): its `connect` waits. [`Waiting::connect`] lets it succeed, and whoever drops a
//! [`Waiting`] refuses it. So `connect` tells an application the truth, and a client that waits for one connection before
//! it opens the next has them accepted in that order (ADR 16).
//!
//! `hold/table.rs` knows what is held; the sockets are here.

mod table;

use std::{
    future::Future,
    io,
    net::SocketAddr,
    os::{fd::OwnedFd, unix::net::UnixDatagram as StdDatagram},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use hauberk_linux::{
    capture::{self, Opening},
    owner::{self, Wish},
};
use tokio::{
    io::Interest,
    net::{TcpListener, TcpStream, UnixDatagram},
    sync::{
        OwnedSemaphorePermit, Semaphore,
        oneshot::{self, error::TryRecvError},
    },
};
use tokio_util::task::AbortOnDropHandle;

use self::table::{Ends, Table, Todo};
use super::listeners::{ACCEPT_RETRY, MAX_CONNECTIONS, OutboundSockets, Pair, share};
use crate::{
    context::{Context, Place, canonical},
    handover::Seat,
    lanes::{Lane, bring_here},
};

/// How long an application's kernel may take to answer, if it still has the attempt. It answers at once unless it is out
/// of room; then it asks again after 1 s, and 2 s later.
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);

/// How long a connection that has arrived may wait to be accepted.
const ACCEPT_PATIENCE: Duration = Duration::from_secs(2);

/// Turns of everything that is ready, which are waited for before a timer is set.
const TURNS: usize = 2;

/// How long it is waited until it is asked whether the application is still there, doubled each time.
const FIRST_LOOK: Duration = Duration::from_millis(20);

/// What one workload sends: nothing is taken any more once this is dropped. What was taken before goes on.
pub(super) struct Outbound {
    /// The port that the rules name.
    pub(super) port: u16,
    listeners: Vec<(Seat, Arc<TcpListener>)>,
    seat: Seat,
    held: Arc<Held>,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

/// The held connections of one workload, and the listeners at which they arrive when they are let go.
struct Held {
    kernel: capture::Hold,
    place: Place,
    /// Where they arrive.
    home: Lane,
    table: Mutex<Table<oneshot::Sender<TcpStream>>>,
    /// Take what was let go, for as long as anything is held.
    _arrivals: Vec<AbortOnDropHandle<()>>,
}

/// A connection that an application wants. It is refused when this is dropped.
pub(crate) struct Waiting {
    held: Arc<Held>,
    ends: Ends,
    /// It has arrived: what is known of its ends by now is of another.
    arrived: bool,
}

impl Outbound {
    /// Serves each connection of the workload in a task of its own; they are taken at `home`. `dialled` gets what was dialled to the agent's own
    /// port, which no capture rule led there.
    ///
    /// # Errors
    /// If the runtime does not take the sockets.
    pub(super) fn start<S, D>(
        context: &Arc<Context>,
        home: Lane,
        place: Place,
        sockets: OutboundSockets,
        serve: impl Fn(Arc<Context>, Box<Waiting>) -> Option<S> + Send + 'static,
        dialled: impl Fn(Arc<Context>, TcpStream, SocketAddr) -> D + Clone + Send + Sync + 'static,
    ) -> anyhow::Result<Self>
    where
        S: Future<Output = ()> + Send + 'static,
        D: Future<Output = ()> + Send + 'static,
    {
        let OutboundSockets { listeners: Pair { port, listeners }, arrivals, hold, seat } = sockets;
        let _at_home = context.lanes.enter(home)?;
        let arrivals = arrivals.listeners.into_iter();
        let arrivals: Vec<_> = arrivals
            .map(|bound| TcpListener::from_std(bound.listener).context("register a listener"))
            .collect::<anyhow::Result<_>>()?;
        let held = Arc::new_cyclic(|held: &Weak<Held>| Held {
            kernel: hold,
            place,
            home,
            table: Mutex::new(Table::new()),
            _arrivals: arrivals
                .into_iter()
                .map(|listener| {
                    AbortOnDropHandle::new(tokio::spawn(arrive(held.clone(), listener)))
                })
                .collect(),
        });
        let (mut shared, mut tasks) = (Vec::new(), Vec::new());
        for bound in listeners {
            let listener = TcpListener::from_std(bound.listener).context("register a listener")?;
            let listener = Arc::new(listener);
            shared.push((bound.seat, listener.clone()));
            let (context, dialled) = (context.clone(), dialled.clone());
            tasks.push(tokio::spawn(async move {
                loop {
                    let (stream, from) = accept_next(&listener).await;
                    let open = context.opened();
                    let serving = dialled(context.clone(), stream, canonical(from));
                    context.lanes.here().carry(async move {
                        serving.await;
                        drop(open);
                    });
                }
            }));
        }
        let socket = held.kernel.share().context("share a socket")?;
        // The runtime can wait for a socket of the kinds that it knows; of what kind it really is makes no difference
        // to that.
        let socket =
            UnixDatagram::from_std(StdDatagram::from(socket)).context("register a socket")?;
        tasks.push(tokio::spawn(take(context.clone(), held.clone(), socket, serve)));
        let tasks = tasks.into_iter().map(AbortOnDropHandle::new).collect();
        Ok(Self { port, listeners: shared, seat, held, _tasks: tasks })
    }

    /// The sockets for another process.
    pub(super) fn share(&self) -> impl Iterator<Item = io::Result<(Seat, OwnedFd)>> {
        let listeners = self.listeners.iter().map(|(seat, listener)| share(seat, &**listener));
        listeners.chain(std::iter::once_with(|| share(&self.seat, &self.held.kernel)))
    }
}

/// The next connection, whatever it takes.
async fn accept_next(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) => {
                tracing::warn!(%error, "accepting a connection failed");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// Takes what was let go, for as long as there is somebody who wants it.
async fn arrive(held: Weak<Held>, listener: TcpListener) {
    loop {
        let (stream, from) = accept_next(&listener).await;
        if let Ok(wanted) = stream.local_addr() {
            arrived(&held, stream, (canonical(from), canonical(wanted)));
        }
    }
}

/// Takes what the kernel holds, for as long as the agent takes connections.
async fn take<S>(
    context: Arc<Context>,
    held: Arc<Held>,
    socket: UnixDatagram,
    serve: impl Fn(Arc<Context>, Box<Waiting>) -> Option<S>,
) where
    S: Future<Output = ()> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let ready = tokio::select! {
            () = context.stopping.cancelled() => return,
            ready = socket.readable() => ready,
        };
        let mut taken = Ok((Vec::new(), true));
        if ready.is_ok() {
            let emptied: io::Result<()> = socket.try_io(Interest::READABLE, || {
                taken = held.kernel.take();
                match &taken {
                    Ok((_, false)) => Ok(()),
                    // That nothing is left is what makes the runtime wait again.
                    Ok((_, true)) | Err(_) => Err(io::ErrorKind::WouldBlock.into()),
                }
            });
            drop(emptied);
        }
        let (openings, none_left) = match ready.and(taken) {
            Ok(taken) => taken,
            Err(error) => {
                tracing::warn!(%error, "connections of a workload could not be taken");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        for opening in openings {
            let Some((waiting, place)) = Held::begin(&held, &places, &opening) else { continue };
            let Some(serving) = serve(context.clone(), waiting) else { continue };
            // In a box of its own: a future that is moved into a task is in it twice.
            let (serving, open) = (Box::pin(serving), context.opened());
            context.lanes.choose().carry(async move {
                serving.await;
                drop((open, place));
            });
        }
        if !none_left {
            tokio::task::yield_now().await;
        }
    }
}

/// A connection that was let go, at the agent's listener.
fn arrived(held: &Weak<Held>, stream: TcpStream, ends: Ends) {
    let wanted_by = held.upgrade().and_then(|held| held.lock().arrived(ends));
    // One that was given up, or dialled to the agent's own port, is reset when it is closed, as its listener is.
    if let Some(wanted_by) = wanted_by {
        drop(wanted_by.send(stream));
    }
}

impl Held {
    /// Does what is to be done about a first packet. Returns a new connection, which has its place.
    fn begin(
        held: &Arc<Self>,
        places: &Arc<Semaphore>,
        opening: &Opening,
    ) -> Option<(Box<Waiting>, OwnedSemaphorePermit)> {
        let todo = held.lock().take(opening, || places.clone().try_acquire_owned().ok());
        match todo {
            Todo::Decide(place) => {
                let ends = (opening.from, opening.wanted);
                let waiting = Waiting { held: held.clone(), ends, arrived: false };
                return Some((Box::new(waiting), place));
            }
            Todo::LetGo => held.let_go(opening),
            Todo::Refuse => held.refuse(opening),
            Todo::Nothing => {}
        }
        None
    }

    fn refuse(&self, opening: &Opening) {
        if let Err(error) = self.kernel.refuse(opening) {
            // The application's kernel asks again.
            tracing::debug!(%error, "a connection could not be refused");
        }
    }

    fn let_go(&self, opening: &Opening) {
        if let Err(error) = self.kernel.release(opening) {
            // The application's kernel asks again.
            tracing::debug!(%error, "a connection could not be let go");
        }
    }

    /// Whether the application still waits for it.
    fn wish(&self, (from, wanted): Ends) -> Wish {
        // If that cannot be told, it is waited for.
        self.place.call(|| owner::wish(from, wanted)).unwrap_or(Wish::Open)
    }

    /// Plain data: a panic elsewhere leaves nothing half-changed in it.
    fn lock(&self) -> MutexGuard<'_, Table<oneshot::Sender<TcpStream>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    /// The application's end.
    pub(crate) fn from(&self) -> SocketAddr {
        self.ends.0
    }

    /// Where it wants to go.
    pub(crate) fn wanted(&self) -> SocketAddr {
        self.ends.1
    }

    /// Lets the application's `connect` succeed.
    ///
    /// # Errors
    /// If the application has given it up.
    pub(crate) async fn connect(mut self: Box<Self>) -> io::Result<TcpStream> {
        let (to, mut receiver) = oneshot::channel();
        let opening = self.held.lock().let_go(self.ends, to).ok_or_else(given_up)?;
        self.held.let_go(&opening);
        let is_home = self.held.home == Lane::current();
        let stream = match if is_home { soon(&mut receiver).await } else { None } {
            Some(arrived) => arrived,
            None => Box::pin(self.arrival(&mut receiver)).await,
        };
        self.arrived = stream.is_some();
        bring_here(stream.ok_or_else(given_up)?, self.held.home)
    }

    /// What was let go, if it arrives.
    async fn arrival(&self, receiver: &mut oneshot::Receiver<TcpStream>) -> Option<TcpStream> {
        let arrival = async {
            let (mut pause, mut answered) = (FIRST_LOOK, None);
            loop {
                match tokio::time::timeout(pause, &mut *receiver).await {
                    Ok(arrived) => return arrived.ok(),
                    Err(_) => match self.held.wish(self.ends) {
                        Wish::Open => answered = None,
                        // It may have arrived, and wait to be accepted; or it has joined something else.
                        Wish::Answered => {
                            let since = *answered.get_or_insert_with(Instant::now);
                            if since.elapsed() >= ACCEPT_PATIENCE {
                                return None;
                            }
                        }
                        Wish::Gone => return None,
                    },
                }
                pause = (pause * 2).min(ACCEPT_PATIENCE);
            }
        };
        tokio::time::timeout(ANSWER_PATIENCE, arrival).await.ok().flatten()
    }
}

/// What arrives as soon as the network was asked once or twice, as nearly everything does: a timer, which wakes the
/// thread's runtime by a system call, is not for that.
async fn soon(receiver: &mut oneshot::Receiver<TcpStream>) -> Option<Option<TcpStream>> {
    for _ in 0..TURNS {
        tokio::task::yield_now().await;
        match receiver.try_recv() {
            Ok(stream) => return Some(Some(stream)),
            Err(TryRecvError::Closed) => return Some(None),
            Err(TryRecvError::Empty) => {}
        }
    }
    None
}

fn given_up() -> io::Error {
    let text = "the application has given up its attempt to connect";
    io::Error::new(io::ErrorKind::ConnectionAborted, text)
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if self.arrived {
            return;
        }
        let refused = self.held.lock().give_up(self.ends);
        if let Some(opening) = refused {
            self.held.refuse(&opening);
        }
    }
}
