//! YAML as a tree in which every value knows its place.
//!
//! Built from the events of the parser below serde-saphyr, not through serde: serde stops at the
//! first error, and has already turned an unquoted `1.10` into the number 1.1 when we see it.
//!
//! Refused here: keys that stand twice, anchors and aliases (a rule must be readable where it
//! stands, and what is never expanded cannot explode), tags, and nesting that no manifest needs.

use std::{borrow::Cow, collections::HashMap};

use serde_saphyr::granit_parser::{
    Event, Options, Parser, ScalarStyle, ScanError, Span, StructureStyle,
};

use super::{
    MAX_OBJECTS,
    reader::Reader,
    words::{join, quoted},
};

/// The deepest nesting accepted. Ours is 8 deep; `status`, which we ignore, may be deeper.
const MAX_DEPTH: usize = 32;

/// Where something begins, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) line: usize,
    pub(super) column: usize,
}

/// A value with its place: of a block below a key, the key's.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) place: Place,
    pub(super) value: Value,
}

#[derive(Debug)]
pub(super) enum Value {
    Null,
    /// Unquoted, and not text for every YAML reader: a number, `true`; as written.
    Unquoted(String),
    Text(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
    /// Its error is noted already.
    Refused,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) key_place: Place,
    pub(super) node: Node,
}

/// The documents of a file without empty ones, as far as the text can be read.
pub(super) fn documents(text: &str, reader: &Reader) -> Vec<Node> {
    let mut options = Options::default();
    options.emit_unresolved_aliases = true;
    options.emit_comments = false;
    let mut tree = Tree { reader, open: Vec::new(), documents: Vec::new() };
    for event in Parser::new_from_str_with_options(text, options) {
        let going_on = match event {
            Ok((event, span)) => tree.take(event, place(&span)),
            Err(error) => tree.broken_off(text, &error),
        };
        if going_on.is_none() {
            break;
        }
    }
    tree.documents
}

struct Tree<'a> {
    reader: &'a Reader,
    open: Vec<Open>,
    documents: Vec<Node>,
}

/// A list or map that has not ended yet.
enum Open {
    List { place: Place, items: Vec<Node> },
    Map { place: Place, entries: Vec<Entry>, seen: HashMap<String, usize>, next: Next },
}

/// What a map waits for.
enum Next {
    Key,
    ValueOf(String, Place),
    /// The value of a refused key.
    Ignored,
}

impl Tree<'_> {
    /// `None` ends the reading.
    fn take(&mut self, event: Event<'_>, place: Place) -> Option<()> {
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let value = scalar(text, style);
                let place = match value {
                    Value::Null => self.key_place().unwrap_or(place),
                    Value::Unquoted(_)
                    | Value::Text(_)
                    | Value::List(_)
                    | Value::Map(_)
                    | Value::Refused => place,
                };
                self.refuse_extras(place, anchor != 0, tag.is_some());
                self.put(Node { place, value })
            }
            Event::SequenceStart(style, anchor, tag) => {
                self.refuse_extras(place, anchor != 0, tag.is_some());
                let place = self.block_place(style, place);
                self.open(place, Open::List { place, items: Vec::new() })
            }
            Event::MappingStart(style, anchor, tag) => {
                self.refuse_extras(place, anchor != 0, tag.is_some());
                let place = self.block_place(style, place);
                let (entries, seen) = (Vec::new(), HashMap::new());
                self.open(place, Open::Map { place, entries, seen, next: Next::Key })
            }
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop()? {
                Open::List { place, items } => self.put(Node { place, value: Value::List(items) }),
                Open::Map { place, entries, .. } => {
                    self.put(Node { place, value: Value::Map(entries) })
                }
            },
            Event::Alias(_) | Event::UnresolvedAlias(_) => {
                self.note(
                    place,
                    "aliases are not supported: a rule must be readable where it stands",
                    "write the value out",
                );
                self.put(Node { place, value: Value::Refused })
            }
            Event::StreamStart
            | Event::StreamEnd
            | Event::DocumentStart(..)
            | Event::DocumentEnd
            | Event::Anchor(..)
            | Event::Comment(..) => Some(()),
            // The parser may learn new events: what we cannot read, we do not accept.
            _ => {
                self.note(place, "this part of YAML is not supported", "write it more plainly");
                None
            }
        }
    }

    fn open(&mut self, place: Place, open: Open) -> Option<()> {
        if self.open.len() == MAX_DEPTH {
            let problem = format!("the nesting is deeper than {MAX_DEPTH} levels");
            self.note(place, &problem, "remove levels; no field of a manifest is as deep");
            return None;
        }
        self.open.push(open);
        Some(())
    }

    /// Puts a finished value where it belongs: as the file's next document, item, key or value.
    fn put(&mut self, node: Node) -> Option<()> {
        match self.open.last_mut() {
            None => self.put_document(node),
            Some(Open::List { items, .. }) => {
                items.push(node);
                Some(())
            }
            Some(Open::Map { entries, next, .. }) => {
                match std::mem::replace(next, Next::Key) {
                    Next::Key => self.put_key(node),
                    Next::ValueOf(key, key_place) => entries.push(Entry { key, key_place, node }),
                    Next::Ignored => {}
                }
                Some(())
            }
        }
    }

    fn put_document(&mut self, node: Node) -> Option<()> {
        if matches!(node.value, Value::Null) {
            return Some(());
        }
        if self.documents.len() == MAX_OBJECTS {
            let problem = format!("the file has more than {MAX_OBJECTS} objects");
            self.note(node.place, &problem, "split the file");
            return None;
        }
        self.documents.push(node);
        Some(())
    }

    fn put_key(&mut self, node: Node) {
        let Node { place, value } = node;
        let key = match value {
            Value::Text(key) => Some(key),
            Value::Unquoted(word) => {
                let problem = format!("the key {word} is not text for every YAML reader");
                self.note(place, &problem, &format!("put it in quotes: {word:?}"));
                None
            }
            Value::Null | Value::List(_) | Value::Map(_) => {
                self.note(place, "the key is not text", "write the name of a field");
                None
            }
            Value::Refused => None,
        };
        let first_line = key.as_ref().and_then(|key| match self.open.last() {
            Some(Open::Map { seen, .. }) => seen.get(key).copied(),
            Some(Open::List { .. }) | None => None,
        });
        if let (Some(key), Some(line)) = (&key, first_line) {
            let problem = format!("{} stands twice, first in line {line}", quoted(key));
            self.note(place, &problem, "remove one of the two");
        }
        let Some(Open::Map { seen, next, .. }) = self.open.last_mut() else { return };
        *next = match key {
            Some(key) if first_line.is_none() => {
                seen.insert(key.clone(), place.line);
                Next::ValueOf(key, place)
            }
            Some(_) | None => Next::Ignored,
        };
    }

    fn refuse_extras(&self, place: Place, anchored: bool, tagged: bool) {
        if anchored {
            self.note(place, "anchors are not supported", "remove the & and its name");
        }
        if tagged {
            self.note(place, "tags are not supported", "remove the ! and its name");
        }
    }

    fn broken_off(&self, text: &str, error: &ScanError) -> Option<()> {
        let marker = error.marker();
        let place = Place { line: marker.line().max(1), column: marker.col().saturating_add(1) };
        let indent_has_tab = text
            .lines()
            .nth(place.line.saturating_sub(1))
            .is_some_and(|line| line.chars().take_while(|c| c.is_whitespace()).any(|c| c == '\t'));
        let problem = format!("the YAML cannot be read: {}", error.info());
        let mend = if indent_has_tab {
            "indent with spaces: this line has a tab"
        } else {
            "correct it here or in the lines above; what follows is not read yet"
        };
        self.note(place, &problem, mend);
        None
    }

    fn note(&self, place: Place, problem: &str, mend: &str) {
        self.reader.note(place, &self.path(), problem, mend);
    }

    /// The path of what is being read.
    fn path(&self) -> String {
        self.open.iter().fold(String::new(), |path, open| match open {
            Open::List { items, .. } => format!("{path}[{}]", items.len()),
            Open::Map { next: Next::ValueOf(key, _), .. } => join(&path, key),
            Open::Map { next: Next::Key | Next::Ignored, .. } => path,
        })
    }

    /// The place of the key whose value comes next.
    fn key_place(&self) -> Option<Place> {
        match self.open.last() {
            Some(Open::Map { next: Next::ValueOf(_, place), .. }) => Some(*place),
            Some(Open::Map { next: Next::Key | Next::Ignored, .. } | Open::List { .. }) | None => {
                None
            }
        }
    }

    /// A block begins at its first child: its key is where people look.
    fn block_place(&self, style: StructureStyle, place: Place) -> Place {
        match style {
            StructureStyle::Block => self.key_place().unwrap_or(place),
            StructureStyle::Flow => place,
        }
    }
}

fn place(span: &Span) -> Place {
    Place { line: span.start.line().max(1), column: span.start.col().saturating_add(1) }
}

fn scalar(text: Cow<'_, str>, style: ScalarStyle) -> Value {
    let plain = match style {
        ScalarStyle::Plain => true,
        ScalarStyle::SingleQuoted
        | ScalarStyle::DoubleQuoted
        | ScalarStyle::Literal
        | ScalarStyle::Folded => false,
    };
    match &*text {
        "" | "~" | "null" | "Null" | "NULL" if plain => Value::Null,
        word if plain && is_number_or_switch(word) => Value::Unquoted(text.into_owned()),
        _ => Value::Text(text.into_owned()),
    }
}

/// Whether it is a switch or number to YAML 1.2, or a number to YAML 1.1, as in Kubernetes.
/// The further switches of 1.1, such as n, on and off, are the names here that they look like.
fn is_number_or_switch(word: &str) -> bool {
    if ["true", "false"].iter().any(|switch| switch.eq_ignore_ascii_case(word)) {
        return true;
    }
    let digits = word.trim_start_matches(['+', '-']).replace('_', "").to_ascii_lowercase();
    let of_base = |prefix: &str, base: u32| {
        digits.strip_prefix(prefix).is_some_and(|digits| {
            !digits.is_empty() && digits.chars().all(|digit| digit.is_digit(base))
        })
    };
    let begins_as_number = digits.starts_with(|c: char| c.is_ascii_digit() || c == '.');
    matches!(digits.as_str(), ".inf" | ".nan")
        || of_base("0x", 16)
        || of_base("0o", 8)
        || of_base("0b", 2)
        || (begins_as_number && digits.parse::<f64>().is_ok())
}
