//! The admin address: liveness, readiness, metrics, the status API and the dashboard.
//!
//! `/live`, `/ready`, `/metrics` and the page itself are open to whoever reaches the address. `/api` asks for the token;
//! without one it answers only programs on this machine, and no page that a browser on this machine has open.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::http::fields::Known;
use crate::http::limits::Limits;
use crate::http::message::{Method, Request, StatusCode};
use crate::limit::{BadInquiry, Inquiry, Told};
use crate::metrics;
use crate::plain::{self, Bounds, Reply};
use crate::purge::{BadOrder, Order, Outcome};

/// The admin listener (`[admin]`).
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Address and port of the admin listener.
    pub address: SocketAddr,
    /// What `/api` asks for as a bearer token; without one, `/api` answers on a loopback address only.
    pub token: Option<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { address: SocketAddr::from((Ipv4Addr::LOCALHOST, 9900)), token: None }
    }
}

/// Whether traffic should be sent here.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Readiness {
    /// False while starting and while draining.
    pub ready: bool,
    pub draining: bool,
    /// What works less well than it should: names of breakers, shards. They do not make the gateway unready.
    pub degraded: Vec<String>,
}

/// What the address shows; called for each request that asks for it, so neither may block.
pub struct Views {
    pub ready: Box<dyn Fn() -> Readiness>,
    /// An object with `version`, `node`, `uptime_seconds`, `connections`, `requests_in_flight`, and `routes`: a list of
    /// objects with `name` and `breaker`. The dashboard reads these; more is free.
    pub status: Box<dyn Fn() -> serde_json::Value>,
    /// What is asked for most.
    pub hot: Box<dyn Fn() -> serde_json::Value>,
    /// What limits do, and how they treat a caller; changes end within seconds.
    pub limits: Box<dyn Fn(Inquiry) -> LocalFuture<Result<Told, BadInquiry>>>,
    /// Follows an order to purge; ends within seconds.
    pub purge: Box<dyn Fn(Order) -> LocalFuture<Result<Outcome, BadOrder>>>,
}

/// What runs on the thread that began it.
pub type LocalFuture<T> = Pin<Box<dyn Future<Output = T>>>;

/// Probes, a scraper or two, and a few people; each is one connection.
const CONNECTIONS_MAX: usize = 64;
/// Silence after which a connection is closed: longer than the usual interval of probes.
const IDLE: Duration = Duration::from_secs(30);
/// A head arrives in this time, or its connection no longer takes one of the few places.
const HEAD: Duration = Duration::from_secs(5);

const PAGE: &str = include_str!("admin.html");
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const JSON: &str = "application/json";
/// The page loads nothing, and nobody may frame it.
const PAGE_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
                           connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Serves the admin address until `stop` turns true or its sender is gone: the server stops it last, so that `/ready`
/// tells of the drain. Settings may be swapped meanwhile, except for the address. Needs a `LocalSet`. Cancel safe.
pub async fn serve(listener: TcpListener, settings: Arc<ArcSwap<Settings>>, views: Views, stop: watch::Receiver<bool>) {
    let http = Limits { body_bytes: 64 << 10, header_timeout: HEAD, idle_timeout: IDLE, ..Limits::default() };
    let bounds = Bounds { http, connections: CONNECTIONS_MAX };
    plain::serve(listener, bounds, stop, async move |request: &Request, peer: IpAddr| {
        let token = settings.load();
        answer(&views, token.token.as_deref(), request, peer)
            .await
            .with(Known::CacheControl, "no-store")
            .with_named("x-content-type-options", "nosniff")
    })
    .await;
}

async fn answer(views: &Views, token: Option<&str>, request: &Request, peer: IpAddr) -> Reply {
    let path = request.path();
    let is_api = path == "/api" || path.starts_with("/api/");
    if is_api && let Err(refused) = authorize(token, request, peer) {
        return refused;
    }
    if path == "/api/v1/purge" {
        return match request.method {
            Method::POST => purge(views, request.query().unwrap_or_default()).await,
            _ => Reply::text(StatusCode::METHOD_NOT_ALLOWED, "send POST").with(Known::Allow, "POST"),
        };
    }
    if let Some(rest) = path.strip_prefix("/api/v1/limits") {
        return limits(views, &request.method, rest, request.query().unwrap_or_default()).await;
    }
    let view: fn(&Views) -> Reply = match path {
        "/" => |_| {
            Reply::new(StatusCode::OK, "text/html; charset=utf-8", PAGE)
                .with_named("content-security-policy", PAGE_POLICY)
        },
        "/live" => |_| Reply::text(StatusCode::OK, "live"),
        "/ready" => |views| ready(&(views.ready)()),
        "/metrics" => |_| Reply::new(StatusCode::OK, OPENMETRICS, metrics::exposition()),
        "/api/v1/hot" => |views| Reply::new(StatusCode::OK, JSON, (views.hot)().to_string()),
        "/api/v1/status" => |views| Reply::new(StatusCode::OK, JSON, (views.status)().to_string()),
        _ => return Reply::text(StatusCode::NOT_FOUND, "not found"),
    };
    match request.method {
        Method::GET | Method::HEAD => view(views),
        _ => Reply::text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed").with(Known::Allow, "GET, HEAD"),
    }
}

/// `GET /api/v1/limits` and `/api/v1/limits/explain?...`; `POST` and `DELETE /api/v1/limits/RULE` for trials.
async fn limits(views: &Views, method: &Method, rest: &str, query: &str) -> Reply {
    let is_read = matches!(*method, Method::GET | Method::HEAD);
    let inquiry = match (rest, method) {
        ("", _) if is_read => Ok(Inquiry::List),
        ("/explain", _) if is_read => Inquiry::explain(query),
        ("" | "/explain", _) => {
            return Reply::text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed").with(Known::Allow, "GET, HEAD");
        }
        (rule, &Method::POST) if rule.starts_with('/') => Inquiry::change(&rule[1..], query),
        (rule, &Method::DELETE) if rule.starts_with('/') => Inquiry::end(&rule[1..], query),
        (rule, _) if rule.starts_with('/') => {
            let hint = "send POST with what to try, or DELETE to end a trial";
            return Reply::text(StatusCode::METHOD_NOT_ALLOWED, hint).with(Known::Allow, "POST, DELETE");
        }
        _ => return Reply::text(StatusCode::NOT_FOUND, "not found"),
    };
    let told = match inquiry {
        Ok(inquiry) => (views.limits)(inquiry).await,
        Err(bad) => Err(bad),
    };
    match told {
        Ok(Told { value, is_complete }) => {
            // As with a purge: what is not complete goes on by itself.
            let status = if is_complete { StatusCode::OK } else { StatusCode::ACCEPTED };
            Reply::new(status, JSON, value.to_string())
        }
        Err(bad @ BadInquiry::NoRoom(_)) => Reply::text(StatusCode::SERVICE_UNAVAILABLE, &bad.to_string()),
        Err(bad @ BadInquiry::NoRule(_)) => Reply::text(StatusCode::NOT_FOUND, &bad.to_string()),
        Err(bad) => Reply::text(StatusCode::BAD_REQUEST, &bad.to_string()),
    }
}

async fn purge(views: &Views, query: &str) -> Reply {
    let done = async {
        let order = Order::parse(query)?;
        let outcome = (views.purge)(order.clone()).await?;
        Ok::<_, BadOrder>((order, outcome))
    };
    match done.await {
        Ok((order, outcome)) => {
            // What is not complete goes on by itself.
            let status = if outcome.is_complete() { StatusCode::OK } else { StatusCode::ACCEPTED };
            Reply::new(status, JSON, outcome.to_json(&order).to_string())
        }
        Err(BadOrder::TooMany(many)) => Reply::text(StatusCode::SERVICE_UNAVAILABLE, &many.to_string()),
        Err(bad) => Reply::text(StatusCode::BAD_REQUEST, &bad.to_string()),
    }
}

fn ready(readiness: &Readiness) -> Reply {
    let Readiness { ready, draining, degraded } = readiness;
    let status = if *ready && !*draining { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = serde_json::json!({ "ready": ready, "draining": draining, "degraded": degraded });
    Reply::new(status, JSON, body.to_string())
}

/// The token where there is one; else a program on this machine that came here directly.
fn authorize(token: Option<&str>, request: &Request, peer: IpAddr) -> Result<(), Reply> {
    if let Some(token) = token {
        return if bears(token, request) {
            Ok(())
        } else {
            Err(Reply::text(StatusCode::UNAUTHORIZED, "a token is needed").with_named("www-authenticate", "Bearer"))
        };
    }
    if !peer.is_loopback() {
        return Err(Reply::text(StatusCode::FORBIDDEN, "without admin.token, this answers on loopback only"));
    }
    if !is_direct(request) {
        return Err(Reply::text(StatusCode::FORBIDDEN, "without admin.token, this answers direct requests only"));
    }
    Ok(())
}

/// Whether the request carries `token` as its one bearer token (RFC 6750 section 2.1).
fn bears(token: &str, request: &Request) -> bool {
    let mut values = request.fields.all(Known::Authorization);
    let (Some(value), None) = (values.next(), values.next()) else { return false };
    let (scheme, given) = value.split_at(value.len().min(7));
    scheme.eq_ignore_ascii_case(b"Bearer ") && is_same(given.trim_ascii(), token.as_bytes())
}

/// Compares in a time that depends on the lengths alone.
fn is_same(left: &[u8], right: &[u8]) -> bool {
    let differing = left.iter().zip(right).fold(0, |sum, (left, right)| std::hint::black_box(sum | (left ^ right)));
    left.len() == right.len() && differing == 0
}

/// A name that resolves to loopback can be anybody's (DNS rebinding), a page of any site can send requests to loopback, and a
/// proxy on this machine speaks for others: the host must be a loopback one, the sender no foreign page, and no proxy between.
fn is_direct(request: &Request) -> bool {
    let host = request.host();
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    let is_local = address.map_or(host == "localhost" || host.ends_with(".localhost"), |address| address.is_loopback());
    let is_proxied = request.fields.has(Known::Forwarded) || request.fields.has(Known::XForwardedFor);
    let mut sites = request.fields.named(b"sec-fetch-site");
    is_local && !is_proxied && sites.all(|site| site == b"same-origin" || site == b"none")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::rc::Rc;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;
    use tokio::task::LocalSet;

    const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    fn views(ready: bool) -> Views {
        Views {
            ready: Box::new(move || Readiness { ready, draining: false, degraded: vec!["orders".to_owned()] }),
            status: Box::new(|| serde_json::json!({ "node": "n1" })),
            hot: Box::new(|| serde_json::json!({ "keys": [] })),
            limits: Box::new(|inquiry| {
                let told = match inquiry {
                    Inquiry::Change { rule, .. } if rule != "device" => Err(BadInquiry::NoRule(rule)),
                    inquiry => {
                        Ok(Told { value: serde_json::json!({ "asked": format!("{inquiry:?}") }), is_complete: true })
                    }
                };
                Box::pin(async { told })
            }),
            purge: Box::new(|order| {
                let missing = if order.is_soft { vec!["n2".to_owned()] } else { Vec::new() };
                Box::pin(async { Ok(Outcome { missing, ..Outcome::default() }) })
            }),
        }
    }

    fn request(path: &str, fields: &[(&str, &str)]) -> Request {
        let mut request = Request { authority: "localhost:9900".to_owned(), ..Request::default() };
        request.set_target(path);
        for (name, value) in fields {
            request.fields.push(name.as_bytes(), value.as_bytes());
        }
        request
    }

    fn status(token: Option<&str>, request: &Request, peer: IpAddr) -> u16 {
        let runtime = tokio::runtime::LocalRuntime::new().expect("a runtime");
        runtime.block_on(answer(&views(true), token, request, peer)).status().as_u16()
    }

    #[test]
    fn the_api_wants_its_token() {
        let with = |value| request("/api/v1/status", &[("authorization", value)]);
        for value in
            ["", "Bearer", "Bearer ", "Bearer secre", "Bearer secrets", "Bearer Secret", "Basic secret", "secret"]
        {
            assert_eq!(status(Some("secret"), &with(value), LOOPBACK), 401, "{value:?}");
        }
        let twice = request("/api/v1/status", &[("authorization", "Bearer secret"), ("authorization", "Bearer x")]);
        assert_eq!(status(Some("secret"), &twice, LOOPBACK), 401);
        assert_eq!(status(Some("secret"), &request("/api/nothing", &[]), LOOPBACK), 401);
        assert_eq!(status(Some("secret"), &with("bearer secret"), "192.0.2.1".parse().expect("an address")), 200);
        assert_eq!(status(Some("secret"), &request("/metrics", &[]), LOOPBACK), 200);
    }

    #[test]
    fn without_a_token_only_this_machine_is_answered() {
        let plain = request("/api/v1/status", &[]);
        assert_eq!(status(None, &plain, LOOPBACK), 200);
        assert_eq!(status(None, &plain, "::1".parse().expect("an address")), 200);
        assert_eq!(status(None, &plain, "192.0.2.1".parse().expect("an address")), 403);
        for host in ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "192.0.2.1", ""] {
            let rebound = Request { authority: host.to_owned(), ..plain.clone() };
            assert_eq!(status(None, &rebound, LOOPBACK), 403, "{host}");
        }
        for host in ["127.0.0.1:9900", "[::1]:9900", "gate.localhost", "127.1.2.3"] {
            let direct = Request { authority: host.to_owned(), ..plain.clone() };
            assert_eq!(status(None, &direct, LOOPBACK), 200, "{host}");
        }
        for (name, value) in
            [("sec-fetch-site", "cross-site"), ("sec-fetch-site", "same-site"), ("x-forwarded-for", "192.0.2.1")]
        {
            assert_eq!(status(None, &request("/api/v1/status", &[(name, value)]), LOOPBACK), 403, "{name}");
        }
        assert_eq!(status(None, &request("/api/v1/status", &[("sec-fetch-site", "same-origin")]), LOOPBACK), 200);
    }

    #[test]
    fn unknown_paths_and_methods_are_told_apart() {
        assert_eq!(status(None, &request("/nothing", &[]), LOOPBACK), 404);
        assert_eq!(status(None, &request("/api/nothing", &[]), LOOPBACK), 404);
        let post = Request { method: Method::POST, ..request("/ready", &[]) };
        assert_eq!(status(None, &post, LOOPBACK), 405);
        let head = Request { method: Method::HEAD, ..request("/live?x", &[]) };
        assert_eq!(status(None, &head, LOOPBACK), 200);
    }

    #[test]
    fn purging_wants_a_post_and_says_what() {
        let post = |target: &str| Request { method: Method::POST, ..request(target, &[]) };
        assert_eq!(status(None, &request("/api/v1/purge?all=true", &[]), LOOPBACK), 405);
        assert_eq!(status(None, &post("/api/v1/purge"), LOOPBACK), 400);
        assert_eq!(status(None, &post("/api/v1/purge?tag=a"), LOOPBACK), 200);
        assert_eq!(status(None, &post("/api/v1/purge?tag=a&soft=true"), LOOPBACK), 202);
        assert_eq!(status(Some("secret"), &post("/api/v1/purge?tag=a"), LOOPBACK), 401);
    }

    /// Sends `head` on a connection of its own and reads until the server closes it.
    async fn ask(address: SocketAddr, head: &str) -> String {
        let mut stream = TcpStream::connect(address).await.expect("listening");
        stream.write_all(head.as_bytes()).await.expect("open");
        let mut text = String::new();
        stream.read_to_string(&mut text).await.expect("answered");
        text
    }

    #[tokio::test]
    async fn the_address_answers_over_a_socket() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let settings = Arc::new(ArcSwap::from_pointee(Settings::default()));
        let ready = Rc::new(Cell::new(false));
        let (seen, token) = (Rc::clone(&ready), Arc::clone(&settings));
        let views =
            Views { ready: Box::new(move || Readiness { ready: seen.get(), ..Readiness::default() }), ..views(true) };
        let (stop, stopped) = watch::channel(false);
        let talk = async {
            let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
            let live = ask(address, &get("/live")).await;
            assert!(live.starts_with("HTTP/1.1 200 OK\r\n") && live.ends_with("\r\n\r\nlive\n"), "{live}");
            let text = ask(address, &get("/ready")).await;
            assert!(
                text.starts_with("HTTP/1.1 503 ")
                    && text.contains("{\"degraded\":[],\"draining\":false,\"ready\":false}"),
                "{text}"
            );
            ready.set(true);
            assert!(ask(address, &get("/ready")).await.starts_with("HTTP/1.1 200 "));
            let text = ask(address, &get("/metrics")).await;
            assert!(text.contains(OPENMETRICS) && text.ends_with("# EOF\n"), "{text}");
            let text = ask(address, &get("/")).await;
            assert!(text.contains("frame-ancestors 'none'") && text.ends_with("</html>\n"), "{text}");
            assert!(ask(address, &get("/api/v1/status")).await.ends_with("{\"node\":\"n1\"}"));
            token.store(Arc::new(Settings { token: Some("t".to_owned()), ..Settings::default() }));
            assert!(ask(address, &get("/api/v1/status")).await.contains("\r\nwww-authenticate: Bearer\r\n"));
            assert!(ask(address, "GET / HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 400 "));
            stop.send_replace(true);
        };
        LocalSet::new().run_until(async { tokio::join!(serve(listener, settings, views, stopped), talk) }).await;
    }
}
