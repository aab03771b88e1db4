//! `tidegate demo`: a built-in origin, its gateway configuration, and a list of commands to try.
//!
//! The origin has one switch: `/demo/break` makes `/flaky` fail until `/demo/mend`.

use std::cell::Cell;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::http::fields::KnownField;
use crate::http::limits::HttpLimits;
use crate::http::message::{Method, Request, StatusCode};
use crate::simple_server::{self, SimpleResponse, SimpleServerLimits, SimpleServerStage};

/// Configuration of the demo. The variables `DEMO_LISTEN` and `DEMO_ADMIN` (addresses),
/// `DEMO_ORIGIN` (a URL) and `DEMO_ACCESS_LOG` (`off` or `stdout`) must be set.
pub const CONFIG: &str = include_str!("demo.toml");

/// Response time of `/slow`.
const SLOW_RESPONSE_TIME: Duration = Duration::from_millis(1_500);
/// Enough for one gateway and manual requests.
const CONNECTIONS_MAX: usize = 1_024;

const INDEX: &str = "\
The demo's origin. Through the gateway:
  /fast       cacheable for 30 s; counts the requests at the origin
  /region     cacheable for 60 s; names the requested region
  /slow       responds after 1.5 s
  /limited    limited to one request per second per device, five at once
  /flaky      fails while the origin is broken: POST /demo/break, POST /demo/mend";

/// State of the demo origin, used by one thread: the request count, and whether `/flaky` fails.
#[derive(Default)]
struct DemoOrigin {
    /// Requests that reached the origin.
    requests: Cell<u64>,
    broken: Cell<bool>,
}

/// Serves the origin until the stage is `Stopped` or its sender is dropped. Needs a `LocalSet`.
/// Cancel safe.
pub(crate) async fn origin(listener: TcpListener, stage: watch::Receiver<SimpleServerStage>) {
    let bounds = SimpleServerLimits {
        http: HttpLimits::default(),
        connections: CONNECTIONS_MAX,
        probe_connections: 0,
        is_probe: |_| false,
    };
    let origin = Rc::new(DemoOrigin::default());
    simple_server::serve(&listener, bounds, stage, async move |request: &Request, _: IpAddr| {
        origin.respond(request).await
    })
    .await;
}

/// An origin on its own thread; runs until it is dropped.
pub struct RunningOrigin {
    address: SocketAddr,
    _stage: watch::Sender<SimpleServerStage>,
}

impl RunningOrigin {
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Starts the origin on a free loopback port.
///
/// # Errors
/// No port, no thread or no runtime.
pub fn spawn_origin() -> std::io::Result<RunningOrigin> {
    let socket = std::net::TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0))?;
    socket.set_nonblocking(true)?;
    let address = socket.local_addr()?;
    let (stage, followed_stage) = watch::channel(SimpleServerStage::Serving);
    let serve = move || match runtime_and_listener(socket) {
        Ok((runtime, listener)) => runtime.block_on(origin(listener, followed_stage)),
        Err(error) => tracing::error!(%error, "the demo's origin failed"),
    };
    std::thread::Builder::new().name("demo-origin".to_owned()).spawn(serve)?;
    Ok(RunningOrigin { address, _stage: stage })
}

fn runtime_and_listener(socket: std::net::TcpListener) -> std::io::Result<(tokio::runtime::LocalRuntime, TcpListener)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default())?;
    let listener = {
        let _inside = runtime.enter();
        TcpListener::from_std(socket)?
    };
    Ok((runtime, listener))
}

impl DemoOrigin {
    async fn respond(&self, request: &Request) -> SimpleResponse {
        self.requests.set(self.requests.get() + 1);
        let number = self.requests.get();
        let is_post = request.method == Method::POST;
        match request.path() {
            "/demo/break" if is_post => self.set_broken(true),
            "/demo/mend" if is_post => self.set_broken(false),
            "/demo/break" | "/demo/mend" => {
                SimpleResponse::text(StatusCode::METHOD_NOT_ALLOWED, "use POST").with(KnownField::Allow, "POST")
            }
            _ if !matches!(request.method, Method::GET | Method::HEAD) => {
                SimpleResponse::text(StatusCode::METHOD_NOT_ALLOWED, "use GET").with(KnownField::Allow, "GET, HEAD")
            }
            "/" => uncached(INDEX),
            "/fast" => cacheable(&format!("fast: request {number} at the origin"), "max-age=30"),
            "/slow" => {
                tokio::time::sleep(SLOW_RESPONSE_TIME).await;
                uncached("slow: that took 1.5 s")
            }
            "/flaky" if self.broken.get() => SimpleResponse::text(StatusCode::INTERNAL_SERVER_ERROR, "flaky: broken")
                .with(KnownField::CacheControl, "no-store"),
            "/flaky" => uncached("flaky: works"),
            "/limited" => uncached("limited: admitted"),
            "/region" => {
                let region = request.fields.named(b"x-region").next().unwrap_or(b"default");
                let text = format!("region {}: request {number} at the origin", region.escape_ascii());
                cacheable(&text, "max-age=60").with(KnownField::Vary, "x-region")
            }
            _ => SimpleResponse::text(StatusCode::NOT_FOUND, "the demo has no such page; see /"),
        }
    }

    fn set_broken(&self, broken: bool) -> SimpleResponse {
        self.broken.set(broken);
        uncached(if broken { "broken: /flaky fails from now on" } else { "repaired: /flaky works again" })
    }
}

fn uncached(text: &str) -> SimpleResponse {
    cacheable(text, "no-store")
}

fn cacheable(text: &str, cache_control: &str) -> SimpleResponse {
    SimpleResponse::text(StatusCode::OK, text).with(KnownField::CacheControl, cache_control)
}

/// Commands to try, as text for a terminal. The README shows the same commands with their output.
pub fn instructions(listen: SocketAddr, admin: SocketAddr) -> String {
    let (gateway, admin) = (format!("http://{listen}"), format!("http://{admin}"));
    format!(
        "\
Tidegate is running in front of a built-in origin. Five things to try in another terminal:

1. Cache hit. The second response comes from memory: Cache-Status changes from fwd=uri-miss to hit; the request number stays.
     curl -i {gateway}/fast
     curl -i {gateway}/fast

2. Rate limit: five requests at once, then one a second. The last ones get 429 with Retry-After.
     for i in 1 2 3 4 5 6 7 8; do curl -si {gateway}/limited | grep -iE '^(HTTP|retry-after)'; done

3. Regions. Each region has its own cached copy: in the second round, `detail` names its region and slot.
     for r in eu us eu us; do curl -si -H \"x-region: $r\" {gateway}/region | grep -iE '^(cache-status|region)'; done

4. Circuit breaker. The origin fails: its own 500s, then 503 from the open breaker. Repaired: after 3 s half-open, ramp, closed.
     curl -X POST {gateway}/demo/break
     for i in 1 2 3 4 5 6 7 8; do curl -si {gateway}/flaky | grep -iE '^(HTTP|retry-after)'; done
     curl -X POST {gateway}/demo/mend
     for i in 1 2 3 4 5 6 7 8 9; do curl -so /dev/null {gateway}/flaky; curl -s {admin}/api/v1/breakers | grep -o '\"state\":\"[a-z-]*\",\"upstream\":\"flaky\"'; sleep 1; done

5. Degrade page. While the breaker is open, a browser gets a page, and the origin gets no request.
     curl -X POST {gateway}/demo/break; for i in 1 2 3 4 5 6 7 8 9 10; do curl -so /dev/null {gateway}/flaky; done
     curl -si -H 'accept: text/html' {gateway}/flaky
     curl -X POST {gateway}/demo/mend

Dashboard: {admin}/     Metrics: {admin}/metrics     A line for each request here: start with --access-log
(make demo DEMO=--access-log). Stop with Ctrl-C.
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, ConfigDocument, DocumentFormat};
    use std::path::Path;

    async fn send(origin: &DemoOrigin, method: Method, path: &str, region: &str) -> (u16, String) {
        let mut request = Request { method, ..Request::default() };
        request.set_target(path);
        request.fields.push(b"X-Region", region.as_bytes());
        let response = origin.respond(&request).await;
        (response.status().as_u16(), String::from_utf8_lossy(response.body()).into_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn break_and_mend_affect_one_page_only() {
        let origin = DemoOrigin::default();
        assert_eq!(send(&origin, Method::GET, "/flaky", "eu").await.0, 200);
        assert_eq!(send(&origin, Method::GET, "/demo/break", "eu").await.0, 405);
        assert_eq!(send(&origin, Method::POST, "/demo/break", "eu").await.0, 200);
        assert_eq!(send(&origin, Method::GET, "/flaky", "eu").await.0, 500);
        assert_eq!(
            send(&origin, Method::GET, "/fast", "eu").await,
            (200, "fast: request 5 at the origin\n".to_owned())
        );
        assert_eq!(send(&origin, Method::POST, "/demo/mend", "eu").await.0, 200);
        assert_eq!(send(&origin, Method::GET, "/flaky", "eu").await.0, 200);
        assert_eq!(send(&origin, Method::GET, "/slow", "eu").await.0, 200);
        assert_eq!(send(&origin, Method::GET, "/region", "eu").await.1, "region eu: request 9 at the origin\n");
        assert_eq!(
            (send(&origin, Method::GET, "/x", "eu").await.0, send(&origin, Method::POST, "/", "eu").await.0),
            (404, 405)
        );
    }

    #[test]
    fn configuration_is_valid_without_warnings() {
        let env = |name: &str| match name {
            "DEMO_LISTEN" => Some("127.0.0.1:1".to_owned()),
            "DEMO_ADMIN" => Some("127.0.0.1:2".to_owned()),
            "DEMO_ORIGIN" => Some("http://127.0.0.1:3".to_owned()),
            "DEMO_ACCESS_LOG" => Some("off".to_owned()),
            _ => None,
        };
        let document =
            ConfigDocument { name: "demo", text: CONFIG, format: DocumentFormat::Toml, base: Path::new(""), env: &env };
        let (config, report) = Config::parse(&document).map_err(|report| report.to_string()).expect("no errors");
        assert_eq!((config.routes.len(), config.upstreams.len(), report.to_string().as_str()), (6, 2, ""));
    }

    #[test]
    fn instructions_contain_both_addresses() {
        let text = instructions(SocketAddr::from(([127, 0, 0, 1], 8080)), SocketAddr::from(([127, 0, 0, 1], 9900)));
        assert!(text.contains("http://127.0.0.1:8080/fast") && text.contains("http://127.0.0.1:9900/metrics"));
        assert_eq!((1..=5).filter(|step| text.contains(&format!("\n{step}. "))).count(), 5);
    }
}
