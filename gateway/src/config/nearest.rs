//! What was probably meant by a name that does not exist.

/// A hint for `given`: the one of `known` that is a slip of the keyboard away, or else all of them.
pub(super) fn nearest<S: AsRef<str>>(given: &str, known: &[S]) -> String {
    let lower = given.to_lowercase().replace('-', "_");
    let distance = |name: &str| strsim::damerau_levenshtein(&lower, &name.to_lowercase().replace('-', "_"));
    let near = known.iter().map(|name| (distance(name.as_ref()), name.as_ref())).min();
    match near {
        None => "none is defined".to_owned(),
        // A third of the letters wrong is a slip; more is another word.
        Some((distance, name)) if distance <= name.chars().count().div_ceil(3) => format!("did you mean `{name}`?"),
        Some(_) => {
            let names: Vec<String> = known.iter().map(|name| format!("`{}`", name.as_ref())).collect();
            format!("expected one of {}", names.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn slips_are_recognised_and_other_words_are_not() {
        let known = ["timeout", "connect_timeout", "balance"];
        assert_eq!(nearest("time-out", &known), "did you mean `timeout`?");
        assert_eq!(nearest("conect_timeout", &known), "did you mean `connect_timeout`?");
        assert_eq!(nearest("Balance", &known), "did you mean `balance`?");
        assert_eq!(nearest("weight", &known), "expected one of `timeout`, `connect_timeout`, `balance`");
        assert_eq!(nearest("weight", &[] as &[&str]), "none is defined");
    }
}
