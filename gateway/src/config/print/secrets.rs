//! The secrets of a configuration, as they are printed.
//!
//! A placeholder such as `${NAME}` or `${file:PATH}` is printed as the document writes it, because
//! it names the secret and does not contain it. A secret that is written as text is replaced by a
//! text that is accepted in its place.

use super::layout::Segment;

/// Words in the names of fields and parameters whose values are secrets.
const SECRET_NAMES: [&str; 13] = [
    "auth",
    "cookie",
    "key",
    "token",
    "secret",
    "password",
    "passwd",
    "credential",
    "session",
    "signature",
    "verif",
    "jwt",
    "bearer",
];
/// A text of a request field this long that mixes letters and digits is taken for a secret.
const RANDOM_CHARS_MIN: usize = 16;

/// The part of a value that is secret, by its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Secrecy {
    /// The password of a URL, and its query.
    Url,
    /// The password of a URL, and every placeholder: its query is a template.
    Template,
    /// The value itself, replaced by this text.
    Value(&'static str),
    /// A text that looks like a secret, and every placeholder, replaced by this text.
    Field(&'static str),
}

impl Secrecy {
    pub(super) fn of(path: &[Segment]) -> Self {
        let keys: Vec<&str> = path
            .iter()
            .filter_map(|segment| match segment {
                Segment::Key(key) => Some(&**key),
                Segment::Index(_) => None,
            })
            .collect();
        let Some((name, tables)) = keys.split_last() else { return Secrecy::Url };
        // `*` is a wildcard in the values of conditions.
        let is_condition = tables.contains(&"match") || tables.contains(&"canary");
        let replacement = if is_condition { "REDACTED" } else { "***" };
        let is_named = is_secret_name(name);
        match (tables, &*name.to_ascii_lowercase()) {
            (_, "secret" | "password") | (["admin"], "token") => Secrecy::Value(replacement),
            (
                ["routes", .., "headers" | "header" | "query"] | ["routes", .., "set" | "add"] | ["tracing", "headers"],
                _,
            ) => match is_named {
                true => Secrecy::Value(replacement),
                false if tables.contains(&"response") => Secrecy::Template,
                false => Secrecy::Field(replacement),
            },
            (_, "to") => Secrecy::Template,
            _ => Secrecy::Url,
        }
    }

    /// The text to print in place of `written`, unless `effective`, its text without placeholders,
    /// is no secret.
    pub(super) fn conceal(self, written: &str, effective: &str) -> Option<String> {
        let masked = Masked::new(written);
        let has_placeholder = !masked.placeholders.is_empty();
        let shown = match self {
            _ if written.is_empty() => return None,
            // A condition that any value meets.
            Secrecy::Value("REDACTED") | Secrecy::Field("REDACTED") if written == "*" => return None,
            Secrecy::Value(replacement) => masked.without_literals(&masked.text, replacement),
            Secrecy::Field(replacement) if has_placeholder || is_random(written) => {
                masked.without_literals(&masked.text, replacement)
            }
            Secrecy::Url if masked.is_url() => masked.without_query(&masked.without_password()),
            Secrecy::Url | Secrecy::Template | Secrecy::Field(_) => masked.without_password(),
        };
        // Any part of a URL may be a secret, and its parts may be in the placeholder.
        let is_of_url = || effective.starts_with('/') || effective.contains("://") || effective.contains('?');
        let is_reference = has_placeholder && (self == Secrecy::Template || is_of_url());
        (shown != masked.text || is_reference).then(|| masked.restore(&shown))
    }
}

/// `text` without the passwords of URLs, for values that no rule has concealed.
pub(super) fn without_passwords(text: String) -> String {
    Masked { text, placeholders: Vec::new() }.without_password()
}

fn is_secret_name(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    SECRET_NAMES.iter().any(|word| name.contains(word))
}

fn is_random(text: &str) -> bool {
    let count = |is_of: fn(&u8) -> bool| text.bytes().filter(is_of).count();
    text.len() >= RANDOM_CHARS_MIN
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+/_-=%".contains(&byte))
        && count(u8::is_ascii_digit) >= 3
        && count(u8::is_ascii_alphabetic) >= 3
}

/// A text whose placeholders are replaced by one character each, so that it can be cut like a URL.
struct Masked<'w> {
    text: String,
    placeholders: Vec<&'w str>,
}

/// The first of the characters that stand for placeholders, of a private use area.
const MASK: u32 = 0xF_0000;

impl<'w> Masked<'w> {
    fn new(written: &'w str) -> Self {
        let (mut text, mut placeholders, mut rest) = (String::new(), Vec::new(), written);
        while let Some(at) = rest.find("${") {
            // An even number of `$` before it makes the last one a placeholder.
            let escapes = rest[..at].bytes().rev().take_while(|byte| *byte == b'$').count();
            let Some(end) = rest[at..].find('}').filter(|_| escapes.is_multiple_of(2)) else {
                text.push_str(&rest[..at + 2]);
                rest = &rest[at + 2..];
                continue;
            };
            text.push_str(&rest[..at]);
            text.extend(u32::try_from(placeholders.len()).ok().and_then(|index| char::from_u32(MASK + index)));
            placeholders.push(&rest[at..=at + end]);
            rest = &rest[at + end + 1..];
        }
        text.push_str(rest);
        Masked { text, placeholders }
    }

    fn placeholder(&self, mask: char) -> Option<&'w str> {
        let index = u32::from(mask).checked_sub(MASK)?;
        self.placeholders.get(usize::try_from(index).ok()?).copied()
    }

    fn restore(&self, text: &str) -> String {
        let restored = |mask: char| self.placeholder(mask).map_or_else(|| mask.to_string(), without_secret_default);
        text.chars().map(restored).collect()
    }

    /// The placeholders of a secret, without their defaults; other parts are replaced, except for
    /// the scheme of credentials before a placeholder (`Bearer `).
    fn without_literals(&self, secret: &str, replacement: &str) -> String {
        let mut shown = String::new();
        for piece in secret.split_inclusive(|mask| self.placeholder(mask).is_some()) {
            let mask = piece.chars().next_back().filter(|mask| self.placeholder(*mask).is_some());
            let literal = &piece[..piece.len() - mask.map_or(0, char::len_utf8)];
            let is_scheme = mask.is_some()
                && literal.strip_suffix(' ').is_some_and(|word| word.bytes().all(|byte| byte.is_ascii_alphabetic()));
            if is_scheme {
                shown.push_str(literal);
            } else if !literal.is_empty() {
                shown.push_str(replacement);
            }
            match mask.and_then(|mask| self.placeholder(mask)) {
                None => {}
                Some(written) => match written.split_once(":-") {
                    Some((name, default)) if default != "}" => shown.push_str(&format!("{name}:-{replacement}}}")),
                    _ => shown.push_str(written),
                },
            }
        }
        shown
    }

    fn is_url(&self) -> bool {
        self.text.contains("://") || self.text.starts_with('/')
    }

    /// The text with the password of each URL replaced.
    fn without_password(&self) -> String {
        let (mut shown, mut rest) = (String::new(), &*self.text);
        while let Some(at) = rest.find("://") {
            let (before, after) = rest.split_at(at + 3);
            shown.push_str(before);
            let end = after.find(['/', '"', ',', ' ', '?']).unwrap_or(after.len());
            rest = after;
            if let Some((userinfo, _)) = after[..end].rsplit_once('@')
                && let Some((user, password)) = userinfo.split_once(':')
            {
                shown.push_str(user);
                shown.push(':');
                shown.push_str(&self.without_literals(password, "***"));
                rest = &after[userinfo.len()..];
            }
        }
        shown.push_str(rest);
        shown
    }

    /// `url` with the secrets in its query replaced: the values of parameters whose names indicate
    /// credentials, and what looks like a secret.
    fn without_query(&self, url: &str) -> String {
        let Some((before, query)) = url.split_once('?') else { return url.to_owned() };
        let concealed: Vec<String> = query
            .split('&')
            .map(|parameter| match parameter.split_once('=') {
                Some((name, value)) if is_secret_name(name) || is_random(value) => {
                    format!("{name}={}", self.without_literals(value, "***"))
                }
                None if is_random(parameter) => self.without_literals(parameter, "***"),
                _ => parameter.to_owned(),
            })
            .collect();
        format!("{before}?{}", concealed.join("&"))
    }
}

/// A placeholder as it is written, without the secrets of a URL that is its default.
fn without_secret_default(placeholder: &str) -> String {
    let Some((name, default)) = placeholder.split_once(":-") else { return placeholder.to_owned() };
    let default = Masked { text: default.trim_end_matches('}').to_owned(), placeholders: Vec::new() };
    let shown = default.without_password();
    let shown = if default.is_url() { default.without_query(&shown) } else { shown };
    format!("{name}:-{shown}}}")
}

#[cfg(test)]
mod tests {
    use super::super::super::reference::documented_keys;
    use super::super::layout::segments;
    use super::*;

    /// `${T}` stands for a token, `${U}` for a URL with a password, `${P}` for a path.
    fn concealed(path: &str, written: &str) -> Option<String> {
        let effective = written.replace("${T}", "abc").replace("${U}", "redis://u:abc@h:1").replace("${P}", "/abc");
        Secrecy::of(&segments(path)).conceal(written, &effective)
    }

    /// A table of fields, parameters or conditions that is new needs a decision here.
    #[test]
    fn each_key_with_a_free_name_has_its_class() {
        let mut classes: Vec<(String, Secrecy)> = documented_keys()
            .filter(|(spec, _)| spec.key.ends_with(".NAME"))
            .map(|(spec, _)| {
                let secrecy = Secrecy::of(&segments(&spec.key.replace("NAME", "x-token").replace("[]", "[0]")));
                (spec.key, secrecy)
            })
            .collect();
        classes.sort_by(|(key, _), (other, _)| key.cmp(other));
        let mut expected = [
            ("identity.geoip.regions.NAME", Secrecy::Url),
            ("tiers.NAME", Secrecy::Url),
            ("limits.NAME.reserve.NAME", Secrecy::Url),
            ("pages.NAME", Secrecy::Url),
            ("routes[].match.headers.NAME", Secrecy::Value("REDACTED")),
            ("routes[].match.query.NAME", Secrecy::Value("REDACTED")),
            ("routes[].canary.header.NAME", Secrecy::Value("REDACTED")),
            ("routes[].headers.request.set.NAME", Secrecy::Value("***")),
            ("routes[].headers.request.add.NAME", Secrecy::Value("***")),
            ("routes[].headers.response.set.NAME", Secrecy::Value("***")),
            ("routes[].headers.response.add.NAME", Secrecy::Value("***")),
            ("routes[].pages.NAME", Secrecy::Url),
            ("routes[].cost_by_status.NAME", Secrecy::Url),
            ("routes[].cache.ttl.NAME", Secrecy::Url),
            ("tracing.headers.NAME", Secrecy::Value("***")),
        ]
        .map(|(key, secrecy)| (key.to_owned(), secrecy));
        expected.sort_by(|(key, _), (other, _)| key.cmp(other));
        assert_eq!(classes, expected);
    }

    #[test]
    fn secrets_are_replaced_and_their_references_kept() {
        for (path, written, expected) in [
            ("admin.token", "", None),
            ("admin.token", "abc", Some("***")),
            ("admin.token", "${T}", Some("${T}")),
            ("admin.token", "${T:-}", Some("${T:-}")),
            ("admin.token", "${T:-abc}", Some("${T:-***}")),
            ("admin.token", "${file:/run/secrets/t}", Some("${file:/run/secrets/t}")),
            ("identity.user.jwt.token", "header:x-token", None),
            ("tracing.headers.authorization", "Bearer ${T}", Some("Bearer ${T}")),
            ("tracing.headers.authorization", "Bearer abc", Some("***")),
            ("tracing.headers.authorization", "abc${T}", Some("***${T}")),
            ("routes[0].headers.request.set.x-plain", "shown", None),
            ("routes[0].headers.request.set.x-plain", "${T}", Some("${T}")),
            ("routes[0].headers.request.set.x-plain", "4f1cA9d27be03c55", Some("***")),
            ("routes[0].headers.response.set.strict-transport-security", "max-age=31536000", None),
            ("routes[0].match.headers.x-canary", "1", None),
            ("routes[0].match.headers.cookie", "*", None),
            ("admin.token", "*", Some("***")),
            ("routes[0].match.headers.x-origin-verify", "s3cret", Some("REDACTED")),
            ("routes[0].match.headers.x-edge", "4f1cA9d27be03c55", Some("REDACTED")),
            ("routes[0].match.query.access_token", "abc", Some("REDACTED")),
            ("redis.regions.a.endpoints", "redis://u:pa%73@h:1/2", Some("redis://u:***@h:1/2")),
            ("redis.regions.a.endpoints", "redis://:${file:/a/b}@h:1", Some("redis://:${file:/a/b}@h:1")),
            ("redis.regions.a.endpoints", "redis://${HOST:-h}:1", Some("redis://${HOST:-h}:1")),
            ("redis.regions.a.endpoints", "redis://h:1", None),
            ("redis.regions.a.endpoints", "${U}", Some("${U}")),
            ("redis.regions.a.endpoints", "${X:-redis://u:abc@h:1}", Some("${X:-redis://u:***@h:1}")),
            ("redis.regions.a.cluster", "${U}", Some("${U}")),
            ("routes[0].auth.forward", "http://h/v?key=abc&x", Some("http://h/v?key=***&x")),
            ("routes[0].auth.forward", "${U}", Some("${U}")),
            ("routes[0].auth.forward", "${X:-http://h/v?key=abc}", Some("${X:-http://h/v?key=***}")),
            ("routes[0].headers.response.set.x-backend", "${T}", Some("${T}")),
            ("routes[0].headers.response.set.x-backend", "a ${T} b", Some("a ${T} b")),
            ("routes[0].respond.body", "${U}", Some("${U}")),
            ("upstreams.a.health.path", "/h/${T}", Some("/h/${T}")),
            ("upstreams.a.health.path", "${P}", Some("${P}")),
            ("upstreams.a.health.path", "/healthz?full=1", None),
            ("upstreams.a.health.path", "/h?full=1&v=4f1cA9d27be03c55", Some("/h?full=1&v=***")),
            ("server.node", "${T}", None),
            ("routes[0].canary.header.x-canary-token", "abc", Some("REDACTED")),
            ("routes[0].canary.header.x-canary-token", "${T}", Some("${T}")),
            ("routes[0].canary.header.x-canary", "${T}", Some("${T}")),
            ("routes[0].canary.header.x-canary", "1", None),
            ("routes[0].auth.forward", "http://h/v?key=${K}", Some("http://h/v?key=${K}")),
            ("upstreams.a.health.path", "/healthz?key=abc", Some("/healthz?key=***")),
            ("routes[0].redirect.to", "/new/{rest}?{query}", None),
            ("routes[0].respond.body", "what? $${x}", None),
        ] {
            assert_eq!(concealed(path, written).as_deref(), expected, "{path} = {written}");
        }
    }
}
