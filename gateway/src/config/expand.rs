//! Expands `${NAME}`, `${NAME:-default}` and `${file:PATH}` inside strings. Expansion is not
//! recursive.
//!
//! `$$` stands for one `$`; a `$` before any character but `{` or `$` is literal.

use std::cell::RefCell;
use std::fs;
use std::io::{self, Read};
use std::path::Path;

use super::fault::{ConfigProblem, FaultCode};
use super::model::ConfigFile;

/// Largest file that a value or a page may come from; a larger one is a mistake, such as a device.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Sources of expanded values: the environment and files.
pub(super) struct ExpansionEnvironment<'a> {
    /// Directory that relative paths are resolved against.
    pub(super) base: &'a Path,
    /// Looks up an environment variable.
    pub(super) variable: &'a dyn Fn(&str) -> Option<String>,
    /// Files read so far; a change of one of them triggers a reload.
    files_read: RefCell<Vec<ConfigFile>>,
}

impl<'a> ExpansionEnvironment<'a> {
    pub(super) fn new(base: &'a Path, variable: &'a dyn Fn(&str) -> Option<String>) -> Self {
        ExpansionEnvironment { base, variable, files_read: RefCell::default() }
    }

    /// Lets a change of a file trigger a reload. To be called before the file is read.
    pub(super) fn watch(&self, path: &Path) {
        self.files_read.borrow_mut().push(ConfigFile::before_use(path));
    }

    pub(super) fn files_read(&self) -> Vec<ConfigFile> {
        self.files_read.borrow().clone()
    }
}

/// Returns `text` with its placeholders expanded.
pub(super) fn expand(text: &str, environment: &ExpansionEnvironment<'_>) -> Result<String, ConfigProblem> {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(dollar) = rest.find('$') {
        expanded.push_str(&rest[..dollar]);
        let from = &rest[dollar..];
        rest = if let Some(after) = from.strip_prefix("${") {
            let Some(end) = after.find('}') else {
                let problem = ConfigProblem::new(FaultCode::Expansion, "`${` without a closing `}`");
                return Err(problem.hint("write `$$` for a literal `$`").excerpt(from));
            };
            let placeholder = &from[..end + 3];
            let value = resolve(&after[..end], environment).map_err(|problem| problem.excerpt(placeholder))?;
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

/// The inverse of `expand` for a text without placeholders.
pub(super) fn escape(text: &str) -> String {
    let is_read_back = !text.contains("$$") && !text.contains("${");
    if is_read_back { text.to_owned() } else { text.replace('$', "$$") }
}

/// Resolves a placeholder, given without its braces.
fn resolve(placeholder: &str, environment: &ExpansionEnvironment<'_>) -> Result<String, ConfigProblem> {
    if let Some(path) = placeholder.strip_prefix("file:") {
        let mut text = read_file(environment, path)?;
        // Editors append a newline at the end and `kubectl create secret` does not; it is never
        // part of the value.
        text.truncate(text.trim_end_matches(['\r', '\n']).len());
        return Ok(text);
    }
    let (name, default) = match placeholder.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (placeholder, None),
    };
    let is_name_char = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if name.is_empty() || !name.chars().all(is_name_char) || name.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(ConfigProblem::new(FaultCode::Expansion, format!("`{name}` is not a variable name"))
            .hint("write `${NAME}`, `${NAME:-default}` or `${file:PATH}`; `$$` is a literal `$`"));
    }
    // As in a shell, the default of `:-` also replaces a variable that is set and empty.
    let variable = (environment.variable)(name);
    match default {
        Some(default) => Ok(variable.filter(|value| !value.is_empty()).unwrap_or_else(|| default.to_owned())),
        None => variable.ok_or_else(|| {
            ConfigProblem::new(FaultCode::Expansion, format!("environment variable `{name}` is not set"))
                .hint(format!("set it, or write a default: `${{{name}:-value}}`"))
        }),
    }
}

/// Text of a regular file of at most 1 MiB; `path` is relative to the base directory.
pub(super) fn read_file(environment: &ExpansionEnvironment<'_>, path: &str) -> Result<String, ConfigProblem> {
    let path = environment.base.join(path);
    let problem = |reason: &dyn std::fmt::Display| {
        ConfigProblem::new(FaultCode::File, format!("cannot read {}: {reason}", path.display()))
    };
    // Checked before opening: opening a pipe blocks until another process writes to it.
    let metadata = fs::metadata(&path).map_err(|error| problem(&error))?;
    if !metadata.is_file() {
        return Err(problem(&"it is not a regular file"));
    }
    // Before its contents are read for the digest.
    if metadata.len() > FILE_BYTES_MAX {
        return Err(problem(&"it is larger than 1 MiB"));
    }
    environment.watch(&path);
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
    use std::path::PathBuf;
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
        let variable = |name: &str| match name {
            "HOST" => Some("edge-7".to_owned()),
            "EMPTY" => Some(String::new()),
            "NESTED" => Some("${HOST} $$".to_owned()),
            _ => None,
        };
        let environment = ExpansionEnvironment::new(&DIRECTORY, &variable);
        expand(text, &environment)
            .map_err(|problem| format!("{}: {}", problem.excerpt.unwrap_or_default(), problem.message))
    }

    #[test]
    fn failed_expansion_names_the_placeholder_and_reason() {
        for (text, want) in [
            ("a ${MISSING}", "${MISSING}: environment variable `MISSING` is not set"),
            ("${}", "${}: `` is not a variable name"),
            ("${A B}", "${A B}: `A B` is not a variable name"),
            ("${1A}", "${1A}: `1A` is not a variable name"),
            ("x${HOST", "${HOST: `${` without a closing `}`"),
            ("${HOST-x}", "${HOST-x}: `HOST-x` is not a variable name"),
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

    /// Not even for its digest.
    #[test]
    fn a_file_that_is_too_large_is_not_read() {
        let variable = |_: &str| None;
        let environment = ExpansionEnvironment::new(&DIRECTORY, &variable);
        let file = fs::File::create(DIRECTORY.join("large")).expect("the temporary directory is writable");
        file.set_len(FILE_BYTES_MAX + 1).expect("a sparse file");
        let problem = expand("${file:large}", &environment).expect_err("refused");
        assert!(problem.message.contains("larger than 1 MiB"), "{}", problem.message);
        assert_eq!(environment.files_read(), []);
        file.set_len(FILE_BYTES_MAX).expect("a sparse file");
        let text = expand("${file:large}", &environment).expect("accepted");
        assert_eq!((text.len() as u64, environment.files_read().len()), (FILE_BYTES_MAX, 1));
    }

    #[test]
    fn placeholders_are_expanded_once() {
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
