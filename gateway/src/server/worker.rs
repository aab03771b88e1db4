//! One worker thread: its runtime, its doors, its connections.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::watch;
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep, timeout};

use super::{FLUSH_EVERY, Shared, Stage, TIDY_EVERY, UNTIDY_EVERY};
use crate::accept::{Accepted, Door};
use crate::http::io::Io;
use crate::http::message::Scheme;
use crate::pipeline::{Denials, Worker};
use crate::serve::{self, Hall};
use crate::tls::Alpn;
use crate::{degrade, metrics, upstream};

/// Between two looks at the connections that are left.
const DRAIN_GLANCE: Duration = Duration::from_millis(10);
/// How long queued writes to shards may take at the end.
const FLUSH_PATIENCE: Duration = Duration::from_millis(500);

/// Runs until `stage` says so: at `Draining` until every connection has ended, at `Ending` at once.
pub(super) fn run(
    index: usize,
    sockets: Vec<std::net::TcpListener>,
    shared: &Arc<Shared>,
    stage: watch::Receiver<Stage>,
) {
    metrics::use_line(index, shared.floor.workers());
    let runtime = match Builder::new_current_thread().enable_all().build_local(LocalOptions::default()) {
        Ok(runtime) => runtime,
        Err(error) => return tracing::error!(%error, "a worker has no runtime"),
    };
    runtime.block_on(work(index, sockets, Arc::clone(shared), stage));
}

async fn work(
    index: usize,
    sockets: Vec<std::net::TcpListener>,
    shared: Arc<Shared>,
    mut stage: watch::Receiver<Stage>,
) {
    let worker = Worker {
        builder: Cell::default(),
        view: shared.store.view(),
        fills: Arc::clone(&shared.fills),
        denials: Denials::default(),
        log: Arc::clone(&shared.log),
    };
    let hall = Hall::new(worker, Arc::clone(&shared.site));
    for (listener, socket) in sockets.into_iter().enumerate() {
        let door = Door { socket, listener, worker: index, floor: Arc::clone(&shared.floor) };
        let (hall, shared, mut stage) = (Rc::clone(&hall), Arc::clone(&shared), stage.clone());
        spawn_local(async move {
            let receive = |accepted| receive(&hall, &shared, accepted);
            let stopped = async move { reached(&mut stage, Stage::Draining).await };
            if let Err(error) = door.run(stopped, receive).await {
                tracing::error!(%error, "a listener failed");
            }
        });
    }
    let (incoming_hall, incoming_shared) = (Rc::clone(&hall), Arc::clone(&shared));
    spawn_local(async move {
        let mut incoming = incoming_shared.floor.incoming(index);
        while let Some(accepted) = incoming.next().await {
            receive(&incoming_hall, &incoming_shared, accepted);
        }
    });
    let chores_hall = Rc::clone(&hall);
    let chores = spawn_local(async move {
        let (mut tidied, mut is_untidy) = (Instant::now(), false);
        loop {
            degrade::set_date(chores_hall.worker.view.store().wall_time());
            sleep(if is_untidy { UNTIDY_EVERY } else { FLUSH_EVERY }).await;
            chores_hall.worker.log.flush();
            let is_due = tidied.elapsed() >= TIDY_EVERY;
            if is_due || is_untidy {
                is_untidy = chores_hall.worker.view.tidy();
            }
            if is_due {
                tidied = Instant::now();
                upstream::sweep();
            }
        }
    });
    reached(&mut stage, Stage::Draining).await;
    hall.drain();
    let finished = async {
        while shared.floor.connections_of(index) > 0 {
            sleep(DRAIN_GLANCE).await;
        }
    };
    tokio::select! {
        () = finished => {}
        () = reached(&mut stage, Stage::Ending) => {}
    }
    chores.abort();
    if timeout(FLUSH_PATIENCE, hall.worker.view.flush(FLUSH_PATIENCE)).await.is_err() {
        tracing::debug!("writes to shards were left undone");
    }
    hall.worker.log.flush();
}

/// Waits for a stage. The sender lives as long as the control thread; its end is the last stage. Cancel safe.
async fn reached(stage: &mut watch::Receiver<Stage>, aim: Stage) {
    let _reached_or_gone = stage.wait_for(|stage| *stage >= aim).await;
}

/// Gives a connection its task. The permit goes with it and ends with it.
fn receive(hall: &Rc<Hall>, shared: &Arc<Shared>, accepted: Accepted) {
    let Accepted { stream, listener, peer, permit, .. } = accepted;
    let ip = peer.ip().to_canonical();
    let hall = Rc::clone(hall);
    let Some(acceptor) = shared.acceptors.get(listener).cloned().flatten() else {
        spawn_local(async move {
            serve::serve_h1(hall, Io::plain(stream), ip, Scheme::Http).await;
            drop(permit);
        });
        return;
    };
    spawn_local(async move {
        let patience = hall.site.load().http.header_timeout;
        match acceptor.accept(stream, patience).await {
            Ok((stream, Alpn::H2)) => serve::serve_h2(hall, stream, ip, Scheme::Https).await,
            Ok((stream, Alpn::H1)) => serve::serve_h1(hall, Io::tls(stream), ip, Scheme::Https).await,
            // Counted and logged where it happened.
            Err(_failed_handshake) => {}
        }
        drop(permit);
    });
}
