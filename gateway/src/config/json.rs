//! A strict JSON reader (RFC 8259) that keeps the place of every value, which `serde_json` does not.
//!
//! It also refuses what RFC 8259 section 4 leaves open: a name twice in one object.

use std::ops::Range;

use super::document::{Entry, Node, Value};
use super::fault::{At, Code, Fault, Problem};

/// Values within values, far above what a configuration needs and far below what the stack holds.
const DEPTH_MAX: usize = 64;

/// Reads `source`, whose root must be an object.
pub(super) fn read(source: &str) -> Result<Node, Fault> {
    let mut reader = Reader { source, position: 0 };
    reader.blank();
    let root = reader.value(0)?;
    reader.blank();
    if reader.position < source.len() {
        return Err(reader.fault("expected nothing after the document"));
    }
    match root.value {
        Value::Table(_) => Ok(Node { span: 0..0, ..root }),
        _ => Err(fault(root.span, "expected an object")),
    }
}

struct Reader<'a> {
    source: &'a str,
    position: usize,
}

impl<'a> Reader<'a> {
    fn rest(&self) -> &'a str {
        &self.source[self.position..]
    }

    fn peek(&self) -> Option<u8> {
        self.source.as_bytes().get(self.position).copied()
    }

    /// Passes `token` where it comes next.
    fn take(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.position += token.len();
        }
        found
    }

    fn blank(&mut self) {
        let rest = self.rest();
        self.position += rest.len() - rest.trim_start_matches([' ', '\t', '\r', '\n']).len();
    }

    fn fault(&self, message: &str) -> Fault {
        let width = self.rest().chars().next().map_or(0, char::len_utf8);
        fault(self.position..self.position + width, message)
    }

    fn value(&mut self, depth: usize) -> Result<Node, Fault> {
        if depth > DEPTH_MAX {
            return Err(self.fault("values are nested too deeply"));
        }
        let start = self.position;
        let value = match self.peek() {
            Some(b'{') => self.object(depth)?,
            Some(b'[') => self.array(depth)?,
            Some(b'"') => Value::Text(self.text()?),
            Some(b'-' | b'0'..=b'9') => self.number()?,
            _ if self.take("true") => Value::Truth(true),
            _ if self.take("false") => Value::Truth(false),
            _ if self.take("null") => Value::Other("null"),
            _ => return Err(self.fault("expected a value")),
        };
        Ok(Node { span: start..self.position, value })
    }

    fn object(&mut self, depth: usize) -> Result<Value, Fault> {
        let mut entries: Vec<Entry> = Vec::new();
        self.take("{");
        self.blank();
        if self.take("}") {
            return Ok(Value::Table(entries));
        }
        loop {
            self.blank();
            let start = self.position;
            if self.peek() != Some(b'"') {
                return Err(self.fault("expected a name in double quotes"));
            }
            let key = self.text()?;
            let key_span = start..self.position;
            if entries.iter().any(|entry| entry.key == key) {
                return Err(fault(key_span, "duplicate key"));
            }
            self.blank();
            if !self.take(":") {
                return Err(self.fault("expected `:`"));
            }
            self.blank();
            let node = self.value(depth + 1)?;
            entries.push(Entry { key, key_span, node });
            self.blank();
            if self.take("}") {
                return Ok(Value::Table(entries));
            }
            if !self.take(",") {
                return Err(self.fault("expected `,` or `}`"));
            }
        }
    }

    fn array(&mut self, depth: usize) -> Result<Value, Fault> {
        let mut items = Vec::new();
        self.take("[");
        self.blank();
        if self.take("]") {
            return Ok(Value::List(items));
        }
        loop {
            self.blank();
            items.push(self.value(depth + 1)?);
            self.blank();
            if self.take("]") {
                return Ok(Value::List(items));
            }
            if !self.take(",") {
                return Err(self.fault("expected `,` or `]`"));
            }
        }
    }

    /// A string. Its end is found here, its escapes are left to `serde_json`.
    fn text(&mut self) -> Result<String, Fault> {
        let start = self.position;
        let mut escaped = true; // the opening quote does not end the string
        for (offset, byte) in self.rest().bytes().enumerate() {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => {
                    self.position += offset + 1;
                    let span = start..self.position;
                    return serde_json::from_str(&self.source[span.clone()])
                        .map_err(|_| fault(span, "malformed string: an unknown escape or a control character"));
                }
                _ => {}
            }
        }
        Err(fault(start..self.source.len(), "the string has no end"))
    }

    fn number(&mut self) -> Result<Value, Fault> {
        let start = self.position;
        let digits = |c: char| c.is_ascii_digit() || matches!(c, '-' | '+' | '.' | 'e' | 'E');
        self.position += self.rest().find(|c| !digits(c)).unwrap_or(self.rest().len());
        let span = start..self.position;
        let number: serde_json::Number =
            serde_json::from_str(&self.source[span.clone()]).map_err(|_| fault(span, "malformed number"))?;
        Ok(match (number.as_i64(), number.as_f64()) {
            (Some(whole), _) => Value::Whole(whole),
            (None, Some(real)) if number.is_f64() => Value::Real(real),
            _ => Value::Other("a number out of range"),
        })
    }
}

fn fault(span: Range<usize>, message: &str) -> Fault {
    At { path: String::new(), span }.error(Problem::new(Code::Syntax, message))
}
