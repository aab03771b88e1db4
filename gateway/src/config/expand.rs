//! Replaces `${NAME}`, `${NAME:-default}` and `${file:PATH}` inside strings, once: what comes in is never looked at again.
//!
//! `$$` stands for one `$`; a `$` before anything but `{` or `$` is itself.

use std::cell::RefCell;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::fault::{Code, Problem};

/// Bytes of a file that a value or a page may come from; more is a mistake, such as a device.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Where values come from.
pub(super) struct Values<'a> {
    /// Relative paths start here.
    pub(super) base: &'a Path,
    /// Looks a name up in the environment.
    pub(super) env: &'a dyn Fn(&str) -> Option<String>,
    /// The files that were read, so that a change of them can be noticed.
    read: RefCell<Vec<PathBuf>>,
}

impl<'a> Values<'a> {
    pub(super) fn new(base: &'a Path, env: &'a dyn Fn(&str) -> Option<String>) -> Self {
        Values { base, env, read: RefCell::default() }
    }

    pub(super) fn files_read(&self) -> Vec<PathBuf> {
        self.read.borrow().clone()
    }
}

/// `text` with its placeholders replaced.
pub(super) fn expand(text: &str, values: &Values<'_>) -> Result<String, Problem> {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(dollar) = rest.find('$') {
        expanded.push_str(&rest[..dollar]);
        let from = &rest[dollar..];
        rest = if let Some(after) = from.strip_prefix("${") {
            let Some(end) = after.find('}') else {
                let problem = Problem::new(Code::Expansion, "`${` has no `}`").hint("write `$$` for a literal `$`");
                return Err(problem.within(from));
            };
            let placeholder = &from[..end + 3];
            let value = value(&after[..end], values).map_err(|problem| problem.within(placeholder))?;
            expanded.push_str(&value);
            &after[end + 1..]
        } else {
            expanded.push('$');
            from.strip_prefix("$$").unwrap_or(&from[1..])
        };
    }
    expanded.push_str(rest);
    Ok(expanded)
}

/// The value of what stands between the braces.
fn value(inner: &str, values: &Values<'_>) -> Result<String, Problem> {
    if let Some(path) = inner.strip_prefix("file:") {
        let mut text = read_file(values, path)?;
        // Editors and `kubectl create secret` disagree about the newline at the end; nobody means it.
        text.truncate(text.trim_end_matches(['\r', '\n']).len());
        return Ok(text);
    }
    let (name, default) = match inner.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (inner, None),
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if name.is_empty() || !name.chars().all(plain) || name.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(Problem::new(Code::Expansion, format!("`{name}` is not a variable's name"))
            .hint("write `${NAME}`, `${NAME:-default}` or `${file:PATH}`; `$$` is a literal `$`"));
    }
    // As in a shell, `:-` also stands in for a variable that is set and empty.
    let set = (values.env)(name);
    match default {
        Some(default) => Ok(set.filter(|value| !value.is_empty()).unwrap_or_else(|| default.to_owned())),
        None => set.ok_or_else(|| {
            Problem::new(Code::Expansion, format!("the environment has no `{name}`"))
                .hint(format!("set it, or write a default: `${{{name}:-value}}`"))
        }),
    }
}

/// The text of a regular file of at most a mebibyte, `path` being relative to the base.
pub(super) fn read_file(values: &Values<'_>, path: &str) -> Result<String, Problem> {
    let path = values.base.join(path);
    values.read.borrow_mut().push(path.clone());
    let problem =
        |reason: &dyn std::fmt::Display| Problem::new(Code::File, format!("cannot read {}: {reason}", path.display()));
    // Asked before opening: a pipe would block until somebody writes to it.
    let metadata = fs::metadata(&path).map_err(|error| problem(&error))?;
    if !metadata.is_file() {
        return Err(problem(&"it is not a regular file"));
    }
    let mut text = String::new();
    let read = fs::File::open(&path).and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text));
    match read {
        Ok(bytes) if bytes as u64 <= FILE_BYTES_MAX => Ok(text),
        Ok(_) => Err(problem(&"it is larger than 1 MiB")),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(problem(&"it is not UTF-8 text")),
        Err(error) => Err(problem(&error)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use super::*;

    static DIRECTORY: LazyLock<PathBuf> = LazyLock::new(|| {
        let directory = std::env::temp_dir().join(format!("tidegate-expand-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("the temporary directory is writable");
        fs::write(directory.join("secret"), "s3cret$HOST\r\n").expect("the temporary directory is writable");
        fs::write(directory.join("binary"), [0xff]).expect("the temporary directory is writable");
        directory
    });

    fn expanded(text: &str) -> Result<String, String> {
        let env = |name: &str| match name {
            "HOST" => Some("edge-7".to_owned()),
            "EMPTY" => Some(String::new()),
            "NESTED" => Some("${HOST} $$".to_owned()),
            _ => None,
        };
        let values = Values::new(&DIRECTORY, &env);
        expand(text, &values).map_err(|problem| format!("{}: {}", problem.within.unwrap_or_default(), problem.message))
    }

    #[test]
    fn what_cannot_be_replaced_is_named() {
        for (text, want) in [
            ("a ${MISSING}", "${MISSING}: the environment has no `MISSING`"),
            ("${}", "${}: `` is not a variable's name"),
            ("${A B}", "${A B}: `A B` is not a variable's name"),
            ("${1A}", "${1A}: `1A` is not a variable's name"),
            ("x${HOST", "${HOST: `${` has no `}`"),
            ("${HOST-x}", "${HOST-x}: `HOST-x` is not a variable's name"),
        ] {
            assert_eq!(expanded(text), Err(want.to_owned()), "{text}");
        }
        for (text, reason) in
            [("${file:absent}", "No such file"), ("${file:.}", "not a regular file"), ("${file:binary}", "not UTF-8")]
        {
            let fault = expanded(text).expect_err(text);
            assert!(fault.contains(reason), "{fault}");
        }
    }

    #[test]
    fn placeholders_are_replaced_once() {
        for (text, want) in [
            ("", ""),
            ("plain", "plain"),
            ("${HOST}", "edge-7"),
            ("<${HOST}:${HOST}>", "<edge-7:edge-7>"),
            ("${MISSING:-}", ""),
            ("${MISSING:-a:-b}", "a:-b"),
            ("${EMPTY:-full}", "full"),
            ("${EMPTY}", ""),
            ("${NESTED}", "${HOST} $$"),
            ("${file:secret}", "s3cret$HOST"),
            ("$$", "$"),
            ("$${HOST}", "${HOST}"),
            ("$$${HOST}", "$edge-7"),
            ("a$b$", "a$b$"),
            ("é${HOST}é", "éedge-7é"),
        ] {
            assert_eq!(expanded(text).as_deref(), Ok(want), "{text}");
        }
    }
}
