//! What a table says: topics, their rules, and the exchanges by which a rule is shown. Text is kept as written; what
//! stands in braces is filled in when an exchange is played.

use std::time::Duration;

/// A file of rules.
#[derive(Debug)]
pub(crate) struct Topic {
    /// The file's name without its ending.
    pub(crate) name: String,
    pub(crate) title: String,
    /// Paragraphs that stand before the rules on the page.
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
    /// One where the rule has no `each`, else one for each value.
    pub(crate) cases: Vec<Case>,
}

/// A rule with its values filled in, as it is played.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    /// File and line, for messages.
    pub(crate) at: String,
    /// The last segment of its path, unique over all files.
    pub(crate) key: String,
    /// The value of `each`, empty where there is none.
    pub(crate) value: String,
    /// The first segment of its path, by which the gateway chooses a route.
    pub(crate) profile: String,
    /// The origin's answer to what no exchange answers itself.
    pub(crate) standing: Option<Reply>,
    pub(crate) acts: Vec<Act>,
}

#[derive(Clone, Debug)]
pub(crate) enum Act {
    Wait(Duration),
    Ask(Exchange),
}

/// A request, what the origin says when it is asked, and what must come of it.
#[derive(Clone, Debug)]
pub(crate) struct Exchange {
    pub(crate) at: String,
    pub(crate) method: String,
    /// Appended to the path of the case; one with a scheme, and `*`, stand for themselves.
    pub(crate) target: String,
    pub(crate) fields: Vec<String>,
    pub(crate) body: String,
    pub(crate) outcome: Outcome,
    /// Requests sent at the same time.
    pub(crate) times: usize,
    /// Asked again until it holds: what is stored in the background comes when it comes.
    pub(crate) is_eventual: bool,
    pub(crate) replies: Vec<Reply>,
    pub(crate) expects: Vec<Expect>,
}

/// Where an answer has to come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// From the cache; the origin is not asked.
    Hit,
    /// From the origin, asked once.
    Miss,
    /// The origin is asked once, on condition that its answer is not the stored one.
    Valid,
    /// From the cache; the origin is asked once beside.
    Aside,
    /// The origin is asked, and something else answers.
    Failed,
    /// From the gateway itself; the origin is not asked.
    Refused,
    /// Either is right.
    Any,
}

/// What the origin does for one request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reply(pub(crate) Vec<Step>);

#[derive(Clone, Debug)]
pub(crate) enum Step {
    Head { status: u16, framing: Framing, body: Option<String>, fields: Vec<String> },
    Raw(String),
    Pause(Duration),
    Close,
    Reset,
    Hang,
}

/// How the origin delimits a body whose fields do not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    Length,
    Chunked,
    /// By the end of the connection, or not at all.
    None,
}

/// What must hold of an answer, or of the request that the origin got.
#[derive(Clone, Debug)]
pub(crate) enum Expect {
    Status(u16),
    /// A line of the answer; the value may be a range of numbers, `10..12`.
    Field(String, String),
    /// All lines of a field in order.
    Lines(String, Vec<String>),
    Contains(String, String),
    Has(String),
    Absent(String),
    Body(String),
    BodyContains(String),
    /// A parameter of the gateway's member of `Cache-Status`, or (false) its absence.
    Tells(String, bool),
    Interim(u16),
    Trailer(String, String),
    NoTrailers,
    /// The answer must not look whole.
    Cut,
    SentMethod(String),
    SentTarget(String),
    SentField(String, String),
    SentContains(String, String),
    SentHas(String),
    SentAbsent(String),
    SentBody(String),
}
