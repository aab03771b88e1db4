//! Leads a shared fetch: sends its requests, and goes on without its client while others wait.

use std::future::{Future, poll_fn};
use std::ops::ControlFlow;
use std::pin::Pin;
use std::task::{Context, Poll};

use super::context::{CONDITIONS, RANGE_FIELDS, RequestContext};
use super::fetch::{self, Fetch, LedFetch};
use super::forward::{CallEnd, DetachableCall};
use super::response_body::ResponseBody;
use crate::cache::fill::FillLeader;
use crate::cache::missing::MissingPiece;
use crate::cache::policy;
use crate::cache::stored::CachedObject;
use crate::error::Error;
use crate::http::message::Request;
use crate::http::request_body::RequestBody;
use crate::spans::{BackgroundWork, Phase};
use crate::tasks::{self, TaskKind};
use crate::upstream::KeptConnections;

impl RequestContext<'_> {
    /// Fetches from the origin on behalf of every waiting request; `piece`: only that, and the rest
    /// of the response is stored.
    ///
    /// If this is dropped before the head of the response, the fetch ends, unless other requests
    /// wait for it: then it continues in a task.
    pub(super) async fn lead_fetch(
        &mut self,
        fetch: Fetch,
        (leader, piece): (FillLeader, Option<Box<MissingPiece>>),
    ) -> Result<ResponseBody<'static>, Error> {
        let has_validator = |object: &CachedObject| object.has_validator();
        let validated = self.stale.clone().filter(|hit| policy::object(&hit.meta).is_some_and(has_validator));
        let piece = match piece {
            None => None,
            // Boxed: few requests need it.
            Some(piece) => match Box::pin(self.close_first_gap(&fetch, piece)).await {
                Ok(piece) => piece,
                Err(error) => {
                    fetch::end_failed(leader, error.kind(), self.record.requests_sent);
                    return Err(error);
                }
            },
        };
        let mut led = LedFetch { fetch, leader, validated, piece };
        loop {
            let mut copy = self.whole_request(&led);
            let source = if led.leader.is_solo() {
                self.forward(Some(&mut copy), RequestBody::Empty).await
            } else {
                let call = self.begin_call(copy, kept_for(&led.leader));
                let ended;
                (led, ended) = ClientLed { context: self, led: Some((led, call)) }.await;
                self.end_call(ended)
            };
            match self.conclude(led, source) {
                ControlFlow::Break(result) => return result,
                ControlFlow::Continue(again) => led = again,
            }
        }
    }

    /// Moves a fetch to a task, which owns what the fetch uses.
    fn detach(&self, led: LedFetch, call: DetachableCall) {
        let mut detached = self.detached(BackgroundWork::Fetch, self.stale.clone());
        // The client's own demands do not apply to the shared copy.
        CONDITIONS.into_iter().chain(RANGE_FIELDS).for_each(|known| detached.request.fields.remove(known));
        tasks::spawn(TaskKind::DetachedFetch, async move {
            detached.run(async |context: &mut RequestContext<'_>| context.lead_alone(led, call).await).await;
        });
    }

    /// Leads a fetch to the head of its response, as long as a request waits for it. The body
    /// belongs to its readers.
    async fn lead_alone(&mut self, mut led: LedFetch, mut call: DetachableCall) {
        // The call goes on.
        self.enter(Phase::Upstream);
        loop {
            let ended =
                poll_fn(
                    |cx| {
                        if led.leader.is_awaited(cx) { call.as_mut().poll(cx).map(Some) } else { Poll::Ready(None) }
                    },
                );
            let Some(ended) = ended.await else { return };
            self.update_now();
            let source = self.end_call(ended);
            match self.conclude(led, source) {
                ControlFlow::Break(ended) => {
                    self.record.failure = ended.err().map(|error| error.kind());
                    return;
                }
                ControlFlow::Continue(again) => led = again,
            }
            call = self.begin_call(self.whole_request(&led), kept_for(&led.leader));
        }
    }

    /// The request for the whole object, or for the piece that is not stored; conditional where a
    /// stored one is validated.
    fn whole_request(&self, led: &LedFetch) -> Request {
        let mut copy = self.request.clone();
        CONDITIONS.into_iter().chain(RANGE_FIELDS).for_each(|known| copy.fields.remove(known));
        self.reduce(&mut copy);
        if let Some(piece) = &led.piece {
            piece.write_range(&mut copy.fields);
        } else if let Some(object) = led.validated_object() {
            policy::make_conditional(object, &mut copy.fields);
        }
        copy
    }
}

/// The connections for the next request of a fetch. That of a fetch which repeats a failed one is
/// sent once: a closed kept connection would make it the third.
fn kept_for(leader: &FillLeader) -> KeptConnections {
    if leader.repeats_failed() { KeptConnections::Avoid } else { KeptConnections::Use }
}

/// A fetch whose client waits for it. If it is dropped while other requests wait too, the call
/// continues in a task: clients that leave one after the other cost one exchange.
struct ClientLed<'f, 'c> {
    context: &'f RequestContext<'c>,
    /// `None` during a poll: a call that panics does not continue.
    led: Option<(LedFetch, DetachableCall)>,
}

impl Future for ClientLed<'_, '_> {
    type Output = (LedFetch, CallEnd);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let (led, mut call) = self.led.take().expect("not polled after its end");
        match call.as_mut().poll(cx) {
            Poll::Ready(ended) => Poll::Ready((led, ended)),
            Poll::Pending => {
                self.led = Some((led, call));
                Poll::Pending
            }
        }
    }
}

impl Drop for ClientLed<'_, '_> {
    fn drop(&mut self) {
        if let Some((led, call)) = self.led.take()
            && led.leader.has_waiting()
        {
            self.context.detach(led, call);
        }
    }
}
