//! The effective configuration as text: the value of each key, and its origin.
//!
//! Invariant: no secret is printed.

use std::fmt::Write as _;

use super::check;
use super::document::{self, ConfigDocument};
use super::expand::ExpansionEnvironment;
use super::fault::ConfigReport;
use super::read_context::{EffectiveValue, ReadContext};
use super::{section, table_reader};

/// The parts of the effective configuration that are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrintOptions {
    /// Also keys that the document does not have.
    pub defaults: bool,
    /// A comment with the place of each value.
    pub origin: bool,
}

/// Last words of keys whose values are secrets.
const SECRETS: [&str; 3] = ["secret", "token", "password"];

/// One line for each key, `key = value`, in the order in which the sections are read.
///
/// # Errors
/// The faults of the document, if it has an error.
pub(super) fn print(document: &ConfigDocument<'_>, options: PrintOptions) -> Result<String, ConfigReport> {
    let report = |faults| ConfigReport::new(document.name, document.text, faults);
    let root = document::parse(document.text, document.format).map_err(report)?;
    let context = ReadContext::new(document.text, ExpansionEnvironment::new(document.base, document.env));
    let draft = table_reader::read_document(&context, &root, section::read);
    check::resolve(draft, &context);
    let values = context.values();
    let report = report(context.into_faults());
    if report.has_errors() {
        return Err(report);
    }
    let mut text = String::new();
    for value in values.iter().filter(|value| options.defaults || value.offset.is_some()) {
        let shown = if is_secret(value) { "\"***\"".to_owned() } else { without_password(&value.text) };
        let _infallible = write!(text, "{} = {shown}", value.path);
        if options.origin {
            let origin = value.offset.map_or_else(
                || "default".to_owned(),
                |offset| format!("{}:{}", document.name, line(document.text, offset)),
            );
            let _infallible = write!(text, "  # {origin}");
        }
        text.push('\n');
    }
    Ok(text)
}

/// The number of the line of a byte.
fn line(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}

fn is_secret(value: &EffectiveValue) -> bool {
    let name = value.path.rsplit('.').next().unwrap_or_default();
    SECRETS.contains(&name) && value.text != "\"\""
}

/// The text with the password of each URL replaced.
fn without_password(text: &str) -> String {
    let mut shown = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        shown.push_str(before);
        let end = after.find(['/', '"', ',', ' ']).unwrap_or(after.len());
        rest = after;
        if let Some((userinfo, _)) = after[..end].rsplit_once('@')
            && let Some((user, _)) = userinfo.split_once(':')
        {
            shown.push_str(user);
            shown.push_str(":***");
            rest = &after[userinfo.len()..];
        }
    }
    shown.push_str(rest);
    shown
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::document::DocumentFormat;
    use super::*;

    fn printed(text: &str, options: PrintOptions) -> Vec<String> {
        let env = |name: &str| (name == "SECRET").then(|| "hunter2hunter2hunter2hunter2".to_owned());
        let document =
            ConfigDocument { name: "t.toml", text, format: DocumentFormat::Toml, base: Path::new(""), env: &env };
        print(&document, options).expect("valid").lines().map(str::to_owned).collect()
    }

    const TEXT: &str = "version = 1\n[admin]\ntoken = \"${SECRET}\"\n[redis.regions.default]\n\
        endpoints = [\"redis://user:pa%73s@127.0.0.1:6379\"]\n[upstreams.shop]\nendpoints = [\"http://127.0.0.1:1\"]\n\
        [[routes]]\nname = \"all\"\nmatch = { path = \"/*\" }\nupstream = \"shop\"\n";

    #[test]
    fn values_of_the_document_have_their_line_and_no_secret() {
        let lines = printed(TEXT, PrintOptions { defaults: false, origin: true });
        for expected in [
            "version = 1  # t.toml:1",
            "admin.token = \"***\"  # t.toml:3",
            "redis.regions.default.endpoints = [\"redis://user:***@127.0.0.1:6379\"]  # t.toml:5",
            "routes[0].match.path = \"/*\"  # t.toml:10",
        ] {
            assert!(lines.iter().any(|line| line == expected), "{expected}: {lines:#?}");
        }
        assert!(!lines.iter().any(|line| line.contains("hunter2") || line.contains("default  #")), "{lines:#?}");
    }

    #[test]
    fn defaults_are_those_of_the_reference() {
        let lines = printed(TEXT, PrintOptions { defaults: true, origin: true });
        for expected in
            ["upstreams.shop.timeout = \"10s\"  # default", "limits_http.header_bytes = \"16KiB\"  # default"]
        {
            assert!(lines.iter().any(|line| line == expected), "{expected}: {lines:#?}");
        }
    }
}
