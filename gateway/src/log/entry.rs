//! One line of the access log: its facts, and its text as JSON or in the combined format.

use std::io::Write;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use crate::http::message::{Method, Scheme, StatusCode};
use crate::http::text;
use crate::label;
use crate::metrics::Label as _;
use crate::timestamp::{TimestampFormatter, push_digits};

/// Most bytes of a value that a client chooses freely.
const CLIENT_TEXT_MAX: usize = 512;

label! {
    /// A member of a JSON line (`log.fields`).
    pub(crate) LogField, "field", {
        Time = "time",
        Client = "client",
        Proxy = "proxy",
        Method = "method",
        Scheme = "scheme",
        Authority = "authority",
        Path = "path",
        Version = "version",
        Tls = "tls",
        Status = "status",
        Bytes = "bytes",
        RequestBytes = "request_bytes",
        Duration = "duration",
        Route = "route",
        Cache = "cache",
        Degraded = "degraded",
        Blame = "blame",
        Failure = "failure",
        Aborted = "aborted",
        Limit = "limit",
        ShadowLimit = "shadow_limit",
        Refused = "refused",
        Upstream = "upstream",
        UpstreamTime = "upstream_time",
        ConnectTime = "connect_time",
        Retries = "retries",
        Hedged = "hedged",
        User = "user",
        UserClass = "user_class",
        Device = "device",
        Country = "country",
        Ja4 = "ja4",
        Fingerprint = "fingerprint",
        UserAgent = "user_agent",
        Referer = "referer",
        TraceId = "trace_id",
        RequestId = "request_id",
        Config = "config",
    }
}

/// The form of access log lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum AccessLogFormat {
    /// A JSON object with these members, in this order; those without a value are left out.
    Json(Vec<LogField>),
    /// The combined log format of Apache and nginx.
    Combined,
}

impl Default for AccessLogFormat {
    /// Every member except `referer`, which often holds a URL of another site.
    fn default() -> Self {
        AccessLogFormat::Json(LogField::ALL.iter().copied().filter(|field| *field != LogField::Referer).collect())
    }
}

/// The facts of one line of the access log. An empty text is no value.
#[derive(Clone, Debug)]
pub(crate) struct AccessLogEntry<'a> {
    pub(crate) method: &'a Method,
    pub(crate) scheme: Scheme,
    pub(crate) authority: &'a str,
    pub(crate) path_and_query: &'a str,
    /// Of HTTP, as `1.1`.
    pub(crate) version: &'a str,
    /// Version of TLS; empty in plaintext.
    pub(crate) tls: &'a str,
    pub(crate) status: StatusCode,
    /// Bytes of the response body.
    pub(crate) bytes: u64,
    /// Bytes of the request body: those that the client announced, or else those received.
    pub(crate) request_bytes: u64,
    pub(crate) duration: Duration,
    pub(crate) client: IpAddr,
    /// The proxy that reported the client in a PROXY protocol header.
    pub(crate) proxy: Option<IpAddr>,
    pub(crate) route: &'a str,
    /// The cache result.
    pub(crate) cache: &'a str,
    /// The degrade step that produced the response.
    pub(crate) degraded: &'a str,
    /// The side that is responsible for a failure.
    pub(crate) blame: &'a str,
    /// The class of the failure.
    pub(crate) failure: &'a str,
    /// Why the response was not completed.
    pub(crate) aborted: &'a str,
    /// The limit rule that denied the request.
    pub(crate) limit: &'a str,
    /// The limit rules in shadow mode that would have denied the request.
    pub(crate) shadow_limit: &'a str,
    /// Why the request was refused while it was parsed.
    pub(crate) refused: &'a str,
    /// The endpoint that received the request.
    pub(crate) upstream: &'a str,
    /// From the call of the upstream to the head of its response, or to its failure.
    pub(crate) upstream_time: Option<Duration>,
    /// The part of it in which a connection was opened.
    pub(crate) connect_time: Option<Duration>,
    /// How often the request was sent again.
    pub(crate) retries: u32,
    /// Whether a second endpoint was sent the request.
    pub(crate) is_hedged: bool,
    /// The key or the user that the route has authenticated.
    pub(crate) user: &'a str,
    pub(crate) user_class: &'a str,
    /// The beginning of the keyed hash that limits count the device by.
    pub(crate) device: Option<u64>,
    /// The country of the client, from the GeoIP database.
    pub(crate) country: &'a str,
    /// The JA4 fingerprint of the TLS connection.
    pub(crate) ja4: &'a str,
    /// The part of it to which devices are bound.
    pub(crate) fingerprint: &'a str,
    /// `User-Agent` as the client sent it.
    pub(crate) user_agent: &'a [u8],
    pub(crate) referer: &'a [u8],
    pub(crate) trace_id: &'a str,
    pub(crate) request_id: &'a str,
    /// Number of the configuration that served the request.
    pub(crate) config: u64,
}

impl AccessLogFormat {
    /// Appends the line of `entry`, which ends at `now`.
    pub(super) fn write(
        &self,
        out: &mut Vec<u8>,
        (timestamps, now): (&mut TimestampFormatter, SystemTime),
        entry: &AccessLogEntry<'_>,
    ) {
        match self {
            AccessLogFormat::Json(fields) => {
                out.push(b'{');
                let start = out.len();
                for field in fields {
                    let before = out.len();
                    if before > start {
                        out.push(b',');
                    }
                    out.push(b'"');
                    out.extend_from_slice(field.as_str().as_bytes());
                    out.extend_from_slice(b"\":");
                    let value = out.len();
                    if *field == LogField::Time {
                        out.push(b'"');
                        timestamps.push(out, now);
                        out.push(b'"');
                    } else {
                        entry.push_value(*field, out);
                    }
                    if out.len() == value {
                        // No value.
                        out.truncate(before);
                    }
                }
                out.extend_from_slice(b"}\n");
            }
            AccessLogFormat::Combined => {
                push_display(out, entry.client);
                out.extend_from_slice(b" - ");
                push_combined_text(out, entry.user.as_bytes());
                out.extend_from_slice(b" [");
                timestamps.push_combined(out, now);
                out.extend_from_slice(b"] \"");
                for part in [entry.method.as_str(), " ", entry.path_and_query] {
                    push_quoted(out, part.as_bytes());
                }
                if !entry.version.is_empty() {
                    out.extend_from_slice(b" HTTP/");
                    push_quoted(out, entry.version.as_bytes());
                }
                out.extend_from_slice(b"\" ");
                out.extend_from_slice(entry.status.as_str().as_bytes());
                out.push(b' ');
                push_number(out, entry.bytes);
                for text in [entry.referer, entry.user_agent] {
                    out.extend_from_slice(b" \"");
                    push_combined_text(out, &text[..text.len().min(CLIENT_TEXT_MAX)]);
                    out.push(b'"');
                }
                out.push(b'\n');
            }
        }
    }
}

impl AccessLogEntry<'_> {
    /// Appends the JSON value of a member; nothing if it has none.
    fn push_value(&self, field: LogField, out: &mut Vec<u8>) {
        match field {
            LogField::Time => {}
            LogField::Client => push_quoted_display(out, self.client),
            LogField::Proxy => {
                if let Some(proxy) = self.proxy {
                    push_quoted_display(out, proxy);
                }
            }
            LogField::Status => out.extend_from_slice(self.status.as_str().as_bytes()),
            LogField::Bytes => push_number(out, self.bytes),
            LogField::RequestBytes => push_positive(out, self.request_bytes),
            LogField::Duration => push_seconds(out, self.duration),
            LogField::UpstreamTime => push_time(out, self.upstream_time),
            LogField::ConnectTime => push_time(out, self.connect_time),
            LogField::Retries => push_positive(out, self.retries.into()),
            LogField::Hedged => {
                if self.is_hedged {
                    out.extend_from_slice(b"true");
                }
            }
            LogField::Device => {
                if let Some(device) = self.device {
                    out.push(b'"');
                    text::push_hex(out, device);
                    out.push(b'"');
                }
            }
            LogField::Config => push_number(out, self.config),
            LogField::UserAgent => push_client_text(out, self.user_agent),
            LogField::Referer => push_client_text(out, self.referer),
            // These two are members of every line.
            LogField::Authority => push_string(out, self.authority),
            LogField::Path => push_string(out, self.path_and_query),
            LogField::Method
            | LogField::Scheme
            | LogField::Version
            | LogField::Tls
            | LogField::Route
            | LogField::Cache
            | LogField::Degraded
            | LogField::Blame
            | LogField::Failure
            | LogField::Aborted
            | LogField::Limit
            | LogField::ShadowLimit
            | LogField::Refused
            | LogField::Upstream
            | LogField::User
            | LogField::UserClass
            | LogField::Country
            | LogField::Ja4
            | LogField::Fingerprint
            | LogField::TraceId
            | LogField::RequestId => {
                let text = self.text(field);
                if !text.is_empty() {
                    push_string(out, text);
                }
            }
        }
    }

    /// The value of a member that is a text.
    fn text(&self, field: LogField) -> &str {
        match field {
            LogField::Method => self.method.as_str(),
            LogField::Scheme => self.scheme.as_str(),
            LogField::Version => self.version,
            LogField::Tls => self.tls,
            LogField::Route => self.route,
            LogField::Cache => self.cache,
            LogField::Degraded => self.degraded,
            LogField::Blame => self.blame,
            LogField::Failure => self.failure,
            LogField::Aborted => self.aborted,
            LogField::Limit => self.limit,
            LogField::ShadowLimit => self.shadow_limit,
            LogField::Refused => self.refused,
            LogField::Upstream => self.upstream,
            LogField::User => self.user,
            LogField::UserClass => self.user_class,
            LogField::Country => self.country,
            LogField::Ja4 => self.ja4,
            LogField::Fingerprint => self.fingerprint,
            LogField::TraceId => self.trace_id,
            LogField::RequestId => self.request_id,
            _ => "",
        }
    }
}

fn push_display(out: &mut Vec<u8>, value: impl std::fmt::Display) {
    write!(out, "{value}").expect("writing to a vector does not fail");
}

fn push_quoted_display(out: &mut Vec<u8>, value: impl std::fmt::Display) {
    write!(out, "\"{value}\"").expect("writing to a vector does not fail");
}

fn push_number(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
}

fn push_positive(out: &mut Vec<u8>, number: u64) {
    if number > 0 {
        push_number(out, number);
    }
}

/// Seconds with six decimal places.
fn push_seconds(out: &mut Vec<u8>, duration: Duration) {
    push_number(out, duration.as_secs());
    out.push(b'.');
    push_digits(out, u64::from(duration.subsec_micros()), 6);
}

fn push_time(out: &mut Vec<u8>, time: Option<Duration>) {
    if let Some(time) = time {
        push_seconds(out, time);
    }
}

fn push_client_text(out: &mut Vec<u8>, text: &[u8]) {
    if !text.is_empty() {
        push_string(out, &String::from_utf8_lossy(&text[..text.len().min(CLIENT_TEXT_MAX)]));
    }
}

fn push_string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    push_escaped(out, text);
    out.push(b'"');
}

/// The contents of a JSON string, escaped (RFC 8259 section 7).
fn push_escaped(out: &mut Vec<u8>, text: &str) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let bytes = text.as_bytes();
    let mut copied = 0;
    for (at, byte) in bytes.iter().enumerate() {
        if *byte >= 0x20 && *byte != b'"' && *byte != b'\\' {
            continue;
        }
        out.extend_from_slice(&bytes[copied..at]);
        copied = at + 1;
        match byte {
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', *byte]),
            _ => {
                out.extend_from_slice(b"\\u00");
                out.extend_from_slice(&[HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
            }
        }
    }
    out.extend_from_slice(&bytes[copied..]);
}

/// A text of the combined format; `-` where it is empty.
fn push_combined_text(out: &mut Vec<u8>, text: &[u8]) {
    if text.is_empty() {
        out.push(b'-');
    }
    push_quoted(out, text);
}

/// The contents of a quoted string, escaped as nginx does.
fn push_quoted(out: &mut Vec<u8>, text: &[u8]) {
    for byte in text {
        match byte {
            b'"' | b'\\' | 0..0x20 | 0x7f.. => {
                write!(out, "\\x{byte:02X}").expect("writing to a vector does not fail");
            }
            _ => out.push(*byte),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const GET: Method = Method::GET;

    pub(in super::super) fn line<'a>(path: &'a str, route: &'a str) -> AccessLogEntry<'a> {
        AccessLogEntry {
            method: &GET,
            scheme: Scheme::Https,
            authority: "example.org",
            path_and_query: path,
            version: "2.0",
            tls: "1.3",
            status: StatusCode::OK,
            bytes: 1_234,
            request_bytes: 0,
            duration: Duration::from_micros(1_002_003),
            client: Ipv4Addr::LOCALHOST.into(),
            proxy: None,
            route,
            cache: "hit",
            degraded: "",
            blame: "",
            failure: "",
            aborted: "",
            limit: "",
            shadow_limit: "",
            refused: "",
            upstream: "",
            upstream_time: None,
            connect_time: None,
            retries: 0,
            is_hedged: false,
            user: "",
            user_class: "gold",
            device: Some(0xab),
            country: "",
            ja4: "",
            fingerprint: "",
            user_agent: b"",
            referer: b"",
            trace_id: "",
            request_id: "",
            config: 3,
        }
    }

    fn written(format: &AccessLogFormat, entry: &AccessLogEntry<'_>) -> String {
        let (mut out, mut timestamps) = (Vec::new(), TimestampFormatter::new());
        let now = SystemTime::UNIX_EPOCH + Duration::from_millis(7);
        format.write(&mut out, (&mut timestamps, now), entry);
        assert_eq!(out.iter().filter(|byte| **byte == b'\n').count(), 1);
        String::from_utf8(out).expect("UTF-8")
    }

    #[test]
    fn hostile_text_is_escaped() {
        let hostile = "/\"},\n{\"a\\\u{0}\u{1f}\u{7f}é";
        let entry = AccessLogEntry { user_agent: b"a\"\r\n\xff", ..line(hostile, "r") };
        let value: serde_json::Value =
            serde_json::from_str(&written(&AccessLogFormat::default(), &entry)).expect("a line is JSON");
        assert_eq!(value["path"], hostile);
        assert_eq!(value["time"], "1970-01-01T00:00:00.007Z");
        assert_eq!((&value["duration"], &value["status"]), (&1.002_003.into(), &200.into()));
        assert_eq!((value["version"].as_str(), value["client"].as_str()), (Some("2.0"), Some("127.0.0.1")));
        assert_eq!(value["user_agent"], "a\"\r\n\u{fffd}");
        assert_eq!((value["device"].as_str(), value["config"].as_u64()), (Some("00000000000000ab"), Some(3)));
        assert!(["degraded", "retries", "hedged", "upstream_time"].iter().all(|name| value.get(*name).is_none()));
        let combined = written(&AccessLogFormat::Combined, &entry);
        assert!(combined.starts_with("127.0.0.1 - - [01/Jan/1970:00:00:00 +0000] \"GET /\\x22},\\x0A{"), "{combined}");
        assert!(combined.ends_with(" HTTP/2.0\" 200 1234 \"-\" \"a\\x22\\x0D\\x0A\\xFF\"\n"), "{combined}");
    }

    #[test]
    fn members_stand_in_the_configured_order() {
        let format =
            AccessLogFormat::Json(vec![LogField::Retries, LogField::Status, LogField::Route, LogField::Hedged]);
        assert_eq!(written(&format, &line("/", "r")), "{\"status\":200,\"route\":\"r\"}\n");
        assert_eq!(written(&AccessLogFormat::Json(vec![LogField::Proxy]), &line("/", "r")), "{}\n");
    }

    #[test]
    fn text_of_a_client_is_bounded() {
        let long = "a".repeat(10_000);
        let entry = AccessLogEntry { user_agent: long.as_bytes(), referer: long.as_bytes(), ..line("/", "r") };
        for format in [AccessLogFormat::Json(LogField::ALL.to_vec()), AccessLogFormat::Combined] {
            assert!(written(&format, &entry).len() < 2_000);
        }
    }
}
