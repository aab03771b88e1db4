//! The phases after `admit`, in order: cache or upstream, degrade after a failure, respond.

use super::context::RequestContext;
use super::response_body::ResponseBody;
use crate::cache::policy;
use crate::error::Error;
use crate::http::request_body::RequestBody;
use crate::record::ForwardReason;
use crate::{degrade, hop};

impl RequestContext<'_> {
    /// Answers a request that was admitted: fills the response head and returns the body.
    ///
    /// Dropping the future cancels the request and closes its upstream connection, unless other
    /// requests wait for the same response.
    pub(crate) async fn handle<'b>(&mut self, body: RequestBody<'b>) -> ResponseBody<'b> {
        let body = match self.run(body).await {
            Ok(body) => body,
            Err(error) => self.degrade(error),
        };
        self.respond();
        self.charge_for_status();
        body
    }

    async fn run<'b>(&mut self, body: RequestBody<'b>) -> Result<ResponseBody<'b>, Error> {
        if hop::decrement_max_forwards(self.request) {
            return Ok(ResponseBody::Bytes(degrade::write_options(self.response)));
        }
        match &self.route().config.cache {
            Some(cache) if policy::is_cacheable_request(self.request) && !hop::offers_upgrade(self.request) => {
                self.look_up(cache).await
            }
            _ if !self.request.method.is_safe() => {
                self.record.forward = ForwardReason::Method;
                self.unsafe_method(body).await
            }
            _ => self.forward(None, body).await.map(ResponseBody::Upstream),
        }
    }
}
