//! The phases after `admit`, in order: cache or upstream, degrade after a failure, respond.

use std::future::poll_fn;
use std::task::Poll;

use tokio::time::timeout_at;

use super::context::RequestContext;
use super::forward::count_timeout;
use super::response_body::ResponseBody;
use crate::cache::policy;
use crate::error::Error;
use crate::http::attempt::UpstreamConnectionError;
use crate::http::body::{BodyError, BodySource as _};
use crate::http::exchange_clock::ExchangeTimeout;
use crate::http::message::{BodyLength, Response, StatusCode};
use crate::http::request_body::RequestBody;
use crate::identify::auth::Authentication;
use crate::record::{CacheDetail, ForwardReason};
use crate::route::RouteAction;
use crate::{degrade, hop};

impl RequestContext<'_> {
    /// Answers a request that was admitted: fills the response head and returns the body.
    ///
    /// Dropping the future cancels the request and closes its upstream connection, unless other
    /// requests wait for the same response. So does the deadline of a trusted proxy.
    pub(crate) async fn handle<'b>(&mut self, body: RequestBody<'b>) -> ResponseBody<'b> {
        if self.authentication == Authentication::Pending {
            // Boxed: few requests have a password to verify.
            let ended = Box::pin(self.authenticate()).await;
            if let Some(ended) = ended {
                return ended;
            }
        }
        let result = match self.deadline {
            None => self.run(body).await,
            Some(deadline) => {
                // Boxed: few requests have a deadline, and the future of all would be larger.
                let in_time = Box::pin(timeout_at(deadline.into(), self.run(body))).await;
                in_time.unwrap_or_else(|_| {
                    count_timeout(ExchangeTimeout::Total);
                    Err(UpstreamConnectionError::Timeout(ExchangeTimeout::Total).into())
                })
            }
        };
        let body = match result.and_then(|body| self.check_switch(body)) {
            Ok(mut body) => match first_failure(&mut body).await {
                None => body,
                Some(error) => self.degrade_unsent(&error),
            },
            Err(error) => self.degrade(error),
        };
        let body = match self.route.and_then(|route| route.config.compress.as_deref()) {
            None => body,
            // Boxed: few routes compress.
            Some(config) => Box::pin(self.compress(body, config)).await,
        };
        self.respond();
        self.charge_for_status();
        body
    }

    /// Makes the response to an extended CONNECT one of HTTP/2: a 2xx status stands for an open
    /// tunnel.
    fn check_switch<'b>(&mut self, body: ResponseBody<'b>) -> Result<ResponseBody<'b>, Error> {
        if !hop::is_extended_connect(self.request) {
            return Ok(body);
        }
        match self.response.status {
            StatusCode::SWITCHING_PROTOCOLS => hop::accept_extended_connect(self.response),
            status if status.is_success() => return Err(Error::NotSwitched),
            _ => {}
        }
        Ok(body)
    }

    async fn run<'b>(&mut self, mut body: RequestBody<'b>) -> Result<ResponseBody<'b>, Error> {
        let limits = &self.snapshot.http;
        if limits.route_body_bytes > 0 {
            // Connection and parser accept what the largest limit of a route allows.
            let max = self.route().config.body_bytes.unwrap_or(limits.body_bytes);
            if matches!(self.request.length, BodyLength::Known(length) if length > max) {
                return Err(UpstreamConnectionError::Client(BodyError::TooLarge).into());
            }
            body.limit(max);
        }
        if let Some(service) = &self.route().forward_auth {
            // Boxed: few routes have one.
            if let Some(denied) = Box::pin(self.authorize(service)).await? {
                return Ok(denied);
            }
        }
        if self.route().config.action != RouteAction::Forward {
            return Ok(self.answer());
        }
        if hop::decrement_max_forwards(self.request) {
            return Ok(ResponseBody::Bytes(degrade::write_options(self.response)));
        }
        match &self.route().config.cache {
            Some(_) if policy::is_cacheable_request(self.request) && !hop::offers_upgrade(self.request) => {
                self.look_up().await
            }
            _ if !self.request.method.is_safe() => {
                self.record.forward = ForwardReason::Method;
                self.unsafe_method(body).await
            }
            _ => self.forward(None, body).await.map(|body| ResponseBody::Upstream(Box::new(body))),
        }
    }

    /// Answers by the route itself: a redirect, or a fixed response.
    #[cold]
    fn answer(&mut self) -> ResponseBody<'static> {
        let mut response = Response::default();
        let body = self.route().config.action.answer(&self.template_values(), &mut response);
        if self.route().config.compress.is_none() {
            response.forms = None;
        }
        *self.response = response;
        self.record.detail = CacheDetail::Reason("route");
        ResponseBody::Bytes(body.unwrap_or_default())
    }
}

/// The failure of a body that fails before the head of its response is sent. Does not wait: the
/// head of a response whose body is late is sent without it.
async fn first_failure(body: &mut ResponseBody<'_>) -> Option<BodyError> {
    if body.complete_body().is_some() {
        return None;
    }
    poll_fn(|cx| {
        Poll::Ready(match body.poll_fill(cx) {
            Poll::Ready(Err(error)) => Some(error),
            Poll::Ready(Ok(())) | Poll::Pending => None,
        })
    })
    .await
}
