//! Parses the head of an upstream response into a `Response`, as strictly as a request.

use http::Method;

use crate::http::fields::KnownField;
use crate::http::framing;
use crate::http::message::{BodyLength, HttpVersion, Response, StatusCode, is_bodiless};

/// Maximum fields of a response head; more is refused as malformed.
const FIELDS_MAX: usize = 256;

/// Parses a complete head into `response`, which is cleared first. Returns whether the connection
/// can be reused.
pub(super) fn parse(head: &[u8], method: &Method, response: &mut Response) -> Result<bool, &'static str> {
    response.fields.clear();
    let mut lines = [const { std::mem::MaybeUninit::uninit() }; FIELDS_MAX];
    let mut parsed = httparse::Response::new(&mut []);
    match httparse::ParserConfig::default().parse_response_with_uninit_headers(&mut parsed, head, &mut lines) {
        Ok(httparse::Status::Complete(length)) if length == head.len() => {}
        Err(httparse::Error::TooManyHeaders) => return Err("too many fields"),
        Err(httparse::Error::Version | httparse::Error::Status) => return Err("bad status line"),
        _ => return Err("bad field syntax"),
    }
    // The grammar ends at 599 (RFC 9110 section 15). A missing space after the code is accepted: it
    // does not change the meaning.
    let code = parsed.code.filter(|code| *code < 600).unwrap_or(0);
    response.status = StatusCode::from_u16(code).map_err(|_| "bad status code")?;
    if parsed.version == Some(0) && response.status == StatusCode::SWITCHING_PROTOCOLS {
        return Err("protocol switch in HTTP/1.0");
    }
    let lines = parsed.headers.iter().map(|line| (line.name.as_bytes(), line.value.trim_ascii()));
    response.fields.load_section(head, lines);
    let is_http10 = parsed.version == Some(0);
    response.version = if is_http10 { HttpVersion::Http10 } else { HttpVersion::Http11 };
    let announced = framing::announced_length(&response.fields, is_http10).map_err(|_| "bad framing")?;
    response.length = match announced {
        // The length that a GET would return: a response to HEAD may announce it and has no body.
        _ if *method == Method::HEAD => announced.unwrap_or(BodyLength::Empty),
        _ if is_bodiless(method, response.status) => BodyLength::Empty,
        Some(length) => length,
        None => BodyLength::UntilClose,
    };
    let has_option = |option: &[u8]| {
        response.fields.members(KnownField::Connection).any(|member| member.eq_ignore_ascii_case(option))
    };
    let persistent = !has_option(b"close") && (!is_http10 || has_option(b"keep-alive"));
    Ok(persistent && response.length != BodyLength::UntilClose)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_text(text: &str, method: Method) -> Result<(u16, BodyLength, bool), &'static str> {
        let mut response = Response::new(StatusCode::OK);
        let reusable = parse(text.as_bytes(), &method, &mut response)?;
        Ok((response.status.as_u16(), response.length, reusable))
    }

    #[test]
    fn ambiguous_responses_are_refused() {
        for text in [
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
            "HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
            "HTTP/1.1 200 OK\r\nA : b\r\n\r\n",
            "HTTP/2 200 OK\r\n\r\n",
            "HTTP/1.1 20 OK\r\n\r\n",
            "HTTP/1.1 099 OK\r\n\r\n",
            "HTTP/1.1 600 OK\r\n\r\n",
            "garbage\r\n\r\n",
        ] {
            assert!(parse_text(text, Method::GET).is_err(), "{text:?}");
        }
    }

    #[test]
    fn body_length_follows_rfc_9112() {
        assert_eq!(
            parse_text("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", Method::HEAD),
            Ok((200, BodyLength::Known(5), true))
        );
        assert_eq!(
            parse_text("HTTP/1.1 304 \r\nContent-Length: 5\r\n\r\n", Method::GET),
            Ok((304, BodyLength::Empty, true))
        );
        assert_eq!(parse_text("HTTP/1.1 200 OK\r\n\r\n", Method::GET), Ok((200, BodyLength::UntilClose, false)));
        assert_eq!(
            parse_text("HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n", Method::GET),
            Ok((200, BodyLength::Known(5), false))
        );
        assert_eq!(
            parse_text("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n", Method::GET),
            Ok((200, BodyLength::Streamed, false))
        );
    }
}
