//! Cursors over the tree: each knows its field path and place, and notes what is wrong there, so
//! that reading goes on and all errors of a file come at once.

use std::{cell::RefCell, fmt, net::IpAddr, str::FromStr};

use super::{
    ManifestError,
    tree::{Entry, Node, Place, Value},
    words::{canonical_number, clipped, join, nearest, quoted, shortened},
};
use crate::{
    identity::{IdentityKind, ResourceName, SpiffeId},
    time::Timestamp,
};

/// The most errors reported of one file: nobody reads more, and 1 MiB can hold half a million.
const MAX_ERRORS: usize = 1_000;

/// The longest prose, in bytes: reasons and contacts travel in every record of a denial.
const MAX_PROSE: usize = 1_024;

const NAME: &str = "use a-z, 0-9, - and ., such as checkout-2";

/// Gathers the errors of a file.
pub(super) struct Reader {
    source: String,
    errors: RefCell<Vec<ManifestError>>,
}

/// A value and the path that leads to it.
#[derive(Clone)]
pub(super) struct Field<'a> {
    reader: &'a Reader,
    node: &'a Node,
    path: String,
}

/// The fields of a map, all of them known.
pub(super) struct Fields<'a> {
    own: Field<'a>,
    entries: &'a [Entry],
    known: &'static [&'static str],
}

impl Reader {
    pub(super) fn new(source: &str) -> Self {
        Self { source: source.to_owned(), errors: RefCell::default() }
    }

    pub(super) fn root<'a>(&'a self, node: &'a Node) -> Field<'a> {
        Field { reader: self, node, path: String::new() }
    }

    pub(super) fn note(
        &self,
        place: Place,
        path: &str,
        problem: impl fmt::Display,
        mend: impl fmt::Display,
    ) {
        if self.is_full() {
            return;
        }
        self.errors.borrow_mut().push(ManifestError {
            source: self.source.clone(),
            line: place.line,
            column: place.column,
            path: path.to_owned(),
            problem: problem.to_string(),
            mend: mend.to_string(),
        });
    }

    fn is_full(&self) -> bool {
        self.errors.borrow().len() == MAX_ERRORS
    }

    /// The errors from top to bottom.
    pub(super) fn into_errors(self) -> Vec<ManifestError> {
        let full = self.is_full();
        let mut errors = self.errors.into_inner();
        errors.sort_by_key(|error| (error.line, error.column));
        if full && let Some(last) = errors.last() {
            errors.push(ManifestError {
                path: String::new(),
                problem: format!("the file has {MAX_ERRORS} errors or more"),
                mend: "correct the ones above first".to_owned(),
                ..last.clone()
            });
        }
        errors
    }
}

impl<'a> Field<'a> {
    /// Notes an error here.
    pub(super) fn note(&self, problem: impl fmt::Display, mend: impl fmt::Display) {
        if !matches!(self.node.value, Value::Refused) {
            self.reader.note(self.node.place, &self.path, problem, mend);
        }
    }

    /// Notes an error here, and is `None` so that it can be returned.
    pub(super) fn wrong<T>(
        &self,
        problem: impl fmt::Display,
        mend: impl fmt::Display,
    ) -> Option<T> {
        self.note(problem, mend);
        None
    }

    /// The fields below; refuses every one that is not known.
    pub(super) fn fields(&self, known: &'static [&'static str]) -> Option<Fields<'a>> {
        let entries = self.map()?;
        for entry in entries.iter().filter(|entry| !known.contains(&entry.key.as_str())) {
            if self.reader.is_full() {
                break;
            }
            let all = known.join(", ");
            let mend = match nearest(&entry.key, known) {
                Some(near) => format!("did you mean {near}? known here: {all}"),
                None => format!("remove it; known here: {all}"),
            };
            let problem = format!("{} is not a field here", quoted(&entry.key));
            self.reader.note(entry.key_place, &join(&self.path, &entry.key), problem, mend);
        }
        Some(Fields { own: self.clone(), entries, known })
    }

    /// The entries of a free map, such as labels.
    pub(super) fn entries(&self) -> Option<Vec<(&'a str, Self)>> {
        let entries = self.map()?.iter();
        Some(entries.map(|entry| (entry.key.as_str(), self.below(entry))).collect())
    }

    fn map(&self) -> Option<&'a [Entry]> {
        match &self.node.value {
            Value::Map(entries) => Some(entries),
            other => self.wrong(
                format_args!("{} stands where fields belong", other.describe()),
                "write fields below it, each as name: value",
            ),
        }
    }

    fn below(&self, entry: &'a Entry) -> Self {
        Field { reader: self.reader, node: &entry.node, path: join(&self.path, &entry.key) }
    }

    pub(super) fn list(&self) -> Option<Vec<Self>> {
        let Value::List(items) = &self.node.value else {
            return self.wrong(
                format_args!("{} stands where a list belongs", self.node.value.describe()),
                "write one entry a line, each after a dash, or [a, b]",
            );
        };
        let item = |(number, node)| Field {
            reader: self.reader,
            node,
            path: format!("{}[{number}]", self.path),
        };
        Some(items.iter().enumerate().map(item).collect())
    }

    /// A list with at least one entry: an empty one could be taken for "all".
    pub(super) fn some_list(&self) -> Option<Vec<Self>> {
        let list = self.list()?;
        if list.is_empty() {
            return self.wrong("the list is empty", "name at least one; empty never means all");
        }
        Some(list)
    }

    pub(super) fn is_map(&self) -> bool {
        matches!(self.node.value, Value::Map(_))
    }

    /// A word that some YAML reader takes for a number or switch, as written.
    pub(super) fn unquoted(&self) -> Option<&'a str> {
        match &self.node.value {
            Value::Unquoted(word) => Some(word),
            Value::Null | Value::Text(_) | Value::List(_) | Value::Map(_) | Value::Refused => None,
        }
    }

    pub(super) fn text(&self) -> Option<&'a str> {
        match &self.node.value {
            Value::Text(text) => Some(text),
            Value::Unquoted(word) => self.wrong(
                format_args!("{word} is not text for every YAML reader"),
                format_args!("put it in quotes: {word:?}"),
            ),
            other => self.wrong(
                format_args!("{} stands where text belongs", other.describe()),
                "write text after the colon",
            ),
        }
    }

    /// Text for people: one line, not empty, nothing that plays tricks on a terminal.
    pub(super) fn prose(&self) -> Option<String> {
        let text = self.text()?.trim();
        if text.is_empty() {
            return self.wrong("the text is empty", "write some text, or remove the field");
        }
        if text.len() > MAX_PROSE {
            let problem = format!("the text has {} bytes", text.len());
            return self.wrong(problem, format_args!("shorten it to {MAX_PROSE}"));
        }
        if text.chars().any(char::is_control) {
            let problem = format!("{} has a control character or line break", quoted(text));
            return self.wrong(problem, "write it on one line");
        }
        Some(text.to_owned())
    }

    pub(super) fn name(&self) -> Option<ResourceName> {
        self.parsed(|error| clipped(&error), NAME)
    }

    /// A name, or a map with nothing but a name.
    pub(super) fn name_or_map(&self) -> Option<ResourceName> {
        if !self.is_map() {
            return self.name();
        }
        self.fields(&["name"])?.required("name", "checkout", Self::name)
    }

    pub(super) fn spiffe_id(&self) -> Option<SpiffeId> {
        const MEND: &str = "write it as spiffe://partner.example/ns/shop/sa/checkout";
        let id: SpiffeId = self.parsed(|error| clipped(&error), MEND)?;
        if let IdentityKind::Workload { namespace, service_account } = id.kind() {
            for name in [namespace, service_account] {
                if let Err(error) = name.parse::<ResourceName>() {
                    return self.wrong(clipped(&error), NAME);
                }
            }
        }
        Some(id)
    }

    pub(super) fn timestamp(&self) -> Option<Timestamp> {
        let text = self.text()?;
        self.parsed(
            |_| format!("{} is not an RFC 3339 instant", quoted(text)),
            "write it as 2027-01-31T00:00:00Z",
        )
    }

    pub(super) fn address(&self) -> Option<IpAddr> {
        let text = self.text()?;
        self.parsed(
            |_| format!("{} is not an IP address", quoted(text)),
            "write one such as 10.0.0.5 or \"fd00::5\", without a mask or port",
        )
    }

    fn parsed<T: FromStr>(&self, problem: impl Fn(T::Err) -> String, mend: &str) -> Option<T> {
        self.text()?.parse().map_or_else(|error| self.wrong(problem(error), mend), Some)
    }

    pub(super) fn word<T: Copy>(&self, words: &[(&str, T)]) -> Option<T> {
        let names: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        let given = match &self.node.value {
            Value::Text(text) => {
                if let Some((_, value)) = words.iter().find(|(word, _)| word == text) {
                    return Some(*value);
                }
                quoted(text)
            }
            other => other.describe(),
        };
        self.wrong(
            format_args!("{given} is not known here"),
            format_args!("write {}", names.join(" or ")),
        )
    }

    pub(super) fn port(&self) -> Option<u16> {
        let port = self.unquoted().and_then(canonical_number).filter(|port| *port > 0);
        port.or_else(|| {
            self.wrong(
                format_args!("{} is not a port", self.node.value.describe()),
                "give a whole number from 1 to 65535, without quotes",
            )
        })
    }

    /// For switches that are only ever switched on.
    pub(super) fn is_true(&self) -> Option<()> {
        if self.unquoted() == Some("true") {
            return Some(());
        }
        let problem = format!("{} is not true", self.node.value.describe());
        self.wrong(problem, "write true, or remove the field")
    }
}

impl<'a> Fields<'a> {
    /// A field that must be there; `example` shows it.
    pub(super) fn required<T>(
        &self,
        name: &'static str,
        example: &str,
        read: impl FnOnce(&Field<'a>) -> Option<T>,
    ) -> Option<T> {
        match self.given(name) {
            Some(field) => read(&field),
            None => self
                .own
                .wrong(format_args!("{name} is missing"), format_args!("add {name}: {example}")),
        }
    }

    /// A field that may be there: `Some(None)` if it is not, `None` if it is wrong.
    pub(super) fn optional<T>(
        &self,
        name: &'static str,
        read: impl FnOnce(&Field<'a>) -> Option<T>,
    ) -> Option<Option<T>> {
        match self.given(name) {
            Some(field) => read(&field).map(Some),
            None => Some(None),
        }
    }

    /// The field, if it is there; null counts as not there, as in Kubernetes.
    pub(super) fn given(&self, name: &'static str) -> Option<Field<'a>> {
        debug_assert!(self.known.contains(&name), "{name} is not known here");
        let entry = self.entries.iter().find(|entry| entry.key == name)?;
        (!matches!(entry.node.value, Value::Null)).then(|| self.own.below(entry))
    }

    /// Exactly one of several fields.
    pub(super) fn one_of(&self, names: &[&'static str]) -> Option<(&'static str, Field<'a>)> {
        let mut found: Vec<(&'static str, Field<'a>)> =
            names.iter().filter_map(|name| Some((*name, self.given(name)?))).collect();
        let problem = match found.len() {
            1 => return found.pop(),
            0 => format!("none of {} is given", names.join(", ")),
            _ => {
                let given: Vec<&str> = found.iter().map(|(name, _)| *name).collect();
                format!("{} are given together", given.join(" and "))
            }
        };
        self.own.wrong(problem, format_args!("give exactly one of {}", names.join(", ")))
    }
}

impl Value {
    /// For messages: what stands there, shortly.
    fn describe(&self) -> String {
        match self {
            Self::Null => "nothing".to_owned(),
            Self::Unquoted(word) => shortened(word),
            Self::Text(text) => quoted(text),
            Self::List(_) => "a list".to_owned(),
            Self::Map(_) => "a map".to_owned(),
            Self::Refused => "a refused value".to_owned(),
        }
    }
}
