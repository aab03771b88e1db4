//! Header fields that a route sets, adds and removes.

use super::template::{Template, TemplateValues, TemplateVariable};
use crate::http::fields::Fields;

/// The edits of one direction, applied in this order: `remove`, `set`, `add`. Names are in lower
/// case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct HeaderEdits {
    pub(crate) remove: Vec<String>,
    /// Replaces every line of the field.
    pub(crate) set: Vec<(String, Template)>,
    /// Adds a line.
    pub(crate) add: Vec<(String, Template)>,
}

impl HeaderEdits {
    pub(crate) fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.set.is_empty() && self.add.is_empty()
    }

    /// Whether a value contains `variable`.
    pub(crate) fn uses(&self, variable: TemplateVariable) -> bool {
        self.set.iter().chain(&self.add).any(|(_, value)| value.uses(variable))
    }

    pub(crate) fn apply(&self, fields: &mut Fields, values: &TemplateValues<'_>) {
        let is_replaced = |name: &[u8]| {
            self.remove.iter().any(|removed| name.eq_ignore_ascii_case(removed.as_bytes()))
                || self.set.iter().any(|(set, _)| name.eq_ignore_ascii_case(set.as_bytes()))
        };
        if !self.remove.is_empty() || !self.set.is_empty() {
            fields.retain(|field| !is_replaced(field.name));
        }
        for (name, value) in self.set.iter().chain(&self.add) {
            fields.push(name.as_bytes(), &value.render(values));
        }
    }
}
