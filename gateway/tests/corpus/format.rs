//! Parses the corpus files: cases as lines of text, bytes with escapes (see `corpus/README.md`). A
//! malformed file fails the test.

use std::path::{Path, PathBuf};

/// A step of the client in a request case.
#[derive(Clone, Debug)]
pub(crate) enum ClientStep {
    Send(Vec<u8>),
    AwaitInterim,
    /// Shuts down the sending side.
    Shutdown,
}

/// A response that the client of a request case must receive.
#[derive(Clone, Debug)]
pub(crate) struct ExpectedResponse {
    pub(crate) status: u16,
    /// The metric label, if the gateway refuses the request.
    pub(crate) reason: Option<String>,
    pub(crate) is_head: bool,
}

/// The state of the connection after the responses of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConnectionAfter {
    Open,
    Close,
    Any,
}

/// A request that the origin must receive.
#[derive(Clone, Debug, Default)]
pub(crate) struct ExpectedRequest {
    pub(crate) line: String,
    pub(crate) fields: Vec<String>,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: Vec<String>,
}

#[derive(Clone, Debug)]
pub(crate) struct RequestCase {
    pub(crate) name: String,
    pub(crate) steps: Vec<ClientStep>,
    pub(crate) responses: Vec<ExpectedResponse>,
    pub(crate) connection_after: ConnectionAfter,
    pub(crate) origin_requests: Vec<ExpectedRequest>,
    pub(crate) partial_allowed: bool,
    /// Why the case is known to fail.
    pub(crate) known_failure: Option<String>,
}

#[derive(Clone, Debug)]
pub(crate) struct ResponseCase {
    pub(crate) name: String,
    pub(crate) method: String,
    pub(crate) is_http10: bool,
    /// Additional field lines of the client's request.
    pub(crate) request_fields: Vec<u8>,
    pub(crate) origin: Vec<u8>,
    /// Whether the origin closes the connection after its response.
    pub(crate) origin_closes: bool,
    pub(crate) status: u16,
    /// Interim responses that the client must receive before.
    pub(crate) interim: Vec<u16>,
    /// Raw bytes after a 101 response.
    pub(crate) tunnel: Vec<u8>,
    /// `error` of `Proxy-Status`, if the gateway responds instead of the origin.
    pub(crate) error: Option<String>,
    pub(crate) fields: Vec<String>,
    pub(crate) absent_fields: Vec<String>,
    pub(crate) body: Option<Vec<u8>>,
    pub(crate) trailers: Vec<String>,
    pub(crate) is_truncated: bool,
    pub(crate) reuse: Option<bool>,
    /// Why the case is known to fail.
    pub(crate) known_failure: Option<String>,
}

/// The corpus files of a kind, sorted by name.
pub(crate) fn files(kind: &str) -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(kind);
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(dir).expect("the corpus").map(|entry| entry.expect("a readable entry").path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    files.sort();
    files
}

/// A statement: its location, keyword and argument.
type Statement = (String, String, String);

/// The cases of a file as lists of statements. The first statement is the name of the case.
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
        steps: Vec::new(),
        responses: Vec::new(),
        connection_after: ConnectionAfter::Open,
        origin_requests: Vec::new(),
        partial_allowed: false,
        known_failure: None,
    };
    for (at, word, rest) in &statements[1..] {
        let last_index = |case: &mut RequestCase| {
            case.origin_requests.len().checked_sub(1).unwrap_or_else(|| panic!("{at}: no `origin-request`"))
        };
        match word.as_str() {
            "send" => match case.steps.last_mut() {
                Some(ClientStep::Send(bytes)) => bytes.extend(unescape(at, rest)),
                _ => case.steps.push(ClientStep::Send(unescape(at, rest))),
            },
            "await" => case.steps.push(ClientStep::AwaitInterim),
            "shutdown" => case.steps.push(ClientStep::Shutdown),
            "response" => {
                let (status, word) = status_and_word(at, rest);
                let is_head = word.as_deref() == Some("head");
                case.responses.push(ExpectedResponse { status, reason: word.filter(|_| !is_head), is_head });
            }
            "connection" if rest == "close" => case.connection_after = ConnectionAfter::Close,
            "connection" if rest == "any" => case.connection_after = ConnectionAfter::Any,
            "origin-request" => {
                case.origin_requests.push(ExpectedRequest { line: text(at, rest), ..ExpectedRequest::default() })
            }
            "field" => {
                let index = last_index(&mut case);
                case.origin_requests[index].fields.push(text(at, rest));
            }
            "body" => {
                let index = last_index(&mut case);
                case.origin_requests[index].body.extend(unescape(at, rest));
            }
            "trailer" => {
                let index = last_index(&mut case);
                case.origin_requests[index].trailers.push(text(at, rest));
            }
            "partial-allowed" => case.partial_allowed = true,
            "known-failure" => case.known_failure = Some(rest.clone()),
            _ => panic!("{at}: unknown statement {word:?} {rest:?}"),
        }
    }
    if case.responses.iter().any(|get| get.reason.is_some()) {
        case.connection_after = ConnectionAfter::Close;
    }
    assert!(!case.steps.is_empty(), "{}: no `send`", statements[0].0);
    case
}

pub(crate) fn responses(path: &Path) -> Vec<ResponseCase> {
    cases(path).iter().map(|statements| response(statements)).collect()
}

fn response(statements: &[Statement]) -> ResponseCase {
    let mut case = ResponseCase {
        name: statements[0].2.clone(),
        method: "GET".into(),
        is_http10: false,
        request_fields: Vec::new(),
        origin: Vec::new(),
        origin_closes: false,
        status: 0,
        interim: Vec::new(),
        tunnel: Vec::new(),
        error: None,
        fields: Vec::new(),
        absent_fields: Vec::new(),
        body: None,
        trailers: Vec::new(),
        is_truncated: false,
        reuse: None,
        known_failure: None,
    };
    for (at, word, rest) in &statements[1..] {
        match word.as_str() {
            "method" => {
                case.is_http10 = rest.ends_with(" 1.0");
                case.method = rest.trim_end_matches(" 1.0").to_owned();
            }
            "request-field" => {
                case.request_fields.extend(unescape(at, rest));
                case.request_fields.extend(b"\r\n");
            }
            "interim" => case.interim.push(rest.parse().unwrap_or_else(|_| panic!("{at}: a status"))),
            "tunnel" => case.tunnel.extend(unescape(at, rest)),
            "known-failure" => case.known_failure = Some(rest.clone()),
            "origin" => case.origin.extend(unescape(at, rest)),
            "origin-closes" => case.origin_closes = true,
            "response" => (case.status, case.error) = status_and_word(at, rest),
            "field" => case.fields.push(text(at, rest)),
            "no-field" => case.absent_fields.push(rest.clone()),
            "body" => case.body.get_or_insert_default().extend(unescape(at, rest)),
            "trailer" => case.trailers.push(text(at, rest)),
            "truncated" => case.is_truncated = true,
            "reuse" => case.reuse = Some(rest == "yes"),
            _ => panic!("{at}: unknown statement {word:?} {rest:?}"),
        }
    }
    assert!(case.status != 0 || case.is_truncated, "{}: no expectation", statements[0].0);
    assert!(case.reuse.is_some(), "{}: no `reuse`", statements[0].0);
    case
}

/// Counts the known failures; returns the names of those that no longer fail as errors.
pub(crate) fn known_failures<'a>(cases: impl Iterator<Item = (&'a str, bool)>) -> Result<usize, Vec<String>> {
    let (failing, passing): (Vec<_>, Vec<_>) = cases.partition(|(_, fails)| *fails);
    if passing.is_empty() {
        return Ok(failing.len());
    }
    Err(passing.iter().map(|(name, _)| format!("{name}: passes now, remove its `known-failure`")).collect())
}

fn status_and_word(at: &str, rest: &str) -> (u16, Option<String>) {
    let (status, word) = rest.split_once(' ').map_or((rest, None), |(status, word)| (status, Some(word)));
    let status = status.parse().unwrap_or_else(|_| panic!("{at}: a status"));
    (status, word.map(|word| word.trim().to_owned()))
}

/// Bytes as text, one character per byte, without loss.
pub(crate) fn latin1(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| char::from(*byte)).collect()
}

fn text(at: &str, escaped: &str) -> String {
    latin1(&unescape(at, escaped))
}

/// The bytes of an escaped text.
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

/// Decodes an escape after its backslash: the byte and the length of the escape.
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
