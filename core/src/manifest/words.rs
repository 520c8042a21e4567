//! How messages name paths, quote values and guess what was meant.

use std::{fmt, str::FromStr};

use crate::likeness::edit_distance;

/// The longest quotation of a value in a message, in characters.
const MAX_QUOTED: usize = 80;

/// The path of a field; keys that are no plain words are set off, so that a path reads one way.
pub(super) fn join(path: &str, key: &str) -> String {
    let is_word =
        (1..=MAX_QUOTED).contains(&key.len()) && key.chars().all(|c| c.is_ascii_alphanumeric());
    match (is_word, path) {
        (true, "") => key.to_owned(),
        (true, path) => format!("{path}.{key}"),
        (false, path) => format!("{path}[{}]", quoted(key)),
    }
}

/// A value in a message: in quotes, escaped, not too long.
pub(super) fn quoted(text: &str) -> String {
    format!("{:?}", shortened(text))
}

/// A whole number as everybody writes it: no sign, no leading zero.
pub(super) fn canonical_number<T: FromStr>(text: &str) -> Option<T> {
    let canonical = text == "0" || !text.starts_with(['0', '+', '-']);
    if canonical { text.parse().ok() } else { None }
}

/// An error's own words, which quote the value.
pub(super) fn clipped(error: &impl fmt::Display) -> String {
    let text = error.to_string();
    match text.char_indices().nth(4 * MAX_QUOTED) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text,
    }
}

pub(super) fn shortened(text: &str) -> String {
    match text.char_indices().nth(MAX_QUOTED) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

/// The known name that was probably meant.
pub(super) fn nearest(given: &str, known: &[&'static str]) -> Option<&'static str> {
    // Longer ones are no typos, and the distance costs the product of the lengths.
    if given.len() > 32 {
        return None;
    }
    let distances = known.iter().map(|name| (edit_distance(given, name), *name));
    let (distance, name) = distances.min_by_key(|(distance, _)| *distance)?;
    (distance <= name.len().div_ceil(3).min(3)).then_some(name)
}
