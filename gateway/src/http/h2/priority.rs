//! Priorities of responses (RFC 9218): urgency, and whether a response is useful in parts.

/// The priority of a response. A lower urgency is more urgent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Priority {
    pub(super) urgency: u8,
    pub(super) is_incremental: bool,
}

impl Default for Priority {
    fn default() -> Self {
        Priority { urgency: 3, is_incremental: false }
    }
}

impl Priority {
    /// Parses the value of a `priority` field or of a PRIORITY_UPDATE frame: a dictionary of `u`
    /// and `i` (RFC 9218 section 4). Other members and values are ignored, as the RFC demands.
    pub(super) fn parse(value: &[u8]) -> Priority {
        let mut priority = Priority::default();
        for member in value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
            match member.split(|byte| *byte == b';').next().unwrap_or_default() {
                [b'u', b'=', urgency @ b'0'..=b'7'] => priority.urgency = urgency - b'0',
                b"i" | b"i=?1" => priority.is_incremental = true,
                b"i=?0" => priority.is_incremental = false,
                _ => {}
            }
        }
        priority
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_that_are_not_understood_are_ignored() {
        let of = |urgency, is_incremental| Priority { urgency, is_incremental };
        for (value, expected) in [
            ("", of(3, false)),
            ("u=0", of(0, false)),
            ("u=7, i", of(7, true)),
            ("i;a=b,u=5;x", of(5, true)),
            ("i=?1, i=?0", of(3, false)),
            ("u=8", of(3, false)),
            ("u=-1,u=1.5,U=1,i=1,\"", of(3, false)),
        ] {
            assert_eq!(Priority::parse(value.as_bytes()), expected, "{value}");
        }
    }
}
