//! The admin listener: liveness, readiness, metrics, the admin API and the dashboard.
//!
//! `/live`, `/ready`, `/metrics` and the files of the dashboard need no authentication. `/api`
//! requires the token. Without a configured token, `/api` accepts only direct requests of programs
//! on this machine, and none from foreign web pages (see `access`). Silent, slow and idle
//! connections keep no other client out (see `simple_server`).

mod config;
mod token_throttle;
mod access;
mod assets;
mod live;

pub(crate) use config::AdminConfig;
pub(crate) use live::LiveSources;

use std::borrow::Cow;
use std::collections::HashSet;
use std::net::IpAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::breaker::{BreakerQuery, BreakerQueryError};
use crate::event::tail;
use crate::http::fields::{Fields, KnownField};
use crate::http::limits::HttpLimits;
use crate::http::message::{Method, Request, StatusCode};
use crate::limit::{AdminQuery, AdminQueryError, AdminReply};
use crate::metrics::{self, ExpositionFormat};
use crate::purge::{PurgeOrder, PurgeOrderError, PurgeOutcome};
use crate::simple_server::{self, SimpleResponse, SimpleServerLimits, SimpleServerStage};
use crate::tasks::TaskList;
use access::AdminAccess;
use live::LiveStreams;

/// The content of `/ready`: whether the gateway accepts traffic, whether it drains, and which
/// breakers and shards are degraded.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ReadinessReport {
    /// False during startup and drain.
    pub(crate) ready: bool,
    pub(crate) draining: bool,
    /// Names of degraded breakers and shards, and a refused reload. They do not make the gateway
    /// unready.
    pub(crate) degraded: Vec<String>,
}

/// Callbacks that produce the responses. Each is called per request and must not block.
pub(crate) struct AdminViews {
    pub(crate) ready: Box<dyn Fn() -> ReadinessReport>,
    /// The content of the dashboard.
    pub(crate) live: Rc<LiveSources>,
    /// Returns the state of the process.
    pub(crate) status: Box<dyn Fn() -> serde_json::Value>,
    /// Returns the hot keys.
    pub(crate) hot: Box<dyn Fn() -> serde_json::Value>,
    /// Runs a query about limits. An override completes within seconds.
    pub(crate) limits: Box<dyn Fn(AdminQuery) -> LocalFuture<Result<AdminReply, AdminQueryError>>>,
    /// Runs a query about breakers. A change completes within seconds.
    pub(crate) breakers: Box<dyn Fn(BreakerQuery) -> LocalFuture<BreakerReply>>,
    /// Executes a purge order; completes within seconds.
    pub(crate) purge: Box<dyn Fn(PurgeOrder) -> LocalFuture<Result<PurgeOutcome, PurgeOrderError>>>,
}

/// The answer to a query about breakers.
pub(crate) type BreakerReply = Result<AdminReply, BreakerQueryError>;

/// A future that runs on the thread that created it.
pub(crate) type LocalFuture<T> = Pin<Box<dyn Future<Output = T>>>;

/// Enough for probes, one or two scrapers and a few people, with one connection each.
pub(crate) const CONNECTIONS_MAX: usize = 64;
/// Further connections for `/live` and `/ready`, while all others are being answered. A probe takes
/// microseconds.
pub(crate) const PROBE_CONNECTIONS_MAX: usize = 16;
/// Idle timeout of a connection: longer than the usual interval of probes.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Timeout for a request head and for the silence before it, so that slow clients do not occupy the
/// few connections.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

const JSON: &str = "application/json";
const EVENT_STREAM: &str = "text/event-stream; charset=utf-8";

/// Serves the admin API until the stage is `Stopped` or its sender is dropped. The server stops it
/// last, so that `/ready` reports the drain. The configuration may be replaced meanwhile, except
/// for the address. Needs a `LocalSet`. Cancel safe.
pub(crate) async fn serve(
    listener: &TcpListener,
    config: Arc<ArcSwap<AdminConfig>>,
    views: Rc<AdminViews>,
    stage: watch::Receiver<SimpleServerStage>,
) {
    let http = HttpLimits {
        body_bytes: 64 << 10,
        header_timeout: HEAD_TIMEOUT,
        idle_timeout: IDLE_TIMEOUT,
        ..HttpLimits::default()
    };
    let limits = SimpleServerLimits {
        http,
        connections: CONNECTIONS_MAX,
        probe_connections: PROBE_CONNECTIONS_MAX,
        is_probe: |request| matches!(request.path(), "/live" | "/ready"),
    };
    let (access, streams) = (AdminAccess::default(), LiveStreams::default());
    let state = AdminState { views, config, access, streams, stage: stage.clone() };
    simple_server::serve(listener, limits, stage, async move |request: &Request, peer: IpAddr| {
        respond(&state, request, peer)
            .await
            .with(KnownField::CacheControl, "no-store")
            .with_named("x-content-type-options", "nosniff")
    })
    .await;
}

/// State of the responses: the views, the configuration, and the senders of wrong tokens.
struct AdminState {
    views: Rc<AdminViews>,
    config: Arc<ArcSwap<AdminConfig>>,
    access: AdminAccess,
    streams: LiveStreams,
    stage: watch::Receiver<SimpleServerStage>,
}

async fn respond(state: &AdminState, request: &Request, peer: IpAddr) -> SimpleResponse {
    let (path, views) = (request.path(), &*state.views);
    let is_read = matches!(request.method, Method::GET | Method::HEAD);
    if !is_read && *state.stage.borrow() >= SimpleServerStage::HandedOver {
        let hint = "another process has taken over; send the request again over a new connection";
        return SimpleResponse::text(StatusCode::SERVICE_UNAVAILABLE, hint).with(KnownField::RetryAfter, "0");
    }
    // Loaded once: a reload during the wait for a check does not change what the check compares.
    let config = state.config.load_full();
    let permitted = match path {
        "/live" | "/ready" => Ok(()),
        _ if path == "/api" || path.starts_with("/api/") => state.access.check_api(&config, request, peer).await,
        _ => access::check_page(&config, request).map_err(access::reject),
    };
    if let Err(rejection) = permitted {
        return rejection;
    }
    if let Some(name) = repeated_parameter(request.query().unwrap_or_default())
        && path.starts_with("/api/")
    {
        return SimpleResponse::text(StatusCode::BAD_REQUEST, &format!("the parameter `{name}` is given twice"));
    }
    if path == "/api/v1/purge" {
        return match request.method {
            Method::POST => purge(views, request.query().unwrap_or_default()).await,
            _ => SimpleResponse::text(StatusCode::METHOD_NOT_ALLOWED, "send POST").with(KnownField::Allow, "POST"),
        };
    }
    if let Some(rest) = path.strip_prefix("/api/v1/limits") {
        return limits(views, &request.method, rest, request.query().unwrap_or_default()).await;
    }
    if let Some(rest) = path.strip_prefix("/api/v1/breakers") {
        return breakers(views, &request.method, rest, request.query().unwrap_or_default()).await;
    }
    if let Some(file) = assets::file(path) {
        return if is_read { file } else { read_only() };
    }
    if path == "/metrics" {
        return if is_read { exposition(&request.fields) } else { read_only() };
    }
    let view: fn(&AdminState) -> SimpleResponse = match path {
        "/live" => |_| SimpleResponse::text(StatusCode::OK, "live"),
        "/ready" => |state| ready(&(state.views.ready)()),
        "/api/v1/hot" => |state| SimpleResponse::new(StatusCode::OK, JSON, (state.views.hot)().to_string()),
        "/api/v1/tasks" => |_| SimpleResponse::new(StatusCode::OK, JSON, TaskList::read().to_json().to_string()),
        "/api/v1/dashboard" => dashboard,
        "/api/v1/stream" => stream,
        "/api/v1/status" => |state| SimpleResponse::new(StatusCode::OK, JSON, (state.views.status)().to_string()),
        _ => return SimpleResponse::text(StatusCode::NOT_FOUND, "not found"),
    };
    if is_read { view(state) } else { read_only() }
}

/// Parameters of which a query may have several: targets of a purge, and the keys of a caller.
const REPEATABLE: [&str; 3] = ["url", "tag", "key"];

/// A parameter that a query has twice: one of its values would be ignored.
fn repeated_parameter(query: &str) -> Option<String> {
    let mut seen = HashSet::new();
    // `tier`: the former name.
    let current = |name: Cow<'_, str>| if name == "tier" { "user_class".to_owned() } else { name.into_owned() };
    let names = url::form_urlencoded::parse(query.as_bytes()).map(|(name, _)| current(name));
    names.filter(|name| !REPEATABLE.contains(&&**name)).find(|name| !seen.insert(name.clone()))
}

fn read_only() -> SimpleResponse {
    SimpleResponse::text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed").with(KnownField::Allow, "GET, HEAD")
}

/// `GET /api/v1/dashboard`: what the stream sends, at once.
fn dashboard(state: &AdminState) -> SimpleResponse {
    let live = &state.views.live;
    let (history, log) = (serde_json::json!((live.history)(0).0), serde_json::json!(tail::since(0).0));
    let text = format!("{{\"state\":{},\"history\":{history},\"log\":{log}}}", (live.state)());
    SimpleResponse::new(StatusCode::OK, JSON, text)
}

/// `GET /api/v1/stream`: server-sent events `state`, `history` and `log`.
fn stream(state: &AdminState) -> SimpleResponse {
    match state.streams.open(Rc::clone(&state.views.live), Arc::clone(&state.config)) {
        Some(stream) => SimpleResponse::stream(EVENT_STREAM, Box::new(stream)),
        None => SimpleResponse::text(StatusCode::SERVICE_UNAVAILABLE, "too many dashboards are open; try again later")
            .with(KnownField::RetryAfter, "5"),
    }
}

/// The metrics, in the format that the client prefers.
fn exposition(request: &Fields) -> SimpleResponse {
    let format = ExpositionFormat::preferred(request.members(KnownField::Accept));
    SimpleResponse::new(StatusCode::OK, format.content_type(), metrics::exposition(format))
        .with(KnownField::Vary, "Accept")
}

/// `GET /api/v1/limits` and `/api/v1/limits/explain?...`; `POST` and `DELETE /api/v1/limits/RULE`
/// for overrides.
async fn limits(views: &AdminViews, method: &Method, rest: &str, query: &str) -> SimpleResponse {
    let is_read = matches!(*method, Method::GET | Method::HEAD);
    let query = match (rest, method) {
        ("", _) if is_read => Ok(AdminQuery::List),
        ("/explain", _) if is_read => AdminQuery::explain(query),
        ("" | "/explain", _) => {
            return SimpleResponse::text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed")
                .with(KnownField::Allow, "GET, HEAD");
        }
        (rule, &Method::POST) if rule.starts_with('/') => AdminQuery::set_override(&rule[1..], query),
        (rule, &Method::DELETE) if rule.starts_with('/') => AdminQuery::clear_override(&rule[1..], query),
        (rule, _) if rule.starts_with('/') => {
            let hint = "send POST to set an override, or DELETE to clear it";
            return SimpleResponse::text(StatusCode::METHOD_NOT_ALLOWED, hint).with(KnownField::Allow, "POST, DELETE");
        }
        _ => return SimpleResponse::text(StatusCode::NOT_FOUND, "not found"),
    };
    let reply = match query {
        Ok(query) => (views.limits)(query).await,
        Err(error) => Err(error),
    };
    match reply {
        Ok(reply) => overridden(&reply),
        Err(error @ AdminQueryError::RegistryFull(_)) => {
            SimpleResponse::text(StatusCode::SERVICE_UNAVAILABLE, &error.to_string())
        }
        Err(error @ AdminQueryError::UnknownRule(_)) => SimpleResponse::text(StatusCode::NOT_FOUND, &error.to_string()),
        Err(error) => SimpleResponse::text(StatusCode::BAD_REQUEST, &error.to_string()),
    }
}

/// As with a purge, an incomplete override is completed in the background.
fn overridden(reply: &AdminReply) -> SimpleResponse {
    let status = if reply.is_complete { StatusCode::OK } else { StatusCode::ACCEPTED };
    SimpleResponse::new(status, JSON, reply.value.to_string())
}

/// `GET /api/v1/breakers?from=N`; `POST` and `DELETE /api/v1/breakers/route/NAME` and
/// `/api/v1/breakers/upstream/NAME` for states that an operator sets.
async fn breakers(views: &AdminViews, method: &Method, rest: &str, query: &str) -> SimpleResponse {
    let not_allowed =
        |hint, allow| SimpleResponse::text(StatusCode::METHOD_NOT_ALLOWED, hint).with(KnownField::Allow, allow);
    let query = match (rest.strip_prefix('/'), method) {
        (None, _) if !rest.is_empty() => return SimpleResponse::text(StatusCode::NOT_FOUND, "not found"),
        (None, &Method::GET | &Method::HEAD) => BreakerQuery::list(query),
        (None, _) => return not_allowed("method not allowed", "GET, HEAD"),
        (Some(path), &Method::POST) => BreakerQuery::set(path, query),
        (Some(path), &Method::DELETE) => BreakerQuery::clear(path, query),
        (Some(_), _) => return not_allowed("send POST to set a state, or DELETE to end it", "POST, DELETE"),
    };
    let reply = match query {
        Ok(query) => (views.breakers)(query).await,
        Err(error) => Err(error),
    };
    match reply {
        Ok(reply) => overridden(&reply),
        Err(error @ BreakerQueryError::RegistryFull(_)) => {
            SimpleResponse::text(StatusCode::SERVICE_UNAVAILABLE, &error.to_string())
        }
        Err(
            error @ (BreakerQueryError::UnknownRoute(_)
            | BreakerQueryError::UnknownUpstream(_)
            | BreakerQueryError::SharedBreaker { .. }
            | BreakerQueryError::NoState(_)
            | BreakerQueryError::InvalidPath),
        ) => SimpleResponse::text(StatusCode::NOT_FOUND, &error.to_string()),
        Err(error) => SimpleResponse::text(StatusCode::BAD_REQUEST, &error.to_string()),
    }
}

/// Registers the metrics of the admin listener.
pub(crate) fn expose() {
    access::expose();
    simple_server::expose();
}

async fn purge(views: &AdminViews, query: &str) -> SimpleResponse {
    let result = async {
        let order = PurgeOrder::parse(query)?;
        let outcome = (views.purge)(order.clone()).await?;
        Ok::<_, PurgeOrderError>((order, outcome))
    };
    match result.await {
        Ok((order, outcome)) => {
            // An incomplete purge is completed in the background.
            let status = if outcome.is_complete() { StatusCode::OK } else { StatusCode::ACCEPTED };
            SimpleResponse::new(status, JSON, outcome.to_json(&order).to_string())
        }
        Err(PurgeOrderError::OutboxFull(full)) => {
            SimpleResponse::text(StatusCode::SERVICE_UNAVAILABLE, &full.to_string())
        }
        Err(error) => SimpleResponse::text(StatusCode::BAD_REQUEST, &error.to_string()),
    }
}

fn ready(readiness: &ReadinessReport) -> SimpleResponse {
    let ReadinessReport { ready, draining, degraded } = readiness;
    let status = if *ready && !*draining { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = serde_json::json!({ "ready": ready, "draining": draining, "degraded": degraded });
    SimpleResponse::new(status, JSON, body.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::breaker::BreakerTarget;
    use std::cell::Cell;
    use std::net::{Ipv4Addr, SocketAddr};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;
    use tokio::task::LocalSet;

    const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    fn views(ready: bool) -> AdminViews {
        AdminViews {
            ready: Box::new(move || ReadinessReport { ready, draining: false, degraded: vec!["orders".to_owned()] }),
            live: Rc::new(LiveSources {
                state: Box::new(|| "{\"node\":\"n1\"}".into()),
                history: Box::new(|from| (vec![serde_json::json!({ "from": from })], 1)),
            }),
            status: Box::new(|| serde_json::json!({ "node": "n1" })),
            hot: Box::new(|| serde_json::json!({ "keys": [] })),
            limits: Box::new(|query| {
                let reply = match query {
                    AdminQuery::Override { rule, .. } if rule != "device" => Err(AdminQueryError::UnknownRule(rule)),
                    query => Ok(AdminReply {
                        value: serde_json::json!({ "query": format!("{query:?}") }),
                        is_complete: true,
                    }),
                };
                Box::pin(async { reply })
            }),
            breakers: Box::new(|query| {
                let reply = match query {
                    BreakerQuery::Set { target: BreakerTarget::Route(name), .. } if name != "orders" => {
                        Err(BreakerQueryError::UnknownRoute(name))
                    }
                    BreakerQuery::Set { node, .. } => {
                        let value = serde_json::json!({ "node": node });
                        Ok(AdminReply { value, is_complete: node.as_deref() != Some("n2") })
                    }
                    query => {
                        let value = serde_json::json!({ "query": format!("{query:?}") });
                        Ok(AdminReply { value, is_complete: true })
                    }
                };
                Box::pin(async { reply })
            }),
            purge: Box::new(|order| {
                let unacknowledged_nodes = if order.is_soft { vec!["n2".to_owned()] } else { Vec::new() };
                Box::pin(async { Ok(PurgeOutcome { unacknowledged_nodes, ..PurgeOutcome::default() }) })
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
        let config = AdminConfig { token: token.map(str::to_owned), ..AdminConfig::default() };
        let state = AdminState {
            views: Rc::new(views(true)),
            config: Arc::new(ArcSwap::from_pointee(config)),
            access: AdminAccess::default(),
            streams: LiveStreams::default(),
            stage: watch::channel(SimpleServerStage::Serving).1,
        };
        runtime.block_on(respond(&state, request, peer)).status().as_u16()
    }

    #[test]
    fn api_requires_token() {
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
    fn without_token_only_direct_local_requests_are_accepted() {
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
    fn unknown_paths_are_404_and_wrong_methods_405() {
        assert_eq!(status(None, &request("/nothing", &[]), LOOPBACK), 404);
        assert_eq!(status(None, &request("/api/nothing", &[]), LOOPBACK), 404);
        let post = Request { method: Method::POST, ..request("/ready", &[]) };
        assert_eq!(status(None, &post, LOOPBACK), 405);
        let head = Request { method: Method::HEAD, ..request("/live?x", &[]) };
        assert_eq!(status(None, &head, LOOPBACK), 200);
    }

    #[test]
    fn a_parameter_that_is_given_twice_is_refused() {
        let send = |method: Method, target: &str| status(None, &Request { method, ..request(target, &[]) }, LOOPBACK);
        for (method, target, name) in [
            (Method::POST, "/api/v1/purge?tag=a&soft=true&soft=false", "soft"),
            (Method::POST, "/api/v1/purge?tag=a&node=n1&node=n2", "node"),
            (Method::POST, "/api/v1/breakers/route/a?state=open&state=closed&for=1m", "state"),
            (Method::POST, "/api/v1/breakers/route/a?state=open&for=1m&%66or=8d", "for"),
            (Method::POST, "/api/v1/limits/a?mode=off&for=1m&mode=enforce", "mode"),
            (Method::GET, "/api/v1/limits/explain?ip=::1&ip=::2", "ip"),
            (Method::GET, "/api/v1/limits/explain?ip=::1&user_class=a&tier=b", "user_class"),
            (Method::GET, "/api/v1/breakers?from=0&from=1", "from"),
        ] {
            let query = target.split_once('?').expect("a query").1;
            assert_eq!(repeated_parameter(query).as_deref(), Some(name), "{target}");
            assert_eq!(send(method, target), 400, "{target}");
        }
        assert_eq!(send(Method::POST, "/api/v1/purge?tag=a&tag=b&url=http://a/"), 200);
        assert_eq!(repeated_parameter("ip=::1&key=a:b&key=c:d&ip6=1"), None);
    }

    #[test]
    fn purge_requires_post_and_reports_incomplete_as_202() {
        let post = |target: &str| Request { method: Method::POST, ..request(target, &[]) };
        assert_eq!(status(None, &request("/api/v1/purge?all=true", &[]), LOOPBACK), 405);
        assert_eq!(status(None, &post("/api/v1/purge"), LOOPBACK), 400);
        assert_eq!(status(None, &post("/api/v1/purge?tag=a"), LOOPBACK), 200);
        assert_eq!(status(None, &post("/api/v1/purge?tag=a&soft=true"), LOOPBACK), 202);
        assert_eq!(status(Some("secret"), &post("/api/v1/purge?tag=a"), LOOPBACK), 401);
    }

    /// Sends `head` on a connection of its own and reads until the server closes it.
    async fn exchange(address: SocketAddr, head: &str) -> String {
        let mut stream = TcpStream::connect(address).await.expect("listening");
        stream.write_all(head.as_bytes()).await.expect("open");
        let mut text = String::new();
        stream.read_to_string(&mut text).await.expect("a response");
        text
    }

    #[tokio::test]
    async fn serves_all_endpoints_over_a_socket() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let config = Arc::new(ArcSwap::from_pointee(AdminConfig::default()));
        let ready = Rc::new(Cell::new(false));
        let (is_ready, shared_config) = (Rc::clone(&ready), Arc::clone(&config));
        let views = AdminViews {
            ready: Box::new(move || ReadinessReport { ready: is_ready.get(), ..ReadinessReport::default() }),
            ..views(true)
        };
        let (stage, followed_stage) = watch::channel(SimpleServerStage::Serving);
        let client = async {
            let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
            let live = exchange(address, &get("/live")).await;
            assert!(live.starts_with("HTTP/1.1 200 OK\r\n") && live.ends_with("\r\n\r\nlive\n"), "{live}");
            let text = exchange(address, &get("/ready")).await;
            assert!(
                text.starts_with("HTTP/1.1 503 ")
                    && text.contains("{\"degraded\":[],\"draining\":false,\"ready\":false}"),
                "{text}"
            );
            ready.set(true);
            assert!(exchange(address, &get("/ready")).await.starts_with("HTTP/1.1 200 "));
            let text = exchange(address, &get("/metrics")).await;
            assert!(text.contains("text/plain; version=0.0.4"), "{text}");
            let text = exchange(address, &get("/")).await;
            assert!(text.contains("frame-ancestors 'none'") && text.ends_with("</html>\n"), "{text}");
            assert!(exchange(address, &get("/api/v1/status")).await.ends_with("{\"node\":\"n1\"}"));
            shared_config.store(Arc::new(AdminConfig { token: Some("t".to_owned()), ..AdminConfig::default() }));
            assert!(exchange(address, &get("/api/v1/status")).await.contains("\r\nwww-authenticate: Bearer\r\n"));
            assert!(exchange(address, "GET / HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 400 "));
            stage.send_replace(SimpleServerStage::Stopped);
        };
        LocalSet::new()
            .run_until(async { tokio::join!(serve(&listener, config, Rc::new(views), followed_stage), client) })
            .await;
    }
}
