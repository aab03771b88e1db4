//! The service that a load is put on: its URL, the bytes of each request, and its TLS client.

use std::net::{SocketAddr, ToSocketAddrs as _};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use url::Url;

use crate::error::{LoadtestError, Result};
use crate::load::tls_trust;

/// Fields that the load generator sets itself.
const OWN_FIELDS: [&str; 5] = ["host", "content-length", "transfer-encoding", "connection", "expect"];
/// Methods whose response ends in a way that the load generator does not follow.
const REFUSED_METHODS: [&str; 2] = ["CONNECT", "TRACE"];

/// A request of the command line.
#[derive(Clone, Debug, Default)]
pub(crate) struct RequestOptions {
    pub(crate) url: String,
    pub(crate) method: String,
    /// `Name: value`.
    pub(crate) headers: Vec<String>,
    pub(crate) body: String,
    /// PEM file of an authority that is trusted besides those of the system.
    pub(crate) ca: Option<PathBuf>,
}

/// A service, and the requests that are sent to it in turn.
#[derive(Clone)]
pub(crate) struct LoadTarget {
    /// For reports.
    pub(crate) url: String,
    pub(crate) addresses: AddressSet,
    pub(crate) balance: Balance,
    pub(crate) tls: Option<TlsClient>,
    /// At least one.
    pub(crate) requests: Vec<Vec<u8>>,
    pub(crate) is_head: bool,
}

/// How the requests of a load use the addresses of its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Balance {
    /// New connections in turn, and a kept one whenever there is one: the addresses of one host, of
    /// which some may not answer.
    Connections,
    /// Requests in turn, each over a connection to its address: the servers behind a load balancer.
    Requests,
}

/// Addresses that are used in turn. They may change while a load runs, as behind a load
/// balancer.
#[derive(Clone, Debug)]
pub(crate) struct AddressSet(Arc<Mutex<Vec<SocketAddr>>>);

impl AddressSet {
    pub(crate) fn new(addresses: Vec<SocketAddr>) -> Self {
        AddressSet(Arc::new(Mutex::new(addresses)))
    }

    pub(crate) fn replace(&self, addresses: Vec<SocketAddr>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = addresses;
    }

    /// The address of a request by its number; `None` if there is none.
    pub(crate) fn select(&self, number: u64) -> Option<SocketAddr> {
        let addresses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let index = usize::try_from(number % (addresses.len() as u64).max(1)).unwrap_or(0);
        addresses.get(index).copied()
    }
}

/// The TLS side of connections to a service.
#[derive(Clone)]
pub(crate) struct TlsClient {
    pub(crate) config: Arc<ClientConfig>,
    pub(crate) name: ServerName<'static>,
}

impl LoadTarget {
    /// Checks the options and looks up the host.
    pub(crate) fn new(options: &RequestOptions) -> Result<Self> {
        let url = parse_url(&options.url)?;
        let request = request(options, &url)?;
        let host = url.host_str().unwrap_or_default();
        let port = url.port_or_known_default().unwrap_or(80);
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let addresses: Vec<SocketAddr> =
            (bare, port).to_socket_addrs().map_err(LoadtestError::io(format!("cannot look up {host}")))?.collect();
        let tls = (url.scheme() == "https").then(|| tls_client(bare, options)).transpose()?;
        Ok(LoadTarget {
            url: url.to_string(),
            addresses: AddressSet::new(addresses),
            balance: Balance::Connections,
            tls,
            requests: vec![request],
            is_head: options.method == "HEAD",
        })
    }

    /// A target in clear text whose requests are GETs of `paths` in turn.
    pub(crate) fn plain(address: SocketAddr, paths: &[String], fields: &str) -> Self {
        let request = |path: &String| format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n{fields}\r\n").into_bytes();
        LoadTarget {
            url: format!("http://{address}"),
            addresses: AddressSet::new(vec![address]),
            balance: Balance::Requests,
            tls: None,
            requests: paths.iter().map(request).collect(),
            is_head: false,
        }
    }
}

fn usage(what: impl Into<String>) -> LoadtestError {
    LoadtestError::Usage(what.into())
}

fn parse_url(text: &str) -> Result<Url> {
    let hint = "such as http://127.0.0.1:8080/path";
    let url = Url::parse(text).map_err(|fault| usage(format!("--url {text}: {fault}; a URL is needed {hint}")))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(usage(format!("--url {text}: the scheme is `{}`; http:// or https:// is needed", url.scheme())));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(usage("--url has a user or a password; send them with --header 'Authorization: ...'"));
    }
    if url.port() == Some(0) {
        return Err(usage(format!("--url {text}: port 0 is not an address")));
    }
    Ok(url)
}

/// The bytes of the request.
fn request(options: &RequestOptions, url: &Url) -> Result<Vec<u8>> {
    let method = &options.method;
    if method.is_empty() || !method.bytes().all(|byte| byte.is_ascii_uppercase()) {
        return Err(usage(format!("--method {method}: a method such as GET or POST is needed, in capitals")));
    }
    if REFUSED_METHODS.contains(&method.as_str()) {
        return Err(usage(format!("--method {method} is not a request of a service")));
    }
    let query = url.query().map_or_else(String::new, |query| format!("?{query}"));
    let default_port = url.port().map_or_else(String::new, |port| format!(":{port}"));
    let mut text = format!("{method} {}{query} HTTP/1.1\r\n", url.path());
    if !options.headers.iter().any(|header| field_name(header) == "host") {
        text.push_str(&format!("Host: {}{default_port}\r\n", url.host_str().unwrap_or_default()));
    }
    for header in &options.headers {
        text.push_str(&format!("{}\r\n", checked_field(header)?));
    }
    if !options.body.is_empty() || matches!(method.as_str(), "POST" | "PUT" | "PATCH") {
        text.push_str(&format!("Content-Length: {}\r\n", options.body.len()));
    }
    text.push_str("\r\n");
    text.push_str(&options.body);
    Ok(text.into_bytes())
}

fn field_name(header: &str) -> String {
    header.split(':').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// The line of a field, without its end.
fn checked_field(header: &str) -> Result<String> {
    let Some((name, value)) = header.split_once(':') else {
        return Err(usage(format!("--header {header}: `Name: value` is needed")));
    };
    let (name, value) = (name.trim(), value.trim());
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    if name.is_empty() || !name.bytes().all(is_token) {
        return Err(usage(format!("--header {header}: `{name}` is not a field name")));
    }
    if value.bytes().any(|byte| byte < b' ' && byte != b'\t' || byte == 0x7f) {
        return Err(usage(format!("--header {name}: its value has a control character")));
    }
    let lower = name.to_ascii_lowercase();
    if lower != "host" && OWN_FIELDS.contains(&lower.as_str()) {
        return Err(usage(format!("--header {name}: the load generator sets this field itself")));
    }
    Ok(format!("{name}: {value}"))
}

fn tls_client(host: &str, options: &RequestOptions) -> Result<TlsClient> {
    let name = ServerName::try_from(host.to_owned())
        .map_err(|_| usage(format!("--url {}: `{host}` is not a name for TLS", options.url)))?;
    let roots: RootCertStore = tls_trust::roots(options.ca.as_deref())?;
    let mut config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsClient { config: Arc::new(config), name })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(url: &str) -> RequestOptions {
        RequestOptions { url: url.to_owned(), method: "GET".to_owned(), ..RequestOptions::default() }
    }

    fn refused(options: &RequestOptions) -> String {
        match LoadTarget::new(options) {
            Ok(target) => panic!("{} is accepted", target.url),
            Err(fault) => fault.to_string(),
        }
    }

    #[test]
    fn nonsense_is_refused_with_its_option() {
        for (url, part) in [
            ("", "a URL is needed"),
            ("127.0.0.1:8080/", "http"),
            ("ftp://127.0.0.1/", "`ftp`"),
            ("http://", "a URL is needed"),
            ("http://127.0.0.1:0/", "port 0"),
            ("http://127.0.0.1:70000/", "a URL is needed"),
            ("http://ann:secret@127.0.0.1/", "user or a password"),
        ] {
            let fault = refused(&options(url));
            assert!(fault.contains(part), "{url}: {fault}");
        }
        for (method, part) in
            [("", "capitals"), ("get", "capitals"), ("GET /", "capitals"), ("CONNECT", "not a request")]
        {
            let fault = refused(&RequestOptions { method: method.to_owned(), ..options("http://127.0.0.1/") });
            assert!(fault.contains(part), "{method}: {fault}");
        }
        for (header, part) in [
            ("no colon", "`Name: value`"),
            (": x", "not a field name"),
            ("a b: x", "not a field name"),
            ("a: b\r\nc: d", "control character"),
            ("Content-Length: 3", "sets this field itself"),
        ] {
            let fault = refused(&RequestOptions { headers: vec![header.to_owned()], ..options("http://127.0.0.1/") });
            assert!(fault.contains(part), "{header}: {fault}");
        }
    }

    #[test]
    fn request_has_the_path_the_fields_and_the_length_of_the_body() {
        let given = RequestOptions {
            method: "POST".to_owned(),
            headers: vec!["x-a:  1 ".to_owned(), "Host: shop.example".to_owned()],
            body: "abc".to_owned(),
            ..options("http://127.0.0.1:81/a%20b?c=d#e")
        };
        let target = LoadTarget::new(&given).expect("a request");
        let text = String::from_utf8(target.requests[0].clone()).expect("text");
        assert_eq!(text, "POST /a%20b?c=d HTTP/1.1\r\nx-a: 1\r\nHost: shop.example\r\nContent-Length: 3\r\n\r\nabc");
        assert_eq!(target.addresses.select(7), Some(SocketAddr::from(([127, 0, 0, 1], 81))));
        let six = LoadTarget::new(&options("http://[::1]/")).expect("a request");
        assert!(six.addresses.select(0).is_some_and(|address| address.is_ipv6()));
        assert!(six.requests[0].starts_with(b"GET / HTTP/1.1\r\nHost: [::1]\r\n"));
    }
}
