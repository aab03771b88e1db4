//! Types of values: how each is read, named in messages and shown as a default.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::document::{Node, Value};
use super::expand::expand;
use super::fault::{At, Code, Problem};
use super::nearest::nearest;
use super::reading::{Placed, Reading};
use super::units;

/// A value as it stands in the document.
pub(super) struct Given<'g> {
    pub(super) node: &'g Node,
    pub(super) at: &'g At,
    pub(super) reading: &'g Reading<'g>,
}

impl Given<'_> {
    /// The text that stands here, with its placeholders replaced.
    fn text(&self, kind: &impl Kind) -> Result<String, Problem> {
        match &self.node.value {
            Value::Text(text) => expand(text, &self.reading.values),
            _ => Err(self.wrong_type(kind)),
        }
    }

    pub(super) fn wrong_type(&self, kind: &impl Kind) -> Problem {
        let message = format!("expected {}, found {}", kind.describe(), self.node.found());
        Problem::new(Code::WrongType, message)
    }
}

/// A type of value.
pub(super) trait Kind {
    type Value;

    /// What is expected, with its unit and range: "a duration, 1ms to 1h".
    fn describe(&self) -> String;

    /// A value as it would be written.
    fn show(&self, value: &Self::Value) -> String;

    fn read(&self, given: &Given<'_>) -> Result<Self::Value, Problem>;
}

/// Any text.
pub(super) struct Text;

impl Kind for Text {
    type Value = String;

    fn describe(&self) -> String {
        "text".to_owned()
    }

    fn show(&self, value: &String) -> String {
        format!("{value:?}")
    }

    fn read(&self, given: &Given<'_>) -> Result<String, Problem> {
        given.text(self)
    }
}

/// Text of a certain form.
pub(super) struct Parsed<T> {
    /// With its article: "an address such as 127.0.0.1:8080".
    pub(super) name: &'static str,
    pub(super) parse: fn(&str) -> Result<T, Problem>,
    pub(super) show: fn(&T) -> String,
}

impl<T> Kind for Parsed<T> {
    type Value = T;

    fn describe(&self) -> String {
        self.name.to_owned()
    }

    fn show(&self, value: &T) -> String {
        format!("{:?}", (self.show)(value))
    }

    fn read(&self, given: &Given<'_>) -> Result<T, Problem> {
        (self.parse)(&given.text(self)?)
    }
}

/// A duration within a range.
pub(super) struct Span(pub(super) RangeInclusive<Duration>);

impl Kind for Span {
    type Value = Duration;

    fn describe(&self) -> String {
        let (least, most) = (units::show_duration(*self.0.start()), units::show_duration(*self.0.end()));
        format!("a duration, {least} to {most}")
    }

    fn show(&self, value: &Duration) -> String {
        format!("{:?}", units::show_duration(*value))
    }

    fn read(&self, given: &Given<'_>) -> Result<Duration, Problem> {
        if let Value::Whole(number) = given.node.value {
            return Err(given.wrong_type(self).hint(format!("write \"{number}s\" if seconds are meant")));
        }
        within(&self.0, units::duration(&given.text(self)?)?, self)
    }
}

/// A size within a range, in bytes.
pub(super) struct Size(pub(super) RangeInclusive<u64>);

impl Kind for Size {
    type Value = u64;

    fn describe(&self) -> String {
        format!("a size, {} to {}", units::show_size(*self.0.start()), units::show_size(*self.0.end()))
    }

    fn show(&self, value: &u64) -> String {
        format!("{:?}", units::show_size(*value))
    }

    fn read(&self, given: &Given<'_>) -> Result<u64, Problem> {
        if let Value::Whole(number) = given.node.value {
            return Err(given.wrong_type(self).hint(format!("write \"{number}B\" if bytes are meant")));
        }
        within(&self.0, units::size(&given.text(self)?)?, self)
    }
}

/// A whole number within a range.
pub(super) struct Whole(pub(super) RangeInclusive<u32>);

impl Kind for Whole {
    type Value = u32;

    fn describe(&self) -> String {
        match (self.0.start(), self.0.end()) {
            (least, most) if least == most => format!("the whole number {least}"),
            (least, most) => format!("a whole number, {least} to {most}"),
        }
    }

    fn show(&self, value: &u32) -> String {
        value.to_string()
    }

    fn read(&self, given: &Given<'_>) -> Result<u32, Problem> {
        let Value::Whole(number) = given.node.value else {
            return Err(given.wrong_type(self));
        };
        let number = u32::try_from(number).ok().filter(|number| self.0.contains(number));
        number.ok_or_else(|| out_of_range(self))
    }
}

/// A number above 0, up to a bound that belongs to it.
pub(super) struct Positive(pub(super) f64);

impl Kind for Positive {
    type Value = f64;

    fn describe(&self) -> String {
        format!("a number above 0, up to {}", self.0)
    }

    fn show(&self, value: &f64) -> String {
        format!("{value:?}")
    }

    fn read(&self, given: &Given<'_>) -> Result<f64, Problem> {
        let number = match given.node.value {
            Value::Real(number) => number,
            // What a large number loses here does not matter: it is out of every range.
            Value::Whole(number) => number as f64,
            _ => return Err(given.wrong_type(self)),
        };
        // Written so that NaN is out of range.
        if number > 0.0 && number <= self.0 { Ok(number) } else { Err(out_of_range(self)) }
    }
}

/// One of a few words; those without a value are not available yet.
pub(super) struct Choice<T: 'static>(pub(super) &'static [(&'static str, Option<T>)]);

impl<T: Clone + PartialEq> Kind for Choice<T> {
    type Value = T;

    fn describe(&self) -> String {
        let words = |available: bool| {
            let of = self.0.iter().filter(move |(_, value)| value.is_some() == available);
            of.map(|(word, _)| format!("\"{word}\"")).collect::<Vec<_>>().join(", ")
        };
        let later = words(false);
        let later = if later.is_empty() { later } else { format!(" (not available yet: {later})") };
        format!("one of {}{later}", words(true))
    }

    fn show(&self, value: &T) -> String {
        let word = self.0.iter().find(|(_, known)| known.as_ref() == Some(value));
        format!("{:?}", word.map_or("", |(word, _)| word))
    }

    fn read(&self, given: &Given<'_>) -> Result<T, Problem> {
        let text = given.text(self)?;
        match self.0.iter().find(|(word, _)| *word == text) {
            Some((_, Some(value))) => Ok(value.clone()),
            Some((word, None)) => Err(Problem::unavailable(&format!("\"{word}\"")).hint(self.describe())),
            None => {
                let words: Vec<&str> = self.0.iter().map(|(word, _)| *word).collect();
                Err(Problem::bad(format!("\"{text}\" is not a choice here")).hint(nearest(&text, &words)))
            }
        }
    }
}

/// A list, each item with its place; a fault in one item does not hide those in others.
pub(super) struct ListOf<K> {
    pub(super) item: K,
    /// Items that have to be there.
    pub(super) least: usize,
}

impl<K: Kind> Kind for ListOf<K> {
    type Value = Vec<Placed<K::Value>>;

    fn describe(&self) -> String {
        let least = if self.least == 0 { "" } else { ", at least one" };
        format!("a list{least}; each item: {}", self.item.describe())
    }

    fn show(&self, value: &Self::Value) -> String {
        let items: Vec<String> = value.iter().map(|item| self.item.show(&item.value)).collect();
        format!("[{}]", items.join(", "))
    }

    fn read(&self, given: &Given<'_>) -> Result<Self::Value, Problem> {
        let Value::List(items) = &given.node.value else {
            return Err(given.wrong_type(self).hint("write it between `[` and `]`"));
        };
        if items.len() < self.least {
            return Err(Problem::bad("the list needs at least one item"));
        }
        let mut values = Vec::with_capacity(items.len());
        for (index, node) in items.iter().enumerate() {
            let at = At { path: format!("{}[{index}]", given.at.path), span: node.span.clone() };
            match self.item.read(&Given { node, at: &at, reading: given.reading }) {
                Ok(value) => values.push(Placed { value, at }),
                Err(problem) => given.reading.error(&at, problem),
            }
        }
        Ok(values)
    }
}

fn within<T: PartialOrd>(range: &RangeInclusive<T>, value: T, kind: &impl Kind) -> Result<T, Problem> {
    if range.contains(&value) { Ok(value) } else { Err(out_of_range(kind)) }
}

fn out_of_range(kind: &impl Kind) -> Problem {
    Problem::bad(format!("out of range: expected {}", kind.describe()))
}
