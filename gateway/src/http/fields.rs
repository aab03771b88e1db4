//! Header fields in arrival order, repeated lines and original spelling included (RFC 9110 section 5).
//!
//! All lines of one message lie in one growing buffer as HTTP/1.1 writes them, so that a head is written by copying it, and
//! the buffer is reused from message to message, so that a keep-alive connection parses without allocating. What was read stays at its
//! front, to be gone back to where the next message repeats it. This file does not judge syntax: what is pushed here has been
//! checked by the engine that read it, or is written by the gateway itself.

mod known;

use std::fmt;

pub use known::{Known, KnownSet};

#[derive(Clone, Copy)]
struct Entry {
    known: Option<Known>,
    name_len: u16,
    /// Where the name starts; colon, space, value and CRLF follow.
    at: u32,
    value_len: u32,
}

/// One field line, borrowed from its message.
#[derive(Clone, Copy)]
pub struct Field<'a> {
    pub known: Option<Known>,
    /// As it was spelled.
    pub name: &'a [u8],
    /// Without surrounding white space.
    pub value: &'a [u8],
}

/// The field section of one message.
#[derive(Clone, Default)]
pub struct Fields {
    text: Vec<u8>,
    entries: Vec<Entry>,
    /// The known names among the lines, so that the many questions for absent ones cost nothing.
    present: KnownSet,
    /// Whether the text holds anything but the lines, in their order.
    has_gaps: bool,
    read: Read,
}

/// What stood here when a message had been read: all that comes later is appended, so that it can be gone back to. Nothing is to be
/// gone back to where `section` is empty.
#[derive(Clone, Copy, Default)]
struct Read {
    /// Bytes at the front of the text that are the section as it came.
    section: u32,
    /// Bytes of the text: lines of unusual white space follow the section.
    text: u32,
    lines: u32,
    present: KnownSet,
}

impl Fields {
    pub fn clear(&mut self) {
        self.text.clear();
        self.entries.clear();
        self.present = KnownSet::default();
        self.has_gaps = false;
        self.read = Read::default();
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes held on the heap.
    pub fn heap_bytes(&self) -> usize {
        self.text.capacity() + self.entries.capacity() * size_of::<Entry>()
    }

    /// Appends every line of `other`: those that are the same in many messages are made once.
    pub fn append_all(&mut self, other: &Fields) {
        let base = u32::try_from(self.text.len()).unwrap_or(u32::MAX);
        self.text.extend_from_slice(&other.text);
        self.entries.extend(other.entries.iter().map(|entry| Entry { at: base.saturating_add(entry.at), ..*entry }));
        self.present = self.present.or(other.present);
        self.has_gaps |= other.has_gaps;
    }

    /// Becomes a copy of `other`, keeping its own buffers.
    pub fn copy_from(&mut self, other: &Fields) {
        self.text.clone_from(&other.text);
        self.entries.clone_from(&other.entries);
        self.present = other.present;
        self.has_gaps = other.has_gaps;
        self.read = other.read;
    }

    /// Appends a line. Names above 64 KiB cannot exist: heads are bounded far below.
    pub fn push(&mut self, name: &[u8], value: &[u8]) {
        self.append(Known::of(name), name, value);
    }

    /// Becomes the lines of `section`, the end of a head, which a parser has found in it as names and values. It is copied at once,
    /// not line by line.
    pub fn adopt<'a>(&mut self, section: &[u8], lines: impl Iterator<Item = (&'a [u8], &'a [u8])>) {
        self.clear();
        self.text.extend_from_slice(section);
        self.has_gaps = true;
        let base = section.as_ptr().addr();
        for (name, value) in lines {
            let (known, at) = (Known::of(name), name.as_ptr().addr().wrapping_sub(base));
            let name_len = u16::try_from(name.len()).unwrap_or(u16::MAX);
            let value_len = u32::try_from(value.len()).unwrap_or(u32::MAX);
            let entry = Entry { known, name_len, at: u32::try_from(at).unwrap_or(u32::MAX), value_len };
            if !is_written_as(&entry, section, value) {
                // Other white space than ours, or a slice that is no part of the section.
                self.append(known, name, value);
                continue;
            }
            self.entries.push(entry);
            if let Some(known) = known {
                self.present = self.present.and(known);
            }
        }
        let [section, text, lines] = [section.len(), self.text.len(), self.entries.len()].map(u32::try_from);
        if let (Ok(section), Ok(text), Ok(lines)) = (section, text, lines) {
            self.read = Read { section, text, lines, present: self.present };
        }
    }

    /// Where `head` goes on with the very section that was read into this place last: becomes its lines once more, and says how long
    /// it is. Otherwise nothing changes. No proper beginning of a whole section is one, so that it is all of the head's.
    pub fn repeat(&mut self, head: &[u8]) -> Option<usize> {
        let Read { section, text, lines, present } = self.read;
        let section = self.text.get(..section as usize).filter(|section| !section.is_empty())?;
        if !head.starts_with(section) {
            return None;
        }
        let length = section.len();
        self.text.truncate(text as usize);
        self.entries.truncate(lines as usize);
        self.present = present;
        Some(length)
    }

    /// A copy that holds nothing but its lines.
    pub fn compact(&self) -> Fields {
        let mut compact = Fields::default();
        compact.text.reserve_exact(self.entries.iter().map(|entry| line(entry).len()).sum());
        compact.entries.reserve_exact(self.entries.len());
        self.iter().for_each(|field| compact.append(field.known, field.name, field.value));
        compact
    }

    /// Appends a line with a known name, spelled in lower case.
    pub fn add(&mut self, known: Known, value: impl AsRef<[u8]>) {
        self.append(Some(known), known.as_str().as_bytes(), value.as_ref());
    }

    /// Appends a line with a known name and a value that `write` appends to the bytes it is given. It must be a field value.
    pub fn add_with(&mut self, known: Known, write: impl FnOnce(&mut Vec<u8>)) {
        self.begin(Some(known), known.as_str().as_bytes());
        let begin = self.text.len();
        write(&mut self.text);
        self.end(begin);
    }

    /// Replaces every line of that name by one.
    pub fn set(&mut self, known: Known, value: impl AsRef<[u8]>) {
        self.remove(known);
        self.add(known, value);
    }

    fn append(&mut self, known: Option<Known>, name: &[u8], value: &[u8]) {
        // One check of the room for the whole line.
        self.text.reserve(name.len() + value.len() + 4);
        self.begin(known, name);
        let begin = self.text.len();
        self.text.extend_from_slice(value);
        self.end(begin);
    }

    /// Begins a line: its value is to follow.
    fn begin(&mut self, known: Option<Known>, name: &[u8]) {
        let at = u32::try_from(self.text.len()).unwrap_or(u32::MAX);
        self.text.extend_from_slice(name);
        self.text.extend_from_slice(b": ");
        let name_len = u16::try_from(name.len()).unwrap_or(u16::MAX);
        self.entries.push(Entry { known, name_len, at, value_len: 0 });
        if let Some(known) = known {
            self.present = self.present.and(known);
        }
    }

    /// Ends the last line, whose value began at `begin`.
    fn end(&mut self, begin: usize) {
        if let Some(entry) = self.entries.last_mut() {
            entry.value_len = u32::try_from(self.text.len() - begin).unwrap_or(u32::MAX);
        }
        self.text.extend_from_slice(b"\r\n");
    }

    /// Appends every line but those of `except` to `out`, as HTTP/1.1 writes them.
    pub fn write_lines(&self, out: &mut Vec<u8>, except: KnownSet) {
        if !self.has_gaps && !self.present.meets(except) {
            return out.extend_from_slice(&self.text);
        }
        // Neighbouring lines are copied together: most often, that is all of them.
        let mut run = 0..0;
        for entry in self.entries.iter().filter(|entry| !entry.known.is_some_and(|known| except.has(known))) {
            let line = line(entry);
            if line.start != run.end {
                out.extend_from_slice(&self.text[run]);
                run = line.start..line.start;
            }
            run.end = line.end;
        }
        out.extend_from_slice(&self.text[run]);
    }

    pub fn remove(&mut self, known: Known) {
        if self.has(known) {
            self.retain(|field| field.known != Some(known));
        }
    }

    /// Keeps the lines for which `keep` says true.
    pub fn retain(&mut self, mut keep: impl FnMut(Field<'_>) -> bool) {
        let text = &self.text;
        let mut present = KnownSet::default();
        let count = self.entries.len();
        self.entries.retain(|entry| {
            let is_kept = keep(field(text, entry));
            if let Some(known) = entry.known.filter(|_| is_kept) {
                present = present.and(known);
            }
            is_kept
        });
        self.present = present;
        if self.entries.len() < count {
            self.has_gaps = true;
            self.read = Read::default();
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = Field<'_>> {
        self.entries.iter().map(|entry| field(&self.text, entry))
    }

    pub fn has(&self, known: Known) -> bool {
        self.present.has(known)
    }

    /// Whether any of these names is among the lines.
    pub fn has_any(&self, names: KnownSet) -> bool {
        self.present.meets(names)
    }

    /// The first line's value.
    pub fn get(&self, known: Known) -> Option<&[u8]> {
        self.all(known).next()
    }

    /// Every line's value, in order.
    pub fn all(&self, known: Known) -> impl Iterator<Item = &[u8]> {
        let entries = if self.has(known) { &*self.entries } else { &[] };
        entries.iter().filter(move |entry| entry.known == Some(known)).map(|entry| field(&self.text, entry).value)
    }

    /// Every line's value for a name given as text, in any letter case.
    pub fn named<'a>(&'a self, name: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
        self.iter().filter(move |field| field.name.eq_ignore_ascii_case(name)).map(|field| field.value)
    }

    /// The members of a comma-separated field over all its lines (RFC 9110 section 5.6.1); empty members are skipped.
    pub fn members(&self, known: Known) -> impl Iterator<Item = &[u8]> {
        self.all(known).flat_map(members)
    }
}

/// Whether the line stands in `head` just as `Fields` writes it.
fn is_written_as(entry: &Entry, head: &[u8], value: &[u8]) -> bool {
    let range = line(entry);
    let Some(text) = head.get(range) else { return false };
    let (name_len, end) = (usize::from(entry.name_len), text.len() - 2);
    text[name_len..].starts_with(b": ") && text[name_len + 2..end] == *value && text[end..] == *b"\r\n"
}

/// Where a whole line lies, CRLF included.
fn line(entry: &Entry) -> std::ops::Range<usize> {
    let at = entry.at as usize;
    at..at + usize::from(entry.name_len) + entry.value_len as usize + 4
}

fn field<'a>(text: &'a [u8], entry: &Entry) -> Field<'a> {
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

/// Splits one value at commas outside quoted strings; members are trimmed and never empty.
pub fn members(value: &[u8]) -> impl Iterator<Item = &[u8]> {
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

    /// Lines by name and value.
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
        assert_eq!(fields.all(Known::SetCookie).collect::<Vec<_>>(), [b"a", b"b"]);
        assert_eq!(fields.iter().nth(1).map(|f| f.name), Some(&b"sEt-cOOkie"[..]));
        fields.remove(Known::SetCookie);
        assert_eq!(fields.len(), 1);
        assert_eq!(fields.named(b"x-a").next(), Some(&b"1"[..]));
    }

    #[test]
    fn a_head_is_adopted_whatever_its_white_space() {
        let head = b"GET / HTTP/1.1\r\nHost: a\r\nAge:7\r\nX-A:  b \r\nX-B: \r\nX-C:\r\nVia: c\r\n\r\n";
        let mut lines = [httparse::EMPTY_HEADER; 8];
        let mut request = httparse::Request::new(&mut lines);
        request.parse(head).expect("well-formed");
        let mut fields = Fields::default();
        fields.push(b"old", b"line");
        let lines = request.headers.iter().map(|line| (line.name.as_bytes(), line.value.trim_ascii()));
        fields.adopt(head, lines.chain([(&b"X-D"[..], &b"from elsewhere"[..])]));
        fields.remove(Known::Via);
        for fields in [&fields, &fields.compact()] {
            let mut out = Vec::new();
            fields.write_lines(&mut out, KnownSet::default());
            let written = "Host: a\r\nage: 7\r\nX-A: b\r\nX-B: \r\nX-C: \r\nX-D: from elsewhere\r\n";
            assert_eq!(String::from_utf8_lossy(&out).replace("Age", "age"), written);
            assert_eq!((fields.get(Known::Age), fields.has(Known::Via)), (Some(&b"7"[..]), false));
        }
        assert!(fields.compact().heap_bytes() < fields.heap_bytes());
    }

    #[test]
    fn a_section_that_repeats_is_gone_back_to() {
        let section = b"Host: a\r\nAge:7\r\nX-A: b\r\n\r\n";
        let mut fields = Fields::default();
        assert_eq!(fields.repeat(b""), None);
        fields.adopt(section, [(&section[..4], &section[6..7]), (&section[9..12], &section[13..14])].into_iter());
        let written = |fields: &Fields| {
            let mut out = Vec::new();
            fields.write_lines(&mut out, KnownSet::default());
            String::from_utf8(out).expect("ASCII")
        };
        assert_eq!(written(&fields), "Host: a\r\nAge: 7\r\n");
        fields.add(Known::Via, "1.1 tidegate");
        assert_eq!(fields.repeat(&section[..section.len() - 1]), None);
        assert!(fields.has(Known::Via));
        assert_eq!(fields.repeat(&[section, &b"GET"[..]].concat()), Some(section.len()));
        assert_eq!((written(&fields).as_str(), fields.len()), ("Host: a\r\nAge: 7\r\n", 2));
        assert!(fields.has(Known::Age) && !fields.has(Known::Via));

        fields.remove(Known::Via);
        assert!(fields.repeat(section).is_some(), "nothing was removed");
        fields.remove(Known::Age);
        assert_eq!(fields.repeat(section), None, "a line is gone");
        fields.clear();
        assert_eq!(fields.repeat(section), None);
    }

    #[test]
    fn lines_are_written_as_they_stand() {
        let mut fields = Fields::default();
        fields.push(b"X-A", b"1");
        fields.push(b"Content-Length", b"5");
        fields.add_with(Known::Age, |text| text.extend_from_slice(b"7"));
        fields.push(b"Host", b"");
        fields.push(b"X-B", b"2");
        fields.remove(Known::Host);
        let mut out = b"> ".to_vec();
        fields.write_lines(&mut out, KnownSet::of(&[Known::ContentLength]));
        assert_eq!(String::from_utf8_lossy(&out), "> X-A: 1\r\nage: 7\r\nX-B: 2\r\n");
    }

    #[test]
    fn members_respect_quotes_and_skip_blanks() {
        let list: Vec<_> = members(b"a, ,\"b,\\\"c\" ,d=\"x,y\",").collect();
        assert_eq!(list, [&b"a"[..], b"\"b,\\\"c\"", b"d=\"x,y\""]);
    }
}
