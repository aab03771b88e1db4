//! The origin of all cases. It finds the case by the request path and sends the responses that the
//! case scripts.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use crate::rule::{Framing, Reply, ResponseSpec, Step};
use crate::support::{Origin, ReceivedRequest, Script, lock};
use crate::template::TemplateContext;

/// The origin state of a case.
pub(crate) struct CaseOrigin {
    context: TemplateContext,
    state: Mutex<OriginState>,
}

#[derive(Default)]
struct OriginState {
    default_reply: Option<Reply>,
    scripted: VecDeque<Reply>,
    previous: Option<Reply>,
    received: Vec<ReceivedRequest>,
    /// Bodies of the responses so far.
    bodies: Vec<Vec<u8>>,
    sent: Vec<String>,
}

impl CaseOrigin {
    /// Replaces the scripted replies.
    pub(crate) fn script_replies(&self, replies: &[Reply]) {
        lock(&self.state).scripted = replies.iter().cloned().collect();
    }

    pub(crate) fn request_count(&self) -> usize {
        lock(&self.state).received.len()
    }

    pub(crate) fn received(&self, from: usize) -> Vec<ReceivedRequest> {
        lock(&self.state).received[from..].to_vec()
    }

    /// The bytes that the origin sent, for the transcript.
    pub(crate) fn sent(&self, from: usize) -> Vec<String> {
        lock(&self.state).sent[from..].to_vec()
    }

    pub(crate) fn bodies(&self) -> Vec<Vec<u8>> {
        lock(&self.state).bodies.clone()
    }

    fn reply(&self, request: &ReceivedRequest) -> Script {
        let mut state = lock(&self.state);
        state.received.push(request.clone());
        let reply =
            state.scripted.pop_front().or_else(|| state.default_reply.clone()).or_else(|| state.previous.clone());
        state.previous.clone_from(&reply);
        let number = state.received.len();
        let Some(reply) = reply else {
            state.sent.push("500: the case has no reply to this request".to_owned());
            return Script::reply(500, &[("X-Unscripted", "1")], "");
        };
        let mut script = Script::new();
        let mut sent = String::new();
        for step in &reply.0 {
            script = match step {
                Step::Pause(time) => script.pause(*time),
                Step::Close => script.close(),
                Step::Reset => script.reset(),
                Step::Hang => script.hang(),
                Step::Raw(text) => {
                    let bytes = self.context.bytes(text);
                    sent.push_str(&String::from_utf8_lossy(&bytes));
                    script.send(bytes)
                }
                Step::Head(spec) => {
                    let (head, body) = self.head(spec, number);
                    sent.push_str(&String::from_utf8_lossy(&head));
                    state.bodies.push(body.clone());
                    let body = framed(body, spec);
                    if request.method == "HEAD" {
                        script.send(head)
                    } else {
                        sent.push_str(&String::from_utf8_lossy(&body));
                        script.send([head, body].concat())
                    }
                }
            };
            if !matches!(step, Step::Raw(_) | Step::Head(_)) {
                sent.push_str(&format!("[{step:?}]"));
            }
        }
        state.sent.push(sent);
        script
    }

    /// Builds a response head and its body.
    fn head(&self, spec: &ResponseSpec, number: usize) -> (Vec<u8>, Vec<u8>) {
        let ResponseSpec { status, framing, body, fields } = spec;
        let is_bare = matches!(*status, 100..=199 | 204 | 205 | 304);
        let body = match body {
            Some(body) => self.context.bytes(body),
            None if is_bare => Vec::new(),
            None => format!("response {number}").into_bytes(),
        };
        let mut head = format!("HTTP/1.1 {status} Scripted\r\n").into_bytes();
        for field in fields {
            head.extend(self.context.bytes(field));
            head.extend(b"\r\n");
        }
        if !has_framing(fields) {
            match framing {
                Framing::Chunked => head.extend(b"Transfer-Encoding: chunked\r\n"),
                Framing::Length if !is_bare || *status == 205 => {
                    head.extend(format!("Content-Length: {}\r\n", body.len()).into_bytes());
                }
                Framing::Length | Framing::None => {}
            }
        }
        head.extend(b"\r\n");
        (head, body)
    }
}

fn has_framing(fields: &[String]) -> bool {
    let name = |field: &String| field.split(':').next().unwrap_or_default().to_ascii_lowercase();
    fields.iter().any(|field| matches!(name(field).as_str(), "content-length" | "transfer-encoding"))
}

/// Encodes the body for the wire. If the fields contain the framing, the body is sent unchanged.
fn framed(body: Vec<u8>, spec: &ResponseSpec) -> Vec<u8> {
    if spec.framing != Framing::Chunked || has_framing(&spec.fields) {
        return body;
    }
    crate::support::client::chunked(&body, (body.len() / 2).max(1))
}

/// The active cases by key.
#[derive(Default)]
pub(crate) struct CaseRegistry(Mutex<HashMap<String, Arc<CaseOrigin>>>);

impl CaseRegistry {
    pub(crate) fn register(
        &self,
        key: &str,
        context: TemplateContext,
        default_reply: Option<Reply>,
    ) -> Arc<CaseOrigin> {
        let case = Arc::new(CaseOrigin {
            context,
            state: Mutex::new(OriginState { default_reply, ..OriginState::default() }),
        });
        lock(&self.0).insert(key.to_owned(), Arc::clone(&case));
        case
    }

    fn find(&self, target: &str) -> Option<Arc<CaseOrigin>> {
        let mut segments = target.split('/').skip(2);
        let segment = segments.next()?;
        let is_key = |byte: char| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == '-';
        let end = segment.find(|byte| !is_key(byte)).unwrap_or(segment.len());
        lock(&self.0).get(&segment[..end]).cloned()
    }
}

pub(crate) fn start(registry: &Arc<CaseRegistry>) -> Origin {
    let registry = Arc::clone(registry);
    Origin::start(move |request| match registry.find(&request.target) {
        Some(case) => case.reply(request),
        None => Script::reply(500, &[("X-Unscripted", "no case has this path")], ""),
    })
}
