//! Faults of a configuration: each has a location, and is rendered for people or as JSON.

use std::fmt;
use std::ops::Range;

use annotate_snippets::{AnnotationKind, Level, Renderer, Snippet};
use serde::Serialize;

/// Whether a fault rejects the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FaultSeverity {
    /// The configuration is rejected.
    Error,
    /// The configuration is accepted, but probably does not do what was intended.
    Warning,
}

/// Category of a fault. Stable, unlike the wording of its message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultCode {
    /// The text is neither TOML nor JSON.
    Syntax,
    /// A key that does not exist.
    UnknownKey,
    /// A key that was renamed and is removed in the next version.
    Deprecated,
    /// A value of the wrong type.
    WrongType,
    /// A value of the right type that is malformed or out of range.
    BadValue,
    /// A required key is absent.
    Missing,
    /// Something that may exist only once exists twice.
    Duplicate,
    /// A feature that this version does not have.
    Unavailable,
    /// A name that is not defined.
    UnknownName,
    /// A file that cannot be read.
    File,
    /// A `${}` that cannot be expanded.
    Expansion,
    /// A definition that is never used.
    Unused,
    /// A valid setting with a surprising consequence.
    Risk,
}

impl FaultCode {
    /// The code in messages, such as `unknown-key`.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            FaultCode::Syntax => "syntax",
            FaultCode::UnknownKey => "unknown-key",
            FaultCode::Deprecated => "deprecated",
            FaultCode::WrongType => "wrong-type",
            FaultCode::BadValue => "bad-value",
            FaultCode::Missing => "missing",
            FaultCode::Duplicate => "duplicate",
            FaultCode::Unavailable => "unavailable",
            FaultCode::UnknownName => "unknown-name",
            FaultCode::File => "file",
            FaultCode::Expansion => "expansion",
            FaultCode::Unused => "unused",
            FaultCode::Risk => "risk",
        }
    }
}

/// A problem with one value, not yet connected to its location.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ConfigProblem {
    pub(super) code: FaultCode,
    pub(super) message: String,
    pub(super) hint: Option<String>,
    /// The part of the value, as written in the source, that causes the problem.
    pub(super) excerpt: Option<String>,
    /// Keys that may lack their value because of another fault. The problem is then its
    /// consequence, and is not reported.
    pub(super) lacking: Vec<String>,
}

impl ConfigProblem {
    pub(super) fn new(code: FaultCode, message: impl Into<String>) -> Self {
        ConfigProblem { code, message: message.into(), hint: None, excerpt: None, lacking: Vec::new() }
    }

    pub(super) fn bad_value(message: impl Into<String>) -> Self {
        ConfigProblem::new(FaultCode::BadValue, message)
    }

    /// A feature of a later version; `feature` is the subject of the sentence.
    pub(super) fn unavailable(feature: &str) -> Self {
        ConfigProblem::new(FaultCode::Unavailable, format!("{feature} is not available yet"))
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The problem is that these keys have no value, or not the one that is meant.
    pub(super) fn lacks(mut self, keys: &[&str]) -> Self {
        self.lacking.extend(keys.iter().map(|key| (*key).to_owned()));
        self
    }

    pub(super) fn excerpt(mut self, part: &str) -> Self {
        self.excerpt = Some(part.to_owned());
        self
    }
}

/// A location in the document.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct DocumentLocation {
    /// The key, such as `routes[2].upstream`; empty for the document.
    pub(super) path: String,
    /// Byte range in the source.
    pub(super) span: Range<usize>,
}

impl DocumentLocation {
    pub(super) fn error(&self, problem: ConfigProblem) -> ConfigFault {
        self.fault(FaultSeverity::Error, problem)
    }

    pub(super) fn warning(&self, problem: ConfigProblem) -> ConfigFault {
        self.fault(FaultSeverity::Warning, problem)
    }

    fn fault(&self, severity: FaultSeverity, problem: ConfigProblem) -> ConfigFault {
        ConfigFault {
            severity,
            code: problem.code,
            message: problem.message,
            path: self.path.clone(),
            span: self.span.clone(),
            hint: problem.hint,
        }
    }
}

/// A problem and its location.
#[derive(Clone, Debug, PartialEq)]
pub struct ConfigFault {
    /// Whether the fault rejects the configuration.
    pub(crate) severity: FaultSeverity,
    /// Category of the fault.
    pub(crate) code: FaultCode,
    /// A sentence in lower case, without the location.
    pub(crate) message: String,
    /// The key, such as `routes[2].upstream`; empty if the fault concerns the whole document.
    pub(crate) path: String,
    /// Byte range in the source; empty at 0 if the fault has no location.
    pub(crate) span: Range<usize>,
    /// How to fix the fault.
    pub(crate) hint: Option<String>,
}

impl ConfigFault {
    /// Whether the value of `key` may be lost to this error: the error is in the value or in a
    /// table around it, or is that of an unknown key beside it, whose name may be meant for it.
    pub(super) fn explains_absence_of(&self, key: &str) -> bool {
        let is_under = |path: &str, table: &str| {
            path.strip_prefix(table).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        };
        if self.path.is_empty() {
            return false;
        }
        if self.code == FaultCode::UnknownKey {
            let (table, name) = key.rsplit_once('.').unwrap_or(("", key));
            let beside = self.path.rsplit_once('.').map_or("", |(table, _)| table);
            let is_meant = self.hint.as_ref().is_some_and(|hint| *hint == format!("did you mean `{name}`?"));
            return beside == table && is_meant;
        }
        is_under(&self.path, key) || is_under(key, &self.path)
    }
}

/// The faults of one document, in source order.
#[derive(Clone, Debug, PartialEq)]
pub struct ConfigReport {
    name: String,
    source: String,
    faults: Vec<ConfigFault>,
}

/// A fault in the output of `check --json`.
#[derive(Serialize)]
struct FaultJson<'a> {
    severity: FaultSeverity,
    code: FaultCode,
    path: &'a str,
    line: usize,
    column: usize,
    message: &'a str,
    hint: Option<&'a str>,
}

impl ConfigReport {
    /// `name` is the document's name in messages: the path of the file as given by the user.
    pub(super) fn new(name: &str, source: &str, mut faults: Vec<ConfigFault>) -> Self {
        faults.sort_by_key(|fault| fault.span.start);
        ConfigReport { name: name.to_owned(), source: source.to_owned(), faults }
    }

    /// The document's name in messages.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The faults, in source order.
    pub(crate) fn faults(&self) -> &[ConfigFault] {
        &self.faults
    }

    /// The number of faults of one severity.
    pub(crate) fn count(&self, severity: FaultSeverity) -> usize {
        self.faults.iter().filter(|fault| fault.severity == severity).count()
    }

    /// Whether the report has neither errors nor warnings.
    pub fn is_empty(&self) -> bool {
        self.faults.is_empty()
    }

    /// Whether one of the faults rejects the configuration.
    pub(crate) fn has_errors(&self) -> bool {
        self.faults.iter().any(|fault| fault.severity == FaultSeverity::Error)
    }

    /// Line and column of a fault, both from 1; columns count characters.
    pub(crate) fn position(&self, fault: &ConfigFault) -> (usize, usize) {
        let before = &self.source[..self.char_boundary(fault.span.start)];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let line = before.matches('\n').count() + 1;
        (line, before[line_start..].chars().count() + 1)
    }

    /// The faults as a JSON array of `{severity, code, path, line, column, message, hint}`.
    pub fn to_json(&self) -> serde_json::Value {
        let faults = self.faults.iter().map(|fault| {
            let (line, column) = self.position(fault);
            FaultJson {
                severity: fault.severity,
                code: fault.code,
                path: &fault.path,
                line,
                column,
                message: &fault.message,
                hint: fault.hint.as_deref(),
            }
        });
        serde_json::to_value(faults.collect::<Vec<_>>()).expect("strings and numbers always serialize")
    }

    /// The faults as text with excerpts of the source; the renderer decides on colours.
    pub fn render(&self, renderer: &Renderer) -> String {
        let rendered = self.faults.iter().map(|fault| self.render_fault(fault, renderer));
        rendered.collect::<Vec<_>>().join("\n\n")
    }

    fn render_fault(&self, fault: &ConfigFault, renderer: &Renderer) -> String {
        let level = match fault.severity {
            FaultSeverity::Error => Level::ERROR,
            FaultSeverity::Warning => Level::WARNING,
        };
        let title = level.primary_title(&fault.message).id(fault.code.as_str());
        let start = self.char_boundary(fault.span.start);
        let end = self.char_boundary(fault.span.end).max(start);
        // Only the first line of a table is marked: its whole body would hide the message.
        let end = self.source[start..end].find('\n').map_or(end, |newline| start + newline);
        let mut annotation = AnnotationKind::Primary.span(start..end);
        if !fault.path.is_empty() {
            annotation = annotation.label(&fault.path);
        }
        let snippet = Snippet::source(&self.source).path(&self.name).annotation(annotation);
        let mut group = title.element(snippet);
        if let Some(hint) = &fault.hint {
            group = group.element(Level::HELP.message(hint));
        }
        renderer.render(&[group])
    }

    /// The largest character boundary of the source at or below `index`.
    fn char_boundary(&self, index: usize) -> usize {
        self.source.floor_char_boundary(index)
    }
}

impl fmt::Display for ConfigReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(&Renderer::plain()))
    }
}

impl std::error::Error for ConfigReport {}
