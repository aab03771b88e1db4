//! Kinds of values: how each is parsed, described in messages and formatted as a default.

use std::marker::PhantomData;
use std::ops::RangeInclusive;
use std::time::Duration;

use serde_json::{Value, json};

use super::expand::expand;
use super::fault::{ConfigProblem, DocumentLocation, FaultCode};
use super::node::{DocumentNode, DocumentValue};
use super::read_context::{Located, ReadContext};
use super::suggestion::suggest;
use super::units;
use crate::metrics::Label;

/// A node with its location and the read context: what a `ValueKind` reads and expands.
pub(super) struct InputValue<'g> {
    pub(super) node: &'g DocumentNode,
    pub(super) at: &'g DocumentLocation,
    pub(super) context: &'g ReadContext<'g>,
}

impl InputValue<'_> {
    /// The string with its placeholders expanded.
    fn expanded_string(&self, kind: &impl ValueKind) -> Result<String, ConfigProblem> {
        match &self.node.value {
            DocumentValue::String(text) => expand(text, &self.context.environment),
            _ => Err(self.wrong_type(kind)),
        }
    }

    pub(super) fn wrong_type(&self, kind: &impl ValueKind) -> ConfigProblem {
        let message = format!("expected {}, found {}", kind.describe(), self.node.type_name());
        ConfigProblem::new(FaultCode::WrongType, message)
    }
}

/// A kind of value: parses it, describes the accepted values, and formats a default.
pub(super) trait ValueKind {
    type Value;

    /// The accepted values with unit and range: "a duration, 1ms to 1h".
    fn describe(&self) -> String;

    /// A value in the syntax of the document.
    fn format(&self, value: &Self::Value) -> String;

    /// The accepted values as a JSON Schema.
    fn schema(&self) -> Value {
        json!({ "type": "string" })
    }

    fn read(&self, input: &InputValue<'_>) -> Result<Self::Value, ConfigProblem>;
}

/// A string in the syntax of both formats.
pub(super) fn quoted(text: &str) -> String {
    // TOML asks for the escape of one character more than JSON does.
    Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

/// The schema of strings whose expanded text matches all of `pattern`, a regular expression without
/// look-around; empty: any text. A placeholder is expanded before the text is checked.
pub(super) fn string_schema(pattern: &str) -> Value {
    match pattern {
        "" => json!({ "type": "string" }),
        pattern => json!({ "type": "string", "pattern": format!("^(?:{pattern})$|\\$\\{{") }),
    }
}

/// The schema of strings that are one of `words`. A placeholder becomes a word before it is
/// compared.
fn word_schema(words: &[&str]) -> Value {
    json!({ "anyOf": [{ "enum": words }, { "type": "string", "pattern": "\\$\\{" }] })
}

/// The pattern of an integer with one of the units; without zeros where the range begins above 0.
fn quantity_pattern(units: &str, has_zero: bool) -> String {
    let digits = if has_zero { "[0-9]+" } else { "0*[1-9][0-9]*" };
    format!("{digits}({units})")
}

/// Any string.
pub(super) struct AnyString;

impl ValueKind for AnyString {
    type Value = String;

    fn describe(&self) -> String {
        "a string".to_owned()
    }

    fn format(&self, value: &String) -> String {
        quoted(value)
    }

    fn read(&self, input: &InputValue<'_>) -> Result<String, ConfigProblem> {
        input.expanded_string(self)
    }
}

/// A string with a syntax of its own.
pub(super) struct ParsedString<T> {
    /// With its article: "an address such as 127.0.0.1:8080".
    pub(super) name: &'static str,
    /// A regular expression that matches every text that `parse` accepts, for the JSON Schema;
    /// empty: none.
    pub(super) pattern: &'static str,
    pub(super) parse: fn(&str) -> Result<T, ConfigProblem>,
    pub(super) format: fn(&T) -> String,
}

impl<T> ValueKind for ParsedString<T> {
    type Value = T;

    fn describe(&self) -> String {
        self.name.to_owned()
    }

    fn format(&self, value: &T) -> String {
        quoted(&(self.format)(value))
    }

    fn schema(&self) -> Value {
        string_schema(self.pattern)
    }

    fn read(&self, input: &InputValue<'_>) -> Result<T, ConfigProblem> {
        (self.parse)(&input.expanded_string(self)?)
    }
}

/// A duration within a range.
pub(super) struct DurationRange(pub(super) RangeInclusive<Duration>);

impl ValueKind for DurationRange {
    type Value = Duration;

    fn describe(&self) -> String {
        let (min, max) = (units::format_duration(*self.0.start()), units::format_duration(*self.0.end()));
        format!("a duration, {min} to {max}")
    }

    fn format(&self, value: &Duration) -> String {
        format!("{:?}", units::format_duration(*value))
    }

    fn schema(&self) -> Value {
        string_schema(&quantity_pattern("ms|s|m|h", self.0.start().is_zero()))
    }

    fn read(&self, input: &InputValue<'_>) -> Result<Duration, ConfigProblem> {
        if let DocumentValue::Integer(number) = input.node.value {
            return Err(input.wrong_type(self).hint(format!("write \"{number}s\" for seconds")));
        }
        check_range(&self.0, units::parse_duration(&input.expanded_string(self)?)?, self)
    }
}

/// A size in bytes within a range.
pub(super) struct SizeRange(pub(super) RangeInclusive<u64>);

impl ValueKind for SizeRange {
    type Value = u64;

    fn describe(&self) -> String {
        format!("a size, {} to {}", units::format_size(*self.0.start()), units::format_size(*self.0.end()))
    }

    fn format(&self, value: &u64) -> String {
        format!("{:?}", units::format_size(*value))
    }

    fn schema(&self) -> Value {
        string_schema(&quantity_pattern("B|KiB|MiB|GiB", *self.0.start() == 0))
    }

    fn read(&self, input: &InputValue<'_>) -> Result<u64, ConfigProblem> {
        if let DocumentValue::Integer(number) = input.node.value {
            return Err(input.wrong_type(self).hint(format!("write \"{number}B\" for bytes")));
        }
        check_range(&self.0, units::parse_size(&input.expanded_string(self)?)?, self)
    }
}

/// An integer within a range.
pub(super) struct IntegerRange(pub(super) RangeInclusive<u32>);

impl ValueKind for IntegerRange {
    type Value = u32;

    fn describe(&self) -> String {
        match (self.0.start(), self.0.end()) {
            (min, max) if min == max => format!("the integer {min}"),
            (min, max) => format!("an integer, {min} to {max}"),
        }
    }

    fn format(&self, value: &u32) -> String {
        value.to_string()
    }

    fn schema(&self) -> Value {
        json!({ "type": "integer", "minimum": self.0.start(), "maximum": self.0.end() })
    }

    fn read(&self, input: &InputValue<'_>) -> Result<u32, ConfigProblem> {
        let DocumentValue::Integer(number) = input.node.value else {
            return Err(input.wrong_type(self));
        };
        let number = u32::try_from(number).ok().filter(|number| self.0.contains(number));
        number.ok_or_else(|| out_of_range(self))
    }
}

/// `true` or `false`.
pub(super) struct Boolean;

impl ValueKind for Boolean {
    type Value = bool;

    fn describe(&self) -> String {
        "`true` or `false`".to_owned()
    }

    fn format(&self, value: &bool) -> String {
        value.to_string()
    }

    fn schema(&self) -> Value {
        json!({ "type": "boolean" })
    }

    fn read(&self, input: &InputValue<'_>) -> Result<bool, ConfigProblem> {
        match input.node.value {
            DocumentValue::Boolean(value) => Ok(value),
            _ => Err(input.wrong_type(self)),
        }
    }
}

/// A number above 0, up to an inclusive bound.
pub(super) struct PositiveNumber(pub(super) f64);

impl ValueKind for PositiveNumber {
    type Value = f64;

    fn describe(&self) -> String {
        format!("a number above 0, at most {}", self.0)
    }

    fn format(&self, value: &f64) -> String {
        format!("{value:?}")
    }

    fn schema(&self) -> Value {
        json!({ "type": "number", "exclusiveMinimum": 0, "maximum": self.0 })
    }

    fn read(&self, input: &InputValue<'_>) -> Result<f64, ConfigProblem> {
        let number = match input.node.value {
            DocumentValue::Float(number) => number,
            // The conversion loses precision only above 2^53, which is outside every range.
            DocumentValue::Integer(number) => number as f64,
            _ => return Err(input.wrong_type(self)),
        };
        // NaN fails both comparisons and is therefore out of range.
        if number > 0.0 && number <= self.0 { Ok(number) } else { Err(out_of_range(self)) }
    }
}

/// A number within an inclusive range.
pub(super) struct NumberRange(pub(super) RangeInclusive<f64>);

impl ValueKind for NumberRange {
    type Value = f64;

    fn describe(&self) -> String {
        format!("a number from {} to {}", self.0.start(), self.0.end())
    }

    fn format(&self, value: &f64) -> String {
        format!("{value:?}")
    }

    fn schema(&self) -> Value {
        json!({ "type": "number", "minimum": self.0.start(), "maximum": self.0.end() })
    }

    fn read(&self, input: &InputValue<'_>) -> Result<f64, ConfigProblem> {
        let number = match input.node.value {
            DocumentValue::Float(number) => number,
            // The conversion loses precision only above 2^53, which is outside every range.
            DocumentValue::Integer(number) => number as f64,
            _ => return Err(input.wrong_type(self)),
        };
        // No range contains NaN.
        if self.0.contains(&number) { Ok(number) } else { Err(out_of_range(self)) }
    }
}

/// A number from 0 to 1.
pub(super) struct Share;

impl ValueKind for Share {
    type Value = f64;

    fn describe(&self) -> String {
        "a number from 0 to 1".to_owned()
    }

    fn format(&self, value: &f64) -> String {
        format!("{value:?}")
    }

    fn schema(&self) -> Value {
        json!({ "type": "number", "minimum": 0, "maximum": 1 })
    }

    fn read(&self, input: &InputValue<'_>) -> Result<f64, ConfigProblem> {
        let number = match input.node.value {
            DocumentValue::Float(number) => number,
            DocumentValue::Integer(number) => number as f64,
            _ => return Err(input.wrong_type(self)),
        };
        if (0.0..=1.0).contains(&number) { Ok(number) } else { Err(out_of_range(self)) }
    }
}

/// One of a fixed set of words. A word without a value belongs to a feature that is not available
/// yet.
pub(super) struct OneOf<T: 'static>(pub(super) &'static [(&'static str, Option<T>)]);

impl<T: Clone + PartialEq> ValueKind for OneOf<T> {
    type Value = T;

    fn describe(&self) -> String {
        let words = |is_available: bool| {
            let words = self.0.iter().filter(move |(_, value)| value.is_some() == is_available);
            words.map(|(word, _)| format!("\"{word}\"")).collect::<Vec<_>>().join(", ")
        };
        let unavailable = words(false);
        let unavailable =
            if unavailable.is_empty() { unavailable } else { format!(" (not available yet: {unavailable})") };
        format!("one of {}{unavailable}", words(true))
    }

    fn format(&self, value: &T) -> String {
        let word = self.0.iter().find(|(_, known)| known.as_ref() == Some(value));
        quoted(word.map_or("", |(word, _)| word))
    }

    fn schema(&self) -> Value {
        word_schema(&self.0.iter().filter(|(_, value)| value.is_some()).map(|(word, _)| *word).collect::<Vec<_>>())
    }

    fn read(&self, input: &InputValue<'_>) -> Result<T, ConfigProblem> {
        let text = input.expanded_string(self)?;
        match self.0.iter().find(|(word, _)| *word == text) {
            Some((_, Some(value))) => Ok(value.clone()),
            Some((word, None)) => Err(ConfigProblem::unavailable(&format!("\"{word}\"")).hint(self.describe())),
            None => {
                let words: Vec<&str> = self.0.iter().map(|(word, _)| *word).collect();
                Err(ConfigProblem::bad_value(format!("unknown value \"{text}\"")).hint(suggest(&text, &words)))
            }
        }
    }
}

/// One of the words of a label.
pub(super) struct LabelWord<L> {
    /// With its article: "a member of access log lines".
    pub(super) name: &'static str,
    pub(super) label: PhantomData<L>,
}

impl<L: Label> ValueKind for LabelWord<L> {
    type Value = L;

    fn describe(&self) -> String {
        self.name.to_owned()
    }

    fn format(&self, value: &L) -> String {
        quoted(value.as_str())
    }

    fn schema(&self) -> Value {
        word_schema(&L::ALL.iter().map(|word| word.as_str()).collect::<Vec<_>>())
    }

    fn read(&self, input: &InputValue<'_>) -> Result<L, ConfigProblem> {
        let text = input.expanded_string(self)?;
        L::ALL.iter().copied().find(|word| word.as_str() == text).ok_or_else(|| {
            let words: Vec<&str> = L::ALL.iter().map(|word| word.as_str()).collect();
            ConfigProblem::bad_value(format!("`{text}` is not {}", self.name)).hint(suggest(&text, &words))
        })
    }
}

/// One of a few integers.
pub(super) struct OneOfIntegers {
    pub(super) numbers: &'static [u32],
    /// Each, with its article: "a redirect".
    pub(super) name: &'static str,
    pub(super) hint: &'static str,
}

impl ValueKind for OneOfIntegers {
    type Value = u32;

    fn describe(&self) -> String {
        let numbers: Vec<String> = self.numbers.iter().map(u32::to_string).collect();
        format!("one of {}", numbers.join(", "))
    }

    fn format(&self, value: &u32) -> String {
        value.to_string()
    }

    fn schema(&self) -> Value {
        json!({ "enum": self.numbers })
    }

    fn read(&self, input: &InputValue<'_>) -> Result<u32, ConfigProblem> {
        let DocumentValue::Integer(number) = input.node.value else {
            return Err(input.wrong_type(self));
        };
        let known = u32::try_from(number).ok().filter(|number| self.numbers.contains(number));
        known.ok_or_else(|| ConfigProblem::bad_value(format!("{number} is not {}", self.name)).hint(self.hint))
    }
}

/// How an array treats an item that it has already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Repeats {
    /// It has no effect, and is warned of.
    Warned,
    /// It has an effect that cannot be meant, and is an error.
    Refused,
    /// The section compares the items by a part of them.
    BySection,
}

/// An array whose items keep their locations. A fault in one item does not hide faults in others.
pub(super) struct ArrayOf<K> {
    pub(super) item: K,
    pub(super) min_items: usize,
    pub(super) repeats: Repeats,
}

impl<K: ValueKind> ArrayOf<K> {
    /// Reports each item that the array has already. The message does not repeat it: a URL may have
    /// a password.
    fn report_repeats(&self, items: &[Located<K::Value>], context: &ReadContext<'_>) {
        let texts: Vec<String> = items.iter().map(|item| self.item.format(&item.value)).collect();
        for (index, item) in items.iter().enumerate() {
            let Some(first) = texts[..index].iter().position(|text| *text == texts[index]) else { continue };
            let message = format!("this is the same as `{}`", items[first].at.path);
            let problem = ConfigProblem::new(FaultCode::Duplicate, message).hint("remove one of the two");
            match self.repeats {
                Repeats::Warned => context.warning(&item.at, problem),
                Repeats::Refused => context.error(&item.at, problem),
                Repeats::BySection => {}
            }
        }
    }
}

impl<K: ValueKind> ValueKind for ArrayOf<K> {
    type Value = Vec<Located<K::Value>>;

    fn describe(&self) -> String {
        let array = if self.min_items == 0 { "an array" } else { "a non-empty array" };
        format!("{array}; each item: {}", self.item.describe())
    }

    fn format(&self, value: &Self::Value) -> String {
        let items: Vec<String> = value.iter().map(|item| self.item.format(&item.value)).collect();
        format!("[{}]", items.join(", "))
    }

    fn schema(&self) -> Value {
        let mut schema = json!({ "type": "array", "items": self.item.schema(), "minItems": self.min_items });
        if self.repeats == Repeats::Refused {
            schema["uniqueItems"] = json!(true);
        }
        schema
    }

    fn read(&self, input: &InputValue<'_>) -> Result<Self::Value, ConfigProblem> {
        let DocumentValue::Array(items) = &input.node.value else {
            return Err(input.wrong_type(self).hint("enclose it in `[` and `]`"));
        };
        if items.len() < self.min_items {
            let problem = ConfigProblem::bad_value("the array needs at least one item");
            return Err(problem.hint(format!("each item: {}", self.item.describe())));
        }
        let mut values = Vec::with_capacity(items.len());
        for (index, node) in items.iter().enumerate() {
            let at = DocumentLocation { path: format!("{}[{index}]", input.at.path), span: node.span.clone() };
            match self.item.read(&InputValue { node, at: &at, context: input.context }) {
                Ok(value) => values.push(Located { value, at }),
                Err(problem) => input.context.error(&at, problem),
            }
        }
        self.report_repeats(&values, input.context);
        Ok(values)
    }
}

fn check_range<T: PartialOrd>(range: &RangeInclusive<T>, value: T, kind: &impl ValueKind) -> Result<T, ConfigProblem> {
    if range.contains(&value) { Ok(value) } else { Err(out_of_range(kind)) }
}

fn out_of_range(kind: &impl ValueKind) -> ConfigProblem {
    ConfigProblem::bad_value(format!("out of range: expected {}", kind.describe()))
}
