//! Manifests: the YAML that owners write, turned into [`Object`]s whole or refused with every error
//! at once, each with its line, its field and the mend.
//!
//! Pure: the text comes in, the objects go out. Nothing is defaulted that would allow anything, and
//! nothing unknown is skipped.

mod access_policy;
mod guardrail;
mod host;
mod objects;
mod peers;
mod reader;
mod set;
mod tree;
mod words;

use std::fmt;

pub use set::check_set;

use crate::policy::Object;
use reader::Reader;
use tree::Place;

/// A manifest longer than this is refused: nobody reviews it.
pub const MAX_TEXT: usize = 1024 * 1024;

/// The most objects in one file.
const MAX_OBJECTS: usize = 10_000;

/// A value, and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located<T> {
    /// The file.
    pub source: String,
    /// Its line, from 1.
    pub line: usize,
    /// What stands there.
    pub value: T,
}

/// One mistake in a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestError {
    /// The file.
    pub source: String,
    /// The line, from 1.
    pub line: usize,
    /// The column, from 1.
    pub column: usize,
    /// The field, such as `spec.rules[0].ports[1]`; empty for the document itself.
    pub path: String,
    /// What is wrong, with the value.
    pub problem: String,
    /// What to write instead.
    pub mend: String,
}

impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: ", self.source, self.line, self.column)?;
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        write!(f, "{}; mend: {}", self.problem, self.mend)
    }
}

impl std::error::Error for ManifestError {}

/// Reads all objects of a file; `source` is its name, for messages.
///
/// # Errors
/// Every mistake in the file. No object of it is usable then.
pub fn parse(source: &str, text: &str) -> Result<Vec<Located<Object>>, Vec<ManifestError>> {
    let reader = Reader::new(source);
    if text.len() > MAX_TEXT {
        let start = Place { line: 1, column: 1 };
        reader.note(
            start,
            "",
            format_args!("the file has {} bytes", text.len()),
            format_args!("split it: {MAX_TEXT} is the most"),
        );
        return Err(reader.into_errors());
    }
    let mut objects = Vec::new();
    for document in tree::documents(text, &reader) {
        if let Some(value) = objects::read(&reader, &document) {
            objects.push(Located { source: source.to_owned(), line: document.place.line, value });
        }
    }
    let errors = reader.into_errors();
    if errors.is_empty() { Ok(objects) } else { Err(errors) }
}
