//! Expands the placeholders of a rule: escapes, dates relative to now in the three formats of HTTP,
//! and the path of the case.

use std::time::{Duration, SystemTime};

/// The values of the placeholders of a case.
#[derive(Clone, Debug)]
pub(crate) struct TemplateContext {
    /// The start of the case, in whole seconds.
    pub(crate) now: SystemTime,
    pub(crate) path: String,
}

impl TemplateContext {
    pub(crate) fn of(path: String) -> Self {
        TemplateContext { now: SystemTime::now(), path }
    }

    /// The bytes of an expanded text.
    pub(crate) fn bytes(&self, text: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut rest = text.as_bytes();
        while let Some((&byte, after)) = rest.split_first() {
            match byte {
                b'\\' => {
                    let (byte, length) = escape(after).unwrap_or_else(|| panic!("an unknown escape in {text:?}"));
                    bytes.push(byte);
                    rest = &after[length..];
                }
                b'{' => {
                    let end = after.iter().position(|byte| *byte == b'}').unwrap_or_else(|| panic!("{text:?}"));
                    let inner = std::str::from_utf8(&after[..end]).expect("part of a text");
                    bytes.extend(self.expand(inner));
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

    /// An expanded text, for comparisons.
    pub(crate) fn text(&self, text: &str) -> String {
        String::from_utf8_lossy(&self.bytes(text)).into_owned()
    }

    fn expand(&self, inner: &str) -> Vec<u8> {
        if inner == "path" {
            return self.path.clone().into_bytes();
        }
        if let Some((piece, count)) = inner.rsplit_once('*')
            && let Ok(count) = count.parse()
        {
            return self.bytes(piece).repeat(count);
        }
        let (form, offset) = inner.split_once(' ').unwrap_or(("", inner));
        let fixdate = httpdate::fmt_http_date(self.date(offset));
        match form {
            "" => fixdate,
            "rfc850" => rfc850(&fixdate),
            "asctime" => asctime(&fixdate),
            _ => panic!("unknown form {form:?}"),
        }
        .into_bytes()
    }

    /// `now`, `now-10s`, `now+2d`.
    fn date(&self, text: &str) -> SystemTime {
        let offset = text.strip_prefix("now").unwrap_or_else(|| panic!("unknown text {{{text}}}"));
        let Some(count) = offset.get(1..) else { return self.now };
        let (count, unit) = count.split_at(count.len() - 1);
        let count: u64 = count.parse().unwrap_or_else(|_| panic!("a count in {text:?}"));
        let unit = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            "d" => 86_400,
            _ => panic!("a unit in {text:?}"),
        };
        let offset_by = Duration::from_secs(count * unit);
        if offset.starts_with('-') { self.now - offset_by } else { self.now + offset_by }
    }
}

/// The parts of `Sun, 06 Nov 1994 08:49:37 GMT`: day of the week, day, month, year, time.
fn parts(fixdate: &str) -> [&str; 5] {
    [&fixdate[..3], &fixdate[5..7], &fixdate[8..11], &fixdate[12..16], &fixdate[17..25]]
}

/// `Sunday, 06-Nov-94 08:49:37 GMT`.
fn rfc850(fixdate: &str) -> String {
    let [weekday, day, month, year, time] = parts(fixdate);
    let long = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
    let weekday = long.iter().find(|long| long.starts_with(weekday)).expect("a day of the week");
    format!("{weekday}, {day}-{month}-{} {time} GMT", &year[2..])
}

/// `Sun Nov  6 08:49:37 1994`.
fn asctime(fixdate: &str) -> String {
    let [weekday, day, month, year, time] = parts(fixdate);
    let day = day.strip_prefix('0').map_or_else(|| day.to_owned(), |digit| format!(" {digit}"));
    format!("{weekday} {month} {day} {time} {year}")
}

/// Decodes one escape after its backslash: the byte, and the length of the escape.
fn escape(text: &[u8]) -> Option<(u8, usize)> {
    Some(match text.first()? {
        b'r' => (b'\r', 1),
        b'n' => (b'\n', 1),
        b't' => (b'\t', 1),
        b'0' => (0, 1),
        b's' => (b' ', 1),
        plain @ (b'\\' | b'{') => (*plain, 1),
        b'x' => (u8::from_str_radix(std::str::from_utf8(text.get(1..3)?).ok()?, 16).ok()?, 3),
        _ => return None,
    })
}

#[test]
fn dates_are_formatted_in_three_formats() {
    let context =
        TemplateContext { now: SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777), path: "/plain/a".into() };
    assert_eq!(context.text("{now}"), "Sun, 06 Nov 1994 08:49:37 GMT");
    assert_eq!(context.text("{now-37s}|{now+1d}"), "Sun, 06 Nov 1994 08:49:00 GMT|Mon, 07 Nov 1994 08:49:37 GMT");
    assert_eq!(context.text("{rfc850 now}"), "Sunday, 06-Nov-94 08:49:37 GMT");
    assert_eq!(context.text("{asctime now}"), "Sun Nov  6 08:49:37 1994");
    assert_eq!(context.text("{path}/b\\r\\n\\{{ab*2}"), "/plain/a/b\r\n{abab");
}
