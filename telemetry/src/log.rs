//! Sets up logging: events go to stderr, as text for people or as JSON for collectors.
//!
//! Standard output stays free for records and for command output. The filter is refused whole
//! when any part of it cannot be read: half a filter would hide what someone is looking for.

use std::env;
use std::ffi::OsStr;
use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::Layer;
use tracing_subscriber::fmt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::Registry;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

/// Environment variable with the log filter. It wins over configuration, so that a running
/// installation can be looked into without editing a file.
pub const FILTER_VARIABLE: &str = "HAUBERK_LOG";

/// Filter in force when nobody asks for another.
pub const DEFAULT_FILTER: &str = "info";

/// Target of the one closing event of every connection. Denials are events of level INFO and
/// allowed connections of level DEBUG: `HAUBERK_LOG=info,hauberk.connection=debug` shows all.
pub const CONNECTION_TARGET: &str = "hauberk.connection";

/// Shape of a log line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people, coloured on a terminal.
    #[default]
    Text,
    /// One JSON object a line, fields at the top level.
    Json,
}

/// How to log.
#[derive(Clone, Debug, Default)]
pub struct LogOptions {
    /// Shape of a line.
    pub format: LogFormat,
    /// Filter in tracing's directive syntax, such as `info,hauberk_tls=debug`.
    pub filter: Option<String>,
}

/// Logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is not in the directive syntax.
    #[error(
        "log filter {filter:?} from {origin} is not valid, expected something like \
         \"info,hauberk_tls=debug\""
    )]
    Filter {
        /// The text that could not be read.
        filter: String,
        /// Where it came from.
        origin: &'static str,
        /// What the parser says.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// The environment variable is not text.
    #[error("{FILTER_VARIABLE} is not valid UTF-8")]
    FilterEncoding,
    /// Something in this process set up logging before.
    #[error("set up logging")]
    AlreadySet(#[source] TryInitError),
}

/// Starts logging for the whole process.
///
/// # Errors
///
/// When the filter cannot be read, or when logging was set up before.
pub fn init(options: &LogOptions) -> Result<(), LogError> {
    let variable = env::var_os(FILTER_VARIABLE);
    let filter = choose_filter(variable.as_deref(), options.filter.as_deref())?;
    let no_color = env::var_os("NO_COLOR");
    let color = colored(io::stderr().is_terminal(), no_color.as_deref());
    tracing_subscriber::registry()
        .with(layer(options.format, color).with_filter(filter))
        .try_init()
        .map_err(LogError::AlreadySet)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Color {
    Ansi,
    Plain,
}

fn layer(format: LogFormat, color: Color) -> Box<dyn Layer<Registry> + Send + Sync> {
    // Internal errors would be printed with `eprintln!`, which panics when stderr is closed.
    let base = fmt::layer().with_writer(io::stderr).log_internal_errors(false);
    match format {
        LogFormat::Text => base.with_ansi(color == Color::Ansi).boxed(),
        LogFormat::Json => base.json().flatten_event(true).with_current_span(false).boxed(),
    }
}

fn choose_filter(variable: Option<&OsStr>, option: Option<&str>) -> Result<EnvFilter, LogError> {
    let variable = match variable.filter(|value| !value.is_empty()) {
        Some(value) => Some(value.to_str().ok_or(LogError::FilterEncoding)?),
        None => None,
    };
    let (filter, origin) = match (variable, option) {
        (Some(filter), _) => (filter, FILTER_VARIABLE),
        (None, Some(filter)) => (filter, "the configuration"),
        (None, None) => (DEFAULT_FILTER, "the default"),
    };
    EnvFilter::builder().parse(filter).map_err(|source| LogError::Filter {
        filter: filter.to_owned(),
        origin,
        source,
    })
}

/// Colour needs a terminal and no wish against it (<https://no-color.org>).
fn colored(terminal: bool, no_color: Option<&OsStr>) -> Color {
    if terminal && no_color.is_none_or(OsStr::is_empty) { Color::Ansi } else { Color::Plain }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_wins_over_the_option_and_the_default_is_info() {
        let cases: [(&str, Option<&str>, Option<&str>, &str); 4] = [
            ("neither", None, None, "info"),
            ("option", None, Some("warn"), "warn"),
            ("both", Some("debug"), Some("warn"), "debug"),
            ("empty variable", Some(""), Some("warn"), "warn"),
        ];
        for (name, variable, option, expected) in cases {
            let filter = choose_filter(variable.map(OsStr::new), option).unwrap();
            assert_eq!(filter.to_string(), expected, "{name}");
        }
    }

    #[test]
    fn a_filter_that_cannot_be_read_is_refused_and_named() {
        let error = choose_filter(Some(OsStr::new("hauberk=loud")), None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "log filter \"hauberk=loud\" from HAUBERK_LOG is not valid, expected something like \
             \"info,hauberk_tls=debug\""
        );
    }

    #[test]
    fn colour_is_for_terminals_that_did_not_refuse_it() {
        assert_eq!(colored(true, None), Color::Ansi);
        assert_eq!(colored(true, Some(OsStr::new(""))), Color::Ansi);
        assert_eq!(colored(true, Some(OsStr::new("1"))), Color::Plain);
        assert_eq!(colored(false, None), Color::Plain);
    }
}
