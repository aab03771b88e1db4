//! The text of the repository's files, as the checks read it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A file of the repository, by its path from the root.
pub(crate) struct SourceFile {
    pub(crate) path: String,
    pub(crate) text: String,
}

impl SourceFile {
    pub(crate) fn new(path: &str, text: impl Into<String>) -> Self {
        SourceFile { path: path.to_owned(), text: text.into() }
    }

    /// One line of a failed check. `at` is an offset into the text.
    pub(crate) fn offence(&self, at: usize, what: &str, why: &str) -> String {
        let line = self.text.as_bytes()[..at].iter().filter(|byte| **byte == b'\n').count() + 1;
        format!("{}:{line}: {what}; {why}", self.path)
    }

    /// The code: comments and literals are blanked, so that offsets stay valid.
    pub(crate) fn code(&self) -> String {
        code(&self.text)
    }

    /// The code that ships: comments, literals and items under `#[cfg(test)]` are blanked, so that
    /// offsets stay valid.
    pub(crate) fn product(&self) -> String {
        const MARK: &str = "#[cfg(test)]";
        let is_test = self.path.split('/').any(|part| matches!(part, "tests" | "tests.rs"));
        let mut code = if is_test { String::new() } else { self.code() };
        while let Some(begin) = code.find(MARK) {
            let mut depth = 0;
            let end = code.bytes().skip(begin + MARK.len()).position(|byte| {
                depth += i32::from(b"([{".contains(&byte)) - i32::from(b")]}".contains(&byte));
                depth < 0 || depth == 0 && matches!(byte, b';' | b'}')
            });
            let end = end.map_or(code.len(), |end| begin + MARK.len() + end + 1);
            code.replace_range(begin..end, &blank(&code[begin..end]));
        }
        code
    }
}

/// A file of the repository.
pub(crate) fn read(path: &str) -> SourceFile {
    let text = std::fs::read_to_string(root().join(path));
    SourceFile::new(path, text.unwrap_or_else(|error| panic!("{path}: {error}")))
}

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace around the crate").to_owned()
}

/// The sources below `directory`, in order.
pub(crate) fn sources(directory: &str) -> Vec<SourceFile> {
    let entries = std::fs::read_dir(root().join(directory)).unwrap_or_else(|error| panic!("{directory}: {error}"));
    let names = entries.map(|entry| entry.expect("a readable directory").file_name());
    let paths: BTreeSet<_> = names.map(|name| format!("{directory}/{}", name.to_string_lossy())).collect();
    let (here, rest): (Vec<_>, Vec<_>) = paths.into_iter().partition(|path| path.ends_with(".rs"));
    let below = rest.iter().filter(|path| root().join(path).is_dir()).flat_map(|path| sources(path));
    here.iter().map(|path| read(path)).chain(below).collect()
}

/// The Markdown pages in `directory`, without its subdirectories.
pub(crate) fn pages(directory: &str) -> Vec<SourceFile> {
    let entries = std::fs::read_dir(root().join(directory)).unwrap_or_else(|error| panic!("{directory}: {error}"));
    let names = entries.map(|entry| entry.expect("a readable directory").file_name());
    let paths: BTreeSet<_> = names.map(|name| format!("{directory}/{}", name.to_string_lossy())).collect();
    paths.iter().filter(|path| path.ends_with(".md")).map(|path| read(path)).collect()
}

#[track_caller]
pub(crate) fn assert_none(offences: Vec<String>) {
    assert!(offences.is_empty(), "{} offences:\n{}", offences.len(), offences.join("\n"));
}

/// `text` with comments and literals blanked; offsets stay valid.
fn code(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    while let Some(first) = text[out.len()..].chars().next() {
        let rest = &text[out.len()..];
        match literal(rest) {
            0 if first.is_ascii() => out.push(first),
            length => out.push_str(&blank(&rest[..length.max(first.len_utf8())])),
        }
    }
    out
}

fn blank(text: &str) -> String {
    text.bytes().map(|byte| if byte == b'\n' { '\n' } else { ' ' }).collect()
}

/// The bytes of the comment or literal that `rest` begins with; 0 where it begins with neither.
fn literal(rest: &str) -> usize {
    let upto = |from: usize, end: &str| rest[from..].find(end).map_or(rest.len(), |at| from + at + end.len());
    let hashes = rest.bytes().skip(1).take_while(|byte| *byte == b'#').count();
    match rest.as_bytes() {
        [b'/', b'/', ..] => rest.find('\n').unwrap_or(rest.len()),
        [b'/', b'*', ..] => upto(2, "*/"),
        [b'r', ..] if rest[1 + hashes..].starts_with('"') => upto(2 + hashes, &format!("\"{}", "#".repeat(hashes))),
        [b'"', bytes @ ..] => {
            let mut at = 0;
            while bytes.get(at).is_some_and(|byte| *byte != b'"') {
                at += 1 + usize::from(bytes[at] == b'\\');
            }
            (at + 2).min(rest.len())
        }
        [b'\'', b'\\', ..] => upto(3, "'"),
        // Without a closing quote it is a lifetime.
        [b'\'', ..] => rest.char_indices().nth(2).filter(|(_, it)| *it == '\'').map_or(0, |(at, _)| at + 1),
        _ => 0,
    }
}

/// The identifier that `text` begins with.
pub(crate) fn word(text: &str) -> &str {
    text.split(|it: char| !it.is_ascii_alphanumeric() && it != '_').next().unwrap_or_default()
}

/// The texts between pairs of `quote`, from `start` to `end`.
pub(crate) fn quoted(text: &str, start: &str, end: &str, quote: char) -> BTreeSet<String> {
    let part = text.split_once(start).and_then(|(_, rest)| rest.split_once(end)).map_or("", |(part, _)| part);
    part.split(quote).skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn product_blanks_comments_literals_and_tests() {
    let text = "a(\"x\\\"{\"); // b\nlet c = '\"'; /* é */ e::<'f>(r#\"g\"\"#, b'\\'', '{');\n#[cfg(test)]\nmod tests { }\nh\n\
                #[cfg(test)] use d;\n#[cfg(test)]\nfn e([u8; 2]) {}\ni";
    let product = SourceFile::new("a.rs", text).product();
    assert_eq!(product.split_whitespace().collect::<String>(), "a();letc=;e::<'f>(,b,);hi");
    assert_eq!(product.len(), text.len());
}
