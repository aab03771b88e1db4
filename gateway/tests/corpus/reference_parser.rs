//! An independent, stricter parser of HTTP/1.1: returns exactly one message of the bytes, or an
//! error.
//!
//! Shares no code with the engine or httparse, so that it does not share their mistakes. Accepts
//! only what a careful sender writes: CRLF, one framing, chunk sizes without extensions.

use super::format::latin1;

/// Name and value of a field line, one character per byte.
pub(crate) type Line = (String, String);

/// A message, complete or partial.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Message {
    /// Request line or status line.
    pub(crate) start: String,
    pub(crate) fields: Vec<Line>,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: Vec<Line>,
    /// Bytes of the message, framing included.
    pub(crate) length: usize,
    /// Sequence number of the message, where the receiver counts messages.
    pub(crate) number: usize,
}

impl Message {
    pub(crate) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.fields.iter().filter(move |(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub(crate) fn get<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        self.all(name).next()
    }

    pub(crate) fn status(&self) -> u16 {
        self.start.get(9..12).and_then(|code| code.parse().ok()).unwrap_or(0)
    }
}

/// Result of parsing the available bytes.
#[derive(Clone, Debug)]
pub(crate) enum ParseResult {
    Complete(Message),
    /// Well-formed so far. Holds the message if its head is complete.
    Partial(Option<Message>),
}

enum Framing {
    None,
    Length(usize),
    Chunked,
    UntilClose,
}

/// The next line without its CRLF and the offset after it; `None` if it is incomplete.
fn line(bytes: &[u8], at: usize) -> Result<Option<(&[u8], usize)>, String> {
    let rest = &bytes[at.min(bytes.len())..];
    let Some(lf) = rest.iter().position(|byte| *byte == b'\n') else {
        let inner = &rest[..rest.len().saturating_sub(usize::from(rest.last() == Some(&b'\r')))];
        return if inner.contains(&b'\r') { Err(format!("bare CR in {:?}", latin1(rest))) } else { Ok(None) };
    };
    match rest[..lf].split_last() {
        Some((b'\r', text)) if !text.contains(&b'\r') => Ok(Some((text, at + lf + 1))),
        _ => Err(format!("bad line end in {:?}", latin1(&rest[..=lf]))),
    }
}

fn is_token(text: &[u8]) -> bool {
    let is_tchar =
        |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z') || b"!#$%&'*+-.^_`|~".contains(byte);
    !text.is_empty() && text.iter().all(is_tchar)
}

fn field(text: &[u8]) -> Result<Line, String> {
    let wrong = || format!("bad field line {:?}", latin1(text));
    let colon = text.iter().position(|byte| *byte == b':').ok_or_else(wrong)?;
    let (name, value) = (&text[..colon], &text[colon + 1..]);
    if !is_token(name) || !value.iter().all(|byte| *byte == b'\t' || (*byte >= b' ' && *byte != 0x7f)) {
        return Err(wrong());
    }
    let start = value.iter().position(|byte| !b" \t".contains(byte)).unwrap_or(value.len());
    let end = value.iter().rposition(|byte| !b" \t".contains(byte)).map_or(start, |last| last + 1);
    Ok((latin1(name), latin1(&value[start..end])))
}

/// Field lines up to the empty line; `None` if incomplete.
fn section(bytes: &[u8], mut at: usize) -> Result<Option<(Vec<Line>, usize)>, String> {
    let mut fields = Vec::new();
    while let Some((text, next)) = line(bytes, at)? {
        at = next;
        if text.is_empty() {
            return Ok(Some((fields, at)));
        }
        fields.push(field(text)?);
    }
    Ok(None)
}

fn framing(message: &Message) -> Result<Framing, String> {
    let lengths: Vec<&str> = message.all("content-length").collect();
    let codings: Vec<&str> = message.all("transfer-encoding").collect();
    match (lengths.as_slice(), codings.as_slice()) {
        ([], []) => Ok(Framing::UntilClose),
        ([length], []) if !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit()) => {
            length.parse().map(Framing::Length).map_err(|_| format!("length {length:?}"))
        }
        ([], ["chunked"]) => Ok(Framing::Chunked),
        _ => Err(format!("framing by lengths {lengths:?} and codings {codings:?}")),
    }
}

/// Parses a request at the front of `bytes`, as a strict origin.
pub(crate) fn request(bytes: &[u8]) -> Result<ParseResult, String> {
    let Some((start, at)) = line(bytes, 0)? else { return Ok(ParseResult::Partial(None)) };
    let parts: Vec<&[u8]> = start.split(|byte| *byte == b' ').collect();
    let is_target = |target: &[u8]| {
        (target.starts_with(b"/") || target == b"*")
            && target.iter().all(|byte| (b'!'..=b'~').contains(byte) && *byte != b'#')
    };
    match parts.as_slice() {
        [method, target, b"HTTP/1.1"] if is_token(method) && is_target(target) => {}
        _ => return Err(format!("request line {:?}", latin1(start))),
    }
    let Some((fields, at)) = section(bytes, at)? else { return Ok(ParseResult::Partial(None)) };
    let message = Message { start: latin1(start), fields, ..Message::default() };
    if message.all("host").count() != 1 {
        return Err(format!("{} Host lines", message.all("host").count()));
    }
    if let Some(name) =
        ["te", "trailer", "keep-alive", "proxy-connection"].into_iter().find(|name| message.get(name).is_some())
    {
        return Err(format!("the hop-by-hop field {name} was forwarded"));
    }
    let framing = match framing(&message)? {
        // A request without framing has no body.
        Framing::UntilClose => Framing::None,
        framing => framing,
    };
    body(bytes, at, message, &framing, false)
}

/// Parses a response at the front of `bytes`; `at_end`: the connection has ended.
pub(crate) fn response(bytes: &[u8], is_head: bool, at_end: bool) -> Result<ParseResult, String> {
    let Some((start, at)) = line(bytes, 0)? else { return Ok(ParseResult::Partial(None)) };
    let is_start = start.len() >= 13
        && start.starts_with(b"HTTP/1.1 ")
        && start[9..12].iter().all(u8::is_ascii_digit)
        && (b'1'..=b'9').contains(&start[9])
        && start[12] == b' ';
    if !is_start {
        return Err(format!("status line {:?}", latin1(start)));
    }
    let Some((fields, at)) = section(bytes, at)? else { return Ok(ParseResult::Partial(None)) };
    let message = Message { start: latin1(start), fields, ..Message::default() };
    let has_no_body = is_head || matches!(message.status(), 100..=199 | 204 | 304);
    let announced = framing(&message)?;
    if matches!(message.status(), 100..=199 | 204) && !matches!(announced, Framing::UntilClose) {
        return Err(format!("framing fields in a {}", message.status()));
    }
    body(bytes, at, message, if has_no_body { &Framing::None } else { &announced }, at_end)
}

#[expect(clippy::too_many_arguments, reason = "one step of two parsers, with the state of their callers")]
fn body(
    bytes: &[u8],
    mut at: usize,
    mut message: Message,
    framing: &Framing,
    at_end: bool,
) -> Result<ParseResult, String> {
    match framing {
        Framing::None => {}
        Framing::Length(length) => {
            let end = at.saturating_add(*length).min(bytes.len());
            message.body.extend_from_slice(&bytes[at..end]);
            if message.body.len() < *length {
                return Ok(ParseResult::Partial(Some(message)));
            }
            at = end;
        }
        Framing::UntilClose => {
            message.body.extend_from_slice(&bytes[at..]);
            if !at_end {
                return Ok(ParseResult::Partial(Some(message)));
            }
            at = bytes.len();
        }
        Framing::Chunked => loop {
            let Some((size, next)) = line(bytes, at)? else { return Ok(ParseResult::Partial(Some(message))) };
            if size.is_empty() || size.len() > 8 || !size.iter().all(u8::is_ascii_hexdigit) {
                return Err(format!("chunk size {:?}", latin1(size)));
            }
            let size = usize::from_str_radix(&latin1(size), 16).map_err(|error| error.to_string())?;
            if size == 0 {
                let Some((trailers, next)) = section(bytes, next)? else {
                    return Ok(ParseResult::Partial(Some(message)));
                };
                (message.trailers, at) = (trailers, next);
                break;
            }
            let rest = &bytes[next..];
            message.body.extend_from_slice(&rest[..size.min(rest.len())]);
            match rest.get(size..size + 2) {
                Some(b"\r\n") => at = next + size + 2,
                Some(other) => return Err(format!("{other:?} after a chunk")),
                None => return Ok(ParseResult::Partial(Some(message))),
            }
        },
    }
    message.length = at;
    Ok(ParseResult::Complete(message))
}
