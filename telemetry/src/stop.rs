//! When to stop: signals, and for children the end of standard input.

use std::{future::Future, io};

use tokio::io::AsyncReadExt;
use tokio::signal::unix::{SignalKind, signal as listen};

/// Done on SIGTERM or SIGINT; with `with_stdin` also when standard input ends, for a child of a
/// parent that must not leave it behind.
///
/// # Errors
///
/// When the signals cannot be listened for.
pub fn signal(with_stdin: bool) -> io::Result<impl Future<Output = ()> + Send + 'static> {
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
