//! The two text formats of the exposition: OpenMetrics, and the older format of Prometheus.

/// A text format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExpositionFormat {
    OpenMetrics,
    /// Version 0.0.4 of the format of Prometheus, which every scraper reads.
    Text,
}

impl ExpositionFormat {
    /// The format for a client whose `Accept` has these members: OpenMetrics if it is named, and
    /// not weighed below plain text.
    pub(crate) fn preferred<'a>(accepted: impl Iterator<Item = &'a [u8]>) -> Self {
        let (mut open_metrics, mut text) = (0.0, 0.0);
        for member in accepted.filter_map(|member| std::str::from_utf8(member).ok()) {
            let mut parts = member.split(';').map(str::trim);
            let best = match parts.next() {
                Some(name) if name.eq_ignore_ascii_case("application/openmetrics-text") => &mut open_metrics,
                Some(name) if name.eq_ignore_ascii_case("text/plain") => &mut text,
                _ => continue,
            };
            let weight = parts.find_map(|part| part.strip_prefix("q=")).map_or(Ok(1.0), str::parse::<f32>);
            *best = weight.unwrap_or(0.0).clamp(0.0, 1.0).max(*best);
        }
        if open_metrics > 0.0 && open_metrics >= text { ExpositionFormat::OpenMetrics } else { ExpositionFormat::Text }
    }

    /// The value of `Content-Type`.
    pub(crate) fn content_type(self) -> &'static str {
        match self {
            ExpositionFormat::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            ExpositionFormat::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// The exposition `open_metrics` in the format of Prometheus: the family of a counter has the name
/// of its samples, and nothing marks the end.
pub(super) fn to_text(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len() + 1_024);
    let mut help = None;
    for line in open_metrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            let suffix = if kind == "counter" { "_total" } else { "" };
            if let Some((_, help)) = help.take() {
                text.extend(["# HELP ", name, suffix, " ", help, "\n"]);
            }
            text.extend(["# TYPE ", name, suffix, " ", kind, "\n"]);
        } else if !line.starts_with('#') {
            text.extend([line, "\n"]);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn format_follows_the_weights_of_the_client() {
        let of = |accept: &str| ExpositionFormat::preferred(accept.split(',').map(str::trim).map(str::as_bytes));
        let prometheus = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
                          text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        for accept in [prometheus, "application/OpenMetrics-text", "text/plain, application/openmetrics-text"] {
            assert_eq!(of(accept), ExpositionFormat::OpenMetrics, "{accept}");
        }
        for accept in ["", "*/*", "text/html", "application/openmetrics-text;q=0", "application/openmetrics-text; q=x"]
        {
            assert_eq!(of(accept), ExpositionFormat::Text, "{accept}");
        }
        assert_eq!(of("application/openmetrics-text; q=0.4, text/plain; q=0.5"), ExpositionFormat::Text);
    }

    #[test]
    fn counters_have_the_name_of_their_samples() {
        let open_metrics = "# HELP a A\\nb.\n# TYPE a counter\na_total{b=\"# TYPE c\"} 1\n\
                            # HELP g G.\n# TYPE g gauge\ng 2\n# EOF\n";
        let expected = "# HELP a_total A\\nb.\n# TYPE a_total counter\na_total{b=\"# TYPE c\"} 1\n\
                        # HELP g G.\n# TYPE g gauge\ng 2\n";
        assert_eq!(to_text(open_metrics), expected);
    }
}
