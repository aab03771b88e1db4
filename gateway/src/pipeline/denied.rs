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
pub struct Denied(RefCell<Vec<Option<Kept>>>);

struct Kept {
    wording: Wording,
    form: Form,
    /// It goes with its second.
    second: Option<u64>,
    refusal: Rc<Refusal>,
}

/// The answer to a denial.
pub struct Refusal {
    pub(super) response: Response,
    pub(super) page: Bytes,
    /// Both as most clients get them.
    pub(super) written: Written,
}

impl Default for Denied {
    fn default() -> Self {
        Denied(RefCell::new((0..PLACES).map(|_| None).collect()))
    }
}

impl Denied {
    /// The answer to a denial that `story` tells of.
    pub(super) fn answer(&self, denial: &Denial, form: Form, story: &Story, face: &Face) -> Rc<Refusal> {
        let wording = face.wording(denial);
        let mut places = self.0.borrow_mut();
        let place = &mut places[wording.spread() as usize % PLACES];
        let kept = match place {
            Some(kept) if kept.is(&wording, form) => kept,
            place => place.insert(Kept {
                wording,
                form,
                second: degrade::second(),
                refusal: Rc::new(Refusal::compose(form, story, face)),
            }),
        };
        Rc::clone(&kept.refusal)
    }
}

impl Kept {
    fn is(&self, wording: &Wording, form: Form) -> bool {
        self.wording == *wording && self.form == form && self.second.is_some() && self.second == degrade::second()
    }
}

impl Refusal {
    fn compose(form: Form, story: &Story, face: &Face) -> Self {
        let mut response = Response::new(Error::Limited.status());
        let page = degrade::standard(response.status, &Error::Limited, form);
        degrade::head(response.status, form, &page, &mut response);
        respond::write_cache_status(story, &mut response.fields);
        face.write_verdict(&story.verdict, &mut response.fields);
        let written = Written::new(&response, &page);
        Refusal { response, page, written }
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
    fn written(denied: &Denied, denial: &Denial, face: &Face, form: Form) -> String {
        let verdict = Verdict::Denied(*denial);
        let story = Story { verdict, detail: respond::Detail::Reason("limited"), ..Story::default() };
        let Refusal { response, page, .. } = &*denied.answer(denial, form, &story, face);
        assert_eq!(response.length, Length::Known(page.len() as u64));
        let mut text = format!("{}\n", response.status).into_bytes();
        response.fields.write_lines(&mut text, KnownSet::default());
        text.extend_from_slice(page);
        String::from_utf8(text).expect("ASCII")
    }

    #[test]
    fn what_is_kept_is_what_would_be_composed() {
        let faces = [face("few", Tells::Everything), face("less", Tells::Everything), face("few", Tells::Nothing)];
        let denied = Denied::default();
        for second in [1_000, 1_000, 1_001] {
            degrade::set_date(UNIX_EPOCH + Duration::from_secs(second));
            for face in &faces {
                for form in [Form::Json, Form::Html] {
                    // More than there are places, and some that share one.
                    for wait in (0..100).chain([u64::from(u32::MAX)]) {
                        let denial = denial(wait % 3, wait + 5, wait);
                        let anew = written(&Denied::default(), &denial, face, form);
                        assert_eq!(written(&denied, &denial, face, form), anew);
                        assert!(anew.contains(&format!("retry-after: {wait}\r\n")), "{anew}");
                        assert!(anew.contains(&format!("00:16:{} GMT\r\n", second - 960)), "{anew}");
                    }
                }
            }
        }
        let told = written(&denied, &denial(0, 60, 1), &faces[1], Form::Json);
        assert!(told.contains("ratelimit: \"less\";r=0;t=60\r\n"), "{told}");
        assert!(!written(&denied, &denial(0, 60, 1), &faces[2], Form::Json).contains("ratelimit"));
    }
}
