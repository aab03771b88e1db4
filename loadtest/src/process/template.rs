//! Templates of configuration files.

/// Replaces each `@NAME@` of `template`.
pub(crate) fn fill_template(template: &str, values: &[(&str, &str)]) -> String {
    values.iter().fold(template.to_owned(), |text, (name, value)| text.replace(&format!("@{name}@"), value))
}
