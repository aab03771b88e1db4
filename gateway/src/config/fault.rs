//! What is wrong with a configuration: every fault with its place, for people and for programs.

use std::fmt;
use std::ops::Range;

use annotate_snippets::{AnnotationKind, Level, Renderer, Snippet};
use serde::Serialize;

/// Whether a fault refuses the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The configuration is not used.
    Error,
    /// The configuration is used, and probably does not do what was meant.
    Warning,
}

/// The kind of a fault, stable across wordings of its message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// The text is not TOML or JSON.
    Syntax,
    /// A key that does not exist.
    UnknownKey,
    /// A value of the wrong type.
    WrongType,
    /// A value of the right type that is malformed or out of range.
    BadValue,
    /// A key that has to be there is not.
    Missing,
    /// Two things that may exist only once.
    Duplicate,
    /// A feature that this version does not have.
    Unavailable,
    /// A name that refers to nothing.
    UnknownName,
    /// A file that cannot be read.
    File,
    /// A `${}` that cannot be replaced.
    Expansion,
    /// Something defined and never used.
    Unused,
    /// Something that is allowed and has a surprising consequence.
    Risk,
}

impl Code {
    /// The code as it is shown, such as `unknown-key`.
    pub fn as_str(self) -> &'static str {
        match self {
            Code::Syntax => "syntax",
            Code::UnknownKey => "unknown-key",
            Code::WrongType => "wrong-type",
            Code::BadValue => "bad-value",
            Code::Missing => "missing",
            Code::Duplicate => "duplicate",
            Code::Unavailable => "unavailable",
            Code::UnknownName => "unknown-name",
            Code::File => "file",
            Code::Expansion => "expansion",
            Code::Unused => "unused",
            Code::Risk => "risk",
        }
    }
}

/// What is wrong with one value, before it is known where the value stands.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Problem {
    pub(super) code: Code,
    pub(super) message: String,
    pub(super) hint: Option<String>,
    /// A part of the value, as the source has it, that is to blame.
    pub(super) within: Option<String>,
}

impl Problem {
    pub(super) fn new(code: Code, message: impl Into<String>) -> Self {
        Problem { code, message: message.into(), hint: None, within: None }
    }

    pub(super) fn bad(message: impl Into<String>) -> Self {
        Problem::new(Code::BadValue, message)
    }

    /// A feature of a later version; `what` is the subject of the sentence.
    pub(super) fn unavailable(what: &str) -> Self {
        Problem::new(Code::Unavailable, format!("{what} is not available yet"))
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(super) fn within(mut self, part: &str) -> Self {
        self.within = Some(part.to_owned());
        self
    }
}

/// A place in the document.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct At {
    /// The key, such as `routes[2].upstream`; empty for the document.
    pub(super) path: String,
    /// Bytes of the source.
    pub(super) span: Range<usize>,
}

impl At {
    pub(super) fn error(&self, problem: Problem) -> Fault {
        self.fault(Severity::Error, problem)
    }

    pub(super) fn warning(&self, problem: Problem) -> Fault {
        self.fault(Severity::Warning, problem)
    }

    fn fault(&self, severity: Severity, problem: Problem) -> Fault {
        Fault {
            severity,
            code: problem.code,
            message: problem.message,
            path: self.path.clone(),
            span: self.span.clone(),
            hint: problem.hint,
        }
    }
}

/// One thing that is wrong, and where.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    /// Whether it refuses the configuration.
    pub severity: Severity,
    /// Its kind.
    pub code: Code,
    /// A sentence in lower case, without its place.
    pub message: String,
    /// The key, such as `routes[2].upstream`; empty where the document as a whole is meant.
    pub path: String,
    /// Bytes of the source; empty at 0 where no place can be named.
    pub span: Range<usize>,
    /// What to do about it.
    pub hint: Option<String>,
}

/// The faults of one document, in the order of the text.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    name: String,
    source: String,
    faults: Vec<Fault>,
}

/// One fault as `check --json` shows it.
#[derive(Serialize)]
struct Line<'a> {
    severity: Severity,
    code: Code,
    path: &'a str,
    line: usize,
    column: usize,
    message: &'a str,
    hint: Option<&'a str>,
}

impl Report {
    /// `name` is what messages call the document: the path of the file as it was given.
    pub(super) fn new(name: &str, source: &str, mut faults: Vec<Fault>) -> Self {
        faults.sort_by_key(|fault| fault.span.start);
        Report { name: name.to_owned(), source: source.to_owned(), faults }
    }

    /// The faults, in the order of the text.
    pub fn faults(&self) -> &[Fault] {
        &self.faults
    }

    /// Whether there is nothing to say.
    pub fn is_empty(&self) -> bool {
        self.faults.is_empty()
    }

    /// Whether one of the faults refuses the configuration.
    pub fn has_errors(&self) -> bool {
        self.faults.iter().any(|fault| fault.severity == Severity::Error)
    }

    /// Line and column of a fault, both from 1, the column in characters.
    pub fn position(&self, fault: &Fault) -> (usize, usize) {
        let before = &self.source[..self.boundary(fault.span.start)];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let line = before.matches('\n').count() + 1;
        (line, before[line_start..].chars().count() + 1)
    }

    /// The faults as a JSON array of `{severity, code, path, line, column, message, hint}`.
    pub fn to_json(&self) -> serde_json::Value {
        let lines = self.faults.iter().map(|fault| {
            let (line, column) = self.position(fault);
            Line {
                severity: fault.severity,
                code: fault.code,
                path: &fault.path,
                line,
                column,
                message: &fault.message,
                hint: fault.hint.as_deref(),
            }
        });
        serde_json::to_value(lines.collect::<Vec<_>>()).expect("strings and numbers always serialize")
    }

    /// The faults for a person, with the lines they stand in; the renderer decides on colours.
    pub fn render(&self, renderer: &Renderer) -> String {
        let shown = self.faults.iter().map(|fault| self.render_one(fault, renderer));
        shown.collect::<Vec<_>>().join("\n\n")
    }

    fn render_one(&self, fault: &Fault, renderer: &Renderer) -> String {
        let level = match fault.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let title = level.primary_title(&fault.message).id(fault.code.as_str());
        let start = self.boundary(fault.span.start);
        let end = self.boundary(fault.span.end).max(start);
        // The caret is enough for a table: its whole body would bury the message.
        let end = self.source[start..end].find('\n').map_or(end, |newline| start + newline);
        let mut mark = AnnotationKind::Primary.span(start..end);
        if !fault.path.is_empty() {
            mark = mark.label(&fault.path);
        }
        let snippet = Snippet::source(&self.source).path(&self.name).annotation(mark);
        let mut group = title.element(snippet);
        if let Some(hint) = &fault.hint {
            group = group.element(Level::HELP.message(hint));
        }
        renderer.render(&[group])
    }

    /// The largest character boundary of the source that is not above `index`.
    fn boundary(&self, index: usize) -> usize {
        self.source.floor_char_boundary(index)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(&Renderer::plain()))
    }
}

impl std::error::Error for Report {}
