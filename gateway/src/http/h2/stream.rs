//! The state of one stream, without its request body.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::{Context, Waker};

use super::frame::Http2ErrorCode;
use super::priority::Priority;
use super::request_body::UploadStream;
use crate::http::refusal::RequestRefusal;

/// One stream of a connection. `B` is the body of its response.
pub(super) struct Http2Stream<B> {
    pub(super) id: u32,
    /// `None`: the head of the request has ended the stream.
    pub(super) upload: Option<Rc<UploadStream>>,
    /// The stream was reset, by either side.
    pub(super) reset: Cell<Option<Http2ErrorCode>>,
    /// It is ended because its upstream did not read what it held.
    pub(super) is_stalled: Cell<bool>,
    /// The request is a call of gRPC, whose client is told by a status why it is ended.
    pub(super) is_call: Cell<bool>,
    /// The last frame of the response was handed over.
    pub(super) has_sent_end: Cell<bool>,
    pub(super) window: Cell<i64>,
    pub(super) priority: Cell<Priority>,
    /// The turn in which the stream was served last, if it shares its turns.
    pub(super) served: Cell<u64>,
    /// The body has bytes that can be sent once the client allows it and it is the stream's turn.
    pub(super) is_ready: Cell<bool>,
    /// Bytes of the body that were handed over.
    pub(super) sent: Cell<u64>,
    pub(super) outgoing: RefCell<Option<OutgoingBody<B>>>,
    waker: RefCell<Option<Waker>>,
    /// Accounted bytes.
    pub(super) cost: usize,
    /// Bytes that are accounted for the head of the response in addition.
    pub(super) head_cost: Cell<usize>,
    /// Bytes that are accounted for the body of the response in addition, while it has any.
    pub(super) read_grant: Cell<usize>,
}

/// The body of a response that is being sent.
pub(super) struct OutgoingBody<B> {
    pub(super) body: B,
    /// Bytes that the head has announced and that are not handed over.
    pub(super) remaining: Option<u64>,
}

impl<B> Http2Stream<B> {
    #[expect(clippy::too_many_arguments, reason = "the parts of a stream")]
    pub(super) fn new(
        id: u32,
        upload: Option<Rc<UploadStream>>,
        window: i64,
        priority: Priority,
        cost: usize,
    ) -> Rc<Self> {
        Rc::new(Http2Stream {
            id,
            upload,
            reset: Cell::new(None),
            is_stalled: Cell::new(false),
            is_call: Cell::new(false),
            has_sent_end: Cell::new(false),
            window: Cell::new(window),
            priority: Cell::new(priority),
            served: Cell::new(0),
            is_ready: Cell::new(false),
            sent: Cell::new(0),
            outgoing: RefCell::new(None),
            waker: RefCell::new(None),
            cost,
            head_cost: Cell::new(0),
            read_grant: Cell::new(0),
        })
    }

    /// Whether the client has ended its side.
    pub(super) fn has_received_end(&self) -> bool {
        self.upload.as_ref().is_none_or(|upload| upload.has_ended())
    }

    pub(super) fn register(&self, cx: &Context<'_>) {
        let mut waker = self.waker.borrow_mut();
        if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
    }

    pub(super) fn wake(&self) {
        if let Some(waker) = self.waker.borrow_mut().take() {
            waker.wake();
        }
    }

    /// Ends the stream in both directions, for a reason that the reader of the request is told.
    pub(super) fn end_by(&self, code: Http2ErrorCode, reason: RequestRefusal) {
        self.reset.set(Some(code));
        if let Some(upload) = &self.upload {
            upload.reset(reason);
        }
        self.wake();
    }
}
