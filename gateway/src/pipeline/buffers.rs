//! The memory that consecutive requests of one connection reuse.

use std::time::Instant;

use super::caller_cache::CallerCache;
use crate::http::message::{Request, Response, StatusCode};
use crate::peer::ConnectionPeer;
use crate::record::RequestRecord;

/// Peer and arrival time of a request.
#[derive(Clone, Debug)]
pub(crate) struct Arrival {
    pub(crate) peer: ConnectionPeer,
    pub(crate) at: Instant,
}

/// One request with its response and record.
pub(crate) struct ExchangeBuffers {
    pub(crate) request: Request,
    pub(crate) response: Response,
    pub(crate) record: RequestRecord,
    pub(super) caller_cache: CallerCache,
}

impl ExchangeBuffers {
    /// Allocated bytes of the heads.
    pub(crate) fn heap_bytes(&self) -> usize {
        let ExchangeBuffers { request, response, .. } = self;
        let target = request.target.capacity() + request.authority.capacity();
        request.fields.heap_bytes() + response.fields.heap_bytes() + target
    }
}

impl Default for ExchangeBuffers {
    fn default() -> Self {
        ExchangeBuffers {
            request: Request::default(),
            response: Response::new(StatusCode::OK),
            record: RequestRecord::default(),
            caller_cache: CallerCache::default(),
        }
    }
}
