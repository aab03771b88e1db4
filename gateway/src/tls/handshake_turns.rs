//! Turns of TLS handshakes on a thread: few ClientHellos are answered per turn of the event loop,
//! and those of several clients alternate.
//!
//! An answer takes 0.1 to 1 ms (key exchange and signature). Without turns, a client that opens
//! many connections at once delays every request on the thread by the sum of its handshakes.
//!
//! Invariant: at most one `HandshakeTurn` of a thread exists, and while handshakes wait, there is
//! one.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::net::IpAddr;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};

use tokio::task::yield_now;

use crate::peer::ClientNetwork;

/// Answers per turn of the event loop. Each end of a turn costs a twentieth of an answer.
const ANSWERS_PER_TURN: u32 = 4;

thread_local! {
    static QUEUE: RefCell<TurnQueue> = RefCell::default();
}

/// The handshakes of a thread that wait, at most one for each connection.
#[derive(Default)]
struct TurnQueue {
    is_taken: bool,
    /// Answers since others have run.
    answers: u32,
    /// Networks with waiting handshakes, the next one first.
    order: VecDeque<ClientNetwork>,
    waiting: HashMap<ClientNetwork, VecDeque<Weak<WaitingHandshake>>, foldhash::fast::RandomState>,
}

#[derive(Default)]
struct WaitingHandshake {
    waker: Cell<Option<Waker>>,
    has_turn: Cell<bool>,
}

/// The right to answer a ClientHello. Dropping it passes it on.
pub(super) struct HandshakeTurn(());

/// A place in the queue. Dropping it gives up the place, or a turn that was not used.
struct QueuePlace(Rc<WaitingHandshake>);

impl HandshakeTurn {
    /// Waits for the turn of a client. `client` is canonical. Cancel safe: the place is lost.
    pub(super) async fn take(client: IpAddr) -> HandshakeTurn {
        match QUEUE.with_borrow_mut(|queue| queue.take_or_wait(ClientNetwork::of(client))) {
            None => HandshakeTurn(()),
            Some(place) => poll_fn(|cx| place.poll(cx)).await,
        }
    }

    /// Passes the turn on, after the last answer of a turn of the event loop when everything else
    /// that is ready has run. Cancel safe.
    pub(super) async fn end(self) {
        if QUEUE.with_borrow_mut(TurnQueue::is_last_answer) {
            yield_now().await;
        }
    }
}

impl Drop for HandshakeTurn {
    fn drop(&mut self) {
        QUEUE.with_borrow_mut(TurnQueue::pass_on);
    }
}

impl QueuePlace {
    fn poll(&self, cx: &mut Context<'_>) -> Poll<HandshakeTurn> {
        if self.0.has_turn.take() {
            return Poll::Ready(HandshakeTurn(()));
        }
        self.0.waker.set(Some(cx.waker().clone()));
        Poll::Pending
    }
}

impl Drop for QueuePlace {
    fn drop(&mut self) {
        if self.0.has_turn.take() {
            drop(HandshakeTurn(()));
        }
    }
}

impl TurnQueue {
    /// `None`: the turn is taken.
    fn take_or_wait(&mut self, client: ClientNetwork) -> Option<QueuePlace> {
        if !std::mem::replace(&mut self.is_taken, true) {
            return None;
        }
        let place = Rc::<WaitingHandshake>::default();
        let of_client = self.waiting.entry(client).or_default();
        if of_client.is_empty() {
            self.order.push_back(client);
        }
        of_client.push_back(Rc::downgrade(&place));
        Some(QueuePlace(place))
    }

    /// Counts an answer. Returns whether others are to run now.
    fn is_last_answer(&mut self) -> bool {
        self.answers = (self.answers + 1) % ANSWERS_PER_TURN;
        self.answers == 0
    }

    /// Passes the turn to the next handshake that still waits.
    fn pass_on(&mut self) {
        while let Some(client) = self.order.pop_front() {
            let Some(of_client) = self.waiting.get_mut(&client) else { continue };
            let next = of_client.pop_front();
            if of_client.is_empty() {
                self.waiting.remove(&client);
            } else {
                self.order.push_back(client);
            }
            if let Some(next) = next.and_then(|next| next.upgrade()) {
                next.has_turn.set(true);
                next.waker.take().iter().for_each(Waker::wake_by_ref);
                return;
            }
        }
        self.is_taken = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::task::spawn_local;

    const FIRST: [u8; 4] = [192, 0, 2, 1];
    const OTHER: [u8; 4] = [192, 0, 2, 2];

    /// A handshake that notes its name when it has its turn.
    fn handshake(
        client: [u8; 4],
        name: &'static str,
        order: &Rc<RefCell<Vec<&'static str>>>,
    ) -> tokio::task::JoinHandle<()> {
        let order = Rc::clone(order);
        spawn_local(async move {
            let turn = HandshakeTurn::take(client.into()).await;
            order.borrow_mut().push(name);
            turn.end().await;
        })
    }

    fn run(test: impl Future<Output = ()>) {
        QUEUE.take();
        tokio::runtime::LocalRuntime::new().expect("a runtime").block_on(test);
    }

    #[test]
    fn clients_alternate() {
        run(async {
            let order = Rc::default();
            let turn = HandshakeTurn::take(FIRST.into()).await;
            let names = [(FIRST, "a1"), (FIRST, "a2"), (FIRST, "a3"), (OTHER, "b1"), (OTHER, "b2")];
            let handshakes = names.map(|(client, name)| handshake(client, name, &order));
            yield_now().await;
            drop(turn);
            for handshake in handshakes {
                handshake.await.expect("it ends");
            }
            assert_eq!(*order.borrow(), ["a1", "b1", "a2", "b2", "a3"]);
        });
    }

    #[test]
    fn other_work_runs_between_two_handshakes() {
        run(async {
            let order = Rc::default();
            let handshakes = ["1", "2", "3", "4", "5", "6", "7", "8", "9"].map(|name| handshake(FIRST, name, &order));
            let others = Rc::clone(&order);
            let other = spawn_local(async move {
                loop {
                    others.borrow_mut().push("other");
                    yield_now().await;
                }
            });
            for handshake in handshakes {
                handshake.await.expect("it ends");
            }
            other.abort();
            let mut order = order.take();
            order.dedup();
            assert_eq!(order[..11], ["1", "2", "3", "4", "other", "5", "6", "7", "8", "other", "9"]);
        });
    }

    #[test]
    fn handshakes_that_are_given_up_are_passed_over() {
        run(async {
            let order = Rc::default();
            let turn = HandshakeTurn::take(FIRST.into()).await;
            let [first, second, third] = ["first", "second", "third"].map(|name| handshake(FIRST, name, &order));
            yield_now().await;
            second.abort();
            drop(turn);
            // It has the turn, and does not use it.
            first.abort();
            third.await.expect("it ends");
            assert_eq!(*order.borrow(), ["third"]);
            QUEUE.with_borrow(|queue| assert!(!queue.is_taken && queue.waiting.is_empty() && queue.order.is_empty()));
        });
    }
}
