//! The content of a table: topics, rules, and the exchanges that demonstrate a rule. Text is stored
//! as written; placeholders in braces are expanded when an exchange is run.

use std::time::Duration;

/// A file of rules.
#[derive(Debug)]
pub(crate) struct Topic {
    /// The file name without its extension.
    pub(crate) name: String,
    pub(crate) title: String,
    /// Paragraphs before the rules on the page.
    pub(crate) about: Vec<String>,
    pub(crate) rules: Vec<Rule>,
}

/// One line of the page.
#[derive(Debug)]
pub(crate) struct Rule {
    pub(crate) id: String,
    /// Such as `RFC 9111 4.2.1`.
    pub(crate) sections: Vec<String>,
    pub(crate) sentence: String,
    /// One case for each value of `each`, or a single case.
    pub(crate) cases: Vec<Case>,
}

/// A rule with one value of `each`, as it is run.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    /// File and line, for messages.
    pub(crate) at: String,
    /// The last segment of the path, unique over all files.
    pub(crate) key: String,
    /// The value of `each`, empty without `each`.
    pub(crate) value: String,
    /// The first segment of the path, which selects the route.
    pub(crate) route: String,
    /// The reply of the origin to requests for which no exchange scripts one.
    pub(crate) default_reply: Option<Reply>,
    pub(crate) actions: Vec<Action>,
}

#[derive(Clone, Debug)]
pub(crate) enum Action {
    Wait(Duration),
    Send(Exchange),
}

/// A request, the replies of the origin, and the expectations.
#[derive(Clone, Debug)]
pub(crate) struct Exchange {
    pub(crate) at: String,
    pub(crate) method: String,
    /// Appended to the path of the case. An absolute target and `*` are sent unchanged.
    pub(crate) target: String,
    pub(crate) fields: Vec<String>,
    pub(crate) body: String,
    pub(crate) outcome: Outcome,
    /// Number of concurrent requests.
    pub(crate) times: usize,
    /// Repeats the exchange until it passes, for results of background work.
    pub(crate) is_eventual: bool,
    pub(crate) replies: Vec<Reply>,
    pub(crate) expects: Vec<Expect>,
}

/// The required source of the response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The cache. The origin receives no request.
    Hit,
    /// The origin, which receives one request.
    Miss,
    /// The cache, after the origin received one conditional request.
    Validated,
    /// The cache, while the origin receives one background request.
    Background,
    /// A fallback, after the origin received a request.
    Fallback,
    /// The gateway itself. The origin receives no request.
    Local,
    /// Any of these.
    Any,
}

/// The actions of the origin for one request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reply(pub(crate) Vec<Step>);

#[derive(Clone, Debug)]
pub(crate) enum Step {
    Head(ResponseSpec),
    Raw(String),
    Pause(Duration),
    Close,
    Reset,
    Hang,
}

/// A response of the origin.
#[derive(Clone, Debug)]
pub(crate) struct ResponseSpec {
    pub(crate) status: u16,
    pub(crate) framing: Framing,
    pub(crate) body: Option<String>,
    pub(crate) fields: Vec<String>,
}

/// How the origin delimits a body, unless the fields do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    Length,
    Chunked,
    /// By the end of the connection, or not at all.
    None,
}

/// An expectation of a response, or of a request at the origin.
#[derive(Clone, Debug)]
pub(crate) enum Expect {
    Status(u16),
    /// A line of the response. The value may be a range of numbers, `10..12`.
    Field(String, String),
    /// All lines of a field, in order.
    Lines(String, Vec<String>),
    Contains(String, String),
    Has(String),
    Absent(String),
    Body(String),
    BodyContains(String),
    /// A parameter of the `Cache-Status` member of the gateway, or (false) its absence.
    CacheStatus(String, bool),
    Interim(u16),
    Trailer(String, String),
    NoTrailers,
    /// The response must not appear complete.
    Truncated,
    SentMethod(String),
    SentTarget(String),
    SentField(String, String),
    SentContains(String, String),
    SentHas(String),
    SentAbsent(String),
    SentBody(String),
}
