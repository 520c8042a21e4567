//! Reads fields out of the tree and gathers what is wrong with them.

use std::{cell::RefCell, fmt, rc::Rc, str::FromStr};

use super::{
    ManifestError,
    tree::{Node, Value},
};

/// Gathers errors; shared by all cursors of a file.
pub(super) struct Reader {
    source: String,
    errors: Rc<RefCell<Vec<ManifestError>>>,
}

/// A value and the path that leads to it.
#[derive(Clone)]
pub(super) struct Field<'a> {
    node: &'a Node,
    path: String,
    source: String,
    errors: Rc<RefCell<Vec<ManifestError>>>,
}

/// The entries of a map, each to be taken once.
pub(super) struct Fields<'a> {
    own: Field<'a>,
    entries: Vec<(&'a str, &'a Node)>,
    taken: Vec<&'static str>,
}

impl Reader {
    pub(super) fn new(source: &str) -> Self {
        Self { source: source.to_owned(), errors: Rc::default() }
    }

    pub(super) fn root<'a>(&self, node: &'a Node) -> Field<'a> {
        Field {
            node,
            path: String::new(),
            source: self.source.clone(),
            errors: self.errors.clone(),
        }
    }

    pub(super) fn into_errors(self) -> Vec<ManifestError> {
        self.errors.take()
    }
}

impl<'a> Field<'a> {
    fn at(&self, node: &'a Node, path: String) -> Self {
        Self { node, path, source: self.source.clone(), errors: self.errors.clone() }
    }

    /// Notes an error here. `None`, so that it can be returned.
    pub(super) fn wrong<T>(
        &self,
        problem: impl fmt::Display,
        mend: impl fmt::Display,
    ) -> Option<T> {
        self.errors.borrow_mut().push(ManifestError {
            source: self.source.clone(),
            line: self.node.line,
            column: self.node.column,
            path: self.path.clone(),
            problem: problem.to_string(),
            mend: mend.to_string(),
        });
        None
    }

    pub(super) fn map(&self) -> Option<Fields<'a>> {
        let Value::Map(entries) = &self.node.value else {
            return self.wrong(
                format_args!("{} is not a map", self.node.value.describe()),
                "write fields below it",
            );
        };
        let mut named = Vec::with_capacity(entries.len());
        for (key, value) in entries {
            match &key.value {
                Value::Text(name) => named.push((name.as_str(), value)),
                other => {
                    return self.at(key, self.path.clone()).wrong(
                        format_args!("the key {} is not a name", other.describe()),
                        "write it as text, in quotes",
                    );
                }
            }
        }
        Some(Fields { own: self.clone(), entries: named, taken: Vec::new() })
    }

    pub(super) fn list(&self) -> Option<Vec<Self>> {
        let Value::List(items) = &self.node.value else {
            return self.wrong(
                format_args!("{} is not a list", self.node.value.describe()),
                "write one entry a line, each after a dash",
            );
        };
        let field = |(place, node)| self.at(node, format!("{}[{place}]", self.path));
        Some(items.iter().enumerate().map(field).collect())
    }

    /// A list with at least one entry: an empty one could be taken for "all".
    pub(super) fn some_list(&self) -> Option<Vec<Self>> {
        let list = self.list()?;
        if list.is_empty() {
            return self.wrong("the list is empty", "name at least one; nothing means all here");
        }
        Some(list)
    }

    pub(super) fn text(&self) -> Option<&'a str> {
        match &self.node.value {
            Value::Text(text) if !text.trim().is_empty() => Some(text),
            other => {
                self.wrong(format_args!("{} is not text", other.describe()), "write some text")
            }
        }
    }

    pub(super) fn parsed<T: FromStr<Err: fmt::Display>>(&self, mend: &str) -> Option<T> {
        let text = self.text()?;
        text.parse()
            .map_or_else(|error: T::Err| self.wrong(format_args!("{text:?}: {error}"), mend), Some)
    }

    pub(super) fn word<T: Copy>(&self, words: &[(&str, T)]) -> Option<T> {
        let Value::Text(text) = &self.node.value else {
            return self.wrong(
                format_args!("{} is none of the words", self.node.value.describe()),
                format_args!("write {}", either(words)),
            );
        };
        words.iter().find(|(word, _)| word == text).map(|(_, value)| *value).or_else(|| {
            self.wrong(format_args!("{text:?} is unknown"), format_args!("write {}", either(words)))
        })
    }

    pub(super) fn port(&self) -> Option<u16> {
        match &self.node.value {
            Value::Number(number) => u16::try_from(*number).ok().filter(|port| *port > 0),
            Value::Null | Value::Bool(_) | Value::Text(_) | Value::List(_) | Value::Map(_) => None,
        }
        .or_else(|| {
            self.wrong(
                format_args!("{} is not a port", self.node.value.describe()),
                "give a whole number from 1 to 65535",
            )
        })
    }

    pub(super) fn is_map(&self) -> bool {
        matches!(self.node.value, Value::Map(_))
    }

    pub(super) fn number(&self) -> Option<i128> {
        match self.node.value {
            Value::Number(number) => Some(number),
            Value::Null | Value::Bool(_) | Value::Text(_) | Value::List(_) | Value::Map(_) => None,
        }
    }

    pub(super) fn is_true(&self) -> Option<()> {
        match &self.node.value {
            Value::Bool(true) => Some(()),
            other => self.wrong(
                format_args!("{} is not true", other.describe()),
                "write true, or leave the field out",
            ),
        }
    }
}

impl<'a> Fields<'a> {
    /// A field that must be there.
    pub(super) fn required(&mut self, name: &'static str) -> Option<Field<'a>> {
        self.optional(name).or_else(|| {
            self.own.wrong(format_args!("{name} is missing"), format_args!("add {name}"))
        })
    }

    /// A field that may be there; null counts as not there.
    pub(super) fn optional(&mut self, name: &'static str) -> Option<Field<'a>> {
        self.taken.push(name);
        let (_, node) = self.entries.iter().find(|(key, _)| *key == name)?;
        let path = match self.own.path.as_str() {
            "" => name.to_owned(),
            path => format!("{path}.{name}"),
        };
        (!matches!(node.value, Value::Null)).then(|| self.own.at(node, path))
    }

    /// Exactly one of several fields.
    pub(super) fn one_of(&mut self, names: &[&'static str]) -> Option<(&'static str, Field<'a>)> {
        let mut found: Vec<(&'static str, Field<'a>)> = names
            .iter()
            .filter_map(|name| self.optional(name).map(|field| (*name, field)))
            .collect();
        match found.len() {
            1 => found.pop(),
            count => self.own.wrong(
                format_args!("{count} of {} are given", names.join(", ")),
                "give exactly one of them",
            ),
        }
    }

    /// All entries, for free maps such as labels.
    pub(super) fn entries(&self) -> Vec<(&'a str, Field<'a>)> {
        self.entries
            .iter()
            .map(|(key, node)| (*key, self.own.at(node, format!("{}.{key}", self.own.path))))
            .collect()
    }

    /// Refuses every field that nobody took.
    pub(super) fn finish(self) {
        for (key, node) in &self.entries {
            if self.taken.contains(key) {
                continue;
            }
            let near = self.taken.iter().find(|name| near(name, key));
            let mend = match near {
                Some(name) => format!("did you mean {name}?"),
                None => format!("remove it; known here are {}", self.taken.join(", ")),
            };
            let path = match self.own.path.as_str() {
                "" => (*key).to_owned(),
                path => format!("{path}.{key}"),
            };
            let _: Option<()> = self.own.at(node, path).wrong("the field is unknown", mend);
        }
    }
}

fn either<T>(words: &[(&str, T)]) -> String {
    words.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(" or ")
}

/// Whether two names differ by case, or by at most two letters.
fn near(a: &str, b: &str) -> bool {
    let (a, b) = (a.to_lowercase(), b.to_lowercase());
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
        for (j, y) in b.chars().enumerate() {
            let left = row.get(j).copied().unwrap_or(usize::MAX - 1);
            let Some(cell) = row.get_mut(j + 1) else { break };
            let cost = diagonal + usize::from(x != y);
            diagonal = *cell;
            *cell = cost.min(left + 1).min(*cell + 1);
        }
    }
    row.last().is_some_and(|distance| *distance <= 2)
}
