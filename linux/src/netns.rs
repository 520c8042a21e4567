//! Network namespaces: open, create, and run code inside one.
//!
//! `setns` acts on a single thread. Work that may take long is done by a fresh OS thread, which enters, works and
//! ends; the calling thread goes there and back only for a system call or two ([`Netns::within`]), where handing them to
//! another thread costs more than they do. A [`Netns`] holds the namespace's file open, which keeps its inode from being
//! given to another namespace.

use std::{
    cell::OnceCell,
    fs::File,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread,
};

use nix::{
    libc,
    sched::{CloneFlags, setns, unshare},
    sys::statfs::{NSFS_MAGIC, fstatfs},
};

use crate::{
    error::{Context, Error, Result},
    links,
};

/// A network namespace, held open. Clones share the open file.
#[derive(Clone, Debug)]
pub struct Netns {
    file: Arc<File>,
    inode: u64,
}

impl Netns {
    /// The namespace of the calling thread.
    pub fn current() -> Result<Self> {
        Self::from_file(Path::new("/proc/thread-self/ns/net"))
    }

    /// Opens a namespace file: `/proc/<pid>/ns/net`, `/run/netns/<name>`, a bind mount, or another
    /// process's [`Netns::proc_path`].
    ///
    /// Refuses any other file, also a namespace of another type.
    pub fn open(path: &Path) -> Result<Self> {
        let netns = Self::from_file(path)?;
        match netns.run(|| ()) {
            // The kernel compares the file's namespace type with the one asked for.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                Err(Error::NotANetworkNamespace { path: path.to_owned() })
            }
            Err(error) => Err(error),
            Ok(()) => Ok(netns),
        }
    }

    /// Makes a new namespace with its loopback up. It lives as long as something holds it.
    pub fn create() -> Result<Self> {
        on_a_thread("netns-create", || {
            unshare(CloneFlags::CLONE_NEWNET).context("creating a network namespace")?;
            links::set_up("lo")?;
            Self::current()
        })?
    }

    /// The namespace's inode number, unique among the namespaces that exist.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Runs `work` inside the namespace, on a thread of its own, and returns what it returned.
    ///
    /// Sockets it makes belong to the namespace and may be handed out. A panic in `work` is
    /// carried on in the caller.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        on_a_thread("netns-run", || {
            self.enter()?;
            Ok(work())
        })?
    }

    /// Does `work` inside the namespace, on the calling thread, which is back where it was when this returns: for a
    /// system call or two. If it cannot get back, the process ends: nothing may go on in another's network.
    ///
    /// # Errors
    /// If it cannot enter; then nothing was done.
    pub fn within<T>(&self, work: impl FnOnce() -> T) -> Result<T> {
        let back = Back(HOME.with(|home| match home.get() {
            Some(home) => Ok(home.clone()),
            None => Self::current().map(|current| home.get_or_init(|| current).clone()),
        })?);
        self.enter()?;
        let result = work();
        drop(back);
        Ok(result)
    }

    /// A path to the namespace that another process of the same user can open, for as long as
    /// this value lives.
    pub fn proc_path(&self) -> PathBuf {
        let pid = std::process::id();
        PathBuf::from(format!("/proc/{pid}/fd/{}", self.file.as_raw_fd()))
    }

    fn from_file(path: &Path) -> Result<Self> {
        let opening = || format!("opening the network namespace {}", path.display());
        let file = File::options()
            .read(true)
            // A path from a configuration could lead to a pipe: opening must not block on it.
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(path)
            .context(opening())?;
        let kind = fstatfs(&file).context(opening())?;
        if kind.filesystem_type() != NSFS_MAGIC {
            return Err(Error::NotANetworkNamespace { path: path.to_owned() });
        }
        let inode = file.metadata().context(opening())?.ino();
        Ok(Self { file: Arc::new(file), inode })
    }

    /// Moves the calling thread in, for good: only for threads that end with the work.
    fn enter(&self) -> Result<()> {
        setns(&self.file, CloneFlags::CLONE_NEWNET)
            .context(format!("entering the network namespace {}", self.inode))
    }
}

thread_local! {
    /// Where this thread is, but for moments.
    static HOME: OnceCell<Netns> = const { OnceCell::new() };
}

/// Takes the calling thread back when it is dropped, also by a panic.
struct Back(Netns);

impl Drop for Back {
    fn drop(&mut self) {
        if self.0.enter().is_err() {
            std::process::abort();
        }
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl PartialEq for Netns {
    fn eq(&self, other: &Self) -> bool {
        self.inode == other.inode
    }
}

impl Eq for Netns {}

type Task = Box<dyn FnOnce() + Send>;

/// A long-lived OS thread inside a namespace, which runs the closures it is sent, in their order.
///
/// Async code sends a closure that makes a socket and gets the socket back over a oneshot. The
/// thread ends when the worker is dropped, after the tasks already sent.
#[derive(Debug)]
pub struct NetnsWorker {
    name: String,
    tasks: mpsc::Sender<Task>,
    netns: Netns,
}

impl NetnsWorker {
    /// Starts the thread and waits until it is inside. `name` becomes the thread's name.
    pub fn start(netns: &Netns, name: &str) -> Result<Self> {
        let (tasks, inbox) = mpsc::channel::<Task>();
        let (entered, entry) = mpsc::sync_channel(1);
        let inside = netns.clone();
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let result = inside.enter();
                let usable = result.is_ok();
                if entered.send(result).is_ok() && usable {
                    // A task that panics must not take the later ones down with it; its caller
                    // learns of it from the answer that does not come.
                    inbox.iter().for_each(|task| {
                        drop(panic::catch_unwind(AssertUnwindSafe(task)));
                    });
                }
            })
            .context(format!("starting the namespace thread {name}"))?;
        let worker = Self { name: name.to_owned(), tasks, netns: netns.clone() };
        match entry.recv() {
            Ok(result) => result.map(|()| worker),
            Err(mpsc::RecvError) => Err(worker.ended()),
        }
    }

    /// The namespace the thread is in.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Runs `task` in the namespace and waits for its result. Blocks: not for async code.
    pub fn call<T: Send + 'static>(&self, task: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let (answer, result) = mpsc::sync_channel(1);
        self.submit(move || {
            // The caller waits below, unless its own thread is unwinding.
            answer.send(task()).ok();
        })?;
        result.recv().map_err(|_| Error::TaskPanicked { name: self.name.clone() })
    }

    /// Sends `task` to the namespace and returns at once.
    pub fn submit(&self, task: impl FnOnce() + Send + 'static) -> Result<()> {
        self.tasks.send(Box::new(task)).map_err(|_| self.ended())
    }

    fn ended(&self) -> Error {
        Error::WorkerEnded { name: self.name.clone() }
    }
}

/// Runs `work` on a fresh thread, which a change of namespace may then be left to die with.
fn on_a_thread<T: Send>(name: &str, work: impl FnOnce() -> T + Send) -> Result<T> {
    thread::scope(|scope| {
        let handle = thread::Builder::new()
            .name(name.to_owned())
            .spawn_scoped(scope, work)
            .context("starting a thread for a network namespace")?;
        match handle.join() {
            Ok(value) => Ok(value),
            Err(payload) => panic::resume_unwind(payload),
        }
    })
}
