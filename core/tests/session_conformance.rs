//! Walks `proto/SESSION.md` sentence by sentence: each has an entry in [`SENTENCES`] that says what shows it.
//! A sentence that is new, changed or gone fails this test until the table says so, too.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod session_sentences;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use session_sentences::{Proof, SENTENCES, multiplexed};

/// What separates sentences here: the end of a paragraph, of an item, of a row or of a block, and a full stop
/// before a word that begins like a sentence.
fn sentences(page: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut paragraph = String::new();
    let mut block: Option<String> = None;
    for line in page.lines() {
        if line.starts_with("```") {
            match block.take() {
                None => {
                    end_paragraph(&mut paragraph, &mut found);
                    block = Some(String::new());
                }
                Some(text) => found.push(words(&text)),
            }
            continue;
        }
        if let Some(block) = &mut block {
            block.push_str(line);
            block.push(' ');
            continue;
        }
        let item = line
            .strip_prefix("- ")
            .or_else(|| line.split_once(". ").filter(|(n, _)| is_number(n)).map(|(_, rest)| rest));
        if line.is_empty() || line.starts_with('#') || line.starts_with('|') || item.is_some() {
            end_paragraph(&mut paragraph, &mut found);
        }
        if line.starts_with('|') {
            if !line.chars().all(|c| matches!(c, '|' | '-' | ' ')) {
                found.push(words(line));
            }
        } else if !line.starts_with('#') {
            paragraph.push_str(item.unwrap_or(line));
            paragraph.push(' ');
        }
    }
    end_paragraph(&mut paragraph, &mut found);
    found
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_digit())
}

fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn end_paragraph(paragraph: &mut String, found: &mut Vec<String>) {
    let mut sentence: Vec<&str> = Vec::new();
    for word in paragraph.split_whitespace() {
        let ended = sentence.last().is_some_and(|last| last.ends_with(['.', '?', '!']));
        let begins = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '*' || c == '`';
        if ended && word.starts_with(begins) {
            found.push(std::mem::take(&mut sentence).join(" "));
        }
        sentence.push(word);
    }
    if !sentence.is_empty() {
        found.push(sentence.join(" "));
    }
    paragraph.clear();
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// All that is written in Rust below a folder, file by file.
fn sources(folder: &Path, into: &mut Vec<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(fs::read_to_string(&path).unwrap());
        }
    }
}

/// Whether a file has a test of this name that is run: by an attribute, or by a list of trials.
fn runs(source: &str, test: &str) -> bool {
    let Some((before, _)) = source.split_once(&format!("fn {test}(")) else { return false };
    let is_attribute = |line: &str| {
        line.trim_start().starts_with("#[test]") || line.trim_start().starts_with("#[tokio::test")
    };
    let attribute = before.lines().rev().take(3).any(is_attribute);
    attribute || source.contains(&format!("    {test},\n")) || source.contains("proptest! {")
}

fn table() -> impl Iterator<Item = (&'static str, &'static [Proof])> {
    SENTENCES.iter().chain(multiplexed::SENTENCES).copied()
}

#[test]
fn every_sentence_of_the_specification_is_shown_by_something() {
    let page = fs::read_to_string(workspace().join("proto/SESSION.md")).unwrap();
    let written = sentences(&page);
    let known: BTreeMap<&str, &[Proof]> = table().collect();
    assert_eq!(known.len(), table().count(), "a sentence is in the table twice");
    let new: Vec<_> =
        written.iter().filter(|sentence| !known.contains_key(sentence.as_str())).collect();
    assert!(new.is_empty(), "nothing shows these sentences of SESSION.md: {new:#?}");
    let gone: Vec<_> =
        known.keys().filter(|sentence| !written.iter().any(|s| s == *sentence)).collect();
    assert!(gone.is_empty(), "SESSION.md no longer says: {gone:#?}");
}

#[test]
fn what_shows_a_sentence_exists() {
    let mut by_crate = BTreeMap::new();
    for name in ["core", "tls", "agent", "tests"] {
        let mut files = Vec::new();
        for folder in ["src", "tests"].map(|folder| workspace().join(name).join(folder)) {
            if folder.is_dir() {
                sources(&folder, &mut files);
            }
        }
        by_crate.insert(name, files);
    }
    for (sentence, proofs) in table() {
        assert!(!proofs.is_empty(), "nothing shows {sentence:?}");
        for proof in proofs {
            match proof {
                Proof::Here(show) => show(),
                Proof::Test(name) => {
                    let found = by_crate.values().flatten().any(|source| runs(source, name));
                    assert!(found, "no test {name} shows {sentence:?}");
                }
                Proof::Source(name, text) => {
                    let found = by_crate[name].iter().any(|source| source.contains(text));
                    assert!(found, "nothing in {name} says {text:?}: {sentence:?}");
                }
                Proof::Explains => assert_eq!(proofs.len(), 1, "{sentence:?}"),
            }
        }
    }
}

#[test]
fn a_page_is_taken_apart_into_its_sentences() {
    let page = "# A title\n\nOne sentence\nover two lines. Another, e.g. with\n`code`. **Third**.\n\n\
                1. An item.\n   It goes on.\n2. Next\n- Last\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n\
                ```\nx = y\n  z\n```\n";
    let wanted = [
        "One sentence over two lines.",
        "Another, e.g. with `code`.",
        "**Third**.",
        "An item.",
        "It goes on.",
        "Next",
        "Last",
        "| a | b |",
        "| 1 | 2 |",
        "x = y z",
    ];
    assert_eq!(sentences(page), wanted);
}
