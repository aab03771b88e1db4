//! A strict JSON parser (RFC 8259) that records the byte span of each value, which `serde_json`
//! does not.
//!
//! It also rejects duplicate names in an object, which RFC 8259 section 4 leaves to
//! implementations.

use std::ops::Range;

use super::fault::{ConfigFault, ConfigProblem, DocumentLocation, FaultCode};
use super::node::{DocumentEntry, DocumentNode, DocumentValue};

/// Nesting depth, far above the need of a configuration and far below the limit of the stack.
const DEPTH_MAX: usize = 64;

/// Parses `source`, whose root must be an object.
pub(super) fn parse(source: &str) -> Result<DocumentNode, ConfigFault> {
    let mut parser = JsonParser { source, position: 0 };
    parser.skip_whitespace();
    let root = parser.value(0)?;
    parser.skip_whitespace();
    if parser.position < source.len() {
        return Err(parser.fault("unexpected text after the document"));
    }
    match root.value {
        DocumentValue::Table(_) => Ok(DocumentNode { span: 0..0, ..root }),
        _ => Err(fault(root.span, "expected an object")),
    }
}

/// Recursive-descent parser over one document: the source and the byte offset of the next
/// character.
struct JsonParser<'a> {
    source: &'a str,
    position: usize,
}

impl<'a> JsonParser<'a> {
    fn rest(&self) -> &'a str {
        &self.source[self.position..]
    }

    fn peek(&self) -> Option<u8> {
        self.source.as_bytes().get(self.position).copied()
    }

    /// Consumes `token` if it is next.
    fn take(&mut self, token: &str) -> bool {
        let is_next = self.rest().starts_with(token);
        if is_next {
            self.position += token.len();
        }
        is_next
    }

    fn skip_whitespace(&mut self) {
        let rest = self.rest();
        self.position += rest.len() - rest.trim_start_matches([' ', '\t', '\r', '\n']).len();
    }

    fn fault(&self, message: &str) -> ConfigFault {
        let width = self.rest().chars().next().map_or(0, char::len_utf8);
        fault(self.position..self.position + width, message)
    }

    fn value(&mut self, depth: usize) -> Result<DocumentNode, ConfigFault> {
        if depth > DEPTH_MAX {
            return Err(self.fault("values are nested too deeply"));
        }
        let start = self.position;
        let value = match self.peek() {
            Some(b'{') => self.object(depth)?,
            Some(b'[') => self.array(depth)?,
            Some(b'"') => DocumentValue::String(self.string()?),
            Some(b'-' | b'0'..=b'9') => self.number()?,
            _ if self.take("true") => DocumentValue::Boolean(true),
            _ if self.take("false") => DocumentValue::Boolean(false),
            _ if self.take("null") => DocumentValue::Unsupported("null"),
            _ => return Err(self.without_comment("expected a value")),
        };
        Ok(DocumentNode { span: start..self.position, value })
    }

    /// A fault at the position; with a hint if a comment stands there.
    fn without_comment(&self, message: &str) -> ConfigFault {
        let fault = self.fault(message);
        let hint = "JSON has no comments; a document in TOML has them (`#`)".to_owned();
        if matches!(self.peek(), Some(b'/' | b'#')) { ConfigFault { hint: Some(hint), ..fault } } else { fault }
    }

    fn object(&mut self, depth: usize) -> Result<DocumentValue, ConfigFault> {
        let mut entries: Vec<DocumentEntry> = Vec::new();
        self.take("{");
        self.skip_whitespace();
        if self.take("}") {
            return Ok(DocumentValue::Table(entries));
        }
        loop {
            self.skip_whitespace();
            let start = self.position;
            if self.peek() != Some(b'"') {
                return Err(self.without_comment("expected a name in double quotes"));
            }
            let key = self.string()?;
            let key_span = start..self.position;
            if entries.iter().any(|entry| entry.key == key) {
                return Err(fault(key_span, "duplicate key"));
            }
            self.skip_whitespace();
            if !self.take(":") {
                return Err(self.fault("expected `:`"));
            }
            self.skip_whitespace();
            let node = self.value(depth + 1)?;
            entries.push(DocumentEntry { key, key_span, node });
            self.skip_whitespace();
            if self.take("}") {
                return Ok(DocumentValue::Table(entries));
            }
            if !self.take(",") {
                return Err(self.fault("expected `,` or `}`"));
            }
        }
    }

    fn array(&mut self, depth: usize) -> Result<DocumentValue, ConfigFault> {
        let mut items = Vec::new();
        self.take("[");
        self.skip_whitespace();
        if self.take("]") {
            return Ok(DocumentValue::Array(items));
        }
        loop {
            self.skip_whitespace();
            items.push(self.value(depth + 1)?);
            self.skip_whitespace();
            if self.take("]") {
                return Ok(DocumentValue::Array(items));
            }
            if !self.take(",") {
                return Err(self.fault("expected `,` or `]`"));
            }
        }
    }

    /// A string: finds its end; `serde_json` decodes its escapes.
    fn string(&mut self) -> Result<String, ConfigFault> {
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
                        .map_err(|_| fault(span, "malformed string: unknown escape or control character"));
                }
                _ => {}
            }
        }
        Err(fault(start..self.source.len(), "unterminated string"))
    }

    fn number(&mut self) -> Result<DocumentValue, ConfigFault> {
        let start = self.position;
        let digits = |c: char| c.is_ascii_digit() || matches!(c, '-' | '+' | '.' | 'e' | 'E');
        self.position += self.rest().find(|c| !digits(c)).unwrap_or(self.rest().len());
        let span = start..self.position;
        let number: serde_json::Number =
            serde_json::from_str(&self.source[span.clone()]).map_err(|_| fault(span, "malformed number"))?;
        Ok(match (number.as_i64(), number.as_f64()) {
            (Some(integer), _) => DocumentValue::Integer(integer),
            (None, Some(float)) if number.is_f64() => DocumentValue::Float(float),
            _ => DocumentValue::Unsupported("a number out of range"),
        })
    }
}

fn fault(span: Range<usize>, message: &str) -> ConfigFault {
    DocumentLocation { path: String::new(), span }.error(ConfigProblem::new(FaultCode::Syntax, message))
}
