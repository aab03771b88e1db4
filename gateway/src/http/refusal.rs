//! The reasons for which a request is refused while its head or body is read, over any protocol.

use super::message::StatusCode;

macro_rules! refusals {
    ($($variant:ident = $status:literal $reason:literal),+ $(,)?) => {
        /// Why a request is refused while its head or body is read. An HTTP/1.1 connection closes
        /// after every refusal.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum RequestRefusal { $($variant),+ }

        impl RequestRefusal {
            pub(crate) const ALL: &[RequestRefusal] = &[$(RequestRefusal::$variant),+];

            /// The status of the response to the client.
            pub fn status(self) -> StatusCode {
                let code: u16 = match self { $(RequestRefusal::$variant => $status),+ };
                StatusCode::from_u16(code).unwrap_or(StatusCode::BAD_REQUEST)
            }

            /// Whether the head was accepted and only its body is refused: method, target and
            /// authority of the request are valid.
            pub(crate) fn is_of_body(self) -> bool {
                matches!(
                    self,
                    RequestRefusal::BodyTooLarge
                        | RequestRefusal::BodyOfGet
                        | RequestRefusal::BodySyntax
                        | RequestRefusal::BodyTruncated
                        | RequestRefusal::BodyLength
                        | RequestRefusal::BodyReset
                        | RequestRefusal::BodyFlowControl
                        | RequestRefusal::BodyTimeout
                )
            }

            /// A fixed reason, also the metric label.
            pub fn reason(self) -> &'static str {
                match self { $(RequestRefusal::$variant => $reason),+ }
            }
        }
    };
}

refusals! {
    BareLf = 400 "bare_lf",
    RequestLine = 400 "request_line",
    MethodCase = 400 "method_case",
    Target = 400 "target",
    EncodedSlash = 400 "encoded_slash",
    PathEncoding = 400 "path_encoding",
    PathParameter = 400 "path_parameter",
    FieldSyntax = 400 "field_syntax",
    NoHost = 400 "no_host",
    RepeatedHost = 400 "repeated_host",
    BadHost = 400 "bad_host",
    HostMismatch = 400 "host_mismatch",
    BadLength = 400 "bad_length",
    RepeatedLength = 400 "repeated_length",
    LengthAndCoding = 400 "length_and_coding",
    RepeatedCoding = 400 "repeated_coding",
    ChunkedNotLast = 400 "chunked_not_last",
    CodingInHttp10 = 400 "coding_in_http10",
    BodySyntax = 400 "body_syntax",
    BodyTruncated = 400 "body_truncated",
    BodyLength = 400 "body_length",
    BodyReset = 400 "body_reset",
    BodyFlowControl = 400 "body_flow_control",
    BodyOfGet = 400 "body_of_get",
    Method = 405 "method",
    HeadTimeout = 408 "head_timeout",
    BodyTimeout = 408 "body_timeout",
    BodyTooLarge = 413 "body_too_large",
    TargetTooLong = 414 "target_too_long",
    Expectation = 417 "expectation",
    HeadTooLarge = 431 "head_too_large",
    TooManyFields = 431 "too_many_fields",
    UnknownCoding = 501 "unknown_coding",
    Protocol = 501 "protocol",
    MethodTooLong = 501 "method_too_long",
    Version = 505 "version",
}
