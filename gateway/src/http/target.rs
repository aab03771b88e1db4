//! The normal form of a request target. It is made once, while the head is parsed; routes, limits,
//! keys and purges see no other form.
//!
//! In the normal form of a path, unreserved characters are not percent-encoded, other octets are
//! encoded with upper-case digits, there is no dot segment and no empty segment before the last
//! one. Decoding is done once: `%252e` stays. The query is no part of it, except that a backtick,
//! which browsers send, is encoded. docs/paths.md lists targets with their normal forms.

use std::borrow::Cow;

use super::message::Request;
use super::refusal::RequestRefusal;

/// Whether paths are brought into their normal form, and what an encoded slash means
/// (`server.paths`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PathRules {
    pub(crate) normalise: PathNormalisation,
    pub(crate) encoded_slash: EncodedSlashPolicy,
}

/// Whether paths are brought into their normal form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum PathNormalisation {
    #[default]
    On,
    /// Paths stay as received. Encoded control characters are refused all the same.
    Off,
}

/// Handling of `%2F`, `%5C` and `\` in a path. Some origins take them for separators, others do
/// not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum EncodedSlashPolicy {
    #[default]
    Refuse,
    /// They stay, encoded, and separate no segments.
    Keep,
    /// `%2F` separates segments. A backslash is refused.
    Decode,
}

/// Not allowed in any target: it is no character of a URI (RFC 3986 appendix A), and no client
/// sends it. `#` would begin a fragment. HTTP/2 libraries refuse the same bytes.
const EXCLUDED: u8 = 1;
const SLASH: u8 = 1 << 1;
const SLASH_OR_DOT: u8 = 1 << 2;
/// Written in another form, or not allowed, in a path.
const UNUSUAL: u8 = 1 << 3;
const QUESTION: u8 = 1 << 4;

/// The class of each byte in a target.
const CLASS: [u8; 256] = {
    let mut table = [EXCLUDED; 256];
    let mut byte = b'!';
    while byte <= b'~' {
        table[byte as usize] = match byte {
            b'#' | b'"' | b'<' | b'>' => EXCLUDED,
            b'/' => SLASH | SLASH_OR_DOT,
            b'.' => SLASH_OR_DOT,
            b'%' | b'\\' | b'`' | b'^' | b'{' | b'|' | b'}' | b'[' | b']' => UNUSUAL,
            b'?' => QUESTION,
            _ => 0,
        };
        byte += 1;
    }
    table
};

/// Result of one pass over the bytes of a target.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TargetScan {
    /// Bytes up to the first that is not allowed in a target.
    pub(crate) length: usize,
    path_len: usize,
    /// Whether the target is certainly in its normal form.
    is_plain: bool,
}

impl TargetScan {
    /// Scans the target at the front of `bytes`.
    pub(crate) fn of(bytes: &[u8]) -> TargetScan {
        let (mut seen, mut after_slash, mut at) = (0, 0, 0);
        for byte in bytes {
            let class = CLASS[usize::from(*byte)];
            if class & (EXCLUDED | QUESTION) != 0 {
                break;
            }
            // A slash or dot after a slash may begin an empty or a dot segment.
            seen |= class & (UNUSUAL | after_slash);
            after_slash = (class & SLASH) << 1;
            at += 1;
        }
        let path_len = at;
        let mut is_plain = seen == 0;
        for byte in &bytes[at..] {
            if CLASS[usize::from(*byte)] & EXCLUDED != 0 {
                break;
            }
            is_plain &= *byte != b'`';
            at += 1;
        }
        TargetScan { length: at, path_len, is_plain }
    }
}

/// Sets the target of `request` to the normal form of `target`, a path with an optional query that
/// `scan` has found to have no excluded byte.
///
/// # Errors
/// The reason why the path is refused.
pub(crate) fn receive(
    target: &str,
    scan: TargetScan,
    rules: PathRules,
    request: &mut Request,
) -> Result<(), RequestRefusal> {
    request.received_path = None;
    request.target.clear();
    if scan.is_plain {
        request.target.push_str(target);
        request.path_len = scan.path_len;
        return Ok(());
    }
    request.path_len = 0;
    request.path_len = write_normal(target, rules, &mut request.target)?;
    let received = &target[..scan.path_len];
    if received != request.path() {
        request.received_path = Some(received.into());
    }
    Ok(())
}

/// The normal form of a target that begins with a slash.
///
/// # Errors
/// The reason why a request with this target is refused.
pub fn normal(target: &str, rules: PathRules) -> Result<String, RequestRefusal> {
    if TargetScan::of(target.as_bytes()).length < target.len() || !target.starts_with('/') {
        return Err(RequestRefusal::Target);
    }
    let mut normal = String::with_capacity(target.len());
    write_normal(target, rules, &mut normal)?;
    Ok(normal)
}

/// Appends the normal form of `target` to `out`, which is empty; returns the length of its path.
fn write_normal(target: &str, rules: PathRules, out: &mut String) -> Result<usize, RequestRefusal> {
    let (path, query) = target.split_at(memchr::memchr(b'?', target.as_bytes()).unwrap_or(target.len()));
    match rules.normalise {
        PathNormalisation::On => write_normal_path(path, rules.encoded_slash, out)?,
        PathNormalisation::Off => {
            check_unnormalised(path)?;
            out.push_str(path);
        }
    }
    let path_len = out.len();
    let mut pieces = query.split('`');
    out.push_str(pieces.next().unwrap_or_default());
    for piece in pieces {
        out.push_str("%60");
        out.push_str(piece);
    }
    Ok(path_len)
}

/// Refuses what no rule allows.
fn check_unnormalised(path: &str) -> Result<(), RequestRefusal> {
    if path.contains('`') {
        return Err(RequestRefusal::Target);
    }
    let mut triplets = path.as_bytes().iter().enumerate().filter(|(_, byte)| **byte == b'%');
    let is_control = |at| octet(&path.as_bytes()[at..]).is_some_and(|octet| octet.is_ascii_control());
    if triplets.any(|(at, _)| is_control(at)) { Err(RequestRefusal::PathEncoding) } else { Ok(()) }
}

/// The octet that the triplet at the front of `bytes` encodes.
fn octet(bytes: &[u8]) -> Option<u8> {
    let [b'%', high, low, ..] = bytes else { return None };
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    Some(digit(*high)? << 4 | digit(*low)?)
}

fn write_normal_path(path: &str, encoded_slash: EncodedSlashPolicy, out: &mut String) -> Result<(), RequestRefusal> {
    out.push('/');
    let mut segment_start = out.len();
    let mut rest = path.as_bytes().strip_prefix(b"/").unwrap_or(path.as_bytes());
    while let Some((&first, after)) = rest.split_first() {
        let is_encoded = first == b'%';
        let byte = if is_encoded { octet(rest).ok_or(RequestRefusal::PathEncoding)? } else { first };
        rest = if is_encoded { &rest[3..] } else { after };
        match byte {
            b'/' if !is_encoded || encoded_slash == EncodedSlashPolicy::Decode => {
                end_segment(out, &mut segment_start)?;
                if out.len() > segment_start {
                    out.push('/');
                    segment_start = out.len();
                }
            }
            b'/' | b'\\' if encoded_slash != EncodedSlashPolicy::Keep => return Err(RequestRefusal::EncodedSlash),
            b'`' if !is_encoded => return Err(RequestRefusal::Target),
            _ if byte.is_ascii_control() => return Err(RequestRefusal::PathEncoding),
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            _ if is_encoded || CLASS[usize::from(byte)] & UNUSUAL != 0 => push_triplet(out, byte),
            _ => out.push(char::from(byte)),
        }
    }
    end_segment(out, &mut segment_start)
}

/// Removes the segment at the end of `out` if it is a dot segment, and with `..` the one before it
/// (RFC 3986 section 5.2.4).
fn end_segment(out: &mut String, segment_start: &mut usize) -> Result<(), RequestRefusal> {
    match &out[*segment_start..] {
        "." => out.truncate(*segment_start),
        ".." => {
            out.truncate(*segment_start - 1);
            let parent = memchr::memrchr(b'/', out.as_bytes()).unwrap_or(0);
            out.truncate(parent);
            out.push('/');
            *segment_start = out.len();
        }
        // Servlet containers remove the parameter first and then see a dot segment.
        segment if is_dot_segment_with_parameter(segment) => return Err(RequestRefusal::PathParameter),
        _ => {}
    }
    Ok(())
}

fn is_dot_segment_with_parameter(segment: &str) -> bool {
    let Some(rest) = segment.strip_prefix("..").or_else(|| segment.strip_prefix('.')) else { return false };
    rest.starts_with(';') || rest.starts_with("%3B")
}

fn push_triplet(out: &mut String, octet: u8) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    out.push('%');
    out.push(char::from(DIGITS[usize::from(octet >> 4)]));
    out.push(char::from(DIGITS[usize::from(octet & 15)]));
}

/// The form of a normal path that routes compare: reserved characters are decoded and the
/// parameters of segments (`;name=value`) left out, because many origins do so. `/a%40b` and
/// `/a;x/b` get the route, and with it the limits, of the path that such an origin sees. Keys and
/// origins get the normal form.
pub(crate) fn matched_path(path: &str) -> Cow<'_, str> {
    if memchr::memchr2(b'%', b';', path.as_bytes()).is_none() {
        return Cow::Borrowed(path);
    }
    let mut matched = String::with_capacity(path.len());
    for (number, segment) in path.split('/').enumerate() {
        if number > 0 && !matched.ends_with('/') {
            matched.push('/');
        }
        let mut rest = segment;
        while let Some(character) = rest.chars().next() {
            let reserved = octet(rest.as_bytes()).filter(|octet| is_reserved(*octet));
            rest = &rest[if reserved.is_some() { 3 } else { character.len_utf8() }..];
            match reserved.map_or(character, char::from) {
                ';' => break,
                character => matched.push(character),
            }
        }
    }
    Cow::Owned(matched)
}

/// The reserved characters that a segment may contain (RFC 3986 section 3.3).
fn is_reserved(octet: u8) -> bool {
    matches!(octet, b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+' | b',' | b';' | b'=' | b':' | b'@')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const fn rules(encoded_slash: EncodedSlashPolicy) -> PathRules {
        PathRules { normalise: PathNormalisation::On, encoded_slash }
    }
    const REFUSE: PathRules = rules(EncodedSlashPolicy::Refuse);
    const KEEP: PathRules = rules(EncodedSlashPolicy::Keep);
    const DECODE: PathRules = rules(EncodedSlashPolicy::Decode);
    const OFF: PathRules = PathRules { normalise: PathNormalisation::Off, encoded_slash: EncodedSlashPolicy::Refuse };
    const ALL: [PathRules; 4] = [REFUSE, KEEP, DECODE, OFF];

    fn of(target: &str, rules: PathRules) -> Result<String, RequestRefusal> {
        normal(target, rules)
    }

    #[test]
    fn equivalent_paths_have_one_normal_form() {
        for (target, expected) in [
            ("/", "/"),
            ("//", "/"),
            ("///a////b//", "/a/b/"),
            ("/.", "/"),
            ("/./a", "/a"),
            ("/a/.", "/a/"),
            ("/a/..", "/"),
            ("/a/../login/x", "/login/x"),
            ("/../../x", "/x"),
            ("/a/b/../../../c", "/c"),
            ("/a//../b", "/b"),
            ("/a/..//b", "/b"),
            ("/%6cogin/%7Ex", "/login/~x"),
            ("/%2e%2E/%2e/x", "/x"),
            ("/a/.%2e/x", "/x"),
            ("/.a/..b/.../a..", "/.a/..b/.../a.."),
            ("/%252e%252e/x", "/%252e%252e/x"),
            ("/%c3%a4%2b", "/%C3%A4%2B"),
            ("/a|b^{c}[d]", "/a%7Cb%5E%7Bc%7D%5Bd%5D"),
            ("/a%40b", "/a%40b"),
            ("/a;b=/c;", "/a;b=/c;"),
            ("/a;/../b", "/b"),
            ("/a%3fb%23", "/a%3Fb%23"),
            ("/a?b=//c/../d%2e%00%`", "/a?b=//c/../d%2e%00%%60"),
            ("/a?", "/a?"),
            ("/%61?x=`&y=``", "/a?x=%60&y=%60%60"),
        ] {
            for rules in [REFUSE, KEEP, DECODE] {
                assert_eq!(of(target, rules).as_deref(), Ok(expected), "{target}");
            }
        }
    }

    #[test]
    fn slashes_in_disguise_follow_the_configured_policy() {
        let refused = Err(RequestRefusal::EncodedSlash);
        for (target, kept, decoded) in [
            ("/a%2fb", "/a%2Fb", Some("/a/b")),
            ("/a%2F..%2fb", "/a%2F..%2Fb", Some("/b")),
            ("/a/..%2fb", "/a/..%2Fb", Some("/b")),
            ("/%2f%2Fb", "/%2F%2Fb", Some("/b")),
            ("/a%5cb", "/a%5Cb", None),
            ("/a\\b", "/a%5Cb", None),
            ("/..\\b", "/..%5Cb", None),
        ] {
            assert_eq!(of(target, REFUSE), refused, "{target}");
            assert_eq!(of(target, KEEP).as_deref(), Ok(kept), "{target}");
            assert_eq!(of(target, DECODE), decoded.map(str::to_owned).ok_or(RequestRefusal::EncodedSlash), "{target}");
            assert_eq!(of(target, OFF).as_deref(), Ok(target));
        }
    }

    #[test]
    fn unsafe_paths_are_refused() {
        for (target, refusal) in [
            ("/a%00", RequestRefusal::PathEncoding),
            ("/%0d%0aX:%20y", RequestRefusal::PathEncoding),
            ("/%1F", RequestRefusal::PathEncoding),
            ("/%7f", RequestRefusal::PathEncoding),
            ("/a#b", RequestRefusal::Target),
            ("/a?b#c", RequestRefusal::Target),
            ("/<a>", RequestRefusal::Target),
            ("/a?\"", RequestRefusal::Target),
            ("/a`", RequestRefusal::Target),
            ("/a b", RequestRefusal::Target),
            ("/\u{e4}", RequestRefusal::Target),
            ("a", RequestRefusal::Target),
            ("", RequestRefusal::Target),
        ] {
            for rules in ALL {
                assert_eq!(of(target, rules), Err(refusal), "{target}");
            }
        }
        for target in ["/%", "/%2", "/a%zz", "/%u002e", "/%%32%65"] {
            for rules in [REFUSE, KEEP, DECODE] {
                assert_eq!(of(target, rules), Err(RequestRefusal::PathEncoding), "{target}");
            }
            assert_eq!(of(target, OFF).as_deref(), Ok(target));
        }
        for target in ["/a/..;x/b", "/..;", "/.;/b", "/%2e.;a=b/c", "/..%3bx", "/a/.;"] {
            for rules in [REFUSE, KEEP, DECODE] {
                assert_eq!(of(target, rules), Err(RequestRefusal::PathParameter), "{target}");
            }
        }
    }

    #[test]
    fn routes_compare_reserved_characters_decoded_and_no_parameters() {
        for (path, expected) in [
            ("/a/b", "/a/b"),
            ("*", "*"),
            ("/a%40b%2B/%C3%A4%2F%20", "/a@b+/%C3%A4%2F%20"),
            ("/a;x/b;y=z/", "/a/b/"),
            ("/;x/a", "/a"),
            ("/a%3Bx/b", "/a/b"),
            ("/a/;", "/a/"),
            ("/account;x.css", "/account"),
        ] {
            assert_eq!(matched_path(path), expected, "{path}");
            assert_eq!(matched_path(expected), expected, "{expected}");
        }
        assert!(matches!(matched_path("/a/b"), Cow::Borrowed(_)));
    }

    fn target_text() -> impl Strategy<Value = String> {
        const SPECIAL: &[&str] =
            &["%2e", "%2E", "%2f", "%5C", "%25", "%61", "%3b", ";", "?", "`", "\\", "|", "%40", "%C3%a4"];
        let piece = prop_oneof![
            4 => "[a-c.~]{0,2}",
            3 => Just("/".to_owned()),
            1 => Just("..".to_owned()),
            1 => "%[0-9a-fA-F]{2}",
            1 => proptest::sample::select(SPECIAL.to_vec()).prop_map(str::to_owned),
            1 => "[!-~]",
        ];
        prop::collection::vec(piece, 0..12).prop_map(|pieces| format!("/{}", pieces.concat()))
    }

    /// The octets of all triplets in `path`; `None` for an incomplete one.
    fn octets(path: &str) -> Vec<Option<u8>> {
        path.match_indices('%').map(|(at, _)| octet(&path.as_bytes()[at..])).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4_000))]
        #[test]
        fn normal_form_is_stable_and_has_no_second_form(text in target_text(), choice in 0usize..4) {
            let rules = ALL[choice];
            let Ok(normal) = of(&text, rules) else { return Ok(()) };
            prop_assert_eq!(of(&normal, rules), Ok(normal.clone()), "{}", text);
            let path = normal.split('?').next().unwrap_or_default();
            prop_assert!(path.starts_with('/') && !normal.contains(['#', '`', '"', '<', '>']), "{}", normal);
            prop_assert!(normal.bytes().all(|byte| byte.is_ascii_graphic()));
            let matched = matched_path(path).into_owned();
            prop_assert_eq!(matched_path(&matched), matched.as_str());
            if rules == OFF {
                return Ok(());
            }
            for path in [path, matched.as_str()] {
                prop_assert!(!path.contains("//") && !path.contains(['\\', '|', '^', '{', '}', '[', ']']), "{}", path);
                prop_assert!(path.split('/').all(|segment| !matches!(segment, "." | "..")), "{}", path);
            }
            prop_assert!(!path.split('/').any(is_dot_segment_with_parameter), "{}", path);
            for octet in octets(path) {
                let is_needed = |octet: u8| {
                    !octet.is_ascii_control() && !octet.is_ascii_alphanumeric() && !b"-._~".contains(&octet)
                };
                prop_assert!(octet.is_some_and(is_needed), "{}", path);
            }
            let digits = path.match_indices('%').map(|(at, _)| &path[at..at + 3]);
            prop_assert!(!digits.flat_map(str::bytes).any(|byte| byte.is_ascii_lowercase()), "{}", path);
        }

        /// Targets are parsed into a used request.
        #[test]
        fn received_path_is_kept_only_where_it_differs(before in target_text(), text in target_text()) {
            let mut request = Request::default();
            let mut receive = |text: &str| {
                let scan = TargetScan::of(text.as_bytes());
                prop_assume!(scan.length == text.len());
                Ok((receive(text, scan, KEEP, &mut request), scan.is_plain, request.clone()))
            };
            receive(&before)?.0.ok();
            let (received, is_plain, request) = receive(&text)?;
            let expected = of(&text, KEEP);
            prop_assert_eq!(received.map(|()| request.target.clone()), expected.clone());
            let Ok(target) = expected else { return Ok(()) };
            let path = |target: &str| target.split('?').next().unwrap_or_default().to_owned();
            prop_assert_eq!(request.path(), path(&target));
            let kept = (path(&text) != path(&target)).then(|| path(&text));
            prop_assert_eq!(request.received_path.as_deref(), kept.as_deref());
            prop_assert!(!is_plain || target == text, "{}", text);
        }
    }
}
