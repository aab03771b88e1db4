//! The tables of HPACK (RFC 7541 section 2.3): the static one, and the dynamic one of a decoder.

use std::collections::VecDeque;
use std::ops::Deref;
use std::rc::Rc;
use std::sync::LazyLock;

use crate::http::fields::KnownField;

/// Names and values of the static table, from index 1 on (RFC 7541 appendix A).
const STATIC: [(&str, &str); 61] = [
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
];

/// The known names of the static table.
static STATIC_KNOWN: LazyLock<[Option<KnownField>; 61]> =
    LazyLock::new(|| STATIC.map(|(name, _)| KnownField::of(name.as_bytes())));

/// A decoded field line. Its name and value are not validated.
#[derive(Clone, Copy, Debug)]
pub(super) struct HpackField<'a> {
    pub(super) known: Option<KnownField>,
    pub(super) name: &'a [u8],
    pub(super) value: &'a [u8],
}

/// The index of a response name in the static table.
pub(super) fn static_index_of(name: &[u8]) -> Option<u8> {
    let position = STATIC.iter().position(|(other, _)| other.as_bytes() == name)?;
    u8::try_from(position + 1).ok()
}

/// The size of an entry beside its text (RFC 7541 section 4.1).
const ENTRY_OVERHEAD: usize = 32;

/// The name of an entry. It is shared with the entries that refer to it: a reference is one byte of
/// a section, and the name may have four thousand.
#[derive(Clone, Debug)]
pub(super) enum TableName {
    Static(&'static str),
    Received(Rc<[u8]>),
}

impl Deref for TableName {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            TableName::Static(name) => name.as_bytes(),
            TableName::Received(name) => name,
        }
    }
}

struct TableEntry {
    name: TableName,
    value: Box<[u8]>,
    known: Option<KnownField>,
}

impl TableEntry {
    fn size(&self) -> usize {
        self.name.len() + self.value.len() + ENTRY_OVERHEAD
    }
}

/// The fields that a peer has told the decoder to keep; the newest first. Invariant: they count at
/// most `size_max` bytes.
pub(super) struct DynamicTable {
    entries: VecDeque<TableEntry>,
    size: usize,
    size_max: usize,
    changes: u64,
}

impl DynamicTable {
    pub(super) fn new(size_max: usize) -> Self {
        DynamicTable { entries: VecDeque::new(), size: 0, size_max, changes: 0 }
    }

    /// A number that differs after each change: with one number, an index has one meaning.
    pub(super) fn changes(&self) -> u64 {
        self.changes
    }

    pub(super) fn set_size_max(&mut self, size_max: usize) {
        self.changes += 1;
        self.size_max = size_max;
        self.evict(0);
    }

    /// Inserts a field, unless it is larger than the table, which it then empties (RFC 7541 section
    /// 4.4). `name` makes the name of the entry from that of the field.
    pub(super) fn insert(&mut self, field: HpackField<'_>, name: impl FnOnce(&[u8]) -> TableName) {
        self.changes += 1;
        let size = field.name.len() + field.value.len() + ENTRY_OVERHEAD;
        self.evict(size);
        if size <= self.size_max {
            self.entries.push_front(TableEntry {
                name: name(field.name),
                value: field.value.into(),
                known: field.known,
            });
            self.size += size;
        }
    }

    fn evict(&mut self, room: usize) {
        while self.size + room > self.size_max {
            let Some(oldest) = self.entries.pop_back() else { return };
            self.size -= oldest.size();
        }
    }

    /// The field with an index of either table; `None` if there is none.
    pub(super) fn get(&self, index: usize) -> Option<HpackField<'_>> {
        let position = index.checked_sub(1)?;
        if let Some((name, value)) = STATIC.get(position) {
            let known = STATIC_KNOWN[position];
            return Some(HpackField { known, name: name.as_bytes(), value: value.as_bytes() });
        }
        let TableEntry { name, value, known } = self.entries.get(position - STATIC.len())?;
        Some(HpackField { known: *known, name, value })
    }

    /// The name with an index of either table.
    pub(super) fn name(&self, index: usize) -> Option<(Option<KnownField>, TableName)> {
        let position = index.checked_sub(1)?;
        if let Some((name, _)) = STATIC.get(position) {
            return Some((STATIC_KNOWN[position], TableName::Static(name)));
        }
        let TableEntry { name, known, .. } = self.entries.get(position - STATIC.len())?;
        Some((*known, name.clone()))
    }
}
