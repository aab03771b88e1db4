//! Suggests a known name for one that does not exist.

/// A hint for `given`: the known name within typing-error distance, or else the list of known
/// names.
pub(super) fn suggest<S: AsRef<str>>(given: &str, known: &[S]) -> String {
    let lower = given.to_lowercase().replace('-', "_");
    let distance = |name: &str| strsim::damerau_levenshtein(&lower, &name.to_lowercase().replace('-', "_"));
    let nearest = known.iter().map(|name| (distance(name.as_ref()), name.as_ref())).min();
    match nearest {
        None => "none is defined".to_owned(),
        // Up to a third of the letters wrong counts as a typing error.
        Some((distance, name)) if distance <= name.chars().count().div_ceil(3) => format!("did you mean `{name}`?"),
        Some(_) => {
            let names: Vec<String> = known.iter().map(|name| format!("`{}`", name.as_ref())).collect();
            format!("expected one of {}", names.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::suggest;

    #[test]
    fn suggests_names_within_typing_error_distance() {
        let known = ["timeout", "connect_timeout", "balance"];
        assert_eq!(suggest("time-out", &known), "did you mean `timeout`?");
        assert_eq!(suggest("conect_timeout", &known), "did you mean `connect_timeout`?");
        assert_eq!(suggest("Balance", &known), "did you mean `balance`?");
        assert_eq!(suggest("weight", &known), "expected one of `timeout`, `connect_timeout`, `balance`");
        assert_eq!(suggest("weight", &[] as &[&str]), "none is defined");
    }
}
