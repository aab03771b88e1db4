//! The answers to requests that a limit denied, kept ready: all that one rule lets wait equally long get the same one.
//!
//! A flood is answered by copying. Invariant: what is kept was composed from its wording alone, so that nothing in it is one client's.

use std::cell::RefCell;
use std::rc::Rc;

use bytes::Bytes;
use limiter::Denial;

use crate::degrade::{self, Form};
use crate::error::Error;
use crate::http::h1::Written;
use crate::http::message::Response;
use crate::limit::{Face, Wording};
use crate::respond::{self, Story};

/// Answers kept by a thread, in some 60 KiB.
const PLACES: usize = 64;

/// The answers that a thread gave last, each in the only place where it may be.
pub struct Denials(RefCell<Vec<Kept>>);

#[derive(Default)]
struct Kept {
    /// What it says and in which form, where it says anything yet.
    said: Option<(Wording, Form)>,
    /// It goes with its second.
    second: Option<u64>,
    denied: Rc<Denied>,
}

/// The answer to a denial.
#[derive(Clone, Default)]
pub struct Denied {
    pub(super) response: Response,
    pub(super) page: Bytes,
    /// Both as most clients get them.
    pub(super) written: Written,
}

impl Default for Denials {
    fn default() -> Self {
        Denials(RefCell::new((0..PLACES).map(|_| Kept::default()).collect()))
    }
}

impl Denials {
    /// The answer to a denial that `story` tells of.
    pub(super) fn answer(&self, denial: &Denial, form: Form, story: &Story, face: &Face) -> Rc<Denied> {
        let wording = face.wording(denial);
        let mut places = self.0.borrow_mut();
        let kept = &mut places[wording.spread() as usize % PLACES];
        let (said, second) = (Some((wording, form)), degrade::second());
        if kept.said != said || kept.second != second || second.is_none() {
            // In the same memory, unless somebody is being told yet.
            Rc::make_mut(&mut kept.denied).compose(form, story, face);
            (kept.said, kept.second) = (said, second);
        }
        Rc::clone(&kept.denied)
    }
}

impl Denied {
    fn compose(&mut self, form: Form, story: &Story, face: &Face) {
        let Denied { response, page, written } = self;
        let status = Error::Limited.status();
        *page = degrade::standard(status, &Error::Limited, form);
        degrade::head(status, form, page, response);
        respond::write_cache_status(story, &mut response.fields);
        face.write_verdict(&story.verdict, &mut response.fields);
        written.write(response, page);
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;
    use std::time::{Duration, UNIX_EPOCH};

    use limiter::{Class, Quota, Rate, Rule, Standing, Tier, Verdict, Votes};

    use super::*;
    use crate::http::fields::KnownSet;
    use crate::http::message::Length;
    use crate::limit::{self, RuleSettings, Settings, Tells};

    fn quota() -> Quota {
        let rate = Rate::new(1, 60).expect("a rate");
        Quota::new(rate, NonZeroU32::MIN).expect("a quota")
    }

    fn face(name: &str, tells: Tells) -> Face {
        let rule = Rule::new(name, Tier::Device, quota());
        let settings = Settings { rules: vec![RuleSettings { rule, tells, per_address: None }], ..Settings::default() };
        limit::build(&settings, 0, false, None).expect("a rule").1
    }

    fn denial(remaining: u64, reset: u64, wait: u64) -> Denial {
        let standing = Standing { rule: 0, quota: quota(), remaining, reset: Duration::from_secs(reset) };
        let retry_after = Duration::from_secs(wait);
        Denial { standing, retry_after, votes: Votes::default(), class: Class(0) }
    }

    /// All that is sent.
    fn written(denials: &Denials, denial: &Denial, face: &Face, form: Form) -> String {
        let verdict = Verdict::Denied(*denial);
        let story = Story { verdict, detail: respond::Detail::Reason("limited"), ..Story::default() };
        let Denied { response, page, .. } = &*denials.answer(denial, form, &story, face);
        assert_eq!(response.length, Length::Known(page.len() as u64));
        let mut text = format!("{}\n", response.status).into_bytes();
        response.fields.write_lines(&mut text, KnownSet::default());
        text.extend_from_slice(page);
        String::from_utf8(text).expect("ASCII")
    }

    #[test]
    fn what_is_kept_is_what_would_be_composed() {
        let faces = [face("few", Tells::Everything), face("less", Tells::Everything), face("few", Tells::Nothing)];
        let denials = Denials::default();
        for second in [1_000, 1_000, 1_001] {
            degrade::set_date(UNIX_EPOCH + Duration::from_secs(second));
            for face in &faces {
                for form in [Form::Json, Form::Html] {
                    // More than there are places, and some that share one.
                    for wait in (0..100).chain([u64::from(u32::MAX)]) {
                        let denial = denial(wait % 3, wait + 5, wait);
                        let anew = written(&Denials::default(), &denial, face, form);
                        assert_eq!(written(&denials, &denial, face, form), anew);
                        assert!(anew.contains(&format!("retry-after: {wait}\r\n")), "{anew}");
                        assert!(anew.contains(&format!("00:16:{} GMT\r\n", second - 960)), "{anew}");
                    }
                }
            }
        }
        let told = written(&denials, &denial(0, 60, 1), &faces[1], Form::Json);
        assert!(told.contains("ratelimit: \"less\";r=0;t=60\r\n"), "{told}");
        assert!(!written(&denials, &denial(0, 60, 1), &faces[2], Form::Json).contains("ratelimit"));
    }
}
