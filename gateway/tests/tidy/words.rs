//! The words of the project: private names stay out, a public type's name is unique, comments are
//! narrow enough to read.

use std::collections::BTreeMap;

use super::source::{SourceFile, assert_none, pages, read, sources, word};

/// The directories that are checked.
const SOURCES: [&str; 9] = [
    "limiter/src",
    "limiter/tests",
    "shard/src",
    "shard/tests",
    "gateway/src",
    "gateway/tests",
    "gateway/benches",
    "gateway/fuzz",
    "loadtest/src",
];

/// Columns of a comment line, indentation included.
const COMMENT_WIDTH: usize = 100;

fn is_comment(line: &str) -> bool {
    line.trim_start().starts_with("//")
}

fn wide_comments(file: &SourceFile) -> Vec<String> {
    let lines = file.text.lines().filter(|line| is_comment(line) && line.chars().count() > COMMENT_WIDTH);
    let offset = |line: &str| line.as_ptr().addr() - file.text.as_ptr().addr();
    lines.map(|line| file.offence(offset(line), "a comment line above 100 columns", "wrap it")).collect()
}

#[test]
fn comment_lines_fit_100_columns() {
    let wide = format!("//! A.\nlet a = \"{0}\";\n    // {0}\n", "b".repeat(100));
    assert_eq!(wide_comments(&SourceFile::new("a.rs", wide)).len(), 1);
    assert_none(SOURCES.iter().flat_map(|path| sources(path)).flat_map(|file| wide_comments(&file)).collect());
}

/// The names of the public types that a file defines, with their offsets.
fn public_types(file: &SourceFile) -> Vec<(String, usize)> {
    let code = file.product();
    let mut found = Vec::new();
    let mut at = 0;
    for line in code.split_inclusive('\n') {
        let mut words = line.split_whitespace();
        if words.next().is_some_and(|first| first == "pub" || first.starts_with("pub(")) {
            let kind = words.next().unwrap_or_default();
            let name = word(words.next().unwrap_or_default());
            if matches!(kind, "struct" | "enum" | "trait" | "type" | "union") && !name.is_empty() {
                found.push((name.to_owned(), at));
            }
        }
        at += line.len();
    }
    found
}

fn repeated_types(files: &[SourceFile]) -> Vec<String> {
    let mut first: BTreeMap<String, String> = BTreeMap::new();
    let mut offences = Vec::new();
    for file in files {
        for (name, at) in public_types(file) {
            let what = format!("a second public type `{name}`");
            match first.get(&name) {
                Some(path) => offences.push(file.offence(at, &what, &format!("{path} has one"))),
                None => drop(first.insert(name, file.path.clone())),
            }
        }
    }
    offences
}

#[test]
fn names_of_public_types_are_unique() {
    let (a, b) =
        ("pub struct A;\nstruct B;\n// pub enum C {}\n", "pub(crate) enum A {}\npub(super) type C = B;\nenum B {}");
    let files = [SourceFile::new("a.rs", a), SourceFile::new("b.rs", b)];
    assert_eq!(repeated_types(&files).len(), 1);
    let crates = ["limiter/src", "shard/src", "gateway/src", "loadtest/src"];
    assert_none(repeated_types(&crates.into_iter().flat_map(sources).collect::<Vec<_>>()));
}

/// Identifiers that were private to this project. docs/glossary.md has the standard terms.
const OLD_NAMES: [&str; 67] = [
    // Types.
    "Alarm",
    "Asked",
    "Bank",
    "Board",
    "Debt",
    "Described",
    "Desk",
    "Door",
    "Endings",
    "Enrolment",
    "Face",
    "Facts",
    "Feed",
    "Filling",
    "Fit",
    "Floor",
    "Ghosts",
    "Hall",
    "Heard",
    "Held",
    "Inquiry",
    "Lane",
    "Moment",
    "Near",
    "NearCopy",
    "News",
    "Notice",
    "Papers",
    "Passage",
    "Posted",
    "Roll",
    "Saying",
    "Seen",
    "Settings",
    "Sheet",
    "Shelf",
    "Site",
    "Spot",
    "Still",
    "Story",
    "Suppliers",
    "Talk",
    "Tally",
    "Tells",
    "Told",
    "Treasury",
    "Turn",
    "Visit",
    "Visitor",
    "Votes",
    "Whither",
    "Wire",
    "Wishes",
    // Functions, fields and variables.
    "enrol",
    "ghosts",
    "haunted",
    "heard",
    "heed",
    "newcomer",
    "on_share",
    "sight_lost",
    "strangers",
    "tell",
    "told",
    "treasury",
    "untold",
    "visitor",
];

/// Words in comments and documents that tell a story instead of a fact.
const STORY_WORDS: [&str; 17] = [
    "afresh",
    "anybody",
    "believes",
    "believed",
    "everybody",
    "haunted",
    "hears",
    "heeds",
    "nobody",
    "owes",
    "somebody",
    "strangers",
    "newcomers",
    "whatsoever",
    "whither",
    "whoever",
    "whom",
];

/// The offsets of `name` in `text`, as a whole word.
fn whole_words<'t>(text: &'t str, name: &'t str) -> impl Iterator<Item = usize> + 't {
    let is_part = |it: char| it.is_alphanumeric() || it == '_';
    text.match_indices(name)
        .map(|(at, _)| at)
        .filter(move |at| !text[..*at].ends_with(is_part) && !text[at + name.len()..].starts_with(is_part))
}

fn old_names(file: &SourceFile) -> Vec<String> {
    let code = file.code();
    let found = OLD_NAMES.iter().flat_map(|name| whole_words(&code, name).map(move |at| (at, name)));
    found.map(|(at, name)| file.offence(at, &format!("`{name}`"), "docs/glossary.md has the standard term")).collect()
}

#[test]
fn old_names_stay_out_of_the_code() {
    let text = "//! Told.\nfn told() -> TollTold { \"told\" }\nlet a = retold;";
    assert_eq!(old_names(&SourceFile::new("a.rs", text)).len(), 1);
    let files = SOURCES.iter().flat_map(|path| sources(path)).filter(|file| !file.path.ends_with("tidy/words.rs"));
    assert_none(files.flat_map(|file| old_names(&file)).collect());
}

fn story_words(file: &SourceFile) -> Vec<String> {
    let is_source = file.path.ends_with(".rs");
    let mut offences = Vec::new();
    let mut at = 0;
    for line in file.text.split_inclusive('\n') {
        if !is_source || is_comment(line) {
            let lower = line.to_ascii_lowercase();
            for word in STORY_WORDS {
                for offset in whole_words(&lower, word) {
                    offences.push(file.offence(at + offset, &format!("`{word}`"), "state the fact (CONTRIBUTING.md)"));
                }
            }
        }
        at += line.len();
    }
    offences
}

#[test]
fn comments_and_documents_state_facts() {
    let text = "//! Nobody waits.\nlet nobody = 1;\n";
    assert_eq!(story_words(&SourceFile::new("a.rs", text)).len(), 1);
    assert_eq!(story_words(&SourceFile::new("a.md", text)).len(), 2);
    let pages = ["docs", "docs/adr", "docs/cookbook"].into_iter().flat_map(pages);
    let pages = pages.chain(["README.md", "CONTRIBUTING.md", "SECURITY.md"].map(read));
    let files = SOURCES.iter().flat_map(|path| sources(path)).chain(pages);
    let files = files.filter(|file| !file.path.ends_with("tidy/words.rs"));
    assert_none(files.flat_map(|file| story_words(&file)).collect());
}

/// Sentences that begin with a noun clause and have no subject before it.
const CLAUSES: [&str; 6] = ["Who ", "Whom ", "Whoever ", "What ", "Whatever ", "Where "];

fn noun_clauses(file: &SourceFile) -> Vec<String> {
    let mut offences = Vec::new();
    let mut at = 0;
    for line in file.text.split_inclusive('\n') {
        if is_comment(line) {
            let text = line.trim_start().trim_start_matches(['/', '!']).trim_start();
            let begins = text.as_ptr().addr() - line.as_ptr().addr();
            let sentences = line.match_indices(". ").map(|(end, stop)| end + stop.len());
            for sentence in sentences.chain([begins]) {
                if CLAUSES.iter().any(|clause| line[sentence..].starts_with(clause)) {
                    offences.push(file.offence(at + sentence, "a sentence without a subject", "name the thing first"));
                }
            }
        }
        at += line.len();
    }
    offences
}

#[test]
fn sentences_in_comments_have_a_subject() {
    let text = "//! What waits.\n/// A lock. Where it waits.\nlet a = \"What \";\n// The place where it waits.\n";
    assert_eq!(noun_clauses(&SourceFile::new("a.rs", text)).len(), 2);
    assert_none(SOURCES.iter().flat_map(|path| sources(path)).flat_map(|file| noun_clauses(&file)).collect());
}
