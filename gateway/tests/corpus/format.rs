//! Reads the corpus: cases as lines of text, bytes with escapes (see `corpus/README.md`). A malformed file is a failed test.

use std::path::{Path, PathBuf};

/// One step of a client.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    Send(Vec<u8>),
    AwaitInterim,
    Finish,
}

/// An answer that the client of a request case must get.
#[derive(Clone, Debug)]
pub(crate) struct Get {
    pub(crate) status: u16,
    /// The metric's label, where the gateway refuses.
    pub(crate) reason: Option<String>,
    pub(crate) is_head: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    Open,
    Close,
    Any,
}

/// A request as the origin must get it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sees {
    pub(crate) line: String,
    pub(crate) fields: Vec<String>,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: Vec<String>,
}

#[derive(Clone, Debug)]
pub(crate) struct RequestCase {
    pub(crate) name: String,
    pub(crate) acts: Vec<Act>,
    pub(crate) gets: Vec<Get>,
    pub(crate) then: Then,
    pub(crate) sees: Vec<Sees>,
    pub(crate) may_begin: bool,
    /// What is known to be missing, so that the case fails.
    pub(crate) gap: Option<String>,
}

#[derive(Clone, Debug)]
pub(crate) struct AnswerCase {
    pub(crate) name: String,
    pub(crate) method: String,
    pub(crate) is_http10: bool,
    /// Further field lines of the client's request.
    pub(crate) asks_with: Vec<u8>,
    pub(crate) origin: Vec<u8>,
    pub(crate) ends: bool,
    pub(crate) status: u16,
    /// Interim answers that the client must get before.
    pub(crate) interim: Vec<u16>,
    /// Bytes behind a 101, as they are.
    pub(crate) tunnel: Vec<u8>,
    /// `error` of `Proxy-Status`, where the gateway answers for the origin.
    pub(crate) error: Option<String>,
    pub(crate) fields: Vec<String>,
    pub(crate) absent: Vec<String>,
    pub(crate) body: Option<Vec<u8>>,
    pub(crate) trailers: Vec<String>,
    pub(crate) is_cut: bool,
    pub(crate) reuse: Option<bool>,
    /// What is known to be missing, so that the case fails.
    pub(crate) gap: Option<String>,
}

/// The files of one kind, by name.
pub(crate) fn files(kind: &str) -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(kind);
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(dir).expect("the corpus").map(|entry| entry.expect("a readable entry").path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    files.sort();
    files
}

/// A statement: its place, its word, its rest.
type Statement = (String, String, String);

/// The cases of a file as lists of statements, the first of which names the case.
fn cases(path: &Path) -> Vec<Vec<Statement>> {
    let text = std::fs::read_to_string(path).expect("a text file");
    let mut cases: Vec<Vec<Statement>> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        let at = format!("{}:{}", path.file_name().unwrap_or_default().to_string_lossy(), number + 1);
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let statement = (at, word.to_owned(), rest.trim_start().to_owned());
        if word == "case" {
            cases.push(vec![statement]);
        } else {
            cases.last_mut().unwrap_or_else(|| panic!("{line:?} before the first case")).push(statement);
        }
    }
    cases
}

pub(crate) fn requests(path: &Path) -> Vec<RequestCase> {
    cases(path).iter().map(|statements| request(statements)).collect()
}

fn request(statements: &[Statement]) -> RequestCase {
    let mut case = RequestCase {
        name: statements[0].2.clone(),
        acts: Vec::new(),
        gets: Vec::new(),
        then: Then::Open,
        sees: Vec::new(),
        may_begin: false,
        gap: None,
    };
    for (at, word, rest) in &statements[1..] {
        let seen = |case: &mut RequestCase| case.sees.len().checked_sub(1).unwrap_or_else(|| panic!("{at}: no `sees`"));
        match word.as_str() {
            "send" => match case.acts.last_mut() {
                Some(Act::Send(bytes)) => bytes.extend(unescape(at, rest)),
                _ => case.acts.push(Act::Send(unescape(at, rest))),
            },
            "await" => case.acts.push(Act::AwaitInterim),
            "finish" => case.acts.push(Act::Finish),
            "gets" => {
                let (status, word) = status_and_word(at, rest);
                let is_head = word.as_deref() == Some("head");
                case.gets.push(Get { status, reason: word.filter(|_| !is_head), is_head });
            }
            "then" if rest == "close" => case.then = Then::Close,
            "then" if rest == "any" => case.then = Then::Any,
            "sees" => case.sees.push(Sees { line: text(at, rest), ..Sees::default() }),
            "with" => {
                let index = seen(&mut case);
                case.sees[index].fields.push(text(at, rest));
            }
            "body" => {
                let index = seen(&mut case);
                case.sees[index].body.extend(unescape(at, rest));
            }
            "trailer" => {
                let index = seen(&mut case);
                case.sees[index].trailers.push(text(at, rest));
            }
            "begins" => case.may_begin = true,
            "gap" => case.gap = Some(rest.clone()),
            _ => panic!("{at}: unknown statement {word:?} {rest:?}"),
        }
    }
    if case.gets.iter().any(|get| get.reason.is_some()) {
        case.then = Then::Close;
    }
    assert!(!case.acts.is_empty(), "{}: nothing is sent", statements[0].0);
    case
}

pub(crate) fn answers(path: &Path) -> Vec<AnswerCase> {
    cases(path).iter().map(|statements| answer(statements)).collect()
}

fn answer(statements: &[Statement]) -> AnswerCase {
    let mut case = AnswerCase {
        name: statements[0].2.clone(),
        method: "GET".into(),
        is_http10: false,
        asks_with: Vec::new(),
        origin: Vec::new(),
        ends: false,
        status: 0,
        interim: Vec::new(),
        tunnel: Vec::new(),
        error: None,
        fields: Vec::new(),
        absent: Vec::new(),
        body: None,
        trailers: Vec::new(),
        is_cut: false,
        reuse: None,
        gap: None,
    };
    for (at, word, rest) in &statements[1..] {
        match word.as_str() {
            "asks" => {
                case.is_http10 = rest.ends_with(" 1.0");
                case.method = rest.trim_end_matches(" 1.0").to_owned();
            }
            "asking" => {
                case.asks_with.extend(unescape(at, rest));
                case.asks_with.extend(b"\r\n");
            }
            "interim" => case.interim.push(rest.parse().unwrap_or_else(|_| panic!("{at}: a status"))),
            "tunnel" => case.tunnel.extend(unescape(at, rest)),
            "gap" => case.gap = Some(rest.clone()),
            "origin" => case.origin.extend(unescape(at, rest)),
            "ends" => case.ends = true,
            "gets" => (case.status, case.error) = status_and_word(at, rest),
            "with" => case.fields.push(text(at, rest)),
            "without" => case.absent.push(rest.clone()),
            "body" => case.body.get_or_insert_default().extend(unescape(at, rest)),
            "trailer" => case.trailers.push(text(at, rest)),
            "cut" => case.is_cut = true,
            "reuse" => case.reuse = Some(rest == "yes"),
            _ => panic!("{at}: unknown statement {word:?} {rest:?}"),
        }
    }
    assert!(case.status != 0 || case.is_cut, "{}: nothing is expected", statements[0].0);
    assert!(case.reuse.is_some(), "{}: `reuse` is missing", statements[0].0);
    case
}

/// Counts the cases that say of themselves that they fail, and names those that no longer do.
pub(crate) fn gaps<'a>(cases: impl Iterator<Item = (&'a str, bool)>) -> Result<usize, Vec<String>> {
    let (failing, passing): (Vec<_>, Vec<_>) = cases.partition(|(_, fails)| *fails);
    if passing.is_empty() {
        return Ok(failing.len());
    }
    Err(passing.iter().map(|(name, _)| format!("{name}: the gap is closed, its line can go")).collect())
}

fn status_and_word(at: &str, rest: &str) -> (u16, Option<String>) {
    let (status, word) = rest.split_once(' ').map_or((rest, None), |(status, word)| (status, Some(word)));
    let status = status.parse().unwrap_or_else(|_| panic!("{at}: a status"));
    (status, word.map(|word| word.trim().to_owned()))
}

/// Bytes of a head as text: one character per byte, so that nothing is lost.
pub(crate) fn latin1(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| char::from(*byte)).collect()
}

fn text(at: &str, escaped: &str) -> String {
    latin1(&unescape(at, escaped))
}

/// The bytes that an escaped text stands for.
pub(crate) fn unescape(at: &str, text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        match byte {
            b'\\' => {
                let (byte, length) = escape(at, after);
                bytes.push(byte);
                rest = &after[length..];
            }
            b'{' => {
                let end = after.iter().position(|byte| *byte == b'}').unwrap_or_else(|| panic!("{at}: an open brace"));
                let inner = std::str::from_utf8(&after[..end]).expect("part of a text");
                let (piece, count) = inner.rsplit_once('*').unwrap_or_else(|| panic!("{at}: no count in {inner:?}"));
                let count = count.parse().unwrap_or_else(|_| panic!("{at}: a count"));
                bytes.extend(unescape(at, piece).repeat(count));
                rest = &after[end + 1..];
            }
            _ => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    bytes
}

/// One escape after its backslash: the byte, and how long the escape is.
fn escape(at: &str, text: &[u8]) -> (u8, usize) {
    match text.first() {
        Some(b'r') => (b'\r', 1),
        Some(b'n') => (b'\n', 1),
        Some(b't') => (b'\t', 1),
        Some(b'0') => (0, 1),
        Some(b's') => (b' ', 1),
        Some(plain @ (b'\\' | b'{')) => (*plain, 1),
        Some(b'x') => {
            let digits = text.get(1..3).and_then(|digits| std::str::from_utf8(digits).ok()).unwrap_or_default();
            (u8::from_str_radix(digits, 16).unwrap_or_else(|_| panic!("{at}: bad \\x")), 3)
        }
        _ => panic!("{at}: unknown escape"),
    }
}
