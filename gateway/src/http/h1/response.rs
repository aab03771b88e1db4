//! Turns the bytes of an upstream's answer head into a `Response`, as strictly as a request.

use http::Method;

use super::framing;
use crate::http::fields::Known;
use crate::http::message::{Length, Response, StatusCode, is_bodiless};

/// Fields of an answer's head; an upstream that sends more is broken.
const FIELDS_MAX: usize = 256;

/// Parses a whole head into `response`, which is emptied first; says whether the connection may be used again.
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
    // The grammar ends at 599 (RFC 9110 section 15). A missing space behind the code is let pass: it changes nothing.
    let code = parsed.code.filter(|code| *code < 600).unwrap_or(0);
    response.status = StatusCode::from_u16(code).map_err(|_| "bad status code")?;
    if parsed.version == Some(0) && response.status == StatusCode::SWITCHING_PROTOCOLS {
        return Err("a switch of protocols in HTTP/1.0");
    }
    let lines = parsed.headers.iter().map(|line| (line.name.as_bytes(), line.value.trim_ascii()));
    response.fields.adopt(head, lines);
    let is_http10 = parsed.version == Some(0);
    let announced = framing::announced(&response.fields, is_http10).map_err(|_| "bad framing")?;
    response.length = match announced {
        // What a GET would have brought: an answer to HEAD may say so and has no body.
        _ if *method == Method::HEAD => announced.unwrap_or(Length::Empty),
        _ if is_bodiless(method, response.status) => Length::Empty,
        Some(length) => length,
        None => Length::UntilClose,
    };
    let says =
        |option: &[u8]| response.fields.members(Known::Connection).any(|member| member.eq_ignore_ascii_case(option));
    let persistent = !says(b"close") && (!is_http10 || says(b"keep-alive"));
    Ok(persistent && response.length != Length::UntilClose)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str, method: Method) -> Result<(u16, Length, bool), &'static str> {
        let mut response = Response::new(StatusCode::OK);
        let reusable = parse(text.as_bytes(), &method, &mut response)?;
        Ok((response.status.as_u16(), response.length, reusable))
    }

    #[test]
    fn doubtful_answers_are_refused() {
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
            assert!(of(text, Method::GET).is_err(), "{text:?}");
        }
    }

    #[test]
    fn the_body_ends_where_the_rfc_says() {
        assert_eq!(of("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", Method::HEAD), Ok((200, Length::Known(5), true)));
        assert_eq!(of("HTTP/1.1 304 \r\nContent-Length: 5\r\n\r\n", Method::GET), Ok((304, Length::Empty, true)));
        assert_eq!(of("HTTP/1.1 200 OK\r\n\r\n", Method::GET), Ok((200, Length::UntilClose, false)));
        assert_eq!(of("HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n", Method::GET), Ok((200, Length::Known(5), false)));
        assert_eq!(
            of("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n", Method::GET),
            Ok((200, Length::Streamed, false))
        );
    }
}
