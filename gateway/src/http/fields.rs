//! Header fields in arrival order, with repeated lines and original spelling (RFC 9110 section 5).
//!
//! All lines of a message are in one growing buffer, in HTTP/1.1 wire format: a head is written by
//! copying the buffer. The buffer is reused by the next message, so a keep-alive connection parses
//! without allocating. The received field section stays at the front of the buffer and is restored
//! when the next message repeats it. This file does not validate syntax: the engine that parsed the
//! fields has done so, or the gateway wrote them itself.

mod known;

use std::fmt;

pub use known::KnownField;
pub(crate) use known::{KnownFieldSet, matches_pattern};

/// Lines that a new section has room for, and bytes for those that are added to it.
const LINES_FIRST: usize = 12;
const ADDED_BYTES: usize = 192;

/// Position of one field line in the text of `Fields`: offset, lengths of name and value, and the
/// known name if there is one.
#[derive(Clone, Copy)]
struct FieldLine {
    known: Option<KnownField>,
    name_len: u16,
    /// Offset of the name in the text; colon, space, value and CRLF follow it.
    at: u32,
    value_len: u32,
}

/// A field line, borrowed from its message.
#[derive(Clone, Copy)]
pub struct Field<'a> {
    pub known: Option<KnownField>,
    /// With its original spelling.
    pub name: &'a [u8],
    /// Without leading and trailing white space.
    pub value: &'a [u8],
}

/// The field section of one message.
#[derive(Clone, Default)]
pub struct Fields {
    text: Vec<u8>,
    lines: Vec<FieldLine>,
    /// The known names among the lines: a lookup of an absent field is one bit test.
    present: KnownFieldSet,
    /// Whether the text holds other bytes than the lines in their order.
    has_gaps: bool,
    /// Whether a name contains `_`.
    has_underscore: bool,
    received: RestorePoint,
}

/// Lengths and known names right after parsing, to which `Fields` is truncated when the next
/// message repeats the same section. Later changes only append, so that truncation suffices; an
/// empty `section` means that there is nothing to restore.
#[derive(Clone, Copy, Default)]
struct RestorePoint {
    /// Bytes at the front of the text that are the section as received; over HTTP/2, its lines.
    section: u32,
    /// Bytes of the text: rewritten lines (those with other white space) follow the section.
    text: u32,
    lines: u32,
    present: KnownFieldSet,
}

impl Fields {
    pub(crate) fn clear(&mut self) {
        self.text.clear();
        self.lines.clear();
        self.present = KnownFieldSet::default();
        self.has_gaps = false;
        self.has_underscore = false;
        self.received = RestorePoint::default();
    }

    pub fn len(&self) -> usize {
        self.lines.len()
    }

    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Allocated bytes on the heap.
    pub(crate) fn heap_bytes(&self) -> usize {
        self.text.capacity() + self.lines.capacity() * size_of::<FieldLine>()
    }

    /// Appends every line of `other`. Used for prebuilt lines that many messages share.
    pub(crate) fn append_all(&mut self, other: &Fields) {
        let base = u32::try_from(self.text.len()).unwrap_or(u32::MAX);
        self.text.extend_from_slice(&other.text);
        self.lines.extend(other.lines.iter().map(|entry| FieldLine { at: base.saturating_add(entry.at), ..*entry }));
        self.present = self.present.union(other.present);
        self.has_gaps |= other.has_gaps;
        self.has_underscore |= other.has_underscore;
    }

    /// Copies `other` into this value and keeps the allocated buffers.
    pub(crate) fn copy_from(&mut self, other: &Fields) {
        self.text.clone_from(&other.text);
        self.lines.clone_from(&other.lines);
        self.present = other.present;
        self.has_gaps = other.has_gaps;
        self.has_underscore = other.has_underscore;
        self.received = other.received;
    }

    /// Appends a line. A name above 64 KiB cannot occur: the limit of a head is far lower.
    pub fn push(&mut self, name: &[u8], value: &[u8]) {
        self.append(KnownField::of(name), name, value);
    }

    /// Appends a line whose known name has been looked up.
    pub(crate) fn push_known(&mut self, known: Option<KnownField>, name: &[u8], value: &[u8]) {
        self.append(known, name, value);
    }

    /// Replaces all lines by those of `section`, the field section at the end of a head; `lines`
    /// are its names and values, found by a parser. Copies the section at once instead of line by
    /// line.
    pub(crate) fn load_section<'a>(&mut self, section: &[u8], lines: impl Iterator<Item = (&'a [u8], &'a [u8])>) {
        self.clear();
        if self.lines.capacity() == 0 {
            // The gateway adds lines of its own.
            self.text.reserve(section.len() + ADDED_BYTES);
            self.lines.reserve(LINES_FIRST);
        }
        self.text.extend_from_slice(section);
        self.has_gaps = true;
        let base = section.as_ptr().addr();
        for (name, value) in lines {
            let (known, at) = (KnownField::of(name), name.as_ptr().addr().wrapping_sub(base));
            let name_len = u16::try_from(name.len()).unwrap_or(u16::MAX);
            let value_len = u32::try_from(value.len()).unwrap_or(u32::MAX);
            let entry = FieldLine { known, name_len, at: u32::try_from(at).unwrap_or(u32::MAX), value_len };
            if !is_written_as(&entry, section, value) {
                // The line has other white space than `Fields` writes, or is not part of the
                // section.
                self.append(known, name, value);
                continue;
            }
            self.lines.push(entry);
            self.note_name(known, name);
        }
        self.set_restore_point(section.len());
    }

    fn set_restore_point(&mut self, section: usize) {
        let [section, text, lines] = [section, self.text.len(), self.lines.len()].map(u32::try_from);
        if let (Ok(section), Ok(text), Ok(lines)) = (section, text, lines) {
            self.received = RestorePoint { section, text, lines, present: self.present };
        }
    }

    /// Makes the present lines those that `restore_received` restores. Fields without a line cannot
    /// be restored.
    pub(crate) fn keep_received(&mut self) {
        self.set_restore_point(self.text.len());
    }

    /// Restores the lines as they were received; false if they are not known any more.
    pub(crate) fn restore_received(&mut self) -> bool {
        let RestorePoint { section, text, lines, present } = self.received;
        if section == 0 {
            return false;
        }
        self.text.truncate(text as usize);
        self.lines.truncate(lines as usize);
        self.present = present;
        true
    }

    /// If `head` starts with the section that was loaded last, restores the lines of that section
    /// and returns its length. Otherwise changes nothing. A complete section is never a proper
    /// prefix of another, so the match is the whole section of `head`.
    pub(crate) fn restore_section(&mut self, head: &[u8]) -> Option<usize> {
        let section = self.text.get(..self.received.section as usize).filter(|section| !section.is_empty())?;
        if !head.starts_with(section) {
            return None;
        }
        let length = section.len();
        self.restore_received().then_some(length)
    }

    /// A copy without unused capacity and bytes.
    pub(crate) fn compact(&self) -> Fields {
        let mut compact = Fields::default();
        compact.text.reserve_exact(self.lines.iter().map(|entry| line(entry).len()).sum());
        compact.lines.reserve_exact(self.lines.len());
        self.iter().for_each(|field| compact.append(field.known, field.name, field.value));
        compact
    }

    /// Appends a line with a known name in lower case.
    pub fn add(&mut self, known: KnownField, value: impl AsRef<[u8]>) {
        self.append(Some(known), known.as_str().as_bytes(), value.as_ref());
    }

    /// Appends a line with a known name and the value that `write` appends to the buffer. The value
    /// must be a valid field value.
    pub(crate) fn add_with(&mut self, known: KnownField, write: impl FnOnce(&mut Vec<u8>)) {
        self.begin_line(Some(known), known.as_str().as_bytes());
        let value_start = self.text.len();
        write(&mut self.text);
        self.end_line(value_start);
    }

    /// Replaces every line with that name by one line.
    pub(crate) fn set(&mut self, known: KnownField, value: impl AsRef<[u8]>) {
        self.remove(known);
        self.add(known, value);
    }

    fn append(&mut self, known: Option<KnownField>, name: &[u8], value: &[u8]) {
        // One capacity check for the whole line.
        self.text.reserve(name.len() + value.len() + 4);
        self.begin_line(known, name);
        let value_start = self.text.len();
        self.text.extend_from_slice(value);
        self.end_line(value_start);
    }

    /// Begins a line; the caller appends the value and calls `end_line`.
    fn begin_line(&mut self, known: Option<KnownField>, name: &[u8]) {
        let at = u32::try_from(self.text.len()).unwrap_or(u32::MAX);
        self.text.extend_from_slice(name);
        self.text.extend_from_slice(b": ");
        let name_len = u16::try_from(name.len()).unwrap_or(u16::MAX);
        self.lines.push(FieldLine { known, name_len, at, value_len: 0 });
        self.note_name(known, name);
    }

    fn note_name(&mut self, known: Option<KnownField>, name: &[u8]) {
        match known {
            Some(known) => self.present = self.present.with(known),
            // No known name contains one.
            None => self.has_underscore |= name.contains(&b'_'),
        }
    }

    /// Ends the last line; its value starts at `value_start`.
    fn end_line(&mut self, value_start: usize) {
        if let Some(entry) = self.lines.last_mut() {
            entry.value_len = u32::try_from(self.text.len() - value_start).unwrap_or(u32::MAX);
        }
        self.text.extend_from_slice(b"\r\n");
    }

    /// Appends the lines to `out` in HTTP/1.1 wire format, without those named in `except`.
    pub(crate) fn write_lines(&self, out: &mut Vec<u8>, except: KnownFieldSet) {
        if !self.has_gaps && !self.present.intersects(except) {
            return out.extend_from_slice(&self.text);
        }
        // Adjacent lines are copied together, usually all lines at once.
        let mut run = 0..0;
        for entry in self.lines.iter().filter(|entry| !entry.known.is_some_and(|known| except.contains(known))) {
            let line = line(entry);
            if line.start != run.end {
                out.extend_from_slice(&self.text[run]);
                run = line.start..line.start;
            }
            run.end = line.end;
        }
        out.extend_from_slice(&self.text[run]);
    }

    pub fn remove(&mut self, known: KnownField) {
        if self.has(known) {
            self.retain(|field| field.known != Some(known));
        }
    }

    /// As [`Fields::retain`], right after parsing, for removals that every repetition of the
    /// section needs too: a restored section does not contain the removed lines.
    pub(crate) fn retain_received(&mut self, keep: impl FnMut(Field<'_>) -> bool) {
        let received = self.received;
        let is_unchanged = usize::try_from(received.lines).is_ok_and(|lines| lines == self.lines.len());
        self.retain(keep);
        if is_unchanged && received.section > 0 {
            let lines = u32::try_from(self.lines.len()).unwrap_or(0);
            self.received = RestorePoint { lines, present: self.present, ..received };
        }
    }

    /// Whether a name contains `_`. Applications that receive fields as variables (CGI, RFC 3875
    /// section 4.1.18) take it for `-`.
    pub(crate) fn has_underscore(&self) -> bool {
        self.has_underscore
    }

    /// Keeps the lines for which `keep` returns true.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(Field<'_>) -> bool) {
        let text = &self.text;
        let mut present = KnownFieldSet::default();
        let count = self.lines.len();
        self.lines.retain(|entry| {
            let is_retained = keep(field(text, entry));
            if let Some(known) = entry.known.filter(|_| is_retained) {
                present = present.with(known);
            }
            is_retained
        });
        self.present = present;
        if self.lines.len() < count {
            self.has_gaps = true;
            self.received = RestorePoint::default();
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = Field<'_>> {
        self.lines.iter().map(|entry| field(&self.text, entry))
    }

    pub fn has(&self, known: KnownField) -> bool {
        self.present.contains(known)
    }

    /// Whether any line has one of these names.
    pub(crate) fn has_any(&self, names: KnownFieldSet) -> bool {
        self.present.intersects(names)
    }

    /// The value of the first line.
    pub fn get(&self, known: KnownField) -> Option<&[u8]> {
        self.all(known).next()
    }

    /// The values of all lines, in order.
    pub fn all(&self, known: KnownField) -> impl Iterator<Item = &[u8]> {
        let lines = if self.has(known) { &*self.lines } else { &[] };
        lines.iter().filter(move |entry| entry.known == Some(known)).map(|entry| field(&self.text, entry).value)
    }

    /// The values of all lines with a name given as text, case-insensitive.
    pub fn named<'a>(&'a self, name: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
        self.iter().filter(move |field| field.name.eq_ignore_ascii_case(name)).map(|field| field.value)
    }

    /// The members of a comma-separated field across all its lines (RFC 9110 section 5.6.1). Empty
    /// members are skipped.
    pub fn members(&self, known: KnownField) -> impl Iterator<Item = &[u8]> {
        self.all(known).flat_map(members)
    }
}

/// Whether the line is in `head` exactly as `Fields` writes it.
fn is_written_as(entry: &FieldLine, head: &[u8], value: &[u8]) -> bool {
    let range = line(entry);
    let Some(text) = head.get(range) else { return false };
    let (name_len, end) = (usize::from(entry.name_len), text.len() - 2);
    text[name_len..].starts_with(b": ") && text[name_len + 2..end] == *value && text[end..] == *b"\r\n"
}

/// The byte range of a line, CRLF included.
fn line(entry: &FieldLine) -> std::ops::Range<usize> {
    let at = entry.at as usize;
    at..at + usize::from(entry.name_len) + entry.value_len as usize + 4
}

fn field<'a>(text: &'a [u8], entry: &FieldLine) -> Field<'a> {
    let at = entry.at as usize;
    let name_end = at + usize::from(entry.name_len);
    let value_at = name_end + 2;
    Field { known: entry.known, name: &text[at..name_end], value: &text[value_at..value_at + entry.value_len as usize] }
}

impl fmt::Debug for Fields {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.iter().map(|field| {
                format!("{}: {}", String::from_utf8_lossy(field.name), String::from_utf8_lossy(field.value))
            }))
            .finish()
    }
}

/// Splits a value at commas outside quoted strings. Members are trimmed and never empty.
pub(crate) fn members(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = value;
    std::iter::from_fn(move || {
        while !rest.is_empty() {
            let end = member_end(rest);
            let member = rest[..end].trim_ascii();
            rest = rest.get(end + 1..).unwrap_or(&[]);
            if !member.is_empty() {
                return Some(member);
            }
        }
        None
    })
}

fn member_end(text: &[u8]) -> usize {
    let (mut quoted, mut escaped) = (false, false);
    for (at, byte) in text.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b',' if !quoted => return at,
            _ => {}
        }
    }
    text.len()
}

/// Whether `text` is a token (RFC 9110 section 5.6.2).
pub fn is_token(text: &[u8]) -> bool {
    !text.is_empty() && text.iter().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// `Fields` from names and values.
    pub(crate) fn fields(lines: &[(&str, &str)]) -> Fields {
        let mut fields = Fields::default();
        for (name, value) in lines {
            fields.push(name.as_bytes(), value.as_bytes());
        }
        fields
    }

    #[test]
    fn repeated_lines_keep_order_and_spelling() {
        let mut fields = Fields::default();
        fields.push(b"X-A", b"1");
        fields.push(b"sEt-cOOkie", b"a");
        fields.push(b"Set-Cookie", b"b");
        assert_eq!(fields.all(KnownField::SetCookie).collect::<Vec<_>>(), [b"a", b"b"]);
        assert_eq!(fields.iter().nth(1).map(|f| f.name), Some(&b"sEt-cOOkie"[..]));
        fields.remove(KnownField::SetCookie);
        assert_eq!(fields.len(), 1);
        assert_eq!(fields.named(b"x-a").next(), Some(&b"1"[..]));
    }

    #[test]
    fn load_section_normalises_white_space() {
        let head = b"GET / HTTP/1.1\r\nHost: a\r\nAge:7\r\nX-A:  b \r\nX-B: \r\nX-C:\r\nVia: c\r\n\r\n";
        let mut lines = [httparse::EMPTY_HEADER; 8];
        let mut request = httparse::Request::new(&mut lines);
        request.parse(head).expect("well-formed");
        let mut fields = Fields::default();
        fields.push(b"old", b"line");
        let lines = request.headers.iter().map(|line| (line.name.as_bytes(), line.value.trim_ascii()));
        fields.load_section(head, lines.chain([(&b"X-D"[..], &b"from elsewhere"[..])]));
        fields.remove(KnownField::Via);
        for fields in [&fields, &fields.compact()] {
            let mut out = Vec::new();
            fields.write_lines(&mut out, KnownFieldSet::default());
            let written = "Host: a\r\nage: 7\r\nX-A: b\r\nX-B: \r\nX-C: \r\nX-D: from elsewhere\r\n";
            assert_eq!(String::from_utf8_lossy(&out).replace("Age", "age"), written);
            assert_eq!((fields.get(KnownField::Age), fields.has(KnownField::Via)), (Some(&b"7"[..]), false));
        }
        assert!(fields.compact().heap_bytes() < fields.heap_bytes());
    }

    #[test]
    fn repeated_section_is_restored() {
        let section = b"Host: a\r\nAge:7\r\nX-A: b\r\n\r\n";
        let mut fields = Fields::default();
        assert_eq!(fields.restore_section(b""), None);
        fields
            .load_section(section, [(&section[..4], &section[6..7]), (&section[9..12], &section[13..14])].into_iter());
        let written = |fields: &Fields| {
            let mut out = Vec::new();
            fields.write_lines(&mut out, KnownFieldSet::default());
            String::from_utf8(out).expect("ASCII")
        };
        assert_eq!(written(&fields), "Host: a\r\nAge: 7\r\n");
        fields.add(KnownField::Via, "1.1 tidegate");
        assert_eq!(fields.restore_section(&section[..section.len() - 1]), None);
        assert!(fields.has(KnownField::Via));
        assert_eq!(fields.restore_section(&[section, &b"GET"[..]].concat()), Some(section.len()));
        assert_eq!((written(&fields).as_str(), fields.len()), ("Host: a\r\nAge: 7\r\n", 2));
        assert!(fields.has(KnownField::Age) && !fields.has(KnownField::Via));

        fields.remove(KnownField::Via);
        assert!(fields.restore_section(section).is_some(), "removing an absent field changes nothing");
        fields.retain_received(|field| field.known != Some(KnownField::Host));
        fields.add(KnownField::Via, "1.1 tidegate");
        assert_eq!(fields.restore_section(section), Some(section.len()));
        assert_eq!(written(&fields), "Age: 7\r\n", "a removal of every repetition stays");
        assert!(!fields.has(KnownField::Host) && !fields.has(KnownField::Via));
        fields.remove(KnownField::Age);
        assert_eq!(fields.restore_section(section), None, "a line was removed");
        fields.clear();
        assert_eq!(fields.restore_section(section), None);
    }

    #[test]
    fn lines_are_written_unchanged_and_in_order() {
        let mut fields = Fields::default();
        fields.push(b"X-A", b"1");
        fields.push(b"Content-Length", b"5");
        fields.add_with(KnownField::Age, |text| text.extend_from_slice(b"7"));
        fields.push(b"Host", b"");
        fields.push(b"X-B", b"2");
        fields.remove(KnownField::Host);
        let mut out = b"> ".to_vec();
        fields.write_lines(&mut out, KnownFieldSet::of(&[KnownField::ContentLength]));
        assert_eq!(String::from_utf8_lossy(&out), "> X-A: 1\r\nage: 7\r\nX-B: 2\r\n");
    }

    #[test]
    fn members_respect_quotes_and_skip_empty_ones() {
        let list: Vec<_> = members(b"a, ,\"b,\\\"c\" ,d=\"x,y\",").collect();
        assert_eq!(list, [&b"a"[..], b"\"b,\\\"c\"", b"d=\"x,y\""]);
    }
}
