//! Owns how notices go over the bus: said by this node, heard of others, and said again to servers that were away.
//!
//! Refuses what the board refuses (see `notice`).

use super::event::Said;
use super::line::Line;
use super::notice::{NoRoom, Notice, Saying, TEXT_MAX};
use super::{ALL, Bus, Confirmation};
use crate::entry::Meta;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

impl<M: Meta> Bus<M> {
    /// Puts a notice up here and on every node of the fleet, or on the node `to` alone, and waits up to `within` for what they say. A
    /// node that starts later hears what is up for all. A server that cannot be told now is told what is for all when it is back.
    ///
    /// # Errors
    /// It was put up nowhere.
    pub async fn say(
        &self,
        name: &str,
        text: &str,
        lasting: Duration,
        to: Option<&str>,
        within: Duration,
    ) -> Result<Confirmation, NoRoom> {
        let deadline = Instant::now() + within;
        if name.len().max(text.len()) > TEXT_MAX {
            return Err(NoRoom);
        }
        let now = self.store.wall_time();
        let version = self.board.next_version(now);
        let mut confirmation = Confirmation::default();
        if to.is_none_or(|to| to == self.node) {
            self.board.put(&Saying { name, text, version, is_for_all: to.is_none() }, lasting, now)?;
            confirmation.nodes.insert(self.node.clone());
        }
        let mut telling = JoinSet::new();
        for (index, line) in self.lines.iter().enumerate().filter(|(_, line)| line.carries()) {
            let Some(way) = line.way() else {
                confirmation.untold.insert(line.label());
                continue;
            };
            let (name, text, from) = (name.to_owned(), text.to_owned(), self.member.clone());
            let to = to.unwrap_or(ALL).to_owned();
            telling.spawn(async move { (index, way.say((&name, &text, version), lasting, &to, &from).await) });
        }
        let mut places = BTreeMap::new();
        for (index, told) in telling.join_all().await {
            match told {
                Ok(at) => places.extend(at.map(|at| (index, at))),
                Err(_) => _ = confirmation.untold.insert(self.lines[index].label()),
            }
        }
        self.confirm(&places, to, deadline, &mut confirmation).await;
        Ok(confirmation)
    }

    /// The notices that hold on this node.
    pub fn notices(&self) -> Vec<Notice> {
        self.board.list()
    }

    /// Waits until a notice was put up since the last call; for one who listens. Cancel safe.
    pub async fn notices_changed(&self) {
        self.board.changed().await;
    }

    /// Says again to a server what is up for all nodes, and what was the last word before it ended: it may have been away, or have lost
    /// its memory. It takes no notice of what it knows.
    pub(super) async fn repeat_notices(self: &Arc<Self>, index: usize) {
        let Some(way) = self.lines[index].way() else { return };
        for notice in self.board.for_all() {
            let lasting = notice.until.saturating_duration_since(Instant::now());
            let said = (&*notice.name, &*notice.text, notice.version);
            if way.say(said, lasting, ALL, &self.member).await.is_err() {
                // It is tried again when the line is up again.
                return;
            }
        }
    }

    /// Puts up what a server says, and says whether it is news; how long it still holds is reckoned by the server's clock.
    pub(super) fn heed(&self, line: &Line, said: &Said, is_for_all: bool) -> bool {
        let Some(&shard) = line.shards.first() else { return false };
        let now_ms = self.store.shards_here()[shard].clock().now().unix_ms;
        let lasting = Duration::from_millis(said.until_ms.saturating_sub(now_ms));
        let saying = Saying { name: &said.name, text: &said.text, version: said.version, is_for_all };
        self.board.put(&saying, lasting, self.store.wall_time()).unwrap_or_else(|reason| {
            tracing::warn!(%reason, "a notice was not put up");
            false
        })
    }
}
