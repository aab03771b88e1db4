//! Requests of gRPC, their deadline, and the status of gRPC for a failure of the gateway
//! (<https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>).

use std::time::Duration;

use super::fields::{Fields, KnownField};
use super::message::{Method, Request, StatusCode};

/// The field with the time that a caller waits.
pub(crate) const TIMEOUT_NAME: &[u8] = b"grpc-timeout";
/// The largest number in `grpc-timeout`: eight digits.
pub(crate) const TIMEOUT_MAX: u64 = 99_999_999;

/// Whether the fields are those of a gRPC message. `application/grpc-web` is another protocol.
pub(crate) fn is_grpc(fields: &Fields) -> bool {
    const TYPE: &[u8] = b"application/grpc";
    fields.get(KnownField::ContentType).is_some_and(|value| {
        value.get(..TYPE.len()).is_some_and(|start| start.eq_ignore_ascii_case(TYPE))
            && matches!(value.get(TYPE.len()), None | Some(b'+' | b';' | b' '))
    })
}

/// Whether the request is a call of gRPC.
pub(crate) fn is_call(request: &Request) -> bool {
    request.method == Method::POST && is_grpc(&request.fields)
}

/// The time in which the caller expects the whole response; `None` without a valid one.
pub(crate) fn timeout(fields: &Fields) -> Option<Duration> {
    let value = fields.named(TIMEOUT_NAME).next()?;
    let (unit, digits) = value.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number = digits.iter().fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0'));
    Some(match unit {
        b'H' => Duration::from_secs(number * 3_600),
        b'M' => Duration::from_secs(number * 60),
        b'S' => Duration::from_secs(number),
        b'm' => Duration::from_millis(number),
        b'u' => Duration::from_micros(number),
        b'n' => Duration::from_nanos(number),
        _ => return None,
    })
}

/// Whether the head of a response has the status of a failure of the server: unknown, deadline
/// exceeded, internal, unavailable, data loss.
pub(crate) fn is_failure(fields: &Fields) -> bool {
    is_grpc(fields)
        && fields
            .named(b"grpc-status")
            .next()
            .is_some_and(|status| matches!(status, b"2" | b"4" | b"13" | b"14" | b"15"))
}

/// A status of gRPC that the gateway gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GrpcStatus {
    Cancelled = 1,
    Unknown = 2,
    DeadlineExceeded = 4,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
    Unauthenticated = 16,
}

impl GrpcStatus {
    /// The status for a failure that HTTP reports by `status`: that of
    /// `http-grpc-status-mapping.md`, except for limits and deadlines. Callers tell those from an
    /// unreachable server.
    pub(crate) fn of(status: StatusCode) -> Self {
        match status.as_u16() {
            400 => GrpcStatus::Internal,
            401 => GrpcStatus::Unauthenticated,
            403 => GrpcStatus::PermissionDenied,
            404 => GrpcStatus::Unimplemented,
            408 | 504 => GrpcStatus::DeadlineExceeded,
            413 | 429 | 431 => GrpcStatus::ResourceExhausted,
            499 => GrpcStatus::Cancelled,
            500 => GrpcStatus::Internal,
            502 | 503 => GrpcStatus::Unavailable,
            _ => GrpcStatus::Unknown,
        }
    }

    /// The status for a stream that the server reset with an error code of HTTP/2
    /// (`PROTOCOL-HTTP2.md`, "HTTP2 Transport Mapping").
    pub(crate) fn of_reset(code: u32) -> Self {
        match code {
            // REFUSED_STREAM
            7 => GrpcStatus::Unavailable,
            // CANCEL
            8 => GrpcStatus::Cancelled,
            // ENHANCE_YOUR_CALM
            11 => GrpcStatus::ResourceExhausted,
            // INADEQUATE_SECURITY
            12 => GrpcStatus::PermissionDenied,
            _ => GrpcStatus::Internal,
        }
    }

    pub(crate) fn number(self) -> u8 {
        self as u8
    }

    /// Adds the status to the head or the trailers of a response. `reason` is a word without
    /// reserved characters.
    pub(crate) fn write(self, reason: &str, fields: &mut Fields) {
        fields.push(b"grpc-status", itoa::Buffer::new().format(self.number()).as_bytes());
        fields.push(b"grpc-message", reason.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(name: &str, value: &str) -> Fields {
        let mut fields = Fields::default();
        fields.push(name.as_bytes(), value.as_bytes());
        fields
    }

    #[test]
    fn messages_are_known_by_their_type() {
        for value in ["application/grpc", "application/grpc+proto", "Application/gRPC; a=b"] {
            assert!(is_grpc(&fields("content-type", value)), "{value}");
        }
        for value in ["application/grpc-web", "application/grpcx", "application/json", ""] {
            assert!(!is_grpc(&fields("content-type", value)), "{value}");
        }
    }

    #[test]
    fn deadlines_have_a_number_and_a_unit() {
        let of = |value| timeout(&fields("grpc-timeout", value));
        assert_eq!(of("1H"), Some(Duration::from_secs(3_600)));
        assert_eq!(of("99999999H"), Some(Duration::from_secs(99_999_999 * 3_600)));
        assert_eq!((of("2M"), of("3S")), (Some(Duration::from_secs(120)), Some(Duration::from_secs(3))));
        assert_eq!((of("4m"), of("5u")), (Some(Duration::from_millis(4)), Some(Duration::from_micros(5))));
        assert_eq!((of("6n"), of("0S")), (Some(Duration::from_nanos(6)), Some(Duration::ZERO)));
        for ignored in ["", "S", "5", "-5S", "1.5S", "123456789S", "5s", "5 S"] {
            assert_eq!(of(ignored), None, "{ignored}");
        }
    }
}
