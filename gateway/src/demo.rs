//! `tidegate demo`: an origin to play with, the configuration in front of it, and the list of what to try.
//!
//! The origin has one switch: `/demo/break` makes `/flaky` fail until `/demo/mend`.

use std::cell::Cell;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::http::fields::Known;
use crate::http::limits::Limits;
use crate::http::message::{Method, Request, StatusCode};
use crate::plain::{self, Bounds, Reply};

/// The demo's configuration; `DEMO_LISTEN`, `DEMO_ADMIN` (addresses) and `DEMO_ORIGIN` (a URL) are to be filled in.
pub const CONFIG: &str = include_str!("demo.toml");

/// How long `/slow` takes.
const SLOW: Duration = Duration::from_millis(1_500);
/// Connections of one gateway and a curious person.
const CONNECTIONS_MAX: usize = 1_024;

const INDEX: &str = "\
The demo's origin. Through the gateway:
  /fast       may be kept for 30 s; counts how often the origin was asked
  /region     may be kept for 60 s; says which region it was asked for
  /slow       answers after 1.5 s
  /limited    5 requests per second for each device
  /flaky      fails while the origin is broken: POST /demo/break, POST /demo/mend";

#[derive(Default)]
struct Origin {
    /// Requests that reached the origin.
    asked: Cell<u64>,
    broken: Cell<bool>,
}

/// Serves the origin until `stop` turns true or its sender is gone. Needs a `LocalSet`. Cancel safe.
pub async fn origin(listener: TcpListener, stop: watch::Receiver<bool>) {
    let bounds = Bounds { http: Limits::default(), connections: CONNECTIONS_MAX };
    let origin = Rc::new(Origin::default());
    plain::serve(listener, bounds, stop, async move |request: &Request, _: IpAddr| origin.answer(request).await).await;
}

/// An origin that runs on a thread of its own until it is dropped.
pub struct RunningOrigin {
    address: SocketAddr,
    _stop: watch::Sender<bool>,
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
    let (stop, stopped) = watch::channel(false);
    let serve = move || match runtime_and_listener(socket) {
        Ok((runtime, listener)) => runtime.block_on(origin(listener, stopped)),
        Err(error) => tracing::error!(%error, "the demo's origin failed"),
    };
    std::thread::Builder::new().name("demo-origin".to_owned()).spawn(serve)?;
    Ok(RunningOrigin { address, _stop: stop })
}

fn runtime_and_listener(socket: std::net::TcpListener) -> std::io::Result<(tokio::runtime::LocalRuntime, TcpListener)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default())?;
    let listener = {
        let _inside = runtime.enter();
        TcpListener::from_std(socket)?
    };
    Ok((runtime, listener))
}

impl Origin {
    async fn answer(&self, request: &Request) -> Reply {
        self.asked.set(self.asked.get() + 1);
        let asked = self.asked.get();
        let is_post = request.method == Method::POST;
        match request.path() {
            "/demo/break" if is_post => self.switch(true),
            "/demo/mend" if is_post => self.switch(false),
            "/demo/break" | "/demo/mend" => {
                Reply::text(StatusCode::METHOD_NOT_ALLOWED, "use POST").with(Known::Allow, "POST")
            }
            _ if !matches!(request.method, Method::GET | Method::HEAD) => {
                Reply::text(StatusCode::METHOD_NOT_ALLOWED, "use GET").with(Known::Allow, "GET, HEAD")
            }
            "/" => fresh(INDEX),
            "/fast" => kept(&format!("fast: request {asked} at the origin"), "max-age=30"),
            "/slow" => {
                tokio::time::sleep(SLOW).await;
                fresh("slow: that took 1.5 s")
            }
            "/flaky" if self.broken.get() => {
                Reply::text(StatusCode::INTERNAL_SERVER_ERROR, "flaky: broken").with(Known::CacheControl, "no-store")
            }
            "/flaky" => fresh("flaky: works"),
            "/limited" => fresh("limited: let through"),
            "/region" => {
                let region = request.fields.named(b"x-region").next().unwrap_or(b"default");
                let text = format!("region {}: request {asked} at the origin", region.escape_ascii());
                kept(&text, "max-age=60").with(Known::Vary, "x-region")
            }
            _ => Reply::text(StatusCode::NOT_FOUND, "the demo has no such page; see /"),
        }
    }

    fn switch(&self, broken: bool) -> Reply {
        self.broken.set(broken);
        fresh(if broken { "broken: /flaky fails from now on" } else { "mended: /flaky works again" })
    }
}

fn fresh(text: &str) -> Reply {
    kept(text, "no-store")
}

fn kept(text: &str, cache_control: &str) -> Reply {
    Reply::text(StatusCode::OK, text).with(Known::CacheControl, cache_control)
}

/// What to try, for a terminal.
pub fn tour(listen: SocketAddr, admin: SocketAddr) -> String {
    let gate = format!("http://{listen}");
    format!(
        "\
Tidegate is running in front of a built-in origin. Five things to try in another terminal:

1. A hit. The second answer comes from memory: Cache-Status goes from fwd=miss to hit, the request's number stays.
     curl -i {gate}/fast
     curl -i {gate}/fast

2. A limit. Five requests are let through, the last ones get 429 with Retry-After.
     for i in 1 2 3 4 5 6 7 8; do curl -si {gate}/limited | grep -iE '^(HTTP|retry-after)'; done

3. A region's shard. Each region keeps a copy of its own: on the second round `detail` names its region and slot.
     for r in eu us eu us; do curl -si -H \"x-region: $r\" {gate}/region | grep -iE '^(cache-status|region)'; done

4. A breaker. The origin breaks: first its own 500s, then 503 with Retry-After, without asking it any more.
     curl -X POST {gate}/demo/break
     for i in 1 2 3 4 5 6 7 8; do curl -si {gate}/flaky | grep -iE '^(HTTP|retry-after)'; done

5. The degrade page as a browser gets it; then the origin is mended, and after 3 s /flaky answers 200 again.
     for i in 1 2 3 4 5 6; do curl -s -H 'accept: text/html' {gate}/flaky; done
     curl -X POST {gate}/demo/mend; sleep 4; curl -i {gate}/flaky

Dashboard: http://{admin}/     Metrics: http://{admin}/metrics     Stop with Ctrl-C.
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Format, Source};
    use std::path::Path;

    async fn ask(origin: &Origin, method: Method, path: &str, region: &str) -> (u16, String) {
        let mut request = Request { method, ..Request::default() };
        request.set_target(path);
        request.fields.push(b"X-Region", region.as_bytes());
        let reply = origin.answer(&request).await;
        (reply.status().as_u16(), String::from_utf8_lossy(reply.body()).into_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn the_switch_breaks_and_mends_one_page() {
        let origin = Origin::default();
        assert_eq!(ask(&origin, Method::GET, "/flaky", "eu").await.0, 200);
        assert_eq!(ask(&origin, Method::GET, "/demo/break", "eu").await.0, 405);
        assert_eq!(ask(&origin, Method::POST, "/demo/break", "eu").await.0, 200);
        assert_eq!(ask(&origin, Method::GET, "/flaky", "eu").await.0, 500);
        assert_eq!(ask(&origin, Method::GET, "/fast", "eu").await, (200, "fast: request 5 at the origin\n".to_owned()));
        assert_eq!(ask(&origin, Method::POST, "/demo/mend", "eu").await.0, 200);
        assert_eq!(ask(&origin, Method::GET, "/flaky", "eu").await.0, 200);
        assert_eq!(ask(&origin, Method::GET, "/slow", "eu").await.0, 200);
        assert_eq!(ask(&origin, Method::GET, "/region", "eu").await.1, "region eu: request 9 at the origin\n");
        assert_eq!(
            (ask(&origin, Method::GET, "/x", "eu").await.0, ask(&origin, Method::POST, "/", "eu").await.0),
            (404, 405)
        );
    }

    #[test]
    fn the_configuration_is_valid_without_a_warning() {
        let env = |name: &str| match name {
            "DEMO_LISTEN" => Some("127.0.0.1:1".to_owned()),
            "DEMO_ADMIN" => Some("127.0.0.1:2".to_owned()),
            "DEMO_ORIGIN" => Some("http://127.0.0.1:3".to_owned()),
            _ => None,
        };
        let source = Source { name: "demo", text: CONFIG, format: Format::Toml, base: Path::new(""), env: &env };
        let (config, report) = Config::parse(&source).map_err(|report| report.to_string()).expect("no errors");
        assert_eq!((config.routes.len(), config.upstreams.len(), report.to_string().as_str()), (6, 2, ""));
    }

    #[test]
    fn the_tour_names_both_addresses() {
        let tour = tour(SocketAddr::from(([127, 0, 0, 1], 8080)), SocketAddr::from(([127, 0, 0, 1], 9900)));
        assert!(tour.contains("http://127.0.0.1:8080/fast") && tour.contains("http://127.0.0.1:9900/metrics"));
        assert_eq!((1..=5).filter(|step| tour.contains(&format!("\n{step}. "))).count(), 5);
    }
}
