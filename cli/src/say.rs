//! Standard output. Whoever reads it may go away when it has read enough, as `head` does: then there is nobody to tell
//! more, which is no error of anybody.

use std::{
    fmt,
    io::{self, ErrorKind, Write as _},
};

/// What shells show of a program that a closed pipe has ended: 128 and the number of `SIGPIPE`.
const CLOSED_PIPE: i32 = 141;

/// Writes a line to standard output.
macro_rules! say {
    ($($text:tt)*) => { $crate::say::line(::std::format_args!($($text)*)) };
}
pub(crate) use say;

/// Writes a line.
pub(crate) fn line(text: fmt::Arguments<'_>) {
    written(writeln!(io::stdout().lock(), "{text}"));
}

/// Writes a text as it is.
pub(crate) fn text(text: &str) {
    let mut output = io::stdout().lock();
    written(output.write_all(text.as_bytes()).and_then(|()| output.flush()));
}

/// Ends the command where nothing can be told any more.
fn written(outcome: io::Result<()>) {
    match outcome {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(CLOSED_PIPE),
        Err(error) => {
            eprintln!("error: write to standard output: {error}");
            std::process::exit(1);
        }
    }
}
