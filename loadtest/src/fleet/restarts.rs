//! Two gateways that are restarted in turn by SIGTERM under clients that never retry, and what
//! these lose.
//!
//! New connections go to the gateways whose `/ready` is 200, as behind a load balancer. Kept ones
//! are used until a response ends them. Invariant: each request is sent once, and is either good
//! or lost.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::case::client::CaseClient;
use crate::case::gateway::CaseContext;
use crate::error::{LoadtestError, Result};
use crate::fleet::node::{DrainEnd, FleetNode};
use crate::fleet::rotation::{self, Member};
use crate::interrupt::{self, wait_for};
use crate::load::target::AddressSet;
use crate::servers::scripted_origin::{OriginAnswer, ScriptedOrigin};

const NODES: usize = 2;
/// A gateway that has started is used for so long before the other one is stopped.
const REST: Duration = Duration::from_millis(500);
/// Every so many-th client opens a connection for each request.
const NEW_CONNECTIONS: usize = 4;
/// Different reports of lost requests that are kept.
const LOSSES_MAX: usize = 20;

const CONFIG: &str = r#"
[server]
node = "@NODE@"
workers = 2
drain_idle = "@IDLE@ms"
drain_timeout = "30s"
[log]
access = "off"
[upstreams.origin]
endpoints = ["http://@ORIGIN@"]
[[routes]]
name = "passed"
match = { path = "/passed/*" }
upstream = "origin"
cache = { mode = "off" }
[[routes]]
name = "cached"
match = { path = "/*" }
upstream = "origin"
"#;

/// A load over restarts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RestartLoad {
    /// The load ends with the restart in which so many have been sent.
    pub(crate) requests: u64,
    pub(crate) clients: usize,
    /// `server.drain_idle` of the gateways.
    pub(crate) drain_idle: Duration,
}

/// The ends of the requests of a load.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct RestartFigures {
    pub(crate) seconds: f64,
    pub(crate) restarts: u64,
    pub(crate) requests: u64,
    /// Requests that were the first ones of their connections.
    pub(crate) new_connections: u64,
    pub(crate) kept_connections: u64,
    pub(crate) lost: u64,
    /// Texts of lost requests, with their numbers.
    pub(crate) losses: BTreeMap<String, u64>,
    /// Drains that did not end with exit status 0 within their time.
    pub(crate) unclean_ends: u64,
}

impl RestartFigures {
    pub(crate) fn is_clean(&self) -> bool {
        self.lost + self.unclean_ends == 0 && self.restarts > 0
    }

    fn add(&mut self, part: RestartFigures) {
        self.requests += part.requests;
        self.new_connections += part.new_connections;
        self.kept_connections += part.kept_connections;
        self.lost += part.lost;
        for (text, count) in part.losses {
            self.lose(text, count);
        }
    }

    fn lose(&mut self, text: String, count: u64) {
        let is_known = self.losses.contains_key(&text) || self.losses.len() < LOSSES_MAX;
        *self.losses.entry(if is_known { text } else { "others".to_owned() }).or_default() += count;
    }
}

/// State of all clients of a load.
struct Shared {
    rotation: AddressSet,
    sent: AtomicU64,
    is_over: AtomicBool,
}

impl RestartLoad {
    /// Runs the load; calls `on_restart` with the requests so far after each restart. Ends early if
    /// the command is interrupted, with what was measured.
    pub(crate) fn run(self, context: &CaseContext<'_>, mut on_restart: impl FnMut(u64, u64)) -> Result<RestartFigures> {
        let origin = ScriptedOrigin::start(|_| OriginAnswer::ok("ok").field("Cache-Control: max-age=600"));
        let origin = origin.map_err(LoadtestError::io("the origin does not start"))?;
        let idle = self.drain_idle.as_millis().to_string();
        let config = CONFIG.replace("@ORIGIN@", &origin.address.to_string()).replace("@IDLE@", &idle);
        let nodes = (0..NODES).map(|number| FleetNode::new(number, &config));
        let mut nodes = nodes.collect::<Result<Vec<_>>>()?;
        nodes.iter_mut().try_for_each(|node| node.start(context))?;
        let members = Member::all(&nodes);
        let shared =
            Shared { rotation: rotation::of_all(&members), sent: AtomicU64::new(0), is_over: AtomicBool::new(false) };
        let began = Instant::now();
        let mut figures = RestartFigures::default();
        thread::scope(|scope| {
            let rotation = scope.spawn(|| rotation::follow_readiness(&shared.rotation, &members, &shared.is_over));
            let clients: Vec<_> = (0..self.clients)
                .map(|number| {
                    scope.spawn({
                        let shared = &shared;
                        move || client(shared, number)
                    })
                })
                .collect();
            let restarted = (|| {
                while shared.sent.load(Relaxed) < self.requests {
                    let node = &mut nodes[(figures.restarts as usize) % NODES];
                    figures.unclean_ends += u64::from(node.stop()? != DrainEnd::Clean);
                    node.start(context)?;
                    figures.restarts += 1;
                    on_restart(figures.restarts, shared.sent.load(Relaxed));
                    wait_for(REST, || Ok(None::<()>))?;
                }
                Ok(())
            })();
            shared.is_over.store(true, Relaxed);
            for client in clients {
                figures.add(client.join().map_err(|_| LoadtestError::Load("a client has panicked".to_owned()))?);
            }
            rotation.join().map_err(|_| LoadtestError::Load("the rotation has panicked".to_owned()))?;
            figures.seconds = began.elapsed().as_secs_f64();
            match restarted {
                Err(failure) if !matches!(failure, LoadtestError::Interrupted) => Err(failure),
                _ => Ok(figures),
            }
        })
    }
}

/// One client: a request after the other, over a kept connection or over new ones. Hits, calls of
/// the origin and uploads in turn.
fn client(shared: &Shared, number: usize) -> RestartFigures {
    let mut figures = RestartFigures::default();
    let mut kept: Option<CaseClient> = None;
    while !shared.is_over.load(Relaxed) && !interrupt::is_requested() {
        let count = shared.sent.fetch_add(1, Relaxed);
        let is_kept = kept.is_some();
        let Some(address) = shared.rotation.select(count) else { continue };
        let mut connection = kept.take().unwrap_or_else(|| CaseClient::new(address));
        let key = count % 50;
        let request = match count % 3 {
            0 => format!("GET /cached/{key} HTTP/1.1\r\nHost: shop.example\r\n\r\n"),
            1 => format!("GET /passed/{key} HTTP/1.1\r\nHost: shop.example\r\n\r\n"),
            _ => format!("POST /passed/{key} HTTP/1.1\r\nHost: shop.example\r\nContent-Length: 5\r\n\r\nhello"),
        };
        figures.requests += 1;
        *if is_kept { &mut figures.kept_connections } else { &mut figures.new_connections } += 1;
        let loss = match connection.send(request.as_bytes()) {
            Ok(response) if response.status == 200 => {
                if !number.is_multiple_of(NEW_CONNECTIONS) && connection.is_open() {
                    kept = Some(connection);
                }
                continue;
            }
            Ok(response) => format!("status {}", response.status),
            Err(error) => error.to_string(),
        };
        figures.lost += 1;
        figures.lose(format!("{} connection: {loss}", if is_kept { "kept" } else { "new" }), 1);
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_lost_request_or_no_restart_is_not_clean() {
        let mut figures = RestartFigures { restarts: 2, ..RestartFigures::default() };
        assert!(figures.is_clean());
        for number in 0..2 * LOSSES_MAX {
            figures.add(RestartFigures {
                lost: 1,
                losses: BTreeMap::from([(format!("loss {number}"), 1)]),
                ..RestartFigures::default()
            });
        }
        assert!(!figures.is_clean() && figures.lost == 40);
        assert_eq!((figures.losses.len(), figures.losses["others"]), (LOSSES_MAX + 1, 20));
        assert!(!RestartFigures::default().is_clean());
        assert!(!RestartFigures { restarts: 1, unclean_ends: 1, ..RestartFigures::default() }.is_clean());
    }
}
