//! What is tried out on this node, by the word of its own operators and of other nodes': notices on the bus, one for each rule.
//!
//! Refuses to change a rule in another way: so every node knows the last word, whoever spoke, through reloads and restarts.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use super::Shared;
use super::control::CONFIRM_WITHIN;
use crate::event::Event;
use crate::limit::{BadInquiry, Change, Inquiry, Told};

/// What the notices about a rule are called, before its name.
const LIMIT: &str = "limit:";

pub(super) struct Trials {
    shared: Arc<Shared>,
    /// Versions of the notices that took effect, by name: each is logged once.
    heeded: RefCell<HashMap<String, u64>>,
}

impl Trials {
    pub(super) fn new(shared: &Arc<Shared>) -> Self {
        Trials { shared: Arc::clone(shared), heeded: RefCell::default() }
    }

    /// Puts into effect what notices say. One about a rule that is not configured here waits for a reload that brings it.
    pub(super) fn heed(&self) {
        let (site, config) = (self.shared.site.load(), self.shared.config.load());
        let (notices, mut heeded) = (self.shared.bus.notices(), self.heeded.borrow_mut());
        heeded.retain(|name, _| {
            let holds = notices.iter().any(|notice| notice.name == *name);
            if !holds && let Some(rule) = name.strip_prefix(LIMIT) {
                // Its time is over, or it was replaced by one whose time was over when this node heard of it.
                let _gone_with_its_rule = Change::End.take_effect(&site.limiter, &config.limit, rule);
            }
            holds
        });
        for notice in notices {
            let Some(rule) = notice.name.strip_prefix(LIMIT) else { continue };
            let lasting = notice.until.saturating_duration_since(Instant::now());
            let Some(change) = Change::of_text(&notice.text, lasting) else {
                tracing::debug!(rule, text = notice.text, "a trial that is not understood");
                continue;
            };
            let is_new = heeded.get(&notice.name) != Some(&notice.version);
            if change.take_effect(&site.limiter, &config.limit, rule).is_ok() && is_new {
                Event::LimitChanged { rule, what: &change.told() }.emit();
                heeded.insert(notice.name, notice.version);
            }
        }
    }

    /// Answers what is asked of limits. A change is told to the nodes it is for, and the answer says who has not confirmed it in time.
    pub(super) async fn inquire(self: Rc<Self>, inquiry: Inquiry) -> Result<Told, BadInquiry> {
        let answer = || {
            let (site, config) = (self.shared.site.load(), self.shared.config.load());
            inquiry.answer(&site.limiter, &config.limit, &site.identity)
        };
        let known = answer()?;
        let Inquiry::Change { rule, change, node } = &inquiry else {
            return Ok(Told { value: known, is_complete: true });
        };
        let (name, text) = (format!("{LIMIT}{rule}"), change.to_text());
        let said = self.shared.bus.say(&name, &text, change.lasting(), node.as_deref(), CONFIRM_WITHIN).await?;
        self.heed();
        let mut value = answer()?;
        value["acknowledged"] = said.nodes.iter().cloned().collect();
        value["missing"] = said.missing.iter().cloned().collect();
        value["untold"] = said.untold.iter().cloned().collect();
        Ok(Told { value, is_complete: said.missing.is_empty() && said.untold.is_empty() })
    }
}
