//! docs/field-cases.md and its pictures, written from the reports of the cases.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use crate::case::report::{CaseReport, CheckOutcome};
use crate::error::{LoadtestError, Result};
use crate::field_cases::FieldCase;
use crate::report::line_chart;

const PAGE: &str = "field-cases.md";
/// Before and after the section of each case, so that one case can be replaced.
const BEGIN: &str = "<!-- case ";

/// The directory with the page and its `pictures/`.
pub(crate) struct FieldCasesPage {
    directory: PathBuf,
    /// Sections by case, those of earlier runs included.
    sections: BTreeMap<FieldCase, String>,
}

/// A played case, and where and how it was played.
pub(crate) struct PlayedCase<'a> {
    pub(crate) case: FieldCase,
    pub(crate) report: &'a CaseReport,
    pub(crate) seconds: f64,
    /// Machine class, build, form and date.
    pub(crate) setting: &'a str,
}

impl FieldCasesPage {
    /// Reads the sections of an earlier page.
    pub(crate) fn open(directory: PathBuf, cases: &[FieldCase]) -> Result<Self> {
        let pictures = directory.join("pictures");
        fs::create_dir_all(&pictures).map_err(LoadtestError::io(format!("cannot create {}", pictures.display())))?;
        let text = fs::read_to_string(directory.join(PAGE)).unwrap_or_default();
        let section = |case: &FieldCase| {
            let start = text.find(&begin(*case))?;
            let rest = &text[start..];
            let end = rest[1..].find(BEGIN).map_or(rest.len(), |end| end + 1);
            Some((*case, rest[..end].trim_end().to_owned()))
        };
        Ok(FieldCasesPage { sections: cases.iter().filter_map(section).collect(), directory })
    }

    /// Replaces the section of a case and writes the page.
    pub(crate) fn put(&mut self, played: &PlayedCase<'_>) -> Result<()> {
        let name = format!("field-case-{}.svg", played.case.id());
        let has_picture = !played.report.charts.is_empty();
        if has_picture {
            write(&self.directory.join("pictures").join(&name), &line_chart::document(&played.report.charts))?;
        }
        self.sections.insert(played.case, section(played, has_picture.then_some(&name)));
        write(&self.directory.join(PAGE), &self.page())
    }

    fn page(&self) -> String {
        let mut out = String::from(
            "# Field cases\n\nProduction incidents and systems with published figures, each played with real gateways, Redis servers and \
             origins on one machine: `make field-cases`, or `loadtest field-cases --only ID`. This page is written by that command. \
             [load-testing.md](load-testing.md#field-cases) describes it.\n\nA case passes if all its criteria are met. A criterion \
             that needs a feature which the gateway does not have is `not available yet`: it is not judged, and is no failure. Criteria are counts and ratios within one run, \
             because absolute figures depend on the machine; each section names machine, build and form.\n\n\
             | case | verdict | criteria met |\n|---|---|---|\n",
        );
        for (case, section) in &self.sections {
            let rows: Vec<&str> =
                section.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| criterion")).collect();
            let ends = |outcome: CheckOutcome| {
                rows.iter().filter(|row| row.ends_with(&format!("| {} |", outcome.text()))).count()
            };
            let (passed, judged) = (ends(CheckOutcome::Pass), rows.len() - ends(CheckOutcome::Unavailable));
            let verdict = section.lines().find_map(|line| line.strip_prefix("**Verdict:** ")).unwrap_or("unknown");
            line(&mut out, format_args!("| [`{0}`](#{0}) | {verdict} | {passed} of {1} |", case.id(), judged));
        }
        for section in self.sections.values() {
            line(&mut out, format_args!("\n{section}"));
        }
        out
    }
}

fn begin(case: FieldCase) -> String {
    format!("{BEGIN}{} -->", case.id())
}

fn section(played: &PlayedCase<'_>, picture: Option<&String>) -> String {
    let PlayedCase { case, report, seconds, setting } = played;
    let mut out = format!(
        "{}\n## {}\n\n**Elsewhere:** {}\n\n**Done:** {}\n\n**Verdict:** {}\n\n| criterion | figure here | met |\n|---|---|---|\n",
        begin(*case),
        case.id(),
        case.elsewhere(),
        report.done,
        report.verdict()
    );
    for check in &report.checks {
        line(
            &mut out,
            format_args!("| {} | {} | {} |", cell(&check.criterion), cell(&check.figure), check.outcome.text()),
        );
    }
    if let Some(name) = picture {
        line(&mut out, format_args!("\n![{}](pictures/{name})", case.id()));
    }
    line(&mut out, format_args!("\n{setting}; {seconds:.0} s"));
    out.trim_end().to_owned()
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

/// The report of one case for a terminal.
pub(crate) fn terminal_text(played: &PlayedCase<'_>) -> String {
    let PlayedCase { case, report, seconds, .. } = played;
    let mut out = format!("{}: {} ({seconds:.0} s)\n", case.id(), report.verdict());
    for check in &report.checks {
        let mark = match check.outcome {
            CheckOutcome::Pass => "ok  ",
            CheckOutcome::Fail => "FAIL",
            CheckOutcome::Unavailable => "n/a ",
        };
        line(&mut out, format_args!("  {mark} {}: {}", check.criterion, check.figure));
    }
    out
}

fn line(out: &mut String, arguments: std::fmt::Arguments<'_>) {
    writeln!(out, "{arguments}").expect("writing to a string does not fail");
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(LoadtestError::io(format!("cannot write {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::child::ScratchDirectory;
    use crate::report::line_chart::LineChart;

    #[test]
    fn played_case_replaces_its_section_and_keeps_the_others() {
        let scratch = ScratchDirectory::named("field-cases-page").expect("a directory");
        let directory = scratch.path().join("docs");
        let cases = [FieldCase::Degrade, FieldCase::Knee];
        let put = |case: FieldCase, figure: &str, is_met: bool| {
            let mut report = CaseReport::new("Something.");
            report.check("a | b", (figure, is_met));
            report.unavailable("c", "no such feature");
            report.charts.push(LineChart::default());
            let mut page = FieldCasesPage::open(directory.clone(), &cases).expect("a page");
            page.put(&PlayedCase { case, report: &report, seconds: 2.0, setting: "2 cores" }).expect("room");
            fs::read_to_string(directory.join(PAGE)).expect("the page")
        };
        put(FieldCase::Knee, "first", true);
        put(FieldCase::Degrade, "second", true);
        let page = put(FieldCase::Knee, "third", false);
        assert!(!page.contains("first") && page.contains("second") && page.contains("third"), "{page}");
        assert!(page.contains("| [`knee`](#knee) | FAIL, 1 criterion not available yet | 0 of 1 |"), "{page}");
        assert!(page.contains("| [`degrade`](#degrade) | pass, 1 criterion not available yet | 1 of 1 |"), "{page}");
        assert!(page.contains("a \\| b"), "{page}");
        assert!(directory.join("pictures/field-case-knee.svg").is_file());
    }
}
