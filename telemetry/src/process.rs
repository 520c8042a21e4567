//! What both programs are as processes: when they stop, how many files they may open, and that
//! nothing of their memory gets out.

use std::{future::Future, io};

use tokio::io::AsyncReadExt;
use tokio::signal::unix::{SignalKind, signal as listen};

/// Done on SIGTERM or SIGINT; with `with_stdin` also when standard input ends, for a child of a
/// parent that must not leave it behind.
///
/// # Errors
///
/// When the signals cannot be listened for.
pub fn stop_signal(with_stdin: bool) -> io::Result<impl Future<Output = ()> + Send + 'static> {
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = stdin_ended(), if with_stdin => {}
        }
    })
}

async fn stdin_ended() {
    let mut stdin = tokio::io::stdin();
    let mut ignored = [0; 64];
    // An error ends it as well: nobody is there any more.
    while matches!(stdin.read(&mut ignored).await, Ok(count) if count > 0) {}
}

/// Raises the soft limit on open files to the hard one. The usual soft limit of 1024 is for programs
/// that use `select`; a relay needs two descriptors for each connection.
pub fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit on open files could not be raised");
    }
}

/// Lets no core file be written of this process, which would hold keys, and no other process of the
/// same user look into it. The limit alone is not enough: the kernel ignores it where cores go to a
/// program.
pub fn keep_memory_private() {
    use nix::sys::resource::{Resource, setrlimit};
    let kept =
        setrlimit(Resource::RLIMIT_CORE, 0, 0).and_then(|()| nix::sys::prctl::set_dumpable(false));
    if let Err(error) = kept {
        tracing::warn!(%error, "core files could not be forbidden");
    }
}
