//! The origin of all cases: it finds the case by the request's path and says what the case tells it to say.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use crate::rule::{Framing, Reply, Step};
use crate::support::{Origin, Received, Script, lock};
use crate::text::Moment;

/// What the origin knows of a case.
pub(crate) struct Part {
    moment: Moment,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    standing: Option<Reply>,
    queue: VecDeque<Reply>,
    last: Option<Reply>,
    received: Vec<Received>,
    /// Bodies of the answers so far.
    bodies: Vec<Vec<u8>>,
    spoken: Vec<String>,
}

impl Part {
    /// What the origin says from now on.
    pub(crate) fn expect(&self, replies: &[Reply]) {
        lock(&self.state).queue = replies.iter().cloned().collect();
    }

    pub(crate) fn asked(&self) -> usize {
        lock(&self.state).received.len()
    }

    pub(crate) fn received(&self, from: usize) -> Vec<Received> {
        lock(&self.state).received[from..].to_vec()
    }

    /// What it said, for the transcript.
    pub(crate) fn spoken(&self, from: usize) -> Vec<String> {
        lock(&self.state).spoken[from..].to_vec()
    }

    pub(crate) fn bodies(&self) -> Vec<Vec<u8>> {
        lock(&self.state).bodies.clone()
    }

    fn reply(&self, request: &Received) -> Script {
        let mut state = lock(&self.state);
        state.received.push(request.clone());
        let reply = state.queue.pop_front().or_else(|| state.standing.clone()).or_else(|| state.last.clone());
        state.last.clone_from(&reply);
        let number = state.received.len();
        let Some(reply) = reply else {
            state.spoken.push("500: the case has no answer for this request".to_owned());
            return Script::reply(500, &[("X-Unscripted", "1")], "");
        };
        let mut script = Script::new();
        let mut spoken = String::new();
        for step in &reply.0 {
            script = match step {
                Step::Pause(time) => script.pause(*time),
                Step::Close => script.close(),
                Step::Reset => script.reset(),
                Step::Hang => script.hang(),
                Step::Raw(text) => {
                    let bytes = self.moment.bytes(text);
                    spoken.push_str(&String::from_utf8_lossy(&bytes));
                    script.send(bytes)
                }
                Step::Head { status, framing, body, fields } => {
                    let (head, body) = self.head(*status, *framing, body.as_deref(), fields, number);
                    spoken.push_str(&String::from_utf8_lossy(&head));
                    state.bodies.push(body.clone());
                    let body = framed(body, *framing, fields);
                    if request.method == "HEAD" {
                        script.send(head)
                    } else {
                        spoken.push_str(&String::from_utf8_lossy(&body));
                        script.send([head, body].concat())
                    }
                }
            };
            if !matches!(step, Step::Raw(_) | Step::Head { .. }) {
                spoken.push_str(&format!("[{step:?}]"));
            }
        }
        state.spoken.push(spoken);
        script
    }

    /// A head, and the body that belongs to it.
    fn head(
        &self,
        status: u16,
        framing: Framing,
        body: Option<&str>,
        fields: &[String],
        number: usize,
    ) -> (Vec<u8>, Vec<u8>) {
        let is_bare = matches!(status, 100..=199 | 204 | 205 | 304);
        let body = match body {
            Some(body) => self.moment.bytes(body),
            None if is_bare => Vec::new(),
            None => format!("answer {number}").into_bytes(),
        };
        let mut head = format!("HTTP/1.1 {status} Scripted\r\n").into_bytes();
        for field in fields {
            head.extend(self.moment.bytes(field));
            head.extend(b"\r\n");
        }
        if !has_framing(fields) {
            match framing {
                Framing::Chunked => head.extend(b"Transfer-Encoding: chunked\r\n"),
                Framing::Length if !is_bare || status == 205 => {
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

/// The body as it goes over the wire; where the fields frame it themselves, it is sent as written.
fn framed(body: Vec<u8>, framing: Framing, fields: &[String]) -> Vec<u8> {
    if framing != Framing::Chunked || has_framing(fields) {
        return body;
    }
    crate::support::client::chunked(&body, (body.len() / 2).max(1))
}

/// The cases under way, by their keys.
#[derive(Default)]
pub(crate) struct Book(Mutex<HashMap<String, Arc<Part>>>);

impl Book {
    pub(crate) fn enter(&self, key: &str, moment: Moment, standing: Option<Reply>) -> Arc<Part> {
        let part = Arc::new(Part { moment, state: Mutex::new(State { standing, ..State::default() }) });
        lock(&self.0).insert(key.to_owned(), Arc::clone(&part));
        part
    }

    fn find(&self, target: &str) -> Option<Arc<Part>> {
        let mut segments = target.split('/').skip(2);
        let segment = segments.next()?;
        let is_key = |byte: char| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == '-';
        let end = segment.find(|byte| !is_key(byte)).unwrap_or(segment.len());
        lock(&self.0).get(&segment[..end]).cloned()
    }
}

pub(crate) fn start(book: &Arc<Book>) -> Origin {
    let book = Arc::clone(book);
    Origin::start(move |request| match book.find(&request.target) {
        Some(part) => part.reply(request),
        None => Script::reply(500, &[("X-Unscripted", "no case has this path")], ""),
    })
}
