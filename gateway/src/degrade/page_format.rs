//! Format and language of synthesised responses, by `Accept` and `Accept-Language` (RFC 9110
//! section 12.5).

use crate::http::fields::{Fields, KnownField};

/// Format of a synthesised response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageFormat {
    Html(PageLanguage),
    Json,
}

/// Languages of the built-in page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum PageLanguage {
    #[default]
    English,
    Chinese,
}

impl PageLanguage {
    /// The tag of the language (RFC 5646).
    pub(crate) fn tag(self) -> &'static str {
        match self {
            PageLanguage::English => "en",
            PageLanguage::Chinese => "zh",
        }
    }

    /// The language that `Accept-Language` prefers; English without a preference.
    fn preferred(request: &Fields) -> Self {
        let (mut english, mut chinese) = (0, 0);
        for member in request.members(KnownField::AcceptLanguage) {
            let (range, weight) = range_and_weight(member);
            match range.split('-').next() {
                Some("en") => english = english.max(weight),
                Some("zh") => chinese = chinese.max(weight),
                _ => {}
            }
        }
        if chinese > english { PageLanguage::Chinese } else { PageLanguage::English }
    }
}

impl PageFormat {
    /// The format that the request prefers; problem JSON without a preference.
    pub(crate) fn preferred(request: &Fields) -> Self {
        if !request.has(KnownField::Accept) {
            return PageFormat::Json;
        }
        let (mut html, mut json) = (0, 0);
        for member in request.members(KnownField::Accept) {
            let (range, weight) = range_and_weight(member);
            match &*range {
                "text/html" | "application/xhtml+xml" | "text/*" => html = html.max(weight),
                "application/json" | "application/problem+json" | "application/*" => json = json.max(weight),
                _ => {}
            }
        }
        if html > json { PageFormat::Html(PageLanguage::preferred(request)) } else { PageFormat::Json }
    }
}

/// A member in lower case without its parameters, and its weight in thousandths: the grammar has at
/// most three digits. An invalid weight counts as 0.
fn range_and_weight(member: &[u8]) -> (String, u32) {
    let text = String::from_utf8_lossy(member).to_ascii_lowercase();
    let mut parts = text.split(';').map(str::trim);
    let range = parts.next().unwrap_or_default().to_owned();
    let weight = parts.find_map(|part| part.strip_prefix("q=")?.parse::<f32>().ok()).unwrap_or(1.0);
    (range, if (0.0..=1.0).contains(&weight) { (weight * 1000.0) as u32 } else { 0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::fields::tests::fields;

    const HTML: PageFormat = PageFormat::Html(PageLanguage::English);

    fn accept(value: &str) -> PageFormat {
        PageFormat::preferred(&fields(&[("Accept", value)]))
    }

    #[test]
    fn accept_selects_the_format() {
        assert_eq!(PageFormat::preferred(&Fields::default()), PageFormat::Json);
        assert_eq!(accept("*/*"), PageFormat::Json);
        assert_eq!(accept("text/html,application/xhtml+xml,*/*;q=0.8"), HTML);
        assert_eq!(accept("text/html;q=0.5, application/json"), PageFormat::Json);
        assert_eq!(accept("text/html;q=nan, application/json;q=0.1"), PageFormat::Json);
    }

    #[test]
    fn accept_language_selects_the_language() {
        for (value, expected) in [
            ("zh-CN,zh;q=0.9,en;q=0.8", PageLanguage::Chinese),
            ("ZH", PageLanguage::Chinese),
            ("de, zh-Hans;q=0.5", PageLanguage::Chinese),
            ("en-GB, zh;q=0.9", PageLanguage::English),
            ("zh;q=0", PageLanguage::English),
            ("zhx, *", PageLanguage::English),
            ("de", PageLanguage::English),
        ] {
            let request = fields(&[("Accept", "text/html"), ("Accept-Language", value)]);
            assert_eq!(PageFormat::preferred(&request), PageFormat::Html(expected), "{value}");
        }
    }
}
