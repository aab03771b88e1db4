//! Negotiation of the content coding (RFC 9110 section 12.5.3).

use crate::http::compressed_forms::ContentCoding;
use crate::http::fields::{Fields, KnownField};

/// The coding that the client weighs most; of equal ones, the first of `offered`. `None`: the body
/// is sent as it is.
pub(crate) fn preferred_coding(request: &Fields, offered: &[ContentCoding]) -> Option<ContentCoding> {
    if !request.has(KnownField::AcceptEncoding) {
        return None;
    }
    let mut best: Option<(u32, ContentCoding)> = None;
    let identity = weight_of(request, "identity").unwrap_or(0);
    for coding in offered {
        let weight = weight_of(request, name(*coding)).or_else(|| weight_of(request, "*")).unwrap_or(0);
        if weight > 0 && weight >= identity && best.is_none_or(|(other, _)| weight > other) {
            best = Some((weight, *coding));
        }
    }
    best.map(|(_, coding)| coding)
}

fn name(coding: ContentCoding) -> &'static str {
    use crate::metrics::Label as _;
    coding.as_str()
}

/// The weight of a coding in thousandths; `None` where the request does not name it. An invalid
/// weight is 0.
fn weight_of(request: &Fields, coding: &str) -> Option<u32> {
    request.members(KnownField::AcceptEncoding).find_map(|member| {
        let text = std::str::from_utf8(member).ok()?;
        let mut parts = text.split(';').map(str::trim);
        let named = parts.next()?;
        let is_alias = coding == "gzip" && named.eq_ignore_ascii_case("x-gzip");
        if !named.eq_ignore_ascii_case(coding) && !is_alias {
            return None;
        }
        let weight = parts.find_map(|part| part.strip_prefix("q=").or_else(|| part.strip_prefix("Q=")));
        let weight = weight.map_or(Some(1.0), |weight| weight.trim().parse::<f32>().ok());
        Some(weight.filter(|weight| (0.0..=1.0).contains(weight)).map_or(0, |weight| (weight * 1000.0) as u32))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::fields::tests::fields;

    #[test]
    fn weights_of_the_client_come_before_the_order_of_the_route() {
        use ContentCoding::{Brotli, Gzip, Zstd};
        let all = [Zstd, Brotli, Gzip];
        for (value, offered, expected) in [
            ("gzip, br, zstd", &all[..], Some(Zstd)),
            ("gzip, br", &all, Some(Brotli)),
            ("gzip;q=1.0, br;q=0.9", &all, Some(Gzip)),
            ("GZIP", &all, Some(Gzip)),
            ("x-gzip", &all, Some(Gzip)),
            ("*", &all, Some(Zstd)),
            ("*;q=0.1, zstd;q=0", &all, Some(Brotli)),
            ("gzip;q=0", &all, None),
            ("gzip;q=2", &all, None),
            ("gzip;q=0.5, identity", &all, None),
            ("identity;q=0.5, gzip;q=0.5", &all, Some(Gzip)),
            ("deflate, compress", &all, None),
            ("", &all, None),
            ("br, zstd", &[Gzip], None),
            ("zstd, gzip", &[Gzip, Zstd], Some(Gzip)),
        ] {
            assert_eq!(preferred_coding(&fields(&[("Accept-Encoding", value)]), offered), expected, "{value}");
        }
        assert_eq!(preferred_coding(&Fields::default(), &all), None);
    }
}
